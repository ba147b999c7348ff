"""Mixed NVFP4 and FP8 weights of MiniLM under a budget, every strategy and random choices: python bench_allocation.py OUT.json [SEARCH]

Error: mean 1 - cosine of sentence vectors, x1000, on held-out sentences that calibration never saw; weights are rounded in float32.
SEARCH: how NVFP4 picks its scales, `search` (default), `four_over_six` or `plain`.
"merged": the same after fusion=qkv, where Q, K and V are one matrix and one decision. "grouped": with allocation.grouped, where they
are three matrices and one decision.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from typing import Any

import torch

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.fusion.projections import FuseProjections
from kernel_pytorch.models.minilm import MiniLM
from kernel_pytorch.models.text import BuiltinSentences
from kernel_pytorch.optimizer import Context, Workload
from kernel_pytorch.precision.allocation import allocate
from kernel_pytorch.precision.scores import Scorer
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import AllocationConfig, AllocationStrategy, OnMismatch, ScaleSearch, WeightConfig
from kernel_pytorch.verify.model import collect_rows

BUDGETS = (5.0, 5.5, 6.0)
FORMATS = ["nvfp4", "float8_e4m3fn"]
ROWS, CALLS, DRAWS = 512, 64, 6


class Bench:
    """One model: the error and the bits of a choice of formats."""

    def __init__(self, model: torch.nn.Module, workload: Workload, weight: WeightConfig) -> None:
        self.model, self.workload, self.weight = model, workload, weight
        named = model.named_modules()
        self.linears = {name: module for name, module in named if isinstance(module, torch.nn.Linear) and "pooler" not in name}
        self.scorer = Scorer(model, self.linears, weight, workload, CALLS, 0)
        self.expected = self.held_out({})

    def held_out(self, formats: dict[str, str]) -> torch.Tensor:
        with self.scorer.storing(formats), torch.no_grad():
            return collect_rows(self.model, self.workload, ROWS)

    def error(self, formats: dict[str, str]) -> float:
        rows = self.held_out(formats)
        return 1000 * (1 - torch.cosine_similarity(rows.double(), self.expected.double(), dim=1)).mean().item()

    def bits(self, formats: dict[str, str]) -> float:
        sizes = {name: (self.linears[name].out_features, self.linears[name].in_features) for name in formats}
        used = sum(STORAGES[format].nbytes(*sizes[name], self.scorer.config_of(format)) for name, format in formats.items())
        return 8 * used / sum(linear.weight.numel() for linear in self.linears.values())

    def uniform(self, format: str) -> dict[str, Any]:
        formats = dict.fromkeys(self.linears, format)
        return {"choice": f"all {format}", "bits": self.bits(formats), "error": self.error(formats)}

    def row(self, strategy: AllocationStrategy, share: float, budget: float, note: str = "", *, grouped: bool = False) -> dict[str, Any]:
        config = AllocationConfig(
            strategy=strategy,
            effective_bits=budget,
            formats=FORMATS,
            num_calibration_calls=CALLS,
            sensitivity_share=share,
            grouped=grouped,
        )
        found = allocate(self.model, self.linears, self.weight, config, self.workload)
        name = strategy.value + ("" if share == 1 else f", a share of {share:g}") + note
        facts = {"bits": found.stats.effective_bits, "error": self.error(found.formats), "forwards": found.stats.forwards}
        print(f"{budget:.1f} {name:36s} {facts['error']:6.2f}  {facts['bits']:.3f} bits, {facts['forwards']} forwards", flush=True)
        return {
            "choice": name,
            "budget": budget,
            **facts,
            "wider": [layer for layer, chosen in found.formats.items() if chosen == FORMATS[1]],
        }

    def random(self, budget: float) -> dict[str, Any]:
        draws = []
        for seed in range(DRAWS):
            formats = dict.fromkeys(self.linears, FORMATS[0])
            for name in random.Random(seed).sample(list(self.linears), len(self.linears)):
                wider = formats | {name: FORMATS[1]}
                if self.bits(wider) <= budget:
                    formats = wider
            draws.append(self.error(formats))
        print(f"{budget:.1f} random {statistics.mean(draws):.2f} ({min(draws):.2f} to {max(draws):.2f})", flush=True)
        return {"choice": f"random, {DRAWS} draws", "budget": budget, "error": statistics.mean(draws), "draws": draws}


def main(path: str, search: str = "search") -> None:
    torch.manual_seed(0)
    loaded = MiniLM(dtype=None).load(data=BuiltinSentences(batch=8, length=32), seed=0, device=torch.device("cpu"))
    weight = WeightConfig(format="nvfp4", scale_search=ScaleSearch(search))
    single = Bench(structural_clone(loaded.model), loaded.workload, weight)
    fuse = FuseProjections(include=[], exclude=[])
    context = Context(CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate), loaded.workload)
    merged = Bench(fuse.apply(structural_clone(loaded.model), context).model, loaded.workload, weight)
    rows = [single.uniform(format) for format in FORMATS]
    arms = [(strategy, 1.0) for strategy in AllocationStrategy] + [(AllocationStrategy.layer_adaptive, 0.25)]
    for budget in BUDGETS:
        rows += [single.row(strategy, share, budget) for strategy, share in arms]
        for strategy in (AllocationStrategy.gradient_weighted, AllocationStrategy.layer_adaptive):
            rows.append(merged.row(strategy, 1.0, budget, ", merged"))
            rows.append(single.row(strategy, 1.0, budget, ", grouped", grouped=True))
        rows.append(single.random(budget))
    facts = {"command": f"python tests/regression/bench_allocation.py OUT.json {search}", "date": time.strftime("%Y-%m-%d")}
    facts |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "search": search, "sentences": ROWS}
    with open(path, "w") as file:
        json.dump({**facts, "rows": rows}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
