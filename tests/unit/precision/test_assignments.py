"""Formats by module: which pattern decides, what a dead or contradictory one says, and that the gate follows the choice."""

from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.errors import ConfigError, NoEffectError
from kernel_pytorch.fusion.projections import FuseProjections
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.optimizer import Context
from kernel_pytorch.precision.quantize import QuantizeLinears
from kernel_pytorch.schema import ActivationConfig, OnMismatch, WeightConfig
from kernel_pytorch.verify.module import ModuleValidator


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32)
        self.k_proj = nn.Linear(32, 32)
        self.v_proj = nn.Linear(32, 32)
        self.o_proj = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


def context() -> Context:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    return Context(CpuBackend(hardware="cpu", on_mismatch=OnMismatch.emulate), CallWorkload((x,)), emulate=True)


def step(*assign: str, format: str = "int8") -> QuantizeLinears:
    weight = WeightConfig(format=format, assign=list(assign))
    return QuantizeLinears(include=[], exclude=[], dtype=None, weight=weight, activation=ActivationConfig(), min_features=16)


def formats(applied: Any) -> dict[str, str]:
    return {change.name: change.replacement.format for change in applied.changes}


def test_the_first_pattern_that_matches_decides() -> None:
    optimizer = step("q_proj=float8_e4m3fn", "*_proj=float8_e5m2", "o_proj=int8", "k_proj=float8_e4m3fn")
    with pytest.raises(NoEffectError, match="'o_proj', 'k_proj'"):
        optimizer.apply(Attention(), context())
    applied = step("q_proj=float8_e4m3fn", "[kv]_proj=keep").apply(Attention(), context())
    assert formats(applied) == {"q_proj": "float8_e4m3fn", "o_proj": "int8"}
    assert {skipped.module: skipped.reason for skipped in applied.skipped} == dict.fromkeys(("k_proj", "v_proj"), "weight.assign keeps it")


def test_the_implementation_gate_follows_each_layers_own_format() -> None:
    torch.manual_seed(0)
    optimizer, ctx = step("q_proj=float8_e4m3fn", "k_proj=float8_e5m2"), context()
    applied = optimizer.apply(Attention(), ctx)
    checks = ModuleValidator(budget=2.0).check(applied.model, optimizer, applied.changes, ctx.workload)
    assert [check.passed for check in checks] == [True] * 4
    # Stored in the neighbour's format, the same layer fails.
    wrong = step("q_proj=float8_e5m2", "k_proj=float8_e4m3fn")
    wrong._chosen.update(optimizer._chosen)
    spoiled = step("q_proj=float8_e5m2").apply(Attention(), ctx).changes[0].replacement
    applied.model.q_proj = spoiled
    bad = [type(change)(change.name, change.original, getattr(applied.model, change.name), change.kernel) for change in applied.changes]
    checks = {check.name: check.passed for check in ModuleValidator(budget=2.0).check(applied.model, optimizer, bad, ctx.workload)}
    assert checks == {"q_proj": False, "k_proj": True, "v_proj": True, "o_proj": True}


def test_layers_that_were_merged_answer_to_their_own_names() -> None:
    ctx = context()
    fused = FuseProjections(include=[], exclude=[]).apply(Attention(), ctx).model
    applied = step("k_proj=float8_e4m3fn").apply(fused, ctx)
    assert sorted(formats(applied).values()) == ["float8_e4m3fn", "int8"]
    fused = FuseProjections(include=[], exclude=[]).apply(Attention(), ctx).model
    with pytest.raises(ConfigError, match="k_proj=float8_e4m3fn, v_proj=float8_e5m2, which were merged"):
        step("k_proj=float8_e4m3fn", "v_proj=float8_e5m2").apply(fused, ctx)
