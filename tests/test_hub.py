"""support/hub.py: --init ORG/NAME, without a network: snapshot_download is replaced."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

import sample
import train
from support import hub, run_folder
from tests.common import fails, refused, run_script
from tests.hf import hf  # noqa: F401

NAME = "some-org/Tiny-1.5B"


@pytest.fixture(autouse=True)
def nothing_fetched():
    hub.fetch.cache_clear()


@pytest.fixture
def cache(hf, monkeypatch):  # noqa: F811
    """Put a tiny model where huggingface_hub would; return its folder and the list of downloads."""
    root = Path("cache/models--some-org--Tiny-1.5B").absolute()
    folder = root / "snapshots/0123abc"
    folder.mkdir(parents=True)
    shutil.move(hf(), root / "blobs")
    for path in (root / "blobs").iterdir():
        (folder / path.name).symlink_to(path)
    downloads = []

    def snapshot_download(name, **options):
        downloads.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder, downloads


@pytest.mark.parametrize("name", ["a/b", "Qwen/Qwen3-0.6B", "a/b_c.d-e"])
def test_names_of_models(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_model_name(name)
    Path(name).parent.mkdir()
    assert not hub.is_model_name(name), "where a folder a/ exists, a/b should be a path"


@pytest.mark.parametrize(
    "name", ["newest", "a", "a/b/c", "./a", "../a", "/a", "a/", "~/a", "a/.b", "a b/c", "\xe9/a"]
)
def test_names_of_folders(name):
    assert not hub.is_model_name(name)


def test_train_and_sample_take_a_name(cache):
    folder, downloads = cache
    Path("text.txt").write_text("seven wizards boil over the brown fox " * 100)
    flags = "--data text.txt --block-size 16 --batch-size 2 --steps 1 --eval-batches 1 --sample 5"
    result = train.main([*flags.split(), "--init", NAME, "--device", "cpu"])
    assert result["out"] == "out/Tiny-1.5B", "the run should be named after the model"
    text = sample.main(["--init", NAME, "--chat", "Hi", "--max-tokens", "3", "--device", "cpu"])
    assert text["tokens_per_s"] > 0
    assert train.load_model(folder)[1].name == "Tiny-1.5B"
    assert len(downloads) == 1, "training and sampling in one process should download once"
    refused(["--resume", NAME], "holds no run")
    assert len(downloads) == 1, "--resume takes runs, so it should not download a model"


def test_a_local_folder_wins(cache):
    folder, downloads = cache
    shutil.copytree(folder, NAME)
    assert run_folder.find_run(NAME) == Path(NAME)
    assert hub.model_name(NAME) == "Tiny-1.5B"
    assert downloads == []


def test_only_needed_files_are_fetched(cache):
    _, downloads = cache
    hub.fetch(NAME)
    ((name, options),) = downloads
    assert name == NAME
    needed = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    others = [
        ".gitattributes",
        "README.md",
        "evil.py",
        "onnx/model.onnx",
        "original/model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "vocab.json",
    ]
    assert list(filter_repo_objects([*needed, *others], **options)) == needed


REFUSALS = [
    (errors.GatedRepoError, ["is gated", f"https://huggingface.co/{NAME}", "hf auth login"]),
    (errors.RepositoryNotFoundError, ["neither a folder", "nor a public model", "check the name"]),
    (errors.LocalEntryNotFoundError, ["local cache", "cannot be reached"]),
    (errors.HFValidationError, ["cannot be fetched from huggingface.co (the server said no)"]),
    (PermissionError, ["(the server said no)"]),
    (RuntimeError, ["(the server said no)"]),
]


@pytest.mark.parametrize("kind, parts", REFUSALS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_fetched_is_refused_in_a_sentence(kind, parts, monkeypatch, tmp_path):
    def snapshot_download(name, **options):
        error = kind.__new__(kind)  # without __init__, which may ask for the server's answer
        error.args = ("the server said no\nat length",)
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    fails(run_folder.find_run, NAME, parts=[NAME, *parts])


def test_offline_with_a_filled_cache(cache):
    folder, _ = cache
    root = folder.parent.parent
    (root / "refs").mkdir()
    (root / "refs/main").write_text(folder.name)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root.parent)}
    done = run_script("sample.py", "--init", NAME, "--max-tokens", "3", env=offline)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(str(folder))


def test_offline_with_an_empty_cache(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_script("sample.py", "--init", NAME, env=offline, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"sample.py: {NAME} is neither a folder here nor in the local cache, and HF_HUB_OFFLINE is "
        f"set; give a folder, or try again with a network\n"
    )
    assert list(tmp_path.iterdir()) == []
