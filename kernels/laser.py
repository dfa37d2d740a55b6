"""LASER attention, forward and backward: o_i = log sum_j p_ij exp(v_j), never a (Tq, Tk) tensor, no atomics of ours.

    exp_kernel       e = exp(v - c) - one       once for each value; c, one: (B Hkv, D)
    attention        x = p e                    cuDNN's in bfloat16 where it runs, else forward_kernel, flash attention
    log_kernel       o = log(one + x) + c
    gradient_kernel  g = do / (one + x)         then attention's backward with (e, x, g) in place of (v, o, do),
    scale_kernel     dv = (one + e) de          in cuDNN or in backward_q_kernel and backward_kv_kernel

Rows of p sum to 1, so one = 1 changes nothing on paper, but then e = expm1(v - c), and bfloat16 keeps small values: used in
channels that stay near c. No maximum is subtracted. One over all keys would let a future token 110 above the rest send every
earlier row to log 0, one over a block of keys the earlier rows of that block. c is a multiple of 16 (of 1 in small channels),
and within 64 of each other the values of a channel neither overflow nor underflow. A head with a wider channel, or with NaN or
infinity, is done over, key by key, by kernels that take the maximum of s_ij + v_j online, per row and channel, over just the
keys the row sees. They read a flag that exp_kernel left on the device, so the host waits for nothing. A later key can change
an earlier row in one way only: by moving c or that flag, and then by rounding.

Beside the products forward moves 10 bytes an element of bfloat16 (v twice, e, x, o), backward 12; at 4.2 TB/s that is 0.08 and
0.10 ms for the 33.5 M elements of B 4, H 16, T 4096, D 128. Times below are for those, forward + backward or of one kernel, on one
H200, torch 2.11, triton 3.6, as the host saw them; beside the paper's form in eager PyTorch over cuDNN, 0.80 + 1.66 ms. The device
alone, which kernels/bench.py takes now, needs 0.605 + 1.513, for the paper's form 0.762 + 1.513.
1. Pre-pass of two kernels, range and exp: 0.76 + 1.62. Their blocks were small: 84 and 49 us, and 64 for the logarithm, since
   Kahan's expm1 and log1p divide. Series for small arguments, fewer and larger blocks: 0.69 + 1.65.
2. One pre-pass kernel that goes over a slice of 16 channels twice: 106 us -> 80. The running range is kept for each row of a
   tile and reduced once; reduced tile by tile it took 102. Kept: 0.635 + 1.632.
3. The kernels for wide heads merged into log_kernel and scale_kernel: their registers cost the common case 52 -> 99 and
   47 -> 68 us. Undone. Apart, with at most 1024 programs in all, they take 3 to 6 us to leave.
4. At B 16, H 12, T 1024, D 64 the host is the limit: without strides as arguments (the memory is (B, T, H, D), as projections
   leave it) and with an autograd.Function in place of an operator, together, 0.35 + 0.40 -> 0.21 + 0.34.
All in Triton, on an H200: forward tiles of 64 x 64, 4 warps, 0.70 ms -> 0.61 with the logarithm outside; (128, 64) 0.82, (128, 128) 0.92.
dk, dv: 32 x 128 is the fastest that spills no register, 1.50 ms; 64 x 64 with 4 warps spills 256 bytes and takes 1.06.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

RANGE = tl.constexpr(64.0)  # widest channel of v that one reference serves
LOG2E = tl.constexpr(1.4426950408889634)
# For each dtype and D: rows of q, rows of k, warps, stages of forward_kernel, backward_q_kernel, backward_kv_kernel. None spills.
HOPPER = {
    128: ((64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2)),
    64: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
}
CONFIG = {
    torch.bfloat16: {
        128: ((64, 32, 4, 3), (64, 32, 4, 2), (32, 64, 8, 2)),
        64: ((64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 2)),
    },
    torch.float16: {128: ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2))},
    torch.float32: {128: ((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2))},
}
ROWS, SLICE = 32, 16  # rows and channels at a time where there are no products
WATCH = 1024  # programs that look whether a head is wide


# ---------------------------------------------------------------------------------------------------------------------
# Before and after: values to exponentials, what attention makes of them to its logarithm

# Tensors are (B, T, H, D) in memory. b is int64; what is inside a batch fits int32.


@triton.jit
def tile(ptr, b, h, rows, T, H, D: tl.constexpr):
    at = ptr + (b * T * H + h) * D + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(rows < T)[:, None], other=0.0)  # [rows, D]


@triton.jit
def put(ptr, b, h, rows, x, T, H, D: tl.constexpr):
    at = ptr + (b * T * H + h) * D + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < T)[:, None])


@triton.jit
def vector(ptr, b, h, t, T, H, D: tl.constexpr):
    return tl.load(ptr + (b * T * H + h) * D + t * (H * D) + tl.arange(0, D)).to(tl.float32)  # [D]


@triton.jit
def exp_kernel(
    v_ptr,
    e_ptr,
    centre_ptr,
    one_ptr,
    wide_ptr,  # centre, one (B Hkv, D), wide (B Hkv, D / SLICE)
    HKV,
    T,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """e = exp(v - centre) - one, a slice of the channels. one is 1 in channels whose values are all near the centre, else 0;
    it is -1 in a slice with a channel wider than RANGE: there e = v."""
    bh, slice = tl.program_id(1).to(tl.int64), tl.program_id(0)
    offs_t = tl.arange(0, ROWS)[:, None]
    first, offs_d = (
        (bh // HKV * T * HKV + bh % HKV) * D + slice * SLICE,
        tl.arange(0, SLICE)[None, :],
    )
    v_ptr, e_ptr = v_ptr + first, e_ptr + first
    low, high = (
        tl.full((ROWS, SLICE), float("inf"), tl.float32),
        tl.full((ROWS, SLICE), -float("inf"), tl.float32),
    )
    for start in range(0, T, ROWS):
        again = tl.minimum(
            start + offs_t, T - 1
        )  # beyond the end the last row, which changes nothing
        v = tl.load(v_ptr + again * (HKV * D) + offs_d).to(tl.float32)  # [ROWS, SLICE]
        low, high = (
            tl.minimum(low, v),
            tl.maximum(high, tl.where(v == v, v, float("inf"))),
        )  # NaN makes the slice wide
    low, high = tl.min(low, 0), tl.max(high, 0)  # [SLICE]

    middle = (low + high) / 2
    near = tl.floor(middle + 0.5)  # moves in steps, so that a key more seldom changes it
    small = (low - near >= -2) | (low == high)
    centre = tl.where(low == high, low, tl.where(small, near, 16 * tl.floor(middle / 16 + 0.5)))
    wide = tl.max(tl.where(high - low <= RANGE, 0, 1), 0)
    one = tl.where(wide != 0, -1.0, tl.where(small, 1.0, 0.0))
    channel = bh * D + slice * SLICE + tl.arange(0, SLICE)
    tl.store(centre_ptr + channel, centre)
    tl.store(one_ptr + channel, one)
    tl.store(wide_ptr + bh * (D // SLICE) + slice, wide)
    for start in range(0, T, ROWS):
        at, known = (start + offs_t) * (HKV * D) + offs_d, start + offs_t < T
        v = tl.load(v_ptr + at, mask=known, other=0.0).to(tl.float32)  # [ROWS, SLICE]
        d = v - centre[None, :]
        u = tl.exp(d)
        e = tl.where(small[None, :], expm1(d, u), u)
        tl.store(e_ptr + at, tl.where(wide != 0, v, e).to(e_ptr.dtype.element_ty), mask=known)


@triton.jit
def expm1(d, u):
    """exp(d) - 1 without cancellation, u = exp(d)"""
    return tl.where(
        tl.abs(d) < 1 / 8, d * (1 + d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d / 120)))), u - 1
    )


@triton.jit
def log_of(x, centre, one):
    """log(one + x) + centre: of e the value, of attention's x the output"""
    series = x * (
        1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x / 6))))
    )  # of log(1 + x)
    return tl.where((one > 0) & (tl.abs(x) < 1 / 16), series, tl.log(one + x)) + centre


@triton.jit
def log_kernel(
    x_ptr, out_ptr, centre_ptr, one_ptr, H, GROUP, T, D: tl.constexpr, ROWS: tl.constexpr
):
    """out = log(one + x) + centre"""
    bh = tl.program_id(1).to(tl.int64)
    rows, at = (
        tl.program_id(0) * ROWS + tl.arange(0, ROWS),
        bh // GROUP * D + tl.arange(0, D),
    )  # b Hkv + h // GROUP
    x = tile(x_ptr, bh // H, bh % H, rows, T, H, D).to(tl.float32)  # [ROWS, D]
    o = log_of(x, tl.load(centre_ptr + at)[None, :], tl.load(one_ptr + at)[None, :])
    put(out_ptr, bh // H, bh % H, rows, o, T, H, D)


@triton.jit
def gradient_kernel(
    do_ptr,
    x_ptr,
    one_ptr,
    g_ptr,
    delta_ptr,  # delta (B H, Tq)
    H,
    GROUP,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """g = do / (one + x), delta = sum_d g x: the gradient of x"""
    bh = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    one = tl.load(one_ptr + bh // GROUP * D + tl.arange(0, D))[None, :]
    x = tile(x_ptr, bh // H, bh % H, rows, T, H, D).to(tl.float32)  # [ROWS, D]
    do = tile(do_ptr, bh // H, bh % H, rows, T, H, D).to(tl.float32)
    g = (do / (one + x)).to(g_ptr.dtype.element_ty)
    put(g_ptr, bh // H, bh % H, rows, g, T, H, D)
    delta = tl.sum(g.to(tl.float32) * x, 1)  # of the rounded g, as the matrix products see it
    tl.store(delta_ptr + bh * T + rows, delta, mask=rows < T)


@triton.jit
def scale_kernel(dv_ptr, e_ptr, one_ptr, HKV, T, D: tl.constexpr, ROWS: tl.constexpr):
    """dv = (one + e) de, in place"""
    bh = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, h = bh // HKV, bh % HKV
    de = tile(dv_ptr, b, h, rows, T, HKV, D).to(tl.float32)  # [ROWS, D]
    e = tile(e_ptr, b, h, rows, T, HKV, D).to(tl.float32)
    put(
        dv_ptr,
        b,
        h,
        rows,
        de * (e + tl.load(one_ptr + bh * D + tl.arange(0, D))[None, :]),
        T,
        HKV,
        D,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Flash attention over e


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    e_ptr,
    x_ptr,
    lse_ptr,  # lse (B H, Tq), natural logarithm
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest rows first
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m, offs_n, past = start_m + tl.arange(0, BM), tl.arange(0, BN), Tk - Tq
    q = tile(q_ptr, b, h, offs_m, Tq, H, D)  # [BM, D]
    qk_scale = tl.cast(scale, tl.float32) * LOG2E
    m_i, l_i, acc = (
        tl.full((BM,), -float("inf"), tl.float32),
        tl.zeros((BM,), tl.float32),
        tl.zeros((BM, D), tl.float32),
    )

    seen_by_all = (start_m + past + 1) // BN * BN
    for some in tl.static_range(2):  # keys that all rows see, then those that some see
        for start in range(
            seen_by_all if some else 0,
            tl.minimum(start_m + BM + past, Tk) if some else seen_by_all,
            BN,
        ):
            k = tile(k_ptr, b, h // GROUP, start + offs_n, Tk, H // GROUP, D)  # [BN, D]
            e = tile(e_ptr, b, h // GROUP, start + offs_n, Tk, H // GROUP, D)
            s = tl.dot(q, tl.trans(k), input_precision=PREC) * qk_scale  # [BM, BN]
            if some:
                s = tl.where(
                    (start + offs_n)[None, :] <= (offs_m + past)[:, None], s, -float("inf")
                )
            m_new = tl.maximum(m_i, tl.max(s, 1))  # finite: a row sees key 0 first
            p, a = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
            l_i, m_i = l_i * a + tl.sum(p, 1), m_new
            acc = acc * a[:, None] + tl.dot(p.to(e.dtype), e, input_precision=PREC)

    put(x_ptr, b, h, offs_m, acc / l_i[:, None], Tq, H, D)
    tl.store(lse_ptr + bh * Tq + offs_m, (m_i + tl.log2(l_i)) / LOG2E, mask=offs_m < Tq)


@triton.jit
def backward_q_kernel(
    q_ptr,
    k_ptr,
    e_ptr,
    g_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    """ds = p * (g e^T - delta), dq = scale ds k"""
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    offs_m, offs_n, past = start_m + tl.arange(0, BM), tl.arange(0, BN), Tk - Tq
    q = tile(q_ptr, b, h, offs_m, Tq, H, D)  # [BM, D]
    g = tile(g_ptr, b, h, offs_m, Tq, H, D)
    lse = tl.load(lse_ptr + bh * Tq + offs_m, mask=offs_m < Tq, other=float("inf")) * LOG2E  # [BM]
    delta = tl.load(delta_ptr + bh * Tq + offs_m, mask=offs_m < Tq, other=0.0)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E
    dq = tl.zeros((BM, D), tl.float32)

    seen_by_all = (start_m + past + 1) // BN * BN
    for some in tl.static_range(2):
        for start in range(
            seen_by_all if some else 0,
            tl.minimum(start_m + BM + past, Tk) if some else seen_by_all,
            BN,
        ):
            k = tile(k_ptr, b, h // GROUP, start + offs_n, Tk, H // GROUP, D)  # [BN, D]
            e = tile(e_ptr, b, h // GROUP, start + offs_n, Tk, H // GROUP, D)
            p = tl.exp2(
                tl.dot(q, tl.trans(k), input_precision=PREC) * qk_scale - lse[:, None]
            )  # [BM, BN]
            if some:
                p = tl.where((start + offs_n)[None, :] <= (offs_m + past)[:, None], p, 0.0)
            ds = p * (tl.dot(g, tl.trans(e), input_precision=PREC) - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision=PREC)
    put(dq_ptr, b, h, offs_m, dq * scale, Tq, H, D)


@triton.jit
def backward_kv_kernel(
    q_ptr,
    k_ptr,
    e_ptr,
    g_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    de_ptr,
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    """dk = scale ds^T q, de = p^T g, over the heads of the group, one after the other"""
    start_n = tl.program_id(0) * BN  # the keys that most rows see first
    bh = tl.program_id(1).to(tl.int64)
    HKV = H // GROUP
    b, hkv = bh // HKV, bh % HKV
    offs_m, offs_n, past = tl.arange(0, BM), start_n + tl.arange(0, BN), Tk - Tq
    k = tile(k_ptr, b, hkv, offs_n, Tk, HKV, D)  # [BN, D]
    e = tile(e_ptr, b, hkv, offs_n, Tk, HKV, D)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E
    dk, de = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)

    for n in range(0, GROUP):
        h = hkv * GROUP + n
        at = (b * H + h) * Tq
        for start in range(
            tl.maximum(start_n - past, 0) // BM * BM, Tq, BM
        ):  # no row before sees one of the keys
            rows = start + offs_m
            q = tile(q_ptr, b, h, rows, Tq, H, D)  # [BM, D]
            g = tile(g_ptr, b, h, rows, Tq, H, D)
            lse = (
                tl.load(lse_ptr + at + rows, mask=rows < Tq, other=float("inf")) * LOG2E
            )  # inf: p = 0
            delta = tl.load(delta_ptr + at + rows, mask=rows < Tq, other=0.0)
            p = tl.exp2(
                tl.dot(k, tl.trans(q), input_precision=PREC) * qk_scale - lse[None, :]
            )  # [BN, BM]
            p = tl.where(offs_n[:, None] - past <= rows[None, :], p, 0.0)
            de += tl.dot(p.to(g.dtype), g, input_precision=PREC)
            ds = p * (tl.dot(e, tl.trans(g), input_precision=PREC) - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PREC)
    put(dk_ptr, b, hkv, offs_n, dk * scale, Tk, HKV, D)
    put(de_ptr, b, hkv, offs_n, de, Tk, HKV, D)


# ---------------------------------------------------------------------------------------------------------------------
# Wide heads, key by key, with a running maximum of s_ij + v_j for each row and channel; what was computed before is overwritten.
# The others leave at once.


@triton.jit
def is_wide(wide_ptr, bh, SLICES: tl.constexpr):
    return tl.max(tl.load(wide_ptr + bh * SLICES + tl.arange(0, SLICES)), 0) != 0


@triton.jit
def value(e, centre, one):
    return tl.where(one < 0, e, log_of(e, centre, one))


@triton.jit
def wide_kernel(
    q_ptr,
    k_ptr,
    e_ptr,
    centre_ptr,
    one_ptr,
    wide_ptr,
    x_ptr,
    out_ptr,
    lse_ptr,
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    BM: tl.constexpr,
):
    """out = LSE_j(s_ij + v_j) - LSE_j(s_ij). x keeps what out loses by rounding, for the backward pass takes exp(v - o)."""
    bh = tl.program_id(1).to(tl.int64)
    if is_wide(wide_ptr, bh // GROUP, SLICES):
        b, h, past, offs_d = bh // H, bh % H, Tk - Tq, tl.arange(0, D)
        centre, one = (
            tl.load(centre_ptr + bh // GROUP * D + offs_d),
            tl.load(one_ptr + bh // GROUP * D + offs_d),
        )  # [D]
        for start_m in range(tl.program_id(0) * BM, Tq, tl.num_programs(0) * BM):
            offs_m = start_m + tl.arange(0, BM)
            q = tile(q_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)  # [BM, D]
            m, l = tl.full((BM, D), -3.0e38, tl.float32), tl.zeros((BM, D), tl.float32)
            for key in range(0, tl.minimum(start_m + BM + past, Tk)):
                k = vector(k_ptr, b, h // GROUP, key, Tk, H // GROUP, D)
                v = value(vector(e_ptr, b, h // GROUP, key, Tk, H // GROUP, D), centre, one)
                s = tl.sum(q * k[None, :], 1) * scale  # [BM]
                t = tl.where(
                    (key <= offs_m + past)[:, None], s[:, None] + v[None, :], -float("inf")
                )  # [BM, D]
                m_new = tl.maximum(m, t)
                l, m = l * tl.exp(m - m_new) + tl.exp(t - m_new), m_new
            o = (
                m
                + tl.log(l)
                - tl.load(lse_ptr + bh * Tq + offs_m, mask=offs_m < Tq, other=0.0)[:, None]
            )
            rounded = o.to(out_ptr.dtype.element_ty)
            put(out_ptr, b, h, offs_m, rounded, Tq, H, D)
            put(x_ptr, b, h, offs_m, o - rounded.to(tl.float32), Tq, H, D)


@triton.jit
def wide_q(
    bh,
    q_ptr,
    k_ptr,
    e_ptr,
    centre_ptr,
    one_ptr,
    wide_ptr,
    x_ptr,
    out_ptr,
    lse_ptr,
    do_ptr,
    dq_ptr,
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    BM: tl.constexpr,
):
    """ds = sum_d do (b - p), posterior minus prior, with b = p exp(v - o)"""
    if is_wide(wide_ptr, bh // GROUP, SLICES):
        b, h, past, offs_d = bh // H, bh % H, Tk - Tq, tl.arange(0, D)
        centre, one = (
            tl.load(centre_ptr + bh // GROUP * D + offs_d),
            tl.load(one_ptr + bh // GROUP * D + offs_d),
        )  # [D]
        for start_m in range(tl.program_id(0) * BM, Tq, tl.num_programs(0) * BM):
            offs_m = start_m + tl.arange(0, BM)
            q = tile(q_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)  # [BM, D]
            do = tile(do_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)
            o = tile(out_ptr, b, h, offs_m, Tq, H, D).to(tl.float32) + tile(
                x_ptr, b, h, offs_m, Tq, H, D
            ).to(tl.float32)
            lse = tl.load(lse_ptr + bh * Tq + offs_m, mask=offs_m < Tq, other=0.0)
            dq = tl.zeros((BM, D), tl.float32)
            for key in range(0, tl.minimum(start_m + BM + past, Tk)):
                k = vector(k_ptr, b, h // GROUP, key, Tk, H // GROUP, D)
                v = value(vector(e_ptr, b, h // GROUP, key, Tk, H // GROUP, D), centre, one)
                logp, sees = tl.sum(q * k[None, :], 1) * scale - lse, key <= offs_m + past  # [BM]
                posterior = tl.where(
                    sees[:, None], tl.exp(logp[:, None] + v[None, :] - o), 0.0
                )  # [BM, D]
                ds = tl.sum(do * (posterior - tl.where(sees, tl.exp(logp), 0.0)[:, None]), 1)
                dq += ds[:, None] * k[None, :]
            put(dq_ptr, b, h, offs_m, dq * scale, Tq, H, D)


@triton.jit
def wide_kv(
    bh,
    q_ptr,
    k_ptr,
    e_ptr,
    centre_ptr,
    one_ptr,
    wide_ptr,
    x_ptr,
    out_ptr,
    lse_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    BN: tl.constexpr,
):
    """dv = sum_i do b"""
    if is_wide(wide_ptr, bh, SLICES):
        HKV, past, offs_d = H // GROUP, Tk - Tq, tl.arange(0, D)
        b, hkv = bh // HKV, bh % HKV
        centre, one = (
            tl.load(centre_ptr + bh * D + offs_d),
            tl.load(one_ptr + bh * D + offs_d),
        )  # [D]
        for start_n in range(tl.program_id(0) * BN, Tk, tl.num_programs(0) * BN):
            offs_n = start_n + tl.arange(0, BN)
            k = tile(k_ptr, b, hkv, offs_n, Tk, HKV, D).to(tl.float32)  # [BN, D]
            v = value(
                tile(e_ptr, b, hkv, offs_n, Tk, HKV, D).to(tl.float32),
                centre[None, :],
                one[None, :],
            )
            dk, dv = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
            for n in range(0, GROUP):
                h = hkv * GROUP + n
                for row in range(tl.maximum(start_n - past, 0), Tq):
                    q, do = vector(q_ptr, b, h, row, Tq, H, D), vector(do_ptr, b, h, row, Tq, H, D)
                    o = vector(out_ptr, b, h, row, Tq, H, D) + vector(x_ptr, b, h, row, Tq, H, D)
                    logp = tl.sum(k * q[None, :], 1) * scale - tl.load(
                        lse_ptr + (b * H + h) * Tq + row
                    )  # [BN]
                    sees = offs_n <= row + past
                    posterior = tl.where(
                        sees[:, None], tl.exp(logp[:, None] + v - o[None, :]), 0.0
                    )  # [BN, D]
                    dv += do[None, :] * posterior
                    ds = tl.sum(
                        do[None, :] * (posterior - tl.where(sees, tl.exp(logp), 0.0)[:, None]), 1
                    )
                    dk += ds[:, None] * q[None, :]
            put(dk_ptr, b, hkv, offs_n, dk * scale, Tk, HKV, D)
            put(dv_ptr, b, hkv, offs_n, dv, Tk, HKV, D)


@triton.jit
def wide_gradients_kernel(
    q_ptr,
    k_ptr,
    e_ptr,
    centre_ptr,
    one_ptr,
    wide_ptr,
    x_ptr,
    out_ptr,
    lse_ptr,
    do_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    BH,
    H,
    GROUP,
    Tq,
    Tk,
    scale,
    D: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)  # heads of q, then heads of k
    if bh < BH:
        wide_q(
            bh,
            q_ptr,
            k_ptr,
            e_ptr,
            centre_ptr,
            one_ptr,
            wide_ptr,
            x_ptr,
            out_ptr,
            lse_ptr,
            do_ptr,
            dq_ptr,
            H,
            GROUP,
            Tq,
            Tk,
            scale,
            D,
            SLICES,
            ROWS,
        )
    else:
        wide_kv(
            bh - BH,
            q_ptr,
            k_ptr,
            e_ptr,
            centre_ptr,
            one_ptr,
            wide_ptr,
            x_ptr,
            out_ptr,
            lse_ptr,
            do_ptr,
            dk_ptr,
            dv_ptr,
            H,
            GROUP,
            Tq,
            Tk,
            scale,
            D,
            SLICES,
            ROWS,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def rows_first(t):
    return (
        t.transpose(1, 2).contiguous().transpose(1, 2)
    )  # (B, T, H, D) in memory, as projections leave it: no copy then


def watch(rows, heads):
    return max(1, min(WATCH // heads, triton.cdiv(rows, ROWS))), heads


def config(dtype, D, hopper):
    by_width = HOPPER if hopper and dtype == torch.bfloat16 else CONFIG[dtype]
    return by_width.get(
        64 if D < 128 else 128, by_width[128]
    ), "ieee" if dtype == torch.float32 else "tf32"


def on_hopper(q):
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def cudnn_takes(q, k, e):
    """Whether cuDNN's attention runs here: bfloat16 (exp(v) leaves float16's range), causal squares, no wish for determinism."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and q.shape[2] == k.shape[2]
        and not torch.are_deterministic_algorithms_enabled()
        and torch.backends.cuda.can_use_cudnn_attention(
            torch.backends.cuda.SDPAParams(q, k, e, None, 0.0, True, q.shape[1] != k.shape[1])
        )
    )


def blank(q, k, v):
    """-> out, e, centre, one, wide, not yet written. exp(v) needs the range of bfloat16 or float32."""
    (B, Hkv), D, e_dtype = (
        k.shape[:2],
        q.shape[3],
        torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32,
    )

    def new(width, dtype):
        return torch.empty(B * Hkv, width, dtype=dtype, device=q.device)

    return (
        torch.empty_like(q),
        torch.empty_like(v, dtype=e_dtype),
        new(D, torch.float32),
        new(D, torch.float32),
        new(D // SLICE, torch.int32),
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    sizes = H, H // Hkv, Tq, Tk, scale
    out, e, centre, one, wide = blank(q, k, v)
    exp_kernel[(D // SLICE, B * Hkv)](
        v, e, centre, one, wide, Hkv, Tk, D, SLICE, 4 * ROWS, num_warps=8
    )
    if cudnn_takes(q, k, e):
        x, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, e, None, True, 0.0, True, False, scale=scale
        )[:2]
        x, lse = rows_first(x), lse.view(B, H, Tq)
    else:
        x, lse = (
            torch.empty_like(q, dtype=e.dtype),
            torch.empty(B, H, Tq, dtype=torch.float32, device=q.device),
        )
        ((bm, bn, warps, stages), *_), prec = config(q.dtype, D, on_hopper(q))
        forward_kernel[(triton.cdiv(Tq, bm), B * H)](
            q, k, e, x, lse, *sizes, D, bm, bn, prec, num_warps=warps, num_stages=stages
        )
    log_kernel[(triton.cdiv(Tq, ROWS), B * H)](x, out, centre, one, H, H // Hkv, Tq, D, ROWS)
    wide_kernel[watch(Tq, B * H)](
        q, k, e, centre, one, wide, x, out, lse, *sizes, D, D // SLICE, ROWS, num_warps=8
    )
    return out, e, centre, one, wide, x, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    out: Tensor,
    e: Tensor,
    centre: Tensor,
    one: Tensor,
    wide: Tensor,
    x: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    sizes = H, H // Hkv, Tq, Tk, scale
    do = rows_first(do)
    g, delta = torch.empty_like(x), torch.empty_like(lse)
    gradient_kernel[(triton.cdiv(Tq, ROWS), B * H)](do, x, one, g, delta, *sizes[:3], D, ROWS)
    if cudnn_takes(q, k, e):
        none = torch.empty(
            (), dtype=torch.int64, device=q.device
        )  # the state of the dropout that there is not
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            g,
            q,
            k,
            e,
            x,
            lse.unsqueeze(-1),
            none,
            none,
            None,
            None,
            None,
            Tq,
            Tk,
            0.0,
            True,
            scale=scale,
        )
        dq, dk, dv = map(rows_first, (dq, dk, dv))
    else:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(e)
        (_, (bm, bn, warps, stages), (km, kn, kv_warps, kv_stages)), prec = config(
            q.dtype, D, on_hopper(q)
        )
        backward_q_kernel[(triton.cdiv(Tq, bm), B * H)](
            q, k, e, g, lse, delta, dq, *sizes, D, bm, bn, prec, num_warps=warps, num_stages=stages
        )
        backward_kv_kernel[(triton.cdiv(Tk, kn), B * Hkv)](
            q,
            k,
            e,
            g,
            lse,
            delta,
            dk,
            dv,
            *sizes,
            D,
            km,
            kn,
            prec,
            num_warps=kv_warps,
            num_stages=kv_stages,
        )
    scale_kernel[(triton.cdiv(Tk, ROWS), B * Hkv)](dv, e, one, Hkv, Tk, D, ROWS)
    wide_gradients_kernel[watch(Tk, B * (H + Hkv))](
        q,
        k,
        e,
        centre,
        one,
        wide,
        x,
        out,
        lse,
        do,
        dq,
        dk,
        dv,
        B * H,
        *sizes,
        D,
        D // SLICE,
        ROWS,
        num_warps=8,
    )
    return dq, dk, dv.to(q.dtype)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.set_materialize_grads(False)
    ctx.scale = inputs[3]


class Laser(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        keep(ctx, inputs, output)
        return output[0]  # the host does less for one than for seven

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled():  # create_graph=True: what is saved are constants
            raise RuntimeError("the LASER kernel has no second derivatives")
        return *backward(do, *ctx.saved_tensors, ctx.scale), None


# The same for torch.compile, which does not look inside an operator. An operator costs the host more at each call.
laser, laser_backward = (
    torch.library.custom_op(f"fivefold::{n}", f, mutates_args=())
    for n, f in (("laser", forward), ("laser_backward", backward))
)
laser.register_autograd(
    lambda ctx, do, *_: (*laser_backward(do, *ctx.saved_tensors, ctx.scale), None),
    setup_context=keep,
)


@laser.register_fake
def _(q, k, v, scale):
    out, e, *tables = blank(q, k, v)
    return (
        out,
        e,
        *tables,
        torch.empty_like(q, dtype=e.dtype),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )


@laser_backward.register_fake
def _(do, q, k, out, e, centre, one, wide, x, lse, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(e, dtype=q.dtype)


def attention(q, k, v):
    """q (B, H, Tq, D), k, v (B, Hkv, Tk, D), float32, float16 or bfloat16, D <= 128 -> (B, H, Tq, D); causal, the queries
    being the last of the positions. In bfloat16 on a GPU with cuDNN's attention that does the products."""
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    width = max(16, triton.next_power_of_2(D))  # channels of zeros change no score
    if not (
        1 <= D <= 128
        and Hkv
        and H % Hkv == 0
        and Tq <= Tk
        and k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: need one dtype, D from 1 to 128, H a multiple of Hkv, Tq <= Tk"
        )
    if B * H >= 2**16 or Tk * H * width >= 2**31:
        raise ValueError(
            "the grid must fit 16 bits, and a sequence of all heads 31 bits; give a smaller batch or shorter text"
        )
    if q.numel() == 0:
        return 0.0 * q  # nothing to attend from; keeps the gradient
    q, k, v = (
        rows_first(torch.nn.functional.pad(t, (0, width - D)) if width > D else t)
        for t in (q, k, v)
    )
    out = (
        laser(q, k, v, D**-0.5)[0]
        if torch.compiler.is_compiling()
        else Laser.apply(q, k, v, D**-0.5)
    )
    return out if width == D else out[..., :D]
