"""Benchmark of kernels/decode_attention against PyTorch's attention on one CUDA device: python bench_decode_attention.py OUT.json [PEERS]

PEERS: names of PEERS below, comma-separated; all without it, none with an empty string.

One Llama-3-8B layer's decode call, 8 key heads of 128 with 4 query heads each, and a mask as long as the keys. Each arm is a CUDA
graph over copies of keys and values that exceed L2 together; arms replay in turn, medians are reported, and ours runs twice (A/A).
`hidden` keys at the end are masked, as in a cache that is not full. One process a shape compiles its peers; processes measure one
at a time. A wrong result ends the run.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.kernels import decode_attention as op

ROTATED_BYTES = 240_000_000
LAUNCHES = 32
ROUNDS = 11
# (B, H, K, T, S, D) of op.LLAMA with no key hidden; then caches of which a quarter is full.
CASES = (*((shape, 0) for shape in op.LLAMA), (op.LLAMA[1], 6144), (op.LLAMA[3], 6144))
Call = Callable[[], torch.Tensor]


def math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    bias = mask.view(-1)
    heads = q.reshape(q.shape[0], -1, 1, q.shape[3])
    y = flex_attention(heads, k, v, score_mod=lambda score, b, h, t, s: score + bias[s], enable_gqa=True)
    assert isinstance(y, torch.Tensor)
    return y.view(q.shape)


def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a caller could do who knows that no key is hidden."""
    return scaled_dot_product_attention(q, k, v)


PEERS: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "sdpa no mask": unmasked,
    "math + compile": torch.compile(math, dynamic=False),
    "flex + compile": torch.compile(flex, dynamic=False),
}


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def rotated(shape: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    b, _, k, _, s, d = shape
    copies = max(3, -(-ROTATED_BYTES // (b * k * s * d * 4)))
    return [tuple(torch.randn(b, k, s, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(copies)]  # pyright: ignore


def microseconds(graphs: dict[str, torch.cuda.CUDAGraph], num_calls: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of one call of each graph, replayed in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / num_calls)
    return {name: round(statistics.median(t), 2) for name, t in times.items()}


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


class Prepared(NamedTuple):
    """arms: calls in turn over all copies. rest: what the record says besides times."""

    arms: dict[str, list[Call]]
    rest: dict[str, Any]


def prepare(shape: tuple[int, ...], hidden: int, wanted: list[str]) -> Prepared:
    torch.manual_seed(0)
    b, h, _, t, s, d = shape
    pairs = rotated(shape)
    order = [pairs[i % len(pairs)] for i in range(max(LAUNCHES if b * s < 65536 else 6, len(pairs)))]
    q = torch.randn(b, h, t, d, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, s, device="cuda", dtype=torch.bfloat16)
    mask[..., s - hidden :] = float("-inf")
    exact = op.reference(q.double(), pairs[0][0].double(), pairs[0][1].double(), mask.double())
    low = relative(op.reference(q, *pairs[0], mask), exact)
    arms: dict[str, Callable[..., torch.Tensor]] = {"ours": op.attention, "ours A/A": op.attention}
    arms |= {name: PEERS[name] for name in wanted if not (hidden and name == "sdpa no mask")}
    errors = {name: relative(arm(q, *pairs[0], mask), exact) for name, arm in arms.items()}
    if not errors["ours"] <= 2 * low:
        raise SystemExit(f"wrong result: {shape}, {hidden} hidden: error {errors['ours']:.2e}, reference {low:.2e}")
    torch.cuda.synchronize()
    calls = {name: [functools.partial(arm, q, *pair, mask) for pair in order] for name, arm in arms.items()}
    return Prepared(calls, {"b": b, "s": s, "hidden": hidden, "error": errors, "reference_error": low})


def case(shape: tuple[int, ...], hidden: int, wanted: list[str], barrier: Any, lock: Any, rows: Any) -> None:
    try:
        prepared = prepare(shape, hidden, wanted)
    finally:
        # Nobody measures while another compiles; one that fails keeps nobody waiting.
        barrier.wait(300)
    b, _, k, _, s, d = shape
    with lock:
        graphs = {name: captured(calls) for name, calls in prepared.arms.items()}
        medians = microseconds(graphs, len(prepared.arms["ours"]))
        rate = round(b * k * (s - hidden) * d * 4 / medians["ours"] / 1e6, 2)
        print(f"B={b} S={s} hidden={hidden} {rate} TB/s", medians, flush=True)
        rows.append({"us": medians, "terabytes_per_s": rate, **prepared.rest})


def main(path: str, wanted: list[str]) -> None:
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        rows, barrier, lock = manager.list(), manager.Barrier(len(CASES)), manager.Lock()
        processes = [context.Process(target=case, args=(shape, hidden, wanted, barrier, lock, rows)) for shape, hidden in CASES]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        result = sorted(rows, key=lambda row: (row["hidden"], row["b"], row["s"]))
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": result}
    with open(path, "w") as file:
        json.dump(facts, file, indent=1)
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        raise SystemExit(f"cases failed: exit codes {failed}")


if __name__ == "__main__":
    main(sys.argv[1], list(PEERS) if len(sys.argv) < 3 else [name for name in sys.argv[2].split(",") if name])
