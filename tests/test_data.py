"""Documents, the token cache, training and held-out text, windows."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from support import data
from support.tokenizer import ByteTokenizer
from tests.common import REPOSITORY

BYTE = ByteTokenizer()
CPU = torch.device("cpu")


def write_rows(path, rows):
    Path(path).write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows))


def load(folder, tokenizer=BYTE):
    return data.load_tokens(str(folder), tokenizer, Path(folder).parent / "cache")


def refused(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# -- windows ---------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step():
    starts = data.batch_starts(1, 7, 1000, 8)
    assert (starts == data.batch_starts(1, 7, 1000, 8)).all()
    assert 0 <= starts.min() and starts.max() < 1000
    drawn = {tuple(starts)}
    for seed, step in ((1, 8), (2, 7), (0, 8), (8, 0), (7, 1)):
        drawn.add(tuple(data.batch_starts(seed, step, 1000, 8)))
    assert len(drawn) == 6
    # every start is drawn, the last one included, and of an array its members alone
    assert set(data.batch_starts(0, 0, 5, 200)) == set(range(5))
    assert set(data.batch_starts(0, 0, np.array([3, 11, 40]), 200)) == {3, 11, 40}


def test_windows_and_their_targets():
    tokens = np.arange(50, dtype=np.uint8)
    windows = data.read_windows(tokens, [0, 45], 4)
    assert windows.tolist() == [[0, 1, 2, 3, 4], [45, 46, 47, 48, 49]] and windows.dtype == np.int64
    x, y = data.to_device(windows, CPU)
    assert x.tolist() == [[0, 1, 2, 3], [45, 46, 47, 48]] and torch.equal(y, x + 1)
    # what does not count has its true id as input and stays negative as target
    x, y = data.to_device(np.array([[~7, ~0, 5, 300]]), CPU)
    assert x.tolist() == [[7, 0, 5]] and y.tolist() == [[~0, 5, 300]]
    assert x.is_contiguous() and y.is_contiguous()


# -- documents -------------------------------------------------------------------------------------


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
    for name, content in contents.items():
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "d" / name).write_bytes(content)
    (tmp_path / "d/dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d/pipe")
    tokens = bytes(load(tmp_path / "d"))
    assert sorted(tokens.split(b"\0")) == [b"", b"one", b"two"] and tokens.endswith(b"\0")
    assert "skipped  5 of 7 documents" in capsys.readouterr().out


def test_documents_are_shuffled_alike_every_time(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(30):
        (tmp_path / f"d/{i:02}.txt").write_text(f"text {i}")
    expected = [f"text {i}".encode() for i in range(30)]
    random.Random(0).shuffle(expected)
    assert bytes(load(tmp_path / "d")).split(b"\0")[:-1] == expected != sorted(expected)


def test_standard_library_is_there():
    paths = data.find_documents("stdlib")
    assert len(paths) > 200 and paths == sorted(paths)
    for path in paths:
        assert path.suffix == ".py" and not {"site-packages", "test"} & set(path.parts)
    assert set(paths) <= set(data.find_documents("python"))


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
        refused(lambda name=name: data.load_tokens(name, BYTE, tmp_path / "cache"), *parts)
    assert not Path("cache").exists()


UNREADABLE = """
import os, sys
from pathlib import Path
import train
from support import data
from support.tokenizer import ByteTokenizer
if os.getuid() == 0:
    os.setuid(65534)
for name in ("file.txt", "folder", "deep", "listed"):
    try:
        data.load_tokens(name, ByteTokenizer(), Path("cache"))
        print("no error")
    except ValueError as error:
        print(error)
"""


def test_unreadable_files_and_folders(tmp_path):
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    for name in ("file.txt", "folder/a.txt", "deep/sub/a.txt", "deep/b.txt", "listed/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    modes = {"file.txt": 0o200, "folder": 0o300, "deep/sub": 0, "listed": 0o644}
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", UNREADABLE]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    for name in modes:
        (tmp_path / name).chmod(0o755)
    lines = out.stdout.splitlines()
    assert len(lines) == 4, out.stderr
    for name, line in zip(modes, lines):
        assert "cannot read" in line and name in line and "ermission" in line, line


def test_files_that_disappear_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    for name in "abc":
        (tmp_path / "d" / name).write_text(f"text {name}")
    found = data.find_documents(str(tmp_path / "d"))
    (tmp_path / "d/b").unlink()
    monkeypatch.setattr(data, "find_documents", lambda _: found)
    assert sorted(bytes(load(tmp_path / "d")).split(b"\0")) == [b"", b"text a", b"text c"]


# -- the token cache -------------------------------------------------------------------------------


def caches(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_cache_is_used_and_follows_its_data(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("first")
    assert bytes(load(text)) == b"first\0"
    (name,) = caches(tmp_path)
    monkeypatch.setattr(data, "read_text", lambda path: pytest.fail("read again"))
    assert bytes(load(text)) == b"first\0"
    monkeypatch.undo()

    # the same size and time of change as before, and yet another text
    status = text.stat()
    text.write_text("other")
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bytes(load(text)) == b"other\0"
    assert len(caches(tmp_path)) == 1 and caches(tmp_path) != [name]

    # caches of other data, and files that are not ours, stay
    (tmp_path / "b.txt").write_text("second")
    load(tmp_path / "b.txt")
    for mine in ("notes.uint8", "0123456789abcdef.uint8", f"{name}.bak", f".{name}.x"):
        (tmp_path / "cache" / mine).touch()
    text.write_text("third")
    load(text)
    assert len(caches(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["empty", "truncated", "token", "flipped", "zeros", "longer"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    load(text)
    (path,) = (tmp_path / "cache").iterdir()
    raw = path.read_bytes()
    assert raw == b"some text\0" + hashlib.sha256(b"some text\0").digest()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": raw[:-33],
            "token": raw[1:],
            "flipped": bytes([raw[0] ^ 1]) + raw[1:],
            "zeros": bytes(len(raw)),
            "longer": raw + b"\0",
        }[damage]
    )
    assert bytes(load(text)) == b"some text\0"
    assert path.read_bytes() == raw


def test_drafts_of_killed_processes_go_away(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    load(text)
    (name,) = caches(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    other = f"{'a' * 16}-{'b' * 16}.uint16"
    dead = [f".{name}.{process.pid}", f".{other}.{process.pid}"]
    alive = [f".{name}.{os.getpid()}", f".{name}.{os.getppid()}"]
    foreign = [f".backup.{process.pid}", f".{name}.{process.pid}.old", f"{name}.{process.pid}"]
    for draft in (*dead, *alive, *foreign):
        (tmp_path / "cache" / draft).touch()
    load(text)
    assert set(caches(tmp_path)) == {name, *alive, *foreign}


KILLED = """
import os, signal, sys
from pathlib import Path
from support import data, tokenizer
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
data.load_tokens("a.txt", tokenizer.ByteTokenizer(), Path("cache"))
"""


def test_killed_while_writing_the_cache(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=environment)
    assert [name[0] for name in caches(tmp_path)] == ["."]
    assert bytes(load(tmp_path / "a.txt")) == b"some text\0"
    assert len(caches(tmp_path)) == 1 and caches(tmp_path)[0][0] != "."


def test_local_rank_left_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "a.txt").write_text("some text")
    assert bytes(load(tmp_path / "a.txt")) == b"some text\0"


@pytest.mark.parametrize(
    "n_vocab,dtype",
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**24, "uint32")],
)
def test_tokens_are_stored_in_the_smallest_type(tmp_path, n_vocab, dtype):
    assert data.token_dtype(n_vocab, False) == np.dtype(dtype)
    assert data.token_dtype(n_vocab, True) == np.int32

    class Highest(ByteTokenizer):  # its end of text is its highest id
        eot_token = n_vocab - 1

    Highest.n_vocab = n_vocab
    (tmp_path / "a.txt").write_text("ab")
    tokens = load(tmp_path / "a.txt", Highest())
    assert tokens.tolist() == [97, 98, n_vocab - 1]


def test_what_stands_before_a_document_and_no_end(tmp_path):
    class Start(ByteTokenizer):
        start = [1, 2]

    (tmp_path / "a.txt").write_text("ab")
    assert load(tmp_path / "a.txt", Start()).tolist() == [1, 2, 97, 98, 0]
    write_rows(tmp_path / "a.jsonl", [("a", "b")])
    assert load(tmp_path / "a.jsonl", Start()).tolist() == [~1, ~2, ~97, 98, 0]

    class Endless(ByteTokenizer):
        eot_token = None

    refused(lambda: load(tmp_path / "a.txt", Endless()), "byte has no end-of-text token")


# -- training and held-out text --------------------------------------------------------------------


def test_a_twentieth_is_held_out(tmp_path, capsys):
    text = "".join(random.Random(0).choices("abcdefgh é\n", k=4000))
    (tmp_path / "a.txt").write_text(text)
    raw = text.encode() + b"\0"
    dataset = data.load_dataset(str(tmp_path / "a.txt"), BYTE, 16, tmp_path / "cache")
    n_val = int(len(raw) * 0.05)
    assert bytes(dataset.train) == raw[:-n_val] and bytes(dataset.val) == raw[-n_val:]
    # the last window of each ends with its last token
    assert dataset.starts == len(dataset.train) - 16 and dataset.val_starts == n_val - 16
    for tokens, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        assert data.read_windows(tokens, [starts - 1], 16)[0, -1] == tokens[-1]
    assert dataset.fingerprint == {"tokens": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert dataset.bits_per_byte == pytest.approx(1 / math.log(2))
    assert dataset.tokenizer_state == {"name": "byte"}
    assert f"{len(raw) - n_val:,} tokens to train on, {n_val} held out" in capsys.readouterr().out


def test_a_short_text_holds_out_one_window(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 33)
    dataset = data.load_dataset(str(tmp_path / "a.txt"), BYTE, 16, tmp_path / "cache")
    assert (dataset.starts, dataset.val_starts) == (1, 1)
    (tmp_path / "a.txt").write_text("x" * 32)
    refused(
        lambda: data.load_dataset(str(tmp_path / "a.txt"), BYTE, 16, tmp_path / "cache"),
        "has 33 tokens, but --block-size 16 needs 34",
    )


def test_bits_per_byte_counts_bytes_of_what_counts():
    class Pairs(ByteTokenizer):  # id 300 is two bytes
        def decode_bytes(self, ids):
            return b"".join(b"ab" if i == 300 else bytes([i]) for i in ids)

    tokens = np.array([300, 97, ~300, ~97, 300, 0], np.int32)
    assert data.bits_per_byte(tokens, Pairs()) == pytest.approx(4 / 6 / math.log(2))
    many = np.full(2_500_000, 97, np.uint8)  # counted in parts
    assert data.bits_per_byte(many, BYTE) == pytest.approx(1 / math.log(2))


# -- answers ---------------------------------------------------------------------------------------


def test_answers_alone_count(tmp_path):
    rows = [(f"{n} is", " even" if n % 2 == 0 else " odd") for n in range(200)]
    write_rows(tmp_path / "x.jsonl", rows)
    dataset = data.load_dataset(str(tmp_path / "x.jsonl"), BYTE, 24, tmp_path / "cache")
    tokens = np.concatenate([dataset.train, dataset.val])
    assert tokens.dtype == np.int32
    text = bytes(np.where(tokens < 0, ~tokens, tokens).tolist()).decode()
    assert sorted(text.split("\0")[:-1]) == sorted(p + a for p, a in rows)
    counted = "".join(chr(t) if t >= 0 else "_" for t in tokens)
    expected = [f"{'_' * len(p)}{a}" for p, a in rows]
    assert sorted(counted.split("\0")[:-1]) == sorted(expected)
    # in training and held-out text alike a window begins at a prompt
    for part, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        for start in starts:
            assert part[start] < 0 and (start == 0 or part[start - 1] == 0)
            assert len(part[start : start + 25]) == 25
        n_prompts = (part == 0).sum()
        assert n_prompts - 3 <= len(starts) <= n_prompts
    assert dataset.val_starts[0] == 0 and len(dataset.val) >= 0.05 * len(tokens)
    assert len(dataset.val) < 0.05 * len(tokens) + 25
    assert dataset.bits_per_byte == pytest.approx(1 / math.log(2))


def test_prompts_whose_answer_is_out_of_reach_are_left_out(tmp_path, capsys):
    # the answer's first token has to be a target: at most T tokens after the window's first
    rows = [("p" * length, "answer") for length in range(4, 14)] * 3
    rows = [(prompt, f"{answer}{i}") for i, (prompt, answer) in enumerate(rows)]
    write_rows(tmp_path / "x.jsonl", rows)
    dataset = data.load_dataset(str(tmp_path / "x.jsonl"), BYTE, 8, tmp_path / "cache")
    for tokens, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        windows = data.read_windows(tokens, starts, 8)
        lengths = (np.maximum.accumulate(windows >= 0, axis=1) == 0).sum(1)
        assert len(lengths) and lengths.min() >= 4 and lengths.max() <= 8
        assert (windows[:, 1:] >= 0).any(1).all()
    assert 8 in lengths or 8 in (data.read_windows(dataset.train, dataset.starts, 8) < 0).sum(1)
    assert "15 of 30 prompts" in capsys.readouterr().out


def test_split_of_answers_by_hand():
    tokens = np.array([~1, 5, 0] * 5, np.int32)  # prompts at 0, 3, 6, 9, 12; a window is 4 tokens
    for n_val, expected in [(4, (9, [0, 3], [0])), (6, (9, [0, 3], [0])), (7, (6, [0], [0, 3]))]:
        boundary, starts, val_starts = data.split_answers(tokens, n_val, 3, "x")
        assert (boundary, starts.tolist(), val_starts.tolist()) == expected
    # a window may end with its part; the prompt of four tokens is out of reach of one at T = 3
    tokens = np.array([~1, 5, 6, 0] * 2 + [~1] * 4 + [5, 0] + [~1, 5, 6, 0] * 2, np.int32)
    boundary, starts, val_starts = data.split_answers(tokens, 4, 3, "x")
    assert (boundary, starts.tolist(), val_starts.tolist()) == (18, [0, 4, 14], [0])
    assert [a.tolist() for a in data.prompts_and_answers(tokens)] == [
        [0, 4, 8, 14, 18],
        [1, 5, 12, 15, 19],
    ]


def test_no_answer_within_reach_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    for rows in ([("a" * 5000, "b")], [("a" * 5000, str(i)) for i in range(20)]):
        write_rows(path, rows)
        refused(
            lambda: data.load_dataset(str(path), BYTE, 16, tmp_path / "cache"),
            "nothing to train on",
            "--block-size 16",
        )


def test_held_out_text_has_a_prompt_with_its_answer(tmp_path):
    """Although nearly all prompts are too long, and one of few that are not is held out."""
    rows = [("a" * 100 + str(i), "no") for i in range(40)] + [
        (f"short {i}", "yes") for i in range(6)
    ]
    write_rows(tmp_path / "x.jsonl", rows)
    dataset = data.load_dataset(str(tmp_path / "x.jsonl"), BYTE, 16, tmp_path / "cache")
    assert len(dataset.starts) and len(dataset.val_starts)
    for tokens, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        windows = data.read_windows(tokens, starts, 16)
        assert all(bytes((~row[:5]).tolist()) == b"short" for row in windows)


def test_json_lines_are_split_at_newlines_alone(tmp_path):
    rows = [("a\u2028b\x85c", "d\u2029"), ("e\x0bf", "g\x0c\x1c")]
    lines = [json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in rows]
    text = "\r\n".join(lines) + "\n\n  \n"
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    documents = data.read_answers(tmp_path / "x.jsonl", BYTE)
    found = []
    for document in documents:
        found.append(
            (
                bytes((~document[document < 0]).tolist()).decode(),
                bytes(document[document >= 0].tolist()).decode(),
            )
        )
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
    refused(lambda: load(tmp_path / "x.jsonl"), "x.jsonl, line 2", "prompt")


def test_empty_jsonl(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\n \n")
    refused(lambda: load(tmp_path / "x.jsonl"), "x.jsonl is empty")
    (tmp_path / "y.jsonl").mkdir()
    (tmp_path / "y.jsonl/a.txt").write_text("a folder, whatever its name")
    assert load(tmp_path / "y.jsonl").dtype == np.uint8


def test_lone_surrogates_and_nul_in_answers(tmp_path):
    write_rows(tmp_path / "x.jsonl", [("\ud83d", "\0\udce9"), ("a", "b")])
    tokens = load(tmp_path / "x.jsonl")
    starts, answers = data.prompts_and_answers(tokens)
    assert len(starts) == len(answers) == 2  # a NUL inside an answer begins no prompt
    assert "\ufffd".encode() in bytes(tokens[tokens >= 0].tolist())


# -- in a run --------------------------------------------------------------------------------------


def test_the_command_refuses_bad_data(tiny):
    Path("deep.jsonl").write_text("[" * 100_000)
    os.mkfifo("pipe")
    for name in ("deep.jsonl", "pipe", "", "x" * 300):
        refused(
            lambda name=name: train.main([*tiny, "--data", name]),
            "--data" if name != "deep.jsonl" else "line 1",
        )
        assert not list(Path("out").glob("*/ckpt.pt"))
