"""Bad input: exit 2, one line a mistake with what was found and what is allowed, no traceback, nothing written."""

from __future__ import annotations

import os

import pytest

# name -> (words of the command line, number of mistakes, what the lines say)
COMMAND_LINES: dict[str, tuple[list[str], int, tuple[str, ...]]] = {
    "misspelt recipe": (["+recipe=cpu_intt"], 1, ("'cpu_intt'", "did you mean 'cpu_int8'?")),
    "misspelt recipe without plus": (["recipe=a100_fp"], 1, ("did you mean 'a100_fp8'?",)),
    "recipe of an unknown team": (["+recipe=team/nightly"], 1, ("team/nightly",)),
    "missing recipe file": (["+recipe=./mine.yaml"], 1, ("./mine.yaml", "no such file")),
    "two recipes": (["+recipe=cpu_int8", "+recipe=eager"], 1, ("recipe",)),
    "recipe list without -m": (["+recipe=cpu_int8,eager"], 1, ("-m",)),
    "empty recipe": (["+recipe="], 1, ("recipe",)),
    "misspelt group": (["presicion=bf16"], 1, ("did you mean 'precision'?",)),
    "misspelt option": (["precision=int8_dynamc"], 1, ("did you mean 'int8_dynamic'?", "fp8_weight_only")),
    "option of another group": (["compile=qkv"], 1, ("compile", "max_autotune")),
    "misspelt key": (["precision.min_featurs=8"], 1, ("did you mean 'min_features'?",)),
    "misspelt nested key": (["precision.weight.formt=int8"], 1, ("did you mean 'format'?",)),
    "unknown key behind +": (["+precision.blocksize=32"], 1, ("precision.blocksize",)),
    "unknown key behind ++": (["++precision.blocksize=32"], 1, ("precision.blocksize",)),
    "unknown top key behind +": (["+recip=a100_fp8"], 1, ("recip", "did you mean 'recipe'?")),
    "group behind +": (["+precision=bf16"], 1, ("without it",)),
    "known key behind +": (["+precision.min_features=8"], 1, ("precision.min_features",)),
    "group removed": (["~precision"], 1, ("precision=none",)),
    "key removed": (["~precision.min_features"], 1, ("precision.min_features",)),
    "text for a number": (["precision=int8_dynamic", "precision.min_features=many"], 1, ("'many'", "whole number")),
    "float for a whole number": (["graph=auto", "graph.num_warmup_calls=1.5"], 1, ("1.5", "whole number")),
    "text for a bool": (["measure.ablate=maybe"], 1, ("'maybe'", "true or false")),
    "list for a number": (["seed=[1,2]"], 1, ("seed",)),
    "number for a list": (["precision=int8_dynamic", "precision.include=3"], 1, ("precision.include",)),
    "mapping for a value": (["seed={a: 1}"], 1, ("seed",)),
    "null where none is allowed": (["precision=int8_dynamic", "precision.min_features=null"], 1, ("precision.min_features",)),
    "below the range": (["measure.num_rounds=1"], 1, ("measure.num_rounds", "found 1", "3")),
    "above the range": (["verify.budget=5"], 1, ("verify.budget", "found 5")),
    "negative seed": (["seed=-1"], 1, ("seed", "-1")),
    "infinity": (["measure.min_round_ms=inf"], 1, ("measure.min_round_ms",)),
    "nan": (["measure.min_round_ms=nan"], 1, ("measure.min_round_ms",)),
    "unknown enum value": (["compile=default", "compile.mode=max_autotun"], 1, ("did you mean 'max_autotune'?",)),
    "unknown format": (["precision=int8_dynamic", "precision.weight.format=int9"], 1, ("'int9'", "did you mean 'int8'?")),
    "unknown hardware": (["backend.hardware=rtx4091"], 1, ("did you mean 'rtx4090'?",)),
    "unknown phase": (["model=decoder", "model.phase=decod"], 1, ("did you mean 'decode'?",)),
    "formats that contradict": (["precision=int8_dynamic", "precision.weight.format=float8_e4m3fn"], 1, ("activation.format",)),
    "mode that contradicts": (["precision=int8_weight_only", "precision.activation.mode=dynamic"], 1, ("contradicts",)),
    "setting that the option does not read": (["precision=bf16", "precision.min_features=32"], 1, ("does not read",)),
    "setting of a group that is off": (["graph.num_warmup_calls=5"], 1, ("does not read",)),
    "two mistakes": (["precision=fp9", "measure.num_rounds=1"], 2, ("'fp9'", "measure.num_rounds")),
    "four mistakes": (["+recipe=x_y", "precision=fp9", "foo.bar=1", "lst"], 4, ("'x_y'", "'fp9'", "foo.bar", "'lst'")),
    "neither command nor override": (["lisst"], 1, ("did you mean 'list'?",)),
    "no key": (["=5"], 1, ("before '='",)),
    "broken grammar": (["precision.include=[a"], 1, ("precision.include=[a",)),
    "unknown flag": (["--multrun"], 1, ("did you mean '--multirun'?",)),
    "unknown short flag": (["-z"], 1, ("unknown flag '-z'",)),
    "flag and word": (["--foo", "precision=fp9"], 2, ("'--foo'", "'fp9'")),
    "flag with a value it does not take": (["--multirun=3"], 1, ("--multirun takes no value",)),
    "flag without its value": (["--recipes"], 1, ("--recipes needs a value",)),
    "--cfg of something else": (["--cfg", "jobs"], 1, ("did you mean 'job'?",)),
    "--recipes without a team": (["--recipes", "."], 1, ("TEAM=DIR",)),
    "--recipes of no folder": (["--recipes", "team=./nothing"], 1, ("'./nothing'",)),
    "list of values without -m": (["precision=bf16,fp16"], 1, ("-m",)),
    "sweep with one bad option": (["-m", "precision=bf16,fp9"], 1, ("'fp9'",)),
    "sweep with one bad value": (["-m", "precision=int8_dynamic", "precision.min_features=8,abc"], 1, ("'abc'",)),
    "sweep with one value out of range": (["-m", "measure.num_rounds=7,1"], 1, ("measure.num_rounds",)),
    "sweep with a bad recipe": (["-m", "+recipe=cpu_int8,cpu_int9"], 1, ("'cpu_int9'",)),
    "sweep without one valid combination": (
        ["-m", "precision=bf16,fp16", "precision.min_features=32"],
        2,
        ("precision=bf16", "precision=fp16"),
    ),
    "--cfg with -m": (["--cfg", "job", "-m"], 1, ("-m",)),
    "--cfg of a bad config": (["--cfg", "job", "precision=fp9"], 1, ("'fp9'",)),
    "--info of a bad config": (["--info", "config", "precision=fp9"], 1, ("'fp9'",)),
    "list with a word": (["list", "cpu_int8"], 1, ("describe cpu_int8",)),
    "describe nothing": (["describe"], 1, ("describe takes one",)),
    "describe a misspelt group": (["describe", "precison"], 1, ("did you mean 'precision'?",)),
    "describe a misspelt option": (["describe", "precision=bf17"], 1, ("did you mean 'bf16'?",)),
    "describe an option of no group": (["describe", "precisio=bf16"], 1, ("did you mean 'precision'?",)),
    "explain a misspelt key": (["explain", "+recipe=eager", "precision.weight.formt"], 1, ("did you mean 'precision.weight.format'?",)),
    "explain for a misspelt device": (["explain", "+recipe=eager", "--device", "a1000"], 1, ("did you mean 'a100'?",)),
    "explain with an unknown flag": (["explain", "--devic", "a100"], 1, ("did you mean '--device'?",)),
    "explain a bad config": (["explain", "precision=fp9"], 1, ("'fp9'",)),
    "diff of one": (["diff", "eager"], 1, ("diff takes two",)),
    "diff of two misspelt": (["diff", "eagr", "cpu_int"], 2, ("'eager'", "'cpu_int8'")),
    "validate nothing": (["validate"], 1, ("validate takes",)),
    "validate a misspelt name": (["validate", "eagr"], 1, ("did you mean 'eager'?",)),
    "copy of one": (["copy", "eager"], 1, ("copy takes RECIPE DEST",)),
    "copy to another suffix": (["copy", "eager", "eager.json"], 1, (".yaml",)),
    "copy into a missing folder": (["copy", "eager", "nowhere/eager.yaml"], 1, ("cannot be written",)),
    "doctor with a word": (["doctor", "--mesure"], 1, ("did you mean '--measure'?",)),
}

# name -> (text of the file bad.yaml, number of mistakes, what the lines say besides the file)
RECIPES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "misspelt group": ("presicion: {min_features: 8}\n", 1, ("did you mean 'precision'?",)),
    "misspelt key": ("precision: {min_featurs: 8}\n", 1, ("precision.min_featurs", "did you mean 'min_features'?")),
    "misspelt option": ("defaults: [override /precision: int8]\n", 1, ("'int8'", "int8_dynamic")),
    "misspelt group in defaults": ("defaults: [override /precison: bf16]\n", 1, ("did you mean 'precision'?",)),
    "option without override": ("defaults: [{precision: bf16}]\n", 1, ("override /precision: bf16",)),
    "option that YAML reads as a boolean": ("defaults: [override /graph: off]\n", 1, ("boolean",)),
    "wrong type": ("defaults: [override /precision: int8_dynamic]\nprecision: {min_features: many}\n", 1, ("'many'", "whole number")),
    "out of range": ("defaults: [override /precision: int8_dynamic]\nprecision: {min_features: 0}\n", 1, ("precision.min_features",)),
    "contradiction": (
        "defaults: [override /precision: int8_dynamic]\nprecision: {activation: {format: float8_e4m3fn}}\n",
        1,
        ("activation.format",),
    ),
    "unread setting": ("defaults: [override /precision: bf16]\nprecision: {min_features: 32}\n", 1, ("does not read",)),
    "all at once": ("presicion: 1\ngraph: {x: 1}\nverify: {num_rows: 3}\n", 3, ("presicion", "graph.x", "verify.num_rows")),
    "missing parent": ("defaults: [basis]\n", 1, ("'basis'",)),
    "own parent": ("defaults: [bad]\n", 1, ("bad",)),
    "two parents": ("defaults: [/recipe/eager, /recipe/cpu_int8]\n", 1, ("second parent",)),
    "not a mapping": ("- a\n- b\n", 1, ("mapping",)),
    "broken YAML": ("precision: {min_features: 8\n", 1, ("line",)),
    "a key twice": ("verify: {num_rows: 256}\nverify: {num_rows: 512}\n", 1, ("twice",)),
    "sweep of a word": ("sweep: {precision: bf16}\n", 1, ("sweep.precision",)),
    "sweep of a bad option": ("sweep: {precision: [bf16, fp9]}\n", 1, ("'fp9'",)),
    "sweep of a run group": ("sweep: {model: [minilm, bert]}\n", 1, ("sweep.model",)),
    "lower floor": ("defaults: [/recipe/cpu_int8]\nverify: {cosine_min: 0.5}\n", 1, ("verify.cosine_min",)),
    "verification off": ("defaults: [override /verify: off]\n", 1, ("verify",)),
}


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_command_line(name: str, refused) -> None:
    words, mistakes, says = COMMAND_LINES[name]
    refused(*words, mistakes=mistakes, says=says)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, place, refused) -> None:
    text, mistakes, says = RECIPES[name]
    place.recipe("bad", text)
    ended = refused("+recipe=./bad.yaml", mistakes=mistakes, says=says)
    assert all("bad.yaml" in line for line in ended.lines)


def test_validate_names_every_mistake_of_every_file(place) -> None:
    place.recipe("one", "presicion: 1\n")
    place.recipe("two", "verify: {num_rows: 3}\ngraph: {x: 1}\n")
    ended = place.run("validate", "one.yaml", "eager", "two.yaml")
    assert (ended.code, len(ended.lines), ended.changed) == (2, 3, [])
    assert [line.partition(":")[0] for line in ended.lines] == ["one.yaml", "two.yaml", "two.yaml"]
    assert ended.out == "eager: valid, digest a9d5f6d002d9\n"


def test_a_bad_file_does_not_break_the_list(place) -> None:
    place.recipe("broken", "presicion: 1\n")
    place.recipe("fine", "info: {description: works}\n")
    ended = place.run("list", "--recipes", f"team={place.work}")
    assert (ended.code, ended.err) == (0, "")
    rows = {line.split()[0]: line for line in ended.out.splitlines() if line.startswith("team/")}
    assert "error:" in rows["team/broken"]
    assert "works" in rows["team/fine"]


def test_copy_does_not_overwrite(place, refused) -> None:
    mine = place.recipe("mine", "info: {description: precious}\n")
    refused("copy", "eager", "mine.yaml", says=("not overwritten",))
    assert mine.read_text() == "info: {description: precious}\n"


def test_a_namespace_found_twice_names_both(place, refused) -> None:
    (place.root / "other").mkdir()
    folders = f"team={place.work}:team={place.root / 'other'}"
    refused("list", KERNEL_PYTORCH_RECIPES=folders, says=(str(place.work), str(place.root / "other")))


def test_tracebacks_only_for_who_asks(place) -> None:
    ended = place.run("precision=fp9", HYDRA_FULL_ERROR="1")
    assert ended.code == 1
    assert "Traceback" in ended.err


@pytest.mark.parametrize("folder", ["file", "file/below", "file/far/below", "new/" + "n" * 300, "/dev/null/out", "taken"])
def test_a_run_folder_that_cannot_be_used(place, refused, folder):
    (place.work / "file").write_text("")
    (place.work / "taken" / "job.json").mkdir(parents=True)
    refused("model=decoder", f"hydra.run.dir={folder}", says=("hydra.run.dir", "run folder"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("folder", ["locked", "locked/out"])
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_run_folder_without_permission(place, refused, folder, mode):
    locked = place.work / "locked"
    locked.mkdir()
    locked.chmod(mode)
    try:
        refused("model=decoder", f"hydra.run.dir={folder}", says=("hydra.run.dir", "run folder"))
    finally:
        locked.chmod(0o755)
