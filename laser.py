"""LASER: attention with exponential transformation.

Duvvuri and Dhillon, ICML 2025, arXiv 2411.03493.

Softmax attention is out_i = sum_j p_ij v_j. Its derivative in a logit is
p_ij (v_j - out_i), so the gradient vanishes where the probability p_ij does.
LASER attends to exp(v), then takes the logarithm, in each channel by itself:

    p_ij = softmax_j(q_i . k_j / sqrt(D))    over the keys j <= i
    out_i = log sum_j p_ij exp(v_j)

    d out_i / d logit_ij = b_ij - p_ij    where b_ij = p_ij exp(v_j - out_i)

b_ij is the share of key j in the sum. It can be near 1 where p_ij is near 0, if
v_j is far above the other values. Then the gradient is large. The output lies
between that of softmax attention and the largest value seen; adding c to v adds
c to it.

Where we depart from the paper: before exp, it subtracts the maximum of v over
all keys, in each channel. Then a single future value 110 above the others makes
all earlier outputs underflow to log 0. We sort the values into bands of width
64, subtract the center of each band, and add up the bands in log space:

    band     [-96, -32]  [-32, 32]  [32, 96]
    center       -64         0         64

So future tokens do not change the output, except by rounding on a GPU (see
kernels/laser.py).

    python laser.py                 a study of the gradients: two minutes, CPU
    python train.py --attn laser    train with it
"""

if __name__ == "__main__":
    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

import warnings

import torch
import torch.nn.functional as F

try:
    from kernels import laser as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

BAND = 64.0  # width of a band: values are within 32 of its center, and float32 holds exp(+-32)


def causal_mask(Tq, Tk, device):
    """Return a mask (Tq, Tk), True where a query sees a key. Queries are at the last positions.

    For Tq = 2 and Tk = 3 it is [[1, 1, 0], [1, 1, 1]].
    """
    return torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)


def reference(q, k, v):
    """Compute LASER by its definition, out_i = logsumexp_j(log p_ij + v_j), in any dtype.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -> (B, H, Tq, D). The queries are at the last Tq of the
    Tk positions. For tests: it makes a tensor of shape (B, H, Tq, Tk, D).
    """
    _, H, Tq, D = q.shape
    _, Hkv, Tk, _ = k.shape
    # H / Hkv query heads share a key head
    k = k.repeat_interleave(H // Hkv, dim=1)  # (B, H, Tk, D)
    v = v.repeat_interleave(H // Hkv, dim=1)

    # log p_ij, with -inf for the keys that a query does not see
    scores = q @ k.transpose(-1, -2) * D**-0.5  # (B, H, Tq, Tk)
    scores = scores.masked_fill(~causal_mask(Tq, Tk, q.device), -torch.inf)
    log_p = scores.log_softmax(-1)
    # log (p_ij exp(v_j)), for each channel
    summands = log_p[..., None] + v[:, :, None]  # (B, H, Tq, Tk, D)
    return summands.logsumexp(3)


def attention(q, k, v):
    """Compute what `reference` does, without a (Tq, Tk, D) tensor. This is the function to use.

    On a GPU it runs kernels/laser.py. On a CPU, for float64, without Triton, or if D > 128, it runs
    attention_torch, and torch.compile(fullgraph=True) then fails. Raises ValueError if the shapes
    do not fit.
    """
    check_shapes(q, k, v)
    if q.numel() == 0:
        return 0.0 * q  # no queries: an empty result that still depends on q
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
    """Compute LASER attention in PyTorch: scaled_dot_product_attention over exp(v), then log.

    Computes in float32 or float64, even under autocast: if v is small, exp(v) is close to 1, where
    bfloat16 has few digits. torch.compile breaks its graph here to read the number of bands.
    """
    dtype = q.dtype
    compute_dtype = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(compute_dtype) for t in (q, k, v))

    # one band, which holds all values: out = log(attend(exp(v - center))) + center
    centers = band_centers(v)
    if len(centers) == 1:
        out = attend(q, k, (v - centers[0]).exp()).log() + centers[0]
        return out.to(dtype)

    # several bands: attend to the values of one at a time, then add up the results in log space,
    # out = log sum_bands x_band exp(center), where x_band = sum_j p_ij exp(v_j - center)
    nearest = nearest_center(v)
    log_sums = []
    for center in centers:
        in_band = nearest == center
        exp_v = (v - center).masked_fill(~in_band, -torch.inf).exp()
        x = attend(q, k, exp_v)  # (B, H, Tq, D)
        is_empty = x == 0  # this query sees no value that is in the band
        log_x = x.masked_fill(is_empty, 1.0).log() + center  # log(0) would make NaN gradients
        log_sums.append(log_x.masked_fill(is_empty, -torch.inf))
    return torch.stack(log_sums).logsumexp(0).to(dtype)


def nearest_center(v):
    """Return the center of the band of each value, a multiple of BAND; 0 for inf and NaN.

    So infinity and NaN are in the band around 0, through which they reach the outputs.
    """
    return ((v / BAND).round() * BAND).nan_to_num(0, posinf=0, neginf=0)


@torch.compiler.disable
def band_centers(v):
    """Return the centers of all bands that v has values in."""
    # usually there is one band: that of both the lowest and the highest value
    low, high = torch.aminmax(v)  # both are NaN if a value is
    center = nearest_center(low)
    if center == nearest_center(high) and (high - low).isfinite():
        return [center.item()]
    return nearest_center(v).unique().tolist()


def attend(q, k, v):
    """Compute causal softmax attention; the queries are the last positions."""
    Tq = q.shape[2]
    Tk = k.shape[2]
    mask = None
    is_causal = False  # set by an `if`: under torch.compile, Tq == Tk is symbolic and not a bool
    is_gqa = False
    if 1 < Tq < Tk:  # is_causal would align the queries with the first keys
        mask = causal_mask(Tq, Tk, q.device)
    elif 1 < Tq:
        is_causal = True
    if q.shape[1] != k.shape[1]:
        is_gqa = True
    with torch.autocast(q.device.type, enabled=False):  # it would round exp(v) to bfloat16
        # 0.0: no dropout
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, enable_gqa=is_gqa)


def main(argv=None):
    """Compare the gradient at the logits with softmax attention's, and the numerics."""
    from experiments import laser

    return laser.main(argv, __doc__)


if __name__ == "__main__":
    cli.run_main(main)
