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

The model is afterwards what it was, bit for bit. Exit status 2: bad input, one sentence says what.
"""
import functools, hashlib, itertools, json, math, sys, time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import train
from train import DTYPES, Cache, Interrupt, LinearCrossEntropy, atomic, beginning, fail, rotary, rotate, softmax_attention

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
    """As `reference`, with any attention function whose queries are the last of its keys: the Triton kernel for softmax on a GPU,
    else one call a span, over a view of the keys up to its end."""
    if q.is_cuda and getattr(attention, "func", attention) is softmax_attention and q.dtype != torch.float64:
        if kernel and q.shape[3] in kernel.WIDTHS:
            return kernel.span_attention(q, k, v, start)
        degrade(f"the kernel has no heads of width {q.shape[3]}" if kernel else "there is no Triton here (pip install triton)")
    n = q.shape[2]
    return torch.cat([attention(q[s:s + 1], k[None, :, :t + n], v[None, :, :t + n]) for s, t in enumerate(start.tolist())])


@torch.no_grad()
def prefill(model, ids, room):
    """Read ids (T) -> one Cache a layer, with room for as many tokens more."""
    for layer in model.layers:
        if layer.self_attn.names != ["q", "k", "v"] or any(layer.self_attn.windows):
            raise ValueError(f"{model.cfg.attn} attention does not keep a key and a value of every position, which is what the "
                             f"queries are trained against; use a model with softmax attention")
    cache = [Cache(len(ids) + room) for _ in model.layers]
    model(ids[None], cache=cache)
    return cache


def frozen(cache, T):
    """-> for each layer a view of its first T keys and values, (Hkv, T, D) each."""
    return [tuple(t[0, :, :T] for t in layer.kept) for layer in cache]


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


def held_out(T, n, most=8):
    """-> starts of the spans not trained on, evenly spread over T tokens, an eighth of them at most; one, if there is room for any."""
    many = min(most, max((T - 1) // (8 * n), T > 3 * n))
    return torch.tensor([round((i + 0.5) / many * (T - 1 - n)) for i in range(many)], dtype=torch.int64)


def may_begin(T, n, held):
    """-> every start of a span of n whose targets exist and are none of those held out."""
    start = torch.arange(T - n)
    return start[((start[:, None] - held).abs() >= n).all(1)]


def adapt(model, weights, kv, ids, starts, steps=32, n=128, batch=1, lr=1e-5, seed=0, loss=span_loss):
    """Train `weights` on random spans, `batch` of them a step, that begin at one of `starts`; yields the loss of each step, which is
    that before it. Equal seeds and texts give equal steps."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    digest = hashlib.sha256(f"{seed}/{ids.tolist()}".encode()).digest()                      # no context shares its draws
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    for _ in range(steps):
        value = loss(model, kv, ids, starts[torch.randint(len(starts), (batch,), generator=draw)], n)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        yield value.item()


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
    """-> numbers in the matrices of a layer, in its W_Q, in its W_K and W_V, in the output layer."""
    a = model.layers[0].self_attn
    q, kv = a.q_proj.weight.numel(), a.k_proj.weight.numel() + a.v_proj.weight.numel()
    return sum(p.numel() for p in model.layers[0].parameters() if p.dim() > 1), q, kv, model.embed_tokens.weight.numel()


def flops_of_tokens(model, T, n):
    """To write n tokens after T, each of which reads all before it and itself."""
    c, (P, _, _, head) = model.cfg, weights_of(model)
    return n * (2 * c.n_layer * P + 2 * head) + 4 * c.n_layer * c.n_head * c.head_dim * (n * T + n * (n + 1) // 2)


def flops_of_spans(model, tokens, keys):
    """Forward and backward of spans with so many tokens, which look at so many keys in all: in the backward pass each product once
    more, for its input, but none for the input of the first layer; W_Q's gradient; and of attention S, dP and dQ."""
    c, (P, q, kv, head) = model.cfg, weights_of(model)
    products = 2 * 2 * (c.n_layer * (P - kv) + head) + 2 * (c.n_layer - 1) * q
    return tokens * products + (4 + 6) * c.n_layer * c.n_head * c.head_dim * keys


def thinking_tokens(model, T, flops):
    """-> how many tokens could be written after T for at most so many FLOPs."""
    low, high = 0, int(flops // flops_of_tokens(model, T, 1)) + 1
    while high - low > 1:
        mid = (low + high) // 2
        low, high = (mid, high) if flops_of_tokens(model, T, mid) <= flops else (low, mid)
    return low


def free_memory(device):
    """-> bytes that can be had, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))


def memory_of(cfg, T, dtype):
    """-> bytes to read T tokens: keys and values of all layers, one layer's once more, and what its MLP makes of them."""
    kept = 2 * (cfg.n_layer + 1) * cfg.n_kv_head * cfg.head_dim
    return (kept + 3 * cfg.n_hidden + 4 * cfg.n_embd) * T * dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------

def read_prompt(path):
    text = train.read_text(Path(path))
    if not text:
        fail(f"{path} is {'no text: what is needed is UTF-8 without NUL bytes' if Path(path).stat().st_size else 'empty'}")
    return text


def tokens_of(tokenizer, prompt, question):
    """-> ids of the context and of what is asked: as one message, where there is a chat template; else as text that goes on, and
    without a question the last token of the prompt asks."""
    if question and hasattr(tokenizer, "chat"):
        try:
            say = lambda text: tokenizer.chat([{"role": "user", "content": text}])
            both, alone = say(f"{prompt}\n\n{question}"), say(f"{prompt}\n\n")
            same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(both, alone))))
            return both[:same], both[same:]
        except ValueError:                                           # there is none after all
            pass
    context, asked = ([int(i) for i in tokenizer.encode_ordinary(text)] for text in (prompt, question or ""))
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


def note(folder, name, device, result):
    """Write results/ttt_context-NAME.json -> what was written."""
    gpu = device.type == "cuda"
    result |= {"device": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads", "torch": torch.__version__}
    with atomic(Path(folder) / f"ttt_context-{name}.json") as f:
        f.write(json.dumps(result, indent=1).encode())
    return result


def timed(device, work):
    """-> work() and the seconds until the device was done with it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - began


def bench(preset, T, device, dtype, steps=32, n=128, timed_tokens=64):
    """Seconds to read T random tokens with random weights of this shape, for the steps, and to write as many tokens as the paper sets
    against them (2 steps n) and as cost equal FLOPs, by train.Recorded, a CUDA graph a token: `timed_tokens` of them are timed, with as
    many keys as there are half way."""
    model = train.random_model(preset, device, dtype)
    ids = torch.randint(model.cfg.vocab_size, (T,), generator=torch.Generator().manual_seed(0)).to(device)
    prefill(model, ids[:n], 0)                                       # what is looked up once
    cache, prefill_s = timed(device, lambda: prefill(model, ids, 0))
    kv, starts, warm_up = frozen(cache, T), may_begin(T, n, held_out(T, n)), 3
    with queries(model) as weights:
        losses = adapt(model, weights, kv, ids, starts, warm_up + steps, n)
        for _ in range(warm_up):
            next(losses)
        steps_s = timed(device, lambda: list(losses))[1]
    flops = flops_of_spans(model, steps * n, steps * n * (T + 1) // 2)
    rule, equal = 2 * steps * n, thinking_tokens(model, T, flops)
    writer, token = train.Recorded(model, T + rule // 2), [0]
    for fixed in writer.cache:
        old = cache.pop(0).kept
        fixed.kept = [torch.cat([t, t.new_zeros(*t.shape[:2], rule // 2, t.shape[3])], 2) for t in old]       # (1, Hkv, T + rule / 2, D)

    @torch.no_grad()
    def write(many):
        nonlocal token
        for _ in range(many):
            token = [int(writer.read(token, T)[0, -1].argmax())]
    write(warm_up)
    token_s = timed(device, lambda: write(timed_tokens))[1] / timed_tokens
    return {"model": preset, "context": T, "span": n, "steps": steps, "dtype": str(dtype).removeprefix("torch."), "prefill_seconds": prefill_s,
            "steps_seconds": steps_s, "token_ms": 1e3 * token_s, "tokens_timed": timed_tokens, "flops": flops,
            "thinking": {name: {"tokens": many, "seconds": many * token_s, "over_steps": many * token_s / steps_s}
                         for name, many in (("2 N k", rule), ("equal FLOPs", equal))}}


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
    flag("--bench", action="store_true", help="time the steps beside tokens of thinking, with random weights -> results/ttt_context-bench.json")
    flag("--model", default="qwen3-4b", choices=train.PRESETS, help="shape for --bench (default: qwen3-4b)")
    flag("--context", type=int, default=32768, help="tokens of context for --bench (default: 32768)")
    flag("--out", default="results", help="folder for what --bench finds (default: results)")
    flag("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    flag("--dtype", default="", choices=DTYPES, help="of the activations (default: bf16 on a GPU that has it, else fp32)")
    args = parser.parse_args(argv)
    for name, least in (("steps", 0), ("span", 1), ("batch-spans", 1), ("seed", 0), ("max-tokens", 1), ("lr", 0), ("context", 1)):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value < math.inf:
            fail(f"--{name} is {value}; it must be at least {least}")
    device = train.pick_device(args.device)
    if args.bench:
        if args.context <= args.span:
            fail(f"--context {args.context} leaves a span of {args.span} no token to foresee; give more")
        result = bench(args.model, args.context, device, DTYPES[train.pick_dtype(device, args.dtype)[0]], args.steps, args.span)
        print(json.dumps(result, indent=1))
        return note(args.out, "bench", device, result)
    if not args.prompt:
        fail("give --prompt FILE, the text to adapt to, or --bench")
    text = read_prompt(args.prompt)
    run = pick_run(args.init, args.device)
    model, tokenizer = train.load_model(run, device, DTYPES[train.pick_dtype(device, args.dtype)[0]])
    context, asked = tokens_of(tokenizer, text, args.question)
    lr = args.lr if args.lr is not None else 1e-3 if (run / "ckpt.pt").is_file() else 1e-5
    T, n = len(context), args.span
    if T <= n:
        fail(f"{args.prompt} has {T} tokens, and a span takes {n} and one to foresee; give a longer text or a smaller --span")
    need, free = memory_of(model.cfg, T + len(asked) + args.max_tokens, model.dtype), free_memory(device)
    if free is not None and need > free:
        fail(f"{args.prompt} has {T} tokens, to read them takes {need / 2 ** 30:.1f} GB and {free / 2 ** 30:.1f} GB are free; "
             f"give a shorter text")
    print(f"{run} on {device}: {T:,} tokens of context, {len(asked)} to ask", file=sys.stderr)
    if T + len(asked) > model.cfg.block_size:
        print(f"that is {(T + len(asked)) / model.cfg.block_size:.1f} times the {model.cfg.block_size:,} tokens the model was "
              f"trained on", file=sys.stderr)
    try:
        with train.refusing(), Interrupt() as stop:
            return run_on(model, tokenizer, torch.tensor(context, device=device), asked, args, lr, stop)
    except torch.OutOfMemoryError:
        fail("the GPU has too little memory; give a shorter text, or smaller --span and --batch-spans")


def run_on(model, tokenizer, ids, asked, args, lr, stop):
    """Prefill, answer, adapt, answer again; all is printed. ids (T) and asked are token ids."""
    T, n, device = len(ids), args.span, ids.device
    ends = {tokenizer.eot_token, *getattr(tokenizer, "stops", ())}

    def reply():
        tokens = answer(model, cache, T, asked, args.max_tokens, tokenizer.n_vocab)
        kept = list(itertools.takewhile(lambda token: token not in ends and not stop.signal, tokens))
        return tokenizer.decode_bytes(kept).decode(errors="replace")

    def probe():
        if not len(held):
            return None
        with torch.no_grad():
            return sum(span_loss(model, kv, ids, t[None], n).item() for t in held) / len(held)

    cache, prefill_s = timed(device, lambda: prefill(model, ids, len(asked) + args.max_tokens))
    kv, held = frozen(cache, T), held_out(T, n)
    before, plain, moved = probe(), reply(), 0.0
    with queries(model) as weights, tqdm(total=args.steps, unit="step", desc="adapting", dynamic_ncols=True) as bar:
        first = [w.detach().clone() for w in weights]

        def learn():
            for loss in adapt(model, weights, kv, ids, may_begin(T, n, held), args.steps, n, args.batch_spans, lr, args.seed):
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                if stop.signal:
                    raise SystemExit(128 + stop.signal)
        seconds = timed(device, learn)[1]
        after, adapted = probe(), reply()
        with torch.no_grad():
            moved = math.sqrt(sum(float((w - f).square().sum()) for w, f in zip(weights, first))
                              / sum(float(f.square().sum()) for f in first))
        if args.save_queries:
            with atomic(Path(args.save_queries)) as f:
                torch.save({f"layers.{i}.self_attn.q_proj.weight": w.detach().cpu() for i, w in enumerate(weights)}, f)
    tokens = args.steps * args.batch_spans * n
    keys = tokens * (T + 1) // 2                                     # in the mean a token of a random span looks at half of them
    flops = flops_of_spans(model, tokens, keys)
    result = {"plain": plain, "adapted": adapted, "held_out_before": before, "held_out_after": after, "held_out_spans": len(held),
              "context": T, "prefill_seconds": prefill_s, "seconds": seconds, "flops": flops,
              "thinking_tokens": thinking_tokens(model, T + len(asked), flops), "moved": moved, "lr": lr}
    print(f"--- as it is\n{plain}\n--- with queries trained on this prompt\n{adapted}\n---")
    print("held-out spans: none, the prompt is shorter than three spans" if before is None else
          f"loss on {len(held)} held-out spans: {before:.4f} before, {after:.4f} after, {after - before:+.4f} nats/token")
    print(f"{args.steps} steps in {seconds:.2f} s after a prefill of {prefill_s:.2f} s; W_Q moved by {100 * moved:.2f}%; as many FLOPs "
          f"({flops:.3g}) as {result['thinking_tokens']:,} tokens of thinking")
    return result


if __name__ == "__main__":
    main()
