"""Tables of measured configurations: what is shipped, what the user's folder adds, and what is written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernel_pytorch.kernels import skinny_w8a16 as op
from kernel_pytorch.kernels import tables

CONFIG = {"block_n": 16, "block_k": 256, "slices": 2, "split": 1, "num_warps": 2, "num_stages": 3, "overlap": "none", "ahead": 2}


def row(n: int, k: int, m: int, **config: object) -> dict[str, object]:
    return {"n": n, "k": k, "m": m, "us": 1.0, "config": CONFIG | config}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of the user; what was read before is read again."""
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path))
    tables.load.cache_clear()
    op.tuned.cache_clear()
    yield tmp_path
    tables.load.cache_clear()
    op.tuned.cache_clear()


def test_a_gpus_name_gives_one_file_name():
    assert tables.file_name("skinny_w8a16", "NVIDIA H200") == "skinny_w8a16.NVIDIA_H200.json"
    assert tables.file_name("skinny_w8a16", "NVIDIA A100-SXM4/80GB") == "skinny_w8a16.NVIDIA_A100-SXM4_80GB.json"


def test_every_shipped_table_is_named_after_its_contents():
    files = sorted((Path(tables.__file__).parent / "tuned").glob("*.json"))
    assert files
    for file in files:
        table = json.loads(file.read_text())
        assert file.name == tables.file_name(table["kernel"], table["gpu"])
        for name, parts in tables.KEYS.items():
            keys = [tuple(entry[part] for part in parts) for entry in table[name]]
            assert len(keys) == len(set(keys)), f"{file.name}: {name} has a row twice"


def test_a_gpu_that_nobody_measured_has_empty_tables(cache):
    assert tables.load("skinny_w8a16", "X") == {"configs": {}, "crossover": {}}
    assert tables.crossover("skinny_w8a16", 6144, 4096, "X", "scaled_mm") == 64


def test_the_users_rows_win_and_the_others_stay(cache):
    shipped = op.tuned("NVIDIA H200")
    tables.load.cache_clear()
    op.tuned.cache_clear()
    path = tables.user_file("skinny_w8a16", "NVIDIA H200")
    assert path.is_relative_to(cache)
    tables.write(path, {"configs": [row(6144, 4096, 8, num_stages=7)], "crossover": []})
    own = op.tuned("NVIDIA H200")
    assert own[6144, 4096, 8] == op.Config(16, 256, 2, 1, 2, 7)
    assert shipped[6144, 4096, 8].num_stages == 3
    assert {key: config for key, config in own.items() if key != (6144, 4096, 8)} == {
        key: config for key, config in shipped.items() if key != (6144, 4096, 8)
    }


def test_write_keeps_rows_of_other_layers_and_replaces_its_own(tmp_path):
    path = tmp_path / "deep" / "t.json"
    crossover = {"n": 8, "k": 8, "against": "expand", "m": 96}
    tables.write(path, {"date": "a", "configs": [row(8, 8, 1), row(8, 8, 2)], "crossover": [crossover]})
    tables.write(path, {"date": "b", "configs": [row(8, 8, 2, split=4)], "crossover": []})
    assert tables.read(path) == {"date": "b", "configs": [row(8, 8, 1), row(8, 8, 2, split=4)], "crossover": [crossover]}
    assert [file.name for file in path.parent.iterdir()] == ["t.json"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, torn = tmp_path / "t.json", []
    tables.write(path, {"configs": [row(8, 8, m) for m in range(300)], "crossover": []})
    done = threading.Event()

    def reading() -> None:
        while not done.is_set():
            if len(tables.read(path)["configs"]) != 300:
                torn.append(1)

    reader = threading.Thread(target=reading)
    reader.start()
    for _ in range(30):
        tables.write(path, {"configs": [row(8, 8, m) for m in range(300)], "crossover": []})
    done.set()
    reader.join()
    assert torn == []


def test_crossover_is_the_tables_row_for_that_road(cache):
    rows = [{"n": 96, "k": 64, "against": "scaled_mm", "m": 32}, {"n": 96, "k": 64, "against": "expand", "m": 0}]
    tables.write(tables.user_file("skinny_w8a16", "cpu"), {"configs": [], "crossover": rows})
    cpu = torch.device("cpu")
    assert op.crossover(96, 64, cpu, "scaled_mm") == 32
    assert op.crossover(96, 64, cpu, "expand") == 0
    assert op.crossover(96, 64, cpu, "int8_mm") == 64
    assert op.crossover(64, 96, cpu, "expand") == 128
    assert op.crossover(64, 96, cpu, "scaled_mm") == 64


def test_a_chip_with_other_memory_serves_until_it_is_measured(cache, monkeypatch):
    measured, other = tables.read(tables.shipped_file("skinny_w8a16", "NVIDIA H200")), "NVIDIA H100 nobody measured"
    monkeypatch.setattr(tables, "SAME_CHIP", (frozenset({other, "NVIDIA H200"}),))
    key = (6144, 4096, 8)
    rows = {(entry["n"], entry["k"], entry["m"]): entry["config"] for entry in measured["configs"]}
    assert tables.load("skinny_w8a16", other)["configs"][key] == rows[key]
    path = tables.user_file("skinny_w8a16", other)
    tables.write(path, {"configs": [row(*key, split=7)], "crossover": []})
    tables.load.cache_clear()
    assert tables.load("skinny_w8a16", other)["configs"][key]["split"] == 7
    assert tables.load("skinny_w8a16", "NVIDIA H200")["configs"][key] == rows[key]
