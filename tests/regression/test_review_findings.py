"""One test for each defect that a review reproduced. Nothing here is timed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernel_pytorch as kp
from kernel_pytorch.engine.apply import settle_receipts
from kernel_pytorch.errors import ConfigError, PerformanceError, UnsupportedOperationError, VerificationError
from kernel_pytorch.measure.ladder import MOST_ALLOWANCE, allowance
from kernel_pytorch.optimizer import replace_module, select_modules
from kernel_pytorch.precision.cast import Cast
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.report.result import Report, StepResult
from kernel_pytorch.verify.rows import agreement


def optimize(model, *overrides, args, **options):
    options = {"measure": False, "trained": False, **options}
    return kp.optimize(model, "eager", args=args, overrides=overrides, **options)


def seeded(model_class, *args):
    torch.manual_seed(0)
    return model_class(*args)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.lm_head = self.proj

    def forward(self, x):
        return self.lm_head(self.proj(x))


def test_a_module_under_two_names_is_replaced_under_both():
    model = seeded(TwoNames)
    replace_module(model, "proj", nn.Identity())
    assert isinstance(model.lm_head, nn.Identity)


def test_patterns_match_every_name_of_a_module():
    model = seeded(TwoNames)
    is_linear = lambda name, module: isinstance(module, nn.Linear)  # noqa: E731
    assert list(select_modules(model, is_linear, ["lm_head"], []).matched) == ["proj"]
    assert [skipped.module for skipped in select_modules(model, is_linear, [], ["lm_head"]).skipped] == ["proj"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.query(x) * self.key(x) + self.value(x)


def test_fusion_does_not_undo_an_exclude_of_precision():
    model = seeded(Attention)
    done = optimize(model, "fusion=qkv", "precision=int8_weight_only", "precision.exclude=[key]", args=(torch.randn(8, 32),))
    assert not [module for module in done.model.modules() if isinstance(module, QuantizedLinear)]


class Closure(nn.Module):
    """Calls the original's layer through a closure, whatever stands in the clone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.call = lambda x: self.fc(x)

    def forward(self, x):
        return self.call(x)


def test_changed_modules_that_nothing_calls_cannot_pass():
    with pytest.raises(VerificationError, match="calls none of the 1 modules"):
        optimize(seeded(Closure), "precision=int8_weight_only", args=(torch.randn(4, 32),))


def test_a_cast_that_breaks_a_model_with_random_weights_is_caught(monkeypatch):
    apply = Cast.apply

    def spoiled(self, model, context):
        applied = apply(self, model, context)
        next(applied.model.parameters()).data.zero_()
        return applied

    monkeypatch.setattr(Cast, "apply", spoiled)
    model = seeded(nn.Sequential, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    with pytest.raises(VerificationError, match="rounding alone explains"):
        optimize(model, "precision=bf16", args=(torch.randn(64, 32),))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)

    def forward(self, x):
        return self.a(x) + self.a(x[:3]).sum(0)


def test_every_call_of_a_shared_module_is_compared(monkeypatch):
    forward = QuantizedLinear.forward

    def wrong_for_few_rows(self, x):
        return forward(self, x) * (0 if x.shape[0] < 10 else 1)

    monkeypatch.setattr(QuantizedLinear, "forward", wrong_for_few_rows)
    with pytest.raises(VerificationError, match=r"^a is not what"):
        optimize(seeded(Shared), "precision=int8_weight_only", args=(torch.randn(40, 32),))


def test_rows_of_every_sample_are_compared():
    model = seeded(nn.Sequential, nn.Linear(16, 16))
    report = optimize(model, "precision=int8_weight_only", args=(torch.randn(8, 256, 16),)).report
    assert report.verification.rows == 2048


class WritesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        x.mul_(2)
        return self.fc(x)


def test_the_callers_input_is_never_changed():
    x = torch.randn(4, 32)
    before = x.clone()
    optimize(seeded(WritesItsInput), args=(x,))
    assert torch.equal(x, before)


def test_masked_logits_agree_where_both_are_infinite():
    first = torch.tensor([[1.0, -math.inf, 2.0]])
    assert agreement(first, first).cosine_min == pytest.approx(1.0)
    assert math.isnan(agreement(first, torch.tensor([[1.0, 3.0, -math.inf]])).sqnr_db)


def test_one_output_a_row_is_compared_as_a_column():
    first = torch.tensor([[1.0], [2.0], [1e-6]])
    assert agreement(first, torch.tensor([[1.0], [2.0], [-1e-6]])).cosine_min > 0.999999


def test_noise_cannot_excuse_more_than_a_little():
    assert allowance(Report(noise=1.6)) == MOST_ALLOWANCE == 0.05


def test_graph_decisions_show_no_speed_without_a_timed_verified_run():
    row = StepResult("graph", "auto", "CaptureWholeCall", "native", status="applied", changed=1)
    row.details["decisions"] = [
        {"inputs": "f32[1]", "captured": True, "reason": "2.0 times", "plain_ms": 2.0, "replay_ms": 1.0, "speedup": 2.0}
    ]
    row.details["decisions"][0] |= {"compiled_replay_ms": 1.0, "eager_replay_ms": 2.0, "code_reason": "0.5 times"}
    settle_receipts({"graph": row}, compilations=1, with_speed=False)
    assert row.details["decisions"] == [{"inputs": "f32[1]", "captured": True}]
    assert row.reason == ""


def test_overrides_of_model_and_data_are_refused():
    with pytest.raises(ConfigError, match=r"data\.batch=4"):
        optimize(nn.Linear(4, 4), "data.batch=4", args=(torch.randn(2, 4),))


def test_a_step_without_anything_to_change_says_so():
    model = seeded(nn.Sequential, nn.Conv1d(4, 4, 3))
    report = optimize(model, "precision=int8_weight_only", "compile=default", args=(torch.randn(2, 4, 16),)).report
    row = next(row for row in report.steps if row.group == "precision")
    assert (row.status, row.changed) == ("not_applicable", 0)
    assert "changed nothing" in row.reason


def test_inplace_with_a_cast_is_refused():
    with pytest.raises(UnsupportedOperationError, match="inplace"):
        optimize(seeded(nn.Sequential, nn.Linear(32, 32)), "precision=bf16", args=(torch.randn(4, 32),), inplace=True)


def test_a_memory_gate_is_judged_without_timing():
    with pytest.raises(PerformanceError, match="max_memory_ratio"):
        optimize(
            seeded(nn.Sequential, nn.Linear(64, 64)),
            "precision=int8_weight_only",
            "measure.max_memory_ratio=0.01",
            args=(torch.randn(4, 64),),
        )


class Functional(nn.Module):
    """Draws random numbers in eval mode."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.1, training=True)


def test_a_model_that_draws_random_numbers_is_compared_with_the_same_ones():
    report = optimize(seeded(Functional), "precision=int8_weight_only", args=(torch.randn(32, 64),)).report
    assert report.verification.cosine_min > 0.99


def test_include_of_one_part_of_a_merged_layer_does_not_take_the_others_along():
    report = optimize(
        seeded(Attention), "fusion=qkv", "precision=int8_weight_only", "precision.include=[query]", args=(torch.randn(8, 32),)
    ).report
    row = next(row for row in report.steps if row.group == "precision")
    assert row.changed == 0
    assert [skipped["reason"] for skipped in row.skipped] == ["merged with key, value, which no include pattern names; use fusion=none"]
