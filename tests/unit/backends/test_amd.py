"""The AMD backend on a machine without an AMD GPU: it imports, says what is missing, and plans for devices that are not here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernel_pytorch.backends.amd import AmdBackend, driver_version
from kernel_pytorch.backends.detect import matches, plan_backend, resolve
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.errors import BackendError
from kernel_pytorch.schema import BackendConfig, OnMismatch

AMD_DEVICES = [name for name, device in DEVICES.items() if device.vendor == "amd"]


def backend() -> AmdBackend:
    return AmdBackend(hardware="any", on_mismatch=OnMismatch.error)


@pytest.mark.skipif(torch.version.hip is not None, reason="says what happens on another build of torch")
def test_another_build_of_torch_has_no_amd_gpu() -> None:
    assert not backend().available()
    with pytest.raises(BackendError, match="no AMD GPU that torch can use"):
        _ = backend().facts


def test_a_build_belongs_to_one_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    for hip in (None, "7.0.51831"):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert AmdBackend.is_own_build() is (hip is not None)
        assert NvidiaBackend.is_own_build() is (hip is None)


@pytest.mark.parametrize(
    ("reported", "arch"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a:sramecc+:xnack+", "gfx90a"), ("gfx1201", "gfx1201")]
)
def test_the_architecture_without_the_settings_of_its_memory(reported: str, arch: str) -> None:
    assert AmdBackend.arch_of(SimpleNamespace(gcnArchName=reported)) == arch


def test_the_compute_capability_of_nvidia() -> None:
    assert NvidiaBackend.arch_of(SimpleNamespace(major=10, minor=3)) == "sm_103"


def test_the_driver_is_the_kernel_modules_version(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "missing") is None
    (tmp_path / "version").write_text("6.12.12\n")
    assert driver_version(tmp_path / "version") == "6.12.12"


@pytest.mark.parametrize("name", AMD_DEVICES)
def test_a_planned_device_answers_with_the_facts_of_its_row(name: str) -> None:
    row, planned = DEVICES[name], plan_backend(name, BackendConfig(hardware=name))
    assert type(planned) is AmdBackend
    facts = planned.facts
    assert (facts.vendor, facts.arch, facts.present, facts.has_triton) == ("amd", row.arch, False, True)
    assert planned.available_memory_bytes() == row.memory_bytes
    assert matches(BackendConfig(hardware=name), planned) == (True, f"hardware {name}: {name} ({row.arch})")


def test_the_other_vendors_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="amd backend cannot plan for h100 of vendor nvidia"):
        backend().plan_for(DEVICES["h100"])
    with pytest.raises(ValueError, match="nvidia backend cannot plan for mi300x of vendor amd"):
        NvidiaBackend(hardware="any", on_mismatch=OnMismatch.error).plan_for(DEVICES["mi300x"])


def test_a_recipe_for_nvidia_does_not_match_an_amd_device() -> None:
    config = BackendConfig(hardware="h100")
    assert matches(config, plan_backend("mi300x", config)) == (False, "the recipe is for h100 (sm_90), this is mi300x (gfx942)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_asking_for_amd_by_name_on_this_machine_says_that_it_is_not_here() -> None:
    resolution = resolve(BackendConfig(_target_="kernel_pytorch.backends.amd.AmdBackend"))
    assert not resolution.native
    assert resolution.reason.startswith("backend amd is not on this machine")
