"""experiments/report.py: tables from results, and what is out of date."""

import json

import pytest

from experiments import findings, provenance, report
from experiments.findings import IDEAS, Finding, Idea
from experiments.language_models import STUDIES
from tests.common import refused

STUDY = {
    "command": "python laser.py",
    "commit": "0" * 40,
    "source": "experiments/laser.py",
    "code": {},
    "hardware": "2 CPU cores",
    "versions": {"torch": "2.13.0"},
    "seconds": 61.4,
    "question": "Is it better?",
    "metric": "loss",
    "baseline": "softmax",
    "variants": {
        "softmax": {"runs": [{"seed": 1, "value": 2.0}, {"seed": 2, "value": 3.0}]},
        "LASER": {"runs": [{"seed": 1, "value": 1.0}, {"seed": 2, "value": 2.5}]},
    },
    "differences": {"LASER": {"mean": -0.75, "half_width_95": 0.25, "n": 2}},
}


def kernel(name, T, forward_ms, backward_ms, **more):
    times = {"forward_ms": forward_ms, "backward_ms": backward_ms}
    return {"shape": [T, 16], "name": name, **times, **more}


KERNELS = {
    "command": "python experiments/bench_kernels.py",
    "commit": "0" * 40,
    "code": {},
    "hardware": "1 x NVIDIA H200",
    "versions": {"torch": "2.11.0"},
    "seconds": 100.0,
    "kernels": {
        "laser": [
            kernel("softmax", 4, 0.1, 0.1),
            kernel("paper's form", 4, 1.0, 3.0),
            kernel("paper's form", 8, 0.1, 0.1),
            kernel("ours", 4, 1.0, 1.0, of_floor=0.5),
            kernel("ours", 8, 3.0, 3.0, of_floor=0.25),
        ]
    },
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with a result that depends on laser.py."""
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    finding = Finding("laser-cpu", "loss", "LASER", kind="percent")
    missing = finding._replace(study="laser-gpu", label="speed")
    control = finding._replace(label="control")
    findings = [finding, missing]
    idea = Idea(
        "laser", "L", "1", claim="less", verdict="yes", findings=findings, controls=[control]
    )
    monkeypatch.setattr(report, "IDEAS", [idea])
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "laser.py").write_text("x = 1\n" * 14)
    (tmp_path / "results").mkdir()
    (tmp_path / "laser.py").write_text("x = 1")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    code = {"laser.py": provenance.code_hash(tmp_path / "laser.py")}
    save(tmp_path, "laser-cpu", {**STUDY, "code": code})
    return tmp_path


def save(folder, name, record):
    (folder / f"results/{name}.json").write_text(json.dumps(record))


def line_with(text, part):
    """The first line of a text that has this part."""
    for line in text.splitlines():
        if part in line:
            return line


def test_a_bar_does_not_end_a_cell():
    assert report.table(["|Z|"], [["1"]]).splitlines()[0] == r"| \|Z\| |"


def test_tables(repository):
    save(repository, "kernels", KERNELS)
    report.main([])
    text = (repository / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text

    row = line_with(text, "less")
    assert row.startswith("| [L](https://arxiv.org/abs/1)<br>[laser.py](laser.py) (0 lines)<br>")
    assert "[kernels/laser.py](kernels/laser.py) (10 lines) | less | yes | loss: -30.0 ±" in row
    assert row.endswith("softmax<br>speed: not measured yet<br>`python laser.py`, 1 min |")
    assert "step of the kernels (1 x NVIDIA H200, torch 2.11.0). The floor is the time" in text
    assert "\n\n| kernel | shape |" in text
    assert "| laser | B 4, H 16 | paper's form: 4.000 | 2.000 | 0.50 | 50% |" in text
    assert "| laser | B 8, H 16 |" not in text, "one shape of each kernel is enough"

    text = (repository / "results/README.md").read_text()
    found = "- loss: -30.0 ± 10.0% against softmax\n- speed: not measured yet\n- control: -30.0 ±"
    assert f"## L\n\n{found}" in text
    assert "Is it better?" in text
    assert "Metric: loss." in text
    assert "- explained in: [experiments/laser.py](../experiments/laser.py)\n" in text
    assert "- command: `python laser.py`\n" in text
    row = line_with(text, "| laser | B 4, H 16")
    assert row == "| laser | B 4, H 16 | paper's form: 4.000 | 2.000 | 0.50 | 50% |"
    row = line_with(text, "resolved |")
    assert row == "| softmax 2.5 | LASER 1.75 | -0.75 ± 0.25 (n = 2) | resolved |"


def test_ours_and_the_best_peer():
    """On Hopper, the kernel in plain Triton is not our fastest; eager PyTorch is no peer."""
    rows = [
        kernel("eager", 4, 0.1, 0.1),
        kernel("slow peer", 4, 9.0, 9.0),
        kernel("fast peer", 4, 2.0, 2.0),
        kernel("ours", 4, 1.0, 1.0, of_floor=0.5),
        kernel("ours, plain Triton", 4, 3.0, 3.0, of_floor=0.2),
        kernel("ours, float16", 4, 0.5, 0.5, of_floor=0.75),
        kernel("ours", 8, 3.0, 3.0, of_floor=0.25),
    ]
    assert report.kernel_rows("simplicial", rows) == [
        ["simplicial", "B 4, H 16", "fast peer: 4.000", "2.000", "0.50", "50%"],
        ["simplicial, ours, float16", "B 4, H 16", "fast peer: 4.000", "1.000", "0.25", "75%"],
        ["simplicial", "B 8, H 16", "none", "6.000", "", "25%"],
    ]
    steps = [{"name": "band 1", "shape": [9], "step_ms": 2.0, "of_floor": 1.0}]
    steps += [{"name": "AdamW", "shape": [9], "step_ms": 4.0}]
    (row,) = report.kernel_rows("sonew", steps)
    assert row == ["sonew, band 1", "matrices 9", "AdamW: 4.000", "2.000", "0.50", "100%"]


def test_a_wide_interval_is_not_resolved():
    (row,) = report.study_rows(STUDY)
    assert row[-1] == "resolved"
    wide = {"LASER": {"mean": -0.75, "half_width_95": 0.8, "n": 2}}
    (row,) = report.study_rows({**STUDY, "differences": wide})
    assert row[-1] == "not resolved"


def test_each_task_has_its_own_baseline():
    variants = {}
    for task, value in (("easy", 1.0), ("hard", 5.0)):
        for variant in ("softmax", "LASER"):
            variants[f"{task}: {variant}"] = {"runs": [{"seed": 1, "value": value}]}
    differences = {"hard: LASER": STUDY["differences"]["LASER"]}
    record = {**STUDY, "variants": variants, "differences": differences}
    (row,) = report.study_rows(record)
    assert row[:2] == ["hard: softmax 5", "hard: LASER 5"]


def test_rows_at_equal_seconds():
    variants = {**STUDY["variants"], "softmax, longer": {"runs": [{"seed": 1, "value": 2.25}]}}
    difference = {"mean": -0.5, "half_width_95": 0.1, "n": 2, "baseline": "softmax, longer"}
    at_equal_seconds = {"LASER": difference}
    record = {**STUDY, "variants": variants, "differences_at_equal_seconds": at_equal_seconds}
    rows = report.study_rows(record)
    assert [row[:2] for row in rows] == [
        ["softmax 2.5", "LASER 1.75"],
        ["softmax, longer 2.25", "LASER 1.75"],
    ]
    record = {**STUDY, "variants": variants, "differences_to_band_1": at_equal_seconds}
    assert report.study_rows(record)[1][:2] == ["softmax, longer 2.25", "LASER 1.75"]


def test_outdated_results_are_marked(repository):
    assert "older code" not in report.all_tables({"laser-cpu": STUDY})
    old = {**STUDY, "code": {"deleted.py": "0"}}
    assert "against softmax, older code<br>" in report.all_tables({"laser-cpu": old})
    steps = {**KERNELS, "shapes": {}}
    assert "torch 2.11.0):" in report.all_tables({"bench_train": steps})
    steps["code"] = {"deleted.py": "0"}
    assert "torch 2.11.0, older code):" in report.all_tables({"bench_train": steps})


def test_finding_text():
    finding = Finding("laser-cpu", "loss", "LASER")
    text = "loss: 1.75; -0.75 ± 0.25 against softmax"
    assert report.finding_text(STUDY, finding) == text
    narrow = {"LASER": {"mean": -0.0061, "half_width_95": 0.0057, "n": 8}}
    text = "loss: 1.75; -0.0061 ± 0.0057 against softmax"
    assert report.finding_text({**STUDY, "differences": narrow}, finding) == text
    finding = finding._replace(kind="percent")
    text = "loss: -30.0 ± 10.0% against softmax"
    assert report.finding_text(STUDY, finding) == text
    finding = finding._replace(kind="log10")
    text = "loss: x 0.178 (0.1 to 0.316) against softmax"
    assert report.finding_text(STUDY, finding) == text
    finding = finding._replace(kind="rounding")
    text = "loss: 56.2; 316 with softmax"
    assert report.finding_text(STUDY, finding) == text


def test_a_finding_against_other_baselines():
    """The differences are computed from the runs, paired by seed."""
    runs = [{"seed": 1, "value": 1.5}, {"seed": 2, "value": 3.5}]
    record = {**STUDY, "variants": {**STUDY["variants"], "task: other": {"runs": runs}}}
    finding = Finding("laser-cpu", "loss", "LASER", baselines=("task: other", "softmax"))
    text = report.finding_text(record, finding)
    half_width = 12.706 * 0.25  # of the differences -0.5 and -1.0, and of -1.0 and -0.5
    change = f"-0.75 ± {half_width:.2f} (not resolved, n = 2)"
    assert text == f"loss: 1.75; {change} against other; {change} against softmax"


def test_a_finding_about_accuracy():
    variants = {}
    for name, accuracies in (("LASER", (0.75, 0.5)), ("softmax", (0.5, 0.25))):
        runs = [{"seed": i, "value": 9.0, "accuracy": a} for i, a in enumerate(accuracies)]
        variants[name] = {"runs": runs}
    finding = Finding("laser-cpu", "right", "LASER", baselines=("softmax",), key="accuracy")
    text = "right: 0.625; +0.25 ± 0.00 against softmax"
    assert report.finding_text({**STUDY, "variants": variants}, finding) == text


def test_do_the_gains_add_up():
    values = {"base": (2.0, 3.0), "LASER": (1.5, 2.25), "SONew": (1.0, 2.0)}
    values["LASER + SONew"] = (0.75, 1.75)
    values["all three"] = (0.5, 1.0)
    variants = {}
    for name, (first, second) in values.items():
        variants[name] = {"runs": [{"seed": 1, "value": first}, {"seed": 2, "value": second}]}
    record = {"baseline": "base", "variants": variants, "differences": {}}
    added = findings.interaction(record, "LASER", "SONew")
    # the sum of the gains leads to 0.5 and 1.25
    assert added["mean"] == pytest.approx((0.25 + 0.5) / 2)
    assert added["half_width_95"] == pytest.approx(12.706 * 0.125)
    percent = 100 / 2.5  # of the baseline's mean
    text = findings.together_text(record)
    change = f"{0.375 * percent:+.1f} ± {12.706 * 0.125 * percent:.1f}%"
    assert f"gains added up: {change} (not resolved, n = 2)." in text
    assert f"All three against LASER + SONew: {-0.5 * percent:+.1f} ± " in text


def test_the_study_of_all_ideas_has_their_losses(repository):
    """Until the study of an idea itself is there."""
    row = report.ideas_table({"all-gpu": STUDY})
    assert "| loss: not measured yet<br>speed: -30.0 ± 10.0% against softmax" in row
    slower = {**STUDY["differences"]["LASER"], "mean": 0.75}
    row = report.ideas_table(
        {"all-gpu": STUDY, "laser-gpu": {**STUDY, "differences": {"LASER": slower}}}
    )
    assert "speed: +30.0 ± 10.0% against softmax" in row
    row = report.ideas_table({"all-gpu": {**STUDY, "differences": {}}})
    assert row.endswith("<br>speed: not measured yet |")


def test_training_steps():
    """A column per variant; two GPUs have a weak scaling."""
    one = {
        "softmax+adamw": {"ms_per_step": 20.0, "ratio": 1.0},
        "all": {"ms_per_step": 25.0, "ratio": 1.25},
    }
    two = {"softmax+adamw, 2 GPUs, DDP": {"ms_per_step": 21.0, "weak_scaling": 0.95}}
    text = report.steps_table({"shapes": {"small": one, "gpt2": two}})
    header, _, small, gpt2 = text.splitlines()
    assert header == "| model | softmax + adamw | all | softmax + adamw, 2 GPUs, DDP |"
    assert small == "| small | 20.0 ms | 25.0 ms, x 1.250 |  |"
    assert gpt2 == "| gpt2 |  |  | 21.0 ms, weak scaling 0.950 |"


def test_the_ideas_together(repository):
    difference = {"mean": -0.5, "half_width_95": 0.25, "n": 2, "baseline": "softmax, longer"}
    record = {**STUDY, "differences_at_equal_seconds": {"LASER": difference}}
    record["differences"] = {**STUDY["differences"], "softmax, longer": difference}
    text = report.all_tables({"all-gpu": record})
    first = "Loss of a GPT on bytes against softmax: LASER -30.0 ± 10.0%."
    second = "At about equal time: LASER -20.0 ± 10.0% against softmax, longer."
    assert text.startswith(f"{first} {second}\n\n| idea |")


def test_minutes_of_a_study():
    assert report.minutes_of([STUDY]) == "1 min"
    on_gpus = {**STUDY, "hardware": "2 x NVIDIA H200"}
    assert report.minutes_of([on_gpus, on_gpus]) == "2 min of runs (H200)"


def test_times_of_a_command_with_two_studies_add_up(repository):
    save(repository, "laser-gpu", {**STUDY, "seconds": 119.0})
    report.main([])
    assert "<br>`python laser.py`, 3 min |" in (repository / "README.md").read_text()


@pytest.mark.parametrize("idea", IDEAS, ids=lambda idea: idea.file)
def test_findings_are_in_the_results(idea):
    records = report.load_results()
    for finding in idea.findings + idea.controls:
        assert finding.study.startswith(idea.file.partition("_")[0])  # ttt_needles is another study
        if finding.study in records:
            study = STUDIES.get(finding.study.removesuffix("-gpu"))
            to_come = study.later if study else {}  # a stage that has not been run
            assert finding.variant in {*records[finding.study]["differences"], *to_come}
            assert set(finding.baselines) <= set(records[finding.study]["variants"])


def test_check_finds_what_is_out_of_date(repository):
    before = (repository / "README.md").read_text()
    refused(["--check"], "README.md", "results/README.md", main=report.main)
    assert (repository / "README.md").read_text() == before
    written = ["README.md", "results/README.md"]
    assert report.main([]) == {"stale": [], "changed": written}
    assert report.main(["--check"]) == {"stale": [], "changed": []}

    (repository / "laser.py").write_text('"""Docstring"""\n\nx = (1)  # comment\n')
    report.main(["--check"])
    (repository / "laser.py").write_text("x = 2")
    refused(["--check"], "results/laser-cpu.json", main=report.main)
    assert report.main([])["stale"] == ["results/laser-cpu.json"]
    refused(["--check"], "out of date: results/laser-cpu.json", main=report.main)
    assert report.changed_files({**STUDY, "code": {"deleted.py": "0"}}) == ["deleted.py"]
    assert report.changed_files({**STUDY, "code": {"support/cli.py": "0"}}) == []


def test_a_readme_without_markers_is_refused(repository):
    text = f"before\n{report.BEGIN}\nold\n"
    (repository / "README.md").write_text(text)
    refused([], f"lacks the markers {report.BEGIN} and {report.END}", main=report.main)
    assert (repository / "README.md").read_text() == text


@pytest.mark.parametrize("commit", [None, "0" * 40 + "-dirty"])
def test_an_unknown_commit_is_out_of_date(commit):
    assert report.changed_files({**STUDY, "commit": commit})
    without_code = {name: value for name, value in STUDY.items() if name != "code"}
    assert report.changed_files(without_code) == [f"unknown code ({'0' * 40})"]
    assert report.changed_files(STUDY) == []


def test_the_readme_has_the_tables_of_the_results():
    records = report.load_results()
    for path, text in report.outputs(records).items():
        assert path.read_text() == text, f"{path.name}: run python experiments/report.py"
