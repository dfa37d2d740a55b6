"""Train a small GPT. A paper's file can replace its attention or optimizer.

python train.py                           on the source of Python's library
python train.py --data my.txt             on a text file or folder
python train.py --model gpt2 --steps 100  a preset, with one setting changed
python train.py --attn softmax,laser      layers alternate between the two
python train.py --attn simplicial:help    list a module's options
python train.py --attn simplicial:w1=64   set one of them
python train.py --attn mine --optim mine  your mine.py: attention(q, k, v),
                                          optimizer(groups, lr)
python train.py --init out/NAME           start from the weights of a run
python train.py --init ORG/NAME           or from Llama, SmolLM2, Qwen2.5, Qwen3
                                          on huggingface.co, or in a folder
python train.py --init DIR --adapter lora_rite --optim lora_rite
python train.py --init DIR --data my.txt --eval-only
python train.py --resume                  continue the newest run
torchrun --nproc-per-node 8 train.py      on 8 GPUs; --fsdp shards the model

A run writes ckpt.pt, config.json, log.csv and loss.png to out/NAME/; sample.py
generates text from it. Exit status: 0 done, 1 the loss was not finite, 2 bad
input, 128 + signal when stopped (in training, the run is saved first).
"""

from support import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # Ctrl-C during the imports

import hashlib
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support import checkpoint, cuda_graph, data, distributed, hub, plugins, run_folder
from support.cli import SWITCH, adjustable, option
from support.distributed import AsyncScalar, print0, rank, world_size
from support.runlog import RunLog

try:
    from kernels.cross_entropy import cross_entropy as fused_cross_entropy
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    fused_cross_entropy = None

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Logits in memory at a time: 2 GB of bf16 on a GPU; on a CPU, few enough to fit its caches
LOGITS_AT_ONCE = {"cuda": 2**30, "mps": 2**26, "cpu": 2**22}

# --------------------------------------------------------------------------------------------------
# Settings: every field is a flag. --resume may change adjustable() fields, and the LaunchConfig.


@dataclass
class GPTConfig:
    """The model"""

    vocab_size: int = option(0, "token ids; 0: the tokenizer's, rounded up to a multiple of 64")
    block_size: int = option(256, "context in tokens")
    n_layer: int = option(4, "decoder layers")
    n_head: int = option(4, "query heads")
    n_kv_head: int = option(0, "key/value heads (grouped-query attention); 0: n-head")
    n_embd: int = option(128, "width of the residual stream")
    head_dim: int = option(0, "width of one head; 0: n-embd / n-head")
    n_hidden: int = option(0, "width of the SwiGLU; 0: 8/3 n-embd, up to a multiple of 64")
    qkv_bias: bool = option(False, "bias on queries, keys and values, as in Qwen2.5")
    qk_norm: bool = option(False, "RMSNorm on each query and key head, as in Qwen3")
    tied: bool = option(True, "the output layer is the embedding, transposed")
    rope_theta: float = option(10000.0, "base of the RoPE wavelengths")
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm")
    attn: str = option("softmax", "softmax or modules, as in softmax,laser: layers take turns")

    def __post_init__(self):
        cli.check_fields(self)
        widths = (self.n_embd, self.n_hidden, self.head_dim, self.vocab_size)
        if max(self.n_layer, self.n_head) > 1024 or max(widths) > 2**24:
            raise ValueError("the model has over 1024 layers or heads, or a width above 2**24")
        n_modules = len(self.attn.split(","))
        if n_modules > self.n_layer:
            raise ValueError(
                f"--attn has {n_modules} modules for {self.n_layer} layers; "
                f"give fewer, or --n-layer {n_modules}"
            )
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"--n-embd {self.n_embd} is no multiple of --n-head {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or math.ceil(8 * self.n_embd / (3 * 64)) * 64
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n-kv-head {self.n_kv_head} does not divide --n-head {self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"--head-dim {self.head_dim} is odd, but RoPE rotates pairs")


@dataclass
class RunConfig:
    """The run"""

    # adjustable, because the file may have moved; --resume compares the text itself
    data: str = adjustable(
        "stdlib", "text file, folder or .jsonl; or Python source: stdlib, python"
    )
    tokenizer: str = option("byte", "byte, a tiktoken encoding (gpt2, ...) or a .tiktoken file")
    optim: str = option("adamw", "adamw or a module with optimizer(groups, lr)")
    adapter: str = option("", "a module with adapt(model): train what it adds, freeze the weights")
    steps: int = option(1000, "optimizer steps of the whole run")
    batch_size: int = option(16, "sequences per step, over all processes and micro-batches")
    lr: float = option(1e-3, "peak learning rate: linear warm-up, then cosine down to a tenth")
    warmup: int = option(0, "warm-up steps; 0: a twentieth of --steps")
    weight_decay: float = option(0.1, "decay of the matrices; gains are never decayed", least=0)
    clip: float = option(1.0, "largest norm of the whole gradient; 0: no limit", least=0)
    seed: int = option(1337, "draws the weights and the batches", least=0)
    eval_every: int = adjustable(0, "steps between evaluations and saves; 0: a tenth of --steps")
    eval_batches: int = adjustable(20, "held-out batches per evaluation, always the same ones")
    dtype: str = adjustable("", "fp32 or bf16 activations; default: bf16 on a GPU that has it")
    micro_batch: int = adjustable(0, "sequences per process in one forward; 0: all at once")

    def __post_init__(self):
        cli.check_fields(self)
        if self.dtype not in ("", *DTYPES):
            raise ValueError(f"--dtype {self.dtype} is unknown; give fp32 or bf16")
        self.warmup = self.warmup or max(1, self.steps // 20)
        self.eval_every = self.eval_every or max(1, self.steps // 10)


def preset(n_layer, n_head, n_embd, block_size, batch_size, steps, lr, **more):
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    return {**shape, "batch_size": batch_size, "steps": steps, "lr": lr, **more}


SMOLLM2 = {"n_kv_head": 3, "n_hidden": 1536, "vocab_size": 49152, "rope_theta": 1e5}
QWEN3 = {"n_kv_head": 8, "head_dim": 128, "n_hidden": 9728, "vocab_size": 151936}
QWEN3 = {**QWEN3, "qk_norm": True, "rope_theta": 1e6, "norm_eps": 1e-6}
PRESETS = {  # layers, heads, width, context, batch, steps, learning rate
    "tiny": preset(2, 4, 128, 128, 12, 1700, 5e-3),
    "small": preset(8, 8, 512, 512, 64, 1000, 1e-3),
    "gpt2": preset(12, 12, 768, 1024, 64, 5000, 6e-4),
    "gpt2-medium": preset(24, 16, 1024, 1024, 64, 10000, 3e-4),
    "gpt2-large": preset(36, 20, 1280, 1024, 64, 20000, 2.5e-4),
    # shapes of published models, for benchmarks
    "smollm2-135m": preset(30, 9, 576, 2048, 64, 10000, 6e-4, **SMOLLM2),
    "qwen3-4b": preset(36, 32, 2560, 4096, 64, 10000, 2e-4, **QWEN3),
}


@dataclass
class LaunchConfig:
    """This call (may differ on --resume)"""

    model: str = option("", "sets layers, heads, width, context, batch, steps, lr", choices=PRESETS)
    out: str = option("", "folder of the run; default: a new one, out/MODEL-ATTN")
    resume: str = option("", "continue a run; default: the newest", nargs="?", const="newest")
    init: str = option("", "start from the weights of a run, Hugging Face folder or ORG/NAME")
    stop_after: int = option(0, "end this call after so many steps, as an interruption would")
    device: str = option("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    sample: int = option(200, "tokens to show at the end", least=0)
    eval_only: bool = option(False, "print the held-out loss of --init on --data", action=SWITCH)
    export: str = option("", "at the end, write the weights as a Hugging Face folder, too")
    compile: bool = option(None, "torch.compile; default: on CUDA, where Triton is there")
    graph: bool = option(None, "replay steps as CUDA graphs; default: on one GPU, if possible")
    fsdp: bool = option(False, "shard weights, gradients and optimizer state", action=SWITCH)

    def __post_init__(self):
        cli.check_fields(self)
        if self.resume and (self.init or self.out):
            raise ValueError("--resume continues a run where it is; leave --init and --out out")
        if self.eval_only and not self.init:
            raise ValueError("--eval-only evaluates the weights of --init DIR; give one")
        if self.fsdp and not cli.launched_by_torchrun():
            raise ValueError("--fsdp needs processes: torchrun --nproc-per-node 2 train.py --fsdp")


# --------------------------------------------------------------------------------------------------
# Model. Modules have Llama's names, so weights of Llama, SmolLM2, Qwen2.5 and Qwen3 load.


class Linear(nn.Linear):
    """nn.Linear with float32 weights that multiplies in the dtype of its input."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return y.to(x.dtype)


def rope_angles(start, T, head_dim, theta, device):
    """Return cos and sin, (T, 1, D/2) each, for the positions start ... start + T - 1."""
    channels = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = theta ** (-channels / head_dim)  # (D/2,)
    positions = start + torch.arange(T, device=device, dtype=torch.float32)  # (T,)
    angles = torch.outer(positions, frequencies)[:, None]  # (T, 1, D/2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, T, H, D) by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return rotated.to(x.dtype)


def softmax_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, causal; the Tq queries are the last of the Tk positions.

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -> (B, H, Tq, D)
    """
    Tq = q.shape[2]
    Tk = k.shape[2]
    mask = None
    is_causal = False  # set by an `if`: under torch.compile, Tq == Tk is symbolic and not a bool
    is_grouped = False
    if 1 < Tq < Tk:  # is_causal would align the queries with the first keys, not the last
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    elif 1 < Tq:
        is_causal = True
    if q.shape[1] != k.shape[1]:
        is_grouped = True
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=is_grouped)


class Attention(nn.Module):
    """Attention layer: projects x to the inputs of the function that `attn` names, and calls it."""

    def __init__(self, config, attn):
        super().__init__()
        self.function, self.options = plugins.resolve(attn, *PLUGINS["attn"])
        self.inputs = plugins.signature(self.function)[0]  # q, k, v or q, k, v, k2, v2
        self.rope_inputs = getattr(self.function, "rotary", ("q", "k"))
        self.head_dim = config.head_dim
        if self.inputs[:3] != ["q", "k", "v"]:
            given = ", ".join(self.inputs)
            raise ValueError(f"--attn {attn}: attention({given}) does not begin with q, k, v")

        # window of each input after q: a query sees this many of the last positions; None: all
        self.windows = []
        names = getattr(self.function, "windows", {})  # {input: option that sets its window}
        for name in self.inputs[1:]:
            window = self.options[names[name]] if name in names else None
            if window is not None and (type(window) is not int or window < 1):
                raise ValueError(f"--attn {attn}: {names[name]} is {window}; it must be at least 1")
            self.windows.append(window)

        # one projection per input; all inputs but q have n_kv_head heads
        for name in self.inputs:
            n_head = config.n_head if name == "q" else config.n_kv_head
            width = n_head * config.head_dim
            self.add_module(f"{name}_proj", Linear(config.n_embd, width, bias=config.qkv_bias))
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x, cos, sin):
        """Return the function's inputs for x (B, T, C): q (B, H, T, D), others (B, Hkv, T, D)."""
        heads = []
        for name in self.inputs:
            projection = getattr(self, f"{name}_proj")
            t = projection(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
            if name == "q":
                t = self.q_norm(t)
            if name == "k":
                t = self.k_norm(t)
            if name in self.rope_inputs:
                t = apply_rope(t, cos, sin)
            heads.append(t.transpose(1, 2))  # (B, H, T, D)
        return heads

    def forward(self, x, cos, sin, cache=None):
        heads = self.project(x, cos, sin)
        if cache is None:
            y = self.function(*heads, **self.options)  # (B, H, T, D)
        else:
            y = cache.attend(self, heads)  # the function, over cached positions as well
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, attn):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, attn)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class GPT(nn.Module):
    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype  # of the activations; the weights stay float32
        self.is_compiled = False
        pattern = config.attn.split(",")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList()
        for i in range(config.n_layer):
            self.layers.append(Block(config, pattern[i % len(pattern)]))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx, targets=None, count=None, cache=None):
        """Return the loss if there are targets (B, T), otherwise the logits (B, T, V).

        The loss is the sum of the cross-entropies in nats over all targets >= 0, divided by
        `count`, by default their number. cache: a list with one KV cache per layer. With it, idx
        (B, T) continues the cached text, and the logits are those of the last position, (B, 1, V).
        """
        start = cache[0].length if cache else 0
        head_dim = self.config.head_dim
        cos, sin = rope_angles(start, idx.shape[1], head_dim, self.config.rope_theta, idx.device)

        x = self.embed_tokens(idx).to(self.dtype)  # (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[i] if cache else None)
        if cache:
            x = x[:, -1:]
        x = self.norm(x)

        weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight  # (V, C)
        if targets is None:
            logits = F.linear(x, weight.to(x.dtype))
            return logits.to(torch.promote_types(x.dtype, torch.float32))
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), count)

    def summary(self):
        """Return the size and shape of the model in words."""
        n_parameters = sum(p.numel() for p in self.parameters())
        n_trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        trained = f", {n_trained:,} of them trained" if n_trained < n_parameters else ""
        c = self.config
        return (
            f"{n_parameters:,} parameters{trained}: {c.n_layer} layers of width {c.n_embd}, "
            f"{c.n_head} heads, context {c.block_size}, {c.attn} attention"
        )

    def compile(self):
        """Compile layer by layer. All layers share one graph, so this takes seconds.

        When the model was one graph, every kernel recomputed the RoPE angles, and a step took
        153 ms instead of 117 (gpt2, H200).
        """
        self.is_compiled = True
        for module in (*self.layers, self.norm):
            module.compile()


# --------------------------------------------------------------------------------------------------
# Loss: softmax cross-entropy of the logits x W^T, of which only a chunk is in memory at a time


def linear_cross_entropy(x, weight, targets, count=None):
    """Return the cross-entropy of softmax(x W^T), summed over all targets >= 0, divided by count.

    x (N, C), weight (V, C), targets (N) -> scalar. count: by default the number of these targets.
    """
    if count is None:
        count = (targets >= 0).sum().clamp(min=1)
    # inside forward() gradients are always off, so ask here whether they are needed
    return LinearCrossEntropy.apply(x, weight, targets, count, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """Compute the gradients in the forward pass already, while a chunk's logits are in memory."""

    @staticmethod
    def forward(ctx, x, weight, targets, count, with_grad):
        w = weight.to(x.dtype)
        counted = (targets >= 0).to(torch.promote_types(x.dtype, torch.float32))
        scale = counted / count  # (N,): 1 / count if the target counts, else 0
        cross_entropy = cross_entropy_chunk
        if x.is_cuda and fused_cross_entropy is not None:
            cross_entropy = fused_cross_entropy
        elif x.is_cuda:
            warnings.warn("the loss is slower without Triton (pip install triton)")
        grad_x = torch.zeros_like(x) if with_grad and ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight) if with_grad and ctx.needs_input_grad[1] else None

        # rows of x per chunk, for example 300 rounded down to 256: only powers of two, so that the
        # kernel is compiled for few shapes
        rows = max(1, LOGITS_AT_ONCE[x.device.type] // len(w))
        rows = 2 ** (rows.bit_length() - 1)

        # add up the loss and grad_w over the chunks; each has its own rows of grad_x
        loss = torch.zeros((), dtype=scale.dtype, device=x.device)
        for i in range(0, len(x), rows):
            chunk = slice(i, i + rows)
            logits = x[chunk] @ w.T  # (rows, V)
            chunk_loss, grad_logits = cross_entropy(
                logits, targets[chunk, None], scale[chunk, None], with_grad
            )
            loss = loss + chunk_loss
            if grad_x is not None:
                grad_x[chunk] = grad_logits @ w
            if grad_w is not None:
                grad_w += grad_logits.T @ x[chunk]
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():  # create_graph=True, but the saved gradients are constants
            raise RuntimeError("linear_cross_entropy has no second derivatives")
        grads = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None


def cross_entropy_chunk(logits, targets, scale, with_grad):
    """Return the sum of scale * cross-entropy over the rows, and its gradient.

    logits (R, V), targets (R, 1), scale (R, 1) -> scalar, gradient for the logits (R, V) or None.
    For logits z of a row: cross-entropy = logsumexp(z) - z[target], gradient = softmax(z) - onehot.
    A row with a target below 0 has scale 0, so it adds nothing.
    """
    z = logits.to(scale.dtype)
    lse = z.logsumexp(-1, keepdim=True)  # (R, 1)
    loss = ((lse - z.gather(1, targets.clamp(min=0))) * scale).sum()
    if not with_grad:
        return loss, None
    onehot = torch.arange(z.shape[1], device=z.device) == targets  # (R, V)
    grad = ((z - lse).exp() - onehot.to(z.dtype)) * scale
    return loss, grad.to(logits.dtype)


# --------------------------------------------------------------------------------------------------
# Optimizer and plug-ins


def adamw(groups, lr, *, beta1=0.9, beta2=0.95, eps=1e-8):
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


PLUGINS = {  # flag: (name of the function in a module, functions that need no module)
    "attn": ("attention", {"softmax": softmax_attention}),
    "optim": ("optimizer", {"adamw": adamw}),
    "adapter": ("adapt", {}),
}


def param_groups(model, weight_decay):
    """Return two parameter groups: matrices, which decay, and gains and biases, which do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def make_optimizer(groups, run):
    """Return the optimizer that --optim names."""
    make, options = plugins.resolve(run.optim, *PLUGINS["optim"])
    try:
        return make(groups, run.lr, **options)
    except ValueError as error:
        raise ValueError(f"--optim {run.optim}: {error}") from None


def get_lr(step, run):
    """Return the rate: linear warm-up to run.lr, then half a cosine down to a tenth of it."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    return run.lr * (0.55 + 0.45 * math.cos(math.pi * progress))  # factor 1 to 0.1


# --------------------------------------------------------------------------------------------------
# Weights


@torch.no_grad()
def init_weights(model, seed):
    """Draw weights from N(0, 0.02^2); the last matrix of a residual branch gets smaller ones.

    Each tensor has its own generator, so the weights do not depend on the device or on sharding.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # gains and biases
            value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
            ends_branch = "o_proj" in name or "down_proj" in name
            std = 0.02 / math.sqrt(2 * model.config.n_layer if ends_branch else 1)
            value = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(distributed.shard_like(parameter, value))


def load_checkpoint(folder, modules=()):
    """Load and validate a checkpoint.

    modules: the settings, such as "attn", whose module is imported because the checkpoint names it,
    and not the user. It must then be a module of this repository.
    """
    config_types = {"model": GPTConfig, "run": RunConfig}
    return checkpoint.load(folder, config_types, PLUGINS, modules)


def load_model(folder, device="cpu", dtype=torch.float32, attn=None, is_trusted=False):
    """Return the GPT of a run or Hugging Face folder, ready to use, and its tokenizer.

    Adapters are merged. dtype: of matrices and activations. attn: an attention to use instead of
    the checkpoint's. is_trusted: let the checkpoint name modules from outside this repository.
    """
    # check the checkpoint before memory is allocated for it
    modules = ["adapter"] if attn else ["attn", "adapter"]
    saved = load_checkpoint(folder, [] if is_trusted else modules)
    config = GPTConfig(**saved["config"]["model"])
    config.attn = attn or config.attn
    with torch.device("meta"):
        checkpoint.check_weights(GPT(config), saved["model"])
    tokenizer = data.tokenizer_from_state(saved["tokenizer"])
    if tokenizer.n_vocab > config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has more tokens than the model's embedding")

    # merge an adapter in float32, to round to `dtype` only once
    has_adapter = bool(saved["config"]["run"].get("adapter"))
    model = empty_model(config, device, torch.float32 if has_adapter else dtype)
    checkpoint.load_weights(model, saved["model"])
    checkpoint.merge_adapters(model, saved)
    return store_matrices(model, dtype), tokenizer


def empty_model(config, device, dtype):
    """Return a GPT for inference, with matrices in `dtype`; its memory is not initialised."""
    with torch.device("meta"):
        model = GPT(config, dtype)
    return store_matrices(model, dtype).to_empty(device=device).eval()


def store_matrices(model, dtype):
    """Convert the matrices to `dtype`, compute activations in it as well, and return the model."""
    model.dtype = dtype
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)
    return model


def build_model(gpt_config, run, launch, device, saved):
    """Return the model with its weights, and the parameter groups to train."""
    with torch.device("meta"):  # no memory yet, so a sharded model never exists as a whole
        model = GPT(gpt_config, DTYPES[run.dtype])
    if launch.compile:
        model.compile()
    if launch.fsdp and run.adapter:
        raise ValueError("--fsdp would not shard what --adapter adds; leave one of them out")
    if launch.fsdp:
        distributed.shard(model, model.dtype, device)
    if saved is not None:
        checkpoint.check_weights(model, saved["model"])
    model.to_empty(device=device)

    if saved is None:
        init_weights(model, run.seed)
    else:
        checkpoint.load_weights(model, saved["model"])
    if launch.init:
        checkpoint.merge_adapters(model, saved)
    if not run.adapter:
        return model, param_groups(model, run.weight_decay)

    # train only what the adapter adds
    if saved is None:
        warnings.warn("--adapter without --init: what it adds is trained on random weights")
    torch.manual_seed(run.seed)  # adapters may draw their first weights
    adapt, options = plugins.resolve(run.adapter, *PLUGINS["adapter"])
    groups = adapt(model, **options)
    return model, [{"weight_decay": run.weight_decay, **group} for group in groups]


# --------------------------------------------------------------------------------------------------
# Training


def get_batch(text, run, block_size, step, micro_batch, device):
    """Return this rank's micro-batches [(x, y), ...], and the number of targets >= 0 of all ranks.

    The global batch is a pure function of (seed, step), and each rank takes its part. So it is the
    same on any number of ranks, and a resumed run has no position in the data to restore.
    """
    starts = data.batch_starts(run.seed, step, text.starts, run.batch_size)
    windows = data.read_sequences(text.train, starts, block_size)  # (batch_size, T + 1)
    n_counted = float((windows[:, 1:] >= 0).sum())
    x, y = data.to_device(windows[rank() :: world_size()], device)  # (batch_size / ranks, T) each
    count = torch.full((), max(1.0, n_counted), device=device)  # filled on the device: no wait
    return list(zip(x.split(micro_batch), y.split(micro_batch))), count


class Step:
    """The parts of a training step, run eagerly. support/cuda_graph.py captures them as graphs.

    net: the model, or its data-parallel wrapper. clip: largest norm of the gradient; 0: no limit.
    """

    def __init__(self, net, optimizer, clip=0.0):
        self.net = net
        self.optimizer = optimizer
        self.clip = clip or math.inf

    def forward(self, batch):
        """Run all micro-batches, except for the backward pass of the last; return the rank's loss.

        Its mean over the ranks is the mean loss over all targets.
        """
        micro_batches, count = batch
        count = count / world_size()  # gradients are averaged over ranks, but count is the total
        total_loss = 0.0
        for i, (x, y) in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with distributed.gradient_sync(self.net, is_last):
                self.loss = self.net(x, y, count)
                total_loss = total_loss + self.loss.detach()
                if not is_last:
                    self.loss.backward()
        return total_loss

    def backward(self):
        """Run the last backward pass and clip the gradients; return their norm before clipping."""
        self.loss.backward()
        self.loss = None
        grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        return distributed.full_tensor(grad_norm)

    def update(self):
        self.optimizer.step()

    def clear(self):
        self.optimizer.zero_grad()


def train_step(step, batch, signalled=0):
    """Take one optimizer step on the mean loss over the targets of all ranks.

    step: a Step. signalled: the signal received on this rank, or 0. Returns the loss, the gradient
    norm before clipping (an AsyncScalar, to be read later), and whether some rank was signalled. If
    the loss is not finite, the weights stay as they are.
    """
    total_loss = step.forward(batch)
    # start copying the loss to the host, so that it arrives while the backward pass runs
    report = AsyncScalar(distributed.mean_over_ranks(total_loss, signalled))
    grad_norm = AsyncScalar(step.backward())
    loss, signalled = report.read()
    if math.isfinite(loss):
        step.update()
    step.clear()
    return loss, grad_norm, signalled > 0


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):  # a captured step reads the rate from this tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def evaluate(net, text, run, block_size, micro_batch, device, stop=None):
    """Return the mean loss on held-out sequences, or None if a stop signal came meanwhile."""
    starts = data.eval_starts(text, run.eval_batches * run.batch_size, block_size)

    # repeat some, so that all forward passes have the same shape; repetitions do not count. With 5
    # sequences, 2 ranks and micro-batches of 2, rank 0 has 0 2 4 1; the last one is a repetition
    n_sequences = len(starts)
    per_forward = micro_batch * world_size()
    n_filled = math.ceil(n_sequences / per_forward) * per_forward
    is_counted = (np.arange(n_filled) < n_sequences)[rank() :: world_size()]
    starts = np.resize(starts, n_filled)[rank() :: world_size()]

    total_loss = torch.zeros((), device=device)
    count = 0
    for i in range(0, len(starts), micro_batch):
        if stop is not None and stop.now:
            return None
        chunk = slice(i, i + micro_batch)
        tokens = data.read_sequences(text.val, starts[chunk], block_size)  # (micro_batch, T + 1)
        tokens[~is_counted[chunk]] = -1  # no loss on targets of -1
        x, y = data.to_device(tokens, device)
        total_loss += net(x, y, 1)  # count = 1: the sum of the losses, not their mean
        count += int((tokens[:, 1:] >= 0).sum())
    total_loss, count = distributed.mean_over_ranks(total_loss, count).tolist()
    return total_loss / max(1, count)


def set_vocab_size(gpt_config, tokenizer):
    """Return the config with room for all tokens; by default a multiple of 64, which is faster."""
    vocab_size = gpt_config.vocab_size or math.ceil(tokenizer.n_vocab / 64) * 64
    if vocab_size < tokenizer.n_vocab:
        raise ValueError(f"--vocab-size is less than the tokenizer's {tokenizer.n_vocab}")
    return replace(gpt_config, vocab_size=vocab_size)


def train(gpt_config, run, launch):
    """Train. Return a dict with step, loss, val_loss, val_bpb, tokens_per_s, out and signal.

    With launch.eval_only, return val_loss and val_bpb of launch.init. Raises ValueError for bad
    input and FloatingPointError when the loss is not finite.
    """
    device, dtype, compile = distributed.prepare(launch.device, run.dtype, launch.compile)
    run = replace(run, dtype=dtype)
    launch = replace(launch, compile=compile)
    origin = run_folder.find_run(launch.resume or launch.init, resume=bool(launch.resume))
    if launch.eval_only:
        return train_in(None, gpt_config, run, launch, device, origin)

    # lock a folder named after the preset and the attention, or after the model of --init
    specs = [plugins.parse_spec(spec)[0] for spec in gpt_config.attn.split(",")]
    name = "-".join([launch.model or "gpt", *dict.fromkeys(specs)])
    if launch.init:
        name = hub.model_name(origin)
    resumed = origin if launch.resume else None
    with run_folder.claim_folder(launch.out, name, resumed) as out:
        result = train_in(out, gpt_config, run, launch, device, origin)
    distributed.barrier()  # rank 0 has saved
    return result


def train_in(out, gpt_config, run, launch, device, origin):
    """Train in the folder `out`, which `train` has locked, from the checkpoint in `origin`."""
    micro_batch = distributed.micro_batch_size(run.batch_size, run.micro_batch)

    # checkpoint to start from, tokenizer, data
    saved = None
    if origin is not None:
        saved = load_checkpoint(origin, [] if launch.resume else ["adapter"])  # --init merges it
    tokenizer = data.get_tokenizer(run.tokenizer, saved)
    T = gpt_config.block_size
    gpt_config = set_vocab_size(gpt_config, tokenizer)
    if launch.export:
        from support import huggingface

        huggingface.check_exportable(launch.export, asdict(gpt_config))
    cache_folder = run_folder.get_cache_folder(out or Path(launch.out or "out/run"))
    text = data.load_dataset(run.data, tokenizer, T, cache_folder)
    settings = {"model": asdict(gpt_config), "run": asdict(run)}
    if run.data not in ("stdlib", "python"):
        settings["run"]["data"] = os.path.abspath(run.data)  # to resume from any folder
    if launch.resume:
        checkpoint.check_unchanged(saved, [gpt_config, run], text.fingerprint, origin)

    # model and optimizer; an optimizer with clips_gradients = False gets unclipped gradients
    model, groups = build_model(gpt_config, run, launch, device, saved)
    net = distributed.data_parallel(model)
    print0(f"model    {model.summary()}, {run.optim} ({launch.model or origin})")
    if launch.eval_only:
        val_loss = evaluate(net, text, run, T, micro_batch, device)
        result = {"val_loss": val_loss, "val_bpb": val_loss * text.bits_per_byte}
        print0(f"held out {val_loss:.4f} nats/token, {result['val_bpb']:.4f} bits/byte")
        return result
    optimizer = make_optimizer(groups, run)
    clip = run.clip if getattr(optimizer, "clips_gradients", True) else 0.0
    stepper = Step(net, optimizer, clip)

    # where to start and where to stop
    step = 0
    if launch.resume:
        checkpoint.restore(model, optimizer, saved)
        step = saved["step"]
    if step >= run.steps:
        raise ValueError(f"the run in {origin} is complete ({step} steps); --init starts a new one")
    del saved
    use_graph = cuda_graph.prepare(launch.graph, device, optimizer)
    first_step = step
    last_step = min(run.steps, step + (launch.stop_after or run.steps))
    log = RunLog(out, step, settings, text, distributed.describe(device))
    print0(f"run      {out}: steps {step + 1:,} to {last_step:,} of {run.steps:,}")

    result = {}
    train_seconds = 0.0
    batch = get_batch(text, run, T, step, micro_batch, device)
    with distributed.StopSignal() as stop, distributed.ProgressBar(run.steps, step) as bar:
        while step < last_step and not stop.now:
            start_time = time.perf_counter()

            # learning rate, and a seed for plug-ins that draw random numbers
            lr = get_lr(step, run)
            set_lr(optimizer, lr)
            distributed.seed_everything(run.seed, step)

            # one step, and the next batch while the GPU works on it
            if use_graph and step == first_step + cuda_graph.WARM_UP:
                stepper = cuda_graph.capture_step(stepper, batch)
            loss, grad_norm, signalled = train_step(stepper, batch, stop.received)
            batch = get_batch(text, run, T, step + 1, micro_batch, device)
            row = {"step": step + 1, "lr": lr, "loss": loss, "grad_norm": grad_norm.read()}
            stop.agree(signalled)
            step += 1

            # progress; the first step compiles and warms up, so it is not timed
            if step > first_step + 1:
                train_seconds += time.perf_counter() - start_time
                tokens = (step - first_step - 1) * run.batch_size * T
                result["tokens_per_s"] = tokens / train_seconds
            bar.update(f"loss {loss:.3f}, {result.get('tokens_per_s', 0):,.0f} tok/s")

            # evaluate; a signal cuts it short, but not at the end, since no --resume would redo it
            is_due = step % run.eval_every == 0
            val_loss = None
            if step == run.steps:
                val_loss = evaluate(net, text, run, T, micro_batch, device)
            elif is_due and not stop.now:
                val_loss = evaluate(net, text, run, T, micro_batch, device, stop)
            if val_loss is not None:
                row.update(val_loss=val_loss, val_bpb=val_loss * text.bits_per_byte)

            # log and save before printing
            log.append(row)
            result.update(row)
            if is_due or step == last_step or stop.now:
                log.save(model, optimizer, step)
            if val_loss is not None:
                print0(f"step {step:>6,} | train {loss:.4f}, held out {val_loss:.4f} nats/token")
        if step == first_step:  # stopped before the first step
            log.save(model, optimizer, step)

        # the end: result, plot, a sample, the exported weights
        result.update(step=step, out=str(out), signal=stop.now)
        log.finish(result)
        if step == run.steps and not stop.now:
            import sample

            if launch.sample:
                sample.show_sample(model, tokenizer, launch.sample, run.seed, stop)
            if launch.export and rank() == 0:
                sample.export(launch.export, out, is_trusted=True)
        result["signal"] = stop.now  # one may have come since
    return result


def starting_values(given):
    """Return the settings of the preset or the run to start from; `given` flags override them."""
    launch = cli.make_config(LaunchConfig, given)
    origin = run_folder.find_run(launch.resume or launch.init, resume=bool(launch.resume))
    if origin is None:
        on_cpu = distributed.pick_device(launch.device).type == "cpu"
        model = launch.model or ("tiny" if on_cpu else "small")
        return {"model": model, **PRESETS[model]}
    if launch.model:
        raise ValueError(f"the model in {origin} keeps its shape; leave --model out")

    saved = load_checkpoint(origin)["config"]
    if launch.resume:
        return {**saved["model"], **saved["run"]}

    # --init: the weights fit one model and one tokenizer, so flags may not change these; but no
    # weight depends on block_size, the context
    fixed = {**saved["model"], "tokenizer": saved["run"]["tokenizer"]}
    for name, value in fixed.items():
        if name != "block_size" and given.get(name, value) != value:
            flag = cli.flag_name(name)
            raise ValueError(f"{flag} is {given[name]} here but {value} in {origin}; leave it out")

    # of the settings that a preset has, those of the run become defaults too: batch size, steps, lr
    recipe = {name: saved["run"][name] for name in PRESETS["tiny"] if name in saved["run"]}
    return {**fixed, **recipe}


def main(argv=None):
    configs = [GPTConfig, RunConfig, LaunchConfig]
    argv = sys.argv[1:] if argv is None else argv
    return train(*cli.parse_configs(argv, __doc__, configs, PLUGINS, starting_values))


if __name__ == "__main__":
    cli.run_main(main)
