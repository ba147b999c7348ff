"""4-bit weight x 16-bit input on sm_90's warpgroup instruction: configurations and generated code. Numerics: test_skinny_w4a16."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import triton

from kernel_pytorch.backends.kernel_compiler import compiler_for
from kernel_pytorch.kernels import builds
from kernel_pytorch.kernels import skinny_w4a16 as op
from kernel_pytorch.kernels import skinny_w4a16_space as space
from kernel_pytorch.kernels import skinny_w4a16_wgmma as wgmma
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS
from kernel_pytorch.kernels.skinny_w4a16_wgmma import WarpgroupConfig

HOPPER = op.Device("another Hopper", 132, 232448, True, True, True, warpgroups=True)
H100, OLDER = replace(HOPPER, name="NVIDIA H100 80GB HBM3"), replace(HOPPER, name="another", warpgroups=False)
CONFIGS = (
    WarpgroupConfig(2, 8, 64),
    WarpgroupConfig(1, 8, 128, depth=2, parts=1, left=1),
    WarpgroupConfig(2, 4, 32, parts=2, left=4, split=3),
    WarpgroupConfig(1, 4, 16, depth=3, parts=4, left=1, split=2),
    WarpgroupConfig(2, 8, 16, parts=1, left=2, split=8, overlap=False),
)


def code(config: WarpgroupConfig, **given: object) -> str:
    return compiler_for("sm_90").compile(builds.warpgroup_four_bits(GPU_TARGETS["sm_90"], config, **given)).assembly


def test_only_hopper_runs_it_on_wide_weights_and_above_the_rows_of_one_pass():
    assert wgmma.runs(HOPPER)
    assert not any(wgmma.runs(GPU_TARGETS[name].gpu) for name in GPU_TARGETS if name != "sm_90")
    kinds = {(m, n): type(op.choose(m, n, 5120, HOPPER)) for m in (8, 16, 32, 33, 300) for n in (5120, 27648)}
    assert {case for case, kind in kinds.items() if kind is WarpgroupConfig} == {
        (16, 27648),
        (32, 27648),
        *((m, n) for m in (33, 300) for n in (5120, 27648)),
    }
    assert type(op.choose(64, 5120, 5120, OLDER)) is op.Config


def test_a_measured_configuration_serves_where_it_runs():
    """The H200's rows serve an H100 that has none of its own; without the instruction the last row that needs it not does."""
    for n, k in op.LLAMA:
        table = op.tuned(H100.name)
        assert op.choose(50, n, k, H100) == table[n, k, 64] == op.tuned("NVIDIA H200")[n, k, 64]
        assert op.choose(300, n, k, H100) == op.choose(100, n, k, H100) == table[n, k, 128]
        assert isinstance(table[n, k, 64], WarpgroupConfig)
        assert op.choose(300, n, k, replace(H100, warpgroups=False)) == table[n, k, 32]
        assert type(table[n, k, 32]) is op.Config


def test_a_configuration_measured_for_fewer_columns_does_not_serve_more():
    """Without the instruction an H200's last row of 28672 x 4096 is that of M = 8, whose registers do not hold the sums of 32 rows."""
    h200 = replace(HOPPER, name="NVIDIA H200", warpgroups=False)
    assert op.choose(5, 28672, 4096, h200) == op.tuned("NVIDIA H200")[28672, 4096, 8]
    for m in (9, 16, 32, 64, 300):
        assert op.choose(m, 28672, 4096, h200) == op.choose(m, 28672, 4096, OLDER)


@pytest.mark.parametrize("missing", ["instruction", "triton"])
def test_a_crossover_of_warpgroups_counts_only_where_they_run(missing, monkeypatch):
    """Measured with them it is 384 rows here; without them it was 128 on all four layers."""
    monkeypatch.setattr(op, "device", lambda index: replace(HOPPER, name="NVIDIA H200"))
    assert op.crossover(28672, 4096, torch.device("cuda", 0)) == 384
    if missing == "triton":
        # Its Gluon has all the names, and compiles the kernel; nobody ran what it makes.
        monkeypatch.setattr(triton, "__version__", "3.5.1")
    else:
        monkeypatch.setattr(op, "device", lambda index: replace(HOPPER, name="NVIDIA H200", warpgroups=False))
    assert op.crossover(28672, 4096, torch.device("cuda", 0)) == 128
    # No warpgroups in what was measured, or nothing measured.
    monkeypatch.setattr(op, "tuned", lambda gpu: {})
    assert op.crossover(28672, 4096, torch.device("cuda", 0)) == 384
    assert op.crossover(28672, 4097, torch.device("cuda", 0)) == 128


def test_an_older_triton_does_not_run_it(monkeypatch):
    for version, runs in (("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), ("4.0.0", True)):
        monkeypatch.setattr(triton, "__version__", version)
        assert wgmma.runs(HOPPER) == runs
    monkeypatch.setattr(wgmma, "jit", None)
    assert not wgmma.runs(HOPPER)


def test_the_rule_fills_the_processors():
    for m, n, k in ((64, 28672, 4096), (64, 4096, 4096), (128, 2048, 14336), (40, 6144, 4096), (500, 4096, 256)):
        config = wgmma.choose(m, n, k, HOPPER)
        programs = -(-n // (16 * config.num_warps * config.tiles)) * config.steps(k)[1] * -(-m // config.block_m)
        assert programs >= (99 if config.num_warps == 8 else 192) or config.steps(k)[0] <= 4
    assert wgmma.choose(64, 28672, 4096, HOPPER) == WarpgroupConfig(2, 8, 64, parts=1, left=1)
    assert wgmma.choose(64, 4096, 14336, HOPPER) == WarpgroupConfig(2, 4, 64, parts=2, left=1, split=8)


def test_steps_are_even_and_hold_all_of_k():
    assert WarpgroupConfig(1, 8, 64).steps(4096) == (32, 1, True)
    assert WarpgroupConfig(1, 8, 64, split=8).steps(14336) == (14, 8, True)
    # Three steps and one of zeros; 33 in four programs of ten, the last of three.
    assert WarpgroupConfig(1, 8, 64).steps(384) == (4, 1, False)
    assert WarpgroupConfig(1, 8, 64, split=4).steps(4100) == (10, 4, False)


def test_no_weights_are_asked_for_past_the_last_step():
    """Where every step is K's, nothing else keeps a load inside the weight."""
    assert [WarpgroupConfig(1, 4, 16, depth=depth, left=1).ahead(512) for depth in (1, 4, 5)] == [1, 4, 4]
    deep = WarpgroupConfig(1, 4, 16, depth=5, left=1, split=2)
    assert (deep.ahead(512), deep.ahead(4096)) == (2, 5)
    built = builds.warpgroup_four_bits(GPU_TARGETS["sm_90"], deep, k=512)
    assert (built.constants["EVEN"], built.constants["STEPS"], built.constants["DEPTH"]) == (True, 2, 2)
    deepest = replace(deep, depth=2)
    assert space.neighbours(deepest, 16, 64, 512, torch.device("cpu")) == [replace(deep, depth=1)]


@pytest.mark.parametrize(("tiles", "parts", "left"), [(1, 1, 2), (1, 2, 3), (1, 4, 4), (2, 1, 3), (2, 4, 7)])
def test_no_product_under_way_reads_what_is_stored(tiles, parts, left):
    """When x of the next step is stored, a product of the step before must not be among those that still run."""
    with pytest.raises(ValueError, match=f"left must be at most {left - 1}"):
        WarpgroupConfig(tiles, 8, 64, parts=parts, left=left)
    WarpgroupConfig(tiles, 8, 64, parts=parts, left=left - 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_weights_go_from_a_lanes_words_to_the_product(config, dtype):
    """Two steps written out: a product takes 16 columns; no weight is stored, read back or shuffled on the way to it."""
    ptx = code(config, dtype=dtype)
    loop = ptx[ptx.index("wgmma.mma_async") : ptx.rindex("wgmma.mma_async")]
    assert ptx.count("wgmma.mma_async") == 2 * 8 * config.tiles
    assert f"m64n{config.block_m}k16.f32.{'bf16' if dtype == 'bf16' else 'f16'}" in loop
    assert "shfl" not in ptx
    assert "ld.shared" not in loop
    # Left operands are registers: a list of four before the descriptor of x.
    assert len(re.findall(r"\}, \{(%r\d+,?){4}\}, %rd\d+", ptx)) == 2 * 8 * config.tiles
    # One wait a product and one for the sums.
    assert ptx.count("wgmma.wait_group") == 2 * config.parts * config.tiles + 1


def test_no_register_is_spilled_where_all_eight_warps_have_two_tiles():
    compiled = compiler_for("sm_90").compile(builds.warpgroup_four_bits(GPU_TARGETS["sm_90"], WarpgroupConfig(2, 8, 64)))
    assert compiled.shared_bytes == 2 * 64 * 128 * 2
    assert ".local" not in compiled.assembly
