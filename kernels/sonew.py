"""SONew's step over many tensors at once; see sonew.py for the method.

1. halo_kernel, only where chains are longer than chunks: copies g, m and S beside each chunk, since
   state is updated in place and a neighbour could find it updated already.
2. step_kernel, one program per run of chunks. Half of the programs update m and S, write u and sum
   |a|^2, |u|^2 and sqrt(S_0); the last program of a tensor to finish adds the sums, always in the
   same order. The other half then apply u: p -= lr (scale u + wd p). They are numbered a little
   later, and programs start in the order of their numbers.
   Where u fits into shared memory (Hopper), ring_kernel of sonew_hopper.py does the same.

A chunk is a tile of lines of 32 lanes, 4 consecutive elements (a quad) per lane, so that the next
b <= 4 elements are in the same thread or one lane further on. Lines overlap by two quads, whose
lanes only serve their neighbours. A table of pointers and sizes lets one launch serve all tensors.

Memory traffic per fp32 parameter, band b: g, m, S_0..S_b read; m, S_0..S_b written; p read and
written; u written and read: 8 b + 36 bytes (28 for AdamW); without u, in sonew_hopper.py, 8 b + 28.
Floor on an H200 for 125 M parameters at b = 1: 1.06 ms; measured times are in results/kernels.json.

Limits: band 0 to 4; float32, float16, bfloat16 parameters; float32 or bfloat16 state; float32
arithmetic. NOTES.md tells what was tried.
"""

import functools
import math

import torch
import triton
import triton.language as tl

try:
    from triton.experimental.gluon import language as gl
except ImportError:  # an older Triton; without Gluon no call passes a layout
    gl = None

# By band: lines of a chunk, warps, chunks of a run, stages of a pipeline, after how many programs a
# tensor's updates follow its statistics, and the most registers of a thread on Hopper, where all of
# this was timed
CONFIG = {
    0: (8, 8, 8, 1, 1024, 48),
    1: (8, 4, 8, 1, 1024, 96),
    **dict.fromkeys((2, 3, 4), (4, 4, 16, 1, 1024, 96)),
}
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FAR = tl.constexpr(2**29)  # no lane is as far from the end of its chain as this
LEAST_SCALE = tl.constexpr(1e-15)  # below it, squares of gradients lose their digits

# Columns of the table, one row per tensor; S_PTR is that of S_0, the first of band + 1
P_PTR = tl.constexpr(0)
G_PTR = tl.constexpr(1)
M_PTR = tl.constexpr(2)
STEP_PTR = tl.constexpr(3)
SKIPPED_PTR = tl.constexpr(4)
SCALE_PTR = tl.constexpr(5)
SIZE = tl.constexpr(6)  # elements here
WHOLE_SIZE = tl.constexpr(7)  # elements on all processes
CHAIN = tl.constexpr(8)  # elements of a chain
CHUNK = tl.constexpr(9)  # elements of a chunk
FIRST_PROGRAM = tl.constexpr(10)  # of those that update its statistics
PROGRAMS = tl.constexpr(11)
TOTALS = tl.constexpr(12)  # its row in total_ptr
S_PTR = tl.constexpr(13)

SUMS = tl.constexpr(3)  # |a|^2, |u|^2, and sqrt(S_0), which a bad gradient makes inf


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
    table_ptr, items_ptr,  # (T, COLUMNS), (P, 2)
    halo_ptr,  # (P RUN, BAND + 3, 2, 4) of G and M
    G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    item = items_ptr + tl.program_id(0) * 2
    row_ptr = table_ptr + tl.load(item) * COLUMNS
    run = tl.load(item + 1)
    n = tl.load(row_ptr + SIZE)
    chunk = tl.load(row_ptr + CHUNK)
    sub = tl.arange(0, triton.next_power_of_2(RUN))[:, None]
    o = tl.arange(0, 8)[None, :]
    # [RUN, 8]: the quads before the chunks and after them
    i = (run * RUN + sub) * chunk + tl.where(o < 4, o - 4, chunk + o - 4)
    there = (i >= 0) & (i < n) & (sub < RUN)
    halo_ptr += ((tl.load(row_ptr + FIRST_PROGRAM) + run) * RUN + sub) * (BAND + 3) * 8
    for slot in tl.static_range(BAND + 3):
        if slot == 0:
            ptr = pointer(row_ptr, G_PTR, G, False)
        elif slot == 1:
            ptr = pointer(row_ptr, M_PTR, M, False)
        else:
            ptr = pointer(row_ptr, S_PTR + slot - 2, M, False)
        x = tl.load(ptr + i, mask=there, other=0.0)
        tl.store((halo_ptr + slot * 8).to(ptr.dtype) + o, x, mask=sub < RUN)


@triton.jit
def places(
    ptr, quad, phase, halo_ptr, slot: tl.constexpr, chunk, HALO: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pointers [32, LINES, 4] to a chunk's quads [32, LINES, 1].

    With HALO, those before and after the chunk point to the copies that halo_kernel made.
    """
    QUAD_BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2
    ptrs = ptr + 4 * quad
    if HALO:
        aside = (halo_ptr + slot * 8).to(ptr.dtype) + tl.where(quad < 0, 0, 4)
        ptrs = tl.where((quad < 0) | (4 * quad >= chunk), aside, ptrs)
    if ALIGNED:
        ptrs = tl.multiple_of(ptrs, (QUAD_BYTES, QUAD_BYTES, QUAD_BYTES))
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
    reads = there | (quad < 0) | (o >= chunk) if HALO else there
    own = there & (lane >= EDGE) & (lane < 32 - EDGE)
    return quad, o, reads, own


@triton.jit
def statistics(
    index, g_ptr, m_ptr, S_ptrs, start, length, chunk, chain, halo_ptr,
    correct1, correct2, weight, eps, gamma,  # of units()
    beta1, beta2, new1, new2,  # new = 1 - beta, rounded once
    M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr, HALO: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Update m and S of one chunk in place.

    Returns u [32, LINES, 4], and the SUMS of each line and lane, a tuple of [32, LINES].
    """
    lane = index[0]
    phase = index[2][None, None, :]
    quad, o, reads, own = tile(index, length, chunk, BAND, HALO)
    g_ptrs = places(g_ptr + start, quad, phase, halo_ptr, 0, chunk, HALO, ALIGNED)
    g = tl.load(g_ptrs, mask=reads, other=0.0).to(tl.float32)
    m_ptrs = places(m_ptr + start, quad, phase, halo_ptr, 1, chunk, HALO, ALIGNED)
    m = tl.load(m_ptrs, mask=reads, other=0.0).to(tl.float32)
    old = ()
    for k in tl.static_range(BAND + 1):
        S_k_ptrs = places(S_ptrs[k] + start, quad, phase, halo_ptr, 2 + k, chunk, HALO, ALIGNED)
        old = old + (tl.load(S_k_ptrs, mask=reads, other=0.0).to(tl.float32),)
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
        tl.store(S_ptrs[k] + start + o, new.to(M), mask=own, eviction_policy="evict_first")
        S = S + (new * correct2,)
    root = tl.sqrt(S[0])
    a = tl.where(root > 0, m / root, 0.0)

    if PLAIN:
        u = a
    else:
        S0 = weight * S[0] + eps
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
    sum_root = tl.sum(tl.where(own, tl.where(good, root, float("inf")), 0.0), 2)
    sum_u = tl.sum(tl.where(own, u * u, 0.0), 2)
    return u, (sum_a, sum_u, sum_root)


@triton.jit
def units(row_ptr, log_beta1, log_beta2, eps, gamma):
    """Factors that correct the bias of m and S and divide them by the tensor's scale and its square.

    Returns both, and weight, eps and gamma, with which S_0 is damped, weight S_0 + eps, and edges
    are removed. Without a scale, after gradients of 0, S_0 becomes 1 and has no edges: u is m.
    """
    t = tl.load(pointer(row_ptr, STEP_PTR, tl.float32, False)) + 1
    scale = tl.load(pointer(row_ptr, SCALE_PTR, tl.float32, False))
    has_scale = scale > LEAST_SCALE
    unit = tl.where(has_scale, scale, 1.0)
    correct1 = 1 / (one_minus_power(t, log_beta1) * unit)
    correct2 = 1 / (one_minus_power(t, log_beta2) * (unit * unit))
    weight = tl.where(has_scale, 1.0, 0.0)
    eps = tl.where(has_scale, tl.cast(eps, tl.float32), 1.0)
    gamma = tl.where(has_scale, tl.cast(gamma, tl.float32), float("inf"))
    return correct1, correct2, weight, eps, gamma


@triton.jit
def norms(offs, partial_ptr, programs, total_ptr, BLOCK: tl.constexpr):
    """Add up the sums of a tensor's programs, in their order, whoever does it. offs: [BLOCK]."""
    for column in tl.static_range(SUMS):
        ptrs = partial_ptr + offs * SUMS + column
        acc = tl.load(ptrs, mask=offs < programs, other=0.0, cache_modifier=".cg")
        for begin in range(BLOCK, programs, BLOCK):
            mask = begin + offs < programs
            acc += tl.load(ptrs + begin * SUMS, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr + column, tl.sum(acc, 0))


@triton.jit
def awaited(ready_ptr, total_ptr, lr, LR_THERE: tl.constexpr, PLAIN: tl.constexpr):
    """Wait for a tensor's norms. Returns the learning rate, 0 if a gradient was bad, and u's scale."""
    while tl.atomic_add(ready_ptr, 0, sem="acquire") == 0:
        pass
    rate = tl.load(lr).to(tl.float32) if LR_THERE else tl.cast(lr, tl.float32)
    sum_root = tl.load(total_ptr + 2, cache_modifier=".cg")
    rate = tl.where(sum_root < float("inf"), rate, 0.0)
    scale = tl.cast(1.0, tl.float32)
    if not PLAIN:
        norm_a = tl.sqrt(tl.load(total_ptr, cache_modifier=".cg"))
        norm_u = tl.sqrt(tl.load(total_ptr + 1, cache_modifier=".cg"))
        scale = tl.where(norm_u > 0, norm_a / norm_u, 0.0)
    return rate, scale


@triton.jit
def publish(
    offs, sums, own_ptr, partial_ptr, programs, total_ptr, done_ptr, ready_ptr, BLOCK: tl.constexpr
):
    """Store a program's sums; the last program of a tensor adds them all. Returns whether it did."""
    sums = tl.reduce(tl.reduce(sums, 1, add3), 0, add3)
    for column in tl.static_range(SUMS):
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
    """Write a tensor's counters, and its scale for the next step. One program per tensor does."""
    step_ptr = pointer(row_ptr, STEP_PTR, tl.float32, False)
    tl.store(step_ptr, tl.load(step_ptr) + 1)
    skipped_ptr = pointer(row_ptr, SKIPPED_PTR, tl.float32, False)
    sum_root = tl.load(total_ptr + 2, cache_modifier=".cg")
    is_good = sum_root < float("inf")
    tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(is_good, 0.0, 1.0))

    # the sum is in units of the scale so far, which stays after a bad gradient
    scale_ptr = pointer(row_ptr, SCALE_PTR, tl.float32, False)
    scale = tl.load(scale_ptr)
    unit = tl.where(scale > LEAST_SCALE, scale, 1.0)
    whole_size = tl.load(row_ptr + WHOLE_SIZE).to(tl.float32)
    tl.store(scale_ptr, tl.where(is_good, sum_root / whole_size * unit, scale))


@triton.jit
def apply(
    p_ptr, u_ptr, start, length, rate, scale, weight_decay, P: tl.constexpr, BLOCK: tl.constexpr
):
    """p -= rate (scale u + weight_decay p), for one chunk."""
    o = tl.arange(0, BLOCK)
    own = o < length
    u = tl.load(u_ptr + start + o, mask=own, other=0.0, cache_modifier=".cg")
    p = tl.load(p_ptr + start + o, mask=own, other=0.0, eviction_policy="evict_first")
    p = p.to(tl.float32)
    p -= rate * (scale * u + weight_decay * p)
    tl.store(p_ptr + start + o, p.to(P), mask=own, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["item0", "tensors"])
def step_kernel(
    table_ptr, items_ptr,  # (T, COLUMNS) int64; (2 P, 2): tensor or -1 - tensor, run
    halo_ptr, u_ptr,  # (P RUN, BAND + 3, 2, 4), (P RUN 128 LINES)
    partial_ptr, total_ptr,  # (P, SUMS), (all tensors, SUMS)
    count_ptr,  # (2 T + 1): programs done, whether the norms are ready, next run
    item0, tensors,
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr,
    LR_THERE: tl.constexpr, HALO: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr,
    RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # what to do: the statistics of a run, or (tensor < 0) the update with its u
    items_ptr += 2 * (tl.program_id(0) + item0)
    tensor = tl.load(items_ptr)
    run = tl.load(items_ptr + 1)
    applying = tensor < 0
    tensor = tl.where(applying, -1 - tensor, tensor)

    # its tensor
    row_ptr = table_ptr + tensor * COLUMNS
    done_ptr = count_ptr + tensor
    ready_ptr = count_ptr + tensors + tensor
    total_ptr += tl.load(row_ptr + TOTALS) * SUMS
    n = tl.load(row_ptr + SIZE)
    chunk = tl.load(row_ptr + CHUNK)
    first = tl.load(row_ptr + FIRST_PROGRAM)
    last = tl.minimum((run + 1) * RUN, tl.cdiv(n, chunk).to(tl.int32))
    u_ptr += first * (RUN * 128 * LINES)

    if applying:  # programs start in order: what this one waits for has begun
        p_ptr = pointer(row_ptr, P_PTR, P, ALIGNED)
        weight_decay = tl.cast(weight_decay, tl.float32)
        rate, scale = awaited(ready_ptr, total_ptr, lr, LR_THERE, PLAIN)
        for c in tl.range(run * RUN, last, num_stages=STAGES):
            start, length = place_of(c, chunk, n, ALIGNED)
            apply(p_ptr, u_ptr, start, length, rate, scale, weight_decay, P, 128 * LINES)
        if run == 0:
            count(row_ptr, total_ptr)
    else:
        index = (tl.arange(0, 32), tl.arange(0, LINES), tl.arange(0, 4))
        g_ptr = pointer(row_ptr, G_PTR, G, ALIGNED)
        m_ptr = pointer(row_ptr, M_PTR, M, ALIGNED)
        S_ptrs = ()
        for k in tl.static_range(BAND + 1):
            S_ptrs = S_ptrs + (pointer(row_ptr, S_PTR + k, M, ALIGNED),)
        chain = tl.load(row_ptr + CHAIN)
        correct1, correct2, weight, eps, gamma = units(row_ptr, log_beta1, log_beta2, eps, gamma)
        beta1 = tl.cast(beta1, tl.float32)
        beta2 = tl.cast(beta2, tl.float32)
        new1 = tl.cast(new1, tl.float32)
        new2 = tl.cast(new2, tl.float32)
        zero = tl.zeros((32, LINES), tl.float32)
        sum_a, sum_u, sum_root = zero, zero, zero
        for c in tl.range(run * RUN, last, num_stages=STAGES):
            start, length = place_of(c, chunk, n, ALIGNED)
            halo = halo_ptr + (first * RUN + c) * (BAND + 3) * 8
            _, o, _, own = tile(index, length, chunk, BAND, HALO)
            u, sums = statistics(
                index, g_ptr, m_ptr, S_ptrs, start, length, chunk, chain, halo, correct1, correct2, weight, eps, gamma,
                beta1, beta2, new1, new2, M, BAND, PLAIN, HALO, ALIGNED, LINES, None,
            )  # fmt: skip
            tl.store(u_ptr + start + o, u, mask=own, eviction_policy="evict_last")
            sum_a += sums[0]
            sum_u += sums[1]
            sum_root += sums[2]
        sums = (sum_a, sum_u, sum_root)
        partial_ptr += first * SUMS
        programs = tl.load(row_ptr + PROGRAMS).to(tl.int32)
        offs = tl.arange(0, 1024)
        own_ptr = partial_ptr + run * SUMS
        publish(offs, sums, own_ptr, partial_ptr, programs, total_ptr, done_ptr, ready_ptr, 1024)


# --------------------------------------------------------------------------------------------------
# Launch


def chunk_size(n, chain, band, lines):
    """Return how many elements of a tensor of n a chunk takes, and whether chunks need a halo."""
    most = 4 * lines * (30 if band else 32)
    if band == 0 or n <= most:
        return most, False
    if chain <= most and chain % 4 == 0:
        return most // chain * chain, False
    return most, True


@functools.lru_cache(64)
def schedule(sizes, updates_last, run, lag):
    """Plan the programs for tensors of `sizes`, pairs of elements and elements of a chunk.

    Returns the first program and the number of programs of each tensor, the number of all, P, and
    what they do in which order, (2 P, 2) int32: a tensor and a run of chunks whose statistics to
    update, or -1 - tensor to apply their u. A tensor's updates begin `lag` programs after the last
    of its statistics, alternating with statistics of later tensors; with updates_last, after all.
    """
    counts = torch.tensor([-(-n // (chunk * run)) for n, chunk in sizes])
    ends = counts.cumsum(0)
    firsts = ends - counts
    P = int(counts.sum())
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)  # (P,)
    part = torch.arange(P) - firsts[tensor]

    # program i of the statistics has time i, its update a later one
    updates = ends[tensor] + (P if updates_last else lag) + part
    order = torch.cat([torch.arange(P), updates]).argsort(stable=True)  # (2 P,)
    items = torch.stack([torch.cat([tensor, -1 - tensor]), part.repeat(2)], 1)
    return firsts.tolist(), counts.tolist(), P, items[order].int()


recent_tables = {}  # (contents, device) -> device and host tensor; pointers mostly stay the same
captured_tables = []  # those that CUDA graphs copy and read at each replay: never freed


def on_device(key, make, device):
    """Return the tensor make() on the device, or a recent one of the same key."""
    if device.type != "cuda":
        return make().to(device)
    is_capturing = torch.cuda.is_current_stream_capturing()
    tables = recent_tables.get((key, device))
    if tables is None:
        host = make().pin_memory()  # otherwise the copy would wait for the device
        tables = host.to(device, non_blocking=True), host
        if not is_capturing:  # until a graph is replayed, nothing has been copied
            recent_tables[key, device] = tables
            if len(recent_tables) > 128:
                del recent_tables[next(iter(recent_tables))]
    if is_capturing:
        captured_tables.append(tables)
    return tables[0]


def count_empty(param, sums):
    """Do what count does, for a shard without rows, which no program serves. sums: (3,)."""
    state = param.state
    is_good = sums[2] < math.inf
    state["step"] += 1
    state["skipped"] += ~is_good
    scale = state["scale"]
    unit = torch.where(scale > LEAST_SCALE.value, scale, 1)
    scale.copy_(torch.where(is_good, sums[2] / max(1, param.numel) * unit, scale))


def step(params, *, lr, weight_decay, beta1, beta2, eps, gamma, all_reduce=None):
    """Take one step for a list of LocalParam of sonew.py, all on one device and of one band.

    Their tensors are contiguous. A parameter of fewer than two dimensions takes Adam's step; all
    are of that kind, or none. lr: a number, or a tensor () on the device. all_reduce(sums) adds
    sums (T, 3) over the processes that hold other rows of the same parameters, in the same order.
    """
    device = params[0].p.device
    plain = params[0].is_plain
    band = params[0].band
    lines, warps, run, stages, lag, registers = CONFIG[band]
    if lines < warps:
        raise ValueError("a chunk needs at least as many lines as warps, or threads would race")
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    hopper = None
    if is_hopper and gl is not None and all_reduce is None:
        from kernels import sonew_hopper as hopper  # it imports this file

    # sort into jobs: tensors of one launch share dtypes and layout
    jobs = {}
    for index, param in enumerate(params):
        n = param.p.numel()
        if n == 0:
            continue
        state = param.state
        S = [state[f"s{k}"] for k in range(band + 1)]
        chunk, halo = chunk_size(n, param.chain, band, lines)
        pointers = [t.data_ptr() for t in (param.p, param.grad, state["m"])]
        counters = [state[name].data_ptr() for name in ("step", "skipped", "scale")]
        S_pointers = [t.data_ptr() for t in S]
        aligned = n % 4 == 0 and (band == 0 or param.chain % 4 == 0)
        aligned = aligned and all(address % 16 == 0 for address in pointers + S_pointers)
        fits_ring = aligned and hopper is not None and n <= hopper.capacity(band, device) * chunk
        before = (*pointers, *counters, n, param.numel, param.chain, chunk)
        key = (param.p.dtype, param.grad.dtype, state["m"].dtype, halo, aligned, fits_ring)
        jobs.setdefault(key, []).append((before, index, S_pointers))

    # numbers
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    lr_there = torch.is_tensor(lr) and lr.device == device
    lr = lr if lr_there else float(lr)
    numbers = (float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2, *logs)
    numbers = (*numbers, float(eps), float(gamma), lr, float(weight_decay))

    totals = torch.zeros(len(params), SUMS.value, device=device)
    with torch.cuda.device_of(totals):
        launches = []
        for (*dtypes, halo, aligned, fits_ring), job in jobs.items():
            run_chunks = hopper.CONFIG[band].run if fits_ring else run
            sizes = tuple((before[SIZE.value], before[CHUNK.value]) for before, _, _ in job)
            plan = (sizes, fits_ring or all_reduce is not None, run_chunks, lag)
            firsts, counts, programs, items = schedule(*plan)
            rows = []
            for (before, index, S_pointers), first, count in zip(job, firsts, counts, strict=True):
                rows.append((*before, first, count, index, *S_pointers))
            columns = len(rows[0])
            table = on_device(tuple(rows), functools.partial(torch.tensor, rows), device)
            items = on_device(plan, items.clone, device)

            P, G, M = (TYPES[dtype] for dtype in dtypes)
            halos = torch.empty(programs * run_chunks if halo else 0, band + 3, 8, device=device)
            if halo:
                # the items of the statistics alone: those of a plan with the updates last
                statistics_plan = (sizes, True, run_chunks, lag)
                statistics_items = schedule(*statistics_plan)[3]
                statistics_items = on_device(statistics_plan, statistics_items.clone, device)
                halo_kernel[(programs,)](
                    table, statistics_items, halos, G, M, band, columns, run_chunks, num_warps=1
                )

            partial = torch.empty(programs, SUMS.value, device=device)
            counters = torch.zeros(2 * len(rows) + 1, dtype=torch.int32, device=device)
            constants = (P, G, M, band, plain, lr_there, halo)
            if fits_ring:
                tensors = (table, items, halos, partial, totals, counters)
                constants = (*constants, columns, lines, run_chunks)
                hopper.launch(band, device, tensors, programs, len(rows), numbers, constants, warps)
                continue
            u = torch.empty(programs * run_chunks * 128 * lines, device=device)
            tensors = (table, items, halos, u, partial, totals, counters)
            constants = (*constants, aligned, columns, lines, run_chunks, stages)
            limit = registers if aligned and is_hopper else None
            launches.append((tensors, len(rows), constants, limit, programs))

        def launch(part, first_item, n):
            tensors, T, constants, limit, _ = part
            options = {"num_warps": warps, "maxnreg": limit}
            step_kernel[(n,)](*tensors, first_item, T, *numbers, *constants, **options)

        for part in launches:
            programs = part[-1]
            launch(part, 0, 2 * programs if all_reduce is None else programs)
        if all_reduce is not None:
            all_reduce(totals)
            for part in launches:
                launch(part, part[-1], part[-1])

    for param, sums in zip(params, totals, strict=True):
        if param.p.numel() == 0:
            count_empty(param, sums)
    torch.autograd.graph.increment_version([param.p for param in params])
