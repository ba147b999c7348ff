"""The C++ half of a GraphedCall (replayer.cpp): a call like the one that a graph was found for is checked and replayed without Python.

It answers less than Python does, never other than Python would: graphs for values on the host, objects as arguments or weights on the
host stay with Python, and so does every call for which a check fails.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from kernel_pytorch.graph.kinds import MODES, Kind, modes
from kernel_pytorch.graph.signature import flatten
from kernel_pytorch.kernels.native import build

if TYPE_CHECKING:
    from kernel_pytorch.graph.captured import Graph
    from kernel_pytorch.graph.placement import HostArguments
    from kernel_pytorch.graph.recorder import Recorder
    from kernel_pytorch.graph.state import ModuleGuard

_SOURCE = Path(__file__).with_name("replayer.cpp")
_MODULE = "kernel_pytorch_replayer"


@functools.cache
def replayer_class() -> tuple[Any, str]:
    """The class, and why there is none: it is built once for this torch, Python and compiler (about 15 s on a 2-core Xeon)."""
    reason = ""
    # A file that was damaged is built once more.
    for _ in range(2):
        library = build(_SOURCE, for_python=True)
        if library.path is None:
            return None, library.reason
        loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(library.path))
        spec = importlib.util.spec_from_loader(_MODULE, loader)
        assert spec is not None
        try:
            return importlib.util.module_from_spec(spec).Replayer, ""
        except ImportError as error:
            reason = f"{library.path.name}: {error}"
        try:
            library.path.unlink()
        except OSError:
            break
    return None, reason


class QuickReplay:
    """run(args, kwargs): what a graph's call returns, or NotImplemented. kind, graph: whose it is, until it is closed. number: of
    the graph, which are numbered in the order in which they are made."""

    def __init__(self, replayer: Any, kind: Kind, graph: Graph) -> None:
        self.run = replayer.run
        self.kind: Kind | None = kind
        self.graph: Graph | None = graph
        self.num_copies, self.number = len(graph.buffers), graph.number
        self._close = replayer.close

    def close(self) -> None:
        """Lets go of the graph; `run` answers nothing from then on."""
        self.kind = self.graph = None
        self._close()


def quick_replay(
    kind: Kind, graph: Graph, guard: ModuleGuard, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> QuickReplay | None:
    """The one of a graph, made for a call that the graph is for; None where Python must look at each call."""
    if not graph.quick_tried:
        graph.quick_tried = True
        graph.quick = _made(kind, graph, guard, recorder, args, kwargs)
    return graph.quick


def _made(
    kind: Kind, graph: Graph, guard: ModuleGuard, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> QuickReplay | None:
    if not graph.is_plain or not guard.is_plain:
        return None
    made = configured(
        args,
        kwargs,
        recorder,
        Looks.of(guard),
        in_place=[(i, graph.pointers[i]) for i in graph.fixed],
        copies=[(i, graph.buffers[i]) for i in graph.copies],
        host=graph.host,
        code_first=not graph.pure,
        tensors_first=not (graph.pure or graph.repeatable),
        play=graph.recording.replay,
        outputs=graph.outputs(),
        spec=graph.spec,
    )
    return None if made is None else QuickReplay(made, kind, graph)


@dataclass(frozen=True)
class Looks:
    """What must be as it was. others: (container, key, value). addresses: tensors, with theirs. empty: dicts of hooks. sizes: lists and
    dicts, with theirs. trained: parameters, with whether they require gradients. code, children: as ModuleGuard.code gives them."""

    code: list[tuple[Any, Any, Any]] = field(default_factory=list)
    children: list[tuple[dict[str, Any], list[str], list[Any]]] = field(default_factory=list)
    others: list[tuple[Any, Any, Any]] = field(default_factory=list)
    addresses: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    empty: list[Any] = field(default_factory=list)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    trained: list[tuple[torch.Tensor, bool]] = field(default_factory=list)

    @classmethod
    def of(cls, guard: ModuleGuard) -> Looks:
        return cls(*guard.code(), *guard.tensors())

    def __add__(self, other: Looks) -> Looks:
        return Looks(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def configured(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorder: Recorder,
    looks: Looks,
    *,
    in_place: list[tuple[int, int]],
    copies: list[tuple[int, torch.Tensor]],
    host: HostArguments | None = None,
    code_first: bool,
    tensors_first: bool,
    play: Callable[[], None],
    outputs: list[tuple[Any, ...]],
    spec: TreeSpec,
) -> Any:
    """The C++ object for calls like this one, in modes like these; None where there is none. in_place: arguments by number, with
    addresses. copies: arguments by number, with the memory that they are copied to. host: what sends those on the host. code_first,
    tensors_first: what is looked at before the launch and not after it. outputs, spec: as Graph.outputs gives them, and how they are
    put together."""
    replayer, _ = replayer_class()
    flat = flatten(args, kwargs)
    if replayer is None or flat is None or not all(map(_can_be_given, outputs)):
        return None
    rows = [] if host is None else host.rows(flat[1])
    if rows is None:
        return None
    template = _template(spec)
    made = replayer()
    made.configure(
        tensor_types=(torch.Tensor, nn.Parameter),
        args=_described(args),
        kwargs=_described(kwargs),
        tensors=flat[1],
        in_place=in_place,
        copies=copies,
        host=None if host is None else (rows, host.blocks, host.device, host.sent, host.marks),
        modes=[(read, given, then) for (read, given), then in zip(MODES, modes(), strict=True)],
        **{part.name: getattr(looks, part.name) for part in fields(looks)},
        code_first=code_first,
        tensors_first=tensors_first,
        play=play,
        outputs=outputs,
        result=template,
        unflatten=functools.partial(_unflattened, spec) if template is None else None,
        device=None if recorder.last_stream is None else torch.empty(0, device=recorder.device),
        last_stream=recorder.last_stream,
    )
    return made


def _described(value: Any) -> tuple[Any, ...]:
    """Arguments that `flatten` takes, as the C++ class reads them."""
    kind = type(value)
    if kind in (torch.Tensor, nn.Parameter):
        return ("tensor",)
    if kind in (tuple, list):
        return (kind.__name__, [_described(item) for item in value])
    return ("dict", list(value), [_described(item) for item in value.values()]) if kind is dict else ("value", value)


def _can_be_given(output: tuple[Any, ...]) -> bool:
    """Whether an output is of the class that C++ gives it: copies are plain tensors there. NotImplemented says something else."""
    kind, leaf = output[:2]
    return type(leaf) in (torch.Tensor, nn.Parameter) if kind == "clone" else leaf is not NotImplemented


def _template(spec: TreeSpec) -> tuple[Any, ...] | None:
    """How outputs are put together, where only tuples, lists and dicts are. Nobody's own containers are made: not with real outputs
    in them, some could not be."""
    if spec.is_leaf():
        return ("tensor",)
    if spec.type not in (tuple, list, dict):
        return None
    # torch 2.10 and later warn about the attribute.
    items = [_template(child) for child in (spec.children() if hasattr(spec, "children") else spec.children_specs)]
    if None in items:
        return None
    return ("dict", list(spec.context), items) if spec.type is dict else (spec.type.__name__, items)


def _unflattened(spec: TreeSpec, leaves: list[Any]) -> Any:
    return tree_unflatten(leaves, spec)
