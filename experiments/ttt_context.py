"""When do queries trained on this context beat a change of temperature?

Small models, trained on contexts of 96 tokens, answer questions about contexts
of up to 3,072 tokens. A context is a list of records: a, b, value. A question
gives a and b and asks for the value. There are two tasks:

    records    the pair (a, b) decides on the value; length dilutes attention
    columns    a alone decides, or b alone; only the context shows which one

Each model exists with and without QK-norm. experiments/ttt_variants.py lists
the variants that are compared: the model as it is, changes of temperature,
queries trained on this context and on others, thinking for as many FLOPs.

The metric is the margin of the right answer, log(p / (1 - p)). A model's value
is its mean over contexts of 32 questions. The intervals are Student's t over
models, paired by seed.

    python ttt_context.py --experiment           on two CPU cores
    python ttt_context.py --experiment --full    on GPUs

Writes results/ttt_context-cpu.json and .png, or -gpu. With --full, contexts
have up to 12,288 tokens, and there are 16 of them and more learning rates.
--init FOLDER adds experiments/ttt_needles.py: SmolLM2-135M and real text.
"""

import itertools
import os
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

from experiments import harness, ttt_variants
from experiments.provenance import code_hashes, save_json
from experiments.ttt_sandbox import NORMS, TASKS
from support import cli

BASELINE = "fitted temperature"
METRIC = "log odds of the right answer, nats"
COLORS = {  # in the figure, which leaves out thinking: samples have the margin of `in context`
    "in context": "C7",
    "log T": "C0",
    "fitted temperature": "C1",
    "trained queries": "C3",
    "foreign queries": "C4",
    "other-kind queries": "C5",
}
SMALL = {
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
        "trained queries": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "fitted temperature": [1e-2, 3e-2, 1e-1, 3e-1],
    },
}
FULL = {
    **SMALL,
    "train": {"steps": 600, "batch": 64, "tokens": 96, "lr": 1e-2, "examples": 4096},
    "lengths": [3072, 12288],
    "contexts": 16,
    "lrs": {
        "trained queries": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "fitted temperature": [1e-2, 3e-2, 1e-1, 3e-1, 1.0],
    },
}


def make_jobs(recipe, is_full):
    """Return a job for each model, or with is_full for each model and length."""
    lengths = recipe["lengths"]
    groups = [[T] for T in reversed(lengths)] if is_full else [lengths]  # longest runs first
    same = {name: recipe[name] for name in recipe if name not in ("seeds", "lengths")}
    device = "" if is_full else "cpu"
    jobs = []
    for group, seed, norm in itertools.product(groups, recipe["seeds"], NORMS):
        job = {"recipe": same, "seed": seed, "norm": norm, "lengths": group, "device": device}
        jobs.append(job)
    return jobs


def cached_study(job):
    """Return what study_model returns, from the disk cache if it is there."""
    key = [job, code_hashes("experiments.ttt_variants")]
    return harness.disk_cache(harness.CACHE, key, lambda: ttt_variants.study_model(job))


def summarize(jobs, results):
    """Return variants and differences in the schema of results/.

    results: what study_model returned for each job. A variant is called "task, norm, T: variant"
    and has one run per seed. The seconds of a run are those of its job, which all variants share.
    """
    variants = {}
    for job, result in zip(jobs, results):
        seed = job["seed"]
        for name, scores in result["scores"].items():
            settings = {"samples": scores["samples"]} if "samples" in scores else {}
            entry = variants.setdefault(name, {"settings": settings, "sweep": [], "runs": []})
            run = {"seed": seed, "lr": scores.get("lr"), "margins": scores["margin"]}
            run["value"] = statistics.fmean(scores["margin"])
            run["accuracy"] = statistics.fmean(scores["accuracy"])
            if "needle_attention" in scores:
                run["needle_attention"] = statistics.fmean(scores["needle_attention"])
            entry["runs"].append({**run, "seconds": result["seconds"]})
            for lr, margin in scores.get("sweep", []):
                entry["sweep"].append({"seed": seed, "lr": lr, "value": margin})

    differences = {}
    for name, entry in variants.items():
        setting, variant = name.split(": ")
        if variant == BASELINE:
            continue
        runs = entry["runs"]
        baseline_runs = variants[f"{setting}: {BASELINE}"]["runs"]
        difference = harness.paired_difference(runs, baseline_runs)
        difference["accuracy"] = harness.paired_difference(
            by_accuracy(runs), by_accuracy(baseline_runs)
        )
        differences[name] = difference
    return variants, differences


def by_accuracy(runs):
    """Return runs whose value is their accuracy."""
    return [{**run, "value": run["accuracy"]} for run in runs]


def plot(variants, lengths):
    """Plot the margin against length: a panel for each norm and task, a line for each variant."""
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
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", title=f"{task}, {norm}")
        ax.set(xlabel="context length in tokens", ylabel=METRIC)
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    lines, labels = axes[0][-1].get_legend_handles_labels()  # of `columns`, with all variants
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    return figure


def print_longest(record, longest):
    """Print how the variants compare at the longest contexts."""
    print(f"{METRIC} at {longest} tokens, and share of right answers, compared with a {BASELINE}:")
    for name, d in record["differences"].items():
        setting, variant = name.split(": ")
        if setting.endswith(f", {longest}"):
            accuracy = d["accuracy"]
            print(
                f"  {setting}: {variant:20} {d['mean']:+.3f} +- {d['half_width_95']:.3f}   "
                f"{accuracy['mean']:+.3f} +- {accuracy['half_width_95']:.3f}"
            )


def run(out, recipe, is_full=False, deadline=float("inf")):
    """Train the models and ask them; write JSON and figure, print and return the record."""
    start_time = time.perf_counter()
    jobs = make_jobs(recipe, is_full)
    if is_full:
        results = harness.parallel(cached_study, jobs, deadline=deadline)
        seconds = sum(result["seconds"] for result in results)
    else:
        results = harness.parallel(ttt_variants.study_model, jobs, os.cpu_count(), label="models")
        seconds = time.perf_counter() - start_time
    variants, differences = summarize(jobs, results)
    record = {"question": "Do queries trained on this context beat a fitted temperature?"}
    record.update(metric=METRIC, baseline=BASELINE, variants=variants, differences=differences)
    record.update(recipe=recipe, seconds=seconds)
    path = out / ("ttt_context-gpu" if is_full else "ttt_context-cpu")
    save_json(path.with_suffix(".json"), record, "experiments.ttt_variants")
    harness.save_figure(plot(variants, recipe["lengths"]), path.with_suffix(".png"))
    print_longest(record, recipe["lengths"][-1])
    return record


def main(argv=None):
    parser = harness.study_parser(__doc__, on_gpus="longer contexts, more contexts and rates")
    parser.add_argument("--init", help="with --full: a model from Hugging Face, to find needles")
    args = parser.parse_args(argv)
    out = harness.check_writable(args.out)
    if not args.full:
        return run(out, SMALL)
    from experiments import ttt_needles

    harness.check_gpu()
    deadline = harness.deadline_after(args.minutes)
    try:
        record = run(out, FULL, True, deadline)
        if args.init:
            ttt_needles.run(args.init, out, deadline)
        return record
    except TimeoutError as pause:
        print(pause)


if __name__ == "__main__":
    cli.run_main(main)
