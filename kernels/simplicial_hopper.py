"""The forward pass of 2-simplicial attention for Hopper GPUs, in Gluon.

As in simplicial.py, row (i, d) is query i with its second key at position i - d, d < w2. The row
attends to k and v with q_i * k2_{i-d} as its query: S = (q * k2) K^T, P = exp2(S). Its P V is
multiplied by v2_{i-d}, and the rows of each query are added up. There is no running maximum: if
sums leave the range of the dtype, the query gets lse = inf, and repair_kernel computes it again.

Gluon is the level below Triton: a kernel says which warps do what, and what waits for what. One
program per multiprocessor goes from tile to tile (a persistent kernel). Its warpgroups, four warps
each, have different jobs (warp specialization). The loader computes q * k2 and starts the loads of
keys and values. The consumers, two or three warpgroups with 64 rows each, compute attention.

    TMA load    copies a block of a tensor to shared memory in the background
    wgmma       a matrix product on the tensor cores, which a warpgroup starts and later waits for
    mbarrier    a counter of arrivals in shared memory; warps wait until all expected ones have come

For float16 and bfloat16, D = 64 or 128 and most windows; otherwise forward_kernel runs. TFLOP/s in
bfloat16 on one H200, windows 512 and 32, one query head per KV head: 508 at D = 128 and 392 at
D = 64 (forward_kernel: 368 and 328).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) * LN2
ROWS = tl.constexpr(64)  # rows (query, offset) that a consumer computes at once
SMALL_BLOCK = tl.constexpr(16)  # keys of the small block at the start of a window


class Sizes(NamedTuple):
    Tq: gl.tensor  # positions of q; its last one is also the last of k and of k2
    Tk: gl.tensor  # positions of k and v
    Tk2: gl.tensor  # positions of k2 and v2
    w1: gl.tensor  # window in k and v
    w2: gl.tensor  # window in k2 and v2
    tiles: gl.tensor  # per KV head; a tile is the queries that a program computes at once
    heads: gl.tensor  # KV heads in the batch


class Config(NamedTuple):
    """The compile-time arguments. ROWS = QUERIES * OFFSETS, for example 64 = 2 * 32."""

    GROUP: gl.constexpr  # query heads per KV head
    D: gl.constexpr  # head dimension
    QUERIES: gl.constexpr  # per consumer; a tile has CONSUMERS * QUERIES
    OFFSETS: gl.constexpr  # rows per query: the offsets d = 0 ... w2 - 1, padded to a power of two
    BLOCK_N: gl.constexpr  # keys per block
    HAS_SMALL_BLOCK: gl.constexpr  # each tile starts with a block of SMALL_BLOCK keys
    CONSUMERS: gl.constexpr  # warpgroups that compute attention


# --------------------------------------------------------------------------------------------------
# Ring buffers in shared memory. A program numbers the blocks that it loads, for all of its tiles.
# Block b goes to slot b % SLOTS in round b // SLOTS, for example with SLOTS = 3:
#     block    0  1  2 | 3  4  5 | 6  7  8
#     slot     0  1  2 | 0  1  2 | 0  1  2
#     round       0    |    1    |    2
# Each slot has two mbarriers:
#     full     the loader has filled the slot: consumers wait for it before they read
#     empty    all consumers have read the slot: the loader waits for it before the next round
# An mbarrier counts arrivals, those of warps and of completed TMA loads. When all expected ones
# have come, it ends a phase and begins the next: phase 0 in round 0, phase 1 in round 1, ...
# mbarrier.wait(barrier, phase % 2) waits for the end of a phase. For the phase before phase 0,
# which the loader waits for in round 0, it returns at once.


class Ring(NamedTuple):
    slots: gl.shared_memory_descriptor  # [SLOTS, ...], the data
    full: gl.shared_memory_descriptor  # an mbarrier per slot: the data have come
    empty: gl.shared_memory_descriptor  # an mbarrier per slot: the data have been read


@gluon.jit
def make_ring(slots, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Make the Ring of a buffer with SLOTS slots, each of which READERS consumers read."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return Ring(slots, full, empty)


@gluon.jit
def load_block(desc, ring, block, bh, start, size: gl.constexpr, D: gl.constexpr):
    """Wait until the slot of a block is empty, then start the TMA load of `size` keys into it.

    desc: a tensor (B * Hkv, Tk, D). The keys are those of KV head bh from position `start` on.
    """
    SLOTS: gl.constexpr = ring.full.shape[0]
    slot = block % SLOTS
    full = ring.full.index(slot)
    # this round has parity block // SLOTS & 1, and the round before, which we wait for, the other
    mbarrier.wait(ring.empty.index(slot), (block // SLOTS & 1) ^ 1)
    mbarrier.expect(full, size * D * 2)  # how many bytes complete it: 2 per element
    target = ring.slots.index(slot).slice(0, size, 1)  # the first `size` keys of [1, BLOCK_N, D]
    tma.async_copy_global_to_shared(desc, [bh, start, 0], full, target)


@gluon.jit
def wait_full(ring, block):
    """Wait until a block is loaded."""
    SLOTS: gl.constexpr = ring.full.shape[0]
    mbarrier.wait(ring.full.index(block % SLOTS), block // SLOTS & 1)  # phase: of this round


@gluon.jit
def read_slot(ring, block, size: gl.constexpr):
    """Return the first `size` keys of a block, [size, D], in shared memory, where wgmma reads."""
    slot = ring.slots.index(block % ring.full.shape[0])  # [1, BLOCK_N, D]
    return slot.reshape([slot.shape[1], slot.shape[2]]).slice(0, size)


@gluon.jit
def release(ring, block):
    """Tell the loader that this consumer has read a block, whose slot it can fill again."""
    mbarrier.arrive(ring.empty.index(block % ring.full.shape[0]), count=1)


# --------------------------------------------------------------------------------------------------
# Tiles. A query is one query head at one position. The GROUP heads of a KV head are numbered
# position by position, query = position * GROUP + head, so a number counts both. In q,
# (GROUP, Tq, D), each head has its own Tq rows instead. For GROUP = 2 and Tq = 3:
#     query       0  1  2  3  4  5
#     position    0  0  1  1  2  2    query // GROUP
#     head        0  1  0  1  0  1    query % GROUP
#     row of q    0  3  1  4  2  5    head * Tq + position
# A tile has CONSUMERS * QUERIES consecutive queries; each consumer computes QUERIES of these, with
# OFFSETS offsets each: rows (query 0, offset 0), (query 0, offset 1), ..., (query 1, offset 0), ...


class KeyBlocks(NamedTuple):
    """The keys that a tile sees: a small block if it has one, then `count` blocks of BLOCK_N."""

    small_start: gl.tensor  # first key of the small block
    start: gl.tensor  # first key of the other blocks
    count: gl.tensor


class Rows(NamedTuple):
    """The rows (query at position i, offset d) of a consumer, [ROWS] each."""

    position: gl.tensor  # i, of the query in k
    position2: gl.tensor  # i - d, of the second key in k2
    exists: gl.tensor  # the query exists, and the offset is in its window


@gluon.jit
def tile_keys(tile, sizes, config: gl.constexpr):
    """Divide the keys that a tile sees, from first_key to its last position, into KeyBlocks.

        | rest | BLOCK_N | BLOCK_N | ... | BLOCK_N |
        first_key                                  end

    There are as many blocks of BLOCK_N keys as fit into a window. The rest, which not all queries
    see, goes to a small block if it has at most SMALL_BLOCK keys, else to another whole block.
    For example, w1 = 512, BLOCK_N = 64 and queries at 1000 ... 1003: first_key is 1000 - 511 = 489,
    end is 1004, 8 blocks start at 492, and the rest is 489 ... 491, in a small block.
    """
    BLOCK_N: gl.constexpr = config.BLOCK_N
    TILE_QUERIES: gl.constexpr = config.CONSUMERS * config.QUERIES

    # -- positions in k of the tile's first and last query: position in q + Tk - Tq --
    # GROUP consecutive queries, one per head, share a position; those past the end take the last
    first_query = tile * TILE_QUERIES
    last_query = first_query + TILE_QUERIES - 1
    first_position = gl.minimum(first_query // config.GROUP, sizes.Tq - 1) + sizes.Tk - sizes.Tq
    last_position = gl.minimum(last_query // config.GROUP, sizes.Tq - 1) + sizes.Tk - sizes.Tq
    end = last_position + 1

    # -- blocks that fit into a window, and the keys before them --
    count = gl.maximum(gl.minimum(sizes.w1, end), 0) // BLOCK_N
    first_key = gl.maximum(first_position - sizes.w1 + 1, 0)
    rest = end - count * BLOCK_N - first_key

    # -- place the rest: in the small block, or in one more block of BLOCK_N --
    use_small = (rest > 0) & (rest <= SMALL_BLOCK) & (count > 0) & config.HAS_SMALL_BLOCK
    # an unused small block is put before position 0, where TMA reads 0 and the mask hides it
    small_start = gl.where(use_small, end - count * BLOCK_N - SMALL_BLOCK, -SMALL_BLOCK)
    needs_block = ((rest > 0) & (use_small == 0)) | (count == 0)  # a tile has at least one block
    count += needs_block.to(gl.int32)
    return KeyBlocks(small_start, end - count * BLOCK_N, count)


@gluon.jit
def consumer_rows(first_query, row, sizes, config: gl.constexpr):
    """Return the Rows of a consumer whose first query is first_query. row: 0 ... ROWS - 1"""
    # OFFSETS = 32: rows 0 ... 31 are the first query with offsets 0 ... 31, rows 32 ... the second
    query = first_query + row // config.OFFSETS
    offset = row % config.OFFSETS
    # positions in q (t), in k (i) and in k2 (i2); rows past the end repeat the last position
    t = gl.minimum(query // config.GROUP, sizes.Tq - 1)
    i2 = t + sizes.Tk2 - sizes.Tq  # i = t + sizes.Tk - sizes.Tq
    exists = (query < sizes.Tq * config.GROUP) & (offset < sizes.w2) & (offset <= i2)
    return Rows(t + sizes.Tk - sizes.Tq, i2 - offset, exists)


@gluon.jit
def query_row(query, Tq, GROUP: gl.constexpr):
    """Return head * Tq + position, the row of query = position * GROUP + head in q (GROUP, Tq)."""
    # GROUP = 2, Tq = 3: queries 0 1 2 3 4 5 (heads 0 1 0 1 0 1) are rows 0 3 1 4 2 5
    return query % GROUP * Tq + query // GROUP


# --------------------------------------------------------------------------------------------------
# Loader


@gluon.jit
def store_qk2(slot, q_ptr, k2_ptr, qk_scale, first_query, sizes, config: gl.constexpr):
    """Store q_i * k2_{i-d} * qk_scale of a consumer's rows (query i, offset d): slot [ROWS, D]."""
    GROUP: gl.constexpr = config.GROUP
    D: gl.constexpr = config.D
    OFFSETS: gl.constexpr = config.OFFSETS
    # which thread holds which element of [OFFSETS, D]
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 8],  # elements of a thread: 8 channels of a row, 16 bytes
        [256 // D, D // 8],  # threads of a warp: 256 // D rows of D // 8 threads each
        [4, 1],  # warps: four, one below the other
        [1, 0],  # order: channels first
    )
    offset = gl.arange(0, OFFSETS, gl.SliceLayout(1, LAYOUT))  # [OFFSETS], a column in LAYOUT
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))  # channels [D], a row in LAYOUT

    # one query after the other: then q is read once per query, not once per row
    for n in gl.static_range(config.QUERIES):
        query = gl.minimum(first_query + n, sizes.Tq * GROUP - 1)
        i2 = query // GROUP + sizes.Tk2 - sizes.Tq  # position of the query in k2
        exists = (offset < sizes.w2) & (offset <= i2) & (first_query + n < sizes.Tq * GROUP)
        q = gl.load(q_ptr + query_row(query, sizes.Tq, GROUP) * D + offs_d)  # [D]
        q = q.to(gl.float32) * qk_scale
        k2_ptrs = k2_ptr + (i2 - offset)[:, None] * D + offs_d[None, :]
        k2 = gl.load(k2_ptrs, mask=exists[:, None], other=0.0).to(gl.float32)  # [OFFSETS, D]
        qk2 = (q[None, :] * k2).to(q_ptr.dtype.element_ty)
        slot.slice(n * OFFSETS, OFFSETS).store(qk2)  # rows n * OFFSETS ... of the slot


@gluon.jit
def loader(
    config: gl.constexpr,
    q_ptr, k2_ptr, k_blocks, v_blocks, k_small, v_small, k_ring, v_ring, qk2_ring, sizes, scale,
):  # fmt: skip
    """Load what the consumers need for all tiles of this program, waiting only for empty slots.

    k_blocks, v_blocks, k_small, v_small: TMA descriptors, for blocks of BLOCK_N and SMALL_BLOCK.
    k_ring, v_ring: a slot per block in flight. qk2_ring: a slot per consumer, filled once per tile.
    """
    BLOCK_N: gl.constexpr = config.BLOCK_N
    block = 0  # number of the block, over all tiles of this program
    parity = 1  # phase % 2 of qk2_ring.empty to wait for: 1, which returns at once, then 0, 1, ...
    # the tiles of all heads, numbered in order: of 132 programs, program 5 has 5, 137, 269, ...
    for pid in range(gl.program_id(0), sizes.tiles * sizes.heads, gl.num_programs(0)):
        bh = pid // sizes.tiles  # KV head in the batch
        tile = pid % sizes.tiles

        # -- q * k2 of each consumer, once it has read that of the tile before --
        # q (GROUP, Tq, D) and k2 (Tk2, D) of this head
        q = q_ptr + bh.to(gl.int64) * config.GROUP * sizes.Tq * config.D
        k2 = k2_ptr + bh.to(gl.int64) * sizes.Tk2 * config.D
        for consumer_id in gl.static_range(config.CONSUMERS):
            first_query = (tile * config.CONSUMERS + consumer_id) * config.QUERIES
            mbarrier.wait(qk2_ring.empty.index(consumer_id), parity)
            slot = qk2_ring.slots.index(consumer_id)
            store_qk2(slot, q, k2, scale * LOG2E, first_query, sizes, config)
            mbarrier.arrive(qk2_ring.full.index(consumer_id), count=1)
        parity ^= 1

        # -- keys and values of each block, once all consumers have read its slot --
        keys = tile_keys(tile, sizes, config)
        if config.HAS_SMALL_BLOCK:
            load_block(k_small, k_ring, block, bh, keys.small_start, SMALL_BLOCK, config.D)
            load_block(v_small, v_ring, block, bh, keys.small_start, SMALL_BLOCK, config.D)
            block += 1
        for b in range(keys.count):
            start = keys.start + b * BLOCK_N
            load_block(k_blocks, k_ring, block, bh, start, BLOCK_N, config.D)
            load_block(v_blocks, v_ring, block, bh, start, BLOCK_N, config.D)
            block += 1


# --------------------------------------------------------------------------------------------------
# Consumer. Per block of keys it computes S = (q * k2) K^T, P = exp2(S) and P V. exp2 runs on other
# units than the tensor cores, at the same time (time goes from left to right):
#     tensor cores     S of block 1 | P V of block 0 | S of block 2 | P V of block 1 | ...
#     other units                   | P of block 1   |              | P of block 2   | ...


@gluon.constexpr_function
def wgmma_layout(columns):
    """Return which thread holds which element of a wgmma result, [ROWS, columns]."""
    # version 3 is Hopper's; each of the four warps has 16 of the 64 rows, [16, columns]
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


class Inputs(NamedTuple):
    """What a consumer needs for every block of keys of a tile."""

    qk2: gl.tensor  # q * k2 of its rows, [ROWS, D], in registers
    position: gl.tensor  # of its rows in k, [ROWS]
    w1: gl.tensor  # window in k and v
    k_ring: Ring
    v_ring: Ring


@gluon.jit
def start_scores(inputs, block, size: gl.constexpr):
    """Wait for the keys of a block, then start S = (q * k2) K^T, [ROWS, size]."""
    LAYOUT: gl.constexpr = wgmma_layout(size)
    wait_full(inputs.k_ring, block)
    k = read_slot(inputs.k_ring, block, size)  # [size, D]
    # make qk2 the left operand (0) of a product with `size` columns; no register moves for that
    qk2 = gl.convert_layout(inputs.qk2, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)
    zeros = gl.zeros([ROWS, size], gl.float32, LAYOUT)
    return warpgroup_mma(qk2, k.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def exponentials(s, inputs, start, is_partial: gl.constexpr):
    """Return P = exp2(S) of a block, [ROWS, keys], and its sum over the keys, [ROWS].

    start: the position of the block's first key. is_partial: some row does not see the whole block.
    There P is 0 where row i does not see key j, that is unless i - w1 < j <= i.
    """
    if is_partial:
        # i [ROWS, 1]: the position of each row's query. j [1, keys]: the position of each key. A
        # block may start before position 0, where there is no key.
        i = gl.convert_layout(inputs.position, gl.SliceLayout(1, s.type.layout))[:, None]
        j = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        is_visible = (j <= i) & (j > gl.maximum(i - inputs.w1, -1))
        s = gl.where(is_visible, s, -float("inf"))
    p = gl.exp2(s)
    return p, gl.sum(p, 1)


@gluon.jit
def finish_block(
    s, p, acc, l_i, inputs, block, start,
    previous_size: gl.constexpr, use_acc: gl.constexpr, is_partial: gl.constexpr,
):  # fmt: skip
    """Compute P of a block from its S while P V of the previous block is added to acc.

    s: S of this block, already started. p: P of the previous block, which has previous_size keys.
    acc [ROWS, D]: sum of P V. l_i [ROWS]: sum of P. use_acc: False if acc is still empty.
    Returns P of this block, acc, l_i.
    """
    # start P V, then wait until only 1 product is unfinished: then S, which started first, is done
    v = read_slot(inputs.v_ring, block - 1, previous_size)
    acc = warpgroup_mma(p, v, acc, use_acc=use_acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    release(inputs.k_ring, block)

    # compute P = exp2(S) while P V runs
    p_next, l_next = exponentials(s, inputs, start, is_partial)
    wait_full(inputs.v_ring, block)  # keeps the compiler from moving exp2 behind the next wait

    # wait for P V, which has read p and v
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    release(inputs.v_ring, block - 1)
    p = gl.convert_layout(p_next.to(p.dtype), p.type.layout)
    return p, acc, l_i + l_next


@gluon.jit
def store_output(acc, l_i, v2_ptr, o_ptr, lse_ptr, bh, first_query, sizes, config: gl.constexpr):
    """Compute o and lse of a consumer's queries from its rows, and store them.

    acc [ROWS, D]: sum of P V. l_i [ROWS]: sum of P. A query with a sum out of range gets lse = inf.
    """
    D: gl.constexpr = config.D
    QUERIES: gl.constexpr = config.QUERIES
    OFFSETS: gl.constexpr = config.OFFSETS
    ACC_LAYOUT: gl.constexpr = acc.type.layout
    # of o [QUERIES, D]: a thread has D // 64 channels, a warp D // 2 channels of a row
    O_LAYOUT: gl.constexpr = gl.BlockedLayout([1, D // 64], [1, 32], [2, 2], [1, 0])
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    # allowed range of a row's sum of P, as in forward_queries
    LEAST: gl.constexpr = 1.0 if dtype == gl.float16 else 2.0**-60
    MOST: gl.constexpr = 2.0**15 if dtype == gl.float16 else 2.0**60

    # -- multiply the row (i, d) by v2_{i-d} --
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC_LAYOUT))  # [ROWS], a column in ACC_LAYOUT
    rows = consumer_rows(first_query, row, sizes, config)
    offs_d = gl.arange(0, D, gl.SliceLayout(0, ACC_LAYOUT))[None, :]  # channels, [1, D]
    v2_ptrs = v2_ptr + bh.to(gl.int64) * sizes.Tk2 * D + rows.position2[:, None] * D + offs_d
    acc *= gl.load(v2_ptrs, mask=rows.exists[:, None], other=0.0).to(gl.float32)

    # -- replace sums out of range by NaN, which reaches l_q below; 0 where a row does not exist --
    l_i = gl.convert_layout(l_i, gl.SliceLayout(1, ACC_LAYOUT))
    in_range = (l_i > LEAST) & (l_i < MOST)
    l_i = gl.where(rows.exists, gl.where(in_range, l_i, float("nan")), 0.0)

    # -- o = (sum of a query's rows of acc) / l_q, where l_q is the sum of their l_i --
    o = gl.convert_layout(gl.sum(acc.reshape([QUERIES, OFFSETS, D]), 1), O_LAYOUT)  # [QUERIES, D]
    l_q = gl.sum(l_i.reshape([QUERIES, OFFSETS]), 1)
    l_q = gl.convert_layout(l_q, gl.SliceLayout(1, O_LAYOUT))  # [QUERIES]
    o = (o / gl.where(l_q > 0.0, l_q, 1.0)[:, None]).to(dtype)
    # lse = log(l_q), -inf past the last query, and inf, for repair_kernel, where l_q is NaN
    lse = gl.where(l_q > 0.0, gl.log2(l_q) * LN2, -float("inf"))
    lse = gl.where(l_q == l_q, lse, float("inf"))  # noqa: PLR0124, NaN

    # -- store --
    query = first_query + gl.arange(0, QUERIES, gl.SliceLayout(1, O_LAYOUT))
    mask = query < config.GROUP * sizes.Tq
    # row of the query in q and o, (B * Hkv, GROUP, Tq)
    row = bh.to(gl.int64) * config.GROUP * sizes.Tq + query_row(query, sizes.Tq, config.GROUP)
    gl.store(lse_ptr + row, lse, mask=mask)
    offs = row[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))[None, :]
    gl.store(o_ptr + offs, o, mask=mask[:, None])


@gluon.jit
def consumer(
    config: gl.constexpr, consumer_id: gl.constexpr,
    v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, qk2_ring, sizes,
):  # fmt: skip
    """Compute o and lse of QUERIES queries of each tile of this program. See the sketch above."""
    BLOCK_N: gl.constexpr = config.BLOCK_N
    S_LAYOUT: gl.constexpr = wgmma_layout(BLOCK_N)  # of S, [ROWS, BLOCK_N]
    ACC_LAYOUT: gl.constexpr = wgmma_layout(config.D)  # of P V, [ROWS, D]
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)  # of P, a left operand (0)
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    row = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))  # [ROWS], a column in S_LAYOUT
    block = 0  # number of the block, over all tiles of this program
    parity = 0  # phase % 2 of qk2_ring.full to wait for: 0 for the first tile, then 1, 0, ...
    # the tiles of all heads, numbered in order: of 132 programs, program 5 has 5, 137, 269, ...
    for pid in range(gl.program_id(0), sizes.tiles * sizes.heads, gl.num_programs(0)):
        bh = pid // sizes.tiles  # KV head in the batch
        tile = pid % sizes.tiles
        first_query = (tile * config.CONSUMERS + consumer_id) * config.QUERIES
        keys = tile_keys(tile, sizes, config)
        position = consumer_rows(first_query, row, sizes, config).position

        # -- wait for q * k2 and copy it to registers --
        mbarrier.wait(qk2_ring.full.index(consumer_id), parity)
        qk2 = qk2_ring.slots.index(consumer_id).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
        release(qk2_ring, consumer_id)  # its slot has its own number
        parity ^= 1
        inputs = Inputs(qk2, position, sizes.w1, k_ring, v_ring)
        acc = gl.zeros([ROWS, config.D], gl.float32, ACC_LAYOUT)

        # -- P of the first block of BLOCK_N keys, and P V of the small block if there is one --
        if config.HAS_SMALL_BLOCK:
            # start S of both blocks, then wait until only one product is unfinished
            s_small = start_scores(inputs, block, SMALL_BLOCK)
            block += 1
            s_first = start_scores(inputs, block, BLOCK_N)
            s_small = warpgroup_mma_wait(1, deps=[s_small])
            release(k_ring, block - 1)
            p, l_i = exponentials(s_small, inputs, keys.small_start, is_partial=True)
            l_i = gl.convert_layout(l_i, gl.SliceLayout(1, S_LAYOUT))
            p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            wait_full(v_ring, block - 1)
            p, acc, l_i = finish_block(
                s_first, p, acc, l_i, inputs, block, keys.start,
                SMALL_BLOCK, use_acc=False, is_partial=True,  # SMALL_BLOCK keys: the block before
            )  # fmt: skip
        else:
            s_first = start_scores(inputs, block, BLOCK_N)
            s_first = warpgroup_mma_wait(0, deps=[s_first])
            release(k_ring, block)
            p, l_i = exponentials(s_first, inputs, keys.start, is_partial=True)
            wait_full(v_ring, block)
            p = gl.convert_layout(p.to(dtype), P_LAYOUT)

        # -- blocks that all rows see: P of each, and P V of the block before, of BLOCK_N keys --
        for b in range(1, keys.count - 1):
            block += 1
            start = keys.start + b * BLOCK_N
            s = start_scores(inputs, block, BLOCK_N)
            p, acc, l_i = finish_block(
                s, p, acc, l_i, inputs, block, start, BLOCK_N, use_acc=True, is_partial=False
            )

        # -- the last block, where rows do not see the keys after their query --
        if keys.count > 1:
            block += 1
            start = keys.start + (keys.count - 1) * BLOCK_N
            s = start_scores(inputs, block, BLOCK_N)
            p, acc, l_i = finish_block(
                s, p, acc, l_i, inputs, block, start, BLOCK_N, use_acc=True, is_partial=True
            )

        # -- P V of the last block --
        acc = warpgroup_mma(p, read_slot(v_ring, block, BLOCK_N), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        release(v_ring, block)
        block += 1
        store_output(acc, l_i, v2_ptr, o_ptr, lse_ptr, bh, first_query, sizes, config)


# --------------------------------------------------------------------------------------------------
# Kernel and launch


@gluon.jit(do_not_specialize=["Tq", "Tk", "Tk2", "w1", "w2", "tiles", "heads"])
def hopper_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_blocks, v_blocks, k_small, v_small,  # TMA descriptors of (B * Hkv, Tk, D)
    k2_ptr, v2_ptr,  # (B, Hkv, Tk2, D)
    o_ptr, lse_ptr,  # (B, H, Tq, D), (B, H, Tq)
    Tq, Tk, Tk2, w1, w2, scale, tiles, heads,
    GROUP: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, OFFSETS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_SMALL_BLOCK: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,  # per thread
):  # fmt: skip
    """Compute o and lse of attention(q, k, v, k2, v2). Grid: one program per multiprocessor."""
    sizes = Sizes(Tq, Tk, Tk2, w1, w2, tiles, heads)
    config: gl.constexpr = Config(GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_SMALL_BLOCK, CONSUMERS)

    # -- ring buffers: for STAGES blocks of keys and of values, and for q * k2 of each consumer --
    # A slot for keys is [1, BLOCK_N, D], as TMA copies BLOCK_N keys of 1 head of (B * Hkv, Tk, D).
    # All consumers read it. A slot for q * k2 is [ROWS, D], and only its own consumer reads it.
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, D], k_blocks.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, D], v_blocks.layout)
    qk2_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)  # as key_layout, with two dimensions
    qk2_slots = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], qk2_layout)
    k_ring = make_ring(k_slots, STAGES, CONSUMERS)  # STAGES slots with CONSUMERS readers each
    v_ring = make_ring(v_slots, STAGES, CONSUMERS)
    qk2_ring = make_ring(qk2_slots, CONSUMERS, 1)  # CONSUMERS slots with 1 reader each

    # -- start the warpgroups: for each, a function and its arguments --
    # Consumer 0 runs in the program's own four warps. For the others, in the same order, two lists
    # at the end of the call have the number of warps and the registers per thread.
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (config, 0, v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, qk2_ring, sizes)),
            (consumer, (config, 1, v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, qk2_ring, sizes)),
            (loader, (config, q_ptr, k2_ptr, k_blocks, v_blocks, k_small, v_small,
                      k_ring, v_ring, qk2_ring, sizes, scale)),
        ], [4, 4], [CONSUMER_REGISTERS, LOADER_REGISTERS])  # warps, registers: consumer 1, loader
    else:
        gl.warp_specialize([
            (consumer, (config, 0, v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, qk2_ring, sizes)),
            (consumer, (config, 1, v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, qk2_ring, sizes)),
            (consumer, (config, 2, v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, qk2_ring, sizes)),
            (loader, (config, q_ptr, k2_ptr, k_blocks, v_blocks, k_small, v_small,
                      k_ring, v_ring, qk2_ring, sizes, scale)),
        ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS])
    # fmt: on


def key_layout():
    """Return the layout of keys and values in shared memory that TMA writes and wgmma reads."""
    # swizzle: in each 128 bytes, the 16-byte parts are permuted, which avoids bank conflicts
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


CONFIGS = {  # by head dimension D; STAGES: slots of k_ring and v_ring; registers per thread
    128: dict(BLOCK_N=64, STAGES=5, CONSUMERS=2, CONSUMER_REGISTERS=208, LOADER_REGISTERS=88),
    64: dict(BLOCK_N=64, STAGES=8, CONSUMERS=3, CONSUMER_REGISTERS=152, LOADER_REGISTERS=56),
}


@functools.lru_cache(1024)
def plan(dtype, device, group, D, w1, w2):
    """Return the compile-time arguments of hopper_kernel, or None if it cannot run."""
    if dtype == torch.float32 or D not in CONFIGS:
        return None
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    config = CONFIGS[D]
    # all offsets of a query are rows of one consumer, as there are no chunks of offsets here
    offsets = min(32, triton.next_power_of_2(w2))
    if offsets < 16 or w2 > offsets:
        return None
    queries = ROWS.value // offsets  # of a consumer
    tile_queries = config["CONSUMERS"] * queries

    # The queries of a tile have up to 1 + extra_positions positions (3 for a tile of 6 in groups of
    # 4: 0 1 1 1 1 2), so their windows start at as many different keys. Keys that only some queries
    # see must be masked. At the start of a window, consumers mask one block only, of SMALL_BLOCK or
    # BLOCK_N keys, so the partial_keys before the whole blocks must fit into it.
    extra_positions = 0
    if group % tile_queries != 0:
        extra_positions = (tile_queries - 2) // group + 1
    partial_keys = w1 % config["BLOCK_N"] + extra_positions
    if partial_keys > config["BLOCK_N"]:
        return None
    has_small_block = 0 < partial_keys <= SMALL_BLOCK.value
    sizes = {"GROUP": group, "D": D, "QUERIES": queries, "OFFSETS": offsets}
    return {**config, **sizes, "HAS_SMALL_BLOCK": has_small_block}


def launch(options, q, k, v, k2, v2, o, lse, sizes):
    """Run hopper_kernel. It writes o and lse, which is inf for the queries left to repair_kernel.

    options: from plan. sizes: Tq, Tk, Tk2, w1, w2. Raises RuntimeError if it does not build.
    """
    D = q.shape[3]
    # TMA descriptors of k and v, with whole and with small blocks
    layout = key_layout()
    descriptors = []
    for size in (options["BLOCK_N"], SMALL_BLOCK.value):
        for t in (k, v):
            heads = t.view(-1, t.shape[2], D)  # (B * Hkv, Tk, D)
            descriptors.append(TensorDescriptor.from_tensor(heads, [1, size, D], layout))

    # one program per multiprocessor, unless there are fewer tiles
    heads = k.shape[0] * k.shape[1]
    queries = options["GROUP"] * q.shape[2]  # per KV head
    tiles = triton.cdiv(queries, options["CONSUMERS"] * options["QUERIES"])
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(multiprocessors, tiles * heads)
    tensors = q, *descriptors, k2, v2, o, lse
    try:
        hopper_kernel[(programs,)](*tensors, *sizes, D**-0.5, tiles, heads, **options, num_warps=4)
    except Exception as error:  # Gluon changes from one Triton to the next
        raise RuntimeError(
            f"hopper_kernel fails with Triton {triton.__version__}: install Triton 3.6 or 3.7, or "
            f"remove kernels/simplicial_hopper.py to run the slower forward_kernel instead"
        ) from error
