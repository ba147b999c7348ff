"""The folder of a saved result: one JSON file of facts and one safetensors file. Reading it runs nothing that it says.

`saved.json` is written last and replaced whole, and it names the tensor file and its sha256: a save that is killed leaves the
earlier one, and what belongs to someone else in the folder stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kernel_pytorch import __version__
from kernel_pytorch.errors import ConfigError
from kernel_pytorch.report.write import write_atomically
from kernel_pytorch.schema import SCHEMA_VERSION

# Raised when a reader of an earlier version would misread what is written.
FORMAT_VERSION = 1
KIND = "kernel_pytorch saved model"
FACTS_FILE = "saved.json"
_TENSOR_FILE = re.compile(r"tensors-[0-9a-f]{16}\.safetensors")
_TEMPORARY = ".saving-"
# What a save that was killed left: its tensors, or its facts, which write_atomically names so.
_LEFT_OVER = re.compile(rf"{re.escape(_TEMPORARY)}[0-9a-f]+|\.{re.escape(FACTS_FILE)}\.[a-z0-9_]{{8}}")
# Facts of a model with 100,000 tensors take 15 MB.
_MOST_FACTS_BYTES = 2**27
_CHUNK = 2**20

# What every version of safetensors knows; other element types are written as bytes.
_PLAIN_DTYPES = {
    getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
        "float8_e4m3fn",
        "float8_e5m2",
    )
}


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TensorFacts(_Facts):
    """dtype: torch's name. stride: in elements; empty for a contiguous tensor."""

    dtype: str
    shape: list[int]
    stride: list[int] = []


class RecipeFacts(_Facts):
    """What was applied. digest: of the recipe chain alone. effective_digest: of `config`, the resolved values of the seven groups."""

    name: str | None
    digest: str
    effective_digest: str
    chain: list[str]
    overrides: list[str]
    choices: dict[str, str]
    ignored: dict[str, list[str]]
    config: dict[str, Any]
    seed: int


class ModelFacts(_Facts):
    """The model before the recipe. dtype: of most of its bytes. trained: quality decided. tensors: parameters and persistent
    buffers by name, shared ones under each name."""

    name: str
    dtype: str
    trained: bool
    tensors: dict[str, TensorFacts]


class ModuleFacts(_Facts):
    """A module that a step replaced and whose weights are gone: what the step's `portable` said of it. tensors: their names."""

    group: str
    facts: dict[str, Any]
    tensors: list[str]


class ProbeFacts(_Facts):
    """One call and what came out of it. args, kwargs: as `encode` wrote them. outputs: where each tensor of the output was.
    modules: in the order in which they were done. repeatable: a second call gave the same bits. machine: what the bits
    depend on besides."""

    args: Any
    kwargs: Any
    outputs: list[str]
    modules: list[str]
    repeatable: bool
    machine: dict[str, Any]


class FileFacts(_Facts):
    name: str
    bytes: int
    sha256: str


class Facts(_Facts):
    """aliases: further names of a tensor of the model -> the name that it is stored under. layouts: tensors of the file that
    are more than safetensors says, by their name there."""

    kind: str
    format_version: int
    schema_version: int
    kernel_pytorch: str
    recipe: RecipeFacts
    model: ModelFacts
    modules: dict[str, ModuleFacts]
    aliases: dict[str, str]
    probe: ProbeFacts
    layouts: dict[str, TensorFacts]
    file: FileFacts


@dataclass(frozen=True)
class Saved:
    """A folder that was read. tensors: on the CPU, of the mapped file: copy them before use."""

    folder: Path
    facts: Facts
    tensors: Mapping[str, torch.Tensor]

    @property
    def path(self) -> Path:
        return self.folder / FACTS_FILE

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """A copy on `device`, with the strides that it was saved with. Raises ConfigError when the file does not have it."""
        if name not in self.tensors:
            raise ConfigError(f"{self.folder / self.facts.file.name}: found no tensor {name!r}, which {FACTS_FILE} names")
        return _unpacked(self.tensors[name], self.facts.layouts.get(name), f"{self.path}: layouts.{name}").to(device)


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    recipe: RecipeFacts,
    model: ModelFacts,
    modules: dict[str, ModuleFacts],
    aliases: dict[str, str],
    probe: ProbeFacts,
    overwrite: bool,
) -> None:
    """Writes a folder; an earlier save of ours there stays whole until the new one is. Raises ConfigError with the way out."""
    packed = _packed(tensors)
    layouts = {name: describe(tensor) for name, tensor in tensors.items() if _needs_layout(tensor)}
    temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        _require_ours(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        _remove(path for path in folder.iterdir() if _LEFT_OVER.fullmatch(path.name))
        # A folder: safetensors writes to a file beside, of a name of its own, which is whole only once it is renamed.
        temporary.mkdir()
        written = temporary / "tensors"
        save_file(packed, written)
        digest = _sha256(written, flush=True)
        file = FileFacts(name=f"tensors-{digest[:16]}.safetensors", bytes=written.stat().st_size, sha256=digest)
        facts = Facts(
            kind=KIND,
            format_version=FORMAT_VERSION,
            schema_version=SCHEMA_VERSION,
            kernel_pytorch=__version__,
            recipe=recipe,
            model=model,
            modules=modules,
            aliases=aliases,
            probe=probe,
            layouts=layouts,
            file=file,
        )
        text = json.dumps(facts.model_dump(), indent=1, allow_nan=False) + "\n"
        os.replace(written, folder / file.name)
        write_atomically(folder / FACTS_FILE, text)
        # Of the earlier save, and of saves that were killed before their facts named them.
        _remove(path for path in folder.iterdir() if _TENSOR_FILE.fullmatch(path.name) and path.name != file.name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: cannot be written: {_reason(error)}") from error
    finally:
        _remove([temporary])


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def read(folder: Path) -> Saved:
    """The facts, checked, and the tensors of a saved folder. Raises ConfigError, one line a mistake."""
    path = folder / FACTS_FILE
    raw = _read_json(path)
    _check_version(path, raw)
    try:
        facts = Facts.model_validate(raw)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)[:5]]
        raise ConfigError([f"{path}: {line}; the file was changed: save again" for line in lines]) from error
    if not _TENSOR_FILE.fullmatch(facts.file.name):
        raise ConfigError(f"{path}: file.name: found {facts.file.name!r}; allowed tensors-<16 hex digits>.safetensors, in the same folder")
    tensor_file = folder / facts.file.name
    if not tensor_file.is_file():
        raise ConfigError(f"{tensor_file}: is missing; {FACTS_FILE} needs it: copy the whole folder")
    try:
        if tensor_file.stat().st_size != facts.file.bytes:
            found = f"found {tensor_file.stat().st_size:,} bytes; allowed {facts.file.bytes:,}"
            raise ConfigError(f"{tensor_file}: {found}: the file is cut short or another one; copy or save it again")
        if _sha256(tensor_file) != facts.file.sha256:
            raise ConfigError(f"{tensor_file}: found other contents than {FACTS_FILE} has the sha256 of; copy or save it again")
        tensors = load_file(tensor_file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{tensor_file}: cannot be read: {_reason(error)}") from error
    return Saved(folder, facts, tensors)


def _require_ours(folder: Path, *, overwrite: bool) -> None:
    """Raises ConfigError for a folder that is not ours to write, or holds an earlier save that may not be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: found a file; allowed a new folder")
    if not (folder / FACTS_FILE).exists():
        # A first save that was killed leaves these.
        others = [path.name for path in folder.iterdir() if not _LEFT_OVER.fullmatch(path.name) and not _TENSOR_FILE.fullmatch(path.name)]
        if others:
            raise ConfigError(f"{folder}: found {', '.join(sorted(others)[:3])}; allowed a new or empty folder, or an earlier save")
        return
    raw = _read_json(folder / FACTS_FILE)
    if raw.get("kind") != KIND:
        raise ConfigError(f"{folder / FACTS_FILE}: found a file that is not of this library; allowed a new or empty folder")
    if not overwrite:
        raise ConfigError(f"{folder}: found an earlier save; allowed a new folder, or overwrite=True")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; allowed a folder that `save` wrote")
    try:
        if path.stat().st_size > _MOST_FACTS_BYTES:
            raise ConfigError(f"{path}: found {path.stat().st_size:,} bytes; allowed {_MOST_FACTS_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: found no JSON ({str(error).splitlines()[0]}): cut short or changed; copy or save it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: found a {type(value).__name__}; allowed a JSON object that `save` wrote")
    return value


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _check_version(path: Path, raw: dict[str, Any]) -> None:
    if raw.get("kind") != KIND:
        raise ConfigError(f"{path}: kind: found {raw.get('kind')!r}; allowed {KIND!r}: the folder was not written by `save`")
    writer = f"kernel-pytorch {raw.get('kernel_pytorch')}, this is {__version__}"
    found = raw.get("format_version")
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise ConfigError(
            f"{path}: format_version: found {found!r}; allowed {FORMAT_VERSION} (written by {writer}): load it with that version"
        )
    found = raw.get("schema_version")
    if found != SCHEMA_VERSION or isinstance(found, bool):
        why = "a recipe's values mean something else there"
        raise ConfigError(
            f"{path}: schema_version: found {found!r}; allowed {SCHEMA_VERSION} (written by {writer}): {why}; optimize and save again"
        )


def _sha256(path: Path, *, flush: bool = False) -> str:
    """flush: the bytes reach the disk first."""
    digest = hashlib.sha256()
    with path.open("r+b" if flush else "rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


def describe(tensor: torch.Tensor) -> TensorFacts:
    """Element type, shape and the strides of a copy: the tensor's own where its elements fill their memory."""
    stride = [] if tensor.is_contiguous() else list(torch.empty_like(tensor, device="meta").stride())
    return TensorFacts(dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), stride=stride)


def _needs_layout(tensor: torch.Tensor) -> bool:
    return tensor.dtype not in _PLAIN_DTYPES or not tensor.is_contiguous()


def _packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU, each with memory of its own, of element types that every safetensors knows."""
    seen: set[int] = set()
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu")
        storage = plain.untyped_storage()
        if not plain.is_contiguous() or storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        packed[name] = plain if plain.dtype in _PLAIN_DTYPES else plain.reshape(-1).view(torch.uint8)
    return packed


def _unpacked(plain: torch.Tensor, layout: TensorFacts | None, where: str) -> torch.Tensor:
    """A copy of a tensor of the file in the layout that it was saved from. Raises ConfigError for one that does not fit."""
    if layout is None:
        return plain.clone()
    dtype = getattr(torch, layout.dtype, None)
    if not isinstance(dtype, torch.dtype) or not _is_dense(layout) or math.prod(layout.shape) * dtype.itemsize != plain.nbytes:
        found = f"{layout.dtype} {layout.shape} with strides {layout.stride}"
        raise ConfigError(f"{where}: found {found}, which {plain.nbytes:,} bytes are not; the file was changed: save again")
    # Bytes in the file lie at any place, and an element type is viewed at multiples of its size.
    aligned = plain.clone().reshape(-1)
    try:
        values = aligned.view(dtype).reshape(layout.shape)
        # Copied once more: torch views bytes as types that it cannot even copy, quint8 and uint4.
        return torch.empty_strided(layout.shape, layout.stride, dtype=dtype).copy_(values) if layout.stride else values.clone()
    except (RuntimeError, TypeError) as error:
        found = f"{layout.dtype} {layout.shape} with strides {layout.stride}"
        raise ConfigError(f"{where}: found {found}, which torch cannot make ({_reason(error)}); save again") from error


def _is_dense(layout: TensorFacts) -> bool:
    """Whether the elements fill their memory, each at a place of its own."""
    if min([0, *layout.shape, *layout.stride]) < 0:
        return False
    if not layout.stride or 0 in layout.shape:
        return True
    if len(layout.stride) != len(layout.shape):
        return False
    place = 1
    for step, size in sorted((step, size) for size, step in zip(layout.shape, layout.stride, strict=True) if size > 1):
        if step != place:
            return False
        place *= size
    return True
