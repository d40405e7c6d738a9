"""`implicit_gradient`: the derivative of an optimum, without differentiating the way to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._autodiff import check_scalar
from fmeta._functions import check_function
from fmeta._numbers import check_real, is_whole

__all__ = ["SOLVERS", "ImplicitGradient", "check_solver", "implicit_gradient"]

Tree = Any
SOLVERS = ("cg", "neumann", "exact")


class ImplicitGradient(NamedTuple):
    """A meta-gradient by the implicit function theorem.

    Attributes:
        grads: like the meta-parameters.
        loss: the outer loss, a scalar.
        residual: how far the linear system is from solved, ``|(H + damping) u - v| / |v|``.
        slope: norm of the inner loss's gradient, 0 at an optimum: the theorem is about one.
    """

    grads: Any
    loss: Tensor
    residual: Tensor
    slope: Tensor


def implicit_gradient(
    inner_loss: Callable[[Tree, Tree], Tensor] | Sequence[Callable[[Tree, Tree], Tensor]],
    outer_loss: Callable[[Tree, Tree], Tensor] | Sequence[Callable[[Tree, Tree], Tensor]],
    params: Tree,
    meta_params: Tree,
    *,
    solver: str = "cg",
    num_iterations: int = 10,
    damping: float = 0.0,
    step_size: float = 1.0,
) -> ImplicitGradient:
    r"""Gradient of ``outer_loss(params*(m), m)`` where ``params*(m)`` minimises the inner loss.

    With the Hessian H of the inner loss at ``params`` and :math:`(H + damping) u = \nabla_p outer`,

    .. math:: \frac{d\, outer}{dm} = \partial_m outer - \partial_m \langle \nabla_p inner, u \rangle

    by Hessian-vector products alone, so that memory does not depend on how ``params`` were found.
    The number of iterations is fixed and nothing depends on values, so it composes with `vmap`.

    Args:
        inner_loss: ``inner_loss(params, meta_params) -> scalar``, with everything that the
            optimum depends on: a proximal term ``lam / 2 |params - start|^2`` for a learned
            start, a penalty with a learned weight. Or several, whose sum it is: the graph of one
            at a time is held.
        outer_loss: ``outer_loss(params, meta_params) -> scalar``, or several.
        params: tree of floating tensors, an optimum of the inner loss, or near one.
        meta_params: tree of floating tensors.
        solver: ``"cg"``: conjugate gradients, for positive definite H; ``"neumann"``:
            ``step_size sum_j (1 - step_size (H + damping))^j v``, which converges for step sizes
            below 2 over the largest eigenvalue; ``"exact"``: the whole of H is built and solved,
            for a few hundred parameters.
        num_iterations: of cg, or terms of the series.
        damping: added to the diagonal of H.
        step_size: of ``"neumann"``.

    Returns:
        An `ImplicitGradient`.

    Raises:
        ValueError: an unknown solver, numbers out of range; no loss at all, or one that is no
            scalar; trees without a tensor.
        TypeError: what is no number, no function (or one of other arguments), no floating tensor
            (with its path).

    Example:
        >>> import torch
        >>> inner = lambda p, m: (p - m).square().sum()  # the optimum is m itself
        >>> outer = lambda p, m: (p**3).sum()
        >>> m = torch.tensor([2.0])
        >>> implicit_gradient(inner, outer, m, m).grads
        tensor([12.])

    Reference:
        Rajeswaran et al., "Meta-learning with implicit gradients" (1909.04630), equation 6 (cg);
        Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
        differentiation" (1911.02590), theorem 1 and algorithm 3 (Neumann).
    """
    check_solver(solver, num_iterations, damping, step_size)
    inner, outer = _parts("inner_loss", inner_loss), _parts("outer_loss", outer_loss)
    _check_floating("params", params)
    _check_floating("meta_params", meta_params)
    slopes = [torch.func.grad(part) for part in inner]

    def product(v: Tree) -> Tree:
        # Reverse over reverse: not every loss has a derivative forward over reverse.
        parts = [torch.func.grad(lambda p, s=s: _dot(s(p, meta_params), v))(params) for s in slopes]
        return trees.map(lambda h, x: h + damping * x, _sum(parts), v)

    both = [torch.func.grad_and_value(part, argnums=(0, 1))(params, meta_params) for part in outer]
    (v, direct), loss = _sum(both)
    if solver == "cg":
        u = _conjugate_gradients(product, v, num_iterations)
    elif solver == "neumann":
        u = _neumann(product, v, num_iterations, step_size)
    else:
        u = _exact(product, v)
    left = trees.map(torch.sub, product(u), v)
    residual = _norm(left) / _norm(v).clamp_min(torch.finfo(loss.dtype).tiny)

    u = trees.map(torch.Tensor.detach, u)
    along = (torch.func.grad(lambda m, s=s: _dot(s(params, m), u))(meta_params) for s in slopes)
    slope = _norm(_sum(s(params, meta_params) for s in slopes))
    grads = trees.map(torch.sub, direct, _sum(along))
    return ImplicitGradient(grads, loss, residual, slope)


def check_solver(solver: str, num_iterations: int, damping: float, step_size: float) -> None:
    """Raises a ValueError for an unknown solver or numbers out of range, else a TypeError."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not is_whole(num_iterations):
        raise TypeError(f"num_iterations must be an integer, got {num_iterations!r}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    check_real(damping=damping, step_size=step_size)
    if not 0 <= damping < math.inf or not 0 < step_size < math.inf:
        raise ValueError(
            "damping must be at least 0 and step_size above 0, both finite, got "
            f"{damping} and {step_size}"
        )


def _parts(name: str, given: Any) -> list[Callable[[Tree, Tree], Tensor]]:
    """The functions whose sum a loss is, each of which looks at its own value."""
    parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not parts:
        raise ValueError(f"{name} is an empty list: give a function (params, meta_params), or some")

    def scalar(part: Callable[[Tree, Tree], Tensor]) -> Callable[[Tree, Tree], Tensor]:
        check_function(name, part, "params", "meta_params")

        def checked(params: Tree, meta_params: Tree) -> Tensor:
            value = part(params, meta_params)
            check_scalar(value, name)
            return value

        return checked

    return [scalar(part) for part in parts]


def _check_floating(name: str, tree: Tree) -> None:
    found = trees.leaves(tree)
    if not found:
        raise ValueError(f"{name} holds no tensor: there is nothing to differentiate by")
    for i, x in enumerate(found):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"the leaf of {name} at path {trees.paths(tree)[i]} is {kind}, not a floating "
                "tensor: what is not differentiated by belongs into the losses themselves"
            )


def _conjugate_gradients(product: Callable[[Tree], Tree], v: Tree, iterations: int) -> Tree:
    x = trees.map(torch.zeros_like, v)
    r = d = v
    size = _dot(r, r)
    tiny = torch.finfo(size.dtype).tiny
    for _ in range(iterations):
        ad = product(d)
        # Solved already, there is nothing to divide by; and along a direction of negative curvature
        # there is no minimum to go to. `residual` tells.
        curvature = _dot(d, ad)
        goes_on = (curvature > 0) & (size > tiny)
        alpha = torch.where(goes_on, size / torch.where(goes_on, curvature, 1.0), 0.0)
        x = _plus(x, alpha, d)
        r = _plus(r, -alpha, ad)
        before, size = size, _dot(r, r)
        d = _plus(r, size / before.clamp_min(tiny), d)
    return x


def _neumann(product: Callable[[Tree], Tree], v: Tree, terms: int, step_size: float) -> Tree:
    term = total = v
    for _ in range(terms - 1):
        term = trees.map(lambda t, h: t - step_size * h, term, product(term))
        total = trees.map(torch.add, total, term)
    return trees.map(lambda x: step_size * x, total)


def _exact(product: Callable[[Tree], Tree], v: Tree) -> Tree:
    flat, spec = trees.flatten(v)
    sizes = [x.numel() for x in flat]

    def of_vector(vector: Tensor) -> Tensor:
        parts = [p.view_as(x) for p, x in zip(vector.split(sizes), flat, strict=True)]
        return torch.cat(
            [x.reshape(-1) for x in trees.leaves(product(trees.unflatten(spec, parts)))]
        )

    right = torch.cat([x.reshape(-1) for x in flat])
    eye = torch.eye(len(right), dtype=right.dtype, device=right.device)
    matrix = torch.vmap(of_vector)(eye)  # symmetric
    solved = torch.linalg.solve(matrix, right)
    parts = [p.view_as(x) for p, x in zip(solved.split(sizes), flat, strict=True)]
    return trees.unflatten(spec, parts)


def _sum(parts: Iterable[Any]) -> Any:
    return functools.reduce(lambda x, y: trees.map(torch.add, x, y), parts)


def _plus(x: Tree, factor: Tensor, y: Tree) -> Tree:
    return trees.map(lambda a, b: a + factor * b, x, y)


def _dot(x: Tree, y: Tree) -> Tensor:
    return torch.stack(
        [(a * b).sum() for a, b in zip(trees.leaves(x), trees.leaves(y), strict=True)]
    ).sum()


def _norm(x: Tree) -> Tensor:
    return _dot(x, x).sqrt()
