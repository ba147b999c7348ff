from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.recipe.load import catalogue, load_recipe
from kernel_pytorch.recipe.sources import RecipeSources

EMPTY = "info: {name: x}\n"


def folder_with(root: Path, name: str, *recipes: str) -> Path:
    path = root / name
    path.mkdir()
    for recipe in recipes:
        (path / f"{recipe}.yaml").write_text(EMPTY)
    return path


def test_shipped_recipes_have_bare_names() -> None:
    names = [file.name for file in RecipeSources.from_environment(environ={}).all()]
    assert set(names) >= {"a100_fp8", "cpu_fp32_compile", "cpu_int8", "eager", "h100_bf16", "h100_fp8"}
    assert not [name for name in names if "/" in name]


def test_folders_come_from_the_variable_and_from_the_command_line(tmp_path: Path) -> None:
    a, b, c = (folder_with(tmp_path, name, "nightly") for name in "abc")
    sources = RecipeSources.from_environment([f"c={c}"], environ={"KERNEL_PYTORCH_RECIPES": f"team={a}:other={b}"})
    found = {file.name: (file.namespace, file.path) for file in sources.all() if file.namespace}
    assert found == {
        "team/nightly": ("team", a / "nightly.yaml"),
        "other/nightly": ("other", b / "nightly.yaml"),
        "c/nightly": ("c", c / "nightly.yaml"),
    }
    assert sources.find("other/nightly").path == b / "nightly.yaml"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{a}", "--recipes: found '{a}'; allowed NAMESPACE=FOLDER"),
        ("team=", "--recipes: found 'team='; allowed NAMESPACE=FOLDER"),
        ("team={a}/missing", "--recipes: team: found '{a}/missing'; allowed a folder that exists"),
        ("../x={a}", "--recipes: namespace: found '../x'; allowed a letter, then letters, digits, '_' and '-'"),
        ("_file_0={a}", "--recipes: namespace: found '_file_0'"),
        ("off={a}", "--recipes: namespace: found 'off', which YAML and Hydra read as a value"),
        ("cpu_int8={a}", "recipe namespace 'cpu_int8' (--recipes): found twice, it is also the shipped recipe"),
        ("other={a}", "recipe namespace 'other': found twice, {b} (KERNEL_PYTORCH_RECIPES) and {a} (--recipes)"),
    ],
)
def test_a_bad_source_is_named(tmp_path: Path, extra: str, message: str) -> None:
    a, b = folder_with(tmp_path, "a", "x"), folder_with(tmp_path, "b", "x")
    with pytest.raises(RecipeError) as caught:
        RecipeSources.from_environment([extra.format(a=a)], environ={"KERNEL_PYTORCH_RECIPES": f"other={b}"})
    assert message.format(a=a, b=b) in str(caught.value)


def test_the_same_folder_twice_is_one_source(tmp_path: Path) -> None:
    a = folder_with(tmp_path, "a", "x")
    sources = RecipeSources.from_environment([f"team={a}"], environ={"KERNEL_PYTORCH_RECIPES": f"team={a}/../a"})
    assert [file.name for file in sources.all() if file.namespace] == ["team/x"]


def test_a_name_found_twice_in_a_folder_names_both(tmp_path: Path) -> None:
    a = folder_with(tmp_path, "a", "x")
    (a / "x.yml").write_text(EMPTY)
    sources = RecipeSources.from_environment([f"team={a}"], environ={})
    with pytest.raises(RecipeError, match=r"recipe team/x: found twice, .*x\.yaml and .*x\.yml; allowed one file a name"):
        sources.find("team/x")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cpu_int9", "'cpu_int8'"),
        ("team/nighly", "'team/nightly'"),
        ("./team/nighly.yaml", "'team/nightly'"),
        ("tem/nightly", "'team/nightly'"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(tmp_path: Path, name: str, nearest: str) -> None:
    sources = RecipeSources.from_environment([f"team={folder_with(tmp_path, 'team', 'nightly')}"], environ={})
    with pytest.raises(RecipeError) as caught:
        sources.find(name)
    assert f"found {name!r}" in str(caught.value)
    assert f"(did you mean {nearest}?)" in str(caught.value)


@pytest.mark.parametrize("name", ["../cpu_int8", "/etc/passwd", "team/../x", "", "/", "team/", "a b", "\x1b[31m"])
def test_a_name_is_not_a_way_out(tmp_path: Path, name: str) -> None:
    sources = RecipeSources.from_environment([f"team={folder_with(tmp_path, 'team', 'x')}"], environ={})
    with pytest.raises(RecipeError) as caught:
        sources.find(name)
    assert f"recipe: found {name!r}" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_file_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = folder_with(tmp_path, "a", "mine", "base")
    monkeypatch.chdir(a)
    (a / "mine.yaml").write_text("defaults: [base, _self_]\nmeasure: {num_rounds: 30}\n")
    recipe = load_recipe("./mine.yaml")
    assert recipe.chain == ("./mine.yaml", "./base.yaml")
    assert recipe.config.measure.num_rounds == 30
    assert load_recipe(str(a / "mine.yaml")).digest == recipe.digest
    assert "mine" not in str([entry.name for entry in catalogue()])


def test_the_path_of_a_known_recipe_is_that_recipe() -> None:
    sources = RecipeSources.from_environment(environ={})
    assert sources.find(str(sources.find("cpu_int8").path)).name == "cpu_int8"


def install(root: Path, name: str, entry: str, files: dict[str, str]) -> None:
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kernel_pytorch.recipes]\n{entry}\n")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_an_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    install(tmp_path, "acme", "acme = acme_recipes", {"acme_recipes/__init__.py": ran, "acme_recipes/recipes/fast.yaml": EMPTY})
    install(tmp_path, "plain", "plain = plain_recipes", {"plain_recipes/__init__.py": ran, "plain_recipes/slow.yaml": EMPTY})
    install(tmp_path, "broken", "broken = no_such_package_here", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = RecipeSources.from_environment(environ={})
    assert [file.name for file in sources.all() if file.namespace] == ["acme/fast", "plain/slow"]
    assert load_recipe("acme/fast", sources).config.info.name == "x"
    assert "acme_recipes" not in sys.modules
    assert list(tmp_path.rglob("ran")) == []
    with pytest.raises(RecipeError, match="recipe broken/x: package broken names 'no_such_package_here', which has no folder"):
        sources.find("broken/x")
    assert [entry.name for entry in catalogue(sources) if entry.errors] == ["broken/*"]
