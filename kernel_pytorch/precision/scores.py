"""What it costs a model when a layer is stored in a format: one estimate a strategy, lower is better, none below zero.

Layers that read the same tensor (Q, K, V; gate, up) are decided together: a group. Losses of a group are summed over its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from kernel_pytorch.optimizer import Workload
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import AllocationStrategy, WeightConfig

Linears = Mapping[str, nn.Linear]
# The share of calibration rows whose error a content-adaptive score looks at from above.
WORST_ROWS = 0.95
_BINS = 256


@dataclass
class Observed:
    """Of one layer, over calibration: the sums of squares of each input column and, with gradients, of each output's gradient."""

    inputs: torch.Tensor
    gradients: torch.Tensor | None = None


@dataclass
class Scorer:
    """Scores layers of one model. forwards: calibration passes of the whole model spent so far; one with gradients counts as three."""

    model: nn.Module
    linears: Linears
    weight: WeightConfig
    workload: Workload
    num_calls: int
    seed: int
    forwards: int = 0
    _observed: dict[str, Observed] = field(default_factory=dict)
    _expected: torch.Tensor | None = None

    def groups(self) -> list[tuple[str, ...]]:
        """Names of the layers that one call gives the same tensor, in the order of the model."""
        readers: dict[tuple[int, int], list[str]] = {}
        kept: list[torch.Tensor] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = args[0] if args else kwargs["input"]
                # Kept alive, so that no later tensor gets its identity.
                kept.append(x)
                names = readers.setdefault((id(x), x._version if not x.is_inference() else 0), [])
                if name not in names:
                    names.append(name)

            return hook

        handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in self.linears.items()]
        try:
            with torch.no_grad():
                self.workload.calibrate(self.model, 1)
        finally:
            for handle in handles:
                handle.remove()
        self.forwards += 1
        group_of: dict[str, tuple[str, ...]] = {}
        for names in readers.values():
            for name in names:
                group_of.setdefault(name, tuple(names))
        found = [group_of.get(name, (name,)) for name in self.linears]
        return list(dict.fromkeys(group for group in found if group[0] in self.linears))

    def losses(self, strategy: AllocationStrategy, group: Sequence[str], formats: Sequence[str]) -> list[float]:
        """One loss a format."""
        if strategy in (AllocationStrategy.layer_adaptive, AllocationStrategy.content_adaptive):
            worst = strategy is AllocationStrategy.content_adaptive
            return [self.measured(group, name, worst=worst) for name in formats]
        score = {
            AllocationStrategy.entropy_based: self._entropy,
            AllocationStrategy.nvfp4_double_quantization: self._weight_error,
            AllocationStrategy.activation_aware: self._output_error,
            AllocationStrategy.gradient_weighted: self._fisher,
        }[strategy]
        return [sum(score(name, format) for name in group) for format in formats]

    def _entropy(self, name: str, format: str) -> float:
        """Entropy of the weight's histogram (bits) times its number of values times the format's noise, 4 ** -bits: even spreads carry
        more information a value and lose more of it."""
        weight = self.linears[name].weight.detach().float()
        counts = torch.histc(weight / weight.std().clamp_min(1e-30), _BINS, -4, 4)
        shares = counts[counts > 0] / counts.sum()
        entropy = -(shares * shares.log2()).sum().item()
        bits = 8 * STORAGES[format].nbytes(weight.shape[0], weight.shape[1], self.config_of(format)) / weight.numel()
        return entropy * weight.numel() * 4.0**-bits

    def _weight_error(self, name: str, format: str) -> float:
        """Squared error of the stored weight over the weight's own square: what scales of two levels leave."""
        weight = self.linears[name].weight.detach().float()
        return (self._rounded(name, format) - weight).square().sum().item() / max(weight.square().sum().item(), 1e-30)

    def _output_error(self, name: str, format: str) -> float:
        """Predicted squared error of the layer's output over the output's own, columns weighted by the inputs' second moments.
        Source: arXiv:2306.00978, section 3"""
        weight = self.linears[name].weight.detach().float()
        moments = self._observe(gradients=False)[name].inputs
        error = ((self._rounded(name, format) - weight).square() @ moments).sum().item()
        return error / max((weight.square() @ moments).sum().item(), 1e-30)

    def _fisher(self, name: str, format: str) -> float:
        """Squared weight error times the diagonal of the outputs' Fisher information, as the product of the moments of the layer's
        input and of its output's gradient.   Source: arXiv:1503.05671"""
        weight = self.linears[name].weight.detach().float()
        seen = self._observe(gradients=True)[name]
        assert seen.gradients is not None
        return (seen.gradients @ ((self._rounded(name, format) - weight).square() @ seen.inputs)).item()

    def measured(self, group: Sequence[str], format: str, *, worst: bool = False) -> float:
        """1 - cosine of the model's output rows over calibration, with this group alone stored in `format`: the mean, or the
        quantile WORST_ROWS."""
        if self._expected is None:
            self._expected = self._rows()
        with self.storing(dict.fromkeys(group, format)):
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

    def _observe(self, *, gradients: bool) -> dict[str, Observed]:
        if self._observed and (not gradients or all(seen.gradients is not None for seen in self._observed.values())):
            return self._observed
        found: dict[str, Observed] = {}
        outputs: list[tuple[str, torch.Tensor]] = []
        for name, linear in self.linears.items():
            zeros = [torch.zeros(size, device=linear.weight.device) for size in (linear.in_features, linear.out_features)]
            found[name] = Observed(zeros[0], zeros[1] if gradients else None)

        def watch(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor | None:
                x = args[0] if args else kwargs["input"]
                found[name].inputs += x.detach().float().flatten(0, -2).square().sum(0)
                if not gradients:
                    return None
                if not output.requires_grad:
                    output = output.detach().requires_grad_()
                outputs.append((name, output))
                return output

            return hook

        handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in self.linears.items()]
        generator = torch.Generator().manual_seed(self.seed)
        try:
            with torch.enable_grad() if gradients else torch.no_grad():
                for rows in self.workload.calibration_rows(self.model, self.num_calls):
                    if gradients:
                        signs = torch.randint(0, 2, rows.shape, generator=generator).to(rows) * 2 - 1
                        # Not backward(): that would leave gradients in the caller's parameters.
                        total = (rows.float() * signs.float()).sum()
                        gradient = torch.autograd.grad(total, [output for _, output in outputs], allow_unused=True)
                        for (name, _), found_gradient in zip(outputs, gradient, strict=True):
                            seen = found[name].gradients
                            if found_gradient is not None and seen is not None:
                                seen += found_gradient.float().flatten(0, -2).square().sum(0)
                        outputs.clear()
        finally:
            for handle in handles:
                handle.remove()
        self.forwards += 3 if gradients else 1
        self._observed = found
        return found
