"""What several test files share: tolerances, tiny models, refused commands."""

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
    """The call raises ValueError with one sentence that has all the parts."""
    with pytest.raises(ValueError) as caught:
        main(argv)
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message
    return message


def run_script(script, *argv, env=None, **options):
    """Run a script of the repository in a process of its own, in the present folder."""
    command = [sys.executable, str(REPOSITORY / script), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)
