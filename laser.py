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
cannot touch it, bit for bit. Values below 32 in size fill one band, which costs one attention over exp(v).

    python laser.py                 the experiment below, in two minutes on two CPU cores -> results/laser-cpu.*
    python laser.py --sweep         how its learning rates were found
    python train.py --attn laser    train with it
"""
import contextlib, io, json, math, statistics, tempfile, time
from pathlib import Path

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


# ---------------------------------------------------------------------------------------------------------------------
# The experiment: the same GPT, data and steps; only the attention differs

ARMS = {"softmax": 2e-3, "laser": 2e-3}                              # learning rates, the best of --sweep
SWEEP = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS, STEPS, PROBES = (1, 2, 3), 150, 5


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


def train_arm(train, folder, attn, seed, lr, probe=False):
    """One run -> (held-out bits per byte, {step: gradient that reaches the logits of each layer})."""
    flags = ["--device", "cpu", "--sample", "0"]
    new = f"--model tiny --attn {attn} --seed {seed} --lr {lr} --steps {STEPS} --eval-every {STEPS} --out".split()
    gradients, segment = {}, STEPS // PROBES if probe else STEPS
    for step in range(0, STEPS, segment):                            # stopping to look and going on changes nothing
        with contextlib.redirect_stdout(io.StringIO()):              # the bar on stderr is enough
            run = train.main([*(["--resume"] if step else new), str(folder), "--stop-after", str(segment), *flags])
        if probe:
            model, tokenizer = train.load_model(folder, attn=attn)
            tokens = train.load_tokens("stdlib", tokenizer, folder.parent / ".tokens")[-8 * 129:]
            x, y = train.windows(tokens, range(0, 8 * 129 - 128, 129), 128, torch.device("cpu"))
            gradients[run["step"]] = logit_gradients(model, attn, x, y)
    return run["val_bpb"], gradients


def main(argv=None):
    import train                                                     # the only place that knows the GPT
    parser = train.Parser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="seed 1 at each learning rate, both arms alike")
    parser.add_argument("--out", default="results", help="folder for what comes out (default: results)")
    args = parser.parse_args(argv)
    began, out = time.perf_counter(), Path(args.out)

    def write(name, result):
        with train.atomic(out / name) as f:
            f.write(json.dumps(result, indent=1).encode())
    with tempfile.TemporaryDirectory() as d:
        if args.sweep:
            sweep = {lr: {a: train_arm(train, Path(d, f"{a}-{lr}"), a, 1, lr)[0] for a in ARMS} for lr in SWEEP}
            for lr, scores in sweep.items():
                print(f"lr {lr:.0e}  " + "  ".join(f"{a} {score:.4f}" for a, score in scores.items()), "bits/byte")
            write("laser-cpu-sweep.json", {"seed": 1, "steps": STEPS, "bits_per_byte": sweep, "torch": torch.__version__})
            return sweep
        runs = {a: [train_arm(train, Path(d, f"{a}-{s}"), a, s, lr, probe=s == SEEDS[0]) for s in SEEDS] for a, lr in ARMS.items()}

    bpb = {a: [score for score, _ in r] for a, r in runs.items()}
    difference = [b - a for a, b in zip(bpb["softmax"], bpb["laser"])]
    half = 4.303 * statistics.stdev(difference) / len(SEEDS) ** 0.5  # Student's t, 95%, 2 degrees of freedom
    result = {"bits_per_byte": bpb, "difference": statistics.mean(difference), "half_width_95": half, "seeds": SEEDS,
              "steps": STEPS, "lr": ARMS, "gradients": {a: r[0][1] for a, r in runs.items()}, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "seconds": time.perf_counter() - began}
    write("laser-cpu.json", result)
    draw(train, out / "laser-cpu.png", result)
    print(f"held-out bits/byte, {len(SEEDS)} seeds: " + ", ".join(f"{a} {statistics.mean(b):.4f}" for a, b in bpb.items()))
    verdict = "" if half < abs(result["difference"]) else ": not resolved"
    print(f"laser - softmax, paired: {result['difference']:+.4f} +- {half:.4f} (95%){verdict}")
    last = {a: list(g.values())[-1] for a, g in result["gradients"].items()}
    print("gradient that reaches the logits after training, by layer, laser / softmax: "
          + " ".join(f"{b / a:.2f}" for a, b in zip(last["softmax"], last["laser"])))
    return result


def draw(train, path, result):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for attn, style in (("softmax", "--"), ("laser", "-")):
        steps = list(result["gradients"][attn])
        for n, values in enumerate(zip(*result["gradients"][attn].values())):
            left.plot(steps, values, style, color=f"C{n}", marker="o", ms=3, label=f"{attn}, layer {n + 1}")
    left.set(xlabel="step", ylabel="mean over queries of sum |d loss / d logit|", yscale="log",
             title="gradient that reaches the logits")
    left.legend(fontsize=7, ncols=2)
    for n, seed in enumerate(result["seeds"]):
        right.plot([0, 1], [result["bits_per_byte"][a][n] for a in ("softmax", "laser")], "o-", label=f"seed {seed}")
    right.set(xticks=[0, 1], xticklabels=["softmax", "laser"], xlim=(-0.5, 1.5), ylabel="held-out bits per byte",
              title=f"difference {result['difference']:+.4f} +- {result['half_width_95']:.4f} (95%)")
    right.legend(fontsize=8)
    with train.atomic(path) as f:
        figure.savefig(f, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
