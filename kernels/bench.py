"""Time the kernels on this GPU beside what one would use otherwise, all in one run.

    python kernels/bench.py                 every kernel -> results/kernels.*
    python kernels/bench.py laser sonew     some; the others stay as they are

First the two ceilings, a copy and a matrix product; then, kernel by kernel, a check of the result and the median times. The floor of a
row is what its method cannot do without, FLOPs or bytes, at its ceiling. Without a GPU it says what it would do and draws what there is.

Peers are PyTorch's own. FlexAttention is one for spans over a frozen cache; it changes logits, not values, so LASER over it is the paper's
form again, and it knows no logits of three factors.
"""
import json, statistics, sys, textwrap, time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)        # not kernels/, whose files are named like the papers'

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import train


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


def total_ms(row):
    return sum(row[way] for way in ("forward_ms", "backward_ms", "step_ms") if way in row)


def with_floor(row, result):
    """The row, with how much of its time the method's FLOPs (GFLOP) or bytes (GB) take at the ceilings."""
    floor = row["GFLOP"] / result["matmul_TFLOP_per_s"] if "GFLOP" in row else row["GB"] / result["copy_TB_per_s"]
    return row | {"floor_ms": floor, "of_floor": floor / total_ms(row)}


def size(row):
    return " x ".join(map(str, row["shape"]))


def report(name, rows, result):
    """Print the rows as they come, a line for each shape and one for each arm of it -> list of them"""
    done = []
    for row in rows:
        row = with_floor(row, result)
        if not done or row["shape"] != done[-1]["shape"]:
            print(f"{name} {size(row)}")
        times = " + ".join(f"{row[way]:.3f}" for way in ("forward_ms", "backward_ms", "step_ms") if way in row)
        print(f"  {row['name']:29}{times:>14} ms {row['of_floor']:4.0%} of floor"
              + (f"  error {row['error']:.1e}" if row["name"].startswith(("ours", "band")) and "error" in row else ""), flush=True)
        done.append(row)
    return done


def draw(result, path):
    """The time of every row in units of its floor, a panel for each kernel."""
    names = [name for name in KERNELS if name in result]
    figure, axes = train.figure((9, 1 + 0.55 * len(names) + 0.19 * sum(len(result[n]) for n in names)), len(names), 1, squeeze=False,
                                height_ratios=[len(result[n]) + 2 for n in names])
    for name, ax in zip(names, axes[:, 0]):
        rows = result[name]
        ours = ["C3" if row["name"].startswith(("ours", "band")) else "C7" for row in rows]
        times = [1 / row["of_floor"] for row in rows]
        if max(times) > 50 * min(times):
            ax.set_xscale("log")
        bars = ax.barh(range(len(rows)), times, color=ours)
        ax.bar_label(bars, [f"{total_ms(row):.3g} ms" for row in rows], padding=3, fontsize=7)
        first = [n for n, row in enumerate(rows) if not n or row["shape"] != rows[n - 1]["shape"]]
        ax.set_yticks(range(len(rows)), [(f"{size(row)}:  " if n in first else "") + row["name"] for n, row in enumerate(rows)], fontsize=7)
        for n in first[1:]:
            ax.axhline(n - 0.5, color="0.8", lw=0.8)
        ax.axvline(1, color="k", lw=0.8)
        ax.margins(x=0.1)
        ax.invert_yaxis()
        ax.set_title(f"{name}: " + ("all passes of a step" if "step_ms" in rows[0] else "forward + backward"), fontsize=9)
    axes[-1, 0].set_xlabel(f"time / floor (line: the ceiling), {result['gpu']}; red: ours")
    train.keep(figure, path, dpi=100)


def timed_step(name, shape, optimizer, bytes_per_parameter, **more):
    optimizer.step()                                                 # makes its state
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return {"shape": shape, "name": name, "step_ms": ms(optimizer.step), "host_ms": host_ms(optimizer.step),
            "GB": bytes_per_parameter * parameters / 1e9, **more}


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
            yield {"shape": [B, H, T, D], "name": name, "forward_ms": forward, "backward_ms": backward, "host_ms": host, "error": error,
                   "GFLOP": 7 * B * H * T * T * D / 1e9}             # 2 products forward and 5 backward, of half the pairs each
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
               "GFLOP": 16 * B * H * T * w1 * w2 * D / 1e9,          # a backward pass of 12; ours, without atomics, takes 16
               "forward_TFLOP_per_s": 4 * B * H * T * w1 * w2 * D / forward / 1e9, "backward_over_forward": backward / forward}


def sonew():
    """one step of 53 float32 matrices of 768 x 3072, 125 M parameters, against PyTorch's fused AdamW"""
    from sonew import SONew

    def error(**options):
        """Our step, of statistics of 20 gradients, against that of eager PyTorch, in units of its length"""
        moved = []
        for fits in SONew.fits, lambda p: False:
            torch.manual_seed(0)
            p = torch.nn.Parameter(torch.zeros(768, 3072, device="cuda"))
            optimizer = SONew([p], lr=0.0, **options)
            optimizer.fits = fits
            for step in range(20):
                optimizer.param_groups[0]["lr"] = float(step == 19)
                p.grad = torch.randn_like(p)
                optimizer.step()
            moved.append(p.detach())
        return ((moved[0] - moved[1]).norm() / moved[1].norm()).item()

    parameters = [torch.nn.Parameter(torch.randn(768, 3072, device="cuda")) for _ in range(53)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    yield timed_step("AdamW, fused", [53, 768, 3072], torch.optim.AdamW(parameters, lr=1e-5, fused=True), 28)
    for band, bf16_state in (0, False), (1, False), (4, False), (1, True), (4, True):
        off = error(band=band, bf16_state=bf16_state)
        assert off < 0.01, f"band {band} is off by {off}"
        yield timed_step(f"band {band}" + ", bf16 state" * bf16_state, [53, 768, 3072], SONew(parameters, lr=1e-5, band=band, bf16_state=bf16_state),
                         4 * band + 20 if bf16_state else 8 * band + 28, error=off)


def lora_rite():
    """one step for 72 pairs of 2048 x 16 and 16 x 2048 in float32, and 48 of 768, against PyTorch's fused AdamW on the same factors"""
    from lora_rite import LoRARITE
    for pairs, d, r in (72, 2048, 16), (48, 768, 16):
        parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for _ in range(pairs) for shape in ((r, d), (d, r))]
        for p in parameters:
            p.grad = torch.randn_like(p)
        start = [p.detach().clone() for p in parameters]
        eager, ours = (LoRARITE([{"params": parameters, "pair": True}], lr=1e3) for _ in range(2))               # so large that it is seen in x
        eager.fits = lambda A, B: False
        moved = []
        for optimizer in (eager, ours):
            for p, x in zip(parameters, start):
                p.data.copy_(x)
            optimizer.step()
            moved.append(torch.cat([(p.detach() - x).flatten() for p, x in zip(parameters, start)]))
        error = ((moved[1] - moved[0]).norm() / moved[0].norm()).item()
        assert error < 1e-3, f"off by {error} of the step"
        for optimizer in (eager, ours):
            optimizer.param_groups[0]["lr"] = 1e-5                   # what is timed stays where it is
        yield timed_step("AdamW, fused", [pairs, d, r], torch.optim.AdamW(parameters, fused=True), 28)
        yield timed_step("eager", [pairs, d, r], eager, 32)
        yield timed_step("ours", [pairs, d, r], ours, 32, error=error)


def loss():
    """cross-entropy of 65,536 x 50,304 bfloat16 logits and its gradient, in place, against PyTorch, compiled"""
    from kernels.train import cross_entropy
    R, V = 65536, 50304
    logits = torch.randn(R, V, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target, scale = torch.randint(V, (R, 1), device="cuda"), torch.full((R, 1), 1 / R, device="cuda")
    theirs = torch.compile(lambda z: F.cross_entropy(z.float(), target[:, 0]))               # else its mean is rounded to bfloat16
    truth, need = theirs(logits).item(), {"GB": 4 * R * V / 1e9}     # a logit read and its gradient written, 2 bytes each
    yield {"shape": [R, V], "name": "PyTorch, compiled", "step_ms": ms(lambda: torch.autograd.grad(theirs(logits), logits)), **need}
    logits = logits.detach()
    ours = cross_entropy(logits, target, scale, False)[0].item()
    assert abs(ours - truth) < 1e-3, f"off by {ours - truth}"
    yield {"shape": [R, V], "name": "ours", "step_ms": ms(lambda: cross_entropy(logits, target, scale, True)), "error": abs(ours - truth), **need}


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
    H, Hkv, n, D, flex = 32, 8, 128, 128, torch.compile(flex_attention, dynamic=False)
    for T in 131072, 32768:
        q, start = torch.randn(1, H, n, D, dtype=torch.bfloat16, device="cuda", requires_grad=True), torch.tensor([T - n])
        k, v = torch.randn(2, 1, Hkv, T, D, dtype=torch.bfloat16, device="cuda")
        do, wide = torch.randn_like(q), q.detach().float().requires_grad_()
        o = reference(wide, k[0].float(), v[0].float(), start)
        truth = o.detach(), *torch.autograd.grad(o, wide, do.float())
        del o
        arms = {"softmax, cuDNN": every_key(SDPBackend.CUDNN_ATTENTION), "softmax, flash": every_key(SDPBackend.FLASH_ATTENTION),
                "FlexAttention": lambda q, k, v: flex(q, k, v, enable_gqa=True), "ours": lambda q, k, v: span_attention(q, k[0], v[0], start)}
        for name, attention in arms.items():
            o, forward, backward = both_ways(lambda q: attention(q, k, v), (q,))
            got = o.detach(), *torch.autograd.grad(o, q, do)
            error = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, truth))
            assert name != "ours" or error < 0.02, f"off by {error}"
            yield {"shape": [1, H, Hkv, n, T, D], "name": name, "forward_ms": forward, "backward_ms": backward, "error": error,
                   "GFLOP": 10 * n * H * T * D / 1e9, "forward_TFLOP_per_s": 4 * n * H * T * D / forward / 1e9,
                   "backward_TFLOP_per_s": 6 * n * H * T * D / backward / 1e9}


KERNELS = {f.__name__: f for f in (laser, simplicial, sonew, lora_rite, loss, ttt_context)}


def main(argv=None):
    parser = train.Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a kernel: {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--out", default="results", help="folder for what comes out (default: results)")
    args = parser.parse_args(argv)
    strange, names = set(args.names) - set(KERNELS), args.names or list(KERNELS)
    if strange:
        train.fail(f"there is no kernel {', '.join(sorted(strange))} to time; there are {', '.join(KERNELS)}")
    path = train.writable(args.out) / "kernels.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if torch.cuda.is_available():
        import triton
        result |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, **ceilings()}
        print(f"copy {result['copy_TB_per_s']:.2f} TB/s, matrix product {result['matmul_TFLOP_per_s']:.0f} TFLOP/s", flush=True)
        torch._functorch.config.donated_buffer = False               # else a compiled graph runs backward but once
        for name in names:
            result[name] = report(name, KERNELS[name](), result)
            with train.atomic(path) as f:
                f.write(json.dumps(result, indent=1).encode())
    else:
        print("There is no GPU here. On one this would check and time:")
        for name in names:
            print(textwrap.fill(f"{name:12} {' '.join(KERNELS[name].__doc__.split())}", 79, subsequent_indent=" " * 13))
    if set(result) & set(KERNELS):
        draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    train.leave(main)
