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

# a program takes 2 chunks of 120 elements; its update comes 3 programs after its statistics
SMALL = fused.Config(lines=1, warps=1, run=2, stages=1, lag=3, registers=None)
SHAPES = [(5, 8), (0, 4), (7,), (), (1, 3), (2, 3, 4), (3, 59), (1, 260), (12,)]


def use_small_blocks(monkeypatch, **changes):
    """Give each program few elements, so that small tensors take several programs."""
    config = SMALL._replace(**changes)
    monkeypatch.setattr(fused, "CONFIG", dict.fromkeys(range(5), config))
    monkeypatch.setattr(kernel, "BLOCK", 64 * config.lines)


def use_version(monkeypatch, version):
    """Use the simple kernel for all tensors, or the fused one for all tensors that it takes."""
    if version == "simple":
        monkeypatch.setattr(kernel, "choose_plan", lambda param: (kernel.SimplePlan, ()))


def set_gradients(params, grads, transposed):
    """Give each parameter a copy of its gradient; transposed: the copy is not contiguous."""
    for p, g in zip(params, grads, strict=True):
        if transposed:
            g = g.T.clone(memory_format=torch.contiguous_format).T
        p.grad = g.to(DEVICE, copy=True).to(p.dtype)


def check_kernel(
    shapes, steps=2, dtype=torch.float32, transposed=False, seed=0, repeat=False, **options
):
    """Compare the kernel with PyTorch in the same dtype and in float64, on the same gradients.

    A large eps keeps the problem well-conditioned. repeat: two runs of the kernel must be equal.
    """
    options = {"lr": 0.1, "eps": 0.1, "weight_decay": 0.1, **options}
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    # equal networks, each with its optimizer: name, dtype, whether it uses the kernel
    variants = [("kernel", dtype, True), ("torch", dtype, False), ("float64", torch.float64, False)]
    if repeat:
        variants.append(("again", dtype, True))
    nets = {}
    optimizers = {}
    for name, net_dtype, use_kernel in variants:
        net = []
        for start in starts:
            value = start.to(net_dtype).to(DEVICE, copy=True)
            if transposed:  # neither parameters nor gradients are contiguous
                value = value.T.contiguous().T
            net.append(torch.nn.Parameter(value))
        nets[name] = net
        optimizers[name] = sonew.SONew(net, use_kernel=use_kernel, **options)

    # take the steps
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    try:
        for _ in range(steps):
            grads = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
            for name, net in nets.items():
                set_gradients(net, grads, transposed)
                optimizers[name].step()
                for p, g in zip(net, grads, strict=True):
                    assert torch.equal(p.grad.cpu(), g.to(p.dtype)), "the gradient was written to"
    finally:
        torch.use_deterministic_algorithms(False)

    # compare parameters and state
    for i, start in enumerate(starts):
        p = nets["kernel"][i]
        eager = nets["torch"][i]
        truth = nets["float64"][i]
        state = optimizers["kernel"].state[p]
        if p.numel() == 0:  # a shard without rows counts steps like any other
            assert state["step"] == steps
            continue
        shape = tuple(p.shape)
        assert_close(str(shape), p, eager, truth)
        if p.numel() >= 4:
            assert (p - start.to(p)).abs().max() > 0.01, "the parameter did not move"
        for name, tensor in state.items():
            eager_tensor = optimizers["torch"].state[eager][name]
            truth_tensor = optimizers["float64"].state[truth][name].double()
            assert_close(f"{name} of {shape}", tensor, eager_tensor, truth_tensor)
    if repeat:
        assert is_equal(nets["kernel"], nets["again"])
        assert is_equal(optimizers["kernel"].state_dict(), optimizers["again"].state_dict())


@pytest.mark.parametrize("version", ["fastest", "simple"])
@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.9, 0.0)},
        {"band": 4, "chain": "flat"},
        # so large a gamma removes most edges
        {"band": 3, "transposed": True, "gamma": 0.3, "betas": (0.0, 0.999)},
        {"band": 0, "eps": 1e-6, "betas": (0.9, 0.9999), "lr": torch.tensor(0.1, device=DEVICE)},
    ],
    ids=["band 1", "band 4, flat", "band 3, transposed", "band 0, lr a tensor"],
)
def test_kernel(options, version, monkeypatch):
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    shapes = SHAPES
    if options.get("transposed"):
        shapes = [shape for shape in SHAPES if len(shape) == 2]
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
    """Statistics are equal bit for bit; steps only up to the order in which norms are summed."""
    use_version(monkeypatch, version)
    nets = []
    optimizers = []
    for lines in (1, 4):
        use_small_blocks(monkeypatch, lines=lines, run=1, lag=5)
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 204), (1, 260), (127,)]
        net = [torch.nn.Parameter(torch.zeros(shape, device=DEVICE)) for shape in shapes]
        optimizer = sonew.SONew(net, 0.1, band=2, chain="flat", eps=0.1, use_kernel=True)
        for _ in range(2):
            for p in net:
                p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
            optimizer.step()
        nets.append(net)
        optimizers.append(optimizer)

    for p, q in zip(*nets, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
        names = ["m", "s0", "s1", "s2"] if p.dim() > 1 else ["m", "s0"]
        for name in names:
            assert torch.equal(optimizers[0].state[p][name], optimizers[1].state[q][name])


@pytest.mark.parametrize("version", ["fastest", "simple"])
def test_the_scale_of_gradients_does_not_matter_to_the_kernel(version, monkeypatch):
    """Bit for bit for powers of two; 1e-4 rounds the gradients themselves."""
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    options = {"lr": 0.1, "weight_decay": 0.1, "band": 2, "chain": "flat"}
    grads = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * 3e-5
    path, _ = kernel_steps(options, grads)
    scaled_path, _ = kernel_steps(options, grads * 2.0**-13)
    assert is_equal(path, scaled_path)

    options["eps"] = 1e-2
    path, _ = kernel_steps(options, grads)
    scaled_path, _ = kernel_steps(options, grads * 1e-4)
    for p, scaled_p in zip(path, scaled_path, strict=True):
        assert torch.allclose(p, scaled_p, atol=2e-5)


def kernel_steps(options, grads):
    """Let the kernel take a step per gradient; return the parameter after each, and the state."""
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
def test_kernel_on_gradients_that_are_zero_at_first(version, monkeypatch):
    """Two steps of zeros, a row of zeros, and sums that overflow give what PyTorch gives."""
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    grads = torch.randn(5, 4, 20, generator=torch.Generator().manual_seed(0))
    grads[:2] = 0
    grads[:, 3] = 0
    options = {"lr": 0.1, "band": 2, "eps": 0.1}
    for factor in (1.0, 1e19):
        path, state = kernel_steps(options, grads * factor)
        expected_path, _ = take_steps(options, grads * factor, (4, 20))
        for p, expected_p in zip(path, expected_path, strict=True):
            assert p.isfinite().all()
            assert torch.allclose(p.cpu(), expected_p, atol=1e-5)
        for value in state.values():
            assert value.isfinite().all()
        assert (path[1] == 1).all(), "the parameter moved without a gradient"
        assert (path[-1][3] == 1).all(), "the row of zeros moved"

    # after zeros, the first gradient is small, and eps does not damp it
    grads = torch.stack([grads[0], grads[3] * 1e-13])
    options = {"lr": 0.1, "eps": 0.0, "betas": (0.0, 0.0)}
    path, _ = kernel_steps(options, grads)
    step_size = (path[1] - 1).norm() / 60**0.5  # 60 of the 80 gradients are not 0
    assert abs(step_size / 0.1 - 1) < 1e-4


@pytest.mark.parametrize("version", ["fastest", "simple"])
@pytest.mark.parametrize("bad, other_bad", [(math.nan, 1e30), (-math.inf, math.nan)])
def test_kernel_on_bad_gradients(bad, other_bad, version, monkeypatch):
    """The first and the last of three parameters have a bad gradient in the second step."""
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, version)
    states = []
    for use_kernel in (True, False):
        shapes = [(3, 40), (4, 4), (8,)]
        net = [torch.nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in shapes]
        optimizer = sonew.SONew(net, 0.1, eps=0.1, band=2, chain="flat", use_kernel=use_kernel)
        for t in range(2):
            before = [p.detach().clone() for p in net]
            for p in net:
                p.grad = torch.cos(t + torch.arange(p.numel(), device=DEVICE)).view_as(p)
            if t == 1:
                net[0].grad[1, 30] = bad
                net[2].grad[0] = other_bad
            optimizer.step()
        is_unchanged = [torch.equal(p, p_before) for p, p_before in zip(net, before, strict=True)]
        assert is_unchanged == [True, False, True]
        states.append([optimizer.state[p] for p in net])

    for kernel_state, torch_state, skipped in zip(*states, (1, 0, 1), strict=True):
        assert kernel_state["step"] == 2
        assert kernel_state["skipped"] == torch_state["skipped"] == skipped
        for name, value in kernel_state.items():
            assert value.isfinite().all(), name
            assert torch.allclose(value, torch_state[name]), name


@pytest.mark.parametrize("version", ["torch", "kernel"])
def test_sums_and_sizes_of_other_shards_count(version, monkeypatch):
    """Sums over shards reach each shard's step, even that of an empty one.

    all_reduce is replaced: as if another process held the same rows once more, it doubles the
    sums, and the number of elements is doubled, too. So the steps must not change.
    Here, one shard has all the rows, and another one is empty.
    """
    use_small_blocks(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 4, 50, generator=generator).to(DEVICE)
    path, expected = kernel_steps({"lr": 0.1, "eps": 0.1, "betas": (0.9, 0.95)}, grads)

    shards = [torch.ones(4, 50, device=DEVICE), torch.ones(0, 50, device=DEVICE)]
    group = {"band": 1, "chain": "row", "bf16_state": False}
    states = [sonew.init_state(shard, group) for shard in shards]
    full_sums = []  # the sums of the first shard come first

    def fake_all_reduce(sums, group):
        assert group == "the other process"
        sums *= 2
        rows = sums.view(-1, 3)
        if len(rows) == 2:  # the sums of both shards: the empty one gets those of the other
            rows[1] = rows[0]
        elif full_sums:  # the sums of the empty shard alone
            sums.copy_(full_sums[0])
        full_sums.append(sums.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", fake_all_reduce)
    options = {"lr": 0.1, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95}
    options.update(eps=0.1, gamma=1e-6)
    for g in grads:
        params = []
        full_sums.clear()
        for shard, state in zip(shards, states, strict=True):
            if state["step"] == 0:
                state["scale"].fill_(g.abs().mean())
            param = sonew.LocalParam(
                p=shard,
                grad=g[: len(shard)].clone(),
                state=state,
                band=1,
                chain=50,
                is_adam=False,
                numel=2 * g.numel(),  # in both processes
                process_groups=("the other process",),
            )
            params.append(param)
        if version == "torch":
            sonew.step_torch(params, **options)
        else:
            kernel.run(kernel.make_plans(params), **options)
    assert torch.allclose(shards[0], path[-1], atol=1e-6)
    for state in states:
        assert torch.allclose(state["scale"], expected["scale"])
        assert state["step"] == 3


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


def test_the_kernel_needs_triton(monkeypatch):
    monkeypatch.setattr(sonew, "kernel", None)
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="pip install triton"):
        sonew.SONew([p], use_kernel=True)
    sonew.SONew([p])


def test_kernel_beyond_2_to_the_31():
    """A step on the last chunk of a tensor of n = 2^31 + 40 elements. Most memory stays unused.

    g, m, S_0 and p lie 64 elements apart in the same memory, so their last 40 elements are in
    `tail`:

        index   0    24     64    88      128   152        192   216     256
                     g            m             S_0              p
    """
    n = 2**31 + 40
    memory = torch.empty(2**31 + 256, dtype=torch.float16, device=DEVICE)
    address = memory.data_ptr()
    g_ptr, m_ptr, S_ptr, p_ptr = (address + 2 * start for start in (0, 64, 128, 192))
    tail = memory[2**31 - 24 :]
    tail.zero_()
    g = torch.randn(40).to(memory)
    tail[24:64] = g

    # the table of tensors has one row
    step, skipped, scale = torch.tensor([0.0, 0.0, 2.0], device=DEVICE)
    counters = [t.data_ptr() for t in (step, skipped, scale)]
    programs = -(-n // 128)
    row = [p_ptr, g_ptr, m_ptr, *counters, n, n, n, 128, 0, programs, S_ptr]
    table = torch.tensor([row], device=DEVICE)
    # the first program computes the statistics of the last chunk, the second one updates it
    work_items = [[0, programs - 1], [-1, programs - 1]]
    work_items = torch.tensor(work_items, device=DEVICE)

    u = torch.empty(2**31 + 128, device=DEVICE)
    partial = torch.empty(2**24 * 3 + 3, device=DEVICE)  # 200 MB of address space
    totals = torch.tensor([4.0, 1.0, 8.0], device=DEVICE)
    count = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    numbers = (0.5, 0.5, 0.5, 0.5, math.log(0.5), math.log(0.5), 0.1, 1e-6, 1.0, 0.0)
    constants = (tl.float16, tl.float16, tl.float16, 0, False, False, False, 13, 1, 1, 1)
    tensors = (table, work_items, partial, u, partial, totals, count)
    fused.step_kernel[(2,)](*tensors, 1, *numbers, *constants, num_warps=1)

    g = g.float()
    expected_u = (g / 2) / (g**2 / 4 + 0.1)  # in units of the scale, 2
    assert torch.allclose(u[2**31 : 2**31 + 40], expected_u, rtol=1e-2, atol=1e-3)
    m = tail[88:128].float()
    S_0 = tail[152:192].float()
    p = tail[216:256].float()
    # float16 rounds by up to 2^-11 of a number, and its smallest numbers by up to 2^-25
    assert torch.allclose(m, g / 2, rtol=2**-11, atol=2**-24)
    assert torch.allclose(S_0, g * g / 2, rtol=2**-11, atol=2**-24)
    assert torch.allclose(p, -2 * expected_u, rtol=1e-2, atol=1e-3)


def test_sharded_parameters_in_the_kernel(mesh, monkeypatch):  # noqa: F811
    if DEVICE == "cuda":
        pytest.skip("the mesh is one of CPUs")
    use_small_blocks(monkeypatch)
    use_version(monkeypatch, "simple")  # the one kernel for shards, now for whole tensors too
    shapes = check_sharded(mesh, monkeypatch, use_kernel=True)
    # 3 first steps reduce a scale; 3 sharded tensors in 3 steps reduce the 3 sums of their steps
    assert shapes == 3 * [()] + 9 * [(1, 3)]


# -- on a GPU --------------------------------------------------------------------------------------

LARGE_SHAPES = [*SHAPES, *[(768, 3072)] * 4, (3072, 768), (3000, 1025), (1, 100003), (70000,)]
LARGE_SHAPES += [(3, 4097), (1800, 4096)]


GPU_OPTIONS = [{}, {"band": 0}, {"band": 4}, {"band": 4, "chain": "flat"}]


@gpu
@pytest.mark.parametrize("options", GPU_OPTIONS, ids=str)
def test_kernel_on_the_gpu(options):
    check_kernel(LARGE_SHAPES, repeat=True, **options)


@gpu
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [*GPU_OPTIONS, {"band": 2, "bf16_state": True}], ids=str)
def test_kernel_in_bfloat16_on_the_gpu(options, seed):
    """Take one step only, because rounding errors of 8 bits add up."""
    dtypes = [torch.bfloat16]
    if options.get("bf16_state"):
        dtypes.append(torch.float32)
    for dtype in dtypes:
        check_kernel(LARGE_SHAPES, steps=1, seed=seed, dtype=dtype, repeat=True, **options)


@gpu
def test_both_kernels_are_scale_invariant_on_the_gpu():
    """The first shape takes the Hopper kernel; the second, with odd rows, the simple one."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((768, 3072), (301, 1025)):
        grads = torch.randn(4, *shape, generator=generator) * 3e-5
        path, _ = kernel_steps({"lr": 0.1}, grads)
        for factor in (2.0**-13, 2.0**20):
            assert is_equal(path, kernel_steps({"lr": 0.1}, grads * factor)[0])


@gpu
def test_kernel_repeats_itself_and_never_waits():
    """A race would show as a difference in a hundred runs. A step must not wait for the GPU."""
    first = None
    for _ in range(100):
        torch.manual_seed(0)
        shapes = [(1000, 1000), (37, 999), (5,), *[(768, 3072)] * 5]
        net = [torch.nn.Parameter(torch.zeros(s, device="cuda")) for s in shapes]
        optimizer = sonew.SONew(net, 0.1, band=4, chain="flat")
        for t in range(3):
            for p in net:
                p.grad = torch.randn(p.shape, device="cuda")
            # the first step may wait, to plan its launches
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
    val_losses = []
    for device in ("cuda", "cpu"):
        result = train.main([*argv, "--device", device, "--out", f"out/{device}"])
        val_losses.append(result["val_loss"])
    assert abs(val_losses[0] - val_losses[1]) < 0.05
