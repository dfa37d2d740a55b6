"""train.py as a whole: runs that a signal, a NaN or an interrupt stops."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from support import data
from tests.common import REPOSITORY, is_equal
from tests.test_train_loop import load


@pytest.fixture
def short(tiny, monkeypatch):
    """Return the flags of a tiny run, and leave out the text that it generates at its end."""
    monkeypatch.setattr(sample, "show_sample", lambda *_: None)
    return tiny


def n_rows(folder):
    """Return the number of steps in the log of a run."""
    return len(Path(folder, "log.csv").read_text().splitlines()) - 1


@pytest.mark.parametrize("where", ["train", "evaluate", "generate"])
def test_signal_saves_and_ends(tiny, monkeypatch, where):
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter(b"abcde"))
    flags = [*tiny, "--eval-every", "20"]
    train.main([*flags, "--out", "out/uninterrupted"])
    read_lengths = []  # the lengths of the texts that sequences are read from
    signals = []
    batch_starts = data.batch_starts
    read_sequences = data.read_sequences

    # functions that training, evaluation and generation call, each of which raises a signal
    def signal_in_training(seed, step, *more):
        if step == 10:
            signals.append(signal.raise_signal(signal.SIGTERM))
        return batch_starts(seed, step, *more)

    def signal_in_evaluation(tokens, *more):
        read_lengths.append(len(tokens))
        is_held_out = len(tokens) < max(read_lengths)  # the held-out text is shorter
        if is_held_out and read_lengths.count(len(tokens)) == 1:
            signals.append(signal.raise_signal(signal.SIGHUP))
        return read_sequences(tokens, *more)

    def signal_in_generation(*_, **__):
        for token in b"abcde":
            signals.append(signal.raise_signal(signal.SIGINT))
            yield token

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # no nohup
        if where == "train":
            patch.setattr(data, "batch_starts", signal_in_training)
        if where == "evaluate":
            patch.setattr(data, "read_sequences", signal_in_evaluation)
        if where == "generate":
            patch.setattr(sample, "generate", signal_in_generation)
        result = train.main([*flags, "--out", "out/a"])
    expected = {"train": signal.SIGTERM, "evaluate": signal.SIGHUP, "generate": signal.SIGINT}
    assert result["signal"] == expected[where]
    assert len(signals) == 1
    assert signal.getsignal(signal.SIGTERM) is handler
    if where != "generate":
        last_step = 10 if where == "train" else 20
        assert result["step"] == last_step
        assert load("out/a")["step"] == last_step
        n_held_out = read_lengths.count(min(read_lengths, default=0))
        assert n_held_out <= 1, "the evaluation went on after the signal"
        train.main(["--resume", "out/a", "--device", "cpu", "--sample", "1"])
    saved = load("out/a")
    expected = load("out/uninterrupted")
    assert is_equal(saved["model"], expected["model"])
    assert is_equal(saved["optimizer"], expected["optimizer"])


def test_a_signal_before_the_first_step_saves_the_start(short, monkeypatch):
    progress_bar = train.distributed.ProgressBar

    def with_signal(*args):
        signal.raise_signal(signal.SIGTERM)
        return progress_bar(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train.distributed, "ProgressBar", with_signal)
        result = train.main([*short, "--out", "out/a"])
    assert result["signal"] == signal.SIGTERM and result["step"] == 0
    resumed = train.main(["--resume", "out/a", "--device", "cpu"])
    assert resumed["val_loss"] == train.main([*short, "--out", "out/b"])["val_loss"]


@pytest.mark.parametrize("where", ["the last step", "the last evaluation"])
def test_a_signal_at_the_end_does_not_cost_the_last_evaluation(short, monkeypatch, where):
    """The run is complete then, and --resume would refuse it."""
    expected = train.main([*short, "--out", "out/uninterrupted"])
    function = {"the last step": "train_step", "the last evaluation": "evaluate"}[where]
    original = getattr(train, function)
    calls = []

    def with_signal(*args):
        calls.append(args)
        if len(calls) == last_call:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    n_steps = expected["step"]
    last_call = n_steps if where == "the last step" else n_rows_evaluated("out/uninterrupted")
    monkeypatch.setattr(train, function, with_signal)
    result = train.main([*short, "--out", "out/a"])
    assert len(calls) == last_call
    assert result["signal"] == signal.SIGTERM and result["step"] == n_steps
    assert result["val_loss"] == expected["val_loss"]


def test_a_signal_during_the_plot_is_reported(short, monkeypatch):
    plot = train.RunLog.plot

    def with_signal(log):
        plot(log)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train.RunLog, "plot", with_signal)
    result = train.main([*short, "--out", "out/a", "--export", "out/weights"])
    assert result["signal"] == signal.SIGTERM
    assert not Path("out/weights").exists()


def n_rows_evaluated(folder):
    """Return how many rows of a run's log have a held-out loss."""
    rows = Path(folder, "log.csv").read_text().splitlines()[1:]
    return sum(not row.endswith(",") for row in rows)


def test_signal_from_outside(tiny):
    flags = [*tiny, "--out", "out/a", "--steps", "1000000"]
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # no nohup
    )

    # wait for two steps
    for line in process.stdout:
        if line.startswith("run "):
            break
    while n_rows("out/a") < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)  # a lost connection
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGHUP
    assert "--resume out/a" in output
    step = load("out/a")["step"]
    assert step > 0
    assert n_rows("out/a") == step
    assert not list(Path("out/a").glob(".*")), "temporary files are left"


def test_a_loss_that_is_not_finite_stops_the_run(short, monkeypatch):
    original = train.train_step
    weights = []

    def train_step_with_nan(step, *more):  # from step 8 on
        net = step.net
        weights.append((net, net.embed_tokens.weight.detach().clone()))
        if len(weights) == 8:
            net.norm.weight.data[0] = math.nan
        return original(step, *more)

    monkeypatch.setattr(train, "train_step", train_step_with_nan)
    with pytest.raises(
        FloatingPointError, match="step 8: the loss is nan.*out/a/ckpt.pt is the last"
    ):
        train.main([*short, "--out", "out/a", "--eval-every", "5"])
    assert load("out/a")["step"] == 5, "the checkpoint should be the last one before the NaN"
    assert n_rows("out/a") == 7
    assert len(weights) == 8
    net, before = weights[-1]
    assert torch.equal(net.embed_tokens.weight, before), "a step with a NaN changed the weights"

    # once resumed, the run ends as usual
    monkeypatch.setattr(train, "train_step", original)
    train.main(["--resume", "out/a", "--device", "cpu", "--stop-after", "5"])
    assert n_rows("out/a") == 10


def test_weights_gone_bad_are_not_saved(short, monkeypatch):
    losses = iter([2.0, 1.0, math.nan])  # of the evaluations at steps 10, 20 and 30
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    with pytest.raises(FloatingPointError, match="step 30: the val_loss is nan"):
        train.main([*short, "--out", "out/a", "--eval-every", "10"])
    assert load("out/a")["step"] == 20


def test_an_infinite_gradient_stops_the_run(short, monkeypatch):
    norm = torch.tensor(math.inf)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: norm)
    with pytest.raises(FloatingPointError, match="step 1: the grad_norm is inf.*nothing is saved"):
        train.main([*short, "--out", "out/a"])


def test_a_checkpoint_is_saved_before_it_is_reported(short, monkeypatch):
    def interrupted_print(text):
        if "held out" in text and "step" in text:
            assert load("out/a")["step"] == 10
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "print0", interrupted_print)
    with pytest.raises(KeyboardInterrupt):
        train.main([*short, "--out", "out/a", "--eval-every", "10"])
