# ruff: noqa: E501  (one row a case)
"""Parents, and the gates that a recipe may only tighten."""

from __future__ import annotations

import pytest

from kernel_pytorch.errors import RecipeError
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.recipe.load import load_recipe
from kernel_pytorch.recipe.sources import RecipeSources


def test_four_levels_and_the_command_line(write, sources: RecipeSources) -> None:
    write(
        "a",
        "defaults: [override /precision: bf16, override /compile: default]\ngraph: {}\nmeasure: {num_rounds: 30}\nverify: {sqnr_db: 20}\n",
    )
    write("b", "defaults: [a, override /precision: int8_dynamic]\nprecision: {min_features: 32}\nmeasure: {num_rounds: 40}\n")
    write("c", "defaults: [b, _self_]\nprecision: {min_features: 48}\nmeasure: {num_rounds: 50}\n")
    write("d", "defaults: [/recipe/team/c, override /precision: int8_weight_only]\nmeasure: {num_rounds: 60}\n")
    recipe = load_recipe("team/d", sources)
    assert recipe.chain == ("team/d", "team/c", "team/b", "team/a")
    assert (recipe.choices["precision"], recipe.choices["compile"]) == ("int8_weight_only", "default")
    assert (recipe.config.precision.min_features, recipe.config.measure.num_rounds, recipe.config.verify.sqnr_db) == (48, 60, 20.0)
    composed = compose(["precision=int8_dynamic", "+recipe=team/d", "measure.num_rounds=3"], sources)
    assert composed.config.measure.num_rounds == 3
    assert composed.config.precision.activation.mode.value == "dynamic"
    assert composed.config.precision.min_features == 48
    assert (composed.recipe, composed.chain, composed.digest) == ("team/d", recipe.chain, recipe.digest)


def test_info_is_not_inherited(write, sources: RecipeSources) -> None:
    write("base", "info: {name: base, description: of base, hardware: [cpu]}")
    write("child", "defaults: [base]\ninfo: {description: of child}")
    for config in (load_recipe("team/child", sources).config, compose(["+recipe=team/child"], sources).config):
        assert (config.info.name, config.info.description, config.info.hardware) == ("", "of child", [])


def test_a_cycle_names_its_members(write, sources: RecipeSources) -> None:
    write("a", "defaults: [b]")
    write("b", "defaults: [c]")
    write("c", "defaults: [/recipe/team/a]")
    with pytest.raises(
        RecipeError, match=r"c\.yaml: defaults: found a cycle, team/a -> team/b -> team/c -> team/a; allowed parents that end"
    ):
        load_recipe("team/a", sources)


def test_too_many_parents(write, sources: RecipeSources) -> None:
    for index in range(20):
        write(f"r{index}", f"defaults: [r{index + 1}]")
    with pytest.raises(RecipeError, match=r"r16\.yaml: defaults: found more than 16 parents; allowed at most 16"):
        load_recipe("team/r0", sources)


def test_a_mistake_in_a_parent_names_the_parent(write, sources: RecipeSources) -> None:
    write("base", "hydra: {}")
    write("child", "defaults: [base]")
    with pytest.raises(RecipeError, match=r"base\.yaml: hydra: found this key"):
        load_recipe("team/child", sources)


BASE = """
defaults: [override /precision: int8_dynamic, override /verify: strict]
verify: {cosine_min: 0.99, max_abs: 1}
measure: {min_speedup: 1.5, max_memory_ratio: 0.5, ablate: true}
precision: {quality: {cosine_min: 0.995}}
"""

LOOSE = {
    "cosine": ("verify: {cosine_min: 0.98}", "verify.cosine_min: found 0.98; allowed at least 0.99: a recipe may only tighten it"),
    "null": ("verify: {cosine_min: null}", "verify.cosine_min: found null; allowed at least 0.99"),
    "max_abs": ("verify: {max_abs: 2}", "verify.max_abs: found 2.0; allowed at most 1.0"),
    "max_abs null": ("verify: {max_abs: null}", "verify.max_abs: found null; allowed at most 1.0"),
    "budget of the parent's option": ("verify: {budget: 1.8}", "verify.budget: found 1.8; allowed at most 1.5"),
    "rows of the parent's option": ("verify: {num_rows: 300}", "verify.num_rows: found 300; allowed at least 512"),
    "option": ("defaults: [base, override /verify: default]", "defaults: override /verify: default: verify.num_rows: found 256; allowed at least 512"),
    "quick": ("defaults: [base, override /measure: quick]", "defaults: override /measure: quick: measure.num_rounds: found 7; allowed at least 20"),
    "speedup": ("measure: {min_speedup: 1.2}", "measure.min_speedup: found 1.2; allowed at least 1.5"),
    "memory": ("measure: {max_memory_ratio: 0.6}", "measure.max_memory_ratio: found 0.6; allowed at most 0.5"),
    "ablate": ("measure: {ablate: false}", "measure.ablate: found false; allowed true"),
    "rounds": ("measure: {num_rounds: 19}", "measure.num_rounds: found 19; allowed at least 20"),
    "round length": ("measure: {min_round_ms: 1}", "measure.min_round_ms: found 1.0; allowed at least 50.0"),
    "gain": ("measure: {require_gain: false}", "measure.require_gain: found false; allowed true"),
    "verify enabled": ("verify: {enabled: false}", "verify.enabled: found false; allowed true"),
    "measure enabled": ("measure: {enabled: false}", "measure.enabled: found false; allowed true"),
    "floor of the parent": ("precision: {quality: {cosine_min: 0.992}}", "precision.quality.cosine_min: found 0.992; allowed at least 0.995"),
    "floor of the option": ("precision: {quality: {sqnr_db: 17}}", "precision.quality.sqnr_db: found 17.0; allowed at least 18"),
    "floor null": ("precision: {quality: {sqnr_db: null}}", "precision.quality.sqnr_db: found null; allowed at least 18"),
    "floor of another option": (
        "defaults: [base, override /precision: bf16]\nprecision: {quality: {cosine_min: 0.996}}",
        "precision.quality.cosine_min: found 0.996; allowed at least 0.999",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(LOOSE))
def test_a_recipe_loosens_nothing(case: str, write, sources: RecipeSources) -> None:
    text, message = LOOSE[case]
    write("base", BASE)
    path = write("child", text if "defaults" in text else f"defaults: [base]\n{text}")
    with pytest.raises(RecipeError) as caught:
        load_recipe("team/child", sources)
    assert any(line.startswith(f"{path}: {message}") for line in caught.value.lines), caught.value.lines


def test_a_recipe_tightens(write, sources: RecipeSources) -> None:
    write("base", BASE)
    write(
        "child",
        "defaults: [base, override /precision: bf16]\nverify: {cosine_min: 0.9999, budget: 1.2, num_rows: 1024, max_abs: 0.1, top1_agreement: 1}\n"
        "measure: {min_speedup: 2, max_memory_ratio: 0.4, num_rounds: 100}\nprecision: {quality: {cosine_min: 0.9995}}",
    )
    config = load_recipe("team/child", sources).config
    assert (config.verify.budget, config.verify.max_abs, config.precision.quality.cosine_min) == (1.2, 0.1, 0.9995)


def test_a_parents_floor_does_not_lower_another_schemes(write, sources: RecipeSources) -> None:
    write("base", BASE)
    write("child", "defaults: [base, override /precision: bf16]")
    composed = compose(["+recipe=team/child"], sources)
    assert composed.config.precision.quality.cosine_min == 0.999
    assert composed.ignored == {"precision": ["quality.cosine_min"]}
    assert composed.config == load_recipe("team/child", sources).config


def test_the_command_line_may_loosen(write, sources: RecipeSources) -> None:
    write("base", BASE)
    composed = compose(["recipe=team/base", "verify.cosine_min=0.5", "measure=quick", "measure.ablate=false"], sources)
    assert (composed.config.verify.cosine_min, composed.config.measure.num_rounds, composed.config.measure.ablate) == (0.5, 7, False)
