"""Query-only test-time training on a long prompt (arXiv 2512.13898).

A long context dilutes softmax attention. One relevant key among T (the needle)
gets at least probability 1 - e if its logit z_* exceeds every other logit z_j
by a margin that grows with T:

    z_* - z_j >= log((T - 1) (1 - e) / e)

The paper (Bansal et al.) argues that thinking longer helps little, since each
new token reads the context through the same attention. It spends that compute
on the queries instead:

    1. Read the prompt once, and freeze its keys and values.
    2. Take a few AdamW steps on the query projections W_Q of all layers. The
       loss is next-token prediction on random spans of n tokens of the prompt:
       loss(t) = -1/n sum_{i=t}^{t+n-1} log p(x_{i+1} | x_{<=i})
    3. Answer from the same KV cache, then restore W_Q bit for bit.

Let p_j be the attention of a query q of width D to key k_j. If the loss were
-log p_*, a step would move q away from the mean key and towards the needle:

    d(-log p_*) / dq = (sum_j p_j k_j - k_*) / sqrt(D)

With 32 steps and n = 128, Qwen3-4B's accuracy on LongBench-v2 rose from 27.0 to
39.6 in the paper, and to 33.5 with thinking. Others found that random spans
hurt (arXiv 2607.09415). There is no proof that the margin grows at the answer.

Where the paper is silent, we choose: spans use the keys and values of the
cache even for their own tokens. W_Q is trained in float32, since bfloat16 would
lose small steps. No span covers the question. Up to 8 spans are not trained on;
the loss on these held-out spans is reported.

    python ttt_context.py --prompt my.txt --question "Who is the narrator?"
    python ttt_context.py --prompt my.txt --init newest    your own newest run
    python ttt_context.py --experiment                     20 minutes on a CPU
    python ttt_context.py --experiment --full              and on GPUs
    python ttt_context.py --experiment --help              its options
"""

from support import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # Ctrl-C during the imports

import hashlib
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

import train
from sample import decode_stream, first_ids, is_softmax, last_logits, read_prompt
from support import distributed, run_folder
from support.cli import option
from support.kv_cache import KVCache

try:
    from kernels import ttt_context as kernel
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernel = None  # then the attention of spans runs in PyTorch

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # small enough for a CPU
# Most FLOPs of one attention call while a prompt is read on a CPU: about two seconds on two cores.
# Python handles Ctrl-C only between calls.
FLOPS_PER_CALL = 8e10

# --------------------------------------------------------------------------------------------------
# Attention of spans over a frozen cache


def reference(q, k, v, starts):
    """Compute the attention of S spans of n queries to T shared keys, by its definition.

    q (S, H, n, D), k and v (Hkv, T, D), starts (S) -> (S, H, n, D), in any dtype.
    Query i of span s is at position starts[s] + i and sees the keys up to that position. Each key
    head serves H / Hkv query heads.
    """
    S, H, n, D = q.shape
    Hkv, T, _ = k.shape
    k = k.repeat_interleave(H // Hkv, dim=0)  # (H, T, D)
    v = v.repeat_interleave(H // Hkv, dim=0)

    query_positions = starts.to(q.device)[:, None] + torch.arange(n, device=q.device)  # (S, n)
    key_positions = torch.arange(T, device=q.device)
    is_future = key_positions > query_positions[:, None, :, None]  # (S, 1, n, T): the causal mask
    scores = q @ k.transpose(1, 2) * D**-0.5  # (S, H, n, T)
    return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v


@dataclass
class FrozenCache:
    """One layer's keys and values of a prompt, to which S spans of the prompt attend."""

    k: torch.Tensor  # (1, Hkv, T, D)
    v: torch.Tensor  # (1, Hkv, T, D)
    starts: torch.Tensor  # (S), on the CPU: the first position of each span
    use_kernel: bool  # compute softmax attention on a GPU with kernels/ttt_context.py

    def attend(self, attention, heads):
        """Return the attention of the spans to the frozen keys and values, (S, H, n, D).

        attention: the layer's train.Attention. heads: q (S, H, n, D) of the spans, then their own
        k and v, which are not used.
        """
        q = heads[0]
        if self.use_kernel:
            return kernel.span_attention(q, self.k[0], self.v[0], self.starts)

        # attention functions assume that the queries are at the last positions, so take one span at
        # a time and cut off the keys after it
        outputs = []
        for q_span, start in zip(q.split(1), self.starts.tolist()):  # q_span (1, H, n, D)
            end = start + q.shape[2]
            k = self.k[:, :, :end]
            v = self.v[:, :, :end]
            outputs.append(attention.function(q_span, k, v, **attention.options))
        return torch.cat(outputs)


def can_use_kernel(model):
    """Return whether kernels/ttt_context.py can compute the attention of this model."""
    is_on_gpu = model.embed_tokens.weight.is_cuda
    if kernel is None or not is_on_gpu or model.dtype == torch.float64:
        return False
    return is_softmax(model.config) and model.config.head_dim in kernel.WIDTHS


def split_prompt(model, ids):
    """Split a prompt, ids (T), into the pieces that `prefill` reads in one forward pass each.

    On a GPU it is one piece. On a CPU the pieces get shorter towards the end of the prompt, so that
    all have about the same number of pairs of a query and a key.
    """
    if ids.device.type != "cpu":
        return [ids]
    T = len(ids)
    flops = 2 * model.config.n_head * model.config.head_dim * T**2  # of one layer's attention
    n = math.ceil(flops / FLOPS_PER_CALL)
    # causal attention of the first t tokens has t^2 / 2 pairs
    boundaries = [round(T * math.sqrt(i / n)) for i in range(1, n)]
    return ids.tensor_split(boundaries)


@torch.no_grad()
def prefill(model, ids, room=0):
    """Run the model on a prompt, ids (T), and return the KVCache of each layer.

    room: how many more tokens the caches can hold.
    """
    for layer in model.layers:
        attention = layer.self_attn
        if attention.inputs != ["q", "k", "v"] or any(attention.windows):
            raise ValueError(
                f"{model.config.attn} attention does not keep a key and a value of every position, "
                f"which query-only training needs; use a model with softmax attention"
            )
    caches = [KVCache(len(ids) + room) for _ in model.layers]
    for piece in split_prompt(model, ids):
        model(piece[None], cache=caches)
    return caches


def span_loss(model, caches, ids, starts, n):
    """Return the mean next-token loss, in nats, on S spans of n tokens of a prompt.

    caches: from `prefill`. ids (T): the prompt.
    starts (S), on the CPU: the first position of each span. The largest one allowed is T - n - 1,
    because the last token of a span needs a token after it as its target.
    """
    T = len(ids)
    if n < 1 or len(starts) == 0 or starts.min() < 0 or starts.max() + n >= T:
        raise ValueError(f"spans of {n} tokens at {starts.tolist()} do not fit in a text of {T}")

    # the position of each token, and the RoPE angles of all T positions
    positions = (starts[:, None] + torch.arange(n)).to(ids.device)  # (S, n)
    config = model.config
    cos, sin = train.rope_angles(0, T, config.head_dim, config.rope_theta, ids.device)

    # Run the layers on the spans, with attention to the frozen cache. They also compute keys and
    # values of the spans, which are not used. In Qwen3-4B these are 2% of the FLOPs of a step.
    x = model.embed_tokens(ids[positions]).to(model.dtype)  # (S, n, C)
    use_kernel = can_use_kernel(model)
    for layer, cache in zip(model.layers, caches, strict=True):
        frozen = FrozenCache(*cache.tensors, starts, use_kernel)
        x = layer(x, cos[positions], sin[positions], frozen)
    x = model.norm(x).flatten(0, 1)  # (S * n, C)

    output_layer = model.embed_tokens if model.lm_head is None else model.lm_head
    targets = ids[positions + 1].flatten()  # (S * n)
    return train.linear_cross_entropy(x, output_layer.weight, targets)


# --------------------------------------------------------------------------------------------------
# Training the queries


@contextmanager
def trainable_queries(model):
    """Freeze all but the query projections, and yield the list of W_Q, one for each layer.

    Inside the `with` block each W_Q is a copy in float32, or float64 if the model is. When the
    block ends, even with an error, the model gets its original tensors back.
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
    """Return the starts of the held-out spans, and all starts allowed for training, as tensors.

    T: tokens of the prompt. n: tokens of a span. As many spans as fit in an eighth of the prompt
    are held out, at least one and at most 8, evenly spaced. Training spans do not overlap them.
    """
    if T <= 3 * n:
        raise ValueError(
            f"the prompt has {T} tokens, which is too short for spans of {n}; give one of more "
            f"than {3 * n} tokens, or a smaller --span"
        )
    last_start = T - 1 - n  # the last target of this span is the last token of the prompt
    n_held_out = max(1, min(8, (T - 1) // (8 * n)))
    held_out = [round((i + 0.5) / n_held_out * last_start) for i in range(n_held_out)]
    held_out = torch.tensor(held_out)

    # training spans start at least n positions before or after each held-out span
    starts = torch.arange(last_start + 1)
    distances = (starts[:, None] - held_out).abs()  # (starts, held-out spans)
    is_allowed = (distances >= n).all(dim=1)
    return held_out, starts[is_allowed]


def train_queries(
    model, weights, caches, ids, starts, *, steps=32, n=128, batch=1, lr=3e-5, seed=0
):
    """Train `weights` with AdamW, `batch` random spans of n tokens per step; yield each loss.

    weights: tensors that require a gradient, usually those of `trainable_queries`.
    caches, ids: as for `span_loss`. starts: all span starts that may be drawn.
    Raises FloatingPointError if a loss is not finite.
    """
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)

    # the random seed depends on the prompt, so different prompts get different spans
    digest = hashlib.sha256(f"{seed}/{ids.tolist()}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))

    for _ in range(steps):
        drawn = torch.randint(len(starts), (batch,), generator=generator)  # indices into starts
        loss = span_loss(model, caches, ids, starts[drawn], n)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        loss = loss.item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss on a span is {loss}; try a smaller --lr")
        yield loss


@contextmanager
def adapt(model, caches, ids, starts, *, steps=32, **options):
    """Train the queries on a prompt, and let the model use them inside the `with` block.

    All arguments are those of `train_queries`. Yields the trained W_Q of each layer.
    """
    with trainable_queries(model) as weights:
        losses = train_queries(model, weights, caches, ids, starts, steps=steps, **options)
        bar = tqdm(losses, total=steps, unit="step", desc="adapting")
        for loss in bar:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        yield weights


@torch.no_grad()
def answer(model, caches, T, question, n_tokens, limit=None):
    """Answer a question about a prompt of T tokens by greedy decoding: yield n_tokens token ids.

    caches: from `prefill`; they may still hold an earlier question and its answer.
    question: a list of token ids, at least one. limit: the vocabulary size without padding.
    """
    for cache in caches:
        cache.length = T  # forget all that came after the prompt
    ids = question  # the tokens that are not in the caches yet
    for _ in range(n_tokens):
        token = int(last_logits(model, ids, caches)[:limit].argmax())
        yield token
        ids = [token]


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
    lr: float = option(None, "learning rate; default: 1e-3 for a run, else 3e-5", least=0)
    seed: int = option(1337, "draws the spans, together with the text", least=0)
    max_tokens: int = option(100, "longest answer")
    device: str = option("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    dtype: str = option("", "default: bf16 on a GPU that has it", choices=list(train.DTYPES))

    def __post_init__(self):
        cli.check_fields(self)
        if not self.prompt:
            raise ValueError("give --prompt FILE, the text to adapt to, or --experiment")


def encode_prompt(tokenizer, prompt, question=""):
    """Return the token ids of the context, and those of the question.

    With a chat template, both together are one user message. Otherwise both are plain text. The
    question has at least the last token, because decoding starts from a token that is not in the
    cache of the context.
    """
    if question and getattr(tokenizer, "chat_template", None):
        # the context is what the tokens have in common with those of a message without the
        # question; commonprefix is meant for paths, but takes any lists
        content = f"{prompt}\n\n"
        ids = tokenizer.chat([{"role": "user", "content": content + question}])
        without_question = tokenizer.chat([{"role": "user", "content": content}])
        context = os.path.commonprefix([ids, without_question])
    else:
        context = [*first_ids(tokenizer), *tokenizer.encode_ordinary(prompt)]
        ids = [*context, *tokenizer.encode_ordinary(question)]
    n_context = min(len(context), len(ids) - 1)
    ids = [int(i) for i in ids]  # some tokenizers return NumPy integers
    return ids[:n_context], ids[n_context:]


def find_model(init):
    """Return the folder of a model: `init`, or by default SmolLM2, or offline the newest run."""
    try:
        return run_folder.find_run(init or DEFAULT_MODEL)
    except ValueError as error:
        if init:
            raise
        print(f"using the newest run: {error}", file=sys.stderr)
        return run_folder.find_run("newest")


@contextmanager
def progress_of_layers(model, n_passes, label):
    """Show a progress bar of the layers during n_passes forward passes inside the `with` block."""
    with tqdm(total=n_passes * len(model.layers), unit="layer", desc=label) as bar:

        def show(layer, inputs, x):
            x[0, -1, 0].item()  # wait until the device has computed this layer
            bar.update()

        hooks = [layer.register_forward_hook(show) for layer in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def compare(model, tokenizer, ids, question, args):
    """Answer a question before and after training the queries on the prompt.

    ids (T): the prompt. question: token ids. args: an AdaptConfig.
    Returns the answers "plain" and "adapted", the losses on the held-out spans "held_out_before"
    and "held_out_after", the number of these spans and the "seconds" of training.
    """
    T = len(ids)
    held_out, starts = split_spans(T, args.span)
    with progress_of_layers(model, len(split_prompt(model, ids)), "reading"):
        caches = prefill(model, ids, room=len(question) + args.max_tokens)

    @torch.no_grad()
    def evaluate():
        tokens = answer(model, caches, T, question, args.max_tokens, tokenizer.n_vocab)
        text = "".join(decode_stream(tokens, tokenizer))
        return text, span_loss(model, caches, ids, held_out, args.span).item()

    result = {"held_out_spans": len(held_out)}
    result["plain"], result["held_out_before"] = evaluate()
    options = {"n": args.span, "batch": args.batch_spans, "lr": args.lr, "seed": args.seed}
    start_time = time.perf_counter()
    with adapt(model, caches, ids, starts, steps=args.steps, **options):
        result["seconds"] = time.perf_counter() - start_time
        result["adapted"], result["held_out_after"] = evaluate()
    return result


def run(args):
    """Adapt to --prompt. Print and return the answers before and after, losses and costs."""
    from experiments import ttt_cost

    # load the prompt and the model
    prompt = read_prompt(f"@{args.prompt}")
    device = distributed.pick_device(args.device)
    dtype = train.DTYPES[distributed.pick_dtype(args.dtype, device)]
    folder = find_model(args.init)
    model, tokenizer = train.load_model(folder, device, dtype)
    context, question = encode_prompt(tokenizer, prompt, args.question)
    T = len(context)
    ttt_cost.check_memory(model, T + args.max_tokens, args.span * args.batch_spans)
    if args.lr is None:  # models from elsewhere have trained for longer and need smaller steps
        args.lr = 1e-3 if (folder / "ckpt.pt").is_file() else 3e-5

    counts = f"{T:,} tokens of prompt, {len(question)} of question"
    limit = f"the model was trained on up to {model.config.block_size:,} tokens"
    print(f"{folder} on {device}: {counts}; {limit}", file=sys.stderr)

    # compare the answers, and count how many tokens of thinking take as many FLOPs as the steps
    result = compare(model, tokenizer, torch.tensor(context, device=device), question, args)
    flops = ttt_cost.flops_of_spans(model, args.steps * args.batch_spans * args.span, T)
    thinking_tokens = ttt_cost.thinking_tokens(model, T + len(question), flops)
    result |= {"context": T, "lr": args.lr, "flops": flops, "thinking_tokens": thinking_tokens}

    print(f"--- as it is\n{result['plain']}")
    print(f"--- with queries trained on this prompt\n{result['adapted']}\n---")
    cost = f"{args.steps} steps in {result['seconds']:.2f} s"
    print(f"{cost}; as many FLOPs ({flops:.3g}) as {thinking_tokens:,} tokens of thinking")
    answers = "the same answer" if result["plain"] == result["adapted"] else "another answer"
    print(
        f"training gave {answers}; the loss on {result['held_out_spans']} held-out spans "
        f"went from {result['held_out_before']:.4f} to {result['held_out_after']:.4f}"
    )
    return result


def main(argv=None):
    """Adapt to a prompt. After --experiment come the flags of experiments/ttt_context.py."""
    argv = sys.argv[1:] if argv is None else argv
    if "--experiment" in argv:
        from experiments import ttt_context as study

        return study.main([flag for flag in argv if flag != "--experiment"])
    # no flag names a plug-in, and no flag changes the defaults of others
    (args,) = cli.parse_configs(argv, __doc__, [AdaptConfig], {}, lambda given: {})
    return run(args)


if __name__ == "__main__":
    cli.run_main(main)
