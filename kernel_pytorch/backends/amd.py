"""The AMD backend: what this GPU can do, through torch.cuda of a ROCm build. Importable where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kernel_pytorch.backends.torch_cuda import TorchCudaBackend
from kernel_pytorch.errors import AmdError, AmdOutOfMemoryError

_DRIVER = Path("/sys/module/amdgpu/version")


class AmdBackend(TorchCudaBackend):
    """The current HIP device of a torch built for ROCm."""

    vendor = "amd"
    device_name = "AMD GPU"

    @staticmethod
    def is_own_build() -> bool:
        return torch.version.hip is not None

    @staticmethod
    def arch_of(properties: Any) -> str:
        """gfx942 of `gfx942:sramecc+:xnack-`."""
        return properties.gcnArchName.partition(":")[0]

    @staticmethod
    def versions() -> dict[str, str | None]:
        return {"driver": driver_version(), "runtime": f"HIP {torch.version.hip}"}

    def failure(self, message: str) -> AmdError:
        return AmdError(message)

    def out_of_memory(self, message: str, *, required_bytes: int, available_bytes: int) -> AmdOutOfMemoryError:
        return AmdOutOfMemoryError(message, required_bytes=required_bytes, available_bytes=available_bytes)


def driver_version(path: Path = _DRIVER) -> str | None:
    """The version of the amdgpu kernel module (6.10.5), or None where the system's own module tells none."""
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
