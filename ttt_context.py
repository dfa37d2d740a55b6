"""Query-only test-time training on a long prompt (arXiv 2512.13898).

The longer the context, the thinner softmax attention spreads over it. Let z_j
be the logit of key j and z_* that of the one relevant key, the needle. To put
a probability of 1 - e on one of T keys takes

    z_* - z_j >= log((T - 1) (1 - e) / e)   grows with log T; weights do not

and m distractors within d of the needle leave it at most 1 / (1 + m exp(-d)).
Thinking longer does not help: each new token reads the context through the
same diluted attention. The paper (Bansal et al.) spends the compute on the
queries instead: read the prompt once, freeze every key and value, take a few
AdamW steps on the query projections W_Q of all layers with the next-token
loss on random spans of the prompt, and answer from the same cache.

    loss(t) = -1/n sum_{i=t}^{t+n-1} log p(x_{i+1} | x_{<=i})
                                  queries i from W_Q, keys j <= i from cache
    dl/dq = (sum_j p_j k_j - k_*) / sqrt(D)                    for l = -log p_*

A step moves a query from the mean key towards the needle, most where p is
flat. The paper takes 32 steps, n = 128, t uniform, weight decay 0.01 and
gradients clipped to 1, and reports for Qwen3-4B on LongBench-v2: 27.0 in
context, 33.5 with thinking, 39.6 with trained queries. Others found that
spans drawn at random hurt (arXiv 2607.09415). The lemmas assume a known
needle and a free query; nothing proves a larger margin where the answer is
read. A norm after W_Q (Qwen3) lets queries turn but not sharpen.

Where the paper is silent: the keys and values of a span come from the cache
too. W_Q is kept in float32 at least, because at a learning rate of 1e-5 a
bfloat16 weight would not move. The question is not part of the spans; it is
read with the new W_Q. Up to 8 spans, an eighth of the prompt, are held out to
measure what was learned: they share no target with a span that is trained on.

    python ttt_context.py --prompt my.txt --question "..."   the newest run
    python ttt_context.py --prompt my.txt --init DIR         run, Hugging Face
    python ttt_context.py --experiment                       small models, CPU

The experiment trains small models on short streams and asks about long ones,
with one fitted temperature per head as the baseline.

The model is afterwards what it was, bit for bit.
"""

from support import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # Ctrl-C during the imports

import bisect
import hashlib
import math
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train
from sample import KVCache, first_ids
from support import distributed, files, run_folder
from support.cli import option

try:
    from kernels import ttt_context as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

PROMPT_LIMIT = 2**26  # bytes of a prompt file
MAX_HELD_OUT = 8  # spans that measure what was learned


# --------------------------------------------------------------------------------------------------
# Attention of spans over a frozen cache


def reference(q, k, v, starts):
    """Attention of S spans over shared keys and values, by its definition, in any dtype.

    q (S, H, n, D), k and v (Hkv, T, D), starts (S) -> (S, H, n, D). Query r of span s stands at
    position starts[s] + r and sees the keys up to there. Makes (S, H, n, T) tensors.
    """
    S, H, n, D = q.shape
    Hkv, T, _ = k.shape
    k = k.repeat_interleave(H // Hkv, dim=0)  # (H, T, D)
    v = v.repeat_interleave(H // Hkv, dim=0)

    positions = starts.to(q.device)[:, None] + torch.arange(n, device=q.device)  # (S, n)
    is_future = torch.arange(T, device=q.device) > positions[:, None, :, None]  # (S, 1, n, T)
    scores = q @ k.transpose(1, 2) * D**-0.5  # (S, H, n, T)
    return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v


class FrozenCache:
    """One layer's keys and values of the whole prompt, frozen, as the cache of S spans of it.

    k and v (Hkv, T, D); starts (S), on the CPU, where the spans begin. Only queries are
    differentiable: the keys and values that the module computes for the span are not used.
    """

    def __init__(self, k, v, starts, is_softmax):
        self.k = k
        self.v = v
        self.starts = starts
        self.is_softmax = is_softmax

    def attend(self, module, heads):
        q = heads[0]  # (S, H, n, D)
        if self.is_softmax and q.is_cuda and q.dtype != torch.float64:
            if kernel is not None and q.shape[3] in kernel.WIDTHS:
                return kernel.span_attention(q, self.k, self.v, self.starts)
            reason = "pip install triton" if kernel is None else f"head dim {q.shape[3]}"
            warnings.warn(f"span attention runs in PyTorch, which is slower: {reason}")

        # the queries are the last of the keys up to the end of their span
        outputs = []
        for s, start in enumerate(self.starts.tolist()):
            end = start + q.shape[2]
            k = self.k[None, :, :end]
            v = self.v[None, :, :end]
            outputs.append(module.function(q[s : s + 1], k, v, **module.options))
        return torch.cat(outputs)


@torch.no_grad()
def prefill(model, ids, room=0):
    """Read a prompt, ids (T), with the model as it is.

    Return (caches, kv): for each layer its KVCache, with room for `room` more tokens, and views of
    the T keys and values in it, (Hkv, T, D) each.
    """
    for layer in model.layers:
        attention = layer.self_attn
        if attention.inputs != ["q", "k", "v"] or any(attention.windows):
            raise ValueError(
                f"{model.config.attn} attention does not keep a key and a value of every position, "
                f"which query-only training needs; use a model with softmax attention"
            )
    T = len(ids)
    caches = [KVCache(T + room) for _ in model.layers]
    model(ids[None], cache=caches)
    kv = []
    for cache in caches:
        k, v = cache.tensors  # (1, Hkv, T + room, D)
        kv.append((k[0, :, :T], v[0, :, :T]))
    return caches, kv


def span_loss(model, kv, ids, starts, n):
    """Return the mean loss over the targets ids[t + 1 : t + n + 1] of each t in starts.

    kv: the frozen keys and values of each layer, from `prefill`; ids (T); starts (S) on the CPU,
    with 0 <= t < T - n. Of the attention's projections only W_Q and W_O matter, since the keys and
    values of a span come from the cache. The layers project them all the same, which costs 3% of a
    step's products in Qwen3-4B.
    """
    T = len(ids)
    if n < 1 or len(starts) == 0 or int(starts.min()) < 0 or int(starts.max()) + n >= T:
        raise ValueError(
            f"spans of {n} tokens at {starts.tolist()} do not fit: they need {n} tokens of a text "
            f"of {T}, and the one after them"
        )
    positions = (starts[:, None] + torch.arange(n)).to(ids.device)  # (S, n)
    head_dim = model.config.head_dim
    theta = model.config.rope_theta
    angles = [train.rope_angles(t, n, head_dim, theta, ids.device) for t in starts.tolist()]
    cos = torch.stack([a[0] for a in angles])  # (S, n, 1, D/2)
    sin = torch.stack([a[1] for a in angles])

    x = model.embed_tokens(ids[positions]).to(model.dtype)  # (S, n, C)
    attn = model.config.attn.split(",")  # cycled over the layers
    for i, (layer, (k, v)) in enumerate(zip(model.layers, kv, strict=True)):
        is_softmax = attn[i % len(attn)] == "softmax"
        x = layer(x, cos, sin, FrozenCache(k, v, starts, is_softmax))
    x = model.norm(x).flatten(0, 1)  # (S n, C)

    weight = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight  # (V, C)
    return train.linear_cross_entropy(x, weight, ids[positions + 1].flatten())


# --------------------------------------------------------------------------------------------------
# Training the queries


@contextmanager
def trainable_queries(model):
    """Freeze everything but the W_Q of each layer, a copy in float32 at least; yield the list of them.

    At the end, also after an error, the model has its own tensors back.
    """
    originals = [(p, p.data, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        weights = [layer.self_attn.q_proj.weight for layer in model.layers]
        for weight in weights:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight.data = weight.data.to(dtype, copy=True)
            weight.requires_grad_(True)
        yield weights
    finally:
        for parameter, tensor, requires_grad in originals:
            parameter.data = tensor
            parameter.grad = None
            parameter.requires_grad_(requires_grad)


def split_spans(T, n):
    """Return where spans of n in a text of T tokens begin: those held out, and those to train on.

    Held out are up to 8 spans, evenly spaced, an eighth of the text at most, but one if there is
    room for any. To train on are all spans whose targets exist and are no held-out targets.
    """
    n_held_out = min(MAX_HELD_OUT, max((T - 1) // (8 * n), int(T > 3 * n)))
    last = T - 1 - n  # its last target is the last token
    held_out = [round((i + 0.5) / n_held_out * last) for i in range(n_held_out)]
    held_out = torch.tensor(held_out, dtype=torch.int64)
    starts = torch.arange(last + 1)
    is_apart = (starts[:, None] - held_out).abs() >= n  # (starts, held out)
    return held_out, starts[is_apart.all(dim=1)]


def train_queries(model, weights, kv, ids, starts, *, steps=32, n=128, batch=1, lr=1e-5, seed=0):
    """Train `weights` by AdamW on spans drawn from `starts`, `batch` per step; yield each step's loss.

    weights: tensors that require a gradient, usually those of `trainable_queries`. The loss is that
    before the step. Equal seeds and texts give equal steps, and no two texts share their draws.
    Raises FloatingPointError if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    digest = hashlib.sha256(f"{seed}/{ids.tolist()}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    for _ in range(steps):
        drawn = torch.randint(len(starts), (batch,), generator=generator)
        loss = span_loss(model, kv, ids, starts[drawn], n)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        loss = loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss on a span is {loss}; try a smaller --lr")
        yield loss


@contextmanager
def adapt(model, kv, ids, starts=None, *, steps=32, show_progress=False, **options):
    """Train the queries on a prompt; inside the block the model answers with them.

    kv: from `prefill`; starts: where spans begin, by default anywhere; options: n, batch, lr, seed
    of `train_queries`. Yields the trained W_Q of each layer. Afterwards the model is as before.
    """
    if starts is None:
        starts = torch.arange(len(ids) - options.get("n", 128))
    with trainable_queries(model) as weights:
        losses = train_queries(model, weights, kv, ids, starts, steps=steps, **options)
        bar = tqdm(losses, total=steps, unit="step", desc="adapting", disable=not show_progress)
        for loss in bar:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        yield weights


@torch.no_grad()
def answer(model, caches, T, question, n, limit=None):
    """Yield the n likeliest tokens, one by one, after a question that follows T cached positions.

    question: token ids, at least one; limit: ids from here on are padding of the vocabulary.
    """
    for cache in caches:
        cache.length = T  # forget an earlier question and its answer
    ids = list(question)
    device = model.embed_tokens.weight.device
    for _ in range(n):
        logits = model(torch.tensor([ids], device=device), cache=caches)[0, -1, :limit]  # (V)
        ids = [int(logits.argmax())]
        yield ids[0]


# --------------------------------------------------------------------------------------------------
# Cost. A multiply-add counts as two FLOPs; norms, softmax and the embedding lookup are left out.


def count_weights(model):
    """Return how many numbers are in all matrices that a token is multiplied with, in the W_K and
    W_V of all layers, and in one W_Q; and the width of all heads of all layers that attend."""
    config = model.config
    attention = model.layers[0].self_attn
    total = model.embed_tokens.weight.numel()  # of the output layer, if it is tied or not
    total += sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    kv = config.n_layer * (attention.k_proj.weight.numel() + attention.v_proj.weight.numel())
    attending = [getattr(x.self_attn.function, "has_logits", True) for x in model.layers]
    return (
        total,
        kv,
        attention.q_proj.weight.numel(),
        config.n_head * config.head_dim * sum(attending),
    )


def flops_of_tokens(model, T, n):
    """FLOPs to generate n tokens after T, each of which attends to all before it and to itself."""
    total, _, _, head_width = count_weights(model)
    keys = n * T + n * (n + 1) // 2
    return 2 * n * total + 4 * head_width * keys


def flops_of_spans(model, tokens, T):
    """FLOPs of the forward and backward pass of so many span tokens in a text of T.

    A token sees half the text on average. The backward pass repeats each product once, for the
    gradient of its input, but for the W_Q of the first layer; it adds W_Q's own gradient, and of
    attention the scores, dP and dQ.
    """
    total, kv, q, head_width = count_weights(model)
    n_layer = model.config.n_layer
    linear = tokens * (4 * (total - kv) + 2 * (n_layer - 1) * q)
    keys = tokens * (T + 1) // 2
    return linear + (4 + 6) * head_width * keys


def thinking_tokens(model, T, flops):
    """Return how many tokens can be generated after T for at most so many FLOPs."""
    most = int(flops // flops_of_tokens(model, T, 1))  # each later token costs more than the first
    counts = range(1, most + 1)
    return bisect.bisect_right(counts, flops, key=lambda n: flops_of_tokens(model, T, n))


def free_memory(device):
    """Return the free bytes of a device, infinity where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        found = re.search(r"MemAvailable: +(\d+)", meminfo.read_text())
        return 1024 * int(found[1]) if found else math.inf
    return math.inf


# --------------------------------------------------------------------------------------------------
# The command


def encode_prompt(tokenizer, prompt, question=""):
    """Return the token ids of the context and of the question.

    With a chat template both are one message of the user: the question is what the message's ids do
    not share with those of the message without it. Otherwise they are plain text, and without a
    question the last token of the prompt takes its place. A template that fails raises ValueError.
    """
    if question and getattr(tokenizer, "chat_template", None):
        content = f"{prompt}\n\n"
        ids = tokenizer.chat([{"role": "user", "content": content + question}])
        without_question = tokenizer.chat([{"role": "user", "content": content}])
        n_context = len(os.path.commonprefix([ids, without_question]))
    else:
        ids = [*first_ids(tokenizer), *map(int, tokenizer.encode_ordinary(prompt))]
        n_context = len(ids) if question else len(ids) - 1
        if question:
            ids += map(int, tokenizer.encode_ordinary(question))
    if n_context == len(ids):
        raise ValueError("nothing of --question is left in the tokens; ask it in other words")
    return ids[:n_context], ids[n_context:]


def read_prompt(path):
    """Return the text of --prompt."""
    try:
        text = files.read_user_file(path, PROMPT_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text: what is needed is UTF-8 without NUL bytes")
    if not text:
        raise ValueError(f"{path} is empty")
    return text


@dataclass
class AdaptConfig:
    """Adapting and answering"""

    prompt: str = option("", "the context, a text file", metavar="FILE")
    question: str = option("", "about the context; default: continue where it ends")
    init: str = option("", "a run or Hugging Face folder; default: the newest run under out/")
    steps: int = option(32, "AdamW steps", least=0)
    span: int = option(128, "tokens of a span")
    batch_spans: int = option(1, "spans per step")
    lr: float = option(None, "learning rate; None: 1e-3 for a run, else 1e-5", least=0)
    seed: int = option(1337, "with the text, draws the spans", least=0)
    max_tokens: int = option(100, "longest answer")
    save_queries: str = option("", "write the trained W_Q to a new file", metavar="FILE")
    device: str = option("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    dtype: str = option("", "default: bf16 on a GPU that has it", choices=list(train.DTYPES))
    experiment: bool = option(False, "run experiments/ttt_context.py instead")
    out: str = option("results", "folder for what --experiment finds")

    def __post_init__(self):
        cli.check_fields(self)
        if not self.prompt and not self.experiment:
            raise ValueError("give --prompt FILE, the text to adapt to, or --experiment")
        if self.save_queries and os.path.lexists(self.save_queries):
            raise ValueError(f"--save-queries {self.save_queries} exists; give a new name")
        folder = Path(self.save_queries).parent
        if self.save_queries and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"--save-queries: there is no folder {folder} to write to")


def pick_run(args):
    """Return the folder of --init, else the newest run, else that of the default run, trained now."""
    if not args.init and not any(Path("out").glob("*/ckpt.pt")):
        print("there is no run under out/ yet; training the default model first", file=sys.stderr)
        device = ["--device", args.device] if args.device else []
        result = train.main(["--sample", "0", *device])
        if result["signal"]:
            raise KeyboardInterrupt(result["signal"])
    return run_folder.find_run(args.init or "newest")


def check_fits(args, model, context, question):
    """Raise ValueError if the prompt is too short for a span, or the memory too small for both."""
    T = len(context)
    if T <= args.span:
        raise ValueError(
            f"{args.prompt} has {T} tokens, but a span takes {args.span} and its last target; "
            f"give a longer text or a smaller --span"
        )

    # keys and values, one layer's once more, and what an MLP holds; in training, of every layer
    c = model.config
    per_token = 2 * (c.n_layer + 1) * c.n_kv_head * c.head_dim + 3 * c.n_hidden + 4 * c.n_embd
    per_span_token = c.n_layer * (4 * c.n_embd + 3 * c.n_hidden + 3 * c.n_head * c.head_dim)
    numbers = per_token * (T + len(question) + args.max_tokens)
    numbers += per_span_token * args.span * args.batch_spans
    needed = numbers * model.dtype.itemsize
    free = free_memory(model.embed_tokens.weight.device)
    if needed > free:
        raise ValueError(
            f"{args.prompt} has {T} tokens, which takes {needed / 2**30:.1f} GB, but only "
            f"{free / 2**30:.1f} GB are free; give a shorter text or a smaller --batch-spans"
        )


def stop_ids(tokenizer):
    """Return the ids that end an answer."""
    return {tokenizer.eot_token, *getattr(tokenizer, "stops", ())} - {None}


def compare(model, tokenizer, ids, question, args, lr):
    """Answer, adapt, answer again. Return what was found: texts, losses, seconds, FLOPs."""
    T = len(ids)
    held_out, starts = split_spans(T, args.span)
    stops = stop_ids(tokenizer)

    def synchronized_time():
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    @torch.no_grad()
    def examine():
        """Return the loss on the held-out spans, None if there are none, and an answer."""
        losses = [span_loss(model, kv, ids, t[None], args.span).item() for t in held_out]
        loss = sum(losses) / len(losses) if losses else None
        if losses and not math.isfinite(loss):
            raise FloatingPointError(f"the loss on held-out spans is {loss}; try a smaller --lr")
        reply = []
        for token in answer(model, caches, T, question, args.max_tokens, tokenizer.n_vocab):
            if token in stops:
                break
            reply.append(token)
        return loss, tokenizer.decode_bytes(reply).decode(errors="replace")

    # read the prompt
    start_time = synchronized_time()
    caches, kv = prefill(model, ids, room=len(question) + args.max_tokens)
    prefill_seconds = synchronized_time() - start_time
    before, plain = examine()
    originals = [layer.self_attn.q_proj.weight.detach().clone() for layer in model.layers]

    # adapt and answer again
    options = {"n": args.span, "batch": args.batch_spans, "lr": lr, "seed": args.seed}
    start_time = synchronized_time()
    with adapt(model, kv, ids, starts, steps=args.steps, show_progress=True, **options) as weights:
        seconds = synchronized_time() - start_time
        after, adapted = examine()
        moved = 0.0
        total = 0.0
        saved = {}
        for i, (weight, original) in enumerate(zip(weights, originals)):
            moved += (weight.detach() - original).square().sum().item()
            total += original.square().sum().item()
            saved[f"layers.{i}.self_attn.q_proj.weight"] = weight.detach().cpu()
        if args.save_queries:
            with files.atomic_write(args.save_queries) as file:
                torch.save(saved, file)

    flops = flops_of_spans(model, args.steps * args.batch_spans * args.span, T)
    return {
        "plain": plain,
        "adapted": adapted,
        "held_out_before": before,
        "held_out_after": after,
        "held_out_spans": len(held_out),
        "context": T,
        "prefill_seconds": prefill_seconds,
        "seconds": seconds,
        "flops": flops,
        "thinking_tokens": thinking_tokens(model, T + len(question), flops),
        "moved": math.sqrt(moved / max(total, 1e-30)),
        "lr": lr,
    }


def report(result, steps):
    """Print what `compare` found."""
    r = result
    print(
        f"--- as it is\n{r['plain']}\n--- with queries trained on this prompt\n{r['adapted']}\n---"
    )
    if r["held_out_before"] is None:
        print("held-out spans: none, the prompt is shorter than three spans")
    else:
        change = r["held_out_after"] - r["held_out_before"]
        print(
            f"loss on {r['held_out_spans']} held-out spans: {r['held_out_before']:.4f} before, "
            f"{r['held_out_after']:.4f} after, {change:+.4f} nats/token"
        )
    print(
        f"{steps} steps in {r['seconds']:.2f} s after a prefill of {r['prefill_seconds']:.2f} s; "
        f"W_Q moved by {100 * r['moved']:.2f}%; as many FLOPs ({r['flops']:.3g}) as "
        f"{r['thinking_tokens']:,} tokens of thinking"
    )


def run(args):
    """Adapt to --prompt, print the answer before and after, and return what was found."""
    # the prompt and the model
    text = read_prompt(args.prompt)
    device = distributed.pick_device(args.device)
    dtype = train.DTYPES[distributed.pick_dtype(args.dtype, device)]
    folder = pick_run(args)
    model, tokenizer = train.load_model(folder, device, dtype)
    context, question = encode_prompt(tokenizer, text, args.question)
    check_fits(args, model, context, question)
    lr = args.lr
    if lr is None:  # weights that were trained for long want smaller steps
        lr = 1e-3 if (folder / "ckpt.pt").is_file() else 1e-5

    T = len(context)
    print(f"{folder} on {device}: {T:,} tokens, {len(question)} to ask", file=sys.stderr)
    factor = (T + len(question)) / model.config.block_size
    if factor > 1:
        trained = f"the {model.config.block_size:,} tokens the model was trained on"
        print(f"that is {factor:.1f} times {trained}", file=sys.stderr)
    ids = torch.tensor(context, device=device)
    try:
        result = compare(model, tokenizer, ids, question, args, lr)
    except torch.OutOfMemoryError:
        raise ValueError(
            "the GPU is out of memory; give a shorter text, or a smaller --span or --batch-spans"
        ) from None
    report(result, args.steps)
    return result


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    (args,) = cli.parse_configs(argv, __doc__, [AdaptConfig], {}, lambda given: {})
    if args.experiment:
        from experiments import ttt_context as experiment

        return experiment.main(["--out", args.out])
    return run(args)


if __name__ == "__main__":
    cli.run_main(main)
