"""One token through a Llama or Qwen3 layer in six launches: products with one row, then attention.

At batch 1 every weight is read once for two FLOPs, so time is bytes over bandwidth plus what each
launch costs:

    project_kernel   q, k, v (or the logits) = W RMSNorm(x) + b    the norm is applied on the way
    attend_kernel    QK-norm, RoPE, k and v into the cache, online softmax over a piece of the keys
    join_kernel      o = sum_p exp(lse_p - lse) o_p
    add_kernel       x += W o
    swiglu_kernel    h = silu(G n) * (U n), n = RMSNorm(x)         a tile alternates rows of G and U
    add_kernel       x += W h

Grid: a product gives each program some rows of W, which it reads from end to end: no sums between
programs, two runs give the same bits. Attention: (piece of the keys, KV head); the g queries of a
KV head and its new key are the rows of one tile, padded to 16 for the tensor core. Pieces after the
position of the token do nothing, so that the grid is that of the whole cache and can be captured in
a CUDA graph. Programs begin before the kernel ahead has ended (programmatic dependent launch, from
Hopper on): each fetches its first weights or keys, which do not depend on it, and then waits.

A token after 512, bf16, ms on one H200 (torch 2.11, triton 3.6), the host included, and the share
of it in which the weights could be read at the speed of a copy:
                                                                        Qwen3-4B    SmolLM2-135M
1. PyTorch's operators in a CUDA graph: one query through cuBLAS        8.69  22%
2. Layers compiled, in a CUDA graph; tuned by Inductor 4.41             5.19  37%
3. These kernels, 4 rows and 512 columns with 4 warps, 32 keys          2.94  65%   0.568  11%
4. With early start                                                     2.83  68%   0.513  13%
5. As 4 with 64 keys a block and 4 warps                                2.81  68%   0.481  13%
6. As 4 with 64 keys a block and 8 warps                                2.77  69%   0.515  13%
7. As 4 with 2 rows and 1024 columns                                    2.77  69%   0.432  15%
8. As 7, but 4 rows, 256 columns and 1 warp from 8192 rows on           2.55  75%   0.414  16%
   (SwiGLU 27 us instead of 30, logits 179 instead of 218); blocks of
   6 for heads of 128, of 5 for narrower ones. Kept
SmolLM2 needs 67 us to read and 180 launches a token, each of which takes over a microsecond however
little it does. Nor would one persistent kernel reach 60%, 112 us: a barrier over the grid takes
0.8 us, and a layer needs at least four, which makes 100 us for 30 layers before anything is read.

Limits: head dimensions in HEAD_DIMS, fewer than 2**31 numbers in one head of the cache; float32,
float16 and bfloat16, sums in float32. Anything else raises ValueError.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Products: rows of a program, columns of a tile, warps. Latency counts for a matrix of fewer than
# ROWS rows, bandwidth for others.
FEW = (2, 1024, 4)
MANY = (4, 256, 1)
ROWS = 8192
PROGRAMS = 264  # of attention: two for each multiprocessor of an H200
PIECES = 64  # of the keys, at most: join_kernel holds one number of each at a time


# --------------------------------------------------------------------------------------------------
# Programmatic dependent launch


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on, what the kernel ahead has written can be read."""
    if PDL:
        gdc_wait()


# --------------------------------------------------------------------------------------------------
# Products of a matrix with one row


@triton.jit
def product(
    x_ptr, gain_ptr,  # (C), (C)
    w_ptr, mask,  # [R] pointers to a tile's rows of W, and which of them count
    eps,
    C: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W x or, with NORM, W RMSNorm(x): [R]"""
    offs = tl.arange(0, BK)
    w_mask = mask[:, None] & (offs < C)[None, :]
    w = tl.load(w_ptr[:, None] + offs[None, :], mask=w_mask, other=0.0)  # [R, BK]
    wait(PDL)
    acc = tl.zeros((w_ptr.shape[0], BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for start in range(0, C, BK):
        at = start + offs
        x = tl.load(x_ptr + at, mask=at < C, other=0.0).to(tl.float32)  # [BK]
        if NORM:
            squares += x * x
            x *= tl.load(gain_ptr + at, mask=at < C, other=0.0)
        acc += w.to(tl.float32) * x[None, :]
        # the next tile, while this one is summed
        at += BK
        w = tl.load(w_ptr[:, None] + at[None, :], mask=mask[:, None] & (at < C)[None, :], other=0.0)
    y = tl.sum(acc, 1)
    return y * tl.rsqrt(tl.sum(squares, 0) / C + eps) if NORM else y


@triton.jit
def project_kernel(
    x_ptr, gain_ptr,  # (C), (C)
    w1_ptr, w2_ptr, w3_ptr,  # (n1, C), (n2, C), (n3, C)
    b1_ptr, b2_ptr, b3_ptr,  # (n1), (n2), (n3)
    y_ptr,  # (n1 + n2 + n3)
    n1, n2, n3, eps,
    C: tl.constexpr, BIAS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mask = rows < n1 + n2 + n3
    second = rows >= n1
    third = rows >= n1 + n2
    # the row in its own matrix
    own = (rows - tl.where(third, n1 + n2, tl.where(second, n1, 0))).to(tl.int64)
    w_ptr = tl.where(third, w3_ptr + own * C, tl.where(second, w2_ptr + own * C, w1_ptr + own * C))
    y = product(x_ptr, gain_ptr, w_ptr, mask, eps, C, BK, True, PDL)
    if BIAS:
        b_ptr = tl.where(third, b3_ptr + own, tl.where(second, b2_ptr + own, b1_ptr + own))
        y += tl.load(b_ptr, mask=mask, other=0.0)
    tl.store(y_ptr + rows, y, mask=mask)


@triton.jit
def swiglu_kernel(
    x_ptr, gain_ptr, gate_ptr, up_ptr, y_ptr,  # (C), (C), (n, C), (n, C), (n)
    n, eps,
    C: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    # a row of G, then the same row of U, and so on
    both = tl.arange(0, 2 * BR)
    rows = tl.program_id(0) * BR + both // 2
    offs = rows.to(tl.int64) * C
    w_ptr = tl.where(both % 2 == 0, gate_ptr + offs, up_ptr + offs)
    y = product(x_ptr, gain_ptr, w_ptr, rows < n, eps, C, BK, True, PDL)
    gate, up = tl.split(tl.reshape(y, (BR, 2)))
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    tl.store(y_ptr + rows, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=rows < n)


@triton.jit
def add_kernel(
    y_ptr, w_ptr, x_ptr,  # (C), (n, C), (n)
    n,
    C: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mask = rows < n
    y = product(y_ptr, y_ptr, w_ptr + rows.to(tl.int64) * C, mask, 0.0, C, BK, False, PDL)
    x = tl.load(x_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + rows, (x + y).to(x_ptr.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------
# Attention of one query over the cache, split into P pieces of the keys


@triton.jit
def attend_kernel(
    heads_ptr,  # (H + 2 Hkv, D)
    q_gain_ptr, k_gain_ptr,  # (D), (D)
    cos_ptr, sin_ptr,  # (size, D / 2) each
    length_ptr,  # (1)
    k_ptr, v_ptr,  # (Hkv, size, D) each
    o_ptr, lse_ptr,  # (P, H, D), (P, H)
    Hkv, size, piece, eps, scale,
    g: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    NORM: tl.constexpr, PREC: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    p = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(length_ptr).to(tl.int32)
    low = p * piece
    rows = tl.arange(0, R)
    offs_d = tl.arange(0, D)
    offs_n = tl.arange(0, BN)
    end = tl.minimum(low + piece, length + 1)

    # -- the first keys and values of the piece --
    tile = tl.cast(head, tl.int64) * size * D + offs_n[:, None] * D + offs_d[None, :]  # [BN, D]
    k = tl.load(k_ptr + tile + low * D, mask=(low + offs_n < length)[:, None], other=0.0)
    v = tl.load(v_ptr + tile + low * D, mask=(low + offs_n < length)[:, None], other=0.0)

    # -- RoPE: channels i and i + D/2 are a pair --
    half = length * (D // 2) + offs_d % (D // 2)
    mirror = (offs_d + D // 2) % D
    cos = tl.load(cos_ptr + half)
    sin = tl.where(offs_d < D // 2, -1.0, 1.0) * tl.load(sin_ptr + half)
    wait(PDL)
    if low <= length:
        # -- the g queries of this KV head, then its new key, both rotated to their position --
        ours = (tl.where(rows < g, head * g + rows, Hkv * g + head) * D)[:, None]  # [R, 1]
        x = tl.load(heads_ptr + ours + offs_d[None, :], mask=(rows <= g)[:, None], other=0.0)
        mate = tl.load(heads_ptr + ours + mirror[None, :], mask=(rows <= g)[:, None], other=0.0)
        if NORM:
            query = (rows < g)[:, None]
            rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            q_gain = tl.load(q_gain_ptr + offs_d)[None, :]
            k_gain = tl.load(k_gain_ptr + offs_d)[None, :]
            x *= rms * tl.where(query, q_gain, k_gain)
            q_gain = tl.load(q_gain_ptr + mirror)[None, :]
            k_gain = tl.load(k_gain_ptr + mirror)[None, :]
            mate *= rms * tl.where(query, q_gain, k_gain)
        x = x * cos[None, :] + mate * sin[None, :]  # [R, D]

        # -- the new key and value, into the cache --
        new_k = tl.sum(tl.where((rows == g)[:, None], x, 0.0), 0).to(k.dtype)  # [D]
        new_v = tl.load(heads_ptr + (Hkv * g + Hkv + head) * D + offs_d).to(k.dtype)
        if end == length + 1:
            at = (tl.cast(head, tl.int64) * size + length) * D + offs_d
            tl.store(k_ptr + at, new_k)
            tl.store(v_ptr + at, new_v)

        # -- online softmax; every block has a key that all rows see, so m_new is finite --
        q = x.to(k.dtype)
        qk_scale = tl.cast(scale, tl.float32) * LOG2E
        m_i = tl.full((R,), -float("inf"), tl.float32)
        l_i = tl.zeros((R,), tl.float32)
        acc = tl.zeros((R, D), tl.float32)
        for start in range(low, end, BN):
            keys = start + offs_n
            is_new = (keys == length)[:, None]
            k = tl.where(is_new, new_k[None, :], k)
            v = tl.where(is_new, new_v[None, :], v)
            s = tl.dot(q, tl.trans(k), input_precision=PREC) * qk_scale  # [R, BN]
            s = tl.where((keys < end)[None, :], s, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            w = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PREC)
            m_i = m_new
            l_i = l_i * alpha + tl.sum(w, 1)
            # the next block, while this one is summed
            seen = (keys + BN < length)[:, None]
            k = tl.load(k_ptr + tile + (start + BN) * D, mask=seen & (start + BN < end), other=0.0)
            v = tl.load(v_ptr + tile + (start + BN) * D, mask=seen & (start + BN < end), other=0.0)

        # -- store this piece; lse is in base 2 --
        out = (p * Hkv + head) * g + rows
        is_query = rows < g
        tl.store(lse_ptr + out, m_i + tl.log2(l_i), mask=is_query)
        o = acc / l_i[:, None]
        tl.store(o_ptr + out[:, None] * D + offs_d[None, :], o, mask=is_query[:, None])


@triton.jit
def join_kernel(
    parts_ptr, lse_ptr, length_ptr, o_ptr,  # (P, H, D), (P, H), (1), (H, D)
    H, piece,
    D: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    head = tl.program_id(0)
    offs_p = tl.arange(0, P)
    offs_d = tl.arange(0, D)
    there = offs_p * piece <= tl.load(length_ptr)
    wait(PDL)
    lse = tl.load(lse_ptr + offs_p * H + head, mask=there, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    offs = ((offs_p * H + head) * D)[:, None] + offs_d[None, :]
    parts = tl.load(parts_ptr + offs, mask=there[:, None], other=0.0)  # [P, D]
    o = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(o_ptr + head * D + offs_d, o.to(o_ptr.dtype.element_ty))


# --------------------------------------------------------------------------------------------------
# Launch


def early(x):
    """Options for programs that begin before the kernel ahead has ended, where the GPU can."""
    is_nvidia = bool(x.is_cuda and torch.version.cuda)
    if is_nvidia and torch.cuda.get_device_capability(x.device)[0] >= 9:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def tiles(n, config):
    """Return the grid for n rows, and the options that say how they are shared out."""
    rows, columns, warps = config or (FEW if n < ROWS else MANY)
    return (triton.cdiv(n, rows),), {"BR": rows, "BK": columns, "num_warps": warps}


def blocks(D, dtype):
    """Return the keys in a block of attention, and the warps."""
    return (16 if dtype == torch.float32 else 64, 8 if D >= 128 else 4)


def check(name, tensor, *shape):
    """Raise ValueError unless the kernels can read the tensor as one of this shape."""
    found = tuple(tensor.shape)
    if found != shape or 0 in shape:
        raise ValueError(f"{name} is {found}; it must be {shape}, with no size of 0")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; give float32, float16 or bfloat16")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous; call .contiguous() on it")


def project(x, gain, eps, weights, biases=None, config=None):
    """Return W RMSNorm(x) + b of one to three matrices, one after another, in float32.

    x (C), gain (C), weights: (n, C) each, biases: (n) each -> (n1 + n2 + n3)
    """
    C = x.numel()
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"there are {len(weights)} matrices; give one to three")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"there are {len(biases)} biases for {len(weights)} matrices")
    check("x", x, C)
    check("gain", gain, C)
    for i, weight in enumerate(weights):
        check("a weight", weight, len(weight), C)
        if biases is not None:
            check("a bias", biases[i], len(weight))

    # matrices that are not there have no rows, and pointers that are never read
    missing = 3 - len(weights)
    sizes = [len(weight) for weight in weights] + [0] * missing
    weights = [*weights, *[weights[0]] * missing]
    has_bias = biases is not None
    biases = [*biases, *[gain] * missing] if has_bias else [gain] * 3
    y = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    grid, options = tiles(len(y), config)
    project_kernel[grid](
        x, gain, *weights, *biases, y, *sizes, eps, C, has_bias, **options, **early(x)
    )
    return y


def swiglu(x, gain, eps, gate, up, config=None):
    """Return silu(gate n) * (up n) with n = RMSNorm(x), in the dtype of x.

    x (C), gain (C), gate and up (n, C) -> (n)
    """
    C = x.numel()
    n = len(gate)
    check("x", x, C)
    check("gain", gain, C)
    check("gate", gate, n, C)
    check("up", up, n, C)
    y = x.new_empty(n)
    grid, options = tiles(n, config)
    swiglu_kernel[grid](x, gain, gate, up, y, n, eps, C, **options, **early(x))
    return y


def add(x, y, weight, config=None):
    """x += weight y, in place: x (n), y (C), weight (n, C)"""
    n = x.numel()
    C = y.numel()
    check("x", x, n)
    check("y", y, C)
    check("weight", weight, n, C)
    grid, options = tiles(n, config)
    add_kernel[grid](y, weight, x, n, C, **options, **early(x))


def attend(heads, gains, eps, angles, length, k, v, config=None):
    """Add the token's key and value to the cache, and return its attention over all of it.

    heads: q, k and v as `project` gives them, ((H + 2 Hkv) D) float32; gains: (D) each for q and k,
    or None; angles: cos and sin, (size, 1, D / 2) each; length (1) int64: the token's position,
    below size (not checked: it stays on the device); k and v (Hkv, size, D) -> (H D) like k
    """
    if k.dim() != 3 or k.shape[2] not in HEAD_DIMS:
        raise ValueError(f"k is {tuple(k.shape)}; it must be (Hkv, size, D), D one of {HEAD_DIMS}")
    Hkv, size, D = k.shape
    if size * D >= 2**31:
        raise ValueError(f"a head of the cache has {size} x {D} numbers; it must be below 2**31")
    check("k", k, Hkv, size, D)
    check("v", v, Hkv, size, D)
    H = heads.numel() // D - 2 * Hkv
    if H < 1 or H % Hkv:
        raise ValueError(f"{heads.numel()} numbers are no heads of {D} over {Hkv} key/value heads")
    check("heads", heads, (H + 2 * Hkv) * D)
    for name, angle in zip(("cos", "sin"), angles):
        check(name, angle, size, 1, D // 2)
    for gain in gains or ():
        check("a gain", gain, D)

    block, warps = config or blocks(D, k.dtype)
    piece = triton.cdiv(size, block * min(PIECES, max(1, PROGRAMS // Hkv))) * block
    pieces = triton.cdiv(size, piece)
    g = H // Hkv
    parts = heads.new_empty(pieces, H, D)
    lse = heads.new_empty(pieces, H)
    o = k.new_empty(H * D)
    attend_kernel[(pieces, Hkv)](
        heads, *(gains or angles), *angles, length, k, v, parts, lse,
        Hkv, size, piece, eps, D**-0.5,
        g, max(16, triton.next_power_of_2(g + 1)), D, block,
        gains is not None, "ieee" if k.dtype == torch.float32 else "tf32",
        num_warps=warps, **early(k),
    )  # fmt: skip
    P = triton.next_power_of_2(pieces)
    join_kernel[(H,)](parts, lse, length, o, H, piece, D, P, num_warps=4, **early(k))
    return o


# --------------------------------------------------------------------------------------------------
# A step of the whole model


def fused_logits(model, token, length, angles, kv):
    """Return the logits (V) of a softmax GPT after token (1, 1) at position length (1).

    The same as the model's own layers compute, with kv, a pair (Hkv, size, D) per layer, as their
    cache. This is the one place where the layer is written a second time, because each kernel
    fuses a product with the norm before it or the sum after it.
    """
    eps = model.config.norm_eps
    x = model.embed_tokens.weight.index_select(0, token[0])[0]  # (C)
    for layer, (k, v) in zip(model.layers, kv):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [projection.weight for projection in projections]
        biases = None
        gains = None
        if model.config.qkv_bias:
            biases = [projection.bias for projection in projections]
        if model.config.qk_norm:
            gains = (attention.q_norm.weight, attention.k_norm.weight)

        heads = project(x, layer.input_layernorm.weight, eps, weights, biases)
        y = attend(heads, gains, eps, angles, length, k, v)
        add(x, y, attention.o_proj.weight)

        mlp = layer.mlp
        gain = layer.post_attention_layernorm.weight
        hidden = swiglu(x, gain, eps, mlp.gate_proj.weight, mlp.up_proj.weight)
        add(x, hidden, mlp.down_proj.weight)
    output = model.embed_tokens if model.lm_head is None else model.lm_head
    return project(x, model.norm.weight, eps, [output.weight])
