"""Mixed formats under a budget of bits: scores, an exact choice over true bytes, and the result as a recipe that anyone can edit."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.optimizer import Workload
from kernel_pytorch.precision.budget import solve
from kernel_pytorch.precision.scores import Linears, Scorer
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import AllocationConfig, AllocationStrategy, WeightConfig

MEASURED = (AllocationStrategy.layer_adaptive, AllocationStrategy.content_adaptive)
# What ranks the layers whose sensitivity is not measured.
PRIOR = AllocationStrategy.gradient_weighted


@dataclass(frozen=True)
class PrecisionStats:
    """Bytes of the allocated weights, scales included, before and after. formats: weights (values) by format.
    forwards: calibration passes of the whole model that the scores took. seconds: of all of it."""

    original_bytes: int
    bytes: int
    formats: dict[str, int]
    forwards: int
    seconds: float

    @property
    def effective_bits(self) -> float:
        return 8 * self.bytes / sum(self.formats.values())

    @property
    def memory_reduction_ratio(self) -> float:
        return self.original_bytes / self.bytes

    @property
    def format_usage_distribution(self) -> dict[str, float]:
        total = sum(self.formats.values())
        return {name: count / total for name, count in self.formats.items()}


@dataclass(frozen=True)
class Allocation:
    """formats: by layer. losses: of each decision, by format; what the choice was made from.
    groups: decisions on several layers, by the first one's name; None when layers were decided one by one."""

    formats: dict[str, str]
    losses: dict[str, dict[str, float]]
    stats: PrecisionStats
    groups: dict[str, list[str]] | None = None

    def assign(self) -> list[str]:
        """Entries for `precision.weight.assign`: layers that are not in the most used format."""
        base = self.base
        return [f"{name}={format}" for name, format in self.formats.items() if format != base]

    @property
    def base(self) -> str:
        return max(self.stats.formats, key=lambda name: self.stats.formats[name])

    def fragment(self) -> str:
        """The result as a recipe's `precision` block: re-run without calibration, edited by hand."""
        stats = self.stats
        lines = [
            f"# {stats.effective_bits:.3f} bits a weight, {stats.bytes:,} bytes, {stats.forwards} forwards of calibration",
            "precision:",
            "  allocation: {strategy: null, effective_bits: null, formats: [], grouped: false}",
            "  weight:",
            f"    format: {self.base}",
            "    assign:" if self.assign() else "    assign: []",
        ]
        return "\n".join([*lines, *(f'      - "{text}"' for text in self.assign())]) + "\n"

    def details(self) -> dict[str, Any]:
        """For the receipt: JSON types."""
        stats = self.stats
        return {
            "effective_bits": round(stats.effective_bits, 4),
            "format_usage": ", ".join(f"{name} {share:.1%}" for name, share in stats.format_usage_distribution.items()),
            "calibration_forwards": stats.forwards,
            "allocation_s": round(stats.seconds, 2),
            "losses": [{"layer": name, **row} for name, row in self.losses.items()],
            **({} if self.groups is None else {"groups": list(self.groups.values())}),
            "recipe_fragment": self.fragment().splitlines(),
        }


def allocate(
    model: nn.Module, linears: Linears, weight: WeightConfig, config: AllocationConfig, workload: Workload, seed: int = 0
) -> Allocation:
    """The format of each layer that loses least, by the strategy, within `effective_bits` bits a weight over all of `linears`.
    With `grouped`, layers that read the very same tensors are one decision.

    Raises ConfigError when no choice fits, with the range that can be reached, and for a layer whose loss is not finite."""
    assert config.strategy is not None
    began = time.perf_counter()
    scorer = Scorer(model, linears, weight, workload, config.num_calibration_calls, seed)
    if config.grouped:
        scorer.group()
    groups = scorer.groups
    formats = list(dict.fromkeys(config.formats))
    costs = [[sum(_bytes(linears[name], format, weight) for name in members) for format in formats] for members in groups.values()]
    capacity = _capacity(linears, config, costs)
    losses = _losses(scorer, list(groups), formats, costs, config, capacity)
    options = solve(losses, costs, capacity)
    decided = {name: formats[option] for members, option in zip(groups.values(), options, strict=True) for name in members}
    chosen = {name: decided[name] for name in linears}
    counts = Counter[str]()
    for name, format in chosen.items():
        counts[format] += linears[name].weight.numel()
    spent = sum(row[option] for row, option in zip(costs, options, strict=True))
    original = sum(linear.weight.nbytes for linear in linears.values())
    stats = PrecisionStats(original, spent, dict(counts), scorer.forwards, time.perf_counter() - began)
    table = {name: dict(zip(formats, row, strict=True)) for name, row in zip(groups, losses, strict=True)}
    several = {name: members for name, members in groups.items() if len(members) > 1}
    return Allocation(chosen, table, stats, several if config.grouped else None)


def _bytes(linear: nn.Linear, format: str, weight: WeightConfig) -> int:
    return STORAGES[format].nbytes(linear.out_features, linear.in_features, replace(weight, format=format, assign=[]))


def _capacity(linears: Linears, config: AllocationConfig, costs: Sequence[Sequence[int]]) -> int:
    assert config.effective_bits is not None
    num_weights = sum(linear.weight.numel() for linear in linears.values())
    capacity = int(config.effective_bits * num_weights / 8)
    least = 8 * sum(min(row) for row in costs) / max(num_weights, 1)
    if capacity < sum(min(row) for row in costs):
        most = 8 * sum(max(row) for row in costs) / num_weights
        raise ConfigError(
            f"precision.allocation.effective_bits: found {config.effective_bits:g}; {', '.join(config.formats)} with their scales"
            f" reach from {math.ceil(least * 1000) / 1000:g} to {most:.3f} bits a weight on this model"
        )
    return capacity


def _losses(
    scorer: Scorer, names: list[str], formats: list[str], costs: list[list[int]], config: AllocationConfig, capacity: int
) -> list[list[float]]:
    """Losses by decision and format. Where sensitivity is measured for a share of the decisions only, those are taken which the
    prior leaves most open, and the others' losses are the prior's, brought to the measured ones' size."""
    strategy = config.strategy
    assert strategy is not None
    if strategy not in MEASURED or config.sensitivity_share == 1:
        return [_finite(scorer, strategy, name, formats) for name in names]
    prior = [_finite(scorer, PRIOR, name, formats) for name in names]
    cheap = [row.index(min(row)) for row in costs]
    dear = [row.index(max(row)) for row in costs]
    layers = range(len(names))
    rates = [max(prior[n][cheap[n]] - prior[n][dear[n]], 0.0) / max(costs[n][dear[n]] - costs[n][cheap[n]], 1) for n in layers]
    chosen = solve(prior, costs, capacity)
    upgraded = [rates[n] for n in layers if chosen[n] != cheap[n]]
    boundary = min(upgraded, default=max(rates))
    order = sorted(layers, key=lambda n: abs(math.log(max(rates[n], 1e-300) / max(boundary, 1e-300))))
    measured = {n: _finite(scorer, strategy, names[n], formats) for n in order[: max(1, round(config.sensitivity_share * len(names)))]}
    sizes = [measured[n][option] / prior[n][option] for n in measured for option in range(len(formats)) if prior[n][option] > 0]
    size = torch.tensor(sizes).median().item() if sizes else 1.0
    return [measured.get(n, [loss * size for loss in prior[n]]) for n in layers]


def _finite(scorer: Scorer, strategy: AllocationStrategy, name: str, formats: list[str]) -> list[float]:
    losses = scorer.losses(strategy, name, formats)
    for format, loss in zip(formats, losses, strict=True):
        if not math.isfinite(loss):
            raise ConfigError(
                f"precision.allocation.strategy: {strategy.value} found a loss of {loss} for {name} in {format}, it must be finite; look"
                " for Inf and NaN in the calibration inputs and the outputs, or use strategy=entropy_based, which runs nothing"
            )
    return losses
