"""Hugging Face folders: models against transformers, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
import train
from support import huggingface
from tests.common import REPOSITORY, assert_close, refused, small_gpt
from tests.hf import (
    FAMILIES,
    check_refused,
    edit_json,
    export_run,
    hf,  # noqa: F401
    make_folder,
    write_model,
)

TEXT = "the quick brown fox jumps over the lazy dog, 12 times. "


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path, family):
    truth = write_model(tmp_path, family, old_config=family.endswith("tied"))
    model, _ = train.load_model(tmp_path)
    ids = torch.randint(320, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids)
        theirs = truth(ids).logits
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5
    assert ours.std() > 0.5

    low, _ = train.load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters() if p.dim() > 1} == {torch.bfloat16}
    with torch.no_grad():
        eager = truth.to(torch.bfloat16)(ids).logits
        assert_close("bfloat16", low(ids), eager, theirs.double())


def test_config_fields(tmp_path):
    write_model(tmp_path, "qwen2")
    expected = {
        "vocab_size": 320,
        "block_size": 128,
        "n_layer": 3,
        "n_head": 4,
        "n_kv_head": 1,
        "n_embd": 32,
        "head_dim": 8,
        "n_hidden": 48,
        "tied": True,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "qkv_bias": True,
        "qk_norm": False,
    }
    assert huggingface.read_config(tmp_path) == expected
    saved = huggingface.load_checkpoint(tmp_path)
    assert saved["config"]["model"] == expected
    run = {"block_size": 128, "batch_size": 16, "steps": 200, "lr": 2e-5}
    assert saved["config"]["run"] == {**run, "tokenizer": tmp_path.name}

    # what a config.json may leave out
    edit_json(tmp_path / "config.json", tie_word_embeddings=None, num_key_value_heads=None)
    edit_json(tmp_path / "config.json", rope_parameters=None, head_dim=None)
    edit_json(tmp_path / "config.json", max_position_embeddings=4096)
    defaults = {"tied": False, "n_kv_head": 4, "rope_theta": 10000.0, "block_size": 4096}
    assert huggingface.read_config(tmp_path) == {**expected, **defaults}
    edit_json(tmp_path / "config.json", architectures=["Qwen3ForCausalLM"], rope_theta=5)
    fields = huggingface.read_config(tmp_path)
    assert (fields["head_dim"], fields["rope_theta"], fields["qk_norm"]) == (128, 5.0, True)

    # the largest models, such as Llama 3.1 405B and Qwen2.5 1M
    edit_json(tmp_path / "config.json", num_hidden_layers=126, hidden_size=16384)
    edit_json(tmp_path / "config.json", num_attention_heads=128, max_position_embeddings=1010000)
    fields = huggingface.read_config(tmp_path)
    assert (fields["n_layer"], fields["n_embd"], fields["n_head"]) == (126, 16384, 128)
    assert fields["block_size"] == 1010000


def test_shapes_are_those_of_the_gpt():
    for shape in (
        {"n_kv_head": 2, "qkv_bias": True},
        {"tied": False, "qk_norm": True, "head_dim": 10, "n_hidden": 7},
    ):
        model = small_gpt(**shape)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        assert huggingface.tensor_shapes(asdict(model.config)) == expected


# -- what is refused -------------------------------------------------------------------------------


def edit(name, change):
    """Return a function that changes a JSON file of a folder."""

    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def edit_tensors(change):
    """Return a function that changes the tensors in the second of a folder's three shards."""

    def apply(folder):
        path = sorted(folder.glob("*.safetensors"))[1]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def cut(shard, keep):
    """Return a function that cuts one of a folder's shards to its bytes [:keep]."""

    def apply(folder):
        path = sorted(folder.glob("*.safetensors"))[shard]
        path.write_bytes(path.read_bytes()[:keep])

    return apply


def replace_by_fifo(pattern):
    def apply(folder):
        path = sorted(folder.glob(pattern))[0]
        path.unlink()
        os.mkfifo(path)

    return apply


def write(name, raw):
    return lambda folder: (folder / name).write_bytes(raw)


def single_fifo(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    os.mkfifo(folder / "model.safetensors")


def config(**changes):
    return edit("config.json", lambda c: c.update(changes))


def tokenizer(change):
    return edit("tokenizer.json", change)


Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
HEAD = {"lm_head.weight": torch.zeros(320, 32)}
DEEP = b'{"a": ' + b"[" * 100_000
REFUSED = {
    "architecture": (config(architectures=["MistralForCausalLM"]), ["Mistral", "Qwen3ForCausalLM"]),
    "no architecture": (
        edit("config.json", lambda c: c.pop("architectures")),
        ["hf/config.json", "no architecture", "ckpt.pt"],
    ),
    "classifier": (config(architectures=["Qwen2ForSequenceClassification"]), ["Classification"]),
    "rope": (config(rope_scaling={"rope_type": "llama3"}), ["'llama3'", "not implemented"]),
    "rope v4": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), ["'dynamic'"]),
    "rope v5": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ["'yarn'"]),
    "rope layers": (config(rope_parameters={"full_attention": {"rope_theta": 1e4}}), ["layers"]),
    "rope partial": (config(partial_rotary_factor=0.5), ["partial_rotary_factor = 0.5"]),
    "rope partial v5": (config(rope_parameters={"partial_rotary_factor": 0.5}), ["= 0.5"]),
    "sliding": (config(use_sliding_window=True), ["use_sliding_window"]),
    "layers": (config(layer_types=["full_attention", "sliding_attention"]), ["layer_types"]),
    "quantized": (config(quantization_config={"bits": 4}), ["quantization_config"]),
    "activation": (config(hidden_act="gelu"), ['hidden_act = "gelu"']),
    "bias": (config(attention_bias=True), ["attention_bias = true"]),
    "mlp bias": (config(mlp_bias=True), ["mlp_bias = true"]),
    "type": (config(hidden_size="32"), ["hidden_size = '32'", "int"]),
    "bool": (config(num_hidden_layers=True), ["num_hidden_layers = True", "int"]),
    "absent": (edit("config.json", lambda c: c.pop("rms_norm_eps")), ["rms_norm_eps", "float"]),
    "huge": (config(num_hidden_layers=10**9), ["num_hidden_layers", "at most 1024"]),
    "none": (config(num_attention_heads=0), ["num_attention_heads = 0", "above 0"]),
    "negative": (config(vocab_size=-5), ["vocab_size = -5"]),
    "large eps": (config(rms_norm_eps=1.5), ["rms_norm_eps = 1.5", "at most 1.0"]),
    "large theta": (config(rope_theta=1e12), ["rope_theta = 1000000000000.0", "at most"]),
    "overflow": (config(rope_theta=10**400), ["config.json"]),
    "infinite": (write("config.json", b'{"rope_theta": Infinity}'), ["config.json"]),
    "no json": (write("config.json", b"{"), ["hf/config.json is cut off or is not JSON"]),
    "deep config": (write("config.json", DEEP), ["config.json is nested too deeply"]),
    "no object": (write("config.json", b"[]"), ["config.json holds no JSON object"]),
    "no dict": (config(rope_scaling="yarn"), ["config.json is malformed"]),
    "no list": (config(architectures=3), ["config.json is malformed"]),
    "list of lists": (config(architectures=[[]]), ["config.json is malformed"]),
    "untied": (config(tie_word_embeddings=False), ["the tensor lm_head.weight is missing"]),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")],
        ["hf/model.safetensors is missing", "other formats are not read"],
    ),
    "shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        ["model-00002-of-", "is missing"],
    ),
    "index": (edit(INDEX, lambda c: c.update(weight_map={Q: "../x"})), ["outside of its folder"]),
    "index of lists": (
        edit(INDEX, lambda c: c.update(weight_map={Q: []})),
        ["index.json is malformed"],
    ),
    "index without": (edit(INDEX, lambda c: c.clear()), ["index.json is malformed"]),
    "long name": (edit(INDEX, lambda c: c.update(weight_map={Q: "x" * 300})), ["xxx is missing"]),
    "deep index": (write(INDEX, DEEP), ["index.json is nested too deeply"]),
    "cut": (cut(1, -7), ["model-00002-of-", "cut off or damaged"]),
    "cut header": (cut(0, 50), ["model-00001-of-", "cut off or damaged"]),
    "empty": (cut(2, 0), ["model-00003-of-", "cut off or damaged"]),
    "shape": (
        edit_tensors(lambda t: t.update({Q: torch.zeros(32, 7)})),
        ["model-00002-of-", f"{Q} is (32, 7), not (32, 32)"],
    ),
    "transposed": (
        edit_tensors(lambda t: t.update({Q: torch.zeros(64, 16)})),
        [f"{Q} is (64, 16), not (32, 32)"],
    ),
    "dtype": (
        edit_tensors(lambda t: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)})),
        ["model-00002-of-", f"{Q} is of type I8"],
    ),
    "missing": (edit_tensors(lambda t: t.pop(Q)), [f"the tensor {Q} is missing"]),
    "name": (
        edit_tensors(lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.zeros(1)})),
        ["model-00002-of-", "mlp.extra.weight", "the model lacks"],
    ),
    "twice": (
        edit_tensors(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(1)})),
        ["model.embed_tokens.weight", "has it too"],
    ),
    "head": (edit_tensors(lambda t: t.update(HEAD)), ["lm_head.weight", "differs from the emb"]),
    "fifo": (single_fifo, ["model.safetensors", "regular file"]),
    "fifo shard": (replace_by_fifo("*.safetensors"), ["model-00001", "regular file"]),
    "fifo config": (replace_by_fifo("config.json"), ["config.json"]),
    "fifo index": (replace_by_fifo(INDEX), [INDEX]),
    "fifo tokenizer": (replace_by_fifo("tokenizer.json"), ["tokenizer.json"]),
    "fifo template": (
        lambda folder: os.mkfifo(folder / "chat_template.jinja"),
        ["chat_template.jinja"],
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "latin": (
        write("tokenizer_config.json", b'{"eos_token": "\xe9"}'),
        ["tokenizer_config.json is not UTF-8"],
    ),
    "eos word": (
        edit("tokenizer_config.json", lambda c: c.update(eos_token={"x": 1})),
        ["tokenizer_config.json is malformed"],
    ),
    "deep settings": (write("tokenizer_config.json", DEEP), ["nested too deeply"]),
    "deep tokenizer": (write("tokenizer.json", DEEP), ["tokenizer.json is nested too deeply"]),
    "deep generation": (write("generation_config.json", DEEP), ["nested too deeply"]),
    "id too high": (
        tokenizer(lambda t: t["added_tokens"][0].update(id=320)),
        ["tokenizer.json has the id 320", "vocab_size 320"],
    ),
    "eos": (config(eos_token_id="</s>"), ["eos_token_id"]),
    "eos bool": (config(eos_token_id=True), ["eos_token_id"]),
    "eos beyond": (config(eos_token_id=[3, 320]), ["eos_token_id"]),
    "eos negative": (config(eos_token_id=-1), ["eos_token_id"]),
}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """Make a folder that loads, with its weights in three files or more."""
    folder = tmp_path_factory.mktemp("good") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "SHARD_BYTES", 40_000)
        make_folder(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    assert train.load_model(folder)
    return folder


@pytest.fixture
def copied(good_folder, tmp_path, monkeypatch):
    """Return a copy of the good folder, called hf, for the test to damage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good_folder, "hf")
    return Path("hf")


@pytest.mark.parametrize("case", REFUSED)
def test_bad_folder(copied, case, monkeypatch):
    change, parts = REFUSED[case]
    change(copied)
    monkeypatch.setattr(train, "GPT", lambda *_: pytest.fail("a model was built"))
    check_refused(partial(train.load_model, copied), *parts)


@pytest.mark.parametrize("case", ["architecture", "cut", "fifo", "deep config", "no tokenizer"])
def test_bad_folder_in_the_commands(copied, case):
    change, parts = REFUSED[case]
    change(copied)
    refused("--init hf --chat hello --device cpu".split(), *parts, main=sample.main)
    Path("text.txt").write_text("the " * 300)
    refused("--init hf --data text.txt --device cpu --out out/a".split(), *parts)
    assert not Path("out/a").exists()


def test_a_tied_head_that_is_the_embedding_is_fine(hf):  # noqa: F811
    folder = hf()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, path)
    assert train.load_model(folder)


def test_float64_tensors_and_ids_up_to_the_last_one(hf):  # noqa: F811
    folder = hf()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    model, tokenizer = train.load_model(folder)
    assert torch.equal(model.norm.weight.float(), tensors["model.norm.weight"])
    assert model.embed_tokens.weight.dtype == torch.float32
    assert huggingface.read_tokenizer(folder, tokenizer.n_vocab)["files"]
    too_few = partial(huggingface.read_tokenizer, folder, tokenizer.n_vocab - 1)
    check_refused(too_few, f"vocab_size {tokenizer.n_vocab - 1}")


# -- in use ----------------------------------------------------------------------------------------


def test_training_goes_on_from_pretrained_weights(hf):  # noqa: F811
    folder = hf(qk_norm=True, tied=False, n_kv_head=2)
    Path("text.txt").write_text(TEXT * 60)
    flags = "--init hf --data text.txt --device cpu --sample 0 --eval-batches 1".split()
    scores = train.main([*flags, "--eval-only"])
    assert 0 < scores["val_loss"] < 100
    assert 0 < scores["val_bpb"] < 100

    # at a tiny rate, training and resuming leave the weights as they were
    run = train.main([*flags, "--steps", "4", "--lr", "1e-9", "--stop-after", "2"])
    out = Path(run["out"])
    record = json.loads((out / "config.json").read_text())
    assert record["model"]["block_size"] == 64
    assert record["run"]["lr"] == 1e-9
    assert record["run"]["tokenizer"] == "hf"
    assert train.main(["--resume", str(out), "--device", "cpu", "--sample", "0"])["step"] == 4
    trained, tokenizer = train.load_model(out)
    original, _ = train.load_model(folder)
    for p, original_p in zip(trained.parameters(), original.parameters()):
        assert (p - original_p).abs().max() < 1e-7
    assert tokenizer.start == []
    assert tokenizer.chat([{"role": "user", "content": "the"}])

    # the default settings are those of fine-tuning
    train.main([*flags, "--stop-after", "1", "--block-size", "16", "--out", "out/b"])
    record = json.loads(Path("out/b/config.json").read_text())
    assert record["model"]["block_size"] == 16
    recipe = {name: record["run"][name] for name in ("batch_size", "steps", "lr")}
    assert recipe == {"batch_size": 16, "steps": 200, "lr": 2e-5}
    refused([*flags, "--n-layer", "3"], "--n-layer is 3")
    refused(["--resume", "hf"], "hf holds no run: there is no ckpt.pt")

    # its export keeps the context of the original
    export_run(Path("out/b"), "new")
    assert json.loads(Path("new/config.json").read_text())["max_position_embeddings"] == 64


# print how much more memory loading takes at its peak, relative to the size of the weights
MEMORY = """
import re, sys, torch, train
from pathlib import Path
from support import huggingface
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder = Path(sys.argv[1])
with torch.device("meta"):  # imports what is needed
    train.GPT(train.GPTConfig(vocab_size=64, n_layer=1))
assert len(huggingface.load_checkpoint(folder)["model"])  # reads no tensor
before = peak()
model, _ = train.load_model(folder)
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_one_copy(hf):  # noqa: F811
    folder = hf(n_embd=512, n_layer=8, n_head=8)  # 102 MB
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", MEMORY, folder]
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert 0.9 < float(out.stdout) < 1.2, out.stderr


def test_weights_are_read_when_they_are_asked_for(hf):  # noqa: F811
    folder = hf()
    weights = huggingface.load_checkpoint(folder)["model"]
    assert len(weights) == len(list(weights))
    assert "norm.weight" in weights
    assert "lm_head.weight" not in weights
    assert weights["norm.weight"] is not weights["norm.weight"], "a read tensor is kept"
    with pytest.raises(KeyError):
        weights["nothing"]
    (folder / "model.safetensors").unlink()
    check_refused(lambda: weights["norm.weight"], "model.safetensors")


def test_smollm2():
    """Load the real SmolLM2, if it lies beside the repository."""
    places = (REPOSITORY.parent / "smollm2", REPOSITORY.parent / "shared/smollm2")
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        pytest.skip("needs ../smollm2, a SmolLM2-135M-Instruct folder")
    question = ["--chat", "What is the capital of France?", "--temperature", "0"]
    out = sample.main(["--init", str(folder), *question, "--max-tokens", "20"])
    assert re.search("Paris", out["text"])
