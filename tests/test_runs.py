"""Whole runs: they resume bit for bit, survive kill -9 and full disks, and never collide."""

import csv
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

import train
from support.run_folder import LOCK, claim_folder
from support.runlog import RunLog
from tests.common import is_equal, refused, run_code, run_together, run_two_processes
from tests.test_train_loop import load

RESUME = ["--sample", "0", "--device", "cpu", "--resume"]
PLOT = RunLog.plot
NO_PLOT = "import train\ntrain.RunLog.plot = lambda log: None\n"


@pytest.fixture
def plotted(tiny, monkeypatch):
    """Let runs plot their losses, which tests leave out otherwise."""
    monkeypatch.setattr(RunLog, "plot", PLOT)


def rows(folder):
    with open(Path(folder, "log.csv"), newline="") as file:
        return list(csv.reader(file))


# -- resuming --------------------------------------------------------------------------------------


def test_forty_steps_equal_twenty_and_twenty(tiny, plotted):
    tiny += ["--eval-every", "20", "--micro-batch", "2"]
    assert train.main([*tiny, "--out", "out/uninterrupted"])["out"] == "out/uninterrupted"
    train.main([*tiny, "--out", "out/resumed", "--stop-after", "20"])
    with open("out/resumed/log.csv", "a") as file:
        file.write("21,9,9,9,,\n22,9")  # rows of a run that was killed after its checkpoint
    assert train.main([*RESUME, "out/resumed"])["out"] == "out/resumed"

    saved = load("out/resumed")
    assert saved["step"] == 40
    assert is_equal(saved, load("out/uninterrupted"))
    log = rows("out/resumed")
    assert len(log) == 41
    assert log == rows("out/uninterrupted")
    for folder in ("out/uninterrupted", "out/resumed"):
        assert sorted(os.listdir(folder)) == ["ckpt.pt", "config.json", "log.csv", "loss.png"]
    losses = [float(row[2]) for row in log[1:]]
    assert losses[-1] < losses[0] - 0.5, "the model does not learn"


@pytest.mark.parametrize(
    "flags",
    [
        "--optim sonew",
        "--attn laser,simplicial:w1=8:w2=4 --optim sonew:band=3:bf16_state=true",
        "--adapter lora_rite:rank=2 --optim lora_rite",
        "--adapter lora_rite:rank=2",
        "--attn mine --adapter mine --optim mine",
    ],
)
def test_resuming_is_exact_with_every_module(tiny, flags, monkeypatch):
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    flags = [*tiny, "--steps", "6", "--eval-every", "3", *flags.split()]
    resume_flags = []
    if "mine" in flags:
        flags += ["--clip", "0"]
        resume_flags = "--attn mine --adapter mine --optim mine".split()
    train.main([*flags, "--out", "out/uninterrupted"])
    train.main([*flags, "--out", "out/resumed", "--stop-after", "2"])
    train.main([*RESUME, "out/resumed", *resume_flags])
    assert is_equal(load("out/uninterrupted"), load("out/resumed"))
    assert rows("out/uninterrupted") == rows("out/resumed")


MINE = """
import torch, train

def attention(q, k, v):
    return train.softmax_attention(q, k, v + 0.1 * torch.rand_like(v))

class Optimizer(torch.optim.SGD):  # adds random numbers, and counts steps in its groups
    def step(self):
        super().step()
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                p.data += 1e-3 * torch.randn_like(p) / group["count"]

def optimizer(groups, lr):
    return Optimizer([{**group, "count": 0} for group in groups], lr, momentum=0.9)

def adapt(model, *, width=3):
    model.requires_grad_(False)
    model.shift = torch.nn.Parameter(torch.randn(width))
    weight = model.norm.weight.requires_grad_(True)
    model.norm.register_forward_hook(lambda module, x, y: y + model.shift.sum())
    return [{"params": [weight, model.shift]}]

def merge(model):
    pass
"""


def test_a_run_is_resumed_from_any_folder(tiny, monkeypatch):
    tiny[tiny.index("text.txt")] = "data/text.txt"
    Path("data").mkdir()
    os.rename("text.txt", "data/text.txt")
    train.main([*tiny, "--out", "out/a", "--stop-after", "3"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert train.main([*RESUME, "../out/a", "--stop-after", "3"])["step"] == 6

    # after the text has moved, --data names it, and its content must be the same
    os.rename("../data/text.txt", "moved.txt")
    refused([*RESUME, "../out/a"], "there is no data", "/data/text.txt'")
    result = train.main([*RESUME, "../out/a", "--data", "moved.txt", "--stop-after", "3"])
    assert result["step"] == 9
    Path("other.txt").write_text("another text " * 100)
    refused([*RESUME, "../out/a", "--data", "other.txt"], "the text has changed")
    assert train.main([*RESUME, "../out/a", "--stop-after", "1"])["step"] == 10
    assert not Path(".tokens").exists()


def test_bad_resume(tiny):
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    before = Path("out/a/ckpt.pt").read_bytes()
    for flags, *parts in (
        ("--resume out/a --lr 0.5", "--lr is 0.5 here but 0.003 in out/a", "leave it out"),
        ("--resume --n-layer 3", "--n-layer is 3 here but 2 in out/a"),
        ("--resume --attn laser", "--attn is laser here but softmax"),
        ("--resume out/a --model gpt2", "leave --model out"),
        ("--resume out/a --out out/b", "--resume continues a run", "--out out"),
        ("--resume out/a --init out/a", "--resume continues a run", "--init"),
        ("--resume out/b", "out/b holds no run"),
        ("--out out/a", "already holds a run", "--resume out/a"),
        ("--init out/a --out out/a", "already holds a run"),
    ):
        refused([*flags.split(), "--device", "cpu", "--data", "text.txt"], *parts)
    with open("text.txt", "a") as file:
        file.write("more")
    refused(["--resume", "--device", "cpu"], "the text has changed", "--init out/a")
    assert Path("out/a/ckpt.pt").read_bytes() == before
    assert not list(Path("out/a").glob(".*"))
    assert sorted(os.listdir("out")) == [".tokens", "a"]


def test_a_complete_run_is_not_resumed(tiny):
    train.main([*tiny, "--out", "out/a", "--steps", "2"])
    refused(["--resume", "--device", "cpu"], "out/a is complete (2 steps)", "--init")


@pytest.mark.parametrize("content", [b"\x89PNG\0\xff" * 99, b"step\n1\n2,\n", None])
def test_a_damaged_log_does_not_stop_a_resume(tiny, content):
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    os.remove("out/a/config.json")  # it is written again as well
    os.remove("out/a/log.csv")
    if content is not None:
        Path("out/a/log.csv").write_bytes(content)
    assert train.main([*RESUME, "out/a", "--stop-after", "2"])["step"] == 7
    first_column = [row[0] for row in rows("out/a")]
    assert first_column == ["step", "6", "7"]
    assert Path("out/a/config.json").exists()
    assert load("out/a")["step"] == 7


# -- what goes wrong while saving ------------------------------------------------------------------


def test_a_full_disk(tiny):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    train.main([*tiny, "--out", "out/a", "--stop-after", "1"])
    before = Path("out/a/ckpt.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow larger
    try:
        refused([*RESUME, "out/a"], "cannot write out/a/ckpt.pt (File too large)", "untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("out/a/ckpt.pt").read_bytes() == before
    assert not list(Path("out/a").glob(".*"))
    assert train.main([*RESUME, "out/a", "--stop-after", "1"])["step"] == 2


# kill -9 in the fsync of a large file: the checkpoint is written, but not yet renamed
KILL_WHILE_SAVING = """
import os, train
from support.checkpoint import torch
def fsync(fd):
    if os.fstat(fd).st_size > 10000:
        os.kill(os.getpid(), 9)
os.fsync = fsync
train.main()
"""


def test_kill_9_while_saving(tiny):
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    before = Path("out/a/ckpt.pt").read_bytes()
    assert run_code(KILL_WHILE_SAVING, *RESUME, "out/a").returncode == -9
    assert Path("out/a/ckpt.pt").read_bytes() == before
    assert list(Path("out/a").glob(".ckpt.pt.[0-9]*"))
    assert Path("out/a", LOCK).exists()
    step = train.main([*RESUME, "out/a", "--stop-after", "1"])["step"]
    assert step == 6, "the lock of a killed process should be ignored"
    assert not list(Path("out/a").glob(".*")), "the files of the killed process should be removed"


# -- two runs at once ------------------------------------------------------------------------------

ONE_OF_FIVE = """
import os, sys
train.main([*sys.argv[1:], "--seed", os.environ["SEED"], "--steps", "3"])
"""


def test_five_runs_at_once_have_five_folders(tiny):
    environments = [{"SEED": str(seed)} for seed in range(5)]
    for done in run_together(environments, NO_PLOT + ONE_OF_FIVE, *tiny):
        assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(os.listdir("out"))
    first = names[1]
    assert names == [".tokens", first, f"{first}-2", f"{first}-3", f"{first}-4", f"{first}-5"]
    seeds = set()
    for name in names[1:]:
        seeds.add(load(f"out/{name}")["config"]["run"]["seed"])
        assert len(rows(f"out/{name}")) == 4, "the log should have a header and three steps"
    assert seeds == {0, 1, 2, 3, 4}
    assert len(os.listdir("out/.tokens")) == 1


def test_a_folder_has_one_run_at_a_time(tiny):
    train.main([*tiny, "--out", "out/a", "--stop-after", "3"])
    before = Path("out/a/ckpt.pt").read_bytes()
    code = "from support.cli import run_main; import train; run_main(train.main)"
    for flags in (["--resume", "out/a"], ["--out", "out/b", "--data", "text.txt"]):
        folder = flags[1]
        resumed = Path(folder) if flags[0] == "--resume" else None
        with claim_folder(folder, "", resumed):
            done = run_code(code, *flags, "--device", "cpu", "--sample", "0")
        assert done.returncode == 2
        message = done.stderr.splitlines()[-1]
        assert f"{folder} is in use by process {os.getpid()} on " in message, done.stderr
    assert Path("out/a/ckpt.pt").read_bytes() == before
    assert train.main([*RESUME, "out/a", "--stop-after", "1"])["step"] == 4


def test_folders_of_unusual_names(tiny, plotted):
    for name in ("$x é", "x" * 255):
        train.main([*tiny, "--out", name, "--steps", "2", "--stop-after", "1"])
        assert train.main([*RESUME, name])["step"] == 2
        assert Path(name, "loss.png").exists()
    refused([*tiny, "--out", "y" * 256], "cannot write in", "File name too long")


# -- signals; see test_train_stop.py ---------------------------------------------------------------


def test_a_signal_before_the_first_step_leaves_nothing(tiny, monkeypatch):
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as cli.run_main does
    monkeypatch.setattr(train, "build_model", lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main([*tiny, "--out", "out/a"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not Path("out/a").exists()


# -- several processes -----------------------------------------------------------------------------


SHARDED = """
import os, sys, train
from pathlib import Path
flags = sys.argv[1:]
for optim in ("adamw", "sonew"):
    run = [*flags, "--fsdp", "--optim", optim]
    train.main([*run, "--out", f"out/{optim}-whole"])
    train.main([*run, "--out", f"out/{optim}-parts", "--stop-after", "2"])
    train.main(["--resume", f"out/{optim}-parts", "--fsdp", "--device", "cpu", "--sample", "0"])
try:
    train.main([*flags, "--out", "mine"])
except ValueError as error:
    Path("refused" + os.environ["RANK"]).write_text(str(error))
train.main([*flags, "--fsdp", "--out", "out/four", "--stop-after", "2"])
"""


def test_sharded_runs(tiny):
    """A run of two processes has one folder, and resumes exactly, in one process as well."""
    Path("mine").mkdir()
    Path("mine/log.csv").write_text("mine")
    flags = [*tiny, "--steps", "4", "--lr", "1e-4"]
    for done in run_two_processes(NO_PLOT + SHARDED, *flags):
        assert done.returncode == 0, done.stderr[-3000:]

    for optim in ("adamw", "sonew"):
        whole = load(f"out/{optim}-whole")
        parts = load(f"out/{optim}-parts")
        assert whole["step"] == 4
        assert is_equal(whole, parts)
        assert rows(f"out/{optim}-whole") == rows(f"out/{optim}-parts")
    for rank in range(2):  # a refusal must end both processes; neither may wait for the other
        assert "mine/log.csv would be overwritten" in Path(f"refused{rank}").read_text()
    assert os.listdir("mine") == ["log.csv"]
    assert not list(Path("out").glob("*/.*"))
    folders = [".tokens", "adamw-parts", "adamw-whole", "four", "sonew-parts", "sonew-whole"]
    assert sorted(os.listdir("out")) == folders

    # a sharded run goes on in this one process
    train.main([*RESUME, "out/four"])
    expected = load("out/adamw-whole")
    resumed = load("out/four")
    assert resumed["step"] == 4
    for name, weight in expected["model"].items():
        torch.testing.assert_close(resumed["model"][name], weight, rtol=1e-5, atol=1e-6)
