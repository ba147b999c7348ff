"""Graph-aware placement: small tensors on the host that a graph would trip over get device memory to stand for them.

Arguments are sent into that memory in every call in which they changed. What a model holds (a buffer, an attribute) is
moved once, on the model that this library was given to change. Either way the outputs must be the same bits as before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernel_pytorch.graph.inputs import overlaps
from kernel_pytorch.graph.recorder import Recorder
from kernel_pytorch.graph.state import HOST_BYTES, WriteWatch

# An argument on the host that is larger is not sent in every call: the call goes straight through.
MAX_SENT_BYTES = 2**16


def can_be_sent(tensor: torch.Tensor) -> bool:
    return tensor.nbytes <= MAX_SENT_BYTES and not overlaps(tensor)


class HostState:
    """The model's own tensors on the host that the watched call read, each at most HOST_BYTES. False when there are none."""

    def __init__(self, slots: list[tuple[Any, Any, Any]], recorder: Recorder, watch: WriteWatch) -> None:
        self._recorder = recorder
        self._slots = [
            (container, key, tensor)
            for container, key, tensor in slots
            if isinstance(tensor, torch.Tensor)
            and recorder.is_elsewhere(tensor)
            and tensor.nbytes <= HOST_BYTES
            and watch.reads(tensor)
            and not watch.wrote(tensor)
        ]
        self.moved_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._slots)

    def place(self) -> None:
        moved: dict[int, torch.Tensor] = {}
        # Ordinary tensors, also when the call that led here runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for container, key, tensor in self._slots:
                if id(tensor) not in moved:
                    copy = self._recorder.place(tensor.detach())
                    moved[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
                container[key] = moved[id(tensor)]
        self.moved_bytes = sum(tensor.nbytes for tensor in moved.values())

    def put_back(self) -> None:
        for container, key, tensor in self._slots:
            container[key] = tensor
