"""experiments/harness.py and the benchmark of training steps, at tiny sizes."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

import train
from experiments import bench_train, harness, runner
from tests.common import refused


def test_confidence_interval_is_students():
    mean, half_width = harness.mean_ci95([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half_width == pytest.approx(4.303 * statistics.stdev([1, 2, 4]) / 3**0.5)
    assert harness.mean_ci95([0.0, 1.0])[1] == pytest.approx(12.706 * 0.5)
    many = [0.0, 1.0] * 20  # 39 degrees of freedom: 2.0227
    expected = 2.0227 * statistics.stdev(many) / 40**0.5
    assert harness.mean_ci95(many)[1] == pytest.approx(expected, rel=2e-3)
    with pytest.raises(ValueError, match="at least two"):
        harness.mean_ci95([1.0])


def test_the_quantiles_are_those_of_the_distribution():
    """Integrate Student's density up to each quantile: it must leave 2.5% on either side."""
    assert len(harness.T_95) == 29
    for df, t in enumerate(harness.T_95, 1):
        width = t / 20000
        x = (np.arange(20000) + 0.5) * width
        norm = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        area = (norm * (1 + x**2 / df) ** (-(df + 1) / 2) * width).sum()
        assert 0.5 - area == pytest.approx(0.025, abs=3e-5)


def test_differences_are_paired_by_seed():
    runs = [{"seed": s, "value": v} for s, v in ((1, 1.0), (2, 5.0), (3, 9.5))]
    baseline = [{"seed": s, "value": v} for s, v in ((3, 9.0), (1, 0.5), (2, 4.0))]
    difference = harness.paired_difference(runs, baseline)
    assert difference["n"] == 3
    assert difference["mean"] == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert difference["half_width_95"] == pytest.approx(harness.mean_ci95([0.5, 1.0, 0.5])[1])


def test_the_best_rate_is_that_of_the_mean():
    runs = [{"lr": 1.0, "value": 5.0}, {"lr": 2.0, "value": 1.0}]
    assert harness.best_rate(runs) == 2.0
    runs = [{"lr": lr, "value": value} for lr in (1.0, 2.0) for value in (5.0, 4.0 * lr - 3.5)]
    assert harness.best_rate(runs) == 1.0
    # one seed is no match for two: at 3.0 the first seed was not close to the best
    assert harness.best_rate([*runs, {"lr": 3.0, "value": 1.0}]) == 1.0


@pytest.fixture
def sweep(monkeypatch):
    """Return a function that sweeps {learning rate: the losses of both seeds}."""
    monkeypatch.setattr(runner, "parallel", lambda run, jobs, label: [run(job) for job in jobs])

    def make_job(variant, lr, seed):
        return {"variant": variant, "lr": lr, "seed": seed}

    def sweep(losses, rates):
        def run(job):
            value = losses[job["lr"]][harness.SWEEP_SEEDS.index(job["seed"])]
            return {"seed": job["seed"], "lr": job["lr"], "value": value}

        return harness.sweep(run, make_job, ["only"], rates)["only"]

    return sweep


def test_close_rates_get_a_second_seed(sweep):
    """The first seed prefers 2e-3 by chance; at 4e-3 nothing could change the choice."""
    losses = {5e-4: (0.652, 0.654), 1e-3: (0.651, 0.65), 2e-3: (0.65, 0.656), 4e-3: (0.653, 0)}
    runs = sweep(losses, list(losses))
    seeds = {}
    for run in runs:
        seeds.setdefault(run["lr"], []).append(run["seed"])
    assert seeds == {5e-4: [100, 101], 1e-3: [100, 101], 2e-3: [100, 101], 4e-3: [100]}
    assert harness.best_rate(runs) == 1e-3

    # a rate that is added later must be compared on both seeds, if it is close or clearly better
    close = {"seed": 100, "lr": 8e-3, "value": 0.651}
    assert harness.close_rates([*runs, close]) == [8e-3]
    assert harness.close_rates([*runs, {**close, "value": 0.6}]) == [8e-3]
    assert harness.close_rates([close, {**close, "lr": 4e-3, "value": 0.7}]) == []


def test_a_grid_grows_until_the_best_rate_is_inside(sweep):
    losses = {lr: (1 + abs(lr - 2), 0.0) for lr in (1, 2, 4, 8, 16)}
    runs = sweep(losses, [8, 16])
    assert [run["lr"] for run in runs] == [1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match=r"still at an edge of \[2.0, 4.0, 8.0, 16, 32\]"):
        sweep({lr: (lr, 0.0) for lr in (1, 2, 4, 8, 16, 32)}, [16, 32])


def test_bench_train_at_tiny_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = {"n_layer": 4, "n_head": 1, "n_embd": 16, "block_size": 8, "batch_size": 1}
    monkeypatch.setitem(train.PRESETS, "tiny", {**shape, "steps": 1, "lr": 1e-3})
    monkeypatch.setattr(bench_train, "VOCABULARY", 64)
    monkeypatch.setattr(bench_train, "ROUNDS", 1)
    record = bench_train.main("--shapes tiny --steps 1 --out shown".split())
    assert list(record["shapes"]["tiny"]) == list(bench_train.VARIANTS)
    assert record["shapes"]["tiny"]["softmax+adamw"]["ratio"] == 1.0
    saved = json.loads(Path("shown/bench_train.json").read_text())
    assert saved["shapes"] == record["shapes"]
    refused(["--steps", "0"], "--steps is 0", main=bench_train.main)
    refused(["--shapes", "huge"], "huge", main=bench_train.main)
