"""calibration_rows runs what calibrate runs and hands out the output views, with gradients where these are on."""

import pytest
import torch
from torch import nn

from kernel_pytorch.errors import UnsupportedOperationError
from kernel_pytorch.models.bert import RandomBert
from kernel_pytorch.models.call import CallWorkload
from kernel_pytorch.models.decoder import DecoderSource
from kernel_pytorch.models.views import CALIBRATION_ROWS
from kernel_pytorch.optimizer import Workload
from kernel_pytorch.schema import Phase


def bert():
    source = RandomBert(preset="tiny")
    return source.load(data=source.default_data(batch=3, length=5), seed=0, device=torch.device("cpu"))


def decoder():
    source = DecoderSource(preset="tiny", phase=Phase.decode)
    return source.load(data=source.default_data(batch=2, length=4), seed=0, device=torch.device("cpu"))


def seen_inputs(model, run):
    seen = []
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("load", [bert, decoder])
def test_the_same_inputs_as_calibrate(load):
    loaded = load()
    with torch.no_grad():
        first = seen_inputs(loaded.model, lambda: loaded.workload.calibrate(loaded.model, 3))
        second = seen_inputs(loaded.model, lambda: list(loaded.workload.calibration_rows(loaded.model, 3)))
    assert len(first) == len(second) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_rows_of_tokens_and_of_decoding():
    loaded = bert()
    rows = list(loaded.workload.calibration_rows(loaded.model, 2))
    assert [tuple(part.shape) for part in rows] == [(15, 128)] * 2
    assert all(part.requires_grad for part in rows)
    loaded = decoder()
    with torch.no_grad():
        rows = list(loaded.workload.calibration_rows(loaded.model, 2))
    assert [part.shape[0] for part in rows] == [2, 2]
    assert not rows[0].requires_grad


def test_long_samples_give_a_share_of_their_rows():
    source = RandomBert(preset="tiny")
    loaded = source.load(data=source.default_data(batch=2, length=128), seed=0, device=torch.device("cpu"))
    assert next(loaded.workload.calibration_rows(loaded.model, 1)).shape == (CALIBRATION_ROWS, 128)


def test_a_callers_inputs_with_gradients():
    model = nn.Linear(4, 3)
    inputs = [((torch.full((2, 4), float(index)),), {}) for index in range(3)]
    workload = CallWorkload((torch.zeros(2, 4),), calibration=inputs)
    rows = list(workload.calibration_rows(model, 8))
    assert len(rows) == 3
    assert torch.equal(rows[2], model(torch.full((2, 4), 2.0)))
    rows[2].sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.eq(4).all()
    scalar = CallWorkload((torch.zeros(2, 4),))
    assert next(scalar.calibration_rows(nn.Sequential(model, nn.Flatten(0)), 1)).shape == (1, 6)


def test_a_workload_without_a_view_says_so():
    class Bare(Workload):
        def call(self, model):
            return model()

        def held_out(self, model, num_rows):
            yield from ()

        def probe(self, model):
            return model()

    with pytest.raises(UnsupportedOperationError, match="Bare has no view"):
        Bare().calibration_rows(nn.Identity(), 1)
