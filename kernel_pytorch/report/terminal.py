"""Reports on a terminal, at most 100 columns. Text from elsewhere is data: it is never read as markup or as an escape."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from kernel_pytorch.report.content import Cell, Section, Table, content
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.result import Report
from kernel_pytorch.report.sweep import SweepRow, sweep_section

WIDTH = 100
_STYLES = {"good": "green", "bad": "bold red", "warn": "yellow", "dim": "dim", "strong": "bold", "": ""}
# What stands in for our own signs where the output's encoding has no room for them.
_ASCII = str.maketrans({"—": "-", "→": ">", "–": "-", "★": "*"})


def make_console(stream: TextIO | None = None) -> Console:
    """At most 100 columns on a terminal, exactly 100 and no escape sequence elsewhere. Honours NO_COLOR."""
    out = sys.stdout if stream is None else stream
    terminal = out.isatty()
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if terminal else WIDTH
    return Console(
        file=out,
        width=width,
        force_terminal=terminal,
        no_color=True if os.environ.get("NO_COLOR") else None,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )


def render(result: Report | Mapping[str, Any], folder: Path | None = None, *, console: Console | None = None) -> None:
    """Prints one run. result: a Report, or result.json as a dict. folder: where its files are, named in the last line."""
    page = content(result.to_dict() if isinstance(result, Report) else result)
    drawing = _Drawing(console or make_console())
    drawing.heading(page.title, page.digest)
    drawing.lines(page.facts)
    for section in page.sections:
        drawing.section(section)
    drawing.verdict(page.verdict, page.tone, page.reason, page.exit_code)
    drawing.folder(folder)


def render_sweep(rows: Sequence[SweepRow], folder: Path | None = None, *, console: Console | None = None) -> None:
    """Prints one table of all jobs of a sweep."""
    drawing = _Drawing(console or make_console())
    drawing.section(sweep_section(rows))
    drawing.folder(folder)


class _Drawing:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._narrow = not console.encoding.lower().startswith("utf")

    def _text(self, text: str, style: str = "") -> Text:
        if self._narrow:
            text = text.translate(_ASCII).encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)
        return Text(text, style=style, overflow="fold")

    def _print(self, drawn: RenderableType = "") -> None:
        """Without the blanks that pad a line to the full width: a report is pasted into other texts."""
        with self._console.capture() as capture:
            self._console.print(drawn)
        lines = capture.get().split("\n")
        self._console.file.write("\n".join(line.rstrip(" ") for line in lines))

    def heading(self, title: str, digest: str) -> None:
        self._print()
        line = self._text(title, "bold")
        self._print(line + self._text(f"  {digest}", "dim") if digest else line)

    def lines(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Labels in a column of their own, texts wrapped beside them; a repeated label is written once."""
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        last = None
        for label, text in pairs:
            grid.add_row(self._text("" if label == last else label, "dim"), self._text(text))
            last = label
        if pairs:
            self._indented(grid)

    def section(self, section: Section) -> None:
        self._print()
        self._print(self._text(section.title, "bold"))
        if section.table is not None:
            self._indented(self._table(section.table))
            if section.notes:
                self._print()
        self.lines(section.notes)

    def verdict(self, verdict: str, tone: str, reason: str, exit_code: int) -> None:
        self._print()
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        for _ in range(2):
            grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        bold = _STYLES[tone] if "bold" in _STYLES[tone] else f"bold {_STYLES[tone]}"
        grid.add_row(self._text(verdict, bold), self._text(f"exit {exit_code}", "dim"), self._text(reason))
        self._print(grid)

    def folder(self, folder: Path | None) -> None:
        if folder is not None:
            self._print(self._text(f"written to {plain(folder)}", "dim"))

    def _table(self, table: Table) -> RichTable:
        drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column in table.columns:
            drawn.add_column(
                self._text(column.title, "dim"), justify="right" if column.right else "left", no_wrap=not column.wrap, overflow="fold"
            )
        for row in table.rows:
            drawn.add_row(*(self._cell(cell) for cell in row))
        return drawn

    def _cell(self, cell: Cell) -> Text:
        return self._text(cell.text, _STYLES[cell.tone])

    def _indented(self, drawn: RichTable) -> None:
        self._print(Padding(drawn, (0, 0, 0, 2)))
