"""support/data.py: the token cache, training and held-out text, batches."""

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import data, documents
from support.tokenizer import BPETokenizer, ByteTokenizer
from tests.common import fails

BYTE = ByteTokenizer()
CPU = torch.device("cpu")


def write_jsonl(path, rows):
    Path(path).write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in rows))


def load(folder, tokenizer=BYTE):
    return data.load_tokens(str(folder), tokenizer, Path(folder).parent / "cache")[0]


def load_dataset(path, block_size):
    return data.load_dataset(str(path), BYTE, block_size, Path(path).parent / "cache")


# -- windows ---------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step():
    starts = data.batch_starts(1, 7, 1000, 8)
    assert (starts == data.batch_starts(1, 7, 1000, 8)).all()
    assert set(starts) <= set(range(1000))
    drawn = {tuple(starts)}
    for seed, step in ((1, 8), (2, 7), (0, 8), (8, 0), (7, 1)):
        drawn.add(tuple(data.batch_starts(seed, step, 1000, 8)))
    assert len(drawn) == 6

    # starts are drawn from range(5), or from the members of an array
    assert set(data.batch_starts(0, 0, 5, 200)) == set(range(5))
    assert set(data.batch_starts(0, 0, np.array([3, 11, 40]), 200)) == {3, 11, 40}


def test_windows_and_their_targets():
    tokens = np.arange(50, dtype=np.uint8)
    windows = data.read_sequences(tokens, [0, 45], 4)
    assert windows.tolist() == [[0, 1, 2, 3, 4], [45, 46, 47, 48, 49]]
    assert windows.dtype == np.int64
    x, y = data.to_device(windows, CPU)
    assert x.tolist() == [[0, 1, 2, 3], [45, 46, 47, 48]]
    assert torch.equal(y, x + 1)

    # ~id marks a token of a prompt: as input it is id, as target it stays negative
    x, y = data.to_device(np.array([[~7, ~0, 5, 300]]), CPU)
    assert x.tolist() == [[7, 0, 5]]
    assert y.tolist() == [[~0, 5, 300]]
    assert x.is_contiguous()
    assert y.is_contiguous()


# -- the token cache -------------------------------------------------------------------------------


def caches(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_documents_are_shuffled_alike_every_time(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(30):
        (tmp_path / f"d/{i:02}.txt").write_text(f"text {i}")
    expected = [f"text {i}".encode() for i in range(30)]
    random.Random(0).shuffle(expected)
    assert expected != sorted(expected)
    assert bytes(load(tmp_path / "d")).split(b"\0")[:-1] == expected


def test_cache_is_used_and_follows_its_data(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("first")
    assert bytes(load(text)) == b"first\0"
    (name,) = caches(tmp_path)
    monkeypatch.setattr(documents, "read_text", lambda path: pytest.fail("the cache is not used"))
    assert bytes(load(text)) == b"first\0"
    monkeypatch.undo()

    # another text of the same size and with the same time of change
    status = text.stat()
    text.write_text("other")
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bytes(load(text)) == b"other\0"
    assert len(caches(tmp_path)) == 1
    assert caches(tmp_path) != [name]

    # caches of other data, and files that are not ours, stay
    (tmp_path / "b.txt").write_text("second")
    load(tmp_path / "b.txt")
    for mine in ("notes.uint8", "0123456789abcdef.uint8", f"{name}.bak", f".{name}.x"):
        (tmp_path / "cache" / mine).touch()
    text.write_text("third")
    load(text)
    assert len(caches(tmp_path)) == 6


def test_each_tokenizer_has_its_own_cache(tmp_path):
    def tokenizer(merged):
        ranks = {bytes([b]): b for b in range(256)}
        return BPETokenizer("x", r"\S+", {**ranks, merged: 256}, {"<|endoftext|>": 257})

    (tmp_path / "a.txt").write_text("abcd")
    for _ in range(2):
        assert load(tmp_path / "a.txt", tokenizer(b"ab")).tolist() == [256, 99, 100, 257]
        assert load(tmp_path / "a.txt", tokenizer(b"cd")).tolist() == [97, 98, 256, 257]


@pytest.mark.parametrize("damage", ["empty", "truncated", "token", "flipped", "zeros", "longer"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    load(text)
    (path,) = (tmp_path / "cache").iterdir()
    raw = path.read_bytes()
    assert raw == b"some text\0" + hashlib.sha256(b"some text\0").digest()
    contents = {
        "empty": b"",
        "truncated": raw[:-33],
        "token": raw[1:],
        "flipped": bytes([raw[0] ^ 1]) + raw[1:],
        "zeros": bytes(len(raw)),
        "longer": raw + b"\0",
    }
    path.write_bytes(contents[damage])
    assert bytes(load(text)) == b"some text\0"
    assert path.read_bytes() == raw


def test_a_pipe_in_place_of_the_cache_is_replaced(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    load(text)
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer
    assert bytes(load(text)) == b"some text\0"
    assert path.is_file()


def test_temporary_files_of_killed_processes_go_away(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    load(text)
    (name,) = caches(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    # the last part of a temporary file's name is the process that writes it
    other = f"{'a' * 16}-{'b' * 16}.uint16"
    dead = [f".{name}.{process.pid}", f".{other}.{process.pid}"]
    alive = [f".{name}.{os.getpid()}", f".{name}.{os.getppid()}"]
    foreign = [f".backup.{process.pid}", f".{name}.{process.pid}.old", f"{name}.{process.pid}"]
    for temp_name in (*dead, *alive, *foreign):
        (tmp_path / "cache" / temp_name).touch()
    load(text)
    assert set(caches(tmp_path)) == {name, *alive, *foreign}


def test_killed_while_writing_the_cache(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        load(tmp_path / "a.txt")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [name[0] for name in caches(tmp_path)] == ["."]
    assert bytes(load(tmp_path / "a.txt")) == b"some text\0"
    assert len(caches(tmp_path)) == 1
    assert caches(tmp_path)[0][0] != "."


def test_local_rank_left_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "a.txt").write_text("some text")
    assert bytes(load(tmp_path / "a.txt")) == b"some text\0"


def test_one_process_per_machine_builds_the_cache(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    monkeypatch.setattr(data, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    fails(load, text, parts=["was deleted just now"])  # the other process has not built it
    monkeypatch.setenv("LOCAL_RANK", "0")
    load(text)
    text.write_text("other text")
    load(text)
    assert len(caches(tmp_path)) == 1

    # another machine may use a cache that is outdated here
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    text.write_text("third text")
    load(text)
    assert len(caches(tmp_path)) == 2


@pytest.mark.parametrize(
    "n_vocab,dtype",
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**24, "uint32")],
)
def test_tokens_are_stored_in_the_smallest_type(tmp_path, n_vocab, dtype):
    assert data.token_dtype(n_vocab, False) == np.dtype(dtype)
    assert data.token_dtype(n_vocab, True) == np.int32

    class LargeTokenizer(ByteTokenizer):  # its end of text is its highest id
        eot_token = n_vocab - 1

    LargeTokenizer.n_vocab = n_vocab
    (tmp_path / "a.txt").write_text("ab")
    tokens = load(tmp_path / "a.txt", LargeTokenizer())
    assert tokens.tolist() == [97, 98, n_vocab - 1]


def test_documents_begin_with_start_tokens_and_need_an_end_token(tmp_path):
    class Start(ByteTokenizer):
        start = [1, 2]

    (tmp_path / "a.txt").write_text("ab")
    assert load(tmp_path / "a.txt", Start()).tolist() == [1, 2, 97, 98, 0]
    write_jsonl(tmp_path / "a.jsonl", [("a", "b")])
    assert load(tmp_path / "a.jsonl", Start()).tolist() == [~1, ~2, ~97, 98, 0]
    write_jsonl(tmp_path / "B.JSONL", [("a", "b")])
    assert load(tmp_path / "B.JSONL", Start()).tolist() == [~1, ~2, ~97, 98, 0]

    class Endless(ByteTokenizer):
        eot_token = None

    fails(load, tmp_path / "a.txt", Endless(), parts=["byte has no end-of-text token"])


# -- training and held-out text --------------------------------------------------------------------


def test_a_twentieth_is_held_out(tmp_path, capsys):
    text = "".join(random.Random(0).choices("abcdefgh é\n", k=4000))
    (tmp_path / "a.txt").write_text(text)
    raw = text.encode() + b"\0"
    dataset = load_dataset(tmp_path / "a.txt", 16)
    n_val = int(len(raw) * 0.05)
    assert bytes(dataset.train) == raw[:-n_val]
    assert bytes(dataset.val) == raw[-n_val:]

    # the last window of each split ends with its last token
    assert (dataset.starts, dataset.val_starts) == (len(dataset.train) - 16, n_val - 16)
    for tokens, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        assert data.read_sequences(tokens, [starts - 1], 16)[0, -1] == tokens[-1]
    assert dataset.fingerprint == {"tokens": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert dataset.bits_per_byte == pytest.approx(1 / math.log(2))
    assert dataset.tokenizer_state == {"name": "byte"}
    assert f"{len(raw) - n_val:,} tokens to train on, {n_val} held out" in capsys.readouterr().out


def test_a_short_text_holds_out_one_window(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 33)
    dataset = load_dataset(tmp_path / "a.txt", 16)
    assert (dataset.starts, dataset.val_starts) == (1, 1)
    (tmp_path / "a.txt").write_text("x" * 32)
    fails(load_dataset, tmp_path / "a.txt", 16, parts=["33 tokens, but --block-size 16 needs 34"])


def test_bits_per_byte_ignores_prompts():
    class TwoByteTokenizer(ByteTokenizer):  # bytes, and a token 300 of two bytes
        def decode_bytes(self, ids):
            return b"".join(b"ab" if i == 300 else bytes([i]) for i in ids)

    # 4 tokens enter the loss: 300 (two bytes), 97, 300 and 0; ~300 and ~97 belong to a prompt
    tokens = np.array([300, 97, ~300, ~97, 300, 0], np.int32)
    assert data.bits_per_byte(tokens, TwoByteTokenizer()) == pytest.approx(4 / 6 / math.log(2))
    long_text = np.full(2_500_000, 97, np.uint8)  # longer than one chunk of the count
    assert data.bits_per_byte(long_text, BYTE) == pytest.approx(1 / math.log(2))


def test_bits_per_byte_are_those_of_the_held_out_text(tmp_path):
    ranks = {**{bytes([b]): b for b in range(256)}, b"ab": 256}
    tokenizer = BPETokenizer("x", "ab|x", ranks, {"<|endoftext|>": 257})
    (tmp_path / "a.txt").write_text("x" * 400 + "ab" * 99)
    dataset = data.load_dataset(str(tmp_path / "a.txt"), tokenizer, 16, tmp_path / "cache")
    assert dataset.val.tolist() == [256] * 24 + [257]
    expected = data.bits_per_byte(dataset.val, tokenizer)
    assert dataset.bits_per_byte == expected
    assert expected < 0.9 * data.bits_per_byte(dataset.train, tokenizer)


def test_held_out_sequences_are_evenly_spaced():
    def starts(n, n_tokens, val_starts):
        dataset = SimpleNamespace(val=np.zeros(n_tokens), val_starts=val_starts)
        return data.eval_starts(dataset, n, 10).tolist()

    # sequences of ten targets may start at 0 to 90; ten of them cover 100 targets
    assert starts(4, 101, 91) == [0, 30, 60, 90]
    assert starts(99, 101, 91) == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert len(starts(99, 102, 92)) == 11
    assert starts(1, 101, 91) == [0]

    # prompts, of which each counts at most once
    assert starts(2, 101, np.array([0, 7, 20])) == [0, 20]
    assert starts(9, 101, np.array([0, 7, 20])) == [0, 7, 20]


# -- answers ---------------------------------------------------------------------------------------


def test_only_answers_enter_the_loss(tmp_path):
    pairs = [(f"{n} is", " even" if n % 2 == 0 else " odd") for n in range(200)]
    write_jsonl(tmp_path / "x.jsonl", pairs)
    dataset = load_dataset(tmp_path / "x.jsonl", 24)

    # a prompt's tokens are stored as ~token, which is negative; token 0 ends each example
    tokens = np.concatenate([dataset.train, dataset.val])
    assert tokens.dtype == np.int32
    text = bytes(np.where(tokens < 0, ~tokens, tokens).tolist()).decode()
    assert sorted(text.split("\0")[:-1]) == sorted(prompt + answer for prompt, answer in pairs)
    masked = "".join(chr(token) if token >= 0 else "_" for token in tokens)
    expected = ["_" * len(prompt) + answer for prompt, answer in pairs]
    assert sorted(masked.split("\0")[:-1]) == sorted(expected)

    # each training and held-out sequence (24 inputs and one more target) begins at a prompt
    for split, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        for start in starts:
            assert split[start] < 0
            assert start == 0 or split[start - 1] == 0
            assert len(split[start : start + 25]) == 25
        n_examples = (split == 0).sum()
        assert n_examples - 3 <= len(starts) <= n_examples

    # the held-out text is 5% of all, rounded up to whole examples
    assert dataset.val_starts[0] == 0
    assert 0.05 * len(tokens) <= len(dataset.val) < 0.05 * len(tokens) + 25
    assert dataset.bits_per_byte == pytest.approx(1 / math.log(2))


def test_prompts_longer_than_a_sequence_are_left_out(tmp_path, capsys):
    """At least the first token of the answer must be among the T targets of the sequence."""
    T = 8
    prompt_lengths = [*range(4, 14)] * 3  # 15 of 30 are at most T
    pairs = [("p" * length, f"answer{i}") for i, length in enumerate(prompt_lengths)]
    write_jsonl(tmp_path / "x.jsonl", pairs)
    dataset = load_dataset(tmp_path / "x.jsonl", T)
    assert "15 of 30 prompts" in capsys.readouterr().out

    seen_lengths = set()
    for tokens, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        assert len(starts)
        for sequence in data.read_sequences(tokens, starts, T):  # (T + 1,)
            is_answer = sequence >= 0
            assert is_answer[1:].any()
            seen_lengths.add(int(is_answer.argmax()))  # up to the first token of the answer
    assert min(seen_lengths) >= 4
    assert max(seen_lengths) == T


def test_split_of_answers_by_hand():
    """A prompt token t is stored as ~t; 0 ends an example. A sequence has T + 1 = 4 tokens."""

    def split(tokens, n_val):
        boundary, starts, val_starts = data.split_answers(tokens, n_val, 3, "x")
        return boundary, starts.tolist(), val_starts.tolist()

    tokens = np.array([~1, 5, 0] * 5, np.int32)  # prompts at 0, 3, 6, 9, 12
    assert split(tokens, n_val=4) == (9, [0, 3], [0])
    assert split(tokens, n_val=6) == (9, [0, 3], [0])
    assert split(tokens, n_val=7) == (6, [0], [0, 3])

    # the sequences at 4 and 14 just fit before the boundary; the prompt of four tokens at 8 is
    # too long
    example = [~1, 5, 6, 0]
    tokens = np.array(example * 2 + [~1] * 4 + [5, 0] + example * 2, np.int32)
    assert split(tokens, n_val=4) == (18, [0, 4, 14], [0])
    prompt_starts, answer_starts = data.prompts_and_answers(tokens)
    assert prompt_starts.tolist() == [0, 4, 8, 14, 18]
    assert answer_starts.tolist() == [1, 5, 12, 15, 19]


def test_prompts_that_are_all_too_long_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    for answers in (["b"], [str(i) for i in range(20)]):
        write_jsonl(path, [("a" * 5000, answer) for answer in answers])
        fails(load_dataset, path, 16, parts=["nothing to train on", "0 prompts", "--block-size 16"])


def test_one_usable_prompt_is_too_few(tmp_path):
    """It is held out, so there is none to train on."""
    write_jsonl(tmp_path / "x.jsonl", [("a", "b" * 400)])
    fails(load_dataset, tmp_path / "x.jsonl", 16, parts=["answers of 1 prompts begin within"])


def test_held_out_text_has_a_prompt_with_its_answer(tmp_path):
    """Most prompts are too long to use; one of the few short ones must still be held out."""
    too_long = [("a" * 100 + str(i), "no") for i in range(40)]
    short = [(f"short {i}", "yes") for i in range(6)]
    write_jsonl(tmp_path / "x.jsonl", too_long + short)
    dataset = load_dataset(tmp_path / "x.jsonl", 16)
    for tokens, starts in ((dataset.train, dataset.starts), (dataset.val, dataset.val_starts)):
        assert len(starts)
        for sequence in data.read_sequences(tokens, starts, 16):
            assert bytes((~sequence[:5]).tolist()) == b"short"
