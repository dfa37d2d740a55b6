"""The house: who imports whom, importing does nothing, style, help, README, results."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common import REPOSITORY, run_script

PAPERS = {"laser", "simplicial", "sonew", "lora_rite"}
SCRIPTS = ["train.py", "sample.py", "ttt_context.py", *(f"{name}.py" for name in sorted(PAPERS))]
SCRIPTS += [f"experiments/{path.name}" for path in REPOSITORY.glob("experiments/bench_*.py")]

# file: what of ours it may import at the top, and inside functions in addition
ALLOWED = {
    "train": ({"support", "kernels.cross_entropy"}, {"sample"}),
    "sample": ({"train", "support", "kernels.decode"}, set()),
    "ttt_context": ({"train", "sample", "support", "kernels.ttt_context"}, {"experiments"}),
    "test_all": (set(), set()),
}
for name in PAPERS:
    own_kernels = {f"kernels.{name}", f"kernels.{name}_hopper", f"kernels.{name}_fused"}
    ALLOWED[name] = (own_kernels, {"experiments", "support"})


def imported_modules(tree):
    """Yield (module, is at module level) for imports and for importlib.import_module("name")."""
    top_level = set()
    for statement in tree.body:
        inner = [statement]
        is_main = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
        if isinstance(statement, (ast.Try, ast.If)) and not is_main:
            inner = list(ast.walk(statement))
        top_level.update(id(node) for node in inner)
    for node in ast.walk(tree):
        is_top = id(node) in top_level
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, is_top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", is_top
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function.endswith(("import_module", "__import__", "find_spec")):
                yield str(node.args[0].value), is_top


def our_modules():
    names = {path.stem for path in REPOSITORY.glob("*.py")}
    return names | {"kernels", "support", "experiments", "tests"}


def allowed_imports(path):
    """Return what of ours a file may import at the top, and inside functions."""
    folder = path.parent.name if path.parent != REPOSITORY else ""
    if folder == "kernels":
        family = path.stem.partition("_hopper")[0].partition("_fused")[0]
        siblings = {f"kernels.{p.stem}" for p in path.parent.glob(f"{family}*.py")}
        return siblings, set()
    if folder == "support":
        return {"support"}, set()
    if folder == "experiments":
        return our_modules() - {"tests"}, set()
    return ALLOWED[path.stem]


def forbidden_imports(path):
    at_top, in_functions = allowed_imports(path)
    wrong = []
    for module, is_top in imported_modules(ast.parse(path.read_text())):
        if module.split(".")[0] not in our_modules():
            continue
        allowed = at_top if is_top else at_top | in_functions
        if not any(module == a or module.startswith(f"{a}.") for a in allowed):
            wrong.append(module)
    return wrong


def source_files():
    patterns = ("*.py", "kernels/*.py", "support/*.py", "experiments/*.py")
    return [path for pattern in patterns for path in sorted(REPOSITORY.glob(pattern))]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.name)
def test_who_imports_whom(path):
    assert not forbidden_imports(path)


def test_the_import_test_follows_importlib(tmp_path):
    path = REPOSITORY / "laser.py"
    code = 'import importlib\n\ndef f():\n    return importlib.import_module("train")\n'
    modules = list(imported_modules(ast.parse(code)))
    assert ("train", False) in modules
    assert "train" not in allowed_imports(path)[0] | allowed_imports(path)[1]


@pytest.mark.parametrize("name", sorted(path.stem for path in REPOSITORY.glob("*.py")))
def test_importing_does_nothing(name):
    heavy = "{'matplotlib', 'transformers', 'jinja2', 'requests'}"
    code = f"import sys, {name}, torch\n"
    code += "assert not torch.cuda.is_initialized()\n"
    code += f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_80_columns(script, tmp_path):
    done = run_script(script, "--help", env={"COLUMNS": "80"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 80] == []
    assert list(tmp_path.iterdir()) == []


def test_ruff_is_content():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    for command in (["format", "--check"], ["check"]):
        argv = [sys.executable, "-m", "ruff", *command, "--no-cache", str(REPOSITORY)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def readme():
    return (REPOSITORY / "README.md").read_text()


def test_readme_names_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", readme()) if "://" not in link]
    scripts = re.findall(r"python ([\w/]+\.py)", readme())
    assert links and scripts
    mine = {"mine.py"}
    missing = [name for name in {*links, *scripts} - mine if not (REPOSITORY / name).exists()]
    assert missing == []


def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements-test.txt && python test_all.py"
    assert command in (REPOSITORY / ".ci/run").read_text().splitlines()
    assert command in readme().splitlines()


def test_no_result_is_without_provenance():
    """Each JSON of a study names the command, commit, versions and hardware that made it."""
    import json

    for path in sorted((REPOSITORY / "results").glob("*.json")):
        record = json.loads(path.read_text())
        for key in ("command", "commit", "versions", "hardware", "seconds"):
            assert key in record, f"{path.name} lacks {key}"


def test_the_repository_stands_alone():
    """Nothing outside the repository is needed or named."""
    home_folders = "|".join(f"/{name}/" for name in ("home", "root"))
    pattern = re.compile(rf"\.\./shared|{home_folders}")
    for path in [*source_files(), REPOSITORY / "README.md"]:
        assert not pattern.search(path.read_text()), path
    assert Path(REPOSITORY / "LICENSE").exists()
