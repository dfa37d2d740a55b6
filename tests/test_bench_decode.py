"""experiments/bench_decode.py at tiny sizes."""

import json
from pathlib import Path

import pytest

import train
from experiments import bench_decode
from tests.common import gpu, refused

ATOM = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_kv_head": 1, "vocab_size": 64}


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS, "atom", ATOM)
    monkeypatch.setattr(bench_decode, "copy_bandwidth", lambda device: 1e9)
    return "--shapes atom --device cpu --tokens 4 --prompt-tokens 6".split()


def test_figures(flags):
    record = bench_decode.main([*flags, "--out", "new"])
    saved = json.loads(Path("new/bench_decode.json").read_text())
    assert saved["models"] == record["models"]
    assert {"command", "commit", "versions", "hardware", "seconds"} <= saved.keys()
    figures = record["models"]["atom"]
    n_kv = 2 * 16 * (6 + 2)  # k and v of one head of 16, of the tokens before the middle one
    assert figures["bytes_per_token"] == 4 * (figures["parameters"] + n_kv)
    assert figures["floor_ms"] == pytest.approx(figures["bytes_per_token"] / 1e6)
    for variant in ("eager", "graph"):
        row = figures[variant]
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["token_ms"])
        assert row["prompt_tokens_per_s"] == pytest.approx(6e3 / row["prompt_ms"])
        assert row["share_of_floor"] == pytest.approx(figures["floor_ms"] / row["token_ms"])
    assert "compiled" not in figures


def test_folders(flags, tiny):
    untied = [*tiny, "--no-tied", "--steps", "1", "--sample", "0", "--out", "out/untied"]
    train.main(untied)
    figures = bench_decode.main([*flags, "--init", "out/untied", "--tokens", "2"])
    figures = figures["models"]["out/untied"]
    n_kv = 2 * 2 * 2 * 16 * (6 + 1)  # k and v of two layers with two heads of 16
    n_embedding = 256 * 32
    parameters_read = figures["parameters"] - n_embedding
    assert figures["bytes_per_token"] == 4 * (parameters_read + n_kv)
    train.main([*untied, "--attn", "laser", "--out", "out/laser"])
    record = bench_decode.main([*flags, "--init", "out/laser", "--tokens", "2"])
    assert "graph" not in record["models"]["out/laser"]


def test_refusals(flags):
    long = [*flags, "--prompt-tokens", "248"]
    refused(long, "--prompt-tokens 248", "the context of 256", main=bench_decode.main)
    refused([*flags, "--shapes", "gpt9"], "gpt9", main=bench_decode.main)
    refused([*flags, "--tokens", "0"], "at least 1", main=bench_decode.main)
    Path("file").write_text("")
    refused([*flags, "--out", "file"], "cannot write in file", main=bench_decode.main)


@gpu
def test_figures_on_the_gpu(tmp_path, monkeypatch):
    shape = {"n_layer": 2, "n_embd": 256, "n_head": 4, "vocab_size": 1024}
    monkeypatch.setitem(train.PRESETS, "atom", shape)
    flags = "--shapes atom --tokens 20 --prompt-tokens 30 --compile --out".split()
    record = bench_decode.main([*flags, str(tmp_path)])
    figures = record["models"]["atom"]
    assert record["dtype"] == "bf16"
    for variant in bench_decode.VARIANTS:
        assert figures[variant]["tokens_per_s"] > 0
    assert figures["graph"]["token_ms"] < figures["eager"]["token_ms"]
    assert figures["compiled"]["token_ms"] < figures["eager"]["token_ms"]
