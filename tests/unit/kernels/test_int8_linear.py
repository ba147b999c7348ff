"""The C++ int8 kernel against its reference, on every path that this machine can run."""

import itertools

import pytest
import torch

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.kernels import int8_linear
from kernel_pytorch.schema import OnMismatch

ISA = CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate).facts.isa
PATHS = [
    path
    for path in ("int8_avx512_vnni", "int8_amx")
    if int8_linear.choose(ISA)[0] is not None and (path != "int8_amx" or int8_linear.choose(ISA)[0] == "int8_amx")
]
pytestmark = pytest.mark.skipif(not PATHS, reason=f"no int8 kernel here: {int8_linear.choose(ISA)[1]}")


def make_inputs(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 31 + k * 7 + n)
    x = torch.randn(m, k, generator=generator)
    x[:, k // 2] *= 40
    if m > 2:
        x[1] = 0
        x[2] = x[2].abs()
    q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, generator=generator) * 0.01 + 1e-4
    return x.to(dtype), q, scale, torch.randn(n, generator=generator)


def run(path: str, x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, symmetric: bool) -> torch.Tensor:
    sums = int8_linear.pad_outputs(q.sum(1, dtype=torch.int32))
    packed, padded = int8_linear.pack(q), int8_linear.pad_outputs(scale)
    return int8_linear.run(x, packed, padded, sums, bias, q.shape[0], symmetric=symmetric, amx=path == "int8_amx")


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize(("path", "shape", "symmetric"), list(itertools.product(PATHS, int8_linear.SHAPES, (False, True))))
def test_float32_matches_the_reference(path: str, shape: tuple[int, int, int], symmetric: bool) -> None:
    x, q, scale, bias = make_inputs(*shape, torch.float32)
    exact = int8_linear.reference(x.float(), q, scale, bias, symmetric=symmetric).double()
    actual = run(path, x, q, scale, bias, symmetric)
    assert actual.shape == (shape[0], shape[2])
    assert actual.dtype == torch.float32
    assert relative_error(actual, exact) <= 5e-7


@pytest.mark.parametrize("path", PATHS)
def test_gelu_is_as_exact_as_torchs(path: str) -> None:
    # A weight of zeros leaves the bias: every output is gelu of a chosen value.
    values = torch.linspace(-14, 14, 4096)
    zeros = torch.zeros(4096, 64, dtype=torch.int8)
    packed, padded, sums = int8_linear.pack(zeros), torch.zeros(4096), torch.zeros(4096, dtype=torch.int32)
    actual = int8_linear.run(torch.zeros(1, 64), packed, padded, sums, values, 4096, symmetric=False, amx=path == "int8_amx", gelu=True)
    exact = torch.nn.functional.gelu(values.double())
    allowed = (torch.nn.functional.gelu(values).double() - exact).abs().max()
    assert (actual[0].double() - exact).abs().max() <= allowed
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0]).repeat(1024)
    at_the_ends = int8_linear.run(
        torch.zeros(1, 64), packed, padded, sums, special, 4096, symmetric=False, amx=path == "int8_amx", gelu=True
    )
    assert at_the_ends[0, :2].tolist()[1] == float("inf")
    assert torch.isnan(at_the_ends[0, 0])
    assert at_the_ends[0, 3] == 0


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_rounds_once(path: str) -> None:
    x, q, scale, bias = make_inputs(37, 130, 70, torch.bfloat16)
    expected = int8_linear.reference(x.float(), q, scale, bias, symmetric=False)
    actual = run(path, x, q, scale, bias, False)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= 1.01 * relative_error(expected.to(torch.bfloat16), expected)


@pytest.mark.parametrize("path", PATHS)
def test_the_comparison_rejects_a_wrong_kernel(path: str) -> None:
    x, q, scale, bias = make_inputs(37, 130, 70, torch.float32)
    exact = int8_linear.reference(x, q, scale, bias, symmetric=False)
    assert relative_error(run(path, x, q, scale, None, False), exact) > 5e-7
    q[3, 5] += 6
    assert relative_error(run(path, x, q, scale, bias, False), exact) > 5e-7


@pytest.mark.parametrize("path", PATHS)
def test_zero_rows_give_the_bias_and_bad_rows_stay_alone(path: str) -> None:
    x, q, scale, bias = make_inputs(9, 64, 48, torch.float32)
    good = run(path, x, q, scale, bias, False)
    assert torch.equal(good[1], bias)
    x[4, 3], x[6, 0] = float("nan"), float("inf")
    actual = run(path, x, q, scale, bias, False)
    assert not torch.isfinite(actual[[4, 6]]).any()
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(actual[others], good[others])


@pytest.mark.parametrize("path", PATHS)
def test_leading_dimensions_strides_and_threads(path: str) -> None:
    x, q, scale, bias = make_inputs(2 * 3 * 64, 96, 80, torch.float32)
    flat = run(path, x, q, scale, bias, False)
    assert torch.equal(run(path, x.view(2, 3, 64, 96), q, scale, bias, False).view(-1, 80), flat)
    strided = x.t().contiguous().t()
    assert torch.equal(run(path, strided, q, scale, bias, False), flat)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(run(path, x, q, scale, bias, False), flat)
    finally:
        torch.set_num_threads(threads)


def test_all_paths_agree_bit_for_bit() -> None:
    x, q, scale, bias = make_inputs(100, 200, 90, torch.float32)
    first, *rest = [run(path, x, q, scale, bias, False) for path in PATHS]
    assert all(torch.equal(first, other) for other in rest)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 33), (64, 128)])
def test_unpack_undoes_pack(n: int, k: int) -> None:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    packed = int8_linear.pack(q)
    assert packed.shape == (-(-n // 16), -(-k // 64) * 16, 16, 4)
    assert torch.equal(int8_linear.unpack(packed, n, k), q)


def test_shapes_that_do_not_fit_are_value_errors() -> None:
    x, q, scale, bias = make_inputs(4, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="x has 130 inputs, the packed weight holds 64"):
        run(PATHS[0], torch.zeros(4, 130), q, scale, bias, False)
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        run(PATHS[0], x.double(), q, scale, bias, False)
    assert int8_linear.choose(("avx2",)) == (None, "the int8 kernel needs avx512_vnni")
