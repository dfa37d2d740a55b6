"""Query-only test-time training on a long prompt: "Let's (not) just put things in Context" (Bansal et al., arXiv 2512.13898).

The longer the context, the thinner softmax attention spreads: m distractors within D of the needle's logit leave it at most
1 / (1 + m exp(-D)). A mass of 1 - e on one of T keys takes a margin

    z_needle - z_j >= log((T - 1)(1 - e) / e)          which grows with log T, while the weights stay as they are,

and tokens spent on thinking read through the same diluted attention. The paper spends them on the queries instead: read the
prompt once, freeze every key and value, take a few AdamW steps on the query projections W_Q of all layers with the ordinary
next-token loss on random spans of the prompt, and answer with them from the old cache. For l = -log p_needle

    dl/dq = (sum_j p_j k_j - k_needle) / sqrt(D)       a step moves a query from the mean key to the needle, most where p is flat.

    loss(t) = -1/n sum_{i=t}^{t+n-1} log p(x_{i+1} | x_{<=i})      queries i from W_Q, keys and values j <= i from the cache

32 steps, n = 128, t uniform, weight decay 0.01, gradients clipped to 1. The authors report, for Qwen3-4B, LongBench-v2 27.0 in
context, 33.5 thinking, 39.6 so; others found spans drawn at random to hurt (arXiv 2607.09415). The lemmas are about a known
needle and a free query; nothing proves a larger margin where the answer is read, and a norm after W_Q (Qwen3) takes sharpness away.

What the paper leaves open is done like this. The span's own keys and values come from the cache too. W_Q is at least float32: at
a learning rate of 1e-5 a bfloat16 weight would not move. The question is no part of the spans; it is read with the new W_Q. Up
to 8 spans, an eighth of the prompt, are held out to tell what was learned: no span trained on shares a target with them.

    python ttt_context.py --prompt my.txt --question "..."              the newest run under out/, or one made now
    python ttt_context.py --prompt my.txt --question "..." --init DIR   a run, or a Hugging Face folder
    python ttt_context.py --experiment                                  below, in two to four minutes on two CPU cores -> results/ttt_context-cpu.*
    python ttt_context.py --full                                        to 32k tokens on one GPU -> results/ttt_context-h200.*
    python ttt_context.py --full --init DIR                             needles in real text -> results/ttt_context-needles.*
    python ttt_context.py --bench                                       steps beside tokens of thinking -> results/ttt_context-bench.json

In the experiment small models, trained on short streams, answer questions about long ones. Where length only dilutes, one fitted
temperature a head beats trained queries, by far if a norm follows W_Q; where what to look for differs from context to context queries
win, unless there is such a norm, and another context's queries do harm if there something else counts.

The model is afterwards what it was, bit for bit. Exit status 2: bad input, one sentence says what.
"""
import bisect, functools, hashlib, itertools, json, math, multiprocessing, os, random, re, shutil, statistics, sys, time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from train import DTYPES, Cache, Interrupt, LinearCrossEntropy, atomic, beginning, fail, rotary, rotate, softmax_attention, timed

try:
    from kernels import ttt_context as kernel
except ModuleNotFoundError as e:
    if e.name != "triton":
        raise
    kernel = None


def reference(q, k, v, start):
    """The definition, any dtype. q (S, H, n, D): query r of span s stands at start[s] + r and sees the keys up to there; k, v
    (Hkv, T, D) are shared; start (S) -> (S, H, n, D). Makes (S, H, n, T) tensors."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[0], 0) for t in (k, v))                # (H, T, D)
    at = start.to(q.device)[:, None] + torch.arange(q.shape[2], device=q.device)             # (S, n)
    unseen = torch.arange(k.shape[1], device=q.device) > at[:, None, :, None]                # (S, 1, n, T)
    return (q @ k.transpose(1, 2) * q.shape[3] ** -0.5).masked_fill(unseen, -torch.inf).softmax(-1) @ v


@functools.cache
def degrade(reason):
    print(f"spans take PyTorch's slower way: {reason}", file=sys.stderr)


def attend(attention, q, k, v, start):
    """As `reference`, with any attention, a partial of a function whose queries are the last of its keys: the Triton kernel for
    softmax on a GPU, else one call a span, over a view of the keys up to its end."""
    if q.is_cuda and attention.func is softmax_attention and q.dtype != torch.float64:
        if kernel and q.shape[3] in kernel.WIDTHS:
            return kernel.span_attention(q, k, v, start)
        degrade(f"the kernel has no heads of width {q.shape[3]}" if kernel else "there is no Triton here (pip install triton)")
    n = q.shape[2]
    return torch.cat([attention(q[s:s + 1], k[None, :, :t + n], v[None, :, :t + n]) for s, t in enumerate(start.tolist())])


@torch.no_grad()
def prefill(model, ids, room=0):
    """Read ids (T) -> for each layer its Cache, with room for as many tokens more, and a view of what it holds: T keys and values,
    (Hkv, T, D) each."""
    for layer in model.layers:
        if layer.self_attn.names != ["q", "k", "v"] or any(layer.self_attn.windows):
            raise ValueError(f"{model.cfg.attn} attention does not keep a key and a value of every position, which is what the "
                             f"queries are trained against; use a model with softmax attention")
    cache = [Cache(len(ids) + room) for _ in model.layers]
    model(ids[None], cache=cache)
    return cache, [tuple(t[0, :, :len(ids)] for t in layer.kept) for layer in cache]


def span_loss(model, kv, ids, start, n):
    """-> mean loss over the targets ids[t + 1 : t + n + 1] of the spans that begin at t in start (S), on the CPU, given frozen
    keys and values; ids (T), T > t + n. Nothing but the queries depends on the weights of the attention's projections."""
    at = (start[:, None] + torch.arange(n)).to(ids.device)                                   # (S, n)
    x = model.embed_tokens(ids[at]).to(model.dtype)                                          # (S, n, C)
    angles = [rotary(t, n, model.cfg.head_dim, model.cfg.rope_theta, ids.device) for t in start.tolist()]
    cos, sin = (torch.stack(one) for one in zip(*angles))                                    # (S, n, 1, D / 2)
    for layer, (k, v) in zip(model.layers, kv):
        a = layer.self_attn
        q = a.q_norm(a.q_proj(layer.input_layernorm(x)).unflatten(-1, (-1, a.head_dim)))     # (S, n, H, D)
        q = (rotate(q, cos, sin) if "q" in a.rotary else q).transpose(1, 2)                  # (S, H, n, D)
        y = attend(a.attention, q, k, v, start)                                              # (S, H, n, D)
        x = x + a.o_proj(y.transpose(1, 2).flatten(2))                                       # (S, n, C)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    weight = (model.lm_head or model.embed_tokens).weight                                    # (V, C)
    return LinearCrossEntropy.apply(model.norm(x).flatten(0, 1), weight, ids[at + 1].flatten(), torch.is_grad_enabled())


@contextmanager
def queries(model):
    """All is frozen but the W_Q of each layer, which is a copy in at least float32: -> [W_Q]. At the end, come what may, the model
    has its own tensors back."""
    was = [(p, p.data, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        weights = [layer.self_attn.q_proj.weight for layer in model.layers]
        for w in weights:
            w.data = w.data.to(torch.promote_types(w.dtype, torch.float32), copy=True)
            w.requires_grad_(True)
        yield weights
    finally:
        for p, data, trained in was:
            p.data, p.grad = data, None
            p.requires_grad_(trained)


def spans(T, n, most=8):
    """-> starts (M) of the spans of n that are held out, evenly spread over T tokens, an eighth of them at most; one, if there is room
    for any; and every start of a span whose targets exist and are none of those held out."""
    many = min(most, max((T - 1) // (8 * n), T > 3 * n))
    held = torch.tensor([round((i + 0.5) / many * (T - 1 - n)) for i in range(many)], dtype=torch.int64)
    start = torch.arange(T - n)
    return held, start[((start[:, None] - held).abs() >= n).all(1)]


def adapt(model, weights, kv, ids, starts, steps=32, n=128, batch=1, lr=1e-5, seed=0):
    """Train `weights` on random spans, `batch` of them a step, that begin at one of `starts`; yields the loss of each step, which is
    that before it. Equal seeds and texts give equal steps."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    digest = hashlib.sha256(f"{seed}/{ids.tolist()}".encode()).digest()                      # no context shares its draws
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    for _ in range(steps):
        loss = span_loss(model, kv, ids, starts[torch.randint(len(starts), (batch,), generator=draw)], n)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def answer(model, cache, T, question, n, limit=None):
    """Yield the n likeliest tokens, one by one, after a question (ids) that follows the first T positions of the cache."""
    for layer in cache:
        layer.length = T                                             # what a former answer left is overwritten
    ids = list(question)
    for _ in range(n):
        logits = model(torch.tensor([ids], device=model.embed_tokens.weight.device), cache=cache)[0, -1, :limit]
        ids = [int(logits.argmax())]
        yield ids[0]


# ---------------------------------------------------------------------------------------------------------------------
# What it costs. Multiply-adds count two; norms, softmax and the embedding's look-up are left out.

def weights_of(model):
    """-> numbers in all matrices that a token passes, in the W_K and W_V of all layers, in one W_Q; heads times width of all layers
    that attend."""
    c, a = model.cfg, model.layers[0].self_attn
    every = model.embed_tokens.weight.numel() + sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    kv, q = c.n_layer * (a.k_proj.weight.numel() + a.v_proj.weight.numel()), a.q_proj.weight.numel()
    return every, kv, q, c.n_head * c.head_dim * sum(layer.self_attn.logits > 0 for layer in model.layers)


def flops_of_tokens(model, T, n):
    """To write n tokens after T, each of which reads all before it and itself."""
    every, _, _, looks = weights_of(model)
    return n * 2 * every + 4 * looks * (n * T + n * (n + 1) // 2)


def flops_of_spans(model, tokens, T):
    """Forward and backward of so many tokens in spans of a text of T, half of which a token sees in the mean: in the backward pass
    each product once more, for its input, but none for the input of the first layer; W_Q's gradient; of attention S, dP and dQ."""
    every, kv, q, looks = weights_of(model)
    return tokens * (4 * (every - kv) + 2 * (model.cfg.n_layer - 1) * q) + (4 + 6) * looks * (tokens * (T + 1) // 2)


def thinking_tokens(model, T, flops):
    """-> how many tokens could be written after T for at most so many FLOPs."""
    most = int(flops // flops_of_tokens(model, T, 1))                # each later token costs more than the first
    return bisect.bisect_right(range(1, most + 1), flops, key=lambda n: flops_of_tokens(model, T, n))


def free_memory(device):
    """-> bytes that can be had, infinitely many where that is not known."""
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo.read_text())[1])
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# The command

def tokens_of(tokenizer, prompt, question):
    """-> ids of the context and of what is asked: as one message, where there is a chat template; else as text that goes on, and
    without a question the last token of the prompt asks."""
    if question and hasattr(tokenizer, "chat"):
        try:
            both, alone = (tokenizer.chat([{"role": "user", "content": f"{prompt}\n\n{asked}"}]) for asked in (question, ""))
            same = len(os.path.commonprefix([both, alone]))
            return both[:same], both[same:]
        except ValueError:                                           # there is none after all
            pass
    context, asked = ([int(i) for i in tokenizer.encode_ordinary(text)] for text in (prompt, question))
    context = [*beginning(tokenizer), *context]
    return (context, asked) if asked else (context[:-1], context[-1:])


def pick_run(init, device):
    """--init, or the newest run, or the default one, trained now."""
    if not init and not any(Path("out").glob("*/ckpt.pt")):
        print("there is no run under out/ yet, so the default model is trained first", file=sys.stderr)
        signum = train.main(["--sample", "0", *(["--device", device] if device else [])])["signal"]
        if signum:
            raise SystemExit(128 + signum)
    return train.find_run(init)


def command(args, device, dtype):
    """Read --prompt and what else there must be, refuse what cannot work, and run."""
    text = train.read_text(Path(args.prompt))
    if not text:
        none = "no text: what is needed is UTF-8 without NUL bytes"
        fail(f"{args.prompt} is {none if Path(args.prompt).stat().st_size else 'empty'}")
    run = pick_run(args.init, args.device)
    model, tokenizer = train.load_model(run, device, dtype)
    context, asked = tokens_of(tokenizer, text, args.question)
    lr = args.lr if args.lr is not None else 1e-3 if (run / "ckpt.pt").is_file() else 1e-5
    T, n = len(context), args.span
    if T <= n:
        fail(f"{args.prompt} has {T} tokens, and a span takes {n} and one to foresee; give a longer text or a smaller --span")
    c, free = model.cfg, free_memory(device)                         # needed: keys and values, one layer's once more, and its MLP
    one = (2 * (c.n_layer + 1) * c.n_kv_head * c.head_dim + 3 * c.n_hidden + 4 * c.n_embd) * model.dtype.itemsize
    need = one * (T + len(asked) + args.max_tokens)
    if need > free:
        fail(f"{args.prompt} has {T} tokens, to read them takes {need / 2 ** 30:.1f} GB and {free / 2 ** 30:.1f} GB are free; "
             f"give a shorter text")
    print(f"{run} on {device}: {T:,} tokens of context, {len(asked)} to ask", file=sys.stderr)
    if T + len(asked) > c.block_size:
        far = (T + len(asked)) / c.block_size
        print(f"that is {far:.1f} times the {c.block_size:,} tokens the model was trained on", file=sys.stderr)
    try:
        with train.refusing(), Interrupt() as stop:
            return run_on(model, tokenizer, torch.tensor(context, device=device), asked, args, lr, stop)
    except torch.OutOfMemoryError:
        fail("the GPU has too little memory; give a shorter text, or smaller --span and --batch-spans")


def run_on(model, tokenizer, ids, asked, args, lr, stop):
    """Prefill, answer, adapt, answer again; all is printed. ids (T) and asked are token ids."""
    T, n, device, tokens = len(ids), args.span, ids.device, args.steps * args.batch_spans * args.span
    ends, (held, starts) = {tokenizer.eot_token, *getattr(tokenizer, "stops", ())}, spans(T, n)
    (cache, kv), prefill_s = timed(device, lambda: prefill(model, ids, len(asked) + args.max_tokens))

    @torch.no_grad()
    def examined():
        """-> the loss on the spans held out, if there are any, and an answer."""
        loss = sum(span_loss(model, kv, ids, t[None], n).item() for t in held) / len(held) if len(held) else None
        reply = answer(model, cache, T, asked, args.max_tokens, tokenizer.n_vocab)
        kept = list(itertools.takewhile(lambda token: token not in ends and not stop.signal, reply))
        return loss, tokenizer.decode_bytes(kept).decode(errors="replace")

    def learn():
        steps = adapt(model, weights, kv, ids, starts, args.steps, n, args.batch_spans, lr, args.seed)
        with tqdm(steps, total=args.steps, unit="step", desc="adapting", dynamic_ncols=True) as bar:
            for loss in bar:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                if stop.signal:
                    raise SystemExit(128 + stop.signal)

    before, plain = examined()
    with queries(model) as weights:
        first = [w.detach().clone() for w in weights]
        seconds = timed(device, learn)[1]
        after, adapted = examined()
        squares = lambda tensors: sum(float(t.detach().square().sum()) for t in tensors)
        moved = math.sqrt(squares(w - f for w, f in zip(weights, first)) / squares(first))
        if args.save_queries:
            with atomic(Path(args.save_queries)) as f:
                torch.save({f"layers.{i}.self_attn.q_proj.weight": w.detach().cpu() for i, w in enumerate(weights)}, f)
    flops = flops_of_spans(model, tokens, T)
    thinking = thinking_tokens(model, T + len(asked), flops)
    print(f"--- as it is\n{plain}\n--- with queries trained on this prompt\n{adapted}\n---")
    print("held-out spans: none, the prompt is shorter than three spans" if before is None else
          f"loss on {len(held)} held-out spans: {before:.4f} before, {after:.4f} after, {after - before:+.4f} nats/token")
    print(f"{args.steps} steps in {seconds:.2f} s after a prefill of {prefill_s:.2f} s; W_Q moved by {100 * moved:.2f}%; as many "
          f"FLOPs ({flops:.3g}) as {thinking:,} tokens of thinking")
    return {"plain": plain, "adapted": adapted, "held_out_before": before, "held_out_after": after, "held_out_spans": len(held),
            "context": T, "prefill_seconds": prefill_s, "seconds": seconds, "flops": flops, "thinking_tokens": thinking,
            "moved": moved, "lr": lr}


# ---------------------------------------------------------------------------------------------------------------------
# The controls, and questions read on behind the frozen context

@contextmanager
def temperatures(model, factor=1.0):
    """All is frozen but a factor for each head of each layer, which multiplies its queries behind the norm: -> [its logarithm (H, 1)].
    At the end the model is as it was."""
    with queries(model) as weights, ExitStack() as hooks:
        logs = []
        for layer, w in zip(model.layers, weights):
            w.requires_grad_(False)
            logs.append(log := torch.full((model.cfg.n_head, 1), math.log(factor), device=w.device, requires_grad=True))
            sharpen = lambda norm, x, q, log=log: (q * log.exp()).to(q.dtype)                # q (B, T, H, D)
            hooks.enter_context(layer.self_attn.q_norm.register_forward_hook(sharpen))
        yield logs


class Behind:
    """One layer's T frozen keys and values (Hkv, T, D) as the cache of Q tails, each read on its own behind them. What a tail's last
    query gives to the positions in spots (Q, T), by head, is left in `mass` (Q, H)."""
    def __init__(self, kv, spots=None):
        self.k, self.v, self.length, self.spots, self.mass = *kv, kv[0].shape[1], spots, None

    def attend(self, attention, windows, q, k, v):                   # (Q, H, n, D), (Q, Hkv, n, D) twice -> (Q, H, n, D)
        (Q, H, n, D), Hkv = q.shape, k.shape[1]
        if attention.func is shift:
            old = [t[None, :, -H:].expand(Q, -1, -1, -1) for t in (self.k, self.v)]          # as far as it looks back
            return attention(q, *(torch.cat(pair, 2) for pair in zip(old, (k, v))))
        q = q.unflatten(1, (Hkv, -1)).transpose(0, 1) * D ** -0.5                            # (Hkv, Q, g, n, D)
        late = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        scores = torch.cat([(q.flatten(1, 3) @ self.k.transpose(1, 2)).unflatten(1, q.shape[1:4]),
                            (q @ k.transpose(0, 1)[:, :, None].transpose(3, 4)).masked_fill(late, -torch.inf)], -1)
        p = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1)               # (Hkv, Q, g, n, T + n)
        if self.spots is not None:
            self.mass = (p[..., -1, :self.length] * self.spots[:, None]).sum(-1).transpose(0, 1).flatten(1)
        p = p.to(q.dtype)
        old = (p[..., :self.length].flatten(1, 3) @ self.v).unflatten(1, q.shape[1:4])
        y = old + p[..., self.length:] @ v.transpose(0, 1)[:, :, None]
        return y.transpose(0, 1).flatten(1, 2)                       # (Hkv, Q, g, n, D) -> (Q, H, n, D)


@torch.no_grad()
def read(model, kv, tails, spots=None):
    """tails (Q, n) -> the logits after each, (Q, V), and on spots (Q, T), if given, the mass in every layer and head that attends,
    (Q, L H)."""
    size, logits, mass = max(1, 2 ** 27 // (model.cfg.n_head * tails.shape[1] * (kv[0][0].shape[1] + 1))), [], []
    for i in range(0, len(tails), size):
        caches = [Behind(pair, None if spots is None else spots[i:i + size]) for pair in kv]
        logits.append(model(tails[i:i + size], cache=caches)[:, -1])
        if spots is not None:
            mass.append(torch.cat([c.mass for c in caches if c.mass is not None], 1))
    return torch.cat(logits), torch.cat(mass) if mass else None


def score(model, kv, asked):
    """-> how many answers are right, all of their tokens the likeliest; mass on the needle as the answer begins, in the head that has
    the most of it; the mean of its margin log(mass / (1 - mass))."""
    tails, answers, spots = asked
    logits, mass = zip(*(read(model, kv, torch.cat([tails, answers[:, :j]], 1), spots) for j in range(answers.shape[1])))
    right = (torch.stack(logits, 1).argmax(-1) == answers).all(1)                            # (Q, m, V) -> (Q)
    best = mass[0][:, mass[0].mean(0).argmax()].clamp(1e-9, 1 - 1e-6)                        # (Q, L H) -> (Q)
    return {"accuracy": right.float().mean().item(), "mass": best.mean().item(), "margin": (best / (1 - best)).log().mean().item()}


def vote(model, kv, asked, chains, rounds, draw):
    """-> share of right answers by majority of so many chains. A chain writes question and answer `rounds` times, the answers drawn
    from the model, all but the last of them notes. Equal chains are read once."""
    tails, answers, _ = asked
    Q, m = answers.shape
    said = tails.new_empty(Q * chains, 0)
    for _ in range(rounds):
        said = torch.cat([said, tails.repeat_interleave(chains, 0)], 1)
        for _ in range(m):
            rows, back = said.unique(dim=0, return_inverse=True)
            p = read(model, kv, rows)[0].double().softmax(-1)                                # (rows, V)
            upto = (p.cumsum(-1).clamp(max=1) + torch.arange(len(p), device=p.device)[:, None]).flatten()    # row r fills r to r + 1
            u = torch.rand(len(said), generator=draw, dtype=p.dtype, device=p.device)
            token = torch.searchsorted(upto, back + u).sub(back * p.shape[1]).clamp(0, p.shape[1] - 1)
            said = torch.cat([said, token[:, None]], 1)
    right = 0
    for votes, truth in zip(said[:, -m:].view(Q, chains, m), answers):
        kinds, count = votes.unique(dim=0, return_counts=True)
        right += torch.equal(kinds[count.argmax()], truth)
    return right / Q


# ---------------------------------------------------------------------------------------------------------------------
# The experiment: streams of records, a model trained on short ones, questions about long ones

def shift(q, k, v):
    """Head h gives the value h + 1 positions back, whatever the query: a short convolution. It tells what stands side by side, and
    nothing else in these models knows positions, so that length means dilution alone."""
    (B, H, n, D), far = q.shape, q.shape[1] + q.shape[2]
    v = v[:, :, -far:].repeat_interleave(H // v.shape[1], 1)
    v = F.pad(v, (0, 0, far - v.shape[2], 0))                                                # (B, H, n + H, D)
    return torch.stack([v[:, h, H - 1 - h:H - 1 - h + n] for h in range(H)], 1)


# What is compared, and in which colour. Some: the questions that an oracle is asked, too; kind: see `columns` below
ARMS = {"in context": "C7", "log T": "C0", "log T, read too": "C9", "temperature": "C1", "temperature, foreign": "C8", "queries": "C3",
        "queries, foreign": "C4", "queries, other kind": "C5", "queries, some": "C3", "queries, oracle": "C6", "vote, FLOPs": "C2",
        "vote, seconds": "olive", "notes, FLOPs": "lime", "notes, seconds": "teal", "no context": "k"}
# asks: one in so many of a lesson's tokens is of its questions
LAPTOP = {"name": "cpu", "shape": dict(n_layer=2, n_head=2, head_dim=64, n_embd=64, n_hidden=128), "tasks": ("records", "columns"),
          "sizes": dict(a=256, b=256, value=16, mark=1), "train": (300, 32, 96), "asks": 6, "looks": 0.5, "lr": 1e-2,
          "lengths": (96, 768, 3072), "contexts": 4, "questions": 16, "noted": 4, "few": 2, "steps": 32, "span": 128,
          "rates": {"queries": (1e-3, 3e-3, 1e-2), "temperature": (3e-2, 1e-1)}}
FULL = {**LAPTOP, "name": "h200", "shape": dict(n_layer=4, n_head=8, n_kv_head=2, head_dim=64, n_embd=256),
        "tasks": ("records", "columns", "log", "bugs"),
        "sizes": dict(a=4096, b=4096, value=32, mark=1, page=128, line=128, name=2048, turn=4, state=2, kind=8),
        "train": (2000, 64, 512), "asks": 2, "looks": 0.8, "lr": 2e-3, "lengths": (512, 4096, 32768), "questions": 32,
        "rates": {"queries": (3e-4, 1e-3, 3e-3), "temperature": (3e-2, 1e-1)}}
SEEDS, ROUNDS, LESSONS = (1, 2, 3), 3, 2048


def stream(task, tokens, recipe, draw, asked, kind=None, keys=None):
    """A context of at most so many tokens -> ids (T), which of them follow from the ones before, (T) bool, and at most `asked`
    questions: tails (Q, n), answers (Q, m) and spots (Q, T), the places that answer them.

    records   a b value            a and b together decide on the value; asked are pairs that occur once
    columns   a b value            either a (kind 1) or b (kind 2) alone does, the other means nothing, and which is not said
    log       page line name turn state value value    of an account: the how manyth transaction, booked or refused, balance before
                                   and after; one of each is refused. Asked: mark name -> page line of it
    bugs      page line name value    a name and its type; one use of each name has another. Asked: mark name -> page line"""
    size, pairs = recipe["sizes"], task in ("records", "columns")
    first = dict(zip(size, itertools.accumulate(size.values(), initial=0)))
    rand = lambda high, *shape: torch.randint(high, shape, generator=draw)
    some = lambda n, m: torch.randperm(n, generator=draw)[:m]
    if pairs:
        R = tokens // 3
        keys, side = keys or R // 2, size["a"]
        if task == "records":
            side = min(side, max(4, math.ceil(1.5 * keys ** 0.5)))
            key = some(side * side, keys)[rand(min(keys, side * side), R)]                   # (R)
            ia, ib = key // side, key % side
        else:
            kind = kind or 1 + int(rand(2))
            ia, ib = rand(min(keys, side), R), rand(min(keys, side), R)
            key = ia if kind == 1 else ib
        values = rand(size["value"], int(key.max()) + 1)[key]
        line = torch.stack([some(size["a"], side)[ia], some(size["b"], side)[ib] + first["b"], values + first["value"]], 1)   # (R, 3)
        follows = torch.arange(R) > torch.full((int(key.max()) + 1,), R).scatter_reduce(0, key, torch.arange(R), "amin")[key]
        at = (key.bincount()[key] == 1).nonzero()[:, 0]
        if task == "columns" or not len(at):                         # few keys may all recur
            at = torch.arange(R)
    else:
        turns, log = size["turn"], task == "log"
        G = tokens // (7 if log else 4) // turns
        group = some(G * turns, G * turns) // turns                                          # (G turns)
        turn = torch.empty_like(group)
        turn[group.argsort(stable=True)] = torch.arange(G * turns) % turns                   # of its group's lines, the how manyth
        side = size["line"]                                          # more pairs than lines
        name, place = some(size["name"], G)[group] + first["name"], some(size["page"] * side, G * turns)
        odd = 1 + rand(turns - 1, G)
        wrong, kind = odd[group] == turn, rand(size["kind"], G, turns) + first["kind"]
        if log:
            after = kind.scatter(1, odd[:, None], kind.gather(1, odd[:, None] - 1))          # (G, turns): refused, it is as before
            more = turn + first["turn"], wrong + first["state"], after[group, turn - 1], after[group, turn]
        else:
            more = (kind[group, 0] - first["kind"] + wrong * (1 + rand(size["kind"] - 1, G * turns))) % size["kind"] + first["kind"],
        line = torch.stack([place // side + first["page"], place % side + first["line"], name, *more], 1)    # (G turns, 7 or 4)
        follows, at = (turn > 0) & (log | ~wrong), wrong.nonzero()[:, 0]
    at = at[some(len(at), asked)]                                                            # (Q)
    known, spots = torch.zeros_like(line, dtype=torch.bool), torch.zeros(len(at), *line.shape, dtype=torch.bool)
    known[:, {"log": 5, "bugs": 3}.get(task, 2)] = follows
    if pairs:
        spots[..., 2] = key[at, None] == key
        tails, answers = line[at, :2], line[at, 2:]
        if task == "columns":                                        # a new pair: what means nothing is another record's
            tails[:, 2 - kind] = line[rand(R, len(at)), 2 - kind]
    else:
        spots[torch.arange(len(at)), at] = True
        tails, answers = torch.stack([torch.full_like(at, first["mark"]), name[at]], 1), line[at, :2]
    return line.flatten(), known.flatten(), (tails, answers, spots.flatten(1))


def lesson(task, T, recipe, draw):
    """A sequence to train on -> T + 1 ids, which of them follow from those before: a context, and at its end questions with their
    answers, each written up to ROUNDS times, which is how notes are taken."""
    keys = int(torch.randint(3, T // 6, (), generator=draw))
    ids, known, (tails, answers, _) = stream(task, T + 1 - T // recipe["asks"], recipe, draw, T, keys=keys)
    parts, marks = [ids], [known]
    for i in itertools.cycle(range(len(tails))):
        if sum(map(len, parts)) > T:
            return torch.cat(parts)[:T + 1], torch.cat(marks)[:T + 1]
        times = int(torch.randint(1, ROUNDS + 1, (), generator=draw))
        parts.append(torch.cat([tails[i], answers[i]]).repeat(times))
        marks.append(torch.cat([tails[i] < 0, answers[i] >= 0]).repeat(times))


def renamed(ids, recipe, draw):
    """ids (B, T) with other names for all things, in each sequence others: a lesson can be taken again."""
    table, low = torch.arange(sum(recipe["sizes"].values()), device=ids.device).repeat(len(ids), 1), 0       # (B, V)
    for name, size in recipe["sizes"].items():
        if name not in ("turn", "state", "mark"):                    # these mean what they are
            table[:, low:low + size] = low + torch.rand(len(ids), size, generator=draw, device=ids.device).argsort(1)
        low += size
    return table.gather(1, ids)


def raise_model(recipe, label, seed, device, dtype):
    """-> a GPT whose layers take turns at `shift` and softmax attention without positions, trained on short streams of all tasks; in
    a share `looks` of the steps, the first, only what follows from the text counts, which is when it learns to look."""
    (steps, batch, T), tasks = recipe["train"], recipe["tasks"]
    cfg = train.GPTConfig(vocab_size=sum(recipe["sizes"].values()), block_size=T, qk_norm=label == NORMS[1], tied=False, **recipe["shape"])
    model, draw = train.GPT(cfg, dtype=dtype).to(device), torch.Generator().manual_seed(seed)
    ends = lambda name: (2 * cfg.n_layer) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
    train.fill(model, lambda name, shape: torch.ones(shape) if len(shape) == 1 else
               torch.randn(shape, generator=draw) * (1.0 if "embed" in name else ends(name) * shape[1] ** -0.5))
    for i, layer in enumerate(model.layers):
        layer.self_attn.rotary = ()
        if i % 2 == 0:
            layer.self_attn.attention, layer.self_attn.logits = functools.partial(shift), 0
    lessons = [lesson(tasks[i % len(tasks)], T, recipe, draw) for i in range(LESSONS)]
    lessons, known = (torch.stack(t).to(device) for t in zip(*lessons))                      # (LESSONS, T + 1) each
    draw = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], steps, pct_start=0.1)
    line = NORMS.index(label)                                        # a bar each where two are trained side by side
    for step in tqdm(range(steps), desc=f"seed {seed}, {label}", position=line, dynamic_ncols=True, leave=False):
        some = torch.randint(LESSONS, (batch,), generator=draw, device=device)
        ids = renamed(lessons[some], recipe, draw)                                           # (batch, T + 1)
        y = ids[:, 1:].masked_fill(~known[some, 1:] & (step < recipe["looks"] * steps), -1)
        loss = model(ids[:, :-1], y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def posed(task, recipe, device, T, seed, c):
    """-> context number c of a seed, ids (T), and what is asked of it. Contexts come in pairs; in `columns` every other pair is of the
    other kind."""
    draw = torch.Generator().manual_seed(10 ** 6 * seed + 10 * T + c)
    ids, _, asked = stream(task, T, recipe, draw, recipe["questions"], 1 + c // 2 % 2)
    return ids.to(device), tuple(t.to(device) for t in asked)


WAYS, NORMS = {"queries": queries, "temperature": temperatures}, ("no QK-norm", "QK-norm")


def fit(model, way, kv, ids, recipe, lr, starts=None):
    """Train what `way` names, on random spans or on those that begin at `starts` -> its values after the steps, and the seconds. The
    model is as before."""
    n = min(recipe["span"], len(ids) // 2)
    starts = torch.arange(len(ids) - n) if starts is None else starts
    with WAYS[way](model) as weights:
        seconds = timed(ids.device, lambda: list(adapt(model, weights, kv, ids, starts, recipe["steps"], n, lr=lr)))[1]
        return [w.detach().clone() for w in weights], seconds


@contextmanager
def fitted(model, way, values):
    with WAYS[way](model) as weights, torch.no_grad():
        for w, value in zip(weights, values):
            w.copy_(value)
        yield


def best_rates(model, ask, T, recipe):
    """-> {way: the learning rate that answers best}, on contexts of seed 0, which are not reported; of equals the smallest."""
    found = {way: dict.fromkeys(rates, 0.0) for way, rates in recipe["rates"].items()}
    for c in (0, 2):
        ids, asked = ask(T, 0, c)
        _, kv = prefill(model, ids)
        for way, scores in found.items():
            for lr in scores:
                with fitted(model, way, fit(model, way, kv, ids, recipe, lr)[0]):
                    scores[lr] += score(model, kv, asked)["accuracy"]
    return {way: max(scores, key=scores.get) for way, scores in found.items()}


def examine(model, ask, T, recipe, seed, rates, kinds):
    """-> {arm: a score for each context}. Foreign is another context of the same kind, if there are kinds. Thinking gets as many
    FLOPs, or seconds, as the steps on the queries took; FLOPs count what the method needs, seconds what this code takes. The first
    `few` questions get an oracle each, the first `noted` notes; without these there is no thinking."""
    rows, kept = {arm: [] for arm in ARMS}, []
    for c in range(recipe["contexts"]):
        ids, asked = ask(T, seed, c)
        n, few, noted = min(recipe["span"], len(ids) // 2), *([t[:recipe.get(some, 0)] for t in asked] for some in ("few", "noted"))
        cache, kv = prefill(model, ids, asked[0].shape[1] + 8)
        trained = {way: fit(model, way, kv, ids, recipe, rates[way]) for way in WAYS}
        kept.append((kv, asked, trained))
        rows["in context"].append(score(model, kv, asked))
        rows["no context"].append(score(model, [tuple(t[:, :0] for t in pair) for pair in kv], (*asked[:2], asked[2][:, :0])))
        with temperatures(model, max(1.0, math.log(T) / math.log(recipe["train"][2]))):
            rows["log T"].append(score(model, kv, asked))
            if len(model.layers) > 2:                                # else nothing that is kept comes after an attention
                rows["log T, read too"].append(score(model, prefill(model, ids)[1], asked))
        weights, seconds = trained["queries"]
        if T == max(recipe["lengths"]):
            with fitted(model, "queries", weights):
                rows["queries, some"].append(score(model, kv, few))
            oracles = []
            for one in zip(*(t.split(1) for t in few)):
                at = int(one[2][0].nonzero()[-1])                    # the needle is a target in all of its spans
                starts = torch.arange(max(0, at - n), min(at, len(ids) - n))
                with fitted(model, "queries", fit(model, "queries", kv, ids, recipe, rates["queries"], starts)[0]):
                    oracles.append(score(model, kv, one))
            rows["queries, oracle"].append({k: statistics.fmean(o[k] for o in oracles) for k in oracles[0]})
        if len(noted[0]):
            draw = torch.Generator(ids.device).manual_seed(seed)
            flops = flops_of_spans(model, recipe["steps"] * n, len(ids))
            token_s = timed(ids.device, lambda: list(answer(model, cache, len(ids), asked[0][0].tolist(), 8)))[1] / 8
            line = asked[0].shape[1] + asked[1].shape[1]
            for unit, tokens in (("FLOPs", thinking_tokens(model, len(ids), flops)), ("seconds", int(seconds / token_s))):
                for name, rounds, asking in (("vote", 1, asked), ("notes", ROUNDS, noted)):
                    chains = max(1, tokens // (rounds * line - asked[0].shape[1]))           # the question itself is read anyway
                    rows[f"{name}, {unit}"].append({"accuracy": vote(model, kv, asking, chains, rounds, draw), "tokens": tokens,
                                                    "seconds": seconds, "flops": flops})
    others = {"": 0, ", foreign": 1, **({", other kind": 2} if kinds else {})}
    for c, (kv, asked, _) in enumerate(kept):
        for way, (whose, other) in itertools.product(WAYS, others.items()):
            if way + whose in rows:
                with fitted(model, way, kept[c ^ other][2][way][0]):
                    rows[way + whose].append(score(model, kv, asked))
    return {arm: {k: [round(s[k], 4) for s in found] for k in found[0]} for arm, found in rows.items() if found}


def paired(ours, theirs, draws=2000):
    """Accuracies by seed and context -> the mean difference and its 95% interval, seeds and, in each, contexts drawn anew."""
    d, draw = torch.tensor(ours) - torch.tensor(theirs), torch.Generator().manual_seed(0)    # (seeds, contexts)
    seeds = torch.randint(len(d), (draws, len(d), 1), generator=draw)
    contexts = torch.randint(d.shape[1], (draws, *d.shape), generator=draw)
    means = d[seeds, contexts].mean((1, 2)).sort().values
    return [round(float(x), 4) for x in (d.mean(), means[draws // 40], means[-draws // 40 - 1])]


def examined(recipe, seed, label, model, tasks):
    """tasks: {task: ask}, where ask(T, seed, c) is like `posed` -> {"LABEL, TASK, T": {arm: {score: [contexts]}}}, and the learning rates,
    found for each anew."""
    cells, rates = {}, {}
    for (task, ask), T in itertools.product(tasks.items(), recipe["lengths"]):
        key = f"{label}, {task}, {T}"
        rates[key] = best_rates(model, ask, T, recipe)
        cells[key] = examine(model, ask, T, recipe, seed, rates[key], task == "columns")
        right = [f"{arm} {statistics.mean(found['accuracy']):.2f}" for arm, found in cells[key].items()]
        print(f"seed {seed}, {key}: {', '.join(right)}", flush=True)
    return cells, rates


KEPT = "out/ttt_context-kept"                                        # what models have answered, until all have


def one_model(recipe, device, dtype, which):
    (seed, label), tasks = which, {task: functools.partial(posed, task, recipe, device) for task in recipe["tasks"]}
    work = lambda: examined(recipe, seed, label, raise_model(recipe, label, seed, device, dtype), tasks)
    return train.remembered(KEPT, [recipe, str(device), str(dtype), which], work)


def worker(lock, device):
    """A process of side_by_side begins."""
    tqdm.set_lock(lock)                                              # one for all their bars
    if device.type == "cpu":
        torch.set_num_threads(1)


def side_by_side(recipe, device, dtype):
    """A model for each seed and name of NORMS, in a process each -> seed and what is `examined`, one after the other. Steps on small models
    wait for the host, three on one GPU take little longer than one, and on a CPU a core each serves them better than all cores in turn."""
    models = list(itertools.product(SEEDS, NORMS))
    many = 3 if device.type == "cuda" else min(torch.get_num_threads(), len(models))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(many, worker, (spawn.RLock(), device)) as pool:
        yield from zip((seed for seed, _ in models), pool.imap(functools.partial(one_model, recipe, device, dtype), models))
    shutil.rmtree(KEPT, ignore_errors=True)


def experiment(recipe, found, device, folder):
    """found: a seed and what is `examined`, for each model -> what is in results/ttt_context-NAME.json, written after each; told and drawn."""
    seconds = train.stopwatch(KEPT)
    cells, rates = {}, {}                                            # {key: {arm: {score: [contexts, for each seed]}}}
    for seed, (its_cells, its_rates) in found:
        for key, arms in its_cells.items():
            for arm, scores in arms.items():
                for what, values in scores.items():
                    cells.setdefault(key, {}).setdefault(arm, {}).setdefault(what, []).append(values)
        rates |= {f"seed {seed}, {key}": rate for key, rate in its_rates.items()}
        less = {key: {arm: paired(arms["queries, some" if arm == "queries, oracle" else "queries"]["accuracy"], found["accuracy"])
                      for arm, found in arms.items() if arm not in ("queries", "queries, some") and not arm.startswith("notes")}
                for key, arms in cells.items()}
        pairs = [(m, a) for arms in cells.values() for found in arms.values() if "mass" in found
                 for m, a in zip(sum(found["mass"], []), sum(found["accuracy"], []))]
        ranks = [torch.tensor(x).unique(return_inverse=True)[1].double() for x in zip(*pairs)]
        result = note(folder, recipe["name"], device, {
            "cells": cells, "queries_less": less, "rates": rates, "recipe": recipe,
            "seeds": SEEDS[:max(len(arms["in context"]["accuracy"]) for arms in cells.values())],
            "rank_correlation_mass_accuracy": torch.corrcoef(torch.stack(ranks))[0, 1].item(),
            "seconds": seconds()})
    for key, arms in less.items():
        found = [f"{arm} {d:+.2f} ({low:+.2f} to {high:+.2f})" for arm, (d, low, high) in arms.items()]
        print(f"{key}: queries less {', '.join(found)}")
    plot(Path(folder) / f"ttt_context-{recipe['name']}.png", result)
    return result


NEEDLES = {"name": "needles", "tasks": ("needles",), "train": (0, 0, 1024), "lengths": (1024, 4096, 8000), "contexts": 8,
           "questions": 4, "few": 1, "steps": 32, "span": 128, "rates": {"queries": (1e-5, 1e-4, 1e-3), "temperature": (1e-2, 3e-2)}}
PLACES = ("Paris London Berlin Rome Madrid Vienna Prague Dublin Oslo Athens Cairo Delhi Tokyo Sydney Boston Chicago Denver "
          "Dallas").split()


def hidden(tokenizer, device, recipe):
    """-> ask(T, seed, c): T tokens of the standard library's source with sentences in it that give places a number, and questions for
    some of the numbers."""
    size = lambda text: len(tokenizer.encode_ordinary(text))
    places = [place for place in PLACES if size(f" {place}") == size(f" {PLACES[0]}")]       # questions of equal length
    files = [path for path in train.find_documents("stdlib") if path.stat().st_size > 20000]

    def ask(T, seed, c):
        draw = random.Random(f"{seed} {T} {c}")
        chosen, ids, said = draw.sample(places, min(recipe["questions"], len(places))), [], []
        for place in chosen:
            say = lambda number: [*map(int, tokenizer.encode_ordinary(f"\n# The secret number of {place} is {number}"))]
            tail, whole = os.path.commonprefix([say(10000), say(90000)]), say(draw.randint(10000, 99999))
            said.append((tail, whole[len(tail):]))
        room = T - len(beginning(tokenizer)) - sum(len(tail) + len(answer) for tail, answer in said)
        while len(ids) < room:
            ids += tokenizer.encode_ordinary(train.read_text(draw.choice(files)))
        at, text = sorted(draw.sample(range(room), len(said))), [*beginning(tokenizer)]
        spots, begin = torch.zeros(len(said), T, dtype=torch.bool), 0
        for i, ((tail, answer), end) in enumerate(zip(said, at)):
            text += ids[begin:end] + tail + answer
            spots[i, len(text) - len(answer):len(text)] = True
            begin = end
        tails, answers = (torch.tensor(t, device=device) for t in zip(*said))
        return torch.tensor(text + ids[begin:room], device=device), (tails, answers, spots.to(device))
    return ask


def plot(path, result):
    lengths, rows = result["recipe"]["lengths"], {}
    for key, cell in result["cells"].items():
        label, task, _ = key.split(", ")
        rows.setdefault(label, {}).setdefault(task, []).append(cell)
    wide = max(map(len, rows.values())) + 1
    figure, axes = train.figure((3.6 * wide, 3.2 * len(rows) + 0.6), len(rows), wide, squeeze=False)
    mean = lambda values: statistics.mean(sum(values, []))
    for (label, tasks), line in zip(rows.items(), axes):
        for (task, cells), ax in zip(tasks.items(), line):
            for arm, color in ARMS.items():
                there = [(T, mean(cell[arm]["accuracy"])) for T, cell in zip(lengths, cells) if arm in cell]
                if there and arm != "queries, some":
                    how = "--" if "foreign" in arm or "kind" in arm else ":" if "," in arm else "-"
                    ax.plot(*zip(*there), how, marker="oD"[len(there) < 2], ms=3, lw=1 + (arm == "queries"), color=color, label=arm)
            ax.set(xscale="log", xlabel="tokens of context", ylim=(-0.03, 1.03), title=f"{task}, {label}", ylabel="accuracy")
            ax.set_xticks(lengths, lengths)
            ax.minorticks_off()
        (first, cells), ax = next(iter(tasks.items())), line[-1]
        for arm in ("in context", "log T", "temperature", "queries", "queries, foreign"):
            margins = [mean(cell[arm]["margin"]) for cell in cells]
            ax.plot([math.log(T) for T in lengths], margins, "o-", ms=3, color=ARMS[arm], label=arm)
        ax.set(xlabel="log T", ylabel="margin log(p / (1 - p)), mean", title=f"at the needle, {first}, {label}")
        low, high = ax.get_ylim()
        shown = {p: z for p in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99) if low < (z := math.log(p / (1 - p))) < high}
        ax.twinx().set(ylim=(low, high), yticks=list(shown.values()), yticklabels=list(shown), ylabel="attention p")
    arms = {arm: line for ax in axes[:, :-1].flat for line, arm in zip(*ax.get_legend_handles_labels())}
    figure.legend(arms.values(), arms, loc="outside lower center", ncols=2 * wide, fontsize=8)
    train.keep(figure, path, dpi=110)


def note(folder, name, device, result):
    """Write results/ttt_context-NAME.json -> what was written."""
    gpu = device.type == "cuda"
    result |= {"device": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads", "torch": torch.__version__}
    with atomic(Path(folder) / f"ttt_context-{name}.json") as f:
        f.write(json.dumps(result, indent=None if "cells" in result else 1).encode())        # thousands of numbers, or a few
    return result


def bench(preset, T, device, dtype, steps=32, n=128, timed_tokens=64, warm_up=3):
    """Seconds to read T random tokens with random weights of this shape, for the steps, and to write as many tokens as the paper
    sets against them (2 steps n) and as cost equal FLOPs, by train.Recorded, a CUDA graph a token: `timed_tokens` of them are timed,
    with as many keys as there are half way."""
    model, rule = train.random_model(preset, device, dtype), 2 * steps * n
    ids = torch.randint(model.cfg.vocab_size, (T,), generator=torch.Generator().manual_seed(0)).to(device)
    prefill(model, ids[:n])                                          # what is looked up once
    (cache, kv), prefill_s = timed(device, lambda: prefill(model, ids, rule // 2))
    with queries(model) as weights:
        losses = adapt(model, weights, kv, ids, spans(T, n)[1], warm_up + steps, n)
        for _ in range(warm_up):
            next(losses)
        steps_s = timed(device, lambda: list(losses))[1]
    flops = flops_of_spans(model, steps * n, T)
    writer = train.Recorded(model, T + rule // 2)
    for fixed, layer in zip(writer.cache, cache):
        fixed.kept = layer.kept                                      # (1, Hkv, T + rule / 2, D) each
        for t in fixed.kept:
            t[:, :, T:] = 0                                          # times no attention; what memory held might be NaN

    @torch.no_grad()
    def write(many):
        for _ in range(many):
            writer.length.fill_(T)
            writer.next(ahead=True)
    write(warm_up)
    token_s = timed(device, lambda: write(timed_tokens))[1] / timed_tokens
    thinking = {"2 N k": rule, "equal FLOPs": thinking_tokens(model, T, flops)}
    return {"model": preset, "context": T, "span": n, "steps": steps, "dtype": str(dtype).removeprefix("torch."),
            "prefill_seconds": prefill_s, "steps_seconds": steps_s, "token_ms": 1e3 * token_s, "tokens_timed": timed_tokens,
            "flops": flops, "thinking": {name: {"tokens": many, "seconds": many * token_s, "over_steps": many * token_s / steps_s}
                         for name, many in thinking.items()}}


def conclude(args, device, dtype):
    """--experiment, --full, and --full --init DIR: needles in real text, read by that model."""
    if args.full and device.type != "cuda":
        fail("--full needs a CUDA GPU; --experiment alone takes two to four minutes on two CPU cores")
    train.writable(args.out)
    if not args.init:
        recipe = FULL if args.full else LAPTOP
        return experiment(recipe, side_by_side(recipe, device, dtype), device, args.out)
    run = train.find_run(args.init)
    model, tokenizer = train.load_model(run, device, dtype)
    recipe = {**NEEDLES, "lengths": tuple(T for T in NEEDLES["lengths"] if T + 64 <= model.cfg.block_size)}
    if not recipe["lengths"]:
        fail(f"{run} was trained on {model.cfg.block_size} tokens, too few for needles in {NEEDLES['lengths'][0]}")
    tasks = {"needles": hidden(tokenizer, device, recipe)}
    return experiment(recipe, ((seed, examined(recipe, seed, run.name, model, tasks)) for seed in SEEDS[:1]), device, args.out)


def main(argv=None):
    """Adapt to a prompt and answer, as the flags say -> dict of the answers, losses, seconds and FLOPs."""
    parser = train.Parser(description=__doc__)
    flag = parser.add_argument
    flag("--prompt", metavar="FILE", help="the context, a text file")
    flag("--question", default="", help="what is asked about it (default: go on where it ends)")
    flag("--init", metavar="DIR", help="the run or Hugging Face folder to use (default: the newest run under out/)")
    flag("--steps", type=int, default=32, help="AdamW steps (default: 32)")
    flag("--span", type=int, default=128, help="tokens of a span (default: 128)")
    flag("--batch-spans", type=int, default=1, help="spans a step (default: 1)")
    flag("--lr", type=float, help="learning rate (default: 1e-5 for a Hugging Face folder, 1e-3 for a run)")
    flag("--seed", type=int, default=1337, help="with the text, draws the spans (default: 1337)")
    flag("--max-tokens", type=int, default=100, help="longest answer (default: 100)")
    flag("--save-queries", metavar="FILE", help="write the trained W_Q of each layer, as torch.save does")
    flag("--experiment", action="store_true", help="train small models, ask about long contexts -> results/ttt_context-cpu.*")
    flag("--full", action="store_true", help="the same at 32k tokens on one GPU -> results/ttt_context-h200.*; with --init DIR, "
         "needles in real text -> results/ttt_context-needles.*; cut short, it goes on where it stopped")
    flag("--bench", action="store_true", help="time the steps beside tokens of thinking, with random weights -> "
         "results/ttt_context-bench.json")
    flag("--model", default="qwen3-4b", choices=train.PRESETS, metavar="NAME", help="shape for --bench, as in train.py (default: qwen3-4b)")
    flag("--context", type=int, default=32768, help="tokens of context for --bench (default: 32768)")
    flag("--out", default="results", help="folder for what experiments find (default: results)")
    flag("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    flag("--dtype", default="", choices=DTYPES, help="of the activations (default: bf16 on a GPU that has it, else fp32)")
    args = parser.parse_args(argv)
    for name, least in (("steps", 0), ("span", 1), ("batch-spans", 1), ("seed", 0), ("max-tokens", 1), ("lr", 0), ("context", 1)):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value < math.inf:
            fail(f"--{name} is {value}; it must be at least {least}")
    device = train.pick_device(args.device if args.device or args.full or not args.experiment else "cpu")
    dtype = DTYPES[train.pick_dtype(device, args.dtype)[0]]
    if args.experiment or args.full:
        return conclude(args, device, dtype)
    if args.bench:
        if args.context <= args.span:
            fail(f"--context {args.context} leaves a span of {args.span} no token to foresee; give more")
        result = bench(args.model, args.context, device, dtype, args.steps, args.span)
        print(json.dumps(result, indent=1))
        return note(args.out, "bench", device, result)
    if not args.prompt:
        fail("give --prompt FILE, the text to adapt to, or --experiment or --bench")
    return command(args, device, dtype)


if __name__ == "__main__":
    train.leave(main)
