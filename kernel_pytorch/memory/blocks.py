"""Which modules of a model are its blocks, and which of their tensors may leave the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kernel_pytorch.memory.pack import is_movable, names_of
from kernel_pytorch.optimizer import Selection, Skipped, select_modules, tensor_bytes

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Weights:
    """names: by block, the tensors that no call writes and nothing outside the block reads. skipped: weights that stay, and why."""

    names: dict[str, list[str]]
    skipped: list[Skipped]


def select_blocks(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> Selection:
    """The entries of the biggest list that repeats a class, or the outermost modules that `include` names, in the model's order.

    Raises NoEffectError for an `include` pattern that matches nothing."""
    lists = repeated_lists(model)
    biggest = max(lists, key=lambda name: sum(tensor_bytes(block) for block in lists[name].values()), default=None)
    default = {} if biggest is None else lists[biggest]
    selection = select_modules(
        model, lambda name, module: not isinstance(module, _CONTAINERS) if include else name in default, include, exclude
    )
    inside = {name for name in selection.matched if any(name.startswith(f"{other}.") for other in selection.matched)}
    matched = {name: module for name, module in selection.matched.items() if name not in inside}
    # Parts of a block that a pattern for blocks happens to match are no news.
    skipped = [row for row in selection.skipped if not any(row.module.startswith(f"{name}.") for name in matched)]
    if not include:
        skipped += [
            Skipped(name or type(model).__name__, f"its blocks are smaller than those of {biggest}; memory.include can name them")
            for name in lists
            if name != biggest
        ]
    return Selection(matched, skipped)


def repeated_lists(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Outermost ModuleLists and Sequentials by name, each with its entries, by name, of a class that stands there more than once."""
    found: dict[str, dict[str, nn.Module]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(name.startswith(f"{block}.") or name == block for block in inside):
            continue
        classes = Counter(type(child) for child in module)
        blocks = {
            f"{name}.{key}" if name else key: child
            for key, child in module.named_children()
            if classes[type(child)] > 1 and tensor_bytes(child)
        }
        if blocks:
            found[name] = blocks
            inside.update(blocks)
    return found


def weights_of(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Weights:
    """What of each block may leave the device: its parameters, and the packed bytes of quantized layers.

    Every other buffer stays: a block may write to it (statistics, caches), and what is written in a slot is lost. What has a
    second owner stays, too."""
    owners, attributes = _owners(model, blocks), _attributes(model)
    names: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for block_name, block in blocks.items():
        moved: set[int] = set()
        for path, module in block.named_modules():
            # The name by which quantized layers are known: their buffers are weights.
            packed = module._buffers if hasattr(module, "dequantize") else {}
            for key, tensor in {**module._parameters, **packed}.items():
                reason = None if tensor is None else _why_it_stays(tensor, owners, attributes, block_name)
                if tensor is not None and reason is None:
                    moved.add(id(tensor))
                elif reason is not None:
                    skipped.append(Skipped(".".join(filter(None, [block_name, path, key])), reason))
        names[block_name] = names_of(block, moved)
    return Weights(names, skipped)


def _why_it_stays(tensor: torch.Tensor, owners: Mapping[int, set[str]], attributes: Mapping[int, str], block: str) -> str | None:
    if not is_movable(tensor):
        return f"a {type(tensor).__name__} of layout {str(tensor.layout).removeprefix('torch.')}, whose bytes are not the tensor"
    if _storage(tensor) in attributes:
        return f"also held by the attribute {attributes[_storage(tensor)]}, which would not move: it stays on the device"
    others = sorted(owners[_storage(tensor)] - {block})
    return f"shared with {others[0] or 'the rest of the model'}: it stays on the device" if others else None


def _owners(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[int, set[str]]:
    """By storage, the blocks that have it, and "" for the rest of the model."""
    block_of = {id(module): name for name, block in blocks.items() for module in block.modules()}
    shared = Counter(id(module) for block in blocks.values() for module in block.modules())
    owners: dict[int, set[str]] = {}
    for module in model.modules():
        # A module that stands in two blocks belongs to neither.
        name = block_of.get(id(module), "") if shared[id(module)] == 1 else ""
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and is_movable(tensor):
                owners.setdefault(_storage(tensor), set()).add(name)
    return owners


def _attributes(model: nn.Module) -> dict[int, str]:
    """By storage, a Python attribute that has it beside the registered tensors, alone or in a list, tuple or dict (as RNNs do)."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            for tensor in inside:
                if isinstance(tensor, torch.Tensor) and is_movable(tensor):
                    found[_storage(tensor)] = f"{path}.{key}" if path else key
    return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
