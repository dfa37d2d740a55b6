"""LoRA adapters on linear layers: y = W x + scale B A x, where W is frozen. Needs torch only."""

import hashlib
import math
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def inject(model, rank, alpha=None, targets=("q_proj", "v_proj"), seed=0):
    """Put adapters on every nn.Linear whose name ends with one of `targets`, and freeze all else.

    targets: patterns such as "q_proj" or "layers.0.mlp.*".
    alpha: the output of an adapter is multiplied by alpha / rank, or by 1 if alpha is None.

    Each layer gets the parameters lora_A (rank, n) and lora_B (m, rank), in float32 or float64.
    Returns the model.

    Raises ValueError if a target matches no layer, a layer cannot carry an adapter, the rank or
    alpha is out of range, or the model has adapters already.
    """
    return inject_layers(model, find_layers(model, targets), rank, alpha, seed)


def inject_layers(model, layers, rank, alpha, seed=0):
    """Put adapters on `layers`, {name: nn.Linear}, and freeze all else; see `inject`."""
    # check everything before changing the model
    check_layers(model, layers)
    sizes = [(min(linear.weight.shape), name) for name, linear in layers.items()]
    size, smallest = min(sizes)
    if not 1 <= rank <= size:
        raise ValueError(f"the rank is {rank}; it must be from 1 to {size}, the size of {smallest}")
    if alpha is not None and not 0 <= alpha < 2**63:  # a larger integer may be no float
        raise ValueError(f"alpha is {alpha}; it must be at least 0")
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")

    model.requires_grad_(False)
    for name, linear in layers.items():
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        A = init_A(f"{name}.lora_A", (rank, linear.in_features), seed)
        B = torch.zeros(linear.out_features, rank)
        linear.lora_A = nn.Parameter(A.to(linear.weight.device, dtype))
        linear.lora_B = nn.Parameter(B.to(linear.weight.device, dtype))
        linear.lora_scale = 1.0 if alpha is None else alpha / rank
        linear.lora_called = False
        linear.lora_hook = linear.register_forward_hook(add_adapter, with_kwargs=True)
    model.lora_checks = [
        model.register_forward_pre_hook(start_check),
        model.register_forward_hook(finish_check, always_call=True),
    ]
    return model


def init_A(name, shape, seed):
    """Return the first A (r, n): uniform between +-1 / sqrt(n), as in PEFT.

    It depends only on the name and the seed, and not on the order in which layers are adapted.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


def add_adapter(linear, inputs, kwargs, y):
    """Return y + scale B A x. This is the forward hook of a layer: x (..., n), y = W x (..., m)."""
    linear.lora_called = True
    x = (*inputs, *kwargs.values())[0]
    Ax = F.linear(x, linear.lora_A.to(x.dtype))  # (..., r)
    BAx = F.linear(Ax, linear.lora_B.to(x.dtype))  # (..., m)
    return y + BAx * linear.lora_scale


def adapters(model):
    """Return the layers that carry an adapter, {name: layer}."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def adapter_groups(model):
    """Return one parameter group for LoRARITE: {"params": [A, B, A, B, ...], "pair": True}."""
    parameters = []
    for linear in adapters(model).values():
        parameters += [linear.lora_A, linear.lora_B]
    return [{"params": parameters, "pair": True}]


@torch.no_grad()
def merge(model):
    """Add each adapter to the weight of its layer, and remove it. Returns the model, all frozen."""
    for linear in adapters(model).values():
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        with torch.autocast(linear.weight.device.type, enabled=False):  # it would round to bfloat16
            Z = linear.lora_B.to(dtype) @ linear.lora_A.to(dtype)
        linear.weight.copy_(linear.weight + Z * linear.lora_scale)  # rounded once
        linear.lora_hook.remove()
        del linear.lora_A, linear.lora_B, linear.lora_scale, linear.lora_called, linear.lora_hook
    for module in model.modules():
        if hasattr(module, "lora_checks"):
            for hook in module.lora_checks:
                hook.remove()
            del module.lora_checks
    return model


# --------------------------------------------------------------------------------------------------
# Which layers can carry an adapter


def linear_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def find_layers(model, targets):
    """Return the linear layers whose names end with one of the targets, {name: layer}."""
    linears = linear_layers(model)
    chosen = set()
    for target in targets:
        found = {name for name in linears if fnmatchcase("." + name, f"*.{target}")}
        if not found:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise ValueError(f"no linear layer is called {target!r}; there are {ends or 'none'}")
        chosen |= found
    if not chosen:
        raise ValueError("no targets are given; name the linear layers that get adapters")
    return {name: linear for name, linear in linears.items() if name in chosen}


def check_layers(model, layers):
    """Raise ValueError if a layer's weight is no plain tensor, or another module shares it."""
    tensors = []  # (module, name, storage) of all plain tensors of the model
    for module_name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                tensors.append((module, f"{module_name}.{key}", tensor.untyped_storage()))

    for name, linear in layers.items():
        weight = linear._parameters.get("weight")
        is_plain = type(weight) is nn.Parameter and not weight.is_meta
        if not is_plain or weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"the weight of {name} is no plain tensor of floats (it is sharded, quantized, "
                f"computed or not there yet), so it cannot carry an adapter"
            )
        for module, other, storage in tensors:
            if storage is weight.untyped_storage() and module is not linear:
                raise ValueError(
                    f"the weight of {name} is shared with {other}, which an adapter would change, "
                    f"too; choose other targets"
                )


# --------------------------------------------------------------------------------------------------
# In the first forward pass: is each adapter in effect wherever the weight of its layer is used?


class DirectUses(TorchFunctionMode):
    """While active, collect the layers whose weight is used outside of their own forward pass."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers  # {name: layer}
        self.running = None  # the layer whose forward pass is running
        self.found = []  # names of layers
        self.is_compiled = False  # torch.compile has traced a part, so `found` may be wrong
        self.hooks = []
        for linear in layers.values():
            self.hooks.append(linear.register_forward_pre_hook(self.enter_layer))
            self.hooks.append(linear.register_forward_hook(self.leave_layer))

    def enter_layer(self, linear, inputs):
        self.running = linear

    def leave_layer(self, linear, inputs, output):
        self.running = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if torch.compiler.is_compiling():
            self.is_compiled = True
        elif any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):  # not of .dtype
            if function in (torch.Tensor.to, torch.Tensor.type_as):  # x.to(weight) reads no values
                args = args[:1]
            used = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            for name, linear in self.layers.items():
                if id(linear.weight) in used and linear is not self.running:
                    self.found.append(name)
        return result


def start_check(model, inputs):
    """Begin to collect direct uses of weights.

    Not if a module is compiled: PyTorch would compile it once more for the first forward pass.
    """
    if torch.compiler.is_compiling() or any(m._compiled_call_impl for m in model.modules()):
        return
    model.lora_uses = DirectUses(adapters(model)).__enter__()


def finish_check(model, inputs, output):
    """Raise ValueError if the model's first forward pass used a weight without its adapter.

    Some modules use the weight of a layer without calling the layer, such as nn.MultiheadAttention.
    The adapter would then have no effect in training, but change the model when it is merged. A
    module that does both, call the layer and use its weight, is not noticed if a part of the model
    is compiled.
    """
    if torch.compiler.is_compiling():
        return
    uses = model.__dict__.pop("lora_uses", None)
    if uses:
        uses.__exit__(None, None, None)
        for hook in uses.hooks:
            hook.remove()
    if output is None:  # the pass has raised an error; the next one is the first
        return
    for name, linear in adapters(model).items():
        if not linear.lora_called:
            raise ValueError(
                f"the model does not call its layer {name}, so an adapter has no effect there; "
                f"choose other targets"
            )
    if uses and uses.found and not uses.is_compiled:
        raise ValueError(
            f"the model also uses the weight of its layer {uses.found[0]} directly, where an "
            f"adapter has no effect; choose other targets"
        )
    for hook in model.lora_checks:
        hook.remove()
