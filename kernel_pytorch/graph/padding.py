"""Dims that a recipe declares as dynamic: found in a call's arguments, and padded.

A declaration is `ARGUMENT:DIM[@SIZE][=VALUE]`. Dims of one SIZE have the same number of elements in every call. VALUE is what
padding is filled with and what the model relies on, as a mask does; without it padding is zero and must not matter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from kernel_pytorch.errors import NoEffectError
from kernel_pytorch.graph.inputs import is_plain, value_key
from kernel_pytorch.graph.signature import copy_all
from kernel_pytorch.values import DYNAMIC_DIM

# Name of the size of dims that are declared without one.
DEFAULT_SIZE = "size"
# Types whose values say all that there is to compare.
BY_VALUE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)


@dataclass(frozen=True)
class Argument:
    """One declared argument. position: None for one that comes by keyword only. dims: (dim as declared, name of its size).
    value: what padding is filled with. relied_on: the model counts on that value."""

    name: str
    position: int | None
    dims: tuple[tuple[int, str], ...]
    value: float
    relied_on: bool


@dataclass
class Found:
    """The declared tensors of one call. where: position or keyword of each. dims: of each, non-negative dim -> name of its
    size. kept: the value of its padding must stay. sizes: elements by name."""

    tensors: list[torch.Tensor]
    where: list[int | str]
    dims: list[dict[int, str]]
    values: list[float]
    kept: list[bool]
    sizes: dict[str, int]

    def again(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Found:
        """The same places of another call of the same shapes."""
        tensors = [args[where] if isinstance(where, int) else kwargs[where] for where in self.where]
        return Found(tensors, self.where, self.dims, self.values, self.kept, self.sizes)

    def num_elements(self, targets: Mapping[str, int]) -> int:
        """Of all declared tensors, when their dynamic dims are as in `targets`."""
        return sum(math.prod(self.shape(index, targets)) for index in range(len(self.tensors)))

    def replace(self, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The call's arguments with `tensors` in place of the declared ones."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for where, tensor in zip(self.where, tensors, strict=True):
            if isinstance(where, int):
                new_args[where] = tensor
            else:
                new_kwargs[where] = tensor
        return new_args, new_kwargs

    def shape(self, index: int, targets: Mapping[str, Any]) -> tuple[Any, ...]:
        """Shape of a declared tensor with its dynamic dims as in `targets`."""
        dims = self.dims[index]
        return tuple(targets[dims[dim]] if dim in dims else size for dim, size in enumerate(self.tensors[index].shape))

    def padded(self, targets: Mapping[str, int]) -> list[torch.Tensor]:
        """New tensors, of the sizes in `targets`."""
        return [_filled(self, index, targets) for index in range(len(self.tensors))]

    def padded_otherwise(self, targets: Mapping[str, int]) -> list[torch.Tensor]:
        """As `padded`, with other values in the padding of those whose value must not matter: real ones repeated, so that
        indices stay valid, and of floating point tensors turned, stretched and shifted ones."""
        return [_filled(self, index, targets) if kept else _repeated(self, index, targets) for index, kept in enumerate(self.kept)]

    def shows_padding(self, targets: Mapping[str, int]) -> bool:
        """Whether a check can tell what the model makes of padding: not where every element is what padding holds, as in a call
        with indices of zero, which a model that averages over them answers as if they were fewer."""
        free = [index for index, kept in enumerate(self.kept) if not kept]
        return not free or any(not torch.equal(_filled(self, index, targets), _repeated(self, index, targets)) for index in free)

    def shortened(self, sizes: Mapping[str, int]) -> Found:
        """The same call with the ends of its dynamic dims cut off."""
        # As a caller would have made them: a model may not take a part of a tensor.
        tensors = [_part(tensor, dims, sizes).contiguous() for tensor, dims in zip(self.tensors, self.dims, strict=True)]
        return Found(tensors, self.where, self.dims, self.values, self.kept, dict(sizes))


class StaticInputs:
    """Padded copies of one bucket's declared tensors, always at the same addresses."""

    def __init__(self, found: Found, targets: Mapping[str, int]) -> None:
        # Inside inference mode they could not be written to outside of it.
        with torch.inference_mode(False):
            self.tensors = found.padded(targets)
        self._sizes: dict[str, int] = {}
        self._parts: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors)

    def load(self, found: Found) -> None:
        """Copies a call's tensors in; the rest is padding."""
        if self.tensors[0].is_cuda:
            stream = torch.cuda.current_stream(self.tensors[0].device)
            if self._stream is not None and self._stream != stream:
                # The call before may still be reading what is written now.
                stream.wait_stream(self._stream)
            self._stream = stream
        if found.sizes != self._sizes:
            for tensor, value in zip(self.tensors, found.values, strict=True):
                tensor.fill_(value)
            self._parts = [_part(tensor, dims, found.sizes) for tensor, dims in zip(self.tensors, found.dims, strict=True)]
            self._sizes = dict(found.sizes)
        copy_all(self._parts, found.tensors)


class Declarations:
    """The dynamic dims of a callable. Raises NoEffectError for an argument that `forward` does not take."""

    def __init__(self, forward: Callable[..., Any], dynamic_dims: Sequence[str]) -> None:
        parameters = inspect.signature(forward).parameters
        self.size_names: list[str] = []
        declared: dict[str, list[tuple[int, str, float | None]]] = {}
        for text in dynamic_dims:
            match = DYNAMIC_DIM.fullmatch(text)
            if match is None:
                raise ValueError(f"found {text!r}; allowed ARGUMENT:DIM[@SIZE][=VALUE]")
            size, value = match["size"] or DEFAULT_SIZE, match["value"]
            self.size_names.extend([size] if size not in self.size_names else [])
            name = _name(match["argument"], parameters)
            declared.setdefault(name, []).append((int(match["dim"]), size, None if value is None else float(value)))
        self._arguments = [_argument(name, dims, parameters) for name, dims in declared.items()]

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, first: bool = False) -> Found | str:
        """The declared tensors of a call; or why it cannot be padded. Arguments that are left out or None are none. first: no call
        was padded before; raises NoEffectError for a dim that is not there, which later calls of another rank may lack."""
        found = Found([], [], [], [], [], {})
        for argument in self._arguments:
            where = _where(argument, args, kwargs)
            tensor = None if where is None else args[where] if isinstance(where, int) else kwargs[where]
            if where is None or tensor is None:
                continue
            if not isinstance(tensor, torch.Tensor) or not is_plain(tensor) or tensor.layout is not torch.strided:
                return f"{argument.name} is a {type(tensor).__name__}, not a plain tensor"
            if not _has_value(tensor.dtype, argument.value):
                return f"{argument.name} is of {str(tensor.dtype).removeprefix('torch.')}, which has no {argument.value}"
            dims: dict[int, str] = {}
            for dim, size in argument.dims:
                if not -tensor.dim() <= dim < tensor.dim():
                    why = f"{argument.name} has {tensor.dim()} dims, and no dim {dim}"
                    if first:
                        raise NoEffectError(f"graph.dynamic_dims: {why}; dims are counted from 0, or from the end as -1")
                    return why
                dims[dim % tensor.dim()] = size
                if found.sizes.setdefault(size, tensor.shape[dim]) != tensor.shape[dim]:
                    return f"dims declared as {size} differ in their elements"
            found.tensors.append(tensor)
            found.where.append(where)
            found.dims.append(dims)
            found.values.append(argument.value)
            found.kept.append(argument.relied_on or tensor.dtype is torch.bool)
        if not found.tensors:
            return "none of the declared arguments is given"
        return "a declared dim has no elements" if 0 in found.sizes.values() else found


def form(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable | None:
    """What a call's arguments are, but for the elements of tensors, in a few microseconds; None for containers and objects."""
    parts = list[Hashable](kwargs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            parts.append((type(value), value.shape, value.dtype, value.device, value.layout))
        elif isinstance(value, BY_VALUE):
            parts.append(value_key(value))
        else:
            return None
    return tuple(parts)


def signature(args: Sequence[Any], kwargs: Mapping[str, Any], found: Found) -> Hashable | None:
    """What must be equal for two calls to differ in their dynamic dims only; None when an argument is an object that nothing
    is known of, such as a KV cache: what a padded call does to it could not be undone."""
    names = {name: name for name in found.sizes}
    dynamic = [(found.shape(index, names), tensor.dtype, tensor.device) for index, tensor in enumerate(found.tensors)]
    parts = list[Hashable]()
    new_args, new_kwargs = found.replace(args, kwargs, dynamic)
    described = all(_describe(value, parts) for value in (new_args, dict(sorted(new_kwargs.items()))))
    return tuple(parts) if described else None


def _describe(value: Any, parts: list[Hashable]) -> bool:
    if isinstance(value, torch.Tensor):
        parts.append((tuple(value.shape), value.dtype, value.device))
        return True
    if type(value) in (list, dict) or isinstance(value, tuple):
        parts.append((type(value), len(value)))
        return all(_describe(item, parts) for item in ([*value.keys(), *value.values()] if type(value) is dict else value))
    if not isinstance(value, BY_VALUE):
        return False
    parts.append(value_key(value))
    return True


def _name(argument: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """An argument's name from its name or position; a position beyond the named ones stays a number."""
    by_position = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    kinds = {p.kind for p in parameters.values()}
    if argument.isdigit():
        if int(argument) < len(by_position):
            return by_position[int(argument)]
        known = inspect.Parameter.VAR_POSITIONAL in kinds
    else:
        known = argument in parameters or inspect.Parameter.VAR_KEYWORD in kinds
    if not known:
        raise NoEffectError(f"graph.dynamic_dims: the model takes no argument {argument!r}; it takes {', '.join(parameters) or 'none'}")
    return argument


def _argument(name: str, dims: list[tuple[int, str, float | None]], parameters: Mapping[str, inspect.Parameter]) -> Argument:
    by_position = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    position = int(name) if name.isdigit() else by_position.index(name) if name in by_position else None
    values = {value for _, _, value in dims if value is not None}
    if len(values) > 1:
        raise NoEffectError(f"graph.dynamic_dims: {name} has padding of {' and '.join(map(str, sorted(values)))}; a tensor has one value")
    # By convention 0 in a mask means: not there.
    relied_on = bool(values) or name.endswith("mask")
    return Argument(name, position, tuple((dim, size) for dim, size, _ in dims), values.pop() if values else 0.0, relied_on)


def _where(argument: Argument, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    if argument.name in kwargs:
        return argument.name
    return argument.position if argument.position is not None and argument.position < len(args) else None


def _has_value(dtype: torch.dtype, value: float) -> bool:
    if dtype is torch.bool:
        return value in (0, 1)
    if dtype.is_complex or (dtype.is_floating_point and math.isinf(value)):
        return True
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min <= value <= limits.max and (dtype.is_floating_point or value.is_integer())


def _part(tensor: torch.Tensor, dims: Mapping[int, str], sizes: Mapping[str, int]) -> torch.Tensor:
    for dim, name in dims.items():
        tensor = tensor.narrow(dim, 0, sizes[name])
    return tensor


def _filled(found: Found, index: int, targets: Mapping[str, int]) -> torch.Tensor:
    tensor = found.tensors[index]
    padded = torch.full(found.shape(index, targets), found.values[index], dtype=tensor.dtype, device=tensor.device)
    _part(padded, found.dims[index], found.sizes).copy_(tensor)
    return padded


def _repeated(found: Found, index: int, targets: Mapping[str, int]) -> torch.Tensor:
    tensor = padded = found.tensors[index]
    for dim, name in found.dims[index].items():
        padded = padded.index_select(dim, torch.arange(targets[name], device=tensor.device) % found.sizes[name])
    if tensor.is_floating_point() or tensor.is_complex():
        padded = padded * -2 + 1
    _part(padded, found.dims[index], found.sizes).copy_(tensor)
    return padded
