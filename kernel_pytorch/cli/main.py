"""The program: the first word decides between a command and a run. Nothing heavy is imported until it is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kernel_pytorch.cli import arguments as command_line
from kernel_pytorch.errors import ConfigError, KernelPyTorchError

FULL_ERROR = "HYDRA_FULL_ERROR"
INTERRUPTED = 130
# What a shell says of a program that SIGPIPE ended.
READER_LEFT = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. A mistake is one line on stderr, and nothing else."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except KernelPyTorchError as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        from kernel_pytorch.report.plain import plain

        for line in error.lines if isinstance(error, ConfigError) else [str(error)]:
            print(plain(" ".join(line.splitlines())), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as end:
        # rich turns a broken pipe into an exit of its own.
        if isinstance(end.__context__, BrokenPipeError):
            return _reader_left()
        raise


def _reader_left() -> int:
    """The reader of a pipe left (`list | head`): nobody is told, and flushing at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_LEFT


def _dispatch(words: list[str]) -> int:
    if words and words[0] in command_line.COMMANDS:
        return _command(words[0], words[1:])
    arguments = command_line.parse(words)
    if arguments.help or not words:
        from kernel_pytorch.cli import help as text

        print(text.PROGRAM, end="")
        return 0
    if arguments.version:
        from kernel_pytorch import __version__

        print(f"kernel-pytorch {__version__}")
        return 0
    with recipes_in_environment(arguments.recipes):
        if arguments.inspect:
            from kernel_pytorch.cli.app import inspect

            return inspect(arguments)
        if arguments.multirun:
            from kernel_pytorch.cli.sweep import sweep

            return sweep(arguments)
        from kernel_pytorch.cli.run import run

        return run(arguments)


def _command(name: str, words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        from kernel_pytorch.cli import help as text

        print(text.COMMANDS[name], end="")
        return 0
    from kernel_pytorch.cli.commands import COMMANDS

    words, recipes = command_line.split_recipes(words)
    with recipes_in_environment(recipes):
        return COMMANDS[name](words)


@contextmanager
def recipes_in_environment(folders: list[str]) -> Iterator[None]:
    """Adds the folders of --recipes to KERNEL_PYTORCH_RECIPES, where worker processes of a launcher find them too."""
    name = "KERNEL_PYTORCH_RECIPES"
    before = os.environ.get(name)
    if folders:
        os.environ[name] = os.pathsep.join(filter(None, [before, *map(command_line.absolute_source, folders)]))
    try:
        yield
    finally:
        if folders:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before
