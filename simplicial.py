"""2-simplicial attention: Fast and Simplex (Roy et al., arXiv 2507.02754).

A query scores *pairs* of keys: a first key from k and a second key from k2. One
softmax runs over all pairs, and the output is the mean, with these weights, of
the products of the pair's two values, from v and v2:

    S_ijc = sum_l q_il k_jl k2_cl / sqrt(D)    P_i = softmax of S_i over (j, c)
    o_i   = sum_jc P_ijc (v_j * v2_c)

i, j and c are the positions of the query and of its two keys, l is a channel,
and * multiplies elementwise. Each query sees two windows (w1 is 512 in the
paper, w2 is 32):

    k, v      [ i-w1+1 ..................... i ]    w1 positions j
    k2, v2                 [ i-w2+1 ........ i ]    w2 positions c

In the paper, every fourth layer is of this kind. For models of 2 billion active
parameters and up, the paper claims a lower loss on mathematics and code after
the same number of tokens, and a steeper scaling law.

How to compute it: fix the distance d = i - c. Then this is ordinary attention
over (k, v) with the query q_i * k2_{i-d} and the window w1. Its output is a_id
and its log-sum-exp e_id. The softmax over pairs is a mixture of w2 such
attentions, d = 0 ... w2 - 1, so any flash attention can compute it:

    o_i = sum_d softmax_d(e_id) (a_id * v2_{i-d})

What the paper leaves open: it does not say which position encoding these layers
have. Ours have no RoPE (`attention.rotary`), because a trilinear form changes
when q, k and k2 are rotated by the same angle. The authors' code adds 1/D to k2
and 1 to v2, since v * v2 is tiny with untrained weights. The paper's listing
has such constants, its text does not mention them, and we leave them out.

    python simplicial.py    can one layer find a triple, or compose two
                            functions? seven minutes on two CPU cores
    python train.py --attn softmax,simplicial:w1=512:w2=32
"""

if __name__ == "__main__":
    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

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

LOGITS_AT_ONCE = 2**25  # how many logits attention_torch has in memory at a time


def check(q, k, v, k2, v2, w1, w2):
    """Raise ValueError unless the shapes fit together, and w1 and w2 are at least 1."""
    tensors = {"q": q, "k": k, "v": v, "k2": k2, "v2": v2}
    fits = all(t.dim() == 4 for t in tensors.values())
    if fits:
        B, H, Tq, D = q.shape
        _, Hkv, Tk, _ = k.shape
        Tk2 = k2.shape[2]
        fits = k.shape == v.shape == (B, Hkv, Tk, D) and k2.shape == v2.shape == (B, Hkv, Tk2, D)
        fits = fits and Hkv > 0 and H % Hkv == 0 and D > 0
    if not fits:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(
            f"{shapes} do not fit together: q must be (B, H, Tq, D), the others (B, Hkv, Tk, D) "
            f"with Hkv a divisor of H"
        )
    if min(Tk, Tk2) < Tq:
        raise ValueError(f"{Tq} queries cannot be the last of {min(Tk, Tk2)} positions")
    if min(w1, w2) < 1:
        raise ValueError(f"w1 is {w1} and w2 is {w2}; a window holds at least 1 position")


def get_windows(x, n, w):
    """Return x at positions i - w + 1 ... i, for each i of the last n positions.

    x (B, H, T, D) -> windows (B, H, n, w, D), and exists (n, w): False before position 0.
    For T = 3, n = 2 and w = 3, the positions are [[-1, 0, 1], [0, 1, 2]].
    """
    T = x.shape[2]
    padded = F.pad(x, (0, 0, w - 1, 0))  # w - 1 zeros before position 0
    # unfold gives the window of every position, (B, H, T, D, w)
    windows = padded.unfold(2, w, 1)[:, :, T - n :].transpose(-1, -2)  # (B, H, n, w, D)
    i = torch.arange(T - n, T, device=x.device)[:, None]
    positions = i + torch.arange(1 - w, 1, device=x.device)  # (n, w)
    return windows, positions >= 0


def reference(q, k, v, k2, v2, *, w1=512, w2=32):
    """Compute causal 2-simplicial attention by its definition, in any dtype.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D) -> (B, H, Tq, D). The last
    query, last key and last second key are at the same position. For tests: it makes tensors of
    shape (B, H, Tq, w1, w2) and (B, H, Tq, w1, D).
    """
    check(q, k, v, k2, v2, w1, w2)
    _, H, Tq, D = q.shape
    w1 = min(w1, k.shape[2])
    w2 = min(w2, k2.shape[2])
    k, v, k2, v2 = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v, k2, v2))  # Hkv -> H
    k, exists = get_windows(k, Tq, w1)  # (B, H, Tq, w1, D), (Tq, w1)
    v, _ = get_windows(v, Tq, w1)
    k2, exists2 = get_windows(k2, Tq, w2)  # (B, H, Tq, w2, D), (Tq, w2)
    v2, _ = get_windows(v2, Tq, w2)

    # the logits of each query, k_j . (q * k2_c), and one softmax over all pairs (j, c)
    s = (k * D**-0.5) @ (q[..., None, :] * k2).transpose(-1, -2)  # (B, H, Tq, w1, w2)
    s = s.masked_fill(~(exists[:, :, None] & exists2[:, None]), -torch.inf)
    p = s.flatten(-2).softmax(-1).view(s.shape)
    # o = sum_j v_j * (sum_c p_jc v2_c), where p @ v2 is the inner sum, (B, H, Tq, w1, D)
    return ((p @ v2) * v).sum(-2)


# --------------------------------------------------------------------------------------------------
# The fast path in PyTorch


def nan_or_zero(q, k, v, k2, v2, w1, w2):
    """Return NaN where a query, or something in its windows, is inf or NaN; 0 elsewhere.

    Shapes as in `reference` -> (B, H, Tq, 1)
    """
    Tq = q.shape[2]
    # x - x is NaN if x is inf or NaN, else 0; a sum with a NaN is NaN
    q = (q - q).sum(-1, keepdim=True)  # (B, H, Tq, 1)
    kv = (k - k + v - v).sum(-1, keepdim=True)  # (B, Hkv, Tk, 1)
    kv2 = (k2 - k2 + v2 - v2).sum(-1, keepdim=True)  # (B, Hkv, Tk2, 1)
    windows, _ = get_windows(kv, Tq, w1)  # (B, Hkv, Tq, w1, 1)
    windows2, _ = get_windows(kv2, Tq, w2)  # (B, Hkv, Tq, w2, 1)
    in_windows = windows.sum(-2) + windows2.sum(-2)  # (B, Hkv, Tq, 1)
    return q + in_windows.repeat_interleave(q.shape[1] // kv.shape[1], 1)


def attend(q, k, v, k2, v2, w1, w2):
    """Attend from n queries at the last n positions: w2 ordinary attentions with one softmax.

    q (B, Hkv, g, n, D), where g query heads share a KV head; k and v (B, Hkv, Tk, D), k2 and v2
    (B, Hkv, Tk2, D) -> (B, Hkv, g, n, D)
    """
    _, _, _, n, D = q.shape
    # The last J = w1 + n - 1 keys, or all, are enough: the query at i sees j with i - w1 < j <= i.
    k = k[:, :, -(w1 + n - 1) :]  # (B, Hkv, J, D)
    v = v[:, :, -(w1 + n - 1) :]
    j = torch.arange(k.shape[2], device=q.device)
    i = j[-n:, None]  # the queries are at the last n of these J positions
    is_visible = (j <= i) & (j > i - w1)  # (n, J); for w1 = n = 2: [[1, 1, 0], [0, 1, 1]]

    # the second keys and values of each query
    k2, exists = get_windows(k2, n, w2)  # (B, Hkv, n, w2, D), (n, w2)
    v2, _ = get_windows(v2, n, w2)

    # logits (q_i * k2_c) . k_j. Each query i has w2 second keys c, and each product q_i * k2_c is a
    # query of ordinary attention: for n queries in g heads, there are g n w2 of them
    qk2 = q[..., None, :] * k2[:, :, None] * D**-0.5  # (B, Hkv, g, n, w2, D)
    s = qk2.flatten(2, 4) @ k.transpose(-1, -2)  # (B, Hkv, g n w2, J)
    s = s.unflatten(2, qk2.shape[2:5])  # (B, Hkv, g, n, w2, J)
    s = s.masked_fill(~(is_visible[:, None] & exists[:, :, None]), -torch.inf)

    # softmax over all pairs (w2, J): a = sum of p v over the J keys, then sum of a * v2 over w2
    p = s.flatten(-2).softmax(-1).view(s.shape)
    a = (p.flatten(2, 4) @ v).view(qk2.shape)  # (B, Hkv, g, n, w2, D)
    return (a * v2[:, :, None]).sum(-2)


def attention_torch(q, k, v, k2, v2, *, w1=512, w2=32, logits_at_once=LOGITS_AT_ONCE):
    """Compute 2-simplicial attention in PyTorch, one block of queries at a time.

    Computes in float32 or float64. If all blocks together have more than `logits_at_once` logits,
    they use activation checkpointing. Under torch.compile there is only one block.
    """
    if q.numel() == 0:  # an empty result that still depends on every input
        return q + 0 * sum(t.sum() for t in (k, v, k2, v2))
    if w2 > w1:  # both keys play the same role: let w2 be the shorter window
        k, v, k2, v2 = k2, v2, k, v
        w1, w2 = w2, w1
    dtype = q.dtype
    B, H, Tq, _ = q.shape
    w1 = min(w1, k.shape[2])
    w2 = min(w2, k2.shape[2])
    tensors = [t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, k2, v2)]

    # The mask hides an inf from a query, but a matrix product still adds 0 * inf = NaN. So compute
    # with 0 in place of inf and NaN, and make the outputs NaN afterwards that should be.
    nan = nan_or_zero(*tensors, w1, w2)  # (B, H, Tq, 1)
    q, k, v, k2, v2 = (t.nan_to_num(nan=0, posinf=0, neginf=0) for t in tensors)
    q = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, g, Tq, D)

    # Take blocks of n queries, which together see about w1 + n keys, and w2 second keys each. For
    # n <= w1, a block has at most 2 n B H w1 w2 logits. n is half of w1, but at least 16, or less
    # where a block would have more than logits_at_once.
    if torch.compiler.is_compiling():  # torch.compile would unroll a loop for every length
        n = Tq
        starts = [0]
    else:
        n = max(1, min(Tq, max(w1 // 2, 16), logits_at_once // (2 * B * H * w1 * w2)))
        starts = range(0, Tq, n)
    recompute = torch.is_grad_enabled() and B * H * Tq * w2 * (w1 + n) > logits_at_once
    outputs = []
    with torch.autocast(q.device.type, enabled=False):  # autocast would undo the float32
        for start in starts:
            end = min(start + n, Tq)
            # the last query of the block is at the last position of these keys
            keys = [t[:, :, : t.shape[2] - Tq + end] for t in (k, v, k2, v2)]  # (B, Hkv, ..., D)
            block = q[:, :, :, start:end], *keys, w1, w2
            if recompute:
                outputs.append(checkpoint(attend, *block, use_reentrant=False))
            else:
                outputs.append(attend(*block))
    o = torch.cat(outputs, 3).flatten(1, 2)  # (B, H, Tq, D)
    # nan.square() makes the gradients NaN, too: its derivative is 2 * NaN
    return (o + nan.square()).to(dtype)


# --------------------------------------------------------------------------------------------------
# The public function


@torch.compiler.assume_constant_result  # torch.compile calls it once and does not trace it
def warn_fallback(reason):
    warnings.warn(f"2-simplicial attention runs in PyTorch, which is many times slower: {reason}")


def attention(q, k, v, k2, v2, *, w1=512, w2=32):
    """Compute 2-simplicial attention. Shapes as in `reference`; ValueError if they do not fit.

    w1, w2: a query sees the last w1 positions of k and v and the last w2 of k2 and v2, its own
    included.

    Runs kernels/simplicial.py on a GPU, otherwise PyTorch. The kernel supports head dimensions 16,
    32, 64 and 128 in float32, float16 and bfloat16.
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


attention.rotary = ()  # inputs that get RoPE: none
attention.windows = {"k": "w1", "v": "w1", "k2": "w2", "v2": "w2"}  # input: option with its window


def main(argv=None):
    """Train on Match3 and function composition; write results/simplicial-cpu.json and .png."""
    from experiments.simplicial import main as study

    return study(argv, __doc__)


if __name__ == "__main__":
    cli.run_main(main)
