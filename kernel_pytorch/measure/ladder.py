"""The ladder: every arm timed against eager and compiled in one process, and the gates that judge it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kernel_pytorch.errors import CompilationError
from kernel_pytorch.measure.graphs import compile_counts
from kernel_pytorch.measure.latency import time_interleaved
from kernel_pytorch.measure.memory import peak_memory_bytes
from kernel_pytorch.report.result import COMPILED, EAGER, RECIPE, Report, Rung
from kernel_pytorch.report.statistics import median, relative_error_of_median
from kernel_pytorch.schema import MeasureConfig

# Eager timed a second time under another name: the two must agree, and by how much they do not is the noise.
_AGAIN = "eager again"
# A machine noisier than this cannot excuse a missed gate by its noise.
MOST_ALLOWANCE = 0.05


@dataclass(frozen=True)
class Arm:
    """One rung before it is timed.

    call: one workload call. context: entered around the calls, outside the clock. reset: run before each round, outside
    the clock (KV caches, random state). held_bytes: bytes that the arm holds outside its model, such as the private pool
    of a captured CUDA graph. first_call_s, graphs, graph_breaks: from the arm's first call, None for what was not seen.
    """

    name: str
    model: nn.Module
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] | None = None
    reset: Callable[[], None] | None = None
    held_bytes: int = 0
    first_call_s: float | None = None
    graphs: int | None = None
    graph_breaks: int | None = None


@dataclass(frozen=True)
class Ladder:
    """noise: eager's median over the median of eager timed again; its distance from 1 is the noise."""

    rungs: list[Rung] = field(default_factory=list)
    noise: float | None = None


def measure_ladder(
    arms: Sequence[Arm],
    config: MeasureConfig,
    *,
    synchronize: Callable[[], None],
    cuda: bool,
    tokens_per_call: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Ladder:
    """Times all arms interleaved, then takes each arm's peak memory in a pass of its own.

    The arm named `eager` is the baseline and is timed twice. Raises CompilationError when an arm compiles while it is
    timed: its samples would hold compile time. Raises ValueError for two arms of one name.
    """
    by_name = {arm.name: arm for arm in arms}
    if len(by_name) != len(arms) or _AGAIN in by_name:
        raise ValueError(f"arms need distinct names: {[arm.name for arm in arms]}")
    if EAGER in by_name:
        by_name[_AGAIN] = by_name[EAGER]
    samples = _time(by_name, config, synchronize, cuda, on_progress)
    again = samples.pop(_AGAIN, None)
    medians = {name: median(values) for name, values in samples.items()}
    rungs = [
        Rung(
            name=arm.name,
            latency_ms=medians[arm.name],
            latency_ms_samples=samples[arm.name],
            ratio_to_eager=_ratio(medians.get(EAGER), medians[arm.name]),
            ratio_to_compiled=_ratio(medians.get(COMPILED), medians[arm.name]),
            tokens_per_s=None if tokens_per_call is None else tokens_per_call / medians[arm.name] * 1e3,
            peak_memory_bytes=_peak(arm, synchronize, cuda),
            first_call_s=arm.first_call_s,
            graphs=arm.graphs,
            graph_breaks=arm.graph_breaks,
        )
        for arm in arms
    ]
    return Ladder(rungs, None if again is None else medians[EAGER] / median(again))


def _time(
    arms: dict[str, Arm],
    config: MeasureConfig,
    synchronize: Callable[[], None],
    cuda: bool,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, list[float]]:
    timed_compilations: list[int] = []
    with compile_counts() as counts:

        def progress(done: int, total: int) -> None:
            # The first report comes after every arm was warm and ran one timed round.
            timed_compilations.append(counts.compilations)
            if on_progress is not None:
                on_progress(done, total)

        samples = time_interleaved(
            {name: arm.call for name, arm in arms.items()},
            num_rounds=config.num_rounds,
            min_round_ms=config.min_round_ms,
            synchronize=synchronize,
            cuda=cuda,
            contexts={name: arm.context for name, arm in arms.items() if arm.context is not None},
            before_round={name: arm.reset for name, arm in arms.items() if arm.reset is not None},
            on_progress=progress,
        )
    late = timed_compilations[-1] - timed_compilations[0]
    if late:
        raise CompilationError(f"torch.compile ran {late} times while the ladder was timed; the samples would hold compile time")
    return samples


def _ratio(reference_ms: float | None, latency_ms: float) -> float | None:
    return None if reference_ms is None or latency_ms == 0 else reference_ms / latency_ms


def _peak(arm: Arm, synchronize: Callable[[], None], cuda: bool) -> int | None:
    # XLA's runtime has one peak for the life of the process, and its CPU device none.
    if any(parameter.device.type == "xla" for parameter in arm.model.parameters()):
        return None
    if arm.reset is not None:
        arm.reset()
    return arm.held_bytes + peak_memory_bytes(arm.model, arm.call, context=arm.context, synchronize=synchronize, cuda=cuda)


def allowance(report: Report) -> float:
    """Share by which a ratio to eager may be off: the distance of the A/A ratio from 1, or twice the standard error of the
    two medians where that is larger (one A/A pair can agree by luck)."""
    drift = 0.0 if report.noise is None else abs(1 - report.noise)
    eager, recipe = report.rung(EAGER), report.rung(RECIPE)
    if eager is None or recipe is None or not eager.latency_ms_samples or not recipe.latency_ms_samples:
        return min(MOST_ALLOWANCE, drift)
    errors = (relative_error_of_median(eager.latency_ms_samples), relative_error_of_median(recipe.latency_ms_samples))
    return min(MOST_ALLOWANCE, max(drift, 2 * math.hypot(*errors)))


def judge(report: Report, measure: MeasureConfig) -> str | None:
    """Why the run fails on performance, or None. A recipe that changed nothing is the baseline and cannot fail."""
    if not any(step.changed for step in report.steps):
        return None
    before, after = report.model.bytes_before, report.model.bytes_after
    memory_ratio = after / before if before and after is not None else None
    recipe = report.rung(RECIPE)
    speedup = recipe.ratio_to_eager if recipe is not None else None
    reasons = [
        _too_slow(speedup, measure.min_speedup, allowance(report)),
        _too_big(memory_ratio, measure.max_memory_ratio),
        _no_gain(speedup, memory_ratio, allowance(report)) if measure.require_gain else None,
    ]
    return "; ".join(reason for reason in reasons if reason is not None) or None


def _too_slow(speedup: float | None, least: float | None, noise: float) -> str | None:
    if speedup is None or least is None or speedup * (1 + noise) >= least:
        return None
    return f"{speedup:.3f}x eager is below measure.min_speedup={least:g} (noise of {noise:.1%} allowed)"


def _too_big(ratio: float | None, most: float | None) -> str | None:
    if ratio is None or most is None or ratio <= most:
        return None
    return f"model bytes are {ratio:.3f}x the baseline's, above measure.max_memory_ratio={most:g}"


def _no_gain(speedup: float | None, memory_ratio: float | None, noise: float) -> str | None:
    if speedup is None or speedup * (1 + noise) >= 1 or (memory_ratio is not None and memory_ratio < 1):
        return None
    size = "its bytes are unknown" if memory_ratio is None else f"model bytes are {memory_ratio:.3f}x"
    return f"no gain: {speedup:.3f}x eager (noise of {noise:.1%} allowed) and {size} (measure.require_gain=false accepts it)"
