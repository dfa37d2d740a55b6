"""What studies share: sweeps, paired confidence intervals, command lines and figures.

A study trains each variant at every learning rate of a grid, then at its best rate on other seeds,
and reports the differences to a baseline, paired by seed. runner.py caches the runs on disk, so an
interrupted study resumes where it stopped, and studies share their runs.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from experiments import runner
from experiments.provenance import REPOSITORY
from support.cli import Parser
from support.files import atomic_write

# Learning rates are chosen on seeds that are not used afterwards. The second one decides between
# rates whose losses on the first one are close to the best; over seeds, the standard deviation of
# the loss of a GPT is 0.1 to 0.4%.
SWEEP_SEEDS = (100, 101)
CLOSE = 0.004  # relative to the best loss

# Two-sided 95% quantiles of Student's t distribution for 1, 2, ..., 29 degrees of freedom
T_95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
]  # fmt: skip


# -- statistics ------------------------------------------------------------------------------------


def mean_ci95(values):
    """Return the mean and the half width of its 95% confidence interval, by Student's t."""
    n = len(values)
    if n < 2:
        raise ValueError("a confidence interval needs at least two values; run more seeds")
    # t for n - 1 degrees of freedom; beyond the table an approximation
    t = T_95[n - 2] if n - 2 < len(T_95) else 1.96 + 2.4 / (n - 1)
    return statistics.mean(values), t * statistics.stdev(values) / n**0.5


def paired_difference(runs, baseline_runs):
    """Return statistics of the differences in "value" between runs and baseline runs of equal seed.

    The result is {"mean", "half_width_95": half the 95% confidence interval, "n": how many}.
    """
    baseline = {run["seed"]: run["value"] for run in baseline_runs}
    differences = [run["value"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
    mean, half_width = mean_ci95(differences)
    return {"mean": mean, "half_width_95": half_width, "n": len(differences)}


# -- studies ---------------------------------------------------------------------------------------


def sweep_and_run(run, make_job, seeds, rates, same_rate=None, **options):
    """Find the learning rate of each variant, then run its seeds at it. A single rate is not swept.

    run(job) -> {"seed", "lr", "value", ...}; make_job(variant, rate, seed) -> job, with "variant".
    seeds: {variant: seeds}. same_rate: {variant: the one whose rate it takes} for variants that are
    not swept. options: of `parallel`. Returns the runs of the sweep and those of the seeds,
    {variant: runs} each.
    """
    same_rate = same_rate or {}
    swept = {name: [] for name in seeds}
    if len(rates) > 1:
        names = [name for name in seeds if name not in same_rate]
        swept.update(sweep(run, make_job, names, rates, **options))
    jobs = []
    for name in seeds:
        rate = best_rate(swept[same_rate.get(name, name)]) if len(rates) > 1 else rates[0]
        jobs += [make_job(name, rate, seed) for seed in seeds[name]]
    runs = {name: [] for name in seeds}
    for job, result in zip(jobs, runner.parallel(run, jobs, label="seeds", **options)):
        runs[job["variant"]].append(result)
    return swept, runs


def sweep(run, make_job, names, rates, max_extensions=3, **options):
    """Return {variant: runs at all rates}; the grid grows until each best rate lies inside it.

    run, make_job: as in `sweep_and_run`. rates: ascending; all variants get the same grid. It is
    extended by a factor of 2, at most max_extensions times.
    """
    runs = {name: [] for name in names}

    def run_all(rates_of, seed):
        jobs = [make_job(name, rate, seed) for name in names for rate in rates_of[name]]
        for job, result in zip(jobs, runner.parallel(run, jobs, label="sweep", **options)):
            runs[job["variant"]].append(result)
        for name in names:
            runs[name].sort(key=lambda result: (result["lr"], result["seed"]))

    tried = []
    new_rates = list(rates)
    for _ in range(max_extensions + 1):
        tried = sorted(tried + new_rates)
        run_all(dict.fromkeys(names, new_rates), SWEEP_SEEDS[0])
        run_all({name: close_rates(runs[name]) for name in names}, SWEEP_SEEDS[1])

        # if a variant has its best rate at an edge of the grid, extend the grid there
        best_rates = [best_rate(runs[name]) for name in names]
        below = [tried[0] / 2] if tried[0] in best_rates else []
        above = [tried[-1] * 2] if tried[-1] in best_rates else []
        new_rates = below + above
        if not new_rates:
            return runs
    raise ValueError(f"the best learning rate is still at an edge of {tried}; give a wider grid")


def close_rates(runs):
    """Return the learning rates that the second seed must decide between, if not run on it yet.

    Those are the rates whose losses on the first seed exceed the best by a share CLOSE at most.
    """
    first, second = SWEEP_SEEDS
    losses = {run["lr"]: run["value"] for run in runs if run["seed"] == first}
    largest = min(losses.values()) + CLOSE * abs(min(losses.values()))
    candidates = {lr for lr, loss in losses.items() if loss <= largest}
    done = {run["lr"] for run in runs if run["seed"] == second}
    if len(candidates | done) == 1:  # the first seed has decided
        return []
    return sorted(candidates - done)


def best_rate(runs):
    """Return the learning rate with the lowest mean value, of those with the most seeds."""
    values = {}  # learning rate: values
    for run in runs:
        values.setdefault(run["lr"], []).append(run["value"])
    most = max(map(len, values.values()))
    means = {lr: statistics.mean(v) for lr, v in values.items() if len(v) == most}
    return min(means, key=means.get)


def print_differences(record):
    """Print the mean of each variant, and its difference to the baseline."""
    baseline = record["baseline"]
    print(f"{record['question']} ({record['metric']}, baseline: {baseline})")
    for name, variant in record["variants"].items():
        mean = statistics.mean(run["value"] for run in variant["runs"])
        line = f"  {name:24} {mean:10.4f}"
        if name in record["differences"]:
            line += f"   difference {interval(record['differences'][name])}"
        print(line)
    for name, difference in record.get("differences_at_equal_seconds", {}).items():
        print(f"  {name} less {difference['baseline']}: {interval(difference)}")


def interval(difference):
    """Return the text of a difference from `paired_difference`: +0.1 +- 0.2 (95%, n = 8)."""
    mean, half_width, n = (difference[key] for key in ("mean", "half_width_95", "n"))
    return f"{mean:+.4f} +- {half_width:.4f} (95%, n = {n})"


def print_gpu_result(name):
    """Print what the GPU study in results/ found, if there is one."""
    path = REPOSITORY / "results" / f"{name}-gpu.json"
    if path.is_file():
        record = json.loads(path.read_text())
        print(f"\nresults/{path.name}, from `{record['command']}` on {record['hardware']}:")
        print_differences(record)


def plot_differences(record, axes=None):
    """Plot the difference of each variant to the baseline, with its 95% confidence interval.

    axes: where to plot; None: in a new figure. Returns the figure.
    """
    names = list(record["differences"])
    if axes is None:
        figure, axes = new_figure((7, 1.5 + 0.5 * len(names)))
        figure.suptitle(record["metric"])
    for i, name in enumerate(names):
        d = record["differences"][name]
        axes.errorbar(d["mean"], i, xerr=d["half_width_95"], fmt="o", color=f"C{i}", capsize=4)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"difference to {record['baseline']}, 95% interval")
    return axes.figure


# -- command line and files ------------------------------------------------------------------------


class StudyParser(Parser):
    """Parser of a study, which refuses --minutes without --full."""

    def parse_args(self, args=None):
        parsed = super().parse_args(args)
        if getattr(parsed, "minutes", None) and not getattr(parsed, "full", True):
            raise ValueError("--minutes is for --full; the study without it cannot be interrupted")
        return parsed


def study_parser(description, on_gpus=""):
    """Return the parser of a study, with --out, and if on_gpus is given with --full and --minutes.

    on_gpus: says what --full does, for the help.
    """
    parser = StudyParser(description=description)
    out = "folder for the JSON and the figure (default: results)"
    parser.add_argument("--out", default="results", metavar="DIR", help=out)
    if on_gpus:
        group = parser.add_argument_group("on GPUs")
        group.add_argument("--full", action="store_true", help=f"instead: {on_gpus}")
        minutes = "with --full: stop after so many minutes; the same command continues"
        group.add_argument("--minutes", type=float, metavar="N", help=minutes)
    return parser


def deadline_after(minutes):
    """Return the value that time.monotonic() will have in so many minutes. None: infinity."""
    return time.monotonic() + 60 * minutes if minutes else float("inf")


def check_gpu():
    """Raise ValueError if there is no GPU for a study of large models."""
    if not torch.cuda.is_available():
        raise ValueError(
            "this study needs a GPU, and there is none; on a CPU run python laser.py, "
            "simplicial.py, sonew.py, lora_rite.py or ttt_context.py --experiment, without --full"
        )


def check_writable(folder):
    """Create the folder and return its Path; raise ValueError if it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write in {folder} ({reason}); give another --out") from None
    return Path(folder)


def new_figure(size, *grid, **options):
    """Return a figure and its axes, as plt.subplots does, but without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def save_figure(figure, path, dpi=120):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
