"""support/runlog.py: a log that is only ever appended to, repaired when a run is resumed."""

import csv
import errno
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import checkpoint, runlog
from support.runlog import RunLog

HEADER = "step,lr,loss,grad_norm,val_loss,val_bpb"
SETTINGS = {"model": {"n_layer": 1}, "run": {"steps": 100}}
TEXT = SimpleNamespace(bits_per_byte=2.0, tokenizer_state={"name": "byte"}, fingerprint={})
MODEL = torch.nn.Linear(2, 2)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: None)


def open_log(step=0, folder="."):
    return RunLog(Path(folder), step, SETTINGS, TEXT, {"device": "none"})


def row(step, **more):
    return {"step": step, "lr": 0.5, "loss": 1 / step, "grad_norm": 2.0, **more}


def lines():
    return Path("log.csv").read_text().split("\n")


def test_rows_are_on_disk_at_once_and_in_full():
    log = open_log()
    assert lines() == [HEADER, ""]
    log.append(row(1))
    assert lines() == [HEADER, "1,0.5,1.0,2.0,,", ""]
    log.append(row(2, val_loss=3.25, val_bpb=6.5))
    log.append(row(3))
    assert lines()[2:] == ["2,0.5,0.5,2.0,3.25,6.5", "3,0.5,0.3333333333333333,2.0,,", ""]
    assert float(lines()[3].split(",")[2]) == 1 / 3, "every digit"


def test_the_settings_are_on_disk_from_the_start(monkeypatch):
    """So that a run that is under way or was killed says what it is."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--n-layer", "1"])
    open_log()
    expected = {"command": "train.py --n-layer 1", **SETTINGS, "machine": {"device": "none"}}
    assert json.loads(Path("config.json").read_text()) == expected


def test_the_log_is_appended_to_and_not_rewritten(monkeypatch):
    log = open_log()
    monkeypatch.setattr(runlog, "atomic_write", None)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    inode = os.stat("log.csv").st_ino
    sizes = []
    for step in range(1, 51):
        log.append(row(step))
        log.save(MODEL, None, step)
        sizes.append(os.path.getsize("log.csv"))
    assert os.stat("log.csv").st_ino == inode
    assert synced == sizes, "each save has the log on the disk up to its step"


def test_the_log_is_on_the_disk_before_the_checkpoint(monkeypatch):
    log = open_log()
    events = []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("log"))
    monkeypatch.setattr(checkpoint, "save", lambda *_, **more: events.append(more))
    log.save(MODEL, "optimizer", 7)
    saved = {"step": 7, "config": SETTINGS, "tokenizer": {"name": "byte"}, "data": {}}
    assert events == ["log", saved]


def test_rows_past_the_checkpoint_are_dropped():
    log = open_log()
    for step in range(1, 10):
        log.append(row(step))
    log.finish({"step": 9})
    kept = lines()[:6]
    again = open_log(step=5)
    assert lines() == [*kept, ""]
    again.append(row(6))
    assert lines() == [*kept, "6,0.5,0.16666666666666666,2.0,,", ""]
    open_log(step=0)
    assert lines() == [HEADER, ""]


GOOD = ["1,0.5,1.0,2.0,,", "2,0.5,0.5,2.0,3.25,6.5", "3,0.5,0.25,2.0,,"]


@pytest.mark.parametrize(
    "damaged",
    [
        "4,0.5,0.2",
        "4,0.5,0.25,2.0,,,",
        "4,0.5,0.25,2.0,7.0,7.0,7.0",
        "4,0.5,0.25,2.0,7.0,",
        "4,0.5,0.25,2.0,,7.0",
        "4,0.5,,2.0,,",
        ",0.5,0.25,2.0,,",
        "4.0,0.5,0.25,2.0,,",
        "-4,0.5,0.25,2.0,,",
        "0,0.5,0.25,2.0,,",
        "2,0.5,0.25,2.0,,",
        "3,0.5,0.25,2.0,,",
        "999,0.5,0.25,2.0,,",
        "5,0.5,0.25,2.0,,",
        "4,0.5,x,2.0,,",
        "4,x,0.25,2.0,,",
        "4,0.5,1e308,2.0,,",
        "4,0.5,-1e308,2.0,,",
        "4,0.5,nan,2.0,,",
        "4,0.5,0.25,2.0,inf,1",
        "4,x,0.25,2.0,3.0,4.0",
        "4,0.5,0.25,2.0,x,1",
        '"4",0.5,0.25,2.0,,',
        "\0" * 50,
        HEADER,
        "",
        "9" * 5000,
        "x" * 200_000,
        "4,caf\udce9,1,1,,",
    ],
    ids=lambda text: ascii(text)[:25],
)
def test_damaged_rows_are_dropped(damaged):
    text = "\n".join([HEADER, *GOOD[:2], damaged, GOOD[2]]) + "\n"
    if damaged[:2] == "3,":
        text = "\n".join([HEADER, *GOOD, damaged]) + "\n"
    Path("log.csv").write_bytes(text.encode(errors="surrogateescape"))
    open_log(step=4)
    assert lines() == [HEADER, *GOOD, ""]


@pytest.mark.parametrize("how", ["missing", "empty", "no header", "cut", "crlf", "bom"])
def test_a_log_without_its_form_is_repaired(how):
    whole = "\n".join([HEADER, *GOOD]) + "\n"
    content = {
        "empty": "",
        "no header": "\n".join(GOOD) + "\n",
        "cut": whole + "4,0.5,0.1",
        "crlf": whole.replace("\n", "\r\n"),
        "bom": "\ufeff" + whole,
    }
    if how != "missing":
        Path("log.csv").write_bytes(content[how].encode())
    log = open_log(step=4)
    log.append(row(5))
    rows = [] if how in ("missing", "empty") else GOOD
    assert lines() == [HEADER, *rows, "5,0.5,0.2,2.0,,", ""]


def test_a_log_that_is_no_file_is_named():
    Path("log.csv").mkdir()
    with pytest.raises(ValueError, match="cannot write log.csv"):
        open_log(step=3)


def test_a_full_disk_is_named(monkeypatch):
    log = open_log()
    with open("/dev/full", "wb", buffering=0) as full:
        log.file, file = full, log.file
        with pytest.raises(ValueError, match=r"cannot write log.csv \(No space left on device\)"):
            log.append(row(1))
        log.file = file

    def fsync(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match=r"cannot write log.csv \(Input/output error\)"):
        log.save(MODEL, None, 1)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(value, monkeypatch):
    """A run may be stopped right after the step that spoiled them, before any loss shows it."""
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda *_, **more: saved.append(more["step"]))
    log = open_log()
    model = torch.nn.Linear(2, 2)
    log.save(model, None, 1)
    model.bias.data[1] = value
    with pytest.raises(FloatingPointError, match="step 2: bias has .* infinite or NaN, so the run"):
        log.save(model, None, 2)
    assert saved == [1]


def test_the_plot_shows_the_rows(monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    curves = {}
    plot = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *args, label, **more: (
            curves.update({label: (list(x), list(y))}),
            plot(self, x, y, *args, label=label, **more),
        ),
    )
    labels = []

    def savefig(figure, *args, **options):
        (axes,) = figure.axes
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        labels.append((axes.get_xlabel(), axes.get_ylabel(), texts))
        original_savefig(figure, *args, **options)

    original_savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    log = open_log()
    for step in (1, 2, 100):
        log.append(row(step, **({"val_loss": 1.0, "val_bpb": 0.25 * step} if step > 1 else {})))
    log.finish({"step": 3, "loss": 0.5})
    assert curves["training batch"] == ([1, 2, 100], [2.0, 1.0, 0.02])  # bits per byte
    assert curves["held out"] == ([2, 100], [0.5, 25.0])
    assert Path("loss.png").read_bytes()[:4] == b"\x89PNG"
    assert labels == [("step", "bits per byte", ["training batch", "held out"])]
    record = json.loads(Path("config.json").read_text())
    assert record["model"] == {"n_layer": 1} and record["machine"] == {"device": "none"}
    assert record["result"]["loss"] == 0.5 and 0 <= record["result"]["seconds"] < 60
    assert list(csv.DictReader(open("log.csv")))[1]["val_bpb"] == "0.5"


@pytest.mark.parametrize(
    "name", ["$x^2", "a$b$", "$\\frac", "$\\frac$", "line\nfeed", "caf\udce9", "{%_&"]
)
def test_folders_of_any_name_are_plotted(name):
    Path(name).mkdir()
    log = open_log(folder=name)
    log.append(row(1))
    log.plot()
    assert Path(name, "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("step,says", [(99, "--resume ./a"), (100, "--init ./a")])
def test_it_says_how_to_go_on(step, says, capsys):
    Path("a").mkdir()
    log = open_log(folder="a")
    log.finish({"step": step})
    assert says.replace("./", "") in capsys.readouterr().out

    Path("my run").mkdir()
    log = open_log(folder="my run")
    log.finish({"step": step})
    assert capsys.readouterr().out.strip().endswith(" 'my run'"), "to be pasted into a shell"


def test_numbers_that_are_not_finite_are_named():
    log = open_log()
    log.append(row(3, val_loss=2.0))
    for name in ("loss", "grad_norm", "val_loss"):
        with pytest.raises(FloatingPointError, match=f"step 4: the {name} is inf.*nothing is"):
            log.append(row(4, **{name: math.inf}))
    Path("ckpt.pt").touch()
    with pytest.raises(FloatingPointError, match="ckpt.pt is the last good checkpoint"):
        log.append(row(4, loss=math.nan))
    assert len(lines()) == 3, "the header, step 3 and what follows its newline"


def test_only_rank_0_writes(monkeypatch):
    monkeypatch.setattr(runlog, "rank", lambda: 1)
    log = open_log()
    log.append(row(1))
    log.save(MODEL, None, 1)
    log.finish({"step": 1})
    assert os.listdir() == []
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        log.append(row(2, loss=math.nan))
