"""experiments/lora_finetune.py: scores of answers, and intervals over seeds and questions."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from experiments import harness, lora_finetune, runner
from support import lora
from support.tokenizer import get_tokenizer
from tests.common import parse_flags
from tests.test_lora_adapters import adapted

QUESTION = {
    "instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2/answer3",
    "output": "it is answer2",
}


def test_offered_answers_begin_with_the_right_one():
    offered = lora_finetune.offered_answers(QUESTION)
    assert offered == ["it is answer2", "it is answer1", "it is answer3"]
    with pytest.raises(ValueError, match="not offered"):
        lora_finetune.offered_answers({**QUESTION, "output": "it is answer9"})


def test_score_is_the_share_of_the_right_answer(monkeypatch):
    model = train.GPT(train.GPTConfig(vocab_size=256, n_layer=1, n_embd=16, n_head=1))
    train.init_weights(model, 0)
    tokenizer = get_tokenizer("byte")
    other = {**QUESTION, "output": "it is answer1"}
    scores = lora_finetune.score(model, tokenizer, [QUESTION, other], torch.device("cpu"))

    # the log-probability of each offered answer, normalized over the three
    sums = {}
    for answer in lora_finetune.offered_answers(QUESTION):
        prompt = tokenizer.encode_ordinary(lora_finetune.as_prompt(QUESTION))
        tokens = torch.tensor([[*prompt, *tokenizer.encode_ordinary(answer)]], dtype=torch.long)
        targets = tokens[:, 1:].clone()
        targets[:, : len(prompt) - 1] = -1  # only the answer counts
        sums[answer] = -model(tokens[:, :-1], targets, 1)
    normalized = torch.stack(list(sums.values())).log_softmax(0)
    assert scores == pytest.approx(normalized[:2].tolist(), abs=2e-4)

    # however many are scored at a time, and whatever they are padded to
    longer = {**QUESTION, "instruction": f"Once more. {QUESTION['instruction']}"}
    answers = {"instruction": "Answer format: a/quite long", "output": "a"}
    questions = [QUESTION, other, longer, answers]
    alone = [lora_finetune.score(model, tokenizer, [q], torch.device("cpu"))[0] for q in questions]
    for batch in (1, 5, 64):
        monkeypatch.setattr(lora_finetune, "SCORE_BATCH", batch)
        scores = lora_finetune.score(model, tokenizer, questions, torch.device("cpu"))
        assert scores == pytest.approx(alone, abs=2e-4)
    assert len(set(scores)) == 4


def test_interval_covers_seeds_and_questions():
    """In simulations with effects of both, about 95% of the intervals hold the true mean, 0."""
    rng = np.random.default_rng(0)
    for seed_std, question_std in ((1.0, 0.0), (0.1, 3.0), (0.5, 5.0)):
        covered = 0
        for _ in range(400):
            values = rng.normal(size=(8, 100))  # 8 seeds, 100 questions
            values += seed_std * rng.normal(size=(8, 1))
            values += question_std * rng.normal(size=(1, 100))
            mean, half_width = lora_finetune.crossed_ci95(values)
            covered += abs(mean) <= half_width
        assert covered / 400 > 0.92


def test_interval_of_four_values():
    """Two seeds (rows) and two questions, or three seeds, by hand."""
    # effects of seeds are +-1, of questions +-3, and the residuals are +-0.5
    values = np.array([[1 + 3 + 0.5, 1 - 3 - 0.5], [-1 + 3 - 0.5, -1 - 3 + 0.5]])
    mean, half_width = lora_finetune.crossed_ci95(values + 7)
    assert mean == pytest.approx(7)
    variance = (4 * 1**2 + 4 * 3**2 - 4 * 0.5**2) / 4  # each with one degree of freedom
    assert half_width == pytest.approx(12.706 * variance**0.5)

    # with no effect of seeds, the variance is at least that of the questions
    values = np.array([[3.0 + 1, -3.0 - 1], [3.0 - 1, -3.0 + 1]])
    _, half_width = lora_finetune.crossed_ci95(values)
    assert half_width == pytest.approx(12.706 * (4 * 3**2 / 4) ** 0.5)

    # without an effect of questions, it is Student's interval of the seeds
    values = np.repeat([[1.0], [2.0], [6.0]], 5, axis=1)
    expected = harness.mean_ci95([1.0, 2.0, 6.0])
    assert lora_finetune.crossed_ci95(values) == pytest.approx(expected)


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """Two questions per task and split; the instruction says which they are."""
    monkeypatch.chdir(tmp_path)
    for task in lora_finetune.TASKS:
        Path("questions", task).mkdir(parents=True)
        for split in ("train", "test"):
            rows = []
            for i in range(2):
                instruction = f"{task} {split} {i}\nAnswer format: yes/no\n\n"
                rows.append({"instruction": instruction, "output": "it is yes"})
            Path("questions", task, f"{split}.json").write_text(json.dumps(rows))
    return "questions"


def test_training_and_test_questions_are_kept_apart(questions, monkeypatch):
    path = lora_finetune.write_training_set(questions, Path("train.jsonl"))
    rows = [json.loads(line) for line in path.read_text().split("\n")]
    expected = []
    for task in lora_finetune.TASKS:
        for i in range(2):
            prompt = f"{task} train {i}\nAnswer format: yes/no\n\n\n"
            expected.append({"prompt": prompt, "answer": "it is yes"})
    assert rows == expected

    def score(model, tokenizer, asked, device):
        return [question["instruction"].splitlines()[0] for question in asked]

    def load_model(folder, *args, **options):
        assert folder == "run"
        return None, None

    monkeypatch.setattr(train, "load_model", load_model)
    monkeypatch.setattr(lora_finetune, "score", score)
    scores = lora_finetune.score_all_tasks("run", questions)
    assert scores == {task: [f"{task} test 0", f"{task} test 1"] for task in lora_finetune.TASKS}
    monkeypatch.setattr(lora_finetune, "QUESTIONS_PER_TASK", 1)
    scores = lora_finetune.score_all_tasks("run", questions)
    assert scores == {task: [f"{task} test 0"] for task in lora_finetune.TASKS}


def test_the_sweep_does_not_see_the_test_questions(questions, monkeypatch):
    def train_main(argv):
        flags = dict(zip(argv[::2], argv[1::2]))
        assert flags["--init"] == "base"
        assert flags["--lr"] == "0.003"
        launched.append((flags["--seed"], Path(flags["--out"])))
        return {"signal": signal, "val_loss": 2.5}

    def score_all_tasks(out, folder):
        assert ("1", out) == launched[-1]
        assert folder == questions
        return scores

    Path("out").mkdir()
    signal = 0
    launched = []  # (seed, folder of the run)
    monkeypatch.setattr(train, "main", train_main)
    scores = {"ARC-Easy": [-1.0, -2.0], "boolq": [-6.0]}
    monkeypatch.setattr(lora_finetune, "score_all_tasks", score_all_tasks)
    job = {"variant": "AdamW", "flags": "--steps 3", "init": "base", "questions": questions}
    for seed in harness.SWEEP_SEEDS:
        run = lora_finetune.finetune({**job, "lr": 3e-3, "seed": seed})
        assert launched[-1][0] == str(seed)
        assert run.pop("seconds") > 0
        assert run == {"seed": seed, "lr": 3e-3, "value": 2.5, "val_loss": 2.5}
    run = lora_finetune.finetune({**job, "lr": 3e-3, "seed": 1})
    assert run["value"] == -3.0
    assert run["scores"] == scores
    signal = 15
    with pytest.raises(KeyboardInterrupt):
        lora_finetune.finetune({**job, "lr": 3e-3, "seed": 1})
    assert list(Path("out").iterdir()) == []


def test_a_cached_run_is_that_of_its_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = []
    hashes = {"laser.py": "0"}
    monkeypatch.setattr(lora_finetune, "finetune", lambda job: jobs.append(job) or len(jobs))
    monkeypatch.setattr(lora_finetune, "code_hashes", lambda *modules: {**hashes, "of": modules})
    job = {"flags": "--optim sonew --steps 2", "init": "a", "questions": "b", "lr": 1e-3, "seed": 1}
    assert lora_finetune.run_finetune({**job, "variant": "SONew"}) == 1
    assert lora_finetune.run_finetune({**job, "variant": "another name"}) == 1
    assert lora_finetune.run_finetune({**job, "variant": "SONew"}, look_only=True) == 1
    assert lora_finetune.run_finetune({**job, "seed": 9}, look_only=True) is None
    changes = {
        "flags": "--optim sonew --steps 3",
        "init": "c",
        "questions": "c",
        "lr": 1e-4,
        "seed": 2,
    }
    for i, (name, value) in enumerate(changes.items()):
        assert lora_finetune.run_finetune({**job, name: value}) == 2 + i, name
    hashes["laser.py"] = "1"
    assert lora_finetune.run_finetune(job) == 7


def test_variants_differ_only_in_the_optimizer_that_they_name():
    """LoRA+ is LoRAPlus, LoRA-RITE LoRARITE; all have the same betas and no weight decay."""
    groups = lora.adapter_groups(adapted())
    for name, flags in lora_finetune.VARIANTS.items():
        _, run, _ = parse_flags(f"{lora_finetune.FLAGS} {flags}")
        assert run.weight_decay == 0, name
        optimizer = train.make_optimizer(groups, run)
        assert type(optimizer).__name__ == name.replace("+", "Plus").replace("-", "")
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, 0.999), name


def test_differences_are_to_the_baseline(questions, monkeypatch):
    """LoRA-RITE is better by 0.5, with another sign it would be worse; all six seeds count."""
    jobs = []

    def run_finetune(job):
        jobs.append(job)
        is_ours = "lora_rite" in job["flags"].partition("--optim")[2]
        scores = [-2.0 + 0.5 * is_ours + 0.001 * job["seed"]] * 3
        run = {"seed": job["seed"], "lr": job["lr"], "value": abs(job["lr"] - 1e-3), "seconds": 1}
        return {**run, "scores": {task: scores for task in lora_finetune.TASKS}}

    monkeypatch.setattr(lora_finetune, "run_finetune", run_finetune)
    monkeypatch.setattr(runner, "parallel", lambda f, jobs, **_: [f(job) for job in jobs])
    record = lora_finetune.run("base", questions, Path("."))
    assert {job["seed"] for job in jobs} == {harness.SWEEP_SEEDS[0], *lora_finetune.SEEDS}
    difference = record["differences"]["LoRA-RITE"]
    assert difference["mean"] == pytest.approx(0.5)
    assert difference["n"] == len(lora_finetune.SEEDS)
    assert difference["questions"] == 3 * len(lora_finetune.TASKS)
    assert record["differences"]["LoRA+"]["mean"] == pytest.approx(0)
    assert record["seconds"] == len(jobs)

    # a mistake in a file is found before training, time that runs out is no error
    Path("questions/boolq/test.json").write_text('[{"instruction": "a/b", "output": "c"}]')
    with pytest.raises(ValueError, match="boolq/test.json is not a list of questions"):
        lora_finetune.run("base", questions, Path("."))
    Path("questions/boolq/test.json").write_text('[{"instruction": "a/b", "output": "a"}]')

    def out_of_time(*args, **options):
        raise TimeoutError("1 of 8 runs are done")

    monkeypatch.setattr(runner, "parallel", out_of_time)
    assert lora_finetune.run("base", questions, Path(".")) is None


def test_a_study_whose_runs_are_cached_needs_no_time(questions, monkeypatch):
    def run_finetune(job, look_only=False):
        assert look_only
        run = {"seed": job["seed"], "lr": job["lr"], "value": abs(job["lr"] - 1e-3), "seconds": 1}
        return {**run, "scores": {task: [-1.0 / job["seed"]] for task in lora_finetune.TASKS}}

    monkeypatch.setattr(lora_finetune, "run_finetune", run_finetune)
    record = lora_finetune.run("base", questions, Path("."), deadline=0.0)
    assert record["differences"]["LoRA-RITE"]["n"] == len(lora_finetune.SEEDS)


def test_study_at_tiny_size(tiny, monkeypatch):
    train.main([*tiny, "--steps", "2", "--out", "base", "--block-size", "128"])
    for task in lora_finetune.TASKS:
        Path("questions", task).mkdir(parents=True)
        for split in ("train", "test"):
            rows = []
            for i in range(9):
                rows.append({**QUESTION, "instruction": f"{i} {QUESTION['instruction']}"})
            Path("questions", task, f"{split}.json").write_text(json.dumps(rows))
    flags = "--adapter lora_rite:rank=2 --steps 2 --batch-size 2 --eval-batches 1 --sample 0"
    monkeypatch.setattr(lora_finetune, "FLAGS", f"{flags} --device cpu")
    monkeypatch.setattr(lora_finetune, "SEEDS", (1, 2))
    monkeypatch.setattr(harness, "best_rate", lambda runs: runs[2]["lr"])
    monkeypatch.setattr(runner, "parallel", lambda f, jobs, **_: [f(job) for job in jobs])
    record = lora_finetune.run("base", "questions", "results")
    assert set(record["differences"]) == {"LoRA+", "LoRA-RITE"}
    saved = json.loads(Path("results/lora_rite-gpu.json").read_text())
    run = saved["variants"]["AdamW"]["runs"][0]
    for task in lora_finetune.TASKS:
        assert len(run["scores"][task]) == 9
    assert run["value"] == pytest.approx(statistics.mean(lora_finetune.all_scores(run)))
    with pytest.raises(ValueError, match="not a list of questions"):
        lora_finetune.run("base", "nowhere", "results")
