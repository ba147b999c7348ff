"""A report as one page: no script, no network, everything from elsewhere escaped. The same content as the terminal's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kernel_pytorch.report import figures
from kernel_pytorch.report.content import Cell, Content, Section, Table, content
from kernel_pytorch.report.figures import number
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.result import RECIPE

# Colours carry no meaning alone: every tone also stands in words.
_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #656d76; --line: #d8dee4; --back: #ffffff; --bar: #c5ccd4;
  --good: #116329; --bad: #b3261e; --warn: #855300; --accent: #2f6f9f; }
@media (prefers-color-scheme: dark) { :root { --text: #dfe3e8; --soft: #9aa4af; --line: #30363d; --back: #14171b;
  --bar: #454d57; --good: #57ab5a; --bad: #f07067; --warn: #d0a24c; --accent: #6cb0e0; } }
body { background: var(--back); color: var(--text); font: 15px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 3rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2.4rem 0 .6rem; }
code { font: .85em ui-monospace, monospace; color: var(--soft); }
.verdict { border-left: 4px solid currentColor; padding: .3rem 0 .3rem 1rem; margin: 1.4rem 0; }
.verdict b { letter-spacing: .04em; } .verdict span { color: var(--text); overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .8rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); } th, td { padding: .35rem 1.2rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); } th:last-child, td:last-child { padding-right: 0; }
.right { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .warn { color: var(--warn); } .dim { color: var(--soft); }
.strong { font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.2rem; align-items: center; margin: 1rem 0 1.4rem; }
.bar { display: flex; align-items: center; gap: .6rem; white-space: nowrap; }
.bar i { background: var(--bar); height: 1rem; border-radius: 2px; flex: none; } .bar i.ours { background: var(--accent); }
footer { color: var(--soft); margin-top: 3rem; font-size: .85rem; }
"""
# Of the row's width, so that the figure behind the longest bar has room.
_LONGEST_BAR = 72.0


def page(result: Mapping[str, Any]) -> str:
    """The page of one run. result: result.json as a dict, or Report.to_dict()."""
    said = content(result)
    bars = "" if result.get("verdict") == "emulated" else _bars(result.get("ladder") or [])
    sections = "".join(_section(section, bars if section.title == "Ladder" else "") for section in said.sections)
    title = f"{_safe(said.title)}: {_safe(said.verdict.lower())}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style></head>\n<body>\n{_head(said)}{sections}"
        "<footer>Times are medians of interleaved rounds in one process; a ratio above 1 is faster. "
        "1 MB is 1,000,000 bytes. A dash means not measured."
        "</footer>\n</body></html>\n"
    )


def _safe(text: str) -> str:
    return escape(plain(text), quote=True)


def _head(said: Content) -> str:
    digest = f" <code>{_safe(said.digest)}</code>" if said.digest else ""
    return (
        f"<h1>{_safe(said.title)}{digest}</h1>\n"
        f'<p class="verdict {said.tone}"><b>{_safe(said.verdict)}</b> <code>exit {said.exit_code}</code>'
        f" <span>{_safe(said.reason)}</span></p>\n{_pairs(said.facts)}"
    )


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    items, last = "", None
    for label, text in pairs:
        items += f"<dt>{'' if label == last else _safe(label)}</dt><dd>{_safe(text)}</dd>"
        last = label
    return f"<dl>{items}</dl>\n" if items else ""


def _section(section: Section, above: str) -> str:
    table = "" if section.table is None else _table(section.table)
    return f"<h2>{_safe(section.title)}</h2>\n{above}{table}{_pairs(section.notes)}"


def _table(table: Table) -> str:
    aligned = [' class="right"' if column.right else "" for column in table.columns]
    head = "".join(f"<th{side}>{_safe(column.title)}</th>" for side, column in zip(aligned, table.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{side}>{_cell(cell)}</td>" for side, cell in zip(aligned, row, strict=True)) + "</tr>\n" for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'


def _cell(cell: Cell) -> str:
    return f'<span class="{cell.tone}">{_safe(cell.text)}</span>' if cell.tone else _safe(cell.text)


def _bars(rungs: Sequence[Mapping[str, Any]]) -> str:
    """Median latency of each rung, on one scale that starts at zero."""
    timed = [(str(rung["name"]), number(rung.get("latency_ms"))) for rung in rungs]
    longest = max((latency for _, latency in timed if latency), default=None)
    if longest is None:
        return ""
    items = ""
    for name, latency in timed:
        if latency is None:
            continue
        ours = ' class="ours"' if name == RECIPE else ""
        width = _LONGEST_BAR * latency / longest
        items += f'<span>{_safe(name)}</span><span class="bar"><i{ours} style="width:{width:.2f}%"></i>{figures.ms(latency)} ms</span>\n'
    return f'<div class="bars">{items}</div>\n'
