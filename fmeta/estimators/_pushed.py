"""Derivatives carried forward: the values of a function and several directional derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import is_differentiable

__all__ = ["basis", "by_leaf", "check_few", "pushed"]

Tree = Any


def check_few(meta_params: Tree, most: int) -> None:
    """Raises a ValueError when the meta-parameters have more elements than forward mode may have.

    Args:
        meta_params: a tree of tensors.
        most: the limit, the estimator's ``max_elements``.
    """
    count = sum(x.numel() for x in trees.leaves(meta_params) if isinstance(x, Tensor))
    if count > most:
        raise ValueError(
            f"meta_params have {count:,} elements, and forward mode carries a copy of parameters "
            f"and hidden state for each of them; more than {most:,} are refused: take "
            'fmeta.estimators.full (with checkpoint="sqrt" for little memory) or pes, or raise '
            "max_elements"
        )


def basis(tree: Tree) -> Tree:
    """All unit vectors of a tree of tensors with n elements: the same tree, each leaf (n, ...)."""
    leaves, spec = trees.flatten(tree)
    sizes = [x.numel() for x in leaves]
    total, start, out = sum(sizes), 0, []
    for x, size in zip(leaves, sizes, strict=True):
        rows = torch.zeros(total, size, dtype=x.dtype, device=x.device)
        rows[start : start + size] = torch.eye(size, dtype=x.dtype, device=x.device)
        out.append(rows.reshape(total, *x.shape))
        start += size
    return trees.unflatten(spec, out)


def by_leaf(slopes: Tensor, like: Tree) -> Tree:
    """Derivatives along all of `basis` as gradients.

    Args:
        slopes: ``(elements, ...)``.
        like: the tree whose elements these are.

    Returns:
        Like ``like``, leaves of shape ``(..., *leaf)``.
    """
    leaves, spec = trees.flatten(like)
    parts = slopes.movedim(0, -1).split([x.numel() for x in leaves], -1)
    shaped = [p.reshape((*p.shape[:-1], *x.shape)) for p, x in zip(parts, leaves, strict=True)]
    return trees.unflatten(spec, [p.to(x.dtype) for p, x in zip(shaped, leaves, strict=True)])


def pushed(
    fn: Callable[..., tuple[Tree, Tree]],
    inputs: tuple[Tree, ...],
    tangents: tuple[Tree, ...],
    constants: tuple[Tree, ...] = (),
) -> tuple[Tree, Tree, Tree]:
    """Values of ``fn(*inputs, *constants)`` and their derivatives along n directions at once.

    Args:
        fn: ``fn(*inputs, *constants) -> (outputs, aux)``, trees of tensors.
        inputs: trees of tensors.
        tangents: like ``inputs`` with a leading dimension n; what stands at integers is not read.
        constants: what else it reads.

    Returns:
        ``(outputs, their tangents, aux)``; tangents have a leading dimension n. Integers among the
        outputs have tangents of zeros.

    Raises:
        ValueError: for an operation without a forward-mode derivative.
    """
    flat, spec = trees.flatten((*inputs, *constants))
    along = trees.flatten_up_to(trees.flatten(inputs)[1], tangents, inputs, "the tangents")
    pushed = [i for i, _ in enumerate(along) if is_differentiable(flat[i])]
    still = [i for i, x in enumerate(flat) if i >= len(along) and is_differentiable(x)]
    rebuild: list[Any] = []  # torch.func lets only tensors out

    def one(moved: list[int], *directions: Tensor) -> tuple[Tensor, ...]:
        def at(*values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            given = dict(zip(moved, values, strict=True))
            outputs, aux = fn(*trees.unflatten(spec, [given.get(i, x) for i, x in enumerate(flat)]))
            found, again = trees.tensors(outputs)
            smooth = [i for i, x in enumerate(found) if is_differentiable(x)]
            others = [None if i in smooth else x for i, x in enumerate(found)]
            rest, rebuild_rest = trees.tensors((others, aux))
            rebuild[:] = [(again, smooth, rebuild_rest)]
            return tuple(found[i] for i in smooth), tuple(rest)

        # A dual number needs memory of its own, which an expanded tensor has not.
        primals = tuple(flat[i].contiguous() for i in moved)
        zeros = tuple(torch.zeros_like(x) for x in primals[len(directions) :])
        found: Any = torch.func.jvp(at, primals, (*directions, *zeros), has_aux=True)
        values, slopes, rest = found
        return (*values, *slopes, *rest)

    out = _with_or_without_zeros(one, (pushed, pushed + still), [along[i] for i in pushed])
    again, smooth, rebuild_rest = rebuild.pop()
    n = len(smooth)
    values, slopes, rest = out[:n], out[n : 2 * n], out[2 * n :]
    # All but the slopes are the same in every direction.
    found, aux = rebuild_rest([x[0] for x in rest])
    count = len(along[pushed[0]])
    tops = [x if x is None else x.new_zeros(count, *x.shape) for x in found]
    for i, value, slope in zip(smooth, values, slopes, strict=True):
        found[i], tops[i] = value[0], slope
    return again(found), again(tops), aux


def _with_or_without_zeros(
    one: Callable[..., Any], choices: tuple[list[int], ...], directions: list[Tensor]
) -> Any:
    """Some of torch's formulas (of mse_loss) fail where a tangent is missing: then zeros stand in.

    They cost time, so it is tried without them first.
    """
    for moved in choices:
        try:
            return torch.vmap(lambda *d, moved=moved: one(moved, *d))(*directions)
        except NotImplementedError as error:
            raise _unsupported(error) from error
        except RuntimeError as error:
            if "forward AD" in str(error):
                raise _unsupported(error) from error
            if "ZeroTensor" not in str(error):
                raise
            if moved is choices[-1]:
                raise ValueError(
                    "an operation of the loss has no forward-mode derivative where one of its "
                    "arguments is a constant of the family's data: torch's mse_loss is one, write "
                    "it as (a - b).square().mean()"
                ) from error
    raise AssertionError("unreachable")


def _unsupported(error: Exception) -> ValueError:
    return ValueError(
        "forward mode needs a derivative that torch lacks for an operation of the loss or the "
        f"rule ({str(error).splitlines()[0]}): write that operation out, or take "
        "fmeta.estimators.full"
    )
