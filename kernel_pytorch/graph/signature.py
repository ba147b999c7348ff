"""The arguments of a call in a form that the next call's are compared with in microseconds.

`describe` in inputs.py knows every kind of argument and says why one cannot be captured. This knows only tensors and plain
values in tuples, lists and dicts, which is what nearly all calls are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from kernel_pytorch.graph.inputs import IS_WRAPPED, value_key

_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_SEQUENCES = frozenset({tuple, list})
_SIZE, _STRIDE, _POINTER = torch.Tensor.size, torch.Tensor.stride, torch.Tensor.data_ptr
_KIND, _IS_NESTED = attrgetter("dtype", "device", "layout"), attrgetter("is_nested")
# In C++, where torch was built for CUDA: what torch's own graphs compare addresses with.
_EQUAL_POINTERS = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
_TENSOR_GUARDS: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
# One launch for all; torch exports it without listing it.
copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
# Callers that take turns between two ways of making tensors are not to pay for a new check in each call.
_MAX_RENEWALS = 4
_VALUES = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[torch.Tensor]] | None:
    """(what is not a tensor, in order and hashable; the tensors in the order of `describe`), or None for other arguments."""
    skeleton: list[Any] = []
    tensors: list[torch.Tensor] = []
    for value in args:
        if type(value) in _TENSORS:
            skeleton.append(None)
            tensors.append(value)
        elif not _flatten(value, skeleton, tensors):
            return None
    for key, value in kwargs.items():
        skeleton.append(key)
        if type(value) in _TENSORS:
            tensors.append(value)
        elif not _flatten(value, skeleton, tensors):
            return None
    return tuple(skeleton), tensors


def _flatten(value: Any, skeleton: list[Any], tensors: list[torch.Tensor]) -> bool:
    kind = type(value)
    if kind in _TENSORS:
        skeleton.append(None)
        tensors.append(value)
        return True
    if kind in _VALUES:
        skeleton.extend(value_key(value))
        return True
    if kind is tuple or kind is list:
        # A cache is a tuple of tuples of tensors: no Python code for each tensor.
        inside = type(value[0]) if value else None
        if inside in _SEQUENCES:
            leaves, width = _leaves(value, inside)
            if leaves is not None:
                skeleton.append((kind, len(value), inside, width))
                tensors += leaves
                return True
        elif _TENSORS.issuperset(map(type, value)):
            skeleton.append((kind, len(value)))
            tensors += value
            return True
        skeleton.append((kind, len(value), None))
        return all(_flatten(item, skeleton, tensors) for item in value)
    if kind is dict:
        if any(type(key) not in _VALUES for key in value):
            return False
        skeleton.append((kind, tuple(part for key in value for part in value_key(key))))
        return all(_flatten(item, skeleton, tensors) for item in value.values())
    return False


def _leaves(rows: Sequence[Any], kind: Any) -> tuple[list[torch.Tensor] | None, int]:
    """The tensors of sequences of one kind and length, and that length; None where they are not, or hold something else."""
    leaves: list[Any] = []
    width = len(rows[0])
    for row in rows:
        if type(row) is not kind or len(row) != width:
            return None, width
        leaves += row
    return (leaves if _TENSORS.issuperset(map(type, leaves)) else None), width


class Signature:
    """Shapes, strides, types and devices of the tensors of one kind of call. Holds none of their memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._sizes = list(map(_SIZE, tensors))
        self._strides = list(map(_STRIDE, tensors))
        self._kinds = list(map(_KIND, tensors))
        self._alike, self._renewals = _compiled_check(tensors), 0

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        # Nested tensors have no sizes: the compiled check would end the process. Sparse ones have no strides.
        if any(map(_IS_NESTED, tensors)):
            return False
        if self._alike is not None and self._alike(*tensors):
            return True
        if list(map(_KIND, tensors)) != self._kinds or any(map(torch.Tensor.is_neg, tensors)) or any(map(torch.is_conj, tensors)):
            return False
        if any(map(IS_WRAPPED, tensors)):
            return False
        if list(map(_SIZE, tensors)) != self._sizes or list(map(_STRIDE, tensors)) != self._strides:
            return False
        # The compiled check tells more apart than a graph does, such as tensors that were made in inference mode from others.
        if self._renewals < _MAX_RENEWALS:
            self._renewals += 1
            self._alike = _compiled_check(tensors)
        return True


def _compiled_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Whether tensors are like these in all that a Signature has, in C++, as torch.compile checks its arguments; None where this torch
    has no such check. 66 tensors take 6 us instead of 50."""
    try:
        sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
        check = _TENSOR_GUARDS(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (TypeError, ValueError, RuntimeError):
        return None


def pointers(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(_POINTER, tensors))


def at_addresses(tensors: list[torch.Tensor], addresses: list[int], which: list[int]) -> bool:
    """Whether tensor i is at address i, for every i in `which`."""
    if _EQUAL_POINTERS is not None:
        return _EQUAL_POINTERS(tensors, addresses, which)
    at = pointers(tensors)
    return at == addresses or all(at[i] == addresses[i] for i in which)
