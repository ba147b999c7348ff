"""NVIDIA kernel of skinny_w4a16: every lane loads its own operands of mma.m16n8k16, so no weight crosses a lane or shared memory.

Written in Gluon, where the program says which lane holds what. A warp takes 16 rows of the weight and 128 columns a step: a lane
loads two vectors of four words, four scale bytes and, for each eight rows of x, four vectors of eight values.

W warps, lanes of a tensor [32 W, 4]: lane 4 g + t of a warp holds rows g and g + 8 and the columns 16 t to 16 t + 15 of a chunk of 64.
Programs that share K may form a cluster, whose C programs are one of Triton's with tensors [32 W C, 4]: each sums its part of the
cluster's elements, which the others have written into its shared memory.
"""

# Gluon evaluates constexpr while it compiles; its annotations say otherwise.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# The compiler adds tuples; it does not unpack them.
# ruff: noqa: RUF005
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton describes clusters this way from 3.6 on.
CLUSTERS = "cga_layout" in gl.BlockedLayout.__dataclass_fields__
# A half word holds four values: sign and magnitude at bits 15, 8-6; 9, 2-0; 10, 5-3; 14, 13-11. In the wider format's fields the
# exponent bias is off by 126 (bf16) or 14 (f16).
SIGNS = "0x80008000"
BF16 = (
    "and.b32 a, {w}, 0x81c081c0;\n",
    "shl.b32 a, {w}, 6;\nand.b32 a, a, 0x81c081c0;\n",
    "shl.b32 a, {w}, 3;\nshl.b32 b, {w}, 5;\nand.b32 a, a, 0x01c001c0;\nlop3.b32 a, b, " + SIGNS + ", a, 0xea;\n",
    "shr.u32 a, {w}, 5;\nshl.b32 b, {w}, 1;\nand.b32 a, a, 0x01c001c0;\nlop3.b32 a, b, " + SIGNS + ", a, 0xea;\n",
)
F16 = tuple(
    f"{magnitude} a, {{w}}, {by};\nshl.b32 b, {{w}}, {sign};\nand.b32 a, a, 0x0e000e00;\nlop3.b32 a, b, {SIGNS}, a, 0xea;\n"
    for magnitude, by, sign in (("shl.b32", 3, 0), ("shl.b32", 9, 6), ("shl.b32", 6, 5), ("shr.u32", 2, 1))
)


def _unpack(chunk: int, half: bool) -> gl.constexpr:
    """$0 to $15: four operands of mma; $16 to $19: their words; $20: scale bytes of rows g and g + 8, for this chunk and the other.

    A scale byte has its exponent's upper four bits below and the rest above, so that two copies of it hold the 16-bit float's fields."""
    lines = ["{", ".reg .b32 s0, s1, a, b, z;", f"mov.b32 z, {SIGNS};"]
    for row in range(2):
        byte = str(2 * chunk + row) * 4
        lines += [f"prmt.b32 s{row}, $20, $20, 0x{byte};"]
        lines += [f"shl.b32 s{row}, s{row}, 3;"] if half else []
        lines += [f"and.b32 s{row}, s{row}, {'0x7f807f80' if half else '0x0ff00ff0'};"]
        lines += [] if half else [f"or.b32 s{row}, s{row}, 0x70007000;"]
    for j in range(4):
        for part, body in enumerate(F16 if half else BF16):
            # sm_80 multiplies bf16 pairs only in a sum; adding -0 keeps the sign of a zero.
            multiply = "mul.rn.f16x2 ${o}, a, s{r};" if half else "fma.rn.bf16x2 ${o}, a, s{r}, z;"
            lines += [body.format(w=f"${16 + j}"), multiply.format(o=4 * j + part, r=part % 2)]
    return gl.constexpr("\n".join([*lines, "}"]))


def _multiply(kind: str) -> gl.constexpr:
    """$0-$3: $4-$7 plus the products of two operands, $8-$11 and $12-$15, with the columns of x in $16-$19."""
    mma = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    first = f"{mma} {{d0, d1, d2, d3}}, {{$8, $9, $10, $11}}, {{$16, $17}}, {{$4, $5, $6, $7}};"
    second = f"{mma} {{$0, $1, $2, $3}}, {{$12, $13, $14, $15}}, {{$18, $19}}, {{d0, d1, d2, d3}};"
    return gl.constexpr("\n".join(["{", ".reg .f32 d0, d1, d2, d3;", first, second, "}"]))


_BF16_0, _BF16_1, _F16_0, _F16_1 = _unpack(0, False), _unpack(1, False), _unpack(0, True), _unpack(1, True)
_UNPACK_OPERANDS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 5))
_MMA_BF16, _MMA_F16 = _multiply("bf16"), _multiply("f16")
_MMA_OPERANDS = gl.constexpr(",".join(["=&f"] * 4 + ["f"] * 4 + ["r"] * 12))


@gluon.constexpr_function
def _lanes(size: list[int], threads: list[int], warps: list[int], programs: int) -> gl.BlockedLayout:
    """Rows of a tensor over warps and, above one program, over those of a cluster; the last dimension runs fastest."""
    cluster = {"cga_layout": [[2**bit, 0] for bit in range(programs.bit_length() - 1)]} if programs > 1 else {}
    return gl.BlockedLayout(size, threads, warps, [1, 0], **cluster)


@gluon.constexpr_function
def _meeting(groups: int, programs: int, threads: int) -> str:
    """The sums of a cluster's programs. Operands: four elements of each own group, then four of each group before; group g is summed
    by program g % programs, always in the same order. A cluster began with an arrival that is waited for here: all programs run."""
    own = -(-groups // programs)
    part = 16 * threads
    lines = ["{", f".shared .align 16 .b8 met[{own * programs * part}];"]
    lines += [".reg .b32 rank, thread, here, to;", ".reg .f32 s<4>;", "barrier.cluster.wait.acquire.aligned;"]
    lines += ["mov.u32 rank, %cluster_ctarank;", "mov.u32 thread, %tid.x;", "mov.u32 here, met;"]
    lines += ["mad.lo.u32 here, thread, 16, here;", f"mad.lo.u32 rank, rank, {part}, here;"]
    for group in range(groups):
        values = ", ".join(f"${4 * (own + group) + i}" for i in range(4))
        lines += [f"mapa.shared::cluster.u32 to, rank, {group % programs};"]
        lines += [f"st.shared::cluster.v4.f32 [to+{group // programs * programs * part}], {{{values}}};"]
    lines += ["barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"]
    for one in range(own):
        sums = [f"${4 * one + i}" for i in range(4)]
        for program in range(programs):
            into = sums if program == 0 else ["s0", "s1", "s2", "s3"]
            lines += [f"ld.shared.v4.f32 {{{', '.join(into)}}}, [here+{(one * programs + program) * part}];"]
            lines += [f"add.f32 {total}, {total}, {value};" for total, value in zip(sums, into, strict=True) if program]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _meeting_operands(groups: int, programs: int) -> str:
    return ",".join(["=&f"] * (4 * -(-groups // programs)) + ["f"] * (4 * groups))


@gluon.constexpr_function
def _kinds(own: int) -> tuple:
    return (gl.float32,) * own


@gluon.jit
def _operands(words, scales, CHUNK: gl.constexpr, HALF: gl.constexpr):
    """The weights of one chunk times their scales times 2 ** -8: four tensors, each the left operand of one mma a lane."""
    asm: gl.constexpr = (_F16_0 if CHUNK == 0 else _F16_1) if HALF else (_BF16_0 if CHUNK == 0 else _BF16_1)
    kinds: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    return gl.inline_asm_elementwise(asm, _UNPACK_OPERANDS, [words, scales], dtype=kinds, is_pure=True, pack=4)


@gluon.jit
def _add(acc, a0, a1, x, HALF: gl.constexpr):
    asm: gl.constexpr = _MMA_F16 if HALF else _MMA_BF16
    return gl.inline_asm_elementwise(asm, _MMA_OPERANDS, [acc, a0, a1, x], dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def _load_words(w_ptr, tile, tiles, pair, pairs, lane, part):
    """A lane's words of both chunks of one step of a tile of 16 rows, and the number of the lane's first scale word."""
    at = (gl.minimum(tile, tiles - 1) * pairs + pair) * 32 + lane
    words = w_ptr + gl.expand_dims(at * 8 - lane * 4, 1) + gl.expand_dims(part, 0)
    first = gl.load(words, eviction_policy="evict_first")
    return (first, gl.load(words + 128, eviction_policy="evict_first"), at)


@gluon.jit
def _load_weights(w_ptr, s_ptr, tile, tiles, pair, pairs, lane, part, ROWS: gl.constexpr, WARPS_N: gl.constexpr, EVEN: gl.constexpr):
    """Words of both chunks and scales of one step, for ROWS tiles of 16 rows. Past the last pair they are the last one's: x is zero."""
    if not EVEN:
        pair = gl.minimum(pair, pairs - 1)
    found = ()
    for r in gl.static_range(ROWS):
        first, second, at = _load_words(w_ptr, tile + r * WARPS_N, tiles, pair, pairs, lane, part)
        scales = gl.load(s_ptr + gl.expand_dims(at * 4, 1) + gl.expand_dims(part, 0), eviction_policy="evict_first")
        found = found + ((first, second, scales),)
    return found


@gluon.jit
def _load_four(at, valid, MASKED: gl.constexpr):
    """Four words of x; zero where not valid. Without a mask no register is cleared before."""
    if MASKED:
        return gl.load(at, mask=valid, other=0, eviction_policy="evict_last")
    return gl.load(at, eviction_policy="evict_last")


@gluon.jit
def _load_x(x_ptr, m, M, row_words, pair, pairs, t, part, COLUMNS: gl.constexpr, EVEN: gl.constexpr):
    """What a lane multiplies in one step: for each eight rows of x, its 16 columns of both chunks."""
    found = ()
    valid = gl.expand_dims(pair < pairs, 1) & (gl.expand_dims(part, 0) >= 0)
    for c in gl.static_range(COLUMNS):
        # Rows past the last are computed and not stored.
        row = gl.minimum(m + c * 8, M - 1)
        at = x_ptr + gl.expand_dims(row.to(gl.int64) * row_words + pair * 64 + t * 8, 1) + gl.expand_dims(part, 0)
        x0, x1 = _load_four(at, valid, not EVEN), _load_four(at + 4, valid, not EVEN)
        found = found + ((x0, x1, _load_four(at + 32, valid, not EVEN), _load_four(at + 36, valid, not EVEN)),)
    return found


@gluon.jit
def _sum(sums, weights, xs, ROWS: gl.constexpr, COLUMNS: gl.constexpr, CHAINS: gl.constexpr, HALF: gl.constexpr):
    """The sums after one step."""
    added = ()
    for r in gl.static_range(ROWS):
        a0, a1, a2, a3 = _operands(weights[r][0], weights[r][2], 0, HALF)
        b0, b1, b2, b3 = _operands(weights[r][1], weights[r][2], 1, HALF)
        for c in gl.static_range(COLUMNS):
            acc = _add(sums[(r * COLUMNS + c) * CHAINS], a0, a1, xs[c][0], HALF)
            acc = _add(acc, a2, a3, xs[c][1], HALF)
            if CHAINS == 2:
                added = added + (acc,)
                acc = sums[(r * COLUMNS + c) * CHAINS + 1]
            acc = _add(acc, b0, b1, xs[c][2], HALF)
            added = added + (_add(acc, b2, b3, xs[c][3], HALF),)
    return added


@gluon.jit
def _factor(channel_ptr, bias_ptr, n, N, HAS_BIAS: gl.constexpr):
    channel = gl.load(channel_ptr + n, mask=n < N, other=0.0)
    return (channel, gl.load(bias_ptr + n, mask=n < N, other=0.0) if HAS_BIAS else channel)


@gluon.jit(do_not_specialize=["M"])
def tile(
    x_ptr,
    w_ptr,
    s_ptr,
    channel_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    row_words,
    tiles,
    pairs,
    HAS_BIAS: gl.constexpr,
    PARTIAL: gl.constexpr,
    EVEN: gl.constexpr,
    HALF: gl.constexpr,
    STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
    WARPS_N: gl.constexpr,
    DEPTH: gl.constexpr,
    DEPTH_X: gl.constexpr,
    OVERLAP: gl.constexpr,
    CLUSTER: gl.constexpr,
    LOOP: gl.constexpr,
):
    """x_ptr: int32, two values each. WARPS_N: warps that have rows of their own; the others of a program share K. ROWS: tiles of 16
    rows a warp. COLUMNS: groups of eight rows of x. DEPTH, DEPTH_X: steps whose weights and x are asked for ahead. EVEN: every warp
    has STEPS pairs of chunks. CLUSTER: programs of a cluster, which share K. LOOP: all steps but the last DEPTH are a loop."""
    WARPS_K: gl.constexpr = WARPS // WARPS_N
    # Two sums for each element while registers suffice: a sum is a chain of matrix instructions.
    CHAINS: gl.constexpr = 2 if ROWS * COLUMNS <= 2 else 1
    # Groups of 16 x 8 elements a warp, and how many of them this program sums.
    GROUPS: gl.constexpr = ROWS * COLUMNS
    OWN: gl.constexpr = (GROUPS + CLUSTER - 1) // CLUSTER
    LANES: gl.constexpr = _lanes([1, 4], [32, 1], [WARPS, 1], CLUSTER)
    thread = gl.arange(0, CLUSTER * WARPS * 32, gl.SliceLayout(1, LANES))
    part = gl.arange(0, 4, gl.SliceLayout(0, LANES))
    warp, lane = thread // 32 % WARPS, thread % 32
    g, t = lane // 4, lane % 4
    first_tile = gl.program_id(0) * (ROWS * WARPS_N)
    own_tile = first_tile + warp % WARPS_N
    split = gl.program_id(1)
    first_m = gl.program_id(2) * (8 * COLUMNS)
    m = first_m + g
    first = warp // WARPS_N + (thread // (32 * WARPS) if CLUSTER > 1 else split) * (STEPS * WARPS_K)
    if CLUSTER > 1:
        gl.inline_asm_elementwise("barrier.cluster.arrive.relaxed.aligned; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    # Weights are constants: they may be read while the kernel before still runs, x may not.
    ahead = ()
    for d in gl.static_range(DEPTH):
        ahead = ahead + (_load_weights(w_ptr, s_ptr, own_tile, tiles, first + d * WARPS_K, pairs, lane, part, ROWS, WARPS_N, EVEN),)
    OUT: gl.constexpr = _lanes([1, 1], [1, 32], [1, WARPS], CLUSTER)
    i = gl.expand_dims(gl.arange(0, WARPS_N * 128, gl.SliceLayout(0, OUT)), 0)
    rank = gl.expand_dims(gl.arange(0, CLUSTER, gl.SliceLayout(1, OUT)), 1)
    # Where registers suffice, what sums are multiplied by is asked for early too.
    EARLY: gl.constexpr = OWN <= 2 and not PARTIAL
    factors = ()
    if EARLY:
        for own in gl.static_range(OWN):
            n = (first_tile + (own * CLUSTER + rank) // COLUMNS * WARPS_N) * 16 + i % (16 * WARPS_N)
            factors = factors + (_factor(channel_ptr, bias_ptr, n, N, HAS_BIAS),)
    if OVERLAP:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        # Not before: the next kernel may read what kernels before this one wrote without waiting, as Inductor's do.
        gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    ahead_x = ()
    for d in gl.static_range(DEPTH_X):
        ahead_x = ahead_x + (_load_x(x_ptr, m, M, row_words, first + d * WARPS_K, pairs, t, part, COLUMNS, EVEN),)
    sums = ()
    for _ in gl.static_range(ROWS * COLUMNS * CHAINS):
        sums = sums + (gl.zeros([CLUSTER * WARPS * 32, 4], gl.float32, LANES),)
    # Written out, STEPS steps are code of STEPS times the size; a loop is what many steps need.
    ROLLED: gl.constexpr = STEPS - DEPTH if LOOP else 0
    for step in range(ROLLED):
        pair = first + (step + DEPTH) * WARPS_K
        ahead = ahead + (_load_weights(w_ptr, s_ptr, own_tile, tiles, pair, pairs, lane, part, ROWS, WARPS_N, EVEN),)
        column = first + (step + DEPTH_X) * WARPS_K
        ahead_x = ahead_x + (_load_x(x_ptr, m, M, row_words, column, pairs, t, part, COLUMNS, EVEN),)
        sums = _sum(sums, ahead[0], ahead_x[0], ROWS, COLUMNS, CHAINS, HALF)
        ahead = ahead[1:]
        ahead_x = ahead_x[1:]
    for step in gl.static_range(ROLLED, STEPS):
        if step + DEPTH < STEPS:
            pair = first + (step + DEPTH) * WARPS_K
            ahead = ahead + (_load_weights(w_ptr, s_ptr, own_tile, tiles, pair, pairs, lane, part, ROWS, WARPS_N, EVEN),)
        if step + DEPTH_X < STEPS:
            column = first + (step + DEPTH_X) * WARPS_K
            ahead_x = ahead_x + (_load_x(x_ptr, m, M, row_words, column, pairs, t, part, COLUMNS, EVEN),)
        sums = _sum(sums, ahead[0], ahead_x[0], ROWS, COLUMNS, CHAINS, HALF)
        ahead = ahead[1:]
        ahead_x = ahead_x[1:]
    totals = ()
    for group in gl.static_range(GROUPS):
        acc = sums[group * CHAINS]
        if CHAINS == 2:
            acc += sums[group * CHAINS + 1]
        totals = totals + (acc,)
    if CLUSTER > 1:
        asm: gl.constexpr = _meeting(GROUPS, CLUSTER, WARPS * 32)
        operands: gl.constexpr = _meeting_operands(GROUPS, CLUSTER)
        kinds: gl.constexpr = _kinds(OWN)
        totals = gl.inline_asm_elementwise(asm, operands, totals, dtype=kinds, is_pure=False, pack=4)
    # The warps' sums meet in shared memory. An element's place in a lane: half of the tile, then row of x; n is to run fastest.
    for own in gl.static_range(OWN):
        acc = totals[own]
        if WARPS_K > 1:
            acc = gl.sum(gl.reshape(acc, [CLUSTER, WARPS_K, WARPS_N * 128]), 1)
        parts = gl.permute(gl.reshape(acc, [CLUSTER, WARPS_N, 8, 4, 2, 2]), [0, 3, 5, 1, 4, 2])
        total = gl.convert_layout(gl.reshape(parts, [CLUSTER, WARPS_N * 128]), OUT)
        group = own * CLUSTER + rank
        n = (first_tile + group // COLUMNS * WARPS_N) * 16 + i % (16 * WARPS_N)
        m_out = first_m + group % COLUMNS * 8 + i // (16 * WARPS_N)
        if not PARTIAL:
            factor = factors[own] if EARLY else _factor(channel_ptr, bias_ptr, n, N, HAS_BIAS)
            total *= factor[0]
            if HAS_BIAS:
                total += factor[1]
        out = out_ptr + (split.to(gl.int64) * M + m_out) * N + n
        gl.store(out, total.to(out_ptr.dtype.element_ty), mask=(m_out < M) & (n < N) & (group < GROUPS))
