"""A call's arguments as JSON and tensors: no pickle, so that reading them runs nothing.

JSON values stand for themselves; everything else is an object with one key that says what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from kernel_pytorch.errors import ConfigError

_MOST_NESTED = 100
_ALLOWED = "tensors, numbers, strings, bools, None, and tuples, lists and dicts of them"
_SCALARS = (type(None), bool, int, float, str)
_NOT_FINITE = ("nan", "inf", "-inf")


class CallWriter:
    """Encodes values; `tensors` fills with what they hold, by names under `prefix`. device: of the model."""

    def __init__(self, prefix: str, device: torch.device) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._prefix, self._device = prefix, device
        self._names: dict[int, str] = {}

    def encode(self, value: Any, where: str, depth: int = 0) -> Any:
        """JSON types. Raises ConfigError for a value that is not of the few kinds that a file can hold."""
        if depth > _MOST_NESTED:
            raise ConfigError(f"{where}: found more than {_MOST_NESTED} values inside one another, or one inside itself")
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where)
        if type(value) in (list, tuple):
            items = [self.encode(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
            return {type(value).__name__: items}
        if type(value) is dict:
            return {
                "dict": [[_scalar(key, f"{where} key"), self.encode(item, f"{where}[{key!r}]", depth + 1)] for key, item in value.items()]
            }
        return _scalar(value, where)

    def _tensor(self, tensor: torch.Tensor, where: str) -> dict[str, Any]:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout is not torch.strided or tensor.is_meta:
            raise ConfigError(_refusal(where, f"a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"))
        # One tensor passed twice stays one: a model may compare its arguments, and fused layers do.
        name = self._names.setdefault(id(tensor), f"{self._prefix}{len(self._names)}")
        self.tensors[name] = tensor
        on_host = tensor.device.type == "cpu" and self._device.type != "cpu"
        return {"tensor": name, "host": True} if on_host else {"tensor": name}


def _scalar(value: Any, where: str) -> Any:
    if type(value) not in _SCALARS:
        raise ConfigError(_refusal(where, f"a {type(value).__name__}"))
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _refusal(where: str, found: str) -> str:
    return f"{where}: found {found}; a saved call holds {_ALLOWED}: optimize with a call of those as held_out=[(args, kwargs)]"


class CallReader:
    """Decodes what CallWriter wrote. load: a tensor of the file by name, on a device. device: of the model."""

    def __init__(self, load: Callable[[str, torch.device], torch.Tensor], device: torch.device) -> None:
        self._load, self._device = load, device
        self._loaded: dict[str, torch.Tensor] = {}

    def decode(self, value: Any, where: str, depth: int = 0) -> Any:
        """The value. Raises ConfigError for anything that CallWriter does not write."""
        if depth > _MOST_NESTED:
            raise ConfigError(f"{where}: found more than {_MOST_NESTED} values inside one another")
        if type(value) in _SCALARS:
            return value
        kind, content = next(iter(value.items())) if isinstance(value, dict) and value else (None, None)
        if kind == "tensor" and isinstance(content, str) and value in ({kind: content}, {kind: content, "host": True}):
            return self._tensor(content, torch.device("cpu") if "host" in value else self._device)
        if isinstance(value, dict) and len(value) == 1:
            if kind == "float" and content in _NOT_FINITE:
                return float(content)
            if kind in ("list", "tuple") and isinstance(content, list):
                items = [self.decode(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(content)]
                return items if kind == "list" else tuple(items)
            if kind == "dict" and isinstance(content, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
                return {self._key(key, where): self.decode(item, f"{where}[{key!r}]", depth + 1) for key, item in content}
        raise ConfigError(f"{where}: found {str(value)[:80]!r}; allowed what `save` writes: the file was changed")

    def _key(self, key: Any, where: str) -> Any:
        found = self.decode(key, f"{where} key") if not isinstance(key, dict) or "float" in key else key
        if type(found) not in _SCALARS:
            raise ConfigError(f"{where}: found a key {str(key)[:80]!r}; allowed a string, a number, a bool or null")
        return found

    def _tensor(self, name: str, device: torch.device) -> torch.Tensor:
        if name not in self._loaded:
            self._loaded[name] = self._load(name, device)
        return self._loaded[name]
