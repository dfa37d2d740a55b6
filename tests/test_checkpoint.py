"""support/checkpoint.py: saved runs come back bit for bit, and what does not fit is refused."""

import copy
import os
import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import train
from support import checkpoint
from tests.common import fails, is_equal, refused

TRAIN = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 2 --eval-batches 1"
TRAIN = f"{TRAIN} --data text.txt --sample 0 --device cpu --steps 5 --stop-after 3".split()
RESUME = "--resume run --device cpu --sample 0".split()
INIT = "--init run --data text.txt --out new --device cpu --sample 0".split()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A checkpoint after 3 of 5 steps, and the text of its run."""
    folder = tmp_path_factory.mktemp("saved")
    before = os.getcwd()
    os.chdir(folder)
    try:
        Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
        train.main([*TRAIN, "--out", "run"])
    finally:
        os.chdir(before)
    return torch.load(folder / "run/ckpt.pt", weights_only=True)


@pytest.fixture
def saved(saved_run, tmp_path, monkeypatch):
    """A copy of it to be changed, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    return copy.deepcopy(saved_run)


def write(saved):
    torch.save(saved, "run/ckpt.pt")


# -- hostile checkpoints ---------------------------------------------------------------------------


class Code:
    """What a pickle can do when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch run_by_the_checkpoint",)


def change(path, value):
    """Return a function that sets a checkpoint's entry at "a/b/c"; the value `...` deletes it."""
    *keys, last = path.split("/")

    def apply(saved):
        for key in keys:
            saved = saved[key]
        if value is ...:
            del saved[last]
        else:
            saved[last] = value

    return apply


ONES = torch.ones(16)
WEIGHT = "model/norm.weight"
HUGE = torch.ones(1).expand(2**30)  # a few bytes in the file, 4 GiB when it is copied
REFUSED = {
    "code": (change("more", Code()), "damaged, or holds more than tensors"),
    "code in the config": (change("config/run/data", Code()), "damaged, or holds more"),
    "number": (change("more", 1 + 2j), "has a complex"),
    "set": (change("more", {1, 2}), "has a set"),
    "key": (change("more", {(1, torch.Size([1])): 1, 2j: 3}), "has a complex"),
    "no model": (change("model", ...), "lacks model"),
    "two lacking": (lambda c: (c.pop("step"), c.pop("tokenizer")), "lacks step, tokenizer"),
    "model": (change("model", None), "its model is no dict"),
    "optimizer": (change("optimizer", [1]), "its optimizer is no dict"),
    "config": (change("config", "x"), "its config is no dict"),
    "data": (change("data", "x"), "its data is no dict"),
    "run": (change("config/run", ...), "damaged"),
    "step text": (change("step", "3"), "its step is '3'"),
    "step below 0": (change("step", -1), "its step is -1"),
    "step yes": (change("step", True), "its step is True"),
    "weight text": (change(WEIGHT, "x"), "'norm.weight' is no weight"),
    "weight name": (lambda c: c["model"].update({3: ONES}), "3 is no weight"),
    "meta": (change(WEIGHT, torch.ones(16, device="meta")), "without values"),
    "sparse": (change(WEIGHT, ONES.to_sparse()), "sparse"),
    "csr": (change(WEIGHT, torch.eye(4).to_sparse_csr()), "sparse"),
    "nested": (change(WEIGHT, torch.nested.nested_tensor([ONES, ONES[:2]])), "nested"),
    "integers": (change(WEIGHT, ONES.int()), "norm.weight is torch.int32"),
    "complex": (change(WEIGHT, ONES * 1j), "norm.weight is torch.complex64"),
    "huge": (change(WEIGHT, HUGE), "more values than the file has"),
    "huge optimizer": (change("optimizer/more", [{"x": HUGE}]), "more values than the file has"),
    "one storage": (
        lambda c: [c["model"].update({f"a{i}": c["model"]["norm.weight"]}) for i in range(3000)],
        "more values than the file has",
    ),
    "old layout": (change("config/model/attn_args", {"x": 1}), "another version of fivefold"),
    "old LoRA": (change("config/run/lora_rank", 4), "another version of fivefold", "lora_rank"),
    "lacking": (change("config/model/rope_theta", ...), "another version", "rope_theta"),
    "type": (change("config/model/n_layer", "1"), "--n-layer is '1', not of type int"),
    "tensor": (change("config/run/lr", torch.ones(2, 2)), "--lr is tensor"),
    "layers": (change("config/model/n_layer", 12), "a larger model than it holds"),  # 11 tensors
    "width": (change("config/model/vocab_size", 2**23), "a larger model than it holds"),
    "range": (change("config/run/steps", 0), "--steps is 0"),
    "tokenizer": (change("tokenizer", {"name": "x"}), "damaged"),
    "tokenizer list": (change("tokenizer", [1]), "its tokenizer is no dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_checkpoint(saved, name):
    function, *parts = REFUSED[name]
    function(saved)
    write(saved)
    before = Path("run/ckpt.pt").read_bytes()
    refused(RESUME, "run/ckpt.pt cannot be used: ", *parts)
    refused(INIT, "run/ckpt.pt cannot be used", *parts)
    with pytest.raises(ValueError, match="run/ckpt.pt cannot be used"):
        train.load_model("run")
    assert sorted(os.listdir()) == ["run"] and os.listdir("run") == ["ckpt.pt"]
    assert Path("run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "tar"])
def test_damaged_checkpoint(saved, damage):
    write(saved)
    data = bytearray(Path("run/ckpt.pt").read_bytes())
    if damage == "flipped":
        data[100:2000] = random.Random(0).randbytes(1900)
    content = {"empty": b"", "cut": data[:-3000], "text": b"hello\n" * 99, "tar": b"\0" * 10240}
    Path("run/ckpt.pt").write_bytes(content.get(damage, data))
    refused(RESUME, "run/ckpt.pt cannot be used: it is damaged")


def test_storage_that_is_larger_than_the_file_says(saved):
    """The pickle in the file claims a storage of 2**40 values; the file has 16."""
    saved["model"]["norm.weight"] = torch.ones(12345)
    write(saved)
    data = Path("run/ckpt.pt").read_bytes()
    number = (12345).to_bytes(2, "little")
    assert data.count(b"M" + number) == 2  # pickled as BININT2: the storage's size, and the shape's
    larger = b"M" + (54321).to_bytes(2, "little")
    Path("run/ckpt.pt").write_bytes(data.replace(b"M" + number, larger))
    refused(RESUME, "run/ckpt.pt cannot be used")


def test_a_checkpoint_names_no_module_of_others(saved):
    Path("mine.py").write_text("raise SystemExit('it was imported')")
    for setting in ("attn", "adapter", "optim"):
        changed = copy.deepcopy(saved)
        changed["config"]["model" if setting == "attn" else "run"][setting] = "mine:x=1"
        write(changed)
        refused(RESUME, "the module 'mine', which is not part of this repository")
        if setting != "optim":
            with pytest.raises(ValueError, match="'mine', which is not part"):
                train.load_model("run")
            refused(INIT, "'mine', which is not part")
    # --init takes the weights, not the optimizer
    Path("text.txt").write_text("the quick brown fox" * 50)
    assert train.main([*INIT, "--stop-after", "1"])["step"] == 1


MISFITS = [
    ("norm.weight", ..., "lacks the tensor norm.weight"),
    ("norm.weight", torch.ones(7), "norm.weight is (7,), not (16,)"),
    ("embed_tokens.weight", torch.ones(16, 256), "embed_tokens.weight is (16, 256), not (256, 16)"),
]


@pytest.mark.parametrize("name, tensor, part", MISFITS, ids=["lacking", "short", "transposed"])
def test_weights_are_compared_before_memory_is_allocated(saved, name, tensor, part, monkeypatch):
    Path("text.txt").write_text("the quick brown fox" * 50)
    change(f"model/{name}", tensor)(saved)
    saved["config"]["run"]["data"] = os.path.abspath("text.txt")
    write(saved)

    def allocate(*_, **__):
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(nn.Module, "to_empty", allocate)
    monkeypatch.setattr(checkpoint, "check_unchanged", lambda *_: None)
    refused("run", part, main=train.load_model)
    refused(INIT, part)
    refused(RESUME, part)


def test_every_tensor_counts_for_the_size(saved):
    """All tensors together have at most twice the bytes of the file; the context may be long."""
    saved["config"]["model"]["block_size"] = 10**9
    write(saved)
    size = os.path.getsize("run/ckpt.pt")
    free = 2 * size - checkpoint.check_values(saved)
    for n_bytes, is_refused in ((free - 10_000, False), (free + 10_000, True)):
        write({**saved, "more": torch.ones(1).expand(n_bytes // 4)})
        if is_refused:
            with pytest.raises(ValueError, match="more values"):
                train.load_checkpoint("run")
        else:
            train.load_checkpoint("run")


# -- saving ----------------------------------------------------------------------------------------


def one_layer(*shapes):
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
    return model


def save(model, optimizer):
    Path("run").mkdir(exist_ok=True)
    checkpoint.save(Path("run"), model, optimizer, step=1)


def test_what_could_not_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = one_layer(3)
    for value in (lambda: 1, {1, 2}, torch.ones(3, device="meta")):
        optimizer = torch.optim.SGD([{"params": model.parameters(), "mine": value}])
        fails(save, model, optimizer, parts=["this run cannot be saved: it has a "])
        assert not os.listdir("run")
    size = torch.Size([1])  # a kind of tuple
    save(model, torch.optim.SGD([{"params": model.parameters(), "mine": size}]))
    assert checkpoint.check_values({"a": [torch.ones(3), (1, 2.0, "x", None, True)]}) == 12
    assert checkpoint.check_values({"a": torch.ones(3).double(), "b": torch.ones(3).half()}) == 30


# -- restoring the optimizer -----------------------------------------------------------------------


def step(model, optimizer, n=3):
    for _ in range(n):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return train.adamw([{"params": list(model.parameters()), "weight_decay": 0.1}], 0.1)


def sonew(model):
    from sonew import optimizer

    return optimizer([{"params": list(model.parameters()), "weight_decay": 0.1}], 0.1, band=2)


def lora_rite(model):
    from lora_rite import LoRARITE

    return LoRARITE([{"params": list(model.parameters()), "pair": True}], 0.1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adafactor(model):
    return torch.optim.Adafactor(model.parameters(), 0.1)


class Counting(torch.optim.SGD):
    """Keeps a number in its groups, and lists, numbers and texts in its state."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state["norms"] = [state.get("norms", [p.sum(), 0])[0] + p.norm(), group["count"]]
                state["name"] = "x"
                p.data.mul_(1 - 0.01 * state["norms"][0] / state["norms"][1])


def counting(model):
    return Counting([{"params": list(model.parameters()), "count": 0}], 0.1, momentum=0.9)


OPTIMIZERS = [adamw, sonew, lora_rite, sgd, adafactor, counting]


@pytest.mark.parametrize("make", OPTIMIZERS, ids=lambda make: make.__name__)
def test_optimizers_go_on_as_if_never_interrupted(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = one_layer((4, 6), (8, 4)) if make is lora_rite else one_layer((4, 6), (8, 4), (5,))
    optimizer = make(model)
    step(model, optimizer)
    checkpoint.save(Path("."), model, optimizer, step=3)
    torch.manual_seed(1)
    step(model, optimizer)

    torch.manual_seed(2)
    again = copy.deepcopy(model)
    for p in again.parameters():
        p.data.normal_()
    other = make(again)
    saved = torch.load("ckpt.pt", weights_only=True)
    checkpoint.restore(again, other, saved)
    assert all(p.grad is None for p in again.parameters())
    checkpoint.save(Path("."), again, other, step=3)
    assert is_equal(torch.load("ckpt.pt", weights_only=True), saved)
    torch.manual_seed(1)
    step(again, other)
    assert is_equal(model.state_dict(), again.state_dict())
    assert is_equal(optimizer.state_dict(), other.state_dict())


def test_a_run_stopped_before_its_first_step_has_no_state(saved):
    model = one_layer((4, 6))
    saved = {"step": 0, "model": model.state_dict(), "optimizer": adamw(model).state_dict()}
    again = one_layer((4, 6))
    checkpoint.restore(again, adamw(again), saved)
    assert is_equal(model.state_dict(), again.state_dict())


def test_parameters_without_a_gradient_have_no_state(tmp_path, monkeypatch):
    """As the projection of an input that an attention function ignores; SGD never has a state."""
    monkeypatch.chdir(tmp_path)

    def step_without_p1(model, optimizer):
        model.p0.grad, model.p2.grad = torch.ones(4, 6), torch.ones(5)
        optimizer.step()
        optimizer.zero_grad()

    for make in (adamw, lambda model: torch.optim.SGD(model.parameters(), 0.1)):
        model = one_layer((4, 6), (8, 4), (5,))
        optimizer = make(model)
        step_without_p1(model, optimizer)
        checkpoint.save(Path("."), model, optimizer, step=1)
        again = one_layer((4, 6), (8, 4), (5,))
        other = make(again)
        checkpoint.restore(again, other, torch.load("ckpt.pt", weights_only=True))
        assert again.p1 not in other.state
        for _ in range(2):
            step_without_p1(model, optimizer)
            step_without_p1(again, other)
        assert is_equal(model.state_dict(), again.state_dict())
        assert is_equal(optimizer.state_dict(), other.state_dict())


@contextmanager
def no_step_is_taken(optimizer):
    """At most the step that allocates the state is taken: on the file's a kernel might crash."""
    original = optimizer.step
    calls = []

    def counted_step(*arguments):
        calls.append(1)
        return original(*arguments)

    optimizer.step = counted_step
    yield
    assert len(calls) <= 1


def state_cases():
    shape = (4, 6)
    tensors = {
        "ones(3)": torch.ones(3),
        "transposed": torch.ones(6, 4),
        "more dimensions": torch.ones(1, 4, 6),
        "one number": torch.ones(()),
        "one row": torch.ones(6),
        "float64": torch.ones(shape).double(),
        "float16": torch.ones(shape).half(),
        "int": torch.ones(shape).int(),
        "empty": torch.ones(0),
        "text": "exp_avg",
        "nothing": None,
        "number": 1.0,
        "list": [1.0],
        "dict": {},
    }
    for name, value in tensors.items():
        yield f"exp_avg is {name}", lambda s, v=value: s["state"][0].update(exp_avg=v), "as exp_avg"
    steps = {"-1": torch.tensor(-1.0), "4": torch.tensor(4.0), "nan": torch.tensor(float("nan"))}
    for name, value in steps.items():
        yield f"step {name}", lambda s, v=value: s["state"][1].update(step=v), "has counted"
    for value in ("3", 3, None, torch.ones(1)):
        yield f"step is {value}", lambda s, v=value: s["state"][1].update(step=v), "as step"
    yield "no state", lambda s: s.update(state={}), "lacks the optimizer's state"
    yield "state None", lambda s: s.update(state=None), "malformed"
    yield "state text", lambda s: s.update(state="abc"), "lacks the optimizer's state"
    yield "one lacking", lambda s: s["state"].pop(1), "lacks the optimizer's state"
    yield "one too many", lambda s: s["state"].update({9: s["state"][0]}), "lacks"
    yield "few", lambda s: s["state"].update({1: {"step": 0}}), "differs in exp_avg, exp_avg_sq"
    yield "one None", lambda s: s["state"].update({1: None}), "NoneType as state of parameter 1"
    yield "lacking part", lambda s: s["state"][0].pop("exp_avg_sq"), "differs in exp_avg_sq"
    yield "unknown part", lambda s: s["state"][0].update(more=1), "differs in more"
    yield "no groups", lambda s: s.pop("param_groups"), "malformed"
    yield "groups text", lambda s: s.update(param_groups="a"), "malformed"
    yield "empty groups", lambda s: s.update(param_groups=[]), "another number of parameter groups"
    yield "all empty", lambda s: s.clear(), "malformed"


@pytest.mark.parametrize("case", list(state_cases()), ids=lambda case: case[0])
def test_optimizer_state_that_does_not_fit_is_refused(case):
    _, function, part = case
    model = one_layer((4, 6), (5,))
    optimizer = adamw(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = copy.deepcopy(saved)
    function(saved["optimizer"])
    again = one_layer((4, 6), (5,))
    other = adamw(again)
    with no_step_is_taken(other), pytest.raises(ValueError) as caught:
        checkpoint.restore(again, other, saved)
    message = str(caught.value)
    assert message.startswith("the checkpoint") and "\n" not in message and part in message, message


@pytest.mark.parametrize("make", [sonew, lora_rite, adafactor], ids=lambda make: make.__name__)
def test_state_of_other_shapes_is_compared_too(make):
    """Each tensor of each optimizer, with one value less."""
    model = one_layer((4, 6), (8, 4))
    optimizer = make(model)
    step(model, optimizer)
    names = optimizer.state_dict()["state"][0].keys()
    assert len(names) >= 2
    for name in names:
        saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved = copy.deepcopy(saved)
        value = saved["optimizer"]["state"][0][name]
        saved["optimizer"]["state"][0][name] = torch.ones(3, dtype=value.dtype)
        again = one_layer((4, 6), (8, 4))
        part = f"shape (3,) as {name} in the state of parameter 0"
        fails(checkpoint.restore, again, make(again), saved, parts=[part])


@pytest.mark.parametrize("layout", ["stride 0", "transposed", "sliced"])
def test_state_is_copied_into_contiguous_memory(layout):
    """Fused AdamW writes through raw pointers, whatever the strides are."""
    model = one_layer((4, 6))
    optimizer = adamw(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = copy.deepcopy(saved)
    values = {
        "stride 0": torch.full((1,), 0.5).expand(4, 6),
        "transposed": torch.rand(6, 4).T,
        "sliced": torch.rand(8, 12)[::2, ::2],
    }[layout]
    saved["optimizer"]["state"][0]["exp_avg"] = values
    again = one_layer((4, 6))
    other = adamw(again)
    checkpoint.restore(again, other, saved)
    restored = other.state[again.p0]["exp_avg"]
    assert torch.equal(restored, values) and restored.is_contiguous()
    assert restored.untyped_storage().nbytes() == 4 * 24
    step(again, other)


def test_numbers_of_a_group_are_restored_and_options_are_not():
    model = one_layer((4, 6))
    optimizer = counting(model)
    step(model, optimizer)
    saved = {"step": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved["optimizer"]["param_groups"][0].update(nesterov=True, maximize="yes", dampening=None)
    again = one_layer((4, 6))
    other = counting(again)
    checkpoint.restore(again, other, saved)
    group = other.param_groups[0]
    assert group["count"] == 3 and group["nesterov"] is False and group["maximize"] is False
    assert group["dampening"] == 0


# -- comparing settings ----------------------------------------------------------------------------


def test_settings_and_text_are_compared(saved):
    model_config = train.GPTConfig(**saved["config"]["model"])
    run_config = train.RunConfig(**saved["config"]["run"])
    configs = [model_config, run_config]
    checkpoint.check_unchanged(saved, configs, saved["data"], "run")
    run_config.eval_batches = 7  # adjustable
    checkpoint.check_unchanged(saved, configs, saved["data"], "run")
    with pytest.raises(ValueError, match="text has changed .* run began; --init run starts a new"):
        checkpoint.check_unchanged(saved, configs, {**saved["data"], "tokens": 3}, "run")
    model_config.n_head = 4
    with pytest.raises(ValueError, match="--n-head is 4 here but 2 in run; leave it out"):
        checkpoint.check_unchanged(saved, configs, saved["data"], "run")
    model_config.n_head = 2
    run_config.weight_decay = 0.2
    with pytest.raises(ValueError, match="--weight-decay is 0.2 here but 0.1 in run"):
        checkpoint.check_unchanged(saved, configs, saved["data"], "run")
