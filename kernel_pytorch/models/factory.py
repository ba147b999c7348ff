"""A model of the user's own, made by a function that the user names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.models.source import Loaded, ModelSource, torch_dtype
from kernel_pytorch.models.text import DataSource, RandomTokens, Vocabulary
from kernel_pytorch.models.tokens import TokenWorkload
from kernel_pytorch.models.views import token_rows
from kernel_pytorch.schema import Phase

_FORMS = "an nn.Module, (module, args) or (module, args, kwargs)"


@contextmanager
def _importable_here() -> Iterator[None]:
    """The working directory is importable, as it is for `python -m`."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


class UserFactory(ModelSource):
    """`module:function`, called without arguments under the run's seed, returns the module and the inputs of one call.

    phase only labels what the call is. A module alone is fed random token ids, below the size of its first embedding.
    """

    def __init__(self, *, factory: str | None = None, dtype: str | None = None, phase: Phase | None = None) -> None:
        self.factory = factory
        self.dtype = dtype
        self.phase = Phase(phase or Phase.forward)

    def default_data(self, *, batch: int | None = None, length: int | None = None) -> DataSource:
        return RandomTokens(batch=batch, length=length)

    def load(self, *, data: DataSource | None, seed: int, device: torch.device, model_device: torch.device | None = None) -> Loaded:
        with _importable_here(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, inputs = _unpack(self.factory, _find(self.factory)())
        dtype = None if self.dtype is None else torch_dtype(self.dtype, torch.float32)
        model = model.to(model_device or device, dtype).eval()
        if inputs is not None:
            if data is not None:
                raise ConfigError(f"model.factory: {self.factory} returned its own inputs, so data cannot be set; leave data=auto")
            args, kwargs = _moved(inputs, device, dtype)
            workload = CallWorkload(args, kwargs, phase=self.phase.value)
        else:
            vocabulary = Vocabulary(_vocabulary_size(self.factory, model))
            parts = (data or self.default_data()).parts(vocabulary, batch=8, length=32, seed=seed)
            workload = TokenWorkload(
                parts, token_rows, phase=self.phase.value, trained=True, device=device, invoke=lambda model, ids, mask: model(ids)
            )
        return Loaded(model, workload, f"{type(model).__name__} of {self.factory}")


def _find(name: str | None) -> Callable[[], Any]:
    if name is None:
        raise ConfigError("model.factory: model=factory needs module:function, such as model.factory=my_package.my_module:build")
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ConfigError(f"model.factory: found {name!r}; a module, a colon and a function are needed, such as my_module:build")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"model.factory: {module_name} cannot be imported: {error}") from error
    except SyntaxError as error:
        raise ConfigError(f"model.factory: {error.filename}, line {error.lineno}: {error.msg}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"model.factory: {module_name} ({module.__file__}) has no function {function_name!r}")
    return function


def _unpack(name: str | None, made: Any) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]] | None]:
    if isinstance(made, nn.Module):
        return made, None
    if isinstance(made, tuple) and made and isinstance(made[0], nn.Module):
        if len(made) == 2 and isinstance(made[1], (tuple, list)):
            return made[0], (tuple(made[1]), {})
        if len(made) == 3 and isinstance(made[1], (tuple, list)) and isinstance(made[2], Mapping):
            return made[0], (tuple(made[1]), dict(made[2]))
    shape = f"({', '.join(type(item).__name__ for item in made)})" if isinstance(made, tuple) else type(made).__name__
    raise ConfigError(f"model.factory: {name} returned {shape}; allowed: {_FORMS}")


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device, dtype) for item in value)
    return value


def _vocabulary_size(name: str | None, model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise ConfigError(
        f"model.factory: {name} returned {type(model).__name__} alone, and it has no embedding to feed tokens to; return (module, args)"
    )
