import sys

import pytest
import torch

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.factory import UserFactory
from kernel_pytorch.models.text import RandomTokens
from kernel_pytorch.schema import Phase

CPU = torch.device("cpu")
SOURCE = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
    def forward(self, x, scale=1.0):
        return self.linear(x) * scale

def with_args():
    return Scaled(), (torch.randn(4, 3),)

def with_kwargs():
    return Scaled(), [torch.randn(4, 3)], {"scale": torch.tensor(2.0)}

def tokens():
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 2))

def alone():
    return Scaled()

def nothing():
    return None

def wrong():
    return Scaled(), torch.randn(4, 3)

constant = 3
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    (tmp_path / "user_models.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "user_broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "user_needs.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("user_models", "user_broken", "user_needs"):
        sys.modules.pop(name, None)


def load(factory, data=None, seed=0, **fields):
    return UserFactory(factory=factory, **fields).load(data=data, seed=seed, device=CPU)


def test_args_become_the_workload_and_follow_the_seed():
    path = list(sys.path)
    first, again, other = (load("user_models:with_args", seed=seed) for seed in (0, 0, 1))
    outputs = [loaded.workload.call(loaded.model) for loaded in (first, again, other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert (first.workload.batch, first.name, first.model.training) == (4, "Scaled of user_models:with_args", False)
    assert sys.path == path


def test_kwargs_and_dtype_reach_the_model():
    loaded = load("user_models:with_kwargs", dtype="bfloat16", phase=Phase.prefill)
    output = loaded.workload.call(loaded.model)
    assert (output.shape, output.dtype, loaded.workload.phase) == ((4, 5), torch.bfloat16, "prefill")
    assert torch.equal(output, loaded.model(loaded.workload._timed[0][0]) * 2)


def test_a_module_alone_is_fed_tokens_of_its_embedding():
    loaded = load("user_models:tokens", data=RandomTokens(batch=2, length=4))
    assert loaded.workload.call(loaded.model).shape == (2, 4, 2)
    assert torch.cat(list(loaded.workload.held_out(loaded.model, 20))).shape == (20, 2)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (None, "needs module:function"),
        ("user_models", "found 'user_models'; a module, a colon and a function"),
        ("user_models:", "found 'user_models:'"),
        ("user_absent:build", "user_absent cannot be imported: No module named 'user_absent'"),
        ("user_needs:build", "user_needs cannot be imported: No module named 'a_package_that_is_not_there'"),
        ("user_broken:build", "user_broken.py, line 1: "),
        ("user_models:absent", "has no function 'absent'"),
        ("user_models:constant", "has no function 'constant'"),
        ("user_models:nothing", r"returned NoneType; allowed: an nn.Module, \(module, args\)"),
        ("user_models:wrong", r"returned \(Scaled, Tensor\)"),
        ("user_models:alone", "has no embedding to feed tokens to"),
    ],
)
def test_mistakes_are_one_line(factory, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(factory)
    assert "\n" not in str(caught.value)
