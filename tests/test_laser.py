"""laser.py: the definition, its gradient, causality, and the study."""

import csv
import json
import math
import os
import warnings
from pathlib import Path

import pytest
import torch

import laser
import train
from experiments import laser as study
from tests.common import (
    assert_close,
    is_equal,
    read_held_out,
    record_calls,
    refused,
    run_script,
    small_gpt,
)


def laser_inputs(Tq=9, Tk=9, H=4, Hkv=2, D=8, std=1.0, dtype=torch.float64):
    """Return random q (B, H, Tq, D), k and v (B, Hkv, Tk, D) that are not contiguous."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for heads, T, scale in ((H, Tq, 2.0), (Hkv, Tk, 2.0), (Hkv, Tk, std)):
        t = torch.randn(2, heads, D, T, generator=generator) * scale
        inputs.append(t.to(dtype).transpose(2, 3))
    return inputs


def test_reference_is_the_definition():
    q, k, v = laser_inputs(Tq=3, Tk=5)
    out = laser.reference(q, k, v)
    for head, query, channel in ((0, 0, 0), (3, 1, 5), (2, 2, 7)):
        kv_head = head // 2
        n_keys = query + 3  # the three queries are the last of five positions
        logits = k[1, kv_head, :n_keys] @ q[1, head, query] / 8**0.5
        p = logits.softmax(0)
        expected = (p * v[1, kv_head, :n_keys, channel].exp()).sum().log()
        assert abs(out[1, head, query, channel] - expected) < 1e-12


@pytest.mark.parametrize("std", [0.02, 1.0, 40.0])
@pytest.mark.parametrize(
    "Tq, Tk, Hkv", [(1, 1, 4), (17, 17, 2), (64, 64, 4), (1, 127, 1), (5, 127, 2)]
)
def test_attention_equals_reference(Tq, Tk, Hkv, std):
    q, k, v = (t.requires_grad_() for t in laser_inputs(Tq, Tk, Hkv=Hkv, std=std))
    grad_out = torch.randn(2, 4, Tq, 8, dtype=torch.float64)
    truth = torch.autograd.grad(laser.reference(q, k, v), (q, k, v), grad_out)
    ours = torch.autograd.grad(laser.attention(q, k, v), (q, k, v), grad_out)
    for name, gradient, exact in zip("qkv", ours, truth):
        assert torch.allclose(gradient, exact, atol=1e-9), f"gradient of {name}"
    assert torch.allclose(laser.attention(q, k, v), laser.reference(q, k, v), atol=1e-11)
    for dtype in (torch.float32, torch.bfloat16):
        low = [t.detach().to(dtype) for t in (q, k, v)]
        exact = laser.reference(*(t.double() for t in low))
        assert_close(str(dtype), laser.attention(*low), laser.reference(*low), exact)


@pytest.mark.parametrize("function", [laser.reference, laser.attention])
@pytest.mark.parametrize("std", [1.0, 40.0])
def test_gradient_by_differences(function, std):
    inputs = laser_inputs(Tq=3, Tk=5, H=2, Hkv=1, D=2, std=std)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, inputs)


def test_second_derivative_by_differences():
    inputs = laser_inputs(Tq=2, Tk=3, H=1, Hkv=1, D=2)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(laser.reference, inputs)


def test_gradient_at_the_logits_is_posterior_minus_prior():
    """p is the prior over keys; the posterior is p_j exp(v_j) / sum_i p_i exp(v_i)."""
    q, k, v = laser_inputs(H=2)
    future = torch.ones(9, 9).triu(1) > 0
    logits = q @ k.transpose(-1, -2) / 8**0.5
    logits = logits.masked_fill(future, -torch.inf).requires_grad_()
    p = logits.softmax(-1)  # (B, H, T, T)
    out = (p @ v.exp()).log()  # (B, H, T, D)
    assert torch.allclose(out, laser.attention(q, k, v), atol=1e-12)

    # one output: sequence 0, head 1, query 6, channel 3
    output = out[0, 1, 6, 3]
    prior = p[0, 1, 6]
    posterior = prior * (v[0, 1, :, 3] - output).exp()
    assert abs(posterior.sum() - 1) < 1e-12
    (grad_logits,) = torch.autograd.grad(output, logits)
    assert torch.allclose(grad_logits[0, 1, 6], posterior - prior, atol=1e-12)


def test_properties():
    q, k, v = laser_inputs(Tq=33, Tk=33)
    out = laser.attention(q, k, v)
    softmax = train.softmax_attention(q, k, v)

    # between softmax attention and the largest visible value
    largest_visible = v.cummax(2).values.repeat_interleave(2, 1)
    assert (softmax <= out + 1e-12).all(), "by Jensen's inequality, LASER should be larger"
    assert (out <= largest_visible + 1e-12).all()

    # a constant added to v is added to the output, and a constant v is returned
    assert torch.allclose(laser.attention(q, k, v + 200), out + 200, atol=1e-10)
    first_v = v[:, :, :1]  # (B, Hkv, 1, D)
    expected = first_v.repeat_interleave(2, 1).expand_as(q)
    assert torch.allclose(laser.attention(q, k, first_v.expand_as(v)), expected, atol=1e-12)

    # for small values LASER is softmax attention
    assert torch.allclose(laser.attention(q, k, v * 1e-4) * 1e4, softmax, atol=1e-3)


@pytest.mark.parametrize("jump", [1.0, 50.0, 90.0, 110.0, 300.0, -300.0, 1e4])
def test_the_future_changes_nothing(jump):
    q, k, v = laser_inputs(Tq=40, Tk=40, dtype=torch.float32)
    changed = v.clone()
    changed[:, :, 30, 2] += jump
    before = laser.attention(q, k, v)
    after = laser.attention(q, k, changed.requires_grad_())
    assert torch.equal(before[:, :, :30], after[:, :, :30]), "an output saw a later value"
    truth = laser.reference(*(t.double() for t in (q, k, changed)))
    assert (after.double() - truth).abs().max() < 1e-5 * max(1, abs(jump))
    assert torch.autograd.grad(after.sum(), changed)[0].isfinite().all()


def test_large_values_and_nan():
    q, k, v = laser_inputs(Tq=40, Tk=40, dtype=torch.float32)
    v = v.sign() * 80
    truth = laser.reference(*(t.double() for t in (q, k, v)))
    assert torch.allclose(laser.attention(q, k, v).double(), truth, atol=1e-3)
    v[0, 0, 5, 0] = math.nan
    assert laser.attention(q, k, v)[0, 0, 39, 0].isnan(), "NaN must reach the loss"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_spoils_its_own_sequence_only(bad):
    q, k, v = laser_inputs(Tq=40, Tk=40, dtype=torch.float32)
    v[1] += 300  # in other bands than those of sequence 0
    expected = laser.attention(q, k, v)
    v[0, 0, 5, 0] = bad
    out = laser.attention(q, k, v)
    assert torch.allclose(out[1], expected[1], atol=1e-4)
    truth = laser.reference(q, k, v)
    assert torch.equal(out.isfinite()[0, :, 5:], truth.isfinite()[0, :, 5:])


def test_huge_values_have_few_bands():
    q, k, v = laser_inputs(Tq=40, Tk=40, dtype=torch.float32)
    v = v.sign() * 1e30
    truth = laser.reference(q, k, v)
    assert torch.allclose(laser.attention(q, k, v), truth)


def test_attend_compiles_for_any_shape():
    compiled = torch.compile(laser.attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9, 12):
        inputs = laser_inputs(Tq=T, Tk=T)
        assert torch.allclose(compiled(*inputs), laser.attend(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_autocast_does_not_round_the_exponentials(dtype, std):
    q, k, v = laser_inputs(Tq=40, Tk=40, std=std, dtype=torch.float32)
    exact = laser.attention(q, k, v)
    for function in (laser.attention, torch.compile(laser.attention, backend="aot_eager")):
        with torch.autocast("cpu", dtype):
            out = function(q, k, v)
        assert out.dtype == torch.float32
        assert torch.equal(out, exact)


@pytest.mark.parametrize(
    "std, n_bands, lengths, backend",
    [
        (1.0, 1, ((7, 7), (9, 9), (12, 12), (1, 9), (5, 9)), "aot_eager"),
        (30.0, 2, ((9, 9), (5, 9)), "eager"),  # several bands take long to compile
    ],
)
def test_compiles_for_changing_lengths(std, n_bands, lengths, backend):
    compiled = torch.compile(laser.attention, backend=backend)
    for Tq, Tk in lengths:
        inputs = laser_inputs(Tq, Tk, std=std)
        inputs[2] = inputs[2].abs()
        assert len(laser.band_centers(inputs[2])) == n_bands
        ours = [t.clone().requires_grad_() for t in inputs]
        eager = [t.clone().requires_grad_() for t in inputs]
        out = compiled(*ours)
        assert torch.equal(out, laser.attention(*eager))
        grad_out = torch.randn_like(out)
        gradients = torch.autograd.grad(out, ours, grad_out)
        expected = torch.autograd.grad(laser.attention(*eager), eager, grad_out)
        for gradient, exact in zip(gradients, expected):
            assert torch.allclose(gradient, exact, atol=1e-12)


@pytest.mark.parametrize("B, Tq, Tk", [(0, 3, 3), (2, 0, 3), (2, 0, 0)])
def test_attention_of_nothing_is_nothing(B, Tq, Tk):
    q = torch.ones(B, 4, Tq, 8, requires_grad=True)
    k = torch.ones(B, 2, Tk, 8, requires_grad=True)
    out = laser.attention(q, k, k)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    "q, k, v, part",
    [
        ((1, 4, 3, 8), (1, 3, 3, 8), (1, 3, 3, 8), "does not divide"),
        ((1, 4, 3, 8), (1, 2, 3, 8), (1, 2, 4, 8), "must agree"),
        ((1, 4, 3, 8), (1, 2, 3, 4), (1, 2, 3, 4), "head dim"),
        ((1, 4, 3, 8), (1, 2, 2, 8), (1, 2, 2, 8), "3 queries but only 2 keys"),
        ((1, 4, 3, 8), (1, 2, 0, 8), (1, 2, 0, 8), "3 queries but only 0 keys"),
        ((4, 3, 8), (2, 3, 8), (2, 3, 8), "must agree"),
    ],
)
def test_wrong_shapes_are_refused(q, k, v, part):
    with pytest.raises(ValueError, match=part):
        laser.attention(torch.ones(q), torch.ones(k), torch.ones(v))


def test_decodes_as_it_prefills():
    q, k, v = laser_inputs(Tq=20, Tk=20, dtype=torch.float32)
    parts = []
    for start, end in ((0, 12), (12, 19), (19, 20)):
        parts.append(laser.attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end]))
    assert torch.allclose(laser.attention(q, k, v), torch.cat(parts, 2), atol=1e-5)


def test_cpu_needs_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laser.attention(*laser_inputs())


def test_trains(tiny):
    run = train.main([*tiny, "--attn", "laser", "--out", "run"])
    with open("run/log.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.5
    assert run["val_loss"] < losses[0]


# -- the study -------------------------------------------------------------------------------------


def test_the_probe_computes_what_it_probes():
    model = small_gpt(attn="laser")
    x = torch.randint(64, (2, 16))
    loss = model(x, x).item()
    probes, probed_loss = study.probe_model(model, x, x)
    assert abs(probed_loss - loss) < 1e-6
    assert len(probes) == 2, "each of the two layers should have a probe"
    for probe in probes:
        assert probe.out.grad.shape == (2, 4, 16, 8)  # (B, H, T, D)
    assert abs(model(x, x).item() - loss) < 1e-6, "the probe should leave the model as it was"


def test_gradients_at_the_logits_are_those_of_autograd():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 5, 4, dtype=torch.float64)
    grad_out = torch.randn(2, 3, 4, dtype=torch.float64)
    p = logits.softmax(-1)
    ours = study.logit_gradients(p, v, grad_out)
    for name, out in (("softmax", p @ v), ("LASER", (p @ v.exp()).log())):
        (grad_logits,) = torch.autograd.grad(out, logits, grad_out, retain_graph=True)
        assert torch.allclose(ours[name], grad_logits.abs().sum(-1), atol=1e-12), name


def test_peaked_rows_are_those_with_one_large_probability(monkeypatch):
    """A row of attention (one query's probabilities) is peaked if one of them exceeds PEAKED."""
    model = small_gpt(attn="laser")
    x = torch.randint(64, (2, 16))
    monkeypatch.setattr(study, "PEAKED", 0.0)
    gradients, n_rows = study.peaked_gradients(model, x, x)
    layers, sequences, heads, queries = 2, 2, 4, 15  # all queries but the first
    assert n_rows == layers * sequences * heads * queries
    assert 0 < gradients["softmax"] < 100
    assert 0 < gradients["LASER"] < 100

    # no probability exceeds 1.1
    monkeypatch.setattr(study, "PEAKED", 1.1)
    with pytest.raises(ValueError, match="train longer"):
        study.peaked_gradients(model, x, x)


def test_the_papers_form_underflows_and_ours_does_not():
    errors = study.numerics(jumps=(10, 110), stds=(1, 100))
    for name, row in errors.items():
        assert row["ours"] < 1e-4, name
    assert errors["last value + 10"]["paper"] < 1e-5
    assert errors["last value + 110"]["paper"] is None  # not finite
    assert errors["values of std 100"]["paper"] is None


def test_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{i} quick brown foxes jump over the lazy dog" for i in range(200)]
    Path("text.txt").write_text("\n".join(lines))
    flags = "--attn laser --n-layer 2 --n-embd 32 --n-head 2 --block-size 16"
    settings = {"FLAGS": flags, "DATA": "text.txt", "STEPS": 4, "SEEDS": (1, 2), "PEAKED": 0.3}
    for name, value in settings.items():
        monkeypatch.setattr(study, name, value)
    launches = record_calls(monkeypatch, train, "main")
    probes = record_calls(monkeypatch, study, "peaked_gradients")
    record = laser.main(["--out", "shown"])
    assert sorted(os.listdir("shown")) == ["laser-cpu.json", "laser-cpu.png"]
    saved = json.loads(Path("shown/laser-cpu.json").read_text())
    assert saved["differences"] == record["differences"]
    assert len(saved["differences"]) == 7
    for name, difference in saved["differences"].items():
        assert difference["n"] == len(study.SEEDS), name
    assert saved["differences"]["random logits of std 1: LASER"]["mean"] > 0.03
    assert saved["differences"]["random logits of std 1, one output: LASER"]["mean"] < -0.01
    assert {"command", "commit", "hardware", "versions", "seconds"} <= set(saved)

    # a GPT for each seed, all probed on the same held-out text
    argvs = [launch["argv"] for launch in launches]
    assert [argv[argv.index("--seed") + 1] for argv in argvs] == ["1", "2"]
    held_out = read_held_out("text.txt", study.HELD_OUT_SEQUENCES, 16)
    assert len(probes) == 2
    for probe in probes:
        assert is_equal((probe["x"], probe["y"]), held_out)


def test_bad_flags_of_the_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    refused(["--out", "file/x"], "cannot write", main=laser.main)
    result = run_script("laser.py", "--nix")
    assert result.returncode == 2
    assert "unrecognized arguments: --nix" in result.stderr
