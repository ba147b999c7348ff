from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from kernel_pytorch.cli.sweep import _combinations


def test_the_jobs_are_those_of_hydras_own_sweeper() -> None:
    words = ["+recipe=a,b", "precision=bf16,fp16", "seed=3", "precision.include=['x,y','z']", "measure.num_rounds=range(7,10)"]
    theirs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)[0]
    ours = list(_combinations(words))
    assert len(ours) == 12
    assert ours == theirs


def test_a_glob_is_left_to_hydra() -> None:
    assert list(_combinations(["precision=glob(int8*)", "seed=1,2"])) == []
