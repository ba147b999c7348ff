"""Facts of the machine that Python runs on: processor, instruction sets, memory, compiler. Read from the system, never assumed."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

# Kernel spellings of the flags that steps ask about, and the names they go by here.
_FLAG_NAMES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
_AVX512 = ("avx512f",)
_VNNI = (*_AVX512, "avx512_vnni")
_BF16 = (*_VNNI, "avx512_bf16", "avx_vnni")
_FP16 = (*_BF16, "avx512_fp16")
# Flags beyond AVX2 that oneDNN may use under each cap. Source: oneDNN documentation, "CPU Dispatcher Control".
_ONEDNN_CAPS: dict[str, tuple[str, ...]] = {
    "SSE41": (),
    "AVX": (),
    "AVX2": (),
    "AVX2_VNNI": ("avx_vnni",),
    "AVX2_VNNI_2": ("avx_vnni",),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _VNNI,
    "AVX512_CORE_BF16": _BF16,
    "AVX512_CORE_FP16": _FP16,
    "AVX10_1_512": _FP16,
}
_X86_CAPPED = (*_FP16, "amx_tile", "amx_int8", "amx_bf16")


def cpu_name(cpuinfo: str | None = None) -> str:
    """The processor's own name, or the architecture when the system does not tell."""
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    return _cpuinfo_field(text, "model name") or _cpuinfo_field(text, "Model") or platform.processor() or platform.machine()


def isa_flags(cpuinfo: str | None = None) -> tuple[str, ...]:
    """Instruction sets of the processor that steps ask about, sorted; empty when the system does not tell."""
    text = _read("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    present = set((_cpuinfo_field(text, "flags") or _cpuinfo_field(text, "Features") or "").split())
    return tuple(sorted(name for spelling, name in _FLAG_NAMES.items() if spelling in present))


def onednn_cap() -> str | None:
    """The instruction set that ONEDNN_MAX_CPU_ISA holds oneDNN to; None when it may use everything.

    oneDNN ignores a value that it does not know, and so does this."""
    value = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    return value if value in _ONEDNN_CAPS else None


def usable_isa(flags: tuple[str, ...], cap: str | None) -> tuple[str, ...]:
    """The flags that oneDNN's matmuls may use: `flags` less what the cap forbids and less AMX without the system's permission."""
    if cap is not None:
        allowed = _ONEDNN_CAPS[cap]
        flags = tuple(flag for flag in flags if flag not in _X86_CAPPED or flag in allowed)
    if "amx_tile" in flags and not amx_permitted():
        flags = tuple(flag for flag in flags if not flag.startswith("amx_"))
    return flags


@functools.cache
def amx_permitted() -> bool:
    """Whether the system lets this process use AMX tiles. Asking grants it to the process, as oneDNN's first use would."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    syscall_arch_prctl, request_permission, xtiledata = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(syscall_arch_prctl, request_permission, xtiledata) == 0


def total_memory_bytes() -> int | None:
    """Memory that this process may use in all: the machine's, or the control group's limit when that is less."""
    known = [value for value in (_meminfo("MemTotal"), _cgroup_bytes("memory.max", "memory.limit_in_bytes")) if value]
    return min(known) if known else _sysconf_memory()


def available_memory_bytes() -> int | None:
    """Memory that a new allocation can still get, within the control group's limit; None when the system does not tell."""
    free = _meminfo("MemAvailable")
    limit = _cgroup_bytes("memory.max", "memory.limit_in_bytes")
    used = _cgroup_bytes("memory.current", "memory.usage_in_bytes")
    if limit is None or used is None:
        return free
    room = max(limit - used, 0)
    return room if free is None else min(room, free)


def last_level_cache_bytes() -> int | None:
    """The largest cache that the system lists for the first processor; None when it lists none."""
    sizes = [_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=None)


def num_numa_nodes(online: str | None = None) -> int | None:
    """Memory nodes of the machine; None when the system does not tell. online: the system's own list of ranges, `0-1,3`."""
    text = (_read("/sys/devices/system/node/online") if online is None else online).strip()
    if not text:
        return None
    ends = [part.partition("-") for part in text.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


@functools.cache
def cxx_compiler() -> str | None:
    """The C++ compiler that Inductor would use, found the way Inductor finds it; None when it would find none.

    Inductor's own download through conda is left out: looking must not install anything."""
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import cpp_compiler_search, get_cpp_compiler

    try:
        if platform.system() == "Windows":
            return get_cpp_compiler()
        wanted = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
        return cpp_compiler_search(tuple(name for name in wanted if name is not None))  # pyright: ignore[reportArgumentType]
    except (exc.InvalidCxxCompiler, OSError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpuinfo_field(text: str, name: str) -> str | None:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _meminfo(name: str) -> int | None:
    value = _cpuinfo_field(_read("/proc/meminfo"), name)
    return int(value.split()[0]) * 1024 if value else None


def _sysconf_memory() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_bytes(v2_name: str, v1_name: str) -> int | None:
    """The least figure on the way from this process's control group to the root; None when there is no limit."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            root, name = Path("/sys/fs/cgroup/memory"), v1_name
        elif not controllers:
            root, name = Path("/sys/fs/cgroup"), v2_name
        else:
            continue
        start = root / group.lstrip("/")
        folders = [folder for folder in (start, *start.parents) if folder == root or root in folder.parents]
        texts = [_read(str(folder / name)).strip() for folder in folders]
        # Version 1 spells "no limit" as a number near 2**63.
        values = [int(text) for text in texts if text.isdigit() and int(text) < 2**60]
        if values:
            return values[0] if name in ("memory.current", "memory.usage_in_bytes") else min(values)
    return None


def _size(text: str) -> int:
    text = text.strip()
    unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit
