"""The state of LoRA-RITE: saved and loaded, and what is refused."""

import copy

import pytest
import torch
import torch.nn as nn

from lora_rite import LoRARITE
from tests.common import is_equal
from tests.test_lora_rite import low_rank


def run_steps(optimizer, parameters, grads, steps):
    for t in steps:
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)  # that of the last step is in the state
        for p, g in zip(parameters, grads[t]):
            p.grad = g.clone()
        optimizer.step()


def two_nets(dtype=torch.float32, **options):
    """Return gradients of six steps, and twice the same parameters with an optimizer."""
    pairs, _ = low_rank()
    grads = [[torch.randn(p.shape).to(dtype) for pair in pairs for p in pair] for _ in range(6)]
    nets = []
    for _ in range(2):
        parameters = [nn.Parameter(p.to(dtype).clone()) for pair in pairs for p in pair]
        group = {"params": parameters, "pair": True}
        nets.append((parameters, LoRARITE([group], 0.1, **options)))
    return grads, nets


@pytest.mark.parametrize("options", [{}, {"escape": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_goes_through_a_file(dtype, options, tmp_path):
    grads, [(whole, a), (parts, b)] = two_nets(dtype, **options)
    run_steps(a, whole, grads, range(6))
    run_steps(b, parts, grads, range(3))
    torch.save(b.state_dict(), tmp_path / "state")
    c = LoRARITE([{"params": parts, "pair": True}], 0.1)
    c.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    run_steps(c, parts, grads, range(3, 6))
    assert is_equal(whole, parts)
    assert is_equal(a.state_dict(), c.state_dict())


def test_a_loaded_state_is_a_copy():
    grads, [(parameters, a), (others, b)] = two_nets()
    run_steps(a, parameters, grads, range(2))
    saved = a.state_dict()
    before = copy.deepcopy(saved)
    b.load_state_dict(saved)
    run_steps(b, others, grads, range(2, 4))
    assert is_equal(saved, before)


BAD_STATES = {
    "M of another shape": lambda s: dict(s, M=torch.ones(3)),
    "packed is short": lambda s: dict(s, packed=s["packed"][:-1]),
    "strings": lambda s: dict(s, M="M"),
    "M is missing": lambda s: {"packed": s["packed"]},
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused(case):
    grads, [(parameters, a), (others, b)] = two_nets()
    run_steps(a, parameters, grads, range(1))
    saved = a.state_dict()
    saved["state"][1] = BAD_STATES[case](saved["state"][1])
    message = r"the state of a factor \(17, 4\) is not one of LoRA-RITE"
    with pytest.raises(ValueError, match=message):
        b.load_state_dict(saved)
    assert not b.state, "nothing was loaded"


def test_a_state_with_stride_0_becomes_real_memory():
    grads, [(parameters, a), (others, b)] = two_nets()
    run_steps(a, parameters, grads, range(1))
    saved = a.state_dict()
    saved["state"][0]["M"] = torch.ones(1).expand(4, 24)
    b.load_state_dict(saved)
    assert b.state[others[0]]["M"].is_contiguous()
