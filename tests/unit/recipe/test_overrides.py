"""Every mistake of a command line is one line in our words, on either line of Hydra, and all come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.recipe.compose import compose, prepare
from kernel_pytorch.recipe.overrides import TRUST_VARIABLE
from kernel_pytorch.recipe.sources import RecipeSources

BAD = {
    "precision=fp9": ("precision: found 'fp9'; allowed bf16, fp16,", "did you mean"),
    "precison=bf16": ("precison: found an unknown group or key; allowed recipe, backend,", "did you mean 'precision'?"),
    "+precison=bf16": ("precison: found an unknown group or key", "did you mean 'precision'?"),
    "++precison=bf16": ("precison: found an unknown group or key", "did you mean 'precision'?"),
    "+recip=cpu_int8": ("recip: found an unknown group or key", "did you mean 'recipe'?"),
    "foo/bar=1": ("foo/bar: found an unknown group or key",),
    "precision.min_feature=3": ("precision.min_feature: found an unknown key", "did you mean 'min_features'?"),
    "+precision.min_feature=3": ("precision.min_feature: found an unknown key", "did you mean 'min_features'?"),
    "++precision.min_feature=3": ("precision.min_feature: found an unknown key", "did you mean 'min_features'?"),
    "++precision.weight.fromat=int8": ("precision.weight.fromat: found an unknown key", "did you mean 'format'?"),
    "++precision.dtype.x=1": ("precision.dtype.x: found 'x' below precision.dtype, which holds one value; allowed no key below it",),
    "precision.min_features=abc": ("precision.min_features: found 'abc'; allowed a whole number from 1 to 65536",),
    "precision.min_features=1e3": ("precision.min_features: found 1000.0; allowed a whole number",),
    "precision.min_features=0": ("precision.min_features: found 0; allowed a whole number from 1 to 65536",),
    "precision.min_features=null": ("precision.min_features: found null; allowed a whole number",),
    "precision.min_features=???": ("precision.min_features: found '???'",),
    "precision.weight=int8": ("precision.weight: found 'int8'; allowed a mapping with format, granularity",),
    "precision.weight={fromat:int8}": ("precision.weight.fromat: found an unknown key",),
    "precision.include=abc": ("precision.include: found 'abc'; allowed a list of texts",),
    "measure.ablate=maybe": ("measure.ablate: found 'maybe'; allowed true or false",),
    "compile.mode=fast": ("compile.mode: found 'fast'; allowed default, max_autotune",),
    "backend.hardware=h101": ("backend.hardware: found 'h101'", "did you mean 'h100'?"),
    "verify.max_abs=inf": ("verify.max_abs: found inf; allowed a number of at least 0 or null",),
    "verify.max_abs=nan": ("verify.max_abs: found nan; allowed",),
    "seed=-1": ("seed: found -1; allowed a whole number from 0 to 2147483647",),
    "~precision": ("precision: found '~'; allowed KEY=VALUE (write precision=none)",),
    "~precision.dtype": ("precision.dtype: found '~'; allowed KEY=VALUE",),
    "~model": ("model: found '~'; allowed KEY=VALUE (nothing can be removed, set it instead)",),
    "~recipe": ("recipe: found '~'",),
    "+precision=bf16": ("precision: found '+'; allowed precision=VALUE without it",),
    "+precision.dtype=bfloat16": ("precision.dtype: found '+'; allowed precision.dtype=VALUE without it",),
    "precision@x=bf16": ("precision: found the package 'x'; allowed precision=VALUE",),
    "precision=null": ("precision: found null; allowed bf16",),
    "graph=off": ("graph: found 'off'; allowed auto, bucketed, none",),
    "graph=false": ("graph: found false; allowed auto, bucketed, none",),
    "precision={dtype:float16}": ("precision: found {'dtype': 'float16'}", "(a key of it is set as precision.KEY=VALUE)"),
    "precision=[bf16,fp16]": ("precision: found ['bf16', 'fp16']",),
    "precision=bf16,fp16": ("precision: found 'bf16,fp16'; allowed one value, or -m to run each",),
    "precision=glob(*)": ("precision: found", "or -m to run each"),
    "seed=range(1,3)": ("seed: found 'range(1,3)'; allowed one value, or -m to run each",),
    "sweep.precision=[bf16]": ("sweep.precision: found a key that only a recipe sets",),
    "info.name=x": ("info.name: found a key that only a recipe sets",),
    "recipe=null": ("recipe: found null; allowed the name of a recipe",),
    "recipe=true": ("recipe: found true; allowed the name of a recipe",),
    "recipe=inf": ("recipe: found inf; allowed the name of a recipe",),
    "recipe=123": ("recipe: found 123; allowed the name of a recipe",),
    "recipe=[cpu_int8,eager]": ("recipe: found ['cpu_int8', 'eager']; allowed the name of a recipe",),
    "recipe=cpu_int9": ("recipe: found 'cpu_int9'; allowed a100_fp8,", "did you mean 'cpu_int8'?"),
    "recipe=team/x": ("recipe: found 'team/x'",),
    "recipe=../recipes/cpu_int8": ("recipe: found '../recipes/cpu_int8'",),
    "recipe=./none.yaml": ("recipe: found './none.yaml', and there is no such file",),
    "recipe=cpu_int8,eager": ("recipe: found 'cpu_int8,eager'; allowed one recipe, or -m to run each",),
    "foo bar": ("found 'foo bar', which Hydra's grammar does not read",),
    "=x": ("found '=x'",),
    "precision=[": ("found 'precision=[', which Hydra's grammar does not read",),
}  # fmt: skip

UNTRUSTED = (
    "hydra.searchpath=[file:///tmp]",
    "hydra.callbacks.x._target_=pathlib.Path.touch",
    "+hydra.callbacks.x={_target_:pathlib.Path.touch}",
    "hydra.launcher._target_=os.system",
    "hydra/launcher=other",
    "hydra/callbacks=x",
    "hydra/job_logging=default",
    "hydra.job_logging.handlers.file.filename=/tmp/x",
    "hydra.job.env_set.LD_PRELOAD=x",
    "+hydra.job.env_set={LD_PRELOAD:x}",
    "hydra.job.chdir=true",
    "hydra.output_subdir=x",
    "hydra.help.template=x",
    "~hydra.run.dir",
    "hydra.run.dir=${oc.env:HOME}",
    "precision._target_=os.system",
    "++precision._target_=kernel_pytorch.precision.cast.Cast",
    "+precision._partial_=true",
    "+precision._args_=[1]",
    "+precision._recursive_=false",
    "+precision._convert_=all",
    "precision.weight={_target_:os.system}",
    "+x=[{a:{_target_:os.system}}]",
    "precision='{_target_: x}'",
    "precision.dtype=${oc.env:HOME}",
    "precision.dtype='${oc.env:HOME}'",
    "precision={${x}:1}",
    "precision.dtype=${oc.decode:a},${oc.create:b}",
)

GOOD = (
    "hydra.run.dir=out",
    "hydra.sweep.dir=out",
    "hydra.sweep.subdir=a",
    "hydra/launcher=basic",
    "hydra/sweeper=basic",
    "recipe=cpu_int8",
    "+recipe=cpu_int8",
    "++precision=bf16",
    "++precision.min_features=32",
    "precision.weight={granularity:channel}",
    "model.path='a b'",
    "precision.include=['*.q*','*.k*']",
)


def lines_of(overrides: list[str], *, multirun: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(overrides, RecipeSources.from_environment(environ={}), multirun=multirun)
    return caught.value.lines


@pytest.mark.parametrize("text", list(BAD))
def test_one_line(text: str) -> None:
    (line,) = lines_of([text])
    assert line.startswith("command line: ")
    assert "\n" not in line
    assert all(part in line for part in BAD[text]), line
    assert "+precision.min_feature" not in line


def test_all_mistakes_at_once() -> None:
    assert len(lines_of([text for text in BAD if not text.startswith("recipe=")])) == len(
        [text for text in BAD if not text.startswith("recipe=")]
    )


def test_mistakes_of_the_command_line_and_of_the_recipe_at_once(write, sources: RecipeSources) -> None:
    path = write("bad", "hydra: {}")
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=team/bad", "precision=fp9"], sources)
    assert [line.split(": found")[0] for line in caught.value.lines] == ["command line: precision", f"{path}: hydra"]


@pytest.mark.parametrize("text", UNTRUSTED)
def test_refused_without_trust(text: str) -> None:
    (line,) = lines_of([text])
    assert f"(set {TRUST_VARIABLE}=1 to allow it)" in line or "Hydra's grammar does not read" in line
    assert lines_of([text], multirun=True) == [line]


def test_the_trust_variable_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    words = ["hydra.searchpath=[file:///tmp]", "hydra.job.chdir=true", "model.path=${hydra:job.name}"]
    assert prepare(words, RecipeSources.from_environment(environ={})).hydra == tuple(words)


def test_a_target_is_never_more_than_an_allowed_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    for target in (
        "os.system",
        "kernel_pytorch.precision.cast",
        "kernel_pytorch.graph.capture.CaptureWholeCall",
        "KERNEL_PYTORCH.precision.cast.Cast",
    ):
        with pytest.raises(ConfigError, match=f"precision._target_: found '{target}'; allowed kernel_pytorch.precision.cast.Cast,"):
            compose([f"precision._target_={target}"], RecipeSources.from_environment(environ={}))


@pytest.mark.parametrize("text", GOOD)
def test_accepted(text: str) -> None:
    prepared = prepare([text], RecipeSources.from_environment(environ={}))
    assert prepared.hydra == (text.replace("++recipe", "+recipe") if "+" in text or "recipe" not in text else f"+{text}",)
    assert prepared.user == (() if text.startswith("hydra") or "recipe" in text else (text,))


def test_a_sweep_is_checked_value_by_value() -> None:
    lines = lines_of(
        ["precision=bf16,fp9,none", "measure.num_rounds=choice(3,2)", "recipe=eager,cpu_int9", "seed=range(-1,1)"], multirun=True
    )
    assert [line.split(";")[0] for line in lines] == [
        "command line: precision: found 'fp9'",
        "command line: measure.num_rounds: found 2",
        "command line: recipe: found 'cpu_int9'",
        "command line: seed: found -1",
    ]
    prepared = prepare(
        ["recipe=eager,cpu_int8", "precision=glob(*)", "seed=1,2"], RecipeSources.from_environment(environ={}), multirun=True
    )
    assert prepared.hydra == ("+recipe=eager,cpu_int8", "precision=glob(*)", "seed=1,2")


def test_a_recipe_is_named_by_a_path_with_special_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my folder (a=b), 'c'"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults: [override /precision: bf16]")
    composed = compose([f"recipe={folder}/mine.yaml"])
    assert (composed.recipe, composed.choices["precision"]) == (f"{folder}/mine.yaml", "bf16")
    assert composed.config.precision.dtype == "bfloat16"
    monkeypatch.chdir(folder)
    assert compose(["+recipe=./mine.yaml"]).recipe == "./mine.yaml"
    assert compose(["+recipe=mine.yaml"]).digest == composed.digest
