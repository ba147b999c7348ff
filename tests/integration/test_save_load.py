"""`Optimized.save` and `kernel_pytorch.load`: another process, another kernel, another model, and files that were changed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.engine import saved as saved_files
from kernel_pytorch.errors import ConfigError, NoEffectError, UnsupportedOperationError, VerificationError
from kernel_pytorch.precision.quantized_linear import QuantizedLinear
from kernel_pytorch.recipe.canonical import from_dict
from kernel_pytorch.recipe.digest import digest

ROOT = Path(__file__).resolve().parents[2]


class Branches(nn.Module):
    """Two branches on one input, an odd width, a tied head, batch norm, a buffer that no state_dict has, and a flag."""

    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, width)
        self.odd, self.tiny = nn.Linear(64, 33), nn.Linear(33, 4)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("position", torch.linspace(0, 1, 64), persistent=False)

    def forward(self, x, gate=True):
        h = self.norm((self.embed(x) + self.position).transpose(1, 2)).transpose(1, 2)
        mixed = self.left(h) * torch.sigmoid(self.right(h)) if gate else self.left(h)
        return {"logits": self.head(mixed), "aux": (self.tiny(torch.relu(self.odd(mixed))),)}


def trained(model=None):
    """A model whose statistics and weights are not those that its class starts with."""
    torch.manual_seed(3)
    model = model or Branches()
    x = torch.randint(0, 100, (16, 20))
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x


def optimized(*overrides, model=None, **arguments):
    model, x = trained(model)
    return kp.optimize(model, "eager", args=(x,), overrides=list(overrides), trained=False, measure=False, **arguments), x


def fresh(**arguments):
    torch.manual_seed(11)
    return Branches(**arguments)


def assert_same(first, second, x):
    a, b = first.model(x), second.model(x)
    assert torch.equal(a["logits"], b["logits"])
    assert torch.equal(a["aux"][0], b["aux"][0])
    # Names and bytes: the state is the same, in the kernel's layout too.
    mine, theirs = first.model.state_dict(), second.model.state_dict()
    assert list(mine) == list(theirs)
    assert all(
        torch.equal(mine[name].contiguous().reshape(-1).view(torch.uint8), theirs[name].contiguous().reshape(-1).view(torch.uint8))
        for name in mine
    )


SCHEMES = [
    ("precision=int8_weight_only",),
    ("precision=int8_dynamic",),
    ("precision=fp8_weight_only",),
    ("precision=fp8_dynamic",),
    ("precision=fp8_dynamic", "precision.activation.fast_accumulation=true"),
    ("precision=bf16",),
    ("fusion=qkv",),
    ("fusion=qkv", "precision=int8_dynamic"),
    ("fusion=qkv", "precision=bf16"),
    ("precision=int8_weight_only", "precision.weight.format=int4"),
    ("precision=int8_weight_only", "precision.weight.format=nvfp4"),
    ("precision=int8_weight_only", "precision.weight.format=mxfp6_e2m3"),
    ("precision=int8_weight_only", "precision.weight.format=mxfp8_e4m3fn"),
    ("precision=int8_weight_only", "precision.weight.assign=['left=int4','odd=nvfp4','right=keep']"),
    (
        "precision=int8_dynamic",
        "precision.activation.mode=static",
        "precision.activation.granularity=tensor",
    ),
]


@pytest.mark.parametrize("overrides", SCHEMES, ids=" ".join)
def test_what_comes_back_is_what_was_saved_bit_for_bit(tmp_path, overrides):
    done, x = optimized(*overrides)
    done.save(tmp_path / "s")
    model = fresh()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    loaded = kp.load(tmp_path / "s", model)
    assert_same(done, loaded, x)
    assert loaded.report.verdict == done.report.verdict
    assert loaded.report.exit_code == 0
    assert loaded.report.verification.message == "the saved call gives the saved output, bit for bit"
    assert loaded.report.recipe["effective_digest"] == done.report.recipe["effective_digest"]
    assert [row.kernels for row in loaded.report.steps] == [row.kernels for row in done.report.steps]
    assert loaded.report.model.bytes_after == done.report.model.bytes_after
    # The caller's model is left as it was.
    assert model.training
    assert all(
        model.state_dict()[name].data_ptr() == address and torch.equal(model.state_dict()[name], value)
        for name, (address, value) in before.items()
    )


def test_layers_from_a_file_keep_fast_accumulation(tmp_path):
    done, _ = optimized("precision=fp8_dynamic", "precision.activation.fast_accumulation=true")
    done.save(tmp_path / "s")
    for result in (done, kp.load(tmp_path / "s", fresh())):
        layers = [module for module in result.model.modules() if isinstance(module, QuantizedLinear)]
        assert layers
        assert all(layer.activation.fast_accumulation for layer in layers)


def test_nothing_is_quantized_or_calibrated_again(tmp_path, monkeypatch):
    done, x = optimized("precision=int8_dynamic", "precision.activation.mode=static", "precision.activation.granularity=tensor")
    done.save(tmp_path / "s")

    def never(*_args, **_kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(QuantizedLinear, "from_linear", never)
    monkeypatch.setattr("kernel_pytorch.precision.quantize.observe_ranges", never)
    assert_same(done, kp.load(tmp_path / "s", fresh()), x)


def test_weights_that_are_not_finite_do_not_matter(tmp_path):
    done, x = optimized("fusion=qkv", "precision=int8_weight_only")
    done.save(tmp_path / "s")
    model = fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert_same(done, kp.load(tmp_path / "s", model), x)


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    done, x = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    facts = json.loads((tmp_path / "s" / "saved.json").read_text())
    assert facts["aliases"] == {"head.weight": "embed.weight"}
    loaded = kp.load(tmp_path / "s", fresh())
    assert loaded.model.head.weight is loaded.model.embed.weight
    # A model that was built with the tie left out gets the same values under both names.
    apart = fresh()
    apart.head.weight = nn.Parameter(torch.zeros(100, 64))
    assert_same(done, kp.load(tmp_path / "s", apart), x)


def test_a_loaded_model_is_saved_again(tmp_path):
    done, x = optimized("precision=int8_dynamic")
    done.save(tmp_path / "first")
    kp.load(tmp_path / "first", fresh()).save(tmp_path / "second")
    assert_same(done, kp.load(tmp_path / "second", fresh()), x)
    first, second = (json.loads((tmp_path / name / "saved.json").read_text()) for name in ("first", "second"))
    assert first["file"] == second["file"]


def test_memory_formats_recurrent_layers_and_views_come_back(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm, self.out = nn.Conv2d(3, 8, 3), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 32)

        def forward(self, x):
            y = self.conv(x).flatten(2).transpose(1, 2)
            return self.out(self.lstm(y)[0])

    torch.manual_seed(0)
    model, x = Mixed().to(memory_format=torch.channels_last), torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    done = kp.optimize(model, "eager", args=(x,), overrides=["precision=int8_weight_only"], trained=False, measure=False)
    done.save(tmp_path / "s")
    loaded = kp.load(tmp_path / "s", Mixed())
    assert torch.equal(loaded.model(x), done.model(x))
    assert loaded.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(a is b for a, b in zip(loaded.model.lstm._flat_weights, loaded.model.lstm.parameters(), strict=True))


def test_keyword_arguments_and_held_out_calls_are_what_is_replayed(tmp_path):
    model, x = trained()
    held = torch.randint(0, 100, (2, 3))
    arguments = {"args": (x,), "kwargs": {"gate": False}, "held_out": [((held,), {"gate": False})]}
    done = kp.optimize(model, "eager", overrides=["precision=int8_weight_only", "verify=off"], measure=False, **arguments)
    done.save(tmp_path / "s")
    probe = json.loads((tmp_path / "s" / "saved.json").read_text())["probe"]
    assert probe["kwargs"] == {"dict": [["gate", False]]}
    assert probe["outputs"] == ["output['logits']", "output['aux'][0]"]
    assert torch.equal(load_file(next((tmp_path / "s").glob("*.safetensors")))["probe.input.0"], held)
    assert kp.load(tmp_path / "s", fresh()).report.verification.rows == 2 * 2 * 3


CHILD = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    import kernel_pytorch as kp
    from test_save_load import fresh
    loaded = kp.load({folder!r}, fresh(), overrides={overrides!r})
    torch.save([loaded.model(torch.load({x!r})), loaded.report.verification.message, loaded.report.steps[2].kernels], {out!r})
"""


def in_another_process(tmp_path, x, overrides=(), **environ):
    """[output, how it was compared, kernels of the precision step] of a load elsewhere."""
    names = {
        "folder": str(tmp_path / "s"),
        "x": str(tmp_path / "x.pt"),
        "out": str(tmp_path / "out.pt"),
        "tests": str(Path(__file__).parent),
    }
    torch.save(x, names["x"])
    code = textwrap.dedent(CHILD.format(**names, overrides=list(overrides)))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environ})
    return torch.load(names["out"])


def test_another_process_gives_the_same_bits(tmp_path):
    done, x = optimized("fusion=qkv", "precision=int8_dynamic")
    done.save(tmp_path / "s")
    output, message, _ = in_another_process(tmp_path, x, OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert message == "the saved call gives the saved output, bit for bit"
    assert torch.equal(output["logits"], done.model(x)["logits"])


def test_a_machine_without_the_kernel_packs_for_its_own(tmp_path):
    """Saved in the C++ kernel's layout, loaded where it cannot be compiled: the file knows no kernel's layout."""
    done, x = optimized("precision=int8_dynamic")
    kernels = done.report.steps[2].kernels
    if kernels == ["int8_mm"]:
        pytest.skip("this machine has no kernel of its own")
    assert "weight_sum" in done.model.left.state_dict()
    done.save(tmp_path / "s")
    without = {"KERNEL_PYTORCH_CACHE": str(tmp_path / "empty"), "CXX": "/none", "PATH": ""}
    output, message, found = in_another_process(tmp_path, x, OMP_NUM_THREADS=str(torch.get_num_threads()), **without)
    assert found == ["int8_mm"]
    how = f"kernels {{'precision': {kernels}}}, here {{'precision': {found}}}"
    assert message == f"the saved call gives the saved output within rounding; not compared bit for bit: it was saved with {how}"
    expected = done.model(x)["logits"]
    assert (output["logits"] - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("saved_compiled", [False, True], ids=["saved before compile", "saved compiled"])
def test_compile_is_applied_again_or_anew(tmp_path, saved_compiled):
    done, x = optimized("precision=int8_dynamic", *(["compile=default"] if saved_compiled else []))
    done.save(tmp_path / "s")
    names = list(done.model.state_dict())
    loaded = kp.load(tmp_path / "s", fresh(), overrides=[] if saved_compiled else ["compile=default"])
    row = next(row for row in loaded.report.steps if row.group == "compile")
    assert (row.status, row.kernels) == ("applied", ["inductor"])
    assert loaded.model._compiled_call_impl is not None
    assert list(loaded.model.state_dict()) == names
    plain = kp.load(tmp_path / "s", fresh(), overrides=["compile=none"])
    assert next(row for row in plain.report.steps if row.group == "compile").optimizer is None
    expected = plain.model(x)["logits"]
    assert (loaded.model(x)["logits"] - expected).norm() / expected.norm() < 1e-4
    assert plain.report.recipe["effective_digest"] != loaded.report.recipe["effective_digest"]


def test_a_compiled_model_that_leaves_its_uncompiled_self_is_refused(tmp_path, monkeypatch):
    done, _ = optimized("precision=int8_dynamic")
    done.save(tmp_path / "s")

    def wrong(module, **_keywords):
        inner = module._call_impl

        def call(*args, **kwargs):
            output = inner(*args, **kwargs)
            return {"logits": output["logits"] * 1.01, "aux": output["aux"]}

        module._compiled_call_impl = call

    monkeypatch.setattr("kernel_pytorch.compile.inductor.compile_module", wrong)
    with pytest.raises(VerificationError, match=r"output\['logits'\]: the compiled model is 40\.0 dB from its own uncompiled steps"):
        kp.load(tmp_path / "s", fresh(), overrides=["compile=default"])


def test_overrides_are_of_the_groups_that_wrap_the_call(tmp_path):
    done, _ = optimized("precision=int8_dynamic")
    done.save(tmp_path / "s")
    with pytest.raises(ConfigError, match="overrides: found 'precision=none'; allowed compile, graph"):
        kp.load(tmp_path / "s", fresh(), overrides=["precision=none", "compile=default"])
    with pytest.raises(ConfigError, match="compile: found 'defualt'; allowed default"):
        kp.load(tmp_path / "s", fresh(), overrides=["compile=defualt"])


# What may stand in a folder that someone else sent.


def tampered(folder, change):
    """Applies `change(facts, tensors)` and makes sizes and hashes fit again: what only the load itself can find out."""
    path = folder / "saved.json"
    facts = json.loads(path.read_text())
    file = folder / facts["file"]["name"]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(facts, tensors)
    save_file(tensors, file)
    facts["file"].update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    path.write_text(json.dumps(facts))


def another_digest(facts):
    return digest(from_dict(facts["recipe"]["config"]))


def test_an_edited_recipe_is_refused(tmp_path):
    done, _ = optimized("precision=int8_dynamic")
    done.save(tmp_path / "s")

    def edit(facts, _):
        facts["recipe"]["config"]["precision"]["activation"]["symmetric"] = True

    tampered(tmp_path / "s", edit)
    with pytest.raises(
        ConfigError, match=r"recipe\.effective_digest: found [0-9a-f]{16}, the recipe beside it has [0-9a-f]{16}: it was changed"
    ):
        kp.load(tmp_path / "s", fresh())


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("precision", "os.system"),
        ("precision", "kernel_pytorch.fusion.projections.FuseProjections"),
        ("backend", "subprocess.Popen"),
        ("memory", "builtins.eval"),
    ],
)
def test_a_target_outside_the_allow_list_is_refused(tmp_path, group, target):
    done, _ = optimized("precision=int8_dynamic")
    done.save(tmp_path / "s")

    def edit(facts, _):
        facts["recipe"]["config"][group]["_target_"] = target
        facts["recipe"]["effective_digest"] = another_digest(facts)

    tampered(tmp_path / "s", edit)
    with pytest.raises(ConfigError, match=rf"recipe\.config\.{group}\._target_: found '{target}'; allowed"):
        kp.load(tmp_path / "s", fresh())


CHANGED = {
    "a group too many": (lambda facts, _: facts["recipe"]["config"].update(model={}), r"recipe\.config: found .*model.*; allowed backend"),
    "a key that the schema has not": (
        lambda facts, _: facts["recipe"]["config"]["precision"].update(speed=1),
        r"recipe\.config\.precision\.speed: found an unknown key",
    ),
    "a value out of range": (
        lambda facts, _: facts["recipe"]["config"]["precision"].update(min_features=0),
        r"recipe\.config\.precision\.min_features: found 0",
    ),
    "a module of no group": (
        lambda facts, _: facts["modules"]["left"].update(group="verify"),
        r"modules\.left\.group: found 'verify'; allowed",
    ),
    "a module of another step": (
        lambda facts, _: facts["modules"]["left"].update(group="fusion"),
        "modules: the file stores 1 modules of fusion, 0",
    ),
    "a module that is not there": (
        lambda facts, tensors: _rename_module(facts, tensors, "left", "../../left"),
        r"\.\./\.\./left: found no module in this model; allowed an nn\.Linear",
    ),
    "a module of another class": (
        lambda facts, tensors: _rename_module(facts, tensors, "left", "norm"),
        "norm: found a BatchNorm1d in this model",
    ),
    "a format that does not exist": (
        lambda facts, _: facts["modules"]["left"]["facts"].update(format="int3"),
        r"modules\.left\.facts: found .*int3.* in the file; allowed",
    ),
    "a format that is not the tensors'": (
        lambda facts, _: facts["modules"]["left"]["facts"].update(format="int4"),
        r"left\.weight: found int8 \[64, 64\] in the file; allowed uint8 \[64, 32\]",
    ),
    "another shape": (
        lambda _, tensors: tensors.update({"module.left.weight_scale": torch.ones(3)}),
        r"left\.weight_scale: found float32 \[3\] in the file; allowed float32 \[64\]",
    ),
    "a module left out": (
        lambda facts, _: facts["modules"].pop("left"),
        "left.weight: found in the model after the recipe's steps and not in the file",
    ),
    "a module's tensor left out": (lambda _, tensors: tensors.pop("module.left.weight"), r"found no tensor 'module\.left\.weight'"),
    "a tensor left out": (lambda _, tensors: tensors.pop("model.norm.running_mean"), r"norm\.running_mean: found in the model after"),
    "a tensor too many": (
        lambda _, tensors: tensors.update({"model.../x": torch.ones(1)}),
        r"\.\./x: found in the file and not in the model",
    ),
    "another element type": (
        lambda _, tensors: tensors.update({"model.tiny.bias": torch.zeros(4).half()}),
        r"tiny\.bias: found float16 \[4\] in the file, float32 \[4\] in the model",
    ),
    "an argument that no writer wrote": (
        lambda facts, _: facts["probe"].update(args={"tuple": [{"eval": "1"}]}),
        r"probe\.args\[0\]: found",
    ),
    "arguments that are no tuple": (lambda facts, _: facts["probe"].update(args=3), "probe: found other args than a tuple"),
    "an output that is not there": (lambda facts, _: facts["probe"]["outputs"].append("output"), r"found no tensor 'probe\.output\.2'"),
}


def _rename_module(facts, tensors, name, other):
    facts["modules"][other] = facts["modules"].pop(name)
    for key in [key for key in tensors if key.startswith(f"module.{name}.")]:
        tensors[key.replace(name, other)] = tensors.pop(key)


@pytest.mark.parametrize("case", CHANGED)
def test_facts_that_were_changed_are_refused(tmp_path, case):
    change, message = CHANGED[case]
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    kp.load(tmp_path / "s", fresh())
    tampered(tmp_path / "s", change)
    with pytest.raises(ConfigError, match=message):
        kp.load(tmp_path / "s", fresh())


def _one_code(_, tensors):
    # Column 5 of one row, by one step of 127.
    tensors["module.odd.weight"][7, 5] ^= 1


def _scale(_, tensors):
    tensors["module.left.weight_scale"].mul_(1.05)


def test_a_stored_value_that_was_changed_is_refused_on_the_machine_that_saved_it(tmp_path):
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    tampered(tmp_path / "s", _one_code)
    with pytest.raises(
        VerificationError, match=r"output\['aux'\]\[0\] is not what was saved on this machine: [\d,]+ of 1,280 values differ"
    ) as caught:
        kp.load(tmp_path / "s", fresh())
    assert str(caught.value).endswith("first diverging module: odd")
    assert caught.value.report.verification.first_divergence == "odd"
    assert (caught.value.report.verdict, caught.value.report.exit_code) == ("numerics", 5)


def test_another_machine_gets_a_rounding_and_no_more(tmp_path):
    """The same file as from a machine with other threads: a rounding passes, one scale five percent off does not."""
    done, x = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")

    def elsewhere(facts, tensors):
        facts["probe"]["machine"]["threads"] = 999
        tensors["probe.output.0"] *= 1 + 2e-7

    tampered(tmp_path / "s", elsewhere)
    loaded = kp.load(tmp_path / "s", fresh())
    here = torch.get_num_threads()
    how = f"within rounding; not compared bit for bit: it was saved with threads 999, here {here}"
    assert loaded.report.verification.message == f"the saved call gives the saved output {how}"
    gate = loaded.report.verification.implementation
    assert 120 < gate.end_to_end_sqnr_db < 145
    assert gate.end_to_end_floor_db == 60
    assert torch.equal(loaded.model(x)["logits"], done.model(x)["logits"])
    tampered(tmp_path / "s", _scale)
    with pytest.raises(
        VerificationError, match=r"output\['logits'\] is [\d.]+ dB from what was saved; 60\.0 dB is what rounding explains"
    ) as caught:
        kp.load(tmp_path / "s", fresh())
    assert "first diverging module: left" in str(caught.value)


def test_code_that_computes_something_else_is_refused(tmp_path):
    """The tensors fit, the module's own arithmetic is another one: only the call shows it."""
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    model = fresh()
    model.norm.eps = 1e-4
    with pytest.raises(VerificationError, match="first diverging module: norm"):
        kp.load(tmp_path / "s", model)
    model = fresh()
    model.position += 1e-3
    with pytest.raises(VerificationError, match="first diverging module: norm"):
        kp.load(tmp_path / "s", model)


def test_another_model_is_named_tensor_by_tensor(tmp_path):
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    with pytest.raises(ConfigError) as caught:
        kp.load(tmp_path / "s", fresh(width=32))
    assert caught.value.lines == [
        f"{tmp_path / 's'}: found another model, a Branches; allowed the Branches that was optimized: build it the same way",
        "right.weight: found float32 [32, 64] in the model, the saved one has float32 [64, 64]",
        "right.bias: found float32 [32] in the model, the saved one has float32 [64]",
    ]
    wider = fresh()
    wider.extra, wider.tiny = nn.Linear(2, 2), nn.Identity()
    with pytest.raises(ConfigError) as caught:
        kp.load(tmp_path / "s", wider)
    assert caught.value.lines[1:] == [
        "tiny.weight: found no such tensor in the model, the saved one has float32 [4, 33]",
        "tiny.bias: found no such tensor in the model, the saved one has float32 [4]",
        "extra.weight: found float32 [2, 2] in the model, the saved one has no such tensor",
        "extra.bias: found float32 [2] in the model, the saved one has no such tensor",
    ]
    with pytest.raises(ConfigError, match=r"and 9 more tensors"):
        kp.load(tmp_path / "s", fresh().to(torch.bfloat16))
    # The optimized model itself is not the original.
    with pytest.raises(ConfigError, match=r"left\.weight: found int8 \[64, 64\] in the model"):
        kp.load(tmp_path / "s", copy.deepcopy(done.model))


def test_a_model_on_a_device_without_a_backend_is_refused(tmp_path):
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    with pytest.raises(UnsupportedOperationError, match="the model is on meta"):
        kp.load(tmp_path / "s", fresh().to("meta"))


def test_a_recipe_that_may_only_run_on_its_hardware_is_refused_elsewhere(tmp_path):
    done, _ = optimized("precision=fp8_dynamic", "backend.hardware=h100")
    assert done.report.verdict == "emulated"
    done.save(tmp_path / "s")
    assert kp.load(tmp_path / "s", fresh()).report.verdict == "emulated"

    def insist(facts, _):
        facts["recipe"]["config"]["backend"]["on_mismatch"] = "error"
        facts["recipe"]["effective_digest"] = another_digest(facts)

    tampered(tmp_path / "s", insist)
    with pytest.raises(UnsupportedOperationError, match=r"the recipe is for h100.*on_mismatch=emulate"):
        kp.load(tmp_path / "s", fresh())


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(x)

    def get_extra_state(self):
        return {"anything": object()}

    def set_extra_state(self, state):
        pass


def test_state_that_only_pickle_could_hold_is_refused(tmp_path):
    done = kp.optimize(
        Remembers(), "eager", args=(torch.randn(8, 32),), overrides=["precision=int8_weight_only"], trained=False, measure=False
    )
    with pytest.raises(UnsupportedOperationError, match="the model: Remembers keeps extra state, which needs pickle"):
        done.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_call_that_no_file_can_hold_is_refused_and_held_out_is_the_way_out(tmp_path):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x, options=None):
            return self.linear(x)

    x = torch.randn(8, 32)
    arguments = {
        "args": (x,),
        "kwargs": {"options": {1, 2}},
        "overrides": ["precision=int8_weight_only"],
        "trained": False,
        "measure": False,
    }
    done = kp.optimize(Takes(), "eager", **arguments)
    with pytest.raises(ConfigError, match=r"kwargs\['options'\]: found a set; a saved call holds .*held_out=\[\(args, kwargs\)\]"):
        done.save(tmp_path / "s")
    done = kp.optimize(Takes(), "eager", **arguments, held_out=[((x,), {})])
    done.save(tmp_path / "s")
    assert torch.equal(kp.load(tmp_path / "s", Takes()).model(x), done.model(x))


def test_a_model_that_draws_random_numbers_is_compared_within_rounding(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x) * (1 + 1e-6 * self.calls)

    x = torch.randn(8, 32)
    done = kp.optimize(Noisy(), "eager", args=(x,), overrides=["precision=int8_weight_only"], trained=False, measure=False)
    done.save(tmp_path / "s")
    loaded = kp.load(tmp_path / "s", Noisy())
    assert loaded.report.verification.message.endswith("two calls gave different bits when it was saved")


def test_a_pattern_that_matched_when_it_was_saved_still_must(tmp_path):
    """Fusion runs again on the caller's model: names that the recipe includes are looked for there."""
    done, _ = optimized("fusion=qkv", "fusion.include=['left','right']")
    done.save(tmp_path / "s")

    def edit(facts, _):
        facts["recipe"]["config"]["fusion"]["include"] = ["up"]
        facts["recipe"]["effective_digest"] = another_digest(facts)

    tampered(tmp_path / "s", edit)
    with pytest.raises(NoEffectError, match="'up'"):
        kp.load(tmp_path / "s", fresh())


KILLED = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_save_load import optimized
    done, _ = optimized("precision=int8_weight_only")
    print("ready", flush=True)
    while True:
        done.save({folder!r}, overwrite=True)
        print("saved", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_save_that_is_killed_at_any_moment_leaves_a_whole_one(tmp_path):
    done, x = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    code = textwrap.dedent(KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "s")))
    for delay_s in (0.0, 0.003, 0.01, 0.02):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert torch.equal(kp.load(tmp_path / "s", fresh()).model(x)["logits"], done.model(x)["logits"])
    done.save(tmp_path / "s", overwrite=True)
    assert sorted(path.suffix for path in (tmp_path / "s").iterdir()) == [".json", ".safetensors"]


def test_what_a_killed_save_left_is_gone_after_the_next(tmp_path):
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    # safetensors was killed while it wrote a file of a name of its own.
    (tmp_path / "s" / f"{saved_files._TEMPORARY}4567").mkdir()
    for name in (".saved.json.m9bhwrbi", f"{saved_files._TEMPORARY}0123", f"{saved_files._TEMPORARY}4567/.tmpvWWvoN"):
        (tmp_path / "s" / name).write_text("half")
    done.save(tmp_path / "s", overwrite=True)
    assert sorted(path.suffix for path in (tmp_path / "s").iterdir()) == [".json", ".safetensors"]


def test_all_that_is_written_before_it_is_whole_lies_where_the_next_save_looks(tmp_path, monkeypatch):
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    seen: set[str] = set()
    write = saved_files.save_file

    def watched(tensors, path):
        def look() -> None:
            while not stop.is_set():
                seen.update(path.name for path in (tmp_path / "s").iterdir())

        stop = threading.Event()
        watcher = threading.Thread(target=look)
        watcher.start()
        for _ in range(20):
            write({**tensors, "more": torch.zeros(2**20)}, path)
        write(tensors, path)
        stop.set()
        watcher.join()

    monkeypatch.setattr(saved_files, "save_file", watched)
    done.save(tmp_path / "s", overwrite=True)
    assert {name[: len(saved_files._TEMPORARY)] for name in seen if name.startswith(".")} == {saved_files._TEMPORARY}


def test_no_pickle_in_the_folder_and_none_in_the_code(tmp_path):
    done, _ = optimized("precision=int8_weight_only")
    done.save(tmp_path / "s")
    names = {path.suffix for path in (tmp_path / "s").iterdir()}
    assert names == {".json", ".safetensors"}
    for name in ("saved", "saved_call", "restore", "replay"):
        text = (ROOT / "kernel_pytorch" / "engine" / f"{name}.py").read_text()
        assert "torch.load" not in text
        assert "import pickle" not in text


def test_minilm_through_the_shipped_recipe(tmp_path):
    transformers = pytest.importorskip("transformers")
    from kernel_pytorch.models.minilm import MiniLM

    model = MiniLM().load(data=None, seed=0, device=torch.device("cpu")).model
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (8, 32))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    done = kp.optimize(model, "cpu_int8", kwargs=call, overrides=["compile=none"], trained=False, measure=False)
    done.save(tmp_path / "s")
    loaded = kp.load(tmp_path / "s", transformers.BertModel(model.config))
    assert torch.equal(loaded.model(**call).last_hidden_state, done.model(**call).last_hidden_state)
    assert [(row.changed, row.kernels) for row in loaded.report.steps] == [(row.changed, row.kernels) for row in done.report.steps]
    assert loaded.report.verification.message == "the saved call gives the saved output, bit for bit"
    # Embeddings stay float32, 4 bytes each; the 42 int8 layers are a quarter of theirs.
    assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) < 0.7 * done.report.model.bytes_before
