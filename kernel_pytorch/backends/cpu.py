"""The CPU backend: what this processor, its memory and its compiler can do."""

from __future__ import annotations

import importlib.util
import platform

import torch

from kernel_pytorch.backends import host
from kernel_pytorch.backends.base import Backend, Facts
from kernel_pytorch.devices import Device


class CpuBackend(Backend):
    """The machine's own processor. `facts.isa` holds what oneDNN may use here: ONEDNN_MAX_CPU_ISA and the system's AMX
    permission are taken off; `facts.details` says which flags the processor has without them."""

    vendor = "cpu"
    _facts: Facts | None = None

    @property
    def facts(self) -> Facts:
        if self._facts is None:
            self._facts = _read_facts()
        return self._facts

    def plan_for(self, device: Device) -> None:
        if device.vendor != self.vendor:
            raise ValueError(f"the cpu backend cannot plan for {device.name} of vendor {device.vendor}")
        # The row named cpu has no facts of its own: it stands for the machine that asks.
        self._facts = _read_facts()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def available(self) -> bool:
        return True

    def synchronize(self) -> None:
        """A CPU call has finished when it returns."""

    def available_memory_bytes(self) -> int | None:
        return host.available_memory_bytes()


def _read_facts() -> Facts:
    flags, cap = host.isa_flags(), host.onednn_cap()
    compiler = host.cxx_compiler()
    return Facts(
        name=host.cpu_name(),
        vendor="cpu",
        arch=platform.machine() or None,
        isa=host.usable_isa(flags, cap),
        memory_bytes=host.total_memory_bytes(),
        num_threads=torch.get_num_threads(),
        has_cxx_compiler=compiler is not None,
        has_triton=importlib.util.find_spec("triton") is not None,
        present=True,
        details={"processor_isa": list(flags), "onednn_max_cpu_isa": cap, "cxx_compiler": compiler},
    )
