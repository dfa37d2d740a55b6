"""train.py, part by part: batches, the training step, the evaluation."""

import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from support import data
from tests.common import small_gpt

CPU = torch.device("cpu")


# -- batches and the step --------------------------------------------------------------------------


def dataset(tokens, val=(), starts=None, val_starts=None, T=4):
    """Return an object with the fields of a Dataset. starts: by default, every position counts."""
    tokens = np.asarray(tokens, np.int32)
    val = np.asarray(val, np.int32)
    return SimpleNamespace(
        train=tokens,
        val=val,
        starts=len(tokens) - T if starts is None else np.asarray(starts),
        val_starts=len(val) - T if val_starts is None else np.asarray(val_starts),
    )


def test_batches_are_windows_of_the_text(monkeypatch):
    text = dataset(np.arange(200) % 64)
    run = train.RunConfig(batch_size=8, seed=3)
    T = 4
    step = 7
    micro_batches, count = train.get_batch(text, run, T, step, 2, CPU)
    assert [x.shape for x, _ in micro_batches] == [(2, T)] * 4
    assert count.item() == 32
    x = torch.cat([x for x, _ in micro_batches])
    y = torch.cat([y for _, y in micro_batches])
    starts = data.batch_starts(3, step, text.starts, 8)
    assert x[:, 0].tolist() == [start % 64 for start in starts]
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y, (x + 1) % 64)

    # two ranks share the same batch; another step or seed draws another one
    monkeypatch.setattr(train, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        ((rank_x, _),), count = train.get_batch(text, run, T, step, 4, CPU)
        assert count.item() == 32, "each rank should know the number of targets of all ranks"
        shares.append(rank_x)
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), x)
    for changed_run, changed_step in ((replace(run, seed=4), step), (run, step + 1)):
        ((rank_x, _),), _ = train.get_batch(text, changed_run, T, changed_step, 4, CPU)
        assert not torch.equal(rank_x, shares[1])


def test_prompts_do_not_enter_the_loss(monkeypatch):
    text = dataset([~1, ~2, 3, 4, 5, ~6, ~7, 8], starts=[0])  # ~token: belongs to a prompt
    ((x, y),), count = train.get_batch(text, train.RunConfig(batch_size=1), 7, 0, 1, CPU)
    assert x.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert (y >= 0).tolist() == [[False, True, True, True, False, False, True]]
    assert y[y >= 0].tolist() == [3, 4, 5, 8]
    assert count.item() == 4


def answers():
    """Return x, y (2, 64) and the number of targets: 1 in the first sequence, 63 in the second."""
    x = torch.randint(64, (2, 64))
    y = torch.randint(64, (2, 64))
    y[0, 1:] = -1
    y[1, 0] = -1
    return x, y, torch.tensor(64.0)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_takes_the_mean_over_all_counted_targets(micro_batch):
    torch.manual_seed(0)
    x, y, count = answers()
    model = small_gpt(torch.float64, block_size=64)
    logits = model(x)
    truth = F.cross_entropy(logits[y >= 0], y[y >= 0])
    grads = torch.autograd.grad(truth, list(model.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    before = [p.detach().clone() for p in model.parameters()]

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = list(zip(x.split(micro_batch), y.split(micro_batch))), count
    loss, grad_norm, signalled = train.train_step(train.Step(model, optimizer), batch)
    assert loss == pytest.approx(truth.item(), rel=1e-6)
    assert not signalled
    assert grad_norm.read() == pytest.approx(norm, rel=1e-5)
    for p, old, grad in zip(model.parameters(), before, grads):
        assert torch.allclose(old - p, grad, rtol=1e-4, atol=1e-8)
        assert p.grad is None, "gradients should be freed after the step"


@pytest.mark.parametrize("clip", [0.0, 0.01, 100.0])
def test_a_step_clips_the_whole_gradient(clip):
    x, y, count = answers()
    model = small_gpt(torch.float64, block_size=64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = train.Step(model, optimizer, clip)
    _, grad_norm, signalled = train.train_step(step, ([(x, y)], count), signal.SIGTERM)
    moved = [old - p.detach() for p, old in zip(model.parameters(), before)]
    length = torch.stack([m.norm() for m in moved]).norm().item()
    assert grad_norm.read() > 0.1, "the norm should be reported as it was before clipping"
    assert length == pytest.approx(0.01 if clip == 0.01 else grad_norm.read(), rel=1e-3)
    assert signalled


def test_a_loss_that_is_not_finite_takes_no_step():
    x, y, count = answers()
    model = small_gpt(block_size=64)
    model.norm.weight.data[0] = math.nan
    before = model.embed_tokens.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, grad_norm, _ = train.train_step(train.Step(model, optimizer, 1.0), ([(x, y)], count))
    assert math.isnan(loss)
    assert math.isnan(grad_norm.read())
    assert torch.equal(model.embed_tokens.weight, before)


# -- evaluation ------------------------------------------------------------------------------------


def mean_loss(model, sequences):
    """Return the mean loss on sequences (N, T + 1); a negative token, ~id, is no target."""
    sequences = torch.as_tensor(np.stack(sequences).astype(np.int64))
    ids = torch.where(sequences < 0, ~sequences, sequences)
    y = sequences[:, 1:]
    return F.cross_entropy(model(ids[:, :-1])[y >= 0], y[y >= 0]).item()


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 8])
def test_evaluation_of_a_short_text_covers_it(micro_batch):
    model = small_gpt()
    val = np.random.default_rng(0).integers(64, size=4 * 7 + 3)  # 8 sequences of 4 cover it
    run = train.RunConfig(batch_size=4, eval_batches=20)
    loss = train.evaluate(model, dataset([], val), run, 4, micro_batch, CPU)

    # a sequence has 4 inputs and one more target, so the last one begins 5 tokens before the end
    starts = np.linspace(0, len(val) - 5, 8).astype(int)
    assert starts[-1] == len(val) - 5
    assert max(np.diff(starts)) <= 4
    assert loss == pytest.approx(mean_loss(model, [val[s : s + 5] for s in starts]), rel=1e-5)

    # changing the first or the last target changes the loss
    for i in (1, len(val) - 1):
        changed = val.copy()
        changed[i] = (changed[i] + 1) % 64
        assert train.evaluate(model, dataset([], changed), run, 4, micro_batch, CPU) != loss


def test_evaluation_of_a_long_text_is_evenly_spaced():
    model = small_gpt()
    val = np.random.default_rng(0).integers(64, size=1000)
    run = train.RunConfig(batch_size=3, eval_batches=2)
    loss = train.evaluate(model, dataset([], val), run, 4, 2, CPU)
    sequences = [val[start : start + 5] for start in (0, 199, 398, 597, 796, 995)]
    assert loss == pytest.approx(mean_loss(model, sequences), rel=1e-5)


def answer_text(n):
    """Return n prompts of 2 tokens with answers of 1 to 5 tokens, and where the prompts begin."""
    rng = np.random.default_rng(0)
    tokens = []
    starts = []
    for i in range(n):
        starts.append(len(tokens))
        tokens += (~rng.integers(64, size=2)).tolist()
        tokens += rng.integers(64, size=1 + i % 5).tolist()
    return tokens + [0] * 8, starts


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_evaluation_of_answers_begins_at_prompts(micro_batch):
    model = small_gpt()
    tokens, starts = answer_text(5)
    run = train.RunConfig(batch_size=6, eval_batches=3)
    text = dataset([], tokens, val_starts=starts, T=6)
    loss = train.evaluate(model, text, run, 6, micro_batch, CPU)
    sequences = [np.array(tokens[start : start + 7]) for start in starts]
    assert loss == pytest.approx(mean_loss(model, sequences), rel=1e-5)

    # of 100 prompts, 18 evenly spaced ones are evaluated
    tokens, starts = answer_text(100)
    text = dataset([], tokens, val_starts=starts, T=6)
    loss = train.evaluate(model, text, run, 6, micro_batch, CPU)
    chosen = [starts[i] for i in np.linspace(0, 99, 18).astype(int)]
    sequences = [np.array(tokens[start : start + 7]) for start in chosen]
    assert loss == pytest.approx(mean_loss(model, sequences), rel=1e-5)


def test_evaluation_stops_on_a_signal():
    stop = SimpleNamespace(now=0)  # stands for the signal handler: the number that has arrived
    calls = []

    def net(x, y, count):  # stands for the model: a signal comes during its first batch
        calls.append(x)
        stop.now = signal.SIGTERM
        return torch.zeros(())

    run = train.RunConfig(batch_size=2, eval_batches=9)
    text = dataset([], np.arange(400) % 64)
    assert train.evaluate(net, text, run, 4, 2, CPU, stop) is None
    assert len(calls) == 1
