"""Builds a C++ operator library once for this torch, compiler and source, and keeps it in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class NativeLibrary:
    """path: the shared library, or None; then `reason` says why there is none."""

    path: Path | None
    reason: str = ""


def cache_folder() -> Path:
    """KERNEL_PYTORCH_CACHE, else kernel_pytorch under XDG_CACHE_HOME or ~/.cache."""
    chosen = os.environ.get("KERNEL_PYTORCH_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernel_pytorch"


def _compiler() -> str | None:
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import cpp_compiler_search

    wanted = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    try:
        return cpp_compiler_search(tuple(name for name in wanted if name is not None))  # pyright: ignore[reportArgumentType]
    except (exc.InvalidCxxCompiler, OSError):
        return None


def _openmp() -> list[str]:
    """Links the OpenMP runtime that torch ships, by file: a second one would bring threads of its own."""
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(shipped[0])] if shipped else ["-lgomp"]


def build(source: Path, *, flags: tuple[str, ...] = (), for_python: bool = False) -> NativeLibrary:
    """Compiles `source` against this torch's headers, or finds what an earlier process compiled. for_python: an extension module of
    this Python, whose headers it needs."""
    compiler = _compiler()
    if compiler is None:
        return NativeLibrary(None, "no C++ compiler was found")
    root = Path(torch.__file__).parent
    options = [
        "-O3",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-fopenmp",
        "-w",
        *flags,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    includes, libraries = [root / "include", root / "include/torch/csrc/api/include"], ["-lc10", "-ltorch_cpu"]
    if for_python:
        includes.append(Path(sysconfig.get_paths()["include"]))
        libraries.append("-ltorch_python")
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    key = "\0".join(
        [source.read_text(), torch.__version__, compiler, version, *options, *libraries, str(sysconfig.get_config_var("SOABI"))]
    )
    try:
        folder = cache_folder() / "native"
    except RuntimeError as error:
        # A user without a home folder, as in some containers.
        return NativeLibrary(None, f"there is no cache folder: {error}")
    library = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if library.is_file():
            return NativeLibrary(library)
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(suffix=".so", dir=folder)
    except OSError as error:
        return NativeLibrary(None, f"cannot write to {folder}: {error.strerror}")
    os.close(handle)
    command = [compiler, *options, *(f"-I{folder}" for folder in includes), str(source), "-o", scratch]
    command += [f"-L{root / 'lib'}", "-Wl,--no-as-needed", *libraries, *_openmp()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        os.unlink(scratch)
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
        return NativeLibrary(None, f"{Path(compiler).name} could not build {source.name}: {first}")
    # Another process may have built the same file meanwhile; either copy is good.
    os.replace(scratch, library)
    return NativeLibrary(library)
