"""The study of SONew at a tiny size, with a few random digits in place of MNIST."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sonew
from experiments import mnist
from experiments import sonew as study
from tests.common import refused


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """Work in an empty folder, with a file like MNIST's, and a study of a second."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (40, 28, 28)).astype(np.uint8)
    np.savez("digits.npz", x_train=images[10:], x_test=images[:10])
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "BATCH", 8)
    monkeypatch.setattr(study, "WIDTHS", (784, 6, 3))
    return "digits.npz"


def test_study(digits, capsys, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", (1, 2, 3))
    record = sonew.main(["--mnist", digits, "--out", "shown"])
    assert {p.name for p in Path("shown").iterdir()} == {"sonew-cpu.json", "sonew-cpu.png"}
    for variant in record["variants"].values():
        assert [run["seed"] for run in variant["runs"]] == [1, 2, 3]
        assert all(math.isfinite(run["value"]) for run in variant["runs"])
        assert variant["runs"][0]["curve"][-1][0] == 4
    assert record["baseline"] == "Adam" and len(record["differences"]) == len(study.VARIANTS) - 1
    adam, ours = (record["variants"][n]["runs"] for n in ("Adam", "SONew, band 1"))
    mean = sum(a["value"] - b["value"] for a, b in zip(ours, adam, strict=True)) / 3
    assert abs(record["differences"]["SONew, band 1"]["mean"] - mean) < 1e-9

    logdet = record["logdet"]
    assert max(logdet["from_band"].values()) < 1e-9
    divergence = list(logdet["divergence"].values())
    assert all(x >= y - 1e-9 for x, y in zip(divergence, divergence[1:], strict=False))
    assert divergence[-1] >= 0
    assert "LogDet" in capsys.readouterr().out


def test_sweep(digits, monkeypatch):
    few = {name: study.VARIANTS[name] for name in ("SGD", "SONew, band 1")}
    monkeypatch.setattr(study, "VARIANTS", few)
    found = sonew.main(["--mnist", digits, "--out", "shown", "--sweep"])["train"]
    for rows in found.values():
        assert len(rows) == 12 and rows[0][2] == min(row[2] for row in rows)


def test_every_variant_has_the_same_tuning_budget():
    for name, variant in study.VARIANTS.items():
        assert len(variant.lrs) == 4 and len(variant.momentum_or_eps) == 3, name
        lr, momentum_or_eps = variant.best
        assert lr in variant.lrs and momentum_or_eps in variant.momentum_or_eps, name


def test_shuffled_pixels_are_trained_and_scored_on(digits):
    """The control equals band 1 on images whose pixels were shuffled before, test images too."""
    images = mnist.load_mnist(digits)
    setting = (0.1, 1e-6)
    control = study.train_variant("band 1, shuffled", setting, images, 1)
    shuffled = study.shuffle_pixels(images)
    expected = study.train_variant("SONew, band 1", setting, shuffled, 1)
    unshuffled = study.train_variant("SONew, band 1", setting, images, 1)
    for name in ("value", "train"):
        assert control[name] == expected[name] != unshuffled[name]
    for x, y in zip(images, shuffled, strict=True):
        assert x.shape == y.shape and not torch.equal(x, y)
        assert torch.equal(x.sort(1).values, y.sort(1).values), "the same pixels of each image"
    order = [torch.arange(784.0)[None]] * 2
    train_order, test_order = study.shuffle_pixels(order)
    assert torch.equal(train_order, test_order), "both in the same order"


def test_learning_rate_and_scores(digits, monkeypatch):
    monkeypatch.setattr(study, "STEPS", 100)
    rates = [study.get_lr(step, 2.0) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0 and abs(rates[99] - 2 / 90) < 1e-12
    assert all(a <= b for a, b in zip(rates[:10], rates[1:10], strict=False))

    x = torch.rand(3, 784)
    logits = torch.randn(3, 784)
    p = logits.sigmoid()
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum(1).mean()
    assert torch.allclose(study.cross_entropy(logits, x), expected)

    net = study.autoencoder((784, 6, 3), 0)
    kinds = [type(layer).__name__ for layer in net]
    assert kinds == ["Linear", "Tanh", "Linear", "Linear", "Tanh", "Linear"]
    assert [tuple(p.shape) for p in net.parameters() if p.dim() > 1] == [
        (6, 784),
        (3, 6),
        (6, 3),
        (784, 6),
    ]


def test_without_its_data(digits, monkeypatch):
    content = None

    def urlopen(url, timeout):
        if content is None:
            raise OSError("no network")
        return open(content, "rb")

    monkeypatch.setattr(mnist.urllib.request, "urlopen", urlopen)
    refused([], "cannot be fetched", "--mnist FILE.npz", main=sonew.main)
    Path("text.txt").write_text("not MNIST")
    content = "text.txt"  # the checksum is another
    refused([], "cannot be fetched", main=sonew.main)
    assert not Path("out").exists()

    checksum = mnist.hashlib.sha256(Path(digits).read_bytes()).hexdigest()
    monkeypatch.setattr(mnist, "SHA256", checksum)
    content = digits
    assert mnist.load_mnist()[0].shape == (30, 784)
    assert Path("out/mnist.npz").read_bytes() == Path(digits).read_bytes()
    refused(["--mnist", "text.txt"], "text.txt is not MNIST", main=sonew.main)
    refused(["--mnist", "nowhere.npz"], "nowhere.npz", main=sonew.main)
    np.savez("other.npz", x=np.zeros(3))
    refused(["--mnist", "other.npz"], "other.npz is not MNIST", main=sonew.main)
    refused(["--full"], "--full", main=sonew.main)
    refused(["--out", "text.txt"], "cannot write in text.txt", main=sonew.main)
