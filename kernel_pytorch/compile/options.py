"""What both compile steps pass to torch.compile, and where they cannot run."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.capabilities import sm_number
from kernel_pytorch.backends.xla_programs import XlaPrograms
from kernel_pytorch.compile.passes import FuseEpilogues
from kernel_pytorch.optimizer import Level, Optimizer, Support
from kernel_pytorch.schema import CompileMode

# torch 2.9 does not have it.
_DEPENDENT_LAUNCH = "triton.enable_pdl"


def compiler_name(backend: Backend) -> str:
    """torch.compile's name for the compiler of this vendor."""
    return "openxla" if backend.vendor == "tpu" else "inductor"


@dataclass(frozen=True)
class CompileSettings:
    """What the group says of how Inductor compiles. combo_kernels, programmatic_dependent_launch: torch's options of these names."""

    mode: CompileMode = CompileMode.default
    dynamic: bool | None = None
    combo_kernels: bool = False
    programmatic_dependent_launch: bool = False


def compile_support(backend: Backend, settings: CompileSettings) -> Support:
    """Inductor writes C++ for the CPU and Triton for GPUs; without their compilers there is nothing to run. XLA brings its own."""
    facts = backend.facts
    if backend.vendor == "tpu":
        if settings.dynamic:
            return Support(Level.unsupported, "compile.dynamic=true: XLA programs have fixed shapes; without it each shape gets its own")
    elif backend.vendor == "cpu":
        if not facts.has_cxx_compiler:
            return Support(
                Level.unsupported, "torch.compile on a CPU needs a C++ compiler (g++ or clang++), none was found; use compile=none"
            )
    elif not facts.has_triton:
        return Support(Level.unsupported, f"torch.compile on {facts.name} needs triton, which it does not support; use compile=none")
    # Native: a run that is emulated compiles nothing and has no graph, which is more than such a setting may change.
    said = [f"compile.{name}=true changes nothing: {why}" for name, why in _left_out(backend, settings).items()]
    if backend.vendor == "tpu" and settings.mode is CompileMode.max_autotune:
        said.append("XLA has one mode: max_autotune is as default")
    return Support(Level.native, "; ".join(said))


def _left_out(backend: Backend, settings: CompileSettings) -> dict[str, str]:
    """Settings that are on and that nothing here follows, and why. The results are the same without them."""
    found: dict[str, str] = {}
    if settings.combo_kernels and backend.vendor in ("cpu", "tpu"):
        found["combo_kernels"] = "Inductor joins kernels of Triton, on GPUs"
    if settings.programmatic_dependent_launch:
        arch = backend.facts.arch
        if backend.vendor != "nvidia" or (sm_number(arch) or 0) < 90:
            found["programmatic_dependent_launch"] = f"it needs NVIDIA's sm_90 or newer, this is {backend.facts.name} ({arch or 'unknown'})"
        elif _DEPENDENT_LAUNCH not in torch._inductor.list_options():
            found["programmatic_dependent_launch"] = f"Inductor of torch {torch.__version__} does not know it"
    return found


def compile_keywords(backend: Backend, settings: CompileSettings, *, isolate: bool) -> dict[str, Any]:
    """`backend` or `options` for torch.compile, and where this torch has it a recompile limit of the call's own when `isolate`: models of
    one class share their code, and past 8 compiled variants of it torch would run eagerly.

    Raises AssertionError if a backend's options turn CUDA graphs on."""
    if backend.vendor == "tpu":
        return {"backend": compiler_name(backend)}
    options = {"triton.cudagraphs": False, **backend.compile_options(settings.mode.value)}
    assert options["triton.cudagraphs"] is False, "CUDA graphs belong to the group graph"
    if backend.vendor == "cpu":
        options["pre_grad_custom_pass"] = FuseEpilogues()
    left_out = _left_out(backend, settings)
    for name, option in (("combo_kernels", "combo_kernels"), ("programmatic_dependent_launch", _DEPENDENT_LAUNCH)):
        if getattr(settings, name) and name not in left_out:
            options[option] = True
    keywords: dict[str, Any] = {"options": options}
    if isolate and "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        keywords["isolate_recompiles"] = True
    return keywords


class CompileStep(Optimizer):
    """What both compile steps take."""

    def __init__(
        self,
        *,
        mode: CompileMode,
        fullgraph: bool,
        dynamic: bool | None,
        combo_kernels: bool = False,
        programmatic_dependent_launch: bool = False,
    ) -> None:
        self.fullgraph = fullgraph
        self.settings = CompileSettings(mode, dynamic, combo_kernels, programmatic_dependent_launch)

    def support(self, backend: Backend) -> Support:
        return compile_support(backend, self.settings)


def describe(keywords: dict[str, Any]) -> dict[str, Any]:
    """The options as the receipt shows them: JSON types."""
    options = keywords.get("options", {})
    return {name: value if isinstance(value, (bool, int, float, str)) else type(value).__name__ for name, value in options.items()}


def compile_module(module: nn.Module, **keywords: Any) -> None:
    """`module.compile()`, also for a class of torch's own such as nn.Sequential, whose frames torch.compile skips at the top."""
    if keywords.get("backend") == "openxla":
        # One program a shape is what XLA compiles: torch's own limit of recompilations does not count shapes then.
        keywords.pop("dynamic", None)
        module._compiled_call_impl = XlaPrograms(module._call_impl, **keywords)
        return
    if not type(module).__module__.startswith("torch."):
        module.compile(**keywords)
        return
    inner = module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **keywords)
