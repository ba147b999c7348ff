"""Number formats by name: the torch-free facts that the schema validates against.

A format's values, packing and rounding live in `kernel_pytorch/precision/`; here is only what planning needs.
Names are torch's dtype names where torch has the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NumberFormat:
    """bits: stored bits of one value. max_value: largest finite magnitude. block: values that share one scale, 0 when the
    scale's granularity is the scheme's choice. scale_format: how a scale is stored. source: where the facts are from."""

    name: str
    bits: int
    max_value: float
    block: int
    scale_format: str
    source: str


FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("int8", 8, 127.0, 0, "float32", "symmetric two's complement, -128 unused"),
        NumberFormat("float8_e4m3fn", 8, 448.0, 0, "float32", "arXiv:2209.05433, table 1"),
        NumberFormat("float8_e5m2", 8, 57344.0, 0, "float32", "arXiv:2209.05433, table 1"),
    )
}

# Element types that a module can be cast to as a whole.
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")
