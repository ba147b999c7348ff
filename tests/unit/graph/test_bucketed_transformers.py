"""Padding around models of transformers: their output classes, masks from either side, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_pytorch.graph.bucketed_call import BucketedCall
from kernel_pytorch.schema import BucketingConfig

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL, max_position_embeddings=40))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "kwargs"), [(bert, {}), (llama, {"use_cache": False})])
@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_of_a_bucket_come_back_as_they_are(make: Any, kwargs: dict[str, Any], side: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    sizes = []

    def inner(**kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[1])
        return model._call_impl(**kwargs)

    call = BucketedCall(model, inner, ["input_ids:1", "attention_mask:1"], BucketingConfig(), plain=model._call_impl, static_inputs=True)
    with torch.inference_mode():
        for length in (20, 25, 31, 32, 18):
            mask = torch.ones(3, length, dtype=torch.int64)
            mask[1, slice(length // 2, None) if side == "right" else slice(length // 2)] = 0
            given = {"input_ids": torch.randint(1, 100, (3, length)), "attention_mask": mask, **kwargs}
            actual, expected = call(**given), model._call_impl(**given)
            assert type(actual) is type(expected)
            assert actual.keys() == expected.keys()
            for a, b in zip(actual.to_tuple(), expected.to_tuple(), strict=True):
                assert a.shape == b.shape
                assert ((a - b).double().norm() / b.double().norm()).item() < (1e-6 if dtype is torch.float32 else 1e-2)
    assert sizes == [32] * 4
    assert call.report["straight"] == {"answered by the plain call, to watch it": 1}


@pytest.mark.parametrize(
    ("make", "kwargs", "reason"),
    [(bert, {}, "output 0 of a call of size 20 d"), (llama, {"use_cache": True}, "the call writes to memory that outlives it")],
)
def test_no_mask_and_a_cache_are_refused(make: Any, kwargs: dict[str, Any], reason: str) -> None:
    torch.manual_seed(0)
    model = make().eval()
    call = BucketedCall(model, model._call_impl, ["input_ids:1", "attention_mask:1"], BucketingConfig())
    with torch.inference_mode():
        for _ in range(2):
            ids = torch.randint(1, 100, (3, 20))
            assert torch.equal(call(input_ids=ids, **kwargs)[0], model._call_impl(input_ids=ids, **kwargs)[0])
    ((found, count),) = call.report["straight"].items()
    assert count == 2
    assert found.startswith(reason)
