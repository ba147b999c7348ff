"""NVFP4 weights (kernels/skinny_w4a16) against torchao int4, gemlite NVFP4 and cuBLAS bf16, and against a kernel that only reads.

python bench_skinny_w4a16.py OUT.json [--rows 1,8,32] [--arms A,B]

The four Llama-3-8B linears. Each arm is a CUDA graph over copies of its weight that exceed L2 together; arms replay in turn, medians
and p10-p90 are recorded, ours runs twice (A/A). A wrong result of ours ends the run; a peer that cannot be built is a row with its
reason.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.kernels import skinny_w4a16 as op
from kernel_pytorch.kernels import skinny_w4a16_space as space
from kernel_pytorch.kernels import tune

NAMES = dict(zip(op.LLAMA, ("qkv", "o", "gate_up", "down"), strict=True))
FAILED = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
ROUNDS = 21
# Words that a program of the reading kernel reads.
READ_BLOCK = 4096

Call = Callable[[], torch.Tensor]


def ours(weights: list[torch.Tensor], x: torch.Tensor) -> list[Call]:
    first = space.store(weights[0])
    packed = [op.Packed(*(part.clone() for part in first)) for _ in range(-(-tune.ROTATED_BYTES // sum(part.nbytes for part in first)))]
    exact = op.reference(x.double(), op.dequantize(packed[0], x.shape[1]))
    error = tune.relative_error(op.linear(x, packed[0]), exact)
    low = tune.relative_error(op.reference(x, op.dequantize(packed[0], x.shape[1])), exact)
    if not error <= 2 * low:
        raise SystemExit(f"wrong result: {tuple(weights[0].shape)} M={x.shape[0]}: error {error:.2e}, reference {low:.2e}")
    return [functools.partial(op.linear, x, one) for one in packed]


def torchao_int4(weights: list[torch.Tensor], x: torch.Tensor) -> list[Call]:
    ao = importlib.import_module("torchao.quantization")
    module = nn.Linear(weights[0].shape[1], weights[0].shape[0], bias=False, device="meta", dtype=x.dtype)
    module.weight = nn.Parameter(weights[0].clone(), requires_grad=False)
    ao.quantize_(module, ao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    packed = [module.weight.clone() for _ in range(-(-tune.ROTATED_BYTES // (weights[0].numel() // 2)))]
    return [functools.partial(F.linear, x, one) for one in packed]


def gemlite(weights: list[torch.Tensor], x: torch.Tensor) -> list[Call]:
    make = importlib.import_module("gemlite").helper.A16W4_NVFP(device="cuda:0", dtype=x.dtype)
    layers = []
    for _ in range(-(-tune.ROTATED_BYTES // (weights[0].numel() // 2))):
        linear = nn.Linear(weights[0].shape[1], weights[0].shape[0], bias=False, device="meta", dtype=x.dtype)
        linear.weight = nn.Parameter(weights[0].clone(), requires_grad=False)
        layers.append(make.from_linear(linear, del_orig=False))
    return [functools.partial(layer, x) for layer in layers]


@triton.jit
def _read(x_ptr, out_ptr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + at, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(out_ptr + tl.program_id(0), tl.sum(values))


def reading(weights: list[torch.Tensor], x: torch.Tensor) -> list[Call]:
    """The floor: as many bytes as our weight has, read once by 16 KB a program, one number written of each."""
    size = sum(part.nbytes for part in space.store(weights[0])[:2]) // 4 // READ_BLOCK * READ_BLOCK
    stored = [torch.zeros(size, dtype=torch.int32, device="cuda") for _ in range(-(-tune.ROTATED_BYTES // (size * 4)))]
    out = torch.empty(size // READ_BLOCK, dtype=torch.int32, device="cuda")
    overlap = op.device(x.device.index).dependent_launch
    extra = {"launch_pdl": True} if overlap else {}
    kernel: Any = _read

    def call(one: torch.Tensor) -> torch.Tensor:
        kernel[(size // READ_BLOCK,)](one, out, BLOCK=READ_BLOCK, PDL=overlap, **extra)
        return out

    return [functools.partial(call, one) for one in stored]


def cublas(weights: list[torch.Tensor], x: torch.Tensor) -> list[Call]:
    return [functools.partial(F.linear, x, w) for w in weights]


ARMS = {
    "ours nvfp4": ours,
    "ours nvfp4 A/A": ours,
    "only reading": reading,
    "bf16 cuBLAS": cublas,
    "torchao int4": torchao_int4,
    "gemlite nvfp4": gemlite,
}


def measure(n: int, k: int, m: int, names: list[str]) -> dict[str, Any]:
    """One row: medians in us by arm, p10 and p90, TB/s of ours over 4.5 bits a weight."""
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(3)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    calls, graphs, failed = {}, {}, {}
    for name in names:
        try:
            calls[name] = ARMS[name](weights, x)
            calls[name][0]()
            graphs[name] = tune.graph_of(calls[name])
        except FAILED as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(tune.replay_us(graph) / tune.launches(calls[name]))
    times = {name: sorted(found) for name, found in times.items()}
    us = {name: round(statistics.median(found), 2) for name, found in times.items()}
    spread = {name: [round(found[len(found) // 10], 2), round(found[-1 - len(found) // 10], 2)] for name, found in times.items()}
    row = {"layer": NAMES[n, k], "n": n, "k": k, "m": m, "us": us, "p10_p90": spread, "failed": failed}
    row["terabytes_per_s"] = round(n * k * 0.5625 / us["ours nvfp4"] / 1e6, 2)
    for peer in ("torchao int4", "bf16 cuBLAS", "gemlite nvfp4"):
        if peer in us:
            row[f"over {peer}"] = round(us[peer] / us["ours nvfp4"], 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="1,2,4,8,16,32,64")
    parser.add_argument("--arms", default=",".join(ARMS))
    options = parser.parse_args()
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": str(datetime.date.today())}
    rows = []
    for n, k in op.LLAMA:
        for m in map(int, options.rows.split(",")):
            torch.manual_seed(0)
            rows.append(measure(n, k, m, options.arms.split(",")))
            found = rows[-1]
            shown = ", ".join(f"{name} {us:.2f}" for name, us in found["us"].items())
            over = f"x{found.get('over torchao int4')} int4, x{found.get('over bf16 cuBLAS')} bf16"
            print(f"{found['layer']:8} M={m:2d} {over}, {found['terabytes_per_s']:.2f} TB/s | {shown} {found['failed'] or ''}", flush=True)
            options.out.write_text(json.dumps({**facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
