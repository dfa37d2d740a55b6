"""Run jobs: cached on disk, in parallel, until a deadline; an interrupted GPT goes on later."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import train
from experiments.provenance import code_hashes, plugin_modules
from support.files import remove_stale_temp_files, write_json
from support.run_folder import lock_folder

CACHE = Path("out", "studies")


def hash_of(key):
    """Return a file name for a key of JSON values."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]


def disk_cache(folder, key, compute):
    """Return the cached result for this key, or else call compute() and cache its result.

    Key and result must be JSON values. The key must contain everything the result depends on.
    compute: None only looks, and returns None if there is nothing.
    """
    path = Path(folder) / f"{hash_of(key)}.json"
    result = read_cached(path, key)
    if result is None and compute:
        remove_stale_temp_files(folder, ["*.json"])
        write_json(path, {"key": key, "result": compute()})
        result = read_cached(path, key)
    return result


def read_cached(path, key):
    """Return the result that a file holds for this key; None if there is none, or it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        saved = json.loads(path.read_text())
        if saved["key"] == json.loads(json.dumps(key)):
            return saved["result"]
    return None


def run_train(flags, cache=None, look_only=False, deadline=float("inf")):
    """Train and return the result of train.main, with "seconds" and the evaluated rows, "history".

    flags: one string, as on the command line. cache: folder of the disk cache; None: no cache.
    look_only: return None if the result is not cached. deadline: a value of time.monotonic().

    Raises TimeoutError at the deadline and KeyboardInterrupt on a signal. The checkpoint then stays
    in out/study-HASH, and the next call continues there.
    """
    key = [flags, code_hashes("train", *plugin_modules(flags))]
    compute = partial(train_in, Path("out", f"study-{hash_of(key)}"), flags, deadline)
    if cache is None:
        return compute()
    return disk_cache(cache, key, None if look_only else compute)


def train_in(folder, flags, deadline):
    """Train in a folder, or continue the run that is there; remove the folder at the end.

    The result gets "data", the number of tokens of the text and their SHA-256.
    """
    start_time = time.perf_counter()
    seconds = 0.0
    if can_resume(folder):
        flags = f"--resume {folder}"
        with suppress(OSError, ValueError):  # it is missing, or empty after a power cut
            seconds = float((folder / "seconds").read_text())
    else:
        if folder.is_dir():
            lock = lock_folder(folder)  # ValueError if another process trains there
            shutil.rmtree(folder)
            lock.close()
        flags = f"{flags} --out {folder}"

    try:
        with stop_at(deadline), redirect_stdout(io.StringIO()):
            result = train.main([*shlex.split(flags), "--sample", "0"])
        if result["signal"] and can_resume(folder):  # not after the last step
            raise KeyboardInterrupt(result["signal"])
    except KeyboardInterrupt:
        if folder.is_dir():
            seconds += time.perf_counter() - start_time
            write_json(folder / "seconds", seconds)
        if time.monotonic() < deadline:
            raise
        raise TimeoutError(f"{folder} is saved") from None

    history = []
    for row in read_log(folder):
        if row["val_loss"]:
            history.append({name: float(text) for name, text in row.items()})
    result["data"] = train.load_checkpoint(folder)["data"]
    shutil.rmtree(folder)
    del result["out"]
    seconds += time.perf_counter() - start_time
    return {**result, "seconds": seconds, "history": history}


def can_resume(folder):
    """Return whether the folder holds a run with steps left.

    It may have none left and no result: if it was killed after its last save.
    """
    if not (folder / "ckpt.pt").is_file():
        return False
    saved = train.load_checkpoint(folder)
    return saved["step"] < saved["config"]["run"]["steps"]


def read_log(folder):
    """Return the rows of a run's log.csv as dicts of strings."""
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def stop_at(deadline):
    """Send this process SIGTERM at the deadline: train.py saves and stops, other code stops."""
    if deadline == float("inf"):
        yield
        return
    old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt
    seconds = max(0.0, deadline - time.monotonic())
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, old_handler)


def start_worker(gpu_queue, threads):
    """Set up a worker process: assign it one GPU, or else a share of the CPU cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    sys.stderr = open(os.devnull, "w")  # the parent has a progress bar
    if gpu_queue is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_queue.get()
    torch.set_num_threads(threads)


def parallel(
    function, jobs, workers=None, deadline=float("inf"), label="runs", look=None, per_gpu=1
):
    """Return [function(job) for job in jobs], computed by several processes.

    There are per_gpu processes for each visible GPU, or else one for each CPU core; or `workers`.
    function must be importable, and jobs and results are pickled. look(job) returns a result that
    is cached, else None. After the deadline, a value of time.monotonic(), no further job is
    started, and TimeoutError is raised once the running ones are done, or have raised one, too.
    With a disk cache inside `function`, the next call resumes there.
    """
    results = {}
    waiting = []
    for i, job in enumerate(jobs):
        found = look(job) if look else None
        if found is None:
            waiting.append((i, job))
        else:
            results[i] = found
    if not waiting:
        return [results[i] for i in range(len(jobs))]

    gpus = []
    if torch.cuda.is_available():
        default = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or default).split(",") * per_gpu
    workers = min(workers or len(gpus) or os.cpu_count(), len(waiting))

    # each worker takes one GPU from the queue
    context = multiprocessing.get_context("spawn")
    gpu_queue = context.Queue() if gpus else None
    for i in range(workers if gpus else 0):
        gpu_queue.put(gpus[i % len(gpus)])
    threads = max(1, os.cpu_count() // max(1, workers))
    pool = ProcessPoolExecutor(workers, context, start_worker, (gpu_queue, threads))

    running = {}  # future: index of its job
    bar = tqdm(total=len(jobs), initial=len(results), desc=label, unit="run", leave=False)
    try:
        while waiting or running:
            while waiting and len(running) < workers and time.monotonic() < deadline:
                i, job = waiting.pop(0)
                running[pool.submit(function, job)] = i
            if not running:
                done = f"{len(results)} of {len(jobs)} {label} are done"
                raise TimeoutError(f"time is up: {done}; the same command continues")
            finished = next(as_completed(running))
            i = running.pop(finished)
            if isinstance(finished.exception(), TimeoutError):  # it has saved what it had
                waiting.append((i, jobs[i]))
                continue
            results[i] = finished.result()
            bar.update()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return [results[i] for i in range(len(jobs))]
