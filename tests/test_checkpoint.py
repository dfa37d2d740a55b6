"""support/checkpoint.py: saved runs come back bit for bit, and what does not fit is refused."""

import copy
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import train
from support import checkpoint
from tests.common import fails, refused, without_rights

TRAIN = "--n-layer 1 --n-embd 16 --n-head 2 --block-size 8 --batch-size 2 --eval-batches 1"
TRAIN = f"{TRAIN} --data text.txt --sample 0 --device cpu --steps 5 --stop-after 3".split()
RESUME = "--resume run --device cpu --sample 0".split()
INIT = "--init run --data text.txt --out new --device cpu --sample 0".split()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """Return a checkpoint after 3 of 5 steps."""
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
    """Return a copy of the checkpoint, for the test to change; work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    return copy.deepcopy(saved_run)


def write(saved):
    torch.save(saved, "run/ckpt.pt")


# -- hostile checkpoints ---------------------------------------------------------------------------


class Code:
    """A malicious object: to load its pickle runs a command."""

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
EMBEDDING = "embed_tokens.weight"
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
    "float8": (change(WEIGHT, ONES.to(torch.float8_e4m3fn)), "norm.weight is torch.float8_e4m3fn"),
    "complex": (change(WEIGHT, ONES * 1j), "norm.weight is torch.complex64"),
    "huge": (change(WEIGHT, HUGE), "more values than the file has"),
    "huge optimizer": (change("optimizer/more", [{"x": HUGE}]), "more values than the file has"),
    "one storage": (
        lambda c: c["model"].update({f"a{i}": c["model"][EMBEDDING] for i in range(60)}),
        "more values than the file has",
    ),
    "old layout": (change("config/model/attn_args", {"x": 1}), "another version of fivefold"),
    "old LoRA": (change("config/run/lora_rank", 4), "another version of fivefold", "lora_rank"),
    "lacking": (change("config/model/rope_theta", ...), "another version", "rope_theta"),
    "type": (change("config/model/n_layer", "1"), "--n-layer is '1', not of type int"),
    "tensor": (change("config/run/lr", torch.ones(2, 2)), "--lr is tensor"),
    "data's tensor": (change("data/sha256", torch.ones(2)), "its data has a tensor"),
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
    assert sorted(os.listdir()) == ["run"]
    assert os.listdir("run") == ["ckpt.pt"]
    assert Path("run/ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped", "tar"])
def test_damaged_checkpoint(saved, damage):
    write(saved)
    data = Path("run/ckpt.pt").read_bytes()
    noise = random.Random(0).randbytes(1900)
    contents = {"empty": b"", "cut": data[:-3000], "text": b"hello\n" * 99, "tar": b"\0" * 10240}
    contents["flipped"] = data[:100] + noise + data[2000:]
    Path("run/ckpt.pt").write_bytes(contents[damage])
    refused(RESUME, "run/ckpt.pt cannot be used: it is damaged")


def test_a_checkpoint_without_permission(saved):
    write(saved)
    os.chmod("run/ckpt.pt", 0)
    with without_rights():
        refused("run", "cannot read run/ckpt.pt (Permission denied)", main=train.load_model)


def test_storage_that_is_larger_than_the_file_says(saved):
    """The pickle in the file claims a storage of 54321 values; the file has 12345."""
    saved["model"]["norm.weight"] = torch.ones(12345)
    write(saved)
    number = b"M" + (12345).to_bytes(2, "little")  # pickle's opcode BININT2
    larger = b"M" + (54321).to_bytes(2, "little")
    with zipfile.ZipFile("run/ckpt.pt") as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile("run/ckpt.pt", "w") as archive:
        for name, data in files.items():
            if name.endswith("data.pkl"):
                assert data.count(number) == 2, "as storage size and as shape"
                data = data.replace(number, larger)
            archive.writestr(name, data)
    message = refused(RESUME, "run/ckpt.pt cannot be used")
    assert "checksum" not in message


def test_weights_that_are_damaged_on_the_disk(saved):
    """A mapped file is not compared with the checksums in it, so we do that ourselves."""
    weights = torch.randn(64, 32)
    saved["model"]["embed_tokens.weight"] = weights
    write(saved)
    data = Path("run/ckpt.pt").read_bytes()
    start = data.index(weights.numpy().tobytes())
    Path("run/ckpt.pt").write_bytes(data[:start] + bytes(99) + data[start + 99 :])
    refused(RESUME, "run/ckpt.pt cannot be used: it is damaged", "does not match its checksum")
    with pytest.raises(ValueError, match="checksum"):
        train.load_model("run")


def test_a_compressed_checkpoint_is_refused(saved):
    """A small file could hold more than there is time to read."""
    write(saved)
    with zipfile.ZipFile("run/ckpt.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10**7))
    refused(RESUME, "run/ckpt.pt cannot be used: it describes more than it holds")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(saved, value):
    """On a CPU, attention gives finite numbers even for queries that are NaN."""
    name = "layers.0.self_attn.q_proj.weight"
    saved["model"][name][1, 2] = value
    write(saved)
    expected = f"{name} has values that are infinite or NaN"
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    refused(RESUME, expected)
    refused([*INIT, "--eval-only"], expected)
    with pytest.raises(ValueError, match="infinite or NaN"):
        train.load_model("run")


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

    # the last checkpoint names a foreign optimizer, which --init does not use
    Path("text.txt").write_text("the quick brown fox" * 50)
    assert train.main([*INIT, "--stop-after", "1"])["step"] == 1


MISFITS = [
    ("norm.weight", ..., "lacks the tensor norm.weight"),
    ("norm.weight", torch.ones(7), "norm.weight is (7,), not (16,)"),
    (EMBEDDING, torch.ones(16, 256), "embed_tokens.weight is (16, 256), not (256, 16)"),
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
    """All tensors together may have twice the bytes of the file; a long context costs nothing."""
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
    """Return a module with a random parameter of each shape."""
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
    save(model, torch.optim.SGD([{"params": model.parameters(), "mine": torch.Size([1])}]))

    # check_values counts the bytes of tensors: 3 * 4, and 3 * 8 + 3 * 2
    assert checkpoint.check_values({"a": [torch.ones(3), (1, 2.0, "x", None, True)]}) == 12
    assert checkpoint.check_values({"a": torch.ones(3).double(), "b": torch.ones(3).half()}) == 30


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
