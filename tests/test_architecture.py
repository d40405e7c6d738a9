"""Imports go one way through the packages, as the picture of docs/architecture.md has it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fmeta"
# In the picture by the name that users know; each is a module with an underscore.
PRIVATE = {"scan": "_scan", "unroll": "_unroll"}


def picture():
    """Its stages from left to right, each a set of names of modules and packages."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    after = page.split("An arrow back is a design error.")[1]
    drawn = re.findall(r"```text\n(.*?)```", after, re.DOTALL)[0]
    stages = [{n.strip(" /\n") for n in stage.split(",")} for stage in drawn.split("→")]
    return [{PRIVATE.get(n, n) for n in stage} for stage in stages]


def imports():
    """By module or package right below `fmeta`: what it imports of the others, anywhere in it."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if importer.startswith("__"):
            continue
        into = found.setdefault(importer, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "fmeta":
                names = [f"fmeta.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            into |= {n.split(".")[1] for n in names if n.startswith("fmeta.")}
        into.discard(importer)
    return found


def test_the_picture_has_every_package():
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    missing = packages - set().union(*picture())
    assert not missing, f"docs/architecture.md does not say where {missing} stand"


def test_no_arrow_goes_back():
    place = {name: i for i, stage in enumerate(picture()) for name in stage}
    found = imports()
    assert set(place) <= set(found), "the picture has names that are not there"
    back = [
        f"{a} imports {b}"
        for a, into in found.items()
        for b in into
        if a in place and b in place and place[a] < place[b]
    ]
    assert not back, back
