"""kernels/laser.py: in Triton's interpreter here, for real on a GPU, and built for four GPUs."""

import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import laser
import train
from tests.build import Case, check_build
from tests.common import DEVICE, assert_close, gpu

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from kernels import laser as kernel  # noqa: E402

SHAPES = [  # Tq, Tk, H, Hkv, D
    (1, 1, 4, 2, 32),
    (17, 17, 2, 2, 64),
    (64, 64, 2, 1, 32),
    (65, 65, 2, 2, 16),
    (150, 150, 1, 1, 32),
    (1, 63, 4, 1, 16),
    (5, 40, 6, 2, 32),
    (33, 64, 2, 1, 128),
    (20, 20, 2, 2, 8),
]


def published(q, k, v):
    """Compute the paper's form, log(p exp(v - max v)) + max v, in the dtype of the inputs."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1)  # (B, H, Tk, D)
    v = v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    mask = laser.causal_mask(q.shape[2], k.shape[2], q.device)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # (B, H, Tq, Tk)
    largest = v.amax(2, keepdim=True)
    return (p @ (v - largest).exp()).log() + largest


def with_gradients(function, q, k, v, grad_out):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}


def kernel_inputs(Tq, Tk, H, Hkv, D, dtype, std=1.0, seed=0, B=2):
    """Return q, k, v as views of one projection, as in a model, and a non-contiguous gradient."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, Tk, H + 2 * Hkv, D, generator=generator).to(dtype).to(DEVICE)
    q, k, v = qkv.transpose(1, 2).split((H, Hkv, Hkv), 1)
    grad_out = torch.randn(B, H, D, Tq, generator=generator).to(dtype).to(DEVICE)
    return q[:, :, Tk - Tq :] * 2, k * 2, v * std, grad_out.transpose(2, 3)


def check(*shape, dtype, std=1.0, deterministic=True, change=None, seed=0, B=2):
    """Compare the output and the gradients with the reference in float64.

    shape: Tq, Tk, H, Hkv, D. change: a function that changes v in place. deterministic: new
    tensors are filled with NaN, and two runs on a GPU must be equal.
    """
    q, k, v, grad_out = kernel_inputs(*shape, dtype, std, seed, B)
    if change:
        change(v)
    exact_inputs = (t.double() for t in (q, k, v, grad_out))
    truth = with_gradients(laser.reference, *exact_inputs)
    eager_form = published if v.abs().max() < 8 else laser.reference
    eager = with_gradients(eager_form, q, k, v, grad_out)
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours = with_gradients(kernel.attention, q, k, v, grad_out)
        if deterministic and DEVICE == "cuda":
            repeated = with_gradients(kernel.attention, q, k, v, grad_out)
            for name in ours:
                assert torch.equal(ours[name], repeated[name]), f"{name}: not repeatable"
    finally:
        torch.use_deterministic_algorithms(False)
    for name in truth:
        assert ours[name].dtype == dtype
        assert_close(f"{name}, seed {seed}", ours[name], eager[name], truth[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_equals_reference(shape, dtype):
    check(*shape, dtype=dtype, B=2 if shape[0] < 20 else 1)


@pytest.mark.parametrize("seed", range(12))
def test_kernel_on_random_shapes(seed):
    rng = random.Random(seed)
    Hkv = rng.choice([1, 2])
    Tk = rng.randint(1, 70)
    Tq = rng.randint(1, Tk)
    H = Hkv * rng.choice([1, 3])
    D = rng.choice([16, 20, 32])
    dtype = rng.choice([torch.float32, torch.float16])
    std = rng.choice([0.02, 0.6, 1.0, 1.0, 5.0])
    check(Tq, Tk, H, Hkv, D, dtype=dtype, std=std, seed=seed, B=1)


CHANGES = {  # of values (B, Hkv, Tk, D) with mean 0 and standard deviation 1
    "std 40": lambda v: v[1].mul_(40),
    "plus or minus 80": lambda v: v[1].copy_(v[1].sign() * 80),
    "std 0.02": lambda v: v.mul_(0.02),
    "one outlier": lambda v: v[0, 0, -1, 0].fill_(110),
    "300 on both sides of a tile border": lambda v: v[1, 0, 15:17, 3].fill_(300),
    "one very negative key": lambda v: v[1, :, 7, 1].fill_(-1e4),
    "mean -4": lambda v: v.mul_(0.02).add_(-4),
    "mean 50": lambda v: v.mul_(0.1).add_(50),
    "range just below 4": lambda v: v.clamp_(-1.99, 1.99),
    "range above 4": lambda v: v.clamp_(-2.6, 2.6)[:, :, 3].fill_(-2.6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kernel_on_values_of_every_size(change):
    dtype = torch.float16 if "outlier" in change else torch.float32
    check(20, 34, 2, 1, 16, dtype=dtype, change=CHANGES[change])


def test_kernel_when_a_program_has_many_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "FALLBACK_PROGRAMS", 1)
    check(34, 40, 2, 1, 16, dtype=torch.float32, change=lambda v: v[1].mul_(40))


def check_causality(*shape, dtype, tolerance):
    """Change k and v at position t: outputs before t must not change.

    A change of v by 50 or more may switch the head to a slower path, which rounds differently.
    """
    # for values of this standard deviation: what is added to one of them
    v_changes = {4.0: [2.0], 0.02: [0.1], 1.0: [50.0, 110.0, 300.0, math.inf, math.nan]}
    t = shape[0] - 7
    for std, changes in v_changes.items():
        q, k, v, _ = kernel_inputs(*shape, dtype, std, B=1)
        changed_k = k.clone()
        changed_k[:, :, t] += 1
        before = kernel.attention(q, k, v)
        for change in changes:
            changed_v = v.clone()
            changed_v[:, :, t, 2] += change
            after = kernel.attention(q, changed_k, changed_v)
            assert after[:, :, :t].isfinite().all()
            assert torch.allclose(before[:, :, :t], after[:, :, :t], atol=tolerance * std)
            if change < 50:
                assert torch.equal(before[:, :, :t], after[:, :, :t])
            assert not torch.equal(before[:, :, t:], after[:, :, t:])
            if not math.isfinite(change):
                assert not after[:, 0, -1, 2].isfinite().any(), "NaN must reach the loss"


def test_kernel_does_not_see_the_future():
    check_causality(36, 36, 2, 1, 16, dtype=torch.float32, tolerance=1e-5)


def check_constants(dtype):
    q, k, v, _ = kernel_inputs(40, 40, 2, 1, 16, dtype, B=1)
    for size in (1e-3, 1.0, 77.0, 1e4):
        constant = (v[:, :, :1] * size).expand_as(v)
        out = kernel.attention(q, k, constant)
        assert torch.equal(out, constant.expand_as(q)), "equal values should come out exactly"
    one_key = kernel.attention(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert torch.equal(one_key, v[:, :, :1].expand_as(one_key))


def test_kernel_of_constant_values_is_exact():
    check_constants(torch.float32)


def test_kernel_decodes_as_it_prefills():
    q, k, v, _ = kernel_inputs(40, 40, 4, 2, 16, torch.float32, B=1)
    parts = []
    for start, end in ((0, 30), (30, 39), (39, 40)):
        parts.append(kernel.attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end]))
    assert torch.allclose(kernel.attention(q, k, v), torch.cat(parts, 2), atol=1e-5)


@triton.jit
def series_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """Store exp(x) - 1 and log(1 + x / 2) for the N values of x."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, kernel.expm1_series(x))
    tl.store(out_ptr + N + i, kernel.log1p_series(x / 2))


def test_series_are_as_accurate_as_float32():
    x = torch.linspace(-1 / 8, 1 / 8, 256, device=DEVICE)
    out = torch.empty(2, 256, device=DEVICE)
    series_kernel[(1,)](x, out, N=256)
    exact = torch.stack([x.double().expm1(), (x.double() / 2).log1p()])
    assert ((out - exact) / exact).abs().max() < 3e-7


def test_kernel_is_an_operator():
    q, k, v, _ = kernel_inputs(9, 9, 2, 1, 16, torch.float32)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel.laser, (*inputs, 0.25), test_utils=tests)


def test_kernel_compiles_as_one_graph():
    *inputs, grad_out = kernel_inputs(9, 9, 2, 1, 16, torch.float32)
    compiled = torch.compile(kernel.attention, fullgraph=True, backend="aot_eager")
    ours = with_gradients(compiled, *inputs, grad_out)
    eager = with_gradients(kernel.attention, *inputs, grad_out)
    for name in eager:
        assert torch.allclose(ours[name], eager[name], atol=1e-6), name


def test_the_path_of_a_cuda_tensor(monkeypatch):
    """The kernel, if it can; fake tensors have a device and a shape, but no memory."""
    monkeypatch.setattr(kernel, "attention", lambda q, k, v: "kernel")
    monkeypatch.setattr(laser, "attention_torch", lambda q, k, v: "torch")

    def path(D, dtype):
        with FakeTensorMode():
            q = torch.empty(1, 2, 3, D, dtype=dtype, device="cuda")
            return laser.attention(q, q, q)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert path(128, dtype) == "kernel"
    assert path(128, torch.float64) == "torch"
    with pytest.warns(UserWarning, match="slower: head dim > 128"):
        assert path(256, torch.bfloat16) == "torch"
    monkeypatch.setattr(laser, "kernel", None)
    with pytest.warns(UserWarning, match="slower: pip install triton"):
        assert path(64, torch.bfloat16) == "torch"


def test_kernel_refuses_what_it_cannot_index():
    q = torch.empty(1, device=DEVICE).expand(1, 1, 2**27, 16)
    with pytest.raises(ValueError, match="31 bits"):
        kernel.attention(q, q, q)
    q = torch.empty(1, device=DEVICE).expand(2**15, 2, 1, 16)
    with pytest.raises(ValueError, match="16 bits"):
        kernel.attention(q, q, q)
    short = torch.ones(1, 1, 3, 16, device=DEVICE)
    with pytest.raises(ValueError, match="Tq <= Tk"):
        kernel.attention(short, short[:, :, :2], short[:, :, :2])


@pytest.mark.parametrize("B, Tq", [(0, 3), (2, 0), (0, 0)])
def test_kernel_of_nothing(B, Tq):
    q = torch.ones(B, 2, Tq, 16, device=DEVICE, requires_grad=True)
    k = torch.ones(B, 1, 3, 16, device=DEVICE, requires_grad=True)
    out = kernel.attention(q, k, k)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


class FakeKernel:
    """Stands for a Triton kernel: records each launch and returns itself as the compiled binary."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.calls.append((grid, arguments, options))
            return self

        return call


def test_launch_compiles_once_for_each_kind_of_arguments():
    fake = FakeKernel()
    memory = torch.zeros(65, dtype=torch.float32)
    tensors = (memory[:64], memory[:32])

    def launch(tensors=tensors, numbers=(3, 0.5), D=16, num_warps=8):
        kernel.launch(fake, (5, 7), tensors, numbers, num_warps=num_warps, D=D)
        grid, arguments, _ = fake.calls[-1]
        assert all(a is b for a, b in zip(arguments, tensors))
        assert arguments[2:] == (*numbers, D)
        return grid

    # a first launch goes through Triton with a 2-D grid, later ones to the binary with a 3-D grid
    assert launch() == (5, 7)
    _, _, options = fake.calls[0]
    assert options == {"num_warps": 8, "num_stages": 3}
    assert launch() == (5, 7, 1), "the second launch was compiled again"
    for change in (
        {"numbers": (4, 0.5)},
        {"D": 32},
        {"num_warps": 4},
        {"tensors": (memory[1:], memory[:32])},  # not aligned to 16 bytes
        {"tensors": (memory[:64], memory[:32].half())},
    ):
        assert launch(**change) == (5, 7), f"{change} needs another binary"
        assert launch(**change) == (5, 7, 1)


def test_second_derivatives_are_refused():
    """The backward kernel has no gradient; without the error, they would be wrong by 11 to 51%."""
    q, k, v, _ = kernel_inputs(9, 9, 2, 1, 16, torch.float32)
    q = q.detach().requires_grad_()
    loss = kernel.attention(q, k, v).sum() + q.pow(3).sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, q, create_graph=True)


# -- built ahead of time ---------------------------------------------------------------------------

FP32_POINTERS = ("lse_ptr", "delta_ptr", "center_ptr", "shift_ptr")
EXP_V_POINTERS = ("x_ptr", "exp_v_ptr", "grad_x_ptr", "dv_ptr")


def pointer_types(dtype):
    """Return the Triton types of those pointers whose dtype is not that of q."""
    types = {name: "*fp32" for name in FP32_POINTERS}
    types["is_wide_ptr"] = "*i32"
    exp_dtype = "bf16" if dtype == "bf16" else "fp32"
    types.update({name: f"*{exp_dtype}" for name in EXP_V_POINTERS})
    return types


def attention_cases(dtype, D, archs):
    """Yield a Case per attention kernel and GPU; archs are compute capabilities: 90 is 9.0."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    names = ("attn_fwd_kernel", "attn_bwd_dq_kernel", "attn_bwd_dkdv_kernel")
    for arch in archs:
        configs = kernel.get_configs(torch_dtype, D, is_hopper=arch == 90)
        for name, config in zip(names, configs):
            constants = {"D": D, **config}
            num_warps = constants.pop("num_warps")
            num_stages = constants.pop("num_stages")
            types = pointer_types(dtype)
            yield Case(name, constants, types, dtype, arch, num_warps, num_stages)


def elementwise_and_fallback_cases():
    """Yield a Case for each kernel around attention, with the launch options of calls."""
    constants = {"D": 128, "BLOCK_T": kernel.BLOCK_T}
    exp_constants = {"D": 128, "SLICE": kernel.SLICE, "BLOCK_T": 4 * kernel.BLOCK_T}
    types = pointer_types("bf16")
    yield Case("exp_kernel", exp_constants, types, num_warps=8)
    for name in ("log_kernel", "grad_x_kernel", "grad_v_kernel"):
        yield Case(name, constants, types)
    for name in ("fallback_fwd_kernel", "fallback_bwd_kernel"):
        yield Case(name, constants, types, num_warps=8)


def test_kernels_build_for_four_gpus():
    cases = [  # 80: A100, 90: H100 and H200, 100: B200, 120: RTX 50
        *attention_cases("bf16", 128, (90, 100)),
        *attention_cases("bf16", 64, (80,)),
        # sm_120 has the least shared memory, and exp(v) takes more of it than with bf16
        *attention_cases("fp16", 128, (120,)),
        *attention_cases("fp32", 64, (120,)),
        *elementwise_and_fallback_cases(),
    ]
    reports = check_build("kernels.laser", cases)
    for report in reports:
        uses_tensor_cores = report["tensor_core_instructions"] > 0
        assert uses_tensor_cores == ("tf32" in report["constants"]), report


# -- on a GPU --------------------------------------------------------------------------------------

BOTH_WAYS = pytest.mark.parametrize("deterministic", [False, True], ids=["cudnn", "triton"])


LARGE_SHAPES = [*SHAPES, (127, 127, 2, 2, 32), (1, 127, 4, 1, 32), (5, 100, 6, 2, 64)]
LARGE_SHAPES += [(1000, 1000, 4, 2, 64), (777, 777, 2, 2, 128)]


@gpu
@BOTH_WAYS
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_kernel_on_the_gpu(shape, deterministic):
    check(*shape, dtype=torch.bfloat16, deterministic=deterministic)


@gpu
@BOTH_WAYS
@pytest.mark.parametrize("change", CHANGES)
def test_kernel_on_values_of_every_size_on_the_gpu(change, deterministic):
    shape = (600, 600, 4, 2, 64)
    check(*shape, dtype=torch.bfloat16, change=CHANGES[change], deterministic=deterministic)


def relative_errors(function, definition, inputs):
    """Return the relative errors of output and gradients to the definition in float64."""
    ours = with_gradients(function, *inputs)
    truth = with_gradients(definition, *(t.double() for t in inputs))
    return {name: (ours[name].double() - t).norm() / t.norm() for name, t in truth.items()}


@gpu
@BOTH_WAYS
def test_kernel_in_bfloat16(deterministic):
    """Causality, constant values and small values, at the precision of bfloat16."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        check_causality(300, 300, 4, 2, 64, dtype=torch.bfloat16, tolerance=0.05)
        check_constants(torch.bfloat16)
        for std in (0.005, 0.02, 0.1):
            inputs = kernel_inputs(512, 512, 2, 2, 64, torch.bfloat16, std)
            laser_errors = relative_errors(laser.attention, laser.reference, inputs)
            softmax = train.softmax_attention
            softmax_errors = relative_errors(softmax, softmax, inputs)
            for name in ("out", "dq"):
                assert laser_errors[name] < 3 * softmax_errors[name], (std, name)
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
def test_kernel_beyond_2_to_the_31():
    shape = (2**13 + 8, 1024, 2, 128)
    q, k, v = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3)
    )
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            whole = laser.attention(q, k, v)[-1:]
            last = laser.attention(q[-1:], k[-1:], v[-1:])
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(whole, last)


@gpu
def test_kernel_compiles_as_one_graph_on_the_gpu():
    q, k, v, grad_out = kernel_inputs(200, 200, 4, 2, 64, torch.bfloat16)
    compiled = torch.compile(laser.attention, fullgraph=True)
    ours = with_gradients(compiled, q, k, v, grad_out)
    eager = with_gradients(laser.attention, q, k, v, grad_out)
    for name in eager:
        assert torch.allclose(ours[name].float(), eager[name].float(), atol=0.02, rtol=0.02)
    for T in (90, 130, 77):  # torch.compile makes T symbolic at the second length
        out = compiled(q[:, :, :T], k[:, :, :T], v[:, :, :T])
        assert torch.allclose(out.float(), laser.attention(q, k, v)[:, :, :T].float(), atol=0.05)


@gpu
def test_kernel_on_unaligned_memory():
    """The same shape needs one compiled kernel with 16-byte alignment and another one without."""
    memory = torch.randn(3, 2 * 64 * 4 * 64 + 1, dtype=torch.float16, device="cuda")
    q, k, v = (t[1:].view(2, 64, 4, 64).transpose(1, 2) for t in memory)
    aligned = laser.attention(q.clone(), k.clone(), v.clone())
    assert torch.equal(laser.attention(q, k, v), aligned)


@gpu
def test_kernel_in_a_cuda_graph():
    q, k, v, grad_out = kernel_inputs(200, 200, 4, 2, 64, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.autograd.grad(laser.attention(*leaves), leaves, grad_out)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = laser.attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad_out)

    # now the values have a wide range, which the replayed graph must leave to the fallback
    v.mul_(100)
    leaves[2].data.copy_(v)
    graph.replay()
    expected = with_gradients(laser.attention, q, k, v, grad_out)
    for name, captured in zip(("out", "dq", "dk", "dv"), (out, *gradients)):
        assert torch.allclose(captured.float(), expected[name].float(), rtol=0.02, atol=0.02)
