"""The workload of a model that takes whole samples of token ids: encoders, and decoders reading a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.text import Parts, Tokens
from kernel_pytorch.models.views import CALIBRATION_ROWS, spread_rows, to_rows
from kernel_pytorch.optimizer import Workload

View = Callable[[Any, torch.Tensor], torch.Tensor]
Invoke = Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]


def by_keyword(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """How transformers' models are called."""
    return model(input_ids=ids, attention_mask=mask)


class TokenWorkload(Workload):
    """Calls `invoke(model, ids, mask)`, always with the same two tensor objects.

    Held-out batches are copied into them, so that a compiled or captured call is verified through exactly what is timed.
    view(output, mask) gives the rows of one batch; logits says that they are scores over a vocabulary.
    """

    def __init__(
        self,
        parts: Parts,
        view: View,
        *,
        phase: str,
        trained: bool,
        device: torch.device,
        invoke: Invoke = by_keyword,
        logits: bool = False,
    ) -> None:
        self.phase = phase
        self.batch = parts.batch
        self.length = parts.length
        self.tokens_per_call = parts.batch * parts.length
        self.trained = trained
        self.logits = logits
        self._parts = parts
        self._view = view
        self._timing = parts.timing()
        # Ordinary tensors, also when loaded under inference mode, which would forbid writing to them later.
        with torch.inference_mode(False):
            self._ids = self._timing.ids.to(device, copy=True)
            self._mask = self._timing.mask.to(device, copy=True)
        self._inside = self._timing
        self._invoke = invoke

    def _load(self, tokens: Tokens) -> None:
        if tokens is not self._inside:
            self._ids.copy_(tokens.ids)
            self._mask.copy_(tokens.mask)
            self._inside = tokens

    def _run(self, model: nn.Module, tokens: Tokens) -> Any:
        self._load(tokens)
        return self._invoke(model, self._ids, self._mask)

    def call(self, model: nn.Module) -> Any:
        return self._run(model, self._timing)

    def reset(self) -> None:
        self._load(self._timing)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        # Long prompts give thousands of rows a batch: at least four batches are looked at, none of them whole.
        most = max(self.batch, -(-num_rows // 4))
        num_seen = 0
        for tokens in self._parts.held_out():
            mask = tokens.mask.clone()
            mask[tokens.num_valid :] = 0
            rows = to_rows(spread_rows(self._view(self._run(model, tokens), mask), most))
            num_seen += len(rows)
            yield rows
            if num_seen >= num_rows:
                return
        raise ConfigError(f"verify.num_rows: {num_rows} rows are asked for, {num_seen} come from {self._parts.shortage()}")

    def probe(self, model: nn.Module) -> Any:
        return self._run(model, next(self._parts.held_out()))

    def calibrate(self, model: nn.Module, num_calls: int) -> None:
        for tokens in self._parts.calibration(num_calls):
            self._run(model, tokens)

    def calibration_rows(self, model: nn.Module, num_calls: int) -> Iterator[torch.Tensor]:
        for tokens in self._parts.calibration(num_calls):
            yield spread_rows(self._view(self._run(model, tokens), tokens.mask), max(self.batch, CALIBRATION_ROWS))
