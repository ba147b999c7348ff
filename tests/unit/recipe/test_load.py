from __future__ import annotations

import subprocess
import sys

import pytest

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.canonical import from_dict, to_dict
from kernel_pytorch.recipe.load import catalogue, load_recipe
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.schema import RootConfig


def test_a_shipped_recipe() -> None:
    recipe = load_recipe("a100_fp8")
    assert (recipe.name, recipe.chain, recipe.path.name) == ("a100_fp8", ("a100_fp8",), "a100_fp8.yaml")
    assert recipe.description == "FP8 weights, bf16 math (A100 has no FP8 matmul)"
    assert recipe.choices == {
        "backend": "auto",
        "attention": "none",
        "fusion": "none",
        "precision": "fp8_weight_only",
        "memory": "none",
        "compile": "max_autotune",
        "graph": "auto",
        "model": "minilm",
        "data": "auto",
        "verify": "default",
        "measure": "default",
    }
    assert recipe.config.precision.weight.format == "float8_e4m3fn"
    assert recipe.sweep == {}


def test_every_shipped_recipe_is_good_and_named_after_its_file() -> None:
    entries = [entry for entry in catalogue(RecipeSources.from_environment(environ={})) if "/" not in entry.name]
    assert [entry.errors for entry in entries] == [()] * len(entries)
    assert [entry.recipe.config.info.name for entry in entries] == [entry.name for entry in entries]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"precison": {}}, ["precison: found an unknown key"]),
        ({"precision": {"weight": {"fromat": "int8"}}, "seed": -1}, ["precision.weight.fromat: found an unknown key", "seed: found -1"]),
        ({"measure": {"num_rounds": "x"}, "graph": 3}, ["measure.num_rounds: found 'x'", "graph: found 3; allowed a mapping"]),
        ({"precision": {"activation": {"mode": "dynamic"}}}, ["precision: activation.mode=dynamic contradicts activation.format=null"]),
    ],
)
def test_from_dict_tells_all_mistakes(data: dict, lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert len(caught.value.lines) == len(lines)
    assert all(line.startswith(start) for line, start in zip(caught.value.lines, lines, strict=True))


def test_to_dict_holds_json_types_only() -> None:
    data = to_dict(RootConfig())
    assert data["backend"] == {"_target_": None, "hardware": "any", "on_mismatch": "emulate"}
    assert type(data["backend"]["on_mismatch"]) is str
    assert from_dict(data) == RootConfig()
    assert from_dict({}) == RootConfig()


def test_no_torch() -> None:
    code = (
        "import sys; from kernel_pytorch.recipe import compose, load; load.catalogue(); compose.compose(['recipe=cpu_int8']);"
        " print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'numpy', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
