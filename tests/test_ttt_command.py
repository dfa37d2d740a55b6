"""python ttt_context.py --prompt FILE: what it prints, what it refuses, how it stops."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
import ttt_context
from experiments import ttt_cost
from support import hub, run_folder, tokenizer
from tests.common import REPOSITORY, refused, run_script, small_gpt
from tests.hf import edit_json, hf, make_folder  # noqa: F401

# flags of a cheap run; the value of --prompt comes next
SMALL = "--init newest --steps 3 --span 16 --max-tokens 5 --device cpu --prompt".split()


def without_seconds(result):
    return {key: value for key, value in result.items() if "seconds" not in key}


@pytest.fixture
def run(tiny):
    """Make a run of one step in out/a, and prompt.txt, a part of its text."""
    train.main([*tiny, "--out", "out/a", "--steps", "1"])
    text = Path("text.txt").read_text()
    Path("prompt.txt").write_text(text[:1200])
    return Path("out/a")


def test_command(run, capsys):
    result = ttt_context.main([*SMALL, "prompt.txt", "--batch-spans", "2"])
    printed = capsys.readouterr()
    assert "up to 16 tokens" in printed.err
    assert "reading: 100%" in printed.err
    assert "2/2" in printed.err
    assert "adapting: 100%" in printed.err
    assert "3/3" in printed.err
    assert f"as it is\n{result['plain']}\n" in printed.out
    assert f"trained on this prompt\n{result['adapted']}\n" in printed.out

    # without a question the context is one start token and all bytes of the text but the last,
    # which is fed to the model for the first token of the answer
    size = len(Path("prompt.txt").read_bytes())
    assert result["context"] == 1 + size - 1
    assert result["lr"] == 1e-3
    assert result["held_out_spans"] == 8
    before = result["held_out_before"]
    after = result["held_out_after"]
    assert before != after
    answers = "the same answer" if result["plain"] == result["adapted"] else "another answer"
    change = f"the loss on 8 held-out spans went from {before:.4f} to {after:.4f}"
    assert printed.out.splitlines()[-1] == f"training gave {answers}; {change}"
    model, _ = train.load_model(run_folder.find_run("newest"))
    assert result["flops"] == ttt_cost.flops_of_spans(model, 3 * 2 * 16, size)

    # thinking tokens would come after the context and that last byte
    thinking_tokens = ttt_cost.thinking_tokens(model, size + 1, result["flops"])
    assert result["thinking_tokens"] == thinking_tokens

    # a second call gives the same numbers
    again = ttt_context.main([*SMALL, "prompt.txt", "--batch-spans", "2"])
    assert without_seconds(again) == without_seconds(result)


def test_the_default_model_is_a_real_one_or_else_the_newest_run(tiny, monkeypatch, capsys):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": "empty"}
    flags = [flag for flag in SMALL if flag not in ("--init", "newest")]
    done = run_script("ttt_context.py", *flags, "text.txt", env=offline)
    assert done.returncode == 2
    note, error = done.stderr.splitlines()
    assert note.startswith(f"using the newest run: {ttt_context.DEFAULT_MODEL} is neither")
    assert error == "ttt_context.py: there is no run under out/ yet; python train.py makes one"

    # stands for the download: it fails until there is a folder "fetched"
    names = []

    def fetch(name):
        names.append(name)
        if not Path("fetched").is_dir():
            raise ValueError("no network")
        return Path("fetched")

    monkeypatch.setattr(hub, "fetch", fetch)
    train.main([*tiny, "--out", "out/a", "--steps", "1"])
    Path("prompt.txt").write_text(Path("text.txt").read_text()[:300])
    capsys.readouterr()

    # the download fails: the default model is replaced by the run, a named model is an error
    ttt_context.main([*flags, "prompt.txt"])
    err = capsys.readouterr().err
    assert "using the newest run: no network\n" in err
    assert "out/a on cpu" in err
    refused([*SMALL, "prompt.txt", "--init", "a/b"], "no network", main=ttt_context.main)

    # the download works: the fetched model is used although there is a run
    make_folder(Path("fetched"))
    assert ttt_context.main([*flags, "prompt.txt"])["lr"] == 3e-5
    err = capsys.readouterr().err
    assert "newest" not in err
    assert "fetched on cpu" in err
    assert names == [ttt_context.DEFAULT_MODEL, "a/b", ttt_context.DEFAULT_MODEL]


def test_default_settings():
    """Those of the paper; the learning rate depends on the model."""
    defaults = {
        "prompt": "p.txt",
        "question": "",
        "init": "",
        "steps": 32,
        "span": 128,
        "batch_spans": 1,
        "lr": None,
        "seed": 1337,
        "max_tokens": 100,
        "device": "",
        "dtype": "",
    }
    assert asdict(ttt_context.AdaptConfig(prompt="p.txt")) == defaults


def test_the_dtype_is_that_of_the_flag(run, monkeypatch):
    dtypes = []

    def load_model(folder, device, dtype):
        dtypes.append(dtype)
        return original_load_model(folder, device, dtype)

    original_load_model = train.load_model
    monkeypatch.setattr(train, "load_model", load_model)
    ttt_context.main([*SMALL, "prompt.txt"])
    result = ttt_context.main([*SMALL, "prompt.txt", "--dtype", "bf16"])
    assert dtypes == [torch.float32, torch.bfloat16]
    assert 0 < result["seconds"] < 60


def test_progress_of_layers_leaves_no_hooks():
    model = small_gpt()
    with pytest.raises(KeyError), ttt_context.progress_of_layers(model, 1, "reading"):
        raise KeyError
    assert not any(layer._forward_hooks for layer in model.layers)


def test_each_flag_changes_what_it_says(run):
    two_spans = ttt_context.main([*SMALL, "prompt.txt", "--batch-spans", "2"])
    one_span = ttt_context.main([*SMALL, "prompt.txt"])
    assert one_span["held_out_after"] != two_spans["held_out_after"]
    assert two_spans["flops"] == pytest.approx(2 * one_span["flops"], rel=1e-3)
    other_seed = ttt_context.main([*SMALL, "prompt.txt", "--seed", "7"])
    assert other_seed["held_out_after"] != one_span["held_out_after"]

    # with a question all of the text is context, its last byte too
    untrained = ttt_context.main([*SMALL, "prompt.txt", "--lr", "0", "--question", "Who boils?"])
    assert untrained["plain"] == untrained["adapted"]
    assert untrained["held_out_before"] == untrained["held_out_after"]
    assert untrained["context"] == one_span["context"] + 1


def test_held_out_losses_and_answers_are_of_the_right_weights(run):
    result = ttt_context.main([*SMALL, "prompt.txt", "--lr", "0.03", "--question", "Who?"])
    model, _ = train.load_model(run)
    ids = torch.tensor([0, *Path("prompt.txt").read_bytes()])
    caches = ttt_context.prefill(model, ids, room=20)
    held_out, starts = ttt_context.split_spans(len(ids), 16)

    @torch.no_grad()
    def held_out_loss():
        losses = [ttt_context.span_loss(model, caches, ids, start[None], 16) for start in held_out]
        return torch.stack(losses).mean().item()

    def reply():
        tokens = list(ttt_context.answer(model, caches, len(ids), list(b"Who?"), 5, 256))
        return bytes(tokens).decode(errors="replace")

    before = held_out_loss()
    assert result["plain"] == reply()
    options = {"steps": 3, "n": 16, "lr": 0.03, "seed": 1337}
    with ttt_context.adapt(model, caches, ids, starts, **options):
        after = held_out_loss()
        assert result["adapted"] == reply()
    assert result["held_out_before"] == pytest.approx(before, rel=1e-5)
    assert result["held_out_after"] == pytest.approx(after, rel=1e-5)
    assert abs(after - before) > 1e-4


def test_thinking_comes_after_the_question(run):
    question = "Who boils? " * 60
    result = ttt_context.main([*SMALL, "prompt.txt", "--question", question])
    model, _ = train.load_model(run)
    T = result["context"]
    after_context = ttt_cost.thinking_tokens(model, T, result["flops"])
    after_question = ttt_cost.thinking_tokens(model, T + len(question), result["flops"])
    assert result["thinking_tokens"] == after_question
    assert after_question < after_context


def test_an_answer_ends_at_the_end_of_text(run, monkeypatch):
    def scripted_answer(model, caches, T, question, n_tokens, limit):
        assert limit == 256, "ids above the 256 bytes are padding and must not be generated"
        yield from [*b"Hi", 0, *b"!"][:n_tokens]  # token 0 is the end of text

    monkeypatch.setattr(ttt_context, "answer", scripted_answer)
    assert ttt_context.main([*SMALL, "prompt.txt"])["plain"] == "Hi"


BAD_FLAGS = [
    ("", ["--prompt", "--experiment"]),
    ("--prompt text.txt --full", ["--full"]),
    ("--prompt none.txt", ["none.txt"]),
    ("--prompt empty.txt", ["has 0 tokens", "128"]),
    ("--prompt binary", ["binary", "UTF-8"]),
    ("--prompt nul.txt", ["nul.txt", "UTF-8"]),
    ("--prompt .", ["."]),
    ("--prompt fifo", ["fifo"]),
    (f"--prompt {'x' * 300}", ["xxx"]),
    ("--prompt short.txt", ["has 13 tokens", "128"]),
    ("--prompt edge.txt --span 5", ["has 15 tokens", "more than 15", "--span"]),
    ("--prompt text.txt --span 0", ["--span is 0"]),
    ("--prompt text.txt --steps -1", ["--steps is -1"]),
    ("--prompt text.txt --seed -1", ["--seed is -1"]),
    ("--prompt text.txt --max-tokens 0", ["--max-tokens is 0"]),
    ("--prompt text.txt --batch-spans 0", ["--batch-spans is 0"]),
    ("--prompt text.txt --lr 1e38", ["--lr is"]),
    ("--prompt text.txt --batch-spans 4000000000", ["GB", "--batch-spans"]),
    ("--prompt text.txt --max-tokens 4000000000", ["GB"]),
    ("--prompt text.txt --lr nan", ["--lr is nan"]),
    ("--prompt text.txt --lr inf", ["--lr is inf"]),
    ("--prompt text.txt --lr -1", ["--lr is -1"]),
    ("--prompt text.txt --init nowhere", ["nowhere"]),
    ("--prompt text.txt --dtype fp8", ["fp8", "bf16"]),
    ("--prompt text.txt --device tpu", ["tpu"]),
]


def test_refuses_in_one_sentence(run, monkeypatch):
    Path("empty.txt").write_text("")
    Path("binary").write_bytes(b"\xff\x00\x01")
    Path("nul.txt").write_text("a\0b" * 100)
    Path("short.txt").write_text("boil éclairs")
    Path("edge.txt").write_text("x" * 15)  # with the start token, without the last byte: 15 tokens
    os.mkfifo("fifo")
    text = Path("text.txt").read_bytes()
    for flags, parts in BAD_FLAGS:
        device = [] if "--device" in flags else ["--device", "cpu"]
        init = [] if "--init" in flags else ["--init", "newest"]
        refused([*init, *flags.split(), *device], *parts, main=ttt_context.main)
    for flag in ("--prompt", "--question", "--init", "--device", "--dtype"):
        refused(["--prompt", "text.txt", flag, ""], f"{flag} is empty", main=ttt_context.main)
    not_utf8 = ["--prompt", "text.txt", "--question", "caf\udce9"]
    refused(not_utf8, "caf", "UTF-8", main=ttt_context.main)
    with monkeypatch.context() as limits:
        limits.setattr(ttt_cost, "free_bytes", lambda device: 2**20)
        refused([*SMALL, "text.txt"], "tokens", "are free", "shorter", main=ttt_context.main)
    assert Path("text.txt").read_bytes() == text
    assert [path.name for path in Path("out").glob("[!.]*")] == ["a"], "it made a new run"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_refuses_a_prompt_without_permission(run):
    os.chmod("prompt.txt", 0)
    refused([*SMALL, "prompt.txt"], "prompt.txt", main=ttt_context.main)


def test_a_byte_order_mark_is_no_text(run):
    text = Path("prompt.txt").read_bytes()
    Path("marked.txt").write_bytes(b"\xef\xbb\xbf" + text)
    results = [ttt_context.main([*SMALL, name]) for name in ("marked.txt", "prompt.txt")]
    assert without_seconds(results[0]) == without_seconds(results[1])


def test_memory_is_known():
    assert 2**20 < ttt_cost.free_bytes(torch.device("cpu")) < 2**50


# -- reading a long prompt on a CPU ----------------------------------------------------------------


def test_a_prompt_read_in_pieces_has_the_caches_of_one_pass(monkeypatch):
    model = small_gpt(torch.float64, n_kv_head=2).requires_grad_(False)
    ids = torch.randint(64, (61,), generator=torch.Generator().manual_seed(3))
    whole = ttt_context.prefill(model, ids, room=8)

    # 4 pieces with about 61^2 / 8 pairs each
    flops = 2 * model.config.n_head * model.config.head_dim * 61**2
    monkeypatch.setattr(ttt_context, "FLOPS_PER_CALL", flops / 4)
    lengths = [len(piece) for piece in ttt_context.split_prompt(model, ids)]
    assert lengths == [30, 13, 10, 8]
    in_pieces = ttt_context.prefill(model, ids, room=8)
    for cache, expected in zip(in_pieces, whole, strict=True):
        assert cache.length == 61
        for t, expected_t in zip(cache.tensors, expected.tensors, strict=True):
            assert t.shape == expected_t.shape
            assert (t - expected_t)[:, :, :61].abs().max() < 1e-12

    # pieces that do not see each other would give other keys and values
    alone = ttt_context.prefill(model, ids[30:43])
    assert (alone[1].tensors[1][:, :, :13] - whole[1].tensors[1][:, :, 30:43]).abs().max() > 1e-3


def test_long_prompts_are_read_in_pieces_on_a_cpu_alone():
    model = small_gpt(n_head=9, n_kv_head=3, head_dim=64)  # as SmolLM2-135M
    assert len(ttt_context.split_prompt(model, torch.zeros(8192))) == 1
    on_gpu = torch.zeros(300_000, device="meta")  # stands for one
    assert len(ttt_context.split_prompt(model, on_gpu)) == 1

    # attention to one key takes 4 FLOPs for each channel of the query
    first, *others = ttt_context.split_prompt(model, torch.zeros(300_000))
    end = len(first)
    assert 2 * 9 * 64 * end**2 < 1.2 * ttt_context.FLOPS_PER_CALL  # it sees half of its keys
    for piece in others:
        end += len(piece)
        assert 4 * 9 * 64 * len(piece) * end < 1.2 * ttt_context.FLOPS_PER_CALL
    assert end == 300_000


def test_progress_of_reading_counts_the_layers_of_all_pieces(run, monkeypatch, capsys):
    monkeypatch.setattr(ttt_context, "FLOPS_PER_CALL", 2 * 32 * 1200**2 / 2.5)
    ttt_context.main([*SMALL, "prompt.txt"])
    err = capsys.readouterr().err
    assert "reading: 100%" in err
    assert "6/6" in err  # two layers, three pieces


# -- chat templates --------------------------------------------------------------------------------


class ChatTokenizer(tokenizer.ByteTokenizer):
    """Bytes with a chat template: a fake of Hugging Face's, whose text `render` makes."""

    chat_template = "a template"  # not None: there is one

    def __init__(self, render):
        self.render = render

    def chat(self, messages):
        return list(self.render(messages[0]["content"]).encode())


def test_a_question_is_the_rest_of_the_message():
    chat = ChatTokenizer(lambda text: f"<user>{text}<end><assistant>")
    context, question = ttt_context.encode_prompt(chat, "A text.", "Who?")
    assert bytes(context) == b"<user>A text.\n\n"
    assert bytes(question) == b"Who?<end><assistant>"
    chat.render = lambda text: f"<user>{text.strip()}<end>"  # as many templates do
    context, question = ttt_context.encode_prompt(chat, "A text.", "Who?")
    assert bytes(context + question) == b"<user>A text.\n\nWho?<end>"

    # if nothing of the question is left, the last token takes its place
    chat.render = lambda text: f"<user>{text.strip()}"
    context, question = ttt_context.encode_prompt(chat, "A text.", " ")
    assert bytes(context) == b"<user>A text"
    assert bytes(question) == b"."

    # without a question, or without a template, it is plain text
    context, question = ttt_context.encode_prompt(chat, "A text.")
    assert bytes(context) == b"\0A text"
    assert bytes(question) == b"."
    for plain in (tokenizer.ByteTokenizer(), ChatTokenizer(None)):
        plain.chat_template = None
        context, question = ttt_context.encode_prompt(plain, "A text.", "Who?")
        assert bytes(context) == b"\0A text."
        assert bytes(question) == b"Who?"


def test_a_template_that_fails_is_an_error():
    def fails(text):
        raise ValueError("the chat template of x does not work (roles must alternate)")

    with pytest.raises(ValueError, match="roles must alternate"):
        ttt_context.encode_prompt(ChatTokenizer(fails), "A text.", "Who?")


def test_a_hugging_face_folder_and_its_template(hf, tiny):  # noqa: F811
    folder = hf(n_kv_head=2, qk_norm=True)
    flags = [*SMALL, "prompt.txt", "--question", "Who?", "--init", str(folder)]
    text = Path("text.txt").read_text()[:1200]
    Path("prompt.txt").write_text(text)
    _, tokenizer = train.load_model(folder)
    n_tokens = len(tokenizer.encode_ordinary(text + "\n\n"))
    result = ttt_context.main(flags)
    assert result["lr"] == 3e-5, "a model of Hugging Face should get the small default rate"
    n_added = result["context"] - n_tokens
    assert 0 < n_added < 50, "the template's tokens should come before the text"

    settings = folder / "tokenizer_config.json"
    edit_json(settings, chat_template="{{ raise_exception('not today') }}")
    refused(flags, "template", "not today", main=ttt_context.main)
    edit_json(settings, chat_template=None)
    n_added = ttt_context.main(flags)["context"] - len(tokenizer.encode_ordinary(text))
    assert n_added in (0, 1), "without a template at most a start token comes before the text"


# -- as a process ----------------------------------------------------------------------------------


def test_ctrl_c(run):
    command = [sys.executable, str(REPOSITORY / "ttt_context.py"), *SMALL, "prompt.txt"]
    command += ["--steps", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    # wait until the progress bar says that it trains
    seen = b""
    while b"adapting" not in seen:
        part = os.read(process.stderr.fileno(), 1000)
        assert part, f"the process ended early: {seen}"
        seen += part

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in seen + err
    assert b"as it is" not in out
