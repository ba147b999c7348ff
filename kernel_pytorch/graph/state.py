"""What a call reads and changes beside its arguments: memory written in place, Python attributes, the module's tensors."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from gc import get_referents
from operator import getitem, is_, itemgetter
from typing import Any

import torch
import torch.nn.modules.module as _every_module
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_pytorch.graph.inputs import describe_state, is_plain
from kernel_pytorch.graph.signature import at_addresses, copy_all, pointers

_TRAINING = itemgetter("training")

# A tensor of the host that is at most this large is compared by value, or put on the device, when a model holds it.
HOST_BYTES = 2**20

# Containers whose items are what C finds in them: a class of someone's own may give others.
READ_BY_C = frozenset({dict, defaultdict, OrderedDict, list})

_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_copy_.default)

# Kept by nn.Module itself: compared as tensors and hooks, or not at all.
_OWN = {"_parameters", "_buffers", "_modules", "_compiled_call_impl", *(name for name in vars(nn.Module()) if "hooks" in name)}


class WriteWatch(TorchDispatchMode):
    """Watches one call for operations that write to memory which was there before it, by the operations' schemas, and saves
    that memory before the first write: `restore` undoes the call. Sees tensors of inference mode, which have no version
    counter, and writes of equal values, which a comparison would miss.

    device_type: of the device that records. is_elsewhere: tells tensors that are not on it; by default by that type. model:
    names the module that an operation stood in. waits_for: the operation that needs a value of the device on the host, which
    no graph can record; or None. crosses: the first operation that takes host memory to the device. taken: storages on the host
    whose memory is taken to the device without waiting, which a graph would read again in every replay, each with the first
    operation that does. on_host: the first operation that computed on the host from memory that was there before, larger than
    HOST_BYTES. counts: whole numbers are written, such as a position that goes up. where: of each operation named here, the
    module."""

    supports_higher_order_operators = True

    def __init__(
        self, device_type: str, *, is_elsewhere: Callable[[torch.Tensor], bool] | None = None, model: nn.Module | None = None
    ) -> None:
        super().__init__()
        self._is_elsewhere = is_elsewhere or (lambda tensor: tensor.device.type != device_type)
        self._model = model
        self.waits_for: str | None = None
        self.crosses: str | None = None
        self.taken: dict[int, str] = {}
        self.on_host: str | None = None
        self.where: dict[str, str] = {}
        self.num_operations = 0
        self.counts = False
        self._created: dict[int, StorageWeakRef] = {}
        self.found: dict[int, torch.UntypedStorage] = {}
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.num_operations += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and _has_storage(leaf)]
        elsewhere = [tensor for tensor in inputs if self._is_elsewhere(tensor)]
        if self.waits_for is None and _needs_values(func, args) and len(elsewhere) < len(inputs):
            self.waits_for = self._met(str(func))
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._created:
                self.found.setdefault(storage._cdata, storage)
        for tensor in _written(func, args, kwargs, inputs):
            self._save(tensor)
        result = func(*args, **kwargs)
        made = []
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _has_storage(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.found and storage._cdata not in self._created:
                    # The weak reference keeps the number from being given to another storage.
                    self._created[storage._cdata] = StorageWeakRef(storage)
                    made.append(leaf)
        if elsewhere:
            self._note_host(str(func), elsewhere, [*made, *(t for t in inputs if func in _COPIES)], _waits(func, args, kwargs))
        return result

    def _note_host(self, name: str, elsewhere: list[torch.Tensor], results: list[torch.Tensor], waits: bool) -> None:
        to_device = any(not self._is_elsewhere(tensor) for tensor in results)
        if to_device and self.crosses is None:
            self.crosses = self._met(name)
        if to_device and not waits:
            for tensor in elsewhere:
                self.taken.setdefault(tensor.untyped_storage()._cdata, self._met(name))
        large = any(t.nbytes > HOST_BYTES and t.untyped_storage()._cdata in self.found for t in elsewhere)
        if results and not to_device and large and self.on_host is None:
            self.on_host = self._met(name)

    def _met(self, name: str) -> str:
        """Remembers which of the model's modules is being called, the innermost."""
        if self._model is not None and name not in self.where:
            names = {id(module): path for path, module in self._model.named_modules()}
            frame = sys._getframe(1)
            while frame is not None:
                path = names.get(id(frame.f_locals.get("self")))
                if path is not None:
                    self.where[name] = path or type(self._model).__name__
                    break
                frame = frame.f_back
        return name

    def said(self, name: str) -> str:
        """The operation, with its module where that was found."""
        return f"{name} in {self.where[name]}" if name in self.where else name

    def wrote(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._saved

    def reads(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory was there before the call and the call used it."""
        return tensor.untyped_storage()._cdata in self.found

    def was_there(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is not of the call's making: it used it, or the model holds it."""
        key = tensor.untyped_storage()._cdata
        held = () if self._model is None else (*self._model.parameters(), *self._model.buffers())
        return key in self.found or any(_has_storage(other) and other.untyped_storage()._cdata == key for other in held)

    @property
    def num_written(self) -> int:
        return len(self._saved)

    def will_write(self, tensor: torch.Tensor) -> None:
        """Says that the call writes to the tensor's memory, before it does."""
        storage = tensor.untyped_storage()
        self.found.setdefault(storage._cdata, storage)
        self._save(tensor)

    def restore(self) -> None:
        """Puts back the memory as it was before the call."""
        if self._saved:
            copy_all([view for view, _ in self._saved.values()], [saved for _, saved in self._saved.values()])

    def written(self) -> list[torch.Tensor]:
        """The bytes that the call writes, as they are now: views, not copies."""
        return [view for view, _ in self._saved.values()]

    def _save(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.found and not tensor.is_floating_point():
            self.counts = True
        if storage._cdata in self.found and storage._cdata not in self._saved:
            view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]
            self._saved[storage._cdata] = (view, view.clone())


def _has_storage(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and tensor.layout is torch.strided


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy was not told not to wait."""
    if kwargs.get("non_blocking"):
        return False
    return not (func in _COPIES and len(args) > 2 and args[2])


def _needs_values(func: Any, args: Any) -> bool:
    """Whether the result's value or shape goes to the host: `item`, `nonzero`, indexing with a mask."""
    tags = getattr(func, "tags", ())
    if func is torch.ops.aten.index.Tensor:
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _written(func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    schema = getattr(func, "_schema", None)
    if schema is None:
        # A higher-order operator does not say what it writes: take all of its inputs.
        return inputs
    if "batch_norm" in schema.name or "instance_norm" in schema.name:
        # These update running statistics, vectors, and their schemas do not say so; they do it in training only.
        flags = zip(schema.arguments, args, strict=False)
        if any(argument.name in ("training", "use_input_stats") and value is False for argument, value in flags):
            return []
        return [tensor for tensor in inputs if tensor.dim() == 1]
    if not schema.is_mutable:
        return []
    values = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[index] if index < len(args) and not argument.kwarg_only else kwargs.get(argument.name))
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and _has_storage(leaf)]


def python_state(model: nn.Module) -> list[Any]:
    """Everything but parameters, buffers and submodules that the modules hold, in a form that compares by value."""
    return [describe_state({k: v for k, v in vars(module).items() if k not in _OWN}) for module in model.modules()]


class ModuleGuard:
    """Remembers which tensors, submodules and modes a model had. A graph holds addresses: it is wrong once they change.

    is_elsewhere: tells tensors that the device does not reach. What the host reads of them is frozen into a graph, so those of
    at most HOST_BYTES are compared by value."""

    def __init__(self, model: nn.Module, is_elsewhere: Callable[[torch.Tensor], bool] | None = None) -> None:
        self._model, self._is_elsewhere = model, is_elsewhere
        self.look_again()

    def look_again(self) -> None:
        """Takes the model as it is now for what it is to be."""
        modules = list(self._model.modules())
        self._scripted = [module for module in modules if not _in_python(module)]
        in_python = [module for module in modules if _in_python(module)]
        self._dicts, self._containers = [vars(module) for module in in_python], [module._modules for module in in_python]
        self._training, self._children = list(map(_TRAINING, self._dicts)), get_referents(*self._containers)
        self._script_state = list(map(_script_state, self._scripted))
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [_every_module._global_forward_hooks, _every_module._global_forward_pre_hooks]
        self.slots = [slot for module in modules for slot in _slots(module)]
        self._others = _Slots([slot for slot in self.slots if not isinstance(slot[2], nn.Module)])
        self._tensors = [v for v in self._others.values if isinstance(v, torch.Tensor) and _has_storage(v)]
        self._addresses, self._all = pointers(self._tensors), list(range(len(self._tensors)))
        far = [t for t in self._tensors if self._is_elsewhere is not None and self._is_elsewhere(t) and t.nbytes <= HOST_BYTES]
        self._by_value = [(tensor, tensor.clone()) for tensor in far]

    @property
    def is_plain(self) -> bool:
        """Whether identities, order and addresses are all there is to look at, in containers that are read as C reads them."""
        containers = [*self._dicts, *self._containers, *self._hooks, *(slot[0] for slot in self.slots)]
        return not self._by_value and not self._scripted and READ_BY_C.issuperset(map(type, containers))

    def code(self) -> tuple[list[tuple[Any, Any, Any]], list[tuple[dict[str, Any], list[str], list[Any]]]]:
        """What `other_code` looks at, if `is_plain`: (container, key, value), and dicts with the keys and values that are in them, in
        order."""
        training = [(held, "training", was) for held, was in zip(self._dicts, self._training, strict=True)]
        children: dict[int, tuple[dict[str, Any], list[str], list[Any]]] = {id(held): (held, [], []) for held in self._containers}
        for container, key, value in self.slots:
            if id(container) in children:
                children[id(container)][1].append(key)
                children[id(container)][2].append(value)
        return training, list(children.values())

    def tensors(self) -> tuple[list[tuple[Any, Any, Any]], list[tuple[torch.Tensor, int]], list[Any]]:
        """What `other_tensors` and `has_hooks` look at: (container, key, value), tensors with their addresses, and what must be empty."""
        submodules = set(map(id, self._containers))
        others = [slot for slot in self.slots if id(slot[0]) not in submodules]
        return others, list(zip(self._tensors, self._addresses, strict=True)), list(self._hooks)

    def has_hooks(self) -> bool:
        """Whether a module has a forward hook, which a replay would not run."""
        return any(self._hooks)

    def broken(self) -> str | None:
        """What changed since, or None. Runs in every replay, so it stays in C where it can."""
        return self.other_code() or self.other_tensors()

    def other_code(self) -> str | None:
        """What changed of that which decides what the model runs, and so where it writes."""
        # What dicts hold, in order, in one call of C. By identity: a module may say that it equals another.
        children = get_referents(*self._containers)
        if len(children) != len(self._children) or not all(map(is_, children, self._children)):
            return "a submodule was replaced, added or removed"
        if list(map(_TRAINING, self._dicts)) != self._training:
            return "a module went from training to eval or back"
        if self._scripted and list(map(_script_state, self._scripted)) != self._script_state:
            return "a scripted module went from training to eval or back, or its submodules are others"
        return None

    def other_tensors(self) -> str | None:
        """What changed of that which the model reads."""
        if not self._others.hold():
            return "a parameter or buffer was replaced"
        if not at_addresses(self._tensors, self._addresses, self._all):
            return "a parameter or buffer has other memory"
        if self._by_value and not all(same_bits(tensor, known) for tensor, known in self._by_value):
            return "a tensor that the model holds on the host has another value"
        return None


def _in_python(module: nn.Module) -> bool:
    """Whether a module's submodules and its mode are in dicts; those of a scripted one are in C++."""
    return isinstance(module._modules, dict) and "training" in vars(module)


def _script_state(module: nn.Module) -> tuple[bool, list[int]]:
    return (module.training, list(map(id, module._modules.values())))


class _Slots:
    """What is held where: (container, key, value)."""

    def __init__(self, slots: list[tuple[Any, Any, Any]]) -> None:
        self._containers = [container for container, _, _ in slots]
        self._keys = [key for _, key, _ in slots]
        self.values = [value for _, _, value in slots]

    def hold(self) -> bool:
        try:
            return all(map(is_, map(getitem, self._containers, self._keys), self.values))
        except (KeyError, IndexError):
            return False


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal in every bit, so that 0.0 is not -0.0 and a NaN is itself."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8))


def _slots(module: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """(container, key, value) of every submodule, and of every tensor in the module or in a list or dict that it holds."""
    for container in (module._parameters, module._buffers, module._modules):
        for name, value in container.items():
            yield container, name, value
    for name, value in vars(module).items():
        if name in _OWN:
            continue
        if isinstance(value, torch.Tensor):
            yield vars(module), name, value
        elif type(value) is list:
            yield from ((value, index, item) for index, item in enumerate(value) if isinstance(item, torch.Tensor))
        elif type(value) is dict:
            yield from ((value, key, item) for key, item in value.items() if isinstance(item, torch.Tensor))
