"""`doctor`: what this machine has and can do, and whether what its backends claim is so."""

from __future__ import annotations

from rich.text import Text

from kernel_pytorch.cli.arguments import near, shown
from kernel_pytorch.cli.console import LEVEL_STYLE, table
from kernel_pytorch.errors import ConfigError, UnsupportedOperationError
from kernel_pytorch.report.plain import plain
from kernel_pytorch.report.terminal import make_console

# Whether what a backend claims held when it was tried.
_VERDICTS = {True: "holds", False: "does not hold", None: "not tried"}


def doctor(words: list[str]) -> int:
    """Prints one table; 3 when a claim does not hold. Raises ConfigError for a word that is not --measure."""
    unknown = [word for word in words if word != "--measure"]
    if unknown:
        raise ConfigError([f"doctor: found {shown(word)}; allowed --measure{near(word, ['--measure'])}" for word in unknown])

    from kernel_pytorch.backends.doctor import Row, diagnose, present_backends
    from kernel_pytorch.engine.explain import option_support
    from kernel_pytorch.verify.hardware import HardwareValidator

    options = [(f"{group}={option}", support) for group, option, support in option_support() if option != "none"]
    backends = present_backends()
    checks = [(backend.vendor, check) for backend in backends for check in HardwareValidator(backend).validate()]
    tried = [Row(f"{vendor} {check.claim}", _VERDICTS[check.passed], check.message) for vendor, check in checks]
    rows = table("what", "found", "", fixed=(0,))
    for row in diagnose(backends, measure="--measure" in words, options=options, tried=tried):
        rows.add_row(row.what, Text(plain(row.value), style=LEVEL_STYLE.get(row.value, "")), plain(row.note))
    make_console().print(rows)
    failed = any(check.passed is False for _, check in checks)
    return UnsupportedOperationError.exit_code if failed else 0
