"""Whole runs through the command line: every recipe, every verdict, sweeps, interruption. No test asserts a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

TINY = ("model=decoder", "data.length=32", "measure=off")


def result_of(place, folder="out"):
    return json.loads((place.work / folder / "result.json").read_text(encoding="utf-8"))


def run(place, *words, **environ):
    """One run into work/out; gives how it ended and result.json."""
    ended = place.run(*words, "hydra.run.dir=out", **environ)
    return ended, result_of(place)


def step(result, group):
    return next(row for row in result["steps"] if row["group"] == group)


@pytest.mark.parametrize(
    ("recipe", "verdict"),
    [
        ("eager", "pass"),
        ("cpu_fp32_compile", "pass"),
        ("cpu_int8", "pass"),
        ("a100_fp8", "emulated"),
        ("h100_fp8", "emulated"),
        ("h100_bf16", "emulated"),
        ("h100_nvfp4", "emulated"),
        ("b200_nvfp4", "emulated"),
        ("mi300x_fp8", "emulated"),
        ("tpu_v5e_bf16", "emulated"),
    ],
)
def test_every_recipe_on_the_tiny_decoder(place, recipe, verdict):
    words = [] if recipe != "cpu_int8" else ["compile=default"]
    ended, result = run(place, f"+recipe={recipe}", *words, *TINY)
    assert (ended.code, result["verdict"], ended.err) == (0, verdict, "")
    assert result["verification"]["passed"] is True
    assert result["verification"]["rows"] == 256
    assert result["ladder"] == []
    assert sorted(os.listdir(place.work / "out")) == ["log.txt", "recipe.yaml", "report.html", "result.json"]
    assert max(map(len, ended.out.splitlines())) <= 100


def test_minilm_keeps_its_meaning_and_shrinks(place):
    ended, result = run(place, "+recipe=cpu_int8", "compile=default", "measure=quick", "measure.require_gain=false")
    assert (ended.code, result["verdict"]) == (0, "pass"), ended.out + ended.err
    precision = step(result, "precision")
    # 6 layers x (fused QKV, output, intermediate, output): 36 linears, of which QKV are one.
    assert (precision["changed"], precision["matched"]) == (24, 25)
    assert [row["module"] for row in precision["skipped"]] == ["pooler.dense"]
    assert step(result, "fusion")["changed"] == 18
    assert 0.25 < precision["bytes_after"] / precision["bytes_before"] < 0.27
    assert result["verification"]["cosine_min"] >= 0.995
    assert result["verification"]["implementation"]["modules_checked"] == 42
    assert [rung["name"] for rung in result["ladder"]] == ["eager", "compiled", "recipe"]
    for rung in result["ladder"]:
        assert len(rung["latency_ms_samples"]) == 7
        assert rung["latency_ms"] > 0
        assert rung["peak_memory_bytes"] > rung["first_call_s"] > 0


def test_emulation_stores_a_quarter_and_shows_no_speed(place):
    ended, result = run(place, "+recipe=a100_fp8", "model=minilm")
    assert (ended.code, result["verdict"], result["ladder"]) == (0, "emulated", [])
    precision = step(result, "precision")
    assert (precision["changed"], precision["kernels"], precision["support"]) == (36, ["reference"], "emulated")
    assert 0.25 < precision["bytes_after"] / precision["bytes_before"] < 0.26
    assert "EMULATED" in ended.out
    assert "tokens/s" not in ended.out


def test_on_mismatch_error_is_one_line_and_exit_3(place):
    ended, result = run(place, "+recipe=a100_fp8", "backend.on_mismatch=error", *TINY)
    assert (ended.code, result["verdict"]) == (3, "unsupported")
    assert len(ended.lines) == 1
    assert "a100" in ended.err
    assert "on_mismatch=emulate" in ended.err


def test_an_include_pattern_that_matches_nothing_is_exit_4(place):
    ended, result = run(place, "+recipe=cpu_int8", "precision.include=[no.such.layer*]", *TINY)
    assert (ended.code, result["verdict"]) == (4, "no_effect")
    assert len(ended.lines) == 1
    assert "'no.such.layer*'" in ended.err


def test_a_recipe_that_changes_nothing_is_exit_4(place):
    ended, result = run(place, "precision=fp32", *TINY)
    assert (ended.code, result["verdict"]) == (4, "no_effect")
    assert "float32" in ended.err


def test_quality_below_the_floor_is_exit_5_and_names_a_module(place):
    ended, result = run(place, "precision=int8_dynamic", "verify.cosine_min=0.99999", "measure=off")
    assert (ended.code, result["verdict"]) == (5, "numerics")
    assert result["verification"]["passed"] is False
    assert result["verification"]["first_divergence"] in ended.err
    assert "cosine_min" in ended.err


def test_a_speed_gate_that_is_missed_is_exit_6(place):
    ended, result = run(place, "compile=default", "model=decoder", "data.length=32", "measure=quick", "measure.min_speedup=1000")
    assert (ended.code, result["verdict"]) == (6, "performance")
    assert "min_speedup=1000" in ended.err
    assert (place.work / "out" / "report.html").is_file()


def test_a_model_that_does_not_fit_is_exit_3_with_the_bytes(place):
    ended, result = run(place, "model=decoder", "model.preset=llama3_8b", "model.dtype=float32", "measure=off")
    assert (ended.code, result["verdict"]) == (3, "unsupported")
    assert "32,121,044,992 bytes required" in ended.err


def test_verify_off_is_unverified_and_gives_no_speed(place):
    ended, result = run(place, "compile=default", "model=decoder", "data.length=32", "verify=off")
    assert (ended.code, result["verdict"], result["ladder"]) == (0, "unverified", [])


def test_a_factory_of_the_users_own(place):
    (place.work / "mine.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), (torch.randn(300, 64),)\n"
    )
    ended, result = run(place, "precision=int8_weight_only", "model=factory", "model.factory=mine:make", "measure=off")
    assert (ended.code, result["verdict"]) == (0, "pass"), ended.err
    assert step(result, "precision")["changed"] == 2
    assert result["verification"]["rows"] == 300
    assert result["verification"]["held_out"] is False


def test_a_sweep_from_a_recipes_own_block(place):
    place.recipe(
        "mine",
        "defaults:\n  - /recipe/eager\n  - _self_\ninfo: {name: mine}\nsweep: {precision: [none, int8_weight_only], compile: [none]}\n",
    )
    ended = place.run("+recipe=./mine.yaml", "-m", *TINY, "hydra.sweep.dir=sweep")
    sweep = json.loads((place.work / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [row["verdict"] for row in sweep["jobs"]] == ["pass", "pass"], ended.err
    assert ended.code == 0
    assert [row["overrides"] for row in sweep["jobs"]] == [["precision=none"], ["precision=int8_weight_only"]]
    assert "★" in ended.out


def test_an_impossible_combination_is_a_row_and_the_sweep_goes_on(place):
    words = (
        "+recipe=a100_fp8",
        "-m",
        "precision=bf16,fp8_weight_only",
        "precision.weight.granularity=tensor",
        *TINY,
        "hydra.sweep.dir=sweep",
    )
    ended = place.run(*words)
    sweep = json.loads((place.work / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert [row["verdict"] for row in sweep["jobs"]] == ["invalid", "emulated"], ended.err
    assert sweep["jobs"][1]["latency_ms"] is None
    assert "weight" in sweep["jobs"][0]["error"]
    assert ended.code == 0


def start(place, *words):
    environ = {**os.environ, "HOME": str(place.home)}
    return subprocess.Popen(
        [sys.executable, "-m", "kernel_pytorch", *words, "hydra.run.dir=out"],
        cwd=place.work,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def child_of(place, process):
    """Waits until the run's own process is at work and gives its process id."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        if children and (place.work / "out" / "log.txt").is_file():
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("the run's process never started")


LONG = ("compile=default", "model=decoder", "measure.num_rounds=10000", "data.length=32")


def test_ctrl_c_ends_with_130_and_what_was_done(place):
    process = start(place, *LONG)
    child_of(place, process)
    time.sleep(8)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130, out + err
    result = result_of(place)
    assert (result["verdict"], result["exit_code"]) == ("interrupted", 130)
    assert result["steps"]
    assert b"Traceback" not in err


def test_a_killed_process_leaves_an_error_and_a_result(place):
    process = start(place, *LONG)
    os.kill(child_of(place, process), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    result = result_of(place)
    assert (result["verdict"], result["exit_code"]) == ("error", 1)
    assert "SIGKILL" in result["error"]
    assert b"SIGKILL" in err


def test_a_mistake_leaves_the_results_of_an_earlier_run_alone(place):
    keep = place.work / "out"
    keep.mkdir()
    (keep / "result.json").write_text('{"mine": 1}')
    (keep / "log.txt").write_text("log")
    ended = place.run("model=hf", "model.path=nowhere", "hydra.run.dir=out")
    assert (ended.code, len(ended.lines)) == (2, 1)
    assert (keep / "result.json").read_text() == '{"mine": 1}'
    assert (keep / "log.txt").read_text() == "log"


def test_samples_longer_than_the_model_are_one_line(place):
    ended = place.run(
        "compile=none", "precision=int8_weight_only", "model=bert", "model.preset=tiny", "data.length=5000", "hydra.run.dir=out"
    )
    assert (ended.code, len(ended.lines)) == (2, 1)
    assert "data.length: found 5000" in ended.err
    assert not (place.work / "out").exists()


def test_an_unusable_sweep_folder_is_one_line(place):
    ended = place.run("-m", "model=decoder", "precision=none,bf16", "hydra.sweep.dir=/dev/null/x")
    assert (ended.code, len(ended.lines)) == (2, 1)
    assert "hydra.sweep.dir" in ended.err
