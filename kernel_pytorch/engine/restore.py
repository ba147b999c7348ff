"""Saves what a recipe made of a model, and makes it again from the file: structure by the recipe, tensors by the file.

The steps run on the caller's model as they did when it was optimized. Modules whose weights are gone are built from the
file, everything else is filled in, and the saved call must give the saved output.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernel_pytorch import __version__
from kernel_pytorch.engine.apply import CALL_GROUPS, Built, apply_all, apply_calls, apply_modules, settle_receipts
from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.engine.replay import Call, Recorded, Replay, record
from kernel_pytorch.engine.run import Run
from kernel_pytorch.engine.saved import Facts, ModelFacts, ModuleFacts, ProbeFacts, RecipeFacts, Saved, TensorFacts, describe, write
from kernel_pytorch.engine.saved_call import CallReader, CallWriter
from kernel_pytorch.engine.steps import active, build_steps
from kernel_pytorch.errors import ConfigError, UnsupportedOperationError
from kernel_pytorch.kernels import tables
from kernel_pytorch.measure.graphs import compile_counts, error_on_recompile_limit
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.optimizer import Context, Portable, tensor_bytes
from kernel_pytorch.recipe.canonical import from_dict, to_dict
from kernel_pytorch.recipe.digest import digest
from kernel_pytorch.registry import find_target, target_names
from kernel_pytorch.report.result import ModelResult, Report, WorkloadResult
from kernel_pytorch.schema import RECIPE_GROUPS, RootConfig

# Names of the file's tensors start with what they are.
_MODEL, _MODULE, _INPUT, _OUTPUT, _SEEN = "model.", "module.", "probe.input.", "probe.output.", "probe.module."
_MOST_LINES = 5


@dataclass(frozen=True)
class Source:
    """What a result remembers so that it can be saved. call: the one that is replayed. original: tensors of the model
    before the recipe."""

    config: RootConfig
    choices: dict[str, str]
    ignored: dict[str, list[str]]
    call: Call
    trained: bool
    original: dict[str, TensorFacts]


def persistent_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and the buffers of a state_dict, under every name that they have."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        buffers = {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                yield f"{module_name}.{name}" if module_name else name, tensor


def describe_model(model: nn.Module) -> dict[str, TensorFacts]:
    """Element types and shapes, which say whether another model is the same one."""
    return {
        name: TensorFacts(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape))
        for name, tensor in persistent_tensors(model)
    }


def save(folder: Path, model: nn.Module, report: Report, source: Source, *, overwrite: bool) -> None:
    """Writes what `load` needs. Raises ConfigError with the way out, and UnsupportedOperationError for a model whose state
    no file without pickle can hold."""
    _require_plain_state(model)
    device = _device_of(model)
    writer = CallWriter(_INPUT, device)
    args, kwargs = writer.encode(tuple(source.call[0]), "args"), writer.encode(dict(source.call[1]), "kwargs")
    tensors = dict(writer.tensors)
    modules: dict[str, ModuleFacts] = {}
    packed: set[int] = set()
    for step, optimizer in active(build_steps(source.config, source.choices)):
        for name, portable in optimizer.portable(model).items():
            modules[name] = ModuleFacts(group=step.group, facts=portable.facts, tensors=list(portable.tensors))
            tensors.update({f"{_MODULE}{name}.{key}": tensor for key, tensor in portable.tensors.items()})
            packed |= _own_ids(model.get_submodule(name))
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in persistent_tensors(model):
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
        elif id(tensor) not in packed:
            names[id(tensor)] = name
            tensors[f"{_MODEL}{name}"] = tensor
    recorded = record(model, source.call, seed=source.config.seed)
    again = record(model, source.call, seed=source.config.seed)
    tensors.update({f"{_OUTPUT}{index}": value for index, value in enumerate(recorded.outputs.values())})
    tensors.update({f"{_SEEN}{index}": value for index, value in enumerate(recorded.modules.values())})
    probe = ProbeFacts(
        args=args,
        kwargs=kwargs,
        outputs=list(recorded.outputs),
        modules=list(recorded.modules),
        repeatable=recorded.same_bits(again),
        machine=machine_facts(report),
    )
    write(
        folder,
        tensors,
        recipe=_recipe_facts(report, source),
        model=ModelFacts(name=report.model.name, dtype=report.model.dtype, trained=source.trained, tensors=source.original),
        modules=modules,
        aliases=aliases,
        probe=probe,
        overwrite=overwrite,
    )


def _recipe_facts(report: Report, source: Source) -> RecipeFacts:
    values = to_dict(source.config)
    return RecipeFacts(
        name=report.recipe["name"],
        digest=report.recipe["digest"],
        effective_digest=digest(source.config),
        chain=list(report.recipe["chain"]),
        overrides=list(report.recipe["overrides"]),
        choices=source.choices,
        ignored=source.ignored,
        config={group: values[group] for group in RECIPE_GROUPS},
        seed=source.config.seed,
    )


def machine_facts(report: Report) -> dict[str, Any]:
    """What the bits of an output depend on besides the recipe: the machine of the report, and which kernels compute."""
    found = report.environment
    return {
        **{name: found[name] for name in ("device", "arch", "isa", "driver")},
        **{name: found["versions"][name] for name in ("torch", "triton", "torchao", "transformers", "numpy")},
        "kernel-pytorch": __version__,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "kernels": {row.group: sorted(row.kernels) for row in report.steps if row.group not in CALL_GROUPS and row.kernels},
        "tuned": _tuned_digest(found["device"]),
    }


def _tuned_digest(device: str) -> str | None:
    """Of the tables that kernels of this GPU are configured by; other configurations add up in another order."""
    pattern = tables.file_name("*", device)
    folders = (Path(tables.__file__).with_name("tuned"), tables.user_file("", device).parent)
    found = [path.read_bytes() for folder in folders for path in sorted(folder.glob(pattern))]
    return hashlib.sha256(b"\0".join(found)).hexdigest() if found else None


def _require_plain_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedOperationError(
                f"{name or 'the model'}: {type(module).__name__} keeps extra state, which needs pickle; a saved folder holds tensors only"
            )
    for name, tensor in persistent_tensors(model):
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided or tensor.is_meta:
            raise UnsupportedOperationError(
                f"{name}: found a {type(tensor).__name__} on {tensor.device}; a saved folder holds plain tensors"
            )


def _own_ids(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}


def _device_of(model: nn.Module) -> torch.device:
    # Weights of streamed blocks lie on the host, and the memory that they compute in does not.
    held = [tensor for module in model.modules() for tensor in getattr(module, "held_tensors", ())]
    devices = [tensor.device for tensor in [*model.parameters(), *model.buffers(), *held]]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def config_of(saved: Saved) -> RootConfig:
    """The recipe of the file. Raises ConfigError when it was changed, or names a class that no recipe may name."""
    recipe = saved.facts.recipe
    where = f"{saved.path}: recipe"
    if set(recipe.config) != set(RECIPE_GROUPS):
        raise ConfigError(f"{where}.config: found {', '.join(sorted(recipe.config))}; allowed {', '.join(RECIPE_GROUPS)}")
    try:
        config = from_dict({**recipe.config, "seed": recipe.seed})
    except ConfigError as error:
        raise ConfigError([f"{where}.config.{line}" for line in error.lines]) from error
    for group in RECIPE_GROUPS:
        target = getattr(config, group)._target_
        if target is not None and find_target(group, target) is None:
            allowed = ", ".join(target_names(group)) or "null"
            raise ConfigError(f"{where}.config.{group}._target_: found {target!r}; allowed {allowed}")
    found = digest(config)
    if found != recipe.effective_digest:
        raise ConfigError(
            f"{where}.effective_digest: found {recipe.effective_digest[:16]}, the recipe beside it has {found[:16]}: it was changed after"
            " the tensors were made; optimize with the recipe you want and save again"
        )
    return config


def load(saved: Saved, model: nn.Module, run: Run) -> tuple[nn.Module, Source]:
    """The optimized model, verified on the saved call, and what saving it again needs. `run.report` is filled in."""
    facts, report, job = saved.facts, run.report, run.job
    require_same_model(saved, model)
    device = _device_of(model)
    call = _read_call(saved, device)
    workload = CallWorkload(call[0], call[1])
    workload.trained = facts.model.trained
    report.model = ModelResult(type(model).__name__, facts.model.dtype, tensor_bytes(model))
    report.workload = WorkloadResult(workload.phase, workload.batch, workload.length, workload.tokens_per_call)
    steps, plan = run.plan()
    context = Context(job.backend, workload, emulate=plan.emulated, seed=job.config.seed)
    rows = {row.group: row for row in report.steps}
    unknown = next((name for name, module in facts.modules.items() if module.group not in rows), None)
    if unknown is not None:
        raise ConfigError(f"{saved.path}: modules.{unknown}.group: found {facts.modules[unknown].group!r}; allowed {', '.join(rows)}")
    built = Built(structural_clone(model))

    def replace_modules() -> None:
        with run.stage("apply"), torch.no_grad():
            for step in steps:
                restored = _portables(saved, step.group, device)
                try:
                    apply_modules(built, [step], replace(context, restored=restored), rows)
                except ConfigError as error:
                    # A step knows the module that it restores, and not the file.
                    raise ConfigError([f"{saved.path}: modules.{line}" if restored else line for line in error.lines]) from error
                made = {} if step.optimizer is None else step.optimizer.portable(built.model)
                if set(made) != set(restored):
                    raise ConfigError(
                        f"{saved.path}: modules: the file stores {len(restored)} modules of {step.group}, {len(made)} were built"
                    )
            built.model = _filled(built.model, saved)

    def wrap_call() -> None:
        report.model.bytes_after = tensor_bytes(built.model, job.backend.device.type)
        replay = Replay(call, _read_recorded(saved), facts.probe, getattr(torch, _compute_dtype(job.config, facts)), seed=job.config.seed)
        wraps = not plan.emulated and any(step.group in CALL_GROUPS for step, _ in active(steps))
        # After the backend's layouts: a convolution may round elsewhere in another one.
        with run.stage("verify"):
            replay.judge(built, machine_facts(report), report, wraps=wraps)
        if not wraps:
            apply_calls(built, steps, context, rows)
            return
        with run.stage("compile"), error_on_recompile_limit(), compile_counts() as counts:
            apply_calls(built, steps, context, rows)
            replay.judge_finished(built.model, report)
        settle_receipts(rows, compilations=counts.compilations, with_speed=False)

    apply_all(built, steps, context, report.hooks, replace=replace_modules, wrap=wrap_call)
    report.verdict, report.exit_code = ("emulated" if plan.emulated else "pass"), 0
    if plan.emulated:
        report.warnings.append(f"emulated, so slow: {plan.reason}")
    return built.model, Source(job.config, job.choices, job.ignored, call, facts.model.trained, dict(facts.model.tensors))


def _compute_dtype(config: RootConfig, facts: Facts) -> str:
    name = config.precision.dtype or facts.model.dtype
    return name if isinstance(getattr(torch, name, None), torch.dtype) else "float32"


def require_same_model(saved: Saved, model: nn.Module) -> None:
    """Raises ConfigError that names what differs from the model that was optimized. Values do not count."""
    expected, found = saved.facts.model.tensors, describe_model(model)
    lines = [
        f"{name}: found no such tensor in the model, the saved one has {_shown(facts)}"
        for name, facts in expected.items()
        if name not in found
    ]
    lines += [
        f"{name}: found {_shown(facts)} in the model, the saved one has no such tensor"
        for name, facts in found.items()
        if name not in expected
    ]
    lines += [
        f"{name}: found {_shown(found[name])} in the model, the saved one has {_shown(facts)}"
        for name, facts in expected.items()
        if name in found and found[name] != facts
    ]
    if lines:
        more = [f"and {len(lines) - _MOST_LINES} more tensors"] if len(lines) > _MOST_LINES else []
        head = f"{saved.folder}: found another model, a {type(model).__name__}; allowed the {saved.facts.model.name} that was optimized:"
        head = f"{head} build it the same way"
        raise ConfigError([head, *lines[:_MOST_LINES], *more])


def _shown(facts: TensorFacts) -> str:
    return f"{facts.dtype} {facts.shape}"


def _portables(saved: Saved, group: str, device: torch.device) -> dict[str, Portable]:
    return {
        name: Portable(module.facts, {key: saved.tensor(f"{_MODULE}{name}.{key}", device) for key in module.tensors})
        for name, module in saved.facts.modules.items()
        if module.group == group
    }


def _filled(model: nn.Module, saved: Saved) -> nn.Module:
    """A copy of `model` with tensors of its own, which hold the file's values; what was built from the file stays as it is."""
    packed = {id(tensor): tensor for name in saved.facts.modules for tensor in _tensors_of(model.get_submodule(name))}
    filled = copy.deepcopy(model, dict(packed))
    # By name: a module that keeps its tensors elsewhere copied what was built once more.
    done, used = {id(tensor) for name in saved.facts.modules for tensor in _tensors_of(filled.get_submodule(name))}, set()
    for name, tensor in persistent_tensors(filled):
        if id(tensor) not in done:
            key = saved.facts.aliases.get(name, name)
            done.add(id(tensor))
            used.add(key)
            _fill(tensor, f"{_MODEL}{key}", name, saved)
    left = [key.removeprefix(_MODEL) for key in saved.tensors if key.startswith(_MODEL) and key.removeprefix(_MODEL) not in used]
    if left:
        raise ConfigError(
            f"{saved.folder}: {left[0]}: found in the file and not in the model after the recipe's steps: they did other things here"
        )
    return filled


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _fill(tensor: torch.Tensor, key: str, name: str, saved: Saved) -> None:
    if key not in saved.tensors:
        raise ConfigError(
            f"{saved.folder}: {name}: found in the model after the recipe's steps and not in the file: they did other things here"
        )
    value = saved.tensor(key, tensor.device)
    if value.dtype != tensor.dtype or value.shape != tensor.shape:
        found = f"{_shown(describe(value))} in the file, {_shown(describe(tensor))} in the model after the recipe's steps"
        raise ConfigError(f"{saved.folder}: {name}: found {found}")
    if value.stride() == tensor.stride():
        tensor.copy_(value)
    else:
        # Other strides are other kernels: the memory format is part of the result.
        tensor.data = value


def _read_call(saved: Saved, device: torch.device) -> Call:
    reader = CallReader(saved.tensor, device)
    args = reader.decode(saved.facts.probe.args, f"{saved.path}: probe.args")
    kwargs = reader.decode(saved.facts.probe.kwargs, f"{saved.path}: probe.kwargs")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise ConfigError(
            f"{saved.path}: probe: found other args than a tuple, or other kwargs than names and values: the file was changed"
        )
    return args, kwargs


def _read_recorded(saved: Saved) -> Recorded:
    host, probe = torch.device("cpu"), saved.facts.probe

    def values(names: list[str], prefix: str) -> Mapping[str, torch.Tensor]:
        return {name: saved.tensor(f"{prefix}{index}", host) for index, name in enumerate(names)}

    return Recorded(dict(values(probe.outputs, _OUTPUT)), dict(values(probe.modules, _SEEN)))
