"""The repeated blocks of a model through torch.compile, once: compilation time does not grow with depth."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from kernel_pytorch.compile.options import CompileStep, compile_keywords, compile_module, compiler_name, describe
from kernel_pytorch.optimizer import Applied, Context, select_modules
from kernel_pytorch.schema import CompileMode


class RegionalCompile(CompileStep):
    """Compiles entries of nn.ModuleList (and nn.Sequential) whose class occurs there more than once, or what `include` names."""

    def __init__(
        self,
        *,
        include: list[str],
        exclude: list[str],
        mode: CompileMode,
        fullgraph: bool,
        dynamic: bool | None,
        combo_kernels: bool = False,
        programmatic_dependent_launch: bool = False,
    ) -> None:
        super().__init__(
            mode=mode,
            fullgraph=fullgraph,
            dynamic=dynamic,
            combo_kernels=combo_kernels,
            programmatic_dependent_launch=programmatic_dependent_launch,
        )
        self.include = include
        self.exclude = exclude

    def apply(self, model: nn.Module, context: Context) -> Applied:
        blocks = repeated_blocks(model)
        selection = select_modules(model, lambda name, _: bool(self.include) or name in blocks, self.include, self.exclude)
        if not selection.matched:
            return Applied(model, skipped=selection.skipped, not_applicable="the model has no ModuleList that repeats a class")
        # Not isolated: equal blocks share what the first one compiled.
        keywords: dict[str, Any] = compile_keywords(context.backend, self.settings, isolate=False)
        for module in selection.matched.values():
            compile_module(module, fullgraph=self.fullgraph, dynamic=self.settings.dynamic, **keywords)
        details = {"options": describe(keywords), "blocks": sorted(selection.matched)}
        return Applied(
            model, skipped=selection.skipped, num_changed=len(selection.matched), kernels=(compiler_name(context.backend),), details=details
        )


def repeated_blocks(model: nn.Module) -> set[str]:
    """Names of outermost ModuleList and Sequential entries whose class stands in that list more than once."""
    found: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name == block or name.startswith(f"{block}.") for block in found)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        classes = Counter(_class_of(child) for child in module)
        for child_name, child in module.named_children():
            if classes[_class_of(child)] > 1 and any(True for _ in child.children()):
                found.add(f"{name}.{child_name}" if name else child_name)
    return found


def _class_of(block: nn.Module) -> type:
    """A step before this one may have given some of the blocks a class of its own."""
    return getattr(block, "original_class", type(block))
