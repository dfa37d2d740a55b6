"""kernels/decode.py against PyTorch in the same dtype and in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

import sample
import train
from tests.common import DEVICE, assert_close, gpu, small_gpt

pytest.importorskip("triton")
from kernels import decode  # noqa: E402
from tests.build import Case, check_build  # noqa: E402

EPS = 0.01  # large enough that a kernel without it is off


def run_poisoned(function):
    """Run a function with new tensors filled with NaN. On a GPU, two runs must be equal."""
    torch.use_deterministic_algorithms(True)
    try:
        result = function()
        if DEVICE == "cuda":
            assert torch.equal(result, function())
    finally:
        torch.use_deterministic_algorithms(False)
    return result


def inside_nan(t):
    """Copy a tensor into memory with NaN before and after it, to catch reads out of bounds."""
    memory = torch.full((t.numel() + 128,), torch.nan, dtype=t.dtype, device=DEVICE)
    return memory[64:-64].view(t.shape).copy_(t)


def rms_norm(x, gain):
    return F.rms_norm(x.to(gain.dtype), gain.shape, gain, EPS).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Matrix-vector products


def project_torch(x, gain, weights, biases):
    normed = rms_norm(x, gain)
    outputs = []
    for weight, bias in zip(weights, biases):
        outputs.append((weight @ normed).to(bias.dtype) + bias)
    return torch.cat(outputs)


def swiglu_torch(x, gain, gate, up):
    normed = rms_norm(x, gain)
    return F.silu(gate @ normed) * (up @ normed)


def add_torch(x, y, weight):
    return x + weight @ y


def double(tensors):
    return [t.double() for t in tensors]


def check_products(C, sizes, dtype, has_bias):
    """Compare all products with PyTorch: matrices of `sizes` rows and C columns."""
    generator = torch.Generator().manual_seed(C)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x = inside_nan(randn(C) * 0.3)
    gain = inside_nan(randn(C).float() + 1)
    weights = [inside_nan(randn(n, C)) for n in sizes]
    biases = [inside_nan(randn(n).float() * has_bias) for n in sizes]
    up = inside_nan(randn(sizes[0], C))
    y = inside_nan(randn(sizes[0]))

    given_biases = biases if has_bias else None
    ours = run_poisoned(lambda: decode.norm_linear(x, gain, EPS, weights, given_biases))
    eager = project_torch(x, gain, weights, biases)
    truth = project_torch(*double((x, gain)), double(weights), double(biases))
    assert_close("project", ours, eager, truth)

    gate = weights[0]
    ours = run_poisoned(lambda: decode.norm_swiglu(x, gain, EPS, gate, up))
    eager = swiglu_torch(x, gain, gate, up)
    truth = swiglu_torch(*double((x, gain, gate, up)))
    assert_close("swiglu", ours, eager, truth)

    def add():
        total = y.clone()
        decode.linear_add(total, x, up)
        return total

    truth = add_torch(*double((y, x, up)))
    assert_close("add", run_poisoned(add), add_torch(y, x, up), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "C,sizes,has_bias",
    [
        (1, (1,), False),
        (40, (37, 5, 6), True),
        (64, (64, 32), True),
        (64, (64, 32, 32), False),
        (200, (33,), True),
    ],
)
def test_products(C, sizes, has_bias, dtype, monkeypatch):
    monkeypatch.setattr(decode, "SMALL_MATRIX", decode.Tile(16, 64, 4))
    check_products(C, sizes, dtype, has_bias)


@gpu
@pytest.mark.parametrize(
    "C,sizes,has_bias",
    [
        (576, (576, 192, 192), True),
        (2560, (4096, 1024, 1024), False),
        (200, (1001,), False),
        (64, (9000,), True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_on_the_gpu(C, sizes, has_bias, dtype):
    check_products(C, sizes, dtype, has_bias)


# --------------------------------------------------------------------------------------------------
# Attention of one query


def attention_torch(heads, gains, angles, length, kv, dtype):
    """Return the output, the new key and the new value, computed in `dtype` with the model's code.

    heads: q, k and v of one token, (H + 2 Hkv, D). kv: the caches of k and v, (2, 1, Hkv, T, D).
    """
    Hkv = kv.shape[2]
    q, k, v = heads.to(dtype).split([heads.shape[0] - 2 * Hkv, Hkv, Hkv])
    if gains is not None:
        q = F.rms_norm(q, q.shape[-1:], gains[0].to(dtype), EPS)
        k = F.rms_norm(k, k.shape[-1:], gains[1].to(dtype), EPS)
    cos, sin = (angle[length].to(dtype) for angle in angles)
    q = train.apply_rope(q[None, None], cos, sin).transpose(1, 2)  # (1, H, 1, D)
    k = train.apply_rope(k[None, None], cos, sin).transpose(1, 2)
    kv = kv.to(dtype)
    kv[0, :, :, length] = k[:, :, 0]
    kv[1, :, :, length] = v
    o = train.softmax_attention(q, *kv[:, :, :, : length + 1])
    return torch.cat([o.flatten(), kv[:, :, :, length].flatten()])


def check_attention(H, Hkv, D, size, length, dtype, has_norm, scale=1.0):
    """Compare the attention of a token after `length` others with PyTorch. scale: of its logits."""
    generator = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    heads = inside_nan(randn(H + 2 * Hkv, D))
    heads[:H] *= scale
    gains = None
    if has_norm:
        gains = (inside_nan(randn(D) + 1), inside_nan(randn(D) + 1))
    kv = inside_nan(randn(2, 1, Hkv, size, D).to(dtype))
    kv[:, :, :, length:] = torch.nan  # slots not written yet
    position = torch.tensor([length], device=DEVICE)
    angles = train.rope_angles(0, size, D, 1e4, DEVICE)

    def ours():
        k = kv[0, 0].clone()
        v = kv[1, 0].clone()
        o = decode.attention(heads.flatten(), gains, EPS, angles, position, k, v)
        assert torch.equal(k[:, :length], kv[0, 0, :, :length]), "an old key was changed"
        assert torch.equal(v[:, :length], kv[1, 0, :, :length]), "an old value was changed"
        assert k[:, length + 1 :].isnan().all(), "a later key was written"
        assert v[:, length + 1 :].isnan().all(), "a later value was written"
        return torch.cat([o, k[:, length].flatten(), v[:, length].flatten()])

    inputs = (heads, gains, angles, length)
    eager = attention_torch(*inputs, kv.clone(), dtype)
    truth = attention_torch(*inputs, kv.clone(), torch.float64)
    assert_close("attention", run_poisoned(ours), eager, truth)


@pytest.mark.parametrize(
    "H,Hkv,has_norm,dtype",
    [
        (4, 4, True, torch.float32),
        (6, 2, False, torch.float32),
        (16, 1, True, torch.float16),  # with the new key more rows than a tile of 16
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [0, 15, 16, 31, 32, 75, 99])
def test_attention(H, Hkv, has_norm, length, dtype, monkeypatch):
    monkeypatch.setattr(decode, "ATTENTION_PROGRAMS", 8)  # splits of 4, 2 and 1 blocks
    monkeypatch.setattr(decode, "attention_block", lambda D, dtype: (16, 4))
    check_attention(H, Hkv, 16, 100, length, dtype, has_norm)


def test_attention_with_large_logits(monkeypatch):
    monkeypatch.setattr(decode, "ATTENTION_PROGRAMS", 8)
    monkeypatch.setattr(decode, "attention_block", lambda D, dtype: (16, 4))
    check_attention(6, 2, 16, 100, 99, torch.float32, has_norm=False, scale=50.0)


@gpu
@pytest.mark.parametrize(
    "H,Hkv,D,norm", [(9, 3, 64, False), (32, 8, 128, True), (20, 1, 256, True)]
)
@pytest.mark.parametrize("length", [0, 31, 32, 500, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_on_the_gpu(H, Hkv, D, norm, length, dtype):
    check_attention(H, Hkv, D, 5000, length, dtype, norm)


# --------------------------------------------------------------------------------------------------
# What the kernels cannot do


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(0), "gain": torch.ones(0), "weights": [torch.ones(4, 0)]},
        {"weights": [torch.ones(0, 8)]},
        {"weights": [torch.ones(4, 9)]},
        {"weights": []},
        {"weights": [torch.ones(4, 8)] * 4},
        {"weights": [torch.ones(8, 4).T]},
        {"gain": torch.ones(7)},
        {"biases": [torch.ones(3)]},
        {"biases": [torch.ones(4)] * 2},
        {"x": torch.ones(8).double()},
        {"x": torch.ones(2, 4)},
    ],
    ids=range(11),
)
def test_products_refuse(change):
    weights = [torch.ones(4, 8)]
    arguments = {"x": torch.ones(8), "gain": torch.ones(8), "eps": EPS, "weights": weights}
    decode.norm_linear(**arguments)
    with pytest.raises(ValueError):
        decode.norm_linear(**{**arguments, **change})


def test_swiglu_and_add_refuse():
    x = torch.ones(8)
    gate = torch.ones(4, 8)
    decode.norm_swiglu(x, x, EPS, gate, gate)
    for up in (torch.ones(5, 8), torch.ones(4, 7)):
        with pytest.raises(ValueError, match="up is"):
            decode.norm_swiglu(x, x, EPS, gate, up)
    with pytest.raises(ValueError, match="no size of 0"):
        decode.norm_swiglu(x, x, EPS, torch.ones(0, 8), torch.ones(0, 8))
    with pytest.raises(ValueError, match="no size of 0"):
        decode.linear_add(torch.ones(0), x, torch.ones(0, 8))
    with pytest.raises(ValueError, match="weight is"):
        decode.linear_add(torch.ones(4), x, torch.ones(8, 4))


def attention_arguments(H=2, Hkv=1, size=3, D=16, dtype=torch.float32):
    k = torch.ones(Hkv, size, D, dtype=dtype)
    return {
        "qkv": torch.ones((H + 2 * Hkv) * D),
        "gains": None,
        "eps": EPS,
        "angles": train.rope_angles(0, size, D, 1e4, "cpu"),
        "length": torch.zeros(1, dtype=torch.int64),
        "k": k,
        "v": k.clone(),
    }


@pytest.mark.parametrize(
    "shape, change, part",
    [
        ({"D": 48}, {}, "D one of (16, 32, 64, 128, 256)"),
        ({"D": 8}, {}, "D one of (16, 32, 64, 128, 256)"),
        ({"D": 512}, {}, "D one of (16, 32, 64, 128, 256)"),
        ({"size": 0}, {}, "no size of 0"),
        ({"Hkv": 0}, {}, "no size of 0"),
        ({"H": 0}, {}, "does not fit"),
        ({"H": 3, "Hkv": 2}, {}, "does not fit"),
        ({"dtype": torch.float64}, {}, "float64"),
        ({}, {"v": torch.ones(1, 4, 16)}, "v is"),
        ({}, {"k": torch.ones(1, 16, 3).mT}, "not contiguous"),
        ({}, {"k": torch.ones(3, 16)}, "it must be (Hkv, size, D)"),
        ({}, {"qkv": torch.ones(65)}, "qkv is"),
        ({}, {"gains": (torch.ones(16), torch.ones(8))}, "k_gain is"),
        ({}, {"angles": train.rope_angles(0, 4, 16, 1e4, "cpu")}, "cos is"),
        ({}, {"k": torch.ones(1, 1, 1).expand(1, 2**27, 16)}, "below 2**31"),
    ],
    ids=range(15),
)
def test_attention_refuses(shape, change, part):
    arguments = {**attention_arguments(**shape), **change}
    with pytest.raises(ValueError) as caught:
        decode.attention(**arguments)
    assert part in str(caught.value)


# --------------------------------------------------------------------------------------------------
# A step of the whole model


ALL_PARTS = {"n_kv_head": 2, "qk_norm": True, "qkv_bias": True, "tied": False}


@pytest.mark.parametrize("shape", [{"n_layer": 1}, ALL_PARTS], ids=str)
def test_fused_step_equals_the_models(shape, monkeypatch):
    model = small_gpt(head_dim=16, block_size=6, norm_eps=EPS, rope_theta=100.0, **shape)
    monkeypatch.setattr(decode, "SMALL_MATRIX", decode.Tile(64, 64, 4))
    decoders = []
    for use_kernels in (True, False):
        decoder = sample.CUDAGraphDecoder(model, 6)
        decoder.use_kernels = use_kernels
        decoder.prefill([5, 6, 7])
        decoders.append(decoder)
    fused, plain = decoders
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(fused.logits(), plain.logits(), atol=1e-4)
            for decoder in decoders:
                decoder.token.fill_(9)
                decoder.length += 1

    # the tokens are equal, too, also after the context is full
    expected = list(sample.generate(model, [5, 6, 7], 6, temperature=0))
    monkeypatch.setattr(sample, "can_fuse", lambda model: True)
    assert list(sample.generate(model, [5, 6, 7], 6, temperature=0, graph=True)) == expected


@gpu
@pytest.mark.parametrize(
    "shape", [{"qk_norm": True, "n_kv_head": 2}, {"qkv_bias": True, "tied": False}], ids=str
)
def test_fused_step_in_bf16_follows_fp32_on_the_gpu(shape):
    model = small_gpt(torch.bfloat16, n_embd=64, block_size=100, **shape)
    for p in model.parameters():
        p.data = p.data.bfloat16()
        is_matrix = p.dim() > 1
        p.data = p.data * 0.3 if is_matrix else p.data.float()
    model_fp64 = copy.deepcopy(model).double()
    model_fp64.dtype = torch.float64
    model.cuda()

    decoder = sample.CUDAGraphDecoder(model, 100)
    assert decoder.use_kernels
    with torch.no_grad():
        ids = list(range(60))
        ids.append(decoder.prefill(ids))
        fused = decoder.logits()
        decoder.use_kernels = False
        truth = model_fp64(torch.tensor([ids]))[0, -1].cuda()
        assert_close("logits", fused, decoder.logits(), truth)


# --------------------------------------------------------------------------------------------------
# Builds for GPUs that are not here

FP32 = "gain q_gain k_gain cos sin lse qkv split_out".split()


def product_cases():
    """Products of SmolLM2-135M for A100 (arch 80), and of Qwen3-4B for H100 (arch 90)."""
    types = {f"{name}_ptr": "*fp32" for name in FP32}
    linear_types = types | {f"{name}_ptr": "*fp32" for name in ("y", "b1", "b2", "b3")}
    for arch, tile, C in ((80, decode.SMALL_MATRIX, 576), (90, decode.LARGE_MATRIX, 2560)):
        constants = {"C": C, "BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "PDL": arch >= 90}
        how = {"arch": arch, "num_warps": tile.num_warps, "uses_tensor_cores": False}
        with_bias = {**constants, "BIAS": C == 576}
        yield Case("norm_linear_kernel", with_bias, linear_types, **how)
        yield Case("norm_swiglu_kernel", constants, types, **how)
        yield Case("linear_add_kernel", constants, types, **how)


def attention_cases():
    types = {f"{name}_ptr": "*fp32" for name in FP32} | {"length_ptr": "*i64"}
    out_types = {**types, "out_ptr": "*fp32"}
    for arch, D, dtype in (
        (80, 64, "bf16"),
        (80, 128, "fp32"),
        (90, 64, "bf16"),
        (90, 128, "bf16"),
        (90, 256, "bf16"),
        (90, 128, "fp32"),
        (100, 128, "bf16"),
        (120, 256, "bf16"),
    ):
        is_fp32 = dtype == "fp32"
        block_n, num_warps = decode.attention_block(D, torch.float32 if is_fp32 else torch.bfloat16)
        constants = {"G": 4, "ROWS": 16, "D": D, "BLOCK_N": block_n, "NORM": D == 128}
        constants |= {"PRECISION": "ieee" if is_fp32 else "tf32", "PDL": arch >= 90}
        how = {"dtype": dtype, "arch": arch, "num_warps": num_warps}
        yield Case("attention_kernel", constants, out_types, uses_tensor_cores=not is_fp32, **how)
    for arch in (80, 90):
        constants = {"D": 128, "SPLITS": 64, "PDL": arch >= 90}
        yield Case("combine_kernel", constants, types, arch=arch, uses_tensor_cores=False)


def test_decode_kernels_build():
    assert len(check_build("kernels.decode", [*product_cases(), *attention_cases()])) == 16
