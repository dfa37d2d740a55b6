"""Cross-entropy of many logits and its gradient, in place: the loss of train.py's GPT on a GPU.

For a row z of V logits with target t:  loss = scale * (lse - z_t),  dz_v = scale * (exp(z_v - lse) - [v = t]),  where
lse = log sum_v exp z_v is taken online (running maximum m, sum l in units of exp m). The gradient takes the place of z.

Grid: one program per row, two passes over it. Bytes: each logit read twice and written once; if the second read came from
the L2, 65,536 x 50,304 in bf16 would take 3.1 ms at the 4.28 TB/s that a copy reaches, from memory it takes 4.6.

History, ms for those logits, one H200, torch 2.11, triton 3.6:
1. PyTorch, compiled: three passes, 7.4.
2. One program per row, online maximum, blocks of 8192, 8 warps: 4.8. Kept. (4096, 8) 5.0, (16384, 16) 4.9, (16384, 32) 6.9.
3. The whole row in registers (65536, 32), to read it once: 5.7. One program a multiprocessor cannot load and store at a time.
4. 132 to 528 programs that take row after row, so that the rows in flight fit into the L2: 5.5 to 14.6. The loop over
   rows exposes the latency of each load, which costs more than the L2 gives.
"""

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a block of -inf alone does no harm
CONFIG = (8192, 8)  # block, warps; see the history above


@triton.jit
def cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    loss_ptr,  # (R, V), (R), (R), (R)
    V,
    stride_r,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_r
    offs, target, scale = tl.arange(0, BLOCK), tl.load(target_ptr + row), tl.load(scale_ptr + row)
    z_t = tl.load(row_ptr + tl.maximum(target, 0)).to(tl.float32)  # before it is overwritten

    m, l = tl.full((), LOWEST, tl.float32), tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(row_ptr + start + offs, mask=start + offs < V, other=-float("inf")).to(
            tl.float32
        )  # [BLOCK]
        m_new = tl.maximum(m, tl.max(z, 0))
        l = l * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    lse = m + tl.log(l)
    tl.store(loss_ptr + row, (lse - z_t) * scale)

    if WITH_GRAD:
        for start in range(0, V, BLOCK):
            mask = start + offs < V
            z = tl.load(row_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
            p = tl.exp(z - lse) - tl.where(start + offs == target, 1.0, 0.0)
            tl.store(row_ptr + start + offs, (p * scale).to(logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy(logits, target, scale, with_grad, config=CONFIG):
    """logits (R, V), overwritten by their gradient; target (R, 1) int64, scale (R, 1) float32, 0 where target < 0.
    -> sum of scale * cross-entropy, float32; the gradient (None without with_grad, when logits stay as they are)."""
    R, V = logits.shape
    assert logits.stride(1) == 1 and V < 2**31 - 2**16, (
        "rows must be contiguous, and an offset in one fit 32 bits"
    )
    loss = torch.empty(R, dtype=torch.float32, device=logits.device)
    block, warps = config
    cross_entropy_kernel[(R,)](
        logits,
        target.contiguous(),
        scale.contiguous(),
        loss,
        V,
        logits.stride(0),
        with_grad,
        min(block, triton.next_power_of_2(V)),
        num_warps=warps,
    )
    return loss.sum(), logits if with_grad else None


# What test_all.py builds ahead of time: kernel, argument types, constants, arguments that are multiples of 16, warps
AOT = [
    (
        cross_entropy_kernel,
        {
            "logits_ptr": f"*{dtype}",
            "target_ptr": "*i64",
            "scale_ptr": "*fp32",
            "loss_ptr": "*fp32",
            "V": "i32",
            "stride_r": "i32",
        },
        {"WITH_GRAD": True, "BLOCK": CONFIG[0]},
        by16,
        CONFIG[1],
    )
    for dtype in ("bf16", "fp32")
    for by16 in ((), ("V", "stride_r"))
]
