"""Values that a setting may take, as Enums whose names equal their values. Torch-free; fields and defaults are in schema.py."""

from __future__ import annotations

from enum import Enum


class OnMismatch(str, Enum):
    emulate = "emulate"
    error = "error"


class SdpaBackend(str, Enum):
    auto = "auto"
    math = "math"
    efficient = "efficient"
    flash = "flash"
    cudnn = "cudnn"


class WeightGranularity(str, Enum):
    tensor = "tensor"
    channel = "channel"


class ActivationGranularity(str, Enum):
    tensor = "tensor"
    token = "token"


class ActivationMode(str, Enum):
    none = "none"
    dynamic = "dynamic"
    static = "static"


class ScaleSearch(str, Enum):
    """How NVFP4 picks the scale of a block of 16."""

    search = "search"
    four_over_six = "four_over_six"
    plain = "plain"


class AllocationStrategy(str, Enum):
    """What decides which modules get more bits under a budget."""

    entropy_based = "entropy_based"
    gradient_weighted = "gradient_weighted"
    activation_aware = "activation_aware"
    layer_adaptive = "layer_adaptive"
    content_adaptive = "content_adaptive"
    nvfp4_double_quantization = "nvfp4_double_quantization"


class CompileMode(str, Enum):
    default = "default"
    max_autotune = "max_autotune"


class GraphDeploymentStrategy(str, Enum):
    """How sure it must be that a CUDA graph is worth it. Numbers are in graph/strategy.py."""

    conservative = "conservative"
    balanced = "balanced"
    aggressive = "aggressive"


class BucketStrategy(str, Enum):
    """Which padded sizes a dynamic dim has."""

    geometric = "geometric"
    linear = "linear"
    adaptive = "adaptive"
    hardware_aware = "hardware_aware"
    memory_optimal = "memory_optimal"


class Phase(str, Enum):
    forward = "forward"
    prefill = "prefill"
    decode = "decode"
