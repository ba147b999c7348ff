"""Which backend a recipe gets, what a planned device claims, and which features follow from an architecture."""

from __future__ import annotations

import pytest
import torch

from kernel_pytorch.backends import capabilities
from kernel_pytorch.backends.bandwidth import matmul_rates, read_bandwidth
from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.detect import BACKENDS, matches, plan_backend, resolve
from kernel_pytorch.backends.doctor import diagnose
from kernel_pytorch.backends.nvidia import NvidiaBackend
from kernel_pytorch.devices import DEVICES
from kernel_pytorch.errors import BackendError, ConfigError
from kernel_pytorch.formats import FORMATS
from kernel_pytorch.optimizer import Level, Support
from kernel_pytorch.schema import BackendConfig, OnMismatch
from kernel_pytorch.targets import TARGETS

CPU, NVIDIA, AMD = BACKENDS["cpu"], BACKENDS["nvidia"], BACKENDS["amd"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def test_every_vendor_has_an_allowed_target() -> None:
    assert sorted(BACKENDS.values()) == sorted(name for name, target in TARGETS.items() if target.group == "backend")


@no_gpu
@pytest.mark.parametrize(
    ("target", "hardware", "native"),
    [
        (None, "any", True),
        (None, "cpu", True),
        (None, "a100", False),
        (CPU, "any", True),
        (CPU, "h100", False),
        (NVIDIA, "any", False),
        (NVIDIA, "h100", False),
        (NVIDIA, "cpu", False),
        (None, "mi300x", False),
        (AMD, "any", False),
        (AMD, "mi300x", False),
    ],
)
def test_a_machine_without_a_gpu_runs_everything_on_its_cpu(target: str | None, hardware: str, native: bool) -> None:
    resolution = resolve(BackendConfig(_target_=target, hardware=hardware))
    assert type(resolution.backend) is CpuBackend
    assert resolution.native is native


@no_gpu
def test_the_reason_names_both_devices() -> None:
    resolution = resolve(BackendConfig(hardware="a100"))
    name = resolution.backend.facts.name
    assert resolution.reason == f"the recipe is for a100 (sm_80), this is {name} ({resolution.backend.facts.arch})"


@no_gpu
def test_the_nvidia_backend_says_that_there_is_no_gpu() -> None:
    backend = NvidiaBackend(hardware="any", on_mismatch=OnMismatch.error)
    assert not backend.available()
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        _ = backend.facts


def test_an_h100_recipe_matches_an_h200() -> None:
    backend = plan_backend("h200", BackendConfig(hardware="h100"))
    assert matches(BackendConfig(hardware="h100"), backend) == (True, "hardware h100: h200 (sm_90)")


@pytest.mark.parametrize(
    ("device", "arch", "memory"),
    [("a100", "sm_80", 80 * 2**30), ("h200", "sm_90", 141 * 10**9), ("mi300x", "gfx942", 192 * 2**30), ("mi250x", "gfx90a", 64 * 2**30)],
)
def test_a_planned_device_has_the_facts_of_its_row(device: str, arch: str, memory: int) -> None:
    backend = plan_backend(device, BackendConfig())
    facts = backend.facts
    assert (facts.present, facts.arch, facts.memory_bytes) == (False, arch, memory)
    assert backend.available_memory_bytes() == memory
    assert facts.bandwidth_bytes_per_s == DEVICES[device].bandwidth_bytes_per_s


def test_planning_for_cpu_reads_this_machine() -> None:
    assert plan_backend("cpu", BackendConfig()).facts.present


def test_an_unknown_device_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"--device: found 'a10O' \(did you mean 'a10'\?\)"):
        plan_backend("a10O", BackendConfig())


def test_a_target_outside_the_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend\._target_: found 'os\.system'"):
        resolve(BackendConfig(_target_="os.system"))


def test_a_backend_refuses_another_vendors_row() -> None:
    with pytest.raises(ValueError, match="cannot plan for a100"):
        CpuBackend(hardware="any", on_mismatch=OnMismatch.error).plan_for(DEVICES["a100"])


@pytest.mark.parametrize(
    ("arch", "feature", "answer"),
    [
        ("sm_75", "bf16_matmul", False),
        ("sm_80", "bf16_matmul", True),
        ("sm_100a", "flash_sdpa", True),
        ("gfx942", "bf16_matmul", True),
        ("gfx942", "cudnn_sdpa", False),
        ("gfx1200", "flash_sdpa", False),
        ("gfx906", "bf16_matmul", None),
        (None, "triton", None),
    ],
)
def test_capabilities(arch: str | None, feature: str, answer: bool | None) -> None:
    assert capabilities.has(arch, feature) is answer


def test_an_unknown_feature_is_a_mistake_on_both_vendors() -> None:
    for arch in ("sm_90", "gfx942"):
        with pytest.raises(KeyError):
            capabilities.has(arch, "fp7_matmul")


@pytest.mark.parametrize(
    ("arch", "formats"),
    [
        ("sm_75", ()),
        ("sm_80", ("int8",)),
        ("sm_89", ("int8", "float8_e4m3fn")),
        ("sm_90", ("int8", "float8_e4m3fn")),
        ("sm_100", ("int8", "float8_e4m3fn", "mxfp8_e4m3fn", "nvfp4")),
        ("sm_103", ("int8", "float8_e4m3fn", "mxfp8_e4m3fn", "nvfp4")),
        ("sm_120", ("int8", "float8_e4m3fn", "mxfp8_e4m3fn", "nvfp4")),
        ("gfx90a", ("int8",)),
        ("gfx942", ("int8", "float8_e4m3fnuz")),
        ("gfx950", ("int8", "float8_e4m3fn", "mxfp8_e4m3fn", "mxfp4")),
        ("gfx1100", ("int8",)),
        ("gfx1201", ("int8", "float8_e4m3fn")),
        ("gfx906", None),
        (None, None),
    ],
)
def test_formats_that_a_matrix_unit_multiplies(arch: str | None, formats: tuple[str, ...] | None) -> None:
    assert capabilities.matmul_formats(arch) == formats


@pytest.mark.parametrize(
    ("format", "where"),
    [
        ("float8_e4m3fn", "sm_89 or newer, or gfx950, gfx1200, gfx1201"),
        ("float8_e4m3fnuz", "gfx942"),
        ("nvfp4", "sm_100 or newer"),
        ("float8_e5m2", ""),
    ],
)
def test_a_message_says_where_a_format_is_multiplied(format: str, where: str) -> None:
    assert capabilities.matmul_needs(format) == where


def test_a_message_says_where_a_feature_is() -> None:
    assert capabilities.needs("flash_sdpa") == capabilities.needs("flash_sdpa", "sm_75") == "sm_80 or newer"
    assert capabilities.needs("flash_sdpa", "gfx1200") == "gfx90a, gfx942, gfx950, gfx1100, gfx1201"
    assert capabilities.needs("cudnn_sdpa", "gfx942") == "sm_80 or newer"


def test_every_planned_gpu_has_answers() -> None:
    gpus = [device for device in DEVICES.values() if device.vendor not in ("cpu", "tpu")]
    assert {device.vendor for device in gpus} == {"nvidia", "amd"}
    for device in gpus:
        assert capabilities.matmul_formats(device.arch) is not None, device.name
        assert capabilities.has(device.arch, "triton") is True, device.name
        assert None not in (device.memory_bytes, device.bandwidth_bytes_per_s), device.name


def test_every_multiplied_format_is_a_known_one() -> None:
    assert set(capabilities.MATMUL_FORMATS) <= set(FORMATS)


def test_doctor_shows_the_machine_and_the_answers_it_is_given() -> None:
    rows = {row.what: row for row in diagnose(options=[("precision=fp8_dynamic", Support(Level.unsupported, "no FP8 matmul"))])}
    assert rows["torch"].value == torch.__version__
    assert rows["cpu threads"].value == str(torch.get_num_threads())
    assert (rows["precision=fp8_dynamic"].value, rows["precision=fp8_dynamic"].note) == ("unsupported", "no FP8 matmul")
    assert not any("matmul float32" in what for what in rows)


def test_a_small_cache_and_little_memory_size_the_buffer() -> None:
    measured = read_bandwidth(torch.device("cpu"), cache_bytes=2**24, available_bytes=2**26)
    assert measured.buffer_bytes == 2**24
    assert "holds part of it" in measured.note
    assert measured.bytes_per_s > 0


def test_a_rate_for_every_type_or_the_reason_why_not() -> None:
    rates = {rate.dtype: rate for rate in matmul_rates(torch.device("cpu"), side=64)}
    assert list(rates) == ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]
    assert all(rate.ops_per_s or rate.note for rate in rates.values())
