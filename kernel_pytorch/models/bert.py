"""BERT (arXiv:1810.04805) with random weights."""

from __future__ import annotations

import torch

from kernel_pytorch.models.offline import import_transformers, quiet
from kernel_pytorch.models.source import Loaded, ModelSource, check_length, check_preset, torch_dtype
from kernel_pytorch.models.text import DataSource, RandomTokens, Vocabulary
from kernel_pytorch.models.tokens import TokenWorkload
from kernel_pytorch.models.views import token_rows

# Layers, width, heads, width of the feed-forward block: bert-base, and the smallest of arXiv:1908.08962.
PRESETS = {"base": (12, 768, 12, 3072), "tiny": (2, 128, 2, 512)}


class RandomBert(ModelSource):
    """transformers' BertModel with SDPA and its own random initialisation; one row of the output view is one token."""

    def __init__(self, *, preset: str | None = None, dtype: str | None = None) -> None:
        self.preset = preset or "base"
        self.dtype = dtype

    def default_data(self, *, batch: int | None = None, length: int | None = None) -> DataSource:
        return RandomTokens(batch=batch, length=length)

    def load(self, *, data: DataSource | None, seed: int, device: torch.device, model_device: torch.device | None = None) -> Loaded:
        layers, width, heads, inner = PRESETS[check_preset(self.preset, PRESETS)]
        transformers = import_transformers("bert")
        data = data or self.default_data()
        with quiet(), torch.random.fork_rng(devices=[]):
            # transformers draws from the global random state; it is put back.
            torch.manual_seed(seed)
            config = transformers.BertConfig(
                num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner, attn_implementation="sdpa"
            )
            model = transformers.BertModel(config)
        parts = data.parts(Vocabulary(config.vocab_size), batch=8, length=32, seed=seed)
        check_length(parts, config.max_position_embeddings)
        model = model.to(model_device or device, torch_dtype(self.dtype, torch.float32)).eval()
        workload = TokenWorkload(parts, token_rows, phase="forward", trained=False, device=device)
        return Loaded(model, workload, f"BERT {self.preset}, random weights")
