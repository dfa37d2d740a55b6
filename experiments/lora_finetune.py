"""LoRA-RITE on a real model: which optimizer makes adapters answer questions best?

SmolLM2-135M learns multiple-choice questions with LoRA adapters of rank 16. The metric is the mean
log-probability of the right answer among the answers offered, on held-out questions. Confidence
intervals cover both the seeds and the questions (crossed random effects).

The folder --questions holds a TASK/train.json and a TASK/test.json for each task, in the format of
LLM-Adapters (arXiv 2304.01933). Each file is a list of questions such as

    {"instruction": "Is ice cold?\\nAnswer format: true/false", "output": "the answer is true"}

The last line of an instruction lists the labels of the answers. The output is the right answer, and
its last word is the label.
"""

import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from experiments import harness, runner
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
SCORE_BATCH = 64  # answers scored at a time
RUNS_PER_GPU = 4  # at a time; the model is small, and much of a run is compiling and scoring


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
    """Return all answers that a question offers, written in full; the right one is the first."""
    right = question["output"]
    beginning, _, right_label = right.rpartition(" ")
    last_line = question["instruction"].rstrip().splitlines()[-1]
    labels = last_line.removeprefix("Answer format: ").split("/")
    if right_label not in labels:
        raise ValueError(f"the answer {right!r} is not offered in {last_line!r}")
    answers = [right]
    for label in labels:
        if label != right_label:
            answers.append(f"{beginning} {label}")
    return answers


def as_prompt(question):
    return question["instruction"] + "\n"


def write_training_set(folder, path):
    """Write the training questions of all tasks as a .jsonl file for train.py; return its path."""
    lines = []
    for task in TASKS:
        for question in read_questions(folder, task, "train"):
            row = {"prompt": as_prompt(question), "answer": question["output"]}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


# -- scores ----------------------------------------------------------------------------------------


@torch.no_grad()
def score(model, tokenizer, questions, device):
    """Return the log-probability of the right answer among those offered, for each question."""
    texts = []  # (prompt tokens, answer tokens) of all answers to all questions
    for question in questions:
        prompt = tokenizer.encode_ordinary(as_prompt(question))
        for answer in offered_answers(question):
            texts.append((prompt, tokenizer.encode_ordinary(answer)))
    log_probabilities = []
    for i in range(0, len(texts), SCORE_BATCH):
        log_probabilities += answer_log_probabilities(model, texts[i : i + SCORE_BATCH], device)

    # normalize over the answers to the same question
    scores = []
    start = 0
    for question in questions:
        end = start + len(offered_answers(question))
        normalized = torch.tensor(log_probabilities[start:end]).log_softmax(0)
        scores.append(round(normalized[0].item(), 4))  # the right answer is the first
        start = end
    return scores


def answer_log_probabilities(model, texts, device):
    """Return log p(answer | prompt) for each (prompt tokens, answer tokens) in texts."""
    # pad to equal length: prompt, answer, zeros
    length = max(len(prompt) + len(answer) for prompt, answer in texts)
    tokens = torch.zeros(len(texts), length, dtype=torch.long)  # (N, T)
    is_answer = torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        is_answer[row, len(prompt) : end] = True

    # the logits at a position predict the next token
    tokens = tokens.to(device)
    is_answer = is_answer.to(device)
    logits = model(tokens)[:, :-1].transpose(1, 2)  # (N, V, T - 1)
    losses = F.cross_entropy(logits, tokens[:, 1:], reduction="none")  # (N, T - 1)
    return (-losses * is_answer[:, 1:]).sum(1).tolist()


# -- runs ------------------------------------------------------------------------------------------


def run_finetune(job, look_only=False):
    """Fine-tune one variant, or return its cached run; see `finetune`.

    look_only: return None if it is not cached.
    """
    keys = ("flags", "init", "questions", "lr", "seed")
    code = code_hashes("train", "experiments.lora_finetune", *plugin_modules(job["flags"]))
    key = [*(job[name] for name in keys), code]
    return runner.disk_cache(runner.CACHE, key, None if look_only else partial(finetune, job))


def finetune(job):
    """Fine-tune one variant and return its run.

    job: {variant, flags, init, questions, lr, seed}. The value of the run is the mean score of the
    test questions. In the sweep, which must not see these, it is the held-out loss.
    """
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="out", prefix="study-") as folder:
        data = write_training_set(job["questions"], Path(folder, "train.jsonl"))
        out = Path(folder, "run")
        flags = f"{job['flags']} --lr {job['lr']:g} --seed {job['seed']}".split()
        paths = ["--init", job["init"], "--data", str(data), "--out", str(out)]
        with redirect_stdout(io.StringIO()):
            result = train.main([*flags, *paths])
        if result["signal"]:
            raise KeyboardInterrupt(result["signal"])

        val_loss = result["val_loss"]
        run = {"seed": job["seed"], "lr": job["lr"], "value": val_loss, "val_loss": val_loss}
        if job["seed"] not in harness.SWEEP_SEEDS:
            run["scores"] = score_all_tasks(out, job["questions"])
            run["value"] = statistics.mean(all_scores(run))
    run["seconds"] = time.perf_counter() - start_time
    return run


def score_all_tasks(out, folder):
    """Return {task: scores} of the model saved in `out`, on the test questions in `folder`."""
    device = distributed.pick_device("")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = train.load_model(out, device, dtype, is_trusted=True)
    scores = {}
    for task in TASKS:
        questions = read_questions(folder, task, "test")[:QUESTIONS_PER_TASK]
        scores[task] = score(model, tokenizer, questions, device)
    return scores


def all_scores(run):
    """Return the scores of a run as one list, task after task."""
    return [score for scores in run["scores"].values() for score in scores]


# -- the study -------------------------------------------------------------------------------------


def crossed_ci95(values):
    """Return the mean of values (seeds, questions) and the half width of its 95% interval.

    Both the seeds and the questions are random samples. In the two-way random-effects model the
    variance of the mean is

        (MS_seeds + MS_questions - MS_residual) / (n_seeds n_questions)

    with mean squares MS, as in an analysis of variance. The quantile of Student's t is that for the
    degrees of freedom of the seeds, which are fewer than those of the questions.
    """
    values = np.asarray(values)
    n_seeds, n_questions = values.shape
    mean = values.mean()
    by_seed = values.mean(1, keepdims=True)  # (seeds, 1)
    by_question = values.mean(0, keepdims=True)  # (1, questions)

    # mean squares
    ms_seeds = n_questions * ((by_seed - mean) ** 2).sum() / (n_seeds - 1)
    ms_questions = n_seeds * ((by_question - mean) ** 2).sum() / (n_questions - 1)
    residual = values - by_seed - by_question + mean
    ms_residual = (residual**2).sum() / ((n_seeds - 1) * (n_questions - 1))

    # MS_residual may be too large by chance; the variance is at least that of either effect
    variance = max(ms_seeds, ms_questions, ms_seeds + ms_questions - ms_residual) / values.size
    return float(mean), float(harness.T_95[n_seeds - 2] * variance**0.5)


def run(init, questions, out, deadline=float("inf")):
    """Run the study, write its JSON and figure, and return the record.

    At the deadline, a value of time.monotonic(), stop and return None; the next call continues.
    """
    if not init or not questions:
        raise ValueError(
            "--full needs --init HuggingFaceTB/SmolLM2-135M or its folder, and --questions DIR"
        )
    for task in TASKS:  # find mistakes now, not after training
        for split in ("train", "test"):
            read_questions(questions, task, split)
    Path("out").mkdir(exist_ok=True)

    # train: a sweep of the learning rate, then all seeds at the best
    def make_job(variant, lr, seed):
        flags = f"{FLAGS} {VARIANTS[variant]}"
        job = {"variant": variant, "flags": flags, "init": init, "questions": questions}
        return {**job, "lr": lr, "seed": seed}

    try:
        seeds = dict.fromkeys(VARIANTS, SEEDS)
        look = partial(run_finetune, look_only=True)
        options = {"deadline": deadline, "look": look, "per_gpu": RUNS_PER_GPU}
        swept, runs = harness.sweep_and_run(run_finetune, make_job, seeds, RATES, **options)
    except TimeoutError as pause:
        print(pause)
        return None

    # compare with the baseline
    record = {"question": "Which optimizer makes LoRA adapters answer questions best?"}
    record.update(metric=METRIC, baseline=BASELINE, seconds=0.0, variants={}, differences={})
    scores = {}  # variant: (seeds, questions)
    for name in VARIANTS:
        scores[name] = np.array([all_scores(run) for run in runs[name]])
        settings = f"{FLAGS} {VARIANTS[name]}"
        record["variants"][name] = {"settings": settings, "sweep": swept[name], "runs": runs[name]}
        record["seconds"] += sum(run["seconds"] for run in swept[name] + runs[name])
    n_seeds, n_questions = scores[BASELINE].shape
    for name in VARIANTS:
        if name != BASELINE:
            mean, half_width = crossed_ci95(scores[name] - scores[BASELINE])
            difference = {"mean": mean, "half_width_95": half_width, "n": n_seeds}
            record["differences"][name] = {**difference, "questions": n_questions}

    save_json(Path(out) / "lora_rite-gpu.json", record, "experiments.lora_finetune")
    harness.save_figure(harness.plot_differences(record), Path(out) / "lora_rite-gpu.png")
    harness.print_differences(record)
    return record
