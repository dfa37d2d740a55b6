"""support/checkpoint.py: optimizers resume exactly; state that does not fit is refused."""

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from support import checkpoint
from tests.common import fails, is_equal
from tests.test_checkpoint import one_layer


def step(model, optimizer, n=3):
    for _ in range(n):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return train.adamw([{"params": list(model.parameters()), "weight_decay": 0.1}], 0.1)


def sonew(model):
    from sonew import optimizer

    return optimizer([{"params": list(model.parameters()), "weight_decay": 0.1}], 0.1, band=2)


def lora_rite(model):
    from lora_rite import LoRARITE

    return LoRARITE([{"params": list(model.parameters()), "pair": True}], 0.1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adafactor(model):
    return torch.optim.Adafactor(model.parameters(), 0.1)


class Counting(torch.optim.SGD):
    """A user's optimizer with a number in its groups, and a list and a text in its state."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state["norms"] = [state.get("norms", [p.sum(), 0])[0] + p.norm(), group["count"]]
                state["name"] = "x"
                p.data.mul_(1 - 0.01 * state["norms"][0] / state["norms"][1])


def counting(model):
    return Counting([{"params": list(model.parameters()), "count": 0}], 0.1, momentum=0.9)


OPTIMIZERS = [adamw, sonew, lora_rite, sgd, adafactor, counting]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_optimizers_go_on_as_if_never_interrupted(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = one_layer((4, 6), (8, 4)) if make is lora_rite else one_layer((4, 6), (8, 4), (5,))
    optimizer = make(model)
    step(model, optimizer)
    checkpoint.save(Path("."), model, optimizer, step=3)
    torch.manual_seed(1)
    step(model, optimizer)

    # restore the checkpoint into a model with other weights; saved again, it is the same
    torch.manual_seed(2)
    new_model = copy.deepcopy(model)
    for p in new_model.parameters():
        p.data.normal_()
    new_optimizer = make(new_model)
    saved = torch.load("ckpt.pt", weights_only=True)
    checkpoint.restore(new_model, new_optimizer, saved)
    for p in new_model.parameters():
        assert p.grad is None
    checkpoint.save(Path("."), new_model, new_optimizer, step=3)
    assert is_equal(torch.load("ckpt.pt", weights_only=True), saved)

    # the same gradients as above lead to the same weights and state
    torch.manual_seed(1)
    step(new_model, new_optimizer)
    assert is_equal(model.state_dict(), new_model.state_dict())
    assert is_equal(optimizer.state_dict(), new_optimizer.state_dict())


def test_a_run_stopped_before_its_first_step_has_no_state():
    model = one_layer((4, 6))
    saved = {"step": 0, "model": model.state_dict(), "optimizer": adamw(model).state_dict()}
    again = one_layer((4, 6))
    checkpoint.restore(again, adamw(again), saved)
    assert is_equal(model.state_dict(), again.state_dict())


def test_parameters_without_a_gradient_have_no_state(tmp_path, monkeypatch):
    """p1 never gets a gradient, so AdamW has no state for it; SGD has none for any parameter."""
    monkeypatch.chdir(tmp_path)

    def step_without_p1(model, optimizer):
        model.p0.grad, model.p2.grad = torch.ones(4, 6), torch.ones(5)
        optimizer.step()
        optimizer.zero_grad()

    for make in (adamw, lambda model: torch.optim.SGD(model.parameters(), 0.1)):
        model = one_layer((4, 6), (8, 4), (5,))
        optimizer = make(model)
        step_without_p1(model, optimizer)
        checkpoint.save(Path("."), model, optimizer, step=1)
        new_model = one_layer((4, 6), (8, 4), (5,))
        new_optimizer = make(new_model)
        checkpoint.restore(new_model, new_optimizer, torch.load("ckpt.pt", weights_only=True))
        assert new_model.p1 not in new_optimizer.state
        for _ in range(2):
            step_without_p1(model, optimizer)
            step_without_p1(new_model, new_optimizer)
        assert is_equal(model.state_dict(), new_model.state_dict())
        assert is_equal(optimizer.state_dict(), new_optimizer.state_dict())


@contextmanager
def no_step_on_bad_state(optimizer):
    """Allow the one step that allocates the state, and no step on bad state that may crash."""
    original = optimizer.step
    n_calls = 0

    def counted_step(*arguments):
        nonlocal n_calls
        n_calls += 1
        return original(*arguments)

    optimizer.step = counted_step
    yield
    assert n_calls <= 1


def state_cases():
    """Yield (name, function that damages the optimizer's state dict, part of the error)."""
    shape = (4, 6)
    values = {
        "ones(3)": torch.ones(3),
        "transposed": torch.ones(6, 4),
        "more dimensions": torch.ones(1, 4, 6),
        "one number": torch.ones(()),
        "one row": torch.ones(6),
        "float64": torch.ones(shape).double(),
        "float16": torch.ones(shape).half(),
        "int": torch.ones(shape).int(),
        "empty": torch.ones(0),
        "text": "exp_avg",
        "nothing": None,
        "number": 1.0,
        "list": [1.0],
        "dict": {},
    }
    for name, value in values.items():
        yield f"exp_avg is {name}", lambda s, v=value: s["state"][0].update(exp_avg=v), "as exp_avg"
    steps = {"-1": torch.tensor(-1.0), "4": torch.tensor(4.0), "nan": torch.tensor(float("nan"))}
    for name, value in steps.items():
        yield f"step {name}", lambda s, v=value: s["state"][1].update(step=v), "has counted"
    for value in ("3", 3, None, torch.ones(1)):
        yield f"step is {value}", lambda s, v=value: s["state"][1].update(step=v), "as step"
    yield "no state", lambda s: s.update(state={}), "lacks the optimizer's state"
    yield "state None", lambda s: s.update(state=None), "malformed"
    yield "state text", lambda s: s.update(state="abc"), "lacks the optimizer's state"
    emptied = {0: {}, 1: {}}
    yield "all without", lambda s: s.update(state=emptied), "differs in exp_avg, exp_avg_sq, step"
    yield "one without", lambda s: s["state"].update({1: {}}), "differs in exp_avg"
    yield "one lacking", lambda s: s["state"].pop(1), "lacks the optimizer's state"
    yield "one too many", lambda s: s["state"].update({9: s["state"][0]}), "lacks"
    yield "few", lambda s: s["state"].update({1: {"step": 0}}), "differs in exp_avg, exp_avg_sq"
    yield "one None", lambda s: s["state"].update({1: None}), "NoneType as state of parameter 1"
    yield "lacking part", lambda s: s["state"][0].pop("exp_avg_sq"), "differs in exp_avg_sq"
    yield "unknown part", lambda s: s["state"][0].update(more=1), "differs in more"
    yield "no groups", lambda s: s.pop("param_groups"), "malformed"
    yield "groups text", lambda s: s.update(param_groups="a"), "malformed"
    yield "empty groups", lambda s: s.update(param_groups=[]), "another number of parameter groups"
    yield "all empty", lambda s: s.clear(), "malformed"


@pytest.mark.parametrize("case", list(state_cases()), ids=lambda case: case[0])
def test_optimizer_state_that_does_not_fit_is_refused(case):
    _, damage, expected = case
    model = one_layer((4, 6), (5,))
    optimizer = adamw(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = copy.deepcopy(saved)
    damage(saved["optimizer"])

    new_model = one_layer((4, 6), (5,))
    new_optimizer = adamw(new_model)
    with no_step_on_bad_state(new_optimizer):
        message = fails(checkpoint.restore, new_model, new_optimizer, saved, parts=[expected])
    assert message.startswith("the checkpoint")


@pytest.mark.parametrize("make", [sonew, lora_rite, adafactor], ids=lambda make: make.__name__)
def test_state_of_other_shapes_is_compared_too(make):
    """Each tensor of the state, replaced by one with three values, must be refused."""
    model = one_layer((4, 6), (8, 4))
    optimizer = make(model)
    step(model, optimizer)
    names = optimizer.state_dict()["state"][0].keys()
    assert len(names) >= 2
    for name in names:
        saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved = copy.deepcopy(saved)
        value = saved["optimizer"]["state"][0][name]
        saved["optimizer"]["state"][0][name] = torch.ones(3, dtype=value.dtype)
        again = one_layer((4, 6), (8, 4))
        part = f"shape (3,) as {name} in the state of parameter 0"
        fails(checkpoint.restore, again, make(again), saved, parts=[part])


@pytest.mark.parametrize("norms", [[], [1.0], [1.0, 3, 2]], ids=len)
def test_lists_of_another_length_are_refused(norms):
    model = one_layer((4, 6))
    optimizer = counting(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved["optimizer"]["state"][0]["norms"] = norms
    part = "another length of norms in the state of parameter 0"
    fails(checkpoint.restore, model, counting(model), saved, parts=[part])


@pytest.mark.parametrize("layout", ["stride 0", "transposed", "sliced"])
def test_state_is_copied_into_contiguous_memory(layout):
    """Fused AdamW writes through raw pointers, whatever the strides are."""
    model = one_layer((4, 6))
    optimizer = adamw(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = copy.deepcopy(saved)
    values = {
        "stride 0": torch.full((1,), 0.5).expand(4, 6),
        "transposed": torch.rand(6, 4).T,
        "sliced": torch.rand(8, 12)[::2, ::2],
    }[layout]
    saved["optimizer"]["state"][0]["exp_avg"] = values

    new_model = one_layer((4, 6))
    new_optimizer = adamw(new_model)
    checkpoint.restore(new_model, new_optimizer, saved)
    restored = new_optimizer.state[new_model.p0]["exp_avg"]
    assert torch.equal(restored, values)
    assert restored.is_contiguous()
    assert restored.untyped_storage().nbytes() == 4 * 24, "it keeps other memory alive"
    step(new_model, new_optimizer)


def test_counters_of_a_group_are_restored_and_options_are_not():
    model = one_layer((4, 6))
    optimizer = counting(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved["optimizer"]["param_groups"][0].update(nesterov=True, maximize="yes", dampening=None)
    new_model = one_layer((4, 6))
    new_optimizer = counting(new_model)
    checkpoint.restore(new_model, new_optimizer, saved)
    group = new_optimizer.param_groups[0]
    assert group["count"] == 3
    assert group["nesterov"] is False
    assert group["maximize"] is False
    assert group["dampening"] == 0
