"""Time the kernels and their alternatives in PyTorch, all in one run.

python experiments/bench_kernels.py              every kernel
python experiments/bench_kernels.py laser sonew  two; keep the other results

First measures the GPU's ceilings: the bandwidth of a copy and the FLOP/s of a
matrix product. Then checks the result of each kernel and takes median times.
The floor of a method is the time that its FLOPs or bytes would take at the
ceiling. Writes kernels.json.

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

    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import train
from experiments.harness import check_writable, study_parser
from experiments.provenance import save_json
from experiments.timing import measure_ceilings, median_ms
from support import cli

PASSES = ("forward_ms", "backward_ms", "step_ms")


# -- what the benchmarks share ---------------------------------------------------------------------


def random_heads(B, T, H, D):
    """Return normal random numbers (B, H, T, D) in bfloat16; in memory they are (B, T, H, D)."""
    t = torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda")
    return t.transpose(1, 2).requires_grad_()


def random_parameters(shape, n):
    """Return n float32 parameters with random gradients."""
    parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for _ in range(n)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def time_passes(attention, inputs):
    """Return milliseconds of the forward and the backward pass."""
    out = attention(*inputs)
    grad_out = torch.randn_like(out)

    def forward():
        attention(*inputs)

    def backward():
        torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    return {"forward_ms": median_ms(forward), "backward_ms": median_ms(backward)}


def time_step(optimizer, bytes_per_parameter):
    """Return milliseconds of a step, and the gigabytes that it must move."""
    optimizer.step()  # creates its state
    (group,) = optimizer.param_groups
    n_parameters = sum(p.numel() for p in group["params"])
    return {"step_ms": median_ms(optimizer.step), "GB": bytes_per_parameter * n_parameters / 1e9}


def relative_error(ours, exact):
    return ((ours.float() - exact).norm() / exact.norm()).item()


def check(name, error, limit):
    """Print the error of a result, and raise one if it is wrong: that is not worth timing."""
    print(f"  {name}: relative error {error:.1e}")
    if not error < limit:
        raise FloatingPointError(f"{name} is wrong by {error:.1e}, more than {limit:.1e}")


# -- the kernels: each function yields a row of results per shape and method -----------------------


def softmax(backend, is_causal=True):
    """Return softmax attention by one of PyTorch's backends."""

    def attention(q, k, v):
        is_gqa = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=is_gqa)

    return attention


def paper_form(q, k, v):
    """LASER as published: log of attention over exp(v), with v shifted by its maximum"""
    v_max = v.detach().amax(2, keepdim=True)
    return softmax(SDPBackend.CUDNN_ATTENTION)(q, k, (v - v_max).exp()).log() + v_max


def laser():
    """LASER attention at B, H, T, D = 4, 16, 4096, 128 and two more shapes"""
    from kernels.laser import attention as ours

    variants = {
        "softmax, cuDNN": softmax(SDPBackend.CUDNN_ATTENTION),
        "paper's form over cuDNN": paper_form,
        "paper's form over cuDNN, compiled": torch.compile(paper_form),
        "ours": ours,
    }
    for B, H, T, D in (4, 16, 4096, 128), (4, 32, 4096, 64), (16, 12, 1024, 64):
        q, k, v = (random_heads(B, T, H, D) for _ in range(3))
        # 2 matrix products forward and 5 backward, each of 2 T^2 D / 2 FLOPs per causal head
        columns = {"shape": [B, H, T, D], "GFLOP": 7 * B * H * T * T * D / 1e9}

        # check the first sequence
        first_q, first_k, first_v = (t[:1].float() for t in (q, k, v))
        exact = softmax(SDPBackend.MATH)(first_q, first_k, first_v.exp()).log()
        difference = ours(q[:1], k[:1], v[:1]) - exact
        check("LASER", difference.abs().max().item(), 0.05)

        for name, attention in variants.items():
            yield {**columns, "name": name, **time_passes(attention, (q, k, v))}


def simplicial():
    """2-simplicial attention, windows 512, 32, at B, H, Hkv, T, D = 4, 64, 1, 4096, 128 and more"""
    from kernels.simplicial import attention
    from simplicial import attention_torch

    w1 = 512
    w2 = 32

    def ours(*inputs):
        return attention(*inputs, w1, w2)[0]

    for B, H, Hkv, T, D in (4, 64, 1, 4096, 128), (2, 16, 16, 4096, 128), (2, 32, 32, 4096, 64):
        # check with two KV heads and more positions than the windows have
        inputs = [random_heads(1, 700, heads, D) for heads in (2 * H // Hkv, 2, 2, 2, 2)]
        difference = ours(*inputs) - attention_torch(*inputs, w1=w1, w2=w2)
        check("2-simplicial attention", difference.abs().max().item(), 0.05)

        # time
        inputs = [random_heads(B, T, heads, D) for heads in (H, Hkv, Hkv, Hkv, Hkv)]
        row = {"shape": [B, H, Hkv, T, D], "name": "ours"}
        # 2 products forward, over w1 w2 pairs per query. A backward pass needs 3 times these FLOPs;
        # ours, without atomics, takes 4.
        gflop = 4 * B * H * T * w1 * w2 * D / 1e9
        yield {**row, **time_passes(ours, inputs), "GFLOP": 4 * gflop}


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
    return relative_error(*updates)


def sonew():
    """one SONew step of 53 float32 matrices of 768 x 3072, 125 M parameters, against fused AdamW"""
    from sonew import SONew

    parameters = random_parameters((768, 3072), 53)
    columns = {"shape": [53, 768, 3072]}
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    yield {**columns, "name": "AdamW, fused", **time_step(adamw, 28)}
    yield {**columns, "name": "Muon", **time_step(torch.optim.Muon(parameters, lr=1e-5), 20)}
    for band, bf16_state in ((1, False), (0, False), (4, False), (1, True), (4, True)):
        options = {"band": band, "bf16_state": bf16_state}
        name = f"band {band}" + (", bf16 state" if bf16_state else "")
        check(name, sonew_error(**options), 0.01)
        n_bytes = 4 * band + 20 if bf16_state else 8 * band + 28
        times = time_step(SONew(parameters, lr=1e-5, **options), n_bytes)
        yield {**columns, "name": name, **times}


def lora_rite():
    """one LoRA-RITE step for 72 pairs of 2048 x 16 and 16 x 2048, and 48 of 768, and fused AdamW"""
    from lora_rite import LoRARITE

    for pairs, d, r in (72, 2048, 16), (48, 768, 16):
        parameters = []
        for _ in range(pairs):
            parameters += random_parameters((r, d), 1) + random_parameters((d, r), 1)
        groups = [{"params": parameters, "pair": True}]

        # check one step, with a learning rate so large that the step exceeds float32's rounding
        start = [p.detach().clone() for p in parameters]
        optimizers = {}
        updates = {}
        for name in ("eager", "ours"):
            for p, x in zip(parameters, start):
                p.data.copy_(x)
            optimizers[name] = LoRARITE(groups, lr=1e3, use_kernel=name == "ours")
            optimizers[name].step()
            changes = [(p.detach() - x).flatten() for p, x in zip(parameters, start)]
            updates[name] = torch.cat(changes)
        check("LoRA-RITE", relative_error(updates["ours"], updates["eager"]), 1e-3)

        columns = {"shape": [pairs, d, r]}
        adamw = torch.optim.AdamW(parameters, fused=True)
        yield {**columns, "name": "AdamW, fused", **time_step(adamw, 28)}
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = 1e-5  # keep the weights in range while timing
            yield {**columns, "name": name, **time_step(optimizer, 32)}


def loss_peers():
    """Return {name: loss(x, weight, targets)} of the installed libraries that have this loss."""

    def pytorch(x, weight, targets):  # in float32, or the mean would be rounded to bfloat16
        return F.cross_entropy((x @ weight.T).float(), targets)

    peers = {"PyTorch, compiled": torch.compile(pytorch)}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["Liger"] = lambda x, weight, targets: liger(weight, x, targets)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        peers["cut-cross-entropy"] = linear_cross_entropy
    return peers


def loss():
    """cross-entropy of x W^T for 65,536 x 768 inputs and 50,304 tokens, with both gradients"""
    N, C, V = 65536, 768, 50304
    x = torch.randn(N, C, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = (0.02 * torch.randn(V, C, device="cuda")).bfloat16().requires_grad_()
    targets = torch.randint(V, (N,), device="cuda")
    variants = {**loss_peers(), "ours": train.linear_cross_entropy}
    values = {name: function(x, weight, targets).item() for name, function in variants.items()}
    check("the loss", abs(values["ours"] - values["PyTorch, compiled"]), 1e-3)
    for name, function in variants.items():

        def step(function=function):
            return torch.autograd.grad(function(x, weight, targets), (x, weight))

        step()  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        row = {"shape": [N, C, V], "name": name, "step_ms": median_ms(step, 10)}
        row.update(peak_memory_gb=memory, GFLOP=6 * N * C * V / 1e9)
        yield row


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
    check("the cross-entropy", abs(value - exact), 1e-3)

    step_ms = median_ms(lambda: ours(logits, targets, scale, True))
    row = {"shape": [R, V], "name": "ours", "step_ms": step_ms}
    yield {**row, "GB": 4 * R * V / 1e9}  # read a logit, write its gradient, 2 bytes each


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
        # without a mask: 0.01% more work here, but the fastest path of each backend
        variants = {
            "softmax, cuDNN": softmax(SDPBackend.CUDNN_ATTENTION, is_causal=False),
            "FlexAttention": lambda q, k, v: flex(q, k, v, enable_gqa=True),
            "ours": lambda q, k, v, start=start: span_attention(q, k[0], v[0], start),
        }

        # check the output and its gradient
        grad_out = torch.randn_like(q)
        exact_q = q.detach().float().requires_grad_()
        exact = reference(exact_q, k[0].float(), v[0].float(), start)
        (exact_grad,) = torch.autograd.grad(exact, exact_q, grad_out.float())
        out = span_attention(q, k[0], v[0], start)
        (grad,) = torch.autograd.grad(out, q, grad_out)
        error = max(relative_error(out, exact), relative_error(grad, exact_grad))
        check("span attention", error, 0.02)

        # half a matrix product takes n H T D FLOPs: 4 of them forward, 6 backward
        columns = {"shape": [1, H, Hkv, n, T, D], "GFLOP": 10 * n * H * T * D / 1e9}
        for name, attention in variants.items():
            times = time_passes(lambda q, f=attention, k=k, v=v: f(q, k, v), (q,))
            yield {**columns, "name": name, **times}


FUNCTIONS = (laser, simplicial, sonew, lora_rite, loss, cross_entropy, ttt_context)
KERNELS = {function.__name__: function for function in FUNCTIONS}


# -- report ----------------------------------------------------------------------------------------


def add_floor(row, ceilings):
    """Add the floor, the time of the FLOPs or bytes at the ceiling, and its share of the total."""
    if "GFLOP" in row:
        floor = row["GFLOP"] / ceilings["matmul_TFLOP_per_s"]
    else:
        floor = row["GB"] / ceilings["copy_TB_per_s"]
    total = sum(row[name] for name in PASSES if name in row)
    return {**row, "floor_ms": floor, "of_floor": floor / total}


def bench(name, ceilings):
    """Run the benchmark of one kernel, and print each row of results. Returns the rows."""
    rows = []
    for row in KERNELS[name]():
        row = add_floor(row, ceilings)
        if not rows or row["shape"] != rows[-1]["shape"]:
            print(f"{name} {' x '.join(map(str, row['shape']))}")
        times = " + ".join(f"{row[p]:.3f}" for p in PASSES if p in row)
        print(f"  {row['name']:34}{times:>14} ms {row['of_floor']:4.0%} of floor", flush=True)
        rows.append(row)
    return rows


def main(argv=None):
    parser = study_parser(__doc__)
    names = f"any of {', '.join(KERNELS)} (default: all)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in KERNELS:
            raise ValueError(f"there is no kernel {name}; there are {', '.join(KERNELS)}")
    path = check_writable(args.out) / "kernels.json"
    if not torch.cuda.is_available():
        raise ValueError("this needs a GPU, and there is none here")

    torch._functorch.config.donated_buffer = False  # to run a compiled backward more than once
    kernels = json.loads(path.read_text())["kernels"] if path.exists() else {}
    record = {"kernels": kernels, **measure_ceilings()}
    copy_tb = record["copy_TB_per_s"]
    print(f"copy {copy_tb:.2f} TB/s, matrix product {record['matmul_TFLOP_per_s']:.0f} TFLOP/s")
    start_time = time.perf_counter()
    for name in args.names or KERNELS:
        kernels[name] = bench(name, record)
        record["seconds"] = time.perf_counter() - start_time
        save_json(path, record, "experiments.bench_kernels", *kernels)
    return record


if __name__ == "__main__":
    cli.run_main(main)
