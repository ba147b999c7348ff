"""4-bit weight x 16-bit input, few rows: layout, choice and code generation here; numerics interpreted in f16; bf16 on the GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernel_pytorch.backends.kernel_compiler import compiler_for
from kernel_pytorch.kernels import builds, split_k
from kernel_pytorch.kernels import skinny_w4a16 as op
from kernel_pytorch.kernels import skinny_w4a16_jit as jit
from kernel_pytorch.kernels import skinny_w4a16_wgmma as wgmma
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS
from kernel_pytorch.kernels.skinny_w4a16_wgmma import WarpgroupConfig
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import WeightConfig

FORMATS = tuple(op.BLOCK)
H100 = op.Device("NVIDIA H100 80GB HBM3", 132, 232448, True, True, True, warpgroups=True)
CLUSTERS = (op.Config(1, 4, 4, 1, split=8, cluster=True), op.Config(2, 4, 2, 1, 1, split=2, cluster=True, loop=True))
WARPGROUPS = (
    WarpgroupConfig(2, 8, 64),
    WarpgroupConfig(1, 8, 128, depth=2, parts=1, left=1),
    WarpgroupConfig(2, 4, 32, parts=2, left=4, split=3),
    WarpgroupConfig(1, 4, 16, depth=3, left=1, split=2),
    WarpgroupConfig(2, 8, 16, parts=1, left=2, split=8, overlap=False),
)
# Odd widths, fewer rows than a program has, one step, steps that no program's divide.
WARPGROUP_SHAPES = ((33, 257, 1000), (1, 1, 1), (65, 96, 4100), (16, 640, 2048), (130, 512, 4096), (64, 300, 128))
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(m: int, n: int, k: int, fmt: str, dtype: torch.dtype, on: str) -> tuple[torch.Tensor, op.Packed, torch.Tensor, torch.Tensor]:
    """x with one column of outliers, packed weight, its values from the canonical storage, bias."""
    rng = torch.Generator(on).manual_seed(m + n + k)
    x = torch.randn(m, k, generator=rng, device=on)
    x[:, k // 2] *= 100
    weight = torch.randn(n, k, generator=rng, device=on)
    weight[:, ::7] *= 8
    stored = STORAGES[fmt].quantize(weight, WeightConfig(format=fmt))
    packed = op.pack(stored["weight"], stored["weight_scale"], fmt, stored.get("weight_global_scale"))
    values = STORAGES[fmt].dequantize(stored, k)
    return x.to(dtype), packed, values, torch.randn(n, generator=rng, device=on)


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def assert_within_budget(actual: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> None:
    exact = op.reference(x.double(), values, bias)
    error, low = relative(actual, exact), relative(op.reference(x, values, bias), exact)
    assert error <= 2 * low, f"error {error:.2e} exceeds the budget 2 x {low:.2e}"


def assert_compiled_and_captured_alike(x: torch.Tensor, packed: op.Packed, bias: torch.Tensor, expected: torch.Tensor) -> None:
    compiled = torch.compile(lambda x: op.linear(x, packed, bias), fullgraph=True)
    assert torch.equal(compiled(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.linear(x, packed, bias)
    graph.replay()
    assert torch.equal(y, expected)


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
    codes, scale, global_scale = op.unpack(packed, fmt, k)
    assert torch.equal(codes, stored["weight"])
    assert torch.equal(scale.view(torch.uint8), stored["weight_scale"].view(torch.uint8))
    assert global_scale == stored.get("weight_global_scale")
    assert torch.equal(op.dequantize(packed, k), STORAGES[fmt].dequantize(stored, k))
    pairs = -(-k // 128)
    assert (packed.words.shape, packed.scales.shape) == ((1, 256 * pairs), (1, 128 * pairs))
    # 4.5 bits for each of 16 rows and 128 columns.
    assert packed.words.nbytes + packed.scales.nbytes == 16 * 128 * pairs * 4.5 / 8


class _HostReads(TorchFunctionMode):
    """Refuses what makes a tensor of Python numbers: on a GPU each is a copy from host memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_is_expanded_without_reading_host_memory(fmt):
    _, packed, values, _ = make(2, 16, 256, fmt, torch.float32, "cpu")
    with _HostReads():
        assert torch.equal(op.dequantize(packed, 256), values)
    # Both zeros, and every value of a code.
    codes = torch.arange(16, dtype=torch.uint8)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert op._values(codes).tolist() == [*magnitudes, *(-value for value in magnitudes)]
    assert op._values(codes)[8].signbit()


def test_every_code_and_every_scale_survives():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(1, 8)
    scale = torch.arange(1, 127, dtype=torch.uint8)[:128].view(torch.float8_e4m3fn).repeat(2)[:128].view(8, 16)
    packed = op.pack(codes, scale.view(16, 8).repeat(1, 2), "nvfp4", torch.tensor(0.5))
    found = op.unpack(packed, "nvfp4", 256)
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
        (lambda x, p, b: (x, p._replace(words=p.words[:, :-4]), b), r"words must be contiguous torch.int32 \(1, 256\)"),
        (lambda x, p, b: (x, p._replace(scales=p.scales[:, :-1]), b), r"scales must be contiguous torch.int8 \(1, 128\)"),
        (lambda x, p, b: (x, p._replace(channel=p.channel.double()), b), "channel must be contiguous torch.float32"),
        (lambda x, p, b: (x, p, b[:-1]), "bias must be contiguous torch.float32"),
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
        assert {m for m in (1, 8, 16, 32) if (n, k, m) in op.tuned(H100.name)} == {1, 8, 16, 32}
        assert op.choose(5, n, k, H100) == op.tuned(H100.name)[n, k, 8]
    # Above 32 rows programs of this kernel take 32 each.
    assert op.groups(50) == 4
    another = op.Device("another", 80, 100_000, False, False, True)
    assert op.choose(5, 4096, 4096, another) == op.Config(1, 4, 4, 2, 1, split=4, registers=64, overlap=False)
    assert op.choose(32, 28672, 4096, another) == op.Config(2, 4, 4, 1, 0, split=2, overlap=False)


@pytest.mark.parametrize("name", GPU_TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("m", [8, 32])
def test_compiles_to_matrix_instructions_within_shared_memory(name, dtype, m):
    on = GPU_TARGETS[name]
    if on.cuda:
        build = builds.four_bits(on, op.choose(m, 4096, 4096, on.gpu), m=m, dtype=dtype)
    else:
        build = builds.portable_four_bits(on, block_m=max(16, m), dtype=dtype)
    code = compiler_for(name).compile(build)
    assert ("mma.sync" if on.cuda else "v_mfma") in code.assembly
    assert code.shared_bytes <= on.gpu.shared


def test_no_weight_crosses_a_lane():
    """Until the sums meet, the NVIDIA kernel has no shared memory, no shuffle: what a lane loads is what it multiplies."""
    config = op.Config(1, 4, 1, 2, 1, split=2, registers=64, overlap=False)
    ptx = compiler_for("sm_90").compile(builds.four_bits(GPU_TARGETS["sm_90"], config)).assembly
    loop = ptx[: ptx.rindex("mma.sync")]
    assert "st.shared" not in loop
    assert "shfl" not in loop
    # Words and x as vectors of four, one load of each for its step: 4 steps of 2 and 4.
    assert len(re.findall(r"ld\.global\.L1::evict_first\S*\.v4", loop)) == 8
    assert len(re.findall(r"ld\.global\.L1::evict_last\S*\.v4", loop)) == 16
    assert loop.count("mma.sync") == 31


@pytest.mark.parametrize(
    ("m", "config", "sent"), [(8, op.Config(1, 4, 4, 1, split=8, cluster=True), 1), (32, op.Config(2, 4, 4, 1, split=4, cluster=True), 8)]
)
def test_programs_of_a_cluster_sum_in_shared_memory(m, config, sent):
    """Each of a warp's groups of 16 x 8 sums is sent to the one program that adds it; nothing is written for a second kernel."""
    build = builds.four_bits(GPU_TARGETS["sm_90"], config, m=m)
    assert (build.constants["CLUSTER"], build.constants["PARTIAL"], build.options["num_ctas"]) == (config.split, False, config.split)
    ptx = compiler_for("sm_90").compile(build).assembly
    assert ptx.count("st.shared::cluster.v4.f32") == sent
    own = -(-sent // config.split)
    assert ptx.count("ld.shared.v4.f32") >= own * config.split
    # One arrival at the start, one after the sums are sent; each is waited for.
    assert (ptx.count("barrier.cluster.arrive"), ptx.count("barrier.cluster.wait")) == (2, 2)


def test_a_cluster_is_left_out_where_the_gpu_has_none():
    config = op.Config(1, 4, 4, 1, split=8, cluster=True)
    assert op.runnable(config, H100).cluster
    assert op.runnable(config, GPU_TARGETS["sm_80"].gpu) == op.Config(1, 4, 4, 1, split=8, overlap=False)
    # A cluster has as many programs as it is told, also where some of them have no columns.
    assert config.steps(640) == (1, 8, False)
    assert op.Config(1, 4, 4, 1, split=8).steps(640) == (1, 5, True)


def test_no_more_is_asked_for_ahead_than_there_is():
    """In a loop x may not run ahead of the weights: the last steps, which are not in it, would not be there to stop at."""
    assert op.Config(1, 4, 1, 3, depth_x=3).ahead(4096) == (3, 3)
    assert op.Config(1, 4, 1, 2, depth_x=3).ahead(4096) == (2, 3)
    assert op.Config(1, 4, 1, 2, depth_x=3, loop=True).ahead(4096) == (2, 2)
    assert op.Config(1, 4, 1, 3, depth_x=3).ahead(1024) == (2, 1)


def interpreted_cases() -> None:
    """Runs in a process with Triton's interpreter: prints one line a case."""
    for fmt in FORMATS:
        for m, n, k in ((7, 130, 200), (33, 70, 520), (1, 1, 1), (9, 64, 512), (0, 64, 64)):
            x, packed, values, bias = make(m, n, k, fmt, torch.float16, "cpu")
            actual = op.launch(x, packed, bias, op.Config(1, 4, 1, 1), torch.full((m, n), float("nan"), dtype=torch.float16))
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
        chosen = op.choose(shape[0], shape[1], shape[2], op.device(0))
        for config in (chosen, op.Config(2, 4, 2, 2, 0, split=3), op.Config(1, 8, 1, 1, 1), op.Config(1, 4, 4, 2), *CLUSTERS):
            if config is chosen or shape[0] * shape[1] < 2**18:
                actual = op.launch(x, packed, bias, config, x.new_full((shape[0], shape[1]), float("nan")))
                assert torch.isfinite(actual).all()
                assert_within_budget(actual, x, values, bias)

    def test_unaligned_rows_and_the_portable_kernel_agree(self, fmt, dtype):
        x, packed, values, bias = make(5, 96, 384, fmt, dtype, "cuda")
        shifted = torch.cat((x.flatten(), x.flatten()))[1 : 1 + x.numel()].view(5, 384)
        assert_within_budget(op.linear(shifted, packed, bias), shifted, values, bias)
        out = x.new_full((5, 96), float("nan"))
        jit.tile[(1, 1)](x, *packed, bias, out, 5, 96, 384, 6, 3, HAS_BIAS=True, BLOCK_M=16, ROWS=8)
        assert_within_budget(out, x, values, bias)

    def test_more_rows_than_a_grid_has_and_scales_inside_another_tensor(self, fmt, dtype):
        x, packed, values, bias = make(split_k.MOST_ROWS + 2, 48, 512, fmt, dtype, "cuda")
        inside = torch.cat((packed.scales.flatten()[:1], packed.scales.flatten()))[1:].view(packed.scales.shape)
        for config in (op.Config(1, 4, 4, 1, split=2), CLUSTERS[0], op.choose(len(x), 48, 512, op.device(0))):
            assert_within_budget(op.launch(x, packed._replace(scales=inside), bias, config), x, values, bias)

    def test_graph_capture_full_compile_and_opcheck(self, fmt, dtype):
        x, packed, _, bias = make(4, 512, 1024, fmt, dtype, "cuda")
        expected = op.linear(x, packed, bias)
        assert_compiled_and_captured_alike(x, packed, bias, expected)
        torch.library.opcheck(torch.ops.kernel_pytorch.skinny_w4a16.default, (x, *packed, bias))

    def test_an_expanded_weight_is_captured(self, fmt, dtype):
        _, packed, values, _ = make(4, 512, 1024, fmt, dtype, "cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = op.dequantize(packed, 1024)
        y.zero_()
        graph.replay()
        assert torch.equal(y, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", FORMATS)
class TestWarpgroupsOnGpu:
    pytestmark = ON_GPU

    @pytest.fixture(autouse=True)
    def _hopper(self):
        if not wgmma.runs(op.device(0)):
            pytest.skip("needs sm_90 and Triton 3.6")

    @pytest.mark.parametrize("shape", WARPGROUP_SHAPES)
    def test_meets_the_budget_and_writes_every_element(self, shape, fmt, dtype):
        x, packed, values, bias = make(*shape, fmt, dtype, "cuda")
        for config in (*WARPGROUPS, wgmma.choose(*shape, op.device(0))):
            actual = op.launch(x, packed, bias, config, x.new_full((shape[0], shape[1]), float("nan")))
            assert torch.isfinite(actual).all()
            assert_within_budget(actual, x, values, bias)
            assert torch.equal(op.launch(x, packed, bias, config), actual)

    def test_without_a_bias_and_with_a_wrong_scale(self, fmt, dtype):
        x, packed, values, _ = make(64, 512, 1024, fmt, dtype, "cuda")
        for config in WARPGROUPS[:2]:
            assert_within_budget(op.launch(x, packed, None, config), x, values, torch.zeros(512, device="cuda"))
            wrong = packed._replace(scales=packed.scales ^ 16)
            assert not torch.equal(op.launch(x, wrong, None, config), op.launch(x, packed, None, config))

    def test_what_warps_store_and_read_in_turn_is_never_mixed_up(self, fmt, dtype):
        """Many programs of many steps, again and again: a step whose x was overwritten early would show in some of them."""
        x, packed, values, bias = make(64, 28672, 4096, fmt, dtype, "cuda")
        for config in (
            WARPGROUPS[0],
            WarpgroupConfig(2, 8, 64, parts=1, left=2),
            WarpgroupConfig(1, 8, 64, left=3),
            WarpgroupConfig(2, 4, 64),
        ):
            first = op.launch(x, packed, bias, config)
            assert_within_budget(first, x, values, bias)
            assert all(torch.equal(op.launch(x, packed, bias, config), first) for _ in range(20))

    def test_graph_capture_and_full_compile(self, fmt, dtype):
        """More rows than one pass of the other kernel holds, in a layer that nobody measured: the rule's configuration runs."""
        x, packed, values, bias = make(48, 640, 1024, fmt, dtype, "cuda")
        assert isinstance(op.choose(48, 640, 1024, op.device(0)), WarpgroupConfig)
        expected = op.linear(x, packed, bias)
        assert_within_budget(expected, x, values, bias)
        assert_compiled_and_captured_alike(x, packed, bias, expected)
