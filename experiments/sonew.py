"""SONew against Adam, SGD and RMSProp on an autoencoder of MNIST's digits.

SONew is an optimizer that multiplies the gradient by an approximate inverse of
E[g g^T], of which it keeps a few diagonals, the band; sonew.py explains it.

The autoencoder is that of the paper, made smaller and trained for 300 steps.
Every optimizer got the same number of settings: 4 learning rates times 3 values
of a second option, on seed 0 and at the length they are used at (--sweep).
The ablations of SONew are the diagonal alone (band 0), chains through the whole
tensor instead of its rows (flat), and pixels in a random order, so that
neighbours in a row of weights are no longer neighbours in the image. The study
also checks the closed form on statistics of real gradients.

    python sonew.py           two minutes on two CPU cores
    python sonew.py --full    language models, on GPUs

Writes results/sonew-cpu.json and .png.
"""

import hashlib
import io
import math
import statistics
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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
from sonew import SONew, bias_correction, factor, precondition, reference
from support.files import atomic_write, read_user_file

WIDTHS = (784, 64, 32, 16)
BATCH = 250
STEPS = 300
SEEDS = (1, 2, 3, 4, 5)
MNIST = (
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
    "https://s3.amazonaws.com/img-datasets/mnist.npz",
)
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"

# -- optimizers: make(parameters, lr, second option) -----------------------------------------------


def sgd(parameters, lr, momentum):
    return torch.optim.SGD(parameters, lr, momentum=momentum)


def rmsprop(parameters, lr, eps):
    return torch.optim.RMSprop(parameters, lr, 0.99, eps)


def adam(parameters, lr, eps):
    return torch.optim.Adam(parameters, lr, (0.9, 0.99), eps)


def sonew(**options):
    def make(parameters, lr, eps):
        return SONew(parameters, lr, (0.9, 0.99), eps, **options)

    return make


class Variant(NamedTuple):
    make: object
    rates: tuple  # learning rates of the sweep
    seconds: tuple  # values of the second option
    best: tuple  # the best of both


RATES = (1e-2, 3e-2, 1e-1, 3e-1)
SMALL_EPS = (1e-7, 1e-6, 1e-5)
LARGE_EPS = (1e-6, 1e-5, 1e-4)
VARIANTS = {
    "SGD": Variant(sgd, (1e-3, 3e-3, 1e-2, 3e-2), (0.8, 0.9, 0.95), (3e-2, 0.8)),
    "RMSProp": Variant(rmsprop, (1e-3, 3e-3, 1e-2, 3e-2), (1e-8, 1e-2, 1e-1), (1e-2, 1e-2)),
    "Adam": Variant(adam, (3e-3, 1e-2, 3e-2, 1e-1), (1e-8, 1e-1, 1.0), (1e-1, 1.0)),
    "SONew, band 0": Variant(sonew(band=0), RATES, SMALL_EPS, (1e-1, 1e-6)),
    "SONew, band 1": Variant(sonew(), RATES, SMALL_EPS, (1e-1, 1e-6)),
    "band 1, flat": Variant(sonew(chain="flat"), RATES, SMALL_EPS, (1e-1, 1e-6)),
    "band 1, shuffled": Variant(sonew(), RATES, LARGE_EPS, (1e-1, 1e-5)),
    "SONew, band 4": Variant(sonew(band=4), RATES, LARGE_EPS, (1e-1, 1e-5)),
}

# -- data and network ------------------------------------------------------------------------------


def load_mnist(path=None):
    """Return training and test images, (60000, 784) and (10000, 784), from 0 to 1.

    path: an .npz file; by default out/mnist.npz, fetched if it is not there.
    """
    if path is None:
        path = Path("out", "mnist.npz")
        if not path.is_file():
            fetch_mnist(path)
    content = read_user_file(path, limit=2**30)
    try:
        with np.load(io.BytesIO(content)) as arrays:
            images = [arrays[name].reshape(-1, 784) for name in ("x_train", "x_test")]
    except (OSError, ValueError, KeyError, EOFError, TypeError):
        raise ValueError(
            f"{path} is not MNIST: give an .npz file with x_train and x_test, 28 x 28 bytes each"
        ) from None
    return [torch.from_numpy(x).float() / 255 for x in images]


def fetch_mnist(path):
    """Download MNIST to path, from the first address that has the right file."""
    for url in MNIST:
        try:
            content = urllib.request.urlopen(url, timeout=10).read()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == MNIST_SHA256:
            with atomic_write(path) as file:
                file.write(content)
            return
    raise ValueError(
        "MNIST cannot be fetched now; give --mnist FILE.npz with the arrays x_train and x_test"
    )


def shuffle_pixels(images):
    """Return training and test images with their pixels in one random order."""
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    return [x[:, order] for x in images]


def autoencoder(widths, seed):
    """784-...-code-...-784, tanh except at the code and the output; Glorot-uniform weights."""
    torch.manual_seed(seed)
    sizes = [*widths, *widths[-2::-1]]
    layers = []
    for i in range(len(sizes) - 1):
        linear = torch.nn.Linear(sizes[i], sizes[i + 1])
        torch.nn.init.xavier_uniform_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        layers.append(linear)
        if i + 1 not in (len(widths) - 1, len(sizes) - 1):
            layers.append(torch.nn.Tanh())
    return torch.nn.Sequential(*layers)


def cross_entropy(logits, x):
    """Nats per image, summed over its pixels. (N, 784) each"""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


# -- training --------------------------------------------------------------------------------------


def get_lr(step, lr):
    """Linear warm-up over a tenth of the steps, then linear decay to 0."""
    return lr * min((step + 1) / (STEPS / 10), (STEPS - step) / (STEPS * 0.9), 1.0)


def train_variant(name, setting, images, seed):
    """Train an autoencoder and return its run; value: test cross-entropy in nats per image."""
    start_time = time.perf_counter()
    if name.endswith("shuffled"):
        images = shuffle_pixels(images)
    train_images, test_images = images
    net = autoencoder(WIDTHS, seed)
    optimizer = VARIANTS[name].make(list(net.parameters()), *setting)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    step_seconds = []
    for step in range(STEPS):
        if step % max(1, STEPS // 10) == 0:
            curve.append([step, evaluate(net, train_images[:5000])])
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, setting[0])
        x = train_images[torch.randint(len(train_images), (BATCH,), generator=generator)]
        loss = cross_entropy(net(x), x)
        optimizer.zero_grad()
        loss.backward()
        step_start = time.perf_counter()
        optimizer.step()
        step_seconds.append(time.perf_counter() - step_start)

    train_loss = evaluate(net, train_images[:10000])
    run = {
        "seed": seed,
        "value": evaluate(net, test_images),
        "train": train_loss,
        "curve": [*curve, [STEPS, train_loss]],
        "ms_per_optimizer_step": 1e3 * statistics.median(step_seconds),
    }
    if isinstance(optimizer, SONew):
        run.update(edge_statistics(optimizer))
    run["seconds"] = time.perf_counter() - start_time
    return run


@torch.no_grad()
def evaluate(net, x):
    return cross_entropy(net(x), x).item()


def edge_statistics(optimizer):
    """Return the share of coordinates whose edges are removed, and the smallest s / S_0 kept."""
    n_removed = 0
    n_edges = 0
    least = math.inf
    for group in optimizer.param_groups:
        matrices = [p for p in group["params"] if "s1" in optimizer.state[p]]
        for p in matrices:
            # bias-corrected and damped statistics in units of the scale, b+1 of (R, C)
            state = optimizer.state[p]
            n_chains = len(p) if group["chain"] == "row" else 1
            correction = bias_correction(group["betas"][1], state["step"]) * state["scale"] ** 2
            names = [f"s{k}" for k in range(group["band"] + 1)]
            S = [state[name].view(n_chains, -1) / correction for name in names]
            S[0] = S[0] + group["eps"]

            psi, s = factor(S, group["gamma"])
            has_edge = torch.stack(S[1:]).any(0)
            is_kept = torch.stack(psi).any(0)
            n_removed += (has_edge & ~is_kept).sum().item()
            n_edges += has_edge.sum().item()
            if is_kept.any():
                least = min(least, (s / S[0])[is_kept].min().item())
    return {"edges_removed": n_removed / n_edges, "least_schur": least} if n_edges else {}


def sweep(images):
    """Return {variant: [[lr, second option, training loss], ...]}, best first, on seed 0."""
    found = {}
    for name, variant in VARIANTS.items():
        rows = []
        for lr in variant.rates:
            for second in variant.seconds:
                run = train_variant(name, (lr, second), images, 0)
                rows.append([lr, second, run["train"]])
        rows.sort(key=lambda row: row[2] if math.isfinite(row[2]) else math.inf)
        found[name] = rows
        losses = " ".join(f"{loss:.1f}" for _, _, loss in rows)
        print(f"{name:18s} lr {rows[0][0]:g}, second {rows[0][1]:g}: {losses}", flush=True)
    return found


# -- the LogDet problem on real statistics ---------------------------------------------------------


def completion(C, b):
    """Return X (n, n) of the statistics C (n, n), by `factor`, a column at a time: X = X^T."""
    S = [F.pad(C.diagonal(k), (0, k))[None] for k in range(b + 1)]
    psi, s = factor(S, 1e-12)
    columns = torch.eye(len(C), dtype=C.dtype)
    return torch.cat([precondition(column[None], psi, s) for column in columns])


def logdet_problem(images):
    """Complete the bands of the statistics of one hidden unit's gradients, before training.

    Returns, by band, the LogDet divergence tr(X C) - log det(X C) - n for the pixels as they lie
    and shuffled, and how far X is from the reference and X^-1 from C on the band; the statistics C
    of 112 neighbouring pixels; and X^-1 by band.
    """
    # gradients image by image: those of the weights are delta x^T
    x = images[0][:5000].double()
    net = autoencoder(WIDTHS, 0).double()
    hidden = net[0](x).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(net[1:](hidden), x, reduction="sum")
    delta = torch.autograd.grad(loss, hidden)[0][:, :1]  # (N, 1)
    g = (delta * x)[:, 336:448]  # (N, n)
    n = g.shape[1]
    C = g.T @ g / len(g)
    C = C + 1e-3 * C.diagonal().mean() * torch.eye(n)  # some pixels are always black

    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(n)
    names = ("divergence", "divergence_shuffled", "from_reference", "from_band")
    result = {name: {} for name in names}
    inverses = {}
    for b in range(5):
        for name, statistics_ in (("divergence_shuffled", C[order][:, order]), ("divergence", C)):
            X = completion(statistics_, b)
            product = X @ statistics_
            result[name][b] = (torch.trace(product) - torch.logdet(product) - n).item()
        inverses[b] = torch.linalg.inv(X)
        S = [F.pad(C.diagonal(k), (0, k)) for k in range(b + 1)]
        exact = reference(S, torch.zeros(n, dtype=C.dtype))[0]
        result["from_reference"][b] = ((X - exact).abs().max() / exact.abs().max()).item()
        on_band = (positions[:, None] - positions).abs() <= b
        result["from_band"][b] = ((inverses[b] - C)[on_band].abs().max() / C.max()).item()
    return result, C, inverses


# -- figure and command ----------------------------------------------------------------------------


def plot(record, C, inverses):
    figure, axes = new_figure((12, 7.4), 2, 3)
    plot_statistics(axes[0], C, inverses)
    left, middle, right = axes[1]

    # LogDet divergence by band
    logdet = record["logdet"]
    left.plot(range(5), list(logdet["divergence"].values()), "o-", label="pixels in order")
    shuffled = list(logdet["divergence_shuffled"].values())
    left.plot(range(5), shuffled, "s--", label="pixels shuffled")
    left.set(xlabel="band", ylabel="LogDet divergence", title="distance to the statistics")
    left.set_xticks(range(5))
    left.legend(fontsize=8)

    # training curves, without the two ablations of chains
    names = list(record["variants"])
    for i, name in enumerate(names):
        runs = record["variants"][name]["runs"]
        if not name.startswith("band 1,"):
            steps, losses = zip(*runs[0]["curve"], strict=True)
            middle.plot(steps, losses, f"C{i}", label=name)
        values = [run["value"] for run in runs]
        right.plot(values, [-i] * len(values), "o", color=f"C{i}", alpha=0.6)
    title = f"autoencoder of MNIST, seed {SEEDS[0]}"
    middle.set(xlabel="step", ylabel="training loss, nats per image", yscale="log", title=title)
    middle.legend(fontsize=7)
    right.set_yticks([-i for i in range(len(names))], names)
    right.set(xlabel="test loss, nats per image", title=f"{len(SEEDS)} seeds")
    return figure


def plot_statistics(axes, C, inverses):
    """Show the statistics and their completions, as correlations."""
    size = C.diagonal().sqrt()
    matrices = {
        "statistics $E[g g^T]$, as correlations": C,
        "$X^{-1}$, band 1": inverses[1],
        "$X^{-1}$, band 4": inverses[4],
    }
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        correlation = (matrix / size / size[:, None]).numpy()
        ax.imshow(correlation, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set(xticks=[], yticks=[], title=title)


def compare(images):
    """Train each variant at its best setting, on new seeds. Return the record of the study."""
    variants = {}
    for name, variant in VARIANTS.items():
        lr, second = variant.best
        settings = {"lr": lr, "second": second, "widths": WIDTHS, "batch": BATCH, "steps": STEPS}
        grid = {"lr": variant.rates, "second": variant.seconds, "seed": 0}
        runs = [train_variant(name, variant.best, images, seed) for seed in SEEDS]
        variants[name] = {"settings": settings, "sweep": grid, "runs": runs}

    runs = {name: variant["runs"] for name, variant in variants.items()}
    others = [name for name in runs if name != "Adam"]
    differences = {name: paired_difference(runs[name], runs["Adam"]) for name in others}
    bands = [name for name in others if "band" in name and name != "SONew, band 1"]
    to_band_1 = {name: paired_difference(runs[name], runs["SONew, band 1"]) for name in bands}
    return {
        "question": "Does SONew train an autoencoder of MNIST faster than Adam?",
        "metric": "test cross-entropy, nats per image",
        "baseline": "Adam",
        "variants": variants,
        "differences": differences,
        "differences_to_band_1": to_band_1,
    }


def print_record(record):
    print_differences(record)
    for name, d in record["differences_to_band_1"].items():
        print(f"  {name} less band 1: {d['mean']:+.1f} +- {d['half_width_95']:.1f}")
    logdet = record["logdet"]
    print(f"X^-1 = S on the band to {max(logdet['from_band'].values()):.0e}; LogDet divergence:")
    for b, divergence in logdet["divergence"].items():
        print(f"  band {b}: {divergence:.0f}, {logdet['divergence_shuffled'][b]:.0f} shuffled")


def main(argv=None):
    parser = study_parser(__doc__, on_gpus="train GPTs with SONew and with AdamW")
    parser.add_argument(
        "--mnist", metavar="FILE", help="the images; default: out/mnist.npz, downloaded"
    )
    parser.add_argument("--sweep", action="store_true", help="search the learning rates again")
    args = parser.parse_args(argv)
    out = check_writable(args.out)
    if args.full:
        from experiments import language_models

        return language_models.run("sonew", out, deadline_after(args.minutes))
    images = load_mnist(args.mnist)
    start_time = time.perf_counter()
    if args.sweep:
        record = {"seed": 0, "steps": STEPS, "train": sweep(images)}
        record["seconds"] = time.perf_counter() - start_time
        save_json(out / "sonew-cpu-sweep.json", record, "experiments.sonew")
        return record

    record = compare(images)
    record["logdet"], C, inverses = logdet_problem(images)
    record["seconds"] = time.perf_counter() - start_time
    save_json(out / "sonew-cpu.json", record, "experiments.sonew")
    save_figure(plot(record, C, inverses), out / "sonew-cpu.png", dpi=110)
    print_record(record)
    print_gpu_result("sonew")
    return record
