"""experiments/controls.py and product.py: each control is what it claims to be."""

import pytest
import torch

import laser
import simplicial
import train
from experiments import controls, product
from sonew import SONew
from tests.common import refused


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": 4, "k": 2, "v": 2, "k2": 2, "v2": 2}
    return {
        name: torch.randn(2, H, 9, 8, generator=generator, dtype=torch.float64)
        for name, H in shapes.items()
    }


def test_temperature_one_is_laser_and_infinity_is_softmax(heads):
    qkv = heads["q"], heads["k"], heads["v"]
    torch.testing.assert_close(controls.attention(*qkv, tau=1.0), laser.reference(*qkv))
    hot = controls.attention(*qkv, tau=1e6)
    torch.testing.assert_close(hot, train.softmax_attention(*qkv), atol=1e-5, rtol=1e-5)

    # other temperatures by the definition, tau log sum_j p_j exp(v_j / tau)
    q, k, v = qkv
    for tau in (0.5, 2.0):
        expected = tau * train.softmax_attention(q, k, (v / tau).exp()).log()
        torch.testing.assert_close(controls.attention(*qkv, tau=tau), expected)


def test_gelu_follows_softmax_attention(heads):
    qkv = heads["q"], heads["k"], heads["v"]
    expected = torch.nn.functional.gelu(train.softmax_attention(*qkv))
    torch.testing.assert_close(controls.attention(*qkv, gelu=True), expected)


def test_window_hides_what_is_farther(heads):
    q, k, v = heads["q"], heads["k"], heads["v"]
    out = controls.attention(q, k, v, window=3)
    for i in range(9):
        seen = slice(max(0, i - 2), i + 1)
        expected = train.softmax_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen])
        torch.testing.assert_close(out[:, :, i : i + 1], expected)


def test_product_of_two_windows(heads):
    q, k, v, k2, v2 = heads.values()
    first = controls.attention(q, k, v, window=5)
    second = controls.attention(q, k2, v2, window=2)
    torch.testing.assert_close(product.attention(q, k, v, k2, v2, w1=5, w2=2), first * second)
    assert product.attention.rotary == simplicial.attention.rotary


def make_groups():
    torch.manual_seed(0)
    embedding, matrix = torch.randn(6, 4), torch.randn(4, 4)
    gain = torch.ones(4)
    params = [torch.nn.Parameter(t) for t in (embedding, matrix, gain)]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}]
    groups[1]["weight_decay"] = 0.0
    return params, groups


def draw_gradients(params, others):
    """Give each parameter a random gradient, and the other of its place a copy."""
    for p, other in zip(params, others):
        p.grad = torch.randn_like(p)
        other.grad = p.grad.clone()


def test_muon_takes_only_the_hidden_matrices():
    params, groups = make_groups()
    others, _ = make_groups()
    embedding, matrix, gain = others
    optimizer = controls.optimizer(groups, 0.1, name="muon")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]
    train.set_lr(optimizer, 0.01)

    muon = torch.optim.Muon([matrix], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw_groups = [
        {"params": [embedding], "weight_decay": 0.1},
        {"params": [gain], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(adamw_groups, 0.01, betas=(0.9, 0.95))
    for _ in range(3):
        draw_gradients(params, others)
        optimizer.step()
        muon.step()
        adamw.step()
    for p, other in zip(params, others):
        torch.testing.assert_close(p, other)
    assert set(optimizer.state) == set(params)


def test_shuffled_sonew_is_sonew_of_permuted_columns():
    params, groups = make_groups()
    others, _ = make_groups()
    shuffled = controls.optimizer(groups, 0.1, name="shuffled")
    order = shuffled.orders[params[1]]
    assert sorted(order.tolist()) == [0, 1, 2, 3] != order.tolist()
    matrix = others[1]
    permuted = torch.nn.Parameter(matrix.detach()[:, order].clone())
    sonew = SONew([permuted], 0.1, (0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        draw_gradients(params, others)
        permuted.grad = matrix.grad[:, order].clone()
        shuffled.step()
        sonew.step()
    torch.testing.assert_close(params[1].data[:, order], permuted.data)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="muon, shuffled"):
        controls.optimizer([], 0.1, name="soap")


def test_train_takes_modules_of_a_package(tiny):
    flags = [*tiny, "--steps", "2"]
    attn = "experiments.controls:tau=2,experiments.product:w1=4:w2=2"
    result = train.main([*flags, "--attn", attn, "--optim", "experiments.controls:name=muon"])
    assert result["step"] == 2
    refused([*flags, "--attn", "experiments.nothing"], "no module 'experiments.nothing'")
    refused([*flags, "--attn", "nothing.at.all"], "no module 'nothing.at.all'")


def test_lora_plus_is_adamw_with_two_rates():
    torch.manual_seed(0)
    A, B, other_A, other_B = (torch.nn.Parameter(torch.zeros(3)) for _ in range(4))
    optimizer = controls.optimizer([{"params": [A, B], "pair": True}], 0.1, name="lora_plus")
    train.set_lr(optimizer, 0.01)
    slow = torch.optim.AdamW([other_A], 0.01)
    fast = torch.optim.AdamW([other_B], 0.16)
    for _ in range(3):
        draw_gradients((A, B), (other_A, other_B))
        optimizer.step()
        slow.step()
        fast.step()
    torch.testing.assert_close(A, other_A)
    torch.testing.assert_close(B, other_B)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
