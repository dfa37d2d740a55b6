"""Checkpoints: saved as a whole, checked completely before use, and nothing is unpickled."""

from dataclasses import fields
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from support.cli import check_own, resolve
from support.distributed import full_tensor, rank, shard_like

# claim_folder and the others moved to support/files.py; still found here by their old place
from support.files import (  # noqa: F401
    atomic_write,
    claim_folder,
    find_run,
    get_cache_folder,
    is_file,
    parse_json,
    read_user_file,
    remove_dead_drafts,
    shown,
    write_json,
)

REQUIRED = {"model", "optimizer", "step", "config", "tokenizer", "data"}
PLAIN = (bool, int, float, str, type(None))


# -- saving ----------------------------------------------------------------------------------------


def save(folder, model, optimizer, **more):
    """Write ckpt.pt. Every rank calls this, to gather what is sharded; rank 0 writes."""

    def gather(value):
        if not torch.is_tensor(value):
            return value
        whole = full_tensor(value)  # all ranks take part, one tensor at a time
        if rank() > 0:
            return None
        return whole if whole is value else whole.cpu()

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state = {**tree_map(gather, state), **more}
    if rank() == 0:
        try:
            check_values(state)
        except ValueError as error:
            raise ValueError(f"this run cannot be saved: {error}") from None
        with atomic_write(folder / "ckpt.pt") as file:
            torch.save(state, file)


def check_values(value):
    """Return the bytes of all tensors in a nest of dicts, lists and tuples.

    Raises ValueError unless all else in it are numbers, strings, booleans and None.
    """
    if isinstance(value, torch.Tensor):
        is_dense = value.layout == torch.strided and not value.is_nested
        if not is_dense or value.is_meta or value.is_quantized:
            raise ValueError("it has a tensor that is sparse, nested, quantized or without values")
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return check_values(list(value)) + check_values(list(value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(check_values, value))
    if type(value) not in PLAIN:
        raise ValueError(f"it has a {type(value).__name__}, which is neither a tensor nor plain")
    return 0


# -- loading ---------------------------------------------------------------------------------------


def load(folder, config_types, plugins, modules=()):
    """Read the checkpoint of a run, or a Hugging Face folder, and check all of it.

    config_types: {"model": dataclass, "run": dataclass} of its settings, whose constructors check
    them. plugins: {setting: (function name, built-ins)}. modules: the settings by which the caller
    will import a module that the user has not named: it has to be part of this repository.

    The tensors stay in the file until they are used. load_weights and restore compare their shapes
    with those of the model. Raises ValueError.
    """
    path = Path(folder) / "ckpt.pt"
    if not is_file(path):
        from support import huggingface

        return huggingface.load_checkpoint(folder)
    try:
        size = path.stat().st_size
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check(saved, size, config_types, plugins, modules)
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)} ({error.strerror or error})") from None
    except Exception as error:
        reason = "it is damaged, or holds more than tensors and plain values"
        if type(error) is ValueError:  # not, for example, a UnicodeDecodeError of torch.load
            reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{shown(path)} cannot be used: {reason}") from None
    return saved


def check(saved, file_size, config_types, plugins, modules):
    """Raise ValueError, or what Python raises for something malformed, if a run cannot use this."""
    from support.data import tokenizer_from_state

    # containers and tensors
    missing = REQUIRED - set(saved)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for key in REQUIRED - {"step"}:
        if not isinstance(saved[key], dict):
            raise ValueError(f"its {key} is no dict")
    # a tensor of stride 0 may describe any number of elements; twice: some may share their memory
    if check_values(saved) > 2 * file_size:
        raise ValueError("its tensors describe more values than the file has")
    for name, tensor in saved["model"].items():
        if type(name) is not str or not torch.is_tensor(tensor):
            raise ValueError(f"its {name!r} is no weight")
        if not tensor.is_floating_point():
            raise ValueError(f"its {name} is {tensor.dtype}, not a floating-point tensor")
    if type(saved["step"]) is not int or saved["step"] < 0:
        raise ValueError(f"its step is {saved['step']!r}")

    # settings
    for key, config_type in config_types.items():
        settings = saved["config"][key]
        strange = set(settings) ^ {f.name for f in fields(config_type)}
        if strange:
            names = ", ".join(sorted(map(str, strange)))
            raise ValueError(f"it is of another version of fivefold, which differs in: {names}")
        config_type(**settings)
    sizes = {**saved["config"]["model"], "block_size": 0}
    largest = max(value for value in sizes.values() if type(value) is int)
    if largest > file_size or sizes["n_layer"] > len(saved["model"]):
        raise ValueError("its settings describe a larger model than it holds")
    for name in modules:
        settings = {**saved["config"]["model"], **saved["config"]["run"]}
        check_own(settings[name], plugins[name][1])
    tokenizer_from_state(saved["tokenizer"])


def get_weight(state, name, shape):
    if name not in state:
        raise ValueError(f"the checkpoint lacks the tensor {name}")
    tensor = state[name]
    if tensor.shape != shape:
        raise ValueError(f"the checkpoint's {name} is {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor


def check_weights(model, state):
    """Raise ValueError unless `state` has the tensors of a model, which may be on "meta" still.

    So no memory is allocated for a model that the file does not hold. What reads the tensors of a
    Hugging Face folder, one by one, has compared their shapes itself.
    """
    if isinstance(state, dict):
        for name, tensor in model.state_dict().items():
            get_weight(state, name, tensor.shape)


@torch.no_grad()
def load_weights(model, state):
    """Copy the tensors of `state` into the model, one at a time; a sharded model takes its part."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(shard_like(tensor, get_weight(state, name, tensor.shape)))


def merge_adapters(model, saved):
    """Merge the adapters of a checkpoint into the weights, which are loaded already."""
    spec = saved["config"]["run"].get("adapter")
    if spec:
        adapt, options = resolve(spec, "adapt")
        merge, _ = resolve(spec.partition(":")[0], "merge")
        adapt(model, **options)
        load_weights(model, saved["model"])
        merge(model)
        model.requires_grad_(True)


# -- resuming --------------------------------------------------------------------------------------


def check_unchanged(saved, configs, fingerprint, origin):
    """Raise ValueError if the text, or a setting that is not adjustable, is not that of the run."""
    before = {**saved["config"]["model"], **saved["config"]["run"]}
    for config in configs:
        for f in fields(config):
            value = getattr(config, f.name)
            if value != before[f.name] and not f.metadata.get("adjustable"):
                flag = "--" + f.name.replace("_", "-")
                raise ValueError(
                    f"{flag} is {value} here but {before[f.name]} in {shown(origin)}; leave it out"
                )
    if fingerprint != saved["data"]:
        raise ValueError(
            f"the text has changed since the run in {shown(origin)} began; --init {shown(origin)} "
            f"starts a new run from its weights"
        )


@torch.no_grad()
def restore(model, optimizer, saved):
    """Put back the weights and the optimizer's state of a run that continues.

    Kernels of optimizers trust the shapes and strides of their state, so no tensor of the file is
    handed to them. One step on gradients of zero makes the optimizer allocate its state, sharded
    or not, and the saved values are copied into it. What does not fit, or is missing, is refused.
    """
    if saved["step"] > 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        try:
            restore_state(optimizer, parameters, saved["optimizer"], saved["step"])
        except (KeyError, TypeError, AttributeError, RuntimeError):
            raise ValueError("the checkpoint's optimizer state is malformed") from None
    load_weights(model, saved["model"])  # last: that step may have decayed them


def restore_state(optimizer, parameters, state, step):
    """Copy the saved state of each parameter, and the numbers of each group, into the optimizer."""
    if set(state["state"]) != set(range(len(parameters))):
        raise ValueError("the checkpoint lacks the optimizer's state of some parameters")
    for i, p in enumerate(parameters):
        own = optimizer.state[p]
        own.update(copy_into(own, state["state"][i], f"state of parameter {i}"))
        count = float(own.get("step", step))
        if not 0 <= count <= step:
            raise ValueError(f"the checkpoint's optimizer has counted {count} steps, not {step}")

    # numbers may change during a run; all other options follow from the settings
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise ValueError("the checkpoint's optimizer has another number of parameter groups")
    for group, saved_group in zip(optimizer.param_groups, state["param_groups"]):
        for name, value in group.items():
            if type(value) in (int, float) and type(saved_group.get(name)) is type(value):
                group[name] = saved_group[name]


def copy_into(own, saved, name):
    """Return saved state of an optimizer in the form of its own, whose tensors take the values."""
    if isinstance(own, torch.Tensor):
        is_tensor = isinstance(saved, torch.Tensor)
        if not is_tensor or saved.shape != own.shape or saved.dtype != own.dtype:
            found = type(saved).__name__
            if is_tensor:
                found = f"{saved.dtype} of shape {tuple(saved.shape)}"
            expected = f"{own.dtype} of shape {tuple(own.shape)}"
            raise ValueError(f"the checkpoint's optimizer has {found} as {name}, not {expected}")
        return own.copy_(shard_like(own, saved))
    if type(saved) is not type(own):
        found = type(saved).__name__
        expected = type(own).__name__
        raise ValueError(f"the checkpoint's optimizer has {found} as {name}, not {expected}")
    if isinstance(own, dict):
        if saved.keys() != own.keys():
            keys = ", ".join(sorted(map(str, saved.keys() ^ own.keys())))
            raise ValueError(f"the checkpoint's optimizer has another {name}: it differs in {keys}")
        return {key: copy_into(own[key], saved[key], f"{key} in the {name}") for key in own}
    if isinstance(own, (list, tuple)):
        if len(saved) != len(own):
            raise ValueError(f"the checkpoint's optimizer has another length of {name}")
        return type(own)(copy_into(a, b, name) for a, b in zip(own, saved))
    return saved
