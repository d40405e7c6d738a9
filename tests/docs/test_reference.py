"""The page docs/reference.md has every public name, and only names that are there."""

import importlib
import pkgutil
import re
from pathlib import Path

import fmeta

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
# The command line, whose reference is --help, and a helper of several modules.
ELSEWHERE = {"fmeta.cli.main", "fmeta.functional.moved"}


def resolved(name):
    """The object that a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError:  # a member of a class
        return getattr(resolved(module), attribute)


def documented():
    text = PAGE.read_text()
    names = re.findall(r"auto(?:function|class|exception|data):: (\S+)", text)
    found = {id(resolved(name)) for name in names}
    for name in re.findall(r"automodule:: (\S+)", text):
        module = importlib.import_module(name)
        found |= {id(getattr(module, member)) for member in module.__all__}
    return found


def public():
    """``(name, object)`` of the functions and classes that the packages export."""
    modules = [fmeta] + [
        importlib.import_module(f"fmeta.{m.name}")
        for m in pkgutil.iter_modules(fmeta.__path__)
        if not m.name.startswith("_")
    ]
    for module in modules:
        for name in module.__all__:
            found = getattr(module, name)
            if callable(found):
                yield f"{module.__name__}.{name}", found


def test_every_public_name_is_in_the_reference():
    known = documented()
    missing = {name for name, found in public() if id(found) not in known} - ELSEWHERE
    assert not missing, f"docs/reference.md has no {', '.join(sorted(missing))}"
