"""Attention of few query tokens: reference, choice and code generation here; numerics interpreted in f16; bf16 on the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.backends.kernel_compiler import compiler_for
from kernel_pytorch.kernels import builds
from kernel_pytorch.kernels import decode_attention as op
from kernel_pytorch.kernels.gpu_targets import GPU_TARGETS

H200 = op.Device("NVIDIA H200", 132, 232448, True)
MASKS = ("none", "tail", "bool", "rows")
SMALL = tuple(shape for shape in op.SHAPES if shape not in op.LLAMA and shape[4] < 2000)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
INF = float("inf")


class Inputs(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None


def make(shape: tuple[int, ...], dtype: torch.dtype, on: str, mask: str = "none") -> Inputs:
    """Inputs with a channel of outliers; keys and values as a projection leaves them, [B, S, K, D] in memory.

    mask: tail hides the last keys, by a number that broadcasts; bool hides some keys of each batch; rows adds numbers of its own
    to each score, and hides some."""
    b, h, k, t, s, d = shape
    rng = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(b, h, t, d, generator=rng)
    keys, values = (torch.randn(b, s, k, d, generator=rng).transpose(1, 2) for _ in range(2))
    keys[..., d // 2] *= 10
    made = None
    if mask == "tail":
        made = torch.zeros(1, 1, 1, s).masked_fill(torch.arange(s) > 0.6 * s, -INF).to(dtype)
    elif mask == "bool":
        made = torch.rand(b, 1, 1, s, generator=rng) > 0.3
        made[..., 0] = True
    elif mask == "rows":
        made = torch.randn(b, h, t, s, generator=rng).masked_fill(torch.rand(b, h, t, s, generator=rng) > 0.7, -INF).to(dtype)
        made[..., 0] = 0
    return Inputs(q.to(on, dtype), keys.to(on, dtype), values.to(on, dtype), None if made is None else made.to(on))


def as_double(inputs: Inputs) -> Inputs:
    query, key, value, mask = inputs
    return Inputs(query.double(), key.double(), value.double(), mask if mask is None or mask.dtype == torch.bool else mask.double())


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def assert_within_budget(actual: torch.Tensor, inputs: Inputs) -> None:
    exact = op.reference(*as_double(inputs))
    error, low = relative(actual, exact), relative(op.reference(*inputs), exact)
    assert error <= 2 * low, f"error {error:.2e} exceeds the budget 2 x {low:.2e}"


def check(shape: tuple[int, ...], dtype: torch.dtype, on: str, mask: str, config: op.Config | None) -> None:
    """Against the budget, into a poisoned output."""
    inputs = make(shape, dtype, on, mask)
    b, _, k, t, s, d = shape
    config = config or op.choose(b * k * -(-shape[1] // k * t // op.MAX_ROWS), s, d, op.device(0))
    out = torch.full(inputs.query.shape, float("nan"), dtype=dtype, device=on)
    op.launch(*inputs, d**-0.5, config, out)
    assert_within_budget(out, inputs)


def check_nonfinite(dtype: torch.dtype, on: str, config: op.Config) -> None:
    """Wherever torch's arithmetic gives NaN or an infinity, ours does, and everywhere else the same number."""
    shape = (1, 2, 1, 3, 40, 64)
    least = torch.finfo(dtype).min
    cases = {
        "query": ("query", (0, 1, 1, 5), float("nan")),
        "key": ("key", (0, 0, 33, 5), float("nan")),
        "infinite key": ("key", (0, 0, 33, 5), INF),
        "value": ("value", (0, 0, 12, 5), float("nan")),
        "infinite value": ("value", (0, 0, 12, 5), -INF),
        "mask": ("attn_mask", (0, 1, 1, 7), float("nan")),
        "infinite mask": ("attn_mask", (0, 1, 1, 7), INF),
        "row without keys": ("attn_mask", (0, 1, 2), -INF),
        "row of least numbers": ("attn_mask", (0, 1, 2), least),
        "hidden keys of a row": ("attn_mask", (0, 0, 0, slice(0, 32)), -INF),
    }
    for name, (argument, at, value) in cases.items():
        inputs = make(shape, dtype, on, "rows")
        getattr(inputs, argument)[at] = value
        expected = op.reference(*inputs)
        actual = op.launch(*inputs, 64**-0.5, config)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
        if name == "row without keys":
            assert actual[0, 1, 2].abs().max() == 0


def check_hidden_blocks_are_not_read(dtype: torch.dtype, on: str, config: op.Config) -> None:
    shape = (2, 4, 2, 1, 300, 64)
    for mask in ("tail", "bool"):
        inputs = make(shape, dtype, on, mask)
        if mask == "bool":
            inputs.attn_mask[...] = (torch.arange(300, device=on) >= 128) & (torch.arange(300, device=on) < 192)  # pyright: ignore
        expected = op.launch(*inputs, 0.125, config)
        assert_within_budget(expected, inputs)
        hidden = inputs.attn_mask == (-INF if mask == "tail" else False)
        blocks = hidden.reshape(-1, 300)[0].nonzero().flatten() // config.block_s
        whole = [
            block for block in blocks.unique().tolist() if (blocks == block).sum() == min(config.block_s, 300 - block * config.block_s)
        ]
        assert len(whole) >= 2
        for block in whole:
            for tensor in (inputs.key, inputs.value):
                tensor[:, :, block * config.block_s : (block + 1) * config.block_s] = float("nan")
        assert torch.equal(op.launch(*inputs, 0.125, config), expected)


@pytest.mark.parametrize("mask", MASKS)
def test_reference_is_torchs_attention(mask):
    inputs = as_double(make((2, 6, 2, 3, 20, 16), torch.float64, "cpu", mask))
    torch.testing.assert_close(op.reference(*inputs), scaled_dot_product_attention(*inputs, enable_gqa=True))
    torch.testing.assert_close(op.reference(*inputs, 0.5), scaled_dot_product_attention(*inputs, scale=0.5, enable_gqa=True))


def test_reference_of_a_row_without_keys_is_torchs():
    inputs = as_double(make((1, 2, 2, 2, 9, 16), torch.float64, "cpu", "rows"))
    assert inputs.attn_mask is not None
    inputs.attn_mask[0, 1, 0] = -INF
    y = op.reference(*inputs)
    assert y[0, 1, 0].abs().max() == 0
    torch.testing.assert_close(y, scaled_dot_product_attention(*inputs))


def test_budget_rejects_a_wrong_kernel():
    inputs = make((2, 4, 2, 3, 50, 64), torch.float16, "cpu", "rows")
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(op.reference(*inputs) * 1.02, inputs)
    late = Inputs(inputs.query, inputs.key[:, :, :-1], inputs.value[:, :, :-1], inputs.attn_mask[..., :-1])  # pyright: ignore
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_within_budget(op.reference(*late), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 1, 64)}, "query must be bfloat16 or float16 with 4 dimensions, all alike, got torch.float32"),
        ({"key": torch.zeros(1, 2, 9, 64).bfloat16()}, "key must be bfloat16 or float16 with 4 dimensions, all alike"),
        ({"value": torch.zeros(2, 9, 64).half()}, r"value must be .* 4 dimensions, all alike, got torch.float16 \(2, 9, 64\)"),
        ({"key": torch.zeros(1, 2, 64, 9).half().mT}, "the last dimension of key must be contiguous, got strides"),
        ({"key": torch.zeros(1, 3, 9, 64).half(), "value": torch.zeros(1, 3, 9, 64).half()}, r"\[1, heads that divide 4, keys, 64\]"),
        ({"value": torch.zeros(1, 2, 8, 64).half()}, r"got \(1, 2, 9, 64\) and \(1, 2, 8, 64\)"),
        ({"attn_mask": torch.zeros(1, 1, 1, 9, dtype=torch.int32)}, "attn_mask must be bool or floating, got torch.int32"),
        ({"attn_mask": torch.zeros(2, 4, 1, 9).half()}, r"attn_mask \(2, 4, 1, 9\) does not broadcast to \(1, 4, 1, 9\)"),
        ({name: torch.zeros(1, 4, 9, 264).half() for name in ("query", "key", "value")}, "head dimension must be 1 to 256, got 264"),
    ],
)
def test_attention_names_the_wrong_argument(change, message):
    given = {"query": torch.zeros(1, 4, 1, 64).half(), "key": torch.zeros(1, 2, 9, 64).half(), "value": torch.zeros(1, 2, 9, 64).half()}
    with pytest.raises(ValueError, match=message):
        op.attention(**(given | change))


def test_programs_fill_the_processors():
    for b, _, k, _, s, d in op.LLAMA:
        config = op.choose(b * k, s, d, H200)
        programs = b * k * min(config.split, -(-s // config.block_s))
        assert 132 < programs <= 2 * 132
    assert op.choose(8, 100, 128, H200).split == 2
    assert op.choose(1000, 4096, 128, H200).split == 1
    assert op.choose(8, 2048, 128, op.Device("A100", 108, 166912, False)).overlap == "none"


@pytest.mark.parametrize("name", GPU_TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "rows", "mask", "shared"), [(128, 4, "*bf16", True), (80, 48, "*u8", False), (256, 64, "*bf16", True)]
)
def test_compiles_to_matrix_instructions_within_shared_memory(name, head_dim, rows, mask, shared):
    on = GPU_TARGETS[name]
    config = op.choose(8, 2048, head_dim, on.gpu)
    build = builds.attend(on, config, head_dim=head_dim, rows=rows, mask=mask, shared=shared, partial=shared)
    code = compiler_for(name).compile(build)
    assert on.matrix_instruction in code.assembly
    assert code.shared_bytes <= on.gpu.shared
    if on.cuda:
        assert "cp.async" in code.assembly
        assert ("griddepcontrol.wait" in code.assembly) == (config.overlap != "none")


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_the_second_kernel_compiles(name):
    assert compiler_for(name).compile(builds.combine(GPU_TARGETS[name], head_dim=80)).shared_bytes <= 65536


INTERPRETED = """
import json, sys, torch, torch._dynamo.testing
sys.path.insert(0, sys.argv[1])
from kernel_pytorch.kernels import decode_attention as op
import test_decode_attention as t
failed, count = [], 0
def run(name, check, *args):
    global count
    count += 1
    try:
        check(*args)
    except AssertionError as error:
        failed.append(f"{name}{args}: {str(error)[:400]}")
half = torch.float16
whole, shared, alone = op.Config(32, 1, 4, 2, True), op.Config(16, 4, 4, 2, True), op.Config(64, 200, 4, 2, False)
for i, shape in enumerate(t.SMALL):
    for j, config in enumerate((whole, shared, alone)):
        run("check", t.check, shape, half, "cpu", t.MASKS[(i + j) % 4], config)
for config in (op.Config(16, 1, 4, 2, True), shared):
    run("nonfinite", t.check_nonfinite, half, "cpu", config)
    run("hidden", t.check_hidden_blocks_are_not_read, half, "cpu", config)
q, k, v, mask = t.make((2, 4, 2, 1, 40, 32), half, "cpu", "bool")
tests = ("test_schema", "test_faketensor")
torch.library.opcheck(op._attention, (q, k, v, mask, 0.2), test_utils=tests)
torch.library.opcheck(op._attention, (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, None, 0.2), test_utils=tests)
seen = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
compiled = torch.compile(lambda k, v, m: op.attention(q, k, v, m).relu(), fullgraph=True, backend=seen)
same = [torch.equal(compiled(k[:, :, :n], v[:, :, :n], mask[..., :n]), op.attention(q, k[:, :, :n], v[:, :, :n], mask[..., :n]).relu())
        for n in range(20, 24)]
empty = list(op.attention(q[:0], k[:0], v[:0]).shape)
print(json.dumps({"failed": failed, "count": count, "same": same, "frames": seen.frame_count, "empty": empty}))
"""


@pytest.fixture(scope="module")
def interpreted():
    """Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter has a process of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED, str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_interpreted_kernels_meet_the_budget_and_spread_what_is_not_finite(interpreted):
    assert interpreted["count"] == 3 * len(SMALL) + 4
    assert interpreted["failed"] == []


def test_compiled_once_for_static_and_once_for_any_number_of_keys(interpreted):
    assert interpreted["frames"] == 2
    assert interpreted["same"] == [True] * 4
    assert interpreted["empty"] == [0, 4, 1, 32]


class TestOnGpu:
    pytestmark = ON_GPU

    @pytest.mark.parametrize("shape", op.SHAPES, ids=str)
    def test_bf16_meets_the_budget_and_writes_every_element(self, shape):
        masks = ("tail",) if shape in op.LLAMA else MASKS
        for mask in masks:
            check(shape, torch.bfloat16, "cuda", mask, None)

    @pytest.mark.parametrize("shape", [op.LLAMA[0], (2, 12, 4, 3, 333, 80)], ids=str)
    def test_f16_meets_the_budget(self, shape):
        check(shape, torch.float16, "cuda", "tail", None)

    @pytest.mark.parametrize("config", [op.Config(32, 1, 4, 3, True), op.Config(32, 4, 4, 2, True, "late")], ids=str)
    def test_what_is_not_finite_and_what_is_hidden(self, config):
        check_nonfinite(torch.bfloat16, "cuda", config)
        check_hidden_blocks_are_not_read(torch.bfloat16, "cuda", config)

    def test_offsets_beyond_32_bits(self):
        gap = 2**27
        if torch.cuda.mem_get_info()[0] < 3 * 20 * gap:
            pytest.skip("needs 8 GB")
        q, k, v, _ = make((1, 2, 1, 1, 20, 64), torch.bfloat16, "cuda")
        far = torch.empty(20 * gap, dtype=torch.bfloat16, device="cuda").as_strided(k.shape, (0, 0, gap, 1))
        far.copy_(k)
        assert torch.equal(op.attention(q, far, v), op.attention(q, k, v))

    def test_graph_capture_full_compile_and_opcheck(self):
        q, k, v, mask = make((1, 8, 8, 4, 2056, 128), torch.bfloat16, "cuda", "tail")
        assert mask is not None

        def layer(q, k, v, mask):
            return torch.relu(op.attention(q * 2, k, v, mask))

        expected = layer(q, k, v, mask)
        assert torch.equal(torch.compile(layer, fullgraph=True)(q, k, v, mask), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(q, k, v, mask)
        for seen in (300, 2056, 1):
            mask.fill_(-INF)[..., :seen] = 0
            graph.replay()
            assert torch.equal(y, layer(q, k, v, mask))
        torch.library.opcheck(op._attention, (q, k, v, mask, 0.1))
