"""2-simplicial attention: Fast and Simplex (Roy et al., arXiv 2507.02754), after Clift et al. (arXiv 1909.00668).

A query scores *pairs*: the logit is trilinear in it, a first and a second key, one softmax runs over all pairs, and what is
averaged is the product of the two values, channel by channel:

    S_ijk = sum_l q_il k_jl k2_kl / sqrt(D)         P_i = softmax of S_i over all pairs (j, k)
    o_i   = sum_jk P_ijk (v_j * v2_k)               j in (i - w1, i], k in (i - w2, i]: self included

k and v own the window w1 (512 in the paper), k2 and v2 own w2 (32); every fourth layer is of this kind. The paper claims, for
models of 2 billion active parameters and up, a lower loss on mathematics and code at equal tokens and a steeper law of scaling.

How to compute it. For a fixed offset d = i - k the pair (i, d) is an ordinary attention row with the query q_i * k2_{i-d} over
(k, v) and the window w1, with result a_id and log-sum-exp e_id. The softmax over pairs joins them:

    o_i = sum_d softmax_d(e_id) (a_id * v2_{i-d})                      a mixture of w2 ordinary attentions

so any flash attention computes it; kernels/simplicial.py is one with pairs as rows. The two windows may change places.

The GPT turns nothing by position in these layers (`attention.rotary`): a trilinear form changes when q, k and k2 are turned
alike, and the paper does not say what it does. To sample it keeps the last w1 and w2 positions alone (`attention.windows`).
Fresh weights make v * v2 tiny. The code published by the authors knows an offset against that: with 1 added to k2 and v2 training
begins as plain attention through the window w1. In the experiment neither that nor rotary positions on q, k and k2 made a
difference that three seeds resolve, so neither is built in.

    python simplicial.py                  the experiments below, in 200 s on two CPU cores -> results/simplicial-cpu.*
    python simplicial.py --full           the fit of losses to sizes, on one GPU -> results/simplicial-h200.*
    python train.py --attn simplicial --simplicial-every 4 --w1 512 --w2 32
"""
import functools, json, math, random, re, shutil, statistics, sys, tempfile, time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from kernels import simplicial as kernel
except ModuleNotFoundError as e:
    if e.name != "triton":
        raise
    kernel = None

SCORES = 2 ** 25                                                     # logits that exist at one time away from the kernel


def check(q, k, v, k2, v2, w1, w2):
    """Raise ValueError, one sentence, unless the shapes fit together and the windows hold at least the query itself."""
    fits = k.shape == v.shape and k2.shape == v2.shape and k.shape[:2] == k2.shape[:2] and q.shape[1] % k.shape[1] == 0
    if not fits or {t.shape[0] for t in (q, k)} != {q.shape[0]} or {t.shape[3] for t in (q, k, k2)} != {q.shape[3]}:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(("q", "k", "v", "k2", "v2"), (q, k, v, k2, v2)))
        raise ValueError(f"{shapes} do not fit together: (B, H, Tq, D), then (B, Hkv, Tk, D) with Hkv a divisor of H")
    if min(k.shape[2], k2.shape[2]) < q.shape[2] or q.shape[2] < 1:
        raise ValueError(f"{q.shape[2]} queries are not the last of {min(k.shape[2], k2.shape[2])} positions")
    if min(w1, w2) < 1:
        raise ValueError(f"w1 is {w1} and w2 {w2}; a window holds at least 1 position, the query's own")


def window(x, first, n, w):
    """x (B, H, T, D) -> (B, H, n, w, D): for the positions first ... first + n - 1 the w up to and including each, the newest
    last, zeros before the start; and which of them exist, (n, w)."""
    x = F.pad(x, (0, 0, w - 1, 0))[:, :, first:first + n + w - 1].unfold(2, w, 1).transpose(-1, -2)
    i = torch.arange(first, first + n, device=x.device)[:, None]
    return x, i - torch.arange(w - 1, -1, -1, device=x.device) >= 0


def sarrus(q, k, k2):
    """-> q, k, k2 of twice the width whose trilinear form is the sum over chunks l of three channels of det[q_l; k_l; k2_l]."""
    q, k, k2 = (t.unflatten(-1, (-1, 3)) for t in (q, k, k2))        # (..., D / 3, 3)
    pairs = (q, q), (k.roll(-1, -1), -k.roll(1, -1)), (k2.roll(1, -1), k2.roll(-1, -1))
    return [torch.cat(p, -1).flatten(-2) for p in pairs]             # (..., 2 D)


def reference(q, k, v, k2, v2, *, w1=512, w2=32, determinant=False):
    """The definition, any dtype. q (B, H, Tq, D), k and v (B, Hkv, Tk, D), k2 and v2 (B, Hkv, Tk2, D) -> (B, H, Tq, D); causal,
    the queries being the last of the positions. determinant: with the logits of section 5, eq. 9, which a rotation of q, k and
    k2 leaves as they are (D a multiple of 3). Makes (B, H, Tq, w1, w2) and (B, H, Tq, w1, D) tensors."""
    check(q, k, v, k2, v2, w1, w2)
    Tq, scale = q.shape[2], q.shape[3] ** -0.5
    if determinant:
        q, k, k2 = sarrus(q, k, k2)
    k, v, k2, v2 = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v, k2, v2))                  # (B, H, Tk, D)
    (k, there), (v, _) = (window(t, t.shape[2] - Tq, Tq, min(w1, t.shape[2])) for t in (k, v))                 # (B, H, Tq, w1, D)
    (k2, there2), (v2, _) = (window(t, t.shape[2] - Tq, Tq, min(w2, t.shape[2])) for t in (k2, v2))            # (B, H, Tq, w2, D)
    s = (k * scale) @ (q[..., None, :] * k2).transpose(-1, -2)                                      # (B, H, Tq, w1, w2)
    s = s.masked_fill(~(there[:, :, None] & there2[:, None]), -torch.inf)
    p = s.flatten(-2).softmax(-1).view(s.shape)
    return ((p @ v2) * v).sum(-2)                                    # sum_j v_j * sum_k p_jk v2_k


def block(q, k, v, k2, v2, visible, there, scale):
    """n queries: q (B, Hkv, g, n, D), the J keys that one of them sees, k and v (B, Hkv, J, D), for each its own second keys,
    k2 and v2 (B, Hkv, n, w2, D); visible (n, J), there (n, w2) -> (B, Hkv, g, n, D). The mixture above, its softmax in one."""
    rows = (q[..., None, :] * k2[:, :, None] * scale)                                        # (B, Hkv, g, n, w2, D)
    s = (rows.flatten(2, 4) @ k.transpose(-1, -2)).unflatten(2, rows.shape[2:5])             # (B, Hkv, g, n, w2, J)
    s = s.masked_fill(~(visible[:, None] & there[:, :, None]), -torch.inf)
    p = s.flatten(-2).softmax(-1).view(s.shape)
    a = (p.flatten(2, 4) @ v).view(rows.shape)                                               # (B, Hkv, g, n, w2, D)
    return (a * v2[:, :, None]).sum(-2)


def lean(q, k, v, k2, v2, w1, w2):
    """attention in PyTorch, a block of queries at a time; what many blocks would keep for the backward pass is computed again."""
    if w2 > w1:                                                      # the roles are symmetric: rows take the shorter window
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    dtype, (B, H, Tq, D), Tk, Tk2 = q.dtype, q.shape, k.shape[2], k2.shape[2]
    w1, w2 = min(w1, Tk), min(w2, Tk2)
    q, k, v, k2, v2 = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, k2, v2))
    q, out = q.unflatten(1, (k.shape[1], -1)), []                                            # (B, Hkv, g, Tq, D)
    n = max(1, min(Tq, max(w1 // 2, 16), SCORES // (2 * B * H * w1 * w2)))
    again = torch.is_grad_enabled() and B * H * Tq * w2 * (w1 + n) > SCORES
    for start in range(0, Tq, n):
        i = torch.arange(start, min(start + n, Tq), device=q.device) + Tk - Tq
        first = max(0, int(start + Tk - Tq - w1 + 1))
        j = torch.arange(first, min(start + n, Tq) + Tk - Tq, device=q.device)
        (k2_i, there), (v2_i, _) = (window(t, start + Tk2 - Tq, len(i), w2) for t in (k2, v2))
        visible = (j <= i[:, None]) & (j > i[:, None] - w1)
        span = slice(first, first + len(j))
        args = q[:, :, :, start:start + n], k[:, :, span], v[:, :, span], k2_i, v2_i, visible, there, D ** -0.5
        out.append(checkpoint(block, *args, use_reentrant=False) if again else block(*args))
    return torch.cat(out, 3).flatten(1, 2).to(dtype)                                         # (B, H, Tq, D)


@functools.cache
def complain(why):
    print(f"simplicial: {why}, so PyTorch computes it, many times slower than the kernel", file=sys.stderr)


def attention(q, k, v, k2, v2, *, w1=512, w2=32):
    """2-simplicial attention, as `reference` in shapes and meaning: the Triton kernel on a GPU, for D of 16, 32, 64 or 128 in
    float32, float16 or bfloat16, and `lean` elsewhere. ValueError if shapes or windows do not fit."""
    check(q, k, v, k2, v2, w1, w2)
    k, v, k2, v2 = (t.to(q.dtype) for t in (k, v, k2, v2))
    if q.is_cuda:
        if kernel and q.shape[3] in kernel.WIDTHS and q.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return kernel.attention(q, k, v, k2, v2, w1, w2)[0]
        complain("there is no Triton here" if not kernel else f"the kernel has no heads of width {q.shape[3]} in {q.dtype}")
    return lean(q, k, v, k2, v2, w1, w2)


# What train.py asks of an attention that is not like softmax attention: which projections it turns by position, which option is
# the window of each, all that is kept to sample on, and how many logits a query has in the mean over T positions.
attention.rotary = ()
attention.windows = {"k": "w1", "v": "w1", "k2": "w2", "v2": "w2"}
attention.logits = lambda T, w1, w2: sum(min(i, w1) * min(i, w2) for i in range(1, T + 1)) / T


# ---------------------------------------------------------------------------------------------------------------------
# Controls for the experiments. Below T = 32k such a layer costs more than global attention, so what it gains over a plain
# window, over two attentions multiplied, over a gate and over as many parameters elsewhere is the question.

def local(q, k, v, *, w1=32):
    """Softmax attention through the window w1."""
    i, j = (torch.arange(n, device=q.device) + k.shape[2] - n for n in (q.shape[2], k.shape[2]))
    seen = (j <= i[:, None]) & (j > i[:, None] - w1)                 # (Tq, Tk)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.shape[1] != k.shape[1])


def product(q, k, v, k2, v2, *, w1=32, w2=8):
    """Two softmax attentions multiplied: the trilinear form of additive logits, as many parameters, almost free."""
    return local(q, k, v, w1=w1) * local(q, k2, v2, w1=w2)


def gate(q, k, v, k2, v2, *, w1=32):
    """w2 = 1: attention with the query q * k2, its result times v2. Multiplicative, but a function of pairs of positions."""
    g = q.shape[1] // k.shape[1]
    k2, v2 = (t[:, :, -q.shape[2]:].repeat_interleave(g, 1) for t in (k2, v2))
    return local(q * k2, k, v, w1=w1) * v2


def offset(q, k, v, k2, v2, *, w1=32, w2=8):
    """Where k2 and v2 are near 0, attention through the window w1."""
    return attention(q, k, v, k2 + 1, v2 + 1, w1=w1, w2=w2)


def turned(q, k, v, k2, v2, *, w1=32, w2=8):
    """With rotary positions on all three factors of the logit."""
    return attention(q, k, v, k2, v2, w1=w1, w2=w2)


turned.rotary = ("q", "k", "k2")
product.rotary = gate.rotary = offset.rotary = ()


# ---------------------------------------------------------------------------------------------------------------------
# Match3: are there j, k <= i with x_i + x_j + x_k = 0 modulo M?

def match3(x, M):
    """x (B, T) -> (B, T) bool, from the definition."""
    near = torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None]
    hit = (x[:, :, None, None] + x[:, None, :, None] + x[:, None, None]) % M == 0            # (B, i, j, k)
    return (hit & near[None, :, :, None] & near[None, :, None]).flatten(-2).any(-1)


def match3_by_hand(x, M, f=attention):
    """One head of width 5, no training: cos(a + b + c) is trilinear in four products of a cosine and a sine each, and the pair
    of the blank at the start scores as much as a match. Values 1, for the blank 0: beta matching pairs give beta / (beta + 1)."""
    T = x.shape[1]
    t = math.log(10 * (T + 1) ** 2) / (1 - math.cos(2 * math.pi / M))                        # others weigh a tenth together
    angle = 2 * math.pi / M * x
    c, s, one = angle.cos(), angle.sin(), torch.ones_like(angle)
    def heads(*channels, blank):                                     # -> (B, 1, 1 + T, 5), the blank first
        token = torch.stack(channels, -1)
        return torch.cat([torch.tensor(blank).to(token).expand(len(x), 1, 5), token], 1)[:, None]
    q = heads(c, c, s, s, one, blank=[0., 0, 0, 0, 1]) * t * 5 ** 0.5
    k = heads(c, -s, -c, -s, 0 * one, blank=[0., 0, 0, 0, 1])
    k2 = heads(c, s, s, c, 0 * one, blank=[0., 0, 0, 0, 1])
    v = heads(*[one] * 5, blank=[0.] * 5)
    return f(q, k, v, k2, v, w1=T + 1, w2=T + 1)[:, 0, 1:, 0] > 0.4


def most_right_of_four(h):
    """One softmax head cannot. For a fixed query its output exceeds a threshold exactly if a sum over the tokens of some h(token)
    does exceed 0: the sum of p (v - threshold), times the denominator. If {b, c} and {b', c'} match but {b, c'} and {b', c} do
    not, h_b + h_c and h_b' + h_c' must be positive, h_b + h_c' and h_b' + h_c negative; yet both pairs add up to the same.
    h (N, 4) of b, c, b', c' for N heads -> the most sequences of the four that one of them gets right."""
    b, c, b2, c2 = h.unbind(1)
    return torch.stack([b + c > 0, b2 + c2 > 0, b + c2 < 0, b2 + c < 0]).sum(0).max().item()


def match3_task(B, M, T, draw):
    """-> tokens (B, T, 1) and whether the last one has a match. Half have; in each sequence two tokens were set to sum with the
    last one to 0 or, a near miss, to 1 modulo M."""
    x = torch.randint(M, (12 * B, T), generator=draw)
    place = torch.rand(12 * B, T - 1, generator=draw).argsort(1)[:, :2]                       # two of the others
    miss, row = torch.arange(12 * B) % 6 > 0, torch.arange(12 * B)
    x[row, place[:, 1]] = (miss.long() - x[:, -1] - x[row, place[:, 0]]) % M
    pairs = (x[:, None, :] + x[:, :, None] + x[:, -1, None, None]) % M == 0
    y = pairs.flatten(1).any(1)
    keep = torch.cat([(y & ~miss).nonzero()[:B // 2, 0], (~y).nonzero()[:B - B // 2, 0]])
    return x[keep, :, None], y[keep].long()


def composition_task(B, M, draw):
    """f and g map M things to M; the context lists (x, g(x)) and (y, f(y)) in any order, the last token asks for f(g(x)).
    -> tokens (B, 2 M + 1, 3) of table, argument, value; the answer."""
    g, f = (torch.randint(M, (B, M), generator=draw) for _ in "gf")
    x, y = torch.randint(M, (B,), generator=draw), torch.arange(M).expand(B, M)
    table = torch.cat([torch.stack([torch.full_like(y, n), y, t], -1) for n, t in enumerate((g, f))], 1)       # (B, 2 M, 3)
    order = torch.rand(B, 2 * M, generator=draw).argsort(1)[..., None].expand(-1, -1, 3)
    asked = torch.stack([torch.full_like(x, 2), x, torch.zeros_like(x)], -1)[:, None]
    return torch.cat([table.gather(1, order), asked], 1), f.gather(1, g.gather(1, x[:, None]))[:, 0]


WIDTH, HIDDEN = 48, 96
TASKS = {"match3": (lambda B, draw: match3_task(B, 20, 7, draw), (20,), 2, 500),         # examples, vocabularies, classes, steps
         "composition": (lambda B, draw: composition_task(B, 4, draw), (3, 4, 4), 4, 300)}
ONE_LAYER = {"2-simplicial": attention, "product of two": product, "gate": gate, "softmax": local}
TASK_SEEDS = (1, 2, 3)


class Reader(nn.Module):
    """One layer of train.py's GPT without positions; the last token is classified. softmax attention gets a wider SwiGLU, so
    that all arms have equally many parameters."""
    def __init__(self, train, function, vocabularies, classes):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, WIDTH) for n in vocabularies)
        everything = {name: 10 ** 6 for name in train.signature(function)[1]}
        hidden = HIDDEN + (2 * WIDTH // 3 if function is local else 0)
        cfg = train.GPTConfig(vocab_size=1, n_embd=WIDTH, n_head=4, n_hidden=hidden, attn_args=everything)
        self.layer, self.norm, self.out = train.Layer(cfg, function), train.RMSNorm(WIDTH, 1e-5), nn.Linear(WIDTH, classes)
        self.layer.self_attn.rotary = ()

    def forward(self, tokens):                                       # (B, T, number of tables) -> (B, classes)
        x = sum(table(tokens[..., n]) for n, table in enumerate(self.tables))
        return self.out(self.norm(self.layer(x, None, None)[:, -1]))


def train_task(train, task, arm, seed):
    """-> accuracy on 2000 new examples, seconds, parameters."""
    make, vocabularies, classes, steps = TASKS[task]
    draw, test = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    torch.manual_seed(seed)
    model = Reader(train, ONE_LAYER[arm], vocabularies, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    began = time.perf_counter()
    for _ in range(steps):
        x, y = make(128, draw)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        x, y = make(2000, test)
        accuracy = (model(x).argmax(-1) == y).float().mean().item()
    return {"accuracy": accuracy, "seconds": seconds, "steps": steps, "parameters": sum(p.numel() for p in model.parameters())}


# ---------------------------------------------------------------------------------------------------------------------
# Language models: the same data and steps, only the layers that --simplicial-every picks differ

LM_FLAGS = "--model tiny --n-layer 2 --n-embd 96 --block-size 64 --batch-size 12 --steps 200 --lr 2e-3 --simplicial-every 2"
LM_SEEDS, WIDER = (1, 2, 3), 288                                     # as many parameters in the SwiGLU as two projections more
LM_ARMS = {
    "softmax, global": ("softmax", ""),
    "softmax, window": ("local", "--w1 32"),
    "softmax, window, wider MLP": ("local", f"--w1 32 --n-hidden {WIDER}"),
    "product of two": ("product", "--w1 32 --w2 8"),
    "2-simplicial": ("simplicial", "--w1 32 --w2 8"),
    "2-simplicial, k2 + 1 and v2 + 1": ("offset", "--w1 32 --w2 8"),
    "2-simplicial, rotary on q, k, k2": ("turned", "--w1 32 --w2 8"),
}
BASELINE = "softmax, window, wider MLP"
# Table 2 of the paper, negative log-likelihood at 1, 2 and 3.5 billion active parameters
TABLE2 = {
    "softmax": {"GSM8k": (.3277, .2987, .2781), "MMLU": (.6411, .5932, .5543), "MMLU-pro": (.8718, .8193, .7858),
                "MBPP": (.2690, .2435, .2203)},
    "2-simplicial": {"GSM8k": (.3302, .2942, .2718), "MMLU": (.6423, .5862, .5484), "MMLU-pro": (.8718, .8135, .7689),
                     "MBPP": (.2714, .2411, .2193)}}


def fit(sizes, losses):
    """Least squares of the paper's -log L = a log N + b -> a, b."""
    x, y = [math.log(n) for n in sizes], [-math.log(loss) for loss in losses]
    a = statistics.covariance(x, y) / statistics.variance(x)
    return a, statistics.mean(y) - a * statistics.mean(x)


def refit():
    """-> {task: exponents of softmax and 2-simplicial, over all three sizes and without the smallest}"""
    sizes, both = (1e9, 2e9, 3.5e9), lambda losses: (fit(sizes, losses)[0], fit(sizes[1:], losses[1:])[0])
    return {task: {arm: both(rows[task]) for arm, rows in TABLE2.items()} for task in TABLE2["softmax"]}


def train_lm(train, folder, arm, seed, flags):
    """-> held-out bits per byte and loss, tokens per second, parameters."""
    name, more = LM_ARMS[arm]
    train.BUILTIN["attention"] |= {f.__name__: f for f in (local, product, offset, turned)}
    run, said = train.part(f"{flags} {more} --attn {name} --seed {seed} --sample 0".split() + ["--out", str(folder)])
    parameters = int(re.search(r"model +([\d,]+) parameters", said)[1].replace(",", ""))
    return {"bpb": run["val_bpb"], "loss": run["val_loss"], "tokens_per_s": run["tokens_per_s"], "parameters": parameters}


def on_a_laptop(train, folder):
    """-> what results/simplicial-cpu.json holds, printed on the way."""
    draw = torch.Generator().manual_seed(0)
    hand = {}
    for M, T in ((16, 6), (64, 12), (256, 20), (997, 30)):
        x = torch.randint(M, (64, T), generator=draw)
        hand[f"M={M}, T={T}"] = (match3_by_hand(x, M) == match3(x, M)).float().mean().item()
    print("Match3 by hand-built weights, one head, accuracy: " + ", ".join(f"{k}: {v:.4f}" for k, v in hand.items()))
    best = most_right_of_four(torch.randn(20000, 4, generator=draw))
    print(f"four sequences that pair the same tokens otherwise: of 20,000 softmax heads the best is right on {best}")

    tasks = {task: {arm: [train_task(train, task, arm, s) for s in TASK_SEEDS] for arm in ONE_LAYER} for task in TASKS}
    for task, arms in tasks.items():
        for arm, runs in arms.items():
            accuracy, seconds = " ".join(format(r["accuracy"], ".3f") for r in runs), statistics.mean(r["seconds"] for r in runs)
            print(f"{task:12} {arm:16} accuracy {accuracy}  {runs[0]['parameters']:,} parameters, {seconds:.1f} s")

    flags = f"{LM_FLAGS} --device cpu --eval-every 1000"
    lm = {arm: [train_lm(train, folder / f"{arm}-{s}", arm, s, flags) for s in LM_SEEDS] for arm in LM_ARMS}
    against = {arm: train.interval([a["bpb"] - b["bpb"] for a, b in zip(lm[arm], lm[BASELINE])]) for arm in lm if arm != BASELINE}
    for arm, runs in lm.items():
        mean, half = against.get(arm, (0, 0))
        bpb, speed = (statistics.mean(r[key] for r in runs) for key in ("bpb", "tokens_per_s"))
        print(f"{arm:34} {bpb:.4f} bits/byte, {mean:+.4f} +- {half:.4f} against the baseline, "
              f"{runs[0]['parameters']:,} parameters, {speed:,.0f} tokens/s")
    exponents = refit()
    for task, arms in exponents.items():
        print(f"paper's Table 2, {task:9} exponents of softmax and 2-simplicial, three sizes {arms['softmax'][0]:.4f} "
              f"{arms['2-simplicial'][0]:.4f}, without 1B {arms['softmax'][1]:.4f} {arms['2-simplicial'][1]:.4f}")
    return {"match3_by_hand": hand, "softmax_right_of_4": best, "tasks": tasks, "language_model": lm,
            "against_baseline": against, "baseline": BASELINE, "flags": LM_FLAGS, "table2_exponents": exponents}


# ---------------------------------------------------------------------------------------------------------------------
# The law of scaling, on a GPU

FULL_SIZES = {"S": "--n-layer 4 --n-embd 128 --n-head 2 --lr 2e-3", "M": "--n-layer 4 --n-embd 256 --n-head 4 --lr 1e-3",
              "L": "--n-layer 8 --n-embd 512 --n-head 8 --lr 5e-4"}       # the wider the model, the lower its rate
FULL_FLAGS = "--data python --block-size 1024 --batch-size 32 --steps 200 --eval-every 1000 --simplicial-every 4 --no-compile"
FULL_ARMS, FULL_SEEDS = ("softmax, global", "softmax, window", "2-simplicial"), (1, 2, 3)
KEPT = "out/simplicial-full"                                         # runs done, until all are
FULL_WINDOWS = {"softmax, window": "--w1 128", "2-simplicial": "--w1 128 --w2 16"}


def on_a_gpu(train, folder):
    """-> what results/simplicial-h200.json holds: three sizes, equal tokens, the fit and its interval by drawing seeds anew."""
    LM_ARMS.update({arm: (LM_ARMS[arm][0], more) for arm, more in FULL_WINDOWS.items()})

    def one(arm, size, seed):
        flags = f"{FULL_FLAGS} {FULL_SIZES[size]}"
        run = train.remembered(KEPT, [arm, LM_ARMS[arm], flags, seed],
                               lambda: train_lm(train, folder / f"{arm}-{size}-{seed}", arm, seed, flags))
        print(f"{arm}, {size}, seed {seed}: {run['loss']:.4f} nats per token", flush=True)
        return run
    runs = {arm: {size: [one(arm, size, s) for s in FULL_SEEDS] for size in FULL_SIZES} for arm in FULL_ARMS}
    draw, fits = random.Random(0), {}
    for arm, sizes in runs.items():
        counts = [r[0]["parameters"] for r in sizes.values()]
        losses = [[r["loss"] for r in rs] for rs in sizes.values()]
        a, b = fit(counts, list(map(statistics.mean, losses)))
        again = sorted(fit(counts, [statistics.mean(draw.choices(one, k=len(one))) for one in losses])[0] for _ in range(2000))
        fits[arm] = {"a": a, "b": b, "interval_95": [again[50], again[-51]]}
        table = ", ".join(f"{n / 1e6:.1f} M: {statistics.mean(one):.4f}" for n, one in zip(counts, losses))
        print(f"{arm:20} {table}; a = {a:.4f} ({again[50]:.4f} to {again[-51]:.4f}), b = {b:.4f}")
    return {"runs": runs, "fits": fits, "sizes": FULL_SIZES, "flags": FULL_FLAGS, "windows": FULL_WINDOWS, "table2_exponents": refit()}


def draw_laptop(axes, result):
    for n, (task, arms) in enumerate(result["tasks"].items()):
        for m, (arm, runs) in enumerate(arms.items()):
            x, y = n + 0.2 * m - 0.3, [r["accuracy"] for r in runs]
            axes[0].bar(x, statistics.mean(y), 0.18, color=f"C{m}", label=None if n else arm)
            axes[0].plot([x] * len(y), y, "k.", ms=3)
    axes[0].set(xticks=range(len(result["tasks"])), xticklabels=result["tasks"], ylabel="accuracy", ylim=(0, 1.25),
                title="one layer, equal parameters")
    axes[0].legend(fontsize=7, ncols=2, loc="upper right")
    arms = list(result["against_baseline"])
    mean, half = zip(*result["against_baseline"].values())
    axes[1].errorbar(mean, range(len(arms)), xerr=half, fmt="o", capsize=3)
    axes[1].axvline(0, color="gray", lw=0.8)
    axes[1].set(yticks=range(len(arms)), yticklabels=arms, title="language model")
    axes[1].set_xlabel(f"bits per byte against {result['baseline']} (95%)", fontsize=8)
    axes[1].tick_params(labelsize=7)


def draw_gpu(axes, result):
    for n, (arm, sizes) in enumerate(result["runs"].items()):
        for r in sum(sizes.values(), []):
            axes[0].plot(r["parameters"], r["loss"], f"C{n}o", ms=3)
        counts = [r[0]["parameters"] for r in sizes.values()]
        f = result["fits"][arm]
        axes[0].plot(counts, [math.exp(-f["b"]) * c ** -f["a"] for c in counts], f"C{n}", label=arm)
        low, high = f["interval_95"]
        axes[1].errorbar(f["a"], n, xerr=[[f["a"] - low], [high - f["a"]]], fmt=f"C{n}o", capsize=3)
    axes[0].set(xscale="log", yscale="log", xlabel="parameters", ylabel="held-out nats per token", title="equal tokens")
    axes[0].legend(fontsize=7)
    axes[1].set(yticks=range(len(result["runs"])), yticklabels=result["runs"], xlabel="exponent a (95%, bootstrap)",
                title="-log L = a log N + b")


def main(argv=None):
    import train                                                     # the only place that knows the GPT
    parser = train.Parser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="three sizes of model and the fit, on a GPU; cut short, it goes on where it stopped")
    parser.add_argument("--out", default="results", help="folder for what comes out (default: results)")
    args = parser.parse_args(argv)
    if args.full and not torch.cuda.is_available():
        train.fail("--full is for a GPU, and there is none here; without it the experiment takes three minutes on a CPU")
    seconds, out, name = train.stopwatch(args.full and KEPT), train.writable(args.out), "simplicial-h200" if args.full else "simplicial-cpu"
    with tempfile.TemporaryDirectory() as d:
        result = (on_a_gpu if args.full else on_a_laptop)(train, Path(d))
    device = torch.cuda.get_device_name() if args.full else f"{torch.get_num_threads()} CPU threads"
    result |= {"device": device, "torch": torch.__version__, "seconds": seconds()}
    with train.atomic(out / f"{name}.json") as f:
        f.write(json.dumps(result, indent=1).encode())
    figure, axes = train.figure((10, 4), 1, 2)
    (draw_gpu if args.full else draw_laptop)(axes, result)
    train.keep(figure, out / f"{name}.png")
    if args.full:
        shutil.rmtree(KEPT, ignore_errors=True)
    return result


if __name__ == "__main__":
    import train
    train.leave(main)
