"""kernels/cross_entropy.py against PyTorch in float64, and its builds for four GPUs."""

import math
import random

import pytest
import torch

import train
from tests.common import DEVICE, assert_close, gpu

pytest.importorskip("triton")

from kernels.cross_entropy import CONFIG, cross_entropy

SHAPES = [(1, 1), (3, 2), (5, 7), (4, 63), (4, 64), (4, 65), (17, 300)]


def check_cross_entropy(R, V, dtype, device, config):
    """Loss and gradient of random logits (R, V) against PyTorch, with strides of all kinds."""
    generator = torch.Generator().manual_seed(R * V)
    memory = torch.randn(R, V + 3, generator=generator) * 5
    memory = memory.to(dtype).to(device)
    logits = memory[:, :V]  # rows further apart than they are long
    targets = torch.randint(V, (R, 2), generator=generator).to(device)[:, :1]  # not contiguous
    scale = torch.rand(R, 2, generator=generator).to(device)[:, :1]
    if R > 1:
        targets[0] = -1
        scale[0] = 0
    truth_loss, truth_grad = train.cross_entropy_chunk(
        logits.double(), targets, scale.double(), True
    )
    eager_loss, eager_grad = train.cross_entropy_chunk(logits, targets, scale, True)

    before = memory.clone()
    torch.use_deterministic_algorithms(True)  # new tensors hold NaN until they are written
    try:
        loss, grad = cross_entropy(logits, targets, scale, False, config)
        assert grad is None and torch.equal(memory, before), "without gradient the logits stay"
        assert_close("loss without gradient", loss, eager_loss, truth_loss)
        loss, grad = cross_entropy(logits, targets, scale, True, config)
        if device == "cuda":
            again = cross_entropy(before.clone()[:, :V], targets, scale, True, config)
            assert torch.equal(loss, again[0]) and torch.equal(grad, again[1]), "two runs are equal"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close("loss", loss, eager_loss, truth_loss)
    assert_close("gradient", grad, eager_grad, truth_grad)
    assert grad.data_ptr() == memory.data_ptr(), "the gradient overwrites the logits"
    assert torch.equal(memory[:, V:], before[:, V:]), "the gaps between the rows stay"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("R, V", SHAPES)
def test_cross_entropy_kernel(R, V, dtype):
    check_cross_entropy(R, V, dtype, DEVICE, (64, 4))


@pytest.mark.parametrize("seed", range(8))
def test_cross_entropy_kernel_on_random_shapes(seed):
    rng = random.Random(seed)
    R = rng.randint(1, 9)
    V = rng.randint(1, 400)
    dtype = rng.choice([torch.float32, torch.float16])
    check_cross_entropy(R, V, dtype, DEVICE, (2 ** rng.randint(4, 8), 4))


def test_cross_entropy_kernel_beyond_2_to_the_31():
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    logits = memory.as_strided((3, 64), (2**30, 1))  # reserves 4 GiB, touches three pages
    logits.copy_(torch.randn(3, 64))
    targets = torch.ones(3, 1, dtype=torch.int64, device=DEVICE)
    scale = torch.ones(3, 1, device=DEVICE)
    truth_loss, truth_grad = train.cross_entropy_chunk(logits.clone(), targets, scale, True)
    loss, grad = cross_entropy(logits, targets, scale, True, (64, 4))
    assert torch.allclose(loss, truth_loss)
    assert torch.allclose(grad, truth_grad, atol=1e-3)


def test_cross_entropy_kernel_on_extreme_logits():
    inf = math.inf
    rows = [[0.0, 1e4, -1e4], [88.0, 89.0, 3e38], [-3e38, -3e38, -3e38], [-inf, -inf, 1.0]]
    logits = torch.tensor(rows, device=DEVICE)
    targets = torch.tensor([[1], [2], [0], [2]], device=DEVICE)
    scale = torch.ones(4, 1, device=DEVICE)
    truth_loss, truth_grad = train.cross_entropy_chunk(
        logits.double(), targets, scale.double(), True
    )
    loss, grad = cross_entropy(logits, targets, scale, True, (2, 1))
    assert torch.allclose(loss.double(), truth_loss)
    assert torch.allclose(grad.double(), truth_grad, atol=1e-6)
    bad = torch.tensor([[0.0, math.nan, 1.0]], device=DEVICE)
    loss, _ = cross_entropy(bad, targets[:1], scale[:1], False, (2, 1))
    assert loss.isnan(), "NaN must reach the loss"


def test_cross_entropy_kernel_refuses_what_it_cannot_read():
    targets = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    scale = torch.ones(2, 1, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy(torch.zeros(3, 2, device=DEVICE).T, targets, scale, False)
    with pytest.raises(ValueError, match="has 0 logits"):
        cross_entropy(torch.zeros(2, 0, device=DEVICE), targets, scale, False)


@gpu
@pytest.mark.parametrize("R, V", [*SHAPES, (300, 50304), (40000, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_kernel_on_the_gpu(R, V, dtype):
    check_cross_entropy(R, V, dtype, "cuda", CONFIG)


def test_cross_entropy_kernel_builds():
    build = pytest.importorskip("tests.build")
    types = {"target_ptr": "*i64", "scale_ptr": "*fp32", "loss_ptr": "*fp32"}
    constants = {"WITH_GRAD": True, "BLOCK": CONFIG[0]}
    aligned = ("V", "stride_r")
    cases = []
    for arch, dtype, multiples_of_16 in (
        (80, "bf16", aligned),
        (90, "bf16", aligned),
        (90, "bf16", ()),
        (90, "fp32", aligned),
        (100, "bf16", aligned),
        (120, "fp32", ()),
    ):
        settings = {"num_warps": CONFIG[1], "aligned": multiples_of_16, "types": types}
        case = build.Case("cross_entropy_kernel", constants, dtype=dtype, arch=arch, **settings)
        cases.append(case)
    build.check_build("kernels.cross_entropy", cases)
