"""One decoding step of a Llama or Qwen3 model at batch size 1, six launches per layer.

    norm_linear_kernel    q, k, v = W RMSNorm(x) + b; after the last layer, logits = W RMSNorm(x)
    attention_kernel      QK-norm, RoPE, append to the KV cache, attention over a split of the keys
    combine_kernel        out = sum_s 2^(lse_s - lse) out_s over the splits s, lse in base 2
    linear_add_kernel     x += W out
    norm_swiglu_kernel    hidden = silu(W_gate RMSNorm(x)) * (W_up RMSNorm(x))
    linear_add_kernel     x += W hidden

In a matrix-vector product W x, each program computes a few numbers of the result by itself, so two
runs give the same bits. Attention is split-K: each program reads one split of the keys of one KV
head. A CUDA graph has a fixed grid, so programs are launched for the whole cache. Those whose split
has no token yet return at once.

From Hopper on, a kernel starts while the previous one still runs (programmatic dependent launch,
PDL). It loads its first weights or keys, which the previous kernel does not write, and then waits.

The floor is the time to read all weights once. After 512 tokens in bfloat16 on one H200, the next
one takes 2.55 ms with Qwen3-4B (floor: 75% of this), and 0.414 ms with SmolLM2-135M (16%).
Limits: D in HEAD_DIMS; float32, float16 or bfloat16; < 2^31 numbers in one head of the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """The part of a matrix that a program of a matrix-vector product reads at a time."""

    rows: int  # of the program
    columns: int  # of one iteration of its loop over all columns
    num_warps: int


SMALL_MATRIX = Tile(rows=2, columns=1024, num_warps=4)  # these products are limited by latency
LARGE_MATRIX = Tile(rows=4, columns=256, num_warps=1)  # and these by bandwidth
LARGE_MATRIX_ROWS = 8192  # matrices with at least as many rows are large
ATTENTION_PROGRAMS = 264  # two per multiprocessor of an H200
MAX_SPLITS = 64  # combine_kernel holds the outputs of all splits at once


# --------------------------------------------------------------------------------------------------
# Programmatic dependent launch


@triton.jit
def start_next_kernel(PDL: tl.constexpr):
    """Let the next kernel start as soon as multiprocessors are free."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has written everything."""
    if PDL:
        gdc_wait()


# --------------------------------------------------------------------------------------------------
# Matrix-vector products


@triton.jit
def load_weights(w_row_ptrs, row_mask, cols, C: tl.constexpr):
    """Load the columns `cols` of R rows of W: [R, BLOCK_C]"""
    mask = row_mask[:, None] & (cols < C)[None, :]
    return tl.load(w_row_ptrs[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def matvec(
    x_ptr, gain_ptr,  # (C,), (C,)
    w_row_ptrs, row_mask,  # [R] pointers to rows of W, [R] whether W has this row
    eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute R numbers, one per pointer in w_row_ptrs, of W x or, with NORM, W RMSNorm(x): [R]

    RMSNorm(x) = gain x / rms(x) with rms(x) = sqrt(mean(x^2) + eps). Since rms(x) is one number,
    we multiply W by gain x, and divide the result by rms(x).
    """
    # -- load the first weights before waiting for x --
    offs_c = tl.arange(0, BLOCK_C)
    w = load_weights(w_row_ptrs, row_mask, offs_c, C)  # [R, BLOCK_C]
    wait_for_previous_kernel(PDL)

    # -- sum W x or W (gain x), one block of columns at a time --
    acc = tl.zeros((w_row_ptrs.shape[0], BLOCK_C), tl.float32)
    sum_squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + offs_c
        x = tl.load(x_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)  # [BLOCK_C]
        if NORM:
            sum_squares += x * x
            x *= tl.load(gain_ptr + cols, mask=cols < C, other=0.0)
        acc += w.to(tl.float32) * x[None, :]
        w = load_weights(w_row_ptrs, row_mask, cols + BLOCK_C, C)  # prefetch
    y = tl.sum(acc, 1)  # [R]

    # -- divide by rms(x) --
    if NORM:
        y *= tl.rsqrt(tl.sum(sum_squares, 0) / C + eps)
    return y


@triton.jit
def choose(matrix, first, second, third):
    """Return `first` where matrix is 0, `second` where it is 1, `third` where it is 2."""
    return tl.where(matrix == 0, first, tl.where(matrix == 1, second, third))


@triton.jit
def norm_linear_kernel(
    x_ptr, gain_ptr,  # (C,), (C,)
    w1_ptr, w2_ptr, w3_ptr,  # (n1, C), (n2, C), (n3, C)
    b1_ptr, b2_ptr, b3_ptr,  # (n1,), (n2,), (n3,)
    y_ptr,  # (n1 + n2 + n3,)
    n1, n2, n3, eps,
    C: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute y = W RMSNorm(x) + b, where W is a stack of up to three matrices.

    row of y   0 ... n1 - 1 | n1 ... n1 + n2 - 1 | n1 + n2 ... n1 + n2 + n3 - 1
    matrix           0      |         1          |              2
    its row    0 ... n1 - 1 |   0 ... n2 - 1     |         0 ... n3 - 1
    """
    start_next_kernel(PDL)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < n1 + n2 + n3

    # -- find the matrix of each row, and its row in this matrix --
    matrix = (rows >= n1).to(tl.int32) + (rows >= n1 + n2).to(tl.int32)
    first_row = choose(matrix, 0, n1, n1 + n2)
    w_rows = (rows - first_row).to(tl.int64)
    offs = w_rows * C
    w_row_ptrs = choose(matrix, w1_ptr + offs, w2_ptr + offs, w3_ptr + offs)

    # -- multiply (True is NORM), and add the bias --
    y = matvec(x_ptr, gain_ptr, w_row_ptrs, mask, eps, C, BLOCK_C, True, PDL)  # [BLOCK_R]
    if BIAS:
        b_ptrs = choose(matrix, b1_ptr + w_rows, b2_ptr + w_rows, b3_ptr + w_rows)
        y += tl.load(b_ptrs, mask=mask, other=0.0)
    tl.store(y_ptr + rows, y, mask=mask)


@triton.jit
def norm_swiglu_kernel(
    x_ptr, gain_ptr, gate_ptr, up_ptr, y_ptr,  # (C,), (C,), (n, C), (n, C), (n,)
    n, eps,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute y = silu(W_gate RMSNorm(x)) * (W_up RMSNorm(x))"""
    start_next_kernel(PDL)

    # -- multiply both matrices at once, with their rows alternating (True is NORM) --
    # i     0               1             2                   3                 ...
    # row   r of W_gate     r of W_up     r + 1 of W_gate     r + 1 of W_up     ...
    i = tl.arange(0, 2 * BLOCK_R)
    rows = tl.program_id(0) * BLOCK_R + i // 2
    offs = rows.to(tl.int64) * C
    w_row_ptrs = tl.where(i % 2 == 0, gate_ptr + offs, up_ptr + offs)
    both = matvec(x_ptr, gain_ptr, w_row_ptrs, rows < n, eps, C, BLOCK_C, True, PDL)  # [2 BLOCK_R]
    gate, up = tl.split(tl.reshape(both, (BLOCK_R, 2)))  # [BLOCK_R] each

    # -- SwiGLU --
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=rows < n)


@triton.jit
def linear_add_kernel(
    y_ptr, w_ptr, x_ptr,  # (C,), (n, C), (n,)
    n,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add W y to x in place."""
    start_next_kernel(PDL)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < n
    w_row_ptrs = w_ptr + rows.to(tl.int64) * C
    # without NORM (False), matvec reads neither the gain, here y_ptr, nor eps, here 0.0
    wy = matvec(y_ptr, y_ptr, w_row_ptrs, mask, 0.0, C, BLOCK_C, False, PDL)  # [BLOCK_R]
    x = tl.load(x_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + rows, (x + wy).to(x_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------
# Attention of one query over the KV cache, split along the keys


@triton.jit
def load_gain(q_gain_ptr, k_gain_ptr, is_query, offs_d):
    """Load the gain of QK-norm for each row [ROWS, D].

    A row is a query where is_query [ROWS, 1] is true, else a key. offs_d: the channels to load.
    """
    q_gain = tl.load(q_gain_ptr + offs_d)[None, :]
    k_gain = tl.load(k_gain_ptr + offs_d)[None, :]
    return tl.where(is_query, q_gain, k_gain)  # [ROWS, D]


@triton.jit
def load_angles(cos_ptr, sin_ptr, position, D: tl.constexpr):
    """Load cos and sin of RoPE for each channel [D]; sin gets a minus sign in the first half.

    RoPE rotates channel i of the first half together with channel i + D/2:

        x_i cos - x_{i + D/2} sin    and    x_{i + D/2} cos + x_i sin

    With this sign, every channel becomes x cos + paired sin, where `paired` is the other channel.
    """
    offs_d = tl.arange(0, D)
    angle_offs = position * (D // 2) + offs_d % (D // 2)
    cos = tl.load(cos_ptr + angle_offs)
    sin = tl.where(offs_d < D // 2, -1.0, 1.0) * tl.load(sin_ptr + angle_offs)
    return cos, sin


@triton.jit
def load_queries_and_key(
    qkv_ptr, q_gain_ptr, k_gain_ptr,
    cos, sin,  # [D], [D], from load_angles
    kv_head, Hkv, eps,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Load the new token's key of one KV head and its G queries, after QK-norm and RoPE.

    heads in qkv         0 ... Hkv G - 1: queries | then Hkv keys | then Hkv values
    result [ROWS, D]     0 ... G - 1: queries     | G: key        | then zeros, up to 16 for tl.dot

    With G = 2 and Hkv = 2, KV head 1 reads heads 2 and 3 (queries) and 5 (key) into rows 0, 1, 2.
    """
    rows = tl.arange(0, ROWS)
    is_query = (rows < G)[:, None]
    offs_d = tl.arange(0, D)
    paired_d = (offs_d + D // 2) % D  # the other channel of each pair in RoPE

    # -- load each channel, and the other one of its pair --
    heads = tl.where(rows < G, kv_head * G + rows, Hkv * G + kv_head)
    head_offs = (heads * D)[:, None]
    mask = (rows <= G)[:, None]
    x = tl.load(qkv_ptr + head_offs + offs_d[None, :], mask=mask, other=0.0)
    paired = tl.load(qkv_ptr + head_offs + paired_d[None, :], mask=mask, other=0.0)

    # -- QK-norm --
    if NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= inverse_rms * load_gain(q_gain_ptr, k_gain_ptr, is_query, offs_d)
        paired *= inverse_rms * load_gain(q_gain_ptr, k_gain_ptr, is_query, paired_d)

    # -- RoPE --
    return x * cos[None, :] + paired * sin[None, :]


@triton.jit
def attend_block(acc, m_i, l_i, q, k, v, exists, qk_scale, PRECISION: tl.constexpr):
    """Add a block of keys and values to the running sums of attention (online softmax).

    q [ROWS, D], k and v [BLOCK_N, D], exists [BLOCK_N]: whether there is a key.
    m_i [ROWS] is the largest qk so far. The sums over all keys so far are
    acc = sum exp2(qk - m_i) v [ROWS, D] and l_i = sum exp2(qk - m_i) [ROWS].
    """
    # -- compute qk --
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale  # [ROWS, BLOCK_N]
    qk = tl.where(exists[None, :], qk, -float("inf"))

    # -- update the maximum (finite, since every block has a key), and rescale the sums to it --
    m_new = tl.maximum(m_i, tl.max(qk, 1))
    p = tl.exp2(qk - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def attention_kernel(
    qkv_ptr,  # (H + 2 Hkv, D): this token's queries, keys and values
    q_gain_ptr, k_gain_ptr,  # (D,), (D,)
    cos_ptr, sin_ptr,  # (size, D / 2) each
    length_ptr,  # (1,): the number of tokens before this one
    k_ptr, v_ptr,  # (Hkv, size, D) each
    out_ptr, lse_ptr,  # (n_splits, H, D), (n_splits, H), lse in base 2
    Hkv, size, split_size, eps, scale,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute the attention of the G query heads of one KV head to one split of the keys.

    position   0 ... length - 1: in the cache | length: the new token | then free, up to size - 1
    This program reads positions split_start ... split_end - 1.
    """
    start_next_kernel(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    length = tl.load(length_ptr).to(tl.int32)  # no kernel of this step writes it
    split_start = split * split_size
    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BLOCK_N)
    split_end = tl.minimum(split_start + split_size, length + 1)

    # -- load the first block of old keys and values before waiting for the new ones --
    head_offs = tl.cast(kv_head, tl.int64) * size * D
    block_offs = head_offs + offs_n[:, None] * D + offs_d[None, :]  # [BLOCK_N, D]
    mask = (split_start + offs_n < length)[:, None]
    k = tl.load(k_ptr + block_offs + split_start * D, mask=mask, other=0.0)
    v = tl.load(v_ptr + block_offs + split_start * D, mask=mask, other=0.0)

    cos, sin = load_angles(cos_ptr, sin_ptr, length, D)
    wait_for_previous_kernel(PDL)

    if split_start <= length:  # else the split has no token yet, and no output
        # -- load the queries, and the new key and value (in qkv, values come after all keys) --
        qk_rows = load_queries_and_key(
            qkv_ptr, q_gain_ptr, k_gain_ptr, cos, sin, kv_head, Hkv, eps, G, ROWS, D, NORM
        )  # [ROWS, D]
        new_k = tl.sum(tl.where((rows == G)[:, None], qk_rows, 0.0), 0).to(k.dtype)  # [D]
        new_v = tl.load(qkv_ptr + (Hkv * G + Hkv + kv_head) * D + offs_d).to(k.dtype)

        # -- append the key and value to the cache, in the split of the new token --
        if split_end == length + 1:
            new_offs = (tl.cast(kv_head, tl.int64) * size + length) * D + offs_d
            tl.store(k_ptr + new_offs, new_k)
            tl.store(v_ptr + new_offs, new_v)

        # -- loop over the keys of the split --
        q = qk_rows.to(k.dtype)
        qk_scale = tl.cast(scale, tl.float32) * LOG2E
        m_i = tl.full((ROWS,), -float("inf"), tl.float32)
        l_i = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, D), tl.float32)
        for start_n in range(split_start, split_end, BLOCK_N):
            positions = start_n + offs_n

            # -- insert the new key and value, which were not in the cache yet --
            is_new = (positions == length)[:, None]
            k = tl.where(is_new, new_k[None, :], k)
            v = tl.where(is_new, new_v[None, :], v)
            exists = positions < split_end
            acc, m_i, l_i = attend_block(acc, m_i, l_i, q, k, v, exists, qk_scale, PRECISION)

            # -- prefetch the next block --
            next_start = start_n + BLOCK_N
            mask = (positions + BLOCK_N < length)[:, None] & (next_start < split_end)
            k = tl.load(k_ptr + block_offs + next_start * D, mask=mask, other=0.0)
            v = tl.load(v_ptr + block_offs + next_start * D, mask=mask, other=0.0)

        # -- store the output and lse of this split and of G heads, in row (split, head) --
        out_rows = (split * Hkv + kv_head) * G + rows
        is_query = rows < G
        tl.store(lse_ptr + out_rows, m_i + tl.log2(l_i), mask=is_query)
        out = acc / l_i[:, None]
        out_offs = out_rows[:, None] * D + offs_d[None, :]
        tl.store(out_ptr + out_offs, out, mask=is_query[:, None])


@triton.jit
def combine_kernel(
    split_out_ptr, lse_ptr, length_ptr, out_ptr,  # (n_splits, H, D), (n_splits, H), (1,), (H, D)
    H, split_size,
    D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Compute out = sum_s 2^(lse_s - lse) out_s over the splits s that have a token.

    out_s: the output of split s. lse_s: log2 of the sum of exponentials over its keys, and lse: of
    the sum over all keys. One program per head.
    """
    start_next_kernel(PDL)
    head = tl.program_id(0)
    splits = tl.arange(0, SPLITS)
    offs_d = tl.arange(0, D)
    mask = splits * split_size <= tl.load(length_ptr)  # whether a split has a token
    wait_for_previous_kernel(PDL)

    # -- weight of each split, up to a factor that the division below removes --
    lse = tl.load(lse_ptr + splits * H + head, mask=mask, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))  # [SPLITS]

    # -- weighted mean of their outputs --
    offs = ((splits * H + head) * D)[:, None] + offs_d[None, :]
    split_out = tl.load(split_out_ptr + offs, mask=mask[:, None], other=0.0)  # [SPLITS, D]
    out = tl.sum(split_out * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + head * D + offs_d, out.to(out_ptr.dtype.element_ty))


# --------------------------------------------------------------------------------------------------
# Launch


def pdl_options(x):
    """Return the launch options for programmatic dependent launch, which Hopper introduced."""
    is_nvidia = x.is_cuda and torch.version.cuda is not None
    if is_nvidia and torch.cuda.get_device_capability(x.device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def matvec_grid(n):
    """Return the grid and the launch options of a product with a matrix of n rows."""
    tile = SMALL_MATRIX if n < LARGE_MATRIX_ROWS else LARGE_MATRIX
    options = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "num_warps": tile.num_warps}
    return (triton.cdiv(n, tile.rows),), options


def attention_block(D, dtype):
    """Return the number of keys in a block of attention, and the number of warps."""
    block_n = 16 if dtype == torch.float32 else 64
    num_warps = 8 if D >= 128 else 4
    return block_n, num_warps


def check_tensors(**expected):
    """Raise ValueError unless the kernels can read the tensors, given as name=(tensor, shape)."""
    for name, (tensor, shape) in expected.items():
        actual_shape = tuple(tensor.shape)
        if actual_shape != shape or 0 in shape:
            raise ValueError(f"{name} is {actual_shape}; it must be {shape}, with no size of 0")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; give float32, float16 or bfloat16")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous; call .contiguous() on it")


def norm_linear(x, gain, eps, weights, biases=None):
    """Return W RMSNorm(x) + b for one to three matrices W, concatenated, in float32.

    x (C,), gain (C,), weights: up to three of (n, C), biases: as many of (n,) -> (n1 + n2 + n3,)
    """
    C = x.numel()
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"there are {len(weights)} matrices; give one to three")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"there are {len(biases)} biases for {len(weights)} matrices")
    check_tensors(x=(x, (C,)), gain=(gain, (C,)))
    for weight in weights:
        check_tensors(weight=(weight, (len(weight), C)))
    for weight, bias in zip(weights, biases or ()):
        check_tensors(bias=(bias, (len(weight),)))

    # the kernel takes three matrices: missing ones have 0 rows, so their pointers are never read
    n_missing = 3 - len(weights)
    n1, n2, n3 = [len(weight) for weight in weights] + [0] * n_missing
    w1, w2, w3 = [*weights] + [weights[0]] * n_missing
    b1 = b2 = b3 = gain
    if biases is not None:
        b1, b2, b3 = [*biases] + [gain] * n_missing

    y = torch.empty(n1 + n2 + n3, dtype=torch.float32, device=x.device)
    grid, options = matvec_grid(len(y))
    options |= {"BIAS": biases is not None, **pdl_options(x)}
    norm_linear_kernel[grid](x, gain, w1, w2, w3, b1, b2, b3, y, n1, n2, n3, eps, C, **options)
    return y


def norm_swiglu(x, gain, eps, gate, up):
    """Return silu(gate RMSNorm(x)) * (up RMSNorm(x)) in the dtype of x.

    x (C,), gain (C,), gate and up (n, C) -> (n,)
    """
    C = x.numel()
    n = len(gate)
    check_tensors(x=(x, (C,)), gain=(gain, (C,)), gate=(gate, (n, C)), up=(up, (n, C)))
    y = x.new_empty(n)
    grid, options = matvec_grid(n)
    norm_swiglu_kernel[grid](x, gain, gate, up, y, n, eps, C, **options, **pdl_options(x))
    return y


def linear_add(x, y, weight):
    """Add weight y to x in place: x (n,), y (C,), weight (n, C)"""
    n = x.numel()
    C = y.numel()
    check_tensors(x=(x, (n,)), y=(y, (C,)), weight=(weight, (n, C)))
    grid, options = matvec_grid(n)
    linear_add_kernel[grid](y, weight, x, n, C, **options, **pdl_options(x))


def attention(qkv, gains, eps, angles, length, k, v):
    """Append a token's key and value to the KV cache, and return its attention to the cache.

    qkv: q, k and v of the token, ((H + 2 Hkv) D,) float32, from `norm_linear`
    gains: the weights of QK-norm for q and k, (D,) each, or None
    angles: cos and sin of RoPE, (size, 1, D / 2) each
    length: (1,) int64, the number of tokens in the cache; must be below size, which is not checked
    k, v: the cache, (Hkv, size, D) each
    Returns (H D,) in the dtype of k.
    """
    # check the inputs
    if k.dim() != 3 or k.shape[2] not in HEAD_DIMS:
        raise ValueError(f"k is {tuple(k.shape)}; it must be (Hkv, size, D), D one of {HEAD_DIMS}")
    Hkv, size, D = k.shape
    if size * D >= 2**31:
        raise ValueError(f"a head of the cache has {size} x {D} numbers; it must be below 2**31")
    check_tensors(k=(k, (Hkv, size, D)), v=(v, (Hkv, size, D)))
    H = qkv.numel() // D - 2 * Hkv
    if H < 1 or H % Hkv:
        raise ValueError(
            f"qkv has {qkv.numel()} numbers; with D = {D} and Hkv = {Hkv} that does not fit"
        )
    cos, sin = angles
    angles_shape = (size, 1, D // 2)
    check_tensors(qkv=(qkv, ((H + 2 * Hkv) * D,)), cos=(cos, angles_shape), sin=(sin, angles_shape))
    q_gain = k_gain = qkv  # any pointer: without QK-norm they are not read
    if gains is not None:
        q_gain, k_gain = gains
        check_tensors(q_gain=(q_gain, (D,)), k_gain=(k_gain, (D,)))

    # split the keys: enough splits to fill the GPU, each a whole number of blocks. With Hkv = 8 and
    # 4096 positions in bfloat16, 33 splits are wanted, so a split has 2 blocks of 64: 32 splits.
    block_n, num_warps = attention_block(D, k.dtype)
    wanted_splits = min(MAX_SPLITS, max(1, ATTENTION_PROGRAMS // Hkv))
    split_size = triton.cdiv(size, block_n * wanted_splits) * block_n
    n_splits = triton.cdiv(size, split_size)
    split_out = qkv.new_empty(n_splits, H, D)
    lse = qkv.new_empty(n_splits, H)

    # attention of each split; a tile has a row per query and one for the new key, at least 16
    G = H // Hkv
    n_rows = max(16, triton.next_power_of_2(G + 1))
    precision = "ieee" if k.dtype == torch.float32 else "tf32"
    attention_kernel[(n_splits, Hkv)](
        qkv, q_gain, k_gain, cos, sin, length, k, v, split_out, lse,
        Hkv, size, split_size, eps, D**-0.5,
        G=G, ROWS=n_rows, D=D, BLOCK_N=block_n, NORM=gains is not None, PRECISION=precision,
        num_warps=num_warps, **pdl_options(k),
    )  # fmt: skip

    # combine the splits
    out = k.new_empty(H * D)
    combine_kernel[(H,)](
        split_out, lse, length, out, H, split_size,
        D=D, SPLITS=triton.next_power_of_2(n_splits),
        num_warps=4, **pdl_options(k),
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------
# A step of the whole model


def fused_logits(model, token, length, angles, kv):
    """Return the logits (V,) of a softmax GPT after token (1, 1) at position length (1,).

    It does what the layers of the model do. Each kernel fuses a matrix-vector product with the
    norm before it or the sum after it. kv: the KV cache, a pair of (Hkv, size, D) per layer.
    """
    eps = model.config.norm_eps
    x = model.embed_tokens.weight.index_select(0, token[0])[0]  # (C,)
    for layer, (k, v) in zip(model.layers, kv):
        # attention
        module = layer.self_attn
        projections = (module.q_proj, module.k_proj, module.v_proj)
        weights = [projection.weight for projection in projections]
        biases = None
        if model.config.qkv_bias:
            biases = [projection.bias for projection in projections]
        gains = None
        if model.config.qk_norm:
            gains = (module.q_norm.weight, module.k_norm.weight)
        qkv = norm_linear(x, layer.input_layernorm.weight, eps, weights, biases)
        y = attention(qkv, gains, eps, angles, length, k, v)
        linear_add(x, y, module.o_proj.weight)

        # MLP
        mlp = layer.mlp
        gain = layer.post_attention_layernorm.weight
        hidden = norm_swiglu(x, gain, eps, mlp.gate_proj.weight, mlp.up_proj.weight)
        linear_add(x, hidden, mlp.down_proj.weight)

    # logits
    lm_head = model.embed_tokens if model.lm_head is None else model.lm_head
    return norm_linear(x, model.norm.weight, eps, [lm_head.weight])
