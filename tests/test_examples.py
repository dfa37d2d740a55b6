"""The README's section "Use it in your own code": its examples run, and two files are enough."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import laser
import lora_rite
import train
from tests.common import DEVICE, REPOSITORY, run_code

# -- the examples ----------------------------------------------------------------------------------


def run_example(line, monkeypatch, folder):
    """Run the README's example with this import, in a folder; return its variables."""
    text = (REPOSITORY / "README.md").read_text()
    section = text.partition("\n## Use it in your own code\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python(\n.*?)```", section, re.DOTALL)
    (source,) = [block for block in blocks if f"\n{line}" in block]
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    variables = {"__name__": "__main__"}
    exec(compile(source, "README.md", "exec"), variables)
    return variables


def test_your_own_idea(tiny, monkeypatch):
    """The section "Your own idea" is a file that trains."""
    section = (REPOSITORY / "README.md").read_text().partition("\n## Your own idea\n")[2]
    Path("mine.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    flags = [*tiny, "--attn", "mine:sharpness=2", "--optim", "mine"]
    result = train.main([*flags, "--lr", "0.1"])
    assert result["step"] == 40
    assert result["val_loss"] < 5.2, "that of guessing a byte is 5.5"


def test_laser_in_transformers(monkeypatch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = run_example("import laser", monkeypatch, tmp_path)["config"]
    assert len(re.findall(r"\d+", capsys.readouterr().out)) == 9, "a first token and eight new ones"
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(256, (2, 12))

    with torch.no_grad():
        # the model attends with LASER; with softmax in its place it is that of transformers
        logits = model(ids).logits
        model.set_attn_implementation("sdpa")
        softmax_logits = model(ids).logits
        assert not torch.allclose(softmax_logits, logits, atol=1e-3)
        model.set_attn_implementation("laser")
        with monkeypatch.context() as patch:
            patch.setattr(laser, "attention", laser.attend)
            assert torch.allclose(model(ids).logits, softmax_logits, atol=1e-5)

        # padding on the right changes nothing before it; padding on the left would
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        padded = ids.masked_fill(mask == 0, 3)
        assert torch.allclose(model(padded, mask).logits[0, :8], logits[0, :8], atol=1e-5)
        mask = mask.flip(1)
        padded = ids.roll(4, 1).masked_fill(mask == 0, 3)
        assert not torch.allclose(model(padded, mask).logits[0, 4:], logits[0, :8], atol=1e-3)

        # a KV cache generates what the whole text gives
        tokens = model.generate(ids[:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
        predicted = model(tokens[:, :-1]).logits.argmax(-1)
    assert torch.equal(predicted[0, 11:], tokens[0, 12:])


def test_sonew_in_a_loop(monkeypatch, tmp_path):
    example = run_example("from sonew import SONew", monkeypatch, tmp_path)
    assert example["loss"] < 0.1, "the first loss is about 1/3"
    assert example["scheduler"].get_last_lr() == [0.0]
    for state in example["optimizer"].state_dict()["state"].values():
        assert state["step"] == 100 and state["skipped"] == 0


def test_lora_rite_in_the_trainer(monkeypatch, tmp_path, capsys):
    for name in ("peft", "transformers", "accelerate"):
        pytest.importorskip(name)
    rates = []

    class Recorder(lora_rite.LoRARITE):
        """LoRA-RITE that keeps the learning rate of each step."""

        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(lora_rite, "LoRARITE", Recorder)
    example = run_example("from lora_rite import LoRARITE", monkeypatch, tmp_path)
    assert "training_loss=5." in capsys.readouterr().out, "log 256 = 5.5"

    # the factors alternate, and the Trainer took four steps with its own learning rates
    trainable = [name for name, p in example["model"].named_parameters() if p.requires_grad]
    assert [name.split(".")[-3] for name in trainable] == ["lora_A", "lora_B"] * 4
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert example["arguments"].max_grad_norm == 0, "clipping depends on how B A is factored"
    optimizer = example["optimizer"]
    for p in example["factors"]:
        state = lora_rite.unpack(optimizer.state[p]["packed"], 8)
        assert state.step == 4 and state.skipped == 0
        assert p.abs().sum() > 0, "B starts at 0"

    # it resumes from the Trainer's checkpoint
    optimizer = Recorder(optimizer.param_groups)
    arguments = example["TrainingArguments"]("out", max_steps=6, max_grad_norm=0)
    data = example["data"]
    options = {"train_dataset": data, "optimizers": (optimizer, None)}
    example["Trainer"](example["model"], arguments, **options).train(resume_from_checkpoint=True)
    steps = [lora_rite.unpack(state["packed"], 8).step for state in optimizer.state.values()]
    assert steps == [6] * 8


def test_span_attention_over_a_cache(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    example = run_example("from ttt_context import reference", monkeypatch, tmp_path)
    assert capsys.readouterr().out == "torch.Size([3, 8, 16, 64])\n"
    q, k, v, starts = [example[name] for name in ("q", "k", "v", "starts")]
    out = example["reference"](q, k, v, starts)
    assert torch.equal(out[0, :, 0], v[:, 0].repeat_interleave(4, 0)), "it sees the first key only"

    # the kernel, on the last of the three spans
    tensors = [t.to(DEVICE) for t in (q[2:], k, v)]
    kernel_out = example["span_attention"](*tensors, starts[2:])
    assert torch.allclose(kernel_out.cpu(), out[2:], atol=1e-2 if DEVICE == "cuda" else 1e-5)


# -- two files are all you copy --------------------------------------------------------------------

IGNORE_OVERFLOW = """
import warnings
warnings.filterwarnings("ignore", "", RuntimeWarning, "triton.runtime.interpreter")
"""

LASER = """
import torch
import laser
from kernels import laser as kernel

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = torch.randn(3, 1, 2, 8, 16, device=device)
truth = laser.reference(q.double(), k.double(), v.double()).float()
assert torch.allclose(laser.attention(q, k, v), truth, atol=1e-2)
assert torch.allclose(kernel.attention(q, k, v), truth, atol=1e-2)
"""
SIMPLICIAL = """
import torch
import simplicial
from kernels import simplicial as kernel

device = "cuda" if torch.cuda.is_available() else "cpu"
inputs = torch.randn(5, 1, 2, 8, 16, device=device)
truth = simplicial.reference(*inputs.double(), w1=4, w2=2).float()
assert torch.allclose(simplicial.attention(*inputs, w1=4, w2=2), truth, atol=1e-2)
assert torch.allclose(kernel.attention(*inputs, w1=4, w2=2)[0], truth, atol=1e-2)
"""

OPTIMIZER = """
import torch
from {name} import {cls}

device = "cuda" if torch.cuda.is_available() else "cpu"
weights = []
for use_kernel in (True, False):
    torch.manual_seed(0)
    A = torch.nn.Parameter(torch.randn(4, 8).to(device))
    B = torch.nn.Parameter(torch.randn(12, 4).to(device))
    optimizer = {cls}([{{"params": [A, B], {options}}}], lr=0.1, use_kernel=use_kernel)
    (B @ A).square().sum().backward()
    optimizer.step()
    weights.append(B @ A)
assert torch.allclose(*weights, atol=1e-2)
"""
SONEW = OPTIMIZER.format(name="sonew", cls="SONew", options='"eps": 0.1')
LORA_RITE = OPTIMIZER.format(name="lora_rite", cls="LoRARITE", options='"pair": True')
ON_HOPPER = "from kernels import sonew_fused\nsonew_fused.has_hopper = lambda device: True\n"

SPANS = """
import torch
from kernels.ttt_context import span_attention
from reference import reference

device = "cuda" if torch.cuda.is_available() else "cpu"
q = torch.randn(2, 4, 3, 16, device=device)
k, v = torch.randn(2, 2, 20, 16, device=device)
starts = torch.tensor([0, 17])
truth = reference(q.double(), k.double(), v.double(), starts)
assert torch.allclose(span_attention(q, k, v, starts).double(), truth, atol=1e-2)
"""
TTT_FILES = "ttt_context.py train.py sample.py support kernels/ttt_context.py kernels/decode.py"
TTT = "import ttt_context\nassert ttt_context.kernel\n"

COPIES = [  # what is copied, and what is run there
    ("laser.py kernels/laser.py", LASER),
    ("simplicial.py kernels/simplicial.py", SIMPLICIAL),
    ("simplicial.py kernels/simplicial.py kernels/simplicial_hopper.py", SIMPLICIAL),
    ("sonew.py kernels/sonew.py", SONEW),
    ("sonew.py kernels/sonew.py kernels/sonew_hopper.py", SONEW),
    ("sonew.py kernels/sonew.py kernels/sonew_fused.py", SONEW),
    ("sonew.py kernels/sonew.py kernels/sonew_fused.py", ON_HOPPER + SONEW),
    ("sonew.py kernels/sonew.py kernels/sonew_fused.py kernels/sonew_hopper.py", SONEW),
    ("lora_rite.py kernels/lora_rite.py", LORA_RITE),
    ("kernels/ttt_context.py", SPANS),
    (f"{TTT_FILES} kernels/cross_entropy.py", TTT),
]


def copy_files(names, folder):
    """Copy files and folders of the repository to where they are here, into a new folder."""
    for name in names.split():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, target)
        else:
            shutil.copy(REPOSITORY / name, target)


def source_of(path, function):
    """Return the source of one function of a file, with `import torch` before it."""
    text = path.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return "import torch\n\n\n" + ast.get_source_segment(text, node) + "\n"
    raise LookupError(function)


def test_a_paper_works_without_the_rest_of_the_repository(tmp_path):
    """Each copy is used in its own process, with no other file of ours on the path, silently."""
    pytest.importorskip("triton")
    for n, (names, source) in enumerate(COPIES):
        folder = tmp_path / str(n)
        copy_files(names, folder)
        if source == SPANS:  # ttt_context.py needs train.py, but its definition stands alone
            reference = source_of(REPOSITORY / "ttt_context.py", "reference")
            (folder / "reference.py").write_text(reference)
        done = run_code(IGNORE_OVERFLOW + source, env={"PYTHONPATH": ""}, cwd=folder)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), names
