"""A model made from a file: what the file or the model has that cannot be restored is refused, with its name."""

from __future__ import annotations

import json
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
