"""experiments/language_models.py: sweeps, stages, differences and files, without training."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from experiments import harness, language_models, runner
from experiments.language_models import STUDIES, Study
from support import plugins
from tests.common import parse_flags

DEMO = Study(
    "Is it better?",
    {"softmax": "--attn softmax", "other": "--attn laser"},
    {"softmax, longer": "--attn softmax --steps 6000"},
    {"other": "softmax, longer"},
    {"shorter": "--attn laser --steps 2000"},
    {"control": "--attn laser --clip 2"},
    {"shorter": "other"},
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


def test_a_study(demo, capsys):
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
    assert record["variants"]["shorter"]["sweep"] == []
    assert {run["lr"] for run in record["variants"]["shorter"]["runs"]} == {4e-3}
    n_runs = 3 * 5 + 4 * 5 + 3  # the sweep of three variants at five rates, seeds
    assert record["seconds"] == n_runs

    settings = record["variants"]["softmax, longer"]["settings"]
    assert settings == f"{language_models.FLAGS} --attn softmax --steps 6000", "the last one counts"
    printed = capsys.readouterr().out
    assert "Is it better?" in printed
    assert "other less softmax, longer: -0.4000 +- " in printed

    saved = json.loads(Path("results/demo-gpu.json").read_text())
    assert saved["differences"] == record["differences"]
    assert {"command", "commit", "hardware", "versions", "code"} <= saved.keys()
    assert "laser.py" in saved["code"]
    assert Path("results/demo-gpu.png").read_bytes()[:4] == b"\x89PNG"


def test_each_control_is_written_when_it_is_done(demo, monkeypatch):
    written = []
    monkeypatch.setattr(
        language_models,
        "save_json",
        lambda path, record, source: written.append(list(record["differences"])),
    )
    controls = {"first": "--attn laser --clip 2", "second": "--attn laser --clip 3"}
    monkeypatch.setitem(STUDIES, "demo", DEMO._replace(controls=controls))
    language_models.run("demo", ".")
    names = ["other", "softmax, longer", "shorter", "first", "second"]
    assert written == [names[:n] for n in range(1, 6)]


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


def test_a_study_whose_runs_read_different_texts_is_refused(demo, monkeypatch):
    run_all = runner.parallel

    def parallel(*args, **options):
        runs = run_all(*args, **options)
        return [{**run, "data": {"tokens": 9, "sha256": str(run["seed"])}} for run in runs]

    monkeypatch.setattr(runner, "parallel", parallel)
    with pytest.raises(ValueError, match="5 different texts"):
        language_models.run("demo", "results")
    assert not Path("results").exists()


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
    with pytest.raises(ValueError, match="needs a GPU.* run python laser.py, .* without --full"):
        language_models.run("laser", "results")


def all_variants(study):
    """Return the flags of each variant, of all stages."""
    return {**study.variants, **study.longer_baselines, **study.later, **study.controls}


@pytest.mark.parametrize("name", STUDIES)
def test_variants_are_comparable(name):
    """A longer baseline is the baseline with more steps; equal_seconds names variants.

    A variant at the learning rate of another one is that one with other steps.
    """
    study = STUDIES[name]
    baseline = next(iter(study.variants.values()))
    for longer in study.longer_baselines.values():
        assert longer.startswith(f"{baseline} --steps")
    assert set(study.equal_seconds) <= set(study.variants)
    assert set(study.equal_seconds.values()) == set(study.longer_baselines)
    for variant, other in study.same_rate.items():
        assert variant.startswith(f"{other}, ")
        assert all_variants(study)[variant].startswith(f"{study.variants[other]} --steps")


def last_value(flags, name):
    """Return the number after a flag; of several, the last one counts."""
    return int(re.findall(rf"{name} (\d+)", flags)[-1])


@pytest.mark.parametrize("name", STUDIES)
def test_steps_are_as_many_as_the_names_say(name):
    """And all variants are evaluated five times, the last time at the end."""
    study = STUDIES[name]
    for variant, more in all_variants(study).items():
        flags = f"{study.flags} {more}"
        steps = last_value(flags, "--steps")
        assert steps == 5 * last_value(flags, "--eval-every"), variant
        percent = re.search(r"(\d+)% (more|fewer) steps", variant)
        if percent:
            sign = 1 if percent[2] == "more" else -1
            change = steps / last_value(study.flags, "--steps") - 1
            assert change == pytest.approx(sign * int(percent[1]) / 100), variant


@pytest.mark.parametrize("name", STUDIES)
def test_options_are_what_the_names_say(name):
    """In a name, a number is the value of the option before it; other words are values, too."""
    study = STUDIES[name]
    for variant, more in all_variants(study).items():
        model, run, _ = parse_flags(f"{study.flags} {more}")
        options = plugins.resolve(run.optim, *train.PLUGINS["optim"])[1]
        for spec in model.attn.split(","):
            options |= plugins.resolve(spec, *train.PLUGINS["attn"])[1]
        for word, number in re.findall(r"(\w+) ([\d.]+)", variant):
            option = "tau" if word == "temperature" else word
            assert options[option] == float(number), variant
        for word in ("flat", "shuffled", "muon"):
            assert (word in variant.lower()) == (word in options.values()), variant
        assert ("GELU" in variant) == options.get("gelu", False), variant


def count_parameters(flags):
    """Return the number of parameters of a model of bytes with these flags."""
    shape = dict(train.PRESETS[re.search(r"--model (\S+)", flags)[1]])
    for name in ("n_layer", "n_hidden"):
        flag = "--" + name.replace("_", "-")
        if flag in flags:
            shape[name] = last_value(flags, flag)
    fields = train.GPTConfig.__dataclass_fields__
    shape = {name: value for name, value in shape.items() if name in fields}
    attn = re.search(r"--attn (\S+)", flags)[1]
    with torch.device("meta"):
        model = train.GPT(train.GPTConfig(**shape, attn=attn, vocab_size=256))
    return sum(p.numel() for p in model.parameters())


def test_sizes_are_what_the_comments_say():
    """A wider MLP has the parameters of second keys and values."""
    large = count_parameters(f"{language_models.FLAGS_124M} --attn softmax")
    assert large == pytest.approx(124e6, rel=5e-3)
    flags = language_models.FLAGS
    plain = count_parameters(f"{flags} --attn softmax")
    assert plain == pytest.approx(26e6, rel=0.02)
    added = count_parameters(f"{flags} {language_models.SIMPLICIAL}") - plain
    wider = count_parameters(f"{flags} --attn softmax {language_models.WIDER}") - plain
    assert added > 1e6
    assert wider == pytest.approx(added, rel=0.04)


def test_windows_of_controls_are_those_of_the_variant():
    """The product has both windows of 2-simplicial attention, one window alone has the longer."""
    simplicial = language_models.SIMPLICIAL
    same_windows = simplicial.replace("simplicial", "experiments.product")
    assert same_windows == language_models.PRODUCT
    first_window = last_value(simplicial.replace("=", " "), "w1")
    assert language_models.WINDOW.endswith(f",experiments.controls:window={first_window}")


def test_a_look_trains_nothing_and_runs_know_the_deadline(demo, monkeypatch):
    calls = []

    def run_variant(job, look_only=False, deadline=float("inf")):
        calls.append((look_only, deadline))
        return fake_run(job)

    def parallel(function, jobs, deadline, label, look, per_gpu):
        for job in jobs[:1]:
            look(job)
            function(job)
        assert calls[-2:] == [(True, float("inf")), (False, deadline)]
        assert per_gpu == 3
        return [fake_run(job) for job in jobs]

    monkeypatch.setattr(language_models, "run_variant", run_variant)
    monkeypatch.setattr(runner, "parallel", parallel)
    monkeypatch.setitem(STUDIES, "demo", DEMO._replace(per_gpu=3))
    assert language_models.run("demo", "results", deadline=time.monotonic() + 60)
    assert calls[-1][1] < float("inf")


def test_a_variant_is_trained_with_its_flags(monkeypatch):
    calls = []
    rows = [{"step": 600.0, "loss": 9.0, "val_loss": 2.5}, {"step": 1200.0, "val_loss": 2.0}]
    result = {"loss": 9.0, "val_loss": 2.0, "val_bpb": 3.0, "seconds": 7.5, "history": rows}
    result["data"] = {"tokens": 9, "sha256": "a"}

    def run_train(*arguments):
        calls.append(arguments)
        return result

    monkeypatch.setattr(runner, "run_train", run_train)
    job = {"variant": "LASER", "flags": "--attn laser", "lr": 1.25e-3, "seed": 3}
    run = language_models.run_variant(job, True, 99.0)
    assert calls == [("--attn laser --lr 0.00125 --seed 3", runner.CACHE, True, 99.0)]
    expected = {"seed": 3, "lr": 1.25e-3, "value": 2.0, "curve": [[600, 2.5], [1200, 2.0]]}
    assert run == {**expected, "seconds": 7.5, "tokens_per_s": None, "data": result["data"]}
    del result["data"]
    run = language_models.run_variant(job)
    assert run["data"] is None, "a run of an older version"
    result = None  # nothing is cached
    assert language_models.run_variant(job, look_only=True) is None


def test_curves_are_differences_at_equal_seeds_and_steps():
    """A control has fewer seeds; a longer baseline is evaluated at other steps."""

    def runs(seeds, last_step, better):
        runs = []
        for seed in range(1, seeds + 1):
            curve = [[last_step // 2, 3.0 + seed**2], [last_step, 2.0 + seed**2 - better]]
            runs.append({"seed": seed, "value": curve[-1][1], "curve": curve})
        return {"runs": runs}

    variants = {"softmax": runs(5, 10, 0.0), "LASER": runs(3, 10, 0.5), "longer": runs(5, 12, 0.1)}
    difference = {"mean": -0.5, "half_width_95": 0.1, "n": 3}
    record = {"baseline": "softmax", "metric": "loss", "variants": variants}
    record["differences"] = {"LASER": difference, "longer": difference}
    curves, _ = language_models.plot(record).axes
    (zero_line,) = [line for line in curves.lines if len(set(line.get_ydata())) == 1]
    (curve,) = [line for line in curves.lines if line is not zero_line]
    assert list(curve.get_xdata()) == [5, 10]
    assert np.allclose(curve.get_ydata(), [0.0, -0.5])
