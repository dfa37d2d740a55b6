"""The Triton kernel of query-only training: values, gradients, refusals, builds for four GPUs."""

import random

import pytest
import torch

import train
import ttt_context
from tests.build import Case, check_build
from tests.common import DEVICE, assert_close, gpu, is_equal, small_gpt

pytest.importorskip("triton")
from kernels import ttt_context as kernel  # noqa: E402

CASES = [  # S, H, Hkv, n, T, D, starts
    (1, 1, 1, 1, 1, 32, [0]),
    (1, 4, 1, 1, 127, 32, [126]),
    (1, 4, 4, 33, 127, 64, [94]),
    (2, 8, 1, 5, 40, 32, [0, 35]),
    (3, 6, 2, 17, 60, 16, [43, 0, 20]),
    (1, 2, 1, 64, 150, 128, [80]),
    (1, 3, 1, 17, 17, 16, [0]),
]


def check_kernel(S, H, Hkv, n, T, D, starts, dtype, config=None, seed=0):
    """Compare forward and dQ with the definition in float64.

    k and v are views of a longer cache, whose keys after the last span are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    q, do = torch.randn(2, S, n, H, D, generator=generator).to(dtype).to(DEVICE).transpose(2, 3)
    kv = torch.randn(2, Hkv, T + 9, D, generator=generator).to(dtype).to(DEVICE)
    k, v = kv[:, :, :T]
    starts = torch.tensor(starts)

    def by_definition(dtype):
        x = q.detach().to(dtype).requires_grad_()
        o = ttt_context.reference(x, k.to(dtype), v.to(dtype), starts)
        return {"o": o.detach(), "dq": torch.autograd.grad(o, x, do.to(dtype))[0]}

    truth = by_definition(torch.float64)
    eager = by_definition(dtype)
    end = int(starts.max()) + n
    k[:, end:] = torch.nan
    v[:, end:] = torch.nan
    q = q.contiguous()
    do = do.contiguous()

    runs = []
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    try:
        # twice on a GPU, where an order of blocks could change the sums
        for _ in range(2 if DEVICE == "cuda" else 1):
            o, lse = kernel.forward(q, k, v, starts, config)
            dq = kernel.backward(do, q, k, v, starts, o, lse, config)
            runs.append({"o": o, "dq": dq})
    finally:
        torch.use_deterministic_algorithms(False)
    assert is_equal(runs[0], runs[-1]), "two runs should be equal bit for bit"
    for name in truth:
        assert runs[0][name].dtype == dtype
        assert_close(f"{name}, seed {seed}", runs[0][name], eager[name], truth[name])


def blocks(rows, keys):
    """Return launch options with tiles of `rows` queries and `keys` keys."""
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_definition(case):
    check_kernel(*case, torch.float32, blocks(32, 32))  # large tiles are faster to interpret


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
def test_half_precision_with_the_default_launch_options(case):
    check_kernel(*case, torch.float16)


@pytest.mark.parametrize("seed", range(5))
def test_kernel_on_random_shapes(seed):
    rng = random.Random(seed)
    S = rng.randint(1, 2)
    group = rng.randint(1, 6)
    Hkv = rng.choice([1, 2])
    n = rng.randint(1, 14)
    T = n + rng.randint(0, 40)
    D = rng.choice([16, 32])
    starts = [rng.randint(0, T - n) for _ in range(S)]
    dtype = rng.choice([torch.float32, torch.float16])
    check_kernel(S, group * Hkv, Hkv, n, T, D, starts, dtype, blocks(16, 16), seed)


def test_any_number_of_splits_gives_the_same_sum():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 5, 16, generator=generator).to(DEVICE)
    k, v = torch.randn(2, 2, 120, 16, generator=generator).to(DEVICE)
    do = torch.randn(q.shape, generator=generator).to(DEVICE)
    starts = torch.tensor([110])
    x = q.clone().requires_grad_()
    truth = ttt_context.reference(x, k, v, starts)
    (dq_truth,) = torch.autograd.grad(truth, x, do)

    counts = set()
    for num_sms, keys in ((1, 64), (6, 16), (1000, 16)):
        config = blocks(16, keys)
        _, num_splits, _ = kernel.split_keys(q, 2, starts, config, num_sms)
        counts.add(num_splits)
        o, lse = kernel.forward(q, k, v, starts, config, num_sms)
        dq = kernel.backward(do, q, k, v, starts, o, lse, config, num_sms)
        assert torch.allclose(o, truth, atol=1e-5)
        assert torch.allclose(dq, dq_truth, atol=1e-4)
    assert len(counts) == 3
    assert min(counts) == 1
    assert max(counts) == 8


def test_lse_is_the_natural_logarithm():
    q = torch.randn(2, 4, 5, 16, device=DEVICE)
    k = torch.randn(2, 30, 16, device=DEVICE)
    starts = torch.tensor([0, 25])
    _, lse = kernel.forward(q, k, k, starts)
    for span, head, row in ((0, 0, 0), (1, 3, 4), (0, 2, 3)):
        n_keys = starts[span] + row + 1
        scores = k[head // 2, :n_keys] @ q[span, head, row] / 4
        assert torch.allclose(lse[span, head, row], scores.logsumexp(0), atol=1e-5)


def test_differentiable_in_q_alone_and_only_once():
    q = torch.randn(2, 4, 5, 16, device=DEVICE, requires_grad=True)
    k, v = torch.randn(2, 2, 40, 16, device=DEVICE)
    k.requires_grad_()
    v.requires_grad_()
    starts = torch.tensor([30, 3])
    o = kernel.span_attention(q, k, v, starts)
    truth = ttt_context.reference(q, k, v, starts)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    (expected,) = torch.autograd.grad(truth.square().sum(), q)
    assert torch.allclose(dq, expected, atol=1e-4)
    with pytest.raises(RuntimeError):  # a second derivative: an error, not a wrong number
        dq.sum().backward()
    o = kernel.span_attention(q, k, v, starts)
    o.sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is None


def test_operators_are_sound():
    q = torch.randn(2, 4, 3, 16, device=DEVICE)
    k = torch.randn(2, 12, 16, device=DEVICE)[:, :9]
    starts = torch.tensor([0, 6])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (q.clone().requires_grad_(), k, k, starts)
    torch.library.opcheck(kernel.span_attention_op, arguments, test_utils=tests)
    o, lse = kernel.forward(q, k, k, starts)
    arguments = (torch.randn_like(q), q, k, k, starts, o, lse)
    backward = kernel.span_attention_backward_op
    torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded", "unaligned"])
def test_keys_in_any_layout(layout):
    q = torch.randn(1, 4, 5, 16, device=DEVICE)
    starts = torch.tensor([7])
    k = torch.randn(2, 20, 16, device=DEVICE)
    if layout == "transposed":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every second":
        k = torch.randn(2, 40, 32, device=DEVICE)[:, ::2, ::2]
    elif layout == "expanded":
        k = k[:1].expand(2, -1, -1)
    else:  # begins 4 bytes after an aligned address, and 331 is no multiple of 16
        k = torch.randn(700, device=DEVICE).as_strided((2, 20, 16), (331, 16, 1), 1)
    o = kernel.span_attention(q, k, k, starts)
    assert torch.allclose(o, ttt_context.reference(q, k, k, starts), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 5, 16), (2, 0, 5, 16), (2, 4, 0, 16)])
def test_sizes_of_zero(shape):
    q = torch.randn(shape, device=DEVICE, requires_grad=True)
    k = torch.randn(2, 9, 16, device=DEVICE)
    starts = torch.arange(shape[0])
    o = kernel.span_attention(q, k, k, starts)
    assert o.shape == shape
    o.sum().backward()
    assert q.grad.shape == shape


def test_refuses_what_does_not_fit():
    q = torch.randn(1, 4, 20, 16, device=DEVICE)
    k = torch.randn(2, 60, 16, device=DEVICE)
    start = torch.tensor([30])

    def refused(q, k, v, start, match):
        with pytest.raises(ValueError, match=match):
            kernel.span_attention(q, k, v, start)

    for bad in (torch.tensor([41]), torch.tensor([-1])):
        refused(q, k, k, bad, "begin at")
    for bad in (torch.tensor([0, 1]), torch.tensor([0.0]), torch.tensor([[0]])):
        refused(q, k, k, bad, "integers")
    assert kernel.span_attention(q, k, k, torch.tensor([40])).isfinite().all()  # the last key
    refused(q, k.half(), k, start, "one dtype")
    refused(q, k[:, :-1], k, start, "twice")  # k and v must have the same shape, given twice
    refused(q[0], k, k, start, "S, H, n, D")
    refused(q[:, :3], k, k, start, "fit together")
    refused(q, k[:0], k[:0], start, "fit together")
    refused(q[..., :8], k, k, start, "fit together")
    refused(q[..., :8], k[..., :8], k[..., :8], start, "D in")
    refused(q.double(), k.double(), k.double(), start, "float32")
    refused(q, k[:, :0], k[:, :0], start, "not all within 0 keys")


def test_refuses_what_32_bits_do_not_count():
    q = torch.empty(1).expand(1, 8, 2**24, 16)
    k = torch.empty(1).expand(1, 2**27, 16)
    start = torch.tensor([0])
    fewer_q = q[:, :, 1:]
    fewer_k = k[:, 1:]
    kernel.check_inputs(fewer_q, fewer_k, fewer_k, start)
    with pytest.raises(ValueError, match="too many"):
        kernel.check_inputs(fewer_q, k, k, start)
    with pytest.raises(ValueError, match="too many"):
        kernel.check_inputs(q, fewer_k, fewer_k, start)


def test_offsets_beyond_2_to_the_31():
    memory = torch.empty(2**31 + 2048, dtype=torch.float16, device=DEVICE)
    k = memory.as_strided((2, 40, 16), (2**31, 16, 1))  # reserves 4 GiB, touches a page per head
    k.copy_(torch.randn(2, 40, 16))
    q = torch.randn(1, 2, 3, 16, device=DEVICE).half()
    starts = torch.tensor([30])
    o = kernel.forward(q, k, k, starts, blocks(16, 16))[0]
    truth = ttt_context.reference(q.float(), k.float(), k.float(), starts)
    assert torch.allclose(o.float(), truth, atol=1e-2)


# -- builds for GPUs that are not here -------------------------------------------------------------


def span_case(direction, dtype, D, config, arch):
    """Return a Case with the specialization of a span kernel that real calls launch."""
    types = {"starts_ptr": "*i32", "stride_k": "i64", "stride_v": "i64"}
    types |= {"lse_ptr": "*fp32", "dq_ptr": "*fp32"}
    if direction == "forward":
        types["o_ptr"] = "*fp32"  # the partial output of one split of the keys
    constants = {"GROUP": 4, "D": D, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    constants |= {name: config[name] for name in ("BLOCK_M", "BLOCK_N")}
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    return Case(
        f"span_{direction}_kernel",
        constants,
        types,
        dtype,
        arch,
        uses_tensor_cores=dtype != "fp32",
        **options,
    )


def test_kernels_build():
    cases = [span_case("forward", "bf16", 64, kernel.HOPPER["forward"], 90)]
    for direction in ("forward", "backward"):
        cases.append(span_case(direction, "bf16", 128, kernel.HOPPER[direction], 90))
        other_archs = (120,) if direction == "forward" else (80, 100)
        for arch in other_archs:
            cases.append(span_case(direction, "bf16", 128, kernel.OTHERS[direction], arch))
        cases.append(span_case(direction, "fp32", 128, kernel.FLOAT32, 90))
    types = {"split_o_ptr": "*fp32", "split_lse_ptr": "*fp32", "lse_ptr": "*fp32"}
    constants = {"D": 128, "BLOCK_M": 16}
    cases.append(Case("merge_kernel", constants, types, uses_tensor_cores=False))
    check_build("kernels.ttt_context", cases)


# -- on a GPU --------------------------------------------------------------------------------------

LARGE_CASES = [  # S, H, Hkv, n, T, D, starts
    (1, 32, 8, 128, 4101, 128, [3973]),
    (4, 8, 2, 100, 5000, 64, [0, 4900, 17, 2500]),
]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_kernel_on_the_gpu(case, dtype):
    check_kernel(*case, dtype)


@gpu
@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 2, "qk_norm": True, "tied": False}], ids=str)
def test_gradient_on_the_gpu_is_that_of_the_cpu(shape):
    gradients = []
    for device in ("cpu", "cuda"):
        model = small_gpt(n_embd=64, **shape).to(device)
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(64, (60,), generator=generator).to(device)
        caches = ttt_context.prefill(model, ids)
        with ttt_context.trainable_queries(model) as weights:
            loss = ttt_context.span_loss(model, caches, ids, torch.tensor([0, 31]), 20)
            gradients.append([g.cpu() for g in torch.autograd.grad(loss, weights)])
    for on_cpu, on_gpu in zip(*gradients):
        assert torch.allclose(on_cpu, on_gpu, rtol=1e-2, atol=1e-4 * on_gpu.abs().max().item())


@gpu
def test_softmax_spans_take_the_kernel_and_other_functions_do_not():
    q = torch.randn(2, 4, 5, 32, device="cuda")
    k, v = torch.randn(2, 2, 40, 32, device="cuda")
    starts = torch.tensor([0, 30])
    config = {"n_head": 4, "n_kv_head": 2, "n_embd": 128, "vocab_size": 64}
    model = train.GPT(train.GPTConfig(**config)).cuda()
    assert ttt_context.can_use_kernel(model)
    module = model.layers[0].self_attn
    module.function = lambda q, k, v: q  # not softmax, so the output shows who computed it
    ours = ttt_context.FrozenCache(k[None], v[None], starts, True).attend(module, [q])
    assert torch.equal(ours, kernel.span_attention(q, k, v, starts))
    other = ttt_context.FrozenCache(k[None], v[None], starts, False).attend(module, [q])
    assert torch.equal(other, q)
    laser = train.GPT(train.GPTConfig(attn="softmax,laser", **config)).cuda()
    assert not ttt_context.can_use_kernel(laser)
