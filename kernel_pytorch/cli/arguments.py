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
COMMANDS = ("list", "describe", "explain", "diff", "validate", "copy", "doctor")

_MULTIRUN = ("-m", "--multirun")
_RUN = ("-r", "--run")
# Flags that Hydra answers itself; the value says how many words follow: none, one, or one if it is among the choices.
_INFO_CHOICES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_INSPECT = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc", "--resolve", "--package", "-p")
_INSPECT_VALUE = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"), "--package": None, "-p": None}
_TRUSTED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun")
_OWN = ("--help", "-h", "--version", "--recipes")
_KNOWN = (*_MULTIRUN, *_RUN, *_INSPECT, *_TRUSTED, *_OWN)

# The part of Hydra's own config that a command line may set; the rest can name code or files to write.
_HYDRA_KEYS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.sweeper.max_batch_size")
_HYDRA_GROUPS = ("hydra/launcher", "hydra/sweeper")
_FOLDER_KEYS = _HYDRA_KEYS[:3]
_INTERPOLATION = re.compile(r"\$\{(?!now:|hydra\.job\.)")
_INSTANTIATE_WORDS = re.compile(r"(?<![A-Za-z0-9])_(target|partial|args|recursive|convert)_(?![A-Za-z0-9])|_execution_whitelist_")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
_LONG_NUMBER = re.compile(r"(?<![\w./-])[\d_]{19,}(?![\w./-])")
_MAX_WORD = 4096
_MAX_DEPTH = 8


@dataclass
class Arguments:
    """words: overrides in the order given, `recipe=` spelled `+recipe=`. recipes: values of --recipes.
    inspect: flags that Hydra answers itself. trusted: flags that only a trusted caller may give."""

    words: list[str] = field(default_factory=list)
    multirun: bool = False
    recipes: list[str] = field(default_factory=list)
    inspect: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    help: bool = False
    version: bool = False

    @property
    def completes(self) -> bool:
        """Whether this is a question of the shell's completion."""
        return any(flag in ("-sc", "--shell-completion") for flag in self.inspect)


def trusted(environ: Mapping[str, str] | None = None) -> bool:
    return (os.environ if environ is None else environ).get(TRUST_VARIABLE) == "1"


def parse(argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Arguments:
    """Sorts words into flags and overrides. Raises ConfigError with one line a mistake."""
    trust = trusted(environ)
    arguments, errors = Arguments(), []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            arguments.words.append(_spell_recipe(word))
            continue
        error = _take_flag(word, rest, arguments, trust)
        if error:
            errors.append(error)
    if arguments.completes:
        return arguments
    errors += check_words(arguments.words, trust)
    if errors:
        raise ConfigError(errors)
    return arguments


def _take_flag(word: str, rest: list[str], arguments: Arguments, trust: bool) -> str | None:
    flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
    if flag in _TRUSTED or _abbreviates_trusted(flag):
        if not trust:
            if not equals and flag in _TRUSTED and rest and not rest[0].startswith("-") and "=" not in rest[0]:
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


def _spell_recipe(word: str) -> str:
    """`recipe=a` and `++recipe=a` mean `+recipe=a`: the group has no entry in the primary config's defaults."""
    match = re.match(r"\+{0,2}recipe=", word)
    return f"+recipe={word[match.end() :]}" if match else word


def check_words(words: Sequence[str], trust: bool) -> list[str]:
    """One line for each override that no recipe language could mean, or that reaches past it."""
    errors = []
    for word in words:
        error = _check_word(word, trust)
        if error:
            errors.append(error)
    recipes = [word for word in words if word.startswith("+recipe=")]
    if len(recipes) > 1:
        errors.append(f"recipe is given {len(recipes)} times; write one +recipe=NAME, or +recipe=[FIRST,SECOND] where the later wins")
    return errors


def _check_word(word: str, trust: bool) -> str | None:
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if len(word) > _MAX_WORD:
        return f"override {shown(word[:40])}...: {len(word):,} characters; at most {_MAX_WORD:,} are read"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in word):
        return f"override {shown(word)}: is not UTF-8"
    control = _CONTROL.search(word)
    if control:
        return f"override {shown(word)}: control character U+{ord(control.group()):04X}"
    if not equals and not key.startswith("~"):
        return f"{shown(word)} is neither a command nor KEY=VALUE{near(word, COMMANDS)}; see --help"
    if not name:
        return f"override {shown(word)}: no key before '='"
    if trust:
        return None
    return _check_reach(word, name, value) or _check_size(word, value)


def _check_reach(word: str, name: str, value: str) -> str | None:
    if "@" in name:
        return f"override {shown(word)}: '@' moves a group to another place; write GROUP=OPTION"
    if _INSTANTIATE_WORDS.search(word):
        return f"override {shown(word)}: names a class to build; choose an option with GROUP=OPTION"
    if re.match(r"hydra($|[./])", name) and not _is_open(name):
        return f"override {shown(word)}: Hydra's own settings are closed; open: {', '.join((*_HYDRA_KEYS, *_HYDRA_GROUPS))}"
    folder = name in _FOLDER_KEYS
    if "${" in word and not folder:
        return f"override {shown(word)}: '${{' is not read here; write the value itself"
    if folder and _INTERPOLATION.search(value):
        return f"override {shown(word)}: only ${{now:FORMAT}} and ${{hydra.job.KEY}} are read in a folder's name"
    return None


def _is_open(name: str) -> bool:
    return name in _HYDRA_KEYS or name in _HYDRA_GROUPS or name.startswith(("hydra.launcher.", "hydra.sweeper.params."))


def _check_size(word: str, value: str) -> str | None:
    depth = deepest = 0
    for character in value:
        depth += (character in "[{(") - (character in "]})")
        deepest = max(deepest, depth)
    if deepest > _MAX_DEPTH:
        return f"override {shown(word)}: nested {deepest} levels deep; at most {_MAX_DEPTH} are read"
    if _LONG_NUMBER.search(value):
        return f"override {shown(word)}: a number of more than 18 digits"
    return None


def near(word: str, allowed: Sequence[str]) -> str:
    """ " (did you mean 'x'?)" for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shown(text: str, limit: int = 80) -> str:
    """`text` quoted for a terminal: control characters escaped, cut to `limit`."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return repr(cut) if cut.isprintable() else ascii(cut)


def is_recipe_file(value: str) -> bool:
    """Whether a recipe's value on the command line is a file and not a name."""
    return value.startswith(("./", "../", "/", "~", ".\\")) or value.endswith((".yaml", ".yml"))


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
    """`TEAM=DIR` or `DIR` with an absolute folder."""
    team, equals, folder = value.rpartition("=")
    return f"{team}{equals}{Path(folder).expanduser().resolve()}"
