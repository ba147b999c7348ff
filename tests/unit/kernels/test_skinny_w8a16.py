"""8-bit weight x 16-bit input, few rows: layout, choice and code generation here; numerics interpreted in f16; bf16 on the GPU."""

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
from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS

FORMATS = tuple(op.DTYPES)
H200 = op.Device("NVIDIA H200", 132, 232448, True, True)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(m: int, n: int, k: int, fmt: str, dtype: torch.dtype, on: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with one column of outliers, weight, scale, bias."""
    rng = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=rng)
    x[:, k // 2] *= 100
    if fmt == "int8":
        weight = torch.randint(-128, 128, (n, k), generator=rng).to(torch.int8)
    else:
        # Every code but NaN, subnormals included.
        codes = torch.randint(0, 254, (n, k), generator=rng)
        weight = (codes + (codes >= 127).int()).to(torch.uint8).view(torch.float8_e4m3fn)
    scale, bias = torch.rand(n, generator=rng) * 0.01 + 0.001, torch.randn(n, generator=rng)
    return x.to(dtype).to(on), weight.to(on), scale.to(on), bias.to(on)


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def assert_within_budget(
    actual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    row_scale: torch.Tensor | None = None,
) -> None:
    exact = op.reference(x.double(), weight, scale, bias, row_scale)
    error, low = relative(actual, exact), relative(op.reference(x, weight, scale, bias, row_scale), exact)
    assert error <= 2 * low, f"error {error:.2e} exceeds the budget 2 x {low:.2e}"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("k", [1, 200, 256, 1000])
def test_unpack_returns_what_pack_was_given(fmt, k):
    _, weight, _, _ = make(1, 5, k, fmt, torch.float32, "cpu")
    packed = op.pack(weight)
    assert packed.shape == (5, -(-k // 256) * 64)
    assert packed.dtype == torch.int32
    assert torch.equal(op.unpack(packed, k, weight.dtype).view(torch.int8), weight.view(torch.int8))


def test_packed_bytes_read_as_a_matrix_multiply_permuted_columns():
    x, weight, _, _ = make(3, 5, 300, "int8", torch.float64, "cpu")
    through = op.permute_columns(x) @ op.pack(weight).view(torch.int8).double().t()
    torch.testing.assert_close(through, x @ weight.double().t(), rtol=1e-12, atol=1e-9)


def test_pack_refuses_nan_and_other_dtypes():
    weight = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"got torch.float32 \(2, 4\)"):
        op.pack(weight)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        op.pack(weight.to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 256)}, "x must be bfloat16 or float16, got torch.float32"),
        ({"format": "float8_e5m2"}, "format must be one of int8, float8_e4m3fn, got float8_e5m2"),
        ({"packed": torch.zeros(4, 63, dtype=torch.int32)}, r"packed must be int32 \[N, 64\]"),
        ({"scale": torch.ones(3)}, r"scale must be contiguous float32 \[4\]"),
        ({"bias": torch.ones(4).half()}, r"bias must be contiguous float32 \[4\]"),
        ({"row_scale": torch.ones(4)}, r"row_scale must be contiguous float32, 1 numbers, got torch.float32 \(4,\)"),
        ({"row_scale": torch.ones(1).half()}, r"row_scale must be contiguous float32"),
    ],
)
def test_linear_names_the_wrong_argument(change, message):
    given = {"x": torch.zeros(1, 256).half(), "packed": torch.zeros(4, 64, dtype=torch.int32), "scale": torch.ones(4), "format": "int8"}
    with pytest.raises(ValueError, match=message):
        op.linear(**(given | change))


def test_budget_rejects_a_wrong_kernel():
    x, weight, scale, bias = make(7, 130, 200, "int8", torch.float16, "cpu")
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(op.reference(x, weight, scale, bias) * 1.02, x, weight, scale, bias)


def test_measured_configurations_cover_the_llama_layers_at_every_m():
    for n, k in op.LLAMA:
        assert {m for (rows_n, rows_k, m) in op.tuned("NVIDIA H200") if (rows_n, rows_k) == (n, k)} == set(op.ROWS)
        assert op.choose(3, n, k, H200) == op.tuned("NVIDIA H200")[n, k, 4]
        assert op.choose(1, n, k, H200).slices == 0


def test_rule_for_a_gpu_that_nobody_measured():
    a100 = op.Device("A100", 108, 166912, False, False)
    mi300 = op.Device("MI300X", 304, 65536, False, False)
    assert op.tuned("A100") == {}
    assert op.choose(1, 4096, 4096, a100) == op.Config(64, 128, 1, 4, 4, 3, "none")
    assert op.choose(8, 28672, 4096, a100) == op.Config(64, 128, 1, 1, 4, 3, "none")
    assert op.choose(8, 4096, 4096, mi300) == op.Config(64, 128, 1, 4, 4, 2, "none")
    assert op.choose(100, 1000, 1000, H200) == op.Config(64, 256, 1, 1, 4, 3, "late")


# Which of NVIDIA's matrix instructions tiles of this size become.
INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma", "gfx950": "v_mfma"}


@pytest.mark.parametrize("name", GPU_TARGETS)
@pytest.mark.parametrize(("fmt", "dtype"), [("float8_e4m3fn", "bf16"), ("int8", "fp16"), ("int8", "bf16"), ("float8_e4m3fn", "fp16")])
def test_compiles_to_matrix_instructions_within_shared_memory(name, fmt, dtype):
    on = GPU_TARGETS[name]
    code = compiler_for(name).compile(builds.eight_bits(on, op.choose(64, 28672, 4096, on.gpu), format=fmt, dtype=dtype))
    assert INSTRUCTIONS[name] in code.assembly
    assert code.shared_bytes <= on.gpu.shared


@pytest.mark.parametrize("fmt", FORMATS)
def test_h200_configurations_compile_within_its_shared_memory(fmt):
    for (_, _, m), config in op.tuned("NVIDIA H200").items():
        build = builds.eight_bits(GPU_TARGETS["sm_90"], config, format=fmt, block_m=op.block_m(m))
        assert compiler_for("sm_90").compile(build).shared_bytes <= H200.shared


INTERPRETED = """
import json, sys, torch, torch._dynamo.testing
sys.path.insert(0, sys.argv[1])
from kernel_pytorch.kernels import skinny_w8a16 as op
from test_skinny_w8a16 import FORMATS, make, relative
out = []
configs = [op.Config(16, 128, 4, 1, 4, 4), op.Config(64, 256, 1, 2, 4, 4), op.Config(32, 128, 2, 2, 4, 3), op.Config(2, 1024, 0, 1, 2, 1)]
for fmt in FORMATS:
    for m, n, k in ((7, 130, 200), (33, 257, 1000), (1, 1, 1), (1, 70, 1030), (65, 96, 520)):
        x, weight, scale, bias = make(m, n, k, fmt, torch.float16, "cpu")
        for row_scale in (None, torch.linspace(0.25, 1.0, m)):
            exact = op.reference(x.double(), weight, scale, bias, row_scale)
            low = relative(op.reference(x, weight, scale, bias, row_scale), exact)
            for config in configs:
                if config.slices or m == 1:
                    y = torch.full((m, n), float("nan"), dtype=torch.float16)
                    op.launch(x, op.pack(weight), scale, bias, fmt != "int8", config, y, row_scale)
                    name = f"{fmt} {m} {n} {k} slices={config.slices} row_scale={row_scale is not None}"
                    out.append((name, relative(y, exact), low))
packed, scale = op.pack(torch.ones(8, 256, dtype=torch.int8)), torch.ones(8)
seen = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
compiled = torch.compile(lambda x: op.linear(x, packed, scale, format="int8"), fullgraph=True, backend=seen)
rows = [compiled(torch.ones(m, 256).half()).sum().item() for m in range(2, 10)]
torch.library.opcheck(op._linear, (torch.ones(2, 256).half(), packed, scale, None, "int8"), test_utils=("test_schema", "test_faketensor"))
row_scale = torch.tensor([[0.5], [3.0]])
scaled = op.linear(torch.ones(2, 1, 256).half(), packed, scale, format="int8", row_scale=row_scale)[:, 0, 0].tolist()
torch.library.opcheck(
    op._linear, (torch.ones(2, 256).half(), packed, scale, None, "int8", row_scale), test_utils=("test_schema", "test_faketensor")
)
empty = op.linear(torch.ones(0, 3, 256).half(), packed, scale, format="int8")
print(json.dumps({"errors": out, "frames": seen.frame_count, "rows": rows, "empty": list(empty.shape), "scaled": scaled}))
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


def test_interpreted_kernels_meet_the_budget_on_odd_shapes(interpreted):
    assert len(interpreted["errors"]) == 68
    assert [name for name, error, low in interpreted["errors"] if not error <= 2 * low] == []


def test_compiled_once_for_static_and_once_for_any_m(interpreted):
    assert interpreted["frames"] == 2
    assert interpreted["rows"] == [256.0 * 8 * m for m in range(2, 10)]
    assert interpreted["empty"] == [0, 3, 8]


def test_row_scale_of_any_shape_multiplies_its_row(interpreted):
    assert interpreted["scaled"] == [0.5 * 256, 3.0 * 256]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("shape", [s for s in op.SHAPES if s[0] * s[1]])
    def test_meets_the_budget_and_writes_every_element(self, shape, fmt, dtype):
        x, weight, scale, bias = make(*shape, fmt, dtype, "cuda")
        m, n, k = shape
        y = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
        config = op.choose(m, n, k, op.device(0))
        op.launch(x, op.pack(weight), scale, bias, fmt != "int8", config, y)
        assert_within_budget(y, x, weight, scale, bias)

    @pytest.mark.parametrize(("m", "n"), [(1, 4096), (8, 4096), (8, 28672), (64, 4096)])
    def test_row_scale_is_applied_before_the_one_rounding(self, m, n, fmt, dtype):
        x, weight, scale, bias = make(m, n, 4096, fmt, dtype, "cuda")
        row_scale = torch.linspace(0.25, 1.0, m, device="cuda")
        y = op.linear(x, op.pack(weight), scale, bias, format=fmt, row_scale=row_scale)
        assert_within_budget(y, x, weight, scale, bias, row_scale)

    def test_small_inputs_keep_their_precision(self, fmt, dtype):
        x, weight, scale, bias = make(5, 256, 4096, fmt, dtype, "cuda")
        small = torch.finfo(dtype).smallest_normal * 4096
        x, bias = (x.float() * small).to(dtype), bias * 0
        scale = scale / small
        assert_within_budget(op.linear(x, op.pack(weight), scale, bias, format=fmt), x, weight, scale, bias)

    def test_graph_capture_and_full_compile_agree_with_eager(self, fmt, dtype):
        x, weight, scale, bias = make(4, 4096, 4096, fmt, dtype, "cuda")
        packed = op.pack(weight)

        def layer(x):
            return torch.relu(op.linear(x, packed, scale, bias, format=fmt))

        expected = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for sign in (-1, 1):
            x.mul_(sign)
            graph.replay()
            assert torch.equal(y, layer(x))
        assert torch.equal(y, layer(x))
        torch.library.opcheck(op._linear, (x, packed, scale, bias, fmt))
