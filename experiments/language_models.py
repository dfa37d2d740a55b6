"""What the ideas do for a language model: the same GPT, data and steps, on GPUs.

Each study is a declaration of its variants; `python laser.py --full` runs the first one. Rates and
seeds: experiments/harness.py. Studies share the runs that they have in common.
"""

from typing import NamedTuple

from experiments.harness import SEEDS, check_gpu, compare

SIMPLICIAL = "--attn softmax,softmax,softmax,simplicial:w1=128:w2=16"
ALL = "--attn laser,laser,laser,simplicial:w1=128:w2=16 --optim sonew"


class Study(NamedTuple):
    question: str
    variants: dict  # name: flags that differ
    baseline: str
    seeds: tuple = SEEDS


STUDIES = {
    "laser": Study(
        "Does a GPT with LASER reach a lower loss than with softmax attention?",
        {"softmax": "--attn softmax", "LASER": "--attn laser"},
        "softmax",
    ),
    "simplicial": Study(
        "Does a GPT with 2-simplicial attention in every fourth layer reach a lower loss?",
        {"softmax": "--attn softmax", "2-simplicial": SIMPLICIAL},
        "softmax",
    ),
    "sonew": Study(
        "Does SONew reach a lower loss than AdamW, and the same loss in 30% fewer steps?",
        {
            "AdamW": "--attn softmax",
            "SONew": "--attn softmax --optim sonew",
            "SONew, 30% fewer steps": "--attn softmax --optim sonew --steps 1050 --eval-every 210",
        },
        "AdamW",
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
        "softmax + AdamW",
        seeds=(1, 2, 3),
    ),
}


def run(name, out, minutes=None):
    """Run a study and return its record, or None if that takes longer; see harness.compare."""
    check_gpu()
    study = STUDIES[name]
    try:
        return compare(name, *study, out=out, minutes=minutes)
    except TimeoutError as pause:
        print(f"{pause} after {minutes:g} minutes; the same command continues")
