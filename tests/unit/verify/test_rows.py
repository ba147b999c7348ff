"""Agreement figures against values worked out by hand."""

import math

import pytest
import torch

from kernel_pytorch.verify.rows import agreement, relative_l2, sqnr_db


def test_sqnr_of_a_tenth_is_twenty_db():
    signal = torch.tensor([3.0, 4.0])
    assert sqnr_db(signal, signal * 1.1) == pytest.approx(20.0, abs=1e-5)


def test_sqnr_of_equal_is_infinite_and_of_nan_is_nan():
    signal = torch.ones(4)
    assert sqnr_db(signal, signal) == math.inf
    assert math.isnan(sqnr_db(signal, signal * math.nan))


def test_cosine_is_the_least_over_rows():
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    second = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    found = agreement(first, second)
    assert found.cosine_min == pytest.approx(math.sqrt(0.5))
    assert found.max_abs == 1.0
    assert found.rows == 2


def test_top1_counts_rows_with_the_same_largest_entry():
    first = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 5.0], [1.0, 0.0]])
    second = torch.tensor([[0.0, 9.0], [1.0, 2.0], [0.0, 4.0], [3.0, 0.0]])
    assert agreement(first, second).top1 == 0.75


def test_a_zero_row_against_a_row_that_is_not_does_not_agree():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert agreement(zero, zero).cosine_min == 1.0
    assert agreement(one, zero).cosine_min == 0.0


def test_not_finite_output_never_agrees():
    found = agreement(torch.ones(2, 2), torch.tensor([[1.0, 1.0], [math.inf, 1.0]]))
    assert math.isnan(found.cosine_min)
    assert math.isnan(found.sqnr_db)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="differ in shape"):
        agreement(torch.ones(2, 2), torch.ones(2, 3))


@pytest.mark.parametrize(("actual", "expected"), [([0.0, 0.0], 0.0), ([1.0, 0.0], math.inf), ([math.nan, 0.0], math.inf)])
def test_relative_l2_of_a_zero_reference(actual, expected):
    assert relative_l2(torch.tensor(actual), torch.zeros(2)) == expected
