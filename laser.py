"""LASER: attention with exponential transformation (Duvvuri and Dhillon, ICML 2025, arXiv 2411.03493).

The gradient that reaches the logits of softmax attention passes p (v_j - o), which vanishes with the probabilities. LASER
attends to exp(v) and takes the logarithm of the result, a log-sum-exp over the keys for each channel:

    o_i = log sum_j p_ij exp(v_j)          p_i = softmax_j(q_i . k_j / sqrt(D)), j <= i

    d o_i / d s_ij = b_ij - p_ij           posterior minus prior, b_ij = p_ij exp(v_j - o_i), which sums to 1 over j

so a key with a large value pulls even where its probability is small. The function lies between softmax attention (Jensen)
and the largest value seen, and v + c gives o + c.

The published form subtracts the largest value over *all* keys before exp. One future token that is 110 above the rest then
sends every earlier row to log 0. On a GPU kernels/laser.py says what is done instead. In PyTorch values are taken in bands of
64 around the fixed centres 0, 64, -64, ...: within a band exp neither overflows nor underflows in float32, bands are joined in
the logarithm, and what a row does not see cannot touch it, bit for bit. Values below 32 in size fill one band, which costs one
attention over exp(v).

    python laser.py                 the experiment below, in two minutes on two CPU cores -> results/laser-cpu.*
    python laser.py --sweep         how its learning rates were found
    python laser.py --full          99 M parameters, learning rates swept, in seven minutes on one H200 -> results/laser-h200.*
    python train.py --attn laser    train with it
"""
import functools, json, math, shutil, statistics, sys, tempfile, time
from pathlib import Path

import torch
import torch.nn.functional as F

try:
    from kernels import laser as kernel
except ModuleNotFoundError as e:
    if e.name != "triton":
        raise
    kernel = None

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
    """LASER attention, as `reference` in shapes and meaning, without a (Tq, Tk) tensor: by kernels/laser.py on a GPU, else by
    PyTorch. float64, which has no kernel, and heads wider than 128 take PyTorch's way on a GPU too."""
    if q.is_cuda and q.dtype != torch.float64:
        if kernel and q.shape[3] <= 128:
            return kernel.attention(q, k, v)
        degrade("there is no Triton here (pip install triton)" if not kernel else f"heads are {q.shape[3]} wide; the kernel takes up to 128")
    return banded(q, k, v)


@functools.cache
def degrade(reason):
    print(f"LASER takes PyTorch's slower way: {reason}", file=sys.stderr)


def banded(q, k, v):
    """In PyTorch: scaled_dot_product_attention over exp(v), a band of values at a time. float16 and bfloat16 are computed in
    float32, since exp(v) of a small v keeps little of it in 8 or 11 bits."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The experiment: the same GPT, data and steps; only the attention differs

ARMS, SEEDS = ("softmax", "laser"), (1, 2, 3)
LAPTOP = {"name": "laser-cpu", "steps": 150, "probes": 5, "data": "stdlib", "flags": "--model tiny --device cpu",
          "sweep": (1e-3, 2e-3, 4e-3, 8e-3), "lr": {"softmax": 2e-3, "laser": 2e-3}}         # the best of --sweep
FULL = {"name": "laser-h200", "steps": 200, "probes": 1, "data": "python", "flags": "--model gpt2 --n-layer 14 --device cuda",
        "sweep": (1.25e-4, 2.5e-4, 5e-4, 1e-3)}                      # swept with seed 0 before the seeds are run


def logit_gradients(model, attn, x, y):
    """-> for each layer the mean over heads and queries of sum_j |d loss / d s_ij|, times the number of tokens that the loss
    is a mean over, so that it does not depend on the batch. The attention is computed here with its logits in the open."""
    kept = []

    def open_attention(q, k, v):                                     # equal heads, Tq == Tk
        s = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5                                     # (B, H, T, T)
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        s.retain_grad()
        kept.append(s)
        p = s.softmax(-1)
        return (p @ v.exp()).log() if attn == "laser" else p @ v
    for layer in model.layers:
        layer.self_attn.attention = open_attention
    model(x, y).backward()
    return [s.grad.abs().sum(-1).mean().item() * y.numel() for s in kept]


def train_arm(train, folder, recipe, attn, seed, lr, probe=False):
    """One run -> (held-out bits per byte, seconds, {step: gradient that reaches the logits of each layer})."""
    steps, gradients, began = recipe["steps"], {}, time.perf_counter()
    new = f"--attn {attn} --data {recipe['data']} --seed {seed} --lr {lr} --steps {steps} --eval-every {steps} {recipe['flags']} --out"
    segment = steps // recipe["probes"] if probe else steps
    for step in range(0, steps, segment):                            # stopping to look and going on changes nothing
        first = ["--resume"] if step else new.split()
        run, _ = train.part([*first, str(folder), "--stop-after", str(segment), "--sample", "0", "--device", recipe["flags"].split()[-1]])
        seconds = time.perf_counter() - began
        if probe:
            device = torch.device(recipe["flags"].split()[-1])
            model, tokenizer = train.load_model(folder, device, attn=attn)
            T = model.cfg.block_size
            tokens = train.load_tokens(recipe["data"], tokenizer, folder.parent / ".tokens")[-8 * (T + 1):]
            x, y = train.windows(tokens, range(0, len(tokens) - T, T + 1), T, device)
            gradients[run["step"]] = logit_gradients(model, attn, x, y)
            del model
    shutil.rmtree(folder)
    return run["val_bpb"], seconds, gradients


def main(argv=None):
    import train                                                     # the only place that knows the GPT
    parser = train.Parser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="the version for one H200: 99 M parameters, all Python source here")
    which.add_argument("--sweep", action="store_true", help="the laptop's learning rates, one seed, both arms alike")
    parser.add_argument("--out", default="results", help="folder for what comes out (default: results)")
    args = parser.parse_args(argv)
    if args.full and not torch.cuda.is_available():
        train.fail("--full trains 99 M parameters fourteen times and needs a CUDA GPU; leave it out for the version for a laptop")
    began, out, recipe = time.perf_counter(), train.writable(args.out), FULL if args.full else LAPTOP

    def write(name, result):
        with train.atomic(out / name) as f:
            f.write(json.dumps(result, indent=1).encode())
    with tempfile.TemporaryDirectory() as d:
        lrs, sweep = recipe.get("lr"), None
        if args.sweep or not lrs:
            sweep = {lr: {a: train_arm(train, Path(d, f"{a}-{lr}"), recipe, a, 0 if args.full else 1, lr)[0] for a in ARMS}
                     for lr in recipe["sweep"]}
            lrs = {a: min(sweep, key=lambda lr: sweep[lr][a]) for a in ARMS}
            for lr, scores in sweep.items():
                print(f"lr {lr:.0e}  " + "  ".join(f"{a} {score:.4f}" for a, score in scores.items()), "bits/byte")
        if args.sweep:
            write("laser-cpu-sweep.json", {"seed": 1, "steps": recipe["steps"], "bits_per_byte": sweep, "torch": torch.__version__})
            return sweep
        runs = {a: [train_arm(train, Path(d, f"{a}-{s}"), recipe, a, s, lrs[a], probe=s == SEEDS[0]) for s in SEEDS] for a in ARMS}

    bpb = {a: [r[0] for r in runs[a]] for a in ARMS}
    difference = [b - a for a, b in zip(bpb["softmax"], bpb["laser"])]
    mean, half = train.interval(difference)
    result = {"bits_per_byte": bpb, "difference": mean, "half_width_95": half, "seeds": SEEDS,
              "steps": recipe["steps"], "flags": recipe["flags"], "data": recipe["data"], "lr": lrs, "sweep": sweep,
              "run_seconds": {a: [r[1] for r in runs[a]] for a in ARMS}, "gradients": {a: runs[a][0][2] for a in ARMS},
              "torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": time.perf_counter() - began,
              "gpu": torch.cuda.get_device_name() if args.full else None}
    write(f"{recipe['name']}.json", result)
    draw(train, out / f"{recipe['name']}.png", result)
    print(f"held-out bits/byte, {len(SEEDS)} seeds: " + ", ".join(f"{a} {statistics.mean(b):.4f}" for a, b in bpb.items()))
    verdict = "" if half < abs(result["difference"]) else ": not resolved"
    print(f"laser - softmax, paired: {result['difference']:+.4f} +- {half:.4f} (95%){verdict}")
    last = {a: list(g.values())[-1] for a, g in result["gradients"].items()}
    print("gradient that reaches the logits after training, by layer, laser / softmax: "
          + " ".join(f"{b / a:.2f}" for a, b in zip(last["softmax"], last["laser"])))
    return result


def draw(train, path, result):
    figure, (left, right) = train.figure((9, 4), 1, 2)
    for attn, style in (("softmax", "--"), ("laser", "-")):
        steps, layers = list(result["gradients"][attn]), list(zip(*result["gradients"][attn].values()))
        if len(steps) == 1:
            left.plot(range(1, len(layers) + 1), [g for g, in layers], style, color=f"C{ARMS.index(attn)}", marker="o", ms=3, label=attn)
        for n, values in enumerate(layers if len(steps) > 1 else []):
            left.plot(steps, values, style, color=f"C{n}", marker="o", ms=3, label=f"{attn}, layer {n + 1}")
    left.set(xlabel="step" if len(steps) > 1 else f"layer, after {steps[0]} steps", yscale="log",
             ylabel="mean over queries of sum |d loss / d logit|", title="gradient that reaches the logits")
    left.legend(fontsize=7, ncols=2)
    for n, seed in enumerate(result["seeds"]):
        right.plot([0, 1], [result["bits_per_byte"][a][n] for a in ("softmax", "laser")], "o-", label=f"seed {seed}")
    right.set(xticks=[0, 1], xticklabels=["softmax", "laser"], xlim=(-0.5, 1.5), ylabel="held-out bits per byte",
              title=f"difference {result['difference']:+.4f} +- {result['half_width_95']:.4f} (95%)")
    right.legend(fontsize=8)
    train.keep(figure, path)


if __name__ == "__main__":
    import train
    train.leave(main)
