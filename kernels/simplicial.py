"""2-simplicial attention, forward and backward: pairs of a query and an offset are the rows of a tile.

Row (i, d) has the query a_id = q_i * k2_{i-d} / sqrt(D) and attends to (k, v) through the window w1. Nothing of size (T, w1, w2)
or (T, w2, D) leaves the chip; all sums are float32.

    forward_kernel   online softmax of each row, then, with p_id the share of row d in all pairs of i,
                     o_i = sum_d p_id * (row's result) * v2_{i-d}                        lse_i: natural logarithm, over all pairs
    hopper_kernel    the same in Gluon, for 16 bits and most windows on Hopper; queries with a row out of range it leaves to repair_kernel
    rows_kernel      P = exp(S - lse_i)   dP = (do_i * v2_{i-d}) . v_j   dS = P (dP - delta_i)   U = P V   W = dS K
                     dq_i = sum_d W_id * k2_{i-d}      dk2_k = sum_i W_{i,i-k} * q_i      dv2_k = sum_i U_{i,i-k} * do_i
    columns_kernel   dk_j = sum_id dS a_id             dv_j = sum_id P (do_i * v2_{i-d})

Roles change places when w2 > w1, so that rows take the shorter window. Sums over the rows of a tile are products with a 0/1
matrix. No atomics: a program of rows_kernel owns PIECE positions and adds to a float32 buffer of its own, which reaches into the
pieces before its own as far as w2 does; the buffers are added up in order. Two runs give the same bits.

Grid: (tiles of queries | pieces | blocks of keys, KV heads). A tile takes queries position by position, the g heads of a KV
group side by side, so that neither g = 1 nor g = 64 wastes rows. Work, in units of B H T w1 w2 D: 4 forward, 16 backward (S and
dP are computed in both kernels; a single pass, 12, would need atomics). Backward memory: 2 (1 + (w2 - 1) / PIECE) float32 tensors
like k2.

Steps; rates in TFLOP/s on one H200 (torch 2.11, triton 3.6), bfloat16, D = 128, g = 64 | D = 128, g = 1 | D = 64, g = 1. They are of
variants side by side; what the file is now stands in results/kernels.json.
1. Keys in blocks of 64 from the window's old end: the 515 keys of four positions take 9 blocks, an eighth of the work is void.
2. Whole blocks end at the last position, and what is left at the old end is taken 16 keys at a time: 8 blocks and a small one.
   Blocks are whole, so their loads need no mask; scores are masked in the last block and the small ones alone.
3. A row operand computed in place stays in registers, 20 bytes spill. Carried around the loop that uses it (the next tile's is made
   at the end), Triton puts it into shared memory: none.                             forward 345 | 317 | 226 without spills
4. exp2 without a running maximum, 200 instructions a block of keys where there were 350; a tile with a row out of range is done
   once more, with one: no row depends on another, to the bit.                                          342 | 321 | 277
   Less than it should be: tiles of 64 rows read 5.5 TB/s of keys from L2, and of 128 rows only one fits a multiprocessor. Held to
   128 registers two do, and spill 300 bytes: 368 | 354 | 264. The next block's scores ahead of this one's use: Triton waits at once.
   Whole blocks by TMA need fewer registers; at D = 64 three tiles share a multiprocessor and spill 44 bytes, outside the loops:
                                                                                                         376 | 350 | 317
5. rows_kernel: of tiles that spill nothing only (64, 32, 8, 2) was left at D = 128, at 159 | 153 | -, for 8 warps share 64 rows
   badly. With positions computed anew after the loop (128, 32, 8, 3) spills 4 bytes in place of 196:   340 | 304 | 288 (then 196)
6. columns_kernel without a pipeline, in small tiles: two or three share a multiprocessor.              254 | 274 | 254
7. Tiles of 128 rows with 4 warps, so that two share a multiprocessor and each key is fetched half as often: 255 registers, 390 bytes
   spilled, and faster all the same than tiles that spill nothing:                                      387 | 368 | 328 forward
   Larger tiles for columns_kernel, and for rows_kernel at D = 64, likewise: backward in all 119 | 14.4 | 15.7 ms before, then
   111 | 14.0 | 14.0.
8. hopper_kernel, the forward pass in Gluon, where its loader has the keys of the next blocks in shared memory before they are asked
   for and exponentials run beside products (predicted 480 to 560 | 450 to 530 | 380 to 450):                492 | 479 | 391
   The loader reads a query's row once, not for each of its offsets:                490 | 503 | 388 before, 508 | 509 | 392
9. The backward pass in Gluon as well, one kernel for both of its halves, not kept. With operands and sums left out its products and
   exponentials ran at 396 | 635 (rows) and 539 | 560 (columns) for D = 128. But two accumulators of 64 x 128 leave the loader 56
   registers a thread, too few to make 64 rows as fast as 128 keys use them up (columns 266 | 341, fetched ahead by cp.async
   403 | 399), and dk2 and dv2 are sums over rows that no register has room for (rows 281 | 343, sums in shared memory 230 | 361).
   The whole pass at best: 106.7 | 12.9 ms, in place of 111.5 | 14.1. With operands and sums left out it still took 78.6 | 8.3 ms, 4.5 |
   3.8 times the forward's time, of 3 that were asked for: eight products against two.
"""
import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from triton.tools.tensor_descriptor import TensorDescriptor

try:                                                                 # Triton's own level below, experimental: all works without it
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as SharedDescriptor
except (ImportError, AttributeError):
    gluon = None

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
NUMBERS = ["Tq", "Tk", "Tk2", "w1", "w2", "piece", "room"]           # a cache changes some with each token: compile once
PIECE = 64                                                           # positions whose k2 and v2 one program gathers
HEAD = tl.constexpr(16)                                              # keys of a block at the left edge of a window


@triton.jit
def pairs(t, g: tl.constexpr, Tq, Tk, Tk2, w1, w2, NQ: tl.constexpr, BD: tl.constexpr):
    """Tile t: NQ queries with BD offsets each. -> [NQ * BD] each: the row of q, its position among k, that of the offset among
    k2, whether there is such a pair, and whether the query sees several (of a single one P = 1 and dS must be 0, without
    rounding); the first and the last position of the tile."""
    r, chunks = tl.arange(0, NQ * BD), tl.cdiv(w2, BD)
    first, d = t // chunks * NQ, t % chunks * BD + r % BD
    n = first + r // BD
    i = tl.minimum(n // g, Tq - 1)                                   # rows past the end repeat the last position
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
    return tl.load(x_ptr + offs_n[:, None] * D + tl.arange(0, D)[None, :], mask=(offs_n < end)[:, None], other=0.0)   # [BN, D]


@triton.jit
def whole_keys(x_ptr, start, BN: tl.constexpr, D: tl.constexpr):
    return tl.load(x_ptr + (start + tl.arange(0, BN))[:, None] * D + tl.arange(0, D)[None, :])                        # [BN, D]


@triton.jit
def visible(i, j, w1, end):
    return (j <= i) & (j > i - w1) & (j < end)


@triton.jit
def attend(acc, m_i, l_i, wild, a, k, v, i, start, end, w1, edge, SAFE: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr):
    """One block of keys. `edge`: some row does not see all of it. SAFE: the rows that are `wild` have their maximum subtracted; to
    the others this adds and multiplies exactly nothing."""
    s = tl.dot(a, tl.trans(k), input_precision=PREC)                 # [BM, BN], in units of log 2
    if edge:
        s = tl.where(visible(i[:, None], start + tl.arange(0, BN)[None, :], w1, end), s, -float("inf"))
    if SAFE:
        m_new = tl.where(wild, tl.maximum(m_i, tl.max(s, 1)), 0.0)
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)        # a row with no key yet: any finite number will do
        s -= m_safe[:, None]
        alpha = tl.exp2(m_i - m_safe)
        acc, l_i, m_i = acc * alpha[:, None], l_i * alpha, m_new
    p = tl.exp2(s)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PREC), m_i, l_i + tl.sum(p, 1)


@triton.jit
def attend_all(k_blocks, v_blocks, row0, k_ptr, v_ptr, m_i, wild, a, i, lo, hi, first, w1,
               SAFE: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr):
    acc, l_i = tl.zeros((m_i.shape[0], D), tl.float32), tl.zeros_like(m_i)
    body = hi + 1 - tl.minimum(w1, hi + 1) // BN * BN                # as many whole blocks as the last position sees
    for start in tl.range(first, body, HEAD, num_stages=1):
        k, v = keys(k_ptr, start, body, HEAD, D), keys(v_ptr, start, body, HEAD, D)
        acc, m_i, l_i = attend(acc, m_i, l_i, wild, a, k, v, i, start, body, w1, True, SAFE, HEAD, PREC)
    for start in range(body, hi + 1, BN):
        k, v = k_blocks.load([row0 + start, 0]), v_blocks.load([row0 + start, 0])
        acc, m_i, l_i = attend(acc, m_i, l_i, wild, a, k, v, i, start, hi + 1, w1, start + BN > lo + 1, SAFE, BN, PREC)
    return acc, m_i, l_i


@triton.jit
def forward_tile(
    tile, q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr, Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, AGAIN: tl.constexpr,
):
    """The results of NQ queries; with AGAIN only of those whose lse is infinite so far."""
    bh, chunks = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD)
    q_ptr += bh * g * Tq * D
    o_ptr += bh * g * Tq * D
    row0 = (bh * Tk).to(tl.int32)
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk2 * D
    v2_ptr += bh * Tk2 * D
    BM: tl.constexpr = NQ * BD
    RQ: tl.constexpr = NQ if NQ > 16 else 16                         # the least that a product takes
    factor = tl.cast(scale, tl.float32) * LOG2E
    dtype = q_ptr.dtype.element_ty
    mine = tl.arange(0, RQ)[:, None] == (tl.arange(0, BM) // BD)[None, :]                    # [RQ, BM]: rows of a query
    # The sum of a row's exp2(s) within which no maximum is needed: values up to 2^67 cannot overflow, in float16 P is a number.
    LEAST: tl.constexpr = 1.0 if dtype == tl.float16 else 2.0 ** -60
    MOST: tl.constexpr = 2.0 ** 15 if dtype == tl.float16 else 2.0 ** 60

    o, lse = tl.zeros((RQ, D), tl.float32), tl.full((RQ,), -float("inf"), tl.float32)
    t = tile * chunks
    row, i, at, valid, many, lo, hi = pairs(t, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
    a = product(q_ptr, k2_ptr, row, at, valid, factor, D)            # [BM, D]
    first = tl.maximum(lo - w1 + 1, 0)
    for c in range(chunks):
        row, i, at, valid, many, lo, hi = pairs(t + c, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        m_i = tl.zeros((BM,), tl.float32)
        acc, m_i, l_i = attend_all(k_blocks, v_blocks, row0, k_ptr, v_ptr, m_i, valid, a, i, lo, hi, first, w1, False, D, BN, PREC)
        wild = valid & ~((l_i > LEAST) & (l_i < MOST))
        if tl.max(wild.to(tl.int32), 0) > 0:                         # once more, with a maximum for those rows
            m_i = tl.where(wild, -float("inf"), 0.0)
            acc, m_i, l_i = attend_all(k_blocks, v_blocks, row0, k_ptr, v_ptr, m_i, wild, a, i, lo, hi, first, w1, True, D, BN, PREC)

        m_i = tl.where(valid, m_i, -float("inf"))
        m_q = tl.max(tl.where(mine, m_i[None, :], -float("inf")), 1)                         # [RQ]: over the offsets
        m_q = tl.where(m_q == -float("inf"), 0.0, m_q)
        p = tl.where(mine, tl.exp2(m_i[None, :] - m_q[:, None]) * l_i[None, :], 0.0)         # [RQ, BM]
        l_q = tl.sum(p, 1)                                           # [RQ], 0 without a pair
        safe = tl.where(l_q == 0.0, 1.0, l_q)
        share = tl.sum(p / safe[:, None], 0) / l_i                   # [BM]: a row's part of its query, over its own sum
        v2 = tl.load(v2_ptr + at[:, None] * D + tl.arange(0, D)[None, :], mask=valid[:, None], other=0.0)      # [BM, D]
        part = tl.dot(mine.to(dtype), (acc * share[:, None] * v2).to(dtype), input_precision=PREC)             # [RQ, D]
        lse_c = tl.where(l_q == 0.0, -float("inf"), m_q + tl.log2(safe))
        m_q = tl.maximum(lse, lse_c)
        m_q = tl.where(m_q == -float("inf"), 0.0, m_q)
        before, now = tl.exp2(lse - m_q), tl.exp2(lse_c - m_q)
        both = tl.where(before + now == 0.0, 1.0, before + now)
        o = o * (before / both)[:, None] + part * (now / both)[:, None]
        lse = m_q + tl.log2(both)
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
    tl.store(o_ptr + row[:, None] * D + tl.arange(0, D)[None, :], o.to(dtype), mask=mask[:, None])
    tl.store(lse_ptr + bh * g * Tq + row, lse * LN2, mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr,         # (B, H, Tq, D), (B, Hkv, Tk, D) twice, as descriptors, k2, v2
    o_ptr, lse_ptr,                                                  # like q, (B, H, Tq)
    Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    forward_tile(tl.program_id(0), q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr, Tq, Tk, Tk2, w1, w2, scale,
                 g, D, NQ, BD, BN, PREC, False)


@triton.jit(do_not_specialize=NUMBERS)
def repair_kernel(
    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr, Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    """What hopper_kernel has left with an infinite lse. A program looks through the queries of 32 tiles, which mostly is all."""
    first = tl.program_id(0) * 32
    n = first * NQ + tl.arange(0, 32 * NQ)
    to = tl.program_id(1).to(tl.int64) * g * Tq + n % g * Tq + n // g
    left = tl.load(lse_ptr + to, mask=n < g * Tq, other=0.0) == float("inf")
    if tl.max(left.to(tl.int32), 0) > 0:
        for tile in range(first, first + 32):
            if tl.max((left & (n // NQ == tile)).to(tl.int32), 0) > 0:
                forward_tile(tile, q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr, Tq, Tk, Tk2, w1, w2, scale,
                             g, D, NQ, BD, BN, PREC, True)


# The forward pass once more, for Hopper alone, in Gluon. A program stays on its multiprocessor and goes from tile to tile. Four warps, the
# loader, make row operands and fetch blocks of keys by TMA into a ring of stages; NC times four others, the consumers, take the 64 rows
# of NQ queries each. A consumer issues the scores of a block and then the product of the block before with its values, and takes the
# exponentials of the former while the latter runs. Barriers in shared memory: `full` of keys, values and row operands, then `empty`.
by_hand = gluon.jit if gluon else triton.jit                         # without Gluon nothing calls these functions


@by_hand
def span(t, g: tl.constexpr, Tq, Tk, w1, NQ: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr):
    """Tile t of NQ queries: the position where its blocks start, their number and where the small block before them starts. As above
    they end at the last position, and up to 16 keys at the old end are a small block's; more are one more block's."""
    lo = gl.minimum(t * NQ // g, Tq - 1) + Tk - Tq
    hi = gl.minimum((t * NQ + NQ - 1) // g, Tq - 1) + Tk - Tq
    count = gl.maximum(gl.minimum(w1, hi + 1), 0) // BN
    rest = hi + 1 - count * BN - gl.maximum(lo - w1 + 1, 0)
    few = (rest > 0) & (rest <= HEAD) & (count > 0) & SMALL
    small = gl.where(few, hi + 1 - count * BN - HEAD, -HEAD)         # before position 0 all is 0 and hidden
    count += (((rest > 0) & (few == 0)) | (count == 0)).to(gl.int32)
    return hi + 1 - count * BN, count, small


@by_hand
def rows_of(t, r, g: tl.constexpr, Tq, Tk, Tk2, w2, NQ: tl.constexpr, BD: tl.constexpr):
    """As pairs() above, for rows r of group t of 64: the row of q, its position among k, among k2, whether there is such a pair."""
    n = t * NQ + r // BD
    i = gl.minimum(n // g, Tq - 1)
    d, i2 = r % BD, i + Tk2 - Tq
    return n % g * Tq + n // g, i + Tk - Tq, i2 - d, (n < Tq * g) & (d < w2) & (d <= i2)


@by_hand
def load_block(c, bh, start, size: tl.constexpr, descs, stages, full, empty, D: tl.constexpr, ST: tl.constexpr):
    for n in gl.static_range(2):                                     # keys, values
        mbarrier.wait(empty[n].index(c % ST), (c // ST & 1) ^ 1)
        mbarrier.expect(full[n].index(c % ST), size * D * 2)
        stage = stages[n].index(c % ST)
        tma.async_copy_global_to_shared(descs[n], [bh, start, 0], full[n].index(c % ST), stage.slice(0, size, 1))


@by_hand
def make_rows(to, q_ptr, k2_ptr, factor, t, g: tl.constexpr, D: tl.constexpr, Tq, Tk2, w2, NQ: tl.constexpr, BD: tl.constexpr):
    """As product() above, for group t of 64 rows, into shared memory: a query after the other."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    d, offs_d = gl.arange(0, BD, gl.SliceLayout(1, L)), gl.arange(0, D, gl.SliceLayout(0, L))
    for m in gl.static_range(NQ):
        n = gl.minimum(t * NQ + m, Tq * g - 1)
        i2 = n // g + Tk2 - Tq
        valid = (d < w2) & (d <= i2) & (t * NQ + m < Tq * g)
        x = gl.load(q_ptr + (n % g * Tq + n // g) * D + offs_d).to(gl.float32) * factor      # [D]
        y = gl.load(k2_ptr + (i2 - d)[:, None] * D + offs_d[None, :], mask=valid[:, None], other=0.0).to(gl.float32)  # [BD, D]
        to.slice(m * BD, BD).store((x[None, :] * y).to(q_ptr.dtype.element_ty))


@by_hand
def loader(q_ptr, k2_ptr, blocks, smalls, stages, rows, full, empty, numbers, scale, g: tl.constexpr, D: tl.constexpr,
           NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ST: tl.constexpr, SMALL: tl.constexpr, NC: tl.constexpr):
    Tq, Tk, Tk2, w1, w2, tiles, heads = numbers
    c, phase = 0, 1
    for tile in range(gl.program_id(0), tiles * heads, gl.num_programs(0)):
        bh, t = tile // tiles, tile % tiles
        q, k2 = q_ptr + bh.to(gl.int64) * g * Tq * D, k2_ptr + bh.to(gl.int64) * Tk2 * D
        for w in gl.static_range(NC):
            mbarrier.wait(empty[2].index(w), phase)
            make_rows(rows.index(w), q, k2, scale * LOG2E, t * NC + w, g, D, Tq, Tk2, w2, NQ, BD)
            mbarrier.arrive(full[2].index(w), count=1)
        phase ^= 1
        start, count, small = span(t, g, Tq, Tk, w1, NC * NQ, BN, SMALL)
        if SMALL:
            load_block(c, bh, small, HEAD, smalls, stages, full, empty, D, ST)
            c += 1
        for b in range(count):
            load_block(c, bh, start + b * BN, BN, blocks, stages, full, empty, D, ST)
            c += 1


@by_hand
def scores(a, stages, c, full, size: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, ST: tl.constexpr):
    """Begins A K^T of the block in stage c. [64, size]"""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, size, 16])
    mbarrier.wait(full[0].index(c % ST), c // ST & 1)
    k = stages[0].index(c % ST).reshape([BN, D]).slice(0, size)      # [size, D]
    a = gl.convert_layout(a, gl.DotOperandLayout(0, L, 2), assert_trivial=True)
    return warpgroup_mma(a, k.permute([1, 0]), gl.zeros([64, size], gl.float32, L), use_acc=False, is_async=True)


@by_hand
def exponentials(s, i, start, w1, edge: tl.constexpr):
    """exp2 of scores, 0 where hidden, and their sums."""
    if edge:
        i = gl.convert_layout(i, gl.SliceLayout(1, s.type.layout))[:, None]
        j = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        s = gl.where((j <= i) & (j > gl.maximum(i - w1, -1)), s, -float("inf"))
    p = gl.exp2(s)
    return p, gl.sum(p, 1)


@by_hand
def step(a, p, acc, l, i, c, start, w1, stages, full, empty, BN: tl.constexpr, D: tl.constexpr, ST: tl.constexpr, edge: tl.constexpr):
    """Block c + 1, and the product of p, of block c, with its values."""
    before, c = c % ST, c + 1
    s = scores(a, stages, c, full, BN, BN, D, ST)
    acc = warpgroup_mma(p, stages[1].index(before).reshape([BN, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(empty[0].index(c % ST), count=1)
    more, sums = exponentials(s, i, start, w1, edge)
    mbarrier.wait(full[1].index(c % ST), c // ST & 1)                # waited for here, so that no exponential slips behind the next wait
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(empty[1].index(before), count=1)
    return gl.convert_layout(more.to(p.dtype), p.type.layout), acc, l + sums, c


@by_hand
def consumer(v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, w: tl.constexpr, g: tl.constexpr, D: tl.constexpr,
             NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ST: tl.constexpr, SMALL: tl.constexpr, NC: tl.constexpr):
    Tq, Tk, Tk2, w1, w2, tiles, heads = numbers
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])                # of scores and of the result
    R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, R, 2)
    Q: gl.constexpr = gl.BlockedLayout([1, D // 64], [1, 32], [2, 2], [1, 0])
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    LEAST: gl.constexpr = 1.0 if dtype == gl.float16 else 2.0 ** -60 # as in forward_kernel
    MOST: gl.constexpr = 2.0 ** 15 if dtype == gl.float16 else 2.0 ** 60
    c, phase = 0, 0
    for tile in range(gl.program_id(0), tiles * heads, gl.num_programs(0)):
        bh, t = tile // tiles, tile % tiles
        start, count, small = span(t, g, Tq, Tk, w1, NC * NQ, BN, SMALL)
        row, i, at, valid = rows_of(t * NC + w, gl.arange(0, 64, gl.SliceLayout(1, S)), g, Tq, Tk, Tk2, w2, NQ, BD)
        mbarrier.wait(full[2].index(w), phase)
        a = rows.index(w).load(gl.DotOperandLayout(0, S, 2))         # [64, D], in registers
        mbarrier.arrive(empty[2].index(w), count=1)
        phase ^= 1
        acc = gl.zeros([64, D], gl.float32, R)
        if SMALL:
            head = scores(a, stages, c, full, HEAD, BN, D, ST)
            before, c = c, c + 1
            s = scores(a, stages, c, full, BN, BN, D, ST)
            head = warpgroup_mma_wait(1, deps=[head])
            mbarrier.arrive(empty[0].index(before % ST), count=1)
            p, l = exponentials(head, i, small, w1, True)
            l = gl.convert_layout(l, gl.SliceLayout(1, S))
            p = gl.convert_layout(p.to(dtype), P)
            mbarrier.wait(full[1].index(before % ST), before // ST & 1)
            acc = warpgroup_mma(p, stages[1].index(before % ST).reshape([BN, D]).slice(0, HEAD), acc, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(empty[0].index(c % ST), count=1)
            more, sums = exponentials(s, i, start, w1, True)
            l += sums
            mbarrier.wait(full[1].index(c % ST), c // ST & 1)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(empty[1].index(before % ST), count=1)
        else:
            s = warpgroup_mma_wait(0, deps=[scores(a, stages, c, full, BN, BN, D, ST)])
            mbarrier.arrive(empty[0].index(c % ST), count=1)
            more, l = exponentials(s, i, start, w1, True)
            mbarrier.wait(full[1].index(c % ST), c // ST & 1)
        p = gl.convert_layout(more.to(dtype), P)
        for b in range(1, count - 1):                                # what all rows see
            p, acc, l, c = step(a, p, acc, l, i, c, start + b * BN, w1, stages, full, empty, BN, D, ST, False)
        if count > 1:
            p, acc, l, c = step(a, p, acc, l, i, c, start + (count - 1) * BN, w1, stages, full, empty, BN, D, ST, True)
        acc = warpgroup_mma(p, stages[1].index(c % ST).reshape([BN, D]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(empty[1].index(c % ST), count=1)
        c += 1

        # No maximum: the rows of a query can be added as they are. A query with a row out of range is left to repair_kernel.
        row, i, at, valid = rows_of(t * NC + w, gl.arange(0, 64, gl.SliceLayout(1, R)), g, Tq, Tk, Tk2, w2, NQ, BD)
        v2 = v2_ptr + bh.to(gl.int64) * Tk2 * D + at[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, R))[None, :]
        acc *= gl.load(v2, mask=valid[:, None], other=0.0).to(gl.float32)
        l = gl.convert_layout(l, gl.SliceLayout(1, R))
        l = gl.where(valid, gl.where((l > LEAST) & (l < MOST), l, float("nan")), 0.0)
        o = gl.convert_layout(gl.sum(acc.reshape([NQ, BD, D]), 1), Q)                        # [NQ, D]
        l = gl.convert_layout(gl.sum(l.reshape([NQ, BD]), 1), gl.SliceLayout(1, Q))
        lse = gl.where(l == l, gl.where(l > 0.0, gl.log2(l) * LN2, -float("inf")), float("inf"))
        n = (t * NC + w) * NQ + gl.arange(0, NQ, gl.SliceLayout(1, Q))
        to = bh.to(gl.int64) * g * Tq + n % g * Tq + n // g
        gl.store(lse_ptr + to, lse, mask=n < g * Tq)
        o = (o / gl.where(l > 0.0, l, 1.0)[:, None]).to(dtype)
        gl.store(o_ptr + to[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, Q))[None, :], o, mask=(n < g * Tq)[:, None])


@(gluon.jit(do_not_specialize=[*NUMBERS, "tiles", "heads"]) if gluon else triton.jit)
def hopper_kernel(
    q_ptr, k_blocks, v_blocks, k_small, v_small, k2_ptr, v2_ptr,     # as in forward_kernel; descriptors of (B Hkv, Tk, D)
    o_ptr, lse_ptr,
    Tq, Tk, Tk2, w1, w2, scale, tiles, heads,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ST: tl.constexpr, SMALL: tl.constexpr,
    NC: tl.constexpr, MANY: tl.constexpr, FEW: tl.constexpr,         # registers of a consumer's thread and of a loader's
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    B: gl.constexpr = mbarrier.MBarrierLayout()
    stages = (gl.allocate_shared_memory(dtype, [ST, 1, BN, D], k_blocks.layout), gl.allocate_shared_memory(dtype, [ST, 1, BN, D], v_blocks.layout))
    rows = gl.allocate_shared_memory(dtype, [NC, 64, D], gl.NVMMASharedLayout(128, 16))
    full = (gl.allocate_shared_memory(gl.int64, [ST, 1], B), gl.allocate_shared_memory(gl.int64, [ST, 1], B),
            gl.allocate_shared_memory(gl.int64, [NC, 1], B))
    empty = (gl.allocate_shared_memory(gl.int64, [ST, 1], B), gl.allocate_shared_memory(gl.int64, [ST, 1], B),
             gl.allocate_shared_memory(gl.int64, [NC, 1], B))
    for s in gl.static_range(ST):
        for n in gl.static_range(2):
            mbarrier.init(full[n].index(s), count=1)
            mbarrier.init(empty[n].index(s), count=NC)
    for w in gl.static_range(NC):
        mbarrier.init(full[2].index(w), count=1)
        mbarrier.init(empty[2].index(w), count=1)
    numbers = (gl.to_tensor(Tq), gl.to_tensor(Tk), gl.to_tensor(Tk2), gl.to_tensor(w1), gl.to_tensor(w2), gl.to_tensor(tiles), gl.to_tensor(heads))
    scale = gl.cast(gl.to_tensor(scale), gl.float32)
    if NC == 2:
        gl.warp_specialize([
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 0, g, D, NQ, BD, BN, ST, SMALL, NC)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 1, g, D, NQ, BD, BN, ST, SMALL, NC)),
            (loader, (q_ptr, k2_ptr, (k_blocks, v_blocks), (k_small, v_small), stages, rows, full, empty, numbers, scale,
                      g, D, NQ, BD, BN, ST, SMALL, NC))], [4, 4], [MANY, FEW])
    else:
        gl.warp_specialize([
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 0, g, D, NQ, BD, BN, ST, SMALL, NC)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 1, g, D, NQ, BD, BN, ST, SMALL, NC)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 2, g, D, NQ, BD, BN, ST, SMALL, NC)),
            (loader, (q_ptr, k2_ptr, (k_blocks, v_blocks), (k_small, v_small), stages, rows, full, empty, numbers, scale,
                      g, D, NQ, BD, BN, ST, SMALL, NC))], [4, 4, 4], [MANY, MANY, FEW])


@triton.jit
def block_gradients(u, w, a, h, k, v, lse, delta, i, start, end, w1, edge, BN: tl.constexpr, PREC: tl.constexpr):
    """One block of keys for a tile of rows: U += P V, W += dS K, where dS = P * (dP - delta)."""
    p = tl.exp2(tl.dot(a, tl.trans(k), input_precision=PREC) - lse[:, None])                 # [BM, BN]
    if edge:
        p = tl.where(visible(i[:, None], start + tl.arange(0, BN)[None, :], w1, end), p, 0.0)
    u = tl.dot(p.to(v.dtype), v, u, input_precision=PREC)            # [BM, D]
    ds = p * (tl.dot(h, tl.trans(v), input_precision=PREC) - delta[:, None])
    return u, tl.dot(ds.to(k.dtype), k, w, input_precision=PREC)


@triton.jit
def both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, at, valid, many, factor, D: tl.constexpr):
    a = product(q_ptr, k2_ptr, row, at, valid, factor, D)
    tl.debug_barrier()                                               # or all loads come first, and registers spill
    return a, product(do_ptr, v2_ptr, row, at, many, 1.0, D)         # with delta = 0 this makes dS = 0 for a single pair


@triton.jit
def add_rows(x_ptr, rows, mask, x, D: tl.constexpr):
    ptrs = x_ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=mask[:, None], other=0.0) + x, mask=mask[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def rows_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, # as in the forward; do like q, delta like lse
    dq_ptr, dk2_ptr, dv2_ptr,                                        # like q; (B, Hkv, pieces, room, D) twice, float32
    Tq, Tk, Tk2, w1, w2, scale, piece, room,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
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
    RK: tl.constexpr = 2 * MORE if MORE > 8 else 16                  # at least the NQ + BD - 1 positions of k2 in a tile
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
        lse = tl.load(lse_ptr + row, mask=valid, other=float("inf")) * LOG2E                 # exp2(s - inf) = 0
        delta = tl.load(delta_ptr + row, mask=many, other=0.0)
        u, w = tl.zeros((BM, D), tl.float32), tl.zeros((BM, D), tl.float32)
        body = hi + 1 - tl.minimum(w1, hi + 1) // BN * BN
        for start in tl.range(tl.maximum(lo - w1 + 1, 0), body, HEAD, num_stages=1):
            k, v = keys(k_ptr, start, body, HEAD, D), keys(v_ptr, start, body, HEAD, D)
            u, w = block_gradients(u, w, a, h, k, v, lse, delta, i, start, body, w1, True, HEAD, PREC)
        for start in range(body, hi + 1, BN):
            k, v = whole_keys(k_ptr, start, BN, D), whole_keys(v_ptr, start, BN, D)
            u, w = block_gradients(u, w, a, h, k, v, lse, delta, i, start, hi + 1, w1, start + BN > lo + 1, BN, PREC)

        # The rows of a query are summed for dq, those of a position of k2 for dk2 and dv2, by products with a 0/1 matrix. Beside U and
        # W there is no room: the barriers keep loads from coming early, and what depends on w1 > 0, which is always so, the compiler
        # cannot take from before the loop, so it comes anew.
        row, i, at, valid, many, lo, hi = pairs(tl.where(w1 > 0, t, 0), g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        oldest = lo - Tk + Tk2 - t % chunks * BD - BD + 1            # position of k2 that this tile can meet
        there = (tl.arange(0, RK)[:, None] + oldest == at[None, :]).to(dtype)                # [RK, BM]
        tl.debug_barrier()
        rows = tl.arange(0, RK) + oldest - (Tk2 - Tq) + room - piece * (tl.program_id(0) + 1)                  # in the buffer
        mask = (rows >= 0) & (rows < room)
        do = tl.load(do_ptr + row[:, None] * D + offs_d, mask=valid[:, None], other=0.0)     # [BM, D]
        own = (tl.where(w1 > 0, bh, 0) * tl.num_programs(0) + tl.program_id(0)) * room * D
        add_rows(dv2_ptr + own, rows, mask, tl.dot(there, (u * do).to(dtype), input_precision=PREC), D)
        tl.debug_barrier()
        q = tl.load(q_ptr + row[:, None] * D + offs_d, mask=valid[:, None], other=0.0)
        add_rows(dk2_ptr + own, rows, mask, tl.dot(there, (w * q).to(dtype), input_precision=PREC) * scale, D)
        tl.debug_barrier()
        k2 = tl.load(k2_ptr + at[:, None] * D + offs_d, mask=valid[:, None], other=0.0)
        mine = (tl.arange(0, RQ)[:, None] == (tl.arange(0, BM) // BD)[None, :]).to(dtype)    # [RQ, BM]
        dq = tl.where(t % chunks == 0, 0.0, dq) + tl.dot(mine, (w * k2).to(dtype), input_precision=PREC) * scale
        n = t // chunks * NQ + tl.arange(0, RQ)
        mask = (tl.arange(0, RQ) < NQ) & (n < g * Tq)
        tl.store(dq_ptr + (n % g * Tq + n // g)[:, None] * D + offs_d, dq.to(dtype), mask=mask[:, None])
        row, i, at, valid, many, lo, hi = pairs(t + 1, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        a, h = both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, at, valid, many, scale * LOG2E, D)
        tl.debug_barrier()                                           # other threads add to these rows next


@triton.jit(do_not_specialize=NUMBERS)
def columns_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    Tq, Tk, Tk2, w1, w2, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
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

    oldest, newest = tl.maximum(start - (Tk - Tq), 0), tl.minimum(start + BN + w1 - 1, Tk) - (Tk - Tq)       # of the queries
    first, last = oldest * g // NQ, tl.cdiv(tl.maximum(newest, oldest) * g, NQ)
    for t in range(first * chunks, last * chunks):
        row, i, at, valid, many, lo, hi = pairs(t, g, Tq, Tk, Tk2, w1, w2, NQ, BD)
        a = product(q_ptr, k2_ptr, row, at, many, factor, D)         # of a single pair P = exp2(0 - 0), and dK gets nothing
        h = product(do_ptr, v2_ptr, row, at, valid, 1.0, D)
        lse = tl.where(valid, tl.load(lse_ptr + row, mask=many, other=0.0) * LOG2E, float("inf"))
        delta = tl.load(delta_ptr + row, mask=valid, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(a), input_precision=PREC) - lse[None, :])             # [BN, BM]
        if (start + BN > lo + 1) | (hi - w1 >= start):
            p = tl.where(visible(i[None, :], j[:, None], w1, Tk), p, 0.0)
        dv = tl.dot(p.to(h.dtype), h, dv, input_precision=PREC)
        ds = p * (tl.dot(v, tl.trans(h), input_precision=PREC) - delta[None, :])
        dk = tl.dot(ds.to(a.dtype), a, dk, input_precision=PREC)
        if PREC == "ieee":                                           # in float32 a long chain of sums would be the largest error
            full = t % 64 == 63
            dk_sum, dv_sum = dk_sum + tl.where(full, dk, 0.0), dv_sum + tl.where(full, dv, 0.0)
            dk, dv = tl.where(full, 0.0, dk), tl.where(full, 0.0, dv)
    offs, dk, dv = j[:, None] * D + tl.arange(0, D)[None, :], dk + dk_sum, dv + dv_sum
    tl.store(dk_ptr + offs, (dk * LN2).to(k.dtype), mask=(j < Tk)[:, None])
    tl.store(dv_ptr + offs, dv.to(v.dtype), mask=(j < Tk)[:, None])


# Rows of a tile, keys of a block, warps, stages and, if given, the most registers of a thread. Heads under 64 take those of 64. Chosen by
# time on one H200, with bytes spilled where that was faster (step 7), up to SPILLED.
SPILLED = 400
HOPPER = {("forward", 128): (128, 32, 4, 3), ("rows", 128): (128, 32, 8, 3), ("columns", 128): (64, 128, 8, 1),
          ("forward", 64): (128, 64, 4, 3, 168), ("rows", 64): (128, 32, 4, 3), ("columns", 64): (128, 64, 4, 1)}
BY_HAND = {128: (64, 5, 2, 208, 88), 64: (64, 8, 3, 152, 56)}        # of hopper_kernel: keys, stages, consumers, registers of a thread
OTHERS = {"forward": (64, 32, 8, 2), "rows": (32, 32, 8, 2), "columns": (32, 64, 8, 1)}      # untimed; fit 99 KB and do not spill
FLOAT32 = (16, 16, 8, 1)                                             # no tensor cores: larger tiles spill
WIDTHS = (16, 32, 64, 128)


def config(kernel, q):
    if q.dtype == torch.float32:
        return FLOAT32
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return HOPPER[kernel, max(q.shape[3], 64)] if hopper else OTHERS[kernel]


def shape_of_tile(w2, rows):
    """-> queries and offsets of a tile: the fewest offsets that hold w2, up to 32."""
    offsets = min(32, rows, triton.next_power_of_2(w2))
    return rows // offsets, offsets


def sizes(q, k, k2, w1, w2):
    """-> number of KV heads in all, and the run-time arguments of the kernels."""
    B, H, Tq, D = q.shape
    Hkv, Tk, Tk2 = *k.shape[1:3], k2.shape[2]
    if B * Hkv >= 2 ** 16 or max(H // Hkv * Tq, Tk, Tk2) * D >= 2 ** 31 or B * Hkv * max(Tk, Tk2) >= 2 ** 31:
        raise ValueError(f"{B * Hkv} KV heads in the batch with {H // Hkv} x {Tq} queries each are too many for one call")
    return B * Hkv, (Tq, Tk, Tk2, min(w1, Tk), min(w2, Tk2), D ** -0.5)


def precision(q):
    return "ieee" if q.dtype == torch.float32 else "tf32"            # the latter says nothing to 16 bit operands


def launch(kernel, programs, cfg, q, k, w2, tensors, numbers):
    rows, block, warps, stages, *registers = cfg
    NQ, BD = shape_of_tile(w2, rows)
    kernel[programs(NQ, block)](*tensors, *numbers, q.shape[1] // k.shape[1], q.shape[3], NQ, BD, block, precision(q),
                                num_warps=warps, num_stages=stages, maxnreg=registers[0] if registers else None)


def hopper_arguments(q, g, w1, w2):
    """-> what launches hopper_kernel, None where forward_kernel has to do. At most 16 keys next to the oldest whole block, or the whole
    of one more, may be hidden from some rows of a tile, so windows of some lengths are not for it."""
    if not gluon or q.dtype == torch.float32 or q.shape[3] not in BY_HAND or torch.cuda.get_device_capability(q.device)[0] != 9:
        return None
    block, ST, NC, *registers = BY_HAND[q.shape[3]]
    NQ, BD = shape_of_tile(w2, 64)
    tile = NC * NQ
    spread = 0 if g % tile == 0 else (tile - 2) // g + 1             # positions of a tile after its first, at most
    oldest = w1 % block + spread                                     # keys before the whole blocks
    if w2 > BD or BD < 16 or oldest > block:
        return None
    return tile, block, (g, q.shape[3], NQ, BD, block, ST, 0 < oldest <= HEAD.value, NC, *registers)


def layout_of_keys():
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def launch_hopper(how, heads, numbers, q, k, v, k2, v2, o, lse):
    tile, block, consts = how
    tiles = triton.cdiv(consts[0] * q.shape[2], tile)
    blocks = [SharedDescriptor.from_tensor(t.flatten(0, 1), [1, n, t.shape[3]], layout_of_keys()) for n in (block, HEAD.value) for t in (k, v)]
    programs = min(torch.cuda.get_device_properties(q.device).multi_processor_count, tiles * heads)
    hopper_kernel[programs,](q, *blocks, k2, v2, o, lse, *numbers, tiles, heads, *consts, num_warps=4)


def forward(q, k, v, k2, v2, w1, w2, cfg=None):
    """-> o like q, lse (B, H, Tq) float32 in natural logarithms. All tensors contiguous; cfg: see HOPPER, for forward_kernel."""
    if w2 > w1:                                                      # the roles are symmetric: rows take the shorter window
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    heads, numbers = sizes(q, k, k2, w1, w2)
    g = q.shape[1] // k.shape[1]
    k, v = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (k, v))                     # as TMA wants them
    kernel, tiles, how = forward_kernel, 1, hopper_arguments(q, g, *numbers[3:5]) if q.is_cuda and not cfg else None
    if how:
        try:
            launch_hopper(how, heads, numbers, q, k, v, k2, v2, o, lse)
            kernel, tiles = repair_kernel, 32
        except Exception as error:                                   # of a Triton with another Gluon; those of the GPU come later
            warnings.warn(f"the kernel for Hopper does not build, the plain one runs in its place: {error!r:.300}")
            BY_HAND.clear()
    cfg = cfg or config("forward", q)
    blocks = [TensorDescriptor.from_tensor(t.flatten(0, 2), [cfg[1], t.shape[3]]) for t in (k, v)]             # (B Hkv Tk, D) each
    launch(kernel, lambda NQ, block: (triton.cdiv(g * q.shape[2], NQ * tiles), heads), cfg, q, k, w2,
           (q, k, v, *blocks, k2, v2, o, lse), numbers)
    return o, lse


def backward(do, q, k, v, k2, v2, o, lse, w1, w2, cfg_rows=None, cfg_columns=None):
    """-> dq, dk, dv, dk2, dv2"""
    if w2 > w1:
        dq, dk2, dv2, dk, dv = backward(do, q, k2, v2, k, v, o, lse, w2, w1, cfg_rows, cfg_columns)
        return dq, dk, dv, dk2, dv2
    heads, numbers = sizes(q, k, k2, w1, w2)
    Tq, Tk, Tk2, w1, w2, _ = numbers
    delta = (do.float() * o.float()).sum(-1)                         # (B, H, Tq)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    given = q, k, v, k2, v2, do, lse, delta
    launch(columns_kernel, lambda NQ, block: (triton.cdiv(Tk, block), heads), cfg_columns or config("columns", q), q, k, w2,
           (*given, dk, dv), numbers)

    cfg = cfg_rows or config("rows", q)
    piece = max(PIECE, shape_of_tile(w2, cfg[0])[0])                 # positions of a program, whole tiles
    pieces, room = triton.cdiv(Tq, piece), piece + w2 - 1
    parts = [torch.zeros(heads, pieces, room, q.shape[3], dtype=torch.float32, device=q.device) for _ in range(2)]
    launch(rows_kernel, lambda NQ, block: (pieces, heads), cfg, q, k, w2, (*given, dq, *parts), (*numbers, piece, room))

    def joined(part):                                                # a program also adds to the w2 - 1 positions before its piece
        back = triton.cdiv(w2 - 1, piece)
        whole = part.new_zeros(heads, back + pieces, piece, part.shape[3])
        for b in range(back + 1):
            end = room - b * piece
            lines = min(end, piece)
            whole[:, back - b:back - b + pieces, piece - lines:] += part[:, :, end - lines:end]
        first = back * piece - (Tk2 - Tq)                            # the row of position 0
        whole = whole.flatten(1, 2)[:, max(first, 0):first + Tk2]
        return F.pad(whole, (0, 0, max(-first, 0), 0)).view(k2.shape).to(k2.dtype)           # (B, Hkv, Tk2, D)
    return dq, dk, dv, *map(joined, parts)


@custom_op("fivefold::simplicial", mutates_args=())
def simplicial_op(q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, k2, v2, w1, w2)


@simplicial_op.register_fake
def _(q, k, v, k2, v2, w1, w2):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("fivefold::simplicial_backward", mutates_args=())
def simplicial_backward_op(do: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, o: Tensor, lse: Tensor,
                           w1: int, w2: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(do, q, k, v, k2, v2, o, lse, w1, w2)


@simplicial_backward_op.register_fake
def _(do, q, k, v, k2, v2, o, lse, w1, w2):
    return tuple(map(torch.empty_like, (q, k, v, k2, v2)))


def setup_context(ctx, inputs, output):
    *tensors, ctx.w1, ctx.w2 = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, do, _):
    return *simplicial_backward_op(do.contiguous(), *ctx.saved_tensors, ctx.w1, ctx.w2), None, None


simplicial_op.register_autograd(differentiate, setup_context=setup_context)


def attention(q, k, v, k2, v2, w1, w2):
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D), all of one dtype -> o (B, H, Tq, D),
    lse (B, H, Tq) float32 in natural logarithms, not differentiable. D must be one of WIDTHS."""
    return simplicial_op(*(t.contiguous() for t in (q, k, v, k2, v2)), w1, w2)


# What test_all.py builds ahead of time: kernel, argument types, constants, arguments that are multiples of 16, warps, stages, most
# registers, architectures
def ahead(kernel, dtype, D, cfg, arches):
    rows, block, *how = cfg
    NQ, BD = shape_of_tile(32, rows)
    float32 = {"lse_ptr", "delta_ptr"} | ({"dk2_ptr", "dv2_ptr"} if kernel is rows_kernel else set())
    types = {n: "fp32" if n == "scale" else f"tensordesc<{dtype}[{block}, {D}]>" if n.endswith("_blocks") else
             "i32" if not n.endswith("_ptr") else "*fp32" if n in float32 else f"*{dtype}" for n in kernel.arg_names}
    consts = dict(g=1, D=D, NQ=NQ, BD=BD, BN=block, PREC="ieee" if dtype == "fp32" else "tf32")
    return kernel, types, consts, (), *how, arches


KERNELS = {"forward": forward_kernel, "rows": rows_kernel, "columns": columns_kernel}
AOT = [ahead(KERNELS[name], *more) for name in KERNELS for more in (
    ("bf16", 128, HOPPER[name, 128], (90,)), ("bf16", 64, HOPPER[name, 64], (90,)), ("bf16", 128, OTHERS[name], (80, 100, 120)))]
AOT += [ahead(rows_kernel, "fp32", 64, FLOAT32, (90,))]


def ahead_by_hand(D):
    block, ST, NC, *registers = BY_HAND[D]
    tiles = {f"{x}_{n}": f"tensordesc<bf16[1, {size}, {D}],{layout_of_keys()!r}>" for n, size in (("blocks", block), ("small", HEAD.value)) for x in "kv"}
    types = {n: tiles.get(n) or ("*fp32" if n == "lse_ptr" else "*bf16" if n.endswith("_ptr") else "fp32" if n == "scale" else "i32")
             for n in hopper_kernel.arg_names}
    consts = dict(zip(hopper_kernel.arg_names[-10:], (1, D, 2, 32, block, ST, True, NC, *registers)))
    return hopper_kernel, types, consts, (), 4, 1, None, (90,)


AOT += [ahead_by_hand(D) for D in BY_HAND] if gluon else []
