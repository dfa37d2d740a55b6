"""The query-only sandbox: streams, models, variants, the study at tiny size."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
import ttt_context
from experiments import bench_ttt, ttt_cost
from experiments import ttt_context as experiment
from experiments import ttt_sandbox as sandbox
from tests.common import DEVICE, refused, small_gpt

SMALL = copy.deepcopy(experiment.RECIPE)
SMALL |= {"names": 16, "values": 4, "questions": 12}
TINY = copy.deepcopy(experiment.RECIPE)
TINY |= {"shape": {"n_layer": 2, "n_head": 2, "head_dim": 16, "n_embd": 32}, "names": 32}
TINY |= {"train": {"steps": 2, "batch": 4, "tokens": 48, "lr": 1e-2, "examples": 8}}
TINY |= {"seeds": [1, 2], "lengths": [60, 120], "questions": 3, "steps": 2, "span": 16}
TINY |= {"lrs": {"trained queries": [1e-3, 1e-2], "fitted temperature": [1e-1]}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def long_read(T=40, **shape):
    """Return a GPT in float64, T token ids, and the frozen (k, v) pairs of all layers."""
    model = small_gpt(torch.float64, **shape).requires_grad_(False)
    ids = torch.randint(64, (T,), generator=generator(3))
    return model, ids, ttt_context.prefill(model, ids)[1]


# --------------------------------------------------------------------------------------------------
# Contexts


def column_a_is_the_key(records):
    """Whether equal names in the first column always come with equal values."""
    names = {a for a, _, _ in records}
    named_values = {(a, value) for a, _, value in records}
    return len(named_values) == len(names)


@pytest.mark.parametrize("key_column", [1, 2])
@pytest.mark.parametrize("task", sandbox.TASKS)
def test_the_key_of_a_record_decides_its_value(task, key_column):
    ids, is_predictable, questions = sandbox.make_context(
        task, 600, SMALL, generator(key_column), 12, key_column
    )
    records = ids.view(-1, 3).tolist()
    assert len(records) == 200
    assert len(questions.tokens) == 12

    def key_of(a, b):
        if task == "records":
            return a, b
        return a if key_column == 1 else b

    # the first record with a key shows its value; in later ones the value is predictable
    values = {}
    for record, is_known in zip(records, is_predictable.view(-1, 3).tolist()):
        a, b, value = record
        assert a < 16 <= b < 32 <= value < 36
        key = key_of(a, b)
        assert is_known == [False, False, key in values]
        assert values.setdefault(key, value) == value
    assert len(set(values.values())) > 1
    assert is_predictable.any()

    # the needles of a question are the values of all records with its key
    all_tokens, all_answers, all_needles = (t.tolist() for t in questions)
    for tokens, answer, needles in zip(all_tokens, all_answers, all_needles):
        key = key_of(*tokens)
        assert answer == values[key]
        has_key = [key_of(a, b) == key for a, b, _ in records]
        assert needles[2::3] == has_key
        assert sum(needles) == sum(has_key), "only values are needles"
        if task == "records":
            assert sum(has_key) == 1
    if task == "columns":
        asked = [[*tokens, answer] for tokens, answer in zip(all_tokens, all_answers)]
        assert any(record not in records for record in asked), "new combinations of names"


def test_examples_end_in_answered_questions():
    n_context = 81  # of 97 tokens; five questions of three tokens and one more token follow
    for i in range(20):
        ids, is_predictable = sandbox.make_example(sandbox.TASKS[i % 2], 96, SMALL, generator(i))
        assert len(ids) == len(is_predictable) == 97
        is_answer = is_predictable[n_context:96].view(5, 3).tolist()
        assert is_answer == [[False, False, True]] * 5
        records = ids[:n_context].view(-1, 3).tolist()
        for question in ids[n_context:96].view(5, 3).tolist():
            if sandbox.TASKS[i % 2] == "records":
                assert question in records
            else:  # a record with one of the two names has this value
                a, b, value = question
                assert any((a == r[0] or b == r[1]) and value == r[2] for r in records)

    key_columns = set()
    for i in range(9):
        ids, _ = sandbox.make_example("columns", 96, SMALL, generator(i))
        key_columns.add(column_a_is_the_key(ids[:n_context].view(-1, 3).tolist()))
    assert key_columns == {True, False}, "either column may be the key"


def test_permuted_tokens_stay_equal_where_they_were():
    examples = [sandbox.make_example("records", 96, SMALL, generator(i))[0] for i in range(3)]
    ids = torch.stack(examples)
    permuted = sandbox.permute_tokens(ids, SMALL, generator())
    for before, after in zip(ids, permuted):
        assert not torch.equal(before, after)
        assert torch.equal(before[:, None] == before, after[:, None] == after)
    for low, high in ((0, 16), (16, 32), (32, 36)):  # the tokens of each column
        in_column = (ids >= low) & (ids < high)
        assert in_column.any()
        assert torch.equal(in_column, (permuted >= low) & (permuted < high))
    permuted = sandbox.permute_tokens(ids[:1].repeat(2, 1), SMALL, generator())
    assert not torch.equal(permuted[0], permuted[1]), "different names in each sequence"


# --------------------------------------------------------------------------------------------------
# Models and questions


def test_shift_looks_back():
    q = torch.randn(3, 4, 5, 8, generator=generator())
    k, v = torch.randn(2, 3, 2, 14, 8, generator=generator())
    y = sandbox.shift(q, k, v)  # the 5 queries are the last of 14 positions
    for h in range(4):
        assert torch.equal(y[:, h], v[:, h // 2, 9 - h - 1 : 14 - h - 1])
    start = sandbox.shift(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert torch.equal(start, torch.zeros(3, 4, 1, 8)), "before the start"


@pytest.mark.parametrize("norm", sandbox.NORMS)
def test_models_alternate_and_know_no_positions(norm):
    model = sandbox.build_model(TINY, norm, 1)
    functions = [layer.self_attn.function for layer in model.layers]
    assert functions == [sandbox.shift, train.softmax_attention]
    assert isinstance(model.layers[1].self_attn.q_norm, train.RMSNorm) == (norm == "QK-norm")
    attention = model.layers[1].self_attn
    x = torch.randn(1, 7, 32, generator=generator())
    cos, sin = train.rope_angles(3, 7, 16, 1e4, "cpu")
    y = attention(x, cos, sin)
    assert torch.equal(y, attention(x, torch.ones_like(cos), torch.zeros_like(sin)))

    # one more key costs 4 FLOPs per channel of the one layer that attends
    one_more_key = ttt_cost.flops_of_tokens(model, 11, 1) - ttt_cost.flops_of_tokens(model, 10, 1)
    assert one_more_key == 4 * 2 * 16

    same_seed = sandbox.build_model(TINY, norm, 1)
    other_seed = sandbox.build_model(TINY, norm, 2)
    weight = model.embed_tokens.weight
    assert torch.equal(weight, same_seed.embed_tokens.weight)
    assert not torch.equal(weight, other_seed.embed_tokens.weight)


def test_training_lowers_the_loss():
    recipe = copy.deepcopy(TINY)
    recipe["train"] |= {"steps": 60, "batch": 16, "examples": 64}
    ids, predictable = sandbox.make_example("records", 48, recipe, generator(77))
    targets = ids[1:].masked_fill(~predictable[1:], -1)[None]
    losses = []
    for steps in (1, 60):
        recipe["train"]["steps"] = steps
        model = sandbox.train_model(recipe, "QK-norm", 1)
        losses.append(model(ids[None, :-1], targets).item())
        assert not model.training
    assert losses[1] < losses[0] - 0.2, losses


class Recorder(torch.nn.Module):
    """Records what it is trained on and how far each step moves its weight."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.targets = []
        self.values = []

    def forward(self, ids, targets):
        self.targets.append(targets)
        self.values.append(self.w.item())
        return self.w


def test_only_predictable_values_count_at_first_and_the_rate_ends_at_zero(monkeypatch):
    model = Recorder()
    monkeypatch.setattr(sandbox, "build_model", lambda *args: model)
    recipe = copy.deepcopy(TINY)
    recipe["train"]["steps"] = 40
    sandbox.train_model(recipe, "QK-norm", 1)
    shares = [(targets >= 0).float().mean().item() for targets in model.targets]
    assert all(0.1 < share < 0.4 for share in shares[:20]), "a third of the tokens are values"
    assert shares[20:] == [1.0] * 20
    values = model.targets[0][model.targets[0] >= 0]
    assert (values >= 2 * recipe["names"]).all(), "nothing but values is predictable"
    moved = [a - b for a, b in zip(model.values, model.values[1:])]
    assert max(moved) == pytest.approx(1e-2, rel=0.2) and moved.index(max(moved)) < 10
    assert moved[0] < 1e-3 and moved[-1] < 1e-3


def test_contexts_are_of_their_seed_and_alternate_in_pairs():
    contexts = set()
    for seed in (0, 1):
        for i in range(4):
            ids = experiment.make_context("columns", SMALL, 300, seed, i)[0]
            contexts.add(tuple(ids.tolist()))
            records = ids.view(-1, 3).tolist()
            assert column_a_is_the_key(records) == (i < 2), "in the first two of four"
    assert len(contexts) == 8


def test_questions_are_answered_as_by_a_plain_forward():
    model, ids, kv = long_read(n_kv_head=2, qk_norm=True)
    tokens = torch.tensor([[7, 9], [1, 2]])
    needles = torch.arange(40) % 3 == torch.tensor([[0], [1]])
    questions = sandbox.Questions(tokens, None, needles)
    logits, on_needles = experiment.ask(model, kv, questions)
    for pair, row in zip(tokens, logits):
        assert torch.allclose(row, model(torch.cat([ids, pair])[None])[0, -1], atol=1e-10)
    assert on_needles.shape == (2, 8)

    # the best head of all layers, on average over the questions
    best = on_needles.mean(0).argmax()
    answers = logits.argmax(-1)
    scores = experiment.score(model, kv, questions._replace(answers=answers))
    p = on_needles[:, best]
    assert scores["accuracy"] == 1
    assert abs(scores["needle_attention"] - p.mean()) < 1e-12
    assert abs(scores["margin"] - (p / (1 - p)).log().mean()) < 1e-12
    half_wrong = answers + torch.tensor([0, 1])
    scores = experiment.score(model, kv, questions._replace(answers=half_wrong))
    assert scores["accuracy"] == 0.5


def test_attention_to_needles_is_that_of_the_softmax():
    k, v = torch.randn(2, 2, 9, 8, generator=generator(), dtype=torch.float64)
    q = torch.randn(3, 4, 5, 8, generator=generator(), dtype=torch.float64)
    new_k, new_v = torch.randn(2, 3, 2, 5, 8, generator=generator(), dtype=torch.float64)
    needles = torch.rand(3, 9, generator=generator()) < 0.3
    config = train.GPTConfig(n_head=4, n_kv_head=2, n_embd=32)
    module = train.Attention(config, "softmax")
    cache = experiment.QuestionCache(k, v, needles)
    y = cache.attend(module, [q, new_k, new_v])
    all_k = torch.cat([k.expand(3, -1, -1, -1), new_k], dim=2)  # (3, 2, 14, 8)
    all_v = torch.cat([v.expand(3, -1, -1, -1), new_v], dim=2)
    assert torch.allclose(y, train.softmax_attention(q, all_k, all_v), atol=1e-12)

    # with 1 as the value of needles and 0 elsewhere, attention returns the probability on needles
    is_needle = F.pad(needles.double(), (0, 5))[:, None, :, None].expand(-1, 2, -1, 8)
    on_needles = train.softmax_attention(q, all_k, is_needle)[:, :, -1, 0]  # (3, 4)
    assert torch.allclose(cache.on_needles, on_needles, atol=1e-12)

    module.function = sandbox.shift
    cache = experiment.QuestionCache(k, v, needles)
    y = cache.attend(module, [q, new_k, new_v])
    assert torch.equal(y, sandbox.shift(q, all_k, all_v))
    assert cache.on_needles is None


def test_votes_of_many_samples(monkeypatch):
    """Of 0.6, 0.3 and 0.1 the first wins most of the time with many samples, 60% with one."""
    p = torch.tensor([0.0, 0.6, 0.3, 0.1]).repeat(400, 1)
    monkeypatch.setattr(experiment, "ask", lambda *args: (p.log(), None))
    questions = sandbox.Questions(None, torch.ones(400, dtype=torch.int64), None)
    found = [experiment.vote(None, None, questions, n, 0)["accuracy"] for n in (1, 9, 301)]
    assert 0.5 < found[0] < 0.7 < found[1] < 0.97 and found[2] > 0.99


# --------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("norm", [False, True])
def test_temperatures_and_what_a_norm_takes_away(norm):
    model, ids, kv = long_read(qk_norm=norm)
    needles = torch.zeros(1, 40, dtype=torch.bool)
    questions = sandbox.Questions(torch.tensor([[7, 9, 3]]), None, needles)

    def logits():
        return experiment.ask(model, kv, questions)[0]

    plain = logits()
    with experiment.temperatures(model) as logs:
        assert torch.allclose(logits(), plain, atol=1e-12)
        assert [log.shape for log in logs] == [(4, 1)] * 2
        steps = ttt_context.train_queries(
            model, logs, kv, ids, torch.arange(20), steps=3, n=16, lr=0.1
        )
        assert len(list(steps)) == 3
        assert all(log.abs().max() > 0 for log in logs)
        assert all(p.grad is None for p in model.parameters())
    with experiment.temperatures(model, 3.0):
        sharp = logits()
    assert (sharp - plain).abs().max() > 0.1

    # logits times 3: without a norm the same as three times W_Q, behind a norm that does nothing
    with ttt_context.trainable_queries(model) as weights, torch.no_grad():
        for w in weights:
            w.mul_(3)
        louder = logits()
    expected, atol = (plain, 1e-4) if norm else (sharp, 1e-10)
    assert torch.allclose(louder, expected, atol=atol)
    assert torch.equal(logits(), plain) and not model.layers[0].self_attn.q_norm._forward_hooks


@pytest.mark.parametrize("variant", ["trained queries", "fitted temperature"])
def test_fitted_values_are_put_back_and_taken_away(variant):
    model, ids, kv = long_read(T=60)
    recipe = {**TINY, "span": 16, "steps": 3}
    values = experiment.fit(model, variant, kv, ids, recipe, 1e-2)
    with experiment.TRAINED[variant](model) as weights:
        starts = torch.arange(60 - 16)
        list(ttt_context.train_queries(model, weights, kv, ids, starts, steps=3, n=16, lr=1e-2))
        assert all(map(torch.equal, values, weights))
    with experiment.fitted(model, variant, values):
        starts = torch.tensor([20])
        inside = ttt_context.span_loss(model, kv, ids, starts, 16)
    assert inside != ttt_context.span_loss(model, kv, ids, starts, 16)


def test_variants_get_what_they_are_called(monkeypatch):
    """Which context's queries, which factor, how many samples."""
    calls = {"fit": [], "score": [], "vote": [], "factors": []}
    recipe = {**TINY, "contexts": 4, "train": {**TINY["train"], "tokens": 60}}
    model = sandbox.build_model(recipe, "no QK-norm", 1)
    temperatures = experiment.temperatures

    def fit(model, variant, kv, ids, recipe, lr):
        calls["fit"].append((variant, lr))
        return [(variant, tuple(ids.tolist()))]

    class fitted:
        current = None

        def __init__(self, model, variant, values):
            self.values = values

        def __enter__(self):
            fitted.current = self.values

        def __exit__(self, *_):
            fitted.current = None

    def score(model, kv, questions):
        calls["score"].append((fitted.current, questions))
        return {"accuracy": 0.5, "mass": 0.5, "margin": 0.0}

    def vote(model, kv, questions, n_samples, seed):
        calls["vote"].append(n_samples)
        return {"accuracy": 0.5}

    def spy(model, factor=1.0):
        calls["factors"].append(factor)
        return temperatures(model, factor)

    for name, function in (("fit", fit), ("fitted", fitted), ("score", score), ("vote", vote)):
        monkeypatch.setattr(experiment, name, function)
    monkeypatch.setattr(experiment, "temperatures", spy)
    lrs = {"trained queries": 1e-3, "fitted temperature": 1e-1}
    monkeypatch.setattr(experiment, "choose_rates", lambda *args: lrs)
    found = experiment.compare_variants(model, "columns", 120, recipe, 1)
    assert set(found) == {*experiment.COLORS, "log T"}
    assert calls["fit"] == [item for item in lrs.items() for _ in range(4)]
    assert all(len(scores["accuracy"]) == 4 for scores in found.values())
    assert calls["factors"] == [math.log(120) / math.log(60)] * 4
    n_samples = ttt_cost.thinking_tokens(model, 120, ttt_cost.flops_of_spans(model, 2 * 16, 120))
    assert calls["vote"] == [n_samples] * 4 and n_samples > 10

    ids = [experiment.make_context("columns", recipe, 120, 1, c)[0].tolist() for c in range(4)]
    for c in range(4):
        owners = []
        for values, questions in calls["score"][6 * c : 6 * c + 6]:
            expected = experiment.make_context("columns", recipe, 120, 1, c)[1]
            assert torch.equal(questions.tokens, expected.tokens), "its own questions"
            owners.append(values and (values[0][0], ids.index(list(values[0][1]))))
        queries = "trained queries"
        expected = [None, None, ("fitted temperature", c)]
        assert owners == expected + [(queries, c), (queries, c ^ 1), (queries, c ^ 2)]
    found = experiment.compare_variants(model, "records", 60, recipe, 1)
    assert "other-kind queries" not in found
    found = experiment.compare_variants(model, "records", 30, recipe, 1)
    assert calls["factors"][-1] == 1.0, "short contexts are not flattened"


def test_rates_are_chosen_on_contexts_that_are_not_reported(monkeypatch):
    seen = []
    original = experiment.make_context

    def spy(task, recipe, T, seed, c):
        seen.append((seed, c))
        return original(task, recipe, T, seed, c)

    model = sandbox.build_model(TINY, "no QK-norm", 1)
    accuracies = {1e-3: 0.5, 1e-2: 0.75, 1e-1: 0.1}
    tried = []

    def fit(model, variant, kv, ids, recipe, lr):
        tried.append(lr)
        return [torch.zeros(1)] * 0

    monkeypatch.setattr(experiment, "make_context", spy)
    monkeypatch.setattr(experiment, "fit", fit)
    monkeypatch.setattr(experiment, "score", lambda *args: {"accuracy": accuracies[tried[-1]]})
    chosen = experiment.choose_rates(model, "columns", 60, TINY)
    assert chosen == {"trained queries": 1e-2, "fitted temperature": 1e-1}
    assert seen == [(0, 0), (0, 2)], "seed 0, one context of each kind"
    accuracies[1e-3] = 0.75
    assert experiment.choose_rates(model, "columns", 60, TINY)["trained queries"] == 1e-3, "a tie"

    def better_on_the_first(*args):
        is_second = seen[-1] == (0, 2)
        return {"accuracy": {1e-3: 1.0 - is_second, 1e-2: 0.4}.get(tried[-1], 0.0)}

    monkeypatch.setattr(experiment, "score", better_on_the_first)
    chosen = experiment.choose_rates(model, "columns", 60, TINY)
    assert chosen["trained queries"] == 1e-3, "both contexts count"


# --------------------------------------------------------------------------------------------------
# The study


def test_differences_are_paired_by_seed():
    def scores(accuracy, lr=None):
        return {"accuracy": accuracy, "lr": lr}

    results = []
    for ours, theirs in (([0.5, 1.0], [0.5, 0.5]), ([0.2, 0.4], [0.1, 0.1])):
        setting = "records, QK-norm, 96"
        found = {f"{setting}: trained queries": scores(ours, 1e-3)}
        results.append({**found, f"{setting}: fitted temperature": scores(theirs, 0.1)})
    jobs = [({}, seed, "QK-norm") for seed in (0, 1)]
    variants, differences = experiment.summarize(jobs, results)
    assert list(differences) == ["records, QK-norm, 96: trained queries"]
    (difference,) = differences.values()
    assert difference["mean"] == pytest.approx((0.25 + 0.2) / 2) and difference["n"] == 2
    half_width = 12.706 * 0.05 / 2  # Student's t, one degree of freedom
    assert difference["half_width_95"] == pytest.approx(half_width, rel=1e-3)
    entry = variants["records, QK-norm, 96: trained queries"]
    assert [run["value"] for run in entry["runs"]] == pytest.approx([0.75, 0.3])
    assert entry["sweep"] == {"seed 0": 1e-3, "seed 1": 1e-3}


def test_study(tiny, monkeypatch, capsys):
    def one_after_the_other(function, jobs, **options):
        return [pickle.loads(pickle.dumps(function))(job) for job in jobs]

    monkeypatch.setattr(experiment.harness, "parallel", one_after_the_other)
    monkeypatch.setattr(experiment, "RECIPE", {**TINY, "steps": 1})
    result = ttt_context.main(["--experiment", "--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {
        "ttt_context-cpu.json",
        "ttt_context-cpu.png",
    }
    saved = json.loads(Path("shown/ttt_context-cpu.json").read_text())
    assert saved["variants"] == result["variants"] and saved["seconds"] > 0
    for key in ("command", "commit", "hardware", "versions", "question", "metric", "baseline"):
        assert key in saved
    assert len(saved["variants"]) == 2 * 2 * (6 + 7) and len(saved["differences"]) == 2 * 2 * (
        5 + 6
    )
    for name, entry in saved["variants"].items():
        assert [run["seed"] for run in entry["runs"]] == [1, 2], name
        for run in entry["runs"]:
            assert len(run["accuracy"]) == 4
            assert run["value"] == pytest.approx(sum(run["accuracy"]) / 4)
    assert "trained queries" in capsys.readouterr().out and not Path(experiment.CACHE).exists()
    refused(["--full"], "--full", main=experiment.main)


# --------------------------------------------------------------------------------------------------
# The benchmark


def test_bench(tmp_path, monkeypatch):
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "vocab_size": 64}
    monkeypatch.setitem(train.PRESETS, "tiny", {**shape, "qk_norm": True})
    monkeypatch.setattr(bench_ttt, "TOKENS_TIMED", 5)
    flags = ["--model", "tiny", "--device", DEVICE, "--out", str(tmp_path)]
    result = bench_ttt.main([*flags, "--context", "300", "--steps", "2", "--span", "16"])
    saved = json.loads((tmp_path / "ttt_context-bench.json").read_text())
    assert {key: saved[key] for key in result} == result and saved["command"]
    model = bench_ttt.random_model("tiny", torch.device("cpu"), torch.float32)
    assert result["flops"] == ttt_cost.flops_of_spans(model, 2 * 16, 300)
    rule, exact = (result["thinking"][name] for name in ("2 N k", "equal FLOPs"))
    assert rule["tokens"] == 2 * 2 * 16 and 30 < exact["tokens"] < 64
    for row in (rule, exact):
        assert row["seconds"] == pytest.approx(row["tokens"] * result["token_ms"] / 1e3)
        assert row["over_steps"] == pytest.approx(row["seconds"] / result["steps_seconds"])
    refused([*flags, "--context", "9", "--span", "9"], "--context", main=bench_ttt.main)
