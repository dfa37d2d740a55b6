"""Attention of many short query spans over one frozen cache of keys and values: forward, and backward for the queries alone.

Row (s, h, r), query r of span s in head h, stands at start[s] + r and sees the keys up to there. The g heads of a KV head and the n
queries of a span lie one after another in memory and are the rows of its tiles, so K and V are fetched once for the group.

    span_forward_kernel    online softmax of a tile of rows over one piece of the keys -> o of that piece, log-sum-exp
    join_kernel            o = sum_p exp(lse_p - lse) o_p,  lse = log sum_p exp(lse_p)
    span_backward_kernel   P = exp(S - lse)   dS = P (dO V^T - delta)   dQ_p = dS K / sqrt(D), of one piece;  delta = dO . O
                           dQ is the sum over pieces, in order

Nothing of the length of the cache is written: no dK, no dV. No atomics: two runs give the same bits. Keys behind the last query of a
span are never read; those before its first query are read without a mask.

Grid: (tile of rows fastest, KV head, span, piece), one axis: the tiles of a KV head read the same piece at about the same time, so
the L2 serves all but the first. Pieces are as many as fill the multiprocessors once, which leaves 128 programs on 132 for one span of
128 queries, 32 heads on 8. Partial results take pieces * rows * D float32.

FLOPs 4 forward and 6 backward times rows * keys * D, where a stock backward takes 10. One layer of Qwen3-4B at 131,072 keys:
275 + 412 GFLOP; at the 790 TFLOP/s of a large product 0.35 + 0.52 ms. On one H200 (torch 2.11, triton 3.6), kernels/bench.py:
1. As described: 0.628 + 1.007 ms, beside 0.850 forward (flash) and 2.468 backward (cuDNN) of stock attention. At 32,768 keys
   0.307 + 0.313: of the former half is not arithmetic. `start` was copied from memory that is not pinned, so the host waited.
2. `start` pinned: 0.571 + 0.961, and 0.160 + 0.265 at 32,768.
3. Nine tiles forward and eleven backward side by side, as bench.py times them: 128 keys a block forward 0.556 for 0.572, a third stage
   backward 0.656 for 0.949, for with two a product waits for its keys. Kept; results/kernels.json is from before.
Limits: D in WIDTHS; a head of K has fewer than 2**31 numbers; float32, float16 and bfloat16, sums in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
WIDTHS = (16, 32, 64, 128)
# Rows of a tile, keys of a block, warps, stages. HOPPER's are the fastest of 20 (step 3), without spills; OTHERS', untimed, fit 99 KB
HOPPER = {"forward": (128, 128, 8, 3), "backward": (128, 64, 8, 3)}
OTHERS = {"forward": (64, 32, 8, 2), "backward": (32, 32, 8, 2)}
FLOAT32 = (16, 16, 8, 1)  # no tensor cores: larger tiles spill
PROCESSORS = 4  # in the interpreter, to have pieces to join
NUMBERS = [
    "n",
    "heads",
    "spans",
    "piece",
    "stride_k",
    "stride_v",
]  # these change from prompt to prompt: compile once


@triton.jit
def whoami(start_ptr, n, heads, spans, piece, g: tl.constexpr, BM: tl.constexpr):
    """-> the rows of this tile, [BM], among the g n of its span and KV head, and their positions; the number of that pair, the KV
    head, the piece and its first key; where keys end that all rows see, that some row sees."""
    tiles = tl.cdiv(n * g, BM)
    pid = tl.program_id(0)
    rows = pid % tiles * BM + tl.arange(0, BM)
    head, s, p = (
        pid // tiles % heads,
        pid // (tiles * heads) % spans,
        pid // (tiles * heads * spans),
    )
    start = tl.load(start_ptr + s)
    low = p * piece
    whole, end = tl.minimum(start + 1, low + piece), tl.minimum(start + n, low + piece)
    return (
        rows,
        start + rows % n,
        (s * heads + head).to(tl.int64),
        head.to(tl.int64),
        p.to(tl.int64),
        low,
        whole,
        end,
    )


@triton.jit
def tile(x_ptr, offs, mask, D: tl.constexpr):
    return tl.load(
        x_ptr + offs[:, None] * D + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0
    )


@triton.jit
def whole_tile(x_ptr, offs, D: tl.constexpr):
    return tl.load(x_ptr + offs[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def attend(acc, m_i, l_i, q, k, v, qk_scale, at, keys, edge: tl.constexpr, PREC: tl.constexpr):
    """One block of keys of an online softmax in base 2."""
    s = tl.dot(q, tl.trans(k), input_precision=PREC) * qk_scale  # [BM, BN]
    if edge:
        s = tl.where(keys[None, :] <= at[:, None], s, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_safe = tl.where(
        m_new == -float("inf"), 0.0, m_new
    )  # a row with no key yet: any finite number will do
    p, alpha = tl.exp2(s - m_safe[:, None]), tl.exp2(m_i - m_safe)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PREC)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit(do_not_specialize=NUMBERS)
def span_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    o_ptr,
    lse_ptr,  # (S, H, n, D), (Hkv, T, D) twice, (S), (P, S, H, n, D), (P, S, H, n)
    n,
    heads,
    spans,
    piece,
    stride_k,
    stride_v,
    scale,
    g: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    rows, at, pair, head, p, low, whole, end = whoami(start_ptr, n, heads, spans, piece, g, BM)
    mask, offs_n, out = rows < n * g, tl.arange(0, BN), (p * spans * heads + pair) * n * g
    k_ptr += head * stride_k * D  # rows, so that the compiler sees 16 byte loads
    v_ptr += head * stride_v * D
    q = tile(q_ptr + pair * n * g * D, rows, mask, D)
    qk_scale = tl.cast(scale, tl.float32) * LOG2E
    acc, m_i, l_i = (
        tl.zeros((BM, D), tl.float32),
        tl.full((BM,), -float("inf"), tl.float32),
        tl.zeros((BM,), tl.float32),
    )
    body = low + tl.maximum(whole - low, 0) // BN * BN
    for j in range(low, body, BN):
        k, v = whole_tile(k_ptr, j + offs_n, D), whole_tile(v_ptr, j + offs_n, D)
        acc, m_i, l_i = attend(acc, m_i, l_i, q, k, v, qk_scale, at, j + offs_n, False, PREC)
    for j in range(body, end, BN):
        k, v = (
            tile(k_ptr, j + offs_n, j + offs_n < end, D),
            tile(v_ptr, j + offs_n, j + offs_n < end, D),
        )
        acc, m_i, l_i = attend(acc, m_i, l_i, q, k, v, qk_scale, at, j + offs_n, True, PREC)
    l_safe = tl.where(
        l_i == 0.0, 1.0, l_i
    )  # this piece has no key for the row: 0, weighed with exp(-inf)
    lse = tl.where(l_i == 0.0, -float("inf"), (m_i + tl.log2(l_safe)) * LN2)
    tl.store(lse_ptr + out + rows, lse, mask=mask)
    tl.store(
        o_ptr + (out + rows[:, None]) * D + tl.arange(0, D)[None, :],
        acc / l_safe[:, None],
        mask=mask[:, None],
    )


@triton.jit(do_not_specialize=["rows", "pieces"])
def join_kernel(
    parts_ptr,
    lses_ptr,
    o_ptr,
    lse_ptr,  # (P, R, D), (P, R), (R, D), (R)
    rows,
    pieces,
    D: tl.constexpr,
    BM: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask, offs_d, size = offs < rows, tl.arange(0, D)[None, :], tl.cast(rows, tl.int64)
    m_i, l_i, acc = (
        tl.full((BM,), -float("inf"), tl.float32),
        tl.zeros((BM,), tl.float32),
        tl.zeros((BM, D), tl.float32),
    )
    for p in range(0, pieces):  # the first piece has a key for every row, so m_new is finite
        lse = tl.load(lses_ptr + p * size + offs, mask=mask, other=0.0) * LOG2E
        part = tl.load(
            parts_ptr + (p * size + offs[:, None]) * D + offs_d, mask=mask[:, None], other=0.0
        )  # [BM, D]
        m_new = tl.maximum(m_i, lse)
        alpha, weight = tl.exp2(m_i - m_new), tl.exp2(lse - m_new)
        acc, l_i, m_i = acc * alpha[:, None] + weight[:, None] * part, l_i * alpha + weight, m_new
    tl.store(lse_ptr + offs, (m_i + tl.log2(l_i)) * LN2, mask=mask)
    tl.store(
        o_ptr + offs[:, None] * D + offs_d,
        (acc / l_i[:, None]).to(o_ptr.dtype.element_ty),
        mask=mask[:, None],
    )


@triton.jit
def dq_block(
    acc, q, do, k, v, lse, delta, qk_scale, at, keys, edge: tl.constexpr, PREC: tl.constexpr
):
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PREC) * qk_scale - lse[:, None])  # [BM, BN]
    if edge:
        p = tl.where(keys[None, :] <= at[:, None], p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PREC) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PREC)


@triton.jit(do_not_specialize=NUMBERS)
def span_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    dq_ptr,  # as in the forward; do like q, lse (S, H, n), dq (P, S, H, n, D)
    n,
    heads,
    spans,
    piece,
    stride_k,
    stride_v,
    scale,
    g: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PREC: tl.constexpr,
):
    rows, at, pair, head, p, low, whole, end = whoami(start_ptr, n, heads, spans, piece, g, BM)
    mask, offs_n, first = rows < n * g, tl.arange(0, BN), pair * n * g
    k_ptr += head * stride_k * D  # rows, so that the compiler sees 16 byte loads
    v_ptr += head * stride_v * D
    do = tile(do_ptr + first * D, rows, mask, D)
    delta = tl.sum(do.to(tl.float32) * tile(o_ptr + first * D, rows, mask, D).to(tl.float32), 1)
    lse = (
        tl.load(lse_ptr + first + rows, mask=mask, other=float("inf")) * LOG2E
    )  # exp2(s - inf) = 0
    q = tile(q_ptr + first * D, rows, mask, D)
    scale = tl.cast(scale, tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    body = low + tl.maximum(whole - low, 0) // BN * BN
    for j in range(low, body, BN):
        k, v = whole_tile(k_ptr, j + offs_n, D), whole_tile(v_ptr, j + offs_n, D)
        acc = dq_block(acc, q, do, k, v, lse, delta, scale * LOG2E, at, j + offs_n, False, PREC)
    for j in range(body, end, BN):
        k, v = (
            tile(k_ptr, j + offs_n, j + offs_n < end, D),
            tile(v_ptr, j + offs_n, j + offs_n < end, D),
        )
        acc = dq_block(acc, q, do, k, v, lse, delta, scale * LOG2E, at, j + offs_n, True, PREC)
    out = p * spans * heads * n * g + first
    tl.store(
        dq_ptr + (out + rows[:, None]) * D + tl.arange(0, D)[None, :],
        acc * scale,
        mask=mask[:, None],
    )


# --------------------------------------------------------------------------------------------------
# Launch


def config(kernel, q):
    """Return (rows of a tile, keys of a block, warps, stages) for kernel "forward" or "backward"."""
    if q.dtype == torch.float32:
        return FLOAT32
    is_hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return HOPPER[kernel] if is_hopper else OTHERS[kernel]


def split_keys(q, n_kv_head, start, config, processors):
    """Return how many keys one program reads, and how many such pieces the longest span has.

    The pieces are as long as makes all programs together fill the processors once.
    """
    S, H, n, _ = q.shape
    rows, block, _, _ = config
    tiles = triton.cdiv(H // n_kv_head * n, rows) * n_kv_head  # of one span
    total_keys = int(start.sum()) + S * n  # over all spans
    programs = max(processors // (tiles * S), 1) * tiles * S
    piece = triton.cdiv(triton.cdiv(tiles * total_keys, programs), block) * block
    pieces = triton.cdiv(int(start.max()) + n, piece)
    return tiles, piece, pieces


def launch(kernel, config, q, k, v, start, inputs, outputs, split):
    """Run the forward or backward kernel over all tiles and pieces; it writes to `outputs`."""
    S, H, _, D = q.shape
    Hkv = k.shape[0]
    rows, block, num_warps, num_stages = config
    tiles, piece, pieces = split
    start = start.to(torch.int32)
    if q.is_cuda:  # pinned, so that the host does not wait for the device
        start = start.pin_memory().to(q.device, non_blocking=True)
    kernel[(tiles * S * pieces,)](
        q, k, v, start, *inputs, *outputs,
        q.shape[2], Hkv, S, piece, k.stride(0) // D, v.stride(0) // D, D**-0.5,
        H // Hkv, D, rows, block, "ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def count_processors(q):
    if q.is_cuda:
        return torch.cuda.get_device_properties(q.device).multi_processor_count
    return PROCESSORS


def forward(q, k, v, start, cfg=None, processors=None):
    """Return o like q, and its log-sum-exp in natural logarithms, (S, H, n) float32.

    q contiguous; the rows of k and v are D numbers side by side, their heads whole rows apart.
    processors: how many programs run at a time; by default those of the GPU.
    """
    cfg = cfg or config("forward", q)
    split = split_keys(q, k.shape[0], start, cfg, processors or count_processors(q))
    pieces = split[2]
    o_parts = q.new_empty(pieces, *q.shape, dtype=torch.float32)
    lse_parts = q.new_empty(pieces, *q.shape[:3], dtype=torch.float32)
    launch(span_forward_kernel, cfg, q, k, v, start, (), (o_parts, lse_parts), split)

    o = torch.empty_like(q)
    lse = torch.empty_like(lse_parts[0])
    D = q.shape[3]
    rows = q.numel() // D
    grid = (triton.cdiv(rows, 16),)
    join_kernel[grid](o_parts, lse_parts, o, lse, rows, pieces, D, 16, num_warps=4)
    return o, lse


def backward(do, q, k, v, start, o, lse, cfg=None, processors=None):
    """Return dq like q."""
    cfg = cfg or config("backward", q)
    split = split_keys(q, k.shape[0], start, cfg, processors or count_processors(q))
    dq_parts = q.new_empty(split[2], *q.shape, dtype=torch.float32)
    launch(span_backward_kernel, cfg, q, k, v, start, (o, do, lse), (dq_parts,), split)
    return dq_parts.sum(0).to(q.dtype)


# --------------------------------------------------------------------------------------------------
# Operators. The backward operator has no derivative of its own: a second derivative raises.


@custom_op("fivefold::span_attention", mutates_args=())
def span_attention_op(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, start)


@span_attention_op.register_fake
def _(q, k, v, start):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("fivefold::span_attention_backward", mutates_args=())
def span_attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor, o: Tensor, lse: Tensor
) -> Tensor:
    return backward(do, q, k, v, start, o, lse)


@span_attention_backward_op.register_fake
def _(do, q, k, v, start, o, lse):
    return torch.empty_like(q)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, do, _):
    return span_attention_backward_op(do.contiguous(), *ctx.saved_tensors), None, None, None


span_attention_op.register_autograd(differentiate, setup_context=setup_context)


# --------------------------------------------------------------------------------------------------
# Public function


def check(q, k, v, start):
    """Raise ValueError if the kernel cannot take these."""
    shapes = (
        f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    )
    is_alike = k.shape == v.shape and q.dtype == k.dtype == v.dtype
    if q.dim() != 4 or k.dim() != 3 or not is_alike or not q.device == k.device == v.device:
        raise ValueError(
            f"{shapes}: needed are (S, H, n, D) and twice (Hkv, T, D), of one dtype on one device"
        )
    S, H, n, D = q.shape
    Hkv, T, _ = k.shape
    if Hkv == 0 or H % Hkv or k.shape[2] != D:
        raise ValueError(f"{shapes}: heads or widths do not fit together")
    if D not in WIDTHS or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{shapes}: the kernel takes float32, float16, bfloat16, D in {WIDTHS}")
    is_index = not (start.is_floating_point() or start.is_complex() or start.dtype == torch.bool)
    if start.shape != (S,) or start.device.type != "cpu" or not is_index:
        raise ValueError(f"start has to be {S} integers on the CPU, one for each span")
    if S and (int(start.min()) < 0 or int(start.max()) + n > T):
        raise ValueError(f"{S} spans of {n} begin at {start.tolist()}, not all within {T} keys")
    if T * D >= 2**31 or H // Hkv * n * D >= 2**31:
        raise ValueError(f"{T} keys or {n} queries are too many for one call")


def with_whole_rows(t):
    """Return t (Hkv, T, D) as it is if its rows lie side by side, as in a view of a cache."""
    Hkv, T, D = t.shape
    if t.stride()[1:] == (D, 1) and t.stride(0) % D == 0:
        return t
    return t.contiguous()


def span_attention(q, k, v, start):
    """Attention of S spans of n queries over one cache; query r of span s sees keys 0 ... start[s] + r.

    q (S, H, n, D), k and v (Hkv, T, D), which may be views of a longer cache, all of one dtype;
    start (S) integers on the CPU, start + n <= T. D has to be one of WIDTHS. Differentiable once,
    and in q alone: k and v are constants. Returns (S, H, n, D).
    """
    check(q, k, v, start)
    if q.numel() == 0:
        return q.clone()
    k = with_whole_rows(k.detach())
    v = with_whole_rows(v.detach())
    return span_attention_op(q.contiguous(), k, v, start)[0]
