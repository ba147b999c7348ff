from __future__ import annotations

import pytest

from kernel_pytorch.cli.arguments import absolute_source, check_words, parse, split_recipes
from kernel_pytorch.errors import ConfigError

NOT_TRUSTED: dict[str, str] = {}
TRUSTED = {"KERNEL_PYTORCH_TRUST_CONFIG": "1"}


@pytest.mark.parametrize(
    "argv",
    [
        ["+recipe=a", "-m", "precision=x,y"],
        ["-m", "+recipe=a", "precision=x,y"],
        ["+recipe=a", "precision=x,y", "--multirun"],
    ],
)
def test_flags_and_words_come_in_any_order(argv: list[str]) -> None:
    arguments = parse(argv, environ=NOT_TRUSTED)
    assert (arguments.words, arguments.multirun, arguments.errors) == (["+recipe=a", "precision=x,y"], True, [])


@pytest.mark.parametrize(
    ("argv", "inspect"),
    [
        (["--cfg", "job", "seed=1"], ["--cfg", "job"]),
        (["--cfg=all", "--resolve", "seed=1"], ["--cfg", "all", "--resolve"]),
        (["-c", "job", "-p", "precision", "seed=1"], ["-c", "job", "-p", "precision"]),
        (["--info", "seed=1"], ["--info", "all"]),
        (["-i", "plugins", "seed=1"], ["--info", "plugins"]),
        (["--info=defaults", "seed=1"], ["--info", "defaults"]),
        (["--hydra-help", "seed=1"], ["--hydra-help"]),
        (["-sc", "seed=1"], ["-sc"]),
    ],
)
def test_flags_that_hydra_answers(argv: list[str], inspect: list[str]) -> None:
    arguments = parse(argv, environ=NOT_TRUSTED)
    assert (arguments.inspect, arguments.words, arguments.errors) == (inspect, ["seed=1"], [])


def prefixes(flag: str, shortest: int) -> list[str]:
    return [flag[:end] for end in range(shortest, len(flag) + 1)]


# Every spelling that argparse would take for a flag that reads configuration as code.
ABBREVIATIONS = [
    *prefixes("--config-dir", len("--co")),
    *prefixes("--config-path", len("--config-")),
    *prefixes("--config-name", len("--config-")),
    *prefixes("--experimental-rerun", len("--e")),
    "-cd",
    "-cp",
    "-cn",
    "-cdconf",
    "-cp=conf",
    "-cnevil",
]


@pytest.mark.parametrize("flag", ABBREVIATIONS)
@pytest.mark.parametrize("joined", [True, False])
def test_no_abbreviation_reaches_hydra_without_trust(flag: str, joined: bool) -> None:
    argv = [f"{flag}=conf"] if joined and flag.startswith("--") else [flag, "conf"]
    arguments = parse([*argv, "seed=1"], environ=NOT_TRUSTED)
    assert len(arguments.errors) == 1
    assert (arguments.trusted, arguments.inspect) == ([], [])
    assert "seed=1" in arguments.words


@pytest.mark.parametrize("flag", ABBREVIATIONS)
def test_with_trust_only_the_full_spelling_is_taken(flag: str) -> None:
    arguments = parse([flag, "conf"], environ=TRUSTED)
    full = flag in ("--config-dir", "--config-path", "--config-name", "--experimental-rerun", "-cd", "-cp", "-cn")
    assert arguments.trusted == ([flag, "conf"] if full else [])
    assert len(arguments.errors) == (0 if full else 1)


def test_one_line_a_word_that_nothing_could_mean() -> None:
    good, errors = check_words(["seed=1", "lst", "=3", "a=\x1b[2J", "b=" + "[" * 9 + "]" * 9, "c=1234567890123456789"])
    assert good == ["seed=1"]
    assert len(errors) == 5
    assert all(error.isprintable() for error in errors)


def test_names_with_digits_are_no_long_numbers() -> None:
    words = ["hydra.run.dir=/tmp/20260101000000000000", "data.path=run-1234567890123456789.txt", "seed=123456789012345678"]
    assert check_words(words) == (words, [])


def test_recipes_flag_of_a_command() -> None:
    assert split_recipes(["a", "--recipes", "x=/d", "b", "--recipes=y=/e"]) == (["a", "b"], ["x=/d", "y=/e"])


def test_a_team_folder_is_made_absolute(tmp_path, monkeypatch) -> None:
    (tmp_path / "ours").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute_source("team=ours") == f"team={tmp_path / 'ours'}"
    with pytest.raises(ConfigError, match="TEAM=DIR"):
        absolute_source("ours")
