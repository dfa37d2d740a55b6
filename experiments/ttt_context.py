"""When do queries trained on this context beat a change of temperature?

Small models, trained on contexts of 96 tokens, answer questions about
contexts of up to 3,072. In `records` length only dilutes attention; in
`columns` the context alone shows which column is the key
(experiments/ttt_sandbox.py). Each model exists with and without QK-norm. All
variants answer the same questions from the same cache:

    in context            the model as it is
    log T                 logits times log T / log 96, without training
    fitted temperature    one factor per head, trained like the queries
    trained queries       the method, on this context
    foreign queries       trained on another context of the same kind
    other-kind queries    of a context where the other column is the key
    equal-FLOP thinking   majority of as many samples as cost the steps' FLOPs

Learning rates are chosen on contexts of seed 0, which are not reported. The
intervals are Student's t over models, paired by seed: a model's value is its
mean over 4 contexts of 32 questions.

    python ttt_context.py --experiment    five minutes on two CPU cores

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

from experiments import harness, ttt_sandbox
from experiments.ttt_cost import flops_of_spans, thinking_tokens
from experiments.ttt_sandbox import NORMS, TASKS
from support import cli
from ttt_context import prefill, train_queries, trainable_queries

BASELINE = "fitted temperature"
COLORS = {  # of the variants in the figure; log T is close to the fitted temperature
    "in context": "C7",
    "fitted temperature": "C1",
    "trained queries": "C3",
    "foreign queries": "C4",
    "other-kind queries": "C5",
    "equal-FLOP thinking": "C2",
}
CACHE = "out/ttt_context-study"  # results of the models that are done, until all are
RECIPE = {
    "shape": {"n_layer": 2, "n_head": 2, "head_dim": 64, "n_embd": 64, "n_hidden": 128},
    "names": 256,  # tokens of a, and of b
    "values": 16,
    "train": {"steps": 300, "batch": 32, "tokens": 96, "lr": 1e-2, "examples": 2048},
    "seeds": [1, 2, 3, 4, 5, 6],
    "lengths": [96, 768, 3072],
    "contexts": 4,
    "questions": 32,
    "steps": 32,
    "span": 128,
    "lrs": {
        "trained queries": [1e-3, 3e-3, 1e-2, 3e-2],
        "fitted temperature": [1e-2, 3e-2, 1e-1, 3e-1],
    },
}

# --------------------------------------------------------------------------------------------------
# Asking


class QuestionCache:
    """One layer's T frozen keys and values (Hkv, T, D), as the cache of Q questions after them.

    Leaves in `on_needles` (Q, H) how much each question's last token attends to `needles` (Q, T).
    """

    on_needles = None

    def __init__(self, k, v, needles):
        self.k = k
        self.v = v
        self.length = k.shape[1]
        self.needles = needles

    def attend(self, module, heads):
        q, k, v = heads  # (Q, H, n, D), twice (Q, Hkv, n, D)
        Q, H, _, D = q.shape
        k = torch.cat([self.k.expand(Q, -1, -1, -1), k], dim=2)  # (Q, Hkv, T + n, D)
        v = torch.cat([self.v.expand(Q, -1, -1, -1), v], dim=2)
        if getattr(module.function, "has_logits", True):
            keys = k.repeat_interleave(H // k.shape[1], dim=1)
            scores = (q[:, :, -1:] @ keys.transpose(2, 3))[:, :, 0] * D**-0.5  # (Q, H, T + n)
            p = scores.softmax(-1)[..., : self.length]
            self.on_needles = (p * self.needles[:, None]).sum(-1)
        return module.function(q, k, v, **module.options)


@torch.no_grad()
def ask(model, kv, questions):
    """Return the logits of the answers, (Q, V), and the attention to the needles, (Q, heads).

    The heads are those of all layers with softmax attention.
    """
    caches = [QuestionCache(k, v, questions.needles) for k, v in kv]
    logits = model(questions.tokens, cache=caches)[:, -1]
    on_needles = [cache.on_needles for cache in caches if cache.on_needles is not None]
    return logits, torch.cat(on_needles, dim=1)


def score(model, kv, questions):
    """Return the share of right answers, and how much the best head attends to the needle.

    The best head attends most to it on average. margin: log(p / (1 - p)) of its attention p.
    """
    logits, on_needles = ask(model, kv, questions)
    is_right = logits.argmax(-1) == questions.answers
    best_head = on_needles.mean(0).argmax()
    p = on_needles[:, best_head].clamp(1e-9, 1 - 1e-6)  # (Q)
    return {
        "accuracy": is_right.float().mean().item(),
        "needle_attention": p.mean().item(),
        "margin": (p / (1 - p)).log().mean().item(),
    }


def vote(model, kv, questions, n_samples, seed):
    """Return the share of right answers by majority of n_samples sampled ones.

    An answer is one token, so independent samples are draws from one distribution.
    """
    p = ask(model, kv, questions)[0].softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.multinomial(p, n_samples, replacement=True, generator=generator)
    majority = sampled.mode(dim=1).values  # (Q)
    return {"accuracy": (majority == questions.answers).float().mean().item()}


# --------------------------------------------------------------------------------------------------
# What is trained


@contextmanager
def temperatures(model, factor=1.0):
    """Freeze all but one factor per head, which multiplies the queries after their norm.

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
    """Train a variant on random spans of ids; return its parameters. The model is as before."""
    n = min(recipe["span"], len(ids) // 2)
    starts = torch.arange(len(ids) - n)
    with TRAINED[variant](model) as weights:
        list(train_queries(model, weights, kv, ids, starts, steps=recipe["steps"], n=n, lr=lr))
        return [w.detach().clone() for w in weights]


@contextmanager
def fitted(model, variant, parameters):
    """Put a variant's parameters, from `fit`, into the model for this block."""
    with TRAINED[variant](model) as weights, torch.no_grad():
        for weight, parameter in zip(weights, parameters):
            weight.copy_(parameter)
        yield


# --------------------------------------------------------------------------------------------------
# The study


def make_context(task, recipe, T, seed, c):
    """Return context number c of a seed, ids (T) and questions.

    In `columns`, a is the key in contexts 0 and 1 of every four, b in 2 and 3.
    """
    generator = torch.Generator().manual_seed(10**6 * seed + 10 * T + c)
    key_column = 1 + c // 2 % 2
    arguments = (task, T, recipe, generator, recipe["questions"], key_column)
    ids, _, questions = ttt_sandbox.make_context(*arguments)
    return ids, questions


def choose_rates(model, task, T, recipe):
    """Return {variant: its best learning rate on contexts of seed 0}, the smallest of equals."""
    accuracies = {variant: dict.fromkeys(lrs, 0.0) for variant, lrs in recipe["lrs"].items()}
    for c in (0, 2):
        ids, questions = make_context(task, recipe, T, 0, c)
        _, kv = prefill(model, ids)
        for variant, by_lr in accuracies.items():
            for lr in by_lr:
                with fitted(model, variant, fit(model, variant, kv, ids, recipe, lr)):
                    by_lr[lr] += score(model, kv, questions)["accuracy"]
    return {variant: max(by_lr, key=by_lr.get) for variant, by_lr in accuracies.items()}


def compare_variants(model, task, T, recipe, seed):
    """Return {variant: {score: [one per context], "seconds", "lr"}} of a model, task and length."""
    lrs = choose_rates(model, task, T, recipe)
    contexts = [make_context(task, recipe, T, seed, c) for c in range(recipe["contexts"])]
    caches = [prefill(model, ids)[1] for ids, _ in contexts]

    # train on every context
    seconds = {}
    trained = {}
    for variant, lr in lrs.items():
        start_time = time.perf_counter()
        trained[variant] = []
        for (ids, _), kv in zip(contexts, caches):
            trained[variant].append(fit(model, variant, kv, ids, recipe, lr))
        seconds[variant] = time.perf_counter() - start_time

    # as many samples as cost the FLOPs of the steps; a sample is one token
    n = min(recipe["span"], T // 2)
    flops = flops_of_spans(model, recipe["steps"] * n, T)
    n_samples = max(1, thinking_tokens(model, T, flops))
    log_factor = max(1.0, math.log(T) / math.log(recipe["train"]["tokens"]))

    # ask about every context; contexts c and c ^ 1 are of one kind, c and c ^ 2 are not
    scores = {}
    for c, ((_, questions), kv) in enumerate(zip(contexts, caches)):
        found = {"in context": score(model, kv, questions)}
        with temperatures(model, log_factor):
            found["log T"] = score(model, kv, questions)
        with fitted(model, "fitted temperature", trained["fitted temperature"][c]):
            found["fitted temperature"] = score(model, kv, questions)
        trained_on = {"trained queries": c, "foreign queries": c ^ 1}
        if task == "columns":
            trained_on["other-kind queries"] = c ^ 2
        for variant, other in trained_on.items():
            with fitted(model, "trained queries", trained["trained queries"][other]):
                found[variant] = score(model, kv, questions)
        found["equal-FLOP thinking"] = vote(model, kv, questions, n_samples, seed)
        for variant, context_scores in found.items():
            scores.setdefault(variant, []).append(context_scores)

    results = {}
    for variant, per_context in scores.items():
        results[variant] = {name: [s[name] for s in per_context] for name in per_context[0]}
        results[variant] |= {"seconds": seconds.get(variant, 0.0), "lr": lrs.get(variant)}
    return results


def study_model(job):
    """Train one model and compare the variants on it, unless that is in the disk cache.

    job: recipe, seed, norm. Returns {"task, norm, T: variant": scores}.
    """
    recipe, seed, norm = job

    def compute():
        torch.set_num_threads(1)
        model = ttt_sandbox.train_model(recipe, norm, seed)
        results = {}
        for task, T in itertools.product(TASKS, recipe["lengths"]):
            for variant, scores in compare_variants(model, task, T, recipe, seed).items():
                results[f"{task}, {norm}, {T}: {variant}"] = scores
        return results

    return harness.disk_cache(CACHE, list(job), compute)


def summarize(jobs, results):
    """Return variants and differences in the schema of results/, from what study_model returned.

    A variant is called "task, norm, T: variant" and has one run per seed.
    """
    variants = {}
    for (_, seed, _), result in zip(jobs, results):
        for name, scores in result.items():
            entry = variants.setdefault(name, {"settings": {}, "sweep": {}, "runs": []})
            run = {"seed": seed, "value": statistics.fmean(scores["accuracy"]), **scores}
            entry["runs"].append(run)
            if scores["lr"]:
                entry["sweep"][f"seed {seed}"] = scores["lr"]

    differences = {}
    for name, entry in variants.items():
        setting, variant = name.split(": ")
        baseline = variants[f"{setting}: {BASELINE}"]
        if variant != BASELINE:
            differences[name] = harness.paired_difference(entry["runs"], baseline["runs"])
    return variants, differences


def plot(path, variants, lengths):
    """Draw accuracy against length: a panel for each norm and task, a line for each variant."""
    figure, axes = harness.new_figure((9, 7), len(NORMS), len(TASKS))
    panels = itertools.product(NORMS, TASKS)
    for ax, (norm, task) in zip(axes.flat, panels):
        for variant, color in COLORS.items():
            entries = [variants.get(f"{task}, {norm}, {T}: {variant}") for T in lengths]
            if None in entries:  # `records` has no other kind
                continue
            values = [[run["value"] for run in entry["runs"]] for entry in entries]
            means, half_widths = zip(*map(harness.mean_ci95, values))
            style = "o--" if variant in ("foreign queries", "other-kind queries") else "o-"
            options = {"fmt": style, "ms": 3, "capsize": 2, "color": color, "label": variant}
            ax.errorbar(lengths, means, half_widths, **options)
        ax.set(xscale="log", ylim=(-0.05, 1.1), title=f"{task}, {norm}")
        ax.set(xlabel="context length in tokens", ylabel="accuracy")
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    lines, labels = axes[0][-1].get_legend_handles_labels()  # `columns` has all variants
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    harness.save_figure(figure, path)


def study(recipe, out):
    """Train the models, ask them, and write ttt_context-cpu.json and .png to the folder `out`."""
    harness.check_writable(out)
    start_time = time.perf_counter()
    jobs = [(recipe, seed, norm) for seed in recipe["seeds"] for norm in NORMS]
    results = harness.parallel(study_model, jobs, workers=os.cpu_count(), label="models")
    variants, differences = summarize(jobs, results)
    record = {
        "question": "do queries trained on this context beat a fitted temperature?",
        "metric": f"share of right answers, chance 1/{recipe['values']}; mean over contexts",
        "baseline": BASELINE,
        "variants": variants,
        "differences": differences,
        "recipe": recipe,
        "seconds": time.perf_counter() - start_time,
    }
    harness.save_json(Path(out) / "ttt_context-cpu.json", record)
    plot(Path(out) / "ttt_context-cpu.png", variants, recipe["lengths"])
    shutil.rmtree(CACHE, ignore_errors=True)
    return record


def main(argv=None):
    args = harness.study_parser(__doc__).parse_args(argv)
    record = study(RECIPE, args.out)
    longest = str(RECIPE["lengths"][-1])
    print(f"right answers at {longest} tokens, compared with a {BASELINE}:")
    for name, difference in record["differences"].items():
        setting, variant = name.split(": ")
        if setting.endswith(f", {longest}"):
            change = f"{difference['mean']:+.3f} +- {difference['half_width_95']:.3f}"
            print(f"  {setting}: {variant} {change}")
    return record


if __name__ == "__main__":
    cli.run_main(main)
