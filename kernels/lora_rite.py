"""One LoRA-RITE step of all pairs A (r, n), B (m, r) of one rank, in four launches.

x (rows, r) is a factor as a tall matrix: A transposed, or B. y is its partner, the other factor of
the pair. As in lora_rite.py, Ry (r, r) is a matrix with Ry^T Ry = y^T y, and h = grad Ry^-1 is the
unmagnified gradient of x. V (r, r) is the second moment of h, and M (rows, r) the first moment of
the preconditioned h. P (r, r) moves both to the basis of this step.

1. gram_kernel: x^T x, x^T M and grad^T grad in float64. One program per chunk of rows.
2. root_kernel: Ry^-1, h^T h, P and P V P^T. One program per factor x. PyTorch sums |h|^2.
3. moment_kernel: V, its inverse root, and the matrices of launch 4. One program per factor x.
4. update_kernel: M <- M M_matrix + grad grad_matrix, x <- shrink x - M x_matrix. Grid as in 1.

Factors may differ in length: a table on the GPU has the address and the size of each. There are no
atomics, so results repeat bit for bit. The host never waits for the GPU.

On one H200 (torch 2.11, Triton 3.6), a step of 72 pairs A (16, 2048), B (2048, 16) takes 0.209 ms,
fused AdamW 0.103 ms, and this step in PyTorch 12 ms. The memory traffic of 32 bytes per float32
parameter (AdamW: 28) would take 0.04 ms. Most of the time goes into launches 2 and 3.
Limits: r <= 64; float32, float16 and bfloat16 parameters of fewer than 2^31 elements.
"""

import math

import torch
import triton
import triton.language as tl

MAX_RANK = 64
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# The keys of these dicts are R: the rank, rounded up to a power of two and to at least 16. All
# r x r matrices are padded to R x R. On sm_90, launches 1 and 4 spill no registers, and 2 and 3
# spill at most 12 bytes per thread (72 at rank 64 with escape).
TILE_ROWS = {16: 32, 32: 32, 64: 16}  # rows of x that a program of launch 1 or 4 loads at once
CHUNK_ROWS = {16: 256, 32: 512, 64: 1024}  # rows that it works on in all, in a loop over tiles
ROW_WARPS = {16: 2, 32: 8, 64: 8}  # warps in launches 1 and 4
MATRIX_WARPS = {16: 1, 32: 4, 64: 16}  # warps in launches 2 and 3

# The table, int64 (factors, COLUMNS), has one row for each factor: A, its B, the next A, its B, ...
# The partner of factor f is f ^ 1. row_ptr points to a row of this table, x_row_ptr to that of x;
# `rows` is the number of rows of the tall matrix x. The columns are:
X_PTR = tl.constexpr(0)
GRAD_PTR = tl.constexpr(1)  # without a gradient, the address of x: something that can be read
M_PTR = tl.constexpr(2)  # first moment, stored like x
STATE_PTR = tl.constexpr(3)  # see STATE_V below
HAS_GRAD = tl.constexpr(4)
ROWS = tl.constexpr(5)  # the number of rows of x
FIRST_PROGRAM = tl.constexpr(6)  # in launches 1 and 4, see the sketch below
NUM_PROGRAMS = tl.constexpr(7)  # how many programs share the rows of this factor
COLUMNS = tl.constexpr(8)

# Launches 1 and 4 cut the rows of x into chunks of CHUNK_ROWS, one for each program. For example:
#
#     factor   0 (A)          1 (B)   2 (A)      3 (B)
#     rows     |----|----|--| |----|  |----|---| |----|
#     program   0    1    2    3       4    5     6         FIRST_PROGRAM of factor 2 is 4
#
# Launch 1 writes three matrices for each chunk, (programs, PARTIALS, R, R). They are partial sums:
# the sum over the chunks of a factor is the matrix of the whole factor.
XX = tl.constexpr(0)  # x^T x
XM = tl.constexpr(1)  # x^T M
GG = tl.constexpr(2)  # grad^T grad
PARTIALS = tl.constexpr(3)

# Launch 2 writes these matrices for launch 3 to a workspace, (factors, WORK, R, R)
RY_INV = tl.constexpr(0)  # Ry^-1
HH = tl.constexpr(1)  # h^T h
P = tl.constexpr(2)  # into the basis of this step; y^T y until P is known
PVP = tl.constexpr(3)  # P V P^T
SCRATCH = tl.constexpr(4)  # two matrices, the operands of matmul
WORK = tl.constexpr(6)

# It also writes these scalars, (factors, SCALARS)
HH_TRACE = tl.constexpr(0)  # |h|^2
IS_SKIPPED = tl.constexpr(1)  # 1 if the gradient or its square is not finite, else 0
SCALARS = tl.constexpr(2)

# Launch 3 writes the matrices by which launch 4 multiplies, (factors, MATRICES, R, R)
M_MATRIX, GRAD_MATRIX, X_MATRIX = map(tl.constexpr, range(3))
MATRICES = tl.constexpr(3)

# The state of a factor is two matrices (r, r), then five scalars; see lora_rite.FactorState
STATE_V, STATE_R_INV = map(tl.constexpr, range(2))  # V and R^-1, where R^T R = x^T x
RHO, STEP, LR, SHRINK, SKIPPED = map(tl.constexpr, range(5))

# --------------------------------------------------------------------------------------------------
# Addresses


@triton.jit
def load_ptr(row_ptr, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address from a row of the table. ALIGNED: promise that it is a multiple of 16."""
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def matrix_ptrs(ptr, index, R: tl.constexpr):
    """Return the addresses of matrix number `index` in an array (..., R, R): [R, R]."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    return ptr + index * R * R + i * R + j


@triton.jit
def load_state_matrix(state_ptr, index: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr):
    """Load V (index STATE_V) or R^-1 (STATE_R_INV) of a state, padded with zeros to [R, R]."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    ptr = state_ptr + index * RANK * RANK
    return tl.load(ptr + i * RANK + j, mask=(i < RANK) & (j < RANK), other=0.0)


@triton.jit
def store_state_matrix(state_ptr, index: tl.constexpr, matrix, RANK: tl.constexpr, R: tl.constexpr):
    """Store the first RANK rows and columns of a matrix [R, R] as V or R^-1 of a state."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    ptr = state_ptr + index * RANK * RANK
    tl.store(ptr + i * RANK + j, matrix, mask=(i < RANK) & (j < RANK))


@triton.jit
def tile_offsets(
    start, end, rows, IS_A: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr
):
    """Return offsets of rows start, start + 1, ... of x (rows, r), and a mask, both [TILE, R].

    rows: the number of rows of x. The mask is false from row `end` on.
    In memory, x[i, j] is element A[j, i] of A (r, rows), or element B[i, j] of B (rows, r).
    """
    i = start + tl.arange(0, TILE)[:, None]
    j = tl.arange(0, R)[None, :]
    offs = i + j * rows if IS_A else i * RANK + j
    return offs, (i < end) & (j < RANK)


@triton.jit
def load_tile(
    ptr, start, end, rows, IS_A: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Load rows start, start + 1, ... of x as float32 [TILE, R]; 0 from row `end` on."""
    offs, mask = tile_offsets(start, end, rows, IS_A, RANK, R, TILE)
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def find_rows(table_ptr, factor_of_program_ptr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return which rows of which factor this program of launch 1 or 4 works on.

    factor: the number of the factor. row_ptr: its row of the table. rows: the number of rows of x.
    start, end: this program takes rows start, ..., end - 1 of x, at most CHUNK of them.

    In the sketch above with CHUNK = 256, program 5 takes the rows of factor 2 from 256 on.
    """
    pid = tl.program_id(0)
    factor = tl.load(factor_of_program_ptr + pid)
    row_ptr = table_ptr + factor * COLUMNS
    rows = tl.load(row_ptr + ROWS).to(tl.int32)
    chunk = pid - tl.load(row_ptr + FIRST_PROGRAM).to(tl.int32)  # 0, 1, ... within the factor
    start = chunk * CHUNK
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    end = tl.minimum(start + CHUNK, rows)
    return factor, row_ptr, start, end, rows


# --------------------------------------------------------------------------------------------------
# Launch 1: Gram matrices


@triton.jit
def self_gram(
    ptr, start, end, rows, IS_A: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return x^T x of rows start, ..., end - 1 in float64, [R, R]. x is a factor or a gradient.

    Values that are not finite count as 0. Also returns a number that is 0 if there are none.

    Each iteration loads the tile of the next one. This hides the latency of the loads. Also, Triton
    3.6 cannot compile a float64 product of values loaded as bfloat16 in the same iteration.
    """
    acc = tl.zeros((R, R), tl.float64)
    num_bad = tl.zeros((TILE, R), tl.int32)
    x = load_tile(ptr, start, end, rows, IS_A, RANK, R, TILE)
    for tile_start in range(start, end, TILE):
        next_x = load_tile(ptr, tile_start + TILE, end, rows, IS_A, RANK, R, TILE)
        is_finite = tl.abs(x) < float("inf")  # false for NaN too
        num_bad += tl.where(is_finite, 0, 1)
        x = tl.where(is_finite, x, 0.0)
        x_t = tl.trans(x.to(tl.float64))
        acc = tl.dot(x_t, x.to(tl.float64), acc, out_dtype=tl.float64, input_precision="ieee")
        x = next_x
    return acc, tl.max(tl.max(num_bad, 1), 0)


@triton.jit
def cross_gram(
    x_ptr, m_ptr, start, end, rows, IS_A: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return x^T M of rows start, ..., end - 1 in float64, [R, R]. The loop is as in self_gram."""
    acc = tl.zeros((R, R), tl.float64)
    x = load_tile(x_ptr, start, end, rows, IS_A, RANK, R, TILE)
    m = load_tile(m_ptr, start, end, rows, IS_A, RANK, R, TILE)
    for tile_start in range(start, end, TILE):
        next_x = load_tile(x_ptr, tile_start + TILE, end, rows, IS_A, RANK, R, TILE)
        next_m = load_tile(m_ptr, tile_start + TILE, end, rows, IS_A, RANK, R, TILE)
        x_t = tl.trans(x.to(tl.float64))
        acc = tl.dot(x_t, m.to(tl.float64), acc, out_dtype=tl.float64, input_precision="ieee")
        x = next_x
        m = next_m
    return acc


@triton.jit
def gram_chunk(
    row_ptr, partial_ptr, bad_ptr, start, end, rows, IS_A: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the three Gram matrices of rows start, ..., end - 1 of a factor.

    Stores 0 at bad_ptr if all values of the gradient are finite, else a positive number.
    """
    x_ptr = load_ptr(row_ptr, X_PTR, DTYPE, ALIGNED)
    g_ptr = load_ptr(row_ptr, GRAD_PTR, DTYPE, ALIGNED)
    m_ptr = load_ptr(row_ptr, M_PTR, tl.float32, ALIGNED)
    out_ptrs = matrix_ptrs(partial_ptr, 0, R)  # of the first of three matrices

    # one matrix after the other, because the registers hold only one accumulator
    xx, _ = self_gram(x_ptr, start, end, rows, IS_A, RANK, R, TILE)
    tl.store(out_ptrs + XX * R * R, xx)
    xm = cross_gram(x_ptr, m_ptr, start, end, rows, IS_A, RANK, R, TILE)
    xm = tl.where(tl.abs(xm) < float("inf"), xm, 0.0)
    tl.store(out_ptrs + XM * R * R, xm)
    gg, is_bad = self_gram(g_ptr, start, end, rows, IS_A, RANK, R, TILE)
    tl.store(out_ptrs + GG * R * R, gg)
    tl.store(bad_ptr, is_bad)


@triton.jit
def gram_kernel(
    table_ptr, factor_of_program_ptr,  # (factors, COLUMNS), (programs,)
    partial_ptr, bad_ptr,  # outputs (programs, PARTIALS, R, R), (programs,)
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Compute the partial sums of one chunk: x^T x, x^T M and grad^T grad."""
    pid = tl.program_id(0).to(tl.int64)
    factor, row_ptr, start, end, rows = find_rows(table_ptr, factor_of_program_ptr, CHUNK, ALIGNED)
    partial_ptr += pid * PARTIALS * R * R
    bad_ptr += pid

    # factors 0, 2, ... are A; the code is compiled twice, with IS_A = True and False, because the
    # best register layout for A (r, rows) is not that for B (rows, r)
    if factor % 2 == 0:
        gram_chunk(
            row_ptr, partial_ptr, bad_ptr, start, end, rows, True, DTYPE, ALIGNED, RANK, R, TILE
        )
    else:
        gram_chunk(
            row_ptr, partial_ptr, bad_ptr, start, end, rows, False, DTYPE, ALIGNED, RANK, R, TILE
        )


# --------------------------------------------------------------------------------------------------
# r x r matrices in float64


@triton.jit
def matmul(a, b, scratch_ptr, runtime_R, R: tl.constexpr):
    """Return a @ b, [R, R]. scratch_ptr: memory for both operands, (2, R, R).

    Beyond R = 16, the registers cannot hold both operands. So these are stored, and loaded again in
    parts: 16 columns of a and 16 rows of b at a time. runtime_R equals R, but the compiler does not
    know that. Otherwise it would unroll the loop and hold all parts in registers at once.
    """
    if R == 16:
        return tl.dot(a, b, out_dtype=tl.float64, input_precision="ieee")
    tl.debug_barrier()  # other threads may still read the operands of the previous product
    tl.store(matrix_ptrs(scratch_ptr, 0, R), a)
    tl.store(matrix_ptrs(scratch_ptr, 1, R), b)
    tl.debug_barrier()
    i = tl.arange(0, R)
    acc = tl.zeros((R, R), tl.float64)
    for start in range(0, runtime_R, 16):
        k = start + tl.arange(0, 16)
        a_columns = tl.load(scratch_ptr + i[:, None] * R + k[None, :])  # [R, 16]
        b_rows = tl.load(scratch_ptr + R * R + k[:, None] * R + i[None, :])  # [16, R]
        acc = tl.dot(a_columns, b_rows, acc, out_dtype=tl.float64, input_precision="ieee")
    return acc


@triton.jit
def swap_columns(a, k, R: tl.constexpr):
    """Return a[:, j ^ k]: the columns 0 1 2 3 become 1 0 3 2 for k = 1, and 2 3 0 1 for k = 2."""
    j = tl.arange(0, R)[None, :]
    return tl.gather(a, tl.broadcast_to(j ^ k, (R, R)), 1)


@triton.jit
def swap_rows(a, k, R: tl.constexpr):
    """Return a[i ^ k, :], which exchanges rows as swap_columns exchanges columns."""
    i = tl.arange(0, R)[:, None]
    return tl.gather(a, tl.broadcast_to(i ^ k, (R, R)), 0)


@triton.jit
def jacobi_rotations(a, k, R: tl.constexpr):
    """Return tan, cos and sin [R] of the angles theta by which to rotate all coordinates i.

    Coordinate i rotates with j = i ^ k, which makes a_ij zero if
    cot(2 theta_i) = (a_jj - a_ii) / (2 a_ij). The angle of j must be exactly -theta_i. Rounding may
    make a_ij and a_ji differ, so both i and j use a_ij + a_ji in place of 2 a_ij. If a_ii = a_jj,
    the angle is 45 degrees for the smaller index and -45 degrees for the other one.

    Also returns a_ii and 2 a_ij, [R].
    """
    index = tl.arange(0, R)
    partner = index ^ k
    i = index[:, None]
    j = index[None, :]
    diagonal = tl.sum(tl.where(i == j, a, 0.0), 1)  # a_ii
    off_diagonal = tl.sum(tl.where(j == (i ^ k), a, 0.0), 1)  # a_ij
    off_diagonal += tl.gather(off_diagonal, partner, 0)  # a_ij + a_ji

    cot_2theta = tl.gather(diagonal, partner, 0) - diagonal
    cot_2theta = cot_2theta / tl.where(off_diagonal != 0, off_diagonal, 1.0)
    is_positive = (cot_2theta > 0) | (cot_2theta == 0) & (index < partner)
    sign = tl.where(is_positive, 1.0, -1.0)
    # of the two solutions tan(theta), the one of at most 45 degrees
    tan = sign / (tl.abs(cot_2theta) + tl.sqrt(1 + cot_2theta * cot_2theta))
    tan = tl.where(off_diagonal != 0, tan, 0.0)
    cos = 1 / tl.sqrt(1 + tan * tan)
    sin = cos * tan
    return tan, cos, sin, diagonal, off_diagonal


@triton.jit
def eigh(a, PADDED_RANK: tl.constexpr, R: tl.constexpr):
    """Return eigenvalues w [R], not sorted, and eigenvectors Q [R, R]: a = Q diag(w) Q^T.

    a [R, R] is symmetric. PADDED_RANK: the rank as a power of two, without the minimum of 16.

    Jacobi's method: rotate pairs of coordinates (i, j) to make a[i, j] zero, until a is diagonal.
    The pairs (i, i ^ k) are disjoint, so we rotate all of them at once:

        k = 1: (0, 1), (2, 3), ...    k = 2: (0, 2), (1, 3), ...    k = 3: (0, 3), (1, 2), ...

    A sweep over k = 1, ..., PADDED_RANK - 1 rotates every pair once.
    """
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    Q = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    norm_squared = tl.sum(tl.sum(a * a, 1), 0)
    off_diagonal_squared = norm_squared  # squared norm of a without its diagonal
    sweep = 0
    # until the norm off the diagonal is below 2^-53 of the norm of a (1.2e-32 = 2^-106)
    while (off_diagonal_squared > 1.2e-32 * norm_squared) & (sweep < 30):
        for k in range(1, PADDED_RANK):
            tan, cos, sin, diagonal, off_diagonal = jacobi_rotations(a, k, R)

            # -- rotate columns, then rows; then set the elements whose exact values are known --
            a = a * cos[None, :] - swap_columns(a, k, R) * sin[None, :]
            a = a * cos[:, None] - swap_rows(a, k, R) * sin[:, None]
            new_diagonal = diagonal - tan * off_diagonal * 0.5  # a_ii - tan a_ij
            a = tl.where(i == j, new_diagonal[:, None], a)
            a = tl.where(j == (i ^ k), 0.0, a)
            Q = Q * cos[None, :] - swap_columns(Q, k, R) * sin[None, :]
        off_diagonal_squared = tl.sum(tl.sum(tl.where(i == j, 0.0, a * a), 1), 0)
        sweep += 1
    return tl.sum(tl.where(i == j, a, 0.0), 1), Q


@triton.jit
def inverse_root(
    K_ptrs, R_inv_ptrs, scratch_ptr, runtime_R,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Load a Gram matrix K [R, R] and store R^-1, where R^T R = K; see lora_rite.inverse_root."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]

    # -- Cholesky decomposition K = L L^T, so R = L^T and R^-1 = (L^-1)^T --
    # Step n computes L[:, n] = K[:, n] / sqrt(K_nn), and subtracts L[:, n] L[:, n]^T from K.
    # The same row operations turn the identity into L^-1: divide row n by L_nn, then subtract it
    # L_in times from each row i > n. If K is singular, a pivot L_nn becomes -1, and the second part
    # below replaces the result.
    K = tl.load(K_ptrs)
    L_inv = tl.where((i == j) & (i < RANK), 1.0, 0.0).to(tl.float64)
    min_pivot = tl.full((), float("inf"), tl.float64)
    max_pivot = tl.zeros((), tl.float64)
    for n in range(RANK):
        row = tl.sum(tl.where(i == n, K, 0.0), 0)  # K[n, :]
        column = tl.sum(tl.where(j == n, K, 0.0), 1)  # K[:, n]
        K_nn = tl.sum(tl.where(tl.arange(0, R) == n, row, 0.0), 0)
        pivot = tl.where(K_nn > 0, tl.sqrt(tl.where(K_nn > 0, K_nn, 1.0)), -1.0)
        min_pivot = tl.minimum(min_pivot, pivot)
        max_pivot = tl.maximum(max_pivot, pivot)
        scale = 1 / pivot
        L_column = (column * scale)[:, None]  # L[:, n]
        K -= L_column * (row * scale)[None, :]
        L_inv_row = (tl.sum(tl.where(i == n, L_inv, 0.0), 0) * scale)[None, :]
        rows_below = L_inv - tl.where(i > n, L_column * L_inv_row, 0.0)
        L_inv = tl.where(i == n, L_inv_row, rows_below)
    tl.store(R_inv_ptrs, tl.trans(L_inv))

    # -- if this is not accurate: K^(-1/2) = Q w^(-1/2) Q^T, without the smallest eigenvalues w --
    is_accurate = min_pivot > 1e-7 * max_pivot
    if is_accurate == 0:
        tl.debug_barrier()  # other threads have stored elements of the same matrix
        w, Q = eigh(tl.load(K_ptrs), PADDED_RANK, R)
        is_kept = w > 1e-12 * tl.max(w, 0)
        w_inv_root = tl.where(is_kept, tl.rsqrt(tl.where(is_kept, w, 1.0)), 0.0)
        R_inv = matmul(Q * w_inv_root[None, :], tl.trans(Q), scratch_ptr, runtime_R, R)
        tl.store(R_inv_ptrs, R_inv)
    tl.debug_barrier()


# --------------------------------------------------------------------------------------------------
# Launch 2: Ry^-1, h^T h, P


@triton.jit
def sum_partials(row_ptr, partial_ptr, which: tl.constexpr, R: tl.constexpr):
    """Return x^T x (which = XX), x^T M (XM) or grad^T grad (GG) of a factor, [R, R].

    row_ptr: the factor's row of the table. Launch 1 stored a partial sum for each chunk of rows.
    """
    acc = tl.zeros((R, R), tl.float64)
    first = tl.load(row_ptr + FIRST_PROGRAM)
    for n in range(0, tl.load(row_ptr + NUM_PROGRAMS).to(tl.int32)):  # in a fixed order
        acc += tl.load(matrix_ptrs(partial_ptr, (first + n) * PARTIALS + which, R))
    return acc


@triton.jit(do_not_specialize=["runtime_R"])
def root_kernel(
    table_ptr, partial_ptr, bad_ptr,
    work_ptr, scalar_ptr,  # outputs (factors, WORK, R, R), (factors, SCALARS)
    runtime_R, RANK: tl.constexpr, PADDED_RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Compute Ry^-1, h^T h, P and P V P^T of a factor x, whose partner is y.

    h = grad Ry^-1 is the unmagnified gradient of x, where Ry^T Ry = y^T y. Matrices are (r, r),
    padded to R x R: gg = grad^T grad, hh = h^T h, yy = y^T y, and yM = y^T M with the M of y.
    Rx_inv_old and Ry_inv_old are the Rx^-1 and Ry^-1 of the last step. runtime_R equals R, but the
    compiler does not know it; see matmul.

    Matrices are stored and loaded again each time they are needed, because registers are scarce. A
    barrier waits for the stores of all threads.
    """
    factor = tl.program_id(0)
    x_row_ptr = table_ptr + factor * COLUMNS
    y_row_ptr = table_ptr + (factor ^ 1) * COLUMNS
    work_ptr += factor.to(tl.int64) * WORK * R * R
    scalar_ptr += factor * SCALARS
    scratch_ptr = work_ptr + SCRATCH * R * R
    Ry_inv_ptrs = matrix_ptrs(work_ptr, RY_INV, R)
    P_ptrs = matrix_ptrs(work_ptr, P, R)
    yy_ptrs = P_ptrs  # y^T y is stored there until P is known

    # -- does the gradient have values that are not finite, in any chunk of x? --
    has_grad = tl.load(x_row_ptr + HAS_GRAD) != 0
    is_bad = tl.zeros((), tl.int32)
    first = tl.load(x_row_ptr + FIRST_PROGRAM)
    for n in range(0, tl.load(x_row_ptr + NUM_PROGRAMS).to(tl.int32)):
        is_bad = tl.maximum(is_bad, tl.load(bad_ptr + first + n))
    is_bad = tl.where(has_grad, is_bad, 0)

    # -- Ry^-1 from y^T y --
    tl.store(yy_ptrs, sum_partials(y_row_ptr, partial_ptr, XX, R))
    tl.debug_barrier()
    inverse_root(yy_ptrs, Ry_inv_ptrs, scratch_ptr, runtime_R, RANK, PADDED_RANK, R)

    # -- h^T h = Ry^-T (grad^T grad) Ry^-1 --
    gg = sum_partials(x_row_ptr, partial_ptr, GG, R)
    gg = tl.where(has_grad & (is_bad == 0), gg, 0.0)
    hh = matmul(gg, tl.load(Ry_inv_ptrs), scratch_ptr, runtime_R, R)
    hh = matmul(tl.trans(tl.load(Ry_inv_ptrs)), hh, scratch_ptr, runtime_R, R)
    is_diagonal = tl.arange(0, R)[:, None] == tl.arange(0, R)[None, :]
    trace = tl.sum(tl.sum(tl.where(is_diagonal, hh, 0.0), 1), 0)  # |h|^2
    is_finite = (is_bad == 0) & (trace < float("inf"))
    tl.store(matrix_ptrs(work_ptr, HH, R), tl.where(is_finite, hh, 0.0))
    tl.store(scalar_ptr + HH_TRACE, tl.where(is_finite, trace, 0.0))
    tl.store(scalar_ptr + IS_SKIPPED, tl.where(is_finite, 0.0, 1.0))

    # -- P = Ry^-T (y^T y_old) Ry_old^-1, where y_old is the partner y before its last step --
    # That step was y = shrink y_old - lr M Rx_old^-T, with the M of y. Multiply by y^T:
    # shrink (y^T y_old) = y^T y + lr (y^T M) Rx_old^-T
    x_state_ptr = load_ptr(x_row_ptr, STATE_PTR, tl.float64, False)
    y_state_ptr = load_ptr(y_row_ptr, STATE_PTR, tl.float64, False)
    y_scalar_ptr = y_state_ptr + 2 * RANK * RANK  # after V and R^-1
    Rx_inv_old = load_state_matrix(x_state_ptr, STATE_R_INV, RANK, R)
    yM = sum_partials(y_row_ptr, partial_ptr, XM, R)
    yM_Rx = matmul(yM, tl.trans(Rx_inv_old), scratch_ptr, runtime_R, R)  # (y^T M) Rx_old^-T
    shrink_yy_old = tl.load(yy_ptrs) + tl.load(y_scalar_ptr + LR) * yM_Rx
    Ry_inv_old = load_state_matrix(y_state_ptr, STATE_R_INV, RANK, R)
    yy_old_Ry = matmul(shrink_yy_old, Ry_inv_old, scratch_ptr, runtime_R, R)
    yy_old_Ry = yy_old_Ry / tl.load(y_scalar_ptr + SHRINK)  # (y^T y_old) Ry_old^-1
    P_new = matmul(tl.trans(tl.load(Ry_inv_ptrs)), yy_old_Ry, scratch_ptr, runtime_R, R)
    tl.store(P_ptrs, P_new)

    # -- P V P^T --
    V = load_state_matrix(x_state_ptr, STATE_V, RANK, R)
    PV = matmul(P_new, V, scratch_ptr, runtime_R, R)
    tl.debug_barrier()
    PVP_new = matmul(PV, tl.trans(tl.load(P_ptrs)), scratch_ptr, runtime_R, R)
    tl.store(matrix_ptrs(work_ptr, PVP, R), PVP_new)


# --------------------------------------------------------------------------------------------------
# Launch 3: moments


@triton.jit
def sort(w, RANK: tl.constexpr, R: tl.constexpr):
    """Return the first RANK values of w [R] in ascending order; the others become 0."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    w_i = w[:, None]
    w_j = tl.sum(tl.where(i == j, w_i, 0.0), 0)[None, :]  # w as a row

    # the new position of a value is the number of values that come before it: the smaller ones, and
    # equal ones with a smaller index. The values 3, 1, 1 get the positions 2, 0, 1.
    is_before = (w_j < w_i) | (w_j == w_i) & (j < i)
    position = tl.sum(tl.where(is_before & (j < RANK), 1, 0), 1)
    return tl.sum(tl.where((position[:, None] == j) & (i < RANK), w_i, 0.0), 0)


@triton.jit
def decay(log_beta, t):
    """Return beta (1 - beta^(t-1)) / (1 - beta^t), as lora_rite.decay does."""
    # for beta = 0 the logarithm is -inf, and (t - 1) * log_beta would be NaN at t = 1
    log_beta = tl.maximum(tl.full((), log_beta, tl.float64), -1e300)
    return tl.exp(log_beta) * (1 - tl.exp((t - 1) * log_beta)) / (1 - tl.exp(t * log_beta))


@triton.jit(do_not_specialize=["runtime_R"])
def moment_kernel(
    table_ptr, work_ptr, scalar_ptr,  # work and scalars from launch 2
    total_ptr,  # |h|^2 of all factors, ()
    matrix_ptr,  # output (factors, MATRICES, R, R)
    lr_ptr,  # (), or None to use lr
    lr: "fp64", log_beta1: "fp64", log_beta2: "fp64", eps: "fp64",  # noqa: F821
    clip: "fp64", weight_decay: "fp64",  # noqa: F821
    runtime_R, ESCAPE: tl.constexpr,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Update V, Rx^-1 and the scalars in the state of a factor x, and prepare launch 4.

    It does the (r, r) part of TorchBatch.finish. h = grad Ry^-1 is the unmagnified gradient.
    """
    factor = tl.program_id(0)
    x_row_ptr = table_ptr + factor * COLUMNS
    x_state_ptr = load_ptr(x_row_ptr, STATE_PTR, tl.float64, False)
    x_scalar_ptr = x_state_ptr + 2 * RANK * RANK  # after V and R^-1
    rows = tl.load(x_row_ptr + ROWS).to(tl.float64)
    y_work_ptr = work_ptr + (factor ^ 1).to(tl.int64) * WORK * R * R
    work_ptr += factor.to(tl.int64) * WORK * R * R
    matrix_ptr += factor.to(tl.int64) * MATRICES * R * R
    scratch_ptr = work_ptr + SCRATCH * R * R

    # -- h_scale, by which clipping multiplies h, and the decays d1 and d2 of step t --
    norm = tl.sqrt(tl.load(total_ptr))
    h_scale = tl.where(norm > clip, clip / norm, 1.0)
    t = tl.load(x_scalar_ptr + STEP) + 1.0
    d1 = decay(log_beta1, t)
    d2 = decay(log_beta2, t)

    # -- escaped mass rho: what V loses when it moves into the new basis --
    rho = tl.load(x_scalar_ptr + RHO)
    if ESCAPE:
        V_old = load_state_matrix(x_state_ptr, STATE_V, RANK, R)
        w_old, _ = eigh((V_old + tl.trans(V_old)) / 2, PADDED_RANK, R)  # eigenvalues, [R]
        w_old = sort(w_old, RANK, R)
        V_moved = tl.load(matrix_ptrs(work_ptr, PVP, R))  # P V_old P^T
        w_moved, _ = eigh((V_moved + tl.trans(V_moved)) / 2, PADDED_RANK, R)
        lost = w_old - sort(w_moved, RANK, R)
        most_lost = tl.maximum(tl.max(lost, 0), 0.0)
        trace_lost = tl.maximum(tl.sum(lost, 0), 0.0)
        rho = d2 * (rho + tl.minimum(most_lost, trace_lost))

    # -- second moment V = d2 P V_old P^T + (1 - d2) h^T h / rows, where h is clipped --
    hh = tl.load(matrix_ptrs(work_ptr, HH, R))
    V = d2 * tl.load(matrix_ptrs(work_ptr, PVP, R)) + (1 - d2) * h_scale * h_scale * hh / rows
    store_state_matrix(x_state_ptr, STATE_V, V, RANK, R)

    # -- preconditioner ((V + rho)^1/2 + eps)^-1, where V = Q diag(w) Q^T --
    w, Q = eigh((V + tl.trans(V)) / 2, PADDED_RANK, R)
    scales = 1 / (tl.sqrt(tl.maximum(w, 0.0) + rho) + eps)
    preconditioner = matmul(Q * scales[None, :], tl.trans(Q), scratch_ptr, runtime_R, R)

    # -- learning rate; 0 if the gradient is missing or not finite --
    rate = tl.full((), lr, tl.float64) if lr_ptr is None else tl.load(lr_ptr).to(tl.float64)
    is_skipped = tl.load(scalar_ptr + factor * SCALARS + IS_SKIPPED)
    has_grad = tl.load(x_row_ptr + HAS_GRAD) != 0
    rate = tl.where(has_grad & (is_skipped == 0), rate, 0.0)

    # -- matrices of launch 4: M = M M_matrix + grad grad_matrix, then x = shrink x - M x_matrix --
    Ry_inv = tl.load(matrix_ptrs(work_ptr, RY_INV, R))
    M_matrix = d1 * tl.trans(tl.load(matrix_ptrs(work_ptr, P, R)))  # d1 P^T
    tl.store(matrix_ptrs(matrix_ptr, M_MATRIX, R), M_matrix.to(tl.float32))
    grad_matrix = matmul(Ry_inv, preconditioner, scratch_ptr, runtime_R, R)  # as h = grad Ry^-1
    grad_matrix = (1 - d1) * h_scale * grad_matrix
    tl.store(matrix_ptrs(matrix_ptr, GRAD_MATRIX, R), grad_matrix.to(tl.float32))
    x_matrix = rate * tl.trans(Ry_inv)  # lr Ry^-T
    tl.store(matrix_ptrs(matrix_ptr, X_MATRIX, R), x_matrix.to(tl.float32))

    # -- state; Rx^-1 is in the workspace of y, whose partner is x --
    Rx_inv = tl.load(matrix_ptrs(y_work_ptr, RY_INV, R))
    store_state_matrix(x_state_ptr, STATE_R_INV, Rx_inv, RANK, R)
    skipped = tl.load(x_scalar_ptr + SKIPPED)
    tl.store(x_scalar_ptr + RHO, rho)
    tl.store(x_scalar_ptr + STEP, t)
    tl.store(x_scalar_ptr + LR, rate)
    tl.store(x_scalar_ptr + SHRINK, 1 - rate * weight_decay)
    tl.store(x_scalar_ptr + SKIPPED, skipped + is_skipped)


# --------------------------------------------------------------------------------------------------
# Launch 4: first moment and parameters


@triton.jit
def update_chunk(
    row_ptr, start, end, grad_end, rows, M_matrix, grad_matrix, x_matrix, shrink,
    IS_A: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update rows start, ..., end - 1 of M and x. Gradients from row grad_end on count as 0."""
    x_ptr = load_ptr(row_ptr, X_PTR, DTYPE, ALIGNED)
    g_ptr = load_ptr(row_ptr, GRAD_PTR, DTYPE, ALIGNED)
    m_ptr = load_ptr(row_ptr, M_PTR, tl.float32, ALIGNED)
    for tile_start in range(start, end, TILE):
        offs, mask = tile_offsets(tile_start, end, rows, IS_A, RANK, R, TILE)
        x = load_tile(x_ptr, tile_start, end, rows, IS_A, RANK, R, TILE)

        # M = M_old M_matrix + grad grad_matrix
        m_old = load_tile(m_ptr, tile_start, end, rows, IS_A, RANK, R, TILE)
        m = tl.dot(m_old, M_matrix, input_precision="ieee")
        grad = load_tile(g_ptr, tile_start, grad_end, rows, IS_A, RANK, R, TILE)
        m = tl.dot(grad, grad_matrix, m, input_precision="ieee")
        tl.store(m_ptr + offs, m, mask=mask)

        # x = shrink x - M x_matrix
        x = shrink * x - tl.dot(m, x_matrix, input_precision="ieee")
        tl.store(x_ptr + offs, x.to(DTYPE), mask=mask)


@triton.jit
def update_kernel(
    table_ptr, factor_of_program_ptr, scalar_ptr, matrix_ptr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update M and x in one chunk of rows, with the matrices from launch 3."""
    factor, row_ptr, start, end, rows = find_rows(table_ptr, factor_of_program_ptr, CHUNK, ALIGNED)
    matrix_ptr += factor.to(tl.int64) * MATRICES * R * R
    M_matrix = tl.load(matrix_ptrs(matrix_ptr, M_MATRIX, R))
    grad_matrix = tl.load(matrix_ptrs(matrix_ptr, GRAD_MATRIX, R))
    x_matrix = tl.load(matrix_ptrs(matrix_ptr, X_MATRIX, R))
    state_ptr = load_ptr(row_ptr, STATE_PTR, tl.float64, False)
    shrink = tl.load(state_ptr + 2 * RANK * RANK + SHRINK).to(tl.float32)

    # a missing or skipped gradient counts as 0: load_tile returns zeros from row grad_end on
    has_grad = tl.load(row_ptr + HAS_GRAD) != 0
    is_skipped = tl.load(scalar_ptr + factor * SCALARS + IS_SKIPPED)
    grad_end = tl.where(has_grad & (is_skipped == 0), end, start)

    # compiled twice, for A (IS_A = True) and for B, as in gram_kernel
    if factor % 2 == 0:
        update_chunk(
            row_ptr, start, end, grad_end, rows, M_matrix, grad_matrix, x_matrix, shrink,
            True, DTYPE, ALIGNED, RANK, R, TILE,
        )  # fmt: skip
    else:
        update_chunk(
            row_ptr, start, end, grad_end, rows, M_matrix, grad_matrix, x_matrix, shrink,
            False, DTYPE, ALIGNED, RANK, R, TILE,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Host: tables of addresses, launches


def supports(A, B):
    """Return whether the kernels take a pair A (r, n), B (m, r)."""
    for p in (A, B):
        if p.dtype != A.dtype or p.device != A.device or p.numel() >= 2**31:
            return False
        for t in (p, p.grad):
            if t is not None and not (t.is_contiguous() and t.dtype == A.dtype):
                return False
    return A.dtype in TL_DTYPES and 0 < len(A) <= MAX_RANK


class KernelBatch:
    """Pairs of equal rank, dtype and device. It keeps addresses: it is valid until a tensor moves.

    parameters: [A (r, n), B (m, r), A, B, ...]; states: {"M", "packed"} for each. `packed` is a
    lora_rite.FactorState as one tensor.

    `measure` and `finish` are the two halves of a step, see lora_rite.TorchBatch. A CUDA graph that
    captures them reads the table at each replay, so the batch must live as long as the graph.
    """

    def __init__(self, parameters, states):
        rank = len(parameters[0])
        R = max(16, triton.next_power_of_2(rank))
        self.parameters = parameters
        self.R = R

        # the table: a row for each factor, with A and B alternating
        table = []
        num_programs = 0  # of launches 1 and 4, for the factors so far
        is_aligned = True  # whether all addresses and lengths are multiples of 16
        for n, (p, state) in enumerate(zip(parameters, states)):
            grad = p if p.grad is None else p.grad
            rows = p.shape[1] if n % 2 == 0 else p.shape[0]  # A (r, n), B (m, r)
            chunks = triton.cdiv(rows, CHUNK_ROWS[R])
            pointers = [p.data_ptr(), grad.data_ptr(), state["M"].data_ptr()]

            # the columns X_PTR, GRAD_PTR, M_PTR, STATE_PTR,
            row = [*pointers, state["packed"].data_ptr()]
            # and HAS_GRAD, ROWS, FIRST_PROGRAM, NUM_PROGRAMS (a program for each chunk)
            row += [p.grad is not None, rows, num_programs, chunks]
            table.append(row)
            num_programs += chunks
            for value in (*pointers, rows):
                is_aligned = is_aligned and value % 16 == 0
        table = torch.tensor(table)  # (factors, COLUMNS) int64

        # the factor of each program of launches 1 and 4, such as 0, 0, 0, 1, 2, 2, 3
        factors = torch.arange(len(table), dtype=torch.int32)
        factor_of_program = torch.repeat_interleave(factors, table[:, NUM_PROGRAMS.value])

        # copy both to the device; from pinned memory, the host need not wait
        tables = [table, factor_of_program]
        device = parameters[0].device
        if device.type == "cuda":
            tables = [t.pin_memory() for t in tables]
        self.table, self.factor_of_program = [t.to(device, non_blocking=True) for t in tables]

        # options of launches 1 and 4, with a program per chunk, and of 2 and 3, with one per factor
        self.row_options = {"DTYPE": TL_DTYPES[parameters[0].dtype], "ALIGNED": is_aligned}
        self.row_options.update(RANK=rank, R=R, TILE=TILE_ROWS[R], CHUNK=CHUNK_ROWS[R])
        self.row_options.update(num_warps=ROW_WARPS[R])
        self.matrix_options = {"RANK": rank, "PADDED_RANK": triton.next_power_of_2(rank), "R": R}
        self.matrix_options.update(num_warps=MATRIX_WARPS[R], num_stages=1)

    def measure(self):
        """Launch gram_kernel and root_kernel. Returns |h|^2, summed over these pairs, ()."""
        R = self.R
        device = self.table.device
        num_factors = len(self.table)
        num_programs = len(self.factor_of_program)
        float64 = {"dtype": torch.float64, "device": device}
        partial = torch.empty(num_programs, PARTIALS.value, R, R, **float64)
        bad = torch.empty(num_programs, dtype=torch.int32, device=device)
        self.work = torch.empty(num_factors, WORK.value, R, R, **float64)
        self.scalars = torch.empty(num_factors, SCALARS.value, **float64)
        with torch.cuda.device_of(self.table):
            gram_kernel[(num_programs,)](
                self.table, self.factor_of_program, partial, bad, **self.row_options
            )
            root_kernel[(num_factors,)](
                self.table, partial, bad, self.work, self.scalars, R, **self.matrix_options
            )
        return self.scalars[:, HH_TRACE.value].sum()

    def finish(self, total, lr, betas, eps, clip, weight_decay, escape):
        """Launch moment_kernel and update_kernel.

        total: |h|^2 of all pairs, a tensor () on any device. clip: limit of |h|; 0: none.
        lr: a number or a tensor (). The host does not wait for a tensor on the device of the pairs.
        """
        device = self.table.device
        matrices = torch.empty(len(self.table), MATRICES.value, self.R, self.R, device=device)
        log_betas = [math.log(beta) if beta else -math.inf for beta in betas]
        lr_ptr = None
        if torch.is_tensor(lr) and lr.device == device:
            lr_ptr = lr
            lr = 0.0  # not read
        with torch.cuda.device_of(self.table):
            moment_kernel[(len(self.table),)](
                self.table, self.work, self.scalars, total.to(device), matrices, lr_ptr,
                float(lr), *log_betas, float(eps), float(clip) or math.inf, float(weight_decay),
                runtime_R=self.R, ESCAPE=escape, **self.matrix_options,
            )  # fmt: skip
            update_kernel[(len(self.factor_of_program),)](
                self.table, self.factor_of_program, self.scalars, matrices, **self.row_options
            )
        torch.autograd.graph.increment_version(self.parameters)
        self.work = None
        self.scalars = None
