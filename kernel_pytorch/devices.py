"""Devices that a recipe can be written for: published facts, torch-free. Unknown is None, never a guess.

Backends read their live facts from the machine; these rows plan for a machine that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

GiB = 1024**3


@dataclass(frozen=True)
class Device:
    """vendor: cpu, nvidia, amd or tpu. arch: sm_NN, gfxNNN or None. memory_bytes: of one device.
    bandwidth_bytes_per_s: of its memory, from the datasheet. fp8_matmul: the matrix unit multiplies 8-bit floats."""

    name: str
    vendor: str
    arch: str | None
    memory_bytes: int | None
    bandwidth_bytes_per_s: float | None
    fp8_matmul: bool | None
    source: str


DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("cpu", "cpu", None, None, None, False, "facts are read from the machine"),
        Device("v100", "nvidia", "sm_70", 32 * GiB, 0.9e12, False, "NVIDIA V100 datasheet"),
        Device("t4", "nvidia", "sm_75", 16 * GiB, 0.32e12, False, "NVIDIA T4 datasheet"),
        Device("a100", "nvidia", "sm_80", 80 * GiB, 2.039e12, False, "NVIDIA A100 80GB SXM datasheet"),
        Device("a10", "nvidia", "sm_86", 24 * GiB, 0.6e12, False, "NVIDIA A10 datasheet"),
        Device("rtx4090", "nvidia", "sm_89", 24 * GiB, 1.008e12, True, "NVIDIA Ada architecture whitepaper"),
        Device("l40s", "nvidia", "sm_89", 48 * GiB, 0.864e12, True, "NVIDIA L40S datasheet"),
        Device("h100", "nvidia", "sm_90", 80 * GiB, 3.35e12, True, "NVIDIA H100 SXM datasheet"),
        Device("h200", "nvidia", "sm_90", 141 * 10**9, 4.8e12, True, "NVIDIA H200 datasheet"),
        Device("b200", "nvidia", "sm_100", 180 * 10**9, 8.0e12, True, "NVIDIA DGX B200 datasheet"),
    )
}

# What `backend.hardware` accepts: a device, or `any` for whatever machine runs the recipe.
HARDWARE: tuple[str, ...] = ("any", *DEVICES)
