"""A Llama-architecture decoder with random weights, and its three workloads: decode, prefill, forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.kv_cache import KvCaches
from kernel_pytorch.models.llama import Llama, LlamaConfig
from kernel_pytorch.models.source import Loaded, ModelSource, check_preset, torch_dtype
from kernel_pytorch.models.text import DataSource, Parts, RandomTokens, Vocabulary
from kernel_pytorch.models.tokens import TokenWorkload
from kernel_pytorch.models.views import flat_rows, to_rows, token_rows
from kernel_pytorch.optimizer import Workload
from kernel_pytorch.schema import Phase


@dataclass(frozen=True)
class Preset:
    """A size, the element type its baseline has, and the tokens a sample has unless the user says."""

    config: LlamaConfig
    dtype: torch.dtype
    length: int


# Dimensions: model cards of meta-llama/Llama-3.2-1B and Meta-Llama-3-8B. Without Llama 3.2's rescaling of rotary
# frequencies beyond 8k tokens: with random weights it changes neither cost nor meaning.
PRESETS = {
    "tiny": Preset(LlamaConfig(3, 256, 8, 2, 704, 2048, 32), torch.float32, 128),
    "llama32_1b": Preset(LlamaConfig(16, 2048, 32, 8, 8192, 128256, 64, tied=True), torch.bfloat16, 2048),
    "llama3_8b": Preset(LlamaConfig(32, 4096, 32, 8, 14336, 128256, 128), torch.bfloat16, 2048),
}


class DecoderSource(ModelSource):
    """Llama sizes with random weights: what a call costs does not depend on them, quality does and is only reported."""

    def __init__(self, *, preset: str | None = None, dtype: str | None = None, phase: Phase | None = None) -> None:
        self.preset = preset or "tiny"
        self.dtype = dtype
        self.phase = Phase(phase or Phase.decode)

    def default_data(self, *, batch: int | None = None, length: int | None = None) -> DataSource:
        return RandomTokens(batch=batch, length=length)

    def weight_bytes(self) -> int:
        preset = PRESETS[check_preset(self.preset, PRESETS)]
        model = Llama(preset.config, dtype=torch_dtype(self.dtype, preset.dtype), device=torch.device("meta"))
        return sum(weight.nbytes for weight in model.parameters())

    def load(self, *, data: DataSource | None, seed: int, device: torch.device, model_device: torch.device | None = None) -> Loaded:
        preset = PRESETS[check_preset(self.preset, PRESETS)]
        data = data or self.default_data()
        parts = data.parts(Vocabulary(preset.config.vocab_size), batch=1, length=preset.length, seed=seed)
        # Memory is taken once, on the device, in the final element type: 8 billion weights do not pass through the host.
        model = Llama(preset.config, dtype=torch_dtype(self.dtype, preset.dtype), device=torch.device("meta"))
        model = model.to_empty(device=model_device or device)
        model.tie()
        model.init_weights(seed)
        model.eval()
        return Loaded(model, _workload(self.phase, preset.config, parts, seed, device), f"decoder {self.preset}")


def _workload(phase: Phase, config: LlamaConfig, parts: Parts, seed: int, device: torch.device) -> Workload:
    if phase is Phase.decode:
        return DecodeWorkload(config, parts, seed=seed, device=device)
    caches = KvCaches(config, batch=parts.batch, num_slots=parts.length, device=device)

    def forward(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(ids)

    def prefill(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(ids, caches.of(model))

    invoke = prefill if phase is Phase.prefill else forward
    return TokenWorkload(parts, token_rows, phase=phase.value, trained=False, device=device, invoke=invoke, logits=True)


@dataclass
class _State:
    """The inputs of one model besides its cache, always the same objects. inside: what the cache and they now hold."""

    ids: torch.Tensor
    position: torch.Tensor
    inside: str = ""


class DecodeWorkload(Workload):
    """One new token a sample, with `length` tokens before it in the cache.

    The timed call writes slot `length` and moves nothing: it repeats exactly. Its context is random keys and values, so that
    no prompt has to pass through a model that was compiled and captured for one token.
    """

    phase = "decode"
    trained = False
    logits = True

    def __init__(self, config: LlamaConfig, parts: Parts, *, seed: int, device: torch.device) -> None:
        self.batch = parts.batch
        self.length: int = parts.length
        self.tokens_per_call = parts.batch
        self._parts = parts
        self._seed = seed
        self._device = device
        self._caches = KvCaches(config, batch=parts.batch, num_slots=parts.length + 1, device=device)
        self._states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
        self._timing_ids = parts.timing().ids[:, :1]

    def _state(self, model: nn.Module) -> _State:
        state = self._states.get(model)
        if state is None:
            with torch.inference_mode(False):
                state = _State(
                    torch.zeros(self.batch, 1, dtype=torch.int64, device=self._device),
                    torch.zeros(1, dtype=torch.int64, device=self._device),
                )
            self._states[model] = state
        return state

    def _step(self, model: nn.Module, ids: torch.Tensor, position: int) -> torch.Tensor:
        state = self._state(model)
        state.ids.copy_(ids)
        state.position.fill_(position)
        return model(state.ids, self._caches.of(model), state.position)

    def _begin(self, model: nn.Module, inside: str, seed: int) -> None:
        self._caches.fill(model, seed)
        self._state(model).inside = inside

    def call(self, model: nn.Module) -> Any:
        state = self._state(model)
        if state.inside != "timing":
            self._begin_timing(model, state)
        return model(state.ids, self._caches.of(model), state.position)

    def _begin_timing(self, model: nn.Module, state: _State) -> None:
        self._begin(model, "timing", self._seed)
        state.ids.copy_(self._timing_ids)
        state.position.fill_(self.length)

    def reset(self) -> None:
        # Here and not in the next call, which is timed.
        for model, state in list(self._states.items()):
            if state.inside != "timing":
                self._begin_timing(model, state)

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        """Steps over given tokens, each row one sample's logits. Even runs start with an empty cache, so that all keys are the
        model's own; odd runs end at the timed position, so that the whole cache is read."""
        num_steps = -(-num_rows // self.batch)
        run_length = min(-(-num_steps // 2), self.length)
        done = 0
        for run, tokens in enumerate(self._parts.held_out()):
            start = 0 if run % 2 == 0 else self.length + 1 - run_length
            self._begin(model, "held-out", self._seed + 1 + run)
            for step in range(min(run_length, num_steps - done)):
                logits = self._step(model, tokens.ids[:, step : step + 1], start + step)
                yield to_rows(logits[: tokens.num_valid])
                done += 1
            if done >= num_steps:
                return
        raise ConfigError(f"verify.num_rows: {num_rows} rows are asked for, {done * self.batch} come from {self._parts.shortage()}")

    def probe(self, model: nn.Module) -> Any:
        self._begin(model, "probe", self._seed + 1)
        return self._step(model, next(self._parts.held_out()).ids[:, :1], self.length)

    def calibrate(self, model: nn.Module, num_calls: int) -> None:
        for _ in self.calibration_rows(model, num_calls):
            pass

    def calibration_rows(self, model: nn.Module, num_calls: int) -> Iterator[torch.Tensor]:
        for index, tokens in enumerate(self._parts.calibration(-(-num_calls // self.length))):
            self._begin(model, "calibration", self._seed + index)
            for step in range(min(self.length, num_calls - index * self.length)):
                yield flat_rows(self._step(model, tokens.ids[:, step : step + 1], step))
