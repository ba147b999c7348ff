"""`precompile`: the Triton kernels as code objects, for GPUs that need not be here."""

from __future__ import annotations

from pathlib import Path

from kernel_pytorch.cli.arguments import near, shown
from kernel_pytorch.errors import CompilationError, ConfigError

FLAGS = ("--target", "--kernel", "--out")


def parse(words: list[str]) -> dict[str, list[str]]:
    """The values of each flag. Raises ConfigError, all mistakes at once."""
    errors, given, rest = list[str](), {flag: list[str]() for flag in FLAGS}, list(words)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag not in FLAGS:
            errors.append(f"precompile: found {shown(flag)}{near(flag, FLAGS)}; allowed {', '.join(FLAGS)}")
        elif equals or (rest and not rest[0].startswith("--")):
            given[flag].append(value if equals else rest.pop(0))
        else:
            errors.append(f"precompile: {flag} needs a value")
    if len(given["--out"]) > 1:
        errors.append(f"precompile: --out is given {len(given['--out'])} times; allowed once")
    if errors:
        raise ConfigError(errors)
    return given


def precompile(words: list[str]) -> int:
    """Prints a line for each code object; 1 when a compiler refused one. Raises UnsupportedOperationError without Triton."""
    given = parse(words)

    from kernel_pytorch.backends.kernel_compiler import requested

    out = Path(given["--out"][0]).expanduser() if given["--out"] else None
    refused = num_made = 0
    for compiler, build in requested(given["--target"], given["--kernel"], out):
        try:
            code = compiler.compile(build)
        except CompilationError as error:
            refused += 1
            print(error, flush=True)
            continue
        num_made += 1
        print(f"{code.path or 'not written'}  {len(code.binary):,} bytes, {code.shared_bytes:,} of shared memory", flush=True)
    print(f"{num_made} code objects, {refused} refused")
    return 1 if refused else 0
