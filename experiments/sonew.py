"""SONew against Adam, SGD and RMSProp on an autoencoder of MNIST's digits.

SONew multiplies the gradient by an approximate inverse of its statistics
E[g g^T], of which it keeps a few diagonals, the band; sonew.py explains it.

Part 1 trains a smaller version of the paper's autoencoder for 300 steps, and
measures the test loss. Every optimizer got the same budget for tuning, on two
other seeds: 4 learning rates times 3 values of its momentum or eps (--sweep).
Within 300 steps, Adam, RMSProp and SGD leave the plateau of a constant output,
a loss of 206, late or not at all, at every setting of the sweep. Ablations:

    band 0              the diagonal alone
    band 1, flat        one chain through the whole tensor, not one per row
    band 1, shuffled    pixels in a random order: a chain joins distant pixels

Part 2: how far is the closed form, on real gradients, from the exact inverse?

    python sonew.py                 four minutes on two CPU cores
    python sonew.py --full          language models, on GPUs
    python train.py --optim sonew   train a GPT with it

Writes results/sonew-cpu.json and .png.
"""

import itertools
import math
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from experiments import harness
from experiments.mnist import load_mnist
from experiments.provenance import save_json
from sonew import SONew, factor, precondition

WIDTHS = (784, 64, 32, 16)  # of the encoder; the decoder mirrors it
BATCH = 250
STEPS = 300
SEEDS = (1, 2, 3, 4, 5)
BASELINE = "Adam"
BANDS = range(5)  # of the LogDet problem


# -- optimizers ------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """An optimizer, the settings that its sweep tries, and the best of them."""

    lrs: tuple  # learning rates of the sweep
    momentum_or_eps: tuple  # of the sweep: momentum for SGD, eps for all others
    best: tuple  # (lr, momentum or eps) with the lowest training loss of the sweep, up to rounding
    options: dict = {}  # of the constructor of SONew


SONEW_LRS = (1e-2, 3e-2, 1e-1, 3e-1)
EPS = (1e-6, 1e-5, 1e-4)
VARIANTS = {
    "SGD": Variant((1e-2, 3e-2, 1e-1, 3e-1), (0.6, 0.7, 0.8), (1e-1, 0.7)),
    "RMSProp": Variant((1e-3, 3e-3, 1e-2, 3e-2), (1e-8, 1e-4, 1e-2), (1e-2, 1e-4)),
    "Adam": Variant((3e-3, 1e-2, 3e-2, 1e-1), (1e-4, 1e-2, 1e-1), (3e-2, 1e-2)),
    "SONew, band 0": Variant(SONEW_LRS, (1e-9, 1e-8, 1e-7), (3e-2, 1e-8), {"band": 0}),
    "SONew, band 1": Variant(SONEW_LRS, EPS, (1e-1, 1e-5)),
    "band 1, flat": Variant(SONEW_LRS, EPS, (1e-1, 1e-5), {"chain": "flat"}),
    "band 1, shuffled": Variant(SONEW_LRS, (1e-8, 1e-7, 1e-6), (1e-1, 1e-7)),
    "SONew, band 4": Variant(SONEW_LRS, (1e-7, 1e-6, 1e-5), (1e-1, 1e-6), {"band": 4}),
}


def make_optimizer(name, parameters, lr, momentum_or_eps):
    if name == "SGD":
        return torch.optim.SGD(parameters, lr, momentum=momentum_or_eps)
    if name == "RMSProp":
        return torch.optim.RMSprop(parameters, lr, alpha=0.99, eps=momentum_or_eps)
    if name == "Adam":
        return torch.optim.Adam(parameters, lr, (0.9, 0.99), eps=momentum_or_eps)
    options = VARIANTS[name].options
    return SONew(parameters, lr, (0.9, 0.99), eps=momentum_or_eps, **options)


# -- images and network ----------------------------------------------------------------------------


def shuffle_pixels(images):
    """Return training and test images with their pixels in one random order."""
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    return [x[:, order] for x in images]


def autoencoder(widths, seed):
    """Build the network 784-...-code-...-784, with tanh except at the code and at the output."""
    torch.manual_seed(seed)
    sizes = [*widths, *widths[-2::-1]]  # 784, 64, 32, 16, 32, 64, 784
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        linear = torch.nn.Linear(n_in, n_out)
        torch.nn.init.xavier_uniform_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        layers.append(linear)
        if n_out not in (widths[-1], widths[0]):  # the code, the output
            layers.append(torch.nn.Tanh())
    return torch.nn.Sequential(*layers)


def cross_entropy(logits, x):
    """Return the loss in nats per image, summed over the pixels. logits, x: (N, 784)"""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


@torch.no_grad()
def evaluate(net, x):
    return cross_entropy(net(x), x).item()


# -- training --------------------------------------------------------------------------------------


def get_lr(step, peak_lr):
    """Return the learning rate: it rises over a tenth of the steps, then falls to 0, linearly."""
    warmup = (step + 1) / (STEPS / 10)
    decay = (STEPS - step) / (STEPS * 0.9)
    return peak_lr * min(warmup, decay, 1.0)


def train_variant(name, setting, images, seed):
    """Train an autoencoder with one optimizer and return its run; its value is the test loss.

    setting: (lr, momentum or eps). images: training and test images.
    """
    start_time = time.perf_counter()
    if name.endswith("shuffled"):
        images = shuffle_pixels(images)
    train_images, test_images = images
    lr, momentum_or_eps = setting
    net = autoencoder(WIDTHS, seed)
    optimizer = make_optimizer(name, list(net.parameters()), lr, momentum_or_eps)
    generator = torch.Generator().manual_seed(seed)  # of the batches

    curve = []  # [step, training loss]
    for step in range(STEPS):
        if step % max(1, STEPS // 10) == 0:
            curve.append([step, evaluate(net, train_images[:5000])])

        # one step on a random batch
        for group in optimizer.param_groups:
            group["lr"] = get_lr(step, lr)
        chosen = torch.randint(len(train_images), (BATCH,), generator=generator)
        x = train_images[chosen]
        loss = cross_entropy(net(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    train_loss = evaluate(net, train_images[:10000])
    curve.append([STEPS, train_loss])
    run = {"seed": seed, "value": evaluate(net, test_images), "train": train_loss, "curve": curve}
    run["seconds"] = time.perf_counter() - start_time
    return run


def sweep(images):
    """Train with every setting of each variant's grid, on two seeds that are not used afterwards.

    Returns {variant: [[lr, momentum or eps, mean training loss], ...]}, the best setting first.
    """
    results = {}
    for name, variant in VARIANTS.items():
        rows = []
        for setting in itertools.product(variant.lrs, variant.momentum_or_eps):
            runs = [train_variant(name, setting, images, seed) for seed in harness.SWEEP_SEEDS]
            rows.append([*setting, statistics.mean(run["train"] for run in runs)])
        rows.sort(key=lambda row: row[2] if math.isfinite(row[2]) else math.inf)  # NaN last
        results[name] = rows
        lr, momentum_or_eps, loss = rows[0]
        print(f"{name:18s} lr {lr:g}, momentum or eps {momentum_or_eps:g}: {loss:.1f}", flush=True)
    return results


def compare(images):
    """Train each variant with its best setting on all seeds; return the record of the study.

    In the record, "second" is the momentum or eps.
    """
    variants = {}
    runs = {}  # {variant: its run on each seed}
    for name, variant in VARIANTS.items():
        runs[name] = [train_variant(name, variant.best, images, seed) for seed in SEEDS]
        lr, second = variant.best
        settings = {"lr": lr, "second": second, "widths": WIDTHS, "batch": BATCH, "steps": STEPS}
        grid = {"lr": variant.lrs, "second": variant.momentum_or_eps, "seeds": harness.SWEEP_SEEDS}
        variants[name] = {"settings": settings, "sweep": grid, "runs": runs[name]}

    # differences of the test loss to Adam, and to SONew with band 1, paired by seed
    differences = {}
    for name in VARIANTS:
        if name != BASELINE:
            differences[name] = harness.paired_difference(runs[name], runs[BASELINE])
    differences_to_band_1 = {}
    for name in ("SONew, band 0", "band 1, flat", "band 1, shuffled", "SONew, band 4"):
        difference = harness.paired_difference(runs[name], runs["SONew, band 1"])
        differences_to_band_1[name] = {**difference, "baseline": "SONew, band 1"}
    return {
        "question": "Does SONew train an autoencoder of MNIST faster than Adam?",
        "metric": "test cross-entropy, nats per image",
        "baseline": BASELINE,
        "variants": variants,
        "differences": differences,
        "differences_to_band_1": differences_to_band_1,
    }


# -- the closed form on statistics of real gradients -----------------------------------------------


def gradient_statistics(images):
    """Return C = E[g g^T], (112, 112), of an untrained autoencoder.

    g: gradients of the weights from 112 pixels, four rows of the image, to the first hidden unit.
    The gradient of the weight from pixel i is x_i times the gradient at the hidden unit.
    """
    x = images[0][:5000].double()
    net = autoencoder(WIDTHS, 0).double()
    hidden = net[0](x).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(net[1:](hidden), x, reduction="sum")
    grad_hidden = torch.autograd.grad(loss, hidden)[0]  # (N, 64)
    g = (grad_hidden[:, :1] * x)[:, 336:448]  # (N, 112): one gradient per image
    C = g.T @ g / len(g)
    damping = 1e-3 * C.diagonal().mean()  # some pixels are black in all images
    return C + damping * torch.eye(len(C))


def banded_inverse(C, band):
    """Return the symmetric X (n, n) of this band that is closest to the inverse of C (n, n)."""
    # the statistics that SONew keeps: S_k[i] = C[i, i + k], padded with zeros to (1, n)
    S = [F.pad(C.diagonal(k), (0, k))[None] for k in range(band + 1)]
    psi, s = factor(S, 1e-12)

    # it maps each row e_i of the identity to X e_i: column i of X, which is also row i
    return precondition(torch.eye(len(C), dtype=C.dtype), psi, s)


def logdet_divergence(X, C):
    """Return tr(X C) - log det(X C) - n; it is 0 if X is the inverse of C."""
    product = X @ C
    return (torch.trace(product) - torch.logdet(product) - len(C)).item()


def logdet_problem(images):
    """Approximate the inverse of gradient statistics C by a banded X, for each band.

    Returns {name: {band: LogDet divergence}}, with the pixels in order and shuffled, C (n, n), and
    {band: X^-1}.
    """
    C = gradient_statistics(images)
    order = torch.randperm(len(C), generator=torch.Generator().manual_seed(0))
    C_shuffled = C[order][:, order]
    result = {"divergence": {}, "divergence_shuffled": {}}
    inverses = {}
    for band in BANDS:
        X = banded_inverse(C, band)
        X_shuffled = banded_inverse(C_shuffled, band)
        result["divergence"][band] = logdet_divergence(X, C)
        result["divergence_shuffled"][band] = logdet_divergence(X_shuffled, C_shuffled)
        inverses[band] = torch.linalg.inv(X)
    return result, C, inverses


# -- figure and command ----------------------------------------------------------------------------


def plot(record, C, inverses):
    """Draw the statistics, the LogDet divergence by band, training curves and test losses."""
    figure, (top, bottom) = harness.new_figure((12, 7.4), 2, 3)
    plot_statistics(top, C, inverses)
    left, middle, right = bottom

    # LogDet divergence by band
    logdet = record["logdet"]
    left.plot(BANDS, list(logdet["divergence"].values()), "o-", label="pixels in order")
    left.plot(BANDS, list(logdet["divergence_shuffled"].values()), "s--", label="pixels shuffled")
    left.set(xlabel="band", ylabel="LogDet divergence", title="approximation error of $X$")
    left.set_xticks(BANDS)
    left.legend(fontsize=8)

    # training curves without the ablations of band 1, and the test losses of all seeds
    for i, (name, variant) in enumerate(record["variants"].items()):
        runs = variant["runs"]
        if not name.startswith("band 1,"):
            steps, losses = zip(*runs[0]["curve"])
            middle.plot(steps, losses, f"C{i}", label=name)
        test_losses = [run["value"] for run in runs]
        right.plot(test_losses, [i] * len(runs), "o", color=f"C{i}", alpha=0.6)
    title = f"autoencoder of MNIST, seed {SEEDS[0]}"
    middle.set(xlabel="step", ylabel="training loss, nats per image", yscale="log", title=title)
    middle.legend(fontsize=7)
    right.set_yticks(range(len(record["variants"])), record["variants"])
    right.invert_yaxis()
    right.set(xlabel="test loss, nats per image", title=f"{len(SEEDS)} seeds")
    return figure


def plot_statistics(axes, C, inverses):
    """Show C and its approximations X^-1 as correlations: entry ij over sqrt(C_ii C_jj)."""
    size = C.diagonal().sqrt()  # (n,)
    matrices = {
        "correlations of gradients, $E[g g^T]$": C,
        "approximation $X^{-1}$, band 1": inverses[1],
        "approximation $X^{-1}$, band 4": inverses[4],
    }
    for ax, (title, matrix) in zip(axes, matrices.items(), strict=True):
        correlation = (matrix / size / size[:, None]).numpy()
        ax.imshow(correlation, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set(xticks=[], yticks=[], xlabel="pixel", ylabel="pixel", title=title)


def main(argv=None):
    parser = harness.study_parser(__doc__, on_gpus="train GPTs with SONew and with AdamW")
    parser.add_argument("--mnist", metavar="FILE", help="default: out/mnist.npz, downloaded")
    parser.add_argument("--sweep", action="store_true", help="search the learning rates again")
    args = parser.parse_args(argv)
    out = harness.check_writable(args.out)
    if args.full:
        from experiments import language_models

        return language_models.run("sonew", out, harness.deadline_after(args.minutes))

    images = load_mnist(args.mnist)
    start_time = time.perf_counter()
    if args.sweep:  # instead of the study
        record = {"steps": STEPS, "train": sweep(images)}
        record["seconds"] = time.perf_counter() - start_time
        save_json(out / "sonew-cpu-sweep.json", record, "experiments.sonew")
        return record

    record = compare(images)
    record["logdet"], C, inverses = logdet_problem(images)
    record["seconds"] = time.perf_counter() - start_time
    save_json(out / "sonew-cpu.json", record, "experiments.sonew")
    harness.save_figure(plot(record, C, inverses), out / "sonew-cpu.png", dpi=110)
    harness.print_differences(record)
    for name, d in record["differences_to_band_1"].items():
        print(f"  {name} less band 1: {d['mean']:+.1f} +- {d['half_width_95']:.1f}")
    print("LogDet divergence:")
    for band, divergence in record["logdet"]["divergence"].items():
        shuffled = record["logdet"]["divergence_shuffled"][band]
        print(f"  band {band}: {divergence:.0f}, {shuffled:.0f} shuffled")
    harness.print_gpu_result("sonew")
    return record
