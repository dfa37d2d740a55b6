"""SONew's Triton kernels against PyTorch: interpreted on a CPU, for real on a GPU."""

import math
import random

import pytest
import torch

import sonew
import train
from tests.common import DEVICE, assert_close, gpu, is_equal
from tests.test_sonew import take_steps
from tests.test_sonew_state import check_sharded, mesh  # noqa: F401, a fixture

pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels import sonew as kernel
from kernels import sonew_fused as fused

# 2 x 120 elements a program, updates 3 programs later
SMALL = fused.Config(lines=1, warps=1, run=2, stages=1, lag=3, registers=None)
SHAPES = [(5, 8), (0, 4), (7,), (), (1, 3), (2, 3, 4), (3, 59), (1, 260), (12,)]


def use_small_blocks(monkeypatch, **changes):
    """Launch programs with few elements, which the interpreter soon has done many of."""
    config = SMALL._replace(**changes)
    monkeypatch.setattr(fused, "CONFIG", dict.fromkeys(range(5), config))
    monkeypatch.setattr(kernel, "BLOCK", 64 * config.lines)


def use_version(monkeypatch, version):
    """Take the readable version for all tensors, or for those only that the fused one does not."""
    if version == "simple":
        monkeypatch.setattr(kernel, "choose_plan", lambda param: (kernel.SimplePlan, ()))


def check_kernel(
    shapes, steps=2, dtype=torch.float32, transposed=False, seed=0, repeat=False, **options
):
    """Compare the kernel with PyTorch in the same dtype and in float64, on the same gradients.

    A large eps keeps all well-conditioned. With repeat, two runs of the kernel must be equal.
    """
    options = {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1, **options}
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    kinds = {"kernel": (dtype, True), "torch": (dtype, False), "float64": (torch.float64, False)}
    if repeat:
        kinds["again"] = (dtype, True)
    nets = {}
    optimizers = {}
    for name, (net_dtype, use_kernel) in kinds.items():
        net = [v.to(net_dtype).to(DEVICE, copy=True) for v in values]
        if transposed:  # neither parameters nor gradients are contiguous
            net = [p.T.contiguous().T for p in net]
        nets[name] = [torch.nn.Parameter(p) for p in net]
        optimizers[name] = sonew.SONew(nets[name], use_kernel=use_kernel, **options)
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    try:
        for _ in range(steps):
            grads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
            for name, net in nets.items():
                for p, g in zip(net, grads, strict=True):
                    g = g.T.clone(memory_format=torch.contiguous_format).T if transposed else g
                    p.grad = g.to(DEVICE, copy=True).to(p.dtype)
                optimizers[name].step()
                for p, g in zip(net, grads, strict=True):
                    assert torch.equal(p.grad.cpu(), g.to(p.dtype)), "the gradient was written to"
    finally:
        torch.use_deterministic_algorithms(False)

    for i, before in enumerate(values):
        p, eager, truth = (nets[name][i] for name in ("kernel", "torch", "float64"))
        states = [optimizers[n].state[nets[n][i]] for n in ("kernel", "torch", "float64")]
        if p.numel() == 0:  # a shard without rows takes part all the same
            assert states[0]["step"] == steps
            continue
        assert_close(str(tuple(p.shape)), p, eager, truth)
        assert p.numel() < 4 or (p - before.to(p)).abs().max() > 0.01, "it did not move"
        for name, tensor in states[0].items():
            eager_tensor, truth_tensor = states[1][name], states[2][name].double()
            assert_close(f"{name} of {tuple(p.shape)}", tensor, eager_tensor, truth_tensor)
    if repeat:
        assert is_equal(nets["kernel"], nets["again"])
        assert is_equal(optimizers["kernel"].state_dict(), optimizers["again"].state_dict())


@pytest.mark.parametrize("version", ["fastest", "simple"])
@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.9, 0.0)},
        {"band": 4, "chain": "flat"},
        {"band": 3, "transposed": True, "gamma": 0.3, "betas": (0.0, 0.999)},  # few edges are left
        {"band": 0, "eps": 1e-6, "betas": (0.9, 0.9999), "lr": torch.tensor(0.1, device=DEVICE)},
    ],
    ids=["band 1", "band 4, flat", "band 3, transposed", "band 0, lr a tensor"],
)
def test_kernel(options, version, monkeypatch):
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    shapes = [shape for shape in SHAPES if not options.get("transposed") or len(shape) == 2]
    check_kernel(shapes, **options)


@pytest.mark.parametrize("seed", range(12))
def test_kernel_on_random_shapes(seed, monkeypatch):
    rng = random.Random(seed)
    shapes = []
    for _ in range(2):
        vector = (rng.randint(1, 75) * 4,)
        wide = (rng.randint(1, 6), rng.randint(1, 80))
        quads = (rng.randint(1, 6), rng.randint(1, 40) * 4)
        tall = (rng.randint(1, 40), rng.randint(1, 6))
        shapes.append(rng.choice([vector, wide, quads, quads, tall]))
    changes = {"lines": 2 ** rng.randint(0, 2), "run": rng.randint(1, 3), "lag": rng.randint(0, 9)}
    use_small_blocks(monkeypatch, **changes)
    use_version(monkeypatch, rng.choice(["fastest", "simple"]))
    options = {"band": rng.randint(0, 4), "chain": rng.choice(["row", "flat"])}
    check_kernel(shapes, seed=seed, repeat=seed == 0, **options)


@pytest.mark.parametrize("version", ["fastest", "simple"])
def test_kernel_does_not_depend_on_its_blocks(version, monkeypatch):
    """Statistics are equal to the last bit; directions but for the order of the norms' sums."""
    use_version(monkeypatch, version)
    states = []
    for lines in (1, 4):
        use_small_blocks(monkeypatch, lines=lines, run=1, lag=5)
        shapes = [(2, 204), (1, 260), (127,)]
        generator = torch.Generator().manual_seed(0)
        net = [torch.nn.Parameter(torch.zeros(s, device=DEVICE)) for s in shapes]
        optimizer = sonew.SONew(net, 0.1, band=2, chain="flat", eps=0.1, use_kernel=True)
        for _ in range(2):
            for p in net:
                p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
            optimizer.step()
        states.append((net, optimizer))
    (one, a), (other, b) = states
    for p, q in zip(one, other, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        for name in ("m", "s0", *(["s1", "s2"] if p.dim() > 1 else [])):
            assert torch.equal(a.state[p][name], b.state[q][name])


@pytest.mark.parametrize("version", ["fastest", "simple"])
@pytest.mark.parametrize("options", [{"band": 2, "chain": "flat"}], ids=str)
def test_the_scale_of_gradients_does_not_matter_to_the_kernel(options, version, monkeypatch):
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    options = {"lr": 0.1, "weight_decay": 0.1, **options}
    grads = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * 3e-5
    path, _ = kernel_steps(options, grads)
    assert is_equal(path, kernel_steps(options, grads * 2.0**-13)[0])
    options["eps"] = 1e-2
    path, _ = kernel_steps(options, grads)
    scaled, _ = kernel_steps(options, grads * 1e-4)
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(path, scaled, strict=True))


def kernel_steps(options, grads):
    p = torch.nn.Parameter(torch.ones(grads.shape[1:], device=DEVICE))
    optimizer = sonew.SONew([p], use_kernel=True, **options)
    path = []
    for g in grads:
        p.grad = g.to(DEVICE, copy=True)
        optimizer.step()
        path.append(p.detach().clone())
    return path, optimizer.state[p]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("version", ["fastest", "simple"])
def test_kernel_on_gradients_that_wake_late(version, monkeypatch):
    """No gradient, the first one, rows without any, and sums that overflow: as in PyTorch."""
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    grads = torch.randn(5, 4, 20, generator=torch.Generator().manual_seed(0))
    grads[:2] = 0
    grads[:, 3] = 0
    for factor in (1.0, 1e19):
        path, state = kernel_steps({"lr": 0.1, "band": 2, "eps": 0.1}, grads * factor)
        expected, _ = take_steps({"lr": 0.1, "band": 2, "eps": 0.1}, grads * factor, (4, 20))
        for x, y in zip(path, expected, strict=True):
            assert x.isfinite().all() and torch.allclose(x.cpu(), y, atol=1e-5)
        assert all(value.isfinite().all() for value in state.values())
        assert torch.equal(path[1], torch.ones_like(path[1])) and (path[-1][3] == 1).all()

    # the first gradient after none is small, and eps does not damp it
    grads = torch.stack([grads[0], grads[3] * 1e-13])
    options = {"lr": 0.1, "eps": 0.0, "betas": (0.0, 0.0)}
    path, _ = kernel_steps(options, grads)
    assert abs((path[1] - 1).norm() / 0.1 / 60**0.5 - 1) < 1e-4


@pytest.mark.parametrize("version", ["fastest", "simple"])
@pytest.mark.parametrize("bad, other_bad", [(math.nan, 1e30), (-math.inf, math.nan)])
def test_kernel_on_bad_gradients(bad, other_bad, version, monkeypatch):
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    nets = []
    optimizers = []
    for use_kernel in (True, False):
        net = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((3, 40), (4, 4), (8,))]
        nets.append(net)
        optimizer = sonew.SONew(net, 0.1, eps=0.1, band=2, chain="flat", use_kernel=use_kernel)
        optimizers.append(optimizer)
        for t in range(2):
            before = [p.detach().clone() for p in net]
            for p in net:
                p.grad = torch.cos(t + torch.arange(p.numel(), device=DEVICE)).view_as(p)
            if t == 1:
                net[0].grad[1, 30] = bad
                net[2].grad[0] = other_bad
            optimizer.step()
        held = [torch.equal(p, x) for p, x in zip(net, before, strict=True)]
        assert held == [True, False, True]
    for p, q in zip(*nets, strict=True):
        a = optimizers[0].state[p]
        b = optimizers[1].state[q]
        assert a["skipped"] == b["skipped"] == (p is not nets[0][1]) and a["step"] == 2
        assert all(torch.allclose(a[k], b[k]) and a[k].isfinite().all() for k in a)


@pytest.mark.parametrize("version", ["torch", "kernel"])
def test_sums_and_sizes_of_other_shards_count(version, monkeypatch):
    """As if another process held the same rows once more: the steps stay what they were."""
    use_small_blocks(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 4, 50, generator=generator).to(DEVICE)
    path, expected = kernel_steps({"lr": 0.1, "eps": 0.1, "betas": (0.9, 0.95)}, grads)
    group = {"band": 1, "chain": "row", "bf16_state": False}
    options = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 0.1,
        "gamma": 1e-6,
    }
    shards = [torch.ones(4, 50, device=DEVICE), torch.ones(0, 50, device=DEVICE)]
    states = [sonew.init_state(p, group) for p in shards]
    full_sums = []

    def all_reduce(sums, group):
        assert group == "the other process"
        sums *= 2
        rows = sums.view(-1, 3)
        if len(rows) == 2:  # of both shards: the empty one gets the sums of the other
            rows[1] = rows[0]
        elif full_sums:
            sums.copy_(full_sums[0])
        full_sums.append(sums.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for g in grads:
        params = []
        full_sums.clear()
        for p, state in zip(shards, states, strict=True):
            if state["step"] == 0:
                state["scale"].fill_(g.abs().mean())
            more = (1, 50, False, 400, ("the other process",))
            params.append(sonew.LocalParam(p, g[: len(p)].clone(), state, *more))
        if version == "torch":
            sonew.step_torch(params, **options)
        else:
            kernel.run(kernel.make_plans(params), **options)
    assert torch.allclose(shards[0], path[-1], atol=1e-6)
    for state in states:
        assert torch.allclose(state["scale"], expected["scale"]) and state["step"] == 3


def test_bias_correction_has_no_cancellation():
    @triton.jit
    def run(t_ptr, out_ptr, log_beta):
        i = tl.program_id(0)
        tl.store(
            out_ptr + i, kernel.bias_correction(tl.load(t_ptr + i), tl.cast(log_beta, tl.float32))
        )

    steps = torch.tensor([1.0, 2, 3, 10, 29, 31, 100, 1000, 10000], device=DEVICE)
    for beta in (0.5, 0.9, 0.99, 0.9999):
        out = torch.empty_like(steps)
        run[(len(steps),)](steps, out, math.log(beta))
        exact = -torch.expm1(steps.double() * math.log(beta))
        assert ((out - exact) / exact).abs().max() < 1e-6


def test_partial_sums_of_any_number_of_programs():
    @triton.jit
    def run(partial_ptr, total_ptr, programs):
        kernel.add_partial_sums(tl.arange(0, 16), partial_ptr, programs, total_ptr, 16)

    for programs in (1, 16, 17, 50):
        partial = torch.rand(programs + 3, 3, device=DEVICE)
        total = torch.empty(3, device=DEVICE)
        run[(1,)](partial, total, programs)
        assert torch.allclose(total, partial[:programs].sum(0))


def test_too_few_lines_are_refused(monkeypatch):
    use_small_blocks(monkeypatch, warps=2)
    with pytest.raises(ValueError, match="as many lines as warps"):
        check_kernel([(2, 4)])


def test_kernel_beyond_2_to_the_31():
    """The last chunk of a tensor of 2^31 + 40: reserves 4 GiB, touches a page."""
    memory = torch.empty(2**31 + 256, dtype=torch.float16, device=DEVICE)
    u = torch.empty(2**31 + 128, device=DEVICE)
    n = 2**31 + 40
    p_ptr, g_ptr, m_ptr, S_ptr = (memory.data_ptr() + 2 * k for k in (192, 0, 64, 128))
    tail = memory[2**31 - 24 :]
    tail.zero_()
    g = torch.randn(40).to(memory)
    tail[24:64] = g
    step, skipped, scale = torch.tensor([0.0, 0.0, 2.0], device=DEVICE)
    totals = torch.tensor([4.0, 1.0, 8.0], device=DEVICE)
    programs = -(-n // 128)
    count = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    counters = [t.data_ptr() for t in (step, skipped, scale)]
    table = [p_ptr, g_ptr, m_ptr, *counters, n, n, n, 128, 0, programs, S_ptr]
    table = torch.tensor([table], device=DEVICE)
    partial = torch.empty(2**24 * 3 + 3, device=DEVICE)  # 200 MB of address space
    items = [[0, programs - 1], [-1, programs - 1]]  # its statistics, its update
    items = torch.tensor(items, device=DEVICE)
    numbers = (0.5, 0.5, 0.5, 0.5, math.log(0.5), math.log(0.5), 0.1, 1e-6, 1.0, 0.0)
    constants = (tl.float16, tl.float16, tl.float16, 0, False, False, False, 13, 1, 1, 1)
    fused.step_kernel[(2,)](
        table, items, partial, u, partial, totals, count, 1, *numbers, *constants, num_warps=1
    )
    g = g.float()
    expected_u = (g / 2) / (g**2 / 4 + 0.1)  # in units of the scale, 2
    assert torch.allclose(u[2**31 : 2**31 + 40], expected_u, rtol=1e-2, atol=1e-3)
    assert torch.allclose(tail[216:256].float(), -2 * expected_u, rtol=1e-2, atol=1e-3)
    assert torch.allclose(tail[88:128].float(), g / 2, atol=1e-3)
    assert torch.allclose(tail[152:192].float(), g * g / 2, atol=1e-3)


def test_sharded_parameters_in_the_kernel(mesh, monkeypatch):  # noqa: F811
    if DEVICE == "cuda":
        pytest.skip("the mesh is one of CPUs")
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, "simple")  # for whole tensors too
    sums = check_sharded(mesh, monkeypatch, use_kernel=True)
    assert sums == 3 * [()] + 9 * [(1, 3)], "one sum for each kind of tensor that is sharded"


# --------------------------------------------------------------------------------------------------
# On a GPU

LARGE_SHAPES = [*SHAPES, *[(768, 3072)] * 4, (3072, 768), (3000, 1025), (1, 100003), (70000,)]
LARGE_SHAPES += [(3, 4097), (1800, 4096)]  # many, and one


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"band": 0}, {"band": 4}, {"band": 4, "chain": "flat"}, {"band": 2, "bf16_state": True}],
    ids=str,
)
def test_kernel_on_the_gpu(dtype, options):
    if dtype == torch.float32 and not options.get("bf16_state"):
        check_kernel(LARGE_SHAPES, repeat=True, **options)
        return
    for seed in range(3):  # roundings of 8 bits add up, so one step only
        check_kernel(LARGE_SHAPES, steps=1, seed=seed, dtype=dtype, repeat=True, **options)


@gpu
def test_both_kernels_are_scale_invariant_on_the_gpu():
    """Tensors that fit the ring of the Hopper kernel, and one that does not (odd rows)."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((768, 3072), (301, 1025)):
        grads = torch.randn(4, *shape, generator=generator) * 3e-5
        path, _ = kernel_steps({"lr": 0.1}, grads)
        for factor in (2.0**-13, 2.0**20):
            assert is_equal(path, kernel_steps({"lr": 0.1}, grads * factor)[0])


@gpu
def test_kernel_repeats_itself_and_never_waits():
    first = None
    for _ in range(100):  # a race would show
        torch.manual_seed(0)
        shapes = [(1000, 1000), (37, 999), (5,), *[(768, 3072)] * 5]
        net = [torch.nn.Parameter(torch.zeros(s, device="cuda")) for s in shapes]
        optimizer = sonew.SONew(net, 0.1, band=4, chain="flat")
        for t in range(3):
            for p in net:
                p.grad = torch.randn(p.shape, device="cuda")
            torch.cuda.set_sync_debug_mode("error" if t else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if first is None:
            first = [p.detach().clone() for p in net]
        assert is_equal(list(net), first)


@gpu
def test_trains_alike_on_the_gpu(tiny):
    argv = [*tiny, "--optim", "sonew:eps=0.1", "--lr", "0.02", "--dtype", "fp32", "--no-compile"]
    argv += ["--sample", "0"]
    at = argv.index("--device")
    on_gpu = argv[:at] + argv[at + 2 :]
    fast = train.main([*on_gpu, "--out", "out/fast"])
    cpu = train.main([*argv, "--out", "out/cpu"])
    assert abs(fast["val_loss"] - cpu["val_loss"]) < 0.05
