"""Time the kernels on this GPU beside what one would use otherwise, all in one run.

python kernels/bench.py                 every kernel -> results/kernels.json
python kernels/bench.py laser sonew     some of them; what the file says of the others stays

First the two ceilings, a copy and a matrix product; then, kernel by kernel, a check of the result and the median times.
Without a GPU it says what it would do.
"""
import json, statistics, sys, time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[0] = str(HERE)                                              # not kernels/, whose files are named like the papers'

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def ms(function, repeats=50):
    """Median milliseconds on the device, its L2 emptied before each call. A pause as long as the host takes to ask for the call lets it get
    ahead, as it is in a training loop: what is timed are the kernels."""
    def median(repeats, pause):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            l2.zero_()
            torch.cuda._sleep(pause)                                 # in clock cycles
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)
    l2 = torch.empty(2 ** 28, dtype=torch.int8, device="cuda")
    median(5, 0)                                                     # compile, warm up
    return median(repeats, int(2e6 * 1.5 * host_ms(function)))


def host_ms(function):
    """Milliseconds that the host takes to ask for a call."""
    began = time.perf_counter()
    for _ in range(5):
        function()
    took = (time.perf_counter() - began) / 5
    torch.cuda.synchronize()
    return 1e3 * took


def ceilings():
    a, b = torch.empty(2, 2 ** 29, dtype=torch.bfloat16, device="cuda")
    x, y = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    return {"copy_TB_per_s": 4 * a.numel() / ms(lambda: a.copy_(b)) / 1e9, "matmul_TFLOP_per_s": 2 * 8192 ** 3 / ms(lambda: x @ y) / 1e9}


def heads(B, T, H, D, n=1):
    """-> n tensors (B, H, T, D) of unit normals, bfloat16, (B, T, H, D) in memory as projections leave them"""
    made = [torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2).requires_grad_() for _ in range(n)]
    return made if n > 1 else made[0]


def both_ways(attention, tensors):
    """-> its output, and the times of the forward and the backward pass"""
    o = attention(*tensors)
    do = torch.randn_like(o)
    return o, ms(lambda: attention(*tensors)), ms(lambda: torch.autograd.grad(o, tensors, do, retain_graph=True))


def report(row):
    shape = " x ".join(map(str, row["shape"]))
    print(f"{shape:24} {row['name']:30} " + "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)), flush=True)
    return row


# ---------------------------------------------------------------------------------------------------------------------

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
    """B, H, T, D = 4, 16, 4096, 128 and two more, against softmax attention and the published wrapper around it"""
    from kernels.laser import attention as ours
    arms = {"softmax, cuDNN": softmax(SDPBackend.CUDNN_ATTENTION), "softmax, flash": softmax(SDPBackend.FLASH_ATTENTION),
            "wrapper over cuDNN": wrapper(SDPBackend.CUDNN_ATTENTION),
            "wrapper over cuDNN, compiled": torch.compile(wrapper(SDPBackend.CUDNN_ATTENTION)), "ours": ours, "ours, all in Triton": ours}
    torch._functorch.config.donated_buffer = False                   # else a compiled graph runs backward but once
    torch.utils.deterministic.fill_uninitialized_memory = False      # asked for determinism, torch.empty would fill with NaN
    for B, H, T, D in (4, 16, 4096, 128), (4, 32, 4096, 64), (16, 12, 1024, 64):
        q, k, v = heads(B, T, H, D, 3)
        truth = F.scaled_dot_product_attention(q[:1].float(), k[:1].float(), v[:1].float().exp(), is_causal=True).log()
        for name, attention in arms.items():
            torch.use_deterministic_algorithms("Triton" in name)     # cuDNN's attention is not
            o, forward, backward = both_ways(attention, (q, k, v))
            error = (o[:1] - truth).abs().max().item()
            assert name.startswith("softmax") or error < 0.05, f"{name} is off by {error}"
            host = host_ms(lambda: torch.autograd.grad(attention(q, k, v), (q, k, v), torch.empty_like(o)))
            yield {"shape": [B, H, T, D], "name": name, "forward_ms": forward, "backward_ms": backward, "host_ms": host, "error": error}
    torch.use_deterministic_algorithms(False)


def simplicial():
    """B, H, Hkv, T, D = 4, 64, 1, 4096, 128 and two more at the windows 512 and 32; FLOPs are 4 B H T w1 w2 D forward"""
    from kernels.simplicial import attention
    from simplicial import lean
    w1, w2 = 512, 32
    for B, H, Hkv, T, D in (4, 64, 1, 4096, 128), (2, 16, 16, 4096, 128), (2, 32, 32, 4096, 64):
        few = [heads(1, 700, h, D) for h in (2 * H // Hkv, 2, 2, 2, 2)]                      # past both windows
        error = (attention(*few, w1, w2)[0] - lean(*few, w1, w2)).abs().max().item()
        assert error < 0.05, f"off by {error}"
        tensors = [heads(B, T, h, D) for h in (H, Hkv, Hkv, Hkv, Hkv)]
        _, forward, backward = both_ways(lambda *t: attention(*t, w1, w2)[0], tensors)
        yield {"shape": [B, H, Hkv, T, D], "name": "ours", "forward_ms": forward, "backward_ms": backward, "error": error,
               "forward_TFLOP_per_s": 4 * B * H * T * w1 * w2 * D / forward / 1e9, "backward_over_forward": backward / forward}


def sonew():
    """one step of 53 float32 matrices of 768 x 3072, 125 M parameters, against PyTorch's fused AdamW"""
    from sonew import SONew
    parameters = [torch.nn.Parameter(torch.randn(768, 3072, device="cuda")) for _ in range(53)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    arms = {"AdamW, fused": partial(torch.optim.AdamW, fused=True), **{f"band {b}": partial(SONew, band=b) for b in (0, 1, 4)},
            **{f"band {b}, bf16 state": partial(SONew, band=b, bf16_state=True) for b in (1, 4)}}
    for name, make in arms.items():
        optimizer = make(parameters, lr=1e-5)
        optimizer.step()
        yield {"shape": [53, 768, 3072], "name": name, "step_ms": ms(optimizer.step), "host_ms": host_ms(optimizer.step)}
        del optimizer


def lora_rite():
    """one step for 72 pairs of 2048 x 16 and 16 x 2048 in float32, and 48 of 768, against PyTorch's fused AdamW on the same factors"""
    from lora_rite import LoRARITE
    for pairs, d, r in (72, 2048, 16), (48, 768, 16):
        parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for _ in range(pairs) for shape in ((r, d), (d, r))]
        start = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p)
        eager, ours = LoRARITE([{"params": parameters, "pair": True}]), LoRARITE([{"params": parameters, "pair": True}])
        eager.fits = lambda A, B: False
        after = []
        for optimizer in (eager, ours):
            for p, x in zip(parameters, start):
                p.data.copy_(x)
            optimizer.step()
            after.append([p.detach().clone() for p in parameters])
        error = max((a - b).abs().max().item() for a, b in zip(*after))
        assert error < 1e-5, f"off by {error}"
        arms = {"AdamW, fused": torch.optim.AdamW(parameters, fused=True), "eager": eager, "ours": ours}
        for name, optimizer in arms.items():
            yield {"shape": [pairs, d, r], "name": name, "step_ms": ms(optimizer.step), "host_ms": host_ms(optimizer.step),
                   **({"error": error} if name == "ours" else {})}


def loss():
    """cross-entropy of 65,536 x 50,304 bfloat16 logits and its gradient, in place, against PyTorch, compiled"""
    from kernels.train import cross_entropy
    R, V = 65536, 50304
    logits = torch.randn(R, V, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target, scale = torch.randint(V, (R, 1), device="cuda"), torch.full((R, 1), 1 / R, device="cuda")
    theirs = torch.compile(lambda z: F.cross_entropy(z, target[:, 0]))
    truth = theirs(logits).item()
    yield {"shape": [R, V], "name": "PyTorch, compiled", "ms": ms(lambda: torch.autograd.grad(theirs(logits), logits))}
    logits = logits.detach()
    ours = cross_entropy(logits, target, scale, False)[0].item()
    assert abs(ours - truth) < 1e-3, f"off by {ours - truth}"
    yield {"shape": [R, V], "name": "ours", "ms": ms(lambda: cross_entropy(logits, target, scale, True)), "error": abs(ours - truth)}


def every_key(backend):
    """Without a mask, which is a hundredth of a percent more work here and keeps both backends on their fastest path."""
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return attention


def ttt_context():
    """128 queries of 32 heads after 131,072 keys of 8 heads (and 32,768), D = 128, gradient of the queries alone, against softmax
    attention with keys and values detached; exact FLOPs are 4 and 6 times queries * heads * keys * D, forward and backward"""
    from kernels.ttt_context import span_attention
    from ttt_context import reference
    H, Hkv, n, D = 32, 8, 128, 128
    for T in 131072, 32768:
        q, start = torch.randn(1, H, n, D, dtype=torch.bfloat16, device="cuda", requires_grad=True), torch.tensor([T - n])
        k, v = torch.randn(2, 1, Hkv, T, D, dtype=torch.bfloat16, device="cuda")
        do, wide = torch.randn_like(q), q.detach().float().requires_grad_()
        o = reference(wide, k[0].float(), v[0].float(), start)
        truth = o.detach(), *torch.autograd.grad(o, wide, do.float())
        del o
        arms = {"softmax, cuDNN": every_key(SDPBackend.CUDNN_ATTENTION), "softmax, flash": every_key(SDPBackend.FLASH_ATTENTION),
                "ours": lambda q, k, v: span_attention(q, k[0], v[0], start)}
        for name, attention in arms.items():
            o, forward, backward = both_ways(lambda q: attention(q, k, v), (q,))
            got = o.detach(), *torch.autograd.grad(o, q, do)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, truth))
            assert name != "ours" or error < 0.02, f"off by {error}"
            yield {"shape": [1, H, Hkv, n, T, D], "name": name, "forward_ms": forward, "backward_ms": backward, "error": error,
                   "forward_TFLOP_per_s": 4 * n * H * T * D / forward / 1e9, "backward_TFLOP_per_s": 6 * n * H * T * D / backward / 1e9}


KERNELS = {f.__name__: f for f in (laser, simplicial, sonew, lora_rite, loss, ttt_context)}


def main(names=()):
    strange = set(names) - set(KERNELS)
    if strange:
        print(f"there is no kernel {', '.join(sorted(strange))} to time; there are {', '.join(KERNELS)}", file=sys.stderr)
        sys.exit(2)
    names = names or list(KERNELS)
    if not torch.cuda.is_available():
        print("There is no GPU here. On one this would check and time:")
        return print("\n".join(f"{name:12} {KERNELS[name].__doc__}" for name in names))
    import triton
    path = HERE / "results" / "kernels.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, **ceilings()}
    print(f"copy {result['copy_TB_per_s']:.2f} TB/s, matrix product {result['matmul_TFLOP_per_s']:.0f} TFLOP/s", flush=True)
    for name in names:
        result[name] = [report(row) for row in KERNELS[name]()]
        path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
