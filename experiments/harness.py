"""Stand-in until experiments/harness.py arrives."""

import argparse
import hashlib
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from support import checkpoint, cli

T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def disk_cache(folder, key, compute):
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        checkpoint.write_json(path, compute())
    return json.loads(path.read_text())


def mean_ci95(values):
    n = len(values)
    return statistics.fmean(values), T975[n - 1] * statistics.stdev(values) / n**0.5


def paired_difference(runs, baseline_runs):
    base = {run["seed"]: run["value"] for run in baseline_runs}
    d = [run["value"] - base[run["seed"]] for run in runs if run["seed"] in base]
    mean, half = mean_ci95(d)
    return {"mean": mean, "half_width_95": half, "n": len(d)}


def study_parser(description, out="results"):
    parser = cli.Parser(description=description)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", default=out)
    return parser


def check_writable(folder):
    Path(folder).mkdir(parents=True, exist_ok=True)


def save_json(path, record):
    checkpoint.write_json(path, {"command": "", "commit": "", "hardware": "", "versions": {}, **record})


def new_figure(size, *grid, **options):
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def save_figure(figure, path, dpi=120):
    with checkpoint.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def parallel(function, jobs, workers=None):
    with ProcessPoolExecutor(workers or 2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, jobs))
