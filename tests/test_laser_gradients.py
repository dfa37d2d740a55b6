"""experiments/laser_gradients.py at a tiny size."""

import json
from pathlib import Path

import pytest
import torch

import train
from experiments import laser_gradients, runner


def test_gradients_are_those_at_the_logits():
    """The study's gradients equal those that autograd gives where the logits are a tensor."""
    torch.manual_seed(0)
    config = train.GPTConfig(vocab_size=32, n_layer=1, n_embd=16, n_head=1)
    model = train.GPT(config)
    train.init_weights(model, 0)
    x, y = torch.randint(32, (2, 1, 6))
    logits_gradient = torch.zeros(6, 6)

    def save_gradient(gradient):
        logits_gradient.copy_(gradient[0, 0])

    def attention_with_probe(q, k, v):
        scores = q @ k.mT * q.shape[3] ** -0.5
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
        scores.register_hook(save_gradient)
        return scores.softmax(-1) @ v

    measured = laser_gradients.gradients_by_layer(model, "softmax", x, y)
    model.layers[0].self_attn.function = attention_with_probe
    model(x, y).backward()
    # the loss is a mean over 6 tokens; the study reports gradients of a single token's loss
    expected = logits_gradient.abs().sum(-1).mean().item() * 6
    assert measured == pytest.approx([expected], rel=1e-4)


def test_study_at_tiny_size(tiny, monkeypatch):
    monkeypatch.setattr(laser_gradients, "DATA", "text.txt")
    flags = "--n-layer 2 --n-embd 32 --n-head 2 --block-size 16 --batch-size 4"
    flags += " --steps 4 --eval-batches 1 --sample 0 --device cpu"
    monkeypatch.setattr(laser_gradients, "FLAGS", flags)
    monkeypatch.setattr(laser_gradients, "STOPS", (2, 4))
    monkeypatch.setattr(laser_gradients, "SEEDS", (1, 2))
    monkeypatch.setattr(runner, "parallel", lambda f, jobs, **_: [f(job) for job in jobs])
    record = laser_gradients.run("results")
    saved = json.loads(Path("results/laser-gradients.json").read_text())
    assert saved["differences"] == record["differences"]
    curve = saved["variants"]["LASER"]["runs"][0]["curve"]
    assert [step for step, _ in curve] == [2, 4]
    assert [len(layers) for _, layers in curve] == [2, 2]
