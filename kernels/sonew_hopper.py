"""SONew's step on Hopper, in Gluon: sonew.step_kernel with u in shared memory until it is applied.

As many programs as run at once each take a run of chunks from a counter, update its statistics and
keep its u in a ring in shared memory, which holds two runs. Before a program takes another run, it
applies u of the one before the last, whose norms are known by then. So u never goes through memory:
8 b + 28 bytes per fp32 parameter.

A tensor of more than two runs per program does not fit: all programs would hold two and wait for
its norms for ever. Nor can norms be summed over processes in the midst of it. Both take step_kernel.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
    TOTALS,
    awaited,
    count,
    place_of,
    pointer,
    publish,
    statistics,
    tile,
    units,
)


class RingConfig(NamedTuple):
    programs: int  # per multiprocessor
    registers: int  # most per thread
    run: int  # chunks of a run


CONFIG = {  # by band
    0: RingConfig(4, 64, 5),
    1: RingConfig(5, 96, 4),
    **dict.fromkeys((2, 3, 4), RingConfig(4, 128, 10)),
}


@gluon.jit
def settle(
    index, ring, slot, table_ptr, item_ptr, total_ptr, ready_ptr, lr, weight_decay,
    P: tl.constexpr, PLAIN: tl.constexpr, LR_THERE: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Apply the u of a run, in the ring from `slot` on, once the norms of its tensor are known."""
    tensor = gl.load(item_ptr)
    run = gl.load(item_ptr + 1)
    row_ptr = table_ptr + tensor * COLUMNS
    p_ptr = pointer(row_ptr, P_PTR, P, True)
    n = gl.load(row_ptr + SIZE)
    chunk = gl.load(row_ptr + CHUNK)

    # load all parameters of the run before waiting
    p = ()
    for k in gl.static_range(RUN):
        start, length = place_of(run * RUN + k, chunk, n, True)
        _, o, _, own = tile(index, length, chunk, BAND, False)
        p = p + (gl.load(p_ptr + start + o, mask=own, other=0.0, eviction_policy="evict_first"),)
    total_ptr += gl.load(row_ptr + TOTALS) * SUMS
    rate, scale = awaited(ready_ptr + tensor, total_ptr, lr, LR_THERE, PLAIN)

    for k in gl.static_range(RUN):
        start, length = place_of(run * RUN + k, chunk, n, True)
        _, o, _, own = tile(index, length, chunk, BAND, False)
        new = p[k].to(gl.float32)
        new -= rate * (scale * ring.index(slot + k).load(L) + weight_decay * new)
        gl.store(p_ptr + start + o, new.to(P), mask=own, eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["runs", "tensors"])
def ring_kernel(
    table_ptr, items_ptr, halo_ptr, partial_ptr, total_ptr, count_ptr,  # as of step_kernel
    runs, tensors,
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr,
    LR_THERE: tl.constexpr, HALO: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [32, 1, 1], [1, gl.num_warps(), 1], [2, 0, 1])
    ring = gl.allocate_shared_memory(
        gl.float32, [2 * RUN, 32, LINES, 4], gl.SwizzledSharedLayout(4, 1, 1, [2, 0, 1])
    )
    lane = gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    line = gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    phase = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    index = (lane, line, phase)
    offs = gl.arange(0, 1024, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    beta1 = gl.cast(beta1, gl.float32)
    beta2 = gl.cast(beta2, gl.float32)
    new1 = gl.cast(new1, gl.float32)
    new2 = gl.cast(new2, gl.float32)
    weight_decay = gl.cast(weight_decay, gl.float32)
    ready_ptr = count_ptr + tensors

    # items whose u is in the ring: the newer one, and the older one, from `slot` on
    slot = gl.to_tensor(0)
    older = gl.to_tensor(-1)
    newer = gl.to_tensor(-1)
    item = gl.to_tensor(0)
    while item < runs:
        if older >= 0:  # before another run is taken, so that nobody waits for one that waits
            settle(
                index, ring, slot, table_ptr, items_ptr + 2 * older, total_ptr, ready_ptr, lr, weight_decay,
                P, PLAIN, LR_THERE, BAND, COLUMNS, RUN, L,
            )  # fmt: skip
            older = gl.to_tensor(-1)
        item = gl.atomic_add(count_ptr + 2 * tensors, 1, sem="relaxed")
        if item < runs:
            tensor = gl.load(items_ptr + 2 * item)
            run = gl.load(items_ptr + 2 * item + 1)
            row_ptr = table_ptr + tensor * COLUMNS
            n = gl.load(row_ptr + SIZE)
            chain = gl.load(row_ptr + CHAIN)
            chunk = gl.load(row_ptr + CHUNK)
            first = gl.load(row_ptr + FIRST_PROGRAM)
            g_ptr = pointer(row_ptr, G_PTR, G, True)
            m_ptr = pointer(row_ptr, M_PTR, M, True)
            S_ptrs = ()
            for k in gl.static_range(BAND + 1):
                S_ptrs = S_ptrs + (pointer(row_ptr, S_PTR + k, M, True),)
            correct1, correct2, weight, damping, edge = units(
                row_ptr, log_beta1, log_beta2, eps, gamma
            )

            # statistics
            zero = gl.zeros([32, LINES], gl.float32, gl.SliceLayout(2, L))
            sum_a, sum_u, sum_root = zero, zero, zero
            for c in range(run * RUN, gl.minimum((run + 1) * RUN, gl.cdiv(n, chunk).to(gl.int32))):
                start, length = place_of(c, chunk, n, True)
                halo = halo_ptr + (first * RUN + c) * (BAND + 3) * 8
                u, sums = statistics(
                    index, g_ptr, m_ptr, S_ptrs, start, length, chunk, chain, halo, correct1, correct2, weight,
                    damping, edge, beta1, beta2, new1, new2, M, BAND, PLAIN, HALO, True, LINES, L,
                )  # fmt: skip
                sum_a += sums[0]
                sum_u += sums[1]
                sum_root += sums[2]
                ring.index(slot + c - run * RUN).store(u)
            sums = (sum_a, sum_u, sum_root)
            totals = total_ptr + gl.load(row_ptr + TOTALS) * SUMS
            first_ptr = partial_ptr + first * SUMS
            programs = gl.load(row_ptr + PROGRAMS).to(gl.int32)
            if publish(
                offs, sums, first_ptr + run * SUMS, first_ptr, programs, totals, count_ptr + tensor, ready_ptr + tensor,
                1024,
            ):  # fmt: skip
                count(row_ptr, totals)
            older = newer
            newer = item
            slot = RUN - slot
    if older >= 0:
        settle(
            index, ring, slot, table_ptr, items_ptr + 2 * older, total_ptr, ready_ptr, lr, weight_decay,
            P, PLAIN, LR_THERE, BAND, COLUMNS, RUN, L,
        )  # fmt: skip
    if newer >= 0:
        settle(
            index, ring, RUN - slot, table_ptr, items_ptr + 2 * newer, total_ptr, ready_ptr, lr, weight_decay,
            P, PLAIN, LR_THERE, BAND, COLUMNS, RUN, L,
        )  # fmt: skip


def resident_programs(band, device):
    """Return how many programs run at once."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return CONFIG[band].programs * multiprocessors


def capacity(band, device):
    """Return the most chunks of a tensor: one run per program, as each may hold another tensor's."""
    return CONFIG[band].run * resident_programs(band, device)


def launch(band, device, tensors, runs, n_tensors, numbers, constants, warps):
    """Launch ring_kernel; cooperatively, so that all programs run at once or none."""
    grid = (min(resident_programs(band, device), runs),)
    options = {"num_warps": warps, "maxnreg": CONFIG[band].registers}
    options["launch_cooperative_grid"] = True
    ring_kernel[grid](*tensors, runs, n_tensors, *numbers, *constants, **options)
