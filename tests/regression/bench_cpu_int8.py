"""CPU int8 against its peers on MiniLM: eager, torch.compile, the recipe cpu_int8 and torchao W8A8 + compile, in one process.

    python tests/regression/bench_cpu_int8.py [OUT.json]

Arms take turns; medians of 30 rounds with the 10th and 90th percentile; eager is timed twice (A/A). Quality is the least
cosine over pooled vectors of 256 held-out sentences. With ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI the AMX units stay unused by
oneDNN and by our kernel. Records; asserts nothing about time, and stops when a result is wrong.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import datetime, timezone
from functools import partial

import torch
import torchao
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.engine.apply import Built, apply_calls, apply_modules
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.engine.steps import build_steps
from kernel_pytorch.measure.latency import time_interleaved
from kernel_pytorch.models.minilm import MiniLM
from kernel_pytorch.optimizer import Context
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.report.statistics import median
from kernel_pytorch.verify.model import collect_rows
from kernel_pytorch.verify.rows import agreement

SHAPES = ((8, 32), (1, 128))
ROUNDS = 30


def recipe_model(model, workload, overrides):
    composed = compose(overrides)
    backend = resolve(composed.config.backend).backend
    context, steps = Context(backend, workload), build_steps(composed.config, composed.choices)
    built = Built(structural_clone(model))
    with torch.no_grad():
        apply_modules(built, steps, context, {})
    apply_calls(built, steps, context, {})
    return built.model


def torchao_model(model):
    import copy

    ours = copy.deepcopy(model)
    quantize_(
        ours,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and "pooler" not in name,
    )
    ours.compile(options={"max_autotune": True, "freezing": True})
    return ours


def measure(batch, length):
    source = MiniLM()
    loaded = source.load(data=source.default_data(batch=batch, length=length), seed=0, device=torch.device("cpu"))
    model, workload = loaded.model, loaded.workload
    arms = {
        "eager": model,
        "eager again": model,
        "compiled": recipe_model(model, workload, ["+recipe=cpu_fp32_compile"]),
        "compiled, max_autotune": recipe_model(model, workload, ["+recipe=cpu_fp32_compile", "compile=max_autotune"]),
        "cpu_int8": recipe_model(model, workload, ["+recipe=cpu_int8"]),
        "torchao W8A8 + compile": torchao_model(model),
    }
    with torch.inference_mode():
        expected = collect_rows(model, workload, 256)
        quality = {name: agreement(expected, collect_rows(arm, workload, 256)) for name, arm in arms.items()}
        if quality["cpu_int8"].cosine_min < 0.995:
            raise SystemExit(f"cpu_int8 is wrong: least cosine {quality['cpu_int8'].cosine_min}")
        samples = time_interleaved(
            {name: partial(workload.call, arm) for name, arm in arms.items()},
            num_rounds=ROUNDS,
            min_round_ms=60,
            synchronize=lambda: None,
            cuda=False,
        )
    rows = {}
    for name, times in samples.items():
        ordered = sorted(times)
        rows[name] = {
            "median_ms": median(times),
            "p10_ms": ordered[len(ordered) // 10],
            "p90_ms": ordered[-1 - len(ordered) // 10],
            "ratio_to_eager": median(samples["eager"]) / median(times),
            "ratio_to_compiled": median(samples["compiled"]) / median(times),
            "cosine_min": quality[name].cosine_min,
            "sqnr_db": min(quality[name].sqnr_db, 999.0),
        }
    return rows


def main(out):
    backend = resolve(compose(["+recipe=cpu_int8"]).config.backend).backend
    record = {
        "command": "python tests/regression/bench_cpu_int8.py",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": backend.facts.name,
        "isa": list(backend.facts.isa),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "python": platform.python_version(),
        "rounds": ROUNDS,
        "shapes": {},
    }
    for batch, length in SHAPES:
        rows = record["shapes"][f"{batch}x{length}"] = measure(batch, length)
        print(f"{batch} x {length} tokens, {record['threads']} threads, {' '.join(record['isa'])}")
        for name, row in rows.items():
            print(
                f"  {name:26} {row['median_ms']:7.2f} ms ({row['p10_ms']:.2f}-{row['p90_ms']:.2f})  {row['ratio_to_eager']:5.2f}x eager"
                f"  {row['ratio_to_compiled']:5.2f}x compiled  cosine {row['cosine_min']:.5f}"
            )
        torch._dynamo.reset()
    if out:
        with open(out, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=2)
            stream.write("\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
