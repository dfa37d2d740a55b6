"""LASER attention, out_i = log sum_j p_ij exp(v_j), with p_ij = softmax_j(q_i . k_j / sqrt(D)).

    exp_kernel       exp_v = exp(v - center) - shift
    attention        x = p @ exp_v                            by cuDNN or attn_fwd_kernel
    log_kernel       out = log(x + shift) + center

    grad_x_kernel    grad_x = grad_out / (x + shift)
    attention        dq, dk, grad_exp_v                       by cuDNN or attn_bwd_*_kernel
    grad_v_kernel    dv = grad_exp_v * (exp_v + shift)

Each channel of each key/value head has its own center, near the middle of its values, and its own
shift, 0 or 1, which exp_kernel explains. If some channel has NaN, infinity or values more than
MAX_RANGE apart, its exp would overflow or underflow. The fallback kernels then compute the head
again. They find this out on the device, so the host never waits. A future key can move the center,
which changes earlier rows by rounding only.

Besides attention we read and write 10 bytes per bfloat16 element forward and 12 backward. On one
H200 with B 4, H 16, T 4096, D 128: 0.605 + 1.513 ms. The paper's formula, with cuDNN's attention,
takes 0.762 + 1.513 ms.
There are no atomics. Tuning history: kernels/NOTES.md.
"""

import functools
from math import ceil

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
MAX_RANGE = tl.constexpr(64.0)  # values are at most 40 from the center, and exp(+-40) fits bfloat16
BLOCK_T = 32  # positions per block of the elementwise and fallback kernels; of exp_kernel, 4 x 32
SLICE = 16  # channels per program of exp_kernel
FALLBACK_PROGRAMS = 1024  # per launch, or one per head if those are more; most exit at once


# --------------------------------------------------------------------------------------------------
# Loads and stores. Each program computes a block of positions of one head of one batch entry, and
# the grid is (blocks, B * heads); in exp_kernel, a block is SLICE channels at all positions. GROUP
# query heads share a key/value head, hkv. In memory, tensors are (B, T, H, D):
#     element (b, t, h, d) is at ((b T + t) H + h) D + d  =  (b T H + h) D  +  t (H D)  +  d
#                                                            start of head    position    channel


@triton.jit
def batch_and_head(H):
    """Return b and h; axis 1 of the grid is b * H + h. b is int64: tensors may be large."""
    head = tl.program_id(1)
    return (head // H).to(tl.int64), head % H


@triton.jit
def load_tile(ptr, b, h, rows, T, H, D: tl.constexpr):
    """Load the positions `rows` of head h, [len(rows), D]; zeros from position T on."""
    # start of the head + position + channel
    ptrs = ptr + (b * T * H + h) * D + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    return tl.load(ptrs, mask=(rows < T)[:, None], other=0.0)


@triton.jit
def store_tile(ptr, x, b, h, rows, T, H, D: tl.constexpr):
    """Store x [len(rows), D] at the positions `rows` of head h."""
    ptrs = ptr + (b * T * H + h) * D + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(rows < T)[:, None])


@triton.jit
def load_row(ptr, b, h, row, T, H, D: tl.constexpr):
    """Load a single position `row` of head h, [D], as float32."""
    offs = row * (H * D) + tl.arange(0, D)  # from the start of the head
    return tl.load(ptr + (b * T * H + h) * D + offs).to(tl.float32)


@triton.jit
def load_channels(ptr, b, hkv, HKV, D: tl.constexpr):
    """Load center, shift or is_wide (B * HKV, D) of the channels of key/value head hkv: [D]"""
    return tl.load(ptr + (b * HKV + hkv) * D + tl.arange(0, D))


# --------------------------------------------------------------------------------------------------
# Elementwise passes before and after attention


@triton.jit
def exp_kernel(
    v_ptr, exp_v_ptr,
    center_ptr, shift_ptr, is_wide_ptr,  # (B * HKV, D)
    HKV, T,
    D: tl.constexpr, SLICE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute exp_v = exp(v - center) - shift for SLICE channels of one head, at all T positions.

    shift is 1 in channels where all values are near the center. There exp(v - center) is close to
    1, where bfloat16 keeps few digits, so exp_v is exp(v - center) - 1 instead. Rows of p sum to 1,
    so this makes x = p @ exp_v smaller by 1, which log_kernel adds again. Otherwise shift is 0.
    """
    b, hkv = batch_and_head(HKV)
    offs_t = tl.arange(0, BLOCK_T)[:, None]
    offs_d = tl.program_id(0) * SLICE + tl.arange(0, SLICE)  # channels
    v_ptr += (b * T * HKV + hkv) * D  # start of the head
    exp_v_ptr += (b * T * HKV + hkv) * D

    # -- lowest and highest value of each channel: first over positions BLOCK_T apart, then all --
    low = tl.full((BLOCK_T, SLICE), float("inf"), tl.float32)
    high = tl.full((BLOCK_T, SLICE), -float("inf"), tl.float32)
    for start in range(0, T, BLOCK_T):
        rows = tl.minimum(start + offs_t, T - 1)  # past the end, read the last row again
        v = tl.load(v_ptr + rows * (HKV * D) + offs_d[None, :]).to(tl.float32)
        low = tl.minimum(low, v)
        high = tl.maximum(high, tl.where(v == v, v, float("inf")))  # NaN counts as inf
    low = tl.min(low, 0)  # [SLICE]
    high = tl.max(high, 0)

    # -- center: the middle, rounded, because then one more key rarely changes it --
    #     low 1.5, high 3: middle 2.25, center 2, shift 1
    #     low -9, high 20: middle 5.5, center 0, shift 0
    middle = (low + high) / 2
    nearest_1 = tl.floor(middle + 0.5)  # the nearest integer
    nearest_16 = 16 * tl.floor(middle / 16 + 0.5)  # the nearest multiple of 16
    is_constant = low == high
    use_shift = (low - nearest_1 >= -2) | is_constant  # then high - nearest_1 <= 3
    center = tl.where(use_shift, nearest_1, nearest_16)
    center = tl.where(is_constant, low, center)  # then exp_v is 0 and out is exactly v
    shift = use_shift.to(tl.float32)

    # -- store center, shift and is_wide: in a wide channel, exp could overflow or underflow --
    is_narrow = high - low <= MAX_RANGE  # false for inf - inf
    offs_c = (b * HKV + hkv) * D + offs_d
    tl.store(center_ptr + offs_c, center)
    tl.store(shift_ptr + offs_c, shift)
    tl.store(is_wide_ptr + offs_c, tl.where(is_narrow, 0, 1))

    # -- exp_v = exp(d) - shift, where d = v - center; near d = 0 a series loses fewer digits --
    for start in range(0, T, BLOCK_T):
        rows = start + offs_t
        offs = rows * (HKV * D) + offs_d[None, :]
        v = tl.load(v_ptr + offs, mask=rows < T, other=0.0).to(tl.float32)
        d = v - center[None, :]  # [BLOCK_T, SLICE]
        use_series = use_shift[None, :] & (tl.abs(d) < 1 / 8)
        exp_v = tl.where(use_series, expm1_series(d), tl.exp(d) - shift[None, :])
        tl.store(exp_v_ptr + offs, exp_v.to(exp_v_ptr.dtype.element_ty), mask=rows < T)


@triton.jit
def expm1_series(x):
    """Return exp(x) - 1 for |x| < 1/8. The Taylor series has no cancellation, unlike exp(x) - 1."""
    # x + x^2 / 2! + x^3 / 3! + x^4 / 4! + x^5 / 5!
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))


@triton.jit
def log1p_series(x):
    """Return log(1 + x) for |x| < 1/16. The Taylor series does not round 1 + x."""
    # x - x^2 / 2 + x^3 / 3 - x^4 / 4 + x^5 / 5 - x^6 / 6
    return x * (1 - x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x / 6)))))


@triton.jit
def log_kernel(
    x_ptr, out_ptr, center_ptr, shift_ptr, H, GROUP, T, D: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Compute out = log(x + shift) + center for BLOCK_T positions of one query head."""
    b, h = batch_and_head(H)
    hkv = h // GROUP  # the key/value head that query head h uses
    HKV = H // GROUP
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # positions
    x = load_tile(x_ptr, b, h, offs_t, T, H, D).to(tl.float32)  # [BLOCK_T, D]
    center = load_channels(center_ptr, b, hkv, HKV, D)[None, :]  # [1, D]
    shift = load_channels(shift_ptr, b, hkv, HKV, D)[None, :]  # 0 or 1, see exp_kernel
    use_series = (shift > 0) & (tl.abs(x) < 1 / 16)  # where x + 1 would round away digits of x
    out = tl.where(use_series, log1p_series(x), tl.log(x + shift)) + center
    store_tile(out_ptr, out, b, h, offs_t, T, H, D)


@triton.jit
def grad_x_kernel(
    grad_out_ptr, x_ptr, shift_ptr, grad_x_ptr,
    delta_ptr,  # (B * H, T)
    H, GROUP, T,
    D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute grad_x = grad_out / (x + shift) for BLOCK_T positions of one query head.

    delta, the sum of grad_x * x over the channels, is what the softmax backward pass needs.
    """
    b, h = batch_and_head(H)
    hkv = h // GROUP  # the key/value head that query head h uses
    HKV = H // GROUP
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # positions
    shift = load_channels(shift_ptr, b, hkv, HKV, D)[None, :]  # 0 or 1, see exp_kernel
    x = load_tile(x_ptr, b, h, offs_t, T, H, D).to(tl.float32)  # [BLOCK_T, D]
    grad_out = load_tile(grad_out_ptr, b, h, offs_t, T, H, D).to(tl.float32)
    grad_x = (grad_out / (x + shift)).to(grad_x_ptr.dtype.element_ty)
    store_tile(grad_x_ptr, grad_x, b, h, offs_t, T, H, D)
    delta = tl.sum(grad_x.to(tl.float32) * x, 1)  # from the rounded grad_x, which dq and dk use too
    tl.store(delta_ptr + (b * H + h) * T + offs_t, delta, mask=offs_t < T)


@triton.jit
def grad_v_kernel(dv_ptr, exp_v_ptr, shift_ptr, HKV, T, D: tl.constexpr, BLOCK_T: tl.constexpr):
    """Compute dv = grad_exp_v * (exp_v + shift) in place: on entry, dv_ptr holds grad_exp_v."""
    b, hkv = batch_and_head(HKV)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # positions
    shift = load_channels(shift_ptr, b, hkv, HKV, D)[None, :]  # 0 or 1, see exp_kernel
    grad_exp_v = load_tile(dv_ptr, b, hkv, offs_t, T, HKV, D).to(tl.float32)  # [BLOCK_T, D]
    exp_v = load_tile(exp_v_ptr, b, hkv, offs_t, T, HKV, D).to(tl.float32)
    store_tile(dv_ptr, grad_exp_v * (exp_v + shift), b, hkv, offs_t, T, HKV, D)


# --------------------------------------------------------------------------------------------------
# Flash attention over exp_v, where cuDNN cannot be used. The queries are the last Tq of the Tk
# positions, and query i sees the keys 0 ... i + past, where past = Tk - Tq.


@triton.jit
def attn_fwd_kernel(
    q_ptr, k_ptr, exp_v_ptr, x_ptr,
    lse_ptr,  # (B * H, Tq), natural logarithm
    H, GROUP, Tq, Tk, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute x = softmax(q k^T scale) @ exp_v, [BLOCK_M, D], for BLOCK_M queries of one head."""
    b, h = batch_and_head(H)
    hkv = h // GROUP  # the key/value head that query head h uses
    HKV = H // GROUP
    past = Tk - Tq  # positions before the first query
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # queries with most keys first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, b, h, offs_m, Tq, H, D)  # [BLOCK_M, D]
    qk_scale = tl.cast(scale, tl.float32) * LOG2E  # exp(scale * s) = exp2(qk_scale * s)
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)  # running maximum of qk
    l_i = tl.zeros((BLOCK_M,), tl.float32)  # running sum of exp2(qk - m_i)
    acc = tl.zeros((BLOCK_M, D), tl.float32)  # running sum of exp2(qk - m_i) * exp_v

    # stage 0: keys before `diagonal`, which all these queries see; stage 1: the rest, with a mask.
    # With BLOCK_M = BLOCK_N = 64 and past = 10, queries 128 ... 191 all see the keys 0 ... 138, and
    # the last one sees 0 ... 201: diagonal = 139 // 64 * 64 = 128, end = 202.
    diagonal = (start_m + past + 1) // BLOCK_N * BLOCK_N  # start of the first block to mask
    end = tl.minimum(start_m + BLOCK_M + past, Tk)  # the last of these queries sees end - 1
    for stage in tl.static_range(2):
        lo = diagonal if stage == 1 else 0
        hi = end if stage == 1 else diagonal
        for start_n in range(lo, hi, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, b, hkv, offs_n, Tk, HKV, D)  # [BLOCK_N, D]
            exp_v = load_tile(exp_v_ptr, b, hkv, offs_n, Tk, HKV, D)
            # -- compute qk --
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale  # [BLOCK_M, BLOCK_N]
            if stage == 1:
                qk = tl.where(offs_n[None, :] <= (offs_m + past)[:, None], qk, -float("inf"))
            # -- online softmax; m_new is finite because every query sees key 0 --
            m_new = tl.maximum(m_i, tl.max(qk, 1))
            p = tl.exp2(qk - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)  # rescales the sums to the new maximum
            l_i = l_i * alpha + tl.sum(p, 1)
            m_i = m_new
            # -- update acc --
            acc = acc * alpha[:, None]
            acc += tl.dot(p.to(exp_v.dtype), exp_v, input_precision=PRECISION)

    # -- normalize and store --
    store_tile(x_ptr, acc / l_i[:, None], b, h, offs_m, Tq, H, D)
    lse = (m_i + tl.log2(l_i)) / LOG2E  # log-sum-exp of each query, [BLOCK_M]
    tl.store(lse_ptr + (b * H + h) * Tq + offs_m, lse, mask=offs_m < Tq)


@triton.jit
def attn_bwd_dq_kernel(
    q_ptr, k_ptr, exp_v_ptr, grad_x_ptr, lse_ptr, delta_ptr, dq_ptr,
    H, GROUP, Tq, Tk, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dq = scale * ds @ k, [BLOCK_M, D], for BLOCK_M queries of one head.

    ds = p * (grad_x @ exp_v^T - delta) is the gradient with respect to the scores q k^T scale.
    """
    b, h = batch_and_head(H)
    hkv = h // GROUP  # the key/value head that query head h uses
    HKV = H // GROUP
    past = Tk - Tq  # positions before the first query
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # queries with most keys first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse_ptr += (b * H + h) * Tq  # of this head: lse and delta are (B * H, Tq)
    delta_ptr += (b * H + h) * Tq
    q = load_tile(q_ptr, b, h, offs_m, Tq, H, D)  # [BLOCK_M, D]
    grad_x = load_tile(grad_x_ptr, b, h, offs_m, Tq, H, D)
    # lse in base 2; past the last query it is inf, which makes p = exp2(qk - lse) zero
    lse = tl.load(lse_ptr + offs_m, mask=offs_m < Tq, other=float("inf")) * LOG2E
    delta = tl.load(delta_ptr + offs_m, mask=offs_m < Tq, other=0.0)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E  # exp(scale * s) = exp2(qk_scale * s)
    dq = tl.zeros((BLOCK_M, D), tl.float32)

    # stage 0: keys before `diagonal`, which all these queries see; stage 1: the rest, with a mask,
    # as in attn_fwd_kernel
    diagonal = (start_m + past + 1) // BLOCK_N * BLOCK_N  # start of the first block to mask
    end = tl.minimum(start_m + BLOCK_M + past, Tk)  # the last of these queries sees end - 1
    for stage in tl.static_range(2):
        lo = diagonal if stage == 1 else 0
        hi = end if stage == 1 else diagonal
        for start_n in range(lo, hi, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, b, hkv, offs_n, Tk, HKV, D)  # [BLOCK_N, D]
            exp_v = load_tile(exp_v_ptr, b, hkv, offs_n, Tk, HKV, D)
            # -- recompute p = softmax(q k^T scale) = exp2(qk - lse) --
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale  # [BLOCK_M, BLOCK_N]
            p = tl.exp2(qk - lse[:, None])
            if stage == 1:
                p = tl.where(offs_n[None, :] <= (offs_m + past)[:, None], p, 0.0)
            # -- ds = p * (dp - delta) with dp = grad_x exp_v^T, dq += ds k --
            dp = tl.dot(grad_x, tl.trans(exp_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            ds = p * (dp - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)

    store_tile(dq_ptr, dq * scale, b, h, offs_m, Tq, H, D)


@triton.jit
def attn_bwd_dkdv_kernel(
    q_ptr, k_ptr, exp_v_ptr, grad_x_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    H, GROUP, Tq, Tk, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dk = scale * ds^T @ q and dv = p^T @ grad_x, [BLOCK_N, D], for BLOCK_N keys.

    Both are sums over the GROUP query heads that share the key/value head. dv is grad_exp_v, the
    gradient with respect to exp_v; ds is that with respect to the scores, as in attn_bwd_dq_kernel.
    """
    HKV = H // GROUP
    b, hkv = batch_and_head(HKV)
    past = Tk - Tq  # positions before the first query
    start_n = tl.program_id(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, b, hkv, offs_n, Tk, HKV, D)  # [BLOCK_N, D]
    exp_v = load_tile(exp_v_ptr, b, hkv, offs_n, Tk, HKV, D)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E  # exp(scale * s) = exp2(qk_scale * s)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)

    # Query m sees the keys 0 ... m + past, so the first query that sees start_n is start_n - past.
    # Start with its block of BLOCK_M queries.
    first_m = tl.maximum(start_n - past, 0) // BLOCK_M * BLOCK_M
    for member in range(GROUP):
        h = hkv * GROUP + member  # a query head that uses this key/value head
        first = (b * H + h) * Tq  # of this head in lse and delta, (B * H, Tq)
        for start_m in range(first_m, Tq, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = load_tile(q_ptr, b, h, offs_m, Tq, H, D)  # [BLOCK_M, D]
            grad_x = load_tile(grad_x_ptr, b, h, offs_m, Tq, H, D)
            lse = tl.load(lse_ptr + first + offs_m, mask=offs_m < Tq, other=float("inf")) * LOG2E
            delta = tl.load(delta_ptr + first + offs_m, mask=offs_m < Tq, other=0.0)
            # -- recompute p = exp2(qk - lse), transposed; 0 where key n > m + past --
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale  # [BLOCK_N, BLOCK_M]
            p = tl.exp2(qk - lse[None, :])
            p = tl.where(offs_n[:, None] - past <= offs_m[None, :], p, 0.0)
            # -- dv += p grad_x, ds = p * (dp - delta) with dp = exp_v grad_x^T, dk += ds q --
            dv += tl.dot(p.to(grad_x.dtype), grad_x, input_precision=PRECISION)
            dp = tl.dot(exp_v, tl.trans(grad_x), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)

    store_tile(dk_ptr, dk * scale, b, hkv, offs_n, Tk, HKV, D)
    store_tile(dv_ptr, dv, b, hkv, offs_n, Tk, HKV, D)


# --------------------------------------------------------------------------------------------------
# Fallback: compute heads with a wide channel again, in float32, and overwrite the results. It needs
# no center: out_id = log sum_j exp(qk_ij + v_jd) - log sum_j exp(qk_ij), for query i, key j and
# channel d. The weight of key j differs by channel, so this is no matrix product: a program takes
# BLOCK_T queries and one key at a time. The grid is small, because few heads need this. So each
# program loops over several blocks of BLOCK_T: with 4 programs, program 1 has blocks 1, 5, 9, ...


@triton.jit
def fallback_fwd_kernel(
    q_ptr, k_ptr, v_ptr, is_wide_ptr, lse_ptr, out_ptr, x_ptr, exp_v_ptr,
    H, GROUP, Tq, Tk, scale,
    D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute out = logsumexp_j(qk + v) - logsumexp_j(qk), for heads with a wide channel only.

    Wide: with values more than MAX_RANGE apart, inf or NaN. The backward pass needs v, and out with
    more digits than it is stored with, so this also stores v in exp_v, and the rounding error of
    out in x.
    """
    b, h = batch_and_head(H)
    hkv = h // GROUP  # the key/value head that query head h uses
    HKV = H // GROUP
    if tl.max(load_channels(is_wide_ptr, b, hkv, HKV, D), 0) == 0:
        return  # no channel of this head is wide
    first_block = tl.program_id(0) * BLOCK_T  # the first position of this program's first block
    step = tl.num_programs(0) * BLOCK_T  # from one of its blocks to the next
    past = Tk - Tq  # positions before the first query

    # -- out, for blocks of queries --
    for start_m in range(first_block, Tq, step):
        offs_m = start_m + tl.arange(0, BLOCK_T)
        q = load_tile(q_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)  # [BLOCK_T, D]
        lse = tl.load(lse_ptr + (b * H + h) * Tq + offs_m, mask=offs_m < Tq, other=0.0)
        m_i = tl.full((BLOCK_T, D), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN
        l_i = tl.zeros((BLOCK_T, D), tl.float32)  # running sum of exp(qk + v - m_i)
        for j in range(tl.minimum(start_m + BLOCK_T + past, Tk)):
            k = load_row(k_ptr, b, hkv, j, Tk, HKV, D)  # [D]
            v = load_row(v_ptr, b, hkv, j, Tk, HKV, D)
            # -- compute qk + v --
            qk = tl.sum(q * k[None, :], 1) * scale  # [BLOCK_T]
            logits = qk[:, None] + v[None, :]  # [BLOCK_T, D]
            logits = tl.where((j <= offs_m + past)[:, None], logits, -float("inf"))
            # -- online log-sum-exp, per query and channel --
            m_new = tl.maximum(m_i, logits)
            l_i = l_i * tl.exp(m_i - m_new) + tl.exp(logits - m_new)
            m_i = m_new
        out = m_i + tl.log(l_i) - lse[:, None]
        rounded = out.to(out_ptr.dtype.element_ty)
        store_tile(out_ptr, rounded, b, h, offs_m, Tq, H, D)
        store_tile(x_ptr, out - rounded.to(tl.float32), b, h, offs_m, Tq, H, D)  # rounding error

    # -- copy v to exp_v, for blocks of keys --
    for start_n in range(first_block, Tk, step):
        offs_n = start_n + tl.arange(0, BLOCK_T)
        v = load_tile(v_ptr, b, hkv, offs_n, Tk, HKV, D)
        store_tile(exp_v_ptr, v, b, hkv, offs_n, Tk, HKV, D)


@triton.jit
def fallback_bwd_kernel(
    q_ptr, k_ptr, v_ptr, is_wide_ptr, lse_ptr, out_ptr, x_ptr, grad_out_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    H, GROUP, Tq, Tk, scale,
    D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dv of a key/value head with a wide channel, and of its GROUP query heads.

    The posterior of key j, exp(qk + v - lse - out) = p_ij exp(v_jd - out_id), is the derivative of
    out_id with respect to v_jd (query i, key j, channel d). It sums to 1 over the keys j. With it
        dv_jd = sum_i grad_out_id * posterior_ijd
        ds_ij = sum_d grad_out_id * (posterior_ijd - p_ij), from which dq and dk follow as usual
    """
    HKV = H // GROUP
    b, hkv = batch_and_head(HKV)
    if tl.max(load_channels(is_wide_ptr, b, hkv, HKV, D), 0) == 0:
        return  # no channel of this head is wide
    first_block = tl.program_id(0) * BLOCK_T  # the first position of this program's first block
    step = tl.num_programs(0) * BLOCK_T  # from one of its blocks to the next
    past = Tk - Tq  # positions before the first query

    # -- dq: a block of queries, one key at a time --
    for member in range(GROUP):
        h = hkv * GROUP + member  # a query head that uses this key/value head
        for start_m in range(first_block, Tq, step):
            offs_m = start_m + tl.arange(0, BLOCK_T)
            q = load_tile(q_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)  # [BLOCK_T, D]
            grad_out = load_tile(grad_out_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)
            out = load_tile(out_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)
            out += load_tile(x_ptr, b, h, offs_m, Tq, H, D).to(tl.float32)  # its rounding error
            lse = tl.load(lse_ptr + (b * H + h) * Tq + offs_m, mask=offs_m < Tq, other=0.0)
            dq = tl.zeros((BLOCK_T, D), tl.float32)
            for j in range(tl.minimum(start_m + BLOCK_T + past, Tk)):
                k = load_row(k_ptr, b, hkv, j, Tk, HKV, D)  # [D]
                v = load_row(v_ptr, b, hkv, j, Tk, HKV, D)
                # -- recompute p and the posterior --
                log_p = tl.sum(q * k[None, :], 1) * scale - lse  # [BLOCK_T]
                is_seen = j <= offs_m + past  # causal mask, [BLOCK_T]
                p = tl.where(is_seen, tl.exp(log_p), 0.0)
                posterior = tl.exp(log_p[:, None] + v[None, :] - out)  # [BLOCK_T, D]
                posterior = tl.where(is_seen[:, None], posterior, 0.0)
                # -- ds = sum over channels of grad_out * (posterior - p), dq += ds k --
                ds = tl.sum(grad_out * (posterior - p[:, None]), 1)
                dq += ds[:, None] * k[None, :]
            store_tile(dq_ptr, dq * scale, b, h, offs_m, Tq, H, D)

    # -- dk and dv: a block of keys, one query at a time --
    for start_n in range(first_block, Tk, step):
        offs_n = start_n + tl.arange(0, BLOCK_T)
        k = load_tile(k_ptr, b, hkv, offs_n, Tk, HKV, D).to(tl.float32)  # [BLOCK_T, D]
        v = load_tile(v_ptr, b, hkv, offs_n, Tk, HKV, D).to(tl.float32)
        dk = tl.zeros((BLOCK_T, D), tl.float32)
        dv = tl.zeros((BLOCK_T, D), tl.float32)
        for member in range(GROUP):
            h = hkv * GROUP + member
            for i in range(tl.maximum(start_n - past, 0), Tq):  # queries that see key start_n
                q = load_row(q_ptr, b, h, i, Tq, H, D)  # [D]
                grad_out = load_row(grad_out_ptr, b, h, i, Tq, H, D)
                out = load_row(out_ptr, b, h, i, Tq, H, D)
                out += load_row(x_ptr, b, h, i, Tq, H, D)  # its rounding error
                # -- recompute p and the posterior --
                log_p = tl.sum(k * q[None, :], 1) * scale  # [BLOCK_T]
                log_p -= tl.load(lse_ptr + (b * H + h) * Tq + i)
                is_seen = offs_n <= i + past  # causal mask, [BLOCK_T]
                p = tl.where(is_seen, tl.exp(log_p), 0.0)
                posterior = tl.exp(log_p[:, None] + v - out[None, :])  # [BLOCK_T, D]
                posterior = tl.where(is_seen[:, None], posterior, 0.0)
                # -- dv += grad_out * posterior, ds = sum grad_out * (posterior - p), dk += ds q --
                dv += grad_out[None, :] * posterior
                ds = tl.sum(grad_out[None, :] * (posterior - p[:, None]), 1)
                dk += ds[:, None] * q[None, :]
        store_tile(dk_ptr, dk * scale, b, hkv, offs_n, Tk, HKV, D)
        store_tile(dv_ptr, dv, b, hkv, offs_n, Tk, HKV, D)


# --------------------------------------------------------------------------------------------------
# Launches. Attention over exp_v runs in cuDNN or in our kernels.

compiled_kernels = {}


def launch(kernel, grid, tensors, numbers, num_warps=4, num_stages=3, **constants):
    """Launch kernel[grid](*tensors, *numbers, *constants) in a third of Triton's host time.

    To find the right compiled kernel, Triton examines all arguments, which takes 10 to 30 us. We
    look it up by all that Triton specializes for: device, numbers, options, dtypes and alignment.
    numbers: sizes and scale. constants: in the order of the kernel's constexpr arguments.
    """
    numbers += tuple(constants.values())
    key = (kernel, tensors[0].device, numbers, num_warps, num_stages)
    key += tuple([(t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
    compiled = compiled_kernels.get(key)
    if compiled is not None:
        compiled[*grid, 1](*tensors, *numbers)  # a compiled kernel takes a grid of three numbers
        return

    if len(compiled_kernels) > 10_000:  # numbers include the lengths, which may be many
        compiled_kernels.clear()
    # compile and launch in Triton's own way; the interpreter returns None
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled_kernels[key] = kernel[grid](*tensors, *numbers, **options)


@functools.cache
def get_configs(dtype, D, is_hopper):
    """Return the launch options of attn_fwd_kernel, attn_bwd_dq_kernel and attn_bwd_dkdv_kernel."""
    # (BLOCK_M, BLOCK_N, num_warps, num_stages) of the three kernels, in this order
    # the fastest ones measured that spill no registers; see NOTES.md
    if dtype == torch.float32:
        configs = (32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)
    elif dtype == torch.float16:
        configs = (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2)
    elif is_hopper and D == 128:
        configs = (64, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2)
    elif is_hopper:
        configs = (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2)
    elif D == 128:
        configs = (64, 32, 4, 3), (64, 32, 4, 2), (32, 64, 8, 2)
    else:
        configs = (64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 2)
    names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    precision = "ieee" if dtype == torch.float32 else "tf32"  # float16 inputs have a float32 exp_v
    return [dict(zip(names, config), PRECISION=precision) for config in configs]


@functools.cache
def is_hopper(device):
    """Return whether a device is an H100, H200 or the like (compute capability 9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def to_bthd(t):
    """Return t (B, H, T, D) with memory in the order (B, T, H, D), copied only if necessary."""
    if t.transpose(1, 2).is_contiguous():
        return t
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def can_use_cudnn(q, k, exp_v):
    """Return whether cuDNN may compute this attention. Its backward pass is not deterministic."""
    if not q.is_cuda or q.dtype != torch.bfloat16 or q.shape[2] != k.shape[2]:
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    is_gqa = q.shape[1] != k.shape[1]  # grouped-query attention
    # the arguments after q, k and exp_v: no mask, no dropout, causal
    params = torch.backends.cuda.SDPAParams(q, k, exp_v, None, 0.0, True, is_gqa)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def attention_forward(q, k, exp_v, scale):
    """Return x = softmax(q k^T scale) @ exp_v, (B, H, Tq, D), and the log-sum-exp, (B, H, Tq)."""
    B, H, Tq, D = q.shape
    _, HKV, Tk, _ = k.shape
    if can_use_cudnn(q, k, exp_v):
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        # None: no bias. True: also return lse
        x, lse, *_ = cudnn(q, k, exp_v, None, True, is_causal=True, scale=scale)
        return to_bthd(x), lse.view(B, H, Tq)

    # by our kernel: one program per block of queries and head; two configs are for backward only
    x = torch.empty_like(q, dtype=exp_v.dtype)
    lse = q.new_empty(B, H, Tq, dtype=torch.float32)
    config, _, _ = get_configs(q.dtype, D, is_hopper(q.device))
    grid = (ceil(Tq / config["BLOCK_M"]), B * H)
    tensors = q, k, exp_v, x, lse
    launch(attn_fwd_kernel, grid, tensors, (H, H // HKV, Tq, Tk, scale), D=D, **config)
    return x, lse


def attention_backward(grad_x, q, k, exp_v, x, lse, delta, scale):
    """Return dq, dk and grad_exp_v, for x = softmax(q k^T scale) @ exp_v.

    grad_x (B, H, Tq, D). delta (B, H, Tq): the sum of grad_x * x over D.
    """
    B, H, Tq, D = q.shape
    _, HKV, Tk, _ = k.shape
    if can_use_cudnn(q, k, exp_v):
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        inputs = grad_x, q, k, exp_v, x, lse.unsqueeze(-1)
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # unused: there is no dropout
        dropout = {"philox_seed": seed, "philox_offset": seed, "dropout_p": 0.0}
        varlen = {"cum_seq_q": None, "cum_seq_k": None, "max_q": Tq, "max_k": Tk}
        grads = cudnn(*inputs, attn_bias=None, **dropout, **varlen, is_causal=True, scale=scale)
        return [to_bthd(grad) for grad in grads]

    # by our kernels: one program per block of queries and head, then one per block of keys and head
    dq = torch.empty_like(q)
    dk = torch.empty_like(k)
    dv = torch.empty_like(exp_v)  # grad_exp_v
    inputs = q, k, exp_v, grad_x, lse, delta
    sizes = H, H // HKV, Tq, Tk, scale  # H // HKV is GROUP: query heads per key/value head
    _, q_config, kv_config = get_configs(q.dtype, D, is_hopper(q.device))
    q_grid = (ceil(Tq / q_config["BLOCK_M"]), B * H)
    kv_grid = (ceil(Tk / kv_config["BLOCK_N"]), B * HKV)
    launch(attn_bwd_dq_kernel, q_grid, (*inputs, dq), sizes, D=D, **q_config)
    launch(attn_bwd_dkdv_kernel, kv_grid, (*inputs, dk, dv), sizes, D=D, **kv_config)
    return dq, dk, dv


# --------------------------------------------------------------------------------------------------
# LASER: the kernels in order, forward and backward, and as a PyTorch operator


def new_buffers(q, k, v):
    """Allocate out, exp_v = exp(v - center) - shift, and center, shift and is_wide, (B * HKV, D).

    out is like q, exp_v like v. is_wide: whether the values of a channel would overflow exp.
    """
    B, HKV, _, D = k.shape
    # float16 would overflow: exp(12) is more than its largest number
    exp_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    out = torch.empty_like(q)
    exp_v = torch.empty_like(v, dtype=exp_dtype)
    center, shift = q.new_empty(2, B * HKV, D, dtype=torch.float32)
    is_wide = q.new_empty(B * HKV, D, dtype=torch.int32)
    return out, exp_v, center, shift, is_wide


def fallback_grid(T, heads):
    """Return the grid of a fallback kernel, which recomputes heads whose values overflow exp.

    Few heads need it, but all programs have to look, so the heads share FALLBACK_PROGRAMS. With 64
    heads and T = 4096, each head has 128 blocks of positions, and 1024 // 64 = 16 programs.
    """
    blocks = min(ceil(T / BLOCK_T), FALLBACK_PROGRAMS // heads)
    return max(blocks, 1), heads


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, and what the backward pass needs: exp_v, shift, is_wide, x and lse."""
    B, H, Tq, D = q.shape
    _, HKV, Tk, _ = k.shape
    out, exp_v, center, shift, is_wide = new_buffers(q, k, v)

    # exp_v (B, HKV, Tk, D), x = p @ exp_v (B, H, Tq, D), out = log(x + shift) + center; H // HKV is
    # GROUP in the kernels, query heads per key/value head
    exp_tensors = v, exp_v, center, shift, is_wide
    exp_constants = {"D": D, "SLICE": SLICE, "BLOCK_T": 4 * BLOCK_T}
    launch(exp_kernel, (D // SLICE, B * HKV), exp_tensors, (HKV, Tk), num_warps=8, **exp_constants)
    x, lse = attention_forward(q, k, exp_v, scale)
    constants = {"D": D, "BLOCK_T": BLOCK_T}
    grid = (ceil(Tq / BLOCK_T), B * H)
    launch(log_kernel, grid, (x, out, center, shift), (H, H // HKV, Tq), **constants)

    # fallback: overwrites out, x and exp_v of heads with a wide channel
    grid = fallback_grid(Tq, B * H)
    tensors = q, k, v, is_wide, lse, out, x, exp_v
    sizes = H, H // HKV, Tq, Tk, scale
    launch(fallback_fwd_kernel, grid, tensors, sizes, num_warps=8, **constants)
    return out, exp_v, shift, is_wide, x, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, out: Tensor, exp_v: Tensor, shift: Tensor,
    is_wide: Tensor, x: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dq, dk and dv."""
    B, H, Tq, D = q.shape
    _, HKV, Tk, _ = k.shape
    grad_out = to_bthd(grad_out)
    grad_x = torch.empty_like(x)
    delta = torch.empty_like(lse)

    # gradients of the logarithm, of attention, and of the exponential
    constants = {"D": D, "BLOCK_T": BLOCK_T}
    grid = (ceil(Tq / BLOCK_T), B * H)
    tensors = grad_out, x, shift, grad_x, delta
    launch(grad_x_kernel, grid, tensors, (H, H // HKV, Tq), **constants)
    dq, dk, dv = attention_backward(grad_x, q, k, exp_v, x, lse, delta, scale)
    grid = (ceil(Tk / BLOCK_T), B * HKV)
    launch(grad_v_kernel, grid, (dv, exp_v, shift), (HKV, Tk), **constants)

    # fallback: overwrites dq, dk and dv of heads with a wide channel, where exp_v holds v
    grid = fallback_grid(Tk, B * HKV)
    tensors = q, k, exp_v, is_wide, lse, out, x, grad_out, dq, dk, dv
    sizes = H, H // HKV, Tq, Tk, scale
    launch(fallback_bwd_kernel, grid, tensors, sizes, num_warps=8, **constants)
    return dq, dk, dv.to(q.dtype)


def setup_context(ctx, inputs, output):
    """Save for the backward pass: q, k, scale, and all outputs of forward."""
    q, k, _, scale = inputs
    ctx.save_for_backward(q, k, *output)
    ctx.set_materialize_grads(False)  # no zeros for the outputs that only the backward pass uses
    ctx.scale = scale


class Laser(torch.autograd.Function):
    """LASER attention in eager mode, where this costs less host time per call than a custom op."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():  # create_graph=True, which needs the gradient of backward()
            raise RuntimeError("the LASER kernel has no second derivatives")
        return *backward(grad_out, *ctx.saved_tensors, ctx.scale), None


# For torch.compile, which does not look inside a custom op
laser = torch.library.custom_op("fivefold::laser", forward, mutates_args=())
laser_backward = torch.library.custom_op("fivefold::laser_backward", backward, mutates_args=())


# the outputs' shapes and dtypes, for torch.compile
@laser.register_fake
def _(q, k, v, scale):
    out, exp_v, _, shift, is_wide = new_buffers(q, k, v)
    x = torch.empty_like(q, dtype=exp_v.dtype)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return out, exp_v, shift, is_wide, x, lse


@laser_backward.register_fake
def _(grad_out, q, k, out, exp_v, *saved):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(exp_v, dtype=q.dtype)


def laser_autograd(ctx, grad_out, *unused):
    """Return the gradients of q, k and v, and None for scale. unused: those of the other outputs"""
    return *laser_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


laser.register_autograd(laser_autograd, setup_context=setup_context)


def attention(q, k, v):
    """Compute causal LASER attention; the queries are the last Tq of the Tk positions.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -> (B, H, Tq, D), in float32, float16 or bfloat16, with
    D <= 128. Raises ValueError if the shapes do not fit each other or are too large.
    """
    B, H, Tq, D = q.shape
    _, HKV, Tk, _ = k.shape
    padded_D = max(16, triton.next_power_of_2(D))
    shapes_fit = k.shape == v.shape and HKV > 0 and H % HKV == 0 and Tq <= Tk and 1 <= D <= 128
    if not shapes_fit or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit: "
            f"need one dtype, D from 1 to 128, H a multiple of Hkv, Tq <= Tk"
        )
    if B * H >= 2**16 or Tk * H * padded_D >= 2**31:
        raise ValueError("split the batch or the text: B * H fits 16 bits, Tk * H * D 31 bits")
    if q.numel() == 0:
        return 0.0 * q  # nothing to attend from; keeps the gradient

    if padded_D > D:  # to a power of two; channels of zeros change no score
        q, k, v = (F.pad(t, (0, padded_D - D)) for t in (q, k, v))
    q, k, v = (to_bthd(t) for t in (q, k, v))
    if torch.compiler.is_compiling():
        out = laser(q, k, v, D**-0.5)[0]
    else:
        out = Laser.apply(q, k, v, D**-0.5)
    return out if padded_D == D else out[..., :D]
