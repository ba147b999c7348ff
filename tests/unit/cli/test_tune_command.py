"""`tune`: its words, what it says without a GPU, and the file it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernel_pytorch.cli import tune as command
from kernel_pytorch.cli.main import main
from kernel_pytorch.errors import ConfigError

# The recipe language is tested where there is no torch; this command is not.
torch = pytest.importorskip("torch")

ROW = {"n": 96, "k": 64, "m": 1, "us": 2.5, "config": {"block_n": 4}}


def test_without_words_the_layers_of_llama_and_all_kernels():
    request = command.parse([])
    assert request.layers == ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    assert request.kernels == command.kernels()
    assert "skinny_w8a16" in request.kernels
    assert (request.out, request.seconds) == (None, 150.0)


def test_words_are_read_with_and_without_an_equals_sign(tmp_path):
    words = ["--kernel=skinny_w8a16", "--layer", "96x64", "--layer=64x96", "--layer", "96x64", "--seconds", "30"]
    request = command.parse([*words, "--out", str(tmp_path / "t.json")])
    assert request == command.Request(("skinny_w8a16",), ((96, 64), (64, 96)), tmp_path / "t.json", 30.0)


def test_all_mistakes_come_at_once_each_with_what_is_allowed():
    words = ["--kernl", "--kernel", "x", "--layer", "96", "--layer", "0x64", "--seconds", "nan", "--out"]
    with pytest.raises(ConfigError) as raised:
        command.parse(words)
    lines = raised.value.lines
    assert len(lines) == 6
    assert lines[0].startswith("tune: found '--kernl' (did you mean '--kernel'?)")
    assert lines[1] == "tune: --out needs a value"
    assert "--kernel: found 'x'" in lines[2]
    assert lines[3] == "tune: --layer: found '96'; allowed OUTxIN features, such as 4096x14336"
    assert "found '0x64'" in lines[4]
    assert lines[5] == "tune: --seconds: found 'nan'; allowed 1 to 86400"


def test_a_flag_is_no_value_and_is_given_once():
    with pytest.raises(ConfigError) as raised:
        command.parse(["--seconds", "--kernel", "all", "--kernel", "all"])
    assert raised.value.lines == ["tune: --seconds needs a value", "tune: --kernel is given 2 times; allowed once"]


def test_a_kernel_without_a_search_space_is_not_offered(monkeypatch):
    found = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if "w4a16" in name else found(name))
    assert command.kernels() == ("skinny_w8a16",)
    with pytest.raises(ConfigError, match="allowed skinny_w8a16, all"):
        command.parse(["--kernel", "skinny_w4a16"])


def test_two_kernels_need_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "kernels", lambda: ("a", "b"))
    with pytest.raises(ConfigError, match="is no folder, and 2 kernels write 2 files"):
        command.parse(["--out", str(tmp_path / "t.json")])
    assert command.parse(["--out", str(tmp_path)]).out == tmp_path


def test_without_a_gpu_one_line_and_exit_code_3(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 3
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tune: needs a GPU that runs Triton kernels, and torch finds none here\n")


def test_a_mistake_ends_with_2_and_help_with_0(capsys):
    assert main(["tune", "--layer", "a"]) == 2
    assert main(["tune", "--help"]) == 0
    assert "--layer NxK" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """A GPU named X, and a search that answers at once."""
    search = pytest.importorskip("kernel_pytorch.kernels.tune", reason="no Triton on this platform")
    calls: list[tuple[object, ...]] = []
    monkeypatch.setenv("KERNEL_PYTORCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X")

    def measured(kernel, layers, seconds, say):
        calls.append((kernel, layers, seconds))
        yield {"kernel": kernel, "gpu": "X", "configs": [ROW], "crossover": []}

    monkeypatch.setattr(search, "measured", measured)
    return calls


def test_what_a_search_found_is_kept_when_the_crossovers_fail(monkeypatch, asked):
    from kernel_pytorch.kernels import tables
    from kernel_pytorch.kernels import tune as search

    found = search.measured

    def fails(*words):
        yield from found(*words)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(search, "measured", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        main(["tune", "--kernel", "skinny_w8a16", "--layer", "96x64", "--seconds", "5"])
    tables.load.cache_clear()
    assert tables.load("skinny_w8a16", "X")["configs"] == {(96, 64, 1): {"block_n": 4}}
    tables.load.cache_clear()


def test_the_users_folder_is_written_where_the_kernels_look(asked, capsys):
    from kernel_pytorch.kernels import tables

    assert main(["tune", "--kernel", "skinny_w8a16", "--layer", "96x64", "--seconds", "5"]) == 0
    assert asked == [("skinny_w8a16", ((96, 64),), 5.0)]
    tables.load.cache_clear()
    assert tables.load("skinny_w8a16", "X")["configs"] == {(96, 64, 1): {"block_n": 4}}
    tables.load.cache_clear()
    assert str(tables.user_file("skinny_w8a16", "X")) in capsys.readouterr().out


@pytest.mark.parametrize("folder", [True, False])
def test_out_is_a_file_or_a_folder(asked, tmp_path, folder):
    path = tmp_path / ("skinny_w8a16.X.json" if folder else "mine.json")
    assert main(["tune", "--kernel", "skinny_w8a16", "--out", str(tmp_path if folder else path)]) == 0
    assert json.loads(path.read_text())["configs"] == [ROW]
