"""What every GPU that torch reaches through `torch.cuda` has in common: NVIDIA's, and on a ROCm build AMD's."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import torch

from kernel_pytorch.backends import capabilities, host
from kernel_pytorch.backends.base import Backend, Facts
from kernel_pytorch.backends.memory import MemoryManager


class TorchCudaMemory(MemoryManager):
    """Pools over torch's caching allocator: a block is reused on the stream that it was returned on."""

    can_pin = True

    def free_bytes(self) -> int | None:
        """Free bytes of the device and of torch's own cache."""
        free, _ = torch.cuda.mem_get_info(self._backend.device)
        return free + self.cached_bytes()

    def cached_bytes(self) -> int:
        device = self._backend.device
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def stream(self) -> Hashable:
        return torch.cuda.current_stream(self._backend.device).cuda_stream

    def fence(self) -> Callable[[], Any]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._backend.device))
        return event.synchronize

    def host_free_bytes(self) -> int | None:
        return host.available_memory_bytes()


class TorchCudaBackend(Backend):
    """The current device of torch.cuda, or the row that `plan_for` was given. A vendor says whether this build of torch is
    its own and reads what only it has. Importable where there is no GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device() if self.available() else 0)

    def available(self) -> bool:
        return self.is_own_build() and torch.cuda.is_available()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def make_memory(self) -> MemoryManager:
        return TorchCudaMemory(self)

    def conv_layout(self) -> torch.memory_format:
        return torch.channels_last

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

    def read_facts(self) -> Facts:
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
