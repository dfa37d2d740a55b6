"""2-simplicial attention as flash attention, forward and backward.

Query i scores pairs of a key j and a second key i - d, with an offset d < w2. For one offset, this
is ordinary attention with the query q_i * k2_{i-d}. So the kernels compute rows: row (i, d) is
query i with offset d, and it attends to k and v in the window w1. A tile is what a program computes
at once: QUERIES queries with OFFSETS offsets each, ROWS = QUERIES * OFFSETS rows.

    forward_kernel       o_i = sum_d weight_{i,d} * (output of row (i, d)) * v2_{i-d}, where weight
                         is the softmax over d of the log-sum-exp of row (i, d)
    repair_kernel        again, with a running maximum, for queries with huge scores, inf or NaN
    dq_dk2_dv2_kernel    P = exp(S - lse_i), dP = (do_i * v2_{i-d}) . v_j, dS = P * (dP - delta_i)
                         dq_i = sum_d (dS K)_{i,d} * k2_{i-d}
                         dk2_{i-d} += (dS K)_{i,d} * q_i, dv2_{i-d} += (P V)_{i,d} * do_i
    dk_dv_kernel         dk_j = sum over rows (i, d) of dS * (q_i * k2_{i-d})
                         dv_j = sum over rows (i, d) of P * (do_i * v2_{i-d})

S are the scores of a row and P its weights in the softmax of its query, whose log-sum-exp is lse_i;
delta_i = do_i . o_i. If w2 > w1, (k, v) and (k2, v2) change places. No atomics: two runs give the
same bits. As both backward kernels compute S and dP, FLOPs / (B H T w1 w2 D) are 4 forward and 16
backward. Tuning history and times: kernels/NOTES.md.
"""

import functools
from typing import NamedTuple

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

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) * LN2
EDGE = tl.constexpr(16)  # keys of a small block, at the start of a window; see key_blocks
REPAIR_QUERIES = tl.constexpr(128)  # queries that a program of repair_kernel checks, at least
PIECE = 64  # query positions per program of dq_dk2_dv2_kernel, at least
BLOCK_T = 32  # positions per program of clean_kernel and sum_buffers_kernel
WIDTHS = (16, 32, 64, 128)  # head dimensions
# arguments that Triton does not specialize for: a KV cache changes them with every token
VARYING = ["Tq", "Tk", "Tk2", "w1", "w2", "pieces", "piece", "buffer_rows", "past", "N"]


# --------------------------------------------------------------------------------------------------
# Tiles. A query is one query head at one position. The GROUP heads of a KV head are interleaved:
# query = position * GROUP + head. In memory they are not: q is (GROUP, Tq, D), so each head has Tq
# rows of its own. For GROUP = 2 and Tq = 3:
#     query       0  1  2  3  4  5
#     position    0  0  1  1  2  2    query // GROUP
#     head        0  1  0  1  0  1    query % GROUP
#     row of q    0  3  1  4  2  5    head * Tq + position
# So a tile of QUERIES consecutive queries is full whether GROUP is 1 or 64. Where w2 > OFFSETS, the
# offsets are divided into chunks of OFFSETS, and the same queries have consecutive tiles, one per
# chunk. For QUERIES = OFFSETS = 2 and w2 = 4, the rows (query, offset) are
#     tile 0: (0, 0) (0, 1) (1, 0) (1, 1)     tile 1: (0, 2) (0, 3) (1, 2) (1, 3)
#     tile 2: (2, 0) (2, 1) (3, 0) (3, 1)     tile 3: (2, 2) (2, 3) (3, 2) (3, 3)


class Sizes(NamedTuple):
    Tq: tl.tensor  # positions of q; its last one is also the last of k and of k2
    Tk: tl.tensor  # positions of k and v
    Tk2: tl.tensor  # positions of k2 and v2
    w1: tl.tensor  # window in k and v
    w2: tl.tensor  # window in k2 and v2


class Tile(NamedTuple):
    """The rows (query i, offset d) of a tile, (ROWS,) each, and the range of its positions."""

    q_row: tl.tensor  # row of the query in the (GROUP, Tq) rows of q
    position: tl.tensor  # i, of the query in k
    position2: tl.tensor  # i - d, of the second key in k2
    exists: tl.tensor  # the query exists, and the offset is in its window
    has_several_pairs: tl.tensor  # of keys in its windows; with a single pair, P = 1 and dS = 0
    first_position: tl.tensor  # position in k of the first query, a number
    last_position: tl.tensor  # position in k of the last query, a number


@triton.jit
def query_row(query, sizes, GROUP: tl.constexpr):
    """Return head * Tq + position, the row of query = position * GROUP + head in q (GROUP, Tq)."""
    # GROUP = 2, Tq = 3: queries 0 1 2 3 4 5 (heads 0 1 0 1 0 1) are rows 0 3 1 4 2 5
    return query % GROUP * sizes.Tq + query // GROUP


@triton.jit
def make_tile(index, sizes, GROUP: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr):
    """Return tile number `index`: the Tile of QUERIES queries and one chunk of OFFSETS offsets."""

    # -- query and offset of each row --
    # with 2 chunks, tiles 0 1 2 3 have blocks of queries 0 0 1 1 and chunks of offsets 0 1 0 1
    row = tl.arange(0, QUERIES * OFFSETS)
    chunks = tl.cdiv(sizes.w2, OFFSETS)
    query = index // chunks * QUERIES + row // OFFSETS
    offset = index % chunks * OFFSETS + row % OFFSETS

    # -- position of the query in q, in k (i) and in k2 (i2): q has the last positions --
    q_position = tl.minimum(query // GROUP, sizes.Tq - 1)  # queries past the end get the last
    i = q_position + sizes.Tk - sizes.Tq
    i2 = q_position + sizes.Tk2 - sizes.Tq
    exists = (query < sizes.Tq * GROUP) & (offset < sizes.w2) & (offset <= i2)
    # the query has min(i + 1, w1) * min(i2 + 1, w2) pairs: is that more than one?
    has_several_pairs = exists & (tl.minimum(i, sizes.w1 - 1) + tl.minimum(i2, sizes.w2 - 1) > 0)

    # -- positions in k of the first and the last query --
    first_query = index // chunks * QUERIES
    last_query = first_query + QUERIES - 1
    first_position = tl.minimum(first_query // GROUP, sizes.Tq - 1) + sizes.Tk - sizes.Tq
    last_position = tl.minimum(last_query // GROUP, sizes.Tq - 1) + sizes.Tk - sizes.Tq
    q_row = query_row(query, sizes, GROUP)
    return Tile(q_row, i, i2 - offset, exists, has_several_pairs, first_position, last_position)


@triton.jit
def own_rows(PADDED: tl.constexpr, ROWS: tl.constexpr, OFFSETS: tl.constexpr):
    """Return is_own [PADDED, ROWS]: whether row r of a tile is one of its q-th query, r // OFFSETS.

    For QUERIES = OFFSETS = 2 it is [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], ...]: as a matrix, it
    sums the rows of each query.
    """
    return tl.arange(0, PADDED)[:, None] == (tl.arange(0, ROWS) // OFFSETS)[None, :]


@triton.jit
def block_queries(
    query_block, sizes,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return the rows in q (GROUP, Tq) of a block of queries, and which of them exist. [PADDED]"""
    query_index = tl.arange(0, PADDED)  # QUERIES, padded to the 16 rows that a product needs
    query = query_block * QUERIES + query_index
    mask = (query_index < QUERIES) & (query < GROUP * sizes.Tq)
    return query_row(query, sizes, GROUP), mask


@triton.jit
def key_blocks(tile, w1, BLOCK_N: tl.constexpr):
    """Divide the keys that a tile sees into blocks. -> first_key, first_block, end

        | EDGE | ... | EDGE |   BLOCK_N   |   BLOCK_N   | ... |   BLOCK_N   |
        first_key           first_block                                     end

    Whole blocks of BLOCK_N keys end at the last query, and are as many as fit into its window. So
    they need a mask only where earlier queries do not see the last keys yet. The keys before them
    take small, masked blocks of EDGE keys. For w1 = 100, BLOCK_N = 32 and queries at 496 ... 499:
    end = 500, first_block = 500 - 3 * 32 = 404, and first_key = 496 - 99 = 397.
    """
    first_key = tl.maximum(tile.first_position - w1 + 1, 0)
    end = tile.last_position + 1
    first_block = end - tl.minimum(w1, end) // BLOCK_N * BLOCK_N
    return first_key, first_block, end


@triton.jit
def is_visible(position, key, w1, end):
    """A query at `position` sees the w1 keys up to its own; keys from `end` on do not count."""
    return (key <= position) & (key > position - w1) & (key < end)


@triton.jit
def load_rows(ptr, rows, mask, D: tl.constexpr):
    """Load rows of a matrix of D columns, 0 where the mask is False: [len(rows), D]"""
    ptrs = ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=mask[:, None], other=0.0)


@triton.jit
def load_keys(k_ptr, v_ptr, start, end, SIZE: tl.constexpr, D: tl.constexpr):
    """Return k and v at the positions start ... start + SIZE - 1, [SIZE, D]; 0 from `end` on."""
    key = start + tl.arange(0, SIZE)
    return load_rows(k_ptr, key, key < end, D), load_rows(v_ptr, key, key < end, D)


@triton.jit
def load_block(ptr, start, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """Load a whole block of keys, which needs no mask: [BLOCK_N, D]"""
    rows = start + tl.arange(0, BLOCK_N)
    return tl.load(ptr + rows[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def multiply_rows(x_ptr, y_ptr, tile, mask, factor, D: tl.constexpr):
    """Return factor * x_i * y_{i-d} of each row (i, d) of a tile, 0 outside the mask. [ROWS, D]

    d is an offset here, not a channel. x: q or do, (GROUP, Tq, D). y: k2 or v2, (Tk2, D).
    """
    x = load_rows(x_ptr, tile.q_row, mask, D).to(tl.float32)
    y = load_rows(y_ptr, tile.position2, mask, D).to(tl.float32)
    return (x * factor * y).to(x_ptr.dtype.element_ty)


# --------------------------------------------------------------------------------------------------
# Forward


class Head(NamedTuple):
    """The tensors of one KV head."""

    q_ptr: tl.tensor  # (GROUP, Tq, D)
    k_ptr: tl.tensor  # (Tk, D)
    v_ptr: tl.tensor
    k_blocks: tl.tensor  # TMA descriptors, (B * Hkv * Tk, D): these have the rows of all heads
    v_blocks: tl.tensor
    first_row: tl.tensor  # of this head in the descriptors
    k2_ptr: tl.tensor  # (Tk2, D)
    v2_ptr: tl.tensor
    o_ptr: tl.tensor  # (GROUP, Tq, D)
    lse_ptr: tl.tensor  # (GROUP, Tq)


@triton.jit
def select_head(
    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr, sizes,
    GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the Head that this program computes: KV head bh, so skip the bh heads before it."""
    bh = tl.program_id(1).to(tl.int64)
    q_ptr += bh * GROUP * sizes.Tq * D
    o_ptr += bh * GROUP * sizes.Tq * D
    lse_ptr += bh * GROUP * sizes.Tq
    first_row = (bh * sizes.Tk).to(tl.int32)
    k_ptr += bh * sizes.Tk * D
    v_ptr += bh * sizes.Tk * D
    k2_ptr += bh * sizes.Tk2 * D
    v2_ptr += bh * sizes.Tk2 * D
    return Head(q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, first_row, k2_ptr, v2_ptr, o_ptr, lse_ptr)


@triton.jit
def attend_block(
    acc, m_i, l_i, qk2, k, v, position, start, end, w1, is_partial, needs_max,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a block of keys to acc = sum exp2(S - m_i) V and l_i = sum exp2(S - m_i) of each row.

    qk2 [ROWS, D]: q * k2 of the rows. k and v [BLOCK_N, D]: the block, from key `start` on.
    is_partial: whether some row does not see the whole block. needs_max: None, and m_i stays 0; or
    [ROWS], which rows need a running maximum. The others get the same bits as with None.
    """
    # -- compute scores, in base 2 --
    s = tl.dot(qk2, tl.trans(k), input_precision=PRECISION)  # [ROWS, BLOCK_N]
    if needs_max is not None:
        # a key with inf in v makes rows that see it NaN; others must not get 0 * inf = NaN from it
        is_bad = tl.min((tl.abs(v) < float("inf")).to(tl.int32), 1) == 0  # [BLOCK_N]
        s = tl.where(is_bad[None, :], float("nan"), s)
        v = tl.where(is_bad[:, None], 0.0, v)
    if is_partial:
        key = start + tl.arange(0, k.shape[0])[None, :]
        s = tl.where(is_visible(position[:, None], key, w1, end), s, -float("inf"))

    # -- running maximum --
    if needs_max is not None:
        m_new = tl.where(needs_max, tl.maximum(m_i, tl.max(s, 1)), 0.0)
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key yet: any finite number
        s -= m_safe[:, None]
        alpha = tl.exp2(m_i - m_safe)
        acc = acc * alpha[:, None]
        l_i = l_i * alpha
        m_i = m_new

    # -- update sums; s is now S - m_i --
    p = tl.exp2(s)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    l_i = l_i + tl.sum(p, 1)
    return acc, m_i, l_i


@triton.jit
def attend(
    head, qk2, tile, w1, needs_max,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from the rows (query i, offset d) of a tile to their windows of w1 keys.

    qk2 [ROWS, D]: q_i * k2_{i-d}. needs_max: None, or which rows need a running maximum. Returns
    the sums of attend_block: acc [ROWS, D], m_i and l_i [ROWS].
    """
    ROWS: tl.constexpr = qk2.shape[0]
    first_key, first_block, end = key_blocks(tile, w1, BLOCK_N)
    m_i = tl.zeros((ROWS,), tl.float32)
    if needs_max is not None:
        m_i = tl.where(needs_max, -float("inf"), 0.0)
    acc = tl.zeros((ROWS, D), tl.float32)
    l_i = tl.zeros((ROWS,), tl.float32)

    # -- the first keys of the windows, in small blocks of EDGE keys --
    for start in tl.range(first_key, first_block, EDGE, num_stages=1):
        k, v = load_keys(head.k_ptr, head.v_ptr, start, first_block, EDGE, D)
        acc, m_i, l_i = attend_block(
            acc, m_i, l_i, qk2, k, v, tile.position, start, first_block, w1,
            True,  # is_partial
            needs_max, PRECISION,
        )  # fmt: skip

    # -- the other keys, in blocks of BLOCK_N --
    # is_partial: the first query comes before the last key of the block, and does not see it
    for start in range(first_block, end, BLOCK_N):
        k = head.k_blocks.load([head.first_row + start, 0])  # [BLOCK_N, D]
        v = head.v_blocks.load([head.first_row + start, 0])
        is_partial = start + BLOCK_N > tile.first_position + 1
        acc, m_i, l_i = attend_block(
            acc, m_i, l_i, qk2, k, v,
            tile.position, start, end, w1,  # for the mask
            is_partial, needs_max, PRECISION,
        )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def sum_rows(is_member, x, PRECISION: tl.constexpr):
    """Return sums of rows, [R, D]: sum r takes the rows of x [ROWS, D] where is_member[r] is True.

    The sum is a product with a 0/1 matrix, where 0 * inf = NaN would reach all sums. So rows that
    are not finite are replaced by 0, and then the sums that they belong to are set to NaN.
    """
    is_bad = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) == 0  # [ROWS]
    x = tl.where(is_bad[:, None], 0.0, x)
    total = tl.dot(is_member.to(x.dtype), x, input_precision=PRECISION)
    has_bad = tl.max((is_member & is_bad[None, :]).to(tl.int32), 1) > 0  # [R]
    return tl.where(has_bad[:, None], float("nan"), total)


@triton.jit
def combine_rows(
    acc, m_i, l_i, v2_ptr, tile, is_own,
    D: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Combine the rows of each query: a softmax over its offsets. -> o [PADDED, D], lse [PADDED]

        m_q = max_r m_r,  l_q = sum_r exp2(m_r - m_q) l_r,  lse = m_q + log2 l_q
        o_q = sum_r exp2(m_r - m_q) acc_r / l_q * v2_r, in all of them over the rows r of query q

    acc_r, m_r, l_r: a row of acc [ROWS, D], m_i and l_i [ROWS], from attend. v2_r: v2 at i - d.
    is_own [PADDED, ROWS]: which row belongs to which query. lse is -inf for a query without a pair.
    """
    # -- maximum m_q and sum l_q of each query --
    m_i = tl.where(tile.exists, m_i, -float("inf"))
    m_q = tl.max(tl.where(is_own, m_i[None, :], -float("inf")), 1)  # [PADDED]
    m_q = tl.where(m_q == -float("inf"), 0.0, m_q)
    p = tl.where(is_own, tl.exp2(m_i[None, :] - m_q[:, None]) * l_i[None, :], 0.0)
    l_q = tl.sum(p, 1)  # [PADDED], 0 without a pair
    l_safe = tl.where(l_q == 0.0, 1.0, l_q)
    # the factor exp2(m_r - m_q) / l_q of each row r: p has exp2(m_r - m_q) l_r at [q, r], and 0 for
    # all queries but r's own, so add up over queries, and divide by l_r
    share = tl.sum(tl.where(is_own, p / l_safe[:, None], 0.0), 0) / l_i  # [ROWS]

    # -- multiply by v2 and add up the rows of each query, by a product with the 0/1 matrix --
    v2 = load_rows(v2_ptr, tile.position2, tile.exists, D)  # [ROWS, D]
    x = (acc * share[:, None] * v2).to(v2.dtype)
    if REPAIR:
        o = sum_rows(is_own, x, PRECISION)  # [PADDED, D]
    else:
        o = tl.dot(is_own.to(x.dtype), x, input_precision=PRECISION)
    lse = tl.where(l_q == 0.0, -float("inf"), m_q + tl.log2(l_safe))
    return o, lse


@triton.jit
def merge_chunk(o, lse, o_chunk, lse_chunk):
    """Merge o [PADDED, D] and lse [PADDED] of the offsets so far with those of OFFSETS more.

    The weight of each is exp2(lse) / (exp2(lse) + exp2(lse_chunk)), or 0 where lse is -inf.
    """
    m = tl.maximum(lse, lse_chunk)
    m = tl.where(m == -float("inf"), 0.0, m)
    weight = tl.exp2(lse - m)
    weight_chunk = tl.exp2(lse_chunk - m)
    total = tl.where(weight + weight_chunk == 0.0, 1.0, weight + weight_chunk)
    o = o * (weight / total)[:, None] + o_chunk * (weight_chunk / total)[:, None]
    lse = tl.where(weight + weight_chunk == 0.0, -float("inf"), m + tl.log2(total))
    return o, lse


@triton.jit
def forward_queries(
    query_block, head, sizes, scale,
    GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of QUERIES queries, over all their offsets.

    There is no running maximum: where l_i is not between LEAST and MOST, o and lse are NaN. With
    REPAIR, such rows get a maximum, and only the queries that repair_kernel has marked by lse = inf
    are stored.
    """
    ROWS: tl.constexpr = QUERIES * OFFSETS
    PADDED: tl.constexpr = QUERIES if QUERIES > 16 else 16  # a matrix product needs 16 rows
    dtype = head.q_ptr.dtype.element_ty
    # allowed range of l_i without a maximum: sums with v up to 2^67 fit float32, P fits float16
    LEAST: tl.constexpr = 1.0 if dtype == tl.float16 else 2.0**-60
    MOST: tl.constexpr = 2.0**15 if dtype == tl.float16 else 2.0**60

    # these queries have one tile for each chunk of OFFSETS offsets, from first_tile on
    chunks = tl.cdiv(sizes.w2, OFFSETS)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E  # exp(scale * s) = exp2(qk_scale * s)
    is_own = own_rows(PADDED, ROWS, OFFSETS)  # [PADDED, ROWS], which row belongs to which query
    o = tl.zeros((PADDED, D), tl.float32)
    lse = tl.full((PADDED,), -float("inf"), tl.float32)
    first_tile = query_block * chunks
    tile = make_tile(first_tile, sizes, GROUP, QUERIES, OFFSETS)
    qk2 = multiply_rows(head.q_ptr, head.k2_ptr, tile, tile.exists, qk_scale, D)  # [ROWS, D]
    for chunk in range(chunks):
        # -- attend from each row; rows with a sum out of range need a running maximum --
        tile = make_tile(first_tile + chunk, sizes, GROUP, QUERIES, OFFSETS)
        acc, m_i, l_i = attend(head, qk2, tile, sizes.w1, None, D, BLOCK_N, PRECISION)  # m_i = 0
        needs_max = tile.exists & ~((l_i > LEAST) & (l_i < MOST))
        if REPAIR:
            acc, m_i, l_i = attend(head, qk2, tile, sizes.w1, needs_max, D, BLOCK_N, PRECISION)
        else:
            l_i = tl.where(needs_max, float("nan"), l_i)

        # -- combine the rows of each query, and merge the result with those of earlier chunks --
        o_chunk, lse_chunk = combine_rows(
            acc, m_i, l_i, head.v2_ptr, tile, is_own, D, PRECISION, REPAIR
        )
        o, lse = merge_chunk(o, lse, o_chunk, lse_chunk)

        # -- compute qk2 of the next chunk: here, so that Triton keeps it in shared memory --
        if chunk + 1 < chunks:
            next_tile = make_tile(first_tile + chunk + 1, sizes, GROUP, QUERIES, OFFSETS)
            qk2 = multiply_rows(head.q_ptr, head.k2_ptr, next_tile, next_tile.exists, qk_scale, D)
        else:
            qk2 = tl.zeros((ROWS, D), dtype)

    # -- store; lse in natural logarithms --
    row, mask = block_queries(query_block, sizes, GROUP, QUERIES, PADDED)  # rows of q
    if REPAIR:
        mask &= tl.load(head.lse_ptr + row, mask=mask, other=0.0) == float("inf")
    o_ptrs = head.o_ptr + row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(o_ptrs, o.to(dtype), mask=mask[:, None])
    tl.store(head.lse_ptr + row, lse * LN2, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr, v_ptr, k_blocks, v_blocks,  # (B, Hkv, Tk, D), and TMA descriptors of (B * Hkv * Tk, D)
    k2_ptr, v2_ptr,  # (B, Hkv, Tk2, D)
    o_ptr, lse_ptr,  # (B, H, Tq, D), (B, H, Tq)
    Tq, Tk, Tk2, w1, w2, scale,
    GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute o and lse of QUERIES queries of KV head program_id(1). See forward_queries."""
    query_block = tl.program_id(0)
    sizes = Sizes(Tq, Tk, Tk2, w1, w2)
    head = select_head(
        q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr, sizes, GROUP, D
    )
    forward_queries(
        query_block, head, sizes, scale, GROUP, D, QUERIES, OFFSETS, BLOCK_N, PRECISION, False
    )  # False: without REPAIR


@triton.jit(do_not_specialize=VARYING)
def repair_kernel(
    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr,
    Tq, Tk, Tk2, w1, w2, scale,
    GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Recompute queries with lse = inf or an o that is not finite, with a running maximum.

    The Hopper kernel stores lse = inf where a sum leaves the range of the dtype; forward_kernel
    stores NaN in o. An inf in v reaches all rows of a tile, as 0 * inf = NaN. Usually there is
    nothing to repair, so a program has TILES blocks of QUERIES queries, about 128 queries together,
    and only reads lse and o.
    """
    TILES: tl.constexpr = max(1, REPAIR_QUERIES // QUERIES)
    sizes = Sizes(Tq, Tk, Tk2, w1, w2)
    first_tile = tl.program_id(0) * TILES
    query = first_tile * QUERIES + tl.arange(0, TILES * QUERIES)
    row = tl.program_id(1).to(tl.int64) * GROUP * Tq + query_row(query, sizes, GROUP)
    mask = query < GROUP * Tq

    # -- find the queries that need repair --
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0)
    o_ptrs = o_ptr + row[:, None] * D + tl.arange(0, D)[None, :]
    o = tl.load(o_ptrs, mask=mask[:, None], other=0.0).to(tl.float32)
    is_finite = tl.min((tl.abs(o) < float("inf")).to(tl.int32), 1) > 0
    needs_repair = (lse == float("inf")) | ~is_finite

    # -- recompute the blocks of QUERIES queries that have one, but store these queries only --
    if tl.max(needs_repair.to(tl.int32), 0) > 0:
        tl.store(lse_ptr + row, float("inf"), mask=mask & needs_repair)  # marks these queries
        tl.debug_barrier()  # forward_queries reads the marks
        for tile in range(first_tile, first_tile + TILES):
            if tl.max((needs_repair & (query // QUERIES == tile)).to(tl.int32), 0) > 0:
                head = select_head(
                    q_ptr, k_ptr, v_ptr, k_blocks, v_blocks, k2_ptr, v2_ptr, o_ptr, lse_ptr,
                    sizes, GROUP, D,
                )  # fmt: skip
                forward_queries(
                    tile, head, sizes, scale,
                    GROUP, D, QUERIES, OFFSETS, BLOCK_N, PRECISION, True,  # with REPAIR
                )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Backward: dq, dk2 and dv2. A piece is `piece` consecutive query positions; one program each.


class BackwardHead(NamedTuple):
    """The inputs of the backward pass of one KV head."""

    q_ptr: tl.tensor  # (GROUP, Tq, D)
    k_ptr: tl.tensor  # (Tk, D)
    v_ptr: tl.tensor
    k2_ptr: tl.tensor  # (Tk2, D)
    v2_ptr: tl.tensor
    do_ptr: tl.tensor  # (GROUP, Tq, D)
    lse_ptr: tl.tensor  # (GROUP, Tq)
    delta_ptr: tl.tensor  # (GROUP, Tq), sum of o * do over the channels


@triton.jit
def select_backward_head(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, bh, sizes,
    GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the BackwardHead of KV head bh of the batch: skip the bh heads before it."""
    q_ptr += bh * GROUP * sizes.Tq * D
    do_ptr += bh * GROUP * sizes.Tq * D
    lse_ptr += bh * GROUP * sizes.Tq
    delta_ptr += bh * GROUP * sizes.Tq
    k_ptr += bh * sizes.Tk * D
    v_ptr += bh * sizes.Tk * D
    k2_ptr += bh * sizes.Tk2 * D
    v2_ptr += bh * sizes.Tk2 * D
    return BackwardHead(q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr)


class RowInputs(NamedTuple):
    """Inputs of the backward pass for the rows of a tile."""

    qk2: tl.tensor  # q_i * k2_{i-d} * scale * LOG2E, [ROWS, D]
    dov2: tl.tensor  # do_i * v2_{i-d}, [ROWS, D]
    lse: tl.tensor  # in base 2, [ROWS]; inf where a row does not exist: exp2(s - inf) = 0
    delta: tl.tensor  # [ROWS]
    position: tl.tensor  # of the query in k, [ROWS]


@triton.jit
def make_row_operands(
    head, tile_index, sizes, qk_scale,
    GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Return qk2 = q_i * k2_{i-d} * qk_scale and dov2 = do_i * v2_{i-d} of a tile, [ROWS, D].

    Where a query i sees a single pair, dov2 is 0. As delta is 0 too, dS (gradient of the scores)
    is exactly 0 there.
    """
    tile = make_tile(tile_index, sizes, GROUP, QUERIES, OFFSETS)
    qk2 = multiply_rows(head.q_ptr, head.k2_ptr, tile, tile.exists, qk_scale, D)
    tl.debug_barrier()  # without it all loads come first, and registers spill
    return qk2, multiply_rows(head.do_ptr, head.v2_ptr, tile, tile.has_several_pairs, 1.0, D)


@triton.jit
def load_row_inputs(head, tile, qk2, dov2):
    """Load lse and delta of the queries of a tile, [ROWS]. Return the RowInputs."""
    lse = tl.load(head.lse_ptr + tile.q_row, mask=tile.exists, other=float("inf")) * LOG2E
    delta = tl.load(head.delta_ptr + tile.q_row, mask=tile.has_several_pairs, other=0.0)
    return RowInputs(qk2, dov2, lse, delta, tile.position)


@triton.jit
def backward_block(pv, dsk, rows, k, v, start, end, w1, is_partial, PRECISION: tl.constexpr):
    """Add a block of keys to pv = P V and dsk = dS K of each row, [ROWS, D].

    P: softmax weights of the row, dS: gradient of its scores. rows: RowInputs. k, v [BLOCK_N, D]:
    the block, from key `start` on. is_partial: whether some row does not see the whole block.
    """
    # -- recompute p = exp2(s - lse), in base 2 --
    s = tl.dot(rows.qk2, tl.trans(k), input_precision=PRECISION)  # [ROWS, BLOCK_N]
    p = tl.exp2(s - rows.lse[:, None])
    if is_partial:
        key = start + tl.arange(0, k.shape[0])[None, :]
        p = tl.where(is_visible(rows.position[:, None], key, w1, end), p, 0.0)
    # -- pv += p v, ds = p * (dp - delta) with dp = dov2 v^T, dsk += ds k --
    pv = tl.dot(p.to(v.dtype), v, pv, input_precision=PRECISION)  # [ROWS, D]
    ds = p * (tl.dot(rows.dov2, tl.trans(v), input_precision=PRECISION) - rows.delta[:, None])
    dsk = tl.dot(ds.to(k.dtype), k, dsk, input_precision=PRECISION)
    return pv, dsk


@triton.jit
def attend_backward(
    head, rows, tile, w1,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return pv = P V and dsk = dS K of the rows of a tile over their windows. [ROWS, D]"""
    ROWS: tl.constexpr = rows.qk2.shape[0]
    pv = tl.zeros((ROWS, D), tl.float32)
    dsk = tl.zeros((ROWS, D), tl.float32)
    first_key, first_block, end = key_blocks(tile, w1, BLOCK_N)

    # -- the first keys of the windows, in small blocks of EDGE keys (is_partial is True) --
    for start in tl.range(first_key, first_block, EDGE, num_stages=1):
        k, v = load_keys(head.k_ptr, head.v_ptr, start, first_block, EDGE, D)
        pv, dsk = backward_block(pv, dsk, rows, k, v, start, first_block, w1, True, PRECISION)

    # -- the other keys, in blocks of BLOCK_N --
    # is_partial: the first query comes before the last key of the block, and does not see it
    for start in range(first_block, end, BLOCK_N):
        k = load_block(head.k_ptr, start, BLOCK_N, D)
        v = load_block(head.v_ptr, start, BLOCK_N, D)
        is_partial = start + BLOCK_N > tile.first_position + 1
        pv, dsk = backward_block(pv, dsk, rows, k, v, start, end, w1, is_partial, PRECISION)
    return pv, dsk


@triton.jit
def k2_rows(
    tile, chunk, sizes, piece, buffer_rows,
    QUERIES: tl.constexpr, OFFSETS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return which position of k2 each row of a tile reads, and the buffer row of each position.

    reads [K2_ROWS, ROWS]: 1 where row (i, d) reads the position, that is where it is i - d, else 0.
    For QUERIES = OFFSETS = 2 and queries at positions 5 and 6, the rows are (5, 0) (5, 1) (6, 0)
    (6, 1), which read positions 5 4 6 5 of k2:
        position 4    0 1 0 0
        position 5    1 0 0 1    so reads @ x adds up the rows of x [ROWS, D] by position
        position 6    0 0 1 0
    buffer_row [K2_ROWS]: where the program's buffer has these positions' sums for dk2 and dv2.
    chunk: which chunk of OFFSETS offsets the tile has.
    """
    LARGER: tl.constexpr = OFFSETS if OFFSETS > QUERIES else QUERIES
    # a tile reads at most QUERIES + OFFSETS - 1 positions, here padded to a power of two
    K2_ROWS: tl.constexpr = 2 * LARGER if LARGER > 8 else 16
    first_position2 = tile.first_position - sizes.Tk + sizes.Tk2  # of the first query in k2
    first_read = first_position2 - chunk * OFFSETS - OFFSETS + 1  # minus its largest offset
    k2_position = tl.arange(0, K2_ROWS) + first_read
    reads = (k2_position[:, None] == tile.position2[None, :]).to(dtype)

    # rows of the buffer: its last one, buffer_rows - 1, is the last position of the piece
    #     | w2 - 1 positions before the piece |     piece     |
    #     0                                   w2 - 1          buffer_rows
    # piece = 64, w2 = 32: program 1 has queries 64 ... 127, and rows 0 ... 94 are for 33 ... 127
    q_position = k2_position - (sizes.Tk2 - sizes.Tq)
    return reads, q_position + buffer_rows - piece * (tl.program_id(0) + 1)


@triton.jit
def add_to_buffer(ptr, x, rows, mask, D: tl.constexpr):
    """Add x [len(rows), D] to rows of a buffer in memory."""
    ptrs = ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=mask[:, None], other=0.0) + x, mask=mask[:, None])


@triton.jit(do_not_specialize=VARYING)
def dq_dk2_dv2_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr,  # do like q, else as in forward_kernel
    lse_ptr, delta_ptr,  # (B, H, Tq)
    dq_ptr,  # (B, H, Tq, D)
    dk2_ptr, dv2_ptr,  # (B * Hkv, pieces, buffer_rows, D) float32, zeros on entry
    Tq, Tk, Tk2, w1, w2, scale, piece, buffer_rows,
    GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq of `piece` query positions, and what they add to dk2 and dv2.

    Sums for dk2 and dv2 go to a buffer of this program alone. Its last `piece` rows are the
    positions of its queries, its first w2 - 1 rows those before, which these queries see as well.
    """
    PADDED: tl.constexpr = QUERIES if QUERIES > 16 else 16  # a matrix product needs 16 rows
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    # -- select the KV head --
    sizes = Sizes(Tq, Tk, Tk2, w1, w2)
    bh = tl.program_id(1).to(tl.int64)
    head = select_backward_head(
        q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, bh, sizes, GROUP, D
    )
    dq_ptr += bh * GROUP * Tq * D

    # -- tiles of this program: a tile for each chunk of OFFSETS offsets of QUERIES queries --
    chunks = tl.cdiv(w2, OFFSETS)
    steps = piece * GROUP // QUERIES * chunks  # how many tiles: 64 * GROUP // 4 * 1, for example
    first_tile = tl.program_id(0) * steps
    end_tile = tl.minimum(first_tile + steps, tl.cdiv(Tq * GROUP, QUERIES) * chunks)
    scale = tl.cast(scale, tl.float32)
    qk2, dov2 = make_row_operands(
        head, first_tile, sizes, scale * LOG2E, GROUP, D, QUERIES, OFFSETS
    )
    dq = tl.zeros((PADDED, D), tl.float32)
    for tile_index in range(first_tile, end_tile):
        # -- compute pv = P V and dsk = dS K of each row (query i, offset d), [ROWS, D] --
        tile = make_tile(tile_index, sizes, GROUP, QUERIES, OFFSETS)
        rows = load_row_inputs(head, tile, qk2, dov2)
        pv, dsk = attend_backward(head, rows, tile, w1, D, BLOCK_N, PRECISION)

        # pv and dsk fill the registers, so compute the tile again. tl.where hides from the compiler
        # that it is the same one (w1 > 0), and barriers keep the loads below from moving up here.
        same_index = tl.where(w1 > 0, tile_index, 0)
        same_bh = tl.where(w1 > 0, bh, 0)
        tile = make_tile(same_index, sizes, GROUP, QUERIES, OFFSETS)

        # -- dv2_{i-d} += pv_id * do_i, dk2_{i-d} += scale * dsk_id * q_i, for all rows (i, d) --
        # reads [K2_ROWS, ROWS], 0/1: row (i, d) reads position i - d. reads @ x sums x by position.
        reads, buffer_row = k2_rows(
            tile, tile_index % chunks, sizes, piece, buffer_rows, QUERIES, OFFSETS, dtype
        )
        tl.debug_barrier()
        in_buffer = (buffer_row >= 0) & (buffer_row < buffer_rows)
        program = same_bh * tl.num_programs(0) + tl.program_id(0)  # the number of its buffer
        do = load_rows(head.do_ptr, tile.q_row, tile.exists, D)  # [ROWS, D]
        dv2 = tl.dot(reads, (pv * do).to(dtype), input_precision=PRECISION)  # [K2_ROWS, D]
        add_to_buffer(dv2_ptr + program * buffer_rows * D, dv2, buffer_row, in_buffer, D)
        tl.debug_barrier()
        q = load_rows(head.q_ptr, tile.q_row, tile.exists, D)
        dk2 = tl.dot(reads, (dsk * q).to(dtype), input_precision=PRECISION) * scale
        add_to_buffer(dk2_ptr + program * buffer_rows * D, dk2, buffer_row, in_buffer, D)
        tl.debug_barrier()

        # -- dq_i = scale * sum_d dsk_id * k2_{i-d}: add this chunk of d to the earlier chunks --
        k2 = load_rows(head.k2_ptr, tile.position2, tile.exists, D)
        is_own = own_rows(PADDED, QUERIES * OFFSETS, OFFSETS)  # [PADDED, ROWS]: row of the query?
        dsk_k2 = (dsk * k2).to(dtype)
        dq_chunk = tl.dot(is_own.to(dtype), dsk_k2, input_precision=PRECISION) * scale
        dq = tl.where(tile_index % chunks == 0, 0.0, dq) + dq_chunk  # 0 before the first chunk

        # -- store dq: each chunk overwrites it, so the complete sum of the last chunk remains --
        q_row, mask = block_queries(tile_index // chunks, sizes, GROUP, QUERIES, PADDED)
        dq_ptrs = dq_ptr + q_row[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(dq_ptrs, dq.to(dtype), mask=mask[:, None])

        # -- compute qk2 and dov2 of the next tile: here, Triton keeps them in shared memory --
        qk2, dov2 = make_row_operands(
            head, tile_index + 1, sizes, scale * LOG2E, GROUP, D, QUERIES, OFFSETS
        )
        tl.debug_barrier()  # in the next step other threads add to the same rows of the buffers


# --------------------------------------------------------------------------------------------------
# Backward: dk and dv, a program per block of keys


@triton.jit(do_not_specialize=VARYING)
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr,  # as in dq_dk2_dv2_kernel
    is_seen_ptr,  # (B, Hkv, Tk) int8: does a query with inf or NaN see this key?
    dk_ptr, dv_ptr,  # (B, Hkv, Tk, D)
    Tq, Tk, Tk2, w1, w2, scale,
    GROUP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk = dS^T (q_i * k2_{i-d}) and dv = P^T (do_i * v2_{i-d}) of BLOCK_N keys.

    The sums are over the rows (query i, offset d) of all tiles with a query that sees the keys.
    """
    # -- select the KV head --
    sizes = Sizes(Tq, Tk, Tk2, w1, w2)
    bh = tl.program_id(1).to(tl.int64)
    head = select_backward_head(
        q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, bh, sizes, GROUP, D
    )
    dk_ptr += bh * Tk * D
    dv_ptr += bh * Tk * D

    # -- load the keys --
    start = tl.program_id(0) * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    k, v = load_keys(head.k_ptr, head.v_ptr, start, Tk, BLOCK_N, D)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    dk_sum = tl.zeros((BLOCK_N, D), tl.float32)  # for float32: sums of earlier tiles, see below
    dv_sum = tl.zeros((BLOCK_N, D), tl.float32)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E

    # -- tiles with a query that sees one of these keys: positions first ... end - 1 of q --
    # key j is seen by queries at j ... j + w1 - 1, as positions in k; in q, they are Tk - Tq less
    first = tl.maximum(start - (Tk - Tq), 0)
    end = tl.minimum(start + BLOCK_N + w1 - 1, Tk) - (Tk - Tq)
    first_block = first * GROUP // QUERIES  # a block is QUERIES queries
    end_block = tl.cdiv(tl.maximum(end, first) * GROUP, QUERIES)
    chunks = tl.cdiv(w2, OFFSETS)  # tiles of a block: one per chunk of OFFSETS offsets
    for tile_index in range(first_block * chunks, end_block * chunks):
        # -- load the rows; if a query has a single pair, qk2 = lse = 0: then P = 1 and dk is 0 --
        tile = make_tile(tile_index, sizes, GROUP, QUERIES, OFFSETS)
        qk2 = multiply_rows(
            head.q_ptr, head.k2_ptr, tile, tile.has_several_pairs, qk_scale, D
        )  # [ROWS, D]
        dov2 = multiply_rows(head.do_ptr, head.v2_ptr, tile, tile.exists, 1.0, D)
        lse = tl.load(head.lse_ptr + tile.q_row, mask=tile.has_several_pairs, other=0.0) * LOG2E
        lse = tl.where(tile.exists, lse, float("inf"))  # exp2(s - inf) = 0
        delta = tl.load(head.delta_ptr + tile.q_row, mask=tile.exists, other=0.0)

        # -- recompute p, transposed; it needs no mask if all queries see all keys --
        s = tl.dot(k, tl.trans(qk2), input_precision=PRECISION)  # [BLOCK_N, ROWS]
        p = tl.exp2(s - lse[None, :])
        sees_all = (start + BLOCK_N <= tile.first_position + 1) & (tile.last_position - w1 < start)
        if not sees_all:
            p = tl.where(is_visible(tile.position[None, :], key[:, None], w1, Tk), p, 0.0)

        # -- dv += p dov2, ds = p * (dp - delta) with dp = v dov2^T, dk += ds qk2 --
        dv = tl.dot(p.to(dov2.dtype), dov2, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(dov2), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(qk2.dtype), qk2, dk, input_precision=PRECISION)

        # -- float32: sum 64 tiles at a time, since one long sum would lose the most digits --
        if PRECISION == "ieee":
            is_last = tile_index % 64 == 63
            dk_sum += tl.where(is_last, dk, 0.0)
            dv_sum += tl.where(is_last, dv, 0.0)
            dk = tl.where(is_last, 0.0, dk)
            dv = tl.where(is_last, 0.0, dv)

    # -- store; LN2 removes the factor LOG2E of qk2 --
    is_seen = tl.load(is_seen_ptr + bh * Tk + key, mask=key < Tk, other=0) != 0
    dk = tl.where(is_seen[:, None], float("nan"), (dk + dk_sum) * LN2)
    dv = tl.where(is_seen[:, None], float("nan"), dv + dv_sum)
    offs = key[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + offs, dk.to(k.dtype), mask=(key < Tk)[:, None])
    tl.store(dv_ptr + offs, dv.to(v.dtype), mask=(key < Tk)[:, None])


# --------------------------------------------------------------------------------------------------
# Backward: inf and NaN. A query that sees one gets NaN, as do the gradients of what it sees; all
# others keep their bits, unless a product of finite float16 numbers overflows. P = 0 does not hide
# inf and NaN in a product, as 0 * inf = NaN. So clean_kernel first replaces them by 0, and
# afterwards the gradients that depend on them are set to NaN.


@triton.jit(do_not_specialize=VARYING)
def clean_kernel(
    x_ptr, y_ptr, o_ptr, x_clean_ptr, y_clean_ptr,  # (N, D); o may be None
    is_bad_ptr, delta_ptr,  # (N,) int8, (N,) float32
    N, D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK_T rows of x and y with 0 for inf and NaN, and set is_bad where a row has one.

    With o, the rows are queries and y is do: also compute delta = sum_d y * o of each.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs = rows[:, None] * D + tl.arange(0, D)[None, :]
    mask = (rows < N)[:, None]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)  # [BLOCK_T, D]
    y = tl.load(y_ptr + offs, mask=mask, other=0.0)

    # -- replace inf and NaN by 0 --
    is_finite_x = tl.abs(x) < float("inf")
    is_finite_y = tl.abs(y) < float("inf")
    tl.store(x_clean_ptr + offs, tl.where(is_finite_x, x, 0.0), mask=mask)
    tl.store(y_clean_ptr + offs, tl.where(is_finite_y, y, 0.0), mask=mask)
    is_finite = tl.min((is_finite_x & is_finite_y).to(tl.int32), 1) > 0
    if o_ptr is not None:
        o = tl.load(o_ptr + offs, mask=mask, other=0.0)
        delta = tl.sum(y.to(tl.float32) * o.to(tl.float32), 1)
        is_finite = is_finite & (tl.abs(delta) < float("inf"))
        tl.store(delta_ptr + rows, tl.where(is_finite, delta, 0.0), mask=rows < N)
    tl.store(is_bad_ptr + rows, 1 - is_finite.to(tl.int8), mask=rows < N)


@triton.jit(do_not_specialize=VARYING)
def sum_buffers_kernel(
    dk2_buffers_ptr, dv2_buffers_ptr,  # (B * Hkv, pieces, buffer_rows, D), of dq_dk2_dv2_kernel
    is_seen_ptr,  # (B, Hkv, Tk2) int8: does a query with inf or NaN see this position?
    dk2_ptr, dv2_ptr,  # (B, Hkv, Tk2, D)
    Tk2, past, pieces, piece, buffer_rows,  # past: positions of k2 before the first query
    D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute dk2 and dv2 of BLOCK_T positions: add up the buffers that hold a position, in order.

        positions    | piece 0 | piece 1 | piece 2 |
        buffer 1         | - - |=========|
        buffer 2                   | - - |=========|

    Buffer n holds piece n (=), and the w2 - 1 positions before it (-) that its queries see as well.
    """
    bh = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = position < Tk2
    q_position = position - past  # negative before the first query

    # A position is in the buffer of its own piece, and in those of up to `reach` pieces after it.
    # For piece = 64 and w2 = 32, buffers have 95 rows and reach = 1. Position 50 of q, in piece 0,
    # is row 50 - 64 + 95 = 81 of buffer 0, and row 50 - 128 + 95 = 17 of buffer 1. Position -5 has
    # own_piece -1, which does not exist, and is row -5 - 64 + 95 = 26 of buffer 0.
    reach = tl.cdiv(buffer_rows - piece, piece)
    own_piece = (q_position + reach * piece) // piece - reach  # // rounds down numbers >= 0 only
    dk2 = tl.zeros((BLOCK_T, D), tl.float32)
    dv2 = tl.zeros((BLOCK_T, D), tl.float32)
    for b in range(reach + 1):
        n = own_piece + b  # number of the buffer
        row = q_position - (n + 1) * piece + buffer_rows  # in buffer n, which ends with its piece
        mask = exists & (n >= 0) & (n < pieces) & (row >= 0)
        buffer_row = (bh * pieces + n) * buffer_rows + row
        dk2 += load_rows(dk2_buffers_ptr, buffer_row, mask, D)
        dv2 += load_rows(dv2_buffers_ptr, buffer_row, mask, D)
    is_seen = tl.load(is_seen_ptr + bh * Tk2 + position, mask=exists, other=0) != 0
    dk2 = tl.where(is_seen[:, None], float("nan"), dk2)
    dv2 = tl.where(is_seen[:, None], float("nan"), dv2)
    offs = (bh * Tk2 + position)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk2_ptr + offs, dk2.to(dk2_ptr.dtype.element_ty), mask=exists[:, None])
    tl.store(dv2_ptr + offs, dv2.to(dv2_ptr.dtype.element_ty), mask=exists[:, None])


# --------------------------------------------------------------------------------------------------
# Launch options


class Config(NamedTuple):
    """What get_config chooses per kernel, dtype, head dimension and GPU."""

    rows: int  # of a tile, queries times offsets
    block_n: int  # keys per block
    num_warps: int
    num_stages: int  # blocks of keys in flight, by software pipelining
    maxnreg: int | None = None  # limit of registers per thread


# Chosen by time on one H200, with registers spilled where that was faster (step 7 in NOTES.md).
# Heads narrower than 64 take the options of 64.
HOPPER = {
    ("forward", 128): Config(rows=128, block_n=32, num_warps=4, num_stages=3),
    ("dq_dk2_dv2", 128): Config(rows=128, block_n=32, num_warps=8, num_stages=3),
    ("dk_dv", 128): Config(rows=64, block_n=128, num_warps=8, num_stages=1),
    ("forward", 64): Config(rows=128, block_n=64, num_warps=4, num_stages=3, maxnreg=168),
    ("dq_dk2_dv2", 64): Config(rows=128, block_n=32, num_warps=4, num_stages=3),
    ("dk_dv", 64): Config(rows=128, block_n=64, num_warps=4, num_stages=1),
}
OTHERS = {  # untimed; fit 99 KB of shared memory and do not spill
    "forward": Config(rows=64, block_n=32, num_warps=8, num_stages=2),
    "dq_dk2_dv2": Config(rows=32, block_n=32, num_warps=8, num_stages=2),
    "dk_dv": Config(rows=32, block_n=64, num_warps=8, num_stages=1),
}
FLOAT32 = Config(rows=16, block_n=16, num_warps=8, num_stages=1)  # without tensor cores


def get_config(kernel, dtype, D, device):
    """Return the Config of "forward" (and repair), "dq_dk2_dv2" or "dk_dv"."""
    if dtype == torch.float32:
        return FLOAT32
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return HOPPER[kernel, max(D, 64)]
    return OTHERS[kernel]


@functools.lru_cache(1024)
def get_options(kernel, dtype, device, group, D, w2):
    """Return the compile-time arguments of "forward" (and repair), "dq_dk2_dv2" or "dk_dv"."""
    config = get_config(kernel, dtype, D, device)
    offsets = min(32, config.rows, triton.next_power_of_2(w2))  # the fewest that hold w2, up to 32
    return {
        "GROUP": group,
        "D": D,
        "QUERIES": config.rows // offsets,  # per tile
        "OFFSETS": offsets,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.maxnreg,
    }


def check_size(heads, group, Tq, Tk, Tk2, D):
    """Raise ValueError if a grid would exceed 16 bits, or an offset inside a head 31 bits."""
    longest = max(group * Tq, Tk, Tk2)
    if heads >= 2**16 or longest * D >= 2**31 or heads * max(Tk, Tk2) >= 2**31:
        raise ValueError(
            f"{heads} KV heads in the batch with {group} x {Tq} queries each are too many for one "
            f"call: split the batch"
        )


# --------------------------------------------------------------------------------------------------
# Forward on the host


def hopper_plan(q, k, w1, w2):
    """Return the compile-time arguments of hopper_kernel, or None where forward_kernel runs."""
    if hopper is None or not q.is_cuda:
        return None
    return hopper.plan(q.dtype, q.device, q.shape[1] // k.shape[1], q.shape[3], w1, w2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int
) -> tuple[Tensor, Tensor]:
    """Return o like q, and lse (B, H, Tq) float32 in natural logarithms. Inputs are contiguous."""
    o = torch.empty_like(q)  # (B, H, Tq, D)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return o, lse
    if w2 > w1:  # the roles are symmetric: offsets take the shorter window
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    B, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    Tk2 = k2.shape[2]
    check_size(B * Hkv, H // Hkv, Tq, Tk, Tk2, D)
    sizes = Tq, Tk, Tk2, min(w1, Tk), min(w2, Tk2)

    # TMA wants addresses that are multiples of 16
    k = k if k.data_ptr() % 16 == 0 else k.clone()
    v = v if v.data_ptr() % 16 == 0 else v.clone()
    options = get_options("forward", q.dtype, q.device, H // Hkv, D, min(w2, Tk2))
    block = [options["BLOCK_N"], D]
    k_blocks = TensorDescriptor.from_tensor(k.view(-1, D), block)  # (B * Hkv * Tk, D)
    v_blocks = TensorDescriptor.from_tensor(v.view(-1, D), block)
    tensors = q, k, v, k_blocks, v_blocks, k2, v2, o, lse

    tiles = triton.cdiv(H // Hkv * Tq, options["QUERIES"])  # blocks of QUERIES queries per KV head
    # on Hopper by a Gluon kernel, which takes k and v; else by forward_kernel, also with k_blocks
    plan = hopper_plan(q, k, min(w1, Tk), min(w2, Tk2))
    if plan is not None:
        hopper.launch(plan, q, k, v, k2, v2, o, lse, sizes)
    else:
        forward_kernel[(tiles, B * Hkv)](*tensors, *sizes, D**-0.5, **options)
    # Compute the queries again that have lse = inf or an o that is not finite. There are few or
    # none, so a program checks many: 128 queries.
    programs = triton.cdiv(tiles, max(1, REPAIR_QUERIES.value // options["QUERIES"]))
    repair_kernel[(programs, B * Hkv)](*tensors, *sizes, D**-0.5, **options)
    return o, lse


# --------------------------------------------------------------------------------------------------
# Backward on the host


def clean(x, y, o=None):
    """Replace inf and NaN in x and y by 0. With o, compute delta = (y * o).sum(-1), too.

    x, y and o: (..., D). Returns x and y cleaned; is_bad (...), whether a row of x or y has inf or
    NaN, or its delta is not finite; delta (...) float32, 0 where it is not finite, or None.
    """
    x_clean = torch.empty_like(x)
    y_clean = torch.empty_like(y)
    is_bad = x.new_empty(x.shape[:-1], dtype=torch.int8)
    delta = None if o is None else x.new_empty(x.shape[:-1], dtype=torch.float32)
    N = is_bad.numel()
    tensors = x, y, o, x_clean, y_clean, is_bad, delta
    clean_kernel[(triton.cdiv(N, BLOCK_T),)](*tensors, N, x.shape[-1], BLOCK_T)
    return x_clean, y_clean, is_bad.bool(), delta


def any_in_window(flags, w):
    """Return for each i whether one of flags[i - w + 1 ... i] is True. flags (..., T) bool.

    For w = 2, flags 0 1 0 0 give count 0 0 0 1 1 1 and the result 0 1 1 0.
    """
    count = F.pad(flags.cumsum(-1), (w, 0))  # count[i + w]: how many of flags[0 ... i] are True
    return count[..., w:] > count[..., :-w]  # those up to i, those up to i - w


def seen_by(flags, T, w):
    """Return for each of T positions whether a query with a True flag sees it, (..., T).

    flags (..., Tq): one per query, at the last Tq positions. The query at i sees i - w + 1 ... i:
    j is seen from j ... j + w - 1. Read from right to left, that is a window which ends at j. For
    T = 4, w = 2 and flags 1 0 0: padded 0 1 0 0, flipped 0 0 1 0, any_in_window 0 0 1 1, flipped
    1 1 0 0.
    """
    padded = F.pad(flags, (T - flags.shape[-1], 0))
    return any_in_window(padded.flip(-1), w).flip(-1).to(torch.int8).contiguous()


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, o: Tensor, lse: Tensor,
    w1: int, w2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk, dv, dk2 and dv2. do: the gradient with respect to o, (B, H, Tq, D)."""
    if q.numel() == 0:
        return tuple(torch.zeros_like(t) for t in (q, k, v, k2, v2))
    if w2 > w1:  # swap the roles, as forward does
        dq, dk2, dv2, dk, dv = backward(do, q, k2, v2, k, v, o, lse, w2, w1)
        return dq, dk, dv, dk2, dv2
    B, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    Tk2 = k2.shape[2]
    heads = B * Hkv
    group = H // Hkv
    w1 = min(w1, Tk)
    w2 = min(w2, Tk2)

    # bad queries have inf or NaN in q, do, o or lse, or see it in their windows
    q, do, is_bad, delta = clean(q, do, o)  # is_bad and delta (B, H, Tq)
    k, v, has_bad, _ = clean(k, v)  # has_bad (B, Hkv, Tk)
    k2, v2, has_bad2, _ = clean(k2, v2)  # has_bad2 (B, Hkv, Tk2)
    sees_bad = any_in_window(has_bad, w1)[..., Tk - Tq :]  # (B, Hkv, Tq)
    sees_bad |= any_in_window(has_bad2, w2)[..., Tk2 - Tq :]  # the queries are the last Tq
    is_bad |= sees_bad.repeat_interleave(group, 1) | ~lse.isfinite()
    by_kv_head = is_bad.unflatten(1, (Hkv, group)).any(2)  # (B, Hkv, Tq), is one of the group bad?

    # with lse = inf, P = exp(S - lse) = 0, so bad queries add nothing to any gradient
    lse = lse.masked_fill(is_bad, torch.inf)
    delta = delta.masked_fill(is_bad, 0)
    tensors = q, k, v, k2, v2, do, lse, delta
    sizes = Tq, Tk, Tk2, w1, w2, D**-0.5

    # dk and dv: one program per block of keys
    dk = torch.empty_like(k)
    dv = torch.empty_like(v)
    options = get_options("dk_dv", q.dtype, q.device, group, D, w2)
    blocks = triton.cdiv(Tk, options["BLOCK_N"])
    is_seen = seen_by(by_kv_head, Tk, w1)
    dk_dv_kernel[(blocks, heads)](*tensors, is_seen, dk, dv, *sizes, **options)

    # dq, and sums for dk2 and dv2 in float32 buffers: one program, with a buffer, per piece of
    # query positions. A piece is a whole number of tiles.
    options = get_options("dq_dk2_dv2", q.dtype, q.device, group, D, w2)
    piece = max(PIECE, options["QUERIES"])
    pieces = triton.cdiv(Tq, piece)
    rows = piece + w2 - 1  # of a buffer: the piece and the positions before it that it sees
    dq = torch.empty_like(q)
    dk2_buffers = torch.zeros(heads, pieces, rows, D, dtype=torch.float32, device=q.device)
    dv2_buffers = torch.zeros_like(dk2_buffers)
    outputs = dq, dk2_buffers, dv2_buffers
    dq_dk2_dv2_kernel[(pieces, heads)](*tensors, *outputs, *sizes, piece, rows, **options)
    dq.masked_fill_(is_bad[..., None], torch.nan)

    # dk2 and dv2: add up the buffers
    dk2 = torch.empty_like(k2)
    dv2 = torch.empty_like(v2)
    is_seen = seen_by(by_kv_head, Tk2, w2)
    tensors = dk2_buffers, dv2_buffers, is_seen, dk2, dv2
    sizes = Tk2, Tk2 - Tq, pieces, piece, rows
    sum_buffers_kernel[(triton.cdiv(Tk2, BLOCK_T), heads)](*tensors, *sizes, D, BLOCK_T)
    return dq, dk, dv, dk2, dv2


# --------------------------------------------------------------------------------------------------
# Operators, which torch.compile treats as opaque


simplicial_op = custom_op("fivefold::simplicial", forward, mutates_args=())
simplicial_backward_op = custom_op("fivefold::simplicial_backward", backward, mutates_args=())


# for torch.compile: the outputs' shapes and dtypes
@simplicial_op.register_fake
def _(q, k, v, k2, v2, w1, w2):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@simplicial_backward_op.register_fake
def _(do, q, k, v, k2, v2, o, lse, w1, w2):
    return tuple(torch.empty_like(t) for t in (q, k, v, k2, v2))


def setup_context(ctx, inputs, output):
    """Save for the backward pass: q, k, v, k2, v2, w1 and w2 (the inputs), o and lse."""
    *tensors, ctx.w1, ctx.w2 = inputs
    o, lse = output
    ctx.save_for_backward(*tensors, o, lse)
    ctx.mark_non_differentiable(lse)


def simplicial_autograd(ctx, do, _):
    """Return the gradients of q, k, v, k2 and v2, and None for w1 and w2."""
    grads = simplicial_backward_op(do.contiguous(), *ctx.saved_tensors, ctx.w1, ctx.w2)
    return *grads, None, None


simplicial_op.register_autograd(simplicial_autograd, setup_context=setup_context)


# --------------------------------------------------------------------------------------------------
# The public function


def check(q, k, v, k2, v2, w1, w2):
    """Raise ValueError if `attention` cannot take these inputs."""
    fits = all(t.dim() == 4 and t.dtype == q.dtype for t in (q, k, v, k2, v2))
    if fits:
        B, H, Tq, D = q.shape
        _, Hkv, Tk, _ = k.shape
        Tk2 = k2.shape[2]
        fits = k.shape == v.shape == (B, Hkv, Tk, D)
        fits = fits and k2.shape == v2.shape == (B, Hkv, Tk2, D)
        fits = fits and Hkv > 0 and H % Hkv == 0
        fits = fits and Tq <= min(Tk, Tk2) and D in WIDTHS
    if not fits or min(w1, w2) < 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v, k2, v2))
        raise ValueError(
            f"q, k, v, k2 and v2 of shapes {shapes} with w1 = {w1} and w2 = {w2} do not fit: need "
            f"(B, H, Tq, D) and four times (B, Hkv, Tk, D) of one dtype, Hkv a divisor of H, Tk at "
            f"least Tq, D one of {WIDTHS}, windows of at least 1"
        )


def attention(q, k, v, k2, v2, w1, w2):
    """Compute causal 2-simplicial attention, from the last Tq positions.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D), all float32, float16 or
    bfloat16, D one of WIDTHS -> o (B, H, Tq, D), lse (B, H, Tq) float32 in natural logarithms, not
    differentiable. Raises ValueError for other inputs, RuntimeError for a second derivative.
    """
    check(q, k, v, k2, v2, w1, w2)
    w1 = min(w1, max(k.shape[2], 1))  # the operator's arguments are int64: cut larger windows
    w2 = min(w2, max(k2.shape[2], 1))
    q, k, v, k2, v2 = (t.contiguous() for t in (q, k, v, k2, v2))
    return simplicial_op(q, k, v, k2, v2, w1, w2)
