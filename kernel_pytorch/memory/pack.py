"""The tensors of one block in one flat buffer of pinned host memory, so that one large copy moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernel_pytorch.errors import UnsupportedOperationError

# Where torch's CUDA allocator starts tensors: kernels find the alignment that they had.
_ALIGNMENT_BYTES = 512


@dataclass(frozen=True)
class Entry:
    """One tensor of a block. name: dotted, from the block. table: the dict of the module that holds it. key: its name there.
    offset: bytes from the start of the flat buffer."""

    name: str
    table: dict[str, Any]
    key: str
    offset: int


def is_movable(tensor: torch.Tensor) -> bool:
    """Whether the tensor is plain memory that a copy of bytes moves."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)
    )


def names_of(block: nn.Module, tensors: set[int]) -> list[str]:
    """Dotted names in `block` under which the tensors with these ids stand, also when one has several."""
    found = []
    for path, module in block.named_modules():
        for table in (module._parameters, module._buffers):
            found += [f"{path}.{key}" if path else key for key, tensor in table.items() if id(tensor) in tensors]
    return found


class Pack:
    """Puts the tensors of `block` that `names` lists into host memory. The block holds those from then on, under the same
    names: its state_dict gives their values, and what is written to them in place counts in the next call.

    allocate: makes flat uint8 host memory of so many bytes. The tensors that stood there are read, and not changed.
    """

    def __init__(self, block: nn.Module, names: Sequence[str], allocate: Callable[[int], torch.Tensor]) -> None:
        self.names = tuple(names)
        self._entries, originals, num_bytes = _lay_out(block, self.names)
        with torch.inference_mode(False), torch.no_grad():
            self.host = allocate(num_bytes)
            self._requires_grad = [original.requires_grad for original in originals]
            self._forms = [_form(original) for original in originals]
            self._is_parameter = [isinstance(original, nn.Parameter) for original in originals]
            self._at_rest = self._views(self.host, self._requires_grad)
            for entry, tensor, original in zip(self._entries, self._at_rest, originals, strict=True):
                tensor.copy_(original)
                entry.table[entry.key] = tensor
        self._addresses = [tensor.data_ptr() for tensor in self._at_rest]
        self._on_device: dict[int, list[torch.Tensor]] = {}

    @property
    def trainable(self) -> bool:
        """Whether a gradient of any of the tensors could be asked for."""
        return any(self._requires_grad)

    def place(self, number: int, memory: torch.Tensor) -> None:
        """Makes the block's tensors those in slot `number`, whose memory is given."""
        for entry, tensor, address in zip(self._entries, self._at_rest, self._addresses, strict=True):
            if entry.table.get(entry.key) is not tensor or tensor.data_ptr() != address:
                raise UnsupportedOperationError(
                    f"{entry.name} of an offloaded block was replaced or moved; write to it in place, or apply the recipe again"
                )
        views = self._on_device.get(number)
        if views is None:
            with torch.inference_mode(False), torch.no_grad():
                # Without gradients: autocast would keep copies of those that could have one.
                views = self._on_device[number] = self._views(memory, [False] * len(self._entries))
        for entry, tensor in zip(self._entries, views, strict=True):
            entry.table[entry.key] = tensor

    def remove(self) -> None:
        """Gives the block its tensors in host memory back."""
        for entry, tensor in zip(self._entries, self._at_rest, strict=True):
            entry.table[entry.key] = tensor

    def _views(self, memory: torch.Tensor, requires_grad: Sequence[bool]) -> list[torch.Tensor]:
        """One tensor an entry, in `memory`; entries of one tensor share one object."""
        made: dict[int, torch.Tensor] = {}
        for index, entry in enumerate(self._entries):
            if entry.offset not in made:
                made[entry.offset] = self._view(memory, index, requires_grad[index])
        return [made[entry.offset] for entry in self._entries]

    def _view(self, memory: torch.Tensor, index: int, requires_grad: bool) -> torch.Tensor:
        shape, stride, dtype = self._forms[index]
        offset = self._entries[index].offset
        flat = memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype)
        view = flat.as_strided(shape, stride)
        return nn.Parameter(view, requires_grad) if self._is_parameter[index] else view


def _form(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Shape, strides and element type of the packed tensor: its own strides where its elements lie without gaps."""
    return tensor.shape, torch.empty_like(tensor, device="meta").stride(), tensor.dtype


def _lay_out(block: nn.Module, names: tuple[str, ...]) -> tuple[list[Entry], list[torch.Tensor], int]:
    entries: list[Entry] = []
    originals: list[torch.Tensor] = []
    offsets: dict[int, int] = {}
    num_bytes = 0
    for name in names:
        path, _, key = name.rpartition(".")
        module = block.get_submodule(path)
        table = module._parameters if key in module._parameters else module._buffers
        tensor = table[key]
        assert tensor is not None
        if id(tensor) not in offsets:
            offsets[id(tensor)] = num_bytes
            size = tensor.numel() * tensor.element_size()
            # An empty tensor, too, has a place of its own.
            num_bytes += max(1, -(-size // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
        entries.append(Entry(name, table, key, offsets[id(tensor)]))
        originals.append(tensor)
    return entries, originals, num_bytes
