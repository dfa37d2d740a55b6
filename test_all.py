"""Run every test: python test_all.py [-k name] [-m gpu]

Anything after the name goes to pytest. Without a GPU the kernels run in Triton's interpreter, and
what needs a GPU is skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent / "tests"


def main():
    argv = sys.argv[1:]
    options = ["-rfEs", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
    # the interpreter computes lanes that a tl.where drops afterwards
    options += ["-W", "ignore::RuntimeWarning:triton.runtime.interpreter"]
    if not argv and not torch.cuda.is_available() and importlib.util.find_spec("xdist"):
        argv = ["-n", str(os.cpu_count()), "--dist", "worksteal"]
    if "-n" in argv:
        os.environ["OMP_NUM_THREADS"] = "1"  # many processes, each with one thread
    paths = [] if any(Path(arg.partition("::")[0]).exists() for arg in argv) else [str(TESTS)]
    return pytest.main([*paths, *options, *argv])


if __name__ == "__main__":
    sys.exit(main())
