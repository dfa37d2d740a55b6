"""The forward pass of 2-simplicial attention for Hopper, in Gluon: warp-specialized and persistent.

For 16 bits, D = 64 or 128 and most windows; kernels/simplicial.py runs its forward_kernel
elsewhere. Gluon is the level below Triton, where layouts, TMA copies and barriers are explicit. In
bfloat16 with windows 512 and 32 on one H200: 508 TFLOP/s at D = 128 and 392 at D = 64, where
forward_kernel reaches 368 and 328 (one query head per KV head).

One program per multiprocessor goes from tile to tile. Four of its warps, the loader, multiply q by
k2 and fetch blocks of keys and values by TMA into ring buffers in shared memory. The others are
CONSUMERS groups of four warps, each with 64 rows: QUERIES queries with OFFSETS offsets each. A
consumer starts the scores of one block on the tensor cores, then P V of the block before, and
computes exp2 of the scores while P V runs. Barriers say that a slot of a ring buffer is full
(loaded) or empty (used).

There is no running maximum, as in forward_kernel: a query whose sums leave the range of the dtype
gets lse = inf and is left to repair_kernel.
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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EDGE = tl.constexpr(16)  # keys of the small block at the start of a window


class Sizes(NamedTuple):
    Tq: gl.tensor  # positions of q, which are the last
    Tk: gl.tensor  # positions of k and v
    Tk2: gl.tensor  # positions of k2 and v2
    w1: gl.tensor  # window in k and v
    w2: gl.tensor  # window in k2 and v2
    tiles: gl.tensor  # per KV head
    heads: gl.tensor  # KV heads in the batch


class Ring(NamedTuple):
    """A ring buffer in shared memory: block b is in slot b % STAGES.

    Each slot has two barriers, for full and for empty; their phase flips at each round of the ring.
    """

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Span(NamedTuple):
    """The keys that a tile sees: a small block of EDGE keys, then whole blocks."""

    start: gl.tensor  # first key of the whole blocks
    blocks: gl.tensor  # how many
    edge: gl.tensor  # first key of the small block


class Rows(NamedTuple):
    position: gl.tensor  # of the query in k, i
    position2: gl.tensor  # of the offset in k2, i - d
    exists: gl.tensor


@gluon.jit
def tile_span(
    tile, sizes,
    GROUP: gl.constexpr, QUERIES: gl.constexpr, BLOCK_N: gl.constexpr, HAS_EDGE: gl.constexpr,
):  # fmt: skip
    """Divide the keys of a tile into blocks that end at its last position.

    The keys before the w1 // BLOCK_N whole blocks go to the small block if they are at most EDGE,
    else to one more whole block.
    """
    Tq = sizes.Tq
    Tk = sizes.Tk
    first_position = gl.minimum(tile * QUERIES // GROUP, Tq - 1) + Tk - Tq
    last_position = gl.minimum((tile * QUERIES + QUERIES - 1) // GROUP, Tq - 1) + Tk - Tq
    end = last_position + 1
    blocks = gl.maximum(gl.minimum(sizes.w1, end), 0) // BLOCK_N
    rest = end - blocks * BLOCK_N - gl.maximum(first_position - sizes.w1 + 1, 0)
    use_edge = (rest > 0) & (rest <= EDGE) & (blocks > 0) & HAS_EDGE
    # an unused small block is put before position 0, where TMA reads 0 and the mask hides it
    edge = gl.where(use_edge, end - blocks * BLOCK_N - EDGE, -EDGE)
    blocks += (((rest > 0) & (use_edge == 0)) | (blocks == 0)).to(gl.int32)
    return Span(end - blocks * BLOCK_N, blocks, edge)


@gluon.jit
def query_row(query, Tq, GROUP: gl.constexpr):
    """Row in q, (GROUP, Tq), of a query numbered position by position."""
    return query % GROUP * Tq + query // GROUP


@gluon.jit
def consumer_rows(
    part, row, sizes, GROUP: gl.constexpr, QUERIES: gl.constexpr, OFFSETS: gl.constexpr
):
    """Rows of one consumer, as tile_rows in simplicial.py. part: tile * CONSUMERS + consumer_id"""
    query = part * QUERIES + row // OFFSETS
    step = gl.minimum(query // GROUP, sizes.Tq - 1)
    offset = row % OFFSETS
    i2 = step + sizes.Tk2 - sizes.Tq
    exists = (query < sizes.Tq * GROUP) & (offset < sizes.w2) & (offset <= i2)
    return Rows(step + sizes.Tk - sizes.Tq, i2 - offset, exists)


# --------------------------------------------------------------------------------------------------
# Loader


@gluon.jit
def load_block(desc, ring, block, bh, start, size: gl.constexpr, D: gl.constexpr):
    """Fetch `size` keys into the slot of a block, once it is empty. The copy arrives at `full`."""
    STAGES: gl.constexpr = ring.full.shape[0]
    slot = block % STAGES
    mbarrier.wait(ring.empty.index(slot), (block // STAGES & 1) ^ 1)
    mbarrier.expect(ring.full.index(slot), size * D * 2)
    target = ring.slots.index(slot).slice(0, size, 1)
    tma.async_copy_global_to_shared(desc, [bh, start, 0], ring.full.index(slot), target)


@gluon.jit
def make_rows(
    slot, q_ptr, k2_ptr, qk_scale, part, sizes,
    GROUP: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, OFFSETS: gl.constexpr,
):  # fmt: skip
    """Store q_i * k2_{i-d} * qk_scale of 64 rows in shared memory, reading each query once."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    offset = gl.arange(0, OFFSETS, gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    for n in gl.static_range(QUERIES):
        query = gl.minimum(part * QUERIES + n, sizes.Tq * GROUP - 1)
        i2 = query // GROUP + sizes.Tk2 - sizes.Tq
        exists = (offset < sizes.w2) & (offset <= i2) & (part * QUERIES + n < sizes.Tq * GROUP)
        q = gl.load(q_ptr + query_row(query, sizes.Tq, GROUP) * D + offs_d)  # [D]
        q = q.to(gl.float32) * qk_scale
        k2_ptrs = k2_ptr + (i2 - offset)[:, None] * D + offs_d[None, :]
        k2 = gl.load(k2_ptrs, mask=exists[:, None], other=0.0).to(gl.float32)  # [OFFSETS, D]
        qk2 = (q[None, :] * k2).to(q_ptr.dtype.element_ty)
        slot.slice(n * OFFSETS, OFFSETS).store(qk2)


@gluon.jit
def loader(
    q_ptr, k2_ptr, k_blocks, v_blocks, k_edges, v_edges, k_ring, v_ring, row_ring, sizes, scale,
    GROUP: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, OFFSETS: gl.constexpr,
    BLOCK_N: gl.constexpr, HAS_EDGE: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    block = 0  # blocks of all tiles so far
    phase = 1  # of the barriers of row_ring
    for pid in range(gl.program_id(0), sizes.tiles * sizes.heads, gl.num_programs(0)):
        bh = pid // sizes.tiles
        tile = pid % sizes.tiles

        # -- rows of each consumer --
        q = q_ptr + bh.to(gl.int64) * GROUP * sizes.Tq * D
        k2 = k2_ptr + bh.to(gl.int64) * sizes.Tk2 * D
        for consumer_id in gl.static_range(CONSUMERS):
            mbarrier.wait(row_ring.empty.index(consumer_id), phase)
            part = tile * CONSUMERS + consumer_id
            slot = row_ring.slots.index(consumer_id)
            make_rows(slot, q, k2, scale * LOG2E, part, sizes, GROUP, D, QUERIES, OFFSETS)
            mbarrier.arrive(row_ring.full.index(consumer_id), count=1)
        phase ^= 1

        # -- keys and values --
        span = tile_span(tile, sizes, GROUP, CONSUMERS * QUERIES, BLOCK_N, HAS_EDGE)
        if HAS_EDGE:
            load_block(k_edges, k_ring, block, bh, span.edge, EDGE, D)
            load_block(v_edges, v_ring, block, bh, span.edge, EDGE, D)
            block += 1
        for b in range(span.blocks):
            load_block(k_blocks, k_ring, block, bh, span.start + b * BLOCK_N, BLOCK_N, D)
            load_block(v_blocks, v_ring, block, bh, span.start + b * BLOCK_N, BLOCK_N, D)
            block += 1


# --------------------------------------------------------------------------------------------------
# Consumer


@gluon.jit
def wait_full(ring, block):
    STAGES: gl.constexpr = ring.full.shape[0]
    mbarrier.wait(ring.full.index(block % STAGES), block // STAGES & 1)


@gluon.jit
def release(ring, block):
    mbarrier.arrive(ring.empty.index(block % ring.full.shape[0]), count=1)


@gluon.jit
def slot_of(ring, block, size: gl.constexpr):
    """The first `size` rows of the slot of a block, [size, D]"""
    slot = ring.slots.index(block % ring.full.shape[0])  # [1, BLOCK_N, D]
    return slot.reshape([slot.shape[1], slot.shape[2]]).slice(0, size)


@gluon.jit
def start_scores(qk2, k_ring, block, size: gl.constexpr):
    """Start S = qk2 K^T of a block on the tensor cores. [64, size]"""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, size, 16])
    wait_full(k_ring, block)
    k = slot_of(k_ring, block, size)
    qk2 = gl.convert_layout(qk2, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)
    zeros = gl.zeros([64, size], gl.float32, LAYOUT)
    return warpgroup_mma(qk2, k.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def exponentials(s, position, start, w1, is_partial: gl.constexpr):
    """-> p = exp2(s), 0 where a row does not see the key, and the sum of p over the keys"""
    if is_partial:
        i = gl.convert_layout(position, gl.SliceLayout(1, s.type.layout))[:, None]
        j = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        s = gl.where((j <= i) & (j > gl.maximum(i - w1, -1)), s, -float("inf"))
    p = gl.exp2(s)
    return p, gl.sum(p, 1)


@gluon.jit
def attend_block(
    qk2, p, acc, l_i, block, k_ring, v_ring, position, start, w1,
    BLOCK_N: gl.constexpr, is_partial: gl.constexpr,
):  # fmt: skip
    """Add P V of the block before to acc, while computing p of this block. -> p, acc, l_i"""
    s = start_scores(qk2, k_ring, block, BLOCK_N)
    acc = warpgroup_mma(p, slot_of(v_ring, block - 1, BLOCK_N), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    release(k_ring, block)
    p_next, l_next = exponentials(s, position, start, w1, is_partial)
    wait_full(v_ring, block)  # keeps the compiler from moving exp2 behind the next wait
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    release(v_ring, block - 1)
    return gl.convert_layout(p_next.to(p.dtype), p.type.layout), acc, l_i + l_next


@gluon.jit
def consumer(
    v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, row_ring, sizes, consumer_id: gl.constexpr,
    GROUP: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, OFFSETS: gl.constexpr,
    BLOCK_N: gl.constexpr, HAS_EDGE: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    OUT: gl.constexpr = gl.BlockedLayout([1, D // 64], [1, 32], [2, 2], [1, 0])
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    LEAST: gl.constexpr = 1.0 if dtype == gl.float16 else 2.0**-60  # as in forward_queries
    MOST: gl.constexpr = 2.0**15 if dtype == gl.float16 else 2.0**60
    score_row = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    acc_row = gl.arange(0, 64, gl.SliceLayout(1, ACC))
    w1 = sizes.w1
    block = 0  # blocks of all tiles so far
    phase = 0  # of the barriers of row_ring
    for pid in range(gl.program_id(0), sizes.tiles * sizes.heads, gl.num_programs(0)):
        bh = pid // sizes.tiles
        part = pid % sizes.tiles * CONSUMERS + consumer_id
        span = tile_span(pid % sizes.tiles, sizes, GROUP, CONSUMERS * QUERIES, BLOCK_N, HAS_EDGE)
        rows = consumer_rows(part, score_row, sizes, GROUP, QUERIES, OFFSETS)
        position = rows.position

        # -- load the rows into registers --
        mbarrier.wait(row_ring.full.index(consumer_id), phase)
        qk2 = row_ring.slots.index(consumer_id).load(gl.DotOperandLayout(0, SCORES, 2))  # [64, D]
        mbarrier.arrive(row_ring.empty.index(consumer_id), count=1)
        phase ^= 1
        acc = gl.zeros([64, D], gl.float32, ACC)

        # -- p of the first whole block, after P V of the small block if there is one --
        if HAS_EDGE:
            s_edge = start_scores(qk2, k_ring, block, EDGE)
            block += 1
            s = start_scores(qk2, k_ring, block, BLOCK_N)
            s_edge = warpgroup_mma_wait(1, deps=[s_edge])
            release(k_ring, block - 1)
            p, l_i = exponentials(s_edge, position, span.edge, w1, True)
            l_i = gl.convert_layout(l_i, gl.SliceLayout(1, SCORES))
            p = gl.convert_layout(p.to(dtype), P)
            wait_full(v_ring, block - 1)
            v = slot_of(v_ring, block - 1, EDGE)
            acc = warpgroup_mma(p, v, acc, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            release(k_ring, block)
            p_next, l_next = exponentials(s, position, span.start, w1, True)
            l_i += l_next
            wait_full(v_ring, block)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            release(v_ring, block - 1)
        else:
            s = warpgroup_mma_wait(0, deps=[start_scores(qk2, k_ring, block, BLOCK_N)])
            release(k_ring, block)
            p_next, l_i = exponentials(s, position, span.start, w1, True)
            wait_full(v_ring, block)
        p = gl.convert_layout(p_next.to(dtype), P)

        # -- blocks that all rows see, then the last one --
        for b in range(1, span.blocks - 1):
            block += 1
            start = span.start + b * BLOCK_N
            p, acc, l_i = attend_block(
                qk2, p, acc, l_i, block, k_ring, v_ring, position, start, w1, BLOCK_N, False
            )
        if span.blocks > 1:
            block += 1
            last = span.start + (span.blocks - 1) * BLOCK_N
            p, acc, l_i = attend_block(
                qk2, p, acc, l_i, block, k_ring, v_ring, position, last, w1, BLOCK_N, True
            )
        acc = warpgroup_mma(p, slot_of(v_ring, block, BLOCK_N), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        release(v_ring, block)
        block += 1

        # -- multiply by v2, sum the rows of each query; no rescaling, as there is no maximum --
        rows = consumer_rows(part, acc_row, sizes, GROUP, QUERIES, OFFSETS)
        offs_d = gl.arange(0, D, gl.SliceLayout(0, ACC))[None, :]
        v2_ptrs = v2_ptr + bh.to(gl.int64) * sizes.Tk2 * D + rows.position2[:, None] * D + offs_d
        acc *= gl.load(v2_ptrs, mask=rows.exists[:, None], other=0.0).to(gl.float32)
        l_i = gl.convert_layout(l_i, gl.SliceLayout(1, ACC))
        in_range = (l_i > LEAST) & (l_i < MOST)
        l_i = gl.where(rows.exists, gl.where(in_range, l_i, float("nan")), 0.0)
        o = gl.convert_layout(gl.sum(acc.reshape([QUERIES, OFFSETS, D]), 1), OUT)  # [QUERIES, D]
        l_q = gl.sum(l_i.reshape([QUERIES, OFFSETS]), 1)
        l_q = gl.convert_layout(l_q, gl.SliceLayout(1, OUT))  # [QUERIES]
        o = (o / gl.where(l_q > 0.0, l_q, 1.0)[:, None]).to(dtype)

        # -- store; a query with a row out of range is left to repair_kernel --
        lse = gl.where(l_q > 0.0, gl.log2(l_q) * LN2, -float("inf"))
        lse = gl.where(l_q == l_q, lse, float("inf"))  # noqa: PLR0124, NaN
        query = part * QUERIES + gl.arange(0, QUERIES, gl.SliceLayout(1, OUT))
        row = bh.to(gl.int64) * GROUP * sizes.Tq + query_row(query, sizes.Tq, GROUP)
        gl.store(lse_ptr + row, lse, mask=query < GROUP * sizes.Tq)
        offs = row[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, OUT))[None, :]
        gl.store(o_ptr + offs, o, mask=(query < GROUP * sizes.Tq)[:, None])


# --------------------------------------------------------------------------------------------------
# Kernel and launch


@gluon.jit
def make_ring(slots, SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Make the barriers of a ring. Full takes one arrival; empty takes one from each reader."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return Ring(slots, full, empty)


@gluon.jit(do_not_specialize=["Tq", "Tk", "Tk2", "w1", "w2", "tiles", "heads"])
def hopper_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_blocks, v_blocks, k_edges, v_edges,  # TMA descriptors of (B * Hkv, Tk, D)
    k2_ptr, v2_ptr, o_ptr, lse_ptr,  # (B, Hkv, Tk2, D) twice, (B, H, Tq, D), (B, H, Tq)
    Tq, Tk, Tk2, w1, w2, scale, tiles, heads,
    GROUP: gl.constexpr, D: gl.constexpr, QUERIES: gl.constexpr, OFFSETS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_EDGE: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr,  # per thread
):  # fmt: skip
    """o, lse = attention(q, k, v, k2, v2); lse = inf is left to repair_kernel."""
    # -- rings in shared memory --
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    k_slots = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, D], k_blocks.layout)
    v_slots = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, D], v_blocks.layout)
    row_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    row_slots = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], row_layout)
    k_ring = make_ring(k_slots, STAGES, CONSUMERS)
    v_ring = make_ring(v_slots, STAGES, CONSUMERS)
    row_ring = make_ring(row_slots, CONSUMERS, 1)

    sizes = Sizes(
        gl.to_tensor(Tq), gl.to_tensor(Tk), gl.to_tensor(Tk2), gl.to_tensor(w1), gl.to_tensor(w2),
        gl.to_tensor(tiles), gl.to_tensor(heads),
    )  # fmt: skip
    scale = gl.cast(gl.to_tensor(scale), gl.float32)

    # -- consumers and the loader, four warps each --
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, row_ring, sizes, 0,
                        GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, row_ring, sizes, 1,
                        GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
            (loader, (q_ptr, k2_ptr, k_blocks, v_blocks, k_edges, v_edges,
                      k_ring, v_ring, row_ring, sizes, scale,
                      GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
        ], [4, 4], [CONSUMER_REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, row_ring, sizes, 0,
                        GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, row_ring, sizes, 1,
                        GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, k_ring, v_ring, row_ring, sizes, 2,
                        GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
            (loader, (q_ptr, k2_ptr, k_blocks, v_blocks, k_edges, v_edges,
                      k_ring, v_ring, row_ring, sizes, scale,
                      GROUP, D, QUERIES, OFFSETS, BLOCK_N, HAS_EDGE, CONSUMERS)),
        ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS])
    # fmt: on


def key_layout():
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


CONFIGS = {  # by head dimension; registers are per thread
    128: dict(BLOCK_N=64, STAGES=5, CONSUMERS=2, CONSUMER_REGISTERS=208, LOADER_REGISTERS=88),
    64: dict(BLOCK_N=64, STAGES=8, CONSUMERS=3, CONSUMER_REGISTERS=152, LOADER_REGISTERS=56),
}


@functools.lru_cache(1024)
def plan(dtype, device, group, D, w1, w2):
    """-> compile-time arguments of hopper_kernel, or None if it does not apply

    At the start of the window only one block is masked, small or whole. It must hold all keys that
    some rows of a tile see and others do not, which is not so for every w1.
    """
    if dtype == torch.float32 or D not in CONFIGS:
        return None
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    config = CONFIGS[D]
    offsets = min(32, triton.next_power_of_2(w2))
    if offsets < 16 or w2 > offsets:
        return None
    queries = 64 // offsets  # in the 64 rows of a consumer
    queries_per_tile = config["CONSUMERS"] * queries

    # the windows of a tile's queries start at up to 1 + extra_positions different keys
    extra_positions = 0
    if group % queries_per_tile != 0:
        extra_positions = (queries_per_tile - 2) // group + 1
    partial_keys = w1 % config["BLOCK_N"] + extra_positions  # keys before the whole blocks
    if partial_keys > config["BLOCK_N"]:
        return None
    has_edge = 0 < partial_keys <= EDGE.value
    sizes = {"GROUP": group, "D": D, "QUERIES": queries, "OFFSETS": offsets}
    return {**config, **sizes, "HAS_EDGE": has_edge}


@functools.lru_cache
def count_multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(options, q, k, v, k2, v2, o, lse, sizes):
    """Run hopper_kernel. Writes o and lse, which is inf for the queries left to repair_kernel."""
    D = q.shape[3]
    layout = key_layout()
    descriptors = []
    for size in (options["BLOCK_N"], EDGE.value):
        for t in (k, v):
            heads = t.view(-1, t.shape[2], D)  # (B * Hkv, Tk, D)
            descriptors.append(TensorDescriptor.from_tensor(heads, [1, size, D], layout))

    heads = k.shape[0] * k.shape[1]
    queries = options["GROUP"] * q.shape[2]
    tiles = triton.cdiv(queries, options["CONSUMERS"] * options["QUERIES"])
    programs = min(count_multiprocessors(q.device), tiles * heads)
    tensors = q, *descriptors, k2, v2, o, lse
    hopper_kernel[(programs,)](*tensors, *sizes, D**-0.5, tiles, heads, **options, num_warps=4)
