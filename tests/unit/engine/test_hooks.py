"""The backend's hooks in a whole run: reported, verified with the rest, the same when a saved model is loaded, never in the baseline."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kernel_pytorch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.body(torch.relu(self.stem(x))))).mean(dim=(2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def receipts(done: kernel_pytorch.Report) -> dict[str, dict]:
    return {hook["name"]: hook for hook in done.hooks}


def test_the_report_shows_each_hook_and_the_model_is_verified_with_them(net: nn.Module, x: torch.Tensor) -> None:
    done = kernel_pytorch.optimize(net, "eager", args=(x,), measure=False)
    assert done.report.hooks == []
    done = kernel_pytorch.optimize(net, "cpu_int8", args=(x,), overrides=["compile=none", "precision.min_features=1"], measure=False)
    found = receipts(done.report)
    assert list(found) == ["mode", "conv_layout", "release_memory"]
    assert found["conv_layout"]["after"] == {"layout": "channels_last", "num_convolutions": 2, "num_laid_out": 2}
    assert done.model.get_submodule("body").weight.is_contiguous(memory_format=torch.channels_last)
    assert net.get_submodule("body").weight.is_contiguous()
    assert done.report.verdict == "pass"
    assert done.report.verification.sqnr_db is not None
    assert done.report.to_dict()["hooks"] == done.report.hooks


def test_a_saved_model_is_loaded_in_the_same_layout_and_gives_the_same_bits(net: nn.Module, x: torch.Tensor, tmp_path) -> None:
    done = kernel_pytorch.optimize(net, "cpu_int8", args=(x,), overrides=["compile=none", "precision.min_features=1"], measure=False)
    done.save(tmp_path / "saved")
    loaded = kernel_pytorch.load(tmp_path / "saved", Net().eval())
    assert receipts(loaded.report)["conv_layout"]["after"]["num_laid_out"] == 2
    assert torch.equal(loaded.model(x), done.model(x))


def test_inplace_leaves_train_mode_and_says_so(net: nn.Module, x: torch.Tensor) -> None:
    net.train()
    done = kernel_pytorch.optimize(
        net, "cpu_int8", args=(x,), overrides=["compile=none", "precision.min_features=1"], measure=False, inplace=True
    )
    assert done.model is net
    assert receipts(done.report)["mode"]["before"] == {"num_modules_in_training": 5}
    assert receipts(done.report)["mode"]["after"] == {"num_modules_in_training": 0}


def test_an_emulated_run_keeps_the_layout(net: nn.Module, x: torch.Tensor) -> None:
    done = kernel_pytorch.optimize(net, "a100_fp8", args=(x,), overrides=["precision.min_features=1"], measure=False)
    assert done.report.verdict == "emulated"
    assert receipts(done.report)["conv_layout"]["skipped"] == "an emulated run keeps the model's own layout"
    assert done.model.get_submodule("body").weight.is_contiguous()
