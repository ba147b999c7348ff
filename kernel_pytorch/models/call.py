"""The workload of a Python caller: the args and kwargs that were passed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kernel_pytorch.models.views import all_tensors, output_rows, to_rows
from kernel_pytorch.optimizer import Workload

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


class CallWorkload(Workload):
    """Calls `model(*args, **kwargs)`. held_out: further (args, kwargs) to verify on; without any, the caller's own input
    verifies too, with as many rows as it has."""

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        held_out: Sequence[Inputs] | None = None,
        *,
        phase: str = "forward",
    ) -> None:
        self.phase = phase
        self._timed: Inputs = (tuple(args), dict(kwargs or {}))
        self._held_out: list[Inputs] = [(tuple(more), dict(named)) for more, named in held_out or [self._timed]]
        first = next(all_tensors(self._timed), None)
        self.batch = first.shape[0] if first is not None and first.dim() else 1

    def call(self, model: nn.Module) -> Any:
        args, kwargs = self._timed
        return model(*args, **kwargs)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        num_seen = 0
        for args, kwargs in self._held_out:
            rows = to_rows(output_rows(model(*args, **kwargs)))
            num_seen += len(rows)
            yield rows
            if num_seen >= num_rows:
                return

    def probe(self, model: nn.Module) -> Any:
        args, kwargs = self._held_out[0]
        return model(*args, **kwargs)
