"""Calls of one function as programs of fixed shapes: what XLA compiles, one for each signature, the least recently used forgotten."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import reset_code
from torch.utils._pytree import tree_flatten

from kernel_pytorch.cache import CacheStats, LRUCache

# XLA's programs are as large as the model's graph; a handful of lengths is what a padded workload has.
MAX_PROGRAMS = 64
_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_number = itertools.count()


class Program:
    """One compiled call. Its code object is its own, so that torch counts and forgets what it compiled apart from others."""

    def __init__(self, function: Callable[..., Any], keywords: dict[str, Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        self.code = call.__code__.replace(co_name=f"xla_program_{next(_number)}")
        own = types.FunctionType(self.code, call.__globals__, self.code.co_name, None, call.__closure__)
        self._compiled = torch.compile(own, dynamic=False, **keywords)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def forget(self) -> None:
        """Drops what was compiled; a later call would compile again."""
        reset_code(self.code)


class XlaPrograms:
    """Calls `function` through a program for the shapes, types and plain values of the arguments.

    keywords: of torch.compile, such as backend="openxla". A program whose other arguments change (an object's state) is
    compiled again by torch's own guards."""

    def __init__(self, function: Callable[..., Any], *, max_programs: int = MAX_PROGRAMS, **keywords: Any) -> None:
        self._function, self._keywords = function, keywords
        self._programs: LRUCache[Hashable, Program] = LRUCache(max_programs, on_evict=lambda _, program: program.forget())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        program = self._programs.get_or_make(signature(args, kwargs), lambda: Program(self._function, self._keywords))
        return program(*args, **kwargs)

    @property
    def stats(self) -> CacheStats:
        """A miss is a program that was made."""
        return self._programs.stats

    def clear(self) -> None:
        """Forgets all programs."""
        while (oldest := self._programs.evict()) is not None:
            assert oldest


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What a program is compiled for: structure, of tensors shape, dtype, device and whether they need a gradient, of plain
    values themselves, of everything else the type."""
    leaves, structure = tree_flatten((args, dict(sorted(kwargs.items()))))
    return str(structure), torch.is_grad_enabled(), tuple(_leaf(value) for value in leaves)


def _leaf(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, str(value.device), value.requires_grad
    # True, 1 and 1.0 are equal, and programs of them are not.
    return (type(value), value) if value is None or isinstance(value, _VALUES) else type(value)
