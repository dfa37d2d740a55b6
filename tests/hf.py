"""Hugging Face folders for tests: tiny tokenizers, models of transformers' own, a fixture `hf`."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from support import data, huggingface
from tests.common import small_gpt

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CASES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split_step(digits):
    return {
        "type": "Split",
        "pattern": {"Regex": CASES % digits},
        "behavior": "Isolated",
        "invert": False,
    }


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


WORDS = {  # how each family splits text, as its tokenizer.json says it
    "gpt2": {**BYTES, "use_regex": True},
    "smollm2": sequence(
        {"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}
    ),
    "qwen": sequence(split_step(""), {**BYTES, "use_regex": False}),
    "llama3": sequence(split_step("{1,3}"), {**BYTES, "use_regex": False}),
}
MERGES = ("t h", "th e", "Ġ the", "e r", "o v")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_letters():
    """{byte: the character that shows it in tokenizer.json}, from the definition"""
    plain = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or b > 173]
    letters = {b: chr(b) for b in plain}
    for n, b in enumerate(sorted(set(range(256)) - set(plain))):
        letters[b] = chr(256 + n)
    return letters


def tokenizer_json(merges=MERGES, words="gpt2", special=SPECIAL, **model_settings):
    """The content of a tokenizer.json: all bytes, a few merges, special tokens."""
    tokens = [*byte_letters().values(), *(merge.replace(" ", "") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    added = []
    for i, text in enumerate(special):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": len(vocab) + i, "content": text, **flags, "special": True})
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": list(merges),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": copy.deepcopy(WORDS[words]),
        "post_processor": None,
        "decoder": BYTES,
        "model": {**model, **model_settings},
    }


def write_tokenizer(folder, data, template=CHATML, eos="<|im_end|>"):
    """Write tokenizer.json and tokenizer_config.json; template: None for a base model."""
    pytest.importorskip("tokenizers", reason="needs requirements.txt")
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    settings["bos_token"] = data["added_tokens"][0]["content"]
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def read_encoding(folder, vocab_size=1000):
    return huggingface.Encoding(huggingface.read_tokenizer(folder, vocab_size))


def edit_json(path, **changes):
    """Change entries of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        data[name] = value
        if value is None:
            del data[name]
    path.write_text(json.dumps(data))


def make_folder(folder, **shape):
    """Export a tiny GPT with changed fields, and a tokenizer, as a Hugging Face folder."""
    model = small_gpt(vocab_size=320, block_size=64, **shape)
    source = write_tokenizer(folder.parent / "tokenizer", tokenizer_json())
    tokenizer = huggingface.read_tokenizer(source, 320)
    huggingface.export(folder, model.state_dict(), asdict(model.config), tokenizer)


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """Work in an empty folder; return function(changed GPT fields) -> a tiny model folder."""
    monkeypatch.chdir(tmp_path)

    def make(**shape):
        make_folder(tmp_path / "hf", **shape)
        return Path("hf")

    return make


def export_run(folder, target, dtype=None):
    """Export a folder that was loaded, as train.py does at the end of a run."""
    model, tokenizer = train.load_model(folder)
    state = data.tokenizer_state(tokenizer)
    huggingface.export(target, model.state_dict(), asdict(model.config), state, dtype)
    return model


def check_refused(call, *parts):
    """The call raises ValueError with one sentence that has all the parts."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# -- models of transformers' own -------------------------------------------------------------------

FAMILIES = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama-untied": {"num_key_value_heads": 4, "tie_word_embeddings": False, "head_dim": 6},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2-untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 12},
    "qwen3-tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 8},
}
THETAS = {"llama": 5e5, "qwen2": 1e6, "qwen2-untied": 2e5, "qwen3-tied": 1e6}  # others: 1e4


def transformers():
    """The test dependency that everything is compared with."""
    return pytest.importorskip("transformers", reason="needs transformers: requirements-test.txt")


def write_model(folder, family, old_config=False, **changes):
    """Save a model of transformers with random weights, biases and gains, in several shards.

    old_config: a config.json as it was written before transformers 5.
    """
    library = transformers()
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family.split("-")[0]]
    theta = THETAS.get(family, 1e4)
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config = getattr(library, f"{name}Config")(**{**settings, **FAMILIES[family], **changes})
    model = getattr(library, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        value = torch.randn(p.shape, generator=generator)
        p.data = value * (0.2 if p.dim() > 1 else 0.3) + (p.data == 1)  # gains are 1
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    if old_config:
        config = json.loads((folder / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None
        config["torch_dtype"] = config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, tokenizer_json())
    return model
