from __future__ import annotations

import pytest

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import compose, prepare
from kernel_pytorch.recipe.load import load_recipe
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.recipe.sweep import sweep_overrides

BLOCK = "sweep: {precision: [bf16, none], graph.min_speedup: [1, 1.5], compile.dynamic: [null, true]}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["precision=bf16,none", "graph.min_speedup=1,1.5", "compile.dynamic=null,true"]),
        (["precision=fp16"], ["graph.min_speedup=1,1.5", "compile.dynamic=null,true"]),
        (["precision=fp16,fp32", "graph.min_speedup=2"], ["compile.dynamic=null,true"]),
        (["precision.dtype=float16"], ["precision=bf16,none", "graph.min_speedup=1,1.5", "compile.dynamic=null,true"]),
    ],
)
def test_the_command_line_replaces_key_by_key(words: list[str], expected: list[str], write, sources: RecipeSources) -> None:
    write("swept", BLOCK)
    assert sweep_overrides(["recipe=team/swept", *words], sources) == expected
    assert prepare(["recipe=team/swept", *words], sources, multirun=True).hydra == ("+recipe=team/swept", *words, *expected)


def test_a_child_replaces_its_parents_lists(write, sources: RecipeSources) -> None:
    write("swept", BLOCK)
    write("child", "defaults: [swept]\nsweep: {precision: [tf32]}")
    assert sweep_overrides(["recipe=team/child"], sources)[0] == "precision=tf32"
    assert load_recipe("team/child", sources).sweep == {
        "precision": ["tf32"],
        "graph.min_speedup": ["1", "1.5"],
        "compile.dynamic": ["null", "true"],
    }


def test_a_block_is_ignored_in_a_single_run(write, sources: RecipeSources) -> None:
    write("swept", BLOCK)
    composed = compose(["recipe=team/swept"], sources)
    assert composed.choices["precision"] == "none"
    assert composed.config.sweep["precision"] == ["bf16", "none"]
    assert composed.digest == load_recipe("eager", sources).digest


def test_several_recipes_with_a_block(write, sources: RecipeSources) -> None:
    write("swept", BLOCK)
    with pytest.raises(
        ConfigError, match="recipe: found team/swept, eager under -m, and 'team/swept' has a sweep block of its own; allowed one recipe"
    ):
        sweep_overrides(["recipe=team/swept,eager"], sources)
    words = ["recipe=team/swept,eager", "precision=bf16", "graph.min_speedup=1", "compile.dynamic=null"]
    assert sweep_overrides(words, sources) == []


@pytest.mark.parametrize(
    "text", ["a", "a b", "it's", "a,b", "x'", "back\\slash", "tail\\", "[a]", "{b}", "$x", "choice(1,2)", "a=b", "", "1", "true"]
)
def test_text_stays_one_value(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from kernel_pytorch.recipe.sweep import _word

    parsed = OverridesParser.create().parse_override(f"k={_word(text)},{_word(text)}")
    words = list(parsed.sweep_string_iterator())
    assert len(words) == 2
    value = OverridesParser.create().parse_override(f"k={words[0]}").value()
    assert value == text if text not in ("1", "true") else str(value).lower() == text
