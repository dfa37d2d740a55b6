"""LoRA adapters: injecting, merging, layers that cannot carry one, training with train.py."""

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import lora_rite
import train
from support import lora
from tests.common import is_equal, refused, run_two_processes, small_gpt

# what init_A("layers.0.self_attn.q_proj.lora_A", (2, 3), seed=1337) returned in earlier versions
EARLIER_INIT = [
    [0.12000197172164917, -0.3629762828350067, -0.3328034579753876],
    [-0.1873779445886612, -0.27018097043037415, -0.2691192626953125],
]


def adapted(targets=("q_proj", "down_proj"), **shape):
    """Return a small GPT with adapters of rank 3 and scale 5/3 whose B is random, not zero."""
    model = lora.inject(small_gpt(**shape), 3, 5.0, targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in lora.adapters(model).values():
            linear.lora_B.copy_(torch.randn(linear.lora_B.shape, generator=generator))
    return model


def test_targets_are_ends_of_names_or_patterns():
    model = lora.inject(small_gpt(), 3, targets=("q_proj", "layers.1.mlp.*"))
    mlp = [f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", *mlp]
    assert list(lora.adapters(model)) == expected
    one = lora.inject(small_gpt(), 3, targets=("1.mlp.up_proj",))
    assert list(lora.adapters(one)) == ["layers.1.mlp.up_proj"]
    both = lora.inject(small_gpt(), 3, targets=("[01].mlp.up_proj",))
    assert list(lora.adapters(both)) == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
    for target in ("proj", "q", "q_projx", "Q_PROJ", "", "(.|.)*!", "*a" * 1000 + "b"):
        with pytest.raises(ValueError, match="no linear layer is called"):
            lora.inject(small_gpt(), 3, targets=(target,))


def test_adapters_start_at_zero_freeze_the_rest_and_merge():
    plain = small_gpt()
    ids = torch.randint(64, (2, 9))
    new = lora.inject(small_gpt(), 3)
    assert torch.equal(new(ids), plain(ids)), "with B = 0, new adapters should change nothing"

    # only A and B of the targets are trained
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = set()
    for i in (0, 1):
        for layer in (f"layers.{i}.self_attn.q_proj", f"layers.{i}.mlp.down_proj"):
            expected |= {f"{layer}.lora_A", f"{layer}.lora_B"}
    assert trained == expected
    q_proj = model.layers[0].self_attn.q_proj
    effective_weight = q_proj.weight + 5 / 3 * q_proj.lora_B @ q_proj.lora_A
    assert torch.allclose(q_proj(torch.eye(32)), effective_weight.T, atol=1e-5)

    # after a step, merging removes the adapters and keeps the output
    model(ids, ids).backward()
    lora_rite.LoRARITE(lora.adapter_groups(model), 0.1).step()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        logits = model(ids)
        assert not torch.allclose(logits, plain(ids), atol=1e-2)
        for merged in (lora.merge(model), lora.merge(copied)):
            assert torch.allclose(merged(ids), logits, atol=1e-4)
            assert merged.state_dict().keys() == plain.state_dict().keys()
            assert not lora.adapters(merged)
            assert not any(p.requires_grad for p in merged.parameters())
            assert not any(module._forward_hooks for module in merged.modules())
    lora.inject(model, 2)  # after merging, a model takes new adapters


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_rounds_once(adapter_dtype):
    half = adapted().bfloat16()
    expected = []
    for linear in lora.adapters(half).values():
        linear.lora_A.data = linear.lora_A.data.to(adapter_dtype)
        linear.lora_B.data = linear.lora_B.data.to(adapter_dtype)
        Z = linear.lora_B.double() @ linear.lora_A.double()
        expected.append((linear.weight.double() + Z * 5 / 3).bfloat16())
    merged = [linear.weight for linear in lora.adapters(half).values()]
    lora.merge(half)
    for weight, exact in zip(merged, expected):
        assert (weight == exact).float().mean() > 0.999


def test_autocast_does_not_round_what_is_merged():
    models = [adapted(), adapted()]
    lora.merge(models[0])
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge(models[1])
    assert is_equal(*(model.state_dict() for model in models))


def test_the_groups_are_for_any_optimizer():
    groups = lora_rite.adapt(small_gpt(), rank=2, targets="q_proj+up_proj")
    assert len(groups) == 1
    assert groups[0]["pair"] is True
    shapes = [tuple(p.shape) for p in groups[0]["params"]]
    assert shapes == [(2, 32), (32, 2), (2, 32), (128, 2)] * 2
    torch.optim.AdamW(groups).step()
    torch.optim.SGD(groups, lr=0.1).step()


def test_adapt_has_options_that_a_spec_can_set():
    model = small_gpt()
    lora_rite.adapt(model, rank=4, alpha=8.0)
    adapters = lora.adapters(model)
    layer_names = sorted(name.rpartition(".")[2] for name in adapters)
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert layer_names == sorted(targets * 2), "each linear layer should have an adapter"
    for linear in adapters.values():
        assert linear.lora_A.shape[0] == 4
        assert linear.lora_scale == 2.0

    model = small_gpt()
    lora_rite.adapt(model)
    for linear in lora.adapters(model).values():
        assert linear.lora_A.shape[0] == 16
        assert linear.lora_scale == 1.0


def test_first_weights_depend_on_the_seed_and_the_names_alone():
    def first_q_proj(seed, targets, n_random=0):
        torch.manual_seed(seed)
        torch.rand(n_random)  # the state of the generator must not matter
        model = small_gpt()
        rng_state = torch.get_rng_state()
        lora_rite.adapt(model, rank=2, targets=targets)
        assert torch.equal(torch.get_rng_state(), rng_state)
        return model.layers[0].self_attn.q_proj

    q_proj = first_q_proj(7, "q_proj")
    assert not q_proj.lora_B.any()
    assert torch.equal(q_proj.lora_A, first_q_proj(7, "k_proj+q_proj", n_random=3).lora_A)
    assert not torch.equal(q_proj.lora_A, first_q_proj(8, "q_proj").lora_A)
    A = lora.init_A("layers.0.self_attn.q_proj.lora_A", (2, 3), 1337)
    assert A.tolist() == EARLIER_INIT

    # uniform between -1 / sqrt(400) and 1 / sqrt(400)
    A = lora.init_A("x", (50, 400), 0)
    assert A.min() < -0.0499
    assert 0.0499 < A.max() < 0.05
    assert abs(A.mean()) < 1e-3


BAD_ARGUMENTS = [
    ((0,), "the rank is 0; it must be from 1 to 32"),
    ((33,), "the rank is 33"),
    ((4, None, ("q_proj", "z_proj")), "no linear layer is called 'z_proj'; there are down_proj, g"),
    ((4, None, ()), "no targets are given"),
    ((4, math.nan), "alpha is nan"),
    ((4, -1.0), "alpha is -1.0"),
    ((4, math.inf), "alpha is inf"),
]


@pytest.mark.parametrize("arguments,part", BAD_ARGUMENTS, ids=str)
def test_bad_targets_and_ranks_are_refused(arguments, part):
    model = small_gpt()
    with pytest.raises(ValueError, match=part):
        lora.inject(model, *arguments)
    assert not lora.adapters(model), "a refused call should leave the model as it was"
    assert all(p.requires_grad for p in model.parameters())
    assert not model._forward_hooks


def test_adapters_that_are_there_are_refused():
    with pytest.raises(ValueError, match="merge them first"):
        lora.inject(adapted(), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapters_are_in_float32_at_least(dtype):
    model = lora.inject(small_gpt().to(dtype), 2)
    wanted = torch.promote_types(dtype, torch.float32)
    for linear in lora.adapters(model).values():
        assert linear.weight.dtype == dtype
        assert linear.lora_A.dtype == linear.lora_B.dtype == wanted
        assert linear(torch.ones(3, 32, dtype=dtype)).dtype == dtype


def test_the_largest_rank_is_the_smaller_side_of_a_layer():
    model = lora.inject(small_gpt(), 32, targets=("up_proj",))
    assert model.layers[0].mlp.up_proj.lora_A.shape == (32, 32)


def test_keyword_inputs_get_the_adapter():
    model = lora.inject(nn.Sequential(nn.Linear(6, 6)), 2, targets=("0",))
    nn.init.ones_(model[0].lora_B)
    x = torch.randn(3, 6)
    assert torch.equal(model[0](input=x), model[0](x))
    q_proj = adapted().layers[0].self_attn.q_proj  # a subclass, with another name
    x = torch.randn(3, 32)
    assert torch.equal(q_proj(x=x), q_proj(x))


# -- layers that cannot carry an adapter -----------------------------------------------------------


class TwoLayers(nn.Module):
    """x -> b(a(x)); tests replace the layers or their weights."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.a(x))


class Sharded(torch.Tensor):
    """A subclass of Tensor, as DTensor and the quantized weights of other libraries are."""


def shared_weight(model):
    model.b.weight = model.a.weight


def shared_memory(model):
    model.b.weight = nn.Parameter(model.a.weight.data)


def transposed(model):
    model.b.weight = nn.Parameter(model.a.weight.data.t())


def a_view(model):
    model.rows = nn.Parameter(model.a.weight.data[2:4])


def a_buffer(model):
    model.register_buffer("copied", model.a.weight.data)


def an_embedding(model):
    model.embedding = nn.Embedding(6, 6, _weight=model.a.weight)


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.a)


def old_weight_norm(model):
    nn.utils.weight_norm(model.a)


def integers(model):
    model.a.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)


def float8(model):
    weight = torch.ones(6, 6).to(torch.float8_e4m3fn)
    model.a.weight = nn.Parameter(weight, requires_grad=False)


def meta(model):
    model.a.to("meta")


def lazy(model):
    model.a = nn.LazyLinear(6)


def sharded(model):
    model.a.weight = nn.Parameter(torch.ones(6, 6).as_subclass(Sharded))


SHARED = [shared_weight, shared_memory, transposed, a_view, a_buffer, an_embedding]
NOT_PLAIN = [weight_norm, old_weight_norm, integers, float8, meta, lazy, sharded]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*weight_norm:DeprecationWarning")
@pytest.mark.parametrize("spoil", SHARED + NOT_PLAIN)
def test_shared_and_special_weights_are_refused(spoil):
    model = TwoLayers()
    spoil(model)
    part = "the weight of a is shared" if spoil in SHARED else "is no plain tensor of floats"
    with pytest.raises(ValueError, match=part):
        lora.inject(model, 2, targets=("a",))
    assert not hasattr(model.a, "lora_A")


def test_a_layer_that_is_called_twice_is_fine():
    model = TwoLayers()
    model.b = model.a
    lora.inject(model, 2, targets=("a",))
    nn.init.normal_(model.a.lora_B)
    x = torch.randn(3, 6)
    y = model(x)
    assert torch.allclose(lora.merge(model)(x), y, atol=1e-5)


def test_a_layer_that_is_never_called_is_refused_at_the_first_pass():
    """If only its weight is used, the adapter would have no effect until it is merged."""

    class Functional(TwoLayers):
        def forward(self, x):
            return F.linear(self.a(x), self.b.weight)

    model = lora.inject(Functional(), 2, targets=("a", "b"))
    for _ in range(2):  # at the next one, too
        with pytest.raises(ValueError, match="does not call its layer b"):
            model(torch.randn(3, 6))
    model = lora.inject(Functional(), 2, targets=("a",))
    assert model(torch.randn(3, 6)).shape == (3, 6)
    assert not model._forward_hooks, "the check should be removed after the first pass"

    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    lora.inject(attention, 2, targets=("out_proj", "linear1"))
    with pytest.raises(ValueError, match="does not call its layer self_attn.out_proj"):
        attention(torch.randn(1, 3, 8))


def test_the_output_layer():
    """A tied lm_head is the embedding; another one is not called, as the loss uses its weight."""
    with pytest.raises(ValueError, match="no linear layer is called 'lm_head'"):
        lora.inject(small_gpt(), 2, targets=("lm_head",))
    model = small_gpt(tied=False)
    ids = torch.randint(64, (2, 9))
    with pytest.raises(ValueError, match="lm_head"):  # at once, or at the first pass
        lora.inject(model, 2, targets=("q_proj", "lm_head"))
        model(ids, ids)


@pytest.mark.parametrize("tied", [True, False])
def test_models_of_transformers(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (2, 9))
    if tied:
        with pytest.raises(ValueError, match="lm_head is shared with model.embed_tokens.weight"):
            lora.inject(model, 2, targets=("q_proj", "lm_head"))
    lora.inject(model, 2, targets=("q_proj",) if tied else ("q_proj", "lm_head"))
    model(ids, labels=ids).loss.backward()
    lora_rite.LoRARITE(lora.adapter_groups(model), 0.1).step()
    with torch.no_grad():
        y = model(ids).logits
        assert torch.allclose(lora.merge(model)(ids).logits, y, atol=1e-4)


def test_compiled_layers():
    ids = torch.randint(64, (2, 9))
    plain = adapted(n_layer=1)
    compiled = adapted(n_layer=1)
    for layer in compiled.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        losses = [model(ids, ids) for model in (plain, compiled)]
        assert torch.allclose(*losses)
        for model, loss in zip((plain, compiled), losses):
            loss.backward()
            lora_rite.LoRARITE(lora.adapter_groups(model), 0.01).step()
    whole = torch.compile(adapted(n_layer=1), backend="aot_eager")
    assert torch.allclose(whole(ids), adapted(n_layer=1)(ids), atol=1e-4)


# -- train.py --------------------------------------------------------------------------------------


def saved_weights(folder):
    return train.load_checkpoint(Path(folder))["model"]


def without(flags, *names):
    """Return the flags and their values, without the flags of these names."""
    kept = []
    for flag, value in zip(flags[::2], flags[1::2]):
        if flag not in names:
            kept += [flag, value]
    return kept


@pytest.fixture
def base(tiny):
    """Train a run, and return the flags that start from it."""
    train.main([*tiny, "--sample", "0", "--out", "out/base"])
    shape = ("--n-layer", "--n-embd", "--n-head")
    return ["--init", "out/base", *without(tiny, *shape, "--sample"), "--sample", "0"]


def test_training_resumes_and_merges(base):
    spec = "lora_rite:rank=3:alpha=6"
    flags = [*base, "--adapter", spec, "--optim", "lora_rite", "--lr", "0.02"]
    flags += ["--weight-decay", "0.2"]
    train.main([*flags, "--out", "out/whole"])
    train.main([*flags, "--out", "out/parts", "--stop-after", "20"])
    train.main(["--resume", "out/parts", "--device", "cpu", "--sample", "0"])
    whole = train.load_checkpoint(Path("out/whole"))
    parts = train.load_checkpoint(Path("out/parts"))
    assert is_equal(whole["model"], parts["model"])
    assert is_equal(whole["optimizer"], parts["optimizer"])
    assert whole["optimizer"]["param_groups"][0]["weight_decay"] == 0.2
    weights = whole["model"]

    # only the adapters are trained
    start = saved_weights("out/base")
    for name, weight in weights.items():
        if "lora" not in name:
            assert torch.equal(weight, start[name])
    rows = list(csv.DictReader(open("out/whole/log.csv")))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.05

    # load_model merges the adapters, with their scale alpha / rank = 2
    merged, _ = train.load_model(Path("out/whole"))
    assert all(p.requires_grad for p in merged.parameters()), "all can be trained again"
    merged_weight = merged.layers[0].self_attn.q_proj.weight
    name = "layers.0.self_attn.q_proj"
    Z = weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
    assert torch.allclose(merged_weight, weights[f"{name}.weight"] + 2 * Z, atol=1e-6)
    assert (merged_weight - weights[f"{name}.weight"]).abs().max() > 1e-4
    low, _ = train.load_model(Path("out/whole"), dtype=torch.bfloat16)
    low_weight = low.layers[0].self_attn.q_proj.weight
    assert torch.equal(low_weight, merged_weight.bfloat16()), "it should round once"
    with_adapters = train.GPT(merged.config)
    lora_rite.adapt(with_adapters, rank=3, alpha=6.0)
    with_adapters.load_state_dict(weights)
    x = torch.arange(64).view(4, 16)
    y = torch.arange(1, 65).view(4, 16)
    assert abs(merged(x, y).item() - with_adapters(x, y).item()) < 1e-4

    # a new run, with AdamW, starts from the merged weights
    flags = ["--init", "out/whole", *base[2:], "--steps", "1", "--adapter", "lora_rite:rank=2"]
    train.main([*flags, "--out", "out/again"])
    assert torch.equal(saved_weights("out/again")[f"{name}.weight"], merged_weight)


def test_bad_specs_are_refused(base):
    flags = [*base, "--optim", "lora_rite", "--adapter"]
    part = "no linear layer is called 'z'; there are down_proj"
    refused([*flags, "lora_rite:targets=q_proj+z"], part)
    refused([*flags, "lora_rite:rank=33"], "the rank is 33; it must be from 1 to 32")
    refused([*flags, "lora_rite:rank=0"], "the rank is 0")
    refused([*flags, "lora_rite:alpha=nan"], "alpha is nan")
    refused([*base, "--optim", "lora_rite"], "in pairs", "--adapter lora_rite")


def test_lora_rite_is_not_clipped_from_outside(base):
    flags = [*base, "--steps", "2", "--optim", "lora_rite", "--adapter", "lora_rite:rank=2"]
    for clip in ("1e-6", "0"):
        train.main([*flags, "--clip", clip, "--out", f"out/{clip}"])
    assert is_equal(saved_weights("out/1e-6"), saved_weights("out/0"))


def test_two_processes_equal_one(base):
    flags = [*base, "--steps", "6", "--optim", "lora_rite:eps=1e-4", "--lr", "0.01"]
    flags += ["--adapter", "lora_rite:rank=3"]
    train.main([*flags, "--out", "out/one"])
    source = "import sys, train; train.main(sys.argv[1:])"
    for done in run_two_processes(source, *flags, "--out", "out/two"):
        assert done.returncode == 0, done.stderr[-3000:]

    # the weights differ by much less than they have moved
    one = saved_weights("out/one")
    two = saved_weights("out/two")
    seed = train.load_checkpoint(Path("out/one"))["config"]["run"]["seed"]
    error = 0.0
    moved = 0.0
    for name in one:
        if "lora_" not in name:
            continue
        start = torch.zeros_like(one[name])
        if name.endswith("A"):
            start = lora.init_A(name, start.shape, seed)
        error = max(error, (one[name] - two[name]).abs().max().item())
        moved = max(moved, (one[name] - start).abs().max().item())
    assert error < 1e-3 * moved
