"""The forward pass of 2-simplicial attention in Gluon, for 16 bits and most windows on Hopper.

Gluon is Triton's own level below, experimental: kernels/simplicial.py works without this file, and
uses forward_kernel where this one does not build or does not apply.

A program stays on its multiprocessor and goes from tile to tile. Four warps, the loader, make row
operands and fetch blocks of keys by TMA into a ring of stages; NC times four others, the consumers,
take the 64 rows of NQ queries each. A consumer issues the scores of a block and then the product of
the block before with its values, and takes the exponentials of the former while the latter runs.
Barriers in shared memory: `full` of keys, values and row operands, then `empty`.

There is no running maximum. Queries with a row out of range, or with a result that is not finite, get
an infinite lse and are left to repair_kernel.
"""

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
HEAD = tl.constexpr(16)  # keys of a block at the left edge of a window

# head dim: keys of a block, stages, consumers, registers of a consumer's and of a loader's thread
CONFIGS = {128: (64, 5, 2, 208, 88), 64: (64, 8, 3, 152, 56)}


@gluon.jit
def span(
    t, g: tl.constexpr, Tq, Tk, w1,
    NQ: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Tile t of NQ queries: the position where its blocks start, their number and where the small
    block before them starts. They end at the last position, as in forward_kernel; up to 16 keys at
    the old end are a small block's, more are one more block's."""
    lo = gl.minimum(t * NQ // g, Tq - 1) + Tk - Tq
    hi = gl.minimum((t * NQ + NQ - 1) // g, Tq - 1) + Tk - Tq
    count = gl.maximum(gl.minimum(w1, hi + 1), 0) // BN
    rest = hi + 1 - count * BN - gl.maximum(lo - w1 + 1, 0)
    few = (rest > 0) & (rest <= HEAD) & (count > 0) & SMALL
    small = gl.where(
        few, hi + 1 - count * BN - HEAD, -HEAD
    )  # before position 0 all is 0 and hidden
    count += (((rest > 0) & (few == 0)) | (count == 0)).to(gl.int32)
    return hi + 1 - count * BN, count, small


@gluon.jit
def rows_of(t, r, g: tl.constexpr, Tq, Tk, Tk2, w2, NQ: tl.constexpr, BD: tl.constexpr):
    """As pairs() of forward_kernel, for rows r of group t of 64: the row of q, its position among k,
    that of the offset among k2, whether there is such a pair."""
    n = t * NQ + r // BD
    i = gl.minimum(n // g, Tq - 1)
    d, i2 = r % BD, i + Tk2 - Tq
    return n % g * Tq + n // g, i + Tk - Tq, i2 - d, (n < Tq * g) & (d < w2) & (d <= i2)


@gluon.jit
def load_block(
    c, bh, start, size: tl.constexpr, descs, stages, full, empty,
    D: tl.constexpr, ST: tl.constexpr,
):  # fmt: skip
    for n in gl.static_range(2):  # keys, values
        mbarrier.wait(empty[n].index(c % ST), (c // ST & 1) ^ 1)
        mbarrier.expect(full[n].index(c % ST), size * D * 2)
        stage = stages[n].index(c % ST).slice(0, size, 1)
        tma.async_copy_global_to_shared(descs[n], [bh, start, 0], full[n].index(c % ST), stage)


@gluon.jit
def make_rows(
    to, q_ptr, k2_ptr, factor, t, g: tl.constexpr, D: tl.constexpr, Tq, Tk2, w2,
    NQ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As product() of forward_kernel, for group t of 64 rows, into shared memory, query by query."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BD, gl.SliceLayout(1, L))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, L))
    for m in gl.static_range(NQ):
        n = gl.minimum(t * NQ + m, Tq * g - 1)
        i2 = n // g + Tk2 - Tq
        valid = (d < w2) & (d <= i2) & (t * NQ + m < Tq * g)
        x = gl.load(q_ptr + (n % g * Tq + n // g) * D + offs_d).to(gl.float32) * factor  # [D]
        y_ptr = k2_ptr + (i2 - d)[:, None] * D + offs_d[None, :]
        y = gl.load(y_ptr, mask=valid[:, None], other=0.0).to(gl.float32)  # [BD, D]
        to.slice(m * BD, BD).store((x[None, :] * y).to(q_ptr.dtype.element_ty))


@gluon.jit
def loader(
    q_ptr, k2_ptr, blocks, smalls, stages, rows, full, empty, numbers, scale,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ST: tl.constexpr, SMALL: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    Tq, Tk, Tk2, w1, w2, tiles, heads = numbers
    c, phase = 0, 1
    for tile in range(gl.program_id(0), tiles * heads, gl.num_programs(0)):
        bh, t = tile // tiles, tile % tiles
        q = q_ptr + bh.to(gl.int64) * g * Tq * D
        k2 = k2_ptr + bh.to(gl.int64) * Tk2 * D
        for w in gl.static_range(NC):
            mbarrier.wait(empty[2].index(w), phase)
            group = t * NC + w
            make_rows(rows.index(w), q, k2, scale * LOG2E, group, g, D, Tq, Tk2, w2, NQ, BD)
            mbarrier.arrive(full[2].index(w), count=1)
        phase ^= 1
        start, count, small = span(t, g, Tq, Tk, w1, NC * NQ, BN, SMALL)
        if SMALL:
            load_block(c, bh, small, HEAD, smalls, stages, full, empty, D, ST)
            c += 1
        for b in range(count):
            load_block(c, bh, start + b * BN, BN, blocks, stages, full, empty, D, ST)
            c += 1


@gluon.jit
def scores(
    a, stages, c, full, size: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, ST: tl.constexpr
):
    """Begins A K^T of the block in stage c. [64, size]"""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, size, 16])
    mbarrier.wait(full[0].index(c % ST), c // ST & 1)
    k = stages[0].index(c % ST).reshape([BN, D]).slice(0, size)  # [size, D]
    a = gl.convert_layout(a, gl.DotOperandLayout(0, L, 2), assert_trivial=True)
    zeros = gl.zeros([64, size], gl.float32, L)
    return warpgroup_mma(a, k.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def exponentials(s, i, start, w1, edge: tl.constexpr):
    """exp2 of scores, 0 where hidden, and their sums."""
    if edge:
        i = gl.convert_layout(i, gl.SliceLayout(1, s.type.layout))[:, None]
        j = start + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        s = gl.where((j <= i) & (j > gl.maximum(i - w1, -1)), s, -float("inf"))
    p = gl.exp2(s)
    return p, gl.sum(p, 1)


@gluon.jit
def step(
    a, p, acc, l, i, c, start, w1, stages, full, empty,
    BN: tl.constexpr, D: tl.constexpr, ST: tl.constexpr, edge: tl.constexpr,
):  # fmt: skip
    """Block c + 1, and the product of p, of block c, with its values."""
    before, c = c % ST, c + 1
    s = scores(a, stages, c, full, BN, BN, D, ST)
    acc = warpgroup_mma(p, stages[1].index(before).reshape([BN, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(empty[0].index(c % ST), count=1)
    more, sums = exponentials(s, i, start, w1, edge)
    # waited for here, so that no exponential slips behind the next wait
    mbarrier.wait(full[1].index(c % ST), c // ST & 1)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(empty[1].index(before), count=1)
    return gl.convert_layout(more.to(p.dtype), p.type.layout), acc, l + sums, c


@gluon.jit
def consumer(
    v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers,
    w: tl.constexpr, g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, ST: tl.constexpr, SMALL: tl.constexpr, NC: tl.constexpr,
):  # fmt: skip
    Tq, Tk, Tk2, w1, w2, tiles, heads = numbers
    # layouts of scores, of the result, of p as an operand, and of one row per query
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    R: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, R, 2)
    Q: gl.constexpr = gl.BlockedLayout([1, D // 64], [1, 32], [2, 2], [1, 0])
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    LEAST: gl.constexpr = 1.0 if dtype == gl.float16 else 2.0**-60  # as in forward_kernel
    MOST: gl.constexpr = 2.0**15 if dtype == gl.float16 else 2.0**60
    rows_s = gl.arange(0, 64, gl.SliceLayout(1, S))
    rows_r = gl.arange(0, 64, gl.SliceLayout(1, R))
    c, phase = 0, 0
    for tile in range(gl.program_id(0), tiles * heads, gl.num_programs(0)):
        bh, t = tile // tiles, tile % tiles
        start, count, small = span(t, g, Tq, Tk, w1, NC * NQ, BN, SMALL)
        row, i, at, valid = rows_of(t * NC + w, rows_s, g, Tq, Tk, Tk2, w2, NQ, BD)
        mbarrier.wait(full[2].index(w), phase)
        a = rows.index(w).load(gl.DotOperandLayout(0, S, 2))  # [64, D], in registers
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
            v = stages[1].index(before % ST).reshape([BN, D]).slice(0, HEAD)
            acc = warpgroup_mma(p, v, acc, use_acc=False, is_async=True)
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
        for b in range(1, count - 1):  # what all rows see
            p, acc, l, c = step(
                a, p, acc, l, i, c, start + b * BN, w1, stages, full, empty, BN, D, ST, False
            )
        if count > 1:
            last = start + (count - 1) * BN
            p, acc, l, c = step(a, p, acc, l, i, c, last, w1, stages, full, empty, BN, D, ST, True)
        v = stages[1].index(c % ST).reshape([BN, D])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(empty[1].index(c % ST), count=1)
        c += 1

        # No maximum: the rows of a query can be added as they are.
        row, i, at, valid = rows_of(t * NC + w, rows_r, g, Tq, Tk, Tk2, w2, NQ, BD)
        offs_d = gl.arange(0, D, gl.SliceLayout(0, R))[None, :]
        v2 = v2_ptr + bh.to(gl.int64) * Tk2 * D + at[:, None] * D + offs_d
        acc *= gl.load(v2, mask=valid[:, None], other=0.0).to(gl.float32)
        l = gl.convert_layout(l, gl.SliceLayout(1, R))
        l = gl.where(valid, gl.where((l > LEAST) & (l < MOST), l, float("nan")), 0.0)
        o = gl.convert_layout(gl.sum(acc.reshape([NQ, BD, D]), 1), Q)  # [NQ, D]
        l = gl.convert_layout(gl.sum(l.reshape([NQ, BD]), 1), gl.SliceLayout(1, Q))
        o = (o / gl.where(l > 0.0, l, 1.0)[:, None]).to(dtype)
        # P = 0 does not hide a value that is not finite: 0 * inf = NaN
        is_finite = gl.min((gl.abs(o.to(gl.float32)) < float("inf")).to(gl.int32), 1) > 0
        lse = gl.where(l > 0.0, gl.log2(l) * LN2, -float("inf"))
        lse = gl.where((l == l) & is_finite, lse, float("inf"))
        n = (t * NC + w) * NQ + gl.arange(0, NQ, gl.SliceLayout(1, Q))
        to = bh.to(gl.int64) * g * Tq + n % g * Tq + n // g
        gl.store(lse_ptr + to, lse, mask=n < g * Tq)
        to = to[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, Q))[None, :]
        gl.store(o_ptr + to, o, mask=(n < g * Tq)[:, None])


@gluon.jit(do_not_specialize=["Tq", "Tk", "Tk2", "w1", "w2", "tiles", "heads"])
def hopper_kernel(
    q_ptr, k_blocks, v_blocks, k_small, v_small,  # (B, H, Tq, D), descriptors of (B Hkv, Tk, D)
    k2_ptr, v2_ptr, o_ptr, lse_ptr,  # as in forward_kernel
    Tq, Tk, Tk2, w1, w2, scale, tiles, heads,
    g: tl.constexpr, D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ST: tl.constexpr, SMALL: tl.constexpr, NC: tl.constexpr,
    MANY: tl.constexpr, FEW: tl.constexpr,  # registers of a consumer's thread and of a loader's
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    B: gl.constexpr = mbarrier.MBarrierLayout()
    stages = (
        gl.allocate_shared_memory(dtype, [ST, 1, BN, D], k_blocks.layout),
        gl.allocate_shared_memory(dtype, [ST, 1, BN, D], v_blocks.layout),
    )
    rows = gl.allocate_shared_memory(dtype, [NC, 64, D], gl.NVMMASharedLayout(128, 16))
    full = (
        gl.allocate_shared_memory(gl.int64, [ST, 1], B),
        gl.allocate_shared_memory(gl.int64, [ST, 1], B),
        gl.allocate_shared_memory(gl.int64, [NC, 1], B),
    )
    empty = (
        gl.allocate_shared_memory(gl.int64, [ST, 1], B),
        gl.allocate_shared_memory(gl.int64, [ST, 1], B),
        gl.allocate_shared_memory(gl.int64, [NC, 1], B),
    )
    for s in gl.static_range(ST):
        for n in gl.static_range(2):
            mbarrier.init(full[n].index(s), count=1)
            mbarrier.init(empty[n].index(s), count=NC)
    for w in gl.static_range(NC):
        mbarrier.init(full[2].index(w), count=1)
        mbarrier.init(empty[2].index(w), count=1)
    numbers = (
        gl.to_tensor(Tq),
        gl.to_tensor(Tk),
        gl.to_tensor(Tk2),
        gl.to_tensor(w1),
        gl.to_tensor(w2),
        gl.to_tensor(tiles),
        gl.to_tensor(heads),
    )
    scale = gl.cast(gl.to_tensor(scale), gl.float32)
    # fmt: off
    if NC == 2:
        gl.warp_specialize([
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 0,
                        g, D, NQ, BD, BN, ST, SMALL, NC)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 1,
                        g, D, NQ, BD, BN, ST, SMALL, NC)),
            (loader, (q_ptr, k2_ptr, (k_blocks, v_blocks), (k_small, v_small), stages, rows, full,
                      empty, numbers, scale, g, D, NQ, BD, BN, ST, SMALL, NC)),
        ], [4, 4], [MANY, FEW])
    else:
        gl.warp_specialize([
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 0,
                        g, D, NQ, BD, BN, ST, SMALL, NC)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 1,
                        g, D, NQ, BD, BN, ST, SMALL, NC)),
            (consumer, (v2_ptr, o_ptr, lse_ptr, stages, rows, full, empty, numbers, 2,
                        g, D, NQ, BD, BN, ST, SMALL, NC)),
            (loader, (q_ptr, k2_ptr, (k_blocks, v_blocks), (k_small, v_small), stages, rows, full,
                      empty, numbers, scale, g, D, NQ, BD, BN, ST, SMALL, NC)),
        ], [4, 4, 4], [MANY, MANY, FEW])
    # fmt: on


def key_layout():
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)


def plan(q, g, w1, w2):
    """-> what `launch` needs, None where forward_kernel has to do.

    At most 16 keys next to the oldest whole block, or the whole of one more, may be hidden from some
    rows of a tile, so windows of some lengths are not for this kernel.
    """
    if q.dtype == torch.float32 or q.shape[3] not in CONFIGS:
        return None
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return None
    block, ST, NC, *registers = CONFIGS[q.shape[3]]
    BD = min(32, triton.next_power_of_2(w2))  # offsets of a query
    NQ = 64 // BD  # queries in the 64 rows of a consumer
    tile = NC * NQ
    spread = 0 if g % tile == 0 else (tile - 2) // g + 1  # positions of a tile after its first
    oldest = w1 % block + spread  # keys before the whole blocks
    if w2 > BD or BD < 16 or oldest > block:
        return None
    small = 0 < oldest <= HEAD.value
    return tile, block, (g, q.shape[3], NQ, BD, block, ST, small, NC, *registers)


def launch(how, heads, numbers, q, k, v, k2, v2, o, lse):
    """Run hopper_kernel as `plan` says. Writes o, and lse, infinite where repair_kernel has to go."""
    tile, block, constants = how
    g = constants[0]
    tiles = triton.cdiv(g * q.shape[2], tile)
    layout = key_layout()
    descriptors = []
    for size in (block, HEAD.value):
        for t in (k, v):
            shape = [1, size, t.shape[3]]
            descriptors.append(TensorDescriptor.from_tensor(t.flatten(0, 1), shape, layout))
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(multiprocessors, tiles * heads)
    tensors = q, *descriptors, k2, v2, o, lse
    hopper_kernel[(programs,)](*tensors, *numbers, tiles, heads, *constants, num_warps=4)
