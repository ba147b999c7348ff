"""Every kernel of the package compiles for every GPU target, without the hardware."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import pytest
import triton

import kernel_pytorch.kernels
from kernel_pytorch.backends.code_objects import check_elf
from kernel_pytorch.backends.kernel_compiler import KernelCompiler, compiler_for
from kernel_pytorch.kernels import split_k_jit
from kernel_pytorch.kernels.builds import KERNELS, Build, builds_for
from kernel_pytorch.kernels.gpu_targets import AMD, GPU_TARGETS, NVIDIA

WITH_MATRIX_PRODUCTS = (
    "decode_attention.attend",
    "skinny_w4a16_fragment.tile",
    "skinny_w4a16_wgmma.multiply",
    "skinny_w4a16.tile",
    "skinny_w8a16.matrix",
)
# That of GPUs that are not NVIDIA's, and those of many rows: what comes before takes long, and after.
WITHOUT_OVERLAP = ("skinny_w4a16.tile", "expand.eight_bits", "expand.four_bits")
PAIRS = [(target, kernel) for target in GPU_TARGETS for kernel in builds_for(GPU_TARGETS[target])]


@cache
def compiler(target: str) -> KernelCompiler:
    return compiler_for(target)


def launched_kernels() -> set[str]:
    """Triton kernels of the package by module and function; what only other kernels call has a name of its own module's."""
    found = set()
    for info in pkgutil.iter_modules(kernel_pytorch.kernels.__path__):
        module = importlib.import_module(f"kernel_pytorch.kernels.{info.name}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if isinstance(value, triton.runtime.JITFunction) and own and not name.startswith("_"):
                found.add(f"{info.name.removesuffix('_jit')}.{name}")
    return found


def test_no_kernel_is_missing_and_five_targets_are_listed():
    assert set(KERNELS) == launched_kernels()
    assert list(GPU_TARGETS) == ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]
    everywhere = set.intersection(*(set(builds_for(on)) for on in GPU_TARGETS.values()))
    assert set(KERNELS) - everywhere == {"skinny_w4a16_fragment.tile", "skinny_w4a16_wgmma.multiply"}
    assert [target for target, kernel in PAIRS if kernel == "skinny_w4a16_fragment.tile"] == ["sm_80", "sm_90", "sm_100"]
    assert [target for target, kernel in PAIRS if kernel == "skinny_w4a16_wgmma.multiply"] == ["sm_90"]
    assert len(PAIRS) == 5 * len(everywhere) + 4 >= 59


@pytest.mark.parametrize(("target", "kernel"), PAIRS, ids=lambda value: value)
def test_compiles(target, kernel):
    on = GPU_TARGETS[target]
    build = builds_for(on)[kernel]
    assert build.name == kernel
    code = compiler(target).compile(build)
    check_elf(code.binary, on)
    assert code.entry.encode() in code.binary
    assert code.entry == build.kernel.__name__
    assert code.shared_bytes <= on.gpu.shared
    assert (on.matrix_instruction in code.assembly) == (kernel in WITH_MATRIX_PRODUCTS)
    if on.cuda:
        assert f".target {target}" in code.assembly
        assert ("griddepcontrol.wait" in code.assembly) == (on.gpu.dependent_launch and kernel not in WITHOUT_OVERLAP)
    else:
        assert f'amdgcn-amd-amdhsa--{target}"' in code.assembly.replace("'", '"')


def test_a_target_has_facts_and_says_where_from():
    for name, on in GPU_TARGETS.items():
        assert on.toolchain is (NVIDIA if name.startswith("sm_") else AMD)
        assert (on.name, on.gpu.name, on.warp) == (name, name, 32 if on.cuda else 64)
        assert on.source
        assert on.elf_arch < 256
    assert len({(on.toolchain.machine, on.elf_arch) for on in GPU_TARGETS.values()}) == len(GPU_TARGETS)


def test_a_build_names_each_argument_once():
    right = KERNELS["split_k.sum_splits"].build(GPU_TARGETS["sm_90"])
    assert right.name == "split_k.sum_splits"
    parts = vars(right) | {"kernel": split_k_jit.sum_splits}
    for change in ({"types": {**right.types, "BLOCK": "i32"}}, {"types": {}}, {"constants": {**right.constants, "no_such": 1}}):
        with pytest.raises(ValueError, match=r"split_k.sum_splits: types and constants must name each argument once; wrong: "):
            Build(**{**parts, **change})


def test_what_a_launch_does_not_specialize_on_is_not_taken_for_aligned():
    sums = KERNELS["split_k.sum_splits"].build(GPU_TARGETS["gfx942"])
    assert "M" not in sums.aligned
    assert {"partial_ptr", "scale_ptr", "out_ptr", "N"} <= set(sums.aligned)
    attend = KERNELS["decode_attention.attend"].build(GPU_TARGETS["gfx942"])
    assert not {"scale", "S", "T", "mask_batch", "mask_key"} & set(attend.aligned)
    assert attend.constants["mask_key"] == 1
