"""Triton kernels of decode_attention: programs that share the keys of one head, and the sum of what they found."""

# Triton evaluates constexpr and tl.extra.cuda while it compiles; their annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bias(mask_ptr, inside, BOOL: tl.constexpr):
    """What the mask adds to a score, float32; keys past the end add -inf."""
    if BOOL:
        return tl.where(tl.load(mask_ptr, mask=inside, other=0) != 0, 0.0, float("-inf"))
    else:
        return tl.load(mask_ptr, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _ask_for(rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Asks L2 for the lines of 128 bytes of each row of D 16-bit values. Loads must wait for the kernel before, this need not."""
    LINES: tl.constexpr = (BLOCK_D + 63) // 64
    lines = rows.to(tl.int64)[:, None] + tl.minimum(tl.arange(0, LINES) * 128, D * 2 - 2)[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)


# Their values change from call to call, and a kernel compiled for each gains nothing.
@triton.jit(do_not_specialize=["S", "T", "G", "num_kv_heads", "num_splits", "total"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    stats_ptr,
    scale,
    S,
    T,
    G,
    num_kv_heads,
    num_splits,
    total,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_key,
    v_batch,
    v_head,
    v_key,
    mask_batch,
    mask_head,
    mask_token,
    mask_key,
    HAS_MASK: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SCAN: tl.constexpr,
    PARTIAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
):
    """Rows r = g * T + t of one key head against every num_splits-th block of its keys."""
    split = tl.program_id(0) % num_splits
    pair = tl.program_id(0) // num_splits
    batch, kv_head = (pair // num_kv_heads).to(tl.int64), (pair % num_kv_heads).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    head, token = kv_head * G + r // T, r % T
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    k_rows = k_ptr + batch * k_batch + kv_head * k_head
    v_rows = v_ptr + batch * v_batch + kv_head * v_head
    if EARLY:
        # The kernel before may still write keys: until the wait only L2 is asked, which sees what is written later.
        near = tl.minimum(split * BLOCK_S + s, S - 1).to(tl.int64)
        _ask_for(k_rows + near * k_key, D, BLOCK_D)
        _ask_for(v_rows + near * v_key, D, BLOCK_D)
    if EARLY or LATE:
        tl.extra.cuda.gdc_wait()
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    mask_rows = mask_ptr + batch * mask_batch
    if SHARED_MASK:
        mask_rows += kv_head * G * mask_head
    # The blocks of this program that hold any key: blocks at either end that the mask hides are not read.
    first, end = 0, (tl.cdiv(S, BLOCK_S) - split + num_splits - 1) // num_splits
    if SCAN:
        first_seen, end_seen = end, 0
        for base in range(0, end, SCAN):
            n = base + tl.arange(0, SCAN)[:, None]
            keys = (split + n * num_splits) * BLOCK_S + s[None, :]
            seen = _bias(mask_rows + keys.to(tl.int64) * mask_key, keys < S, BOOL_MASK) != float("-inf")
            first_seen = tl.minimum(first_seen, tl.min(tl.min(tl.where(seen, n, end), 1), 0))
            end_seen = tl.maximum(end_seen, tl.max(tl.max(tl.where(seen, n + 1, 0), 1), 0))
        first, end = first_seen, end_seen
    real = r < G * T
    q_at = q_ptr + batch * q_batch + head[:, None] * q_head + token[:, None].to(tl.int64) * q_token + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for n in range(first, end):
        key = (split + n * num_splits) * BLOCK_S + s
        inside, at = key < S, key.to(tl.int64)
        if HAS_MASK and SHARED_MASK:
            bias = _bias(mask_rows + at * mask_key, inside, BOOL_MASK)[None, :]
        elif HAS_MASK:
            bias_at = mask_rows + head[:, None] * mask_head + token[:, None].to(tl.int64) * mask_token + at[None, :] * mask_key
            bias = _bias(bias_at, real[:, None] & inside[None, :], BOOL_MASK)
        else:
            bias = tl.where(inside, 0.0, float("-inf"))[None, :]
        held = inside[:, None] & (d < D)[None, :]
        k = tl.load(k_rows + at[:, None] * k_key + d[None, :], mask=held, other=0.0)
        v = tl.load(v_rows + at[:, None] * v_key + d[None, :], mask=held, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale + bias
        higher = tl.maximum(top, tl.max(scores, 1))
        # Scores that are all -inf have no highest: their weights are exp(-inf), not exp(nan).
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        # The difference, not the score, takes the factor: a mask of the type's least number must stay finite.
        p = tl.exp2((scores - pivot[:, None]) * _LOG2E)
        shrink = tl.exp2((top - pivot) * _LOG2E)
        weight = weight * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    row = pair.to(tl.int64) * (G * T) + r
    stored = real[:, None] & (d < D)[None, :]
    if PARTIAL:
        at = row * num_splits + split
        tl.store(stats_ptr + at, top, mask=real)
        tl.store(stats_ptr + total.to(tl.int64) * num_splits + at, weight, mask=real)
        tl.store(out_ptr + at[:, None] * D + d[None, :], acc, mask=stored)
    else:
        # A row that sees no key is zero, as in torch.
        out = acc * tl.where(weight == 0, 0.0, 1.0 / weight)[:, None]
        tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_splits", "total"])
def combine(
    partial_ptr,
    stats_ptr,
    out_ptr,
    num_splits,
    total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: the programs' sums, each weighed by how far its highest score is below the highest of all."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    tops, weights = stats_ptr + row * num_splits, stats_ptr + (total + row) * num_splits
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for base in range(0, num_splits, BLOCK):
        split = base + s
        inside = split < num_splits
        found = tl.load(tops + split, mask=inside, other=float("-inf"))
        held = inside[:, None] & (d < D)[None, :]
        part = tl.load(partial_ptr + (row * num_splits + split)[:, None] * D + d[None, :], mask=held, other=0.0)
        higher = tl.maximum(top, found)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, factor = tl.exp2((top - pivot) * _LOG2E), tl.exp2((found - pivot) * _LOG2E)
        weight = weight * shrink + tl.load(weights + split, mask=inside, other=0.0) * factor
        acc = acc * shrink[:, None] + part * factor[:, None]
        top = higher
    highest = tl.max(top, 0)
    factor = tl.exp2((top - tl.where(highest == float("-inf"), 0.0, highest)) * _LOG2E)
    whole = tl.sum(weight * factor, 0)
    out = tl.sum(acc * factor[:, None], 0) * tl.where(whole == 0, 0.0, 1.0 / whole)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
