"""LoRA-RITE's kernels against PyTorch: interpreted without a GPU, for real with one."""

import copy
import math
import random

import pytest
import torch
import torch.nn as nn

pytest.importorskip("triton")

import triton
import triton.language as tl

import lora_rite
from kernels import lora_rite as kernel
from lora_rite import LoRARITE
from tests.build import Case, check_build
from tests.common import DEVICE, assert_close, gpu, is_equal
from tests.test_lora_rite import distance

KERNEL = True  # values of use_kernel
EAGER = False


def problem(shapes, steps, dtype, seed=0, change=lambda A, B: (A, B)):
    """Return pairs of A (r, n) and B (m, r) for shapes (r, n, m), and gradients for some steps.

    change: a function that turns random A and B into those of the problem.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    pairs = []
    for r, n, m in shapes:
        pairs.append(change(randn(r, n), randn(m, r)))
    grads = []  # for each step a list of gradients, of A, B, A, B, ...
    for _ in range(steps):
        grads.append([randn(*p.shape).to(dtype) for pair in pairs for p in pair])
    return [(A.to(dtype), B.to(dtype)) for A, B in pairs], grads


def run(use_kernel, pairs, grads, dtype, device=DEVICE, **options):
    """Take a step with each list of gradients. Return the parameters and the optimizer."""
    ps = []
    for pair in pairs:
        for p in pair:
            ps.append(nn.Parameter(p.to(device, dtype, copy=True).contiguous()))
    optimizer = LoRARITE([{"params": ps, "pair": True}], 0.05, use_kernel=use_kernel, **options)
    for t, step_grads in enumerate(grads):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + t)
        for p, g in zip(ps, step_grads):
            p.grad = None if g is None else g.to(device, dtype).contiguous()
        for _, batch in optimizer.find_batches():
            assert isinstance(batch, kernel.KernelBatch) == bool(use_kernel)
        torch.use_deterministic_algorithms(use_kernel is KERNEL)  # new tensors hold NaN
        try:
            optimizer.step()
        finally:
            torch.use_deterministic_algorithms(False)
    return ps, optimizer


def state_of(optimizer, ps, i):
    """Return the state of parameter i by name: M and what is packed into one tensor."""
    rank = len(ps[i - i % 2])  # of the pair's A, (r, n)
    state = optimizer.state[ps[i]]
    return {"M": state["M"], **lora_rite.unpack(state["packed"], rank)._asdict()}


def check(
    shapes, steps=2, dtype=torch.float32, runs=1, seed=0, change=lambda A, B: (A, B),
    spoil=lambda grads: None, compare_state=True, **options,
):  # fmt: skip
    """Compare steps of the kernel with PyTorch in the same dtype and in float64.

    runs: this many runs must be equal bit for bit. spoil: a function that changes the gradients.
    compare_state: also compare V, R_inv, M and rho, which suffer first from bad conditioning.
    Returns the parameters and the optimizer of the kernel.
    """
    pairs, grads = problem(shapes, steps, dtype, seed, change)
    spoil(grads)
    ps, ours = run(KERNEL, pairs, grads, dtype, **options)
    eager_ps, eager = run(EAGER, pairs, grads, dtype, **options)
    exact_ps, exact = run(EAGER, pairs, grads, torch.float64, **options)
    for i in range(len(ps)):
        assert_close(f"parameter {i}", ps[i], eager_ps[i], exact_ps[i])
        state = state_of(ours, ps, i)
        eager_state = state_of(eager, eager_ps, i)
        exact_state = state_of(exact, exact_ps, i)
        for name in ("step", "lr", "shrink", "skipped"):
            assert state[name] == eager_state[name]
        if compare_state:
            for name in ("V", "R_inv", "M", "rho"):
                assert_close(f"{name} of {i}", state[name], eager_state[name], exact_state[name])
    for _ in range(runs - 1):
        repeated_ps, repeated = run(KERNEL, pairs, grads, dtype, **options)
        assert is_equal(ps, repeated_ps), "two runs differ in their parameters"
        assert is_equal(ours.state_dict(), repeated.state_dict()), "two runs differ in their state"
    return ps, ours


@pytest.mark.parametrize(
    "shapes,options",
    [
        ([(1, 1, 300)], {"runs": 2}),
        ([(4, 70, 33)], {"steps": 3, "escape": True, "weight_decay": 0.1}),
        ([(3, 40, 50)], {"clip": 0.0, "betas": (0.0, 0.9), "dtype": torch.float16}),
        ([(16, 270, 20)], {"clip": 0.3, "eps": 1e-2, "escape": True}),
    ],
    ids=str,
)
def test_kernel(shapes, options):
    check(shapes, **options)


def test_kernel_beyond_rank_32():
    def no_gradient_of_B(grads):
        grads[0][1] = None

    check([(40, 50, 45)], steps=1, spoil=no_gradient_of_B)


@pytest.mark.parametrize("seed", range(6))
def test_kernel_on_random_shapes(seed):
    draw = random.Random(seed)
    shapes = [(draw.randint(1, 5), draw.randint(10, 90), draw.randint(10, 90))]
    options = {"clip": draw.choice([0.0, 1.0]), "weight_decay": draw.choice([0.0, 0.1])}
    check(shapes, seed=seed, escape=draw.random() < 0.3, **options)


def spoil_some(grads):
    grads[0][1].view(-1)[7] = -math.inf
    grads[1][2].view(-1)[7] = math.nan
    grads[1][0] = None


def columns_that_almost_vanish(A, B):
    """Return A, and a B for which B^T B has the eigenvalues 1, 0 and 9e-14 (m = 35) or 9e-12.

    inverse_root leaves out those below 1e-12 of the largest, so 9e-14 but not 9e-12.
    """
    smallest = 3e-7 if len(B) == 35 else 3e-6
    return A, torch.linalg.qr(B).Q * torch.tensor([1.0, smallest, 0.0])


def condition(A, B):
    """Return the same product B A with factors of condition number 1e8."""
    return A * torch.tensor([[1e-8], [1.0], [1.0]]), B * torch.tensor([1e8, 1.0, 1.0])


CASES = {
    "B is 0": {"change": lambda A, B: (A, 0 * B), "steps": 3},
    "both are 0": {"change": lambda A, B: (0 * A, 0 * B)},
    "A copies a row": {"change": lambda A, B: (A[[0, 0, 1]], B)},
    "almost 0": {"change": columns_that_almost_vanish, "steps": 1},
    "cond 1e8": {"change": condition, "compare_state": False},
    "none, NaN and inf": {"spoil": spoil_some, "weight_decay": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_on_bad_factors_and_gradients(case):
    ps, optimizer = check([(3, 20, 35), (3, 40, 12)], **CASES[case])
    skipped = [state_of(optimizer, ps, i)["skipped"].item() for i in range(4)]
    expected = [0, 1, 1, 0] if "NaN" in case else [0, 0, 0, 0]
    assert skipped == expected


def step_with_eigenvalues(w, seed):
    """Return a pair with A (8, 64), gradients, and Q: after a step, A's V is Q diag(w) Q^T."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, 8, generator=generator, dtype=torch.float64)).Q

    Q = orthonormal(8)
    ga = (orthonormal(64) * (w * 64).sqrt()) @ Q.T  # h = ga, as the columns of B are orthonormal
    pairs = [(orthonormal(64).T, torch.eye(20, 8).double())]
    return pairs, [[ga.T.float(), torch.zeros(20, 8)]], Q


def test_a_missing_gradient_is_not_a_bad_one():
    pairs, grads = problem([(2, 9, 7)], 1, torch.float32)
    pairs[0][0][0, 0] = math.nan
    grads[0][0] = None
    ps, optimizer = run(KERNEL, pairs, grads, torch.float32)
    assert state_of(optimizer, ps, 0)["skipped"] == 0


def test_kernel_over_twelve_decades():
    """V has eigenvalues from 1 to 1e-12, some equal: M^T M / n must be V (V^1/2 + eps)^-2."""
    w = torch.tensor([1.0, 1.0, 1.0, 1e-2, 1e-2, 1e-6, 1e-9, 1e-12]).double()
    pairs, grads, Q = step_with_eigenvalues(w, seed=0)

    def moment_of_A(use_kernel, dtype):
        ps, optimizer = run(use_kernel, pairs, grads, dtype, clip=0.0)
        return optimizer.state[ps[0]]["M"]  # (8, 64)

    M = moment_of_A(KERNEL, torch.float32)
    assert_close("M", M, moment_of_A(EAGER, torch.float32), moment_of_A(EAGER, torch.float64))
    expected = Q * (w.sqrt() / (w.sqrt() + 1e-6)) ** 2 @ Q.T
    assert torch.allclose(M @ M.T / 64, expected.to(M), atol=0.05)  # gradients are float32


@pytest.mark.parametrize("seed", [1, 3])
def test_jacobi_rotations_go_on_until_small_eigenvalues_are_right(seed):
    """Stopped at an off-diagonal part of 1e-6, M would be off by 14 to 33%."""
    pairs, grads, _ = step_with_eigenvalues(torch.logspace(0, -12, 8, dtype=torch.float64), seed)
    ps, ours = run(KERNEL, pairs, grads, torch.float32, clip=0.0)
    eager_ps, eager = run(EAGER, pairs, grads, torch.float32, clip=0.0)
    assert distance([ours.state[ps[0]]["M"]], [eager.state[eager_ps[0]]["M"]]) < 0.02


def test_kernel_rotates_both_rows_of_a_pair_by_one_angle():
    """If diagonals are equal, rounding decides between 45 and -45 degrees; both rows must agree."""
    signs = [
        [1, -1, -1, -1, -1, -1, -1, -1],
        [1, -1, 1, -1, -1, -1, -1, 1],
        [-1, -1, 1, 1, 1, 1, -1, 1],
        [-1, -1, -1, -1, 1, -1, -1, -1],
    ]
    pairs = [(torch.ones(8, 4), torch.eye(20, 8))]
    grads = [[torch.tensor(signs).float().T, torch.zeros(20, 8)]]
    ps, ours = run(KERNEL, pairs, grads, torch.float32, clip=0.0)
    eager_ps, eager = run(EAGER, pairs, grads, torch.float32, clip=0.0)
    M = ours.state[ps[0]]["M"]
    expected = eager.state[eager_ps[0]]["M"]
    assert torch.allclose(M, expected, atol=0.5)  # M is about 1e5, its rounding errors 0.1


def test_four_launches_take_all_pairs(monkeypatch):
    launches = []
    for name in ("gram", "root", "moment", "update"):
        original = getattr(kernel, f"{name}_kernel")

        class RecordingKernel:  # records the grid of a launch, and launches
            def __getitem__(self, grid, original=original, name=name):
                launches.append((name, *grid))
                return original[grid]

        monkeypatch.setattr(kernel, f"{name}_kernel", RecordingKernel())
    pairs, grads = problem([(2, 10 * i + 1, 300) for i in range(3)], 1, torch.float32)
    run(KERNEL, pairs, grads, torch.float32)
    assert launches == [("gram", 9), ("root", 6), ("moment", 6), ("update", 9)]


def test_kernel_and_pytorch_side_by_side():
    """Clip both by one norm, read lr from a tensor, and hand the state from one to the other."""
    pairs, grads = problem([(2, 30, 20), (2, 12, 40)], 3, torch.float32)

    def products(paths):
        """Take one step with each value of use_kernel. Return both products B A."""
        ps = [nn.Parameter(p.to(DEVICE, copy=True)) for pair in pairs for p in pair]
        ps[2].data = ps[2].data.T.contiguous().T  # not contiguous: PyTorch takes this pair
        saved = None
        for t, use_kernel in enumerate(paths):
            lr = 0.05 if t else torch.tensor(0.05, device=DEVICE)
            group = {"params": ps, "pair": True}
            optimizer = LoRARITE([group], lr, clip=0.5, use_kernel=use_kernel)
            if saved:
                optimizer.load_state_dict(saved)
            for p, g in zip(ps, grads[t]):
                p.grad = g.to(DEVICE)
            optimizer.step()
            saved = optimizer.state_dict()
        return [ps[1] @ ps[0], ps[3] @ ps[2]]

    expected = products([EAGER, EAGER, EAGER])
    assert distance(products([KERNEL, KERNEL, KERNEL]), expected) < 1e-6
    assert distance(products([KERNEL, EAGER, KERNEL]), expected) < 1e-6


@pytest.mark.parametrize("change", ["load", "cast parameters", "cast state"])
def test_the_state_follows_its_parameters(change):
    """The kernel reads raw addresses, so dtype, device and layout must be corrected before."""
    pairs, grads = problem([(3, 20, 12)], 2, torch.float32)
    dtype = torch.float32 if change == "cast state" else torch.float64
    options = {"escape": True, "weight_decay": 0.1}
    ps, optimizer = run(EAGER, pairs, grads[:1], dtype, "cpu", **options)
    if change == "cast parameters":
        for p in ps:
            p.data = p.data.float()
    elif change == "cast state":
        for state in optimizer.state.values():
            state.update(M=state["M"].T.contiguous().T, packed=state["packed"].float())
    elif change == "load":
        saved = optimizer.state_dict()
        ps = [nn.Parameter(p.detach().float()) for p in ps]
        optimizer = LoRARITE([{"params": ps, "pair": True}], use_kernel=EAGER)
        optimizer.load_state_dict(saved)

    # a step of the kernel equals one of PyTorch from the same state
    results = []
    for use_kernel in (KERNEL, EAGER):
        copied_ps, copied = copy.deepcopy((ps, optimizer))
        assert copied.use_kernel is EAGER
        copied.use_kernel = use_kernel
        for p, grad in zip(copied_ps, grads[1]):
            p.data = p.data.to(DEVICE)
            p.grad = grad.to(DEVICE)
        copied.step()
        for p in copied_ps:
            assert copied.state[p]["M"].dtype == torch.float32
        results.append(copied_ps)
    assert distance(*results) < 1e-6


def pair_of_zeros(r=4, dtype=torch.float32):
    return torch.zeros(r, 6, dtype=dtype), torch.zeros(5, r, dtype=dtype)


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_kernel_supports(rank, dtype):
    assert kernel.supports(*pair_of_zeros(rank, dtype))


def test_what_the_kernel_does_not_support():
    assert not kernel.supports(*pair_of_zeros(r=65))
    assert not kernel.supports(*pair_of_zeros(dtype=torch.float64))

    # two dtypes, two devices, not contiguous
    A, B = pair_of_zeros()
    assert not kernel.supports(A, B.half())
    assert not kernel.supports(A.to("meta"), B)
    assert not kernel.supports(A.T.contiguous().T, B)
    assert not kernel.supports(A, B.T.contiguous().T)

    # 2^31 elements
    small = torch.empty(2, 2, device="meta")
    huge = torch.empty(2, 2**30, device="meta")
    assert kernel.supports(small, small)
    assert not kernel.supports(huge, small)


def test_without_a_gpu_pytorch_is_the_default(monkeypatch):
    pairs, grads = problem([(3, 20, 12)], 2, torch.float32)
    by_default, _ = run(None, pairs, grads, torch.float32, "cpu")
    eager, _ = run(EAGER, pairs, grads, torch.float32, "cpu")
    assert is_equal(by_default, eager)
    monkeypatch.setattr(lora_rite, "kernel", None)
    with pytest.raises(ValueError, match="pip install triton"):
        run(KERNEL, pairs, grads, torch.float32)


TYPES = {
    "table_ptr": "*i64",
    "factor_of_program_ptr": "*i32",
    "bad_ptr": "*i32",
    "partial_ptr": "*fp64",
    "work_ptr": "*fp64",
    "scalar_ptr": "*fp64",
    "total_ptr": "*fp64",
    "matrix_ptr": "*fp32",
    "lr_ptr": "*fp64",
    "lr": "fp64",
    "log_beta1": "fp64",
    "log_beta2": "fp64",
    "eps": "fp64",
    "clip": "fp64",
    "weight_decay": "fp64",
}


def row_builds(arch, rank, dtype, aligned=True):
    """Return the cases of the kernels that read rows of the factors: launches 1 and 4."""
    R = max(16, triton.next_power_of_2(rank))
    constants = {
        "DTYPE": dtype,
        "ALIGNED": aligned,
        "RANK": rank,
        "R": R,
        "TILE": kernel.TILE_ROWS[R],
        "CHUNK": kernel.CHUNK_ROWS[R],
    }
    options = {"types": TYPES, "arch": arch, "num_warps": kernel.ROW_WARPS[R]}
    options["uses_tensor_cores"] = False  # float32 is not rounded to TF32
    return [
        Case("gram_kernel", constants, **options),
        Case("update_kernel", constants, **options),
    ]


def matrix_build(name, arch, rank, **constants):
    """Return the case of root_kernel or moment_kernel, which work on r x r matrices."""
    R = max(16, triton.next_power_of_2(rank))
    constants.update(RANK=rank, PADDED_RANK=triton.next_power_of_2(rank), R=R)
    return Case(
        name,
        constants,
        types=TYPES,
        arch=arch,
        num_warps=kernel.MATRIX_WARPS[R],
        num_stages=1,
        uses_tensor_cores=False,
        max_spilled=128,  # these kernels are small, so a few spills cost little
    )


def builds():
    """Return cases for several ranks on the GPU we tune on (sm_90), for rank 16 on two others."""
    cases = row_builds(90, 16, tl.float32)
    cases += row_builds(90, 20, tl.float32, aligned=False)
    cases += row_builds(90, 64, tl.bfloat16)
    cases.append(matrix_build("root_kernel", 90, 16))
    cases.append(matrix_build("root_kernel", 90, 64))
    cases.append(matrix_build("moment_kernel", 90, 64, ESCAPE=False))
    cases.append(matrix_build("moment_kernel", 120, 16, ESCAPE=True, lr_ptr=None))
    for arch in (80, 120):
        cases += row_builds(arch, 16, tl.bfloat16)
    return cases


def test_kernels_build():
    check_build("kernels.lora_rite", builds())


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 20, 64])
def test_kernel_on_the_gpu(rank, dtype):
    shapes = [(rank, 2048, 512), (rank, 300, 3001), (rank, 777, 777)]
    check(shapes, dtype=dtype, runs=3)
    check(shapes, dtype=dtype, escape=True, weight_decay=0.1, clip=0.3)


@gpu
def test_kernel_repeats_itself_and_never_waits():
    first = None
    pairs, grads = problem([(16, 2048, 2048), (16, 100, 3000), (16, 999, 37)], 3, torch.float32)
    for _ in range(50):  # a race would show as a difference between runs
        ps = [nn.Parameter(p.cuda()) for pair in pairs for p in pair]
        optimizer = LoRARITE([{"params": ps, "pair": True}], 0.05, escape=True)
        for t, step_grads in enumerate(grads):
            for p, g in zip(ps, step_grads):
                p.grad = g.cuda()
            # after the first step, which uploads tables, no step may wait for the GPU
            torch.cuda.set_sync_debug_mode("error" if t else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        if first is None:
            first = [p.detach().clone() for p in ps]
        assert is_equal(ps, first)


@gpu
def test_pairs_on_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pairs, grads = problem([(4, 30, 20), (4, 12, 40)], 3, torch.float32)

    def parameters(second, use_kernel):
        """Take three steps, with the second pair on the device `second`."""
        ps = [nn.Parameter(p.to("cuda:0", copy=True)) for p in pairs[0]]
        ps += [nn.Parameter(p.to(second, copy=True)) for p in pairs[1]]
        group = {"params": ps, "pair": True}
        optimizer = LoRARITE([group], 0.05, clip=0.3, use_kernel=use_kernel)
        for step_grads in grads:
            for p, g in zip(ps, step_grads):
                p.grad = g.to(p.device)
            optimizer.step()
        return [p.detach().cpu() for p in ps]

    for use_kernel in (KERNEL, EAGER):
        on_one = parameters("cuda:0", use_kernel)
        on_two = parameters("cuda:1", use_kernel)
        assert distance(on_two, on_one) < 1e-5
