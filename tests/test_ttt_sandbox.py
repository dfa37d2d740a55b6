"""The sandbox of the query-only experiment: contexts with questions, and models for them."""

import copy

import pytest
import torch

import train
from experiments import ttt_cost
from experiments import ttt_sandbox as sandbox

RECIPE = {
    "shape": {"n_layer": 2, "n_head": 2, "head_dim": 16, "n_embd": 32},
    "names": 16,
    "values": 4,
    "train": {"steps": 2, "batch": 4, "tokens": 48, "lr": 1e-2, "examples": 8},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- contexts --------------------------------------------------------------------------------------


def column_a_is_the_key(records):
    """Return whether equal names in the first column always come with equal values."""
    names = {a for a, _, _ in records}
    named_values = {(a, value) for a, _, value in records}
    return len(named_values) == len(names)


@pytest.mark.parametrize("key_column", [0, 1])
@pytest.mark.parametrize("task", sandbox.TASKS)
def test_the_key_of_a_record_decides_its_value(task, key_column):
    context = sandbox.make_context(task, 600, RECIPE, generator(key_column), 12, key_column)
    records = context.ids.view(-1, 3).tolist()
    assert len(records) == 200
    assert len(context.questions) == 12

    def key_of(a, b):
        if task == "records":
            return a, b
        return a if key_column == 0 else b

    # Tokens 0-15 are names of column a, 16-31 names of column b, 32-35 values.
    # The first record with a key shows its value, which is predictable in later records.
    values = {}
    for record, is_predictable in zip(records, context.is_predictable.view(-1, 3).tolist()):
        a, b, value = record
        assert 0 <= a < 16
        assert 16 <= b < 32
        assert 32 <= value < 36
        key = key_of(a, b)
        assert is_predictable == [False, False, key in values]
        assert values.setdefault(key, value) == value
    assert len(set(values.values())) > 1
    assert context.is_predictable.any()

    # the needles of a question are the values of all records with its key
    asked = []
    for i in range(12):
        a, b = context.questions[i].tolist()
        answer = int(context.answers[i])
        needles = context.needles[i].tolist()
        asked.append([a, b, answer])
        key = key_of(a, b)
        assert answer == values[key]
        has_key = [key_of(a, b) == key for a, b, _ in records]
        assert needles[2::3] == has_key
        assert sum(needles) == sum(has_key), "names must not be needles"
        if task == "records":
            assert sum(has_key) == 1
    if task == "columns":
        is_new = [record not in records for record in asked]
        assert any(is_new), "no question combines two names that no record combines"


def test_names_are_few_and_random():
    """Each name is part of several keys, so neither name of a record decides alone."""
    names = set()
    asked = []  # positions of the answers
    for seed in range(30):
        context = sandbox.make_context("records", 60, RECIPE, generator(seed), 1)
        a, b, _ = context.ids.view(-1, 3).T.tolist()
        assert len(set(a)) <= 5  # of 10 keys at most
        assert len(set(b)) <= 5
        names.update(a + b)
        context = sandbox.make_context("records", 600, RECIPE, generator(seed), 1)
        asked.append(context.needles[0].int().argmax().item())
    assert names == set(range(32))
    assert min(asked) < 150
    assert max(asked) > 450

    # with three keys, both columns have at most three names
    for key_column in (0, 1):
        arguments = (600, RECIPE, generator(), 4, key_column)
        context = sandbox.make_context("columns", *arguments, n_keys=3)
        a, b, _ = context.ids.view(-1, 3).T.tolist()
        assert len(set(a)) == len(set(b)) == 3


def test_examples_end_in_answered_questions():
    n_context = 81  # of 97 tokens; five questions of three tokens and one more token follow
    key_counts = set()
    for i in range(20):
        task = sandbox.TASKS[i % 2]
        ids, is_predictable = sandbox.make_example(task, 96, RECIPE, generator(i))
        assert len(ids) == 97
        assert len(is_predictable) == 97
        is_answer = is_predictable[n_context:96].view(5, 3).tolist()
        assert is_answer == [[False, False, True]] * 5
        records = ids[:n_context].view(-1, 3).tolist()
        for a, b, value in ids[n_context:96].view(5, 3).tolist():
            if task == "records":
                key_counts.add(len({(a, b) for a, b, _ in records}))
                assert [a, b, value] in records
            else:
                same_a = [record for record in records if record[0] == a]
                same_b = [record for record in records if record[1] == b]
                values = {record[2] for record in same_a + same_b}
                assert value in values, "the answer is in no record with one of the two names"

    # examples have from 3 to 15 keys
    assert min(key_counts) < 6
    assert 10 < max(key_counts) <= 15

    key_columns = set()
    for i in range(9):
        ids, _ = sandbox.make_example("columns", 96, RECIPE, generator(i))
        records = ids[:n_context].view(-1, 3).tolist()
        key_columns.add(column_a_is_the_key(records))
    assert key_columns == {True, False}, "in nine examples, each column should be the key once"


def test_renamed_tokens_stay_equal_where_they_were():
    examples = [sandbox.make_example("records", 96, RECIPE, generator(i))[0] for i in range(3)]
    ids = torch.stack(examples)
    permuted = sandbox.permute_tokens(ids, RECIPE, generator())
    for before, after in zip(ids, permuted):
        assert not torch.equal(before, after)
        # two positions hold the same token after renaming where they did before, and only there
        is_same_token_before = before[:, None] == before  # (T, T)
        is_same_token_after = after[:, None] == after
        assert torch.equal(is_same_token_before, is_same_token_after)

    # names of column a, names of column b, and values each stay among themselves
    for low, high in ((0, 16), (16, 32), (32, 36)):
        is_in_range = (ids >= low) & (ids < high)
        assert is_in_range.any()
        assert torch.equal(is_in_range, (permuted >= low) & (permuted < high))

    two_copies = ids[:1].repeat(2, 1)
    permuted = sandbox.permute_tokens(two_copies, RECIPE, generator())
    assert not torch.equal(permuted[0], permuted[1]), "each should have its own permutation"


# -- models ----------------------------------------------------------------------------------------


def test_shift_looks_back():
    q = torch.randn(3, 4, 5, 8, generator=generator())
    k, v = torch.randn(2, 3, 4, 14, 8, generator=generator())
    y = sandbox.shift(q, k, v)  # the 5 queries are at positions 9 to 13
    for h in range(4):
        for i in range(5):
            assert torch.equal(y[:, h, i], v[:, h, 9 + i - (h + 1)])
    start = sandbox.shift(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert torch.equal(start, torch.zeros(3, 4, 1, 8)), "there should be zeros before the start"


@pytest.mark.parametrize("norm", sandbox.NORMS)
def test_models_alternate_and_know_no_positions(norm):
    model = sandbox.build_model(RECIPE, norm, 1)
    functions = [layer.self_attn.function for layer in model.layers]
    assert functions == [sandbox.shift, train.softmax_attention]
    attention = model.layers[1].self_attn
    has_norm = isinstance(attention.q_norm, train.RMSNorm)
    assert has_norm == (norm == "QK-norm")

    # rotating by the angles of RoPE or by none is the same
    x = torch.randn(1, 7, 32, generator=generator())
    cos, sin = train.rope_angles(3, 7, 16, 1e4, "cpu")
    y = attention(x, cos, sin)
    assert torch.equal(y, attention(x, torch.ones_like(cos), torch.zeros_like(sin)))

    # one more key costs 4 FLOPs per channel of the one layer that attends
    one_more_key = ttt_cost.flops_of_tokens(model, 11, 1) - ttt_cost.flops_of_tokens(model, 10, 1)
    assert one_more_key == 4 * 2 * 16

    same_seed = sandbox.build_model(RECIPE, norm, 1)
    other_seed = sandbox.build_model(RECIPE, norm, 2)
    weight = model.embed_tokens.weight
    assert torch.equal(weight, same_seed.embed_tokens.weight)
    assert not torch.equal(weight, other_seed.embed_tokens.weight)


def test_training_lowers_the_loss():
    recipe = copy.deepcopy(RECIPE)
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
    """A model whose loss is its one weight. It records its targets and the weight at each step."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.targets = []
        self.values = []

    def forward(self, ids, targets):
        self.targets.append(targets)
        self.values.append(self.w.item())
        return self.w


def recorded_training(monkeypatch, seed=1):
    """Train a Recorder for 40 steps and return it."""
    model = Recorder()
    monkeypatch.setattr(sandbox, "build_model", lambda *args: model)
    recipe = copy.deepcopy(RECIPE)
    recipe["train"]["steps"] = 40
    sandbox.train_model(recipe, "QK-norm", seed)
    return model


def test_models_train_on_both_tasks_with_new_tokens_each_time(monkeypatch):
    make_example = sandbox.make_example
    tasks = []

    def recording_make_example(task, *args):
        tasks.append(task)
        return make_example(task, *args)

    monkeypatch.setattr(sandbox, "make_example", recording_make_example)
    model = recorded_training(monkeypatch)
    assert tasks == ["records", "columns"] * 4

    # eight examples are drawn 80 times, each time with other tokens
    sequences = torch.cat(model.targets[20:]).tolist()
    assert len(set(map(tuple, sequences))) == 20 * 4
    assert not torch.equal(model.targets[0], recorded_training(monkeypatch, 2).targets[0])


def test_only_predictable_values_count_at_first_and_the_rate_ends_at_zero(monkeypatch):
    model = recorded_training(monkeypatch)
    shares = [(targets >= 0).float().mean().item() for targets in model.targets]
    for share in shares[:20]:
        assert 0.1 < share < 0.4, "only values, a third of the tokens, should count"
    assert shares[20:] == [1.0] * 20
    values = model.targets[0][model.targets[0] >= 0]
    assert (values >= 2 * RECIPE["names"]).all(), "a name counts, although it is not predictable"

    # Adam moves a weight of constant gradient by the learning rate
    moved = [a - b for a, b in zip(model.values, model.values[1:])]
    assert max(moved) == pytest.approx(1e-2, rel=0.2)
    assert moved.index(max(moved)) < 10
    assert moved[0] < 1e-3
    assert moved[-1] < 1e-3
