"""``fmeta optimizers``."""

from __future__ import annotations

import inspect

__all__ = ["list_optimizers"]


def list_optimizers() -> int:
    """Prints the table of all optimizers; gives the exit status."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fmeta.optimizers import BUILDERS

    table = Table("name", "arguments", "what it is")
    for name, builder in BUILDERS.items():
        parameters = inspect.signature(builder).parameters.values()
        arguments = ", ".join(str(p).split(":")[0] + _default(p) for p in parameters)
        table.add_row(name, arguments, escape((inspect.getdoc(builder) or "").splitlines()[0]))
    Console().print(table)
    return 0


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={parameter.default!r}"
