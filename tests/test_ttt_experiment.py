"""The query-only experiment: questions, variants, the study at tiny size; the benchmark."""

import itertools
import json
import math
import pickle
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
import ttt_context
from experiments import bench_ttt, harness, provenance, runner, ttt_cost, ttt_needles
from experiments import ttt_context as study
from experiments import ttt_sandbox as sandbox
from experiments import ttt_variants as experiment
from support.tokenizer import ByteTokenizer
from tests.common import DEVICE, is_equal, refused, small_gpt
from tests.test_ttt_context import long_read

TINY = {
    **study.SMALL,
    "shape": {"n_layer": 2, "n_head": 2, "head_dim": 16, "n_embd": 32},
    "names": 32,
    "train": {"steps": 2, "batch": 4, "tokens": 48, "lr": 1e-2, "examples": 8},
    "seeds": [1, 2],
    "lengths": [60, 120],
    "questions": 3,
    "steps": 2,
    "span": 16,
    "lrs": {"trained queries": [1e-3, 1e-2], "fitted temperature": [1e-1]},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- contexts and questions ------------------------------------------------------------------------


def test_contexts_are_of_their_seed_and_alternate_in_pairs():
    contexts = set()
    for seed in (0, 1):
        for i in range(4):
            ids = experiment.make_context("columns", TINY, 300, seed, i).ids
            contexts.add(tuple(ids.tolist()))
            names, _, values = ids.view(-1, 3).T.tolist()
            pairs = set(zip(names, values))
            a_is_the_key = len(pairs) == len(set(names))  # each name has only one value
            assert a_is_the_key == (i < 2), "i = 0 and 1 should have column a as key"
    assert len(contexts) == 8, "each seed and number should have its own context"

    # so should each length; of these three, two have equally many records
    begins = set()
    for seed, T in ((0, 300), (0, 301), (1, 300)):
        begins.add(tuple(experiment.make_context("columns", TINY, T, seed, 0).ids.tolist()))
    assert len(begins) == 3


def test_questions_are_answered_as_by_a_plain_forward():
    model, ids, caches = long_read(T=40, room=0, n_kv_head=2, qk_norm=True)
    questions = torch.tensor([[7, 9], [1, 2]])
    needles = torch.arange(40) % 3 == torch.tensor([[0], [1]])  # (2, 40)
    context = sandbox.Context(ids, None, questions, None, needles)
    logits, needle_attention = experiment.ask(model, caches, context)
    for i in range(2):
        text = torch.cat([ids, questions[i]])
        assert torch.allclose(logits[i], model(text[None])[0, -1], atol=1e-10)
    assert needle_attention.shape == (2, 8)

    # the best head of all layers, on average over the questions
    best_head = needle_attention.mean(0).argmax()
    p = needle_attention[:, best_head]
    answers = logits.argmax(-1)
    scores = experiment.score(model, caches, context._replace(answers=answers))
    assert scores["accuracy"] == 1
    assert abs(scores["needle_attention"] - p.mean()) < 1e-12
    right = logits.softmax(-1).gather(1, answers[:, None])[:, 0]
    assert abs(scores["margin"] - (right / (1 - right)).log().mean()) < 1e-10
    half_wrong = answers + torch.tensor([0, 1])
    scores = experiment.score(model, caches, context._replace(answers=half_wrong))
    assert scores["accuracy"] == 0.5


def test_attention_to_needles_is_that_of_the_softmax():
    k, v = torch.randn(2, 2, 9, 8, generator=generator(), dtype=torch.float64)
    q = torch.randn(3, 4, 5, 8, generator=generator(), dtype=torch.float64)
    new_k, new_v = torch.randn(2, 3, 2, 5, 8, generator=generator(), dtype=torch.float64)
    needles = torch.rand(3, 9, generator=generator()) < 0.3
    config = train.GPTConfig(n_head=4, n_kv_head=2, n_embd=32)
    module = train.Attention(config, "softmax")
    cache = experiment.QuestionCache(k[None], v[None], needles)
    y = cache.attend(module, [q, new_k, new_v])
    all_k = torch.cat([k.expand(3, -1, -1, -1), new_k], dim=2)  # (3, 2, 14, 8)
    all_v = torch.cat([v.expand(3, -1, -1, -1), new_v], dim=2)
    assert torch.allclose(y, train.softmax_attention(q, all_k, all_v), atol=1e-12)

    # with 1 as the value of needles and 0 elsewhere, attention returns the probability on needles
    is_needle = F.pad(needles.double(), (0, 5))[:, None, :, None].expand(-1, 2, -1, 8)
    on_needles = train.softmax_attention(q, all_k, is_needle)[:, :, -1, 0]  # (3, 4)
    assert torch.allclose(cache.needle_attention, on_needles, atol=1e-12)

    module.function = sandbox.shift
    cache = experiment.QuestionCache(k[None], v[None], needles)
    y = cache.attend(module, [q[:, :2], new_k, new_v])
    assert torch.equal(y, sandbox.shift(q[:, :2], all_k, all_v))
    assert cache.needle_attention is None


def test_votes_of_many_samples(monkeypatch):
    """A token of probability 0.6 wins 60% of the votes of one sample, nearly all votes of many."""
    p = torch.tensor([0.0, 0.6, 0.3, 0.1]).repeat(400, 1)  # 400 questions, 4 tokens
    answers = torch.ones(400, dtype=torch.int64)  # token 1 is right
    context = sandbox.Context(None, None, None, answers, None)
    monkeypatch.setattr(experiment, "ask", lambda *args: (p.log(), None))  # needs no model

    def vote(n_samples, seed=0):
        return experiment.vote(None, None, context, n_samples, seed)

    assert 0.5 < vote(1)["accuracy"] < 0.7
    assert 0.7 < vote(9)["accuracy"] < 0.97
    assert vote(301)["accuracy"] > 0.99
    assert vote(301)["margin"] == pytest.approx(math.log(0.6 / 0.4), abs=0.02)
    assert vote(9) == vote(9)
    assert vote(9) != vote(9, seed=1)
    context = context._replace(answers=torch.zeros_like(answers))  # never sampled
    assert vote(9)["margin"] == pytest.approx(math.log(0.5 / 9.5))


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_temperature_scales_logits_and_a_norm_hides_the_scale_of_queries(norm):
    model, ids, caches = long_read(T=40, room=0, qk_norm=norm)
    needles = torch.zeros(1, 40, dtype=torch.bool)
    context = sandbox.Context(ids, None, torch.tensor([[7, 9, 3]]), None, needles)

    def logits():
        return experiment.ask(model, caches, context)[0]

    plain = logits()
    with experiment.temperatures(model) as log_factors:
        assert torch.allclose(logits(), plain, atol=1e-12)
        assert [log_factor.shape for log_factor in log_factors] == [(4, 1)] * 2
        arguments = (model, log_factors, caches, ids, torch.arange(20))
        losses = list(ttt_context.train_queries(*arguments, steps=3, n=16, lr=0.1))
        assert len(losses) == 3
        for log_factor in log_factors:
            assert log_factor.abs().max() > 0
        for p in model.parameters():
            assert p.grad is None
    with experiment.temperatures(model, 3.0):
        sharp = logits()
    assert (sharp - plain).abs().max() > 0.1

    # a factor that would overflow
    with experiment.temperatures(model, math.exp(20)):
        sharpest = logits()
    with experiment.temperatures(model) as log_factors:
        for log_factor in log_factors:
            log_factor.data.fill_(1000.0)
        assert torch.allclose(logits(), sharpest) and sharpest.isfinite().all()

    # three times W_Q is the same as logits times 3, but a norm after W_Q undoes it
    with ttt_context.trainable_queries(model) as weights, torch.no_grad():
        for w in weights:
            w.mul_(3)
        louder = logits()
    if norm:
        assert torch.allclose(louder, plain, atol=1e-4)
    else:
        assert torch.allclose(louder, sharp, atol=1e-10)
    assert torch.equal(logits(), plain)
    assert not model.layers[0].self_attn.q_norm._forward_hooks


@pytest.mark.parametrize("variant", ["trained queries", "fitted temperature"])
def test_fitted_values_are_put_back_and_taken_away(variant):
    model, ids, caches = long_read(T=60, room=0)
    recipe = {**TINY, "span": 16, "steps": 3}
    values = experiment.fit(model, variant, caches, ids, recipe, 1e-2)
    with experiment.TRAINED[variant](model) as weights:
        starts = torch.arange(60 - 16)
        list(ttt_context.train_queries(model, weights, caches, ids, starts, steps=3, n=16, lr=1e-2))
        for value, weight in zip(values, weights, strict=True):
            assert torch.equal(value, weight)
    with experiment.fitted(model, variant, values):
        starts = torch.tensor([20])
        inside = ttt_context.span_loss(model, caches, ids, starts, 16)
    assert inside != ttt_context.span_loss(model, caches, ids, starts, 16)


def test_spans_are_at_most_half_of_the_context(monkeypatch):
    model, ids, caches = long_read(T=60, room=0)
    calls = []

    def train_queries(model, weights, caches, ids, starts, *, steps, n, lr):
        calls.append((starts.tolist(), steps, n, lr))
        return []

    monkeypatch.setattr(experiment, "train_queries", train_queries)
    for span in (16, 128):
        recipe = {**TINY, "span": span, "steps": 3}
        experiment.fit(model, "trained queries", caches, ids, recipe, 0.1)
    assert calls == [(list(range(44)), 3, 16, 0.1), (list(range(30)), 3, 30, 0.1)]
    assert experiment.thinking_samples(model, 60, recipe)["2 N k thinking"] == 2 * 3 * 30


def test_variants_get_what_they_are_called(monkeypatch):
    """Each variant is scored with the parameters and on the questions that its name says.

    The functions that compare_variants calls are replaced by fakes that record their arguments.
    Instead of fitted parameters, fake_fit returns a label: (variant, number of the context).
    """
    recipe = {**TINY, "contexts": 4, "train": {**TINY["train"], "tokens": 60}}
    model = sandbox.build_model(recipe, "no QK-norm", 1)
    contexts = [experiment.make_context("columns", recipe, 120, 1, c) for c in range(4)]
    lrs = {"trained queries": 1e-3, "fitted temperature": 1e-1}
    calls_of_fit = []  # (variant, lr)
    label_in_model = None  # what fake_fit returned for the parameters now in the model
    scored = []  # (label_in_model, questions) of each score
    sample_counts = []
    factors = []  # by which the logits are multiplied
    original_temperatures = experiment.temperatures

    def fake_fit(model, variant, caches, ids, recipe, lr):
        calls_of_fit.append((variant, lr))
        for c, context in enumerate(contexts):
            if torch.equal(ids, context.ids):
                return variant, c
        return None  # for the contexts of the last two calls, whose labels are not checked

    @contextmanager
    def fake_fitted(model, variant, label):
        nonlocal label_in_model
        label_in_model = label
        yield
        label_in_model = None

    def fake_score(model, caches, context):
        scored.append((label_in_model, context.questions))
        return {"margin": 1.0, "accuracy": 0.5}

    def fake_vote(model, caches, context, n_samples, seed):
        assert seed == 1
        sample_counts.append(n_samples)
        return {"margin": 1.0, "accuracy": 0.5}

    def recording_temperatures(model, factor=1.0):
        factors.append(factor)
        return original_temperatures(model, factor)

    monkeypatch.setattr(experiment, "fit", fake_fit)
    monkeypatch.setattr(experiment, "fitted", fake_fitted)
    monkeypatch.setattr(experiment, "score", fake_score)
    monkeypatch.setattr(experiment, "vote", fake_vote)
    monkeypatch.setattr(experiment, "temperatures", recording_temperatures)
    margins_by_rate = {variant: {1.0: -1.0, lr: 0.5} for variant, lr in lrs.items()}
    monkeypatch.setattr(experiment, "sweep_rates", lambda *args: margins_by_rate)

    # one learning rate per variant, the best of its sweep
    results = experiment.compare_variants(model, "columns", 120, recipe, 1)
    assert set(results) == {*study.COLORS, "equal-FLOP thinking", "2 N k thinking"}
    assert results["trained queries"]["lr"] == 1e-3
    assert results["trained queries"]["sweep"] == [[1.0, -1.0], [1e-3, 0.5]]
    for scores in results.values():
        assert len(scores["accuracy"]) == 4
    assert calls_of_fit == [("trained queries", 1e-3)] * 4 + [("fitted temperature", 1e-1)] * 4

    # the model was trained on 60 tokens and now reads 120
    assert factors == [math.log(120) / math.log(60)] * 4

    # thinking: as many samples as training (2 steps on 16 tokens) has FLOPs, or 2 N k of them
    flops = ttt_cost.flops_of_spans(model, 2 * 16, 120)
    n_samples = ttt_cost.thinking_tokens(model, 120, flops)
    assert n_samples > 10
    assert sample_counts == [n_samples, 2 * 2 * 16] * 4
    assert results["equal-FLOP thinking"]["samples"] == n_samples

    # contexts 0 and 1 are of one kind, 2 and 3 of the other; each has six scores
    for c, same_kind, other_kind in ((0, 1, 2), (1, 0, 3), (2, 3, 0), (3, 2, 1)):
        labels = [label for label, _ in scored[6 * c : 6 * c + 6]]
        assert labels == [
            None,  # in context
            None,  # log T
            ("fitted temperature", c),
            ("trained queries", c),
            ("trained queries", same_kind),
            ("trained queries", other_kind),
        ]
        for _, questions in scored[6 * c : 6 * c + 6]:
            assert torch.equal(questions, contexts[c].questions)

    results = experiment.compare_variants(model, "records", 60, recipe, 1)
    assert "other-kind queries" not in results
    assert factors[-1] == 1.0, "a context as long as those of training should get no factor"


def test_rates_are_chosen_on_contexts_that_are_not_reported(monkeypatch):
    made = []  # (seed, number) of each context
    tried = []  # (learning rate, ids of the context) of each fit
    make_context = experiment.make_context

    def recording_make_context(task, recipe, T, seed, c, device):
        made.append((seed, c))
        return make_context(task, recipe, T, seed, c, device)

    def fake_fit(model, variant, caches, ids, recipe, lr):
        tried.append((lr, ids))
        return []  # no parameters: the margin comes from margin_of below

    def choose(margin_of):
        """Return the best rate of each variant if fits have the margin margin_of(lr, ids)."""
        monkeypatch.setattr(experiment, "score", lambda *args: {"margin": margin_of(*tried[-1])})
        swept = experiment.sweep_rates(model, "columns", 60, TINY)
        return {variant: max(margins, key=margins.get) for variant, margins in swept.items()}

    model = sandbox.build_model(TINY, "no QK-norm", 1)
    monkeypatch.setattr(experiment, "make_context", recording_make_context)
    monkeypatch.setattr(experiment, "fit", fake_fit)
    chosen = choose(lambda lr, ids: {1e-3: 0.5, 1e-2: 0.75, 1e-1: 0.1}[lr])
    assert chosen == {"trained queries": 1e-2, "fitted temperature": 1e-1}
    assert made == [(0, 0), (0, 2)], "rates should be tried on one context of each kind, of seed 0"
    chosen = choose(lambda lr, ids: 0.75)
    assert chosen["trained queries"] == 1e-3, "of equally good rates the smallest should be chosen"

    # 1e-3 has margin 1 on the first context and 0 on the second, 1e-2 has 0.4 on both
    first_ids = make_context("columns", TINY, 60, 0, 0).ids

    def margin_of(lr, ids):
        is_first = torch.equal(ids, first_ids)
        return {1e-3: float(is_first), 1e-2: 0.4}.get(lr, 0.0)

    assert choose(margin_of)["trained queries"] == 1e-3, "the mean of both contexts should decide"


def test_factors_of_the_logits_end_at_exp_10():
    model = sandbox.build_model(TINY, "no QK-norm", 1)
    q = torch.randn(1, 3, TINY["shape"]["n_head"], TINY["shape"]["head_dim"])
    for log_factor, expected in ((-3.0, -3.0), (9.0, 9.0), (10.5, 10.0), (300.0, 10.0)):
        with experiment.temperatures(model) as log_factors, torch.no_grad():
            log_factors[0].fill_(log_factor)
            scaled = model.layers[0].self_attn.q_norm(q)
        assert torch.allclose(scaled, q * math.exp(expected))


@pytest.mark.parametrize("ends_with", [math.nan, math.inf, None])
@pytest.mark.parametrize("variant", experiment.TRAINED)
def test_training_that_diverges_leaves_the_parameters_as_they_were(variant, ends_with, monkeypatch):
    def diverge(model, weights, *args, **options):
        with torch.no_grad():
            weights[-1][0, 0] = 7.0 if ends_with is None else ends_with
        yield 1.0
        if ends_with is None:  # the next loss is no number
            raise FloatingPointError("the loss on a span is nan")

    model = sandbox.build_model(TINY, "no QK-norm", 1)
    context = experiment.make_context("records", TINY, 60, 1, 0)
    caches = experiment.prefill(model, context.ids)
    with experiment.TRAINED[variant](model) as weights:
        expected = [w.detach().clone() for w in weights]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "train_queries", diverge)
        parameters = experiment.fit(model, variant, caches, context.ids, TINY, lr=1e-2)
    assert is_equal(parameters, expected)
    parameters = experiment.fit(model, variant, caches, context.ids, TINY, lr=1e-2)
    assert not is_equal(parameters, expected)


def test_a_model_is_compared_for_each_task_and_length(monkeypatch):
    monkeypatch.setattr(sandbox, "train_model", lambda *args: ("model of", *args))

    def compare_variants(model, task, T, recipe, seed):
        assert model == ("model of", TINY, "QK-norm", 7, torch.device("cpu"))
        assert (recipe, seed) == (TINY, 7)
        return {"log T": f"{task} {T}"}

    monkeypatch.setattr(experiment, "compare_variants", compare_variants)
    job = {"recipe": TINY, "seed": 7, "norm": "QK-norm", "lengths": [60, 120], "device": "cpu"}
    scores = experiment.study_model(job)["scores"]
    expected = {}
    for task in ("records", "columns"):
        for T in (60, 120):
            expected[f"{task}, QK-norm, {T}: log T"] = f"{task} {T}"
    assert scores == expected


# -- the study -------------------------------------------------------------------------------------


def test_rates_of_the_recipes():
    """The full study tries all rates of the small one, and both try 0.1 for the queries."""
    for variant, small in study.SMALL["lrs"].items():
        full = study.FULL["lrs"][variant]
        assert small == sorted(small)
        assert full == sorted(full)
        assert set(small) <= set(full)
    for recipe in (study.SMALL, study.FULL):
        assert recipe["lrs"]["trained queries"][-1] == 0.1


def test_differences_are_paired_by_seed():
    def result(ours, theirs):
        setting = "records, QK-norm, 96"
        scores = {
            f"{setting}: trained queries": {"margin": ours, "accuracy": [0.5], "lr": 1e-3},
            f"{setting}: fitted temperature": {"margin": theirs, "accuracy": [0.25], "lr": 0.1},
        }
        for entry in scores.values():
            entry["sweep"] = [[entry["lr"], 2.0]]
        return {"scores": scores, "seconds": 1.5}

    results = [result([0.5, 1.0], [0.5, 0.5]), result([0.2, 0.4], [0.1, 0.1])]
    variants, differences = study.summarize([{"seed": 0}, {"seed": 1}], results)
    assert list(differences) == ["records, QK-norm, 96: trained queries"]
    (difference,) = differences.values()
    assert difference["mean"] == pytest.approx((0.25 + 0.2) / 2)
    assert difference["n"] == 2
    half_width = 12.706 * 0.05 / 2  # Student's t, one degree of freedom
    assert difference["half_width_95"] == pytest.approx(half_width, rel=1e-3)
    assert difference["accuracy"] == {"mean": 0.25, "half_width_95": 0, "n": 2}
    entry = variants["records, QK-norm, 96: trained queries"]
    assert [run["value"] for run in entry["runs"]] == pytest.approx([0.75, 0.3])
    assert [run["seconds"] for run in entry["runs"]] == [1.5, 1.5]
    assert entry["sweep"] == [{"seed": seed, "lr": 1e-3, "value": 2.0} for seed in (0, 1)]


def one_after_the_other(function, jobs, *workers, **options):
    """Stand for runner.parallel, which starts processes: the function must survive pickling."""
    return [pickle.loads(pickle.dumps(function))(job) for job in jobs]


def test_study(tiny, monkeypatch, capsys):
    monkeypatch.setattr(runner, "parallel", one_after_the_other)
    monkeypatch.setattr(study, "SMALL", {**TINY, "steps": 1})
    result = ttt_context.main(["--experiment", "--out", "shown"])
    names = sorted(path.name for path in Path("shown").iterdir())
    assert names == ["ttt_context-cpu.json", "ttt_context-cpu.png"]
    assert "trained queries" in capsys.readouterr().out

    saved = json.loads(Path("shown/ttt_context-cpu.json").read_text())
    assert saved["variants"] == result["variants"]
    assert saved["seconds"] > 0
    for key in ("command", "commit", "hardware", "versions", "question", "metric", "baseline"):
        assert key in saved
    n_settings = 2 * 2  # norms and lengths; `columns` has eight variants, `records` seven
    assert len(saved["variants"]) == n_settings * (8 + 7)
    assert len(saved["differences"]) == n_settings * (7 + 6)
    for name, entry in saved["variants"].items():
        assert [run["seed"] for run in entry["runs"]] == [1, 2], name
        for run in entry["runs"]:
            assert len(run["margins"]) == 4
            assert run["value"] == pytest.approx(sum(run["margins"]) / 4)
            assert 0 <= run["accuracy"] <= 1
    assert not Path("out").exists(), "the study on a CPU should leave no cache"
    refused(["--full"], "GPU", main=study.main)


def test_full_study_with_needles_resumes(tiny, monkeypatch, capsys):
    """The full study runs here on a CPU, with a tiny model of bytes and short contexts."""
    shape = ["--block-size", "256", "--n-head", "2", "--steps", "2", "--sample", "0"]
    train.main([*tiny, *shape, "--out", "base"])
    monkeypatch.setattr(harness, "check_gpu", lambda: None)
    monkeypatch.setattr(runner, "parallel", one_after_the_other)
    monkeypatch.setattr(study, "FULL", {**TINY, "steps": 1})
    monkeypatch.setattr(ttt_needles, "LENGTHS", (500, 900))
    monkeypatch.setattr(ttt_needles, "RATES", (1e-4, 1e-2))
    monkeypatch.setattr(ttt_needles, "RATE_SEEDS", (101,))
    monkeypatch.setattr(ttt_needles, "SEEDS", (1, 2))
    monkeypatch.setattr(ttt_needles, "SPAN", 32)
    flags = ["--experiment", "--full", "--init", "base", "--out", "results", "--minutes", "9"]
    first = ttt_context.main(flags)
    for entry in first["variants"].values():
        for run in entry["runs"]:
            assert len(run["margins"]) == 4
    assert capsys.readouterr().out.count("trained queries") >= 2 * 2 + 2

    # the second time everything comes from the cache
    saved = Path("results/ttt_needles-gpu.json").read_text()
    monkeypatch.setattr(experiment, "study_model", None)
    monkeypatch.setattr(ttt_needles, "measure", None)
    assert ttt_context.main(flags)["variants"] == first["variants"]
    assert json.loads(Path("results/ttt_needles-gpu.json").read_text()) == json.loads(saved)
    for name in ("ttt_context-gpu.png", "ttt_needles-gpu.png", "ttt_context-gpu.json"):
        assert Path("results", name).exists()

    def out_of_time(*args, **options):
        raise TimeoutError("1 of 8 runs are done")

    monkeypatch.setattr(runner, "parallel", out_of_time)
    assert ttt_context.main(flags) is None
    assert "1 of 8 runs are done" in capsys.readouterr().out


# -- needles in real text --------------------------------------------------------------------------


class Words:
    """A tokenizer whose tokens are words and line breaks, numbered from 1 as they come."""

    start = [0]

    def __init__(self):
        self.ids = {}

    def encode_ordinary(self, text):
        words = text.replace("\n", " \n ").split(" ")
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in words if word]


def test_contexts_with_needles():
    tokenizer = Words()
    ids, pairs = ttt_needles.make_context(tokenizer, 1000, seed=1)
    assert 500 < len(ids) <= 1000
    words = {i: word for word, i in tokenizer.ids.items()}
    text = " ".join(words[i] for i in ids[1:])
    assert ids[0] == 0
    assert len(pairs) == ttt_needles.FACTS
    for question, answer in pairs:
        fact = " ".join(words[i] for i in question + answer)
        assert text.count(f"{fact}.") == 1
    places = [text.index(" ".join(words[i] for i in question)) for question, _ in pairs]
    assert max(places) - min(places) > 1000, "facts should be spread over the text"
    assert ttt_needles.make_context(tokenizer, 1000, seed=1) == (ids, pairs)
    assert ttt_needles.make_context(tokenizer, 1000, seed=2)[1] != pairs

    # where blanks are tokens, the one before the word belongs to the answer
    ids, pairs = ttt_needles.make_context(ByteTokenizer(), 1000, seed=1)
    for question, answer in pairs:
        assert bytes(ids).count(bytes(question + answer) + b".") == 1


def test_margins_of_needles_are_those_of_a_plain_forward():
    model, ids, caches = long_read(T=40, room=5)
    pairs = [([7, 9], [3, 4]), ([1, 2, 5], [6])]  # (question, answer)
    margin, accuracy = ttt_needles.ask(model, caches, 40, pairs, 60)  # 60 of 64 ids are tokens

    # the probability of an answer is the product of those of its tokens
    expected = 0.0
    for question, answer in pairs:
        p = 1.0
        for i, token in enumerate(answer):
            text = torch.cat([ids, torch.tensor(question + answer[:i])])
            p *= model(text[None])[0, -1, :60].softmax(-1)[token].item()
        expected += math.log(p / (1 - p)) / 2
    assert margin == pytest.approx(expected, abs=1e-8)
    assert accuracy == 0

    # an answer that greedy decoding gives counts as right
    tokens = list(ttt_context.answer(model, caches, 40, [7, 9], 2, 60))
    assert ttt_needles.ask(model, caches, 40, [([7, 9], tokens), pairs[1]], 60)[1] == 0.5


@pytest.mark.parametrize("log_odds, expected", [(-5, -5), (5, 5), (15, 15), (99, math.log(1e9))])
def test_margins_of_needles_are_log_odds_up_to_a_billion(log_odds, expected, monkeypatch):
    logits = torch.tensor([0.0, log_odds])  # token 1 is right
    monkeypatch.setattr(ttt_needles, "last_logits", lambda *args: logits)
    margin, _ = ttt_needles.ask(None, [], 40, [([0], [1])], 2)
    assert margin == pytest.approx(expected)


def test_needles_before_and_after_training(monkeypatch):
    model = small_gpt(vocab_size=300)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(train, "load_model", lambda *args: (model, tokenizer))
    monkeypatch.setattr(ttt_needles, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(ttt_needles, "SPAN", 32)
    monkeypatch.setattr(ttt_needles.distributed, "pick_device", lambda _: torch.device("cpu"))
    ticks = itertools.count(100)  # each look at the clock is a second later
    monkeypatch.setattr(ttt_needles, "time", SimpleNamespace(perf_counter=ticks.__next__))
    rows = ttt_needles.measure("base", 900, 3)
    assert [(row["seed"], row["lr"]) for row in rows] == [(3, 0.0), (3, 1e-3), (3, 1e-2)]
    assert [row["seconds"] for row in rows] == [1, 1, 1]

    ids, pairs = ttt_needles.make_context(tokenizer, 900, 3)
    ids = torch.tensor(ids)
    caches = ttt_context.prefill(model, ids, room=50)
    held_out, starts = ttt_context.split_spans(len(ids), 32)
    for row in rows:
        steps = 32 if row["lr"] else 0
        options = {"steps": steps, "n": 32, "lr": row["lr"]}
        with ttt_context.adapt(model, caches, ids, starts, **options), torch.no_grad():
            margin, accuracy = ttt_needles.ask(model, caches, len(ids), pairs, 256)
            loss = ttt_context.span_loss(model, caches, ids, held_out, 32).item()
        assert row["value"] == pytest.approx(margin)
        assert row["accuracy"] == accuracy
        assert row["loss"] == pytest.approx(loss)
    assert rows[0]["loss"] != pytest.approx(rows[2]["loss"])


def test_the_rate_of_needles_is_chosen_on_other_contexts(tmp_path, monkeypatch):
    """On the contexts that are reported another rate is best, and not the first one either."""
    gains = {0.0: 0.0, 1e-5: -1.0, 1e-4: 0.5, 1e-3: 0.25}

    def run_context(job):
        init, T, seed = job
        is_reported = seed in ttt_needles.SEEDS
        rows = []
        for lr, gain in gains.items():
            if lr == 1e-3 and T == 4096 and not is_reported:
                gain += 1.0  # enough to be best on average over the lengths
            if lr == 1e-4 and is_reported:
                gain += 9.0
            value = seed + T / 1000 + gain
            loss = seed - T / 1000 * lr
            row = {"seed": seed, "lr": lr, "value": value, "loss": loss}
            rows.append({**row, "seconds": 1.0})
        return rows

    monkeypatch.setattr(ttt_needles, "RATES", (1e-5, 1e-4, 1e-3))
    monkeypatch.setattr(ttt_needles, "run_context", run_context)
    monkeypatch.setattr(ttt_needles.run_folder, "find_run", Path)
    monkeypatch.setattr(runner, "parallel", lambda f, jobs, **_: [f(job) for job in jobs])
    record = ttt_needles.run("base", tmp_path)
    n_seeds = len(ttt_needles.SEEDS)
    assert record["best_lr"] == 1e-3
    assert record["baseline"] == "untrained queries"
    for T in ttt_needles.LENGTHS:
        difference = record["differences"][f"{T} tokens: trained queries"]
        assert difference == {"mean": pytest.approx(0.25), "half_width_95": 0, "n": n_seeds}
        means = [difference["mean"] for difference in record["by_lr"][T]]
        assert means == pytest.approx([-1.0, 9.5, 0.25])
        for lr, change in zip((1e-5, 1e-4, 1e-3), record["loss_by_lr"][T], strict=True):
            assert change["mean"] == pytest.approx(-T / 1000 * lr)
            assert change["half_width_95"] == pytest.approx(0, abs=1e-12), "pair them by context"
            assert change["n"] == n_seeds
        plain = record["variants"][f"{T} tokens: {record['baseline']}"]
        trained = record["variants"][f"{T} tokens: trained queries"]
        for entry, lr in ((plain, 0.0), (trained, 1e-3)):
            assert entry["settings"] == {"init": "base", "lr": lr}
            found = [(run["seed"], run["lr"]) for run in entry["runs"]]
            assert found == [(seed, lr) for seed in ttt_needles.SEEDS]
        assert {run["seed"] for run in trained["sweep"]} == set(ttt_needles.RATE_SEEDS)
        assert {run["lr"] for run in trained["sweep"]} == set(ttt_needles.RATES)
    n_jobs = len(ttt_needles.LENGTHS) * (n_seeds + len(ttt_needles.RATE_SEEDS))
    assert record["seconds"] == n_jobs * 4
    assert not set(ttt_needles.SEEDS) & set(ttt_needles.RATE_SEEDS)


def test_figure_of_needles_shows_margins_and_losses_of_all_lengths(monkeypatch):
    monkeypatch.setattr(ttt_needles, "RATES", (1e-4, 1e-2))

    def changes(*means):
        return [{"mean": mean, "half_width_95": 0.1, "n": 6} for mean in means]

    record = {
        "metric": "margin",
        "best_lr": 1e-4,
        "by_lr": {2048: changes(0.1, 0.2), 4096: changes(0.3, 0.4)},
        "loss_by_lr": {2048: changes(0.5, 0.6), 4096: changes(0.7, 0.8)},
    }
    figure = ttt_needles.plot(record)
    shown = []
    for axes in figure.axes:
        shown.append([bars.lines[0].get_ydata().tolist() for bars in axes.containers])
    assert shown == [[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["chosen on other contexts", "2,048 tokens", "4,096 tokens"]


def test_cached_needles_are_those_of_their_job_and_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = {"ttt_needles.py": "0"}
    monkeypatch.setattr(provenance, "code_hashes", lambda *modules: dict(hashes))
    monkeypatch.setattr(ttt_needles, "measure", lambda *job: [*job, *hashes.values()])
    jobs = [("a", 100, 1), ("a", 100, 2), ("a", 200, 1), ("b", 100, 1)]
    for version in ("0", "1"):
        hashes["ttt_needles.py"] = version
        for job in jobs:
            assert ttt_needles.run_context(job) == [*job, version]


# -- the benchmark ---------------------------------------------------------------------------------


def test_bench(tmp_path, monkeypatch):
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "vocab_size": 64}
    monkeypatch.setitem(train.PRESETS, "tiny", {**shape, "qk_norm": True})
    monkeypatch.setattr(bench_ttt, "TOKENS_TIMED", 5)
    flags = ["--model", "tiny", "--device", DEVICE, "--out", str(tmp_path)]
    result = bench_ttt.main([*flags, "--context", "300", "--steps", "2", "--span", "16"])
    saved = json.loads((tmp_path / "ttt_context-bench.json").read_text())
    assert {key: saved[key] for key in result} == result
    assert saved["command"]
    model = bench_ttt.random_model("tiny", torch.device("cpu"), torch.float32)
    assert result["flops"] == ttt_cost.flops_of_spans(model, 2 * 16, 300)
    assert result["thinking"]["2 N k"]["tokens"] == 2 * 2 * 16
    assert 30 < result["thinking"]["equal FLOPs"]["tokens"] < 64
    for row in result["thinking"].values():
        assert row["seconds"] == pytest.approx(row["tokens"] * result["token_ms"] / 1e3)
        assert row["over_steps"] == pytest.approx(row["seconds"] / result["steps_seconds"])
    refused([*flags, "--context", "9", "--span", "9"], "--context", main=bench_ttt.main)
