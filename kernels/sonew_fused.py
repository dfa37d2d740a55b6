"""SONew's step in Triton, fused: one launch computes the statistics, the norms and the update.

Half of the programs update m and S of a run of consecutive chunks, write the direction u and sum
|a|^2 (a: Adam's step), |u|^2 and sqrt(S_0). The last program of a tensor adds all its sums, always
in the same order. The other half wait for them and apply u: p -= lr (graft u + weight_decay p).
They have higher numbers, and programs start in that order: none waits for one not yet started.

Where chains are longer than chunks, halo_kernel first copies the elements next to each chunk: m and
S are updated in place, so a neighbouring program could otherwise read them already updated.

A chunk is a tile of LINES x 32 lanes x 4 elements (a quad), one lane per thread: the next b <= 4
elements are in the same thread or in the next lane, a warp shuffle away. Lines overlap by two
quads, whose lanes only serve their neighbours.

Memory traffic per fp32 parameter, band b: read g, m, S_0 ... S_b; write m, S_0 ... S_b; write and
read u; read and write p: 8 b + 36 bytes where sonew.py needs 12 b + 48 (AdamW: 28). Floor on an
H200 for 125 M parameters at b = 1: 1.06 ms. Steps 1 and 6 in NOTES.md: 1.64 ms in three launches,
1.42 in one. Limits: quads, so sizes, chains and addresses are multiples of 4; tensors are not
sharded.
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
    lines: int  # of a chunk
    warps: int
    run: int  # chunks of a program
    stages: int  # of the software pipeline
    lag: int  # programs between the last one for a tensor's statistics and the first for its update
    registers: int | None  # most per thread on Hopper, where all of this was timed


CONFIG = {  # by band
    0: Config(lines=8, warps=8, run=8, stages=1, lag=1024, registers=48),
    1: Config(lines=8, warps=4, run=8, stages=1, lag=1024, registers=96),
    2: Config(lines=4, warps=4, run=16, stages=1, lag=1024, registers=96),
    3: Config(lines=4, warps=4, run=16, stages=1, lag=1024, registers=96),
    4: Config(lines=4, warps=4, run=16, stages=1, lag=1024, registers=96),
}
FAR = tl.constexpr(2**29)  # no lane is as far from the end of its chain as this

# --------------------------------------------------------------------------------------------------
# Shifts within a chunk. Blocks are [32, LINES, 4]: lane, line, and phase, the position in a quad of
# 4 consecutive elements. Element i of a line is in lane i // 4 at phase i % 4. L is the layout of
# blocks in Gluon, None in Triton.


@triton.jit
def split_quads(x, LINES: tl.constexpr):
    """[32, LINES, 4] -> 4 of [32, LINES], within each thread"""
    even, odd = tl.split(tl.reshape(x, (32, LINES, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def join_quads(y, LINES: tl.constexpr, L: tl.constexpr):
    """4 of [32, LINES] -> [32, LINES, 4], within each thread"""
    x = tl.reshape(tl.join(tl.join(y[0], y[2]), tl.join(y[1], y[3])), (32, LINES, 4))
    return x if L is None else gl.convert_layout(x, L, assert_trivial=True)


@triton.jit
def shuffle(x, lane, distance: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """Return x [32, LINES] from `distance` lanes further on, clamped to lanes 0 to 31."""
    source = tl.minimum(tl.maximum(lane + distance, 0), 31)
    source = tl.broadcast_to(source[:, None], (32, LINES))
    if L is not None:
        source = gl.convert_layout(source, x.type.layout, assert_trivial=True)
    return tl.gather(x, source, 0)


@triton.jit
def shift(x, lane, k: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """Return x[i + k] for each element i of a line, 0 <= k <= 4; wrong in the last lane."""
    if k == 0:
        return x
    # 8 consecutive elements: the quad of this lane, then that of the next
    eight = split_quads(x, LINES)
    for phase in tl.static_range(4):
        eight = eight + (shuffle(eight[phase], lane, 1, LINES, L),)
    return join_quads((eight[k], eight[k + 1], eight[k + 2], eight[k + 3]), LINES, L)


@triton.jit
def sum_of_shifts_back(x, lane, BAND: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr):
    """Return sum_k x_k[i - k] for the tuple x_1 ... x_BAND; wrong in the first lane.

    x_k[i - k] is in the same lane at phase(i) - k, or if that is negative, in the lane before at
    phase(i) - k + 4. Each lane adds up what the next lane needs, then shuffles 4 sums at most.
    """
    quads = ()  # x_k at a phase is quads[k - 1][phase]
    for k in tl.static_range(BAND):
        quads = quads + (split_quads(x[k], LINES),)
    sums = ()
    for phase in tl.static_range(4):
        if phase < BAND:
            # from the lane before: k > phase
            total = quads[phase][3]
            for k in tl.static_range(phase + 2, BAND + 1):
                total += quads[k - 1][phase - k + 4]
            total = shuffle(total, lane, -1, LINES, L)
            # from the same lane: k <= phase
            for k in tl.static_range(1, phase + 1):
                total += quads[k - 1][phase - k]
        else:
            # all from the same lane
            total = quads[0][phase - 1]
            for k in tl.static_range(2, BAND + 1):
                total += quads[k - 1][phase - k]
        sums = sums + (total,)
    return join_quads(sums, LINES, L)


# --------------------------------------------------------------------------------------------------
# Chunks


class Index(NamedTuple):
    """Coordinates of the elements of a chunk: three vectors 0, 1, 2, ..."""

    lane: tl.tensor  # [32]
    line: tl.tensor  # [LINES]
    phase: tl.tensor  # [4]


class Tensors(NamedTuple):
    """Pointers and sizes that the statistics of one parameter are computed from."""

    g_ptr: tl.tensor
    m_ptr: tl.tensor
    S_ptrs: tuple
    chain: tl.tensor  # elements of a chain
    chunk: tl.tensor  # elements of a chunk


@triton.jit
def aligned_pointer(row_ptr, column: tl.constexpr, DTYPE: tl.constexpr):
    """Load a pointer as load_pointer does, and tell the compiler it is a multiple of 16 bytes."""
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))  # load_pointer() loses the hint
    return tl.multiple_of(ptr, 16)


@triton.jit
def load_tensors(row_ptr, GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr):
    g_ptr = aligned_pointer(row_ptr, G_PTR, GRAD)
    m_ptr = aligned_pointer(row_ptr, M_PTR, STATE)
    S_ptrs = ()
    for k in tl.static_range(BAND + 1):
        S_ptrs = S_ptrs + (aligned_pointer(row_ptr, S_PTR + k, STATE),)
    return Tensors(g_ptr, m_ptr, S_ptrs, tl.load(row_ptr + CHAIN), tl.load(row_ptr + CHUNK))


@triton.jit
def chunk_bounds(chunk_index, chunk, n):
    """Return where a chunk of a tensor of n elements starts (int64), and its length (int32)."""
    start = chunk_index * chunk
    length = tl.minimum(n - start, chunk).to(tl.int32)
    return tl.multiple_of(start, 4), tl.multiple_of(length, 4)


@triton.jit
def chunk_offsets(index, length, chunk, BAND: tl.constexpr, HALO: tl.constexpr):
    """Return where the elements of a block are in a chunk of `length` elements.

    quad [32, LINES, 1]: number of the quad in the chunk, -1 for the one before. [32, LINES, 4]:
    offs, from the chunk's start; is_read: load it; is_own: it is this lane's to store.
    """
    # With a band, lines overlap: lanes 0 and 31 hold quads that the lines beside it store. So lanes
    # 0 to 31 hold quads -1 to 30 in line 0 and 29 to 60 in line 1.
    OVERLAP: tl.constexpr = 1 if BAND > 0 else 0
    lane = index.lane[:, None, None]
    quad = index.line[None, :, None] * (32 - 2 * OVERLAP) + lane - OVERLAP
    offs = 4 * quad + index.phase[None, None, :]
    is_inside = (offs >= 0) & (offs < length)
    # the halo, a copy of the quads before and after the chunk, is read as well
    is_read = is_inside | (quad < 0) | (offs >= chunk) if HALO else is_inside
    is_own = is_inside & (lane >= OVERLAP) & (lane < 32 - OVERLAP)
    return quad, offs, is_read, is_own


@triton.jit
def quad_pointers(ptr, quad, phase, halo_ptr, slot: tl.constexpr, chunk, HALO: tl.constexpr):
    """Return pointers [32, LINES, 4] to the elements of quads [32, LINES, 1] of the chunk at ptr.

    With HALO, quads before and after the chunk are read from the copies that halo_kernel made:
    slot 0 for g, 1 for m, 2 + k for S_k, with 4 elements before the chunk and 4 after it.
    """
    QUAD_BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 2  # 4 times bits / 8
    ptrs = ptr + 4 * quad
    if HALO:
        copies = (halo_ptr + slot * 8).to(ptr.dtype) + tl.where(quad < 0, 0, 4)
        ptrs = tl.where((quad < 0) | (4 * quad >= chunk), copies, ptrs)
    ptrs = tl.multiple_of(ptrs, (QUAD_BYTES, QUAD_BYTES, QUAD_BYTES))
    return ptrs + phase


@triton.jit
def distance_to_chain_end(offs, chain, start_in_chain, start_to_end):
    """Return how many elements there are from offs to the end of their chain, inclusive.

    start_in_chain: position of the chunk's start in its chain. start_to_end: elements from there to
    the chain's end.
    """
    x = start_to_end - offs
    distance = tl.where(x > 0, x, chain - (-x) % chain)  # x <= 0: in a later chain
    # elements before the chunk may be in an earlier chain
    position = start_in_chain + offs
    return tl.where(position < 0, (-position - 1) % chain + 1, distance)


@triton.jit
def update_statistics(
    index, tensors, start, length, halo_ptr, units, options,
    STATE: tl.constexpr, BAND: tl.constexpr, ADAM: tl.constexpr, HALO: tl.constexpr,
    LINES: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Update m and S of one chunk in place.

    Returns u [32, LINES, 4], and the sums of a^2, u^2 and sqrt(S_0) over each quad, [32, LINES].
    """
    lane = index.lane
    phase = index.phase[None, None, :]
    chunk = tensors.chunk
    quad, offs, is_read, is_own = chunk_offsets(index, length, chunk, BAND, HALO)

    # -- load everything before the first store: lines overlap, and each stores what others read --
    g_ptrs = quad_pointers(tensors.g_ptr + start, quad, phase, halo_ptr, 0, chunk, HALO)
    g = tl.load(g_ptrs, mask=is_read, other=0.0).to(tl.float32)
    m_ptrs = quad_pointers(tensors.m_ptr + start, quad, phase, halo_ptr, 1, chunk, HALO)
    m = tl.load(m_ptrs, mask=is_read, other=0.0).to(tl.float32)
    old_S = ()
    for k in tl.static_range(BAND + 1):
        S_ptr = tensors.S_ptrs[k] + start
        S_ptrs = quad_pointers(S_ptr, quad, phase, halo_ptr, 2 + k, chunk, HALO)
        old_S = old_S + (tl.load(S_ptrs, mask=is_read, other=0.0).to(tl.float32),)
    if BAND > 0:
        tl.debug_barrier()

    # -- momentum --
    is_good = g * g < float("inf")  # false for NaN too
    g = tl.where(is_good, g, 0.0)
    m = options.beta1 * m + options.new1 * g
    m_ptr = tensors.m_ptr + start
    tl.store(m_ptr + offs, m.to(STATE), mask=is_own, eviction_policy="evict_first")
    m *= units.m_factor

    # -- statistics --
    if BAND > 0:
        chain = tensors.chain
        start_in_chain = start % chain if HALO else start * 0
        start_to_end = tl.minimum(chain - start_in_chain, FAR).to(tl.int32)
        start_in_chain = tl.minimum(start_in_chain, FAR).to(tl.int32)
        chain = tl.minimum(chain, 2 * FAR).to(tl.int32)
        to_chain_end = distance_to_chain_end(4 * quad, chain, start_in_chain, start_to_end)
        to_chain_end = to_chain_end - phase  # a quad lies in one chain
    S = ()
    for k in tl.static_range(BAND + 1):
        product = g * shift(g, lane, k, LINES, L)
        if k > 0:
            product = tl.where(to_chain_end > k, product, 0.0)
        new_S = options.beta2 * old_S[k] + options.new2 * product
        S_ptr = tensors.S_ptrs[k] + start
        tl.store(S_ptr + offs, new_S.to(STATE), mask=is_own, eviction_policy="evict_first")
        S = S + (new_S * units.S_factor,)

    # -- directions --
    root = tl.sqrt(S[0])
    a = tl.where(root > 0, m / root, 0.0)
    u = a if ADAM else precondition(m, S, lane, units, BAND, LINES, L)

    # -- sums --
    root = tl.where(is_good, root, float("inf"))
    sum_a = tl.sum(tl.where(is_own, a * a, 0.0), 2)
    sum_root = tl.sum(tl.where(is_own, root, 0.0), 2)
    sum_u = tl.sum(tl.where(is_own, u * u, 0.0), 2)
    return u, sum_a, sum_u, sum_root


@triton.jit
def precondition(
    m, S, lane, units, BAND: tl.constexpr, LINES: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Return u = L diag(1/s) L^T m, as factor and precondition in sonew.py do."""
    # W[p][q] = S between i+1+p and i+1+q; c[p] = S between i and i+1+p
    S0 = units.S0_weight * S[0] + units.eps
    W = ()
    c = ()
    variance = ()
    for p in tl.static_range(BAND):
        row = ()
        for q in tl.static_range(p):
            row = row + (shift(S[p - q], lane, q + 1, LINES, L),)
        diagonal = shift(S0, lane, p + 1, LINES, L)
        W = W + (row + (diagonal,),)
        c = c + (S[p + 1],)
        variance = variance + (diagonal,)
    psi, s = solve(W, c, variance, S0, units.gamma, BAND)

    # edge removal
    keep = s > units.gamma * S0
    s = tl.where(keep, s, S0)

    # w = diag(1/s) L^T m
    w = m
    for k in tl.static_range(1, BAND + 1):
        w -= tl.where(keep, psi[k - 1], 0.0) * shift(m, lane, k, LINES, L)
    w = tl.where(s > 0, w / s, 0.0)

    # u = L w
    x = ()
    for k in tl.static_range(BAND):
        x = x + (tl.where(keep, psi[k], 0.0) * w,)
    u = w
    if BAND > 0:
        u -= sum_of_shifts_back(x, lane, BAND, LINES, L)
    return u


# --------------------------------------------------------------------------------------------------
# Norms


@triton.jit
def add3(x0, x1, x2, y0, y1, y2):
    return x0 + y0, x1 + y1, x2 + y2


@triton.jit
def publish_sums(
    offs, sums, own_ptr, partial_ptr, programs, total_ptr, done_ptr, ready_ptr, BLOCK: tl.constexpr
):
    """Store a program's sums; the last program of a tensor adds them all. Return whether it did."""
    sums = tl.reduce(tl.reduce(sums, 1, add3), 0, add3)
    for column in tl.static_range(SUMS):
        tl.store(own_ptr + column, sums[column])
    tl.debug_barrier()
    is_last = tl.atomic_add(done_ptr, 1, sem="acq_rel") == programs - 1
    if is_last:
        add_partial_sums(offs, partial_ptr, programs, total_ptr, BLOCK)
        tl.debug_barrier()
        tl.atomic_xchg(ready_ptr, 1, sem="release")
    return is_last


@triton.jit
def wait_for_sums(ready_ptr):
    while tl.atomic_add(ready_ptr, 0, sem="acquire") == 0:
        pass


# --------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def halo_kernel(
    table_ptr, items_ptr,  # (T, COLUMNS), (programs, 2) int64
    halo_ptr,  # (programs, RUN, BAND + 3, 2, 4) of GRAD and STATE
    GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Copy the quads beside each chunk: of g to slot 0, of m to slot 1, of S_k to slot 2 + k."""
    item_ptr = items_ptr + tl.program_id(0) * 2
    row_ptr = table_ptr + tl.load(item_ptr) * COLUMNS
    run = tl.load(item_ptr + 1)
    n = tl.load(row_ptr + SIZE)
    chunk = tl.load(row_ptr + CHUNK)

    # [RUN, 8]: the quads before the chunks and after them
    sub = tl.arange(0, triton.next_power_of_2(RUN))[:, None]  # chunk of the run
    o = tl.arange(0, 8)[None, :]
    offs = (run * RUN + sub) * chunk + tl.where(o < 4, o - 4, chunk + o - 4)
    mask = (offs >= 0) & (offs < n) & (sub < RUN)
    halo_ptr += ((tl.load(row_ptr + FIRST_PROGRAM) + run) * RUN + sub) * (BAND + 3) * 8

    for slot in tl.static_range(BAND + 3):
        if slot == 0:
            ptr = load_pointer(row_ptr, G_PTR, GRAD)
        elif slot == 1:
            ptr = load_pointer(row_ptr, M_PTR, STATE)
        else:
            ptr = load_pointer(row_ptr, S_PTR + slot - 2, STATE)
        x = tl.load(ptr + offs, mask=mask, other=0.0)
        tl.store((halo_ptr + slot * 8).to(ptr.dtype) + o, x, mask=sub < RUN)


@triton.jit
def update_params(
    p_ptr, u_ptr, start, length, rate, graft, weight_decay,
    PARAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p -= rate (graft u + weight_decay p), for one chunk"""
    offs = tl.arange(0, BLOCK)
    mask = offs < length
    u = tl.load(u_ptr + start + offs, mask=mask, other=0.0, cache_modifier=".cg")
    p_ptrs = p_ptr + start + offs
    p = tl.load(p_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    p -= rate * (graft * u + weight_decay * p)
    tl.store(p_ptrs, p.to(PARAM), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_tensors"])
def step_kernel(
    table_ptr, items_ptr,  # (T, COLUMNS), (2 programs, 2) int64: tensor or -1 - tensor, run
    halo_ptr, u_ptr,  # (programs, RUN, BAND + 3, 8), (programs, RUN, 128 LINES)
    partial_ptr, total_ptr,  # (programs, SUMS), (T, SUMS)
    counters_ptr,  # (2 T + 1) int32: programs done and whether the sums are ready; next run
    n_tensors,
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr,
    ADAM: tl.constexpr, LR_ON_DEVICE: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr,
    LINES: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    options = make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay)

    # select the work: the statistics of a run of chunks, or (tensor < 0) its update of p
    items_ptr += 2 * tl.program_id(0)
    tensor = tl.load(items_ptr).to(tl.int32)
    run = tl.load(items_ptr + 1).to(tl.int32)
    is_update = tensor < 0
    tensor = tl.where(is_update, -1 - tensor, tensor)

    # its tensor
    row_ptr = table_ptr + tensor * COLUMNS
    done_ptr = counters_ptr + tensor
    ready_ptr = counters_ptr + n_tensors + tensor
    total_ptr += tensor * SUMS
    n = tl.load(row_ptr + SIZE)
    chunk = tl.load(row_ptr + CHUNK)
    first = tl.load(row_ptr + FIRST_PROGRAM)
    end = tl.minimum((run + 1) * RUN, tl.cdiv(n, chunk).to(tl.int32))
    u_ptr += first * (RUN * 128 * LINES)

    if is_update:
        p_ptr = aligned_pointer(row_ptr, P_PTR, PARAM)
        wait_for_sums(ready_ptr)
        rate, graft = load_step_size(total_ptr, lr, LR_ON_DEVICE, ADAM)
        for c in tl.range(run * RUN, end, num_stages=STAGES):
            start, length = chunk_bounds(c, chunk, n)
            update_params(
                p_ptr, u_ptr, start, length, rate, graft, options.weight_decay, PARAM, 128 * LINES
            )
        if run == 0:
            update_counters(row_ptr, total_ptr)
    else:
        index = Index(tl.arange(0, 32), tl.arange(0, LINES), tl.arange(0, 4))
        tensors = load_tensors(row_ptr, GRAD, STATE, BAND)
        units = load_units(row_ptr, options)
        zero = tl.zeros((32, LINES), tl.float32)
        sum_a = zero
        sum_u = zero
        sum_root = zero
        for c in tl.range(run * RUN, end, num_stages=STAGES):
            start, length = chunk_bounds(c, chunk, n)
            chunk_halo_ptr = halo_ptr + (first * RUN + c) * (BAND + 3) * 8
            u, chunk_a, chunk_u, chunk_root = update_statistics(
                index, tensors, start, length, chunk_halo_ptr, units, options,
                STATE, BAND, ADAM, HALO, LINES, None,
            )  # fmt: skip
            _, offs, _, is_own = chunk_offsets(index, length, chunk, BAND, HALO)
            tl.store(u_ptr + start + offs, u, mask=is_own, eviction_policy="evict_last")
            sum_a += chunk_a
            sum_u += chunk_u
            sum_root += chunk_root

        sums = (sum_a, sum_u, sum_root)
        programs = tl.load(row_ptr + PROGRAMS).to(tl.int32)
        partial_ptr += first * SUMS
        own_ptr = partial_ptr + run * SUMS
        offs = tl.arange(0, 1024)
        publish_sums(
            offs, sums, own_ptr, partial_ptr, programs, total_ptr, done_ptr, ready_ptr, 1024
        )


# --------------------------------------------------------------------------------------------------
# Launch


def has_hopper(device):
    """Return whether sonew_hopper.py runs there: a GPU of the Hopper generation, and Gluon."""
    if gl is None or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def is_aligned(param):
    """Return whether a LocalParam is aligned in memory, and its chains are whole quads."""
    n = param.p.numel()
    if n == 0 or n % 4 or (param.band > 0 and param.chain % 4):
        return False
    statistics = [param.state[f"s{k}"] for k in range(param.band + 1)]
    tensors = (param.p, param.grad, param.state["m"], *statistics)
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def chunk_size(param):
    """Return how many elements a chunk of a LocalParam has, and whether chunks need a halo."""
    n = param.p.numel()
    lanes = 30 if param.band else 32  # without the two that overlap with other lines
    most = 4 * CONFIG[param.band].lines * lanes
    if param.band == 0 or n <= most:
        return most, False
    if param.chain <= most:
        return most // param.chain * param.chain, False
    return most, True


@functools.lru_cache(64)
def schedule(n_programs, lag):
    """Order the programs of a launch, given how many each tensor needs for its statistics.

    Returns (2 P, 2): a tensor and a run of chunks whose statistics to update, or -1 - tensor to
    apply their u. A tensor's updates begin `lag` programs after the last of its statistics, and
    alternate with statistics of later tensors. Without a lag, they come after all statistics.
    """
    counts = torch.tensor(n_programs)
    ends = counts.cumsum(0)
    P = int(counts.sum())
    tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (P,)
    run = torch.arange(P) - (ends - counts)[tensor]

    # sort by time: program i of the statistics has time i, its update a later one
    update_times = ends[tensor] + (P if lag is None else lag) + run
    order = torch.cat([torch.arange(P), update_times]).argsort(stable=True)  # (2 P,)
    items = torch.stack([torch.cat([tensor, -1 - tensor]), run.repeat(2)], 1)
    return items[order]


class FusedPlan(Plan):
    """halo_kernel, if chunks need it, and step_kernel."""

    def __init__(self, params, needs_halo):
        super().__init__(params)
        self.needs_halo = needs_halo
        self.config = CONFIG[self.band]
        if self.config.lines < self.config.warps:
            raise ValueError("a chunk needs at least as many lines as warps, or threads would race")
        self.prepare(params, self.config.run, self.config.lag)

    def prepare(self, params, run, lag):
        """Make the tables, and the memory that launches share."""
        self.run = run
        chunks = [chunk_size(param)[0] for param in params]
        n_programs = []
        first_programs = []
        self.n_programs = 0
        for param, chunk in zip(params, chunks, strict=True):
            first_programs.append(self.n_programs)
            n_programs.append(triton.cdiv(param.p.numel(), chunk * run))
            self.n_programs += n_programs[-1]
        rows = table_rows(params, chunks, first_programs, n_programs)

        # statistics only, in the order of the tensors, for halo_kernel; then statistics and updates
        in_order = schedule(tuple(n_programs), None)[: self.n_programs]
        items = schedule(tuple(n_programs), lag)
        self.table, self.in_order, self.items = self.upload(rows, in_order, items)

        n_halos = self.n_programs * run if self.needs_halo else 0
        self.halos = torch.empty(n_halos, self.band + 3, 8, device=self.device)
        self.partial = torch.empty(self.n_programs, SUMS.value, device=self.device)
        self.totals = torch.empty(len(params), SUMS.value, device=self.device)
        self.counters = torch.empty(2 * len(params) + 1, dtype=torch.int32, device=self.device)

    def copy_halos(self):
        if self.needs_halo:
            _, *dtypes = self.dtypes
            constants = (*dtypes, self.band, self.table.shape[1], self.run)
            tensors = (self.table, self.in_order, self.halos)
            halo_kernel[(self.n_programs,)](*tensors, *constants, num_warps=1)

    def step(self, numbers, lr_on_device):
        self.copy_halos()
        self.counters.zero_()
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
