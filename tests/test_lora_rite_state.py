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
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)  # that of the last step is in the state
        for p, g in zip(parameters, grads[t]):
            p.grad = g.clone()
        optimizer.step()


def some_nets(dtype=torch.float32, count=2, **options):
    """Return gradients of six steps, and `count` times the same parameters and an optimizer."""
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
    grads, [(whole, a), (parts, b)] = some_nets(dtype, **options)
    run_steps(a, whole, grads, range(6))
    run_steps(b, parts, grads, range(3))
    torch.save(b.state_dict(), tmp_path / "state")
    c = LoRARITE([{"params": parts, "pair": True}], 0.1)
    c.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    run_steps(c, parts, grads, range(3, 6))
    assert is_equal(whole, parts)
    assert is_equal(a.state_dict(), c.state_dict())


def test_load_state_dict_respects_hooks_as_adam_does():
    """A pre-hook may replace what is loaded; post-hooks see the loaded state; nothing is shared."""
    grads, [(parameters, a), (others, b)] = some_nets()
    run_steps(a, parameters, grads, range(2))
    saved = a.state_dict()
    seen = []

    def pre_hook(optimizer, state_dict):
        state = {i: {**s, "M": s["M"] + 1} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def post_hook(optimizer):
        seen.append(optimizer.state[others[0]]["packed"].clone())

    b.register_load_state_dict_pre_hook(pre_hook)
    b.register_load_state_dict_post_hook(post_hook)
    b.load_state_dict(saved)
    for p, q in zip(parameters, others):
        assert torch.equal(b.state[q]["M"], a.state[p]["M"] + 1)
        assert torch.equal(b.state[q]["packed"], a.state[p]["packed"])
        assert b.state[q]["packed"].dtype == torch.float64
    assert torch.equal(seen[0], a.state[parameters[0]]["packed"])

    before = copy.deepcopy(saved)
    run_steps(b, others, grads, range(2, 4))
    assert is_equal(saved, before), "the loaded dict is not written to"


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
    "shrink 0": lambda s: dict(s, packed=s["packed"] * 0),
    "a list": lambda s: [1, 2],
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states_are_refused(case):
    grads, [(parameters, a), (others, b)] = some_nets()
    run_steps(a, parameters, grads, range(1))
    saved = a.state_dict()
    saved["state"][1] = BAD_STATES[case](saved["state"][1])
    message = r"the state of a factor \(17, 4\) is not one of LoRA-RITE"
    with pytest.raises(ValueError, match=message):
        b.load_state_dict(saved)
    assert not b.state, "nothing was loaded"


def test_a_state_with_stride_0_becomes_real_memory():
    grads, [(parameters, a), (others, b)] = some_nets()
    run_steps(a, parameters, grads, range(1))
    saved = a.state_dict()
    saved["state"][0]["M"] = torch.ones(1).expand(4, 24)
    b.load_state_dict(saved)
    assert b.state[others[0]]["M"].is_contiguous()
