"""Outputs of a recorded call, seen without being held: who copies them out after every replay leaves their memory to other graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The allocator's blocks are multiples of it (kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp).
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class LetGo:
    """tensors: in place of those that were given. num_bytes: device memory that is free for the next recording once those are gone."""

    tensors: list[torch.Tensor]
    num_bytes: int = 0


def held(tensors: Sequence[torch.Tensor]) -> LetGo:
    return LetGo(list(tensors))


class _Bytes:
    """Device memory by its address alone, uint8."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        data = (storage.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": (storage.nbytes(),), "typestr": "|u1", "data": data, "strides": None, "version": 3}


def in_pool(pool: tuple[int, int], tensors: Sequence[torch.Tensor]) -> LetGo:
    """Tensors of a graph pool are seen by address: their memory stays mapped as long as the pool has a graph. Memory of anyone
    else's, and what is more than an address (a subclass, a conjugate that is not computed), is held."""
    segments = [(row["address"], row["total_size"]) for row in torch.cuda.memory_snapshot() if row["segment_pool_id"] == tuple(pool)]
    seen: dict[int, torch.UntypedStorage] = {}
    views: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        inside = storage.nbytes() > 0 and any(0 <= storage.data_ptr() - start < size for start, size in segments)
        if not inside or type(tensor) is not torch.Tensor or tensor.is_conj() or tensor.is_neg():
            views.append(tensor)
            continue
        # Tensors of every mode are read alike.
        with torch.inference_mode(False):
            if storage._cdata not in seen:
                seen[storage._cdata] = torch.as_tensor(_Bytes(storage), device=tensor.device).untyped_storage()
                num_bytes += -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            views.append(view.set_(seen[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()))
    return LetGo(views, num_bytes)
