"""What several test files share: tolerances, tiny models, refused commands, scripts."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

REPOSITORY = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels run for real or interpreted


def gpu(test):
    """Mark a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(skip(test))


def assert_close(name, ours, eager, truth):
    """Our error against float64 is at most twice that of eager PyTorch in the same dtype.

    On top comes a floor: 1e-5, or 1e-5 of the largest value, and half a unit in its last place.
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
    defaults = {"vocab_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 16}
    model = train.GPT(train.GPTConfig(**{**defaults, **shape}), dtype=dtype)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            value = torch.randn(p.shape, generator=generator)
            p.copy_(value * 0.3 if p.dim() > 1 else value + 1)
    return model


def is_equal(a, b):
    """Two nests of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


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


def run_script(script, *argv, env=None, **options):
    """Run a script of the repository in its own process, in the current folder."""
    command = [sys.executable, str(REPOSITORY / script), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


FORKS = """
import contextlib, json, os, sys, tempfile, traceback
import numpy, safetensors, tiktoken, torch, torch.distributed.tensor, tqdm
with contextlib.suppress(ModuleNotFoundError):
    import triton

outcomes = []
for source in json.load(sys.stdin):
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 0
            try:
                exec(source, {"__name__": "__main__"})
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        outcomes.append([status, output.read().decode()])
print(json.dumps(outcomes))
"""


def run_forked(sources, env=None, **options):
    """Run each Python source in a fork of one process that has imported torch already.

    As good as a process for each, but importing torch takes seconds. Returns a list of (exit
    status, stdout and stderr).
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
