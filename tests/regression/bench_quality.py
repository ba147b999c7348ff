"""What each number format costs MiniLM in accuracy: python tests/regression/bench_quality.py [OUT.json]

The 36 encoder linears are stored in one format each time, all else stays float32. Per scheme: SQNR of every layer's output on
the baseline's own inputs (real tokens only), and of the pooled vectors of held-out sentences; bits a weight from the stored
bytes. For NVFP4 also the squared error of the scale searches against plain, on N(0,1) and on these weights. Stops when stored
values are not exactly the reference's.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sys
from datetime import datetime, timezone

import torch
from torch import nn

from kernel_pytorch.backends.detect import resolve
from kernel_pytorch.models.minilm import MiniLM
from kernel_pytorch.precision.reference import FakeQuantLinear
from kernel_pytorch.precision.reference_weights import fake_quantize_weight
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.schema import ActivationConfig, WeightConfig
from kernel_pytorch.verify.model import collect_rows
from kernel_pytorch.verify.rows import agreement, sqnr_db

NUM_SENTENCES = 512
NUM_LAYER_BATCHES = 16

NONE = ActivationConfig()
SCHEMES = {
    "int8 channel": (WeightConfig(format="int8"), NONE),
    "int8 tensor": (WeightConfig(format="int8", granularity="tensor"), NONE),
    "float8_e4m3fn channel": (WeightConfig(format="float8_e4m3fn"), NONE),
    "float8_e4m3fnuz channel": (WeightConfig(format="float8_e4m3fnuz"), NONE),
    "float8_e5m2 channel": (WeightConfig(format="float8_e5m2"), NONE),
    "mxfp8_e4m3fn": (WeightConfig(format="mxfp8_e4m3fn"), NONE),
    "mxfp8_e5m2": (WeightConfig(format="mxfp8_e5m2"), NONE),
    "mxfp6_e2m3": (WeightConfig(format="mxfp6_e2m3"), NONE),
    "mxfp6_e3m2": (WeightConfig(format="mxfp6_e3m2"), NONE),
    "nvfp4 search": (WeightConfig(format="nvfp4"), NONE),
    "nvfp4 four_over_six": (WeightConfig(format="nvfp4", scale_search="four_over_six"), NONE),
    "nvfp4 plain": (WeightConfig(format="nvfp4", scale_search="plain"), NONE),
    "int4 group 32": (WeightConfig(format="int4", group_size=32), NONE),
    "int4 group 64": (WeightConfig(format="int4", group_size=64), NONE),
    "int4 group 128": (WeightConfig(format="int4", group_size=128), NONE),
    "mxfp4": (WeightConfig(format="mxfp4"), NONE),
    "int8 dynamic, zero point a token": (WeightConfig(format="int8"), ActivationConfig(mode="dynamic", format="int8", symmetric=False)),
    "int8 dynamic, symmetric": (WeightConfig(format="int8"), ActivationConfig(mode="dynamic", format="int8")),
    "fp8 dynamic, row": (WeightConfig(format="float8_e4m3fn"), ActivationConfig(mode="dynamic", format="float8_e4m3fn")),
    "fp8 dynamic, tensor": (
        WeightConfig(format="float8_e4m3fn", granularity="tensor"),
        ActivationConfig(mode="dynamic", format="float8_e4m3fn", granularity="tensor"),
    ),
}
SEARCHES = ("plain", "four_over_six", "search")


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "pooler" not in name}


def layer_inputs(model: nn.Module, workload) -> dict[str, torch.Tensor]:
    """[tokens, K] by layer name: what each linear of the untouched model is given, without padding."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in encoder_linears(model)}
    mask: list[torch.Tensor] = []

    def note_mask(_module, _args, kwargs):
        mask[:] = [kwargs["attention_mask"].bool()]

    handles = [model.register_forward_pre_hook(note_mask, with_kwargs=True)]
    for name, linear in encoder_linears(model).items():
        handles.append(linear.register_forward_pre_hook(lambda _module, args, name=name: seen[name].append(args[0][mask[0]])))
    collect_rows(model, workload, NUM_LAYER_BATCHES * workload.batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def stored_linear(name: str, linear: nn.Linear, weight: WeightConfig, activation: ActivationConfig) -> tuple[nn.Module, int]:
    """The layer with the values that its stored bytes give, and their number."""
    storage = STORAGES[str(weight.format)]
    stored = storage.quantize(linear.weight, weight)
    values = storage.dequantize(stored, linear.in_features)
    if not torch.equal(values, fake_quantize_weight(linear.weight, weight)):
        raise SystemExit(f"{weight.format}, {name}: stored values are not the reference's")
    module = FakeQuantLinear(linear, weight, activation, None)
    module.weight = values
    return module, sum(tensor.nbytes for tensor in stored.values())


def measure(model: nn.Module, workload, inputs, expected: torch.Tensor, weight: WeightConfig, activation: ActivationConfig) -> dict:
    changed = copy.deepcopy(model)
    num_bytes, num_values, layers = 0, 0, {}
    for name, linear in encoder_linears(model).items():
        module, size = stored_linear(name, linear, weight, activation)
        layers[name] = sqnr_db(linear(inputs[name]), module(inputs[name]))
        changed.set_submodule(name, module)
        num_bytes, num_values = num_bytes + size, num_values + linear.weight.numel()
    actual = collect_rows(changed, workload, NUM_SENTENCES)
    found = agreement(expected, actual)
    cosine = nn.functional.cosine_similarity(expected.double(), actual.double(), dim=1)
    worst = min(layers, key=layers.__getitem__)
    return {
        "bits_a_weight": 8 * num_bytes / num_values,
        "mean_1_minus_cosine_x1000": 1000 * (1 - cosine).mean().item(),
        # Over the sentences; another model's weights would round otherwise, which it does not show.
        "standard_error_x1000": 1000 * cosine.std().item() / len(cosine) ** 0.5,
        "cosine_min": found.cosine_min,
        "sqnr_db": found.sqnr_db,
        "layer_sqnr_db_median": statistics.median(layers.values()),
        "layer_sqnr_db_worst": layers[worst],
        "worst_layer": worst,
        "layer_sqnr_db": {name: round(value, 2) for name, value in layers.items()},
    }


def search_gain(weights: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Relative L2 error of each NVFP4 search over all the weights together, and what it saves against plain."""
    power = sum(weight.double().square().sum().item() for weight in weights)
    noise = {}
    for search in SEARCHES:
        config = WeightConfig(format="nvfp4", scale_search=search)
        noise[search] = 0.0
        for weight in weights:
            values = STORAGES["nvfp4"].dequantize(STORAGES["nvfp4"].quantize(weight, config), weight.shape[1])
            noise[search] += (values.double() - weight.double()).square().sum().item()
    return {
        search: {
            "relative_l2": (noise[search] / power) ** 0.5,
            "less_squared_error_than_plain": 1 - noise[search] / noise["plain"],
            "less_relative_l2_than_plain": 1 - (noise[search] / noise["plain"]) ** 0.5,
        }
        for search in SEARCHES
    }


def main(out: str | None) -> None:
    source = MiniLM()
    loaded = source.load(data=source.default_data(), seed=0, device=torch.device("cpu"))
    model, workload = loaded.model, loaded.workload
    with torch.inference_mode():
        inputs = layer_inputs(model, workload)
        expected = collect_rows(model, workload, NUM_SENTENCES)
        record = {
            "command": "python tests/regression/bench_quality.py",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": resolve(compose(["+recipe=cpu_int8"]).config.backend).backend.facts.name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": loaded.name,
            "linears": len(inputs),
            "sentences": len(expected),
            "tokens_for_layers": len(next(iter(inputs.values()))),
            "compute": "float32",
            "nvfp4_search": {
                "normal_1024x4096": search_gain([torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))]),
                "minilm": search_gain([linear.weight for linear in encoder_linears(model).values()]),
            },
            "schemes": {},
        }
        for weights, gains in record["nvfp4_search"].items():
            for search, gain in gains.items():
                print(
                    f"nvfp4 {search:14} {weights:18} relative L2 {gain['relative_l2']:.4f},"
                    f" {gain['less_squared_error_than_plain']:.1%} less squared error, {gain['less_relative_l2_than_plain']:.1%} less L2"
                )
        print(f"{'scheme':34} bits  mean 1-cos x1000  least cosine  SQNR dB  layers' SQNR dB: median, worst", flush=True)
        for name, (weight, activation) in SCHEMES.items():
            row = record["schemes"][name] = measure(model, workload, inputs, expected, weight, activation)
            print(
                f"{name:34} {row['bits_a_weight']:.2f} {row['mean_1_minus_cosine_x1000']:7.2f} +- {row['standard_error_x1000']:.2f}"
                f" {row['cosine_min']:13.4f} {row['sqnr_db']:8.2f} {row['layer_sqnr_db_median']:18.2f} {row['layer_sqnr_db_worst']:8.2f}"
                f"  {row['worst_layer']}",
                flush=True,
            )
    if out:
        with open(out, "w", encoding="utf-8") as stream:
            json.dump(record, stream, indent=2)
            stream.write("\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
