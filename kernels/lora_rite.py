"""LoRA-RITE's step for all pairs A (r, n), B (m, r) of one rank, in four launches.

A side is one factor of a pair, seen as x (rows, r): A transposed, or B. Sides 2 i and 2 i + 1 are
partners. A table of pointers and sizes lets one launch serve sides of all lengths.

1. grams_kernel, a program for 256 to 1024 rows of a side: x^T x, g^T g, x^T M in float64, where
   products of float32 are exact. No atomics: the next launch adds the partial sums in order.
2. roots_kernel, a program for each side: the inverse root of its partner's x^T x by Cholesky, or by
   eigenvalues where that is inaccurate or B = 0; h^T h, P, P V P^T. Then torch adds up |h|^2.
3. moments_kernel, a program for each side: clip, V and its inverse root; D, C, E in float32.
4. apply_kernel, programs as in 1: M <- M D^T + g C, x <- shrink x - M E.

Eigenvalues by Jacobi rotations, the r / 2 pairs (i, i ^ k) at once for k = 1 ... r - 1; 6 to 12
sweeps at r = 16, up to 19 at 64. Nothing waits for the host.

Memory traffic: 32 bytes per fp32 parameter (AdamW: 28), 0.04 ms for 72 pairs of 2048 x 16 on one
H200. The r x r work dominates: 0.209 ms (torch 2.11, triton 3.6); fused AdamW 0.103, eager 12.
Limits: r <= 64, float32, float16 and bfloat16 parameters, below 2^31 elements in a factor.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Largest rank: rows per tile, rows per program, warps for passes over rows, warps for r x r work.
# On sm_90 passes spill nothing, r x r work up to 12 bytes, with escape at r = 64 up to 92.
CONFIG = {16: (32, 256, 2, 1), 32: (32, 512, 8, 4), 64: (16, 1024, 8, 16)}
# A row of the table: pointers to x, g (or 0), M, state; rows, first program, number of programs
COLUMNS = tl.constexpr(7)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Places of the numbers in a state, behind its two matrices
RHO, STEP, LR, SHRINK, SKIPPED = map(tl.constexpr, range(5))


@triton.jit
def pointer(row_ptr, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(TYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def square(ptr, RANK: tl.constexpr, R: tl.constexpr):
    """-> where an (RANK, RANK) matrix of the state lies, [R, R], and which of these there are."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    return ptr + i * RANK + j, (i < RANK) & (j < RANK)


@triton.jit
def whole(ptr, R: tl.constexpr):  # where an (R, R) matrix of our own lies
    return ptr + tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]


@triton.jit
def product(a, b, buffer_ptr, size, R: tl.constexpr):
    """a b in float64, [R, R] each. If registers would not hold both, they come 16 columns and rows
    at a time from memory, (2, R, R). size: R, but as a number that the compiler does not know, or
    it would unroll the loop and hold them all the same."""
    if R == 16:
        return tl.dot(a, b, out_dtype=tl.float64, input_precision="ieee")
    tl.debug_barrier()  # the last product has been read
    tl.store(whole(buffer_ptr, R), a)
    tl.store(whole(buffer_ptr + R * R, R), b)
    tl.debug_barrier()
    i, k = tl.arange(0, R), tl.arange(0, 16)
    acc = tl.zeros((R, R), tl.float64)
    for k0 in range(0, size, 16):
        left = tl.load(buffer_ptr + i[:, None] * R + k0 + k[None, :])  # [R, 16]
        right = tl.load(buffer_ptr + R * R + (k0 + k)[:, None] * R + i[None, :])  # [16, R]
        acc = tl.dot(left, right, acc, out_dtype=tl.float64, input_precision="ieee")
    return acc


@triton.jit
def tile(
    row0, stop, rows, A: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    """-> offsets and mask, [BLOCK, R], of rows row0 ... of a side."""
    i, j = row0 + tl.arange(0, BLOCK)[:, None], tl.arange(0, R)[None, :]
    return i + j * rows if A else i * RANK + j, (i < stop) & (j < RANK)


@triton.jit
def span(table_ptr, owner_ptr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """-> this program's side, its row of the table, the first and the end of its rows of x, and how
    many rows x has."""
    pid = tl.program_id(0)
    side = tl.load(owner_ptr + pid)
    row_ptr = table_ptr + side * COLUMNS
    rows = tl.load(row_ptr + 4).to(tl.int32)
    start = (pid - tl.load(row_ptr + 5).to(tl.int32)) * CHUNK
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    return side, row_ptr, start, tl.minimum(start + CHUNK, rows), rows


@triton.jit
def read(
    ptr,
    row0,
    stop,
    rows,
    there,
    A: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o, own = tile(row0, stop, rows, A, RANK, R, BLOCK)
    return tl.load(ptr + o, mask=own & there, other=0.0).to(tl.float32)  # [BLOCK, R]


@triton.jit
def gram(
    x_ptr,
    y_ptr,
    there,
    start,
    stop,
    rows,
    TWICE: tl.constexpr,
    A: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-> x^T y [R, R] of these rows, and whether x is not finite. TWICE: x^T x, with 0 for what is
    not finite. Tiles are read one ahead: it saves time, and Triton 3.6 fails if a product of
    float64 sees where bfloat16 comes from."""
    acc, bad = tl.zeros((R, R), tl.float64), tl.zeros((BLOCK, R), tl.int32)
    x = read(x_ptr, start, stop, rows, there, A, RANK, R, BLOCK)
    y = x if TWICE else read(y_ptr, start, stop, rows, there, A, RANK, R, BLOCK)
    for row0 in range(start, stop, BLOCK):
        next_x = read(x_ptr, row0 + BLOCK, stop, rows, there, A, RANK, R, BLOCK)
        next_y = (
            next_x if TWICE else read(y_ptr, row0 + BLOCK, stop, rows, there, A, RANK, R, BLOCK)
        )
        if TWICE:
            good = tl.abs(x) < float("inf")  # false for NaN too
            bad += tl.where(good, 0, 1)
            x = tl.where(good, x, 0.0)
            y = x
        acc = tl.dot(
            tl.trans(x.to(tl.float64)),
            y.to(tl.float64),
            acc,
            out_dtype=tl.float64,
            input_precision="ieee",
        )
        x, y = next_x, next_y
    return acc, tl.max(tl.max(bad, 1), 0)


@triton.jit
def grams(
    row_ptr,
    partial_ptr,
    bad_ptr,
    start,
    stop,
    rows,
    A: tl.constexpr,
    X: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x_ptr, g_ptr = pointer(row_ptr, 0, X, ALIGNED), pointer(row_ptr, 1, X, ALIGNED)
    at, there = whole(partial_ptr, R), tl.load(row_ptr + 1) != 0
    K, _ = gram(
        x_ptr, x_ptr, True, start, stop, rows, True, A, RANK, R, BLOCK
    )  # one after another: registers hold but one
    tl.store(at, K)
    T, _ = gram(
        x_ptr,
        pointer(row_ptr, 2, tl.float32, ALIGNED),
        True,
        start,
        stop,
        rows,
        False,
        A,
        RANK,
        R,
        BLOCK,
    )
    tl.store(at + R * R, tl.where(tl.abs(T) < float("inf"), T, 0.0))
    G, bad = gram(g_ptr, g_ptr, there, start, stop, rows, True, A, RANK, R, BLOCK)
    tl.store(at + 2 * R * R, G)
    tl.store(bad_ptr, bad)


@triton.jit
def grams_kernel(
    table_ptr, owner_ptr, partial_ptr, bad_ptr,  # (S, COLUMNS), (P,), (P, 3, R, R), (P,)
    X: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    side, row_ptr, start, stop, rows = span(table_ptr, owner_ptr, CHUNK, ALIGNED)
    partial_ptr += pid * 3 * R * R
    if side % 2 == 0:
        grams(
            row_ptr, partial_ptr, bad_ptr + pid, start, stop, rows, True, X, ALIGNED, RANK, R, BLOCK
        )
    else:
        grams(
            row_ptr,
            partial_ptr,
            bad_ptr + pid,
            start,
            stop,
            rows,
            False,
            X,
            ALIGNED,
            RANK,
            R,
            BLOCK,
        )


@triton.jit
def added(row_ptr, partial_ptr, which: tl.constexpr, R: tl.constexpr):
    """-> the sum of a side's partial K (0), T (1) or G (2), in their order."""
    acc, first = tl.zeros((R, R), tl.float64), tl.load(row_ptr + 5)
    for n in range(0, tl.load(row_ptr + 6).to(tl.int32)):
        acc += tl.load(whole(partial_ptr + ((first + n) * 3 + which) * R * R, R))
    return acc


@triton.jit
def eigen(A, ROUNDS: tl.constexpr, R: tl.constexpr):
    """A symmetric [R, R] matrix -> w [R], Q [R, R] with A = Q diag(w) Q^T, in no order. ROUNDS: a
    power of 2; beyond it A is 0."""
    one, i, j = tl.arange(0, R), tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    Q = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    size = tl.sum(tl.sum(A * A, 1), 0)
    off, sweep = size, 0
    while (off > 1.2e-32 * size) & (sweep < 30):  # 2^-106
        for k in range(1, ROUNDS):
            # all pairs (i, p = i ^ k): tan 2 theta = 2 A_ip / (A_pp - A_ii), |theta| <= pi / 4, and
            # the angle of p is that of i, negative
            d = tl.sum(tl.where(i == j, A, 0.0), 1)  # [R]
            o = tl.sum(tl.where(j == (i ^ k), A, 0.0), 1)
            o += tl.gather(o, one ^ k, 0)  # 2 A_ip, the same for both bit for bit
            tau = (tl.gather(d, one ^ k, 0) - d) / tl.where(o != 0, o, 1.0)
            sign = tl.where((tau > 0) | (tau == 0) & (one < (one ^ k)), 1.0, -1.0)
            t = tl.where(o != 0, sign / (tl.abs(tau) + tl.sqrt(1 + tau * tau)), 0.0)
            c = 1 / tl.sqrt(1 + t * t)
            s = c * t
            A = A * c[None, :] - tl.gather(A, tl.broadcast_to(j ^ k, (R, R)), 1) * s[None, :]
            A = A * c[:, None] - tl.gather(A, tl.broadcast_to(i ^ k, (R, R)), 0) * s[:, None]
            A = tl.where(j == (i ^ k), 0.0, tl.where(i == j, (d - t * o * 0.5)[:, None], A))
            Q = Q * c[None, :] - tl.gather(Q, tl.broadcast_to(j ^ k, (R, R)), 1) * s[None, :]
        off = tl.sum(tl.sum(tl.where(i == j, 0.0, A * A), 1), 0)
        sweep += 1
    return tl.sum(tl.where(i == j, A, 0.0), 1), Q


@triton.jit
def inverse_root(
    K_ptr, I_ptr, buffer_ptr, size, RANK: tl.constexpr, ROUNDS: tl.constexpr, R: tl.constexpr
):
    """lora_rite.inverse_root for one (R, R) matrix, from memory to memory."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    rest, W = (
        tl.load(whole(K_ptr, R)),
        tl.where((i == j) & (i < RANK), 1.0, 0.0).to(tl.float64),
    )  # W becomes the inverse of the lower factor
    least, most = tl.full((), float("inf"), tl.float64), tl.zeros((), tl.float64)
    for n in range(RANK):
        row, column = (
            tl.sum(tl.where(i == n, rest, 0.0), 0),
            tl.sum(tl.where(j == n, rest, 0.0), 1),
        )  # [R]
        d = tl.sum(tl.where(tl.arange(0, R) == n, row, 0.0), 0)
        pivot = tl.where(d > 0, tl.sqrt(tl.where(d > 0, d, 1.0)), -1.0)
        least, most = tl.minimum(least, pivot), tl.maximum(most, pivot)
        scale = 1 / pivot
        rest -= (column * scale)[:, None] * (row * scale)[None, :]
        w = tl.sum(tl.where(i == n, W, 0.0), 0) * scale
        W = tl.where(
            i == n, w[None, :], W - tl.where(i > n, (column * scale)[:, None] * w[None, :], 0.0)
        )
    tl.store(whole(I_ptr, R), tl.trans(W))
    if (least > 1e-7 * most) == 0:
        tl.debug_barrier()  # other threads write the same places below
        w, Q = eigen(tl.load(whole(K_ptr, R)), ROUNDS, R)
        live = w > 1e-12 * tl.max(w, 0)
        w = tl.where(live, tl.rsqrt(tl.where(live, w, 1.0)), 0.0)
        tl.store(whole(I_ptr, R), product(Q * w[None, :], tl.trans(Q), buffer_ptr, size, R))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["size"])
def roots_kernel(
    table_ptr, partial_ptr, bad_ptr,  # (S, COLUMNS), (P, 3, R, R), (P,)
    small_ptr, number_ptr,  # (S, 6, R, R), (S, 3)
    size, limit: "fp64",  # noqa: F821
    RANK: tl.constexpr, ROUNDS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    side = tl.program_id(0)
    row_ptr, other_ptr = table_ptr + side * COLUMNS, table_ptr + (side ^ 1) * COLUMNS
    small_ptr += side.to(tl.int64) * 6 * R * R
    out, buffer_ptr = whole(small_ptr, R), small_ptr + 4 * R * R
    first, bad = tl.load(row_ptr + 5), tl.zeros((), tl.int32)
    for n in range(0, tl.load(row_ptr + 6).to(tl.int32)):
        bad = tl.maximum(bad, tl.load(bad_ptr + first + n))

    tl.store(out + 2 * R * R, added(other_ptr, partial_ptr, 0, R))
    tl.debug_barrier()
    inverse_root(
        small_ptr + 2 * R * R, small_ptr, buffer_ptr, size, RANK, ROUNDS, R
    )  # of the partner
    G = tl.where(bad > 0, 0.0, added(row_ptr, partial_ptr, 2, R))
    h2 = product(
        G, tl.load(out), buffer_ptr, size, R
    )  # what is used again is read again: registers are few
    h2 = product(tl.trans(tl.load(out)), h2, buffer_ptr, size, R)
    trace = tl.sum(
        tl.sum(tl.where(tl.arange(0, R)[:, None] == tl.arange(0, R)[None, :], h2, 0.0), 1), 0
    )
    keep = (bad == 0) & (trace <= limit * tl.load(row_ptr + 4).to(tl.float64) * RANK)
    tl.store(out + R * R, tl.where(keep, h2, 0.0))
    tl.store(number_ptr + side * 3, tl.where(keep, trace, 0.0))
    tl.store(number_ptr + side * 3 + 1, tl.where(keep, 0.0, 1.0))  # skipped
    tl.store(
        number_ptr + side * 3 + 2, tl.where((bad > 0) | (tl.load(row_ptr + 1) == 0), 1.0, 0.0)
    )  # holds still

    state, other = pointer(row_ptr, 3, tl.float64, False), pointer(other_ptr, 3, tl.float64, False)
    number = other + 2 * RANK * RANK
    at, own = square(state, RANK, R)
    undone = product(
        added(other_ptr, partial_ptr, 1, R),
        tl.trans(tl.load(at + RANK * RANK, mask=own, other=0.0)),
        buffer_ptr,
        size,
        R,
    )
    undone = (
        tl.load(out + 2 * R * R) + tl.load(number + LR) * undone
    )  # x_now^T x_old of the partner, times shrink
    other_at, own = square(other + RANK * RANK, RANK, R)
    P = product(undone, tl.load(other_at, mask=own, other=0.0), buffer_ptr, size, R) / tl.load(
        number + SHRINK
    )
    P = product(tl.trans(tl.load(out)), P, buffer_ptr, size, R)
    tl.store(out + 2 * R * R, P)
    moved = product(P, tl.load(at, mask=own, other=0.0), buffer_ptr, size, R)
    tl.debug_barrier()
    tl.store(
        out + 3 * R * R, product(moved, tl.trans(tl.load(out + 2 * R * R)), buffer_ptr, size, R)
    )


@triton.jit
def ascending(w, RANK: tl.constexpr, R: tl.constexpr):
    """The first RANK of w [R], sorted; after them 0."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    across = tl.sum(tl.where(i == j, w[:, None], 0.0), 0)  # w once more, along columns
    before = (across[None, :] < w[:, None]) | (across[None, :] == w[:, None]) & (j < i)
    place = tl.sum(tl.where(before & (j < RANK), 1, 0), 1)  # of w_i
    return tl.sum(tl.where((place[:, None] == j) & (i < RANK), w[:, None], 0.0), 0)


@triton.jit
def decay(log_beta, t):
    """lora_rite.decay: beta (1 - beta^(t-1)) / (1 - beta^t), t >= 1; 0 for beta = 0."""
    l = tl.maximum(tl.full((), log_beta, tl.float64), -1e300)  # 0 times this is 0
    return tl.exp(l) * (1 - tl.exp((t - 1) * l)) / (1 - tl.exp(t * l))


@triton.jit(do_not_specialize=["size"])
def moments_kernel(
    table_ptr, small_ptr, number_ptr,  # (S, COLUMNS), (S, 6, R, R), (S, 3)
    total_ptr, move_ptr,  # (), (S, 3, R, R)
    size,
    lr: "fp64", log_beta1: "fp64", log_beta2: "fp64", eps: "fp64",  # noqa: F821
    clip: "fp64", weight_decay: "fp64",  # noqa: F821
    lr_ptr,  # (), read instead of lr if LR_THERE
    LR_THERE: tl.constexpr, ESCAPE: tl.constexpr, OWN_COUNT: tl.constexpr,
    RANK: tl.constexpr, ROUNDS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    side = tl.program_id(0)
    row_ptr = table_ptr + side * COLUMNS
    state = pointer(row_ptr, 3, tl.float64, False)
    number, rows = state + 2 * RANK * RANK, tl.load(row_ptr + 4).to(tl.float64)
    at, buffer_ptr = (
        whole(small_ptr + side.to(tl.int64) * 6 * R * R, R),
        small_ptr + (side.to(tl.int64) * 6 + 4) * R * R,
    )
    trace, skipped, still = (
        tl.load(number_ptr + side * 3),
        tl.load(number_ptr + side * 3 + 1),
        tl.load(number_ptr + side * 3 + 2),
    )
    norm = tl.sqrt(tl.load(total_ptr))
    c = tl.where(norm > clip, clip / norm, 1.0)
    step = tl.load(number + STEP) + (tl.where(trace > 0, 1.0, 0.0) if OWN_COUNT else 1.0)
    t = tl.maximum(step, 1.0)
    d1, d2 = decay(log_beta1, t), decay(log_beta2, t)

    V_at, own = square(state, RANK, R)
    rho = tl.load(number + RHO)
    if ESCAPE:
        V, moved = tl.load(V_at, mask=own, other=0.0), tl.load(at + 3 * R * R)
        before, _ = eigen((V + tl.trans(V)) / 2, ROUNDS, R)
        after, _ = eigen((moved + tl.trans(moved)) / 2, ROUNDS, R)
        lost = ascending(before, RANK, R) - ascending(after, RANK, R)
        rho = d2 * (
            rho + tl.minimum(tl.maximum(tl.max(lost, 0), 0.0), tl.maximum(tl.sum(lost, 0), 0.0))
        )
    V = d2 * tl.load(at + 3 * R * R) + (1 - d2) * c * c * tl.load(at + R * R) / rows
    tl.store(V_at, V, mask=own)
    w, Q = eigen((V + tl.trans(V)) / 2, ROUNDS, R)
    inverse = product(
        Q * (1 / (tl.sqrt(tl.maximum(w, 0.0) + rho) + eps))[None, :],
        tl.trans(Q),
        buffer_ptr,
        size,
        R,
    )

    rate = tl.load(lr_ptr).to(tl.float64) if LR_THERE else tl.full((), lr, tl.float64)
    rate = tl.where(still > 0, 0.0, rate)
    shrink = 1 - rate * weight_decay
    move_at = whole(move_ptr + side.to(tl.int64) * 3 * R * R, R)
    I_other = tl.load(at)
    tl.store(move_at, (d1 * tl.trans(tl.load(at + 2 * R * R))).to(tl.float32))
    tl.store(
        move_at + R * R,
        ((1 - d1) * c * product(I_other, inverse, buffer_ptr, size, R)).to(tl.float32),
    )
    tl.store(move_at + 2 * R * R, (rate * tl.trans(I_other)).to(tl.float32))
    I = tl.load(
        whole(small_ptr + (side ^ 1).to(tl.int64) * 6 * R * R, R)
    )  # this side's own, found for its partner
    tl.store(V_at + RANK * RANK, I, mask=own)
    tl.store(number + RHO, rho)
    tl.store(number + STEP, step)
    tl.store(number + LR, rate)
    tl.store(number + SHRINK, shrink)
    tl.store(number + SKIPPED, tl.load(number + SKIPPED) + skipped)


@triton.jit
def apply(
    row_ptr,
    start,
    stop,
    rows,
    D,
    C,
    E,
    shrink,
    there,
    A: tl.constexpr,
    X: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x_ptr, g_ptr = pointer(row_ptr, 0, X, ALIGNED), pointer(row_ptr, 1, X, ALIGNED)
    m_ptr = pointer(row_ptr, 2, tl.float32, ALIGNED)
    for row0 in range(start, stop, BLOCK):
        o, own = tile(row0, stop, rows, A, RANK, R, BLOCK)
        x = read(x_ptr, row0, stop, rows, True, A, RANK, R, BLOCK)
        m = tl.dot(
            read(m_ptr, row0, stop, rows, True, A, RANK, R, BLOCK), D, input_precision="ieee"
        )
        m = tl.dot(
            read(g_ptr, row0, stop, rows, there, A, RANK, R, BLOCK), C, m, input_precision="ieee"
        )
        tl.store(m_ptr + o, m, mask=own)
        tl.store(x_ptr + o, (shrink * x - tl.dot(m, E, input_precision="ieee")).to(X), mask=own)


@triton.jit
def apply_kernel(
    table_ptr, owner_ptr, number_ptr, move_ptr,  # (S, COLUMNS), (P,), (S, 3), (S, 3, R, R)
    X: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    side, row_ptr, start, stop, rows = span(table_ptr, owner_ptr, CHUNK, ALIGNED)
    at = whole(move_ptr + side.to(tl.int64) * 3 * R * R, R)
    D, C, E = tl.load(at), tl.load(at + R * R), tl.load(at + 2 * R * R)
    shrink = tl.load(pointer(row_ptr, 3, tl.float64, False) + 2 * RANK * RANK + SHRINK).to(
        tl.float32
    )
    there = (tl.load(row_ptr + 1) != 0) & (tl.load(number_ptr + side * 3 + 1) == 0)
    if side % 2 == 0:
        apply(row_ptr, start, stop, rows, D, C, E, shrink, there, True, X, ALIGNED, RANK, R, BLOCK)
    else:
        apply(row_ptr, start, stop, rows, D, C, E, shrink, there, False, X, ALIGNED, RANK, R, BLOCK)


# --------------------------------------------------------------------------------------------------
# Host: tables of pointers, launches


class Measured(NamedTuple):
    """What the first half of a step leaves for the second, for S factors of one rank."""

    parameters: list  # [A, B, A, B, ...]
    tensors: list  # contiguous gradients, which the table points to: alive until the last launch
    table: torch.Tensor  # (S, COLUMNS) int64
    owner: torch.Tensor  # (P,) int32, the factor of each program of a pass over rows
    small: torch.Tensor  # (S, 6, R, R) float64
    number: torch.Tensor  # (S, 3) float64
    row_options: dict  # of the launches that pass over rows
    matrix_options: dict  # of the launches for r x r work
    norm_squared: torch.Tensor  # () |h|^2 of these pairs


def takes(A, B):
    """Return whether the kernels take a pair A (r, n), B (m, r)."""
    return (
        A.dtype == B.dtype
        and A.dtype in TYPES
        and A.device == B.device
        and 0 < A.shape[0] <= 64
        and A.is_contiguous()
        and B.is_contiguous()
        and max(A.numel(), B.numel()) < 2**31
    )


RECENT_TABLES = {}  # tables on the device, as parameters and gradients tend to stay where they are
CAPTURED_TABLES = []  # a CUDA graph reads its tables at each replay, so they are never freed


def is_capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pointer_table(rows, device):
    """Return the table (S, COLUMNS) int64 of `rows`, and each program's factor (P,) int32.

    While a graph is captured nothing is copied yet, so tables made then are not for other calls.
    """
    found = RECENT_TABLES.get((rows, device))
    if not found:
        table = torch.tensor(rows)
        factors = torch.arange(len(rows), dtype=torch.int32)
        host = [table, torch.repeat_interleave(factors, table[:, 6])]
        if device.type == "cuda":  # pinned, or the host would wait
            host = [t.pin_memory() for t in host]
        found = [t.to(device, non_blocking=True) for t in host] + host
        if not is_capturing(device):
            RECENT_TABLES[rows, device] = found
            if len(RECENT_TABLES) > 64:
                del RECENT_TABLES[next(iter(RECENT_TABLES))]
    if is_capturing(device):
        CAPTURED_TABLES.append(found)
    return found[0], found[1]


def measure(parameters, states, skip):
    """Take the first half of a step, for pairs of one rank, dtype and device.

    parameters: [A (r, n), B (m, r), A, B, ...], contiguous; states: {"M", "packed"} for each, see
    lora_rite.unpack. skip: largest RMS of an unmagnified gradient; 0: none.
    """
    rank = len(parameters[0])
    device = parameters[0].device
    X = TYPES[parameters[0].dtype]
    R = max(16, triton.next_power_of_2(rank))
    block, chunk, row_warps, matrix_warps = CONFIG[R]

    # the table of pointers and sizes
    rows = []
    grads = []
    programs = 0
    all_bits = 0  # of addresses and sizes, to see whether all are multiples of 16
    for n, (p, state) in enumerate(zip(parameters, states)):
        grad = None if p.grad is None else p.grad.to(p.dtype).contiguous()
        grads.append(grad)
        pointers = p.data_ptr(), 0 if grad is None else grad.data_ptr(), state["M"].data_ptr()
        length = p.shape[1 - n % 2]
        count = triton.cdiv(length, chunk)
        rows.append((*pointers, state["packed"].data_ptr(), length, programs, count))
        programs += count
        all_bits |= pointers[0] | pointers[1] | pointers[2] | length
    table, owner = pointer_table(tuple(rows), device)

    # launch
    row_options = dict(X=X, ALIGNED=all_bits % 16 == 0, RANK=rank, R=R, BLOCK=block, CHUNK=chunk)
    row_options["num_warps"] = row_warps
    matrix_options = dict(RANK=rank, ROUNDS=triton.next_power_of_2(rank), R=R)
    matrix_options.update(num_warps=matrix_warps, num_stages=1)
    S = len(rows)
    partial = torch.empty(programs, 3, R, R, dtype=torch.float64, device=device)
    bad = torch.empty(programs, dtype=torch.int32, device=device)
    small = torch.empty(S, 6, R, R, dtype=torch.float64, device=device)
    number = torch.empty(S, 3, dtype=torch.float64, device=device)
    limit = float(skip) ** 2 if skip else math.inf
    with torch.cuda.device_of(table):
        grams_kernel[(programs,)](table, owner, partial, bad, **row_options)
        roots_kernel[(S,)](table, partial, bad, small, number, R, limit, **matrix_options)
    norm_squared = number[:, 0].sum()
    return Measured(
        parameters, grads, table, owner, small, number, row_options, matrix_options, norm_squared
    )


def finish(measured, total, *, clip, lr, betas, eps, weight_decay, escape, own_count):
    """Take the second half of a step, given |h|^2 of all pairs (), on any device.

    clip: largest |h|; 0: none. lr: a number, or a tensor () which is read on the device.
    """
    table = measured.table
    device = table.device
    R = measured.row_options["R"]
    S = len(table)
    move = torch.empty(S, 3, R, R, device=device)
    total = total.to(device)
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    lr_on_device = torch.is_tensor(lr) and lr.device == device
    lr_number = 0.0 if lr_on_device else float(lr)
    lr_pointer = lr if lr_on_device else measured.number
    with torch.cuda.device_of(table):
        moments_kernel[(S,)](
            table, measured.small, measured.number, total, move, R,
            lr_number, *logs, float(eps), float(clip) or math.inf, float(weight_decay), lr_pointer,
            lr_on_device, escape, own_count, **measured.matrix_options,
        )  # fmt: skip
        apply_kernel[(len(measured.owner),)](
            table, measured.owner, measured.number, move, **measured.row_options
        )
    torch.autograd.graph.increment_version(measured.parameters)
