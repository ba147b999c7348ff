"""What a call's arguments are, as a key: equal keys may share one captured graph.

Tensors in tuples, lists and dicts become a list of leaves, described by shape, strides, dtype and device. Tensors inside
other objects (a KV cache) cannot be swapped: they are described by address too, in a part of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

BY_VALUE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)
_BY_IDENTITY = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module)
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
# Whether a tensor is what torch.vmap or torch.func.grad hands to the function that they transform.
IS_WRAPPED: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
_MAX_DEPTH = 8
_MAX_ITEMS = 100_000


@dataclass
class Call:
    """structure: what must be equal for a graph to be shared. addresses: identities and addresses inside objects. tensors:
    the leaves in order. objects: kept alive as long as their identities are compared. refusal: why this call cannot be
    captured, or None."""

    structure: list[Any] = field(default_factory=list)
    addresses: list[Any] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    refusal: str | None = None

    def key(self) -> tuple[Any, ...]:
        return tuple(self.structure)

    def places(self) -> tuple[Any, ...]:
        return tuple(self.addresses)


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The key and the leaves of one call's arguments."""
    call = Call()
    _argument(args, call, 0)
    _argument(kwargs, call, 0)
    return call


def describe_state(items: dict[str, Any]) -> tuple[Any, ...]:
    """Values, identities and addresses of attributes: equal before and after a call that changes no Python state."""
    call = Call()
    for name, value in items.items():
        call.structure.append(name)
        _inside(value, call, 0, set())
    return (call.key(), call.places())


def rebuild(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with its tensor leaves replaced in the order in which `describe` listed them."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if type(value) is dict:
        return {key: rebuild(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(rebuild(item, tensors) for item in value)
    if _is_namedtuple(value):
        return type(value)(*(rebuild(item, tensors) for item in value))
    return value


def value_key(value: Any) -> tuple[Any, Any]:
    """Equal only for equal values of one type: 1 is not True, and 0.0 is not -0.0."""
    if isinstance(value, float):
        return (type(value), float(value).hex())
    if isinstance(value, complex):
        return (type(value), repr(value))
    return (type(value), value)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own: no subclass that wraps other tensors."""
    return type(tensor) in _PLAIN


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: nothing can be copied into it."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def holds_tensors(value: Any) -> bool:
    """Whether an object has tensors in it."""
    call = Call()
    _inside(value, call, 0, set())
    return any(isinstance(place, tuple) for place in call.addresses)


def _argument(value: Any, call: Call, depth: int) -> None:
    add = call.structure.append
    if isinstance(value, torch.Tensor):
        _leaf(value, call)
    elif isinstance(value, BY_VALUE):
        call.structure.extend(value_key(value))
    elif type(value) is dict:
        add("{")
        for key, item in value.items():
            if isinstance(key, BY_VALUE):
                call.structure.extend(value_key(key))
            else:
                call.refusal = f"a dict argument has a key of type {type(key).__name__}"
            _argument(item, call, depth)
        add("}")
    elif type(value) in (list, tuple) or _is_namedtuple(value):
        add(type(value))
        for item in value:
            _argument(item, call, depth)
        add(")")
    else:
        _inside(value, call, depth, set())


def _leaf(tensor: torch.Tensor, call: Call) -> None:
    if not is_plain(tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        call.refusal = f"an argument is a {type(tensor).__name__} of layout {layout}"
        return
    if IS_WRAPPED(tensor):
        call.refusal = "an argument stands for others: a transform such as torch.vmap is around the call"
        return
    if tensor.is_conj() or tensor.is_neg():
        call.refusal = "an argument is a conjugate or negative that is not computed yet"
        return
    call.structure.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
    call.tensors.append(tensor)


def _inside(value: Any, call: Call, depth: int, seen: set[int]) -> None:
    """Describes what cannot be swapped: by value, by identity, by address."""
    add, place = call.structure.append, call.addresses.append
    if isinstance(value, torch.Tensor):
        add((value.shape, value.dtype, value.device))
        place((id(value), value.data_ptr() if is_plain(value) and value.layout is torch.strided else 0))
        call.objects.append(value)
    elif isinstance(value, BY_VALUE):
        call.structure.extend(value_key(value))
    elif isinstance(value, _BY_IDENTITY) or id(value) in seen:
        place(id(value))
        call.objects.append(value)
    elif depth >= _MAX_DEPTH or len(call.structure) > _MAX_ITEMS:
        call.refusal = f"a {type(value).__name__} is too large to compare from call to call"
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        seen.add(id(value))
        add((type(value), len(value)))
        items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        for item in items:
            _inside(item, call, depth + 1, seen)
    elif hasattr(value, "__dict__"):
        seen.add(id(value))
        place(id(value))
        call.objects.append(value)
        _inside(vars(value), call, depth + 1, seen)
    else:
        place(id(value))
        call.objects.append(value)
        call.refusal = f"a {type(value).__name__} cannot be compared from call to call"


def _is_namedtuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
