"""The sandbox of experiments/ttt_context.py: contexts with questions, and models for them.

A context is a list of records, three tokens each: a, b, value. In the task `records`, a and b
together are the key that decides on the value. In `columns`, one of the two columns alone is the
key, and only the context shows which one.

Layers of the models alternate between `shift`, a short convolution that puts the tokens of a record
together, and softmax attention without positions. So all that length does is dilute attention.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train

TASKS = ("records", "columns")
NORMS = ("no QK-norm", "QK-norm")


# --------------------------------------------------------------------------------------------------
# Contexts and questions


class Questions(NamedTuple):
    """Q questions about a context of T tokens."""

    tokens: torch.Tensor  # (Q, 2), a and b of a record
    answers: torch.Tensor  # (Q), its value
    needles: torch.Tensor  # (Q, T) bool, the positions in the context that hold the answer


def make_context(task, n_tokens, recipe, generator, n_questions, key_column=1, n_keys=None):
    """Return a context of at most n_tokens, and questions about it.

    Returns ids (T), is_predictable (T) bool: values whose key has occurred before, and Questions.
    key_column: 1 or 2, the column that is the key in `columns`. n_keys: by default half the number
    of records. Questions on `records` are about keys that occur once.
    """

    def choose(n, k):
        return torch.randperm(n, generator=generator)[:k]

    def randint(high, *shape):
        return torch.randint(high, shape, generator=generator)

    # keys and values, as numbers from 0
    names = recipe["names"]
    n_records = n_tokens // 3
    n_keys = n_keys or n_records // 2
    if task == "records":
        n_names = min(names, max(4, math.ceil(1.5 * n_keys**0.5)))
        pairs = choose(n_names**2, n_keys)
        key = pairs[randint(min(n_keys, n_names**2), n_records)]  # (n_records)
        a = key // n_names
        b = key % n_names
    else:
        n_names = names
        a = randint(min(n_keys, n_names), n_records)
        b = randint(min(n_keys, n_names), n_records)
        key = a if key_column == 1 else b
    value = randint(recipe["values"], int(key.max()) + 1)[key]

    # tokens: a has the ids from 0, b those from `names`, values those from 2 `names`
    a_tokens = choose(names, n_names)[a]
    b_tokens = choose(names, n_names)[b] + names
    records = torch.stack([a_tokens, b_tokens, value + 2 * names], dim=1)  # (n_records, 3)

    index = torch.arange(n_records)
    first_index = torch.full((int(key.max()) + 1,), n_records)  # of each key
    first_index = first_index.scatter_reduce(0, key, index, "amin")
    is_predictable = torch.zeros(n_records, 3, dtype=torch.bool)
    is_predictable[:, 2] = index > first_index[key]

    # questions; in `columns` about new pairs: the column that is no key is from another record
    occurs_once = key.bincount()[key] == 1
    candidates = index
    if task == "records" and occurs_once.any():
        candidates = occurs_once.nonzero()[:, 0]
    chosen = candidates[choose(len(candidates), n_questions)]  # (Q)
    question_tokens = records[chosen, :2]
    if task == "columns":
        other_column = 2 - key_column
        question_tokens[:, other_column] = records[randint(n_records, len(chosen)), other_column]
    needles = torch.zeros(len(chosen), n_records, 3, dtype=torch.bool)
    needles[..., 2] = key[chosen, None] == key
    questions = Questions(question_tokens, records[chosen, 2], needles.flatten(1))
    return records.flatten(), is_predictable.flatten(), questions


def make_example(task, T, recipe, generator):
    """Return T + 1 ids to train on, a context and then answered questions, and is_predictable."""
    n_keys = int(torch.randint(3, T // 6, (), generator=generator))
    key_column = 1 + int(torch.randint(2, (), generator=generator))
    n_context = T + 1 - T // 6
    ids, is_predictable, questions = make_context(
        task, n_context, recipe, generator, T, key_column, n_keys
    )

    # fill up with questions, repeated if need be
    answered = torch.cat([questions.tokens, questions.answers[:, None]], dim=1)  # (Q, 3)
    n_answered = math.ceil((T + 1 - len(ids)) / 3)
    answered = answered.repeat(math.ceil(n_answered / len(answered)), 1)[:n_answered]
    is_answer = torch.tensor([False, False, True]).repeat(n_answered)
    ids = torch.cat([ids, answered.flatten()])
    is_predictable = torch.cat([is_predictable, is_answer])
    return ids[: T + 1], is_predictable[: T + 1]


def permute_tokens(ids, recipe, generator):
    """Permute the tokens of each column among themselves, differently in each sequence (B, T)."""
    permutations = []
    low = 0
    for size in (recipe["names"], recipe["names"], recipe["values"]):
        permutation = torch.rand(len(ids), size, generator=generator).argsort(dim=1)
        permutations.append(low + permutation)
        low += size
    return torch.cat(permutations, dim=1).gather(1, ids)


# --------------------------------------------------------------------------------------------------
# Models


def shift(q, k, v):
    """Return in head h the value h + 1 positions back, whatever the query: a short convolution."""
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
    for name, p in model.named_parameters():
        if p.dim() == 1:
            continue
        std = 1.0 if "embed" in name else p.shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * config.n_layer)
        p.data.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def train_model(recipe, norm, seed):
    """Train a model on short contexts of both tasks.

    In the first half of the steps only predictable values count, which is when the model learns to
    look things up.
    """
    model = build_model(recipe, norm, seed)
    settings = recipe["train"]
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(settings["examples"]):
        examples.append(make_example(TASKS[i % 2], settings["tokens"], recipe, generator))
    ids = torch.stack([ids for ids, _ in examples])  # (examples, T + 1)
    is_predictable = torch.stack([predictable for _, predictable in examples])

    lr = settings["lr"]
    n_steps = settings["steps"]
    parameters = model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_steps, pct_start=0.1)
    for step in range(n_steps):
        drawn = torch.randint(len(ids), (settings["batch"],), generator=generator)
        batch = permute_tokens(ids[drawn], recipe, generator)  # (B, T + 1)
        targets = batch[:, 1:]
        if step < n_steps / 2:
            targets = targets.masked_fill(~is_predictable[drawn, 1:], -1)
        loss = model(batch[:, :-1], targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
