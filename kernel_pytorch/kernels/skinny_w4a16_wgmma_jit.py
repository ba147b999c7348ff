"""Hopper's kernel of skinny_w4a16 for more rows of x than one pass of skinny_w4a16_fragment holds: warpgroup matrix instructions.

Written in Gluon. The weight is the left operand of wgmma, which each lane unpacks into its own registers while earlier products run;
x, the right one, is in shared memory once for all warps, its columns in the order in which lanes hold the packed weight's. So a
weight is unpacked once for up to 128 rows of x.

A step is 128 columns, two places in shared memory take turns. W warps have 16 rows of the weight each, ROWS times.
"""

# Gluon evaluates constexpr while it compiles; its annotations say otherwise.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# The compiler adds tuples; it does not unpack them.
# ruff: noqa: RUF005
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from kernel_pytorch.kernels.skinny_w4a16_fragment import BF16, F16, SIGNS, _load_words

# Of all threads of a program; Triton 3.7 has another name for it.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


def _scales(half: bool) -> gl.constexpr:
    """$0 to $3: the scales of rows g and g + 8 of the first chunk, then of the second, twice in a word; $4: their four bytes."""
    lines = []
    for one in range(4):
        lines += [f"prmt.b32 ${one}, $4, $4, 0x{str(one) * 4};"]
        lines += [f"shl.b32 ${one}, ${one}, 3;"] if half else []
        lines += [f"and.b32 ${one}, ${one}, {'0x7f807f80' if half else '0x0ff00ff0'};"]
        lines += [] if half else [f"or.b32 ${one}, ${one}, 0x70007000;"]
    return gl.constexpr("\n".join(lines))


def _values(half: bool) -> gl.constexpr:
    """$0 to $7: operands of two matrix instructions; $8, $9: their words; $10, $12: scales of rows g and g + 8."""
    lines = ["{", ".reg .b32 a, b, z;", f"mov.b32 z, {SIGNS};"]
    for j in range(2):
        for part, body in enumerate(F16 if half else BF16):
            multiply = "mul.rn.f16x2 ${o}, a, ${r};" if half else "fma.rn.bf16x2 ${o}, a, ${r}, z;"
            lines += [body.format(w=f"${8 + j}"), multiply.format(o=4 * j + part, r=10 + 2 * (part % 2))]
    return gl.constexpr("\n".join([*lines, "}"]))


_SCALES_BF16, _SCALES_F16, _VALUES_BF16, _VALUES_F16 = _scales(False), _scales(True), _values(False), _values(True)
_SCALES_OPERANDS = gl.constexpr("=&r,=&r,=&r,=&r,r")
_VALUES_OPERANDS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 6))


@gluon.constexpr_function
def _x_lanes(block_m: int, warps: int) -> gl.DistributedLinearLayout:
    """Who loads what of x [block_m, 128]: eight values a lane, a quarter of a warp a whole line of 128 bytes."""
    rows = [[2**bit, 0] for bit in range(block_m.bit_length() - 1)]
    rest = [*rows[2:4], [0, 64], *rows[4:]]
    bits = warps.bit_length() - 1
    shared = rest[:bits] + [[0, 0]] * (bits - len(rest[:bits]))
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *rest[bits:]], [[0, 8], [0, 16], [0, 32], *rows[:2]], shared, [], [block_m, 128]
    )


@gluon.constexpr_function
def _eight(kind):
    return (kind,) * 8


@gluon.jit
def _load_weights(w_ptr, s_ptr, tile, tiles, pair, pairs, lane, part, ROWS: gl.constexpr, WARPS: gl.constexpr, EVEN: gl.constexpr):
    """As the other kernel's, but a lane's four scale bytes are one number."""
    last = pair if EVEN else gl.minimum(pair, pairs - 1)
    found = ()
    for r in gl.static_range(ROWS):
        first, second, at = _load_words(w_ptr, tile + r * WARPS, tiles, last, pairs, lane, part)
        found = found + ((first, second, gl.load(s_ptr + at, eviction_policy="evict_first")),)
    return found


@gluon.jit
def _halves(words, WARPS: gl.constexpr, PAIR: gl.constexpr):
    """A lane's four words -> the first two and the last two."""
    low, high = gl.split(gl.permute(gl.reshape(words, [WARPS * 32, 2, 2]), [0, 2, 1]))
    return (gl.convert_layout(low, PAIR), gl.convert_layout(high, PAIR))


@gluon.jit
def _quarters(loaded, WARPS: gl.constexpr, HALF: gl.constexpr):
    """What the operands of 32 columns each are made of: two words, and the scales of both rows."""
    PAIR: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    asm: gl.constexpr = _SCALES_F16 if HALF else _SCALES_BF16
    kinds: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    four = gl.expand_dims(gl.convert_layout(loaded[2], gl.SliceLayout(1, PAIR)), 1)
    s = gl.inline_asm_elementwise(asm, _SCALES_OPERANDS, [four], dtype=kinds, is_pure=True, pack=1)
    first, second = _halves(loaded[0], WARPS, PAIR), _halves(loaded[1], WARPS, PAIR)
    return ((first[0], s[0], s[1]), (first[1], s[0], s[1]), (second[0], s[2], s[3]), (second[1], s[2], s[3]))


@gluon.jit
def _values_of(quarter, WARPS: gl.constexpr, HALF: gl.constexpr):
    """[16 W, 32]: the weights times their scales times 2 ** -8."""
    asm: gl.constexpr = _VALUES_F16 if HALF else _VALUES_BF16
    kinds: gl.constexpr = _eight(gl.float16 if HALF else gl.bfloat16)
    v = gl.inline_asm_elementwise(asm, _VALUES_OPERANDS, [quarter[0], quarter[1], quarter[2]], dtype=kinds, is_pure=True, pack=2)
    found = gl.join(gl.join(gl.join(v[0], v[1]), gl.join(v[2], v[3])), gl.join(gl.join(v[4], v[5]), gl.join(v[6], v[7])))
    # [warp, g, t, even or odd, row half, half of 16 columns, j] -> [row half and g of a warp, columns as x has them]
    parts = gl.permute(gl.reshape(found, [WARPS, 8, 4, 2, 2, 2, 2]), [0, 4, 1, 6, 5, 2, 3])
    return gl.reshape(parts, [WARPS * 16, 32])


@gluon.jit
def _beside(left, right):
    """Columns of left, then those of right."""
    return gl.reshape(gl.permute(gl.join(left, right), [0, 2, 1]), [left.shape[0], 2 * left.shape[1]])


@gluon.jit
def _operand(quarters, PART: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, HALF: gl.constexpr, A: gl.constexpr):
    """The left operand [16 W, 128 / PARTS] of one product; no value changes its lane."""
    SIZE: gl.constexpr = 4 // PARTS
    found = _values_of(quarters[PART * SIZE], WARPS, HALF)
    if SIZE >= 2:
        found = _beside(found, _values_of(quarters[PART * SIZE + 1], WARPS, HALF))
    if SIZE == 4:
        found = _beside(found, _beside(_values_of(quarters[2], WARPS, HALF), _values_of(quarters[3], WARPS, HALF)))
    return gl.convert_layout(found, A)


@gluon.jit
def _load_x(x_ptr, first_m, M, K, step, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, X: gl.constexpr):
    """x [BLOCK_M, 128] of one step; zero past K, and past M the last row again, whose products are not stored."""
    m = gl.minimum(first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, X)), M - 1)
    k = gl.expand_dims(step * 128 + gl.arange(0, 128, gl.SliceLayout(0, X)), 0)
    at = x_ptr + gl.expand_dims(m.to(gl.int64) * K, 1) + k
    if EVEN:
        return gl.load(at, eviction_policy="evict_last")
    return gl.load(at, mask=(k < K) & (gl.expand_dims(m, 1) >= 0), other=0.0, eviction_policy="evict_last")


@gluon.jit
def _store_x(target, x, BLOCK_M: gl.constexpr):
    """[chunk, t, j, h, even or odd] -> [chunk, j, h, t, even or odd], the order of a lane's weights."""
    parts = gl.permute(gl.reshape(x, [BLOCK_M, 2, 4, 4, 2, 2]), [0, 1, 3, 4, 2, 5])
    target.store(gl.reshape(parts, [BLOCK_M, 128]))
    hopper.fence_async_shared()


@gluon.jit
def _settled(sums, LEFT: gl.constexpr):
    """The sums once at most LEFT products are under way."""
    if len(sums) == 1:
        return (hopper.warpgroup_mma_wait(LEFT, [sums[0]]),)
    else:
        return hopper.warpgroup_mma_wait(LEFT, [sums[0], sums[1]])


@gluon.jit(do_not_specialize=["M"])
def multiply(
    x_ptr,
    w_ptr,
    s_ptr,
    channel_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    tiles,
    pairs,
    HAS_BIAS: gl.constexpr,
    PARTIAL: gl.constexpr,
    EVEN: gl.constexpr,
    HALF: gl.constexpr,
    STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr,
    DEPTH: gl.constexpr,
    PARTS: gl.constexpr,
    LEFT: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """s_ptr: int32, four scale bytes each. STEPS: of a program, an even number. ROWS: tiles of 16 rows a warp, 1 or 2. DEPTH: steps
    whose weights are asked for ahead, no more than STEPS. PARTS: products of a step and 16 W rows, 1, 2 or 4. LEFT: of them may run while
    the next operand is unpacked, no more than ROWS times PARTS, with four parts ROWS times three. EVEN: every program has STEPS pairs."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X: gl.constexpr = _x_lanes(BLOCK_M, WARPS)
    LANES: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    KIND: gl.constexpr = gl.float16 if HALF else gl.bfloat16
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    # The part of a step after which the products of the step before are done.
    STORE: gl.constexpr = 2 if PARTS == 4 else PARTS - 1
    even = gl.allocate_shared_memory(KIND, [BLOCK_M, 128], SHARED)
    odd = gl.allocate_shared_memory(KIND, [BLOCK_M, 128], SHARED)
    split = gl.program_id(1)
    first_m = gl.program_id(2) * BLOCK_M
    first_n = gl.program_id(0) * (16 * WARPS * ROWS)
    thread = gl.arange(0, WARPS * 32, gl.SliceLayout(1, LANES))
    part = gl.arange(0, 4, gl.SliceLayout(0, LANES))
    tile, lane = first_n // 16 + thread // 32, thread % 32
    first = split * STEPS
    # Weights are constants: they may be read while the kernel before still runs, x may not.
    ahead = ()
    for d in gl.static_range(DEPTH):
        ahead = ahead + (_load_weights(w_ptr, s_ptr, tile, tiles, first + d, pairs, lane, part, ROWS, WARPS, EVEN),)
    if OVERLAP:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        # Not before: the next kernel may read what kernels before this one wrote without waiting, as Inductor's do.
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    _store_x(even, _load_x(x_ptr, first_m, M, K, first, EVEN, BLOCK_M, X), BLOCK_M)
    x = _load_x(x_ptr, first_m, M, K, first + 1, EVEN, BLOCK_M, X)
    sums = ()
    for _ in gl.static_range(ROWS):
        sums = sums + (gl.zeros([16 * WARPS, BLOCK_M], gl.float32, MMA),)
    operand = _operand(_quarters(ahead[0][0], WARPS, HALF), 0, PARTS, WARPS, HALF, A)
    # ptxas lets a product run beside other work within one turn of a loop, not into the next.
    for turn in range(STEPS // 2):
        for half in gl.static_range(2):
            step = turn * 2 + half
            here, other = (even, odd) if half == 0 else (odd, even)
            # Past the last step it is the last one again, and not used.
            pair = first + gl.minimum(step + DEPTH, STEPS - 1)
            ahead = ahead + (_load_weights(w_ptr, s_ptr, tile, tiles, pair, pairs, lane, part, ROWS, WARPS, EVEN),)
            quarters = ()
            for r in gl.static_range(ROWS):
                quarters = quarters + (_quarters(ahead[0][r], WARPS, HALF),)
            for p in gl.static_range(PARTS):
                right = here.slice(128 // PARTS * p, 128 // PARTS, dim=1).permute([1, 0])
                for r in gl.static_range(ROWS):
                    if r == 0:
                        sums = _settled((hopper.warpgroup_mma(operand, right, sums[0], is_async=True),) + sums[1:], LEFT)
                    else:
                        sums = _settled((sums[0], hopper.warpgroup_mma(operand, right, sums[1], is_async=True)), LEFT)
                    if p == STORE and r == ROWS - 1:
                        # Every warp's products of the step before are done; the compiler believes it of any that a barrier follows.
                        _barrier()
                        _store_x(other, x, BLOCK_M)
                        x = _load_x(x_ptr, first_m, M, K, first + gl.minimum(step + 2, STEPS - 1), EVEN, BLOCK_M, X)
                    if r + 1 < ROWS:
                        operand = _operand(quarters[r + 1], p, PARTS, WARPS, HALF, A)
                    elif p + 1 < PARTS:
                        operand = _operand(quarters[0], p + 1, PARTS, WARPS, HALF, A)
                    else:
                        operand = _operand(_quarters(ahead[1][0], WARPS, HALF), 0, PARTS, WARPS, HALF, A)
            ahead = ahead[1:]
        sums = _settled(sums, 0)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [2 * WARPS, 16 // WARPS], [1, WARPS], [0, 1])
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
    for r in gl.static_range(ROWS):
        total = sums[r]
        start = first_n + r * (16 * WARPS)
        if not PARTIAL:
            n = start + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, MMA))
            total *= gl.expand_dims(gl.load(channel_ptr + n, mask=n < N, other=0.0), 1)
            if HAS_BIAS:
                total += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0), 1)
        # n runs fastest in memory and m in a lane.
        result = gl.convert_layout(total.to(out_ptr.dtype.element_ty), OUT)
        n = start + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, OUT))
        out = out_ptr + gl.expand_dims((split.to(gl.int64) * M + m) * N, 0) + gl.expand_dims(n, 1)
        gl.store(out, result, mask=gl.expand_dims(m < M, 0) & gl.expand_dims(n < N, 1))
