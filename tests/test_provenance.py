"""experiments/provenance.py: which code a result depends on, and when that has changed."""

import json

import pytest

from experiments import provenance


def test_source_files_follow_imports():
    paths = provenance.source_files("experiments.laser")
    names = [str(path.relative_to(provenance.REPOSITORY)) for path in paths]
    assert {"experiments/laser.py", "laser.py", "kernels/laser.py", "train.py"} <= set(names)
    assert "support/data.py" in names, "imported by train.py"
    assert "sample.py" not in names, "imported inside a function of train.py"
    assert "sonew.py" not in names

    paths = provenance.source_files("sonew", "torch", "no_such_module")
    names = [path.name for path in paths]
    assert set(names) == {"sonew.py", "sonew_fused.py", "sonew_hopper.py"}, "inside functions, too"


@pytest.mark.parametrize(
    "changed, is_same",
    [
        ('def f(x):\n    """Other."""\n    return x + 1  # one more\n', True),
        ('def f(\n    x,\n):\n    """D"""\n\n    return (x + 1)\n', True),
        ('def f(x):\n    """D"""\n    return x + 2\n', False),
        ('def f(x):\n    """D"""\n    return x - 1\n', False),
        ('def f(y):\n    """D"""\n    return y + 1\n', False),
        ('def f(x):\n    """D"""\n    return x + "1"\n', False),
    ],
)
def test_code_hash(tmp_path, changed, is_same):
    before = tmp_path / "before.py"
    after = tmp_path / "after.py"
    before.write_text('def f(x):\n    """D"""\n    return x + 1\n')
    after.write_text(changed)
    assert (provenance.code_hash(before) == provenance.code_hash(after)) is is_same


def test_files_that_save_and_report_are_left_out():
    hashes = provenance.code_hashes("experiments.language_models")
    assert {"train.py", "support/data.py", "experiments/harness.py"} <= hashes.keys()
    assert not provenance.WITHOUT_RESULTS & hashes.keys()
    for path in provenance.WITHOUT_RESULTS:
        assert (provenance.REPOSITORY / path).is_file()


def test_plugin_modules():
    flags = "--model small --attn laser,laser,simplicial:w1=4:w2=2 --optim sonew:band=4 --lr 1"
    assert provenance.plugin_modules(flags) == ["laser", "laser", "simplicial", "sonew"]


def test_the_time_limit_is_no_part_of_the_command(monkeypatch):
    flags = ["--full", "--minutes", "0.5", "--out", "a b"]
    monkeypatch.setattr(provenance.sys, "argv", [str(provenance.REPOSITORY / "laser.py"), *flags])
    command = "python laser.py --full --out 'a b'"
    assert provenance.provenance()["command"] == command
    flags[1:3] = ["--minutes=0.5"]
    monkeypatch.setattr(provenance.sys, "argv", [str(provenance.REPOSITORY / "laser.py"), *flags])
    assert provenance.provenance()["command"] == command


def test_folders_of_this_machine_are_no_part_of_the_command(monkeypatch):
    flags = ["--init", "/a b/model", "--questions=/c", "--out", "d/e"]
    monkeypatch.setattr(provenance.sys, "argv", [str(provenance.REPOSITORY / "laser.py"), *flags])
    command = "python laser.py --init FOLDER --questions=FOLDER --out d/e"
    assert provenance.provenance()["command"] == command


def test_save_json_records_the_code_of_the_plugins(tmp_path):
    record = {"seconds": 1.0, "variants": {"LASER": {"settings": "--attn laser", "runs": []}}}
    provenance.save_json(tmp_path / "a.json", record, "train")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert {"command", "commit", "hardware", "versions", "seconds"} <= set(saved)
    assert {"train.py", "laser.py", "kernels/laser.py"} <= set(saved["code"])
    assert "simplicial.py" not in saved["code"]
