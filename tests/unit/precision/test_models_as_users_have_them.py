"""Models that a user may well have, through `kernel_pytorch.optimize`: right, or skipped with a reason, or our error."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kernel_pytorch as kp
from kernel_pytorch.backends.detect import make
from kernel_pytorch.errors import ConfigError, KernelPyTorchError, NoEffectError, VerificationError
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.schema import ActivationConfig, ActivationMode, BackendConfig, WeightConfig

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


def layers(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), *more)


def optimize(model: nn.Module, *overrides: str, x: torch.Tensor = X, trained: bool = False):
    return kp.optimize(model, "eager", args=(x,), overrides=overrides, trained=trained, measure=False)


def row(done):
    return next(row for row in done.report.steps if row.group == "precision")


def reasons(done) -> dict[str, str]:
    return {entry["module"]: entry["reason"] for entry in row(done).skipped}


def isa() -> tuple[str, ...]:
    return make("cpu", BackendConfig()).facts.isa


# an x of another width than the layer's gives an answer.
@pytest.mark.parametrize("width", [17, 33, 64])
def test_an_input_of_another_width_is_an_error(width: int) -> None:
    torch.manual_seed(0)
    activation = ActivationConfig(mode=ActivationMode.dynamic, format="int8", symmetric=False)
    layer = QuantizedLinear.from_linear(nn.Linear(32, 32), WeightConfig(format="int8"), activation, isa=isa())
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(4, width))


# a Linear whose forward was replaced on the instance (LoRA injection, accelerate).
def test_a_linear_with_a_forward_of_its_own_is_left_alone() -> None:
    model = layers()

    def with_adapter(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + 0.5 * x

    model[0].forward = types.MethodType(with_adapter, model[0])
    done = optimize(model, "precision=int8_weight_only")
    expected = model.eval()(X)
    assert (done.model(X) - expected).norm() / expected.norm() < 0.05
    assert "forward" in reasons(done)["0"]


# a layer whose weight another module reads, beside one that is called.
class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.down, self.up = nn.Parameter(torch.randn(4, 32) * 0.01), nn.Parameter(torch.randn(32, 4) * 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.linear(x, self.base.weight + self.up @ self.down, self.base.bias))


def test_a_weight_that_is_read_and_not_called_does_not_pass() -> None:
    model = ReadsWeight()
    with pytest.raises(VerificationError, match="base: the model does not call it and computes something else without its weight"):
        optimize(model, "precision=int8_weight_only")
    assert optimize(model, "precision=int8_weight_only", "precision.exclude=[base]").report.exit_code == 0


class Routed(nn.Module):
    """Positive sums go to one expert, others to the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[int(x.sum() > 0)](x)


def test_an_expert_that_only_later_inputs_reach_is_not_taken_for_one_whose_weight_is_read() -> None:
    calls = [((sign * X.abs(),), {}) for sign in (1.0, -1.0)]
    overrides = ["precision=int8_weight_only"]
    done = kp.optimize(Routed(), "eager", args=calls[0][0], held_out=calls, overrides=overrides, trained=False, measure=False)
    assert (done.report.exit_code, row(done).changed) == (0, 2)
    assert any("1 changed modules are never called" in warning for warning in done.report.warnings)


# float64 models.
@pytest.mark.parametrize("option", ["int8_weight_only", "fp8_weight_only", "fp8_dynamic", "nvfp4", "int4_weight_only", "mxfp8"])
def test_a_float64_model_is_quantized(option: str) -> None:
    assert optimize(layers().double(), f"precision={option}", x=X.double()).report.exit_code == 0


# a model of 16 bits computed in 32.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_cast_to_float32(dtype: torch.dtype) -> None:
    assert optimize(layers().to(dtype), "precision=fp32", x=X.to(dtype), trained=True).report.verdict == "pass"


def test_a_floor_that_the_user_states_counts_whatever_the_models_type() -> None:
    overrides = ("precision=int8_weight_only", "precision.quality.sqnr_db=90")
    with pytest.raises(VerificationError, match="below"):
        optimize(layers().bfloat16(), *overrides, x=X.bfloat16(), trained=True)


def test_a_bf16_model_with_float32_math_and_compile() -> None:
    model = layers(nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32)).bfloat16()
    overrides = ("precision=int8_weight_only", "precision.dtype=float32", "compile=default")
    assert optimize(model, *overrides, x=X.bfloat16()).report.verdict == "pass"


# weights that no scale holds, and weights that are no parameters.
def test_a_weight_above_the_largest_scale_is_skipped_with_a_reason() -> None:
    model = layers()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e38
    x = X.clone()
    # Or the model would overflow, quantized or not.
    x[:, 0] = 0
    assert "2**126" in reasons(optimize(model, "precision=int8_weight_only", x=x))["0"]


def test_a_weight_that_is_a_buffer_is_skipped_with_a_reason() -> None:
    model = layers()
    weight = model[0].weight.data
    del model[0].weight
    model[0].register_buffer("weight", weight)
    assert reasons(optimize(model, "precision=int8_weight_only")).keys() == {"0"}


# changes of element type after the fact.
@pytest.mark.parametrize("option", ["int8_dynamic", "int8_static"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_result_keeps_its_scales(option: str, dtype: torch.dtype) -> None:
    model = optimize(layers(), f"precision={option}").model
    expected = model(X).clone()
    actual = model.to(dtype)(X.to(dtype)).float()
    assert (actual - expected).norm() / expected.norm() < 0.05


# the original's state in the result.
def test_a_state_dict_of_the_original_leaves_the_codes_alone() -> None:
    done = optimize(layers(), "precision=int8_weight_only")
    before = {name: tensor.clone() for name, tensor in done.model.state_dict().items()}
    with pytest.raises((RuntimeError, KernelPyTorchError)):
        done.model.load_state_dict(layers().state_dict(), strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in done.model.state_dict().items())


# an integer input, which nn.Linear refuses.
def test_an_integer_input_is_an_error() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 32), WeightConfig(format="int8"), ActivationConfig())
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        layer(torch.ones(2, 32, dtype=torch.int8))


# outputs that are not finite where the baseline's are not.
def test_a_bias_of_minus_infinity_bans_an_output() -> None:
    model = layers()
    with torch.no_grad():
        model[2].bias[3] = -torch.inf
    assert optimize(model, "precision=int8_weight_only").report.verdict == "pass"


def test_a_row_of_nan_in_the_callers_input_is_not_blamed_on_a_layer() -> None:
    x = X.clone()
    x[2] = torch.nan
    with pytest.raises(VerificationError, match="baseline's own outputs"):
        optimize(layers(), "precision=int8_weight_only", x=x)


# one vector instead of rows.
class OneVector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x) + self.a(x[0])


def test_nvfp4_activations_of_one_vector() -> None:
    assert optimize(OneVector(), "precision=nvfp4_dynamic").report.exit_code == 0


# settings and patterns that nothing reads.
@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("precision.weight.group_size=32", "no weight is stored in int4"),
        ("precision.weight.scale_search=plain", "no weight is stored in nvfp4"),
        ("precision.num_calibration_calls=7", "activations are not static"),
        ("precision.allocation.sensitivity_share=0.5", "allocation.strategy is null"),
        ("precision.activation.granularity=tensor", "activations are not quantized"),
    ],
)
def test_a_setting_that_nothing_reads_is_told(override: str, why: str) -> None:
    reason = row(optimize(layers(), "precision=int8_weight_only", override)).reason
    assert f"{override.partition('=')[0]} is not read: {why}" in reason


def test_settings_that_are_read_are_not_told() -> None:
    for option in ("int8_weight_only", "int8_dynamic", "int8_static", "int4_weight_only", "nvfp4", "fp8_dynamic", "mxfp8"):
        assert "not read" not in row(optimize(layers(), f"precision={option}")).reason
    reason = row(
        optimize(layers(), "precision=int8_weight_only", "precision.weight.assign=['0=int4']", "precision.weight.group_size=32")
    ).reason
    assert "not read" not in reason


def test_an_exclude_that_matches_nothing_is_visible() -> None:
    done = optimize(layers(), "precision=int8_weight_only", "precision.exclude=['lm_hed*']")
    assert row(done).details["exclude_matched_nothing"] == ["lm_hed*"]


# a layer under two names answers to both.
class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(32, 32)
        self.head = self.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(x))


def test_an_assignment_finds_a_layer_by_its_second_name() -> None:
    done = optimize(TwoNames(), "precision=int8_weight_only", "precision.weight.assign=['head=mxfp8_e4m3fn']")
    assert done.model.proj.format == "mxfp8_e4m3fn"


# what optimize is given.
def test_no_rows_are_one_of_our_errors() -> None:
    with pytest.raises(KernelPyTorchError, match="row"):
        optimize(layers(), "precision=int8_weight_only", x=X[:0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"args": X[:1]}, r"args: found a Tensor; allowed: args a tuple or list"),
        ({"args": (X,), "calibration": [X]}, r"calibration\[0\]: found Tensor; allowed: \(args, kwargs\) of one call"),
        ({"args": (X,), "held_out": [(X,)]}, r"held_out\[0\]: found \(Tensor\); allowed"),
        ({"args": (X,), "held_out": [((X,), {}), (X, {})]}, r"held_out\[1\]: found \(Tensor, dict\); allowed"),
    ],
)
def test_a_tensor_where_calls_belong_is_named(given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        kp.optimize(layers(), "eager", overrides=["precision=int8_weight_only"], trained=False, measure=False, **given)


def test_weights_of_another_quantizer_are_left_alone() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = layers()
    torchao.quantize_(model[0:1], torchao.Int8WeightOnlyConfig())
    assert "no plain parameter" in reasons(optimize(model, "precision=int8_weight_only"))["0"]


def test_a_lazy_model_is_to_be_called_first() -> None:
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 32))
    with pytest.raises(ConfigError, match=r"found 0\.weight without a shape yet; allowed a model whose lazy modules were called"):
        optimize(model, "precision=int8_weight_only")
    model(X)
    assert optimize(model, "precision=int8_weight_only").report.exit_code == 0


def test_a_model_that_is_one_linear_is_told_why_nothing_changed() -> None:
    with pytest.raises(NoEffectError, match="the model itself"):
        optimize(nn.Linear(32, 32), "precision=int8_weight_only")
