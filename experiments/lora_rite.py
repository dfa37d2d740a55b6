"""Which optimizers care how LoRA's product Z = B A is factored?

LoRA freezes a weight and trains a low-rank update Z = B A. The factors B R and
R^-1 A have the same product, for any invertible R, so a good optimizer should
change Z in the same way. Here both factorizations are trained on the same
batches in float64. The metric is the drift |Z' - Z| / |Z| over all adapters:
for an optimizer that is invariant under reparametrisation it is only rounding.

LoRA-RITE is invariant (lora_rite.py explains it), also with its own clip. It is
not if train.py clips the gradients before, because their norm depends on the
factors. AdamW is not invariant, nor is LoRA+ (Hayou, Ghosh and Yu, ICML 2024,
arXiv 2402.12354), which is AdamW with a larger learning rate for B.

    python lora_rite.py           two minutes on two CPU cores
    python lora_rite.py --full    fine-tuning of a real model, on GPUs
    python train.py --init HuggingFaceTB/SmolLM2-135M --data answers.jsonl
        --adapter lora_rite --optim lora_rite    fine-tune with it

The base model is a tiny GPT trained on Python's standard library; it is adapted
to Python's manual. Writes results/lora_rite-cpu.json and .png.
"""

import io
import math
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

import train
from experiments import harness
from experiments.provenance import save_json
from lora_rite import LoRARITE
from support import data
from support.lora import adapter_groups, adapters, inject

BASE = "--model tiny --steps 300 --data stdlib --device cpu --sample 0"
RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS = 30  # of the adapters
BATCH_SIZE = 2
BLOCK_SIZE = 64
SEEDS = (1, 2, 3, 4)
LR = 1e-2
LORA_PLUS_RATIO = 4.0
CONDITION = 10.0  # condition number of R
CLIP = 0.05  # largest gradient norm; small enough to clip in every step


# -- optimizers ------------------------------------------------------------------------------------


def adamw(groups, ratio=1.0):
    """Build AdamW in which the learning rate of every B is `ratio` times that of every A."""
    param_groups = []
    for group in groups:  # the parameters of each group are A, B, A, B, ...
        param_groups.append({"params": group["params"][::2], "lr": LR})
        param_groups.append({"params": group["params"][1::2], "lr": LR * ratio})
    return torch.optim.AdamW(param_groups, betas=(0.9, 0.999), weight_decay=0.0)


lora_plus = partial(adamw, ratio=LORA_PLUS_RATIO)
lora_rite = partial(LoRARITE, lr=LR)

VARIANTS = {  # optimizer, and the norm that train.py clips the gradients to (0: no clipping)
    "AdamW": (adamw, 0.0),
    "AdamW, gradients clipped": (adamw, CLIP),
    "LoRA+": (lora_plus, 0.0),
    "LoRA+, gradients clipped": (lora_plus, CLIP),
    "LoRA-RITE": (lora_rite, 0.0),
    "LoRA-RITE, its own clip": (partial(lora_rite, clip=CLIP), 0.0),
    "LoRA-RITE, gradients clipped": (lora_rite, CLIP),
}
BASELINE = "AdamW"
# with and without clipping, the drift of these is nearly the same
NOT_PLOTTED = ("AdamW, gradients clipped", "LoRA+, gradients clipped")


# -- model and text --------------------------------------------------------------------------------


def prepare(folder):
    """Train the base model. Return its folder, and the text to adapt it to."""
    base = Path(folder, "base")
    result = train.main([*BASE.split(), "--out", str(base)])
    if result["signal"]:
        raise KeyboardInterrupt(result["signal"])

    # Python's manual, one file per page
    manual = Path(folder, "manual")
    manual.mkdir()
    for n, page in enumerate(topics.values()):
        (manual / f"{n}.txt").write_text(page, encoding="utf-8")
    _, tokenizer = train.load_model(base)
    text = data.load_dataset(str(manual), tokenizer, BLOCK_SIZE, Path(folder, ".tokens"))
    return base, text


def two_factorizations(base, seed):
    """Return two models with adapters (B, A) and (B R, R^-1 A), so with the same products B A."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    models = []
    for _ in range(2):
        model = train.load_model(base, dtype=torch.float64)[0].double()
        models.append(inject(model, RANK, targets=TARGETS, seed=seed))

    # singular values of R, from 1 / sqrt(CONDITION) to sqrt(CONDITION)
    half = math.log10(CONDITION) / 2
    singular_values = torch.logspace(-half, half, RANK, dtype=torch.float64)

    # LoRA starts with B = 0, which R does not change, so B is random here
    first, second = models
    for one, two in zip(adapters(first).values(), adapters(second).values()):
        R = torch.linalg.qr(randn(RANK, RANK)).Q * singular_values
        one.lora_B.data = 0.1 * randn(*one.lora_B.shape)
        two.lora_A.data = torch.linalg.solve(R, one.lora_A.data)
        two.lora_B.data = one.lora_B.data @ R
    return models


# -- training --------------------------------------------------------------------------------------


@torch.no_grad()
def drift(first, second):
    """Return |Z' - Z| / |Z| over all adapters: Z = B A in the first model, Z' in the second."""
    difference = 0.0
    size = 0.0
    for one, two in zip(adapters(first).values(), adapters(second).values()):
        Z = one.lora_B @ one.lora_A
        difference += (two.lora_B @ two.lora_A - Z).square().sum().item()
        size += Z.square().sum().item()
    return math.sqrt(difference / size)


def train_both(base, text, name, seed):
    """Train both factorizations and return the run; its value is log10 of the last drift."""
    start_time = time.perf_counter()
    make_optimizer, clip = VARIANTS[name]
    models = two_factorizations(base, seed)
    optimizers = [make_optimizer(adapter_groups(model)) for model in models]
    config = train.RunConfig(batch_size=BATCH_SIZE, seed=seed)

    # each step: the same batch for both models
    distances = [drift(*models)]
    losses = []  # of the first model
    for step in range(STEPS):
        batch = train.get_batch(text, config, BLOCK_SIZE, step, BATCH_SIZE, torch.device("cpu"))
        for model, optimizer in zip(models, optimizers):
            loss, _, _ = train.train_step(train.Step(model, optimizer, clip), batch)
            if model is models[0]:
                losses.append(loss)
        distances.append(drift(*models))

    run = {"seed": seed, "value": math.log10(distances[-1])}
    run.update(distances=distances, losses=losses, seconds=time.perf_counter() - start_time)
    return run


# -- figure and command ----------------------------------------------------------------------------


def plot(record):
    """Draw the drift at each step, as the geometric mean over the seeds."""
    figure, axes = harness.new_figure((7, 4))
    for name, variant in record["variants"].items():
        if name in NOT_PLOTTED:
            continue
        logs = torch.tensor([run["distances"] for run in variant["runs"]]).log10()  # (seeds, steps)
        style = ":" if name.endswith("gradients clipped") else "-"
        axes.semilogy(10 ** logs.mean(0), style, label=name)
    axes.set(xlabel="step", ylabel="drift under reparametrisation, |Z' - Z| / |Z|")
    axes.set_title(f"the same product in two factorizations, float64, {len(logs)} seeds")
    axes.legend(fontsize=8)
    return figure


def main(argv=None):
    parser = harness.study_parser(__doc__, on_gpus="teach SmolLM2-135M to answer questions")
    init = "with --full: SmolLM2-135M, its folder or ORG/NAME"
    parser.add_argument("--init", metavar="DIR", help=init)
    questions = "with --full: their folder, see experiments/lora_finetune.py"
    parser.add_argument("--questions", metavar="DIR", help=questions)
    args = parser.parse_args(argv)
    out = harness.check_writable(args.out)
    if args.full:
        from experiments import lora_finetune

        harness.check_gpu()
        deadline = harness.deadline_after(args.minutes)
        return lora_finetune.run(args.init, args.questions, out, deadline)

    # train every variant with every seed
    start_time = time.perf_counter()
    variants = {}
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()):  # the progress bar on stderr is enough
            base, text = prepare(folder)
        for name, (_, clip) in VARIANTS.items():
            settings = f"base: {BASE}; rank {RANK}, lr {LR:g}, LoRA+ ratio {LORA_PLUS_RATIO:g}, "
            settings += f"batch {BATCH_SIZE} x {BLOCK_SIZE}, gradients clipped to {clip:g} (0: not)"
            runs = [train_both(base, text, name, seed) for seed in SEEDS]
            variants[name] = {"settings": settings, "sweep": [], "runs": runs}

    # compare with the baseline
    differences = {}
    for name, variant in variants.items():
        if name != BASELINE:
            baseline_runs = variants[BASELINE]["runs"]
            differences[name] = harness.paired_difference(variant["runs"], baseline_runs)
    record = {
        "question": "Which optimizers care how LoRA's product is factored?",
        "metric": f"log10 of |Z' - Z| / |Z| after {STEPS} steps",
        "baseline": BASELINE,
        "variants": variants,
        "differences": differences,
        "seconds": time.perf_counter() - start_time,
    }

    save_json(out / "lora_rite-cpu.json", record, "experiments.lora_rite")
    harness.save_figure(plot(record), out / "lora_rite-cpu.png")
    harness.print_differences(record)
    harness.print_gpu_result("lora_rite")
    return record
