"""Families of digits tasks by name, as the main job's configuration has them."""

from __future__ import annotations

from fmeta.tasks import TaskFamily, digits

__all__ = ["digits_by_name"]


def digits_by_name(name: str, *, batch_size: int, online: bool) -> TaskFamily:
    """`fmeta.tasks.digits` from ``"model:widths"`` or ``"model:widths:activation"``.

    Args:
        name: such as ``"mlp:32"`` or ``"mlp:24,24:tanh"``.
        batch_size, online: as in `fmeta.tasks.digits`.

    Raises:
        ValueError: a name that is not of this form, or of nothing that `fmeta.tasks.digits` makes.
    """
    model, *rest = name.split(":")
    widths = rest[0].split(",") if rest else []
    if len(rest) not in (1, 2) or not all(width.isdecimal() for width in widths):
        raise ValueError(f"a task is model:widths[:activation], like mlp:24,24:tanh, got {name!r}")
    activation = rest[1] if len(rest) == 2 else "relu"
    try:
        return digits(tuple(map(int, widths)), activation, batch_size, model, online)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from None
