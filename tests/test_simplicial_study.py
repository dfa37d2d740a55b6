"""The study of 2-simplicial attention: its tasks, Match3 by hand, and all of it at a tiny size."""

import itertools
import json
from pathlib import Path

import torch

import simplicial
from experiments import harness, match3, runner
from experiments import simplicial as study
from tests.common import is_equal, refused


def test_match3_by_hand(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for M, T in (16, 6), (64, 12), (997, 30):
        x = torch.randint(M, (32, T), generator=generator)
        truth = match3.match3(x, M)
        assert 0 < truth.float().mean() < 1
        assert torch.equal(match3.match3_by_hand(x, M), truth)
        assert torch.equal(match3.match3_by_hand(x, M, simplicial.reference), truth)

        # the hardest case: each sum misses a multiple of M by one
        near_misses = torch.full((1, T), pow(3, -1, M))
        assert not match3.match3_by_hand(near_misses, M).any()
    expected = [False, True, True, True]  # from position 1 on, 2 + 2 + 2 = 6 is a multiple of 6
    assert match3.match3(torch.tensor([[1, 2, 3, 9]]), 6)[0].tolist() == expected
    x = torch.randint(9, (4, 7), generator=generator)
    matches = match3.match3(x, 9)
    for b, i in itertools.product(range(4), range(7)):
        past = x[b, : i + 1].tolist()
        sums = [past[-1] + m + n for m, n in itertools.product(past, past)]
        assert matches[b, i] == any(total % 9 == 0 for total in sums)

    # weights that are always wrong
    monkeypatch.setattr(match3, "match3_by_hand", lambda x, M: ~match3.match3(x, M))
    assert set(match3.score_by_hand().values()) == {0.0}


def test_tasks_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    x, y = study.match3_batch(256, generator)
    assert x.shape == (256, 7, 1)
    assert y.float().mean() == 0.5
    numbers = x[..., 0]
    assert torch.equal(match3.match3(numbers, 20)[:, -1].long(), y)

    # where there is no match, some sum with the last number misses it by 1
    last = numbers[:, -1:, None]
    sums = numbers[:, :-1, None] + numbers[:, None, :-1] + last  # (256, 6, 6)
    has_near_miss = (sums % 20 == 1).flatten(1).any(1)
    assert has_near_miss[y == 0].all()

    # the answer is the second table's value at the first table's value
    x, y = study.composition_batch(64, generator, M=5)
    for tokens, answer in zip(x.tolist(), y.tolist()):
        tables = {(table, key): value for table, key, value in tokens[:-1]}
        question, asked_key, _ = tokens[-1]
        assert len(tables) == 10
        assert question == 2
        assert answer == tables[1, tables[0, asked_key]]


def test_ablations_are_2_simplicial_attention_with_less():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 2, 3, 7, 8, generator=generator, dtype=torch.float64)
    assert torch.allclose(study.gate(*inputs), simplicial.reference(*inputs, w1=7, w2=1))

    # the logit of a pair of keys is the sum of their logits, and its value the product
    q, k, v, k2, v2 = inputs
    logits = (q @ k.mT)[..., :, None] + (q @ k2.mT)[..., None, :]  # (B, H, T, T, T)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    is_past = causal[:, :, None] & causal[:, None, :]  # (T, T, T)
    logits = (logits * 8**-0.5).masked_fill(~is_past, -torch.inf)
    p = logits.flatten(-2).softmax(-1).view_as(logits)
    expected = torch.einsum("bhijl, bhjd, bhld -> bhid", p, v, v2)
    assert torch.allclose(study.product(*inputs), expected)


def test_chance_levels():
    """Guessing scores 25%; naming the commonest value of f scores 53% without composing."""
    levels = study.chance_levels()
    assert levels["Match3"]["uniform"] == 0.5
    tokens, answers = study.match3_batch(1000, torch.Generator().manual_seed(5))
    n_right = 0
    for x, answer in zip(tokens[..., 0].tolist(), answers.tolist()):
        *others, last = x
        sums = [2 * other + last for other in others] + [other + 2 * last for other in x]
        n_right += any(total % 20 == 0 for total in sums) == answer
    assert abs(levels["Match3"]["pairs"] - n_right / 1000) < 0.03
    assert levels["composition"] == {"uniform": 0.25, "commonest value": 0.53125}
    x, y = study.composition_batch(4000, torch.Generator().manual_seed(0))
    is_f = x[:, :-1, 0] == 1
    values = x[:, :-1, 2][is_f].view(4000, 4)
    assert abs((values.mode(1).values == y).float().mean() - 0.531) < 0.02
    assert abs((y == 0).float().mean() - 0.25) < 0.02


def test_study(tmp_path, capsys, monkeypatch):
    assert len(set(study.SEEDS)) == 6
    monkeypatch.setattr(study, "SEEDS", (1, 2))
    monkeypatch.setattr(study, "RATES", (3e-3,))
    monkeypatch.setattr(runner, "parallel", lambda f, jobs, **_: [f(job) for job in jobs])
    for name, task in study.TASKS.items():
        monkeypatch.setitem(study.TASKS, name, task._replace(steps=2))
    out = str(tmp_path / "results")
    result = simplicial.main(["--out", out])
    assert {p.name for p in Path(out).iterdir()} == {"simplicial-cpu.json", "simplicial-cpu.png"}
    record = json.loads(Path(out, "simplicial-cpu.json").read_text())
    for key in ("command", "commit", "hardware", "versions", "seconds", "question", "metric"):
        assert key in record
    for task in study.TASKS:
        parameters = set()
        values = {}  # variant: the results of its two runs
        for name in study.VARIANTS:
            runs = record["variants"][f"{task}: {name}"]["runs"]
            values[name] = [run["value"] for run in runs]
            for run in runs:
                parameters.add(run["parameters"])
                assert 0 < run["seconds"] < record["seconds"]
        assert len(parameters) == 1, "variants differ in their number of parameters"

        baseline = values.pop(record["baseline"])
        for name, (first, second) in values.items():
            first -= baseline[0]
            second -= baseline[1]
            half_width = 12.706 * abs(first - second) / 2  # Student's t, one degree of freedom
            difference = record["differences"][f"{task}: {name}"]
            assert difference["n"] == 2
            assert abs(difference["mean"] - (first + second) / 2) < 1e-12
            assert abs(difference["half_width_95"] - half_width) < 1e-9
    assert result["match3_by_hand"] == dict.fromkeys(result["match3_by_hand"], 1.0)
    assert "commonest value" in capsys.readouterr().out
    refused(["--full"], "needs a GPU", main=simplicial.main)


def test_runs_of_a_seed_see_the_same_examples(monkeypatch):
    task = study.TASKS["composition"]
    monkeypatch.setitem(study.TASKS, "composition", task._replace(steps=4))
    job = {"task": "composition", "variant": "softmax", "lr": 3e-3, "seed": 3}
    a, b = (study.train_task(job) for _ in range(2))
    assert a["value"] == b["value"]
    assert a["seed"] == 3
    assert a["lr"] == 3e-3
    assert 0 <= a["value"] <= 1, "an accuracy"
    swept = study.train_task({**job, "seed": harness.SWEEP_SEEDS[1]})
    assert swept["value"] > 1, "a loss, of which that of guessing is log 4"

    def batches_of(variant, seed):
        """Return the batches of a run: those of its two steps, and that of its evaluation."""
        batches = []

        def recording_make_batch(B, generator):
            x, y = task.make_batch(B, generator)
            batches.append(x)
            return x, y

        recording_task = task._replace(make_batch=recording_make_batch, steps=2)
        monkeypatch.setitem(study.TASKS, "composition", recording_task)
        study.train_task({**job, "variant": variant, "seed": seed})
        return batches

    first, second, test = batches_of("softmax", 3)
    assert not torch.equal(first, second)
    assert is_equal(batches_of("gate", 3), [first, second, test])

    # another seed has other training examples; a sweep has other test examples, too
    other_first, _, other_test = batches_of("softmax", 4)
    assert not torch.equal(other_first, first)
    assert torch.equal(other_test, test)
    sweep_first, _, sweep_test = batches_of("softmax", harness.SWEEP_SEEDS[0])
    assert not torch.equal(sweep_first, first)
    assert not torch.equal(sweep_test, test)
