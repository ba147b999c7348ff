"""A recipe's `sweep:` block as overrides of a multirun; the command line's lists replace it, key by key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.chain import inherited_sweep
from kernel_pytorch.recipe.guard import sweep_text
from kernel_pytorch.recipe.overrides import Read, read_overrides
from kernel_pytorch.recipe.sources import RecipeSources

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


def sweep_overrides(overrides: Sequence[str], sources: RecipeSources | None = None) -> list[str]:
    """What the sweep block of the recipe named in `overrides` adds under -m. Raises ConfigError for mistakes."""
    return block_overrides(read_overrides(overrides, sources or RecipeSources.from_environment(), multirun=True))


def block_overrides(read: Read) -> list[str]:
    """`sweep_overrides` of words that were read."""
    blocks = {name: inherited_sweep(chain) for name, chain in read.chains.items()}
    wanted = {name: {key: values for key, values in block.items() if key not in read.words.named} for name, block in blocks.items()}
    with_block = [name for name, block in wanted.items() if block]
    if len(blocks) > 1 and with_block:
        raise ConfigError(
            f"command line: recipe: found {', '.join(blocks)} under -m, and {with_block[0]!r} has a sweep block of its own;"
            f" allowed one recipe, or values for {', '.join(wanted[with_block[0]])} on the command line"
        )
    return [f"{key}={','.join(_word(value) for value in values)}" for block in wanted.values() for key, values in block.items()]


def _word(value: Any) -> str:
    """A value in Hydra's grammar; text with special characters is quoted, so that it stays one value."""
    text = sweep_text(value)
    if not isinstance(value, str) or _PLAIN.fullmatch(text):
        return text
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
