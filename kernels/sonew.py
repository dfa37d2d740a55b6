"""SONew's step over many tensors at once: statistics, L D L^T m, the graft's norms, the update.

A chunk of a tensor is a tile of lines of 32 lanes, a quad of 4 consecutive elements a lane, so that what an element needs of the next
k <= 4 is in its own thread or one lane further on: a shuffle within a warp. The first and the last lane of a line are for that alone,
the lines overlap by two quads, and a barrier stands between what is read and what is written.

A table of pointers and sizes lets one launch serve all tensors of a dtype. Chunks end with chains where these fit (chain="row", length a
multiple of 4): none then needs another's elements. Otherwise a first launch copies the quads on either side of each chunk aside: as
state is updated in place, a neighbour could find it new already.

1. halo_kernel (only where chains are longer than chunks): g, m, S of those quads.
2. step_kernel, a program per run of chunks. Half of the programs take the statistics: m, S in place, u in place of the gradient, and the
   sums |a|^2, |u|^2, the number of bad gradients; the last program of a tensor to finish adds those of all, in their order, so that two
   runs are equal. The other half apply u: p -= lr (scale u + wd p), nothing if a gradient was bad; they come a little later, between
   the statistics of the next tensors, and wait for that. Programs start in the order of their numbers, so that one only waits for what
   has begun, and L2 still holds some of u.
   Or, on Hopper and for tensors that fit, ring_kernel, the same in Gluon, where u stays in shared memory until it is applied: as many
   programs as run at once, each of which takes run after run and applies the one before the last before it takes another. Its gradient
   is left as it was.

Bytes per fp32 parameter at band b: statistics read g, m, S_0..S_b and write m, S_0..S_b, the update reads and writes p: 8 b + 28, 36
tridiagonal, 60 at b = 4, as many as AdamW's 28 at b = 0. A u that goes through memory is 8 more. At the 4.25 TB/s that a copy reaches on
an H200, 125 M parameters take 1.06 ms (b = 1) and 1.77 ms (b = 4); with m and S in bfloat16 they are 4 b + 20, 0.71 and 1.06 ms.

Steps, 53 matrices of 768 x 3072 on one H200 (torch 2.11, triton 3.6), where PyTorch's fused AdamW takes 1.01 ms; versions side by side,
what the file is now stands in results/kernels.json.                                                       b = 0, 1, 4, in ms
1. Statistics, norms and update as three launches over all tensors.                                        1.56 | 1.64 | 3.19
2. One launch, all loads before the first store: each program ends by waiting until its stores are seen
   by all, which small chunks pay for most.                                                                1.19 | 1.74 | 3.07
3. Runs of 8 chunks, loads by Triton's pipeline: with two stages it asks for the next chunk only after
   this one's work, and 99 registers leave room for two programs on a multiprocessor, 16 warps of 64:
   bound by latency, memory at 2.8 TB/s.                                                                   1.09 | 1.96 | 4.33
4. At most 64 registers (80 at b = 4), halos read through one pointer in place of two loads, updates
   1,024 programs after their statistics.                                                                  1.09 | 1.59 | 2.63
5. Neighbours by shuffles within a warp, lines that overlap, one barrier a chunk where there were seven
   exchanges through shared memory; the halos of a run copied by one program.                              1.11 | 1.62 | 2.41
6. At b = 1 two quads a thread, 4 warps, 96 registers: more loads in flight.                               1.11 | 1.42 | 2.37
   That is 93% of the copy's speed, so that bytes have to go. A step that leaves u out (and is wrong) takes
   1.20 at b = 1; u in 8 MB of scratch memory that stay in L2 1.26, but 31 MB are on their way, and from
   24 MB on nothing is gained.
7. u in shared memory, chunks dealt out in turn to as many programs as run at once: each has the same
   share, and the slowest multiprocessor decides, or so we think.                                          1.15 | 1.50 | 2.88
   With the next chunk copied to shared memory (cp.async) meanwhile: 1.74 at b = 1.
8. Runs of chunks from a counter, to whoever is free.                                                      0.98 | 1.37 | 2.59
9. All parameters of a run asked for at once, and before it waits for the norms; at b = 0 and 4 fewer
   programs with more registers.                                                                           0.89 | 1.23 | 2.16
   Loads of one float are faster than of four, 1.23 against 1.32 at b = 1 (in step 6 1.42 against 1.59): overlapping quads are not
   aligned to the sectors of 32 bytes, of which a load of four takes too many at a time, or so we think.
Limits: band 0 to 4, float32, float16 and bfloat16 parameters, float32 or bfloat16 state; arithmetic is float32.
"""

import functools
import math

import torch
import triton
import triton.language as tl

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:  # an older Triton
    gluon = None

# By band: lines of a chunk, warps, chunks of a run, stages of a pipeline, after how many programs a tensor's updates follow its
# statistics, and the most registers of a thread on Hopper, where all of this was timed
CONFIG = {
    0: (8, 8, 8, 1, 1024, 48),
    1: (8, 4, 8, 1, 1024, 96),
    **dict.fromkeys((2, 3, 4), (4, 4, 16, 1, 1024, 96)),
}
# ring_kernel's: programs of a multiprocessor, registers, chunks of a run, of which each program keeps two
RING = {0: (4, 64, 5), 1: (5, 96, 4), **dict.fromkeys((2, 3, 4), (4, 128, 10))}
HEAD = tl.constexpr(11)  # columns of the table before the pointer to S_0, named in `step`
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FAR = tl.constexpr(2**29)  # no lane is as far from the end of its chain as this
by_hand = gluon.jit if gluon else triton.jit  # without Gluon nothing calls these functions


@triton.jit
def pointer(row_ptr, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(TYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def place_of(chunk_index, chunk, n, ALIGNED: tl.constexpr):
    """Return where a chunk of a tensor of n elements starts, and its length."""
    start = chunk_index * chunk  # int64
    length = tl.minimum(n - start, chunk).to(tl.int32)
    if ALIGNED:
        start = tl.multiple_of(start, 4)
        length = tl.multiple_of(length, 4)
    return start, length


@triton.jit
def columns(x, LINES: tl.constexpr):
    """[32, LINES, 4] -> 4 of [32, LINES], within each thread."""
    even, odd = tl.split(tl.reshape(x, (32, LINES, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def quad_of(y, LINES: tl.constexpr, L: tl.constexpr):
    """4 of [32, LINES] -> [32, LINES, 4]. L: its layout in Gluon; None in Triton."""
    x = tl.reshape(tl.join(tl.join(y[0], y[2]), tl.join(y[1], y[3])), (32, LINES, 4))
    return x if L is None else gl.convert_layout(x, L, assert_trivial=True)


@triton.jit
def shuffled(x, lane, by: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """x [32, LINES] of the lane `by` further on; past the ends that of the last lane."""
    lane = tl.minimum(tl.maximum(lane + by, 0), 31)
    lane = tl.broadcast_to(lane[:, None], (32, LINES))
    return tl.gather(
        x, lane if L is None else gl.convert_layout(lane, x.type.layout, assert_trivial=True), 0
    )


@triton.jit
def ahead(x, lane, k: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """x[i + k] for the elements i = 4 lane + phase of each row of [32, LINES, 4], k <= 4.

    What lies past the last lane is not defined.
    """
    if k == 0:
        return x
    z = columns(x, LINES)
    for phase in tl.static_range(4):
        z = z + (shuffled(z[phase], lane, 1, LINES, L),)
    return quad_of((z[k], z[k + 1], z[k + 2], z[k + 3]), LINES, L)


@triton.jit
def behind(x, lane, BAND: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """sum_k x_k[i - k] for a tuple x_1 ... x_BAND of [32, LINES, 4].

    What a lane sends to the next, four numbers, it adds up first.
    """
    z = ()
    sums = ()
    for k in tl.static_range(BAND):
        z = z + columns(x[k], LINES)
    for phase in tl.static_range(4):
        if phase < BAND:
            total = z[4 * phase + 3]  # k = phase + 1
            for k in tl.static_range(phase + 2, BAND + 1):
                total += z[3 * k + phase]
            total = shuffled(total, lane, -1, LINES, L)
            for k in tl.static_range(1, phase + 1):
                total += z[3 * k + phase - 4]
        else:
            total = z[phase - 1]
            for k in tl.static_range(2, BAND + 1):
                total += z[3 * k + phase - 4]
        sums = sums + (total,)
    return quad_of(sums, LINES, L)


@triton.jit
def solve(W, c, d, s, gamma, N: tl.constexpr):
    """Return psi = W^-1 c and s - psi . c for N successors, as in sonew.py.

    W: the lower triangle in one tuple, row after row; d: its diagonal before elimination.
    """
    psi = ()
    if N > 0:
        inverse = tl.where(W[0] > gamma * d[0], 1 / W[0], 0.0)
        rest = ()
        c_rest = ()
        d_rest = ()
        for p in tl.static_range(1, N):
            ratio = W[p * (p + 1) // 2] * inverse
            for r in tl.static_range(1, p + 1):
                rest = rest + (W[p * (p + 1) // 2 + r] - ratio * W[r * (r + 1) // 2],)
            c_rest = c_rest + (c[p] - ratio * c[0],)
            d_rest = d_rest + (d[p],)
        psi, s = solve(rest, c_rest, d_rest, s - c[0] * (c[0] * inverse), gamma, N - 1)
        first = c[0] * inverse
        for p in tl.static_range(1, N):
            first -= W[p * (p + 1) // 2] * inverse * psi[p - 1]
        psi = (first,) + psi
    return psi, s


@triton.jit
def one_minus_power(t, log_beta):
    """1 - beta^t without cancellation: 1 - 0.999 taken in float32 is off by 3e-5 of itself."""
    d = t * tl.cast(log_beta, tl.float32)
    series = -d * (
        1
        + d
        * (1 / 2)
        * (1 + d * (1 / 3) * (1 + d * (1 / 4) * (1 + d * (1 / 5) * (1 + d * (1 / 6)))))
    )
    return tl.where(d > -0.3, series, 1 - tl.exp(d))


@triton.jit
def halo_kernel(
    table_ptr, items_ptr, halo_ptr,                                  # (T, COLUMNS), (P, 2), (P RUN, BAND + 3, 2, 4) of G and M
    G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    item = items_ptr + tl.program_id(0) * 2
    row_ptr = table_ptr + tl.load(item) * COLUMNS
    run = tl.load(item + 1)
    n = tl.load(row_ptr + 5)
    chunk = tl.load(row_ptr + 7)
    sub = tl.arange(0, triton.next_power_of_2(RUN))[:, None]
    o = tl.arange(0, 8)[None, :]
    # [RUN, 8]: the quads before the chunks and after them
    i = (run * RUN + sub) * chunk + tl.where(o < 4, o - 4, chunk + o - 4)
    there = (i >= 0) & (i < n) & (sub < RUN)
    halo_ptr += ((tl.load(row_ptr + 8) + run) * RUN + sub) * (BAND + 3) * 8
    for slot in tl.static_range(BAND + 3):
        ptr = (
            pointer(row_ptr, 1, G, False)
            if slot == 0
            else pointer(row_ptr, 2 if slot == 1 else HEAD + slot - 2, M, False)
        )
        tl.store(
            (halo_ptr + slot * 8).to(ptr.dtype) + o,
            tl.load(ptr + i, mask=there, other=0.0),
            mask=sub < RUN,
        )


@triton.jit
def places(
    ptr, quad, phase, halo_ptr, slot: tl.constexpr, chunk, HALO: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers [32, LINES, 4] to a chunk's quads [32, LINES, 1].

    With HALO, those before and after the chunk point to the copies that halo_kernel made.
    """
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2  # bytes of a quad
    ptrs = ptr + 4 * quad
    if HALO:
        aside = (halo_ptr + slot * 8).to(ptr.dtype) + tl.where(quad < 0, 0, 4)
        ptrs = tl.where((quad < 0) | (4 * quad >= chunk), aside, ptrs)
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (SIZE, SIZE, SIZE))
    return ptrs + phase


@triton.jit
def to_the_end(o, chain, place, left0):
    """Number of elements from o to the end of its chain, itself included.

    place: where in its chain the chunk begins; left0: elements from there to the chain's end.
    """
    x = left0 - o
    left = tl.where(x > 0, x, chain - (-x) % chain)
    # before the chunk there may be earlier chains
    return tl.where(place + o < 0, (-(place + o) - 1) % chain + 1, left)


@triton.jit
def add3(x0, x1, x2, y0, y1, y2):
    return x0 + y0, x1 + y1, x2 + y2


@triton.jit
def tile(index, length, chunk, BAND: tl.constexpr, HALO: tl.constexpr):
    """Offsets of a chunk's elements, for index = (lane, line, phase), each counted from 0.

    Returns quads [32, LINES, 1]; and [32, LINES, 4]: offsets from the chunk's start, whether to
    read them, whether to write them.
    """
    # the first and the last lane of a line are its neighbours'
    EDGE: tl.constexpr = 1 if BAND > 0 else 0
    lane = index[0][:, None, None]
    quad = index[1][None, :, None] * (32 - 2 * EDGE) + lane - EDGE
    o = 4 * quad + index[2][None, None, :]
    there = (o >= 0) & (o < length)
    return (
        quad,
        o,
        there | (quad < 0) | (o >= chunk) if HALO else there,
        there & (lane >= EDGE) & (lane < 32 - EDGE),
    )


@triton.jit
def statistics(
    index, g_ptr, m_ptr, S_ptr, start, length, chunk, chain, halo_ptr, correct1, correct2,
    beta1, beta2, new1, new2, eps, gamma, graft_eps,                 # new = 1 - beta, rounded once
    M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr, HALO: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Update m and S of one chunk in place.

    Returns u [32, LINES, 4]; and [32, LINES]: |a|^2, |u|^2, the number of bad gradients.
    """
    lane = index[0]
    phase = index[2][None, None, :]
    quad, o, reads, own = tile(index, length, chunk, BAND, HALO)
    g = tl.load(
        places(g_ptr + start, quad, phase, halo_ptr, 0, chunk, HALO, ALIGNED), mask=reads, other=0.0
    ).to(tl.float32)
    m = tl.load(
        places(m_ptr + start, quad, phase, halo_ptr, 1, chunk, HALO, ALIGNED), mask=reads, other=0.0
    ).to(tl.float32)
    old = ()
    for k in tl.static_range(BAND + 1):
        old = old + (
            tl.load(
                places(S_ptr[k] + start, quad, phase, halo_ptr, 2 + k, chunk, HALO, ALIGNED),
                mask=reads,
                other=0.0,
            ).to(tl.float32),
        )
    if BAND > 0:
        tl.debug_barrier()  # a row's neighbours write what it has read
    good = g * g < float("inf")  # false for NaN too
    g = tl.where(good, g, 0.0)
    m = beta1 * m + new1 * g
    tl.store(m_ptr + start + o, m.to(M), mask=own, eviction_policy="evict_first")
    m *= correct1
    if BAND > 0:
        place = start % chain if HALO else start * 0
        left0 = tl.minimum(chain - place, FAR).to(tl.int32)
        place = tl.minimum(place, FAR).to(tl.int32)
        chain = tl.minimum(chain, 2 * FAR).to(tl.int32)
        left = to_the_end(4 * quad if ALIGNED else o, chain, place, left0)
        if ALIGNED:  # a quad lies in one chain
            left = left - phase
    S = ()
    for k in tl.static_range(BAND + 1):
        product = g * ahead(g, lane, k, LINES, L)
        if k > 0:
            product = tl.where(left > k, product, 0.0)
        new = beta2 * old[k] + new2 * product
        tl.store(S_ptr[k] + start + o, new.to(M), mask=own, eviction_policy="evict_first")
        S = S + (new * correct2,)
    a = m / (tl.sqrt(S[0]) + graft_eps)

    if PLAIN:
        u = a
    else:
        S0 = S[0] + eps
        W = ()
        c = ()
        d = ()
        for p in tl.static_range(1, BAND + 1):
            for q in tl.static_range(1, p):
                W = W + (ahead(S[p - q], lane, q, LINES, L),)
            W = W + (ahead(S0, lane, p, LINES, L),)
            c = c + (S[p],)
            d = d + (W[p * (p + 1) // 2 - 1],)
        psi, s = solve(W, c, d, S0, gamma, BAND)
        keep = s > gamma * S0
        s = tl.where(keep, s, S0)
        w = m
        for k in tl.static_range(1, BAND + 1):
            w -= tl.where(keep, psi[k - 1], 0.0) * ahead(m, lane, k, LINES, L)
        w = tl.where(s > 0, w / s, 0.0)
        u = w
        x = ()
        for k in tl.static_range(BAND):
            x = x + (tl.where(keep, psi[k], 0.0) * w,)
        if BAND > 0:
            u -= behind(x, lane, BAND, LINES, L)
    sum_a = tl.sum(tl.where(own, a * a, 0.0), 2)
    sum_u = tl.sum(tl.where(own, u * u, 0.0), 2)
    bad = tl.sum(tl.where(own & (good == 0), 1.0, 0.0), 2)
    return u, sum_a, sum_u, bad


@triton.jit
def norms(offs, partial_ptr, programs, total_ptr, BLOCK: tl.constexpr):
    """Add up the sums of a tensor's programs, in their order, whoever does it. offs: [BLOCK]."""
    for column in tl.static_range(3):
        acc = tl.load(
            partial_ptr + offs * 3 + column, mask=offs < programs, other=0.0, cache_modifier=".cg"
        )
        for begin in range(BLOCK, programs, BLOCK):
            acc += tl.load(
                partial_ptr + (begin + offs) * 3 + column,
                mask=begin + offs < programs,
                other=0.0,
                cache_modifier=".cg",
            )
        tl.store(total_ptr + column, tl.sum(acc, 0))


@triton.jit
def awaited(ready_ptr, total_ptr, lr, LR_THERE: tl.constexpr, GRAFT: tl.constexpr):
    """Wait for a tensor's norms. Returns the learning rate, 0 if a gradient was bad, and u's scale."""
    while tl.atomic_add(ready_ptr, 0, sem="acquire") == 0:
        pass
    rate = tl.load(lr).to(tl.float32) if LR_THERE else tl.cast(lr, tl.float32)
    rate = tl.where(tl.load(total_ptr + 2, cache_modifier=".cg") > 0, 0.0, rate)
    scale = tl.cast(1.0, tl.float32)
    if GRAFT:
        scale = tl.sqrt(tl.load(total_ptr, cache_modifier=".cg")) / (
            tl.sqrt(tl.load(total_ptr + 1, cache_modifier=".cg")) + 1e-12
        )
    return rate, scale


@triton.jit
def publish(
    offs, sums, own_ptr, partial_ptr, programs, total_ptr, done_ptr, ready_ptr, BLOCK: tl.constexpr
):
    """Store a program's sums; the last program of a tensor adds them all. Returns whether it did."""
    sums = tl.reduce(tl.reduce(sums, 1, add3), 0, add3)
    for column in tl.static_range(3):
        tl.store(own_ptr + column, sums[column])
    tl.debug_barrier()
    last = tl.atomic_add(done_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        norms(offs, partial_ptr, programs, total_ptr, BLOCK)
        tl.debug_barrier()
        tl.atomic_xchg(ready_ptr, 1, sem="release")
    return last


@triton.jit
def count(row_ptr, total_ptr):
    """Count a tensor's steps, and those that bad gradients spoiled. One program per tensor does."""
    for column in tl.static_range(2):
        ptr = pointer(row_ptr, 3 + column, tl.float32, False)
        one = (
            tl.where(tl.load(total_ptr + 2, cache_modifier=".cg") > 0, 1.0, 0.0) if column else 1.0
        )
        tl.store(ptr, tl.load(ptr) + one)


@triton.jit
def apply(
    p_ptr, u_ptr, start, length, rate, scale, weight_decay, P: tl.constexpr, BLOCK: tl.constexpr
):
    """p -= rate (scale u + weight_decay p), for one chunk."""
    o = tl.arange(0, BLOCK)
    own = o < length
    u = tl.load(u_ptr + start + o, mask=own, other=0.0, cache_modifier=".cg").to(tl.float32)
    p = tl.load(p_ptr + start + o, mask=own, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )
    p -= rate * (scale * u + weight_decay * p)
    tl.store(p_ptr + start + o, p.to(P), mask=own, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["item0", "tensors"])
def step_kernel(
    table_ptr, items_ptr, halo_ptr, partial_ptr, total_ptr, count_ptr,
    item0, tensors, beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, graft_eps, lr, weight_decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr, GRAFT: tl.constexpr,
    LR_THERE: tl.constexpr, HALO: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    items_ptr += 2 * (tl.program_id(0) + item0)
    tensor, run = tl.load(items_ptr), tl.load(items_ptr + 1)
    applying, tensor = tensor < 0, tl.where(tensor < 0, -1 - tensor, tensor)
    row_ptr = table_ptr + tensor * COLUMNS
    done_ptr, ready_ptr = count_ptr + tensor, count_ptr + tensors + tensor
    total_ptr += tl.load(row_ptr + 10) * 3
    n, chunk = tl.load(row_ptr + 5), tl.load(row_ptr + 7)
    last = tl.minimum((run + 1) * RUN, tl.cdiv(n, chunk).to(tl.int32))
    g_ptr, step_ptr = pointer(row_ptr, 1, G, ALIGNED), pointer(row_ptr, 3, tl.float32, False)
    if applying:  # programs start in order: what this one waits for has begun
        p_ptr = pointer(row_ptr, 0, P, ALIGNED)
        rate, scale = awaited(ready_ptr, total_ptr, lr, LR_THERE, GRAFT)
        for c in tl.range(run * RUN, last, num_stages=STAGES):
            start, length = place_of(c, chunk, n, ALIGNED)
            apply(
                p_ptr,
                g_ptr,
                start,
                length,
                rate,
                scale,
                tl.cast(weight_decay, tl.float32),
                P,
                128 * LINES,
            )
        if run == 0:
            count(row_ptr, total_ptr)
    else:
        index, m_ptr, S_ptr = (
            (tl.arange(0, 32), tl.arange(0, LINES), tl.arange(0, 4)),
            pointer(row_ptr, 2, M, ALIGNED),
            (),
        )
        for k in tl.static_range(BAND + 1):
            S_ptr = S_ptr + (pointer(row_ptr, HEAD + k, M, ALIGNED),)
        t, chain, first, programs = (
            tl.load(step_ptr) + 1,
            tl.load(row_ptr + 6),
            tl.load(row_ptr + 8),
            tl.load(row_ptr + 9).to(tl.int32),
        )
        correct1, correct2 = 1 / one_minus_power(t, log_beta1), 1 / one_minus_power(t, log_beta2)
        sum_a, sum_u, bad = (
            tl.zeros((32, LINES), tl.float32),
            tl.zeros((32, LINES), tl.float32),
            tl.zeros((32, LINES), tl.float32),
        )
        for c in tl.range(run * RUN, last, num_stages=STAGES):
            start, length = place_of(c, chunk, n, ALIGNED)
            halo = halo_ptr + (first * RUN + c) * (BAND + 3) * 8
            _, o, _, own = tile(index, length, chunk, BAND, HALO)
            u, aa, uu, b = statistics(
                index,
                g_ptr,
                m_ptr,
                S_ptr,
                start,
                length,
                chunk,
                chain,
                halo,
                correct1,
                correct2,
                tl.cast(beta1, tl.float32),
                tl.cast(beta2, tl.float32),
                tl.cast(new1, tl.float32),
                tl.cast(new2, tl.float32),
                tl.cast(eps, tl.float32),
                tl.cast(gamma, tl.float32),
                tl.cast(graft_eps, tl.float32),
                M,
                BAND,
                PLAIN,
                HALO,
                ALIGNED,
                LINES,
                None,
            )
            tl.store(g_ptr + start + o, u.to(G), mask=own, eviction_policy="evict_last")
            sum_a, sum_u, bad = sum_a + aa, sum_u + uu, bad + b
        partial_ptr += first * 3
        publish(
            tl.arange(0, 1024),
            (sum_a, sum_u, bad),
            partial_ptr + run * 3,
            partial_ptr,
            programs,
            total_ptr,
            done_ptr,
            ready_ptr,
            1024,
        )


@by_hand
def settle(
    index,
    ring,
    slot,
    table_ptr,
    item_ptr,
    total_ptr,
    ready_ptr,
    lr,
    weight_decay,
    P: tl.constexpr,
    GRAFT: tl.constexpr,
    LR_THERE: tl.constexpr,
    BAND: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    L: tl.constexpr,
):
    """Apply the u of a run, in the ring from `slot` on, once the norms of its tensor are known."""
    tensor, run = gl.load(item_ptr), gl.load(item_ptr + 1)
    row_ptr = table_ptr + tensor * COLUMNS
    p_ptr, n, chunk, p = (
        pointer(row_ptr, 0, P, True),
        gl.load(row_ptr + 5),
        gl.load(row_ptr + 7),
        (),
    )
    for k in gl.static_range(RUN):  # all at once, and while it waits
        start, length = place_of(run * RUN + k, chunk, n, True)
        _, o, _, own = tile(index, length, chunk, BAND, False)
        p = p + (gl.load(p_ptr + start + o, mask=own, other=0.0, eviction_policy="evict_first"),)
    rate, scale = awaited(
        ready_ptr + tensor, total_ptr + gl.load(row_ptr + 10) * 3, lr, LR_THERE, GRAFT
    )
    for k in gl.static_range(RUN):
        start, length = place_of(run * RUN + k, chunk, n, True)
        _, o, _, own = tile(index, length, chunk, BAND, False)
        new = p[k].to(gl.float32)
        new -= rate * (scale * ring.index(slot + k).load(L) + weight_decay * new)
        gl.store(p_ptr + start + o, new.to(P), mask=own, eviction_policy="evict_first")


@(gluon.jit(do_not_specialize=["runs", "tensors"]) if gluon else triton.jit)
def ring_kernel(
    table_ptr, items_ptr, halo_ptr, partial_ptr, total_ptr, count_ptr,
    runs, tensors, beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, graft_eps, lr, weight_decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr, GRAFT: tl.constexpr,
    LR_THERE: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """step_kernel with u in shared memory until it is applied.

    As many programs as run at once; each takes run after run and keeps the u of two.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [32, 1, 1], [1, gl.num_warps(), 1], [2, 0, 1])
    ring = gl.allocate_shared_memory(
        gl.float32, [2 * RUN, 32, LINES, 4], gl.SwizzledSharedLayout(4, 1, 1, [2, 0, 1])
    )
    index = (
        gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, L))),
        gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, L))),
        gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L))),
    )
    offs = gl.arange(0, 1024, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    numbers = (
        gl.cast(beta1, gl.float32),
        gl.cast(beta2, gl.float32),
        gl.cast(new1, gl.float32),
        gl.cast(new2, gl.float32),
        gl.cast(eps, gl.float32),
        gl.cast(gamma, gl.float32),
        gl.cast(graft_eps, gl.float32),
    )
    weight_decay, ready_ptr = gl.cast(weight_decay, gl.float32), count_ptr + tensors
    slot, older, newer, item = gl.to_tensor(0), gl.to_tensor(-1), gl.to_tensor(-1), gl.to_tensor(0)
    while item < runs:
        if older >= 0:  # before another run is taken: who waits holds up nobody
            settle(
                index,
                ring,
                slot,
                table_ptr,
                items_ptr + 2 * older,
                total_ptr,
                ready_ptr,
                lr,
                weight_decay,
                P,
                GRAFT,
                LR_THERE,
                BAND,
                COLUMNS,
                RUN,
                L,
            )
            older = gl.to_tensor(-1)
        item = gl.atomic_add(count_ptr + 2 * tensors, 1, sem="relaxed")
        if item < runs:
            tensor, run = gl.load(items_ptr + 2 * item), gl.load(items_ptr + 2 * item + 1)
            row_ptr = table_ptr + tensor * COLUMNS
            n, chain, chunk, first = (
                gl.load(row_ptr + 5),
                gl.load(row_ptr + 6),
                gl.load(row_ptr + 7),
                gl.load(row_ptr + 8),
            )
            g_ptr, m_ptr, S_ptr = pointer(row_ptr, 1, G, True), pointer(row_ptr, 2, M, True), ()
            for k in gl.static_range(BAND + 1):
                S_ptr = S_ptr + (pointer(row_ptr, HEAD + k, M, True),)
            t = gl.load(pointer(row_ptr, 3, gl.float32, False)) + 1
            correct1, correct2 = (
                1 / one_minus_power(t, log_beta1),
                1 / one_minus_power(t, log_beta2),
            )
            zero = gl.zeros([32, LINES], gl.float32, gl.SliceLayout(2, L))
            sum_a, sum_u, bad = zero, zero, zero
            for c in range(run * RUN, gl.minimum((run + 1) * RUN, gl.cdiv(n, chunk).to(gl.int32))):
                start, length = place_of(c, chunk, n, True)
                halo = halo_ptr + (first * RUN + c) * (BAND + 3) * 8
                u, aa, uu, b = statistics(
                    index,
                    g_ptr,
                    m_ptr,
                    S_ptr,
                    start,
                    length,
                    chunk,
                    chain,
                    halo,
                    correct1,
                    correct2,
                    *numbers,
                    M,
                    BAND,
                    PLAIN,
                    HALO,
                    True,
                    LINES,
                    L,
                )
                sum_a, sum_u, bad = sum_a + aa, sum_u + uu, bad + b
                ring.index(slot + c - run * RUN).store(u)
            totals, first_ptr = total_ptr + gl.load(row_ptr + 10) * 3, partial_ptr + first * 3
            if publish(
                offs,
                (sum_a, sum_u, bad),
                first_ptr + run * 3,
                first_ptr,
                gl.load(row_ptr + 9).to(gl.int32),
                totals,
                count_ptr + tensor,
                ready_ptr + tensor,
                1024,
            ):
                count(row_ptr, totals)
            older, newer, slot = newer, item, RUN - slot
    if older >= 0:
        settle(
            index,
            ring,
            slot,
            table_ptr,
            items_ptr + 2 * older,
            total_ptr,
            ready_ptr,
            lr,
            weight_decay,
            P,
            GRAFT,
            LR_THERE,
            BAND,
            COLUMNS,
            RUN,
            L,
        )
    if newer >= 0:
        settle(
            index,
            ring,
            RUN - slot,
            table_ptr,
            items_ptr + 2 * newer,
            total_ptr,
            ready_ptr,
            lr,
            weight_decay,
            P,
            GRAFT,
            LR_THERE,
            BAND,
            COLUMNS,
            RUN,
            L,
        )


def split(n, chain, band, lines):
    """-> how many elements of a tensor of n a chunk takes, and whether chunks need a halo."""
    most = 4 * lines * (30 if band else 32)
    if band == 0 or n <= most:
        return most, False
    if chain <= most and chain % 4 == 0:
        return most // chain * chain, False
    return most, True


@functools.lru_cache(64)
def arrange(sizes, apart, run, lag):
    """-> the first program of each tensor and how many it has, for tensors of `sizes` (elements, elements of a chunk); all programs; and
    who does what, in which order, (2 P, 2) int32: a tensor and the run of which to take the statistics, or, as -1 - tensor, to
    apply u to. A tensor's updates begin `lag` programs after the last of its statistics, each between two of later tensors; `apart` all
    come last."""
    counts = torch.tensor([-(-n // (chunk * run)) for n, chunk in sizes])
    ends, P = counts.cumsum(0), int(counts.sum())
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)  # (P,)
    part = torch.arange(P) - (ends - counts)[tensor]
    when = torch.cat([torch.arange(P), ends[tensor] + (P if apart else lag) + part])
    items = torch.stack([torch.cat([tensor, -1 - tensor]), part.repeat(2)], 1)[
        when.argsort(stable=True)
    ].int()
    return list(zip((ends - counts).tolist(), counts.tolist())), P, items


TABLES, RECORDED = {}, []  # of late, as gradients tend to be where they were; of CUDA graphs


def there(key, make, device):
    """-> make() on the device, or what it was with the same key of late. What a CUDA graph copies and reads at each replay is never freed,
    and until it is replayed, nothing has been copied."""
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = TABLES.get((key, device))
    if not found:
        host = (
            make().pin_memory() if device.type == "cuda" else make()
        )  # not pinned, the host would wait
        found = host.to(device, non_blocking=True), host
        if not recording:
            TABLES[key, device] = found
            if len(TABLES) > 128:
                del TABLES[next(iter(TABLES))]
    if recording:
        RECORDED.append(found)
    return found[0]


def step(works, beta1, beta2, eps, gamma, graft_eps, lr, weight_decay, graft, reduce=None):
    """One step for a list of works: p, g of one shape, m and S (list of band + 1) too, all contiguous on one device, step and skipped ()
    float32, chain the length of a chain. graft "adam", "none", or "plain": Adam's step, S_0 alone. lr: a number, or a tensor () there.
    reduce(totals) may sum (T, 3) over processes that hold other rows of the same tensors, given in the same order."""
    device, band = works[0].p.device, len(works[0].S) - 1
    lines, warps, runs, stages, lag, registers = CONFIG[band]
    assert lines >= warps, (
        "with fewer lanes than threads, some threads would read what others have overwritten"
    )
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    per, most, kept = RING[band]
    ring = (
        per * torch.cuda.get_device_properties(device).multi_processor_count
        if gluon and hopper and not reduce
        else 0
    )
    columns, jobs = HEAD.value + band + 1, {}
    for index, work in enumerate(works):
        n, (chunk, halo) = work.p.numel(), split(work.p.numel(), work.chain, band, lines)
        if n == 0:  # a shard without rows
            work.step.add_(1)
            continue
        arrays = [t.data_ptr() for t in (work.p, work.g, work.m, *work.S)]
        aligned = (
            n % 4 == 0 and (band == 0 or work.chain % 4 == 0) and not any(a % 16 for a in arrays)
        )
        # 8: the tensor's first program, 9: how many, 10: its totals, come between the two
        row = (
            (*arrays[:3], work.step.data_ptr(), work.skipped.data_ptr(), n, work.chain, chunk),
            (index, arrays[3:]),
        )
        stays = (
            aligned and n <= ring * kept * chunk
        )  # of more than two runs a program the rest would wait for ever
        jobs.setdefault(
            (work.p.dtype, work.g.dtype, work.m.dtype, halo, aligned, stays), []
        ).append(row)
    totals = torch.zeros(len(works), 3, device=device)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    lr_there = torch.is_tensor(lr) and lr.device == device
    numbers = (
        float(beta1),
        float(beta2),
        1.0 - beta1,
        1.0 - beta2,
        *logs,
        float(eps),
        float(gamma),
        float(graft_eps),
        lr if lr_there else float(lr),
        float(weight_decay),
    )

    with torch.cuda.device_of(works[0].p):
        launches = []
        for (*dtypes, halo, aligned, stays), rows in jobs.items():
            sizes = tuple(head[5::2] for head, _ in rows)
            run = kept if stays else runs
            how = sizes, stays or reduce is not None, run, lag
            places, programs, order = arrange(*how)
            rows = tuple(
                (*head, *place, index, *S) for (head, (index, S)), place in zip(rows, places)
            )
            table = there(rows, lambda: torch.tensor(rows), device)
            P, G, M = (TYPES[d] for d in dtypes)
            aside = torch.empty(programs * run if halo else 0, band + 3, 8, device=device)
            if halo:
                apart = sizes, True, run, lag
                statistics_alone = there(apart, lambda: arrange(*apart)[2], device)
                halo_kernel[(programs,)](
                    table, statistics_alone, aside, G, M, band, columns, run, num_warps=1
                )
            items = there(how, lambda: order, device)
            tensors = (
                table,
                items,
                aside,
                torch.empty(programs, 3, device=device),
                totals,
                torch.zeros(2 * len(rows) + 1, dtype=torch.int32, device=device),
            )  # done, ready; the next run
            if stays:
                constants = (
                    P,
                    G,
                    M,
                    band,
                    graft == "plain",
                    graft == "adam",
                    lr_there,
                    halo,
                    columns,
                    lines,
                    run,
                )
                ring_kernel[(min(ring, programs),)](
                    *tensors,
                    programs,
                    len(rows),
                    *numbers,
                    *constants,
                    num_warps=warps,
                    maxnreg=most,
                    launch_cooperative_grid=True,
                )  # all run at once, or none
                continue
            constants = (
                P,
                G,
                M,
                band,
                graft == "plain",
                graft == "adam",
                lr_there,
                halo,
                aligned,
                columns,
                lines,
                run,
                stages,
            )

            def launch(
                item0,
                n,
                tensors=tensors,
                constants=constants,
                T=len(rows),
                limit=registers if aligned and hopper else None,
            ):
                step_kernel[(n,)](
                    *tensors, item0, T, *numbers, *constants, num_warps=warps, maxnreg=limit
                )

            launches.append((launch, programs))
        for launch, programs in launches:
            launch(0, programs if reduce else 2 * programs)
        if reduce:
            reduce(totals)
            for launch, programs in launches:
                launch(programs, programs)
    torch.autograd.graph.increment_version([work.p for work in works])


# What test_all.py builds ahead of time: kernel, argument types, constants, arguments that are multiples of 16, warps, stages, most
# registers, architectures
def builds():
    types = {
        "table_ptr": "*i64",
        **dict.fromkeys(("items_ptr", "count_ptr"), "*i32"),
        **dict.fromkeys(("halo_ptr", "partial_ptr", "total_ptr"), "*fp32"),
        **dict.fromkeys(("item0", "runs", "tensors"), "i32"),
        **dict.fromkeys(
            (
                "beta1",
                "beta2",
                "new1",
                "new2",
                "log_beta1",
                "log_beta2",
                "eps",
                "gamma",
                "graft_eps",
                "lr",
                "weight_decay",
            ),
            "fp32",
        ),
    }
    fp32, bf16 = tl.float32, tl.bfloat16
    for G, M, band, plain, halo, aligned in (
        (fp32, fp32, 1, False, True, True),
        (fp32, fp32, 4, False, True, True),
        (bf16, bf16, 1, False, False, True),
        (bf16, fp32, 4, False, True, False),
        (fp32, fp32, 0, True, False, True),
    ):
        lines, warps, run, stages, _, registers = CONFIG[band]
        constants = {
            "P": G,
            "G": G,
            "M": M,
            "BAND": band,
            "PLAIN": plain,
            "GRAFT": not plain,
            "LR_THERE": False,
            "HALO": halo,
            "COLUMNS": HEAD.value + band + 1,
            "LINES": lines,
            "RUN": run,
        }
        for most, arches in ((registers if aligned else None, (90,)), (None, (80, 100, 120))):
            yield (
                step_kernel,
                types,
                {**constants, "ALIGNED": aligned, "STAGES": stages},
                (),
                warps,
                3,
                most,
                arches,
            )
        if gluon and aligned:
            yield (
                ring_kernel,
                types,
                {**constants, "RUN": RING[band][2]},
                (),
                warps,
                3,
                RING[band][1],
                (90,),
            )
    constants = {"G": fp32, "M": fp32, "BAND": 4, "COLUMNS": HEAD.value + 5, "RUN": CONFIG[4][2]}
    yield halo_kernel, types, constants, (), 1, 3, None, (80, 90, 100, 120)


AOT = list(builds())
