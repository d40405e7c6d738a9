"""Laws of meta-gradients: finite, exact, the same under every schedule and transform."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from fmeta import trees
from fmeta.random import fold_in
from fmeta.testing._case import Case, floating
from fmeta.testing._compare import assert_close, leaf_names
from fmeta.testing._registry import law

Tree = Any
Scalar = Callable[[tuple[Tensor, ...]], Tensor]


@law(once=True)
def zero_gradients_finite(optimizer: Any, params: Tree, *, steps: int = 3, **setup: Any) -> None:
    """With gradients of zero, updates and meta-gradients are finite.

    The gradients depend on the parameters (as those of dead units do), so that an infinite
    derivative, such as that of the square root at 0, is not hidden.
    """
    case = Case(optimizer, params, **setup).double()
    for what, start in (
        ("", case.params),
        (" and parameters of zero", trees.map(torch.zeros_like, case.params)),
    ):
        x, rebuilt = floating(case.opt_params, start)
        names = _names(case.opt_params, start)

        def meta(x: tuple[Tensor, ...], rebuilt: Any = rebuilt) -> tuple[Tensor, Tree]:
            run = case.unroll(*rebuilt(x), steps=steps, loss=_flat_loss)
            return _end(run), run.params

        grads, run_params = grad(meta, has_aux=True)(x)
        for name, p in zip(leaf_names(run_params, "params"), trees.leaves(run_params), strict=True):
            assert bool(p.isfinite().all()), f"{name} is not finite with gradients of zero{what}"
        for name, g in zip(names, grads, strict=True):
            assert bool(g.isfinite().all()), (
                f"the meta-gradient of {name} is not finite with gradients of zero{what}: take "
                "roots, norms and divisions with a derivative that stays finite at 0"
            )


@law(once=True)
def meta_gradients_exact(
    optimizer: Any, params: Tree, *, steps: int = 3, rtol: float = 1e-4, **setup: Any
) -> None:
    """Meta-gradients equal central differences in float64, for every leaf that can be learned.

    The difference quotient is taken with several step sizes: near a kink the largest are wrong,
    with the smallest ones rounding is. A right gradient agrees with one of them.
    """
    case = Case(optimizer, params, **setup).double()
    x, rebuilt = floating(case.opt_params, case.params)
    names = _names(case.opt_params, case.params)

    def meta(x: tuple[Tensor, ...]) -> Tensor:
        return case.objective(*rebuilt(x), steps=steps)

    grads = grad(meta)(x)
    noise = 1e-7 * (1 + float(meta(x).abs()))
    for i, (name, leaf) in enumerate(zip(names, x, strict=True)):
        if not leaf.numel():
            continue
        v = torch.randn(leaf.shape, generator=fold_in(case.seed, 4, i), dtype=torch.float64)
        v = v.to(leaf.device) / v.norm().to(leaf.device)
        got = float((grads[i] * v).sum())
        quotients = []
        for size in (1e-5, 1e-6, 1e-4, 1e-7):
            moved = [meta((*x[:i], leaf + s * size * v, *x[i + 1 :])) for s in (1, -1)]
            quotients.append(float(moved[0] - moved[1]) / (2 * size))
            if abs(quotients[-1] - got) <= rtol * abs(quotients[-1]) + noise:
                break
        else:
            raise AssertionError(
                f"the meta-gradient of {name} along a random direction is {got:.9g}, but "
                f"differences give {', '.join(f'{q:.9g}' for q in quotients)}: is something "
                "detached, rounded, or changed outside of the arguments? (A ReLU may stand at "
                "its kink, exactly: another seed tells.)"
            )


@law(once=True)
def first_order_values_equal(optimizer: Any, params: Tree, *, steps: int = 3, **setup: Any) -> None:
    """The three values of ``first_order`` change derivatives only, while they are taken."""
    case = Case(optimizer, params, **setup).double()
    x, rebuilt = floating(case.opt_params, case.params)

    def values(order: Any) -> Tree:
        def meta(x: tuple[Tensor, ...]) -> tuple[Tensor, Tree]:
            run = case.unroll(*rebuilt(x), steps=steps, first_order=order)
            return _end(run), (run.losses, run.params)

        return grad(meta, has_aux=True)(x)[1]

    exact = values(False)
    for order in ("gradients", "inputs"):
        where = f'with first_order="{order}", beside False'
        losses, end = values(order)
        assert_close(losses, exact[0], "losses", where)
        assert_close(end, exact[1], "params", where)


@law(once=True)
def checkpoint_changes_nothing(
    optimizer: Any,
    params: Tree,
    *,
    steps: int = 5,
    schedules: Sequence[str | int] = ("sqrt", 2),
    **setup: Any,
) -> None:
    """Checkpointed unrolls have equal values and derivatives, under every transform.

    Under ``grad``, ``vjp``, ``jvp``, ``vmap``, ``grad`` of ``grad`` and ``.backward()``.
    """
    case = Case(optimizer, params, **setup).double()
    x, rebuilt = floating(case.opt_params, case.params)
    names = _names(case.opt_params, case.params)
    tangents = tuple(
        torch.randn(t.shape, generator=fold_in(case.seed, 5, i), dtype=t.dtype).to(t.device)
        for i, t in enumerate(x)
    )

    def objective(schedule: Any) -> Scalar:
        return lambda x: case.objective(*rebuilt(x), steps=steps, checkpoint=schedule)

    plain = objective(None)
    for what, transform in _TRANSFORMS.items():
        want = transform(plain, x, tangents)
        for schedule in schedules:
            where = f"under {what} with checkpoint={schedule!r}, beside None"
            got = transform(objective(schedule), x, tangents)
            if isinstance(want, Tensor):
                assert_close(got, want, "the result", where, rtol=1e-8)
                continue
            for name, a, b in zip(names, got, want, strict=True):
                assert_close(a, b, f"the derivative of {name}", where, rtol=1e-8, atol=1e-10)


def _hessian_product(f: Scalar, x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Any:
    def slope(x: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([(g * t).sum() for g, t in zip(grad(f)(x), v, strict=True)]).sum()

    return grad(slope)(x)


def _batched(f: Scalar, x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Any:
    return vmap(grad(f))(tuple(torch.stack([a, a + 0.01 * b]) for a, b in zip(x, v, strict=True)))


def _pulled(f: Scalar, x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Any:
    value, pull, *_ = vjp(f, x)
    return pull(torch.full_like(value, 1.5))[0]


def _pushed(f: Scalar, x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        # torch's own, when the first jvp of a process loads its decompositions.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        return jvp(f, (x,), (v,))[1]


def _backward(f: Scalar, x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Any:
    leaves = tuple(t.detach().clone().requires_grad_() for t in x)
    f(leaves).backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


_TRANSFORMS: dict[str, Callable[..., Any]] = {
    "no transform": lambda f, x, v: f(x),
    "grad": lambda f, x, v: grad(f)(x),
    "vjp": _pulled,
    "jvp": _pushed,
    "vmap of grad": _batched,
    "grad of grad": _hessian_product,
    ".backward()": _backward,
}


def _flat_loss(params: Tree, targets: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([0.5 * (0.0 * p).square().sum() for p in trees.leaves(params)]).sum()


def _end(run: Any) -> Tensor:
    ends = [(p + 1).square().sum() for p in trees.leaves(run.params)]
    return run.losses.sum() + torch.stack(ends).sum()


def _names(opt_params: Tree, params: Tree) -> list[str]:
    """Names of the tensors that `floating(opt_params, params)` gives."""
    pairs = zip(
        leaf_names(opt_params, "opt_params") + leaf_names(params, "model_params"),
        trees.leaves(opt_params) + trees.leaves(params),
        strict=True,
    )
    return [n for n, x in pairs if isinstance(x, Tensor) and x.is_floating_point()]
