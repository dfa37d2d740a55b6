"""When do queries trained on this context beat a change of temperature?

Small models, trained on contexts of 96 tokens, answer questions about contexts
of up to 3,072 tokens. A context is a list of records: a, b, value. A question
gives a and b and asks for the value. There are two tasks:

    records    a and b together decide the value; length dilutes attention
    columns    a alone decides it, or b alone; only the context shows which

Half of the models have QK-norm. experiments/ttt_variants.py lists the variants
that are compared: the model as it is, changes of temperature, queries trained
on this context or on another one, and thinking for as many FLOPs.

The metric is the margin: the log odds log(p / (1 - p)) of the right answer. The
value of a model is the mean over contexts of 32 questions. The intervals are
Student's t over models, paired by seed.

    python ttt_context.py --experiment           on two CPU cores
    python ttt_context.py --experiment --full    on GPUs

Writes results/ttt_context-cpu.json and .png, or -gpu. With --full there are 16
contexts of up to 12,288 tokens, and more learning rates. --init FOLDER adds
experiments/ttt_needles.py, which uses SmolLM2-135M and real text.
"""

import itertools
import os
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

from experiments import harness, runner, ttt_variants
from experiments.provenance import code_hashes, save_json
from experiments.ttt_sandbox import NORMS, TASKS
from support import cli

BASELINE = "fitted temperature"
METRIC = "log odds of the right answer, nats"
# line colors of the figure; thinking is left out, since its margin is nearly that of `in context`
COLORS = {
    "in context": "C7",
    "log T": "C0",
    "fitted temperature": "C1",
    "trained queries": "C3",
    "foreign queries": "C4",
    "other-kind queries": "C5",
}
SMALL = {
    "shape": {"n_layer": 2, "n_head": 2, "head_dim": 64, "n_embd": 64, "n_hidden": 128},
    "names": 256,  # different tokens for a, and as many for b
    "values": 16,  # different tokens for the value
    "train": {"steps": 300, "batch": 32, "tokens": 96, "lr": 1e-2, "examples": 2048},
    "seeds": [1, 2, 3, 4, 5, 6],
    "lengths": [96, 768, 3072],
    "contexts": 4,
    "questions": 32,
    "steps": 32,  # of training the queries or the temperatures
    "span": 128,
    "lrs": {
        "trained queries": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "fitted temperature": [1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0],
    },
}
FULL = {
    **SMALL,
    "train": {"steps": 600, "batch": 64, "tokens": 96, "lr": 1e-2, "examples": 4096},
    "lengths": [3072, 12288],
    "contexts": 16,
    "lrs": {
        "trained queries": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "fitted temperature": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0],
    },
}
RUNS_PER_GPU = 6  # at a time; the models are tiny


def make_jobs(recipe, is_full):
    """Return a job for each seed and norm, with all lengths; with is_full, one for each length."""
    settings = {name: recipe[name] for name in recipe if name not in ("seeds", "lengths")}
    lengths_of_jobs = [recipe["lengths"]]
    if is_full:
        lengths_of_jobs = [[T] for T in reversed(recipe["lengths"])]  # the slowest jobs first

    jobs = []
    for lengths, seed, norm in itertools.product(lengths_of_jobs, recipe["seeds"], NORMS):
        job = {"recipe": settings, "seed": seed, "norm": norm, "lengths": lengths}
        job["device"] = "" if is_full else "cpu"
        jobs.append(job)
    return jobs


def cached_study(job):
    """Return study_model(job), from the disk cache if the result is there."""
    key = [job, code_hashes("experiments.ttt_variants")]
    return runner.disk_cache(runner.CACHE, key, lambda: ttt_variants.study_model(job))


def summarize(jobs, results):
    """Return variants and differences in the schema of results/.

    results: study_model(job) for each job. A variant is called "task, norm, T: variant" and has one
    run per seed.
    """
    variants = {}
    for job, result in zip(jobs, results):
        seed = job["seed"]
        for name, scores in result["scores"].items():
            if name not in variants:
                settings = {"samples": scores["samples"]} if "samples" in scores else {}
                variants[name] = {"settings": settings, "sweep": [], "runs": []}
            variants[name]["runs"].append(make_run(seed, scores, result["seconds"]))
            for lr, margin in scores.get("sweep", []):
                variants[name]["sweep"].append({"seed": seed, "lr": lr, "value": margin})

    # compare every variant with the baseline of its task, norm and T
    differences = {}
    for name, entry in variants.items():
        setting, variant = name.split(": ")
        if variant == BASELINE:
            continue
        baseline = variants[f"{setting}: {BASELINE}"]
        differences[name] = harness.paired_difference(entry["runs"], baseline["runs"])
        accuracy = harness.paired_difference(by_accuracy(entry), by_accuracy(baseline))
        differences[name]["accuracy"] = accuracy
    return variants, differences


def make_run(seed, scores, seconds):
    """Return the means of scores, {name: [value on each context]}, as a run of results/.

    seconds: of the job, which all its variants share.
    """
    run = {"seed": seed, "lr": scores.get("lr"), "margins": scores["margin"]}
    run["value"] = statistics.fmean(scores["margin"])
    for name in ("accuracy", "needle_attention"):
        if name in scores:
            run[name] = statistics.fmean(scores[name])
    return {**run, "seconds": seconds}


def by_accuracy(entry):
    """Return the runs of a variant with their accuracy as their value."""
    return [{**run, "value": run["accuracy"]} for run in entry["runs"]]


def plot(variants, lengths):
    """Plot the margin against the length, with a panel for each norm and task."""
    figure, axes = harness.new_figure((9, 7), len(NORMS), len(TASKS))
    panels = itertools.product(NORMS, TASKS)
    for ax, (norm, task) in zip(axes.flat, panels):
        for variant, color in COLORS.items():
            if (task, variant) == ("records", "other-kind queries"):
                continue  # all contexts of `records` are of one kind

            # mean and confidence interval at each length
            means = []
            half_widths = []
            for T in lengths:
                runs = variants[f"{task}, {norm}, {T}: {variant}"]["runs"]
                mean, half_width = harness.mean_ci95([run["value"] for run in runs])
                means.append(mean)
                half_widths.append(half_width)

            # draw them
            style = "o--" if variant in ("foreign queries", "other-kind queries") else "o-"
            options = {"fmt": style, "ms": 3, "capsize": 2, "color": color, "label": variant}
            ax.errorbar(lengths, means, half_widths, **options)
        ax.axhline(0, color="black", lw=0.8)
        ax.set(xscale="log", title=f"{task}, {norm}")
        ax.set(xlabel="context length in tokens", ylabel=METRIC)
        ax.set_xticks(lengths, lengths)
        ax.minorticks_off()
    lines, labels = axes[0][-1].get_legend_handles_labels()  # of `columns`, which has all variants
    figure.legend(lines, labels, loc="outside lower center", ncols=3)
    return figure


def print_longest(record, longest):
    """Print how the variants compare at the longest contexts."""
    print(f"{METRIC} at {longest} tokens, and share of right answers, compared with a {BASELINE}:")
    for name, margin in record["differences"].items():
        setting, variant = name.split(": ")
        if setting.endswith(f", {longest}"):
            accuracy = margin["accuracy"]
            print(
                f"  {setting}: {variant:20} {margin['mean']:+.3f} +- {margin['half_width_95']:.3f} "
                f"  {accuracy['mean']:+.3f} +- {accuracy['half_width_95']:.3f}"
            )


def run(out, recipe, is_full=False, deadline=float("inf")):
    """Run the study: write JSON and figure, print the result, return the record."""
    # train the models and ask them
    start_time = time.perf_counter()
    jobs = make_jobs(recipe, is_full)
    if is_full:
        results = runner.parallel(cached_study, jobs, deadline=deadline, per_gpu=RUNS_PER_GPU)
        seconds = sum(result["seconds"] for result in results)
    else:
        results = runner.parallel(ttt_variants.study_model, jobs, os.cpu_count(), label="models")
        seconds = time.perf_counter() - start_time

    # summarize and write
    variants, differences = summarize(jobs, results)
    record = {
        "question": "Do queries trained on this context beat a fitted temperature?",
        "metric": METRIC,
        "baseline": BASELINE,
        "variants": variants,
        "differences": differences,
        "recipe": recipe,
        "seconds": seconds,
    }
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
        record = run(out, FULL, is_full=True, deadline=deadline)
        if args.init:
            ttt_needles.run(args.init, out, deadline)
        return record
    except TimeoutError as pause:
        print(pause)


if __name__ == "__main__":
    cli.run_main(main)
