"""What every GPU that torch reaches through `torch.cuda` has in common: NVIDIA's, and on a ROCm build AMD's."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from typing import Any, ClassVar

import torch

from kernel_pytorch.backends import capabilities, host
from kernel_pytorch.backends.base import Backend, Facts
from kernel_pytorch.devices import Device
from kernel_pytorch.errors import BackendError


class TorchCudaBackend(Backend):
    """The current device of torch.cuda, or the row that `plan_for` was given. A vendor says whether this build of torch is
    its own and reads what only it has. Importable where there is no GPU."""

    vendor_name: ClassVar[str]
    _facts: Facts | None = None

    @property
    def facts(self) -> Facts:
        """Raises BackendError when there is no such GPU and `plan_for` was not called."""
        if self._facts is None:
            if not self.available():
                raise BackendError(f"this machine has no {self.vendor_name} GPU that torch can use; backend=auto takes what it has")
            self._facts = self._read_facts()
        return self._facts

    def plan_for(self, device: Device) -> None:
        if device.vendor != self.vendor:
            raise ValueError(f"the {self.vendor} backend cannot plan for {device.name} of vendor {device.vendor}")
        self._facts = Facts(
            name=device.name,
            vendor=self.vendor,
            arch=device.arch,
            memory_bytes=device.memory_bytes,
            bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
            has_cxx_compiler=True,
            has_triton=capabilities.has(device.arch, "triton") is True,
            present=False,
            details={"source": device.source, "assumed": ["a C++ compiler", "triton"]},
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device() if self.available() else 0)

    def available(self) -> bool:
        return self.is_own_build() and torch.cuda.is_available()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def available_memory_bytes(self) -> int | None:
        """Free bytes of the device and of torch's own cache; of a planned device, all of its memory."""
        if not self.facts.present:
            return self.facts.memory_bytes
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    @staticmethod
    @abstractmethod
    def is_own_build() -> bool:
        """Whether this torch was built for the vendor."""

    @staticmethod
    @abstractmethod
    def arch_of(properties: Any) -> str:
        """sm_NN or gfxNNN, from what `torch.cuda.get_device_properties` returns."""

    @staticmethod
    @abstractmethod
    def versions() -> dict[str, str | None]:
        """`driver`, and `runtime`: what torch is built for."""

    def _read_facts(self) -> Facts:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        arch, compiler = self.arch_of(properties), host.cxx_compiler()
        return Facts(
            name=properties.name,
            vendor=self.vendor,
            arch=arch,
            memory_bytes=properties.total_memory,
            num_threads=torch.get_num_threads(),
            has_cxx_compiler=compiler is not None,
            has_triton=importlib.util.find_spec("triton") is not None and capabilities.has(arch, "triton") is True,
            present=True,
            details={
                **self.versions(),
                "num_devices": torch.cuda.device_count(),
                "num_multiprocessors": properties.multi_processor_count,
                "cxx_compiler": compiler,
            },
        )
