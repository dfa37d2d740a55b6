"""2-simplicial attention: can one layer find a triple, or compose two functions?

A model with one layer of the GPT is trained on two tasks and classifies the last token:

    Match3        7 numbers modulo 20: is there a pair (j, k) with x_j + x_k + x_last = 0 modulo 20?
    composition   tables of two functions f and g on 4 values, in any order: what is f(g(x))?

The variants differ in their attention and have equally many parameters. Each is trained for equally
many steps, at the learning rate of a grid with the lowest test loss on other seeds. The metric is
the accuracy, compared with softmax attention and with guessing. Match3 is also solved by weights
set by hand.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from experiments import harness
from experiments.match3 import score_by_hand
from experiments.provenance import save_json
from simplicial import attention

BASELINE = "softmax"
SEEDS = (1, 2, 3, 4, 5, 6)
MODULUS = 20  # of Match3
BATCH_SIZE = 128
RATES = (1e-3, 3e-3, 1e-2)
WIDTH = 48
HIDDEN = 96  # width of the MLP
# Softmax attention has no k2 and v2, whose projections take 2 WIDTH^2 parameters. Its MLP is wider
# instead: each hidden unit takes 3 WIDTH parameters, in gate, up and down.
WIDER = HIDDEN + 2 * WIDTH // 3

# -- tasks: tokens (B, T, numbers per token), and the answer for the last token (B,) ---------------


def match3_batch(B, generator, T=7):
    """Make Match3 sequences: tokens (B, T, 1), and answers (B,), 1 for a match and 0 for none.

    Half of the sequences have a match. The others have a near miss: two tokens and the last one sum
    to 1 modulo MODULUS.
    """
    # make N candidates, more than B: many of those that should miss have a match by chance
    N = 12 * B
    x = torch.randint(MODULUS, (N, T), generator=generator)
    rows = torch.arange(N)
    is_miss = rows % 6 > 0  # five of six are meant to be misses

    # Pick two positions before the last. Choose the token at the second one such that it, the token
    # at the first one and the last token sum to 0 for a match, and to 1 for a miss.
    order = torch.rand(N, T - 1, generator=generator).argsort(1)
    first = order[:, 0]
    second = order[:, 1]
    x[rows, second] = (is_miss.long() - x[:, -1] - x[rows, first]) % MODULUS

    # keep B / 2 sequences with a match and B / 2 without; sums: x_j + x_k + x_last for all j, k
    sums = x[:, None, :] + x[:, :, None] + x[:, -1, None, None]  # (N, T, T)
    has_match = (sums % MODULUS == 0).flatten(1).any(1)
    matches = (has_match & ~is_miss).nonzero()[: B // 2, 0]
    misses = (~has_match).nonzero()[: B - B // 2, 0]
    kept = torch.cat([matches, misses])
    return x[kept, :, None], has_match[kept].long()


def composition_batch(B, generator, M=4):
    """Make sequences that list two functions f and g on M values and then ask for f(g(x)).

    Returns tokens (B, 2 M + 1, 3) and answers (B,). The tokens are, in a random order,

        (0, y, g(y)) for all y,    (1, y, f(y)) for all y,    and at the end (2, x, 0): the question
    """
    g = torch.randint(M, (B, M), generator=generator)
    f = torch.randint(M, (B, M), generator=generator)
    x = torch.randint(M, (B,), generator=generator)
    y = torch.arange(M).expand(B, M)
    g_table = torch.stack([torch.zeros_like(y), y, g], -1)  # (B, M, 3)
    f_table = torch.stack([torch.ones_like(y), y, f], -1)

    # shuffle the entries of both tables together, and append the question
    order = torch.rand(B, 2 * M, generator=generator).argsort(1)  # random permutations
    order = order[..., None].expand(-1, -1, 3)
    context = torch.cat([g_table, f_table], 1).gather(1, order)  # (B, 2 M, 3)
    question = torch.stack([torch.full_like(x, 2), x, torch.zeros_like(x)], -1)  # (B, 3)
    tokens = torch.cat([context, question[:, None]], 1)

    g_x = g.gather(1, x[:, None])  # (B, 1)
    answers = f.gather(1, g_x)[:, 0]
    return tokens, answers


def chance_levels(M=4):
    """Return {task: {strategy: accuracy}} for guessing.

    In Match3, one can look for matches of one token with itself or with the last one, which is a
    task about pairs. In the composition task, one can answer with the value that f takes most
    often. Its accuracy is the frequency of this value, on average over all functions f.
    """
    tokens, answers = match3_batch(4000, torch.Generator().manual_seed(0))
    x = tokens[..., 0]
    last = x[:, -1:]
    has_pair = ((2 * x + last) % MODULUS == 0) | ((x + 2 * last) % MODULUS == 0)  # (B, T)
    pairs = (has_pair.any(1) == answers.bool()).float().mean().item()
    frequencies = []
    for f in itertools.product(range(M), repeat=M):  # all functions, as tuples of their M values
        commonest = max(f.count(value) for value in f)
        frequencies.append(commonest / M)
    levels = {"uniform": 1 / M, "commonest value": statistics.mean(frequencies)}
    return {"Match3": {"uniform": 0.5, "pairs": pairs}, "composition": levels}


class Task(NamedTuple):
    """A classification task; a token is one or several numbers."""

    make_batch: Callable  # (batch size, generator) -> tokens, answers
    vocab_sizes: tuple  # one for each number of a token
    classes: int
    steps: int


TASKS = {
    "Match3": Task(match3_batch, vocab_sizes=(MODULUS,), classes=2, steps=500),
    "composition": Task(composition_batch, vocab_sizes=(3, 4, 4), classes=4, steps=300),
}


# -- models: one layer, in which only the attention differs ----------------------------------------


def product(q, k, v, k2, v2):
    """Multiply two softmax attentions.

    That is 2-simplicial attention with the logit q . k_j + q . k2_l for the pair of keys (j, l).
    """
    return train.softmax_attention(q, k, v) * train.softmax_attention(q, k2, v2)


def gate(q, k, v, k2, v2):
    """Compute 2-simplicial attention with w2 = 1: the only k2 and v2 are the query's own."""
    return train.softmax_attention(q * k2, k, v) * v2


VARIANTS = {
    "2-simplicial": attention,
    "product of two": product,
    "gate": gate,
    "softmax": train.softmax_attention,
}


class OneLayer(nn.Module):
    """Embeddings, one layer of the GPT without RoPE, and a classifier of the last token."""

    def __init__(self, function, task):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, WIDTH) for size in task.vocab_sizes)

        # a layer with projections for q, k, v, or for q, k, v, k2, v2
        is_softmax = function is train.softmax_attention
        n_hidden = WIDER if is_softmax else HIDDEN
        config = train.GPTConfig(vocab_size=1, n_embd=WIDTH, n_head=4, n_hidden=n_hidden)
        self.layer = train.Block(config, "softmax" if is_softmax else "simplicial")
        self.layer.self_attn.function = function
        self.layer.self_attn.options = {}
        self.layer.self_attn.rope_inputs = ()
        self.norm = train.RMSNorm(WIDTH, 1e-5)
        self.out = nn.Linear(WIDTH, task.classes)

    def forward(self, tokens):
        """Return logits (B, classes) of tokens (B, T, numbers per token)."""
        x = 0
        for i, embedding in enumerate(self.embeddings):
            x = x + embedding(tokens[..., i])  # (B, T, C)
        x = self.layer(x, cos=None, sin=None)
        return self.out(self.norm(x[:, -1]))


# -- training --------------------------------------------------------------------------------------


def train_task(job):
    """Train one variant and return the run. job: {task, variant, lr, seed}

    The training examples depend on the seed only, so all variants see the same. The value is the
    accuracy on 2000 new examples, or in a sweep, where smaller must be better, the loss on others.
    """
    task = TASKS[job["task"]]
    lr = job["lr"]
    generator = torch.Generator().manual_seed(job["seed"])
    torch.manual_seed(job["seed"])
    model = OneLayer(VARIANTS[job["variant"]], task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, task.steps, pct_start=0.1)

    # train: every step has new examples
    start_time = time.perf_counter()
    for _ in range(task.steps):
        x, y = task.make_batch(BATCH_SIZE, generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - start_time

    # test
    is_sweep = job["seed"] in harness.SWEEP_SEEDS
    with torch.no_grad():
        x, y = task.make_batch(2000, torch.Generator().manual_seed(1 if is_sweep else 0))
        logits = model(x)
    accuracy = (logits.argmax(-1) == y).float().mean().item()
    value = F.cross_entropy(logits, y).item() if is_sweep else accuracy
    parameters = sum(p.numel() for p in model.parameters())
    run = {"seed": job["seed"], "lr": lr, "value": value}
    return {**run, "seconds": seconds, "parameters": parameters}


# -- the study -------------------------------------------------------------------------------------


def plot(record):
    """Draw a panel per task: the mean accuracy as a bar, the runs as points, guessing as a line."""
    figure, axes = harness.new_figure((11, 4), 1, len(TASKS))
    for panel, task in zip(axes, TASKS):
        for i, name in enumerate(VARIANTS):
            values = [run["value"] for run in record["variants"][f"{task}: {name}"]["runs"]]
            panel.bar(i, statistics.mean(values), 0.7, color=f"C{i}")
            panel.plot([i] * len(values), values, "k.", ms=4)
        for level, accuracy in record["chance"][task].items():
            panel.axhline(accuracy, color="gray", ls="--", lw=0.8)
            label = f"guess: {level}"
            panel.text(len(VARIANTS) - 0.3, accuracy, label, fontsize=7, va="center")
        panel.set_xticks(range(len(VARIANTS)), VARIANTS, fontsize=8)
        panel.set(ylim=(0, 1.05), ylabel="accuracy", title=f"{task}, one layer, equal parameters")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv, description):
    """Run the study, write its JSON and figure, print it, and return the record."""
    parser = harness.study_parser(description, on_gpus="train GPTs with and without it")
    args = parser.parse_args(argv)
    out = harness.check_writable(args.out)
    if args.full:
        from experiments import language_models

        return language_models.run("simplicial", out, harness.deadline_after(args.minutes))

    start_time = time.perf_counter()
    record = {
        "question": "Does one layer of 2-simplicial attention solve tasks about three tokens?",
        "metric": "accuracy",
        "baseline": BASELINE,  # on the same task
        "chance": chance_levels(),
        "variants": {},
        "differences": {},
    }
    for task in TASKS:
        settings = (
            f"width {WIDTH}, 4 heads, {TASKS[task].steps} steps of {BATCH_SIZE} examples, AdamW"
        )

        def make_job(variant, lr, seed, task=task):
            return {"task": task, "variant": variant, "lr": lr, "seed": seed}

        # sweep the learning rate, and train all seeds at the best one
        seeds = dict.fromkeys(VARIANTS, SEEDS)
        workers = os.cpu_count()
        swept, runs = harness.sweep_and_run(train_task, make_job, seeds, RATES, workers=workers)

        # compare with the baseline
        for name in VARIANTS:
            variant = {"settings": settings, "sweep": swept[name], "runs": runs[name]}
            record["variants"][f"{task}: {name}"] = variant
            if name != BASELINE:
                difference = harness.paired_difference(runs[name], runs[BASELINE])
                record["differences"][f"{task}: {name}"] = difference
    record["match3_by_hand"] = score_by_hand()
    record["seconds"] = time.perf_counter() - start_time

    save_json(out / "simplicial-cpu.json", record, "experiments.simplicial")
    harness.save_figure(plot(record), out / "simplicial-cpu.png")
    harness.print_differences(record)
    for task, levels in record["chance"].items():
        for level, accuracy in levels.items():
            print(f"  {task}: chance level ({level}) {accuracy:.3f}")
    print(f"  Match3 by weights set by hand, one head: {record['match3_by_hand']}")
    harness.print_gpu_result("simplicial")
    return record
