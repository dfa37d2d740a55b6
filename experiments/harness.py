"""What every study needs: runs, sweeps, seeds, paired intervals, a disk cache, JSON, figures.

A study is a declaration of its variants, for example

    compare("laser", question, {"softmax": "--attn softmax", "LASER": "--attn laser"}, "softmax")

trains each variant at every learning rate of a grid on one seed, then at its best rate on the other
seeds, and reports the differences to the baseline, paired by seed, with 95% confidence intervals.
Finished runs are kept in a disk cache, so an interrupted study resumes where it stopped.
"""

import csv
import hashlib
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
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import train
from support.checkpoint import atomic_write, write_json
from support.cli import Parser

REPOSITORY = Path(__file__).resolve().parent.parent

# Two-sided 95% quantiles of Student's t, by degrees of freedom; from 30 on the normal one is near
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160]
T_95 += [2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056]
T_95 += [2.052, 2.048, 2.045]


# -- statistics ------------------------------------------------------------------------------------


def mean_ci95(values):
    """Return the mean and the half width of its 95% confidence interval, by Student's t."""
    n = len(values)
    if n < 2:
        raise ValueError("a confidence interval needs at least two values; run more seeds")
    t = T_95[n - 2] if n - 2 < len(T_95) else 1.96 + 2.4 / (n - 1)
    return statistics.mean(values), t * statistics.stdev(values) / n**0.5


def paired_difference(runs, baseline_runs):
    """Return mean, half_width_95 and n of the differences in "value" between equal seeds."""
    baseline = {run["seed"]: run["value"] for run in baseline_runs}
    differences = [run["value"] - baseline[run["seed"]] for run in runs if run["seed"] in baseline]
    mean, half_width = mean_ci95(differences)
    return {"mean": mean, "half_width_95": half_width, "n": len(differences)}


# -- cached and parallel work ----------------------------------------------------------------------


def code_fingerprint():
    """Return a hash of the sources that decide the numbers of a run."""
    digest = hashlib.sha256()
    for folder in ("", "kernels", "support"):
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            if path.name not in ("test_all.py", "sample.py"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def disk_cache(folder, key, compute):
    """Return compute(), which is plain data, or what it returned earlier for this key.

    The key is plain data too and has to name everything that the result depends on.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        write_json(path, {"key": key, "result": compute()})
    return json.loads(path.read_text())["result"]


def run_train(flags, cache=None):
    """Train with these flags and return the result, with "seconds" and "history", its log.csv.

    flags: one string, as on the command line. cache: a folder for `disk_cache`.
    """
    if cache is not None:
        return disk_cache(cache, [flags, code_fingerprint()], partial(run_train, flags))
    start_time = time.perf_counter()
    Path("out").mkdir(exist_ok=True)  # runs under out/ share their tokens
    with (
        tempfile.TemporaryDirectory(dir="out", prefix="study-") as out,
        redirect_stdout(io.StringIO()),
    ):
        result = train.main([*shlex.split(flags), "--out", out, "--sample", "0"])
        if result["signal"]:
            raise KeyboardInterrupt(result["signal"])
        with open(Path(out, "log.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
    history = []
    for row in rows:
        history.append({name: float(text) for name, text in row.items() if text})
    del result["out"]
    return {**result, "seconds": time.perf_counter() - start_time, "history": history}


def start_worker(gpus, threads):
    """Set up a worker process: one GPU, taken from the queue, or a share of the CPU cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    torch.set_num_threads(threads)


def visible_gpus():
    """Return the names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def parallel(function, jobs, workers=None, minutes=None, label="runs"):
    """Return [function(job) for job in jobs], one worker process per visible GPU or CPU core.

    function has to be importable, and jobs and results are pickled between our own processes.
    minutes: after so long, start no further job, and raise TimeoutError when those under way are
    done; with a disk cache inside `function` the next call goes on from there.
    """
    gpus = visible_gpus() if torch.cuda.is_available() else []
    workers = min(workers or len(gpus) or os.cpu_count(), len(jobs))
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    bar = tqdm(total=len(jobs), desc=label, unit="run", leave=False)
    context = multiprocessing.get_context("spawn")
    gpu_queue = None
    if gpus:
        gpu_queue = context.Queue()
        for i in range(workers):
            gpu_queue.put(gpus[i % len(gpus)])
    threads = max(1, os.cpu_count() // max(1, workers))

    results = {}
    pool = ProcessPoolExecutor(workers, context, start_worker, (gpu_queue, threads))
    try:
        waiting = list(enumerate(jobs))[::-1]
        running = {}
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                i, job = waiting.pop()
                running[pool.submit(function, job)] = i
            if not running:
                raise TimeoutError(f"{len(results)} of {len(jobs)} {label} are done")
            future = next(as_completed(running))
            results[running.pop(future)] = future.result()
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
    """Train one variant and return its run; job: {flags, lr, seed, metric, cache}."""
    flags = f"{job['flags']} --lr {job['lr']:g} --seed {job['seed']}"
    result = run_train(flags, job["cache"])
    run = {"seed": job["seed"], "lr": job["lr"], "value": result[job["metric"]]}
    evaluated = [row for row in result["history"] if "val_loss" in row]
    run["curve"] = [[int(row["step"]), row[job["metric"]]] for row in evaluated]
    return {**run, "seconds": result["seconds"], "tokens_per_s": result.get("tokens_per_s")}


def sweep(jobs_of, names, rates, minutes=None, most_extensions=3):
    """Return {variant: [run at each rate]}, the grid extended until every best lies inside it.

    jobs_of(names, rates) -> the jobs; all variants get the same grid. rates: ascending.
    """
    runs = {name: [] for name in names}
    new_rates = list(rates)
    for _ in range(most_extensions + 1):
        jobs = jobs_of(names, new_rates)
        done = parallel(run_variant, jobs, minutes=minutes, label="sweep")
        for i, name in enumerate(names):
            part = done[i * len(new_rates) : (i + 1) * len(new_rates)]
            runs[name] = sorted(runs[name] + part, key=lambda run: run["lr"])
        best = [best_rate(runs[name]) for name in names]
        tried = [run["lr"] for run in runs[names[0]]]
        new_rates = [tried[0] / 2] * (tried[0] in best) + [tried[-1] * 2] * (tried[-1] in best)
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
    sweep_seed=100,
    seeds=(1, 2, 3, 4, 5),
    metric="val_loss",
    out="results",
    minutes=None,
):
    """Run a study of language models, write its JSON and figure, and return the record.

    variants: {name: flags that set it apart}. rates: the learning-rate grid, swept on a seed that
    is not used afterwards. Raises TimeoutError after `minutes`; call again to continue.
    """
    start_time = time.perf_counter()
    cache = str(Path("out") / f"{name}-study")
    names = list(variants)

    def job(variant, lr, seed):
        common = {"metric": metric, "cache": cache}
        return {"flags": f"{flags} {variants[variant]}", "lr": lr, "seed": seed, **common}

    def sweep_jobs(names, rates):
        return [job(variant, lr, sweep_seed) for variant in names for lr in rates]

    # the learning rate of each variant, then the seeds at its best rate
    swept = sweep(sweep_jobs, names, rates, minutes)
    jobs = []
    for variant in names:
        jobs += [job(variant, best_rate(swept[variant]), seed) for seed in seeds]
    runs = parallel(run_variant, jobs, minutes=minutes, label="seeds")

    # the record
    record = {"question": question, "metric": metric, "baseline": baseline}
    record.update(variants={}, differences={})
    for i, variant in enumerate(names):
        record["variants"][variant] = {
            "settings": f"{flags} {variants[variant]}",
            "sweep": swept[variant],
            "runs": runs[i * len(seeds) : (i + 1) * len(seeds)],
        }
    baseline_runs = record["variants"][baseline]["runs"]
    for variant in names:
        if variant != baseline:
            variant_runs = record["variants"][variant]["runs"]
            record["differences"][variant] = paired_difference(variant_runs, baseline_runs)
    record["seconds"] = time.perf_counter() - start_time
    save_json(Path(out) / f"{name}-gpu.json", record)
    save_figure(plot_differences(record), Path(out) / f"{name}-gpu.png")
    return record


def print_differences(record):
    """Print the mean of each variant and its difference to the baseline."""
    baseline = record["baseline"]
    print(f"{record['question']} ({record['metric']}, baseline: {baseline})")
    for name, variant in record["variants"].items():
        mean = statistics.mean(run["value"] for run in variant["runs"])
        line = f"  {name:24} {mean:10.4f}"
        if name in record["differences"]:
            d = record["differences"][name]
            line += (
                f"   difference {d['mean']:+.4f} +- {d['half_width_95']:.4f} (95%, n = {d['n']})"
            )
        print(line)


def plot_differences(record):
    """Draw the difference of each variant to the baseline, with its 95% interval."""
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
    """Return the parser of a study: --out, and --full where `full` says what it does."""
    parser = Parser(description=description)
    parser.add_argument("--out", default="results", help="folder of JSON and figure")
    if full:
        parser.add_argument("--full", action="store_true", help=full)
    return parser


def check_writable(folder):
    """Return the folder as a Path; raise ValueError now, not at the end, if it is read-only."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot write in {folder} ({reason}); give --out another folder"
        ) from None
    return Path(folder)


def provenance():
    """Return what produced a result: command, commit, hardware and versions."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = None
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", "*.py"]
        changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
        commit = (head.stdout.strip() + ("-dirty" if changed else "")) or None
    except OSError:  # no git here
        pass
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ModuleNotFoundError:
        pass
    script = Path(sys.argv[0]).resolve()
    if script.is_relative_to(REPOSITORY):
        script = script.relative_to(REPOSITORY)
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    return {"command": command, "commit": commit, "hardware": hardware, "versions": versions}


def save_json(path, record):
    """Write a result together with its provenance. Write "seconds" into the record yourself."""
    write_json(path, {**provenance(), **record})


def new_figure(size, *grid, **options):
    """Return a figure and its axes like plt.subplots, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def save_figure(figure, path, dpi=120):
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
