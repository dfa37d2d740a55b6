"""SONew's step on Hopper, in Gluon: sonew_fused.py with u in shared memory until it is applied.

Gluon is the level below Triton, where shared memory and layouts are explicit. As in sonew_fused.py,
a chunk is about 1000 consecutive elements of a tensor, and a run is RUN consecutive chunks. The
direction u of a chunk cannot be applied at once, as its step size needs norms over the whole
tensor. sonew_fused.py writes u to memory until then.

The grid has as many programs as run at once, and these take runs from a counter (a persistent
kernel). A program updates the statistics of a run, stores its u in a ring buffer, which holds u of
two runs, and publishes its sums. Before it takes another run, it applies u of the run before the
last. By then, the norms of that run's tensor are mostly known.

Memory traffic: 8 b + 28 bytes per fp32 parameter, where b is the band. On an H200 for 125 M
parameters: 0.90, 1.25 and 2.18 ms at band 0, 1 and 4 (sonew_fused.py: 1.09 at band 0).

Limits: those of sonew_fused.py, and a tensor may not have more runs than there are programs. If it
had more, every program could wait for its norms, and none would be free to take the runs that the
norms still need.
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
    programs: int  # programs per multiprocessor
    registers: int  # limit per thread
    run: int  # chunks that a program takes at a time


CONFIG = {  # by band
    0: RingConfig(programs=5, registers=48, run=4),  # 4 chunks of 1024 elements
    1: RingConfig(programs=5, registers=96, run=4),  # 4 chunks of 960 elements
    2: RingConfig(programs=4, registers=128, run=10),  # band 2: 10 chunks of 480 elements
    3: RingConfig(programs=4, registers=128, run=10),
    4: RingConfig(programs=4, registers=128, run=10),
}


class Constants(NamedTuple):
    """The compile-time arguments of ring_kernel, passed on to its functions as one."""

    PARAM: gl.constexpr  # dtype of the parameters p
    GRAD: gl.constexpr  # dtype of the gradient g
    STATE: gl.constexpr  # dtype of the momentum m and the statistics S
    BAND: gl.constexpr
    ADAM: gl.constexpr  # the direction u is Adam's step
    LR_ON_DEVICE: gl.constexpr  # lr is a pointer
    HALO: gl.constexpr  # chunks need the elements next to them
    COLUMNS: gl.constexpr  # of the table of tensors
    LINES: gl.constexpr  # a chunk is this many lines of 128 elements
    RUN: gl.constexpr  # chunks per run


class Launch(NamedTuple):
    """The arguments that all runs share: T tensors are cut into R runs of RUN chunks each."""

    table_ptr: gl.tensor  # (T, COLUMNS): addresses and sizes of each tensor
    items_ptr: gl.tensor  # (R, 2): the tensor of a run, and the run's number in it
    halo_ptr: gl.tensor  # (R * RUN, BAND + 3, 8): of each chunk, the 8 elements next to it in g,
    # m and S_0 ... S_BAND: 4 before its start and 4 after its end
    partial_ptr: gl.tensor  # (R, SUMS): over each run, sums of a^2 (a: Adam's step), u^2, sqrt(S_0)
    total_ptr: gl.tensor  # (T, SUMS): the same over each tensor
    done_ptr: gl.tensor  # (T,): how many runs of a tensor have published their sums
    ready_ptr: gl.tensor  # (T,): 1 once total_ptr has the tensor's sums
    lr: gl.tensor  # learning rate: a number, or a pointer to one
    options: gl.tensor  # Options


@gluon.constexpr_function
def block_layout(num_warps):
    """Return the layout of a chunk, [32, LINES, 4]: lane of the warp, line, element of the lane.

    A thread holds 4 consecutive elements, and a warp a line of 128. Warps take the lines by turns.
    """
    # arguments: elements per thread, threads per warp, warps, axes from the fastest to the slowest
    return gl.BlockedLayout([1, 1, 4], [32, 1, 1], [1, num_warps, 1], [2, 0, 1])


@gluon.jit
def update_run(index, ring, slot, item, launch, constants: gl.constexpr):
    """Update m and S of a run of RUN chunks, store its u in the ring buffer, publish its sums.

    ring [2 RUN, 32, LINES, 4]: a slot for u of each chunk of two runs. slot: this run's first one,
    0 or RUN. item: the run's row in launch.items_ptr, which has its tensor and its number.
    """
    BAND: gl.constexpr = constants.BAND
    LINES: gl.constexpr = constants.LINES
    RUN: gl.constexpr = constants.RUN
    LAYOUT: gl.constexpr = block_layout(gl.num_warps())

    # -- find the run and its tensor --
    tensor = gl.load(launch.items_ptr + 2 * item).to(gl.int32)
    run = gl.load(launch.items_ptr + 2 * item + 1).to(gl.int32)
    row_ptr = launch.table_ptr + tensor * constants.COLUMNS
    n = gl.load(row_ptr + SIZE)  # elements of the tensor
    first_item = gl.load(row_ptr + FIRST_PROGRAM)  # the item of the tensor's first run
    tensors = load_tensors(row_ptr, constants.GRAD, constants.STATE, BAND)
    units = load_units(row_ptr, launch.options)

    # -- update the statistics, chunk by chunk: chunks run * RUN ... end - 1 of the tensor --
    zero = gl.zeros([32, LINES], gl.float32, gl.SliceLayout(2, LAYOUT))
    sum_a = zero
    sum_u = zero
    sum_root = zero
    end = gl.minimum((run + 1) * RUN, gl.cdiv(n, tensors.chunk).to(gl.int32))
    for c in range(run * RUN, end):
        start, length = chunk_bounds(c, tensors.chunk, n)
        # halos of all chunks: (R * RUN, BAND + 3, 8)
        chunk_halo_ptr = launch.halo_ptr + (first_item * RUN + c) * (BAND + 3) * 8
        u, chunk_a, chunk_u, chunk_root = update_statistics(
            index, tensors, start, length, chunk_halo_ptr, units, launch.options,
            constants.STATE, BAND, constants.ADAM, constants.HALO, LINES, LAYOUT,
        )  # fmt: skip
        sum_a += chunk_a
        sum_u += chunk_u
        sum_root += chunk_root
        ring.index(slot + c - run * RUN).store(u)  # run 3, RUN = 5: chunk 16 has slot + 1

    # -- publish the sums; the last run of a tensor to do so adds up those of all, 1024 at a time --
    offs = gl.arange(0, 1024, gl.BlockedLayout([4], [32], [gl.num_warps()], [0]))
    sums = (sum_a, sum_u, sum_root)
    n_runs = gl.load(row_ptr + PROGRAMS).to(gl.int32)  # of this tensor
    first_ptr = launch.partial_ptr + first_item * SUMS
    own_ptr = first_ptr + run * SUMS
    total_ptr = launch.total_ptr + tensor * SUMS
    done_ptr = launch.done_ptr + tensor
    ready_ptr = launch.ready_ptr + tensor
    is_last = publish_sums(
        offs, sums, own_ptr, first_ptr, n_runs, total_ptr, done_ptr, ready_ptr, 1024
    )
    if is_last:
        update_counters(row_ptr, total_ptr)


@gluon.jit
def apply_run(index, ring, slot, item, launch, constants: gl.constexpr):
    """Wait for the sums of a run's tensor, then p -= rate * (graft * u + weight_decay * p).

    graft = |a| / |u| (a: Adam's step). item: the run's row in launch.items_ptr. slot: its first
    slot in the ring buffer, 0 or RUN.
    """
    RUN: gl.constexpr = constants.RUN
    LAYOUT: gl.constexpr = block_layout(gl.num_warps())

    # -- find the run and its tensor --
    tensor = gl.load(launch.items_ptr + 2 * item).to(gl.int32)
    run = gl.load(launch.items_ptr + 2 * item + 1).to(gl.int32)
    row_ptr = launch.table_ptr + tensor * constants.COLUMNS
    p_ptr = aligned_pointer(row_ptr, P_PTR, constants.PARAM)
    n = gl.load(row_ptr + SIZE)  # elements of the tensor
    chunk = gl.load(row_ptr + CHUNK)  # elements per chunk

    # -- before waiting, load p of the run's chunks (only where it is stored, as lines overlap) --
    p = ()  # a tuple of blocks [32, LINES, 4], as kernels have no lists
    for k in gl.static_range(RUN):
        start, length = chunk_bounds(run * RUN + k, chunk, n)
        _, offs, _, store_mask = chunk_offsets(index, length, chunk, constants.BAND, False)
        p_ptrs = p_ptr + start + offs
        p = p + (gl.load(p_ptrs, mask=store_mask, other=0.0, eviction_policy="evict_first"),)

    # -- wait for the sums, which other programs may still be computing --
    wait_for_sums(launch.ready_ptr + tensor)
    total_ptr = launch.total_ptr + tensor * SUMS
    rate, graft = load_step_size(total_ptr, launch.lr, constants.LR_ON_DEVICE, constants.ADAM)

    # -- update the parameters --
    for k in gl.static_range(RUN):
        start, length = chunk_bounds(run * RUN + k, chunk, n)
        _, offs, _, store_mask = chunk_offsets(index, length, chunk, constants.BAND, False)
        u = ring.index(slot + k).load(LAYOUT)
        new_p = p[k].to(gl.float32)
        new_p -= rate * (graft * u + launch.options.weight_decay * new_p)
        p_ptrs = p_ptr + start + offs
        gl.store(p_ptrs, new_p.to(constants.PARAM), mask=store_mask, eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["n_runs", "n_tensors"])
def ring_kernel(
    table_ptr, items_ptr, halo_ptr, partial_ptr, total_ptr, counters_ptr,  # as in step_kernel
    n_runs, n_tensors,
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    PARAM: gl.constexpr, GRAD: gl.constexpr, STATE: gl.constexpr, BAND: gl.constexpr,
    ADAM: gl.constexpr, LR_ON_DEVICE: gl.constexpr, HALO: gl.constexpr, COLUMNS: gl.constexpr,
    LINES: gl.constexpr, RUN: gl.constexpr,
):  # fmt: skip
    """One of the programs that run at once: take runs of chunks, one after the other, until none is
    left. For each, update m and S, and keep u in the ring buffer until its norms are known.
    """
    constants: gl.constexpr = Constants(
        PARAM, GRAD, STATE, BAND, ADAM, LR_ON_DEVICE, HALO, COLUMNS, LINES, RUN
    )
    LAYOUT: gl.constexpr = block_layout(gl.num_warps())

    # -- the ring buffer: u of the chunks of two runs --
    #     slot    | 0 ... RUN - 1 | RUN ... 2 RUN - 1 |
    ring = gl.allocate_shared_memory(
        gl.float32, [2 * RUN, 32, LINES, 4], gl.SwizzledSharedLayout(4, 1, 1, [2, 0, 1])
    )

    # -- what all runs share: lane, line and phase of each element of a chunk, and the arguments --
    # SliceLayout(axis, ...) leaves out an axis of LAYOUT; leaving out two gives a vector
    index = Index(
        lane=gl.arange(0, 32, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))),
        line=gl.arange(0, LINES, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))),
        phase=gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT))),
    )
    options = make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay)
    # counters (2 T + 1): done for each tensor, ready for each tensor, the number of the next run
    done_ptr = counters_ptr
    ready_ptr = counters_ptr + n_tensors
    next_run_ptr = counters_ptr + 2 * n_tensors
    launch = Launch(
        table_ptr, items_ptr, halo_ptr, partial_ptr, total_ptr, done_ptr, ready_ptr, lr, options
    )

    # -- the runs (of RUN chunks) whose u is in the ring buffer: rows of items_ptr, -1 for none --
    # Runs alternate between the halves of the ring buffer. Before this program's run 2 stores its
    # u, that of run 0 in the same half is applied, that is p -= rate * (graft * u + ...):
    #     run                   0      1      2        3        4
    #     first slot of u       0      RUN    0        RUN      0
    #     applied before it     -      -      run 0    run 1    run 2
    slot = gl.to_tensor(0)  # first slot of the next run
    older_item = gl.to_tensor(-1)  # the last run but one; the next run takes its slots
    newer_item = gl.to_tensor(-1)  # the last run, in the other half, from RUN - slot on
    item = gl.to_tensor(0)
    while item < n_runs:
        # -- apply u of the last run but one to p, which frees its half of the ring buffer --
        # This may wait for sums of other programs. None waits for this one: its sums are stored.
        if older_item >= 0:
            apply_run(index, ring, slot, older_item, launch, constants)
            older_item = gl.to_tensor(-1)

        # -- take a run, and update its statistics --
        item = gl.atomic_add(next_run_ptr, 1, sem="relaxed")
        if item < n_runs:
            update_run(index, ring, slot, item, launch, constants)
            older_item = newer_item
            newer_item = item
            slot = RUN - slot  # the other half: 0 becomes RUN, RUN 0

    # -- no run is left to take: apply the two in the ring buffer --
    # `slot` is where one more run would go, so the newer run is in the other half
    if older_item >= 0:
        apply_run(index, ring, slot, older_item, launch, constants)
    if newer_item >= 0:
        apply_run(index, ring, RUN - slot, newer_item, launch, constants)


def resident_programs(band, device):
    """Return how many programs of ring_kernel run at once on a device."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return CONFIG[band].programs * multiprocessors


def fits(param):
    """Return whether a LocalParam has no more runs (of RUN chunks) than programs run at once."""
    chunk, _ = chunk_size(param)
    programs = resident_programs(param.band, param.p.device)
    return param.p.numel() <= programs * CONFIG[param.band].run * chunk


class RingPlan(FusedPlan):
    """A step in two launches: halo_kernel, if chunks need it, and ring_kernel."""

    def prepare(self, params, run, lag):
        super().prepare(params, CONFIG[self.band].run, lag)

    def step(self, numbers, lr_on_device):
        self.copy_halos()
        # no run has been taken, and none has published its sums
        self.counters.zero_()
        n_runs = self.n_programs  # FusedPlan has one program per run; here, one takes several

        # ring_kernel's arguments: table_ptr ... counters_ptr (tensors), and after beta1 ...
        # weight_decay (numbers) the constants PARAM ... HALO, COLUMNS, LINES and RUN
        tensors = (self.table, self.in_order, self.halos, self.partial, self.totals, self.counters)
        constants = (*self.dtypes, self.band, self.is_adam, lr_on_device, self.needs_halo)
        constants = (*constants, self.table.shape[1], self.config.lines, self.run)
        programs = min(resident_programs(self.band, self.device), n_runs)
        ring_kernel[(programs,)](
            *tensors, n_runs, self.n_tensors, *numbers, *constants,
            num_warps=self.config.warps,
            maxnreg=CONFIG[self.band].registers,
            launch_cooperative_grid=True,  # all programs run at once, or none
        )  # fmt: skip
