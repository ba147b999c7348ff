"""Blocks kept in pinned host memory, copied to the device on a stream of their own while the block before computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.memory import MemoryManager, size_class_bytes
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.memory.blocks import select_blocks, weights_of
from kernel_pytorch.memory.fetched import fetch, places_of, release
from kernel_pytorch.memory.lanes import CudaLanes, Lanes
from kernel_pytorch.memory.ring import Ring
from kernel_pytorch.memory.streamed import StreamedBlock, stream
from kernel_pytorch.optimizer import Applied, Change, Context, Level, Optimizer, Skipped, Support, tensor_bytes


class OffloadWeights(Optimizer):
    """Streams the weights of repeated blocks through prefetch_depth + 1 slots of device memory.

    num_resident_blocks: blocks, evenly spaced, that stay on the device. include names blocks instead of the biggest list's; exclude
    keeps some on the device. The changed model is for inference; it is called with gradients disabled."""

    keeps_arithmetic = True

    def __init__(self, *, include: list[str], exclude: list[str], prefetch_depth: int, num_resident_blocks: int) -> None:
        self.include = include
        self.exclude = exclude
        self.prefetch_depth = prefetch_depth
        self.num_resident_blocks = num_resident_blocks
        self._device: torch.device | None = None

    def support(self, backend: Backend) -> Support:
        if backend.device.type == "cuda":
            return Support(Level.native)
        return Support(Level.native, f"not applicable on {backend.vendor}")

    def lanes(self, backend: Backend) -> Lanes | None:
        """The device's queues; None where there is no memory to move weights out of."""
        return CudaLanes(backend.device) if backend.device.type == "cuda" else None

    def apply(self, model: nn.Module, context: Context) -> Applied:
        lanes = self.lanes(context.backend)
        if lanes is None:
            return Applied(model, not_applicable=f"offload moves weights off a CUDA device; this is {context.backend.device.type}")
        if context.workload.phase == "train_step":
            return Applied(model, not_applicable="offloaded weights have no gradients")
        chosen = self._choose(model)
        if not chosen.blocks:
            return Applied(model, skipped=chosen.skipped, not_applicable=chosen.too_few)
        release(model)
        self._device = context.backend.device
        originals = {name: _snapshot(block) for name, block in chosen.blocks.items()}
        ring = self._stream(chosen, context.backend.memory, lanes)
        changes = [Change(name, originals[name], block, "streamed") for name, block in chosen.blocks.items()]
        details = {
            "num_blocks": len(changes),
            "num_slots": len(ring.slots),
            "slot_bytes": sum(slot.untyped_storage().nbytes() for slot in ring.slots),
            "pinned_bytes": pinned_bytes(model),
            # Live: it counts the calls to come.
            "copies": ring.counts,
        }
        return Applied(model, changes, chosen.skipped, details=details)

    def device_bytes(self, model: nn.Module) -> int:
        """Bytes that `model`, wherever it lies, will have on the device, without what its calls allocate."""
        chosen = self._choose(model)
        sizes = [_bytes_of(block, chosen.names[name]) for name, block in chosen.blocks.items()]
        slots = (self.prefetch_depth + 1) * size_class_bytes(max(sizes, default=0)) if sizes else 0
        return tensor_bytes(model) - sum(sizes) + slots

    def stage(self, model: nn.Module, device: torch.device) -> None:
        """Makes `model`, which lies on the host and does not fit, run on `device` in the plain way, in place, so that steps can
        watch it work and the result can be compared with it. Raises UnsupportedOperationError without blocks to stream."""
        chosen = self._choose(model)
        if not chosen.blocks:
            raise UnsupportedOperationError(f"the model does not fit, and memory=offload_weights cannot make it: {chosen.too_few}")
        fetch(model, chosen.blocks, chosen.names, device)

    def reference(self, original: nn.Module) -> nn.Module:
        """The original, with all of its weights on the device at once."""
        return copy.deepcopy(original).to(self._device)

    def _choose(self, model: nn.Module) -> _Chosen:
        selection = select_blocks(model, self.include, self.exclude)
        skipped = list(selection.skipped)
        blocks = {name: block for name, block in selection.matched.items() if _fits(name, block, skipped)}
        kept = _evenly(list(blocks), self.num_resident_blocks)
        skipped += [Skipped(name, f"one of memory.num_resident_blocks={self.num_resident_blocks}") for name in blocks if name in kept]
        weights = weights_of(model, {name: block for name, block in blocks.items() if name not in kept})
        skipped += weights.skipped
        names = {name: found for name, found in weights.names.items() if found}
        if len(names) <= self.prefetch_depth + 1:
            slots = f"{self.prefetch_depth + 1} slots of memory.prefetch_depth={self.prefetch_depth}"
            return _Chosen({}, {}, skipped, f"{len(names)} blocks to stream, and the {slots} would hold them all")
        return _Chosen({name: blocks[name] for name in names}, names, skipped)

    def _stream(self, chosen: _Chosen, memory: MemoryManager, lanes: Lanes) -> Ring:
        def pin(num_bytes: int) -> torch.Tensor:
            return memory.allocate_tensor((num_bytes,), torch.uint8, pinned=True)

        def on_device(num_bytes: int) -> torch.Tensor:
            return memory.allocate_tensor((num_bytes,), torch.uint8)

        ring = Ring(lanes, on_device, self.prefetch_depth)
        for name, block in chosen.blocks.items():
            stream(block, chosen.names[name], ring, pin)
        ring.prepare()
        return ring


@dataclass(frozen=True)
class _Chosen:
    """blocks to stream, and by block the names of the tensors. skipped: what stays, and why. too_few: why there are no blocks."""

    blocks: dict[str, nn.Module]
    names: dict[str, list[str]]
    skipped: list[Skipped]
    too_few: str = ""


def pinned_bytes(model: nn.Module) -> int:
    """Bytes of host memory that streamed blocks of `model` keep."""
    return sum(module.pinned_bytes for module in model.modules() if isinstance(module, StreamedBlock))


def _bytes_of(block: nn.Module, names: list[str]) -> int:
    tensors = {id(table[key]): table[key] for table, key in places_of(block, names)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _fits(name: str, block: nn.Module, skipped: list[Skipped]) -> bool:
    reason = None
    if "forward" in block.__dict__:
        reason = "its forward was replaced on the instance"
    elif block._compiled_call_impl is not None:
        reason = "its call is compiled already"
    elif isinstance(block, StreamedBlock):
        reason = "it is offloaded already"
    elif any(isinstance(module, torch.jit.ScriptModule) for module in block.modules()):
        reason = "TorchScript keeps its weights where they cannot be exchanged"
    if reason is not None:
        skipped.append(Skipped(name, reason))
    return reason is None


def _evenly(names: list[str], num: int) -> set[str]:
    """`num` of the names, with about as many others between any two."""
    if num >= len(names):
        return set(names)
    return {names[int((index + 0.5) * len(names) / num)] for index in range(num)}


def _snapshot(block: nn.Module) -> nn.Module:
    """New modules around the very tensors that the block has now."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*block.parameters(), *block.buffers()]}
    return copy.deepcopy(block, memo)
