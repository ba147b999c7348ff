"""One plain call that answers the caller, watched for what a call of another size could not do in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernel_pytorch.graph.state import WriteWatch, python_state


@dataclass
class Watched:
    """ran: the call was made, and `result` is its answer; otherwise it was undone. refusal: why calls like it must not be padded,
    or None. changed: Python attributes of the model are others than before. writes: to memory that outlives the call."""

    ran: bool
    result: Any = None
    refusal: str | None = None
    changed: bool = False
    writes: bool = False


def watched_call(model: nn.Module, plain: Callable[..., Any], device: torch.device, args: Any, kwargs: Any) -> Watched:
    """Calls `plain` once. What it raises but for RuntimeError, which watching may cause, is the caller's."""
    rng, state = _rng_state(device), python_state(model)
    watch = WriteWatch(device.type)
    try:
        with watch:
            result = plain(*args, **kwargs)
    except RuntimeError as error:
        watch.restore()
        _set_rng_state(device, rng)
        return Watched(False, refusal=f"the call cannot be watched: {(str(error).splitlines() or [type(error).__name__])[0]}", writes=True)
    seen = Watched(True, result, changed=python_state(model) != state, writes=watch.num_written > 0)
    if seen.writes:
        seen.refusal = "the call writes to memory that outlives it, which padding would be written to"
    elif not torch.equal(_rng_state(device), rng):
        seen.refusal = "the call draws random numbers, and would draw others for another size"
    return seen


def _rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
