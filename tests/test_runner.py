"""Running jobs: the cache on disk, processes, deadlines, and GPTs that are interrupted."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import train
from experiments import runner
from support.run_folder import lock_folder


def test_disk_cache_computes_once(tmp_path):
    calls = []

    def compute(key):
        calls.append(key)
        if key == "broken":
            raise KeyboardInterrupt
        return {"loss": 0.1 + 0.2, "curve": [1, None]}

    for key in (["a", 1], ["a", 1], ["a", 2], ["a", 1]):
        result = runner.disk_cache(tmp_path / "cache", key, lambda key=key: compute(key))
        assert result == {"loss": 0.1 + 0.2, "curve": [1, None]}
    assert calls == [["a", 1], ["a", 2]]
    assert runner.disk_cache(tmp_path / "cache", ["a", 3], None) is None
    with pytest.raises(KeyboardInterrupt):
        runner.disk_cache(tmp_path / "cache", "broken", lambda: compute("broken"))
    assert len(list((tmp_path / "cache").iterdir())) == 2, "nothing is left of an interrupted run"

    # every key has a file of its own
    folder = tmp_path / "many"
    for key in range(300):
        assert runner.disk_cache(folder, [key], lambda key=key: key) == key


def test_the_cache_removes_files_of_killed_processes(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    draft = tmp_path / f".{runner.hash_of(['a'])}.json.{dead.pid}"
    others = [tmp_path / f".note.{dead.pid}", tmp_path / f".b.json.{os.getpid()}"]
    for path in (draft, *others):
        path.touch()
    runner.disk_cache(tmp_path, ["b"], lambda: 1)
    assert not draft.exists()
    assert all(path.exists() for path in others)


DAMAGED = ["", "{", "null", "[]", '{"key": ["other"], "result": 2}', "[" * 100000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_cache_file_is_computed_again(tmp_path, content):
    path = tmp_path / f"{runner.hash_of(['a'])}.json"
    path.write_text(content)
    assert runner.disk_cache(tmp_path, ["a"], None) is None
    assert runner.disk_cache(tmp_path, ["a"], lambda: 1) == 1
    assert runner.disk_cache(tmp_path, ["a"], None) == 1


def square(x):
    if x == "fail":
        raise ValueError("no number")
    time.sleep(0.01 * (3 - x))
    return x * x


def test_parallel_keeps_the_order(monkeypatch):
    fork = multiprocessing.get_context("fork")  # unlike "spawn" it need not import torch again
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    assert runner.parallel(square, [1, 2, 3], workers=2) == [1, 4, 9]


def test_parallel_computes_only_what_is_not_cached():
    cached = {"first": 1, "second": 2}
    assert runner.parallel("never called", list(cached), look=cached.get) == [1, 2]


def test_parallel_passes_errors_on_and_stops():
    with pytest.raises(ValueError, match="no number"):
        runner.parallel(square, ["fail", 1], workers=1)


def test_parallel_stops_at_the_deadline():
    with pytest.raises(TimeoutError, match="0 of 2 runs are done; the same command continues"):
        runner.parallel(square, [1, 2], workers=1, deadline=time.monotonic())


def test_run_train_returns_history_and_caches(tiny):
    flags = " ".join([*tiny, "--steps", "4", "--eval-every", "2"])
    first = runner.run_train(flags, cache="cache")
    assert [row["step"] for row in first["history"]] == [2, 4]
    assert first["val_loss"] == first["history"][-1]["val_loss"]
    assert first["seconds"] > 0
    assert set(first["data"]) == {"tokens", "sha256"}
    assert "out" not in first
    os.remove("text.txt")  # a cached run needs no data
    assert runner.run_train(flags, cache="cache") == first


@pytest.fixture
def stop_at_step_3(monkeypatch):
    """Return a function that makes the next run wait at its third step, and calls `wait` there."""

    def make(wait):
        get_lr = train.get_lr

        def wait_once(step, run):
            if step == 3:
                monkeypatch.setattr(train, "get_lr", get_lr)
                wait()
            return get_lr(step, run)

        monkeypatch.setattr(train, "get_lr", wait_once)

    return make


def without_times(result):
    return {
        name: value for name, value in result.items() if "_per_s" not in name and name != "seconds"
    }


def test_a_run_goes_on_after_the_deadline(tiny, stop_at_step_3):
    flags = " ".join([*tiny, "--steps", "6", "--eval-every", "6"])
    whole = runner.run_train(flags)
    assert not list(Path("out").glob("study-*")), "a finished run leaves no folder"

    deadline = time.monotonic() + 0.5
    stop_at_step_3(lambda: time.sleep(max(0, deadline + 0.2 - time.monotonic())))
    with pytest.raises(TimeoutError, match="is saved"):
        runner.run_train(flags, cache="cache", deadline=deadline)
    assert not Path("cache").exists()
    (folder,) = Path("out").glob("study-*")
    assert (folder / "ckpt.pt").exists()

    result = runner.run_train(flags, cache="cache", deadline=time.monotonic() + 60)
    assert without_times(result) == without_times(whole)
    assert result["seconds"] > 0.5, "both parts count"
    assert not folder.exists()


def test_a_signal_before_the_deadline_interrupts(tiny, stop_at_step_3):
    flags = " ".join([*tiny, "--steps", "6", "--eval-every", "6"])
    stop_at_step_3(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        runner.run_train(flags, deadline=time.monotonic() + 60)
    assert runner.run_train(flags)["step"] == 6


def test_a_signal_after_the_last_step_loses_nothing(tiny, monkeypatch):
    """At the deadline, too: the run is complete, with its last held-out loss."""
    flags = " ".join([*tiny, "--steps", "4", "--eval-every", "4"])
    whole = runner.run_train(flags)
    evaluate = train.evaluate

    def evaluate_with_signal(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", evaluate_with_signal)
    result = runner.run_train(flags)
    assert result.pop("signal") == signal.SIGTERM
    whole.pop("signal")
    assert without_times(result) == without_times(whole)


def test_a_run_without_steps_left_starts_again(tiny, monkeypatch):
    """It was killed between its last save and its result; --resume would refuse it."""
    flags = " ".join([*tiny, "--steps", "4", "--eval-every", "4"])
    whole = runner.run_train(flags)

    def killed(folder):
        raise KeyError("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(runner.shutil, "rmtree", lambda *args, **options: None)
        patch.setattr(runner, "read_log", killed)
        with pytest.raises(KeyError):
            runner.run_train(flags)
    (folder,) = Path("out").glob("study-*")
    assert (folder / "ckpt.pt").exists()
    assert without_times(runner.run_train(flags)) == without_times(whole)
    assert not folder.exists()


def test_the_folder_of_a_running_process_is_left_alone(tiny):
    """Before its first save, its folder looks like one of a run that was killed."""
    flags = " ".join([*tiny, "--steps", "2"])
    key = [flags, runner.code_hashes("train", *runner.plugin_modules(flags))]
    folder = Path("out", f"study-{runner.hash_of(key)}")
    folder.mkdir(parents=True)
    (folder / "log.csv").write_text("step,lr\n")
    with lock_folder(folder), pytest.raises(ValueError, match="is in use by process"):
        runner.run_train(flags)
    assert (folder / "log.csv").exists()
    assert runner.run_train(flags)["step"] == 2


def test_a_damaged_log_is_no_obstacle(tiny, stop_at_step_3):
    """The checkpoint says how far a run is; a power cut may leave zeros at the end of log.csv."""
    flags = " ".join([*tiny, "--steps", "6", "--eval-every", "1"])
    whole = runner.run_train(flags)
    stop_at_step_3(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        runner.run_train(flags)
    (folder,) = Path("out").glob("study-*")
    log = folder / "log.csv"
    text = log.read_bytes()
    last_row = text.splitlines()[-1]
    log.write_bytes(text.removesuffix(last_row + b"\n") + bytes(len(last_row)))
    (folder / "seconds").write_bytes(b"")
    result = runner.run_train(flags)
    assert result["val_loss"] == whole["val_loss"]
    assert not folder.exists()


def test_a_deadline_before_the_first_step(tiny):
    """Nothing is saved then, and nothing is in the way of the next call."""
    flags = " ".join([*tiny, "--steps", "2"])
    with pytest.raises(TimeoutError):
        runner.run_train(flags, deadline=time.monotonic())
    assert runner.run_train(flags)["step"] == 2


def test_parallel_waits_for_what_is_paused(monkeypatch):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    deadline = time.monotonic() + 0.5
    with pytest.raises(TimeoutError, match="1 of 2 runs are done"):
        runner.parallel(pause_or_finish, [deadline, 0.0], workers=2, deadline=deadline)


def pause_or_finish(deadline):
    if deadline:
        time.sleep(max(0, deadline - time.monotonic()))
        raise TimeoutError("saved")
    return 1


def test_a_job_keeps_its_place_beside_cached_ones(monkeypatch):
    """And after the deadline no job waits in a worker's queue."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    cached = {1: "first", 3: "last"}
    assert runner.parallel(square, [1, 2, 3], workers=1, look=cached.get) == ["first", 4, "last"]
    with pytest.raises(TimeoutError, match="1 of 3 runs are done"):
        runner.parallel(slow, [1.0] * 3, workers=1, deadline=time.monotonic() + 0.5)


def slow(seconds):
    if seconds == 0:
        raise ValueError("no time")
    time.sleep(seconds)


def test_an_error_stops_the_other_workers(monkeypatch):
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    start_time = time.monotonic()
    with pytest.raises(ValueError, match="no time"):
        runner.parallel(slow, [20, 0], workers=2)
    assert time.monotonic() - start_time < 10


class FakePool:
    """Stands for ProcessPoolExecutor: runs a job at once, and records how it was set up."""

    def __init__(self, workers, context, initializer, arguments):
        gpu_queue, threads = arguments
        gpus = [gpu_queue.get(timeout=10) for _ in range(workers)] if gpu_queue else []
        FakePool.made = {"workers": workers, "gpus": gpus, "threads": threads}

    def submit(self, function, job):
        future = Future()
        future.set_result(function(job))
        return future

    def shutdown(self, cancel_futures):
        pass


def test_workers_share_gpus_or_cores(monkeypatch):
    def made(n_jobs, **options):
        assert runner.parallel(abs, range(n_jobs), **options) == list(range(n_jobs))
        return FakePool.made

    monkeypatch.setattr(runner, "ProcessPoolExecutor", FakePool)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert made(20) == {"workers": 8, "gpus": [], "threads": 1}
    assert made(2) == {"workers": 2, "gpus": [], "threads": 4}
    assert made(20, workers=3) == {"workers": 3, "gpus": [], "threads": 2}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert made(20) == {"workers": 2, "gpus": ["0", "1"], "threads": 4}
    assert made(20, per_gpu=2) == {"workers": 4, "gpus": ["0", "1"] * 2, "threads": 2}
    assert made(20, workers=3) == {"workers": 3, "gpus": ["0", "1", "0"], "threads": 2}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert made(20)["gpus"] == ["5", "7"]


def test_a_worker_is_set_up(monkeypatch):
    """Ctrl-C reaches all processes of a terminal; the parent stops its workers."""
    handlers = {}
    threads = []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    gpu_queue = multiprocessing.Queue()
    gpu_queue.put("1")
    runner.start_worker(gpu_queue, 3)
    assert handlers == {signal.SIGINT: signal.SIG_IGN}
    assert threads == [3]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    runner.start_worker(None, 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_cached_run_is_that_of_its_code(tmp_path, monkeypatch):
    """The key has the hashes of train.py, of all plug-ins in the flags, and what they import."""
    monkeypatch.chdir(tmp_path)
    versions = {"train": 1, "laser": 1, "softmax": 1}

    def code_hashes(*modules):
        return {module: versions[module] for module in modules}

    runs = []
    monkeypatch.setattr(runner, "code_hashes", code_hashes)
    monkeypatch.setattr(
        runner, "train_in", lambda folder, flags, deadline: runs.append(folder) or 7
    )
    assert runner.run_train("--attn laser", "cache", look_only=True) is None
    for n_runs, changes in ((1, {}), (1, {}), (2, {"train": 2}), (3, {"laser": 2})):
        versions.update(changes)
        assert runner.run_train("--attn laser", "cache") == 7
        assert len(set(runs)) == len(runs) == n_runs
    assert runner.run_train("--attn laser", "cache", look_only=True) == 7
    versions["laser"] = 3
    assert runner.run_train("--attn softmax", "cache") == 7
    assert runner.run_train("--attn laser", "cache", look_only=True) is None


def test_flags_are_split_as_by_a_shell(tiny):
    os.rename("text.txt", "my text.txt")
    flags = " ".join([*tiny, "--data", "'my text.txt'", "--steps", "1"])
    assert runner.run_train(flags)["step"] == 1


def test_a_deadline_does_not_outlast_its_block():
    received = []
    old_handler = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        with runner.stop_at(time.monotonic() + 0.1):
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        time.sleep(0.2)
        assert received == []
    finally:
        signal.signal(signal.SIGTERM, old_handler)
