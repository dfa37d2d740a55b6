"""The state of LoRA-RITE: through a file, with hooks, and what is no such state."""

import copy
import math

import pytest
import torch
import torch.nn as nn

from lora_rite import LoRARITE
from tests.common import is_equal
from tests.test_lora_rite import low_rank


def run_steps(optimizer, parameters, grads, steps):
    for t in steps:
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)  # the state remembers the last one
        for p, g in zip(parameters, grads[t]):
            p.grad = g.clone()
        optimizer.step()


def some_nets(dtype=torch.float32, count=2, **options):
    """Return gradients for six steps and `count` equal nets: (parameters, optimizer)."""
    pairs, _ = low_rank()
    grads = [[torch.randn(p.shape).to(dtype) for pair in pairs for p in pair] for _ in range(6)]
    nets = []
    for _ in range(count):
        parameters = [nn.Parameter(p.to(dtype).clone()) for pair in pairs for p in pair]
        group = {"params": parameters, "pair": True}
        nets.append((parameters, LoRARITE([group], 0.1, **options)))
    return grads, nets


@pytest.mark.parametrize("options", [{}, {"escape": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_goes_through_a_file(dtype, options, tmp_path):
    grads, [(parameters, optimizer), (resumed_parameters, first_half)] = some_nets(dtype, **options)
    run_steps(optimizer, parameters, grads, range(6))
    run_steps(first_half, resumed_parameters, grads, range(3))
    torch.save(first_half.state_dict(), tmp_path / "state")
    resumed = LoRARITE([{"params": resumed_parameters, "pair": True}], 0.1)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    run_steps(resumed, resumed_parameters, grads, range(3, 6))
    assert is_equal(parameters, resumed_parameters)
    assert is_equal(optimizer.state_dict(), resumed.state_dict())


def test_load_state_dict_respects_hooks_as_adam_does():
    """A pre-hook may replace the state dict; post-hooks see the loaded state; memory is copied."""
    grads, [(parameters, optimizer), (loaded_parameters, loaded)] = some_nets()
    run_steps(optimizer, parameters, grads, range(2))
    saved = optimizer.state_dict()
    seen_by_post_hook = []

    def pre_hook(optimizer, state_dict):
        state = {i: {**s, "M": s["M"] + 1} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def post_hook(optimizer):
        seen_by_post_hook.append(optimizer.state[loaded_parameters[0]]["packed"].clone())

    loaded.register_load_state_dict_pre_hook(pre_hook)
    loaded.register_load_state_dict_post_hook(post_hook)
    loaded.load_state_dict(saved)
    for p, loaded_p in zip(parameters, loaded_parameters):
        state = optimizer.state[p]
        loaded_state = loaded.state[loaded_p]
        assert torch.equal(loaded_state["M"], state["M"] + 1)
        assert torch.equal(loaded_state["packed"], state["packed"])
        assert loaded_state["packed"].dtype == torch.float64
    assert torch.equal(seen_by_post_hook[0], optimizer.state[parameters[0]]["packed"])

    before = copy.deepcopy(saved)
    run_steps(loaded, loaded_parameters, grads, range(2, 4))
    assert is_equal(saved, before), "steps should not write to the dict that was loaded"


def test_a_copy_takes_the_same_steps():
    """copy.deepcopy skips __init__; the copy has its own parameters and caches."""
    grads, [(parameters, optimizer)] = some_nets(count=1, use_kernel=False)
    run_steps(optimizer, parameters, grads, range(2))
    copied_parameters, copied = copy.deepcopy((parameters, optimizer))
    assert copied.use_kernel is False
    assert copied.plans == {}
    assert optimizer.plans
    run_steps(copied, copied_parameters, grads, range(2, 4))
    run_steps(optimizer, parameters, grads, range(2, 4))
    assert is_equal(copied_parameters, parameters)
    assert is_equal(copied.state_dict(), optimizer.state_dict())


def with_number(i, value):
    """Return a function that changes number i of a saved state's tensor "packed"."""

    def change(saved):
        packed = saved["packed"].clone()
        packed[i] = value
        return dict(saved, packed=packed)

    return change


BAD_STATES = {
    "M of another shape": lambda s: dict(s, M=torch.ones(3)),
    "packed is short": lambda s: dict(s, packed=s["packed"][:-1]),
    "NaN": lambda s: dict(s, packed=s["packed"] * math.nan),
    "meta": lambda s: dict(s, M=s["M"].to("meta")),
    "sparse": lambda s: dict(s, M=s["M"].to_sparse()),
    "integers": lambda s: dict(s, M=s["M"].long()),
    "strings": lambda s: dict(s, M="M"),
    "M is missing": lambda s: {"packed": s["packed"]},
    "more than that": lambda s: dict(s, exp_avg=s["M"]),
    "a negative step": lambda s: dict(s, packed=s["packed"] * -1),
    "rho below 0": with_number(-5, -1.0),
    "step below 0": with_number(-4, -1.0),
    "lr below 0": with_number(-3, -1.0),
    "skipped below 0": with_number(-1, -1.0),
    "only shrink 0": with_number(-2, 0.0),
    "shrink 0": lambda s: dict(s, packed=s["packed"] * 0),
    "a list": lambda s: [1, 2],
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused(case):
    grads, [(parameters, optimizer), (_, loaded)] = some_nets()
    run_steps(optimizer, parameters, grads, range(1))
    saved = optimizer.state_dict()
    saved["state"][1] = BAD_STATES[case](saved["state"][1])
    message = r"the state of a factor \(17, 4\) is not one of LoRA-RITE"
    with pytest.raises(ValueError, match=message):
        loaded.load_state_dict(saved)
    assert not loaded.state, "a refused state should not be loaded in part"


def test_a_state_with_stride_0_becomes_real_memory():
    grads, [(parameters, optimizer), (loaded_parameters, loaded)] = some_nets()
    run_steps(optimizer, parameters, grads, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["M"] = torch.ones(1).expand(4, 24)
    loaded.load_state_dict(saved)
    assert loaded.state[loaded_parameters[0]]["M"].is_contiguous()
