"""Tokenizers by name, by file and from a checkpoint."""

import base64
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public as public

import train
from support import data, tokenizer
from support.tokenizer import BPETokenizer, ByteTokenizer, get_tokenizer
from tests.common import REPOSITORY, is_equal, refused

BYTES = [bytes([b]) for b in range(256)]
MERGED = [b"th", b"the", b" the", b"qu", b"er", b"ov", b"over", b" over", b"  ", b"    "]
TEXTS = [
    "",
    "the quick fox, over the\n\n  wall — é 数 123",
    "don't WE'LL \t\r\n\n x  y   ",
    "\ud83d lone",
    "\ud83d\ude00 pair",
    "<|endoftext|>",
]


def write_bpe(path, tokens=None, extra=""):
    """Write a small .tiktoken file and return its path; tokens: by default, bytes and 10 merges."""
    lines = []
    for i, token in enumerate(tokens or [*BYTES, *MERGED]):
        lines.append(f"{base64.b64encode(token).decode()} {i}\n")
    Path(path).write_text("".join(lines) + extra)
    return str(path)


def test_bytes():
    byte = get_tokenizer("byte")
    ids = byte.encode_ordinary("aé")
    assert ids.tolist() == [97, 0xC3, 0xA9]
    assert ids.dtype == np.uint8
    assert byte.decode_bytes(ids.tolist()) == "aé".encode()
    assert byte.encode_ordinary("\ud83d").tolist() == [*"\ufffd".encode()]
    assert (byte.n_vocab, byte.eot_token) == (256, 0)


def test_bpe_is_tiktokens(tmp_path):
    ours = get_tokenizer(write_bpe(tmp_path / "mine.tiktoken", extra="\n"))  # an empty line
    truth = tiktoken.Encoding(
        "mine",
        pat_str=public.r50k_pat_str,
        mergeable_ranks={token: i for i, token in enumerate([*BYTES, *MERGED])},
        special_tokens={"<|endoftext|>": 266},
    )
    assert (ours.name, ours.n_vocab, ours.eot_token) == ("mine", 267, 266)
    rng = random.Random(0)
    pieces = [*"aA1 \n\t'.é数\x1c\x85\u3000", "the", " over", "'s", "'LL", "  "]
    texts = list(TEXTS)
    for _ in range(500):
        texts.append("".join(rng.choices(pieces, k=rng.randint(1, 20))))
    for text in texts:
        ids = ours.encode_ordinary(text)
        assert ids == truth.encode_ordinary(text), repr(text)
        assert ours.decode_bytes(ids) == truth.decode_bytes(ids)
    assert ours.encode_ordinary(" the") == [258]
    assert ours.decode_bytes([266]) == b"<|endoftext|>"


@pytest.mark.parametrize("name", tokenizer.PUBLISHED)
def test_a_file_with_a_published_name_is_that_encoding(name, monkeypatch, tmp_path):
    ranks = {token: i for i, token in enumerate([*BYTES, *MERGED])}
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: dict(ranks))
    published = public.ENCODING_CONSTRUCTORS[name]()
    n_ranks, _, special = tokenizer.PUBLISHED[name]
    assert special == published["special_tokens"]

    # write a file with as many tokens as the published one; ids skip the first special token,
    # and most merges are of bytes that no text below has
    first_special = min(special.values())
    numbers = (i for i in range(10**6) if i != first_special)
    tokens = dict(zip([*BYTES, *MERGED], numbers))
    for n in range(n_ranks - len(tokens)):
        tokens[b"\xff" + n.to_bytes(4, "big")] = next(numbers)
    lines = (f"{base64.b64encode(t).decode()} {i}" for t, i in tokens.items())
    path = tmp_path / f"{name}.tiktoken"
    path.write_text("\n".join(lines))
    ours = get_tokenizer(str(path))
    assert ours.eot_token == special["<|endoftext|>"]
    assert ours._special_tokens == special
    truth = tiktoken.Encoding(
        name, pat_str=published["pat_str"], mergeable_ranks=ranks, special_tokens={}
    )
    rng = random.Random(1)
    pieces = [*"aA1 \n\r\t'.!é数\u0301/", "the", "12345", "'s", "'LL", "  "]
    for _ in range(1000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 15)))
        assert ours.encode_ordinary(text) == truth.encode_ordinary(text), repr(text)


def test_published_names(tmp_path, monkeypatch):
    """gpt2 is another name for r50k_base. A published name beats a file of that name."""
    names_fetched = []

    def fake_get_encoding(name):  # stands for tiktoken's download
        names_fetched.append(name)
        ranks = {token: i for i, token in enumerate(BYTES)}
        return tiktoken.Encoding(
            name, pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
        )

    monkeypatch.setattr(tiktoken, "get_encoding", fake_get_encoding)
    monkeypatch.chdir(tmp_path)
    write_bpe("gpt2")
    assert get_tokenizer("gpt2").name == "r50k_base"
    assert get_tokenizer("cl100k_base").encode_ordinary("ab") == [97, 98]
    assert names_fetched == ["r50k_base", "cl100k_base"]
    write_bpe("gpt2.tiktoken")
    with pytest.raises(ValueError, match="gpt2.tiktoken has 266 tokens, but r50k_base has 50256"):
        get_tokenizer("gpt2.tiktoken")


def test_the_gpt2_vocabulary():
    path = REPOSITORY.parent / "shared/data/gpt2.tiktoken"
    if not path.exists():
        pytest.skip("needs the GPT-2 vocabulary beside the repository")
    gpt2 = get_tokenizer(str(path))
    assert (gpt2.name, gpt2.eot_token, gpt2.n_vocab) == ("r50k_base", 50256, 50257)
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]


def test_a_download_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.5)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(ValueError, match="cl100k_base is not cached here.*network.*--tokenizer"):
        get_tokenizer("cl100k_base")
    assert time.monotonic() - start < 4


def test_tokenizer_without_a_network(tiny, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    parts = ["cl100k_base", "--tokenizer", ".tiktoken", "network"]
    refused([*tiny, "--tokenizer", "cl100k_base"], *parts)


BAD_FILES = {
    "text": (b"the quick brown fox", ["line 1"]),
    "not base64": (b"!!!! 1\n", ["line 1"]),
    "no number": (b"YQ== one\n", ["line 1"]),
    "empty": (b"", ["no token is the byte 0"]),
    "few bytes": (b"YQ== 0\n", ["no token is the byte 0"]),
    "binary": (bytes(range(256)), ["line 1"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_tiktoken_files(case, tmp_path):
    raw, parts = BAD_FILES[case]
    (tmp_path / "x.tiktoken").write_bytes(raw)
    with pytest.raises(ValueError) as caught:
        get_tokenizer(str(tmp_path / "x.tiktoken"))
    for part in ["not a", ".tiktoken file", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "extra,part",
    [
        ("YWJj 5\n", "one id to two tokens"),
        ("YWJj -1\n", "not integers from 0"),
        ("YWJj 99999999999\n", "not integers from 0"),
        (f"YWJj {2**24}\n", "not integers from 0"),
        ("YQ== 300\n", "line 267: the token b'a' appears twice"),
    ],
)
def test_bad_ranks(extra, part, tmp_path):
    path = write_bpe(tmp_path / "x.tiktoken", extra=extra)
    with pytest.raises(ValueError) as caught:
        get_tokenizer(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for name, part in {
        "nix": "no tokenizer 'nix'",
        "": "no tokenizer ''",
        "x" * 300: "no tokenizer",
        "pipe": "pipe",
        ".": "folder",
        "a\0b": "no tokenizer",
    }.items():
        with pytest.raises(ValueError, match=part.replace("'", ".")):
            get_tokenizer(name)


@pytest.mark.parametrize("blank", [" ", "\n", " \n", "\u3000"])
def test_a_million_blanks(blank, tmp_path):
    mine = get_tokenizer(write_bpe(tmp_path / "mine.tiktoken"))
    text = f"the{blank * 1_500_000}over"
    ids = mine.encode_ordinary(text)
    assert mine.decode_bytes(ids) == text.encode()
    assert ids[0] == mine.encode_ordinary("the")[0]

    # at the beginning of a text, too
    text = blank * 1_500_000 + "x"
    assert mine.decode_bytes(mine.encode_ordinary(text)) == text.encode()

    # only runs of LONGEST_BLANK or more are cut
    short = f"the{blank * 1000}over"
    assert tokenizer.cut_long_blanks(short) == [short]
    longest = " " * (tokenizer.LONGEST_BLANK - 1)
    assert tokenizer.cut_long_blanks(f"a{longest}b") == [f"a{longest}b"]
    pieces = tokenizer.cut_long_blanks(text)
    assert "".join(pieces) == text
    assert len(pieces) > 2


def test_a_million_of_anything_else(tmp_path):
    mine = get_tokenizer(write_bpe(tmp_path / "mine.tiktoken"))
    for character in "a1!é\0":
        text = character * 1_200_000
        assert mine.decode_bytes(mine.encode_ordinary(text)) == text.encode()


def test_ids_that_the_vocabulary_skips_decode_to_nothing():
    ranks = {token: i for i, token in enumerate(BYTES)}
    mine = BPETokenizer("gaps", r"\S+|\s+", ranks, {"<|endoftext|>": 300})
    assert mine.n_vocab == 301
    assert mine.decode_bytes([97, 280, 98, 300]) == b"ab<|endoftext|>"


# -- in a checkpoint -------------------------------------------------------------------------------


def test_state_round_trip(tmp_path):
    for name in ("byte", write_bpe(tmp_path / "byte.tiktoken"), write_bpe(tmp_path / "m.tiktoken")):
        ours = get_tokenizer(name)
        state = data.tokenizer_state(ours)
        again = get_tokenizer("ignored", {"tokenizer": state})
        assert type(again) is type(ours)
        assert is_equal(data.tokenizer_state(again), state)
        for attribute in ("name", "n_vocab", "eot_token"):
            assert getattr(again, attribute) == getattr(ours, attribute)
        for text in TEXTS:
            assert list(again.encode_ordinary(text)) == list(ours.encode_ordinary(text))
    assert data.tokenizer_state(ByteTokenizer()) == {"name": "byte"}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.clear(),
        lambda s: s.update(ranks=None),
        lambda s: s.update(ranks={"YQ==": 0}),
        lambda s: s["ranks"].update({"YQ==": "0"}),
        lambda s: s["ranks"].update({"YWJj": -1}),
        lambda s: s["ranks"].update({"YWJj": True}),
        lambda s: s["ranks"].update({"YWJj": 5}),
        lambda s: s["ranks"].update({"!": 500}),
        lambda s: s["ranks"].update({5: 500}),
        lambda s: s.update(pat_str="("),
        lambda s: s.update(pat_str=None),
        lambda s: s.update(special_tokens=[1]),
        lambda s: s.update(special_tokens={"<|endoftext|>": 2**40}),
        lambda s: s.update(files=None),
        lambda s: s.update(files={"tokenizer.json": 5}, stops=[]),
        lambda s: s.update(files={"tokenizer.json": "[" * 100_000}, stops=[]),
    ],
)
def test_damaged_state(change, tmp_path):
    state = data.tokenizer_state(get_tokenizer(write_bpe(tmp_path / "m.tiktoken")))
    change(state)
    with pytest.raises(ValueError) as caught:
        data.tokenizer_from_state(state)
    assert "\n" not in str(caught.value)


def test_tokenizer_from_a_file_lives_on_in_the_run(tiny):
    write_bpe("mine.tiktoken")
    run = train.main([*tiny, "--tokenizer", "mine.tiktoken", "--out", "out/bpe"])
    os.remove("mine.tiktoken")
    bits_per_token = run["val_loss"] / np.log(2)
    assert run["val_bpb"] < bits_per_token, "a token should have more than one byte on average"
    mine = train.load_model(Path("out/bpe"))[1]
    text = TEXTS[1]
    assert mine.decode_bytes(mine.encode_ordinary(text)).decode() == text
    assert mine.eot_token == 266
    assert len(mine.encode_ordinary(" the")) == 1
