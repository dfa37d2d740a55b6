"""support/distributed.py: device, processes, signals, and runs on two processes like on one."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from support import distributed
from tests.common import REPOSITORY, gpu

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


# -- device, dtype, compilation --------------------------------------------------------------------


def test_device(monkeypatch):
    assert distributed.pick_device("cpu") == CPU
    for name in ("tpu", "cuda:x", "cpu:0", "CPU", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=name):
            distributed.pick_device(name)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", "1")  # left in the environment
    assert distributed.pick_device("cuda") == CUDA and distributed.local_rank() == 0
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
        assert distributed.local_rank() == 0
    monkeypatch.setenv("MASTER_PORT", "1")
    assert distributed.local_rank() == 1
    assert distributed.pick_device("cuda") == torch.device("cuda:1")
    assert distributed.pick_device("cuda:0") == torch.device("cuda:0")


def test_dtype(monkeypatch):
    assert distributed.pick_dtype("bf16", CPU) == "bf16"
    assert distributed.pick_dtype("", CPU) == "fp32"
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16, **options: has_bf16
        )
        assert distributed.pick_dtype("", CUDA) == expected
        assert distributed.pick_dtype("fp32", CUDA) == "fp32"


@pytest.mark.parametrize(
    "asked, device, has_triton, expected",
    [
        (None, CUDA, True, (True, "faster on CUDA")),
        (None, CUDA, False, (False, "Triton is missing here: pip install triton")),
        (None, CPU, True, (False, "faster only on CUDA")),
        (True, CPU, False, (True, "set by flag")),
        (True, CUDA, True, (True, "set by flag")),
        (False, CUDA, False, (False, "set by flag")),
    ],
)
def test_compilation_on_a_gpu_needs_triton(asked, device, has_triton, expected, monkeypatch):
    spec = object() if has_triton else None
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: spec)
    assert distributed.pick_compile(asked, device) == expected
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs Triton"):
        distributed.pick_compile(True, CUDA)


def test_micro_batches_divide_the_share_of_a_process(monkeypatch):
    assert distributed.micro_batch_size(12, 0) == 12 and distributed.micro_batch_size(12, 3) == 3
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert distributed.micro_batch_size(12, 0) == 3 and distributed.micro_batch_size(12, 1) == 1
    for batch_size, micro_batch in ((12, 2), (12, 4), (10, 0), (2, 0)):
        with pytest.raises(ValueError, match=f"--batch-size {batch_size} is no multiple of 4"):
            distributed.micro_batch_size(batch_size, micro_batch)


def test_random_numbers_depend_on_seed_step_and_rank(monkeypatch):
    def draw(seed, step, rank=0):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        distributed.seed_everything(seed, step)
        return torch.rand(1).item()

    assert draw(1, 2) == draw(1, 2)
    drawn = [draw(1, 2), draw(2, 1), draw(1, 3), draw(1, 2, rank=1), draw(1, 0), draw(0, 1)]
    assert len(set(drawn)) == len(drawn)


def test_async_scalar_keeps_the_value_of_its_time():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    scalar = distributed.AsyncScalar(tensor)
    with torch.no_grad():
        tensor += 1
    assert scalar.read() == [1.0, 2.0] == scalar.read()
    assert distributed.mean_over_ranks(torch.tensor(3.0), 15).tolist() == [3.0, 15.0]


@gpu
def test_async_scalar_on_the_gpu():
    tensor = torch.zeros(1, device="cuda")
    torch.cuda._sleep(10**8)
    tensor += 1
    scalar = distributed.AsyncScalar(tensor)
    tensor += 1
    assert scalar.read() == [1.0]


# -- signals and output ----------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_a_later_one_ends_the_process(signum, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # no nohup
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with distributed.StopSignal() as stop:
        assert stop.now == 0
        signal.raise_signal(signum)
        assert stop.now == signum
        now[0] += 0.9
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what the terminal has sent
        assert stop.now == signum and exits == []
        now[0] += 0.2
        signal.raise_signal(signum)
        assert exits == [128 + signum]


def test_processes_stop_when_all_know(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with distributed.StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT and stop.now == 0
        stop.agree(False)
        assert stop.now == 0
        stop.agree(True)
        assert stop.now == signal.SIGINT
    with distributed.StopSignal() as stop:
        stop.agree(True)  # another process was signalled
        assert stop.now == signal.SIGTERM


def test_nohup_is_respected():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.now == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


class Lost(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_lost_output_is_ignored(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, name, Lost())
    distributed.print0("a line")
    with distributed.ProgressBar(10, 3) as bar:
        for _ in range(7):
            bar.update("loss 1.0")
            distributed.print0("another")
    words = capsys.readouterr()
    assert name == "stdout" or words.out.startswith("a line\n")


def test_progress_bar(monkeypatch, capsys):
    with distributed.ProgressBar(10, 3) as bar:
        time.sleep(0.02)
        bar.bar.mininterval = 0
        bar.update("loss 1.0")
    assert "4/10" in capsys.readouterr().err
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with distributed.ProgressBar(10, 3) as bar:
        bar.update("loss 1.0")
        distributed.print0("a line")
    assert capsys.readouterr() == ("", "")


# -- two processes ---------------------------------------------------------------------------------

SCRIPT = """
import json, sys, train
from support import cli

train.RunLog.plot = lambda log: None  # plots take longer than the rest

def main():
    for argv in json.loads(sys.argv[1]):
        train.main(argv)

cli.run_main(main)
"""

# a signal to one of two processes, in its first evaluation
SIGNALLED = """
import os, signal, torch, train
is_signalled = False
def attention(q, k, v):
    global is_signalled
    if os.environ["RANK"] == "1" and not torch.is_grad_enabled() and not is_signalled:
        is_signalled = True
        signal.raise_signal(signal.SIGTERM)
    return train.softmax_attention(q, k, v)
"""


def torchrun(script, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = f"{REPOSITORY}{os.pathsep}{Path.cwd()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command += [script, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def read_losses(name):
    """Return loss, gradient norm and held-out loss of each step, NaN where there is none."""
    with open(f"out/{name}/log.csv") as file:
        rows = list(csv.DictReader(file))
    columns = ("loss", "grad_norm", "val_loss")
    return np.array([[float(row[key] or "nan") for key in columns] for row in rows])


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_two_processes_equal_one(tiny, monkeypatch):
    lines = []
    for n in range(200):
        answer = " even" if n % 2 == 0 else " an odd one"
        lines.append(json.dumps({"prompt": f"{n} is", "answer": answer}))
    Path("x.jsonl").write_text("\n".join(lines))
    Path("signalled.py").write_text(SIGNALLED)
    Path("script.py").write_text(SCRIPT)
    flags = [*tiny, "--steps", "12", "--eval-every", "6", "--sample", "0", "--lr", "1e-4"]
    answers = [*flags, "--data", "x.jsonl", "--optim", "adamw:eps=1e-4"]
    resume = ["--resume", "out/fsdp", "--device", "cpu", "--sample", "0"]
    commands = [
        [*flags, "--out", "out/ddp", "--micro-batch", "1"],  # two micro-batches per process
        [*answers, "--out", "out/answers-ddp", "--micro-batch", "1"],
        [*flags, "--out", "out/fsdp", "--fsdp", "--stop-after", "6"],
        [*resume, "--fsdp", "--stop-after", "3"],
        [*flags, "--out", "out/signalled", "--attn", "signalled", "--eval-every", "5"],
        [*flags, "--batch-size", "3"],
    ]
    done = torchrun("script.py", json.dumps(commands))

    # bad flags, the last command, are answered once
    assert done.returncode != 0
    assert done.stderr.count("script.py: --batch-size 3 is no multiple") == 1, done.stderr[:3000]
    assert "process 1: " not in done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("out/ddp: steps 1 to 12") == 1
    train.main(resume)  # the last three steps in one process
    train.main([*flags, "--out", "out/one"])
    train.main([*answers, "--out", "out/answers"])

    saved = {}
    for name in ("one", "ddp", "fsdp", "answers", "answers-ddp"):
        saved[name] = torch.load(f"out/{name}/ckpt.pt", weights_only=True)["model"]
    first = train.GPT(train.GPTConfig(256, 16, 2, 2, n_embd=32))
    train.init_weights(first, 1337)
    moved = largest_difference(saved["one"], dict(first.named_parameters()))
    assert largest_difference(saved["one"], saved["ddp"]) < 1e-3 * moved
    assert largest_difference(saved["ddp"], saved["fsdp"]) < 1e-3 * moved
    assert largest_difference(saved["answers"], saved["answers-ddp"]) < 1e-3 * moved
    for one, two in (("one", "ddp"), ("one", "fsdp"), ("answers", "answers-ddp")):
        assert len(read_losses(two)) == 12
        assert np.allclose(read_losses(one), read_losses(two), rtol=1e-5, equal_nan=True)

    # both processes stopped after the step in which they learned of the signal, and saved
    assert torch.load("out/signalled/ckpt.pt", weights_only=True)["step"] == 6
    assert "--resume out/signalled" in done.stdout
