"""``fmeta optimizers``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fmeta import trees
from fmeta.optimizer import Optimizer

__all__ = ["list_optimizers"]


def list_optimizers() -> int:
    """Prints the table of all optimizers; gives the exit status."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fmeta.optimizers import BUILDERS

    table = Table("name", "learned", "arguments", "what it is")
    for name, builder in BUILDERS.items():
        parameters = inspect.signature(builder).parameters.values()
        arguments = ", ".join(str(p).split(":")[0] + _default(p) for p in parameters)
        summary = (inspect.getdoc(builder) or "").splitlines()[0]
        table.add_row(name, _learned(builder), arguments, escape(summary))
    Console().print(table)
    return 0


def _learned(builder: Callable[..., Optimizer]) -> str:
    """How many numbers meta-training would change; empty for a hand-made optimizer."""
    required = [p for p in inspect.signature(builder).parameters.values() if p.default is p.empty]
    if required:  # it is made for one tree of parameters
        return "one a parameter"
    count = sum(x.numel() for x in trees.leaves(builder().init()))
    return f"{count} weights" if count else ""


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={parameter.default!r}"
