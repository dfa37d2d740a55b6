"""support/run_folder.py: runs are found, and a folder holds one run at a time."""

import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from support import files, run_folder
from tests.common import fails, without_rights


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(folder, age=0):
    Path(folder).mkdir(parents=True)
    Path(folder, "ckpt.pt").touch()
    os.utime(Path(folder, "ckpt.pt"), (10**9 - age, 10**9 - age))


def test_runs_are_found_by_name_or_age():
    assert run_folder.find_run("") is None and run_folder.find_run(None) is None
    fails(run_folder.find_run, "newest", parts=["no run under out/"])
    Path("out/unfinished").mkdir(parents=True)
    Path("out/file").touch()
    Path("out/gone").mkdir()
    Path("out/gone/ckpt.pt").symlink_to("nowhere")  # as if deleted while the folder is listed
    fails(run_folder.find_run, "newest", parts=["no run under out/"])
    make_run("out/e", age=2)  # saved last, although it was made first
    make_run("out/c", age=5)
    make_run("out/d", age=9)
    make_run("elsewhere")
    assert run_folder.find_run("newest") == Path("out/e")
    assert run_folder.find_run("out/d") == Path("out/d")
    assert run_folder.find_run("elsewhere", resume=True) == Path("elsewhere")


def test_a_model_of_the_hub_is_no_run_to_resume(monkeypatch):
    fetched = []
    monkeypatch.setattr(run_folder.hub, "fetch", lambda name: fetched.append(name) or Path("hub"))
    fails(run_folder.find_run, "org/name", True, parts=["org/name holds no run"])
    assert not fetched
    assert run_folder.find_run("org/name") == Path("hub")
    assert fetched == ["org/name"]


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "a\0b", "hf", "text", "caf\udce9", "fifo"])
def test_what_is_no_run_is_refused(name):
    Path("text").touch()
    Path("hf").mkdir()
    Path("hf/config.json").touch()
    Path("fifo").mkdir()
    os.mkfifo("fifo/ckpt.pt")
    fails(lambda: run_folder.find_run(name, resume=True))
    if name == "hf":
        assert run_folder.find_run(name) == Path("hf")
    else:
        fails(run_folder.find_run, name)


def test_folders_without_permission_are_refused():
    Path("closed").mkdir(mode=0)
    Path("out").mkdir(mode=0o555)
    with without_rights():
        fails(
            run_folder.find_run, "closed", parts=["cannot read closed/ckpt.pt (Permission denied)"]
        )
        for out in ("closed", "closed/b", "out", ""):
            message = fails(
                run_folder.claim_folder(out, "a").__enter__, parts=["Permission denied"]
            )
            assert message.startswith(f"cannot write in {out or 'out'} ("), message
    os.chmod("closed", 0o755)


def test_a_new_run_takes_the_first_free_folder():
    with run_folder.claim_folder("", "softmax") as a, run_folder.claim_folder("", "softmax") as b:
        assert (a, b) == (Path("out/softmax"), Path("out/softmax-2"))
        assert a.is_dir() and b.is_dir()
        (a / "ckpt.pt").touch()
        Path("out/softmax-3").touch()
    assert sorted(os.listdir("out")) == ["softmax", "softmax-3"], "empty folders are removed"
    with run_folder.claim_folder("", "softmax") as folder:
        assert folder == Path("out/softmax-2")
    with run_folder.claim_folder("", "softmax,simplicial:w1=4:w2=8") as folder:
        assert folder == Path("out/softmax-simplicial-w1-4-w2-8")
    with run_folder.claim_folder("", "softmax:tau=0.5") as folder:
        assert folder == Path("out/softmax-tau-0.5")
    with run_folder.claim_folder("", ".mine:") as folder:
        assert folder == Path("out/mine"), "not hidden"
    with run_folder.claim_folder("", "a" * 300) as folder:
        assert folder == Path("out", "a" * 60)


def test_claims_at_the_same_time_get_different_folders():
    barrier = threading.Barrier(8)
    folders = []

    def claim():
        barrier.wait()
        with run_folder.claim_folder("", "a") as folder:
            folders.append(folder.name)
            barrier.wait()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(folders) == ["a", *(f"a-{n}" for n in range(2, 9))]


@pytest.mark.parametrize("out", ["a", "x/y/a", "."])
def test_a_folder_is_claimed_once(out):
    """The same --out twice, --resume twice, and one of each."""
    with run_folder.claim_folder(out, "") as folder:
        assert folder == Path(out)
        for origin in (None, folder):
            message = fails(
                run_folder.claim_folder(out, "", origin).__enter__, parts=["is in use by"]
            )
            assert f"process {os.getpid()} on " in message
        (folder / "ckpt.pt").touch()
    assert os.listdir(folder) == ["ckpt.pt"]
    for _ in range(2):
        with run_folder.claim_folder("", "", folder) as again:
            assert again == folder
            fails(run_folder.claim_folder("", "", folder).__enter__, parts=["is in use by"])
    fails(
        run_folder.claim_folder(out, "").__enter__, parts=["already holds a run", f"--resume {out}"]
    )


def test_a_run_whose_name_is_not_printable_is_named():
    make_run("line\nfeed")
    fails(run_folder.claim_folder("line\nfeed", "").__enter__, parts=["already holds a run"])


def test_a_claim_ends_with_kill_9():
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run_folder.claim_folder("a", ""):
            os.write(write_end, b"x")
            time.sleep(60)
    os.read(read_end, 1)
    fails(run_folder.claim_folder("a", "").__enter__, parts=[f"process {pid} on "])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.listdir("a") == [run_folder.LOCK]
    with run_folder.claim_folder("a", ""):
        assert Path("a", run_folder.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert os.path.isdir("a") and os.listdir("a") == [], "it was not a new folder"


@pytest.mark.parametrize("is_made_again", [False, True])
def test_a_claim_is_not_fooled_by_a_lock_file_that_is_deleted_meanwhile(monkeypatch, is_made_again):
    """Between our open() and flock() the run before may end, and delete the file we have open.

    A third one may even have made the file again.
    """
    if run_folder.fcntl is None:
        pytest.skip("needs fcntl")
    flock = run_folder.fcntl.flock
    calls = []

    def late_flock(lock, how):
        calls.append(how)
        if len(calls) == 1:
            os.remove(Path("a", run_folder.LOCK))
            if is_made_again:
                Path("a", run_folder.LOCK).touch()
        flock(lock, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", late_flock)
    with run_folder.claim_folder("a", ""):
        monkeypatch.setattr(run_folder.fcntl, "flock", flock)
        fails(run_folder.claim_folder("a", "").__enter__, parts=["in use"])
    assert len(calls) == 2


def test_a_link_in_place_of_the_lock_is_not_followed():
    Path("victim").write_text("precious")
    os.mkdir("a")
    os.symlink("../victim", Path("a", run_folder.LOCK))
    fails(run_folder.claim_folder("a", "").__enter__, parts=["cannot write in a"])
    assert Path("victim").read_text() == "precious"


def test_a_file_in_place_of_the_lock_is_kept():
    os.mkdir("a")
    Path("a", run_folder.LOCK).write_text("precious")
    fails(run_folder.claim_folder("a", "").__enter__, parts=[run_folder.LOCK, "move it away"])
    assert Path("a", run_folder.LOCK).read_text() == "precious"


@pytest.mark.parametrize("text", ['{"architectures": ["LlamaForCausalLM"]}', "[]", "my notes"])
def test_resuming_keeps_a_config_that_is_not_of_a_run(text):
    os.mkdir("a")
    Path("a", "config.json").write_text(text)
    claim = run_folder.claim_folder("", "", origin=Path("a"))
    fails(claim.__enter__, parts=["config.json is not of a run"])
    assert Path("a", "config.json").read_text() == text
    Path("a", "config.json").write_text('{"command": "train.py"}')
    with run_folder.claim_folder("", "", origin=Path("a")) as folder:
        assert folder == Path("a")


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="No locks available"),
        run_folder.claim_folder("a", "") as a,
    ):
        (a / "ckpt.pt").touch()
    assert os.listdir("a") == ["ckpt.pt"]


@pytest.mark.parametrize("name", ["config.json", "log.csv", "loss.png"])
@pytest.mark.parametrize("is_link", [False, True])
def test_files_that_would_be_overwritten_are_refused(name, is_link):
    Path("mine").mkdir()
    path = Path("mine", name)
    if is_link:
        path.symlink_to("nowhere")
    else:
        path.write_text("mine")
    fails(
        run_folder.claim_folder("mine", "").__enter__, parts=[f"mine/{name} would be overwritten"]
    )
    assert os.listdir("mine") == [name] and (is_link or path.read_text() == "mine")


def test_other_files_of_the_user_stay():
    Path("home").mkdir()
    names = [".backup.2024", "notes.txt", ".lock", "ckpt.pt.old", ".ckpt.pt.20241128"]
    for name in names:
        Path("home", name).write_text(name)
    dead = subprocess.Popen(["true"])
    dead.wait()
    Path("home", f".ckpt.pt.{dead.pid}").touch()
    with run_folder.claim_folder("home", ""):
        pass
    assert sorted(os.listdir("home")) == sorted(names)
    assert all(Path("home", name).read_text() == name for name in names)


def test_a_run_that_has_saved_nothing_is_in_nobodys_way():
    """As after a learning rate that was too large: the same --out is tried again."""
    Path("a").mkdir()
    Path("a/notes.txt").touch()
    with pytest.raises(KeyError), run_folder.claim_folder("a", "") as folder:
        (folder / "log.csv").touch()
        (folder / "config.json").touch()
        raise KeyError
    assert os.listdir("a") == ["notes.txt"]
    with run_folder.claim_folder("a", "") as folder:
        (folder / "log.csv").touch()
        (folder / "ckpt.pt").touch()
    assert sorted(os.listdir("a")) == ["ckpt.pt", "log.csv", "notes.txt"]
    with pytest.raises(KeyError), run_folder.claim_folder("", "", Path("a")):
        raise KeyError
    assert sorted(os.listdir("a")) == ["ckpt.pt", "log.csv", "notes.txt"]


def test_a_failed_run_leaves_no_empty_folder_behind():
    with pytest.raises(KeyError), run_folder.claim_folder("a", ""):
        raise KeyError
    assert not Path("a").exists()
    Path("b").mkdir()
    with pytest.raises(KeyError), run_folder.claim_folder("b", ""):
        raise KeyError
    assert os.listdir("b") == []


@pytest.mark.parametrize("out", ["text", "text/a", "x" * 300, "a\0b", "caf\ud800", "locked"])
def test_what_can_be_no_folder_is_refused(out):
    Path("text").touch()
    Path("locked", run_folder.LOCK).mkdir(parents=True)
    message = fails(run_folder.claim_folder(out, "").__enter__, parts=["cannot write in"])
    assert "None" not in message, "it should give a reason"
    if out == "text":
        Path("out").touch()
        fails(run_folder.claim_folder("", "a").__enter__, parts=["cannot write in out"])


def test_where_tokens_are_cached(monkeypatch):
    for folder in ("vol", "out/a", "runs/a", "out/sub/a"):
        Path(folder).mkdir(parents=True)
    assert run_folder.get_cache_folder(Path("out/a")) == Path("out/.tokens")
    assert run_folder.get_cache_folder(Path("vol")) == Path("vol/.tokens")
    assert run_folder.get_cache_folder(Path("out/sub/a")) == Path("out/sub/a/.tokens")
    assert not Path(".tokens").exists()
    Path("runs/.tokens").mkdir()
    assert run_folder.get_cache_folder(Path("runs/a")) == Path("runs/.tokens")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        assert run_folder.get_cache_folder(Path("runs/a")) == Path("runs/a/.tokens")
    Path("out/.tokens").rmdir()
    monkeypatch.chdir("vol")
    assert run_folder.get_cache_folder(Path("out/a")) == Path("out/.tokens"), "of --eval-only"
    monkeypatch.chdir("..")
    Path("out/.tokens").touch()  # in the way
    assert run_folder.get_cache_folder(Path("out/a")) == Path("out/a/.tokens")


def test_only_the_folder_itself_has_to_be_writable():
    Path("vol").mkdir()
    os.chmod("vol", 0o777)
    with without_rights():
        with run_folder.claim_folder("vol", "") as folder:
            cache = run_folder.get_cache_folder(folder)
            for path in (cache / "x", folder / "ckpt.pt"):
                with files.atomic_write(path):
                    pass
    assert sorted(os.listdir("vol")) == [".tokens", "ckpt.pt"] and os.listdir() == ["vol"]


def test_waiting_for_a_lock_takes_no_time():
    with run_folder.claim_folder("a", ""):
        start_time = time.monotonic()
        fails(run_folder.claim_folder("a", "").__enter__)
        assert time.monotonic() - start_time < 1
