"""support/plugins.py: specs become functions and options; checkpoints import nothing foreign."""

import sys

import pytest

import train
from support import plugins
from tests.common import refused

MINE = """
import torch
import train

number = 3

def attention(q, k, v, *, sharp: float = 1.0, reach: int = 7, kind="a", soft=True, table=None):
    '''Softmax with a factor.'''
    return train.softmax_attention(q * sharp, k, v)

attention.windows = {"k": "reach", "v": "reach"}

def optimizer(groups, lr, *, nesterov=False, momentum=0.5):
    if momentum > 1:
        raise ValueError("momentum is above 1")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A reader's own module, mine.py, on the path."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield
    sys.modules.pop("mine", None)


def test_spec_gives_a_function_and_all_its_options(mine):
    function, options = plugins.resolve("mine:sharp=2:soft=false:kind=b", "attention")
    assert function.__doc__ == "Softmax with a factor."
    assert options == {"sharp": 2.0, "reach": 7, "kind": "b", "soft": False}
    assert plugins.signature(function)[0] == ["q", "k", "v"]
    builtin = {"softmax": train.softmax_attention}
    assert plugins.resolve("softmax", "attention", builtin) == (train.softmax_attention, {})


@pytest.mark.parametrize(
    "text, value",
    [("true", True), ("True", True), ("1", True), ("false", False), ("FALSE", False), ("0", False)],
)
def test_spec_gives_true_or_false(mine, text, value):
    assert plugins.resolve(f"mine:soft={text}", "attention")[1]["soft"] is value


@pytest.mark.parametrize(
    "spec, parts",
    [
        ("mine:blunt=1", ["no option 'blunt'", "sharp=1.0, reach=7, kind=a, soft=True"]),
        ("mine:sharp", ["option=value", "'sharp'"]),
        ("mine:sharp=", ["option=value"]),
        ("mine:sharp=1:sharp=2", ["sharp twice"]),
        ("mine:sharp=x", ["mine:sharp is 'x', not of type float"]),
        ("mine:reach=1.5", ["not of type int"]),
        ("mine:soft=maybe", ["true or false"]),
        ("mine:table=3", ["no option 'table'"]),
        ("softmax:x=1", ["no option 'x'", "none"]),
        ("nix", ["no module 'nix' with a function attention; give softmax, laser, simplicial, or"]),
        ("os", ["no module 'os'"]),
        ("os.path", ["no module 'os.path'"]),
        ("", ["no module ''"]),
    ],
)
def test_specs_that_are_wrong_teach_what_is_right(mine, spec, parts):
    with pytest.raises(ValueError) as error:
        plugins.resolve(spec, "attention", {"softmax": train.softmax_attention})
    for part in parts:
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no module 'mine' with a function number"):
        plugins.resolve("mine", "number")


def test_errors_list_the_modules_that_are_there(tmp_path, monkeypatch):
    for function_name, modules in (("optimizer", "lora_rite, sonew"), ("adapt", "lora_rite")):
        with pytest.raises(ValueError, match=f"; give {modules}, or the name of one of yours"):
            plugins.resolve("nix", function_name)

    # they are read and not imported, so that a broken one does no harm
    monkeypatch.setattr(plugins, "REPOSITORY", tmp_path)
    (tmp_path / "broken.py").write_bytes(b"\xff\ndef attention(:\n")
    (tmp_path / ".#train.py").symlink_to("nowhere")  # an editor's
    (tmp_path / "other.py").write_text("def attention_torch():\n    def attention():\n        0")
    with pytest.raises(ValueError, match="; give broken, or the name of one of yours"):
        plugins.resolve("nix", "attention")


def test_an_option_without_a_default_is_refused():
    def attention(q, k, v, *, reach):
        return q

    with pytest.raises(ValueError, match="attention has no default for reach"):
        plugins.signature(attention)


def test_errors_in_a_readers_module_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import no_such_module_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        plugins.resolve("broken_module", "attention")


def test_help_of_a_module(mine, capsys):
    for argv in (["--attn", "mine:help"], ["--attn", "softmax,mine:help"]):
        with pytest.raises(SystemExit) as end:
            train.main(argv)
        words = capsys.readouterr().out
        assert end.value.code == 0
        assert "  sharp=1.0\n  reach=7\n" in words and "Softmax with a factor." in words
    with pytest.raises(SystemExit):
        train.main(["--optim", "adamw:help"])
    assert "beta2=0.95" in capsys.readouterr().out
    refused(["--optim", "nix:help"], "no module 'nix' with a function optimizer")


@pytest.mark.parametrize("flag", ["attn", "optim", "adapter"])
def test_unknown_modules_are_refused_before_the_data_is_read(flag):
    refused([f"--{flag}", "nix", "--data", "nowhere"], "no module 'nix'")
    option = {"attn": "softmax:nix=1", "optim": "adamw:nix=1", "adapter": "lora_rite:nix=1"}[flag]
    refused([f"--{flag}", option, "--data", "nowhere"], "has no option 'nix'")


def test_checkpoints_name_modules_of_this_repository_alone():
    builtin = {"softmax": None}
    plugins.check_own("softmax,laser,simplicial:w1=2", builtin)
    plugins.check_own("", builtin)
    for specs in ("os", "softmax,mine:x=1", "conftest", "tests.common"):
        with pytest.raises(ValueError, match="not part of this repository"):
            plugins.check_own(specs, builtin)
