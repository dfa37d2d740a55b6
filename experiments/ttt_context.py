"""When do queries trained on this context beat a change of temperature?

Small models, trained on streams of 96 tokens, are asked at up to 3,072. In
`records` length only dilutes attention; in `columns` the context alone shows
which key counts (experiments/ttt_sandbox.py). Each model exists with and
without QK-norm. All variants answer the same questions over the same cache:

    in context            the model as it is
    log T                 logits times log T / log 96, without training
    fitted temperature    one factor per head, trained like the queries
    trained queries       the method, on this context
    foreign queries       trained on another context of the same kind
    other-kind queries    of a context where the other column counts
    equal-FLOP thinking   majority of as many samples as cost the steps' FLOPs

Learning rates are chosen on contexts of seed 0, which are not reported. The
intervals are Student's t over models, paired by seed: a model's value is its
mean over 4 contexts of 16 questions.

    python ttt_context.py --experiment    three minutes on two CPU cores

writes results/ttt_context-cpu.json and .png.
"""

import itertools
import math
import os
import shutil
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

import torch

from experiments import harness
from experiments.ttt_sandbox import NORMS, TASKS, stream, train_model
from support import cli
from ttt_context import (
    flops_of_spans,
    prefill,
    thinking_tokens,
    train_queries,
    trainable_queries,
)

VARIANTS = {  # and their colors
    "in context": "C7",
    "log T": "C0",
    "fitted temperature": "C1",
    "trained queries": "C3",
    "foreign queries": "C4",
    "other-kind queries": "C5",
    "equal-FLOP thinking": "C2",
}
BASELINE = "fitted temperature"
CACHE = "out/ttt_context-study"  # what models have answered, until all have
RECIPE = {
    "shape": {"n_layer": 2, "n_head": 2, "head_dim": 64, "n_embd": 64, "n_hidden": 128},
    "names": 256,  # values of a, and of b
    "values": 16,
    "train": {"steps": 300, "batch": 32, "tokens": 96, "lr": 1e-2, "lessons": 2048},
    "seeds": [1, 2, 3, 4],
    "lengths": [96, 768, 3072],
    "contexts": 4,
    "questions": 16,
    "steps": 32,
    "span": 128,
    "lrs": {"trained queries": [1e-3, 3e-3, 1e-2], "fitted temperature": [3e-2, 1e-1]},
}

# --------------------------------------------------------------------------------------------------
# Questions, each read on its own behind the frozen context


class TailCache:
    """One layer's T frozen keys and values (Hkv, T, D), as the cache of Q tails behind them.

    Leaves in `needle_mass` (Q, H) the attention of each tail's last query to `needles` (Q, T).
    """

    def __init__(self, k, v, needles):
        self.k = k
        self.v = v
        self.length = k.shape[1]
        self.needles = needles
        self.needle_mass = None

    def attend(self, module, heads):
        q, k, v = heads  # (Q, H, n, D), twice (Q, Hkv, n, D)
        Q, H, n, D = q.shape
        k = torch.cat([self.k.expand(Q, -1, -1, -1), k], dim=2)  # (Q, Hkv, T + n, D)
        v = torch.cat([self.v.expand(Q, -1, -1, -1), v], dim=2)
        if getattr(module.function, "has_logits", True):
            keys = k.repeat_interleave(H // k.shape[1], dim=1)
            scores = (q[:, :, -1:] @ keys.transpose(2, 3))[:, :, 0] * D**-0.5  # (Q, H, T + n)
            p = scores.softmax(-1)[..., : self.length]
            self.needle_mass = (p * self.needles[:, None]).sum(-1)
        return module.function(q, k, v, **module.options)


@torch.no_grad()
def read(model, kv, tails, needles):
    """Read tails (Q, n). Return the logits after each, (Q, V), and the attention to its needles in
    every layer and head that attends, (Q, heads)."""
    caches = [TailCache(k, v, needles) for k, v in kv]
    logits = model(tails, cache=caches)[:, -1]
    mass = [cache.needle_mass for cache in caches if cache.needle_mass is not None]
    return logits, torch.cat(mass, dim=1)


def score(model, kv, questions):
    """Return the share of right answers; the attention to the needle in the head that has the most
    of it on average; and its margin log(p / (1 - p)), the paper's gamma."""
    tails, answers, needles = questions
    logits, mass = read(model, kv, tails, needles)
    is_right = logits.argmax(-1) == answers[:, 0]
    best = mass[:, mass.mean(0).argmax()].clamp(1e-9, 1 - 1e-6)  # (Q)
    return {
        "accuracy": is_right.float().mean().item(),
        "mass": best.mean().item(),
        "margin": (best / (1 - best)).log().mean().item(),
    }


def vote(model, kv, questions, n_samples, generator):
    """Return the share of right answers by majority of n_samples sampled ones. The question and its
    probabilities are read once: independent samples of one token are draws from them."""
    tails, answers, needles = questions
    p = read(model, kv, tails, needles)[0].softmax(-1)
    sampled = torch.multinomial(p, n_samples, replacement=True, generator=generator)
    majority = sampled.mode(dim=1).values  # (Q)
    return {"accuracy": (majority == answers[:, 0]).float().mean().item()}


# --------------------------------------------------------------------------------------------------
# What is trained


@contextmanager
def temperatures(model, factor=1.0):
    """Freeze everything but one factor per head, which multiplies the queries after their norm.

    Yields the logarithms of the factors, (H, 1) for each layer. At the end the model is as before.
    """
    with trainable_queries(model) as weights, ExitStack() as hooks:
        logs = []
        for layer, weight in zip(model.layers, weights):
            weight.requires_grad_(False)
            log = torch.full((model.config.n_head, 1), math.log(factor), requires_grad=True)

            def scale(norm, x, q, log=log):  # q (B, T, H, D)
                return (q * log.exp()).to(q.dtype)

            hooks.enter_context(layer.self_attn.q_norm.register_forward_hook(scale))
            logs.append(log)
        yield logs


TRAINED = {"trained queries": trainable_queries, "fitted temperature": temperatures}


def fit(model, variant, kv, ids, recipe, lr):
    """Train what a variant trains, on random spans of ids. Return its values; the model is as before."""
    n = min(recipe["span"], len(ids) // 2)
    starts = torch.arange(len(ids) - n)
    with TRAINED[variant](model) as weights:
        steps = train_queries(model, weights, kv, ids, starts, steps=recipe["steps"], n=n, lr=lr)
        for _ in steps:
            pass
        return [w.detach().clone() for w in weights]


@contextmanager
def fitted(model, variant, values):
    """The model with these values of what a variant trains."""
    with TRAINED[variant](model) as weights, torch.no_grad():
        for weight, value in zip(weights, values):
            weight.copy_(value)
        yield


# --------------------------------------------------------------------------------------------------
# The study


def make_context(task, recipe, T, seed, c):
    """Return context number c of a seed, ids (T) and questions. In `columns`, contexts 0 and 1 of
    every four are of one kind, 2 and 3 of the other."""
    generator = torch.Generator().manual_seed(10**6 * seed + 10 * T + c)
    kind = 1 + c // 2 % 2
    ids, _, questions = stream(task, T, recipe, generator, recipe["questions"], kind)
    return ids, questions


def choose_rates(model, task, T, recipe):
    """Return the best learning rate of each trained variant on contexts of seed 0, the smallest of
    equals."""
    found = {variant: dict.fromkeys(lrs, 0.0) for variant, lrs in recipe["lrs"].items()}
    for c in (0, 2):
        ids, questions = make_context(task, recipe, T, 0, c)
        _, kv = prefill(model, ids)
        for variant, lrs in found.items():
            for lr in lrs:
                with fitted(model, variant, fit(model, variant, kv, ids, recipe, lr)):
                    lrs[lr] += score(model, kv, questions)["accuracy"]
    return {variant: max(lrs, key=lrs.get) for variant, lrs in found.items()}


def compare_variants(model, task, T, recipe, seed):
    """Return {variant: {score: [one per context], "seconds", "lr"}} for one model, task and length."""
    lrs = choose_rates(model, task, T, recipe)
    scores = {variant: [] for variant in VARIANTS}
    seconds = dict.fromkeys(VARIANTS, 0.0)
    contexts = []
    for c in range(recipe["contexts"]):
        ids, questions = make_context(task, recipe, T, seed, c)
        _, kv = prefill(model, ids)
        values = {}
        for variant in TRAINED:
            start_time = time.perf_counter()
            values[variant] = fit(model, variant, kv, ids, recipe, lrs[variant])
            seconds[variant] += time.perf_counter() - start_time
        contexts.append((ids, kv, questions, values))

    for c, (ids, kv, questions, values) in enumerate(contexts):
        scores["in context"].append(score(model, kv, questions))
        with temperatures(model, max(1.0, math.log(T) / math.log(recipe["train"]["tokens"]))):
            scores["log T"].append(score(model, kv, questions))
        with fitted(model, "fitted temperature", values["fitted temperature"]):
            scores["fitted temperature"].append(score(model, kv, questions))
        owners = {"trained queries": c, "foreign queries": c ^ 1}
        if task == "columns":
            owners["other-kind queries"] = c ^ 2
        for variant, owner in owners.items():
            with fitted(model, "trained queries", contexts[owner][3]["trained queries"]):
                scores[variant].append(score(model, kv, questions))

        # a sampled answer costs one token: the question is read anyway
        n = min(recipe["span"], len(ids) // 2)
        flops = flops_of_spans(model, recipe["steps"] * n, len(ids))
        n_samples = max(1, thinking_tokens(model, len(ids), flops))
        generator = torch.Generator().manual_seed(seed)
        scores["equal-FLOP thinking"].append(vote(model, kv, questions, n_samples, generator))

    found = {}
    for variant, per_context in scores.items():
        if per_context:
            found[variant] = {name: [s[name] for s in per_context] for name in per_context[0]}
            found[variant] |= {"seconds": seconds[variant], "lr": lrs.get(variant)}
    return found


def study_model(job):
    """Train one model and ask it everything; a model that was asked before is not asked again.

    job: recipe, seed, norm. Returns {"task, norm, T": what compare_variants returns}.
    """
    recipe, seed, norm = job

    def compute():
        torch.set_num_threads(1)
        model = train_model(recipe, norm, seed)
        cells = {}
        for task, T in itertools.product(TASKS, recipe["lengths"]):
            cells[f"{task}, {norm}, {T}"] = compare_variants(model, task, T, recipe, seed)
        return cells

    return harness.disk_cache(CACHE, list(job), compute)


def summarize(results):
    """Return variants and differences in the schema of results/: one value per model and variant.

    results: [(seed, {cell: {variant: scores}})]. A cell is "task, norm, tokens".
    """
    variants = {}
    for seed, cells in results:
        for cell, found in cells.items():
            for variant, scores in found.items():
                name = f"{cell}: {variant}"
                entry = variants.setdefault(name, {"settings": {}, "sweep": {}, "runs": []})
                run = {"seed": seed, "value": statistics.fmean(scores["accuracy"]), **scores}
                entry["runs"].append(run)
                if scores["lr"]:
                    entry["sweep"][f"seed {seed}"] = scores["lr"]
    differences = {}
    for name, entry in variants.items():
        cell, variant = name.split(": ")
        baseline = variants[f"{cell}: {BASELINE}"]
        if variant != BASELINE:
            differences[name] = harness.paired_difference(entry["runs"], baseline["runs"])
    return variants, differences


def plot(path, variants, lengths):
    """Draw accuracy against length, a row for each norm and a column for each task."""
    figure, axes = harness.new_figure((9, 7), len(NORMS), len(TASKS))
    for (row, norm), (column, task) in itertools.product(enumerate(NORMS), enumerate(TASKS)):
        ax = axes[row][column]
        for variant, color in VARIANTS.items():
            points = []
            for T in lengths:
                entry = variants.get(f"{task}, {norm}, {T}: {variant}")
                if entry:
                    mean, half_width = harness.mean_ci95([run["value"] for run in entry["runs"]])
                    points.append((T, mean, half_width))
            if points:
                style = "o--" if variant in ("foreign queries", "other-kind queries") else "o-"
                x, y, half_widths = zip(*points)
                ax.errorbar(
                    x, y, half_widths, fmt=style, ms=3, capsize=2, color=color, label=variant
                )
        ax.set(xscale="log", ylim=(-0.05, 1.1), title=f"{task}, {norm}")
        ax.set(xlabel="tokens of context", ylabel="accuracy")
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    lines, labels = axes[0][-1].get_legend_handles_labels()  # `columns` has all variants
    figure.legend(lines, labels, loc="outside lower center", ncols=4)
    harness.save_figure(figure, path)


def study(recipe, out):
    """Train the models, ask them, and write ttt_context-cpu.json and .png to the folder `out`."""
    harness.check_writable(out)
    start_time = time.perf_counter()
    is_resumed = Path(CACHE).exists()
    jobs = [(recipe, seed, norm) for seed in recipe["seeds"] for norm in NORMS]
    found = harness.parallel(study_model, jobs, workers=os.cpu_count(), label="models")
    results = [(job[1], cells) for job, cells in zip(jobs, found)]
    variants, differences = summarize(results)
    record = {
        "question": "do queries trained on this context beat a fitted temperature?",
        "metric": f"share of right answers, chance 1/{recipe['values']}; mean over contexts",
        "baseline": f"{BASELINE}, in the same cell of task, norm and tokens",
        "variants": variants,
        "differences": differences,
        "recipe": recipe,
        "seconds": None if is_resumed else time.perf_counter() - start_time,
    }
    harness.save_json(Path(out) / "ttt_context-cpu.json", record)
    plot(Path(out) / "ttt_context-cpu.png", variants, recipe["lengths"])
    shutil.rmtree(CACHE, ignore_errors=True)
    return record


def main(argv=None):
    args = harness.study_parser(__doc__).parse_args(argv)
    record = study(RECIPE, args.out)
    T = RECIPE["lengths"][-1]
    print(f"right answers at {T:,} tokens, less a fitted temperature:")
    for task, norm in itertools.product(TASKS, NORMS):
        for variant in VARIANTS:
            difference = record["differences"].get(f"{task}, {norm}, {T}: {variant}")
            if difference:
                mean, half_width = difference["mean"], difference["half_width_95"]
                print(f"  {task}, {norm}: {variant} {mean:+.3f} +- {half_width:.3f}")
    return record


if __name__ == "__main__":
    cli.run_main(main)
