"""What torch.compile did: graphs, graph breaks, recompilations; and a recompile limit that cannot be hit silently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch._dynamo
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from kernel_pytorch.errors import CompilationError


@dataclass
class CompileCounts:
    """graphs: FX graphs handed to the compiler. graph_breaks: places where a graph ended before its function did.
    compilations: frames compiled, first times and again. recompilations: frames compiled again because a guard failed;
    None where this torch does not say."""

    graphs: int = 0
    graph_breaks: int = 0
    compilations: int = 0
    recompilations: int | None = 0


@contextmanager
def compile_counts() -> Iterator[CompileCounts]:
    """Counts what is compiled inside the block; the object is complete when the block ends.

    Counters are process-wide: compile one arm a block. A frame that another arm compiled before (two models of one
    class share their code) counts as a recompilation of that code."""
    counts = CompileCounts()
    before = _snapshot()

    def on_start(args: Any = None) -> None:
        counts.compilations += 1
        # A compile id is frame/attempt: 3/0 is the first compilation of frame 3, 3/1 the second.
        compile_id = getattr(args, "compile_id", None)
        if compile_id is None:
            counts.recompilations = None
        elif counts.recompilations is not None and not str(compile_id).split("_")[0].endswith("/0"):
            counts.recompilations += 1

    callback_handler.register_start_callback(on_start)
    try:
        yield counts
    finally:
        # torch._dynamo.reset() inside the block has already removed it.
        if on_start in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(on_start)
        after = _snapshot()
        counts.graphs, counts.graph_breaks = after[0] - before[0], after[1] - before[1]


def _snapshot() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@contextmanager
def error_on_recompile_limit(num_arms: int = 1) -> Iterator[None]:
    """Inside the block, reaching torch's recompile limit raises CompilationError instead of running the rest eagerly.

    num_arms: models of one class share their code objects and with them one limit, so each arm brings its own."""
    config: Any = torch._dynamo.config
    limits = {
        "recompile_limit": config.recompile_limit * num_arms,
        "accumulated_recompile_limit": config.accumulated_recompile_limit * num_arms,
    }
    with config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False, **limits):
        try:
            yield
        except FailOnRecompileLimitHit as error:
            raise CompilationError(
                f"torch.compile recompiled one function more than {limits['recompile_limit']} times and would run it eagerly from"
                f" here on; set compile.dynamic=true or fix the input shapes ({error})"
            ) from error
