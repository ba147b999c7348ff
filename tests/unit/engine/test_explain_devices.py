"""What `explain --device` says of each shipped GPU recipe on machines that are not here: level and reason, as one table."""

from __future__ import annotations

import pytest

from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.engine.explain import explain_plan
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.schema import BackendConfig

AMD = "not yet run on AMD hardware"
FP8 = "float8_e4m3fn storage, bfloat16 math"
NVFP4 = "nvfp4 storage, bfloat16 math"
NO_E4M3FN = "float8_e4m3fn matmul needs sm_89 or newer, or gfx950, gfx1200, gfx1201, this is "
NO_NVFP4 = "nvfp4 matmul needs sm_100 or newer, this is "
NO_FNUZ = "float8_e4m3fnuz matmul needs gfx942, this is "
OWN_E4M3FN = "; its own is float8_e4m3fn; use precision=fp8_dynamic"
OWN_FNUZ = "; its own is float8_e4m3fnuz; use precision=fp8_dynamic_fnuz"

# Recipe, its device, then device -> (the plan's level, what the precision step says). A device of another vendor is emulated
# whatever the step says of itself there.
TABLE: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "a100_fp8": (
        "a100",
        {
            **dict.fromkeys(("a100", "rtx4090", "h100", "h200", "b200"), ("native", FP8)),
            **dict.fromkeys(("mi300x", "mi355x"), ("emulated", f"{FP8}; {AMD}")),
        },
    ),
    "h100_fp8": (
        "h100",
        {
            "a100": ("emulated", f"{NO_E4M3FN}a100 (sm_80); use precision=fp8_weight_only"),
            **dict.fromkeys(("rtx4090", "h100", "h200", "b200"), ("native", "")),
            "mi300x": ("emulated", f"{NO_E4M3FN}mi300x (gfx942){OWN_FNUZ}"),
            "mi355x": ("emulated", AMD),
        },
    ),
    "h100_nvfp4": (
        "h100",
        {
            **dict.fromkeys(("a100", "rtx4090", "h100", "h200", "b200"), ("native", NVFP4)),
            **dict.fromkeys(("mi300x", "mi355x"), ("emulated", f"{NVFP4}; {AMD}")),
        },
    ),
    "b200_nvfp4": (
        "b200",
        {
            "a100": ("emulated", f"{NO_NVFP4}a100 (sm_80); use precision=nvfp4"),
            "rtx4090": ("emulated", f"{NO_NVFP4}rtx4090 (sm_89); use precision=nvfp4"),
            "h100": ("emulated", f"{NO_NVFP4}h100 (sm_90); use precision=nvfp4"),
            "h200": ("emulated", f"{NO_NVFP4}h200 (sm_90); use precision=nvfp4"),
            "b200": ("emulated", "b200 (sm_100) multiplies nvfp4, but no kernel here does yet: plain-torch reference"),
            "mi300x": ("emulated", f"{NO_NVFP4}mi300x (gfx942); use precision=nvfp4"),
            "mi355x": ("emulated", f"{NO_NVFP4}mi355x (gfx950); use precision=nvfp4"),
        },
    ),
    "mi300x_fp8": (
        "mi300x",
        {
            "a100": ("emulated", f"{NO_FNUZ}a100 (sm_80); use precision=fp8_weight_only"),
            "rtx4090": ("emulated", f"{NO_FNUZ}rtx4090 (sm_89){OWN_E4M3FN}"),
            "h100": ("emulated", f"{NO_FNUZ}h100 (sm_90){OWN_E4M3FN}"),
            "h200": ("emulated", f"{NO_FNUZ}h200 (sm_90){OWN_E4M3FN}"),
            "b200": ("emulated", f"{NO_FNUZ}b200 (sm_100){OWN_E4M3FN}"),
            "mi300x": ("native", AMD),
            "mi355x": ("emulated", f"{NO_FNUZ}mi355x (gfx950){OWN_E4M3FN}"),
        },
    ),
}
ROWS = [(recipe, target, device, *answer) for recipe, (target, devices) in TABLE.items() for device, answer in devices.items()]


def test_the_table_is_whole() -> None:
    devices = {"a100", "rtx4090", "h100", "h200", "b200", "mi300x", "mi355x"}
    assert all(set(answers) == devices for _, answers in TABLE.values())


@pytest.mark.parametrize(("recipe", "target", "device", "level", "says"), ROWS)
def test_a_recipe_on_a_device(recipe: str, target: str, device: str, level: str, says: str) -> None:
    composed = compose([f"recipe={recipe}"])
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, device)
    here, there = DEVICES[device], DEVICES[target]
    precision = next(step for step in steps if step.group == "precision")
    assert (precision.support, precision.reason) == (level, says)
    shown = f"{device} ({here.arch})"
    compiled = next(step for step in steps if step.group == "compile")
    # A setting that changes nothing there takes no graph away.
    unused = recipe.startswith("h100_") and here.arch in ("sm_80", "sm_89")
    assert ("programmatic_dependent_launch=true changes nothing" in compiled.reason) is unused or here.vendor != there.vendor
    if level == "native":
        assert outcome == f"native: hardware {target}: {shown}"
        assert {step.support for step in steps} == {"native"}
    elif here.vendor == there.vendor:
        assert outcome == f"emulated: precision={precision.option}: {says}"
    else:
        assert outcome.startswith(f"emulated: the recipe is for {target} ({there.arch}), this is {shown}")


@pytest.mark.parametrize("device", ["tpu_v5e", "tpu_v5p", "tpu_v6e"])
def test_the_tpus_recipe_on_tpus(device: str) -> None:
    composed = compose(["recipe=tpu_v5e_bf16"])
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, device)
    active = [(step.group, step.support, step.reason) for step in steps if step.optimizer]
    assert active == [("precision", "native", ""), ("compile", "native", "")]
    assert outcome == f"native: hardware tpu_v5e: {device} ({DEVICES[device].arch})"


@pytest.mark.parametrize("recipe", TABLE)
def test_a_gpus_recipe_on_a_tpu(recipe: str) -> None:
    composed = compose([f"recipe={recipe}"])
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, "tpu_v5e")
    precision = next(step for step in steps if step.group == "precision")
    assert (precision.support, precision.reason.split(":")[0]) == ("emulated", "no kernel here multiplies quantized weights on a TPU")
    assert outcome.startswith("emulated: the recipe is for ")


@pytest.mark.parametrize("recipe", TABLE)
def test_a_recipe_on_a_cpu(recipe: str) -> None:
    composed = compose([f"recipe={recipe}"])
    steps, outcome = explain_plan(composed.config, composed.choices, composed.ignored, "cpu")
    target, name = DEVICES[TABLE[recipe][0]], plan_backend("cpu", BackendConfig()).facts.name
    assert outcome.startswith(f"emulated: the recipe is for {target.name} ({target.arch}), this is {name} (")
    precision = next(step for step in steps if step.group == "precision")
    format = composed.config.precision.weight.format
    assert (precision.support, precision.reason) == ("emulated", f"{name} has no {format} matmul: plain-torch reference")


@pytest.mark.parametrize(("device", "says"), [("h100", ""), ("mi300x", ""), ("cpu", "not applicable on cpu")])
def test_graphs_are_for_every_gpu_that_torch_calls_cuda(device: str, says: str) -> None:
    composed = compose(["recipe=h100_fp8", "backend.hardware=any"])
    steps, _ = explain_plan(composed.config, composed.choices, composed.ignored, device)
    assert next(step.reason for step in steps if step.group == "graph") == says


UNREAD = "precision.activation.fast_accumulation is not read: "


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("h100", f"{UNREAD[:-2]} by calls of few rows, whose kernel adds in float32"),
        ("b200", f"{UNREAD}only Ada and Hopper GPUs (sm_89, sm_90) have it, this is b200 (sm_100)"),
        ("cpu", f"{UNREAD}no FP8 matmul runs here"),
    ],
)
def test_the_plan_says_what_reads_fast_accumulation(device: str, says: str) -> None:
    composed = compose(["recipe=h100_fp8", "precision.activation.fast_accumulation=true", "backend.hardware=any"])
    steps, _ = explain_plan(composed.config, composed.choices, composed.ignored, device)
    assert next(step.reason for step in steps if step.group == "precision").endswith(says)
