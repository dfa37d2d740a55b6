"""SONew's step in Triton, the readable version: three launches over a list of tensors.

Symbols are those of sonew.py: parameters p, gradient g, momentum m, statistics S_k[i] = the running
mean of g_i g_{i+k} for k = 0 ... b (b: the band), direction u, and Adam's step a.

1. direction_kernel computes the new m and S_k in registers, and from them u and a. It writes u and,
   per program, the sums of a^2, u^2 and sqrt(S_0).
2. norms_kernel adds the sums of each tensor's programs, always in the same order. Where parameters
   are sharded, an all-reduce adds those of the other processes.
3. update_kernel writes p, m, S_k, the step counters and the tensor's scale.

u_i needs the statistics of b neighbours on either side, and some of these belong to other programs.
If kernel 1 wrote the statistics, a neighbour could read them and count a gradient twice. So kernel
3 computes them again. Memory traffic per fp32 parameter: 1 reads g, m, S_k and writes u; 3 reads
these, u and p, and writes p, m, S_k: 12 b + 48 bytes. Arithmetic is float32.

Limits: band 0 to 4; float32, float16, bfloat16 parameters; float32 or bfloat16 state. It takes any
alignment, chain length and sharding. Faster: sonew_fused.py and, on Hopper, sonew_hopper.py.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl

BLOCK = 1024  # elements that a program loads: those it computes, and their neighbours
WARPS = 8
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
LEAST_SCALE = tl.constexpr(1e-15)  # see sonew.py
FAR = tl.constexpr(2**30)  # longer than any block

# Columns of the table of tensors, int64. Each row describes one tensor by addresses and sizes:
#     p | g | m | step | ... | FIRST_PROGRAM | PROGRAMS | S_0 | ... | S_b
P_PTR = tl.constexpr(0)  # parameters
G_PTR = tl.constexpr(1)  # gradient
M_PTR = tl.constexpr(2)  # momentum
STEP_PTR = tl.constexpr(3)  # number of steps
SKIPPED_PTR = tl.constexpr(4)  # steps skipped because a gradient was not finite
SCALE_PTR = tl.constexpr(5)  # scale: the size of a typical gradient, the mean of sqrt(S_0)
SIZE = tl.constexpr(6)  # elements on this process
WHOLE_SIZE = tl.constexpr(7)  # elements on all processes
CHAIN = tl.constexpr(8)  # elements of a chain; an element's successors are in the same chain
CHUNK = tl.constexpr(9)  # elements that a program computes at a time
FIRST_PROGRAM = tl.constexpr(10)  # the first program that computes its directions
PROGRAMS = tl.constexpr(11)  # how many programs compute them
S_PTR = tl.constexpr(12)  # of S_0; those of S_1 ... S_b follow

# Columns of the sums over elements: partial sums have a row per program, totals a row per tensor
SUM_A = tl.constexpr(0)  # sum of a^2, where a is Adam's step
SUM_U = tl.constexpr(1)  # sum of u^2, where u is SONew's direction
SUM_ROOT = tl.constexpr(2)  # sum of sqrt(S_0) / scale; inf if a gradient is not finite
SUMS = tl.constexpr(3)

# --------------------------------------------------------------------------------------------------
# Device functions that sonew_fused.py and sonew_hopper.py share


class Options(NamedTuple):
    """The options of a step, in float32."""

    beta1: tl.tensor  # m becomes beta1 m + new1 g
    beta2: tl.tensor  # S_k[i] becomes beta2 S_k[i] + new2 g_i g_{i+k}
    new1: tl.tensor  # 1 - beta1
    new2: tl.tensor  # 1 - beta2
    log_beta1: tl.tensor  # for the bias corrections, 1 - beta1^step
    log_beta2: tl.tensor
    eps: tl.tensor  # damping: eps scale^2 is added to S_0, where scale is a typical |g_i|
    gamma: tl.tensor  # edges of i are removed if they leave at most gamma S_0[i] unexplained
    weight_decay: tl.tensor


class Units(NamedTuple):
    """Factors that make the statistics of a tensor independent of the size of its gradients.

    They divide gradients by the scale, the mean of sqrt(S_0) over the tensor: a typical gradient.
    """

    m_factor: tl.tensor  # m is multiplied by this: 1 / scale, with bias correction
    S_factor: tl.tensor  # S_0 ... S_b are multiplied by this: 1 / scale^2, with bias correction
    has_scale: tl.tensor  # False while all gradients have been 0
    gamma_or_inf: tl.tensor  # gamma, or inf where has_scale is False; for sonew_fused.py


@triton.jit
def make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay):
    # make all of them float32: in the interpreter, they are Python floats
    return Options(
        beta1=tl.cast(beta1, tl.float32),
        beta2=tl.cast(beta2, tl.float32),
        new1=tl.cast(new1, tl.float32),
        new2=tl.cast(new2, tl.float32),
        log_beta1=tl.cast(log_beta1, tl.float32),
        log_beta2=tl.cast(log_beta2, tl.float32),
        eps=tl.cast(eps, tl.float32),
        gamma=tl.cast(gamma, tl.float32),
        weight_decay=tl.cast(weight_decay, tl.float32),
    )


@triton.jit
def load_pointer(row_ptr, column: tl.constexpr, DTYPE: tl.constexpr):
    """Load a pointer to elements of DTYPE from a column of a tensor's row in the table."""
    return tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))


@triton.jit
def bias_correction(step, log_beta):
    """Return 1 - beta^step without cancellation: in float32, 1 - 0.999 is off by 1e-5 of itself."""
    x = step * log_beta  # the result is 1 - exp(x)
    # for small x by the Taylor series -x (1 + x/2 (1 + x/3 (1 + x/4 (1 + x/5 (1 + x/6)))))
    series = 1 + x * (1 / 6)
    for k in tl.static_range(5, 1, -1):
        series = 1 + x * (1 / k) * series
    series = -x * series
    return tl.where(x > -0.3, series, 1 - tl.exp(x))


@triton.jit
def load_units(row_ptr, options):
    """Return the Units of a tensor, whose factors divide by its scale and by the bias corrections.

    While all gradients have been 0, there is no scale. Then S_0 is replaced by 1, and all
    successors are dropped, so that the direction u is m.
    """
    step = tl.load(load_pointer(row_ptr, STEP_PTR, tl.float32)) + 1
    scale = tl.load(load_pointer(row_ptr, SCALE_PTR, tl.float32))
    has_scale = scale > LEAST_SCALE
    unit = tl.where(has_scale, scale, 1.0)
    return Units(
        m_factor=1 / (bias_correction(step, options.log_beta1) * unit),
        S_factor=1 / (bias_correction(step, options.log_beta2) * (unit * unit)),
        has_scale=has_scale,
        gamma_or_inf=tl.where(has_scale, options.gamma, float("inf")),
    )


@triton.jit
def solve(W, c, variance, s, gamma, N: tl.constexpr):
    """Return psi = W^-1 c and s - psi . c by Gaussian elimination, as factor in sonew.py does.

    psi has the weights to predict an element's gradient from those of the N elements after it, its
    successors 0 ... N - 1. Each element of a block has its own equations. For N = 2:

        W[0][0] psi[0] + W[1][0] psi[1] = c[0]
        W[1][0] psi[0] + W[1][1] psi[1] = c[1]

    W[p][q], q <= p: mean product of the gradients of successors p and q. c[p]: that of the element
    and successor p. s: mean square of the element's gradient, S_0; the part of it that psi leaves
    unexplained is returned. W, c and variance are tuples of blocks, s is a block.

    solve eliminates psi[0] from equations 1 ... N - 1, calls itself for these, and substitutes
    back. In the inner calls, W, c and s have changed, but variance[p] is still the first W[p][p].
    """
    psi = ()  # a tuple of blocks, as kernels have no lists
    if N > 0:
        # 1 / pivot; 0, which drops the successor, if at most gamma of its variance is unexplained
        inverse = tl.where(W[0][0] > gamma * variance[0], 1 / W[0][0], 0.0)

        # subtract equation 0 from the others: W[p][q] -= W[p][0] / W[0][0] W[q][0], and so for c, s
        W_rest = ()
        c_rest = ()
        variance_rest = ()
        for p in tl.static_range(1, N):
            ratio = W[p][0] * inverse  # of equation 0, this much is subtracted from equation p
            row = ()  # equation p without psi[0]
            for q in tl.static_range(1, p + 1):
                row = row + (W[p][q] - ratio * W[q][0],)
            W_rest = W_rest + (row,)
            c_rest = c_rest + (c[p] - ratio * c[0],)
            variance_rest = variance_rest + (variance[p],)
        s = s - c[0] * (c[0] * inverse)
        psi_rest, s = solve(W_rest, c_rest, variance_rest, s, gamma, N - 1)

        # substitute back into equation 0: psi[0] = (c[0] - sum_p W[p][0] psi[p]) / W[0][0]
        first = c[0] * inverse  # becomes psi[0]
        for p in tl.static_range(1, N):
            first -= W[p][0] * inverse * psi_rest[p - 1]
        psi = (first,) + psi_rest
    return psi, s


@triton.jit
def add_partial_sums(offs, partial_ptr, programs, total_ptr, BLOCK: tl.constexpr):
    """Add up the sums of a tensor's programs, BLOCK programs at a time, always in the same order.

    partial_ptr: (programs, SUMS). total_ptr: (SUMS,). offs: 0 ... BLOCK - 1. ".cg" loads from L2,
    because other multiprocessors may have just written the sums.
    """
    for column in tl.static_range(SUMS):
        ptrs = partial_ptr + offs * SUMS + column  # element (offs, column)
        acc = tl.load(ptrs, mask=offs < programs, other=0.0, cache_modifier=".cg")
        for start in range(BLOCK, programs, BLOCK):
            mask = start + offs < programs
            acc += tl.load(ptrs + start * SUMS, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(total_ptr + column, tl.sum(acc, 0))


@triton.jit
def load_step_size(total_ptr, lr, LR_ON_DEVICE: tl.constexpr, ADAM: tl.constexpr):
    """Return the learning rate and graft = |a| / |u|, which gives u the length of Adam's step a.

    The learning rate is 0 if a gradient of the tensor was not finite. total_ptr (SUMS,): sums of
    a^2, u^2 and sqrt(S_0) over the tensor.
    """
    # learning rate
    rate = tl.load(lr).to(tl.float32) if LR_ON_DEVICE else tl.cast(lr, tl.float32)
    sum_root = tl.load(total_ptr + SUM_ROOT, cache_modifier=".cg")
    rate = tl.where(sum_root < float("inf"), rate, 0.0)

    # graft, from the norms of a and u over the tensor; 1 where u is Adam's step itself
    graft = tl.cast(1.0, tl.float32)
    if not ADAM:
        norm_a = tl.sqrt(tl.load(total_ptr + SUM_A, cache_modifier=".cg"))
        norm_u = tl.sqrt(tl.load(total_ptr + SUM_U, cache_modifier=".cg"))
        graft = tl.where(norm_u > 0, norm_a / norm_u, 0.0)
    return rate, graft


@triton.jit
def update_counters(row_ptr, total_ptr):
    """Write step, skipped and scale of a tensor. One program per tensor calls it."""
    # count the step, also among the skipped ones if a gradient was not finite
    step_ptr = load_pointer(row_ptr, STEP_PTR, tl.float32)
    tl.store(step_ptr, tl.load(step_ptr) + 1)
    skipped_ptr = load_pointer(row_ptr, SKIPPED_PTR, tl.float32)
    sum_root = tl.load(total_ptr + SUM_ROOT, cache_modifier=".cg")
    is_good = sum_root < float("inf")
    tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(is_good, 0.0, 1.0))

    # new scale: the mean of sqrt(S_0), which was summed in units of the old scale
    scale_ptr = load_pointer(row_ptr, SCALE_PTR, tl.float32)
    scale = tl.load(scale_ptr)
    unit = tl.where(scale > LEAST_SCALE, scale, 1.0)
    whole_size = tl.load(row_ptr + WHOLE_SIZE).to(tl.float32)
    tl.store(scale_ptr, tl.where(is_good, sum_root / whole_size * unit, scale))


# --------------------------------------------------------------------------------------------------
# Device functions of this version, for blocks of shape (BLOCK,)


@triton.jit
def shift(x, lane, k: tl.constexpr, BLOCK: tl.constexpr):
    """Return y (BLOCK,) with y[lane] = x[lane + k]; wrong where lane + k is outside of the block.

    For k = 1 and BLOCK = 4, x0 x1 x2 x3 becomes x1 x2 x3 x3, so the last lane is wrong.
    """
    source = tl.minimum(tl.maximum(lane + k, 0), BLOCK - 1)
    return tl.gather(x, source, 0)


@triton.jit
def distance_to_chain_end(start, offs, chain):
    """Return how many elements there are from offs to the end of their chain, inclusive.

        chains    ....|..................|..................|....
        block            ^ start   ^ offs
                         |---------------| start_to_end
                                   |-----| distance

    start: the smallest of offs that is in the tensor, int64. chain: elements per chain. Distances
    from start are at most FAR, so that they fit into int32.
    """
    start_to_end = tl.minimum(chain - start % chain, FAR).to(tl.int32)
    distance = start_to_end - (offs - start).to(tl.int32)
    # where distance <= 0, offs is in a later chain: for chain = 5, distance 0 -1 -2 becomes 5 4 3
    chain = tl.minimum(chain, FAR).to(tl.int32)
    return tl.where(distance > 0, distance, chain - (-distance) % chain)


@triton.jit
def load_gradient(g_ptr, offs, mask):
    """Return the gradient g with 0 where g^2 is not finite, and is_good: where g^2 is finite."""
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    is_good = g * g < float("inf")  # false for NaN too
    return tl.where(is_good, g, 0.0), is_good


@triton.jit
def load_statistics(
    row_ptr, offs, mask, to_chain_end, options,
    GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Load g, m and S_k at offs. Return the new m, the tuple of S_0 ... S_BAND, and is_good of g.

    to_chain_end: elements from offs to the end of their chain. All blocks have shape (BLOCK,).
    """
    g_ptr = load_pointer(row_ptr, G_PTR, GRAD)
    m_ptr = load_pointer(row_ptr, M_PTR, STATE)
    g, is_good = load_gradient(g_ptr, offs, mask)
    m = tl.load(m_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    m = options.beta1 * m + options.new1 * g

    # S_k[i] = beta2 S_k[i] + (1 - beta2) g[i] g[i+k], where g is 0 past the end of the chain of i
    S = ()  # a tuple of blocks, as kernels have no lists
    for k in tl.static_range(BAND + 1):
        g_k, _ = load_gradient(g_ptr, offs + k, mask & (to_chain_end > k))  # g[i+k]
        S_ptr = load_pointer(row_ptr, S_PTR + k, STATE)
        S_k = tl.load(S_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        S = S + (options.beta2 * S_k + options.new2 * (g * g_k),)
    return m, S, is_good


@triton.jit
def factor(S, S0_damped, lane, gamma, has_scale, BAND: tl.constexpr, BLOCK: tl.constexpr):
    """Return psi_1 ... psi_BAND and s, after edge removal, as factor in sonew.py does.

    psi_k[i] is the weight of g[i+k] in predicting g[i], and s[i] the part of S_0[i] that the
    prediction leaves unexplained. All are blocks (BLOCK,), as S_0 ... S_BAND are. has_scale: see
    Units.
    """
    # Each element i has its own equations W psi = c. W[p][q], q <= p, is the running mean of
    # g[i+1+p] g[i+1+q], which is S_{p-q}[i+1+q]; c[p] is that of g[i] g[i+1+p], S_{p+1}[i].
    # BAND = 2: W = ((S_0[i+1],), (S_1[i+1], S_0[i+2])) and c = (S_1[i], S_2[i]), S_0 being damped
    W = ()
    c = ()
    variance = ()
    for p in tl.static_range(BAND):
        row = ()
        for q in tl.static_range(p):
            row = row + (shift(S[p - q], lane, q + 1, BLOCK),)  # W[p][q]
        diagonal = shift(S0_damped, lane, p + 1, BLOCK)  # W[p][p]
        W = W + (row + (diagonal,),)
        c = c + (S[p + 1],)
        variance = variance + (diagonal,)
    psi, s = solve(W, c, variance, S0_damped, gamma, BAND)

    # where the error s is too small, or there is no scale yet, do not predict g_i from its
    # successors: psi = 0 and s = S_0
    keep = tl.where(has_scale, s > gamma * S0_damped, False)
    kept_psi = ()
    for k in tl.static_range(BAND):
        kept_psi = kept_psi + (tl.where(keep, psi[k], 0.0),)
    return kept_psi, tl.where(keep, s, S0_damped)


# --------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def direction_kernel(
    table_ptr, blocks_ptr,  # int64: (T, COLUMNS); (programs, 2), tensor and block of each program
    u_ptr, partial_ptr, total_ptr,  # (programs, INNER), (programs, SUMS), (T, SUMS) float32
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr,
    ADAM: tl.constexpr, LR_ON_DEVICE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the direction u of INNER elements of a tensor, and this program's sums."""
    options = make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay)

    # -- find the program's tensor, its row in the table, and which block of it to compute --
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks_ptr + 2 * program)
    block = tl.load(blocks_ptr + 2 * program + 1)
    row_ptr = table_ptr + tensor * COLUMNS
    n = tl.load(row_ptr + SIZE)  # elements of the tensor
    chain = tl.load(row_ptr + CHAIN)

    # -- blocks overlap: a program loads BLOCK elements, and stores u of the INNER ones --
    #     block 0    | BAND |      INNER      | BAND |
    #     block 1                      | BAND |      INNER      | BAND |
    # BLOCK = 1024, BAND = 1: block 1 loads elements 1021 ... 2044, and stores 1022 ... 2043
    INNER: tl.constexpr = BLOCK - 2 * BAND
    lane = tl.arange(0, BLOCK)
    start = block * INNER - BAND
    offs = start + lane  # elements of the tensor
    load_mask = (offs >= 0) & (offs < n)
    store_mask = load_mask & (lane >= BAND) & (lane < BLOCK - BAND)  # INNER

    # -- statistics m and S_k, bias-corrected and in units of the tensor's scale --
    to_chain_end = distance_to_chain_end(tl.maximum(start, 0), offs, chain)
    m, S, is_good = load_statistics(
        row_ptr, offs, load_mask, to_chain_end, options, GRAD, STATE, BAND
    )  # fmt: skip
    units = load_units(row_ptr, options)
    m_hat = m * units.m_factor
    S_hat = ()
    for k in tl.static_range(BAND + 1):
        S_hat = S_hat + (S[k] * units.S_factor,)

    # -- Adam's step: a = m / sqrt(S_0) --
    root = tl.sqrt(S_hat[0])
    a = tl.where(root > 0, m_hat / root, 0.0)

    if ADAM:
        u = a
    else:
        # -- w = diag(1/s) L^T m: w[i] = (m[i] - sum_k psi_k[i] m[i+k]) / s[i] --
        has_scale = units.has_scale
        S0_damped = tl.where(has_scale, S_hat[0] + options.eps, 1.0)
        psi, s = factor(S_hat, S0_damped, lane, options.gamma, has_scale, BAND, BLOCK)
        w = m_hat
        for k in tl.static_range(1, BAND + 1):
            w -= psi[k - 1] * shift(m_hat, lane, k, BLOCK)
        w = tl.where(s > 0, w / s, 0.0)

        # -- u = L w: u[i] = w[i] - sum_k psi_k[i-k] w[i-k], from the elements before i --
        u = w
        for k in tl.static_range(1, BAND + 1):
            u -= shift(psi[k - 1] * w, lane, -k, BLOCK)
    # lanes BAND ... BLOCK - BAND - 1 are stored, to row `program` of u (programs, INNER)
    tl.store(u_ptr + program * INNER + lane - BAND, u, mask=store_mask)

    # -- this program's sums of a^2, u^2 and root; the last is inf if a gradient is not finite --
    root = tl.where(is_good, root, float("inf"))
    partial_ptr += program * SUMS
    tl.store(partial_ptr + SUM_A, tl.sum(tl.where(store_mask, a * a, 0.0), 0))
    tl.store(partial_ptr + SUM_U, tl.sum(tl.where(store_mask, u * u, 0.0), 0))
    tl.store(partial_ptr + SUM_ROOT, tl.sum(tl.where(store_mask, root, 0.0), 0))


@triton.jit
def norms_kernel(table_ptr, partial_ptr, total_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up one tensor's rows of partial_ptr, of which its table row has the first and the number.

    total_ptr (T, SUMS): the result. BLOCK: rows added at a time.
    """
    tensor = tl.program_id(0)
    row_ptr = table_ptr + tensor * COLUMNS
    partial_ptr += tl.load(row_ptr + FIRST_PROGRAM) * SUMS
    programs = tl.load(row_ptr + PROGRAMS).to(tl.int32)
    add_partial_sums(tl.arange(0, BLOCK), partial_ptr, programs, total_ptr + tensor * SUMS, BLOCK)


@triton.jit
def update_kernel(
    table_ptr, blocks_ptr, u_ptr, partial_ptr, total_ptr,  # as those of direction_kernel
    beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr, weight_decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BAND: tl.constexpr,
    ADAM: tl.constexpr, LR_ON_DEVICE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute and store m, S_k and p of the INNER elements that direction_kernel's program had."""
    options = make_options(beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, weight_decay)

    # -- find the program's tensor, its row in the table, and which block of it to compute --
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks_ptr + 2 * program)
    block = tl.load(blocks_ptr + 2 * program + 1)
    row_ptr = table_ptr + tensor * COLUMNS
    total_ptr += tensor * SUMS
    n = tl.load(row_ptr + SIZE)  # elements of the tensor
    chain = tl.load(row_ptr + CHAIN)

    # -- blocks do not overlap here: no neighbours are needed to update p, m and S_k --
    INNER: tl.constexpr = BLOCK - 2 * BAND
    lane = tl.arange(0, BLOCK)
    start = block * INNER
    offs = start + lane
    mask = (lane < INNER) & (offs < n)

    # -- statistics: compute the new m and S_k again, and store them in place of the old --
    to_chain_end = distance_to_chain_end(start, offs, chain)
    m, S, _ = load_statistics(row_ptr, offs, mask, to_chain_end, options, GRAD, STATE, BAND)
    m_ptr = load_pointer(row_ptr, M_PTR, STATE)
    tl.store(m_ptr + offs, m.to(STATE), mask=mask)
    for k in tl.static_range(BAND + 1):
        S_ptr = load_pointer(row_ptr, S_PTR + k, STATE)
        tl.store(S_ptr + offs, S[k].to(STATE), mask=mask)

    # -- parameters: p -= rate * (graft * u + weight_decay * p) --
    rate, graft = load_step_size(total_ptr, lr, LR_ON_DEVICE, ADAM)
    u = tl.load(u_ptr + program * INNER + lane, mask=mask, other=0.0)
    p_ptr = load_pointer(row_ptr, P_PTR, PARAM)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    p -= rate * (graft * u + options.weight_decay * p)
    tl.store(p_ptr + offs, p.to(PARAM), mask=mask)

    # -- counters: one program of each tensor updates them --
    if block == 0:
        update_counters(row_ptr, total_ptr)


# --------------------------------------------------------------------------------------------------
# Launch plans: the tables and buffers of a step, built once and reused until a tensor moves


def table_rows(params, chunk_sizes, first_programs, programs):
    """Return the rows of the table: a list of integers for each LocalParam of sonew.py.

    They are addresses and sizes, in the order of the columns P_PTR, G_PTR, ... The other arguments
    have a number for each LocalParam, for the columns CHUNK, FIRST_PROGRAM and PROGRAMS.
    """
    rows = []
    for i, param in enumerate(params):
        state = param.state
        pointers = [param.p.data_ptr(), param.grad.data_ptr(), state["m"].data_ptr()]
        counters = [state[name].data_ptr() for name in ("step", "skipped", "scale")]
        sizes = [param.p.numel(), max(1, param.numel), param.chain, chunk_sizes[i]]
        S_pointers = [state[f"s{k}"].data_ptr() for k in range(param.band + 1)]
        rows.append([*pointers, *counters, *sizes, first_programs[i], programs[i], *S_pointers])
    return rows


class Plan:
    """The kernel launches of a step, for tensors of one device, band and set of dtypes.

    A plan refers to its tensors by their addresses alone, so it keeps no gradient alive. Its tables
    must outlive a CUDA graph that has captured its launches.
    """

    def __init__(self, params):
        first = params[0]
        self.device = first.p.device
        self.band = first.band
        self.is_adam = first.is_adam
        self.n_tensors = len(params)
        dtypes = (first.p.dtype, first.grad.dtype, first.state["m"].dtype)
        self.dtypes = tuple(TL_DTYPES[dtype] for dtype in dtypes)

    def upload(self, *tables):
        """Copy tables of integers to the device in one asynchronous copy; return them there."""
        tables = [torch.as_tensor(table) for table in tables]
        host = torch.cat([table.flatten() for table in tables])
        if self.device.type == "cuda":
            host = host.pin_memory()  # otherwise the copy would be synchronous
        on_device = host.to(self.device, non_blocking=True)
        pieces = on_device.split([table.numel() for table in tables])
        return [piece.view_as(table) for piece, table in zip(pieces, tables, strict=True)]


class SimplePlan(Plan):
    """The three launches of this file, for tensors of one device, band and set of dtypes."""

    def __init__(self, params):
        super().__init__(params)
        inner = BLOCK - 2 * self.band  # elements that a program updates

        # An empty shard gets a block too, because update_kernel has to count its steps. The tensor
        # and the block of each program, for example with n_blocks = [2, 3]:
        #     tensor  0 0 1 1 1,  block  0 1 0 1 2
        n_blocks = torch.tensor([max(1, triton.cdiv(param.p.numel(), inner)) for param in params])
        first_programs = n_blocks.cumsum(0) - n_blocks
        tensor = torch.repeat_interleave(torch.arange(len(params)), n_blocks)  # (programs,)
        block = torch.arange(len(tensor)) - first_programs[tensor]
        rows = table_rows(params, [inner] * len(params), first_programs.tolist(), n_blocks.tolist())
        self.table, self.blocks = self.upload(rows, torch.stack([tensor, block], 1))

        self.process_groups = params[0].process_groups
        self.partial = torch.empty(len(block), SUMS.value, device=self.device)
        self.totals = torch.empty(len(params), SUMS.value, device=self.device)

    def step(self, numbers, lr_on_device):
        # a program loads BLOCK elements, and stores u of all but `band` of them on either side
        n_programs = len(self.blocks)
        columns = self.table.shape[1]
        u = torch.empty(n_programs * (BLOCK - 2 * self.band), device=self.device)

        # the kernels' arguments in order: table_ptr ... total_ptr, beta1 ... weight_decay (numbers)
        # and PARAM ... BLOCK. norms_kernel adds up the sums of 1024 programs at a time.
        tensors = (self.table, self.blocks, u, self.partial, self.totals)
        constants = (*self.dtypes, self.band, self.is_adam, lr_on_device, columns, BLOCK)
        direction_kernel[(n_programs,)](*tensors, *numbers, *constants, num_warps=WARPS)
        norms_kernel[(self.n_tensors,)](self.table, self.partial, self.totals, columns, 1024)
        for group in self.process_groups:
            dist.all_reduce(self.totals, group=group)
        update_kernel[(n_programs,)](*tensors, *numbers, *constants, num_warps=WARPS)


def choose_plan(param):
    """Return the fastest class of Plan for a parameter, and a tuple of its further arguments.

    sonew_fused.py needs unsharded, aligned tensors whose sizes are multiples of four;
    sonew_hopper.py also needs a u that fits into the shared memory of a Hopper GPU. Both files are
    optional. Their plans take needs_halo: whether a chunk needs copies of the elements next to it.
    """
    try:
        from kernels import sonew_fused  # it imports this file
    except ImportError:  # it was not copied
        return SimplePlan, ()
    if param.process_groups or not sonew_fused.is_aligned(param):
        return SimplePlan, ()

    _, needs_halo = sonew_fused.chunk_size(param)
    if sonew_fused.has_hopper(param.p.device):
        try:
            from kernels import sonew_hopper
        except ImportError:  # it was not copied
            return sonew_fused.FusedPlan, (needs_halo,)
        if sonew_hopper.fits(param):
            return sonew_hopper.RingPlan, (needs_halo,)
    return sonew_fused.FusedPlan, (needs_halo,)


def make_plans(params):
    """Return the plans of a step: one for all parameters with the same kind of plan and dtypes."""
    # a batch: parameters that share a launch
    batches = {}
    for param in params:
        dtypes = (param.p.dtype, param.grad.dtype, param.state["m"].dtype)
        shared = (param.p.device, dtypes, param.band, param.is_adam, param.process_groups)
        batches.setdefault((choose_plan(param), shared), []).append(param)

    plans = []
    for (choice, _), batch in batches.items():
        plan_class, arguments = choice
        plans.append(plan_class(batch, *arguments))
    return plans


class PlanCache:
    """The plans of one optimizer."""

    CAPACITY = 16  # gradients may alternate between a few buffers

    def __init__(self):
        self.recent = {}  # key: plans
        self.captured = []  # never freed: CUDA graphs read their tables at each replay

    def get(self, params):
        """Return the plans of a step for LocalParams, if possible those of a recent step."""
        # a plan stays valid as long as all tensors keep their shapes, dtypes and addresses
        key = []
        for param in params:
            p = param.p
            m = param.state["m"]
            key += (p.shape, param.chain, p.dtype, param.grad.dtype, m.dtype)
            key += [tensor.data_ptr() for tensor in (p, param.grad, *param.state.values())]
        key = tuple(key)

        capturing = params[0].p.is_cuda and torch.cuda.is_current_stream_capturing()
        plans = self.recent.get(key)
        if plans is None and capturing:
            raise RuntimeError("a tensor has moved since prepare(), so the step cannot be captured")
        # make new plans, and drop the oldest if there are too many
        if plans is None:
            plans = make_plans(params)
            if len(self.recent) == self.CAPACITY:
                oldest = next(iter(self.recent))
                del self.recent[oldest]
            self.recent[key] = plans
        if capturing:
            self.captured.append(plans)
        return plans


def run(plans, *, lr, weight_decay, beta1, beta2, eps, gamma):
    """Launch the plans of a step. lr: a number, or a tensor (), read by the kernels if possible."""
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    # numbers: beta1, beta2, new1, new2, log_beta1, log_beta2, eps, gamma, lr and weight_decay
    betas = (float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2, *logs)
    for plan in plans:
        lr_on_device = torch.is_tensor(lr) and lr.device == plan.device
        numbers = (*betas, float(eps), float(gamma), lr if lr_on_device else float(lr))
        with torch.cuda.device_of(plan.table):
            plan.step((*numbers, float(weight_decay)), lr_on_device)
