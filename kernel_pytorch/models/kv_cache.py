"""Static key/value caches: one for each model, owned by the workload.

Neither buffers of the model nor shared by models. As buffers they would count as weights and be copied with every clone;
shared, one model would attend to keys that another computed. Passed as inputs they are ordinary graph inputs: torch.compile
updates them in place without a guard on their contents, and a captured CUDA graph finds the same addresses at each replay,
because a model is always given the same tensor objects.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from kernel_pytorch.models.llama import LayerCache, LlamaConfig

# Vectorised masked attention wants the number of slots in whole vectors.
_SLOT_MULTIPLE = 8


class KvCaches:
    """Gives each model its own cache, made at the first call and freed with the model."""

    def __init__(self, config: LlamaConfig, *, batch: int, num_slots: int, device: torch.device) -> None:
        self._config = config
        self._shape = (batch, config.num_kv_heads, -(-num_slots // _SLOT_MULTIPLE) * _SLOT_MULTIPLE, config.head_dim)
        self._device = device
        self._caches: WeakKeyDictionary[nn.Module, tuple[LayerCache, ...]] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> tuple[LayerCache, ...]:
        """One (keys, values) a layer, [B, K, S, H], in the element type that the model's embedding has now."""
        cache = self._caches.get(model)
        if cache is None:
            dtype = next(module.weight.dtype for module in model.modules() if isinstance(module, nn.Embedding))
            # Ordinary tensors also under inference mode, which would forbid writing to them outside it.
            with torch.inference_mode(False):
                cache = tuple(
                    (
                        torch.zeros(self._shape, dtype=dtype, device=self._device),
                        torch.zeros(self._shape, dtype=dtype, device=self._device),
                    )
                    for _ in range(self._config.num_layers)
                )
            self._caches[model] = cache
        return cache

    @torch.no_grad()
    def fill(self, model: nn.Module, seed: int) -> None:
        """A context of unit-normal keys and values, the same for every model whatever its element type."""
        generator = torch.Generator(self._device).manual_seed(seed)
        for pair in self.of(model):
            for slots in pair:
                slots.copy_(torch.randn(self._shape, generator=generator, device=self._device))
