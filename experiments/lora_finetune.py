"""LoRA-RITE on a real model: which optimizer makes adapters answer questions best?

SmolLM2-135M learns multiple-choice questions with LoRA adapters of rank 16. The metric is the mean
log-probability of the right answer among the answers offered, on questions held out. An interval
covers both the seeds and the questions (crossed random effects).

Questions: a folder TASK/train.json and TASK/test.json for each task, in the format of
LLM-Adapters (arXiv 2304.01933): a list of {"instruction": prompt, "output": full answer}. Its last
line lists the answers offered, "Answer format: answer1/answer2".
"""

import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from experiments import harness
from experiments.provenance import code_hashes, plugin_modules, save_json
from support import distributed
from support.files import read_user_file

TASKS = ("ARC-Easy", "ARC-Challenge", "openbookqa", "boolq")
QUESTIONS_PER_TASK = 500  # of test.json
FLAGS = "--adapter lora_rite:rank=16 --steps 300 --batch-size 32 --block-size 256"
FLAGS += " --weight-decay 0 --eval-every 300 --eval-batches 20 --sample 0"
VARIANTS = {
    "AdamW": "--optim adamw:beta2=0.999",
    "LoRA+": "--optim experiments.controls:name=lora_plus",
    "LoRA-RITE": "--optim lora_rite",
}
BASELINE = "AdamW"
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
METRIC = "log-probability of the right answer, nats"
BATCH = 64  # answers scored at a time


# -- questions -------------------------------------------------------------------------------------


def read_questions(folder, task, split):
    """Return the questions of a task, a list of {"instruction", "output"}."""
    path = Path(folder, task, f"{split}.json")
    try:
        questions = json.loads(read_user_file(path, limit=2**30))
        for question in questions:
            offered_answers(question)
        return questions
    except (ValueError, KeyError, TypeError, IndexError):
        raise ValueError(
            f"--questions {folder}: {path} is not a list of questions; see the top of "
            f"experiments/lora_finetune.py"
        ) from None


def offered_answers(question):
    """Return the answers offered in full, the right one first."""
    right = question["output"]
    beginning, _, label = right.rpartition(" ")
    last_line = question["instruction"].rstrip().splitlines()[-1]
    labels = last_line.removeprefix("Answer format: ").split("/")
    if label not in labels:
        raise ValueError(f"the answer {right!r} is not offered in {last_line!r}")
    return [right, *(f"{beginning} {other}" for other in labels if other != label)]


def as_prompt(question):
    return question["instruction"] + "\n"


def write_training_set(folder, path):
    """Write the training questions of all tasks as train.py reads them; return the path."""
    lines = []
    for task in TASKS:
        for question in read_questions(folder, task, "train"):
            row = {"prompt": as_prompt(question), "answer": question["output"]}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


@torch.no_grad()
def score(model, tokenizer, questions, device):
    """Return the log-probability of the right answer among those offered, for each question."""
    texts = []  # (prompt, answer) tokens
    for question in questions:
        prompt = tokenizer.encode_ordinary(as_prompt(question))
        for answer in offered_answers(question):
            texts.append((prompt, tokenizer.encode_ordinary(answer)))
    log_probabilities = []
    for i in range(0, len(texts), BATCH):
        log_probabilities += answer_log_probabilities(model, texts[i : i + BATCH], device)

    result = []
    start = 0
    for question in questions:
        end = start + len(offered_answers(question))
        offered = torch.tensor(log_probabilities[start:end])
        result.append(round(offered.log_softmax(0)[0].item(), 4))
        start = end
    return result


def answer_log_probabilities(model, texts, device):
    """Return the sum of the log-probabilities of each answer's tokens after its prompt."""
    length = max(len(prompt) + len(answer) for prompt, answer in texts)
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    is_answer = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        is_answer[row, len(prompt) : end] = True
    tokens = tokens.to(device)
    logits = model(tokens)[:, :-1]  # (N, T - 1, V): of the next tokens
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # (N, T - 1)
    return (-losses * is_answer[:, 1:].to(device)).sum(1).tolist()


# -- runs ------------------------------------------------------------------------------------------


def run_finetune(job):
    """Fine-tune one variant and return its run; job: {variant, flags, init, questions, lr, seed}.

    The value is the mean score of the test questions; in the sweep it is the held-out loss.
    """
    keys = ("flags", "init", "questions", "lr", "seed")
    code = code_hashes("train", "experiments.lora_finetune", *plugin_modules(job["flags"]))
    key = [*(job[name] for name in keys), code]
    return harness.disk_cache(harness.CACHE, key, lambda: finetune(job))


def finetune(job):
    start_time = time.perf_counter()
    is_sweep = job["seed"] == harness.SWEEP_SEED
    with tempfile.TemporaryDirectory(dir="out", prefix="study-") as folder:
        data = write_training_set(job["questions"], Path(folder, "train.jsonl"))
        flags = f"{job['flags']} --lr {job['lr']:g} --seed {job['seed']}".split()
        out = Path(folder, "run")
        with redirect_stdout(io.StringIO()):
            result = train.main(
                [*flags, "--init", job["init"], "--data", str(data), "--out", str(out)]
            )
        if result["signal"]:
            raise KeyboardInterrupt(result["signal"])
        run = {"seed": job["seed"], "lr": job["lr"], "value": result["val_loss"]}
        run["val_loss"] = result["val_loss"]
        if not is_sweep:
            device = distributed.pick_device("")
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model, tokenizer = train.load_model(out, device, dtype, is_trusted=True)
            run["scores"] = {}
            for task in TASKS:
                questions = read_questions(job["questions"], task, "test")[:QUESTIONS_PER_TASK]
                run["scores"][task] = score(model, tokenizer, questions, device)
            run["value"] = statistics.mean(all_scores(run))
    return {**run, "seconds": time.perf_counter() - start_time}


def all_scores(run):
    return [score for scores in run["scores"].values() for score in scores]


# -- the study -------------------------------------------------------------------------------------


def crossed_ci95(values):
    """Return the mean of values (seeds, questions) and the half width of its 95% interval.

    Both the seeds and the questions are samples. In the two-way random-effects model the variance
    of the mean is (MS_seeds + MS_questions - MS_residual) / (seeds questions), with mean squares
    MS; Student's t has the degrees of freedom of the seeds, which are the fewer.
    """
    values = np.asarray(values)
    n_seeds, n_questions = values.shape
    mean = values.mean()
    by_seed = values.mean(1, keepdims=True)
    by_question = values.mean(0, keepdims=True)
    ms_seeds = n_questions * ((by_seed - mean) ** 2).sum() / (n_seeds - 1)
    ms_questions = n_seeds * ((by_question - mean) ** 2).sum() / (n_questions - 1)
    residual = values - by_seed - by_question + mean
    ms_residual = (residual**2).sum() / ((n_seeds - 1) * (n_questions - 1))
    variance = max(ms_seeds, ms_questions, ms_seeds + ms_questions - ms_residual) / values.size
    return float(mean), float(harness.T_95[n_seeds - 2] * variance**0.5)


def run(init, questions, out, deadline=float("inf")):
    """Run the study, or a part of it until the deadline; write its JSON and figure."""
    if not init or not questions:
        raise ValueError(
            "--full needs --init HuggingFaceTB/SmolLM2-135M or its folder, and --questions DIR"
        )
    for task in TASKS:
        for split in ("train", "test"):
            read_questions(questions, task, split)
    Path("out").mkdir(exist_ok=True)

    def make_job(variant, lr, seed):
        flags = f"{FLAGS} {VARIANTS[variant]}"
        job = {"variant": variant, "flags": flags, "init": init, "questions": questions}
        return {**job, "lr": lr, "seed": seed}

    try:
        seeds = dict.fromkeys(VARIANTS, SEEDS)
        swept, runs = harness.sweep_and_run(run_finetune, make_job, seeds, RATES, deadline=deadline)
    except TimeoutError as pause:
        print(pause)
        return None

    record = {"question": "Which optimizer makes LoRA adapters answer questions best?"}
    record.update(metric=METRIC, baseline=BASELINE, seconds=0.0, variants={}, differences={})
    baseline = np.array([all_scores(run) for run in runs[BASELINE]])
    for name in VARIANTS:
        settings = f"{FLAGS} {VARIANTS[name]}"
        record["variants"][name] = {"settings": settings, "sweep": swept[name], "runs": runs[name]}
        record["seconds"] += sum(run["seconds"] for run in swept[name] + runs[name])
        if name != BASELINE:
            difference = np.array([all_scores(run) for run in runs[name]]) - baseline
            mean, half_width = crossed_ci95(difference)
            entry = {"mean": mean, "half_width_95": half_width, "n": len(difference)}
            record["differences"][name] = {**entry, "questions": difference.shape[1]}
    save_json(Path(out) / "lora_rite-gpu.json", record, "experiments.lora_finetune")
    harness.save_figure(harness.plot_differences(record), Path(out) / "lora_rite-gpu.png")
    harness.print_differences(record)
    return record
