"""What a call reads and changes beside its arguments: memory written in place, Python attributes, the module's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem, is_
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_pytorch.graph.inputs import describe_state, is_plain

# Kept by nn.Module itself: compared as tensors and hooks, or not at all.
_OWN = {"_parameters", "_buffers", "_modules", "_compiled_call_impl", *(name for name in vars(nn.Module()) if "hooks" in name)}


class WriteWatch(TorchDispatchMode):
    """Watches one call for operations that write to memory which was there before it, by the operations' schemas, and saves
    that memory before the first write: `restore` undoes the call. Sees tensors of inference mode, which have no version
    counter, and writes of equal values, which a comparison would miss.

    waits_for: the operation that needs a value of `device_type` memory on the host, which no graph can record; or None."""

    supports_higher_order_operators = True

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.waits_for: str | None = None
        self._created: dict[int, StorageWeakRef] = {}
        self.found: dict[int, torch.UntypedStorage] = {}
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and _has_storage(leaf)]
        if self.waits_for is None and _needs_values(func, args) and any(t.device.type == self._device_type for t in inputs):
            self.waits_for = str(func)
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._created:
                self.found.setdefault(storage._cdata, storage)
        for tensor in _written(func, args, kwargs, inputs):
            self._save(tensor.untyped_storage())
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _has_storage(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.found and storage._cdata not in self._created:
                    # The weak reference keeps the number from being given to another storage.
                    self._created[storage._cdata] = StorageWeakRef(storage)
        return result

    def wrote(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._saved

    def reads(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory was there before the call and the call used it."""
        return tensor.untyped_storage()._cdata in self.found

    @property
    def num_written(self) -> int:
        return len(self._saved)

    def restore(self) -> None:
        """Puts back the memory as it was before the call."""
        for view, saved in self._saved.values():
            view.copy_(saved)

    def _save(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.found and storage._cdata not in self._saved:
            view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]
            self._saved[storage._cdata] = (view, view.clone())


def _has_storage(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and tensor.layout is torch.strided


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
        # These update running statistics, vectors, and their schemas do not say so.
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
    """Remembers which tensors, submodules and modes a model had. A graph holds addresses: it is wrong once they change."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._training = [m.training for m in self._modules]
        slots = [slot for module in self._modules for slot in _slots(module)]
        self._containers = [container for container, _, _ in slots]
        self._keys = [key for _, key, _ in slots]
        self._values = [value for _, _, value in slots]
        self._tensors = [v for v in self._values if isinstance(v, torch.Tensor) and _has_storage(v)]
        self._addresses = [t.data_ptr() for t in self._tensors]

    def has_hooks(self) -> bool:
        """Whether a module has a forward hook, which a replay would not run."""
        return any(self._hooks)

    def broken(self) -> str | None:
        """What changed since, or None. Runs before every replay, so it stays in C where it can."""
        try:
            same = all(map(is_, map(getitem, self._containers, self._keys), self._values))
        except (KeyError, IndexError):
            same = False
        if not same:
            return "a parameter, buffer or submodule was replaced"
        if list(map(torch.Tensor.data_ptr, self._tensors)) != self._addresses:
            return "a parameter or buffer has other memory"
        if [m.training for m in self._modules] != self._training:
            return "a module went from training to eval or back"
        return None


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
