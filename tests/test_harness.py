"""experiments/harness.py and the benchmark of training steps, at tiny sizes."""

import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from experiments import bench_train, harness, runner
from tests.common import fails, refused, without_rights


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

    # a seed that only one of them has does not count
    more = [*runs, {"seed": 4, "value": 99.0}]
    assert harness.paired_difference(more, [*baseline, {"seed": 5, "value": 9.0}]) == difference


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

    # losses below 0, such as logarithms, are close to the best if they are above it
    below = [{**close, "lr": lr, "value": value} for lr, value in ((1, -5.0), (2, -4.99), (4, -4))]
    assert harness.close_rates(below) == [1, 2]


def test_a_grid_grows_until_the_best_rate_is_inside(sweep):
    losses = {lr: (1 + abs(lr - 2), 0.0) for lr in (1, 2, 4, 8, 16)}
    runs = sweep(losses, [8, 16])
    assert [run["lr"] for run in runs] == [1, 2, 4, 8, 16]
    runs = sweep({lr: (1 + abs(lr - 8), 0.0) for lr in (1, 2, 4, 8, 16)}, [1, 2])
    assert [run["lr"] for run in runs] == [1, 2, 4, 8, 16]
    with pytest.raises(ValueError, match=r"still at an edge of \[2.0, 4.0, 8.0, 16, 32\]"):
        sweep({lr: (lr, 0.0) for lr in (1, 2, 4, 8, 16, 32)}, [16, 32])


def test_a_grid_grows_for_any_variant_that_is_at_its_edge(monkeypatch):
    monkeypatch.setattr(runner, "parallel", lambda run, jobs, label: [run(job) for job in jobs])
    best = {"inside": 4, "low": 1, "high": 16}

    def make_job(variant, lr, seed):
        return {"variant": variant, "lr": lr, "seed": seed}

    def run(job):
        return {**job, "value": 1 + abs(job["lr"] - best[job["variant"]])}

    for name in ("low", "high"):
        runs = harness.sweep(run, make_job, ["inside", name], [2, 4, 8])
        for variant in runs:
            rates = [1 / 2, 1, 2, 4, 8] if name == "low" else [2, 4, 8, 16, 32]
            assert [run["lr"] for run in runs[variant]] == rates
        assert harness.best_rate(runs[name]) == best[name]


RECORD = {
    "question": "Is it better?",
    "metric": "loss",
    "baseline": "softmax",
    "command": "python laser.py --full",
    "hardware": "1 x NVIDIA H200",
    "variants": {
        "softmax": {"runs": [{"seed": 1, "value": 2.0}, {"seed": 2, "value": 3.0}]},
        "LASER": {"runs": [{"seed": 1, "value": 1.0}, {"seed": 2, "value": 2.5}]},
        "other": {"runs": [{"seed": 1, "value": 4.0}, {"seed": 2, "value": 4.0}]},
    },
    "differences": {
        "LASER": {"mean": -0.75, "half_width_95": 0.25, "n": 2},
        "other": {"mean": 1.5, "half_width_95": 0.5, "n": 2},
    },
}
LINES = """
Is it better? (loss, baseline: softmax)
  softmax                      2.5000
  LASER                        1.7500   difference -0.7500 +- 0.2500 (95%, n = 2)
  other                        4.0000   difference +1.5000 +- 0.5000 (95%, n = 2)
"""


def test_differences_are_printed(tmp_path, monkeypatch, capsys):
    harness.print_differences(RECORD)
    assert "\n" + capsys.readouterr().out == LINES
    longer = {**RECORD["differences"]["LASER"], "baseline": "softmax, longer"}
    harness.print_differences({**RECORD, "differences_at_equal_seconds": {"LASER": longer}})
    last_line = "  LASER less softmax, longer: -0.7500 +- 0.2500 (95%, n = 2)\n"
    assert "\n" + capsys.readouterr().out == LINES + last_line

    # what the study on GPUs found, if it is there
    monkeypatch.setattr(harness, "REPOSITORY", tmp_path)
    harness.print_gpu_result("laser")
    assert capsys.readouterr().out == ""
    (tmp_path / "results").mkdir()
    (tmp_path / "results/laser-gpu.json").write_text(json.dumps(RECORD))
    harness.print_gpu_result("laser")
    origin = "results/laser-gpu.json, from `python laser.py --full` on 1 x NVIDIA H200:"
    assert capsys.readouterr().out == f"\n{origin}{LINES}"


def test_the_plot_shows_the_differences():
    (axes,) = harness.plot_differences(RECORD).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LASER", "other"]
    for i, (container, d) in enumerate(zip(axes.containers, RECORD["differences"].values())):
        point, _, (bar,) = container
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (d["mean"], i)
        ends = bar.get_segments()[0][:, 0]
        assert list(ends) == [d["mean"] - d["half_width_95"], d["mean"] + d["half_width_95"]]
    (zero_line,) = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert set(zero_line.get_xdata()) == {0}


def test_minutes_are_minutes():
    assert harness.deadline_after(2) - time.monotonic() == pytest.approx(120, abs=1)
    assert harness.deadline_after(None) == math.inf


def test_where_a_study_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert harness.study_parser("").parse_args([]).out == "results"
    assert harness.check_writable("a/b/c") == Path("a/b/c")
    assert harness.check_writable("a/b/c").is_dir(), "it may be there already"
    assert list(Path("a/b/c").iterdir()) == []
    Path("text").touch()
    for bad in ("text", "text/a", "x" * 300):
        fails(harness.check_writable, bad, parts=["cannot write in", "give another --out"])
    Path("closed").mkdir(mode=0o555)
    with without_rights():
        fails(
            harness.check_writable, "closed", parts=["cannot write in closed (Permission denied)"]
        )


def test_bench_train_at_tiny_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = {"n_layer": 2, "n_head": 1, "n_embd": 16, "block_size": 8, "batch_size": 1}
    monkeypatch.setitem(train.PRESETS, "tiny", {**shape, "steps": 1, "lr": 1e-3})
    monkeypatch.setattr(bench_train, "VOCABULARY", 64)
    monkeypatch.setattr(bench_train, "ROUNDS", 1)
    init_weights = train.init_weights
    attentions = []

    def recording_init_weights(model, seed):
        attentions.append(model.config.attn)
        init_weights(model, seed)

    monkeypatch.setattr(train, "init_weights", recording_init_weights)
    record = bench_train.main("--shapes tiny --steps 1 --out shown".split())
    simplicial = "simplicial:w1=128:w2=16"  # in the last of the two layers
    expected = ["softmax", "laser", "softmax", f"softmax,{simplicial}"]
    assert attentions == [*expected, "laser", f"laser,{simplicial}"]
    assert list(record["shapes"]["tiny"]) == list(bench_train.VARIANTS)
    assert record["shapes"]["tiny"]["softmax+adamw"]["ratio"] == 1.0
    saved = json.loads(Path("shown/bench_train.json").read_text())
    assert saved["shapes"] == record["shapes"]
    refused(["--steps", "0"], "--steps is 0", main=bench_train.main)
    refused(["--shapes", "huge"], "huge", main=bench_train.main)


def test_bench_train_compares_medians(monkeypatch):
    class FakeVariant:
        tokens_per_step = 500

        def __init__(self, shape, attn, *_):
            self.times = iter([4.0, 1.0, 5.0] if attn == "softmax" else [8.0, 6.0, 40.0])

        def time_steps(self, n):
            return next(self.times) if n == 20 else None  # one step before is not counted

    monkeypatch.setattr(bench_train, "Variant", FakeVariant)
    monkeypatch.setattr(bench_train, "ROUNDS", 3)
    for variants in (
        ["softmax+adamw", "laser+adamw"],
        ["laser+adamw", "softmax+adamw"],
        ["laser+adamw", "laser+adamw"],  # the baseline is always timed
    ):
        args = SimpleNamespace(variants=variants, steps=20)
        rows = bench_train.bench_shape("tiny", torch.device("cpu"), args)
        assert rows == {
            "softmax+adamw": {"ms_per_step": 4.0, "tokens_per_s": 125_000, "ratio": 1.0},
            "laser+adamw": {"ms_per_step": 8.0, "tokens_per_s": 62_500, "ratio": 2.0},
        }


def test_bench_train_gives_the_milliseconds_of_one_step(monkeypatch):
    ticks = iter([10.0, 10.75])
    n_read = 0

    def read():
        nonlocal n_read
        n_read += 1

    variant = object.__new__(bench_train.Variant)  # without a model
    variant.step = None
    variant.batch = [], torch.ones(())
    grad_norm = SimpleNamespace(read=read)
    monkeypatch.setattr(train, "train_step", lambda *args: (None, grad_norm, None))
    monkeypatch.setattr(bench_train, "time", SimpleNamespace(perf_counter=ticks.__next__))
    assert variant.time_steps(3) == 250
    assert n_read == 3


def test_bench_train_adds_several_processes_to_the_file_of_one(tmp_path, monkeypatch):
    """Two GPUs that take 12.5 ms for twice the batch have 80% of their peak."""
    monkeypatch.setattr(bench_train.distributed, "setup", lambda: torch.device("cpu"))
    for n, ms, flags in ((1, 10.0, []), (2, 12.5, []), (2, 20.0, ["--fsdp"])):
        rows = {"softmax+adamw": {"ms_per_step": ms}}
        monkeypatch.setattr(bench_train.distributed, "world_size", lambda n=n: n)
        monkeypatch.setattr(bench_train, "bench_shape", lambda *args, rows=rows: rows)
        bench_train.main([*flags, "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "bench_train.json").read_text())
    assert saved["shapes"]["tiny"] == {
        "softmax+adamw": {"ms_per_step": 10.0},
        "softmax+adamw, ddp on 2": {"ms_per_step": 12.5, "weak_scaling": 0.8},
        "softmax+adamw, fsdp on 2": {"ms_per_step": 20.0, "weak_scaling": 0.5},
    }
