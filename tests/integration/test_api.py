"""`kernel_pytorch.optimize` on modules that the library never saw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.engine import api
from kernel_pytorch.errors import ConfigError, NoEffectError, UnsupportedOperationError, VerificationError
from kernel_pytorch.precision.quantized_linear import QuantizedLinear


class Branches(nn.Module):
    """Two branches on one input, an odd width, a tied head, a buffer, and control flow on an argument."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.odd, self.tiny = nn.Linear(64, 33), nn.Linear(33, 4)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, gate=True):
        h = self.dropout(self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2))
        mixed = self.left(h) * torch.sigmoid(self.right(h)) if gate else self.left(h)
        return {"logits": self.head(mixed), "aux": self.tiny(torch.relu(self.odd(mixed)))}


def branches():
    torch.manual_seed(0)
    return Branches(), torch.randint(0, 100, (16, 20))


def snapshot(model):
    return {name: (tensor.data_ptr(), tensor.dtype, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_untouched(model, before, training):
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (address, dtype, value) in before.items():
        assert after[name].data_ptr() == address, name
        assert after[name].dtype == dtype, name
        assert torch.equal(after[name], value), name
    assert model.training is training
    assert not [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


# Every optimizer that changes something on a CPU, by the override that asks for it.
STEPS = [
    "precision=int8_weight_only",
    "precision=int8_dynamic",
    "precision=fp8_weight_only",
    "precision=fp8_dynamic",
    "precision=bf16",
    "precision=fp16",
    "fusion=qkv",
    "compile=default",
]


@pytest.mark.parametrize("override", STEPS)
def test_the_callers_model_is_bit_identical_after_every_optimizer(override):
    model, x = branches()
    before = snapshot(model)
    done = kp.optimize(model, "eager", args=(x,), overrides=[override], trained=False, measure=False)
    assert_untouched(model, before, training=True)
    assert done.report.verdict in ("pass", "emulated")
    assert done.report.exit_code == 0
    assert done.model.training is False
    assert done.report.verification.implementation.passed is True
    assert done.model.state_dict().keys() >= {"embed.weight", "norm.running_mean"}


def test_receipt_of_a_module_with_branches_tied_weights_and_odd_widths():
    model, x = branches()
    report = kp.optimize(model, "eager", args=(x,), overrides=["precision=int8_weight_only"], trained=False, measure=False).report
    row = next(row for row in report.steps if row.group == "precision")
    skipped = {entry["module"]: entry["reason"] for entry in row.skipped}
    assert (row.changed, row.matched) == (3, 5)
    assert set(skipped) == {"tiny", "head"}
    assert "min_features=16" in skipped["tiny"]
    assert "embed" in skipped["head"]
    # int8 values, one float32 scale an output channel, the float32 bias: 2 x (64 x 64) + 33 x 64 values, 161 channels.
    assert row.bytes_before == 4 * (2 * 64 * 64 + 33 * 64 + 161)
    assert row.bytes_after == (2 * 64 * 64 + 33 * 64) + 4 * (161 + 161)


def test_outputs_stay_close_and_keyword_arguments_work():
    model, x = branches()
    model.eval()
    done = kp.optimize(
        model, "eager", args=(x,), kwargs={"gate": False}, overrides=["precision=int8_dynamic"], measure=False, trained=False
    )
    with torch.no_grad():
        expected, actual = model(x, gate=False), done.model(x, gate=False)
    for name in ("logits", "aux"):
        error = (expected[name] - actual[name]).norm() / expected[name].norm()
        assert error < 0.03


class Fails(nn.Module):
    """Raises in the call that steps watch the model with, after some modules were already replaced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if isinstance(self.first, QuantizedLinear):
            raise RuntimeError("half-way")
        return self.second(self.first(x))


def test_the_callers_model_is_untouched_when_a_step_raises_half_way():
    torch.manual_seed(0)
    model = Fails()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="half-way"):
        kp.optimize(model, "eager", args=(torch.randn(4, 32),), overrides=["precision=int8_dynamic"], measure=False)
    assert_untouched(model, before, training=True)


def test_a_planted_wrong_scale_is_caught_end_to_end(monkeypatch):
    """Through the whole engine: one scale five percent off ends in VerificationError with the module's name."""
    original = QuantizedLinear.from_linear

    def spoiled(linear, *args, **kwargs):
        layer = original(linear, *args, **kwargs)
        if linear.out_features == 48:
            layer.weight_scale.mul_(1.05)
        return layer

    monkeypatch.setattr(QuantizedLinear, "from_linear", staticmethod(spoiled))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))
    with pytest.raises(VerificationError, match=r"^2 is not what its scheme computes") as caught:
        kp.optimize(model, "eager", args=(torch.randn(32, 64),), overrides=["precision=int8_weight_only"], measure=False)
    assert caught.value.report.verdict == "numerics"
    assert caught.value.report.exit_code == 5
    assert caught.value.report.verification.first_divergence == "2"


def test_errors_carry_the_report():
    model, x = branches()
    with pytest.raises(NoEffectError, match=r"'nothing\*'") as caught:
        kp.optimize(model, "eager", args=(x,), overrides=["precision=int8_dynamic", "precision.include=[nothing*]"], measure=False)
    assert caught.value.report.verdict == "no_effect"
    assert [row.group for row in caught.value.report.steps] == ["attention", "fusion", "precision", "memory", "compile", "graph"]


def test_config_mistakes_raise_before_anything():
    model, x = branches()
    with pytest.raises(ConfigError, match="cpu_int8"):
        kp.optimize(model, "cpu_int9", args=(x,))


def test_a_recipe_for_another_machine_can_be_refused():
    model, x = branches()
    with pytest.raises(UnsupportedOperationError, match="a100"):
        kp.optimize(model, "a100_fp8", args=(x,), overrides=["backend.on_mismatch=error"])


def test_inplace_changes_the_model_itself():
    model, x = branches()
    done = kp.optimize(model, "eager", args=(x,), overrides=["precision=int8_weight_only"], measure=False, trained=False, inplace=True)
    assert done.model is model
    assert isinstance(model.left, QuantizedLinear)


def test_a_loaded_recipe_and_a_name_give_the_same_digest():
    model, x = branches()
    by_name = kp.optimize(model, "eager", args=(x,), measure=False)
    by_object = kp.optimize(model, kp.load_recipe("eager"), args=(x,), measure=False)
    assert by_name.report.recipe["digest"] == by_object.report.recipe["digest"] == kp.load_recipe("eager").digest


def test_public_names():
    assert set(kp.__all__) <= set(dir(kp))
    assert kp.optimize is api.optimize
