"""Output views: what of a model's output is compared, as [rows, D] float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from kernel_pytorch.errors import ConfigError


def floating_tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of a nested output, in order: tensors, mappings, sequences and dataclasses."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floating_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from floating_tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from floating_tensors(getattr(output, field.name))


def first_tensor(output: Any) -> torch.Tensor:
    """The first floating tensor of a nested output. Raises ConfigError when there is none to compare."""
    for tensor in floating_tensors(output):
        return tensor
    raise ConfigError(f"the model returned {type(output).__name__} without a floating-point tensor; there is nothing to verify")


def to_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] float32 on the CPU; a scalar or a vector is one row."""
    width = tensor.shape[-1] if tensor.dim() else 1
    return tensor.detach().reshape(-1, width).float().cpu()


def output_rows(output: Any) -> torch.Tensor:
    """The first floating tensor, and beside it those of the same leading shape (two heads of one model), as [rows, D].

    Tensors of another leading shape are not compared: a row of theirs is not a row of the first one."""
    leading = first_tensor(output).shape[:-1]
    alike = [tensor for tensor in floating_tensors(output) if tensor.shape[:-1] == leading and tensor.dim() == len(leading) + 1]
    return torch.cat([to_rows(tensor) for tensor in alike], dim=-1) if alike else to_rows(first_tensor(output))


def pooled_rows(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that `mask` [B, T] keeps: one sentence vector [D] float32 a row; a row without a token is left out.

    Not normalised: cosine has no scale, and the length of the vector is part of what must be kept."""
    hidden = first_tensor(output).detach()
    weight = mask.to(hidden.device, torch.float32).unsqueeze(-1)
    pooled = (hidden.float() * weight).sum(1) / weight.sum(1)
    return pooled[mask.any(1).to(hidden.device)]


def token_rows(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """One row a token that `mask` [B, T] keeps."""
    hidden = first_tensor(output).detach()
    return hidden[mask.to(hidden.device).bool()]


def spread_rows(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of `rows`, evenly spaced from the first to the last: logits of every token of a long prompt would not fit."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).round().long().to(rows.device)]
