"""Blocks kept in pinned host memory, copied to the device on a stream of their own while the block before computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.memory.blocks import select_blocks, weights_of
from kernel_pytorch.memory.lanes import CudaLanes, Lanes
from kernel_pytorch.memory.ring import Ring
from kernel_pytorch.memory.streamed import StreamedBlock, stream
from kernel_pytorch.optimizer import Applied, Change, Context, Level, Optimizer, Skipped, Support


class OffloadWeights(Optimizer):
    """Streams the weights of repeated blocks through prefetch_depth + 1 slots of device memory.

    num_resident_blocks: blocks, evenly spaced, that stay on the device. include names blocks instead of the biggest list's; exclude
    keeps some on the device. A model that lies on the host is brought along: what is not streamed is copied to the device.
    The changed model is for inference; it is called with gradients disabled."""

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
        selection = select_blocks(model, self.include, self.exclude)
        skipped = list(selection.skipped)
        blocks = {name: block for name, block in selection.matched.items() if _fits(name, block, skipped)}
        kept = _evenly(list(blocks), self.num_resident_blocks)
        skipped += [Skipped(name, f"one of memory.num_resident_blocks={self.num_resident_blocks}") for name in kept]
        weights = weights_of(model, {name: block for name, block in blocks.items() if name not in kept})
        skipped += weights.skipped
        names = {name: found for name, found in weights.names.items() if found}
        if len(names) <= self.prefetch_depth + 1:
            why = f"{len(names)} blocks to stream, and the {self.prefetch_depth + 1} slots of memory.prefetch_depth={self.prefetch_depth}"
            return Applied(model, skipped=skipped, not_applicable=f"{why} would hold them all")
        self._device = context.backend.device
        originals = {name: _snapshot(blocks[name]) for name in names}
        ring = self._stream(model, {name: blocks[name] for name in names}, names, context, lanes)
        changes = [Change(name, originals[name], blocks[name], "streamed") for name in names]
        details = {
            "num_blocks": len(names),
            "num_slots": len(ring.slots),
            "slot_bytes": sum(slot.untyped_storage().nbytes() for slot in ring.slots),
        }
        return Applied(
            model,
            changes,
            skipped,
            # `copies` is live: it counts the calls to come.
            details={**details, "pinned_bytes": pinned_bytes(model), "copies": ring.counts},
        )

    def reference(self, original: nn.Module) -> nn.Module:
        """The original, with all of its weights on the device at once."""
        return copy.deepcopy(original).to(self._device)

    def _stream(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], names: Mapping[str, list[str]], context: Context, lanes: Lanes
    ) -> Ring:
        memory = context.backend.memory

        def pin(num_bytes: int) -> torch.Tensor:
            return memory.allocate_tensor((num_bytes,), torch.uint8, pinned=True)

        def on_device(num_bytes: int) -> torch.Tensor:
            return memory.allocate_tensor((num_bytes,), torch.uint8)

        brought = context.backend.device.type != "cpu" and _on_host(model)
        ring = Ring(lanes, on_device, self.prefetch_depth)
        for name, block in blocks.items():
            stream(block, names[name], ring, pin)
        if brought:
            bring_along(model, context.backend.device)
        ring.prepare()
        return ring


def pinned_bytes(model: nn.Module) -> int:
    """Bytes of host memory that streamed blocks of `model` keep."""
    return sum(module.pinned_bytes for module in model.modules() if isinstance(module, StreamedBlock))


def bring_along(model: nn.Module, device: torch.device) -> None:
    """Replaces what no block streams by copies on `device`; what was shared stays shared."""
    streamed = {key for module in model.modules() if isinstance(module, StreamedBlock) for key in module.streamed_ids}
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module.__dict__["_parameters"], module.__dict__["_buffers"]]
        for table in tables:
            for key, tensor in table.items():
                if tensor is None or id(tensor) in streamed:
                    continue
                if id(tensor) not in made:
                    moved = tensor.detach().to(device)
                    made[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
                table[key] = made[id(tensor)]


def _on_host(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])


def _fits(name: str, block: nn.Module, skipped: list[Skipped]) -> bool:
    reason = None
    if "forward" in block.__dict__:
        reason = "its forward was replaced on the instance"
    elif block._compiled_call_impl is not None:
        reason = "its call is compiled already"
    elif isinstance(block, StreamedBlock):
        reason = "it is offloaded already"
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
