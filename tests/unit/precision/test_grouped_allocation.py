"""Layers that read the very same tensor are one decision: found by watching, scored together, exact over groups, visible."""

import itertools
from importlib.util import find_spec

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.fusion.projections import FuseProjections
from kernel_pytorch.models.bert import RandomBert
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.models.decoder import DecoderSource
from kernel_pytorch.models.source import Loaded
from kernel_pytorch.models.text import RandomTokens
from kernel_pytorch.optimizer import Context, Workload
from kernel_pytorch.precision.allocation import Allocation, allocate
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.precision.scores import PROBES, Scorer
from kernel_pytorch.precision.shared_inputs import SharedInputs
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import ActivationConfig, AllocationConfig, AllocationStrategy, OnMismatch, WeightConfig

FORMATS = ["nvfp4", "mxfp6_e2m3", "float8_e4m3fn"]
WEIGHT = WeightConfig(format="nvfp4")
MEASURED = (AllocationStrategy.layer_adaptive, AllocationStrategy.content_adaptive)
GROUPS = {"q": ["q", "k", "v"], "o": ["o"], "gate": ["gate", "up"], "down": ["down"]}


class Block(nn.Module):
    """Attention without positions, then SwiGLU, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, width) for width in (64, 32, 32, 64))
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = functional.layer_norm(x, (64,))
        q, k, v = self.q(normed).unflatten(-1, (2, 32)).transpose(1, 2), self.k(normed)[:, None], self.v(normed)[:, None]
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
        normed = functional.layer_norm(x, (64,))
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def make() -> tuple[Block, dict[str, nn.Linear], CallWorkload]:
    torch.manual_seed(0)
    model = Block()
    calls = [((torch.randn(16, 5, 64, generator=torch.Generator().manual_seed(seed)),), {}) for seed in range(6)]
    return model, linears_of(model), CallWorkload(calls[0][0], held_out=calls[1:2], calibration=calls[2:])


def config(strategy: AllocationStrategy, bits: float = 6.2, *, grouped: bool = True, share: float = 1.0) -> AllocationConfig:
    return AllocationConfig(strategy, bits, FORMATS, num_calibration_calls=4, sensitivity_share=share, grouped=grouped)


def found_by(strategy: AllocationStrategy, bits: float = 6.2, **more: float | bool) -> Allocation:
    model, linears, workload = make()
    return allocate(model, linears, WEIGHT, config(strategy, bits, **more), workload)


def groups_of(model: nn.Module, workload: Workload) -> list[list[str]]:
    scorer = Scorer(model, linears_of(model), WEIGHT, workload, 2, 0)
    scorer.group()
    assert scorer.forwards == 1
    assert not any(module._forward_hooks for module in model.modules())
    return [members for members in scorer.groups.values() if len(members) > 1]


def nbytes(linear: nn.Linear, format: str) -> int:
    return STORAGES[format].nbytes(linear.out_features, linear.in_features, WeightConfig(format=format))


def called(model: nn.Module, *shape: int) -> list[list[str]]:
    x = torch.randn(*shape)
    return groups_of(model, CallWorkload((x,), calibration=[((x,), {}), ((x + 1,), {})]))


@pytest.mark.skipif(find_spec("transformers") is None, reason="the extra `demo` is not installed")
def test_an_encoders_q_k_and_v() -> None:
    found = RandomBert(preset="tiny").load(data=RandomTokens(batch=2, length=8), seed=0, device=torch.device("cpu"))
    parts = ("query", "key", "value")
    assert groups_of(found.model, found.workload) == [[f"encoder.layer.{n}.attention.self.{part}" for part in parts] for n in range(2)]


@pytest.mark.parametrize("phase", ["forward", "prefill", "decode"])
def test_a_decoders_q_k_v_and_gate_up(phase: str) -> None:
    data = RandomTokens(batch=2, length=8)
    found: Loaded = DecoderSource(preset="tiny", phase=phase).load(data=data, seed=0, device=torch.device("cpu"))
    parts = (("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
    assert groups_of(found.model, found.workload) == [[f"layers.{n}.{name}" for name in group] for n in range(3) for group in parts]


class Two(nn.Module):
    """Two layers and how they are called."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        first = self.a(x)
        if self.how == "written between":
            x.mul_(2)
        if self.how == "a copy":
            x = x.clone()
        if self.how == "never":
            return first
        second = self.b(input=x)
        return first + (self.b(first) if self.how == "once more" else second)


@pytest.mark.parametrize("how", ["written between", "a copy", "never", "once more"])
def test_other_inputs_are_not_the_same(how: str) -> None:
    assert called(Two("the same"), 4, 16) == [["a", "b"]]
    assert called(Two(how), 4, 16) == []


def test_an_address_that_is_used_again_is_another_input() -> None:
    inputs, addresses = SharedInputs(), set[int]()
    for index in range(50):
        x = torch.ones(4)
        addresses.add(id(x))
        inputs.watch(str(index), x, x)
        del x
    assert len(addresses) < 50, "the control: addresses are given again"
    assert len(inputs.groups(map(str, range(50)))) == 50


@pytest.mark.parametrize("strategy", AllocationStrategy)
@pytest.mark.parametrize("bits", [5.2, 6.2, 7.4])
def test_groups_have_one_format_within_the_budget_and_the_choice_is_the_best_of_all(strategy: AllocationStrategy, bits: float) -> None:
    found = found_by(strategy, bits)
    _, linears, _ = make()
    assert found.groups == {"q": ["q", "k", "v"], "gate": ["gate", "up"]}
    assert list(found.losses) == list(GROUPS)
    assert list(found.formats) == list(linears)
    assert all(len({found.formats[name] for name in members}) == 1 for members in GROUPS.values())
    spent = sum(nbytes(linears[name], format) for name, format in found.formats.items())
    assert found.stats.bytes == spent
    assert found.stats.effective_bits <= bits
    best = min(
        sum(found.losses[name][format] for name, format in zip(GROUPS, choice, strict=True))
        for choice in itertools.product(FORMATS, repeat=len(GROUPS))
        if 8 * sum(nbytes(linears[name], format) for format, names in zip(choice, GROUPS.values(), strict=True) for name in names)
        <= bits * sum(linear.weight.numel() for linear in linears.values())
    )
    assert sum(found.losses[name][found.formats[name]] for name in GROUPS) == pytest.approx(best, rel=1e-9)


def test_forwards_of_calibration() -> None:
    """Measured: one to compare with, in which the groups are seen too, then decisions x formats; ungrouped it takes 22."""
    gradients = 1 + len(FORMATS) + 2 * PROBES
    forwards = {strategy: found_by(strategy).stats.forwards for strategy in AllocationStrategy}
    assert forwards == {
        AllocationStrategy.entropy_based: 1,
        AllocationStrategy.nvfp4_double_quantization: 1,
        AllocationStrategy.activation_aware: 2,
        AllocationStrategy.gradient_weighted: 1 + gradients,
        AllocationStrategy.layer_adaptive: 1 + 4 * 3,
        AllocationStrategy.content_adaptive: 1 + 4 * 3,
    }
    assert found_by(AllocationStrategy.layer_adaptive, grouped=False).stats.forwards == 1 + 7 * 3
    assert found_by(AllocationStrategy.layer_adaptive, share=0.5).stats.forwards == 1 + gradients + 2 * 3


def test_a_share_of_the_sensitivity_is_of_the_groups() -> None:
    whole, part = found_by(AllocationStrategy.layer_adaptive), found_by(AllocationStrategy.layer_adaptive, share=0.5)
    assert sum(whole.losses[name] == part.losses[name] for name in GROUPS) == 2
    assert all(len({part.formats[name] for name in members}) == 1 for members in GROUPS.values())
    best, reached = (sum(whole.losses[name][found.formats[name]] for name in GROUPS) for found in (whole, part))
    assert best <= reached <= 1.05 * best


def test_a_group_loses_what_its_layers_lose_together() -> None:
    """Measured with all of it stored; predicted by gradients within the sampling, as for single layers; else the sum."""
    model, linears, workload = make()
    scorer = Scorer(model, linears, WEIGHT, workload, 4, 0)
    expected = torch.cat(list(workload.calibration_rows(model, 4))).double()
    for members in GROUPS.values():
        with scorer.storing(dict.fromkeys(members, "nvfp4")):
            rows = torch.cat(list(workload.calibration_rows(model, 4))).double()
        together = (1 - torch.cosine_similarity(rows, expected, dim=1)).mean().item()
        assert found_by(AllocationStrategy.layer_adaptive).losses[members[0]]["nvfp4"] == pytest.approx(together, rel=1e-6)
        predicted = found_by(AllocationStrategy.gradient_weighted).losses[members[0]]["nvfp4"]
        assert predicted == pytest.approx(together, rel=0.3)
    for strategy in set(AllocationStrategy) - {*MEASURED, AllocationStrategy.gradient_weighted}:
        single, grouped = found_by(strategy, grouped=False).losses, found_by(strategy).losses
        for name, members in GROUPS.items():
            assert grouped[name] == {format: pytest.approx(sum(single[member][format] for member in members)) for format in FORMATS}


@pytest.mark.parametrize("strategy", AllocationStrategy)
def test_where_nothing_is_shared_nothing_changes(strategy: AllocationStrategy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(32, 32), nn.Tanh())))
    workload = CallWorkload((torch.randn(64, 32),))
    single, grouped = (
        allocate(model, linears_of(model), WEIGHT, config(strategy, 6.5, grouped=grouped), workload) for grouped in (False, True)
    )
    assert (grouped.formats, grouped.losses, grouped.stats.bytes) == (single.formats, single.losses, single.stats.bytes)
    assert (grouped.groups, single.groups) == ({}, None)


@pytest.fixture
def context() -> Context:
    _, _, workload = make()
    return Context(CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate), workload, emulate=True)


@pytest.mark.parametrize(
    ("include", "exclude", "groups"),
    [([], [], [["q", "k", "v"], ["gate", "up"]]), ([], ["k", "up"], [["q", "v"]]), (["q", "down"], [], [])],
)
def test_the_receipt_says_the_groups_and_the_fragment_stays_plain(
    include: list[str], exclude: list[str], groups: list[list[str]], context: Context
) -> None:
    model, _, _ = make()
    common = {"include": include, "exclude": exclude, "dtype": None, "activation": ActivationConfig(), "min_features": 16}
    step = QuantizeLinears(weight=WEIGHT, allocation=config(AllocationStrategy.gradient_weighted), **common)
    applied = step.apply(structural_clone(model), context)
    assert applied.details["groups"] == groups
    formats = {change.name: change.replacement.format for change in applied.changes}
    assert all(len({formats[name] for name in members}) == 1 for members in groups)
    written = yaml.safe_load("\n".join(applied.details["recipe_fragment"]))["precision"]
    assert written["allocation"] == {"strategy": None, "effective_bits": None, "formats": [], "grouped": False}
    again = QuantizeLinears(weight=WeightConfig(**written["weight"]), **common).apply(structural_clone(model), context)
    assert {change.name: change.replacement.format for change in again.changes} == formats
    assert "groups" not in again.details


def test_the_fragment_goes_with_merged_projections(context: Context) -> None:
    """The control: at this budget layers that were decided one by one do not."""
    common = {"include": [], "exclude": [], "dtype": None, "activation": ActivationConfig(), "min_features": 16}
    merged = FuseProjections(include=[], exclude=[])
    for grouped in (True, False):
        found = found_by(AllocationStrategy.gradient_weighted, grouped=grouped)
        written = yaml.safe_load(found.fragment())["precision"]["weight"]
        model = merged.apply(structural_clone(make()[0]), context).model
        step = QuantizeLinears(weight=WeightConfig(**written), **common)
        if grouped:
            assert [change.name for change in step.apply(model, context).changes] == ["q.fused", "o", "gate.fused", "down"]
        else:
            with pytest.raises(ConfigError, match="which were merged into"):
                step.apply(model, context)
