"""The whole model through torch.compile. CUDA graphs stay off: they are the group `graph`."""

from __future__ import annotations

from typing import Any

from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.compile.options import CompileSettings, compile_keywords, compile_module, compile_support, compiler_name, describe
from kernel_pytorch.optimizer import Applied, Context, Optimizer, Support
from kernel_pytorch.schema import CompileMode


class InductorCompile(Optimizer):
    """Compiles the model's call in place with `module.compile()`: names in its state_dict stay."""

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

    def apply(self, model: nn.Module, context: Context) -> Applied:
        keywords: dict[str, Any] = compile_keywords(context.backend, self.settings, isolate=True)
        compile_module(model, fullgraph=self.fullgraph, dynamic=self.settings.dynamic, **keywords)
        return Applied(model, num_changed=1, kernels=(compiler_name(context.backend),), details={"options": describe(keywords)})
