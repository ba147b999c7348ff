"""Benchmark of kernels/skinny_w8a16 against cuBLAS and torchao on one CUDA device: python bench_skinny_w8a16.py OUT.json [PEERS]

PEERS: names of PEERS below, comma-separated; all without it. Compiling them takes minutes, an empty string compiles none.

Each arm is a CUDA graph over copies of its weight that exceed L2 together; arms replay in turn, medians are reported, and ours
runs twice (A/A). One process a layer compiles its peers; processes measure one at a time. A wrong result ends the run.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch.nn.functional import linear
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_

from kernel_pytorch.kernels import skinny_w8a16 as op

ROTATED_BYTES = 240_000_000
LAUNCHES = 32
ROUNDS = 11
# torchao's weight-only schemes dequantize first above one row; the table of one row and of eight shows both sides.
WEIGHT_ONLY_ROWS = (1, 8)
PEERS = {
    "fp8dq": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "fp8wo": Float8WeightOnlyConfig(),
    "int8wo": Int8WeightOnlyConfig(),
}


def quantize(w: torch.Tensor, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    largest = w.float().abs().amax(1)
    scale = largest / (127 if fmt == "int8" else 448)
    scaled = w.float() / scale[:, None]
    return (scaled.round() if fmt == "int8" else scaled).to(op.DTYPES[fmt]), scale


def captured(calls: list[Callable[[], torch.Tensor]]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(max(LAUNCHES, len(calls))):
            calls[i % len(calls)]()
    return graph


def torchao_weight(w: torch.Tensor, config: object) -> torch.Tensor:
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    module.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
    quantize_(module, config)
    return module.weight


def checked(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, packed: torch.Tensor, fmt: str) -> float:
    exact = op.reference(x.double(), weight, scale)
    error = float((op.linear(x, packed, scale, format=fmt).double() - exact).norm() / exact.norm())
    low = float((op.reference(x, weight, scale).double() - exact).norm() / exact.norm())
    if not error <= 2 * low:
        raise SystemExit(f"wrong result: {fmt} {tuple(weight.shape)} M={x.shape[0]}: error {error:.2e}, reference {low:.2e}")
    return error


def layer(n: int, k: int, wanted: list[str], barrier: object, lock: object, rows: object) -> None:
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 32
    copies = max(3, -(-ROTATED_BYTES // (n * k)))
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    ours = {fmt: [(op.pack(q), s) for q, s in (quantize(w, fmt) for w in dense)] for fmt in op.DTYPES}
    compiled = {name: torch.compile(lambda x, w: linear(x, w)) for name in wanted}
    peers = {name: [torchao_weight(w, config) for w in dense] for name, config in PEERS.items() if name in wanted}
    plans = []
    for m in op.ROWS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        arms: dict[str, list[Callable[[], torch.Tensor]]] = {}
        for name, fmt in (("ours fp8", "float8_e4m3fn"), ("ours fp8 A/A", "float8_e4m3fn"), ("ours int8", "int8")):
            arms[name] = [functools.partial(op.linear, x, p, s, format=fmt) for p, s in ours[fmt]]
        arms["bf16 cuBLAS"] = [functools.partial(linear, x, w) for w in dense]
        for name, weights in peers.items():
            if name == "fp8dq" or (m in WEIGHT_ONLY_ROWS and (m == 1 or name != "int8wo")):
                arms[name] = [functools.partial(compiled[name], x, w) for w in weights]
        errors = {fmt: checked(x, *quantize(dense[0], fmt), ours[fmt][0][0], fmt) for fmt in op.DTYPES}
        for calls in arms.values():
            calls[0]()
        plans.append((m, arms, errors))
    torch.cuda.synchronize()
    barrier.wait(300)
    with lock:
        for m, arms, errors in plans:
            graphs = {name: captured(calls) for name, calls in arms.items()}
            times: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(ROUNDS):
                for name, graph in graphs.items():
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    graph.replay()
                    start.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    times[name].append(start.elapsed_time(end) * 1e3 / max(LAUNCHES, copies))
            medians = {name: round(statistics.median(t), 2) for name, t in times.items()}
            print(f"{n}x{k} M={m:2d} {n * k / medians['ours fp8'] / 1e6:.2f} TB/s", medians, flush=True)
            rows.append(
                {"n": n, "k": k, "m": m, "us": medians, "terabytes_per_s": round(n * k / medians["ours fp8"] / 1e6, 2), "error": errors}
            )


def main(path: str, wanted: list[str]) -> None:
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        rows, barrier, lock = manager.list(), manager.Barrier(len(op.LLAMA)), manager.Lock()
        processes = [context.Process(target=layer, args=(n, k, wanted, barrier, lock, rows)) for n, k in op.LLAMA]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        result = sorted(rows, key=lambda row: (op.LLAMA.index((row["n"], row["k"])), row["m"]))
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": result}
    with open(path, "w") as file:
        json.dump(facts, file, indent=1)
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise SystemExit(f"layers failed: exit codes {failed}")


if __name__ == "__main__":
    main(sys.argv[1], list(PEERS) if len(sys.argv) < 3 else [name for name in sys.argv[2].split(",") if name])
