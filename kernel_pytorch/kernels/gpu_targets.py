"""GPU architectures that kernels are compiled for without the hardware, as data: what Triton and the linker call them, and the
facts of one GPU of each that a kernel's configuration depends on."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_pytorch.kernels.device import Device


@dataclass(frozen=True)
class Toolchain:
    """vendor: of the GPU. backend: Triton's name for it. binary, assembly: names of Triton's stages, also the files' suffixes.
    machine: e_machine in an ELF file's header."""

    vendor: str
    backend: str
    binary: str
    assembly: str
    machine: int


# Source of the machine numbers: the System V ABI's registry of e_machine.
NVIDIA = Toolchain("nvidia", "cuda", "cubin", "ptx", machine=190)
AMD = Toolchain("amd", "hip", "hsaco", "amdgcn", machine=224)


@dataclass(frozen=True)
class GpuTarget:
    """name: sm_NN or gfxNNN. arch: as Triton takes it. warp: threads. elf_arch: the architecture's number in an ELF header's flags.
    matrix_instruction: what the assembly of a matrix product in 16-bit floats holds. gpu: the GPU whose processors, shared memory
    and instructions `choose` of a kernel is asked for. source: who says so."""

    name: str
    toolchain: Toolchain
    arch: int | str
    warp: int
    elf_arch: int
    matrix_instruction: str
    gpu: Device
    source: str

    @property
    def cuda(self) -> bool:
        """Whether NVIDIA's inline assembly can be compiled for it."""
        return self.toolchain is NVIDIA


def _nvidia(arch: int, processors: int, shared: int, *, newer: bool, source: str) -> GpuTarget:
    """newer: has the launch that overlaps the kernel before it, and FP8 conversions."""
    name = f"sm_{arch}"
    device = Device(name, processors, shared, newer, newer, mma=True, warpgroups=arch == 90)
    return GpuTarget(name, NVIDIA, arch, 32, arch, "mma", device, source)


def _amd(name: str, elf_arch: int, processors: int, shared: int, *, source: str) -> GpuTarget:
    return GpuTarget(name, AMD, name, 64, elf_arch, "v_mfma", Device(name, processors, shared), source)


_CUDA_TABLE = "CUDA C++ Programming Guide, technical specifications per compute capability"
_LLVM_TABLE = "LLVM, User Guide for AMDGPU Backend, e_flags"
GPU_TARGETS: dict[str, GpuTarget] = {
    target.name: target
    for target in (
        _nvidia(80, 108, 166912, newer=False, source=f"{_CUDA_TABLE}; NVIDIA A100 datasheet"),
        _nvidia(90, 132, 232448, newer=True, source=f"{_CUDA_TABLE}; NVIDIA H100 datasheet"),
        _nvidia(100, 148, 232448, newer=True, source=f"{_CUDA_TABLE}; NVIDIA DGX B200 datasheet"),
        _amd("gfx942", 0x4C, 304, 65536, source=f"{_LLVM_TABLE}; CDNA3 instruction set, LDS; AMD Instinct MI300X data sheet"),
        _amd("gfx950", 0x4F, 256, 163840, source=f"{_LLVM_TABLE}; CDNA4 instruction set, LDS; AMD Instinct MI355X data sheet"),
    )
}
