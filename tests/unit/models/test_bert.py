from importlib.util import find_spec

import pytest
import torch

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.bert import RandomBert

if find_spec("transformers") is None:
    pytest.skip("the extra `demo` is not installed", allow_module_level=True)

CPU = torch.device("cpu")


def test_tiny_is_the_published_size_and_follows_the_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (RandomBert(preset="tiny").load(data=None, seed=seed, device=CPU) for seed in (0, 0, 1))
    assert sum(weight.numel() for weight in first.model.parameters()) == 4_385_920
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        rows, same, differ = (torch.cat(list(one.workload.held_out(one.model, 256))) for one in (first, again, other))
    assert rows.shape == (256, 128)
    assert torch.equal(rows, same)
    assert not torch.equal(rows, differ)
    assert (first.workload.trained, first.workload.tokens_per_call, first.name) == (False, 256, "BERT tiny, random weights")


def test_presets_are_checked():
    with pytest.raises(ConfigError, match=r"found 'bse' \(did you mean 'base'\?\); allowed: base, tiny"):
        RandomBert(preset="bse").load(data=None, seed=0, device=CPU)
