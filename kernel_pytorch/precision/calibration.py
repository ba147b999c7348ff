"""Ranges of activations over calibration data: what static scales are made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kernel_pytorch.optimizer import Workload
from kernel_pytorch.precision.quantized_linear import InputRange


def observe_ranges(model: nn.Module, modules: Mapping[str, nn.Module], workload: Workload, num_calls: int) -> dict[str, InputRange]:
    """The least and the largest input of each module while `model` works on `num_calls` calibration samples.

    Modules that calibration never calls are left out; so are those whose inputs were not finite."""
    bounds: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel():
                found = torch.stack(torch.aminmax(x.detach().float()))
                before = bounds.get(name, found)
                bounds[name] = torch.stack((torch.minimum(before[0], found[0]), torch.maximum(before[1], found[1])))

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    try:
        # Not inference_mode, whose tensors XLA refuses.
        with torch.no_grad():
            workload.calibrate(model, num_calls)
    finally:
        for handle in handles:
            handle.remove()
    finite = {name: pair.tolist() for name, pair in bounds.items() if torch.isfinite(pair).all()}
    return {name: InputRange(low, high) for name, (low, high) in finite.items()}
