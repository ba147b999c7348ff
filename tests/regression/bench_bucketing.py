"""What padding costs in Python, without a device, and what each strategy makes of one stream of lengths.

python tests/regression/bench_bucketing.py

First: microseconds a call around a recording that does nothing, least of many rounds: `before`, until the device would have its
graph; `all`, until the caller has its outputs. Second: 3,000 lengths, lognormal around 40 (seeded), cut at 256; fitted ladders
learn from 2,000. Of the others: buckets used, padding over real elements, sum of the buckets. Records, asserts no time."""

from __future__ import annotations

import time
from typing import Any

import torch
from bench_graph_overhead import Layers, NoDevice

from kernel_pytorch.choices import BucketStrategy, GraphDeploymentStrategy
from kernel_pytorch.graph.buckets import make_buckets
from kernel_pytorch.graph.capture import bucket_calls, graph_calls
from kernel_pytorch.graph.manager import CUDAGraphManager
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.schema import BucketingConfig

_ROUNDS, _CALLS = 40, 100
_LEARNED = 2000


class Text(Layers):
    def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> torch.Tensor:
        return input_ids


def overhead(num_layers: int, num_tensors: int) -> None:
    model, recorder = Text(num_layers).eval(), NoDevice()
    manager = CUDAGraphManager(recorder, terms(GraphDeploymentStrategy.aggressive), num_warmup_calls=1)
    dims = ["input_ids:1", "attention_mask:1", "token_type_ids:1"]
    bucketed = bucket_calls(model, graph_calls(model, manager), dims, BucketingConfig(), None)
    calls = [[torch.ones(1, length, dtype=torch.int64) for _ in range(num_tensors)] for length in (100, 101, 102)]
    with torch.inference_mode():
        for name, sizes in (("one length", calls[:1]), ("another length in every call", calls)):
            for args in (*calls, *calls):
                model(*args)
            rounds: list[tuple[float, float]] = []
            for _ in range(_ROUNDS):
                before = whole = 0.0
                for index in range(_CALLS):
                    start = time.perf_counter()
                    model(*sizes[index % len(sizes)])
                    whole += time.perf_counter() - start
                    before += recorder.launched - start
                rounds.append((before / _CALLS * 1e6, whole / _CALLS * 1e6))
            least = [min(column) for column in zip(*rounds, strict=True)]
            what = f"{len(list(model.modules())):4d} modules, {num_tensors} tensors, {name:29s}"
            print(f"{what} before {least[0]:6.1f} us, all {least[1]:6.1f} us")
    assert bucketed.report["buckets"][0]["captures"] == 1


def stream(strategy: BucketStrategy) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(3000, generator=generator) * 0.6).exp().mul(40).round().clamp(1, 256).int().tolist()
    ladder = make_buckets(BucketingConfig(strategy=strategy, max_size=256, step=32, growth=1.5, num_buckets=8), 16)
    num_ladders = 1 + sum(ladder.observe(length) for length in lengths[:_LEARNED])
    chosen = [(length, ladder.bucket_of(length) or 0) for length in lengths[_LEARNED:]]
    used, real = {bucket for _, bucket in chosen}, sum(length for length, _ in chosen)
    waste = sum(bucket - length for length, bucket in chosen) / real
    print(f"{strategy.value:15s} {num_ladders} ladders, {len(used):2d} buckets, waste {waste:.3f}, sum {sum(used):4d}: {sorted(used)}")


def main() -> None:
    torch.set_num_threads(1)
    overhead(0, 1)
    overhead(12, 3)
    for strategy in BucketStrategy:
        stream(strategy)


if __name__ == "__main__":
    main()
