"""Laws of a single step: purity, kinds, None gradients, needs, determinism, key order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden
from fmeta.testing._case import Case, reversed_keys
from fmeta.testing._compare import (
    assert_close,
    assert_same_kinds,
    assert_same_tensors,
    leaf_names,
    remembered,
    short,
)
from fmeta.testing._registry import law

Tree = Any

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@law()
def inputs_unchanged(optimizer: Any, params: Tree, **setup: Any) -> None:
    """No function of the optimizer edits its arguments, neither tensors nor containers."""
    case = Case(optimizer, params, **setup)
    p, hidden = case.warm()
    grads, th = case.grads(2), case.opt_params
    named = {"opt_params": th, "params": p, "grads": grads, "hidden": hidden}
    before = {name: remembered(tree) for name, tree in named.items()}
    calls = {
        "init_hidden": lambda: case.start(p),
        "update": lambda: case.update(p, grads, hidden),
        "step": lambda: case.step(p, grads, hidden),
        "eval_params": lambda: case.optimizer.eval_params(th, p, hidden),
    }
    for where, call in calls.items():
        call()
        for name, tree in named.items():
            assert_same_tensors(before[name], tree, name, where)


@law()
def kinds_kept(
    optimizer: Any, params: Tree, *, dtypes: Sequence[torch.dtype] = DTYPES, **setup: Any
) -> None:
    """Structure, shapes and dtypes stay; deltas are in the compute dtype, parameters in their own.

    With parameters of each dtype, opt_params as `init` gives them and in float64, and gradients of
    the parameter's dtype and of the compute dtype. An optimizer written by hand (whose hidden state
    is no `Hidden`) need not cast by itself: it gets opt_params in the compute dtype, and its delta
    may be of any floating dtype, for `step` casts it.
    """
    base = Case(optimizer, params, **setup)
    by_hand = not isinstance(base.start(base.params), Hidden)
    for dtype in dtypes:
        compute = torch.promote_types(dtype, torch.float32)
        for opt_dtype in (compute,) if by_hand else (None, torch.float64):
            case = base.cast(dtype, opt_dtype)
            hidden, p = case.start(case.params), case.params
            if isinstance(hidden, Hidden):
                _check_hidden_tree(hidden, p)
            for t in range(2):
                grads = case.grads(t)
                if t and not by_hand:
                    grads = trees.map(lambda g: g.to(trees.compute_dtype(g)), grads)
                where = f"step {t + 1} (parameters in {short(dtype)})"
                delta, _ = case.update(p, grads, hidden)
                _check_delta(delta, p, where, by_hand)
                q, after = case.step(p, grads, hidden)
                assert_same_kinds(p, q, "params", where, "cast to the parameter's dtype")
                assert_same_kinds(hidden, after, "hidden", where, "cast to the compute dtype")
                p, hidden = q, after
            shown = case.optimizer.eval_params(case.opt_params, p, hidden)
            assert_same_kinds(p, shown, "params", "eval_params", "cast to the parameter's dtype")


@law()
def delta_added_once(optimizer: Any, params: Tree, **setup: Any) -> None:
    """``step`` is ``params + delta`` in the compute dtype, cast once; its hidden is update's."""
    for dtype in DTYPES:
        case = Case(optimizer, params, **setup).cast(dtype)
        p, hidden = case.warm(1)
        grads = case.grads(1)
        delta, want = case.update(p, grads, hidden)
        q, after = case.step(p, grads, hidden)
        assert_close(after, want, "hidden", "of step, beside that of update", rtol=0)
        names = leaf_names(p, "params")
        for name, x, d, y in zip(names, *map(trees.leaves, (p, delta, q)), strict=True):
            if d is None:
                assert torch.equal(x, y), f"{name} changed in step, but its delta is None"
                continue
            c = trees.compute_dtype(x)
            assert_close(
                y, (x.to(c) + d.to(c)).to(x.dtype), name, "after step, beside param + delta", rtol=0
            )


@law(needs_hidden=True)
def none_gradients_skip(optimizer: Any, params: Tree, **setup: Any) -> None:
    """Where the gradient is None the delta is None, and parameter and hidden state stay.

    Only for hidden states of type `fmeta.Hidden`, which can be split by parameter.
    """
    case = Case(optimizer, params, **setup)
    p, hidden = case.warm()
    flat, spec = trees.flatten(case.grads(2))
    everything = set(range(len(flat)))
    names = leaf_names(p, "params")
    for absent in ({0}, {len(flat) - 1}, everything):
        grads = trees.unflatten(spec, [None if i in absent else g for i, g in enumerate(flat)])
        delta, _ = case.update(p, grads, hidden)
        q, after = case.step(p, grads, hidden)
        assert isinstance(after, Hidden), "step did not return an fmeta.Hidden"
        old, new = (
            trees.flatten_up_to(spec, h.leaves, p, "the hidden state") for h in (hidden, after)
        )
        for i in absent:
            where = f"with a None gradient at {names[i]}"
            assert trees.leaves(delta)[i] is None, (
                f"delta at {names[i]} is not None {where}: leave such leaves out"
            )
            assert_close(trees.leaves(q)[i], trees.leaves(p)[i], names[i], where, rtol=0)
            name = names[i].replace("params", "hidden.leaves", 1)
            assert_close(new[i], old[i], name, where, rtol=0)


@law()
def needs_enforced(optimizer: Any, params: Tree, **setup: Any) -> None:
    """It runs with what ``needs`` names and nothing else; each missing one is refused by name.

    With ``reads_grads=False`` other gradients give the same step.
    """
    case = Case(optimizer, params, **setup)
    opt, th, p = case.optimizer, case.opt_params, case.params
    needs = opt.needs
    given: dict[str, Any] = {}
    if "loss" in needs:
        given["loss"] = case.given()["loss"]
    names = sorted(needs - {"loss", "num_steps"})
    if names:
        found = case.extras(p) or {}
        missing = [n for n in names if n not in found]
        assert not missing, (
            f"the optimizer needs {', '.join(missing)}: give them to the law as "
            f"extras={{{missing[0]!r}: ...}} (one step's value, or a function of params)"
        )
        given["extras"] = {n: found[n] for n in names}
    horizon = {"num_steps": case.num_steps} if "num_steps" in needs else {}
    try:
        hidden = opt.init_hidden(th, p, **horizon)
        first = opt.step(th, p, case.grads(0), hidden, **given)
    except Exception as error:
        raise AssertionError(
            f"with nothing but its needs ({', '.join(sorted(needs)) or 'none'}) the optimizer "
            f"raised {type(error).__name__}: {error}; name in `needs` what it cannot do without"
        ) from error
    if not opt.reads_grads:
        zeros = trees.map(torch.zeros_like, p)
        got = opt.step(th, p, zeros, hidden, **given)
        where = "with gradients of zero, though reads_grads=False (drop that)"
        assert_close(got[0], first[0], "params", where)
        assert_close(got[1], first[1], "hidden", where)
    if "num_steps" in needs:
        _refused("num_steps", "init_hidden", lambda: opt.init_hidden(th, p))
    if "loss" in needs:
        rest = {k: v for k, v in given.items() if k != "loss"}
        _refused("loss", "step", lambda: opt.step(th, p, case.grads(0), hidden, **rest))
    for name in names:
        rest = {**given, "extras": {k: v for k, v in given["extras"].items() if k != name}}
        _refused(name, "step", lambda rest=rest: opt.step(th, p, case.grads(0), hidden, **rest))


@law()
def deterministic(optimizer: Any, params: Tree, **setup: Any) -> None:
    """Equal seeds give equal results, and no global generator is used."""
    case = Case(optimizer, params, **setup)
    opt, p, grads = case.optimizer, case.params, case.grads(0)
    calls = {
        "init": lambda: opt.init(torch.Generator().manual_seed(5)),
        "init without a generator": lambda: opt.init(),
        "init_hidden": lambda: case.start(p),
        "step": lambda: case.step(p, grads, case.start(p)),
    }
    for where, call in calls.items():
        before = _global_states()
        first = call()
        for name, (old, new) in _changed(before, _global_states()).items():
            raise AssertionError(
                f"{where} used {name} ({old} became {new}): draw from the generator given to init"
            )
        assert_close(call(), first, where.split()[0], "called twice", rtol=0)


@law()
def key_order_irrelevant(optimizer: Any, params: Tree, **setup: Any) -> None:
    """Results do not depend on the order in which dicts were built, nor on equal orders."""
    case = Case(optimizer, params, **setup)
    turned = reversed_keys(case.params)
    p, hidden = case.warm()
    grads, th = case.grads(2), case.opt_params
    want = case.step(p, grads, hidden)
    mixes = {
        "grads": (th, p, reversed_keys(grads), hidden),
        "hidden": (th, p, grads, reversed_keys(hidden)),
        "params": (th, reversed_keys(p), grads, hidden),
        "opt_params": (reversed_keys(th), p, grads, hidden),
        "everything": tuple(map(reversed_keys, (th, p, grads, hidden))),
    }
    given = case.given(p)
    start = case.start(case.params)
    assert_close(case.start(turned), start, "hidden", "from params in reversed key order")
    for what, arguments in mixes.items():
        where = f"after a step with {what} in reversed key order (match dicts by key)"
        got = case.optimizer.step(*arguments, **given)
        assert_close(got[0], want[0], "params", where)
        assert_close(got[1], want[1], "hidden", where)


def _check_hidden_tree(hidden: Hidden, params: Tree) -> None:
    spec = trees.flatten(params)[1]
    states = trees.flatten_up_to(spec, hidden.leaves, params, "the hidden state")
    for name, state in zip(leaf_names(params, "hidden.leaves"), states, strict=True):
        assert isinstance(state, dict), (
            f"{name} is a {type(state).__name__}: Hidden.leaves holds a dict of tensors at every "
            "leaf"
        )


def _check_delta(delta: Tree, params: Tree, where: str, by_hand: bool) -> None:
    flat = trees.leaves(params)
    changes = trees.flatten_up_to(trees.flatten(params)[1], delta, params, "the optimizer's delta")
    for name, p, d in zip(leaf_names(params, "delta"), flat, changes, strict=True):
        if d is None:
            continue
        want = trees.compute_dtype(p)
        assert isinstance(d, Tensor), f"{name} is a {type(d).__name__}, not a tensor, in {where}"
        assert d.dtype == want or (by_hand and d.is_floating_point()), (
            f"{name} is {short(d.dtype)} in {where}, must be {short(want)}: cast opt_params and "
            "gradients to the compute dtype first"
        )
        assert d.shape == p.shape, (
            f"{name} has shape {tuple(d.shape)} in {where}, must have {tuple(p.shape)}"
        )


def _refused(name: str, where: str, call: Any) -> None:
    try:
        call()
    except Exception as error:
        if name in str(error) and isinstance(error, (ValueError, TypeError)):
            return
        raise AssertionError(
            f"{where} without {name} raised {type(error).__name__}: {error}; raise a ValueError "
            f"that names {name!r}"
        ) from error
    raise AssertionError(
        f"{where} ran without {name}, which is in `needs`: raise a ValueError that names {name!r}, "
        "or drop it from `needs`"
    )


def _global_states() -> dict[str, Any]:
    return {
        "torch's global generator": torch.get_rng_state(),
        "Python's `random`": hash(random.getstate()),
        "numpy's global generator": hash(numpy.random.get_state()[1].tobytes()),  # type: ignore[index]
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, old in before.items():
        new = after[name]
        same = torch.equal(old, new) if isinstance(old, Tensor) else old == new
        if not same:
            found[name] = ("its state", "another")
    return found
