"""The Llama architecture: RMSNorm, rotary positions, grouped-query attention, SwiGLU.   Source: arXiv:2307.09288, arXiv:2407.21783

B batch, T tokens, S cache slots, D model, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Keys and values of one layer, each [B, K, S, H].
LayerCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LlamaConfig:
    """Published dimensions of one size. tied: lm_head shares the embedding's weight."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tied: bool = False


def rotary(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, H] of `positions` [T]. Computed from the positions at each call: a table would be a buffer that a
    cast to 16 bits spoils, and that counts as weights. Angles are float64 for a float64 model, else float32."""
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=angle_dtype) / head_dim
    angle = positions.to(angle_dtype).unsqueeze(-1) * torch.pow(theta, -exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BNTH: torch.Tensor, cos_TH: torch.Tensor, sin_TH: torch.Tensor) -> torch.Tensor:
    """Turns each pair (i, i + H/2) by its position's angle."""
    first, second = x_BNTH.chunk(2, dim=-1)
    return x_BNTH * cos_TH + torch.cat((-second, first), dim=-1) * sin_TH


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False, dtype=dtype, device=device)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False, dtype=dtype, device=device)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False, dtype=dtype, device=device)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False, dtype=dtype, device=device)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_TH: torch.Tensor,
        sin_TH: torch.Tensor,
        cache: LayerCache | None,
        position: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, length, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x_BTD).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x_BTD).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos_TH, sin_TH), rotate(k, cos_TH, sin_TH)
        if position is None:
            out = self._prompt(q, k, v, cache)
        else:
            assert cache is not None
            out = self._decode(q, k, v, cache, position, mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _prompt(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache | None) -> torch.Tensor:
        if cache is not None:
            for slots, new in zip(cache, (k, v), strict=True):
                slots[:, :, : new.shape[2]].copy_(new.detach())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.num_heads != self.num_kv_heads)

    def _decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, position: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        keys, values = cache
        keys.index_copy_(2, position, k.detach().to(keys.dtype))
        values.index_copy_(2, position, v.detach().to(values.dtype))
        # The G query heads of one key head stand where query tokens would: no key is read twice, none is repeated.
        grouped = q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim).to(keys.dtype)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.reshape(q.shape).to(q.dtype)


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.attention = Attention(config, dtype, device)
        self.post_norm = nn.RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.mlp = SwiGLU(config, dtype, device)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache | None,
        position: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin, cache, position, mask)
        return x + self.mlp(self.post_norm(x))


class Llama(nn.Module):
    """Token ids to logits. Weights are uninitialised until `init_weights`, so that they can be made on the meta device."""

    def __init__(self, config: LlamaConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config = config
        # Embedding's own initialisation would draw from the global random state.
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, _weight=torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )
        self.layers = nn.ModuleList(Layer(config, dtype, device) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device)
        self.tie()

    def tie(self) -> None:
        """Shares the embedding with lm_head where the architecture says so; `to_empty` separates the two."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, input_ids: torch.Tensor, cache: Sequence[LayerCache] | None = None, position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, T, V] of `input_ids` [B, T].

        position None: the ids are prompts from position 0; their keys and values are written to `cache` when one is given.
        position [1] on the device: the ids are one new token a sample at that position, with everything before it in `cache`.
        """
        x = self.embed_tokens(input_ids)
        mask = None
        if position is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            assert cache is not None
            positions = position
            keys = cache[0][0]
            future = torch.arange(keys.shape[2], device=keys.device) > position
            mask = torch.zeros(1, 1, 1, keys.shape[2], dtype=keys.dtype, device=keys.device).masked_fill(future, float("-inf"))
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if cache is None else cache[index], position, mask)
        return self.lm_head(self.norm(x))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights, drawn where they stay, that keep activations near one and logits apart.

        Outputs of a block shrink with depth so that the residual stream does not grow; norm weights differ from one so that
        a dropped one shows."""
        generator = torch.Generator(self.embed_tokens.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1.0, 0.1, generator=generator)
                continue
            std = weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= (2 * self.config.num_layers) ** -0.5
            elif name == "embed_tokens.weight" and not self.config.tied:
                std = 1.0
            weight.normal_(0.0, std, generator=generator)
