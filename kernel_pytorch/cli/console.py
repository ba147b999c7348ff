"""Tables and values as the commands print them."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any

from rich.table import Table

LEVEL_STYLE = {"native": "green", "emulated": "yellow", "unsupported": "red"}


def table(*columns: str, fixed: tuple[int, ...] = (0,)) -> Table:
    """Columns without lines; those at the positions `fixed` never wrap."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for position, column in enumerate(columns):
        made.add_column(column, no_wrap=position in fixed, overflow="fold")
    return made


def value_text(value: Any) -> str:
    """A value as one would write it in YAML or on the command line."""
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return value if value and value.isprintable() else json.dumps(value)
    return "null" if value is None else json.dumps(value, default=lambda item: getattr(item, "value", str(item)))
