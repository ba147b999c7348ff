"""Number formats by name: the torch-free facts that the schema validates against.

A format's values, packing and rounding live in `kernel_pytorch/precision/`; here is only what planning needs.
Names are torch's dtype names where torch has the dtype, and an OCP MX format's element type otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bits of one stored scale or zero. float8_e8m0fnu is a bare exponent: 2**(byte - 127).
SCALE_BITS: dict[str, int] = {"float32": 32, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e8m0fnu": 8, "": 0}


@dataclass(frozen=True)
class NumberFormat:
    """bits: stored bits of one value. max_value: largest finite magnitude before scaling. block: values that share one
    scale, 0 when the scale's granularity is the scheme's choice. scale_format: how a scale is stored. source: where the
    facts are from. zero_format: how a zero beside each scale is stored, empty without one."""

    name: str
    bits: int
    max_value: float
    block: int
    scale_format: str
    source: str
    zero_format: str = ""

    def effective_bits(self, group_size: int = 0) -> float:
        """Bits a value with its share of the scale and zero. group_size: values that share them where `block` is 0; 0 there
        leaves them out, as a scale a row is. A scale of the whole tensor is left out."""
        shared = self.block or group_size
        return self.bits + (SCALE_BITS[self.scale_format] + SCALE_BITS[self.zero_format]) / shared if shared else float(self.bits)


_MX = "OCP Microscaling Formats (MX) 1.0"

FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("int8", 8, 127.0, 0, "float32", "symmetric two's complement, -128 unused"),
        NumberFormat("int4", 4, 8.0, 0, "bfloat16", "16 even steps a group, codes 0 to 15 stand for -8 to 7", zero_format="bfloat16"),
        NumberFormat("float8_e4m3fn", 8, 448.0, 0, "float32", "arXiv:2209.05433, table 1"),
        NumberFormat("float8_e5m2", 8, 57344.0, 0, "float32", "arXiv:2209.05433, table 1"),
        NumberFormat("float8_e4m3fnuz", 8, 240.0, 0, "float32", "arXiv:2206.02915, table 1: exponent bias 8, one NaN, no -0"),
        NumberFormat("nvfp4", 4, 6.0, 16, "float8_e4m3fn", "arXiv:2509.25149, section 2: E2M1 with a float32 scale of the tensor"),
        NumberFormat("mxfp4", 4, 6.0, 32, "float8_e8m0fnu", f"{_MX}, table 1: E2M1"),
        NumberFormat("mxfp6_e2m3", 6, 7.5, 32, "float8_e8m0fnu", f"{_MX}, table 1"),
        NumberFormat("mxfp6_e3m2", 6, 28.0, 32, "float8_e8m0fnu", f"{_MX}, table 1"),
        NumberFormat("mxfp8_e4m3fn", 8, 448.0, 32, "float8_e8m0fnu", f"{_MX}, table 1"),
        NumberFormat("mxfp8_e5m2", 8, 57344.0, 32, "float8_e8m0fnu", f"{_MX}, table 1"),
    )
}

# Element types that a module can be cast to as a whole.
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")
