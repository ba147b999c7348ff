"""Packed weights to bf16 (kernels/expand) beside what torch.compile makes of the same, and a copy of as many bytes.

python bench_expand.py OUT.json [--rows 128,512,2048]

The four Llama-3-8B linears, fp8, int8 and NVFP4. First the expansion alone, then whole linears of many rows of x: the kernel for few
rows, the expanded weight with cuBLAS, and cuBLAS on a bf16 weight. Each arm is a CUDA graph over copies of its weight that exceed L2
together; arms replay in turn, medians and p10-p90 are recorded, ours runs twice (A/A). A bit that is not the reference's ends the run.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from kernel_pytorch.kernels import expand, skinny_w4a16, skinny_w4a16_space, skinny_w8a16, tune

ROUNDS = 15
DTYPE = torch.bfloat16

Call = Callable[[], torch.Tensor]
Stored = tuple[torch.Tensor, ...]


class Format:
    """How one format stores, expands and multiplies a layer (N, K)."""

    def __init__(self, name: str, n: int, k: int) -> None:
        self.name, self.n, self.k = name, n, k
        if name == "nvfp4":
            first: Stored = tuple(skinny_w4a16_space.store(torch.empty(n, k, device="cuda")))
        else:
            values = torch.randn(n, k, device="cuda")
            packed = skinny_w8a16.pack((values * 30).to(torch.int8) if name == "int8" else values.to(torch.float8_e4m3fn))
            first = packed, torch.rand(n, device="cuda") / 100
        self.num_bytes = sum(part.nbytes for part in first)
        copies = max(3, -(-tune.ROTATED_BYTES // self.num_bytes))
        self.stored = [tuple(part.clone() for part in first) for _ in range(copies)]

    def expanded(self, stored: Stored) -> torch.Tensor:
        if self.name == "nvfp4":
            return expand.four_bits(skinny_w4a16.Packed(*stored), self.k, DTYPE)
        return expand.eight_bits(stored[0], stored[1], self.k, self.name, DTYPE)

    def reference(self, *stored: torch.Tensor) -> torch.Tensor:
        if self.name == "nvfp4":
            return expand.four_bits_reference(skinny_w4a16.Packed(*stored), self.k, DTYPE)
        return expand.eight_bits_reference(stored[0], stored[1], self.k, self.name, DTYPE)

    def few_rows(self, x: torch.Tensor, stored: Stored) -> torch.Tensor:
        if self.name == "nvfp4":
            return skinny_w4a16.linear(x, skinny_w4a16.Packed(*stored))
        return skinny_w8a16.linear(x, stored[0], stored[1], format=self.name)


def timed(arms: dict[str, list[Call]]) -> dict[str, dict[str, float]]:
    """Microseconds a call: median, p10, p90."""
    rows = {}
    for name, found in tune.interleaved_us(arms, ROUNDS).items():
        us = sorted(found)
        rows[name] = {"us": statistics.median(us), "p10": us[len(us) // 10], "p90": us[-1 - len(us) // 10]}
    return {name: {key: round(value, 2) for key, value in row.items()} for name, row in rows.items()}


def alone(format: Format) -> dict[str, Any]:
    """The expansion: terabytes_per_s counts packed bytes and bf16 values, as the copy's counts what it reads and writes."""
    if not torch.equal(format.expanded(format.stored[0]), format.reference(*format.stored[0])):
        raise SystemExit(f"wrong result: {format.name} {format.n} x {format.k}")
    torch._dynamo.reset()
    compiled = torch.compile(format.reference, dynamic=False)
    moved = format.num_bytes + format.n * format.k * 2
    sources = [torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(max(3, -(-tune.ROTATED_BYTES // moved)))]
    target = torch.empty_like(sources[0])
    ours = [functools.partial(format.expanded, stored) for stored in format.stored]
    arms: dict[str, list[Call]] = {
        "ours": ours,
        "ours A/A": ours,
        "torch.compile": [functools.partial(compiled, *stored) for stored in format.stored],
        "copy": [functools.partial(target.copy_, source) for source in sources],
    }
    row = timed(arms)
    return {
        "arms": row,
        "terabytes_per_s": round(moved / row["ours"]["us"] / 1e6, 2),
        "share_of_copy": round(row["copy"]["us"] / row["ours"]["us"], 3),
    }


def linears(format: Format, m: int) -> dict[str, Any]:
    x = torch.randn(m, format.k, device="cuda", dtype=DTYPE)
    dense = [torch.randn(format.n, format.k, device="cuda", dtype=DTYPE) for _ in range(3)]
    arms: dict[str, list[Call]] = {
        "few rows": [functools.partial(format.few_rows, x, stored) for stored in format.stored],
        "expanded": [functools.partial(lambda stored: F.linear(x, format.expanded(stored)), stored) for stored in format.stored],
        "bf16 cuBLAS": [functools.partial(F.linear, x, weight) for weight in dense],
    }
    return {"m": m, "arms": timed(arms)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="128,512,2048")
    options = parser.parse_args()
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(datetime.date.today())}
    rows = []
    for n, k in skinny_w8a16.LLAMA:
        for name in ("float8_e4m3fn", "int8", "nvfp4"):
            torch.manual_seed(0)
            format = Format(name, n, k)
            row = {
                "n": n,
                "k": k,
                "format": name,
                **alone(format),
                "linears": [linears(format, m) for m in map(int, options.rows.split(","))],
            }
            rows.append(row)
            shown = ", ".join(f"{arm} {found['us']:.1f}" for arm, found in row["arms"].items())
            print(f"{n:5} x {k:5} {name:14} {shown} us, {row['share_of_copy']:.0%} of a copy", flush=True)
            for linear in row["linears"]:
                print(f"  M={linear['m']:5} " + ", ".join(f"{arm} {found['us']:.1f}" for arm, found in linear["arms"].items()), flush=True)
            options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
