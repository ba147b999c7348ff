"""The workload of a Python caller: the args and kwargs that were passed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from kernel_pytorch.models.views import CALIBRATION_ROWS, all_tensors, flat_rows, output_rows, spread_rows, to_rows
from kernel_pytorch.optimizer import Workload

# Rows of one call that are compared at most, unless more are asked for.
MOST_ROWS_A_CALL = 2048
MOST_VALUES_A_CALL = 2**26

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


class CallWorkload(Workload):
    """Calls `model(*args, **kwargs)`. held_out: further (args, kwargs) to verify on; without any, the caller's own input
    verifies too, with as many rows as it has. calibration: further ones to calibrate on; without any, the caller's own."""

    def __init__(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        held_out: Sequence[Inputs] | None = None,
        calibration: Sequence[Inputs] | None = None,
        *,
        phase: str = "forward",
    ) -> None:
        self.phase = phase
        caller: Inputs = (tuple(args), dict(kwargs or {}))
        self._timed: Inputs = _own(caller)
        self._originals = [tensor.clone() for tensor in all_tensors(self._timed)]
        self._held_out: list[Inputs] = [(tuple(more), dict(named)) for more, named in held_out or [caller]]
        self.has_held_out = bool(held_out)
        self._calibration: list[Inputs] = [(tuple(more), dict(named)) for more, named in calibration or [caller]]
        first = next(all_tensors(self._timed), None)
        self.batch = first.shape[0] if first is not None and first.dim() else 1

    def reset(self) -> None:
        """The timed inputs as they came: a model may have written to them. Their addresses stay."""
        for tensor, original in zip(all_tensors(self._timed), self._originals, strict=True):
            tensor.copy_(original)

    def call(self, model: nn.Module) -> Any:
        args, kwargs = self._timed
        return model(*args, **kwargs)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        num_seen = 0
        for inputs in self._held_out:
            args, kwargs = _own(inputs)
            rows = to_rows(output_rows(model(*args, **kwargs)))
            # Evenly spaced: every sample is seen, and the logits of a long sequence still fit.
            rows = spread_rows(rows, max(num_rows, min(MOST_ROWS_A_CALL, MOST_VALUES_A_CALL // max(1, rows.shape[1]))))
            num_seen += len(rows)
            yield rows
            if num_seen >= num_rows:
                return

    def probe(self, model: nn.Module) -> Any:
        args, kwargs = _own(self._held_out[0])
        return model(*args, **kwargs)

    def calibrate(self, model: nn.Module, num_calls: int) -> None:
        """As many of the calibration inputs as there are, up to `num_calls`: a call twice shows nothing new."""
        for inputs in self._calibration[:num_calls]:
            args, kwargs = _own(inputs)
            model(*args, **kwargs)

    def calibration_rows(self, model: nn.Module, num_calls: int) -> Iterator[torch.Tensor]:
        for inputs in self._calibration[:num_calls]:
            args, kwargs = _own(inputs)
            yield spread_rows(flat_rows(output_rows(model(*args, **kwargs))), CALIBRATION_ROWS)


def _own(inputs: Inputs) -> Inputs:
    """Copies of the tensors: a model that writes to its input must not change the caller's, nor the next call's."""
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), (tuple(inputs[0]), dict(inputs[1])))
    return args, kwargs
