"""What several test files share: tolerances, tiny models, refused commands, scripts."""

import contextlib
import functools
import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from support import cli, data
from support.tokenizer import get_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels run for real or interpreted


def gpu(test):
    """Mark a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(skip(test))


def assert_close(name, ours, eager, truth):
    """Assert that our error is at most twice the error of eager PyTorch in the same dtype.

    ours, eager and truth, which is in float64, have the same shape. A floor is added to what is
    allowed: 1e-5 of the largest value, or of 1, and half a unit in its last place.
    """
    assert ours.isfinite().all(), f"{name}: not finite"
    largest = truth.abs().max().item()
    error = (ours.double() - truth).abs().max().item()
    eager_error = (eager.double() - truth).abs().max().item()
    floor = 1e-5 * max(1.0, largest) + torch.finfo(ours.dtype).eps / 2 * largest
    allowed = 2 * eager_error + floor
    assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


def small_gpt(dtype=torch.float32, **shape):
    """A GPT with large random weights, so that every part matters."""
    config = {"vocab_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 16}
    config.update(shape)
    model = train.GPT(train.GPTConfig(**config), dtype=dtype)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(0.3 * noise)
            else:  # a gain
                p.copy_(1 + noise)
    return model


def is_equal(a, b):
    """Return whether two values are equal bit for bit: tensors, numbers, or nested containers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_equal, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def refused(argv, *parts, main=train.main):
    """Assert that main(argv) raises ValueError with one line that has all the parts; return it."""
    with pytest.raises(ValueError) as caught:
        main(argv)
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message
    return message


def fails(function, *arguments, parts=()):
    """Assert that the call raises ValueError with one printable line that has all the parts."""
    message = refused(arguments, *parts, main=lambda arguments: function(*arguments))
    assert message.isprintable(), ascii(message)
    return message


def record_calls(monkeypatch, module, name):
    """Let a function keep the arguments of each call, {parameter: value}; return their list."""
    function = getattr(module, name)
    calls = []

    def recording(*args, **options):
        calls.append(inspect.signature(function).bind(*args, **options).arguments)
        return function(*args, **options)

    monkeypatch.setattr(module, name, recording)
    return calls


def read_held_out(path, n, T):
    """Return inputs and targets (n, T): the first n sequences of T + 1 held-out bytes of a text."""
    text = data.load_dataset(path, get_tokenizer("byte"), T, Path(".tokens"))
    tokens = torch.from_numpy(text.val[: n * (T + 1)].astype(np.int64)).view(n, T + 1)
    return tokens[:, :-1], tokens[:, 1:]


def parse_flags(flags):
    """Return GPTConfig, RunConfig and LaunchConfig of one string of train.py's flags."""
    configs = [train.GPTConfig, train.RunConfig, train.LaunchConfig]
    return cli.parse_configs(flags.split(), "", configs, train.PLUGINS, train.starting_values)


@contextlib.contextmanager
def without_rights():
    """Drop root's rights in this block, so that file permissions count if root runs the tests."""
    is_root = os.geteuid() == 0
    if is_root:
        os.chmod(".", 0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@functools.cache
def start_fork_server():
    """Start the process that runs our Python sources. It ends when this one closes its stdin."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # each job brings its own
    command = [sys.executable, str(REPOSITORY / "tests/fork_server.py")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def run_together(environments, source, *argv, cwd="."):
    """Run a Python source as `python -c` would, once per environment, all at the same time.

    The processes are forks of one that has imported torch already, as that takes seconds. Returns
    a subprocess.CompletedProcess for each.
    """
    jobs = []
    for environment in environments:
        environment = {"PYTHONPATH": str(REPOSITORY), **os.environ, **environment}
        jobs.append([source, [str(arg) for arg in argv], environment, os.path.abspath(cwd)])
    server = start_fork_server()
    print(json.dumps(jobs), file=server.stdin, flush=True)
    outcomes = json.loads(server.stdout.readline())
    return [subprocess.CompletedProcess("python", *outcome) for outcome in outcomes]


def run_code(source, *argv, env=None, cwd="."):
    """Run a Python source in its own process, in the current folder."""
    return run_together([env or {}], source, *argv, cwd=cwd)[0]


def run_script(script, *argv, env=None, cwd="."):
    """Run a script of the repository in its own process, in the current folder."""
    path = REPOSITORY / script
    source = f"""
import runpy, sys
sys.path[0] = {str(path.parent)!r}
sys.argv[0] = {str(path)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return run_code(source, *argv, env=env, cwd=cwd)


def run_two_processes(source, *argv):
    """Run a Python source in two processes, started with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again from here on
    environments = []
    for rank in ("0", "1"):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments.append({**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"})
    return run_together(environments, source, *argv)
