"""The optimizer contract: what a step is asked, what it answers, and what it is given.

An optimizer replaces modules of a model that the engine cloned for it. It never mutates a parameter's data, dtype or
device, never sets a process-wide switch (it returns a context manager instead), and does no work in its constructor.
A class is abstract or final; everything around these two methods is the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kernel_pytorch.errors import NoEffectError, UnsupportedOperationError

if TYPE_CHECKING:
    from kernel_pytorch.backends.base import Backend


class Level(str, Enum):
    """How a step runs on a backend."""

    native = "native"
    emulated = "emulated"
    unsupported = "unsupported"


@dataclass(frozen=True)
class Support:
    """A backend's answer for one step. reason: why, or what to expect; shown in the plan."""

    level: Level
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """One module that a step replaced.

    name: in the model that the step was given. original, replacement: the modules. kernel: what the replacement computes
    with (`reference` for a plain-torch emulation).
    """

    name: str
    original: nn.Module
    replacement: nn.Module
    kernel: str


@dataclass(frozen=True)
class Skipped:
    """One module that a step matched and left alone."""

    module: str
    reason: str


@dataclass
class Applied:
    """What a step did.

    model: the changed model. changes: modules replaced. skipped: matched and left alone. num_changed: things changed that are
    not module replacements (calls redirected, callables wrapped). kernels: what does the work, when `changes` does not say.
    context: entered around every call of the model; None when the step needs none. not_applicable: why the step had nothing
    to do here, or None. details: facts for the report (JSON types only).
    """

    model: nn.Module
    changes: Sequence[Change] = ()
    skipped: Sequence[Skipped] = ()
    num_changed: int = 0
    kernels: Sequence[str] = ()
    context: Callable[[], AbstractContextManager[Any]] | None = None
    not_applicable: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Workload(ABC):
    """What one call is. Model sources make it; from Python the caller's args and kwargs do.

    phase: forward, prefill, decode or train_step. batch: samples a call. length: tokens a sample, or the context of a decode
    step; None when the source cannot tell. tokens_per_call: None when a sample is not a sequence.
    trained: the weights are trained, so quality gates; False makes the quality gate report only.
    logits: rows of `held_out` are scores over classes or a vocabulary, so top-1 agreement means something.
    has_held_out: `held_out` uses inputs that `call` does not; False when there are no others.
    """

    phase: str = "forward"
    batch: int = 1
    length: int | None = None
    tokens_per_call: int | None = None
    trained: bool = True
    logits: bool = False
    has_held_out: bool = True

    @abstractmethod
    def call(self, model: nn.Module) -> Any:
        """Runs the timed call once and returns the model's raw output."""

    def reset(self) -> None:  # noqa: B027  a workload without state has nothing to reset
        """Brings KV caches and random state back to where the timed call starts."""

    @abstractmethod
    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        """Runs `model` on inputs that timing and calibration never saw and yields [rows, D] float32 views of the output
        on the CPU, in a fixed order, until at least `num_rows` rows came or the source has no more."""

    @abstractmethod
    def probe(self, model: nn.Module) -> Any:
        """Runs one small held-out call (for hooks that watch modules work) and returns the raw output."""

    def calibrate(self, model: nn.Module, num_calls: int) -> None:
        """Runs `model` on up to `num_calls` calibration inputs, which verification and timing never see."""
        for _ in range(num_calls):
            self.probe(model)

    def calibration_rows(self, model: nn.Module, num_calls: int) -> Iterator[torch.Tensor]:
        """Runs `model` as `calibrate` does, a call a step, and yields the [rows, D] view of each output where it lies, in the
        model's dtype, with its gradient where gradients are on. Raises UnsupportedOperationError where there is no view."""
        raise UnsupportedOperationError(f"{type(self).__name__} has no view of the outputs of calibration calls")


@dataclass(frozen=True)
class Portable:
    """A replaced module in a form that is the same on every machine: what a file holds of it.

    facts: what the recipe does not say, JSON types. tensors: by buffer name, in the number format's layout, not a kernel's."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Context:
    """What `apply` is given. backend: the machine the step runs on. workload: for steps that must watch the model work.
    emulate: use plain-torch references, not kernels. deterministic seed for steps that sample. restored: modules of a saved
    model by name, tensors on the model's device; None when nothing is being loaded."""

    backend: Backend
    workload: Workload
    emulate: bool = False
    seed: int = 0
    restored: Mapping[str, Portable] | None = None


class Optimizer(ABC):
    """One step of a recipe.

    keeps_arithmetic: a replaced module runs the original's own operations on the same values. It is compared with the original as
    it is; all others with their reference in float64, for which a kernel of the original may not exist."""

    keeps_arithmetic: ClassVar[bool] = False

    @abstractmethod
    def support(self, backend: Backend) -> Support:
        """Whether `backend` can do this step. Looks at facts only: it must answer for a device that is not there."""

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> Applied:
        """Replaces modules of `model` and says which. Raises NoEffectError when a named pattern matches nothing."""

    def reference(self, original: nn.Module) -> nn.Module:
        """A plain-torch module that computes, from the untouched original, what the replacement must compute.

        Written apart from the replacement's own code, so that a mistake there shows. The default says that the step
        changes how, not what: the original itself is the reference."""
        return original

    def portable(self, model: nn.Module) -> dict[str, Portable]:
        """Modules of `model`, by name, that `apply` made from weights that are gone: saving keeps them in this form.

        A class that names any must build exactly those from `context.restored` when `apply` is given it, and neither read
        the model's weights nor call the workload then. Raises ConfigError for a Portable that does not fit the model.
        The default is for steps that a second `apply` repeats: the engine then fills in the saved tensors."""
        return {}


@dataclass(frozen=True)
class Selection:
    """Modules that patterns selected, by name, and the eligible ones that they left out. unmatched: `exclude` patterns that none of the
    eligible ones has: options exclude names that many models lack, so these are told and no mistake."""

    matched: dict[str, nn.Module]
    skipped: list[Skipped]
    unmatched: list[str] = field(default_factory=list)


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """What each module answers to, by its id: every name that it stands under, and the names of modules that a step merged into it."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), list(getattr(module, "original_names", ()))).append(name)
    return found


def select_modules(
    model: nn.Module,
    eligible: Callable[[str, nn.Module], bool],
    include: Sequence[str],
    exclude: Sequence[str],
) -> Selection:
    """Eligible modules by name; fnmatch patterns choose, and `exclude` wins over `include`.

    A module that has several names, or that stands for modules that were merged, answers to all of them. An empty `include`
    selects every eligible module. Raises NoEffectError for an `include` pattern that selects none:
    a pattern that matches nothing is a mistake, never a no-op.
    """
    names = names_of(model)
    candidates: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name and id(module) not in seen and eligible(name, module):
            seen.add(id(module))
            candidates[name] = module

    def matches(module: nn.Module, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names[id(module)])

    dead = [pattern for pattern in include if not any(matches(module, pattern) for module in candidates.values())]
    if dead:
        shown = ", ".join(sorted(candidates)[:3]) or "none"
        raise NoEffectError(
            f"include pattern {', '.join(map(repr, dead))} matches no eligible module of {type(model).__name__};"
            f" it has {len(candidates)}, such as: {shown}"
        )
    matched: dict[str, nn.Module] = {}
    skipped: list[Skipped] = []
    for name, module in candidates.items():
        if include and not any(matches(module, pattern) for pattern in include):
            continue
        parts = () if any(fnmatchcase(name, pattern) for pattern in include) else getattr(module, "original_names", ())
        left_out = [part for part in parts if include and not any(fnmatchcase(part, pattern) for pattern in include)]
        if left_out:
            skipped.append(Skipped(name, f"merged with {', '.join(left_out)}, which no include pattern names; use fusion=none"))
            continue
        hit = next((pattern for pattern in exclude if matches(module, pattern)), None)
        if hit is not None:
            merged = getattr(module, "original_names", ())
            others = [part for part in merged if not fnmatchcase(part, hit)] if not fnmatchcase(name, hit) else []
            along = f", and with it {', '.join(others)}: fusion=none parts them" if others else ""
            skipped.append(Skipped(name, f"excluded by pattern {hit!r}{along}"))
        else:
            matched[name] = module
    unmatched = [pattern for pattern in exclude if not any(matches(module, pattern) for module in candidates.values())]
    return Selection(matched, skipped, unmatched)


def replace_module(model: nn.Module, name: str, replacement: nn.Module) -> None:
    """Puts `replacement` where the dotted `name` stands in `model`, under every name that the same module object has."""
    original = model.get_submodule(name)
    for parent in list(model.modules()):
        # Not named_children(), which gives a module that stands under two names only once.
        for child_name, child in list(parent._modules.items()):
            if child is original:
                setattr(parent, child_name, replacement)


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor subclass is made of (another library's packed weight), which has no memory of its own; else itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain_parts(getattr(tensor, name))]


def tensor_bytes(module: nn.Module, device_type: str | None = None) -> int:
    """Bytes of all distinct parameters and buffers of `module`; tied tensors count once.

    device_type: count only what is there (`cuda`), and with it what modules hold in their attribute `held_tensors` beside both."""
    tensors = [part for tensor in (*module.parameters(), *module.buffers()) for part in _plain_parts(tensor)]
    if device_type is not None:
        tensors += [tensor for part in module.modules() for tensor in getattr(part, "held_tensors", ())]
        tensors = [tensor for tensor in tensors if tensor.device.type == device_type]
    seen: set[int] = set()
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        # An XLA tensor's storage has no address; none is a view of another.
        key = id(tensor) if tensor.device.type == "xla" else storage.data_ptr()
        if key not in seen or storage.nbytes() == 0:
            seen.add(key)
            total += storage.nbytes()
    return total
