"""Devices that a recipe can be written for: published facts, torch-free. Unknown is None, never a guess.

Backends read their live facts from the machine; these rows plan for a machine that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

GiB = 1024**3


@dataclass(frozen=True)
class Device:
    """vendor: cpu, nvidia, amd, tpu, or an installed package's. arch: sm_NN, gfxNNN, a TPU's version or None.
    memory_bytes: of what torch calls one device.
    bandwidth_bytes_per_s: of its memory, from the datasheet. What an architecture can do is in `backends/capabilities.py`."""

    name: str
    vendor: str
    arch: str | None
    memory_bytes: int | None
    bandwidth_bytes_per_s: float | None
    source: str


_ROCM_TABLE = "ROCm documentation, GPU hardware specifications"

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("cpu", "cpu", None, None, None, "facts are read from the machine"),
        Device("v100", "nvidia", "sm_70", 32 * GiB, 0.9e12, "NVIDIA V100 datasheet"),
        Device("t4", "nvidia", "sm_75", 16 * GiB, 0.32e12, "NVIDIA T4 datasheet"),
        Device("a100", "nvidia", "sm_80", 80 * GiB, 2.039e12, "NVIDIA A100 80GB SXM datasheet"),
        Device("a10", "nvidia", "sm_86", 24 * GiB, 0.6e12, "NVIDIA A10 datasheet"),
        Device("rtx4090", "nvidia", "sm_89", 24 * GiB, 1.008e12, "NVIDIA Ada architecture whitepaper"),
        Device("l40s", "nvidia", "sm_89", 48 * GiB, 0.864e12, "NVIDIA L40S datasheet"),
        Device("h100", "nvidia", "sm_90", 80 * GiB, 3.35e12, "NVIDIA H100 SXM datasheet"),
        Device("h200", "nvidia", "sm_90", 141 * 10**9, 4.8e12, "NVIDIA H200 datasheet"),
        Device("b200", "nvidia", "sm_100", 180 * 10**9, 8.0e12, "NVIDIA DGX B200 datasheet"),
        Device("gb200", "nvidia", "sm_100", 186 * 10**9, 8.0e12, "NVIDIA GB200 NVL72: 13.4 TB and 576 TB/s over 72 GPUs"),
        Device("b300", "nvidia", "sm_103", 270 * 10**9, 7.7e12, "NVIDIA Blackwell Ultra datasheet, HGX B300"),
        Device("rtx5090", "nvidia", "sm_120", 32 * GiB, 1.792e12, "NVIDIA RTX Blackwell architecture whitepaper"),
        # A card is two dies, and torch lists each as a device with half of the card's memory and bandwidth.
        Device("mi250x", "amd", "gfx90a", 64 * GiB, 1.6384e12, f"{_ROCM_TABLE}; AMD Instinct MI250X data sheet, one of its two dies"),
        Device("mi300x", "amd", "gfx942", 192 * GiB, 5.3e12, f"{_ROCM_TABLE}; AMD Instinct MI300X data sheet"),
        Device("mi325x", "amd", "gfx942", 256 * GiB, 6.0e12, f"{_ROCM_TABLE}; AMD Instinct MI325X data sheet"),
        Device("mi355x", "amd", "gfx950", 288 * GiB, 8.0e12, f"{_ROCM_TABLE}; AMD Instinct MI355X data sheet"),
        Device("rx7900xtx", "amd", "gfx1100", 24 * GiB, 0.96e12, f"{_ROCM_TABLE}; AMD Radeon RX 7900 XTX product page"),
        Device("rx9070xt", "amd", "gfx1201", 16 * GiB, 0.64e12, f"{_ROCM_TABLE}; AMD Radeon RX 9070 XT product page"),
        # One chip is one device of torch_xla.
        Device("tpu_v5e", "tpu", "v5e", 16 * 10**9, 0.819e12, "Cloud TPU documentation, TPU v5e: HBM2 capacity and bandwidth of a chip"),
        Device("tpu_v5p", "tpu", "v5p", 95 * 10**9, 2.765e12, "Cloud TPU documentation, TPU v5p: HBM2e capacity and bandwidth of a chip"),
        Device("tpu_v6e", "tpu", "v6e", 32 * 10**9, 1.6e12, "Cloud TPU documentation, TPU v6e: HBM capacity and bandwidth of a chip"),
    )
}

# Vendors with a backend of ours; an installed package may not take their names.
VENDORS: tuple[str, ...] = ("nvidia", "amd", "tpu", "cpu")
# What `backend.hardware` accepts: a device, or `any` for whatever machine runs the recipe.
HARDWARE: tuple[str, ...] = ("any", *DEVICES)
