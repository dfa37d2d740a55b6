"""The command sample.py: streaming, stopping, refusals."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from support import cli, data
from tests.common import REPOSITORY, refused, small_gpt

NOT_UTF8 = "caf\udce9"  # what Python makes of the argument $'caf\xe9'
BYTES = data.tokenizer_from_state({"name": "byte"})


@pytest.fixture
def run(tiny):
    """Make a run of two steps under out/, with a context of 16 tokens; return its folder."""
    return train.main([*tiny, "--steps", "2", "--sample", "0"])["out"]


# -- text ------------------------------------------------------------------------------------------


class Words:
    """A tokenizer with eight tokens. Tokens 4 and 7 are the two bytes of é; 5 and 6 end a text."""

    name = "words"
    n_vocab = 8
    eot_token = 5
    stops = {6}
    tokens = [b"a", b"b ", "é".encode(), b"", b"\xc3", b"<eot>", b"<end>", b"\xa9"]

    def encode_ordinary(self, text):
        return [0 if character == "a" else 1 for character in text]

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)

    def chat(self, messages):
        (message,) = messages
        assert set(message) == {"role", "content"}
        assert message["role"] == "user"
        return [5, *self.encode_ordinary(message["content"]), 2]


def decoded(tokens, tokenizer):
    """Return the pieces of text that are printed, one per token and one at the end."""
    return list(sample.decode_stream(iter(tokens), tokenizer))


def test_characters_are_held_back_until_they_are_whole():
    pieces = decoded([195, 169, 226, 130, 172, 255, 65, 195], BYTES)
    assert pieces == ["", "é", "", "", "€", "\ufffd", "A", "", "\ufffd"]
    assert decoded([4, 7, 4, 0, 7], Words()) == ["", "é", "", "\ufffda", "\ufffd", ""]


def test_tokens_that_end_a_text():
    for last in (5, 6):
        assert decoded([0, 2, last, 1], Words()) == ["a", "é", ""]
        assert decoded([4, last], Words()) == ["", "\ufffd"]
    assert decoded([65, 0, 66], BYTES) == ["A", ""]


def test_first_ids():
    words = Words()
    assert sample.first_ids(words) == [5]
    words.start = [0, 1]
    assert sample.first_ids(words) == [0, 1]
    words.start = []
    assert sample.first_ids(words) == [5]


def test_without_an_end_of_text_token():
    words = Words()
    words.eot_token = None
    words.stops = set()
    assert sample.first_ids(words) == []
    assert decoded([0, 5, 6, 1], words) == ["a", "<eot>", "<end>", "b ", ""]


# -- flags and streaming ---------------------------------------------------------------------------


def test_streaming(run, monkeypatch, capsys):
    capsys.readouterr()
    flags = ["--init", run, "--prompt", "the", "--max-tokens", "30", "--device", "cpu"]
    first = sample.main(flags)
    out, err = capsys.readouterr()
    assert out == first["text"] + "\n"
    assert err.startswith(f"{run} on cpu\n30 tokens, ")
    assert first["text"].startswith("the")
    assert first["signal"] == 0
    assert first["tokens_per_s"] > 0

    # the text is that of generate() with the default settings
    model, tokenizer = train.load_model(run)
    settings = {"temperature": 0.8, "top_k": 50, "seed": 1337, "limit": 256}
    ids = list(sample.generate(model, [0, *b"the"], 30, **settings))
    assert first["text"] == "the" + "".join(decoded(ids, tokenizer))
    assert sample.main(flags)["text"] == first["text"]

    # each of these settings changes the text; --no-cache does not
    changes = ["--seed 2", "--temperature 0", "--top-k 1", "--top-p 0.01", "--max-tokens 5"]
    for change in changes:
        assert sample.main([*flags, *change.split()])["text"] != first["text"], change
    monkeypatch.setattr(sample, "KVCache", None)
    assert sample.main([*flags, "--no-cache"])["text"] == first["text"]


def test_defaults(run, capsys):
    """By default, the newest run continues the start of a document by 300 tokens."""
    capsys.readouterr()
    result = sample.main(["--device", "cpu"])
    out, err = capsys.readouterr()
    assert out == result["text"] + "\n"
    assert err.startswith(f"{run} on cpu\n")
    model, tokenizer = train.load_model(run)
    settings = {"temperature": 0.8, "top_k": 50, "seed": 1337, "limit": 256}
    ids = sample.generate(model, [0], 300, **settings)
    assert result["text"] == "".join(decoded(ids, tokenizer))


def test_the_dtype_is_that_of_the_flag(run, monkeypatch):
    dtypes = []

    def recording_generate(model, *args, **settings):
        dtypes.append(model.dtype)
        return original_generate(model, *args, **settings)

    original_generate = sample.generate
    monkeypatch.setattr(sample, "generate", recording_generate)
    for flags in ([], ["--dtype", "bf16"], ["--dtype", "fp32"]):
        sample.main([*flags, "--max-tokens", "2", "--device", "cpu"])
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]


def test_prompts_of_any_length(run, capsys):
    prompt = "wizards boil éclairs " * 4
    Path("p.txt").write_text(prompt)
    flags = ["--max-tokens", "3", "--temperature", "0", "--device", "cpu"]
    text = sample.main(["--prompt", "@p.txt", *flags])["text"]
    assert text.startswith(prompt)
    assert "the prompt has 89 tokens; the last 16 count" in capsys.readouterr().err

    model, tokenizer = train.load_model(run)
    context = list(prompt.encode())[-16:]
    ids = sample.generate(model, context, 3, temperature=0, limit=256)
    assert text == prompt + "".join(decoded(ids, tokenizer))

    sample.main(["--prompt", "x" * 15, *flags])
    assert "count" not in capsys.readouterr().err, "15 bytes and a start token fit 16 positions"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Let load_model return a small model with the tokenizer above, whatever the folder."""
    monkeypatch.chdir(tmp_path)
    words = Words()
    model = small_gpt(vocab_size=12)  # padded: ids from 8 on have no token
    monkeypatch.setattr(train, "load_model", lambda *args: (model, words))
    monkeypatch.setattr(sample.run_folder, "find_run", Path)
    return words


def test_chat(words, monkeypatch, capsys):
    model, _ = train.load_model()
    flags = ["--init", "hf", "--max-tokens", "40", "--device", "cpu"]
    settings = {"temperature": 0.8, "top_k": 50, "seed": 1337, "limit": 8}
    ids = list(sample.generate(model, [5, 0, 1, 2], 40, **settings))
    assert {5, 6} & set(ids), "the test needs an answer that ends before 40 tokens"
    expected = "".join(decoded(ids, words))
    assert expected

    assert sample.main([*flags, "--chat", "ab"])["text"] == expected
    assert capsys.readouterr().out == expected + "\n", "only the answer should be printed"
    Path("m.txt").write_text("ab")
    assert sample.main([*flags, "--chat", "@m.txt"])["text"] == expected

    refused([*flags, "--chat", "ab", "--prompt", "c"], "give one", main=sample.main)
    monkeypatch.delattr(Words, "chat")
    refused([*flags, "--chat", "ab"], "hf has no chat template", "--prompt", main=sample.main)


def test_the_sample_of_a_training_run(words, capsys):
    """It starts a document, or if no token does that, with token 0, and ends with the text."""
    model, _ = train.load_model()
    model.train()
    settings = {"temperature": 0.8, "top_k": 50, "limit": 8}
    for eot_token, stops in ((5, {6}), (None, set())):
        words.eot_token = eot_token
        words.stops = stops
        for n, seed in ((20, 3), (20, 4), (7, 3)):
            ids = list(sample.generate(model, [eot_token or 0], n, seed=seed, **settings))
            sample.show_sample(model, words, n, seed, None)
            expected = "".join(decoded(ids, words))
            assert capsys.readouterr().out == f"sample   {expected}\n"
            assert not model.training
    sample.show_sample(model, words, 9, 3, SimpleNamespace(now=signal.SIGINT))
    assert capsys.readouterr().out == "sample   \n"


def test_a_model_without_an_end_of_text_token(words, capsys):
    words.eot_token = None
    words.stops = set()
    flags = ["--init", "hf", "--device", "cpu", "--max-tokens", "9"]
    refused(flags, "no token to continue", main=sample.main)
    sample.main([*flags, "--prompt", "a"])
    assert "9 tokens" in capsys.readouterr().err


def test_bad_flags(run, tmp_path):
    for flags, part in {
        "--temperature -1": "--temperature is -1.0",
        "--temperature nan": "--temperature is nan",
        "--temperature inf": "--temperature is inf",
        "--temperature warm": "--temperature",
        "--top-p 0": "top-p is 0.0; it must be above 0 and at most 1",
        "--top-p 1.5": "top-p is 1.5",
        "--top-p nan": "--top-p is nan",
        "--top-k -2": "--top-k is -2",
        "--max-tokens 0": "--max-tokens is 0",
        "--seed -1": "--seed is -1",
        "--dtype fp8": "fp8",
        "--device abacus": "abacus",
        "--attn nowhere": "nowhere",
        "--bench": "--bench",
        "--init nowhere": "nowhere holds no run",
    }.items():
        refused(flags.split(), part, main=sample.main)
    for flag in ("--init", "--prompt", "--chat", "--attn", "--device", "--dtype", "--export"):
        refused([flag, ""], flag, "empty", main=sample.main)


def test_extreme_flags(run, capsys):
    flags = ["--max-tokens", "20", "--device", "cpu"]
    greedy = sample.main([*flags, "--temperature", "0"])["text"]
    for flag in ("--temperature 1e-40", "--top-p 1e-40", "--top-p 1e-300", "--top-k 1"):
        assert sample.main([*flags, *flag.split()])["text"] == greedy, flag
    everything = sample.main([*flags, "--top-k", "0"])["text"]
    for flag in ("--top-k 256", "--top-k 4294967296"):
        assert sample.main([*flags, *flag.split()])["text"] == everything, flag
    assert sample.main([*flags, "--temperature", "4294967296"])["text"]


def test_no_run_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused([], "no run under out/", main=sample.main)


def test_prompts_that_are_not_text(run, tmp_path):
    flags = ["--max-tokens", "3", "--device", "cpu"]

    def bad(prompt, *parts):
        for flag in ("--prompt", "--chat"):
            refused([*flags, flag, prompt], *parts, main=sample.main)

    for prompt in (NOT_UTF8, "\ud800", "a\0b"):
        bad(prompt, "not UTF-8 text")
    Path("latin.txt").write_bytes(b"caf\xe9")
    bad("@latin.txt", "latin.txt", "not UTF-8 text")
    Path("nul.txt").write_bytes(b"a\0b")
    bad("@nul.txt", "nul.txt", "not UTF-8 text")

    bad("@nowhere", "nowhere")
    bad("@", "file")
    bad(f"@{tmp_path}", tmp_path.name)
    bad("@" + "x" * 300, "x" * 300)
    bad("@" + NOT_UTF8, "caf")
    bad("@a\0b", "a")
    os.mkfifo("fifo")
    bad("@fifo", "fifo")
    if os.geteuid():
        Path("secret.txt").write_text("x")
        Path("secret.txt").chmod(0)
        bad("@secret.txt", "secret.txt", "Permission denied")

    Path("bom.txt").write_bytes(b"\xef\xbb\xbfthe")
    assert sample.main([*flags, "--prompt", "@bom.txt"])["text"].startswith("the")
    Path("empty.txt").write_bytes(b"")
    assert sample.main([*flags, "--prompt", "@empty.txt"]) is not None


def test_damaged_folders(run):
    whole = Path(run, "ckpt.pt").read_bytes()
    damaged = [
        ("ckpt.pt", b""),
        ("ckpt.pt", b"not a checkpoint"),
        ("ckpt.pt", whole[: len(whole) // 2]),
        ("config.json", b""),
        ("config.json", b"{"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"architectures": ["LlamaForCausalLM"]}'),
        ("config.json", b"\xff\xfe"),
    ]
    for number, (file, content) in enumerate(damaged):
        folder = Path(f"bad{number}")
        folder.mkdir()
        (folder / file).write_bytes(content)
        refused(["--init", str(folder), "--device", "cpu"], str(folder), main=sample.main)


MINE_ATTENTION = """
import train

def attention(q, k, v, *, sharp=1.0):
    return train.softmax_attention(q * sharp, k, v)
"""


def test_attention_from_the_checkpoint_and_from_a_flag(tiny, tmp_path, monkeypatch, capsys):
    Path("mine_attention.py").write_text(MINE_ATTENTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    train.main([*tiny, "--steps", "2", "--sample", "0", "--attn", "mine_attention:sharp=2"])
    flags = ["--max-tokens", "3", "--device", "cpu"]
    refused(flags, "mine_attention", "not part of this repository", main=sample.main)
    assert sample.main([*flags, "--attn", "mine_attention:sharp=2"])["text"]
    with pytest.raises(SystemExit):
        sample.main(["--attn", "mine_attention:help"])
    assert "sharp=1.0" in capsys.readouterr().out
    refused(["--export", "new"], "mine_attention", "not part of this repository", main=sample.main)


def test_export(tiny):
    run = train.main([*tiny, "--steps", "2", "--sample", "0", "--qk-norm"])["out"]
    assert sample.main(["--init", run, "--export", "new"]) == {}
    assert sorted(os.listdir("new")) == ["config.json", "model.safetensors"]
    model, _ = train.load_model(run)
    exported = load_file("new/model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported[f"model.{name}"], tensor), name

    sample.main(["--init", run, "--export", "half", "--dtype", "bf16"])
    for tensor in load_file("half/model.safetensors").values():
        assert tensor.dtype == torch.bfloat16

    refused(["--init", run, "--export", "new"], "new", main=sample.main)
    refused(["--init", run, "--export", "text.txt"], "text.txt", main=sample.main)
    train.main([*tiny, "--steps", "1", "--sample", "0", "--attn", "laser", "--out", "out/laser"])
    flags = ["--init", "out/laser", "--export", "newer"]
    refused(flags, "laser", main=sample.main)
    assert not Path("newer").exists()
    sample.main([*flags, "--attn", "softmax"])
    assert Path("newer/config.json").exists()


# -- ends: signals, lost readers, full disks -------------------------------------------------------


def test_a_signal_ends_the_text(run, monkeypatch, capsys):
    original = sample.generate
    n_tokens = 3

    def interrupted_generate(*args, **settings):
        for n, token in enumerate(original(*args, **settings)):
            if n == n_tokens:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(sample, "generate", interrupted_generate)
    result = sample.main(["--prompt", "the", "--max-tokens", "200", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert result["signal"] == signal.SIGINT
    assert out == result["text"] + "\n"
    assert f"\n{n_tokens} tokens, " in err
    assert len(result["text"]) <= len("the") + n_tokens


def test_ctrl_c_while_it_streams(run):
    command = [sys.executable, str(REPOSITORY / "sample.py"), "--prompt", "the", "--device", "cpu"]
    command += ["--max-tokens", "100000000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env)
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    out = first + rest
    assert out.startswith(b"the")
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert b" tokens, " in err


@pytest.fixture
def run_with_stdout(run, monkeypatch, capsys):
    """Return a function (stdout, prompt) -> (exit status, stderr) that runs sample.py here."""
    monkeypatch.setattr(cli, "stop_signals", list)  # signal handlers stay as they are

    def run_main(stdout, prompt):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", prompt, "--device", "cpu"])
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "stdout", stdout)
            cli.run_main(sample.main)
        return end.value.code, capsys.readouterr().err

    return run_main


def test_the_reader_goes_away(run, run_with_stdout):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        status, err = run_with_stdout(stdout, "the")
    assert status == 0
    assert err == f"{run} on cpu\n", "a reader that goes away is no error"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_is_full(run, run_with_stdout):
    with open("/dev/full", "w") as stdout:
        status, err = run_with_stdout(stdout, "the")
    assert status == 2
    lines = err.splitlines()  # the checkpoint and device, and the error
    assert len(lines) == 2
    assert "No space left on device" in lines[1]


def test_stdout_that_lacks_characters(run_with_stdout):
    raw = io.BytesIO()
    status, _ = run_with_stdout(io.TextIOWrapper(raw, "ascii"), "aéb")
    assert status == 0
    assert raw.getvalue().startswith(rb"a\xe9b")
