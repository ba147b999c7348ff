"""The template around the steps: order, evidence for every hook, what training refuses, and layouts that leave the caller's model alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import nn

from kernel_pytorch.backends.base import Backend
from kernel_pytorch.backends.cpu import CpuBackend
from kernel_pytorch.backends.memory import MemoryManager
from kernel_pytorch.backends.optimizer import BackendOptimizer, Hook, HookReceipt
from kernel_pytorch.backends.torch_cuda import TorchCudaBackend
from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.optimizer import Context, Workload, replace_module
from kernel_pytorch.schema import OnMismatch


class Call(Workload):
    def call(self, model: nn.Module) -> torch.Tensor:
        return model(torch.zeros(1, 3, 8, 8))

    probe = call

    def held_out(self, model: nn.Module, num_rows: int) -> Iterator[torch.Tensor]:
        yield self.call(model)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 16, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 4))
    return model.eval()


def backend(kind: type[Backend] = CpuBackend) -> Backend:
    return kind(hardware="any", on_mismatch=OnMismatch.error)


def run(
    model: nn.Module, own: Backend | None = None, *, replace=lambda model: model, wrap=lambda model: model, training=False, emulate=False
) -> tuple[nn.Module, dict[str, HookReceipt]]:
    own = own or backend()
    receipts: list[HookReceipt] = []
    template = own.optimizer.optimize_for_training if training else own.optimizer.optimize_for_inference
    made = template(model, Context(own, Call(), emulate=emulate), replace=replace, wrap=wrap, receipts=receipts)
    return made, {receipt.name: receipt for receipt in receipts}


def test_hooks_stand_before_between_and_after_the_steps() -> None:
    seen: list[str] = []

    class Loud(BackendOptimizer):
        def _say(self, when: str) -> Iterable[Hook]:
            def act(model: nn.Module) -> None:
                seen.append(f"{when} {type(model).__name__}")

            return [Hook(when, lambda _: {"num_seen": len(seen)}, act)]

        def before(self, context: Context, *, training: bool) -> Iterable[Hook]:
            return self._say("before")

        def between(self, context: Context, *, training: bool) -> Iterable[Hook]:
            return self._say("between")

        def after(self, context: Context, *, training: bool) -> Iterable[Hook]:
            return self._say("after")

    class LoudBackend(CpuBackend):
        def make_optimizer(self) -> BackendOptimizer:
            return Loud(self)

    def replace(model: nn.Module) -> nn.Module:
        seen.append("replace")
        return nn.Identity()

    def wrap(model: nn.Module) -> nn.Module:
        seen.append("wrap")
        return nn.Tanh()

    made, receipts = run(make_model(), backend(LoudBackend), replace=replace, wrap=wrap)
    assert seen == ["before Sequential", "replace", "between Identity", "wrap", "after Tanh"]
    assert type(made) is nn.Tanh
    assert receipts["between"] == HookReceipt("between", "between", {"num_seen": 2}, {"num_seen": 3})


def test_a_hook_that_changed_nothing_is_listed_as_skipped_whatever_it_says() -> None:
    class Idle(BackendOptimizer):
        def before(self, context: Context, *, training: bool) -> Iterable[Hook]:
            yield Hook("silent", lambda _: {"bytes": 5}, lambda _: None)
            yield Hook("honest", lambda _: {"bytes": 5}, lambda _: "no such unit here")

    class IdleBackend(CpuBackend):
        def make_optimizer(self) -> BackendOptimizer:
            return Idle(self)

    _, receipts = run(make_model(), backend(IdleBackend))
    assert receipts["silent"].skipped == "it changed nothing that it measures"
    assert receipts["honest"].skipped == "no such unit here"


def test_every_hook_has_figures_or_a_reason() -> None:
    for model in (make_model(), make_model().train(), nn.Linear(2, 2)):
        _, receipts = run(model)
        assert list(receipts) == ["mode", "conv_layout", "release_memory"]
        for receipt in receipts.values():
            assert (receipt.before != receipt.after) == (not receipt.skipped)


@pytest.mark.parametrize(("training", "was", "left"), [(False, 5, 0), (True, 0, 5)])
def test_the_mode_is_set_and_counted(training: bool, was: int, left: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout())).train(not training)
    made, receipts = run(model, training=training)
    assert made.training is training
    assert receipts["mode"].before == {"num_modules_in_training": was}
    assert receipts["mode"].after == {"num_modules_in_training": left}


def test_convolutions_get_the_vendors_layout_and_the_caller_keeps_the_weights() -> None:
    model, x = make_model(), torch.randn(2, 3, 8, 8)
    weights = {name: (parameter, parameter.stride()) for name, parameter in model.named_parameters()}
    expected = model(x)
    made, receipts = run(model)
    conv = made.get_submodule("0")
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv.weight is not weights["0.weight"][0]
    assert conv.bias is weights["0.bias"][0]
    assert torch.equal(conv.weight, weights["0.weight"][0])
    assert {name: parameter.stride() for name, (parameter, _) in weights.items()} == {name: stride for name, (_, stride) in weights.items()}
    assert (made(x) - expected).norm() / expected.norm() < 1e-5
    assert list(made.state_dict()) == list(make_model().state_dict())
    figures = {"layout": "channels_last", "num_convolutions": 2}
    assert receipts["conv_layout"] == HookReceipt("between", "conv_layout", {**figures, "num_laid_out": 0}, {**figures, "num_laid_out": 2})


def test_a_weight_that_two_convolutions_share_stays_one() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    model[1].weight = model[0].weight
    made, _ = run(model)
    assert made.get_submodule("0").weight is made.get_submodule("1").weight
    assert made.get_submodule("0").weight.is_contiguous(memory_format=torch.channels_last)


class Scaled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("model", "keywords", "reason"),
    [
        (nn.Sequential(nn.Linear(2, 2)), {}, "the model has no nn.Conv2d below its root"),
        (nn.Sequential(Scaled(3, 4, 3)), {}, "the model has no nn.Conv2d below its root"),
        (nn.Sequential(nn.Conv2d(8, 4, 1)), {}, "the weights lie like that already"),
        (make_model(), {"emulate": True}, "an emulated run keeps the model's own layout"),
        (make_model(), {"training": True}, "training updates the caller's own parameters, which a new layout would copy"),
    ],
)
def test_a_layout_that_is_not_changed_says_why(model: nn.Module, keywords: dict[str, bool], reason: str) -> None:
    weights = list(model.parameters())
    made, receipts = run(model, **keywords)
    assert receipts["conv_layout"].skipped == reason
    assert all(one is other for one, other in zip(made.parameters(), weights, strict=True))


def test_memory_that_the_pools_keep_is_released_and_counted() -> None:
    own = backend()
    own.memory.return_tensor(own.memory.allocate_tensor((1000,)))
    _, receipts = run(nn.Linear(2, 2), own)
    assert receipts["release_memory"].before == {"cached_bytes": None, "pooled_bytes": 4096}
    assert receipts["release_memory"].after == {"cached_bytes": None, "pooled_bytes": 0}
    _, receipts = run(nn.Linear(2, 2), own)
    assert receipts["release_memory"].skipped == "nothing is kept that could be given back"


def test_training_refuses_steps_that_take_gradients_away() -> None:
    def freeze(model: nn.Module) -> nn.Module:
        replace_module(model, "4", nn.Linear(8 * 36, 4).requires_grad_(False))
        return model

    with pytest.raises(
        UnsupportedOperationError, match=r"training: the steps leave 1,600 of 2,756 trainable values; 4\.weight is the first"
    ):
        run(make_model(), replace=freeze, training=True)
    made, _ = run(make_model(), replace=freeze)
    assert not made.get_submodule("4").weight.requires_grad


def test_training_accepts_parameters_that_were_merged() -> None:
    def merge(model: nn.Module) -> nn.Module:
        replace_module(model, "4", nn.Sequential(nn.Linear(8 * 36, 4)))
        return model

    made, receipts = run(make_model(), replace=merge, training=True)
    assert made.training
    assert receipts["mode"].skipped == ""


def test_receipts_survive_a_step_that_raises() -> None:
    def fail(_: nn.Module) -> nn.Module:
        raise UnsupportedOperationError("no")

    own, receipts = backend(), list[HookReceipt]()
    with pytest.raises(UnsupportedOperationError):
        own.optimizer.optimize_for_inference(make_model(), Context(own, Call()), replace=fail, wrap=lambda model: model, receipts=receipts)
    assert [receipt.name for receipt in receipts] == ["mode"]


def test_vendors_share_the_template_and_the_manager() -> None:
    """What is the same for every vendor is written once: a vendor's class holds its facts alone."""
    template = {"facts", "plan_for", "available_memory_bytes", "wanted_vendor"}
    for kind in (CpuBackend, TorchCudaBackend, *TorchCudaBackend.__subclasses__()):
        assert not template & set(vars(kind)), kind
    manager = {"allocate_tensor", "return_tensor", "optimize_memory_usage", "get_memory_stats"}
    assert all(not manager & set(vars(kind)) for kind in MemoryManager.__subclasses__() if kind.__module__.startswith("kernel_pytorch"))
