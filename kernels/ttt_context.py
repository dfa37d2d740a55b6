"""Attention of short spans of queries to one frozen KV cache: forward, and backward in q alone.

Query i of span s is at position starts[s] + i and sees the keys up to that position.

    span_forward_kernel     online softmax over split j of the keys -> o_j and log-sum-exp lse_j
    merge_kernel            lse = log sum_j exp(lse_j),  o = sum_j exp(lse_j - lse) o_j  over splits
    span_backward_kernel    p = exp(qk - lse),  ds = p * (do v^T - do . o),  dq = ds k / sqrt(D)
                            over one split; PyTorch sums the dq of the splits

A span has too few queries to fill a GPU. So the keys are split too (split-K), into as many splits
as keep all programs busy at the same time. A row is one query of one head. The rows of all query
heads that share a KV head are stacked, and their tiles are computed at the same time: k and v come
from memory about once, then from the L2 cache. There are no atomics, so two runs give the same
bits. k and v get no gradients.

FLOPs: 4 * rows * keys * D forward, 6 backward; a stock backward takes 10, as it has dk and dv too.
Traffic: k and v about once per KV head and span, and D float32 numbers per row and split.
One layer of Qwen3-4B with 128 queries and 131,072 keys, forward + backward on one H200: ours takes
0.56 + 0.66 ms, stock attention 0.85 (flash) + 2.47 (cuDNN). Floor: 0.35 + 0.52 (790 TFLOP/s).
Limits: D in WIDTHS; float32, float16 or bfloat16, summed in float32; a head has < 2^31 numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(x) = log2(x) * LN2
WIDTHS = (16, 32, 64, 128)

# BLOCK_M: rows of a tile, BLOCK_N: keys per iteration.
# The fastest of 9 configurations forward and 11 backward on an H200, without register spills:
HOPPER = {
    "forward": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    "backward": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
}
# For other GPUs; not timed, but they fit the 99 KB of shared memory of consumer GPUs:
OTHERS = {
    "forward": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    "backward": {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
}
# float32 products use no tensor cores, so larger tiles would spill registers:
FLOAT32 = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
INTERPRETER_SMS = 4  # in Triton's interpreter; enough to get several splits
# Arguments that change from prompt to prompt: the kernels are not compiled again for new values
SIZES = ["n", "HKV", "S", "split_size", "stride_k", "stride_v"]

# --------------------------------------------------------------------------------------------------
# Which rows and keys a program takes. The queries of the GROUP heads that share a KV head are
# stacked as rows, as they are in the memory of q (S, H, n, D) with H = HKV * GROUP:
#
#     row              0 ... n-1    n ... 2n-1    2n ... 3n-1
#     query head           0            1             2           (row // n)
#     query in span    0 ... n-1    0 ... n-1     0 ... n-1       (row % n)


@triton.jit
def program_coordinates(n, HKV, S, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return which tile of rows, KV head, span and split of the keys this program computes.

    n: queries in a span. S: spans. HKV: KV heads. With 2 tiles, HKV = 2 and S = 1:

        program_id   0 1 2 3 4 5 6 7
        tile         0 1 0 1 0 1 0 1
        head         0 0 1 1 0 0 1 1
        split        0 0 0 0 1 1 1 1

    Programs that run at the same time are mostly tiles of the same keys, so these come from L2.
    """
    num_tiles = tl.cdiv(n * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % num_tiles
    head = pid // num_tiles % HKV
    span = pid // (num_tiles * HKV) % S
    split = pid // (num_tiles * HKV * S)
    return tile, head, span, split


@triton.jit
def key_range(start, n, split, split_size, BLOCK_N: tl.constexpr):
    """Return the keys of a split in two parts, as three positions.

    start: position of the first query of the span. It sees start + 1 keys, the last sees start + n.

        first_key ................... masked_key ................... end_key
          whole blocks that all rows see         keys that need a mask

    start = 100, n = 8, split_size = 64, BLOCK_N = 16: split 1 begins at first_key = 64, its queries
    see up to 101 ... 108 keys, so end_key = 108 and masked_key = 96.
    """
    first_key = split * split_size
    end_key = tl.minimum(start + n, first_key + split_size)
    end_of_all = tl.minimum(start + 1, first_key + split_size)  # end of the keys that all rows see
    masked_key = first_key + tl.maximum(end_of_all - first_key, 0) // BLOCK_N * BLOCK_N
    return first_key, masked_key, end_key


@triton.jit
def load_rows(ptr, rows, mask, D: tl.constexpr, IS_MASKED: tl.constexpr):
    """Load rows of D numbers each, [rows, D]; with IS_MASKED, 0 for rows whose mask is False."""
    offs = rows[:, None] * D + tl.arange(0, D)[None, :]
    if IS_MASKED:
        x = tl.load(ptr + offs, mask=mask[:, None], other=0.0)
    else:
        x = tl.load(ptr + offs)
    return x


# --------------------------------------------------------------------------------------------------
# Forward


@triton.jit(do_not_specialize=SIZES)
def span_forward_kernel(
    q_ptr,  # (S, H, n, D)
    k_ptr, v_ptr,  # (HKV, T, D)
    starts_ptr,  # (S,)
    o_ptr, lse_ptr,  # (splits, S, H, n, D) and (splits, S, H, n), float32
    n, HKV, S,  # queries per span, KV heads, spans
    split_size, stride_k, stride_v,  # keys per split, rows from one head of k or v to the next
    scale,  # 1 / sqrt(D)
    GROUP: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute o = softmax(q k^T / sqrt(D)) v and the log-sum-exp, over the keys of one split."""
    # the rows of this program, and their positions in the prompt
    tile, head, span, split = program_coordinates(n, HKV, S, GROUP, BLOCK_M)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < n * GROUP
    start = tl.load(starts_ptr + span)
    positions = start + rows % n

    # where the rows of this span and head begin in q (S, HKV, GROUP * n, D); k and v of the head
    row_start = (span * HKV + head).to(tl.int64) * n * GROUP
    k_ptr += head.to(tl.int64) * stride_k * D
    v_ptr += head.to(tl.int64) * stride_v * D

    # load q; start the running sum of p v (acc), maximum of qk (m_i) and sum of p (l_i)
    q = load_rows(q_ptr + row_start * D, rows, mask, D, True)  # [BLOCK_M, D]
    qk_scale = tl.cast(scale, tl.float32) * LOG2E
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)

    # stage 0: blocks of keys that all rows see; stage 1: the rest, which needs masks
    first_key, masked_key, end_key = key_range(start, n, split, split_size, BLOCK_N)
    for stage in tl.static_range(2):
        lo = first_key if stage == 0 else masked_key
        hi = masked_key if stage == 0 else end_key
        for start_n in range(lo, hi, BLOCK_N):
            # -- load k, v --
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, offs_n, offs_n < end_key, D, stage == 1)  # [BLOCK_N, D]
            v = load_rows(v_ptr, offs_n, offs_n < end_key, D, stage == 1)
            # -- compute qk; its scale includes log2(e), because p is computed with exp2 --
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale  # [BLOCK_M, BLOCK_N]
            if stage == 1:
                qk = tl.where(offs_n[None, :] <= positions[:, None], qk, -float("inf"))
            # -- compute p; rows that have seen no key yet have m_new = -inf, so subtract 0 there --
            m_new = tl.maximum(m_i, tl.max(qk, 1))
            m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2(qk - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            # -- update acc, l_i and m_i --
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            l_i = l_i * alpha + tl.sum(p, 1)
            m_i = m_new

    # write o and lse; a row that sees no key of this split gets lse = -inf: weight 0 in the merge
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    lse = tl.where(l_i == 0.0, -float("inf"), (m_i + tl.log2(l_safe)) * LN2)
    offs_out = (split.to(tl.int64) * S * HKV * n * GROUP + row_start) + rows
    tl.store(lse_ptr + offs_out, lse, mask=mask)
    o_offs = offs_out[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(o_ptr + o_offs, acc / l_safe[:, None], mask=mask[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge_kernel(
    split_o_ptr, split_lse_ptr,  # (splits, rows, D) and (splits, rows), float32
    o_ptr, lse_ptr,  # (rows, D) and (rows,)
    num_rows, num_splits,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge the splits j: o = sum_j exp(lse_j - lse) o_j, lse = log sum_j exp(lse_j).

    num_rows: S * H * n, the rows of all spans and heads.
    """
    # the rows of this program
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < num_rows
    offs_d = tl.arange(0, D)[None, :]
    split_stride = tl.cast(num_rows, tl.int64)  # rows from one split to the next
    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    # acc = sum_j exp(lse_j - m_i) o_j and l_i = sum_j exp(lse_j - m_i), where m_i = max_j lse_j
    for split in range(0, num_splits):
        # -- load lse and o of the split --
        offs = split * split_stride + rows
        lse = tl.load(split_lse_ptr + offs, mask=mask, other=0.0) * LOG2E
        o = tl.load(split_o_ptr + offs[:, None] * D + offs_d, mask=mask[:, None], other=0.0)
        # -- add them; m_new is finite, because every row sees a key of the first split --
        m_new = tl.maximum(m_i, lse)
        alpha = tl.exp2(m_i - m_new)
        weight = tl.exp2(lse - m_new)
        acc = acc * alpha[:, None] + weight[:, None] * o
        l_i = l_i * alpha + weight
        m_i = m_new

    # write o and lse
    o = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(lse_ptr + rows, (m_i + tl.log2(l_i)) * LN2, mask=mask)
    tl.store(o_ptr + rows[:, None] * D + offs_d, o, mask=mask[:, None])


# --------------------------------------------------------------------------------------------------
# Backward


@triton.jit(do_not_specialize=SIZES)
def span_backward_kernel(
    q_ptr,  # (S, H, n, D)
    k_ptr, v_ptr,  # (HKV, T, D)
    starts_ptr,  # (S,)
    o_ptr, do_ptr, lse_ptr,  # (S, H, n, D) twice and (S, H, n)
    dq_ptr,  # (splits, S, H, n, D), float32
    n, HKV, S,  # queries per span, KV heads, spans
    split_size, stride_k, stride_v,  # keys per split, rows from one head of k or v to the next
    scale,  # 1 / sqrt(D)
    GROUP: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute ds = p * (do v^T - delta) and dq = scale * ds k, over the keys of one split.

    delta: do . o of each row, which equals the sum of p * (do v^T) over all keys.
    """
    # the rows of this program, and their positions in the prompt
    tile, head, span, split = program_coordinates(n, HKV, S, GROUP, BLOCK_M)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < n * GROUP
    start = tl.load(starts_ptr + span)
    positions = start + rows % n

    # where the rows of this span and KV head begin in q, and its keys and values in k and v
    row_start = (span * HKV + head).to(tl.int64) * n * GROUP
    k_ptr += head.to(tl.int64) * stride_k * D
    v_ptr += head.to(tl.int64) * stride_v * D

    # load the tensors of the rows; outside the mask lse = inf, so p = 0
    do = load_rows(do_ptr + row_start * D, rows, mask, D, True)  # [BLOCK_M, D]
    o = load_rows(o_ptr + row_start * D, rows, mask, D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + row_start + rows, mask=mask, other=float("inf")) * LOG2E
    q = load_rows(q_ptr + row_start * D, rows, mask, D, True)
    scale = tl.cast(scale, tl.float32)
    dq = tl.zeros((BLOCK_M, D), tl.float32)

    # stage 0: blocks of keys that all rows see; stage 1: the rest, which needs masks
    first_key, masked_key, end_key = key_range(start, n, split, split_size, BLOCK_N)
    for stage in tl.static_range(2):
        lo = first_key if stage == 0 else masked_key
        hi = masked_key if stage == 0 else end_key
        for start_n in range(lo, hi, BLOCK_N):
            # -- load k, v --
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr, offs_n, offs_n < end_key, D, stage == 1)  # [BLOCK_N, D]
            v = load_rows(v_ptr, offs_n, offs_n < end_key, D, stage == 1)
            # -- recompute p --
            qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(qk - lse[:, None])  # [BLOCK_M, BLOCK_N]
            if stage == 1:
                p = tl.where(offs_n[None, :] <= positions[:, None], p, 0.0)
            # -- compute ds and dq --
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    # write the dq of this split
    offs_out = (split.to(tl.int64) * S * HKV * n * GROUP + row_start) + rows
    dq_offs = offs_out[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + dq_offs, dq * scale, mask=mask[:, None])


# --------------------------------------------------------------------------------------------------
# Launch


def get_config(direction, q):
    """Return the block sizes and launch options of the "forward" or "backward" kernel."""
    if q.dtype == torch.float32:
        return FLOAT32
    is_hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return HOPPER[direction] if is_hopper else OTHERS[direction]


def count_sms(q):
    """Return the number of multiprocessors of the GPU that holds q."""
    if q.is_cuda:
        return torch.cuda.get_device_properties(q.device).multi_processor_count
    return INTERPRETER_SMS


def split_keys(q, n_kv_head, starts, config, num_sms):
    """Split the keys so that all programs together fill the SMs once.

    Returns the number of keys in a split, the number of splits of the longest span, and the grid.

    Qwen3-4B with one span of n = 128 on 132 SMs: 8 KV heads with 4 tiles each make 32 tiles. So 128
    programs run, and each tile gets 4 of them: a split is a quarter of the keys.
    """
    S, H, n, _ = q.shape
    rows = H // n_kv_head * n  # per span and KV head
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * n_kv_head  # per span

    # as many programs as SMs, rounded down to a multiple of the tiles of all spans
    num_programs = max(num_sms // (tiles * S), 1) * tiles * S
    total_keys = int(starts.sum()) + S * n  # summed over the spans
    keys_per_program = triton.cdiv(tiles * total_keys, num_programs)
    split_size = triton.cdiv(keys_per_program, config["BLOCK_N"]) * config["BLOCK_N"]

    num_splits = triton.cdiv(int(starts.max()) + n, split_size)
    grid = (tiles * S * num_splits,)
    return split_size, num_splits, grid


def copy_to_device(starts, q):
    """Return starts as int32 on the device of q, copied without making the host wait."""
    starts = starts.to(torch.int32)
    if q.is_cuda:
        starts = starts.pin_memory().to(q.device, non_blocking=True)
    return starts


def get_sizes(q, k, v, split_size):
    """Return the arguments that both span kernels take between their tensors and block sizes."""
    S, H, n, D = q.shape
    HKV = k.shape[0]
    return {
        "n": n,
        "HKV": HKV,
        "S": S,
        "split_size": split_size,
        "stride_k": k.stride(0) // D,  # rows from one head to the next
        "stride_v": v.stride(0) // D,
        "scale": D**-0.5,
        "GROUP": H // HKV,
        "D": D,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def forward(q, k, v, starts, config=None, num_sms=None):
    """Return o, of the shape and dtype of q, and its log-sum-exp, (S, H, n) float32.

    q must be contiguous, and k and v must be as `contiguous_rows` returns them.
    num_sms: how many programs run at once; by default one per multiprocessor of the GPU.
    """
    config = config or get_config("forward", q)
    num_sms = num_sms or count_sms(q)
    split_size, num_splits, grid = split_keys(q, k.shape[0], starts, config, num_sms)
    starts = copy_to_device(starts, q)
    sizes = get_sizes(q, k, v, split_size)

    # attention over each split of the keys
    split_o = q.new_empty(num_splits, *q.shape, dtype=torch.float32)
    split_lse = q.new_empty(num_splits, *q.shape[:3], dtype=torch.float32)
    span_forward_kernel[grid](q, k, v, starts, split_o, split_lse, **sizes, **config)

    # merge the splits; a program takes BLOCK_M = 16 rows of D numbers
    o = torch.empty_like(q)
    lse = torch.empty_like(split_lse[0])
    rows = lse.numel()
    grid = (triton.cdiv(rows, 16),)
    merge_kernel[grid](split_o, split_lse, o, lse, rows, num_splits, q.shape[3], 16, num_warps=4)
    return o, lse


def backward(do, q, k, v, starts, o, lse, config=None, num_sms=None):
    """Return dq, of the shape and dtype of q; o and lse are the results of `forward`."""
    config = config or get_config("backward", q)
    num_sms = num_sms or count_sms(q)
    split_size, num_splits, grid = split_keys(q, k.shape[0], starts, config, num_sms)
    starts = copy_to_device(starts, q)
    sizes = get_sizes(q, k, v, split_size)
    split_dq = q.new_empty(num_splits, *q.shape, dtype=torch.float32)
    span_backward_kernel[grid](q, k, v, starts, o, do, lse, split_dq, **sizes, **config)
    return split_dq.sum(0).to(q.dtype)


# --------------------------------------------------------------------------------------------------
# Operators. The backward operator has no derivative: a second derivative raises an error.


@custom_op("fivefold::span_attention", mutates_args=())
def span_attention_op(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, starts)


@span_attention_op.register_fake
def _(q, k, v, starts):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("fivefold::span_attention_backward", mutates_args=())
def span_attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, o: Tensor, lse: Tensor
) -> Tensor:
    return backward(do, q, k, v, starts, o, lse)


@span_attention_backward_op.register_fake
def _(do, q, k, v, starts, o, lse):
    return torch.empty_like(q)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def span_attention_autograd(ctx, do, unused_dlse):
    dq = span_attention_backward_op(do.contiguous(), *ctx.saved_tensors)
    return dq, None, None, None


span_attention_op.register_autograd(span_attention_autograd, setup_context=setup_context)


# --------------------------------------------------------------------------------------------------
# Public function


def check_inputs(q, k, v, starts):
    """Raise ValueError if the kernels cannot compute the attention of these tensors."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"{shapes}: needed are (S, H, n, D) and twice (Hkv, T, D)")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: needed is one dtype, one device"
        )
    S, H, n, D = q.shape
    HKV, T, _ = k.shape
    if HKV == 0 or H % HKV or k.shape[2] != D:
        raise ValueError(f"{shapes}: heads or widths do not fit together")
    if D not in WIDTHS or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{q.dtype}, D = {D}: needed are float32, float16, bfloat16, D in {WIDTHS}"
        )
    is_index = starts.dtype in (torch.int64, torch.int32)
    if starts.shape != (S,) or starts.device.type != "cpu" or not is_index:
        raise ValueError(f"starts has to be {S} integers on the CPU, one for each span")
    if S and (int(starts.min()) < 0 or int(starts.max()) + n > T):
        raise ValueError(f"{S} spans of {n} begin at {starts.tolist()}, not all within {T} keys")
    if T * D >= 2**31 or H // HKV * n * D >= 2**31:
        raise ValueError(f"{T} keys or {n} queries are too many for one call")


def contiguous_rows(t):
    """Return t (Hkv, T, D), or a copy if the kernels cannot address its rows.

    They need row r of head h at offset (h * stride + r) * D, where the stride is a number of rows.
    """
    D = t.shape[2]
    if t.stride()[1:] == (D, 1) and t.stride(0) % D == 0:
        return t
    return t.contiguous()


def span_attention(q, k, v, starts):
    """Compute the attention of S spans of n queries to T shared keys, (S, H, n, D).

    q (S, H, n, D): query i of span s sees the keys 0 ... starts[s] + i. D is in WIDTHS.
    k and v (Hkv, T, D): of the same dtype; they may be slices of a longer cache.
    starts (S): integers on the CPU, with starts + n <= T.
    Only q gets a gradient, and only a first derivative: k and v are constants.
    """
    check_inputs(q, k, v, starts)
    if q.numel() == 0:
        return q.clone()
    k = contiguous_rows(k.detach())
    v = contiguous_rows(v.detach())
    return span_attention_op(q.contiguous(), k, v, starts)[0]
