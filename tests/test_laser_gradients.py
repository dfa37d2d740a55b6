"""experiments/laser_gradients.py at a tiny size."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

import train
from experiments import laser_gradients, runner
from tests.common import is_equal, read_held_out, record_calls, small_gpt


@pytest.mark.parametrize("variant", laser_gradients.VARIANTS)
def test_gradients_are_those_at_the_logits(variant):
    """The study's gradients equal those that autograd gives where the logits are a tensor."""
    torch.manual_seed(0)
    model = small_gpt(n_layer=1, n_head=1, attn=variant.lower())
    x, y = torch.randint(64, (2, 1, 6))
    logits_gradient = torch.zeros(6, 6)

    def save_gradient(gradient):
        logits_gradient.copy_(gradient[0, 0])

    def attention_with_probe(q, k, v):
        scores = q @ k.mT * q.shape[3] ** -0.5
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
        scores.register_hook(save_gradient)
        p = scores.softmax(-1)
        return (p @ v.exp()).log() if variant == "LASER" else p @ v

    measured = laser_gradients.gradients_by_layer(model, variant, x, y)
    model.layers[0].self_attn.function = attention_with_probe
    model(x, y).backward()
    # the loss is a mean over 6 tokens; the study reports gradients of a single token's loss
    expected = logits_gradient.abs().sum(-1).mean().item() * 6
    assert measured == pytest.approx([expected], rel=1e-4)


def test_study_at_tiny_size(tiny, monkeypatch):
    monkeypatch.setattr(laser_gradients, "DATA", "text.txt")
    flags = "--n-layer 2 --n-embd 32 --n-head 2 --block-size 16 --batch-size 4"
    flags += " --steps 8 --eval-batches 1 --sample 0 --device cpu"
    monkeypatch.setattr(laser_gradients, "FLAGS", flags)
    monkeypatch.setattr(laser_gradients, "STOPS", (1, 2, 4))
    monkeypatch.setattr(laser_gradients, "SEEDS", (1, 2))
    monkeypatch.setattr(runner, "parallel", lambda f, jobs, **_: [f(job) for job in jobs])
    launches = record_calls(monkeypatch, train, "main")
    probes = record_calls(monkeypatch, laser_gradients, "gradients_by_layer")
    load_model = train.load_model
    steps = []  # of each checkpoint that is probed

    def recording_load_model(folder, device):
        steps.append(train.load_checkpoint(folder)["step"])
        return load_model(folder, device)

    monkeypatch.setattr(train, "load_model", recording_load_model)
    record = laser_gradients.run("results")
    saved = json.loads(Path("results/laser-gradients.json").read_text())
    assert saved["differences"] == record["differences"]

    # each variant is trained with both seeds, and probed at the stops, on the same text
    started = []
    for launch in launches:
        flags = dict(zip(launch["argv"][::2], launch["argv"][1::2]))
        if "--resume" not in flags:
            started.append((flags["--attn"], flags["--seed"]))
    assert started == [("softmax", "1"), ("softmax", "2"), ("laser", "1"), ("laser", "2")]
    assert steps == [1, 2, 4] * 4
    held_out = read_held_out("text.txt", laser_gradients.SEQUENCES, 16)
    assert len(probes) == 12
    for probe in probes:
        assert is_equal((probe["x"].cpu(), probe["y"].cpu()), held_out)

    # the value is that at the last stop, and the difference is LASER's less that of softmax
    means = {}
    for variant in laser_gradients.VARIANTS:
        runs = saved["variants"][variant]["runs"]
        assert [run["seed"] for run in runs] == [1, 2]
        for run in runs:
            assert [step for step, _ in run["curve"]] == [1, 2, 4]
            assert [len(layers) for _, layers in run["curve"]] == [2, 2, 2]
            last = run["curve"][-1][1]
            assert run["value"] == pytest.approx(math.log10(sum(last) / 2))
        means[variant] = statistics.mean(run["value"] for run in runs)
    difference = saved["differences"]["LASER"]
    assert difference["mean"] == pytest.approx(means["LASER"] - means["softmax"])
