"""What a quantized linear must compute, in plain torch, from the untouched original.

Written apart from QuantizedLinear: it shares none of its code, so that a mistake there shows in the comparison.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kernel_pytorch.precision.reference_weights import fake_quantize_weight
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, ScaleSearch, WeightConfig

_INT8_LIMIT = 127
_TINY = 1e-30


def fake_quantize_activation(x: torch.Tensor, config: ActivationConfig, calibrated: tuple[float, float] | None = None) -> torch.Tensor:
    """x [..., K] rounded to what `config` can represent. Codes are chosen in float32, so float64 input gets the same ones.

    calibrated: the least and the largest input, when the mode is static."""
    if config.mode is ActivationMode.none or x.numel() == 0:
        return x
    if config.format == "nvfp4":
        plain = WeightConfig(format="nvfp4", scale_search=ScaleSearch.plain)
        return fake_quantize_weight(x.float().reshape(-1, x.shape[-1]), plain).view(x.shape).to(x.dtype)
    if config.mode is ActivationMode.static:
        assert calibrated is not None, "static activations need a calibrated range"
        low, high = (torch.tensor(bound, device=x.device) for bound in calibrated)
    else:
        low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    if config.granularity is ActivationGranularity.tensor:
        low, high = low.amin(), high.amax()
    largest = torch.maximum(-low, high)
    if config.format == "int8" and not config.symmetric:
        span = torch.clamp(torch.clamp(high, min=0) - torch.clamp(low, max=0), min=_TINY)
        inverse = 255 / span
        zero = torch.round(torch.clamp(-low, min=0) * inverse)
        code = torch.clamp(torch.round(x.float() * inverse) + zero, 0, 255) - zero
        return code.to(x.dtype) * (span / 255).to(x.dtype)
    if config.format == "int8":
        largest = torch.clamp(largest, min=_TINY)
        code = torch.clamp(torch.round(x.float() * (_INT8_LIMIT / largest)), -_INT8_LIMIT, _INT8_LIMIT)
        return code.to(x.dtype) * (largest / _INT8_LIMIT).to(x.dtype)
    dtype = getattr(torch, str(config.format))
    limit = torch.finfo(dtype).max
    largest = torch.clamp(largest, min=_TINY)
    return (x.float() * (limit / largest)).clamp(-limit, limit).to(dtype).to(x.dtype) * (largest / limit).to(x.dtype)


class FakeQuantLinear(nn.Module):
    """Computes in the dtype of its input, float64 included; bias as the original has it."""

    def __init__(
        self,
        linear: nn.Linear,
        weight: WeightConfig,
        activation: ActivationConfig,
        dtype: torch.dtype | None,
        calibrated: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.calibrated = calibrated
        self.dtype = dtype
        self.quantizes_activations = activation.mode is not ActivationMode.none
        self.register_buffer("weight", fake_quantize_weight(linear.weight, weight))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Exact arithmetic on exact input has no compute dtype to imitate.
        compute = input.dtype if self.dtype is None or input.dtype == torch.float64 else self.dtype
        values = fake_quantize_activation(input.to(compute), self.activation, self.calibrated)
        bias = None if self.bias is None else self.bias.to(compute)
        return F.linear(values, self.weight.to(compute), bias).to(input.dtype)
