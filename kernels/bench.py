"""Time the kernels on this GPU beside what one would use otherwise, all in one run: python kernels/bench.py

First the two ceilings, a copy and a matrix product; then, kernel by kernel, a check of the result and the median times, which
go to results/kernels.json. Without a GPU it says what it would do.
"""
import json, sys
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent.parent
LASER = [(4, 16, 4096, 128), (4, 32, 4096, 64), (16, 12, 1024, 64)]  # B, H, T, D


def ms(function):
    import triton
    return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median")


def ceilings():
    a, b = torch.empty(2, 2 ** 29, dtype=torch.bfloat16, device="cuda")
    x, y = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    return {"copy_TB_per_s": 4 * a.numel() / ms(lambda: a.copy_(b)) / 1e9, "matmul_TFLOP_per_s": 2 * 8192 ** 3 / ms(lambda: x @ y) / 1e9}


def softmax(backend):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention


def wrapper(backend):
    """The paper's way to use any attention: the largest value of each channel subtracted, exp, attention, log."""
    def attention(q, k, v):
        top = v.detach().amax(2, keepdim=True)
        return softmax(backend)(q, k, (v - top).exp()).log() + top
    return attention


def laser():
    from kernels.laser import attention as ours
    arms = {"softmax, cuDNN": softmax(SDPBackend.CUDNN_ATTENTION), "softmax, flash": softmax(SDPBackend.FLASH_ATTENTION),
            "wrapper over cuDNN": wrapper(SDPBackend.CUDNN_ATTENTION),
            "wrapper over cuDNN, compiled": torch.compile(wrapper(SDPBackend.CUDNN_ATTENTION)), "ours": ours, "ours, all in Triton": ours}
    torch._functorch.config.donated_buffer = False                   # else a compiled graph runs backward but once
    torch.utils.deterministic.fill_uninitialized_memory = False      # asked for determinism, torch.empty would fill with NaN
    rows = []
    for B, H, T, D in LASER:
        q, k, v = (t.transpose(1, 2).requires_grad_() for t in torch.randn(3, B, T, H, D, dtype=torch.bfloat16, device="cuda"))
        do = torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        truth = F.scaled_dot_product_attention(q[:1].float(), k[:1].float(), v[:1].float().exp(), is_causal=True).log()
        for name, attention in arms.items():
            torch.use_deterministic_algorithms("Triton" in name)     # cuDNN's attention is not
            o = attention(q, k, v)
            error = (o[:1] - truth).abs().max().item()
            assert name.startswith("softmax") or error < 0.05, f"{name} is off by {error}"
            gradient = lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
            row = {"shape": [B, H, T, D], "name": name, "forward_ms": ms(lambda: attention(q, k, v)), "backward_ms": ms(gradient),
                   "TFLOP": 2 * B * H * T * T * D / 1e12, "error": error}
            rows.append(row)
            print(f"{row['shape']} {name:30} {row['forward_ms']:.3f} + {row['backward_ms']:.3f} ms, off by {error:.4f}", flush=True)
    torch.use_deterministic_algorithms(False)
    return rows


def main():
    if not torch.cuda.is_available():
        return print("There is no GPU here. On one this would check and time, at B, H, T, D =", LASER,
                     "LASER attention beside softmax attention and the published wrapper.")
    sys.path.insert(0, str(HERE))
    import triton
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, **ceilings(), "laser": laser()}
    (HERE / "results" / "kernels.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
