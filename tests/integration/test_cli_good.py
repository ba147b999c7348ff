"""Good command lines that need no run: exit 0, nothing on stderr, nothing written but what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPES = tuple(sorted(path.stem for path in Path(__file__).parents[2].glob("recipes/*.yaml")))

# name -> (words, what stdout says)
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no word": ([], ("usage:", "kernel-pytorch +recipe=cpu_int8")),
    "--help": (["--help"], ("usage:", "exit codes:", "-sc install=bash")),
    "-h after words": (["+recipe=eager", "-h"], ("usage:",)),
    "--version": (["--version"], ("kernel-pytorch 0.1.0",)),
    "help of list": (["list", "--help"], ("usage: kernel-pytorch list",)),
    "help of describe": (["describe", "-h"], ("GROUP=OPTION",)),
    "help of explain": (["explain", "--help"], ("--device",)),
    "help of diff": (["diff", "--help"], ("A -> B",)),
    "help of validate": (["validate", "--help"], ("Exit 2",)),
    "help of copy": (["copy", "--help"], ("overwrites a file",)),
    "help of doctor": (["doctor", "--help"], ("--measure",)),
    "list": (["list"], RECIPES),
    "describe a recipe": (["describe", "cpu_int8"], ("int8_dynamic", "hardware=cpu", "qkv", "cosine_min=0.995")),
    "describe recipe=": (["describe", "recipe=a100_fp8"], ("A100 has no FP8 matmul", "a100")),
    "describe precision": (["describe", "precision"], ("precision.weight.format", "whole number", "precision=fp8_dynamic")),
    "describe backend": (["describe", "backend"], ("backend.on_mismatch", "emulate, error", "rtx4090")),
    "describe measure": (["describe", "measure"], ("measure.min_round_ms", "(ms)", "measure=quick")),
    "describe info": (["describe", "info"], ("info.proven_on",)),
    "describe an option": (["describe", "compile=regional"], ("RegionalCompile", "compile.fullgraph")),
    "describe an option that reads nothing": (["describe", "precision=tf32"], ("Tf32Matmul", "precision.quality.sqnr_db")),
    "explain a key": (["explain", "+recipe=cpu_int8", "verify.cosine_min"], ("0.995", "recipe cpu_int8", "schema")),
    "explain a key set on the command line": (["explain", "eager", "seed=7", "seed"], ("command line", "schema")),
    "diff": (["diff", "a100_fp8", "h100_fp8"], ("fp8_weight_only", "fp8_dynamic", "backend.hardware")),
    "diff of the same": (["diff", "eager", "recipe=eager"], ("are the same",)),
    "validate": (["validate", *RECIPES], tuple(f"{name}: valid" for name in RECIPES)),
    "--cfg job": (["--cfg", "job", "+recipe=cpu_int8"], ("hardware: cpu", "format: int8")),
    "--cfg job of a package": (["+recipe=cpu_int8", "--cfg=job", "--package", "precision.weight"], ("format: int8",)),
    "recipe without plus": (["recipe=cpu_int8", "--cfg", "job"], ("format: int8",)),
    "command line over recipe": (["precision=bf16", "--cfg", "job", "+recipe=cpu_int8"], ("dtype: bfloat16",)),
    "--info": (["--info", "searchpath"], ("recipes://",)),
    "--info config": (["--info", "config", "+recipe=eager"], ("Config search path",)),
    "--hydra-help": (["--hydra-help"], ("Hydra", "--shell-completion")),
    "completion script": (["-sc", "install=bash"], ("hydra_bash_completion",)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str, place) -> None:
    words, says = COMMANDS[name]
    ended = place.run(*words)
    assert (ended.code, ended.err, ended.changed) == (0, "", [])
    for text in says:
        assert text in ended.out
    if words[:1] not in (["--info"], ["--hydra-help"], ["-sc"]):
        assert max(map(len, ended.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("+recipe=cpu", "+recipe=cpu_fp32_compile +recipe=cpu_int8"),
        ("precision=int8_w", "precision=int8_weight_only"),
        ("precision.weight.f", "precision.weight.format="),
        ("measure.num", "measure.num_rounds="),
        ("+recipe=team/n", "+recipe=team/nightly"),
    ],
)
def test_shell_completion(line: str, offered: str, place) -> None:
    place.recipe("nightly", "info: {description: x}\n")
    text = f"kernel-pytorch {line}"
    code = "import sys; sys.argv[0] = 'kernel-pytorch'; from kernel_pytorch.cli.main import main; sys.exit(main())"
    environ = {"COMP_LINE": text, "COMP_POINT": str(len(text)), "KERNEL_PYTORCH_RECIPES": f"team={place.work}"}
    ended = place.run("-sc", "query=bash", code=code, **environ)
    assert (ended.code, ended.err, ended.out.strip()) == (0, "", offered)


def test_a_team_is_listed_described_and_used(place) -> None:
    place.recipe("nightly", "defaults: [/recipe/cpu_int8]\ninfo: {description: ours, hardware: [cpu]}\n")
    team = f"team={place.work}"
    assert "team/nightly" in place.run("list", "--recipes", team).out
    assert "team/nightly <- cpu_int8" in place.run("describe", "team/nightly", "--recipes", team).out
    ended = place.run("--cfg", "job", "+recipe=team/nightly", "--recipes", team)
    assert (ended.code, ended.err) == (0, "")
    assert "format: int8" in ended.out


def test_a_digest_does_not_depend_on_where_the_file_is(place) -> None:
    place.recipe("mine", "defaults: [/recipe/cpu_int8]\n")
    assert place.run("validate", "./mine.yaml").out.split()[-1] == place.run("validate", "cpu_int8").out.split()[-1]


def test_a_copy_means_the_same(place) -> None:
    ended = place.run("copy", "a100_fp8", "mine.yaml")
    assert (ended.code, ended.err, ended.changed) == (0, "", ["work/mine.yaml"])
    assert ended.out == "mine.yaml written; run it with +recipe=./mine.yaml\n"
    assert "are the same" in place.run("diff", "a100_fp8", "./mine.yaml").out


def test_a_copy_finds_the_parents(place) -> None:
    """A parent is named relative to its folder; the copy lies in another."""
    (place.work / "team").mkdir()
    (place.work / "team" / "base.yaml").write_text("defaults:\n  - /recipe/cpu_int8\n")
    (place.work / "team" / "child.yaml").write_text("defaults:\n  - base   # ours\n  - override /fusion: none\n  - _self_\n")
    ended = place.run("copy", "team/child", "mine.yaml", "--recipes", "team=team")
    assert (ended.code, ended.err) == (0, "")
    assert "  - /recipe/team/base   # ours\n" in (place.work / "mine.yaml").read_text()
    ended = place.run("diff", "team/child", "./mine.yaml", "--recipes", "team=team")
    assert "are the same" in ended.out


def test_a_copy_into_a_folder_keeps_the_name(place) -> None:
    (place.work / "ours").mkdir()
    assert place.run("copy", "eager", "ours").changed == ["work/ours/eager.yaml"]


def test_the_output_of_list_can_be_cut_short(place) -> None:
    """The reader of a pipe may leave before the end."""
    code = (
        "import os, sys\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "from kernel_pytorch.cli.main import main\n"
        "sys.exit(main(['list']))\n"
    )
    ended = place.run(code=code)
    assert (ended.code, ended.err) == (141, "")
