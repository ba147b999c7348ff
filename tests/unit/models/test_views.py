from dataclasses import dataclass

import pytest
import torch

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.views import first_floating, output_rows, pooled_rows, spread_rows, to_rows, token_rows


@dataclass
class Nested:
    ids: torch.Tensor
    parts: dict


def test_first_floating_tensor_is_found_in_any_nesting():
    hidden = torch.arange(6.0).view(2, 3)
    assert first_floating(Nested(torch.ones(2, dtype=torch.int64), {"a": [None, (hidden,)]})).tolist() == hidden.tolist()


def test_no_floating_tensor_is_a_mistake_of_one_line():
    with pytest.raises(ConfigError, match="returned dict without a floating-point tensor"):
        output_rows({"ids": torch.ones(3, dtype=torch.int64)})


def test_heads_of_one_leading_shape_stand_side_by_side():
    first, second, other = torch.ones(4, 2), torch.zeros(4, 3), torch.full((2, 2), 9.0)
    rows = to_rows(output_rows((first, second, other)))
    assert rows.tolist() == [[1, 1, 0, 0, 0]] * 4


@pytest.mark.parametrize(("shape", "expected"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4))])
def test_rows_are_flattened_float32(shape, expected):
    rows = to_rows(output_rows(torch.ones(shape, dtype=torch.bfloat16)))
    assert (tuple(rows.shape), rows.dtype) == (expected, torch.float32)


def test_pooling_takes_kept_tokens_only_and_leaves_out_samples_without_any():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0]] * 3])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert pooled_rows(hidden, mask).tolist() == [[2.0, 4.0]]


def test_token_rows_are_the_kept_tokens_in_order():
    hidden = torch.arange(12.0).view(2, 3, 2)
    assert token_rows((hidden,), torch.tensor([[1, 0, 0], [0, 1, 1]])).tolist() == [[0, 1], [8, 9], [10, 11]]


def test_spread_rows_keeps_the_first_and_the_last():
    rows = torch.arange(10.0).view(10, 1)
    assert spread_rows(rows, 4).flatten().tolist() == [0, 3, 6, 9]
    assert spread_rows(rows, 10).flatten().tolist() == list(range(10))
