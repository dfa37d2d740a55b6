"""Tests of support/cuda_graph.py: a captured step does what the eager one does."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support import cuda_graph
from tests.common import REPOSITORY, gpu, is_equal, refused

STEPS = 12


@pytest.fixture
def flags(tiny):
    """A run of 12 steps in bfloat16 on the GPU, without a text at the end."""
    without_device = [flag for flag in tiny if flag not in ("--device", "cpu")]
    return [*without_device, "--steps", str(STEPS), "--sample", "0", "--no-compile"]


def load(folder):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True, map_location="cpu")


def losses(folder):
    lines = Path(folder, "log.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[2]) for line in lines]


class Counter(torch.optim.SGD):
    """An optimizer that does not say whether it can be captured."""


@pytest.mark.parametrize("asked", [None, False])
def test_a_cpu_takes_eager_steps(asked, capsys):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    assert not cuda_graph.prepare(asked, torch.device("cpu"), optimizer)
    reason = "they need a CUDA GPU" if asked is None else "set by flag"
    assert capsys.readouterr().out == f"graphs   off ({reason})\n"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_graphs_are_refused_where_they_cannot_be(tiny):
    refused([*tiny, "--graph"], "--graph cannot be used here", "need a CUDA GPU")


def test_only_optimizers_that_say_so_are_captured(capsys):
    p = torch.nn.Parameter(torch.ones(1))
    device = torch.device("cuda")  # nothing runs on it
    optimizer = Counter([p], lr=0.5)
    assert not cuda_graph.prepare(None, device, optimizer)
    assert "graphs   off (Counter is not capturable)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Counter is not capturable"):
        cuda_graph.prepare(True, device, optimizer)


# -- on the GPU ------------------------------------------------------------------------------------

VARIANTS = {
    "adamw": [],
    "micro-batches": ["--micro-batch", "2"],
    "sonew": ["--attn", "laser", "--optim", "sonew"],
    "simplicial": ["--attn", "softmax,simplicial:w1=8:w2=4", "--compile"],
}


@gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_a_captured_run_equals_an_eager_one(flags, name, capsys):
    for graph in ("graph", "no-graph"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        train.main([*flags, *VARIANTS[name], f"--{graph}", "--out", f"out/{graph}"])
    torch.use_deterministic_algorithms(False)
    assert losses("out/graph") == pytest.approx(losses("out/no-graph"), rel=1e-3)
    assert losses("out/graph")[-1] < losses("out/graph")[0]
    a = load("out/graph")["model"]
    b = load("out/no-graph")["model"]
    for key in a:
        assert (a[key] - b[key]).norm() <= 2e-3 * b[key].norm(), key


@gpu
@pytest.mark.parametrize("more", [[], ["--optim", "sonew"], ["--micro-batch", "2"]])
def test_resuming_a_captured_run_is_exact(flags, more):
    flags = [*flags, *more, "--graph", "--eval-every", "5"]
    train.main([*flags, "--out", "out/whole"])
    train.main([*flags, "--out", "out/parts", "--stop-after", "7"])
    train.main(["--resume", "out/parts", "--sample", "0", "--no-compile"])
    assert losses("out/parts") == losses("out/whole")
    assert is_equal(load("out/parts")["model"], load("out/whole")["model"])
    assert is_equal(
        load("out/parts")["optimizer"]["state"], load("out/whole")["optimizer"]["state"]
    )


@gpu
def test_a_loss_that_is_not_finite_takes_no_captured_step(flags, monkeypatch):
    original = train.train_step
    weights = []

    def poisoned(step, *more):
        is_captured = isinstance(step, cuda_graph.CapturedStep)
        parameters = step.optimizer.param_groups[0]["params"]
        weights.append((parameters, [p.detach().clone() for p in parameters], is_captured))
        if len(weights) == 8:
            step.optimizer.param_groups[1]["params"][0].data[0] = math.nan
        return original(step, *more)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="step 8: the loss is nan"):
        train.main([*flags, "--graph", "--out", "out/a", "--eval-every", "5"])
    parameters, before, is_captured = weights[-1]
    assert is_captured and load("out/a")["step"] == 5
    assert all(torch.equal(p, old) for p, old in zip(parameters, before))


@gpu
def test_a_signal_ends_a_captured_run(flags):
    command = [sys.executable, str(REPOSITORY / "train.py"), *flags, "--graph", "--out", "out/a"]
    command += ["--steps", "100000", "--eval-every", "50"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not Path("out/a/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "--resume out/a" in process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert len(losses("out/a")) == load("out/a")["step"] >= 50


@gpu
def test_what_cannot_be_captured_runs_eagerly(flags, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    Path("waits.py").write_text(
        "import train\n\n\ndef attention(q, k, v):\n"
        "    assert q.abs().max().item() < 1e4\n"
        "    return train.softmax_attention(q, k, v)\n"
    )
    with pytest.warns(UserWarning, match="the step runs eagerly"):
        result = train.main([*flags, "--attn", "waits", "--graph", "--out", "out/a"])
    assert result["step"] == STEPS and losses("out/a")[-1] < losses("out/a")[0]
