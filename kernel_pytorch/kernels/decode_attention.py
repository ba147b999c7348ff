"""Attention of a few query tokens over many keys: softmax(q @ k.T * scale + mask) @ v, the keys of one head shared by programs.

Bound by the bytes of keys and values. Query rows of one key head (G heads x T tokens) are one tile, so that no key is read twice;
every num_splits-th block of keys is one program's, so that keys which the mask hides at either end leave all of them equal work;
a second kernel sums what the programs found.                                   Source: arXiv:2205.14135; split: Flash-Decoding, 2023

B batch, H query heads, K key heads, G = H / K, T query tokens, S keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernel_pytorch.kernels.device import Device, device

# (B, H, K, T, S, D) that tests and the benchmark share: one Llama-3-8B layer with its G query heads where tokens would be, the same
# with grouped heads, then odd lengths, head widths that are no power of two, several tokens, one key.
LLAMA = tuple((b, 8, 8, 4, s, 128) for b in (1, 8, 32) for s in (2048, 8192))
SHAPES = (*LLAMA, (1, 32, 8, 1, 2056, 128), (2, 12, 4, 3, 333, 80), (3, 6, 6, 1, 70, 96), (1, 4, 1, 16, 129, 64), (2, 2, 1, 5, 47, 256))
SHAPES = (*SHAPES, (1, 71, 1, 1, 100, 64), (2, 3, 3, 2, 1, 8))

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# Rows of one tile; more take another program, which reads the keys again.
MAX_ROWS = 64
# Mask values that a program looks through at a time: the fewest that hold its keys, else the most.
SCAN_KEYS = (512, 4096)
# Partial sums that a program of the second kernel holds at a time.
COMBINE_VALUES = 8192


@dataclass(frozen=True)
class Config:
    """block_s: keys of a step. split: programs that share the keys of one head, at most. scan: look through the mask first, for
    blocks at either end that it hides. overlap: when the kernel after this one may start, "none", "late" or "early"
    (programmatic dependent launch); "early" also asks L2 for the first block of keys while the kernel before still runs."""

    block_s: int
    split: int
    num_warps: int
    num_stages: int
    scan: bool
    overlap: str = "none"


def padded(n: int) -> int:
    """The smallest power of two, 16 or more, that holds n."""
    return max(16, 1 << (n - 1).bit_length())


def choose(num_tiles: int, num_keys: int, head_dim: int, on: Device) -> Config:
    """num_tiles: B * K times the tiles of their query rows."""
    block_d = padded(head_dim)
    block_s = 64 if block_d <= 128 else 32
    stages = next(n for n in (3, 2, 1) if n == 1 or n * 4 * block_s * block_d <= on.shared // 2)
    # Enough programs that each processor holds two.
    split = max(1, min(-(-num_keys // block_s), 2 * on.processors // num_tiles))
    return Config(block_s, split, num_warps=4, num_stages=stages, scan=True, overlap="late" if on.dependent_launch else "none")


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, scale: float | None = None
) -> torch.Tensor:
    """query [B, H, T, D], key and value [B, K, S, D], attn_mask bool (True: sees the key) or added to the scores, [B|1, H|1, T|1, S|1],
    scale 1 / sqrt(D) by default -> [B, H, T, D] in query's dtype. Computed in float32 (float64 for float64), rounded once, as torch's
    math backend does on a GPU; a row that sees no key is zero."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    q, k, v = query.to(wide), key.to(wide).repeat_interleave(group, 1), value.to(wide).repeat_interleave(group, 1)
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        hidden = (
            torch.zeros_like(attn_mask, dtype=wide).masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else attn_mask
        )
        scores = scores + hidden.to(wide)
    weights = scores.softmax(-1).masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    return (weights @ v).to(query.dtype)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    scale: float,
    config: Config,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operator with this configuration, into out [B, H, T, D] contiguous where given."""
    # Here, not above: `reference` also works where Triton is not installed.
    from kernel_pytorch.kernels import decode_attention_jit as jit

    attend: Any = jit.attend
    combine: Any = jit.combine
    (b, h, t, d), num_kv_heads, s = query.shape, key.shape[1], key.shape[2]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    if out.numel() == 0:
        return out
    group = h // num_kv_heads
    cuda = query.is_cuda and torch.version.hip is None
    overlap = config.overlap if cuda and device(query.device.index).dependent_launch else "none"
    extra = {} if overlap == "none" else {"launch_pdl": True}
    block_d, block_r = padded(d), min(MAX_ROWS, padded(group * t))
    num_splits = max(1, min(config.split, -(-s // config.block_s)))
    # Strides of query, key and value without the last, which is 1; a mask has four, 0 where it is broadcast.
    mask, shared = query, True
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], 0, 0, 0, 0]
    if attn_mask is not None:
        mask = attn_mask.expand(b, h, t, s)
        strides[9:] = mask.stride()
        shared = (group == 1 or strides[10] == 0) and (t == 1 or strides[11] == 0)
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
    scan = 0
    if config.scan and attn_mask is not None and shared:
        scan = next((n for n in SCAN_KEYS if n * num_splits >= s), SCAN_KEYS[-1]) // config.block_s
    rows = b * h * t
    target, stats = out, out
    if num_splits > 1:
        target = torch.empty((rows, num_splits, d), dtype=torch.float32, device=query.device)
        stats = torch.empty((2, rows, num_splits), dtype=torch.float32, device=query.device)
    attend[(b * num_kv_heads * num_splits, -(-group * t // block_r))](
        query,
        key,
        value,
        mask,
        target,
        stats,
        scale,
        s,
        t,
        group,
        num_kv_heads,
        num_splits,
        rows,
        *strides,
        HAS_MASK=attn_mask is not None,
        BOOL_MASK=attn_mask is not None and attn_mask.dtype == torch.bool,
        SHARED_MASK=shared,
        SCAN=scan,
        PARTIAL=num_splits > 1,
        D=d,
        BLOCK_D=block_d,
        BLOCK_R=block_r,
        BLOCK_S=config.block_s,
        EARLY=overlap == "early",
        LATE=overlap == "late",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **extra,
    )
    if num_splits > 1:
        block = min(1 << (num_splits - 1).bit_length(), COMBINE_VALUES // block_d)
        combine[(rows,)](target, stats, out, num_splits, rows, D=d, BLOCK_D=block_d, BLOCK=block, PDL=overlap != "none", **extra)
    return out


@torch.library.custom_op("kernel_pytorch::decode_attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    b, h, t, d = query.shape
    num_kv_heads = key.shape[1]
    # Without a GPU only Triton's interpreter runs this.
    on = device(query.device.index)
    num_tiles = b * num_kv_heads * max(1, -(-h * t // (num_kv_heads * MAX_ROWS)))
    with torch.cuda.device_of(query):
        return launch(query, key, value, attn_mask, scale, choose(max(1, num_tiles), key.shape[2], d, on))


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """query [B, H, T, D], key and value [B, K, S, D] with H a multiple of K, bfloat16 or float16, D at most 256 and contiguous;
    attn_mask bool or floating, broadcastable to [B, H, T, S] -> [B, H, T, D] in query's dtype. Query head h reads key head h // (H / K).

    Sums and statistics in float32; softmax weights are rounded to the input's dtype before they multiply the values. Keys and values
    of whole blocks that the mask hides from all rows may not be read: a NaN there has no effect. Right for any T, made for few."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise ValueError(
                f"decode_attention: {name} must be bfloat16 or float16 with 4 dimensions, all alike,"
                f" got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"decode_attention: the last dimension of {name} must be contiguous, got strides {tuple(tensor.stride())}")
    (b, h, t, d), (num_kv_heads, s) = query.shape, key.shape[1:3]
    if key.shape != value.shape or key.shape[0] != b or key.shape[3] != d or num_kv_heads == 0 or h % num_kv_heads or s == 0:
        raise ValueError(
            f"decode_attention: key and value must be [{b}, heads that divide {h}, keys, {d}],"
            f" got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not 0 < d <= MAX_HEAD_DIM:
        raise ValueError(f"decode_attention: the head dimension must be 1 to {MAX_HEAD_DIM}, got {d}")
    if attn_mask is not None and not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        raise ValueError(f"decode_attention: attn_mask must be bool or floating, got {attn_mask.dtype}")
    if attn_mask is not None and torch.broadcast_shapes(attn_mask.shape, (b, h, t, s)) != (b, h, t, s):
        raise ValueError(f"decode_attention: attn_mask {tuple(attn_mask.shape)} does not broadcast to {(b, h, t, s)}")
    return _attention(query, key, value, attn_mask, d**-0.5 if scale is None else scale)
