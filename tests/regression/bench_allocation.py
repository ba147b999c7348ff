"""Mixed NVFP4 and FP8 weights of MiniLM under a budget, every strategy and random choices: python bench_allocation.py OUT.json [SEARCH]

Error: mean 1 - cosine of sentence vectors, x1000, on held-out sentences that calibration never saw; weights are rounded in float32.
SEARCH: how NVFP4 picks its scales, `search` (default), `four_over_six` or `plain`.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time

import torch

from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.models.minilm import MiniLM
from kernel_pytorch.models.text import BuiltinSentences
from kernel_pytorch.precision.allocation import allocate
from kernel_pytorch.precision.scores import Scorer
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import AllocationConfig, AllocationStrategy, ScaleSearch, WeightConfig
from kernel_pytorch.verify.model import collect_rows

BUDGETS = (5.0, 5.5, 6.0)
FORMATS = ["nvfp4", "float8_e4m3fn"]
ROWS, CALLS, DRAWS = 512, 64, 6


def main(path: str, search: str = "search") -> None:
    torch.manual_seed(0)
    loaded = MiniLM(dtype=None).load(data=BuiltinSentences(batch=8, length=32), seed=0, device=torch.device("cpu"))
    model, workload = structural_clone(loaded.model), loaded.workload
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "pooler" not in name}
    weight = WeightConfig(format="nvfp4", scale_search=ScaleSearch(search))
    scorer = Scorer(model, linears, weight, workload, CALLS, 0)
    with torch.no_grad():
        expected = collect_rows(model, workload, ROWS)

    def error(formats: dict[str, str]) -> float:
        with scorer.storing(formats), torch.no_grad():
            rows = collect_rows(model, workload, ROWS)
        return 1000 * (1 - torch.cosine_similarity(rows.double(), expected.double(), dim=1)).mean().item()

    def bits(formats: dict[str, str]) -> float:
        used = sum(STORAGES[format].nbytes(*linears[name].weight.shape, scorer.config_of(format)) for name, format in formats.items())
        return 8 * used / sum(linear.weight.numel() for linear in linears.values())

    rows = [
        {"choice": f"all {name}", "bits": bits(dict.fromkeys(linears, name)), "error": error(dict.fromkeys(linears, name))}
        for name in FORMATS
    ]
    arms = [(strategy, 1.0) for strategy in AllocationStrategy] + [(AllocationStrategy.layer_adaptive, 0.25)]
    for budget in BUDGETS:
        for strategy, share in arms:
            config = AllocationConfig(
                strategy=strategy, effective_bits=budget, formats=FORMATS, num_calibration_calls=CALLS, sensitivity_share=share
            )
            found = allocate(model, linears, weight, config, workload)
            name = strategy.value + ("" if share == 1 else f", a share of {share:g}")
            rows.append(
                {
                    "choice": name,
                    "budget": budget,
                    "bits": found.stats.effective_bits,
                    "error": error(found.formats),
                    "forwards": found.stats.forwards,
                }
            )
            print(
                f"{budget:.1f} {name:36s} {rows[-1]['error']:6.2f}  {found.stats.effective_bits:.3f} bits, {found.stats.forwards} forwards",
                flush=True,
            )
        groups = scorer.groups()
        draws = []
        for seed in range(DRAWS):
            order, formats = random.Random(seed).sample(groups, len(groups)), dict.fromkeys(linears, FORMATS[0])
            for group in order:
                wider = formats | dict.fromkeys(group, FORMATS[1])
                if bits(wider) <= budget:
                    formats = wider
            draws.append(error(formats))
        rows.append({"choice": f"random, {DRAWS} draws", "budget": budget, "error": statistics.mean(draws), "draws": draws})
        print(f"{budget:.1f} random {statistics.mean(draws):.2f} ({min(draws):.2f} to {max(draws):.2f})", flush=True)
    facts = {"command": f"python tests/regression/bench_allocation.py OUT.json {search}", "date": time.strftime("%Y-%m-%d")}
    facts |= {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "search": search, "sentences": ROWS}
    with open(path, "w") as file:
        json.dump({**facts, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
