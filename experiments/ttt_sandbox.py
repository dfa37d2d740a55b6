"""The sandbox of experiments/ttt_context.py: streams of records, and models trained on short ones.

A stream is a list of records a b value. In `records`, a and b together decide on the value. In
`columns` one of them does, the other means nothing, and which one is not said: only the context
shows it. Layers of the models alternate between `shift`, a short convolution that sees what stands
side by side, and softmax attention without positions, so that length dilutes attention and does
nothing else.
"""

import math

import torch
import torch.nn.functional as F

import train

TASKS = ("records", "columns")
NORMS = ("no QK-norm", "QK-norm")

# --------------------------------------------------------------------------------------------------
# Streams of records


def stream(task, n_tokens, recipe, generator, n_questions, kind=1, n_keys=None):
    """Return a context of at most n_tokens, and questions about it.

    ids (T); follows (T) bool: the values that repeat an earlier record's; questions: tails (Q, 2),
    answers (Q, 1) and needles (Q, T) bool, the positions that answer them. kind: the column that
    counts in `columns`, 1 or 2. Questions on `records` are about pairs that occur once.
    """

    def choose(n, k):
        return torch.randperm(n, generator=generator)[:k]

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    names = recipe["names"]
    n_records = n_tokens // 3
    n_keys = n_keys or n_records // 2
    side = names  # different values of a, and of b
    if task == "records":
        side = min(names, max(4, math.ceil(1.5 * n_keys**0.5)))
        key = choose(side * side, n_keys)[draw(min(n_keys, side * side), n_records)]
        a = key // side
        b = key % side
    else:
        a = draw(min(n_keys, side), n_records)
        b = draw(min(n_keys, side), n_records)
        key = a if kind == 1 else b
    value = draw(recipe["values"], int(key.max()) + 1)[key]
    columns = [choose(names, side)[a], choose(names, side)[b] + names, value + 2 * names]
    records = torch.stack(columns, dim=1)  # (R, 3)

    # a value follows if its key has occurred before
    index = torch.arange(n_records)
    first = torch.full((int(key.max()) + 1,), n_records).scatter_reduce(0, key, index, "amin")
    follows = torch.zeros(n_records, 3, dtype=torch.bool)
    follows[:, 2] = index > first[key]

    # questions
    asked = index
    if task == "records" and (key.bincount()[key] == 1).any():
        asked = (key.bincount()[key] == 1).nonzero()[:, 0]
    asked = asked[choose(len(asked), n_questions)]  # (Q)
    tails = records[asked, :2]
    if task == "columns":  # a new pair: what means nothing is that of another record
        tails[:, 2 - kind] = records[draw(n_records, len(asked)), 2 - kind]
    needles = torch.zeros(len(asked), n_records, 3, dtype=torch.bool)
    needles[..., 2] = key[asked, None] == key
    return records.flatten(), follows.flatten(), (tails, records[asked, 2:], needles.flatten(1))


def lesson(task, T, recipe, generator):
    """Return T + 1 ids to train on, a context and then questions with answers, and which follow."""
    n_keys = int(torch.randint(3, T // 6, (), generator=generator))
    kind = 1 + int(torch.randint(2, (), generator=generator))
    n_context = T + 1 - T // 6
    ids, follows, questions = stream(task, n_context, recipe, generator, T, kind, n_keys)
    asked = torch.cat(questions[:2], dim=1)  # (Q, 3)
    n_asked = math.ceil((T + 1 - len(ids)) / 3)
    asked = asked.repeat(math.ceil(n_asked / len(asked)), 1)[:n_asked]
    answered = torch.tensor([False, False, True]).expand(n_asked, 3)
    ids = torch.cat([ids, asked.flatten()])
    follows = torch.cat([follows, answered.flatten()])
    return ids[: T + 1], follows[: T + 1]


def rename(ids, recipe, generator):
    """Give all things in ids (B, T) other names, different ones in each sequence."""
    tables = []
    low = 0
    for size in (recipe["names"], recipe["names"], recipe["values"]):
        tables.append(low + torch.rand(len(ids), size, generator=generator).argsort(dim=1))
        low += size
    return torch.cat(tables, dim=1).gather(1, ids)


# --------------------------------------------------------------------------------------------------
# Models


def shift(q, k, v):
    """Head h returns the value h + 1 positions back, whatever the query: a short convolution."""
    _, H, n, _ = q.shape
    length = n + H
    v = v[:, :, -length:].repeat_interleave(H // v.shape[1], dim=1)
    v = F.pad(v, (0, 0, length - v.shape[2], 0))  # (B, H, n + H, D)
    return torch.stack([v[:, h, H - 1 - h : H - 1 - h + n] for h in range(H)], dim=1)


shift.has_logits = False  # no product of queries and keys to count


def build_model(recipe, norm, seed):
    """Return a GPT whose layers alternate between `shift` and softmax without positions."""
    config = train.GPTConfig(
        vocab_size=2 * recipe["names"] + recipe["values"],
        block_size=recipe["train"]["tokens"],
        qk_norm=norm == "QK-norm",
        tied=False,
        **recipe["shape"],
    )
    model = train.GPT(config)
    config.attn = "shift,softmax"
    for i, layer in enumerate(model.layers):
        layer.self_attn.rope_inputs = ()
        if i % 2 == 0:
            layer.self_attn.function = shift
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                std = 1.0 if "embed" in name else p.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std /= math.sqrt(2 * config.n_layer)
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def train_model(recipe, norm, seed):
    """Train a model on short streams of all tasks.

    In the first half of the steps only what follows from the text counts, which is when the model
    learns to look things up.
    """
    model = build_model(recipe, norm, seed)
    r = recipe["train"]
    generator = torch.Generator().manual_seed(seed)
    lessons = []
    for i in range(r["lessons"]):
        lessons.append(lesson(TASKS[i % 2], r["tokens"], recipe, generator))
    ids, follows = (torch.stack(t) for t in zip(*lessons))  # (lessons, T + 1)
    options = {"lr": r["lr"], "betas": (0.9, 0.98), "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, r["lr"], r["steps"], pct_start=0.1)
    for step in range(r["steps"]):
        drawn = torch.randint(len(ids), (r["batch"],), generator=generator)
        batch = rename(ids[drawn], recipe, generator)  # (B, T + 1)
        targets = batch[:, 1:]
        if step < r["steps"] / 2:
            targets = targets.masked_fill(~follows[drawn, 1:], -1)
        loss = model(batch[:, :-1], targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
