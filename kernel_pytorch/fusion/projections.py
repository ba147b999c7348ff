"""Linear layers of one parent that read the same tensor become one matmul: Q, K and V; gate and up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.optimizer import Applied, Change, Context, Level, Optimizer, Skipped, Support, replace_module, select_modules


@dataclass(frozen=True)
class _Shared:
    """The outputs of one fused call, for the siblings that have not asked yet."""

    x: torch.Tensor
    version: int
    parts: tuple[torch.Tensor, ...]
    waiting: frozenset[int]


class FusedProjections(nn.Module):
    """Stands where the first projection stood and owns `fused`, the concatenated linear layer.

    Whichever sibling is called first computes all of them; the others take their part when they are called with the same
    tensor object, unchanged since. The last one lets go of the tensors. Other calls compute anew, so the answer never
    depends on who was called before. One attribute, replaced whole, holds the state: a second thread can only miss it.
    """

    def __init__(self, fused: nn.Module, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.fused = fused
        self.sizes = sizes
        self.contiguous = False
        self._shared: _Shared | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.part(input, 0)

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Output number `index`, computing all of them if this is the first sibling to see `x`."""
        shared = self._shared
        if shared is not None and shared.x is x and index in shared.waiting and shared.version == _version(x):
            waiting = shared.waiting - {index}
            self._shared = _Shared(x, shared.version, shared.parts, waiting) if waiting else None
            return shared.parts[index]
        parts = self.fused(x).split(self.sizes, dim=-1)
        if self.contiguous:
            parts = tuple(part.contiguous() for part in parts)
        self._shared = _Shared(x, _version(x), parts, frozenset(range(len(parts))) - {index})
        return parts[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shared": None}


class ProjectionPart(nn.Module):
    """Stands where another projection stood; parameters are its holder's."""

    def __init__(self, holder: FusedProjections, index: int) -> None:
        super().__init__()
        # A tuple, so that the holder is not registered a second time.
        self._holder = (holder,)
        self.index = index

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._holder[0].part(input, self.index)


def _version(x: torch.Tensor) -> int:
    """Counts in-place changes; inference tensors keep no count."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


@dataclass
class _Call:
    x: torch.Tensor
    version: int
    names: list[str] = field(default_factory=list)


class FuseProjections(Optimizer):
    """Concatenates sibling nn.Linear layers that were seen to receive the very same tensor."""

    def __init__(self, *, include: list[str], exclude: list[str]) -> None:
        self.include = include
        self.exclude = exclude

    def support(self, backend: Backend) -> Support:
        return Support(Level.native)

    def apply(self, model: nn.Module, context: Context) -> Applied:
        selection = select_modules(model, lambda _, module: isinstance(module, nn.Linear), self.include, self.exclude)
        skipped = list(selection.skipped)
        linears = {name: module for name, module in selection.matched.items() if isinstance(module, nn.Linear)}
        groups = [group for group in _watch(model, linears, context) if len(group) > 1]
        counts = _weight_owners(model)
        changes: list[Change] = []
        for group in groups:
            fit, unfit = _sort_out(group, linears, counts)
            skipped += unfit
            if len(fit) > 1:
                changes += _fuse(model, fit, linears)
            else:
                skipped += [Skipped(name, "no sibling on the same input can join it") for name in fit]
        if not changes:
            return Applied(model, skipped=skipped, not_applicable="no linear layers of one parent read the same tensor")
        return Applied(model, changes, skipped, details=_settle(model, context))


def _settle(model: nn.Module, context: Context) -> dict[str, Any]:
    """Parts are slices of one output. A caller that flattens them with `view` needs copies instead: one call tells."""
    try:
        with torch.no_grad():
            context.workload.probe(model)
    except RuntimeError as error:
        if "view" not in str(error):
            raise
        for module in model.modules():
            if isinstance(module, FusedProjections):
                module.contiguous = True
        return {"copied_outputs": "a caller flattens a projection's output with view, which a slice does not allow"}
    return {}


def _watch(model: nn.Module, linears: dict[str, nn.Linear], context: Context) -> list[list[str]]:
    """Names of siblings that received one tensor object in one probe call, in the order they were called."""
    calls: dict[tuple[str, int], _Call] = {}
    counts: dict[str, int] = {}
    handles = []
    for name, linear in linears.items():

        def see(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            counts[name] = counts.get(name, 0) + 1
            if len(args) == 1 and isinstance(args[0], torch.Tensor):
                x = args[0]
                call = calls.setdefault((name.rpartition(".")[0], id(x)), _Call(x, _version(x)))
                if call.version == _version(x) and name not in call.names:
                    call.names.append(name)

        handles.append(linear.register_forward_pre_hook(see))
    try:
        # Not inference mode: its tensors do not count in-place changes between two siblings.
        with torch.inference_mode(False), torch.no_grad():
            context.workload.probe(model)
    finally:
        for handle in handles:
            handle.remove()
    seen: set[str] = set()
    groups = []
    for call in calls.values():
        names = [name for name in call.names if name not in seen]
        if len({counts[name] for name in names}) == 1:
            seen.update(names)
            groups.append(names)
    return groups


def _weight_owners(model: nn.Module) -> dict[int, int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return owners


def _sort_out(group: list[str], linears: dict[str, nn.Linear], owners: dict[int, int]) -> tuple[list[str], list[Skipped]]:
    """The names that can share one matmul, alike to the first of them, and why the others cannot."""
    fit: list[str] = []
    unfit: list[Skipped] = []
    for name in group:
        reason = _why_not(linears[name], linears[fit[0]] if fit else linears[name], owners)
        if reason is None:
            fit.append(name)
        else:
            unfit.append(Skipped(name, reason))
    return fit, unfit


def _why_not(linear: nn.Linear, first: nn.Linear, owners: dict[int, int]) -> str | None:
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of nn.Linear: what it adds would be lost"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has forward hooks"
    if any(owners[id(parameter)] > 1 for parameter in linear.parameters()):
        return "its parameters are shared with another module"
    if (linear.bias is None) != (first.bias is None):
        return "its siblings differ in having a bias"
    if linear.weight.dtype != first.weight.dtype or linear.weight.device != first.weight.device:
        return "its siblings differ in element type or device"
    return None


def _fuse(model: nn.Module, group: list[str], linears: dict[str, nn.Linear]) -> list[Change]:
    members = [linears[name] for name in group]
    first = members[0]
    sizes = tuple(linear.out_features for linear in members)
    fused = nn.Linear(first.in_features, sum(sizes), first.bias is not None, device="meta", dtype=first.weight.dtype)
    fused.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in members]), first.weight.requires_grad)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in members]), first.bias.requires_grad)
    # Patterns of later steps name the projections by what they were called.
    object.__setattr__(fused, "original_names", tuple(group))
    holder = FusedProjections(fused, sizes).train(first.training)
    changes = []
    for index, name in enumerate(group):
        replacement = holder if index == 0 else ProjectionPart(holder, index).train(first.training)
        changes.append(Change(name, members[index], replacement, "concatenated"))
        replace_module(model, name, replacement)
    return changes
