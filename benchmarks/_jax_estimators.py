"""PES and truncated gradients in JAX, on digits: the same estimates as fmeta's, timed beside them.

All trainings are advanced by `vmap` of one `lax.scan` over the inner steps, ``chunk`` tasks at a
time. Each estimator is two functions: of given draws (to be compared with fmeta), and as it is
used, with the draws inside the compiled function, which a training that is over begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from _jax_rules import Rule
from jax import lax
from jax import numpy as jnp

__all__ = ["MODELS", "Model", "Problem", "pes", "pes_chain", "truncated", "truncated_chain"]

Array = Any
Tree = Any


class Model(NamedTuple):
    """``init(key) -> params`` and ``apply(params, x) -> logits``."""

    init: Callable[[Array], Tree]
    apply: Callable[[Tree, Array], Array]


class Problem(NamedTuple):
    """What is trained: data ``x: (images, 64)`` and ``y``, of which ``rows`` are trained on."""

    model: Model
    x: Array
    y: Array
    rows: Array

    def loss(self, params: Tree, batch: Array) -> Array:
        logits = self.model.apply(params, self.x[batch])
        picked = jnp.take_along_axis(logits, self.y[batch][:, None], 1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)

    def batches(self, key: Array, tasks: int, steps: int, size: int) -> Array:
        return self.rows[jax.random.randint(key, (tasks, steps, size), 0, len(self.rows))]


def _uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    bound = math.sqrt(3 / fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _mlp() -> Model:
    def init(key: Array) -> Tree:
        a, b = jax.random.split(key)
        w0, w1 = _uniform(a, (64, 32), 64), _uniform(b, (32, 10), 32)
        return {"w0": w0, "b0": jnp.zeros(32), "w1": w1, "b1": jnp.zeros(10)}

    def apply(params: Tree, x: Array) -> Array:
        x = jax.nn.relu(x @ params["w0"] + params["b0"])
        return x @ params["w1"] + params["b1"]

    return Model(init, apply)


def _cnn(channels: tuple[int, ...] = (8, 16)) -> Model:
    """3x3 convolutions of stride 2, as products of patches: kernels differ from task to task.

    The batch is last, which is 1.5 times as fast as first: copies are of what lies side by side.
    """
    widths = (1, *channels)
    features = channels[-1] * (8 >> len(channels)) ** 2

    def init(key: Array) -> Tree:
        params, keys = {}, jax.random.split(key, len(channels) + 1)
        for i, after in enumerate(channels):
            shape = (after, widths[i], 3, 3)
            params[f"conv{i}.w"] = _uniform(keys[i], shape, 9 * widths[i])
            params[f"conv{i}.b"] = jnp.zeros(after)
        head = _uniform(keys[-1], (features, 10), features)
        return {**params, "head.w": head, "head.b": jnp.zeros(10)}

    def conv(x: Array, kernel: Array) -> Array:
        side, n = x.shape[1], x.shape[3]
        half = (side + 1) // 2
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        corners = [x[:, i : i + side : 2, j : j + side : 2] for i in range(3) for j in range(3)]
        patches = jnp.stack(corners, 1).reshape(9 * len(x), -1)
        return (kernel.reshape(len(kernel), -1) @ patches).reshape(-1, half, half, n)

    def apply(params: Tree, x: Array) -> Array:
        x = x.T.reshape(1, 8, 8, -1)
        for i in range(len(channels)):
            bias = params[f"conv{i}.b"][:, None, None, None]
            x = jax.nn.relu(conv(x, params[f"conv{i}.w"]) + bias)
        x = x.transpose(1, 2, 0, 3).reshape(features, -1)
        return (params["head.w"].T @ x + params["head.b"][:, None]).T

    return Model(init, apply)


MODELS = {"mlp": _mlp, "cnn": _cnn}


def _run(
    rule: Rule, problem: Problem, theta: Tree, params: Tree, hidden: Any, batches: Array
) -> tuple[tuple[Tree, Any], Array]:
    """One training through a truncation; losses ``(steps,)``."""

    def one(state: tuple[Tree, Any], batch: Array) -> tuple[tuple[Tree, Any], Array]:
        params, hidden = state
        loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        new = {k: rule.step(theta, params[k], grads[k], hidden[k]) for k in params}
        return ({k: v[0] for k, v in new.items()}, {k: v[1] for k, v in new.items()}), loss

    return lax.scan(one, (params, hidden), batches)


def start(rule: Rule, params: Tree) -> Any:
    """First hidden states of tasks, ``(tasks, ...)``."""
    return jax.vmap(lambda own: {k: rule.start(p) for k, p in own.items()})(params)


def pes(
    rule: Rule, problem: Problem, theta: Tree, eps: Tree, xi: Tree, state: Any, batches: Array,
    std: float, chunk: int,
) -> tuple[Tree, Any, Array]:  # fmt: skip
    """An estimate of given draws.

    Args:
        theta: meta-parameters.
        eps, xi: perturbations, and their sums over a training, these included; ``(tasks, ...)``.
        state: ``(params, hidden)`` of ``(tasks, 2, ...)``.
        batches: ``(tasks, steps, batch)``.
        std: of the perturbations.
        chunk: tasks at a time.

    Returns:
        ``(gradient, state, losses)``, losses ``(tasks, 2, steps)``.
    """

    def task(given: tuple[Tree, tuple[Tree, Any], Array]) -> tuple[Any, Array]:
        eps, (params, hidden), batches = given
        both = jax.tree.map(lambda x, e: jnp.stack([x + e, x - e]), theta, eps)
        run = partial(_run, rule, problem)
        return jax.vmap(run, in_axes=(0, 0, 0, None))(both, params, hidden, batches)

    state, losses = lax.map(task, (eps, state, batches), batch_size=chunk)
    mean = losses.mean(2)
    weight = (mean[:, 0] - mean[:, 1]) / (2 * std**2 * len(mean))
    return jax.tree.map(lambda x: jnp.tensordot(weight, x, 1), xi), state, losses


def truncated(
    rule: Rule, problem: Problem, theta: Tree, state: Any, batches: Array, chunk: int
) -> tuple[Tree, Any, Array]:
    """The gradient of the mean loss; each task's own is found, as fmeta does.

    Args:
        theta: meta-parameters.
        state: ``(params, hidden)`` of ``(tasks, ...)``.
        batches: ``(tasks, steps, batch)``.
        chunk: tasks at a time.

    Returns:
        ``(each task's gradient, state, losses)``, losses ``(tasks, steps)``.
    """

    def task(given: tuple[tuple[Tree, Any], Array]) -> Any:
        def total(theta: Tree) -> Any:
            (params, hidden), batches = given
            state, losses = _run(rule, problem, theta, params, hidden, batches)
            return losses.mean(), (state, losses)

        return jax.grad(total, has_aux=True)(theta)

    parts, (state, losses) = lax.map(task, (state, batches), batch_size=chunk)
    return parts, state, losses


def _begun(
    rule: Rule, problem: Problem, key: Array, t: Array, state: Any, horizon: int, copies: int
) -> tuple[Array, Array, Any]:
    """Trainings that are over, anew: ``(is_new, t, state)``."""
    is_new = t >= horizon
    params = jax.vmap(problem.model.init)(jax.random.split(key, len(t)))
    fresh = (params, start(rule, params))
    if copies > 1:
        fresh = jax.tree.map(lambda x: jnp.repeat(x[:, None], copies, 1), fresh)
    mask = partial(_where, is_new)
    return is_new, jnp.where(is_new, 0, t), jax.tree.map(mask, fresh, state)


def _where(is_new: Array, a: Any, b: Any) -> Array:
    return jnp.where(is_new.reshape(-1, *(1,) * (b.ndim - 1)), a, b)


def pes_chain(
    rule: Rule, problem: Problem, theta: Tree, tasks: int, *, steps: int, horizon: int,
    batch_size: int, std: float, chunk: int,
) -> Callable[[], Any]:  # fmt: skip
    """A call that makes the next estimate."""

    @partial(jax.jit, donate_argnums=1)
    def estimate(theta: Tree, state: Any, key: Array) -> tuple[Any, Any]:
        t, xi, trainings = state
        for_start, for_eps, for_batches = jax.random.split(key, 3)
        is_new, t, trainings = _begun(rule, problem, for_start, t, trainings, horizon, 2)
        leaves, tree = jax.tree.flatten(theta)
        keys = jax.random.split(for_eps, len(leaves))
        eps = tree.unflatten(
            std * jax.random.normal(k, (tasks, *x.shape)) for k, x in zip(keys, leaves, strict=True)
        )
        xi = jax.tree.map(lambda x, e: _where(is_new, 0.0, x) + e, xi, eps)
        batches = problem.batches(for_batches, tasks, steps, batch_size)
        grad, trainings, losses = pes(rule, problem, theta, eps, xi, trainings, batches, std, chunk)
        return (grad, losses.mean()), (t + steps, xi, trainings)

    xi = jax.tree.map(lambda x: jnp.zeros((tasks, *x.shape)), theta)
    return _chain(estimate, rule, problem, theta, tasks, xi, copies=2, steps=steps, horizon=horizon)


def truncated_chain(
    rule: Rule, problem: Problem, theta: Tree, tasks: int, *, steps: int, horizon: int,
    batch_size: int, chunk: int,
) -> Callable[[], Any]:  # fmt: skip
    """A call that makes the next estimate."""

    @partial(jax.jit, donate_argnums=1)
    def estimate(theta: Tree, state: Any, key: Array) -> tuple[Any, Any]:
        t, _, trainings = state
        for_start, for_batches = jax.random.split(key)
        _, t, trainings = _begun(rule, problem, for_start, t, trainings, horizon, 1)
        batches = problem.batches(for_batches, tasks, steps, batch_size)
        parts, trainings, losses = truncated(rule, problem, theta, trainings, batches, chunk)
        grad = jax.tree.map(lambda x: x.mean(0), parts)
        return (grad, losses.mean()), (t + steps, (), trainings)

    return _chain(estimate, rule, problem, theta, tasks, (), copies=1, steps=steps, horizon=horizon)


def _chain(
    estimate: Callable[..., Any], rule: Rule, problem: Problem, theta: Tree, tasks: int, xi: Tree,
    *, copies: int, steps: int, horizon: int,
) -> Callable[[], Any]:  # fmt: skip
    key = jax.random.key(0)
    like = jax.vmap(problem.model.init)(jax.random.split(key, tasks))
    trainings = (like, start(rule, like))
    if copies > 1:
        trainings = jax.tree.map(lambda x: jnp.repeat(x[:, None], copies, 1), trainings)
    # As if each had begun a whole number of truncations ago, so that some end at each estimate.
    ages = jnp.arange(tasks, dtype=jnp.int32) % (horizon // steps) * steps
    state, count = [(ages, xi, trainings)], [0]

    def call() -> Any:
        count[0] += 1
        found, state[0] = estimate(theta, state[0], jax.random.fold_in(key, count[0]))
        return jax.block_until_ready(found)

    return call
