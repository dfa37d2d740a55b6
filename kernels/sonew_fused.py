"""SONew's step in Triton, fused: one launch computes the statistics, the norms and the update.

Symbols are those of sonew.py: parameters p, gradient g, momentum m, statistics S_k[i] = the running
mean of g_i g_{i+k} for k = 0 ... b (b: the band), direction u, and Adam's step a.

A tensor is cut into chunks of at most 1024 elements (b = 0), 960 (b = 1) or 480 (b > 1). A program
takes a run: RUN consecutive chunks.
Half of the programs update m and S_k of their run, write u and sum a^2, u^2 and sqrt(S_0). The last
of a tensor's programs to finish adds up the sums of all of them, in a fixed order. The other half
of the programs wait for that and apply u: p -= lr (graft u + weight_decay p), graft = |a| / |u|.
These have higher numbers than those that they wait for. As programs start in order, none waits for
a program that has not started.

Memory traffic per fp32 parameter: read g, m, S_k; write m, S_k; write and read u; read and write p:
8 b + 36 bytes where sonew.py needs 12 b + 48 (AdamW: 28). For 125 M parameters at b = 1, an H200
copies as many bytes in 1.32 ms; measured: 1.42 ms (NOTES.md, step 6).

Limits: sizes and, if b > 0, chains are multiples of 4 elements, and addresses of 16 bytes; tensors
are not sharded.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.sonew import (
    CHAIN,
    CHUNK,
    FIRST_PROGRAM,
    G_PTR,
    M_PTR,
    P_PTR,
    PROGRAMS,
    S_PTR,
    SIZE,
    SUMS,
    Plan,
    add_partial_sums,
    load_pointer,
    load_step_size,
    load_units,
    make_options,
    solve,
    table_rows,
    update_counters,
)

try:
    from triton.experimental.gluon import language as gl
except ImportError:  # an older Triton; without Gluon no call passes a layout
    gl = None


class Config(NamedTuple):
    lines: int  # lines per chunk; a line is 128 consecutive elements
    warps: int  # warps per program
    run: int  # consecutive chunks per program
    stages: int  # stages of the software pipeline
    lag: int  # programs between a tensor's last statistics and its first update of p
    registers: int | None  # limit per thread on Hopper, where all of this was timed


CONFIG = {  # key: the band b
    0: Config(lines=8, warps=8, run=8, stages=1, lag=1024, registers=48),
    1: Config(lines=8, warps=4, run=8, stages=1, lag=1024, registers=96),
    2: Config(lines=4, warps=4, run=16, stages=1, lag=1024, registers=96),
    3: Config(lines=4, warps=4, run=16, stages=1, lag=1024, registers=96),
    4: Config(lines=4, warps=4, run=16, stages=1, lag=1024, registers=96),
}
FAR = tl.constexpr(2**29)  # longer than any chunk

# --------------------------------------------------------------------------------------------------
# Shifts. A chunk of elements is in a block x [32, LINES, 4], indexed by lane, line and phase. Lanes
# are the 32 threads of a warp. A lane has 4 consecutive elements of each line, called a quad, and
# their phases are 0 ... 3. Where the band is not 0, lines overlap by the quads in brackets:
#     lane            0                1          ...        30                31
#     line 0   (e-4  ... e-1 )   e0   ... e3     ...   e116 ... e119   (e120 ... e123)
#     line 1   (e116 ... e119)   e120 ... e123   ...   e236 ... e239   (e240 ... e243)
# An element needs those up to 4 before and after it. They are in the same lane or in the lane next
# to it, from which a warp shuffle gets them. Lanes 0 and 31 lack a neighbour: they serve lanes 1
# and 30, and their own results are not stored. Shuffles take one phase of a block, [32, LINES], at
# a time. The argument L is the layout of blocks in Gluon, None in Triton.


@triton.jit
def split_quads(x, LINES: tl.constexpr):
    """Return x[:, :, 0] ... x[:, :, 3], [32, LINES] each (the phases). No data changes threads."""
    # reshape the phases 0 1 2 3 to [[0, 1], [2, 3]]; tl.split returns the columns of the last axis
    even, odd = tl.split(tl.reshape(x, (32, LINES, 2, 2)))  # phases 0 and 2, phases 1 and 3
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join_quads(phases, LINES: tl.constexpr, L: tl.constexpr):
    """Return x [32, LINES, 4] with x[:, :, p] = phases[p], for p = 0 ... 3. L: layout, or None."""
    # undo split_quads. tl.join makes the columns of a new last axis from its arguments: (0, 2) and
    # (1, 3) become [[0, 1], [2, 3]], which is reshaped to 0 1 2 3
    even = tl.join(phases[0], phases[2])
    odd = tl.join(phases[1], phases[3])
    x = tl.reshape(tl.join(even, odd), (32, LINES, 4))
    return x if L is None else gl.convert_layout(x, L, assert_trivial=True)


@triton.jit
def shuffle(x, lane, distance: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """Return y [32, LINES] with y[lane] = x[lane + distance]; lanes are clamped to 0 ... 31.

    L: the layout of blocks in Gluon, None in Triton.
    """
    source = tl.minimum(tl.maximum(lane + distance, 0), 31)
    source = tl.broadcast_to(source[:, None], (32, LINES))
    if L is not None:
        source = gl.convert_layout(source, x.type.layout, assert_trivial=True)
    return tl.gather(x, source, 0)


@triton.jit
def shift(x, lane, k: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """Return y [32, LINES, 4] with y[i] = x[i + k] for each element i of a line, 0 <= k <= 4.

    It is wrong in the last lane, which has no next lane.
    """
    if k == 0:
        return x
    # take the eight consecutive elements that are in this lane and in the next, and return the four
    # from number k on; for k = 1, e0 e1 e2 e3 | e4 e5 e6 e7 becomes e1 e2 e3 e4
    eight = split_quads(x, LINES)
    for phase in tl.static_range(4):
        eight = eight + (shuffle(eight[phase], lane, 1, LINES, L),)
    return join_quads((eight[k], eight[k + 1], eight[k + 2], eight[k + 3]), LINES, L)


@triton.jit
def sum_of_shifts_back(x, lane, BAND: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """Return y[i] = sum_k x_k[i - k], k = 1 ... BAND; x is the tuple of blocks x_1 ... x_BAND.

    x_k[i] is what element i sends to element i + k, and y[i] is what element i receives. A lane has
    4 consecutive elements, its phases 0 ... 3. Phase p gets x_k from phase p - k of the lane. If
    that is negative, it is phase p - k + 4 of the lane before. So the first lane is wrong. With
    BAND = 2, where x_k[j]' is phase j of the lane before, the four phases of y are

        x_1[3]' + x_2[2]'     x_1[0] + x_2[3]'     x_1[1] + x_2[0]     x_1[2] + x_2[1]

    Each lane adds up the terms that the next lane needs for a phase, x_1[3] + x_2[2] for phase 0.
    So one sum per phase is shuffled to the next lane, not each term.
    """
    quads = ()  # quads[k - 1][j] is x_k[j], phase j of x_k in all lanes: [32, LINES]
    for k in tl.static_range(BAND):
        quads = quads + (split_quads(x[k], LINES),)
    sums = ()  # sums[phase] is that phase of y, [32, LINES]: the sum of x_k[phase - k]
    for phase in tl.static_range(4):
        if phase < BAND:
            # the terms with phase - k < 0 are in the lane before, at phase - k + 4: add them up
            # there, then get their sum. For phase 0 and BAND = 2: x_1[3] + x_2[2]
            total = quads[phase][3]  # k = phase + 1
            for k in tl.static_range(phase + 2, BAND + 1):
                total += quads[k - 1][phase - k + 4]
            total = shuffle(total, lane, -1, LINES, L)
            # the terms with phase - k >= 0 are in this lane; for phase 1: x_1[0]
            for k in tl.static_range(1, phase + 1):
                total += quads[k - 1][phase - k]
        else:
            # phase >= BAND, so all terms are in this lane. For phase 2: x_1[1] + x_2[0]
            total = quads[0][phase - 1]  # k = 1
            for k in tl.static_range(2, BAND + 1):
                total += quads[k - 1][phase - k]
        sums = sums + (total,)
    return join_quads(sums, LINES, L)


# --------------------------------------------------------------------------------------------------
# Chunks. Where chains cross the ends of chunks, a chunk also reads the quads next to it, its halo:
#     .... chunk 0 ....|....... chunk 1 .......|.... chunk 2 ....
#                [quad]                         [quad]              the halo of chunk 1
# m and S_k are updated in place, so the program of chunk 0 or 2 may already have updated the quad.
# That is why halo_kernel copies all halos beforehand.


class Index(NamedTuple):
    """Coordinates of the elements of a block [32, LINES, 4]: three vectors 0, 1, 2, ..."""

    lane: tl.tensor  # [32], the thread of the warp
    line: tl.tensor  # [LINES]
    phase: tl.tensor  # [4], the position among the 4 consecutive elements of a lane


class Tensors(NamedTuple):
    """The gradient and the state of one parameter."""

    g_ptr: tl.tensor  # gradient
    m_ptr: tl.tensor  # momentum
    S_ptrs: tuple  # statistics S_0 ... S_BAND
    chain: tl.tensor  # elements per chain; an element's successors are in its chain
    chunk: tl.tensor  # elements per chunk


@triton.jit
def aligned_pointer(row_ptr, column: tl.constexpr, DTYPE: tl.constexpr):
    """Return the address of a tensor, from its row of the table, as a pointer to DTYPE elements.

    The address is a multiple of 16 bytes. The compiler loads a quad at once only if it knows that.
    """
    # not load_pointer(): tl.multiple_of has no effect on what a call returned
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(ptr, 16)


@triton.jit
def load_tensors(row_ptr, GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr):
    """Return the Tensors of a row of the table."""
    g_ptr = aligned_pointer(row_ptr, G_PTR, GRAD)
    m_ptr = aligned_pointer(row_ptr, M_PTR, STATE)
    S_ptrs = ()
    for k in tl.static_range(BAND + 1):
        S_ptrs = S_ptrs + (aligned_pointer(row_ptr, S_PTR + k, STATE),)
    return Tensors(g_ptr, m_ptr, S_ptrs, tl.load(row_ptr + CHAIN), tl.load(row_ptr + CHUNK))


@triton.jit
def chunk_bounds(chunk_index, chunk, n):
    """Return where a chunk of a tensor of n elements starts (int64), and its length (int32).

    chunk: elements per chunk; the last chunk may be shorter. n = 20, chunk = 8: chunk 2 starts at
    16 and has length 4.
    """
    start = chunk_index * chunk
    length = tl.minimum(n - start, chunk).to(tl.int32)
    return tl.multiple_of(start, 4), tl.multiple_of(length, 4)


@triton.jit
def chunk_offsets(index, length, chunk, BAND: tl.constexpr, HALO: tl.constexpr):
    """Return which elements of a chunk of `length` elements each lane, line and phase holds.

    quad [32, LINES, 1]: number of the quad (4 elements) in the chunk; -1 is before its start.
    offs [32, LINES, 4]: offset of the element from the start of the chunk, 4 quad + phase.
    load_mask, store_mask [32, LINES, 4]: which elements to load, and which of these to store.
    """
    # With a band, lines overlap. Lanes 0 and 31, in brackets, are not stored:
    #     lane           0   1 ... 30  31
    #     line 0: quad (-1)  0 ... 29 (30)
    #     line 1: quad (29) 30 ... 59 (60)
    OVERLAP: tl.constexpr = 1 if BAND > 0 else 0
    lane = index.lane[:, None, None]
    quad = index.line[None, :, None] * (32 - 2 * OVERLAP) + lane - OVERLAP
    offs = 4 * quad + index.phase[None, None, :]

    # load the chunk, and with a halo the quads before and after it; do not store overlapping lanes
    is_inside = (offs >= 0) & (offs < length)
    load_mask = is_inside | (quad < 0) | (offs >= chunk) if HALO else is_inside
    store_mask = is_inside & (lane >= OVERLAP) & (lane < 32 - OVERLAP)
    return quad, offs, load_mask, store_mask


@triton.jit
def load_quads(ptr, quad, phase, mask, halo_ptr, array: tl.constexpr, chunk, HALO: tl.constexpr):
    """Load quads, 4 elements each, of an array's chunk at ptr. Return [32, LINES, 4] in float32.

    quad [32, LINES, 1]: their numbers in the chunk. array: 0 for g, 1 for m, 2 + k for S_k. With
    HALO, the quads before and after the chunk are read from their copies, halo_ptr (BAND + 3, 8):
    row `array` has the 4 elements before the chunk, then the 4 after it.
    """
    # -- address of each quad, in the tensor or among the copies --
    QUAD_BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2  # 4 elements, bits / 8
    ptrs = ptr + 4 * quad
    if HALO:
        copies = (halo_ptr + array * 8).to(ptr.dtype) + tl.where(quad < 0, 0, 4)  # before, after
        is_outside = (quad < 0) | (4 * quad >= chunk)
        ptrs = tl.where(is_outside, copies, ptrs)

    # -- load; the compiler has to know the alignment to load a quad at once --
    ptrs = tl.multiple_of(ptrs, (QUAD_BYTES, QUAD_BYTES, QUAD_BYTES))
    return tl.load(ptrs + phase, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def distance_to_chain_end(offs, start, chain, HALO: tl.constexpr):
    """Return how many elements there are from offs to the end of their chain, inclusive.

        chains     ...........|..................|..........
        the chunk                   ^ start
                              |-----| start_in_chain
                                    |------------| start_to_end

    offs: offsets from the start of the chunk. chain: elements per chain. Without HALO, chunks start
    with a chain. Distances from the start are at most FAR, so that they fit into int32.
    chain = 8, start_in_chain = 5: offs -6 -5 ... -1 0 1 2 3 4 -> distance 1 8 ... 4 3 2 1 8 7
    """
    start_in_chain = start % chain if HALO else start * 0
    start_to_end = tl.minimum(chain - start_in_chain, FAR).to(tl.int32)
    start_in_chain = tl.minimum(start_in_chain, FAR).to(tl.int32)
    chain = tl.minimum(chain, 2 * FAR).to(tl.int32)

    # x > 0: offs is in the chain of the start, so x is the distance; otherwise in a later chain
    x = start_to_end - offs
    distance = tl.where(x > 0, x, chain - (-x) % chain)
    # position in the chain of the start; it is negative in an earlier chain, which ends at -1
    position = start_in_chain + offs
    return tl.where(position < 0, (-position - 1) % chain + 1, distance)


@triton.jit
def update_statistics(
    index, tensors, start, length, halo_ptr, units, options,
    STATE: tl.constexpr, BAND: tl.constexpr, ADAM: tl.constexpr, HALO: tl.constexpr,
    LINES: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Update the momentum m and the statistics S_0 ... S_BAND of one chunk in place.

    start, length: where the chunk starts in the tensor, and how many elements it has.
    Returns the direction u [32, LINES, 4], and the sums of a^2 (a: Adam's step), u^2 and sqrt(S_0)
    over each quad, [32, LINES].
    """
    lane = index.lane
    phase = index.phase[None, None, :]
    chunk = tensors.chunk
    quad, offs, load_mask, store_mask = chunk_offsets(index, length, chunk, BAND, HALO)

    # -- load arrays 0 (g), 1 (m) and 2 + k (S_k) --
    # all before the first store: two lines of a block have some elements in common, and the second
    # must not load what the first has stored
    g_ptr = tensors.g_ptr + start
    g = load_quads(g_ptr, quad, phase, load_mask, halo_ptr, 0, chunk, HALO)
    m_ptr = tensors.m_ptr + start
    m = load_quads(m_ptr, quad, phase, load_mask, halo_ptr, 1, chunk, HALO)
    old_S = ()  # a tuple of blocks, as kernels have no lists
    for k in tl.static_range(BAND + 1):
        S_ptr = tensors.S_ptrs[k] + start
        S_k = load_quads(S_ptr, quad, phase, load_mask, halo_ptr, 2 + k, chunk, HALO)
        old_S = old_S + (S_k,)
    if BAND > 0:
        tl.debug_barrier()  # no thread stores before all threads have loaded

    # -- momentum; a gradient that is not finite counts as 0 --
    is_good = g * g < float("inf")  # false for NaN too
    bad = tl.sum(tl.where(is_good, 0.0, float("inf")), 2)  # of each quad: 0, or inf
    g = tl.where(is_good, g, 0.0)
    m = options.beta1 * m + options.new1 * g
    tl.store(m_ptr + offs, m.to(STATE), mask=store_mask, eviction_policy="evict_first")
    m *= units.m_factor

    # -- statistics: S_k[i] = beta2 S_k[i] + (1 - beta2) g[i] g[i+k] --
    if BAND > 0:
        # elements to the end of the chain: chains are whole quads, so find it for each quad first
        to_chain_end = distance_to_chain_end(4 * quad, start, tensors.chain, HALO) - phase
    S = ()
    for k in tl.static_range(BAND + 1):
        product = g * shift(g, lane, k, LINES, L)  # g[i] g[i+k]
        if k > 0:  # there is no successor past the end of the chain
            product = tl.where(to_chain_end > k, product, 0.0)
        new_S = options.beta2 * old_S[k] + options.new2 * product
        S_ptr = tensors.S_ptrs[k] + start
        tl.store(S_ptr + offs, new_S.to(STATE), mask=store_mask, eviction_policy="evict_first")
        S = S + (new_S * units.S_factor,)

    # -- Adam's step a; sums over quads; a gradient that is not finite makes sum_root inf --
    root = tl.sqrt(S[0])
    a = tl.where(root > 0, m / root, 0.0)
    sum_a = tl.sum(tl.where(store_mask, a * a, 0.0), 2)
    sum_root = tl.sum(tl.where(store_mask, root, 0.0), 2) + bad

    # -- direction u --
    u = a if ADAM else precondition(m, S, lane, units, options, BAND, LINES, L)
    sum_u = tl.sum(tl.where(store_mask, u * u, 0.0), 2)
    return u, sum_a, sum_u, sum_root


@triton.jit
def precondition(
    m, S, lane, units, options, BAND: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Return the direction u = L diag(1/s) L^T m, as factor and precondition in sonew.py do.

    m, and each S[k] of the tuple S: [32, LINES, 4], in units of the scale, not damped yet.
    In the formula, L is a matrix made of psi (below); the argument L is the layout.
    """
    # -- psi_k[i]: weight of g[i+k] in predicting g[i]; s[i]: mean squared error of that --
    # each element i has its own equations W psi = c. W[p][q], q <= p, is the running mean of
    # g[i+1+p] g[i+1+q], which is S[p-q] at i+1+q; c[p] is that of g[i] g[i+1+p], S[p+1] at i
    # BAND = 2: W = ((S_0[i+1],), (S_1[i+1], S_0[i+2])) and c = (S_1[i], S_2[i]), S_0 being damped
    S0 = S[0] + options.eps  # damped
    W = ()  # a tuple of tuples, as kernels have no lists
    c = ()
    variance = ()
    for p in tl.static_range(BAND):
        row = ()
        for q in tl.static_range(p):
            row = row + (shift(S[p - q], lane, q + 1, LINES, L),)  # W[p][q]
        diagonal = shift(S0, lane, p + 1, LINES, L)  # W[p][p]
        W = W + (row + (diagonal,),)
        c = c + (S[p + 1],)
        variance = variance + (diagonal,)
    psi, s = solve(W, c, variance, S0, options.gamma, BAND)

    # -- edge removal: where s is too small, psi = 0 and s = S0 --
    # while there is no scale, gamma_or_inf is inf, so psi = 0 everywhere, and s = 1: u = m
    keep = s > units.gamma_or_inf * S0
    s = tl.where(keep, s, tl.where(units.has_scale, S0, 1.0))
    kept_psi = ()
    for k in tl.static_range(BAND):
        kept_psi = kept_psi + (tl.where(keep, psi[k], 0.0),)

    # -- w = diag(1/s) L^T m: w[i] = (m[i] - sum_k psi_k[i] m[i+k]) / s[i] --
    w = m
    for k in tl.static_range(1, BAND + 1):
        w -= kept_psi[k - 1] * shift(m, lane, k, LINES, L)
    w = tl.where(s > 0, w / s, 0.0)

    # -- u = L w: u[i] = w[i] - sum_k psi_k[i-k] w[i-k], from the elements before i --
    x = ()  # x[k - 1][i] = psi_k[i] w[i], what element i subtracts from element i+k
    for k in tl.static_range(BAND):
        x = x + (kept_psi[k] * w,)
    u = w
    if BAND > 0:
        u -= sum_of_shifts_back(x, lane, BAND, LINES, L)
    return u


# --------------------------------------------------------------------------------------------------
# Norms


@triton.jit
def add3(x0, x1, x2, y0, y1, y2):
    """Add x0 and y0, x1 and y1, x2 and y2: tl.reduce sums three blocks at once with this."""
    return x0 + y0, x1 + y1, x2 + y2


@triton.jit
def publish_sums(
    offs, sums, own_ptr, partial_ptr, programs, total_ptr, done_ptr, ready_ptr, BLOCK: tl.constexpr
):
    """Store this program's sums; the last program of a tensor adds up those of all.

    Returns whether this is the last. sums: three blocks [32, LINES], of a^2, u^2 and sqrt(S_0).
    partial_ptr (programs, SUMS): the sums of the tensor's programs; own_ptr: this program's row.
    total_ptr (SUMS,): what they add up to. ready_ptr: becomes 1 when total_ptr is written.
    done_ptr: how many of the tensor's programs have stored their sums. offs: 0 ... BLOCK - 1.
    """
    # -- reduce each block over lines, then lanes: [32, LINES] -> [32] -> (). Store the 3 sums --
    sums = tl.reduce(tl.reduce(sums, 1, add3), 0, add3)
    for column in tl.static_range(SUMS):
        tl.store(own_ptr + column, sums[column])

    # -- count this program; the last one adds up the sums of all programs --
    # the barrier and acq_rel make sure that all have been stored before it reads them
    tl.debug_barrier()
    is_last = tl.atomic_add(done_ptr, 1, sem="acq_rel") == programs - 1
    if is_last:
        add_partial_sums(offs, partial_ptr, programs, total_ptr, BLOCK)
        tl.debug_barrier()
        tl.atomic_xchg(ready_ptr, 1, sem="release")
    return is_last


@triton.jit
def wait_for_sums(ready_ptr):
    """Wait until a tensor's last program has added up the sums, and has set ready_ptr to 1."""
    while tl.atomic_add(ready_ptr, 0, sem="acquire") == 0:
        pass


# --------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def halo_kernel(
    table_ptr, items_ptr,  # int64: (T, COLUMNS); (programs, 2), tensor and run of each program
    halo_ptr,  # (programs, RUN, BAND + 3, 2, 4) of GRAD and STATE
    GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Copy the halos of a run of RUN chunks: the quads (4 elements) before and after each chunk.

    Other programs may change these while a chunk is computed. Array 0 is g, 1 is m, 2 + k is S_k.
    """
    # -- find this program's run: a row of items has the tensor and the number of the run in it --
    item_ptr = items_ptr + tl.program_id(0) * 2
    row_ptr = table_ptr + tl.load(item_ptr) * COLUMNS
    run = tl.load(item_ptr + 1)
    n = tl.load(row_ptr + SIZE)  # elements of the tensor
    chunk = tl.load(row_ptr + CHUNK)  # elements per chunk

    # -- elements 0 ... 3 of a halo are the quad before the chunk, 4 ... 7 the quad after it --
    #     | 0 1 2 3 |      chunk      | 4 5 6 7 |
    c = tl.arange(0, triton.next_power_of_2(RUN))[:, None]  # number of the chunk in the run
    element = tl.arange(0, 8)[None, :]  # of the halo
    start = (run * RUN + c) * chunk
    offs = start + tl.where(element < 4, element - 4, chunk + element - 4)  # [RUN or more, 8]
    mask = (offs >= 0) & (offs < n) & (c < RUN)
    # the halos of all chunks are (programs * RUN, BAND + 3, 8): skip to that of each chunk c
    halo_ptr += ((tl.load(row_ptr + FIRST_PROGRAM) + run) * RUN + c) * (BAND + 3) * 8

    # -- copy them, array by array --
    for array in tl.static_range(BAND + 3):
        if array == 0:
            ptr = load_pointer(row_ptr, G_PTR, GRAD)
        elif array == 1:
            ptr = load_pointer(row_ptr, M_PTR, STATE)
        else:
            ptr = load_pointer(row_ptr, S_PTR + array - 2, STATE)
        x = tl.load(ptr + offs, mask=mask, other=0.0)
        tl.store((halo_ptr + array * 8).to(ptr.dtype) + element, x, mask=c < RUN)


@triton.jit(do_not_specialize=["n_tensors"])
def step_kernel(
    table_ptr,  # (T, COLUMNS) int64: addresses and sizes of each tensor
    items_ptr,  # (2 programs, 2) int64: the tensor and the run of each program, from `schedule`
    halo_ptr,  # (programs, RUN, BAND + 3, 8): copies of the elements next to each chunk
    u_ptr,  # room for (programs, RUN, 128 LINES); the u of a tensor have no gaps between chunks
    partial_ptr, total_ptr,  # sums over each run (programs, SUMS), and over each tensor (T, SUMS)
    counters_ptr, n_tensors,  # int32: T numbers of runs that are done, T flags: sums are ready
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,  # new = 1 - beta
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr,
    ADAM: tl.constexpr, LR_ON_DEVICE: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of a run (RUN consecutive chunks of a tensor), or apply its update."""
    options = make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay)

    # -- take a work item: statistics of (tensor, run), or where it has -1 - tensor, their update --
    items_ptr += 2 * tl.program_id(0)
    tensor = tl.load(items_ptr).to(tl.int32)
    run = tl.load(items_ptr + 1).to(tl.int32)
    is_update = tensor < 0
    tensor = tl.where(is_update, -1 - tensor, tensor)

    # -- find the tensor, and which of its chunks are in the run: run * RUN ... end - 1 --
    row_ptr = table_ptr + tensor * COLUMNS
    done_ptr = counters_ptr + tensor
    ready_ptr = counters_ptr + n_tensors + tensor
    total_ptr += tensor * SUMS
    n = tl.load(row_ptr + SIZE)  # elements of the tensor
    chunk = tl.load(row_ptr + CHUNK)  # elements per chunk
    first = tl.load(row_ptr + FIRST_PROGRAM)  # how many runs the tensors before this one have
    end = tl.minimum((run + 1) * RUN, tl.cdiv(n, chunk).to(tl.int32))
    u_ptr += first * (RUN * 128 * LINES)  # u of this tensor

    if is_update:
        # -- wait for the sums of a^2 and u^2 over the tensor; update p with graft = |a| / |u| --
        p_ptr = aligned_pointer(row_ptr, P_PTR, PARAM)
        wait_for_sums(ready_ptr)
        rate, graft = load_step_size(total_ptr, lr, LR_ON_DEVICE, ADAM)
        for c in tl.range(run * RUN, end, num_stages=STAGES):
            start, length = chunk_bounds(c, chunk, n)
            offs = tl.arange(0, 128 * LINES)
            mask = offs < length
            u = tl.load(u_ptr + start + offs, mask=mask, other=0.0, cache_modifier=".cg")
            p_ptrs = p_ptr + start + offs
            p = tl.load(p_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            p -= rate * (graft * u + options.weight_decay * p)
            tl.store(p_ptrs, p.to(PARAM), mask=mask, eviction_policy="evict_first")
        if run == 0:
            update_counters(row_ptr, total_ptr)
    else:
        # -- update m and S_k and write u, chunk by chunk; sums are per quad, [32, LINES] --
        index = Index(tl.arange(0, 32), tl.arange(0, LINES), tl.arange(0, 4))
        tensors = load_tensors(row_ptr, GRAD, STATE, BAND)
        units = load_units(row_ptr, options)
        zero = tl.zeros((32, LINES), tl.float32)
        sum_a = zero
        sum_u = zero
        sum_root = zero
        for c in tl.range(run * RUN, end, num_stages=STAGES):
            start, length = chunk_bounds(c, chunk, n)
            chunk_halo_ptr = halo_ptr + (first * RUN + c) * (BAND + 3) * 8  # (BAND + 3, 8)
            u, chunk_a, chunk_u, chunk_root = update_statistics(
                index, tensors, start, length, chunk_halo_ptr, units, options,
                STATE, BAND, ADAM, HALO, LINES, None,  # L, the layout: none in Triton
            )  # fmt: skip
            _, offs, _, store_mask = chunk_offsets(index, length, chunk, BAND, HALO)
            tl.store(u_ptr + start + offs, u, mask=store_mask, eviction_policy="evict_last")
            sum_a += chunk_a
            sum_u += chunk_u
            sum_root += chunk_root

        # -- publish this program's sums, and count it as done --
        sums = (sum_a, sum_u, sum_root)
        programs = tl.load(row_ptr + PROGRAMS).to(tl.int32)
        partial_ptr += first * SUMS
        own_ptr = partial_ptr + run * SUMS
        publish_sums(
            tl.arange(0, 1024), sums, own_ptr, partial_ptr, programs,
            total_ptr, done_ptr, ready_ptr, 1024,  # BLOCK, programs added at a time
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Launch


def has_hopper(device):
    """Return whether sonew_hopper.py runs on a device: it needs a Hopper GPU, and Gluon."""
    if gl is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def is_aligned(param):
    """Return whether a LocalParam is aligned in memory, with chains of whole quads (4 elements)."""
    n = param.p.numel()
    if n == 0 or n % 4 or (param.band > 0 and param.chain % 4):
        return False
    statistics = [param.state[f"s{k}"] for k in range(param.band + 1)]
    tensors = (param.p, param.grad, param.state["m"], *statistics)
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def chunk_size(param):
    """Return how many elements a chunk of a LocalParam has, and whether chunks need a halo.

    The halo is a copy of the elements next to a chunk. A chunk of whole chains needs none: with
    at most 960 elements per chunk and chains of 256, a chunk is 3 chains, 768 elements.
    """
    lanes = 30 if param.band else 32  # with a band, a line stores 30 of its 32 quads
    most = 4 * CONFIG[param.band].lines * lanes  # 4 elements per lane
    if param.band == 0 or param.p.numel() <= most:
        return most, False
    if param.chain <= most:  # as many whole chains as fit
        return most // param.chain * param.chain, False
    return most, True


@functools.lru_cache(64)
def schedule(n_programs, lag):
    """Order the work of a launch, given how many programs each tensor needs for its statistics.

    Returns in_order (P, 2), the tensor and the run of chunks of each of these programs, and items
    (2 P, 2), the order of step_kernel: the same with the updates of p, which have -1 - tensor. The
    updates of a tensor begin `lag` programs after its statistics, and alternate with statistics of
    later tensors. For n_programs = (2, 3) and lag = 0, statistics s and updates u of (tensor, run):
        s(0,0) s(0,1) s(1,0) u(0,0) s(1,1) u(0,1) s(1,2) u(1,0) u(1,1) u(1,2)
    """
    # programs of the statistics; for n_programs = (2, 3), tensor is 0 0 1 1 1, and run 0 1 0 1 2
    counts = torch.tensor(n_programs)
    ends = counts.cumsum(0)  # where the programs of a tensor end, among all programs
    P = int(counts.sum())
    tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (P,)
    run = torch.arange(P) - (ends - counts)[tensor]
    in_order = torch.stack([tensor, run], 1)
    updates = torch.stack([-1 - tensor, run], 1)

    # sort by time: program i of the statistics has time i, and its update ends[tensor] + lag + run
    update_times = ends[tensor] + lag + run
    order = torch.cat([torch.arange(P), update_times]).argsort(stable=True)  # (2 P,)
    return in_order, torch.cat([in_order, updates])[order]


class FusedPlan(Plan):
    """A step in two launches: halo_kernel, if chunks need it, and step_kernel."""

    def __init__(self, params, needs_halo):
        super().__init__(params)
        self.needs_halo = needs_halo
        self.config = CONFIG[self.band]
        if self.config.lines < self.config.warps:
            raise ValueError("a chunk needs at least as many lines as warps, or threads would race")
        self.prepare(params, self.config.run, self.config.lag)

    def prepare(self, params, run, lag):
        """Make the tables, and the memory that launches share.

        run: consecutive chunks per program. lag: as in `schedule`.
        """
        self.run = run

        # table of tensors: each has consecutive programs, one per run of its chunks
        chunks = [chunk_size(param)[0] for param in params]
        n_programs = []
        first_programs = []
        self.n_programs = 0
        for param, chunk in zip(params, chunks, strict=True):
            first_programs.append(self.n_programs)
            n_programs.append(triton.cdiv(param.p.numel(), chunk * run))
            self.n_programs += n_programs[-1]
        rows = table_rows(params, chunks, first_programs, n_programs)
        in_order, items = schedule(tuple(n_programs), lag)
        self.table, self.in_order, self.items = self.upload(rows, in_order, items)

        # memory: a halo per chunk, a row of sums per program and per tensor, and counters: two for
        # each tensor, and one for the runs that sonew_hopper.py has started
        n_halos = self.n_programs * run if self.needs_halo else 0
        self.halos = torch.empty(n_halos, self.band + 3, 8, device=self.device)
        self.partial = torch.empty(self.n_programs, SUMS.value, device=self.device)
        self.totals = torch.empty(len(params), SUMS.value, device=self.device)
        self.counters = torch.empty(2 * len(params) + 1, dtype=torch.int32, device=self.device)

    def copy_halos(self):
        if self.needs_halo:
            _, *dtypes = self.dtypes  # GRAD and STATE; the first is PARAM
            constants = (*dtypes, self.band, self.table.shape[1], self.run)
            tensors = (self.table, self.in_order, self.halos)
            halo_kernel[(self.n_programs,)](*tensors, *constants, num_warps=1)

    def step(self, numbers, lr_on_device):
        # step_kernel's arguments: `tensors` are table_ptr ... counters_ptr, `numbers` are beta1 ...
        # weight_decay, and `constants` are PARAM ... HALO, and then COLUMNS, LINES, RUN and STAGES
        self.copy_halos()
        self.counters.zero_()  # no program has published its sums yet
        lines = self.config.lines
        u = torch.empty(self.n_programs * self.run * 128 * lines, device=self.device)
        tensors = (self.table, self.items, self.halos, u, self.partial, self.totals, self.counters)
        constants = (*self.dtypes, self.band, self.is_adam, lr_on_device, self.needs_halo)
        constants = (*constants, self.table.shape[1], lines, self.run, self.config.stages)
        step_kernel[(2 * self.n_programs,)](
            *tensors, self.n_tensors, *numbers, *constants,
            num_warps=self.config.warps,
            maxnreg=self.config.registers if has_hopper(self.device) else None,
        )  # fmt: skip
