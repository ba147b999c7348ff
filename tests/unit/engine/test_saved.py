"""The saved folder as a format: what goes in comes out bit for bit, and whatever was changed is refused in one line a mistake."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_pytorch.engine import restore, saved
from kernel_pytorch.engine.saved import ModelFacts, ModuleFacts, ProbeFacts, RecipeFacts, TensorFacts
from kernel_pytorch.engine.saved_call import CallReader, CallWriter
from kernel_pytorch.errors import ConfigError

CPU = torch.device("cpu")


def facts():
    recipe = RecipeFacts(
        name="r", digest="d", effective_digest="e", chain=["r"], overrides=[], choices={}, ignored={}, config={"backend": {}}, seed=0
    )
    return {
        "recipe": recipe,
        "model": ModelFacts(name="M", dtype="float32", trained=True, tensors={"w": TensorFacts(dtype="float32", shape=[2])}),
        "modules": {"layer": ModuleFacts(group="precision", facts={"format": "int8"}, tensors=["weight"])},
        "aliases": {"v": "w"},
        "probe": ProbeFacts(args={"tuple": []}, kwargs={"dict": []}, outputs=[], modules=[], repeatable=True, machine={}),
    }


def write(folder, tensors=None, *, overwrite=False):
    saved.write(folder, {"model.w": torch.arange(4.0)} if tensors is None else tensors, **facts(), overwrite=overwrite)


def edit(folder, change):
    """Applies `change` to the parsed saved.json."""
    path = folder / "saved.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def tensor_file(folder):
    (path,) = folder.glob("tensors-*.safetensors")
    return path


TENSORS = {
    "plain": torch.randn(3, 5),
    "bfloat16": torch.randn(7).bfloat16(),
    "float8_e4m3fn": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "float8_e4m3fnuz": torch.randn(4, 4).to(torch.float8_e4m3fnuz),
    "complex": torch.randn(3, dtype=torch.complex64),
    "scalar": torch.tensor(3.5),
    "uint16 scalar": torch.tensor(7, dtype=torch.uint16),
    "empty": torch.empty(0, 4),
    "bool": torch.tensor([True, False]),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(3, 4).t(),
    "expanded": torch.randn(1, 4).expand(3, 4),
    "a slice": torch.randn(8, 8)[2:5, 1:3],
    "not finite": torch.tensor([math.nan, math.inf, -0.0]),
}


def test_tensors_of_every_kind_come_back_with_their_bits_and_strides(tmp_path):
    write(tmp_path / "s", TENSORS)
    read = saved.read(tmp_path / "s")
    assert set(read.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = read.tensor(name, CPU)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert found.stride() == tensor.clone().stride(), name
        assert torch.equal(found.contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)), name


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    one = torch.randn(6)
    write(tmp_path / "s", {"a": one, "b": one.view(2, 3), "c": one[:3]})
    read = saved.read(tmp_path / "s")
    assert torch.equal(read.tensor("b", CPU), one.view(2, 3))
    assert torch.equal(read.tensor("c", CPU), one[:3])


def test_a_tensor_that_was_read_is_a_copy(tmp_path):
    write(tmp_path / "s")
    read = saved.read(tmp_path / "s")
    read.tensor("model.w", CPU).zero_()
    assert read.tensor("model.w", CPU).tolist() == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"found no tensor 'model\.x', which saved\.json names"):
        read.tensor("model.x", CPU)


def test_facts_come_back(tmp_path):
    write(tmp_path / "s")
    read = saved.read(tmp_path / "s").facts
    assert {name: getattr(read, name) for name in facts()} == facts()
    assert (read.format_version, read.schema_version) == (saved.FORMAT_VERSION, 1)


def _flip_last_byte(folder):
    path = tensor_file(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _set(key, value):
    def change(raw):
        *path, last = key.split(".")
        for name in path:
            raw = raw[name]
        raw[last] = value

    return lambda folder: edit(folder, change)


def _truncate(name, length):
    def change(folder):
        path = folder / name if name == "saved.json" else tensor_file(folder)
        path.write_bytes(path.read_bytes()[:length])

    return change


def _text(text):
    return lambda folder: (folder / "saved.json").write_text(text)


HOSTILE = {
    "truncated tensors": (_truncate("tensors", 40), r"tensors-.*: found 40 bytes; allowed [\d,]+: the file is cut short"),
    "empty tensors": (_truncate("tensors", 0), "found 0 bytes"),
    "one bit": (_flip_last_byte, "found other contents than saved.json has the sha256 of"),
    "no tensors": (lambda folder: tensor_file(folder).unlink(), "is missing; saved.json needs it"),
    "no facts": (lambda folder: (folder / "saved.json").unlink(), "saved.json: is missing; allowed a folder that `save` wrote"),
    "truncated facts": (_truncate("saved.json", 200), "saved.json: found no JSON"),
    "not text": (lambda folder: (folder / "saved.json").write_bytes(b"\xff\xfe\x00"), "found no JSON"),
    "a list": (_text("[]"), "found a list; allowed a JSON object"),
    "deep": (_text("[" * 100_000), "found no JSON"),
    "NaN": (_text('{"kind": NaN}'), "NaN is not JSON"),
    "a long number": (_text('{"kind": ' + "9" * 10_000 + "}"), "found no JSON"),
    "another program's": (_text('{"version": 1}'), "kind: found None; allowed 'kernel_pytorch saved model'"),
    "newer format": (
        _set("format_version", 2),
        r"format_version: found 2; allowed 1 \(written by kernel-pytorch 0\.1\.0, this is 0\.1\.0\)",
    ),
    "format true": (_set("format_version", True), "format_version: found True"),
    "other schema": (_set("schema_version", 2), "schema_version: found 2; allowed 1 .* optimize and save again"),
    "unknown key": (_set("extra", 1), "extra: Extra inputs are not permitted"),
    "wrong type": (_set("aliases", []), "aliases: Input should be a valid dictionary"),
    "text for a number": (_set("file.bytes", "12"), r"file\.bytes: Input should be a valid integer"),
    "upward": (_set("file.name", "../tensors-0123456789abcdef.safetensors"), r"file\.name: found '\.\./tensors-.*'; allowed tensors-"),
    "absolute": (_set("file.name", "/etc/passwd"), r"file\.name: found '/etc/passwd'"),
    "newline": (_set("file.name", "tensors-0123456789abcdef.safetensors\n"), r"file\.name: found"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_that_was_changed_is_refused(tmp_path, case):
    change, message = HOSTILE[case]
    write(tmp_path / "s")
    saved.read(tmp_path / "s")
    change(tmp_path / "s")
    with pytest.raises(ConfigError, match=message) as caught:
        saved.read(tmp_path / "s")
    assert all("\n" not in line for line in caught.value.lines)


def test_a_tensor_file_that_is_no_safetensors_is_refused(tmp_path):
    write(tmp_path / "s")
    path = tensor_file(tmp_path / "s")
    path.write_bytes(b"\xff" * path.stat().st_size)
    digest = saved._sha256(path)
    edit(tmp_path / "s", lambda raw: raw["file"].update(sha256=digest))
    with pytest.raises(ConfigError, match="cannot be read"):
        saved.read(tmp_path / "s")


@pytest.mark.parametrize(
    "layout",
    [
        {"dtype": "float32", "shape": [2**40, 2**40], "stride": []},
        {"dtype": "float32", "shape": [2, 2], "stride": [2**60, 1]},
        {"dtype": "float32", "shape": [2, 2], "stride": [1, 1]},
        {"dtype": "float32", "shape": [2, 2], "stride": [-2, 1]},
        {"dtype": "float32", "shape": [2, 2], "stride": [1]},
        {"dtype": "float32", "shape": [-2, -2], "stride": []},
        {"dtype": "float64", "shape": [4], "stride": []},
        {"dtype": "nn", "shape": [4], "stride": []},
        {"dtype": "__name__", "shape": [4], "stride": []},
        {"dtype": "quint8", "shape": [4, 4], "stride": [1, 4]},
        {"dtype": "quint8", "shape": [16], "stride": []},
        {"dtype": "uint4", "shape": [4, 4], "stride": [1, 4]},
        {"dtype": "uint4", "shape": [16], "stride": []},
        {"dtype": "uint8", "shape": [1, 16], "stride": [2**70, 1]},
        {"dtype": "float32", "shape": [0, 2**70], "stride": []},
        {"dtype": "float32", "shape": [0, 2], "stride": [1]},
    ],
)
def test_a_layout_that_its_bytes_do_not_have_is_refused(tmp_path, layout):
    write(tmp_path / "s", {"model.w": torch.arange(0.0 if 0 in layout["shape"] else 4.0)})
    edit(tmp_path / "s", lambda raw: raw["layouts"].update({"model.w": layout}))
    with pytest.raises(ConfigError, match=r"layouts\.model\.w: found"):
        saved.read(tmp_path / "s").tensor("model.w", CPU)


def test_an_earlier_save_is_replaced_only_when_asked(tmp_path):
    folder = tmp_path / "deep" / "s"
    write(folder)
    with pytest.raises(ConfigError, match="found an earlier save; allowed a new folder, or overwrite=True"):
        write(folder, {"model.w": torch.zeros(1)})
    (folder / "notes.txt").write_text("mine")
    write(folder, {"model.w": torch.zeros(1)}, overwrite=True)
    assert saved.read(folder).tensor("model.w", CPU).tolist() == [0]
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "saved.json", tensor_file(folder).name]
    write(folder, {"model.w": torch.zeros(1)}, overwrite=True)
    assert saved.read(folder).tensor("model.w", CPU).tolist() == [0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_someone_elses_folder_is_left_alone(tmp_path, overwrite):
    (tmp_path / "model.bin").write_bytes(b"theirs")
    with pytest.raises(ConfigError, match=r"found model\.bin; allowed a new or empty folder, or an earlier save"):
        write(tmp_path, overwrite=overwrite)
    (tmp_path / "saved.json").write_text("{}")
    with pytest.raises(ConfigError, match="not of this library"):
        write(tmp_path, overwrite=overwrite)
    with pytest.raises(ConfigError, match="found a file; allowed a new folder"):
        write(tmp_path / "model.bin", overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "saved.json"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/s: cannot be written: Not a directory"):
        write(tmp_path / "file" / "s")


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may catch it."""


@pytest.mark.parametrize("at", ["save_file", "_sha256", "write_atomically"])
def test_a_save_that_is_killed_leaves_the_earlier_one(tmp_path, monkeypatch, at):
    write(tmp_path / "s")

    def die(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saved, at, die)
        with pytest.raises(Killed):
            write(tmp_path / "s", {"model.w": torch.zeros(1)}, overwrite=True)
    assert saved.read(tmp_path / "s").tensor("model.w", CPU).tolist() == [0, 1, 2, 3]
    write(tmp_path / "s", {"model.w": torch.zeros(1)}, overwrite=True)
    assert saved.read(tmp_path / "s").tensor("model.w", CPU).tolist() == [0]


def test_a_first_save_that_was_killed_does_not_block_the_next(tmp_path, monkeypatch):
    def die(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_atomically", die)
        with pytest.raises(Killed):
            write(tmp_path / "s")
    (tmp_path / "s" / ".saving-0123").write_bytes(b"half")
    # As write_atomically names what it renames.
    (tmp_path / "s" / ".saved.json.m9bhwrb_").write_text("half")
    write(tmp_path / "s", {"model.w": torch.zeros(1)})
    assert saved.read(tmp_path / "s").tensor("model.w", CPU).tolist() == [0]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["saved.json", tensor_file(tmp_path / "s").name]


def test_tensors_that_no_facts_name_go_once_a_save_is_whole_and_not_before(tmp_path, monkeypatch):
    folder, orphan = tmp_path / "s", "tensors-0123456789abcdef.safetensors"
    write(folder)
    (folder / orphan).write_bytes(b"whole")
    yours = ["tensors-mine.safetensors", ".saved.json.swp"]
    for name in yours:
        (folder / name).write_text("yours")

    def die(*_args, **_kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_atomically", die)
        with pytest.raises(Killed):
            write(folder, {"model.w": torch.zeros(1)}, overwrite=True)
    assert saved.read(folder).tensor("model.w", CPU).tolist() == [0, 1, 2, 3]
    assert (folder / orphan).exists()
    write(folder, {"model.w": torch.ones(1)}, overwrite=True)
    named = saved.read(folder).facts.file.name
    assert sorted(path.name for path in folder.iterdir()) == sorted([*yours, "saved.json", named])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS | st.builds(lambda size: torch.arange(float(size)), st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=8,
)


def alike(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        pairs = zip(first.items(), second.items(), strict=True)
        return type(second) is dict and all(alike(a, c) and alike(b, d) for (a, b), (c, d) in pairs)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and all(alike(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, float):
        return type(second) is float and repr(first) == repr(second)
    return type(first) is type(second) and first == second


def through_json(value):
    writer = CallWriter("in.", CPU)
    encoded = json.loads(json.dumps(writer.encode(value, "args"), allow_nan=False))
    return CallReader(lambda name, _device: writer.tensors[name], CPU).decode(encoded, "args")


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_a_call_comes_back_as_it_was(value):
    assert alike(value, through_json(value))


def test_one_tensor_passed_twice_stays_one():
    x = torch.ones(2)
    first, second, third = through_json((x, {"again": x}, torch.ones(2)))
    assert first is second["again"]
    assert first is not third


class Pair(tuple):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"cache": object()}, r"kwargs\['cache'\]: found a object; a saved call holds tensors"),
        ([1, {2, 3}], r"kwargs\[1\]: found a set"),
        (Pair((1, 2)), "found a Pair"),
        (3 + 4j, "found a complex"),
        (b"bytes", "found a bytes"),
        (torch.float32, "found a dtype"),
        ({(1, 2): 3}, "key: found a tuple"),
        (torch.eye(2).to_sparse(), "found a Tensor of layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
    ],
)
def test_a_value_that_no_file_can_hold_is_one_line(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CallWriter("in.", CPU).encode(value, "kwargs")
    assert len(caught.value.lines) == 1
    assert "held_out=" in str(caught.value) or "key" in str(caught.value)


def test_a_value_inside_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(ConfigError, match="more than 100 values inside one another"):
        CallWriter("in.", CPU).encode(value, "args")


@pytest.mark.parametrize(
    "encoded",
    [
        [1, 2],
        {},
        {"tuple": 3},
        {"set": [1]},
        {"tensor": 3},
        {"tensor": "a", "host": False},
        {"tensor": "a", "device": "cuda"},
        {"float": "1.5"},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"dict": [[{"tensor": "a"}, 1]]},
        {"__reduce__": ["os.system", "true"]},
    ],
)
def test_what_no_writer_wrote_is_refused(encoded):
    def load(name, _device):
        raise AssertionError(f"read {name}")

    with pytest.raises(ConfigError, match="args"):
        CallReader(load, CPU).decode(encoded, "args")


def test_a_model_all_of_whose_weights_are_streamed_is_on_the_device_of_its_slots() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert restore._device_of(model) == torch.device("cpu")
    model[0].held_tensors = [torch.empty(1, device="meta")]
    assert restore._device_of(model) == torch.device("meta")
