"""The ideas, and which results of their studies README.md and results/README.md show."""

import statistics
from typing import NamedTuple

from experiments.harness import paired_difference


class Finding(NamedTuple):
    """A result of a study: a variant, and its differences to one baseline or several."""

    study: str  # NAME of results/NAME.json
    label: str
    variant: str
    # differences are shown as they are, in "percent", or of a "log10" as a ratio; those of a log10
    # that is mere "rounding" say nothing, so the values are shown
    kind: str = ""
    baselines: tuple = ()  # default: the study's
    key: str = "value"  # of the runs
    digits: int = 3  # of the values


class Idea(NamedTuple):
    file: str  # NAME of NAME.py and kernels/NAME.py
    name: str
    arxiv: str
    claim: str  # what the paper says
    verdict: str  # whether it held here, in words; the findings have the numbers
    findings: list
    controls: list = []  # findings that results/README.md has in addition


def query_training(task):
    """Return the accuracy of query-only training on a task, by the paper's and our baseline."""
    baselines = tuple(f"{task}: {name}" for name in ("equal-FLOP thinking", "fitted temperature"))
    label = f"right answers, {task.replace(', 12288', '')}"
    variant = f"{task}: trained queries"
    return Finding("ttt_context-gpu", label, variant, baselines=baselines, key="accuracy")


def loss(study, label, variant, *baselines):
    """Return the finding on a loss, as changes in percent."""
    return Finding(study, label, variant, "percent", baselines)


def small_task(label, task):
    """Return the finding of 2-simplicial attention on a task, by softmax and the best control."""
    baselines = (f"{task}: softmax", f"{task}: product of two")
    return Finding("simplicial-cpu", label, f"{task}: 2-simplicial", baselines=baselines)


GELU = "softmax, then GELU"
SOFTMAX_AND_LONGER = ("softmax", "softmax, 50% more steps")
EQUAL_PARAMETERS = ("softmax, wider MLP", "window 128, wider MLP", "product of two")
PEAKED = "trained with LASER, rows with max p > 0.9: LASER"
IDEAS = [
    Idea(
        "laser",
        "LASER attention",
        "2411.03493",
        "attend over exp(V), take the log: larger gradients at the logits, and a lower loss (2.641 "
        "to 2.595, -1.7%, at 301 M parameters)",
        "a lower loss: yes, as much as in the paper, and more than half of that at about equal "
        "time; the steeper the exponential, the lower; but a GELU after softmax attention gives "
        "about two thirds of it; at 124 M parameters, both of two seeds gain; larger gradients: "
        "where attention is peaked, by about a tenth, but in the mean of trained GPTs by 8% at "
        "most",
        [
            loss("laser-gpu", "loss of a GPT", "LASER", "softmax", "softmax, 6% more steps"),
            loss("laser-gpu", "with softmax and a GELU", GELU, "softmax", "LASER"),
            loss("laser-124m-gpu", "loss at 124 M parameters", "LASER"),
            Finding("laser-gradients", "gradient at the logits of trained GPTs", "LASER", "log10"),
        ],
        [
            loss("laser-gpu", "with exp(2 V) and log / 2", "temperature 0.5", "softmax", "LASER"),
            loss("laser-gpu", "with exp(V / 2) and 2 log", "temperature 2", "softmax", "LASER"),
            loss("laser-124m-gpu", "124 M parameters, with softmax and a GELU", GELU),
            Finding("laser-cpu", "gradient at peaked logits of one small GPT", PEAKED, "log10"),
        ],
    ),
    Idea(
        "simplicial",
        "2-simplicial attention",
        "2507.02754",
        "score pairs of keys with a trilinear form: a lower loss from 2 B active parameters on, a "
        "steeper scaling law",
        "hardly at 26 M parameters: at equal steps a fraction of a percent at most, and at about "
        "equal time softmax is far better; but it learns tasks on triples that softmax does not; "
        "the scaling law, about an hour of two H100s, was not measured",
        [
            loss("simplicial-gpu", "loss of a GPT", "2-simplicial", *SOFTMAX_AND_LONGER),
            small_task("accuracy, composing two functions", "composition"),
            small_task("accuracy, finding triples (Match3)", "Match3"),
        ],
        [
            loss("simplicial-gpu", "at equal parameters", "2-simplicial", *EQUAL_PARAMETERS),
        ],
    ),
    Idea(
        "sonew",
        "SONew",
        "2311.10085",
        "precondition with the inverse of a band of E[g gᵀ], in closed form: up to 30% fewer steps",
        "in part: a lower loss, also at about equal time, and AdamW's loss in about 15% fewer "
        "steps, not 30%; all of the gain is the band's, since the diagonal alone does no better "
        "than AdamW; but a wider band, or other neighbours in it, changes less than 1%; and at "
        "equal steps Muon ends far lower",
        [
            loss("sonew-gpu", "loss of a GPT", "SONew", "AdamW", "AdamW, 6% more steps"),
            loss("sonew-gpu", "in 15% fewer steps", "SONew, 15% fewer steps"),
            loss("sonew-gpu", "with the diagonal alone", "SONew, band 0"),
            loss("sonew-gpu", "with Muon instead", "Muon", "AdamW", "SONew"),
            loss(
                "sonew-cpu",
                "MNIST autoencoder, cross-entropy after 300 steps, when Adam has learned nothing",
                "SONew, band 1",
            ),
        ],
        [
            loss("sonew-gpu", "in 30% fewer steps", "SONew, 30% fewer steps"),
            loss("sonew-gpu", "with a band of 4", "SONew, band 4", "AdamW", "SONew"),
            loss("sonew-gpu", "columns in a random order", "SONew, shuffled", "AdamW", "SONew"),
            loss("sonew-gpu", "with one chain per tensor", "SONew, flat", "AdamW", "SONew"),
            loss("sonew-gpu", "AdamW with beta2 0.99", "AdamW, beta2 0.99"),
            loss("sonew-cpu", "MNIST autoencoder, with the diagonal alone", "SONew, band 0"),
        ],
    ),
    Idea(
        "lora_rite",
        "LoRA-RITE",
        "2410.20625",
        "update B A in a way that does not depend on how it is factored: better fine-tuning "
        "(Gemma-2B: +4.6% on one benchmark, +3.5% on four others)",
        "in part: it does not depend on the factors, but answers are hardly better than AdamW's",
        [
            Finding(
                "lora_rite-gpu",
                "SmolLM2-135M, log-probability of right answers",
                "LoRA-RITE",
                digits=4,
            ),
            Finding("lora_rite-cpu", "drift under another factorization", "LoRA-RITE", "rounding"),
        ],
    ),
    Idea(
        "ttt_context",
        "query-only test-time training",
        "2512.13898",
        "train the query projections on a long prompt instead of writing thinking tokens "
        "(Qwen3-4B on LongBench-v2: 27.0 to 39.6, thinking 33.5)",
        "yes against thinking; but a fitted temperature does as well or better on most tasks, and "
        "with SmolLM2-135M it finds no more facts in real text than without",
        [
            query_training("records, no QK-norm, 12288"),
            query_training("records, QK-norm, 12288"),
            query_training("columns, no QK-norm, 12288"),
            query_training("columns, QK-norm, 12288"),
            Finding(
                "ttt_needles-gpu",
                "SmolLM2-135M, log odds of facts hidden in real text",
                "8192 tokens: trained queries",
            ),
        ],
    ),
]


# -- as text ---------------------------------------------------------------------------------------


def runs_of(record, variant, key="value"):
    """Return the runs of a variant, with the number under this key as their value."""
    return [{**run, "value": run[key]} for run in record["variants"][variant]["runs"]]


def variant_mean(record, variant, key="value"):
    return statistics.mean(run["value"] for run in runs_of(record, variant, key))


def baseline_of(record, variant):
    """Return the name of the baseline. In a study of several tasks, names are "TASK: VARIANT"."""
    task, colon, _ = variant.rpartition(": ")
    return f"{task}{colon}{record['baseline']}"


def finding_text(record, finding):
    """Return a finding: "accuracy: 0.96; +0.44 ± 0.08 against softmax", or with percentages only
    "loss: -1.7 ± 0.3% against softmax; -1.0 ± 0.5% against softmax, 6% more steps".
    """
    baselines = finding.baselines or [baseline_of(record, finding.variant)]
    texts = []
    if finding.kind not in ("percent", "log10"):
        texts.append(value_text(record, finding.variant, finding))
    for baseline in baselines:
        name = baseline.rpartition(": ")[2]  # without the task
        if finding.kind == "rounding":
            texts.append(f"{value_text(record, baseline, finding)} with {name}")
            continue
        difference = record["differences"][finding.variant]
        if finding.baselines:
            runs = runs_of(record, finding.variant, finding.key)
            difference = paired_difference(runs, runs_of(record, baseline, finding.key))
        change = change_text(difference, variant_mean(record, baseline), finding.kind)
        texts.append(f"{change} against {name}")
    return f"{finding.label}: {'; '.join(texts)}"


def value_text(record, variant, finding):
    """Return the mean of a variant."""
    value = variant_mean(record, variant, finding.key)
    if finding.kind == "rounding":
        value = 10**value
    return f"{value:#.{finding.digits}g}".removesuffix(".")  # "#" keeps zeros at the end


def change_text(difference, baseline, kind):
    """Return a difference and its interval. baseline: the value that percentages refer to."""
    mean = difference["mean"]
    half_width = difference["half_width_95"]
    unclear = "" if abs(mean) > half_width else f" (not resolved, n = {difference['n']})"
    if kind == "percent":
        return f"{100 * mean / baseline:+.1f} ± {100 * half_width / baseline:.1f}%{unclear}"
    if kind == "log10":
        low, high = 10 ** (mean - half_width), 10 ** (mean + half_width)
        return f"x {10**mean:#.3g} ({low:.3g} to {high:.3g})"
    digits = 4 if 0 < half_width < 0.01 else 2
    return f"{mean:+.{digits}f} ± {half_width:.{digits}f}{unclear}"


def together_text(record):
    """Return what the ideas change alone and together, at equal steps and at about equal time."""
    baseline = record["baseline"]
    variants = record["variants"]

    def percent(difference):
        return change_text(difference, variant_mean(record, baseline), "percent")

    at_equal_seconds = record.get("differences_at_equal_seconds", {})
    longer = {difference["baseline"] for difference in at_equal_seconds.values()}
    changes = []
    for variant, difference in record["differences"].items():
        if variant not in longer:
            changes.append(f"{variant} {percent(difference)}")
    text = f"Loss of a GPT on bytes against {baseline}: {', '.join(changes)}."
    changes = []
    for variant, difference in at_equal_seconds.items():
        changes.append(f"{variant} {percent(difference)} against {difference['baseline']}")
    if changes:
        text += f" At about equal time: {'; '.join(changes)}."

    both = "LASER + SONew"
    if both in variants:
        added = interaction(record, "LASER", "SONew")
        three = paired_difference(runs_of(record, "all three"), runs_of(record, both))
        text += f" {both} against the loss if both gains added up: {percent(added)}."
        text += f" All three against {both}: {percent(three)}."
    return text


def interaction(record, one, other):
    """Return the difference of "one + other" to the loss it would have if both gains added up."""
    expected = []
    runs = (runs_of(record, name) for name in (one, other, record["baseline"]))
    for a, b, baseline in zip(*runs, strict=True):  # run by run, of equal seeds
        value = a["value"] + b["value"] - baseline["value"]
        expected.append({"seed": a["seed"], "value": value})
    return paired_difference(runs_of(record, f"{one} + {other}"), expected)
