"""One token through a Llama or Qwen3 layer: products of matrices with one row, and attention of one query over all that is kept.

At batch 1 every weight is read once for two FLOPs, so time is bytes over bandwidth plus what each launch costs: six a layer.

    project_kernel    q, k, v (or the logits) = W RMSNorm(x) + b     the norm rides along: W (g x) / rms(x), one pass over x
    attend_kernel     QK-norm and rotary positions of q and k, k and v into the cache, online softmax over one piece of the keys
    join_kernel       o = sum_p exp(lse_p - lse) o_p
    add_kernel        x += W o
    swiglu_kernel     h = silu(G n) * (U n), n = RMSNorm(x)          a row of G and the same row of U lie in one tile
    add_kernel        x += W h

Grid: a product gives each program some rows of W, which it reads from end to end: no sums between programs, two runs give the same
bits. Attention: (piece of the keys, KV head); the g queries of a KV head and its new key are the rows of one tile, padded to 16 for
the matrix unit. Pieces behind the position of the token do nothing, so that the grid is that of the whole cache and can be recorded.
Programs begin before the kernel ahead has ended (programmatic dependent launch, from Hopper on): each fetches its first weights or
keys, which do not depend on it, and only then waits for its result.

A token after 512, bf16, ms on one H200 (torch 2.11, triton 3.6), the host included, and the share of it in which the weights could
be read at the speed of a copy:                                                       Qwen3-4B      SmolLM2-135M
1. PyTorch's operators in a CUDA graph: scores of one query through cuBLAS            8.69  22%
2. Layers compiled, in a CUDA graph; with Inductor's coordinate descent 4.41          5.19  37%
3. These kernels, 4 rows and 512 columns with 4 warps, 32 keys, without early start   2.94  65%     0.568  11%
4. With early start                                                                   2.83  68%     0.513  13%
5. As 4 with 64 keys a block and 4 warps                                              2.81  68%     0.481  13%
6. As 4 with 64 keys a block and 8 warps                                              2.77  69%     0.515  13%
7. As 4 with 2 rows and 1024 columns                                                  2.77  69%     0.432  15%
8. As 7, but 4 rows and 256 columns with 1 warp from 8192 rows on, which alone take 27 us instead of 30 (SwiGLU) and 179 instead of
   218 (logits), and the blocks of 6 for heads of 128, of 5 for narrower ones. Kept             2.55  75%     0.414  16%
SmolLM2 needs 67 us to read and 180 launches a token, each of which takes over a microsecond however little it does. Nor would one
kernel that stays reach 60%, 112 us: a barrier over the grid takes 0.8 us, and a layer cannot do with fewer than four of them, which
makes 100 us for 30 layers before anything is read or the logits, a fifth of the bytes, are begun.

Limits: head_dim in WIDTHS, fewer than 2**31 numbers in a cache's head; float32, float16 and bfloat16, sums in float32.
"""
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
WIDTHS = (16, 32, 64, 128, 256)
FEW, MANY = (2, 1024, 4), (4, 256, 1)                                # rows of a program, columns of a tile, warps: for a matrix of
ROWS = 8192                                                          # fewer than so many rows, where latency counts, and for others
PROGRAMS, PIECES = 264, 64                                           # of attention: two for each multiprocessor of an H200; of the keys,
                                                                     # at most, as join_kernel holds one number of each at a time


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on, what the kernel ahead has written is there."""
    if PDL:
        gdc_wait()


@triton.jit
def product(
    x_ptr, gain_ptr, w_ptr, mask, eps,                               # (C), (C), a tile's rows of W: [R] pointers and which of them count
    C: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):
    """-> W x or, with NORM, W RMSNorm(x): [R]"""
    offs = tl.arange(0, BK)
    w = tl.load(w_ptr[:, None] + offs[None, :], mask=mask[:, None] & (offs < C)[None, :], other=0.0)     # [R, BK]
    wait(PDL)
    acc, squares = tl.zeros((w_ptr.shape[0], BK), tl.float32), tl.zeros((BK,), tl.float32)
    for start in range(0, C, BK):
        at = start + offs
        x = tl.load(x_ptr + at, mask=at < C, other=0.0).to(tl.float32)                                   # [BK]
        if NORM:
            squares += x * x
            x *= tl.load(gain_ptr + at, mask=at < C, other=0.0)
        acc += w.to(tl.float32) * x[None, :]
        at += BK
        w = tl.load(w_ptr[:, None] + at[None, :], mask=mask[:, None] & (at < C)[None, :], other=0.0)
    y = tl.sum(acc, 1)
    return y * tl.rsqrt(tl.sum(squares, 0) / C + eps) if NORM else y


@triton.jit
def project_kernel(
    x_ptr, gain_ptr, w1_ptr, w2_ptr, w3_ptr, b1_ptr, b2_ptr, b3_ptr, y_ptr,   # (C) twice, (n, C) and (n) thrice, (n1 + n2 + n3)
    n1, n2, n3, eps,
    C: tl.constexpr, BIAS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):
    begin(PDL)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mask, second, third = rows < n1 + n2 + n3, rows >= n1, rows >= n1 + n2
    own = (rows - tl.where(third, n1 + n2, tl.where(second, n1, 0))).to(tl.int64)            # the row in its own matrix
    w_ptr = tl.where(third, w3_ptr + own * C, tl.where(second, w2_ptr + own * C, w1_ptr + own * C))
    y = product(x_ptr, gain_ptr, w_ptr, mask, eps, C, BK, True, PDL)
    if BIAS:
        y += tl.load(tl.where(third, b3_ptr + own, tl.where(second, b2_ptr + own, b1_ptr + own)), mask=mask, other=0.0)
    tl.store(y_ptr + rows, y, mask=mask)


@triton.jit
def swiglu_kernel(
    x_ptr, gain_ptr, gate_ptr, up_ptr, y_ptr,                        # (C), (C), (n, C), (n, C), (n)
    n, eps,
    C: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):
    begin(PDL)
    both = tl.arange(0, 2 * BR)
    rows = tl.program_id(0) * BR + both // 2
    offs = rows.to(tl.int64) * C
    y = product(x_ptr, gain_ptr, tl.where(both % 2 == 0, gate_ptr + offs, up_ptr + offs), rows < n, eps, C, BK, True, PDL)
    gate, up = tl.split(tl.reshape(y, (BR, 2)))
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    tl.store(y_ptr + rows, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=rows < n)


@triton.jit
def add_kernel(
    y_ptr, w_ptr, x_ptr,                                             # (C), (n, C), (n)
    n,
    C: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):
    begin(PDL)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    mask = rows < n
    y = product(y_ptr, y_ptr, w_ptr + rows.to(tl.int64) * C, mask, 0.0, C, BK, False, PDL)
    x = tl.load(x_ptr + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + rows, (x + y).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attend_kernel(
    heads_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, length_ptr,          # (H + 2 Hkv, D), (D) twice, (size, D / 2) twice, (1)
    k_ptr, v_ptr, o_ptr, lse_ptr,                                             # (Hkv, size, D) twice, (P, H, D), (P, H)
    Hkv, size, piece, eps, scale,
    g: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, PREC: tl.constexpr, PDL: tl.constexpr,
):
    begin(PDL)
    p, head, length = tl.program_id(0), tl.program_id(1), tl.load(length_ptr).to(tl.int32)
    low, rows, offs_d, offs_n = p * piece, tl.arange(0, R), tl.arange(0, D), tl.arange(0, BN)
    end = tl.minimum(low + piece, length + 1)
    tile = tl.cast(head, tl.int64) * size * D + offs_n[:, None] * D + offs_d[None, :]        # [BN, D]
    k = tl.load(k_ptr + tile + low * D, mask=(low + offs_n < length)[:, None], other=0.0)
    v = tl.load(v_ptr + tile + low * D, mask=(low + offs_n < length)[:, None], other=0.0)
    half, mirror = length * (D // 2) + offs_d % (D // 2), (offs_d + D // 2) % D              # channels i and i + D/2 are a pair
    cos, sin = tl.load(cos_ptr + half), tl.where(offs_d < D // 2, -1.0, 1.0) * tl.load(sin_ptr + half)
    wait(PDL)
    if low <= length:
        # the g queries of this KV head, then its new key, both turned to their position
        ours = (tl.where(rows < g, head * g + rows, Hkv * g + head) * D)[:, None]            # [R, 1]
        x = tl.load(heads_ptr + ours + offs_d[None, :], mask=(rows <= g)[:, None], other=0.0)
        mate = tl.load(heads_ptr + ours + mirror[None, :], mask=(rows <= g)[:, None], other=0.0)
        if NORM:
            query, rms = (rows < g)[:, None], tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            x *= rms * tl.where(query, tl.load(q_gain_ptr + offs_d)[None, :], tl.load(k_gain_ptr + offs_d)[None, :])
            mate *= rms * tl.where(query, tl.load(q_gain_ptr + mirror)[None, :], tl.load(k_gain_ptr + mirror)[None, :])
        x = x * cos[None, :] + mate * sin[None, :]                                           # [R, D]
        new_k = tl.sum(tl.where((rows == g)[:, None], x, 0.0), 0).to(k.dtype)                # [D]
        new_v = tl.load(heads_ptr + (Hkv * g + Hkv + head) * D + offs_d).to(k.dtype)
        if end == length + 1:
            at = (tl.cast(head, tl.int64) * size + length) * D + offs_d
            tl.store(k_ptr + at, new_k)
            tl.store(v_ptr + at, new_v)

        q, qk_scale = x.to(k.dtype), tl.cast(scale, tl.float32) * LOG2E
        m_i, l_i, acc = tl.full((R,), -float("inf"), tl.float32), tl.zeros((R,), tl.float32), tl.zeros((R, D), tl.float32)
        for start in range(low, end, BN):                            # every block has a key that all rows see, so m_new is finite
            keys = start + offs_n
            k, v = (tl.where((keys == length)[:, None], new_k[None, :], k), tl.where((keys == length)[:, None], new_v[None, :], v))
            s = tl.where((keys < end)[None, :], tl.dot(q, tl.trans(k), input_precision=PREC) * qk_scale, -float("inf"))    # [R, BN]
            m_new = tl.maximum(m_i, tl.max(s, 1))
            w, alpha = tl.exp2(s - m_new[:, None]), tl.exp2(m_i - m_new)
            acc = tl.dot(w.to(v.dtype), v, acc * alpha[:, None], input_precision=PREC)
            m_i, l_i = m_new, l_i * alpha + tl.sum(w, 1)
            seen = (keys + BN < length)[:, None]
            k = tl.load(k_ptr + tile + (start + BN) * D, mask=seen & (start + BN < end), other=0.0)
            v = tl.load(v_ptr + tile + (start + BN) * D, mask=seen & (start + BN < end), other=0.0)
        out = (p * Hkv + head) * g + rows
        tl.store(lse_ptr + out, m_i + tl.log2(l_i), mask=rows < g)                           # in base 2
        tl.store(o_ptr + out[:, None] * D + offs_d[None, :], acc / l_i[:, None], mask=(rows < g)[:, None])


@triton.jit
def join_kernel(
    parts_ptr, lse_ptr, length_ptr, o_ptr,                           # (P, H, D), (P, H), (1), (H, D)
    H, piece,
    D: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr,
):
    begin(PDL)
    head, offs_p, offs_d = tl.program_id(0), tl.arange(0, P), tl.arange(0, D)
    there = offs_p * piece <= tl.load(length_ptr)
    wait(PDL)
    lse = tl.load(lse_ptr + offs_p * H + head, mask=there, other=-float("inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    parts = tl.load(parts_ptr + ((offs_p * H + head) * D)[:, None] + offs_d[None, :], mask=there[:, None], other=0.0)    # [P, D]
    o = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(o_ptr + head * D + offs_d, o.to(o_ptr.dtype.element_ty))


def early(x):
    """-> launch options for programs that begin before the kernel ahead has ended, where the GPU knows how."""
    pdl = bool(x.is_cuda and torch.version.cuda) and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}


def tiles(n, cfg):
    """-> the grid for n rows and the options that say how they are shared out."""
    rows, columns, warps = cfg or (FEW if n < ROWS else MANY)
    return (triton.cdiv(n, rows),), {"BR": rows, "BK": columns, "num_warps": warps}


def blocks(D, dtype):
    """-> keys of a block of attention, warps"""
    return (16 if dtype == torch.float32 else 64, 8 if D >= 128 else 4)


def project(x, gain, eps, weights, biases=None, cfg=None):
    """x (C), gain (C) float32, up to three matrices (n, C) and biases (n) -> W RMSNorm(x) + b, one after another, float32."""
    sizes = [len(w) for w in weights] + [0] * (3 - len(weights))
    y, fill = torch.empty(sum(sizes), dtype=torch.float32, device=x.device), [weights[0]] * (3 - len(weights))
    grid, how = tiles(len(y), cfg)
    project_kernel[grid](x, gain, *weights, *fill, *(biases or [gain] * 3), y, *sizes, eps, len(x), biases is not None, **how, **early(x))
    return y


def swiglu(x, gain, eps, gate, up, cfg=None):
    """x (C), gain (C) float32, gate and up (n, C) -> silu(gate n) * (up n), n = RMSNorm(x): (n) like x"""
    y = x.new_empty(len(gate))
    grid, how = tiles(len(gate), cfg)
    swiglu_kernel[grid](x, gain, gate, up, y, len(gate), eps, len(x), **how, **early(x))
    return y


def add(x, y, weight, cfg=None):
    """x += weight y, in place: x (n), y (C), weight (n, C)"""
    grid, how = tiles(len(x), cfg)
    add_kernel[grid](y, weight, x, len(x), len(y), **how, **early(x))


def attend(heads, gains, eps, angles, length, k, v, cfg=None):
    """heads (H + 2 Hkv, D) float32: what `project` gives; gains: (D) each for q and k, or None; angles: cos and sin, (size, D / 2) each;
    length (1): the position of the token; k and v (Hkv, size, D), to which it is added -> (H D) like k"""
    (Hkv, size, D), (block, warps) = k.shape, cfg or blocks(k.shape[2], k.dtype)
    assert k.is_contiguous() and v.is_contiguous()
    H = len(heads) // D - 2 * Hkv
    piece = triton.cdiv(size, block * min(PIECES, max(1, PROGRAMS // Hkv))) * block
    pieces, g = triton.cdiv(size, piece), H // Hkv
    parts, lse = heads.new_empty(pieces, H, D), heads.new_empty(pieces, H)
    o = k.new_empty(H * D)
    attend_kernel[(pieces, Hkv)](heads, *(gains or angles), *angles, length, k, v, parts, lse, Hkv, size, piece, eps, D ** -0.5,
                                 g, max(16, triton.next_power_of_2(g + 1)), D, block, gains is not None,
                                 "ieee" if k.dtype == torch.float32 else "tf32", num_warps=warps, **early(k))
    join_kernel[(H,)](parts, lse, length, o, H, piece, D, triton.next_power_of_2(pieces), num_warps=4, **early(k))
    return o


# What test_all.py builds ahead of time: kernel, argument types, constants, arguments that are multiples of 16, warps, stages,
# architectures
def ahead(kernel, consts, warps, arches, dtype="bf16"):
    wide = {"gain_ptr", "q_gain_ptr", "k_gain_ptr", "cos_ptr", "sin_ptr", "lse_ptr", "heads_ptr", "parts_ptr"}
    wide |= {"y_ptr", "b1_ptr", "b2_ptr", "b3_ptr"} if kernel is project_kernel else {"o_ptr"} if kernel is attend_kernel else set()
    types = {a: "*i64" if a == "length_ptr" else "fp32" if a in ("eps", "scale") else "i32" if not a.endswith("_ptr") else
             "*fp32" if a in wide else f"*{dtype}" for a in kernel.arg_names}
    return kernel, types, {**consts, "PDL": min(arches) >= 90}, (), warps, 3, arches


AOT = []
for arches in ((90, 100, 120), (80,)):
    for (rows, columns, warps), C in ((FEW, 576), (FEW, 9728), (MANY, 2560)):
        how = {"C": C, "BR": rows, "BK": columns}
        AOT += [ahead(project_kernel, {**how, "BIAS": C == 576}, warps, arches), ahead(swiglu_kernel, how, warps, arches),
                ahead(add_kernel, how, warps, arches)]
    for D, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
        (block, warps), (name, prec) = blocks(D, dtype), ("fp32", "ieee") if dtype == torch.float32 else ("bf16", "tf32")
        AOT.append(ahead(attend_kernel, dict(g=4, R=16, D=D, BN=block, NORM=D == 128, PREC=prec), warps, arches, name))
    AOT.append(ahead(join_kernel, {"D": 128, "P": 64}, 4, arches))
