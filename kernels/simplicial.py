"""2-simplicial attention, forward and backward: pairs of a query and an offset are the rows of a tile.

Row (i, d) has the query a_id = q_i * k2_{i-d} / sqrt(D) and attends to (k, v) through the window w1.
Nothing of size (T, w1, w2) or (T, w2, D) leaves the chip; all sums are float32.

    forward_kernel   online softmax of each row, then, with p_id the share of row d in all pairs of i,
                     o_i = sum_d p_id * (row's result) * v2_{i-d}
                     lse_i: natural logarithm, over all pairs
    repair_kernel    the queries that forward_kernel or kernels/simplicial_hopper.py has left, for
                     which exp needs a running maximum, or that have met what is not finite
    rows_kernel      P = exp(S - lse_i)   dP = (do_i * v2_{i-d}) . v_j   dS = P (dP - delta_i)
                     U = P V   W = dS K   dq_i = sum_d W_id * k2_{i-d}
                     dk2_k = sum_i W_{i,i-k} * q_i      dv2_k = sum_i U_{i,i-k} * do_i
    columns_kernel   dk_j = sum_id dS a_id              dv_j = sum_id P (do_i * v2_{i-d})

Roles change places when w2 > w1, so that rows take the shorter window. Sums over the rows of a tile
are products with a 0/1 matrix. No atomics: a program of rows_kernel owns PIECE positions and adds to
a float32 buffer of its own, which reaches into the pieces before its own as far as w2 does; the
buffers are added up in order. Two runs give the same bits.

Grid: (tiles of queries | pieces | blocks of keys, KV heads). A tile takes queries position by
position, the g heads of a KV group side by side, so that neither g = 1 nor g = 64 wastes rows. Work,
in units of B H T w1 w2 D: 4 forward, 16 backward (S and dP are computed in both kernels; a single
pass, 12, would need atomics). Backward memory: 2 (1 + (w2 - 1) / PIECE) float32 tensors like k2.

A query with a number that is not finite, or that sees one, gets NaN (unless a weight of exactly 0
hides it); so do the gradients of what it sees. Others keep their bits, whatever is in their tile. One exception: where a product of finite
factors overflows float16 in the backward pass (do * v2, U * do, W * q, W * k2), neighbors may get NaN.

Why the tiles are what they are: kernels/NOTES.md.
"""

import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from triton.tools.tensor_descriptor import TensorDescriptor

try:
    from kernels import simplicial_hopper as hopper
except (ImportError, AttributeError):  # a Triton without this Gluon
    hopper = None

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# a cache changes some of these with each token: compile once
NUMBERS = ["Tq", "Tk", "Tk2", "w1", "w2", "piece", "room"]
PIECE = 64  # positions whose k2 and v2 one program gathers
CLEAN_ROWS = 32  # of a program of clean_kernel and fill_kernel
HEAD = tl.constexpr(16)  # keys of a block at the left edge of a window
REPAIR_TILES = tl.constexpr(32)  # that one program looks through


@triton.jit
def pairs(t, g: tl.constexpr, Tq, Tk, Tk2, w1, w2, NQ: tl.constexpr, BD: tl.constexpr):
    """Tile t: NQ queries with BD offsets each. -> [NQ * BD] each: the row of q, its position among k,
    that of the offset among k2, whether there is such a pair, and whether the query sees several (of
    a single one P = 1 and dS must be 0, without rounding); the first and the last position of the
    tile."""
    r, chunks = tl.arange(0, NQ * BD), tl.cdiv(w2, BD)
    first, d = t // chunks * NQ, t % chunks * BD + r % BD
    n = first + r // BD
    i = tl.minimum(n // g, Tq - 1)  # rows past the end repeat the last position
    i, i2 = i + Tk - Tq, i + Tk2 - Tq
    lo, hi = tl.minimum(first // g, Tq - 1), tl.minimum((first + NQ - 1) // g, Tq - 1)
    valid = (n < Tq * g) & (d < w2) & (d <= i2)
    many = valid & (tl.minimum(i, w1 - 1) + tl.minimum(i2, w2 - 1) > 0)
    return n % g * Tq + n // g, i, i2 - d, valid, many, lo + Tk - Tq, hi + Tk - Tq


@triton.jit
def product(x_ptr, y_ptr, row, k, valid, factor, D: tl.constexpr):
    """factor * x[row] * y[k], rounded once to the dtype of x; 0 where the pair does not exist. [BM, D]"""
    offs_d, mask = tl.arange(0, D)[None, :], valid[:, None]
    x = tl.load(x_ptr + row[:, None] * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + k[:, None] * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    return (x * factor * y).to(x_ptr.dtype.element_ty)


@triton.jit
def keys(x_ptr, start, end, BN: tl.constexpr, D: tl.constexpr):
    offs_n = start + tl.arange(0, BN)
    ptrs = x_ptr + offs_n[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=(offs_n < end)[:, None], other=0.0)  # [BN, D]


@triton.jit
def whole_keys(x_ptr, start, BN: tl.constexpr, D: tl.constexpr):
    offs_n = start + tl.arange(0, BN)
    return tl.load(x_ptr + offs_n[:, None] * D + tl.arange(0, D)[None, :])  # [BN, D]


@triton.jit
def visible(i, j, w1, end):
    return (j <= i) & (j > i - w1) & (j < end)


@triton.jit
def sum_rows(member, x, PREC: tl.constexpr):
    """member [R, BM] bool, x [BM, D] -> [R, D], the sum over the rows of x that are members

    As a product with a 0/1 matrix, in which 0 * inf = NaN would reach all sums: a row that is not
    finite makes NaN of the sums that it is a member of, and adds 0 to the others.
    """
    is_bad = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) == 0  # [BM]
    x = tl.where(is_bad[:, None], 0.0, x)
    total = tl.dot(member.to(x.dtype), x, input_precision=PREC)
    spoiled = tl.max((member & is_bad[None, :]).to(tl.int32), 1) > 0  # [R]
    return tl.where(spoiled[:, None], float("nan"), total)


@triton.jit
def attend(
    acc, m_i, l_i, wild, a, k, v, i, start, end, w1, edge,
    SAFE: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One block of keys. `edge`: some row does not see all of it. SAFE: the rows that are `wild` have
    their maximum subtracted, and a value that is not finite makes NaN of the rows that see its key
    alone; to the others this adds and multiplies exactly nothing."""
    s = tl.dot(a, tl.trans(k), input_precision=PREC)  # [BM, BN], in units of log 2
    if SAFE:
        is_bad = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 1) == 0  # [BN]
        s = tl.where(is_bad[None, :], float("nan"), s)
        v = tl.where(is_bad[:, None], 0.0, v)  # or rows that do not see it would get 0 * inf = NaN
    if edge:
        is_seen = visible(i[:, None], start + tl.arange(0, BN)[None, :], w1, end)
        s = tl.where(is_seen, s, -float("inf"))
    if SAFE:
        m_new = tl.where(wild, tl.maximum(m_i, tl.max(s, 1)), 0.0)
        # a row with no key yet: any finite number will do
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        s -= m_safe[:, None]
        alpha = tl.exp2(m_i - m_safe)
        acc, l_i, m_i = acc * alpha[:, None], l_i * alpha, m_new
    p = tl.exp2(s)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PREC), m_i, l_i + tl.sum(p, 1)


@triton.jit
def attend_all(
    k_blocks, v_blocks, row0, k_ptr, v_ptr, m_i, wild, a, i, lo, hi, first, w1,
    SAFE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    acc, l_i = tl.zeros((m_i.shape[0], D), tl.float32), tl.zeros_like(m_i)
    # as many whole blocks as the last position sees
    body = hi + 1 - tl.minimum(w1, hi + 1) // BN * BN
    for start in tl.range(first, body, HEAD, num_stages=1):
        k, v = keys(k_ptr, start, body, HEAD, D), keys(v_ptr, start, body, HEAD, D)
        acc, m_i, l_i = attend(
            acc, m_i, l_i, wild, a, k, v, i, start, body, w1, True, SAFE, HEAD, PREC
        )
    for start in range(body, hi + 1, BN):
        k, v = k_blocks.load([row0 + start, 0]), v_blocks.load([row0 + start, 0])
        acc, m_i, l_i = attend(
            acc, m_i, l_i, wild, a, k, v, i, start, hi + 1, w1, start + BN > lo + 1, SAFE, BN, PREC
        )
    return acc, m_i, l_i


@triton.jit
def forward_tile(
    tile, q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr,
    Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """The results of NQ queries. Without AGAIN, a query whose scores are out of range, or whose result
    is not finite, is left with an infinite lse; with it, these alone are computed, with care."""
    bh, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD)
    q_ptr += bh * g * Tq * D
    o_ptr += bh * g * Tq * D
    row0 = (bh * Tk).to(tl.int32)
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk2 * D
    v2_ptr += bh * Tk2 * D
    BM: tl.constexpr = NQ * BD
    RQ: tl.constexpr = NQ if NQ > 16 else 16  # the least that a product takes
    factor = tl.cast(scale, tl.float32) * LOG2E
    dtype = q_ptr.dtype.element_ty
    # [RQ, BM]: rows of a query
    mine = tl.arange(0, RQ)[:, None] == (tl.arange(0, BM) // BD)[None, :]
    # The sum of a row's exp2(s) within which no maximum is needed: values up to 2^67 cannot overflow,
    # in float16 P is a number.
    LEAST: tl.constexpr = 1.0 if dtype == tl.float16 else 2.0**-60
    MOST: tl.constexpr = 2.0**15 if dtype == tl.float16 else 2.0**60

    o, lse = tl.zeros((RQ, D), tl.float32), tl.full((RQ,), -float("inf"), tl.float32)
    t = tile * chunks
    row, i, at, valid, many, lo, hi = pairs(t, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
    a = product(q_ptr, k2_ptr, row, at, valid, factor, D)  # [BM, D]
    first = tl.maximum(lo - w1 + 1, 0)
    for c in range(chunks):
        row, i, at, valid, many, lo, hi = pairs(t + c, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        m_i = tl.zeros((BM,), tl.float32)
        acc, m_i, l_i = attend_all(
            k_blocks, v_blocks, row0, k_ptr, v_ptr, m_i, valid, a, i, lo, hi, first, w1,
            False, D, BN, PREC,
        )  # fmt: skip
        wild = valid & ~((l_i > LEAST) & (l_i < MOST))
        if AGAIN:  # with a maximum for the wild rows
            m_i = tl.where(wild, -float("inf"), 0.0)
            acc, m_i, l_i = attend_all(
                k_blocks, v_blocks, row0, k_ptr, v_ptr, m_i, wild, a, i, lo, hi, first, w1,
                True, D, BN, PREC,
            )  # fmt: skip
        else:
            l_i = tl.where(wild, float("nan"), l_i)

        m_i = tl.where(valid, m_i, -float("inf"))
        m_q = tl.max(tl.where(mine, m_i[None, :], -float("inf")), 1)  # [RQ]: over the offsets
        m_q = tl.where(m_q == -float("inf"), 0.0, m_q)
        p = tl.where(mine, tl.exp2(m_i[None, :] - m_q[:, None]) * l_i[None, :], 0.0)  # [RQ, BM]
        l_q = tl.sum(p, 1)  # [RQ], 0 without a pair
        safe = tl.where(l_q == 0.0, 1.0, l_q)
        # [BM]: a row's part of its query, over its own sum
        share = tl.sum(tl.where(mine, p / safe[:, None], 0.0), 0) / l_i
        ptrs = v2_ptr + at[:, None] * D + tl.arange(0, D)[None, :]
        v2 = tl.load(ptrs, mask=valid[:, None], other=0.0)  # [BM, D]
        rows = (acc * share[:, None] * v2).to(dtype)
        if AGAIN:
            part = sum_rows(mine, rows, PREC)  # [RQ, D]
        else:
            part = tl.dot(mine.to(dtype), rows, input_precision=PREC)
        lse_c = tl.where(l_q == 0.0, -float("inf"), m_q + tl.log2(safe))
        m_q = tl.maximum(lse, lse_c)
        m_q = tl.where(m_q == -float("inf"), 0.0, m_q)
        before, now = tl.exp2(lse - m_q), tl.exp2(lse_c - m_q)
        both = tl.where(before + now == 0.0, 1.0, before + now)
        o = o * (before / both)[:, None] + part * (now / both)[:, None]
        lse = tl.where(before + now == 0.0, -float("inf"), m_q + tl.log2(both))
        if c + 1 < chunks:
            row, i, at, valid, many, lo, hi = pairs(t + c + 1, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
            a = product(q_ptr, k2_ptr, row, at, valid, factor, D)
        else:
            a = tl.zeros((BM, D), dtype)

    n = tile * NQ + tl.arange(0, RQ)
    mask = (tl.arange(0, RQ) < NQ) & (n < g * Tq)
    row = n % g * Tq + n // g
    if AGAIN:
        mask &= tl.load(lse_ptr + bh * g * Tq + row, mask=mask, other=0.0) == float("inf")
    else:
        is_finite = tl.min((tl.abs(o) < float("inf")).to(tl.int32), 1) > 0
        lse = tl.where(is_finite, lse, float("inf"))
    tl.store(o_ptr + row[:, None] * D + tl.arange(0, D)[None, :], o.to(dtype), mask=mask[:, None])
    tl.store(lse_ptr + bh * g * Tq + row, lse * LN2, mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    # (B, H, Tq, D), (B, Hkv, Tk, D) twice, as descriptors, k2, v2
    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr,
    o_ptr, lse_ptr,  # like q, (B, H, Tq)
    Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    forward_tile(
        tl.program_id(0), q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr,
        Tq, Tk, Tk2, w1, w2, scale, g, D, NQ, BD, BN, PREC, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def repair_kernel(
    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr,
    Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """What forward_kernel or hopper_kernel has left with an infinite lse. A program looks through the
    queries of REPAIR_TILES tiles, which mostly is all."""
    first = tl.program_id(0) * REPAIR_TILES
    n = first * NQ + tl.arange(0, REPAIR_TILES * NQ)
    to = tl.program_id(1).to(tl.int64) * g * Tq + n % g * Tq + n // g
    left = tl.load(lse_ptr + to, mask=n < g * Tq, other=0.0) == float("inf")
    if tl.max(left.to(tl.int32), 0) > 0:
        for tile in range(first, first + REPAIR_TILES):
            if tl.max((left & (n // NQ == tile)).to(tl.int32), 0) > 0:
                forward_tile(
                    tile, q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr,
                    Tq, Tk, Tk2, w1, w2, scale, g, D, NQ, BD, BN, PREC, True,
                )  # fmt: skip


@triton.jit
def block_gradients(
    u, w, a, h, k, v, lse, delta, i, start, end, w1, edge, BN: tl.constexpr, PREC: tl.constexpr
):
    """One block of keys for a tile of rows: U += P V, W += dS K, where dS = P * (dP - delta)."""
    p = tl.exp2(tl.dot(a, tl.trans(k), input_precision=PREC) - lse[:, None])  # [BM, BN]
    if edge:
        p = tl.where(visible(i[:, None], start + tl.arange(0, BN)[None, :], w1, end), p, 0.0)
    u = tl.dot(p.to(v.dtype), v, u, input_precision=PREC)  # [BM, D]
    ds = p * (tl.dot(h, tl.trans(v), input_precision=PREC) - delta[:, None])
    return u, tl.dot(ds.to(k.dtype), k, w, input_precision=PREC)


@triton.jit
def both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, at, valid, many, factor, D: tl.constexpr):
    a = product(q_ptr, k2_ptr, row, at, valid, factor, D)
    tl.debug_barrier()  # or all loads come first, and registers spill
    # with delta = 0 this makes dS = 0 for a single pair
    return a, product(do_ptr, v2_ptr, row, at, many, 1.0, D)


@triton.jit
def add_rows(x_ptr, rows, mask, x, D: tl.constexpr):
    ptrs = x_ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=mask[:, None], other=0.0) + x, mask=mask[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def rows_kernel(
    # as in the forward; do like q, delta like lse
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr,
    dq_ptr, dk2_ptr, dv2_ptr,  # like q; (B, Hkv, pieces, room, D) twice, float32
    Tq, Tk, Tk2, w1, w2, scale, piece, room,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    bh, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD)
    q_ptr += bh * g * Tq * D
    do_ptr += bh * g * Tq * D
    dq_ptr += bh * g * Tq * D
    lse_ptr += bh * g * Tq
    delta_ptr += bh * g * Tq
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk2 * D
    v2_ptr += bh * Tk2 * D
    BM: tl.constexpr = NQ * BD
    RQ: tl.constexpr = NQ if NQ > 16 else 16
    MORE: tl.constexpr = BD if BD > NQ else NQ
    # at least the NQ + BD - 1 positions of k2 in a tile
    RK: tl.constexpr = 2 * MORE if MORE > 8 else 16
    scale = tl.cast(scale, tl.float32)
    dtype = q_ptr.dtype.element_ty
    offs_d = tl.arange(0, D)[None, :]

    tiles = piece * g // NQ * chunks
    t0 = tl.program_id(0) * tiles
    row, i, at, valid, many, lo, hi = pairs(t0, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
    a, h = both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, at, valid, many, scale * LOG2E, D)
    dq = tl.zeros((RQ, D), tl.float32)
    for t in range(t0, tl.minimum(t0 + tiles, tl.cdiv(Tq * g, NQ) * chunks)):
        row, i, at, valid, many, lo, hi = pairs(t, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        lse = tl.load(lse_ptr + row, mask=valid, other=float("inf")) * LOG2E  # exp2(s - inf) = 0
        delta = tl.load(delta_ptr + row, mask=many, other=0.0)
        u, w = tl.zeros((BM, D), tl.float32), tl.zeros((BM, D), tl.float32)
        body = hi + 1 - tl.minimum(w1, hi + 1) // BN * BN
        for start in tl.range(tl.maximum(lo - w1 + 1, 0), body, HEAD, num_stages=1):
            k, v = keys(k_ptr, start, body, HEAD, D), keys(v_ptr, start, body, HEAD, D)
            u, w = block_gradients(
                u, w, a, h, k, v, lse, delta, i, start, body, w1, True, HEAD, PREC
            )
        for start in range(body, hi + 1, BN):
            k, v = whole_keys(k_ptr, start, BN, D), whole_keys(v_ptr, start, BN, D)
            u, w = block_gradients(
                u, w, a, h, k, v, lse, delta, i, start, hi + 1, w1, start + BN > lo + 1, BN, PREC
            )

        # The rows of a query are summed for dq, those of a position of k2 for dk2 and dv2, by products
        # with a 0/1 matrix. Registers are full of U and W: the barriers keep loads from coming early,
        # and what depends on w1 > 0, which is always so, the compiler cannot take from before the
        # loop, so it is computed again.
        row, i, at, valid, many, lo, hi = pairs(
            tl.where(w1 > 0, t, 0), g, Tq, Tk, Tk2, w1, w2, NQ, BD
        )
        oldest = lo - Tk + Tk2 - t % chunks * BD - BD + 1  # position of k2 that this tile can meet
        there = (tl.arange(0, RK)[:, None] + oldest == at[None, :]).to(dtype)  # [RK, BM]
        tl.debug_barrier()
        # rows of the buffer
        rows = tl.arange(0, RK) + oldest - (Tk2 - Tq) + room - piece * (tl.program_id(0) + 1)
        mask = (rows >= 0) & (rows < room)
        do = tl.load(do_ptr + row[:, None] * D + offs_d, mask=valid[:, None], other=0.0)  # [BM, D]
        own = (tl.where(w1 > 0, bh, 0) * tl.num_programs(0) + tl.program_id(0)) * room * D
        dv2 = tl.dot(there, (u * do).to(dtype), input_precision=PREC)
        add_rows(dv2_ptr + own, rows, mask, dv2, D)
        tl.debug_barrier()
        q = tl.load(q_ptr + row[:, None] * D + offs_d, mask=valid[:, None], other=0.0)
        dk2 = tl.dot(there, (w * q).to(dtype), input_precision=PREC) * scale
        add_rows(dk2_ptr + own, rows, mask, dk2, D)
        tl.debug_barrier()
        k2 = tl.load(k2_ptr + at[:, None] * D + offs_d, mask=valid[:, None], other=0.0)
        # [RQ, BM]
        mine = (tl.arange(0, RQ)[:, None] == (tl.arange(0, BM) // BD)[None, :]).to(dtype)
        part = tl.dot(mine, (w * k2).to(dtype), input_precision=PREC) * scale
        dq = tl.where(t % chunks == 0, 0.0, dq) + part
        n = t // chunks * NQ + tl.arange(0, RQ)
        mask = (tl.arange(0, RQ) < NQ) & (n < g * Tq)
        ptrs = dq_ptr + (n % g * Tq + n // g)[:, None] * D + offs_d
        tl.store(ptrs, dq.to(dtype), mask=mask[:, None])
        row, i, at, valid, many, lo, hi = pairs(t + 1, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        a, h = both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, at, valid, many, scale * LOG2E, D)
        tl.debug_barrier()  # other threads add to these rows next


@triton.jit(do_not_specialize=NUMBERS)
def columns_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    bh, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD)
    q_ptr += bh * g * Tq * D
    do_ptr += bh * g * Tq * D
    lse_ptr += bh * g * Tq
    delta_ptr += bh * g * Tq
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk2 * D
    v2_ptr += bh * Tk2 * D
    dk_ptr += bh * Tk * D
    dv_ptr += bh * Tk * D
    start = tl.program_id(0) * BN
    j = start + tl.arange(0, BN)
    k, v = keys(k_ptr, start, Tk, BN, D), keys(v_ptr, start, Tk, BN, D)
    dk, dv = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
    dk_sum, dv_sum = dk, dv
    factor = tl.cast(scale, tl.float32) * LOG2E

    # queries that see one of these keys: oldest ... newest - 1
    oldest = tl.maximum(start - (Tk - Tq), 0)
    newest = tl.minimum(start + BN + w1 - 1, Tk) - (Tk - Tq)
    first, last = oldest * g // NQ, tl.cdiv(tl.maximum(newest, oldest) * g, NQ)
    for t in range(first * chunks, last * chunks):
        row, i, at, valid, many, lo, hi = pairs(t, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        # of a single pair P = exp2(0 - 0), and dK gets nothing
        a = product(q_ptr, k2_ptr, row, at, many, factor, D)
        h = product(do_ptr, v2_ptr, row, at, valid, 1.0, D)
        lse = tl.where(valid, tl.load(lse_ptr + row, mask=many, other=0.0) * LOG2E, float("inf"))
        delta = tl.load(delta_ptr + row, mask=valid, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(a), input_precision=PREC) - lse[None, :])  # [BN, BM]
        if (start + BN > lo + 1) | (hi - w1 >= start):
            p = tl.where(visible(i[None, :], j[:, None], w1, Tk), p, 0.0)
        dv = tl.dot(p.to(h.dtype), h, dv, input_precision=PREC)
        ds = p * (tl.dot(v, tl.trans(h), input_precision=PREC) - delta[None, :])
        dk = tl.dot(ds.to(a.dtype), a, dk, input_precision=PREC)
        if PREC == "ieee":  # in float32 a long chain of sums would be the largest error
            full = t % 64 == 63
            dk_sum, dv_sum = dk_sum + tl.where(full, dk, 0.0), dv_sum + tl.where(full, dv, 0.0)
            dk, dv = tl.where(full, 0.0, dk), tl.where(full, 0.0, dv)
    offs, dk, dv = j[:, None] * D + tl.arange(0, D)[None, :], dk + dk_sum, dv + dv_sum
    tl.store(dk_ptr + offs, (dk * LN2).to(k.dtype), mask=(j < Tk)[:, None])
    tl.store(dv_ptr + offs, dv.to(v.dtype), mask=(j < Tk)[:, None])


# --------------------------------------------------------------------------------------------------
# What is not finite, in the backward pass. There most sums over keys and queries are products, in
# which P = 0 hides nothing: 0 * inf = NaN. So such numbers are taken out before, and the gradients of
# what meets them are filled with NaN afterwards.


@triton.jit
def clean_kernel(
    x_ptr, y_ptr, x_clean_ptr, y_clean_ptr, is_bad_ptr,  # (N, D) four times; (N)
    N, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies x and y with 0 in place of what is not finite, and says which rows had such a number."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs = n[:, None] * D + tl.arange(0, D)[None, :]
    mask = (n < N)[:, None]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0)
    is_finite_x = tl.abs(x) < float("inf")
    is_finite_y = tl.abs(y) < float("inf")
    tl.store(x_clean_ptr + offs, tl.where(is_finite_x, x, 0.0), mask=mask)
    tl.store(y_clean_ptr + offs, tl.where(is_finite_y, y, 0.0), mask=mask)
    is_bad = tl.min((is_finite_x & is_finite_y).to(tl.int32), 1) == 0
    tl.store(is_bad_ptr + n, is_bad.to(tl.int8), mask=n < N)


@triton.jit
def fill_kernel(
    x_ptr, y_ptr, is_bad_ptr,  # (N, D) twice, (N)
    N, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Fills the bad rows of x and y with NaN."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_bad = tl.load(is_bad_ptr + n, mask=n < N, other=0) != 0
    if tl.max(is_bad.to(tl.int32), 0) > 0:
        offs = n[:, None] * D + tl.arange(0, D)[None, :]
        nan = tl.full((ROWS, D), float("nan"), tl.float32).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + offs, nan, mask=is_bad[:, None])
        tl.store(y_ptr + offs, nan, mask=is_bad[:, None])


def clean(x, y):
    """-> x and y with 0 in place of what is not finite, and which rows of either had such a number

    x and y (..., D) -> the same twice, (...) bool
    """
    x_clean = torch.empty_like(x)
    y_clean = torch.empty_like(y)
    is_bad = x.new_empty(x.shape[:-1], dtype=torch.int8)
    grid = (triton.cdiv(is_bad.numel(), CLEAN_ROWS),)
    tensors = x, y, x_clean, y_clean, is_bad
    clean_kernel[grid](*tensors, is_bad.numel(), x.shape[-1], CLEAN_ROWS)
    return x_clean, y_clean, is_bad.bool()


def fill_nan(x, y, is_bad):
    """Fill the bad rows of x and y (..., D) with NaN. is_bad (...) bool"""
    grid = (triton.cdiv(is_bad.numel(), CLEAN_ROWS),)
    flags = is_bad.to(torch.int8).contiguous()
    fill_kernel[grid](x, y, flags, is_bad.numel(), x.shape[-1], CLEAN_ROWS)


def any_in_window(flags, w):
    """flags (..., T) bool -> (..., T): is one of the w positions up to and including this one True?"""
    count = F.pad(flags.cumsum(-1), (w, 0))
    return count[..., w:] > count[..., :-w]


# --------------------------------------------------------------------------------------------------
# Launch

# Rows of a tile, keys of a block, warps, stages and, if given, the most registers of a thread. Heads
# under 64 take those of 64. Chosen by time on one H200, with registers spilled where that was faster
# (step 7 in NOTES.md).
HOPPER = {
    ("forward", 128): (128, 32, 4, 3),
    ("rows", 128): (128, 32, 8, 3),
    ("columns", 128): (64, 128, 8, 1),
    ("forward", 64): (128, 64, 4, 3, 168),
    ("rows", 64): (128, 32, 4, 3),
    ("columns", 64): (128, 64, 4, 1),
}
OTHERS = {  # untimed; fit 99 KB and do not spill
    "forward": (64, 32, 8, 2),
    "rows": (32, 32, 8, 2),
    "columns": (32, 64, 8, 1),
}
FLOAT32 = (16, 16, 8, 1)  # no tensor cores: larger tiles spill
WIDTHS = (16, 32, 64, 128)


def get_config(kernel, q):
    """Launch options of "forward", "rows" or "columns" for q."""
    if q.dtype == torch.float32:
        return FLOAT32
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9:
        return HOPPER[kernel, max(q.shape[3], 64)]
    return OTHERS[kernel]


def tile_shape(w2, rows):
    """-> queries and offsets of a tile: the fewest offsets that hold w2, up to 32."""
    offsets = min(32, rows, triton.next_power_of_2(w2))
    return rows // offsets, offsets


def get_sizes(q, k, k2, w1, w2):
    """-> number of KV heads in all, and the run-time arguments of the kernels."""
    B, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    Tk2 = k2.shape[2]
    heads = B * Hkv
    longest = max(H // Hkv * Tq, Tk, Tk2)
    if heads >= 2**16 or longest * D >= 2**31 or heads * max(Tk, Tk2) >= 2**31:
        raise ValueError(
            f"{heads} KV heads in the batch with {H // Hkv} x {Tq} queries each are too many for "
            f"one call: split the batch"
        )
    return heads, (Tq, Tk, Tk2, min(w1, Tk), min(w2, Tk2), D**-0.5)


def launch(kernel, programs, config, q, k, w2, tensors, numbers):
    """programs: (queries of a tile, keys of a block) -> grid"""
    rows, block, warps, stages, *registers = config
    NQ, BD = tile_shape(w2, rows)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # of float32 operands only
    constants = q.shape[1] // k.shape[1], q.shape[3], NQ, BD, block, precision
    kernel[programs(NQ, block)](
        *tensors,
        *numbers,
        *constants,
        num_warps=warps,
        num_stages=stages,
        maxnreg=registers[0] if registers else None,
    )


def try_hopper(q, k, v, k2, v2, o, lse, heads, numbers):
    """Run the kernel for Hopper, if it applies. -> whether it did"""
    global hopper
    if hopper is None:
        return False
    plan = hopper.plan(q, q.shape[1] // k.shape[1], *numbers[3:5])
    if plan is None:
        return False
    try:
        hopper.launch(plan, heads, numbers, q, k, v, k2, v2, o, lse)
    except Exception as error:  # of a Triton with another Gluon; those of the GPU come later
        warnings.warn(f"2-simplicial attention is slower: hopper_kernel fails, {error!r:.300}")
        hopper = None
        return False
    return True


def forward(q, k, v, k2, v2, w1, w2, config=None):
    """-> o like q, lse (B, H, Tq) float32 in natural logarithms

    All tensors contiguous. config: launch options of forward_kernel, see HOPPER.
    """
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return o, lse
    if w2 > w1:  # the roles are symmetric: rows take the shorter window
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    heads, numbers = get_sizes(q, k, k2, w1, w2)
    k, v = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (k, v))  # as TMA wants them

    is_done = False
    if q.is_cuda and config is None:
        is_done = try_hopper(q, k, v, k2, v2, o, lse, heads, numbers)
    config = config or get_config("forward", q)
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    blocks = []
    for t in (k, v):
        shape = [config[1], t.shape[3]]
        blocks.append(TensorDescriptor.from_tensor(t.flatten(0, 2), shape))  # (B Hkv Tk, D)
    tensors = q, k, v, *blocks, k2, v2, o, lse

    def programs(NQ, block):
        return triton.cdiv(rows, NQ), heads

    def repair_programs(NQ, block):
        return triton.cdiv(rows, NQ * REPAIR_TILES.value), heads

    if not is_done:
        launch(forward_kernel, programs, config, q, k, w2, tensors, numbers)
    launch(repair_kernel, repair_programs, config, q, k, w2, tensors, numbers)
    return o, lse


def backward(do, q, k, v, k2, v2, o, lse, w1, w2, rows_config=None, columns_config=None):
    """-> dq, dk, dv, dk2, dv2"""
    if q.numel() == 0:
        return tuple(torch.zeros_like(t) for t in (q, k, v, k2, v2))
    if w2 > w1:
        configs = rows_config, columns_config
        dq, dk2, dv2, dk, dv = backward(do, q, k2, v2, k, v, o, lse, w2, w1, *configs)
        return dq, dk, dv, dk2, dv2
    heads, numbers = get_sizes(q, k, k2, w1, w2)
    Tq, Tk, Tk2, w1, w2, _ = numbers
    D = q.shape[3]
    delta = (do.float() * o).sum(-1)  # (B, H, Tq)

    # Take out what is not finite. A query that sees such a number gets P = 0 through its lse.
    q, do, _ = clean(q, do)  # the bad rows have a bad lse or delta
    k, v, is_bad = clean(k, v)  # (B, Hkv, Tk)
    k2, v2, is_bad2 = clean(k2, v2)
    sees_bad = any_in_window(is_bad, w1)[..., Tk - Tq :]  # (B, Hkv, Tq)
    sees_bad |= any_in_window(is_bad2, w2)[..., Tk2 - Tq :]
    spoiled = ~(lse.isfinite() & delta.isfinite())  # (B, H, Tq)
    spoiled |= sees_bad.repeat_interleave(q.shape[1] // k.shape[1], 1)
    lse = lse.masked_fill(spoiled, torch.inf)
    delta = delta.masked_fill(spoiled, 0)
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    tensors = q, k, v, k2, v2, do, lse, delta

    # dk, dv: a program per block of keys
    config = columns_config or get_config("columns", q)

    def programs(NQ, block):
        return triton.cdiv(Tk, block), heads

    launch(columns_kernel, programs, config, q, k, w2, (*tensors, dk, dv), numbers)

    # dq, dk2, dv2: a program per piece of queries, whole tiles, with its own buffers
    config = rows_config or get_config("rows", q)
    piece = max(PIECE, tile_shape(w2, config[0])[0])
    pieces = triton.cdiv(Tq, piece)
    room = piece + w2 - 1  # positions of k2 that a piece meets
    dk2_parts = torch.zeros(heads, pieces, room, D, dtype=torch.float32, device=q.device)
    dv2_parts = torch.zeros_like(dk2_parts)

    def programs(NQ, block):
        return pieces, heads

    tensors = *tensors, dq, dk2_parts, dv2_parts
    launch(rows_kernel, programs, config, q, k, w2, tensors, (*numbers, piece, room))
    dk2 = join_parts(dk2_parts, piece, Tk2 - Tq, Tk2).view(k2.shape).to(k2.dtype)
    dv2 = join_parts(dv2_parts, piece, Tk2 - Tq, Tk2).view(v2.shape).to(v2.dtype)

    # gradients of what meets something that is not finite
    by_group = spoiled.unflatten(1, (k.shape[1], -1)).any(2)  # (B, Hkv, Tq)
    fill_nan(dq, dq, spoiled)
    fill_nan(dk, dv, any_in_window(F.pad(by_group, (Tk - Tq, 0)).flip(-1), w1).flip(-1))
    fill_nan(dk2, dv2, any_in_window(F.pad(by_group, (Tk2 - Tq, 0)).flip(-1), w2).flip(-1))
    return dq, dk, dv, dk2, dv2


def join_parts(parts, piece, past, length):
    """Add up the buffers of all pieces, in order. (heads, pieces, room, D) -> (heads, length, D)

    past: positions before those of the queries.
    """
    heads, pieces, room, D = parts.shape
    back = triton.cdiv(room - piece, piece)  # pieces before its own that a buffer reaches into
    total = parts.new_zeros(heads, back + pieces, piece, D)
    for b in range(back + 1):
        end = room - b * piece
        rows = min(end, piece)
        total[:, back - b : back - b + pieces, piece - rows :] += parts[:, :, end - rows : end]
    first = back * piece - past  # the row of position 0
    total = total.flatten(1, 2)[:, max(first, 0) : first + length]
    return F.pad(total, (0, 0, max(-first, 0), 0))


# --------------------------------------------------------------------------------------------------
# Operators for torch.compile, which treats them as opaque


@custom_op("fivefold::simplicial", mutates_args=())
def simplicial_op(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, k2, v2, w1, w2)


@simplicial_op.register_fake
def _(q, k, v, k2, v2, w1, w2):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("fivefold::simplicial_backward", mutates_args=())
def simplicial_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, o: Tensor, lse: Tensor,
    w1: int, w2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(do, q, k, v, k2, v2, o, lse, w1, w2)


@simplicial_backward_op.register_fake
def _(do, q, k, v, k2, v2, o, lse, w1, w2):
    return tuple(torch.empty_like(t) for t in (q, k, v, k2, v2))


def setup_context(ctx, inputs, output):
    *tensors, ctx.w1, ctx.w2 = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, do, _):
    return *simplicial_backward_op(do.contiguous(), *ctx.saved_tensors, ctx.w1, ctx.w2), None, None


simplicial_op.register_autograd(differentiate, setup_context=setup_context)


def check(q, k, v, k2, v2, w1, w2):
    """Raise ValueError if `attention` cannot take these inputs."""
    fits = all(t.dim() == 4 and t.dtype == q.dtype for t in (k, v, k2, v2)) and q.dim() == 4
    fits = fits and k.shape == v.shape and k2.shape == v2.shape
    fits = fits and q.shape[0] == k.shape[0] == k2.shape[0] and k.shape[1] == k2.shape[1] > 0
    fits = fits and q.shape[1] % k.shape[1] == 0 and q.shape[2] <= min(k.shape[2], k2.shape[2])
    fits = fits and q.shape[3] == k.shape[3] == k2.shape[3] and q.shape[3] in WIDTHS
    if not fits or min(w1, w2) < 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v, k2, v2))
        raise ValueError(
            f"the kernels take q (B, H, Tq, D), and k, v, k2 and v2 (B, Hkv, Tk, D) of the same dtype "
            f"with Hkv a divisor of H, Tk at least Tq, D one of {WIDTHS}, and windows of at least 1, "
            f"not {shapes} with w1 = {w1} and w2 = {w2}"
        )


def attention(q, k, v, k2, v2, w1, w2):
    """-> o (B, H, Tq, D), lse (B, H, Tq) float32 in natural logarithms, not differentiable

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D), all of one dtype. D must be
    one of WIDTHS. There are no second derivatives: asking for one raises RuntimeError.
    """
    check(q, k, v, k2, v2, w1, w2)
    w1 = min(w1, max(k.shape[2], 1))  # an operator takes integers of 64 bits
    w2 = min(w2, max(k2.shape[2], 1))
    q, k, v, k2, v2 = (t.contiguous() for t in (q, k, v, k2, v2))
    return simplicial_op(q, k, v, k2, v2, w1, w2)
