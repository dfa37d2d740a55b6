"""Every test of the repository:  python test_all.py [-k name] [-m gpu]

Anything after the name goes to pytest. Without a GPU the kernels run in Triton's interpreter, and what needs a GPU is
listed as skipped. The order is that of the files: the model, the kernel, runs on disk, bad input, processes, the house.
"""
import ast, base64, copy, csv, hashlib, importlib.util, itertools, json, math, os, random, re, resource, shlex, signal, subprocess, sys, time, weakref
from functools import partial
from pathlib import Path

import torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                             # before anything imports triton
import numpy as np
import pytest
import torch.nn.functional as F

import laser
import lora_rite
import pretrained
import sample
import simplicial
import sonew
import train
import ttt_context

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"              # where kernels run, for real or interpreted
def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def close(name, ours, eager, truth):
    """Our error against float64 may be at most twice that of eager PyTorch in the same dtype, plus a floor: 1e-5, or 1e-5 of the largest
    value, and half a unit in its last place."""
    assert ours.isfinite().all(), f"{name}: not finite"
    error, largest = (ours.double() - truth).abs().max().item(), truth.abs().max().item()
    allowed = 2 * (eager.double() - truth).abs().max().item() + 1e-5 * max(1.0, largest) + torch.finfo(ours.dtype).eps / 2 * largest
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
            if c.qkv_bias:
                q, k, v = (m + w[p + f"self_attn.{a}_proj.bias"].view(-1, c.head_dim) for a, m in zip("qkv", (q, k, v)))
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


@pytest.mark.parametrize("shape", [{}, dict(n_kv_head=2, qkv_bias=True), dict(n_kv_head=1, head_dim=6, qk_norm=True, tied=False)], ids=str)
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
    if model.cfg.attn == "softmax":
        assert cached == list(train.generate(model, [5, 6, 7], 40, seed=3, recorded=True, limit=60, **how))


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


# ---------------------------------------------------------------------------------------------------------------------
# kernels/decode.py

def no_garbage(make):
    """make() with new tensors that hold NaN until they are written, and again: two runs are equal."""
    torch.use_deterministic_algorithms(True)
    try:
        one, two = make(), make()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(one, two)
    return one


def check_products(C, sizes, dtype, bias, cfg=None):
    """The products of a step beside PyTorch's, in its dtype and in float64."""
    from kernels import decode
    draw = torch.Generator().manual_seed(C)
    random = lambda *shape: torch.randn(shape, generator=draw).to(dtype).to(DEVICE)
    x, gain, weights, biases = random(C), random(C).float() + 1, [random(n, C) for n in sizes], [random(n).float() for n in sizes]
    up, y, double = random(sizes[0], C), random(sizes[0]), lambda ts: [t.double() for t in ts]
    norm = lambda x, gain: F.rms_norm(x.to(gain.dtype), (C,), gain, 1e-5).to(x.dtype)
    many = lambda x, gain, weights, biases: torch.cat([(w @ norm(x, gain)).to(b.dtype) + b * bias for w, b in zip(weights, biases)])
    swiglu = lambda x, gain, gate, up: F.silu(gate @ norm(x, gain)) * (up @ norm(x, gain))
    add = lambda x, y, w: x + w @ y

    def added():
        decode.add(z := y.clone(), x, up, cfg)
        return z
    close("project", no_garbage(lambda: decode.project(x, gain, 1e-5, weights, biases if bias else None, cfg)),
          many(x, gain, weights, biases), many(*double((x, gain)), double(weights), double(biases)))
    close("swiglu", no_garbage(lambda: decode.swiglu(x, gain, 1e-5, weights[0], up, cfg)), swiglu(x, gain, weights[0], up),
          swiglu(*double((x, gain, weights[0], up))))
    close("add", no_garbage(added), add(y, x, up), add(*double((y, x, up))))


def check_attend(H, Hkv, D, size, length, dtype, norm, cfg=None):
    """Attention of a step beside the model's own parts."""
    from kernels import decode
    draw = torch.Generator().manual_seed(length)
    random = lambda *shape: torch.randn(shape, generator=draw).to(DEVICE)
    heads, gains, kv = random(H + 2 * Hkv, D), (random(D) + 1, random(D) + 1), random(2, 1, Hkv, size, D).to(dtype)
    at, angles = torch.tensor([length], device=DEVICE), train.rotary(0, size, D, 1e4, DEVICE)
    kv[:, :, :, length:] = torch.nan                                 # what memory held

    def plain(dtype, kv):
        q, k, v = heads.to(dtype).split([H, Hkv, Hkv])
        if norm:
            q, k = (F.rms_norm(t, (D,), gain.to(dtype), 1e-5) for t, gain in zip((q, k), gains))
        q, k = (train.rotate(t[None, None], *(a[length].to(dtype) for a in angles)).transpose(1, 2) for t in (q, k))
        kv = kv.to(dtype)
        kv[0, :, :, length], kv[1, :, :, length] = k[:, :, 0], v
        return torch.cat([train.softmax_attention(q, *kv[:, :, :, :length + 1]).flatten(), kv[:, :, :, length].flatten()])

    def ours():
        k, v = (t[0].clone() for t in kv)
        y = decode.attend(heads.flatten(), gains if norm else None, 1e-5, angles, at, k, v, cfg)
        assert torch.equal(k[:, :length], kv[0, 0, :, :length]) and k[:, length + 1:].isnan().all(), "the new key alone is written"
        return torch.cat([y, k[:, length].flatten(), v[:, length].flatten()])
    close("attend", no_garbage(ours), plain(dtype, kv.clone()), plain(torch.float64, kv.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("C,sizes,bias", [(1, (1,), False), (40, (37, 5, 6), True), (64, (64, 32, 32), False), (200, (33,), False)])
def test_products_of_a_step(C, sizes, bias, dtype):
    pytest.importorskip("triton")
    check_products(C, sizes, dtype, bias, (16, 64, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("H,Hkv,norm", [(4, 4, True), (6, 2, False), (17, 1, True)])
@pytest.mark.parametrize("length", [0, 15, 16, 31, 32, 99])
def test_attention_of_a_step(H, Hkv, norm, length, dtype, monkeypatch):
    pytest.importorskip("triton")
    from kernels import decode
    monkeypatch.setattr(decode, "PROGRAMS", 8)                       # several blocks in a piece, several pieces
    check_attend(H, Hkv, 16, 100, length, dtype, norm, (16, 4))


@pytest.mark.parametrize("shape", [{}, dict(n_kv_head=2, qk_norm=True, tied=False), dict(n_kv_head=1, qkv_bias=True)], ids=str)
def test_a_step_of_kernels_equals_the_models(shape, monkeypatch):
    pytest.importorskip("triton")
    from kernels import decode
    model = small_gpt(head_dim=16, **shape)
    expected = list(train.generate(model, [5, 6, 7], 20, temperature=0))                     # past the end of the context
    monkeypatch.setattr(decode, "FEW", (64, 64, 4))
    monkeypatch.setattr(train, "kernels_for", lambda model: decode)
    assert list(train.generate(model, [5, 6, 7], 20, temperature=0, recorded=True)) == expected


@gpu
@pytest.mark.parametrize("C,sizes,bias", [(576, (576, 192, 192), True), (2560, (4096, 1024, 1024), False), (200, (1001,), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_of_a_step_on_the_gpu(C, sizes, bias, dtype):
    check_products(C, sizes, dtype, bias)


@gpu
@pytest.mark.parametrize("H,Hkv,D,norm", [(9, 3, 64, False), (32, 8, 128, True), (20, 1, 256, True)])
@pytest.mark.parametrize("length", [0, 31, 32, 500, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_attention_of_a_step_on_the_gpu(H, Hkv, D, norm, length, dtype):
    check_attend(H, Hkv, D, 5000, length, dtype, norm)


BUILD = """
import json, os, re, subprocess, tempfile, triton
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from kernels import decode, laser, lora_rite, simplicial, sonew, train, ttt_context
LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}                        # KB of shared memory one block may use
UNIT = r"(?:mma\\.sync|wgmma\\.mma_async|tcgen05\\.mma)\\S*(?<!f64)\\s"   # a matrix unit, but those of float64 round as others do
JOBS = [(job, arch) for job in lora_rite.AOT + train.AOT for arch in LIMIT]
JOBS += [(job, arch) for *job, arches in decode.AOT + laser.AOT + simplicial.AOT + sonew.AOT + ttt_context.AOT for arch in arches]

def build(n):
    (kernel, types, consts, by16, *how), arch = JOBS[n]
    signature = {n: "constexpr" if n in consts else types[n] for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(signature.items()) if t[0] == "*" or n in by16}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    out = triton.compile(source(kernel, signature, consts, aligned), target=GPUTarget("cuda", arch, 32),
                         options=dict(zip(("num_warps", "num_stages", "maxnreg"), how)))
    with tempfile.TemporaryDirectory() as d:
        Path(d, "k.ptx").write_text(out.asm["ptx"])
        chip = re.search(r"\\.target (\\w+)", out.asm["ptx"])[1]
        log = subprocess.run([get_ptxas(arch).path, "-v", f"--gpu-name={chip}", f"{d}/k.ptx", "-o", f"{d}/k.cubin"],
                             check=True, capture_output=True, text=True).stderr
    most = lambda pattern: max(map(int, re.findall(pattern, log)), default=0)
    return [kernel.__name__, chip, str(consts), most(r"Used (\\d+) registers"), most(r"(\\d+) bytes spill stores"),
            out.metadata.shared, LIMIT[arch] * 1024, len(re.findall(UNIT, out.asm["ptx"])), "tf32" in out.asm["ptx"]]

with ProcessPoolExecutor(os.cpu_count()) as pool:
    for row in pool.map(build, range(len(JOBS))):
        print(json.dumps(row))
"""


def test_kernels_build_for_four_gpus():
    pytest.importorskip("triton")
    from kernels.simplicial import SPILLED                           # measured: those tiles are faster than what spills nothing
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", BUILD], cwd=HERE, env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert len(rows) >= 100, out.stderr
    for name, chip, consts, registers, spill, shared, limit, tensor_core, tf32 in rows:
        print(name, chip, consts, f"{registers} registers, {spill} bytes spilled, {shared} bytes shared")
        most = SPILLED if name in ("forward_kernel", "rows_kernel", "columns_kernel") and chip == "sm_90a" and "'BD'" in consts else 48
        assert spill <= (128 if "ROUNDS" in consts else most) and shared <= limit, "r x r work is small and may spill more"
        assert tensor_core > 0 if "tf32" in consts or "MANY" in consts else tensor_core == 0 and not tf32, "float32 means float32"


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


@pytest.mark.parametrize("function", [laser.reference, laser.attention])
@pytest.mark.parametrize("std", [1.0, 40.0])
def test_laser_gradient_by_differences(function, std):
    leaves = [t.requires_grad_() for t in laser_inputs(Tq=3, Tk=5, H=2, Hkv=1, D=2, std=std)]
    assert torch.autograd.gradcheck(function, leaves)


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
    recipe = {**laser.LAPTOP, "steps": 4, "probes": 2}
    monkeypatch.setattr(laser, "LAPTOP", recipe)
    monkeypatch.setitem(train.PRESETS, "tiny", {**train.PRESETS["tiny"], "n_layer": 1, "n_embd": 32, "n_head": 2, "batch_size": 2})
    result = laser.main(["--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {"laser-cpu.json", "laser-cpu.png"}
    assert list(result["gradients"]["laser"]) == [2, 4] and len(result["bits_per_byte"]["softmax"]) == 3 and result["sweep"] is None
    del recipe["lr"]                                                 # as --full does: sweep, then the seeds at each arm's best
    recipe.update(steps=2, probes=1, sweep=(1e-9, 3e-3))
    result = laser.main(["--out", "shown"])
    assert result["lr"] == {"softmax": 3e-3, "laser": 3e-3} and list(result["gradients"]["laser"]) == [2]
    assert "paired" in capsys.readouterr().out
    if not torch.cuda.is_available():
        refused(capsys, ["--full"], "needs a CUDA GPU", script=laser)


def test_laser_trains(tiny):
    run = train.main([*tiny, "--attn", "laser"])
    assert run["out"] == "out/tiny-laser" and float(rows(run["out"])[-1][2]) < float(rows(run["out"])[1][2]) - 0.5
    assert sample.main(["--max-tokens", "5", "--device", "cpu"])["text"]


LASER_CASES = [(1, 1, 4, 2, 32), (17, 17, 2, 2, 64), (64, 64, 2, 1, 32), (127, 127, 2, 2, 32), (300, 300, 1, 1, 32), (1, 127, 4, 1, 32),
               (5, 100, 6, 2, 64), (33, 64, 2, 1, 128), (20, 20, 2, 2, 8)]


def published(q, k, v):
    """The paper's form, in the dtype of its inputs: log(p exp(v - max v)) + max v"""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))                # (B, H, Tk, D)
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    p = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)          # (B, H, Tq, Tk)
    return (p @ (v - v.amax(2, keepdim=True)).exp()).log() + v.amax(2, keepdim=True)


def with_gradients(function, q, k, v, do):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = function(*leaves)
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *torch.autograd.grad(o, leaves, do))))


def kernel_inputs(Tq, Tk, H, Hkv, D, dtype, std=1.0, seed=0):
    """q, k, v as parts of one projection, which is how models make them, and a gradient that is not contiguous either"""
    draw = torch.Generator().manual_seed(seed)
    qkv = torch.randn(2, Tk, H + 2 * Hkv, D, generator=draw).to(dtype).to(DEVICE).transpose(1, 2)
    q, k, v = qkv.split((H, Hkv, Hkv), 1)
    return q[:, :, Tk - Tq:] * 2, k * 2, v * std, torch.randn(2, H, D, Tq, generator=draw).to(dtype).to(DEVICE).transpose(2, 3)


def check_laser(*shape, dtype, std=1.0, deterministic=True, change=lambda v: None, seed=0):
    pytest.importorskip("triton")
    from kernels.laser import attention
    q, k, v, do = kernel_inputs(*shape, dtype, std, seed)
    change(v)
    truth = with_gradients(laser.reference, *(t.double() for t in (q, k, v, do)))
    eager = with_gradients(published if v.abs().max() < 8 else laser.reference, q, k, v, do)
    torch.use_deterministic_algorithms(deterministic)                # new tensors hold NaN until they are written
    try:
        ours, again = (with_gradients(attention, q, k, v, do) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name in truth:
        assert ours[name].dtype == dtype and (not deterministic or torch.equal(ours[name], again[name])), f"{name}: two runs are equal"
        close(f"{name}, seed {seed}", ours[name], eager[name], truth[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LASER_CASES, ids=str)
def test_laser_kernel(shape, dtype):
    check_laser(*shape, dtype=dtype)


@pytest.mark.parametrize("seed", range(20))
def test_laser_kernel_on_random_shapes(seed):
    draw = random.Random(seed)
    Hkv, Tk = draw.choice([1, 2]), draw.randint(1, 70)
    check_laser(draw.randint(1, Tk), Tk, Hkv * draw.choice([1, 3]), Hkv, draw.choice([16, 20, 32]), seed=seed,
                dtype=draw.choice([torch.float32, torch.float16]), std=draw.choice([0.02, 0.6, 1.0, 1.0, 5.0]))


CHANGES = {
    "wide": lambda v: v.mul_(40), "eighty": lambda v: v.copy_(v.sign() * 80), "tiny": lambda v: v.mul_(0.02),
    "one outlier": lambda v: v[0, 0, -1, 0].fill_(110), "at a tile's edge": lambda v: v[1, 0, 15:17, 3].fill_(300),
    "below": lambda v: v[:, :, 7, 1].fill_(-1e4), "offset": lambda v: v.mul_(0.02).add_(-4), "far offset": lambda v: v.mul_(0.1).add_(50),
    "still small": lambda v: v.clamp_(-1.99, 1.99), "not small": lambda v: v.clamp_(-2.6, 2.6)[:, :, 3].fill_(-2.6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_laser_kernel_on_values_of_every_size(change):
    check_laser(20, 34, 2, 1, 16, dtype=torch.float16 if "outlier" in change else torch.float32, change=CHANGES[change])


def test_laser_kernel_when_a_program_has_many_blocks(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("kernels.laser", exc_type=ModuleNotFoundError), "WATCH", 1)
    check_laser(40, 70, 2, 1, 16, dtype=torch.float32, change=lambda v: v[1].mul_(40))


def laser_does_not_feel_the_future(*shape, dtype, exact):
    """A key changes: earlier rows stay bit for bit. A key that changes how the head is computed: they stay to rounding."""
    from kernels.laser import attention
    for std, jump in ((4.0, 2.0), (0.02, 0.1), (1.0, 50.0), (1.0, 110.0), (1.0, 300.0), (1.0, math.inf), (1.0, math.nan)):
        q, k, v, _ = kernel_inputs(*shape, dtype, std)
        after, keys, row = v.clone(), k.clone(), shape[0] - 7
        after[:, :, row, 2] += jump
        keys[:, :, row] += 1
        before, now = attention(q, k, v), attention(q, keys, after)
        assert now[:, :, :row].isfinite().all() and not torch.equal(before[:, :, row:], now[:, :, row:])
        if jump < 50:
            assert torch.equal(before[:, :, :row], now[:, :, :row]), "bit for bit"
        assert torch.allclose(before[:, :, :row], now[:, :, :row], atol=exact * std)
        assert math.isfinite(jump) or not now[:, 0, -1, 2].isfinite().any(), "NaN must reach the loss"


def test_laser_kernel_does_not_feel_the_future():
    pytest.importorskip("triton")
    laser_does_not_feel_the_future(36, 36, 2, 1, 16, dtype=torch.float32, exact=1e-5)


def laser_of_constants(dtype):
    from kernels.laser import attention
    q, k, v, _ = kernel_inputs(40, 40, 2, 1, 16, dtype)
    for size in (1e-3, 1.0, 77.0, 1e4):
        constant = (v[:, :, :1] * size).expand_as(v)
        assert torch.equal(attention(q, k, constant), constant.expand_as(q)), "exactly v"
    assert torch.equal(attention(q[:, :, :1], k[:, :, :1], v[:, :, :1]), v[:, :, :1].expand(2, 2, 1, 16)), "one key"


def test_laser_kernel_of_constant_values_is_exact():
    pytest.importorskip("triton")
    laser_of_constants(torch.float32)


def test_laser_kernel_decodes_as_it_prefills():
    pytest.importorskip("triton")
    from kernels.laser import attention
    q, k, v, _ = kernel_inputs(40, 40, 4, 2, 16, torch.float32)
    parts = [attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b]) for a, b in ((0, 30), (30, 39), (39, 40))]
    assert torch.allclose(attention(q, k, v), torch.cat(parts, 2), atol=1e-5)


def test_laser_kernel_is_an_operator():
    pytest.importorskip("triton")
    from kernels import laser as kernel
    q, k, v, _ = kernel_inputs(9, 9, 2, 1, 16, torch.float32)
    torch.library.opcheck(kernel.laser, tuple(t.detach().requires_grad_() for t in (q, k, v)) + (0.25,),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_laser_kernel_refuses_what_it_cannot_count():
    pytest.importorskip("triton")
    from kernels.laser import attention
    q = torch.empty(1, device=DEVICE).expand(1, 1, 2 ** 27, 16)
    with pytest.raises(AssertionError, match="31 bits"):
        attention(q, q, q)


@gpu
def test_laser_kernel_beyond_2_to_the_31():
    q, k, v = (torch.randn(2 ** 14, 1024, 2, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3))
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            whole, last = laser.attention(q, k, v)[-1:], laser.attention(q[-1:], k[-1:], v[-1:])
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(whole, last)


@gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["cudnn", "triton"])
@pytest.mark.parametrize("shape", [*LASER_CASES, (1000, 1000, 4, 2, 64), (777, 777, 2, 2, 128)], ids=str)
def test_laser_kernel_on_the_gpu(shape, deterministic):
    check_laser(*shape, dtype=torch.bfloat16, deterministic=deterministic)


@gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["cudnn", "triton"])
@pytest.mark.parametrize("change", CHANGES)
def test_laser_kernel_on_values_of_every_size_on_the_gpu(change, deterministic):
    check_laser(600, 600, 4, 2, 64, dtype=torch.bfloat16, change=CHANGES[change], deterministic=deterministic)


@gpu
@pytest.mark.parametrize("deterministic", [False, True], ids=["cudnn", "triton"])
def test_laser_kernel_in_bfloat16(deterministic):
    """What float64 cannot be asked about: the future, constants, and small values against plain attention."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        laser_does_not_feel_the_future(300, 300, 4, 2, 64, dtype=torch.bfloat16, exact=0.05)
        laser_of_constants(torch.bfloat16)
        for std in (0.005, 0.02, 0.1):
            q, k, v, do = kernel_inputs(512, 512, 2, 2, 64, torch.bfloat16, std)
            error = {}
            for name, function, definition in (("laser", laser.attention, laser.reference), ("plain", *[train.softmax_attention] * 2)):
                ours, truth = with_gradients(function, q, k, v, do), with_gradients(definition, *(t.double() for t in (q, k, v, do)))
                error[name] = {n: (ours[n].double() - t).norm() / t.norm() for n, t in truth.items()}
            print(std, {n: {k: f"{e:.2%}" for k, e in errors.items()} for n, errors in error.items()})
            assert all(error["laser"][n] < 3 * error["plain"][n] for n in ("o", "dq")), std
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
def test_laser_compiles_as_one_graph():
    q, k, v, do = kernel_inputs(200, 200, 4, 2, 64, torch.bfloat16)
    ours, eager = (with_gradients(f, q, k, v, do) for f in (torch.compile(laser.attention, fullgraph=True), laser.attention))
    assert all(torch.allclose(ours[n].float(), eager[n].float(), atol=0.02, rtol=0.02) for n in eager)


# ---------------------------------------------------------------------------------------------------------------------
# SONew

def banded(n, b, seed=0, scale=1.0, dtype=torch.float64):
    """Statistics of a chain as they come: the band of a mean of outer products; and a momentum."""
    draw = torch.Generator().manual_seed(seed)
    g = torch.randn(3 * n + 9, n, generator=draw, dtype=torch.float64)
    g[:, 1:] += 0.8 * g[:, :-1]                                      # neighbours are correlated
    full = (g.T @ g / len(g) * scale ** 2).to(dtype)
    return [F.pad(full.diagonal(k), (0, min(k, n))) if k < n else torch.zeros(n, dtype=dtype) for k in range(b + 1)], g[0].to(dtype) * scale


def dense(psi, s):
    """X = L diag(1/s) L^T as a matrix, from what `factor` gives for one chain."""
    n = s.shape[1]
    L = torch.eye(n, dtype=s.dtype)
    for k, x in enumerate(psi, 1):
        for i in range(n - k):
            L[i + k, i] = -x[0, i]
    return L @ torch.diag(1 / s[0]) @ L.T


@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 30])
def test_sonew_completes_the_band_to_maximal_determinant(n, b):
    S, m = banded(n, b)
    psi, s = sonew.factor([x[None] for x in S], 0.0)
    X, (oracle, u) = dense(psi, s), sonew.reference(S, m)
    inverse = torch.linalg.inv(X)
    for k in range(min(b, n - 1) + 1):
        assert torch.allclose(inverse.diagonal(k), S[k][:n - k], atol=1e-12), "X^-1 = S on the band"
    assert not X.triu(b + 1).any() and torch.linalg.eigvalsh(X).min() > 0
    assert torch.allclose(X, oracle, atol=1e-11) and torch.allclose(sonew.precondition(m[None], psi, s)[0], u, atol=1e-11)
    assert abs(torch.logdet(X) + s.log().sum()) < 1e-10


def test_sonew_is_newton_where_the_band_is_all_and_on_an_ar1_chain():
    S, m = banded(5, 4)
    full = sum(torch.diag(S[k][:5 - k], k) + (torch.diag(S[k][:5 - k], -k) if k else 0) for k in range(5))
    psi, s = sonew.factor([x[None] for x in S], 0.0)
    assert torch.allclose(sonew.precondition(m[None], psi, s)[0], torch.linalg.solve(full, m), atol=1e-10)
    ar1 = 0.9 ** (torch.arange(40.0, dtype=torch.float64)[:, None] - torch.arange(40)).abs()
    S, m = [F.pad(ar1.diagonal(k), (0, k))[None] for k in range(2)], torch.randn(1, 40, dtype=torch.float64)
    assert torch.allclose(sonew.precondition(m, *sonew.factor(S, 0.0))[0], torch.linalg.solve(ar1, m[0]), atol=1e-10)
    assert torch.equal(sonew.precondition(m, *sonew.factor(S[:1], 0.0)), m / S[0]), "band 0 has no square root"


@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("case", ["rank one", "equal", "zero", "huge", "tiny", "half zero"])
def test_sonew_stays_positive_definite(case, b):
    g = torch.randn(1, 24, generator=torch.Generator().manual_seed(3))
    g = {"rank one": g, "equal": torch.ones(1, 24), "zero": g * 0, "huge": g * 1e18, "tiny": g * 1e-18,
         "half zero": g * (torch.arange(24) % 4 > 1)}[case]
    for eps in (0.0, 1e-8):
        m, S = torch.zeros(1, 24), [torch.zeros(1, 24) for _ in range(b + 1)]
        for t in range(1, 4):
            m, S, u, a, bad = sonew.update(g, m, S, torch.tensor(float(t)), 0.9, 0.99, eps, 1e-6, 1e-8)
            psi, s = sonew.factor([S[0] + eps, *S[1:]], 1e-6)
            assert (s >= 0).all() and all(x.isfinite().all() for x in (m, *S, u, a, s, *psi)) and bad == 0
            there = (S[0] + eps)[0] > 0
            if there.all() and case != "tiny":                       # tiny^2 is subnormal
                assert (s > 1e-6 * (S[0] + eps)).all() and torch.linalg.eigvalsh(dense([x.double() for x in psi], s.double())).min() > 0
            assert not u[0, ~there].any(), "no gradient, no step"


@pytest.mark.parametrize("b", [0, 1, 3])
def test_sonew_invariances(b):
    g, d = (torch.rand(6, 2, 9, generator=torch.Generator().manual_seed(s), dtype=torch.float64) + 0.1 for s in (0, 1))

    def last(g, eps=0.0):
        m, S = torch.zeros_like(g[0]), [torch.zeros_like(g[0])] * (b + 1)
        for t in range(6):
            m, S, u, a, _ = sonew.update(g[t], m, S, torch.tensor(t + 1.0, dtype=torch.float64), 0.9, 0.99, eps, 1e-12, 1e-30)
        return u, a
    (u, a), (ud, ad) = last(g), last(g * d[0])
    assert torch.allclose(ud * d[0], u, rtol=1e-6) and torch.allclose(ad, a), "g -> d g gives u -> u / d, and Adam's step as it was"


@pytest.mark.parametrize("band,chain", [(0, "row"), (1, "row"), (1, "flat"), (4, "row")])
def test_sonew_takes_steps_of_adams_length(band, chain):
    p, q, b = (torch.nn.Parameter(torch.zeros(s)) for s in ((6, 7), (6, 7), (5,)))
    c, lr = torch.nn.Parameter(torch.zeros(5)), 0.01
    ours = sonew.SONew([p, b], lr, band=band, chain=chain)
    adam = torch.optim.Adam([q, c], lr, (0.9, 0.99))
    for t in range(10):
        before, there = p.detach().clone(), q.detach().clone()
        p.grad, b.grad = torch.randn(6, 7), torch.randn(5)
        q.grad, c.grad = p.grad.clone(), b.grad.clone()
        ours.step()
        adam.step()
        assert abs((p - before).norm() / (q - there).norm() - 1) < 1e-5, f"step {t + 1}"
        assert t or abs((p - before).norm() / lr / 42 ** 0.5 - 1) < 1e-5, "the first one is lr for each coordinate"
    assert torch.allclose(b, c, atol=1e-6), "gains take Adam's step"
    before = p.detach().clone()
    ours.param_groups[0]["weight_decay"] = 0.5
    p.grad, b.grad = torch.zeros(6, 7), None
    for s in ours.state[p].values():
        s.zero_()
    ours.step()
    assert torch.allclose(p, before * (1 - lr * 0.5)), "a zero gradient: nothing but decay"


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_sonew_skips_a_bad_gradient(bad):
    p, q = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    opt = sonew.SONew([p, q], 0.1, weight_decay=0.1)
    for t in range(3):
        p.grad, q.grad, before = torch.randn(3, 4), torch.randn(3, 4), (p.detach().clone(), q.detach().clone())
        if t == 1:
            p.grad[1, 2] = bad
        opt.step()
        assert torch.equal(p, before[0]) == (t == 1) and not torch.equal(q, before[1])
    assert opt.state[p]["skipped"] == 1 and opt.state[q]["skipped"] == 0 and opt.state[p]["step"] == 3
    assert all(v.isfinite().all() for v in (p, q, *opt.state[p].values()))


def test_sonew_refuses_bad_options():
    p = torch.nn.Parameter(torch.ones(3, 4))
    for options, part in ((dict(band=5), "band is 5"), (dict(chain="rows"), "row or flat"), (dict(graft="sgd"), "adam or none"),
                          (dict(lr=-1.0), "lr is -1"), (dict(betas=(0.9, 1.0)), "betas"), (dict(eps=math.nan), "eps is nan")):
        with pytest.raises(ValueError, match=part):
            sonew.SONew([p], **options)
    emb = torch.nn.Embedding(5, 3, sparse=True)
    emb(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        sonew.SONew(emb.parameters()).step()


@pytest.mark.parametrize("options", [dict(), dict(band=3, bf16_state=True), dict(graft="none", lr=1e-9)], ids=str)
def test_sonew_state_round_trip(options, tmp_path):
    draw = torch.Generator().manual_seed(0)
    ps, qs = ([torch.nn.Parameter(torch.ones(s).to(d)) for s, d in (((3, 8), torch.float32), ((4,), torch.bfloat16))] for _ in range(2))
    a, b = (sonew.SONew(x, **options) for x in (ps, qs))

    def step(opt, params, grads):
        for p, g in zip(params, grads):
            p.grad = g.to(p.dtype)
        opt.step()
    grads = [[torch.randn(3, 8, generator=draw), torch.randn(4, generator=draw)] for _ in range(6)]
    for g in grads[:3]:
        step(a, ps, g)
    torch.save({"opt": a.state_dict(), "p": [p.detach() for p in ps]}, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    b.load_state_dict(saved["opt"])
    for q, p in zip(qs, saved["p"]):
        q.data.copy_(p)
    for g in grads[3:]:
        step(a, ps, g)
        step(b, qs, g)
    assert same(a.state_dict(), b.state_dict()) and all(torch.equal(p, q) for p, q in zip(ps, qs)) and b.state[qs[0]]["step"] == 6
    assert b.state[qs[1]]["s0"].dtype == (torch.bfloat16 if options.get("bf16_state") else torch.float32)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["opt"]["state"][0]["step"] == saved["opt"]["state"][0]["step"] == 3


class Fused(sonew.SONew):
    """SONew that takes its kernel, interpreted where there is no GPU."""
    fits = staticmethod(lambda p: True)


def check_sonew_kernel(monkeypatch, shapes, config, device=DEVICE, steps=2, dtype=torch.float32, transposed=False, seed=0, **options):
    """The kernel against PyTorch in the same dtype and in float64, on the same gradients; eps keeps all well-conditioned. Two runs of the
    kernel must be equal. -> its parameters"""
    from kernels import sonew as kernel
    monkeypatch.setattr(kernel, "CONFIG", dict.fromkeys(range(5), config) if isinstance(config, tuple) else config)
    options = {**dict(lr=0.1, eps=0.1, weight_decay=0.1), **options}
    draw, kinds = torch.Generator().manual_seed(seed), (Fused, Fused, sonew.SONew, sonew.SONew)
    values = [torch.randn(s, generator=draw) for s in shapes]
    nets = [[torch.nn.Parameter(v.clone().to(dtype).to(d).to(device)) for v in values] for d in (dtype, dtype, dtype, torch.float64)]
    if transposed:                                                   # neither parameters nor gradients are contiguous
        nets = [[torch.nn.Parameter(p.detach().T.contiguous().T) for p in net] for net in nets]
    opts = [kind(net, **options) for kind, net in zip(kinds, nets)]
    opts[2].fits = lambda p: False
    torch.use_deterministic_algorithms(True)                         # new tensors hold NaN until they are written
    try:
        for t in range(steps):
            grads = [torch.randn(2, *s, generator=draw)[0].to(dtype) for s in shapes]
            for net, opt in zip(nets, opts):
                for p, g in zip(net, grads):
                    p.grad = (g.T.clone(memory_format=torch.contiguous_format).T if transposed else g.clone()).to(device).to(p.dtype)
                opt.step()
    finally:
        torch.use_deterministic_algorithms(False)
    for p, again, eager, truth, before in zip(*nets, values):
        assert torch.equal(p, again), "two runs"
        if p.numel() == 0:                                           # a shard without rows takes part all the same
            assert opts[0].state[p]["step"] == steps
            continue
        close(str(tuple(p.shape)), p, eager, truth)
        assert p.numel() < 4 or (p - before.to(p)).abs().max() > 0.01, "it did not move"
        for name, s in opts[0].state[p].items():
            close(f"{name} of {tuple(p.shape)}", s, opts[2].state[eager][name], opts[3].state[truth][name])
    assert same(opts[0].state_dict(), opts[1].state_dict())
    return nets[0]


SMALL = (1, 1, 2, 1, 3, None)                                        # 2 x 120 elements a program, updates three programs later
SONEW_SHAPES = [(5, 8), (0, 4), (7,), (), (1, 1), (1, 3), (2, 3, 4), (3, 59), (1, 260)]


@pytest.mark.parametrize("options", [dict(), dict(band=4), dict(band=4, chain="flat"), dict(band=1, chain="flat", graft="none"),
                                     dict(band=2, betas=(0.0, 0.999)), dict(band=3, transposed=True),
                                     dict(band=0, graft="none", eps=1e-6, betas=(0.9, 0.9999))], ids=str)
def test_sonew_kernel(options, monkeypatch):
    pytest.importorskip("triton")
    shapes = [s for s in SONEW_SHAPES if not options.get("transposed") or len(s) == 2]
    check_sonew_kernel(monkeypatch, shapes, SMALL, **options)


@pytest.mark.parametrize("seed", range(20))
def test_sonew_kernel_on_random_shapes(seed, monkeypatch):
    pytest.importorskip("triton")
    draw = random.Random(seed)
    shapes = [draw.choice([(draw.randint(1, 300),), (draw.randint(1, 6), draw.randint(1, 80)), (draw.randint(1, 40), draw.randint(1, 6))])
              for _ in range(2)]
    check_sonew_kernel(monkeypatch, shapes, (2 ** draw.randint(0, 2), 1, draw.randint(1, 3), 1, draw.randint(0, 9), None), steps=1, seed=seed, band=draw.randint(0, 4),
                       chain=draw.choice(["row", "flat"]), graft=draw.choice(["adam", "none"]))


def test_sonew_kernel_does_not_depend_on_its_blocks(monkeypatch):
    pytest.importorskip("triton")
    one, other = (check_sonew_kernel(monkeypatch, [(2, 201), (1, 260), (127,)], (lines, 1, 1, 1, 5, None), band=2, chain="flat", graft="none")
                  for lines in (1, 4))
    assert all(torch.equal(p, q) for p, q in zip(one, other))


def test_sonew_kernel_on_bad_gradients(monkeypatch):
    pytest.importorskip("triton")
    from kernels import sonew as kernel
    monkeypatch.setattr(kernel, "CONFIG", dict.fromkeys(range(5), SMALL))
    for bad in (math.nan, -math.inf, 1e30):
        nets = [[torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in ((3, 100), (4, 4), (5,))] for _ in range(2)]
        opts = [kind(net, 0.1, band=2, chain="flat") for kind, net in zip((Fused, sonew.SONew), nets)]
        opts[1].fits = lambda p: False
        before = nets[0][0].detach().clone()
        for net, opt in zip(nets, opts):
            for p in net:
                p.grad = torch.cos(torch.arange(p.numel(), device=DEVICE)).view_as(p)
            net[0].grad[1, 30], net[2].grad[0] = bad, bad
            opt.step()
        assert torch.equal(nets[0][0], before) and not torch.equal(nets[0][1], torch.ones_like(nets[0][1]))
        for p, q in zip(*nets):
            a, b = opts[0].state[p], opts[1].state[q]
            assert a["skipped"] == b["skipped"] == (p is not nets[0][1]) and a["step"] == 1
            assert all(torch.allclose(a[k], b[k]) and a[k].isfinite().all() for k in a)


def test_sonew_kernel_takes_many_tensors_at_once(monkeypatch):
    pytest.importorskip("triton")
    from kernels import sonew as kernel
    launches = []
    for name in ("halo", "step"):
        original = getattr(kernel, f"{name}_kernel")

        class Counted:
            def __getitem__(self, grid, original=original, name=name):
                return launches.append(name) or original[grid]
        monkeypatch.setattr(kernel, f"{name}_kernel", Counted())
    check_sonew_kernel(monkeypatch, [(2, 4)] * 20 + [(3,)] * 20 + [(1, 4), (8,)], (1, 1, 2, 1, 5, None), steps=1)
    assert launches == 2 * 3 * ["step"], "matrices, odd vectors, even vectors: one launch each, in two runs"


def test_sonew_kernel_beyond_2_to_the_31():
    pytest.importorskip("triton")
    from kernels import sonew as kernel
    memory, n = torch.empty(2 ** 31 + 256, dtype=torch.float16, device=DEVICE), 2 ** 31 + 40
    at, tail = [memory.data_ptr() + 2 * k for k in (192, 0, 64, 128)], memory[2 ** 31 - 24:]   # p, g, m, S_0: reserves 4 GiB, touches a page
    tail.zero_()
    tail[24:64] = g = torch.randn(40).to(memory)
    scalars, totals = torch.zeros(2, device=DEVICE), torch.tensor([4.0, 1.0, 0.0], device=DEVICE)
    programs, count = -(-n // 128), torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[*at[:3], scalars.data_ptr(), scalars[1:].data_ptr(), n, n, 128, 0, programs, 0, at[3]]], device=DEVICE)
    partial_sums = torch.empty(2 ** 24 * 3 + 3, device=DEVICE)                               # 200 MB of address space
    items = torch.tensor([[0, programs - 1], [-1, programs - 1]], dtype=torch.int32, device=DEVICE)            # its statistics, its update
    fp16 = tl_type(torch.float16)
    kernel.step_kernel[(2,)](table, items, partial_sums, partial_sums, totals, count, 0, 1, 0.5, 0.5, 0.5, 0.5, math.log(0.5), math.log(0.5),
                             0.1, 1e-6, 1e-8, 1.0, 0.0, fp16, fp16, fp16, 0, False, True, False, False, False, 12, 32, 1, 1, num_warps=1)
    assert torch.allclose(tail[216:256].float(), -2 * tail[24:64].float(), rtol=1e-2, atol=1e-3)
    assert torch.allclose(tail[88:128], g / 2) and torch.allclose(tail[152:192], g * g / 2, atol=1e-3)
    assert torch.allclose(tail[24:64].float(), g.float() / (g.float() ** 2 + 0.1), rtol=1e-2, atol=1e-3)


def tl_type(dtype):
    from kernels import sonew as kernel
    return kernel.TYPES[dtype]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(band=0), dict(band=4), dict(band=4, chain="flat"), dict(band=2, bf16_state=True)], ids=str)
def test_sonew_kernel_on_the_gpu(dtype, options, monkeypatch):
    from kernels import sonew as kernel
    shapes = [*SONEW_SHAPES, *[(768, 3072)] * 4, (3072, 768), (3000, 1025), (1, 100003), (70000,), (3, 4097), (1800, 4096)]    # many, and one
    if not options.get("bf16_state") and dtype == torch.float32:
        check_sonew_kernel(monkeypatch, shapes, kernel.CONFIG, **options)
        return
    for seed in range(3):                                            # roundings of 8 bits add up, so one step only
        check_sonew_kernel(monkeypatch, shapes, kernel.CONFIG, steps=1, seed=seed, dtype=dtype, **options)


@gpu
def test_sonew_kernel_repeats_itself_and_never_waits(monkeypatch):
    first = None
    for repeat in range(100):                                        # a race would show
        torch.manual_seed(0)
        p = [torch.nn.Parameter(torch.zeros(s, device="cuda")) for s in ((1000, 1000), (37, 999), (5,), *[(768, 3072)] * 5)]
        opt = sonew.SONew(p, 0.1, band=4, chain="flat")
        for t in range(3):
            for x in p:
                x.grad = torch.randn(x.shape, device="cuda")
            torch.cuda.set_sync_debug_mode("error" if t else "default")
            try:
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        first = first or [x.detach().clone() for x in p]
        assert all(torch.equal(x, y) for x, y in zip(p, first))


@gpu
def test_sonew_in_a_cuda_graph():
    from kernels import sonew as kernel
    p, q = (torch.nn.Parameter(torch.ones(64, 100, device="cuda")) for _ in range(2))
    a, b = (sonew.SONew([x], 0.1, band=1) for x in (p, q))
    grads = torch.randn(8, 64, 100, device="cuda")
    p.grad, q.grad = torch.empty_like(p), torch.empty_like(q)
    for t in range(3):
        p.grad.copy_(grads[t])
        q.grad.copy_(grads[t])
        a.step()
        b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    kernel.TABLES.clear()                                            # the graph keeps what it reads
    others = [torch.full((64,), -1, device="cuda") for _ in range(1000)]
    for t in range(3, 8):
        p.grad.copy_(grads[t])
        q.grad.copy_(grads[t])
        graph.replay()
        b.step()
    assert torch.equal(p, q) and a.state[p]["step"] == 8 and len(others) == 1000


def test_sonew_on_sharded_parameters(monkeypatch, tmp_path):
    """Rows may be spread, chains not cut; one process stands in for many."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    pytest.importorskip("triton")
    from kernels import sonew as kernel
    monkeypatch.setattr(kernel, "CONFIG", dict.fromkeys(range(5), SMALL))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        w, b, g = torch.randn(6, 12), torch.randn(6), [torch.randn(2, 6, 12)[t] for t in range(2)]
        spread = lambda t, place=Shard(0): torch.nn.Parameter(distribute_tensor(t.clone(), mesh, [place]))
        for place, chain in ((Shard(1), "row"), (Shard(0), "flat")):
            with pytest.raises(ValueError, match="chain would be cut"):
                sonew.SONew([spread(w, place)], chain=chain)
        sums = []
        reduced = torch.distributed.all_reduce
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, **more: sums.append(x.shape) or reduced(x, **more))
        kinds = (sonew.SONew, Fused) if DEVICE == "cpu" else (sonew.SONew,)                  # the mesh is one of CPUs
        for kind in kinds:
            nets = [torch.nn.Parameter(w.clone()), torch.nn.Parameter(b.clone())], [spread(w), spread(b)], [spread(w, Replicate()), spread(b)]
            opts = [kind(net, 0.1, band=2) for net in nets]
            for t in range(2):
                for net, opt in zip(nets, opts):
                    for p, x in zip(net, (g[t], g[t][:, 0])):
                        p.grad = x.clone() if net is nets[0] else distribute_tensor(x.clone(), mesh, p.placements)
                    opt.step()
            assert all(torch.equal(a, x.full_tensor()) for net in nets[1:] for a, x in zip(nets[0], net))
            assert torch.equal(opts[0].state[nets[0][0]]["s1"], opts[1].state[nets[1][0]]["s1"].full_tensor())
        assert len(sums) == len(kinds) * 3 * 2, "one sum for each tensor that is spread, in PyTorch, or for each kind of them, in the kernel"
    finally:
        torch.distributed.destroy_process_group()


@gpu
def test_sonew_trains_alike_on_the_gpu(tiny):
    flags = [*(f for f in tiny if f not in ("--device", "cpu")), "--optim", "sonew", "--lr", "0.02", "--dtype", "fp32", "--no-compile"]
    fast, cpu = (train.main([*flags, *more]) for more in (["--out", "out/fast"], ["--device", "cpu", "--out", "out/cpu"]))
    assert abs(fast["val_loss"] - cpu["val_loss"]) < 0.05


def test_sonew_trains_and_resumes(tiny, capsys):
    flags = [*tiny, "--optim", "sonew", "--band", "2", "--lr", "0.02"]
    train.main([*flags, "--out", "out/whole"])
    train.main([*flags, "--out", "out/parts", "--stop-after", "20"])
    train.main(["--resume", "out/parts", "--device", "cpu", "--sample", "1"])
    a, b = (train.load_checkpoint(Path(f"out/{n}")) for n in ("whole", "parts"))
    assert same(a, b) and a["config"]["run"]["optim_args"]["band"] == 2 and "s2" in a["optimizer"]["state"][0]
    assert float(rows("out/whole")[-1][2]) < float(rows("out/whole")[1][2]) - 0.5
    refused(capsys, [*tiny, "--optim", "sonew", "--band", "7"], "--optim sonew: band is 7; it must be 0 to 4")
    refused(capsys, [*tiny, "--optim", "sonew", "--chain", "rows"], "row or flat")


def test_sonew_over_processes_equals_one(tiny):
    flags = [*tiny, "--steps", "6", "--optim", "sonew", "--eps", "1e-4", "--lr", "0.01"]
    train.main([*flags, "--out", "out/one"])
    torchrun(*flags, "--out", "out/ddp")
    torchrun(*flags, "--out", "out/fsdp", "--fsdp", "--stop-after", "3")
    train.main(["--resume", "out/fsdp", "--device", "cpu", "--sample", "1"])
    one, ddp, fsdp = (train.load_checkpoint(Path(f"out/{n}")) for n in ("one", "ddp", "fsdp"))
    train.fill(model := train.GPT(train.GPTConfig(**one["config"]["model"])), train.fresh(model.cfg, 1337))
    moved = far(one["model"], dict(model.named_parameters()))
    assert far(one["model"], ddp["model"]) < 1e-3 * moved and far(one["model"], fsdp["model"]) < 1e-3 * moved


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A file like MNIST's with a few images, and an experiment of seconds."""
    images = np.random.default_rng(0).integers(0, 255, (40, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "digits.npz", x_train=images, x_test=images[:10])
    monkeypatch.setattr(sonew, "STEPS", 4)
    monkeypatch.setattr(sonew, "BATCH", 8)
    monkeypatch.setattr(sonew, "WIDTHS", (784, 6, 3))
    return str(tmp_path / "digits.npz")


def test_sonew_experiment(tiny, digits, monkeypatch, capsys):
    result = sonew.main(["--mnist", digits, "--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {"sonew-cpu.json", "sonew-cpu.png"}
    assert all(len(r) == 3 and math.isfinite(r[0]["test"]) and len(r[0]["curve"]) > 3 for r in result["runs"].values())
    assert max(result["logdet"]["from_band"].values()) < 1e-9 and max(result["logdet"]["from_oracle"].values()) < 1e-9
    d = list(result["logdet"]["divergence"].values())
    assert all(x >= y - 1e-9 for x, y in zip(d, d[1:])), "a wider band is nearer"
    assert "edges_removed" in result["runs"]["SONew, band 1"][0] and "LogDet" in capsys.readouterr().out
    monkeypatch.setattr(sonew, "ARMS", {k: v for k, v in sonew.ARMS.items() if k in ("SGD", "SONew, band 1")})
    found = sonew.main(["--mnist", digits, "--out", "shown", "--sweep"])
    assert all(len(f) == 12 and f[0][2] == min(x[2] for x in f) for f in found.values())


def test_sonew_without_its_data(tiny, digits, capsys, monkeypatch):
    monkeypatch.setattr(train, "HERE", Path.cwd() / "alone")

    def offer(content):
        def urlopen(url, timeout):
            if content is None:
                raise OSError("no network")
            return open(content, "rb")
        monkeypatch.setattr(sonew.urllib.request, "urlopen", urlopen)
    offer(None)
    refused(capsys, [], "no MNIST here", "--mnist FILE.npz", script=sonew)
    offer("text.txt")                                                # the checksum is another
    refused(capsys, [], "no MNIST here", script=sonew)
    assert not Path("out").exists()
    monkeypatch.setattr(sonew, "MNIST_SHA256", hashlib.sha256(Path(digits).read_bytes()).hexdigest())
    offer(digits)
    assert sonew.load_mnist(train, None)[0].shape == (40, 784) and Path("out/mnist.npz").read_bytes() == Path(digits).read_bytes()
    for bad in ("text.txt", "nowhere.npz"):
        refused(capsys, ["--mnist", bad], f"{bad} is not MNIST", script=sonew)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, ["--mnist", digits, "--full"], "without a GPU", script=sonew)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA-RITE

def low_rank(r=4, n=24, m=17, count=2, seed=0, samples=None):
    """-> pairs (A (r, n), B (m, r)), and a loss of the products: a regression onto Z, seen through `samples` inputs if given."""
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    AB, Z, X = [(rand(r, n), rand(m, r)) for _ in range(count)], [rand(m, n) for _ in range(count)], rand(n, samples or 2 * n)
    return AB, lambda products: sum(((p - z.to(p)) @ X.to(p)).square().mean() for p, z in zip(products, Z))


def descend(AB, loss, steps=50, lr=0.05, make=lora_rite.LoRARITE, dtype=torch.float64, scale=1.0, **options):
    """-> the products B A after some steps with a falling learning rate, their losses, and the optimizer."""
    ps = [torch.nn.Parameter(p.clone().to(dtype)) for pair in AB for p in pair]
    opt = make([{"params": ps, "pair": True}], lr, **options)
    losses = []
    for t in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - 0.5 * t / steps)
        opt.zero_grad()
        value = loss([B @ A for A, B in zip(ps[::2], ps[1::2])])
        (value * scale).backward()
        losses.append(value.item())
        opt.step()
    return [(B @ A).detach() for A, B in zip(ps[::2], ps[1::2])], losses, opt


def apart(p, q):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(p, q))


RITE_OPTIONS = [dict(), dict(weight_decay=0.1), dict(escape=True), dict(clip=0.0), dict(clip=0.3, escape=True, weight_decay=0.1)]


@pytest.mark.parametrize("options", RITE_OPTIONS, ids=str)
@pytest.mark.parametrize("r,n,m,zero", [(4, 24, 17, False), (1, 5, 9, False), (16, 20, 33, False), (4, 24, 17, True), (3, 3, 3, True)])
def test_lora_rite_is_the_papers_algorithm(r, n, m, zero, options):
    AB, loss = low_rank(r, n, m)
    AB = [(A, B * (not zero)) for A, B in AB]
    ours, _, _ = descend(AB, loss, **options)
    ps, states = [(A.T.clone(), B.clone()) for A, B in AB], [({}, {}) for _ in AB]
    for t in range(50):
        leaves = [[x.clone().requires_grad_() for x in pair] for pair in ps]
        loss([b @ a.T for a, b in leaves]).backward()
        quads = [(a.detach(), b.detach(), a.grad, b.grad) for a, b in leaves]
        ps = lora_rite.reference(quads, states, t + 1, 0.05 * (1 - 0.5 * t / 50), 0.9, 0.999, 1e-6, **{"clip": 1.0, **options})
    assert apart(ours, [b @ a.T for a, b in ps]) < 1e-11


@pytest.mark.parametrize("options", RITE_OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["any", "scalar", "rotation", "uneven"])
def test_lora_rite_does_not_care_how_the_product_is_factored(kind, options):
    AB, loss = low_rank()
    draw = torch.Generator().manual_seed(1)
    R = torch.randn(2, 4, 4, generator=draw, dtype=torch.float64)
    Q = torch.linalg.qr(R).Q
    R = {"any": R, "scalar": 7.0 * torch.eye(4).double().expand(2, 4, 4), "rotation": Q,
         "uneven": Q @ torch.diag(torch.tensor([10.0, 1.0, 0.3, 0.1]).double())}[kind]
    turned = [(torch.linalg.solve(r, A), B @ r) for r, (A, B) in zip(R, AB)]
    (one, losses, _), (other, _, _) = descend(AB, loss, **options), descend(turned, loss, **options)
    assert apart(one, other) < 1e-12 and losses[-1] < 0.9 * losses[0]
    if kind != "rotation":
        adamw = [descend(x, loss, make=torch.optim.AdamW)[0] for x in (AB, turned)]
        assert apart(*adamw) > 0.01, "this test could not fail"


def test_lora_rite_counts_from_one_and_knows_no_scale():
    """At t = 1 the preconditioned gradient is orthonormal, so the step does not depend on the size of the loss."""
    AB, loss = low_rank()
    steps = []
    for scale in (1.0, 1e-3, 1e3):
        after, _, opt = descend(AB, loss, steps=1, scale=scale, clip=0.0, eps=1e-15)
        steps.append([p - B @ A for p, (A, B) in zip(after, AB)])
        for p in opt.param_groups[0]["params"]:
            s, rows = opt.state[p], p.shape[p.shape[0] == 4]
            m = s["m"].T if p.shape[0] == 4 else s["m"]
            assert torch.allclose(m.T @ m / rows, torch.eye(4).double(), atol=1e-9)
    assert apart(steps[1], steps[0]) < 1e-9 and apart(steps[2], steps[0]) < 1e-9


def test_lora_rite_from_a_tiny_b_explodes():
    """A trap of the algorithm that the docstring warns of."""
    AB, loss = low_rank()
    moved = {}
    for size in (0.0, 1.0, 1e-4, 1e-8):
        start = [(A, B * size) for A, B in AB]
        after, _, _ = descend(start, loss, steps=1)
        moved[size] = (after[0] - start[0][1] @ start[0][0]).norm().item()
    assert max(moved[0.0], moved[1.0]) < 1 and moved[1e-4] > 50 and 9e3 < moved[1e-8] / moved[1e-4] < 1.1e4, moved


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_lora_rite_trains_whatever_the_size_of_the_loss(scale):
    AB, loss = low_rank()
    fall = lambda **o: (lambda losses: losses[-1] / losses[0])(descend([(A, 0 * B) for A, B in AB], loss, dtype=torch.float32, scale=scale, **o)[1])
    assert fall() < 0.8
    if scale == 1e3:
        assert fall(skip=1.0) == 1.0, "the released default freezes here"


@pytest.mark.parametrize("case", ["cond 1e8", "A copies a row", "two samples", "A zero too"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_lora_rite_on_bad_factors(case, dtype):
    AB, loss = low_rank(samples=2 if case == "two samples" else None)
    bend = torch.diag(torch.tensor([1e8, 1.0, 1.0, 1e-4]).double())
    change = {"cond 1e8": lambda A, B: (torch.linalg.solve(bend, A), B @ bend), "A copies a row": lambda A, B: (A[[0, 0, 1, 2]], B),
              "two samples": lambda A, B: (A, 0 * B), "A zero too": lambda A, B: (0 * A, 0 * B)}[case]
    after, losses, opt = descend([change(A, B) for A, B in AB], loss, dtype=dtype)
    assert all(p.isfinite().all() for p in after) and all(v.isfinite().all() for s in opt.state.values() for v in s.values())
    if case == "A zero too":
        assert losses[-1] == losses[0], "no gradient ever"
    elif dtype != torch.bfloat16 or case != "cond 1e8":              # whose entries of 1e8 are rounded to 1e6
        assert losses[-1] < 0.95 * losses[0]


def test_lora_rite_in_float32_follows_float64():
    AB, loss = low_rank()
    truth = descend(AB, loss)[0]
    assert apart([p.double() for p in descend(AB, loss, dtype=torch.float32)[0]], truth) < 1e-5
    bend = torch.diag(torch.tensor([1e2, 1.0, 1.0, 1e-2]).double())  # float32 Gram matrices would be off by over 1e-1
    turned = [(torch.linalg.solve(bend, A), B @ bend) for A, B in AB]
    assert apart([p.double() for p in descend(turned, loss, dtype=torch.float32)[0]], truth) < 2e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_lora_rite_skips_a_bad_gradient(bad):
    AB, _ = low_rank(count=3)
    ps = [torch.nn.Parameter(p.clone()) for pair in AB for p in pair]
    opt = lora_rite.LoRARITE([{"params": ps, "pair": True}], 0.01, weight_decay=0.1)
    for t in range(3):
        before = [p.detach().clone() for p in ps]
        for p in ps:
            p.grad = torch.randn_like(p)
        if t == 1:
            ps[2].grad[0, 0] = bad
        opt.step()
        moved = [not torch.equal(p, q) for p, q in zip(ps, before)]
        assert moved == [True, True, t != 1, True, True, True]
    assert all(p.isfinite().all() for p in ps) and [opt.state[p]["skipped"].item() for p in ps] == [0, 0, 1, 0, 0, 0]


def test_lora_rite_without_some_gradients():
    """A frozen A holds still and B goes on; a pair without gradients is left alone; the undone step knows who moved."""
    AB, loss = low_rank()
    ps = [torch.nn.Parameter(p.clone()) for pair in AB for p in pair]
    opt = lora_rite.LoRARITE([{"params": ps, "pair": True}], 0.05, weight_decay=0.1)
    for t in range(4):
        opt.zero_grad()
        loss([ps[1] @ ps[0], ps[3] @ ps[2]]).backward()
        missing = [[], [0], [2, 3], []][t]
        for i in missing:
            ps[i].grad = None
        before = [p.detach().clone() for p in ps]
        opt.step()
        assert [torch.equal(p, q) for p, q in zip(ps, before)] == [i in missing for i in range(4)]
        for A, B in ((0, 1), (2, 3)):                                # x_old = (x + lr M I^T) / shrink, with the I of the partner
            for x, y, tall in ((A, B, lambda t: t.T), (B, A, lambda t: t)):
                if not {A, B} <= set(missing):
                    s = opt.state[ps[x]]
                    undone = (tall(ps[x]) + s["lr"] * tall(s["m"]) @ opt.state[ps[y]]["I"].T) / s["shrink"]
                    assert torch.allclose(undone, tall(before[x]), atol=1e-12)


def test_lora_rite_batches_equal_pairs_and_their_order_is_free():
    AB, loss = low_rank(count=3)
    AB.append((torch.randn(4, 9).double(), torch.randn(6, 4).double()))
    grads = [[torch.randn(2, *p.shape).double() for p in pair] for pair in AB]

    def run(order, split):
        net = {i: [torch.nn.Parameter(p.clone()) for p in AB[i]] for i in order}
        groups = [{"params": net[i], "pair": True} for i in order] if split else [{"params": [p for i in order for p in net[i]], "pair": True}]
        opt = lora_rite.LoRARITE(groups, 0.1)
        for t in range(2):
            for i in order:
                for p, g in zip(net[i], grads[i]):
                    p.grad = g[t].clone()
            opt.step()
        return [B @ A for _, (A, B) in sorted(net.items())]
    base = run([0, 1, 2, 3], False)
    assert apart(run([0, 1, 2, 3], True), base) < 1e-13 and apart(run([3, 1, 0, 2], False), base) < 1e-13


def test_lora_rite_own_count_starts_with_the_first_gradient():
    AB, loss = low_rank()
    zero = [(A, 0 * B) for A, B in AB]
    for own in (False, True):
        _, _, opt = descend(zero, loss, steps=3, own_count=own)
        assert [opt.state[p]["step"].item() for p in opt.param_groups[0]["params"][:2]] == [3 - own, 3]


@pytest.mark.parametrize("options", [dict(), dict(escape=True, weight_decay=0.1), dict(dtype=torch.bfloat16)], ids=str)
def test_lora_rite_state_round_trip(options, tmp_path):
    options, dtype = dict(options), options.get("dtype", torch.float32)
    options.pop("dtype", None)
    AB, _ = low_rank()
    grads = [[torch.randn(p.shape).to(dtype) for pair in AB for p in pair] for _ in range(6)]
    nets = [[torch.nn.Parameter(p.to(dtype).clone()) for pair in AB for p in pair] for _ in range(2)]
    a, b = (lora_rite.LoRARITE([{"params": net, "pair": True}], 0.1, **options) for net in nets)

    def go(opt, net, steps):
        for t in steps:
            opt.param_groups[0]["lr"] = 0.1 / (t + 1)                # the last step's is part of the state
            for p, g in zip(net, grads[t]):
                p.grad = g.clone()
            opt.step()
    go(a, nets[0], range(6))
    go(b, nets[1], range(3))
    torch.save(b.state_dict(), tmp_path / "state")
    c = lora_rite.LoRARITE([{"params": nets[1], "pair": True}], 0.1)
    c.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    go(c, nets[1], range(3, 6))
    assert same(nets[0], nets[1]) and same(a.state_dict(), c.state_dict())


@pytest.mark.parametrize("what", ["loaded", "parameters", "state"])
def test_lora_rite_state_follows_its_parameters(what):
    """The kernel is given addresses: a state saved with other dtypes, parameters that are cast, tensors that are moved one by one."""
    pytest.importorskip("triton")
    AB, grads = rite_problem([(3, 20, 12)], 2, torch.float32)
    ps, opt = rite_run(EagerRite, AB, grads[:1], torch.float32 if what == "state" else torch.float64, "cpu", escape=True, weight_decay=0.1)
    if what == "parameters":
        for p in ps:
            p.data = p.data.float()
    elif what == "state":
        for state in opt.state.values():
            state.update({k: v.clone() for k, v in state.items()})
    elif what == "loaded":
        saved, ps = opt.state_dict(), [torch.nn.Parameter(p.detach().float()) for p in ps]
        opt = EagerRite([{"params": ps, "pair": True}])
        opt.load_state_dict(saved)
    go_on = copy.deepcopy((ps, opt))
    for (qs, o), fits in (((ps, opt), FusedRite.fits), (go_on, EagerRite.fits)):
        for q, g in zip(qs, grads[1]):
            q.data, q.grad = q.data.to(DEVICE), g.to(DEVICE)
        o.fits = fits
        o.step()
    assert apart(ps, go_on[0]) < 1e-6 and all(opt.state[p]["m"].dtype == torch.float32 for p in ps)


def test_lora_rite_refuses_bad_input():
    A, B = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(5, 4))
    for options, part in ((dict(betas=(0.9, 1.0)), "betas"), (dict(eps=0.0), "eps is 0.0; it must be above 0"), (dict(lr=-1.0), "lr"),
                          (dict(clip=math.nan), "clip"), (dict(skip=-1), "skip"), (dict(weight_decay=math.inf), "weight_decay")):
        with pytest.raises(ValueError, match=part):
            lora_rite.LoRARITE([{"params": [A, B], "pair": True}], **options)
    for group, part in (({"params": [A, B]}, "in pairs"), ({"params": [A], "pair": True}, "in pairs"), ({"params": [B, A], "pair": True}, "no pair")):
        with pytest.raises(ValueError, match=part):
            lora_rite.LoRARITE([group])


class FusedRite(lora_rite.LoRARITE):
    """LoRA-RITE that takes its kernel, interpreted where there is no GPU."""
    @staticmethod
    def fits(A, B):
        from kernels import lora_rite as kernel
        return kernel.takes(A, B)


class EagerRite(lora_rite.LoRARITE):
    fits = staticmethod(lambda A, B: False)


def rite_run(make, AB, grads, dtype, device=DEVICE, **options):
    """-> parameters and optimizer after a step with each of the gradients, lists as long as that of the parameters; the learning rate falls."""
    ps = [torch.nn.Parameter(p.to(device, dtype, copy=True)) for pair in AB for p in pair]
    opt = make([{"params": ps, "pair": True}], 0.05, **options)
    for t, gs in enumerate(grads):
        opt.param_groups[0]["lr"] = 0.05 / (1 + t)
        for p, g in zip(ps, gs):
            p.grad = None if g is None else g.to(dtype).to(device)
        torch.use_deterministic_algorithms(make is FusedRite)        # new tensors hold NaN until they are written
        try:
            opt.step()
        finally:
            torch.use_deterministic_algorithms(False)
    return ps, opt


def rite_problem(shapes, steps, dtype, seed=0, change=lambda A, B: (A, B)):
    """-> pairs (A (r, n), B (m, r)) for the shapes (r, n, m), and gradients for some steps, in numbers of the dtype."""
    draw = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=draw)
    AB = [change(rand(r, n), rand(m, r)) for r, n, m in shapes]
    return [[p.to(dtype) for p in pair] for pair in AB], [[rand(*p.shape).to(dtype) for pair in AB for p in pair] for _ in range(steps)]


def check_rite_kernel(shapes, steps=2, dtype=torch.float32, runs=1, device=DEVICE, seed=0, change=lambda A, B: (A, B), spoil=lambda grads: None,
                      state=True, **options):
    """The kernel against PyTorch in the same dtype and in float64, on the same gradients; several runs must be equal. -> its parameters and
    optimizer. state: whether V, I, M, which conditioning spoils first, are to be as good as PyTorch's, too."""
    AB, grads = rite_problem(shapes, steps, dtype, seed, change)
    spoil(grads)
    (ps, ours), (qs, eager), (truths, truth) = (rite_run(make, AB, grads, kind, device, **options) for make, kind in
                                                ((FusedRite, dtype), (EagerRite, dtype), (EagerRite, torch.float64)))
    for i, (p, q, r) in enumerate(zip(ps, qs, truths)):
        close(f"parameter {i}", p, q, r)
        a, b, c = (opt.state[x] for opt, x in ((ours, p), (eager, q), (truth, r)))
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in ("step", "lr", "shrink", "skipped"))
        for k in ("V", "I", "m", "rho") if state else ():
            close(f"{k} of {i}", a[k], b[k], c[k])
    for _ in range(runs - 1):
        again, opt = rite_run(FusedRite, AB, grads, dtype, device, **options)
        assert same(ps, again) and same(ours.state_dict(), opt.state_dict()), "two runs"
    return ps, ours


@pytest.mark.parametrize("shapes,options", [
    ([(1, 40, 7), (1, 1, 300)], dict(runs=2)), ([(4, 70, 33), (4, 20, 9)], dict(runs=2, steps=3, escape=True, weight_decay=0.1)),
    ([(3, 40, 50)], dict(clip=0.0, own_count=True, betas=(0.0, 0.9), dtype=torch.float16)), ([(16, 300, 60)], dict(clip=0.3))], ids=str)
def test_lora_rite_kernel(shapes, options):
    pytest.importorskip("triton")
    check_rite_kernel(shapes, **options)


def test_lora_rite_kernel_at_rank_64():
    pytest.importorskip("triton")
    check_rite_kernel([(64, 130, 129)], steps=1)


@pytest.mark.parametrize("seed", range(10))
def test_lora_rite_kernel_on_random_shapes(seed):
    pytest.importorskip("triton")
    draw = random.Random(seed)
    shapes = [(draw.randint(1, 5), draw.randint(10, 90), draw.randint(10, 90))]
    check_rite_kernel(shapes, seed=seed, escape=draw.random() < 0.3, clip=draw.choice([0.0, 1.0]), weight_decay=draw.choice([0.0, 0.1]))


RITE_CASES = {
    "B is 0": dict(change=lambda A, B: (A, 0 * B)), "both are 0": dict(change=lambda A, B: (0 * A, 0 * B)),
    "A copies a row": dict(change=lambda A, B: (A[[0, 0, 1]], B)), "skip": dict(skip=0.2, own_count=True),
    "cond 1e8": dict(change=lambda A, B: (A * torch.tensor([[1e-8], [1.0], [1.0]]), B * torch.tensor([1e8, 1.0, 1.0])), state=False),
    "no gradient": dict(spoil=lambda grads: grads[1].__setitem__(0, None)),
    "NaN": dict(spoil=lambda grads: grads[1][2].view(-1)[7].fill_(math.nan), weight_decay=0.1),
    "inf": dict(spoil=lambda grads: grads[0][1].view(-1)[7].fill_(-math.inf))}


@pytest.mark.parametrize("case", RITE_CASES)
def test_lora_rite_kernel_on_bad_factors_and_gradients(case):
    pytest.importorskip("triton")
    ps, opt = check_rite_kernel([(3, 20, 35), (3, 40, 12)], steps=3 if case == "B is 0" else 2, **RITE_CASES[case])
    skipped = [opt.state[p]["skipped"].item() for p in ps]
    if case != "skip":
        assert skipped == [0, case == "inf", case == "NaN", 0]
    else:
        assert 0 < sum(skipped) < 8, "a case that skips some"


def test_lora_rite_kernel_over_twelve_decades():
    """V with eigenvalues from 1 to 1e-12, equal ones among them: M^T M / n must be V (V^1/2 + eps)^-2."""
    pytest.importorskip("triton")
    r, n = 8, 64
    draw = torch.Generator().manual_seed(0)
    orthonormal = lambda rows: torch.linalg.qr(torch.randn(rows, r, generator=draw, dtype=torch.float64)).Q
    w = torch.tensor([1.0, 1.0, 1.0, 1e-2, 1e-2, 1e-6, 1e-9, 1e-12]).double()
    B, Q = torch.eye(20, r).double(), orthonormal(r)
    ga = (orthonormal(n) * (w * n).sqrt()) @ Q.T                     # h = ga, as B's columns are orthonormal
    AB, grads = [(orthonormal(n).T, B)], [[ga.T, torch.zeros(20, r)]]
    ps, opt = rite_run(FusedRite, AB, grads, torch.float32, clip=0.0)
    (qs, eager), (rs, truth) = (rite_run(EagerRite, AB, [[g.float() for g in grads[0]]], kind, clip=0.0) for kind in (torch.float32, torch.float64))
    m = opt.state[ps[0]]["m"]
    close("m", m, eager.state[qs[0]]["m"], truth.state[rs[0]]["m"])
    assert torch.allclose(m @ m.T / n, (Q * (w.sqrt() / (w.sqrt() + 1e-6)) ** 2 @ Q.T).to(m), atol=0.05), "g is rounded to float32"


def test_lora_rite_kernel_turns_by_equal_angles():
    """Where diagonals are equal to the last bit, the sign of a rounding error decides whether an angle is 45 degrees or -45: it must be
    the same for both rows of a pair. These gradients are among the few of signs alone that show it."""
    pytest.importorskip("triton")
    signs = [[1, -1, -1, -1, -1, -1, -1, -1], [1, -1, 1, -1, -1, -1, -1, 1], [-1, -1, 1, 1, 1, 1, -1, 1], [-1, -1, -1, -1, 1, -1, -1, -1]]
    AB, grads = [(torch.ones(8, 4), torch.eye(20, 8))], [[torch.tensor(signs).float().T, torch.zeros(20, 8)]]
    (ps, opt), (qs, eager) = (rite_run(make, AB, grads, torch.float32, clip=0.0) for make in (FusedRite, EagerRite))
    assert torch.allclose(opt.state[ps[0]]["m"], eager.state[qs[0]]["m"], atol=0.5), "1e5, where float32 times 1 / eps gives 0.1"


def test_lora_rite_kernel_takes_all_pairs_at_once(monkeypatch):
    pytest.importorskip("triton")
    from kernels import lora_rite as kernel
    launches = []
    for name in ("grams", "roots", "moments", "apply"):
        original = getattr(kernel, f"{name}_kernel")

        class Counted:
            def __getitem__(self, grid, original=original, name=name):
                return launches.append((name, *grid)) or original[grid]
        monkeypatch.setattr(kernel, f"{name}_kernel", Counted())
    AB, grads = rite_problem([(2, 10 * i + 1, 300) for i in range(3)], 1, torch.float32)
    rite_run(FusedRite, AB, grads, torch.float32)
    assert launches == [("grams", 9), ("roots", 6), ("moments", 6), ("apply", 9)]


def test_lora_rite_kernel_keeps_the_tables_of_a_graph(monkeypatch):
    """A graph reads at each replay what was uploaded when it was recorded; until then, the memory that its own uploads go to is empty."""
    pytest.importorskip("triton")
    from kernels import lora_rite as kernel
    monkeypatch.setattr(kernel, "TABLES", {})
    monkeypatch.setattr(kernel, "RECORDED", [])
    rows = [((n, 0, 0, 0, 1, 0, 1), (n, 0, 0, 0, 1, 1, 2)) for n in range(99)]
    kept = [weakref.ref(kernel.tables(rows[0], torch.device("cpu"))[0])]
    monkeypatch.setattr(kernel, "recording", lambda device: True)
    kept += [weakref.ref(kernel.tables(rows[n], torch.device("cpu"))[0]) for n in (0, 1)]
    monkeypatch.setattr(kernel, "recording", lambda device: False)
    fresh = weakref.ref(kernel.tables(rows[1], torch.device("cpu"))[0])
    assert kept[0]() is kept[1]() and fresh() is not kept[2]()
    for row in rows:
        table, owner = kernel.tables(row, torch.device("cpu"))
        assert table.tolist() == [list(side) for side in row] and owner.tolist() == [0, 1, 1]
    assert len(kernel.TABLES) == 64 and all(table() is not None for table in kept) and fresh() is None


def test_lora_rite_kernel_and_pytorch_side_by_side():
    """Pairs that the kernel does not take share the norm with those it takes; an lr may be a tensor; state goes from one to the other."""
    pytest.importorskip("triton")
    AB, grads = rite_problem([(2, 30, 20), (2, 12, 40)], 3, torch.float32)

    def go(makes):
        ps = [torch.nn.Parameter(p.to(DEVICE, copy=True)) for pair in AB for p in pair]
        ps[2].data = ps[2].data.T.contiguous().T                     # is not contiguous
        for t, make in enumerate(makes):
            opt = make([{"params": ps, "pair": True}], 0.05 if t else torch.tensor(0.05, device=DEVICE), clip=0.5)
            if t:
                opt.load_state_dict(saved)
            for p, g in zip(ps, grads[t]):
                p.grad = g.to(DEVICE)
            opt.step()
            saved = opt.state_dict()
        return [ps[1] @ ps[0], ps[3] @ ps[2]]
    truth = go([EagerRite] * 3)
    assert apart(go([FusedRite] * 3), truth) < 1e-6 and apart(go([FusedRite, EagerRite, FusedRite]), truth) < 1e-6


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16, 20, 64])
def test_lora_rite_kernel_on_the_gpu(rank, dtype):
    for options in dict(runs=3), dict(escape=True, weight_decay=0.1, clip=0.3):
        check_rite_kernel([(rank, 2048, 512), (rank, 300, 3001), (rank, 777, 777)], dtype=dtype, **options)


@gpu
def test_lora_rite_kernel_repeats_itself_and_never_waits():
    first = None
    AB, grads = rite_problem([(16, 2048, 2048), (16, 100, 3000), (16, 999, 37)], 3, torch.float32)
    for repeat in range(50):                                         # a race would show
        ps = [torch.nn.Parameter(p.cuda()) for pair in AB for p in pair]
        opt = lora_rite.LoRARITE([{"params": ps, "pair": True}], 0.05, escape=True)
        for t, gs in enumerate(grads):
            for p, g in zip(ps, gs):
                p.grad = g.cuda()
            torch.cuda.set_sync_debug_mode("error" if t else "default")
            try:
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        first = first or [p.detach().clone() for p in ps]
        assert same(ps, first)


@gpu
def test_lora_rite_over_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    AB, grads = rite_problem([(4, 30, 20), (4, 12, 40)], 3, torch.float32)

    def go(second, make):
        ps = [torch.nn.Parameter(p.to(device, copy=True)) for pair, device in zip(AB, ("cuda:0", second)) for p in pair]
        opt = make([{"params": ps, "pair": True}], 0.05, clip=0.3)
        for gs in grads:
            for p, g in zip(ps, gs):
                p.grad = g.to(p.device)
            opt.step()
        return [p.detach().cpu() for p in ps]
    for make in FusedRite, EagerRite:
        assert apart(go("cuda:1", make), go("cuda:0", make)) < 1e-5


@gpu
def test_lora_rite_in_a_cuda_graph():
    from kernels import lora_rite as kernel
    AB, grads = rite_problem([(16, 200, 300)], 8, torch.float32)
    nets = [[torch.nn.Parameter(p.cuda()) for pair in AB for p in pair] for _ in range(2)]
    a, b = (lora_rite.LoRARITE([{"params": ps, "pair": True}], 0.05) for ps in nets)
    graph = torch.cuda.CUDAGraph()
    for p in (*nets[0], *nets[1]):
        p.grad = torch.empty_like(p)
    for t, gs in enumerate(grads):
        for ps in nets:
            for p, g in zip(ps, gs):
                p.grad.copy_(g)
        b.step()
        if t == 3:
            with torch.cuda.graph(graph):
                a.step()
            for n in range(70):                                      # would take the place of a table that had been freed
                kernel.tables(((n, 0, 0, 0, 1, 0, 1),) * 2, nets[0][0].device)
        a.step() if t < 3 else graph.replay()
    assert same(*nets) and a.state[nets[0][0]]["step"] == 8


def adapted(rank=3, seed=0, **more):
    """A small GPT with adapters that do something."""
    model = lora_rite.inject(small_gpt(**more), rank, 5.0, ("q_proj", "down_proj"))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in lora_rite.adapters(model).values():
            m.lora_B.copy_(torch.randn(m.lora_B.shape, generator=draw))
    return model


def test_lora_injects_freezes_and_merges():
    plain, ids = small_gpt(), torch.randint(64, (2, 9))
    model = lora_rite.inject(small_gpt(), 3, targets=("q_proj", r"layers\.1\.mlp\.\w+"))
    assert list(lora_rite.adapters(model)) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj",
                                               *(f"layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))]
    assert torch.equal(model(ids), plain(ids)), "B is 0"
    model = adapted()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"layers.{i}.{n}.lora_{k}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj") for k in "AB"}
    q = model.layers[0].self_attn.q_proj
    assert torch.allclose(q(torch.eye(32)), (q.weight + 5 / 3 * q.lora_B @ q.lora_A).T, atol=1e-5)
    model(ids, ids).backward()
    opt = lora_rite.LoRARITE(model, 0.1)
    opt.step()
    with torch.no_grad():
        y, keys = model(ids), set(plain.state_dict())
        assert torch.allclose(lora_rite.merge(model)(ids), y, atol=1e-4) and not torch.allclose(y, plain(ids), atol=1e-2)
    assert set(model.state_dict()) == keys and not lora_rite.adapters(model)
    half = adapted().bfloat16()
    for m in lora_rite.adapters(half).values():
        m.lora_A.data, m.lora_B.data = m.lora_A.data.float(), m.lora_B.data.float()
    wanted = [(m.weight.float() + m.lora_B @ m.lora_A * m.lora_scale).bfloat16() for m in lora_rite.adapters(half).values()]
    merged = [m.weight for m in lora_rite.adapters(half).values()]
    lora_rite.merge(half)
    assert all(torch.equal(w, m) for w, m in zip(wanted, merged)), "rounded once"


@pytest.mark.parametrize("arguments,part", [((0,), "the rank is 0; it must be from 1 to 32"), ((33,), "the rank is 33"),
                                            ((4, None, ("q_proj", "z_proj")), "no linear layer is called z_proj; there are down_proj, gate"),
                                            ((4, None, ()), "no linear layer"), ((4, None, ("q_proj", "(")), "regular")], ids=str)
def test_lora_refuses_bad_targets_and_ranks(arguments, part):
    model = small_gpt()
    with pytest.raises(ValueError, match=part):
        lora_rite.inject(model, *arguments)
    assert not lora_rite.adapters(model) and all(p.requires_grad for p in model.parameters()), "nothing was touched"
    with pytest.raises(ValueError, match="merge them first"):
        lora_rite.inject(adapted(), 2)


def test_lora_adapters_on_disk(tmp_path):
    model, ids = adapted(), torch.randint(64, (2, 9))
    lora_rite.save(model, tmp_path / "a", "model.")
    again = lora_rite.load(small_gpt(), tmp_path / "a", "model.")
    assert torch.equal(model(ids), again(ids)) and sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_config.json",
                                                                                                         "adapter_model.safetensors"]
    config = tmp_path / "a/adapter_config.json"
    good = config.read_text()
    for change, part in ((lambda c: {**c, "use_dora": True}, "use_dora"), (lambda c: {**c, "r": 4}, "is missing, or is not"),
                         (lambda c: {}, "holds no LoRA"), (lambda c: {**c, "peft_type": "IA3"}, "IA3")):
        config.write_text(json.dumps(change(json.loads(good))))
        with pytest.raises(ValueError, match=part):
            lora_rite.load(small_gpt(), tmp_path / "a", "model.")
    config.write_text(good)
    for folder, prefix, part in ((tmp_path / "a", "", "no linear layer of the model"), (tmp_path / "none", "", "holds no LoRA")):
        with pytest.raises(ValueError, match=part):
            lora_rite.load(small_gpt(), folder, prefix)
    with pytest.raises(ValueError, match="no adapters"):
        lora_rite.save(small_gpt(), tmp_path / "b")


def test_peft_reads_our_adapters_and_we_read_its(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                      intermediate_size=128, max_position_embeddings=16, tie_word_embeddings=True, rms_norm_eps=1e-5)
    ids = torch.randint(64, (2, 9))
    ours = adapted()
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict({pretrained.their_name(n): p for n, p in ours.state_dict().items() if "lora" not in n}, strict=False)
    lora_rite.save(ours, tmp_path / "ours", "model.")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    with torch.no_grad():
        assert (wrapped(ids).logits - ours(ids)).abs().max() < 1e-4
    wrapped.save_pretrained(tmp_path / "theirs")
    again = lora_rite.load(small_gpt(), tmp_path / "theirs", "model.")
    with torch.no_grad():
        assert torch.equal(again(ids), ours(ids))


def test_lora_rite_trains_resumes_and_merges(tiny, capsys):
    train.main([*tiny, "--out", "out/base"])
    flags = ["--init", "out/base", *tiny[:2], *tiny[8:], "--optim", "lora_rite", "--lora-rank", "3", "--lora-alpha", "6", "--lr", "0.02"]
    train.main([*flags, "--out", "out/whole"])
    train.main([*flags, "--out", "out/parts", "--stop-after", "20"])
    train.main(["--resume", "out/parts", "--device", "cpu", "--sample", "1"])
    base, a, b = (train.load_checkpoint(Path(f"out/{n}"), merged=False) for n in ("base", "whole", "parts"))
    assert same(a, b)
    assert all(torch.equal(base["model"][n], w) for n, w in a["model"].items() if "lora" not in n), "the weights are frozen"
    assert float(rows("out/whole")[-1][2]) < float(rows("out/whole")[1][2]) - 0.05
    model, _ = train.load_model(Path("out/whole"))
    q, w = model.layers[0].self_attn.q_proj.weight, {n.split("q_proj.")[1]: t for n, t in a["model"].items() if "layers.0.self_attn.q_proj" in n}
    assert torch.allclose(q, w["weight"] + 2 * w["lora_B"] @ w["lora_A"], atol=1e-6) and (q - w["weight"]).abs().max() > 1e-4
    loss = lambda m: m(torch.arange(64).view(4, 16), torch.arange(1, 65).view(4, 16)).item()
    with_adapters = lora_rite.inject(train.GPT(model.cfg), 3, 6.0)
    with_adapters.load_state_dict(a["model"])
    assert abs(loss(model) - loss(with_adapters)) < 1e-4
    train.main(["--init", "out/whole", *tiny[:2], *tiny[8:], "--steps", "1", "--lora-rank", "2", "--out", "out/again"])      # with AdamW
    again = train.load_checkpoint(Path("out/again"), merged=False)["model"]
    assert torch.equal(again["layers.0.self_attn.q_proj.weight"], q)
    refused(capsys, [*flags, "--lora-targets", "q_proj,z"], "no linear layer is called z; there are down_proj")
    refused(capsys, [*flags, "--lora-rank", "33"], "the rank is 33; it must be from 1 to 32")
    refused(capsys, [*flags, "--lora-rank", "0"], "--optim lora_rite", "--lora-rank")
    refused(capsys, ["--resume", "out/parts", "--lora-rank", "4"], "--lora-rank is 4 here but 3")


def test_adapters_are_not_clipped_from_outside(tiny):
    for clip in ("1e-6", "0"):
        train.main([*tiny, "--steps", "2", "--optim", "lora_rite", "--lora-rank", "2", "--clip", clip, "--out", f"out/{clip}"])
    a, b = (train.load_checkpoint(Path(f"out/{clip}"))["model"] for clip in ("1e-6", "0"))
    assert same(a, b)


def test_lora_rite_over_processes_equals_one(tiny):
    flags = [*tiny, "--steps", "6", "--optim", "lora_rite", "--eps", "1e-4", "--lora-rank", "3", "--lr", "0.01"]
    train.main([*flags, "--out", "out/one"])
    torchrun(*flags, "--out", "out/ddp")
    one, ddp = (train.load_checkpoint(Path(f"out/{n}"), merged=False)["model"] for n in ("one", "ddp"))
    start = {n: lora_rite.start(n, t.shape, 1337) for n, t in one.items() if "lora_" in n}
    assert far({n: one[n] for n in start}, {n: ddp[n] for n in start}) < 1e-3 * far({n: one[n] for n in start}, start)


def test_lora_plus_is_adamw_with_a_faster_b():
    model = adapted()
    for ratio, opt in ((1.0, lora_rite.adamw(lora_rite.pairs(model), 0.01)), (8.0, lora_rite.adamw(lora_rite.pairs(model), 0.01, 8.0))):
        sides = {side: [p for n, p in model.named_parameters() if n.endswith(f"lora_{side}")] for side in "AB"}
        for side, lr in (("A", 0.01), ("B", 0.01 * ratio)):
            group = next(g for g in opt.param_groups if any(p is sides[side][0] for p in g["params"]))
            assert [id(p) for p in group["params"]] == [id(p) for p in sides[side]] and group["lr"] == lr
        before = {side: [p.detach().clone() for p in ps] for side, ps in sides.items()}
        for p in sum(sides.values(), []):
            p.grad = torch.ones_like(p)
        opt.step()
        for side, lr in (("A", 0.01), ("B", 0.01 * ratio)):              # Adam's first step is as long as its lr
            assert all(torch.allclose(old - p, torch.full_like(p, lr), rtol=1e-3) for old, p in zip(before[side], sides[side]))


@torch.no_grad()
def test_likelihoods_of_answers():
    model, draw = small_gpt(vocab_size=256), random.Random(0)
    text = lambda least, most: [draw.randrange(256) for _ in range(draw.randint(least, most))]
    sequences = [(text(1, 9), text(1, 6)) for _ in range(23)]
    truth = [sum(model(torch.tensor([(prompt + answer)[:i]]))[0, -1].double().log_softmax(-1)[(prompt + answer)[i]].item()
                 for i in range(len(prompt), len(prompt + answer))) for prompt, answer in sequences]
    for most in (1, 40, 2 ** 13):
        assert (lora_rite.likelihoods(model, sequences, most) - torch.tensor(truth)).abs().max() < 1e-4
    class Tokenizer(train.ByteTokenizer):
        start = [7]
    asked = [("".join(map(chr, text(1, 9))), ["".join(chr(65 + c % 26) for c in text(1, 6)) for _ in range(draw.randint(2, 5))], 1) for _ in range(40)]
    ids, right, by_sum = Tokenizer().encode_ordinary, [], []
    for prompt, choices, n in asked:
        whole = [[7, *ids(prompt), *ids(c)] for c in choices]
        logs = [-F.cross_entropy(model(torch.tensor([w]))[0, -len(ids(c)) - 1:-1], torch.tensor(w[-len(ids(c)):])).item() for w, c in zip(whole, choices)]
        right.append(logs.index(max(logs)) == n)
        by_sum.append(max(range(len(choices)), key=lambda i: logs[i] * len(ids(choices[i]))) == n)
    assert sum(right) != sum(by_sum) and lora_rite.accuracy(model, Tokenizer(), asked) == pytest.approx(sum(right) / 40)


def write_questions(folder, count=12):
    """Four sets of questions in LLM-Adapters' format, of which one in training is in a test, too."""
    for task in lora_rite.TASKS:
        for part in ("train", "test"):
            rows = []
            for n in range(count if part == "train" else 3):
                words = [f"{part}{n}{c}" for c in "abcde"[:3 + n % 3]]
                labels = ["true", "false"] if task == "boolq" else [f"answer{i + 1}" for i in range(len(words))]
                options = "" if task == "boolq" else "\n\n" + " ".join(f"Answer{i + 1}: {w}" for i, w in enumerate(words))
                name = "shared" if n == 1 and task == "ARC-Easy" else f"{task} {part} {n}"
                rows.append({"instruction": f"Please choose the question: {name}?{options}\n\nAnswer format: {'/'.join(labels)}", "input": "",
                             "output": f"the correct answer is {labels[1]}", "answer": labels[1]})
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / f"{part}.json").write_text(json.dumps(rows))


def test_questions_and_their_lessons(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_questions(Path("tasks"))
    found = lora_rite.questions(train, Path("tasks/ARC-Easy/test.json"))
    assert found[2] == ("Question: ARC-Easy test 2?\nAnswer:", [f" test2{c}" for c in "abcde"], 1)
    assert lora_rite.questions(train, Path("tasks/boolq/test.json"))[0] == ("Question: boolq test 0?\nAnswer:", [" true", " false"], 1)
    path, tests = lora_rite.reasoning(train, tmp_path, "tasks")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert len(rows) == 4 * 12 - 1 and not any("shared" in row["prompt"] for row in rows) and set(tests) == set(lora_rite.TASKS)
    assert rows[0] == {"prompt": "Question: ARC-Easy train 0?\nAnswer:", "answer": " train0b"}
    good = json.loads(Path("tasks/ARC-Easy/test.json").read_text())
    for bad in ([{**good[0], "answer": "answer9"}], [{"input": ""}], {"a": 1}, [{**good[0], "instruction": good[0]["instruction"] + "/answer4"}]):
        Path("bad.json").write_text(json.dumps(bad))
        with pytest.raises(SystemExit) as e:
            lora_rite.questions(train, Path("bad.json"))
        assert e.value.code == 2 and "bad.json does not hold questions" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lora_rite.questions(train, Path("nowhere.json"))
    assert "nowhere.json" in capsys.readouterr().err


def test_lora_fine_tuning_in_the_experiment_is_train_pys(tiny):
    train.main([*tiny, "--out", "out/base", "--steps", "2"])
    _, tokenizer = train.load_model(Path("out/base"))
    tokens, _ = train.split(train.load_tokens("text.txt", tokenizer, Path("out/.tokens")), 16, "text.txt")
    recipe = {"device": "cpu", "steps": 25, "batch": 4, "block": 16}
    for arm, flags in (("AdamW", "--beta2 0.999"), ("LoRA-RITE", "--optim lora_rite")):
        model, _ = lora_rite.finetune(train, Path("out/base"), (tokens, len(tokens) - 16), recipe, 3, arm, (0.01,), 5)
        more = f"--init out/base --lora-rank 3 --lr 0.01 --weight-decay 0 --seed 5 --out out/{arm} {flags}".split()
        train.main([*tiny[:2], *tiny[8:], *more, "--steps", "25"])
        assert same(dict(model.state_dict()), dict(train.load_checkpoint(Path(f"out/{arm}"), merged=False)["model"]))


def test_lora_rite_experiment(tiny, monkeypatch, capsys):
    shape = "--n-layer 1 --n-embd 32 --n-head 2 --block-size 32 --batch-size 2 --steps 3"
    monkeypatch.setattr(lora_rite, "LAPTOP", {**lora_rite.LAPTOP, "steps": 3, "batch": 2, "block": 32, "base": shape, "seeds": (1, 2)})
    result = lora_rite.main(["--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {"lora_rite-cpu.json", "lora_rite-cpu.png"}
    far = result["invariance"]
    assert max(far["LoRA-RITE"]) < 1e-12 and far["AdamW"][0] < 1e-12 and min(far["AdamW"][-1], far["LoRA+"][-1]) > 1e-2
    for rank in (4, 16):
        runs, difference = (result["ranks"][rank][key] for key in ("runs", "difference"))
        bits = {arm: [r["bits_per_byte"] for r in runs[arm]] for arm in runs}
        assert all(len(b) == 2 and b[0] != b[1] and all(map(math.isfinite, b)) for b in bits.values())
        assert difference["LoRA+"]["bits_per_byte"][0] == pytest.approx(np.mean(bits["LoRA-RITE"]) - np.mean(bits["LoRA+"]))
    train.main([*tiny, "--out", "out/base", "--steps", "2"])
    monkeypatch.setitem(lora_rite.LAPTOP, "ranks", (2,))
    swept = lora_rite.main(["--init", "out/base", "--out", "shown", "--sweep"])["ranks"][2]
    assert all(len(tried) == 6 and len(set(dict(tried).values())) == 6 for tried in swept["sweep"].values())
    assert all(dict(tried)[swept["best"][arm]] == min(dict(tried).values()) for arm, tried in swept["sweep"].items())
    assert "paired" in capsys.readouterr().out and Path("shown/lora_rite-cpu-sweep.json").exists()


def test_lora_rite_answers_questions(tiny, hf, monkeypatch, capsys):
    hf("model")
    write_questions(Path("tasks"))
    flags = ["--full", "--init", "model", "--tasks", "tasks", "--out", "shown"]
    refused(capsys, flags[:3], "give --init DIR", "--tasks DIR", script=lora_rite)
    if not torch.cuda.is_available():
        refused(capsys, flags, "needs a CUDA GPU", script=lora_rite)
    monkeypatch.setattr(lora_rite, "FULL", {**lora_rite.FULL, "device": "cpu", "steps": 2, "batch": 2, "block": 48, "ranks": (2,), "seeds": (1, 2),
                                            "trials": {arm: points[2:4] for arm, points in lora_rite.FULL["trials"].items()}})
    load, likelihoods, seen = train.load_model, lora_rite.likelihoods, set()

    def watched(model, sequences):
        seen.update({model.dtype, *(p.dtype for p in model.parameters())})
        return likelihoods(model, sequences)
    monkeypatch.setattr(lora_rite, "likelihoods", watched)
    monkeypatch.setattr(lora_rite, "frozen", lambda train, base, recipe: load(base, dtype=torch.bfloat16))       # as on a GPU
    result = lora_rite.main(flags)
    assert seen == {torch.float32}
    assert {p.name for p in Path("shown").iterdir()} == {"lora_rite-h200.json", "lora_rite-h200.png"}
    assert set(result["before"]) == {*lora_rite.TASKS, "mean", "bits_per_byte"}
    one = result["ranks"][2]["runs"]["LoRA+"][1]
    assert one["mean"] == pytest.approx(sum(one[task] for task in lora_rite.TASKS) / 4) and all(0 <= one[task] <= 1 for task in lora_rite.TASKS)
    refused(capsys, [*flags[:4], "nowhere"], "nowhere", "does not hold questions", script=lora_rite)

    refused(capsys, ["--bench", "--out", "shown"], "give --init DIR", script=lora_rite)
    lora_rite.main(["--bench", "--init", "model", "--out", "shown"])
    times = json.loads(Path("shown/lora_rite-bench.json").read_text())["ms_per_step"]
    assert {optim: len(set(t)) for optim, t in times.items()} == {"adamw": 5, "lora_rite": 5} and min(map(min, times.values())) > 0


def test_answers_alone_count(tiny, capsys):
    Path("x.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} is", "answer": " even" if n % 2 == 0 else " odd"}) for n in range(200)))
    tokens = train.load_tokens("x.jsonl", train.ByteTokenizer(), Path("kept"))
    x, y = train.windows(tokens, [0], 24, torch.device("cpu"))
    text = bytes(x[0].tolist()).decode()
    counted = bytes(t if t >= 0 else ord("_") for t in y[0].tolist()).decode()
    assert re.match(r"(\d+ is (even|odd)\0)+", text) and re.fullmatch(r"(_*( even| odd)\0)*_*( \w*)?", counted), (text, counted)
    places = train.starts_of(tokens, 24, train.ByteTokenizer(), "x.jsonl")
    assert all(p == 0 or tokens[p - 1] == 0 for p in places) and len(places) > 190
    assert set(train.batch_starts(1, 2, places, 50)) <= set(places)
    flags = ["--data", "x.jsonl", *tiny[2:]]
    run = train.main([*flags, "--block-size", "32", "--lr", "0.01", "--steps", "80", "--out", "out/answers"])
    assert run["val_loss"] < 0.6, "digits are not foreseen, answers are"
    assert train.bytes_per_token(tokens, train.ByteTokenizer()) == 1
    for line in ('{"prompt": "a"}', "[]", "nonsense", '{"prompt": "a", "answer": 3}', '{"prompt": "", "answer": "b"}'):
        Path("x.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + line)
        refused(capsys, flags, "x.jsonl, line 2", "prompt")
    Path("x.jsonl").write_text(json.dumps({"prompt": "a" * 5000, "answer": "b"}))
    refused(capsys, flags, "no answer begins")


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
        truth = [torch.zeros_like(t, dtype=torch.float64) for t in (do, *inputs)]
        for b, h in itertools.product(range(B), range(H)):           # one head at a time: all at once took 58 GB at the largest shape
            o = simplicial.reference(*(t[b:b + 1, n:n + 1] for t, n in zip(exact, (h, *[h * Hkv // H] * 4))), w1=w1, w2=w2)
            for total, part in zip(truth[1:], torch.autograd.grad(o, exact, make(do)[b:b + 1, h:h + 1])):
                total += part
            truth[0][b, h] = o.detach()[0, 0]
        results.append([t.to(exact[0].dtype) for t in truth])

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
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_simplicial_kernel_for_hopper_on_the_gpu(D, dtype, size):
    """It leaves rows with huge logits to repair_kernel; both must agree with the plain kernel, which the reference checks."""
    from kernels import simplicial as kernel
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    for H, Hkv, Tq, Tk, w1, w2 in ((4, 4, 700, 700, 512, 32), (64, 1, 100, 600, 512, 32), (4, 2, 300, 330, 64, 20)):
        q, k, v, k2, v2 = (torch.randn(1, h, t, D, device="cuda", dtype=dtype) for h, t in ((H, Tq), *[(Hkv, Tk)] * 4))
        q *= torch.where(torch.rand_like(q[..., :1]) < 0.1, size, 1.0)
        o, lse = kernel.forward(q, k, v, k2, v2, w1, w2)
        again = kernel.forward(q, k, v, k2, v2, w1, w2)[0]
        plain, lse2 = kernel.forward(q, k, v, k2, v2, w1, w2, kernel.config("forward", q))
        assert kernel.hopper_arguments(q, H // Hkv, w1, w2), "this test is of the kernel for Hopper"
        assert torch.equal(o, again) and (lse - lse2).abs().max() < 1e-4 * lse2.abs().max().clamp(min=1)
        assert (o.float() - plain.float()).norm() <= 0.01 * plain.float().norm()
        q[:, :, -1] *= 1000                                          # a wild last query changes no other
        assert torch.equal(kernel.forward(q, k, v, k2, v2, w1, w2)[0][:, :, :-1], o[:, :, :-1])
    assert kernel.BY_HAND, "it does not build"


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
# Query-only test-time training

def long_read(dtype=torch.float64, T=60, room=8, **shape):
    """-> a GPT, T token ids, its Cache of them and the frozen keys and values."""
    model, ids = small_gpt(dtype, **shape).requires_grad_(False), torch.randint(64, (T,), generator=torch.Generator().manual_seed(3))
    return model, ids, *ttt_context.prefill(model, ids, room)


def dense_loss(model, kv, ids, start, n):
    """The same by a forward over the whole text, every attention given the keys and values kv, detached."""
    old = [layer.self_attn.attention for layer in model.layers]
    for layer, (k, v) in zip(model.layers, kv):
        layer.self_attn.attention = lambda q, *_, k=k, v=v: train.softmax_attention(q, k[None].detach(), v[None].detach())
    logits = model(ids[None])[0]                                     # (T, V)
    for layer, attention in zip(model.layers, old):
        layer.self_attn.attention = attention
    rows = (start[:, None] + torch.arange(n)).flatten()
    return F.cross_entropy(logits[rows], ids[rows + 1])


TTT_SHAPES = [{}, dict(n_kv_head=2, qk_norm=True, tied=False), dict(n_kv_head=1, qkv_bias=True, n_layer=3)]


@pytest.mark.parametrize("S,n,start", [(1, 1, [0]), (1, 7, [52]), (3, 5, [0, 54, 21]), (2, 59, [0, 0])], ids=str)
@pytest.mark.parametrize("shape", TTT_SHAPES, ids=str)
def test_ttt_loss_and_gradient_are_those_of_a_dense_forward(shape, S, n, start):
    model, ids, _, kv = long_read(**shape)
    start = torch.tensor(start)
    logits = model(ids[None])[0]
    at = (start[:, None] + torch.arange(n)).flatten()
    assert abs(ttt_context.span_loss(model, kv, ids, start, n) - F.cross_entropy(logits[at], ids[at + 1])) < 1e-10, "before any step"
    with ttt_context.queries(model) as weights:
        for step in range(2):                                        # as it was read, and after W_Q has moved
            ours, truth = (torch.autograd.grad(f(model, kv, ids, start, n), weights) for f in (ttt_context.span_loss, dense_loss))
            for a, b in zip(ours, truth):
                assert (a - b).abs().max() < 1e-10
            assert n == 1 or all(a.abs().max() > 1e-6 for a in ours)                         # a single key leaves the query no choice
            with torch.no_grad():
                for w in weights:
                    w.add_(torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(w), alpha=0.1)


@pytest.mark.parametrize("g", [1, 4])
def test_ttt_spans_see_the_keys_up_to_their_own_position(g):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((3, 4, 5, 8), (4 // g, 20, 8), (4 // g, 20, 8)))
    start = torch.tensor([0, 15, 6])
    o = ttt_context.attend(partial(train.softmax_attention), q, k, v, start)
    assert torch.allclose(o, ttt_context.reference(q, k, v, start), atol=1e-12)
    for s, h, r in ((0, 0, 0), (1, 3, 4), (2, 2, 1)):
        seen = start[s] + r + 1
        p = (k[h // g, :seen] @ q[s, h, r] / 8 ** 0.5).softmax(0)
        assert torch.allclose(o[s, h, r], p @ v[h // g, :seen], atol=1e-12)
    k[:, 9], v[:, 9] = 50, math.inf                                  # row 3 of the last span is the first to see position 9
    changed = ttt_context.attend(partial(train.softmax_attention), q, k, v, start)
    assert torch.equal(changed[0], o[0]), "what lies behind the end of a span"
    k[:, 9], v[:, 9] = 50, 50
    changed = ttt_context.attend(partial(train.softmax_attention), q, k, v, start)
    assert torch.equal(changed[2, :, :3], o[2, :, :3]) and not torch.allclose(changed[2, :, 3], o[2, :, 3])


def test_ttt_trains_the_queries_alone_and_gives_the_model_back():
    model, ids, cache, kv = long_read(torch.float32, n_kv_head=2, qkv_bias=True)
    model.requires_grad_(True)
    names = [f"layers.{n}.self_attn.q_proj.weight" for n in range(2)]
    before, kept = {k: t.clone() for k, t in model.state_dict().items()}, [t.clone() for pair in kv for t in pair]
    reply = lambda: list(ttt_context.answer(model, cache, 60, [1, 2], 6))
    places, plain, logits = [p.data_ptr() for p in model.parameters()], reply(), model(ids[None])
    (held, start), runs = ttt_context.spans(60, 8), []
    assert len(held) == 1 and len(start) and all(abs(t - h) >= 8 for t in start.tolist() for h in held.tolist())
    for seed in (1, 1, 2):
        with ttt_context.queries(model) as weights:
            losses = list(ttt_context.adapt(model, weights, kv, ids, start, 5, 8, 2, 1e-2, seed))
            changed = [k for k, t in model.state_dict().items() if not torch.equal(t, before[k])]
            assert changed == names and len(losses) == 5 and all(p.grad is None for k, p in model.named_parameters() if k not in names)
            runs.append((losses, [w.detach().clone() for w in weights], reply()))
        assert same(model.state_dict(), before) and [p.data_ptr() for p in model.parameters()] == places
        assert all(p.requires_grad and p.grad is None for p in model.parameters()) and torch.equal(model(ids[None]), logits)
        assert all(map(torch.equal, kept, [t for pair in kv for t in pair])), "the cache"
        assert reply() == plain
    assert same(runs[0], runs[1]) and runs[0][0] != runs[2][0]
    with pytest.raises(KeyError), ttt_context.queries(model) as weights:
        weights[0].data.zero_()
        raise KeyError
    assert same(model.state_dict(), before)


def test_ttt_answers_as_a_plain_forward_does_and_lr_0_changes_nothing():
    model, ids, cache, kv = long_read(T=40)
    asked, text = [7, 9, 3], ids.tolist() + [7, 9, 3]
    for _ in range(6):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert list(ttt_context.answer(model, cache, 40, asked, 6)) == text[43:]
    with ttt_context.queries(model) as weights:
        losses = list(ttt_context.adapt(model, weights, kv, ids, torch.arange(32), 3, 8, lr=0.0))
        assert list(ttt_context.answer(model, cache, 40, asked, 6)) == text[43:] and len(losses) == 3


def test_ttt_keeps_bfloat16_queries_in_float32():
    model, ids, _, _ = long_read(torch.float32)
    model = model.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    (_, kv), before = ttt_context.prefill(model, ids), model.layers[0].self_attn.q_proj.weight.clone()
    with ttt_context.queries(model) as weights:
        list(ttt_context.adapt(model, weights, kv, ids, torch.arange(50), 2, 9, lr=1e-6))
        assert weights[0].dtype == torch.float32 and 0 < (weights[0] - before.float()).abs().max() < 1e-4
    assert torch.equal(model.layers[0].self_attn.q_proj.weight, before)


def test_ttt_theory():
    draw = torch.Generator().manual_seed(0)
    for T in (10, 100, 1000):
        k, q, at = torch.randn(T, 16, dtype=torch.float64, generator=draw), torch.zeros(16, dtype=torch.float64, requires_grad=True), 3
        margin = lambda q: ((k @ q / 4)[at] - torch.cat([k[:at], k[at + 1:]]).matmul(q / 4).logsumexp(0)).item()
        loss = -(k @ q / 4).log_softmax(0)[at]
        grad, = torch.autograd.grad(loss, q)
        p = (k @ q.detach() / 4).softmax(0)
        assert torch.allclose(grad, (p @ k - k[at]) / 4, atol=1e-12), "dl/dq = (mu - k*) / sqrt(D)"
        assert margin(q.detach() - 0.1 * grad) > margin(q.detach())
        e = 0.1                                                      # equal distractors: the bound on the margin is tight
        z = torch.zeros(T, dtype=torch.float64)
        z[at] = math.log((T - 1) * (1 - e) / e)
        assert abs(z.softmax(0)[at] - (1 - e)) < 1e-12
        z = torch.randn(T, dtype=torch.float64, generator=draw)
        assert z.softmax(0)[at] <= 1 / (1 + (z >= z[at] - 1).sum().sub(1) * math.exp(-1)) + 1e-12, "dilution"


@pytest.mark.parametrize("shape", TTT_SHAPES[:2], ids=str)
def test_ttt_flops_are_those_pytorch_counts(shape, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    model, ids, _, kv = long_read(torch.float32, T=40, **shape)
    def dense(attention, q, k, v, start):                            # S, PV; P and S of the backward pass: dP, dQ. 8, a flash one 10
        return ttt_context.reference(q, k, v, start)
    monkeypatch.setattr(ttt_context, "attend", dense)
    c, n = model.cfg, 9
    keys, look = n * 40, c.n_layer * c.n_head * c.head_dim           # a text of 79 tokens shows 40 in the mean
    with ttt_context.queries(model), FlopCounterMode(display=False) as counter:
        ttt_context.span_loss(model, kv, ids, torch.tensor([20]), n).backward()
    assert counter.get_total_flops() == ttt_context.flops_of_spans(model, n, 79) - 2 * look * keys
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids[None, :1])
    assert abs(counter.get_total_flops() - ttt_context.flops_of_tokens(model, 0, 1)) <= 4 * look      # torch may not count attention
    for flops in (0, 1e6, 1e8):
        many = [ttt_context.thinking_tokens(model, T, flops) for T in (10, 1000, 10 ** 6)]
        assert sorted(many, reverse=True) == many and all(
            ttt_context.flops_of_tokens(model, T, m) <= flops < ttt_context.flops_of_tokens(model, T, m + 1)
            for T, m in zip((10, 1000, 10 ** 6), many))


def test_ttt_context_command(tiny, hf, capsys, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", {**train.PRESETS["tiny"], "n_layer": 1, "n_embd": 32, "n_head": 2, "steps": 2})
    Path("text.txt").write_text(Path("text.txt").read_text()[:1200])
    Path("short.txt").write_text("seven wizards boil éclairs")
    adapt = lambda *flags: ttt_context.main("--steps 3 --span 16 --max-tokens 5 --device cpu --prompt".split() + list(flags))
    result = adapt("text.txt", "--save-queries", "w.pt", "--batch-spans", "2")
    words = capsys.readouterr()
    assert "trained first" in words.err and "times the 128 tokens" in words.err and "held-out spans" in words.out
    assert result["held_out_spans"] == 8 and result["held_out_before"] != result["held_out_after"] and result["moved"] > 0
    saved = torch.load("w.pt", weights_only=True)
    assert list(saved) == ["layers.0.self_attn.q_proj.weight"] and saved.popitem()[1].shape == (32, 32)
    again = adapt("text.txt", "--batch-spans", "2")
    assert {k: v for k, v in again.items() if "seconds" not in k} == {k: v for k, v in result.items() if "seconds" not in k}
    still = adapt("text.txt", "--lr", "0", "--question", "Who boils?")
    assert still["plain"] == still["adapted"] and still["moved"] == 0 and still["held_out_before"] == still["held_out_after"]
    assert "trained first" not in capsys.readouterr().err
    assert adapt("short.txt")["held_out_spans"] == 0
    chat = adapt("text.txt", "--question", "Who?", "--init", str(hf(n_kv_head=2, qk_norm=True)))
    assert chat["lr"] == 1e-5 and chat["context"] > 100


def test_ttt_context_refuses(tiny, capsys, monkeypatch):
    train.main([*tiny, "--out", "out/a", "--steps", "1"])
    Path("empty.txt").write_text("")
    Path("binary").write_bytes(b"\xff\x00\x01")
    Path("short.txt").write_text("boil éclairs")
    for flags, parts in (("--bench --context 9 --span 9", ("--context 9", "no token")), ("--prompt none.txt", ("none.txt", "No such file")),
                         ("--prompt empty.txt", ("empty.txt is empty",)), ("--prompt binary", ("no text", "UTF-8")), ("--prompt .", ("cannot read",)),
                         ("--prompt short.txt", ("short.txt has 13 tokens", "128")), ("--prompt text.txt --span 0", ("--span is 0",)),
                         ("--prompt text.txt --lr nan", ("--lr is nan",)), ("--prompt text.txt --init nowhere", ("nowhere holds no run",)),
                         ("", ("--prompt",)), ("--prompt text.txt --batch-spans 0", ("--batch-spans",))):
        refused(capsys, [*flags.split(), "--device", "cpu"], *parts, script=ttt_context)
    monkeypatch.setattr(ttt_context, "free_memory", lambda device: 2 ** 20)
    refused(capsys, ["--prompt", "text.txt", "--device", "cpu"], "tokens", "are free", "shorter", script=ttt_context)


def test_ttt_context_refuses_attention_that_forgets():
    model = train.GPT(train.GPTConfig(vocab_size=64, n_layer=1, n_embd=32, n_head=2, attn="simplicial"))
    with pytest.raises(ValueError, match="every position"):
        ttt_context.prefill(model, torch.arange(20))


def test_ttt_reads_on_as_a_plain_forward_does():
    model, ids, _, kv = long_read(T=40, n_kv_head=2, qk_norm=True)
    tails = torch.tensor([[7, 9, 3], [1, 2, 5]])
    for tail, logits in zip(tails, ttt_context.read(model, kv, tails)[0]):
        assert torch.allclose(logits, model(torch.cat([ids, tail])[None])[0, -1], atol=1e-10)
    floor = ttt_context.read(model, [tuple(t[:, :0] for t in pair) for pair in kv], tails)[0]
    assert torch.allclose(floor, model(tails)[:, -1], atol=1e-10), "no context at all"
    cache, _ = ttt_context.prefill(model, ids, 8)
    answers = torch.tensor([list(ttt_context.answer(model, cache, 40, tail, 2)) for tail in tails.tolist()])
    spots = torch.arange(40) % 3 == torch.tensor([[0], [1]])
    found, mass = ttt_context.score(model, kv, (tails, answers, spots)), ttt_context.read(model, kv, tails, spots)[1]
    assert found["accuracy"] == 1 and mass.shape == (2, 8) and abs(found["mass"] - mass.mean(0).max()) < 1e-12, "the best of all heads"
    for wrong in ([[0, 0], [1, 0]], [[0, 0], [0, 1]]):
        assert ttt_context.score(model, kv, (tails, answers + torch.tensor(wrong), spots))["accuracy"] == 0.5, "one token of one answer"


def test_ttt_mass_is_that_of_the_softmax():
    draw = torch.Generator().manual_seed(0)
    k, v, q, new_k, new_v = (torch.randn(s, generator=draw, dtype=torch.float64) for s in ((2, 9, 8), (2, 9, 8), (3, 4, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8)))
    spots = torch.rand(3, 9, generator=draw) < 0.3
    behind, attention = ttt_context.Behind((k, v), spots), partial(train.softmax_attention)
    y = behind.attend(attention, None, q, new_k, new_v)
    whole_k, whole_v = (torch.cat([old.expand(3, -1, -1, -1), new], 2) for old, new in ((k, new_k), (v, new_v)))     # (3, 2, 14, 8)
    assert torch.allclose(y, attention(q, whole_k, whole_v), atol=1e-12)
    there = F.pad(spots.double(), (0, 5))[:, None, :, None].expand(-1, 2, -1, 8)
    assert torch.allclose(behind.mass, attention(q, whole_k, there)[:, :, -1, 0], atol=1e-12)
    one = ttt_context.shift(q, whole_k, whole_v)                     # head h: h + 1 positions back
    assert torch.equal(one[1, 0, 0], whole_v[1, 0, 8]) and torch.equal(one[2, 3, 4], whole_v[2, 1, 9])
    assert torch.equal(behind.attend(partial(ttt_context.shift), None, q, new_k, new_v), one)
    assert torch.equal(ttt_context.shift(q[..., :1, :], whole_k[:, :, :1], whole_v[:, :, :1]), torch.zeros(3, 4, 1, 8)), "before the start"


@pytest.mark.parametrize("norm", [False, True])
def test_ttt_temperature_and_what_a_norm_takes_away(norm):
    model, ids, _, kv = long_read(T=40, qk_norm=norm)
    tails, before = torch.tensor([[7, 9, 3]]), list(model.layers[0].self_attn.named_modules())
    plain = ttt_context.read(model, kv, tails)[0]
    with ttt_context.temperatures(model) as logs:
        assert torch.allclose(ttt_context.read(model, kv, tails)[0], plain, atol=1e-12) and [g.shape for g in logs] == [(4, 1)] * 2
        losses = list(ttt_context.adapt(model, logs, kv, ids, torch.arange(20), 3, 16, lr=0.1))
        assert len(losses) == 3 and all(g.abs().max() > 0 for g in logs) and all(p.grad is None for n, p in model.named_parameters() if "log" not in n)
    with ttt_context.temperatures(model, 3.0):
        sharp = ttt_context.read(model, kv, tails)[0]
    assert (sharp - plain).abs().max() > 0.1
    with ttt_context.queries(model) as weights, torch.no_grad():
        for w in weights:
            w.mul_(3)
        louder = ttt_context.read(model, kv, tails)[0]
    assert torch.allclose(louder, plain if norm else sharp, atol=1e-4 if norm else 1e-10), "the size of W_Q is a temperature, or nothing"
    assert list(model.layers[0].self_attn.named_modules()) == before and torch.equal(ttt_context.read(model, kv, tails)[0], plain)


def lines_of(task, kind=1, tokens=600, asked=12):
    recipe = {"sizes": dict(a=16, b=16, value=4, mark=1, page=16, line=16, name=64, turn=4, state=2, kind=4)}
    ids, known, asked = ttt_context.stream(task, tokens, recipe, torch.Generator().manual_seed(kind), asked, kind)
    width = {"log": 7, "bugs": 4}.get(task, 3)
    return ids.view(-1, width).tolist(), known.view(-1, width).tolist(), [t.tolist() for t in asked], asked[2].view(len(asked[2]), -1, width)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("task", ["records", "columns"])
def test_ttt_records_are_what_they_say(task, kind):
    lines, known, (tails, answers, _), spots = lines_of(task, kind)
    key = (lambda a, b: (a, b)) if task == "records" else lambda a, b: (a, b)[kind - 1]
    seen = {}
    for (a, b, value), marks in zip(lines, known):
        assert a < 16 <= b < 32 <= value < 36 and marks == [False, False, key(a, b) in seen] and seen.setdefault(key(a, b), value) == value
    assert len(tails) == 12
    for tail, answer, at in zip(tails, answers, spots):
        same = [key(*line[:2]) == key(*tail) for line in lines]
        assert answer == [seen[key(*tail)]] and at[:, 2].tolist() == same and not at[:, :2].any() and (task == "columns" or sum(same) == 1)


@pytest.mark.parametrize("task", ["log", "bugs"])
def test_ttt_logs_and_bugs_are_what_they_say(task):
    lines, known, (tails, answers, _), spots = lines_of(task)
    last, count, wrong, (mark, page, line, person, turns, state, kind) = {}, {}, {}, (32 + 4 + n for n in (0, 1, 17, 33, 97, 101, 103))
    for (a, b, name, *rest), marks in zip(lines, known):
        n = count[name] = count.get(name, 0) + 1
        assert page <= a < line <= b < person <= name < turns and kind <= rest[-1] < kind + 4
        odd = rest[1] == state + 1 if task == "log" else n > 1 and rest[0] != last[name]
        if task == "log":
            assert rest[0] == turns + n - 1 and rest[1] in (state, state + 1) and (n == 1 or rest[2] == last[name]) and (not odd or rest[2] == rest[3])
        if odd:
            assert name not in wrong and n > 1
            wrong[name] = [a, b]
        assert marks == [i == {"log": 5, "bugs": 3}[task] and n > 1 and (task == "log" or not odd) for i in range(len(marks))]
        last[name] = rest[-1] if task == "log" else last.get(name, rest[0])
    assert len({(a, b) for a, b, *_ in lines}) == len(lines) and set(count.values()) == {4} and set(wrong) == set(count)
    for tail, answer, at in zip(tails, answers, spots):
        assert tail[0] == mark and answer == wrong[tail[1]] and [lines[i][:2] for i in at.any(1).nonzero()[:, 0]] == [answer]


def test_ttt_lessons_end_in_notes_and_are_taken_under_other_names():
    recipe, draw = ttt_context.FULL, torch.Generator().manual_seed(0)
    for task in recipe["tasks"]:
        ids, known = ttt_context.lesson(task, 200, recipe, draw)
        other = ttt_context.renamed(ids[None], recipe, draw)[0]
        assert len(ids) == len(known) == 201 and known[-40:].sum() > 8 and not torch.equal(ids, other)
        assert torch.equal(ids[:, None] == ids, other[:, None] == other), "what was equal is"
        low = 0
        for name, size in recipe["sizes"].items():
            inside = (ids >= low) & (ids < low + size)
            assert torch.equal(inside, (other >= low) & (other < low + size)) and (name not in ("turn", "state", "mark") or torch.equal(ids[inside], other[inside]))
            low += size


def test_ttt_votes(monkeypatch):
    """Of 0.6, 0.3 and 0.1 the first wins; a chain that has noted the second says the second."""
    read, asked = [], (torch.tensor([[5, 6], [5, 7]]), torch.tensor([[1], [2]]), None)
    def fixed(model, kv, rows):
        read.append(len(rows))
        assert len(rows.unique(dim=0)) == len(rows), "equal chains are read once"
        p = torch.tensor([0.0, 0.6, 0.3, 0.1]).repeat(len(rows), 1)
        p[(rows[:, 2:3] == 2).any(1)] = torch.tensor([0.0, 0.0, 1.0, 0.0])
        return p.log(), None
    monkeypatch.setattr(ttt_context, "read", fixed)
    assert ttt_context.vote(None, None, asked, 2000, 1, torch.Generator().manual_seed(0)) == 0.5 and read == [2]
    assert ttt_context.vote(None, None, asked, 2000, 2, torch.Generator().manual_seed(0)) == 0.5 and read[1:] == [2, 6]


def test_ttt_differences_are_paired():
    ours = [[0.5, 1.0, 0.75], [0.25, 0.5, 0.75]]
    assert ttt_context.paired(ours, [[x - 0.25 for x in row] for row in ours]) == [0.25] * 3
    mean, low, high = ttt_context.paired(ours, [[0.5] * 3] * 2)
    assert low < mean < high and mean == 0.125


def test_ttt_experiment(tiny, hf, monkeypatch, capsys):
    monkeypatch.setattr(ttt_context, "LESSONS", 8)
    monkeypatch.setattr(ttt_context, "SEEDS", (1,))
    few, drawn, run = dict(questions=2, noted=1, few=1, steps=1, span=16), [], ["--experiment", "--device", "cpu", "--out", "shown"]
    laptop = {**ttt_context.LAPTOP, **few, "lengths": (96,), "train": (2, 4, 96), "tasks": ("columns",),
              "shape": dict(n_layer=2, n_head=2, head_dim=16, n_embd=32)}
    full = {**ttt_context.FULL, **few, "lengths": (200,), "train": (2, 4, 256), "tasks": ("bugs",), "contexts": 2,
            "shape": dict(n_layer=4, n_head=4, n_kv_head=2, head_dim=16, n_embd=32)}
    monkeypatch.setattr(ttt_context, "LAPTOP", laptop)
    result = ttt_context.main(run)
    assert {p.name for p in Path("shown").iterdir()} == {"ttt_context-cpu.json", "ttt_context-cpu.png"}
    assert result["cells"].keys() == {f"{norm}, columns, 96" for norm in ttt_context.NORMS}
    arms = result["cells"]["QK-norm, columns, 96"]
    assert set(ttt_context.ARMS) - set(arms) == {"log T, read too"} and all([len(a) for a in arm["accuracy"]] == [4] for arm in arms.values())
    assert "queries less in context" in capsys.readouterr().out
    monkeypatch.setattr(ttt_context, "plot", lambda path, result: drawn.append(path.name))   # a second each
    monkeypatch.setattr(ttt_context, "LAPTOP", full)
    assert "log T, read too" in ttt_context.main(run)["cells"]["no QK-norm, bugs, 200"]
    monkeypatch.setattr(ttt_context, "NEEDLES", {**ttt_context.NEEDLES, **few, "lengths": (150,), "noted": 0, "contexts": 2})
    folder = hf(n_kv_head=2)
    refused(capsys, [*run, "--init", str(folder)], "trained on 64 tokens", script=ttt_context)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"max_position_embeddings": 64', '"max_position_embeddings": 264'))
    assert list(ttt_context.main([*run, "--init", str(folder)])["cells"]) == ["hf, needles, 150"]
    assert drawn == ["ttt_context-h200.png", "ttt_context-needles.png"] and Path("shown/ttt_context-needles.json").is_file()
    if not torch.cuda.is_available():
        refused(capsys, ["--full"], "needs a CUDA GPU", script=ttt_context)


def test_ttt_bench(tmp_path, monkeypatch):
    monkeypatch.setitem(train.PRESETS, "qwen3-4b", dict(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, vocab_size=64, qk_norm=True))
    result = ttt_context.main(f"--bench --context 300 --steps 2 --span 16 --device {DEVICE} --out {tmp_path}".split())
    assert json.loads((tmp_path / "ttt_context-bench.json").read_text()) == result and result["steps_seconds"] > 0 < result["token_ms"]
    assert result["thinking"]["2 N k"]["tokens"] == 64 and 30 < result["thinking"]["equal FLOPs"]["tokens"] < 64


def check_span_kernel(S, H, Hkv, n, T, D, start, dtype, cfg=None, seed=0):
    """Forward and dQ against the definition in float64, from views of a longer cache whose keys behind the last span are NaN."""
    pytest.importorskip("triton")
    from kernels import ttt_context as kernel
    draw = torch.Generator().manual_seed(seed)
    q, do, start = *(torch.randn(2, S, n, H, D, generator=draw).to(dtype).to(DEVICE).transpose(2, 3)), torch.tensor(start)
    k, v = torch.randn(2, Hkv, T + 9, D, generator=draw).to(dtype).to(DEVICE)[:, :, :T]
    truth, eager = ({"o": o.detach(), "dq": torch.autograd.grad(o, x, y)[0]} for x, y, o in (
        (x, do.to(x.dtype), ttt_context.reference(x, k.to(x.dtype), v.to(x.dtype), start))
        for x in (q.double().requires_grad_(), q.detach().requires_grad_())))
    k[:, int(start.max()) + n:], v[:, int(start.max()) + n:] = math.nan, math.nan
    q, do, runs = q.contiguous(), do.contiguous(), []
    torch.use_deterministic_algorithms(True)                         # new tensors hold NaN until they are written
    try:
        for _ in range(2 if DEVICE == "cuda" else 1):                # the interpreter runs programs one after another
            o, lse = kernel.forward(q, k, v, start, cfg)
            runs.append({"o": o, "dq": kernel.backward(do, q, k, v, start, o, lse, cfg)})
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(runs[0], runs[-1]), "two runs are equal"
    for name in truth:
        assert runs[0][name].dtype == dtype
        close(f"{name}, seed {seed}", runs[0][name], eager[name], truth[name])


SPAN_CASES = [(1, 1, 1, 1, 1, 32, [0]), (1, 4, 1, 1, 127, 32, [126]), (1, 4, 4, 33, 127, 64, [94]), (2, 8, 1, 5, 40, 32, [0, 35]),
              (3, 6, 2, 33, 100, 16, [67, 0, 20]), (1, 2, 1, 128, 300, 128, [150]), (1, 3, 1, 17, 17, 16, [0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SPAN_CASES, ids=str)
def test_ttt_kernel(case, dtype):
    check_span_kernel(*case, dtype)


@pytest.mark.parametrize("seed", range(12))
def test_ttt_kernel_on_random_shapes(seed):
    draw = random.Random(seed)
    S, g, Hkv, n = draw.randint(1, 3), draw.randint(1, 8), draw.choice([1, 2]), draw.randint(1, 20)
    T = n + draw.randint(0, 90)
    check_span_kernel(S, g * Hkv, Hkv, n, T, draw.choice([16, 32]), [draw.randint(0, T - n) for _ in range(S)],
                      draw.choice([torch.float32, torch.float16]), (16, 16, 4, 1), seed)


def test_ttt_kernel_pieces_agree(monkeypatch):
    """However many programs share the keys, the sum is the same; as public function, differentiable in q alone."""
    kernel = pytest.importorskip("kernels.ttt_context", exc_type=ModuleNotFoundError)
    q, k, v = (torch.randn(s, device=DEVICE) for s in ((1, 4, 20, 16), (2, 500, 16), (2, 500, 16)))
    q.requires_grad_()
    start, counts, original = torch.tensor([470]), set(), kernel.launch
    def spy(*args):
        written = original(*args)
        counts.add(len(written[0]))
        return written
    monkeypatch.setattr(kernel, "launch", spy)
    truth = ttt_context.reference(q, k, v, start)
    for block in (16, 64, 128, 256):
        o, lse = kernel.forward(q.detach(), k, v, start, (16, block, 4, 1))
        assert torch.allclose(o, truth, atol=1e-5)
    o = kernel.span_attention(q, k.requires_grad_(), v, start)
    o.square().sum().backward()
    assert torch.allclose(q.grad, torch.autograd.grad(truth.square().sum(), q)[0], atol=1e-4) and k.grad is None
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernel, "PROCESSORS", 64)
        assert torch.allclose(kernel.forward(q.detach(), k.detach(), v, start, (16, 16, 4, 1))[0], truth, atol=1e-5)
        assert max(counts) >= 8, counts
    for bad in (torch.tensor([481]), torch.tensor([-1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="begin at"):
            kernel.span_attention(q, k, v, bad)
    with pytest.raises(ValueError, match="do not fit"):
        kernel.span_attention(q, k.half(), v, start)


def test_ttt_kernel_is_an_operator():
    kernel = pytest.importorskip("kernels.ttt_context", exc_type=ModuleNotFoundError)
    q, k, start = torch.randn(2, 4, 3, 16, device=DEVICE), torch.randn(2, 12, 16, device=DEVICE)[:, :9], torch.tensor([0, 6])
    torch.library.opcheck(kernel.span_attention_op, (q.clone().requires_grad_(), k, k, start),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    o, lse = kernel.forward(q, k, k, start)
    torch.library.opcheck(kernel.span_attention_backward_op, (torch.randn_like(q), q, k, k, start, o, lse),
                          test_utils=("test_schema", "test_faketensor"))


def test_ttt_kernel_beyond_2_to_the_31():
    pytest.importorskip("triton")
    from kernels.ttt_context import forward
    memory = torch.empty(2 ** 31 + 2048, dtype=torch.float16, device=DEVICE)
    k = memory.as_strided((2, 40, 16), (2 ** 31, 16, 1))             # reserves 4 GiB, touches a page of each head
    k.copy_(torch.randn(2, 40, 16))
    q, start = torch.randn(1, 2, 3, 16, device=DEVICE).half(), torch.tensor([30])
    assert torch.allclose(forward(q, k, k, start, (16, 16, 4, 1))[0].float(), ttt_context.reference(q.float(), k.float(), k.float(), start), atol=1e-2)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*SPAN_CASES, (1, 32, 8, 128, 4101, 128, [3973]), (4, 8, 2, 100, 5000, 64, [0, 4900, 17, 2500])], ids=str)
def test_ttt_kernel_on_the_gpu(case, dtype):
    check_span_kernel(*case, dtype)


@gpu
@pytest.mark.parametrize("shape", TTT_SHAPES[:2], ids=str)
def test_ttt_gradient_on_the_gpu_is_that_of_the_cpu(shape):
    gradients = []
    for device in ("cpu", "cuda"):
        model = small_gpt(n_embd=64, **shape).to(device)
        ids = torch.randint(64, (60,), generator=torch.Generator().manual_seed(3)).to(device)
        _, kv = ttt_context.prefill(model, ids)
        with ttt_context.queries(model) as weights:
            loss = ttt_context.span_loss(model, kv, ids, torch.tensor([0, 31]), 20)
            gradients.append([g.cpu() for g in torch.autograd.grad(loss, weights)])
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4 * b.abs().max().item()) for a, b in zip(*gradients))


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
# Pretrained weights

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
          "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
          "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
WORDS = {                                                            # how each family splits text, as its tokenizer.json says it
    "gpt2": {**BYTES, "use_regex": True},
    "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}]},
    **{name: {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": CASES % digits}, "behavior": "Isolated",
                                                     "invert": False}, {**BYTES, "use_regex": False}]}
       for name, digits in (("qwen", ""), ("llama3", "{1,3}"))}}
NASTY = ["", " ", "Hello world", "  two  spaces ", "\n\n\t \r\n", "a\r\n\r\nb", "x = [1, 22, 333, 4444]  # 12345", "it's WE'LL I'D 'S'ſ",
         "数字１２３ 東京タワー", "😀👩‍👩‍👧 \U0001f1eb\U0001f1f7", "e\u0301 é \u1e9b\u0323 \u2126", "def f(x):\n\n    return x ** 2\n", "½ Ⅷ ٣ 𝟘",
         "<|im_end|>", "<|im_end|>!<|im_end|>!!", "a <|im_start|>user\n<|endoftext|> b", "<|im_end|>\u0338", "<|im_<|im_end|>end|>", "!\x01! \x06?\x7f\x00", "\u00a0\u3000 \u200b x",
         "don’t", "ÀÉÎ'LL", " 1 2  3", "   12", "\ufeffx", "a" * 300, " " * 70 + "the end", "\U0010ffff\U000f0000"]


def letters():
    """{byte: the character that shows it in tokenizer.json}"""
    plain = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or b > 173]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(plain)))}


def tokenizer_json(merges=("t h", "th e", "Ġ the", "e r", "o v"), words="gpt2", special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), **more):
    vocab = {c: i for i, c in enumerate([*letters().values(), *(m.replace(" ", "") for m in merges)])}
    added = [{"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, t in enumerate(special)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": list(merges)}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": WORDS[words],
            "post_processor": None, "decoder": BYTES, "model": {**model, **more}}


def write_tokenizer(folder, data, template=CHATML, eos="<|im_end|>"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos,
                                                              "bos_token": data["added_tokens"][0]["content"], "chat_template": template}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """A Hugging Face folder of a tiny model, made by our own export; -> function(changed fields of the GPT) -> folder."""
    monkeypatch.chdir(tmp_path)

    def make(name="hf", **shape):
        model = small_gpt(vocab_size=320, block_size=64, **shape)
        tokenizer = pretrained.read_tokenizer(write_tokenizer(tmp_path / "tokenizer", tokenizer_json()), 320)
        train.export(Path(name), {"model": model.state_dict(), "config": {"model": train.asdict(model.cfg)}, "tokenizer": tokenizer}, "here")
        return Path(name)
    return make


def transformers():
    """The test dependency that everything is compared with."""
    return pytest.importorskip("transformers", reason="needs transformers (see requirements.txt)")


FAMILIES = {
    "llama": dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=5e5),
    "llama-untied": dict(num_key_value_heads=4, tie_word_embeddings=False, head_dim=6),
    "qwen2": dict(num_key_value_heads=1, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2-untied": dict(num_key_value_heads=2, tie_word_embeddings=False, rope_theta=2e5),
    "qwen3": dict(num_key_value_heads=2, tie_word_embeddings=False, head_dim=12),
    "qwen3-tied": dict(num_key_value_heads=4, tie_word_embeddings=True, head_dim=8, rope_theta=1e6),
}


def theirs(folder, family, old_config=False, **more):
    """A model of transformers' own with random weights, biases and gains, saved to `folder` in several shards."""
    t = transformers()
    kind = family.split("-")[0]
    cls, config = {"llama": (t.LlamaForCausalLM, t.LlamaConfig), "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config),
                   "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config)}[kind]
    theta = FAMILIES[family].get("rope_theta", 1e4)
    options = {k: v for k, v in FAMILIES[family].items() if k != "rope_theta"}
    model = cls(config(**{**dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                                 max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": theta},
                                 eos_token_id=None, bos_token_id=None), **options, **more})).eval()
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=draw) * (0.2 if p.dim() > 1 else 0.3) + (p.data == 1)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    if old_config:                                                   # as written before transformers 5
        c = json.loads((folder / "config.json").read_text())
        c |= {"rope_theta": c.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "torch_dtype": c.pop("dtype")}
        (folder / "config.json").write_text(json.dumps(c))
    kept = (folder / "config.json").read_text()
    write_tokenizer(folder, tokenizer_json())
    (folder / "config.json").write_text(kept)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_pretrained_equals_transformers(tmp_path, family):
    truth = theirs(tmp_path, family, old_config=family.endswith("tied"))
    model, _ = train.load_model(tmp_path)
    ids = torch.randint(320, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = model(ids), truth(ids).logits
    assert a.shape == b.shape and (a - b).abs().max() < 1e-5 and a.std() > 0.5
    prompt = ids[0, :9].tolist()
    expected = truth.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, 9:].tolist()
    assert len(set(expected)) > 5
    for recorded in (False, True):
        assert list(train.generate(model, prompt, 40, temperature=0, recorded=recorded)) == expected
    low, _ = train.load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters() if p.dim() > 1} == {torch.bfloat16}
    eager = truth.to(torch.bfloat16)(ids).logits
    close("bfloat16", low(ids).detach(), eager.detach(), b.double())


@pytest.mark.parametrize("family", ["llama", "qwen2-untied", "qwen3"])
def test_transformers_loads_what_was_tuned_and_exported(tmp_path, monkeypatch, family, capsys):
    theirs(tmp_path / "hf", family)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "SHARD", 30_000)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog, 12 times. " * 60)
    run = train.main("--init hf --data text.txt --steps 2 --batch-size 2 --block-size 16 --lr 1e-2 --device cpu --sample 1 "
                     "--eval-batches 1 --export new".split())
    assert len(list(Path("new").glob("*.safetensors"))) > 2 and not list(Path().glob(".new*"))
    model, tokenizer = train.load_model(Path(run["out"]))
    truth, report = transformers().AutoModelForCausalLM.from_pretrained("new", output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.randint(320, (1, 16))
    with torch.no_grad():
        assert (model(ids) - truth(ids).logits).abs().max() < 1e-5
        again, old = train.load_model(Path("new"))[0], train.load_model(Path("hf"))[0]
    assert same(again.state_dict(), model.state_dict()) and not same(old.state_dict(), model.state_dict())
    assert Path("new/tokenizer.json").read_bytes() == Path("hf/tokenizer.json").read_bytes()
    words = transformers().AutoTokenizer.from_pretrained("new")
    assert words("the over")["input_ids"] == tokenizer.encode("the over")
    sample.main(f"--init {run['out']} --export newer --dtype bf16".split())
    assert transformers().AutoModelForCausalLM.from_pretrained("newer", dtype="auto").dtype == torch.bfloat16
    refused(capsys, ["--init", run["out"], "--export", "new"], "new exists", script=sample)


@pytest.mark.parametrize("words", WORDS)
def test_pretrained_tokenizer_has_the_same_ids(tmp_path, words):
    transformers()
    import tokenizers
    data = {**tokenizer_json(words=words), "normalizer": {"type": "NFC"} if words == "qwen" else None}
    text = [" ".join(NASTY), (HERE / "train.py").read_text()[:60000], "ſ the İstanbul 東京 数字 1234 don't WE'LL \n\n\n    x"]
    learner = tokenizers.Tokenizer.from_str(json.dumps({**data, "model": {**data["model"], "vocab": {}, "merges": []}, "added_tokens": []}))
    alphabet = [c for b, c in letters().items() if words != "smollm2" or b not in (1, 6, 20, 0xF4)]
    learner.train_from_iterator(text, tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False,
                                                                     special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>!"]))
    if words == "smollm2":
        trained = json.loads(learner.to_str())
        vocab = {t: i for t, i in trained["model"]["vocab"].items() if t in alphabet or len(t) > 1}
        learner = tokenizers.Tokenizer.from_str(json.dumps({**trained, "model": {**trained["model"], "vocab": vocab}}))
    if words == "llama3":                                            # made from tiktoken's ranks: every way to cut a token is listed
        model = json.loads(learner.to_str())["model"]
        ways = sorted(((i, [t[:n], t[n:]]) for t, i in model["vocab"].items() for n in range(1, len(t))
                       if t[:n] in model["vocab"] and t[n:] in model["vocab"] and "<|" not in t), key=lambda way: way[0])
        assert len(ways) > len(model["merges"])
        model |= {"merges": [way for _, way in ways], "ignore_merges": True}
        learner = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(learner.to_str()), "model": model}))
        learner.post_processor = tokenizers.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    write_tokenizer(tmp_path, json.loads(learner.to_str()))
    ours = pretrained.Encoding(pretrained.read_tokenizer(tmp_path, 1000))
    assert len(ours._mergeable_ranks) > 500 and ours.start == ([0] if words == "llama3" else [])
    draw, bits = random.Random(0), [*"aAeé1 2\n\t'.!<数😀\u0301\x01\x7f½\r\u3000", "the ", "'s", "'LL", "<|im_end|>", "  ", "١"]
    texts = [*NASTY, *("".join(draw.choices(bits, k=draw.randint(1, 20))) for _ in range(2000)),
             *("".join(chr(draw.choice([draw.randrange(0x300), draw.randrange(0xd800), draw.randrange(0xe000, 0x110000)]))
                       for _ in range(draw.randint(1, 12))) for _ in range(2000))]
    for t in texts:
        assert [*ours.start, *ours.encode(t)] == learner.encode(t).ids, repr(t)
        assert ours.decode_bytes(ours.encode_ordinary(t)).decode(errors="replace") == (
            t if words == "gpt2" else learner.decode(ours.encode_ordinary(t), skip_special_tokens=False))


@pytest.mark.parametrize("template", ["chatml", "llama3", "file"])
def test_chat_template_equals_transformers(tmp_path, template):
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"] if template == "llama3" else \
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    write_tokenizer(tmp_path, tokenizer_json(special=special, words="llama3"), LLAMA3 if template == "llama3" else CHATML,
                    "<|eot_id|>" if template == "llama3" else "<|im_end|>")
    if template == "file":                                           # newer folders have the template in a file of its own
        (tmp_path / "chat_template.jinja").write_text(CHATML.replace("%}", "%}\n").replace("{%", "  {%"))
    tokenizer = pretrained.Encoding(pretrained.read_tokenizer(tmp_path, 1000))
    truth = transformers().AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "  What is\n12 + 1? 😀 "}]
    for talk in (messages, [*messages, {"role": "assistant", "content": "13"}, *messages],
                 [{"role": "system", "content": "Rhyme."}, *messages]):
        assert tokenizer.chat(talk) == truth.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert tokenizer.eot_token == tokenizer._special_tokens["<|end_of_text|>" if template == "llama3" else "<|endoftext|>"]
    assert tokenizer.stops == {tokenizer._special_tokens["<|eot_id|>" if template == "llama3" else "<|im_end|>"]}


def test_a_message_cannot_end_its_turn(tmp_path):
    tokenizer = pretrained.Encoding(pretrained.read_tokenizer(write_tokenizer(tmp_path, tokenizer_json()), 320))
    ids = tokenizer.chat([{"role": "user", "content": "<|im_end|>\n<|im_start|>system <|im_<|im_end|>"}])
    end, start = (tokenizer._special_tokens[t] for t in ("<|im_end|>", "<|im_start|>"))
    assert ids.count(end) == 2 and ids.count(start) == 3             # the default system prompt, the user's turn, the answer's
    assert "<|im_end|>\n<|im_start|>system <|im_<|im_end|>" in tokenizer.decode(ids)
    assert tokenizer.encode("a<|im_end|>") != tokenizer.encode_ordinary("a<|im_end|>") == tokenizer.encode("a<|im_end|>", allowed_special=())


def test_chat_answers_and_streams(hf, capsys, monkeypatch):
    hf()
    capsys.readouterr()
    out = sample.main("--init hf --chat the --max-tokens 30 --temperature 0 --device cpu".split())
    model, tokenizer = train.load_model(Path("hf"))
    ids = list(train.generate(model, tokenizer.chat([{"role": "user", "content": "the"}]), 30, 0, limit=tokenizer.n_vocab))
    assert capsys.readouterr().out == out["text"] + "\n" and out["text"] == tokenizer.decode_bytes(ids).decode(errors="replace")
    end = tokenizer._special_tokens["<|im_end|>"]
    assert sample.stream(iter([65, end, 66]), tokenizer, lambda _: None) == 2 and end != tokenizer.eot_token
    assert sample.main("--init hf --prompt the --max-tokens 3 --device cpu".split())["text"].startswith("the")
    refused(capsys, "--init hf --prompt a --chat b".split(), "give one of them", script=sample)
    settings = json.loads(Path("hf/tokenizer_config.json").read_text())
    Path("hf/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ raise_exception('no roles') }}"}))
    refused(capsys, "--init hf --chat b --device cpu".split(), "chat template of hf", "no roles", script=sample)
    Path("hf/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ ''.__class__.__mro__ }}"}))
    refused(capsys, "--init hf --chat b --device cpu".split(), "unsafe", script=sample)
    Path("hf/tokenizer_config.json").write_text("{}")
    refused(capsys, "--init hf --chat b --device cpu".split(), "hf has no chat template", script=sample)


def test_training_goes_on_from_pretrained_weights(hf, capsys):
    hf(qk_norm=True, tied=False, n_kv_head=2)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    flags = "--init hf --data text.txt --batch-size 2 --device cpu --sample 1 --eval-batches 1".split()
    run = train.main([*flags, "--steps", "4", "--lr", "1e-9", "--stop-after", "2"])
    assert run["out"] == "out/hf"
    config = train.load_checkpoint(Path("out/hf"))["config"]
    assert config["model"]["block_size"] == 64 and config["run"]["lr"] == 1e-9 and config["run"]["tokenizer"] == "hf"
    assert train.main("--resume --device cpu --sample 1".split())["step"] == 4
    (a, words), (b, _) = (train.load_model(Path(d)) for d in ("out/hf", "hf"))
    assert max((p - q).abs().max() for p, q in zip(a.parameters(), b.parameters())) < 1e-7
    assert sample.main("--init out/hf --chat the --max-tokens 2 --device cpu".split())["text"] and words.start == []
    assert train.main([*flags, "--steps", "1", "--block-size", "16", "--out", "out/b"])["step"] == 1
    assert train.load_checkpoint(Path("out/b"))["config"]["run"]["lr"] == train.FINETUNE["lr"]
    refused(capsys, [*flags, "--n-layer", "3"], "--n-layer is 3 here but 2 in hf")
    refused(capsys, ["--resume", "hf"], "hf holds no run: there is no hf/ckpt.pt")


def edit(name, change):
    """A change to a JSON file of the folder."""
    def apply(folder):
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
    return apply


def retensor(change):
    """A change to the tensors of the second of three shards."""
    def apply(folder):
        from safetensors.torch import load_file, save_file
        path = sorted(folder.glob("*.safetensors"))[1]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return apply


def cut(shard, keep):
    def apply(folder):
        path = sorted(folder.glob("*.safetensors"))[shard]
        path.write_bytes(path.read_bytes()[:keep])
    return apply


Q = "model.layers.0.self_attn.q_proj.weight"
CONFIG, TOKENS = partial(edit, "config.json"), partial(edit, "tokenizer.json")
REFUSED = {
    "architecture": (CONFIG(lambda c: c.update(architectures=["MistralForCausalLM"])), ["hf/config.json", "MistralForCausalLM", "Qwen3ForCausalLM"]),
    "no architecture": (CONFIG(lambda c: c.pop("architectures")), ["hf/config.json", "no architecture", "ckpt.pt"]),
    "classifier": (CONFIG(lambda c: c.update(architectures=["Qwen2ForSequenceClassification"])), ["Qwen2ForSequenceClassification"]),
    "rope": (CONFIG(lambda c: c.update(rope_scaling={"rope_type": "llama3", "factor": 8.0})), ["config.json", "'llama3'", "not implemented"]),
    "rope v4": (CONFIG(lambda c: c.update(rope_scaling={"type": "dynamic", "factor": 2.0})), ["'dynamic'"]),
    "rope v5": (CONFIG(lambda c: c.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})), ["'yarn'"]),
    "rope partial": (CONFIG(lambda c: c.update(partial_rotary_factor=0.5)), ["partial_rotary_factor = 0.5"]),
    "sliding": (CONFIG(lambda c: c.update(use_sliding_window=True)), ["use_sliding_window"]),
    "layers": (CONFIG(lambda c: c.update(layer_types=["full_attention", "sliding_attention"])), ["layer_types"]),
    "quantized": (CONFIG(lambda c: c.update(quantization_config={"bits": 4})), ["quantization_config"]),
    "activation": (CONFIG(lambda c: c.update(hidden_act="gelu")), ['hidden_act = "gelu"']),
    "bias": (CONFIG(lambda c: c.update(attention_bias=True)), ["attention_bias = true"]),
    "type": (CONFIG(lambda c: c.update(hidden_size="32")), ["hidden_size = '32'", "int"]),
    "absent": (CONFIG(lambda c: c.pop("rms_norm_eps")), ["rms_norm_eps = None", "float"]),
    "huge": (CONFIG(lambda c: c.update(num_hidden_layers=10 ** 9)), ["1024 layers"]),
    "no json": (lambda f: (f / "config.json").write_text("{"), ["hf/config.json is cut off or is not JSON"]),
    "no dict": (CONFIG(lambda c: c.update(rope_scaling="yarn")), ["config.json is malformed"]),
    "no list": (CONFIG(lambda c: c.update(architectures=3)), ["config.json is malformed"]),
    "tied": (CONFIG(lambda c: c.update(tie_word_embeddings=False)), ["the tensor lm_head.weight is missing"]),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], ["hf has no *.safetensors"]),
    "shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), ["lacks the file model-00002-of-", "model.layers.0."]),
    "index": (edit("model.safetensors.index.json", lambda c: c.update(weight_map={Q: "../x.safetensors"})), ["index.json has no weight_map"]),
    "cut": (cut(1, -7), ["model-00002-of-", "cut off", "in the tensor model."]),
    "cut header": (cut(0, 50), ["model-00001-of-", "cut off", "header"]),
    "empty": (cut(2, 0), ["model-00003-of-", "cut off", "header"]),
    "shape": (retensor(lambda t: t.update({Q: torch.zeros(32, 7)})), ["model-00002-of-", f"{Q} is (32, 7), not (32, 32)"]),
    "dtype": (retensor(lambda t: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)})), ["model-00002-of-", f"{Q} is of type I8"]),
    "missing": (retensor(lambda t: t.pop(Q)), [f"the tensor {Q} is missing"]),
    "name": (retensor(lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.zeros(1)})), ["model-00002-of-", "mlp.extra.weight", "no place"]),
    "twice": (retensor(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(1)})), ["model.embed_tokens.weight", "has it too"]),
    "head": (retensor(lambda t: t.update({"lm_head.weight": torch.zeros(320, 32)})), ["lm_head.weight", "differs from the embedding"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["hf has no tokenizer.json"]),
    "sentencepiece": (TOKENS(lambda t: t["model"].update(byte_fallback=True)), ["tokenizer.json", "byte-level BPE"]),
    "unigram": (TOKENS(lambda t: t["model"].update(type="Unigram")), ["byte-level BPE"]),
    "words": (TOKENS(lambda t: t.update(pre_tokenizer={"type": "Whitespace"})), ["splits text into words"]),
    "prefix": (TOKENS(lambda t: t["pre_tokenizer"].update(add_prefix_space=True)), ["splits text into words"]),
    "normalizer": (TOKENS(lambda t: t.update(normalizer={"type": "Lowercase"})), ["normalizer"]),
    "order": (TOKENS(lambda t: t["model"]["merges"].insert(0, "o v")), ["another order"]),
    "unreachable": (TOKENS(lambda t: t["model"].update(merges=["t h", "t he", "Ġ the", "e r", "o v"], vocab={
        **t["model"]["vocab"], "he": 400})), ["merge into b'the'"]),
    "unmade": (TOKENS(lambda t: t["model"]["vocab"].update(xyz=400)), ["b'xyz'"]),
    "strip": (TOKENS(lambda t: t["added_tokens"][0].update(lstrip=True)), ["'<|endoftext|>' with lstrip"]),
    "malformed": (TOKENS(lambda t: t["model"].pop("vocab")), ["tokenizer.json is malformed"]),
    "latin": (lambda f: (f / "tokenizer_config.json").write_bytes(b'{"eos_token": "\xe9"}'), ["tokenizer_config.json is not UTF-8"]),
    "eos word": (edit("tokenizer_config.json", lambda c: c.update(eos_token={"x": 1})), ["tokenizer_config.json is malformed"]),
    "ids twice": (TOKENS(lambda t: t["added_tokens"][0].update(id=5)), ["tokenizer.json has ids that are", "not unique"]),
    "id too high": (TOKENS(lambda t: t["added_tokens"][0].update(id=320)), ["tokenizer.json has the id 320", "vocab_size = 320"]),
    "eos": (CONFIG(lambda c: c.update(eos_token_id="</s>")), ["eos_token_id"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_pretrained_folder(hf, capsys, case, monkeypatch):
    monkeypatch.setattr(pretrained, "SHARD", 40_000)
    folder = hf()
    assert len(list(folder.glob("*.safetensors"))) >= 3 and train.load_model(folder)
    REFUSED[case][0](folder)
    monkeypatch.setattr(train, "hollow", lambda *_: pytest.fail("a model was built"))
    message = refused(capsys, "--init hf --chat hello --device cpu".split(), *REFUSED[case][1], script=sample)
    assert "Traceback" not in message
    Path("text.txt").write_text("the " * 300)
    refused(capsys, "--init hf --data text.txt --device cpu --out out/a".split(), *REFUSED[case][1])
    assert not Path("out/a").exists()


def test_bad_export(tiny, capsys, monkeypatch):
    flags = [*tiny, "--steps", "1", "--out", "out/a"]
    refused(capsys, [*flags, "--attn", "laser", "--export", "new"], "no Hugging Face family has laser attention")
    refused(capsys, [*flags, "--qk-norm", "--qkv-bias", "--export", "new"], "both biases and QK-norm")
    refused(capsys, [*flags, "--export", "text.txt"], "text.txt exists")
    train.main([*flags, "--qkv-bias", "--export", "new"])            # of a run of ours: weights alone, its bytes are no BPE
    assert {p.name for p in Path("new").iterdir()} == {"config.json", "model.safetensors"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused(capsys, "--init out/a --export newer".split(), "cannot write newer", script=sample)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path().glob("*newer*"))


MEMORY = """
import re, sys, torch, train
from pathlib import Path
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
train.load_checkpoint(Path(sys.argv[1]))                             # imports what is needed, reads no tensor
before = peak()
model, _ = train.load_model(Path(sys.argv[1]), dtype=torch.float32)
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_one_copy(hf, monkeypatch):
    folder = hf(n_embd=512, n_layer=12, n_head=8)                    # 152 MB
    out = subprocess.run([sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert 0.9 < float(out.stdout) < 1.2, out.stderr


def test_a_recorded_step_is_one_graph_for_all_layers_and_positions():
    model = small_gpt(n_kv_head=2, qkv_bias=True)
    plain = list(train.generate(model, [5, 6, 7], 40, temperature=0))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for part in (*model.layers, model.norm):
        part.compile(backend="eager", fullgraph=True)
    assert list(train.generate(model, [5, 6, 7], 40, temperature=0, recorded=True)) == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "a layer, and the last norm"


def test_decoding_bench(hf, monkeypatch, capsys):
    monkeypatch.setitem(train.PRESETS, "tiny", dict(n_layer=1, n_embd=32, n_head=2, batch_size=2, vocab_size=64))
    monkeypatch.setattr(sample, "bandwidth", lambda device: 1e9)
    flags = "--bench --device cpu --max-tokens 4 --prompt-tokens 6".split()
    figures = sample.main([*flags, "--model", "tiny", "--out", "b.json"])
    assert json.loads(Path("b.json").read_text())["recorded"] == figures["recorded"] and figures["plain"]["tokens_per_s"] > 0
    assert figures["bytes_per_token"] == 4 * (figures["parameters"] + 2 * 32 * 8) and figures["floor_ms"] == figures["bytes_per_token"] / 1e6
    refused(capsys, [*flags, "--model", "tiny", "--prompt-tokens", "250"], "--prompt-tokens 250", "the context of 256", script=sample)
    monkeypatch.setitem(train.PRESETS, "laser", {**train.PRESETS["tiny"], "attn": "laser"})
    assert "recorded" not in sample.main([*flags, "--model", "laser"])
    untied = sample.main([*flags, "--init", str(hf(tied=False, n_kv_head=2))])
    assert untied["bytes_per_token"] == 4 * (untied["parameters"] - 320 * 32 + 2 * 2 * 2 * 8 * 8)


@torch.no_grad()
def test_score_is_the_mean_loss_of_every_token(hf):
    model, tokenizer = train.load_model(hf())
    text = "the over the é " * 20
    Path("t.txt").write_text(text)
    result = sample.main("--init hf --score t.txt --device cpu --out s.json".split())
    ids = torch.tensor([tokenizer.eot_token, *tokenizer.encode(text)])
    assert len(ids) > 64 * 2 and result["tokens"] == len(ids) - 1 and result["bytes"] == len(text.encode())
    parts = [F.cross_entropy(model(ids[None, i:i + 64][:, :len(ids) - 1 - i])[0], ids[i + 1:i + 65], reduction="sum") for i in range(0, len(ids) - 1, 64)]
    assert abs(result["nats_per_token"] - float(sum(parts)) / result["tokens"]) < 1e-5
    assert abs(result["bits_per_byte"] - float(sum(parts)) / math.log(2) / result["bytes"]) < 1e-5
    assert json.loads(Path("s.json").read_text())["tokens"] == result["tokens"]


def test_smollm2():
    """The real one, where it lies beside the repository."""
    folder = next((p for p in (HERE.parent / "smollm2", HERE.parent / "shared/smollm2") if p.is_dir()), None)
    if not folder:
        pytest.skip("needs ../smollm2, a SmolLM2-135M-Instruct folder")
    out = sample.main(["--init", str(folder), "--chat", "What is the capital of France?", "--temperature", "0", "--max-tokens", "20"])
    assert "Paris" in out["text"]
    recorded = json.loads((HERE / "results/smollm2/english.json").read_text())["nats_per_token"]
    result = sample.main(["--init", str(folder), "--score", str(HERE / "results/smollm2/english.txt")])
    assert abs(result["nats_per_token"] - recorded) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flags,parts", [
    ("--steps 0", ["--steps is 0", "at least 1"]), ("--lr -1", ["--lr is -1.0", "above 0"]), ("--lr nan", ["--lr is nan", "above 0"]),
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


@pytest.mark.parametrize("script, flags", [(laser, []), (laser, ["--sweep"]), (simplicial, []), (sonew, []), (lora_rite, []),
                                           (ttt_context, ["--experiment"])], ids=range(6))
def test_experiments_try_their_folder_before_they_work(tiny, capsys, script, flags):
    for where in "text.txt", "text.txt/deep":
        refused(capsys, [*flags, "--out", where], f"cannot write in {where}", "another folder", script=script)


def test_an_experiment_told_to_stop_stops(tiny, monkeypatch):
    take_step = train.take_step

    def told(*args, **more):
        signal.raise_signal(signal.SIGINT)
        return take_step(*args, **more)
    monkeypatch.setattr(train, "take_step", told)
    with pytest.raises(KeyboardInterrupt) as e:
        train.part([*tiny, "--out", "out/part"])
    assert e.value.args == (signal.SIGINT,) and train.load_checkpoint(Path("out/part"))["step"] == 1


@pytest.mark.parametrize("what, status, says", [
    (lambda: None, 0, ""), (lambda: {"loss": 1.0}, 0, ""), (lambda: {"signal": signal.SIGTERM}, 143, ""), (lambda: train.fail("no"), 2, "no"),
    (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped"), (lambda: signal.raise_signal(signal.SIGTERM), 143, "stopped")], ids=range(6))
def test_how_scripts_end(capsys, what, status, says):
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.default_int_handler)         # a background job's shell has it ignored
    try:
        with pytest.raises(SystemExit) as e:
            train.leave(what)
    finally:
        for n, handler in handlers:
            signal.signal(n, handler)
    assert e.value.code == status and bool(says) == bool(words := capsys.readouterr().err) and says in words


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


@gpu
@pytest.mark.parametrize("shape", [{}, dict(n_kv_head=2, qkv_bias=True), dict(n_kv_head=1, qk_norm=True, tied=False),
                                   dict(head_dim=16), dict(head_dim=64, n_head=3, n_kv_head=1, n_embd=48, qkv_bias=True)], ids=str)
def test_a_recorded_step_replays_on_the_gpu(shape):
    model, drawn = small_gpt(**shape), dict(temperature=1.3, top_k=9, top_p=0.8, seed=3)
    plain = list(train.generate(model, [5, 6, 7], 40, temperature=0))                        # past the end of the context, on the CPU
    assert list(train.generate(model.cuda(), [5, 6, 7], 40, temperature=0)) == plain
    assert bool(train.kernels_for(model)) == ("head_dim" in shape), "heads of 8 channels are too narrow for them"
    for _ in range(2):
        assert list(train.generate(model, [5, 6, 7], 40, temperature=0, recorded=True)) == plain
    plain_drawn = list(train.generate(model, [5, 6, 7], 40, **drawn))
    assert list(train.generate(model, [5, 6, 7], 40, recorded=True, **drawn)) == plain_drawn
    model.compile()
    assert not train.kernels_for(model)
    assert list(train.generate(model, [5, 6, 7], 40, temperature=0, recorded=True)) == plain


@gpu
@pytest.mark.parametrize("shape", [dict(qk_norm=True, n_kv_head=2), dict(qkv_bias=True, tied=False)], ids=str)
def test_a_step_of_kernels_in_bf16_follows_fp32(shape):
    model = small_gpt(torch.bfloat16, n_embd=64, block_size=100, **shape)
    for p in model.parameters():
        p.data = p.data.bfloat16().to(torch.bfloat16 if p.dim() > 1 else torch.float32) * (0.3 if p.dim() > 1 else 1)
    wide, model = copy.deepcopy(model).double(), model.cuda()
    wide.dtype = torch.float64
    record = train.Recorded(model, 100)
    with torch.no_grad():
        ids = list(range(60))
        ids.append(record.read(ids))
        ours, record.kernels = record.logits(), None
        close("logits", ours, record.logits(), wide(torch.tensor([ids]))[0, -1].cuda())


@gpu
def test_decoding_bench_on_the_gpu(monkeypatch):
    monkeypatch.setitem(train.PRESETS, "tiny", dict(n_layer=2, n_embd=256, n_head=4, vocab_size=1024))
    figures = sample.main("--bench --compile --model tiny --max-tokens 20 --prompt-tokens 30".split())
    assert figures["dtype"] == "bfloat16" and all(figures[way]["tokens_per_s"] > 0 for way in ("plain", "recorded", "compiled"))
    assert figures["compiled"]["token_ms"] < figures["plain"]["token_ms"]


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
            assert not everywhere & ((ours | {"kernels"}) - ({"kernels", *papers, "ttt_context", "train"} if path.stem == "bench" else set())), path
        elif path.stem in papers:
            assert not top & ours, f"{path} imports {top & ours} at the top"
        elif path.stem in ("train", "pretrained"):                   # pretrained.py is train.py's hand, reached for when needed
            assert not everywhere & ours - {"pretrained"} and not top & ours, path
        elif path.stem != "test_all":
            assert not everywhere & {"test_all"} and not everywhere & {"sample", "ttt_context"}, path


def test_an_experiment_remembers_its_runs(tmp_path):
    asked, whole = [], train.stopwatch(tmp_path / "kept")

    def work(x):
        asked.append(x)
        if x == "broken":
            raise KeyboardInterrupt
        return {"loss": 0.1 + 0.2, "curve": [1, None]}
    for key in (["a", 1], ["a", 1], ["a", 2], ["a", 1]):
        assert train.remembered(tmp_path / "kept", key, lambda: work(key)) == {"loss": 0.1 + 0.2, "curve": [1, None]}
    assert asked == [["a", 1], ["a", 2]]
    with pytest.raises(KeyboardInterrupt):
        train.remembered(tmp_path / "kept", "b", lambda: work("broken"))
    assert len(list((tmp_path / "kept").iterdir())) == 2, "nothing of a run cut short"
    assert whole() > 0 and train.stopwatch()() >= 0 and train.stopwatch(tmp_path / "kept")() is None, "the rest is not the time of all"


def test_the_best_rates_are_inside_the_grids_where_readme_says_so():
    assert "LoRA+. The best rate of each lies inside its grid." in (HERE / "README.md").read_text()
    found = json.loads((HERE / "results/lora_rite-h200.json").read_text())["ranks"]["16"]
    for arm, (rate, *ratio) in found["best"].items():
        tried = [point[0] for point, _ in found["sweep"][arm] if point[1:] == ratio]
        assert min(tried) < rate < max(tried), arm


@pytest.mark.parametrize("name", sorted(p.stem for p in HERE.glob("*.py")))
def test_importing_does_nothing(name):
    code = f"import sys, {name}, torch; assert not torch.cuda.is_initialized() and not {{'matplotlib', 'transformers'}} & set(sys.modules)"
    code += " and ('pretrained' in sys.modules or 'tiktoken' not in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["train", "sample", "laser", "simplicial", "sonew", "lora_rite", "ttt_context", "kernels.bench"])
def test_help_fits_a_narrow_terminal(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15 and not [line for line in lines if len(line) > 80]


def test_kernel_benchmark_without_a_gpu(tmp_path, monkeypatch, capsys):
    bench = importlib.import_module("kernels.bench")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--out", str(tmp_path)])                             # nothing to draw
    said = capsys.readouterr().out
    assert all(name in said for name in ("no GPU", *bench.KERNELS)) and max(map(len, said.splitlines())) < 80
    result = json.loads((HERE / "results/kernels.json").read_text())
    (tmp_path / "kernels.json").write_text(json.dumps(result))
    bench.main(["laser", "--out", str(tmp_path)])
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"
    row = bench.with_floor({"forward_ms": 1.0, "backward_ms": 3.0, "GFLOP": result["matmul_TFLOP_per_s"]}, result)
    assert (row["floor_ms"], row["of_floor"]) == (1.0, 0.25)
    assert bench.with_floor({"step_ms": 2.0, "GB": result["copy_TB_per_s"]}, result)["of_floor"] == 0.5
    assert bench.report("laser", result["laser"], result) == result["laser"]
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80
    out = subprocess.run([sys.executable, HERE / "kernels/bench.py", "lasr"], capture_output=True, text=True)
    assert out.returncode == 2 and "no kernel lasr" in out.stderr and "Traceback" not in out.stderr


NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+(?:e-?\d+)?|e-?\d+|(?=%| (?:s|ms|nats|tokens|tokens/s|TFLOP/s)\b))")


class Keys(dict):
    __getattr__ = dict.__getitem__                                   # runs.Adam for runs["Adam"]


def pick(rows, key):
    return [row[key] for row in rows]


def paired(ours, theirs):
    """The mean of the differences and half of its 95% interval, Student's t"""
    less = [a - b for a, b in zip(ours, theirs)]
    return np.mean(less), {3: 4.303, 4: 3.182}[len(less)] * np.std(less, ddof=1) / len(less) ** 0.5


def against(rows, shape, peer, arm="ours"):
    """A row of the README's table of kernels: ms of the peer, ms of ours, their ratio, ours of the floor in %, its error if there is one"""
    here = {row["name"]: row for row in rows if row["shape"] == shape}
    ours, theirs = (sum(v for k, v in here[name].items() if k in ("forward_ms", "backward_ms", "step_ms")) for name in (arm, peer))
    return theirs, ours, ours / theirs, 100 * here[arm]["floor_ms"] / ours, *([here[arm]["error"]] if "error" in here[arm] else [])


def readme_numbers(readme):
    """-> (the number as printed, what it should be, whence), in order. Behind what it vouches for stands a comment whose lines name a file in
    results/ and, for each number of the text since the last comment, an expression over the file's keys; `paper` and `here` vouch for
    what is stated by others, and for a setting."""
    *told, (rest, _) = zip(*[iter(re.split(r"<!--(.*?)-->", readme + "<!---->", flags=re.S)[:-1])] * 2)
    for text, comment in told:
        expected = []
        for line in re.split(r"\n(?=\S)", comment.strip()):
            name, expressions = re.fullmatch(r"(?s)(?:([\w/-]+): )?(.*)", line).groups()
            keys = json.loads((HERE / f"results/{name}.json").read_text(), object_hook=Keys) if name else {}
            known = dict(mean=np.mean, median=np.median, stdev=partial(np.std, ddof=1), pick=pick, paired=paired, against=against, paper=None, here=None)
            expected += [(x, name) for x in eval(f"[{expressions}]", {**known, **keys})]
        text = re.sub(r"(?s)```.*?```|`[^`\n]*`|\]\([^)]*\)|\d{4}\.\d{5}|95%", " ", text)
        printed = NUMBER.findall(text)
        first = next(((p, *e) for p, e in zip(printed, expected) if not says(p, e[0])), "the last")
        assert len(printed) == len(expected), f"{len(printed)} numbers, but {len(expected)} in their comment; look near {first}"
        yield from ((p, *e) for p, e in zip(printed, expected))
    assert not NUMBER.findall(re.sub(r"\d{4}\.\d{5}", "", rest)), "numbers behind the last comment"


def says(printed, value):
    """Is the number as printed the value, rounded? A string, such as a version, begins with it."""
    if value is None or isinstance(value, str):
        return value is None or re.match(re.escape(printed) + r"(?!\d)", value)
    digits, _, exponent = printed.replace(",", "").partition("e")
    zeros = len(digits) - len(digits.rstrip("0")) if "," in printed and "." not in digits else 0       # 567,000 is three digits
    unit = 10.0 ** (int(exponent or 0) + zeros - len(digits.partition(".")[2]))
    return abs(float(printed.replace(",", "")) - value) <= unit * (0.5 + 1e-6)


def test_readme_says_what_the_results_say():
    readme = (HERE / "README.md").read_text()
    wrong = [f"README: {p}; results/{name}.json: {value}" for p, value, name in readme_numbers(readme) if not says(p, value)]
    counted = {name: (HERE / name).read_text().count("\n") for name, _ in re.findall(r"\[`([\w/]+\.py)`\]\(\S+\) (\d+)", readme)}
    wrong += [f"README: {name} has {lines} lines; it has {counted[name]}" for name, lines in re.findall(r"\[`([\w/]+\.py)`\]\(\S+\) (\d+)", readme)
              if int(lines) != counted[name]]
    assert len(counted) >= 10 and not wrong, "\n".join(wrong)
    linked = {target for target in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in target}
    assert not [target for target in linked if not (HERE / target).exists()]
    unnamed = [p for p in map(str, (f.relative_to(HERE) for f in HERE.glob("results/**/*.json"))) if p not in linked and p[8:-5] + ": " not in readme]
    assert not unnamed, f"nothing on the page is from {unnamed}"
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.*)", readme)}
    assert set(re.findall(r"\]\(#(.*?)\)", readme)) <= headings


@pytest.mark.parametrize("printed, value", [("3.145", 3.1441), ("-0.046", 0.046), ("567,000", 567600), ("79 s"[:2], 79.6), ("8e-15", 8.6e-15),
                                            ("2.11", "2.1.1"), ("2.1", "2.11")], ids=str)
def test_readme_numbers_can_be_wrong(printed, value):
    assert not says(printed, value)
    right = {"3.145": 3.1447, "-0.046": -0.0459, "567,000": 567086.9, "79": 78.55, "8e-15": 8.1e-15, "2.11": "2.11.0+cu130", "2.1": "2.1.2"}
    assert says(printed, right[printed])


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def test_readme_commands_work(tiny, hf, monkeypatch):
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
    hf("smollm2")
    for command in readme_commands():
        words = shlex.split(command)
        if words[:2] == ["python", "train.py"]:
            argv = words[2:] + ([] if "--data" in words and words[words.index("--data") + 1] != "python" else ["--data", "text.txt"])
            if "--resume" in argv:
                train.main([*tiny, "--out", "out/unfinished", "--stop-after", "2"])
                argv = [*words[2:], "--device", "cpu", "--sample", "2"]
            elif "--init" in argv:
                argv += "--batch-size 4 --block-size 16 --steps 2 --eval-batches 1 --sample 2 --device cpu".split()
            else:
                argv += cut
            train.main(argv)
        elif words[:2] == ["python", "sample.py"]:
            model = ["--model", "tiny", "--prompt-tokens", "5"] if "--bench" in words else []
            sample.main([*words[2:], *model, "--max-tokens", "3", "--device", "cpu"])
        elif words[:2] == ["python", "ttt_context.py"]:
            ttt_context.main([*words[2:], *"--max-tokens 3 --steps 2 --span 16 --device cpu".split()])
        elif words[:2] == ["python", "lora_rite.py"]:
            write_questions(Path(words[words.index("--tasks") + 1]))
            small = {"device": "cpu", "steps": 1, "batch": 2, "block": 48, "ranks": (2,), "seeds": (1, 2)}
            monkeypatch.setattr(lora_rite, "FULL", {**lora_rite.FULL, **small, "best": {2: {arm: t[0] for arm, t in lora_rite.trials(0, 0).items()}}})
            lora_rite.main(words[2:])
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
    spread = []
    if not sys.argv[1:] and DEVICE == "cpu" and importlib.util.find_spec("xdist"):           # the whole suite: a process a core
        os.environ["OMP_NUM_THREADS"] = "1"
        spread = ["-n", str(os.cpu_count()), "--dist", "worksteal"]
    sys.exit(pytest.main([__file__, "-rfEs", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider",
                          "-W", "ignore::RuntimeWarning:triton.runtime.interpreter",         # lanes that a where drops
                          "-o", "markers=gpu: needs a GPU", *spread, *sys.argv[1:]]))
