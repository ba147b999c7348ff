"""Which tensors stand for the arguments of a kind of call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernel_pytorch.graph import signature
from kernel_pytorch.graph.signature import Signature

CASES = {
    "another tensor": (lambda t: torch.ones_like(t), True),
    "a parameter": (lambda t: nn.Parameter(t.clone()), True),
    "made in inference mode": (lambda t: _inferred(t), True),
    "another dtype": (lambda t: t.double(), False),
    "another shape": (lambda t: t[:2], False),
    "other strides": (lambda t: t.t().contiguous().t(), False),
    "a lazy negative": (lambda t: torch.complex(t, t).conj().imag, False),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), False),
    "sparse": (lambda t: t.to_sparse(), False),
    "sparse rows": (lambda t: t.to_sparse_csr(), False),
    "resized in place": (lambda t: t.clone().resize_(3, 2), False),
}


def _inferred(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


@pytest.fixture(params=["compiled", "without the compiled check"], autouse=True)
def _check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "compiled":
        monkeypatch.setattr(signature, "_TENSOR_GUARDS", None)


@pytest.mark.parametrize("name", CASES)
def test_what_stands_for_a_tensor(name: str) -> None:
    make, expected = CASES[name]
    plain, first = torch.zeros(5, dtype=torch.int64), torch.zeros(3, 4)
    known = Signature([plain, first])
    changed = make(first)
    for _ in range(6):
        assert known.fits([plain, changed]) is expected
        assert known.fits([plain, first])


def test_a_lazy_conjugate_does_not_stand_for_its_tensor() -> None:
    first = torch.zeros(3, 4, dtype=torch.complex64)
    assert not Signature([first]).fits([first.conj()])


def test_the_compiled_check_follows_callers_who_change_how_they_make_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    if signature._TENSOR_GUARDS is None:
        pytest.skip("what is tested is left out")
    first = torch.zeros(3, 4)
    known, other = Signature([first]), _inferred(first)
    assert known._alike is not None
    assert not known._alike(other)
    assert known.fits([other])
    assert known._alike(other)
