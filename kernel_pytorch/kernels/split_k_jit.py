"""The second kernel of a linear whose K is split over programs: adds their partial sums, scales once, rounds once."""

# Triton evaluates constexpr and tl.extra.cuda while it compiles; their annotations say otherwise.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def sum_splits(
    partial_ptr,
    scale_ptr,
    row_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    inside = n < N
    scale = tl.load(scale_ptr + n, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        acc += tl.load(partial_ptr + (s * M + m) * N + n, mask=inside, other=0.0)
    acc *= scale
    if HAS_ROW_SCALE:
        acc *= tl.load(row_scale_ptr + m)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=inside, other=0.0)
    tl.store(out_ptr + m * N + n, acc.to(out_ptr.dtype.element_ty), mask=inside)
