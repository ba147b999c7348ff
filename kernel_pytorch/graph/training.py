"""Forward, backward and optimizer step of one shape as one CUDA graph, kept where it measures faster than the plain step."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from kernel_pytorch.choices import GraphDeploymentStrategy
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.graph.analysis import WorkloadAnalysis
from kernel_pytorch.graph.failures import first_line
from kernel_pytorch.graph.inputs import Call, describe, rebuild
from kernel_pytorch.graph.kinds import modes, shown
from kernel_pytorch.graph.optimizer_state import OptimizerGuard, has_hooks, host_state, host_values, recorded_values, refusal
from kernel_pytorch.graph.recorder import CudaRecorder, Recorder, Recording
from kernel_pytorch.graph.replayer import Looks, configured
from kernel_pytorch.graph.state import ModuleGuard, WriteWatch, python_state
from kernel_pytorch.graph.strategy import terms
from kernel_pytorch.stance import eager_code

# Each costs a second or more; a learning rate that is another float in every step would never earn it back.
_MAX_CAPTURES = 8


@dataclass(frozen=True)
class _Signature:
    """What a recorded step is for. inputs: shapes and types. modes: autocast, precision, training flags. values: the optimizer's
    constants, such as a learning rate that is a float."""

    inputs: tuple[Any, ...]
    modes: tuple[Any, ...]
    values: list[Any]


class _RecordedStep:
    """One recording with the tensors that it reads and the gradients that it writes."""

    def __init__(self, recorder: Recorder, recording: Recording, static: list[torch.Tensor], params: list[nn.Parameter]) -> None:
        self.recording = recording
        self._recorder, self._static = recorder, static
        trained = [(parameter, parameter.grad) for parameter in params if parameter.grad is not None]
        self._params = [parameter for parameter, _ in trained]
        self._grads = [grad for _, grad in trained]

    def run(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Trains on `tensors`; returns the loss in memory of its own. `.grad` of the parameters is this step's gradient after it."""
        self._recorder.enter_replay()
        for static, tensor in zip(self._static, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        self.recording.replay()
        loss = self.recording.output.clone()
        self._recorder.leave_replay()
        self.give_gradients()
        return loss

    def give_gradients(self) -> None:
        # A plain step or the caller's zero_grad() has detached them: all or none.
        if self._params and self._params[0].grad is not self._grads[0]:
            for parameter, grad in zip(self._params, self._grads, strict=True):
                parameter.grad = grad

    def quick(self, inputs: tuple[Any, ...], guards: tuple[ModuleGuard, OptimizerGuard]) -> Any:
        """The C++ half, for steps like this one; None where Python must look at each."""
        of_optimizer = guards[1].looks()
        if of_optimizer is None or not guards[0].is_plain:
            return None
        # Everything is looked at first: one step too many does harm.
        return configured(
            inputs,
            {},
            self._recorder,
            Looks.of(guards[0]) + of_optimizer,
            in_place=[],
            copies=list(enumerate(self._static)),
            code_first=True,
            tensors_first=True,
            play=self.recording.replay,
            outputs=[("clone", self.recording.output)],
            spec=tree_flatten(self.recording.output)[1],
        )


class GraphedTrainStep:
    """One training step, `step(*inputs) -> loss`: zero_grad, forward, backward, `after_backward`, optimizer step. Calls of one shape
    become one CUDA graph where `strategy` finds its replay fast enough beside the plain step.

    loss_fn: `loss_fn(model, *inputs)` returns the loss, a tensor with one element; autocast belongs inside. after_backward: called
    between backward and step, for clipping gradients. num_warmup_steps: run on a side stream before the capture. min_speedup: plain
    time over replay time, at least; None is the strategy's own.

    The first call is a plain step, in which the optimizer makes its state. The second call with the same shapes and settings (the
    fifth, if conservative) runs the step several times to warm up, record and time it, on weights, buffers, optimizer state and
    random state that are put back bit for bit in between; it needs a copy of those for that time. Calls of other shapes (an epoch's
    last batch), in eval mode or under other modes are plain steps, and the graph is kept. It is dropped, and recorded again once
    two calls in a row agree, when a parameter or the optimizer's state was replaced or a value of the optimizer changed that is a
    constant in the graph: a learning rate that is a float. A rate that is a tensor on the device is read by every replay.
    `decisions` says what was chosen and why.

    Not seen: what loss_fn and after_backward do in Python, and hooks added after the capture. A GradScaler has no place here; bf16
    needs none. One model on one device, one thread.

    Raises UnsupportedOperationError for an optimizer that no graph can hold, and without `recorder` for a model that is not on a
    CUDA device."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[..., torch.Tensor],
        *,
        after_backward: Callable[[], Any] | None = None,
        num_warmup_steps: int = 3,
        strategy: GraphDeploymentStrategy = GraphDeploymentStrategy.balanced,
        min_speedup: float | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.decisions: list[dict[str, Any]] = []
        self._model, self._optimizer, self._loss_fn, self._after_backward = model, optimizer, loss_fn, after_backward
        self._num_warmup_steps, self._terms = num_warmup_steps, terms(strategy, min_speedup)
        self._recorder = recorder or CudaRecorder(_cuda_device(model))
        why = refusal(optimizer, self._recorder.device)
        if why is not None:
            raise UnsupportedOperationError(why)
        self._graph: _RecordedStep | None = None
        # What the graph is for while there is one, else what the last plain step was.
        self._signature: _Signature | None = None
        self._guards: tuple[ModuleGuard, OptimizerGuard] | None = None
        # C++ for steps like the one that was recorded.
        self._quick: Any = None
        self._hooks, self._modules = ModuleGuard(model), list(model.modules())
        # Plain steps in a row that were alike: the first of them makes what the optimizer keeps, so it takes one at least.
        self._num_alike = 0
        self._num_captures = 0
        self._refused = False
        self._noted: set[str] = set()

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """One step on `inputs`; returns the loss, detached and in memory of its own."""
        if self._refused or self._recorder.busy():
            return self._plain(*inputs)
        if self._quick is not None and self._graph is not None:
            loss = self._quick.run(inputs, {})
            if loss is not NotImplemented:
                self._graph.give_gradients()
                return loss
        call = describe(inputs, {})
        why = self._straight_through(call)
        if why is not None:
            self._note(why, call)
            return self._plain(*inputs)
        signature = _Signature(call.key(), (*modes(), [m.training for m in self._modules]), recorded_values(self._optimizer))
        if self._graph is None:
            first, alike = self._signature is None, signature == self._signature
            if alike and self._num_alike >= max(1, self._terms.first_call - 1):
                return self._record(signature, call, inputs)
            self._signature, self._num_alike = signature, self._num_alike + 1 if alike else 1
            return self._first(*inputs) if first else self._plain(*inputs)
        broken = self._broken(signature)
        if broken is not None:
            self._drop(broken, call)
            self._signature, self._num_alike = signature, 1
            return self._plain(*inputs)
        if signature != self._signature:
            self._note("other shapes or modes than the graph's: a plain step", call)
            return self._plain(*inputs)
        return self._graph.run(call.tensors)

    def _first(self, *inputs: Any) -> torch.Tensor:
        """The step in which the optimizer makes its state, and warns that capturable=True is for captures, which come next."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            return self._plain(*inputs)

    def _plain(self, *inputs: Any) -> torch.Tensor:
        # With gradients of None, backward makes new ones instead of adding: in a capture, in the graph's memory.
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss_fn(self._model, *inputs)
        loss.backward()
        if self._after_backward is not None:
            self._after_backward()
        self._optimizer.step()
        return loss.detach()

    def _straight_through(self, call: Call) -> str | None:
        """Why this call is a plain step, or None."""
        if call.refusal is not None or call.addresses:
            return call.refusal or "an argument is an object, whose values are not compared from call to call"
        elsewhere = [t.device for t in call.tensors if t.device.type != self._recorder.device.type]
        if elsewhere:
            return f"an argument is on {elsewhere[0]}"
        if self._hooks.has_hooks() or has_hooks(self._optimizer):
            return "the model or the optimizer has a hook, which a replay would not run"
        return None

    def _broken(self, signature: _Signature) -> str | None:
        """Why the graph is no longer good for any call, or None."""
        assert self._signature is not None
        assert self._guards is not None
        if signature.values != self._signature.values:
            return "a value of the optimizer changed that is a constant in the graph; a learning rate that is a tensor is not one"
        if signature.modes != self._signature.modes:
            return None
        return self._guards[0].broken() or self._guards[1].broken()

    def _record(self, signature: _Signature, call: Call, inputs: tuple[Any, ...]) -> torch.Tensor:
        if self._num_captures >= _MAX_CAPTURES:
            self._refuse(call, f"recorded {_MAX_CAPTURES} times already; make the learning rate a tensor on the device")
            return self._plain(*inputs)
        why = self._cannot_capture()
        if why is not None:
            self._refuse(call, why)
            return self._plain(*inputs)
        self._num_captures += 1
        rng = (self._recorder.rng_state(), torch.get_rng_state())
        watch = WriteWatch(self._recorder.device.type, is_elsewhere=self._recorder.is_elsewhere)
        try:
            self._try(signature, call, inputs, watch)
        except RuntimeError as error:
            self._refuse(call, f"capture failed: {first_line(error)}")
        finally:
            # Whatever was raised, the caller's next step starts where this one did.
            watch.restore()
            self._recorder.set_rng_state(rng[0])
            torch.set_rng_state(rng[1])
        return self._plain(*inputs) if self._graph is None else self._graph.run(call.tensors)

    def _cannot_capture(self) -> str | None:
        elsewhere = host_state(self._optimizer, self._recorder.device)
        if elsewhere:
            return f"the optimizer keeps {', '.join(elsewhere)} on the host, which a replay would not update"
        params = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        foreign = next((parameter.device for parameter in params if self._recorder.is_foreign(parameter.device)), None)
        if foreign is not None:
            return f"a parameter is on {foreign}; graphs are made on {self._recorder.device}"
        if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in params):
            return "a parameter has a hook, which a replay would not run"
        if any(module._backward_hooks or module._backward_pre_hooks for module in self._model.modules()):
            return "a module has a backward hook, which a replay would not run"
        return None

    def _try(self, signature: _Signature, call: Call, inputs: tuple[Any, ...], watch: WriteWatch) -> None:
        """Records and times the step, and keeps the graph or says in `decisions` why not. Leaves memory and random state changed."""
        start = time.monotonic()
        before = (python_state(self._model), host_values(self._optimizer), torch.get_rng_state())
        with eager_code(), watch:
            self._plain(*inputs)
        why = self._seen(before, call, watch)
        if why is not None:
            self._refuse(call, why)
            return
        watch.restore()
        static = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in call.tensors]
        static_inputs = rebuild(inputs, iter(static))

        def recorded() -> torch.Tensor:
            return self._plain(*static_inputs)

        self._recorder.warm_up(recorded, self._num_warmup_steps)
        params = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        # The last gradients of warm-up: the capture's own take their place in the graph's memory.
        self._optimizer.zero_grad(set_to_none=True)
        graph = _RecordedStep(self._recorder, self._recorder.record(recorded), static, params)
        self._recorder.hold(static)
        watch.restore()
        self._graph, self._signature = graph, signature
        self._guards = (ModuleGuard(self._model), OptimizerGuard(self._optimizer))
        self._quick = graph.quick(inputs, self._guards)
        # Timed as the caller will have it, guards included.
        margin = self._terms.min_speedup
        timed = self._recorder.compare(lambda: self._plain(*inputs), lambda: self(*inputs), watch.restore, margin)
        analysis = WorkloadAnalysis.of(shown(call), self._num_alike, timed)
        analysis.copied_bytes, analysis.num_written = sum(tensor.nbytes for tensor in static), watch.num_written
        analysis.pool_bytes, analysis.held_bytes = graph.recording.pool_bytes, graph.recording.held_bytes + analysis.copied_bytes
        analysis.num_operations, analysis.capture_s = watch.num_operations, time.monotonic() - start
        keep, reason = timed.verdict(margin)
        if keep and not self._terms.repays(analysis.capture_s, analysis.saved_ms):
            keep, reason = False, f"{reason}; {self._terms.payback_calls} steps would not repay {analysis.capture_s:.2f} s of capture"
        if not keep:
            self._let_go()
            self._refused = True
        self.decisions.append({**analysis.row(), "captured": keep, "reason": f"replay is {'kept' if keep else 'not kept'}: {reason}"})

    def _seen(self, before: tuple[Any, ...], call: Call, watch: WriteWatch) -> str | None:
        """Why a replay could not stand for the step that was just watched, or None."""
        if watch.waits_for is not None:
            return f"the step waits for a value of the device: {watch.waits_for}"
        if watch.taken:
            return f"the step takes host memory to the device, which a replay would read again: {next(iter(watch.taken.values()))}"
        if any(map(watch.wrote, call.tensors)):
            return "the step writes to an argument"
        if (python_state(self._model), host_values(self._optimizer)) != before[:2]:
            return "the step changes Python attributes of the model or of the optimizer's state, which a replay would not"
        if self._recorder.device.type != "cpu" and not torch.equal(torch.get_rng_state(), before[2]):
            return "the step draws random numbers on the host, which a replay would not"
        return None

    def _drop(self, reason: str, call: Call) -> None:
        self._let_go()
        self._hooks, self._modules = ModuleGuard(self._model), list(self._model.modules())
        self.decisions.append({"inputs": shown(call), "captured": False, "reason": f"graph dropped: {reason}"})

    def _refuse(self, call: Call, reason: str) -> None:
        self._let_go()
        self._refused = True
        self.decisions.append({"inputs": shown(call), "captured": False, "reason": reason})

    def _let_go(self) -> None:
        if self._quick is not None:
            self._quick.close()
        self._graph = self._guards = self._quick = None

    def _note(self, reason: str, call: Call) -> None:
        """Says once that steps are plain, and why."""
        if reason not in self._noted:
            self._noted.add(reason)
            self.decisions.append({"inputs": shown(call), "captured": False, "reason": reason})


def _cuda_device(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices))) or "no tensors"
        raise UnsupportedOperationError(f"model: found {found}, required one CUDA device; move the model there, or train without a graph")
    return devices.pop()
