"""The NVIDIA backend: what this GPU can do, through torch.cuda. Importable where there is no GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from kernel_pytorch.backends.torch_cuda import TorchCudaBackend
from kernel_pytorch.errors import NvidiaError, NvidiaOutOfMemoryError


class NvidiaBackend(TorchCudaBackend):
    """The current CUDA device of a torch built for NVIDIA."""

    vendor = "nvidia"
    device_name = "NVIDIA GPU"

    @staticmethod
    def is_own_build() -> bool:
        return torch.version.hip is None

    @staticmethod
    def arch_of(properties: Any) -> str:
        return f"sm_{properties.major}{properties.minor}"

    @staticmethod
    def versions() -> dict[str, str | None]:
        return {"driver": driver_version(), "runtime": f"CUDA {torch.version.cuda}"}

    def failure(self, message: str) -> NvidiaError:
        return NvidiaError(message)

    def out_of_memory(self, message: str, *, required_bytes: int, available_bytes: int) -> NvidiaOutOfMemoryError:
        return NvidiaOutOfMemoryError(message, required_bytes=required_bytes, available_bytes=available_bytes)


def driver_version() -> str | None:
    """The driver's version as NVML gives it (580.65.06), or None without NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return None
    found = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0
    nvml.nvmlShutdown()
    return text.value.decode() if found else None
