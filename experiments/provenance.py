"""Where a result comes from: its command, hardware, versions, and the code that it depends on."""

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from support.files import write_json

REPOSITORY = Path(__file__).resolve().parent.parent
# These find the text, save, load, schedule and report. A change in them makes no result outdated:
# new runs record the SHA-256 of their text, and tests check that a run that was saved and resumed
# ends like an uninterrupted one, bit for bit.
WITHOUT_RESULTS = {
    "experiments/provenance.py",
    "experiments/runner.py",
    "support/checkpoint.py",
    "support/cli.py",
    "support/documents.py",
    "support/files.py",
    "support/hub.py",
    "support/run_folder.py",
    "support/runlog.py",
}


def source_files(*modules):
    """Return the paths of the modules of this repository that these import, directly or not.

    modules: names such as "experiments.laser"; others than ours are ignored.
    """
    paths = set()
    waiting = list(modules)
    while waiting:
        path = REPOSITORY / (waiting.pop().replace(".", "/") + ".py")
        if path.is_file() and path not in paths:
            paths.add(path)
            waiting += imported_modules(path)
    return sorted(paths)


def imported_modules(path):
    """Return the names that the import statements of a source file may mean.

    Those inside functions count in kernels/ only: elsewhere they serve what a script does at its
    end, such as showing a sample.
    """
    tree = ast.parse(path.read_bytes())
    if path.parent.name == "kernels":
        statements = list(ast.walk(tree))
    else:
        statements = list(tree.body)
        for statement in tree.body:
            if isinstance(statement, ast.Try):
                statements += statement.body
    names = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            names.append(statement.module)
            names += [f"{statement.module}.{alias.name}" for alias in statement.names]
    return names


def code_hash(path):
    """Return the hash of a source file."""
    return source_hash(path.read_bytes())


@functools.cache  # most results depend on the same files
def source_hash(source):
    """Return a hash of Python code that comments, docstrings and formatting do not change."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [statement for statement in node.body if not is_docstring(statement)]
    digest = hashlib.sha256()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            content = repr(node.value)
        else:
            content = [value for value in vars(node).values() if isinstance(value, str)]  # names
        digest.update(f"{type(node).__name__} {content}\n".encode())
    return digest.hexdigest()[:12]


def is_docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@functools.cache
def code_hashes(*modules):
    """Return {path: code_hash} of the modules' source files, relative to the repository.

    Those of WITHOUT_RESULTS are left out.
    """
    hashes = {}
    for path in source_files(*modules):
        name = str(path.relative_to(REPOSITORY))
        if name not in WITHOUT_RESULTS:
            hashes[name] = code_hash(path)
    return hashes


def plugin_modules(flags):
    """Return the names of the modules that --attn, --optim and --adapter name in the flags."""
    words = shlex.split(flags)
    modules = []
    for flag, value in zip(words, words[1:]):
        if flag in ("--attn", "--optim", "--adapter"):
            modules += [spec.partition(":")[0] for spec in value.split(",")]
    return modules


def provenance():
    """Return what produced a result: command, commit, hardware and versions.

    The command is that without --minutes, which only says when a part of the runs ended, and with
    FOLDER in place of absolute paths, which only exist on this machine.
    """
    script = os.path.relpath(os.path.realpath(sys.argv[0]), REPOSITORY)
    flags = [re.sub(r"^(--[\w-]+=)?/.*", r"\1FOLDER", flag) for flag in sys.argv[1:]]
    command = shlex.join(["python", script, *flags])
    command = re.sub(r" --minutes[ =]\S+", "", command)
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    return {"command": command, "commit": commit(), "hardware": hardware, "versions": versions}


def commit():
    """Return the git commit, with "-dirty" if Python files have changed since; None without git."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        diff = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True)
    except OSError:  # git is not installed
        return None
    suffix = "-dirty" if diff.returncode else ""
    return None if head.returncode else head.stdout.strip() + suffix


def save_json(path, record, source, *modules):
    """Write a result as JSON, with its provenance and the hashes of the code it depends on.

    source: the module that explains the result. modules: others whose code it depends on; those
    that a study's settings name as plug-ins are added. The record itself must contain "seconds".
    """
    for variant in record.get("variants", {}).values():
        if isinstance(variant["settings"], str):
            modules += tuple(plugin_modules(variant["settings"]))
    origin = {**provenance(), "source": source.replace(".", "/") + ".py"}
    write_json(path, {**origin, "code": code_hashes(source, *modules), **record})
