"""SONew's step on Hopper, in Gluon: sonew_fused.py with u in shared memory until it is applied.

A persistent kernel: as many programs as run at once each take a run of chunks from a counter,
update its statistics and keep its u in a ring buffer in shared memory, which holds two runs. Before
a program takes another run, it applies u of the run before the last, whose sums are known by then.
So u never goes through memory: 8 b + 28 bytes per fp32 parameter. Measured on an H200 for 125 M
parameters: 0.95, 1.25 and 2.17 ms at band 0, 1 and 4 (sonew_fused.py: 1.09 at band 0).

Limits: those of sonew_fused.py, and a tensor may have at most one run per program. Otherwise all
programs could hold two runs and wait forever for the sums of one that nobody has taken.
"""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.sonew import (
    CHUNK,
    FIRST_PROGRAM,
    P_PTR,
    PROGRAMS,
    SIZE,
    SUMS,
    load_step_size,
    load_units,
    make_options,
    update_counters,
)
from kernels.sonew_fused import (
    FusedPlan,
    Index,
    aligned_pointer,
    chunk_bounds,
    chunk_offsets,
    chunk_size,
    load_tensors,
    publish_sums,
    update_statistics,
    wait_for_sums,
)


class RingConfig(NamedTuple):
    programs: int  # per multiprocessor
    registers: int  # most per thread
    run: int  # chunks of a run


CONFIG = {  # by band
    0: RingConfig(programs=3, registers=80, run=7),
    1: RingConfig(programs=4, registers=112, run=5),
    2: RingConfig(programs=4, registers=128, run=10),
    3: RingConfig(programs=4, registers=128, run=10),
    4: RingConfig(programs=4, registers=128, run=10),
}


class Launch(NamedTuple):
    """Arguments shared by the updates of all runs."""

    table_ptr: gl.tensor
    items_ptr: gl.tensor
    total_ptr: gl.tensor
    ready_ptr: gl.tensor
    lr: gl.tensor  # a number or a pointer
    weight_decay: gl.tensor


@gluon.jit
def apply_run(
    index, ring, slot, item, launch,
    PARAM: gl.constexpr, BAND: gl.constexpr, ADAM: gl.constexpr, LR_ON_DEVICE: gl.constexpr,
    COLUMNS: gl.constexpr, RUN: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Wait for the sums of a run's tensor, then apply its u, which is in the ring from `slot` on.

    item: number of the run in items. p -= rate * (graft * u + weight_decay * p).
    """
    tensor = gl.load(launch.items_ptr + 2 * item).to(gl.int32)
    run = gl.load(launch.items_ptr + 2 * item + 1).to(gl.int32)
    row_ptr = launch.table_ptr + tensor * COLUMNS
    p_ptr = aligned_pointer(row_ptr, P_PTR, PARAM)
    n = gl.load(row_ptr + SIZE)
    chunk = gl.load(row_ptr + CHUNK)

    # load all parameters of the run before waiting
    p = ()
    for k in gl.static_range(RUN):
        start, length = chunk_bounds(run * RUN + k, chunk, n)
        _, offs, _, store_mask = chunk_offsets(index, length, chunk, BAND, False)
        p_ptrs = p_ptr + start + offs
        p = p + (gl.load(p_ptrs, mask=store_mask, other=0.0, eviction_policy="evict_first"),)
    wait_for_sums(launch.ready_ptr + tensor)
    total_ptr = launch.total_ptr + tensor * SUMS
    rate, graft = load_step_size(total_ptr, launch.lr, LR_ON_DEVICE, ADAM)

    for k in gl.static_range(RUN):
        start, length = chunk_bounds(run * RUN + k, chunk, n)
        _, offs, _, store_mask = chunk_offsets(index, length, chunk, BAND, False)
        u = ring.index(slot + k).load(L)
        new_p = p[k].to(gl.float32)
        new_p -= rate * (graft * u + launch.weight_decay * new_p)
        p_ptrs = p_ptr + start + offs
        gl.store(p_ptrs, new_p.to(PARAM), mask=store_mask, eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["n_runs", "n_tensors"])
def ring_kernel(
    table_ptr, items_ptr, halo_ptr, partial_ptr, total_ptr, counters_ptr,  # as of step_kernel
    n_runs, n_tensors,
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    PARAM: gl.constexpr, GRAD: gl.constexpr, STATE: gl.constexpr, BAND: gl.constexpr,
    ADAM: gl.constexpr, LR_ON_DEVICE: gl.constexpr, HALO: gl.constexpr, COLUMNS: gl.constexpr,
    LINES: gl.constexpr, RUN: gl.constexpr,
):  # fmt: skip
    # layouts: each warp takes a line of the chunk, each thread 4 consecutive elements
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [32, 1, 1], [1, gl.num_warps(), 1], [2, 0, 1])
    # ring buffer in shared memory: 2 runs of RUN chunks, the first from slot 0, the second from RUN
    ring = gl.allocate_shared_memory(
        gl.float32, [2 * RUN, 32, LINES, 4], gl.SwizzledSharedLayout(4, 1, 1, [2, 0, 1])
    )
    index = Index(
        lane=gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, L))),
        line=gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, L))),
        phase=gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L))),
    )
    offs = gl.arange(0, 1024, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    options = make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay)
    ready_ptr = counters_ptr + n_tensors
    next_run_ptr = counters_ptr + 2 * n_tensors
    launch = Launch(table_ptr, items_ptr, total_ptr, ready_ptr, lr, options.weight_decay)

    # items of the two runs whose u is in the ring, -1: none. `older_item` starts at `slot`, which
    # the next run takes over; `newer_item` starts at RUN - slot.
    slot = gl.to_tensor(0)
    older_item = gl.to_tensor(-1)
    newer_item = gl.to_tensor(-1)
    item = gl.to_tensor(0)
    while item < n_runs:
        # -- apply the older run now, when no run that others wait for is unfinished here --
        if older_item >= 0:
            apply_run(
                index, ring, slot, older_item, launch,
                PARAM, BAND, ADAM, LR_ON_DEVICE, COLUMNS, RUN, L,
            )  # fmt: skip
            older_item = gl.to_tensor(-1)

        # -- take a run --
        item = gl.atomic_add(next_run_ptr, 1, sem="relaxed")
        if item < n_runs:
            tensor = gl.load(items_ptr + 2 * item).to(gl.int32)
            run = gl.load(items_ptr + 2 * item + 1).to(gl.int32)
            row_ptr = table_ptr + tensor * COLUMNS
            n = gl.load(row_ptr + SIZE)
            first = gl.load(row_ptr + FIRST_PROGRAM)
            tensors = load_tensors(row_ptr, GRAD, STATE, BAND)
            units = load_units(row_ptr, options)

            # -- update its statistics, and keep u in the ring --
            zero = gl.zeros([32, LINES], gl.float32, gl.SliceLayout(2, L))
            sum_a = zero
            sum_u = zero
            sum_root = zero
            end = gl.minimum((run + 1) * RUN, gl.cdiv(n, tensors.chunk).to(gl.int32))
            for c in range(run * RUN, end):
                start, length = chunk_bounds(c, tensors.chunk, n)
                chunk_halo_ptr = halo_ptr + (first * RUN + c) * (BAND + 3) * 8
                u, chunk_a, chunk_u, chunk_root = update_statistics(
                    index, tensors, start, length, chunk_halo_ptr, units, options,
                    STATE, BAND, ADAM, HALO, LINES, L,
                )  # fmt: skip
                sum_a += chunk_a
                sum_u += chunk_u
                sum_root += chunk_root
                ring.index(slot + c - run * RUN).store(u)

            # -- publish its sums; the last program of the tensor adds them up --
            sums = (sum_a, sum_u, sum_root)
            programs = gl.load(row_ptr + PROGRAMS).to(gl.int32)
            first_ptr = partial_ptr + first * SUMS
            own_ptr = first_ptr + run * SUMS
            own_total_ptr = total_ptr + tensor * SUMS
            done_ptr = counters_ptr + tensor
            if publish_sums(
                offs, sums, own_ptr, first_ptr, programs,
                own_total_ptr, done_ptr, ready_ptr + tensor, 1024,
            ):  # fmt: skip
                update_counters(row_ptr, own_total_ptr)
            older_item = newer_item
            newer_item = item
            slot = RUN - slot

    # -- apply the runs left in the ring --
    if older_item >= 0:
        apply_run(
            index, ring, slot, older_item, launch,
            PARAM, BAND, ADAM, LR_ON_DEVICE, COLUMNS, RUN, L,
        )  # fmt: skip
    if newer_item >= 0:
        apply_run(
            index, ring, RUN - slot, newer_item, launch,
            PARAM, BAND, ADAM, LR_ON_DEVICE, COLUMNS, RUN, L,
        )  # fmt: skip


def resident_programs(band, device):
    """Return how many programs run at once."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return CONFIG[band].programs * multiprocessors


def fits(param):
    """Return whether a LocalParam has at most one run per program."""
    chunk, _ = chunk_size(param)
    capacity = CONFIG[param.band].run * resident_programs(param.band, param.p.device)
    return param.p.numel() <= capacity * chunk


class RingPlan(FusedPlan):
    """halo_kernel, if chunks need it, and ring_kernel."""

    def prepare(self, params, run, lag):
        super().prepare(params, CONFIG[self.band].run, lag)

    def step(self, numbers, lr_on_device):
        self.copy_halos()
        self.counters.zero_()
        ring = CONFIG[self.band]
        lines = self.config.lines
        tensors = (self.table, self.in_order, self.halos, self.partial, self.totals, self.counters)
        constants = (*self.dtypes, self.band, self.is_adam, lr_on_device, self.needs_halo)
        constants = (*constants, self.table.shape[1], lines, self.run)
        grid = (min(resident_programs(self.band, self.device), self.n_programs),)
        ring_kernel[grid](
            *tensors, self.n_programs, self.n_tensors, *numbers, *constants,
            num_warps=self.config.warps,
            maxnreg=ring.registers,
            launch_cooperative_grid=True,  # all programs run at once, or none
        )  # fmt: skip
