"""The values that each number format can store for a weight, found by looking them up in tables of the format's values.

Written apart from storage.py and what it calls, and by another way of rounding: a mistake there shows in the comparison.
"""

from __future__ import annotations

import torch

from kernel_pytorch.choices import ScaleSearch, WeightGranularity
from kernel_pytorch.schema import WeightConfig

_TINY = 1e-30
# Values looked up at once.
_CHUNK = 2**22


def _floats(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> list[float]:
    """The values of a floating-point format that are not negative, in ascending order."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits + (exponent > 0)
            values.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return [value for value in values if value <= largest]


_INT8 = [float(code) for code in range(128)]
_INT4 = [float(code) for code in range(-8, 8)]
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_E4M3 = _floats(4, 3, 7, 448.0)
_E5M2 = _floats(5, 2, 15, 57344.0)
# Format to the table of its values, for a scale that is a plain number a row or a tensor.
_ROWS = {"int8": _INT8, "float8_e4m3fn": _E4M3, "float8_e5m2": _E5M2, "float8_e4m3fnuz": _floats(4, 3, 8, 240.0)}
# MX format to that table and the power of two of its largest value.
_MX = {
    "mxfp4": (_E2M1, 2),
    "mxfp6_e2m3": (_floats(2, 3, 1, 7.5), 2),
    "mxfp6_e3m2": (_floats(3, 2, 3, 28.0), 4),
    "mxfp8_e4m3fn": (_E4M3, 8),
    "mxfp8_e5m2": (_E5M2, 15),
}
_POWERS = [2.0 ** (byte - 127) for byte in range(255)]


def _tensor(table: list[float], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(table, dtype=dtype, device=like.device)


def _index(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest entry of an ascending table; between two that are equally near, the one with the even index."""
    middle = (table[:-1] + table[1:]) / 2
    at_or_below = torch.bucketize(x, middle, out_int32=True)
    above = torch.bucketize(x, middle, out_int32=True, right=True)
    return torch.where((above > at_or_below) & (at_or_below % 2 == 1), above, at_or_below)


def _nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The nearest of a symmetric format's values; its table holds those that are not negative."""
    return torch.copysign(table[_index(x.abs(), table)], x)


def fake_quantize_weight(weight: torch.Tensor, config: WeightConfig) -> torch.Tensor:
    """The values that `config` can store for a [N, K] weight, in float32."""
    weight = weight.detach()
    largest = torch.amax(torch.abs(weight)).float()
    parts = weight.split(max(1, _CHUNK // weight.shape[1]))
    return torch.cat([_fake_quantize(part.float(), largest, config) for part in parts])


def _fake_quantize(rows: torch.Tensor, largest: torch.Tensor, config: WeightConfig) -> torch.Tensor:
    name = str(config.format)
    if name in _ROWS:
        table = _tensor(_ROWS[name], rows)
        if config.granularity is WeightGranularity.channel:
            largest = rows.abs().amax(1, keepdim=True)
        # A Python number: a GPU multiplies by its reciprocal, and by a tensor it divides, which rounds elsewhere.
        step = torch.clamp(largest, min=_TINY) / _ROWS[name][-1]
        return _nearest(rows / step, table) * step
    n, k = rows.shape
    size = {"int4": config.group_size, "nvfp4": 16}.get(name, 32)
    # The last block of a row may be short: not a number where it has no values.
    blocks = rows.new_full((n, -(-k // size) * size), torch.nan)
    blocks[:, :k] = rows
    blocks = blocks.view(n, -1, size)
    if name == "int4":
        values = _int4(blocks)
    elif name == "nvfp4":
        values = _nvfp4(blocks, largest, config.scale_search)
    else:
        values = _mx(blocks, *_MX[name])
    return values.reshape(n, -1)[:, :k]


def _int4(groups: torch.Tensor) -> torch.Tensor:
    low = groups.nan_to_num(torch.inf).amin(2, keepdim=True)
    high = groups.nan_to_num(-torch.inf).amax(2, keepdim=True)
    zero = (low + 8 * ((high - low) / 15)).to(torch.bfloat16).float()
    # Wide enough for both ends, wherever rounding put the zero.
    scale = torch.clamp(torch.maximum((high - zero) / 7, (zero - low) / 8), min=_TINY).to(torch.bfloat16).float()
    table = _tensor(_INT4, groups)
    return table[_index((groups - zero) / scale, table)] * scale + zero


def _nvfp4(blocks: torch.Tensor, largest: torch.Tensor, search: ScaleSearch) -> torch.Tensor:
    blocks = blocks.nan_to_num(0.0)
    values, scales = _tensor(_E2M1, blocks), _tensor(_E4M3, blocks)
    tensor_scale = torch.clamp(largest / (6 * (448 if search is ScaleSearch.plain else 256)), min=_TINY)
    peak = blocks.abs().amax(2, keepdim=True)

    def nearest_scale(divisor: int) -> torch.Tensor:
        return _index(peak / divisor / tensor_scale, scales).clamp(min=1)

    if search is ScaleSearch.plain:
        choices = [nearest_scale(6)]
    elif search is ScaleSearch.four_over_six:
        choices = [nearest_scale(6), nearest_scale(4)]
    else:
        choices = [(nearest_scale(6) + offset).clamp(1, len(_E4M3) - 1) for offset in (-2, -1, 0, 1, 2, 3, 4, 5, 6)]
    errors = []
    for choice in choices:
        scale = scales[choice]
        missed = _nearest(blocks / (scale * tensor_scale), values) * scale * tensor_scale - blocks
        errors.append((missed * missed).double().sum(2, keepdim=True))
    best = torch.cat(errors, 2).argmin(2, keepdim=True)
    scale = scales[torch.cat(choices, 2).gather(2, best)]
    return _nearest(blocks / (scale * tensor_scale), values) * scale * tensor_scale


def _mx(blocks: torch.Tensor, table: list[float], top: int) -> torch.Tensor:
    """In float64, where no power of two and no product of one is out of range."""
    blocks = blocks.nan_to_num(0.0).double()
    values, powers = _tensor(table, blocks, torch.float64), _tensor(_POWERS, blocks, torch.float64)
    peak = blocks.abs().amax(2, keepdim=True)
    # The largest power of two that is not above the block's largest value, less the element's own.
    byte = torch.bucketize(peak, powers, right=True) - 1 - top
    scale = powers[byte.clamp(min=0)]
    return (_nearest(blocks / scale, values) * scale).float()
