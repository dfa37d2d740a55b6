"""experiments/language_models.py: sweeps, stages, differences and files, without training."""

import json
import time
from pathlib import Path

import pytest

from experiments import harness, language_models, runner
from experiments.language_models import STUDIES, Study

DEMO = Study(
    "Is it better?",
    {"softmax": "--attn softmax", "other": "--attn laser"},
    {"softmax, longer": "--attn softmax --steps 6000"},
    ("other",),
    {"shorter": "--attn laser --steps 2000"},
    {"control": "--attn laser --clip 2"},
)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A study whose runs are a formula; the list of its jobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES, "demo", DEMO)
    monkeypatch.setattr(harness, "check_gpu", lambda: None)
    jobs = []

    def parallel(function, new_jobs, deadline, label, look, per_gpu):
        if time.monotonic() > deadline:
            raise TimeoutError(f"0 of {len(new_jobs)} {label} are done; the same command continues")
        jobs.extend(new_jobs)
        return [fake_run(job) for job in new_jobs]

    monkeypatch.setattr(runner, "parallel", parallel)
    return jobs


def fake_run(job):
    """LASER is better by 0.5 and best at 4e-3, softmax at 1e-3; 6,000 steps are better by 0.1."""
    is_laser = "laser" in job["flags"]
    best = 4e-3 if is_laser else 1e-3
    value = 2.0 - 0.5 * is_laser + 100 * abs(job["lr"] - best) + 0.01 * job["seed"]
    if "6000" in job["flags"]:
        value -= 0.1
    return {
        "seed": job["seed"],
        "lr": job["lr"],
        "value": value,
        "curve": [[1, value]],
        "seconds": 1,
    }


def test_a_study(demo):
    record = language_models.run("demo", "results")
    swept = [(run["lr"], run["seed"]) for run in record["variants"]["other"]["sweep"]]
    extended = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]  # until the best rate is inside, for all variants
    assert swept == [(lr, harness.SWEEP_SEEDS[0]) for lr in extended]
    assert swept == [(run["lr"], run["seed"]) for run in record["variants"]["softmax"]["sweep"]]
    assert {run["lr"] for run in record["variants"]["other"]["runs"]} == {4e-3}
    assert {run["lr"] for run in record["variants"]["softmax"]["runs"]} == {1e-3}

    difference = record["differences"]["other"]
    assert difference["n"] == 5
    assert difference["mean"] == pytest.approx(-0.5)
    assert record["differences"]["shorter"]["n"] == 5
    assert record["differences"]["control"]["n"] == 3
    at_equal_seconds = record["differences_at_equal_seconds"]["other"]
    assert at_equal_seconds["baseline"] == "softmax, longer"
    assert at_equal_seconds["mean"] == pytest.approx(-0.4)
    assert record["variants"]["softmax, longer"]["sweep"] == []
    assert record["variants"]["softmax, longer"]["runs"][0]["lr"] == 1e-3
    n_runs = 4 * 5 + 4 * 5 + 3  # the sweep of four variants at five rates, seeds
    assert record["seconds"] == n_runs

    saved = json.loads(Path("results/demo-gpu.json").read_text())
    assert saved["differences"] == record["differences"]
    assert {"command", "commit", "hardware", "versions", "code"} <= saved.keys()
    assert "laser.py" in saved["code"]
    assert Path("results/demo-gpu.png").read_bytes()[:4] == b"\x89PNG"


def test_a_single_rate_is_not_swept(demo, monkeypatch):
    study = Study("Is it better?", DEMO.variants, rates=(3e-4,))
    monkeypatch.setitem(STUDIES, "demo", study)
    record = language_models.run("demo", "results")
    assert record["variants"]["other"]["sweep"] == []
    assert {job["lr"] for job in demo} == {3e-4}
    assert record["differences"]["other"]["n"] == 5
    assert record["differences_at_equal_seconds"] == {}


def test_seeds_of_the_runs_are_not_those_of_the_sweep(demo):
    language_models.run("demo", "results")
    seeds = {job["seed"] for job in demo}
    assert seeds == {harness.SWEEP_SEEDS[0], *language_models.SEEDS}
    assert not set(harness.SWEEP_SEEDS) & set(language_models.SEEDS)


def test_runs_of_different_texts_are_refused():
    variants = []
    for sha256 in ("a", "a", None):
        data = sha256 and {"tokens": 9, "sha256": sha256}
        variants.append({"runs": [{"seed": 1, "data": data}]})
    language_models.check_same_text(variants)
    variants.append({"runs": [{"seed": 1, "data": {"tokens": 9, "sha256": "b"}}]})
    with pytest.raises(ValueError, match="2 different texts"):
        language_models.check_same_text(variants)


def test_a_pause_keeps_the_stages_that_are_done(demo, monkeypatch, capsys):
    assert language_models.run("demo", "results", harness.deadline_after(1e-9)) is None
    assert "the same command continues" in capsys.readouterr().out

    def compare(study, flags, seeds, deadline):
        if "softmax, longer" in flags:
            raise TimeoutError("3 of 9 sweep are done")
        return real_compare(study, flags, seeds, deadline)

    real_compare = language_models.compare
    monkeypatch.setattr(language_models, "compare", compare)
    record = language_models.run("demo", "results", harness.deadline_after(1))
    assert record["variants"].keys() == {"softmax", "other"}
    assert Path("results/demo-gpu.json").exists()


def test_studies_need_a_gpu(monkeypatch):
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        language_models.run("laser", "results")


@pytest.mark.parametrize("name", STUDIES)
def test_variants_are_comparable(name):
    """The longer baseline is the baseline with more steps; equal_seconds names variants."""
    study = STUDIES[name]
    baseline = next(iter(study.variants.values()))
    for longer in study.longer_baseline.values():
        assert longer.startswith(f"{baseline} --steps")
    assert set(study.equal_seconds) <= set(study.variants)
