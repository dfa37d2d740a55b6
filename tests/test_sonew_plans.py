"""Which SONew kernel is launched for which tensor, when launches are planned, and for which GPUs
the kernels compile."""

import math
import weakref
from typing import NamedTuple

import pytest
import torch

import sonew
from tests.common import DEVICE, gpu, is_equal

pytest.importorskip("triton")

import triton.language as tl

from kernels import sonew as kernel
from kernels import sonew_fused as fused
from tests.build import Case, check_build
from tests.test_sonew_kernel import check_kernel, use_small_blocks


def chosen_plan(shape, offset=0, band=1, groups=()):
    """Return "simple", or "fused" and whether the chains of this tensor cross ends of chunks.

    offset: elements from an aligned address to the tensor. groups: over which it is sharded.
    """
    n = math.prod(shape)
    p, grad, m, *S = (torch.zeros(n + 4)[offset : n + offset].view(shape) for _ in range(8))
    param = sonew.LocalParam(
        p=p,
        grad=grad,
        state={"m": m, **{f"s{k}": S_k for k, S_k in enumerate(S)}},
        band=band,
        chain=math.prod(shape[1:]),
        is_adam=len(shape) < 2,
        numel=n,
        process_groups=groups,
    )
    plan_class, options = kernel.choose_plan(param)
    name = {kernel.SimplePlan: "simple", fused.FusedPlan: "fused"}[plan_class]
    return name, *options


def test_the_fastest_version_that_takes_a_tensor_is_chosen():
    assert chosen_plan((8, 960)) == ("fused", False), "a row of 960 should fit a chunk"
    assert chosen_plan((8, 964)) == ("fused", True), "a row of 964 should take two chunks"
    assert chosen_plan((1, 960)) == ("fused", False)
    assert chosen_plan((8, 64)) == ("fused", False)
    assert chosen_plan((964,), band=0) == ("fused", False)
    assert chosen_plan((8, 964), groups=("sharded",)) == ("simple",)
    assert chosen_plan((8, 961)) == ("simple",), "fused needs rows of a multiple of 4 elements"
    assert chosen_plan((8, 960), offset=1) == ("simple",), "fused needs aligned tensors"
    assert chosen_plan((4, 3)) == ("simple",)
    assert chosen_plan((0, 8)) == ("simple",), "fused cannot take an empty tensor"
    assert chosen_plan((4, 3), band=0) == ("fused", False)


def count_calls(monkeypatch, owner, name):
    """Return a list to which each call of owner's function appends its arguments."""
    calls = []
    original = getattr(owner, name)

    def recording(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, recording)
    return calls


def test_kernel_takes_many_tensors_at_once(monkeypatch):
    use_small_blocks(monkeypatch)
    fused_steps = count_calls(monkeypatch, fused.FusedPlan, "step")
    simple_steps = count_calls(monkeypatch, kernel.SimplePlan, "step")
    check_kernel([(2, 4)] * 10 + [(3,)] * 10 + [(1, 4), (8,)], steps=1)
    assert len(fused_steps) == 2, "one launch for all matrices, one for the vectors that fit"
    assert len(simple_steps) == 1, "one launch for the vectors of 3 elements"


def test_plans_are_made_once(monkeypatch):
    """A plan is used again while all addresses, shapes and options stay the same."""
    use_small_blocks(monkeypatch)
    plans_made = count_calls(monkeypatch, kernel, "make_plans")
    p = torch.nn.Parameter(torch.ones(4, 8, device=DEVICE))
    optimizer = sonew.SONew([p], 0.1, use_kernel=True)
    grads = torch.randn(4, 4, 8, device=DEVICE)

    def step(grad):
        p.grad = grad
        optimizer.step()

    step(grads[0])
    optimizer.param_groups[0]["lr"] = 0.2
    step(grads[0])
    assert len(plans_made) == 1

    # gradients at two addresses
    step(grads[1])
    step(grads[0])
    assert len(plans_made) == 2

    # the same memory in another shape
    p.grad = None
    p.data = p.data.view(8, 4)
    for name in ("m", "s0", "s1"):
        optimizer.state[p][name] = optimizer.state[p][name].view(8, 4)
    step(grads[0].view(8, 4))
    assert len(plans_made) == 3

    # other options, and a copy of the state
    optimizer.param_groups[0]["chain"] = "flat"
    optimizer.step()
    assert len(plans_made) == 4
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert len(plans_made) == 5

    # the cache keeps the most recent plans only
    capacity = 5  # as many as there are
    monkeypatch.setattr(kernel.PlanCache, "CAPACITY", capacity)
    momenta = [optimizer.state[p]["m"].clone() for _ in range(2)]
    for m in momenta:
        optimizer.state[p]["m"] = m
        optimizer.step()
    assert len(plans_made) == capacity + len(momenta)
    assert len(optimizer.plan_cache.recent) == capacity


def test_plans_keep_no_gradient_alive(monkeypatch):
    use_small_blocks(monkeypatch)
    p = torch.nn.Parameter(torch.ones(4, 8, device=DEVICE))
    optimizer = sonew.SONew([p], 0.1, use_kernel=True)
    p.grad = torch.ones_like(p)
    grad = weakref.ref(p.grad)
    version = p._version
    optimizer.step()
    assert p._version > version, "autograd was not told of the change in place"
    p.grad = None
    assert grad() is None, "a plan keeps the gradient in memory"


@gpu
@pytest.mark.parametrize("shape", [(64, 100), (64, 101), (300, 4096), (3000, 1024)], ids=str)
def test_in_a_cuda_graph(shape):
    """A captured step reads gradients at new addresses, and the learning rate on the device."""
    warm_up = 3  # steps before the graph is captured
    steps = 8
    nets = []
    optimizers = []
    for _ in range(2):
        nets.append([torch.nn.Parameter(torch.ones(s, device="cuda")) for s in (shape, (8,))])
        lr = torch.tensor(0.1, device="cuda")
        optimizers.append(sonew.SONew(nets[-1], lr))
    grads = torch.randn(steps, *shape, device="cuda")

    def step(i, t):
        for p in nets[i]:
            p.grad = grads[t].clone() if p.dim() > 1 else grads[t][0, :8].clone()
        optimizers[i].step()

    for t in range(warm_up):
        step(0, t)
        step(1, t)

    # capture the step of net 0, whose gradients are copies of `source`
    source = grads[warm_up].clone()
    graph = torch.cuda.CUDAGraph()
    nets[0][0].grad = torch.empty_like(source)  # at another address than before
    nets[0][1].grad = torch.empty_like(source[0, :8])
    optimizers[0].prepare()
    with torch.cuda.graph(graph):
        nets[0][0].grad.copy_(source)
        nets[0][1].grad.copy_(source[0, :8])
        optimizers[0].step()

    # the graph must keep alive what it reads: forget the plans, and overwrite all freed memory
    optimizers[0].plan_cache.recent.clear()
    n_others = 1000
    others = [torch.full((64,), -1, device="cuda") for _ in range(n_others)]

    # replay it, while net 1 takes the same steps without a graph
    for t in range(warm_up, steps):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(0.1 / t)
        source.copy_(grads[t])
        graph.replay()
        step(1, t)
    assert is_equal(nets[0], nets[1])
    assert len(others) == n_others
    assert optimizers[0].state[nets[0][0]]["step"] == steps


class Variant(NamedTuple):
    """A specialization of the kernels that real calls launch."""

    param: tl.dtype
    state: tl.dtype
    band: int
    is_adam: bool
    has_halo: bool  # whether chains cross the ends of chunks


BAND_1 = Variant(tl.float32, tl.float32, band=1, is_adam=False, has_halo=True)
BAND_4 = Variant(tl.float32, tl.float32, band=4, is_adam=False, has_halo=True)
BFLOAT16 = Variant(tl.bfloat16, tl.bfloat16, band=1, is_adam=False, has_halo=False)
BAND_0 = Variant(tl.float32, tl.float32, band=0, is_adam=True, has_halo=False)
VARIANTS = [BAND_1, BAND_4, BFLOAT16, BAND_0]
FLOATS = "beta1 beta2 new1 new2 log_beta1 log_beta2 gamma lr weight_decay".split()
TYPES = {"table_ptr": "*i64", "items_ptr": "*i64", "blocks_ptr": "*i64", "counters_ptr": "*i32"}
TYPES.update(dict.fromkeys(FLOATS, "fp32"))
# a limit of registers lets more programs run at once, which is worth some spills
OPTIONS = {"types": TYPES, "dtype": "fp32", "uses_tensor_cores": False, "max_spilled": 72}


def constants_of(variant):
    return {
        "PARAM": variant.param,
        "GRAD": variant.param,
        "STATE": variant.state,
        "BAND": variant.band,
        "ADAM": variant.is_adam,
        "LR_ON_DEVICE": False,
        "COLUMNS": kernel.S_PTR.value + variant.band + 1,
    }


def simple_cases():
    cases = []
    for name, variant, arch in (
        ("direction_kernel", BAND_4, 80),
        ("direction_kernel", BFLOAT16, 90),
        ("update_kernel", BAND_4, 120),
    ):
        constants = {**constants_of(variant), "BLOCK": kernel.BLOCK}
        cases.append(Case(name, constants, arch=arch, num_warps=kernel.WARPS, **OPTIONS))
    constants = {"COLUMNS": 14, "BLOCK": 1024}
    cases.append(Case("norms_kernel", constants, types=TYPES, dtype="fp32"))
    return cases


def fused_cases():
    cases = []
    variants_by_arch = {80: [BAND_4], 90: VARIANTS, 100: [BAND_1], 120: [BFLOAT16]}
    for arch, variants in variants_by_arch.items():
        for variant in variants:
            config = fused.CONFIG[variant.band]
            constants = {
                **constants_of(variant),
                "HALO": variant.has_halo,
                "LINES": config.lines,
                "RUN": config.run,
                "STAGES": config.stages,
            }
            limits = {"num_warps": config.warps}
            if arch == 90:
                limits["maxnreg"] = config.registers
            cases.append(Case("step_kernel", constants, arch=arch, **limits, **OPTIONS))
    constants = {"GRAD": tl.float32, "STATE": tl.float32, "BAND": 4, "COLUMNS": 17, "RUN": 16}
    cases.append(Case("halo_kernel", constants, types=TYPES, dtype="fp32", num_warps=1))
    return cases


def hopper_cases():
    from kernels import sonew_hopper

    cases = []
    for variant in VARIANTS:
        config = fused.CONFIG[variant.band]
        hopper_config = sonew_hopper.CONFIG[variant.band]
        constants = {
            **constants_of(variant),
            "HALO": variant.has_halo,
            "LINES": config.lines,
            "RUN": hopper_config.run,
        }
        limits = {"num_warps": config.warps, "maxnreg": hopper_config.registers}
        cases.append(Case("ring_kernel", constants, **limits, **OPTIONS))
    return cases


def test_kernels_build():
    pytest.importorskip("triton.experimental.gluon")
    cases = [*simple_cases(), *fused_cases(), *hopper_cases()]
    reports = check_build("tests.sonew_kernels", cases)
    assert len(reports) == len(cases)
