"""Every test of the repository:  python test_all.py [-k name] [-m gpu]

Anything after the name goes to pytest. Without a GPU the kernels run in Triton's interpreter, and what needs a GPU is
listed as skipped. The order is that of the files: the model, the kernel, runs on disk, bad input, processes, the house.
"""
import ast, base64, csv, json, math, os, random, re, resource, shlex, signal, subprocess, sys, time
from pathlib import Path

import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                             # before anything imports triton
import numpy as np
import pytest
import torch.nn.functional as F

import laser
import sample
import simplicial
import train

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"              # where kernels run, for real or interpreted
def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def close(name, ours, eager, truth):
    """Our error against float64 may be at most twice that of eager PyTorch in the same dtype, plus a floor."""
    assert ours.isfinite().all(), f"{name}: not finite"
    error = (ours.double() - truth).abs().max().item()
    allowed = 2 * (eager.double() - truth).abs().max().item() + 1e-5 * max(1.0, truth.abs().max().item())
    assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An empty folder to run in, with a text made from a seed; -> flags for a run of a second."""
    monkeypatch.chdir(tmp_path)
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil éclairs".split()
    draw = random.Random(0)
    Path("text.txt").write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(400)))
    return ("--data text.txt --n-layer 2 --n-embd 32 --n-head 2 --block-size 16 --batch-size 4 --steps 40 --eval-batches 2 "
            "--sample 5 --device cpu").split()


def small_gpt(dtype=torch.float32, **shape):
    cfg = train.GPTConfig(**{**dict(vocab_size=64, n_layer=2, n_embd=32, n_head=4, block_size=16), **shape})
    model = train.GPT(cfg, dtype=dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
    draw = torch.Generator().manual_seed(0)
    train.fill(model, lambda name, shape: torch.randn(shape, generator=draw) * (0.3 if len(shape) > 1 else 1) + (len(shape) == 1))
    return model


def same(a, b):
    """Two nests of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def refused(capsys, argv, *parts, script=train, status=2):
    """The call ends with this exit status and one sentence that has all the parts."""
    with pytest.raises(SystemExit) as e:
        script.main(argv)
    words = capsys.readouterr()
    assert e.value.code == status, words
    message = words.err.strip().splitlines()[-1] if status == 2 else words.out
    for part in parts:
        assert part in message, message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# The model

def by_hand(model, ids):
    """Logits of a GPT for one sequence, position by position and head by head, from the equations in float64."""
    w, c = {k: v.double() for k, v in model.state_dict().items()}, model.cfg
    norm = lambda x, g: x / (x.pow(2).mean() + c.norm_eps).sqrt() * g

    def turn(x, t):                                                  # channels i and i + D/2 as one complex number
        z = torch.complex(x[:c.head_dim // 2], x[c.head_dim // 2:])
        z = z * torch.polar(torch.ones(c.head_dim // 2, dtype=torch.float64),
                            t * c.rope_theta ** (-2 * torch.arange(c.head_dim // 2).double() / c.head_dim))
        return torch.cat([z.real, z.imag])
    xs = [w["embed_tokens.weight"][i] for i in ids]
    for n in range(c.n_layer):
        p, seen, out = f"layers.{n}.", [], []
        for t, x in enumerate(xs):
            h = norm(x, w[p + "input_layernorm.weight"])
            q, k, v = ((w[p + f"self_attn.{a}_proj.weight"] @ h).view(-1, c.head_dim) for a in "qkv")
            if c.qk_norm:
                q, k = (torch.stack([norm(r, w[p + f"self_attn.{a}_norm.weight"]) for r in m]) for a, m in (("q", q), ("k", k)))
            seen.append((torch.stack([turn(r, t) for r in k]), v))
            heads = []
            for i, r in enumerate(q):
                g = i * c.n_kv_head // c.n_head
                scores = torch.stack([turn(r, t) @ k[g] for k, _ in seen]) / c.head_dim ** 0.5
                heads.append(sum(a * v[g] for a, (_, v) in zip(scores.softmax(0), seen)))
            x = x + w[p + "self_attn.o_proj.weight"] @ torch.cat(heads)
            h = norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = w[p + "mlp.gate_proj.weight"] @ h, w[p + "mlp.up_proj.weight"] @ h
            out.append(x + w[p + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up))
        xs = out
    return torch.stack([w["embed_tokens.weight" if c.tied else "lm_head.weight"] @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("shape", [{}, dict(n_kv_head=2), dict(n_kv_head=1, head_dim=6, qk_norm=True, tied=False)], ids=str)
def test_gpt_equals_the_equations(shape):
    model, ids = small_gpt(torch.float64, **shape), torch.randint(64, (1, 9))
    truth = by_hand(model, ids[0].tolist())
    assert (model(ids)[0] - truth).abs().max() < 1e-5                # the rotary angles are float32
    loss = -truth.log_softmax(-1)[torch.arange(9), ids[0]].mean()
    assert abs(model(ids, ids).item() - loss.item()) < 1e-6


def test_no_leak_from_the_future():
    model, ids = small_gpt(), torch.randint(64, (1, 16))
    changed = ids.clone()
    changed[0, 9] += 1
    assert torch.equal(model(ids)[:, :9], model(changed % 64)[:, :9])


@pytest.mark.parametrize("Tq,Tk,Hkv", [(1, 1, 4), (7, 7, 2), (1, 9, 1), (5, 9, 2)])
def test_softmax_attention_aligns_to_the_end(Tq, Tk, Hkv):
    q, k, v = (torch.randn(2, h, t, 8, dtype=torch.float64) for h, t in ((4, Tq), (Hkv, Tk), (Hkv, Tk)))
    k4, v4 = (t.repeat_interleave(4 // Hkv, 1) for t in (k, v))
    for i in range(Tq):
        seen = Tk - Tq + i + 1
        a = (q[:, :, i, None] @ k4[:, :, :seen].transpose(-1, -2) / 8 ** 0.5).softmax(-1)
        assert torch.allclose(train.softmax_attention(q, k, v)[:, :, i], (a @ v4[:, :, :seen])[:, :, 0], atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 40, 10 ** 6])
def test_loss_equals_pytorch_and_its_gradient_is_right(chunk, monkeypatch):
    monkeypatch.setitem(train.LOSS_CHUNK, "cpu", chunk)
    x, w = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (11, 13))
    y = torch.randint(13, (11,))
    y[3] = -1
    ours = train.LinearCrossEntropy.apply(x, w, y, True)
    assert torch.allclose(ours, F.cross_entropy(x @ w.T, y, ignore_index=-1), atol=1e-12)
    assert torch.equal(ours, train.LinearCrossEntropy.apply(x, w, y, False)) and ours.isfinite()
    assert torch.autograd.gradcheck(lambda x, w: train.LinearCrossEntropy.apply(x, w, y, True), (x, w))


def test_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setitem(train.LOSS_CHUNK, "cpu", 64 * 4)
    sizes, original = [], train.cross_entropy
    monkeypatch.setattr(train, "cross_entropy", lambda logits, *more: sizes.append(logits.numel()) or original(logits, *more))
    model = small_gpt()
    model(torch.randint(64, (2, 16)), torch.randint(64, (2, 16))).backward()
    assert len(sizes) == 8 and max(sizes) <= 64 * 4


def test_weights_do_not_depend_on_order_and_gains_are_not_decayed():
    model, again = (train.GPT(train.GPTConfig(vocab_size=64, n_layer=2)) for _ in range(2))
    train.fill(model, train.fresh(model.cfg, 1))
    source = train.fresh(model.cfg, 1)
    for name, p in reversed(list(again.named_parameters())):
        p.data.copy_(source(name, p.shape))
    assert same(model.state_dict(), again.state_dict())
    assert 0.019 < model.embed_tokens.weight.std() < 0.021 and 0.0095 < model.layers[1].mlp.down_proj.weight.std() < 0.0105
    decayed, free = train.parameter_groups(model, 0.1)
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"]) and free["weight_decay"] == 0
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def five(q, k, v, k2, v2, *, power=1):
    """An attention of five projections, as simplicial has, for the tests of plug-ins."""
    return train.softmax_attention(q, k + k2 ** power, v * v2)


@pytest.mark.parametrize("shape", [{}, dict(n_kv_head=2, qk_norm=True, tied=False), dict(attn="five")], ids=str)
@pytest.mark.parametrize("how", [dict(temperature=0), dict(temperature=1.3, top_k=9, top_p=0.8)], ids=str)
def test_cached_sampling_equals_uncached(shape, how, monkeypatch):
    monkeypatch.setitem(train.BUILTIN["attention"], "five", five)
    model = small_gpt(**shape)
    cached, plain = (list(train.generate(model, [5, 6, 7], 40, seed=3, cached=c, limit=60, **how)) for c in (True, False))
    assert cached == plain and len(cached) == 40 and max(cached) < 60 and len(set(cached)) > 3


def test_sampling_keeps_to_top_k_and_top_p():
    model = small_gpt()
    p = model(torch.tensor([[5]]))[0, -1].softmax(-1)
    few = p.topk(3).indices.tolist()
    drawn = {next(train.generate(model, [5], 1, top_k=3, seed=s)) for s in range(60)}
    assert drawn == set(few)
    enough = int((p.sort(descending=True).values.cumsum(0) < 0.5).sum()) + 1
    drawn = {next(train.generate(model, [5], 1, top_p=0.5, seed=s)) for s in range(60)}
    assert drawn <= set(p.topk(enough).indices.tolist()) and (len(drawn) > 1 or enough == 1)


# ---------------------------------------------------------------------------------------------------------------------
# kernels/train.py

KERNEL_CASES = [(1, 1), (3, 2), (5, 7), (4, 63), (4, 64), (4, 65), (17, 300)]


def check_cross_entropy(R, V, dtype, device, config):
    from kernels.train import cross_entropy
    draw = torch.Generator().manual_seed(R * V)
    rows = (torch.randn(R, V + 3, generator=draw) * 5).to(dtype).to(device)
    target = torch.randint(V, (R, 2), generator=draw).to(device)[:, :1]
    scale = torch.rand(R, 2, generator=draw).to(device)[:, :1]       # neither is contiguous
    logits = rows[:, :V]                                             # nor are the rows as far apart as they are long
    if R > 1:
        target[0], scale[0] = -1, 0
    truth = train.cross_entropy(logits.double(), target, scale.double(), True)
    eager = train.cross_entropy(logits, target, scale, True)
    again = rows.clone()
    torch.use_deterministic_algorithms(True)                         # new tensors hold NaN until they are written
    try:
        loss, none = cross_entropy(logits, target, scale, False, config)
        assert none is None and torch.equal(rows, again), "without gradient the logits stay"
        close("loss without gradient", loss, eager[0], truth[0])
        loss, grad = cross_entropy(logits, target, scale, True, config)
        loss2, grad2 = cross_entropy(again[:, :V], target, scale, True, config)
    finally:
        torch.use_deterministic_algorithms(False)
    close("loss", loss, eager[0], truth[0])
    close("gradient", grad, eager[1], truth[1])
    assert torch.equal(loss, loss2) and torch.equal(rows, again), "two runs are equal, what lies between the rows included"
    assert grad.data_ptr() == rows.data_ptr(), "in place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("R,V", KERNEL_CASES)
def test_cross_entropy_kernel(R, V, dtype):
    pytest.importorskip("triton")
    check_cross_entropy(R, V, dtype, DEVICE, (64, 4))


@pytest.mark.parametrize("seed", range(20))
def test_cross_entropy_kernel_on_random_shapes(seed):
    pytest.importorskip("triton")
    draw = random.Random(seed)
    check_cross_entropy(draw.randint(1, 9), draw.randint(1, 400), draw.choice([torch.float32, torch.float16]),
                        DEVICE, (2 ** draw.randint(4, 8), 4))


def test_cross_entropy_kernel_beyond_2_to_the_31():
    pytest.importorskip("triton")
    from kernels.train import cross_entropy
    memory = torch.empty(2 ** 31 + 64, dtype=torch.float16, device=DEVICE)
    logits = memory.as_strided((3, 64), (2 ** 30, 1))                # reserves 4 GiB, touches three pages
    logits.copy_(torch.randn(3, 64))
    target, scale = (torch.ones(3, 1, dtype=d, device=memory.device) for d in (torch.int64, torch.float32))
    truth = train.cross_entropy(logits.clone(), target, scale, True)
    loss, grad = cross_entropy(logits, target, scale, True, (64, 4))
    assert torch.allclose(loss, truth[0]) and torch.allclose(grad, truth[1], atol=1e-3)


def test_cross_entropy_kernel_on_extreme_logits():
    pytest.importorskip("triton")
    from kernels.train import cross_entropy
    logits = torch.tensor([[0.0, 1e4, -1e4], [88.0, 89.0, 3e38], [-3e38, -3e38, -3e38], [-torch.inf, -torch.inf, 1.0]], device=DEVICE)
    target, scale = torch.tensor([[1], [2], [0], [2]], device=DEVICE), torch.ones(4, 1, device=DEVICE)
    truth = train.cross_entropy(logits.double(), target, scale.double(), True)
    loss, grad = cross_entropy(logits, target, scale, True, (2, 1))
    assert torch.allclose(loss.double(), truth[0]) and torch.allclose(grad.double(), truth[1], atol=1e-6)
    bad = torch.tensor([[0.0, math.nan, 1.0]], device=DEVICE)
    assert cross_entropy(bad, target[:1], scale[:1], False, (2, 1))[0].isnan(), "NaN must reach the loss"


@gpu
@pytest.mark.parametrize("R,V", [*KERNEL_CASES, (300, 50304), (40000, 65)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy_kernel_on_the_gpu(R, V, dtype):
    from kernels.train import CONFIG
    check_cross_entropy(R, V, dtype, "cuda", CONFIG)


BUILD = """
import json, re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from kernels import simplicial, train
LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}                        # KB of shared memory one block may use
for kernel, types, consts, by16, warps, stages, arches in (*((*row, 3, LIMIT) for row in train.AOT), *simplicial.AOT):
    for arch in arches:
        signature = {n: "constexpr" if n in consts else types[n] for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(signature.items()) if t[0] == "*" or n in by16}
        out = triton.compile(ASTSource(kernel, signature, consts, aligned), target=GPUTarget("cuda", arch, 32),
                             options={"num_warps": warps, "num_stages": stages})
        with tempfile.TemporaryDirectory() as d:
            Path(d, "k.ptx").write_text(out.asm["ptx"])
            chip = re.search(r"\\.target (\\w+)", out.asm["ptx"])[1]
            log = subprocess.run([get_ptxas(arch).path, "-v", f"--gpu-name={chip}", f"{d}/k.ptx", "-o", f"{d}/k.cubin"],
                                 check=True, capture_output=True, text=True).stderr
        most = lambda pattern: max(map(int, re.findall(pattern, log)), default=0)
        print(json.dumps([kernel.__name__, chip, next(iter(types.values())), most(r"Used (\\d+) registers"),
                          most(r"(\\d+) bytes spill stores"), out.metadata.shared, LIMIT[arch] * 1024]))
"""


def test_kernels_build_for_four_gpus():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", BUILD], cwd=HERE, env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(rows) >= 24, out.stderr
    for name, chip, dtype, registers, spill, shared, limit in rows:
        print(name, chip, dtype, f"{registers} registers, {spill} bytes spilled, {shared} bytes shared")
        assert spill <= (0 if chip == "sm_90a" else 128) and shared <= limit


# ---------------------------------------------------------------------------------------------------------------------
# LASER

def laser_inputs(Tq=9, Tk=9, H=4, Hkv=2, D=8, std=1.0, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((H, Tq, 2.0), (Hkv, Tk, 2.0), (Hkv, Tk, std))
    return [(torch.randn(2, h, D, t, generator=draw) * s).to(dtype).transpose(2, 3) for h, t, s in shapes]   # not contiguous


def test_laser_reference_is_the_definition():
    q, k, v = laser_inputs(Tq=3, Tk=5)
    for h, i, d in ((0, 0, 0), (3, 1, 5), (2, 2, 7)):
        seen = i + 3
        p = (k[1, h // 2, :seen] @ q[1, h, i] / 8 ** 0.5).softmax(0)
        assert abs(laser.reference(q, k, v)[1, h, i, d] - (p * v[1, h // 2, :seen, d].exp()).sum().log()) < 1e-12


@pytest.mark.parametrize("std", [0.02, 1.0, 40.0], ids=lambda s: f"std{s}")
@pytest.mark.parametrize("Tq,Tk,Hkv", [(1, 1, 4), (17, 17, 2), (64, 64, 4), (1, 127, 1), (5, 127, 2)])
def test_laser_equals_its_reference(Tq, Tk, Hkv, std):
    q, k, v = (t.requires_grad_() for t in laser_inputs(Tq, Tk, Hkv=Hkv, std=std))
    do = torch.randn(2, 4, Tq, 8, dtype=torch.float64)
    truth = torch.autograd.grad(laser.reference(q, k, v), (q, k, v), do)
    for name, ours, exact in zip("qkv", torch.autograd.grad(laser.attention(q, k, v), (q, k, v), do), truth):
        assert torch.allclose(ours, exact, atol=1e-9), f"gradient of {name}"
    assert torch.allclose(laser.attention(q, k, v), laser.reference(q, k, v), atol=1e-11)
    for dtype in (torch.float32, torch.bfloat16):
        low = [t.detach().to(dtype) for t in (q, k, v)]
        close(str(dtype), laser.attention(*low), laser.reference(*low), laser.reference(*(t.double() for t in low)))


def test_laser_gradient_is_posterior_minus_prior():
    q, k, v = laser_inputs(H=2)
    s = (q @ k.transpose(-1, -2) / 8 ** 0.5).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf).requires_grad_()
    p = s.softmax(-1)                                                # (B, H, T, T)
    o = (p @ v.exp()).log()
    assert torch.allclose(o, laser.attention(q, k, v), atol=1e-12)
    b = p[0, 1, 6] * (v[0, 1, :, 3] - o[0, 1, 6, 3]).exp()
    assert torch.allclose(torch.autograd.grad(o[0, 1, 6, 3], s)[0][0, 1, 6], b - p[0, 1, 6], atol=1e-12) and abs(b.sum() - 1) < 1e-12


def test_laser_properties():
    q, k, v = laser_inputs(Tq=33, Tk=33)
    o, mean = laser.attention(q, k, v), train.softmax_attention(q, k, v)
    highest = v.cummax(2).values.repeat_interleave(2, 1)
    assert (mean <= o + 1e-12).all() and (o <= highest + 1e-12).all(), "between Jensen's bound and the largest value seen"
    assert torch.allclose(laser.attention(q, k, v + 200), o + 200, atol=1e-10)
    assert torch.allclose(laser.attention(q, k, v[:, :, :1].expand_as(v)), v[:, :, :1].repeat_interleave(2, 1).expand_as(q), atol=1e-12)
    assert torch.allclose(laser.attention(q, k, v * 1e-4) * 1e4, mean, atol=1e-3)


@pytest.mark.parametrize("jump", [1.0, 50.0, 90.0, 110.0, 300.0, -300.0, 1e4])
def test_laser_does_not_feel_the_future(jump):
    q, k, v = laser_inputs(Tq=40, Tk=40, dtype=torch.float32)
    after = v.clone()
    after[:, :, 30, 2] += jump
    before, now = laser.attention(q, k, v), laser.attention(q, k, after.requires_grad_())
    assert torch.equal(before[:, :, :30], now[:, :, :30]), "bit for bit"
    truth = laser.reference(*(t.double() for t in (q, k, after)))
    assert (now.double() - truth).abs().max() < 1e-5 * max(1, abs(jump))
    assert torch.autograd.grad(now.sum(), after)[0].isfinite().all()


def test_laser_at_large_values_and_bad_ones():
    q, k, v = laser_inputs(Tq=40, Tk=40, dtype=torch.float32)
    v = v.sign() * 80
    assert torch.allclose(laser.attention(q, k, v).double(), laser.reference(*(t.double() for t in (q, k, v))), atol=1e-3)
    v[0, 0, 5, 0] = math.nan
    assert laser.attention(q, k, v)[0, 0, 39, 0].isnan(), "NaN must reach the loss"


def test_laser_decodes_as_it_prefills():
    q, k, v = laser_inputs(Tq=20, Tk=20, dtype=torch.float32)
    whole = laser.attention(q, k, v)
    parts = [laser.attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b]) for a, b in ((0, 12), (12, 19), (19, 20))]
    assert torch.allclose(whole, torch.cat(parts, 2), atol=1e-5)
    model = small_gpt(attn="laser", n_kv_head=2)
    cached, plain = (list(train.generate(model, [5, 6, 7], 40, seed=3, cached=c)) for c in (True, False))
    assert cached == plain and cached != list(train.generate(small_gpt(n_kv_head=2), [5, 6, 7], 40, seed=3))


@pytest.mark.parametrize("attn", laser.ARMS)
def test_laser_probe_computes_what_it_probes(attn):
    model, x = small_gpt(attn=attn), torch.randint(64, (2, 16))
    before, loss = [layer.self_attn.attention for layer in model.layers], model(x, x)
    gradients = laser.logit_gradients(model, attn, x, x)
    assert all(layer.self_attn.attention is not old for layer, old in zip(model.layers, before)), "nothing was probed"
    assert abs(model(x, x).item() - loss.item()) < 1e-5 and len(gradients) == 2 and all(0 < g < 100 for g in gradients)


def test_laser_experiment(tiny, monkeypatch, capsys):
    monkeypatch.setattr(laser, "STEPS", 4)
    monkeypatch.setattr(laser, "PROBES", 2)
    monkeypatch.setitem(train.PRESETS, "tiny", {**train.PRESETS["tiny"], "n_layer": 1, "n_embd": 32, "n_head": 2, "batch_size": 2})
    result = laser.main(["--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {"laser-cpu.json", "laser-cpu.png"}
    assert list(result["gradients"]["laser"]) == [2, 4] and len(result["bits_per_byte"]["softmax"]) == 3
    assert "paired" in capsys.readouterr().out


def test_laser_trains(tiny):
    run = train.main([*tiny, "--attn", "laser"])
    assert run["out"] == "out/tiny-laser" and float(rows(run["out"])[-1][2]) < float(rows(run["out"])[1][2]) - 0.5
    assert sample.main(["--max-tokens", "5", "--device", "cpu"])["text"]


# ---------------------------------------------------------------------------------------------------------------------
# 2-simplicial attention

def trilinear_inputs(Tq=9, Tk=9, H=4, Hkv=2, D=6, B=2, Tk2=None, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (H, Tq), (Hkv, Tk), (Hkv, Tk), (Hkv, Tk2 or Tk), (Hkv, Tk2 or Tk)
    return [torch.randn(B, t, h, D, generator=draw).to(dtype).transpose(1, 2) for h, t in shapes]               # not contiguous


def by_pairs(q, k, v, k2, v2, w1, w2, b, h, i):
    """-> o and lse of one query from the definition, pair by pair."""
    g, off, off2 = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2], k2.shape[2] - q.shape[2]
    k, v, k2, v2 = (t[b, h // g] for t in (k, v, k2, v2))
    pairs = [(j, l) for j in range(max(0, i + off - w1 + 1), i + off + 1) for l in range(max(0, i + off2 - w2 + 1), i + off2 + 1)]
    s = torch.stack([(q[b, h, i] * k[j] * k2[l]).sum() for j, l in pairs]) / q.shape[3] ** 0.5
    return sum(p * v[j] * v2[l] for p, (j, l) in zip(s.softmax(0), pairs)), s.logsumexp(0)


SIMPLICIAL_SHAPES = [(1, 1, 1, 1, 1), (5, 5, 2, 3, 2), (7, 7, 4, 9, 9), (3, 8, 1, 2, 5), (1, 8, 4, 4, 1), (8, 8, 2, 1, 3)]


@pytest.mark.parametrize("Tq,Tk,Hkv,w1,w2", SIMPLICIAL_SHAPES)
def test_simplicial_reference_is_the_definition(Tq, Tk, Hkv, w1, w2):
    inputs = trilinear_inputs(Tq, Tk, Hkv=Hkv)
    o = simplicial.reference(*inputs, w1=w1, w2=w2)
    for b, h, i in ((0, 0, 0), (1, 3, Tq - 1), (0, 2, Tq // 2)):
        assert torch.allclose(o[b, h, i], by_pairs(*inputs, w1, w2, b, h, i)[0], atol=1e-12)


@pytest.mark.parametrize("function", [simplicial.reference, simplicial.attention], ids=["reference", "attention"])
def test_simplicial_gradients_are_those_of_the_function(function):
    inputs = [t.requires_grad_() for t in trilinear_inputs(3, 4, H=2, Hkv=1, D=2, B=1)]
    assert torch.autograd.gradcheck(lambda *a: function(*a, w1=3, w2=2), inputs)


@pytest.mark.parametrize("scores", [2 ** 25, 500], ids=["whole", "blocks"])
@pytest.mark.parametrize("Tq,Tk,Hkv,w1,w2", [*SIMPLICIAL_SHAPES, (64, 64, 2, 20, 7), (33, 50, 1, 5, 40)])
def test_simplicial_equals_its_reference(Tq, Tk, Hkv, w1, w2, scores, monkeypatch):
    monkeypatch.setattr(simplicial, "SCORES", scores)
    inputs = [t.requires_grad_() for t in trilinear_inputs(Tq, Tk, Hkv=Hkv)]
    do = torch.randn(2, 4, Tq, 6, dtype=torch.float64)
    ours, exact = (f(*inputs, w1=w1, w2=w2) for f in (simplicial.attention, simplicial.reference))
    assert torch.allclose(ours, exact, atol=1e-12)
    for name, a, b in zip(("q", "k", "v", "k2", "v2"), *(torch.autograd.grad(o, inputs, do) for o in (ours, exact))):
        assert torch.allclose(a, b, atol=1e-11), f"gradient of {name}"
    low = [t.detach().bfloat16() for t in inputs]
    close("bf16", *(f(*low, w1=w1, w2=w2) for f in (simplicial.attention, simplicial.reference)),
          simplicial.reference(*(t.double() for t in low), w1=w1, w2=w2))


@pytest.mark.parametrize("function", [simplicial.reference, simplicial.attention], ids=["reference", "attention"])
def test_simplicial_closed_forms(function):
    q, k, v, k2, v2 = trilinear_inputs(12, 12, D=6)
    g = lambda t: t.repeat_interleave(2, 1)
    one, equal = torch.ones_like(k), lambda a, b: torch.allclose(a, b, atol=1e-12)

    def near(q, k, v, w):                                            # softmax attention through a window
        mask = torch.ones(12, 12, dtype=torch.bool).tril() & torch.ones(12, 12, dtype=torch.bool).triu(1 - w)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    def mean(v, w):
        return torch.stack([v[:, :, max(0, i - w + 1):i + 1].mean(2) for i in range(12)], 2)
    o = function(q, k, v, k2, v2, w1=5, w2=3)
    assert equal(o[:, :, 0], g(v * v2)[:, :, 0]), "a single pair"
    assert equal(function(q, k, v, k2, v2, w1=1, w2=1), g(v * v2))
    assert equal(function(q, k, v, one, one, w1=5, w2=3), near(q, k, v, 5)) and equal(function(q, one, one, k2, v2, w1=5, w2=3), near(q, k2, v2, 3))
    assert equal(function(q, k, v, k2, v2, w1=5, w2=1), near(q * g(k2), k, v, 5) * g(v2)), "w2 = 1 gates"
    assert equal(function(q * 0, k, v, k2, v2, w1=5, w2=3), g(mean(v, 5) * mean(v2, 3)))
    assert equal(function(q, k, v, k2, v2, w1=99, w2=12), function(q, k, v, k2, v2, w1=12, w2=50)), "windows past the start"
    half, left = one.clone(), one.clone()
    half[..., 3:], left[..., :3] = k[..., 3:] * 0 + 1, 1
    a, b = torch.cat([k[..., :3], one[..., 3:]], -1), torch.cat([one[..., :3], k2[..., 3:]], -1)
    q1, q2 = torch.cat([q[..., :3], q[..., 3:] * 0], -1), torch.cat([q[..., :3] * 0, q[..., 3:]], -1)
    assert equal(function(q, a, v, b, v2, w1=5, w2=3), near(q1, a, v, 5) * near(q2, b, v2, 3)), "additive logits: a product of two"
    assert equal(function(q, k2, v2, k, v, w1=3, w2=5), o), "the two roles are alike"
    c, order = torch.rand(6, dtype=torch.float64) + 0.5, torch.randperm(6)
    assert equal(function(q, k * c, v / c, k2 / c, v2 * c, w1=5, w2=3), o)
    assert equal(function(*(t[..., order] for t in (q, k, v, k2, v2)), w1=5, w2=3), o[..., order])


def test_simplicial_determinant_form_knows_no_rotation():
    q, k, v, k2, v2 = trilinear_inputs(7, 7, H=2)
    turn, plain = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0], dict(w1=4, w2=3)
    turn = turn * torch.linalg.det(turn)                             # in SO(3)
    turned = [(t.unflatten(-1, (2, 3)) @ turn.T).flatten(-2) for t in (q, k, k2)]
    o, again = (simplicial.reference(a, b, v, c, v2, **plain, determinant=True) for a, b, c in ((q, k, k2), turned))
    assert torch.allclose(o, again, atol=1e-12)
    o, again = (simplicial.reference(a, b, v, c, v2, **plain) for a, b, c in ((q, k, k2), turned))
    assert (o - again).abs().max() > 0.01, "the trilinear form is another"
    i, j, l = q[0, 1, 6], k[0, 1, 4], k2[0, 1, 5]
    det = sum(torch.linalg.det(torch.stack([t[c:c + 3] for t in (i, j, l)])) for c in (0, 3))
    a, b, c = simplicial.sarrus(i, j, l)
    assert abs((a * b * c).sum() - det) < 1e-12 and len(a) == 12


def simplicial_kernel(*inputs, w1, w2):
    pytest.importorskip("triton")
    from kernels.simplicial import forward
    return forward(*(t.contiguous() for t in inputs), w1, w2, (64, 16, 4, 1) if DEVICE == "cpu" else None)[0]


@pytest.mark.parametrize("function", [simplicial.attention, simplicial_kernel], ids=["lean", "kernel"])
def test_simplicial_sees_its_windows_alone(function):
    inputs = trilinear_inputs(40, 40, H=2, Hkv=1, D=16, B=1, dtype=torch.float32)
    inputs = [t.to(DEVICE) for t in inputs]
    before = function(*inputs, w1=9, w2=4)
    for n, (name, w) in enumerate((("k", 9), ("v", 9), ("k2", 4), ("v2", 4)), 1):
        changed = [t.clone() for t in inputs]
        changed[n][:, :, 20] += 1e4
        now = function(*changed, w1=9, w2=4)
        same = (before == now).all(-1).all(1)[0].tolist()            # of each position, bit for bit
        assert all(same[:20]) and all(same[20 + w:]) and not any(same[20:20 + w]), name


def check_simplicial(Tq, Tk, H, Hkv, D, w1, w2, dtype, device, configs=None, B=2, Tk2=None, size=1.0):
    from kernels.simplicial import attention, backward, forward
    inputs = [t.to(device) for t in trilinear_inputs(Tq, Tk, H, Hkv, D, B, Tk2, dtype, seed=Tq * w1 + w2)]
    inputs[0] = inputs[0] * size
    do = torch.randn(B, D, Tq, H, generator=torch.Generator().manual_seed(1)).to(dtype).to(device).permute(0, 3, 2, 1)
    results = []
    for make in (torch.Tensor.double, torch.clone):
        exact = [make(t).detach().requires_grad_() for t in inputs]
        o = simplicial.reference(*exact, w1=w1, w2=w2)
        results.append([o.detach(), *torch.autograd.grad(o, exact, make(do))])

    def run():
        if configs is None or device == "cuda":                      # as it is used; large tiles of float32 compile for minutes
            given = [t.detach().requires_grad_() for t in inputs]
            o, lse = attention(*given, w1, w2)
            return [o.detach(), *torch.autograd.grad(o, given, do), lse]
        given = [t.contiguous() for t in inputs]
        o, lse = forward(*given, w1, w2, configs[0])
        return [o, *backward(do.contiguous(), *given, o, lse, w1, w2, *configs[1:]), lse]
    torch.use_deterministic_algorithms(True)                         # new tensors hold NaN until they are written
    try:
        runs = [run(), run()]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, ours, again, eager, truth in zip(("o", "dq", "dk", "dv", "dk2", "dv2"), *runs, results[1], results[0]):
        close(name, ours, eager, truth)
        assert torch.equal(ours, again), f"{name}: two runs differ"
    for b, h, i in ((0, 0, 0), (B - 1, H - 1, Tq - 1), (0, H // 2, Tq // 2)):
        truth = by_pairs(*(t.cpu().double() for t in inputs), w1, w2, b, h, i)[1]
        assert abs(runs[0][6][b, h, i].item() - truth) < (1e-4 if dtype == torch.float32 else 2e-2) * max(1, abs(truth)), "a natural logarithm"
    if min(w1, Tk) == min(w2, Tk2 or Tk) == 1:
        assert not any(runs[0][n].any() for n in (1, 2, 4)), "a single pair has no derivative, exactly"


SIMPLICIAL_CASES = [(1, 1, 1, 1, 16, 1, 1), (17, 17, 2, 2, 16, 1, 1), (17, 17, 6, 2, 16, 3, 8), (40, 40, 2, 1, 32, 12, 33),
                    (64, 64, 1, 1, 32, 64, 5), (34, 34, 1, 1, 16, 34, 33), (127, 127, 1, 1, 16, 64, 3), (3, 90, 4, 1, 32, 40, 20),
                    (30, 70, 2, 1, 16, 5, 40), (65, 65, 1, 1, 64, 50, 1)]


@pytest.mark.parametrize("Tq,Tk,H,Hkv,D,w1,w2", SIMPLICIAL_CASES)
def test_simplicial_kernels(Tq, Tk, H, Hkv, D, w1, w2):
    pytest.importorskip("triton")
    check_simplicial(Tq, Tk, H, Hkv, D, w1, w2, torch.float32, DEVICE, [(128, 32, 4, 1)] * 3, B=1)


@pytest.mark.parametrize("dtype,size", [(torch.float16, 1.0), (torch.float16, 4.0), (torch.float32, 30.0)], ids=str)
def test_simplicial_kernels_at_large_logits(dtype, size):
    pytest.importorskip("triton")
    check_simplicial(24, 24, 2, 1, 16, 16, 7, dtype, DEVICE, [(64, 32, 4, 1)] * 3, B=1, size=size)


def test_simplicial_kernels_over_long_windows():
    pytest.importorskip("triton")
    check_simplicial(300, 300, 1, 1, 16, 512, 8, torch.float32, DEVICE, [(128, 64, 4, 1)] * 3, B=1)


@pytest.mark.parametrize("seed", range(5))
def test_simplicial_kernels_on_random_shapes(seed):
    pytest.importorskip("triton")
    draw = random.Random(seed)
    Tq, Hkv, g = draw.randint(1, 25), draw.randint(1, 2), draw.choice([1, 2, 3, 5])
    Tk, Tk2 = Tq + draw.choice([0, 0, 7, 30]), Tq + draw.choice([0, 0, 3, 20])
    configs = [(2 ** draw.randint(5, 7), 2 ** draw.randint(4, 6), 4, 1) for _ in range(3)]
    check_simplicial(Tq, Tk, g * Hkv, Hkv, 16, draw.randint(1, 40), draw.randint(1, 40), torch.float32, DEVICE, configs, B=1, Tk2=Tk2)


def test_simplicial_op_is_sound():
    pytest.importorskip("triton")
    from kernels.simplicial import WIDTHS, attention, simplicial_op, sizes
    inputs = [t.to(DEVICE).contiguous().requires_grad_() for t in trilinear_inputs(5, 5, H=2, Hkv=1, D=16, B=1, dtype=torch.float32)]
    torch.library.opcheck(simplicial_op, (*inputs, 4, 3), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    compiled = torch.compile(lambda *a: attention(*a, 4, 3)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), attention(*inputs, 4, 3)[0]) and 16 in WIDTHS
    check_simplicial(7, 9, 4, 2, 16, 4, 3, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="too many for one call"):
        big = torch.empty(1, 64, 2 ** 20, 128, device="meta")
        sizes(big, big[:, :1], big[:, :1], 4, 3)


@gpu
@pytest.mark.parametrize("Tq,Tk,H,Hkv,D,w1,w2", [*SIMPLICIAL_CASES, (300, 300, 2, 2, 128, 512, 32), (300, 300, 16, 1, 128, 32, 512),
                                                 (529, 529, 4, 2, 64, 512, 32), (1, 600, 64, 1, 128, 512, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_simplicial_kernels_on_the_gpu(Tq, Tk, H, Hkv, D, w1, w2, dtype):
    check_simplicial(Tq, Tk, H, Hkv, D, w1, w2, dtype, "cuda")


@gpu
def test_simplicial_compiles_without_a_break_on_the_gpu():
    inputs = [t.to("cuda", torch.bfloat16).requires_grad_() for t in trilinear_inputs(200, 200, D=64)]
    both = [f(*inputs, w1=64, w2=8) for f in (simplicial.attention, torch.compile(simplicial.attention, fullgraph=True))]
    a, b = (torch.autograd.grad(o, inputs, torch.ones_like(o)) for o in both)
    assert torch.equal(*both) and all(map(torch.equal, a, b))


def test_simplicial_refuses_what_does_not_fit():
    q, k, v, k2, v2 = trilinear_inputs()
    for change, part in ((dict(k=k[..., :4]), "do not fit"), (dict(v2=v2[:, :1]), "do not fit"), (dict(k2=k2[:, :, :5], v2=v2[:, :, :5]), "not the last of 5"),
                         (dict(w1=0), "at least 1"), (dict(w2=-3), "at least 1")):
        with pytest.raises(ValueError, match=part):
            simplicial.attention(**{**dict(q=q, k=k, v=v, k2=k2, v2=v2, w1=5, w2=3), **change})


SIMPLICIAL_GPT = dict(attn="simplicial", attn_args=dict(w1=5, w2=3), simplicial_every=2, n_layer=4, n_kv_head=2)


def test_simplicial_decodes_as_it_prefills():
    q, k, v, k2, v2 = trilinear_inputs(20, 20, dtype=torch.float32)
    whole = simplicial.attention(q, k, v, k2, v2, w1=7, w2=3)
    cut = lambda t, a, b, w: t[:, :, max(0, a + 1 - w):b]            # what a query from a on can see
    parts = [simplicial.attention(q[:, :, a:b], *(cut(t, a, b, 7) for t in (k, v)), *(cut(t, a, b, 3) for t in (k2, v2)), w1=7, w2=3)
             for a, b in ((0, 12), (12, 19), (19, 20))]
    assert torch.allclose(whole, torch.cat(parts, 2), atol=1e-5)
    model = small_gpt(**SIMPLICIAL_GPT)
    cached, plain = (list(train.generate(model, [5, 6, 7], 40, seed=3, cached=c)) for c in (True, False))
    assert cached == plain and len(set(cached)) > 3


def test_simplicial_state_does_not_grow():
    model, ids = small_gpt(torch.float64, **SIMPLICIAL_GPT, block_size=64), torch.randint(64, (1, 40))
    cache = [train.Cache(64) for _ in model.layers]
    for a, b in ((0, 9), (9, 12), (12, 13), (13, 14), (14, 21), *((t, t + 1) for t in range(21, 40))):         # in ones and in some
        logits = model(ids[:, a:b], cache=cache)[0, -1]
        assert torch.allclose(logits, model(ids[:, :b])[0, -1], atol=1e-9), f"positions {a} to {b}"
    assert [[t.shape[2] for t in c.kept] for c in cache] == [[64, 64], [5, 5, 3, 3]] * 2


def test_simplicial_layers_of_the_gpt():
    model = small_gpt(torch.float64, **SIMPLICIAL_GPT)
    assert [len(layer.self_attn.names) for layer in model.layers] == [3, 5, 3, 5]
    layer, x = model.layers[1].self_attn, torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v, k2, v2 = (getattr(layer, f"{n}_proj")(x).unflatten(-1, (-1, 8)).transpose(1, 2) for n in layer.names)
    y = simplicial.reference(q, k, v, k2, v2, w1=5, w2=3).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x, *train.rotary(0, 9, 8, 1e4, x.device)), layer.o_proj(y), atol=1e-10), "nothing is turned"
    flops = train.flops_per_token(model) - train.flops_per_token(small_gpt(**{**SIMPLICIAL_GPT, "simplicial_every": 5}))
    projections, logits = 2 * 2 * 32 * 2 * 8, (1 + 4 + 9 + 12 + 12 * 15) / 16                # of two layers; of a query
    assert flops == 6 * projections + 12 * 2 * 32 * (logits - 16 / 2)
    changed = torch.randint(64, (1, 16))
    ids, changed[0, 9] = changed.clone(), (changed[0, 9] + 1) % 64
    assert torch.equal(model(ids)[:, :9], model(changed)[:, :9])


def test_match3_by_hand():
    draw = torch.Generator().manual_seed(0)
    for M, T in ((16, 6), (64, 12), (997, 30)):
        x = torch.randint(M, (32, T), generator=draw)
        truth = simplicial.match3(x, M)
        assert torch.equal(simplicial.match3_by_hand(x, M), truth) and 0 < truth.float().mean() < 1
        assert torch.equal(simplicial.match3_by_hand(x, M, simplicial.reference), truth)
    assert simplicial.most_right_of_four(torch.randn(10000, 4, generator=draw)) == 3
    assert simplicial.match3(torch.tensor([[1, 2, 3, 9]]), 6)[0].tolist() == [False, True, True, True]         # 2 + 2 + 2


def test_simplicial_tasks_are_what_they_say():
    draw = torch.Generator().manual_seed(0)
    x, y = simplicial.match3_task(256, 20, 7, draw)
    assert torch.equal(simplicial.match3(x[..., 0], 20)[:, -1].long(), y) and 0.49 < y.float().mean() < 0.51
    near = (x[:, :-1, None, 0] + x[:, None, :-1, 0] + x[:, -1:, None, 0]) % 20 == 1
    assert near.flatten(1).any(1)[y == 0].all(), "near misses"
    x, y = simplicial.composition_task(64, 5, draw)
    for tokens, answer in zip(x.tolist(), y.tolist()):
        tables = {(table, key): value for table, key, value in tokens[:-1]}
        assert len(tables) == 10 and answer == tables[1, tables[0, tokens[-1][1]]]


def test_simplicial_refit_of_the_paper():
    exponents = simplicial.refit()
    assert abs(exponents["GSM8k"]["softmax"][0] - 0.1311) < 1e-4 and abs(exponents["MBPP"]["2-simplicial"][0] - 0.1702) < 1e-4
    assert all(exponents[t]["2-simplicial"][1] < exponents[t]["softmax"][1] for t in ("MMLU", "MBPP")), "half rests on the smallest size"


def test_simplicial_experiment(tiny, monkeypatch, capsys):
    monkeypatch.setattr(simplicial, "TASKS", {name: (*task[:3], 2) for name, task in simplicial.TASKS.items()})
    monkeypatch.setattr(simplicial, "TASK_SEEDS", (1,))
    monkeypatch.setattr(simplicial, "LM_SEEDS", (1, 2))
    flags = "--data text.txt --n-layer 2 --n-embd 24 --n-head 2 --block-size 16 --batch-size 4 --eval-batches 1 --simplicial-every 2"
    monkeypatch.setattr(simplicial, "LM_FLAGS", f"{flags} --steps 3")
    result = simplicial.main(["--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {"simplicial-cpu.json", "simplicial-cpu.png"}
    for runs in result["tasks"].values():
        assert len({r["parameters"] for arm in runs.values() for r in arm}) == 1, "equal parameters"
    assert len(result["language_model"]) == 7 and "against the baseline" in capsys.readouterr().out
    monkeypatch.setattr(simplicial, "FULL_FLAGS", f"{flags} --steps 3 --device cpu")
    monkeypatch.setattr(simplicial, "FULL_SEEDS", (1,))
    monkeypatch.setattr(simplicial, "FULL_SIZES", {"S": "--n-hidden 32", "M": "--n-hidden 64", "L": "--n-hidden 128"})
    full = simplicial.on_a_gpu(train, Path("full"))
    low, high = full["fits"]["2-simplicial"]["interval_95"]
    assert low <= full["fits"]["2-simplicial"]["a"] <= high
    if not torch.cuda.is_available():
        refused(capsys, ["--full"], "for a GPU", script=simplicial)


def test_simplicial_trains(tiny, capsys):
    run = train.main([*tiny, "--attn", "simplicial", "--simplicial-every", "2", "--w1", "8", "--w2", "4"])
    assert run["out"] == "out/tiny-simplicial" and float(rows(run["out"])[-1][2]) < float(rows(run["out"])[1][2]) - 0.5
    assert train.load_checkpoint(Path(run["out"]))["config"]["model"]["attn_args"] == {"w1": 8, "w2": 4}
    one, plain = (sample.main(["--max-tokens", "30", "--device", "cpu", *more])["text"] for more in ([], ["--no-cache"]))
    assert one == plain
    refused(capsys, [*tiny, "--attn", "simplicial", "--simplicial-every", "0"], "--simplicial-every is 0", "at least 1")
    refused(capsys, [*tiny, "--attn", "simplicial", "--w2", "0"], "--w2 is 0", "at least 1 position")
    state = torch.load("out/tiny-simplicial/ckpt.pt", weights_only=True)
    state["config"]["model"]["attn_args"]["w1"] = "9"
    torch.save(state, "out/tiny-simplicial/ckpt.pt")
    refused(capsys, ["--init", "out/tiny-simplicial", "--device", "cpu"], "--w1 is '9'", script=sample)


# ---------------------------------------------------------------------------------------------------------------------
# Data and tokenizers

def test_a_batch_is_a_function_of_seed_and_step():
    a = train.batch_starts(1, 7, 1000, 8)
    assert (a == train.batch_starts(1, 7, 1000, 8)).all() and 0 <= a.min() and a.max() < 1000
    others = [train.batch_starts(s, t, 1000, 8).tolist() for s, t in ((1, 8), (2, 7), (0, 8), (8, 0), (7, 1))]
    assert a.tolist() not in others and len({tuple(o) for o in others}) == 5
    tokens = np.arange(50, dtype=np.uint8)
    x, y = train.windows(tokens, [0, 45], 4, torch.device("cpu"))
    assert x.tolist() == [[0, 1, 2, 3], [45, 46, 47, 48]] and torch.equal(y, x + 1)


def test_documents_of_a_folder(tmp_path):
    for name, content in {"a.txt": b"one", "sub/b.md": b"two", "copy.txt": b"one", "empty": b"", "pic.png": b"\x89PNG\0\0",
                          "latin.txt": b"caf\xe9", ".hidden": b"no"}.items():
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "d" / name).write_bytes(content)
    tokens = bytes(train.load_tokens(str(tmp_path / "d"), train.ByteTokenizer(), tmp_path / "cache"))
    assert sorted(tokens.split(b"\0")) == [b"", b"one", b"two"]
    (tmp_path / "d/a.txt").write_bytes(b"three")
    assert b"three" in bytes(train.load_tokens(str(tmp_path / "d"), train.ByteTokenizer(), tmp_path / "cache")), "a stale cache"


def test_standard_library_is_there():
    files = train.find_documents("stdlib")
    assert len(files) > 200 and all(p.suffix == ".py" and "site-packages" not in p.parts for p in files)
    assert {p.resolve() for p in files} <= {p.resolve() for p in train.find_documents("python")}


def write_bpe(path):
    """A little .tiktoken file: every byte and a few merges."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"qu", b"er", b"ov", b"over", b" over"]
    Path(path).write_text("\n".join(f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(tokens)))


def test_tokenizer_from_a_file_lives_on_in_the_run(tiny, capsys):
    write_bpe("mine.tiktoken")
    run = train.main([*tiny, "--tokenizer", "mine.tiktoken", "--out", "out/bpe"])
    os.remove("mine.tiktoken")
    assert run["val_bpb"] < run["val_loss"] / math.log(2), "tokens are longer than a byte"
    tokenizer = train.load_model(Path("out/bpe"))[1]
    text = "the quick fox, over the\n\n  wall — é 数 123"
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)).decode() == text and tokenizer.eot_token == 264
    assert len(tokenizer.encode_ordinary(" the")) == 1
    assert sample.main(["--prompt", "the ", "--max-tokens", "5", "--device", "cpu"])["text"].startswith("the ")


def test_published_vocabulary_is_known_by_its_hash():
    path = HERE.parent / "shared/data/gpt2.tiktoken"
    if not path.exists():
        pytest.skip("needs the GPT-2 vocabulary")
    tokenizer = train.get_tokenizer(str(path))
    assert tokenizer.name == "r50k_base" and tokenizer.eot_token == 50256
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]


def test_tokenizer_without_a_network_says_so_at_once(tiny, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")               # nobody listens there
    began = time.monotonic()
    refused(capsys, [*tiny, "--tokenizer", "cl100k_base"], "cl100k_base", "--tokenizer", ".tiktoken", "network")
    assert time.monotonic() - began < 20


# ---------------------------------------------------------------------------------------------------------------------
# Runs on disk

def rows(folder):
    return list(csv.reader(open(Path(folder) / "log.csv")))


def test_forty_steps_equal_twenty_and_twenty(tiny):
    whole = train.main([*tiny, "--out", "out/whole", "--micro-batch", "2"])
    train.main([*tiny, "--out", "out/parts", "--micro-batch", "2", "--stop-after", "20"])
    with open("out/parts/log.csv", "a") as f:
        f.write("21,9,9,9,,\n")                                      # as written by a run that was killed later on
    parts = train.main(["--resume", "out/parts", "--sample", "5", "--device", "cpu"])
    a, b = (train.load_checkpoint(Path(w["out"])) for w in (whole, parts))
    assert a["step"] == b["step"] == 40 and same(a, b)
    assert rows("out/whole") == rows("out/parts") and len(rows("out/whole")) == 41
    assert {p.name for p in Path("out/whole").iterdir()} == {"ckpt.pt", "config.json", "log.csv", "loss.png"}
    assert Path("out/whole/loss.png").read_bytes()[:4] == b"\x89PNG"
    assert float(rows("out/whole")[-1][2]) < float(rows("out/whole")[1][2]) - 0.5, "it learns"


def test_failed_save_leaves_the_old_checkpoint(tiny, monkeypatch, capsys):
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    before = Path("out/a/ckpt.pt").read_bytes()

    def broken(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", broken)
    refused(capsys, ["--resume", "out/a", "--device", "cpu"], "cannot write", "No space left", "untouched")
    assert Path("out/a/ckpt.pt").read_bytes() == before and not list(Path("out/a").glob(".*"))


def test_full_disk(tiny, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    before = Path("out/a/ckpt.pt").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))       # the kernel refuses to let any file grow further
    try:
        refused(capsys, ["--resume", "out/a", "--device", "cpu"], "cannot write out/a/ckpt.pt", "untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path("out/a/ckpt.pt").read_bytes() == before and not list(Path("out/a").glob(".*"))


def test_killed_while_saving(tiny):
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    before = Path("out/a/ckpt.pt").read_bytes()
    kill = "import os, train\nos.fsync = lambda fd: os.kill(os.getpid(), 9) if os.fstat(fd).st_size > 10000 else None\ntrain.main()"
    out = subprocess.run([sys.executable, "-c", kill, "--resume", "out/a", "--device", "cpu"],
                         env={**os.environ, "PYTHONPATH": str(HERE)})
    assert out.returncode == -9 and Path("out/a/ckpt.pt").read_bytes() == before and list(Path("out/a").glob(".ckpt*"))
    assert train.main(["--resume", "out/a", "--device", "cpu"])["step"] == 40 and not list(Path("out/a").glob(".ckpt*"))


class Code:
    def __reduce__(self):
        return os.system, ("touch run_by_the_checkpoint",)


@pytest.mark.parametrize("change,part", [
    (lambda c: c.update(more=Code()), "damaged, or holds more"),
    (lambda c: c["config"]["model"].update(n_layer=10 ** 9), "1024 layers"),
    (lambda c: c["config"]["model"].update(n_layer="3"), "not of type int"),
    (lambda c: c["config"]["model"].update(shell="rm"), "unknown setting shell"),
    (lambda c: c["config"]["model"].update(attn="os"), "not beside train.py"),
    (lambda c: c.pop("tokenizer"), "lacks tokenizer"),
    (lambda c: c.update(tokenizer={"name": "x"}), "damaged"),
    (lambda c: c.update(step="9"), "malformed"),
    (lambda c: c["model"].pop("norm.weight"), "norm.weight is missing"),
    (lambda c: c["model"].update({"norm.weight": torch.ones(7)}), "norm.weight is (7,), not (32,)"),
    (lambda c: c["config"]["model"].update(attn_args={"x": 1}), "the option x, which it does not have"),
], ids=["code", "huge", "type", "unknown", "module", "lacks", "tokenizer", "step", "tensor", "shape", "option"])
def test_hostile_checkpoint(tiny, capsys, change, part):
    train.main([*tiny, "--out", "out/a", "--steps", "2"])
    state = torch.load("out/a/ckpt.pt", weights_only=True)
    change(state)
    torch.save(state, "out/a/ckpt.pt")
    refused(capsys, ["--init", "out/a", "--device", "cpu"], part, script=sample)
    refused(capsys, ["--init", "out/a", "--out", "out/b", "--device", "cpu", "--data", "text.txt"], part)
    assert not Path("run_by_the_checkpoint").exists() and not Path("out/b/ckpt.pt").exists()


def test_truncated_checkpoint(tiny, capsys):
    train.main([*tiny, "--out", "out/a", "--steps", "2"])
    Path("out/a/ckpt.pt").write_bytes(Path("out/a/ckpt.pt").read_bytes()[:-3000])
    refused(capsys, ["--init", "out/a"], "out/a/ckpt.pt is not a checkpoint", script=sample)


def test_init_starts_anew_from_the_weights(tiny, capsys):
    a = train.main([*tiny, "--out", "out/a"])
    b = train.main("--init out/a --out out/b --data text.txt --steps 1 --batch-size 4 --lr 1e-9 --device cpu --sample 1 "
                   "--eval-batches 2".split())
    assert b["step"] == 1 and abs(a["val_loss"] - b["val_loss"]) < 1e-3
    refused(capsys, ["--init", "out/a", "--n-layer", "3", "--device", "cpu"], "--n-layer is 3 here but 2 in out/a")


@pytest.mark.parametrize("where", ["start", "train", "evaluate", "generate"])
def test_signal_saves_and_ends(tiny, monkeypatch, where):
    train.main([*tiny, "--out", "out/whole"])
    calls, hits, name = [], [], {"start": "build", "train": "batch_starts", "evaluate": "windows", "generate": "generate"}[where]
    original = getattr(train, name)

    def hit(*args, **more):
        calls.append(args)
        if where == "start" or where == "train" and args[1] == 10 or where == "evaluate" and len(calls) > 21:
            signal.raise_signal(signal.SIGTERM)
            hits.append(len(calls))
        if where != "generate":
            return original(*args, **more)

        def tokens():
            for token in original(*args, **more):
                signal.raise_signal(signal.SIGINT)
                yield token
        return tokens()
    monkeypatch.setattr(train, name, hit)
    handler = signal.getsignal(signal.SIGTERM)
    run = train.main([*tiny, "--out", "out/a", "--eval-every", "20"])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert run["signal"] == (signal.SIGINT if where == "generate" else signal.SIGTERM)
    monkeypatch.setattr(train, name, original)
    assert where != "evaluate" or hits == [len(calls)], "it went on evaluating"
    if where != "generate":
        assert (0 if where == "start" else 9) <= run["step"] < 40 and train.load_checkpoint(Path("out/a"))["step"] == run["step"]
        train.main(["--resume", "out/a", "--device", "cpu", "--sample", "1"])
    a, b = (train.load_checkpoint(Path(f"out/{n}")) for n in ("a", "whole"))
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


def test_sigterm_from_outside(tiny):
    p = subprocess.Popen([sys.executable, HERE / "train.py", *tiny, "--out", "out/a", "--steps", "1000000"], stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True)
    for line in p.stdout:
        if line.startswith("run "):
            break
    time.sleep(1)
    p.send_signal(signal.SIGTERM)
    assert "--resume out/a" in p.stdout.read() and p.wait(30) == 128 + 15
    assert train.load_checkpoint(Path("out/a"))["step"] > 0


def test_loss_that_is_not_finite_stops_the_run(tiny, monkeypatch, capsys):
    original, steps, models = train.take_step, [], []

    def poisoned(model, *more, **named):
        steps.append(1)
        if len(steps) == 8:
            model.norm.weight.data[0] = math.nan
            models.append((model, model.embed_tokens.weight.clone()))
        return original(model, *more, **named)
    monkeypatch.setattr(train, "take_step", poisoned)
    refused(capsys, [*tiny, "--out", "out/a", "--eval-every", "5"], "step 8: the loss is nan", "out/a/ckpt.pt is the last good", status=1)
    assert train.load_checkpoint(Path("out/a"))["step"] == 5
    model, before = models[0]
    assert torch.equal(model.embed_tokens.weight, before), "the optimizer took the step"


def test_weights_gone_bad_are_not_saved(tiny, monkeypatch, capsys):
    losses = iter([2.0, 1.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    refused(capsys, [*tiny, "--out", "out/a", "--eval-every", "10"], "step 30: the held-out loss is nan", status=1)
    assert train.load_checkpoint(Path("out/a"))["step"] == 20


def test_infinite_gradient_stops_the_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    refused(capsys, [*tiny, "--out", "out/a"], "step 1:", "norm inf", "no checkpoint yet", status=1)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flags,parts", [
    ("--steps 0", ["--steps is 0", "at least 1"]), ("--lr -1", ["--lr is -1.0", "above 0"]), ("--lr nan", ["--lr is nan"]),
    ("--steps many", ["--steps", "invalid int value: 'many'"]), ("--stepps 3", ["unrecognized arguments: --stepps"]),
    ("--n-head 5", ["--n-embd 32 is no multiple of --n-head 5"]), ("--n-kv-head 3 --n-head 4", ["does not divide"]),
    ("--head-dim 3", ["odd"]), ("--dtype fp16", ["fp32 or bf16"]), ("--device tpu", ["tpu", "leave --device out"]),
    ("--device cuda:99", ["cuda:99"]), ("--micro-batch 3", ["does not share out"]), ("--stop-after 0", ["at least 1"]),
    ("--data nowhere", ["there is no data 'nowhere'", "a text file or a folder"]), ("--data empty.txt", ["is empty"]),
    ("--data short.txt", ["34", "--block-size"]), ("--data binary", ["not a text file", "UTF-8"]), ("--data nothing", ["no text files"]),
    ("--tokenizer nix", ["no tokenizer 'nix'", "byte"]), ("--tokenizer text.txt", ["not a .tiktoken file"]),
    ("--vocab-size 99", ["less than the tokenizer's 256"]), ("--model huge", ["invalid choice: 'huge'"]),
    ("--attn sofmax", ["no attention 'sofmax'", "did you mean softmax?"]), ("--attn os.path", ["no attention 'os.path'"]),
    ("--optim train", ["no optimizer 'train'"]), ("--resume nowhere", ["nowhere holds no run"]), ("--resume", ["no run under out/"]),
    ("--init a --resume b", ["give one of them"]), ("--fsdp", ["torchrun"]), ("--out text.txt/a", ["cannot write"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_bad_flag_or_data(tiny, capsys, flags, parts):
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short")
    Path("binary").write_bytes(b"\x7fELF\0\1\2")
    Path("nothing").mkdir()
    message = refused(capsys, [*tiny, "--steps", "2", *flags.split()], *parts)
    assert message.count("\n") == 0 and "Traceback" not in message and not list(Path("out").glob("*/ckpt.pt"))


def test_bad_resume(tiny, capsys):
    train.main([*tiny, "--out", "out/a", "--stop-after", "5"])
    before = Path("out/a/ckpt.pt").read_bytes()
    for flags, parts in {"--resume out/a --lr 0.5": ["--lr is 0.5 here but 0.003 in out/a"], "--resume --n-layer 3": ["--n-layer is 3"],
                         "--resume --attn nix": ["no attention"], "--resume --model gpt2": ["leave it out"],
                         "--resume out/a --out out/b": ["leave --out out"], "--out out/a": ["holds a run already", "--resume out/a"]}.items():
        refused(capsys, [*flags.split(), "--device", "cpu"], *parts)
    Path("text.txt").write_text(Path("text.txt").read_text() + "more")
    refused(capsys, ["--resume", "--device", "cpu"], "has changed", "--init out/a")
    assert Path("out/a/ckpt.pt").read_bytes() == before


def test_bad_resume_of_a_complete_run(tiny, capsys):
    train.main([*tiny, "--out", "out/a", "--steps", "2"])
    refused(capsys, ["--resume", "--device", "cpu"], "complete", "--init out/a")


def test_bad_sampling_flags(tiny, capsys):
    refused(capsys, [], "no run under out/", script=sample)
    train.main([*tiny, "--steps", "2"])
    for flags, part in {"--temperature -1": "--temperature is -1.0", "--top-p 0": "--top-p", "--top-k -2": "--top-k", "--max-tokens 0": "--max-tokens",
                        "--prompt @nowhere": "cannot read the prompt nowhere", "--init nowhere": "nowhere holds no run"}.items():
        refused(capsys, [*flags.split(), "--device", "cpu"], part, script=sample)


# ---------------------------------------------------------------------------------------------------------------------
# Plug-ins and sampling

MINE = """
import torch, train
def attention(q, k, v, *, sharp: float = 1.0, shift=(0, 0)):
    return train.softmax_attention(q * sharp, k, v) + shift[0]
def optimizer(groups, lr, *, nesterov=False, momentum=0.5):
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
"""


def test_a_readers_own_module_plugs_in(tiny, tmp_path, capsys, monkeypatch):
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [*tiny, "--attn", "mine", "--optim", "mine", "--sharp", "2", "--nesterov", "--momentum", "0.9"]
    run = train.main([*flags, "--out", "out/mine", "--stop-after", "20"])
    saved = train.load_checkpoint(Path("out/mine"))
    assert saved["config"]["model"]["attn_args"] == {"sharp": 2.0, "shift": [0, 0]}
    assert saved["config"]["run"]["optim_args"] == {"nesterov": True, "momentum": 0.9}
    assert "momentum_buffer" in saved["optimizer"]["state"][0]
    refused(capsys, ["--resume", "--device", "cpu"], "not beside train.py")
    refused(capsys, ["--resume", "--attn", "mine", "--optim", "mine", "--sharp", "3", "--device", "cpu"], "--sharp is 3.0 here but 2.0")
    refused(capsys, ["--max-tokens", "3"], "not beside train.py", script=sample)
    assert sample.main(["--max-tokens", "3", "--attn", "mine", "--device", "cpu"])["text"]
    parts = train.main(["--resume", "--attn", "mine", "--optim", "mine", "--device", "cpu", "--sample", "1"])
    train.main([*flags, "--out", "out/whole"])
    assert run["step"] == 20 and parts["step"] == 40 and rows("out/mine") == rows("out/whole")
    with pytest.raises(SystemExit) as e:
        train.main(["--attn", "mine", "--help"])
    words = capsys.readouterr().out
    assert e.value.code == 0 and "options of the attention mine" in words and "--sharp" in words and "--n-kv-head" in words


def test_sampling_streams_whole_characters(tiny, capsys):
    run = train.main(tiny)
    words = capsys.readouterr().out
    assert "device   cpu" in words and "(as asked)" in words and "tiny, the default on this device" in words
    assert run["out"] == "out/tiny-softmax" and train.main([*tiny, "--steps", "1"])["out"] == "out/tiny-softmax-2"
    flags = ["--init", run["out"], "--prompt", "the", "--max-tokens", "30", "--device", "cpu"]
    capsys.readouterr()
    one = sample.main(flags)
    assert capsys.readouterr().out == one["text"] + "\n" and one["text"].startswith("the") and len(one["text"]) > 10
    again, plain, other = (sample.main([*flags, *more])["text"] for more in ([], ["--no-cache"], ["--seed", "2"]))
    assert one["text"] == again == plain != other
    Path("p.txt").write_text("wizards boil éclairs " * 4)
    assert sample.main(["--prompt", "@p.txt", "--max-tokens", "3", "--device", "cpu"])["text"].startswith("wizards boil é")
    assert "only the last 16 count" in capsys.readouterr().err
    pieces, byte = [], train.ByteTokenizer()
    assert sample.stream(iter([195, 169, 226, 130, 172, 255, 65, 195]), byte, pieces.append) == 8
    assert "".join(pieces) == "é€\ufffdA\ufffd" and "é" in pieces


def test_sampling_stops_on_a_signal(tiny, monkeypatch):
    train.main([*tiny, "--steps", "2"])
    original = sample.generate

    def interrupted(*args):
        for n, token in enumerate(original(*args)):
            if n == 3:
                signal.raise_signal(signal.SIGINT)
            yield token
    monkeypatch.setattr(sample, "generate", interrupted)
    out = sample.main(["--max-tokens", "200", "--device", "cpu"])
    assert out["signal"] == signal.SIGINT and len(out["text"]) < 10


def test_bench(tiny):
    figures = train.main([*tiny, "--bench", "--vocab-size", "128"])
    assert figures["tokens_per_step"] == 64 and figures["tokens_per_s"] > 0 and not Path("out").exists()
    model = small_gpt(tied=False)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert train.flops_per_token(model) == 6 * linear + 6 * 2 * 16 * 32


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

def torchrun(*argv, processes=2):
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                          str(HERE / "train.py"), *argv],
                         capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stderr[-3000:]
    return out


def far(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_processes_equal_one(tiny):
    flags = [*tiny, "--steps", "12", "--eval-every", "6"]
    train.main([*flags, "--out", "out/one"])
    torchrun(*flags, "--out", "out/ddp", "--micro-batch", "1")       # two micro-batches a process
    torchrun(*flags, "--out", "out/fsdp", "--fsdp", "--stop-after", "6")
    torchrun("--resume", "out/fsdp", "--fsdp", "--device", "cpu", "--sample", "5", "--stop-after", "3")
    train.main(["--resume", "out/fsdp", "--device", "cpu", "--sample", "5"])                 # three steps more, in one process
    one, ddp, fsdp = (train.load_checkpoint(Path(f"out/{n}")) for n in ("one", "ddp", "fsdp"))
    start = dict(train.GPT(train.GPTConfig(**one["config"]["model"])).named_parameters())
    train.fill(model := train.GPT(train.GPTConfig(**one["config"]["model"])), train.fresh(model.cfg, 1337))
    moved = far(one["model"], dict(model.named_parameters()))
    assert start.keys() == one["model"].keys() and far(one["model"], ddp["model"]) < 1e-4 * moved
    assert far(ddp["model"], fsdp["model"]) < 1e-4 * moved
    losses = [[float(r[2]) for r in rows(f"out/{n}")[1:]] for n in ("one", "ddp", "fsdp")]
    assert len(losses[2]) == 12 and np.allclose(losses[0], losses[1], rtol=1e-5) and np.allclose(losses[1], losses[2], rtol=1e-5)


TOLD = """
import os, signal, torch, train
told = False
def attention(q, k, v):
    global told
    if os.environ["RANK"] == "1" and not torch.is_grad_enabled() and not told:
        told = True
        signal.raise_signal(signal.SIGTERM)
    return train.softmax_attention(q, k, v)
"""


def test_processes_stop_together_when_one_is_told(tiny):
    Path("told.py").write_text(TOLD)                                 # a signal to one process of two, in an evaluation
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE / "train.py"), *tiny,
                          "--attn", "told", "--eval-every", "5", "--out", "out/a"], capture_output=True, text=True, timeout=100,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())})
    assert "stopped after step 6 of 40" in out.stdout, out.stderr[-2000:]
    assert torch.load("out/a/ckpt.pt", weights_only=True)["step"] == 6


# ---------------------------------------------------------------------------------------------------------------------
# On the GPU

@gpu
def test_compiled_bf16_on_the_gpu_follows_eager_fp32(tiny):
    flags = [*(f for f in tiny if f not in ("--device", "cpu")), "--model", "tiny", "--n-embd", "64", "--steps", "60"]
    eager = train.main([*flags, "--no-compile", "--dtype", "fp32", "--out", "out/eager"])
    fast = train.main([*flags, "--out", "out/fast"])
    cpu = train.main([*flags, "--device", "cpu", "--out", "out/cpu"])
    assert abs(cpu["val_loss"] - eager["val_loss"]) < 0.02 and abs(fast["val_loss"] - eager["val_loss"]) < 0.1
    config = json.loads(Path("out/fast/config.json").read_text())
    assert config["run"]["dtype"] == "bf16"
    flags = "--init out/eager --dtype fp32 --temperature 0 --max-tokens 40 --device".split()
    assert sample.main([*flags, "cpu"])["text"] == sample.main([*flags, "cuda"])["text"]


# ---------------------------------------------------------------------------------------------------------------------
# The house

def test_who_imports_whom():
    papers = {"laser", "simplicial", "sonew", "lora_rite"}
    ours = {p.stem for p in HERE.glob("*.py")}
    for path in [*HERE.glob("*.py"), *HERE.glob("kernels/*.py")]:
        tree = ast.parse(path.read_text())
        everywhere = {a.name.split(".")[0] if isinstance(n, ast.Import) else n.module.split(".")[0] for n in ast.walk(tree)
                      if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        top = {a.name.split(".")[0] if isinstance(n, ast.Import) else n.module.split(".")[0] for n in tree.body
               if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        if path.parent.name == "kernels":
            assert not everywhere & (ours | {"kernels"}) - {"train"} and "train" not in everywhere, path
        elif path.stem in papers:
            assert not top & ours, f"{path} imports {top & ours} at the top"
        elif path.stem == "train":
            assert not everywhere & ours, path
        elif path.stem != "test_all":
            assert not everywhere & {"test_all"} and not everywhere & {"sample", "ttt_context"}, path


@pytest.mark.parametrize("name", sorted(p.stem for p in HERE.glob("*.py")))
def test_importing_does_nothing(name):
    code = f"import sys, {name}, torch; assert not torch.cuda.is_initialized() and not {{'matplotlib', 'tiktoken'}} & set(sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_readme_commands_work(tiny, monkeypatch):
    """Each command of the README, cut down to a second. What it cannot cut down it must know."""
    Path("my.txt").write_text(Path("text.txt").read_text())
    Path("gpt2.tiktoken").write_text("")
    write_bpe("gpt2.tiktoken")
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr(train, "HERE", Path.cwd())                   # mine.py is beside train.py
    cut = ("--n-layer 1 --n-embd 32 --n-head 2 --n-kv-head 1 --block-size 16 --batch-size 4 --steps 2 --eval-batches 1 "
           "--sample 2 --device cpu").split()
    ran = 0
    train.main([*tiny, "--out", "out/NAME", "--stop-after", "2"])
    for command in readme_commands():
        words = shlex.split(command)
        if words[:2] == ["python", "train.py"]:
            argv = words[2:] + ([] if "--data" in words and words[words.index("--data") + 1] != "python" else ["--data", "text.txt"])
            if "--resume" in argv:
                train.main([*tiny, "--out", "out/unfinished", "--stop-after", "2"])
                argv = [*words[2:], "--device", "cpu", "--sample", "2"]
            elif "--init" in argv:
                argv += "--batch-size 4 --steps 2 --eval-batches 1 --sample 2 --device cpu".split()
            else:
                argv += cut
            train.main(argv)
        elif words[:2] == ["python", "sample.py"]:
            sample.main([*words[2:], "--max-tokens", "3", "--device", "cpu"])
        elif words[0] == "torchrun":
            torchrun(*words[words.index("train.py") + 1:], *cut, "--data", "text.txt")
        else:
            assert words[:2] in (["python", "test_all.py"], ["pip", "install"], ["git", "clone"]) or words[0] == "cd", command
            continue
        ran += 1
    assert ran >= 6


def test_ci_runs_the_readmes_test_command():
    assert [line for line in (HERE / ".ci/run").read_text().splitlines() if line in (HERE / "README.md").read_text().splitlines()
            and line.endswith("python test_all.py")], "the very line"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-rs", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider",
                          "-o", "markers=gpu: needs a GPU", *sys.argv[1:]]))
