"""What the engine puts around a model's call, which stands before every replay: the steps' contexts and inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from kernel_pytorch.engine.apply import Built, enter_contexts


class Seen(nn.Module):
    """Notes what it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def forward(self, x: torch.Tensor, fails: bool = False) -> torch.Tensor:
        self.log.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        if fails:
            raise KeyError("of the model")
        return x + 1


def noted(log: list[Any], name: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def context() -> Iterator[None]:
        log.append(f"in {name}")
        try:
            yield
        finally:
            log.append(f"out {name}")

    return context


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (torch.inference_mode, (True, False)),
        (lambda: torch.inference_mode(False), (False, True)),
        (torch.no_grad, (False, False)),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_calls_run_in_every_context_and_leave_all(make: Callable[[], Any], inside: tuple[bool, bool], fails: bool) -> None:
    model = Seen()
    enter_contexts(Built(model, [noted(model.log, "outer"), make, noted(model.log, "inner")]))
    for _ in range(2):
        if fails:
            with pytest.raises(KeyError, match="of the model"):
                model(torch.zeros(1), fails=True)
        else:
            model(torch.zeros(1))
        assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == (False, True)
    assert model.log == ["in outer", "in inner", inside, "out inner", "out outer"] * 2


def test_a_callers_gradients_inside_inference_mode_are_off_in_the_call() -> None:
    model = Seen()
    enter_contexts(Built(model, [torch.inference_mode]))
    with torch.inference_mode(), torch.enable_grad():
        model(torch.zeros(1))
        assert torch.is_grad_enabled()
    assert model.log == [(True, False)]


def test_a_model_without_contexts_is_called_as_it_was() -> None:
    model = Seen()
    enter_contexts(Built(model))
    assert model._compiled_call_impl is None


def test_a_callers_own_compile_goes_through() -> None:
    model = nn.Linear(2, 2)
    enter_contexts(Built(model, [torch.inference_mode]))
    x = torch.ones(1, 2)
    compiled = torch.compile(lambda given: model(given) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x) * 2)
