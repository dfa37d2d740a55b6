"""Checkpoints: written atomically, fully validated before use, and without pickled code."""

from dataclasses import fields
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map

from support.distributed import full_tensor, rank, shard_like
from support.files import atomic_write, check_zip, is_file, shown
from support.plugins import check_own, resolve
from support.tokenizer import tokenizer_from_state

REQUIRED = {"model", "optimizer", "step", "config", "tokenizer", "data"}
PLAIN = (bool, int, float, str, type(None))


# -- saving ----------------------------------------------------------------------------------------


def save(folder, model, optimizer, **more):
    """Write ckpt.pt. All ranks call this and gather shards; rank 0 writes.

    more: the other entries of the file, such as step, config, tokenizer and data.
    """

    def gather(value):
        """Return a tensor as a whole, but None where rank > 0. Return other values as they are."""
        if not torch.is_tensor(value):
            return value
        whole = full_tensor(value)  # all ranks take part, one tensor at a time
        if rank() > 0:
            return None
        # a gathered tensor is a new one, and all of them together may not fit on this GPU
        return whole if whole is value else whole.cpu()

    # the state of each parameter, by its number; those that never had a gradient have none
    optimizer_state = optimizer.state_dict()
    numbers = {i for group in optimizer_state["param_groups"] for i in group["params"]}
    optimizer_state["without_state"] = sorted(numbers - set(optimizer_state["state"]))
    state = tree_map(gather, {"model": model.state_dict(), "optimizer": optimizer_state})
    state.update(more)
    if rank() == 0:
        try:
            check_values(state)
        except ValueError as error:
            raise ValueError(f"this run cannot be saved: {error}") from None
        with atomic_write(folder / "ckpt.pt") as file:
            torch.save(state, file)


def check_values(value):
    """Raise ValueError unless nested dicts, lists and tuples hold only tensors and plain values.

    Returns the number of bytes of all tensors.
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
    """Read the checkpoint of a run, or a Hugging Face folder, and validate all of it.

    config_types: {"model": dataclass, "run": dataclass} for its settings; their constructors raise
        ValueError for bad values.
    plugins: {setting: (function name, built-ins)} for the settings that name modules.
    modules: those of these settings whose module will be imported because the file names it, not
        the user. Each must then be a module of this repository.

    The file is memory-mapped, so a tensor takes memory only when it is used. Raises ValueError.
    """
    path = Path(folder) / "ckpt.pt"
    if not is_file(path):
        from support import huggingface

        return huggingface.load_checkpoint(folder)
    try:
        file_size = path.stat().st_size
        check_zip(path)  # torch.load does not, with mmap
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_contents(saved, file_size)
        check_settings(saved, file_size, config_types, plugins, modules)
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)} ({error.strerror or error})") from None
    except Exception as error:  # malformed contents can raise anything
        reason = "it is damaged, or holds more than tensors and plain values"
        if type(error) is ValueError:  # one of ours, not a subclass from inside torch.load
            reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{shown(path)} cannot be used: {reason}") from None
    return saved


def check_contents(saved, file_size):
    """Check the types of all entries, and that the tensors are no larger than the file."""
    missing = REQUIRED - set(saved)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    for key in REQUIRED - {"step"}:
        if not isinstance(saved[key], dict):
            raise ValueError(f"its {key} is no dict")

    # a tensor with stride 0 can claim more values than the file has; tied tensors, stored once and
    # counted twice, may claim up to twice its size
    if check_values(saved) > 2 * file_size:
        raise ValueError("its tensors describe more values than the file has")

    for name, tensor in saved["model"].items():
        if type(name) is not str or not torch.is_tensor(tensor):
            raise ValueError(f"its {name!r} is no weight")
        if not tensor.is_floating_point() or tensor.itemsize == 1:  # few operations take float8
            raise ValueError(f"its {name} is {tensor.dtype}, not a float of 16 bits or more")
    if type(saved["step"]) is not int or saved["step"] < 0:
        raise ValueError(f"its step is {saved['step']!r}")
    if any(map(torch.is_tensor, tree_leaves(saved["data"]))):  # it will be compared
        raise ValueError("its data has a tensor")


def check_settings(saved, file_size, config_types, plugins, modules):
    """Check the settings, the modules they name, the size of the model, and the tokenizer."""
    # settings have exactly the fields of this version; their constructor checks the values
    for key, config_type in config_types.items():
        settings = saved["config"][key]
        unmatched = set(settings) ^ {f.name for f in fields(config_type)}
        if unmatched:
            names = ", ".join(sorted(map(str, unmatched)))
            raise ValueError(f"it is of another version of fivefold, which differs in: {names}")
        config_type(**settings)

    # building the model must not allocate more than the file could fill: no size of a weight may
    # exceed the size of the file (block_size is not such a size)
    sizes = {**saved["config"]["model"], "block_size": 0}
    largest = max(value for value in sizes.values() if type(value) is int)
    if largest > file_size or sizes["n_layer"] > len(saved["model"]):
        raise ValueError("its settings describe a larger model than it holds")

    # settings that name modules must name ours, or a built-in function, as of plugins[name][1]
    settings = {**saved["config"]["model"], **saved["config"]["run"]}
    for name in modules:
        check_own(settings[name], plugins[name][1])
    tokenizer_from_state(saved["tokenizer"])  # raises ValueError if it cannot be built


def get_weight(state, name, shape):
    """Return a tensor of a state dict; raise ValueError if it is missing or not of this shape."""
    if name not in state:
        raise ValueError(f"the checkpoint lacks the tensor {name}")
    tensor = state[name]
    if tensor.shape != shape:
        raise ValueError(f"the checkpoint's {name} is {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor


def check_weights(model, state):
    """Raise ValueError unless the state dict has every tensor of the model, in the same shape.

    Call this while the model is on the meta device, before its memory is allocated. The state of a
    Hugging Face folder is not a dict; its shapes have been checked when it was opened.
    """
    if isinstance(state, dict):
        for name, tensor in model.state_dict().items():
            get_weight(state, name, tensor.shape)


@torch.no_grad()
def load_weights(model, state):
    """Copy a state dict into the model, one tensor at a time; a sharded model takes its shard."""
    for name, tensor in model.state_dict().items():
        weight = get_weight(state, name, tensor.shape)
        if not weight.isfinite().all():
            raise ValueError(f"the checkpoint's {name} has values that are infinite or NaN")
        tensor.copy_(shard_like(tensor, weight))


def merge_adapters(model, saved):
    """Add the adapters of a checkpoint, if it has any, load them and merge them into the model."""
    spec = saved["config"]["run"].get("adapter")
    if spec:
        # adapt() adds empty adapters to the model, merge() adds trained ones to its weights
        adapt, options = resolve(spec, "adapt")
        merge, _ = resolve(spec.partition(":")[0], "merge")
        adapt(model, **options)
        load_weights(model, saved["model"])
        merge(model)
        model.requires_grad_(True)


# -- resuming --------------------------------------------------------------------------------------


def check_unchanged(saved, configs, fingerprint, origin):
    """Raise ValueError if the data or a setting has changed, except for adjustable settings.

    configs: the settings of this call. fingerprint: of the tokens. origin: the run's folder.
    """
    before = {**saved["config"]["model"], **saved["config"]["run"]}
    for config in configs:
        for f in fields(config):
            value = getattr(config, f.name)
            if value != before[f.name] and not f.metadata["adjustable"]:
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
    """Restore the weights and the optimizer state of a run that is resumed.

    Optimizer kernels trust the shapes and strides of their state, so they must not get tensors from
    a file. Instead, one step on zero gradients makes the optimizer allocate its state, and the
    saved values are copied into it. Raises ValueError if a value is missing or has another shape.
    """
    if saved["step"] > 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = saved["optimizer"]
        try:
            without_state = state.get("without_state", [])
            if {*state["state"], *without_state} != set(range(len(parameters))):
                raise ValueError("the checkpoint lacks the optimizer's state of some parameters")
            for i in state["state"]:
                parameters[i].grad = torch.zeros_like(parameters[i])
            optimizer.step()
            optimizer.zero_grad()
            restore_state(optimizer, parameters, state, saved["step"])
        except (KeyError, TypeError, AttributeError, RuntimeError):
            raise ValueError("the checkpoint's optimizer state is malformed") from None
    load_weights(model, saved["model"])  # last, because that step has decayed the weights


def restore_state(optimizer, parameters, state, step):
    """Copy the saved state of each parameter, and the numbers of each group, into the optimizer."""
    for i, saved in state["state"].items():
        own = optimizer.state[parameters[i]]  # as the optimizer allocated it
        own.update(copy_into(own, saved, f"state of parameter {i}"))
        count = float(own.get("step", step))
        if not 0 <= count <= step:
            raise ValueError(f"the checkpoint's optimizer has counted {count} steps, not {step}")

    # restore numbers such as lr, which change during a run; other options follow from the settings
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise ValueError("the checkpoint's optimizer has another number of parameter groups")
    for group, saved_group in zip(optimizer.param_groups, state["param_groups"]):
        for name, value in group.items():
            if type(value) in (int, float) and type(saved_group.get(name)) is type(value):
                group[name] = saved_group[name]


def copy_into(own, saved, name):
    """Copy saved optimizer state into `own`, the optimizer's state, which is nested the same way.

    Returns `own` with its numbers and strings replaced. name: what to call this part of the state
    in an error. Raises ValueError if types, dtypes, shapes, keys or lengths differ.
    """
    if describe(saved) != describe(own):
        raise ValueError(
            f"the checkpoint's optimizer has {describe(saved)} as {name}, not {describe(own)}"
        )
    if isinstance(own, torch.Tensor):
        return own.copy_(shard_like(own, saved))
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


def describe(value):
    """Return the type of a value as text, and for a tensor its dtype and shape."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
