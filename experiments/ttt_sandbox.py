"""The sandbox of experiments/ttt_context.py: contexts with questions, and models for them.

A context is a list of records of three tokens: a, b, value. The key of a record decides its value.
In the task `records`, the key is a and b together. In `columns`, it is a alone or b alone, and only
the context shows which one.

The layers of a model alternate between `shift`, a short convolution that brings the tokens of a
record together, and softmax attention without positions. So the only effect of length is to dilute
attention.
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


class Context(NamedTuple):
    """T tokens of records, and Q questions about them."""

    ids: torch.Tensor  # (T)
    is_predictable: torch.Tensor  # (T) bool: the values whose key has occurred before
    questions: torch.Tensor  # (Q, 2), a and b of a record
    answers: torch.Tensor  # (Q), its value
    needles: torch.Tensor  # (Q, T) bool: the positions in ids that hold the answer


def make_context(task, n_tokens, recipe, generator, n_questions, key_column=0, n_keys=None):
    """Return a random Context of at most n_tokens, with at most n_questions.

    key_column: in `columns`, 0 if a is the key and 1 if b is. n_keys: by default half the number of
    records. Questions on `records` are about keys that occur once.
    """

    def choose(n, k):
        """Return k different numbers below n, or n of them if k is larger."""
        return torch.randperm(n, generator=generator)[:k]

    def randint(high, *shape):
        return torch.randint(high, shape, generator=generator)

    # draw a, b, key and value of each record, all (n_records), numbered from 0
    max_names = recipe["names"]
    n_records = n_tokens // 3
    n_keys = n_keys or n_records // 2
    if task == "records":
        # use few names, so that each is part of several keys: neither a nor b decides alone
        n_names = min(max_names, max(4, math.ceil(1.5 * n_keys**0.5)))
        pairs = choose(n_names**2, n_keys)  # a pair (a, b) is the number a * n_names + b
        key = pairs[randint(len(pairs), n_records)]
        a = key // n_names
        b = key % n_names
    else:
        n_names = max_names
        a = randint(min(n_keys, n_names), n_records)
        b = randint(min(n_keys, n_names), n_records)
        key = a if key_column == 0 else b
    value_of_key = randint(recipe["values"], int(key.max()) + 1)
    value = value_of_key[key]

    # choose random tokens for the names
    #
    #     token ids    0 ... max_names - 1    max_names ... 2 max_names - 1    from 2 max_names on
    #     stand for             a                          b                          value
    a_tokens = choose(max_names, n_names)[a]
    b_tokens = choose(max_names, n_names)[b] + max_names
    value_tokens = value + 2 * max_names
    records = torch.stack([a_tokens, b_tokens, value_tokens], dim=1)  # (n_records, 3)

    # a value is predictable if an earlier record has the same key
    has_same_key = key[:, None] == key  # (n_records, n_records)
    is_predictable = torch.zeros(n_records, 3, dtype=torch.bool)
    is_predictable[:, 2] = has_same_key.tril(-1).any(dim=1)

    # draw the records to ask about; of `records`, those whose key occurs once, if there are any
    candidates = torch.arange(n_records)
    occurs_once = has_same_key.sum(dim=1) == 1
    if task == "records" and occurs_once.any():
        candidates = candidates[occurs_once]
    asked = candidates[choose(len(candidates), n_questions)]  # (Q)
    questions = records[asked, :2]
    answers = records[asked, 2]

    # in `columns`, ask about new pairs: the name that is not the key comes from another record
    if task == "columns":
        other_column = 1 - key_column
        questions[:, other_column] = records[randint(n_records, len(asked)), other_column]

    # the needles of a question are the values of all records with its key
    needles = torch.zeros(len(asked), n_records, 3, dtype=torch.bool)
    needles[:, :, 2] = has_same_key[asked]

    return Context(
        ids=records.flatten(),
        is_predictable=is_predictable.flatten(),
        questions=questions,
        answers=answers,
        needles=needles.flatten(1),
    )


def make_example(task, T, recipe, generator):
    """Return T + 1 ids to train on, a context and answered questions, and which are predictable."""
    n_keys = int(torch.randint(3, T // 6, (), generator=generator))
    key_column = int(torch.randint(2, (), generator=generator))
    n_context = T + 1 - T // 6
    context = make_context(task, n_context, recipe, generator, T, key_column, n_keys)

    # fill up with answered questions; if there are too few, start again with the first
    answered = torch.cat([context.questions, context.answers[:, None]], dim=1)  # (Q, 3)
    n_answered = math.ceil((T + 1 - len(context.ids)) / 3)
    answered = answered[torch.arange(n_answered) % len(answered)]
    is_answer = torch.tensor([False, False, True]).repeat(n_answered)
    ids = torch.cat([context.ids, answered.flatten()])
    is_predictable = torch.cat([context.is_predictable, is_answer])
    return ids[: T + 1], is_predictable[: T + 1]


def permute_tokens(ids, recipe, generator):
    """Permute the tokens of each column at random, differently in each sequence of ids (B, T)."""
    new_ids = []  # for each column, the new id of each of its tokens, (B, size)
    first_id = 0
    for size in (recipe["names"], recipe["names"], recipe["values"]):
        permutation = torch.rand(len(ids), size, generator=generator).argsort(dim=1)  # (B, size)
        new_ids.append(first_id + permutation)
        first_id += size
    return torch.cat(new_ids, dim=1).gather(1, ids)


# --------------------------------------------------------------------------------------------------
# Models


def shift(q, k, v):
    """Return in head h the value h + 1 positions back, whatever the query: a short convolution.

    q (B, H, n, D), v (B, H, T, D) -> (B, H, n, D). The queries are the last n of T positions.
    """
    _, H, n, _ = q.shape
    v = v[:, :, -(n + H) :]  # no head looks further back
    v = F.pad(v, (0, 0, H, 0))  # zeros before the first position
    heads = []
    for h in range(H):
        start = v.shape[2] - n - (h + 1)  # h + 1 positions before the first query
        heads.append(v[:, h, start : start + n])  # (B, n, D)
    return torch.stack(heads, dim=1)


shift.has_logits = False  # no product of queries and keys, so ttt_cost counts no FLOPs for it


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
    config.attn = "shift,softmax"  # not plain softmax, so no kernel is used
    for i, layer in enumerate(model.layers):
        layer.self_attn.rope_inputs = ()
        if i % 2 == 0:
            layer.self_attn.function = shift

    # weights of std 1 / sqrt(inputs), smaller where a layer adds to the residual stream
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            continue
        std = 1.0 if "embed" in name else p.shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * config.n_layer)
        p.data.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def train_model(recipe, norm, seed, device="cpu"):
    """Train a model on short contexts of both tasks.

    In the first half of the steps only predictable values count in the loss. This teaches the model
    to look things up.
    """
    # examples
    model = build_model(recipe, norm, seed).to(device)
    settings = recipe["train"]
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(settings["examples"]):
        examples.append(make_example(TASKS[i % 2], settings["tokens"], recipe, generator))
    ids = torch.stack([ids for ids, _ in examples])  # (examples, T + 1)
    is_predictable = torch.stack([is_predictable for _, is_predictable in examples])

    # optimizer and steps
    lr = settings["lr"]
    n_steps = settings["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_steps, pct_start=0.1)
    for step in range(n_steps):
        drawn = torch.randint(len(ids), (settings["batch"],), generator=generator)
        batch = permute_tokens(ids[drawn], recipe, generator).to(device)  # (B, T + 1)
        targets = batch[:, 1:]
        if step < n_steps / 2:
            targets = targets.masked_fill(~is_predictable[drawn, 1:].to(device), -1)
        loss = model(batch[:, :-1], targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
