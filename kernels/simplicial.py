import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
PIECE = 64                                                           # positions whose k2 and v2 one program gathers
HEAD = tl.constexpr(16)                                              # keys of a block at the left edge of a window


@triton.jit
def pairs(t, g, Tq, off, w2, NQ: tl.constexpr, BD: tl.constexpr):
    """The rows of row tile t: NQ queries with BD offsets each. Queries are counted position by position, the g heads of a KV
    group side by side. -> row of q, position, offset, whether that pair exists, all [NQ * BD]; first and last position."""
    r, chunks = tl.arange(0, NQ * BD), tl.cdiv(w2, BD)
    n, d = t // chunks * NQ + r // BD, t % chunks * BD + r % BD
    i = tl.minimum(n // g, Tq - 1)
    lo, hi = tl.minimum(t // chunks * NQ // g, Tq - 1), tl.minimum((t // chunks * NQ + NQ - 1) // g, Tq - 1)
    return n % g * Tq + i, i + off, d, (n < Tq * g) & (d < w2) & (d <= i + off), lo + off, hi + off


@triton.jit
def product(x_ptr, y_ptr, row, k, valid, factor, D: tl.constexpr):
    """factor * x[row] * y[k], rounded once to the dtype of x; 0 where the pair does not exist. [BM, D]"""
    offs_d, mask = tl.arange(0, D)[None, :], valid[:, None]
    x = tl.load(x_ptr + row[:, None] * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + k[:, None] * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    return (x * factor * y).to(x_ptr.dtype.element_ty)


@triton.jit
def keys(x_ptr, start, end, BN: tl.constexpr, D: tl.constexpr):
    offs_n = start + tl.arange(0, BN)
    return tl.load(x_ptr + offs_n[:, None] * D + tl.arange(0, D)[None, :], mask=(offs_n < end)[:, None], other=0.0)   # [BN, D]


@triton.jit
def whole_keys(x_ptr, start, BN: tl.constexpr, D: tl.constexpr):
    return tl.load(x_ptr + (start + tl.arange(0, BN))[:, None] * D + tl.arange(0, D)[None, :])                        # [BN, D]


@triton.jit
def visible(i, j, w1, end):
    return (j <= i) & (j > i - w1) & (j < end)


@triton.jit
def attend(acc, m_i, l_i, a, k, v, i, start, end, w1, edge, BN: tl.constexpr, PREC: tl.constexpr):
    """One block of keys of an online softmax; `edge`: some row does not see all of it."""
    s = tl.dot(a, tl.trans(k), input_precision=PREC)                 # [BM, BN], in units of log 2
    if edge:
        s = tl.where(visible(i[:, None], start + tl.arange(0, BN)[None, :], w1, end), s, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)            # a row with no key yet: any finite number will do
    p, alpha = tl.exp2(s - m_safe[:, None]), tl.exp2(m_i - m_safe)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PREC)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, o_ptr, lse_ptr,             # (B, H, Tq, D), (B, Hkv, Tk, D) four times, o, (B, H, Tq)
    g, Tq, Tk, w1, w2, scale,
    D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    bh, chunks, off = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD), Tk - Tq
    q_ptr += bh * g * Tq * D
    o_ptr += bh * g * Tq * D
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk * D
    v2_ptr += bh * Tk * D
    BM: tl.constexpr = NQ * BD
    RQ: tl.constexpr = max(NQ, 16)                                   # the least that a product takes
    factor = tl.cast(scale, tl.float32) * LOG2E
    dtype = q_ptr.dtype.element_ty
    mine = tl.arange(0, RQ)[:, None] == (tl.arange(0, BM) // BD)[None, :]                    # [RQ, BM]: rows of a query

    o, lse = tl.zeros((RQ, D), tl.float32), tl.full((RQ,), -float("inf"), tl.float32)
    t = tl.program_id(0) * chunks
    row, i, d, valid, lo, hi = pairs(t, g, Tq, off, w2, NQ, BD)
    a = product(q_ptr, k2_ptr, row, i - d, valid, factor, D)         # [BM, D]
    first = tl.maximum(lo - w1 + 1, 0)
    body = hi + 1 - tl.minimum(w1, hi + 1) // BN * BN                # as many whole blocks as the last position sees
    for c in range(chunks):
        row, i, d, valid, lo, hi = pairs(t + c, g, Tq, off, w2, NQ, BD)
        acc = tl.zeros((BM, D), tl.float32)
        m_i, l_i = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
        for start in tl.range(first, body, HEAD, num_stages=1):
            k, v = keys(k_ptr, start, body, HEAD, D), keys(v_ptr, start, body, HEAD, D)
            acc, m_i, l_i = attend(acc, m_i, l_i, a, k, v, i, start, body, w1, True, HEAD, PREC)
        for start in range(body, hi + 1, BN):
            k, v = whole_keys(k_ptr, start, BN, D), whole_keys(v_ptr, start, BN, D)
            acc, m_i, l_i = attend(acc, m_i, l_i, a, k, v, i, start, hi + 1, w1, start + BN > lo + 1, BN, PREC)

        m_i = tl.where(valid, m_i, -float("inf"))
        m_q = tl.max(tl.where(mine, m_i[None, :], -float("inf")), 1)                         # [RQ]: over the offsets
        m_q = tl.where(m_q == -float("inf"), 0.0, m_q)
        p = tl.exp2(m_i - tl.sum(tl.where(mine, m_q[:, None], 0.0), 0))                      # [BM]
        l_q = tl.sum(tl.where(mine, (p * l_i)[None, :], 0.0), 1)                             # [RQ]
        l_q = tl.where(l_q == 0.0, 1.0, l_q)
        p /= tl.sum(tl.where(mine, l_q[:, None], 0.0), 0)
        offs = (i - d)[:, None] * D + tl.arange(0, D)[None, :]
        v2 = tl.load(v2_ptr + offs, mask=valid[:, None], other=0.0).to(tl.float32)           # [BM, D]
        part = tl.dot(mine.to(dtype), (acc * p[:, None] * v2).to(dtype), input_precision=PREC)                 # [RQ, D]
        lse_c = m_q + tl.log2(l_q)
        new = tl.maximum(lse, lse_c)
        new += tl.log2(tl.exp2(lse - new) + tl.exp2(lse_c - new))
        o = o * tl.exp2(lse - new)[:, None] + part * tl.exp2(lse_c - new)[:, None]
        lse = new
        if c + 1 < chunks:
            row, i, d, valid, lo, hi = pairs(t + c + 1, g, Tq, off, w2, NQ, BD)
            a = product(q_ptr, k2_ptr, row, i - d, valid, factor, D)
        else:
            a = tl.zeros((BM, D), dtype)

    n = tl.program_id(0) * NQ + tl.arange(0, RQ)
    mask = (tl.arange(0, RQ) < NQ) & (n < g * Tq)
    row = n % g * Tq + n // g
    tl.store(o_ptr + row[:, None] * D + tl.arange(0, D)[None, :], o.to(dtype), mask=mask[:, None])
    tl.store(lse_ptr + bh * g * Tq + row, lse * LN2, mask=mask)


@triton.jit
def block_gradients(u, w, a, h, k, v, lse, delta, i, start, end, w1, edge, BN: tl.constexpr, PREC: tl.constexpr):
    """One block of keys for a tile of rows: U += P V, W += dS K, where dS = P * (dP - delta)."""
    p = tl.exp2(tl.dot(a, tl.trans(k), input_precision=PREC) - lse[:, None])                 # [BM, BN]
    if edge:
        p = tl.where(visible(i[:, None], start + tl.arange(0, BN)[None, :], w1, end), p, 0.0)
    u = tl.dot(p.to(v.dtype), v, u, input_precision=PREC)            # [BM, D]
    ds = p * (tl.dot(h, tl.trans(v), input_precision=PREC) - delta[:, None])
    return u, tl.dot(ds.to(k.dtype), k, w, input_precision=PREC)


@triton.jit
def both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, i, d, valid, factor, w1, w2, D: tl.constexpr):
    """-> q * k2 and do * v2 of each pair, the second 0 where a single pair is seen: P = 1 has no derivative, dS must be 0."""
    a = product(q_ptr, k2_ptr, row, i - d, valid, factor, D)
    return a, product(do_ptr, v2_ptr, row, i - d, valid & (i > 0) & (w1 * w2 > 1), 1.0, D)


@triton.jit
def add_rows(x_ptr, rows, mask, x, D: tl.constexpr):
    ptrs = x_ptr + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=mask[:, None], other=0.0) + x, mask=mask[:, None])


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, # as in the forward; do like q, delta like lse
    dq_ptr, dk2_ptr, dv2_ptr,                                        # like q; (B, Hkv, pieces, room, D) twice, float32
    g, Tq, Tk, w1, w2, scale, piece, room,
    D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    bh, chunks, off = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD), Tk - Tq
    q_ptr += bh * g * Tq * D
    do_ptr += bh * g * Tq * D
    dq_ptr += bh * g * Tq * D
    lse_ptr += bh * g * Tq
    delta_ptr += bh * g * Tq
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk * D
    v2_ptr += bh * Tk * D
    dk2_ptr += (bh * tl.num_programs(0) + tl.program_id(0)) * room * D
    dv2_ptr += (bh * tl.num_programs(0) + tl.program_id(0)) * room * D
    BM: tl.constexpr = NQ * BD
    RQ: tl.constexpr = max(NQ, 16)
    RK: tl.constexpr = max(2 * BD, 2 * NQ, 16)                       # at least the NQ + BD - 1 positions of k2 in a tile
    scale = tl.cast(scale, tl.float32)
    dtype = q_ptr.dtype.element_ty
    offs_d = tl.arange(0, D)[None, :]

    tiles = piece * g // NQ * chunks
    t0 = tl.program_id(0) * tiles
    row, i, d, valid, lo, hi = pairs(t0, g, Tq, off, w2, NQ, BD)
    a, h = both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, i, d, valid, scale * LOG2E, w1, w2, D)
    dq = tl.zeros((RQ, D), tl.float32)
    for t in range(t0, tl.minimum(t0 + tiles, tl.cdiv(Tq * g, NQ) * chunks)):
        row, i, d, valid, lo, hi = pairs(t, g, Tq, off, w2, NQ, BD)
        lse = tl.load(lse_ptr + row, mask=valid, other=float("inf")) * LOG2E                 # exp2(s - inf) = 0
        delta = tl.load(delta_ptr + row, mask=valid & (i > 0) & (w1 * w2 > 1), other=0.0)
        u, w = tl.zeros((BM, D), tl.float32), tl.zeros((BM, D), tl.float32)
        body = hi + 1 - tl.minimum(w1, hi + 1) // BN * BN
        for start in tl.range(tl.maximum(lo - w1 + 1, 0), body, HEAD, num_stages=1):
            k, v = keys(k_ptr, start, body, HEAD, D), keys(v_ptr, start, body, HEAD, D)
            u, w = block_gradients(u, w, a, h, k, v, lse, delta, i, start, body, w1, True, HEAD, PREC)
        for start in range(body, hi + 1, BN):
            k, v = whole_keys(k_ptr, start, BN, D), whole_keys(v_ptr, start, BN, D)
            u, w = block_gradients(u, w, a, h, k, v, lse, delta, i, start, hi + 1, w1, start + BN > lo + 1, BN, PREC)

        w *= scale
        k2 = tl.load(k2_ptr + (i - d)[:, None] * D + offs_d, mask=valid[:, None], other=0.0)                   # [BM, D]
        r = tl.arange(0, BM)
        mine = (tl.arange(0, RQ)[:, None] == (r // BD)[None, :]).to(dtype)                   # [RQ, BM]: the rows of a query
        dq = tl.where(t % chunks == 0, 0.0, dq) + tl.dot(mine, (w * k2).to(dtype), input_precision=PREC)
        n = t // chunks * NQ + tl.arange(0, RQ)
        mask = (tl.arange(0, RQ) < NQ) & (n < g * Tq)
        tl.store(dq_ptr + (n % g * Tq + n // g)[:, None] * D + offs_d, dq.to(dtype), mask=mask[:, None])

        q = tl.load(q_ptr + row[:, None] * D + offs_d, mask=valid[:, None], other=0.0)       # [BM, D]
        do = tl.load(do_ptr + row[:, None] * D + offs_d, mask=valid[:, None], other=0.0)
        last = lo - t % chunks * BD - BD + 1                         # the oldest position of k2 that this tile can meet
        there = (tl.arange(0, RK)[:, None] + last == (i - d)[None, :]).to(dtype)             # [RK, BM]: the rows of a position
        rows = tl.arange(0, RK) + last - off + room - piece * (tl.program_id(0) + 1)         # in this program's room
        mask = (rows >= 0) & (rows < room)
        add_rows(dk2_ptr, rows, mask, tl.dot(there, (w * q).to(dtype), input_precision=PREC), D)
        add_rows(dv2_ptr, rows, mask, tl.dot(there, (u * do).to(dtype), input_precision=PREC), D)
        row, i, d, valid, lo, hi = pairs(t + 1, g, Tq, off, w2, NQ, BD)
        a, h = both_products(q_ptr, do_ptr, k2_ptr, v2_ptr, row, i, d, valid, scale * LOG2E, w1, w2, D)
        tl.debug_barrier()                                           # other threads add to these rows next


@triton.jit
def columns_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    g, Tq, Tk, w1, w2, scale,
    D: tl.constexpr, NQ: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):
    bh, chunks, off = tl.program_id(1).to(tl.int64), tl.cdiv(w2, BD), Tk - Tq
    q_ptr += bh * g * Tq * D
    do_ptr += bh * g * Tq * D
    lse_ptr += bh * g * Tq
    delta_ptr += bh * g * Tq
    k_ptr += bh * Tk * D
    v_ptr += bh * Tk * D
    k2_ptr += bh * Tk * D
    v2_ptr += bh * Tk * D
    dk_ptr += bh * Tk * D
    dv_ptr += bh * Tk * D
    start = tl.program_id(0) * BN
    j = start + tl.arange(0, BN)
    k, v = keys(k_ptr, start, Tk, BN, D), keys(v_ptr, start, Tk, BN, D)
    dk, dv = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
    factor = tl.cast(scale, tl.float32) * LOG2E

    oldest, newest = tl.maximum(start, off) - off, tl.minimum(start + BN + w1 - 1, Tk) - off                  # of the queries
    first, last = oldest * g // NQ, tl.cdiv(tl.maximum(newest, oldest) * g, NQ)
    for t in range(first * chunks, last * chunks):
        row, i, d, valid, lo, hi = pairs(t, g, Tq, off, w2, NQ, BD)
        many = valid & (i > 0) & (w1 * w2 > 1)                       # of a single pair P = exp2(0 - 0) and dK gets nothing
        a = product(q_ptr, k2_ptr, row, i - d, many, factor, D)
        h = product(do_ptr, v2_ptr, row, i - d, valid, 1.0, D)
        lse = tl.where(valid, tl.load(lse_ptr + row, mask=many, other=0.0) * LOG2E, float("inf"))
        delta = tl.load(delta_ptr + row, mask=valid, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(a), input_precision=PREC) - lse[None, :])             # [BN, BM]
        if (start + BN > lo + 1) | (hi - w1 >= start):
            p = tl.where(visible(i[None, :], j[:, None], w1, Tk), p, 0.0)
        dv = tl.dot(p.to(h.dtype), h, dv, input_precision=PREC)
        ds = p * (tl.dot(v, tl.trans(h), input_precision=PREC) - delta[None, :])
        dk = tl.dot(ds.to(a.dtype), a, dk, input_precision=PREC)
    offs = j[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + offs, (dk * LN2).to(k.dtype), mask=(j < Tk)[:, None])
    tl.store(dv_ptr + offs, dv.to(v.dtype), mask=(j < Tk)[:, None])


# (D, bytes of an element, kernel) -> rows of a tile, keys of a block, warps, stages
def config(kernel, D, size):
    if size == 4:
        return 32, 32, 4, 1
    return {"forward": {128: (128, 64, 8, 2)}.get(D, (128, 64, 8, 3)), "rows": (64, 32, 4, 2), "columns": (64, 64, 4, 2)}[kernel]


def shape_of_tile(w2, rows):
    """-> queries and offsets of a tile: the fewest offsets that hold w2, up to 32."""
    offsets = min(32, rows, triton.next_power_of_2(w2))
    return rows // offsets, offsets


def sizes(q, k, w1, w2):
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    return B * Hkv, H // Hkv, Tq, Tk, min(w1, Tk), min(w2, Tk), D ** -0.5


def precision(q):
    return "ieee" if q.dtype == torch.float32 else "tf32"            # the latter says nothing to 16 bit operands


def forward(q, k, v, k2, v2, w1, w2, cfg=None):
    """-> o like q, lse (B, H, Tq) float32 in natural logarithms."""
    if w2 > w1:                                                      # the roles are symmetric; the rows take the shorter window
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    heads, g, Tq, Tk, w1, w2, scale = sizes(q, k, w1, w2)
    rows, block, warps, stages = cfg or config("forward", q.shape[3], q.element_size())
    NQ, BD = shape_of_tile(w2, rows)
    forward_kernel[triton.cdiv(g * Tq, NQ), heads](q, k, v, k2, v2, o, lse, g, Tq, Tk, w1, w2, scale, q.shape[3], NQ, BD, block,
                                                   precision(q), num_warps=warps, num_stages=stages)
    return o, lse


def backward(do, q, k, v, k2, v2, o, lse, w1, w2, cfg_rows=None, cfg_columns=None):
    """-> dq, dk, dv, dk2, dv2"""
    if w2 > w1:
        dq, dk2, dv2, dk, dv = backward(do, q, k2, v2, k, v, o, lse, w2, w1, cfg_rows, cfg_columns)
        return dq, dk, dv, dk2, dv2
    heads, g, Tq, Tk, w1, w2, scale = sizes(q, k, w1, w2)
    D, delta = q.shape[3], (do.float() * o.float()).sum(-1)          # (B, H, Tq)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    rows, block, warps, stages = cfg_columns or config("columns", D, q.element_size())
    NQ, BD = shape_of_tile(w2, rows)
    columns_kernel[triton.cdiv(Tk, block), heads](q, k, v, k2, v2, do, lse, delta, dk, dv, g, Tq, Tk, w1, w2, scale, D, NQ, BD, block,
                                                  precision(q), num_warps=warps, num_stages=stages)

    rows, block, warps, stages = cfg_rows or config("rows", D, q.element_size())
    NQ, BD = shape_of_tile(w2, rows)
    piece = max(NQ, PIECE)
    pieces, back = triton.cdiv(Tq, piece), triton.cdiv(piece + w2 - 1, piece)
    dk2, dv2 = (torch.zeros(heads, pieces, back * piece, D, dtype=torch.float32, device=q.device) for _ in "kv")
    rows_kernel[pieces, heads](q, k, v, k2, v2, do, lse, delta, dq, dk2, dv2, g, Tq, Tk, w1, w2, scale, piece, back * piece, D, NQ, BD,
                               block, precision(q), num_warps=warps, num_stages=stages)

    def joined(parts):                                               # each piece reaches into the back - 1 before it
        whole = parts.new_zeros(heads, pieces + back - 1, piece, D)
        for r in range(back):
            whole[:, r:r + pieces] += parts[:, :, r * piece:(r + 1) * piece]
        first = (back - 1) * piece - (Tk - Tq)                       # where position 0 is
        whole = whole.flatten(1, 2)[:, max(first, 0):first + Tk]
        return F.pad(whole, (0, 0, max(-first, 0), 0)).view(k.shape).to(k.dtype)             # (B, Hkv, Tk, D)
    return dq, dk, dv, joined(dk2), joined(dv2)
