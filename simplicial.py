"""2-simplicial attention: Fast and Simplex (Roy et al., arXiv 2507.02754).

A query scores *pairs* of keys. The logit is trilinear in the query, a first key
and a second key, one softmax runs over all pairs, and the output is the mean of
the products of their two values:

    S_ijk = sum_l q_il k_jl k2_kl / sqrt(D)    P_i = softmax of S_i over (j, k)
    o_i   = sum_jk P_ijk (v_j * v2_k)     j in (i - w1, i], k in (i - w2, i]

i, j and k are positions, l a channel, and * multiplies elementwise. k and v
have a window of w1 positions (512 in the paper), k2 and v2 one of w2 (32); both
include the query's own position. Every fourth layer is of this kind. The paper
claims, for models of 2 billion active parameters and up, a lower loss on
mathematics and code after as many tokens, and a steeper scaling law.

How to compute it: for a fixed distance d = i - k, ordinary attention with the
query q_i * k2_{i-d} over (k, v) and the window w1 gives an output a_id and a
log-sum-exp e_id. The softmax over pairs is a mixture of these w2 ordinary
attentions, so any flash attention can compute it:

    o_i = sum_d softmax_d(e_id) (a_id * v2_{i-d})

Where we depart from the paper: these layers have no RoPE (`attention.rotary`),
because a trilinear form changes when q, k and k2 are rotated by the same angle.
The authors' code adds 1/D to k2 and 1 to v2, since v * v2 is tiny with
untrained weights. The paper does not mention this, and we do not do it.

    python simplicial.py    Match3 and function composition
    python train.py --attn softmax,softmax,softmax,simplicial:w1=512:w2=32
"""

import warnings

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from kernels import simplicial as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

LOGITS_AT_ONCE = 2**25  # how many logits attention_torch holds in memory


def check(q, k, v, k2, v2, w1, w2):
    """Raise ValueError unless the shapes fit together and windows have at least 1 position."""
    tensors = {"q": q, "k": k, "v": v, "k2": k2, "v2": v2}
    fits = all(t.dim() == 4 for t in tensors.values())
    fits = fits and k.shape == v.shape and k2.shape == v2.shape
    fits = fits and q.shape[0] == k.shape[0] == k2.shape[0] and k.shape[1] == k2.shape[1] > 0
    fits = fits and q.shape[1] % k.shape[1] == 0 and q.shape[3] == k.shape[3] == k2.shape[3] > 0
    if not fits:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(
            f"{shapes} do not fit together: q must be (B, H, Tq, D), the others (B, Hkv, Tk, D) "
            f"with Hkv a divisor of H"
        )
    Tk = min(k.shape[2], k2.shape[2])
    if Tk < q.shape[2]:
        raise ValueError(f"{q.shape[2]} queries cannot be the last of {Tk} positions")
    if min(w1, w2) < 1:
        raise ValueError(f"w1 is {w1} and w2 is {w2}; a window holds at least 1 position")


def get_windows(x, start, n, w):
    """Return x at positions i - w + 1 ... i, for each i in start ... start + n - 1.

    x (B, H, T, D) -> windows (B, H, n, w, D), and exists (n, w): False before position 0.
    """
    padded = F.pad(x, (0, 0, w - 1, 0))[:, :, start : start + n + w - 1]
    windows = padded.unfold(2, w, 1).transpose(-1, -2)  # (B, H, n, w, D)
    positions = torch.arange(start, start + n, device=x.device)[:, None]
    exists = positions - torch.arange(w - 1, -1, -1, device=x.device) >= 0  # (n, w)
    return windows, exists


def reference(q, k, v, k2, v2, *, w1=512, w2=32):
    """Compute causal 2-simplicial attention by its definition, in any dtype.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D) -> (B, H, Tq, D). The last
    query is at the last position of the keys, as in decoding with a KV cache. Makes tensors of
    shape (B, H, Tq, w1, w2) and (B, H, Tq, w1, D), so it is for tests.
    """
    check(q, k, v, k2, v2, w1, w2)
    _, H, Tq, D = q.shape
    Tk = k.shape[2]
    Tk2 = k2.shape[2]
    w1 = min(w1, Tk)
    w2 = min(w2, Tk2)
    k, v, k2, v2 = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v, k2, v2))  # H heads
    # query 0 is at position Tk - Tq of k and v, and at Tk2 - Tq of k2 and v2
    k, exists = get_windows(k, Tk - Tq, Tq, w1)  # (B, H, Tq, w1, D), (Tq, w1)
    v, _ = get_windows(v, Tk - Tq, Tq, w1)
    k2, exists2 = get_windows(k2, Tk2 - Tq, Tq, w2)  # (B, H, Tq, w2, D), (Tq, w2)
    v2, _ = get_windows(v2, Tk2 - Tq, Tq, w2)

    # logits s_jk = k_j . (q * k2_k), softmax over the pairs (j, k), and sum_j v_j sum_k p_jk v2_k
    s = (k * D**-0.5) @ (q[..., None, :] * k2).transpose(-1, -2)  # (B, H, Tq, w1, w2)
    s = s.masked_fill(~(exists[:, :, None] & exists2[:, None]), -torch.inf)
    p = s.flatten(-2).softmax(-1).view(s.shape)
    return ((p @ v2) * v).sum(-2)


# --------------------------------------------------------------------------------------------------
# inf and NaN. A matrix product adds 0 * inf = NaN to queries that the mask hides the key from, so
# one bad position would spoil others.


class FillGradient(torch.autograd.Function):
    """Return x unchanged; in the backward pass, set the gradient to NaN where `mask` is True."""

    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(ctx.saved_tensors[0], torch.nan), None


def any_in_window(flags, w):
    """flags (..., T) -> (..., T): whether one of flags[i - w + 1 ... i] is True, for each i."""
    count = F.pad(flags.cumsum(-1), (w, 0))
    return count[..., w:] > count[..., :-w]


def remove_nonfinite(q, k, v, k2, v2, w1, w2):
    """Replace inf and NaN by 0. Return q, k, v, k2, v2 and sees_bad (B, H, Tq).

    sees_bad is True for queries with inf or NaN in themselves or in their windows. The caller sets
    their outputs to NaN; the gradients of all that these outputs depend on become NaN here.
    """
    _, Hkv, Tk, _ = k.shape
    Tk2 = k2.shape[2]
    Tq = q.shape[2]

    # which queries see inf or NaN; query 0 is at position Tk - Tq of k and v
    is_bad = ~(k.isfinite() & v.isfinite()).all(-1)  # (B, Hkv, Tk)
    is_bad2 = ~(k2.isfinite() & v2.isfinite()).all(-1)  # (B, Hkv, Tk2)
    sees_bad = any_in_window(is_bad, w1)[..., Tk - Tq :]  # (B, Hkv, Tq)
    sees_bad = sees_bad | any_in_window(is_bad2, w2)[..., Tk2 - Tq :]
    sees_bad = sees_bad.repeat_interleave(q.shape[1] // Hkv, 1)  # (B, H, Tq)
    sees_bad = sees_bad | ~q.isfinite().all(-1)

    # which keys such a query sees: key j is seen from j ... j + w - 1, a window in reversed order
    by_kv_head = sees_bad.unflatten(1, (Hkv, -1)).any(2)  # (B, Hkv, Tq)
    reversed1 = F.pad(by_kv_head, (Tk - Tq, 0)).flip(-1)  # (B, Hkv, Tk)
    reversed2 = F.pad(by_kv_head, (Tk2 - Tq, 0)).flip(-1)  # (B, Hkv, Tk2)
    seen = any_in_window(reversed1, w1).flip(-1)
    seen2 = any_in_window(reversed2, w2).flip(-1)

    cleaned = []
    for t, mask in (q, sees_bad), (k, seen), (v, seen), (k2, seen2), (v2, seen2):
        t = FillGradient.apply(t, mask[..., None])
        cleaned.append(torch.where(t.isfinite(), t, 0))
    return *cleaned, sees_bad


# --------------------------------------------------------------------------------------------------
# The fast path in PyTorch


def attend(q, k, v, k2, v2, is_visible, exists, scale):
    """Attend from a block of n queries: the w2 ordinary attentions, with one softmax over all.

    q        (B, Hkv, g, n, D)      g = H / Hkv query heads share a KV head
    k, v     (B, Hkv, J, D)         the J keys that any of these queries sees
    k2, v2   (B, Hkv, n, w2, D)     each query's own window
    is_visible (n, J), exists (n, w2): False outside the windows. Returns (B, Hkv, g, n, D).
    """
    # logits: each query with each k2 of its window makes one query of ordinary attention
    products = q[..., None, :] * k2[:, :, None] * scale  # (B, Hkv, g, n, w2, D)
    s = products.flatten(2, 4) @ k.transpose(-1, -2)  # (B, Hkv, g n w2, J)
    s = s.unflatten(2, products.shape[2:5])  # (B, Hkv, g, n, w2, J)
    s = s.masked_fill(~(is_visible[:, None] & exists[:, :, None]), -torch.inf)
    # softmax over all pairs (w2, J), then the sum over J, then that over w2
    p = s.flatten(-2).softmax(-1).view(s.shape)
    a = (p.flatten(2, 4) @ v).view(products.shape)  # (B, Hkv, g, n, w2, D)
    return (a * v2[:, :, None]).sum(-2)


def attention_torch(q, k, v, k2, v2, *, w1=512, w2=32, logits_at_once=LOGITS_AT_ONCE):
    """Compute 2-simplicial attention in PyTorch, block by block of queries, in float32 or float64.

    If all blocks together have more than `logits_at_once` logits, the backward recomputes them.
    """
    if q.numel() == 0:  # an empty result that still depends on every input
        return q + 0 * sum(t.sum() for t in (k, v, k2, v2))
    if w2 > w1:  # both keys play the same role: let w2 be the shorter window
        k, v, k2, v2 = k2, v2, k, v
        w1, w2 = w2, w1
    dtype = q.dtype
    B, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    Tk2 = k2.shape[2]
    w1 = min(w1, Tk)
    w2 = min(w2, Tk2)
    q, k, v, k2, v2 = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, k2, v2))
    q, k, v, k2, v2, sees_bad = remove_nonfinite(q, k, v, k2, v2, w1, w2)
    q = q.unflatten(1, (Hkv, -1))  # (B, Hkv, g, Tq, D)

    # n queries per block see up to w1 + n keys, and w2 second keys each
    if torch.compiler.is_compiling():  # torch.compile would unroll the loop for every length
        n = Tq
    else:
        n = max(1, min(Tq, max(w1 // 2, 16), logits_at_once // (2 * B * H * w1 * w2)))
    recompute = torch.is_grad_enabled() and B * H * Tq * w2 * (w1 + n) > logits_at_once
    outputs = []
    for start in [0] if n == Tq else range(0, Tq, n):
        # positions i of the queries, and j of the keys that they see: j in (i - w1, i]
        end = min(start + n, Tq)
        first_key = max(0, start + Tk - Tq - w1 + 1)
        end_key = end + Tk - Tq
        i = torch.arange(start, end, device=q.device)[:, None] + Tk - Tq
        j = torch.arange(first_key, end_key, device=q.device)
        is_visible = (j <= i) & (j > i - w1)  # (n, J)
        keys = k[:, :, first_key:end_key]
        values = v[:, :, first_key:end_key]
        k2_windows, exists = get_windows(k2, start + Tk2 - Tq, end - start, w2)
        v2_windows, _ = get_windows(v2, start + Tk2 - Tq, end - start, w2)

        # attend, without autocast, which would undo the float32
        tensors = q[:, :, :, start:end], keys, values, k2_windows, v2_windows, is_visible, exists
        with torch.autocast(q.device.type, enabled=False):
            if recompute:
                outputs.append(checkpoint(attend, *tensors, D**-0.5, use_reentrant=False))
            else:
                outputs.append(attend(*tensors, D**-0.5))
    o = torch.cat(outputs, 3).flatten(1, 2)  # (B, H, Tq, D)
    return o.masked_fill(sees_bad[..., None], torch.nan).to(dtype)


# --------------------------------------------------------------------------------------------------
# The public function


@torch.compiler.assume_constant_result  # torch.compile calls it once and does not trace it
def warn_fallback(reason):
    warnings.warn(f"2-simplicial attention runs in PyTorch, which is many times slower: {reason}")


def attention(q, k, v, k2, v2, *, w1=512, w2=32):
    """Compute 2-simplicial attention; shapes as in `reference`, or ValueError if they do not fit.

    Runs kernels/simplicial.py on a GPU, else PyTorch. The kernel supports head dimensions 16, 32,
    64 and 128 in float32, float16 and bfloat16.
    """
    check(q, k, v, k2, v2, w1, w2)
    k, v, k2, v2 = (t.to(q.dtype) for t in (k, v, k2, v2))
    if q.is_cuda and q.dtype != torch.float64:
        if kernel is None:
            warn_fallback("pip install triton")
        elif q.shape[3] not in kernel.WIDTHS:
            warn_fallback(f"the kernel has no heads of width {q.shape[3]}")
        else:
            return kernel.attention(q, k, v, k2, v2, w1, w2)[0]
    return attention_torch(q, k, v, k2, v2, w1=w1, w2=w2)


attention.rotary = ()  # inputs that get RoPE
attention.windows = {"k": "w1", "v": "w1", "k2": "w2", "v2": "w2"}  # which option is its window


def main(argv=None):
    """Train on Match3 and function composition; write results/simplicial-cpu.json and .png."""
    from experiments.simplicial import main as study

    return study(argv, __doc__)


if __name__ == "__main__":
    from support import cli

    cli.run_main(main)
