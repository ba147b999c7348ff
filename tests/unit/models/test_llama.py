from dataclasses import replace

import pytest
import torch

from kernel_pytorch.models.decoder import PRESETS
from kernel_pytorch.models.kv_cache import KvCaches
from kernel_pytorch.models.llama import Llama, LlamaConfig, rotary, rotate

SMALL = LlamaConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=48, vocab_size=61, head_dim=8)
CPU = torch.device("cpu")


def make(config: LlamaConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> Llama:
    model = Llama(config, dtype=dtype, device=CPU)
    model.init_weights(seed)
    return model.eval()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("preset", "count"), [("tiny", 3_163_904), ("llama32_1b", 1_235_814_400), ("llama3_8b", 8_030_261_248)])
def test_parameter_counts_are_the_published_ones(preset, count):
    model = Llama(PRESETS[preset].config, dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(weight.numel() for weight in model.parameters()) == count
    assert list(model.buffers()) == []


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_equals_the_full_forward_at_every_position(batch):
    model = make()
    ids = torch.randint(61, (batch, 11), generator=torch.Generator().manual_seed(1))
    exact = model(ids)
    caches = KvCaches(SMALL, batch=batch, num_slots=11, device=CPU)
    caches.fill(model, seed=5)
    for position in range(11):
        actual = model(ids[:, position : position + 1], caches.of(model), torch.tensor([position]))
        assert (actual[:, 0] - exact[:, position]).abs().max().item() < 1e-12


def test_decode_continues_a_prefilled_prompt():
    model = make()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    exact = model(ids)
    caches = KvCaches(SMALL, batch=2, num_slots=9, device=CPU)
    prompt = model(ids[:, :6], caches.of(model))
    assert (prompt - exact[:, :6]).abs().max().item() < 1e-12
    for position in range(6, 9):
        actual = model(ids[:, position : position + 1], caches.of(model), torch.tensor([position]))
        assert (actual[:, 0] - exact[:, position]).abs().max().item() < 1e-12


def test_decode_notices_a_wrong_position():
    """The control of the two tests above: one position off is far outside their tolerance."""
    model = make()
    ids = torch.randint(61, (1, 4), generator=torch.Generator().manual_seed(1))
    caches = KvCaches(SMALL, batch=1, num_slots=8, device=CPU)
    model(ids[:, :3], caches.of(model))
    wrong = model(ids[:, 3:], caches.of(model), torch.tensor([4]))
    assert (wrong[:, 0] - model(ids)[:, 3]).abs().max().item() > 1e-3


def test_grouped_queries_equal_repeated_keys():
    grouped = make()
    full_config = replace(SMALL, num_kv_heads=4)
    full = make(full_config)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = weight.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(3))
    assert (grouped(ids) - full(ids)).abs().max().item() < 1e-12
    token, position = ids[:, :1], torch.tensor([0])
    ours = grouped(token, KvCaches(SMALL, batch=2, num_slots=4, device=CPU).of(grouped), position)
    theirs = full(token, KvCaches(full_config, batch=2, num_slots=4, device=CPU).of(full), position)
    assert (ours - theirs).abs().max().item() < 1e-12


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(m: int, n: int) -> float:
        turned = [rotate(x, *rotary(torch.tensor([at]), 8, 500000.0, torch.float64)) for x, at in ((q, m), (k, n))]
        assert turned[0].norm().item() == pytest.approx(q.norm().item(), rel=1e-12)
        return (turned[0] * turned[1]).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-9)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_seeds_reproduce_and_differ():
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_give_finite_logits_of_unit_scale(tied):
    config = replace(PRESETS["tiny"].config, tied=tied)
    model = make(config, torch.bfloat16)
    logits = model(torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))).float()
    assert 0.8 < logits.std().item() < 1.25
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_future_tokens_do_not_change_the_past():
    model = make()
    ids = torch.randint(61, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
