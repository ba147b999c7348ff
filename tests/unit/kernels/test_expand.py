"""Packed weights to 16 bits: bits of the plain reference. Interpreted in float16 here; bfloat16 on the GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_pytorch.backends.kernel_compiler import compiler_for
from kernel_pytorch.kernels import builds, expand, skinny_w4a16, skinny_w8a16
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import WeightConfig

EIGHT, FOUR = tuple(skinny_w8a16.DTYPES), tuple(skinny_w4a16.BLOCK)
# (N, K): whole blocks, then rows, words, groups and tiles that no program divides, one value.
SHAPES = ((64, 1024), (130, 200), (33, 1000), (17, 4100), (1, 1), (5, 256))
LLAMA = skinny_w8a16.LLAMA


def eight(n: int, k: int, fmt: str, on: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code of the format that is a number, and scales over six powers of two."""
    rng = torch.Generator(on).manual_seed(n + k)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=on, generator=rng)
    if fmt != "int8":
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    return skinny_w8a16.pack(codes), torch.rand(n, device=on, generator=rng).mul_(6).exp2_() / 512


def four(n: int, k: int, fmt: str, on: str) -> skinny_w4a16.Packed:
    weight = torch.randn(n, k, generator=torch.Generator(on).manual_seed(n + k), device=on)
    weight[:, ::7] *= 8
    stored = STORAGES[fmt].quantize(weight, WeightConfig(format=fmt))
    return skinny_w4a16.pack(stored["weight"], stored["weight_scale"], fmt, stored.get("weight_global_scale"))


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_references_are_the_formats_values(dtype):
    codes = torch.arange(-128, 128, dtype=torch.int8).view(1, 256)
    scale = torch.tensor([0.3])
    assert torch.equal(expand.eight_bits(skinny_w8a16.pack(codes), scale, 256, "int8", dtype), (codes.float() * scale).to(dtype))
    for fmt in FOUR:
        weight = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) + 1
        stored = STORAGES[fmt].quantize(weight, WeightConfig(format=fmt))
        packed = skinny_w4a16.pack(stored["weight"], stored["weight_scale"], fmt, stored.get("weight_global_scale"))
        assert torch.equal(expand.four_bits(packed, 300, dtype), STORAGES[fmt].dequantize(stored, 300).to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "float8_e5m2"}, "format must be one of int8, float8_e4m3fn, got float8_e5m2"),
        ({"in_features": 257}, r"packed must be int32 \[N, 128\] from skinny_w8a16.pack, got torch.int32 \(4, 64\)"),
        ({"packed": torch.zeros(4, 64)}, r"packed must be int32 \[N, 64\] from skinny_w8a16.pack, got torch.float32 \(4, 64\)"),
        ({"scale": torch.ones(3)}, r"scale must be contiguous float32 \[4\], got torch.float32 \(3,\)"),
        ({"scale": torch.ones(4).double()}, r"scale must be contiguous float32 \[4\], got torch.float64 \(4,\)"),
    ],
)
def test_eight_bits_names_the_wrong_argument(change, message):
    given = {"packed": torch.zeros(4, 64, dtype=torch.int32), "scale": torch.ones(4), "in_features": 256, "format": "int8"}
    with pytest.raises(ValueError, match=message):
        expand.eight_bits(**(given | change), dtype=torch.bfloat16)


def test_four_bits_names_the_wrong_argument():
    with pytest.raises(
        ValueError, match=r"expand: words must be contiguous torch.int32 \(1, 512\), from skinny_w4a16.pack of a weight \[5, 200\]"
    ):
        expand.four_bits(four(5, 100, "nvfp4", "cpu"), 200, torch.bfloat16)


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_memory_is_read_and_written_in_wide_accesses(name, dtype):
    """Words by four, values by four at least: of the narrower ones more are on their way than a processor keeps count of."""
    target = GPU_TARGETS[name]
    for fmt in EIGHT:
        ptx = compiler_for(name).compile(builds.expanded_eight_bits(target, format=fmt, dtype=dtype)).assembly
        assert accesses(ptx, "ld")[0] == 128
        assert min(accesses(ptx, "st")) >= 64
    ptx = compiler_for(name).compile(builds.expanded_four_bits(target, dtype=dtype)).assembly
    assert max(accesses(ptx, "ld")) == 128
    assert min(accesses(ptx, "st")) >= 64


def accesses(ptx: str, what: str) -> list[int]:
    """Bits of each access of global memory, in the order of the assembly."""
    found = re.findall(rf"{what}\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return [int(width or 1) * int(bits) for width, bits in found]


def interpreted_cases() -> None:
    """Runs in a process with Triton's interpreter: prints one line a case."""
    for n, k in SHAPES:
        for fmt in EIGHT:
            packed, scale = eight(n, k, fmt, "cpu")
            out = torch.full((n, k), float("nan"), dtype=torch.float16)
            expected = expand.eight_bits_reference(packed, scale, k, fmt, torch.float16)
            assert_same_bits(expand.launch_eight_bits(packed, scale, fmt != "int8", out), expected)
            if n * k > 1:
                assert not torch.equal(expand.launch_eight_bits(packed ^ 1, scale, fmt != "int8", out.clone()), expected)
            print("right", fmt, n, k)
        for fmt in FOUR:
            packed4 = four(n, k, fmt, "cpu")
            out = torch.full((n, k), float("nan"), dtype=torch.float16)
            assert_same_bits(expand.launch_four_bits(packed4, out), expand.four_bits_reference(packed4, k, torch.float16))
            print("right", fmt, n, k)


def test_interpreted_kernels_write_the_references_bits():
    """Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter has a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_expand; test_expand.interpreted_cases()"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == 4 * len(SHAPES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestOnGpu:
    @pytest.mark.parametrize("shape", [*SHAPES, *LLAMA])
    @pytest.mark.parametrize("fmt", EIGHT)
    def test_eight_bits_are_the_references(self, shape, fmt, dtype):
        packed, scale = eight(*shape, fmt, "cuda")
        out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        expected = expand.eight_bits_reference(packed, scale, shape[1], fmt, dtype)
        assert_same_bits(expand.launch_eight_bits(packed, scale, fmt != "int8", out), expected)
        assert_same_bits(expand.eight_bits(packed, scale, shape[1], fmt, dtype), expected)

    @pytest.mark.parametrize("shape", [*SHAPES, *LLAMA[:2]])
    @pytest.mark.parametrize("fmt", FOUR)
    def test_four_bits_are_the_references(self, shape, fmt, dtype):
        packed = four(*shape, fmt, "cuda")
        out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        expected = expand.four_bits_reference(packed, shape[1], dtype)
        assert_same_bits(expand.launch_four_bits(packed, out), expected)
        assert_same_bits(expand.four_bits(packed, shape[1], dtype), expected)

    def test_graph_capture_full_compile_and_opcheck(self, dtype):
        packed, scale = eight(96, 512, "float8_e4m3fn", "cuda")
        packed4 = four(96, 512, "nvfp4", "cuda")

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            return expand.eight_bits(packed, scale, 512, "float8_e4m3fn", dtype), expand.four_bits(packed4, 512, dtype)

        expected = both()
        for actual, wanted in zip(torch.compile(both, fullgraph=True)(), expected, strict=True):
            assert_same_bits(actual, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = both()
        for output in outputs:
            output.zero_()
        graph.replay()
        for actual, wanted in zip(outputs, expected, strict=True):
            assert_same_bits(actual, wanted)
        torch.library.opcheck(torch.ops.kernel_pytorch.expand_w8.default, (packed, scale, 512, "float8_e4m3fn", dtype))
        torch.library.opcheck(torch.ops.kernel_pytorch.expand_w4.default, (*packed4, 512, dtype))
