"""2-simplicial attention: Fast and Simplex (Roy et al., arXiv 2507.02754), after Clift et al. (arXiv 1909.00668).

A query scores *pairs*: the logit is trilinear in it, a first and a second key, one softmax runs over all pairs, and what is
averaged is the product of the two values, channel by channel:

    S_ijk = sum_l q_il k_jl k2_kl / sqrt(D)         P_i = softmax of S_i over all pairs (j, k)
    o_i   = sum_jk P_ijk (v_j * v2_k)               j in (i - w1, i], k in (i - w2, i]: self included

k and v own the window w1 (512 in the paper), k2 and v2 own w2 (32); every fourth layer is of this kind. The paper claims, for
models of 2 billion active parameters and up, a lower loss on mathematics and code at equal tokens and a steeper law of scaling.

How to compute it. For a fixed offset d = i - k the pair (i, d) is an ordinary attention row with the query q_i * k2_{i-d} over
(k, v) and the window w1, with result a_id and log-sum-exp e_id. The softmax over pairs joins them:

    o_i = sum_d softmax_d(e_id) (a_id * v2_{i-d})                      a mixture of w2 ordinary attentions

so any flash attention computes it; kernels/simplicial.py is one with pairs as rows. The two windows may change places.

Rotary positions have no place here: turning q, k and k2 alike changes a trilinear form (tested). The GPT therefore leaves them
out in these layers (`attention.rotary`), keeps the last w1 and w2 positions alone when it samples (`attention.windows`) and adds
1 to what projects to k2 and v2 (`attention.offsets`): with k2 = v2 = 1 this is attention with the window w1, so training begins
there. Fresh weights alone make v * v2 tiny.

    python simplicial.py                  the experiments below, on two CPU cores -> results/simplicial-cpu.*
    python simplicial.py --full           the fit of losses to sizes, on one GPU -> results/simplicial-gpu.*
    python train.py --attn simplicial --simplicial-every 4 --w1 512 --w2 32
"""
import functools, json, math, statistics, sys, tempfile, time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from kernels import simplicial as kernel
except ModuleNotFoundError as e:
    if e.name != "triton":
        raise
    kernel = None

SCORES = 2 ** 25                                                     # logits that exist at one time away from the kernel


def check(q, k, v, k2, v2, w1, w2):
    """Raise ValueError, one sentence, unless the shapes fit together and the windows hold at least the query itself."""
    fits = k.shape == v.shape and k2.shape == v2.shape and k.shape[:2] == k2.shape[:2] and q.shape[1] % k.shape[1] == 0
    if not fits or {t.shape[0] for t in (q, k)} != {q.shape[0]} or {t.shape[3] for t in (q, k, k2)} != {q.shape[3]}:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, k2 {tuple(k2.shape)} and v2 {tuple(v2.shape)} "
                         f"do not fit together: (B, H, Tq, D), then (B, Hkv, Tk, D) with Hkv a divisor of H")
    if min(k.shape[2], k2.shape[2]) < q.shape[2] or q.shape[2] < 1:
        raise ValueError(f"{q.shape[2]} queries are more than the {min(k.shape[2], k2.shape[2])} positions they are the last of")
    if min(w1, w2) < 1:
        raise ValueError(f"w1 is {w1} and w2 {w2}; a window holds at least 1 position, the query's own")


def window(x, first, n, w):
    """x (B, H, T, D) -> (B, H, n, w, D): for the positions first ... first + n - 1 the w up to and including each, the newest last;
    zeros before the start. And which of them exist, (n, w)."""
    x = F.pad(x, (0, 0, w - 1, 0))[:, :, first:first + n + w - 1].unfold(2, w, 1).transpose(-1, -2)
    i = torch.arange(first, first + n, device=x.device)[:, None]
    return x, i - torch.arange(w - 1, -1, -1, device=x.device) >= 0


def sarrus(q, k, k2):
    """-> q, k, k2 of twice the width whose trilinear form is the sum over chunks l of three channels of det[q_l; k_l; k2_l]."""
    q, k, k2 = (t.unflatten(-1, (-1, 3)) for t in (q, k, k2))        # (..., D / 3, 3)
    pairs = (q, q), (k.roll(-1, -1), -k.roll(1, -1)), (k2.roll(1, -1), k2.roll(-1, -1))
    return [torch.cat(p, -1).flatten(-2) for p in pairs]             # (..., 2 D)


def reference(q, k, v, k2, v2, *, w1=512, w2=32, determinant=False):
    """The definition, any dtype. q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D) -> (B, H, Tq, D); causal, the
    queries being the last of the positions. determinant: with logits of section 5, which a rotation of q, k and k2 leaves as
    they are (D a multiple of 3). Makes (B, H, Tq, w1, w2) and (B, H, Tq, w1, D) tensors."""
    check(q, k, v, k2, v2, w1, w2)
    Tq, scale = q.shape[2], q.shape[3] ** -0.5
    if determinant:
        q, k, k2 = sarrus(q, k, k2)
    k, v, k2, v2 = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v, k2, v2))                  # (B, H, Tk, D)
    (k, there), (v, _) = (window(t, t.shape[2] - Tq, Tq, min(w1, t.shape[2])) for t in (k, v))                 # (B, H, Tq, w1, D)
    (k2, there2), (v2, _) = (window(t, t.shape[2] - Tq, Tq, min(w2, t.shape[2])) for t in (k2, v2))            # (B, H, Tq, w2, D)
    s = (k * scale) @ (q[..., None, :] * k2).transpose(-1, -2)                                                 # (B, H, Tq, w1, w2)
    s = s.masked_fill(~(there[:, :, None] & there2[:, None]), -torch.inf)
    p = s.flatten(-2).softmax(-1).view(s.shape)
    return ((p @ v2) * v).sum(-2)                                    # sum_j v_j * sum_k p_jk v2_k


def block(q, k, v, k2, v2, visible, there, scale):
    """n queries: q (B, Hkv, g, n, D), the J keys that one of them sees, k and v (B, Hkv, J, D), for each its own second keys,
    k2 and v2 (B, Hkv, n, w2, D); visible (n, J), there (n, w2) -> (B, Hkv, g, n, D). The mixture above, its softmax in one."""
    rows = (q[..., None, :] * k2[:, :, None] * scale)                                        # (B, Hkv, g, n, w2, D)
    s = (rows.flatten(2, 4) @ k.transpose(-1, -2)).unflatten(2, rows.shape[2:5])             # (B, Hkv, g, n, w2, J)
    s = s.masked_fill(~(visible[:, None] & there[:, :, None]), -torch.inf)
    p = s.flatten(-2).softmax(-1).view(s.shape)
    a = (p.flatten(2, 4) @ v).view(rows.shape)                                               # (B, Hkv, g, n, w2, D)
    return (a * v2[:, :, None]).sum(-2)


def lean(q, k, v, k2, v2, w1, w2):
    """attention in PyTorch, a block of queries at a time. What a long block would keep for the backward pass is computed again."""
    if w2 > w1:                                                      # the roles are symmetric: rows take the shorter window
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    dtype, (B, H, Tq, D), Tk, Tk2 = q.dtype, q.shape, k.shape[2], k2.shape[2]
    w1, w2 = min(w1, Tk), min(w2, Tk2)
    q, k, v, k2, v2 = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, k2, v2))
    q, out = q.unflatten(1, (k.shape[1], -1)), []                                            # (B, Hkv, g, Tq, D)
    n = max(1, min(Tq, max(w1 // 2, 16), SCORES // (2 * B * H * w1 * w2)))
    again = torch.is_grad_enabled() and B * H * Tq * w2 * (w1 + n) > SCORES
    for start in range(0, Tq, n):
        i = torch.arange(start, min(start + n, Tq), device=q.device) + Tk - Tq
        first = max(0, int(start + Tk - Tq - w1 + 1))
        j = torch.arange(first, min(start + n, Tq) + Tk - Tq, device=q.device)
        (k2_i, there), (v2_i, _) = (window(t, start + Tk2 - Tq, len(i), w2) for t in (k2, v2))
        visible = (j <= i[:, None]) & (j > i[:, None] - w1)
        span = slice(first, first + len(j))
        args = q[:, :, :, start:start + n], k[:, :, span], v[:, :, span], k2_i, v2_i, visible, there, D ** -0.5
        out.append(checkpoint(block, *args, use_reentrant=False) if again else block(*args))
    return torch.cat(out, 3).flatten(1, 2).to(dtype)                                         # (B, H, Tq, D)


@functools.cache
def complain(why):
    print(f"simplicial: {why}, so PyTorch computes it, many times slower than the kernel", file=sys.stderr)


def attention(q, k, v, k2, v2, *, w1=512, w2=32):
    """2-simplicial attention, as `reference` in shapes and meaning: the Triton kernel on a GPU, `lean` elsewhere. On a GPU it takes
    D of 16, 32, 64 or 128 and float32, float16 or bfloat16. Errors: ValueError if shapes or windows do not fit."""
    check(q, k, v, k2, v2, w1, w2)
    k, v, k2, v2 = (t.to(q.dtype) for t in (k, v, k2, v2))
    if q.is_cuda:
        if kernel and q.shape[3] in kernel.WIDTHS and q.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return kernel.attention(q, k, v, k2, v2, w1, w2)[0]
        complain("there is no Triton here" if not kernel else f"the kernel has no heads of width {q.shape[3]} in {q.dtype}")
    return lean(q, k, v, k2, v2, w1, w2)


# What train.py asks of an attention that is not like softmax attention: which projections to turn by position, which option is
# the window of each (all that is kept to sample on), and what to add to a projection.
attention.rotary = ()
attention.windows = {"k": "w1", "v": "w1", "k2": "w2", "v2": "w2"}
attention.offsets = {"k2": 1.0, "v2": 1.0}


# ---------------------------------------------------------------------------------------------------------------------
# Controls for the experiments. Below T = 32k such a layer costs more than global attention, so what it gains over a plain
# window, over two attentions multiplied, over a gate and over as many parameters elsewhere is the question.

def local(q, k, v, *, w1=32):
    """Softmax attention through the window w1."""
    i, j = (torch.arange(n, device=q.device) + k.shape[2] - n for n in (q.shape[2], k.shape[2]))
    seen = (j <= i[:, None]) & (j > i[:, None] - w1)                 # (Tq, Tk)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.shape[1] != k.shape[1])


def product(q, k, v, k2, v2, *, w1=32, w2=8):
    """Two softmax attentions multiplied: the trilinear form of additive logits, as many parameters, almost free."""
    return local(q, k, v, w1=w1) * local(q, k2, v2, w1=w2)


def gate(q, k, v, k2, v2, *, w1=32):
    """w2 = 1: attention with the query q * k2, its result times v2. Multiplicative, but a function of pairs of positions."""
    g = q.shape[1] // k.shape[1]
    k2, v2 = (t[:, :, -q.shape[2]:].repeat_interleave(g, 1) for t in (k2, v2))
    return local(q * k2, k, v, w1=w1) * v2


def variant(function, rotary=(), offsets=attention.offsets, **options):
    """function under another name for train.py, with other attributes or options."""
    wrapped = functools.partial(function, **options)
    wrapped.rotary, wrapped.windows, wrapped.offsets = rotary, getattr(function, "windows", {}), offsets
    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Match3: are there j, k <= i with x_i + x_j + x_k = 0 modulo M?

def match3(x, M):
    """x (B, T) -> (B, T) bool, from the definition."""
    near = torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None]
    hit = (x[:, :, None, None] + x[:, None, :, None] + x[:, None, None]) % M == 0            # (B, i, j, k)
    return (hit & near[None, :, :, None] & near[None, :, None]).flatten(-2).any(-1)


def match3_by_hand(x, M, f=attention):
    """One head of width 5, no training: cos(a + b + c) is trilinear in four products of a cosine and a sine each, and the pair
    of the blank at the start scores as much as a match. Values 1, for the blank 0: beta matching pairs give beta / (beta + 1)."""
    T = x.shape[1]
    t = math.log(10 * (T + 1) ** 2) / (1 - math.cos(2 * math.pi / M))                        # others weigh a tenth together
    angle = 2 * math.pi / M * x
    c, s, one = angle.cos(), angle.sin(), torch.ones_like(angle)
    def heads(*channels, blank):                                     # -> (B, 1, 1 + T, 5), the blank first
        token = torch.stack(channels, -1)
        return torch.cat([torch.tensor(blank).to(token).expand(len(x), 1, 5), token], 1)[:, None]
    q = heads(c, c, s, s, one, blank=[0., 0, 0, 0, 1]) * t * 5 ** 0.5
    k = heads(c, -s, -c, -s, 0 * one, blank=[0., 0, 0, 0, 1])
    k2 = heads(c, s, s, c, 0 * one, blank=[0., 0, 0, 0, 1])
    v = heads(*[one] * 5, blank=[0.] * 5)
    return f(q, k, v, k2, v, w1=T + 1, w2=T + 1)[:, 0, 1:, 0] > 0.4
