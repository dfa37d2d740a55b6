"""experiments/lora_finetune.py: scores of answers, and intervals over seeds and questions."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from experiments import harness, lora_finetune, runner
from support.tokenizer import get_tokenizer

QUESTION = {
    "instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2/answer3",
    "output": "it is answer2",
}


def test_offered_answers_begin_with_the_right_one():
    offered = lora_finetune.offered_answers(QUESTION)
    assert offered == ["it is answer2", "it is answer1", "it is answer3"]
    with pytest.raises(ValueError, match="not offered"):
        lora_finetune.offered_answers({**QUESTION, "output": "it is answer9"})


def test_score_is_the_share_of_the_right_answer(tiny):
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
