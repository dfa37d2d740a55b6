"""The repository: who imports whom, importing does nothing, style, help, README, results."""

import ast
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize

import pytest

from tests.common import REPOSITORY, run_code, run_script

PAPERS = {"laser", "simplicial", "sonew", "lora_rite"}
SCRIPTS = ["train.py", "sample.py", "ttt_context.py", *(f"{name}.py" for name in sorted(PAPERS))]
for path in sorted(REPOSITORY.glob("experiments/*.py")):
    if "__main__" in path.read_text():
        SCRIPTS.append(f"experiments/{path.name}")
PYTHON_FILES = []
for pattern in ("*.py", "kernels/*.py", "support/*.py", "experiments/*.py", "tests/*.py"):
    PYTHON_FILES += sorted(REPOSITORY.glob(pattern))
SOURCE_FILES = [path for path in PYTHON_FILES if path.parent.name != "tests"]


# -- who imports whom ------------------------------------------------------------------------------

# file: (our modules it may import at the top, more that it may import inside functions)
ALLOWED = {
    "train": ({"support", "kernels.cross_entropy"}, {"sample"}),
    "sample": ({"train", "support", "kernels.decode"}, set()),
    "ttt_context": ({"train", "sample", "support", "kernels.ttt_context"}, {"experiments"}),
    "test_all": (set(), set()),
}
for name in PAPERS:
    own_kernels = {f"kernels.{name}", f"kernels.{name}_hopper", f"kernels.{name}_fused"}
    ALLOWED[name] = (own_kernels, {"experiments", "support"})


def our_modules(root):
    names = {path.stem for path in root.glob("*.py")}
    return names | {"kernels", "support", "experiments", "tests"}


def allowed_imports(path, root):
    """Return our modules that a file may import at the top, and more for inside functions."""
    folder = path.parent.name if path.parent != root else ""
    if folder == "kernels":
        family = path.stem.partition("_hopper")[0].partition("_fused")[0]
        siblings = {f"kernels.{p.stem}" for p in path.parent.glob(f"{family}*.py")}
        return siblings, set()
    if folder == "support":
        return {"support"}, set()
    if folder == "experiments":
        return our_modules(root) - {"tests"}, set()
    return ALLOWED.get(path.stem, (set(), set()))


def top_level_nodes(tree):
    """Return the ids of nodes that run on import; those below `if __name__ ...` do not."""
    nodes = set()
    for statement in tree.body:
        is_main = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
        is_block = isinstance(statement, (ast.Try, ast.If, ast.With, ast.For)) and not is_main
        if is_block or isinstance(statement, (ast.Assign, ast.Expr)):
            nodes.update(map(id, ast.walk(statement)))
        else:
            nodes.add(id(statement))
    return nodes


def imported_modules(tree, folder, known):
    """Yield (module, is at module level) for each import, also for import_module("module").

    If the name is computed, as in import_module("kernels." + name), each string of the file that
    names a module or folder of ours counts as imported.
    """
    top_level = top_level_nodes(tree)
    importers = {"import_module", "__import__", "find_spec", "run_module"}
    constants = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    strings = {text.rstrip(".") for text in constants if isinstance(text, str)}
    for node in ast.walk(tree):
        is_top = id(node) in top_level
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, is_top
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level > 0:  # from .module import name
                parent = f"{folder}.{parent}".strip(".")
            for alias in node.names:
                yield f"{parent}.{alias.name}".strip("."), is_top
                if alias.name in importers and alias.asname:
                    importers.add(alias.asname)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in importers:
            name = node.args[0] if node.args else node.keywords[0].value
            if isinstance(name, ast.Constant):
                yield str(name.value), is_top
                continue
            for text in strings & known:
                yield text, is_top


def forbidden_imports(path, root=REPOSITORY):
    """Return the modules of ours that a file imports and may not import."""
    at_top, in_functions = allowed_imports(path, root)
    folder = path.parent.name if path.parent != root else ""
    known = our_modules(root)
    wrong = []
    for module, is_top in imported_modules(ast.parse(path.read_text()), folder, known):
        if module.split(".")[0] not in known:
            continue
        allowed = at_top if is_top else at_top | in_functions
        is_allowed = [f"{module}.".startswith(f"{prefix}.") for prefix in allowed]
        if not any(is_allowed):
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda path: path.name)
def test_who_imports_whom(path):
    assert forbidden_imports(path) == []


@pytest.mark.parametrize(
    "code",
    [
        "import train",
        "def f():\n    from train import GPT",
        "from kernels import sonew",
        "try:\n    import kernels.sonew as kernel\nexcept ImportError:\n    pass",
        "import support.cli",  # allowed in functions only
        'import importlib\ndef f():\n    return importlib.import_module("train")',
        'from importlib import import_module as load\ndef f():\n    return load("train")',
        'def f():\n    return __import__("kernels.sonew")',
        'def f():\n    return __import__(name="train")',
        'import importlib\nmodule = importlib.import_module("support.cli")',
        'NAME = "train"\ndef f():\n    return __import__(NAME)',
        'def f(name):\n    return __import__("kernels." + name)',
        'def f(name):\n    return __import__(f"kernels.{name}")',
    ],
)
def test_imports_in_any_form_are_found(code, tmp_path):
    path = tmp_path / "laser.py"
    for name in ("train.py", "laser.py"):
        (tmp_path / name).touch()
    path.write_text(code)
    assert len(forbidden_imports(path, tmp_path)) == 1
    path.write_text("from kernels import laser\n\ndef f():\n    import support.cli, torch")
    assert forbidden_imports(path, tmp_path) == []


def test_train_names_no_paper():
    words = tokens_of(REPOSITORY / "train.py", tokenize.NAME)
    assert not (PAPERS | {"ttt_context"}) & {word for word, _ in words}


# -- importing and help ----------------------------------------------------------------------------


def test_importing_does_nothing():
    names = sorted(path.stem for path in REPOSITORY.glob("*.py"))
    check = """
assert not torch.cuda.is_initialized()
assert not {"matplotlib", "transformers", "jinja2", "requests"} & set(sys.modules)
"""
    for name in names:
        done = run_code(f"import sys, torch\nimport {name}\n{check}", cwd=REPOSITORY)
        assert (done.returncode, done.stdout + done.stderr) == (0, ""), name


def test_another_package_named_kernels_is_not_imported(tmp_path):
    """Without an __init__.py in ours, Python would import the package `kernels` of Hugging Face."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    for source in ("import train", "import laser"):
        done = run_code(source, env={"PYTHONPATH": str(tmp_path)}, cwd=REPOSITORY)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_help_fits_80_columns(tmp_path):
    for script in SCRIPTS:
        done = run_script(script, "--help", env={"COLUMNS": "80"}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) > 5, script
        assert lines[0].startswith(f"usage: {script.rpartition('/')[2]}"), script
        assert [line for line in lines if len(line) > 80] == [], script
        assert done.stderr == "", script
    assert list(tmp_path.iterdir()) == []


# -- style -----------------------------------------------------------------------------------------

# coinages of earlier versions, for which the field has words
COINAGES = """Behind FixedCache OnTheWay Recorded anew beside complain degrade foresees hollow
refusing remembered starts_of warn_slow whoami""".split()


def tokens_of(path, kind):
    """Yield (text, line number) of the tokens of one kind, such as names or comments."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == kind:
            yield token.string, token.start[0]


def test_no_coinages():
    found = []
    for path in PYTHON_FILES:
        for name, line in tokens_of(path, tokenize.NAME):
            if name in COINAGES:
                found.append(f"{path.relative_to(REPOSITORY)}:{line}: {name}")
    assert found == []


def test_ruff_is_content():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    for command in (["format", "--check"], ["check"]):
        argv = [sys.executable, "-m", "ruff", *command, "--no-cache", str(REPOSITORY)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_lines_have_at_most_100_columns():
    """Statements and function headers that end with `# fmt: skip` may have more."""
    wide = []
    for path in PYTHON_FILES:
        text = path.read_text()
        skip_lines = set()  # numbers of the lines with a comment "fmt: skip"
        for comment, number in tokens_of(path, tokenize.COMMENT):
            if "fmt: skip" in comment:
                skip_lines.add(number)

        # a statement is exempt if one of its lines is in skip_lines; of a function or loop,
        # the lines above its body count
        exempt = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.stmt):
                body = getattr(node, "body", None)
                last = body[0].lineno - 1 if body else node.end_lineno
                lines = set(range(node.lineno, max(last, node.lineno) + 1))
                if lines & skip_lines:
                    exempt |= lines

        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > 100 and number not in exempt:
                wide.append(f"{path.relative_to(REPOSITORY)}:{number}")
    assert wide == []


MAX_FUNCTION = 80  # lines of a function, its `def` included
MAX_TRAINING_FUNCTION = 110  # lines of train_in of train.py
MAX_TRAINING_LOOP = 45  # lines of the `while` in it


def too_long(path):
    """Return the functions of a file that are too long, and the training loop if it is."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        limit = MAX_FUNCTION
        if path.name == "train.py" and node.name == "train_in":
            limit = MAX_TRAINING_FUNCTION
            for child in ast.walk(node):
                if isinstance(child, ast.While) and n_lines(child) > MAX_TRAINING_LOOP:
                    found.append(f"loop of {node.name}")
        if n_lines(node) > limit:
            found.append(node.name)
    return found


def n_lines(node):
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda path: path.name)
def test_functions_are_short(path):
    assert too_long(path) == []


@pytest.mark.parametrize(
    "file,name,opening,most",
    [
        ("laser.py", "train_in", "def train_in():\n", MAX_FUNCTION),
        ("train.py", "main", "async def main():\n", MAX_FUNCTION),
        ("train.py", "train_in", "def train_in():\n", MAX_TRAINING_FUNCTION),
        ("train.py", "loop of train_in", "def train_in():\n while x:\n", MAX_TRAINING_LOOP + 1),
    ],
)
def test_long_functions_are_found(file, name, opening, most, tmp_path):
    n_opening = opening.count("\n")
    path = tmp_path / file
    path.write_text(opening + "  pass\n" * (most - n_opening))
    assert too_long(path) == []
    path.write_text(opening + "  pass\n" * (most - n_opening + 1))
    assert too_long(path) == [name]


def test_train_has_one_training_loop():
    tree = ast.parse((REPOSITORY / "train.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    nodes = ast.walk(functions["train_in"])
    loops = [node for node in nodes if isinstance(node, ast.While)]
    assert len(loops) == 1, "test_functions_are_short should measure one loop, the training loop"


# -- README, results, licence ----------------------------------------------------------------------


def readme():
    return (REPOSITORY / "README.md").read_text()


def test_readme_names_files_that_exist():
    targets = re.findall(r"\]\(([^)#\s]+)\)", readme())  # [text](target)
    links = [target for target in targets if "://" not in target]
    scripts = re.findall(r"python ([\w/]+\.py)", readme())
    assert links
    assert scripts
    for name in {*links, *scripts} - {"mine.py"}:  # mine.py is the reader's own plug-in
        assert (REPOSITORY / name).exists(), f"README.md names {name}"


def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install -r requirements-test.txt && python test_all.py"
    assert command in (REPOSITORY / ".ci/run").read_text().splitlines()
    assert command in readme().splitlines()


def test_no_result_is_without_provenance():
    """Each JSON of a study names the command, commit, versions and hardware that made it."""
    for path in sorted((REPOSITORY / "results").glob("*.json")):
        record = json.loads(path.read_text())
        for key in ("command", "commit", "versions", "hardware", "seconds"):
            assert key in record, f"{path.name} lacks {key}"


def test_the_repository_stands_alone():
    """No source file names a path outside the repository."""
    home_folders = "|".join(f"/{name}/" for name in ("home", "root"))
    pattern = re.compile(rf"\.\./shared|{home_folders}")
    for path in [*SOURCE_FILES, REPOSITORY / "README.md"]:
        assert not pattern.search(path.read_text()), path
    assert (REPOSITORY / "LICENSE").exists()
