"""support/files.py: files are whole, users' files are safe, and a folder has one run at a time."""

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from support import files


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(function, *arguments, parts=()):
    """The call raises ValueError with one printable line that has all the parts."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable(), ascii(message)
    for part in parts:
        assert part in message, message
    return message


@contextlib.contextmanager
def without_rights():
    """Be a user without rights while the block runs, should the tests be run by root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.chmod(".", 0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


# -- writing ---------------------------------------------------------------------------------------


def test_atomic_write_replaces_a_file_as_a_whole():
    with files.atomic_write("new/a.txt") as file:
        file.write(b"one")
        assert not Path("new/a.txt").exists()
    with files.atomic_write("new/a.txt") as file:
        file.write(b"two")
        assert Path("new/a.txt").read_bytes() == b"one"
    assert Path("new/a.txt").read_bytes() == b"two"
    assert os.listdir("new") == ["a.txt"]


def test_atomic_write_is_on_the_disk_before_it_takes_the_place(monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a))[1])
    with files.atomic_write("a") as file:
        file.write(b"four")
    assert events == [4, "replace"]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_atomic_write_names_what_the_disk_said(is_wrapped):
    Path("a").write_text("old")

    def write():
        with files.atomic_write("a") as file:
            file.write(b"half")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                if is_wrapped:  # as torch.save does
                    raise RuntimeError("unexpected pos") from error
                raise

    fails(write, parts=["cannot write a (No space left on device)", "untouched"])
    assert Path("a").read_text() == "old" and os.listdir() == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError, ValueError])
def test_atomic_write_passes_other_errors_on(error):
    Path("a").write_text("old")
    with pytest.raises(error, match="mine"), files.atomic_write("a") as file:
        file.write(b"half")
        raise error("mine")
    assert Path("a").read_text() == "old" and os.listdir() == ["a"]


@pytest.mark.parametrize("path", ["x" * 250, "text/a", "folder"])
def test_atomic_write_where_it_cannot(path):
    Path("text").write_text("a file, not a folder")
    Path("folder/full").mkdir(parents=True)

    def write():
        with files.atomic_write(path) as file:
            file.write(b"x")

    fails(write, parts=["cannot write", path])
    assert Path("text").read_text() == "a file, not a folder"
    assert sorted(os.listdir()) == ["folder", "text"]


def test_dead_drafts_alone_are_removed():
    sleeper = subprocess.Popen(["sleep", "60"])
    dead = subprocess.Popen(["true"])
    dead.wait()
    gone = [f".ckpt.pt.{dead.pid}", f".0123.uint16.{dead.pid}"]
    stay = [
        f".ckpt.pt.{sleeper.pid}",  # somebody writes it just now
        ".ckpt.pt.1",
        f"ckpt.pt.{dead.pid}",
        f".other.{dead.pid}",
        f".my.ckpt.pt.{dead.pid}",
        f".ckpt.pt.0{dead.pid}",
        f".ckpt.pt.{dead.pid}x",
        ".ckpt.pt.20241128",  # a date: no process has a number that large
        ".ckpt.pt.٣",
        ".ckpt.pt",
        ".ckpt.pt.",
        ".backup.2024",
        ".log.csv.-1",
    ]
    for name in gone + stay:
        Path(name).touch()
    Path(f".config.json.{dead.pid}").mkdir()
    files.remove_dead_drafts(".", ["ckpt.pt", "config.json", "????.uint16"])
    assert sorted(os.listdir()) == sorted([*stay, f".config.json.{dead.pid}"])
    sleeper.kill()
    sleeper.wait()
    files.remove_dead_drafts("nowhere", ["*"])


# -- reading ---------------------------------------------------------------------------------------


def test_user_files_are_read_up_to_the_limit():
    Path("a").write_bytes(b"12345")
    assert files.read_user_file("a") == files.read_user_file(Path("a"), 5) == b"12345"
    Path("empty").touch()
    assert files.read_user_file("empty") == b""
    Path("link").symlink_to("a")
    assert files.read_user_file("link") == b"12345"
    fails(files.read_user_file, "a", 4, parts=["cannot read a", "larger than 4 bytes"])


@pytest.mark.parametrize(
    "path,part",
    [
        ("nowhere", "there is no file nowhere"),
        ("", "there is no file"),
        ("text/a", "there is no file text/a"),
        (".", "a folder, not a file"),
        ("fifo", "a pipe or device, not a file"),
        ("link to fifo", "a pipe or device, not a file"),
        ("/dev/zero", "a pipe or device, not a file"),
        ("x" * 256, "File name too long"),
        ("loop", "symbolic links"),
        ("a\0b", "no file can have that name"),
        ("caf\ud800", "no file can have that name"),
        ("caf\udce9", "there is no file"),  # a byte that is not UTF-8, as Python passes it
        ("line\nfeed", "there is no file"),
    ],
    ids=ascii,
)
def test_what_is_no_file_is_refused_at_once(path, part):
    Path("text").touch()
    os.mkfifo("fifo")
    Path("link to fifo").symlink_to("fifo")
    Path("loop").symlink_to("loop")
    fails(files.read_user_file, path, parts=[part])


def test_a_pipe_that_takes_the_place_of_a_file_does_not_hang(monkeypatch):
    Path("a").touch()
    info = os.stat("a")
    os.remove("a")
    os.mkfifo("a")
    monkeypatch.setattr(files, "get_stat", lambda path: info)
    assert files.read_user_file("a") == b""


def test_files_without_permission_are_refused():
    Path("secret").write_text("x")
    os.chmod("secret", 0)
    Path("closed").mkdir()
    Path("closed/ckpt.pt").write_text("x")
    os.chmod("closed", 0)
    Path("out").mkdir(mode=0o555)
    with without_rights():
        for path in ("secret", "closed/ckpt.pt"):
            fails(files.read_user_file, path, parts=[f"cannot read {path} (Permission denied)"])
        fails(files.find_run, "closed", parts=["cannot read closed/ckpt.pt (Permission denied)"])
        for out in ("closed", "closed/b", "out", ""):
            message = fails(files.claim_folder(out, "a").__enter__, parts=["Permission denied"])
            assert message.startswith(f"cannot write in {out or 'out'} ("), message
    os.chmod("closed", 0o755)


def test_json_is_parsed():
    assert files.parse_json(b'\xef\xbb\xbf{"a": [1, "\xc3\xa9"]}', "x") == {"a": [1, "é"]}
    assert files.parse_json('"text"', "x") == "text"


@pytest.mark.parametrize(
    "data,part",
    [
        (b"", "cut off or is not JSON"),
        (b'{"a": ', "cut off or is not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[NaN]", "not JSON"),
        ("[-Infinity]", "not JSON"),
        (b"9" * 10000, "not JSON"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_json_is_refused(data, part):
    fails(files.parse_json, data, "mine.json", parts=["mine.json is", part])


# -- folders of runs -------------------------------------------------------------------------------


def make_run(folder, age=0):
    Path(folder).mkdir(parents=True)
    Path(folder, "ckpt.pt").touch()
    os.utime(Path(folder, "ckpt.pt"), (10**9 - age, 10**9 - age))


def test_runs_are_found_by_name_or_age():
    assert files.find_run("") is None and files.find_run(None) is None
    fails(files.find_run, "newest", parts=["no run under out/"])
    Path("out/unfinished").mkdir(parents=True)
    Path("out/file").touch()
    Path("out/gone").mkdir()
    Path("out/gone/ckpt.pt").symlink_to("nowhere")  # as if deleted while the folder is listed
    fails(files.find_run, "newest", parts=["no run under out/"])
    make_run("out/c", age=5)
    make_run("out/b", age=2)
    make_run("out/d", age=9)
    make_run("elsewhere")
    assert files.find_run("newest") == Path("out/b")
    assert files.find_run("out/d") == Path("out/d")
    assert files.find_run("elsewhere", resume=True) == Path("elsewhere")


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "a\0b", "hf", "text", "caf\udce9", "fifo"])
def test_what_is_no_run_is_refused(name):
    Path("text").touch()
    Path("hf").mkdir()
    Path("hf/config.json").touch()
    Path("fifo").mkdir()
    os.mkfifo("fifo/ckpt.pt")
    fails(lambda: files.find_run(name, resume=True))
    if name == "hf":
        assert files.find_run(name) == Path("hf")
    else:
        fails(files.find_run, name)


def test_a_new_run_takes_the_first_free_folder():
    with files.claim_folder("", "softmax") as a, files.claim_folder("", "softmax") as b:
        assert (a, b) == (Path("out/softmax"), Path("out/softmax-2"))
        assert a.is_dir() and b.is_dir()
        (a / "log.csv").touch()
        Path("out/softmax-3").touch()
    assert sorted(os.listdir("out")) == ["softmax", "softmax-3"], "empty folders are removed"
    with files.claim_folder("", "softmax") as folder:
        assert folder == Path("out/softmax-2")
    with files.claim_folder("", "softmax,simplicial:w1=4:w2=8") as folder:
        assert folder == Path("out/softmax-simplicial-w1-4-w2-8")
    with files.claim_folder("", "a" * 300) as folder:
        assert folder == Path("out", "a" * 60)


def test_claims_at_the_same_time_get_different_folders():
    barrier = threading.Barrier(8)
    folders = []

    def claim():
        barrier.wait()
        with files.claim_folder("", "a") as folder:
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
    with files.claim_folder(out, "") as folder:
        assert folder == Path(out)
        for origin in (None, folder):
            message = fails(files.claim_folder(out, "", origin).__enter__, parts=["is in use by"])
            assert f"process {os.getpid()} on " in message
        (folder / "ckpt.pt").touch()
    assert os.listdir(folder) == ["ckpt.pt"]
    for _ in range(2):
        with files.claim_folder("", "", folder) as again:
            assert again == folder
            fails(files.claim_folder("", "", folder).__enter__, parts=["is in use by"])
    fails(files.claim_folder(out, "").__enter__, parts=["already holds a run", f"--resume {out}"])


def test_a_claim_ends_with_kill_9():
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with files.claim_folder("a", ""):
            os.write(write_end, b"x")
            time.sleep(60)
    os.read(read_end, 1)
    fails(files.claim_folder("a", "").__enter__, parts=[f"process {pid} on "])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.listdir("a") == [files.LOCK]
    with files.claim_folder("a", ""):
        assert Path("a", files.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert os.path.isdir("a") and os.listdir("a") == [], "it was not a new folder"


def test_a_claim_is_not_fooled_by_a_lock_file_that_is_deleted_meanwhile(monkeypatch):
    """Between our open() and flock() the run before may end, and delete the file we have open."""
    if files.fcntl is None:
        pytest.skip("needs fcntl")
    flock = files.fcntl.flock
    calls = []

    def late_flock(lock, how):
        calls.append(how)
        if len(calls) == 1:
            os.remove(Path("a", files.LOCK))
        flock(lock, how)

    monkeypatch.setattr(files.fcntl, "flock", late_flock)
    with files.claim_folder("a", ""):
        monkeypatch.setattr(files.fcntl, "flock", flock)
        fails(files.claim_folder("a", "").__enter__, parts=["in use"])
    assert len(calls) == 2


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="No locks available"), files.claim_folder("a", "") as a:
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
    fails(files.claim_folder("mine", "").__enter__, parts=[f"mine/{name} would be overwritten"])
    assert os.listdir("mine") == [name] and (is_link or path.read_text() == "mine")


def test_other_files_of_the_user_stay():
    Path("home").mkdir()
    names = [".backup.2024", "notes.txt", ".lock", "ckpt.pt.old", ".ckpt.pt.20241128"]
    for name in names:
        Path("home", name).write_text(name)
    dead = subprocess.Popen(["true"])
    dead.wait()
    Path("home", f".ckpt.pt.{dead.pid}").touch()
    with files.claim_folder("home", ""):
        pass
    assert sorted(os.listdir("home")) == sorted(names)
    assert all(Path("home", name).read_text() == name for name in names)


def test_a_failed_run_leaves_no_empty_folder_behind():
    with pytest.raises(KeyError), files.claim_folder("a", ""):
        raise KeyError
    assert not Path("a").exists()
    Path("b").mkdir()
    with pytest.raises(KeyError), files.claim_folder("b", ""):
        raise KeyError
    assert os.listdir("b") == []


@pytest.mark.parametrize("out", ["text", "text/a", "x" * 300, "a\0b", "caf\ud800", "locked"])
def test_what_can_be_no_folder_is_refused(out):
    Path("text").touch()
    Path("locked", files.LOCK).mkdir(parents=True)
    fails(files.claim_folder(out, "").__enter__, parts=["cannot write in"])
    if out == "text":
        Path("out").touch()
        fails(files.claim_folder("", "a").__enter__, parts=["cannot write in out"])


def test_where_tokens_are_cached():
    for folder in ("vol", "out/a", "runs/a", "out/sub/a"):
        Path(folder).mkdir(parents=True)
    assert files.get_cache_folder(Path("out/a")) == Path("out/.tokens")
    assert files.get_cache_folder(Path("vol")) == Path("vol/.tokens")
    assert files.get_cache_folder(Path("out/sub/a")) == Path("out/sub/a/.tokens")
    assert not Path(".tokens").exists()
    Path("runs/.tokens").mkdir()
    assert files.get_cache_folder(Path("runs/a")) == Path("runs/.tokens")
    Path("out/.tokens").rmdir()
    Path("out/.tokens").touch()  # in the way
    assert files.get_cache_folder(Path("out/a")) == Path("out/a/.tokens")


def test_only_the_folder_itself_has_to_be_writable():
    Path("vol").mkdir()
    os.chmod("vol", 0o777)
    with without_rights():
        with files.claim_folder("vol", "") as folder:
            cache = files.get_cache_folder(folder)
            for path in (cache / "x", folder / "ckpt.pt"):
                with files.atomic_write(path):
                    pass
    assert sorted(os.listdir("vol")) == [".tokens", "ckpt.pt"] and os.listdir() == ["vol"]


def test_waiting_for_a_lock_takes_no_time():
    with files.claim_folder("a", ""):
        start_time = time.monotonic()
        fails(files.claim_folder("a", "").__enter__)
        assert time.monotonic() - start_time < 1
