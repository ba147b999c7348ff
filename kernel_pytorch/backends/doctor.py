"""What this machine can do, as rows of a table. Figures are read or measured here; what is unknown says so."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import torch

from kernel_pytorch.backends import capabilities, host
from kernel_pytorch.backends.bandwidth import matmul_rates, read_bandwidth
from kernel_pytorch.backends.base import Backend, Facts
from kernel_pytorch.backends.detect import BACKENDS, make
from kernel_pytorch.registry import BACKENDS_GROUP, DEVICES_GROUP, installed
from kernel_pytorch.schema import BackendConfig, OnMismatch

if TYPE_CHECKING:
    from kernel_pytorch.optimizer import Support

_PACKAGES = ("triton", "torchao", "transformers", "hydra-core", "omegaconf")
_MISSING = {"transformers": "extra `demo`", "triton": "no Triton kernels", "torchao": "no torchao comparison"}


@dataclass(frozen=True)
class Row:
    """One line of the table. value: what was found, with its unit. note: what follows from it, or where it is from."""

    what: str
    value: str
    note: str = ""


def present_backends() -> list[Backend]:
    """Ours of whose vendors this machine has a device, the CPU first."""
    candidates = [make(vendor, BackendConfig(on_mismatch=OnMismatch.error)) for vendor in reversed(BACKENDS)]
    return [backend for backend in candidates if backend.available()]


def diagnose(
    backends: Iterable[Backend] | None = None,
    measure: bool = False,
    options: Iterable[tuple[str, Support]] = (),
    tried: Iterable[Row] = (),
) -> list[Row]:
    """Everything about this machine that a recipe may depend on.

    backends: those of this machine when left out. measure: also times memory and matmuls, which takes seconds.
    options: (`precision=int8_dynamic`, the step's own answer for this machine) pairs; this layer does not know the steps.
    tried: what became of each backend's claims."""
    backends = present_backends() if backends is None else list(backends)
    rows = [Row("python", platform.python_version(), platform.platform()), Row("torch", torch.__version__)]
    rows += [_package(name) for name in _PACKAGES]
    for backend in backends:
        rows += _device(backend)
    if len(backends) == 1:
        rows.append(Row("gpu", "none", "torch.cuda finds no device"))
    for kind, group in (("backend", BACKENDS_GROUP), ("device", DEVICES_GROUP)):
        rows += [Row(f"installed {kind}", one.name, f"{one.target} of {one.package}") for one in installed(group).values()]
    rows += tried
    rows += [Row(name, support.level.value, support.reason) for name, support in options]
    if measure:
        for backend in backends:
            rows += _measured(backend)
    return rows


def _package(name: str) -> Row:
    try:
        return Row(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Row(name, "not installed", _MISSING.get(name, ""))


def _device(backend: Backend) -> list[Row]:
    facts = backend.facts
    rows = [Row(backend.vendor, facts.name, facts.arch or "architecture unknown"), _memory(backend)]
    if backend.vendor == "cpu":
        rows += _cpu_rows(facts)
    elif backend.vendor == "tpu":
        rows.append(Row("tpu runtime", facts.details["runtime"], f"{facts.details['num_devices']} devices"))
    else:
        has = [name for name in capabilities.NVIDIA if capabilities.has(facts.arch, name)]
        formats = capabilities.matmul_formats(facts.arch)
        rows.append(Row(f"{backend.vendor} features", " ".join(has) or "none", facts.arch or ""))
        rows.append(
            Row(
                f"{backend.vendor} matmul",
                "unknown" if formats is None else " ".join(formats) or "no narrow format",
                "beside fp16 and bf16",
            )
        )
        rows.append(Row(f"{backend.vendor} driver", facts.details.get("driver") or "unknown", _runtime(facts)))
    return rows


def _runtime(facts: Facts) -> str:
    runtime = facts.details.get("runtime")
    return f"torch is built for {runtime}" if runtime else ""


def _cpu_rows(facts: Facts) -> list[Row]:
    compiler, cap = facts.details["cxx_compiler"], facts.details["onednn_max_cpu_isa"]
    unused = sorted(set(facts.details["processor_isa"]) - set(facts.isa))
    note = ""
    if unused:
        cause = f"ONEDNN_MAX_CPU_ISA={cap}" if cap else "the system gives no permission for AMX tiles"
        note = f"not used by oneDNN: {' '.join(unused)} ({cause})"
    int8 = [flag for flag in capabilities.CPU["int8_matmul"].flags if flag in facts.isa]
    return [
        Row("cpu isa", " ".join(facts.isa) or "unknown", note),
        Row("cpu int8 matmul", " ".join(int8) or "no instruction", ""),
        Row("cpu bf16 matmul", *(("amx_bf16", "") if "amx_bf16" in facts.isa else ("no AMX", "bf16 is slower than fp32 here"))),
        Row("cpu threads", str(facts.num_threads), "torch.get_num_threads()"),
        Row("cpu numa nodes", "unknown" if facts.num_numa_nodes is None else str(facts.num_numa_nodes), ""),
        Row("c++ compiler", compiler or "none", "" if compiler else "torch.compile on a CPU needs one: install g++ or set CXX"),
    ]


def _memory(backend: Backend) -> Row:
    total, free = backend.facts.memory_bytes, backend.available_memory_bytes()
    shown = "unknown" if total is None else f"{total / 2**30:.1f} GiB"
    return Row(f"{backend.vendor} memory", shown, "" if free is None else f"{free / 2**30:.1f} GiB available")


def _measured(backend: Backend) -> list[Row]:
    if backend.vendor == "tpu":
        return [Row("tpu memory read", "not measured", "what is timed here does not wait for XLA")]
    if backend.vendor == "cpu":
        cache, free = host.last_level_cache_bytes(), backend.available_memory_bytes()
    else:
        cache, free = torch.cuda.get_device_properties(backend.device).L2_cache_size, backend.available_memory_bytes()
    read = read_bandwidth(backend.device, cache, free)
    rows = [Row(f"{backend.vendor} memory read", f"{read.bytes_per_s / 1e9:.1f} GB/s", read.note)]
    rows += [Row(f"{backend.vendor} matmul {rate.dtype}", rate.shown, rate.note) for rate in matmul_rates(backend.device)]
    return rows
