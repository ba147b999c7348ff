# ruff: noqa: E501  (one row a case)
"""One config from a command line: who wins, what is dropped, what is refused, and that Hydra agrees with our layers."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.paths import data_folder
from kernel_pytorch.recipe import hydra_source
from kernel_pytorch.recipe.compose import _version, compose, prepare
from kernel_pytorch.recipe.explain import layers, origins
from kernel_pytorch.recipe.load import validate_layers
from kernel_pytorch.recipe.options import GROUPS, options
from kernel_pytorch.recipe.overrides import read_overrides
from kernel_pytorch.recipe.sources import RecipeSources

RECIPES = tuple(sorted(path.stem for path in Path(__file__).parents[3].glob("recipes/*.yaml")))


def by_layers(words: list[str], sources: RecipeSources):
    read = read_overrides(words, sources)
    return validate_layers(layers(read.chain, read.words.choices, read.words.values)).config


@pytest.mark.parametrize("recipe", RECIPES)
def test_hydra_composes_what_the_layers_say(recipe: str, sources: RecipeSources) -> None:
    words = [
        f"recipe={recipe}",
        "precision=int8_weight_only",
        "precision.weight={granularity:tensor}",
        "measure.num_rounds=5",
        "model.phase=null",
    ]
    for count in range(len(words) + 1):
        chosen = [word for word in words[:count] if word != "model.phase=null"]
        assert compose(chosen, sources).config == by_layers(chosen, sources)


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_option_composes_and_sets_only_what_it_reads(group: str, option: str, sources: RecipeSources) -> None:
    composed = compose([f"{group}={option}"], sources)
    assert composed.choices[group] == option
    assert composed.ignored == {}
    assert composed.config == by_layers([f"{group}={option}"], sources)


def test_the_order_of_words_does_not_matter(sources: RecipeSources) -> None:
    words = ["recipe=cpu_int8", "precision=int8_weight_only", "precision.min_features=64"]
    digests = {compose(list(order), sources).effective_digest for order in itertools.permutations(words)}
    assert len(digests) == 1


def test_no_recipe(sources: RecipeSources) -> None:
    composed = compose([], sources)
    assert (composed.recipe, composed.chain, composed.overrides) == (None, (), ())
    assert composed.digest == composed.effective_digest == compose(["recipe=eager"], sources).digest


def test_the_run_folder(sources: RecipeSources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed = compose(["recipe=eager", "hydra.run.dir=here"], sources)
    assert (composed.run_dir, composed.overrides) == (str(tmp_path / "here"), ())
    assert Path(compose([], sources).run_dir).parts[-3] == "outputs"
    assert [path.name for path in tmp_path.iterdir()] == ["team"]


def test_left_over_from_below_is_dropped_and_listed(write, sources: RecipeSources) -> None:
    write("base", "defaults: [override /precision: int8_dynamic]\nprecision: {weight: {granularity: tensor}, min_features: 64}")
    composed = compose(["recipe=team/base", "precision=bf16"], sources)
    assert composed.ignored == {"precision": ["weight.granularity", "min_features"]}
    assert composed.config.precision == compose(["precision=bf16"], sources).config.precision
    write("child", "defaults: [base, override /precision: bf16]")
    assert compose(["recipe=team/child"], sources).ignored == composed.ignored


def test_contradictions_among_what_is_dropped_do_not_matter(write, sources: RecipeSources) -> None:
    write("base", "defaults: [override /precision: int8_dynamic]\nprecision: {activation: {granularity: tensor}, weight: {format: int8}}")
    assert compose(["recipe=team/base", "precision=none"], sources).config.precision.weight.format is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precision=bf16", "precision.weight.format=int8"], "precision.weight.format: found 'int8', which precision=bf16 (Cast) does not read; allowed precision.dtype, precision.quality"),
        (["precision.dtype=float16"], "precision.dtype: found 'float16', which precision=none does not read; allowed precision.quality"),
        (["precision=none", "precision.min_features=16"], "precision.min_features: found 16, which precision=none does not read"),
        (["compile=default", "compile.include=[a]"], "compile.include: found ['a'], which compile=default (InductorCompile) does not read; allowed compile.mode,"),
        (["memory.include=[a]"], "memory.include: found ['a'], which memory=none does not read; allowed no key of memory"),
        (["model=decoder", "model.path=x"], "model.path: found 'x', which model=decoder (DecoderSource) does not read"),
        (["data.path=x"], "data.path: found 'x', which data=auto does not read; allowed data.batch, data.length"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_reads(words: list[str], message: str, sources: RecipeSources) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words, sources)
    (line,) = caught.value.lines
    assert line.startswith(f"command line: {message}")


def test_a_recipes_setting_that_nothing_reads_names_the_file(write, sources: RecipeSources) -> None:
    path = write(
        "bad",
        "defaults: [override /precision: bf16]\nprecision: {weight: {format: int8, granularity: tensor}}\ngraph: {num_warmup_calls: 3}",
    )
    for words in (["recipe=team/bad"], ["recipe=team/bad", "precision=int8_dynamic"]):
        with pytest.raises(ConfigError) as caught:
            compose(words, sources)
        assert [line.split(": found")[0] for line in caught.value.lines] == [
            f"{path}: precision.weight.format",
            f"{path}: precision.weight.granularity",
            f"{path}: graph.num_warmup_calls",
        ]


def test_what_a_parent_set_for_an_option_that_it_did_not_choose(write, sources: RecipeSources) -> None:
    """The parent sets a key for the option that config.yaml chose: at or above that layer, so it is the parent's mistake."""
    path = write("base", "precision: {min_features: 64}")
    write("child", "defaults: [base, override /precision: int8_dynamic]")
    assert compose(["recipe=team/child"], sources).config.precision.min_features == 64
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=team/base"], sources)
    assert caught.value.lines[0].startswith(f"{path}: precision.min_features: found 64, which precision=none does not read")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precision=int8_dynamic", "precision.activation.mode=none"], "precision: activation.mode=none contradicts activation.format=int8"),
        (["precision=fp8_dynamic", "precision.weight.format=int8"], "precision: activation.format=float8_e4m3fn with weight.format=int8"),
        (["precision=int8_dynamic", "precision.activation.fast_accumulation=true"], "precision: activation.fast_accumulation=true with activation.format=int8: only "),
        (["precision=fp8_weight_only", "precision.activation.fast_accumulation=true"], "precision: activation.fast_accumulation=true with activation.format=null: only "),
        (["precision=nvfp4", "precision.allocation.grouped=true"], "precision: allocation.effective_bits, allocation.formats and allocation.grouped need allocation.strategy"),
        (["backend=cpu", "backend.hardware=a100"], "backend.hardware: found 'a100', a device of nvidia, with backend=cpu; allowed backend=auto or a device of cpu"),
    ],
)  # fmt: skip
def test_contradictions(words: list[str], message: str, sources: RecipeSources) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words, sources)
    (line,) = caught.value.lines
    assert line.startswith(f"command line: {message}")


def test_a_recipes_contradiction_names_the_file(write, sources: RecipeSources) -> None:
    path = write("bad", "defaults: [override /precision: int8_dynamic]\nprecision: {activation: {mode: none}}\nbackend: {hardware: a100}")
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=team/bad"], sources)
    assert [line.split(" contradicts")[0] for line in caught.value.lines] == [f"{path}: precision: activation.mode=none"]


def test_origins(write, sources: RecipeSources) -> None:
    write("base", "defaults: [override /precision: int8_dynamic]\nprecision: {min_features: 32}")
    write("child", "defaults: [base]\nprecision: {min_features: 64}")
    found = origins(["recipe=team/child", "precision=int8_weight_only", "precision.min_features=128"], sources)
    assert [(step.layer, step.value) for step in found["precision.min_features"]] == [
        ("schema", 16),
        ("recipe team/base", 32),
        ("recipe team/child", 64),
        ("command line", 128),
    ]
    assert [(step.layer, step.value) for step in found["precision"]] == [
        ("config.yaml", "none"),
        ("recipe team/base", "int8_dynamic"),
        ("command line", "int8_weight_only"),
    ]
    assert [(step.layer, step.file) for step in found["precision.weight.format"]] == [
        ("schema", None),
        ("precision=int8_weight_only", data_folder("conf") / "precision" / "int8_weight_only.yaml"),
    ]


def test_another_hydra_program_in_the_process_sees_no_recipes(sources: RecipeSources, monkeypatch: pytest.MonkeyPatch) -> None:
    compose(["recipe=eager"], sources)
    monkeypatch.setattr(hydra_source, "_active", None)
    with hydra.initialize_config_dir(str(data_folder("conf")), **_version()):
        schemes = [source.scheme() for source in GlobalHydra.instance().config_loader().get_sources()]
    assert schemes == ["pkg", "file", "structured"]


def test_compose_leaves_the_registration_and_the_callers_hydra_alone(sources: RecipeSources) -> None:
    active = hydra_source.active()
    with hydra.initialize_config_dir(str(data_folder("conf")), **_version()):
        outer = GlobalHydra.instance().hydra
        assert compose(["recipe=eager"], sources).recipe == "eager"
        assert GlobalHydra.instance().hydra is outer
    assert hydra_source.active() is active


def test_what_completion_lists(write, sources: RecipeSources, tmp_path: Path) -> None:
    write("nightly", "info: {}")
    write("true", "info: {}")
    (tmp_path / "mine.yaml").write_text("info: {}")
    sources = sources.with_file(str(tmp_path / "mine.yaml"))
    with hydra_source.registered(sources), hydra.initialize_config_dir(str(data_folder("conf")), **_version()):
        loader = GlobalHydra.instance().config_loader()
        assert loader.get_group_options("recipe", ObjectType.CONFIG) == sorted([*RECIPES, "team/nightly"])
        assert loader.get_group_options("recipe/team", ObjectType.CONFIG) == ["nightly"]


APP = """
import inspect, sys
import hydra
from hydra.core.hydra_config import HydraConfig
from kernel_pytorch.paths import data_folder
from kernel_pytorch.recipe.compose import compose_task, prepare
from kernel_pytorch.recipe.sources import RecipeSources

sources = RecipeSources.from_environment()
prepared = prepare(sys.argv[1:], sources, multirun=True)
sys.argv[1:] = ["-m", *prepared.hydra, "hydra.sweep.dir=jobs"]
version = {} if "execution_whitelist" in inspect.signature(hydra.main).parameters else {"version_base": "1.3"}

@hydra.main(config_path=str(data_folder("conf")), config_name="config", **version)
def main(cfg):
    task = list(HydraConfig.get().overrides.task)
    composed = compose_task(cfg, task, HydraConfig.get().runtime.output_dir)
    print("JOB", composed.recipe, composed.choices["precision"], composed.choices["compile"], composed.overrides, composed.config.precision.min_features)

main()
assert "torch" not in sys.modules
"""


def sweep(folder: Path, *words: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", APP, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("JOB")]


def test_a_multirun_with_a_sweep_block(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        textwrap.dedent("""
        defaults: [override /precision: int8_dynamic]
        precision: {min_features: 32}
        sweep: {precision: [int8_dynamic, int8_weight_only], compile: [none, default]}
        """)
    )
    assert sweep(tmp_path, "recipe=./mine.yaml", "compile=none") == [
        "JOB ./mine.yaml int8_dynamic none ('compile=none', 'precision=int8_dynamic') 32",
        "JOB ./mine.yaml int8_weight_only none ('compile=none', 'precision=int8_weight_only') 32",
    ]


def test_a_multirun_over_recipes(tmp_path: Path) -> None:
    assert sweep(tmp_path, "recipe=cpu_int8,eager", "precision=bf16") == [
        "JOB cpu_int8 bf16 max_autotune ('precision=bf16',) 16",
        "JOB eager bf16 none ('precision=bf16',) 16",
    ]


def test_prepare_registers_what_it_was_given(sources: RecipeSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra_source, "_active", None)
    assert prepare([], sources).sources is sources
    assert hydra_source.active() is sources


def test_threads_that_compose_at_once_each_get_their_own(sources: RecipeSources, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both wait inside, where one lets another in.
    both, initialize = threading.Barrier(2), hydra.initialize_config_dir

    def slow(*args, **kwargs):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return initialize(*args, **kwargs)

    monkeypatch.setattr(hydra, "initialize_config_dir", slow)
    found: dict[str, str] = {}

    def work(option: str) -> None:
        try:
            found[option] = compose([f"precision={option}"], sources).choices["precision"]
        except ValueError as error:
            found[option] = repr(error)

    threads = [threading.Thread(target=work, args=(option,)) for option in ("int8_dynamic", "bf16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"int8_dynamic": "int8_dynamic", "bf16": "bf16"}
    assert not GlobalHydra.instance().is_initialized()
