"""Agreement of two sets of output rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Agreement:
    """cosine_min: least over the rows. sqnr_db: over all values; inf when equal. max_abs: in the outputs' unit.
    top1: share of rows with the same largest entry."""

    rows: int
    cosine_min: float
    sqnr_db: float
    max_abs: float
    top1: float


def _comparable(baseline: torch.Tensor, actual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both with the baseline's own infinities (masked logits) left out; None where they are not finite in different places."""
    finite = torch.isfinite(baseline)
    if not torch.equal(finite, torch.isfinite(actual)) or not torch.equal(baseline[~finite], actual[~finite]):
        return None
    return baseline.masked_fill(~finite, 0.0), actual.masked_fill(~finite, 0.0)


def sqnr_db(signal: torch.Tensor, other: torch.Tensor) -> float:
    """10 log10(|signal|^2 / |signal - other|^2), computed in float64; inf when equal, nan when a value is not finite."""
    alike = _comparable(signal.double(), other.double())
    if alike is None:
        return math.nan
    signal, other = alike
    noise = (signal - other).square().sum().item()
    power = signal.square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf


def agreement(baseline: torch.Tensor, actual: torch.Tensor) -> Agreement:
    """Compares [rows, D] outputs. Raises ValueError when the shapes differ."""
    if baseline.shape != actual.shape:
        raise ValueError(f"outputs differ in shape: {tuple(baseline.shape)} and {tuple(actual.shape)}")
    if baseline.numel() == 0:
        raise ValueError("no output rows to compare")
    alike = _comparable(baseline.double(), actual.double())
    if alike is None:
        return Agreement(len(baseline), math.nan, math.nan, math.nan, 0.0)
    first, second = alike
    num_rows = len(first)
    if first.shape[1] == 1:
        # The cosine of two numbers is a sign: one output a row is compared as one column.
        first, second = first.T, second.T
    norms = first.norm(dim=1) * second.norm(dim=1)
    cosine = (first * second).sum(dim=1) / norms.clamp_min(1e-300)
    # Two zero rows agree; a zero row against another does not.
    cosine = torch.where(norms == 0, (first.norm(dim=1) == second.norm(dim=1)).double(), cosine)
    return Agreement(
        rows=num_rows,
        cosine_min=cosine.min().clamp(-1, 1).item(),
        sqnr_db=sqnr_db(first, second),
        max_abs=(first - second).abs().max().item(),
        top1=(baseline.argmax(dim=1) == actual.argmax(dim=1)).double().mean().item(),
    )


def relative_l2(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """||actual - exact|| / ||exact|| in float64; 0 for two zeros, inf when a value is not finite that is in exact, or is another there."""
    actual, exact = actual.double(), exact.double()
    finite = torch.isfinite(exact)
    if not torch.equal(finite, torch.isfinite(actual)) or not torch.allclose(actual[~finite], exact[~finite], equal_nan=True):
        return math.inf
    actual, exact = actual.masked_fill(~finite, 0.0), exact.masked_fill(~finite, 0.0)
    size = exact.norm().item()
    error = (actual - exact).norm().item()
    return error / size if size else (0.0 if error == 0 else math.inf)
