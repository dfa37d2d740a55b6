"""train.py, part by part: the model, its loss, the optimizer, the schedule."""

import math

import pytest
import torch
import torch.nn.functional as F

import train
from tests.common import is_equal, small_gpt

CPU = torch.device("cpu")


# -- the model -------------------------------------------------------------------------------------


def rms_norm_by_hand(x, gain, eps):
    return x / (x.pow(2).mean() + eps).sqrt() * gain


def rope_by_hand(x, position, theta):
    """Rotate channels i and i + D/2 of x (D), seen as one complex number."""
    half = len(x) // 2
    rates = theta ** (-torch.arange(half).double() / half)
    z = torch.complex(x[:half], x[half:])
    z = z * torch.polar(torch.ones(half, dtype=torch.float64), position * rates)
    return torch.cat([z.real, z.imag])


def project_by_hand(weights, prefix, x, config):
    """Return q (H, D), k and v (Hkv, D) of one position, normed, not rotated."""
    heads = {}
    for name in "qkv":
        y = weights[f"{prefix}{name}_proj.weight"] @ x
        if config.qkv_bias:
            y = y + weights[f"{prefix}{name}_proj.bias"]
        heads[name] = y.view(-1, config.head_dim)
    if config.qk_norm:
        for name in "qk":
            gain = weights[f"{prefix}{name}_norm.weight"]
            rows = [rms_norm_by_hand(row, gain, config.norm_eps) for row in heads[name]]
            heads[name] = torch.stack(rows)
    return heads["q"], heads["k"], heads["v"]


def logits_by_hand(model, ids):
    """Compute a GPT's logits (T, V) for one sequence, position by position, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    eps = config.norm_eps
    theta = config.rope_theta
    xs = [weights["embed_tokens.weight"][i] for i in ids]
    for layer in range(config.n_layer):
        prefix = f"layers.{layer}."
        keys = []
        values = []
        for t, x in enumerate(xs):
            # attention to the positions up to t
            h = rms_norm_by_hand(x, weights[prefix + "input_layernorm.weight"], eps)
            q, k, v = project_by_hand(weights, prefix + "self_attn.", h, config)
            keys.append(torch.stack([rope_by_hand(row, t, theta) for row in k]))
            values.append(v)
            heads = []
            for i, row in enumerate(q):
                group = i * config.n_kv_head // config.n_head
                row = rope_by_hand(row, t, theta)
                scores = torch.stack([row @ k[group] for k in keys]) / config.head_dim**0.5
                group_values = torch.stack([v[group] for v in values])  # (t + 1, D)
                heads.append(scores.softmax(0) @ group_values)
            x = x + weights[prefix + "self_attn.o_proj.weight"] @ torch.cat(heads)

            # SwiGLU
            h = rms_norm_by_hand(x, weights[prefix + "post_attention_layernorm.weight"], eps)
            gate = weights[prefix + "mlp.gate_proj.weight"] @ h
            up = weights[prefix + "mlp.up_proj.weight"] @ h
            xs[t] = x + weights[prefix + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
    output = weights["embed_tokens.weight" if config.tied else "lm_head.weight"]
    rows = [output @ rms_norm_by_hand(x, weights["norm.weight"], eps) for x in xs]
    return torch.stack(rows)


SHAPES = [
    {"norm_eps": 0.1},
    {"n_kv_head": 2, "qkv_bias": True, "rope_theta": 50.0},
    {"n_kv_head": 1, "head_dim": 6, "qk_norm": True, "tied": False, "norm_eps": 0.1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpt_equals_the_equations(shape):
    model = small_gpt(torch.float64, **shape)
    ids = torch.randint(64, (1, 9))
    truth = logits_by_hand(model, ids[0].tolist())
    assert (model(ids)[0] - truth).abs().max() < 1e-5  # the RoPE angles are float32
    loss = -truth.log_softmax(-1)[torch.arange(9), ids[0]].mean()
    assert abs(model(ids, ids).item() - loss.item()) < 1e-6


def test_no_leak_from_the_future():
    model = small_gpt()
    ids = torch.randint(64, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 64
    before = model(ids)
    after = model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all(), "some later position saw no change"


def test_activations_are_bf16_and_logits_float32():
    model = small_gpt(torch.bfloat16)
    ids = torch.randint(64, (2, 5))
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float()), "activations should round to bfloat16"
    loss = model(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    exact = small_gpt()
    assert 0 < abs(loss.item() - exact(ids, ids).item()) < 0.05 * loss.item()


def test_rms_norm_in_bf16_rounds_once():
    x = torch.randn(50, 32).bfloat16()
    norm = train.RMSNorm(32, 0.1)
    norm.weight.data = torch.randn(32)
    gain = norm.weight.double()
    exact = torch.stack([rms_norm_by_hand(row, gain, 0.1) for row in x.double()])
    assert (norm(x) == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("Tq, Tk, Hkv", [(1, 1, 4), (7, 7, 2), (1, 9, 1), (5, 9, 2), (2, 9, 4)])
def test_softmax_attention_aligns_to_the_end(Tq, Tk, Hkv):
    q = torch.randn(2, 4, Tq, 8, dtype=torch.float64)
    k = torch.randn(2, Hkv, Tk, 8, dtype=torch.float64)
    v = torch.randn(2, Hkv, Tk, 8, dtype=torch.float64)
    y = train.softmax_attention(q, k, v)
    k = k.repeat_interleave(4 // Hkv, 1)
    v = v.repeat_interleave(4 // Hkv, 1)
    for i in range(Tq):
        n_keys = Tk - Tq + i + 1  # the queries are the last Tq of Tk positions
        scores = q[:, :, i, None] @ k[:, :, :n_keys].transpose(-1, -2) / 8**0.5
        truth = scores.softmax(-1) @ v[:, :, :n_keys]
        assert torch.allclose(y[:, :, i], truth[:, :, 0], atol=1e-12)


@pytest.mark.parametrize("B, Tq, Tk", [(0, 5, 5), (0, 1, 5), (0, 2, 5), (2, 0, 0), (2, 0, 5)])
def test_softmax_attention_of_nothing(B, Tq, Tk):
    q = torch.randn(B, 4, Tq, 8, requires_grad=True)
    k = torch.randn(B, 2, Tk, 8)
    y = train.softmax_attention(q, k, k)
    assert y.shape == (B, 4, Tq, 8)
    y.sum().backward()
    ids = torch.zeros(B, Tq, dtype=torch.int64)
    model = small_gpt()
    assert model(ids).shape == (B, Tq, 64)
    loss = model(ids, ids)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("is_decoding", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_softmax_attention_compiles_as_one_graph(is_decoding, dynamic):
    torch._dynamo.reset()
    attention = train.softmax_attention
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 9, 12, 30, 31):
        q = torch.randn(1, 2, 3 if is_decoding else T, 8)
        k = torch.randn(1, 2, T, 8)
        assert torch.allclose(compiled(q, k, k), train.softmax_attention(q, k, k), atol=1e-6)


# -- plug-in attention -----------------------------------------------------------------------------


def five(q, k, v, k2, v2, *, power=1, w1=4, w2=2):
    """A plug-in attention with five projections, as 2-simplicial attention has."""
    return train.softmax_attention(q, k + k2**power, v * v2)


five.rotary = ("q", "k2")
five.windows = {"k": "w1", "v2": "w2"}


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.setitem(train.PLUGINS["attn"][1], "five", five)


def test_attention_pattern_is_cycled_over_the_layers(plugins):
    model = small_gpt(n_layer=5, attn="softmax,five:power=2:w2=3")
    modules = [layer.self_attn for layer in model.layers]
    assert [len(m.inputs) for m in modules] == [3, 5, 3, 5, 3]
    assert modules[1].options == {"power": 2, "w1": 4, "w2": 3}
    assert modules[1].windows == [4, None, None, 3]
    assert modules[0].windows == [None, None]
    ids = torch.randint(64, (1, 8))
    assert model(ids).isfinite().all()


def test_attention_projects_norms_and_rotates_what_it_says(plugins):
    config = small_gpt(attn="five", qk_norm=True, n_kv_head=2).config
    module = train.Attention(config, "five:power=3").double()
    with torch.no_grad():
        module.q_norm.weight.copy_(torch.rand(8))
        module.k_norm.weight.copy_(torch.rand(8))
    x = torch.randn(2, 6, 32, dtype=torch.float64)
    cos, sin = train.rope_angles(0, 6, 8, 1e4, CPU)
    heads = module.project(x, cos, sin)
    expected = {}
    for name in ("q", "k", "v", "k2", "v2"):
        linear = getattr(module, f"{name}_proj")
        expected[name] = linear(x).unflatten(-1, (-1, 8))
    expected["q"] = module.q_norm(expected["q"])
    expected["k"] = module.k_norm(expected["k"])
    for name in ("q", "k2"):
        expected[name] = train.apply_rope(expected[name], cos, sin)
    for ours, truth in zip(heads, expected.values()):
        assert torch.equal(ours, truth.transpose(1, 2))
    assert heads[0].shape == (2, 4, 6, 8)
    assert heads[1].shape == (2, 2, 6, 8)
    y = five(*heads, power=3).transpose(1, 2).flatten(2)
    assert torch.equal(module(x, cos, sin), module.o_proj(y))


@pytest.mark.parametrize("spec", ["five:w1=0", "five:w2=-3"])
def test_windows_hold_at_least_one_position(plugins, spec):
    option = spec.split(":")[1].replace("=", " is ")
    with pytest.raises(ValueError, match=f"--attn {spec}: {option}; it must be at least 1"):
        small_gpt(attn=f"softmax,{spec}")


def test_attention_begins_with_q_k_v(monkeypatch):
    monkeypatch.setitem(train.PLUGINS["attn"][1], "other", lambda query, key: query)
    with pytest.raises(ValueError, match=r"attention\(query, key\) does not begin with q, k, v"):
        small_gpt(attn="other")


def test_rope_angles_continue():
    cos, sin = train.rope_angles(0, 9, 8, 100.0, CPU)
    cos_later, sin_later = train.rope_angles(5, 4, 8, 100.0, CPU)
    assert torch.equal(cos[5:], cos_later)
    assert torch.equal(sin[5:], sin_later)


@pytest.mark.parametrize(
    "shape, part",
    [
        ({"n_embd": 30}, "--n-embd 30 is no multiple of --n-head 4"),
        ({"n_kv_head": 3}, "--n-kv-head 3 does not divide --n-head 4"),
        ({"head_dim": 3}, "--head-dim 3 is odd"),
        ({"n_layer": 10**6}, "over 1024 layers"),
        ({"n_layer": 2, "attn": "softmax,softmax,laser"}, "2 layers; give fewer, or --n-layer 3"),
        ({"n_embd": 2**25}, "a width above"),
        ({"vocab_size": 2**25}, "a width above"),
    ],
    ids=str,
)
def test_impossible_shapes(shape, part):
    with pytest.raises(ValueError, match=part):
        train.GPTConfig(**shape)


def test_default_shape():
    config = train.GPTConfig(n_embd=100, n_head=5)
    assert (config.n_kv_head, config.head_dim, config.n_hidden) == (5, 20, 320)
    for name, preset in train.PRESETS.items():
        fields = train.GPTConfig.__dataclass_fields__
        shape = {key: value for key, value in preset.items() if key in fields}
        config = train.GPTConfig(**{"vocab_size": 50304, **shape})
        with torch.device("meta"):
            model = train.GPT(config)
        n = sum(p.numel() for p in model.parameters()) / 1e6
        known = {"gpt2": 123.6, "smollm2-135m": 134.5, "qwen3-4b": 4022.5}  # millions
        if name in known:
            assert abs(n / known[name] - 1) < 0.001


# -- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_loss_equals_pytorch_and_its_gradient_is_right(chunk, monkeypatch):
    monkeypatch.setitem(train.LOGITS_AT_ONCE, "cpu", chunk)
    x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(13, (11,))
    y[3] = -1  # negative targets do not enter the loss, which leaves 9
    y[4] = -5
    loss = train.linear_cross_entropy(x, w, y)
    truth = F.cross_entropy((x @ w.T)[y >= 0], y[y >= 0])
    assert torch.allclose(loss, truth, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(loss, train.linear_cross_entropy(x, w, y))
    assert torch.allclose(train.linear_cross_entropy(x, w, y, 3.0), truth * 9 / 3)
    assert torch.equal(train.linear_cross_entropy(x, w, y, torch.tensor(9.0)), loss)
    assert torch.autograd.gradcheck(lambda x, w: 2 * train.linear_cross_entropy(x, w, y), (x, w))
    train.linear_cross_entropy(x.detach(), w, y).backward()
    assert x.grad is None
    assert w.grad is not None


def test_loss_in_bf16_rounds_the_gradient_of_each_chunk_only(monkeypatch):
    """Logits are small integers, which bfloat16 holds. The loss and sums over chunks are float32"""
    monkeypatch.setitem(train.LOGITS_AT_ONCE, "cpu", 64)  # a row at a time
    x = torch.randint(-2, 3, (512, 16)).float()
    w = torch.randint(-2, 3, (64, 16)).float().requires_grad_()
    y = torch.randint(64, (512,))
    low_x = x.bfloat16().requires_grad_()
    loss = train.linear_cross_entropy(low_x, w, y)
    exact_x = x.double().requires_grad_()
    exact_w = w.detach().double().requires_grad_()
    exact_loss = F.cross_entropy(exact_x @ exact_w.T, y)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    grads = torch.autograd.grad(loss, (low_x, w))
    exact_grads = torch.autograd.grad(exact_loss, (exact_x, exact_w))
    for grad, exact in zip(grads, exact_grads):
        assert (grad - exact).norm() < 0.004 * exact.norm()


def test_loss_without_targets():
    x = torch.randn(3, 6, requires_grad=True)
    w = torch.randn(13, 6, requires_grad=True)
    loss = train.linear_cross_entropy(x, w, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()
    assert not w.grad.any()


def test_loss_refuses_second_derivatives():
    model = small_gpt()
    ids = torch.randint(64, (2, 9))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(model(ids, ids), list(model.parameters()), create_graph=True)
    torch.autograd.grad(model(ids).logsumexp(-1).sum(), list(model.parameters()), create_graph=True)


def test_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setitem(train.LOGITS_AT_ONCE, "cpu", 64 * 4)
    sizes = []
    original = train.cross_entropy_chunk

    def recording_chunk(logits, *more):
        sizes.append(logits.numel())
        return original(logits, *more)

    monkeypatch.setattr(train, "cross_entropy_chunk", recording_chunk)
    ids = torch.randint(64, (2, 16))
    small_gpt()(ids, ids).backward()
    assert len(sizes) == 8, "32 tokens should take 8 chunks of 4"
    assert max(sizes) <= 64 * 4


# -- weights, optimizer, schedule ------------------------------------------------------------------


def test_initial_weights():
    config = train.GPTConfig(vocab_size=64, n_layer=2, qkv_bias=True, tied=False)
    models = [train.GPT(config) for _ in range(3)]
    train.init_weights(models[0], 1)
    # reversing the layers twice changes the order in which modules were registered, only
    models[1].layers = models[1].layers[::-1]
    models[1].layers = models[1].layers[::-1]
    train.init_weights(models[1], 1)
    train.init_weights(models[2], 2)
    assert is_equal(models[0].state_dict(), models[1].state_dict())
    for (name, p), other in zip(models[0].named_parameters(), models[2].parameters()):
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
            continue
        std = 0.02
        if "o_proj" in name or "down_proj" in name:  # the outputs of 2 * n_layer = 4 sublayers
            std /= math.sqrt(4)
        assert abs(p.std() / std - 1) < 0.05
        assert abs(p.mean()) < std / 20
        assert not torch.equal(p, other), "another seed should give other weights"
    first, second = models[0].layers
    assert not torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)


def test_gains_are_not_decayed():
    model = small_gpt(qkv_bias=True, qk_norm=True)
    decayed, free = train.param_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert free["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))

    # with gradients of zero, a step of AdamW is its decay alone
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = train.RunConfig(lr=0.1)
    optimizer = train.make_optimizer([decayed, free], run)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.3 if p.dim() == 2 else 1
        assert torch.allclose(p, before[name] * factor), name


def test_adamw_defaults():
    group = {"params": [torch.nn.Parameter(torch.ones(2))]}
    optimizer = train.make_optimizer([group], train.RunConfig(optim="adamw:beta1=0.8", lr=0.5))
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.5, (0.8, 0.95), 1e-8)
    with pytest.raises(ValueError, match="--optim adamw:beta1=2: "):
        train.make_optimizer([group], train.RunConfig(optim="adamw:beta1=2"))


def test_learning_rate_schedule():
    run = train.RunConfig(lr=2.0, steps=110, warmup=10)
    assert [train.get_lr(step, run) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert train.get_lr(10, run) == pytest.approx(2.0)
    assert train.get_lr(60, run) == pytest.approx(1.1)  # half-way between the peak and a tenth
    assert train.get_lr(35, run) == pytest.approx(2.0 * (0.55 + 0.45 * math.cos(math.pi / 4)))
    assert train.get_lr(110, run) == pytest.approx(0.2)
    defaults = train.RunConfig(steps=100)
    assert (defaults.warmup, defaults.eval_every) == (5, 10)
    assert (train.RunConfig(steps=3).warmup, train.RunConfig(steps=3).eval_every) == (1, 1)
