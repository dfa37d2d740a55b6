"""Set up before any test: Triton's interpreter where there is no GPU, and the fixture `tiny`."""

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from tests import interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    interpreter.speed_up()


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")


def pytest_collection_finish(session):
    """Let the garbage collector pass over what was imported, which cost 7% of the time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Draw the same random numbers in a test whichever tests ran before it."""
    torch.manual_seed(0)


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
