"""The TPU backend: a TPU, or where PJRT_DEVICE=CPU says so XLA's CPU device, through torch_xla. Importable without torch_xla.

Operations on an XLA tensor are collected, and run when `flush` or a read of a value asks for them. torch_xla refuses tensors made
under `torch.inference_mode`: calls without gradient run under `torch.no_grad` here.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch

from kernel_pytorch.backends import host
from kernel_pytorch.backends.base import Backend, Claims, Facts
from kernel_pytorch.backends.memory import MemoryManager
from kernel_pytorch.devices import Device

# What a TPU machine says of itself in TPU_ACCELERATOR_TYPE, before the number of chips. Source: Cloud TPU documentation, versions.
_ARCHS = {"v5litepod": "v5e", "v5p": "v5p", "v6e": "v6e"}
# How the runtime says that a device keeps no statistics: XLA's CPU device does not.
_NO_STATISTICS = "UNIMPLEMENTED"


class TpuMemory(MemoryManager):
    """A chip's memory as the runtime counts it. XLA tensors have no bytes to share: pools keep tensors of one shape and type."""

    shares_bytes = False

    def free_bytes(self) -> int | None:
        figures = memory_figures(self._backend.device)
        return None if figures is None else figures["bytes_limit"] - figures["bytes_used"]

    def empty_cache(self) -> None:
        """The runtime keeps no freed memory that it could be asked for."""


class TpuBackend(Backend):
    """torch_xla's current device."""

    vendor = "tpu"
    device_name = "TPU"

    @property
    def device(self) -> torch.device:
        """`xla:0`; where torch_xla is missing its name alone, which no tensor can be put on."""
        if not self.available():
            return torch.device("xla", 0)
        import torch_xla

        return torch_xla.device()

    def available(self) -> bool:
        """Without a TPU torch_xla takes the CPU unasked: that counts only where PJRT_DEVICE asks for it."""
        return is_installed() and (os.environ.get("PJRT_DEVICE") == "CPU" or num_chips() > 0)

    def synchronize(self) -> None:
        """Runs what was collected, and waits for it."""
        import torch_xla
        import torch_xla.core.xla_model as xm

        torch_xla.sync()
        xm.wait_device_ops()

    def flush(self) -> None:
        """Starts what the calls so far collected: without it operations whose result nobody reads never run."""
        import torch_xla

        torch_xla.sync()

    def inference(self) -> AbstractContextManager[Any]:
        return torch.no_grad()

    def make_memory(self) -> MemoryManager:
        return TpuMemory(self)

    def claims(self) -> Claims:
        """Types whose products XLA compiles for every TPU; float32 in passes of bf16."""
        return Claims(("float32", "bfloat16"), graphs=False, pinned=False)

    def planned_facts(self, device: Device) -> Facts:
        """XLA brings its own compiler: neither Triton nor C++ is assumed."""
        details = {"source": device.source, "assumed": ["torch_xla"]}
        return replace(super().planned_facts(device), has_cxx_compiler=False, has_triton=False, details=details)

    def read_facts(self) -> Facts:
        from torch_xla import runtime

        kind = runtime.device_type()
        arch = architecture(os.environ.get("TPU_ACCELERATOR_TYPE")) if kind == "TPU" else None
        figures = memory_figures(self.device)
        limit = None if figures is None else figures["bytes_limit"]
        return Facts(
            name=f"TPU {arch or ''}".strip() if kind == "TPU" else f"XLA's {kind} device (PJRT_DEVICE={kind})",
            vendor=self.vendor,
            arch=arch,
            # XLA's CPU device takes what the process may have.
            memory_bytes=limit if kind == "TPU" else host.total_memory_bytes(),
            num_threads=torch.get_num_threads(),
            present=True,
            details={
                "driver": None,
                "runtime": f"torch_xla {metadata.version('torch_xla')}, PJRT device {kind}",
                "num_devices": runtime.addressable_device_count(),
            },
        )


def is_installed() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


def num_chips() -> int:
    """TPU chips on this machine's bus, without starting the runtime; 0 without torch_xla."""
    if not is_installed():
        return 0
    from torch_xla._internal import tpu

    return tpu.num_available_chips()


def architecture(accelerator: str | None) -> str | None:
    """v5e of `v5litepod-8`, as `devices` spells it; None for what is not known."""
    return _ARCHS.get((accelerator or "").partition("-")[0])


def memory_figures(device: torch.device) -> dict[str, int] | None:
    """bytes_used, bytes_limit and peak_bytes_used of an XLA device; None where its runtime keeps none, or there is no torch_xla."""
    if not is_installed():
        return None
    import torch_xla.core.xla_model as xm

    try:
        return dict(xm.get_memory_info(device))  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        if _NO_STATISTICS not in str(error):
            raise
        return None
