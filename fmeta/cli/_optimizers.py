"""``fmeta optimizers``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from fmeta import trees
from fmeta.optimizer import Optimizer

__all__ = ["OptimizersConfig", "run_optimizers"]

_SIDE = 1024  # of the matrix whose hidden state is counted
_SOURCE = 90  # characters of a source
_SHORT = 40  # and where lines are short, without titles
_WIDE = 110  # characters of a line that hold the summaries too


@dataclass(frozen=True)
class OptimizersConfig:
    """What to list."""

    names: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME ...]")] = ()
    """Print all about these: arguments, formulas, state. Default: one line for each rule."""


def run_optimizers(config: OptimizersConfig) -> int:
    """Prints the table of all optimizers, or all about some; gives the exit status."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fmeta.optimizers import BUILDERS, get

    if config.names:
        for builder in [get(name) for name in config.names]:
            Console().print(escape(_all_about(builder)), highlight=False, soft_wrap=True)
        return 0
    console = Console()
    wide = console.width >= _WIDE
    table = Table("name", "learns", "hidden B", "needs", "from", *(["what it is"] if wide else []))
    for column in table.columns[:4]:
        column.no_wrap = True
    for name, builder in BUILDERS.items():
        rule, learns = _example(builder)
        table.add_row(
            name,
            learns,
            f"{_hidden_bytes(rule):.3g}",
            "\n".join(sorted(rule.needs)),
            escape(_source(builder, titles=wide)),
            *([escape(_summary(builder))] if wide else []),
        )
    console.print(table)
    console.print(
        f"learns: numbers that meta-training changes. hidden B: bytes of state a parameter, for a "
        f"matrix of {_SIDE} x {_SIDE} in float32. needs: what a step must be given beside the "
        "gradients. All about one: fmeta optimizers NAME.",
        highlight=False,
    )
    return 0


def _example(builder: Callable[..., Optimizer]) -> tuple[Optimizer, str]:
    """The rule with its defaults, and how many numbers meta-training would change."""
    if _required(builder):  # it is made for one tree of parameters
        rule = builder(_params())
        count = sum(x.numel() for x in trees.leaves(rule.init()))
        return rule, f"{count / _SIDE**2:.3g} a parameter"
    rule = builder()
    count = sum(x.numel() for x in trees.leaves(rule.init()))
    return rule, str(count) if count else ""


def _required(builder: Callable[..., Optimizer]) -> list[inspect.Parameter]:
    parameters = inspect.signature(builder).parameters.values()
    return [p for p in parameters if p.default is p.empty]


def _params() -> dict[str, torch.Tensor]:
    """A matrix without memory: the shapes of a state are all that is looked at."""
    return {"w": torch.empty(_SIDE, _SIDE, device="meta")}


def _hidden_bytes(rule: Optimizer) -> float:
    params = _params()
    th = trees.map(lambda x: x.to("meta"), rule.init())
    needed: dict[str, Any] = {"num_steps": 1} if "num_steps" in rule.needs else {}
    leaves = trees.leaves(rule.init_hidden(th, params, **needed))
    return sum(x.numel() * x.element_size() for x in leaves) / params["w"].numel()


def _summary(builder: Callable[..., Optimizer]) -> str:
    """The first line of the docstring, without its formula."""
    first = (inspect.getdoc(builder) or "").splitlines()[0]
    return (re.split(r":? ?``", first)[0] or first.replace("``", "")).rstrip(" :,.")


def _source(builder: Callable[..., Optimizer], *, titles: bool) -> str:
    """What the docstring gives as the reference; titles are left out where lines are short."""
    found = re.search(r"^Reference:\n((?: +.*\n?)+)", inspect.getdoc(builder) or "", re.MULTILINE)
    if not found:
        return ""
    if titles:
        return textwrap.shorten(found[1], _SOURCE, placeholder=" ...")
    return textwrap.shorten(re.sub(r',?\s+"[^"]*"', "", found[1]), _SHORT, placeholder=" ...")


def _all_about(builder: Callable[..., Optimizer]) -> str:
    rule, learns = _example(builder)
    signature = inspect.signature(builder)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    plain = inspect.Signature(parameters)
    needs = ", ".join(sorted(rule.needs)) or "gradients alone"
    return (
        f"{builder.__name__}{plain}\n\n{inspect.getdoc(builder)}\n\n"
        f"learns {learns or 'nothing'}; needs {needs}; {_hidden_bytes(rule):.3g} bytes of hidden "
        f"state a parameter of a {_SIDE} x {_SIDE} matrix\n"
    )
