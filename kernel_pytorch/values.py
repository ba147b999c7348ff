"""Strings and numbers that a setting may be, checked by pydantic: what schema.py's fields are annotated with. Torch-free."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

from pydantic import AfterValidator

from kernel_pytorch.formats import DTYPES, FORMATS
from kernel_pytorch.registry import hardware_names, is_hardware


def nearest(word: str, allowed: tuple[str, ...] | list[str]) -> str:
    """ " (did you mean 'x'?)" for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_of(allowed: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"found {value!r}; allowed {', '.join(allowed)}{nearest(value, allowed)}")
        return value

    return AfterValidator(check)


def _hardware(value: str) -> str:
    if not is_hardware(value):
        allowed = hardware_names()
        raise ValueError(f"found {value!r}; allowed {', '.join(allowed)}{nearest(value, allowed)}")
    return value


def one_of_numbers(allowed: tuple[int, ...]) -> AfterValidator:
    def check(value: int) -> int:
        if value not in allowed:
            raise ValueError(f"found {value}; allowed {', '.join(map(str, allowed))}")
        return value

    return AfterValidator(check)


def _assignment(text: str) -> str:
    pattern, equals, name = (part.strip() for part in text.rpartition("="))
    if not equals or not pattern:
        raise ValueError(f"found {text!r}; allowed PATTERN=FORMAT, such as '*.down_proj=int8'")
    if name not in (*FORMATS, KEEP):
        raise ValueError(f"found format {name!r} in {text!r}; allowed {', '.join(FORMATS)}, {KEEP}{nearest(name, (*FORMATS, KEEP))}")
    return f"{pattern}={name}"


# ARGUMENT:DIM, then @SIZE where several sizes change independently, then =VALUE where the model relies on the padding's value.
DYNAMIC_DIM = re.compile(
    r"(?P<argument>[A-Za-z_]\w*|\d+):(?P<dim>-?\d+)(?:@(?P<size>[A-Za-z_]\w*))?(?:=(?P<value>-?(?:inf|\d+(?:\.\d+)?(?:e[+-]?\d+)?)))?"
)


def _dynamic_dim(text: str) -> str:
    if not DYNAMIC_DIM.fullmatch(text):
        raise ValueError(f"found {text!r}; allowed ARGUMENT:DIM[@SIZE][=VALUE], such as input_ids:1, bias:3=-inf or images:0@batch")
    return text


# Instead of a format in `weight.assign`: the module stays as it is.
KEEP = "keep"
FormatName = Annotated[str, _one_of(tuple(FORMATS))]
# Formats that inputs of a layer can be quantized to.
ActivationFormat = Annotated[str, _one_of(("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "nvfp4"))]
Assignment = Annotated[str, AfterValidator(_assignment)]
DynamicDimName = Annotated[str, AfterValidator(_dynamic_dim)]
DtypeName = Annotated[str, _one_of(DTYPES)]
HardwareName = Annotated[str, AfterValidator(_hardware)]
