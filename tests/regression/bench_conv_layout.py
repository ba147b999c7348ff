"""Benchmark of the hook conv_layout: a small residual CNN with its weights contiguous and channels_last, eager and compiled.

python bench_conv_layout.py OUT.json [cpu|cuda]

Arms of one case run in turn in one process; medians over rounds of five calls. `contiguous again` repeats an arm (A/A). An arm
whose output is off ends the process. Records, asserts no time."""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.backends.optimizer import lay_out_convolutions
from kernel_pytorch.schema import BackendConfig
from kernel_pytorch.verify.rows import relative_l2

ROUNDS, CALLS = 15, 5
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
# Element type, batch, image side, channels of the first stage.
CASES = {
    "cpu": [(torch.float32, 1, 64, 32), (torch.float32, 1, 224, 32), (torch.float32, 8, 64, 64)],
    "cuda": [(dtype, *size) for dtype in (torch.float32, torch.bfloat16) for size in ((1, 224, 64), (32, 224, 64), (8, 64, 256))],
}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second_norm(self.second(torch.relu(self.first_norm(self.first(x))))))


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 7, stride=2, padding=3), nn.ReLU(), Block(width), Block(width)]
    rest = [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), Block(2 * width), Block(2 * width)]
    return nn.Sequential(*stem, *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)).eval()


def compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(lambda x: model(x))


def laid_out(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    lay_out_convolutions(model, torch.channels_last)
    return model


def bench(device: str, dtype: torch.dtype, batch: int, side: int, width: int) -> dict[str, object]:
    base = network(width).to(device, dtype)
    x = torch.randn(batch, 3, side, side, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(1))
    last = laid_out(base)
    arms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "contiguous eager": base,
        "channels_last eager": last,
        "contiguous compiled": compiled(base),
        "channels_last compiled": compiled(last),
        "contiguous again": base,
    }

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        expected = base(x)
        for name, arm in arms.items():
            error = relative_l2(arm(x), expected)
            assert error <= ALLOWED[dtype], f"{name} is off by {error:.1e}"
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                wait()
                started = time.perf_counter()
                for _ in range(CALLS):
                    arm(x)
                wait()
                samples[name].append((time.perf_counter() - started) / CALLS * 1e3)
    case = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "side": side, "width": width}
    return {**case, "latency_ms": {name: round(statistics.median(values), 4) for name, values in samples.items()}}


def main(out: str, device: str) -> None:
    torch._dynamo.config.recompile_limit = 64
    facts = resolve(BackendConfig()).backend.facts
    record = {"device": facts.name, "threads": torch.get_num_threads(), "torch": torch.__version__, "cases": []}
    for case in CASES[device]:
        record["cases"].append(bench(device, *case))
        print(record["cases"][-1], flush=True)
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cpu")
