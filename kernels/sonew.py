"""SONew's step over many tensors at once: statistics, L D L^T m, the graft's norms, the update.

Lanes hold quads of 4 consecutive elements, so that of "the element k further on" (k <= 4) 4 - k are in the same thread, and the rest
come by tl.gather of one number per lane through shared memory; every array is read from memory once, 16 bytes a lane.

Grid: one program per chunk of up to 4 * quads elements of one tensor; a table of pointers and sizes lets one launch serve all tensors
of a dtype. Chunks end with chains where these fit (chain="row", length a multiple of 4): no program then needs another's elements.
Otherwise chunks overlap by a quad on either side. As state is updated in place, a neighbour could find it new already: a first launch
copies those quads aside. Sums for the norms are kept per program and added in their order, without atomics: two runs are equal.

1. halo_kernel (only where chunks overlap): g, m, S of the quads on both sides of each chunk.
2. statistics_kernel: m, S in place, u in place of the gradient, and per program |a|^2, |u|^2, the number of bad gradients.
3. norms_kernel: their sums per tensor.
4. apply_kernel: p -= lr (scale u + wd p); nothing if a gradient was bad.

Bytes per fp32 parameter at band b: (2) reads g, m, S_0..S_b and writes m, S, u, 8 b + 24; (4) reads u, p and writes p, 12: in all 8 b + 36,
44 tridiagonal, 68 at b = 4, against 28 of AdamW. Tensors are taken in pieces small enough for the L2 to keep u from (2) to (4), which
saves up to 4 of them, and (3) and the table are noise: 12 bytes a program. At the 4.22 TB/s that a copy reaches on an H200, 125 M
parameters take 1.30 ms (b = 1) and 2.01 ms (b = 4), AdamW 0.83; with m and S in bfloat16 they are 4 b + 28, 0.95 and 1.30 ms.
Limits: band 0 to 4, float32, float16 and bfloat16 parameters, float32 or bfloat16 state; arithmetic is float32.
"""
import functools
import math

import torch
import triton
import triton.language as tl

# Quads and warps a program, and parameters a piece, 32 MB of u. Compiled for sm_80, 90, 100 and 120, one quad a thread takes 40 to 48
# registers at band 1 and 79 to 99 at band 4, no spills and 1 KB of shared memory; (256, 4), two quads, 69 and 139. Not timed yet.
CONFIG = (256, 8, 2 ** 23)
HEAD = tl.constexpr(11)                                              # columns of the table before the pointer to S_0, named in `step`
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FAR = tl.constexpr(2 ** 29)                                          # no lane is as far from the end of its chain as this


@triton.jit
def pointer(row_ptr, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(TYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def chunk_of(table_ptr, owner_ptr, pid, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """-> the row of the program's tensor in the table, where its chunk starts and how long it is."""
    row_ptr = table_ptr + tl.load(owner_ptr + pid) * COLUMNS
    n, chunk = tl.load(row_ptr + 5), tl.load(row_ptr + 7)
    start = (pid - tl.load(row_ptr + 8)) * chunk                                             # int64
    length = tl.minimum(n - start, chunk).to(tl.int32)
    if ALIGNED:
        start, length = tl.multiple_of(start, 4), tl.multiple_of(length, 4)
    return row_ptr, start, length


@triton.jit
def columns(x, J: tl.constexpr):                                     # [J, 4] -> 4 of [J], within each thread
    even, odd = tl.split(tl.reshape(x, (J, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def window(y, k: tl.constexpr, J: tl.constexpr):                     # columns k ... k + 3 of a tuple, [J, 4]
    return tl.reshape(tl.join(tl.join(y[k], y[k + 2]), tl.join(y[k + 1], y[k + 3])), (J, 4))


@triton.jit
def ahead(x, k: tl.constexpr, J: tl.constexpr):
    """x[i + k] for the elements i = 4 j + phase of [J, 4], k <= 4. What lies past the last lane is not defined."""
    if k == 0:
        return x
    x0, x1, x2, x3 = columns(x, J)
    j = tl.minimum(tl.arange(0, J) + 1, J - 1)
    return window((x0, x1, x2, x3, tl.gather(x0, j, 0), tl.gather(x1, j, 0), tl.gather(x2, j, 0), tl.gather(x3, j, 0)), k, J)


@triton.jit
def behind(x, k: tl.constexpr, J: tl.constexpr):
    """x[i - k], 0 before the first lane."""
    x0, x1, x2, x3 = columns(x, J)
    j, first = tl.maximum(tl.arange(0, J) - 1, 0), tl.arange(0, J) == 0
    y0, y1 = tl.where(first, 0.0, tl.gather(x0, j, 0)), tl.where(first, 0.0, tl.gather(x1, j, 0))
    y2, y3 = tl.where(first, 0.0, tl.gather(x2, j, 0)), tl.where(first, 0.0, tl.gather(x3, j, 0))
    return window((y0, y1, y2, y3, x0, x1, x2, x3), 4 - k, J)


@triton.jit
def solve(W, c, d, s, gamma, N: tl.constexpr):
    """sonew.solve: psi = W^-1 c, s - psi . c; W the lower triangle in one tuple, row after row, N neighbours."""
    psi = ()
    if N > 0:
        inverse = tl.where(W[0] > gamma * d[0], 1 / W[0], 0.0)
        rest, c_rest, d_rest = (), (), ()
        for p in tl.static_range(1, N):
            l = W[p * (p + 1) // 2] * inverse
            for r in tl.static_range(1, p + 1):
                rest = rest + (W[p * (p + 1) // 2 + r] - l * W[r * (r + 1) // 2],)
            c_rest = c_rest + (c[p] - l * c[0],)
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
    series = -d * (1 + d * (1 / 2) * (1 + d * (1 / 3) * (1 + d * (1 / 4) * (1 + d * (1 / 5) * (1 + d * (1 / 6))))))
    return tl.where(d > -0.3, series, 1 - tl.exp(d))


@triton.jit(do_not_specialize=["pid0"])
def halo_kernel(
    table_ptr, owner_ptr, halo_ptr, pid0,                            # (T, COLUMNS), (P), (P, BAND + 3, 2, 4)
    G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0) + pid0
    row_ptr, start, length = chunk_of(table_ptr, owner_ptr, pid, COLUMNS, False)
    o = tl.arange(0, 8)
    i = start + tl.where(o < 4, o - 4, tl.load(row_ptr + 7) + o - 4)                         # before the chunk, after it
    there = (i >= 0) & (i < tl.load(row_ptr + 5))
    halo_ptr += pid.to(tl.int64) * (BAND + 3) * 8
    g = tl.load(pointer(row_ptr, 1, G, False) + i, mask=there, other=0.0).to(tl.float32)
    tl.store(halo_ptr + o, g)
    for slot in tl.static_range(1, BAND + 3):
        x = tl.load(pointer(row_ptr, 2 if slot == 1 else HEAD + slot - 2, M, False) + i, mask=there, other=0.0).to(tl.float32)
        tl.store(halo_ptr + slot * 8 + o, x)


@triton.jit
def read(ptr, o, own, halo_ptr, h, edge, slot: tl.constexpr, HALO: tl.constexpr):
    x = tl.load(ptr + o, mask=own, other=0.0).to(tl.float32)                                 # [J, 4]
    if HALO:
        x += tl.load(halo_ptr + slot * 8 + h, mask=edge, other=0.0)
    return x


@triton.jit(do_not_specialize=["pid0"])
def statistics_kernel(
    table_ptr, owner_ptr, halo_ptr, partial_ptr, pid0,               # (T, COLUMNS), (P), (P, BAND + 3, 2, 4), (P, 3)
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, graft_eps,                   # new = 1 - beta, rounded once
    G: tl.constexpr, M: tl.constexpr, BAND: tl.constexpr, PLAIN: tl.constexpr, HALO: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, J: tl.constexpr,
):
    pid = tl.program_id(0) + pid0
    row_ptr, start, length = chunk_of(table_ptr, owner_ptr, pid, COLUMNS, ALIGNED)
    beta1, beta2, eps = tl.cast(beta1, tl.float32), tl.cast(beta2, tl.float32), tl.cast(eps, tl.float32)
    gamma, graft_eps = tl.cast(gamma, tl.float32), tl.cast(graft_eps, tl.float32)
    new1, new2 = tl.cast(new1, tl.float32), tl.cast(new2, tl.float32)
    quad, phase = tl.arange(0, J)[:, None], tl.arange(0, 4)[None, :]
    h = tl.where(quad == 0, 0, 4) + phase                                                    # [J, 4], in a slot of the halo
    edge = ((quad == 0) | (quad == J - 1)) & (phase >= 0)
    if HALO:
        quad = quad - 1
        halo_ptr += pid.to(tl.int64) * (BAND + 3) * 8
    o = 4 * quad + phase                                                                     # [J, 4], from the chunk's start
    own = (o >= 0) & (o < length)

    g_ptr, m_ptr = pointer(row_ptr, 1, G, ALIGNED) + start, pointer(row_ptr, 2, M, ALIGNED) + start
    g = read(g_ptr, o, own, halo_ptr, h, edge, 0, HALO)
    good = g * g < float("inf")                                                              # false for NaN too
    g = tl.where(good, g, 0.0)
    m = beta1 * read(m_ptr, o, own, halo_ptr, h, edge, 1, HALO) + new1 * g
    tl.store(m_ptr + o, m.to(M), mask=own)

    if BAND > 0:                                                     # left: elements from here to the end of the chain
        chain = tl.load(row_ptr + 6)
        place = start % chain if HALO else tl.zeros((), tl.int64)    # where in its chain the chunk begins
        left0, place = tl.minimum(chain - place, FAR).to(tl.int32), tl.minimum(place, FAR).to(tl.int32)
        chain = tl.minimum(chain, 2 * FAR).to(tl.int32)
        at = 4 * quad if ALIGNED else o                                                      # a quad lies in one chain, if aligned
        x = left0 - at
        left = tl.where(x > 0, x, chain - (-x) % chain)
        if HALO:                                                     # the quad before may belong to earlier chains
            left = tl.where(place + at < 0, (-(place + at) - 1) % chain + 1, left)
        if ALIGNED:
            left = left - phase
    t = tl.load(pointer(row_ptr, 3, tl.float32, False)) + 1
    correct1, correct2 = 1 / one_minus_power(t, log_beta1), 1 / one_minus_power(t, log_beta2)
    S = ()
    for k in tl.static_range(BAND + 1):
        S_ptr = pointer(row_ptr, HEAD + k, M, ALIGNED) + start
        product = g * ahead(g, k, J)
        if k > 0:
            product = tl.where(left > k, product, 0.0)
        new = beta2 * read(S_ptr, o, own, halo_ptr, h, edge, 2 + k, HALO) + new2 * product
        tl.store(S_ptr + o, new.to(M), mask=own)
        S = S + (new * correct2,)
    m = m * correct1
    a = m / (tl.sqrt(S[0]) + graft_eps)

    if PLAIN:
        u = a
    else:
        S0, W, c, d = S[0] + eps, (), (), ()
        for p in tl.static_range(1, BAND + 1):
            for q in tl.static_range(1, p):
                W = W + (ahead(S[p - q], q, J),)
            W = W + (ahead(S0, p, J),)
            c = c + (S[p],)
            d = d + (W[p * (p + 1) // 2 - 1],)
        psi, s = solve(W, c, d, S0, gamma, BAND)
        keep = s > gamma * S0
        s = tl.where(keep, s, S0)
        w = m
        for k in tl.static_range(1, BAND + 1):
            w -= tl.where(keep, psi[k - 1], 0.0) * ahead(m, k, J)
        w = tl.where(s > 0, w / s, 0.0)
        u = w
        for k in tl.static_range(1, BAND + 1):
            u -= behind(tl.where(keep, psi[k - 1], 0.0) * w, k, J)
    tl.store(g_ptr + o, u.to(G), mask=own)
    partial_ptr += pid.to(tl.int64) * 3
    tl.store(partial_ptr, tl.sum(tl.where(own, a * a, 0.0)))
    tl.store(partial_ptr + 1, tl.sum(tl.where(own, u * u, 0.0)))
    tl.store(partial_ptr + 2, tl.sum(tl.where(own & (good == 0), 1.0, 0.0)))


@triton.jit(do_not_specialize=["tensor0"])
def norms_kernel(table_ptr, partial_ptr, total_ptr, tensor0, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row_ptr, offs = table_ptr + (tl.program_id(0) + tensor0) * COLUMNS, tl.arange(0, BLOCK)
    total_ptr += tl.load(row_ptr + 10) * 3
    first, programs = tl.load(row_ptr + 8), tl.load(row_ptr + 9).to(tl.int32)
    for column in tl.static_range(3):
        acc = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, programs, BLOCK):
            acc += tl.load(partial_ptr + (first + begin + offs) * 3 + column, mask=begin + offs < programs, other=0.0)
        tl.store(total_ptr + column, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["pid0"])
def apply_kernel(
    table_ptr, owner_ptr, total_ptr, pid0,                           # (T, COLUMNS), (P), (T, 3)
    lr, weight_decay,
    P: tl.constexpr, G: tl.constexpr, GRAFT: tl.constexpr, LR_THERE: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    pid = tl.program_id(0) + pid0
    row_ptr, start, length = chunk_of(table_ptr, owner_ptr, pid, COLUMNS, ALIGNED)
    total_ptr += tl.load(row_ptr + 10) * 3
    bad = tl.load(total_ptr + 2) > 0
    rate = tl.load(lr).to(tl.float32) if LR_THERE else tl.cast(lr, tl.float32)
    rate = tl.where(bad, 0.0, rate)
    scale = tl.sqrt(tl.load(total_ptr)) / (tl.sqrt(tl.load(total_ptr + 1)) + 1e-12) if GRAFT else 1.0
    o = tl.arange(0, BLOCK)
    own = o < length
    p_ptr = pointer(row_ptr, 0, P, ALIGNED) + start
    u = tl.load(pointer(row_ptr, 1, G, ALIGNED) + start + o, mask=own, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + o, mask=own, other=0.0).to(tl.float32)
    p -= rate * (scale * u + tl.cast(weight_decay, tl.float32) * p)
    tl.store(p_ptr + o, p.to(P), mask=own)
    if start == 0:                                                   # one program of each tensor counts
        step_ptr, skipped_ptr = pointer(row_ptr, 3, tl.float32, False), pointer(row_ptr, 4, tl.float32, False)
        tl.store(step_ptr, tl.load(step_ptr) + 1)
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(bad, 1.0, 0.0))


def split(n, chain, band, quads):
    """-> how many elements of a tensor of n a program takes, and whether programs overlap."""
    if band == 0 or n <= 4 * quads:
        return 4 * quads, False
    if chain <= 4 * quads and chain % 4 == 0:
        return 4 * quads // chain * chain, False
    return 4 * (quads - 2), True


@functools.lru_cache(64)
def upload(rows, device):
    """-> the table (T, COLUMNS) int64 and for each program its tensor (P) int32, on the device; gradients tend to be where they were."""
    table = torch.tensor(rows)
    owner = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), table[:, 9])
    if device.type == "cuda":                                        # pinned, or the host would wait
        table, owner = table.pin_memory(), owner.pin_memory()
    return table.to(device, non_blocking=True), owner.to(device, non_blocking=True)


def step(works, beta1, beta2, eps, gamma, graft_eps, lr, weight_decay, graft, reduce=None):
    """One step for a list of works: p, g of one shape, m and S (list of band + 1) too, all contiguous on one device, step and skipped ()
    float32, chain the length of a chain. graft "adam", "none", or "plain": Adam's step, S_0 alone. lr: a number, or a tensor () there.
    reduce(totals) may sum (T, 3) over processes that hold other rows of the same tensors, given in the same order."""
    quads, warps, limit = CONFIG
    assert quads >= 32 * warps, "with fewer lanes than threads, some threads would read what others have overwritten"
    device, band = works[0].p.device, len(works[0].S) - 1
    columns, jobs = HEAD.value + band + 1, {}
    for index, work in enumerate(works):
        n, (chunk, halo) = work.p.numel(), split(work.p.numel(), work.chain, band, quads)
        if n == 0:                                                   # a shard without rows
            work.step.add_(1)
            continue
        arrays = [t.data_ptr() for t in (work.p, work.g, work.m, *work.S)]
        aligned = n % 4 == 0 and (band == 0 or work.chain % 4 == 0) and not any(a % 16 for a in arrays)
        rows = jobs.setdefault((work.p.dtype, work.g.dtype, work.m.dtype, halo, aligned), [])
        first = rows[-1][8] + rows[-1][9] if rows else 0             # 8: the tensor's first program, 9: how many, 10: its totals
        rows.append((*arrays[:3], work.step.data_ptr(), work.skipped.data_ptr(), n, work.chain, chunk, first, -(-n // chunk), index,
                     *arrays[3:]))
    totals = torch.zeros(len(works), 3, device=device)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    lr_there = torch.is_tensor(lr) and lr.device == device

    def sums(table, owner, halo, partial, pids, tensors, P, G, M, overlap, aligned):
        if overlap:
            halo_kernel[(len(pids),)](table, owner, halo, pids[0], G, M, band, columns, num_warps=1)
        statistics_kernel[(len(pids),)](table, owner, halo, partial, pids[0], float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2, *logs,
                                        float(eps), float(gamma), float(graft_eps), G, M, band, graft == "plain", overlap, aligned, columns, quads,
                                        num_warps=warps)
        norms_kernel[(len(tensors),)](table, partial, totals, tensors[0], columns, 1024)

    def move(table, owner, halo, partial, pids, tensors, P, G, M, overlap, aligned):
        apply_kernel[(len(pids),)](table, owner, totals, pids[0], lr if lr_there else float(lr), float(weight_decay), P, G,
                                   graft == "adam", lr_there, aligned, columns, 4 * quads, num_warps=warps)
    with torch.cuda.device_of(works[0].p):
        pieces = []
        for (*dtypes, overlap, aligned), rows in jobs.items():
            table, owner = upload(tuple(rows), device)
            partial = torch.empty(len(owner), 3, device=device)
            halo = torch.empty(len(owner) if overlap else 0, band + 3, 8, device=device)
            types, begin, size = [TYPES[d] for d in dtypes], 0, 0
            for end in range(1, len(rows) + 1):                      # tensors begin ... end - 1 go together
                size += rows[end - 1][5]
                if end == len(rows) or size + rows[end][5] > limit and not reduce:
                    pids = range(rows[begin][8], rows[end - 1][8] + rows[end - 1][9])
                    pieces.append((table, owner, halo, partial, pids, range(begin, end), *types, overlap, aligned))
                    begin, size = end, 0
        for piece in pieces:
            sums(*piece)
            if not reduce:
                move(*piece)
        if reduce:
            reduce(totals)
            for piece in pieces:
                move(*piece)
    torch.autograd.graph.increment_version([work.p for work in works])


# What test_all.py builds ahead of time: kernel, argument types, constants, arguments that are multiples of 16, warps
def builds():
    types = {"table_ptr": "*i64", "owner_ptr": "*i32", **dict.fromkeys(("halo_ptr", "partial_ptr", "total_ptr"), "*fp32"), "pid0": "i32",
             "tensor0": "i32", **dict.fromkeys(("beta1", "beta2", "new1", "new2", "log_beta1", "log_beta2", "eps", "gamma", "graft_eps", "lr",
                                                "weight_decay"), "fp32")}
    quads, warps, _ = CONFIG
    fp32, bf16 = tl.float32, tl.bfloat16
    for G, M, band, plain, halo, aligned in ((fp32, fp32, 1, False, False, True), (fp32, fp32, 4, False, False, True),
                                             (bf16, bf16, 1, False, False, True), (bf16, fp32, 4, False, True, False),
                                             (fp32, fp32, 0, True, False, True)):
        yield (statistics_kernel, types, {"G": G, "M": M, "BAND": band, "PLAIN": plain, "HALO": halo, "ALIGNED": aligned,
                                          "COLUMNS": HEAD.value + band + 1, "J": quads}, (), warps)
    yield apply_kernel, types, {"P": fp32, "G": fp32, "GRAFT": True, "LR_THERE": False, "ALIGNED": True, "COLUMNS": 13,
                                "BLOCK": 4 * quads}, (), warps
    yield norms_kernel, types, {"COLUMNS": 13, "BLOCK": 1024}, (), 4
    yield halo_kernel, types, {"G": fp32, "M": fp32, "BAND": 4, "COLUMNS": 16}, (), 1


AOT = list(builds())
