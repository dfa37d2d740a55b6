"""Exports as Hugging Face folders: what transformers loads, what is kept, what is refused."""

import json
import os
import resource
import shutil
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from support import data, huggingface
from tests.common import REPOSITORY, is_equal, run_code, small_gpt, without_rights
from tests.hf import (
    check_refused,
    edit_json,
    export_run,
    hf,  # noqa: F401, a fixture
    transformers,
    write_model,
)


@pytest.mark.parametrize("family", ["llama", "qwen2-untied", "qwen3"])
def test_transformers_loads_what_was_exported(tmp_path, monkeypatch, family, capsys):
    write_model(tmp_path / "hf", family)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 30_000)
    model, tokenizer = train.load_model(Path("hf"))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    state = data.tokenizer_state(tokenizer)
    huggingface.export("new", model.state_dict(), asdict(model.config), state)
    assert "exported new, in float32\n" in capsys.readouterr().out
    assert len(list(Path("new").glob("*.safetensors"))) > 2
    assert not list(Path().glob(".*"))

    library = transformers()
    truth, report = library.AutoModelForCausalLM.from_pretrained("new", output_loading_info=True)
    assert not any(report.values()), f"missing or unexpected weights: {report}"
    ids = torch.randint(320, (1, 16))
    with torch.no_grad():
        assert (model(ids) - truth(ids).logits).abs().max() < 1e-5
    assert is_equal(train.load_model(Path("new"))[0].state_dict(), model.state_dict())
    assert Path("new/tokenizer.json").read_bytes() == Path("hf/tokenizer.json").read_bytes()
    exported_tokenizer = library.AutoTokenizer.from_pretrained("new")
    assert exported_tokenizer("the over")["input_ids"] == tokenizer.encode("the over")

    export_run(Path("new"), "low", torch.bfloat16)
    low = library.AutoModelForCausalLM.from_pretrained("low", dtype="auto")
    assert low.dtype == torch.bfloat16
    index = json.loads(Path("new/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())


def test_export_keeps_the_settings_of_the_original(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("hf"), "llama", max_position_embeddings=2048)
    changes = {"bos_token_id": 300, "pad_token_id": 301, "dtype": "bfloat16", "mine": [1, {"a": 2}]}
    edit_json(Path("hf/config.json"), **changes)
    before = json.loads(Path("hf/config.json").read_text())

    # only the weights changed: config.json stays, even after training on shorter sequences
    saved = huggingface.load_checkpoint(Path("hf"))
    config = {**asdict(train.GPTConfig(**saved["config"]["model"])), "block_size": 1024}
    huggingface.export("new", saved["model"], config, saved["tokenizer"])
    assert json.loads(Path("new/config.json").read_text()) == before
    tensors = load_file(next(iter(Path("new").glob("*.safetensors"))))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}

    # changed settings keep the names and places that they have in the original file
    config = {**config, "block_size": 4096, "rope_theta": 77.0, "norm_eps": 1e-3}
    huggingface.export("newer", saved["model"], config, saved["tokenizer"], torch.float32)
    after = json.loads(Path("newer/config.json").read_text())
    rope = {**before["rope_parameters"], "rope_theta": 77.0}
    changed = {"max_position_embeddings": 4096, "rope_parameters": rope, "rms_norm_eps": 1e-3}
    assert after == {**before, **changed, "dtype": "float32"}
    assert huggingface.read_config(Path("newer"))["rope_theta"] == 77.0

    # the same for a config.json in the form before transformers 5, saved in a checkpoint between
    edit_json(Path("hf/config.json"), rope_parameters=None, rope_theta=5e5)
    edit_json(Path("hf/config.json"), dtype=None, torch_dtype="float16", head_dim=None)
    saved = huggingface.load_checkpoint(Path("hf"))
    torch.save({"tokenizer": saved["tokenizer"]}, "x.pt")
    tokenizer = torch.load("x.pt", weights_only=True)["tokenizer"]
    tokenizer = data.tokenizer_state(data.tokenizer_from_state(tokenizer))
    config = {**config, "block_size": 64}
    huggingface.export("newest", saved["model"], config, tokenizer)
    after = json.loads(Path("newest/config.json").read_text())
    before = json.loads(Path("hf/config.json").read_text())
    assert after == {**before, "rope_theta": 77.0, "rms_norm_eps": 1e-3}
    tensors = load_file(next(iter(Path("newest").glob("*.safetensors"))))
    assert {t.dtype for t in tensors.values()} == {torch.float16}


def test_a_model_of_another_family_gets_all_settings(tmp_path, monkeypatch):
    """Its tokenizer came with a Llama model; this one has biases, as Qwen2 has."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("hf"), "llama")
    saved = huggingface.load_checkpoint(Path("hf"))
    model = small_gpt(vocab_size=saved["config"]["model"]["vocab_size"], qkv_bias=True)
    huggingface.export("new", model.state_dict(), asdict(model.config), saved["tokenizer"])
    loaded, _ = train.load_model("new")
    assert loaded.config.qkv_bias
    assert is_equal(loaded.state_dict(), model.state_dict())


def test_the_ids_that_end_an_answer_are_exported(hf):  # noqa: F811
    saved = huggingface.load_checkpoint(hf())
    tokenizer = {name: saved["tokenizer"][name] for name in ("name", "files", "stops")}
    assert tokenizer["stops"]
    config = asdict(train.GPTConfig(**saved["config"]["model"]))
    huggingface.export("new", saved["model"], config, tokenizer)
    settings = json.loads(Path("new/config.json").read_text())
    assert settings["eos_token_id"] == tokenizer["stops"]
    assert huggingface.load_checkpoint("new")["tokenizer"]["stops"] == tokenizer["stops"]


def test_an_export_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    """An empty folder may be there already, and folders above it are made."""
    model = small_gpt()
    synced = []

    def fsync(fd):
        assert not (folder / "config.json").exists()
        synced.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2])

    monkeypatch.setattr(os, "fsync", fsync)
    for folder in (tmp_path / "empty", tmp_path / "a/b/new"):
        if folder.name == "empty":
            folder.mkdir()
        huggingface.export(folder, model.state_dict(), asdict(model.config), {"name": "byte"})
        assert sorted(synced) == sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
        synced.clear()


KILLED = """
import os
from dataclasses import asdict
from support import huggingface
from tests.common import small_gpt

write_weights = huggingface.write_weights
def killed(folder, *args):
    write_weights(folder, *args)
    os.kill(os.getpid(), 9)
huggingface.write_weights = killed
model = small_gpt()
huggingface.export("n[e]w", model.state_dict(), asdict(model.config), {"name": "byte"})
"""


def test_the_next_export_removes_the_draft_of_a_killed_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = partial(huggingface.export, weights=small_gpt().state_dict())
    export = partial(export, config=asdict(small_gpt().config), tokenizer={"name": "byte"})
    assert run_code(KILLED, env={"PYTHONPATH": str(REPOSITORY)}).returncode == -9
    draft = next(Path().glob(".n?e?w.*"))
    assert [path.name for path in draft.iterdir()] == ["model.safetensors"]
    dead = int(draft.suffix[1:])
    names = {*huggingface.TOKENIZER_FILES, "config.json", "model.safetensors.index.json"}
    for name in (*names, "model-00001-of-00002.safetensors", ".tmpWQgmVz"):
        (draft / name).touch()

    # what may be somebody's, or a running process's, stays
    sleeper = subprocess.Popen(["sleep", "60"])
    stay = [f".n[e]w.{sleeper.pid}", f".new.{dead}", f".n[e]w.0{dead}", f"n[e]w.{dead}"]
    for name in stay:
        Path(name).mkdir()
    export("n[e]w")
    assert {path.name for path in Path().iterdir()} == {*stay, "n[e]w"}
    sleeper.kill()
    sleeper.wait()

    for spoil in (
        lambda folder: (folder / "mine.txt").touch(),
        lambda folder: (folder / "model.safetensors").mkdir(),
        lambda folder: (folder / "config.json").symlink_to(Path("n[e]w/config.json").absolute()),
        lambda folder: (folder.rmdir(), folder.symlink_to(Path("n[e]w").absolute())),
        lambda folder: (folder.rmdir(), folder.touch()),
    ):
        target = Path("a/x")
        draft = target.parent / f".x.{dead}"
        draft.mkdir(parents=True)
        spoil(draft)
        export(target)
        assert {path.name for path in target.parent.iterdir()} == {"x", draft.name}
        shutil.rmtree("a")
    assert len(os.listdir("n[e]w")) == 2

    # in a container, all processes may have the same id
    own = Path(f".again.{os.getpid()}")
    own.mkdir()
    export("again")
    assert not own.exists()
    own = Path(f".more.{os.getpid()}")
    own.mkdir()
    (own / "mine.txt").touch()
    check_refused(partial(export, "more"), "cannot write more (File exists)")
    assert (own / "mine.txt").exists()


def test_export_of_a_model_trained_from_scratch(tiny):
    train.main([*tiny, "--steps", "1", "--out", "out/a", "--qkv-bias"])
    model = export_run(Path("out/a"), "new")
    # no tokenizer.json, as that format cannot express the byte tokenizer
    assert {p.name for p in Path("new").iterdir()} == {"config.json", "model.safetensors"}
    settings = json.loads(Path("new/config.json").read_text())
    assert settings["architectures"] == ["Qwen2ForCausalLM"]
    assert settings["bos_token_id"] is None
    assert settings["eos_token_id"] is None
    truth = transformers().AutoModelForCausalLM.from_pretrained("new")
    ids = torch.randint(256, (1, 16))
    with torch.no_grad():
        assert (model(ids) - truth(ids).logits).abs().max() < 1e-5


def test_bad_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = asdict(small_gpt(n_layer=8, n_embd=64).config)
    weights = small_gpt(n_layer=8, n_embd=64).state_dict()
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    Path("link").symlink_to("nowhere")
    for changes, target, part in [
        ({"attn": "laser"}, "new", "no Hugging Face family has laser attention"),
        ({"attn": "softmax,laser"}, "new", "laser"),
        ({"qk_norm": True, "qkv_bias": True}, "new", "both biases and QK-norm"),
        ({}, "full", "full exists"),
        ({}, "full/mine.txt", "full/mine.txt exists"),
        ({}, "link", "link exists"),
        ({}, "full/mine.txt/new", "cannot write"),
        ({}, "x" * 300, "cannot write"),
        ({"n_embd": 128}, "new", "embed_tokens.weight is (64, 64), not (64, 128)"),
    ]:
        broken = {**config, **changes}
        check_refused(partial(huggingface.export, target, weights, broken, {"name": "byte"}), part)
    huggingface.check_exportable("new", {**config, "attn": "softmax,softmax"})
    huggingface.check_exportable("made/on/the/way", config)
    for target in ("full/mine.txt/new", "x" * 300, "a\0b"):  # before training, too
        check_refused(partial(huggingface.check_exportable, target, config), "cannot write")
    with without_rights():
        check_refused(partial(huggingface.check_exportable, "full/a/b", config), "cannot write in")

    # a full disk: files may have at most 20 kB
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        export = partial(huggingface.export, "new", weights, config, {"name": "byte"})
        check_refused(export, "cannot write new", "nothing is left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in Path().iterdir()} == {"full", "link"}


def test_export_writes_no_file_but_its_own(hf):  # noqa: F811
    saved = huggingface.load_checkpoint(hf())
    saved["tokenizer"]["files"]["../evil"] = "overwritten"
    saved["tokenizer"]["files"]["model.safetensors"] = "overwritten"
    config = asdict(train.GPTConfig(**saved["config"]["model"]))
    huggingface.export("new", saved["model"], config, saved["tokenizer"])
    assert not Path("evil").exists()
    assert train.load_model(Path("new"))


def test_export_copies_tensors_that_share_memory(tmp_path):
    model = small_gpt(n_layer=2)
    state = model.state_dict()
    layer = "layers.0.mlp.up_proj.weight"
    state[layer] = state["layers.1.mlp.up_proj.weight"]
    state["norm.weight"] = torch.ones(1).expand(32)
    huggingface.export(tmp_path / "new", state, asdict(model.config), {"name": "byte"})
    tensors = load_file(tmp_path / "new/model.safetensors")
    assert torch.equal(tensors[f"model.{layer}"], state[layer])
    assert torch.equal(tensors["model.norm.weight"], torch.ones(32))
