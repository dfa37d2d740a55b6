"""support/cli.py: flags, exit status, signals, output that is lost."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support import cli
from tests.common import REPOSITORY, refused, run_script
from tests.test_repository import SCRIPTS

# -- fields and flags ------------------------------------------------------------------------------


@dataclass
class Config:
    """Settings"""

    n: int = cli.option(3, "a number above 0")
    zero: int = cli.option(0, "0 has a meaning")
    rate: float = cli.option(0.5, "above 0")
    decay: float = cli.option(0.1, "0 or more", least=0)
    name: str = cli.option("a", "a name")
    note: str = cli.adjustable("", "100% free")
    flag: bool = cli.option(False, "a switch")
    maybe: bool = cli.option(None, "a switch with three positions")
    switch: bool = cli.option(False, "a switch that is off", action=cli.SWITCH)
    number: float = cli.option(None, "a number or none")

    def __post_init__(self):
        cli.check_fields(self)


def parse(*argv, base=None):
    """Return the Config of these flags. base: values of a preset, which are below flags."""
    return cli.parse_configs(argv, "words", [Config], {}, lambda given: base or {})[0]


def test_a_flag_beats_the_preset_beats_the_default():
    assert parse() == Config()
    config = parse("--n", "5", "--no-maybe", "--flag", base={"n": 4, "zero": 2, "other": 1})
    assert (config.n, config.zero, config.rate, config.flag) == (5, 2, 0.5, True)
    assert config.maybe is False
    assert config.note == ""


@pytest.mark.parametrize(
    "values, part",
    [
        ({"n": 0}, "--n is 0; it must be at least 1"),
        ({"n": 2**32 + 1}, "at most 2**32"),
        ({"n": True}, "--n is True, not of type int"),
        ({"n": 1.0}, "not of type int"),
        ({"zero": -1}, "at least 0"),
        ({"rate": 0.0}, "above 0"),
        ({"rate": float("nan")}, "--rate is nan; it must be above 0"),
        ({"rate": float("inf")}, "at most 2**32"),
        ({"decay": -0.1}, "at least 0"),
        ({"decay": float("nan")}, "at least 0"),
        ({"name": ""}, "--name is empty"),
        ({"name": None}, "not of type str"),
        ({"flag": 1}, "not of type bool"),
    ],
    ids=str,
)
def test_fields_are_checked(values, part):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert part in str(error.value)
    assert Config(n=1, zero=0, decay=0.0, note="").n == 1


@pytest.mark.parametrize("flag", ["init", "data", "out", "attn", "resume", "export", "device"])
@pytest.mark.parametrize("form", [["--{}", ""], ["--{}="]], ids=["two words", "one word"])
def test_empty_values_are_refused(tiny, flag, form):
    refused([*tiny, *(part.format(flag) for part in form)], f"--{flag} is empty", "leave")
    assert not Path("out").exists()


@pytest.mark.parametrize("flag", ["attn", "optim", "adapter"])
def test_modules_are_looked_up_before_the_data(tiny, flag):
    refused([*tiny, "--data", "missing.txt", f"--{flag}", "nix"], "no module 'nix'")


@pytest.mark.parametrize("argument", ["caf\udce9", "--out=caf\udce9", "a\0b"])
def test_arguments_are_text(tiny, argument):
    message = refused([*tiny, "--out", argument], "is not UTF-8 text")
    assert message.isprintable()


def test_parser_errors_are_value_errors():
    for argv in (["--nn", "3"], ["--n", "x"], ["--n"], ["more"], ["--fla"]):
        refused(argv, "--help lists every flag", main=lambda argv: parse(*argv))


def test_help_shows_what_a_call_without_flags_would_use(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help", base={"n": 4})
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: ")
    assert "[--flag value ...] words" in text
    assert "--n N a number above 0 (default: 4)" in text
    assert "0 has a meaning (default: 0)" in text
    assert "100% free" in text
    assert "(default: 0.5)" in text
    assert "(default: a)" in text
    assert "None" not in text
    assert "False" not in text
    assert "--maybe, --no-maybe" in text
    assert "--no-switch" not in text
    assert parse("--switch").switch is True
    refused(["--no-switch"], "--no-switch", main=lambda argv: parse(*argv))


# -- how scripts end -------------------------------------------------------------------------------


def fail(error):
    raise error


OUTCOMES = [
    (lambda: None, 0, ""),
    (lambda: {"loss": 1.0}, 0, ""),
    (lambda: [1, 2], 0, ""),
    (lambda: {"signal": signal.SIGTERM}, 143, ""),
    (lambda: fail(ValueError("no\nway")), 2, "no way"),
    (lambda: fail(FloatingPointError("nan")), 1, "nan"),
    (lambda: fail(RecursionError()), 2, "nested too deeply"),
    (lambda: open("nowhere/file"), 2, "cannot use nowhere/file (No such file"),
    (lambda: torch.empty(2**60), 2, "out of memory"),
    (lambda: fail(torch.OutOfMemoryError("CUDA out of memory")), 2, "--micro-batch"),
    (lambda: fail(MemoryError()), 2, "out of memory"),
    (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped"),
    (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped"),
    (lambda: signal.raise_signal(signal.SIGHUP), 129, "stopped"),
]


@pytest.fixture
def own_signals():
    """Give back the signal handlers after a test that sets them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.mark.parametrize("main, status, part", OUTCOMES, ids=range(len(OUTCOMES)))
@pytest.mark.parametrize("stray", [{}, {"LOCAL_RANK": "1"}, {"RANK": "1"}], ids=str)
def test_how_scripts_end(main, status, part, stray, own_signals, monkeypatch, capsys):
    for name, value in stray.items():  # a single variable, left over from some torchrun
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        cli.run_main(main)
    message = capsys.readouterr().err
    assert end.value.code == status
    assert message.count("\n") == bool(part)
    assert part in message


def test_bugs_keep_their_traceback(own_signals, monkeypatch):
    with pytest.raises(KeyError):
        cli.run_main(lambda: {}["x"])
    monkeypatch.setenv("FIVEFOLD_TRACEBACK", "1")
    with pytest.raises(ValueError):
        cli.run_main(lambda: fail(ValueError("x")))


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """Two that are pending together, as when a terminal is closed, show no traceback."""
    source = """
import os, signal, sys, time
from support import cli

def main():
    print("running", flush=True)
    time.sleep(60)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # no nohup
cli.run_main(main)
"""
    command = [sys.executable, "-c", source]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    assert process.stdout.readline() == "running\n"
    for signum in (signal.SIGSTOP, signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(signum)
    message = process.communicate(timeout=30)[1]
    assert process.returncode in (128 + signal.SIGHUP, 128 + signal.SIGTERM)
    assert message.strip() == "-c: stopped before its end"


def test_a_signal_while_an_error_waits_for_that_of_rank_0():
    source = """
import torch
from support import cli

def main():
    print("running", flush=True)
    raise ValueError("x")

cli.run_main(main)
"""
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, **torchrun, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "running\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert message == "", "only rank 0 says that it was stopped"


def test_nohup_is_respected(own_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda: signal.raise_signal(signal.SIGHUP))
    assert end.value.code == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_exit_status_of_the_script(tmp_path):
    done = run_script("train.py", "--steps", "0", cwd=tmp_path, env={"LOCAL_RANK": "1"})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "train.py: --steps is 0; it must be at least 1 and at most 2**32\n"


SIGNALS_AND_SCRIPTS = [(signal.SIGTERM, "train.py"), (signal.SIGHUP, "train.py")]
SIGNALS_AND_SCRIPTS += [(signal.SIGINT, script) for script in SCRIPTS]


@pytest.mark.parametrize("signum, script", SIGNALS_AND_SCRIPTS)
def test_signals_during_the_imports_end_in_a_line(tmp_path, signum, script):
    # in place of torch, a module whose import takes a minute
    slow_import = "print('importing', flush=True)\nimport time; time.sleep(60)"
    (tmp_path / "torch.py").write_text(slow_import)
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / script)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # no nohup
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signum)
    message = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signum
    assert message.strip() == f"{Path(script).name}: stopped before its end"


# -- output that is lost ---------------------------------------------------------------------------

FLAGS = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 16 --batch-size 4 --eval-batches 1"
FLAGS = f"{FLAGS} --eval-every 1 --sample 0 --device cpu --data text.txt --out run".split()


def test_output_that_cannot_be_written_ends_no_run(tiny):
    """The reader of stdout goes away, and stderr is a full disk."""
    read_end, write_end = os.pipe()
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "train.py"), *FLAGS, "--steps", "8"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=write_end,
            stderr=full,
        )
    os.close(write_end)
    os.read(read_end, 1)  # read one byte and go away, as `head -c 1` does
    os.close(read_end)
    assert process.wait(100) == 0
    assert torch.load("run/ckpt.pt", weights_only=True)["step"] == 8


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_the_caller_has_closed(name, own_signals, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda: print("a line") or fail(ValueError("no")))
    assert end.value.code == 2


@pytest.mark.parametrize("rank, message", [("0", "x.py: no\n"), ("1", "x.py: process 1: no\n")])
def test_an_error_of_one_process_alone_is_shown(rank, message, own_signals, monkeypatch, capsys):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    for name, value in {**environment, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    # record the waiting and the exit of the process, instead of doing them
    waits = []
    exits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(sys, "argv", ["dir/x.py"])
    with pytest.raises(SystemExit):
        cli.run_main(lambda: fail(ValueError("no")))
    assert capsys.readouterr().err == message
    assert exits == [2]
    assert len(waits) == int(rank), "only ranks above 0 should wait for torchrun to end them"
