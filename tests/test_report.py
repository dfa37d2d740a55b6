"""experiments/report.py: tables from results, and what is out of date."""

import json

import pytest

from experiments import provenance, report
from tests.common import refused

STUDY = {
    "command": "python laser.py",
    "commit": "0" * 40,
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
        ]
    },
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with a result that depends on laser.py."""
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    finding = report.Finding("laser-cpu", "LASER", "loss", in_percent=True)
    monkeypatch.setattr(report, "IDEAS", [report.Idea("L", "1", "less", "laser")])
    monkeypatch.setattr(report, "FINDINGS", [finding])
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
    assert "old" not in text

    row = line_with(text, "less")
    assert "| [L](https://arxiv.org/abs/1) | less | loss -30.0 ± 10.0% |" in row
    assert "(0 lines), [kernels/laser.py](kernels/laser.py) (10 lines) |" in row
    assert "| `python laser.py`, 1 min |" in row
    row = line_with(text, "| laser | 4 x 16")
    assert row == "| laser | 4 x 16 | paper's form: 4.000 | 2.000 | 0.50 | 50% |"

    text = (repository / "results/README.md").read_text()
    assert "Is it better?" in text
    row = line_with(text, "resolved")
    assert "| softmax 2.5 | LASER 1.75 | -0.75 ± 0.25 (n = 2) | resolved |" in row
    assert "`python laser.py` | 61 s" in row


def test_a_wide_interval_is_not_resolved(repository):
    column = 4
    (row,) = report.study_rows("laser-cpu", STUDY)
    assert row[column] == "resolved"
    wide = {"LASER": {"mean": -0.75, "half_width_95": 0.8, "n": 2}}
    (row,) = report.study_rows("laser-cpu", {**STUDY, "differences": wide})
    assert row[column] == "not resolved"


def test_each_task_has_its_own_baseline():
    variants = {}
    for task, value in (("easy", 1.0), ("hard", 5.0)):
        for variant in ("softmax", "LASER"):
            variants[f"{task}: {variant}"] = {"runs": [{"seed": 1, "value": value}]}
    differences = {"hard: LASER": STUDY["differences"]["LASER"]}
    record = {**STUDY, "variants": variants, "differences": differences}
    (row,) = report.study_rows("laser-cpu", record)
    assert row[1:3] == ["hard: softmax 5", "hard: LASER 5"]


def test_rows_at_equal_seconds():
    variants = {**STUDY["variants"], "softmax, longer": {"runs": [{"seed": 1, "value": 2.25}]}}
    difference = {"mean": -0.5, "half_width_95": 0.1, "n": 2, "baseline": "softmax, longer"}
    at_equal_seconds = {"LASER": difference}
    record = {**STUDY, "variants": variants, "differences_at_equal_seconds": at_equal_seconds}
    rows = report.study_rows("laser-gpu", record)
    assert [row[1:3] for row in rows] == [
        ["softmax 2.5", "LASER 1.75"],
        ["softmax, longer 2.25", "LASER 1.75"],
    ]


def test_outdated_results_are_named():
    old = {**STUDY, "code": {"deleted.py": "0"}}
    text = report.all_tables({"old": old, "new": STUDY})
    assert text.endswith("Made with older code, to be run again: old.")
    text = report.all_tables({"new": STUDY})
    assert "to be run again" not in text


def test_finding_text():
    finding = report.Finding("laser-cpu", "LASER", "loss")
    assert report.finding_text(STUDY, finding) == "loss 2.5 → 1.75 (± 0.25)"
    finding = finding._replace(in_percent=True)
    assert report.finding_text(STUDY, finding) == "loss -30.0 ± 10.0%"


def test_findings_are_in_the_results():
    records = report.load_results()
    files = [idea.file for idea in report.IDEAS]
    for finding in report.FINDINGS:
        assert finding.study.rpartition("-")[0] in files
        if finding.study in records:
            assert finding.variant in records[finding.study]["differences"]


def test_check_finds_what_is_out_of_date(repository):
    refused(["--check"], "README.md", "results/README.md", main=report.main)
    report.main([])
    report.main(["--check"])

    (repository / "laser.py").write_text('"""Docstring"""\n\nx = (1)  # comment\n')
    report.main(["--check"])
    (repository / "laser.py").write_text("x = 2")
    refused(["--check"], "results/laser-cpu.json", main=report.main)
    assert report.changed_files({**STUDY, "code": {"deleted.py": "0"}}) == ["deleted.py"]


@pytest.mark.parametrize("commit", [None, "0" * 40 + "-dirty"])
def test_an_unknown_commit_is_out_of_date(commit):
    assert report.changed_files({**STUDY, "commit": commit})
    assert report.changed_files(STUDY) == []


def test_the_readme_has_the_tables_of_the_results():
    records = report.load_results()
    for path, text in report.outputs(records).items():
        assert path.read_text() == text, f"{path.name}: run python experiments/report.py"
