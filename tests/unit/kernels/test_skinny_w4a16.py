"""4-bit weight x 16-bit input, few rows: layout, choice and code generation here; numerics interpreted in f16; bf16 on the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernel_pytorch.kernels import skinny_w4a16 as op
from kernel_pytorch.kernels import skinny_w4a16_jit as jit
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import WeightConfig

FORMATS = tuple(op.BLOCK)
H200 = op.Device("NVIDIA H200", 132, 232448, True)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(m: int, n: int, k: int, fmt: str, dtype: torch.dtype, on: str) -> tuple[torch.Tensor, op.Packed, torch.Tensor, torch.Tensor]:
    """x with one column of outliers, packed weight, its values from the canonical storage, bias."""
    rng = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=rng)
    x[:, k // 2] *= 100
    weight = torch.randn(n, k, generator=rng)
    weight[:, ::7] *= 8
    stored = STORAGES[fmt].quantize(weight, WeightConfig(format=fmt))
    packed = op.pack(stored["weight"], stored["weight_scale"], fmt, stored.get("weight_global_scale"))
    values = STORAGES[fmt].dequantize(stored, k)
    return x.to(dtype).to(on), op.Packed(*(part.to(on) for part in packed)), values.to(on), torch.randn(n, generator=rng).to(on)


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def assert_within_budget(actual: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> None:
    exact = op.reference(x.double(), values, bias)
    error, low = relative(actual, exact), relative(op.reference(x, values, bias), exact)
    assert error <= 2 * low, f"error {error:.2e} exceeds the budget 2 x {low:.2e}"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", [1, 200, 256, 1000])
def test_unpack_returns_what_pack_was_given(fmt, k):
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(k))
    weight[2] = 0
    stored = STORAGES[fmt].quantize(weight, WeightConfig(format=fmt))
    if not op.fits(stored["weight_scale"], fmt):
        weight[2] = 1
        stored = STORAGES[fmt].quantize(weight, WeightConfig(format=fmt))
    packed = op.pack(stored["weight"], stored["weight_scale"], fmt, stored.get("weight_global_scale"))
    codes, scale, global_scale = op.unpack(packed, fmt)
    assert torch.equal(codes, stored["weight"])
    assert torch.equal(scale.view(torch.uint8), stored["weight_scale"].view(torch.uint8))
    assert global_scale == stored.get("weight_global_scale")
    assert torch.equal(op.dequantize(packed, k), STORAGES[fmt].dequantize(stored, k))
    width = -(-k // op.BLOCK[fmt]) * op.BLOCK[fmt] // 8
    assert (packed.words.shape, packed.scales.shape, packed.words.nbytes + packed.scales.nbytes) == ((5, width), (5, width), 25 * width)


def test_every_code_and_every_scale_survives():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 8)
    scale = torch.arange(1, 127, dtype=torch.uint8)[:128].view(torch.float8_e4m3fn).repeat(2)[:128].view(8, 16)
    packed = op.pack(codes, scale.view(16, 8).repeat(1, 2), "nvfp4", torch.tensor(0.5))
    found = op.unpack(packed, "nvfp4")
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1].view(torch.uint8), scale.view(16, 8).repeat(1, 2).view(torch.uint8))


def test_scales_of_a_row_that_span_too_much_are_refused():
    scale = torch.full((4, 2), 127, dtype=torch.uint8)
    assert op.fits(scale, "mxfp4")
    scale[1, 1] -= 22
    assert op.fits(scale, "mxfp4")
    scale[1, 1] -= 1
    assert not op.fits(scale, "mxfp4")
    with pytest.raises(ValueError, match="span more powers of two"):
        op.pack(torch.zeros(4, 32, dtype=torch.uint8), scale, "mxfp4")
    assert not op.fits(torch.zeros(1, 1).to(torch.float8_e4m3fn), "nvfp4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, p, b: (x.float(), p, b), "x must be bfloat16 or float16, got torch.float32"),
        (lambda x, p, b: (x, p._replace(words=p.words[:, :-4]), b), "words must be int32"),
        (lambda x, p, b: (x, p._replace(scales=p.scales[:, :-1]), b), "scales must be int8"),
        (lambda x, p, b: (x, p._replace(channel=p.channel.double()), b), "channel must be contiguous float32"),
        (lambda x, p, b: (x, p, b[:-1]), "bias must be contiguous float32"),
    ],
)
def test_linear_names_the_wrong_argument(change, message):
    x, packed, _, bias = make(3, 8, 64, "nvfp4", torch.float16, "cpu")
    with pytest.raises(ValueError, match=message):
        op.linear(*change(x, packed, bias))


def test_budget_rejects_a_wrong_kernel():
    x, _, values, bias = make(7, 64, 512, "nvfp4", torch.float16, "cpu")
    low = op.reference(x, values, bias)
    assert_within_budget(low, x, values, bias)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(low * 1.02, x, values, bias)


def test_measured_configurations_and_the_rule_without_them():
    for n, k in op.LLAMA:
        assert {m for m in (1, 8, 32) if (n, k, m) in op.tuned(H200.name)} == {1, 8, 32}
        assert op.choose(5, n, k, H200) == op.tuned(H200.name)[n, k, 8]
    config = op.choose(5, 4096, 4096, op.Device("another", 80, 100_000, False))
    assert (config.block_n, config.split, config.overlap) == (64, 4, "none")


TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "mma.sync", 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), "mma", 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), "mma", 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "v_mfma", 65536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), "v_mfma", 163840),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_compiles_to_matrix_instructions_within_shared_memory(name, dtype):
    target, instruction, shared = TARGETS[name]
    cuda = target.backend == "cuda"
    config = op.choose(16, 4096, 4096, op.Device("another", 108, shared, cuda and int(target.arch) >= 90))
    sizes = ("M", "N", "K", "row_words", "steps")
    pointers = {"x_ptr": f"*{dtype}", "w_ptr": "*i32", "s_ptr": "*i8", "channel_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    flags = {"HAS_BIAS": True, "PARTIAL": False, "EVEN": True, "BLOCK_M": 16, "BLOCK_N": config.block_n, "Q": config.words}
    flags |= {"ASM": cuda, "EARLY": config.overlap == "early", "LATE": config.overlap == "late"}
    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(flags, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, part in enumerate(pointers | dict.fromkeys(sizes)) if part not in ("M", "steps")}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    built = triton.compile(ASTSource(jit.tile, signature=signature, constexprs=flags, attrs=aligned), target=target, options=options)
    assert instruction in built.asm["ptx" if cuda else "amdgcn"]
    assert built.metadata.shared <= shared


def interpreted_cases() -> None:
    """Runs in a process with Triton's interpreter: prints one line a case."""
    for fmt in FORMATS:
        for m, n, k in ((7, 130, 200), (33, 70, 520), (1, 1, 1), (9, 64, 512), (0, 64, 64)):
            x, packed, values, bias = make(m, n, k, fmt, torch.float16, "cpu")
            for config in (op.Config(64, 32, 1, 4, 3), op.Config(32, 16, 2, 4, 2)):
                out = torch.full((m, n), float("nan"), dtype=torch.float16)
                actual = op.launch(x, packed, bias, config, out)
                if m:
                    assert torch.isfinite(actual).all()
                    assert_within_budget(actual, x, values, bias)
            if m:
                assert_within_budget(op.linear(x[None], packed, bias)[0], x, values, bias)
                wrong = packed._replace(scales=packed.scales ^ 1)
                assert not torch.equal(op.linear(x, wrong, bias), op.linear(x, packed, bias))
            print("right", fmt, m, n, k)


def test_interpreted_kernel_meets_the_budget_on_odd_shapes():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_skinny_w4a16; test_skinny_w4a16.interpreted_cases()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("shape", [s for s in op.SHAPES if s[0] * s[1]])
    def test_meets_the_budget_and_writes_every_element(self, shape, fmt, dtype):
        x, packed, values, bias = make(*shape, fmt, dtype, "cuda")
        config = op.choose(shape[0], shape[1], shape[2], op.device(0))
        actual = op.launch(x, packed, bias, config, x.new_full((shape[0], shape[1]), float("nan")))
        assert torch.isfinite(actual).all()
        assert_within_budget(actual, x, values, bias)

    def test_graph_capture_full_compile_and_opcheck(self, fmt, dtype):
        x, packed, _, bias = make(4, 512, 1024, fmt, dtype, "cuda")
        expected = op.linear(x, packed, bias)
        compiled = torch.compile(lambda x: op.linear(x, packed, bias), fullgraph=True)
        assert torch.equal(compiled(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op.linear(x, packed, bias)
        graph.replay()
        assert torch.equal(y, expected)
        torch.library.opcheck(torch.ops.kernel_pytorch.skinny_w4a16.default, (x, *packed, bias))
