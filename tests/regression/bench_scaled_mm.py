"""FP8 x FP8 through torch._scaled_mm (row and column scales, bf16 out), with fast accumulation and without: time and error.

python bench_scaled_mm.py OUT.json [M,M,...]

The four Llama-3-8B linears. Each arm is a CUDA graph over copies of its weight that exceed L2 together; arms replay in turn, the exact one
twice (A/A); medians and p10-p90 in us a product. error: relative L2 against float64 on the same codes."""

from __future__ import annotations

import datetime
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels import tune
from kernel_pytorch.precision import float8

ROWS = (16, 64, 256, 1024, 4096)
ROUNDS = 11
FP8 = torch.float8_e4m3fn


def measure(n: int, k: int, m: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, x_scale = float8.quantize_rows(torch.randn(m, k, device="cuda"), FP8)
    weight, w_scale = float8.quantize_rows(torch.randn(n, k, device="cuda"), FP8)
    weights = [weight, *(weight.clone() for _ in range(max(2, -(-tune.ROTATED_BYTES // (n * k))) - 1))]
    exact = (x.double() * x_scale.double()) @ (weight.double() * w_scale.double()).t()

    def product(w: torch.Tensor, fast: bool) -> torch.Tensor:
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    arms = {name: [functools.partial(product, w, name == "fast") for w in weights] for name in ("exact", "fast", "exact A/A")}
    times = {name: sorted(found) for name, found in tune.interleaved_us(arms, ROUNDS).items()}
    us = {name: round(statistics.median(found), 2) for name, found in times.items()}
    spread = {name: [round(found[len(found) // 10], 2), round(found[-1 - len(found) // 10], 2)] for name, found in times.items()}
    error = {name: tune.relative_error(product(weight, name == "fast"), exact) for name in ("exact", "fast")}
    return {"n": n, "k": k, "m": m, "us": us, "p10_p90": spread, "exact_over_fast": round(us["exact"] / us["fast"], 3), "error": error}


def main(out: Path, rows: tuple[int, ...]) -> None:
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(datetime.date.today())}
    found = []
    for n, k in op.LLAMA:
        for m in rows:
            found.append(measure(n, k, m))
            print(found[-1], flush=True)
    out.write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(map(int, sys.argv[2].split(","))) if len(sys.argv) > 2 else ROWS)
