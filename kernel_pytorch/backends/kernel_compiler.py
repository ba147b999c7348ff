"""Compiles Triton kernels for a GPU that need not be here, and keeps the code objects in memory and on disk."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kernel_pytorch.backends.code_objects import CodeObject, check_elf, load, store
from kernel_pytorch.backends.compile_process import PROCESS
from kernel_pytorch.cache import CacheStats, LRUCache
from kernel_pytorch.errors import CompilationError, ConfigError, UnsupportedOperationError
from kernel_pytorch.kernels.gpu_targets import AMD, GPU_TARGETS, NVIDIA, GpuTarget, Toolchain
from kernel_pytorch.kernels.native import cache_folder
from kernel_pytorch.schema import nearest

if TYPE_CHECKING:
    from kernel_pytorch.kernels.builds import Build

# Part of each key: another number whenever what is stored, or how it is compiled, changes.
_VERSION = 1
_MAX_IN_MEMORY = 256


@dataclass(frozen=True)
class CompilerStats:
    """memory: of the LRU cache. compiled: kernels that a compiler ran for. from_disk: found there. damaged: of the compiled ones,
    those whose files on disk had been changed or cut."""

    memory: CacheStats
    compiled: int
    from_disk: int
    damaged: int


class KernelCompiler:
    """Of one vendor, for one target, a name of GPU_TARGETS. folder: None for `code_objects` in the project's cache folder.
    max_in_memory: code objects, the last used ones.

    Raises ConfigError for a target that is not this vendor's."""

    toolchain: ClassVar[Toolchain]

    def __init__(self, target: str, *, folder: Path | None = None, max_in_memory: int = _MAX_IN_MEMORY) -> None:
        allowed = [name for name, known in GPU_TARGETS.items() if known.toolchain is self.toolchain]
        if target not in allowed:
            raise ConfigError(f"target: found {target!r}{nearest(target, allowed)}; allowed: {', '.join(allowed)}")
        self.target: GpuTarget = GPU_TARGETS[target]
        self._folder = folder
        self._memory: LRUCache[str, CodeObject] = LRUCache(max_in_memory)
        self._compiled = self._from_disk = self._damaged = 0

    @property
    def folder(self) -> Path:
        """Where code objects are kept, in one folder a target."""
        return cache_folder() / "code_objects" if self._folder is None else self._folder

    @property
    def stats(self) -> CompilerStats:
        return CompilerStats(self._memory.stats, self._compiled, self._from_disk, self._damaged)

    def compile(self, build: Build) -> CodeObject:
        """The code object of one specialization: from memory, else from disk, else compiled. May be called from any thread.

        Raises CompilationError with kernel, target and the compiler's first line of complaint; UnsupportedOperationError where
        Triton is missing or interprets; ValueError for a kernel that is defined inside a function."""
        if "<locals>" in build.kernel.__qualname__:
            raise ValueError(f"{build.name}: a kernel must be at the top level of a module, to be found by another process")
        key = self.key(build)
        return self._memory.get_or_make(key, lambda: self._load_or_compile(build, key))

    def key(self, build: Build) -> str:
        """sha256 of the source with the functions that it calls, of the specialization, the target and the compilers' versions."""
        require_triton()
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import get_cache_invalidating_env_vars, make_backend

        target, toolchain = self.target, self.target.toolchain
        try:
            backend = make_backend(GPUTarget(toolchain.backend, target.arch, target.warp))
        except RuntimeError as error:
            raise UnsupportedOperationError(
                f"{target.name}: this Triton, {triton.__version__}, has no compiler for {toolchain.vendor}"
            ) from error
        facts = (
            _VERSION,
            _source_hash(build),
            sorted(build.types.items()),
            sorted(build.options.items()),
            triton.__version__,
            backend.hash(),
            sorted(get_cache_invalidating_env_vars().items()),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _load_or_compile(self, build: Build, key: str) -> CodeObject:
        try:
            found = load(self.folder, build.name, key, self.target)
        except ValueError:
            self._damaged += 1
            found = None
        if found is not None:
            self._from_disk += 1
            return found
        code = store(self.folder, self._compile(build, key), self.target)
        self._compiled += 1
        return code

    def _compile(self, build: Build, key: str) -> CodeObject:
        target, toolchain, what = self.target, self.target.toolchain, f"{build.name} for {self.target.name}"
        request = {
            "module": build.kernel.__module__,
            "file": build.kernel.fn.__code__.co_filename,
            "function": build.kernel.__qualname__,
            "types": build.types,
            "constants": build.constants,
            "aligned": build.aligned,
            "options": build.options,
            "target": (toolchain.backend, target.arch, target.warp),
            "binary": toolchain.binary,
            "assembly": toolchain.assembly,
        }
        made = PROCESS.ask(request, what)
        # The compiling process reads the file, this one the source that it imported.
        if made.pop("source") != _source_hash(build):
            raise CompilationError(f"{what}: its source file was changed after it was imported; start this process again")
        binary = base64.b64decode(made.pop("binary"))
        try:
            check_elf(binary, target)
        except ValueError as error:
            raise CompilationError(f"{what}: the compiler made {error}") from error
        return CodeObject(kernel=build.name, target=target.name, key=key, binary=binary, **made)


class ROCmCompiler(KernelCompiler):
    """For AMD's GPUs, through Triton's AMD backend: needs no ROCm and no GPU. Code objects are hsaco files."""

    toolchain = AMD


class CudaCompiler(KernelCompiler):
    """For NVIDIA's GPUs, through the ptxas that Triton brings: needs no CUDA toolkit and no GPU. Code objects are cubin files."""

    toolchain = NVIDIA


def compiler_for(target: str, *, folder: Path | None = None) -> KernelCompiler:
    """The vendor's compiler for a name of GPU_TARGETS. Raises ConfigError for another name."""
    for vendor in (ROCmCompiler, CudaCompiler):
        if target in GPU_TARGETS and GPU_TARGETS[target].toolchain is vendor.toolchain:
            return vendor(target, folder=folder)
    raise ConfigError(f"target: found {target!r}{nearest(target, list(GPU_TARGETS))}; allowed: {', '.join(GPU_TARGETS)}")


def requested(targets: Sequence[str], kernels: Sequence[str], folder: Path | None = None) -> list[tuple[KernelCompiler, Build]]:
    """The kernels of this package by these names, and the compilers for these targets; without names all, less the kernels
    that a target's GPUs do not run. Raises ConfigError for names that are not there, all at once."""
    require_triton()
    from kernel_pytorch.kernels.builds import KERNELS, builds_for

    unknown = [("target", name, list(GPU_TARGETS)) for name in targets if name not in GPU_TARGETS]
    unknown += [("kernel", name, list(KERNELS)) for name in kernels if name not in KERNELS]
    if unknown:
        raise ConfigError([f"{what}: found {name!r}{nearest(name, known)}; allowed: {', '.join(known)}" for what, name, known in unknown])
    compilers = [compiler_for(name, folder=folder) for name in targets or GPU_TARGETS]
    return [(one, build) for one in compilers for name, build in builds_for(one.target).items() if not kernels or name in kernels]


def precompile(targets: Sequence[str] = (), kernels: Sequence[str] = (), *, folder: Path | None = None) -> Iterator[CodeObject]:
    """Compiles kernels of this package for targets, without names all, and gives each code object as it is made.

    Raises ConfigError for names that are not there, CompilationError and UnsupportedOperationError as `KernelCompiler.compile`."""
    return (compiler.compile(build) for compiler, build in requested(targets, kernels, folder))


def require_triton() -> None:
    """Raises UnsupportedOperationError where Triton is not installed, or interprets kernels instead of compiling them."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedOperationError("kernels are compiled by Triton, and it is not installed")
    from triton import knobs

    if knobs.runtime.interpret:
        raise UnsupportedOperationError("Triton interprets kernels in this process: unset TRITON_INTERPRET to compile them")


def _source_hash(build: Build) -> str:
    from kernel_pytorch.backends.compile_worker import source_of

    return source_of(build.kernel, build.types, build.constants, build.aligned).hash()
