"""LASER: does more gradient reach the logits where attention is peaked?

Attention is peaked where one key has nearly all of the probability. With the gradient g (D) at the
output of a query, the gradient at the logit of key j is

    softmax attention    p_j sum_d g_d (v_jd - out_d)
    LASER                p_j sum_d g_d (exp(v_jd - out_d) - 1)     with LASER's own output

Both vanish with p_j. LASER's is larger for keys whose value is far above the output. The metric is
log10 of sum_j |gradient_j|. We compute both gradients from the same p, v and g, of two kinds:

    random logits    their standard deviation decides how peaked attention is; g is random,
                     or 1 at one component of the output alone
    trained GPTs     of 2 layers, trained with LASER: the queries with one p_j above 0.9

The study does not compare the losses of GPTs trained with LASER and with softmax attention, because
runs that a laptop can do show no difference. It also measures the rounding errors of the paper's
form of LASER and of ours.
"""

import io
import math
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

import train
from experiments import harness
from experiments.provenance import save_json
from laser import attention, causal_mask, reference
from support import data

SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
LOGIT_STDS = (0.5, 1, 2, 4, 8, 16)
REPORTED_STDS = (1, 4, 16)  # in the table of differences; the figure shows all
FLAGS = "--attn laser --n-layer 2 --n-embd 64 --n-head 2 --block-size 128 --batch-size 16"
DATA = "stdlib"
STEPS = 100
LR = 3e-3
HELD_OUT_SEQUENCES = 16
PEAKED = 0.9  # the attention of a query is peaked if one key has a higher probability


# -- the gradient at the logits --------------------------------------------------------------------


def logit_gradients(p, v, grad_out):
    """Return {variant: sum_j |d loss / d logit_ij|}, (..., Tq), for softmax attention and LASER.

    p (..., Tq, Tk): probabilities; v (..., Tk, D); grad_out (..., Tq, D): g = d loss / d output.
    """
    # Softmax attention is out = sum_j p_j v_j. With p = softmax(logits), the gradient at logit j is
    # p_j (g . v_j - g . out).
    out = p @ v
    grad_softmax = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True))

    # LASER is out = log x, where x = sum_j p_j exp(v_j) is softmax attention to exp(v). The
    # gradient at x is g / x, and that at logit j is p_j (g / x . exp(v_j) - g / x . x). Here
    # g / x . x is the sum of the D components of g.
    exp_v = v.exp()
    grad_x = grad_out / (p @ exp_v)
    grad_laser = p * (grad_x @ exp_v.mT - grad_out.sum(-1, keepdim=True))
    return {"softmax": grad_softmax.abs().sum(-1), "LASER": grad_laser.abs().sum(-1)}


def attention_probabilities(q, k):
    """Return p (B, H, Tq, Tk) of causal attention. q (B, H, Tq, D), k (B, H, Tk, D)"""
    scores = q @ k.mT * q.shape[3] ** -0.5
    mask = causal_mask(q.shape[2], k.shape[2], q.device)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def random_gradients(logit_std, seed, one_component=False, rows=1024, T=64, D=32):
    """Return {variant: mean gradient at the logits}, and the mean of max_j p_j, for random logits.

    one_component: g is 1 at one component of the output and 0 elsewhere, for each component; else
    it is random. rows: queries to average over, each with T keys of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 1, T, generator=generator, dtype=torch.float64) * logit_std
    v = torch.randn(rows, T, D, generator=generator, dtype=torch.float64)
    grad_out = torch.randn(rows, 1, D, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    if one_component:
        p = p.expand(rows, D, T)
        grad_out = torch.eye(D, dtype=torch.float64)
    gradients = logit_gradients(p, v, grad_out)  # (rows, 1) each, or (rows, D)
    means = {name: gradient.mean().item() for name, gradient in gradients.items()}
    return means, p.amax(-1).mean().item()


# -- trained models --------------------------------------------------------------------------------


class Probe:
    """Record the inputs and the output of one layer's attention.

    It takes the place of the layer's KV cache: train.Attention calls the `attend` of its cache.
    """

    length = 0  # no earlier tokens

    def attend(self, module, heads):
        self.heads = heads  # q, k, v: (B, H, T, D) each
        self.out = module.function(*heads)
        self.out.retain_grad()
        return self.out


def probe_model(model, x, y):
    """Run forward and backward. Return the probe of each layer, and the loss.

    x, y (B, T): tokens and targets. Afterwards, probe.out.grad is d loss / d output.
    """
    config = model.config
    probes = [Probe() for _ in model.layers]
    cos, sin = train.rope_angles(0, x.shape[1], config.head_dim, config.rope_theta, x.device)
    hidden = model.embed_tokens(x)
    for layer, probe in zip(model.layers, probes):
        hidden = layer(hidden, cos, sin, probe)
    hidden = model.norm(hidden)
    weight = model.embed_tokens.weight
    loss = train.linear_cross_entropy(hidden.flatten(0, 1), weight, y.flatten())
    loss.backward()
    model.zero_grad()
    return probes, loss.item()


def peaked_gradients(model, x, y):
    """Return {variant: mean gradient at the logits} of all queries with peaked attention.

    Also returns the number of these queries. The loss is a mean over the targets y (B, T), which
    makes the gradients smaller the more targets there are. So we multiply them by this number.
    """
    probes, _ = probe_model(model, x, y)
    peaked = {"softmax": [], "LASER": []}  # for each layer the gradients (number of queries,)
    for probe in probes:
        q, k, v = (t.detach().double() for t in probe.heads)
        p = attention_probabilities(q, k)  # (B, H, T, T)
        gradients = logit_gradients(p, v, probe.out.grad.double())  # (B, H, T) each
        is_peaked = p.amax(-1) > PEAKED  # (B, H, T)
        is_peaked[:, :, 0] = False  # the first query has only one key, so no gradient
        for name in peaked:
            peaked[name].append(gradients[name][is_peaked])
    n_peaked = sum(len(gradients) for gradients in peaked["LASER"])
    if n_peaked == 0:
        raise ValueError(f"no row of the attention has a probability above {PEAKED}; train longer")
    means = {}
    for name, gradients in peaked.items():
        means[name] = torch.cat(gradients).mean().item() * y.numel()
    return means, n_peaked


def trained_gradients(seed, folder):
    """Train a GPT with LASER; return its `peaked_gradients` on held-out text."""
    out = Path(folder, str(seed))
    flags = f"{FLAGS} --data {DATA} --seed {seed} --lr {LR} --steps {STEPS} --sample 0"
    with redirect_stdout(io.StringIO()):  # the progress bar on stderr is enough
        result = train.main([*flags.split(), "--device", "cpu", "--out", str(out)])
    if result["signal"]:
        raise KeyboardInterrupt(result["signal"])

    # read sequences of T + 1 tokens of held-out text, the same for all seeds
    model, tokenizer = train.load_model(out)
    T = model.config.block_size
    with redirect_stdout(io.StringIO()):
        text = data.load_dataset(DATA, tokenizer, T, out / ".tokens")
    starts = range(0, HELD_OUT_SEQUENCES * (T + 1), T + 1)
    x, y = data.to_device(data.read_sequences(text.val, starts, T), torch.device("cpu"))
    return peaked_gradients(model, x, y)


# -- numerics --------------------------------------------------------------------------------------


def paper_form(q, k, v):
    """Compute LASER as published: subtract the maximum of v over all keys, even of future ones."""
    largest = v.amax(2, keepdim=True)
    p = attention_probabilities(q, k)
    return (p @ (v - largest).exp()).log() + largest


def largest_errors(q, k, v):
    """Return {form: largest error in float32}, where None stands for a result that is not finite.

    The last query is left out: it is the only one that sees the last key.
    """
    exact = reference(q.double(), k.double(), v.double())
    errors = {}
    for name, function in (("paper", paper_form), ("ours", attention)):
        out = function(q, k, v).double()
        error = (out - exact)[:, :, :-1].abs().max().item()
        errors[name] = error if math.isfinite(error) else None
    return errors


def numerics(jumps=(10, 50, 90, 110), stds=(1, 10, 30, 100)):
    """Return {case: largest_errors}: the last value is larger by `jump`, or all are scaled."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator) for _ in range(3))
    errors = {}
    for jump in jumps:
        outlier = v.clone()
        outlier[:, :, -1] += jump
        errors[f"last value + {jump}"] = largest_errors(q, k, outlier)
    for std in stds:
        errors[f"values of std {std}"] = largest_errors(q, k, v * std)
    return errors


# -- the study -------------------------------------------------------------------------------------


def plot(record):
    """Draw the gradients at random logits, and how much larger LASER's are in each case."""
    figure, (left, right) = harness.new_figure((11, 4), 1, 2)
    for name, gradients in record["by_logit_std"].items():
        left.plot(LOGIT_STDS, gradients, "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="standard deviation of the logits")
    left.set(ylabel="sum over keys of |d loss / d logit|", title="gradient at random logits")
    left.legend()

    cases = []
    for i, (name, difference) in enumerate(record["differences"].items()):
        cases.append(name.removesuffix(": LASER"))
        mean = difference["mean"]
        half_width = difference["half_width_95"]
        ratio, low, high = (10**x for x in (mean, mean - half_width, mean + half_width))
        interval = [[ratio - low], [high - ratio]]
        right.errorbar(ratio, i, xerr=interval, fmt="o", color="C1", capsize=4)
    right.axvline(1, color="black", lw=0.8)
    right.set_yticks(range(len(cases)), cases)
    right.invert_yaxis()
    right.set(xlabel="LASER / softmax, 95% interval", title="ratio of the gradients")
    return figure


def compare(record, case, settings, measured):
    """Add the runs of one case to the record, and LASER's paired difference to softmax attention.

    case: the name of the case, such as "random logits of std 1".
    measured: {seed: ({variant: gradient}, detail)}; the detail is a number stored with each run.
    """
    runs = {"softmax": [], "LASER": []}
    for seed, (gradients, detail) in measured.items():
        for name in runs:
            value = math.log10(gradients[name])
            runs[name].append({"seed": seed, "value": value, "detail": detail})
    for name in runs:
        variant = {"settings": settings, "sweep": [], "runs": runs[name]}
        record["variants"][f"{case}: {name}"] = variant
    difference = harness.paired_difference(runs["LASER"], runs["softmax"])
    record["differences"][f"{case}: LASER"] = difference


def main(argv, description):
    parser = harness.study_parser(description, on_gpus="train GPTs with LASER and with softmax")
    args = parser.parse_args(argv)
    out = harness.check_writable(args.out)
    if args.full:
        from experiments import language_models, laser_gradients

        deadline = harness.deadline_after(args.minutes)
        record = language_models.run("laser", out, deadline)
        laser_gradients.run(out, deadline)
        language_models.run("laser-124m", out, deadline)
        return record

    start_time = time.perf_counter()
    record = {
        "question": "Where attention is peaked, does more gradient reach LASER's logits?",
        "metric": "log10 of the gradient at the logits",
        "baseline": "softmax",
        "variants": {},
        "differences": {},
        "by_logit_std": {"softmax": [], "LASER": []},
    }

    # random logits; the figure shows means over the seeds, for every std
    for std in LOGIT_STDS:
        measured = {seed: random_gradients(std, seed) for seed in SEEDS}
        for name, means in record["by_logit_std"].items():
            means.append(statistics.mean(gradients[name] for gradients, _ in measured.values()))
        if std in REPORTED_STDS:
            case = f"random logits of std {std}"
            compare(record, case, "random gradient", measured)
            measured = {seed: random_gradients(std, seed, one_component=True) for seed in SEEDS}
            compare(record, f"{case}, one output", "gradient of one component", measured)

    # trained GPTs
    with tempfile.TemporaryDirectory() as folder:
        measured = {seed: trained_gradients(seed, folder) for seed in SEEDS}
    settings = f"{FLAGS} --data {DATA} --lr {LR} --steps {STEPS}"
    compare(record, f"trained with LASER, rows with max p > {PEAKED}", settings, measured)

    record["numerics"] = numerics()
    record["seconds"] = time.perf_counter() - start_time
    save_json(out / "laser-cpu.json", record, "experiments.laser")
    harness.save_figure(plot(record), out / "laser-cpu.png")
    harness.print_differences(record)
    print("largest error in float32 of the rows before the last:")
    for case, errors in record["numerics"].items():
        paper = "not finite" if errors["paper"] is None else f"{errors['paper']:.1e}"
        print(f"  {case:20} paper's form {paper:>10}   ours {errors['ours']:.1e}")
    harness.print_gpu_result("laser")
    return record
