"""The README's figures are those of the records."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readmes_table_is_the_one_that_the_records_make():
    made = runpy.run_path(str(ROOT / "docs" / "results" / "readme_table.py"))
    shown = (ROOT / "README.md").read_text().split(made["BEGIN"])[1].split(made["END"])[0]
    assert shown == made["table"]()
    assert shown.count("\n") == 29
