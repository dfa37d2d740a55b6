"""Run Python sources in forks of this process, which has imported torch already.

Each line of stdin is a list of jobs in JSON, which run at the same time. A job is [source, argv,
environment, folder]. For each, the answer has [exit status, stdout, stderr].
"""

import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
import traceback

# what our scripts import
import numpy  # noqa: F401
import safetensors  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch.distributed.tensor  # noqa: F401
import tqdm  # noqa: F401

with contextlib.suppress(ModuleNotFoundError):
    import triton  # noqa: F401

TIMEOUT = 300  # seconds

gc.freeze()  # the forks need not collect what was imported


def run(source, argv, environment, folder):
    """Do what `python -c source *argv` would do, and return its exit status."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *argv]
    sys.path[0] = ""
    if environment.get("PYTHONPATH"):
        sys.path[1:1] = environment["PYTHONPATH"].split(os.pathsep)
    try:
        exec(source, {"__name__": "__main__"})
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(job):
    """Start a job in a fork; return its process id, stdout and stderr."""
    stdout = tempfile.TemporaryFile()
    stderr = tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        signal.alarm(TIMEOUT)  # ends a job that hangs
        status = run(*job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return pid, stdout, stderr


def read(file):
    file.seek(0)
    return file.read().decode()


for line in sys.stdin:
    processes = [fork(job) for job in json.loads(line)]
    outcomes = []
    for pid, stdout, stderr in processes:
        _, status = os.waitpid(pid, 0)
        outcomes.append([os.waitstatus_to_exitcode(status), read(stdout), read(stderr)])
    print(json.dumps(outcomes), flush=True)
