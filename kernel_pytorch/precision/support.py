"""Where a scheme of quantized linears runs as itself: what each backend answers, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from kernel_pytorch.backends.base import Backend, Facts
from kernel_pytorch.backends.capabilities import FAST_ACCUMULATION, adds_fast, cpu_has, has, matmul_formats, matmul_needs
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, AllocationConfig, PrecisionConfig, WeightConfig

# Weight formats whose bytes our Triton kernels unpack for few rows; torch expands the others in every call.
UNPACKED = ("int8", "float8_e4m3fn", "nvfp4", "mxfp4")
# Formats of which `matmul/` multiplies weights with activations.
MULTIPLIED = ("int8", "float8_e4m3fn", "float8_e4m3fnuz")
_OWN_FLOAT8 = {"float8_e4m3fn": "fp8_dynamic", "float8_e4m3fnuz": "fp8_dynamic_fnuz"}
_WEIGHT_ONLY = {"int8": "int8_weight_only", "float8": "fp8_weight_only", "nvfp4": "nvfp4"}


def linear_support(formats: Sequence[str], activation: ActivationConfig, dtype: torch.dtype | None, backend: Backend) -> Support:
    """formats: number formats that weights may be stored in, the scheme's own first. dtype: computed in; None is the model's."""
    answer = _scheme(formats, activation, dtype, backend)
    if not activation.fast_accumulation:
        return answer
    return Support(answer.level, "; ".join(filter(None, (answer.reason, _unread_fast_accumulation(answer.level, backend.facts)))))


def _scheme(formats: Sequence[str], activation: ActivationConfig, dtype: torch.dtype | None, backend: Backend) -> Support:
    if backend.vendor == "cpu":
        return _on_cpu(formats, activation, backend.facts)
    facts = backend.facts
    if backend.vendor == "tpu":
        return Support(Level.emulated, "no kernel here multiplies quantized weights on a TPU: plain-torch reference; use precision=bf16")
    if has(facts.arch, "bf16_matmul") is None:
        return Support(Level.emulated, f"what {_shown(facts)} can do is not known here: plain-torch reference")
    # bfloat16 does not compile below sm_80, and nothing was tried there in float16.
    if not has(facts.arch, "bf16_matmul"):
        return Support(Level.emulated, f"kernels for quantized weights need sm_80 or newer, this is {_shown(facts)}")
    answer = _weight_only(formats, dtype) if activation.mode is ActivationMode.none else _multiplied(str(activation.format), facts)
    if answer.level is Level.native and backend.vendor == "amd":
        return Support(Level.native, "; ".join(filter(None, (answer.reason, "not yet run on AMD hardware"))))
    return answer


def _on_cpu(formats: Sequence[str], activation: ActivationConfig, facts: Facts) -> Support:
    foreign = [name for name in formats if name != "int8"]
    if foreign:
        return Support(Level.emulated, f"{facts.name} has no {foreign[0]} matmul: plain-torch reference")
    if activation.mode is ActivationMode.none:
        return Support(Level.native, "int8 storage; the matmul converts weights at each call, so memory shrinks and speed does not")
    if not cpu_has(facts.isa, "int8_matmul"):
        return Support(
            Level.emulated,
            f"torch's int8 matmul is right only with a dot product of bytes (avx512_vnni, avx_vnni, amx_int8), which {facts.name} lacks;"
            " use precision=int8_weight_only",
        )
    if activation.granularity is ActivationGranularity.tensor:
        return Support(Level.native, "slowdown: the int8 kernel scales each token; one scale a tensor runs through torch._int_mm")
    return Support(Level.native)


def _weight_only(formats: Sequence[str], dtype: torch.dtype | None) -> Support:
    math = "the input's dtype" if dtype is None else str(dtype).removeprefix("torch.")
    text = f"{', '.join(formats)} storage, {math} math"
    expanded = [name for name in formats if name not in UNPACKED]
    if expanded:
        text += f"; slowdown: no kernel reads {', '.join(expanded)}, whose weights are expanded at every call"
    return Support(Level.native, text)


def _multiplied(format: str, facts: Facts) -> Support:
    """Weights and activations of one format."""
    known = matmul_formats(facts.arch) or ()
    if format in known and format in MULTIPLIED:
        return Support(Level.native)
    if format in known:
        return Support(Level.emulated, f"{_shown(facts)} multiplies {format}, but no kernel here does yet: plain-torch reference")
    where = matmul_needs(format)
    if not where:
        return Support(Level.emulated, f"torch multiplies no two {format} matrices on any GPU: plain-torch reference")
    return Support(Level.emulated, f"{format} matmul needs {where}, this is {_shown(facts)}; {_instead(format, known)}")


def unread_settings(
    formats: Sequence[str], weight: WeightConfig, activation: ActivationConfig, allocation: AllocationConfig, num_calibration_calls: int
) -> list[str]:
    """Settings that are not as they are by default and that nothing in such a scheme reads, each with why. formats: that weights may
    be stored in."""
    found: list[tuple[str, str]] = []
    if "int4" not in formats and weight.group_size != WeightConfig().group_size:
        found.append(("weight.group_size", "no weight is stored in int4"))
    if "nvfp4" not in formats and weight.scale_search is not WeightConfig().scale_search:
        found.append(("weight.scale_search", "no weight is stored in nvfp4"))
    if activation.mode is not ActivationMode.static and num_calibration_calls != PrecisionConfig().num_calibration_calls:
        found.append(("num_calibration_calls", "activations are not static"))
    if activation.mode is ActivationMode.none:
        plain = ActivationConfig()
        names = [name for name in ("granularity", "symmetric") if getattr(activation, name) != getattr(plain, name)]
        found += [(f"activation.{name}", "activations are not quantized") for name in names]
    if allocation.strategy is None:
        names = [field.name for field in fields(allocation) if getattr(allocation, field.name) != getattr(AllocationConfig(), field.name)]
        found += [(f"allocation.{name}", "allocation.strategy is null") for name in names]
    return [f"precision.{name} is not read: {why}" for name, why in found]


def _unread_fast_accumulation(level: Level, facts: Facts) -> str:
    unread = "precision.activation.fast_accumulation is not read"
    if level is not Level.native:
        return f"{unread}: no FP8 matmul runs here"
    if not adds_fast(facts.arch):
        known = ", ".join(f"sm_{number}" for number in FAST_ACCUMULATION)
        return f"{unread}: only Ada and Hopper GPUs ({known}) have it, this is {_shown(facts)}"
    return f"{unread} by calls of few rows, whose kernel adds in float32"


def _instead(format: str, known: Sequence[str]) -> str:
    """A scheme near the one asked for that runs as itself."""
    kind = "float8" if format.startswith("float8") else format
    own = next((name for name in _OWN_FLOAT8 if name in known), None)
    if kind == "float8" and own is not None:
        return f"its own is {own}; use precision={_OWN_FLOAT8[own]}"
    return f"use precision={_WEIGHT_ONLY[kind]}"


def _shown(facts: Facts) -> str:
    return f"{facts.name} ({facts.arch or 'architecture unknown'})"
