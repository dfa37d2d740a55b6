"""train.py as a whole: runs, their messages, bad input, plug-ins."""

import csv
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import sample
import train
from support import data, distributed
from tests.common import gpu, refused

ROW = ["step", "lr", "loss", "grad_norm", "val_loss", "val_bpb"]


def read_log(folder):
    """Return the rows of log.csv as lists of numbers, with None for an empty cell."""
    with open(Path(folder) / "log.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ROW
    return [[float(value) if value else None for value in row] for row in rows]


def load(folder):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)


@pytest.fixture
def no_sample(monkeypatch):
    """Leave out the text that a run generates at its end."""
    monkeypatch.setattr(sample, "show_sample", lambda *_: None)


@pytest.fixture
def short(tiny, no_sample):
    return tiny


# -- what a run does -------------------------------------------------------------------------------


def test_each_step_takes_its_own_batch_and_rate(short, monkeypatch):
    flags = [*short, "--lr", "1e-9", "--warmup", "3", "--steps", "12", "--eval-every", "4"]
    flags += ["--seed", "7", "--weight-decay", "0.3"]
    rates = []
    seeds = []
    original = train.train_step

    def recording_train_step(step, *more):
        groups = step.optimizer.param_groups
        rates.append(groups[0]["lr"])
        seeds.append(torch.initial_seed())
        assert len({group["lr"] for group in groups}) == 1, "groups differ in their rate"
        assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
        return original(step, *more)

    monkeypatch.setattr(train, "train_step", recording_train_step)
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # a second from look to look
    monkeypatch.setattr(train, "time", clock)
    result = train.main([*flags, "--out", "out/a"])
    rows = read_log("out/a")
    assert [row[0] for row in rows] == list(range(1, 13))  # the column "step"
    for step, seed in enumerate(seeds):
        distributed.seed_everything(7, step)
        assert seed == torch.initial_seed(), "each step should seed the numbers that plug-ins draw"
    run = train.RunConfig(lr=1e-9, steps=12, warmup=3)
    assert rates == [train.get_lr(step, run) for step in range(12)]
    assert rates == [row[1] for row in rows]  # the column "lr"

    # a rate of 1e-9 does not move the weights, so each loss is that of the first weights
    config = json.loads(Path("out/a/config.json").read_text())
    model = train.GPT(train.GPTConfig(**config["model"]))
    train.init_weights(model, 7)
    text = data.load_dataset("text.txt", data.get_tokenizer("byte"), 16, Path("cache"))
    run = train.RunConfig(**config["run"])
    for step, _, loss, _, val_loss, val_bpb in rows:
        ((x, y),), _ = train.get_batch(text, run, 16, int(step) - 1, 4, torch.device("cpu"))
        assert loss == pytest.approx(model(x, y).item(), abs=1e-5)
        is_evaluated = step % 4 == 0
        assert (val_loss is not None) == is_evaluated
        assert (val_bpb is not None) == is_evaluated
    val_loss = train.evaluate(model, text, run, 16, 4, torch.device("cpu"))
    *_, last_val_loss, last_val_bpb = rows[-1]
    assert last_val_loss == pytest.approx(val_loss, abs=1e-5)
    assert result["val_loss"] == pytest.approx(val_loss, abs=1e-5)
    assert last_val_bpb == pytest.approx(val_loss * text.bits_per_byte, abs=1e-5)
    assert result["step"] == 12
    assert config["result"]["step"] == 12
    assert result["tokens_per_s"] == 4 * 16, "a step has 4 sequences of 16 tokens and takes 1 s"


def test_micro_batches_change_nothing_but_rounding(short):
    lines = []
    for n in range(200):
        answer = " even" if n % 2 == 0 else " an odd one"
        lines.append(json.dumps({"prompt": f"{n} is", "answer": answer}))
    Path("x.jsonl").write_text("\n".join(lines))
    flags = [*short, "--steps", "6", "--block-size", "8", "--lr", "1e-3", "--optim", "adamw:eps=1"]
    for name in ("text.txt", "x.jsonl"):
        train.main([*flags, "--data", name, "--out", f"out/{name}"])
        train.main([*flags, "--data", name, "--out", f"out/{name}-1", "--micro-batch", "1"])
        whole = np.array(read_log(f"out/{name}"), float)
        parts = np.array(read_log(f"out/{name}-1"), float)
        assert np.allclose(whole, parts, rtol=2e-5, equal_nan=True)


def test_the_dtype_is_that_of_the_flag(short):
    losses = []
    for dtype in ("fp32", "bf16"):
        result = train.main([*short, "--steps", "1", "--dtype", dtype, "--out", f"out/{dtype}"])
        losses.append(result["loss"])
    assert 0 < abs(losses[0] - losses[1]) < 0.01


def test_gradients_are_clipped_unless_the_optimizer_says_no(short, tmp_path, monkeypatch):
    Path("plain_sgd.py").write_text(
        "import torch\n"
        "def optimizer(groups, lr, *, clip=True):\n"
        "    sgd = torch.optim.SGD(groups, lr=lr)\n"
        "    if not clip:\n"
        "        sgd.clips_gradients = False\n"
        "    return sgd\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = [*short, "--weight-decay", "0", "--steps", "1", "--warmup", "1", "--lr", "1"]
    start = train.GPT(train.GPTConfig(256, 16, 2, 2, n_embd=32))
    train.init_weights(start, 1337)
    lengths = {}
    for name, more in {
        "clipped": ["--clip", "0.01", "--optim", "plain_sgd"],
        "clip 0": ["--clip", "0", "--optim", "plain_sgd"],
        "optimizer says no": ["--clip", "0.01", "--optim", "plain_sgd:clip=false"],
    }.items():
        train.main([*flags, *more, "--out", f"out/{name}"])
        weights = load(f"out/{name}")["model"]
        moved = [(p - weights[key]).norm() for key, p in start.named_parameters()]
        lengths[name] = torch.stack(moved).norm().item()

    # with SGD and a rate of 1, the weights move by the gradient
    norm = read_log("out/clipped")[0][ROW.index("grad_norm")]
    assert lengths["clipped"] == pytest.approx(0.01, rel=1e-3)
    assert lengths["clip 0"] == pytest.approx(norm, rel=1e-3)
    assert lengths["optimizer says no"] == lengths["clip 0"]


def test_messages(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sample, "show_sample", lambda model, tokenizer, n, *_: print(f"{n} tokens"))
    result = train.main([*tiny, "--steps", "2"])
    printed = capsys.readouterr().out
    assert result["out"] == "out/tiny-softmax"
    lines = {line[:9].strip(): line[9:] for line in printed.splitlines()}
    assert "cpu: " in lines["device"]
    assert "(set by flag)" in lines["device"]
    assert lines["dtype"] == "fp32 (bf16 needs a recent GPU)"
    assert lines["compile"] == "off (faster only on CUDA)"
    assert "text.txt" in lines["data"]
    assert "(tiny)" in lines["model"]
    assert "2 layers of width 32, 2 heads, context 16, softmax attention, adamw" in lines["model"]
    assert lines["run"] == "out/tiny-softmax: steps 1 to 2 of 2"
    assert "5 tokens" in printed
    flags = [*tiny, "--steps", "2", "--sample", "0", "--dtype", "bf16"]
    train.main([*flags, "--attn", "softmax,laser"])
    printed = capsys.readouterr().out
    assert "bf16 (set by flag)" in printed
    before_result = printed.split("run ")[1].split("/token")[0]
    assert "tokens" not in before_result, "--sample 0 should generate no text"
    assert Path("out/tiny-softmax-laser/ckpt.pt").exists()


def test_text_at_the_end(tiny, capsys, monkeypatch):
    calls = []

    def scripted_generate(model, ids, n, **settings):
        calls.append((model.training, ids, n, settings))
        yield from b"abc"
        yield 0  # the end of text, after which no token should be asked for
        yield from b"never"

    monkeypatch.setattr(sample, "generate", scripted_generate)
    train.main([*tiny, "--steps", "1", "--seed", "9"])
    settings = {"temperature": 0.8, "top_k": 50, "seed": 9, "limit": 256}
    assert calls == [(False, [0], 5, settings)]
    assert "abc\n" in capsys.readouterr().out
    train.main([*tiny, "--steps", "2", "--stop-after", "1"])
    assert len(calls) == 1, "a run that is not complete should generate no text"


# an adapter as a plug-in: a trained matrix `delta` is added to each down_proj
ADAPTER = """
import torch
import torch.nn as nn

def add(linear, inputs, y):
    return y + inputs[0] @ linear.delta.T

def adapt(model, *, std=0.0):
    model.requires_grad_(False)
    parameters = []
    for layer in model.layers:
        linear = layer.mlp.down_proj
        linear.delta = nn.Parameter(torch.randn_like(linear.weight) * std)
        linear.hook = linear.register_forward_hook(add)
        parameters.append(linear.delta)
    return [{"params": parameters}]

def merge(model):
    for layer in model.layers:
        linear = layer.mlp.down_proj
        linear.weight.data += linear.delta.data
        linear.hook.remove()
        del linear.delta
"""


def test_adapters_train_and_merge(short, tmp_path, monkeypatch, capsys, recwarn):
    Path("deltas.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("support.plugins.own_modules", lambda: ["deltas"])
    base = train.main([*short, "--steps", "10", "--out", "out/base"])
    flags = ["--init", "out/base", "--adapter", "deltas:std=0.01", *short, "--steps", "10"]
    capsys.readouterr()
    whole = train.main([*flags, "--out", "out/whole"])
    assert "of them trained" in capsys.readouterr().out
    before = load("out/base")["model"]
    after = load("out/whole")["model"]
    assert whole["val_loss"] < base["val_loss"]
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert after["layers.1.mlp.down_proj.delta"].std() > 0.005

    # without --init, a warning
    assert not any("random weights" in str(warning.message) for warning in recwarn)
    with pytest.warns(UserWarning, match="trained on random weights"):
        train.main([*flags[2:], "--out", "out/random", "--steps", "1"])

    # --init and load_model merge them
    flags = "--data text.txt --eval-only --device cpu".split()
    merged = train.main(["--init", "out/whole", *flags])
    assert merged["val_loss"] != pytest.approx(base["val_loss"], abs=1e-3)
    model, _ = train.load_model("out/whole")
    name = "layers.1.mlp.down_proj.weight"
    delta = after["layers.1.mlp.down_proj.delta"]
    assert torch.equal(model.state_dict()[name], before[name] + delta)
    train.main(["--init", "out/whole", *short, "--steps", "1", "--out", "out/next"])
    assert load("out/next")["config"]["run"]["adapter"] == ""
    assert load("out/next")["model"].keys() == before.keys()


def test_init_starts_a_new_run_from_the_weights(short, capsys):
    first = train.main([*short, "--out", "out/a"])
    flags = ["--data", "text.txt", "--device", "cpu", "--eval-batches", "2"]
    second = train.main(["--init", "out/a", *flags, "--steps", "1", "--lr", "1e-9"])
    assert second["step"] == 1
    assert second["out"] == "out/a-2"
    assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-3)
    config = json.loads(Path("out/a-2/config.json").read_text())
    recipe = (config["run"]["batch_size"], config["run"]["seed"])
    assert recipe == (4, 1337), "settings that no flag changes should be those of the first run"
    longer = train.main(["--init", "out/a", *flags, "--steps", "1", "--block-size", "32"])
    assert load(longer["out"])["config"]["model"]["block_size"] == 32
    for flag, now, before in (("--n-layer", "3", "2"), ("--tokenizer", "gpt2", "byte")):
        refused(["--init", "out/a", flag, now], f"{flag} is {now} here but {before} in out/a")
    refused(["--init", "out/a", "--model", "gpt2"], "leave --model out")


def test_eval_only(short, capsys):
    result = train.main([*short, "--out", "out/a", "--eval-batches", "9"])
    flags = ["--init", "out/a", "--data", "text.txt", "--device", "cpu", "--eval-only"]
    capsys.readouterr()
    scores = train.main([*flags, "--eval-batches", "9"])
    words = capsys.readouterr().out
    assert scores.keys() == {"val_loss", "val_bpb"}
    assert scores["val_loss"] == pytest.approx(result["val_loss"], rel=1e-6)
    assert scores["val_bpb"] == pytest.approx(scores["val_loss"] / math.log(2), rel=1e-3)
    line = f"held out {scores['val_loss']:.4f} nats/token, {scores['val_bpb']:.4f} bits/byte"
    assert words.splitlines()[-1] == line
    assert [path.name for path in Path("out").glob("[!.]*")] == ["a"], "--eval-only left a run"
    other = train.main([*flags, "--eval-batches", "9", "--micro-batch", "1"])
    assert other["val_loss"] == pytest.approx(scores["val_loss"], rel=1e-6)
    refused([*short, "--eval-only"], "--init")


def test_export(short, capsys):
    flags = [*short, "--steps", "1", "--out", "out/a"]
    refused([*flags, "--attn", "softmax,laser", "--export", "new"], "has laser attention")
    refused([*flags, "--qk-norm", "--qkv-bias", "--export", "new"], "both biases and QK-norm")
    refused([*flags, "--export", "text.txt"], "text.txt exists")
    assert not Path("out/a").exists(), "an impossible export should be refused before training"
    train.main([*flags, "--export", "new"])
    assert "exported new" in capsys.readouterr().out
    state = load("out/a")["model"]
    exported = safetensors.torch.load_file("new/model.safetensors")
    assert len(exported) == len(state)
    for name, tensor in state.items():
        assert torch.equal(exported[f"model.{name}"], tensor)
    train.main([*short, "--out", "out/b", "--stop-after", "1", "--export", "newer"])
    assert not Path("newer").exists(), "a run that is not complete should not be exported"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--steps 0", ["--steps is 0", "at least 1"]),
        ("--lr -1", ["--lr is -1.0", "above 0"]),
        ("--lr nan", ["--lr is nan", "above 0"]),
        ("--steps many", ["--steps", "invalid int value: 'many'"]),
        ("--n-head 5", ["--n-embd 32 is no multiple of --n-head 5"]),
        ("--dtype fp16", ["fp32 or bf16"]),
        ("--device tpu", ["tpu", "cpu, cuda"]),
        ("--device cuda:99", ["cuda:99"]),
        ("--micro-batch 3", ["--batch-size 4 is no multiple", "--micro-batch 3"]),
        ("--stop-after -1", ["at least 0"]),
        ("--sample -1", ["at least 0"]),
        ("--data nowhere", ["there is no data 'nowhere'", "a text file"]),
        ("--data empty.txt", ["is empty"]),
        ("--data short.txt", ["--block-size"]),
        ("--data binary", ["not a text file", "UTF-8"]),
        ("--data nothing", ["no text files"]),
        ("--tokenizer nix", ["no tokenizer 'nix'", "byte"]),
        ("--vocab-size 99", ["less than the tokenizer's 256"]),
        ("--model huge", ["invalid choice: 'huge'"]),
        ("--attn sofmax", ["no module 'sofmax'", "softmax"]),
        ("--attn softmax,os.path", ["no module 'os.path'"]),
        ("--attn softmax:x=1", ["no option 'x'"]),
        ("--attn softmax,", ["no module ''"]),
        ("--optim train", ["no module 'train'"]),
        ("--optim adamw:beta1=2", ["--optim adamw:beta1=2"]),
        ("--adapter nix", ["no module 'nix' with a function adapt"]),
        ("--resume nowhere", ["nowhere holds no run"]),
        ("--resume", ["no run under out/"]),
        ("--fsdp", ["torchrun"]),
        ("--out text.txt/a", ["cannot write"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_flag_or_data(short, flags, parts):
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short")
    Path("binary").write_bytes(b"\x7fELF\0\1\2")
    Path("nothing").mkdir()
    refused([*short, "--steps", "2", *flags.split()], *parts)
    folders = [path.name for path in Path("out").glob("*")]
    assert folders in ([], [".tokens"]), "a failed start left a run folder"


# -- on the GPU ------------------------------------------------------------------------------------


@gpu
def test_compiled_bf16_on_the_gpu_follows_eager_fp32(short):
    flags = [flag for flag in short if flag not in ("--device", "cpu")]
    flags += ["--model", "tiny", "--n-embd", "64", "--steps", "60"]
    eager = train.main([*flags, "--no-compile", "--dtype", "fp32", "--out", "out/eager"])
    fast = train.main([*flags, "--out", "out/fast"])
    cpu = train.main([*flags, "--device", "cpu", "--out", "out/cpu"])
    assert abs(cpu["val_loss"] - eager["val_loss"]) < 0.02
    assert abs(fast["val_loss"] - eager["val_loss"]) < 0.1
    assert json.loads(Path("out/fast/config.json").read_text())["run"]["dtype"] == "bf16"


@gpu
def test_loss_without_triton_on_the_gpu(monkeypatch):
    x = torch.randn(9, 8, device="cuda")
    w = torch.randn(20, 8, device="cuda")
    y = torch.randint(20, (9,), device="cuda")
    loss = train.linear_cross_entropy(x, w, y)
    monkeypatch.setattr(train, "fused_cross_entropy", None)
    with pytest.warns(UserWarning, match="slower without Triton"):
        slower = train.linear_cross_entropy(x, w, y)
    assert torch.allclose(loss, slower)
