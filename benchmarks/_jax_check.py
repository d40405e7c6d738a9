"""Whether the JAX rules and estimates give fmeta's numbers, before anything is timed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import torch
from _jax_estimators import MODELS, Problem, pes, start, truncated
from _jax_rules import RULES
from jax import numpy as jnp

import fmeta

__all__ = ["agreement", "family_of", "in_jax", "problem_of", "rule_of"]

Tree = Any
TOLERANCE = 1e-4  # of a tensor's largest element, in float32
TASKS, STEPS, STD = 4, 5, 0.1


def rule_of(name: str) -> fmeta.Optimizer:
    """fmeta's rule of this name, as JAX has it."""
    if name == "normalized_mlp":
        return fmeta.optimizers.normalized_mlp(lr=0.01)
    found: fmeta.Optimizer = getattr(fmeta.optimizers, name)()
    return found


def family_of(model: str, batch_size: int) -> Any:
    """Digits for the MLP 64-32-10, or for a CNN of two convolutions (8 and 16 channels)."""
    return fmeta.tasks.digits({"mlp": (32,), "cnn": (8, 16)}[model], "relu", batch_size, model)


def problem_of(model: str) -> Problem:
    """The same in JAX."""
    family = family_of(model, 1)
    generator = torch.Generator().manual_seed(0)
    rows = family.batches({}, generator, 1).new_tensor(sorted(_rows(family)))
    return Problem(MODELS[model](), *map(_array, (family.data["x"], family.data["y"], rows)))


def in_jax(tree: Tree) -> Tree:
    """Arrays for tensors."""
    return jax.tree.map(_array, tree)


def _array(x: torch.Tensor) -> Any:
    return jnp.asarray(x.numpy().astype(np.int32 if not x.is_floating_point() else np.float32))


def _rows(family: Any) -> set[int]:
    """The images that are trained on."""
    seen = family.batches({}, torch.Generator().manual_seed(0), 100_000, "train")
    return set(seen.flatten().tolist())


class _Recorded:
    """A family whose draws are kept, in order."""

    def __init__(self, family: Any) -> None:
        self.params: list[Tree] = []
        self.batches: list[torch.Tensor] = []

        def init(*args: Any) -> Tree:
            self.params.append(family.init(*args))
            return self.params[-1]

        def batches(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.batches.append(family.batches(*args, **kwargs))
            return self.batches[-1]

        self.family = family._replace(init=init, batches=batches)

    def take(self) -> tuple[Tree, Any]:
        """What the last estimate drew: parameters and batches, tasks first."""
        n = -TASKS
        params = None
        if self.params:
            params = in_jax(
                {k: torch.stack([p[k] for p in self.params[n:]]) for k in self.params[0]}
            )
        return params, _array(torch.stack(self.batches[n:]))


def agreement(name: str, model: str, estimates: bool) -> dict[str, float]:
    """Largest differences, over the largest element of each tensor.

    Args:
        estimates: whether whole estimates are compared, which takes JAX a minute to compile.

    Returns:
        Of the parameters after each of three inner steps; with ``estimates`` also of two successive
        estimates by PES and of one by truncated gradients.

    Raises:
        SystemExit: one above the tolerance.
    """
    found = {"one step": _one_step(name, model)}
    if estimates:
        found |= {"PES": _pes(name, model), "truncated": _truncated(name, model)}
    for what, error in found.items():
        if not error < TOLERANCE:
            raise SystemExit(f"JAX differs from fmeta: {name}, {model}, {what}: {error:.2g}")
    return found


def _one_step(name: str, model: str) -> float:
    rule, other, family = rule_of(name), RULES[name](), family_of(model, 16)
    theta = rule.init()
    p = family.init({}, torch.Generator().manual_seed(1))
    q, generator = in_jax(p), torch.Generator().manual_seed(2)
    h, k = rule.init_hidden(theta, p), {n: other.start(x) for n, x in q.items()}

    @jax.jit
    def step(q: Tree, g: Tree, k: Tree) -> Tree:
        return {n: other.step(in_theta, q[n], g[n], k[n]) for n in q}

    old, in_theta = p, in_jax(theta)
    for _ in range(3):
        g = {n: torch.randn(x.shape, generator=generator) for n, x in p.items()}
        old, (p, h) = p, rule.step(theta, p, g, h)
        new = step(q, in_jax(g), k)
        before, q, k = q, {n: x[0] for n, x in new.items()}, {n: x[1] for n, x in new.items()}
    moved = {n: q[n] - before[n] for n in q}
    return max(_error(in_jax({n: p[n] - old[n] for n in p}), moved), _error(in_jax(p), q))


def _pes(name: str, model: str) -> float:
    rule, other, recorded = rule_of(name), RULES[name](), _Recorded(family_of(model, 32))
    theta, drawn = rule.init(), []

    def perturb(theta: Tree, step: int, particle: int) -> Tree:
        generator = torch.Generator().manual_seed(100 * step + particle)
        drawn.append({k: STD * torch.randn(x.shape, generator=generator) for k, x in theta.items()})
        return drawn[-1]

    estimator = fmeta.estimators.pes(
        rule, recorded.family, num_tasks=TASKS, horizon=10 * STEPS, truncation=STEPS,
        std=STD, stagger=False, perturb=perturb,
    )  # fmt: skip
    state = estimator.init(theta, 0)
    xi, trainings, worst, problem = None, None, 0.0, problem_of(model)
    for _ in range(2):
        estimate, state = estimator.estimate(theta, state)
        eps = in_jax({k: torch.stack([e[k] for e in drawn[-TASKS:]]) for k in theta})
        params, batches = recorded.take()
        if trainings is None:
            begun = (params, start(other, params))
            trainings = jax.tree.map(lambda x: jnp.repeat(x[:, None], 2, 1), begun)
        xi = eps if xi is None else jax.tree.map(jnp.add, xi, eps)
        run = jax.jit(functools.partial(pes, other, problem, std=STD, chunk=TASKS))
        grad, trainings, losses = run(in_jax(theta), eps, xi, trainings, batches)
        seen = _array(estimate.metrics["losses"]).transpose(1, 2, 0)
        worst = max(worst, _error(in_jax(estimate.grads), grad), _error(seen, losses))
    return worst


def _truncated(name: str, model: str) -> float:
    rule, other, recorded = rule_of(name), RULES[name](), _Recorded(family_of(model, 32))
    theta = rule.init()
    estimator = fmeta.estimators.truncated(
        rule, recorded.family, num_tasks=TASKS, horizon=10 * STEPS, truncation=STEPS, stagger=False
    )
    estimate, _ = estimator.estimate(theta, estimator.init(theta, 0))
    params, batches = recorded.take()
    run = jax.jit(functools.partial(truncated, other, problem_of(model), chunk=TASKS))
    parts, _, losses = run(in_jax(theta), (params, start(other, params)), batches)
    seen = _array(estimate.metrics["losses"][..., 0].T)
    grads = jax.tree.map(lambda x: x.mean(0), parts)
    return max(_error(in_jax(estimate.grads), grads), _error(seen, losses))


def _error(a: Tree, b: Tree) -> float:
    """The largest difference, over the largest element of all tensors."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    largest = max(float(jnp.abs(x).max()) for x, _ in pairs)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs) / largest
