"""Output views: what of a model's output is compared, as [rows, D]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from kernel_pytorch.errors import ConfigError

# Rows of one calibration call that are compared at most: those of all calls are kept at once.
CALIBRATION_ROWS = 64


def all_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nested value, in order: tensors, mappings, sequences and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from all_tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from all_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from all_tensors(getattr(value, field.name))


def first_floating(output: Any) -> torch.Tensor:
    """The first floating-point tensor of a nested output, with its gradient where it has one. Raises ConfigError when there is
    none to compare."""
    for tensor in all_tensors(output):
        if tensor.is_floating_point():
            return tensor
    raise ConfigError(f"the model returned {type(output).__name__} without a floating-point tensor; there is nothing to verify")


def to_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] float32 on the CPU; a scalar or a vector is one row."""
    return flat_rows(tensor.detach()).float().cpu()


def flat_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D]; a scalar or a vector is one row."""
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def output_rows(output: Any) -> torch.Tensor:
    """The first floating tensor [..., D], and beside it those of the same leading shape, such as a second head's.

    Tensors of another leading shape are not compared: a row of theirs is not a row of the first one."""
    first = first_floating(output)
    if first.dim() == 0:
        return first
    alike = [
        tensor.to(first.device)
        for tensor in all_tensors(output)
        if tensor.is_floating_point() and tensor.dim() == first.dim() and tensor.shape[:-1] == first.shape[:-1]
    ]
    return torch.cat(alike, dim=-1)


def pooled_rows(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that `mask` [B, T] keeps: one sentence vector [D] float32 a row; a sample without a token is left out.

    Not normalised: cosine has no scale, and the length of the vector is part of what must be kept."""
    hidden = first_floating(output)
    weight = mask.to(hidden.device, torch.float32).unsqueeze(-1)
    pooled = (hidden.float() * weight).sum(1) / weight.sum(1)
    return pooled[mask.any(1).to(hidden.device)]


def token_rows(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """One row a token that `mask` [B, T] keeps."""
    hidden = first_floating(output)
    return hidden[mask.to(hidden.device).bool()]


def spread_rows(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of `rows`, evenly spaced from the first to the last: logits of every token of a long prompt would not fit."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long().to(rows.device)]
