"""Every class that a recipe may become: the exact allow-list of `_target_` values.

A target is admitted by its full dotted name and nothing else: no prefix, no alias. `reads` names the fields of the group's
schema that the constructor takes; a test compares it with the constructor's signature. Torch-free, so that a
misspelt setting is found before any heavy import.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    group: str
    reads: tuple[str, ...]


_COMPILE = ("mode", "fullgraph", "dynamic", "combo_kernels", "programmatic_dependent_launch")

TARGETS: dict[str, Target] = {
    "kernel_pytorch.backends.cpu.CpuBackend": Target("backend", ("hardware", "on_mismatch")),
    "kernel_pytorch.backends.nvidia.NvidiaBackend": Target("backend", ("hardware", "on_mismatch")),
    "kernel_pytorch.backends.amd.AmdBackend": Target("backend", ("hardware", "on_mismatch")),
    "kernel_pytorch.backends.tpu.TpuBackend": Target("backend", ("hardware", "on_mismatch")),
    "kernel_pytorch.attention.sdpa.SdpaBackendChoice": Target("attention", ("backend",)),
    "kernel_pytorch.attention.decode.DecodeAttention": Target("attention", ()),
    "kernel_pytorch.fusion.projections.FuseProjections": Target("fusion", ("include", "exclude")),
    "kernel_pytorch.precision.cast.Cast": Target("precision", ("dtype",)),
    "kernel_pytorch.precision.tf32.Tf32Matmul": Target("precision", ()),
    "kernel_pytorch.precision.quantize.QuantizeLinears": Target(
        "precision", ("include", "exclude", "dtype", "weight", "activation", "min_features", "allocation", "num_calibration_calls")
    ),
    "kernel_pytorch.memory.offload.OffloadWeights": Target("memory", ("include", "exclude", "prefetch_depth", "num_resident_blocks")),
    "kernel_pytorch.compile.inductor.InductorCompile": Target("compile", _COMPILE),
    "kernel_pytorch.compile.regional.RegionalCompile": Target("compile", ("include", "exclude", *_COMPILE)),
    "kernel_pytorch.graph.capture.CaptureWholeCall": Target(
        "graph", ("strategy", "num_warmup_calls", "min_speedup", "memory_budget_bytes", "dynamic_dims", "bucketing")
    ),
    "kernel_pytorch.models.minilm.MiniLM": Target("model", ("dtype",)),
    "kernel_pytorch.models.decoder.DecoderSource": Target("model", ("preset", "dtype", "phase")),
    "kernel_pytorch.models.bert.RandomBert": Target("model", ("preset", "dtype")),
    "kernel_pytorch.models.hf.LocalFolder": Target("model", ("path", "dtype", "phase")),
    "kernel_pytorch.models.factory.UserFactory": Target("model", ("factory", "dtype", "phase")),
    "kernel_pytorch.models.text.BuiltinSentences": Target("data", ("batch", "length")),
    "kernel_pytorch.models.text.TextFile": Target("data", ("path", "batch", "length")),
    "kernel_pytorch.models.text.RandomTokens": Target("data", ("batch", "length")),
}

# Read by the engine itself, whatever class a group's target names.
ENGINE_READS: dict[str, tuple[str, ...]] = {"precision": ("quality",)}
