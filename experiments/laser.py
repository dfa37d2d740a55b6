"""LASER on two CPU cores: does more gradient reach the logits, and what does its numerics cost?

The paper's argument is that the gradient at the logits of softmax attention vanishes with the
probabilities and that LASER's does not. The same tiny GPT is trained with both; after training, the
gradient at the logits of every layer is measured on held-out text. Language-model losses are not
compared here: at this size a laptop cannot resolve the difference.
"""

import io
import math
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

import train
from experiments.harness import (
    check_writable,
    new_figure,
    paired_difference,
    print_differences,
    save_figure,
    save_json,
    study_parser,
)
from laser import attention, causal_mask, reference
from support import data

VARIANTS = {"softmax": "softmax", "LASER": "laser"}
SEEDS = (1, 2, 3)
FLAGS = "--model tiny"
DATA = "stdlib"
STEPS = 150
LR = 2e-3


class LogitProbe:
    """Attention with its logits in the open: a cache that keeps them and their gradient."""

    length = 0

    def __init__(self, is_laser):
        self.is_laser = is_laser
        self.scores = None

    def attend(self, module, heads):
        q, k, v = heads  # (B, H, T, D) each
        scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5  # (B, H, T, T)
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
        self.scores = scores.masked_fill(~mask, -torch.inf)
        self.scores.retain_grad()
        p = self.scores.softmax(-1)
        return (p @ v.exp()).log() if self.is_laser else p @ v


def logit_gradients(model, x, y):
    """Return for each layer the mean over heads and queries of sum_j |d loss / d s_ij|, and the loss.

    It is multiplied by the number of targets, as the loss is a mean over them, so that it does not
    depend on the size of the batch.
    """
    config = model.config
    probes = [LogitProbe(config.attn == "laser") for _ in model.layers]
    cos, sin = train.rope_angles(0, x.shape[1], config.head_dim, config.rope_theta, x.device)
    hidden = model.embed_tokens(x)
    for layer, probe in zip(model.layers, probes):
        hidden = layer(hidden, cos, sin, probe)
    hidden = model.norm(hidden)
    weight = model.embed_tokens.weight
    loss = train.linear_cross_entropy(hidden.flatten(0, 1), weight, y.flatten())
    loss.backward()
    model.zero_grad()
    gradients = [probe.scores.grad.abs().sum(-1).mean().item() * y.numel() for probe in probes]
    return gradients, loss.item()


def measure(attn, seed, folder):
    """Train one model and return its run; value: log10 of the gradient, averaged over layers."""
    start_time = time.perf_counter()
    out = Path(folder, f"{attn}-{seed}")
    flags = (
        f"{FLAGS} --data {DATA} --attn {attn} --seed {seed} --lr {LR} --steps {STEPS} --sample 0"
    )
    with redirect_stdout(io.StringIO()):  # the progress bar on stderr is enough
        result = train.main([*flags.split(), "--device", "cpu", "--out", str(out)])
    if result["signal"]:
        raise KeyboardInterrupt(result["signal"])

    # eight held-out windows, the same for all
    model, tokenizer = train.load_model(out)
    T = model.config.block_size
    with redirect_stdout(io.StringIO()):
        text = data.load_dataset(DATA, tokenizer, T, out / ".tokens")
    starts = range(0, 8 * (T + 1), T + 1)
    starts = [start for start in starts if start + T < len(text.val)]
    x, y = data.to_device(data.read_windows(text.val, starts, T), torch.device("cpu"))
    gradients, _ = logit_gradients(model, x, y)
    value = sum(map(math.log10, gradients)) / len(gradients)
    seconds = time.perf_counter() - start_time
    return {"seed": seed, "value": value, "gradients": gradients, "seconds": seconds}


def paper_form(q, k, v):
    """The published form: the maximum of v over all keys, future ones too, is subtracted."""
    largest = v.amax(2, keepdim=True)
    scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    mask = causal_mask(q.shape[2], k.shape[2], q.device)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (p @ (v - largest).exp()).log() + largest


def numerics(jumps=(10.0, 50.0, 90.0, 110.0)):
    """Return the largest error, in float32, of rows before a value that is larger by `jump`.

    None: not finite.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator) for _ in range(3))
    errors = {}
    for jump in jumps:
        outlier = v.clone()
        outlier[:, :, -1] += jump
        exact = reference(q.double(), k.double(), outlier.double())
        row = {}
        for name, function in (("paper", paper_form), ("ours", attention)):
            error = (function(q, k, outlier).double() - exact)[:, :, :-1].abs().max().item()
            row[name] = error if math.isfinite(error) else None
        errors[f"{jump:g}"] = row
    return errors


def plot(record):
    """Draw the gradient at the logits by layer, a line per seed."""
    figure, axes = new_figure((7, 4))
    for i, (name, variant) in enumerate(record["variants"].items()):
        for run in variant["runs"]:
            layers = range(1, len(run["gradients"]) + 1)
            label = name if run is variant["runs"][0] else None
            axes.plot(layers, run["gradients"], "o-", color=f"C{i}", label=label)
    axes.set(xlabel="layer", ylabel="sum over keys of |d loss / d logit|", yscale="log")
    axes.set_title(f"gradient at the logits after {STEPS} steps, one line per seed")
    axes.legend()
    return figure


def main(argv, description):
    args = study_parser(description).parse_args(argv)
    out = check_writable(args.out)
    record = {"question": "Does more gradient reach the logits with LASER?"}
    record.update(metric="log10 of the gradient at the logits", baseline="softmax", variants={})

    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, attn in VARIANTS.items():
            runs = [measure(attn, seed, folder) for seed in SEEDS]
            settings = f"{FLAGS} --data {DATA} --attn {attn} --lr {LR} --steps {STEPS}"
            record["variants"][name] = {"settings": settings, "sweep": None, "runs": runs}
    runs = {name: variant["runs"] for name, variant in record["variants"].items()}
    record["differences"] = {"LASER": paired_difference(runs["LASER"], runs["softmax"])}
    record["numerics"] = numerics()
    record["seconds"] = time.perf_counter() - start_time

    save_json(out / "laser-cpu.json", record)
    save_figure(plot(record), out / "laser-cpu.png")
    print_differences(record)
    print("largest error of earlier rows where a later value is larger by so much (float32):")
    for jump, row in record["numerics"].items():
        paper = "not finite" if row["paper"] is None else f"{row['paper']:.1e}"
        print(f"  {jump:>5}   paper's form {paper:>10}   ours {row['ours']:.1e}")
    return record
