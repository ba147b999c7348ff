"""Code objects, the files that a driver loads a kernel from, and their cache on disk. A file that is damaged is never returned."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kernel_pytorch.kernels.gpu_targets import NVIDIA, GpuTarget

# From this version of its ABI on a cubin has the architecture in the second byte of the flags.
_CUBIN_ABI_SECOND_BYTE = 8
_HEADER_BYTES = 64


@dataclass(frozen=True)
class CodeObject:
    """binary: an ELF file (hsaco, cubin). assembly: amdgcn or PTX text. entry: the function's symbol. shared_bytes: of shared memory
    that a program takes. key: sha256 of source, specialization, target and versions. path: the binary's file, None where the
    cache's folder cannot be written."""

    kernel: str
    target: str
    entry: str
    num_warps: int
    shared_bytes: int
    key: str
    binary: bytes
    assembly: str
    path: Path | None = None


def check_elf(binary: bytes, target: GpuTarget) -> None:
    """Raises ValueError unless `binary` is a whole 64-bit ELF file for the target's architecture."""
    if binary[:5] != b"\x7fELF\x02" or len(binary) < _HEADER_BYTES:
        raise ValueError(f"no 64-bit ELF file: it begins with {binary[:5]!r} and has {len(binary)} bytes")
    (machine,) = struct.unpack_from("<H", binary, 18)
    if machine != target.toolchain.machine:
        raise ValueError(f"an ELF file for machine {machine}; {target.name} is machine {target.toolchain.machine}")
    (flags,) = struct.unpack_from("<I", binary, 48)
    arch = flags >> 8 & 0xFF if target.toolchain is NVIDIA and binary[8] >= _CUBIN_ABI_SECOND_BYTE else flags & 0xFF
    if arch != target.elf_arch:
        raise ValueError(f"an ELF file for architecture {arch:#x}; {target.name} is {target.elf_arch:#x}")
    (sections,) = struct.unpack_from("<Q", binary, 40)
    size, count = struct.unpack_from("<HH", binary, 58)
    if sections + size * count > len(binary):
        raise ValueError(f"a cut ELF file: {sections + size * count} bytes are announced, {len(binary)} are there")


def store(folder: Path, code: CodeObject, target: GpuTarget) -> CodeObject:
    """Writes binary, assembly and a JSON file with their digest into folder/target; the same object with its path, or without one
    where the folder cannot be written."""
    paths = _paths(folder, code.kernel, code.key, target)
    facts = {name: value for name, value in asdict(code).items() if name not in ("binary", "assembly", "path")}
    facts["sha256"] = _digest(facts, code.binary, code.assembly.encode())
    try:
        paths["json"].parent.mkdir(parents=True, exist_ok=True)
        # The JSON file last: it says that the other two are there.
        _write_whole(paths["binary"], code.binary)
        _write_whole(paths["assembly"], code.assembly.encode())
        _write_whole(paths["json"], json.dumps(facts, indent=1).encode())
    except OSError:
        return code
    return replace(code, path=paths["binary"])


def load(folder: Path, kernel: str, key: str, target: GpuTarget) -> CodeObject | None:
    """What `store` wrote, None where it wrote nothing. Raises ValueError when any of the files was changed, cut or lost."""
    paths = _paths(folder, kernel, key, target)
    try:
        text = paths["json"].read_bytes()
    except OSError:
        return None
    try:
        binary, assembly = paths["binary"].read_bytes(), paths["assembly"].read_bytes()
    except OSError as error:
        raise ValueError(f"{paths['binary'].name}: {error.strerror}") from error
    facts = json.loads(text)
    digest = facts.pop("sha256", None) if isinstance(facts, dict) else None
    if digest is None or digest != _digest(facts, binary, assembly) or facts["key"] != key:
        raise ValueError(f"{paths['binary'].name}: its digest is not the one that was written")
    check_elf(binary, target)
    return CodeObject(**facts, binary=binary, assembly=assembly.decode(), path=paths["binary"])


def _paths(folder: Path, kernel: str, key: str, target: GpuTarget) -> dict[str, Path]:
    stem = f"{kernel}-{key[:16]}"
    suffixes = {"binary": target.toolchain.binary, "assembly": target.toolchain.assembly, "json": "json"}
    return {part: folder / target.name / f"{stem}.{suffix}" for part, suffix in suffixes.items()}


def _digest(facts: dict[str, object], binary: bytes, assembly: bytes) -> str:
    parts = (json.dumps(facts, sort_keys=True).encode(), binary, assembly)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """Nobody sees half a file, whichever process or thread writes it at the same time."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
