"""What studies share: runs, sweeps, paired confidence intervals, a disk cache, JSON and figures.

    compare("laser", question, {"softmax": "--attn softmax", "LASER": "--attn laser"}, "softmax")

trains each variant at every learning rate of a grid on one seed, then at its best rate on other
seeds, and reports the differences to the baseline with 95% confidence intervals. Finished runs are
cached on disk, so an interrupted study resumes where it stopped.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import train
from support.cli import Parser
from support.files import atomic_write, write_json

REPOSITORY = Path(__file__).resolve().parent.parent
METRIC = "val_loss"  # of language models
SWEEP_SEED = 100  # learning rates are chosen on a seed that is not used afterwards

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
    t = T_95[n - 2] if n - 2 < len(T_95) else 1.96 + 2.4 / (n - 1)
    return statistics.mean(values), t * statistics.stdev(values) / n**0.5


def paired_difference(runs, baseline_runs):
    """Return mean, half_width_95 and n of the differences in "value" between runs of equal seed."""
    baseline = {run["seed"]: run["value"] for run in baseline_runs}
    differences = [run["value"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
    mean, half_width = mean_ci95(differences)
    return {"mean": mean, "half_width_95": half_width, "n": len(differences)}


# -- cached and parallel work ----------------------------------------------------------------------


def code_fingerprint():
    """Return a hash of all source files that the result of a run depends on."""
    digest = hashlib.sha256()
    for folder in ("", "kernels", "support"):
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            if path.name not in ("test_all.py", "sample.py"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def disk_cache(folder, key, compute):
    """Return the cached result for this key, or else call compute() and cache its result.

    Key and result must be JSON values. The key must contain everything the result depends on.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        write_json(path, {"key": key, "result": compute()})
    return json.loads(path.read_text())["result"]


def run_train(flags, cache=None):
    """Train and return the result of train.main, with "seconds" and "history", the rows of log.csv.

    flags: one string, as on the command line. cache: folder of the disk cache; None: no cache.
    """
    if cache is not None:
        return disk_cache(cache, [flags, code_fingerprint()], partial(run_train, flags))
    start_time = time.perf_counter()
    Path("out").mkdir(exist_ok=True)  # runs under out/ share one token cache
    with tempfile.TemporaryDirectory(dir="out", prefix="study-") as out:
        with redirect_stdout(io.StringIO()):
            result = train.main([*shlex.split(flags), "--out", out, "--sample", "0"])
        if result["signal"]:
            raise KeyboardInterrupt(result["signal"])
        history = []
        with open(Path(out, "log.csv"), newline="") as file:
            for row in csv.DictReader(file):
                history.append({name: float(text) for name, text in row.items() if text})
    del result["out"]
    return {**result, "seconds": time.perf_counter() - start_time, "history": history}


def start_worker(gpu_queue, threads):
    """Set up a worker process: assign it one GPU, or else a share of the CPU cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    if gpu_queue is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_queue.get()
    torch.set_num_threads(threads)


def parallel(function, jobs, workers=None, minutes=None, label="runs"):
    """Return [function(job) for job in jobs], computed by one process per visible GPU or CPU core.

    function must be importable, and jobs and results are pickled. After `minutes` no further job
    is started, and TimeoutError is raised once the running ones are done. With a disk cache inside
    `function`, the next call resumes there.
    """
    gpus = []
    if torch.cuda.is_available():
        default = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or default).split(",")
    workers = min(workers or len(gpus) or os.cpu_count(), len(jobs))
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    # each worker takes one GPU from the queue
    context = multiprocessing.get_context("spawn")
    gpu_queue = context.Queue() if gpus else None
    for i in range(workers if gpus else 0):
        gpu_queue.put(gpus[i % len(gpus)])
    threads = max(1, os.cpu_count() // max(1, workers))
    pool = ProcessPoolExecutor(workers, context, start_worker, (gpu_queue, threads))

    results = {}
    waiting = list(enumerate(jobs))
    running = {}  # future: index of its job
    bar = tqdm(total=len(jobs), desc=label, unit="run", leave=False)
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                i, job = waiting.pop(0)
                running[pool.submit(function, job)] = i
            if not running:
                raise TimeoutError(f"{len(results)} of {len(jobs)} {label} are done")
            finished = next(as_completed(running))
            results[running.pop(finished)] = finished.result()
            bar.update()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return [results[i] for i in range(len(jobs))]


# -- studies ---------------------------------------------------------------------------------------


def run_variant(job):
    """Train one variant and return its run; job: {variant, flags, cache, lr, seed}."""
    flags = f"{job['flags']} --lr {job['lr']:g} --seed {job['seed']}"
    result = run_train(flags, job["cache"])
    evaluated = [row for row in result["history"] if "val_loss" in row]
    run = {"seed": job["seed"], "lr": job["lr"], "value": result[METRIC]}
    run["curve"] = [[int(row["step"]), row[METRIC]] for row in evaluated]
    return {**run, "seconds": result["seconds"], "tokens_per_s": result.get("tokens_per_s")}


def sweep(make_job, names, rates, minutes=None, max_extensions=3):
    """Return {variant: [run at each rate]}; the grid grows until each best rate lies inside it.

    make_job(variant, rate, seed) -> job. rates: ascending; all variants get the same grid.
    """
    runs = {name: [] for name in names}
    new_rates = list(rates)
    for _ in range(max_extensions + 1):
        jobs = [make_job(name, rate, SWEEP_SEED) for name in names for rate in new_rates]
        for job, run in zip(jobs, parallel(run_variant, jobs, minutes=minutes, label="sweep")):
            runs[job["variant"]].append(run)
        for name in names:
            runs[name].sort(key=lambda run: run["lr"])

        # extend the grid at an edge where a variant has its best rate
        best_rates = [best_rate(runs[name]) for name in names]
        tried = [run["lr"] for run in runs[names[0]]]
        below = [tried[0] / 2] if tried[0] in best_rates else []
        above = [tried[-1] * 2] if tried[-1] in best_rates else []
        new_rates = below + above
        if not new_rates:
            return runs
    raise ValueError(f"the best learning rate is still at an edge of {tried}; give a wider grid")


def best_rate(runs):
    return min(runs, key=lambda run: run["value"])["lr"]


def compare(
    name,
    question,
    variants,
    baseline,
    flags="--model small --data python --steps 3000 --eval-batches 100",
    rates=(5e-4, 1e-3, 2e-3),
    seeds=(1, 2, 3, 4, 5),
    out="results",
    minutes=None,
):
    """Run a study of language models, write its JSON and figure, and return the record.

    variants: {name: flags that differ}. rates: grid of learning rates, swept on a seed of its own.
    Raises TimeoutError after `minutes`; call again to continue.
    """
    start_time = time.perf_counter()
    cache = str(Path("out") / f"{name}-study")
    settings = {variant: f"{flags} {more}" for variant, more in variants.items()}

    def make_job(variant, lr, seed):
        job = {"variant": variant, "flags": settings[variant], "cache": cache}
        return {**job, "lr": lr, "seed": seed}

    # find the learning rate of each variant, then run all seeds at it
    swept = sweep(make_job, list(variants), rates, minutes)
    jobs = []
    for variant in variants:
        lr = best_rate(swept[variant])
        jobs += [make_job(variant, lr, seed) for seed in seeds]
    runs = {variant: [] for variant in variants}
    for job, run in zip(jobs, parallel(run_variant, jobs, minutes=minutes, label="seeds")):
        runs[job["variant"]].append(run)

    record = {"question": question, "metric": METRIC, "baseline": baseline}
    record.update(variants={}, differences={})
    for variant in variants:
        entry = {"settings": settings[variant], "sweep": swept[variant], "runs": runs[variant]}
        record["variants"][variant] = entry
        if variant != baseline:
            record["differences"][variant] = paired_difference(runs[variant], runs[baseline])
    record["seconds"] = time.perf_counter() - start_time
    save_json(Path(out) / f"{name}-gpu.json", record)
    save_figure(plot_differences(record), Path(out) / f"{name}-gpu.png")
    return record


def print_differences(record):
    """Print the mean of each variant, and its difference to the baseline."""
    baseline = record["baseline"]
    print(f"{record['question']} ({record['metric']}, baseline: {baseline})")
    for name, variant in record["variants"].items():
        mean = statistics.mean(run["value"] for run in variant["runs"])
        line = f"  {name:24} {mean:10.4f}"
        d = record["differences"].get(name)
        if d:
            interval = f"{d['mean']:+.4f} +- {d['half_width_95']:.4f}"
            line += f"   difference {interval} (95%, n = {d['n']})"
        print(line)


def plot_differences(record):
    """Plot the difference of each variant to the baseline, with its 95% confidence interval."""
    names = list(record["differences"])
    figure, axes = new_figure((7, 1.2 + 0.5 * len(names)))
    for i, name in enumerate(names):
        d = record["differences"][name]
        axes.errorbar(d["mean"], i, xerr=d["half_width_95"], fmt="o", color=f"C{i}", capsize=4)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{record['metric']}: difference to {record['baseline']}, 95% interval")
    return figure


# -- command line and files ------------------------------------------------------------------------


def study_parser(description, full=""):
    """Return the parser of a study: --out, and --full if its help text `full` is given."""
    parser = Parser(description=description)
    parser.add_argument("--out", default="results", help="folder of JSON and figure")
    if full:
        parser.add_argument("--full", action="store_true", help=full)
    return parser


def check_writable(folder):
    """Create the folder and return its Path; raise ValueError if it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write in {folder} ({reason}); give another --out") from None
    return Path(folder)


def provenance():
    """Return what produced a result: command, commit, hardware and versions."""
    script = os.path.relpath(os.path.realpath(sys.argv[0]), REPOSITORY)
    command = shlex.join(["python", script, *sys.argv[1:]])
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    return {"command": command, "commit": commit(), "hardware": hardware, "versions": versions}


def commit():
    """Return the git commit, with "-dirty" if Python files have changed since; None without git."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        diff = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True)
    except OSError:  # git is not installed
        return None
    suffix = "-dirty" if diff.returncode else ""
    return None if head.returncode else head.stdout.strip() + suffix


def save_json(path, record):
    """Write a result with its provenance as JSON. The record itself must contain "seconds"."""
    write_json(path, {**provenance(), **record})


def new_figure(size, *grid, **options):
    """Return a figure and its axes, as plt.subplots does, but without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def save_figure(figure, path, dpi=120):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
