"""Every example in a docstring of the package gives what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import fmeta

MODULES = ["fmeta"] + [
    m.name
    for m in pkgutil.walk_packages(fmeta.__path__, "fmeta.")
    if not m.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
