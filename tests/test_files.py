"""support/files.py: files are written as a whole, and files that users name are read safely."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from support import files
from tests.common import fails, without_rights


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- writing ---------------------------------------------------------------------------------------


def test_atomic_write_replaces_a_file_as_a_whole():
    with files.atomic_write("new/sub/a.txt") as file:
        file.write(b"one")
        assert not Path("new/sub/a.txt").exists()
    with files.atomic_write("new/sub/a.txt") as file:
        file.write(b"two")
        assert Path("new/sub/a.txt").read_bytes() == b"one"
    assert Path("new/sub/a.txt").read_bytes() == b"two"
    assert os.listdir("new/sub") == ["a.txt"]


def test_atomic_write_is_on_the_disk_before_it_takes_the_place(monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a))[1])
    with files.atomic_write("a") as file:
        file.write(b"four")
    assert events == [4, "replace"]


@pytest.mark.parametrize("wrappers", [0, 1, 2])
def test_atomic_write_names_what_the_disk_said(wrappers):
    Path("a").write_text("old")

    def write():
        with files.atomic_write("a") as file:
            file.write(b"half")
            fail(wrappers)

    def fail(wrappers):
        if wrappers == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        try:
            fail(wrappers - 1)
        except (OSError, RuntimeError) as error:  # as torch.save does
            raise RuntimeError("unexpected pos") from error

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


def test_only_temporary_files_of_dead_processes_are_removed():
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
    files.remove_stale_temp_files(".", ["ckpt.pt", "config.json", "????.uint16"])
    assert sorted(os.listdir()) == sorted([*stay, f".config.json.{dead.pid}"])
    with without_rights():
        assert files.is_alive(1) and not files.is_alive(dead.pid), "process 1 is somebody else's"
    sleeper.kill()
    sleeper.wait()
    files.remove_stale_temp_files("nowhere", ["*"])


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
    fails(files.read_user_file, "a", parts=["a pipe or device, not a file"])


def test_files_without_permission_are_refused():
    Path("secret").write_text("x")
    os.chmod("secret", 0)
    Path("closed").mkdir()
    Path("closed/ckpt.pt").write_text("x")
    os.chmod("closed", 0)
    with without_rights():
        for path in ("secret", "closed/ckpt.pt"):
            fails(files.read_user_file, path, parts=[f"cannot read {path} (Permission denied)"])
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
