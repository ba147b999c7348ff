"""A backend: the facts of one vendor's machine, and the answers that follow from them.

A backend is not a step. Facts come from the live machine, or from a row of `kernel_pytorch.devices` when a recipe is
planned for a device that is not there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kernel_pytorch.devices import Device
from kernel_pytorch.schema import OnMismatch


@dataclass(frozen=True)
class Facts:
    """name: the device's own name. arch: sm_NN, gfxNNN, or x86_64 and the like; None when unknown. isa: instruction set
    flags that steps ask about (avx512_vnni, amx_int8, amx_bf16, avx512_bf16). memory_bytes: of the device.
    bandwidth_bytes_per_s: None until measured or published. has_cxx_compiler: Inductor can compile for the CPU.
    present: the facts were read from this machine, not from a table."""

    name: str
    vendor: str
    arch: str | None
    isa: tuple[str, ...] = ()
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None
    num_threads: int | None = None
    has_cxx_compiler: bool = False
    has_triton: bool = False
    present: bool = False
    details: dict[str, Any] = field(default_factory=dict)


class Backend(ABC):
    """One vendor. Constructors do no work; `bind` reads the machine, `plan_for` takes a device's row instead."""

    vendor: ClassVar[str]

    def __init__(self, *, hardware: str, on_mismatch: OnMismatch) -> None:
        self.hardware = hardware
        self.on_mismatch = on_mismatch

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Facts of the machine, read once; or of the device that `plan_for` was given."""

    @abstractmethod
    def plan_for(self, device: Device) -> None:
        """Answers from now on for `device`, which need not be here."""

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

    @abstractmethod
    def available_memory_bytes(self) -> int | None:
        """Bytes that a model may still take; None when unknown."""

    def compile_options(self, mode: str) -> dict[str, Any]:
        """Inductor options for a compile mode on this vendor; never turns CUDA graphs on."""
        return {"max_autotune": True} if mode == "max_autotune" else {}
