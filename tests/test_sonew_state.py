"""SONew's state, shards of parameters, and runs of train.py."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import sonew
import train
from tests.common import is_equal, refused, run_two_processes

# -- state -----------------------------------------------------------------------------------------


def make_pair(**options):
    """Return two equal ([float32 matrix, bfloat16 vector], optimizer of both)."""
    pair = []
    for _ in range(2):
        matrix = torch.nn.Parameter(torch.ones(3, 8))
        vector = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        params = [matrix, vector]
        pair.append((params, sonew.SONew(params, **options)))
    return pair


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"band": 3, "bf16_state": True}], ids=str)
def test_state_round_trip(options, tmp_path):
    """After three steps, save and load; the loaded optimizer goes on exactly as the original."""
    generator = torch.Generator().manual_seed(0)
    (params, optimizer), (loaded_params, loaded) = make_pair(**options)
    grads = []
    for _ in range(6):
        grads.append([torch.randn(3, 8, generator=generator), torch.randn(4, generator=generator)])
    for g in grads[:3]:
        step(optimizer, params, g)

    state = {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}
    torch.save(state, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded.load_state_dict(saved["optimizer"])
    for p, saved_p in zip(loaded_params, saved["params"], strict=True):
        p.data.copy_(saved_p)

    for g in grads[3:]:
        step(optimizer, params, g)
        step(loaded, loaded_params, g)
    assert is_equal(optimizer.state_dict(), loaded.state_dict())
    assert is_equal(params, loaded_params)
    matrix, vector = loaded_params
    assert loaded.state[matrix]["step"] == 6
    step_in_file = saved["optimizer"]["state"][0]["step"]
    assert step_in_file == 3, "steps changed the loaded dict, which should have been copied"
    dtype = torch.bfloat16 if options.get("bf16_state") else torch.float32
    assert loaded.state[vector]["s0"].dtype == dtype

    # a deep copy takes the same steps, too
    copied = copy.deepcopy(loaded)
    copied_params = copied.param_groups[0]["params"]
    step(loaded, loaded_params, grads[0])
    step(copied, copied_params, grads[0])
    assert is_equal(loaded_params, copied_params)


def test_load_state_dict_respects_hooks_as_adam_does():
    """A pre-hook may replace the state dict; a post-hook may change the loaded state."""
    (params, optimizer), (loaded_params, loaded) = make_pair()
    step(optimizer, params, [torch.randn(3, 8), torch.randn(4)])
    matrix, vector = params
    loaded_matrix, loaded_vector = loaded_params
    seen_dtypes = []

    def pre_hook(optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["m"] /= 2
        state_dict["param_groups"][0]["lr"] = 0.5
        return state_dict

    def post_hook(optimizer):
        state = optimizer.state[loaded_vector]
        seen_dtypes.append(state["m"].dtype)
        state["step"].fill_(7)

    loaded.register_load_state_dict_pre_hook(pre_hook)
    loaded.register_load_state_dict_post_hook(post_hook)
    for _ in range(2):
        loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[loaded_matrix]["m"], optimizer.state[matrix]["m"] / 2)
    assert loaded.param_groups[0]["lr"] == 0.5
    assert seen_dtypes == [torch.float32] * 2, "the post-hook ran too early"
    assert loaded.state[loaded_vector]["step"] == 7
    assert optimizer.state[vector]["step"] == 1


def damaged(state_dict, i, **entries):
    """Return a copy of an optimizer's state dict with other entries for parameter i."""
    state_dict = copy.deepcopy(state_dict)
    state_dict["state"][i].update(entries)
    return state_dict


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    (params, optimizer), (_, loaded) = make_pair()
    step(optimizer, params, [torch.randn(3, 8), torch.randn(4)])
    good = optimizer.state_dict()
    without_scale = damaged(good, 0)
    del without_scale["state"][0]["scale"]
    without_band = copy.deepcopy(good)
    del without_band["param_groups"][0]["band"]
    other_band = copy.deepcopy(good)
    other_band["param_groups"][0]["band"] = 7
    cases = {
        "m must be a dense tensor of shape \\(3, 8\\)": damaged(good, 0, m=torch.ones(3)),
        "s0 must be a dense tensor of shape \\(3, 8\\)": damaged(good, 0, s0=torch.ones(8, 3)),
        "step must be a dense tensor of shape \\(\\)": damaged(good, 1, step=torch.ones(2)),
        "s1 must be a dense": damaged(good, 0, s1="text"),
        "m must be a dense": damaged(good, 0, m=torch.ones(3, 8, device="meta")),
        "s0 must be a dense": damaged(good, 0, s0=torch.ones(3, 8).to_sparse()),
        "it must have": without_scale,
        "lack 'band'": without_band,
        "band is 7": other_band,
    }
    for part, state_dict in cases.items():
        with pytest.raises(ValueError, match=part):
            loaded.load_state_dict(state_dict)
        assert not loaded.state, part
        assert loaded.param_groups[0]["band"] == 1, part
    with pytest.raises(ValueError, match="doesn't match the size"):
        sonew.SONew(params[:1]).load_state_dict(good)


def test_a_loaded_state_becomes_contiguous():
    (params, optimizer), (loaded_params, loaded) = make_pair()
    step(optimizer, params, [torch.randn(3, 8), torch.randn(4)])
    expanded = torch.tensor(3.0).expand(3, 8)  # all strides are 0
    loaded.load_state_dict(damaged(optimizer.state_dict(), 0, m=expanded))
    m = loaded.state[loaded_params[0]]["m"]
    assert m.is_contiguous()
    assert (m == 3).all()


# -- shards and runs -------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    """Make a mesh of one process, in which DTensor works as it does with many."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def check_sharded(mesh, monkeypatch, use_kernel):
    """Compare the steps of whole and of sharded tensors; return the shapes of all reduced sums."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 12, generator=generator)
    b = torch.randn(6, generator=generator)
    w_grads = torch.randn(3, 6, 12, generator=generator)

    def sharded(t, placement):
        return torch.nn.Parameter(distribute_tensor(t.clone(), mesh, [placement]))

    for placement, chain in ((Shard(1), "row"), (Shard(0), "flat")):
        with pytest.raises(ValueError, match="chain would be cut"):
            sonew.SONew([sharded(w, placement)], chain=chain)
    sonew.SONew([sharded(b, Shard(0))], chain="flat")  # a vector has no chain to cut

    shapes = []
    all_reduce = torch.distributed.all_reduce

    def recording_all_reduce(sums, **options):
        shapes.append(tuple(sums.shape))
        return all_reduce(sums, **options)

    monkeypatch.setattr(torch.distributed, "all_reduce", recording_all_reduce)
    whole_net = [torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())]
    nets = [
        whole_net,
        [sharded(w, Shard(0)), sharded(b, Shard(0))],
        [sharded(w, Replicate()), sharded(b, Shard(0))],
    ]
    optimizers = [sonew.SONew(net, 0.1, band=2, use_kernel=use_kernel) for net in nets]
    for w_grad in w_grads:
        for net, optimizer in zip(nets, optimizers, strict=True):
            for p, g in zip(net, (w_grad, w_grad[:, 0]), strict=True):
                p.grad = g.clone()
                if net is not whole_net:
                    p.grad = distribute_tensor(p.grad, mesh, p.placements)
            optimizer.step()

    for net, optimizer in zip(nets[1:], optimizers[1:], strict=True):
        for whole_p, p in zip(whole_net, net, strict=True):
            assert torch.equal(whole_p, p.full_tensor())
            whole_state = optimizers[0].state[whole_p]
            full_state = {}
            for name, t in optimizer.state[p].items():
                full_state[name] = t.full_tensor() if isinstance(t, DTensor) else t
            assert is_equal(whole_state, full_state)
    return sorted(shapes)


def test_sharded_parameters(mesh, monkeypatch):
    shapes = check_sharded(mesh, monkeypatch, use_kernel=False)
    # 3 first steps reduce a scale; 3 sharded tensors in 3 steps reduce the 3 sums of their steps
    assert shapes == 3 * [()] + 9 * [(3,)]


def test_trains(tiny):
    """Train with train.py. Resuming is tested in test_runs.py."""
    argv = [*tiny, "--optim", "sonew:band=2", "--lr", "0.02", "--out", "out/run"]
    result = train.main(argv)
    assert result["loss"] < 3.5  # 5.5 before the first step; rounding decides about 3.0
    saved = train.load_checkpoint("out/run")
    assert saved["config"]["run"]["optim"] == "sonew:band=2"
    assert "s2" in saved["optimizer"]["state"][0]
    refused([*tiny, "--optim", "sonew:band=7"], "band is 7; it must be 0 to 4")
    refused([*tiny, "--optim", "sonew:chain=rows"], "row or flat")
    refused([*tiny, "--optim", "sonew:graft=none"], "no option 'graft'", "eps=")


IN_TWO_PROCESSES = """
import sys, train
train.RunLog.plot = lambda log: None
flags = sys.argv[1:]
train.main([*flags, "--out", "out/ddp"])
train.main([*flags, "--out", "out/fsdp", "--fsdp", "--stop-after", "3"])
"""


def test_processes_equal_one(tiny):
    """eps = 1 damps strongly; otherwise nearly singular early statistics amplify rounding."""
    argv = [*tiny, "--steps", "6", "--optim", "sonew:eps=1", "--lr", "0.01", "--sample", "0"]
    train.main([*argv, "--out", "out/one"])
    for done in run_two_processes(IN_TWO_PROCESSES, *argv):
        assert done.returncode == 0, done.stderr[-3000:]
    train.main(["--resume", "out/fsdp", "--device", "cpu", "--sample", "0"])

    saved = train.load_checkpoint("out/one")
    one = saved["model"]
    model = train.GPT(train.GPTConfig(**saved["config"]["model"]))
    train.init_weights(model, 1337)
    moved = largest_difference(one, dict(model.named_parameters()))
    for name in ("ddp", "fsdp"):
        weights = train.load_checkpoint(f"out/{name}")["model"]
        assert largest_difference(one, weights) < 1e-3 * moved, name


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)
