"""LASER: attention with exponential transformation (Duvvuri and Dhillon, ICML 2025, arXiv 2411.03493).

The gradient that reaches the logits of softmax attention passes p (v_j - o), which vanishes with the probabilities. LASER
attends to exp(v) and takes the logarithm of the result, a log-sum-exp over the keys for each channel:

    o_i = log sum_j p_ij exp(v_j)          p_i = softmax_j(q_i . k_j / sqrt(D)), j <= i

    d o_i / d s_ij = b_ij - p_ij           posterior minus prior, b_ij = p_ij exp(v_j - o_i), which sums to 1 over j

so a key with a large value pulls even where its probability is small. The function lies between softmax attention (Jensen)
and the largest value seen, and v + c gives o + c.

The published form subtracts the largest value over *all* keys before exp. One future token that is 110 above the rest then
sends every earlier row to log 0. Here values are taken in bands of 64 around the fixed centres 0, 64, -64, ...: within a
band exp neither overflows nor underflows in float32, bands are joined in the logarithm, and what a row does not see
cannot touch it, bit for bit. Real values fill one band, so this costs one attention over exp(v).

    python train.py --attn laser
"""
import math

import torch
import torch.nn.functional as F

BAND = 64.0                                                          # exp(+-32) is far from both ends of float32


def reference(q, k, v):
    """The definition, o = LSE_j(s_ij + v_j) - LSE_j(s_ij), any dtype. q (B, H, Tq, D), k, v (B, Hkv, Tk, D) -> (B, H, Tq, D);
    causal, the queries being the last of the positions. Makes a (B, H, Tq, Tk, D) tensor."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))                # (B, H, Tk, D)
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[3] ** -0.5                                  # (B, H, Tq, Tk)
    logp = scores.masked_fill(future, -torch.inf).log_softmax(-1)
    return (logp[..., None] + v[:, :, None]).logsumexp(-2)                                   # over (B, H, Tq, Tk, D)


def attention(q, k, v):
    """LASER attention, as `reference` in shapes and meaning, by scaled_dot_product_attention over exp(v): no (Tq, Tk) tensor.
    float16 and bfloat16 are computed in float32, since exp(v) of a small v keeps little of it in 8 or 11 bits."""
    dtype, Tq, Tk = q.dtype, q.shape[2], k.shape[2]
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    mask = None                                                      # is_causal would align the queries to the first keys
    if 1 < Tq < Tk:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    low, high = (float(x) for x in v.detach().aminmax())
    centres = [BAND * n for n in range(round(low / BAND), round(high / BAND) + 1)] if math.isfinite(high - low) else [0.0]
    logs = []
    for c in centres:
        e = torch.where((v / BAND).round() * BAND == c, v - c, -torch.inf).exp() if len(centres) > 1 else (v - c).exp()
        y = F.scaled_dot_product_attention(q, k, e, mask, is_causal=1 < Tq == Tk, enable_gqa=q.shape[1] != k.shape[1])
        seen = y > 0                                                 # else the row sees no value in this band
        logs.append(torch.where(seen, torch.where(seen, y, 1.0).log() + c, -torch.inf) if len(centres) > 1 else y.log() + c)
    return (torch.stack(logs).logsumexp(0) if len(logs) > 1 else logs[0]).to(dtype)          # (B, H, Tq, D)
