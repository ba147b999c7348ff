"""The quality gate, the noise that the end-to-end gate allows, and the search for the first module that diverged."""

import math

import pytest
import torch
from torch import nn

from kernel_pytorch.engine.clone import structural_clone
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.report.result import Verification
from kernel_pytorch.schema import QualityFloor, VerifyConfig
from kernel_pytorch.verify.model import ModelValidator, collect_rows, first_divergence, floors, rounding_noise
from kernel_pytorch.verify.rows import sqnr_db


def test_the_higher_floor_counts():
    found = floors(QualityFloor(cosine_min=0.99, sqnr_db=18.0), VerifyConfig(cosine_min=0.995, sqnr_db=10.0), torch.float32)
    assert found == {"cosine_min": 0.995, "sqnr_db": 18.0}


def test_a_scheme_without_a_floor_gets_what_rounding_leaves():
    assert floors(QualityFloor(), VerifyConfig(), torch.float32) == {"cosine_min": 0.9999, "sqnr_db": 60.0}
    assert floors(QualityFloor(), VerifyConfig(), torch.bfloat16) == {"cosine_min": 0.99, "sqnr_db": 20.0}


def judge(actual, *, gated=True, logits=False, **verify):
    expected = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    into = Verification()
    wanted = floors(QualityFloor(cosine_min=0.9, sqnr_db=15.0), VerifyConfig(**verify), torch.float32)
    return ModelValidator(floors=wanted, gated=gated).judge(expected, actual, logits=logits, into=into), into


def test_a_miss_says_by_how_much():
    misses, into = judge(torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
    assert misses == ["cosine_min 0.70711 is below 0.9", "sqnr_db 14.15 is below 15"]
    assert into.rows == 2
    assert into.cosine_min == pytest.approx(math.sqrt(0.5))


def test_max_abs_and_top1_are_gated_when_asked_for():
    near = torch.tensor([[3.0, 4.1], [1.0, 0.0]])
    assert judge(near)[0] == []
    assert judge(near, max_abs=0.05)[0] == ["max_abs 0.1 is above 0.05"]
    flipped = torch.tensor([[4.0, 3.0], [1.0, 0.0]])
    assert "top1_agreement 0.5 is below 0.9" in judge(flipped, logits=True, top1_agreement=0.9)[0]


def test_random_weights_are_reported_and_only_not_finite_fails():
    assert judge(torch.tensor([[-3.0, 4.0], [0.0, 1.0]]), gated=False)[0] == []
    assert judge(torch.tensor([[math.nan, 4.0], [0.0, 1.0]]), gated=False)[0] == ["the optimized model's outputs are not finite"]


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 16), (torch.bfloat16, 1)])
def test_rounding_noise_is_of_the_size_it_says_and_leaves_nothing_behind(dtype, roundings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256, bias=False))
    workload = CallWorkload((torch.randn(500, 64),))
    clean = collect_rows(model, workload, 500)
    with rounding_noise(model, dtype, seed=1):
        disturbed = collect_rows(model, workload, 500)
    expected_db = -20 * math.log10(roundings * torch.finfo(dtype).eps / 2)
    assert sqnr_db(clean, disturbed) == pytest.approx(expected_db, abs=0.5)
    assert torch.equal(collect_rows(model, workload, 500), clean)


def test_the_first_module_that_diverged_is_named_in_the_order_of_calls():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    changed = structural_clone(model)
    wrong = nn.Linear(32, 32)
    changed[1] = wrong
    workload = CallWorkload((torch.randn(8, 32),))
    assert first_divergence(model, changed, workload, floor_db=20.0) == "1"
    assert first_divergence(model, structural_clone(model), workload, floor_db=100.0) is None
