"""SONew's state, shards of parameters, and runs of train.py."""

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import sonew
import train
from tests.common import is_equal, refused, run_two_processes

# --------------------------------------------------------------------------------------------------
# State


def make_pair(**options):
    """Two equal lists of a float32 matrix and a bfloat16 vector, each with its optimizer."""
    pair = []
    for _ in range(2):
        params = [torch.ones(3, 8), torch.ones(4, dtype=torch.bfloat16)]
        params = [torch.nn.Parameter(p) for p in params]
        pair.append((params, sonew.SONew(params, **options)))
    return pair


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"band": 3, "bf16_state": True}], ids=str)
def test_state_round_trip(options, tmp_path):
    generator = torch.Generator().manual_seed(0)
    (params, a), (others, b) = make_pair(**options)
    grads = []
    for _ in range(6):
        grads.append([torch.randn(3, 8, generator=generator), torch.randn(4, generator=generator)])
    for g in grads[:3]:
        step(a, params, g)
    torch.save({"optimizer": a.state_dict(), "p": [p.detach() for p in params]}, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    b.load_state_dict(saved["optimizer"])
    for other, p in zip(others, saved["p"], strict=True):
        other.data.copy_(p)
    for g in grads[3:]:
        step(a, params, g)
        step(b, others, g)
    assert is_equal(a.state_dict(), b.state_dict())
    assert is_equal(list(params), list(others)) and b.state[others[0]]["step"] == 6
    dtype = torch.bfloat16 if options.get("bf16_state") else torch.float32
    assert b.state[others[1]]["s0"].dtype == dtype
    assert saved["optimizer"]["state"][0]["step"] == 3, "what was loaded was copied"

    # a copy goes on alike
    c = copy.deepcopy(b)
    copies = c.param_groups[0]["params"]
    step(b, others, grads[0])
    step(c, copies, grads[0])
    assert is_equal(list(others), list(copies))


def test_load_state_dict_respects_hooks_as_adam_does():
    """A pre-hook may replace what is loaded; a post-hook sees, and may change, the result."""
    (params, a), (others, b) = make_pair()
    step(a, params, [torch.randn(3, 8), torch.randn(4)])
    seen = []

    def halve(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["m"] /= 2
        state_dict["param_groups"][0]["lr"] = 0.5
        return state_dict

    def look(optimizer):
        state = optimizer.state[others[1]]
        seen.append(state["m"].dtype)
        state["step"].fill_(7)

    b.register_load_state_dict_pre_hook(halve)
    b.register_load_state_dict_post_hook(look)
    for _ in range(2):
        b.load_state_dict(a.state_dict())
    assert torch.equal(b.state[others[0]]["m"], a.state[params[0]]["m"] / 2)
    assert b.param_groups[0]["lr"] == 0.5
    assert seen == [torch.float32] * 2, "the post-hook runs when all is in place"
    assert b.state[others[1]]["step"] == 7 and a.state[params[1]]["step"] == 1


def damaged(state_dict, i, **entries):
    state_dict = copy.deepcopy(state_dict)
    state_dict["state"][i].update(entries)
    return state_dict


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    (params, a), (_, b) = make_pair()
    step(a, params, [torch.randn(3, 8), torch.randn(4)])
    good = a.state_dict()
    lacking = damaged(good, 0)
    del lacking["state"][0]["scale"]
    without_options = copy.deepcopy(good)
    del without_options["param_groups"][0]["band"]
    other_band = copy.deepcopy(good)
    other_band["param_groups"][0]["band"] = 7
    cases = {
        "m must be a dense tensor of shape \\(3, 8\\)": damaged(good, 0, m=torch.ones(3)),
        "s0 must be a dense tensor of shape \\(3, 8\\)": damaged(good, 0, s0=torch.ones(8, 3)),
        "step must be a dense tensor of shape \\(\\)": damaged(good, 1, step=torch.ones(2)),
        "s1 must be a dense": damaged(good, 0, s1="text"),
        "m must be a dense": damaged(good, 0, m=torch.ones(3, 8, device="meta")),
        "s0 must be a dense": damaged(good, 0, s0=torch.ones(3, 8).to_sparse()),
        "it must have": lacking,
        "lack 'band'": without_options,
        "band is 7": other_band,
    }
    for part, state_dict in cases.items():
        with pytest.raises(ValueError, match=part):
            b.load_state_dict(state_dict)
        assert not b.state and b.param_groups[0]["band"] == 1, part
    with pytest.raises(ValueError, match="doesn't match the size"):
        sonew.SONew(params[:1]).load_state_dict(good)

    strided = damaged(good, 0, m=torch.tensor(3.0).expand(3, 8))
    b.load_state_dict(strided)
    (state, _) = b.state.values()
    assert state["m"].is_contiguous() and (state["m"] == 3).all()


# --------------------------------------------------------------------------------------------------
# Shards and runs


@pytest.fixture
def mesh(tmp_path):
    """A mesh of one process, which stands in for many."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def check_sharded(mesh, monkeypatch, use_kernel):
    """Rows may be sharded; the steps are those of whole tensors. Returns the shapes of the sums."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 12, generator=generator)
    b = torch.randn(6, generator=generator)
    grads = torch.randn(3, 6, 12, generator=generator)

    def sharded(t, placement):
        return torch.nn.Parameter(distribute_tensor(t.clone(), mesh, [placement]))

    for placement, chain in ((Shard(1), "row"), (Shard(0), "flat")):
        with pytest.raises(ValueError, match="chain would be cut"):
            sonew.SONew([sharded(w, placement)], chain=chain)

    sums = []
    all_reduce = torch.distributed.all_reduce

    def recorded(x, **options):
        sums.append(tuple(x.shape))
        return all_reduce(x, **options)

    monkeypatch.setattr(torch.distributed, "all_reduce", recorded)
    nets = [
        [torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())],
        [sharded(w, Shard(0)), sharded(b, Shard(0))],
        [sharded(w, Replicate()), sharded(b, Shard(0))],
    ]
    optimizers = [sonew.SONew(net, 0.1, band=2, use_kernel=use_kernel) for net in nets]
    for g in grads:
        for net, optimizer in zip(nets, optimizers, strict=True):
            for p, x in zip(net, (g, g[:, 0]), strict=True):
                p.grad = x.clone()
                if net is not nets[0]:
                    p.grad = distribute_tensor(p.grad, mesh, p.placements)
            optimizer.step()
    for net, optimizer in zip(nets[1:], optimizers[1:], strict=True):
        for whole, p in zip(nets[0], net, strict=True):
            assert torch.equal(whole, p.full_tensor())
            ours = {}
            for name, t in optimizer.state[p].items():
                ours[name] = t.full_tensor() if hasattr(t, "full_tensor") else t
            assert is_equal(optimizers[0].state[whole], ours)
    return sorted(sums)


def test_sharded_parameters(mesh, monkeypatch):
    sums = check_sharded(mesh, monkeypatch, use_kernel=False)
    assert sums == 3 * [()] + 9 * [(3,)], "one sum for each tensor that is sharded"


def test_trains_and_resumes(tiny):
    argv = [*tiny, "--optim", "sonew:band=2", "--lr", "0.02"]
    result = train.main([*argv, "--out", "out/whole"])
    train.main([*argv, "--out", "out/parts", "--stop-after", "20"])
    train.main(["--resume", "out/parts", "--device", "cpu", "--sample", "0"])
    whole, parts = (train.load_checkpoint(Path(f"out/{name}")) for name in ("whole", "parts"))
    assert is_equal(whole["optimizer"], parts["optimizer"])
    assert is_equal(whole["model"], parts["model"])
    assert whole["config"]["run"]["optim"] == "sonew:band=2"
    assert "s2" in whole["optimizer"]["state"][0]
    assert result["loss"] < 3.0
    refused([*tiny, "--optim", "sonew:band=7"], "band is 7; it must be 0 to 4")
    refused([*tiny, "--optim", "sonew:chain=rows"], "row or flat")
    refused([*tiny, "--optim", "sonew:graft=none"], "no option 'graft'", "eps=")


IN_TWO_PROCESSES = """
import sys, train
flags = sys.argv[1:]
train.main([*flags, "--out", "out/ddp"])
train.main([*flags, "--out", "out/fsdp", "--fsdp", "--stop-after", "3"])
"""


def test_processes_equal_one(tiny):
    """With a strong damping: without it, roundings of early, nearly singular statistics grow."""
    argv = [*tiny, "--steps", "6", "--optim", "sonew:eps=1", "--lr", "0.01", "--sample", "0"]
    train.main([*argv, "--out", "out/one"])
    for done in run_two_processes(IN_TWO_PROCESSES, *argv):
        assert done.returncode == 0, done.stderr[-3000:]
    train.main(["--resume", "out/fsdp", "--device", "cpu", "--sample", "0"])

    names = ("one", "ddp", "fsdp")
    one, ddp, fsdp = (train.load_checkpoint(Path(f"out/{name}"))["model"] for name in names)
    model = train.GPT(train.GPTConfig(**train.load_checkpoint("out/one")["config"]["model"]))
    train.init_weights(model, 1337)
    moved = largest_difference(one, dict(model.named_parameters()))
    assert largest_difference(one, ddp) < 1e-3 * moved
    assert largest_difference(one, fsdp) < 1e-3 * moved


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)
