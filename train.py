"""The tiny GPT and its training loop: the ground that five papers stand on.

python train.py                         on Python's own library: no data to fetch
python train.py --data my.txt           any text file or folder
python train.py --model gpt2            a preset; each of its fields is a flag too
python train.py --attn mine             your mine.py: attention(q, k, v)
python train.py --optim mine            your mine.py: optimizer(groups, lr)
python train.py --resume                the newest run, exactly from where it is
python train.py --init DIR              from the weights of a run or of a Hugging Face
                                        folder (Llama, SmolLM2, Qwen2.5, Qwen3)
python train.py --bench --model gpt2    time steps on random tokens
torchrun --nproc-per-node 8 train.py    the same run on 8 GPUs; --fsdp shards it

A run leaves out/NAME/ with ckpt.pt, config.json, log.csv and loss.png; sample.py
talks to it. Exit status: 0 done, 1 the loss was not finite, 2 bad input (one
sentence says what), 128 + signal when stopped (the run is saved first).
"""
import argparse, base64, csv, difflib, functools, hashlib, importlib, inspect, io, itertools, json, math, os, random, re, signal, sys
import shutil, statistics, sysconfig, tempfile, textwrap, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
# Logits that exist at one time, of the 3.3 G in a batch of 64 x 1024 x 50304: 2 GB of bf16 on a GPU, what caches hold on a CPU
LOSS_CHUNK = {"cuda": 2 ** 30, "mps": 2 ** 26, "cpu": 2 ** 22}
VAL_FRACTION = 0.05      # the tail of the (shuffled) documents is held out
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fail(sentence):
    """Bad input ends here: one sentence on stderr that says what is wrong and what would be right, exit status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":                     # once on each machine
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Settings. Every field of the two dataclasses is a flag, is saved with the run, and must stay the same on --resume.

def option(default, help, least=None):
    """A field with its help; `least` is the smallest value allowed, by default 0 where 0 means something, else above 0."""
    return field(default=default, metadata={"help": help, "least": least})


def check(config):
    """Raise ValueError, one sentence, for a value of the wrong type or out of range: configs also come from strangers."""
    for f in fields(config):
        value, name = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if type(value) is not f.type:
            raise ValueError(f"{name} is {value!r}, which is not of type {f.type.__name__}")
        if f.type in (int, float):
            least = f.metadata["least"] if f.metadata["least"] is not None else min(1, f.default) if f.type is int else 0
            above = f.type is float and f.metadata["least"] is None
            if not (least < value if above else least <= value) or value > 2 ** 32:
                raise ValueError(f"{name} is {value}; it must be {'above' if above else 'at least'} {least}")


@dataclass
class GPTConfig:
    """The shape of the model; 0 means: derived from the other fields."""
    vocab_size: int = option(0, "token ids the model knows; 0: the tokenizer's, rounded up to a multiple of 64")
    block_size: int = option(256, "context in tokens")
    n_layer: int = option(4, "decoder layers")
    n_head: int = option(4, "query heads")
    n_kv_head: int = option(0, "key/value heads, a divisor of n-head (grouped-query attention); 0: n-head")
    n_embd: int = option(128, "width of the residual stream")
    head_dim: int = option(0, "width of one head; 0: n-embd / n-head")
    n_hidden: int = option(0, "width inside the SwiGLU; 0: 8/3 n-embd, rounded up to a multiple of 64")
    qkv_bias: bool = option(False, "add a bias to queries, keys and values, as Qwen2.5 does")
    qk_norm: bool = option(False, "RMS-normalise each query and key head, as Qwen3 does")
    tied: bool = option(True, "the output layer is the embedding, transposed")
    rope_theta: float = option(10000.0, "base of the rotary wavelengths")
    norm_eps: float = option(1e-5, "added to the mean square in RMSNorm")
    attn: str = option("softmax", "softmax, or a module with a function attention(q, k, v): laser, simplicial, mine")
    attn_args: dict = field(default_factory=dict)                    # that function's keyword options, each a flag
    simplicial_every: int = option(1, "every n-th layer takes --attn (simplicial's paper: 4), the others softmax")

    def __post_init__(self):
        check(self)
        if max(self.n_layer, self.n_head) > 1024 or max(self.n_embd, self.n_hidden, self.head_dim, self.vocab_size) > 2 ** 24:
            raise ValueError("the model would have over 1024 layers or heads, or over 2**24 channels")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"--n-embd {self.n_embd} is no multiple of --n-head {self.n_head}; change one or give --head-dim")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_hidden = self.n_hidden or -(-8 * self.n_embd // (3 * 64)) * 64
        if self.n_head % self.n_kv_head:
            raise ValueError(f"--n-kv-head {self.n_kv_head} does not divide --n-head {self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"--head-dim {self.head_dim} is odd, but rotary positions turn pairs of channels")


@dataclass
class RunConfig:
    """What decides the numbers of a run, beside the shape of the model."""
    data: str = option("stdlib", "stdlib, python (all Python source on this machine), a text file or a folder of them, or a .jsonl "
                       "of {prompt, answer}: each sequence begins with a prompt, and only answers count in the loss")
    tokenizer: str = option("byte", "byte, a tiktoken encoding (gpt2, cl100k_base, ...) or the path of a .tiktoken file")
    optim: str = option("adamw", "adamw, or a module with a function optimizer(groups, lr): sonew, lora_rite, mine")
    optim_args: dict = field(default_factory=dict)                   # that function's keyword options, each a flag
    steps: int = option(1000, "optimizer steps of the whole run")
    batch_size: int = option(16, "sequences per step, over all processes and micro-batches")
    lr: float = option(1e-3, "peak learning rate: linear warm-up, then a cosine down to a tenth")
    warmup: int = option(0, "warm-up steps; 0: a twentieth of --steps")
    weight_decay: float = option(0.1, "decay of the matrices; gains are never decayed", least=0)
    clip: float = option(1.0, "largest norm of the whole gradient; 0 or adapters: never clip", least=0)
    seed: int = option(1337, "draws the weights and, with the step, each batch", least=0)
    eval_every: int = option(0, "steps between evaluations, each with a checkpoint; 0: a tenth of --steps")
    eval_batches: int = option(20, "held-out batches per evaluation, evenly spread, always the same ones")
    dtype: str = option("", "fp32 or bf16 activations, weights stay fp32 (default: bf16 on a GPU that has it)")
    lora_rank: int = option(0, "train adapters of this rank beside the frozen weights (lora_rite.py); 0: train the weights")
    lora_alpha: float = option(0.0, "an adapter counts alpha / rank times; 0: once", least=0)
    lora_targets: str = option("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "the layers that get adapters, by the end of their names")
    micro_batch: int = option(0, "sequences per process in one forward, the rest by accumulation; 0: all at once")

    def __post_init__(self):
        check(self)
        if self.dtype not in ("", *DTYPES):
            raise ValueError(f"--dtype {self.dtype} is unknown; give fp32 or bf16 (fp16 would need loss scaling)")
        self.warmup = self.warmup or max(1, self.steps // 20)
        self.lora_alpha = self.lora_alpha or float(self.lora_rank)
        self.eval_every = self.eval_every or max(1, self.steps // 10)


# A model and a recipe that suits it. `tiny` is the default on a CPU, `small` on a GPU.
PRESETS = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=12, steps=1500, lr=3e-3),
    "small": dict(n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=64, steps=1000, lr=1e-3),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=64, steps=5000, lr=6e-4),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024, batch_size=64, steps=10000, lr=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024, batch_size=64, steps=20000, lr=2.5e-4),
    # two shapes of others, to time
    "smollm2-135m": dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_hidden=1536, vocab_size=49152, rope_theta=1e5,
                         block_size=2048, batch_size=64, steps=10000, lr=6e-4),
    "qwen3-4b": dict(n_layer=36, n_head=32, n_kv_head=8, head_dim=128, n_embd=2560, n_hidden=9728, vocab_size=151936, qk_norm=True,
                     rope_theta=1e6, norm_eps=1e-6, block_size=4096, batch_size=64, steps=10000, lr=2e-4),
}
# The recipe for the weights of others: a pretrained model wants small steps
FINETUNE = dict(block_size=1024, batch_size=16, steps=200, lr=2e-5)
MAY_CHANGE = {"eval_every", "eval_batches", "dtype", "micro_batch"}      # on --resume: these touch reports or rounding only


def plug(name, what, trusted=True, options=()):
    """--attn laser -> laser.attention, which must know the `options` that a saved run gives it. Names read from a checkpoint
    are not trusted: they must be files beside this one."""
    function = BUILTIN[what].get(name) or find_function(name, what, trusted)
    strange = set(options) - set(signature(function)[1])
    if strange:
        fail(f"the checkpoint gives the {what} {name} the option {', '.join(sorted(strange))}, which it does not have")
    return function


def find_function(name, what, trusted):
    beside = [p.stem for p in HERE.glob("*.py")]
    near = difflib.get_close_matches(name, [*BUILTIN[what], *beside], 1)
    if not trusted and name not in beside:
        fail(f"the checkpoint asks for a module {name!r} that is not beside train.py; name it with a flag to allow it")
    try:
        if re.fullmatch(r"[A-Za-z_]\w*", name):
            return getattr(importlib.import_module(name), what)
    except (ModuleNotFoundError, AttributeError) as e:
        if e.name not in (name, what):                               # an import that failed inside the reader's own module
            raise
    fail(f"there is no {what} {name!r}, neither built in ({', '.join(BUILTIN[what])}) nor a module {name}.py "
         f"with a function {what}" + (f"; did you mean {near[0]}?" if near and near[0] != name else ""))


def signature(function):
    """-> (names of the positional parameters without default, {option: default}) of an attention or an optimizer."""
    plain = [p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    listed = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in plain}
    return [n for n, d in listed.items() if d is inspect._empty], {n: d for n, d in listed.items() if d is not inspect._empty}


class Parser(argparse.ArgumentParser):
    def __init__(self, description="", **more):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        width, wrapped = shutil.get_terminal_size().columns, []
        for block in description.split("\n\n"):                      # prose is filled anew; commands and equations keep their lines
            lines = block.splitlines() if re.search("(?m)^(  |python )", block) else [" ".join(block.split())]
            wrapped.append("\n".join(textwrap.fill(line, width, subsequent_indent=" " * 8 if line[:1] == " " else "", break_long_words=False)
                                     for line in lines))
        self.description = "\n\n".join(wrapped)

    def error(self, message):
        fail(f"{message} (--help lists every flag)")


def add_flag(group, name, default, help):
    """A flag for a field or option. What is not given stays None, for the saved run, the preset or the default to fill."""
    more = {"metavar": type(default).__name__.upper(), "type": type(default)}
    if isinstance(default, bool):
        more = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, list):
        more = {"metavar": "X", "type": type(default[0]), "nargs": len(default)}
    try:
        group.add_argument("--" + name.replace("_", "-"), dest=name, default=None, help=help.replace("%", "%%"), **more)
    except argparse.ArgumentError:
        fail(f"the option {name!r} bears the name of one of train.py's own flags; rename it")


def parse(argv):
    """-> (flags of this call, GPTConfig, RunConfig, the checkpoint to start from or None). What a flag says beats the saved
    run, which beats the preset, which beats the field's default."""
    early = Parser(add_help=False)
    for flag in ("--attn", "--optim", "--init", "--out"):
        early.add_argument(flag)
    early.add_argument("--resume", nargs="?", const="")
    early = early.parse_known_args(argv)[0]
    if early.resume is not None and early.init:
        fail("--resume goes on with a run and --init starts a new one; give one of them")
    if early.resume and early.out:
        fail("--resume DIR writes where the run is; leave --out out")
    resuming = early.resume is not None
    origin = find_run(early.init or early.resume or early.out, resuming) if early.init or resuming else None
    saved = load_checkpoint(origin, merged=not resuming) if origin else None
    model, run = (saved["config"][k] if saved else {} for k in ("model", "run"))
    may_change = MAY_CHANGE | ({"block_size"} if early.init else set())
    if early.init:                                                   # the model and its tokenizer stay, the recipe is new
        model, run = {**model, "block_size": run.get("block_size", model["block_size"])}, {"tokenizer": run["tokenizer"]}

    parser = Parser(description=__doc__)
    call = parser.add_argument_group("this call (free to differ on --resume)")
    call.add_argument("--model", choices=PRESETS, metavar="NAME", help=f"a model with a recipe, of {', '.join(PRESETS)} (default: tiny on a CPU, small on a GPU)")
    call.add_argument("--out", metavar="DIR", help="where the run writes (default: a new folder out/MODEL-ATTN)")
    call.add_argument("--resume", nargs="?", const="", metavar="DIR", help="go on with a run (default: --out, or the newest)")
    call.add_argument("--init", metavar="DIR", help="start a new run from the weights of the run or Hugging Face folder in DIR")
    call.add_argument("--export", metavar="DIR", help="at the end, write the weights as a Hugging Face folder, too")
    call.add_argument("--stop-after", type=int, metavar="N", help="end this call after N steps, as an interruption would")
    call.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    call.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    call.add_argument("--fsdp", action="store_true", help="shard weights, gradients and optimizer state over the processes")
    call.add_argument("--sample", type=int, default=200, metavar="N", help="tokens to show at the end (default: 200)")
    call.add_argument("--bench", action="store_true", help="time 20 steps on random tokens; writes bench.json to --out, if given")
    plugs = {}
    for kind, key, what, old in ((GPTConfig, "attn", "attention", model), (RunConfig, "optim", "optimizer", run)):
        group = parser.add_argument_group({"attn": "the model", "optim": "the run"}[key])
        for f in fields(kind):
            if f.type is not dict:
                recipe = "the preset's" if f.name in PRESETS["tiny"] else f.default
                add_flag(group, f.name, f.default, f.metadata["help"] + (f" (default: {recipe})" if f.default else ""))
        given = getattr(early, key)
        chosen = given or old.get(key, getattr(kind, key))
        plugs[key] = plug(chosen, what, given is not None, old.get(f"{key}_args", {}))
        options = {k: v for k, v in signature(plugs[key])[1].items() if isinstance(v, (bool, int, float, str, list))}
        group = parser.add_argument_group(f"options of the {what} {chosen}") if options else None
        for name, default in options.items():
            add_flag(group, name, default, f"(default: {default})")
    args = parser.parse_args(argv)
    if args.stop_after is not None and args.stop_after < 1:
        fail(f"--stop-after is {args.stop_after}; it must be at least 1")
    if args.model and saved:
        fail(f"--model {args.model} describes a new model; the one in {origin} keeps its shape, so leave it out")
    args.device_why, model_why = ("as asked" if given else default for given, default in
                                  ((args.device, "the best there is here"), (args.model, "the default on this device")))
    args.device = pick_device(args.device)
    args.model = args.model or ("tiny" if args.device.type == "cpu" else "small")
    args.title = f"{origin}, as saved" if saved else f"{args.model}, {model_why}"

    def settle(kind, key, old):
        given = {k: v for k, v in vars(args).items() if v is not None}
        options, kept = signature(plugs[key])[1], old.get(f"{key}_args", {})
        for k, new in given.items():
            before = {**old, **kept}.get(k, new)
            if before != new and new == new and k not in may_change: # NaN is refused below
                fail(f"--{k.replace('_', '-')} is {new} here but {before} in {origin}; leave it out, or start a new run")
        recipe = {k: saved["config"]["run"].get(k, v) if saved else v for k, v in PRESETS[args.model].items()}
        values = {**recipe, **old, **given, f"{key}_args": {k: given.get(k, kept.get(k, v)) for k, v in options.items()}}
        try:
            return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
        except ValueError as e:
            fail(str(e))
    return args, settle(GPTConfig, "attn", model), settle(RunConfig, "optim", run), saved


def pick_device(name):
    """--device -> torch.device, tried once; under torchrun each process takes the GPU of its local rank."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        fail(f"there is no device {name!r}; give cpu, cuda, cuda:1 or mps, or leave --device out")
    try:
        device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        fail(f"the device {name!r} is not to be had here ({str(e).splitlines()[0]}); leave --device out to take what there is")


def pick_dtype(device, name):
    """--dtype -> fp32 or bf16, and why."""
    if name:
        return name, "as asked"
    can = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return ("bf16", "this GPU has it") if can else ("fp32", "bf16 is for GPUs that have it")


# ---------------------------------------------------------------------------------------------------------------------
# The model: RMSNorm, rotary positions, SwiGLU, grouped-query attention; parts named as in Llama, SmolLM2 and Qwen3

class Linear(nn.Linear):
    """The weights stay float32 for the optimizer; the product is taken in the dtype of the activations."""
    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)


def rotary(start, T, head_dim, theta, device):
    """-> cos, sin, (T, 1, head_dim / 2) each, of the angles t / theta^(2 i / head_dim), for t = start ... start + T - 1"""
    rate = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(start + torch.arange(T, device=device, dtype=torch.float32), rate)[:, None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):                                             # x (B, T, H, D): channels i and i + D/2 are a pair
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def softmax_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v, causal; the Tq queries are the last of the Tk positions.
    q (B, H, Tq, D), k and v (B, Hkv, Tk, D) -> (B, H, Tq, D)"""
    Tq, Tk = q.shape[2], k.shape[2]
    mask = None                                                      # is_causal aligns to the upper left: for Tq == Tk alone
    if 1 < Tq < Tk:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < Tq == Tk, enable_gqa=q.shape[1] != k.shape[1])


class Cache:
    """One layer's keys, values and whatever else its attention takes, for the positions seen so far; allocated once. Of what is
    only seen through a window of w positions the last w are kept, position t at t % w."""
    def __init__(self, size):
        self.size, self.length, self.kept = size, 0, None

    def extend(self, windows, *new):                                 # each (B, Hkv, T, D) -> each (B, Hkv, at most length, D)
        sizes = [min(w or self.size, self.size) for w in windows]
        self.kept = self.kept or [t.new_empty(*t.shape[:2], w, t.shape[3]) for t, w in zip(new, sizes)]
        start, T, seen = self.length, new[0].shape[2], []
        self.length += T
        for old, t, w in zip(self.kept, new, sizes):
            if T == 1:                                               # one query sees all that is kept, so the order is free
                old[:, :, start % w] = t[:, :, 0]
                seen.append(old[:, :, :min(self.length, w)])
                continue
            before, after = (torch.arange(max(0, end - w), end, device=t.device) % w for end in (start, self.length))
            seen.append(torch.cat([old[:, :, before], t], 2))        # in order
            old[:, :, after] = seen[-1][:, :, -len(after):]
        return seen

    def attend(self, attention, windows, q, *new):                   # q (B, H, T, D) -> (B, H, T, D)
        return attention(q, *self.extend(windows, *new))


class FixedCache:
    """A Cache for softmax attention whose tensors keep size and place and whose length is on the device, so that one token more
    is the same work wherever it stands, to be recorded once and replayed. `length`, a tensor (1), is for the caller to advance."""
    def __init__(self, size, length):
        self.size, self.length, self.kept = size, length, None

    def attend(self, attention, windows, q, k, v):
        """A prompt, from the start of the text, goes through `attention`; a single token looks at all that has been kept."""
        if self.kept is None:
            self.kept = [t.new_zeros(*t.shape[:2], self.size, t.shape[3]) for t in (k, v)]
        for old, t in zip(self.kept, (k, v)):
            old.index_copy_(2, self.length + torch.arange(q.shape[2], device=q.device), t)
        if q.shape[2] > 1:
            return attention(q, k, v)
        k, v = self.kept                                                                     # (B, Hkv, size, D)
        scores = q.squeeze(2).unflatten(1, (k.shape[1], -1)) @ k.transpose(2, 3) * q.shape[3] ** -0.5   # (B, Hkv, H / Hkv, size)
        unseen = torch.arange(self.size, device=q.device) > self.length
        p = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(unseen, -torch.inf).softmax(-1).to(q.dtype)
        return (p @ v).flatten(1, 2).unsqueeze(2)                                            # (B, H, 1, D)


class Attention(nn.Module):
    """Projections around a plain function, one for each positional parameter: q k v, or q k v k2 v2 for simplicial."""
    def __init__(self, cfg, attention):
        super().__init__()
        self.names, options = signature(attention)
        options, self.head_dim = {k: cfg.attn_args.get(k, default) for k, default in options.items()}, cfg.head_dim
        self.attention, windows = partial(attention, **options), getattr(attention, "windows", {})
        for name in windows.values():
            if type(options[name]) is not int or options[name] < 1:
                fail(f"--{name.replace('_', '-')} is {options[name]!r}; a window holds at least 1 position, the query's own")
        self.windows = [options.get(windows.get(name)) for name in self.names[1:]]           # None: all positions are kept
        self.rotary = getattr(attention, "rotary", ("q", "k"))
        self.logits = getattr(attention, "logits", lambda T, **_: T / 2)(cfg.block_size, **options)            # of a query, mean
        for name in self.names:
            heads = cfg.n_head if name == "q" else cfg.n_kv_head
            self.add_module(f"{name}_proj", Linear(cfg.n_embd, heads * cfg.head_dim, cfg.qkv_bias))
        self.o_proj = Linear(cfg.n_head * cfg.head_dim, cfg.n_embd)
        self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x, cos, sin, cache=None):
        q, k, *more = (getattr(self, f"{n}_proj")(x).unflatten(-1, (-1, self.head_dim)) for n in self.names)   # (B, T, H, D)
        heads = zip(self.names, (self.q_norm(q), self.k_norm(k), *more))
        heads = [rotate(t, cos, sin) if name in self.rotary else t for name, t in heads]
        q, *kv = (t.transpose(1, 2) for t in heads)                                          # (B, H, T, D), (B, Hkv, T, D)
        y = cache.attend(self.attention, self.windows, q, *kv) if cache else self.attention(q, *kv)          # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))                                     # (B, T, C)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj, self.up_proj = (Linear(cfg.n_embd, cfg.n_hidden) for _ in range(2))
        self.down_proj = Linear(cfg.n_hidden, cfg.n_embd)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg, attention):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(cfg.n_embd, cfg.norm_eps) for _ in range(2))
        self.self_attn, self.mlp = Attention(cfg, attention), MLP(cfg)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, cfg, attention=None, dtype=torch.float32):
        """attention: the function that cfg.attn names, looked up here if not given. dtype: of the activations."""
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        attention = attention or plug(cfg.attn, "attention")
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Layer(cfg, softmax_attention if n % cfg.simplicial_every else attention)
                                    for n in range(1, cfg.n_layer + 1))
        self.norm = RMSNorm(cfg.n_embd, cfg.norm_eps)
        self.lm_head = None if cfg.tied else Linear(cfg.n_embd, cfg.vocab_size)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids -> the mean loss in nats against targets (B, T), of which those < 0 do not count; without
        targets the logits (B, T, V), at least float32. With a cache (one Cache a layer) idx continues it, and the logits are
        (B, 1, V), those of the last position."""
        cos, sin = rotary(cache[0].length if cache else 0, idx.shape[1], self.cfg.head_dim, self.cfg.rope_theta, idx.device)
        x = self.embed_tokens(idx).to(self.dtype)                                            # (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[i] if cache else None)
        x = self.norm(x[:, -1:] if cache else x)
        weight = (self.lm_head or self.embed_tokens).weight                                  # (V, C)
        if targets is None:
            return F.linear(x, weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), torch.is_grad_enabled())

    def compile(self):
        """torch.compile in pieces, in place: one graph serves all layers, so it takes seconds, and the rotary angles and the
        residual stream are made once. Compiled whole, kernel after kernel made them anew: 153 ms a step, now 117 (gpt2, H200)."""
        for part in (*self.layers, self.norm):
            part.compile()


def cross_entropy(logits, target, scale, with_grad):
    """logits (R, V), target (R, 1), scale (R, 1) -> sum of scale * cross-entropy; its gradient scale * (softmax - onehot)."""
    z = logits.to(scale.dtype)                                                               # (R, V), at least float32
    lse = z.logsumexp(-1, keepdim=True)                                                      # (R, 1)
    loss = ((lse - z.gather(1, target.clamp(min=0))) * scale).sum()
    if not with_grad:
        return loss, None
    onehot = torch.arange(z.shape[1], device=z.device) == target                             # (R, V)
    return loss, (((z - lse).exp() - onehot.to(z.dtype)) * scale).to(logits.dtype)


@functools.cache
def cross_entropy_kernel():
    """`cross_entropy` in Triton, or None where there is no Triton."""
    try:
        from kernels import train as kernel
        return kernel.cross_entropy
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        print("there is no Triton here, so the loss takes PyTorch's slower way (pip install triton)", file=sys.stderr)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softmax(x W^T) against targets: x (N, C), W (V, C), targets (N) -> scalar. The logits and their
    gradient exist for a power-of-two number of rows at a time, never as a whole: what is kept are the products with W and x."""
    @staticmethod
    def forward(ctx, x, weight, targets, with_grad):
        part = x.is_cuda and cross_entropy_kernel() or cross_entropy
        w, kept = weight.to(x.dtype), targets >= 0
        scale = kept / kept.sum().clamp(min=1).to(torch.promote_types(x.dtype, torch.float32))                # (N)
        dx, dw = (torch.zeros_like(t) if with_grad and need else None for t, need in zip((x, weight), ctx.needs_input_grad))
        rows, loss = 2 ** (max(1, LOSS_CHUNK[x.device.type] // len(w)).bit_length() - 1), 0.0
        for i in range(0, len(x), rows):
            piece = slice(i, i + rows)
            value, dlogits = part(x[piece] @ w.T, targets[piece, None], scale[piece, None], with_grad)        # (), (R, V)
            loss = loss + value
            if dx is not None:
                dx[piece] = dlogits @ w
            if dw is not None:
                dw += dlogits.T @ x[piece]
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        return *(None if t is None else t * dloss.to(t.dtype) for t in (dx, dw)), None, None


def adamw(groups, lr, *, beta1=0.9, beta2=0.95, eps=1e-8):
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


BUILTIN = {"attention": {"softmax": softmax_attention}, "optimizer": {"adamw": adamw}}


def fresh(cfg, seed):
    """-> source(name, shape): normal weights of deviation 0.02, smaller by sqrt(2 n_layer) where a residual branch ends. Each
    tensor has a generator of its own, so that the weights depend neither on the device nor on how they are sharded."""
    def source(name, shape):
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        std = 0.02 / math.sqrt(2 * cfg.n_layer if re.search("(o|down)_proj", name) else 1)
        return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))) * std
    return source


@torch.no_grad()
def fill(model, source):
    """Give every parameter the tensor source(name, shape), one at a time; a sharded parameter keeps its own part."""
    for name, p in model.named_parameters():
        p.copy_(shard_like(p, source(name, p.shape)))


def shard_like(p, tensor):
    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


@functools.cache
def decode_kernels():
    """kernels/decode.py, or None where there is no Triton."""
    try:
        from kernels import decode
        return decode
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        print("there is no Triton here, so a token takes PyTorch's slower way (pip install triton)", file=sys.stderr)


def kernels_for(model):
    """-> the kernels for a step of this softmax GPT, or None: they need a GPU, matrices in the dtype of the activations and heads of
    one of their widths. Who has compiled the model wants it to run so."""
    weight, compiled = model.embed_tokens.weight, model.norm._compiled_call_impl
    kernels = weight.is_cuda and weight.dtype == model.dtype and not compiled and decode_kernels()
    return kernels if kernels and model.cfg.head_dim in kernels.WIDTHS else None


class Recorded:
    """A softmax GPT that writes on from a FixedCache: a prompt is read as it comes, each later token is a replay of a CUDA graph of
    one step, which costs one launch instead of hundreds. The step takes the token before and its position from the device and leaves
    the next ones there, so that a step can begin before the host knows the token. Elsewhere the same step runs unrecorded.
    pick: logits (V) -> the token; generator: what it draws from, if it does."""
    def __init__(self, model, size, pick=torch.argmax, generator=None):
        self.model, self.pick, self.generator, device = model, pick, generator, model.embed_tokens.weight.device
        self.length = torch.zeros(1, dtype=torch.int64, device=device)                       # the position of `token`
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.cache = [FixedCache(size, self.length) for _ in model.layers]
        self.graph = self.coming = None
        self.kernels, self.angles = kernels_for(model), rotary(0, size, model.cfg.head_dim, model.cfg.rope_theta, device)

    def read(self, ids):
        """-> the token after a prompt"""
        self.length.zero_()
        with torch.compiler.set_stance("force_eager"):               # each length of a prompt would be compiled anew
            logits = self.model(torch.tensor([ids], device=self.token.device), cache=self.cache)
        self.token.fill_(self.pick(logits[0, -1]))
        self.length.fill_(len(ids))
        return int(self.token)

    def logits(self):
        """-> (V) float32, those after `token`"""
        if not self.kernels:
            return self.model(self.token, cache=self.cache)[0, -1]
        model, eps = self.model, self.model.cfg.norm_eps
        x = model.embed_tokens.weight.index_select(0, self.token[0])[0]                      # (C)
        for layer, cache in zip(model.layers, self.cache):
            a, m = layer.self_attn, layer.mlp
            projections, gains = (a.q_proj, a.k_proj, a.v_proj), (a.q_norm.weight, a.k_norm.weight) if model.cfg.qk_norm else None
            heads = self.kernels.project(x, layer.input_layernorm.weight, eps, [p.weight for p in projections],
                                         [p.bias for p in projections] if model.cfg.qkv_bias else None)
            y = self.kernels.attend(heads, gains, eps, self.angles, self.length, *(t[0] for t in cache.kept))
            self.kernels.add(x, y, a.o_proj.weight)
            hidden = self.kernels.swiglu(x, layer.post_attention_layernorm.weight, eps, m.gate_proj.weight, m.up_proj.weight)
            self.kernels.add(x, hidden, m.down_proj.weight)
        return self.kernels.project(x, model.norm.weight, eps, [(model.lm_head or model.embed_tokens).weight])

    def step(self):
        self.token.copy_(self.pick(self.logits()))
        self.length += 1

    def record(self):
        token, at, state = self.token.clone(), self.length.clone(), self.generator and self.generator.get_state()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):                               # what is compiled or tuned must be so before the recording
            for _ in range(3):
                self.step()
                self.token.copy_(token)
                self.length.copy_(at)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        if self.generator:
            self.generator.set_state(state)
            self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph):
            self.step()

    def launch(self):
        """Begin a step; -> its token, on the way."""
        if not self.token.is_cuda:
            self.step()
        else:
            if not self.graph:
                self.record()
            self.graph.replay()
        return OnTheWay(self.token)

    def next(self, ahead=False):
        """-> the token after the last one. ahead: the one after it is wanted, too, and there is room: begin it now, so that the GPU
        does not wait for the host."""
        coming = self.coming or self.launch()
        self.coming = self.launch() if ahead and self.token.is_cuda else None
        return coming.read()[0][0]


@torch.no_grad()
def generate(model, ids, n, temperature=1.0, top_k=0, top_p=1.0, seed=0, limit=None, cached=True, recorded=False):
    """Yield n token ids that continue ids. temperature 0 takes the likeliest; top_k keeps the k likeliest (0: all); top_p keeps
    the fewest that hold that much probability; ids from `limit` on are padding of the vocabulary. When the context is full, its
    older half is dropped and the rest read again, so that cached=False (no cache, slow) gives the same tokens. recorded=True, for
    softmax attention, replays a step (see Recorded)."""
    device, size = model.embed_tokens.weight.device, model.cfg.block_size
    generator = torch.Generator(device).manual_seed(seed)
    window, cache, start = list(ids)[-size:], None, 0
    room = min(size, len(window) + n - 1)                            # a context of 40960 need not be allocated for an answer

    def pick(logits):                                                # (V) -> the token; never waits for a device, to be recorded
        logits = logits[:limit]
        if temperature == 0:
            return logits.argmax()
        logits = logits / temperature
        if 0 < top_k < len(logits):
            logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
        if top_p < 1:
            p, order = logits.softmax(-1).sort(descending=True)
            improbable = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, p.cumsum(-1) - p >= top_p)
            logits = logits.masked_fill(improbable, -torch.inf)                              # the first always stays
        p = logits.softmax(-1)
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax()          # drawn as torch.multinomial does it

    record = Recorded(model, room, pick, None if temperature == 0 else generator) if recorded else None
    for left in reversed(range(n)):
        if len(window) > size:
            window, cache, start = window[-max(1, size // 2):], None, 0
        if not recorded:
            cache = cache or ([Cache(room) for _ in model.layers] if cached else None)
            token = int(pick(model(torch.tensor([window[start:]], device=device), cache=cache)[0, -1]))
        else:
            token = record.next(ahead=left and len(window) < size) if start else record.read(window)
        start = len(window) if recorded or cached else 0
        window.append(token)
        yield token


# ---------------------------------------------------------------------------------------------------------------------
# Data: documents -> one file of tokens, mapped into memory

class ByteTokenizer:
    """tiktoken.Encoding's methods over plain bytes; 0, which no text file contains, ends a document."""
    name, n_vocab, eot_token = "byte", 256, 0

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode_bytes(self, ids):
        return bytes(ids)


def get_tokenizer(name):
    """--tokenizer -> an object with encode_ordinary, decode_bytes, n_vocab and eot_token."""
    if name == "byte":
        return ByteTokenizer()
    import requests, tiktoken
    from tiktoken_ext import openai_public as public
    from unittest import mock
    known = {"gpt2": "r50k_base"}.get(name, name)                    # the same vocabulary; gpt2's own files are not .tiktoken
    if known in tiktoken.list_encoding_names():
        try:
            with mock.patch("requests.get", partial(requests.get, timeout=5)):               # tiktoken itself waits for ever
                return tiktoken.get_encoding(known)
        except (requests.RequestException, OSError) as e:
            url = getattr(getattr(e, "request", None), "url", f"{known}.tiktoken")
            fail(f"the tokenizer {name} is not cached here and cannot be fetched now; get {url} where there is a network "
                 f"and give the file's path as --tokenizer")
    if not Path(name).is_file():
        fail(f"there is no tokenizer {name!r}; give byte, the path of a .tiktoken file, or one of "
             f"{', '.join(tiktoken.list_encoding_names())}")
    try:
        raw = Path(name).read_bytes()
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, raw.splitlines())}
    except ValueError:
        ranks = {}
    if not all(bytes([b]) in ranks for b in range(256)):
        fail(f"{name} is not a .tiktoken file: each line must be a token in base64 and its rank, every single byte among them")

    def offered(url, expected_hash):                                 # stands in for the download of a vocabulary
        if expected_hash != hashlib.sha256(raw).hexdigest():
            raise LookupError
        return ranks
    # The file does not say how text is split into words: a published one is known by its hash, any other is taken as GPT-2's.
    with mock.patch.object(public, "load_tiktoken_bpe", offered):
        for make in (make for known, make in public.ENCODING_CONSTRUCTORS.items() if known != "gpt2"):
            try:
                return tiktoken.Encoding(**make())
            except LookupError:
                pass
    return tiktoken.Encoding(Path(name).stem, pat_str=public.r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": max(ranks.values()) + 1})


def tokenizer_dict(tokenizer):
    """What a checkpoint keeps of a tokenizer, so that sampling needs no other file: strings and numbers."""
    if hasattr(tokenizer, "saved"):                                  # a Hugging Face folder's
        return tokenizer.saved
    if tokenizer.name == "byte":
        return {"name": "byte"}
    ranks = {base64.b64encode(token).decode(): rank for token, rank in tokenizer._mergeable_ranks.items()}
    return {"name": tokenizer.name, "pat_str": tokenizer._pat_str, "special_tokens": tokenizer._special_tokens, "ranks": ranks}


def tokenizer_from(saved):
    if saved["name"] == "byte":
        return ByteTokenizer()
    if "files" in saved:
        import pretrained
        return pretrained.Encoding(saved)
    import tiktoken
    ranks = {base64.b64decode(token): rank for token, rank in saved["ranks"].items()}
    return tiktoken.Encoding(saved["name"], pat_str=saved["pat_str"], mergeable_ranks=ranks,
                             special_tokens=saved["special_tokens"])


def find_documents(data):
    """--data -> the files it names, sorted."""
    if data == "stdlib":                                             # without its tests: over half of it, and not everywhere
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        return [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    if data == "python":
        roots = {Path(p).resolve() for p in [*sys.path, sys.prefix, sys.base_prefix] if p} - {HERE, Path.cwd()}
        roots |= {p for base in ("/usr/lib", "/usr/local/lib", "/opt") for p in Path(base).glob("python*")}
        return sorted({p for root in roots for p in root.rglob("*.py") if p.is_file()})
    path = Path(data)
    if not path.exists():
        fail(f"there is no data {data!r}; give stdlib, python, a text file or a folder")
    hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
    return [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file() and not hidden(p)]


def read_text(path):
    """A file as text; "" if it is not UTF-8 or has a NUL inside."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""
    except OSError as e:
        fail(f"cannot read {path} ({e.strerror})")
    return "" if "\0" in text else text


def read_answers(path, tokenizer):
    """A .jsonl of {"prompt": text, "answer": text} -> an array of ids for each line; those of the prompt are kept as ~id, below 0."""
    documents = []
    for n, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
            texts = row["prompt"], row["answer"]
            if not all(isinstance(t, str) and t for t in texts):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            fail(f"{path}, line {n}: what is needed is a JSON object with two texts, \"prompt\" and \"answer\"")
        prompt, answer = (np.asarray(tokenizer.encode_ordinary(t), np.int32) for t in texts)
        documents.append(np.concatenate([~prompt, answer]))
    return documents


def load_tokens(data, tokenizer, folder):
    """-> all tokens, a memory map. Documents are shuffled once and for all, so that the tail is a fair sample, each is followed
    by the end-of-text token, and equal ones count once. Of a .jsonl, tokens that are no part of an answer are ~id. The file is kept in
    `folder` and made anew when a source changes."""
    paths, answers = find_documents(data), data.endswith(".jsonl")
    dtype = np.dtype(np.int32 if answers else np.uint8 if tokenizer.n_vocab <= 2 ** 8 else np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32)
    stamp = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    key = hashlib.sha256(json.dumps([stamp, tokenizer_dict(tokenizer), answers]).encode()).hexdigest()[:16]
    cache = folder / f"{key}.{dtype.name}"
    if os.environ.get("LOCAL_RANK", "0") == "0" and not cache.exists():                      # machines may not share a disk
        with ThreadPoolExecutor() as pool:
            encode = lambda path: np.asarray(tokenizer.encode_ordinary(read_text(path)), dtype)
            tokens = read_answers(paths[0], tokenizer) if answers else \
                list(tqdm(pool.map(encode, paths), f"reading {data}", len(paths), unit="file", leave=False, delay=1))
        documents = list({t.tobytes(): t for t in tokens if len(t)})
        if not documents:
            path = Path(data)
            why = "holds no text files" if not path.is_file() else "is not a text file" if path.stat().st_size else "is empty"
            fail(f"{data} {why}; what is needed is UTF-8 without NUL bytes")
        if len(documents) < len(paths) and not answers:
            print(f"skipped  {len(paths) - len(documents)} of {len(paths)} files: empty, not text, or copies of another")
        random.Random(0).shuffle(documents)
        start = np.array(getattr(tokenizer, "start", []), np.int64)
        start, end = ((~start if answers else start).astype(dtype).tobytes(), np.array([tokenizer.eot_token], dtype).tobytes())
        with atomic(cache) as f:
            for document in documents:
                f.write(start + document + end)
    barrier()
    return np.memmap(cache, dtype, "r")


def split(tokens, block_size, data):
    """-> training tokens, held-out tokens; each holds at least one window of block_size + 1."""
    if len(tokens) < 2 * (block_size + 1):
        fail(f"{data} has {len(tokens)} tokens, but --block-size {block_size} needs {2 * (block_size + 1)}, one window to train "
             f"on and one to test; give more text or a smaller --block-size")
    held_out = max(int(VAL_FRACTION * len(tokens)), block_size + 1)
    return tokens[:-held_out], tokens[-held_out:]


def starts_of(tokens, T, tokenizer, data):
    """Where a window of T + 1 tokens may begin -> their number, or, for answers, the array of where a prompt does."""
    if not (tokens < 0).any():
        return len(tokens) - T
    begins = np.concatenate([[0], np.flatnonzero(tokens == tokenizer.eot_token) + 1])
    begins = begins[begins < len(tokens) - T]
    if not any((tokens[b + 1:b + T + 1] >= 0).any() for b in begins):
        fail(f"in {data} no answer begins within --block-size {T} tokens of its prompt; give a larger --block-size")
    return begins


def bytes_per_token(tokens, tokenizer):
    """Mean length in bytes of the tokens that count, which turns nats per token into bits per byte."""
    tokens = tokens[tokens >= 0]
    parts = np.array_split(tokens, len(tokens) // 10 ** 6 + 1)
    return sum(len(tokenizer.decode_bytes(part.tolist())) for part in parts) / len(tokens)


def windows(tokens, starts, T, device):
    """-> inputs and targets, (B, T) each: the T tokens from each start, and those one further on, below 0 where they do not count."""
    block = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))
    block = block.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else block.to(device)
    return torch.where(block < 0, ~block, block)[:, :-1].contiguous(), block[:, 1:].contiguous()


def batch_starts(seed, step, places, batch_size):
    """Where the windows of a step begin, among the first n places or those of an array: a function of (seed, step) alone. Rank r of W
    takes [r::W], so that a run draws the same batches whatever it is spread over, and there is no position in the data to resume."""
    drawn = np.random.default_rng((seed, step)).integers(np.size(places) if np.ndim(places) else places, size=batch_size)
    return places[drawn] if np.ndim(places) else drawn


# ---------------------------------------------------------------------------------------------------------------------
# Runs on disk: a file is there whole or not at all, and nothing is unpickled

@contextmanager
def atomic(path):
    """A file to write that takes the place of `path` when the block ends well; otherwise what was there stays."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except BaseException as e:
        with suppress(OSError):
            draft.unlink()
        cause = e if isinstance(e, OSError) else e.__context__      # torch.save wraps what the disk said
        if isinstance(cause, OSError):
            fail(f"cannot write {path} ({cause.strerror}); what was there is untouched")
        raise


def remembered(folder, key, work):
    """-> work(), plain data, or what it was when it was last asked for with this key, which names all it depends on: an experiment of
    many runs that is cut short goes on where it stopped. Who is done with them removes the folder."""
    path = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
    if not path.exists():
        result = work()
        with atomic(path) as f:
            f.write(json.dumps({"key": key, "result": result}, indent=1).encode())
    return json.loads(path.read_text())["result"]


def stopwatch(folder=None):
    """-> a function that says the seconds since now, or None if `folder` of `remembered` is there now: what it holds took its time, too."""
    began = None if folder and Path(folder).exists() else time.perf_counter()
    return lambda: None if began is None else time.perf_counter() - began


def figure(size, *grid, **more):
    """-> a figure of so many inches and its axes, as plt.subplots makes them, but without pyplot's list of open ones"""
    from matplotlib.figure import Figure
    picture = Figure(size, layout="constrained")
    return picture, picture.subplots(*grid, **more)


def keep(picture, path, dpi=120):
    with atomic(path) as f:
        picture.savefig(f, format="png", dpi=dpi)


def interval(values):
    """Mean and half the width of its 95% interval, from Student's t."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def writable(folder):
    """-> the folder that an experiment writes at its end, tried at its beginning, before there is work to lose."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        fail(f"cannot write in {folder} ({e.strerror}); give --out another folder")
    return Path(folder)


def find_run(name=None, ours=False):
    """A folder with weights: the one named, a run's or, unless it must be `ours`, a Hugging Face one; else the newest run's under
    out/."""
    if name and not any((Path(name) / file).is_file() for file in ("ckpt.pt", *([] if ours else ["config.json"]))):
        fail(f"{name} holds no run: there is no {Path(name) / 'ckpt.pt'}" + ("" if ours else ", nor a Hugging Face config.json"))
    if name:
        return Path(name)
    runs = sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)
    if not runs:
        fail("there is no run under out/ yet; python train.py makes one")
    return runs[-1].parent


def add_adapters(state, run):
    """The weights of a checkpoint, W + alpha / rank B A in place of each W that has an adapter."""
    for name in [name for name in state if name.endswith(".lora_A")]:
        A, B, W = state.pop(name), state.pop(name[:-1] + "B"), name.removesuffix("lora_A") + "weight"
        state[W] = state[W] + run.lora_alpha / run.lora_rank * (B @ A)


def load_checkpoint(folder, merged=True):
    """-> the dict that save_checkpoint wrote, its adapters merged into the weights unless a run is to go on with them. Tensors, numbers,
    strings and containers are read, never code."""
    path = folder / "ckpt.pt"
    if not path.is_file():
        return load_pretrained(folder)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        lacks = {"model", "optimizer", "step", "config", "tokenizer", "data"} - set(saved)
        if lacks:
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        for kind, key in ((GPTConfig, "model"), (RunConfig, "run")):
            strange = set(saved["config"][key]) - {f.name for f in fields(kind)}
            if strange:
                raise ValueError(f"it has the unknown setting {', '.join(sorted(map(str, strange)))}")
            kind(**saved["config"][key])
        tokenizer_from(saved["tokenizer"])
        if not isinstance(saved["model"], dict) or type(saved["step"]) is not int:
            raise ValueError("its model or its step is malformed")
        if merged:
            add_adapters(saved["model"], RunConfig(**saved["config"]["run"]))
        return saved
    except Exception as e:                                           # cut off, no checkpoint at all, or one that carries code
        why = e if type(e) is ValueError else "it is damaged, or holds more than tensors, numbers and strings"
        fail(f"{path} is not a checkpoint of train.py: {why}")


@contextmanager
def refusing():
    """A ValueError inside says in one sentence what is wrong with the input."""
    try:
        yield
    except ValueError as e:
        fail(str(e))


def load_pretrained(folder):
    """-> a Hugging Face folder as a checkpoint from which no step has been taken. Its tensors are read when they are used."""
    import pretrained
    with refusing():
        model = pretrained.read_config(folder)
        cfg = GPTConfig(**model)
        run = {**FINETUNE, "block_size": min(cfg.block_size, FINETUNE["block_size"]), "tokenizer": folder.resolve().name}
        return {"model": pretrained.Weights(folder, shapes(cfg), cfg.tied), "config": {"model": model, "run": run},
                "tokenizer": pretrained.read_tokenizer(folder, cfg.vocab_size)}


def shapes(cfg):
    """-> {name: shape} of the parameters of a GPT with softmax attention."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(cfg, softmax_attention).named_parameters()}


def export(folder, saved, origin, dtype=None):
    """Write a Hugging Face folder. saved: as load_checkpoint gives it from `origin`, of which the weights, the model's settings and
    the tokenizer count; dtype None: that of the weights."""
    import pretrained
    cfg = GPTConfig(**saved["config"]["model"])
    with refusing():
        pretrained.write(folder, asdict(cfg), shapes(cfg), stored(saved["model"], origin), saved["tokenizer"], dtype)
    say(f"wrote {folder}, which transformers loads" + ("" if "files" in saved["tokenizer"] else
                                                       "; without its tokenizer, which is not a Hugging Face one"))


def save_checkpoint(folder, model, optimizer, **more):
    """All a run needs to go on or to be sampled. Every process calls it, to gather what is sharded; the first one writes."""
    def whole(t):
        if not isinstance(t, DTensor):
            return t
        full = t.full_tensor()                                       # all take part, one tensor at a time, and the first keeps it
        return full.cpu() if rank() == 0 else None
    state = tree_map(whole, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    if rank() == 0:
        with atomic(folder / "ckpt.pt") as f:
            torch.save({**state, **more}, f)


def stored(state, origin):
    """-> source(name, shape) over the tensors of a checkpoint."""
    def source(name, shape):
        if name not in state:
            fail(f"{origin}: the tensor {name} is missing")
        tensor = state[name]
        if tensor.shape != shape:
            fail(f"{origin}: the tensor {name} is {tuple(tensor.shape)}, not {tuple(shape)}")
        return tensor
    return source


def hollow(cfg, attention, device, dtype):
    """-> a GPT on the device, its matrices in `dtype`, since the products are taken in it anyway; its weights are yet to come."""
    with torch.device("meta"):
        model = GPT(cfg, attention, dtype)
    for p in (p for p in model.parameters() if p.dim() > 1):
        p.data = p.data.to(dtype)
    return model.to_empty(device=device).eval()


def load_model(folder, device="cpu", dtype=torch.float32, attn=None):
    """-> the GPT of the run or the Hugging Face folder, ready to use, and its tokenizer. attn: the name of its attention, if that
    is not to be taken from the checkpoint."""
    saved = load_checkpoint(folder)
    cfg, tokenizer = GPTConfig(**saved["config"]["model"]), tokenizer_from(saved["tokenizer"])
    attention = plug(attn or cfg.attn, "attention", attn is not None, cfg.attn_args)
    model = hollow(cfg, attention, device, dtype)
    fill(model, stored(saved["model"], folder))
    return model, tokenizer


def random_model(preset, device, dtype):
    """-> a softmax GPT of a preset's shape with random weights, for timing."""
    shape = {k: v for k, v in PRESETS[preset].items() if k in GPTConfig.__dataclass_fields__}
    model = hollow(GPTConfig(**{"vocab_size": 50304, **shape}), softmax_attention, device, dtype)
    fill(model, lambda name, shape: torch.randn(shape, device=device) * 0.02)
    return model


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict for the whole state of a run, which may have been sharded otherwise or not at all."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in state["state"].items():
        p = parameters[i]
        state["state"][i] = {k: shard_like(p, t) if torch.is_tensor(t) and t.shape == p.shape else t for k, t in entry.items()}
    optimizer.load_state_dict(state)


class Log:
    """log.csv, a row a step. Opened at step n, it drops the rows after n that an interrupted run wrote past its checkpoint."""
    COLUMNS = ["step", "lr", "loss", "grad_norm", "val_loss", "val_bpb"]

    def __init__(self, path, step):
        self.path, self.rows = path, []
        if step and path.exists():
            with open(path, newline="") as f:
                self.rows = [row for row in csv.DictReader(f) if int(row["step"]) <= step]

    def save(self):
        with atomic(self.path) as f:
            lines = [self.COLUMNS, *([row.get(c, "") for c in self.COLUMNS] for row in self.rows)]
            f.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())

    def plot(self, path, title, bits_per_nat):
        """loss.png: the loss of each training batch and the held-out loss, in bits per byte."""
        picture, axes = figure((7, 4))
        steps, losses = [int(r["step"]) for r in self.rows], [float(r["loss"]) * bits_per_nat for r in self.rows]
        axes.plot(steps, losses, lw=0.5, label="training batch")
        tested = [(int(r["step"]), float(r["val_bpb"])) for r in self.rows if r.get("val_bpb")]
        axes.plot(*zip(*tested) if tested else ([], []), "o-", ms=4, label="held out")
        axes.set(xlabel="step", ylabel="bits per byte", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        keep(picture, path)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(text):
    if rank() == 0:
        tqdm.write(text)


def mean_over_ranks(*values):
    """The mean of each number over all processes, the same on each; stays on the device."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float32).to(values[0].device) for v in values])
    if world() > 1:
        dist.all_reduce(total)
    return total / world()


class OnTheWay:
    """Numbers asked of the device now and read later, so that meanwhile it gets more work to do."""
    def __init__(self, tensor):
        self.tensor, self.event = tensor.to("cpu", non_blocking=True), torch.cuda.Event() if tensor.is_cuda else None
        if self.event:
            self.event.record()

    def read(self):
        if self.event:
            self.event.synchronize()
        return self.tensor.tolist()


class Interrupt:
    """The first SIGINT or SIGTERM is noted, for the loop to finish its step and save. Another one, more than a second later
    (torchrun passes on what the terminal sent already), ends the program at once."""
    def __enter__(self):
        self.signal = self.agreed = 0
        self.old = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    @property
    def now(self):
        """The signal to stop for. Several processes stop together, once a step has told them all, or one would wait for ever."""
        return self.signal if world() == 1 else self.agreed

    def note(self, signum, frame):
        if not self.signal:
            self.signal, self.when = signum, time.monotonic()
        elif time.monotonic() - self.when > 1:
            os._exit(128 + signum)

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)


def learning_rate(step, run):
    """Linear warm-up over run.warmup steps, then half a cosine from run.lr to a tenth of it."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    done = (step - run.warmup) / max(1, run.steps - run.warmup)
    return run.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def lora():
    """The paper's file that has the adapters, looked up like any plug-in: it knows nothing of train.py, nor this file of it."""
    return importlib.import_module("lora_rite")


def build(cfg, run, args, source):
    """-> the GPT with the weights of `source`, and what the loop calls: the same, spread over the processes."""
    with torch.device("meta"):
        model = GPT(cfg, dtype=DTYPES[run.dtype])
        if run.lora_rank:
            with refusing():
                lora().inject(model, run.lora_rank, run.lora_alpha, run.lora_targets.split(","))
    if args.compile:
        model.compile()
    if args.fsdp:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        mesh = dist.device_mesh.init_device_mesh(args.device.type, (world(),))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32))
    fill(model.to_empty(device=args.device), source)
    return model, nn.parallel.DistributedDataParallel(model) if dist.is_initialized() and not args.fsdp else model


def parameter_groups(model, weight_decay):
    """Matrices are decayed, gains are not. With adapters, these alone: one group A, B, A, B, ... of pairs."""
    if any(name.endswith("lora_A") for name, _ in model.named_parameters()):
        return [{**group, "weight_decay": weight_decay} for group in lora().pairs(model)]
    matrices, gains = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]


def take_step(model, net, optimizer, batches, clip, stopping=0, meanwhile=lambda: None):
    """One optimizer step on the mean loss over the micro-batches; the gradient is scaled to a norm of at most `clip` (0: as it
    is). -> loss, norm before, whether some process is `stopping`, and what meanwhile() returned. If the loss is not finite the
    step is not taken. It is read while the backward pass still runs, the norm while the step does, so the device has work."""
    total = 0.0
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1                                 # when gradients are exchanged between processes
        if hasattr(net, "set_requires_gradient_sync"):               # FSDP2
            net.set_requires_gradient_sync(last)
        with net.no_sync() if hasattr(net, "no_sync") and not last else nullcontext():       # DDP
            loss = net(x, y) / len(batches)
            total = total + loss.detach()
            if last:
                early = OnTheWay(mean_over_ranks(total, stopping))
            loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    late = OnTheWay(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    loss, stopping = early.read()
    if math.isfinite(loss):
        optimizer.step()
    optimizer.zero_grad()
    ahead = meanwhile()
    return loss, late.read(), stopping > 0, ahead


@torch.no_grad()
def evaluate(net, tokens, cfg, run, device, stop):
    """Mean loss over fixed, evenly spread held-out windows, shared out among the processes; NaN if a signal came in between."""
    there = -(-(len(tokens) - 1) // cfg.block_size // world()) * world()
    n = min(run.eval_batches * run.batch_size, max(there, world()))
    starts = np.linspace(0, len(tokens) - cfg.block_size - 1, n).astype(int)[rank()::world()]
    size, total = run.micro_batch or run.batch_size // world(), torch.zeros((), device=device)
    for i in range(0, len(starts), size):
        if stop.now:
            return math.nan
        total += net(*windows(tokens, starts[i:i + size], cfg.block_size, device)) * len(starts[i:i + size])
    return mean_over_ranks(total / len(starts)).item()


PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}   # bf16 FLOP/s


def timed(device, work):
    """-> work() and the seconds until the device was done with it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - began


def flops_per_token(model):
    """Forward and backward, only what the method needs: 6 for each weight in a product, 12 H D for each logit of a query."""
    c, matrices = model.cfg, sum(p.numel() for p in model.parameters() if p.dim() > 1)
    looked_up = 0 if c.tied else model.embed_tokens.weight.numel()
    return 6 * (matrices - looked_up) + 12 * sum(layer.self_attn.logits for layer in model.layers) * c.n_head * c.head_dim


def bench(model, net, optimizer, run, clip, device, out, warm_up=5, steps=20):
    """Time whole training steps on random tokens; -> dict of figures, printed too."""
    cfg, per_rank, times = model.cfg, run.batch_size // world(), []
    size = run.micro_batch or per_rank
    shape = (2, size, cfg.block_size)                                # inputs and targets
    batches = [torch.randint(cfg.vocab_size, shape, device=device).unbind() for _ in range(per_rank // size)]
    for _ in tqdm(range(warm_up + steps), "bench", leave=False, disable=rank() > 0):
        begin = time.perf_counter()
        loss, norm, *_ = take_step(model, net, optimizer, batches, clip)
        times.append(time.perf_counter() - begin)
    seconds, tokens = float(np.median(times[warm_up:])), run.batch_size * cfg.block_size
    figures = {"ms_per_step": 1e3 * seconds, "tokens_per_s": tokens / seconds, "tokens_per_step": tokens, "processes": world(),
               "parameters": sum(p.numel() for p in model.parameters()), "dtype": run.dtype, "torch": torch.__version__,
               "device": device.type}
    if device.type == "cuda":
        figures |= {"device": torch.cuda.get_device_name(device), "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        peak = next((p for name, p in PEAK.items() if name in figures["device"] and run.dtype == "bf16"), None)
        if peak:
            figures["mfu"] = flops_per_token(model) * tokens / seconds / world() / peak
    say(json.dumps(figures, indent=1))
    if out and rank() == 0:
        with atomic(Path(out) / "bench.json") as f:
            f.write(json.dumps({"command": " ".join(sys.argv), **figures}, indent=1).encode())
    return figures


def main(argv=None):
    """Train as the flags say -> dict(step, loss, val_loss, val_bpb, tokens_per_s, out, signal), or the figures of --bench."""
    args, cfg, run, saved = parse(sys.argv[1:] if argv is None else argv)
    if "RANK" in os.environ:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    elif args.fsdp:
        fail("--fsdp shards over the processes that torchrun starts: torchrun --nproc-per-node 2 train.py --fsdp")
    try:
        with Interrupt() as stop:
            return train(args, cfg, run, saved, stop)
    except torch.OutOfMemoryError:
        fail("the GPU has too little memory; give a smaller --micro-batch (the result stays the same) or --fsdp on several GPUs")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_folder(args, cfg):
    """Where the run writes: --resume's folder, --out, or the first free of out/tiny-softmax, out/tiny-softmax-2, ..."""
    if args.resume is not None:
        return find_run(args.resume or args.out, ours=True)
    if args.out and (Path(args.out) / "ckpt.pt").exists():
        fail(f"{args.out} holds a run already: --resume {args.out} goes on with it, another --out starts afresh")
    stem = Path(args.init).resolve().name if args.init else f"{args.model}-{cfg.attn}"
    free = (p for n in itertools.count(1) if not (p := Path("out", stem if n == 1 else f"{stem}-{n}")).exists())
    return Path(args.out) if args.out else next(free)


def beginning(tokenizer):
    """-> the ids that stand before a document: what its tokenizer puts there, else the end of the one before."""
    return getattr(tokenizer, "start", None) or [tokenizer.eot_token]


def show_sample(model, tokenizer, n, seed, stop):
    """Say what the model writes at the start of a document."""
    ids = generate(model.eval(), beginning(tokenizer), n, temperature=0.8, top_k=50, seed=seed, limit=tokenizer.n_vocab)
    with torch.compiler.set_stance("force_eager"):                   # each new length would be compiled anew
        text = list(itertools.takewhile(lambda token: token != tokenizer.eot_token and not stop.now, ids))
    say(tokenizer.decode_bytes(text).decode(errors="replace"))


def set_up(args, run):
    """Decide what was left open, and say it -> the device's name; sequences a process takes a step, and at a time."""
    device = args.device
    run.dtype, dtype_why = pick_dtype(device, run.dtype)
    compile_why = "as asked" if args.compile is not None else "it pays on CUDA"
    args.compile = device.type == "cuda" if args.compile is None else args.compile
    per_rank = run.batch_size // world()
    micro = run.micro_batch or per_rank
    if run.batch_size % world() or per_rank % micro:
        fail(f"--batch-size {run.batch_size} does not share out to {world()} processes in micro-batches of {micro}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    say(f"device   {device}: {name}{f', {world()} processes' if world() > 1 else ''} ({args.device_why})\ndtype    {run.dtype} ({dtype_why})\n"
        f"compile  {'on' if args.compile else 'off'} ({compile_why})")
    return name, per_rank, micro


def open_data(out, cfg, run, saved, tokenizer, device):
    """-> the tokens to train on, where batches may begin in them, those held out, and what tells this text from another. `saved`: the
    checkpoint to resume, which must have seen the same."""
    tokens = load_tokens(run.data, tokenizer, out.parent / ".tokens")
    data = {"tokens": len(tokens), "sha256": hashlib.sha256(tokens).hexdigest()}
    mark = int(data["sha256"][:4], 16)
    if mean_over_ranks(torch.tensor(mark, device=device)).item() != mark:
        fail(f"the processes see different texts in {run.data}; give --data a copy of the same files on every machine")
    if saved and data != saved["data"]:
        fail(f"{run.data} has changed since the run in {out} began, so it cannot go on exactly; --init {out} starts a new "
             f"run from its weights")
    train_tokens, val_tokens = split(tokens, cfg.block_size, run.data)
    say(f"data     {run.data}: {len(train_tokens):,} tokens to train on, {len(val_tokens):,} held out ({tokenizer.name})")
    return train_tokens, starts_of(train_tokens, cfg.block_size, tokenizer, run.data), val_tokens, data


def train(args, cfg, run, saved, stop):
    launched, device, resuming = time.perf_counter(), args.device, args.resume is not None
    name, per_rank, micro = set_up(args, run)
    tokenizer = tokenizer_from(saved["tokenizer"]) if saved else None if args.bench else get_tokenizer(run.tokenizer)
    if args.export:                                                  # to learn now, not after the last step, that it cannot be
        import pretrained
        with refusing():
            pretrained.exportable(Path(args.export), asdict(cfg))
    n_vocab = tokenizer.n_vocab if tokenizer else cfg.vocab_size or 50257                    # --bench has GPT-2's in mind
    cfg.vocab_size = cfg.vocab_size or -(-n_vocab // 64) * 64
    if cfg.vocab_size < n_vocab:
        fail(f"--vocab-size {cfg.vocab_size} is less than the tokenizer's {n_vocab}; leave it out")
    if not args.bench:
        out = choose_folder(args, cfg)
        train_tokens, places, val_tokens, data = open_data(out, cfg, run, saved if resuming else None, tokenizer, device)
        bits_per_nat = 1 / (math.log(2) * bytes_per_token(val_tokens, tokenizer))

    source = stored(saved["model"], "the checkpoint") if saved else fresh(cfg, run.seed)
    if run.lora_rank and args.fsdp:
        fail("--lora-rank keeps each adapter whole; leave --fsdp out")
    if run.lora_rank and not resuming:
        weights = source
        source = lambda name, shape: lora().start(name, shape, run.seed) if "lora_" in name else weights(name, shape)
    clip = 0.0 if run.lora_rank else run.clip                        # clipped, a step would depend on how B A is factored
    model, net = build(cfg, run, args, source)
    try:
        optimizer = plug(run.optim, "optimizer")(parameter_groups(model, run.weight_decay), run.lr, **run.optim_args)
    except ValueError as e:
        fail(f"--optim {run.optim}: {e}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"model    {sum(p.numel() for p in model.parameters()):,} parameters{f', {trained:,} of them trained' if run.lora_rank else ''}: {cfg.n_layer} layers of width {cfg.n_embd}, "
        f"{cfg.n_head} heads, context {cfg.block_size}, {cfg.attn} attention, {run.optim} ({args.title})")
    if args.bench:
        return bench(model, net, optimizer, run, clip, device, args.out)

    step = first = saved["step"] if resuming else 0
    last = min(run.steps, step + (args.stop_after or run.steps))
    if step >= run.steps:
        fail(f"the run in {out} is complete ({step} steps); --init {out} starts a new one from its weights")
    if resuming:
        load_optimizer(optimizer, saved["optimizer"])
    saved, config, log = None, {"model": asdict(cfg), "run": asdict(run)}, Log(out / "log.csv", step)

    def note(**result):
        """config.json: what was asked for, on what it ran and, in the end, what came out."""
        machine = {"device": name, "processes": world(), "python": sys.version.split()[0], "torch": torch.__version__}
        record = {"command": " ".join(sys.argv), **config, "machine": machine, "result": result}
        with atomic(out / "config.json") as f:
            f.write(json.dumps(record, indent=1).encode())
    if rank() == 0:
        for draft in out.glob(".*.[0-9]*"):                          # left by a process that was killed while it wrote
            draft.unlink()
        note()
    say(f"run      {out}: steps {step + 1:,} to {last:,}" + (f" of {run.steps:,}" if last < run.steps else ""))

    bar = tqdm(total=run.steps, initial=step, unit="step", disable=rank() > 0, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 15)

    def draw(step):
        """The micro-batches of a step for this process, in memory when the step begins."""
        starts = batch_starts(run.seed, step, places, run.batch_size)[rank()::world()]
        return [windows(train_tokens, starts[i:i + micro], cfg.block_size, device) for i in range(0, per_rank, micro)]

    def save():
        if rank() == 0:
            log.save()
        save_checkpoint(out, model, optimizer, step=step, config=config, tokenizer=tokenizer_dict(tokenizer), data=data)

    def halt(why):
        """End a run that has gone wrong; what has been saved stays as it is."""
        bar.close()
        if rank() == 0:
            log.save()
        kept = f"{out / 'ckpt.pt'} is the last good checkpoint" if (out / "ckpt.pt").exists() else "there is no checkpoint yet"
        say(f"step {step}: {why}; the run stops here, {kept}. A smaller --lr is the usual cure.")
        raise SystemExit(1)

    batches, trained, result = draw(step), 0.0, {}
    while step < last and not stop.now:
        began, lr = time.perf_counter(), learning_rate(step, run)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(int(np.random.SeedSequence((run.seed, step, rank())).generate_state(1)[0]))     # plug-ins may draw
        loss, norm, signalled, batches = take_step(model, net, optimizer, batches, clip, stop.signal,
                                                   meanwhile=lambda: draw(step + 1))
        stop.agreed = (stop.signal or signal.SIGTERM) if signalled else 0
        step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            halt(f"the loss is {loss} and the gradient's norm {norm}")
        if step > first + 1:                                         # the first one compiles and warms up
            trained += time.perf_counter() - began
            result["tokens_per_s"] = (step - first - 1) * run.batch_size * cfg.block_size / trained
            bar.set_postfix_str(f"loss {loss:.3f}, {result['tokens_per_s']:,.0f} tok/s", refresh=False)
        bar.update()
        row = {"step": step, "lr": lr, "loss": loss, "grad_norm": norm}
        if (step % run.eval_every == 0 or step == run.steps) and not stop.now:
            val_loss = evaluate(net, val_tokens, cfg, run, device, stop)
            if not stop.now:
                if not math.isfinite(val_loss):
                    halt(f"the held-out loss is {val_loss}")
                row |= {"val_loss": val_loss, "val_bpb": val_loss * bits_per_nat}
                say(f"step {step:>6,}/{run.steps:,} | train {loss * bits_per_nat:.3f}, held out {row['val_bpb']:.3f} bits/byte"
                    f" | lr {lr:.1e}")
        log.rows.append(row)
        result |= row
        if step % run.eval_every == 0 or step == last or stop.now:
            save()
    bar.close()
    if step == first:                                                # stopped before it began
        save()
    if rank() == 0:
        note(**result, seconds=time.perf_counter() - launched)
        log.plot(out / "loss.png", f"{out.name}: {run.data}", bits_per_nat)
    if step < run.steps or stop.now:
        go_on = f" Go on with: python train.py --resume {out}" if step < run.steps else ""
        say(f"stopped after step {step:,} of {run.steps:,}; all is saved.{go_on}")
    else:
        say(f"held-out loss {result['val_loss']:.4f} nats/token, {result['val_bpb']:.4f} bits/byte; a sample:\n")
        show_sample(model, tokenizer, args.sample, run.seed, stop)
        if args.export and rank() == 0:
            export(Path(args.export), load_checkpoint(out), out)
        say(f"\n{out} holds ckpt.pt, log.csv and loss.png. Next: python sample.py --init {out} --prompt \"def main(\"")
    return {**result, "step": step, "out": str(out), "signal": stop.now}


def part(argv):
    """main(argv) as part of an experiment -> its result, what it said. Told to stop, it takes the experiment with it."""
    with redirect_stdout(io.StringIO()) as said:                     # the bar on stderr is enough
        result = main(argv)
    if result.get("signal"):
        raise KeyboardInterrupt(result["signal"])
    return result, said.getvalue()


def leave(main):
    """Run a script's main and end with status 0, or 128 + signal where one told it to stop, in whatever it was doing."""
    def told(signum, frame):
        raise KeyboardInterrupt(signum)
    signal.signal(signal.SIGTERM, told)
    try:
        signum = (main() or {}).get("signal")
    except KeyboardInterrupt as e:
        signum = e.args[0] if e.args else signal.SIGINT
        print(f"\n{Path(sys.argv[0]).name}: stopped before its end", file=sys.stderr)
    except BrokenPipeError:                                          # the reader, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signum = 0
    status = 128 + signum if signum else 0
    if "RANK" in os.environ:                                         # all is saved; a process has been seen to abort in its last
        sys.stdout.flush()                                           # moments, in the threads of gloo
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main)
