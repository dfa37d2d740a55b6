"""LASER: attention with exponential transformation.

Duvvuri and Dhillon, ICML 2025, arXiv 2411.03493.

Softmax attention, out = sum_j p_j v_j, passes the gradient p_j (v_j - out) to
its logits; it vanishes with the probability p_j. LASER attends to exp(v) and
takes the logarithm of the result, separately for each channel:

    out_i = log sum_j p_ij exp(v_j)
    p_i = softmax_j(q_i . k_j / sqrt(D)), over j <= i

    d out_i / d logit_ij = b_ij - p_ij
    posterior b_ij = p_ij exp(v_j - out_i), sums to 1 over j

so a key with a large value gets a larger gradient. The output lies between
softmax attention and the largest value seen, and adding c to v adds c to out.

Where we depart from the paper: it subtracts the maximum of v over all keys
before exp. A single future token 110 above the others then underflows every
earlier row to log 0. attention_torch splits values into bands of 64 around
fixed centers instead, so that earlier rows do not change at all.
kernels/laser.py describes what the GPU does.

    python laser.py                 gradients at the logits, and the numerics
    python train.py --attn laser    train with it
"""

import math
import warnings

import torch
import torch.nn.functional as F

try:
    from kernels import laser as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

BAND = 64.0  # exp(+-32) neither overflows nor underflows in float32


def causal_mask(Tq, Tk, device):
    """True where a query sees a key; the queries are the last Tq of the Tk positions. (Tq, Tk)"""
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)


def reference(q, k, v):
    """LASER by its definition, out_i = LSE_j(logit_ij + v_j) - LSE_j(logit_ij), in any dtype.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -> (B, H, Tq, D); the queries are the last positions.
    Makes a (B, H, Tq, Tk, D) tensor, so it is for tests.
    """
    _, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    k = k.repeat_interleave(H // Hkv, dim=1)  # (B, H, Tk, D)
    v = v.repeat_interleave(H // Hkv, dim=1)

    scores = q @ k.transpose(-1, -2) * D**-0.5  # (B, H, Tq, Tk)
    scores = scores.masked_fill(~causal_mask(Tq, Tk, q.device), -torch.inf)
    log_p = scores.log_softmax(-1)
    return (log_p[..., None] + v[:, :, None]).logsumexp(-2)  # reduces (B, H, Tq, Tk, D) over Tk


def attention(q, k, v):
    """LASER attention without a (Tq, Tk, D) tensor; shapes and meaning as in `reference`.

    Runs kernels/laser.py on a GPU; PyTorch on a CPU, in float64, without Triton, and where D > 128.
    Raises ValueError if the shapes do not fit each other.
    """
    check_shapes(q, k, v)
    if q.numel() == 0:
        return 0.0 * q  # nothing to attend from; keeps the gradient
    if not q.is_cuda or q.dtype == torch.float64:
        return attention_torch(q, k, v)
    if kernel is None or q.shape[3] > 128:
        reason = "pip install triton" if kernel is None else "head dim > 128"
        warnings.warn(f"LASER runs in PyTorch, which is slower: {reason}", stacklevel=2)
        return attention_torch(q, k, v)
    return kernel.attention(q, k, v)


def check_shapes(q, k, v):
    """Raise ValueError unless q is (B, H, Tq, D), and k and v are (B, Hkv, Tk, D) with Tq <= Tk."""
    if k.shape != v.shape or q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k, v are {[tuple(t.shape) for t in (q, k, v)]}; k and v must agree")
    _, H, Tq, D = q.shape
    _, Hkv, Tk, key_dim = k.shape
    if D != key_dim:
        raise ValueError(f"q and k differ in head dim, {D} and {key_dim}")
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"the number of key heads, {Hkv}, does not divide that of queries, {H}")
    if Tq > Tk:
        raise ValueError(f"there are {Tq} queries but only {Tk} keys")


def attention_torch(q, k, v):
    """LASER attention in PyTorch: scaled_dot_product_attention over exp(v), then log.

    Computes in float32 at least, under autocast too, as exp(v) of a small v keeps little of it in
    bfloat16. torch.compile breaks its graph here: the values decide how many bands there are.
    """
    dtype = q.dtype
    compute_dtype = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(compute_dtype) for t in (q, k, v))

    centers = band_centers(v)
    if len(centers) == 1:
        out = attend(q, k, (v - centers[0]).exp()).log() + centers[0]
        return out.to(dtype)

    # attend to one band at a time, then add the bands up in log space
    log_sums = []
    for center in centers:
        in_band = (v / BAND).round() * BAND == center
        exp_v = (v - center).masked_fill(~in_band, -torch.inf).exp()
        x = attend(q, k, exp_v)  # (B, H, Tq, D)
        is_empty = x == 0  # the row sees no value of this band
        log_x = x.masked_fill(is_empty, 1.0).log() + center
        log_sums.append(log_x.masked_fill(is_empty, -torch.inf))
    return torch.stack(log_sums).logsumexp(0).to(dtype)


@torch.compiler.disable
def band_centers(v):
    """The multiples of BAND nearest to the values in v, from lowest to highest."""
    low, high = (x.item() for x in v.detach().aminmax())
    if not math.isfinite(high - low):
        return [0.0]  # one band, in which NaN and infinity reach the output
    return [BAND * n for n in range(round(low / BAND), round(high / BAND) + 1)]


def attend(q, k, v):
    """Causal softmax attention; the queries are the last of the positions."""
    Tq = q.shape[2]
    Tk = k.shape[2]
    is_gqa = q.shape[1] != k.shape[1]
    mask = None
    if 1 < Tq < Tk:  # is_causal would align the queries with the first keys
        mask = causal_mask(Tq, Tk, q.device)
    is_causal = bool(1 < Tq == Tk)
    with torch.autocast(q.device.type, enabled=False):  # it would round exp(v) to bfloat16
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, enable_gqa=is_gqa)


def main(argv=None):
    """Compare the gradient at the logits with softmax attention's, and the numerics."""
    from experiments import laser

    return laser.main(argv, __doc__)


if __name__ == "__main__":
    from support.cli import run_main

    run_main(main)
