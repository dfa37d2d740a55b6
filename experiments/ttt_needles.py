"""Do trained queries find needles in real text, and at which learning rate?

Facts such as "The password of Anna is mango." are hidden between paragraphs of Python's manual.
SmolLM2-135M continues "The password of Anna is" before and after its queries are trained on that
context. The margin is the log odds of the right word. One learning rate for all lengths is chosen
on contexts that are not reported. The intervals are Student's t over contexts.
"""

import math
import random
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

import train
from experiments import harness, provenance, runner
from sample import first_ids, last_logits
from support import distributed, run_folder
from ttt_context import adapt, prefill, span_loss, split_spans

NAMES = "Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Laura Martin".split()
WORDS = "mango lemon tiger eagle copper silver violin piano river desert winter castle".split()
FACTS = 8  # per context, each of fewer than 16 tokens
LENGTHS = (2048, 4096, 8192)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
RATE_SEEDS = (101, 102, 103, 104)  # of contexts on which the learning rate is chosen
SEEDS = (1, 2, 3, 4, 5, 6)  # of contexts that are reported
SPAN = 128
RUNS_PER_GPU = 4  # at a time; the model is small
METRIC = "log odds of the right answer, nats"


def make_context(tokenizer, T, seed):
    """Return the token ids of a context of at most T tokens, and pairs of question and answer."""

    def encode(text):
        return [int(i) for i in tokenizer.encode_ordinary(text)]  # some return NumPy integers

    # shuffle the pages of the manual, and take paragraphs while there is room
    rng = random.Random(seed)
    pages = rng.sample(sorted(topics.values()), len(topics))
    room = T - 16 * FACTS
    paragraphs = []
    for paragraph in "\n\n".join(pages).split("\n\n"):
        room -= len(encode(f"{paragraph}\n\n"))
        if room < 0:
            break
        paragraphs.append(paragraph)

    # hide the facts between them
    pairs = []
    for name, word in zip(rng.sample(NAMES, FACTS), rng.sample(WORDS, FACTS)):
        question = f"The password of {name} is"
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), f"{question} {word}.")
        pairs.append((encode(question), encode(f" {word}")))
    text = "\n\n".join(paragraphs) + "\n\n"
    return [*first_ids(tokenizer), *encode(text)], pairs


@torch.no_grad()
def ask(model, caches, T, pairs, limit):
    """Return the mean margin of the answers, and the share of them that greedy decoding gives.

    caches: from `prefill` of T tokens. pairs: (question, answer), as token ids. limit: the
    vocabulary size without padding.
    """
    margins = []
    n_right = 0
    for question, answer in pairs:
        for cache in caches:
            cache.length = T  # forget an earlier question

        # feed the question and the right answer, one token of the answer at a time
        ids = question
        log_p = 0.0  # of the answer
        greedy = []  # the likeliest token each time
        for token in answer:
            logits = last_logits(model, ids, caches)[:limit]  # (V)
            log_p += logits.double().log_softmax(-1)[token].item()
            greedy.append(int(logits.argmax()))
            ids = [token]

        other_p = max(-math.expm1(log_p), 1e-9)  # 1 - p, of all other answers
        margins.append(log_p - math.log(other_p))
        n_right += greedy == answer
    return sum(margins) / len(pairs), n_right / len(pairs)


def run_context(job):
    """Return measure(init, T, seed) for a job (init, T, seed), from the disk cache if possible."""
    code = provenance.code_hashes("experiments.ttt_needles")
    return runner.disk_cache(runner.CACHE, [job, code], lambda: measure(*job))


def measure(init, T, seed):
    """Ask about one context without training, with lr 0, and after training at each of RATES.

    Returns a list of {seed, lr, value, accuracy, loss, seconds}. The value is the margin.
    """
    # load the model, and read a context
    device = distributed.pick_device("")
    dtype = train.DTYPES[distributed.pick_dtype("", device)]
    model, tokenizer = train.load_model(init, device, dtype)
    ids, pairs = make_context(tokenizer, T, seed)
    ids = torch.tensor(ids, device=device)
    longest = max(len(question) + len(answer) for question, answer in pairs)
    caches = prefill(model, ids, room=longest)

    # train and ask
    held_out, starts = split_spans(len(ids), SPAN)
    rows = []
    for lr in (0.0, *RATES):
        start_time = time.perf_counter()
        steps = 32 if lr else 0
        with adapt(model, caches, ids, starts, steps=steps, n=SPAN, lr=lr), torch.no_grad():
            margin, accuracy = ask(model, caches, len(ids), pairs, tokenizer.n_vocab)
            loss = span_loss(model, caches, ids, held_out, SPAN).item()
        row = {"seed": seed, "lr": lr, "value": margin, "accuracy": accuracy, "loss": loss}
        rows.append({**row, "seconds": time.perf_counter() - start_time})
    return rows


def run(init, out, deadline=float("inf")):
    """Run the study, or as much as the deadline allows; write and return the record."""
    init = str(run_folder.find_run(init))
    model_name = Path(init).name
    jobs = [(init, T, seed) for T in reversed(LENGTHS) for seed in RATE_SEEDS + SEEDS]
    results = runner.parallel(
        run_context, jobs, deadline=deadline, label="contexts", per_gpu=RUNS_PER_GPU
    )
    rows = {}  # by length, learning rate and seed
    for (_, T, seed), result in zip(jobs, results):
        for row in result:
            rows[T, row["lr"], seed] = row

    # choose the learning rate with the highest margin, on average over all lengths
    def total_margin(lr):
        return sum(rows[T, lr, seed]["value"] for T in LENGTHS for seed in RATE_SEEDS)

    best_lr = max(RATES, key=total_margin)

    # compare each rate with no training, at each length
    variants = {}
    differences = {}
    by_lr = {}
    loss_by_lr = {}
    for T in LENGTHS:
        swept = [rows[T, lr, seed] for seed in RATE_SEEDS for lr in RATES]
        runs = {lr: [rows[T, lr, seed] for seed in SEEDS] for lr in (0.0, *RATES)}
        by_lr[T] = [harness.paired_difference(runs[lr], runs[0.0]) for lr in RATES]
        losses = {lr: [{**row, "value": row["loss"]} for row in runs[lr]] for lr in runs}
        loss_by_lr[T] = [harness.paired_difference(losses[lr], losses[0.0]) for lr in RATES]
        differences[f"{T} tokens: trained queries"] = by_lr[T][RATES.index(best_lr)]
        for name, lr, sweep in (
            ("untrained queries", 0.0, []),
            ("trained queries", best_lr, swept),
        ):
            entry = {"settings": {"init": model_name, "lr": lr}, "sweep": sweep, "runs": runs[lr]}
            variants[f"{T} tokens: {name}"] = entry

    record = {
        "question": "Do trained queries find needles in real text?",
        "metric": METRIC,
        "baseline": "untrained queries",
        "variants": variants,
        "differences": differences,
        "best_lr": best_lr,
        "by_lr": by_lr,
        "loss_by_lr": loss_by_lr,
        "seconds": sum(row["seconds"] for row in rows.values()),
    }
    provenance.save_json(out / "ttt_needles-gpu.json", record, "experiments.ttt_needles")
    harness.save_figure(plot(record), out / "ttt_needles-gpu.png")
    harness.print_differences(record)
    return record


def plot(record):
    """Plot the changes of margin and loss against the learning rate, a line for each length."""
    figure, (left, right) = harness.new_figure((10, 4), 1, 2)
    for axes, changes_by_lr in ((left, record["by_lr"]), (right, record["loss_by_lr"])):
        for T, changes in changes_by_lr.items():
            means = [change["mean"] for change in changes]
            half_widths = [change["half_width_95"] for change in changes]
            axes.errorbar(RATES, means, half_widths, fmt="o-", capsize=3, label=f"{T:,} tokens")
        axes.axhline(0, color="black", lw=0.8)
        axes.axvline(record["best_lr"], color="C7", ls=":", label="chosen on other contexts")
        axes.set(xscale="log", xlabel="learning rate")
    left.set(ylabel=f"change of {record['metric']}", title="higher is better")
    right.set(ylabel="change of the loss on held-out spans, nats", title="lower is better")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
