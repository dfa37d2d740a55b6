"""Adapters on disk: what PEFT writes is loaded, everything else is refused in one sentence."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import lora, peft_files
from tests.common import is_equal, small_gpt
from tests.test_lora_adapters import adapted


@pytest.fixture
def folder(tmp_path):
    peft_files.save(adapted(), tmp_path / "a", "model.")
    return tmp_path / "a"


def refuse(folder, *parts, prefix="model.", model=None):
    """Loading raises ValueError with one sentence and leaves the model as it was."""
    model = model or small_gpt()
    with pytest.raises(ValueError) as caught:
        peft_files.load(model, folder, prefix)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600, message
    message.encode()  # it can be printed
    for part in parts:
        assert part in message, message
    assert not lora.adapters(model)
    for name, p in model.named_parameters():
        assert p.requires_grad, name


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder):
    """Return the bytes of each file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_adapters_go_through_a_folder(folder):
    model = adapted()
    ids = torch.randint(64, (2, 9))
    again = peft_files.load(small_gpt(), folder, "model.")
    assert torch.equal(model(ids), again(ids))
    assert is_equal(dict(model.state_dict()), dict(again.state_dict()))
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]

    before = contents(folder)
    with pytest.raises(ValueError, match="exists already"):
        peft_files.save(model, folder, "model.")
    assert contents(folder) == before
    with pytest.raises(ValueError, match="no adapters"):
        peft_files.save(small_gpt(), folder / "b")
    with pytest.raises(ValueError, match="cannot write"):
        peft_files.save(model, folder / ("n" * 256))


def test_only_the_layers_of_the_file_get_adapters(folder, tmp_path):
    """Names are matched as a whole: b.a is not a."""
    model = torch.nn.ModuleDict()
    model["a"] = torch.nn.Linear(6, 5)
    model["b"] = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 5)})
    lora.inject_layers(model, {"a": model["a"]}, 2, None)
    peft_files.save(model, tmp_path / "one")
    peft_files.load(lora.merge(model), tmp_path / "one")
    assert list(lora.adapters(model)) == ["a"]


def test_alpha_zero_in_a_file_switches_the_adapter_off(folder):
    edit(folder, lora_alpha=0)
    ids = torch.randint(64, (2, 9))
    model = peft_files.load(small_gpt(), folder, "model.")
    assert torch.equal(model(ids), small_gpt()(ids))


# -- settings --------------------------------------------------------------------------------------

HARMLESS = {
    "lora_dropout": 0.05,
    "task_type": None,
    "inference_mode": False,
    "init_lora_weights": "gaussian",
    "base_model_name_or_path": "meta/llama",
    "target_modules": "all-linear",
    "layers_to_transform": [0, 1],
    "auto_mapping": {"base_model_class": "GPT"},
    "megatron_core": "megatron.core",
    "a_setting_of_tomorrow": None,
    "another_one": False,
    "rank_pattern": {},
    "modules_to_save": None,
}
OTHER_KINDS = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "use_dora": True,
    "use_rslora": True,
    "use_qalora": True,
    "lora_bias": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "modules_to_save": ["embed_tokens"],
    "layer_replication": [[0, 1], [0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["weight"],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "megatron_config": {"a": 1},
    "a_setting_of_tomorrow": "on",
    "another_one": 0.5,
}
INITS = ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "orthogonal", "lora_ga", "new"]


@pytest.mark.parametrize("name", HARMLESS)
def test_settings_of_plain_lora_are_read(name, folder):
    edit(folder, **{name: HARMLESS[name]})
    model = peft_files.load(small_gpt(), folder, "model.")
    ids = torch.randint(64, (2, 9))
    assert torch.equal(model(ids), adapted()(ids))


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused(name, folder):
    edit(folder, **{name: OTHER_KINDS[name]})
    refuse(folder, name, "only plain LoRA")


@pytest.mark.parametrize("init", INITS)
def test_an_init_that_changes_the_frozen_weights_is_refused(init, folder):
    edit(folder, init_lora_weights=init)
    refuse(folder, "init_lora_weights", init)


@pytest.mark.parametrize(
    "setting", [None, "use_rslora", "use_dora", "olora", "pissa", "rank_pattern"]
)
def test_real_folders_of_peft(setting, tmp_path):
    """What PEFT saves for our GPT's twin is loaded exactly, or refused."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    weights = {f"model.{name}": p for name, p in small_gpt().state_dict().items()}
    theirs.load_state_dict(weights, strict=False)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    if setting in ("olora", "pissa"):
        options["init_lora_weights"] = setting
    elif setting == "rank_pattern":
        options["rank_pattern"] = {"q_proj": 2}
    elif setting:
        options[setting] = True
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    if setting:
        refuse(tmp_path / "theirs", "only plain LoRA")
        return
    ids = torch.randint(64, (2, 9))
    with torch.no_grad():
        expected = wrapped(ids).logits
        ours = peft_files.load(small_gpt(), tmp_path / "theirs", "model.")
        assert torch.allclose(ours(ids), expected, atol=1e-3, rtol=1e-3)
        theirs = transformers.LlamaForCausalLM(config).eval()
        theirs.load_state_dict(weights, strict=False)
        peft_files.load(theirs, tmp_path / "theirs")
        assert torch.allclose(theirs(ids).logits, expected, atol=1e-4)

    # and the other way round
    peft_files.save(ours, tmp_path / "ours", "model.")
    plain = transformers.LlamaForCausalLM(config).eval()
    plain.load_state_dict(weights, strict=False)
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    with torch.no_grad():
        assert torch.allclose(wrapped(ids).logits, expected, atol=1e-4)


# -- damaged and hostile files ---------------------------------------------------------------------

BAD_CONFIGS = {
    "no JSON": b"{",
    "a list": b"[]",
    "empty": b"",
    "no settings": b"{}",
    "nested": b"[" * 100_000,
    "nested settings": b'{"r": ' + b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\xff",
}
BAD_NUMBERS = [
    {"r": 4},
    {"r": 0},
    {"r": -1},
    {"r": 3.0},
    {"r": True},
    {"r": "3"},
    {"r": None},
    {"r": 10**30},
    {"lora_alpha": None},
    {"lora_alpha": "5"},
    {"lora_alpha": float("nan")},
    {"lora_alpha": float("inf")},
    {"lora_alpha": 10**400},
    {"lora_alpha": -1},
    {"peft_type": ["LORA"]},
    {"x\ny\ud800": "\n\ud800" * 1000},
]


def test_three_settings_are_enough(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 5}))
    assert peft_files.read_config(path) == (3, 5)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_damaged_settings_are_refused(case, folder):
    (folder / "adapter_config.json").write_bytes(BAD_CONFIGS[case])
    refuse(folder, "adapter_config.json")


@pytest.mark.parametrize(
    "values", BAD_NUMBERS, ids=lambda v: str(v)[:20].encode("ascii", "replace")
)
def test_impossible_numbers_are_refused(values, folder):
    edit(folder, **values)
    refuse(folder)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors_with(**changes):
    """Return a function that changes the factors of one layer in a folder; None deletes one."""

    def write(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, change in changes.items():
            name = f"{Q}.lora_{key}.weight"
            tensor = change(tensors.pop(name))
            if tensor is not None:
                tensors[name] = tensor.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors")

    return write


def extra(name, shape=(3, 32)):
    """Return a function that adds a tensor to the weights in a folder."""

    def write(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors[name] = torch.zeros(shape)
        save_file(tensors, folder / "adapter_model.safetensors")

    return write


def raw(data):
    """Return a function that replaces the weights in a folder by these bytes."""

    def write(folder):
        (folder / "adapter_model.safetensors").write_bytes(data)

    return write


def header(entries):
    """Return the header of a safetensors file without data: a length, then JSON."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = {Q: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
BAD_WEIGHTS = {
    "missing tensor": tensors_with(B=lambda t: None),
    "missing pair": lambda folder: save_file({}, folder / "adapter_model.safetensors"),
    "another rank": tensors_with(A=lambda t: t[:2]),
    "another width": tensors_with(A=lambda t: t[:, :5]),
    "another height": tensors_with(B=lambda t: t[:5]),
    "transposed": tensors_with(A=lambda t: t.T),
    "three dimensions": tensors_with(A=lambda t: t[None]),
    "NaN": tensors_with(A=lambda t: t * float("nan")),
    "infinite": tensors_with(B=lambda t: t / 0),
    "integers": tensors_with(A=lambda t: t.long()),
    "float8": tensors_with(A=lambda t: t.to(torch.float8_e4m3fn)),
    "DoRA": extra(f"{Q}.lora_magnitude_vector.weight", (32,)),
    "an embedding": extra("base_model.model.model.embed_tokens.lora_embedding_A"),
    "a third factor": extra(f"{Q}.lora_C.weight"),
    "no layer": extra(".lora_A.weight"),
    "another layer": extra("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"),
    "a norm": extra("base_model.model.model.norm.lora_A.weight"),
    "a bias": extra(f"{Q}.base_layer.bias"),
    "a long name": extra("base_model.model." + "x" * 5000 + ".lora_A.weight"),
    "a name of two lines": extra("base_model.model.a\nb.lora_A.weight"),
    "empty": raw(b""),
    "cut off": raw(b"\x10"),
    "text": raw(b"not safetensors" * 10),
    "a header of 2^60 bytes": raw(struct.pack("<Q", 2**60) + b"{}"),
    "deep header": raw(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "huge tensors": raw(header(HUGE)),
    "unknown type": raw(header({Q: {"dtype": "F4096", "shape": [0], "data_offsets": [0, 0]}})),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_damaged_weights_are_refused(case, folder):
    BAD_WEIGHTS[case](folder)
    refuse(folder, str(folder))


def test_missing_and_strange_paths_are_refused(folder, tmp_path):
    refuse(tmp_path / "none", "adapter_config.json")
    refuse(tmp_path / ("n" * 300))
    refuse("a\0b")
    refuse("")
    refuse(folder / "adapter_config.json")
    refuse(folder, "no linear layer of the model", prefix="")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        refuse(folder, name)
        os.mkfifo(folder / name)  # a reader would wait for ever
        refuse(folder, name)
        (folder / name).unlink()
        (folder / name).mkdir()
        refuse(folder, name)
        (folder / name).rmdir()
        (folder / name).write_bytes(content)
    peft_files.load(small_gpt(), folder, "model.")


def test_a_tied_layer_in_a_file_is_refused(tmp_path):
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(8, 6)
    model.head = torch.nn.Linear(6, 8, bias=False)
    peft_files.save(lora.inject(model, 2, targets=("head",)), tmp_path / "a")
    lora.merge(model).requires_grad_()
    model.head.weight = model.embed.weight
    refuse(Path(tmp_path, "a"), "head is shared with embed.weight", prefix="", model=model)
