"""SONew's Triton kernels against PyTorch: interpreted on a CPU, for real on a GPU."""

import math
import random

import pytest
import torch

import sonew
import train
from tests.common import DEVICE, assert_close, gpu, is_equal
from tests.test_sonew import check_sharded, mesh, take_steps  # noqa: F401, a fixture

pytest.importorskip("triton")

import triton
import triton.language as tl

from kernels import sonew as kernel
from tests.build import Case, check_build

# lines, warps, run, stages, lag, registers: 2 x 120 elements a program, updates 3 programs later
SMALL = (1, 1, 2, 1, 3, None)
SHAPES = [(5, 8), (0, 4), (7,), (), (1, 1), (1, 3), (2, 3, 4), (3, 59), (1, 260)]


def use_config(monkeypatch, config):
    """Launch with the same (lines, warps, ...) at any band."""
    monkeypatch.setattr(kernel, "CONFIG", dict.fromkeys(range(5), config))


def check_kernel(
    shapes, steps=2, dtype=torch.float32, transposed=False, seed=0, repeat=True, **options
):
    """Compare the kernel with PyTorch in the same dtype and in float64, on the same gradients.

    A large eps keeps all well-conditioned. With repeat, two runs of the kernel must be equal.
    """
    options = {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1, **options}
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    nets = []
    for net_dtype in (dtype, dtype, dtype, torch.float64):
        net = [v.to(net_dtype).to(DEVICE, copy=True) for v in values]
        if transposed:  # neither parameters nor gradients are contiguous
            net = [p.T.contiguous().T for p in net]
        nets.append([torch.nn.Parameter(p) for p in net])
    kinds = (True, repeat, False, False)  # use_kernel
    optimizers = [sonew.SONew(n, use_kernel=k, **options) for n, k in zip(nets, kinds, strict=True)]
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    try:
        for _ in range(steps):
            grads = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
            for net, optimizer in zip(nets, optimizers, strict=True):
                for p, g in zip(net, grads, strict=True):
                    g = g.T.clone(memory_format=torch.contiguous_format).T if transposed else g
                    p.grad = g.to(DEVICE, copy=True).to(p.dtype)
                optimizer.step()
                for p, g in zip(net, grads, strict=True):
                    assert torch.equal(p.grad.cpu(), g.to(p.dtype)), "the gradient was written to"
    finally:
        torch.use_deterministic_algorithms(False)

    for p, again, eager, truth, before in zip(*nets, values, strict=True):
        assert not repeat or torch.equal(p, again), "two runs"
        if p.numel() == 0:  # a shard without rows takes part all the same
            assert optimizers[0].state[p]["step"] == steps
            continue
        assert_close(str(tuple(p.shape)), p, eager, truth)
        assert p.numel() < 4 or (p - before.to(p)).abs().max() > 0.01, "it did not move"
        for name, tensor in optimizers[0].state[p].items():
            eager_tensor = optimizers[2].state[eager][name]
            truth_tensor = optimizers[3].state[truth][name]
            assert_close(f"{name} of {tuple(p.shape)}", tensor, eager_tensor, truth_tensor.double())
    if repeat:
        assert is_equal(optimizers[0].state_dict(), optimizers[1].state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"band": 4},
        {"band": 4, "chain": "flat"},
        {"band": 1, "chain": "flat"},
        {"band": 2, "betas": (0.0, 0.999)},
        {"band": 2, "betas": (0.9, 0.0)},
        {"band": 3, "transposed": True},
        {"band": 3, "gamma": 0.3},  # many edges are removed
        {"band": 0, "eps": 1e-6, "betas": (0.9, 0.9999)},
    ],
    ids=str,
)
def test_kernel(options, monkeypatch):
    use_config(monkeypatch, SMALL)
    shapes = [shape for shape in SHAPES if not options.get("transposed") or len(shape) == 2]
    check_kernel(shapes, **options)


@pytest.mark.parametrize("seed", range(20))
def test_kernel_on_random_shapes(seed, monkeypatch):
    rng = random.Random(seed)
    shapes = []
    for _ in range(2):
        vector = (rng.randint(1, 300),)
        wide = (rng.randint(1, 6), rng.randint(1, 80))
        tall = (rng.randint(1, 40), rng.randint(1, 6))
        shapes.append(rng.choice([vector, wide, tall]))
    config = (2 ** rng.randint(0, 2), 1, rng.randint(1, 3), 1, rng.randint(0, 9), None)
    use_config(monkeypatch, config)
    options = {"band": rng.randint(0, 4), "chain": rng.choice(["row", "flat"])}
    check_kernel(shapes, seed=seed, repeat=False, **options)


def test_kernel_does_not_depend_on_its_blocks(monkeypatch):
    """Statistics are equal to the last bit; directions but for the order of the norms' sums."""
    states = []
    for lines in (1, 4):
        use_config(monkeypatch, (lines, 1, 1, 1, 5, None))
        shapes = [(2, 201), (1, 260), (127,)]
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


@pytest.mark.parametrize("options", [{}, {"band": 0}, {"band": 4, "chain": "flat"}], ids=str)
def test_the_scale_of_gradients_does_not_matter_to_the_kernel(options, monkeypatch):
    use_config(monkeypatch, SMALL)
    options = {"lr": 0.1, "weight_decay": 0.1, **options}
    grads = torch.randn(3, 2, 70, generator=torch.Generator().manual_seed(0)) * 3e-5
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


def test_kernel_on_gradients_that_wake_late(monkeypatch):
    """No gradient, the first one, rows without any, and sums that overflow: as in PyTorch."""
    use_config(monkeypatch, SMALL)
    grads = torch.randn(5, 4, 50, generator=torch.Generator().manual_seed(0))
    grads[:2] = 0
    grads[:, 3] = 0
    for factor in (1.0, 1e19):
        path, state = kernel_steps({"lr": 0.1, "band": 2, "eps": 0.1}, grads * factor)
        expected, _ = take_steps({"lr": 0.1, "band": 2, "eps": 0.1}, grads * factor, (4, 50))
        for x, y in zip(path, expected, strict=True):
            assert x.isfinite().all() and torch.allclose(x.cpu(), y, atol=1e-5)
        assert all(value.isfinite().all() for value in state.values())
        assert torch.equal(path[1], torch.ones_like(path[1])) and (path[-1][3] == 1).all()

    # the first gradient after none is small, and eps does not damp it
    grads = torch.stack([grads[0], grads[3] * 1e-13])
    options = {"lr": 0.1, "eps": 0.0, "betas": (0.0, 0.0)}
    path, _ = kernel_steps(options, grads)
    assert abs((path[1] - 1).norm() / 0.1 / 150**0.5 - 1) < 1e-4


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e30])
def test_kernel_on_bad_gradients(bad, monkeypatch):
    use_config(monkeypatch, SMALL)
    nets = []
    optimizers = []
    for use_kernel in (True, False):
        net = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((3, 100), (4, 4), (5,))]
        nets.append(net)
        optimizer = sonew.SONew(net, 0.1, eps=0.1, band=2, chain="flat", use_kernel=use_kernel)
        optimizers.append(optimizer)
        for t in range(2):
            before = [p.detach().clone() for p in net]
            for p in net:
                p.grad = torch.cos(t + torch.arange(p.numel(), device=DEVICE)).view_as(p)
            if t == 1:
                net[0].grad[1, 30] = bad
                net[2].grad[0] = bad
            optimizer.step()
        held = [torch.equal(p, x) for p, x in zip(net, before, strict=True)]
        assert held == [True, False, True]
    for p, q in zip(*nets, strict=True):
        a = optimizers[0].state[p]
        b = optimizers[1].state[q]
        assert a["skipped"] == b["skipped"] == (p is not nets[0][1]) and a["step"] == 2
        assert all(torch.allclose(a[k], b[k]) and a[k].isfinite().all() for k in a)


@pytest.mark.parametrize("step", [sonew.step_torch, kernel.step], ids=["torch", "kernel"])
def test_sums_and_sizes_of_other_shards_count(step, monkeypatch):
    """As if another process held the same rows once more: the steps stay what they were."""
    use_config(monkeypatch, SMALL)
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 4, 50, generator=generator).to(DEVICE)
    path, expected = kernel_steps({"lr": 0.1, "eps": 0.1, "betas": (0.9, 0.95)}, grads)
    group = {"band": 1, "chain": "row", "bf16_state": False}
    options = {"lr": 0.1, "weight_decay": 0.0, "eps": 0.1, "gamma": 1e-6}
    shards = [torch.ones(4, 50, device=DEVICE), torch.ones(0, 50, device=DEVICE)]
    states = [sonew.init_state(p, group) for p in shards]
    for g in grads:
        params = []
        for p, state in zip(shards, states, strict=True):
            if state["step"] == 0:
                state["scale"].fill_(g.abs().mean())
            params.append(sonew.LocalParam(p, g[: len(p)].clone(), state, 1, 50, 400, False))
        full_sums = []

        def all_reduce(sums, full_sums=full_sums):
            sums *= 2
            rows = sums.view(-1, 3)
            if len(rows) == 2:  # of both shards: the empty one gets the sums of the other
                rows[1] = rows[0]
            elif full_sums:
                sums.copy_(full_sums[0])
            full_sums.append(sums.clone())

        step(params, beta1=0.9, beta2=0.95, all_reduce=all_reduce, **options)
    assert torch.allclose(shards[0], path[-1], atol=1e-6)
    for state in states:
        assert torch.allclose(state["scale"], expected["scale"]) and state["step"] == 3


def test_bias_correction_has_no_cancellation():
    @triton.jit
    def run(t_ptr, out_ptr, log_beta):
        i = tl.program_id(0)
        tl.store(out_ptr + i, kernel.one_minus_power(tl.load(t_ptr + i), log_beta))

    steps = torch.tensor([1.0, 2, 3, 10, 29, 31, 100, 1000, 10000], device=DEVICE)
    for beta in (0.5, 0.9, 0.99, 0.9999):
        out = torch.empty_like(steps)
        run[(len(steps),)](steps, out, math.log(beta))
        exact = -torch.expm1(steps.double() * math.log(beta))
        assert ((out - exact) / exact).abs().max() < 1e-6


def test_norms_add_any_number_of_programs():
    @triton.jit
    def run(partial_ptr, total_ptr, programs):
        kernel.norms(tl.arange(0, 16), partial_ptr, programs, total_ptr, 16)

    for programs in (1, 16, 17, 50):
        partial = torch.rand(programs + 3, 3, device=DEVICE)
        total = torch.empty(3, device=DEVICE)
        run[(1,)](partial, total, programs)
        assert torch.allclose(total, partial[:programs].sum(0))


def test_kernel_takes_many_tensors_at_once(monkeypatch):
    launches = []

    class Counted:
        def __init__(self, original):
            self.original = original

        def __getitem__(self, grid):
            launches.append(self.original)
            return self.original[grid]

    for name in ("halo_kernel", "step_kernel"):
        monkeypatch.setattr(kernel, name, Counted(getattr(kernel, name)))
    use_config(monkeypatch, (1, 1, 2, 1, 5, None))
    check_kernel([(2, 4)] * 20 + [(3,)] * 20 + [(1, 4), (8,)], steps=1)
    step_kernel = kernel.step_kernel.original
    assert launches == 2 * 3 * [step_kernel], "matrices, odd vectors, even vectors; in two runs"


def test_too_few_lines_are_refused(monkeypatch):
    use_config(monkeypatch, (1, 2, 2, 1, 3, None))
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
    table = [p_ptr, g_ptr, m_ptr, *counters, n, n, n, 128, 0, programs, 0, S_ptr]
    table = torch.tensor([table], device=DEVICE)
    partial = torch.empty(2**24 * 3 + 3, device=DEVICE)  # 200 MB of address space
    items = [[0, programs - 1], [-1, programs - 1]]  # its statistics, its update
    items = torch.tensor(items, dtype=torch.int32, device=DEVICE)
    numbers = (0.5, 0.5, 0.5, 0.5, math.log(0.5), math.log(0.5), 0.1, 1e-6, 1.0, 0.0)
    constants = (tl.float16, tl.float16, tl.float16, 0, False, False, False, False, 14, 1, 1, 1)
    kernel.step_kernel[(2,)](
        table, items, partial, u, partial, totals, count, 0, 1, *numbers, *constants, num_warps=1
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
    use_config(monkeypatch, SMALL)
    sums = check_sharded(mesh, monkeypatch, use_kernel=True)
    assert sums == 3 * [()] + 9 * [(1, 3)], "one sum for each kind of tensor that is sharded"


def build_cases(module):
    """What real calls launch: (parameters, state, band, plain, halo, aligned)."""
    fp32 = tl.float32
    bf16 = tl.bfloat16
    variants = [
        (fp32, fp32, 1, False, True, True),
        (fp32, fp32, 4, False, True, True),
        (bf16, bf16, 1, False, False, True),
        (bf16, fp32, 4, False, True, False),
        (fp32, fp32, 0, True, False, True),
    ]
    types = {"table_ptr": "*i64", "items_ptr": "*i32", "count_ptr": "*i32"}
    names = "beta1 beta2 new1 new2 log_beta1 log_beta2 gamma lr weight_decay".split()
    types.update(dict.fromkeys(names, "fp32"))
    cases = []
    for P, M, band, plain, halo, aligned in variants:
        lines, warps, run, stages, _, registers = kernel.CONFIG[band]
        constants = {"P": P, "G": P, "M": M, "BAND": band, "PLAIN": plain, "LR_THERE": False}
        constants |= {"HALO": halo, "COLUMNS": kernel.S_PTR.value + band + 1, "LINES": lines}
        options = {"types": types, "dtype": "fp32", "num_warps": warps, "uses_tensor_cores": False}
        options["max_spilled"] = 72  # a register limit for more programs at once is worth it
        if module == "kernels.sonew_hopper":
            from kernels import sonew_hopper

            ring = sonew_hopper.CONFIG[band]
            constants["RUN"] = ring.run
            if aligned:
                case = Case("ring_kernel", constants, maxnreg=ring.registers, **options)
                cases.append(case)
            continue
        constants |= {"RUN": run, "ALIGNED": aligned, "STAGES": stages}
        for arch in (80, 90, 100, 120):
            limit = registers if aligned and arch == 90 else None
            cases.append(Case("step_kernel", constants, arch=arch, maxnreg=limit, **options))
    if module == "kernels.sonew":
        constants = {"G": fp32, "M": fp32, "BAND": 4, "COLUMNS": kernel.S_PTR.value + 5, "RUN": 16}
        for arch in (80, 90, 100, 120):
            case = Case("halo_kernel", constants, types, dtype="fp32", arch=arch, num_warps=1)
            cases.append(case)
    return cases


@pytest.mark.parametrize("module", ["kernels.sonew", "kernels.sonew_hopper"])
def test_kernels_build(module):
    if module == "kernels.sonew_hopper":
        pytest.importorskip("triton.experimental.gluon")
    assert len(check_build(module, build_cases(module))) >= 4


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
        check_kernel(LARGE_SHAPES, **options)
        return
    for seed in range(3):  # roundings of 8 bits add up, so one step only
        check_kernel(LARGE_SHAPES, steps=1, seed=seed, dtype=dtype, **options)


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
def test_in_a_cuda_graph():
    p, q = (torch.nn.Parameter(torch.ones(64, 100, device="cuda")) for _ in range(2))
    a, b = (sonew.SONew([x], 0.1, band=1) for x in (p, q))
    grads = torch.randn(8, 64, 100, device="cuda")
    p.grad = torch.empty_like(p)
    q.grad = torch.empty_like(q)
    for t in range(3):
        p.grad.copy_(grads[t])
        q.grad.copy_(grads[t])
        a.step()
        b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    kernel.recent_tables.clear()  # the graph keeps what it reads
    others = [torch.full((64,), -1, device="cuda") for _ in range(1000)]
    for t in range(3, 8):
        p.grad.copy_(grads[t])
        q.grad.copy_(grads[t])
        graph.replay()
        b.step()
    assert torch.equal(p, q) and a.state[p]["step"] == 8 and len(others) == 1000


@gpu
def test_trains_alike_on_the_gpu(tiny):
    argv = [*tiny, "--optim", "sonew:eps=0.1", "--lr", "0.02", "--dtype", "fp32", "--no-compile"]
    argv += ["--sample", "0"]
    at = argv.index("--device")
    on_gpu = argv[:at] + argv[at + 2 :]
    fast = train.main([*on_gpu, "--out", "out/fast"])
    cpu = train.main([*argv, "--out", "out/cpu"])
    assert abs(fast["val_loss"] - cpu["val_loss"]) < 0.05
