"""Benchmark of kernels/row_quant against eager and compiled torch on one CUDA device: python bench_row_quant.py OUT.json [SECONDS]

Arms of one shape are CUDA graphs over rotating inputs, whose outputs all stay alive; they replay in turn, medians are
reported, ours runs twice (A/A), and a copy of as many bytes sets the bandwidth. `eager_us` is without graphs: what a caller
waits who launches one call after the other. One process a case and width compiles; they measure one at a time. A wrong result
ends its process. After SECONDS no further shape is begun.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.nn import functional as F

from kernel_pytorch.kernels import row_quant as op
from kernel_pytorch.precision import float8

ROTATED_BYTES = 240_000_000
ROUNDS = 11
EPS = 1e-5
FORMAT = "float8_e4m3fn"
ROWS = sorted({m for m, _ in op.LLAMA})
WIDTHS = sorted({k for _, k in op.LLAMA})
# Bytes a bf16 element costs at least: read and written once.
BYTES = {"quantize": 3, "norm": 3, "add_norm": 7, "swiglu": 5}
Arms = dict[str, Callable[..., Any]]


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return float8.quantize_rows(x, torch.float8_e4m3fn)


def arms_of(case: str, weight: torch.Tensor) -> Arms:
    """What computes one case: `torch` is the chain that eager and compiled run; `then quantize` is torch's kernels for what comes
    before, then ours for the codes alone."""
    norm = functools.partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=EPS)
    ours = functools.partial(op.rms_norm_quantize, weight=weight, eps=EPS, format=FORMAT)
    if case == "quantize":
        return {"ours": lambda x: op.quantize_rows(x, FORMAT), "torch": quantized}
    if case == "norm":
        return {
            "ours": ours,
            "ours, norm kept": functools.partial(ours, keep_norm=True),
            "then quantize": lambda x: op.quantize_rows(norm(x), FORMAT),
            "torch": lambda x: quantized(norm(x)),
        }
    if case == "add_norm":

        def add_then(x: torch.Tensor, residual: torch.Tensor, codes: Callable[[torch.Tensor], Any]) -> tuple[Any, torch.Tensor]:
            total = x + residual
            return codes(norm(total)), total

        return {
            "ours": lambda x, residual: ours(x, residual=residual),
            "then quantize": functools.partial(add_then, codes=lambda y: op.quantize_rows(y, FORMAT)),
            "torch": functools.partial(add_then, codes=quantized),
        }
    return {
        "ours": lambda gate, up: op.swiglu_quantize(gate, up, FORMAT),
        "then quantize": lambda gate, up: op.quantize_rows(F.silu(gate) * up, FORMAT),
        "torch": lambda gate, up: quantized(F.silu(gate) * up),
    }


def inputs_of(case: str, m: int, k: int) -> Iterator[tuple[torch.Tensor, ...]]:
    for _ in range(max(2, min(32, -(-ROTATED_BYTES // (m * k * BYTES[case]))))):
        values = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16)
        if case == "swiglu":
            yield values.chunk(2, 1)
        else:
            yield tuple(part.contiguous() for part in values.chunk(2, 1))[: 2 if case == "add_norm" else 1]


def leaves(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [leaf for item in result or () for leaf in leaves(item)]


def check(case: str, arms: Arms, given: tuple[torch.Tensor, ...]) -> float:
    """The share of codes that are not the eager chain's: neighbours where a 16-bit rounding fell to the other side."""
    q, expected = leaves(arms["ours"](*given))[0], leaves(arms["torch"](*given))[0]
    wrong = float((q.view(torch.int8) != expected.view(torch.int8)).float().mean())
    if wrong > (0 if case == "quantize" else 1e-3):
        raise SystemExit(f"wrong result: {case} {tuple(q.shape)}: {wrong:.2%} of the codes differ")
    return wrong


def captured(calls: list[Callable[[], Any]]) -> tuple[torch.cuda.CUDAGraph, int, list[Any]]:
    """A graph of all calls, each at least once, how many, and their outputs."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return graph, len(calls), kept


def interleaved(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int, Any]]) -> dict[str, float]:
    """Microseconds a call, median over rounds."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, count, _) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / count)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def one_after_the_other(call: Callable[[], Any], count: int = 40) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 1e6 / count, 1)


def measure(case: str, m: int, k: int, arms: Arms) -> dict[str, Any]:
    rotating = list(inputs_of(case, m, k))
    differing = check(case, arms, rotating[0])
    moved = m * k * BYTES[case]
    graphs = {}
    for name, arm in (*arms.items(), ("ours A/A", arms["ours"])):
        graphs[name] = captured([functools.partial(arm, *given) for given in rotating])
    sources = [torch.empty(moved // 2, dtype=torch.int8, device="cuda") for _ in rotating]
    graphs["copy"] = captured([source.clone for source in sources])
    us = interleaved(graphs)
    row = {"case": case, "m": m, "k": k, "us": us, "codes_differing": differing}
    row["terabytes_per_s"] = round(moved / us["ours"] / 1e6, 3)
    row["share_of_copy"] = round(us["copy"] / us["ours"], 3)
    if m <= 128:
        row["eager_us"] = {name: one_after_the_other(functools.partial(arm, *rotating[0])) for name, arm in arms.items()}
    return row


def work(case: str, k: int, deadline: float, barrier: Any, lock: Any, rows: Any) -> None:
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 32
    weight = torch.rand(k, device="cuda", dtype=torch.bfloat16) + 0.5
    arms = arms_of(case, weight)
    # Static shapes: each is compiled for itself, as for a caller who gives one.
    compiled = torch.compile(arms["torch"], fullgraph=True, dynamic=False)
    arms["compiled"] = compiled
    for m in ROWS:
        for arm in arms.values():
            arm(*next(inputs_of(case, m, k)))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with contextlib.suppress(threading.BrokenBarrierError):
        # Nobody waits for a process that died.
        barrier.wait(60)
    with lock:
        for m in ROWS:
            if time.time() > deadline:
                print(f"{case} {m}x{k}: no time left", flush=True)
                continue
            row = measure(case, m, k, arms)
            torch.cuda.empty_cache()
            rows.append(row)
            us, eager = row["us"], row.get("eager_us", "")
            print(f"{case} {m}x{k} {row['terabytes_per_s']:.2f} TB/s {row['share_of_copy']:.0%} of copy", us, eager, flush=True)


def main(path: str, seconds: float) -> None:
    deadline = time.time() + seconds
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        jobs = [(case, k) for case in BYTES for k in WIDTHS]
        rows, barrier, lock = manager.list(), manager.Barrier(len(jobs)), manager.Lock()
        processes = [context.Process(target=work, args=(case, k, deadline, barrier, lock, rows)) for case, k in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        result = sorted(rows, key=lambda row: (list(BYTES).index(row["case"]), row["k"], row["m"]))
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "format": FORMAT, "rows": result}
    with open(path, "w") as file:
        json.dump(facts, file, indent=1)
    failed = [job for job, process in zip(jobs, processes, strict=True) if process.exitcode]
    if failed:
        raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 600.0)
