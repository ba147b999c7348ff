"""One console for what the commands print: at most 100 columns, also when piped."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 100


def console() -> Console:
    """Wide as the terminal up to 100 columns; exactly 100 in a pipe, so that saved output looks the same everywhere."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def table(*columns: str, fixed: tuple[int, ...] = (0,)) -> Table:
    """Columns without lines; those at the positions `fixed` never wrap."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, column in enumerate(columns):
        made.add_column(column, no_wrap=position in fixed, overflow="fold")
    return made


def value_text(value: Any) -> str:
    """A value as one would write it in YAML or on the command line."""
    import json
    from enum import Enum

    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return value if value and value.isprintable() else json.dumps(value)
    return "null" if value is None else json.dumps(value, default=lambda item: getattr(item, "value", str(item)))
