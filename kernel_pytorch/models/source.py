"""Where an nn.Module and its workload come from: the contract of a model source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.text import BuiltinSentences, DataSource, Parts
from kernel_pytorch.optimizer import Workload
from kernel_pytorch.schema import nearest


@dataclass(frozen=True)
class Loaded:
    """model: in eval mode, on the device unless asked otherwise. workload: what one call of it is. name: for the report."""

    model: nn.Module
    workload: Workload
    name: str


class ModelSource(ABC):
    """One way to get a model. Constructors take the schema's fields by keyword and do no work."""

    def default_data(self, *, batch: int | None = None, length: int | None = None) -> DataSource:
        """What the model is fed when no data source is named; `batch` and `length` stay the user's where they are set."""
        return BuiltinSentences(batch=batch, length=length)

    def weight_bytes(self) -> int | None:
        """Bytes of the weights, known before they are made or read; None when the source cannot tell."""
        return None

    @abstractmethod
    def load(self, *, data: DataSource | None, seed: int, device: torch.device, model_device: torch.device | None = None) -> Loaded:
        """The model with the weights it comes with, and its workload. `data` None is `default_data()`. model_device: where the
        model lies, when that is not `device`, where its inputs are.

        Raises ConfigError (one line a mistake) for a setting that this source cannot follow."""


def check_length(parts: Parts, most: int | None) -> None:
    """ConfigError when samples are longer than the model has positions for."""
    length = parts.timing().ids.shape[1]
    if most is not None and length > most:
        raise ConfigError(f"data.length: found {length}; allowed: 1 to {most}, the positions that the model has")


def torch_dtype(name: str | None, default: torch.dtype) -> torch.dtype:
    """The torch dtype of a schema name; `default` for None."""
    return default if name is None else getattr(torch, name)


def check_preset(preset: str, allowed: Iterable[str]) -> str:
    """`preset`, or ConfigError with the nearest allowed name."""
    names = sorted(allowed)
    if preset not in names:
        raise ConfigError(f"model.preset: found {preset!r}{nearest(preset, names)}; allowed: {', '.join(names)}")
    return preset
