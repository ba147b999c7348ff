"""The command line before Hydra sees it: flags, the natural order of words, and what only a trusted caller may say.

Flags are matched by their full spelling alone: argparse would also take `--config-di`, and Hydra 1.3 refuses overrides on
both sides of a flag. Nothing heavy is imported here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel_pytorch.errors import ConfigError

TRUST_VARIABLE = "KERNEL_PYTORCH_TRUST_CONFIG"
COMMANDS = ("list", "describe", "explain", "diff", "validate", "copy", "doctor", "tune", "precompile")

_MULTIRUN = ("-m", "--multirun")
_RUN = ("-r", "--run")
# Flags that Hydra answers itself; the value says how many words follow: none, one, or one if it is among the choices.
_INFO_CHOICES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_INSPECT = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "--resolve", "--package", "-p")
_INSPECT_VALUE = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"), "--package": None, "-p": None}
_TRUSTED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")
_OWN = ("--help", "-h", "--version", "--recipes")
_KNOWN = (*_MULTIRUN, *_RUN, *_INSPECT, *_TRUSTED, *_OWN)

# What no override can need, refused before Hydra's grammar reads it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
_LONG_NUMBER = re.compile(r"(?<![\w./-])[\d_]{19,}(?![\w./-])")
_MAX_WORD = 4096
_MAX_DEPTH = 8


@dataclass
class Arguments:
    """words: overrides in the order given. recipes: values of --recipes. inspect: flags that Hydra answers itself.
    trusted: flags that only a trusted caller may give. errors: one line for each flag that cannot be."""

    words: list[str] = field(default_factory=list)
    multirun: bool = False
    recipes: list[str] = field(default_factory=list)
    inspect: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    help: bool = False
    version: bool = False
    errors: list[str] = field(default_factory=list)

    @property
    def completes(self) -> bool:
        """Whether this is a question of the shell's completion."""
        return any(flag in ("-sc", "--shell-completion") for flag in self.inspect)


def trusted(environ: Mapping[str, str] | None = None) -> bool:
    return (os.environ if environ is None else environ).get(TRUST_VARIABLE) == "1"


def parse(argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Arguments:
    """Sorts words into flags and overrides; what is wrong with flags is in `errors`, so that all mistakes come at once."""
    trust = trusted(environ)
    arguments, errors = Arguments(), list[str]()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            arguments.words.append(word)
            continue
        error = _take_flag(word, rest, arguments, trust)
        if error:
            errors.append(error)
    arguments.errors = errors
    return arguments


def _take_flag(word: str, rest: list[str], arguments: Arguments, trust: bool) -> str | None:
    flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
    if flag in _TRUSTED or _abbreviates_trusted(flag):
        if not trust:
            separate = not equals and (flag in _TRUSTED or flag.startswith("--"))
            if separate and rest and not rest[0].startswith("-") and "=" not in rest[0]:
                rest.pop(0)
            return f"{shown(flag)} reads configuration as code: set {TRUST_VARIABLE}=1 if you trust it as you trust a program"
        return _take_value(flag, equals, value, rest, arguments.trusted, None) if flag in _TRUSTED else _unknown(word)
    if flag == "--recipes":
        return _take_value(flag, equals, value, rest, arguments.recipes, None, keep_flag=False)
    if flag in _INSPECT_VALUE:
        return _take_value(flag, equals, value, rest, arguments.inspect, _INSPECT_VALUE[flag])
    if flag in ("--info", "-i"):
        follows = rest.pop(0) if not equals and rest and rest[0] in _INFO_CHOICES else value or "all"
        if follows not in _INFO_CHOICES:
            return f"{flag}: found {shown(follows)}{near(follows, _INFO_CHOICES)}; allowed: {', '.join(_INFO_CHOICES)}"
        arguments.inspect += ["--info", follows]
        return None
    if equals or flag not in _KNOWN:
        return f"{flag} takes no value: found {shown(value)}" if flag in _KNOWN else _unknown(word)
    if flag in _MULTIRUN:
        arguments.multirun = True
    elif flag in ("--help", "-h"):
        arguments.help = True
    elif flag == "--version":
        arguments.version = True
    elif flag not in _RUN:
        arguments.inspect.append(flag)
    return None


def _take_value(
    flag: str, equals: str, value: str, rest: list[str], into: list[str], allowed: tuple[str, ...] | None, keep_flag: bool = True
) -> str | None:
    if not equals:
        if not rest:
            return f"{flag} needs a value"
        value = rest.pop(0)
    if allowed and value not in allowed:
        return f"{flag}: found {shown(value)}{near(value, allowed)}; allowed: {', '.join(allowed)}"
    into += [flag, value] if keep_flag else [value]
    return None


def _abbreviates_trusted(flag: str) -> bool:
    """argparse takes any unambiguous prefix of a long flag, and a value glued to a short one."""
    if flag.startswith("--"):
        return len(flag) > 3 and any(name.startswith(flag) for name in _TRUSTED if name.startswith("--")) and flag not in _KNOWN
    return flag[:3] in ("-cd", "-cp", "-cn") and flag not in _KNOWN


def _unknown(word: str) -> str:
    flag = word.partition("=")[0]
    return f"unknown flag {shown(flag)}{near(flag, _KNOWN)}; see --help"


def check_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that Hydra's grammar may read, and one line for each of the others."""
    good, errors = [], []
    for word in words:
        error = _check_word(word)
        if error:
            errors.append(error)
        else:
            good.append(word)
    recipes = [word for word in good if re.match(r"\+{0,2}recipe=", word)]
    if len(recipes) > 1:
        errors.append(f"recipe is given {len(recipes)} times: {', '.join(recipes)}; allowed once")
        good = [word for word in good if word not in recipes]
    return good, errors


def _check_word(word: str) -> str | None:
    key, equals, value = word.partition("=")
    if len(word) > _MAX_WORD:
        return f"command line: found {shown(word[:40])} and more, {len(word):,} characters; allowed {_MAX_WORD:,}"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in word):
        return f"command line: found {shown(word)}; allowed UTF-8"
    if control := _CONTROL.search(word):
        return f"command line: found {shown(word)}; allowed no control character, and U+{ord(control.group()):04X} is one"
    if not equals and not key.startswith("~"):
        return f"command line: found {shown(word)}; allowed a command or KEY=VALUE{near(word, COMMANDS)}"
    if not key.strip("+~ "):
        return f"command line: found {shown(word)}; allowed a key before '='"
    if (depth := _depth(value)) > _MAX_DEPTH:
        return f"command line: {key}: found {depth} levels of brackets; allowed {_MAX_DEPTH}"
    if _LONG_NUMBER.search(value):
        return f"command line: {key}: found a number of more than 18 digits; allowed at most 18"
    return None


def _depth(value: str) -> int:
    depth = deepest = 0
    for character in value:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    return deepest


def near(word: str, allowed: Sequence[str]) -> str:
    """ " (did you mean 'x'?)" for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(text: str, limit: int = 80) -> str:
    """`text` quoted for a terminal: control characters escaped, cut to `limit`."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return repr(cut) if cut.isprintable() else ascii(cut)


def split_recipes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's words without `--recipes VALUE`, and the values."""
    rest, kept, folders = list(words), [], []
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag != "--recipes":
            kept.append(word)
        elif error := _take_value(flag, equals, value, rest, folders, None, keep_flag=False):
            raise ConfigError(error)
    return kept, folders


def absolute_source(value: str) -> str:
    """`TEAM=DIR` with an absolute folder. Raises ConfigError for anything else."""
    team, equals, folder = value.partition("=")
    if not (team and equals and folder):
        raise ConfigError(f"--recipes: found {shown(value)}; allowed TEAM=DIR, named as +recipe=TEAM/NAME")
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"--recipes: {shown(folder)} is no folder")
    return f"{team}={path}"
