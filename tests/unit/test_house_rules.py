"""The rules that keep the house small: layers, fields that are read, options that build, exceptions that are named."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

import kernel_pytorch
from kernel_pytorch import errors, schema
from kernel_pytorch.paths import data_folder
from kernel_pytorch.targets import ENGINE_READS, TARGETS

PACKAGE = Path(kernel_pytorch.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high; a module imports from its own row or from rows above it in this list.
LAYERS = (
    ("errors", "cache", "choices", "formats", "devices", "targets", "paths"),
    ("registry",),
    ("values",),
    ("schema",),
    ("optimizer", "stance"),
    ("kernels",),
    ("backends",),
    ("attention", "fusion", "precision", "memory", "compile", "graph", "models", "verify", "measure", "report", "recipe"),
    ("engine",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SIX_GROUPS = set(schema.OPTIMIZER_GROUPS)
# Facts with no torch in them, which any layer above schema may read.
TORCH_FREE = (
    "errors",
    "cache",
    "choices",
    "formats",
    "devices",
    "targets",
    "paths",
    "registry",
    "values",
    "schema",
    "recipe",
    "report",
    "cli",
)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path, *, top_level_only: bool = False) -> list[str]:
    """Dotted names that a module imports; without those under TYPE_CHECKING."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(path)
    if own in ("__init__", "__main__"):
        return
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] != "kernel_pytorch" or len(pieces) < 2:
            continue
        other = pieces[1]
        assert RANK[other] <= RANK[own], f"{path.name} of {own} imports {name}"
        assert not (own in SIX_GROUPS and other in SIX_GROUPS and own != other), f"group {own} imports group {other}"
        if own == "recipe":
            below = ("errors", "choices", "formats", "devices", "targets", "paths", "registry", "schema", "recipe")
            assert other in below, f"recipe imports {name}"


@pytest.mark.parametrize("name", ["kernel_pytorch", "kernel_pytorch.schema", "kernel_pytorch.cli.main", "kernel_pytorch.recipe.compose"])
def test_importing_brings_no_torch(name):
    code = f"import sys, {name}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) in TORCH_FREE], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_free_modules_import_no_torch(path):
    assert not [name for name in imported(path, top_level_only=True) if name.split(".")[0] in ("torch", "triton", "torchao")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_exceptions_are_named(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} is a bare except"
            names = {ast.unparse(item) for item in (node.type.elts if isinstance(node.type, ast.Tuple) else [node.type])}
            assert not names & {"Exception", "BaseException"}, f"{path}:{node.lineno} catches {names}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_classes_stay_small(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 300, node.name


def test_no_unfinished_work():
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error(")
    found = [f"{path}: {word}" for path in MODULES for word in words if word in path.read_text(encoding="utf-8")]
    assert found == []


def test_one_exception_hierarchy():
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, BaseException)]
    assert len(classes) <= 25
    assert all(issubclass(value, errors.KernelPyTorchError) for value in classes)
    defined_elsewhere = [
        f"{path}:{node.name}"
        for path in MODULES
        if part(path) != "errors"
        for node in ast.walk(tree(path))
        # A private one is control flow that never leaves its module.
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    ]
    assert defined_elsewhere == []


@pytest.mark.parametrize(
    "name", sorted(name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__)
)
def test_every_exception_is_raised_or_a_base_of_one_that_is(name):
    used = any(
        isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name for path in MODULES for node in ast.walk(tree(path))
    )
    has_children = bool(getattr(errors, name).__subclasses__())
    assert used or has_children, f"{name} is never raised"


def schema_fields(cls: type, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, field name) of every field below a config class."""
    found = []
    for item in fields(cls):
        kind = schema.__dict__.get(str(item.type).split("[")[-1].rstrip("]"), item.type)
        key = f"{prefix}{item.name}"
        if is_dataclass(kind):
            found.extend(schema_fields(kind, f"{key}."))
        else:
            found.append((key, item.name))
    return found


@pytest.mark.parametrize(("key", "name"), schema_fields(schema.RootConfig), ids=lambda value: value)
def test_every_field_is_read_somewhere(key, name):
    """As `.name` or as a constructor's keyword outside the schema and the tables of names."""
    if name == "_target_" or key.startswith("info.proven_on"):
        return
    for path in MODULES:
        if part(path) in ("schema", "targets"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load):
                return
            if isinstance(node, ast.arg) and node.arg == name:
                return
            if isinstance(node, ast.Constant) and node.value == name:
                return
    pytest.fail(f"nothing reads {key}")


@pytest.mark.parametrize("target", TARGETS)
def test_targets_take_what_the_table_says(target):
    module, _, name = target.rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    assert f"{cls.__module__}.{cls.__qualname__}" == target
    assert tuple(inspect.signature(cls).parameters) == TARGETS[target].reads
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    group_class = type(getattr(schema.RootConfig(), TARGETS[target].group))
    assert set(TARGETS[target].reads) <= {item.name for item in fields(group_class)}


OPTIONS = sorted(
    (group, path.stem) for group in (*schema.RECIPE_GROUPS, *schema.RUN_GROUPS) for path in Path(data_folder("conf"), group).glob("*.yaml")
)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_names_a_registered_target_and_fields_it_reads(group, option):
    node = yaml.safe_load(Path(data_folder("conf"), group, f"{option}.yaml").read_text(encoding="utf-8"))
    known = {item.name for item in fields(type(getattr(schema.RootConfig(), group)))}
    assert set(node) <= known
    target = node.get("_target_")
    if target is not None:
        assert TARGETS[target].group == group
        assert set(node) - {"_target_"} <= {*TARGETS[target].reads, *ENGINE_READS.get(group, ())}
