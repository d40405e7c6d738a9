"""Trajectories of the reference files, and how far a rule's are from them."""

import numpy as np
import torch

from fmeta import trees


def sub(data, prefix):
    return {k.removeprefix(prefix): data[k] for k in data.files if k.startswith(prefix)}


def tensors(arrays):
    return {k: torch.from_numpy(np.asarray(x)) for k, x in arrays.items()}


def errors(start, wanted, found):
    """Largest error over each trajectory, in displacements, after 8 ulp of the parameter.

    Args:
        start: first parameters by name.
        wanted, found: ``(T, *shape)`` by name.
    """
    result = {}
    for k, want in wanted.items():
        off = ((found[k] - want).abs() - 8 * 2**-23 * want.abs()).clamp(min=0)
        result[k] = (off.max() / (want - start[k]).abs().max()).item()
    return result


def run(rule, opt_params, start, grads, *, steps=20, num_steps=None, given=None):
    """Parameters after each step, ``(T, *shape)`` by name, and the last hidden state.

    Args:
        given: ``t -> dict`` of further keywords of a step.
    """
    params = start
    hidden = rule.init_hidden(opt_params, params, num_steps=num_steps)
    path = []
    for t in range(steps):
        g = {k: x[t] for k, x in grads.items()}
        more = {} if given is None else given(t)
        params, hidden = rule.step(opt_params, params, g, hidden, **more)
        path.append(params)
    return trees.map(lambda *xs: torch.stack(xs), *path), hidden


def copies(named, count):
    """Each tensor ``count`` times, the copies (but the first) scaled."""
    return {f"{k}.{i}": x * (1 + i) for k, x in named.items() for i in range(count)}


def first(named):
    """What belongs to the tensors that were copied."""
    return {k.removesuffix(".0"): x for k, x in named.items() if k.endswith(".0")}
