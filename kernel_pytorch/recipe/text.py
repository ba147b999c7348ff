"""From a file's bytes to plain data, refusing every YAML feature that is more than data.

Reading is lazy: a hostile file is refused at its first bad token, before anything is built from it.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.recipe.keys import quoted

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_DIGITS = 18
MAX_KEY = 100
# The scanner's work grows with the square of the open brackets on a line.
MAX_BRACKETS = 512

_REFUSED_TOKENS: dict[type, str] = {
    yaml.AnchorToken: "an anchor (&)",
    yaml.AliasToken: "an alias (*)",
    yaml.TagToken: "a tag (!)",
    yaml.DirectiveToken: "a directive (%)",
    yaml.DocumentEndToken: "an end of document (...)",
}
_OPEN = (yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)
_CLOSE = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def read_bytes(path: Path, folder: Path) -> bytes:
    """The bytes of a regular file of at most 64 KiB that does not lead out of `folder`. Raises RecipeError without the path."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise RecipeError(f"found a link out of its folder, to {str(real)!r}; allowed a file inside it")
        # Non-blocking: opening a FIFO must not wait for a writer.
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError("found something that is not a regular file; allowed a YAML file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RecipeError(f"found {max(status.st_size, len(data)):,} bytes; allowed at most {MAX_BYTES:,}")
    return data


def parse(data: bytes) -> dict[str, Any]:
    """The mapping that the file holds. Raises RecipeError with one line a mistake, without the path."""
    text = _decode(data)
    _scan(text)
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_message(error)) from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"found a {node.id}; allowed a mapping of keys")
    errors: list[str] = []
    body = _mapping(node, "", errors)
    if errors:
        raise RecipeError(errors)
    return body


def _decode(data: bytes) -> str:
    if data.startswith(b"\xef\xbb\xbf"):
        raise RecipeError("found a byte order mark; allowed UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"found bytes that are not UTF-8 at offset {error.start}; allowed UTF-8 text") from error
    for number, line in enumerate(text.split("\n"), 1):
        if bad := control_characters(line.rstrip("\r")):
            raise RecipeError(f"line {number}: found the control character {bad}; allowed printable text")
        # Hydra reads these comments as instructions.
        if re.match(r"\s*#\s*@", line) and not re.fullmatch(r"\s*#\s*@package\s+_global_\s*", line):
            raise RecipeError(f"line {number}: found the header {quoted(line.strip())}; allowed '# @package _global_'")
    if (count := text.count("[") + text.count("{")) > MAX_BRACKETS:
        raise RecipeError(f"found {count} opening brackets; allowed at most {MAX_BRACKETS}")
    return text


def control_characters(text: str) -> str | None:
    """The first character of `text` that could steer a terminal or hide text, as U+XXXX; None when there is none."""
    for character in text:
        if character != "\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return f"U+{ord(character):04X}"
    return None


def _scan(text: str) -> None:
    depth = 0
    first = True
    for token in _tokens(text):
        line = token.start_mark.line + 1
        if what := _REFUSED_TOKENS.get(type(token)):
            raise RecipeError(f"line {line}: found {what}; allowed plain keys, lists and values")
        if isinstance(token, yaml.DocumentStartToken) and not first:
            raise RecipeError(f"line {line}: found a second document; allowed one")
        first = first and isinstance(token, yaml.StreamStartToken)
        depth += isinstance(token, _OPEN)
        depth -= isinstance(token, _CLOSE)
        if depth > MAX_DEPTH:
            raise RecipeError(f"line {line}: found more than {MAX_DEPTH} levels; allowed at most {MAX_DEPTH}")


def _tokens(text: str) -> Iterator[Any]:
    try:
        yield from yaml.scan(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_yaml_message(error)) from error


def _yaml_message(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return f"{where}found broken YAML: {quoted(problem or str(error).splitlines()[0])}; allowed YAML 1.1"


class _Loader(yaml.SafeLoader):
    """Timestamps stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(node: yaml.MappingNode, path: str, errors: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
            what = "a merge key (<<)" if key_node.tag.endswith(":merge") else f"the key {quoted(key_node.value)}"
            errors.append(f"line {line}: found {what}; allowed keys that are text")
            continue
        key = key_node.value
        if problem := _key_problem(key):
            errors.append(f"line {line}: {problem}")
            continue
        full = f"{path}{key}"
        if key in result:
            errors.append(f"{full}: found twice, again on line {line}; allowed once")
        result[key] = _value(value_node, full, errors)
    return result


def _key_problem(key: str) -> str | None:
    """Keys are printed as they are, so they are checked before anything below them is."""
    if len(key) > MAX_KEY:
        return f"found a key of {len(key):,} characters; allowed at most {MAX_KEY}"
    if bad := control_characters(key.replace("\t", "\0")):
        return f"found the control character {bad} in a key; allowed printable text"
    return f"found the key {quoted(key)}; allowed no interpolations ('${{')" if "${" in key else None


def _value(node: yaml.Node, path: str, errors: list[str]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, f"{path}.", errors)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, f"{path}[{index}]", errors) for index, item in enumerate(node.value)]
    return _scalar(node, path, errors)


def _scalar(node: yaml.Node, path: str, errors: list[str]) -> Any:
    text, kind = node.value, node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
    if kind in ("int", "float"):
        return _number(text, kind, path, errors)
    return _string(text, path, errors)


def _number(text: str, kind: str, path: str, errors: list[str]) -> int | float | None:
    plain = text.replace("_", "")
    if sum(character.isdigit() for character in plain) > MAX_DIGITS:
        errors.append(f"{path}: found a number of more than {MAX_DIGITS} digits; allowed at most {MAX_DIGITS}")
    elif kind == "int" and re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", plain):
        return int(plain)
    elif kind == "float" and re.fullmatch(r"[+-]?[0-9]*\.[0-9]*([eE][+-]?[0-9]{1,2})?", plain):
        return float(plain)
    else:
        errors.append(f"{path}: found {quoted(text)}; allowed a decimal number, or quotes around text")
    return None


def _string(text: str, path: str, errors: list[str]) -> str:
    if bad := control_characters(text.replace("\n", " ")):
        errors.append(f"{path}: found the control character {bad}; allowed printable text")
    if "${" in text:
        errors.append(f"{path}: found {quoted(text)}; allowed plain values, a recipe has no interpolations ('${{')")
    return text
