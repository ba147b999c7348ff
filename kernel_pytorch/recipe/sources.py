"""Where recipes are: shipped, in named folders, in installed packages, or one file named by its path.

Only a shipped recipe has a bare name; everything else is `namespace/name`, so that nobody can shadow a shipped one.
Nothing here imports a third party's code: an installed package is located, not imported.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.paths import data_folder

VARIABLE = "KERNEL_PYTORCH_RECIPES"
ENTRY_POINTS = "kernel_pytorch.recipes"
SUFFIXES = (".yaml", ".yml")
# Folders of recipes that were named by a path, as Hydra knows them; no user's namespace can start like this.
FILE_NAMESPACE = "_file_"

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# Hydra's grammar or YAML 1.1 reads these as values, not as names.
_VALUE_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"})


def name_problem(name: str) -> str | None:
    """Why `name` cannot be the name of a recipe or of a namespace; None when it can."""
    if name.lower() in _VALUE_WORDS:
        return f"found {name!r}, which YAML and Hydra read as a value; allowed another name"
    if not _NAME.fullmatch(name):
        return f"found {name!r}; allowed a letter, then letters, digits, '_' and '-'"
    return None


def is_path(name: str) -> bool:
    """Whether `recipe=name` means a file, not a name."""
    return name.endswith(SUFFIXES)


def shown(path: Path) -> str:
    """`path` for a message: relative to the working folder where it is inside it, without control characters."""
    try:
        text = str(path.relative_to(Path.cwd()))
    except ValueError:
        text = str(path)
    return text if text.isprintable() else repr(text)[1:-1]


@dataclass(frozen=True)
class RecipeFile:
    """name: what `recipe=` takes (`a100_fp8`, `team/nightly`, `./mine.yaml`). namespace: empty for a shipped one."""

    name: str
    namespace: str
    path: Path

    @property
    def hydra_name(self) -> str:
        """The option of the group `recipe` that Hydra is asked for."""
        return f"{self.namespace}/{self.path.stem}" if self.namespace else self.path.stem


@dataclass(frozen=True)
class Folder:
    """One flat folder. origin: who named it, for messages. prefix: what stands before a file's stem in its name.
    problem: why it cannot be read, told when one of its recipes is asked for."""

    namespace: str
    path: Path
    origin: str
    prefix: str = ""
    problem: str | None = None

    @property
    def listed(self) -> bool:
        return not self.namespace.startswith(FILE_NAMESPACE)

    def file(self, path: Path) -> RecipeFile:
        name = f"{self.prefix}{path.name}" if not self.listed else f"{self.prefix}{path.stem}"
        return RecipeFile(name, self.namespace, path)

    def files(self) -> list[RecipeFile]:
        paths = [p for p in self.path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".") and not p.is_dir()]
        return [self.file(path) for path in sorted(paths)]

    def lookup(self, stem: str) -> RecipeFile | None:
        found = [path for suffix in SUFFIXES if os.path.lexists(path := self.path / f"{stem}{suffix}")]
        if len(found) > 1:
            raise RecipeError(f"recipe {self.prefix}{stem}: found twice, {shown(found[0])} and {shown(found[1])}; allowed one file a name")
        return self.file(found[0]) if found else None


@dataclass(frozen=True)
class RecipeSources:
    """All folders in which recipes are looked for; the shipped one comes first and has no namespace."""

    folders: tuple[Folder, ...]

    @classmethod
    def from_environment(cls, extra: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> RecipeSources:
        """Shipped recipes, KERNEL_PYTORCH_RECIPES, `extra` strings `namespace=folder`, and installed packages."""
        shipped = Folder("", data_folder("recipes"), "kernel_pytorch")
        folders = [shipped]
        folders += [_named(text, VARIABLE) for text in environ.get(VARIABLE, "").split(os.pathsep) if text]
        folders += [_named(text, "--recipes") for text in extra]
        folders += [_installed(point) for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)]
        unique: dict[str, Folder] = {}
        for folder in folders:
            other = unique.setdefault(folder.namespace, folder)
            if other is not folder and other.path.resolve() != folder.path.resolve():
                raise RecipeError(
                    f"recipe namespace {folder.namespace!r}: found twice, {other.path} ({other.origin}) and"
                    f" {folder.path} ({folder.origin}); allowed one folder a namespace"
                )
        for namespace in unique:
            if namespace and (file := shipped.lookup(namespace)):
                raise RecipeError(
                    f"recipe namespace {namespace!r} ({unique[namespace].origin}): found twice, it is also the shipped recipe"
                    f" {shown(file.path)}; allowed another name"
                )
        return cls(tuple(unique.values()))

    def with_file(self, name: str) -> RecipeSources:
        """These sources, and the folder of the recipe file at the path `name`, whose recipes are not listed."""
        folder = self._at(name)
        return self if folder in self.folders else replace(self, folders=(*self.folders, folder))

    def all(self) -> list[RecipeFile]:
        """Every recipe file of every folder that is listed; the files are not opened."""
        return [file for folder in self.folders if folder.listed and folder.problem is None for file in folder.files()]

    def find(self, name: str) -> RecipeFile:
        """The file of a recipe name or path. Raises RecipeError with the nearest name."""
        if is_path(name):
            folder = self._at(name)
            if problem := name_problem(Path(name).stem):
                raise RecipeError(f"recipe: found {name!r}: file name: {problem}")
            if not os.path.lexists(folder.path / Path(name).name):
                raise RecipeError(f"recipe: found {name!r}, and there is no such file{self._nearest(name)}")
            return folder.file(folder.path / Path(name).name)
        namespace, _, stem = name.rpartition("/")
        folder = next((folder for folder in self.folders if folder.namespace == namespace), None)
        if folder is not None and folder.problem is not None:
            raise RecipeError(f"recipe {name}: {folder.problem}")
        file = folder.lookup(stem) if folder and name_problem(stem) is None else None
        if file is None:
            raise RecipeError(f"recipe: found {name!r}; allowed {self._allowed(namespace)}{self._nearest(name)}")
        return file

    def parent(self, child: RecipeFile, entry: str) -> RecipeFile:
        """The recipe that `entry` of the child's defaults list names: `/recipe/NAME` anywhere, a bare name in the same folder."""
        if entry.startswith("/recipe/"):
            return self.find(entry[len("/recipe/") :])
        folder = next(folder for folder in (*self.folders, *self._path_folder(child)) if folder.namespace == child.namespace)
        file = folder.lookup(entry)
        if file is None:
            there = [file.path.stem for file in folder.files() if file.path != child.path]
            hint = _did_you_mean(entry, there)
            if not hint and child.namespace and entry in {other.path.stem for other in self.folders[0].files()}:
                hint = f" (the shipped one is written /recipe/{entry})"
            raise RecipeError(f"parent recipe {entry!r}: no such file in {shown(folder.path)}{hint}")
        return file

    def folder_of(self, file: RecipeFile) -> Path:
        """The folder that `file` may not lead out of."""
        return next((folder.path for folder in self.folders if folder.namespace == file.namespace), file.path.parent)

    def _at(self, name: str) -> Folder:
        """The folder that holds the file at the path `name`: one of these, so that the file keeps its name, or one of its own."""
        folder = _folder_of(name)
        return next((known for known in self.folders if known.path.resolve() == folder.path.resolve()), folder)

    def _path_folder(self, child: RecipeFile) -> list[Folder]:
        return [_folder_of(child.name)] if child.namespace.startswith(FILE_NAMESPACE) else []

    def _allowed(self, namespace: str) -> str:
        names = [file.name for file in self.all() if file.namespace == namespace] or [file.name for file in self.all()]
        return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")

    def _nearest(self, name: str) -> str:
        return _did_you_mean(name, [file.name for file in self.all()])


def _did_you_mean(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _folder_of(name: str) -> Folder:
    """The folder of a recipe named by its path; its namespace is a hash, the same in every process."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    key = hashlib.sha256(str(path.parent).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return Folder(FILE_NAMESPACE + key, path.parent, name, prefix=name[: -len(path.name)])


def _named(text: str, origin: str) -> Folder:
    namespace, equals, folder = text.partition("=")
    if not equals or not folder:
        raise RecipeError(f"{origin}: found {text!r}; allowed NAMESPACE=FOLDER, such as team={text}")
    if problem := name_problem(namespace):
        raise RecipeError(f"{origin}: namespace: {problem}")
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    if not path.is_dir():
        raise RecipeError(f"{origin}: {namespace}: found {folder!r}; allowed a folder that exists")
    return Folder(namespace, path, origin, prefix=f"{namespace}/")


def _installed(point: EntryPoint) -> Folder:
    """The folder of an installed package: its `recipes/` where it has one, else the package's own."""
    distribution = point.dist.name if point.dist else point.value
    origin = f"package {distribution}"
    top, *rest = point.module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:
        spec = None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(roots[0], *rest) if roots else Path(top)
    if (folder / "recipes").is_dir():
        folder = folder / "recipes"
    problem = name_problem(point.name)
    if problem is None and not folder.is_dir():
        problem = f"{origin} names {point.value!r}, which has no folder on this machine"
    return Folder(point.name, folder, origin, prefix=f"{point.name}/", problem=problem)
