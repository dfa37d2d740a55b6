"""LoRA adapters on disk, in the format of Hugging Face's PEFT: a JSON file and a weight file."""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from support import lora
from support.files import atomic_write, parse_json, read_user_file, write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Settings in adapter_config.json that may have any value: they do not change the product B A
ANY_VALUE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "task_type", "inference_mode", "revision",
    "base_model_name_or_path", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size",  # have no effect unless another setting is on
}  # fmt: skip

# Settings that must have one of these values. With another init_lora_weights, PEFT changes the
# frozen weights, too.
ALLOWED_VALUES = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian"],
}

# All other settings must be off, which means one of these values.
OFF_VALUES = [None, False, {}, [], ""]


def save(model, folder, prefix=""):
    """Write the adapters, but not the model, into a folder that holds no adapters yet.

    prefix: added to our name of a layer to get PEFT's name. For a train.GPT, it is "model.".
    """
    for path in (Path(folder, CONFIG), Path(folder, WEIGHTS)):
        if os.path.lexists(path):
            raise ValueError(f"{path} exists already; give another folder")
    layers = lora.adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to save")
    tensors = {}
    for name, linear in layers.items():
        layer = f"base_model.model.{prefix}{name}"
        tensors[f"{layer}.lora_A.weight"] = linear.lora_A.detach().cpu().contiguous()
        tensors[f"{layer}.lora_B.weight"] = linear.lora_B.detach().cpu().contiguous()
    rank = len(linear.lora_A)  # rank and scale are the same for all layers
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * linear.lora_scale,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "target_modules": [prefix + name for name in layers],
    }
    with atomic_write(Path(folder, WEIGHTS)) as file:
        file.write(save_safetensors(tensors, {"format": "pt"}))
    write_json(Path(folder, CONFIG), config)


@torch.no_grad()
def load(model, folder, prefix=""):
    """Put the adapters that `save` or PEFT wrote into a folder on the model, and return it.

    prefix: as for `save`. Dropout is not applied. Raises ValueError if the folder holds no adapters
    of plain LoRA, or if they do not fit the model.
    """
    rank, alpha, tensors = read_adapters(folder)
    linears = {prefix + name: m for name, m in lora.linear_layers(model).items()}
    layers = {}
    for name, (A, B) in tensors.items():
        if name not in linears:
            raise ValueError(f"{folder} adapts {name!r}, which is no linear layer of the model")
        shape = linears[name].weight.shape
        if shape != (len(B), A.shape[1]):
            raise ValueError(f"{folder}: the adapter of {name} is not one of a matrix {shape}")
        layers[name.removeprefix(prefix)] = linears[name]
    lora.inject_layers(model, layers, rank, alpha)
    for name, (A, B) in tensors.items():
        linears[name].lora_A.copy_(A)
        linears[name].lora_B.copy_(B)
    return model


def read_adapters(folder):
    """Return rank, alpha and {PEFT's name of a layer: (A (r, n), B (m, r))}.

    Raises ValueError if the files are damaged, or if they are not those of plain LoRA.
    """
    rank, alpha = read_config(Path(folder, CONFIG))
    path = Path(folder, WEIGHTS)
    try:
        named = load_safetensors(read_user_file(path))
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged") from error

    # sort the tensors by factor; PEFT wraps the model, so its names begin with base_model.model
    factors = {"A": {}, "B": {}}  # {layer: A (r, n)} and {layer: B (m, r)}
    for name, tensor in named.items():
        match = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", name, re.DOTALL)
        if match is None:
            raise ValueError(f"{path} holds {name[:80]!r}, which is no tensor of plain LoRA")
        is_float_matrix = tensor.dim() == 2 and tensor.dtype in lora.WEIGHT_DTYPES
        if not is_float_matrix or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name[:80]!r} is no matrix of finite floats")
        layer, factor = match.groups()
        factors[factor][layer] = tensor

    # each layer needs both factors, of the rank in the config
    for layer in factors["A"].keys() ^ factors["B"].keys():
        raise ValueError(f"{path}: {layer[:80]!r} lacks the matrix A or B")
    tensors = {}
    for layer, A in factors["A"].items():
        B = factors["B"][layer]
        if not len(A) == B.shape[1] == rank:
            raise ValueError(f"{path}: a matrix of {layer[:80]!r} has not rank {rank}")
        tensors[layer] = A, B
    if not tensors:
        raise ValueError(f"{path} holds no adapters")
    return rank, alpha, tensors


def read_config(path):
    """Return rank and alpha from adapter_config.json. Raises ValueError if it is not plain LoRA."""
    config = parse_json(read_user_file(path), path)
    if not isinstance(config, dict) or not {"peft_type", "r", "lora_alpha"} <= config.keys():
        raise ValueError(f"{path} holds no LoRA settings: peft_type, r and lora_alpha")
    for key, value in config.items():
        allowed = ALLOWED_VALUES.get(key, OFF_VALUES)
        if key not in ANY_VALUE and value not in allowed:
            raise ValueError(
                f"{path} sets {key[:80]!r} to {str(value)[:80]!r}: only plain LoRA is implemented"
            )
    rank = config["r"]
    alpha = config["lora_alpha"]
    if type(rank) is not int or type(alpha) not in (int, float):
        raise ValueError(f"{path}: r must be an integer and lora_alpha a number")
    return rank, alpha
