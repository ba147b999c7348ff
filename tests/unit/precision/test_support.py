"""What quantized linears answer for machines that are not here: level and reason, by format and device."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.backends.capabilities import MATMUL_FORMATS
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.formats import FORMATS
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.precision.support import MULTIPLIED, UNPACKED, linear_support
from kernel_pytorch.schema import ActivationConfig, ActivationMode, BackendConfig

NATIVE, EMULATED = Level.native, Level.emulated
AMD = "not yet run on AMD hardware"


def ask(device: str, *formats: str, mode: ActivationMode = ActivationMode.none) -> Support:
    activation = ActivationConfig(mode=mode, format=None if mode is ActivationMode.none else formats[0])
    return linear_support(formats, activation, torch.bfloat16, plan_backend(device, BackendConfig()))


@pytest.mark.parametrize("format", UNPACKED)
@pytest.mark.parametrize("device", ["a100", "rtx4090", "h100", "h200", "b200", "b300", "rtx5090"])
def test_weights_alone_are_native_on_every_nvidia_gpu_with_bf16(device: str, format: str) -> None:
    assert ask(device, format) == Support(NATIVE, f"{format} storage, bfloat16 math")


@pytest.mark.parametrize("device", ["mi250x", "mi300x", "mi355x", "rx7900xtx", "rx9070xt"])
def test_weights_alone_are_native_on_amd_and_say_that_nobody_ran_them_there(device: str) -> None:
    assert ask(device, "float8_e4m3fn") == Support(NATIVE, f"float8_e4m3fn storage, bfloat16 math; {AMD}")


@pytest.mark.parametrize("format", sorted(set(FORMATS) - set(UNPACKED)))
def test_a_format_without_a_kernel_says_that_it_is_slow(format: str) -> None:
    reason = f"{format} storage, bfloat16 math; slowdown: no kernel reads {format}, whose weights are expanded at every call"
    assert ask("h100", format) == Support(NATIVE, reason)


def test_mixed_formats_name_all_of_them() -> None:
    assert ask("h100", "nvfp4", "int8").reason == "nvfp4, int8 storage, bfloat16 math"
    assert ask("h100", "nvfp4", "mxfp6_e2m3").reason.endswith("no kernel reads mxfp6_e2m3, whose weights are expanded at every call")
    answer = ask("cpu", "int8", "nvfp4")
    assert answer.level is EMULATED
    assert "has no nvfp4 matmul: plain-torch reference" in answer.reason


@pytest.mark.parametrize("device", ["t4", "v100"])
@pytest.mark.parametrize("mode", [ActivationMode.none, ActivationMode.dynamic])
def test_gpus_before_bf16_are_emulated(device: str, mode: ActivationMode) -> None:
    shown = f"{device} ({DEVICES[device].arch})"
    assert ask(device, "int8", mode=mode) == Support(EMULATED, f"kernels for quantized weights need sm_80 or newer, this is {shown}")


FLOAT8 = "float8_e4m3fn matmul needs sm_89 or newer, or gfx950, gfx1200, gfx1201, this is "
MULTIPLICATIONS = [
    ("a100", "int8", NATIVE, ""),
    ("a100", "float8_e4m3fn", EMULATED, f"{FLOAT8}a100 (sm_80); use precision=fp8_weight_only"),
    ("rtx4090", "float8_e4m3fn", NATIVE, ""),
    ("h100", "float8_e4m3fn", NATIVE, ""),
    ("b200", "float8_e4m3fn", NATIVE, ""),
    ("h100", "float8_e5m2", EMULATED, "torch multiplies no two float8_e5m2 matrices on any GPU: plain-torch reference"),
    (
        "h100",
        "float8_e4m3fnuz",
        EMULATED,
        "float8_e4m3fnuz matmul needs gfx942, this is h100 (sm_90); its own is float8_e4m3fn; use precision=fp8_dynamic",
    ),
    ("h100", "nvfp4", EMULATED, "nvfp4 matmul needs sm_100 or newer, this is h100 (sm_90); use precision=nvfp4"),
    ("b200", "nvfp4", EMULATED, "b200 (sm_100) multiplies nvfp4, but no kernel here does yet: plain-torch reference"),
    ("mi300x", "nvfp4", EMULATED, "nvfp4 matmul needs sm_100 or newer, this is mi300x (gfx942); use precision=nvfp4"),
    ("mi300x", "float8_e4m3fnuz", NATIVE, AMD),
    ("mi325x", "float8_e4m3fnuz", NATIVE, AMD),
    (
        "mi300x",
        "float8_e4m3fn",
        EMULATED,
        f"{FLOAT8}mi300x (gfx942); its own is float8_e4m3fnuz; use precision=fp8_dynamic_fnuz",
    ),
    ("mi355x", "float8_e4m3fn", NATIVE, AMD),
    ("mi250x", "float8_e4m3fn", EMULATED, f"{FLOAT8}mi250x (gfx90a); use precision=fp8_weight_only"),
    ("rx9070xt", "float8_e4m3fn", NATIVE, AMD),
    ("rx7900xtx", "float8_e4m3fn", EMULATED, f"{FLOAT8}rx7900xtx (gfx1100); use precision=fp8_weight_only"),
    ("mi300x", "int8", NATIVE, AMD),
]


@pytest.mark.parametrize("mode", [ActivationMode.dynamic, ActivationMode.static])
@pytest.mark.parametrize(("device", "format", "level", "reason"), MULTIPLICATIONS)
def test_multiplying_weights_with_activations(device: str, format: str, level: Level, reason: str, mode: ActivationMode) -> None:
    activation = ActivationConfig(mode=mode, format=format, granularity="tensor" if mode is ActivationMode.static else "token")  # pyright: ignore[reportArgumentType]
    assert linear_support((format,), activation, torch.bfloat16, plan_backend(device, BackendConfig())) == Support(level, reason)


def test_what_is_multiplied_here_is_multiplied_somewhere() -> None:
    assert set(MULTIPLIED) <= set(MATMUL_FORMATS)
    assert set(UNPACKED) <= set(FORMATS)
