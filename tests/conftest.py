"""Set up before any test: Triton's interpreter where there is no GPU, and the fixture `tiny`."""

import functools
import os
import random
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton


def speed_up_interpreter():
    """Let a device function patch triton.language at its first call only, not at every call.

    A launch has patched it already. Without this, kernels take a third longer.
    """
    try:
        from triton.runtime.interpreter import InterpretedFunction, _patch_lang
    except ImportError:  # no Triton, or another version of it
        return
    patch_once = functools.cache(_patch_lang)

    def call(device_function, *args, **kwargs):
        patch_once(device_function.fn)
        return device_function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


speed_up_interpreter()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")


@pytest.fixture(autouse=True)
def free_gpu_memory():
    """Give memory back after each test: other test processes share the GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Work in an empty folder with a small text; return the flags for a run of a second.

    Runs do not plot their losses, which takes longer than the rest. `plotted` undoes that.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.runlog.RunLog.plot", lambda log: None)
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil éclairs".split()
    rng = random.Random(0)
    lines = [" ".join(rng.choices(words, k=8)) for _ in range(400)]
    Path("text.txt").write_text("\n".join(lines))
    flags = "--data text.txt --n-layer 2 --n-embd 32 --n-head 2 --block-size 16 --batch-size 4"
    return f"{flags} --steps 40 --lr 3e-3 --eval-batches 2 --sample 5 --device cpu".split()
