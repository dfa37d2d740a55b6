"""Adapted layers whose weight a model also uses directly are refused at the first forward pass."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from support import lora
from tests.test_lora_adapters import TwoLayers, adapted


class Model(TwoLayers):
    """a and b are called, and then `use` gets the model and the output."""

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x):
        return self.use(self, super().forward(x))


DIRECT_USES = {
    "linear": lambda model, x: F.linear(x, model.a.weight),
    "embedding": lambda model, x: F.embedding(torch.tensor([0, 2]), model.a.weight),
    "keyword": lambda model, x: F.linear(x, weight=model.a.weight),
    "transposed": lambda model, x: x @ model.a.weight.T,
    "data": lambda model, x: x @ model.a.weight.data,
    "concatenated": lambda model, x: F.linear(x, torch.cat([model.a.weight, model.b.weight])),
    "chunks": lambda model, x: F.linear(x, model.a.weight.chunk(2)[0]),
    "converted": lambda model, x: F.linear(x.double(), model.a.weight.to(torch.float64)),
    "in another layer": lambda model, x: Borrowing(model.a)(x),
}
OTHER_USES = {
    "again": lambda model, x: model.a(x),
    "keyword": lambda model, x: model.a(input=x),
    "dtype": lambda model, x: x.to(model.a.weight.dtype).to(model.a.weight.device),
    "like the weight": lambda model, x: x.to(model.a.weight).type_as(model.b.weight),
    "shape": lambda model, x: x.view(-1, model.a.weight.shape[1]) * model.a.weight.size(0),
    "bias": lambda model, x: x + model.a.bias,
    "no adapter": lambda model, x: F.linear(x, model.b.weight),
}


class Borrowing(nn.Module):
    """Uses the weight of another module."""

    def __init__(self, linear):
        super().__init__()
        self.borrowed = [linear]

    def forward(self, x):
        return F.linear(x, self.borrowed[0].weight)


class Casting(nn.Linear):
    """Uses its weight twice."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def is_active():
    return isinstance(_get_current_function_mode(), lora.DirectUses)


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("use", DIRECT_USES.values(), ids=DIRECT_USES)
def test_direct_uses_are_refused(use):
    model = lora.inject(Model(use), 2, targets=("a",))
    for _ in range(2):  # at the next pass, too
        with pytest.raises(ValueError, match="also uses the weight of its layer a directly"):
            model(torch.randn(3, 6))
        assert not is_active()
    lora.merge(model)
    assert n_hooks(model) == 0
    model(torch.randn(3, 6))


@pytest.mark.parametrize("use", OTHER_USES.values(), ids=OTHER_USES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "autocast"])
def test_other_uses_are_fine(use, dtype):
    model = lora.inject(Model(use), 2, targets=("a",))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        for one in (copy.deepcopy(model), model, model):
            one(torch.randn(3, 6))
            assert n_hooks(one) == 1, "only add_adapter should be left after the first pass"
            assert not is_active()


def test_attention_of_pytorch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    lora.inject(layer, 2, targets=("linear1", "linear2"))
    layer(torch.randn(1, 3, 8))
    assert n_hooks(layer) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def use(model, x):
        return checkpoint(model.a, x, use_reentrant=reentrant)

    models = [Model(use), Model(lambda model, x: model.a(x))]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 6, requires_grad=True)
    for model in models:
        nn.init.ones_(lora.inject(model, 2, targets=("a",)).a.lora_B)
        model(x).sum().backward()
    assert torch.allclose(models[0].a.lora_B.grad, models[1].a.lora_B.grad)


def test_a_layer_may_use_its_own_weight_in_any_way():
    model = TwoLayers()
    model.a = Casting(6, 6)
    lora.inject(model, 2, targets=("a",))
    model(torch.randn(3, 6))
    assert n_hooks(model) == 1


def test_a_first_pass_that_fails_is_not_the_first():
    def use(model, x):
        if len(x) == 3:
            raise KeyError("three")
        return F.linear(x, model.a.weight)

    model = lora.inject(Model(use), 2, targets=("a",))
    with pytest.raises(KeyError, match="three"):
        model(torch.randn(3, 6))
    assert not is_active()
    assert n_hooks(model) == 3, "add_adapter and both checks"
    with pytest.raises(ValueError, match="directly"):
        model(torch.randn(2, 6))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_are_not_searched(backend):
    """The functions of a graph are seen while it runs, but not the hooks of the layers in it."""
    for use in (lambda model, x: model.a(x), DIRECT_USES["linear"]):
        compiled = torch.compile(use, backend=backend, fullgraph=True)
        model = lora.inject(Model(compiled), 2, targets=("a",))
        model(torch.randn(3, 6))
        assert n_hooks(model) == 1

    # with a compiled module, the mode is not even entered: the module would be compiled twice
    model = adapted()
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    model.norm.register_forward_hook(lambda *_: modes.append(is_active()))
    modes = []
    model(torch.randint(64, (2, 9)))
    assert modes == [False]
