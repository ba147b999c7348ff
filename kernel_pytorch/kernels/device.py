"""What a kernel's configuration depends on: facts of one GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """name: as `torch.cuda.get_device_name` says. shared: bytes of shared memory one program may take. dependent_launch:
    programmatic dependent launch exists. convert_fp8: instructions convert between float8 and wider formats. mma: NVIDIA's
    m16n8k16 matrix instruction exists for both 16-bit formats. warpgroups: Hopper's matrix instruction of four warps exists."""

    name: str
    processors: int
    shared: int
    dependent_launch: bool = False
    convert_fp8: bool = False
    mma: bool = False
    warpgroups: bool = False


@functools.cache
def device(index: int | None) -> Device:
    """The facts of that CUDA device; of none where index is None: Triton's interpreter runs the kernels on a CPU."""
    if index is None:
        return Device("cpu", 1, 65536)
    facts = torch.cuda.get_device_properties(index)
    cuda, arch = torch.version.hip is None, (facts.major, facts.minor)
    shared = getattr(facts, "shared_memory_per_block_optin", 65536)
    return Device(
        facts.name,
        facts.multi_processor_count,
        shared,
        dependent_launch=cuda and arch >= (9, 0),
        convert_fp8=cuda and arch >= (8, 9),
        mma=cuda and arch >= (8, 0),
        warpgroups=cuda and arch == (9, 0),
    )
