"""Read and write Hugging Face folders of dense Llama, SmolLM2, Qwen2.5 and Qwen3 models.

config.json becomes the fields of train.GPTConfig. The tensors in *.safetensors get the names that
train.GPT uses, and are read one by one when they are needed. If train.GPT cannot compute exactly
the same as a model, a ValueError names the file and the setting or tensor that is the reason.
"""

import json
import math
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.distributed import print0
from support.files import atomic_folder, read_user_file, shown
from support.hub import TOKENIZER_FILES, model_name
from support.huggingface_tokenizer import Encoding, malformed, read_object, require

SHARD_BYTES = 4 * 10**9  # largest file of tensors that `export` writes
# Patterns of all files that `export` writes; save_file first writes to .tmp and six letters
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
EXPORTED_FILES = ("config.json", *TOKENIZER_FILES, *WEIGHT_FILES, ".tmp??????")
# Defaults for fine-tuning such a model, in place of those for training from scratch
FINETUNE = {"block_size": 1024, "batch_size": 16, "steps": 200, "lr": 2e-5}


def load_checkpoint(folder):
    """Return the folder as a checkpoint: {model, config, tokenizer}.

    model: a lazy mapping from train.GPT's names to tensors.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config["vocab_size"])
    tokenizer["config"] = read_text(folder / "config.json")  # for `export`
    run = {**FINETUNE, "tokenizer": tokenizer["name"]}
    run["block_size"] = min(run["block_size"], config["block_size"])
    weights = Weights(folder, config)
    return {"model": weights, "config": {"model": config, "run": run}, "tokenizer": tokenizer}


def read_text(path):
    try:
        return read_user_file(path).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def read_tokenizer(folder, vocab_size):
    """Return the state of the folder's tokenizer: {name, files, stops}.

    files: {name of a file: its text}. stops: the ids that end an answer. Raises ValueError if an id
    has no embedding, that is, if it is vocab_size or more.
    """
    files = {}
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            files[name] = read_text(folder / name)
    require("tokenizer.json" in files, f"{folder} has no tokenizer.json; no other kind is read")
    state = {"name": model_name(folder), "files": files, "stops": []}
    tokenizer = Encoding(state)
    if tokenizer.n_vocab > vocab_size:
        problem = f"{tokenizer.name}/tokenizer.json has the id {tokenizer.n_vocab - 1}"
        raise ValueError(f"{problem}, but config.json has vocab_size {vocab_size}")

    # ids that end an answer: in either file, eos_token_id may be missing, one id, or a list of ids
    stops = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_object(path).get("eos_token_id") if os.path.lexists(path) else None
        if ids is None:
            continue
        if not isinstance(ids, list):
            ids = [ids]
        is_valid = all(type(i) is int and 0 <= i < vocab_size for i in ids)
        require(is_valid, f"{path} has eos_token_id = {ids!r}, which are not all token ids")
        stops += ids

    # tokenizer_config.json may also name a token by its text
    eos_token = tokenizer.roles.get("eos_token")
    if eos_token in tokenizer.special_tokens:
        stops.append(tokenizer.special_tokens[eos_token])
    return {**state, "stops": list(dict.fromkeys(stops))}


# -- config.json and the fields of train.GPTConfig -------------------------------------------------

FAMILIES = {  # {architecture in config.json: how its models differ from other architectures}
    "LlamaForCausalLM": {"model_type": "llama", "qkv_bias": False, "qk_norm": False},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "qkv_bias": False, "qk_norm": True},
}
SETTINGS = {  # {field of train.GPTConfig: (name in config.json, type, largest value)}
    "vocab_size": ("vocab_size", int, 2**24),
    "block_size": ("max_position_embeddings", int, 2**32),
    "n_layer": ("num_hidden_layers", int, 1024),
    "n_head": ("num_attention_heads", int, 1024),
    "n_kv_head": ("num_key_value_heads", int, 1024),
    "n_embd": ("hidden_size", int, 2**24),
    "head_dim": ("head_dim", int, 2**24),
    "n_hidden": ("intermediate_size", int, 2**24),
    "tied": ("tie_word_embeddings", bool, None),
    "norm_eps": ("rms_norm_eps", float, 1.0),
    "rope_theta": ("rope_theta", float, 2**32),
}
ONLY_VALUES = {  # {setting: the only value that train.GPT implements}; it may be absent or null
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}


def read_config(folder, text=None):
    """Return the fields of train.GPTConfig for the folder's config.json, or for its `text`."""
    path = Path(folder) / "config.json"
    with malformed(path):
        return gpt_fields(read_object(path, text), path)


def gpt_fields(settings, path):
    """Return the fields of train.GPTConfig for the settings of a config.json."""
    # refuse what the GPT cannot compute
    if "architectures" not in settings:
        raise ValueError(
            f"{path} names no architecture, so {path.parent} is not a Hugging Face folder; "
            f"nor does it have the ckpt.pt of a run"
        )
    architecture = (settings["architectures"] or ["none"])[0]
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{path} has the architecture {architecture}; supported are {known}")
    # settings of RoPE: rope_parameters in new versions of transformers, rope_scaling in old ones
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    check_supported(settings, rope, path)

    # fill in the defaults of transformers' configuration classes
    values = {name: value for name, value in settings.items() if value is not None}
    values.setdefault("tie_word_embeddings", False)
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))

    # translate and check one field after the other
    fields = {}
    for field, (name, needed_type, largest) in SETTINGS.items():
        if name == "head_dim" and name not in values:  # n_embd and n_head are known by now
            is_qwen3 = architecture == "Qwen3ForCausalLM"
            values[name] = 128 if is_qwen3 else fields["n_embd"] // fields["n_head"]
        value = values.get(name)
        if needed_type is float and type(value) is int:
            value = float(value)
        if type(value) is not needed_type:
            raise ValueError(f"{path} has {name} = {value!r}, not of type {needed_type.__name__}")
        if needed_type is not bool and not 0 < value <= largest:
            raise ValueError(f"{path} has {name} = {value}; it must be above 0, at most {largest}")
        fields[field] = value
    fields["qkv_bias"] = FAMILIES[architecture]["qkv_bias"]
    fields["qk_norm"] = FAMILIES[architecture]["qk_norm"]
    return fields


def check_supported(settings, rope, path):
    """Raise ValueError for a setting that train.GPT does not implement.

    settings: those of config.json. rope: those of RoPE among them.
    """
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"{path} asks for rotary positions of type {rope_type!r}, which are not implemented; "
            f"only one 'default' for all layers is"
        )
    for name, needed in ONLY_VALUES.items():
        for value in (settings.get(name), rope.get(name)):
            if value is not None and value != needed:
                value = json.dumps(value)[:60]
                raise ValueError(
                    f"{path} has {name} = {value}, which is not implemented; "
                    f"{json.dumps(needed)} is"
                )
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{path} has layer_types other than full_attention: not implemented")


def tensor_shapes(config):
    """Return {name in train.GPT: shape} of all weights. config: fields of train.GPTConfig."""
    width = config["n_embd"]
    hidden = config["n_hidden"]
    head_dim = config["head_dim"]
    heads = {"q": config["n_head"], "k": config["n_kv_head"], "v": config["n_kv_head"]}
    shapes = {"embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["n_layer"]):
        layer = f"layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
        for name, n_head in heads.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (n_head * head_dim, width)
            if config["qkv_bias"]:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (n_head * head_dim,)
            if config["qk_norm"] and name != "v":
                shapes[f"{layer}.self_attn.{name}_norm.weight"] = (head_dim,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, heads["q"] * head_dim)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
    shapes["norm.weight"] = (width,)
    if not config["tied"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


# -- *.safetensors ---------------------------------------------------------------------------------


def to_their_name(name):
    """Return the Hugging Face name of a tensor of train.GPT: model.norm.weight for norm.weight."""
    return name if name.startswith("lm_head.") else f"model.{name}"


@contextmanager
def open_tensors(path):
    """Open a safetensors file, to read tensors from it inside the block."""
    if not os.path.isfile(path):  # safe_open would wait for a FIFO to be written
        raise ValueError(f"{path} is missing or not a regular file; other formats are not read")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is cut off or damaged ({reason})") from None


class Weights(Mapping):
    """A lazy mapping from the names in train.GPT to the tensors of a folder.

    The constructor checks names, shapes and types, which are in the headers of the files. Each
    access opens a file and reads one tensor, so only one has to be in memory at a time.
    config: fields of train.GPTConfig, by name.
    """

    def __init__(self, folder, config):
        folder = Path(folder)
        shapes = tensor_shapes(config)
        found = find_tensors(folder)  # {their name: (path, shape)}
        self.paths = {}  # {our name: path}
        for name, shape in shapes.items():
            their_name = to_their_name(name)
            if their_name not in found:
                raise ValueError(f"{folder}: the tensor {their_name} is missing")
            path, found_shape = found.pop(their_name)
            if found_shape != shape:
                raise ValueError(
                    f"{path}: the tensor {their_name} is {found_shape}, not {shape} as config.json "
                    f"says"
                )
            self.paths[name] = path

        # The tensors that are left may be buffers that old versions of transformers wrote, or the
        # output layer of a tied model. Then it has to equal the embedding.
        for their_name, (path, _) in found.items():
            if their_name == "lm_head.weight":
                with open_tensors(path) as file:
                    head = file.get_tensor(their_name)
                is_tied = torch.equal(head, self["embed_tokens.weight"])
                reason = "lm_head.weight differs from the embedding, but config.json ties them"
                require(is_tied, f"{path}: {reason}")
            elif not their_name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{path} has the tensor {their_name}, which the model lacks")

    def __getitem__(self, name):
        with open_tensors(self.paths[name]) as file:
            return file.get_tensor(to_their_name(name))

    def __iter__(self):
        return iter(self.paths)

    def __len__(self):
        return len(self.paths)


def find_tensors(folder):
    """Return {name: (path, shape)} of all tensors in the folder's safetensors files."""
    found = {}
    for path in weight_files(folder):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping, although it has keys)
                tensor = file.get_slice(name)
                dtype = tensor.get_dtype()
                if name in found:
                    other = found[name][0].name
                    raise ValueError(f"{path} has the tensor {name}, and {other} has it too")
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"{path}: the tensor {name} is of type {dtype}, "
                        f"not a float of 16 or more bits"
                    )
                found[name] = path, tuple(tensor.get_shape())
    return found


def weight_files(folder):
    """Return the paths of the safetensors files: those that an index names, or a single one."""
    index = folder / "model.safetensors.index.json"
    if not os.path.lexists(index):
        return [folder / "model.safetensors"]
    with malformed(index):
        names = sorted(set(read_object(index)["weight_map"].values()))
        is_inside = all(Path(name).name == name for name in names)
    require(is_inside, f"{index} names files outside of its folder")
    return [folder / name for name in names]


# -- export ----------------------------------------------------------------------------------------


def check_exportable(folder, config):
    """Raise ValueError if `export` would raise it. config: fields of train.GPTConfig, by name."""
    folder = Path(folder)
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f"{folder} exists and is not an empty folder; give --export a new one")
    try:
        os.lstat(folder)
    except FileNotFoundError:  # it does not exist, but may
        pass
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        reason = getattr(error, "strerror", None) or "no folder can have that name"
        raise ValueError(f"cannot write {shown(folder)} ({reason})") from None
    parent = next(parent for parent in folder.parents if os.path.exists(parent))
    by_effective_user = os.access in os.supports_effective_ids
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=by_effective_user):
        raise ValueError(f"cannot write in {shown(parent)}; give --export another folder")
    for attn in config["attn"].split(","):
        if attn != "softmax":
            raise ValueError(f"no Hugging Face family has {attn} attention: cannot export")
    if family_of(config) is None:
        raise ValueError("no Hugging Face family has both biases and QK-norm: cannot export")


def family_of(config):
    """Return the architecture in FAMILIES with the biases and norms of this config, or None."""
    for architecture, family in FAMILIES.items():
        if all(family[name] == config[name] for name in ("qkv_bias", "qk_norm")):
            return architecture
    return None


def export(folder, weights, config, tokenizer, dtype=None):
    """Write a folder that transformers loads; it appears as a whole or not at all.

    weights: {name in train.GPT: tensor}. config: fields of train.GPTConfig, by name.
    tokenizer: its state, as in a checkpoint.
    dtype: of the tensors in the file. By default, it is the dtype of the Hugging Face folder that
    the model came from, or if there is none, of the weights.
    """
    folder = Path(folder)
    check_exportable(folder, config)
    shapes = tensor_shapes(config)
    settings = export_settings(config, tokenizer)

    # the dtype; its setting is called torch_dtype in older versions of transformers
    if dtype is None:
        name = settings.get("dtype") or settings.get("torch_dtype")
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        dtype = known.get(name) or weights["embed_tokens.weight"].dtype
    key = "dtype" if "dtype" in settings else "torch_dtype"
    settings[key] = str(dtype).removeprefix("torch.")

    with atomic_folder(folder, EXPORTED_FILES) as draft:
        write_weights(draft, weights, shapes, dtype)
        for name in TOKENIZER_FILES:
            if name in tokenizer.get("files", {}):
                (draft / name).write_text(tokenizer["files"][name], encoding="utf-8", newline="")
        (draft / "config.json").write_text(json.dumps(settings, indent=2))
    remark = ""
    if "files" not in tokenizer:
        remark = ", without its tokenizer, which transformers cannot read"
    print0(f"exported {folder}, in {settings[key]}{remark}")


def export_settings(config, tokenizer):
    """Return the settings for config.json.

    If the model came from a Hugging Face folder, these are the settings of that folder, with only
    those changed whose value in `config` is another one now.
    """
    path = Path(tokenizer["name"]) / "config.json"
    settings = {
        "architectures": [family_of(config)],
        "model_type": FAMILIES[family_of(config)]["model_type"],
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": tokenizer.get("stops"),
    }
    before = {}  # fields of GPTConfig, as in the original config.json
    if "config" in tokenizer:
        original = read_config(path.parent, tokenizer["config"])
        if [family_of(original)] == settings["architectures"]:
            settings = read_object(path, tokenizer["config"])
            before = original
            # fine-tuning on shorter sequences does not shorten the context that the model can use
            config = {**config, "block_size": max(config["block_size"], before["block_size"])}
    for field, (name, _, _) in SETTINGS.items():
        if config[field] == before.get(field):  # unchanged: keep what the original says
            continue
        if field == "rope_theta" and settings.get("rope_parameters"):
            settings["rope_parameters"][name] = config[field]
        else:
            settings[name] = config[field]
    return settings


def write_weights(folder, weights, shapes, dtype):
    """Write the tensors as model.safetensors, or as several files and an index."""
    from huggingface_hub import split_state_dict_into_shards_factory

    shards = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: math.prod(shape) * dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file_name, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensor = weights[name].to("cpu", dtype, copy=True)
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"the tensor {name} is {tuple(tensor.shape)}, not {shapes[name]}")
            tensors[to_their_name(name)] = tensor.contiguous()
        try:
            save_file(tensors, folder / file_name, {"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(error) from None
    if shards.is_sharded:
        weight_map = {}
        for name, file_name in shards.tensor_to_filename.items():
            weight_map[to_their_name(name)] = file_name
        index = {"metadata": shards.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
