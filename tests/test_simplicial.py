"""2-simplicial attention: definition, PyTorch path, place in the GPT."""

import csv
import math
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F

import simplicial
import train
from tests.common import assert_close, gpu, refused, small_gpt

NAMES = "q", "k", "v", "k2", "v2"
GRADIENTS = "o", "dq", "dk", "dv", "dk2", "dv2"


def make_inputs(
    Tq=9, Tk=9, H=4, Hkv=2, D=6, B=2, Tk2=None, dtype=torch.float64, seed=0, device="cpu"
):
    """Return random q (B, H, Tq, D), k, v (B, Hkv, Tk, D), k2, v2 (B, Hkv, Tk2 or Tk, D).

    They are not contiguous.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for heads, T in (H, Tq), (Hkv, Tk), (Hkv, Tk), (Hkv, Tk2 or Tk), (Hkv, Tk2 or Tk):
        t = torch.randn(B, T, heads, D, generator=generator).to(device, dtype)
        inputs.append(t.transpose(1, 2))
    return inputs


def by_pairs(q, k, v, k2, v2, w1, w2, b, h, i):
    """Compute output and log-sum-exp of query i of head h by the definition, pair by pair."""
    kv_head = h * k.shape[1] // q.shape[1]
    last = i + k.shape[2] - q.shape[2]  # of k and v that the query sees
    last2 = i + k2.shape[2] - q.shape[2]  # of k2 and v2
    query = q[b, h, i]
    k, v, k2, v2 = (t[b, kv_head] for t in (k, v, k2, v2))  # (T, D)
    scores = []
    products = []
    for j in range(max(0, last - w1 + 1), last + 1):
        for l in range(max(0, last2 - w2 + 1), last2 + 1):
            scores.append((query * k[j] * k2[l]).sum() / query.numel() ** 0.5)
            products.append(v[j] * v2[l])
    scores = torch.stack(scores)
    return scores.softmax(0) @ torch.stack(products), scores.logsumexp(0)


# -- values and gradients --------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 1, 1), (5, 5, 2, 3, 2), (7, 7, 4, 9, 9)]  # Tq, Tk, Hkv, w1, w2
SHAPES += [(3, 8, 1, 2, 5), (1, 8, 4, 4, 1), (8, 8, 2, 1, 3)]
BOTH = pytest.mark.parametrize(
    "function", [simplicial.reference, simplicial.attention], ids=["reference", "attention"]
)


@pytest.mark.parametrize("Tq,Tk,Hkv,w1,w2", SHAPES)
def test_reference_is_the_definition(Tq, Tk, Hkv, w1, w2):
    for Tk2 in (Tk, Tk + 2):
        inputs = make_inputs(Tq, Tk, Hkv=Hkv, Tk2=Tk2)
        o = simplicial.reference(*inputs, w1=w1, w2=w2)
        for b, h, i in (0, 0, 0), (1, 3, Tq - 1), (0, 2, Tq // 2):
            expected, _ = by_pairs(*inputs, w1, w2, b, h, i)
            assert torch.allclose(o[b, h, i], expected, atol=1e-12)


@pytest.mark.parametrize("at_once", [2**25, 20], ids=["whole", "blocks"])
def test_first_and_second_derivatives(at_once):
    inputs = [t.requires_grad_() for t in make_inputs(3, 4, H=2, Hkv=1, D=2, B=1)]

    def function(*inputs):
        return simplicial.attention_torch(*inputs, w1=3, w2=2, logits_at_once=at_once)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda *a: simplicial.reference(*a, w1=3, w2=2), inputs)


@pytest.mark.parametrize("at_once", [2**25, 500], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    "Tq,Tk,Hkv,w1,w2", [*SHAPES, (64, 64, 2, 20, 7), (33, 50, 1, 5, 40), (40, 44, 4, 33, 2)]
)
def test_attention_torch_equals_the_reference(Tq, Tk, Hkv, w1, w2, at_once):
    options = {"w1": w1, "w2": w2}
    inputs = [t.requires_grad_() for t in make_inputs(Tq, Tk, Hkv=Hkv, Tk2=Tk + Tk // 8)]
    ours = simplicial.attention_torch(*inputs, **options, logits_at_once=at_once)
    exact = simplicial.reference(*inputs, **options)
    assert torch.allclose(ours, exact, atol=1e-12)
    do = torch.randn(2, 4, Tq, 6, dtype=torch.float64)
    our_grads = torch.autograd.grad(ours, inputs, do)
    for name, a, b in zip(NAMES, our_grads, torch.autograd.grad(exact, inputs, do)):
        assert torch.allclose(a, b, atol=1e-11), f"gradient of {name}"

    low = [t.detach().bfloat16() for t in inputs]
    ours = simplicial.attention_torch(*low, **options, logits_at_once=at_once)
    truth = simplicial.reference(*(t.double() for t in low), **options)
    assert ours.dtype == torch.bfloat16
    assert_close("bf16", ours, truth.bfloat16(), truth)  # as exact as rounding once, at the end


@pytest.mark.parametrize("at_once, forward, total", [(10**6, 4, 4), (40000, 4, 8), (12000, 13, 26)])
def test_blocks_bound_the_logits(at_once, forward, total, monkeypatch):
    """Each block holds at most `at_once` logits.

    forward: the number of blocks of the forward pass. total: after the backward pass, which
    computes each block once more, unless all logits were few enough to be kept.
    """
    block_sizes = []  # the number of logits of each block
    original_attend = simplicial.attend

    def recording_attend(q, k, v, k2, v2, w1, w2):
        n_keys = min(k.shape[2], w1 + q.shape[3] - 1)
        block_sizes.append(q.shape[:4].numel() * w2 * n_keys)
        return original_attend(q, k, v, k2, v2, w1, w2)

    monkeypatch.setattr(simplicial, "attend", recording_attend)
    inputs = [t.requires_grad_() for t in make_inputs(64, 64)]
    o = simplicial.attention_torch(*inputs, w1=20, w2=7, logits_at_once=at_once)
    assert len(block_sizes) == forward
    o.sum().backward()
    assert len(block_sizes) == total
    assert max(block_sizes) <= at_once


def window_attention(q, k, v, w):
    """Compute softmax attention over the last w keys of each query."""
    T = q.shape[2]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    mask = (distance >= 0) & (distance < w)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def window_mean(v, w):
    means = [v[:, :, max(0, i - w + 1) : i + 1].mean(2) for i in range(v.shape[2])]
    return torch.stack(means, 2)


def assert_equal(a, b):
    assert torch.allclose(a, b, atol=1e-12)


def repeat_heads(t):
    """Repeat the two key/value heads for the four query heads."""
    return t.repeat_interleave(2, 1)


@BOTH
def test_closed_forms(function):
    q, k, v, k2, v2 = make_inputs(12, 12, D=6)
    one = torch.ones_like(k)

    # a single pair
    products = repeat_heads(v * v2)
    o = function(q, k, v, k2, v2, w1=5, w2=3)
    assert_equal(o[:, :, 0], products[:, :, 0])
    assert_equal(function(q, k, v, k2, v2, w1=1, w2=1), products)

    # keys and values of ones leave softmax attention
    assert_equal(function(q, k, v, one, one, w1=5, w2=3), window_attention(q, k, v, 5))
    assert_equal(function(q, one, one, k2, v2, w1=5, w2=3), window_attention(q, k2, v2, 3))

    # w2 = 1 gates queries and outputs
    gated = window_attention(q * repeat_heads(k2), k, v, 5) * repeat_heads(v2)
    assert_equal(function(q, k, v, k2, v2, w1=5, w2=1), gated)

    # queries of zeros average
    means = repeat_heads(window_mean(v, 5) * window_mean(v2, 3))
    assert_equal(function(q * 0, k, v, k2, v2, w1=5, w2=3), means)

    # windows longer than the text
    longest = function(q, k, v, k2, v2, w1=99, w2=12)
    assert_equal(longest, function(q, k, v, k2, v2, w1=12, w2=50))
    assert torch.equal(longest, function(q, k, v, k2, v2, w1=10**30, w2=12))

    # k = [a, 1] and k2 = [1, b]: logits are additive, so it is a product of two attentions
    a = torch.cat([k[..., :3], one[..., 3:]], -1)
    b = torch.cat([one[..., :3], k2[..., 3:]], -1)
    q1 = torch.cat([q[..., :3], q[..., 3:] * 0], -1)
    q2 = torch.cat([q[..., :3] * 0, q[..., 3:]], -1)
    product = window_attention(q1, a, v, 5) * window_attention(q2, b, v2, 3)
    assert_equal(function(q, a, v, b, v2, w1=5, w2=3), product)


@BOTH
def test_symmetries(function):
    q, k, v, k2, v2 = make_inputs(12, 12, D=6)
    o = function(q, k, v, k2, v2, w1=5, w2=3)

    # the two kinds of keys and values may change places
    assert_equal(function(q, k2, v2, k, v, w1=3, w2=5), o)

    # only the products of k and k2, and of v and v2, matter
    c = torch.rand(6, dtype=torch.float64) + 0.5
    assert_equal(function(q, k * c, v / c, k2 / c, v2 * c, w1=5, w2=3), o)

    # channels may be permuted
    order = torch.randperm(6)
    permuted = (t[..., order] for t in (q, k, v, k2, v2))
    assert_equal(function(*permuted, w1=5, w2=3), o[..., order])


def test_attention_sees_only_its_windows():
    check_windows(simplicial.attention, "cpu")


def check_windows(function, device, T=40):
    """A change at position 20 changes the outputs of the windows that hold it, and no other bit."""
    inputs = make_inputs(T, T, H=2, Hkv=1, D=16, B=1, dtype=torch.float32, device=device)
    before = function(*inputs, w1=9, w2=4)
    windows = (1, 9, 9, 4, 4)  # of q, which only its own output sees, k, v, k2 and v2
    for n, w in enumerate(windows):
        for change in 1e4, -math.inf, math.nan:
            changed = [t.clone() for t in inputs]
            changed[n][:, :, 20] += change
            after = function(*changed, w1=9, w2=4)
            is_same = (before == after).all(-1).all(1)[0].tolist()  # one bool per position
            expected = [True] * T
            expected[20 : 20 + w] = [False] * w
            case = f"{NAMES[n]} + {change}"
            assert is_same == expected, case
            if not math.isfinite(change):
                assert not after[:, :, 20 : 20 + w].isfinite().any(), case


def test_decodes_as_it_prefills():
    q, k, v, k2, v2 = make_inputs(20, 20, dtype=torch.float32)
    whole = simplicial.attention(q, k, v, k2, v2, w1=7, w2=3)
    parts = []
    for start, end in (0, 12), (12, 19), (19, 20):
        # the first of these queries sees w1 - 1 = 6 and w2 - 1 = 2 earlier positions
        keys = [t[:, :, max(0, start - 6) : end] for t in (k, v)]
        keys += [t[:, :, max(0, start - 2) : end] for t in (k2, v2)]
        parts.append(simplicial.attention(q[:, :, start:end], *keys, w1=7, w2=3))
    assert torch.allclose(whole, torch.cat(parts, 2), atol=1e-5)


# -- what is not finite, in the gradients ----------------------------------------------------------


NONFINITE = [  # index of a tensor among q, k, v, k2, v2, and the value that one number in it gets
    (0, math.inf),
    (0, math.nan),
    (1, math.nan),
    (2, -math.inf),
    (3, math.inf),
    (4, math.nan),
]


def check_gradients_of_nonfinite(
    gradients, device, dtype=torch.float32, D=8, T=40, w1=9, w2=4, g=2, cases=NONFINITE
):
    """One bad number makes NaN of the outputs and gradients that meet it, and changes no other bit.

    gradients(inputs, do, w1, w2) -> o and five gradients
    """
    H = 2 * g
    inputs = make_inputs(T, T, H, 2, D, 1, dtype=dtype, device=device)
    do = torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    before = gradients(inputs, do, w1, w2)
    for n, value in cases:
        changed = [t.clone() for t in inputs]
        changed[n][0, 1, 20, 3] = value
        after = gradients(changed, do, w1, w2)

        # the queries that see position 20 of tensor n, which has a window of w positions, (H, T)
        # heads g to 2 g - 1 share KV head 1
        w = (1, w1, w1, w2, w2)[n]
        heads = [1] if n == 0 else range(g, H)
        bad_queries = torch.zeros(H, T, dtype=torch.bool)
        for h in heads:
            bad_queries[h, 20 : 20 + w] = True

        # the keys that at least one of these queries sees, for each window (Hkv, T)
        bad_keys = {}
        for window in (w1, w2):
            bad_keys[window] = torch.zeros(2, T, dtype=torch.bool)
            for h, i in bad_queries.nonzero().tolist():
                bad_keys[window][h // g, max(0, i - window + 1) : i + 1] = True

        # o, dq, dk, dv, dk2, dv2
        expected = (bad_queries, bad_queries, *[bad_keys[w1]] * 2, *[bad_keys[w2]] * 2)
        for name, a, b, is_bad in zip(GRADIENTS, before, after, expected, strict=True):
            case = f"{name} with {value} in {NAMES[n]}"
            is_same = (a == b).all(-1)[0].cpu()
            assert torch.equal(is_same, ~is_bad), f"{case}: neighbors change"
            assert torch.equal(b.isnan().all(-1)[0].cpu(), is_bad), f"{case}: should be NaN"


def test_gradients_of_what_is_not_finite():
    def gradients(inputs, do, w1, w2):
        inputs = [t.requires_grad_() for t in inputs]
        o = simplicial.attention(*inputs, w1=w1, w2=w2)
        return o.detach(), *torch.autograd.grad(o, inputs, do)

    check_gradients_of_nonfinite(gradients, "cpu")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_code_keeps_what_is_not_finite():
    """Inductor would fold 0 * x into 0, although 0 * inf is NaN."""
    inputs = [t.contiguous() for t in make_inputs(24, 24, D=8, dtype=torch.float32)]
    inputs[2][0, 1, 12, 3] = math.inf  # in v, KV head 1 (query heads 2 and 3), key 12
    compiled = torch.compile(simplicial.nan_or_zero, fullgraph=True)
    for function in simplicial.nan_or_zero, compiled:
        expected = torch.zeros(2, 4, 24, 1)
        expected[0, 2:, 12:17] = math.nan  # the queries that see key 12 in a window of 5
        assert torch.equal(function(*inputs, 5, 3).isnan(), expected.isnan())
    torch.compiler.reset()


# -- refusals, empty inputs, compilers, fallbacks --------------------------------------------------


@pytest.mark.parametrize("function", [simplicial.attention, simplicial.reference])
def test_refuses_what_does_not_fit(function):
    inputs = dict(zip(NAMES, make_inputs()))
    k, v, k2, v2 = (inputs[name] for name in NAMES[1:])
    for change, part in (
        ({"k": k[..., :4]}, "do not fit"),
        ({"k": k[..., :4], "v": v[..., :4]}, "do not fit"),
        ({"k2": k2[..., :4], "v2": v2[..., :4]}, "do not fit"),
        ({"v": v[:, :1]}, "do not fit"),
        ({"v2": v2[:, :1]}, "do not fit"),
        ({"v2": v2[:, :, 1:]}, "do not fit"),
        ({"k2": k2[:, :1], "v2": v2[:, :1]}, "do not fit"),
        ({"k2": k2[:1], "v2": v2[:1]}, "do not fit"),
        ({"k": k[:1], "v": v[:1]}, "do not fit"),
        ({"q": inputs["q"][:, :3]}, "do not fit"),
        ({"q": inputs["q"][0]}, "do not fit"),
        ({name: t[:, :0] for name, t in inputs.items()}, "do not fit"),
        ({name: t[..., :0] for name, t in inputs.items()}, "do not fit"),
        ({"k": k[:, :, :5], "v": v[:, :, :5]}, "cannot be the last of 5"),
        ({"k2": k2[:, :, :5], "v2": v2[:, :, :5]}, "cannot be the last of 5"),
        ({"k2": k2[:, :, :0], "v2": v2[:, :, :0]}, "cannot be the last of 0"),
        ({"w1": 0}, "at least 1"),
        ({"w2": -3}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=part) as caught:
            function(**{**inputs, "w1": 5, "w2": 3, **change})
        assert "\n" not in str(caught.value)


EMPTY = [(0, 4, 2, 5, 5), (2, 4, 2, 0, 5), (2, 4, 2, 0, 0), (1, 0, 2, 5, 5)]  # B, H, Hkv, Tq, Tk


@pytest.mark.parametrize("B,H,Hkv,Tq,Tk", EMPTY)
def test_empty_inputs_give_empty_results(B, H, Hkv, Tq, Tk):
    q = torch.randn(B, H, Tq, 8, requires_grad=True)
    keys = [torch.randn(B, Hkv, Tk, 8, requires_grad=True) for _ in range(4)]
    o = simplicial.attention(q, *keys, w1=3, w2=2)
    assert o.shape == q.shape
    for t, grad in zip((q, *keys), torch.autograd.grad(o.sum(), (q, *keys))):
        assert grad.shape == t.shape
        assert not grad.any()


def test_compiles_once_for_all_lengths():
    """There is one graph for the first length and one for all others."""
    graphs = []

    def backend(graph, inputs):  # runs the graph as it is, and counts it
        graphs.append(graph)
        return graph

    compiled = torch.compile(simplicial.attention, fullgraph=True, backend=backend)
    for T in (5, 7, 40):
        inputs = [t.requires_grad_() for t in make_inputs(T, T + 1, D=8, dtype=torch.float32)]
        ours = compiled(*inputs, w1=4, w2=3)
        eager = simplicial.attention(*inputs, w1=4, w2=3)
        assert torch.allclose(ours, eager, atol=1e-6)
        our_grads = torch.autograd.grad(ours.sum(), inputs)
        eager_grads = torch.autograd.grad(eager.sum(), inputs)
        for our_grad, eager_grad in zip(our_grads, eager_grads):
            assert torch.allclose(our_grad, eager_grad, atol=1e-5)
    assert len(graphs) == 2


def test_autocast_does_not_undo_float32():
    inputs = make_inputs(30, 30, D=8, dtype=torch.float32)
    plain = simplicial.attention(*inputs, w1=9, w2=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simplicial.attention(*inputs, w1=9, w2=5), plain)


def test_warning_survives_the_compiler():
    def slow(x):
        simplicial.warn_fallback("a reason")
        return x + 1

    for function in (slow, torch.compile(slow, fullgraph=True, backend="aot_eager")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(torch.zeros(3))
        (warning,) = caught
        assert "many times slower: a reason" in str(warning.message)


@gpu
@pytest.mark.parametrize("D", [8, 24, 256])
def test_widths_without_a_kernel_fall_back_on_the_gpu(D):
    inputs = make_inputs(20, 20, D=D, dtype=torch.float32, device="cuda")
    with pytest.warns(UserWarning, match=f"no heads of width {D}"):
        o = simplicial.attention(*inputs, w1=5, w2=3)
    exact = simplicial.reference(*(t.double() for t in inputs), w1=5, w2=3)
    assert (o - exact).abs().max() < 1e-4 * exact.abs().max()


# -- in the GPT ------------------------------------------------------------------------------------


def test_layers_of_the_gpt():
    model = small_gpt(torch.float64, attn="softmax,simplicial:w1=5:w2=3", n_layer=4, n_kv_head=2)
    assert [len(layer.self_attn.inputs) for layer in model.layers] == [3, 5, 3, 5]
    layer = model.layers[1].self_attn
    assert layer.windows == [5, 5, 3, 3]

    # the layer is the reference between its projections, without RoPE
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    heads = []
    for name in layer.inputs:
        t = getattr(layer, f"{name}_proj")(x)
        heads.append(t.unflatten(-1, (-1, 8)).transpose(1, 2))
    y = simplicial.reference(*heads, w1=5, w2=3).transpose(1, 2).flatten(2)
    angles = train.rope_angles(0, 9, 8, 1e4, x.device)
    assert torch.allclose(layer(x, *angles), layer.o_proj(y), atol=1e-10)

    # changing a token changes no logit before it
    ids = torch.randint(64, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 64
    assert torch.equal(model(ids)[:, :9], model(changed)[:, :9])


def test_trains(tiny):
    run = train.main([*tiny, "--attn", "softmax,simplicial:w1=8:w2=4", "--out", "run"])
    with open("run/log.csv", newline="") as file:
        values = [row["val_loss"] for row in csv.DictReader(file)]
    losses = [float(value) for value in values if value]
    assert losses[-1] < losses[0] - 0.5
    assert not run["signal"]
    refused([*tiny, "--attn", "simplicial:w3=8"], "no option 'w3'", "w1=512, w2=32")
    refused([*tiny, "--attn", "simplicial:w2=0", "--out", "other"], "w2 is 0", "at least 1")
