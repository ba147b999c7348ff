"""The whole model through torch.compile. CUDA graphs stay off: they are the group `graph`."""

from __future__ import annotations

from typing import Any

from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.compile.options import compile_keywords, compile_module, compile_support, compiler_name, describe
from kernel_pytorch.optimizer import Applied, Context, Optimizer, Support
from kernel_pytorch.schema import CompileMode


class InductorCompile(Optimizer):
    """Compiles the model's call in place with `module.compile()`: names in its state_dict stay."""

    def __init__(self, *, mode: CompileMode, fullgraph: bool, dynamic: bool | None) -> None:
        self.mode = mode
        self.fullgraph = fullgraph
        self.dynamic = dynamic

    def support(self, backend: Backend) -> Support:
        return compile_support(backend, self.mode, self.dynamic)

    def apply(self, model: nn.Module, context: Context) -> Applied:
        keywords: dict[str, Any] = compile_keywords(context.backend, self.mode, isolate=True)
        compile_module(model, fullgraph=self.fullgraph, dynamic=self.dynamic, **keywords)
        return Applied(model, num_changed=1, kernels=(compiler_name(context.backend),), details={"options": describe(keywords)})
