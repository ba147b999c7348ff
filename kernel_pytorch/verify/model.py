"""The quality gate: the optimized model against the baseline, and the name of the first module that left it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernel_pytorch.optimizer import Workload
from kernel_pytorch.report.result import Verification
from kernel_pytorch.schema import QualityFloor, VerifyConfig
from kernel_pytorch.verify.module import first_tensor
from kernel_pytorch.verify.rows import agreement, sqnr_db


# A recipe that changes no precision computes the same thing in another order: cosine and SQNR in dB that rounding leaves,
# by the element type computed in. A bf16 product carries 8 bits, and layers add their roundings up.
@dataclass(frozen=True)
class RoundingFloor:
    cosine_min: float
    sqnr_db: float


UNCHANGED_FLOORS = {
    torch.float64: RoundingFloor(0.999999, 100.0),
    torch.float32: RoundingFloor(0.9999, 60.0),
    torch.float16: RoundingFloor(0.999, 30.0),
    torch.bfloat16: RoundingFloor(0.99, 20.0),
}
# The finished model may leave its own uncompiled self by what rounding noise does to it, and this much more (dB).
END_TO_END_MARGIN_DB = 6.0
# Below this the noise is as large as the signal, and agreement would show nothing.
LEAST_END_TO_END_DB = 6.0


def rounding_floor(dtype: torch.dtype) -> RoundingFloor:
    """What a model keeps that computes the same thing in another order in `dtype`."""
    return UNCHANGED_FLOORS.get(dtype, UNCHANGED_FLOORS[torch.float32])


def floors(scheme: QualityFloor, verify: VerifyConfig, dtype: torch.dtype) -> dict[str, float]:
    """The least values that count: the higher of the scheme's floor and the run's. dtype: of a scheme that states none, the coarser
    of what the model is and what it is computed in."""
    stated = scheme.cosine_min is not None or scheme.sqnr_db is not None
    source = scheme if stated else rounding_floor(dtype)
    found: dict[str, float] = {}
    for name, none in (("cosine_min", -1.0), ("sqnr_db", 0.0)):
        values = [value for value in (getattr(source, name), getattr(verify, name)) if value is not None]
        found[name] = max(values, default=none)
    if verify.top1_agreement is not None:
        found["top1_agreement"] = verify.top1_agreement
    if verify.max_abs is not None:
        found["max_abs"] = verify.max_abs
    return found


class ModelValidator:
    """Judges output rows of a model against the baseline's."""

    def __init__(self, *, floors: dict[str, float], gated: bool) -> None:
        self.floors = floors
        self.gated = gated

    def judge(self, baseline: torch.Tensor, actual: torch.Tensor, *, logits: bool, into: Verification) -> list[str]:
        """Fills `into` with the agreement of [rows, D] outputs and returns what misses its floor, one sentence each.

        With `gated` False (random weights) only outputs that are not finite are a failure."""
        found = agreement(baseline, actual)
        into.rows, into.gated, into.floors = found.rows, self.gated, dict(self.floors)
        into.cosine_min, into.sqnr_db, into.max_abs = _finite(found.cosine_min), _finite(found.sqnr_db), _finite(found.max_abs)
        into.top1_agreement = found.top1 if logits else None
        if math.isnan(found.sqnr_db):
            return ["the optimized model's outputs are not finite"]
        if not self.gated:
            return []
        values = {"cosine_min": found.cosine_min, "sqnr_db": found.sqnr_db, "top1_agreement": found.top1, "max_abs": found.max_abs}
        misses = []
        for name, floor in self.floors.items():
            if name == "top1_agreement" and not logits:
                continue
            value = values[name]
            missed = value > floor if name == "max_abs" else not value >= floor
            if missed:
                misses.append(f"{name} {value:.5g} is {'above' if name == 'max_abs' else 'below'} {floor:.5g}")
        return misses


def _finite(value: float) -> float | None:
    """JSON has no infinity: equal outputs have an SQNR of None and a max_abs of 0."""
    return value if math.isfinite(value) else None


def collect_rows(model: nn.Module, workload: Workload, num_rows: int) -> torch.Tensor:
    """[rows, D] float32 on the CPU: the model's held-out outputs, at least `num_rows` where the workload has them."""
    batches: list[torch.Tensor] = []
    count = 0
    workload.reset()
    for rows in workload.held_out(model, num_rows):
        batches.append(rows)
        count += len(rows)
        if count >= num_rows:
            break
    workload.reset()
    if not batches:
        raise ValueError("the workload has no held-out rows")
    return torch.cat(batches)


# Units of roundoff by which two right results of one module differ: in 32 bits compilers reorder sums and approximate
# exp and erf; 16-bit kernels compute in 32 bits and differ in the one rounding of their output.
ROUNDINGS = {torch.float64: 16, torch.float32: 16}


@contextmanager
def rounding_noise(model: nn.Module, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Inside the block every leaf module's floating output is off by random roundings of `dtype`.

    It shows how far a right result may be from another right result: a compiler rounds at other places, and quantized
    activations turn a rounding into another code, which later layers amplify."""
    unit = torch.finfo(dtype).eps / 2 * ROUNDINGS.get(dtype, 1)
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        # torch has no generator for XLA's devices.
        drawn_on = torch.device("cpu") if output.device.type == "xla" else output.device
        generator = generators.setdefault(drawn_on, torch.Generator(drawn_on).manual_seed(seed))
        noise = torch.randn(output.shape, generator=generator, device=drawn_on, dtype=torch.float32).to(output.device)
        return (output.float() * (1 + unit * noise)).to(output.dtype)

    handles = [module.register_forward_hook(disturb) for module in model.modules() if not list(module.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded(model: nn.Module, keep: dict[str, torch.Tensor]) -> Iterator[None]:
    """Stores the first output of every module by name, in the order of the calls."""
    handles = []
    for name, module in model.named_modules():

        def record(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.is_floating_point() and name not in keep:
                keep[name] = tensor.detach().float().cpu()

        handles.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_divergence(baseline: nn.Module, changed: nn.Module, workload: Workload, *, floor_db: float) -> str | None:
    """The first module, in the order of the calls, whose output has an SQNR under `floor_db` against the baseline's.

    Both models run one probe, uncompiled. None when every shared module stays above it."""
    expected: dict[str, torch.Tensor] = {}
    actual: dict[str, torch.Tensor] = {}
    with _recorded(baseline, expected):
        workload.probe(baseline)
    with _recorded(changed, actual):
        workload.probe(changed)
    for name, output in actual.items():
        if name in expected and expected[name].shape == output.shape and not sqnr_db(expected[name], output) >= floor_db:
            return name or type(changed).__name__
    return None
