"""LASER: does more gradient reach the logits where attention is peaked?

Softmax attention passes p_j (v_j - out) to the logit of key j; LASER, with out' its own output,
p_j (exp(v_j - out') - 1) for each channel. Both vanish with p_j, but LASER's is larger for keys
whose value is far above the output. So both are measured on the same q, k, v, with the same
gradient at the output: for random logits, whose spread decides how peaked attention is, and in tiny
GPTs trained with LASER, for the rows that give one key more than 90%. (A laptop resolves neither
this in GPTs trained with softmax nor the losses, so they are not part of the study.) Then the
numerics: a large last value, and large values throughout.
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
from experiments.harness import (
    check_writable,
    deadline_after,
    new_figure,
    paired_difference,
    print_differences,
    print_gpu_result,
    save_figure,
    study_parser,
)
from experiments.provenance import save_json
from laser import attention, causal_mask, reference
from support import data

SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
LOGIT_STDS = (0.5, 1, 2, 4, 8, 16)
REPORTED_STDS = (1, 4, 16)  # those of the table; the figure shows all
FLAGS = "--attn laser --n-layer 2 --n-embd 64 --n-head 2 --block-size 128 --batch-size 16"
DATA = "stdlib"
STEPS = 100
LR = 3e-3
HELD_OUT_SEQUENCES = 16
PEAKED = 0.9  # a row of p is peaked if one key has more


# -- the gradient at the logits --------------------------------------------------------------------


def logit_gradients(p, v, grad_out):
    """Return {variant: sum_j |d loss / d logit_ij|}, (..., Tq), of softmax attention and of LASER.

    p (..., Tq, Tk), v (..., Tk, D), grad_out (..., Tq, D): the gradient at the output of either.
    """
    out = p @ v
    at_logits = {"softmax": p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True))}

    x = p @ v.exp()  # LASER's output is log x
    grad_x = grad_out / x
    at_logits["LASER"] = p * (grad_x @ v.exp().mT - grad_out.sum(-1, keepdim=True))
    return {name: gradient.abs().sum(-1) for name, gradient in at_logits.items()}


def random_gradients(logit_std, seed, rows=1024, T=64, D=32):
    """Return {variant: mean gradient at the logits} of random rows, and the mean of their max p."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 1, T, generator=generator, dtype=torch.float64) * logit_std
    v = torch.randn(rows, T, D, generator=generator, dtype=torch.float64)
    grad_out = torch.randn(rows, 1, D, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    gradients = logit_gradients(p, v, grad_out)  # (rows, 1) each
    means = {name: gradient.mean().item() for name, gradient in gradients.items()}
    return means, p.amax(-1).mean().item()


# -- trained models --------------------------------------------------------------------------------


class Probe:
    """A cache that calls the model's own attention and keeps its inputs and its output."""

    length = 0

    def attend(self, module, heads):
        self.heads = heads  # q, k, v: (B, H, T, D) each
        self.out = module.function(*heads)
        self.out.retain_grad()
        return self.out


def probe_model(model, x, y):
    """Run forward and backward; return the probes of the layers and the loss."""
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
    """Return {variant: mean gradient at the logits} of the peaked rows of all layers, their number.

    It is multiplied by the number of targets, over which the loss is a mean.
    """
    probes, _ = probe_model(model, x, y)
    peaked = {"softmax": [], "LASER": []}
    for probe in probes:
        q, k, v = (t.detach().double() for t in probe.heads)
        scores = q @ k.mT * q.shape[3] ** -0.5  # (B, H, T, T)
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        is_peaked = p.amax(-1) > PEAKED  # (B, H, T)
        is_peaked[:, :, 0] = False  # the first row has but one key, hence no gradient
        gradients = logit_gradients(p, v, probe.out.grad.double())
        for name in peaked:
            peaked[name].append(gradients[name][is_peaked])
    rows = sum(map(len, peaked["LASER"]))
    if rows == 0:
        raise ValueError(f"no row of the attention has a probability above {PEAKED}; train longer")
    means = {name: torch.cat(parts).mean().item() * y.numel() for name, parts in peaked.items()}
    return means, rows


def trained_gradients(seed, folder):
    """Train a model with LASER; return its `peaked_gradients` on the same held-out text."""
    out = Path(folder, str(seed))
    flags = f"{FLAGS} --data {DATA} --seed {seed} --lr {LR} --steps {STEPS} --sample 0"
    with redirect_stdout(io.StringIO()):  # the progress bar on stderr is enough
        result = train.main([*flags.split(), "--device", "cpu", "--out", str(out)])
    if result["signal"]:
        raise KeyboardInterrupt(result["signal"])

    model, tokenizer = train.load_model(out)
    T = model.config.block_size
    with redirect_stdout(io.StringIO()):
        text = data.load_dataset(DATA, tokenizer, T, out / ".tokens")
    starts = range(0, HELD_OUT_SEQUENCES * (T + 1), T + 1)
    starts = [start for start in starts if start + T < len(text.val)]
    x, y = data.to_device(data.read_sequences(text.val, starts, T), torch.device("cpu"))
    return peaked_gradients(model, x, y)


# -- numerics --------------------------------------------------------------------------------------


def paper_form(q, k, v):
    """The published form: the maximum of v over all keys, future ones too, is subtracted."""
    largest = v.amax(2, keepdim=True)
    scores = q @ k.mT * q.shape[3] ** -0.5
    mask = causal_mask(q.shape[2], k.shape[2], q.device)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (p @ (v - largest).exp()).log() + largest


def largest_errors(q, k, v):
    """Return {form: largest error of the rows before the last, or None: not finite}, in float32."""
    exact = reference(q.double(), k.double(), v.double())
    errors = {}
    for name, function in (("paper", paper_form), ("ours", attention)):
        error = (function(q, k, v).double() - exact)[:, :, :-1].abs().max().item()
        errors[name] = error if math.isfinite(error) else None
    return errors


def numerics(jumps=(10, 50, 90, 110), stds=(1, 10, 30, 100)):
    """Return the errors where the last value is larger by `jump`, and where all are large."""
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
    """Draw the gradient by spread of the logits, and how much larger LASER's is, with intervals."""
    figure, (left, right) = new_figure((11, 4), 1, 2)
    for name, gradients in record["by_logit_std"].items():
        left.plot(LOGIT_STDS, gradients, "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="standard deviation of the logits")
    left.set(ylabel="sum over keys of |d loss / d logit|", title="random logits, values of std 1")
    left.legend()

    tasks = list(record["differences"])
    for i, task in enumerate(tasks):
        d = record["differences"][task]
        right.errorbar(d["mean"], i, xerr=d["half_width_95"], fmt="o", color="C1", capsize=4)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(tasks)), [task.removesuffix(": LASER") for task in tasks])
    right.invert_yaxis()
    right.set_xlabel("log10 (LASER / softmax), 95% interval")
    return figure


def add_task(record, task, settings, seeds, measure):
    """Measure both variants at each seed and add them to the record with their difference.

    measure(seed) -> {variant: gradient}, and a number that is kept as "detail".
    """
    names = {"softmax": f"{task}: softmax", "LASER": f"{task}: LASER"}
    runs = {"softmax": [], "LASER": []}
    for seed in seeds:
        gradients, detail = measure(seed)
        for name, gradient in gradients.items():
            runs[name].append({"seed": seed, "value": math.log10(gradient), "detail": detail})
    for name, full_name in names.items():
        content = {"settings": settings, "sweep": None, "runs": runs[name]}
        record["variants"][full_name] = content
    record["differences"][names["LASER"]] = paired_difference(runs["LASER"], runs["softmax"])


def main(argv, description):
    parser = study_parser(description, on_gpus="train GPTs with LASER and with softmax")
    args = parser.parse_args(argv)
    out = check_writable(args.out)
    if args.full:
        from experiments import language_models, laser_gradients

        deadline = deadline_after(args.minutes)
        record = language_models.run("laser", out, deadline)
        laser_gradients.run(out, deadline)
        return record
    record = {"question": "Where attention is peaked, does more gradient reach LASER's logits?"}
    record.update(metric="log10 of the gradient at the logits", baseline="softmax")
    record.update(variants={}, differences={})
    start_time = time.perf_counter()

    # random logits
    for std in REPORTED_STDS:
        task = f"random logits of std {std}"
        add_task(record, task, "", SEEDS, lambda seed, std=std: random_gradients(std, seed))
    by_std = {"softmax": [], "LASER": []}
    for std in LOGIT_STDS:
        draws = [random_gradients(std, seed)[0] for seed in SEEDS]
        for name in by_std:
            by_std[name].append(statistics.mean(draw[name] for draw in draws))
    record["by_logit_std"] = by_std

    # trained models
    task = f"trained with LASER, rows with max p > {PEAKED}"
    settings = f"{FLAGS} --data {DATA} --lr {LR} --steps {STEPS}"
    with tempfile.TemporaryDirectory() as folder:
        add_task(record, task, settings, SEEDS, lambda seed: trained_gradients(seed, folder))

    record["numerics"] = numerics()
    record["seconds"] = time.perf_counter() - start_time
    save_json(out / "laser-cpu.json", record, "experiments.laser")
    save_figure(plot(record), out / "laser-cpu.png")
    print_differences(record)
    print("largest error in float32 of the rows before the last:")
    for case, errors in record["numerics"].items():
        paper = "not finite" if errors["paper"] is None else f"{errors['paper']:.1e}"
        print(f"  {case:20} paper's form {paper:>10}   ours {errors['ours']:.1e}")
    print_gpu_result("laser")
    return record
