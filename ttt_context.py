"""Query-only test-time training on a long prompt (arXiv 2512.13898).

A long context dilutes softmax attention. To give probability 1 - e to one
relevant key (the needle) among T keys, the needle's logit z_* must exceed the
logit z_j of every other key by a margin that grows with T:

    z_* - z_j >= log((T - 1) (1 - e) / e)

Thinking longer does not help, since each new token reads the context through
the same attention. The paper (Bansal et al.) spends that compute on the queries
instead: it reads the prompt once, freezes keys and values, takes a few AdamW
steps on the query projections W_Q of all layers, with the next-token loss on
random spans of n tokens of the prompt, and answers from the same KV cache.
Afterwards W_Q is as before, bit for bit.

    loss(t) = -1/n sum_{i=t}^{t+n-1} log p(x_{i+1} | x_{<=i})
    dl/dq   = (sum_j p_j k_j - k_*) / sqrt(D)     if l = -log p_*

Here p_j is the attention of a query q of width D to key k_j. If the loss were
-log p_*, a step would move q from the mean key towards the needle. With 32
steps and n = 128, Qwen3-4B's accuracy on LongBench-v2 rose from 27.0 to 39.6 in
the paper, and to 33.5 with thinking. Others found that random spans hurt (arXiv
2607.09415), and nothing proves that the margin grows where the answer is read.

Where the paper does not say, we choose: the keys and values of a span come from
the cache, too. W_Q is trained in float32, because bfloat16 would lose small
steps. No span covers the question. Up to 8 spans are held out.

    python ttt_context.py --prompt my.txt --question "Who is the narrator?"
    python ttt_context.py --prompt my.txt --init DIR   a run, a folder, ORG/NAME
    python ttt_context.py --experiment                 a study of small models
    python ttt_context.py --experiment --full          the same on GPUs

The first two answer before and after the steps, and say what these changed.
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
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

import train
from sample import KVCache, decode_stream, first_ids, is_softmax, read_prompt
from support import distributed, run_folder
from support.cli import option

try:
    from kernels import ttt_context as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # 135 M parameters: it runs on a CPU

# --------------------------------------------------------------------------------------------------
# Attention of spans over a frozen cache


def reference(q, k, v, starts):
    """Compute the attention of S spans of n queries to T shared keys, by its definition.

    q (S, H, n, D), k and v (Hkv, T, D), starts (S) -> (S, H, n, D), in any dtype.
    Query r of span s is at position starts[s] + r and sees the keys up to that position.
    """
    S, H, n, D = q.shape
    Hkv, T, _ = k.shape
    k = k.repeat_interleave(H // Hkv, dim=0)  # (H, T, D)
    v = v.repeat_interleave(H // Hkv, dim=0)

    positions = starts.to(q.device)[:, None] + torch.arange(n, device=q.device)  # (S, n)
    is_future = torch.arange(T, device=q.device) > positions[:, None, :, None]  # (S, 1, n, T)
    scores = q @ k.transpose(1, 2) * D**-0.5  # (S, H, n, T)
    return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v


@dataclass
class FrozenCache:
    """One layer's keys and values of a prompt, which S spans of the prompt attend to."""

    k: torch.Tensor  # (Hkv, T, D)
    v: torch.Tensor  # (Hkv, T, D)
    starts: torch.Tensor  # (S), on the CPU: the first position of each span
    use_kernel: bool  # compute softmax attention with kernels/ttt_context.py, on a GPU

    def attend(self, module, heads):
        """Return the attention of a layer to the frozen keys and values, (S, H, n, D).

        module: the layer's train.Attention. heads: its q (S, H, n, D), and k and v of the spans,
        which are not used.
        """
        q = heads[0]
        if self.use_kernel:
            return kernel.span_attention(q, self.k, self.v, self.starts)

        # attention functions take the queries as the last positions, so the keys of each span
        # have to end where the span ends
        outputs = []
        for q_span, start in zip(q.split(1), self.starts.tolist()):
            end = start + q.shape[2]
            k = self.k[None, :, :end]  # (1, Hkv, end, D)
            v = self.v[None, :, :end]
            outputs.append(module.function(q_span, k, v, **module.options))
        return torch.cat(outputs)


def can_use_kernel(model):
    """Return whether kernels/ttt_context.py can compute the attention of this model."""
    weight = model.embed_tokens.weight
    if not weight.is_cuda or model.dtype == torch.float64 or not is_softmax(model.config):
        return False
    if kernel is not None and model.config.head_dim in kernel.WIDTHS:
        return True
    reason = "pip install triton" if kernel is None else f"head dim {model.config.head_dim}"
    warnings.warn(f"span attention runs in PyTorch, which is slower: {reason}")
    return False


@torch.no_grad()
def prefill(model, ids, room=0):
    """Compute the keys and values of a prompt, ids (T), with untrained queries.

    Returns caches, a KVCache per layer with room for `room` more tokens, and kv, their keys and
    values of the prompt: a pair of views (Hkv, T, D) per layer.
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
    """Return the mean next-token loss, in nats, on spans of n tokens of a text.

    kv: the frozen keys and values of each layer, from `prefill`. ids (T): the text.
    starts (S), on the CPU: the first position of each span. The last one may be T - n - 1, because
    the last token of a span needs a token after it as its target.

    The layers also compute keys and values of the spans, which are not used. In Qwen3-4B this is
    3% of a step's FLOPs.
    """
    T = len(ids)
    if n < 1 or len(starts) == 0 or int(starts.min()) < 0 or int(starts.max()) + n >= T:
        raise ValueError(
            f"spans of {n} tokens at {starts.tolist()} do not fit: they need {n} tokens of a text "
            f"of {T}, and the one after them"
        )
    positions = (starts[:, None] + torch.arange(n)).to(ids.device)  # (S, n)
    c = model.config
    cos, sin = train.rope_angles(0, T, c.head_dim, c.rope_theta, ids.device)  # (T, 1, D/2)

    # run the model's own layers on the spans, with the frozen cache in place of their keys
    x = model.embed_tokens(ids[positions]).to(model.dtype)  # (S, n, C)
    use_kernel = can_use_kernel(model)
    for layer, (k, v) in zip(model.layers, kv, strict=True):
        cache = FrozenCache(k, v, starts, use_kernel)
        x = layer(x, cos[positions], sin[positions], cache)
    x = model.norm(x).flatten(0, 1)  # (S * n, C)

    weight = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight  # (V, C)
    return train.linear_cross_entropy(x, weight, ids[positions + 1].flatten())


# --------------------------------------------------------------------------------------------------
# Training the queries


@contextmanager
def trainable_queries(model):
    """Freeze the model except for W_Q, and yield the list of the W_Q of all layers.

    Inside the `with` block W_Q is a copy in float32, or float64 if the model is. At its end, also
    after an error, the model gets its original tensors back.
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
    """Return where the held-out spans begin and where training spans may begin, n tokens each.

    T: tokens of the text. Up to 8 spans are held out, evenly spaced and at most an eighth of the
    text, but at least one if T > 3 n. Training spans share no token with them.
    """
    n_held_out = min(8, (T - 1) // (8 * n))
    if n_held_out == 0 and T > 3 * n:
        n_held_out = 1
    last_start = T - 1 - n  # the last target of this span is the last token of the text
    held_out = [round((i + 0.5) / n_held_out * last_start) for i in range(n_held_out)]
    held_out = torch.tensor(held_out, dtype=torch.int64)
    starts = torch.arange(last_start + 1)
    distances = (starts[:, None] - held_out).abs()  # (starts, held-out spans)
    return held_out, starts[(distances >= n).all(dim=1)]


def train_queries(model, weights, kv, ids, starts, *, steps=32, n=128, batch=1, lr=1e-5, seed=0):
    """Train `weights` with AdamW on `batch` random spans of n tokens per step; yield each loss.

    weights: tensors that require a gradient, usually those of `trainable_queries`.
    starts: the first positions of the spans to draw from.
    Raises FloatingPointError if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)

    # seed the draws with the text as well, so that each text gets draws of its own
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
def adapt(model, kv, ids, starts=None, *, steps=32, **options):
    """Train the queries on a prompt, and let the model use them inside the `with` block.

    kv: from `prefill`. starts: the first positions of the spans to train on, by default all.
    options: n, batch, lr and seed of `train_queries`. Yields the trained W_Q of each layer.
    """
    if starts is None:
        starts = torch.arange(len(ids) - options.get("n", 128))
    with trainable_queries(model) as weights:
        losses = train_queries(model, weights, kv, ids, starts, steps=steps, **options)
        bar = tqdm(losses, total=steps, unit="step", desc="adapting")
        for loss in bar:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        yield weights


@torch.no_grad()
def answer(model, caches, T, question, n, limit=None):
    """Answer a question about the T tokens of a prompt, greedily: yield n token ids.

    caches: from `prefill`. question: token ids, at least one. limit: the vocabulary size without
    padding.
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
# The command


@dataclass
class AdaptConfig:
    """Adapting and answering"""

    prompt: str = option("", "the context, a text file", metavar="FILE")
    question: str = option("", "about the context; default: continue where it ends")
    init: str = option("", "run, folder or ORG/NAME; default: SmolLM2-135M-Instruct or a run")
    steps: int = option(32, "AdamW steps", least=0)
    span: int = option(128, "tokens of a span")
    batch_spans: int = option(1, "spans per step")
    lr: float = option(None, "learning rate; default: 1e-3 for a run, else 1e-5", least=0)
    seed: int = option(1337, "draws the spans, together with the text", least=0)
    max_tokens: int = option(100, "longest answer")
    device: str = option("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    dtype: str = option("", "default: bf16 on a GPU that has it", choices=list(train.DTYPES))
    experiment: bool = option(False, "run the study instead", action=cli.SWITCH)
    full: bool = option(False, "with --experiment: its study on GPUs", action=cli.SWITCH)
    minutes: float = option(None, "with --full: stop after so many; the same command continues")
    out: str = option("results", "folder for what --experiment finds")

    def __post_init__(self):
        cli.check_fields(self)
        if not self.prompt and not self.experiment:
            raise ValueError("give --prompt FILE, the text to adapt to, or --experiment")
        if self.full and not self.experiment:
            raise ValueError("--full is the size of a study; give it with --experiment")


def encode_prompt(tokenizer, prompt, question=""):
    """Return the token ids of the context and of the question.

    With a chat template, both are one user message. The question begins where the tokens differ
    from those of the same message without it. Otherwise, both are plain text. If the question is
    empty, the last token of the prompt takes its place.
    """
    if question and getattr(tokenizer, "chat_template", None):
        content = f"{prompt}\n\n"
        ids = tokenizer.chat([{"role": "user", "content": content + question}])
        without_question = tokenizer.chat([{"role": "user", "content": content}])
        n_context = len(os.path.commonprefix([ids, without_question]))
    else:
        context = [*first_ids(tokenizer), *tokenizer.encode_ordinary(prompt)]
        ids = [*context, *tokenizer.encode_ordinary(question)]
        n_context = len(context) if question else len(context) - 1
    if n_context == len(ids):
        raise ValueError("nothing of --question is left in the tokens; ask it in other words")
    ids = [int(i) for i in ids]  # some tokenizers return NumPy integers
    return ids[:n_context], ids[n_context:]


def find_model(args):
    """Return the folder of the model to adapt: --init, or DEFAULT_MODEL, or the newest run."""
    try:
        return run_folder.find_run(args.init or DEFAULT_MODEL)
    except ValueError as error:
        if args.init:
            raise
        print(f"using the newest run: {error}", file=sys.stderr)
        return run_folder.find_run("newest")


def compare(model, tokenizer, ids, question, args):
    """Answer before and after training the queries. Return answers, held-out losses and seconds.

    ids (T): the prompt. question: token ids. args: an AdaptConfig.
    """
    T = len(ids)
    n = args.span
    held_out, starts = split_spans(T, n)
    with tqdm(total=len(model.layers), unit="layer", desc="reading") as bar:

        def show_layer(layer, inputs, x):
            x[0, -1, 0].item()  # wait for the device
            bar.update()

        hooks = [layer.register_forward_hook(show_layer) for layer in model.layers]
        caches, kv = prefill(model, ids, room=len(question) + args.max_tokens)
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def evaluate():
        """Return the answer, and the loss on the held-out spans or None if there are none."""
        loss = None
        if len(held_out):
            loss = span_loss(model, kv, ids, held_out, n).item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss on held-out spans is {loss}")
        tokens = answer(model, caches, T, question, args.max_tokens, tokenizer.n_vocab)
        return "".join(decode_stream(tokens, tokenizer)), loss

    result = {"held_out_spans": len(held_out)}
    result["plain"], result["held_out_before"] = evaluate()
    options = {"n": n, "batch": args.batch_spans, "lr": args.lr, "seed": args.seed}
    start_time = time.perf_counter()
    with adapt(model, kv, ids, starts, steps=args.steps, **options):
        result["seconds"] = time.perf_counter() - start_time
        result["adapted"], result["held_out_after"] = evaluate()
    return result


def report(result):
    """Print the answers, what the steps cost, and whether they changed anything."""
    print(f"--- as it is\n{result['plain']}")
    print(f"--- with queries trained on this prompt\n{result['adapted']}\n---")
    print(
        f"{result['steps']} steps in {result['seconds']:.2f} s; as many FLOPs "
        f"({result['flops']:.3g}) as {result['thinking_tokens']:,} tokens of thinking"
    )
    changed = [] if result["plain"] == result["adapted"] else ["the answer"]
    losses = "the prompt is too short for held-out spans"
    if result["held_out_spans"]:
        before = f"{result['held_out_before']:.4f}"
        after = f"{result['held_out_after']:.4f}"
        changed += [] if before == after else ["the held-out loss"]
        losses = f"{before} before, {after} after, nats/token; spans: {result['held_out_spans']}"
    print(f"this training changed {' and '.join(changed) or 'nothing'} ({losses})")


def run(args):
    """Adapt to --prompt. Print and return answers before and after, losses and costs."""
    from experiments import ttt_cost

    # load the prompt and the model
    prompt = read_prompt(f"@{args.prompt}")
    device = distributed.pick_device(args.device)
    dtype = train.DTYPES[distributed.pick_dtype(args.dtype, device)]
    folder = find_model(args)
    model, tokenizer = train.load_model(folder, device, dtype)
    context, question = encode_prompt(tokenizer, prompt, args.question)
    T = len(context)
    if T <= args.span:
        raise ValueError(
            f"{args.prompt} has {T} tokens, not more than --span {args.span}; give a longer text"
        )
    ttt_cost.check_memory(model, T + args.max_tokens, args.span * args.batch_spans)
    if args.lr is None:  # models from elsewhere have trained for longer and need smaller steps
        args.lr = 1e-3 if (folder / "ckpt.pt").is_file() else 1e-5

    counts = f"{T:,} tokens of prompt, {len(question)} of question"
    limit = f"the model was trained on up to {model.config.block_size:,} tokens"
    print(f"{folder} on {device}: {counts}; {limit}", file=sys.stderr)

    # compare the answers, and convert the FLOPs of the steps to tokens of thinking
    result = compare(model, tokenizer, torch.tensor(context, device=device), question, args)
    flops = ttt_cost.flops_of_spans(model, args.steps * args.batch_spans * args.span, T)
    thinking_tokens = ttt_cost.thinking_tokens(model, T + len(question), flops)
    result |= {"flops": flops, "thinking_tokens": thinking_tokens}
    result |= {"context": T, "lr": args.lr, "steps": args.steps}
    report(result)
    return result


def main(argv=None):
    (args,) = cli.parse_configs(argv, __doc__, [AdaptConfig], {}, lambda given: {})
    if args.experiment:
        from experiments import ttt_context as experiment

        flags = ["--out", args.out]
        if args.full:
            flags.append("--full")
        if args.init:
            flags += ["--init", args.init]
        if args.minutes:
            flags += ["--minutes", str(args.minutes)]
        return experiment.main(flags)
    return run(args)


if __name__ == "__main__":
    cli.run_main(main)
