"""The NVIDIA backend: what this GPU can do, through torch.cuda. Importable where there is no GPU."""

from __future__ import annotations

import ctypes
import importlib.util

import torch

from kernel_pytorch.backends import capabilities, host
from kernel_pytorch.backends.base import Backend, Facts
from kernel_pytorch.devices import Device
from kernel_pytorch.errors import BackendError


class NvidiaBackend(Backend):
    """The current CUDA device of a torch built for NVIDIA."""

    vendor = "nvidia"
    _facts: Facts | None = None

    @property
    def facts(self) -> Facts:
        """Raises BackendError when there is no NVIDIA GPU and `plan_for` was not called."""
        if self._facts is None:
            if not self.available():
                raise BackendError("this machine has no NVIDIA GPU that torch can use; backend=auto takes what it has")
            self._facts = _read_facts()
        return self._facts

    def plan_for(self, device: Device) -> None:
        if device.vendor != self.vendor:
            raise ValueError(f"the nvidia backend cannot plan for {device.name} of vendor {device.vendor}")
        self._facts = Facts(
            name=device.name,
            vendor=self.vendor,
            arch=device.arch,
            memory_bytes=device.memory_bytes,
            bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
            has_cxx_compiler=True,
            has_triton=capabilities.nvidia_has(device.arch, "triton") is True,
            fp8_matmul=device.fp8_matmul,
            present=False,
            details={"source": device.source, "assumed": ["a C++ compiler", "triton"]},
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device() if self.available() else 0)

    def available(self) -> bool:
        return torch.version.hip is None and torch.cuda.is_available()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def available_memory_bytes(self) -> int | None:
        """Free bytes of the device and of torch's own cache; of a planned device, all of its memory."""
        if not self.facts.present:
            return self.facts.memory_bytes
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


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


def _read_facts() -> Facts:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = f"sm_{properties.major}{properties.minor}"
    compiler = host.cxx_compiler()
    return Facts(
        name=properties.name,
        vendor="nvidia",
        arch=arch,
        memory_bytes=properties.total_memory,
        num_threads=torch.get_num_threads(),
        has_cxx_compiler=compiler is not None,
        has_triton=importlib.util.find_spec("triton") is not None and capabilities.nvidia_has(arch, "triton") is True,
        fp8_matmul=capabilities.nvidia_has(arch, "fp8_matmul"),
        present=True,
        details={
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "num_devices": torch.cuda.device_count(),
            "num_multiprocessors": properties.multi_processor_count,
            "cxx_compiler": compiler,
        },
    )
