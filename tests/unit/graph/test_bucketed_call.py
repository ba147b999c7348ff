"""Padding and unpadding around any callable: exact on every output dim, refused where it would be wrong, counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.choices import BucketStrategy
from kernel_pytorch.errors import NoEffectError
from kernel_pytorch.graph.bucketed_call import BucketedCall
from kernel_pytorch.schema import BucketingConfig, GraphConfig


class Counted:
    """An inner callable that remembers the shapes, and the addresses, that it was called with."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.shapes: list[tuple[int, ...]] = []
        self.addresses: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self.shapes.append(tuple(first.shape))
        self.addresses.append(first.data_ptr())
        return self.call(*args, **kwargs)


def wrap(model: nn.Module, *dims: str, static: bool = False, strategy: str = "geometric", **bucketing: Any) -> tuple[BucketedCall, Counted]:
    inner = Counted(model._call_impl)
    config = BucketingConfig(strategy=BucketStrategy(strategy), **bucketing)
    call = BucketedCall(model.eval(), inner, dims, config, plain=model._call_impl, static_inputs=static)
    return call, inner


def straight(call: BucketedCall) -> list[str]:
    return [reason for reason in call.report["straight"] if reason != "answered by the plain call, to watch it"]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


class Tokens(nn.Module):
    """Positions on their own: [B, T] indices to [B, T, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.linear = nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.linear(self.embedding(input_ids)))


@dataclass(frozen=True)
class Encoded:
    hidden: torch.Tensor
    pooled: torch.Tensor
    extra: dict[str, Any]


class Encoder(nn.Module):
    """Self-attention with a mask of [B, T], and a masked mean: right for padding when the mask is padded with zeros."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, dim)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Encoded:
        x = self.embedding(input_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = None if attention_mask is None else attention_mask[:, None, :].bool()
        hidden = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        weights = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return Encoded(hidden, pooled, {"scores": q @ k.transpose(-1, -2), "name": "encoder"})


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 50, (batch, length))


@pytest.mark.parametrize("static", [False, True])
def test_sizes_of_one_bucket_share_its_shape_and_come_back_exact(static: bool) -> None:
    model = Tokens()
    call, inner = wrap(model, "input_ids:1", static=static)
    for length in (5, 6, 7, 8, 6, 3, 5):
        x = ids(2, length)
        expected = model._call_impl(x)
        actual = call(x)
        assert actual.shape == (2, length, 16)
        assert actual.stride() == expected.stride()
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)
    # 5 and 3 are the first padded ones of buckets 8 and 4, and answered by the plain call.
    assert inner.shapes == [(2, 8)] * 5
    assert straight(call) == []
    assert [row["sizes"] for row in call.report["buckets"]] == [{"size": 8}, {"size": 4}]


def test_waste_and_calls_are_counted() -> None:
    call, _ = wrap(Tokens(), "input_ids:1")
    for length in (5, 5, 6, 8, 3, 3):
        call(ids(2, length))
    rows = {row["sizes"]["size"]: row for row in call.report["buckets"]}
    # Bucket 8 after its first call: 5, 6 and 8 of 8. Bucket 4 after its first call: 3 of 4. Batch 2.
    assert [rows[8][key] for key in ("num_calls", "num_exact_calls", "real_elements", "padding_elements")] == [3, 1, 38, 10]
    assert rows[8]["waste"] == pytest.approx(10 / 38)
    assert [rows[4][key] for key in ("num_calls", "num_exact_calls", "real_elements", "padding_elements")] == [1, 0, 6, 2]
    assert call.waste == pytest.approx(12 / 44)
    assert call.report["straight"] == {"answered by the plain call, to watch it": 2}
    assert rows[8]["check"]["cut_dims"] == [{"1": "size"}]
    assert rows[8]["check"]["other_padding"] is True


def test_a_hidden_size_that_equals_the_padded_length_is_not_cut() -> None:
    class Coincidence(nn.Module):
        """hidden [B, T, 64], its transpose, and a [B, 64] state: T is padded to 64 too."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.linear(x)
            return hidden, hidden.transpose(1, 2), hidden[:, 0], torch.zeros(64, 64)

    model = Coincidence()
    call, inner = wrap(model, "x:1")
    for length in (50, 37, 63):
        x = torch.randn(2, length, 64)
        outputs = call(x)
        assert [tuple(output.shape) for output in outputs] == [(2, length, 64), (2, 64, length), (2, 64), (64, 64)]
        for actual, expected in zip(outputs, model._call_impl(x), strict=True):
            assert torch.allclose(actual, expected, atol=1e-6)
        assert [output.stride() for output in outputs[:2]] == [(64 * length, 64, 1), (64 * length, 1, 64)]
    assert inner.shapes == [(2, 64, 64)] * 2
    assert call.report["buckets"][0]["check"]["cut_dims"] == [{"1": "size"}, {"2": "size"}, {}, {}]


@pytest.mark.parametrize("static", [False, True])
def test_masks_are_padded_and_every_output_of_a_dataclass_is_cut(static: bool) -> None:
    model = Encoder()
    call, inner = wrap(model, "input_ids:1", "attention_mask:1", static=static)
    for length in (12, 9, 15, 16, 10):
        x, mask = ids(3, length), torch.ones(3, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        actual, expected = call(x, attention_mask=mask), model._call_impl(x, attention_mask=mask)
        assert type(actual) is Encoded
        assert actual.extra["name"] == "encoder"
        assert actual.extra["scores"].shape == (3, length, length)
        for a, b in (
            (actual.hidden, expected.hidden),
            (actual.pooled, expected.pooled),
            (actual.extra["scores"], expected.extra["scores"]),
        ):
            assert torch.allclose(a, b, atol=1e-6)
    assert straight(call) == []
    assert inner.shapes == [(3, 16)] * 4


def without_mask() -> tuple[nn.Module, tuple[str, ...], Callable[[int], tuple[torch.Tensor, ...]]]:
    return Encoder(), ("input_ids:1",), lambda length: (ids(2, length),)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(1, keepdim=True)


class FromTheEnd(nn.Module):
    """Does not see what the padding holds, only that it is there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(x.shape[1], 0, -1)[:, None]


class Sum(nn.Module):
    """Right only while padding is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)


class Blocks(nn.Module):
    """Mixes blocks of 4 positions: a call of a whole number of blocks does not show it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
        return (blocks - blocks.max(2, keepdim=True).values).flatten(1, 2)[:, : x.shape[1]]


class Flattens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1)


class Strided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2]


class Truncates(nn.Module):
    """Returns at most 20 positions: a size that looks constant from 20 on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :20] * 2


class Length(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x * 2, x.shape[1]


class LimitedTable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(24, 4)[torch.arange(x.shape[1])]


class Boxed(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        class Box:
            def __init__(self) -> None:
                self.value = x * 2

        return Box()


@pytest.mark.parametrize(
    ("model", "length", "reason"),
    [
        (Mean(), 20, "output 0 of a call of size 20 differs when it is padded"),
        (FromTheEnd(), 20, "output 0 of a call of size 20 differs when it is padded: relative L2 error 1"),
        (Sum(), 20, "output 0 of a call of size 20 depends on what the padding holds"),
        (Blocks(), 20, "output 0 of a call of size 19 "),
        (nn.Conv1d(20, 4, 3, padding=1), 20, "output 0 of a call of size 20"),
        (Flattens(), 20, "dim 0 of output 0 is 40 where size is 20, and 64 where it is 32: it cannot be cut"),
        (Strided(), 20, "dim 1 of output 0 is 10 where size is 20, and 16 where it is 32: it cannot be cut"),
        (Truncates(), 25, "output 0 is of shape (2, 20, 4) when padded, and of (2, 17, 4) when not"),
        (Length(), 20, "output 1 of a call of size 20 differs when it is padded"),
        (LimitedTable(), 20, "a padded call failed: index 24 is out of bounds"),
        (Boxed(), 20, "the output holds a Box, whose tensors cannot be cut"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_that_padding_would_change_are_refused_and_stay_right(model: nn.Module, length: int, reason: str) -> None:
    name, dim = ("input", 2) if isinstance(model, nn.Conv1d) else ("x", 1)
    call, inner = wrap(model, f"{name}:{dim}")
    for size in (length, length + 1, length - 1):
        x = torch.randn(2, 20, size) if dim == 2 else torch.randn(2, size, 4)
        actual, expected = call(x), model._call_impl(x)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(actual, expected)
    assert inner.shapes == []
    (found,) = straight(call)
    assert found.startswith(reason)
    assert call.report["straight"] == {found: 3}
    assert call.report["buckets"][0]["refused"] == found


def test_attention_without_a_mask_is_refused_and_a_call_that_fits_still_runs_inside() -> None:
    model = Encoder()
    call, inner = wrap(model, "input_ids:1", "attention_mask:1")
    for length in (12, 16, 13):
        x = ids(2, length)
        assert torch.equal(call(x).hidden, model._call_impl(x).hidden)
    assert inner.shapes == [(2, 16)]
    assert len(straight(call)) == 1
    mask = torch.ones(2, 12, dtype=torch.int64)
    call(x[:, :12], mask)
    call(x[:, :12], mask)
    # With a mask it is another kind of call.
    assert inner.shapes == [(2, 16)] * 2


class Mixes(Tokens):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = super().forward(input_ids)
        return hidden + hidden.mean(1, keepdim=True)


@pytest.mark.parametrize("static", [False, True])
def test_a_call_whose_indices_are_those_of_padding_decides_nothing(static: bool) -> None:
    """Averages and attention over equal positions are the same however many there are."""
    model, good = Mixes(), Tokens()
    for each, padded in ((model, False), (good, True)):
        call, inner = wrap(each, "input_ids:1", static=static)
        for first in (5, 6):
            assert torch.allclose(call(torch.zeros(2, first, dtype=torch.int64)), each._call_impl(torch.zeros(2, first, dtype=torch.int64)))
        assert straight(call) == ["all declared elements are what padding holds: a check would not see it"]
        for length in (6, 7, 5):
            x = ids(2, length)
            assert torch.allclose(call(x), each._call_impl(x), atol=1e-6)
        assert bool(inner.shapes) is padded


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    class Means(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.mean(1, keepdim=True)

    model = Means()
    call, inner = wrap(model, "x:1")
    call(torch.full((2, 5, 3), float("nan")))
    x = torch.randn(2, 6, 3)
    assert torch.equal(call(x), model._call_impl(x))
    assert inner.shapes == []
    assert straight(call) == ["output 0 has no finite value: nothing can be compared"]


def test_outputs_of_one_value_prove_nothing_and_are_not_looked_at_for_ever() -> None:
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + x.mean(1, keepdim=True) - 1e3).relu()

    model = Gated()
    call, inner = wrap(model, "x:1")
    call(torch.randn(2, 5, 3))
    x = torch.randn(2, 6, 3) + 1e3
    assert torch.equal(call(x), model._call_impl(x))
    assert inner.shapes == []
    assert len(straight(call)) == 1
    assert straight(call)[0].startswith("output 0")
    never, inner = wrap(Gated(), "x:1")
    for length in (5, 6, 5, 6, 5, 6):
        assert never(torch.randn(2, length, 3)).max() == 0
    assert inner.shapes == []
    assert straight(never) == ["outputs are one value over and over: nothing can be compared"]


def test_a_call_of_masks_alone_needs_no_other_padding() -> None:
    class Counts(nn.Module):
        def forward(self, mask: torch.Tensor) -> torch.Tensor:
            return mask.cumsum(1)

    call, inner = wrap(Counts(), "mask:1")
    for length in (5, 6, 7):
        mask = torch.zeros(2, length, dtype=torch.int64)
        assert torch.equal(call(mask), mask.cumsum(1))
    assert inner.shapes == [(2, 8)] * 2


@pytest.mark.parametrize("error", [AssertionError, KeyError, ZeroDivisionError, TypeError, AttributeError])
def test_a_size_that_the_model_refuses_with_an_error_is_not_padded_to(error: type[Exception]) -> None:
    class Limited(Tokens):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] > 10:
                raise error("too long")
            return super().forward(input_ids)

    model = Limited()
    call, _ = wrap(model, "input_ids:1")
    for _ in range(2):
        x = ids(2, 9)
        assert torch.equal(call(x), model._call_impl(x))
    assert [reason.replace("'", "") for reason in straight(call)] == ["a padded call failed: too long"]


@dataclass
class Derived:
    hidden: torch.Tensor

    def __post_init__(self) -> None:
        self.twice = [self.hidden * 2]


@dataclass
class Items(dict[str, Any]):
    hidden: torch.Tensor

    def __post_init__(self) -> None:
        self["hidden"] = self.hidden


@pytest.mark.parametrize("kind", [Derived, Items])
def test_tensors_of_a_dataclass_that_are_no_fields_refuse_padding(kind: Callable[..., Any]) -> None:
    class Wrapped(Tokens):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return kind(super().forward(input_ids))

    call, inner = wrap(Wrapped(), "input_ids:1")
    for length in (5, 6, 7):
        out = call(ids(2, length))
        other = out.twice[0] if isinstance(out, Derived) else out["hidden"]
        assert out.hidden.shape == other.shape == (2, length, 16)
    assert inner.shapes == []
    assert straight(call) == [f"the output holds a {kind.__name__}, whose tensors cannot be cut"]


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.uint8, "300"), (torch.uint8, "-1"), (torch.float16, "1e9"), (torch.int64, "0.5"), (torch.bool, "2")]
)
@pytest.mark.parametrize("size", [5, 8])
def test_padding_that_the_type_does_not_have_is_refused_in_calls_that_fit_too(dtype: torch.dtype, value: str, size: int) -> None:
    class Same(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() * 2

    call, _ = wrap(Same(), f"x:0={value}", static=True)
    for _ in range(3):
        assert call(torch.ones(size, dtype=dtype)).shape == (size,)
    assert straight(call) == [f"x is of {str(dtype).removeprefix('torch.')}, which has no {float(value)}"]


def test_a_mask_that_is_not_declared_as_one_is_found_out() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return (x * gate[..., None]).sum(1)

    x, gate = torch.randn(2, 5, 4), torch.rand(2, 5)
    refused, _ = wrap(Gate(), "x:1", "gate:1")
    refused(x, gate)
    assert straight(refused) == [
        "output 0 of a call of size 5 depends on what the padding holds: relative L2 error " + straight(refused)[0].split()[-1]
    ]
    declared, inner = wrap(Gate(), "x:1", "gate:1=0")
    assert torch.equal(declared(x, gate), Gate()(x, gate))
    assert torch.allclose(declared(x, gate), Gate()(x, gate), atol=1e-6)
    assert inner.shapes == [(2, 8, 4)]


def test_a_declared_value_fills_the_padding() -> None:
    class Max(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.max(1).values

    call, inner = wrap(Max(), "x:1=-1000000")
    x = -torch.rand(2, 5, 4)
    for _ in range(2):
        assert torch.equal(call(x), x.max(1).values)
    assert inner.shapes == [(2, 8, 4)]
    assert call.report["buckets"][0]["check"]["other_padding"] is False
    zeros, _ = wrap(Max(), "x:1=0")
    zeros(x)
    assert straight(zeros)[0].startswith("output 0 of a call of size 5 differs when it is padded")


def test_a_bias_is_padded_with_minus_infinity() -> None:
    class Biased(nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    call, inner = wrap(Biased(), "x:1", "bias:1=-inf", "bias:2=-inf")
    for length in (5, 6, 7):
        x, bias = torch.randn(2, length, 4), torch.randn(2, length, length)
        assert torch.allclose(call(x, bias), Biased()(x, bias), atol=1e-6)
    assert inner.shapes == [(2, 8, 4)] * 2
    zero, _ = wrap(Biased(), "x:1", "bias:1", "bias:2")
    zero(x, bias)
    assert straight(zero)[0].startswith("output 0 of a call of size 7 d")
    whole, _ = wrap(Tokens(), "input_ids:1=0.5")
    whole(ids(2, 5))
    assert straight(whole) == ["input_ids is of int64, which has no 0.5"]


def test_a_model_that_takes_no_parts_of_tensors_is_checked_with_whole_ones() -> None:
    class Views(Tokens):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids.view(-1)).view(*input_ids.shape, 16)

    call, inner = wrap(Views(), "input_ids:1")
    for length in (5, 6):
        assert call(ids(2, length)).shape == (2, length, 16)
    assert inner.shapes == [(2, 8)]


def test_runs_that_differ_anyway_are_judged_by_how_much() -> None:
    class Noisy(nn.Module):
        """As sums in no fixed order: each run is off by some 1e-7, from a generator that nobody looks at."""

        def __init__(self, leak: float) -> None:
            super().__init__()
            self.leak, self.generator = leak, torch.Generator().manual_seed(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(x.shape[0], generator=self.generator)[:, None, None] * 1e-7
            return x * (1 + noise) + self.leak * x.sum(1, keepdim=True)

    x = 1 + torch.rand(2, 5, 4)
    call, inner = wrap(Noisy(0.0), "x:1")
    for _ in range(2):
        assert torch.allclose(call(x), x)
    assert len(inner.shapes) == 1
    leaking, inner = wrap(Noisy(1e-4), "x:1")
    for _ in range(2):
        leaking(x)
    assert inner.shapes == []
    assert straight(leaking)[0].startswith("output 0 of a call of size 5 depends on what the padding holds: relative L2 error 0.00")


def test_two_sizes_are_told_apart_even_where_they_are_equal() -> None:
    class Outer(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return x[:, None, :] * y[None, :, :], x * 2, y * 3

    model = Outer()
    call, inner = wrap(model, "x:0@rows", "y:0@columns")
    for rows, columns in ((5, 5), (6, 7), (5, 8), (3, 5), (4, 6)):
        x, y = torch.randn(rows, 3), torch.randn(columns, 3)
        for actual, expected in zip(call(x, y), model(x, y), strict=True):
            assert torch.equal(actual, expected)
    assert inner.shapes == [(8, 3), (8, 3), (4, 3)]
    assert call.report["buckets"][0]["check"]["cut_dims"] == [{"0": "rows", "1": "columns"}, {"0": "rows"}, {"0": "columns"}]
    together, _ = wrap(Pairwise(), "x:0@rows", "y:0@columns")
    together(torch.randn(5, 3), torch.randn(5, 3))
    assert straight(together) == ["dim 0 of output 0 is 10 where rows is 5, and 13 where it is 8: it cannot be cut"]


class Pairwise(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y])


def test_a_size_that_fits_in_the_first_call_is_cut_in_later_ones() -> None:
    model = Tokens()
    call, inner = wrap(model, "input_ids:0@batch", "input_ids:1@length")
    for batch, length in ((4, 5), (3, 8), (3, 7), (4, 8)):
        x = ids(batch, length)
        assert torch.allclose(call(x), model(x), atol=1e-6)
    assert inner.shapes == [(4, 8)] * 3
    assert call.report["buckets"][0]["check"]["cut_dims"] == [{"0": "batch", "1": "length"}]


def test_a_call_of_a_buckets_size_is_handed_on_as_it_is() -> None:
    model = Tokens()
    call, inner = wrap(model, "input_ids:1")
    x = ids(2, 8)
    output = call(x)
    assert torch.equal(output, model(x))
    assert inner.addresses == [x.data_ptr()]
    assert call.report["straight"] == {}


def test_static_inputs_stay_where_they_are_and_hold_no_rest_of_a_longer_call() -> None:
    model = Encoder()
    call, inner = wrap(model, "input_ids:1", "attention_mask:1", static=True)
    for length in (10, 15, 9, 16, 12):
        x, mask = ids(2, length), torch.ones(2, length, dtype=torch.int64)
        assert torch.allclose(call(x, mask).pooled, model(x, mask).pooled, atol=1e-6)
    assert len(set(inner.addresses)) == 1
    assert call.report["buckets"][0]["buffer_bytes"] == 2 * 2 * 16 * 8
    kept = call(x, mask).hidden
    before = kept.clone()
    call(ids(2, 12), mask)
    assert torch.equal(kept, before)


def test_calls_that_fit_are_made_in_static_memory_once_they_are_known_to_write_to_nothing() -> None:
    model = Tokens()
    call, inner = wrap(model, "input_ids:1", static=True)
    xs = [ids(2, 8) for _ in range(4)]
    for x in xs:
        assert torch.equal(call(x), model(x))
    assert len(inner.addresses) == 3
    assert len(set(inner.addresses)) == 1
    assert not set(inner.addresses) & {x.data_ptr() for x in xs}
    assert call.report["straight"] == {"answered by the plain call, to watch it": 1}
    # Padded ones still have to be checked.
    call(ids(2, 7))
    assert len(inner.addresses) == 3
    call(ids(2, 7))
    assert inner.addresses[-1] == inner.addresses[0]
    boxed, inner = wrap(Boxed(), "x:1", static=True)
    x = torch.ones(2, 8, 4)
    for _ in range(3):
        boxed(x)
    assert inner.addresses == [x.data_ptr()] * 2


def test_an_output_that_is_an_argument_comes_back_as_it_and_a_view_of_one_as_a_copy() -> None:
    class Echo(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x[:1], x.sum(-1)

    call, inner = wrap(Echo(), "x:0", static=True)
    for size in (5, 6, 8):
        x = torch.randn(size, 3)
        same, view, total = call(x)
        assert same is x
        assert torch.equal(view, x[:1])
        assert torch.equal(total, x.sum(-1))
        call(torch.zeros(7, 3))
        assert torch.equal(view, x[:1])
    assert inner.shapes == [(8, 3)] * 5


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_is_padded_in_eval_mode_only(training: bool) -> None:
    model = nn.BatchNorm1d(4)
    call, inner = wrap(model, "input:0")
    model.train(training)
    for size in (5, 5, 6):
        before = int(model.num_batches_tracked)  # pyright: ignore[reportArgumentType]
        call(torch.randn(size, 4))
        assert int(model.num_batches_tracked) == before + training  # pyright: ignore[reportArgumentType]
    assert len(inner.shapes) == (0 if training else 2)
    assert straight(call) == (["the call writes to memory that outlives it, which padding would be written to"] if training else [])


def test_a_mode_that_changes_is_checked_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    call, inner = wrap(model, "input:0")
    x = torch.randn(5, 4)
    for _ in range(3):
        assert torch.allclose(call(x), model(x), atol=1e-6)
    assert len(inner.shapes) == 2
    model.train()
    assert (call(x) == 0).any()
    assert straight(call) == ["the call draws random numbers, and would draw others for another size"]
    assert len(inner.shapes) == 2


def test_weights_that_are_written_to_are_checked_again() -> None:
    class Gated(nn.Module):
        """Mixes positions as soon as the gate opens."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.gate * x.mean(0)

    with torch.inference_mode(False), torch.no_grad():
        model = Gated()
        call, inner = wrap(model, "x:0")
        x = torch.randn(5, 4)
        assert torch.equal(call(x), x)
        assert torch.equal(call(x), x)
        assert len(inner.shapes) == 1
        model.gate.fill_(1.0)
        for _ in range(2):
            assert torch.equal(call(x), model(x))
        # The call that found the weights changed was thrown away.
        assert len(inner.shapes) == 2
        assert straight(call)[0].startswith("output 0 of a call of size 5 differs")


def test_a_model_that_changes_in_every_call_is_left_alone_until_it_settles() -> None:
    with torch.inference_mode(False), torch.no_grad():
        model = nn.Linear(4, 4)
        call, inner = wrap(model, "input:0")
        x = torch.randn(5, 4)
        for value in range(30):
            model.weight.fill_(value)
            assert torch.equal(call(x), model(x))
        # Checked in the first call, padded in the second to find that it changed once more.
        assert len(inner.shapes) == 1
        assert call.report["straight"] == {
            "answered by the plain call, to watch it": 1,
            "the model changes from call to call": 29,
        }
        for _ in range(15):
            assert torch.allclose(call(x), model(x))
        assert call.report["buckets"][0]["num_calls"] == 4


def test_arguments_that_are_written_to_are_refused_and_written_once() -> None:
    class Appends(nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            cache.add_(1)
            return x * 2

    call, inner = wrap(Appends(), "x:0", "cache:0", static=True)
    cache = torch.zeros(5)
    for count in (1, 2):
        call(torch.ones(5), cache)
        assert cache.tolist() == [float(count)] * 5
    # Also where nothing has to be padded: the first one is watched, the others run inside, on the caller's own.
    cache, x = torch.zeros(8), torch.ones(8)
    for count in (1, 2):
        call(x, cache)
        assert cache.tolist() == [float(count)] * 8
    assert straight(call) == ["the call writes to memory that outlives it, which padding would be written to"]
    assert inner.shapes == [(8,)]
    assert inner.addresses == [x.data_ptr()]


def test_a_cache_object_is_refused_before_anything_runs_twice() -> None:
    class Cache:
        length = 0

    class Appends(nn.Module):
        def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
            cache.length += x.shape[0]
            return x * 2

    call, _ = wrap(Appends(), "x:0")
    cache = Cache()
    call(torch.ones(5), cache)
    assert cache.length == 5
    assert straight(call) == ["an argument is an object, what a padded call does to which could not be undone"]


def test_a_cache_in_an_attribute_is_refused_and_a_table_that_is_filled_once_is_not() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.keys.append(x.shape[0])
            return x * 2

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.largest = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.largest = max(self.largest, x.shape[0])
            return x * 2

    model = Remembers()
    call, inner = wrap(model, "x:0")
    for _ in range(4):
        call(torch.ones(5))
    assert model.keys == [5] * 4
    assert inner.shapes == []
    assert straight(call) == ["the call changes Python attributes of the model"]
    table, inner = wrap(Table(), "x:0")
    for _ in range(4):
        assert table(torch.arange(5.0)).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    # Filled for 5, then for 8; checked; run inside.
    assert inner.shapes == [(8,)]
    assert straight(table) == []


def test_what_is_not_padded_and_why() -> None:
    with torch.inference_mode(False):
        model = Tokens()
    call, inner = wrap(model, "input_ids:1", max_size=16)
    call(ids(2, 17))
    call(ids(2, 0))
    call(ids(2, 16))
    call(ids(1, 4)[0])
    with torch.inference_mode(False):
        call(torch.ones(2, 5, dtype=torch.int64))
    handle = model.linear.register_forward_hook(lambda *_: None)
    call(ids(2, 5))
    handle.remove()
    assert straight(call) == [
        "larger than the last bucket",
        "a declared dim has no elements",
        "input_ids has 1 dims, and no dim 1",
        "gradients are enabled",
        "a module has a forward hook, which would see padding",
    ]
    assert inner.shapes == [(2, 16)]
    encoder, _ = wrap(Encoder(), "input_ids:1", "attention_mask:1")
    with pytest.raises(RuntimeError):
        encoder(ids(2, 5), torch.ones(2, 6, dtype=torch.int64))
    assert straight(encoder) == ["dims declared as size differ in their elements"]


def test_declarations_are_of_arguments_that_are_there() -> None:
    with pytest.raises(NoEffectError, match=r"graph\.dynamic_dims: the model takes no argument 'input_idz'; it takes input_ids"):
        wrap(Tokens(), "input_idz:1")
    with pytest.raises(NoEffectError, match="no argument '3'"):
        wrap(Tokens(), "3:1")
    with pytest.raises(NoEffectError, match=r"x has padding of 0\.0 and 1\.0"):
        wrap(Mean(), "x:0=0", "x:1=1")
    with pytest.raises(NoEffectError, match=r"graph\.dynamic_dims: input_ids has 2 dims, and no dim 2; dims are counted from 0"):
        wrap(Tokens(), "input_ids:2")[0](ids(2, 5))
    by_position, inner = wrap(Tokens(), "0:-1")
    for _ in range(2):
        by_position(input_ids=ids(2, 5))
    assert inner.shapes == [(2, 8)]


def test_an_output_that_a_flag_changes_later_is_not_cut_by_the_old_rule() -> None:
    class Flag(nn.Module):
        wide = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x, x], 1) if self.wide else x * 2

    model = Flag()
    call, _ = wrap(model, "x:0")
    x = torch.randn(5)
    call(x)
    call(x)
    model.wide = True
    for _ in range(3):
        assert torch.equal(call(x), torch.stack([x, x], 1))
    assert straight(call) == ["the output is not shaped as it was when padding was checked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_small_error_that_padding_makes_is_seen_at_one_of_the_sizes_tried(dtype: torch.dtype) -> None:
    class OffByLength(nn.Module):
        """Scales by the length, unseen by the padding's values: by 3 % with 31 of 32, by 6 % with 30."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.shape[0]

    call, inner = wrap(OffByLength(), "x:0")
    x = torch.randn(31, 4, dtype=dtype)
    for _ in range(2):
        assert torch.equal(call(x), x / 31)
    assert inner.shapes == []
    assert straight(call)[0].startswith(f"output 0 of a call of size {30 if dtype is torch.bfloat16 else 31} differs")


def test_adaptive_buckets_are_fitted_to_the_calls_and_checked_again() -> None:
    model = Tokens()
    call, inner = wrap(model, "input_ids:1", strategy="adaptive", num_buckets=3, max_size=64, fit_after=8)
    assert call.report["sizes"] == {"size": [1, 2, 4, 8, 16, 32, 64]}
    for length in (9, 10, 9, 10, 33, 9, 10, 34):
        x = ids(2, length)
        assert torch.allclose(call(x), model(x), atol=1e-6)
    assert call.report["sizes"] == {"size": [10, 34, 64]}
    before = len(inner.shapes)
    for length in (9, 10, 9, 33, 34, 33):
        x = ids(2, length)
        assert torch.allclose(call(x), model(x), atol=1e-6)
    assert inner.shapes[before:] == [(2, 10), (2, 10), (2, 34), (2, 34)]


def test_memory_of_a_bucket_that_is_no_more_is_not_counted() -> None:
    call, _ = wrap(Tokens(), "input_ids:1", static=True, strategy="adaptive", num_buckets=2, max_size=64, fit_after=8)
    for length in (9, 10, 9, 10, 9, 10, 9):
        call(ids(2, length))
    assert {row["sizes"]["size"]: row["buffer_bytes"] for row in call.report["buckets"]} == {16: 2 * 16 * 8}
    for length in (10, 9, 9):
        call(ids(2, length))
    assert {row["sizes"]["size"]: row["buffer_bytes"] for row in call.report["buckets"]} == {16: 0, 10: 2 * 10 * 8}


def test_captures_and_compilations_are_counted_by_bucket() -> None:
    model = Tokens()
    seen: set[tuple[int, ...]] = set()

    def inner(input_ids: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(input_ids.shape))
        return model._call_impl(input_ids)

    call = BucketedCall(model.eval(), inner, ["input_ids:1"], BucketingConfig(), plain=model._call_impl, num_captures=lambda: len(seen))
    for length in (5, 6, 7, 3, 3, 8):
        call(ids(2, length))
    assert [(row["sizes"]["size"], row["captures"]) for row in call.report["buckets"]] == [(8, 1), (4, 1)]
    torch._dynamo.reset()
    model.compile(backend="eager", dynamic=False)
    compiled = BucketedCall(model, model._compiled_call_impl, ["input_ids:1"], BucketingConfig())  # pyright: ignore[reportArgumentType]
    for length in (5, 6, 7, 3, 3, 8, 5):
        compiled(ids(2, length))
    assert [(row["sizes"]["size"], row["compilations"]) for row in compiled.report["buckets"]] == [(8, 1), (4, 1)]


def test_threads_get_their_own_answers() -> None:
    model = Encoder()
    call, inner = wrap(model, "input_ids:1", "attention_mask:1", static=True)
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for _ in range(40):
                length = int(torch.randint(9, 17, (1,), generator=generator))
                x, mask = torch.randint(1, 50, (2, length), generator=generator), torch.ones(2, length, dtype=torch.int64)
                if not torch.allclose(call(x, mask).pooled, model._call_impl(x, mask).pooled, atol=1e-6):
                    wrong.append(length)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(inner.shapes) > 0


def test_tracing_by_an_outer_compile_sees_the_plain_call() -> None:
    model = Tokens()
    call, inner = wrap(model, "input_ids:1")
    outer = torch.compile(lambda x: call(x) + 1, backend="eager", fullgraph=True)
    x = ids(2, 5)
    assert torch.allclose(outer(x), model(x) + 1)
    assert inner.shapes == []


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([strategy.value for strategy in BucketStrategy]),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=12),
    st.booleans(),
)
def test_any_sequence_of_sizes_is_exact(strategy: str, calls: list[tuple[int, int]], static: bool) -> None:
    model = Encoder()
    dims = ("input_ids:0@batch", "input_ids:1@length", "attention_mask:0@batch", "attention_mask:1@length")
    call, _ = wrap(model, *dims, static=static, strategy=strategy, step=8, max_size=36, fit_after=4, num_buckets=3)
    with torch.inference_mode():
        for batch, length in calls:
            x, mask = ids(batch, length), torch.ones(batch, length, dtype=torch.int64)
            actual, expected = call(x, mask), model._call_impl(x, mask)
            assert actual.hidden.shape == expected.hidden.shape
            assert torch.allclose(actual.hidden, expected.hidden, atol=1e-5)
            assert torch.allclose(actual.pooled, expected.pooled, atol=1e-5)
            assert torch.allclose(actual.extra["scores"], expected.extra["scores"], atol=1e-5)


@pytest.mark.parametrize("text", ["x", "x:", "x:1@", "x:1=", "x:1.5", "x.y:1", "x:1=abc", "x:1@2", ":1"])
def test_what_is_no_declaration_is_said(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed ARGUMENT:DIM\[@SIZE\]\[=VALUE\], such as input_ids:1"):
        GraphConfig(dynamic_dims=[text])
    with pytest.raises(ValueError, match="allowed ARGUMENT:DIM"):
        wrap(Mean(), text)


@pytest.mark.parametrize("text", ["x:1", "0:-1", "x:0@batch", "x:1=-inf", "x:1@length=-1e9", "x:2=0.5"])
def test_what_is_a_declaration(text: str) -> None:
    assert GraphConfig(dynamic_dims=[text]).dynamic_dims == [text]
