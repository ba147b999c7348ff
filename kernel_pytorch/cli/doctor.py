"""`doctor`: what this machine has and can do."""

from __future__ import annotations

from rich.text import Text

from kernel_pytorch.cli.arguments import near, shown
from kernel_pytorch.cli.console import LEVEL_STYLE, table
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.terminal import make_console


def doctor(words: list[str]) -> int:
    """Prints one table. Raises ConfigError for a word that is not --measure."""
    unknown = [word for word in words if word != "--measure"]
    if unknown:
        raise ConfigError([f"doctor: found {shown(word)}; allowed --measure{near(word, ['--measure'])}" for word in unknown])

    from kernel_pytorch.backends.doctor import diagnose
    from kernel_pytorch.engine.explain import option_support

    options = [(f"{group}={option}", support) for group, option, support in option_support() if option != "none"]
    rows = table("what", "found", "", fixed=(0,))
    for row in diagnose(measure="--measure" in words, options=options):
        rows.add_row(row.what, Text(plain(row.value), style=LEVEL_STYLE.get(row.value, "")), plain(row.note))
    make_console().print(rows)
    return 0
