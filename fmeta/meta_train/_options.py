"""A configuration dataclass as a file and as a table of its options."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import os
import textwrap
import types
import typing
from typing import Any, TypeVar

from fmeta import _files

__all__ = ["options_table", "read_config"]

Config = TypeVar("Config")


def read_config(path: str | os.PathLike[str], like: Config) -> Config:
    """A configuration from a JSON file; what the file leaves out is as in ``like``.

    Args:
        path: one JSON object, such as the ``config.json`` of an earlier run or a part of it.
        like: a configuration (a frozen dataclass), usually of defaults.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object, an unknown key, or a value of another type (with its name).
    """
    found = _files.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must hold one JSON object of options, such as a run's config.json"
        )
    wanted = typing.get_type_hints(type(like))
    for name, value in found.items():
        if name not in wanted:
            near = difflib.get_close_matches(name, wanted, 1) or [", ".join(wanted)]
            raise ValueError(f"{path}: unknown option {name!r}: did you mean {near[0]}?")
        if not _fits(value, wanted[name]):
            raise ValueError(
                f"{path}: option {name!r} must be of type {_type_name(wanted[name])}, got {value!r}"
            )
    values = {name: _as(value, wanted[name]) for name, value in found.items()}
    return dataclasses.replace(like, **values)  # type: ignore[type-var]


def options_table(config: type) -> str:
    """The options of a configuration dataclass as a Markdown table, from its source.

    Args:
        config: a dataclass whose fields have a docstring each.

    Raises:
        ValueError: a field without one.
    """
    texts, types_ = _field_docstrings(config), typing.get_type_hints(config)
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(config):
        if field.name not in texts:
            raise ValueError(f"{config.__name__}.{field.name} has no docstring: say what it does")
        flag = f"`--{field.name.replace('_', '-')}`"
        kind = _type_name(types_[field.name]).replace("|", "\\|")
        text = texts[field.name].replace("|", "\\|")
        rows.append(f"| {flag} | {kind} | `{field.default}` | {text} |")
    return "\n".join(rows) + "\n"


def _field_docstrings(config: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = inspect.cleandoc(str(text.value.value)).replace("\n", " ")
    return texts


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple:
        if not isinstance(value, list):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(x, parts[0]) for x in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _as(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if kind is float else value


def _type_name(kind: Any) -> str:
    if kind in (int, float, bool, str):
        return str(kind.__name__)
    return "None" if kind is type(None) else str(kind)
