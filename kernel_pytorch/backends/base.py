"""A backend: the facts of one vendor's machine, and the answers that follow from them.

A backend is not a step. Facts come from the live machine, or from a row of `kernel_pytorch.devices` when a recipe is
planned for a device that is not there. A vendor says what only it knows; what is the same for all stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kernel_pytorch.backends import capabilities
from kernel_pytorch.backends.memory import MemoryManager
from kernel_pytorch.backends.optimizer import BackendOptimizer
from kernel_pytorch.devices import Device
from kernel_pytorch.errors import BackendError, DeviceNotFoundError, OutOfMemoryError
from kernel_pytorch.registry import find_device
from kernel_pytorch.schema import OnMismatch


@dataclass(frozen=True)
class Facts:
    """name: the device's own name. arch: sm_NN, gfxNNN, or x86_64 and the like; None when unknown. isa: instruction set
    flags that steps ask about (avx512_vnni, amx_int8, amx_bf16, avx512_bf16). memory_bytes: of the device.
    bandwidth_bytes_per_s: None until measured or published. num_numa_nodes: None where the system does not tell.
    has_cxx_compiler: Inductor can compile for the CPU. present: the facts were read from this machine, not from a table."""

    name: str
    vendor: str
    arch: str | None
    isa: tuple[str, ...] = ()
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    num_threads: int | None = None
    num_numa_nodes: int | None = None
    has_cxx_compiler: bool = False
    has_triton: bool = False
    present: bool = False
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claims:
    """What a backend says that its device can do, for HardwareValidator to try. formats: names of `kernel_pytorch.formats`, or
    of torch dtypes, of which two matrices are multiplied. graphs: a CUDA graph can be captured. pinned: host memory can
    be page-locked."""

    formats: tuple[str, ...]
    graphs: bool
    pinned: bool


class Backend(ABC):
    """One vendor. Constructors do no work; the first look at `facts` reads the machine, `plan_for` takes a row instead.

    memory: its MemoryManager. optimizer: the template that the engine applies a recipe with."""

    vendor: ClassVar[str]
    # What one of its devices is called in a sentence.
    device_name: ClassVar[str]

    def __init__(self, *, hardware: str, on_mismatch: OnMismatch) -> None:
        self.hardware = hardware
        self.on_mismatch = on_mismatch
        self._facts: Facts | None = None
        self.memory = self.make_memory()
        self.optimizer = self.make_optimizer()

    @property
    def facts(self) -> Facts:
        """Facts of the machine, read once; or of the device that `plan_for` was given.

        Raises DeviceNotFoundError when there is no such device and `plan_for` was not called."""
        if self._facts is None:
            if not self.available():
                raise DeviceNotFoundError(f"this machine has no {self.device_name} that torch can use; backend=auto takes what it has")
            self._facts = self.read_facts()
        return self._facts

    def plan_for(self, device: Device) -> None:
        """Answers from now on for `device`, which need not be here. Raises ValueError for another vendor's."""
        if device.vendor != self.vendor:
            raise ValueError(f"the {self.vendor} backend cannot plan for {device.name} of vendor {device.vendor}")
        self._facts = self.planned_facts(device)

    @abstractmethod
    def read_facts(self) -> Facts:
        """Facts of this machine, which has such a device."""

    def planned_facts(self, device: Device) -> Facts:
        """Facts of a row of the table; what no table tells is assumed, and named in `details`."""
        return Facts(
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
    def wanted_vendor(self) -> str | None:
        """Vendor of the device that the recipe is for; None when it is for any."""
        wanted = find_device(self.hardware)
        return None if wanted is None else wanted.vendor

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model and its inputs go."""

    @abstractmethod
    def available(self) -> bool:
        """Whether this machine has a device of this vendor."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for the device."""

    def flush(self) -> None:
        """Starts what a call has queued, on devices that wait to be told: a timed call that nobody reads would not run."""
        return None

    def inference(self) -> AbstractContextManager[Any]:
        """What calls that need no gradient run in."""
        return torch.inference_mode()

    @abstractmethod
    def make_memory(self) -> MemoryManager:
        """The vendor's memory manager; called once, before anything of the machine is read."""

    def make_optimizer(self) -> BackendOptimizer:
        """The template that the engine calls, with the vendor's hooks; called once."""
        return BackendOptimizer(self)

    def available_memory_bytes(self) -> int | None:
        """Bytes that a model may still take, of a planned device all of its memory; None when unknown."""
        return self.memory.free_bytes() if self.facts.present else self.facts.memory_bytes

    def claims(self) -> Claims:
        """What HardwareValidator tries. The default follows from the architecture's rows in `capabilities`."""
        formats = ["float32", *capabilities.matmul_dtypes(self.facts.arch), *(capabilities.matmul_formats(self.facts.arch) or ())]
        return Claims(tuple(formats), graphs=self.device.type == "cuda", pinned=self.memory.can_pin)

    def conv_layout(self) -> torch.memory_format:
        """The order of a convolution's weights that its kernels read without a copy."""
        return torch.contiguous_format

    def compile_options(self, mode: str) -> dict[str, Any]:
        """Inductor options for a compile mode on this vendor; never turns CUDA graphs on."""
        return {"max_autotune": True} if mode == "max_autotune" else {}

    def failure(self, message: str) -> BackendError:
        """The vendor's exception for a device that failed while doing something it supports."""
        return BackendError(message)

    def out_of_memory(self, message: str, *, required_bytes: int, available_bytes: int) -> OutOfMemoryError:
        """The vendor's exception for what does not fit."""
        return OutOfMemoryError(message, required_bytes=required_bytes, available_bytes=available_bytes)
