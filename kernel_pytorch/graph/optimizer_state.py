"""What a torch optimizer holds beside the parameters: which of it a recorded step reads, and which it was recorded with."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter, getitem, is_
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer

from kernel_pytorch.graph.replayer import Looks
from kernel_pytorch.graph.state import READ_BY_C

_REQUIRES_GRAD = attrgetter("requires_grad")
_SAMPLED = 16
# Values that are what they were while they are the same object.
_CONSTANT = (bool, int, float, complex, str, type(None))


def refusal(optimizer: Optimizer, device: torch.device) -> str | None:
    """Why no graph can hold this optimizer's step on `device`, with the way out; or None."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        return f"optimizer: found {name}, which calls the model again until a value on the host says stop; use SGD, Adam or AdamW"
    for index, group in enumerate(optimizer.param_groups):
        elsewhere = [parameter.device for parameter in group["params"] if parameter.device.type != device.type]
        if elsewhere:
            return f"optimizer.param_groups[{index}]: found a parameter on {elsewhere[0]}, required {device.type}: move the model first"
        if device.type != "cpu" and not group.get("capturable", True):
            why = "which counts its steps on the host, and a replay would not count"
            return f"optimizer.param_groups[{index}].capturable: found False, {why}; make the optimizer with {name}(..., capturable=True)"
    return None


def recorded_values(optimizer: Optimizer) -> list[Any]:
    """The values of the parameter groups that are constants in a recorded step, such as a learning rate that is a float. A tensor
    on the device is read anew by every replay: of that only the address is."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found.append(len(group["params"]))
        for key, value in group.items():
            if key != "params":
                found += map(_as_recorded, value) if isinstance(value, (tuple, list)) else (_as_recorded(value),)
    return found


def host_values(optimizer: Optimizer) -> list[Any]:
    """What the optimizer's state holds in Python: equal before and after a step that a replay can stand for."""
    return [(key, value) for _, key, value in _state_slots(optimizer) if not isinstance(value, torch.Tensor)]


def host_state(optimizer: Optimizer, device: torch.device) -> list[str]:
    """Names of state tensors that are not on the device, which a replay would not update."""
    tensors = [(key, value) for _, key, value in _state_slots(optimizer) if isinstance(value, torch.Tensor)]
    return sorted({str(key) for key, tensor in tensors if tensor.device.type != device.type})


def has_hooks(optimizer: Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


class OptimizerGuard:
    """Remembers which parameters and which state tensors an optimizer updates. A recorded step holds their addresses, of which a
    ModuleGuard compares the parameters', and this one a sample of the state's: whoever moves state elsewhere moves all of it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._owners = (optimizer.state, optimizer.param_groups)
        self._num_states = len(optimizer.state)
        slots = [slot for slot in _state_slots(optimizer) if isinstance(slot[2], torch.Tensor)]
        self._containers = [container for container, _, _ in slots]
        self._keys = [key for _, key, _ in slots]
        self._tensors = [tensor for _, _, tensor in slots]
        self._sample = self._tensors[:: max(1, len(self._tensors) // _SAMPLED)]
        self._addresses = [tensor.data_ptr() for tensor in self._sample]
        self._parameters = [list(group["params"]) for group in optimizer.param_groups]
        self._trained = [list(map(_REQUIRES_GRAD, params)) for params in self._parameters]

    def looks(self) -> Looks | None:
        """What `broken`, `recorded_values` and `has_hooks` look at; None where it is more than identities, addresses and sizes."""
        optimizer, (state, groups) = self._optimizer, self._owners
        others = [(vars(optimizer), "state", state), (vars(optimizer), "param_groups", groups)]
        others += list(zip(self._containers, self._keys, self._tensors, strict=True))
        addresses = [(tensor, tensor.data_ptr()) for tensor in self._tensors]
        sizes, trained = [(state, len(state)), (groups, len(groups))], []
        for index, group in enumerate(groups):
            params = group["params"]
            others += [(groups, index, group), (group, "params", params), *((params, i, one) for i, one in enumerate(params))]
            sizes += [(group, len(group)), (params, len(params))]
            trained += [(parameter, parameter.requires_grad) for parameter in params]
            for key, value in group.items():
                if key == "params":
                    continue
                others.append((group, key, value))
                if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                    addresses.append((value, value.data_ptr()))
                elif not all(isinstance(item, _CONSTANT) for item in (value if isinstance(value, tuple) else (value,))):
                    return None
        empty = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        if not READ_BY_C.issuperset(map(type, [vars(optimizer), *empty, *(container for container, *_ in (*others, *sizes))])):
            return None
        return Looks(others=others, addresses=addresses, empty=empty, sizes=sizes, trained=trained)

    def broken(self) -> str | None:
        """What changed since, or None. Runs before every replay, so it stays in C where it can."""
        state, groups = self._optimizer.state, self._optimizer.param_groups
        if state is not self._owners[0] or groups is not self._owners[1] or len(state) != self._num_states:
            return "the optimizer's state was replaced"
        for group, params, trained in zip(groups, self._parameters, self._trained, strict=False):
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                return "a parameter of the optimizer was replaced"
            if list(map(_REQUIRES_GRAD, params)) != trained:
                return "a parameter was frozen or freed"
        try:
            same = all(map(is_, map(getitem, self._containers, self._keys), self._tensors))
        except (KeyError, IndexError):
            same = False
        if not same or list(map(torch.Tensor.data_ptr, self._sample)) != self._addresses:
            return "a tensor of the optimizer's state was replaced"
        return None


def _state_slots(optimizer: Optimizer) -> Iterator[tuple[Any, Any, Any]]:
    """(container, key, value) of everything in the state of every parameter; of a value that is a list or dict, its items."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, (list, tuple)):
                yield from ((value, index, item) for index, item in enumerate(value))
            elif isinstance(value, dict):
                yield from ((value, name, item) for name, item in value.items())
            else:
                yield state, key, value


def _as_recorded(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type == "cpu" and value.numel() == 1:
        return value.item()
    return (id(value), value.data_ptr())
