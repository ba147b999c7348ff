"""Row quantization: interpreted kernels against the plain references code by code; code generation for five targets; bf16 on the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_pytorch.backends.kernel_compiler import compiler_for
from kernel_pytorch.kernels import builds
from kernel_pytorch.kernels import row_quant as op
from kernel_pytorch.kernels import row_quant_jit as jit
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS
from kernel_pytorch.precision import float8, int8

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SCHEMES = (*((name, True) for name in op.FORMATS), ("int8", False))
SMALL = tuple((m, k) for m, k in op.SHAPES if 0 < m * k <= 50_000)
# A norm or SwiGLU summed or exponentiated in another order may round to the 16-bit neighbour, and its code to the next one.
ALLOWED_NEIGHBOURS = 1e-3


def make(m: int, k: int, dtype: torch.dtype, on: str) -> torch.Tensor:
    """Rows of different sizes with a column of outliers; among them zeros, one sign only, tiny and huge values."""
    rng = torch.Generator().manual_seed(m + k)
    x = torch.randn(m, k, generator=rng) * torch.rand(m, 1, generator=rng) * 3
    x[:, k // 2] *= 50
    special = (lambda r: r * 0, lambda r: -r.abs(), lambda r: r.abs(), lambda r: r * 1e-3, lambda r: r * 100)
    for row, change in zip(range(1, m), special, strict=False):
        x[row] = change(x[row])
    return x.to(dtype).to(on)


def assert_same_codes(actual: op.Rows, expected: op.Rows) -> None:
    """Codes and zero points equal; scales to the last bit, which torch's division by a number rounds otherwise on a GPU."""
    finite = torch.isfinite(expected.scale)
    assert torch.equal(torch.isfinite(actual.scale), finite), "rows that are not finite differ"
    wrong = (actual.q.view(torch.int8) != expected.q.view(torch.int8))[finite]
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} codes differ"
    torch.testing.assert_close(actual.scale[finite], expected.scale[finite], rtol=1.2e-7, atol=0)
    assert (actual.zero_point is None) == (expected.zero_point is None)
    if actual.zero_point is not None and expected.zero_point is not None:
        assert torch.equal(actual.zero_point[finite], expected.zero_point[finite]), "zero points differ"


def assert_near_codes(actual: op.Rows, expected: op.Rows) -> None:
    """All codes the same or, few of them, neighbours: 8-bit codes order as their values do, each sign by itself."""
    apart = (actual.q.view(torch.int8).int() - expected.q.view(torch.int8).int()).abs()
    share = float((apart != 0).double().mean())
    assert share <= ALLOWED_NEIGHBOURS, f"{share:.1%} of the codes differ"
    assert int(apart.max()) <= 1, f"a code is {int(apart.max())} away"


def norm_error(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> float:
    """Relative to float64, in units of the plain reference's error."""
    exact = op.rms_norm_reference(x.double(), None if weight is None else weight.double(), eps)
    low = op.rms_norm_reference(x, weight, eps)
    return float((actual.double() - exact).norm() / (low.double() - exact).norm())


def check_quantize(m: int, k: int, dtype: torch.dtype, on: str, scheme: tuple[str, bool]) -> None:
    name, symmetric = scheme
    x = make(m, k, dtype, on)
    wide = torch.cat((x, x + 1), 1)[:, :k]
    for given in (x, wide):
        assert_same_codes(op.quantize_rows(given, name, symmetric=symmetric), op.reference(x, name, symmetric=symmetric))


def check_nonfinite(on: str, scheme: tuple[str, bool]) -> None:
    name, symmetric = scheme
    x = make(8, 200, torch.float16, on)
    x[2, 7], x[3, 199], x[4, 0], x[5] = float("nan"), float("inf"), float("-inf"), float("nan")
    rows = op.quantize_rows(x, name, symmetric=symmetric)
    assert torch.isfinite(rows.scale).tolist() == [True, True, False, False, False, False, True, True]
    assert_same_codes(rows, op.reference(x, name, symmetric=symmetric))


def check_ties(on: str, native: bool) -> None:
    """Every value halfway between two float8 codes, its two neighbours in float32, and the codes themselves."""
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
        codes = torch.arange(128, dtype=torch.uint8).view(op.FORMATS[name]).float()
        codes = codes[torch.isfinite(codes)].unique()
        limit = codes.max()
        assert float((1 / limit) * limit) == 1.0, "a row with this maximum is not scaled, so ties stay ties"
        ties = (codes[1:] + codes[:-1]) / 2
        positive = torch.cat((codes, ties, ties.nextafter(ties * 0), ties.nextafter(ties * 2)))
        x = torch.cat((positive, -positive))[None].to(on)
        rows = op.empty_codes(x, name, True)
        k = x.shape[1]
        device = op.Device("cpu", 1, 65536, convert_fp8=native)
        op.launch(jit.quantize, (x,), rows, (k,), name, True, on=device)
        assert torch.equal(rows[0].view(torch.int8), x.to(op.FORMATS[name]).view(torch.int8)), name


def check_int8_ties(on: str) -> None:
    x = (torch.arange(-254, 255, device=on) / 2)[None]
    assert torch.equal(op.quantize_rows(x, "int8").q, torch.round(x).to(torch.int8))


def check_norm(m: int, k: int, dtype: torch.dtype, on: str, scheme: tuple[str, bool]) -> None:
    name, symmetric = scheme
    x = make(m, k, dtype, on)
    rng = torch.Generator().manual_seed(k)
    residual = torch.randn(m, k, generator=rng).to(dtype).to(on)
    weight = (torch.rand(k, generator=rng) + 0.5).to(dtype).to(on)
    for w, other in ((weight, None), (weight.float(), residual), (None, None)):
        kept = op.rms_norm_quantize(x, w, 1e-5, other, format=name, symmetric=symmetric, keep_norm=True)
        assert kept.norm is not None
        total = x if other is None else x + other
        assert (kept.total is None) if other is None else torch.equal(kept.total, total)
        assert norm_error(kept.norm, total, w, 1e-5) <= 2
        assert_same_codes(kept.rows, op.reference(kept.norm, name, symmetric=symmetric))
        plain = op.rms_norm_quantize(x, w, 1e-5, other, format=name, symmetric=symmetric)
        assert plain.norm is None
        assert_same_codes(plain.rows, kept.rows)


def check_exact_norm(dtype: torch.dtype, on: str) -> None:
    """A mean square of 4 and no eps: the norm is exactly half of x times the weight, in any order of summing."""
    sizes = torch.tensor([1.0, 1, 1, 1, 1, 3, 3, 3]).repeat(512)
    signs = torch.randint(0, 2, (3, 4096), generator=torch.Generator().manual_seed(0)) * 2 - 1
    x, weight = (sizes * signs).to(dtype).to(on), torch.linspace(0.5, 2, 4096).to(dtype).to(on)
    expected = op.rms_norm_reference(x, weight, 0.0)
    assert torch.equal(expected, (x.float() / 2 * weight.float()).to(dtype))
    for name, symmetric in SCHEMES:
        found = op.rms_norm_quantize(x, weight, 0.0, format=name, symmetric=symmetric)
        assert_same_codes(found.rows, op.reference(expected, name, symmetric=symmetric))


def check_swiglu(m: int, k: int, dtype: torch.dtype, on: str, scheme: tuple[str, bool]) -> None:
    name, symmetric = scheme
    gate = make(m, k, dtype, on)
    up = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(dtype).to(on)
    both = torch.cat((gate, up), 1)
    expected = op.reference(op.swiglu_reference(gate, up), name, symmetric=symmetric)
    apart = op.swiglu_quantize(gate, up, name, symmetric=symmetric)
    assert_near_codes(apart, expected)
    assert_same_codes(op.swiglu_quantize(*both.chunk(2, 1), name, symmetric=symmetric), apart)


def check_poisoned(on: str) -> None:
    """Every output element is written, and nothing past them."""
    x = make(5, 200, torch.float16, on)
    for name, symmetric in SCHEMES:
        q = torch.full((7, 200), 77, dtype=torch.int8, device=on).view(op.FORMATS[name])
        scale, zero = torch.full((7,), 77.0, device=on), torch.full((7,), 77.0, device=on)
        op.launch(jit.quantize, (x,), (q[:5], scale[:5], zero[:5]), (200,), name, symmetric)
        expected = op.reference(x, name, symmetric=symmetric)
        assert_same_codes(op.Rows(q[:5], scale[:5], None if symmetric else zero[:5]), expected)
        assert (q[5:].view(torch.int8) == 77).all()
        assert scale[5:].tolist() == [77.0, 77.0]
        assert zero[0 if symmetric else 5 :].unique().tolist() == [77.0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_is_the_schemes_quantization(scheme, dtype):
    name, symmetric = scheme
    x = make(9, 200, dtype, "cpu")
    found = op.reference(x, name, symmetric=symmetric)
    if name == "int8":
        q, scale, offset = int8.quantize_rows(x, symmetric=symmetric)
        assert offset is None if symmetric else torch.equal(found.zero_point, offset[:, 0])
    else:
        q, scale = float8.quantize_rows(x, op.FORMATS[name])
    assert torch.equal(found.q.view(torch.int8), q.view(torch.int8))
    assert torch.equal(found.scale, scale[:, 0])


def test_norm_reference_is_torchs():
    x, weight = make(9, 200, torch.bfloat16, "cpu"), torch.rand(200).bfloat16()
    assert torch.equal(op.rms_norm_reference(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (200,), weight, 1e-5))


def test_comparisons_reject_wrong_kernels():
    x = make(5, 1000, torch.float16, "cpu")
    right = op.reference(x, "int8")
    with pytest.raises(AssertionError, match="1 of 5000 codes differ"):
        assert_same_codes(right._replace(q=right.q.index_put((torch.tensor(0), torch.tensor(3)), right.q[0, 3] ^ 1)), right)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_codes(right._replace(scale=right.scale * 1.000001), right)
    with pytest.raises(AssertionError, match="not finite differ"):
        assert_same_codes(right._replace(scale=right.scale * float("nan")), right)
    weight = torch.rand(1000).half()
    assert norm_error(op.rms_norm_reference(x, weight, 1e-5), x, weight, 1e-5) == 1
    assert norm_error(op.rms_norm_reference(x, weight, 1e-5) * 1.02, x, weight, 1e-5) > 2


@pytest.mark.parametrize("scheme", [("int8", True), ("int8", False), ("float8_e4m3fn", True)], ids=str)
def test_neighbours_are_too_many_without_the_16_bit_rounding(scheme):
    name, symmetric = scheme
    gate, up = make(33, 1000, torch.bfloat16, "cpu"), torch.randn(33, 1000).bfloat16()
    rounded = op.reference(op.swiglu_reference(gate, up), name, symmetric=symmetric)
    unrounded = op.reference(op.swiglu_reference(gate.float(), up.float()), name, symmetric=symmetric)
    with pytest.raises(AssertionError, match="of the codes differ"):
        assert_near_codes(unrounded, rounded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: op.quantize_rows(x, "int4"), "format must be one of int8, float8_e4m3fn, float8_e5m2, float8_e4m3fnuz, got int4"),
        (lambda x: op.quantize_rows(x, "float8_e5m2", symmetric=False), "only int8 has a zero point, not float8_e5m2"),
        (lambda x: op.quantize_rows(x.double(), "int8"), r"x must be \[M, K\] .* got torch.float64 \(4, 8\)"),
        (lambda x: op.quantize_rows(x[None], "int8"), r"got torch.float32 \(1, 4, 8\)"),
        (lambda x: op.quantize_rows(x.t(), "int8"), r"rows of x must be contiguous, got strides \(1, 8\)"),
        (lambda x: op.quantize_rows(x[:, :0], "int8"), "must have 1 to 65536 columns, got 0"),
        (lambda x: op.quantize_rows(x.expand(4, 8).new_zeros(1, 65537), "int8"), "got 65537"),
        (lambda x: op.swiglu_quantize(x, x.half(), "int8"), r"up must be \[M, K\] .* all alike, got torch.float16 \(4, 8\)"),
        (lambda x: op.rms_norm_quantize(x, torch.ones(7), 1e-5, format="int8"), r"weight must be contiguous \[8\], got \(7,\)"),
        (lambda x: op.rms_norm_quantize(x, None, 1e-5, x[:2], format="int8"), r"residual must be \[M, K\] .* got torch.float32 \(2, 8\)"),
    ],
)
def test_calls_name_the_wrong_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 8))


def test_rows_fit_the_registers_of_their_warps():
    hopper = op.Device("NVIDIA H200", 132, 232448, True, True)
    for k in (1, 200, 384, 4096, 4099, 14336, 28672, op.MAX_COLUMNS):
        config = op.choose(k, hopper)
        assert config.block >= k
        assert config.rows * config.block <= 64 * 32 * config.num_warps
        assert config.overlap
    assert op.choose(384, hopper).rows == 4


@pytest.mark.parametrize("target", GPU_TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kernel", [jit.quantize, jit.rms_norm, jit.swiglu], ids=["quantize", "rms_norm", "swiglu"])
def test_compiles_without_contracted_roundings(target, scheme, kernel):
    on, (name, symmetric) = GPU_TARGETS[target], scheme
    text = compiler_for(target).compile(builds.quantized_rows(on, kernel, format=name, symmetric=symmetric)).assembly
    if on.cuda:
        assert ("cvt.rn.satfinite.e" in text) == (on.gpu.convert_fp8 and name in ("float8_e4m3fn", "float8_e5m2"))
        assert ("griddepcontrol.wait" in text) == on.gpu.dependent_launch
        assert "ld.global.v4.b32" in text
        assert "fma.rn.f32" not in text


def test_wide_and_odd_rows_compile_for_hopper():
    for k in (384, 14336, op.MAX_COLUMNS):
        build = builds.quantized_rows(GPU_TARGETS["sm_90"], jit.rms_norm, format="float8_e4m3fn", k=k)
        assert "ld.global" in compiler_for("sm_90").compile(build).assembly


INTERPRETED = """
import json, sys, torch, torch._dynamo.testing
sys.path.insert(0, sys.argv[1])
from kernel_pytorch.kernels import row_quant as op
import test_row_quant as t
failed, count = [], 0
def run(name, check, *args):
    global count
    count += 1
    try:
        check(*args)
    except AssertionError as error:
        failed.append(f"{name}{args}: {str(error)[:300]}")
for scheme in t.SCHEMES:
    run("nonfinite", t.check_nonfinite, "cpu", scheme)
    for dtype in (torch.float16, torch.float32):
        for m, k in t.SMALL:
            run("quantize", t.check_quantize, m, k, dtype, "cpu", scheme)
    for m, k in ((7, 200), (5, 1030)):
        run("norm", t.check_norm, m, k, torch.float16, "cpu", scheme)
        run("swiglu", t.check_swiglu, m, k, torch.float16, "cpu", scheme)
run("ties", t.check_ties, "cpu", False)
run("int8 ties", t.check_int8_ties, "cpu")
run("exact norm", t.check_exact_norm, torch.float16, "cpu")
run("poisoned", t.check_poisoned, "cpu")
x, weight = torch.ones(3, 64).half(), torch.ones(64)
ops, tests = torch.ops.kernel_pytorch, ("test_schema", "test_faketensor")
torch.library.opcheck(ops.quantize_rows.default, (x, "int8", False), test_utils=tests)
torch.library.opcheck(ops.swiglu_quantize.default, (x, x, "float8_e5m2", True), test_utils=tests)
torch.library.opcheck(ops.rms_norm_quantize.default, (x, weight, 1e-5, x, "float8_e4m3fn", True, True), test_utils=tests)
torch.library.opcheck(ops.rms_norm_quantize.default, (x, None, 1e-5, None, "int8", False, False), test_utils=tests)
seen = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
def chain(x):
    rows = op.rms_norm_quantize(x, weight, 1e-5, format="int8").rows
    return rows.q.float() * rows.scale[:, None]
compiled = torch.compile(chain, fullgraph=True, backend=seen)
same = [torch.equal(compiled(x), chain(x)) for x in (torch.randn(m, 64).half() for m in range(2, 8))]
empty = op.rms_norm_quantize(torch.ones(0, 64), None, 1e-5, torch.ones(0, 64), format="int8", symmetric=False)
shapes = [list(tensor.shape) for tensor in (empty.rows.q, empty.rows.zero_point, empty.total)]
print(json.dumps({"failed": failed, "count": count, "frames": seen.frame_count, "same": same, "empty": shapes}))
"""


@pytest.fixture(scope="module")
def interpreted():
    """Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter has a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_interpreted_kernels_give_the_references_codes(interpreted):
    assert interpreted["count"] == 5 * (1 + 2 * len(SMALL) + 4) + 4
    assert interpreted["failed"] == []


def test_compiled_once_for_static_and_once_for_any_m(interpreted):
    assert interpreted["frames"] == 2
    assert interpreted["same"] == [True] * 6
    assert interpreted["empty"] == [[0, 64], [0], [0, 64]]


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
    def test_codes_are_the_references(self, scheme, dtype):
        for m, k in op.SHAPES:
            if 0 < m * k <= 2**24:
                check_quantize(m, k, dtype, "cuda", scheme)
        check_nonfinite("cuda", scheme)

    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
    def test_norm_and_swiglu(self, scheme, dtype):
        for m, k in ((128, 4096), (16, 14336), (5, 4099), (7, 200)) if dtype == torch.bfloat16 else ((7, 200),):
            check_norm(m, k, dtype, "cuda", scheme)
            check_swiglu(m, k, dtype, "cuda", scheme)

    def test_ties_exact_norm_and_poisoned_outputs(self):
        check_ties("cuda", native=False)
        check_int8_ties("cuda")
        check_poisoned("cuda")
        for dtype in op.DTYPES:
            check_exact_norm(dtype, "cuda")

    def test_the_conversion_instruction_rounds_alike(self):
        if not op.device(0).convert_fp8:
            pytest.skip("this GPU has no float8 conversion")
        check_ties("cuda", native=True)

    def test_huge_and_tiny_magnitudes(self):
        x = torch.tensor([[3e38, -1e38, 1e30], [1e-38, 0, -1e-39], [1e-30, 3e-31, 1e-33]], device="cuda")
        for dtype in (torch.float32, torch.bfloat16):
            for name, symmetric in SCHEMES[:-1]:
                given = x.to(dtype)
                assert_same_codes(op.quantize_rows(given, name, symmetric=symmetric), op.reference(given, name, symmetric=symmetric))

    def test_offsets_beyond_32_bits(self):
        m, k = 2**17 + 3, 2**14 + 16
        if torch.cuda.mem_get_info()[0] < 3.5 * m * k:
            pytest.skip("needs 8 GB")
        x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
        x[-5:] = torch.randn(5, k, device="cuda")
        rows = op.quantize_rows(x, "int8")
        assert_same_codes(op.Rows(rows.q[-5:], rows.scale[-5:], None), op.reference(x[-5:], "int8"))

    def test_graph_capture_full_compile_and_opcheck(self):
        x, weight = make(4, 4096, torch.bfloat16, "cuda"), torch.ones(4096, dtype=torch.bfloat16, device="cuda")

        def chain(x):
            rows = op.rms_norm_quantize(x, weight, 1e-5, x, format="int8").rows
            gated = op.swiglu_quantize(x, x, "int8")
            plain = op.quantize_rows(x, "float8_e4m3fn")
            return rows.q.float() * rows.scale[:, None] + gated.q * gated.scale[:, None] + plain.q.float() * plain.scale[:, None]

        expected = chain(x)
        # The compiler contracts the products and sums around the operators.
        torch.testing.assert_close(torch.compile(chain, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x)
        for factor in (-1, 3, 1):
            x.mul_(factor)
            graph.replay()
            assert torch.equal(y, chain(x))
        torch.library.opcheck(torch.ops.kernel_pytorch.quantize_rows.default, (x, "float8_e4m3fn", True))
        torch.library.opcheck(torch.ops.kernel_pytorch.swiglu_quantize.default, (x, x, "int8", False))
        torch.library.opcheck(torch.ops.kernel_pytorch.rms_norm_quantize.default, (x, weight, 1e-5, x, "int8", True, True))
