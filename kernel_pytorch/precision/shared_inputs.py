"""Layers that read the very same tensor in every call, by watching them: Q, K and V; gate and up."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from itertools import count

import torch
from torch.utils.weak import WeakIdKeyDictionary


class SharedInputs:
    """Keeps no input alive, and is not misled by a tensor that gets the address of one that is gone."""

    def __init__(self) -> None:
        self._numbers: MutableMapping[torch.Tensor, int] = WeakIdKeyDictionary()
        self._next = count()
        self._seen: dict[str, list[tuple[int, int]]] = {}

    def watch(self, name: str, x: torch.Tensor, _output: torch.Tensor) -> None:
        # A tensor that was written to between two layers is another input. Inference tensors keep no count of that.
        version = -1 if x.is_inference() else x._version
        self._seen.setdefault(name, []).append((self._numbers.setdefault(x, next(self._next)), version))

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Every one of `names` in one group, under the first one's name; a layer that was never called is alone."""
        groups: dict[tuple[tuple[int, int], ...] | str, list[str]] = {}
        for name in names:
            groups.setdefault(tuple(self._seen.get(name, ())) or name, []).append(name)
        return {members[0]: members for members in groups.values()}
