"""kernels/simplicial.py and kernels/simplicial_hopper.py, interpreted where there is no GPU."""

import contextlib
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import simplicial
from tests.build import Case, check_build, check_reports
from tests.common import DEVICE, assert_close, gpu
from tests.test_simplicial import (
    EMPTY,
    GRADIENTS,
    NONFINITE,
    by_pairs,
    check_gradients_of_nonfinite,
    check_windows,
    make_inputs,
)

pytest.importorskip("triton")
from kernels import simplicial as kernel  # noqa: E402


def reference_with_gradients(inputs, do, w1, w2):
    """Return o and the gradients of q, k, v, k2, v2, computed one head at a time to save memory."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    q, *keys_and_values = inputs
    B, H = do.shape[:2]
    Hkv = keys_and_values[0].shape[1]
    o = torch.zeros_like(do)
    gradients = [torch.zeros_like(t) for t in inputs]
    for b, h in itertools.product(range(B), range(H)):
        kv_head = h * Hkv // H
        shared = [t[b : b + 1, kv_head : kv_head + 1] for t in keys_and_values]
        head_o = simplicial.reference(q[b : b + 1, h : h + 1], *shared, w1=w1, w2=w2)
        o[b, h] = head_o.detach()[0, 0]
        head_gradients = torch.autograd.grad(head_o, inputs, do[b : b + 1, h : h + 1])
        for total, head_gradient in zip(gradients, head_gradients):
            total += head_gradient
    return [o, *gradients]


KERNELS = "forward", "dq_dk2_dv2", "dk_dv"


@contextlib.contextmanager
def use_tiles(*sizes):
    """Launch with tiles of (rows, block_n): one size for all kernels, or a size for each of three.

    On a GPU this does nothing, because large tiles of float32 take minutes to compile there.
    """
    if DEVICE == "cuda" or not sizes:
        yield
        return
    if len(sizes) == 1:
        sizes = sizes * len(KERNELS)
    configs = {}
    for name, size in zip(KERNELS, sizes):
        configs[name] = kernel.Config(*size, num_warps=4, num_stages=1)
    kernel.get_options.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "get_config", lambda name, *_: configs[name])
        yield
    kernel.get_options.cache_clear()


def run_kernels(inputs, do, w1, w2, *tiles):
    """Return o, the gradients of q, k, v, k2, v2, and lse. tiles: as in use_tiles."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    with use_tiles(*tiles):
        o, lse = kernel.attention(*inputs, w1, w2)
        return [o.detach(), *torch.autograd.grad(o, inputs, do), lse]


def check_kernels(Tq, Tk, H, Hkv, D, w1, w2, dtype, *tiles, B=2, Tk2=None, size=1.0, shift=0):
    """Compare outputs, gradients and lse with float64; on a GPU, two runs must be equal.

    tiles: as in use_tiles. size: multiplies the logits. shift: what channel 0 adds to them.
    """
    shape = Tq, Tk, H, Hkv, D, B, Tk2
    inputs = make_inputs(*shape, dtype, seed=Tq * w1 + w2, device=DEVICE)
    inputs[0] = inputs[0] * size
    if shift:
        inputs[0][..., 0] = shift * D**0.5
        inputs[1][..., 0] = 1
        inputs[3][..., 0] = 1
    do = torch.randn(B, D, Tq, H, generator=torch.Generator().manual_seed(1))
    do = do.to(DEVICE, dtype).permute(0, 3, 2, 1)
    truths = reference_with_gradients([t.double() for t in inputs], do.double(), w1, w2)
    eager = reference_with_gradients(inputs, do, w1, w2)

    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    try:
        first = run_kernels(inputs, do, w1, w2, *tiles)
        if DEVICE == "cuda":  # in the interpreter, programs run one after the other
            second = run_kernels(inputs, do, w1, w2)
            for name, ours, repeated in zip(GRADIENTS, first, second):
                assert torch.equal(ours, repeated), f"{name}: two runs differ"
    finally:
        torch.use_deterministic_algorithms(False)
    for name, ours, expected, truth in zip(GRADIENTS, first, eager, truths):
        assert_close(name, ours, expected, truth)

    # the natural logarithm of the sum of exp(logit) over all pairs, at three queries
    lse = first[6]
    exact_inputs = [t.cpu().double() for t in inputs]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for b, h, i in (0, 0, 0), (B - 1, H - 1, Tq - 1), (0, H // 2, Tq // 2):
        truth = by_pairs(*exact_inputs, w1, w2, b, h, i)[1]
        assert abs(lse[b, h, i].item() - truth) < tolerance * max(1, abs(truth))

    # a single pair has probability 1, whatever q, k and k2 are
    if min(w1, Tk) == min(w2, Tk2 or Tk) == 1:
        for n in (1, 2, 4):
            assert not first[n].any(), f"{GRADIENTS[n]} must be exactly 0"


CASES = [  # Tq, Tk, H, Hkv, D, w1, w2
    (1, 1, 1, 1, 16, 1, 1),
    (17, 17, 2, 2, 16, 1, 1),
    (17, 17, 6, 2, 16, 3, 8),
    (40, 40, 2, 1, 32, 12, 33),
    (64, 64, 1, 1, 32, 64, 5),
    (34, 34, 1, 1, 16, 20, 33),
    (127, 127, 1, 1, 16, 64, 3),
    (3, 90, 4, 1, 32, 40, 20),
    (30, 70, 2, 1, 16, 5, 40),
    (65, 65, 1, 1, 64, 50, 1),
    (48, 48, 1, 1, 16, 32, 16),
    # a key just outside the window of a tile's first or last query
    (48, 48, 1, 1, 16, 39, 16),
    (42, 48, 1, 1, 16, 39, 16),
    # a tile is one position
    (9, 9, 16, 1, 16, 5, 5),
]


@pytest.mark.parametrize("Tq,Tk,H,Hkv,D,w1,w2", CASES)
def test_kernels(Tq, Tk, H, Hkv, D, w1, w2):
    check_kernels(Tq, Tk, H, Hkv, D, w1, w2, torch.float32, (128, 32), B=1)


@pytest.mark.parametrize(
    "dtype,size", [(torch.float16, 1.0), (torch.float16, 4.0), (torch.float32, 30.0)], ids=str
)
def test_kernels_at_large_logits(dtype, size):
    check_kernels(24, 24, 2, 1, 16, 16, 7, dtype, (64, 32), B=1, size=size)


@pytest.mark.parametrize(
    "dtype,shift", [(torch.float16, -20), (torch.float16, 20), (torch.float32, -95)], ids=str
)
def test_kernels_where_exp_leaves_its_dtype(dtype, shift):
    shape = 24, 24, 2, 1, 16, 16, 7
    check_kernels(*shape, dtype, (64, 32), B=1, shift=shift)


def test_kernels_over_long_windows():
    check_kernels(100, 100, 1, 1, 16, 512, 8, torch.float32, (128, 64), B=1)


def test_kernels_over_many_tiles_and_buffers(monkeypatch):
    """68 tiles see a key, so dk is two sums. A position of k2 is in the buffers of three pieces."""
    monkeypatch.setattr(kernel, "PIECE", 4)
    tiles = (128, 32), (64, 32), (16, 32)
    check_kernels(17, 17, 4, 1, 16, 17, 9, torch.float32, *tiles, B=1)


@pytest.mark.parametrize("seed", range(5))
def test_kernels_on_random_shapes(seed):
    rng = random.Random(seed)
    Tq = rng.randint(1, 25)
    Hkv = rng.randint(1, 2)
    H = Hkv * rng.choice([1, 2, 3, 5])
    Tk = Tq + rng.choice([0, 0, 7, 30])
    Tk2 = Tq + rng.choice([0, 0, 3, 20])
    tiles = [(2 ** rng.randint(5, 7), 2 ** rng.randint(4, 6)) for _ in range(3)]
    w1 = rng.randint(1, 40)
    w2 = rng.randint(1, 40)
    check_kernels(Tq, Tk, H, Hkv, 16, w1, w2, torch.float32, *tiles, B=1, Tk2=Tk2)


# -- one row does not depend on another ------------------------------------------------------------


def test_kernel_sees_only_its_windows():
    def forward(*inputs, w1, w2):
        with use_tiles((128, 16)):
            return kernel.attention(*inputs, w1, w2)[0]

    check_windows(forward, DEVICE, T=30)


@pytest.mark.parametrize("dtype,w1,w2,g", [(torch.float32, 9, 4, 1), (torch.float16, 3, 34, 2)])
def test_gradients_of_what_is_not_finite(dtype, w1, w2, g):
    """w2 = 34 needs two tiles of offsets; as w2 > w1, k2 and v2 trade places with k and v."""

    def gradients(inputs, do, w1, w2):
        return run_kernels(inputs, do, w1, w2, (128, 16))[:6]

    T = 24 if DEVICE == "cpu" else 70
    cases = NONFINITE[1::2] if g == 2 else NONFINITE[:1] + NONFINITE[2:]
    check_gradients_of_nonfinite(gradients, DEVICE, dtype, 16, T, w1, w2, g, cases)


def two_heads(dtype=torch.float32):
    """Return q, k, v, k2, v2 and a gradient of the output, all (1, 2, 24, 16)."""
    inputs = make_inputs(24, 24, 2, 2, 16, 1, dtype=dtype, device=DEVICE)
    return inputs, torch.ones(1, 2, 24, 16, device=DEVICE, dtype=dtype)


def run_two_heads(inputs, do, w1=5, w2=3):
    return run_kernels(inputs, do, w1, w2, (128, 16))


def assert_changed(before, after, positions, name="o"):
    """Assert that tensors (1, 2, 24, 16) differ at these positions of head 1 and nowhere else."""
    expected = torch.zeros(2, 24, dtype=torch.bool)
    expected[1, positions] = True
    is_changed = (before != after).any(-1)[0].cpu()
    assert torch.equal(is_changed, expected), name


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bad_gradient_stays_with_its_query(value):
    """The gradient of output 12 is inf or NaN: only the keys that query 12 sees get NaN."""
    inputs, do = two_heads()
    before = run_two_heads(inputs, do)
    do[0, 1, 12, 2] = value
    after = run_two_heads(inputs, do)
    windows = (0, 1, 5, 5, 3, 3)  # o does not change, dq only at 12; dk, dv and dk2, dv2 in windows
    for name, a, b, w in zip(GRADIENTS, before, after, windows):
        seen = slice(13 - w, 13)  # the last w positions up to 12
        assert_changed(a, b, seen, name)
        assert b[0, 1, seen].isnan().all()


def test_scores_that_overflow_float16_stay_with_their_query():
    """q k2 overflows although both are finite; neighbors in the tile keep their bits."""
    inputs, do = two_heads(torch.float16)
    before = run_two_heads(inputs, do)
    inputs[0][0, 1, 12] = 60000.0
    after = run_two_heads(inputs, do)
    windows = (1, 1, 5, 5, 3, 3)  # of o, dq, dk, dv, dk2, dv2, each up to position 12
    for name, a, b, w in zip(GRADIENTS, before, after, windows):
        assert_changed(a, b, slice(13 - w, 13), name)


def test_a_query_whose_scores_are_all_minus_infinity():
    """Its output is NaN, as in the reference, and not 0."""
    inputs, do = two_heads()
    inputs[1][..., 0] = 1  # k and k2, so the query's -inf is in each score
    inputs[3][..., 0] = 1
    before = run_two_heads(inputs, do)
    inputs[0][0, 1, 12, 0] = -float("inf")
    after = run_two_heads(inputs, do)
    o, dq = after[:2]
    lse = after[6]
    assert_changed(before[0], o, 12)
    assert o[0, 1, 12].isnan().all()
    assert dq[0, 1, 12].isnan().all()
    assert not lse[0, 1, 12].isfinite()


@pytest.mark.parametrize("swap", [False, True])
def test_a_key_of_weight_zero_has_a_bad_gradient(swap):
    """Scores of -inf hide an infinite key in the forward pass, but 0 * inf is the gradient.

    swap: k2 and v2 take the place of k and v.
    """
    (q, k, v, k2, v2), do = two_heads()
    q[..., 0] = 1.0
    k2[..., 0] = -1.0
    inputs = (q, k2, v2, k, v) if swap else (q, k, v, k2, v2)
    windows = (1, 5) if swap else (5, 1)
    before = run_two_heads(inputs, do, *windows)
    k[0, 1, 12, 0] = float("inf")  # the score of its pairs is -inf
    o, dq = run_two_heads(inputs, do, *windows)[:2]
    assert o[0, 1, 13:17].isfinite().all()
    assert_changed(before[1], dq, slice(12, 17), "dq")
    assert dq[0, 1, 12:17].isnan().all()


# -- the operator ----------------------------------------------------------------------------------


def test_operator():
    inputs = make_inputs(5, 5, 2, 1, 16, 1, dtype=torch.float32, device=DEVICE)
    inputs = [t.contiguous().requires_grad_() for t in inputs]
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(kernel.simplicial_op, (*inputs, 4, 3), test_utils=tests)

    def attention(*inputs, w1=4):
        return kernel.attention(*inputs, w1, 3)[0]

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), attention(*inputs))
    longest = attention(*inputs, w1=10**30)
    assert torch.equal(longest, attention(*inputs, w1=5)), "w1 should be cut to Tk = 5"
    check_kernels(7, 9, 4, 2, 16, 4, 3, torch.float32)


def test_second_derivatives_raise():
    inputs = make_inputs(5, 5, 2, 1, 16, 1, dtype=torch.float32, device=DEVICE)
    inputs = [t.requires_grad_() for t in inputs]
    o = kernel.attention(*inputs, 4, 3)[0]
    grads = torch.autograd.grad(o.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(grad.sum() for grad in grads), inputs)


@pytest.mark.parametrize("B,H,Hkv,Tq,Tk", EMPTY)
def test_empty_inputs_give_empty_results(B, H, Hkv, Tq, Tk):
    q = torch.randn(B, H, Tq, 16, device=DEVICE, requires_grad=True)
    keys = [torch.randn(B, Hkv, Tk, 16, device=DEVICE, requires_grad=True) for _ in range(4)]
    o, lse = kernel.attention(q, *keys, 3, 2)
    assert o.shape == q.shape
    assert lse.shape == q.shape[:3]
    for t, grad in zip((q, *keys), torch.autograd.grad(o.sum(), (q, *keys))):
        assert grad.shape == t.shape
        assert not grad.any()


def test_refuses_what_does_not_fit():
    inputs = make_inputs(5, 6, 4, 2, 16, dtype=torch.float32)
    for n, change in (
        (0, lambda t: t[0]),
        (0, lambda t: t[:, :3]),
        (0, lambda t: t.double()),
        (1, lambda t: t[:, :, 1:]),
        (1, lambda t: t.half()),
        (2, lambda t: t[:1]),
        (3, lambda t: t[:, :1]),
        (4, lambda t: t[..., :8]),
    ):
        changed = list(inputs)
        changed[n] = change(changed[n])
        with pytest.raises(ValueError, match="Hkv a divisor of H"):
            kernel.attention(*changed, 4, 3)
    for w1, w2 in (0, 3), (4, -1):
        with pytest.raises(ValueError, match=f"w1 = {w1} and w2 = {w2}"):
            kernel.attention(*inputs, w1, w2)
    for shrink in (lambda t: t[:, :, :0], lambda t: t[:, :, :4], lambda t: t[:, :0]):
        with pytest.raises(ValueError, match="Hkv a divisor of H"):
            kernel.attention(inputs[0], *map(shrink, inputs[1:]), 4, 3)
    with pytest.raises(ValueError, match="one of .16, 32, 64, 128."):
        kernel.attention(*(t[..., :8] for t in inputs), 4, 3)


def test_refuses_what_it_cannot_count():
    for heads, group, T, D in (1, 64, 2**18, 128), (2**16, 1, 1, 16), (2**15, 1, 2**16, 16):
        with pytest.raises(ValueError, match="too many for one call"):
            kernel.check_size(heads, group, T, T, T, D)


def test_the_path_of_a_cuda_tensor(monkeypatch):
    """The kernel, if it can; fake tensors have a device and a shape, but no memory."""

    def fake_kernel(q, k, v, k2, v2, *windows):
        assert {t.dtype for t in (k, v, k2, v2)} == {q.dtype}
        return [("kernel", windows)]

    monkeypatch.setattr(kernel, "attention", fake_kernel)
    monkeypatch.setattr(simplicial, "attention_torch", lambda *inputs, w1, w2: ("torch", (w1, w2)))

    def path(D, dtype):
        with FakeTensorMode():
            q = torch.empty(1, 2, 3, D, dtype=dtype, device="cuda")
            return simplicial.attention(q, *[q.float()] * 4, w1=5, w2=3)

    for dtype in DTYPES:
        assert path(128, dtype) == ("kernel", (5, 3))
    assert path(128, torch.float64) == ("torch", (5, 3))
    with pytest.warns(UserWarning, match="no heads of width 24"):
        assert path(24, torch.bfloat16) == ("torch", (5, 3))
    monkeypatch.setattr(simplicial, "kernel", None)
    with pytest.warns(UserWarning, match="slower: pip install triton"):
        assert path(64, torch.bfloat16) == ("torch", (5, 3))


# -- compiled for GPUs that are not here -----------------------------------------------------------


BUILDS = [("bf16", 128, 90), ("bf16", 128, 80), ("fp32", 64, 90)]


def plain_case(kernel_name, dtype, D, arch):
    """Return what a call with w2 = 32 and one query head per KV head launches, as a Case."""
    options_name = "forward" if kernel_name == "repair" else kernel_name
    config = kernel.HOPPER[options_name, D] if arch == 90 else kernel.OTHERS[options_name]
    if dtype == "fp32":
        config = kernel.FLOAT32
    # a tile has a row for each of QUERIES queries and each of OFFSETS positions of k2 and v2
    constants = {"GROUP": 1, "D": D, "QUERIES": config.rows // 32, "OFFSETS": 32}
    if config.rows < 32:
        constants.update(QUERIES=1, OFFSETS=config.rows)
    constants.update(BLOCK_N=config.block_n, PRECISION="ieee" if dtype == "fp32" else "tf32")
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "is_seen_ptr": "*i8"}
    if kernel_name == "dq_dk2_dv2":
        types.update(dk2_ptr="*fp32", dv2_ptr="*fp32")
    for descriptor in ("k_blocks", "v_blocks"):
        types[descriptor] = f"tensordesc<{dtype}[{config.block_n}, {D}]>"
    spilled = 128
    if arch == 90:  # such tiles were measured to be faster than those that spill nothing
        spilled = 600 if kernel_name == "forward" else 250
    return Case(
        f"{kernel_name}_kernel",
        constants,
        types,
        dtype,
        arch,
        config.num_warps,
        config.num_stages,
        config.maxnreg,
        max_spilled=spilled,
        uses_tensor_cores=dtype != "fp32",
    )


def test_kernels_build():
    cases = [plain_case(name, *build) for name in KERNELS for build in BUILDS]
    cases.append(plain_case("forward", "bf16", 64, 90))
    cases.append(plain_case("repair", "fp32", 64, 90))  # it has the code of forward_kernel
    flags = {"is_bad_ptr": "*i8", "delta_ptr": "*fp32"}
    cases.append(Case("clean_kernel", {"D": 128, "BLOCK_T": kernel.BLOCK_T}, flags))
    buffers = {"dk2_buffers_ptr": "*fp32", "dv2_buffers_ptr": "*fp32", "is_seen_ptr": "*i8"}
    cases.append(Case("sum_buffers_kernel", {"D": 128, "BLOCK_T": kernel.BLOCK_T}, buffers))
    check_build("kernels.simplicial", cases)


def test_hopper_kernel_builds():
    hopper = pytest.importorskip("kernels.simplicial_hopper")
    cases = []
    for D, has_small_block in (128, True), (64, False):
        config = hopper.CONFIGS[D]
        types = {"lse_ptr": "*fp32"}

        # TMA descriptors of the blocks of keys and values
        for name, size in ("blocks", config["BLOCK_N"]), ("small", hopper.SMALL_BLOCK.value):
            kind = f"tensordesc<bf16[1, {size}, {D}],{hopper.key_layout()!r}>"
            types.update({f"k_{name}": kind, f"v_{name}": kind})

        # one query head per KV head, and w2 = 32, of which 2 queries fill a tile of 64 rows
        constants = {**config, "GROUP": 1, "D": D, "QUERIES": 2, "OFFSETS": 32}
        constants["HAS_SMALL_BLOCK"] = has_small_block
        case = Case("hopper_kernel", constants, types, num_stages=1, uses_tensor_cores=True)
        cases.append(case)
    check_build("kernels.simplicial_hopper", cases)


def test_a_hopper_kernel_that_does_not_build_raises(monkeypatch):
    hopper = pytest.importorskip("kernels.simplicial_hopper")
    one_multiprocessor = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: one_multiprocessor)

    # hopper_kernel[grid] of a launch fails with a KeyError, as a failed build would
    monkeypatch.setattr(hopper, "hopper_kernel", {})
    options = {**hopper.CONFIGS[64], "GROUP": 1, "QUERIES": 2}
    t = torch.zeros(1, 1, 16, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="Triton.*or remove kernels/simplicial_hopper.py"):
        hopper.launch(options, t, t, t, t, t, t, t[..., 0].float(), (16, 16, 16, 16, 16))


def test_build_checks():
    """A report fails that has too much shared memory, spills registers or rounds to TF32."""
    good = {"shared": 99 * 1024, "spilled": 8, "tensor_core_instructions": 0, "has_tf32": False}
    case = Case("kernel", arch=120, max_spilled=8, uses_tensor_cores=False)
    check_reports([case], [good])
    bad = {"shared": 99 * 1024 + 1, "spilled": 9, "tensor_core_instructions": 1, "has_tf32": True}
    for key, value in bad.items():
        with pytest.raises(AssertionError):
            check_reports([case], [{**good, key: value}])
    with pytest.raises(AssertionError, match="no tensor cores"):
        check_reports([Case("kernel", arch=120, uses_tensor_cores=True)], [good])


# -- on a GPU --------------------------------------------------------------------------------------

LARGE = [(300, 300, 2, 2, 128, 512, 32), (300, 300, 16, 1, 128, 32, 512)]
LARGE += [(529, 529, 4, 2, 64, 512, 32), (1, 600, 64, 1, 128, 512, 32)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@gpu
@pytest.mark.parametrize("Tq,Tk,H,Hkv,D,w1,w2", [*CASES, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_the_gpu(Tq, Tk, H, Hkv, D, w1, w2, dtype):
    check_kernels(Tq, Tk, H, Hkv, D, w1, w2, dtype)


def hopper_inputs(H, Hkv, Tq, Tk, D, dtype, size):
    """Return finite q, k, v, k2, v2; a tenth of the queries have logits `size` times as large."""
    generator = torch.Generator("cuda").manual_seed(Tq)
    inputs = []
    for heads, T in (H, Tq), *[(Hkv, Tk)] * 4:
        t = torch.randn(1, heads, T, D, device="cuda", generator=generator)
        inputs.append(t.to(dtype))
    is_large = torch.rand(1, H, Tq, 1, device="cuda", generator=generator) < 0.1
    inputs[0] *= torch.where(is_large, size, 1.0)
    return inputs


HOPPER_SHAPES = [(4, 4, 700, 700, 512, 32), (64, 1, 100, 600, 512, 32), (4, 2, 300, 330, 64, 20)]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


@gpu
@on_hopper
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_hopper_kernel_on_the_gpu(D, dtype, size):
    """hopper_kernel and, for rows with huge logits, repair_kernel agree with the plain kernel."""
    for H, Hkv, Tq, Tk, w1, w2 in HOPPER_SHAPES:
        inputs = hopper_inputs(H, Hkv, Tq, Tk, D, dtype, size)
        assert all(t.isfinite().all() for t in inputs)
        plan = kernel.hopper_plan(inputs[0], inputs[1], min(w1, Tk), w2)
        assert plan, "hopper_kernel should take these inputs"
        o, lse = kernel.forward(*inputs, w1, w2)
        assert torch.equal(o, kernel.forward(*inputs, w1, w2)[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "hopper_plan", lambda *_: None)
            plain, plain_lse = kernel.forward(*inputs, w1, w2)
        allowed = 1e-4 * plain_lse.abs().max().clamp(min=1)
        assert (lse - plain_lse).abs().max() < allowed
        assert o.isfinite().all()
        assert (o.float() - plain.float()).norm() <= 0.01 * plain.float().norm()


@gpu
@on_hopper
@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_rows_of_the_hopper_kernel_are_independent_on_the_gpu(D, dtype, value):
    """One query, then one key or value, is huge or not finite; other rows must not change.

    A tenth of the queries go through repair_kernel in any case.
    """
    for H, Hkv, Tq, Tk, w1, w2 in HOPPER_SHAPES:
        inputs = hopper_inputs(H, Hkv, Tq, Tk, D, dtype, 30.0)
        before = kernel.forward(*inputs, w1, w2)[0]

        # a query
        for i in (Tq - 1, Tq // 2, 17):
            changed = [t.clone() for t in inputs]
            changed[0][:, -1, i, 3] = value
            after = kernel.forward(*changed, w1, w2)[0]
            expected = torch.ones(H, Tq, dtype=torch.bool)
            expected[-1, i] = False
            assert torch.equal((before == after).all(-1)[0].cpu(), expected), "another row changed"

        # k, v, k2 or v2 at the position of query 20
        for n, w in (1, w1), (2, w1), (3, w2), (4, w2):
            changed = [t.clone() for t in inputs]
            changed[n][:, :, Tk - Tq + 20, 3] = value
            after = kernel.forward(*changed, w1, w2)[0]
            others = [i for i in range(Tq) if not 20 <= i < 20 + w]
            a = before[:, :, others].float()
            b = after[:, :, others].float()
            # repair_kernel computes the queries that met 0 * inf, and rounds differently
            assert b.isfinite().all()
            assert (a - b).norm() <= 0.01 * a.norm()
            if n != 2 or value == 1e4:
                assert torch.equal(a, b)
            if value != 1e4:
                assert not after[:, :, 20 : 20 + w].isfinite().all(-1).any()


@gpu
def test_compiles_without_a_break_on_the_gpu():
    inputs = make_inputs(200, 200, D=64, dtype=torch.bfloat16, device="cuda")
    inputs = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(simplicial.attention, fullgraph=True)
    results = []
    for function in (simplicial.attention, compiled):
        o = function(*inputs, w1=64, w2=8)
        results.append([o, *torch.autograd.grad(o, inputs, torch.ones_like(o))])
    assert all(map(torch.equal, *results))
