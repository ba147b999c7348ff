"""HardwareValidator: an honest CPU passes, and every kind of lie is found and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kernel_pytorch.backends.base import Backend, Claims, Facts
from kernel_pytorch.backends.cpu import CpuBackend, CpuMemory
from kernel_pytorch.backends.detect import plan_backend
from kernel_pytorch.backends.doctor import present_backends
from kernel_pytorch.backends.memory import MemoryManager
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.schema import BackendConfig, OnMismatch
from kernel_pytorch.verify.hardware import TRIALS, HardwareCheck, HardwareValidator, Trial


class Boastful(CpuBackend):
    """Claims what no CPU can do."""

    def claims(self) -> Claims:
        return Claims(("float32", "nvfp4"), graphs=True, pinned=True)


class Nowhere(CpuBackend):
    """A device that takes work and gives no values back."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


class WrongType(CpuMemory):
    def allocate_tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, pinned: bool = False) -> torch.Tensor:
        return super().allocate_tensor(shape, torch.int64, pinned=pinned)


class Forgetful(CpuMemory):
    """Hands out tensors and keeps no account of them."""

    def allocate_tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, pinned: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


class Lossy(CpuMemory):
    """Memory that does not keep what is written: its tensors have values for every second place only."""

    def allocate_tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, pinned: bool = False) -> torch.Tensor:
        kept = super().allocate_tensor(shape, dtype, pinned=pinned)
        return kept.as_subclass(_Lossy)


class _Lossy(torch.Tensor):
    def copy_(self, source: torch.Tensor) -> torch.Tensor:
        super().copy_(source)
        self[::2] = 0
        return self


class Endless(CpuMemory):
    def free_bytes(self) -> int:
        return 2**60


def lying(memory: type[MemoryManager]) -> Backend:
    class Lying(CpuBackend):
        def make_memory(self) -> MemoryManager:
            return memory(self)

    return Lying(hardware="any", on_mismatch=OnMismatch.error)


def checks(backend: Backend) -> dict[str, HardwareCheck]:
    return {check.claim: check for check in HardwareValidator(backend).validate()}


def test_what_this_machine_claims_holds() -> None:
    for backend in present_backends():
        found = checks(backend)
        assert list(found)[:1] == ["allocation"]
        assert {claim.removeprefix("matmul ") for claim in found if claim.startswith("matmul")} == set(backend.claims().formats)
        assert [check.message for check in found.values() if check.passed is False] == []


def test_the_cpu_claims_what_its_instructions_multiply() -> None:
    class Old(CpuBackend):
        def read_facts(self) -> Facts:
            return replace(super().read_facts(), isa=("avx2",))

    class New(CpuBackend):
        def read_facts(self) -> Facts:
            return replace(super().read_facts(), isa=("amx_bf16", "amx_int8"))

    old, new = (kind(hardware="any", on_mismatch=OnMismatch.error).claims() for kind in (Old, New))
    assert old == Claims(("float64", "float32"), graphs=False, pinned=False)
    assert new.formats == ("float64", "float32", "bfloat16", "int8")


def test_a_planned_gpu_claims_what_its_architecture_multiplies() -> None:
    claims = {name: plan_backend(name, BackendConfig()).claims() for name in ("v100", "h100", "b200", "mi300x")}
    assert claims["v100"].formats == ("float32", "float16")
    assert claims["h100"].formats == ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn")
    assert claims["b200"].formats[-2:] == ("mxfp8_e4m3fn", "nvfp4")
    assert claims["mi300x"].formats == ("float32", "float16", "bfloat16", "int8", "float8_e4m3fnuz")
    assert all((found.graphs, found.pinned) == (True, True) for found in claims.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what fails without a GPU")
def test_each_claim_that_does_not_hold_is_named_and_the_others_stand() -> None:
    found = checks(Boastful(hardware="any", on_mismatch=OnMismatch.error))
    assert {claim: check.passed for claim, check in found.items()} == {
        "allocation": True,
        "matmul float32": True,
        "matmul nvfp4": None,
        "pinned memory": False,
        "graph capture": False,
    }
    assert found["pinned memory"].message.startswith("cpu pinned memory: UnsupportedOperationError: pinned host memory")
    assert found["graph capture"].message.startswith("cpu graph capture: ")
    assert found["matmul nvfp4"].message == "no trial of this format here"


def test_a_device_without_values_fails_every_matmul_that_it_claims() -> None:
    found = checks(Nowhere(hardware="any", on_mismatch=OnMismatch.error))
    assert {check.passed for check in found.values()} == {False}
    assert found["matmul float32"].message.startswith("cpu matmul float32: NotImplementedError: ")


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        (WrongType, "found 262144 values of torch.int64 on cpu"),
        (Forgetful, "MemoryReturnError: this (262144,) int32 tensor on cpu was not handed out by Forgetful"),
        (Lossy, "what was written is not what is read"),
        (Endless, f"{2**60:,} bytes are said to be free of "),
    ],
)
def test_a_memory_manager_that_lies_is_found(memory: type[MemoryManager], says: str) -> None:
    found = checks(lying(memory))["allocation"]
    assert found.passed is False
    assert found.message.startswith(f"cpu allocation: {says}")


@pytest.mark.parametrize("format", ["float64", "float32", "float16", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_trial_accepts_the_cpus_product_and_refuses_one_that_is_off(format: str) -> None:
    trial = TRIALS[format](torch.device("cpu"))
    passed, message = trial.judge()
    assert passed, message
    # One value in six thousand off by a tenth of the largest.
    wrong = trial.product.clone()
    wrong[3, 5] += wrong.abs().max() if wrong.dtype.is_floating_point else 1
    assert not Trial(wrong, trial.exact, trial.allowed).judge()[0]
    assert not Trial(trial.product * float("nan"), trial.exact, trial.allowed).judge()[0]


def test_a_device_that_is_not_here_cannot_be_tried() -> None:
    with pytest.raises(UnsupportedOperationError, match="h200 is planned for and not here"):
        HardwareValidator(plan_backend("h200", BackendConfig())).validate()
