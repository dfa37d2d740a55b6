"""What the ideas do for a language model: the same GPT, data and steps, on GPUs.

`python laser.py --full` runs the study "laser", and so on; experiments/all_ideas.py the one called
"all". A study grows in stages: its variants, the baseline with as many seconds as they take at the
same learning rate, later variants, then one control after the other, which get fewer seeds. Its
JSON is written after each stage.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import harness, runner
from experiments.provenance import save_json

# 26 M parameters, 98 M bytes of Python source
FLAGS = "--model small --data python --steps 3000 --eval-every 600 --eval-batches 100"
RATES = (5e-4, 1e-3, 2e-3)
# 124 M parameters, 301 M bytes in 4,600 steps; at the preset's learning rate
FLAGS_124M = (
    "--model gpt2 --n-layer 17 --n-hidden 2144 --data python "
    "--steps 4600 --eval-every 920 --eval-batches 100"
)
RATES_124M = (6e-4,)
SEEDS = (1, 2, 3, 4, 5)
CONTROL_SEEDS = (1, 2, 3)
METRIC = "held-out loss, nats per byte"

SIMPLICIAL = "--attn softmax,softmax,softmax,simplicial:w1=128:w2=16"
WINDOW = "--attn softmax,softmax,softmax,experiments.controls:window=128"
PRODUCT = "--attn softmax,softmax,softmax,experiments.product:w1=128:w2=16"
ALL = "--attn laser,laser,laser,simplicial:w1=128:w2=16 --optim sonew"
WIDER = "--n-hidden 1496"  # as many parameters as the second keys and values of 2-simplicial layers
# More steps for the baseline, in place of the extra time that a variant's steps take, rounded up:
# alone on an H200, LASER takes 4% more, with SONew or without, 2-simplicial attention 45%, all
# three 51%, and SONew nothing
MORE_STEPS_6 = "--steps 3180 --eval-every 636"  # LASER, SONew and both
MORE_STEPS_50 = "--steps 4500 --eval-every 900"  # 2-simplicial
MORE_STEPS_55 = "--steps 4650 --eval-every 930"  # all three
FEWER_STEPS_15 = "--steps 2550 --eval-every 510"
FEWER_STEPS_30 = "--steps 2100 --eval-every 420"


class Study(NamedTuple):
    question: str
    variants: dict  # name: flags; the first one is the baseline
    longer_baselines: dict = {}  # name: flags of the baseline with more steps
    equal_seconds: dict = {}  # {variant: the longer baseline that takes about as long}
    later: dict = {}  # more variants, of a later stage
    controls: dict = {}
    same_rate: dict = {}  # {variant that is not swept: the one whose learning rate it takes}
    seeds: tuple = SEEDS
    flags: str = FLAGS
    rates: tuple = RATES
    per_gpu: int = 2  # runs at a time: one computes while the other one compiles or saves


STUDIES = {
    "laser": Study(
        "Does a GPT with LASER reach a lower loss than with softmax attention?",
        {"softmax": "--attn softmax", "LASER": "--attn laser"},
        {"softmax, 6% more steps": f"--attn softmax {MORE_STEPS_6}"},
        {"LASER": "softmax, 6% more steps"},
        later={
            "temperature 0.5": "--attn experiments.controls:tau=0.5",
            "softmax, then GELU": "--attn experiments.controls:gelu=true",
        },
        controls={"temperature 2": "--attn experiments.controls:tau=2"},
    ),
    "laser-124m": Study(
        "Does a GPT of 124 M parameters with LASER reach a lower loss?",
        {"softmax": "--attn softmax", "LASER": "--attn laser"},
        later={"softmax, then GELU": "--attn experiments.controls:gelu=true"},
        seeds=(1, 2),
        flags=FLAGS_124M,
        rates=RATES_124M,
        per_gpu=1,
    ),
    "simplicial": Study(
        "Does a GPT with 2-simplicial attention in every fourth layer reach a lower loss?",
        {"softmax": "--attn softmax", "2-simplicial": SIMPLICIAL},
        {"softmax, 50% more steps": f"--attn softmax {MORE_STEPS_50}"},
        {"2-simplicial": "softmax, 50% more steps"},
        controls={
            "softmax, wider MLP": f"--attn softmax {WIDER}",
            "window 128, wider MLP": f"{WINDOW} {WIDER}",
            "product of two": PRODUCT,
        },
        seeds=(1, 2, 3, 4, 5, 6, 7, 8),  # the difference is small
    ),
    "sonew": Study(
        "Does SONew reach a lower loss than AdamW, and the same loss in fewer steps?",
        {
            "AdamW": "--attn softmax",
            "SONew": "--attn softmax --optim sonew",
        },
        {"AdamW, 6% more steps": f"--attn softmax {MORE_STEPS_6}"},
        {"SONew": "AdamW, 6% more steps"},
        {
            "SONew, 15% fewer steps": f"--attn softmax --optim sonew {FEWER_STEPS_15}",
        },
        controls={
            "SONew, 30% fewer steps": f"--attn softmax --optim sonew {FEWER_STEPS_30}",
            "Muon": "--attn softmax --optim experiments.controls:name=muon",
            "AdamW, beta2 0.99": "--attn softmax --optim adamw:beta2=0.99",
            "SONew, band 0": "--attn softmax --optim sonew:band=0",
            "SONew, band 4": "--attn softmax --optim sonew:band=4",
            "SONew, shuffled": "--attn softmax --optim experiments.controls:name=shuffled",
            "SONew, flat": "--attn softmax --optim sonew:chain=flat",
        },
        same_rate={"SONew, 15% fewer steps": "SONew", "SONew, 30% fewer steps": "SONew"},
        seeds=(1, 2, 3, 4, 5, 6, 7, 8),  # they differ more than LASER's
    ),
    "all": Study(
        "Do the gains of LASER, 2-simplicial attention and SONew add up?",
        {
            "softmax + AdamW": "--attn softmax",
            "LASER": "--attn laser",
            "2-simplicial": SIMPLICIAL,
            "SONew": "--attn softmax --optim sonew",
            "LASER + SONew": "--attn laser --optim sonew",
            "all three": ALL,
        },
        {
            "softmax + AdamW, 6% more steps": f"--attn softmax {MORE_STEPS_6}",
            "softmax + AdamW, 55% more steps": f"--attn softmax {MORE_STEPS_55}",
        },
        {
            "LASER + SONew": "softmax + AdamW, 6% more steps",
            "all three": "softmax + AdamW, 55% more steps",
        },
    ),
}


def run(name, out, deadline=float("inf")):
    """Run a study, or what it can until the deadline; return its record, None if there is none yet.

    deadline: a value of time.monotonic().
    """
    harness.check_gpu()
    study = STUDIES[name]
    stages = [study.variants]
    controls = [{name: flags} for name, flags in study.controls.items()]
    for more in (study.longer_baselines, study.later, *controls):
        if more:
            stages.append({**stages[-1], **more})
    record = None
    try:
        for flags in stages:
            seeds = {n: CONTROL_SEEDS if n in study.controls else study.seeds for n in flags}
            record = compare(study, flags, seeds, deadline)
            save_json(Path(out) / f"{name}-gpu.json", record, "experiments.language_models")
            harness.save_figure(plot(record), Path(out) / f"{name}-gpu.png")
    except TimeoutError as pause:
        print(pause)
    if record:
        harness.print_differences(record)
    return record


def compare(study, flags, seeds, deadline=float("inf")):
    """Train all variants and return the record. flags, seeds: of each variant.

    Raises TimeoutError at the deadline, a value of time.monotonic().
    """
    settings = {name: f"{study.flags} {more}" for name, more in flags.items()}

    def make_job(variant, lr, seed):
        return {"variant": variant, "flags": settings[variant], "lr": lr, "seed": seed}

    train_variant = partial(run_variant, deadline=deadline)
    look = partial(run_variant, look_only=True)
    baseline = next(iter(study.variants))
    same_rate = {**dict.fromkeys(study.longer_baselines, baseline), **study.same_rate}
    options = {"deadline": deadline, "look": look, "per_gpu": study.per_gpu}
    swept, runs = harness.sweep_and_run(
        train_variant, make_job, seeds, study.rates, same_rate, **options
    )
    record = {"question": study.question, "metric": METRIC, "baseline": baseline}
    record.update(seconds=0.0, variants={}, differences={}, differences_at_equal_seconds={})
    for name in flags:
        entry = {"settings": settings[name], "sweep": swept[name], "runs": runs[name]}
        record["variants"][name] = entry
        record["seconds"] += sum(run["seconds"] for run in swept[name] + runs[name])
        if name != baseline:
            difference = harness.paired_difference(runs[name], runs[baseline])
            record["differences"][name] = difference
    check_same_text(record["variants"].values())
    for name, longer in study.equal_seconds.items():
        if longer in runs:
            difference = harness.paired_difference(runs[name], runs[longer])
            record["differences_at_equal_seconds"][name] = {**difference, "baseline": longer}
    return record


def check_same_text(variants):
    """Raise ValueError if runs read different texts. Older runs do not tell which one."""
    texts = set()
    for variant in variants:
        texts |= {run["data"]["sha256"] for run in variant["runs"] if run.get("data")}
    if len(texts) > 1:
        raise ValueError(f"the runs read {len(texts)} different texts; remove {runner.CACHE}")


def run_variant(job, look_only=False, deadline=float("inf")):
    """Train one variant and return its run; job: {variant, flags, lr, seed}.

    look_only: return None if it is not cached. Raises TimeoutError at the deadline.
    """
    flags = f"{job['flags']} --lr {job['lr']:g} --seed {job['seed']}"
    result = runner.run_train(flags, runner.CACHE, look_only, deadline)
    if result is None:
        return None
    run = {"seed": job["seed"], "lr": job["lr"], "value": result["val_loss"]}
    run["data"] = result.get("data")
    run["curve"] = [[int(row["step"]), row["val_loss"]] for row in result["history"]]
    return {**run, "seconds": result["seconds"], "tokens_per_s": result.get("tokens_per_s")}


def evaluation_steps(runs):
    return [step for step, _ in runs[0]["curve"]]


def losses(runs):
    """Return the held-out losses of all runs at their evaluations, (seeds, evaluations)."""
    return [[loss for _, loss in run["curve"]] for run in runs]


def plot(record):
    """Plot the differences of language models to the baseline, over training and at the end."""
    figure, (left, right) = harness.new_figure((11, 1.8 + 0.45 * len(record["differences"])), 1, 2)
    baseline = record["variants"][record["baseline"]]["runs"]

    # over training: the mean over seeds, of variants that were evaluated at the same steps
    for i, name in enumerate(list(record["differences"])[:6]):
        runs = record["variants"][name]["runs"]
        if evaluation_steps(runs) == evaluation_steps(baseline):
            same_seeds = baseline[: len(runs)]
            differences = np.array(losses(runs)) - losses(same_seeds)  # (seeds, evaluations)
            left.plot(evaluation_steps(runs), differences.mean(0), "o-", color=f"C{i}")
    left.axhline(0, color="black", lw=0.8)
    left.set(xlabel="step", ylabel=f"difference to {record['baseline']}")

    # at the end, with intervals; the names have the colours of the curves
    harness.plot_differences(record, right)
    right.locator_params(axis="x", nbins=6)
    for i, label in enumerate(right.get_yticklabels()):
        label.set_color(f"C{i}")
    figure.suptitle(record["metric"])
    return figure
