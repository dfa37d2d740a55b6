"""The ideas, and which results of their studies the table in README.md shows."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A result that README.md shows: a variant, and its differences to one baseline or several."""

    study: str  # NAME of results/NAME.json
    label: str
    variant: str
    kind: str = ""  # differences are shown as they are, in "percent", or of a "log10" as a ratio
    baselines: tuple = ()  # default: the study's


class Idea(NamedTuple):
    file: str  # NAME of NAME.py and kernels/NAME.py
    name: str
    arxiv: str
    claim: str  # what the paper says
    findings: list


def query_training(task):
    """Return the finding of query-only training on a task, against the paper's and our baseline."""
    baselines = tuple(f"{task}: {name}" for name in ("equal-FLOP thinking", "fitted temperature"))
    label = f"log odds on {task.replace(', 12288', '')}"
    return Finding("ttt_context-gpu", label, f"{task}: trained queries", baselines=baselines)


PEAKED = "trained with LASER, rows with max p > 0.9: LASER"
IDEAS = [
    Idea(
        "laser",
        "LASER attention",
        "2411.03493",
        "attend over exp(V), take the log: larger gradients at the logits, a lower loss",
        [
            Finding("laser-gpu", "loss of a GPT", "LASER", "percent"),
            Finding("laser-124m-gpu", "loss of a GPT of 124 M parameters", "LASER", "percent"),
            Finding("laser-cpu", "gradient at peaked logits", PEAKED, "log10"),
        ],
    ),
    Idea(
        "simplicial",
        "2-simplicial attention",
        "2507.02754",
        "score pairs of keys with a trilinear form: a lower loss, a steeper scaling law",
        [
            Finding("simplicial-gpu", "loss of a GPT", "2-simplicial", "percent"),
            Finding(
                "simplicial-cpu", "accuracy, composing two functions", "composition: 2-simplicial"
            ),
            Finding("simplicial-cpu", "accuracy, finding triples (Match3)", "Match3: 2-simplicial"),
        ],
    ),
    Idea(
        "sonew",
        "SONew",
        "2311.10085",
        "precondition with the inverse of a band of E[g gᵀ], in closed form: 30% fewer steps",
        [
            Finding("sonew-gpu", "loss of a GPT", "SONew", "percent"),
            Finding("sonew-gpu", "in 15% fewer steps", "SONew, 15% fewer steps", "percent"),
            Finding("sonew-gpu", "in 30% fewer steps", "SONew, 30% fewer steps", "percent"),
            Finding("sonew-cpu", "loss of an autoencoder", "SONew, band 1", "percent"),
            Finding("sonew-cpu", "with the diagonal alone", "SONew, band 0", "percent"),
        ],
    ),
    Idea(
        "lora_rite",
        "LoRA-RITE",
        "2410.20625",
        "update B A in a way that does not depend on how it is factored: better fine-tuning",
        [
            Finding("lora_rite-gpu", "log-probability of right answers", "LoRA-RITE"),
            Finding("lora_rite-cpu", "drift under another factorization", "LoRA-RITE", "log10"),
        ],
    ),
    Idea(
        "ttt_context",
        "query-only test-time training",
        "2512.13898",
        "train the query projections on a long prompt instead of writing thinking tokens",
        [
            query_training("records, no QK-norm, 12288"),
            query_training("records, QK-norm, 12288"),
            query_training("columns, no QK-norm, 12288"),
            query_training("columns, QK-norm, 12288"),
        ],
    ),
]
