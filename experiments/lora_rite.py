"""Which optimizers care how LoRA's product Z = B A is factored?

LoRA freezes a weight and trains a low-rank update Z = B A. The factors B R and
R^-1 A have the same product, so a good optimizer should change Z in the same
way. Here both pairs start side by side in float64 and are trained on the same
batches. The drift is |Z' - Z| / |Z| over all adapters after some steps; for an
optimizer that is invariant under reparametrisation it is nothing but rounding.

LoRA-RITE is invariant (lora_rite.py explains it), also with its own clip, but
not if train.py clips the gradients before, whose norm depends on the factors.
AdamW is not, nor is LoRA+ (Hayou, Ghosh and Yu, ICML 2024, arXiv 2402.12354),
which is AdamW with a larger learning rate for B.

    python lora_rite.py           a minute and a half on two CPU cores
    python lora_rite.py --full    fine-tuning of a real model, on GPUs

The weights are those of a tiny GPT trained on Python's library; the text to
adapt it to is Python's manual. Writes results/lora_rite-cpu.json and .png.
"""

import math
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

import train
from experiments.harness import (
    check_gpu,
    check_writable,
    deadline_after,
    new_figure,
    paired_difference,
    print_differences,
    print_gpu_result,
    save_figure,
    study_parser,
)
from experiments.provenance import save_json
from lora_rite import LoRARITE
from support import data
from support.lora import adapter_groups, adapters, inject

BASE = "--model tiny --steps 300 --data stdlib --device cpu --sample 0"
RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 30
BATCH_SIZE = 2
BLOCK_SIZE = 64
SEEDS = (1, 2, 3, 4)
LR = 1e-2  # the best of six for each of the three at rank 4, when they adapted the same model
LORA_PLUS_RATIO = 4.0
CONDITION = 10.0  # of R
CLIP = 0.05  # gradients are larger than this in every step


def adamw(groups, ratio=1.0):
    """AdamW for the groups of `adapter_groups`; each B has `ratio` times the learning rate."""
    sides = []
    for group in groups:
        sides.append({"params": group["params"][::2], "lr": LR})
        sides.append({"params": group["params"][1::2], "lr": LR * ratio})
    return torch.optim.AdamW(sides, betas=(0.9, 0.999), weight_decay=0.0)


def lora_plus(groups):
    return adamw(groups, LORA_PLUS_RATIO)


def lora_rite(groups):
    return LoRARITE(groups, LR)


def lora_rite_clipped(groups):
    return LoRARITE(groups, LR, clip=CLIP)


VARIANTS = {  # (optimizer, largest norm of the raw gradients; 0: any)
    "AdamW": (adamw, 0.0),
    "AdamW, gradients clipped": (adamw, CLIP),
    "LoRA+": (lora_plus, 0.0),
    "LoRA+, gradients clipped": (lora_plus, CLIP),
    "LoRA-RITE": (lora_rite, 0.0),
    "LoRA-RITE, its own clip": (lora_rite_clipped, 0.0),
    "LoRA-RITE, gradients clipped": (lora_rite, CLIP),
}


def two_factorizations(base, seed):
    """Return two models with equal products B A: factors (B, A), and (B R, R^-1 A)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    models = []
    for _ in range(2):
        model = train.load_model(base, dtype=torch.float64)[0].double()
        models.append(inject(model, RANK, targets=TARGETS, seed=seed))
    half = math.log10(CONDITION) / 2
    stretch = torch.logspace(-half, half, RANK, dtype=torch.float64)
    for one, other in zip(*(adapters(model).values() for model in models)):
        R = torch.linalg.qr(randn(RANK, RANK)).Q * stretch
        one.lora_B.data = 0.1 * randn(*one.lora_B.shape)
        other.lora_A.data = torch.linalg.solve(R, one.lora_A.data)
        other.lora_B.data = one.lora_B.data @ R
    return models


@torch.no_grad()
def distance(model, other):
    """Return |Z' - Z| / |Z| over all adapters."""
    difference = 0.0
    size = 0.0
    for one, two in zip(adapters(model).values(), adapters(other).values()):
        Z = one.lora_B @ one.lora_A
        difference += (two.lora_B @ two.lora_A - Z).square().sum().item()
        size += Z.square().sum().item()
    return math.sqrt(difference / size)


def measure(base, text, name, seed):
    """Train both factorizations and return the run; value: log10 of the last distance."""
    start_time = time.perf_counter()
    make_optimizer, clip = VARIANTS[name]
    models = two_factorizations(base, seed)
    optimizers = [make_optimizer(adapter_groups(model)) for model in models]
    run = train.RunConfig(batch_size=BATCH_SIZE, seed=seed)
    distances = [distance(*models)]
    losses = []
    for step in range(STEPS):
        batch = train.get_batch(text, run, BLOCK_SIZE, step, BATCH_SIZE, torch.device("cpu"))
        for model, optimizer in zip(models, optimizers):
            loss, grad_norm, _ = train.train_step(train.Step(model, optimizer, clip), batch)
            if model is models[0]:
                losses.append(loss)
        distances.append(distance(*models))
    seconds = time.perf_counter() - start_time
    value = math.log10(distances[-1])
    return {
        "seed": seed, "value": value, "distances": distances, "losses": losses, "seconds": seconds
    }  # fmt: skip


def prepare(folder):
    """Train the base model. Return its folder, and the text to adapt it to."""
    base = Path(folder, "base")
    train.main([*BASE.split(), "--out", str(base)])
    manual = Path(folder, "manual")
    manual.mkdir()
    for n, page in enumerate(topics.values()):
        (manual / f"{n}.txt").write_text(page, encoding="utf-8")
    _, tokenizer = train.load_model(base)
    return base, data.load_dataset(str(manual), tokenizer, BLOCK_SIZE, Path(folder, ".tokens"))


def plot(record):
    """Draw the distance over the steps, the mean of log10 over the seeds."""
    figure, axes = new_figure((7, 4))
    for name, variant in record["variants"].items():
        logs = torch.tensor([run["distances"] for run in variant["runs"]]).log10()  # (seeds, steps)
        style = ":" if name.endswith("gradients clipped") else "-"
        axes.semilogy(10 ** logs.mean(0), style, label=name)
    axes.set(xlabel="step", ylabel="|Z' - Z| / |Z|")
    axes.set_title(f"the same product in two factorizations, float64, {len(logs)} seeds")
    axes.legend(fontsize=8)
    return figure


def main(argv=None):
    parser = study_parser(__doc__, on_gpus="teach SmolLM2-135M to answer questions")
    parser.add_argument(
        "--init", metavar="DIR", help="with --full: SmolLM2-135M, its folder or ORG/NAME"
    )
    questions = "with --full: their folder, see experiments/lora_finetune.py"
    parser.add_argument("--questions", metavar="DIR", help=questions)
    args = parser.parse_args(argv)
    out = check_writable(args.out)
    if args.full:
        from experiments import lora_finetune

        check_gpu()
        return lora_finetune.run(args.init, args.questions, out, deadline_after(args.minutes))
    baseline = "AdamW"
    record = {"question": "Which optimizers care how LoRA's product is factored?"}
    record.update(metric=f"log10 of |Z' - Z| / |Z| after {STEPS} steps", baseline=baseline)
    record.update(variants={}, differences={})

    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        base, text = prepare(folder)
        for name, (_, clip) in VARIANTS.items():
            settings = f"base: {BASE}; rank {RANK}, lr {LR:g}, LoRA+ ratio {LORA_PLUS_RATIO:g}, "
            settings += f"batch {BATCH_SIZE} x {BLOCK_SIZE}, gradients clipped to {clip:g} (0: not)"
            runs = [measure(base, text, name, seed) for seed in SEEDS]
            record["variants"][name] = {"settings": settings, "sweep": None, "runs": runs}
    baseline_runs = record["variants"][baseline]["runs"]
    for name, variant in record["variants"].items():
        if name != baseline:
            record["differences"][name] = paired_difference(variant["runs"], baseline_runs)
    record["seconds"] = time.perf_counter() - start_time

    save_json(out / "lora_rite-cpu.json", record, "experiments.lora_rite")
    save_figure(plot(record), out / "lora_rite-cpu.png")
    print_differences(record)
    print_gpu_result("lora_rite")
    return record
