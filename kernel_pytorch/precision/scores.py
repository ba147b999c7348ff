"""What it costs a model when a layer is stored in a format: one estimate a strategy, lower is better, none below zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.optimizer import Workload
from kernel_pytorch.precision.shared_inputs import SharedInputs
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import AllocationStrategy, WeightConfig

Linears = Mapping[str, nn.Linear]
# The share of calibration rows whose error a content-adaptive score looks at from above.
WORST_ROWS = 0.95
_BINS = 256
# Below any square of a float32, so that a layer of tiny weights is compared with itself.
_LEAST = 1e-300


# Random directions of the output a call: over R rows a loss has a relative standard error of sqrt(2 / (R * PROBES)), 0.08 for 88.
PROBES = 4


@dataclass
class Scorer:
    """Scores layers of one model. groups: layers with one score, by the first one's name; each alone, until `group`.
    forwards: calibration passes of the whole model spent so far; a backward pass counts as two."""

    model: nn.Module
    linears: Linears
    weight: WeightConfig
    workload: Workload
    num_calls: int
    seed: int
    groups: dict[str, list[str]] = field(init=False)
    forwards: int = 0
    _moments: dict[str, torch.Tensor] = field(default_factory=dict)
    _sensitivity: dict[tuple[str, str], float] = field(default_factory=dict)
    _expected: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.groups = {name: [name] for name in self.linears}

    def group(self) -> None:
        """From here on layers that read the very same tensors in calibration have one score."""
        inputs = SharedInputs()
        with self._watching(inputs.watch):
            self._expected = self._rows()
        self.groups = inputs.groups(self.linears)

    def losses(self, strategy: AllocationStrategy, name: str, formats: Sequence[str]) -> list[float]:
        """One loss a format of the group `name`: what its layers lose together, or the sum where a score knows one layer only."""
        if strategy is AllocationStrategy.gradient_weighted:
            missing = [format for format in formats if (name, format) not in self._sensitivity]
            if missing:
                self._sensitivity |= self._fisher(missing)
            return [self._sensitivity[name, format] for format in formats]
        if strategy in (AllocationStrategy.layer_adaptive, AllocationStrategy.content_adaptive):
            worst = strategy is AllocationStrategy.content_adaptive
            return [self.measured(name, format, worst=worst) for format in formats]
        score = {
            AllocationStrategy.entropy_based: self._entropy,
            AllocationStrategy.nvfp4_double_quantization: self._weight_error,
            AllocationStrategy.activation_aware: self._output_error,
        }[strategy]
        return [sum(score(member, format) for member in self.groups[name]) for format in formats]

    def _entropy(self, name: str, format: str) -> float:
        """Entropy of the weight's histogram over its range (bits) times its number of values times the format's noise, 4 ** -bits: even
        spreads carry more information a value and lose more of it; few outliers on a narrow rest are what block scales are for."""
        weight = self.linears[name].weight.detach().float()
        counts = torch.histc(weight, _BINS)
        shares = counts[counts > 0] / counts.sum()
        entropy = -(shares * shares.log2()).sum().item()
        bits = 8 * STORAGES[format].nbytes(weight.shape[0], weight.shape[1], self.config_of(format)) / weight.numel()
        return entropy * weight.numel() * 4.0**-bits

    def _weight_error(self, name: str, format: str) -> float:
        """Squared error of the stored weight over the weight's own square: what scales of two levels leave."""
        weight = self.linears[name].weight.detach().double()
        return (self._rounded(name, format) - weight).square().sum().item() / max(weight.square().sum().item(), _LEAST)

    def _output_error(self, name: str, format: str) -> float:
        """Predicted squared error of the layer's output over the output's own, columns weighted by the inputs' second moments.
        Source: arXiv:2306.00978, section 3"""
        weight = self.linears[name].weight.detach().double()
        moments = self._input_moments()[name]
        error = ((self._rounded(name, format) - weight).square() @ moments).sum().item()
        return error / max((weight.square() @ moments).sum().item(), _LEAST)

    def measured(self, name: str, format: str, *, worst: bool = False) -> float:
        """1 - cosine of the model's output rows over calibration, with this group alone stored in `format`: the mean, or the
        quantile WORST_ROWS."""
        if self._expected is None:
            self._expected = self._rows()
        with self.storing(dict.fromkeys(self.groups[name], format)):
            rows = self._rows()
        distance = (1 - torch.cosine_similarity(rows, self._expected, dim=1)).clamp_min(0)
        return (torch.quantile(distance, WORST_ROWS) if worst else distance.mean()).item()

    def _rows(self) -> torch.Tensor:
        with torch.no_grad():
            rows = [rows.double().cpu() for rows in self.workload.calibration_rows(self.model, self.num_calls)]
        self.forwards += 1
        return torch.cat(rows)

    def config_of(self, format: str) -> WeightConfig:
        return replace(self.weight, format=format, assign=[])

    def _rounded(self, name: str, format: str) -> torch.Tensor:
        weight = self.linears[name].weight.detach()
        storage = STORAGES[format]
        return storage.dequantize(storage.quantize(weight, self.config_of(format)), weight.shape[1])

    @contextmanager
    def storing(self, formats: Mapping[str, str]) -> Iterator[None]:
        """Inside, the layers compute with rounded weights; the parameters themselves are not touched."""
        before = {name: nn.Module.get_parameter(self.linears[name], "weight") for name in formats}
        try:
            for name, format in formats.items():
                rounded = self._rounded(name, format).to(before[name].dtype)
                self.linears[name]._parameters["weight"] = nn.Parameter(rounded, requires_grad=False)
            yield
        finally:
            for name, weight in before.items():
                self.linears[name]._parameters["weight"] = weight

    def _input_moments(self) -> dict[str, torch.Tensor]:
        """Of each layer, over calibration: the sums of squares of its input columns."""
        if self._moments:
            return self._moments
        # float64: squares of large float32 values overflow.
        found = {name: linear.weight.new_zeros(linear.in_features, dtype=torch.float64) for name, linear in self.linears.items()}

        def watch(name: str, x: torch.Tensor, _output: torch.Tensor) -> None:
            found[name] += x.double().reshape(-1, x.shape[-1]).square().sum(0)

        with torch.no_grad(), self._watching(watch):
            for _ in self.workload.calibration_rows(self.model, self.num_calls):
                pass
        self.forwards += 1
        self._moments = found
        return found

    def _fisher(self, formats: Sequence[str]) -> dict[tuple[str, str], float]:
        """1 - cosine of the model's output rows, to second order, by group and format: the weight error in the quadratic form of the
        Gauss-Newton (Fisher) matrix of the rows brought to unit length, halved. Not its diagonal: E[(g . e)^2] over random signs of
        the output, g the gradient at a layer's output and e its error there, summed over a group and a sample (the first dimension)
        before the square, so that errors that cancel do.   Source: arXiv:1412.1193 (the matrix); Hutchinson, 1990 (signs)

        Raises ConfigError where no gradient reaches a layer that the output depends on."""
        errors = {(name, format): self._weight_change(name, format) for name in self.linears for format in formats}
        group_of = {member: name for name, members in self.groups.items() for member in members}
        totals = {(name, format): 0.0 for name in self.groups for format in formats}
        calls: list[_Call] = []
        called: set[str] = set()
        reached: set[str] = set()

        def watch(name: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
            called.add(name)
            if not torch.is_grad_enabled() or output.is_inference():
                return None
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            missed = [functional.linear(x.detach(), errors[name, format]) for format in formats]
            calls.append(_Call(name, group_of[name], output, missed))
            # An activation in place must not write to the tensor whose gradient is asked for.
            return output.clone()

        generator = torch.Generator().manual_seed(self.seed)
        num_rows = 0
        with torch.enable_grad(), self._watching(watch):
            for rows in self.workload.calibration_rows(self.model, self.num_calls):
                num_rows += len(rows)
                unit = functional.normalize(rows.double(), dim=1)
                for probe in range(PROBES):
                    signs = torch.randint(0, 2, unit.shape, generator=generator).to(unit) * 2 - 1
                    found = _gradients((unit * signs).sum(), calls, retain=probe < PROBES - 1)
                    reached.update(call.layer for call, _ in found)
                    for key, value in _squares(found, formats).items():
                        totals[key] += value
                calls.clear()
        # The layers' own products with their errors are less than a forward a format.
        self.forwards += 1 + len(formats) + 2 * PROBES
        self._check_idle([name for name in self.linears if name in called - reached], formats[0])
        return {key: total / (2 * PROBES * max(num_rows, 1)) for key, total in totals.items()}

    def _check_idle(self, names: Sequence[str], format: str) -> None:
        """Raises ConfigError unless the output stays what it is with these layers stored in `format`, as a loss of 0 says."""
        if not names:
            return
        if self._expected is None:
            self._expected = self._rows()
        with self.storing(dict.fromkeys(names, format)):
            rows = self._rows()
        if not torch.allclose(rows, self._expected, atol=0, equal_nan=True):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConfigError(
                f"precision.allocation.strategy: gradient_weighted found no gradient at {shown}, on which the output depends: forward turns"
                " gradients off or detaches; use strategy=layer_adaptive with sensitivity_share=1, which needs none"
            )

    def _weight_change(self, name: str, format: str) -> torch.Tensor:
        weight = self.linears[name].weight.detach()
        return (self._rounded(name, format).float() - weight.float()).to(weight.dtype)

    @contextmanager
    def _watching(self, watch: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
        """Inside, `watch(name, input, output)` sees each call of a layer and may give another output."""

        def hook_of(name: str) -> Callable[..., torch.Tensor | None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor | None:
                return watch(name, args[0] if args else kwargs["input"], output)

            return hook

        handles = [module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in self.linears.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Call:
    """Of a layer. errors: by format, what its output misses."""

    layer: str
    group: str
    output: torch.Tensor
    errors: list[torch.Tensor]


def _gradients(total: torch.Tensor, calls: Sequence[_Call], *, retain: bool) -> list[tuple[_Call, torch.Tensor]]:
    """Of `total` at the calls' outputs, where it depends on them."""
    if not calls or not total.requires_grad:
        return []
    # Not backward(): that would leave gradients in the caller's parameters.
    gradients = torch.autograd.grad(total, [call.output for call in calls], allow_unused=True, retain_graph=retain)
    return [(call, gradient) for call, gradient in zip(calls, gradients, strict=True) if gradient is not None]


def _squares(found: Sequence[tuple[_Call, torch.Tensor]], formats: Sequence[str]) -> dict[tuple[str, str], float]:
    """By group and format the sum over samples of (gradient . error)^2. Calls of one group on equally many samples add up first."""
    products: dict[tuple[str, str, int], torch.Tensor] = {}
    for call, gradient in found:
        for format, error in zip(formats, call.errors, strict=True):
            # A single vector is one sample; a call may have none.
            product = torch.atleast_2d(gradient.double() * error.double()).flatten(1).sum(1)
            key = (call.group, format, len(product))
            products[key] = products[key] + product if key in products else product
    sums: dict[tuple[str, str], float] = {}
    for (name, format, _), product in products.items():
        sums[name, format] = sums.get((name, format), 0.0) + product.square().sum().item()
    return sums
