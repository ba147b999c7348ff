"""A quantized linear as a file holds it, and back: canonical buffers, packed for whichever machine loads them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.optimizer import Portable
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.precision.storage import STORAGES
from kernel_pytorch.schema import ActivationConfig, ActivationMode, WeightConfig

_BIAS, _SCALE, _ZERO_POINT = "bias", "input_scale", "input_zero_point"


def to_portable(layer: QuantizedLinear) -> Portable:
    """The layer's format and shape, and its canonical buffers with the bias and the static scale of its inputs."""
    own = {name: getattr(layer, name) for name in (_BIAS, _SCALE, _ZERO_POINT)}
    tensors = {**layer.stored(), **{name: buffer for name, buffer in own.items() if buffer is not None}}
    return Portable({"format": layer.format, "out_features": layer.out_features, "in_features": layer.in_features}, tensors)


def from_portable(
    name: str,
    saved: Portable,
    original: nn.Module | None,
    weight: WeightConfig,
    activation: ActivationConfig,
    *,
    dtype: torch.dtype | None,
    emulate: bool,
    isa: Collection[str],
) -> QuantizedLinear:
    """The layer that stands for `original`, packed for this machine; the original's weights are not read.

    Raises ConfigError when the file's facts or tensors are not those of such a layer."""
    if not isinstance(original, nn.Linear) or type(original) is not nn.Linear:
        found = "no module" if original is None else f"a {type(original).__name__}"
        raise ConfigError(f"{name}: found {found} in this model; allowed an nn.Linear, which the file stores quantized")
    n, k = original.out_features, original.in_features
    facts = {"format": saved.facts.get("format"), "out_features": n, "in_features": k}
    if saved.facts != facts or not isinstance(facts["format"], str) or facts["format"] not in STORAGES:
        raise ConfigError(
            f"{name}.facts: found {saved.facts} in the file; allowed out_features={n}, in_features={k}, format of {', '.join(STORAGES)}"
        )
    config = replace(weight, format=str(facts["format"]), assign=[])
    expected = _layout(config, activation, n, k, has_bias=original.bias is not None)
    actual = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in saved.tensors.items()}
    # A kernel may keep the bias in another floating type than the model had.
    if _BIAS in expected and _BIAS in actual and actual[_BIAS][0].is_floating_point:
        expected[_BIAS] = (actual[_BIAS][0], expected[_BIAS][1])
    if actual != expected:
        wrong = sorted(key for key in {*actual, *expected} if actual.get(key) != expected.get(key))
        raise ConfigError(
            [f"{name}.{key}: found {_shown(actual.get(key))} in the file; allowed {_shown(expected.get(key))}" for key in wrong]
        )
    tensors = dict(saved.tensors)
    bias, scale, zero_point = (tensors.pop(key, None) for key in (_BIAS, _SCALE, _ZERO_POINT))
    static = None if scale is None else (scale, zero_point)
    layer = QuantizedLinear.from_stored(
        tensors, bias, (n, k), config, activation, dtype=dtype, emulate=emulate, isa=isa, input_scale=static
    )
    return layer.train(original.training)


Layout = tuple[torch.dtype, tuple[int, ...]]


def _layout(weight: WeightConfig, activation: ActivationConfig, n: int, k: int, *, has_bias: bool) -> dict[str, Layout]:
    """Element type and shape of every tensor of a [n, k] layer: one row of zeros, stored, shows what a row takes."""
    row = STORAGES[str(weight.format)].quantize(torch.zeros(1, k), weight)
    found: dict[str, Layout] = {key: (buffer.dtype, (n, *buffer.shape[1:]) if buffer.dim() else ()) for key, buffer in row.items()}
    if has_bias:
        found[_BIAS] = (torch.float32, (n,))
    if activation.mode is ActivationMode.static:
        found[_SCALE] = (torch.float32, ())
        if not activation.symmetric:
            found[_ZERO_POINT] = (torch.float32, ())
    return found


def _shown(layout: Layout | None) -> str:
    return "nothing" if layout is None else f"{str(layout[0]).removeprefix('torch.')} {list(layout[1])}"
