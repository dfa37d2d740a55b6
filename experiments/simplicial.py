"""2-simplicial attention: can one layer find a triple, or compose two functions?

    Match3        7 numbers modulo 20: is there a pair (j, k) with x_j + x_k + x_last = 0 modulo 20?
    composition   tables of two functions f and g on 4 values, in any order: what is f(g(x))?

One layer of the GPT, without position embeddings, classifies the last token. The variants differ in
their attention and have as many parameters. Match3 is also solved by weights set by hand, and the
paper's Table 2 is fitted again, with and without its smallest model.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from experiments import harness
from experiments.provenance import save_json
from simplicial import attention

# --------------------------------------------------------------------------------------------------
# Match3: is there a pair (j, k), j, k <= i, with x_i + x_j + x_k = 0 modulo M?


def match3(x, M):
    """Solve Match3 by its definition. x (B, T) -> (B, T) bool"""
    T = x.shape[1]
    is_past = torch.ones(T, T, dtype=torch.bool).tril()  # (i, j)
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None]  # (B, i, j, k)
    is_match = (sums % M == 0) & is_past[None, :, :, None] & is_past[None, :, None]
    return is_match.flatten(-2).any(-1)


def match3_by_hand(x, M, function=attention):
    """Solve Match3 with one head of width 5 and weights set by hand. x (B, T) -> (B, T) bool

    The logit of a pair is beta cos(a + b + c) with angles 2 pi x / M, largest for a match. It is
    trilinear, cos a cos b cos c - cos a sin b sin c - sin a cos b sin c - sin a sin b cos c. A
    blank token comes first, and the pair (blank, blank) has the logit of a match. The blank's value
    is 0 and all others are 1, so with n matching pairs the output is n / (n + 1).
    """
    B, T = x.shape
    angle = 2 * math.pi / M * x
    c = angle.cos()
    s = angle.sin()
    one = torch.ones_like(c)
    zero = torch.zeros_like(c)

    def with_blank(*channels, blank):
        tokens = torch.stack(channels, -1)  # (B, T, 5)
        first = torch.tensor(blank).to(tokens).expand(B, 1, 5)
        return torch.cat([first, tokens], 1)[:, None]  # (B, 1, 1 + T, 5)

    # inverse temperature: all pairs without a match weigh at most a tenth of one match together
    beta = math.log(10 * (T + 1) ** 2) / (1 - math.cos(2 * math.pi / M))
    last_channel = [0.0, 0.0, 0.0, 0.0, 1.0]
    q = with_blank(c, c, s, s, one, blank=last_channel) * beta * 5**0.5  # undo 1 / sqrt(D), D = 5
    k = with_blank(c, -s, -c, -s, zero, blank=last_channel)
    k2 = with_blank(c, s, s, c, zero, blank=last_channel)
    v = with_blank(one, one, one, one, one, blank=[0.0] * 5)
    o = function(q, k, v, k2, v, w1=T + 1, w2=T + 1)  # (B, 1, 1 + T, 5)
    return o[:, 0, 1:, 0] > 0.4


# --------------------------------------------------------------------------------------------------
# Tasks: tokens (B, T, numbers per token), and the answer for the last token (B,)


def match3_batch(B, generator, M=20, T=7):
    """Make Match3 sequences: tokens (B, T, 1), and answers (B,), 1 for a match and 0 for none.

    Half of the sequences have a match. The others have a near miss: two tokens and the last one sum
    to 1 modulo M.
    """
    # N candidates: set the token at `second`, so that it, `first` and the last sum to 0 or 1
    N = 12 * B
    x = torch.randint(M, (N, T), generator=generator)
    order = torch.rand(N, T - 1, generator=generator).argsort(1)
    first = order[:, 0]  # positions before the last
    second = order[:, 1]
    is_miss = torch.arange(N) % 6 > 0
    rows = torch.arange(N)
    x[rows, second] = (is_miss.long() - x[:, -1] - x[rows, first]) % M

    # keep B / 2 with a match, and B / 2 without
    sums = x[:, None, :] + x[:, :, None] + x[:, -1, None, None]
    has_match = (sums % M == 0).flatten(1).any(1)
    matches = (has_match & ~is_miss).nonzero()[: B // 2, 0]
    misses = (~has_match).nonzero()[: B - B // 2, 0]
    kept = torch.cat([matches, misses])
    return x[kept, :, None], has_match[kept].long()


def composition_batch(B, generator, M=4):
    """Make sequences that list two functions f and g on M values, then ask for f(g(x)).

    Returns tokens (B, 2 M + 1, 3), each (table, argument, value) with table 0 for g, 1 for f and 2
    for the question, and answers (B,).
    """
    g = torch.randint(M, (B, M), generator=generator)
    f = torch.randint(M, (B, M), generator=generator)
    x = torch.randint(M, (B,), generator=generator)
    arguments = torch.arange(M).expand(B, M)
    entries = []
    for number, values in enumerate((g, f)):
        table = torch.full_like(arguments, number)
        entries.append(torch.stack([table, arguments, values], -1))  # (B, M, 3)

    # shuffle the entries, and append the question
    order = torch.rand(B, 2 * M, generator=generator).argsort(1)
    context = torch.cat(entries, 1).gather(1, order[..., None].expand(-1, -1, 3))  # (B, 2 M, 3)
    question = torch.stack([torch.full_like(x, 2), x, torch.zeros_like(x)], -1)[:, None]
    answer = f.gather(1, g.gather(1, x[:, None]))[:, 0]
    return torch.cat([context, question], 1), answer


def chance_levels(M=4):
    """Return {task: {strategy: accuracy}} of strategies that need no composition.

    Either guess uniformly, or answer with the value that f takes most often.
    """
    frequencies = []
    for table in itertools.product(range(M), repeat=M):  # all functions f
        frequencies.append(max(table.count(value) for value in table) / M)
    levels = {"uniform": 1 / M, "commonest value": statistics.mean(frequencies)}
    return {"Match3": {"uniform": 0.5}, "composition": levels}


# --------------------------------------------------------------------------------------------------
# Models: one layer, in which only the attention differs


def product(q, k, v, k2, v2):
    """Multiply two softmax attentions: 2-simplicial with a sum of two logits as a pair's logit."""
    return train.softmax_attention(q, k, v) * train.softmax_attention(q, k2, v2)


def gate(q, k, v, k2, v2):
    """2-simplicial attention with w2 = 1: k2 and v2 are those of the query's own position."""
    return train.softmax_attention(q * k2, k, v) * v2


WIDTH = 48
HIDDEN = 96
WIDER = HIDDEN + 2 * WIDTH // 3  # of the SwiGLU: makes up for having no projections of k2 and v2
BASELINE = "softmax"
SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
LR = 3e-3


class Task(NamedTuple):
    make_batch: Callable  # (batch size, generator) -> tokens, answers
    vocabularies: tuple  # vocabulary size of each number of a token
    classes: int
    steps: int


VARIANTS = {
    "2-simplicial": attention,
    "product of two": product,
    "gate": gate,
    "softmax": train.softmax_attention,
}
TASKS = {
    "Match3": Task(match3_batch, (20,), 2, 500),
    "composition": Task(composition_batch, (3, 4, 4), 4, 300),
}


class OneLayer(nn.Module):
    """Embeddings, one layer of the GPT without RoPE, and a classifier of the last token."""

    def __init__(self, function, task):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, WIDTH) for size in task.vocabularies)
        has_three_inputs = function is train.softmax_attention
        n_hidden = WIDER if has_three_inputs else HIDDEN
        config = train.GPTConfig(vocab_size=1, n_embd=WIDTH, n_head=4, n_hidden=n_hidden)
        self.layer = train.Block(config, "softmax" if has_three_inputs else "simplicial")
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
        return self.out(self.norm(self.layer(x, None, None)[:, -1]))


def train_task(task_name, variant_name, seed, steps):
    """Train one variant and return the run; its value is the accuracy on 2000 examples.

    Every step has new examples. They depend on the seed only, so all variants see the same.
    """
    task = TASKS[task_name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = OneLayer(VARIANTS[variant_name], task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.1)

    start_time = time.perf_counter()
    for _ in range(steps):
        x, y = task.make_batch(128, generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - start_time

    with torch.no_grad():
        x, y = task.make_batch(2000, torch.Generator().manual_seed(0))
        accuracy = (model(x).argmax(-1) == y).float().mean().item()
    parameters = sum(p.numel() for p in model.parameters())
    return {"seed": seed, "value": accuracy, "seconds": seconds, "parameters": parameters}


# --------------------------------------------------------------------------------------------------
# The paper's Table 2: negative log-likelihood at 1, 2 and 3.5 billion active parameters

SIZES = 1e9, 2e9, 3.5e9
TABLE2 = {
    "softmax": {
        "GSM8k": (0.3277, 0.2987, 0.2781),
        "MMLU": (0.6411, 0.5932, 0.5543),
        "MMLU-pro": (0.8718, 0.8193, 0.7858),
        "MBPP": (0.2690, 0.2435, 0.2203),
    },
    "2-simplicial": {
        "GSM8k": (0.3302, 0.2942, 0.2718),
        "MMLU": (0.6423, 0.5862, 0.5484),
        "MMLU-pro": (0.8718, 0.8135, 0.7689),
        "MBPP": (0.2714, 0.2411, 0.2193),
    },
}


def fit_exponent(sizes, losses):
    """Return a of the paper's -log L = a log N + b, by least squares."""
    x = [math.log(size) for size in sizes]
    y = [-math.log(loss) for loss in losses]
    return statistics.covariance(x, y) / statistics.variance(x)


def refit():
    """Return {benchmark: {model: [exponent of all three sizes, exponent without the smallest]}}."""
    exponents = {}
    for benchmark in TABLE2["softmax"]:
        exponents[benchmark] = {}
        for model, losses_of in TABLE2.items():
            losses = losses_of[benchmark]
            all_sizes = fit_exponent(SIZES, losses)
            without_smallest = fit_exponent(SIZES[1:], losses[1:])
            exponents[benchmark][model] = [all_sizes, without_smallest]
    return exponents


# --------------------------------------------------------------------------------------------------
# The study


def score_by_hand():
    """Return the accuracy of the weights set by hand for several M and T."""
    generator = torch.Generator().manual_seed(0)
    accuracies = {}
    for M, T in (16, 6), (64, 12), (256, 20), (997, 30):
        x = torch.randint(M, (64, T), generator=generator)
        is_right = match3_by_hand(x, M) == match3(x, M)
        accuracies[f"M={M}, T={T}"] = is_right.float().mean().item()
    return accuracies


def plot(record):
    """Plot the accuracy of each run and the means, with the chance levels."""
    figure, axes = harness.new_figure((9, 4), 1, len(TASKS))
    for panel, task in zip(axes, TASKS):
        for i, name in enumerate(VARIANTS):
            values = [run["value"] for run in record["variants"][f"{task}: {name}"]["runs"]]
            panel.bar(i, statistics.mean(values), 0.7, color=f"C{i}")
            panel.plot([i] * len(values), values, "k.", ms=4)
        for level, accuracy in record["chance"][task].items():
            panel.axhline(accuracy, color="gray", ls="--", lw=0.8)
            panel.text(len(VARIANTS) - 0.5, accuracy, level, fontsize=7, ha="right", va="bottom")
        panel.set_xticks(range(len(VARIANTS)), VARIANTS, fontsize=8)
        panel.set(ylim=(0, 1.05), ylabel="accuracy", title=f"{task}, one layer, equal parameters")
    return figure


def main(argv, description, seeds=SEEDS, steps=None):
    """Run the study, write its JSON and figure, print it, and return the record.

    steps: optimizer steps of every run in place of those in TASKS.
    """
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
        task_steps = steps or TASKS[task].steps
        settings = f"width {WIDTH}, 4 heads, {task_steps} steps of 128 examples, AdamW, lr {LR}"
        runs = {}
        for name in VARIANTS:
            runs[name] = [train_task(task, name, seed, task_steps) for seed in seeds]
            variant = {"settings": settings, "sweep": None, "runs": runs[name]}
            record["variants"][f"{task}: {name}"] = variant
        for name in VARIANTS:
            if name != BASELINE:
                difference = harness.paired_difference(runs[name], runs[BASELINE])
                record["differences"][f"{task}: {name}"] = difference
    record.update(match3_by_hand=score_by_hand(), table2_exponents=refit())
    record["seconds"] = time.perf_counter() - start_time

    save_json(out / "simplicial-cpu.json", record, "experiments.simplicial")
    harness.save_figure(plot(record), out / "simplicial-cpu.png")
    harness.print_differences(record)
    print_closed_form(record)
    harness.print_gpu_result("simplicial")
    return record


def print_closed_form(record):
    for task, levels in record["chance"].items():
        for level, accuracy in levels.items():
            print(f"  {task}: chance level ({level}) {accuracy:.3f}")
    print(f"  Match3 by weights set by hand, one head: {record['match3_by_hand']}")
    print("  exponents of the paper's Table 2: softmax, 2-simplicial; without its smallest model")
    for benchmark, models in record["table2_exponents"].items():
        softmax, softmax_without = models["softmax"]
        ours, ours_without = models["2-simplicial"]
        line = f"{softmax:.4f} {ours:.4f}; {softmax_without:.4f} {ours_without:.4f}"
        print(f"    {benchmark:9} {line}")
