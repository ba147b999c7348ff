"""The whole model through torch.compile. CUDA graphs stay off: they are the group `graph`."""

from __future__ import annotations

from typing import Any

from torch import nn

from kernel_pytorch.compile.options import CompileStep, compile_keywords, compile_module, compiler_name, describe
from kernel_pytorch.optimizer import Applied, Context


class InductorCompile(CompileStep):
    """Compiles the model's call in place with `module.compile()`: names in its state_dict stay."""

    def apply(self, model: nn.Module, context: Context) -> Applied:
        keywords: dict[str, Any] = compile_keywords(context.backend, self.settings, isolate=True)
        compile_module(model, fullgraph=self.fullgraph, dynamic=self.settings.dynamic, **keywords)
        return Applied(model, num_changed=1, kernels=(compiler_name(context.backend),), details={"options": describe(keywords)})
