"""One call whose outputs were recorded, made again: the same bits on the same machine, a rounding apart on another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from kernel_pytorch.engine.apply import Built
from kernel_pytorch.engine.saved import ProbeFacts
from kernel_pytorch.errors import ConfigError, VerificationError
from kernel_pytorch.models.views import spread_rows
from kernel_pytorch.report.result import Report
from kernel_pytorch.stance import eager_code
from kernel_pytorch.verify.model import END_TO_END_MARGIN_DB, LEAST_END_TO_END_DB, rounding_floor, rounding_noise
from kernel_pytorch.verify.module import first_tensor
from kernel_pytorch.verify.rows import sqnr_db

Call = tuple[Sequence[Any], Mapping[str, Any]]

# Of a larger output, evenly spaced rows are kept: the logits of a long prompt are gigabytes.
_MOST_VALUES = 2**24
# Values of every module's output that are kept, to name the module where a difference starts.
_NUM_SAMPLES = 64


@dataclass(frozen=True)
class Recorded:
    """outputs: by place in what the model returned, on the CPU. modules: of every module's first output, evenly spaced values
    and the sum of all, float64, in the order in which the modules were done."""

    outputs: dict[str, torch.Tensor]
    modules: dict[str, torch.Tensor]

    def same_bits(self, other: Recorded) -> bool:
        return list(self.outputs) == list(other.outputs) and all(
            _same_bits(value, other.outputs[name]) for name, value in self.outputs.items()
        )


def record(model: nn.Module, call: Call, *, seed: int) -> Recorded:
    """One call of `model`, uncompiled. Raises ConfigError when no tensor comes out."""
    modules: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():

        def see(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            tensor = first_tensor(output)
            if name not in modules and tensor is not None and tensor.is_floating_point() and tensor.numel():
                modules[name] = _samples(tensor)

        handles.append(module.register_forward_hook(see))
    try:
        with eager_code():
            outputs = outputs_of(model, call, seed=seed)
    finally:
        for handle in handles:
            handle.remove()
    return Recorded(outputs, modules)


def outputs_of(model: nn.Module, call: Call, *, seed: int) -> dict[str, torch.Tensor]:
    """The tensors that one call returns, by their place; the arguments are copies, as a model may write to them."""
    copies: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        # One tensor passed twice stays one.
        return copies.setdefault(id(tensor), tensor.detach().clone())

    args, kwargs = tree_map_only(torch.Tensor, own, (tuple(call[0]), dict(call[1])))
    with torch.inference_mode(), _same_random_numbers(seed):
        found = {name: _kept(tensor) for name, tensor in _named_tensors(model(*args, **kwargs), "output")}
    if not found:
        raise ConfigError(f"{type(model).__name__} returns no tensor from the saved call: nothing could be compared")
    return found


@contextmanager
def _same_random_numbers(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _named_tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _named_tensors(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _named_tensors(getattr(value, field.name), f"{path}.{field.name}")


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() > _MOST_VALUES:
        rows = tensor.reshape(-1, tensor.shape[-1])
        tensor = spread_rows(rows, max(1, _MOST_VALUES // rows.shape[1]))
    return tensor.detach().to("cpu", copy=True).contiguous()


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(flat.numel(), _NUM_SAMPLES), dtype=torch.float64).round().long()
    return torch.cat([flat[places.to(flat.device)].double(), flat.sum(dtype=torch.float64).reshape(1)]).cpu()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(_bytes(first), _bytes(second))


class Replay:
    """Compares a model's outputs with recorded ones. dtype: computed in."""

    def __init__(self, call: Call, expected: Recorded, probe: ProbeFacts, dtype: torch.dtype, *, seed: int) -> None:
        self._call, self._expected, self._probe = call, expected, probe
        self._dtype, self._seed = dtype, seed
        self._eager: dict[str, torch.Tensor] = {}
        self._needed_db: dict[str, float] = {}

    def judge(self, built: Built, machine: Mapping[str, Any], report: Report, *, wraps: bool) -> None:
        """The uncompiled model against the file. wraps: `judge_finished` follows. Raises VerificationError that names the value
        that differs and the first module that does."""
        with ExitStack() as stack:
            for make in built.contexts:
                stack.enter_context(make())
            actual = record(built.model, self._call, seed=self._seed)
            changed = _differences(self._probe.machine, machine)
            exact = self._probe.repeatable and not changed
            if wraps or not exact:
                self._needed_db = self._noise_floors(built.model, actual.outputs)
        self._eager = actual.outputs
        self._require_same_form(actual)
        verification, gate = report.verification, report.verification.implementation
        verification.passed = gate.passed = False
        verification.rows = sum(math.prod(value.shape[:-1]) for value in actual.outputs.values())
        if exact:
            self._require_same_bits(actual, report)
            verification.message = "the saved call gives the saved output, bit for bit"
        else:
            why = f"it was saved with {', '.join(changed)}" if changed else "two calls gave different bits when it was saved"
            self._require_near(actual, report, why)
            verification.message = f"the saved call gives the saved output within rounding; not compared bit for bit: {why}"
        verification.passed = gate.passed = True

    def judge_finished(self, model: nn.Module, report: Report) -> None:
        """The compiled and captured model against its own uncompiled self. Two calls: the second may replay a graph."""
        for _ in range(2):
            outputs = outputs_of(model, self._call, seed=self._seed)
            for name, found in self._floating(self._eager):
                db, needed = sqnr_db(found, outputs[name]), self._needed_db[name]
                if not db >= needed:
                    report.verification.passed = report.verification.implementation.passed = False
                    raise VerificationError(
                        f"{name}: the compiled model is {db:.1f} dB from its own uncompiled steps; {needed:.1f} dB is needed"
                    )

    def _noise_floors(self, model: nn.Module, outputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """How near each output must be when only roundings differ (dB)."""
        with rounding_noise(model, self._dtype, self._seed):
            disturbed = record(model, self._call, seed=self._seed).outputs
        most = rounding_floor(self._dtype).sqnr_db
        noise = {name: sqnr_db(value, disturbed[name]) - END_TO_END_MARGIN_DB for name, value in outputs.items()}
        return {name: max(LEAST_END_TO_END_DB, min(most, db)) for name, db in noise.items()}

    def _floating(self, outputs: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        """Outputs that rounding moves a little. Integers (token ids, indices) jump, and are compared where nothing else came out."""
        floating = [(name, value) for name, value in outputs.items() if value.is_floating_point()]
        return floating or list(outputs.items())

    def _require_same_form(self, actual: Recorded) -> None:
        expected = {name: (value.dtype, tuple(value.shape)) for name, value in self._expected.outputs.items()}
        found = {name: (value.dtype, tuple(value.shape)) for name, value in actual.outputs.items()}
        if expected != found:
            name = next(name for name in [*expected, *found] if expected.get(name) != found.get(name))
            raise VerificationError(
                f"{name}: the loaded model returns {found.get(name, 'nothing')}, the saved one {expected.get(name, 'nothing')}"
            )

    def _require_same_bits(self, actual: Recorded, report: Report) -> None:
        for name, saved in self._expected.outputs.items():
            found = actual.outputs[name]
            if not _same_bits(saved, found):
                where = self._first_divergence(actual, report, floor_db=math.inf)
                raise VerificationError(f"{name} is not what was saved on this machine: {_worst(saved, found)}{where}")

    def _require_near(self, actual: Recorded, report: Report, why: str) -> None:
        gate = report.verification.implementation
        for name, saved in self._floating(self._expected.outputs):
            found, needed = actual.outputs[name], self._needed_db[name]
            db = sqnr_db(saved, found)
            if gate.end_to_end_sqnr_db is None or not db >= gate.end_to_end_sqnr_db:
                gate.end_to_end_sqnr_db, gate.end_to_end_floor_db = db, needed
            if not db >= needed:
                where = self._first_divergence(actual, report, floor_db=needed)
                far = f"{db:.1f} dB from what was saved; {needed:.1f} dB is what rounding explains ({why})"
                raise VerificationError(f"{name} is {far}: {_worst(saved, found)}{where}")

    def _first_divergence(self, actual: Recorded, report: Report, *, floor_db: float) -> str:
        for name, saved in self._expected.modules.items():
            found = actual.modules.get(name)
            if found is None or found.shape != saved.shape or not _near(saved, found, floor_db):
                report.verification.first_divergence = name or report.model.name
                return f"; first diverging module: {name or report.model.name}"
        return ""


def _near(saved: torch.Tensor, found: torch.Tensor, floor_db: float) -> bool:
    # The last is the sum over values that were not kept: it cancels, so it is good for bits only.
    return _same_bits(saved, found) or (floor_db < math.inf and sqnr_db(saved[:-1], found[:-1]) >= floor_db)


def _worst(saved: torch.Tensor, found: torch.Tensor) -> str:
    first, second = saved.double().reshape(-1), found.double().reshape(-1)
    distance = torch.where(first == second, 0.0, (first - second).abs().nan_to_num(math.inf))
    at = int(distance.argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(at), saved.shape)] if saved.dim() else []
    differ = int((distance > 0).sum())
    return f"{differ:,} of {first.numel():,} values differ, most at {place}: found {second[at].item():.6g}, saved {first[at].item():.6g}"


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    names = sorted({*saved, *here})
    return [f"{name} {_short(saved.get(name))}, here {_short(here.get(name))}" for name in names if saved.get(name) != here.get(name)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
