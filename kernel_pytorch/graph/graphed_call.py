"""A module's call that replays a recorded graph where that measures faster, and calls straight through everywhere else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.graph.inputs import Call, describe, holds_tensors, rebuild
from kernel_pytorch.graph.recorder import Recorder, Recording
from kernel_pytorch.graph.state import ModuleGuard, WriteWatch, python_state

# Captures cost a second and a memory pool each; beyond these the call goes straight through.
_MAX_KEYS = 16
_MAX_GRAPHS_OF_A_KEY = 2
_MAX_RESETS = 4


@dataclass
class _Family:
    """Calls of one structure. staged: leaves that are copied in. by_address: leaves that the call writes to, or that no copy
    can stand for: a graph is for their addresses only."""

    objects: list[Any]
    staged: set[int] = field(default_factory=set)
    by_address: tuple[int, ...] = ()
    graphs: dict[tuple[Any, ...], _Graph] = field(default_factory=dict)
    num_attempts: int = 0
    refusal: str | None = None


class _Graph:
    """One recording with the memory that it reads: held, so that no address can become someone else's."""

    def __init__(self, recording: Recording, static: list[torch.Tensor], staged: set[int], call: Call, watch: WriteWatch) -> None:
        self._replay = recording.replay
        self.pool_bytes = recording.pool_bytes
        self._static, self._staged = static, sorted(staged)
        self._keep = (call.objects, list(watch.found.values()))
        self._leaves, self._spec = tree_flatten(recording.output)
        self._sources = [self._source(leaf, call, watch) for leaf in self._leaves]

    def _source(self, leaf: Any, call: Call, watch: WriteWatch) -> int | str:
        """Where an output comes from: the number of the argument that it is, `same` object every time, or a `clone`."""
        if isinstance(leaf, torch.Tensor):
            for index, tensor in enumerate(self._static):
                if leaf is tensor:
                    return index
            return "same" if watch.reads(leaf) else "clone"
        if holds_tensors(leaf) and not any(leaf is known for known in call.objects):
            raise UnsupportedOperationError(f"the output holds a {type(leaf).__name__}, whose tensors the next replay would overwrite")
        return "same"

    def moved(self, tensors: list[torch.Tensor], by_address: tuple[int, ...]) -> set[int]:
        """Leaves that are elsewhere than when the graph was recorded, and are not copied in."""
        fixed = (i for i in range(len(tensors)) if i not in self._staged and i not in by_address)
        return {i for i in fixed if tensors[i].data_ptr() != self._static[i].data_ptr()}

    def copied_bytes(self) -> int:
        return sum(self._static[i].nbytes for i in self._staged)

    def run(self, tensors: list[torch.Tensor]) -> Any:
        for index in self._staged:
            self._static[index].copy_(tensors[index])
        self._replay()
        outputs = [
            tensors[source] if isinstance(source, int) else leaf.clone() if source == "clone" else leaf
            for source, leaf in zip(self._sources, self._leaves, strict=True)
        ]
        return tree_unflatten(outputs, self._spec)


class GraphedCall:
    """Stands where nn.Module.compile() puts its callable. Every new key of arguments and modes is recorded once, timed
    against the plain call, and replayed from then on when that is at least `min_speedup` times as fast.

    Returned tensors are copies: the next call does not overwrite them. Outputs that are an argument come back as that
    argument; views of one come back as copies. Arguments at another address than before are copied in, except those that
    the call writes to, which get a graph of their own address. The first call with a new key runs the model more than
    once, on memory and random state that are put back in between. `decisions` says for every key what was chosen and why.

    Not seen: attributes of modules that change between calls other than tensors; a model that changes such attributes
    itself is found out and never captured. Calls with gradients enabled go straight through. One thread at a time replays;
    others go straight through."""

    def __init__(self, model: nn.Module, plain: Callable[..., Any], recorder: Recorder, num_warmup_calls: int, min_speedup: float) -> None:
        self.decisions: list[dict[str, Any]] = []
        self._model, self._plain, self._recorder = model, plain, recorder
        self._num_warmup_calls, self._min_speedup = num_warmup_calls, min_speedup
        self._lock = threading.Lock()
        self._families: dict[tuple[Any, ...], _Family] = {}
        self._guard = ModuleGuard(model)
        self._num_resets = 0
        self._noted: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._recorder.busy() or not self._lock.acquire(blocking=False):
            return self._plain(*args, **kwargs)
        try:
            return self._call(args, kwargs)
        finally:
            self._lock.release()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = describe(args, kwargs)
        family = self._family(call)
        if family is None or family.refusal is not None:
            return self._plain(*args, **kwargs)
        graph = family.graphs.get(_addresses(family, call))
        if graph is not None:
            moved = graph.moved(call.tensors, family.by_address)
            if not moved:
                return self._replay(graph, call)
            family.staged |= moved
            family.graphs.clear()
        elif len(family.graphs) >= _MAX_GRAPHS_OF_A_KEY:
            self._refuse(
                family, call, "an argument that cannot be copied in (written to, expanded, or inside an object) is a new one in every call"
            )
            return self._plain(*args, **kwargs)
        return self._record(family, call, args, kwargs)

    def _family(self, call: Call) -> _Family | None:
        """The calls of this structure under the modes of now; None, noted, when this call must go straight through."""
        why = self._straight_through(call)
        if why is not None:
            self._note(why, call)
            return None
        broken = self._guard.broken()
        if broken is not None:
            self._num_resets += 1
            self._families.clear()
            self._guard = ModuleGuard(self._model)
            self.decisions.append({"inputs": "all", "captured": False, "reason": f"graphs dropped: {broken}"})
        key = (call.key(), _modes())
        family = self._families.get(key)
        if family is None:
            if len(self._families) >= _MAX_KEYS:
                self._note(f"more than {_MAX_KEYS} kinds of arguments", call)
                return None
            family = self._families[key] = _Family(call.objects)
        return family

    def _straight_through(self, call: Call) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are enabled: capture is for no_grad and inference_mode"
        if call.refusal is not None:
            return call.refusal
        elsewhere = [t.device for t in call.tensors if t.device.type != self._recorder.device.type and t.numel() != 1]
        if elsewhere:
            return f"an argument is on {elsewhere[0]}"
        if self._guard.has_hooks():
            return "a module has a forward hook, which a replay would not run"
        if self._num_resets > _MAX_RESETS:
            return f"the model's parameters or modes changed more than {_MAX_RESETS} times"
        return None

    def _record(self, family: _Family, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        family.num_attempts += 1
        rng, before = self._recorder.rng_state(), python_state(self._model)
        watch = WriteWatch(self._recorder.device.type)
        try:
            with torch.compiler.set_stance("force_eager"), watch:
                result = self._plain(*args, **kwargs)
        except RuntimeError as error:
            watch.restore()
            self._recorder.set_rng_state(rng)
            self._refuse(family, call, f"the call cannot be watched: {_first_line(error)}")
            return self._plain(*args, **kwargs)
        after = describe(args, kwargs)
        if python_state(self._model) != before or (after.key(), after.places()) != (call.key(), call.places()):
            # What Python holds cannot be put back, so this call counts. A model may fill a cache once: try once more.
            if family.num_attempts > 1:
                self._refuse(family, call, "the call changes Python attributes, which a replay would not")
            return result
        if watch.waits_for is not None:
            self._refuse(family, call, f"the call waits for a value of the device: {watch.waits_for}")
            return result
        watch.restore()
        family.by_address = tuple(i for i, t in enumerate(call.tensors) if watch.wrote(t) or _overlaps(t))
        family.staged -= set(family.by_address)
        try:
            kept = self._capture(family, call, args, kwargs, watch)
        except (RuntimeError, UnsupportedOperationError) as error:
            kept = None
            self._refuse(family, call, f"capture failed: {_first_line(error)}")
        watch.restore()
        self._recorder.set_rng_state(rng)
        return self._plain(*args, **kwargs) if kept is None else self._replay(kept, call)

    def _capture(self, family: _Family, call: Call, args: Any, kwargs: Any, watch: WriteWatch) -> _Graph | None:
        """Records and times the call; None when the replay is not worth keeping."""
        static = [_buffer_like(t) if i in family.staged else t for i, t in enumerate(call.tensors)]
        leaves = iter(static)
        static_args, static_kwargs = rebuild(args, leaves), rebuild(kwargs, leaves)

        def recorded() -> Any:
            return self._plain(*static_args, **static_kwargs)

        # Compiles on the caller's stream.
        recorded()
        watch.restore()
        self._recorder.warm_up(recorded, self._num_warmup_calls)
        watch.restore()
        graph = _Graph(self._recorder.record(recorded), static, family.staged, call, watch)

        def plain() -> Any:
            return self._plain(*args, **kwargs)

        def replay() -> Any:
            again = describe(args, kwargs)
            self._guard.broken()
            return self._replay(graph, again)

        comparison = self._recorder.compare(plain, replay, watch.restore)
        speedup = comparison.plain_ms / comparison.replay_ms
        keep = speedup >= self._min_speedup
        words = "replay is kept" if keep else "replay is not kept"
        self.decisions.append(
            {
                "inputs": _shown(call),
                "captured": keep,
                "reason": f"{words}: {speedup:.3f} times the plain call's speed, {self._min_speedup} asked for",
                "plain_ms": comparison.plain_ms,
                "replay_ms": comparison.replay_ms,
                "speedup": speedup,
                "num_samples": comparison.num_samples,
                "copied_bytes": graph.copied_bytes(),
                "pool_bytes": graph.pool_bytes,
                "num_written": watch.num_written,
            }
        )
        if not keep:
            family.refusal = words
            family.graphs.clear()
            return None
        family.graphs[_addresses(family, call)] = graph
        return graph

    def _replay(self, graph: _Graph, call: Call) -> Any:
        self._recorder.enter_replay()
        result = graph.run(call.tensors)
        self._recorder.leave_replay()
        return result

    def _refuse(self, family: _Family, call: Call, reason: str) -> None:
        family.refusal = reason
        family.graphs.clear()
        self.decisions.append({"inputs": _shown(call), "captured": False, "reason": reason})

    def _note(self, reason: str, call: Call) -> None:
        """Says once that calls go straight through, and why."""
        if reason not in self._noted:
            self._noted.add(reason)
            self.decisions.append({"inputs": _shown(call), "captured": False, "reason": reason})


def _addresses(family: _Family, call: Call) -> tuple[Any, ...]:
    return (call.places(), tuple(call.tensors[i].data_ptr() for i in family.by_address))


def _modes() -> tuple[Any, ...]:
    """Everything process- or thread-wide that decides which kernels a call runs."""
    cuda = torch.backends.cuda
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # pyright: ignore[reportAttributeAccessIssue]
        (cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def _buffer_like(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, so that it is served by the same kernels."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: nothing can be copied into it."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _shown(call: Call) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in call.tensors) or "no tensors"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
