"""The plain way to run a model that does not fit: a block's weights are copied to the device when it is called, and freed after.

It is what an offloaded model is verified and timed against when the model itself cannot be on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn


class FetchedBlock:
    """Mixed into a block's class. Between calls its tensors are on the host, those of modules that a step puts into it among them;
    `_staying` are not."""

    _staying: tuple[torch.Tensor, ...]
    _fetched_to: torch.device
    original_class: type[nn.Module]

    # Not recursive: the frame itself is not traced, and the block's own forward is.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rest = _put(self, self._fetched_to)
        try:
            return self.original_class.forward(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        finally:
            for table, key, tensor in rest:
                table[key] = tensor


@torch.compiler.disable()
def _put(block: Any, device: torch.device) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Gives the block copies on `device`; returns where they stand, with what stood there."""
    staying = {id(tensor) for tensor in block._staying}
    rest = [place for place in _tensors_of(block) if id(place[2]) not in staying]
    made: dict[int, torch.Tensor] = {}
    for table, key, tensor in rest:
        if id(tensor) not in made:
            made[id(tensor)] = _copied(tensor, device)
        table[key] = made[id(tensor)]
    return rest


def _tensors_of(block: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    tables = [table for module in block.modules() for table in (module.__dict__["_parameters"], module.__dict__["_buffers"])]
    return [(table, key, tensor) for table in tables for key, tensor in table.items() if tensor is not None]


def places_of(block: Any, names: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """(dict, key) of the tensors under dotted names."""
    places = []
    for name in names:
        path, _, key = name.rpartition(".")
        module = block.get_submodule(path)
        places.append((module._parameters if key in module._parameters else module._buffers, key))
    return places


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


@cache
def _fetched_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (FetchedBlock, cls), {"original_class": cls, "__module__": __name__, "__doc__": cls.__doc__})


def fetch(model: nn.Module, blocks: Mapping[str, nn.Module], names: Mapping[str, Sequence[str]], device: torch.device) -> None:
    """Makes `model`, which lies on the host, run on `device`, in place: the tensors `names` of the blocks are copied at each
    call, all others once, here; what was shared stays shared."""
    fetched = {id(table[key]) for name, block in blocks.items() for table, key in places_of(block, names[name])}
    made: dict[int, torch.Tensor] = {}
    for table, key, tensor in _tensors_of(model):
        if id(tensor) not in fetched:
            if id(tensor) not in made:
                made[id(tensor)] = _copied(tensor, device)
            table[key] = made[id(tensor)]
    for module in model.modules():
        # As moving a model in place does: a Python attribute goes on holding what a module has under a name.
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and id(value) in made:
                module.__dict__[key] = made[id(value)]
    for block in blocks.values():
        staying = tuple(tensor for _, _, tensor in _tensors_of(block) if id(tensor) not in fetched)
        block.__class__ = _fetched_class(type(block))
        block.__dict__.update(_staying=staying, _fetched_to=device)


def release(model: nn.Module) -> None:
    """Makes fetched blocks what they were, their weights on the host."""
    for module in model.modules():
        if isinstance(module, FetchedBlock):
            object.__setattr__(module, "__class__", module.original_class)
            del module.__dict__["_staying"], module.__dict__["_fetched_to"]
