# ruff: noqa: E501  (one row a case)
"""A digest says what a recipe means: golden values for the shipped recipes, equal on both lines of Hydra."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kernel_pytorch.recipe.canonical import from_dict, to_dict
from kernel_pytorch.recipe.compose import compose
from kernel_pytorch.recipe.digest import digest
from kernel_pytorch.recipe.load import load_recipe
from kernel_pytorch.recipe.sources import RecipeSources
from kernel_pytorch.schema import RootConfig

GOLDEN = json.loads(Path(__file__).with_name("digests.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden(name: str, sources: RecipeSources) -> None:
    assert load_recipe(name, sources).digest == GOLDEN[name]
    composed = compose([f"recipe={name}"], sources)
    assert (composed.digest, composed.effective_digest) == (GOLDEN[name], GOLDEN[name])


def test_only_meaning_counts(write, sources: RecipeSources) -> None:
    write("a", "defaults: [override /precision: int8_dynamic]\nprecision: {quality: {sqnr_db: 40}}\n")
    write("b", "# said otherwise\ndefaults:\n- override /precision: int8_dynamic\n- _self_\nprecision:\n  quality:\n    sqnr_db: 40.0\n  min_features: 16\n"
          "info: {name: b}\nverify: {cosine_min: 0.9}\nsweep: {compile: [none]}\n")  # fmt: skip
    write("c", "defaults: [a]\nprecision: {min_features: 17}")
    a, b, c = (load_recipe(f"team/{name}", sources).digest for name in "abc")
    assert a == b
    assert a != c


def test_what_is_ignored_does_not_count(write, sources: RecipeSources) -> None:
    write("base", "defaults: [override /precision: int8_dynamic]\nprecision: {min_features: 64}")
    assert (
        compose(["recipe=team/base", "precision=bf16"], sources).effective_digest == compose(["precision=bf16"], sources).effective_digest
    )


def test_the_run_groups_do_not_count(sources: RecipeSources) -> None:
    words = ["recipe=cpu_int8", "model=decoder", "data.batch=3", "verify=strict", "measure=quick", "seed=7"]
    assert compose(words, sources).effective_digest == GOLDEN["cpu_int8"]


@pytest.mark.parametrize("name", list(GOLDEN))
def test_a_config_survives_json(name: str, sources: RecipeSources) -> None:
    config = load_recipe(name, sources).config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_config_without_a_setting_is_the_schema_version_alone() -> None:
    assert digest(RootConfig()) == hashlib.sha256(b'{"schema_version":1}').hexdigest() == GOLDEN["eager"]
