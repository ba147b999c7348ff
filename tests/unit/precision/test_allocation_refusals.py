"""Allocation on awkward models and inputs: it scores what can be scored and names the layer where it cannot."""

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.errors import ConfigError, NoEffectError
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.precision.scores import Scorer
from kernel_pytorch.schema import AllocationStrategy, WeightConfig

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
GRADIENTS = AllocationStrategy.gradient_weighted


def layers(*, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace), nn.Linear(32, 32), nn.ReLU(inplace), nn.Linear(32, 32))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def allocate(model: nn.Module, strategy: str, bits: float = 6, share: float = 1, **given):
    """What the receipt says of the allocation."""
    overrides = [
        "precision=int8_weight_only",
        f"precision.allocation.strategy={strategy}",
        f"precision.allocation.effective_bits={bits}",
        f"precision.allocation.sensitivity_share={share}",
        "precision.allocation.formats=[nvfp4,int8]",
    ]
    done = kp.optimize(model, "eager", overrides=overrides, trained=False, measure=False, args=(X,), **given)
    return next(row for row in done.report.steps if row.group == "precision").details


def losses_of(model: nn.Module, strategy: AllocationStrategy) -> dict[str, float]:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    scorer = Scorer(model, linears, WeightConfig(format="nvfp4"), CallWorkload((X,)), 1, 0)
    return {name: scorer.losses(strategy, name, ["nvfp4"])[0] for name in linears}


@pytest.mark.parametrize("frozen", [False, True])
def test_activations_in_place_are_scored_like_others(frozen: bool) -> None:
    plain, inplace = (losses_of(layers(inplace=inplace).requires_grad_(not frozen), GRADIENTS) for inplace in (False, True))
    assert inplace == pytest.approx(plain, rel=1e-6)


class Experts(nn.Module):
    """The third expert gets no row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = (x[:, 0] > 0).long(), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(x[rows]))
        return out


@pytest.mark.parametrize("strategy", [AllocationStrategy.activation_aware, GRADIENTS])
def test_an_expert_without_rows_loses_nothing_that_is_seen(strategy: AllocationStrategy) -> None:
    first, second, idle = losses_of(Experts(), strategy).values()
    assert min(first, second) > 0
    assert idle == 0


class OneVector(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x) + self.a(x[0])


class OneRow(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x) + self.a(x[:1])


@pytest.mark.parametrize("strategy", [AllocationStrategy.activation_aware, GRADIENTS])
def test_a_vector_is_scored_as_one_row(strategy: AllocationStrategy) -> None:
    assert losses_of(OneVector(), strategy) == pytest.approx(losses_of(OneRow(), strategy), rel=1e-5)


@pytest.mark.parametrize("precision", ["int8_weight_only", "nvfp4_dynamic"])
def test_a_layer_that_is_given_one_vector_is_replaced_and_verified(precision: str) -> None:
    kp.optimize(OneVector(), "eager", overrides=[f"precision={precision}"], trained=False, measure=False, args=(X,))


def test_nothing_to_allocate_is_no_effect_with_the_reason() -> None:
    with pytest.raises(NoEffectError, match="min_features"):
        allocate(nn.Sequential(nn.Linear(32, 4)), "entropy_based")


@pytest.mark.parametrize("strategy", ["nvfp4_double_quantization", "activation_aware", "gradient_weighted"])
def test_weights_whose_squares_overflow_float32_have_finite_losses(strategy: str) -> None:
    model = layers()
    first, _, second, *_ = model.parameters()
    with torch.no_grad():
        first.mul_(1e25)
        second.mul_(1e-25)
    # Room for the dearest format everywhere.
    assert allocate(model, strategy, bits=32)["format_usage"] == "int8 100.0%"


@pytest.mark.parametrize("strategy", ["layer_adaptive", "content_adaptive", "gradient_weighted", "activation_aware"])
def test_a_loss_that_is_not_finite_is_refused_by_its_layer(strategy: str) -> None:
    spoiled = X.clone()
    spoiled[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=rf"{strategy} found a loss of (nan|inf) for 0 in nvfp4.*use strategy=entropy_based"):
        allocate(layers(), strategy, bits=32, calibration=[((spoiled,), {})])


def test_a_prior_that_is_not_finite_is_refused() -> None:
    spoiled = torch.full_like(X, torch.nan)
    with pytest.raises(ConfigError, match="gradient_weighted found a loss of nan for 0"):
        allocate(layers(), "layer_adaptive", share=0.5, calibration=[((spoiled,), {})])


class Detached(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu().detach())


class NoGrad(TwoLayers):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Inference(TwoLayers):
    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@pytest.mark.parametrize(("model", "shown"), [(Detached, "a"), (NoGrad, "a, b"), (Inference, "a, b")])
def test_layers_without_a_gradient_are_not_scored_by_it(model: type[TwoLayers], shown: str) -> None:
    with pytest.raises(ConfigError, match=f"no gradient at {shown}, on which .* use strategy=layer_adaptive"):
        allocate(model(), "gradient_weighted")
    assert all(entry["nvfp4"] > 0 for entry in allocate(model(), "layer_adaptive")["losses"])


class Unused(TwoLayers):
    """As a pooler is whose result nobody reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b(x)
        return self.a(x)


def test_a_layer_that_the_output_does_not_depend_on_needs_no_gradient() -> None:
    losses = losses_of(Unused(), GRADIENTS)
    assert losses["a"] > 0
    assert losses["b"] == 0
