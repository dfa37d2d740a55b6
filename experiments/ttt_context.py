"""When do queries trained on this context beat a change of temperature?

Small models, trained on contexts of 96 tokens, answer questions about contexts
of up to 3,072 tokens. A context is a list of records: a, b, value. A question
gives a and b and asks for the value. There are two tasks:

    records    the pair (a, b) decides on the value; length dilutes attention
    columns    a alone decides, or b alone; only the context shows which one

Each model exists with and without QK-norm. All variants answer the same
questions from the same cache:

    in context            the model as it is
    log T                 logits times log T / log 96, without training
    fitted temperature    one factor per head, trained like the queries
    trained queries       the method, on this context
    foreign queries       trained on another context of the same kind
    other-kind queries    on a context where the other column decides
    equal-FLOP thinking   majority of as many samples as cost the steps' FLOPs

Learning rates are chosen on contexts of seed 0, which are not reported. A
model's value is its mean over 4 contexts of 32 questions. The intervals are
Student's t over models, paired by seed.

    python ttt_context.py --experiment    six minutes on two CPU cores

Writes results/ttt_context-cpu.json and .png.
"""

import itertools
import math
import os
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
COLORS = {  # in the figure, which leaves out log T: it is close to the fitted temperature
    "in context": "C7",
    "fitted temperature": "C1",
    "trained queries": "C3",
    "foreign queries": "C4",
    "other-kind queries": "C5",
    "equal-FLOP thinking": "C2",
}
RECIPE = {
    "shape": {"n_layer": 2, "n_head": 2, "head_dim": 64, "n_embd": 64, "n_hidden": 128},
    "names": 256,  # tokens of a, and of b
    "values": 16,
    "train": {"steps": 300, "batch": 32, "tokens": 96, "lr": 1e-2, "examples": 2048},
    "seeds": [1, 2, 3, 4, 5, 6],
    "lengths": [96, 768, 3072],
    "contexts": 4,
    "questions": 32,
    "steps": 32,  # of training the queries or the temperatures
    "span": 128,
    "lrs": {
        "trained queries": [1e-3, 3e-3, 1e-2, 3e-2],
        "fitted temperature": [1e-2, 3e-2, 1e-1, 3e-1],
    },
}

# --------------------------------------------------------------------------------------------------
# Asking. The needles of a question are the positions in the context that hold its answer.


class QuestionCache:
    """One layer's frozen keys and values (Hkv, T, D) of a context, for Q questions about it.

    needles (Q, T): bool. `attend` sets `needle_attention` (Q, H) to the probability that the last
    token of each question gives to its needles, if the layer has softmax attention.
    """

    needle_attention = None

    def __init__(self, k, v, needles):
        self.k = k
        self.v = v
        self.length = k.shape[1]
        self.needles = needles

    def attend(self, module, heads):
        """Return a layer's attention to the context and to the question so far, (Q, H, n, D)."""
        q, k, v = heads  # of the questions' n tokens: (Q, H, n, D) and twice (Q, Hkv, n, D)
        Q, H, _, D = q.shape
        k = torch.cat([self.k.expand(Q, -1, -1, -1), k], dim=2)  # (Q, Hkv, T + n, D)
        v = torch.cat([self.v.expand(Q, -1, -1, -1), v], dim=2)
        if getattr(module.function, "has_logits", True):
            # attention of the last token to the T positions of the context
            keys = k.repeat_interleave(H // k.shape[1], dim=1)  # (Q, H, T + n, D)
            scores = q[:, :, -1:] @ keys.transpose(2, 3) * D**-0.5  # (Q, H, 1, T + n)
            p = scores.softmax(-1)[:, :, 0, : self.length]  # (Q, H, T)
            self.needle_attention = (p * self.needles[:, None]).sum(-1)
        return module.function(q, k, v, **module.options)


@torch.no_grad()
def ask(model, kv, context):
    """Return the logits of the answers, (Q, V), and the attention to the needles, (Q, heads).

    kv: the frozen keys and values of each layer. The heads are those of all softmax layers.
    """
    caches = [QuestionCache(k, v, context.needles) for k, v in kv]
    logits = model(context.questions, cache=caches)[:, -1]
    by_layer = [cache.needle_attention for cache in caches if cache.needle_attention is not None]
    return logits, torch.cat(by_layer, dim=1)


def score(model, kv, context):
    """Return the share of right answers, and how much the best head attends to the needles.

    The best head is the one that attends most to them, on average over the questions. If p is its
    attention, the margin is log(p / (1 - p)).
    """
    logits, needle_attention = ask(model, kv, context)
    is_right = logits.argmax(-1) == context.answers
    best_head = needle_attention.mean(0).argmax()
    p = needle_attention[:, best_head].clamp(1e-9, 1 - 1e-6)  # (Q)
    return {
        "accuracy": is_right.float().mean().item(),
        "needle_attention": p.mean().item(),
        "margin": (p / (1 - p)).log().mean().item(),
    }


def vote(model, kv, context, n_samples, seed):
    """Return the share of right answers when the majority of n_samples sampled answers counts.

    An answer is one token, so the samples can all be drawn from the same logits.
    """
    logits, _ = ask(model, kv, context)
    generator = torch.Generator().manual_seed(seed)
    sampled = torch.multinomial(logits.softmax(-1), n_samples, True, generator=generator)
    majority = sampled.mode(dim=1).values  # (Q)
    return {"accuracy": (majority == context.answers).float().mean().item()}


# --------------------------------------------------------------------------------------------------
# What is trained


@contextmanager
def temperatures(model, factor=1.0):
    """Freeze the model and multiply the queries of each head by a trainable factor.

    Yields the logarithms of the factors, (H, 1) for each layer. The factors come after the QK-norm
    if there is one, which would undo them. At the end of the block the model is as before.
    """
    with trainable_queries(model) as weights, ExitStack() as hooks:
        log_factors = []
        for layer, weight in zip(model.layers, weights):
            weight.requires_grad_(False)
            log_factor = torch.full((model.config.n_head, 1), math.log(factor), requires_grad=True)

            def scale(norm, inputs, q, log_factor=log_factor):  # q (B, T, H, D)
                return (q * log_factor.exp()).to(q.dtype)

            hooks.enter_context(layer.self_attn.q_norm.register_forward_hook(scale))
            log_factors.append(log_factor)
        yield log_factors


# what a variant trains: a context manager that yields the parameters
TRAINED = {"trained queries": trainable_queries, "fitted temperature": temperatures}


def fit(model, variant, kv, ids, recipe, lr):
    """Train a variant on random spans of ids; return its parameters. The model is as before."""
    n = min(recipe["span"], len(ids) // 2)
    starts = torch.arange(len(ids) - n)
    with TRAINED[variant](model) as weights:
        steps = train_queries(model, weights, kv, ids, starts, steps=recipe["steps"], n=n, lr=lr)
        list(steps)  # take them all
        return [w.detach().clone() for w in weights]


@contextmanager
def fitted(model, variant, parameters):
    """Let the model have the parameters of a variant, from `fit`, inside the `with` block."""
    with TRAINED[variant](model) as weights, torch.no_grad():
        for weight, parameter in zip(weights, parameters):
            weight.copy_(parameter)
        yield


# --------------------------------------------------------------------------------------------------
# The study

# Contexts are numbered 0 to 3. In `columns`, a decides on the values in 0 and 1, and b in 2 and 3.
SAME_KIND = [1, 0, 3, 2]  # another context where the same column decides
OTHER_KIND = [2, 3, 0, 1]


def make_context(task, recipe, T, seed, c):
    """Return context number c of a seed."""
    generator = torch.Generator().manual_seed(10**6 * seed + 10 * T + c)
    n_questions = recipe["questions"]
    key_column = 0 if c < 2 else 1
    return ttt_sandbox.make_context(task, T, recipe, generator, n_questions, key_column)


def choose_rates(model, task, T, recipe):
    """Return {variant: its best learning rate on contexts of seed 0}, the smallest of equals."""
    contexts = [make_context(task, recipe, T, 0, c) for c in (0, 2)]  # one of each kind
    caches = [prefill(model, context.ids)[1] for context in contexts]
    best_rates = {}
    for variant, lrs in recipe["lrs"].items():
        accuracies = dict.fromkeys(lrs, 0.0)  # sum over the contexts
        for lr in lrs:
            for context, kv in zip(contexts, caches):
                parameters = fit(model, variant, kv, context.ids, recipe, lr)
                with fitted(model, variant, parameters):
                    accuracies[lr] += score(model, kv, context)["accuracy"]
        best_rates[variant] = max(accuracies, key=accuracies.get)
    return best_rates


def compare_variants(model, task, T, recipe, seed):
    """Compare the variants of a model on contexts of T tokens.

    Returns {variant: {name of a score: [its value on each context], "lr": its learning rate}}.
    """
    lrs = choose_rates(model, task, T, recipe)
    contexts = [make_context(task, recipe, T, seed, c) for c in range(recipe["contexts"])]
    caches = [prefill(model, context.ids)[1] for context in contexts]

    # train on every context
    trained = {}  # {variant: [its parameters for each context]}
    for variant, lr in lrs.items():
        trained[variant] = []
        for context, kv in zip(contexts, caches):
            trained[variant].append(fit(model, variant, kv, context.ids, recipe, lr))

    # thinking gets as many samples, of one token each, as cost the FLOPs of the training
    n = min(recipe["span"], T // 2)
    flops = flops_of_spans(model, recipe["steps"] * n, T)
    n_samples = max(1, thinking_tokens(model, T, flops))
    log_t_factor = max(1.0, math.log(T) / math.log(recipe["train"]["tokens"]))

    # ask every variant about every context
    results = {}
    for c, (context, kv) in enumerate(zip(contexts, caches)):
        found = {"in context": score(model, kv, context)}
        with temperatures(model, log_t_factor):
            found["log T"] = score(model, kv, context)
        with fitted(model, "fitted temperature", trained["fitted temperature"][c]):
            found["fitted temperature"] = score(model, kv, context)
        trained_on = {"trained queries": c, "foreign queries": SAME_KIND[c]}
        if task == "columns":
            trained_on["other-kind queries"] = OTHER_KIND[c]
        for variant, other in trained_on.items():
            with fitted(model, "trained queries", trained["trained queries"][other]):
                found[variant] = score(model, kv, context)
        found["equal-FLOP thinking"] = vote(model, kv, context, n_samples, seed)

        for variant, scores in found.items():
            entry = results.setdefault(variant, {name: [] for name in scores})
            for name, value in scores.items():
                entry[name].append(value)
    for variant, entry in results.items():
        entry["lr"] = lrs.get(variant)
    return results


def study_model(job):
    """Train one model and compare the variants on it.

    job: (recipe, seed, norm). Returns {"task, norm, T: variant": scores}.
    """
    recipe, seed, norm = job
    torch.set_num_threads(1)
    model = ttt_sandbox.train_model(recipe, norm, seed)
    results = {}
    for task, T in itertools.product(TASKS, recipe["lengths"]):
        for variant, scores in compare_variants(model, task, T, recipe, seed).items():
            results[f"{task}, {norm}, {T}: {variant}"] = scores
    return results


def summarize(jobs, results):
    """Return variants and differences in the schema of results/.

    results: what study_model returned for each job. A variant is called "task, norm, T: variant"
    and has one run per seed.
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
    """Plot accuracy against length: a panel for each norm and task, a line for each variant."""
    figure, axes = harness.new_figure((9, 7), len(NORMS), len(TASKS))
    panels = itertools.product(NORMS, TASKS)
    for ax, (norm, task) in zip(axes.flat, panels):
        for variant, color in COLORS.items():
            if (task, variant) == ("records", "other-kind queries"):
                continue  # there is only one kind of records
            means = []
            half_widths = []
            for T in lengths:
                runs = variants[f"{task}, {norm}, {T}: {variant}"]["runs"]
                mean, half_width = harness.mean_ci95([run["value"] for run in runs])
                means.append(mean)
                half_widths.append(half_width)
            style = "o--" if variant in ("foreign queries", "other-kind queries") else "o-"
            options = {"fmt": style, "ms": 3, "capsize": 2, "color": color, "label": variant}
            ax.errorbar(lengths, means, half_widths, **options)
        ax.set(xscale="log", ylim=(-0.05, 1.1), title=f"{task}, {norm}")
        ax.set(xlabel="context length in tokens", ylabel="accuracy")
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    lines, labels = axes[0][-1].get_legend_handles_labels()  # of `columns`, with all variants
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    harness.save_figure(figure, path)


def main(argv=None):
    """Train the models, ask them, and write and print how the variants compare."""
    out = harness.check_writable(harness.study_parser(__doc__).parse_args(argv).out)
    start_time = time.perf_counter()
    jobs = [(RECIPE, seed, norm) for seed in RECIPE["seeds"] for norm in NORMS]
    results = harness.parallel(study_model, jobs, workers=os.cpu_count(), label="models")
    variants, differences = summarize(jobs, results)
    record = {
        "question": "do queries trained on this context beat a fitted temperature?",
        "metric": f"share of right answers, chance 1/{RECIPE['values']}; mean over contexts",
        "baseline": BASELINE,
        "variants": variants,
        "differences": differences,
        "recipe": RECIPE,
        "seconds": time.perf_counter() - start_time,
    }
    harness.save_json(out / "ttt_context-cpu.json", record)
    plot(out / "ttt_context-cpu.png", variants, RECIPE["lengths"])

    longest = RECIPE["lengths"][-1]
    print(f"right answers at {longest} tokens, compared with a {BASELINE}:")
    for name, difference in differences.items():
        setting, variant = name.split(": ")
        if setting.endswith(f", {longest}"):
            change = f"{difference['mean']:+.3f} +- {difference['half_width_95']:.3f}"
            print(f"  {setting}: {variant} {change}")
    return record


if __name__ == "__main__":
    cli.run_main(main)
