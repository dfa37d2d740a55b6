"""Time the kernels and their alternatives in PyTorch, all in one run.

python experiments/bench_kernels.py              every kernel
python experiments/bench_kernels.py laser sonew  two; keep the other results

First measures the GPU's ceilings: the bandwidth of a copy and the FLOP/s of a
matrix product. Then checks the result of each kernel and takes median times.
The floor of a method is the time that its FLOPs or bytes would take at the
ceiling. Writes kernels.json and kernels.png. Without a GPU, prints the list of
kernels.

FlexAttention can modify logits, not values. So it is an alternative for spans
over a frozen cache, but not for LASER, nor for 2-simplicial attention, whose
logits have three factors.
"""

import importlib
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import train
from experiments import harness
from experiments.timing import host_ms, measure_ceilings, median_ms
from support import cli

PASSES = ("forward_ms", "backward_ms", "step_ms")


# -- parts -----------------------------------------------------------------------------------------


def random_heads(B, T, H, D):
    """Return normal random numbers (B, H, T, D) in bfloat16; in memory they are (B, T, H, D)."""
    t = torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda")
    return t.transpose(1, 2).requires_grad_()


def time_passes(attention, inputs):
    """Return the output, and milliseconds of the forward and the backward pass."""
    out = attention(*inputs)
    grad_out = torch.randn_like(out)

    def backward():
        torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    return out, median_ms(lambda: attention(*inputs)), median_ms(backward)


def time_step(name, shape, optimizer, bytes_per_parameter, **columns):
    """Return a row of results with the time of a step; columns: more entries of the row."""
    optimizer.step()  # creates its state
    n_parameters = 0
    for group in optimizer.param_groups:
        n_parameters += sum(p.numel() for p in group["params"])
    row = {"shape": shape, "name": name, "step_ms": median_ms(optimizer.step)}
    row["host_ms"] = host_ms(optimizer.step)
    row["GB"] = bytes_per_parameter * n_parameters / 1e9
    return {**row, **columns}


def require(condition, message):
    """Raise an error unless the condition holds: a wrong kernel is not worth timing."""
    if not condition:
        raise FloatingPointError(message)


# -- the kernels: each function yields a row of results per method and shape -----------------------


def softmax(backend):
    """Return causal softmax attention by one of PyTorch's backends."""

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attention


def paper_form(backend):
    """Return LASER as published: log of attention over exp(v), with v shifted by its maximum."""
    softmax_attention = softmax(backend)

    def attention(q, k, v):
        v_max = v.detach().amax(2, keepdim=True)
        return softmax_attention(q, k, (v - v_max).exp()).log() + v_max

    return attention


def laser():
    """LASER attention at B, H, T, D = 4, 16, 4096, 128 and two more shapes"""
    from kernels.laser import attention as ours

    cudnn = SDPBackend.CUDNN_ATTENTION
    variants = {
        "softmax, cuDNN": softmax(cudnn),
        "softmax, flash": softmax(SDPBackend.FLASH_ATTENTION),
        "paper's form over cuDNN": paper_form(cudnn),
        "paper's form over cuDNN, compiled": torch.compile(paper_form(cudnn)),
        "ours": ours,
        "ours, all in Triton": ours,
    }
    # in deterministic mode, torch.empty would also write NaN, which takes time
    torch.utils.deterministic.fill_uninitialized_memory = False
    for B, H, T, D in (4, 16, 4096, 128), (4, 32, 4096, 64), (16, 12, 1024, 64):
        q, k, v = (random_heads(B, T, H, D) for _ in range(3))
        first_q, first_k, first_v = (t[:1].float() for t in (q, k, v))
        exact = softmax(SDPBackend.MATH)(first_q, first_k, first_v.exp()).log()
        for name, attention in variants.items():
            torch.use_deterministic_algorithms("Triton" in name)  # ours then avoids cuDNN
            out, forward, backward = time_passes(attention, (q, k, v))
            error = (out[:1] - exact).abs().max().item()
            require(name.startswith("softmax") or error < 0.05, f"{name} is off by {error}")
            grad_out = torch.empty_like(out)
            host = host_ms(lambda f=attention: torch.autograd.grad(f(q, k, v), (q, k, v), grad_out))
            row = {"shape": [B, H, T, D], "name": name, "error": error, "host_ms": host}
            row.update(forward_ms=forward, backward_ms=backward)
            # 2 matrix products forward and 5 backward, each of 2 T^2 D / 2 FLOPs per causal head
            yield {**row, "GFLOP": 7 * B * H * T * T * D / 1e9}
    torch.use_deterministic_algorithms(False)


def simplicial():
    """2-simplicial attention, windows 512, 32, at B, H, Hkv, T, D = 4, 64, 1, 4096, 128 and more"""
    from kernels.simplicial import attention
    from simplicial import attention_torch

    w1 = 512
    w2 = 32
    for B, H, Hkv, T, D in (4, 64, 1, 4096, 128), (2, 16, 16, 4096, 128), (2, 32, 32, 4096, 64):
        # check with two KV heads and more positions than the windows have
        inputs = [random_heads(1, 700, heads, D) for heads in (2 * H // Hkv, 2, 2, 2, 2)]
        exact = attention_torch(*inputs, w1=w1, w2=w2)
        error = (attention(*inputs, w1, w2)[0] - exact).abs().max().item()
        require(error < 0.05, f"2-simplicial attention is off by {error}")

        # time
        inputs = [random_heads(B, T, heads, D) for heads in (H, Hkv, Hkv, Hkv, Hkv)]
        _, forward, backward = time_passes(lambda *t: attention(*t, w1, w2)[0], inputs)
        forward_gflop = 4 * B * H * T * w1 * w2 * D / 1e9  # 2 products over w1 w2 pairs per query
        row = {"shape": [B, H, Hkv, T, D], "name": "ours", "error": error}
        row.update(forward_ms=forward, backward_ms=backward)
        row.update(forward_TFLOP_per_s=forward_gflop / forward)
        row.update(backward_over_forward=backward / forward)
        # a backward pass needs 3 times the FLOPs of the forward; ours, without atomics, takes 4
        yield {**row, "GFLOP": 4 * forward_gflop}


def sonew_error(**options):
    """Return the relative error of the kernel's 20th step, compared with PyTorch's."""
    from sonew import SONew

    updates = []
    for use_kernel in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(768, 3072, device="cuda"))
        optimizer = SONew([p], lr=0.0, use_kernel=use_kernel, **options)
        for step in range(20):
            optimizer.param_groups[0]["lr"] = float(step == 19)  # p moves in the last step only
            p.grad = torch.randn_like(p)
            optimizer.step()
        updates.append(p.detach())
    ours, exact = updates
    return ((ours - exact).norm() / exact.norm()).item()


def sonew():
    """one SONew step of 53 float32 matrices of 768 x 3072, 125 M parameters, against fused AdamW"""
    from sonew import SONew

    shape = [53, 768, 3072]
    parameters = [torch.nn.Parameter(torch.randn(768, 3072, device="cuda")) for _ in range(53)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    yield time_step("AdamW, fused", shape, torch.optim.AdamW(parameters, lr=1e-5, fused=True), 28)
    yield time_step("Muon", shape, torch.optim.Muon(parameters, lr=1e-5), 20)
    for band, bf16_state in ((0, False), (1, False), (4, False), (1, True), (4, True)):
        options = {"band": band, "bf16_state": bf16_state}
        error = sonew_error(**options)
        require(error < 0.01, f"band {band} is off by {error}")
        name = f"band {band}" + (", bf16 state" if bf16_state else "")
        n_bytes = 4 * band + 20 if bf16_state else 8 * band + 28
        optimizer = SONew(parameters, lr=1e-5, **options)
        yield time_step(name, shape, optimizer, n_bytes, error=error)


def lora_rite():
    """one LoRA-RITE step for 72 pairs of 2048 x 16 and 16 x 2048, and 48 of 768, and fused AdamW"""
    from lora_rite import LoRARITE

    for pairs, d, r in (72, 2048, 16), (48, 768, 16):
        parameters = []
        for _ in range(pairs):
            parameters.append(torch.nn.Parameter(torch.randn(r, d, device="cuda")))
            parameters.append(torch.nn.Parameter(torch.randn(d, r, device="cuda")))
        for p in parameters:
            p.grad = torch.randn_like(p)

        # check one step, with a learning rate so large that the step exceeds float32's rounding
        start = [p.detach().clone() for p in parameters]
        groups = [{"params": parameters, "pair": True}]
        optimizers = {}
        updates = {}
        for use_kernel in (False, True):
            for p, x in zip(parameters, start):
                p.data.copy_(x)
            optimizers[use_kernel] = LoRARITE(groups, lr=1e3, use_kernel=use_kernel)
            optimizers[use_kernel].step()
            changes = [(p.detach() - x).flatten() for p, x in zip(parameters, start)]
            updates[use_kernel] = torch.cat(changes)
        difference = (updates[True] - updates[False]).norm()
        error = (difference / updates[False].norm()).item()
        require(error < 1e-3, f"LoRA-RITE is off by {error} of the step")

        shape = [pairs, d, r]
        yield time_step("AdamW, fused", shape, torch.optim.AdamW(parameters, fused=True), 28)
        for use_kernel, name in ((False, "eager"), (True, "ours")):
            optimizer = optimizers[use_kernel]
            optimizer.param_groups[0]["lr"] = 1e-5  # keep the weights in range while timing
            columns = {"error": error} if use_kernel else {}
            yield time_step(name, shape, optimizer, 32, **columns)


def loss_peers():
    """Return {name: loss(x, weight, targets)} of the installed libraries that have this loss."""

    def pytorch(x, weight, targets):  # in float32, or the mean would be rounded to bfloat16
        return F.cross_entropy((x @ weight.T).float(), targets)

    peers = {"PyTorch, compiled": torch.compile(pytorch)}
    if hasattr(F, "linear_cross_entropy"):
        peers["PyTorch, F.linear_cross_entropy"] = F.linear_cross_entropy
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["Liger"] = lambda x, weight, targets: liger(weight, x, targets)
    if importlib.util.find_spec("cut_cross_entropy"):
        import cut_cross_entropy

        peers["cut-cross-entropy"] = cut_cross_entropy.linear_cross_entropy
    return peers


def loss():
    """cross-entropy of x W^T for 65,536 x 768 inputs and 50,304 tokens, with both gradients"""
    N, C, V = 65536, 768, 50304
    x = torch.randn(N, C, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    variants = {**loss_peers(), "ours": train.linear_cross_entropy}
    exact = variants["PyTorch, compiled"](x, weight, targets).item()
    for name, function in variants.items():

        def step(function=function):
            return torch.autograd.grad(function(x, weight, targets), (x, weight))

        error = abs(function(x, weight, targets).item() - exact)
        require(name != "ours" or error < 1e-3, f"the loss is off by {error}")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        row = {"shape": [N, C, V], "name": name, "step_ms": median_ms(step, 10), "error": error}
        yield {**row, "peak_memory_gb": memory, "GFLOP": 6 * N * C * V / 1e9}


def cross_entropy():
    """cross-entropy of 65,536 x 50,304 bfloat16 logits and its gradient, in place"""
    from kernels.cross_entropy import cross_entropy as ours

    R, V = 65536, 50304
    logits = torch.randn(R, V, dtype=torch.bfloat16, device="cuda")
    targets = torch.randint(V, (R, 1), device="cuda")
    scale = torch.full((R, 1), 1 / R, device="cuda")
    # check on 1/64 of the rows: their scale is 64 / R
    exact = F.cross_entropy(logits[:1024].float(), targets[:1024, 0]).item()
    value = ours(logits[:1024].clone(), targets[:1024], 64 * scale[:1024], False)[0].item()
    error = abs(value - exact)
    require(error < 1e-3, f"the cross-entropy is off by {error}")
    step_ms = median_ms(lambda: ours(logits, targets, scale, True))
    row = {"shape": [R, V], "name": "ours", "step_ms": step_ms, "error": error}
    yield {**row, "GB": 4 * R * V / 1e9}  # read a logit, write its gradient, 2 bytes each


def unmasked(backend):
    """Return attention without a mask: 0.01% more work here, but the backend's fastest path."""

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return attention


def ttt_context():
    """128 queries of 32 heads after 131,072 and 32,768 keys of 8 heads, D = 128, gradient of q"""
    from kernels.ttt_context import span_attention
    from ttt_context import reference

    H, Hkv, n, D = 32, 8, 128, 128
    flex = torch.compile(flex_attention, dynamic=False)
    for T in 131072, 32768:
        start = torch.tensor([T - n])
        q = torch.randn(1, H, n, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        k, v = torch.randn(2, 1, Hkv, T, D, dtype=torch.bfloat16, device="cuda")
        grad_out = torch.randn_like(q)

        exact_q = q.detach().float().requires_grad_()
        exact = reference(exact_q, k[0].float(), v[0].float(), start)
        exact_grad = torch.autograd.grad(exact, exact_q, grad_out.float())[0]
        exact = exact.detach()

        variants = {
            "softmax, cuDNN": unmasked(SDPBackend.CUDNN_ATTENTION),
            "softmax, flash": unmasked(SDPBackend.FLASH_ATTENTION),
            "FlexAttention": lambda q, k, v: flex(q, k, v, enable_gqa=True),
            "ours": lambda q, k, v, start=start: span_attention(q, k[0], v[0], start),
        }
        for name, attention in variants.items():
            out, forward, backward = time_passes(lambda q, f=attention, k=k, v=v: f(q, k, v), (q,))
            grad = torch.autograd.grad(out, q, grad_out)[0]
            error_out = ((out.detach() - exact).norm() / exact.norm()).item()
            error_grad = ((grad - exact_grad).norm() / exact_grad.norm()).item()
            error = max(error_out, error_grad)
            require(name != "ours" or error < 0.02, f"span attention is off by {error}")
            gflop = n * H * T * D / 1e9  # half a matrix product: 4 forward, 6 backward
            row = {"shape": [1, H, Hkv, n, T, D], "name": name, "error": error, "GFLOP": 10 * gflop}
            row.update(forward_ms=forward, backward_ms=backward)
            row.update(forward_TFLOP_per_s=4 * gflop / forward)
            yield {**row, "backward_TFLOP_per_s": 6 * gflop / backward}


KERNELS = (laser, simplicial, sonew, lora_rite, loss, cross_entropy, ttt_context)
KERNELS = {function.__name__: function for function in KERNELS}


# -- report ----------------------------------------------------------------------------------------


def total_ms(row):
    return sum(row[name] for name in PASSES if name in row)


def is_ours(row):
    return row["name"].startswith(("ours", "band"))


def add_floor(row, ceilings):
    """Add the floor, the time of the FLOPs or bytes at the ceiling, and its share of the total."""
    if "GFLOP" in row:
        floor = row["GFLOP"] / ceilings["matmul_TFLOP_per_s"]
    else:
        floor = row["GB"] / ceilings["copy_TB_per_s"]
    return {**row, "floor_ms": floor, "of_floor": floor / total_ms(row)}


def bench(name, ceilings):
    """Run the benchmark of one kernel, printing each row of results; return the rows."""
    rows = []
    for row in KERNELS[name]():
        row = add_floor(row, ceilings)
        if not rows or row["shape"] != rows[-1]["shape"]:
            print(f"{name} {' x '.join(map(str, row['shape']))}")
        times = " + ".join(f"{row[p]:.3f}" for p in PASSES if p in row)
        error = f"  error {row['error']:.1e}" if is_ours(row) and "error" in row else ""
        print(
            f"  {row['name']:34}{times:>14} ms {row['of_floor']:4.0%} of floor{error}", flush=True
        )
        rows.append(row)
    return rows


def plot(record):
    """Plot the time of every method in units of its floor, one panel per kernel."""
    names = [name for name in KERNELS if name in record["kernels"]]
    heights = [len(record["kernels"][name]) + 2 for name in names]
    figure, axes = harness.new_figure(
        (9, 0.2 * sum(heights) + 1), len(names), 1, squeeze=False, height_ratios=heights
    )
    for name, ax in zip(names, axes[:, 0]):
        rows = record["kernels"][name]
        times = [1 / row["of_floor"] for row in rows]
        colors = ["C3" if is_ours(row) else "C7" for row in rows]
        bars = ax.barh(range(len(rows)), times, color=colors)
        ax.bar_label(bars, [f"{total_ms(row):.3g} ms" for row in rows], padding=3, fontsize=7)
        labels = [f"{'x'.join(map(str, row['shape']))}: {row['name']}" for row in rows]
        ax.set_yticks(range(len(rows)), labels, fontsize=7)
        if max(times) > 50 * min(times):
            ax.set_xscale("log")
        ax.axvline(1, color="black", lw=0.8)
        ax.margins(x=0.1)
        ax.invert_yaxis()
        passes = "one step" if "step_ms" in rows[0] else "forward + backward"
        ax.set_title(f"{name}: {passes}", fontsize=9)
    axes[-1, 0].set_xlabel(f"time / floor (line: the ceiling), {record['hardware']}; red: ours")
    return figure


def main(argv=None):
    parser = harness.study_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels to time (default: all)")
    args = parser.parse_args(argv)
    names = args.names or list(KERNELS)
    unknown = set(names) - set(KERNELS)
    if unknown:
        raise ValueError(f"there is no kernel {sorted(unknown)[0]}; there are {', '.join(KERNELS)}")
    path = harness.check_writable(args.out) / "kernels.json"
    if not torch.cuda.is_available():
        print("There is no GPU here. On one this would check and time:")
        for name in names:
            print(f"  {name:14} {KERNELS[name].__doc__}")
        return {}

    record = json.loads(path.read_text()) if path.exists() else {"kernels": {}}
    torch._functorch.config.donated_buffer = False  # to run a compiled backward more than once
    record.update(measure_ceilings())
    copy_tb = record["copy_TB_per_s"]
    print(f"copy {copy_tb:.2f} TB/s, matrix product {record['matmul_TFLOP_per_s']:.0f} TFLOP/s")
    start_time = time.perf_counter()
    for name in names:
        record["kernels"][name] = bench(name, record)
        record["seconds"] = time.perf_counter() - start_time
        harness.save_json(path, {**record, **harness.provenance()})
    harness.save_figure(plot({**record, **harness.provenance()}), path.with_suffix(".png"), dpi=100)
    return record


if __name__ == "__main__":
    cli.run_main(main)
