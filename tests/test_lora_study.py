"""experiments/lora_rite.py: the optimizers that it compares, and the whole study at tiny size."""

import json

import pytest
import torch

import lora_rite
import train
from experiments import lora_rite as study
from support import lora
from tests.common import small_gpt
from tests.test_lora_adapters import adapted


def test_lora_plus_is_adamw_with_a_faster_B():
    groups = lora.adapter_groups(adapted())
    for make, ratio in ((study.adamw, 1.0), (study.lora_plus, study.LORA_PLUS_RATIO)):
        before = [p.detach().clone() for p in groups[0]["params"]]
        optimizer = make(groups)
        for p in groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()

        # Adam's first step is as long as the learning rate, which of B is `ratio` times as high
        for i, (p, old) in enumerate(zip(groups[0]["params"], before)):
            length = study.LR * (ratio if i % 2 else 1.0)
            assert torch.allclose(old - p, torch.full_like(p, length), rtol=1e-3)


def test_factorizations_have_the_same_product_and_are_of_their_seed(monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *args, **options: (small_gpt(), None))
    drawn = []  # for each seed and layer, the tensors that depend on the seed
    for seed in (1, 2):
        first, second = study.two_factorizations("base", seed)
        assert study.drift(first, second) < 1e-13
        for one, two in zip(lora.adapters(first).values(), lora.adapters(second).values()):
            R = torch.linalg.pinv(one.lora_B) @ two.lora_B
            assert torch.linalg.cond(R).item() == pytest.approx(study.CONDITION)
            drawn.append((R, one.lora_A, one.lora_B))
    half = len(drawn) // 2
    for tensors, of_other_seed in zip(drawn[:half], drawn[half:], strict=True):
        for tensor, other in zip(tensors, of_other_seed):
            assert not torch.allclose(tensor, other)


def test_the_study_of_the_drift(tmp_path, monkeypatch, capsys):
    shape = "--n-layer 1 --n-embd 32 --n-head 2 --block-size 64 --batch-size 2 --steps 3"
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 50)
    base = f"{shape} --data {tmp_path}/text.txt --device cpu --sample 0"
    monkeypatch.setattr(study, "BASE", base)
    monkeypatch.setattr(study, "STEPS", 3)
    monkeypatch.setattr(study, "SEEDS", (1, 2))
    get_batch = train.get_batch
    drawn = []  # (seed, step) of each batch

    def recording_get_batch(text, config, block_size, step, *args):
        drawn.append((config.seed, step))
        return get_batch(text, config, block_size, step, *args)

    monkeypatch.setattr(train, "get_batch", recording_get_batch)
    record = lora_rite.main(["--out", str(tmp_path / "results")])
    assert capsys.readouterr().out.startswith(record["question"]), "of a folder that is gone"
    of_a_variant = [(seed, step) for seed in (1, 2) for step in range(3)]
    assert drawn[-len(study.VARIANTS) * 6 :] == of_a_variant * len(study.VARIANTS)
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["lora_rite-cpu.json", "lora_rite-cpu.png"]
    saved = json.loads((tmp_path / "results/lora_rite-cpu.json").read_text())
    keys = "command commit hardware versions source code seconds question metric baseline variants"
    assert saved.keys() == {*keys.split(), "differences"}
    assert saved["differences"].keys() == set(study.VARIANTS) - {"AdamW"}

    invariant = {"LoRA-RITE", "LoRA-RITE, its own clip"}
    for name, variant in record["variants"].items():
        for run in variant["runs"]:
            assert len(run["distances"]) == 4
            assert run["distances"][0] < 1e-13
            drift = run["distances"][-1]
            assert drift == pytest.approx(10 ** run["value"])
            if name in invariant:
                assert drift < 1e-11, name
            else:
                assert drift > 1e-11, name
        first_seed, second_seed = variant["runs"]
        assert first_seed["distances"] != second_seed["distances"]

    # clipping changes the losses
    losses = {}
    for name, variant in record["variants"].items():
        losses[name] = [run["losses"] for run in variant["runs"]]
    for name in ("AdamW", "LoRA+", "LoRA-RITE"):
        assert losses[name] != losses[f"{name}, gradients clipped"]
    assert losses["LoRA-RITE"] != losses["LoRA-RITE, its own clip"]


def test_an_interrupted_base_model_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "main", lambda argv: {"signal": 2})
    with pytest.raises(KeyboardInterrupt):
        study.prepare(tmp_path)
