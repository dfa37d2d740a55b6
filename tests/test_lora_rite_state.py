"""The state of LoRA-RITE: through a file, with hooks, and what is no such state."""

import copy

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


def test_load_state_dict_copies_the_dict():
    grads, [(parameters, optimizer), (loaded_parameters, loaded)] = some_nets()
    run_steps(optimizer, parameters, grads, range(2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    loaded.load_state_dict(saved)
    run_steps(loaded, loaded_parameters, grads, range(2, 4))
    assert is_equal(saved, before), "steps should not write to the dict that was loaded"


BAD_STATES = {
    "M of another shape": lambda s: dict(s, M=torch.ones(3)),
    "packed is short": lambda s: dict(s, packed=s["packed"][:-1]),
    "M is missing": lambda s: {"packed": s["packed"]},
    "Adam's": lambda s: {"step": torch.ones(()), "exp_avg": s["M"], "exp_avg_sq": s["M"]},
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
