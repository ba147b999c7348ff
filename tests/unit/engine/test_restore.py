"""A model made from a file: what the file or the model has that cannot be restored is refused, with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kernel_pytorch as kp
from kernel_pytorch.errors import ConfigError

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    done = kp.optimize(build(), "eager", args=(X,), overrides=["precision=int8_weight_only"], trained=False, measure=False)
    done.save(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("value", [["int8"], {"a": 1}, None, 8, "int9"])
def test_a_format_that_is_none_of_ours_is_refused_with_file_and_key(folder: Path, value: Any) -> None:
    raw = json.loads((folder / "saved.json").read_text())
    raw["modules"]["0"]["facts"]["format"] = value
    (folder / "saved.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"s/saved\.json: modules\.0\.facts: found \{'format': .*; allowed .*format of int8, ") as caught:
        kp.load(folder, build())
    assert len(caught.value.lines) == 1


class Tapped(nn.Linear):
    """Adds something that a quantized layer does not have."""


def _hook(model: nn.Sequential) -> None:
    model[2].register_forward_hook(lambda *_: None)


def _pre_hook(model: nn.Sequential) -> None:
    model[2].register_forward_pre_hook(lambda *_: None)


def _tie(model: nn.Sequential) -> None:
    model.get_submodule("2").weight = model.get_submodule("0").weight


def _subclass(model: nn.Sequential) -> None:
    model[2] = Tapped(32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_hook, r"modules\.2: found .*: it has forward hooks, which may read its weight"),
        (_pre_hook, r"modules\.2: found .*: it has forward hooks, which may read its weight"),
        (_tie, r"modules\.0: found .*: its weight is shared with 2\.weight"),
        (_subclass, r"modules\.2: found .*: Tapped is a subclass of nn\.Linear"),
    ],
)
def test_a_layer_that_optimize_skips_is_not_replaced_from_a_file(
    folder: Path, change: Callable[[nn.Sequential], None], message: str
) -> None:
    model = build()
    change(model)
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=message):
        kp.load(folder, model)
    assert dict(model.named_modules()) == before


def test_a_hook_on_a_layer_that_stays_is_called(folder: Path) -> None:
    model, calls = build(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    loaded = kp.load(folder, model).model
    calls.clear()
    loaded(X)
    assert calls == [1]
