"""Cross-entropy of many logits and its gradient, in place: the loss of train.py's GPT on a GPU.

For a row z of V logits with target t:  loss = scale * (lse - z_t),  dz_v = scale * (exp(z_v - lse) - [v = t]),  where
lse = log sum_v exp z_v is taken online (running maximum m, sum l in units of exp m). The gradient takes the place of z.

Grid: few programs, each taking one row after another in two passes over it. So few rows are in flight (2 or 3 a
multiprocessor, 100 KB each at V = 50304) that the second pass finds its row in the 50 MB L2 of an H100 or H200.
Bytes: each logit read once and written once. Floor for 65,536 x 50,304 in bf16 at 4.28 TB/s: 3.1 ms.
"""
import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)                        # finite, so that a block of -inf alone does no harm
CONFIG = (8192, 8, 264)                                              # block, warps, programs


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, scale_ptr, loss_ptr,                     # (R, V), (R), (R), (R)
    R, V, stride_r,
    WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * stride_r
        target, scale = tl.load(target_ptr + row), tl.load(scale_ptr + row)
        z_t = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)            # before it is overwritten

        m, l = tl.full((), LOWEST, tl.float32), tl.zeros((), tl.float32)
        for start in range(0, V, BLOCK):
            z = tl.load(row_ptr + start + offs, mask=start + offs < V, other=-float("inf")).to(tl.float32)   # [BLOCK]
            m_new = tl.maximum(m, tl.max(z, 0))
            l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
            m = m_new
        lse = m + tl.log(l)
        tl.store(loss_ptr + row, (lse - z_t) * scale)

        if WITH_GRAD:
            for start in range(0, V, BLOCK):
                mask = start + offs < V
                z = tl.load(row_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)                     # [BLOCK]
                p = tl.exp(z - lse) - tl.where(start + offs == target, 1.0, 0.0)
                tl.store(row_ptr + start + offs, (p * scale).to(logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy(logits, target, scale, with_grad, config=CONFIG):
    """logits (R, V), overwritten by their gradient; target (R, 1) int64, scale (R, 1) float32, 0 where target < 0.
    -> sum of scale * cross-entropy, float32; the gradient (None without with_grad, when logits stay as they are)."""
    R, V = logits.shape
    assert logits.stride(1) == 1 and V < 2 ** 31 - 2 ** 16, "rows must be contiguous, and an offset in one fit 32 bits"
    loss = torch.empty(R, dtype=torch.float32, device=logits.device)
    block, warps, programs = config
    cross_entropy_kernel[(min(R, programs),)](logits, target.contiguous(), scale.contiguous(), loss, R, V, logits.stride(0), with_grad,
                                              min(block, triton.next_power_of_2(V)), num_warps=warps)
    return loss.sum(), logits if with_grad else None


# What test_all.py builds ahead of time: kernel, argument types, constants, arguments that are multiples of 16, warps
AOT = [(cross_entropy_kernel, {"logits_ptr": f"*{dtype}", "target_ptr": "*i64", "scale_ptr": "*fp32", "loss_ptr": "*fp32", "R": "i32", "V": "i32", "stride_r": "i32"},
        {"WITH_GRAD": True, "BLOCK": CONFIG[0]}, by16, CONFIG[1]) for dtype in ("bf16", "fp32") for by16 in ((), ("V", "stride_r"))]
