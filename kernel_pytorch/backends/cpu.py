"""The CPU backend: what this processor, its memory and its compiler can do."""

from __future__ import annotations

import importlib.util
import platform

import torch

from kernel_pytorch.backends import capabilities, host
from kernel_pytorch.backends.base import Backend, Claims, Facts
from kernel_pytorch.backends.memory import MemoryManager
from kernel_pytorch.devices import Device

# By feature of `capabilities.CPU`, the format that its instructions multiply.
_MULTIPLIED = {"bf16_matmul": "bfloat16", "int8_matmul": "int8"}


class CpuMemory(MemoryManager):
    """Host memory within the control group's limit; the allocator gives freed blocks back to the system itself."""

    def free_bytes(self) -> int | None:
        return host.available_memory_bytes()

    def empty_cache(self) -> None:
        """There is no cache that torch knows of."""


class CpuBackend(Backend):
    """The machine's own processor. `facts.isa` holds what oneDNN may use here: ONEDNN_MAX_CPU_ISA and the system's AMX
    permission are taken off; `facts.details` says which flags the processor has without them."""

    vendor = "cpu"
    device_name = "processor"

    def planned_facts(self, device: Device) -> Facts:
        """The row named cpu has no facts of its own: it stands for the machine that asks."""
        return self.read_facts()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def available(self) -> bool:
        return True

    def synchronize(self) -> None:
        """A CPU call has finished when it returns."""

    def make_memory(self) -> MemoryManager:
        return CpuMemory(self)

    def claims(self) -> Claims:
        """What the processor has instructions for; torch multiplies more types, slowly."""
        isa = self.facts.isa
        narrow = [format for feature, format in _MULTIPLIED.items() if capabilities.cpu_has(isa, feature)]
        return Claims(("float64", "float32", *narrow), graphs=False, pinned=False)

    def conv_layout(self) -> torch.memory_format:
        return torch.channels_last

    def read_facts(self) -> Facts:
        flags, cap = host.isa_flags(), host.onednn_cap()
        compiler = host.cxx_compiler()
        return Facts(
            name=host.cpu_name(),
            vendor="cpu",
            arch=platform.machine() or None,
            isa=host.usable_isa(flags, cap),
            memory_bytes=host.total_memory_bytes(),
            num_threads=torch.get_num_threads(),
            num_numa_nodes=host.num_numa_nodes(),
            has_cxx_compiler=compiler is not None,
            has_triton=importlib.util.find_spec("triton") is not None,
            present=True,
            details={"processor_isa": list(flags), "onednn_max_cpu_isa": cap, "cxx_compiler": compiler},
        )
