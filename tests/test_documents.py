"""support/documents.py: which files --data names, and what in them is text."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from support import data, documents
from tests.common import REPOSITORY, fails, refused, without_rights
from tests.test_data import BYTE, load, write_jsonl


def read_documents(folder):
    """Return the bytes of each document. With byte tokens, a NUL ends each."""
    tokens = bytes(load(folder))
    *texts, end = tokens.split(b"\0")
    assert end == b""
    return texts


def test_files_of_runs_are_no_text(tmp_path):
    """A run inside --data would read its own log, and could not be resumed."""
    for name in (
        "a.txt",
        "out/a/ckpt.pt",
        "out/a/log.csv",
        "out/a/notes.txt",
        "out/b/.ckpt.pt.lock",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "out/b/config.json").write_text("{}")
    (tmp_path / "config.json").write_text("no run's")
    assert sorted(read_documents(tmp_path)) == [b"a.txt", b"no run's", b"out/a/notes.txt"]


def test_documents_of_a_folder(tmp_path, capsys):
    contents = {
        "a.txt": b"one",
        "sub/b.md": b"two",
        "copy.txt": b"one",
        "empty": b"",
        "pic.png": b"\x89PNG\0\0",
        "nul.txt": b"a\0b",
        "latin.txt": b"caf\xe9",
        ".hidden": b"no",
        ".git/c.txt": b"no",
    }
    folder = tmp_path / "d"
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    assert sorted(read_documents(folder)) == [b"one", b"two"]
    assert "skipped  5 of 7 documents" in capsys.readouterr().out


def test_standard_library_is_there():
    paths = documents.find_documents("stdlib")
    assert len(paths) > 200, "the standard library has several hundred files"
    assert paths == sorted(paths)
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    for path in paths:
        assert path.suffix == ".py"
        assert not excluded & set(path.parts)
    everything = set(documents.find_documents("python"))
    assert set(paths) <= everything
    assert REPOSITORY / "train.py" not in everything


def test_python_source_is_without_the_folder_of_the_script(tmp_path, monkeypatch):
    """Or a run of one's own script could not be resumed once the script has changed."""
    monkeypatch.setattr(sys, "prefix", "")
    monkeypatch.setattr(sys, "base_prefix", "")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert documents.find_documents("python") == [tmp_path / "b" / "module.py"]


def test_bad_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary").write_bytes(b"\x7fELF\0\1\2")
    Path("nothing").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    for name, parts in {
        "": ["--data is empty"],
        "nowhere": ["there is no data 'nowhere'", "a text file or a folder"],
        "empty.txt/x": ["there is no data"],
        "empty.txt": ["is empty"],
        "binary": ["not a text file", "UTF-8"],
        "nothing": ["no text files"],
        "pipe": ["neither a file nor a folder"],
        "/dev/zero": ["neither a file nor a folder"],
        "loop": ["cannot read"],
        "x" * 300: ["cannot read", "too long"],
        "a\0b": [],
    }.items():
        fails(data.load_tokens, name, BYTE, tmp_path / "cache", parts=parts)
    assert not Path("cache").exists()


def test_unreadable_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    for name in ("file.txt", "folder/a.txt", "deep/sub/a.txt", "deep/b.txt", "listed/a.txt"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("text")
    modes = {"file.txt": 0o200, "folder": 0o300, "deep/sub": 0, "listed": 0o644}
    for name, mode in modes.items():
        Path(name).chmod(mode)
    with without_rights():
        for data_flag, name in zip(("file.txt", "folder", "deep", "listed"), modes):
            parts = ["cannot read", name, "Permission denied"]
            fails(data.load_tokens, data_flag, BYTE, Path("cache"), parts=parts)
        readable = [path.name for path in documents.list_files(tmp_path / "deep")]
        assert readable == ["b.txt"], "as of a library, of which the rest is taken"
        fails(documents.read_file, "deep/sub/a.txt", parts=["cannot read", "Permission denied"])
    for name in modes:
        Path(name).chmod(0o755)


def test_files_that_disappear_are_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(f"text {name}")
    found = documents.find_documents(str(folder))
    (folder / "b").unlink()
    monkeypatch.setattr(data, "find_documents", lambda _: found)
    assert sorted(read_documents(folder)) == [b"text a", b"text c"]


def test_json_lines_are_split_at_newlines_alone(tmp_path):
    rows = [("a\u2028b\x85c", "d\u2029"), ("e\x0bf", "g\x0c\x1c")]
    lines = [json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in rows]
    text = "\r\n".join(lines) + "\n\n  \n"
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = []
    for tokens in documents.read_answers(tmp_path / "x.jsonl", BYTE):
        prompt = bytes((~tokens[tokens < 0]).tolist()).decode()
        answer = bytes(tokens[tokens >= 0].tolist()).decode()
        found.append((prompt, answer))
    assert found == rows


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a"}',
        b"[]",
        b"3",
        b"nonsense",
        b'{"prompt": "a", "answer": 3}',
        b'{"prompt": "", "answer": "b"}',
        b'{"prompt": "a", "answer": ""}',
        b'{"prompt": "a", "answer": "caf\xe9"}',
        b'{"prompt": "a", "answer": ["b"]}',
        b"[" * 100_000,
        b'{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b"}',
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_bad_json_lines(tmp_path, line):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line)
    fails(load, tmp_path / "x.jsonl", parts=["x.jsonl, line 2", "prompt"])


def test_empty_jsonl(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n \n")
    fails(load, tmp_path / "x.jsonl", parts=["x.jsonl is empty"])
    (tmp_path / "y.jsonl").mkdir()
    (tmp_path / "y.jsonl/a.txt").write_text("a folder, whatever its name")
    assert load(tmp_path / "y.jsonl").dtype == np.uint8


def test_lone_surrogates_and_nul_in_answers(tmp_path):
    rows = [("\ud83d", "\0\udce9"), ("a", "b")]
    write_jsonl(tmp_path / "x.jsonl", rows)
    tokens = load(tmp_path / "x.jsonl")
    starts, answers = data.prompts_and_answers(tokens)
    assert len(starts) == len(rows), "a NUL inside an answer begins no prompt"
    assert len(answers) == len(rows)
    answer_bytes = bytes(tokens[tokens >= 0].tolist())
    assert "\ufffd".encode() in answer_bytes


def test_the_command_refuses_bad_data(tiny):
    Path("deep.jsonl").write_text("[" * 100_000)
    os.mkfifo("pipe")
    for name, part in (
        ("deep.jsonl", "line 1"),
        ("pipe", "--data"),
        ("", "--data"),
        ("x" * 300, ""),
    ):
        refused([*tiny, "--data", name], part)
        assert not list(Path("out").glob("*/ckpt.pt"))
