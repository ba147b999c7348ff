"""One linear layer for every quantized scheme: its buffers are the packed bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kernel_pytorch.precision.matmul.base import Matmul, Stored
from kernel_pytorch.precision.matmul.choose import choose
from kernel_pytorch.precision.matmul.dequantize import Emulate
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import ActivationConfig, ActivationGranularity, ActivationMode, WeightConfig


@dataclass(frozen=True)
class InputRange:
    """What calibration saw of a layer's inputs: the least and the largest value."""

    low: float
    high: float


class QuantizedLinear(nn.Module):
    """Computes `F.linear` on weights stored in a low-bit format. Build it with `from_linear` or `from_stored`.

    Buffers: what the format stores (weight, weight_scale, ...) in the layout of the matmul, bias, and where activations have
    static scales input_scale and input_zero_point. `kernel` names what computes: `reference` is the plain-torch emulation.
    max_skinny_rows: up to this many rows its kernel for few rows computes, 0 where the matmul has none.
    """

    # Buffers that are not the format's own.
    OWN_BUFFERS = ("bias", "weight_sum", "weight_channel", "input_scale", "input_zero_point")

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor | None
    weight_channel: torch.Tensor | None
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        weight: WeightConfig,
        activation: ActivationConfig,
        matmul: Matmul,
        *,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.format = str(weight.format)
        self.activation = activation
        self.matmul = matmul
        self.kernel = matmul.name
        self.dtype = dtype
        self.per_row = activation.granularity is ActivationGranularity.token
        self.quantizes_activations = activation.mode is not ActivationMode.none
        self.max_skinny_rows = 0

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight: WeightConfig,
        activation: ActivationConfig,
        *,
        dtype: torch.dtype | None = None,
        emulate: bool = False,
        isa: Collection[str] = (),
        input_range: InputRange | None = None,
    ) -> QuantizedLinear:
        """Reads `linear`, changes nothing of it. dtype: computed in; None is the input's. isa: the CPU's instruction sets.
        input_range: for static activations. Raises ValueError for a weight that the format cannot store."""
        stored = STORAGES[str(weight.format)].quantize(linear.weight.detach(), weight)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        module = cls.from_stored(
            stored,
            bias,
            (linear.out_features, linear.in_features),
            weight,
            activation,
            dtype=dtype,
            emulate=emulate,
            isa=isa,
            input_scale=_input_scale(activation, input_range, linear.weight.device),
        )
        return module.train(linear.training)

    @classmethod
    def from_stored(
        cls,
        stored: Stored,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        weight: WeightConfig,
        activation: ActivationConfig,
        *,
        dtype: torch.dtype | None = None,
        emulate: bool = False,
        isa: Collection[str] = (),
        input_scale: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> QuantizedLinear:
        """From a format's canonical buffers, as `stored()` gives them, packed for this machine. shape: (out_features, in_features).
        input_scale: scale and zero point of static activations, both float32 []."""
        matmul = Emulate() if emulate else choose(weight, activation, shape, stored, isa)
        module = cls(shape, weight, activation, matmul, dtype=dtype)
        scale, zero_point = input_scale or (None, None)
        for name, buffer in {**dict.fromkeys(cls.OWN_BUFFERS), **matmul.pack(module, stored, bias)}.items():
            module.register_buffer(name, buffer)
        module.register_buffer("input_scale", scale)
        module.register_buffer("input_zero_point", zero_point)
        return module

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves buffers and casts none: `model.half()` is about what is computed, and what is stored has the format's own types."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Codes are no numbers: a state of other types or shapes, such as the original's, is an error, and nothing is copied."""
        error_msgs: list[str] = rest[-1]
        stored = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and name != "bias"}
        wrong = []
        for name, buffer in stored.items():
            given = state_dict.get(f"{prefix}{name}")
            if isinstance(given, torch.Tensor) and (given.dtype, given.shape) != (buffer.dtype, buffer.shape):
                found, kept = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (given, buffer))
                wrong.append(f"{prefix}{name}: found {found}, allowed {kept} of {self.format}: load what a model quantized alike saved")
        if wrong:
            error_msgs.extend(wrong)
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def has_row_scales(self) -> bool:
        """One code is one byte, and one scale a row is all there is to it."""
        return self.weight_scale.dim() == 1

    def stored(self) -> Stored:
        """The format's canonical buffers, whatever layout the matmul keeps them in."""
        return self.matmul.unpack(self)

    def dequantize(self) -> torch.Tensor:
        """The stored weights as float32 [out_features, in_features]."""
        return STORAGES[self.format].dequantize(self.stored(), self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Named as in nn.Linear, for callers that name it. Kernels look at their own padded width and convert whatever they are given.
        if input.shape[-1] != self.in_features or not input.is_floating_point():
            shown = f"{input.dtype} [..., {input.shape[-1]}]"
            raise ValueError(f"QuantizedLinear: the input must be floating, [..., {self.in_features}]; found {shown}")
        y = self.matmul.run(self, input if self.dtype is None else input.to(self.dtype))
        return y if y.dtype == input.dtype else y.to(input.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" format={self.format}, kernel={self.kernel}"
        )


def _input_scale(
    activation: ActivationConfig, found: InputRange | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Scale and zero point that a calibrated range gives; None unless activations are static."""
    if activation.mode is not ActivationMode.static:
        return None
    assert found is not None, "static activations need a calibrated range"
    scale, zero_point = static_scale(activation, found)
    return (
        torch.tensor(scale, dtype=torch.float32, device=device),
        None if zero_point is None else torch.tensor(zero_point, dtype=torch.float32, device=device),
    )


def static_scale(activation: ActivationConfig, found: InputRange) -> tuple[float, float | None]:
    """(scale, zero point) that spread the format's codes over a range; without zero point where the scheme is symmetric."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if activation.format == "int8" and not activation.symmetric:
        scale = max(high - low, 1e-30) / 255
        return scale, float(round(-low / scale) - 128)
    limit = 127.0 if activation.format == "int8" else torch.finfo(getattr(torch, str(activation.format))).max
    return max(-low, high, 1e-30) / limit, None
