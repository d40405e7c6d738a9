"""The package as it is installed and the repository as it is laid out."""

import ast
import importlib.metadata
import importlib.resources
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fmeta

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fmeta"
MAIN_COMMAND = "python -m pip install -e . && fmeta train"
TEST_COMMAND = "python -m pip install -e '.[test]' && python -m pytest"
TOP_LEVEL = {
    ".ci", ".gitignore", "README.md", "benchmarks", "docs", "fmeta", "pyproject.toml", "tests",
}  # fmt: skip


def test_version_stands_in_one_place():
    assert importlib.metadata.version("fmeta") == fmeta.__version__
    assert "version" not in re.findall(r"(?m)^(\w+) =", (ROOT / "pyproject.toml").read_text())


def test_licence_and_type_marker_are_inside_the_package():
    package = importlib.resources.files("fmeta")
    assert package.joinpath("py.typed").is_file()
    licence = package.joinpath("LICENSE").read_text()
    assert "Apache License" in licence
    assert "Copyright 2026 the fmeta authors" in licence
    assert importlib.metadata.metadata("fmeta")["License-Expression"] == "Apache-2.0"


def test_readme_has_exactly_two_set_up_commands():
    text = (ROOT / "README.md").read_text()
    assert [line for line in text.splitlines() if "pip install" in line] == [
        MAIN_COMMAND,
        TEST_COMMAND,
    ]
    for command in (MAIN_COMMAND, TEST_COMMAND):
        assert f"```bash\n{command}\n```" in text, f"{command!r} needs a code block of its own"


def test_continuous_integration_pins_torch():
    lines = (ROOT / ".ci" / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in lines


def test_top_level_of_the_repository():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    names = {path.split("/")[0] for path in listing.stdout.split("\0") if path}
    assert names <= TOP_LEVEL, f"unexpected at the top level: {sorted(names - TOP_LEVEL)}"


def test_nothing_is_pickled():
    """Files are safetensors and JSON: loading one must never run code.

    Networks of others may come as state dicts of torch: of those only tensors are read.
    """
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name in _dotted_names(_without_tensor_loads(ast.parse(path.read_text())))
        if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}
        or name in {"torch.load", "torch.save"}
    ]
    assert not found, "\n".join(found)


def _without_tensor_loads(tree):
    """Forgets the names of calls ``torch.load(..., weights_only=True)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only"]
            if safe and isinstance(safe[0].value, ast.Constant) and safe[0].value.value is True:
                node.func = ast.Name("load")
    return tree


def _dotted_names(tree):
    """(line, name) of every import and of every attribute of a plain name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module or ''}.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


IMPORT_PROBE = """
import random, sys
import numpy, torch
def states():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
before, threads, dtype = states(), torch.get_num_threads(), torch.get_default_dtype()
import fmeta
assert states() == before, "a global generator was drawn from or seeded"
assert torch.get_num_threads() == threads, "the number of threads was changed"
assert torch.get_default_dtype() == dtype, "the default dtype was changed"
print(*sorted({"matplotlib", "rich", "sklearn", "tyro"} & set(sys.modules)))
"""


def test_import_is_light_and_leaves_global_state_alone():
    """Data, figures and the command line are edges, loaded when used."""
    probe = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_PROBE], capture_output=True, text=True
    )
    assert probe.returncode == 0, probe.stderr
    assert probe.stdout.split() == [], f"import fmeta also imports {probe.stdout.strip()}"
