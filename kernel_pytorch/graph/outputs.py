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
    """Tensors of a graph pool are seen by address: their memory stays mapped as long as the pool has a graph. Held are memory of anyone
    else's, what is more than an address (a subclass, a conjugate that is not computed), and all under an allocator that does not
    say which memory is whose."""
    if torch.cuda.get_allocator_backend() != "native":
        return held(tensors)
    segments = [(row["address"], row["total_size"]) for row in torch.cuda.memory_snapshot() if row["segment_pool_id"] == tuple(pool)]
    memory = [_memory(tensor) for tensor in tensors]
    rows = [
        (tensor, storage, _is_inside(storage, segments) and not (tensor.is_conj() or tensor.is_neg()))
        for tensor, storage in zip(tensors, memory, strict=True)
    ]
    held_too = {storage._cdata for _, storage, goes in rows if storage is not None and not goes}
    by_address: dict[int, torch.UntypedStorage] = {}
    views: list[torch.Tensor] = []
    num_bytes = 0
    for tensor, storage, goes in rows:
        if storage is None or not goes:
            views.append(tensor)
            continue
        key = storage._cdata
        # Tensors of every mode are read alike.
        with torch.inference_mode(False):
            if key not in by_address:
                by_address[key] = torch.as_tensor(_Bytes(storage), device=tensor.device).untyped_storage()
                num_bytes += 0 if key in held_too else -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            views.append(view.set_(by_address[key], tensor.storage_offset(), tensor.shape, tensor.stride()))
    return LetGo(views, num_bytes)


def _memory(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Of a tensor that is no more than an address; a subclass may have none to ask for."""
    return tensor.untyped_storage() if type(tensor) is torch.Tensor and tensor.layout is torch.strided else None


def _is_inside(storage: torch.UntypedStorage | None, segments: list[tuple[int, int]]) -> bool:
    return storage is not None and storage.nbytes() > 0 and any(0 <= storage.data_ptr() - start < size for start, size in segments)
