"""Text from elsewhere, made safe to print: module names, messages and device names are not ours."""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional overrides, zero width), surrogate, private use, unassigned, line and paragraph separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def plain(value: object) -> str:
    """`value` on one line, with every character that could move a cursor or reorder text written as its escape."""
    return "".join(_escape(character) if unicodedata.category(character) in _UNSAFE else character for character in str(value))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def shorten(text: str, width: int) -> str:
    """At most `width` characters, with the middle left out: the ends of a module name tell most."""
    if len(text) <= width:
        return text
    if width < 5:
        return text[:width]
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
