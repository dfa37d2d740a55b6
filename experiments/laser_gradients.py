"""Why LASER works, if it does: the gradient at the logits, by layer, while GPTs train.

A GPT with softmax attention and one with LASER are stopped at some steps. On the same held-out text
each row of the attention gets sum_j |d loss / d logit_ij|, averaged over rows and heads.

Part of `python laser.py --full`; writes results/laser-gradients.json and .png.
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
from experiments import harness, runner
from experiments.laser import logit_gradients, probe_model
from experiments.provenance import code_hashes, save_json
from laser import causal_mask
from support import data, distributed

DATA = "python"
FLAGS = "--model small --steps 3000 --eval-batches 1 --sample 0"
STOPS = (30, 300, 1000, 2000, 3000)
LR = 1e-3  # the best of both, by the study of the loss
VARIANTS = ("softmax", "LASER")
SEEDS = (1, 2, 3)
SEQUENCES = 8


def settings_of(variant):
    return f"{FLAGS} --data {DATA} --attn {variant.lower()} --lr {LR:g}"


def gradients_by_layer(model, variant, x, y):
    """Return the mean gradient at the logits of each layer, times the number of targets."""
    probes, _ = probe_model(model, x, y)
    means = []
    for probe in probes:
        q, k, v = (t.detach().double() for t in probe.heads)
        scores = q @ k.mT * q.shape[3] ** -0.5  # (B, H, T, T)
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        gradients = logit_gradients(p, v, probe.out.grad.double())[variant]  # (B, H, T)
        means.append(gradients.mean().item() * y.numel())
    return means


def train_and_probe(job):
    """Train one GPT with stops; return its run, with the gradients by layer at each stop.

    job: {variant, seed}. The value is log10 of the mean over layers at the last stop.
    """
    key = ["gradients", settings_of(job["variant"]), job["seed"], STOPS]
    key.append(code_hashes("experiments.laser_gradients"))
    return runner.disk_cache(runner.CACHE, key, lambda: compute(job))


def compute(job):
    start_time = time.perf_counter()
    variant = job["variant"]
    flags = f"{settings_of(variant)} --seed {job['seed']}"
    curve = []  # [step, gradient of each layer]
    Path("out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="out", prefix="study-") as folder:
        out = Path(folder, "run")
        step = 0
        for stop in STOPS:
            start = ["--resume", str(out), "--sample", "0"]
            if step == 0:
                start = [*flags.split(), "--out", str(out)]
            with redirect_stdout(io.StringIO()):
                result = train.main([*start, "--stop-after", str(stop - step)])
            if result["signal"]:
                raise KeyboardInterrupt(result["signal"])
            step = stop
            curve.append([step, probe_run(out, variant)])
    value = math.log10(statistics.mean(curve[-1][1]))
    seconds = time.perf_counter() - start_time
    return {"seed": job["seed"], "value": value, "curve": curve, "seconds": seconds}


def probe_run(out, variant):
    """Return the gradients by layer of the model that is saved in the folder `out`."""
    device = distributed.pick_device("")
    model, tokenizer = train.load_model(out, device)
    T = model.config.block_size
    with redirect_stdout(io.StringIO()):
        text = data.load_dataset(DATA, tokenizer, T, Path("out", ".tokens"))
    starts = range(0, SEQUENCES * (T + 1), T + 1)
    x, y = data.to_device(data.read_sequences(text.val, starts, T), device)
    return gradients_by_layer(model, variant, x, y)


def plot(record):
    """Draw the gradient over training, and how much larger LASER's is by layer at the end."""
    figure, (left, right) = harness.new_figure((10, 3.6), 1, 2)
    gradients = {}  # variant: (seeds, stops, layers)
    for variant in VARIANTS:
        runs = record["variants"][variant]["runs"]
        gradients[variant] = torch.tensor([[layers for _, layers in run["curve"]] for run in runs])
        left.semilogx(STOPS, gradients[variant].mean((0, 2)), "o-", label=variant)
    left.set(xlabel="step", ylabel="sum over keys of |d loss / d logit|")
    left.set_ylim(bottom=0)
    left.legend()

    # at the end: a point for each seed, and a line through their means
    ratios = gradients["LASER"][:, -1] / gradients["softmax"][:, -1]  # (seeds, layers)
    layers = range(1, ratios.shape[1] + 1)
    for ratio in ratios:
        right.plot(layers, ratio, "o", color="C1", alpha=0.4)
    right.plot(layers, ratios.mean(0), color="C1")
    right.axhline(1, color="black", lw=0.8)
    right.set(xlabel="layer", ylabel="LASER / softmax at the end")
    right.set_ylim(bottom=0)
    return figure


def run(out, deadline=float("inf")):
    """Run the study, or a part of it until the deadline; write its JSON and figure."""
    jobs = [{"variant": variant, "seed": seed} for variant in VARIANTS for seed in SEEDS]
    runs = {variant: [] for variant in VARIANTS}
    try:
        results = runner.parallel(
            train_and_probe, jobs, deadline=deadline, label="probed runs", per_gpu=2
        )
    except TimeoutError as pause:
        print(pause)
        return None
    for job, result in zip(jobs, results):
        runs[job["variant"]].append(result)

    record = {"question": "Does more gradient reach the logits of a GPT with LASER?"}
    record.update(metric="log10 of the gradient at the logits at the end", baseline="softmax")
    record.update(seconds=sum(run["seconds"] for run in results), variants={}, differences={})
    for variant in VARIANTS:
        entry = {"settings": settings_of(variant), "sweep": None, "runs": runs[variant]}
        record["variants"][variant] = entry
    record["differences"]["LASER"] = harness.paired_difference(runs["LASER"], runs["softmax"])
    save_json(Path(out) / "laser-gradients.json", record, "experiments.laser_gradients")
    harness.save_figure(plot(record), Path(out) / "laser-gradients.png")
    harness.print_differences(record)
    return record
