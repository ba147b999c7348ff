"""Outputs of a padded call, cut back to what the call without padding returns.

Which dims follow a dynamic size is found by comparing shapes at different sizes, never by a number of elements alone: a
hidden size that happens to equal the padded length does not change with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from kernel_pytorch.graph.inputs import holds_tensors

# Of one output leaf: dim -> name of the size that it follows.
Cut = dict[int, str]


class Outputs:
    """What a call returned, as leaves: through pytree, and through dataclasses that pytree does not know."""

    def __init__(self, value: Any) -> None:
        tops, self._spec = tree_flatten(value)
        self._parts: list[tuple[Any, Outputs] | None] = []
        self.leaves: list[Any] = []
        for top in tops:
            if is_dataclass(top) and not isinstance(top, type) and _is_its_fields(top):
                inner = Outputs({item.name: getattr(top, item.name) for item in fields(top)})
                self._parts.append((top, inner))
                self.leaves.extend(inner.leaves)
            else:
                self._parts.append(None)
                self.leaves.append(top)

    def same_structure(self, other: Outputs) -> bool:
        if self._spec != other._spec or len(self.leaves) != len(other.leaves):
            return False
        pairs = zip(self._parts, other._parts, strict=True)
        return all((a is None and b is None) or (a and b and type(a[0]) is type(b[0]) and a[1].same_structure(b[1])) for a, b in pairs)

    def rebuilt(self, leaves: Sequence[Any]) -> Any:
        """The value with other leaves in the same order."""
        rest = iter(leaves)
        return self._rebuilt(rest)

    def _rebuilt(self, rest: Any) -> Any:
        tops = []
        for part in self._parts:
            if part is None:
                tops.append(next(rest))
                continue
            top = copy.copy(part[0])
            for name, value in part[1]._rebuilt(rest).items():
                # Frozen ones too: the copy is ours.
                object.__setattr__(top, name, value)
            tops.append(top)
        return tree_unflatten(tops, self._spec)

    def boxes(self) -> list[str]:
        """Types of the leaves that hold tensors where nobody can cut or copy them."""
        return [type(leaf).__name__ for leaf in self.leaves if not isinstance(leaf, torch.Tensor) and holds_tensors(leaf)]

    def shapes(self) -> list[tuple[int, ...] | None]:
        return [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in self.leaves]


def _is_its_fields(value: Any) -> bool:
    """Whether a dataclass has no tensors but in its fields: neither made of them in __post_init__, nor as items of a dict."""
    names = {item.name for item in fields(value)}
    rest = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in names}
    return not isinstance(value, (dict, list, tuple)) and not holds_tensors(rest)


def following(short: Outputs, long: Outputs, name: str, size: int, target: int) -> list[Cut] | str:
    """Output dims that grew when one dynamic size went from `size` to `target`; or why the output cannot be cut: only a dim
    that equals the size in both calls can be."""
    if not short.same_structure(long):
        return f"the structure of the output depends on {name}"
    cuts: list[Cut] = []
    for index, (a, b) in enumerate(zip(short.shapes(), long.shapes(), strict=True)):
        cut: Cut = {}
        cuts.append(cut)
        if a is None or b is None:
            continue
        if len(a) != len(b):
            return f"output {index} has {len(a)} dims or {len(b)}, depending on {name}"
        for dim, (before, after) in enumerate(zip(a, b, strict=True)):
            if before == after:
                continue
            if (before, after) != (size, target):
                return f"dim {dim} of output {index} is {before} where {name} is {size}, and {after} where it is {target}: it cannot be cut"
            cut[dim] = name
    return cuts


def merged(parts: Sequence[list[Cut]]) -> list[Cut] | str:
    """The cuts by several sizes as one; or why they exclude each other."""
    total: list[Cut] = [{} for _ in parts[0]] if parts else []
    for part in parts:
        for index, (cut, more) in enumerate(zip(total, part, strict=True)):
            both = cut.keys() & more.keys()
            if both:
                dim = min(both)
                return f"dim {dim} of output {index} follows both {cut[dim]} and {more[dim]}: it cannot be cut"
            cut.update(more)
    return total


def cut_leaf(leaf: Any, cut: Cut, sizes: Mapping[str, int]) -> Any:
    """A view of a leaf without its padding."""
    for dim, name in cut.items():
        leaf = leaf.narrow(dim, 0, sizes[name])
    return leaf
