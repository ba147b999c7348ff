import copy
import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.decoder import DecoderSource, DecodeWorkload
from kernel_pytorch.models.text import BuiltinSentences, RandomTokens, Vocabulary
from kernel_pytorch.optimizer import tensor_bytes
from kernel_pytorch.schema import Phase

CPU = torch.device("cpu")


def load(phase=Phase.decode, batch=1, length=12, seed=0, dtype=None):
    return DecoderSource(phase=phase, dtype=dtype).load(data=RandomTokens(batch=batch, length=length), seed=seed, device=CPU)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(("phase", "tokens"), [(Phase.decode, 2), (Phase.prefill, 24), (Phase.forward, 24)])
def test_workload_says_what_a_call_is(phase, tokens):
    workload = load(phase, batch=2).workload
    assert (workload.phase, workload.batch, workload.length, workload.tokens_per_call) == (phase.value, 2, 12, tokens)
    assert (workload.trained, workload.logits) == (False, True)


def test_defaults_are_one_sample_of_128_tokens_in_float32():
    loaded = DecoderSource().load(data=None, seed=0, device=CPU)
    assert (loaded.workload.batch, loaded.workload.length, loaded.name) == (1, 128, "decoder tiny")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("phase", "batch", "num_rows"),
    # A prompt gives at most a quarter of the rows that are asked for.
    [(Phase.decode, 1, 50), (Phase.decode, 3, 51), (Phase.prefill, 1, 60), (Phase.prefill, 3, 52), (Phase.forward, 3, 52)],
)
def test_held_out_rows_are_enough_and_repeat_exactly(phase, batch, num_rows):
    loaded = load(phase, batch=batch)
    first = torch.cat(list(loaded.workload.held_out(loaded.model, 50)))
    timed = loaded.workload.call(loaded.model).clone()
    second = torch.cat(list(loaded.workload.held_out(loaded.model, 50)))
    assert first.shape == (num_rows, 2048)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert len(torch.unique(first, dim=0)) == len(first)
    loaded.workload.reset()
    assert torch.equal(timed, loaded.workload.call(loaded.model))


def test_the_timed_decode_step_repeats_exactly():
    loaded = load(batch=2)
    calls = [loaded.workload.call(loaded.model) for _ in range(4)]
    loaded.workload.probe(loaded.model)
    loaded.workload.calibrate(loaded.model, 3)
    assert all(torch.equal(calls[0], call) for call in [*calls[1:], loaded.workload.call(loaded.model)])


def test_even_runs_of_decode_are_the_models_own_forward():
    loaded = load(length=8)
    rows = torch.cat(list(loaded.workload.held_out(loaded.model, 16)))
    assert isinstance(loaded.workload, DecodeWorkload)
    ids = next(RandomTokens(batch=1, length=8).parts(Vocabulary(2048), batch=1, length=8, seed=0).held_out()).ids
    assert (rows[:8] - loaded.model(ids)[0]).abs().max().item() < 1e-4


def test_two_models_do_not_share_a_cache_and_it_is_no_weight():
    loaded = load()
    before = tensor_bytes(loaded.model)
    other = copy.deepcopy(loaded.model)
    other.layers[0].attention.k_proj.weight.mul_(-1)
    alone = torch.cat(list(loaded.workload.held_out(loaded.model, 24)))
    pairs = list(zip(loaded.workload.held_out(loaded.model, 24), loaded.workload.held_out(other, 24), strict=True))
    assert torch.equal(alone, torch.cat([ours for ours, _ in pairs]))
    assert not torch.equal(alone, torch.cat([theirs for _, theirs in pairs]))
    assert tensor_bytes(loaded.model) == before == 12_655_616 == DecoderSource().weight_bytes()


def test_a_cache_goes_with_its_model():
    loaded = load()
    loaded.workload.call(copy.deepcopy(loaded.model))
    gc.collect()
    assert len(loaded.workload._states) == len(loaded.workload._caches._caches) == 0
    loaded.workload.call(loaded.model)
    assert len(loaded.workload._states) == len(loaded.workload._caches._caches) == 1


def test_a_model_gets_the_same_tensor_objects_at_each_call():
    loaded = load()
    seen = []
    loaded.model.register_forward_pre_hook(lambda module, args: seen.append([args[0], args[2], *(t for pair in args[1] for t in pair)]))
    loaded.workload.call(loaded.model)
    list(loaded.workload.held_out(loaded.model, 30))
    loaded.workload.probe(loaded.model)
    assert len(seen) == 32
    assert {tuple(map(id, tensors)) for tensors in seen} == {tuple(map(id, seen[0]))}


def test_cache_has_the_element_type_of_the_model_that_uses_it():
    loaded = load()
    narrow = copy.deepcopy(loaded.model).to(torch.bfloat16)
    loaded.workload.call(narrow)
    assert {t.dtype for pair in loaded.workload._caches.of(narrow) for t in pair} == {torch.bfloat16}
    assert {t.dtype for pair in loaded.workload._caches.of(loaded.model) for t in pair} == {torch.float32}


def test_decode_compiles_to_one_graph_for_all_positions():
    torch._dynamo.reset()
    loaded = load(length=6)
    eager = copy.deepcopy(loaded.model)
    counter = CompileCounter()
    loaded.model.compile(backend=counter, fullgraph=True)
    compiled_rows = torch.cat(list(loaded.workload.held_out(loaded.model, 12)))
    loaded.workload.call(loaded.model)
    assert counter.frame_count == 1
    assert torch.equal(compiled_rows, torch.cat(list(loaded.workload.held_out(eager, 12))))


def test_inductor_decode_equals_eager_without_recompiling():
    torch._dynamo.reset()
    loaded = load(length=6)
    eager = copy.deepcopy(loaded.model)
    loaded.model.compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled_rows = torch.cat(list(loaded.workload.held_out(loaded.model, 10)))
    exact = torch.cat(list(loaded.workload.held_out(eager, 10)))
    assert (compiled_rows - exact).abs().max().item() < 1e-4


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), expected)


def test_seeds_reproduce_the_rows():
    first, again, other = (torch.cat(list((m := load(seed=s)).workload.held_out(m.model, 8))) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_presets_name_is_checked():
    with pytest.raises(ConfigError, match=r"found 'llama3_8' \(did you mean 'llama3_8b'\?\); allowed: llama32_1b, llama3_8b, tiny"):
        DecoderSource(preset="llama3_8").load(data=None, seed=0, device=CPU)


def test_sentences_are_refused_without_a_tokenizer():
    with pytest.raises(ConfigError, match="data=random"):
        DecoderSource().load(data=BuiltinSentences(), seed=0, device=CPU)


def test_works_outside_inference_mode_too():
    with torch.inference_mode(False), torch.enable_grad():
        loaded = load(batch=2)
        logits = loaded.workload.call(loaded.model)
        logits.sum().backward()
        assert loaded.model.lm_head.weight.grad.shape == (2048, 256)
    with torch.inference_mode():
        assert torch.equal(loaded.workload.call(loaded.model), logits.detach())
