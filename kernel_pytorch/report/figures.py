"""Figures as a person reads them. None is a dash, never a zero; units are decimal (1 MB is 1,000,000 bytes)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DASH = "—"
ARROW = "→"


def number(value: Any) -> float | None:
    """The float behind a JSON value; result.json writes infinities and NaN as strings. None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent for what a person meets: 0.0123, 3.51, 35.1, 3512."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 12:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - magnitude)
    text = f"{value:.{decimals}f}"
    # 9.996 rounds up to 10.00, one digit too many.
    if decimals and math.floor(math.log10(abs(float(text)))) > magnitude:
        text = f"{value:.{decimals - 1}f}"
    return text


def ms(value: Any) -> str:
    return significant(number(value))


def nbytes(value: Any) -> str:
    amount = number(value)
    if amount is None:
        return DASH
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(amount) >= size * 0.9995:
            return f"{significant(amount / size)} {unit}"
    return f"{amount:.0f} B"


def ratio(value: Any) -> str:
    amount = number(value)
    if amount is None:
        return DASH
    # Two decimals would make a nought of a small ratio.
    return f"{amount:.2f}x" if abs(amount) >= 0.1 else f"{significant(amount, 2)}x"


def count(value: Any) -> str:
    amount = number(value)
    if amount is None:
        return DASH
    return f"{amount:,.0f}" if abs(amount) >= 100 else significant(amount)


def seconds(value: Any) -> str:
    amount = number(value)
    return DASH if amount is None else f"{significant(amount, 2 if amount < 10 else 3)} s"


def before_after(before: Any, after: Any) -> str:
    """`85.1 MB → 21.4 MB (0.25x)`; a dash when there was nothing before."""
    first, last = number(before), number(after)
    if not first or last is None:
        return DASH if not first else nbytes(first)
    return f"{nbytes(first)} {ARROW} {nbytes(last)} ({ratio(last / first)})"


# How a measure of quality is written, by its key in `verification`.
QUALITY: Mapping[str, str] = {
    "cosine_min": "cosine, least row",
    "sqnr_db": "SQNR",
    "max_abs": "largest difference",
    "top1_agreement": "top-1 agreement",
}


def quality(key: str, value: Any) -> str:
    """Rounded down where more is better: a value just under its floor must not look as if it met it."""
    amount = number(value)
    if amount is None:
        return DASH
    if not math.isfinite(amount):
        return str(amount)
    if key == "sqnr_db":
        return f"{_down(amount, 1)} dB"
    if key == "cosine_min":
        return _down(amount, 5)
    if key == "top1_agreement":
        return f"{_down(amount * 100, 2)} %"
    return significant(amount)


def _down(value: float, decimals: int) -> str:
    # The small addend keeps 0.29 from becoming 0.28 for want of a binary fraction.
    scale = 10**decimals
    return f"{math.floor(value * scale + 1e-9) / scale:.{decimals}f}"


def floor(key: str, value: Any) -> str:
    """A floor as it was asked for, with the unit of its measure."""
    amount = number(value)
    return DASH if amount is None else f"{amount:g}{' dB' if key == 'sqnr_db' else ''}"
