"""`kernel_pytorch.optimize`: the same road as the command line, in the caller's process, on the caller's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.detect import BACKENDS, Resolution, make, matches
from kernel_pytorch.engine import restore
from kernel_pytorch.engine.apply import CALL_GROUPS, Built, enter_contexts
from kernel_pytorch.engine.parent import recipe_facts
from kernel_pytorch.engine.replay import Call
from kernel_pytorch.engine.run import Run
from kernel_pytorch.engine.saved import Saved, read
from kernel_pytorch.engine.session import conclude, describe_machine, make_job, translate
from kernel_pytorch.engine.staging import offload_of, staged
from kernel_pytorch.errors import ConfigError, UnsupportedOperationError
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.recipe.digest import digest
from kernel_pytorch.recipe.load import Recipe
from kernel_pytorch.registry import BACKENDS_GROUP, installed
from kernel_pytorch.report.progress import Progress
from kernel_pytorch.report.result import Report
from kernel_pytorch.schema import BackendConfig, RootConfig


@dataclass(frozen=True)
class Optimized:
    """model: in eval mode, called like the original; its calls run in inference mode. report: what was done and found."""

    model: nn.Module
    report: Report
    _source: restore.Source = field(repr=False)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the tensors, the resolved recipe, and one call with its output, for `kernel_pytorch.load`. No pickle.

        Makes the call: the first of `held_out`, else the caller's own. overwrite: replace an earlier save, which stays whole
        until the new one is. Raises ConfigError for a folder with other things in it and for a call that a file cannot hold,
        UnsupportedOperationError for a model with state that only pickle could."""
        restore.save(Path(folder), self.model, self.report, self._source, overwrite=overwrite)


def optimize(
    model: nn.Module,
    recipe: str | Path | Recipe,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    held_out: Sequence[Call] = (),
    calibration: Sequence[Call] = (),
    trained: bool = True,
    measure: bool = True,
    inplace: bool = False,
) -> Optimized:
    """Applies a recipe to `model`, verifies the result against the untouched model and measures it.

    recipe: a name, a file, or a loaded Recipe. args, kwargs: one call of the model, used for timing and, without `held_out`,
    for verification. held_out: more calls, `(args, kwargs)` each, that verification uses instead. calibration: calls that static
    scales and allocations are measured on, else the one call. overrides: as on the
    command line (`graph=none`). trained: False for random weights, where quality is reported and does not gate.
    measure: False skips the timing. A model on the CPU whose `args` are on a GPU runs there when the recipe offloads its weights
    (`memory=offload_weights`): that is how one runs that does not fit. inplace: change `model` itself instead of a clone that shares its
    parameters.

    Returns an Optimized. Raises ConfigError, UnsupportedOperationError, NoEffectError, VerificationError, PerformanceError,
    each with the Report so far as `.report`; unless `inplace`, `model` is then and always left as it was.
    """
    name = str(recipe.path) if isinstance(recipe, Recipe) else str(recipe)
    foreign = [word for word in overrides if word.lstrip("+~").split("=")[0].split(".")[0] in ("model", "data")]
    if foreign:
        raise ConfigError([f"overrides: found {word!r}; the model and its inputs are the caller's own here" for word in foreign])
    _require_calls(args, kwargs, held_out, calibration)
    # torch.compile(model) wraps what can be optimized.
    model = getattr(model, "_orig_mod", model)
    lazy = next((name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)), None)
    if lazy is not None:
        raise ConfigError(f"model: found {lazy} without a shape yet; allowed a model whose lazy modules were called once")
    composed = compose([f"+recipe={name}", *overrides, *([] if measure else ["measure=off"])])
    report = Report(recipe=recipe_facts(composed))
    on_host = composed.config.memory._target_ is not None and _is_on_host(model, (args, kwargs))
    backend, resolution = _resolve_for((args, kwargs) if on_host else model, composed.config.backend)
    workload = CallWorkload(args, dict(kwargs or {}), held_out=list(held_out) or None, calibration=list(calibration) or None)
    workload.trained = trained
    original = restore.describe_model(model)
    with _Attach(report, backend):
        describe_machine(report, backend)
        run = Run(make_job(composed.config, composed.choices, composed.ignored, resolution), report, Progress(None))
        steps, plan = run.plan()
        offload = offload_of(steps, backend) if on_host else None
        if offload is not None:
            if inplace:
                raise UnsupportedOperationError("the model is on the host and its inputs are not: leave out inplace")
            model = staged(model, offload, steps, backend, report)
        optimized = run.execute(steps, plan, model, workload, name=type(model).__name__, inplace=inplace)
    # As it was verified and timed: compiled code is for this mode, and quantized layers have no gradients.
    enter_contexts(Built(optimized, [backend.inference]))
    call: Call = held_out[0] if held_out else (args, dict(kwargs or {}))
    return Optimized(optimized, report, restore.Source(composed.config, composed.choices, composed.ignored, call, trained, original))


def _require_calls(args: Any, kwargs: Any, held_out: Any, calibration: Any) -> None:
    """Raises ConfigError for what is no call: a tensor is a sequence too, of its rows."""

    def is_call(args: Any, kwargs: Any) -> bool:
        return isinstance(args, (tuple, list)) and isinstance(kwargs, Mapping)

    if not is_call(args, kwargs or {}):
        key, found = ("kwargs", kwargs) if isinstance(args, (tuple, list)) else ("args", args)
        raise ConfigError(f"{key}: found a {type(found).__name__}; allowed: args a tuple or list, kwargs a dict, as in args=(x,)")
    for key, calls in (("held_out", held_out), ("calibration", calibration)):
        for number, call in enumerate(calls):
            if not (isinstance(call, (tuple, list)) and len(call) == 2 and is_call(*call)):
                shown = f"({', '.join(type(part).__name__ for part in call)})" if isinstance(call, (tuple, list)) else type(call).__name__
                raise ConfigError(f"{key}[{number}]: found {shown}; allowed: (args, kwargs) of one call, as in ((x,), {{}})")


def load(folder: str | Path, model: nn.Module, *, overrides: Sequence[str] = ()) -> Optimized:
    """What `Optimized.save` wrote, made from `model`: the original as it was built, with any weights; it is left as it was.

    Nothing is quantized, calibrated or timed again. The result is on the model's device, packed for its kernels, and must
    give the saved output for the saved call: bit for bit on the machine that saved it, within rounding on another.
    overrides: of the groups compile and graph (`compile=default`, `graph=none`), each in place of the whole group as saved.

    Raises ConfigError for a folder that was changed or a model that is not the one saved, UnsupportedOperationError where this
    machine cannot run it, VerificationError with the first module or value that differs; each with the Report as `.report`.
    """
    model = getattr(model, "_orig_mod", model)
    saved = read(Path(folder))
    config, choices, ignored = _with_overrides(saved, overrides)
    facts = saved.facts.recipe
    report = Report(
        recipe={
            "name": facts.name,
            "digest": facts.digest,
            "effective_digest": digest(config),
            "chain": list(facts.chain),
            "overrides": [*facts.overrides, *overrides],
        }
    )
    backend, resolution = _resolve_for(model, config.backend)
    with _Attach(report, backend):
        describe_machine(report, backend)
        run = Run(make_job(config, choices, ignored, resolution), report, Progress(None))
        loaded, source = restore.load(saved, model, run)
    enter_contexts(Built(loaded, [backend.inference]))
    return Optimized(loaded, report, source)


def _with_overrides(saved: Saved, overrides: Sequence[str]) -> tuple[RootConfig, dict[str, str], dict[str, list[str]]]:
    """The saved recipe, with the groups that overrides name as the overrides alone make them."""
    config, choices, ignored = restore.config_of(saved), dict(saved.facts.recipe.choices), dict(saved.facts.recipe.ignored)
    groups = {word: word.lstrip("+~").split("=")[0].split(".")[0] for word in overrides}
    foreign = [word for word, group in groups.items() if group not in CALL_GROUPS]
    if foreign:
        why = f"allowed {', '.join(CALL_GROUPS)}: the tensors are what the other groups made of them"
        raise ConfigError([f"overrides: found {word!r}; {why}" for word in foreign])
    if not groups:
        return config, choices, ignored
    composed = compose(list(overrides))
    for group in sorted(set(groups.values())):
        config = replace(config, **{group: getattr(composed.config, group)})
        choices[group], ignored[group] = composed.choices[group], composed.ignored.get(group, [])
    return config, choices, ignored


class _Attach(AbstractContextManager[None]):
    """Puts the report on our errors, and gives torch's own a name of ours where they have one."""

    def __init__(self, report: Report, backend: Backend) -> None:
        self.report, self.backend = report, backend

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        ours = translate(error, self.backend) if isinstance(error, Exception) else None
        ended_by = ours or error
        conclude(self.report, ended_by)
        # On torch's own errors too: what was done before is worth as much there.
        ended_by.report = self.report  # pyright: ignore[reportAttributeAccessIssue]
        if ours is not None:
            raise ours from error


def _is_on_host(model: nn.Module, inputs: Any) -> bool:
    """Whether the model lies on the host and its inputs on a device: it is to run there, its weights brought block by block."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"} and any(
        tensor.device.type != "cpu" for tensor in tensors
    )


def _resolve_for(found: nn.Module | Any, config: BackendConfig) -> tuple[Backend, Resolution]:
    """The backend of the device where the caller's model is, or the tensors of its inputs; a model is never moved."""
    tensors = [*found.parameters(), *found.buffers()] if isinstance(found, nn.Module) else tree_leaves(found)
    devices = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)} or {torch.device("cpu")}
    if len(devices) > 1:
        raise UnsupportedOperationError(f"the model is spread over {', '.join(sorted(map(str, devices)))}; put it on one device")
    kind = devices.pop().type
    # torch calls AMD's GPUs cuda, too.
    vendor = {"cuda": "amd" if torch.version.hip else "nvidia", "xla": "tpu"}.get(kind, kind)
    if vendor not in BACKENDS and vendor not in installed(BACKENDS_GROUP):
        raise UnsupportedOperationError(f"the model is on {kind}; supported are models on cpu, cuda, xla, and what installed packages add")
    backend = make(vendor, config)
    native, reason = matches(config, backend)
    return backend, Resolution(backend, native, reason)
