"""Stacks of small leaves: the form that consumes the state is the plain one, in the same memory."""

import pytest
import torch

from fmeta import optimizers, trees, treewise
from fmeta._leafwise import consuming_update
from fmeta._lift import lift
from fmeta._stacks import Columns
from fmeta.random import fold_in

# eight of each of three shapes, taking turns, and one alone
SHAPES = {f"{i:02}": [(2, 3), (3, 2), (4,)][i % 3] for i in range(24)} | {"alone": (5, 2)}
RULES = {
    "adam": optimizers.adam,
    "adamw": optimizers.adamw,
    "lion": optimizers.lion,
    "sgd": lambda: optimizers.sgd(0.1, momentum=0.9),
    "adafactor": optimizers.adafactor,
    "lamb": optimizers.lamb,
    "adafactor_mlp": optimizers.adafactor_mlp,
    "normalized_mlp": optimizers.normalized_mlp,
    "rnn_mlp": optimizers.rnn_mlp,
    "velo": lambda: optimizers.velo(lstm_hidden_size=4, param_inits=50),
}


def draws(seed):
    return {
        k: torch.randn(s, generator=fold_in(seed, i)) for i, (k, s) in enumerate(SHAPES.items())
    }


def run(rule, update, steps=4):
    th, params = rule.init(), draws(0)
    horizon = {"num_steps": 10} if "num_steps" in rule.needs else {}
    hidden, found = rule.init_hidden(th, params, **horizon), []
    for t in range(steps):
        loss = torch.tensor(1.0) if "loss" in rule.needs else None
        # The first state is not owned: what it shares memory with is unknown.
        apply = rule.update if t == 0 else update
        delta, hidden = apply(th, params, draws(t + 1), hidden, loss=loss)
        params = trees.map(lambda p, d: p + d, params, delta)
        found.append(hidden)
    return params, found


@pytest.mark.parametrize("name", RULES)
def test_consuming_the_state_changes_no_number(name):
    rule = RULES[name]()
    with torch.no_grad():
        want, states = run(rule, rule.update)
        got, found = run(rule, consuming_update(rule))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[-1].leaves, states[-1].leaves, rtol=1e-6, atol=1e-7)
    assert trees.paths(found[-1].leaves) == trees.paths(states[-1].leaves)


@pytest.mark.parametrize("name", ["adam", "velo"])
def test_the_state_of_stacks_stays_in_its_memory(name):
    with torch.no_grad():
        _, found = run(RULES[name](), consuming_update(RULES[name]()), steps=3)
    for k in SHAPES:
        if k != "alone":
            assert found[2].leaves[k] is found[1].leaves[k]


def test_what_is_made_of_the_old_state_is_copied_before_that_is_written_over():
    """A rule whose entries change places, and whose step is the old one of them."""
    rule = lift(
        lambda generator=None: {},
        lambda th, p: {"a": torch.ones_like(p), "b": torch.zeros_like(p)},
        lambda th, p, g, h: (h["a"], {"a": h["b"], "b": h["a"]}),
        elementwise=True,
    )
    params = draws(0)
    _, hidden = rule.update({}, params, params, rule.init_hidden({}, params))
    # Out of columns: the first update handed the given ones back.
    hidden = hidden._replace(leaves=columns_of(hidden.leaves))
    before = trees.map(torch.clone, hidden.leaves)
    delta, new = consuming_update(rule)({}, params, params, hidden)
    for k, old in before.items():
        torch.testing.assert_close(delta[k], old["a"], rtol=0, atol=0)
        torch.testing.assert_close(new.leaves[k], {"a": old["b"], "b": old["a"]}, rtol=0, atol=0)


def columns_of(leaves):
    """The same numbers, those of each shape one after another in memory."""
    found = {k: dict(state) for k, state in leaves.items()}
    for shape in set(SHAPES.values()):
        keys = [k for k in SHAPES if SHAPES[k] == shape]
        for name in ("a", "b"):
            rows = torch.stack([leaves[k][name] for k in keys]).unbind(0)
            for k, row in zip(keys, rows, strict=True):
                found[k][name] = row
    return found


COLUMNS = {
    "one after another": (lambda: torch.arange(12.0).view(3, 4).unbind(0), True),
    "further axes first": (lambda: torch.arange(24.0).view(2, 3, 4).movedim(0, -1).unbind(0), True),
    "numbers": (lambda: torch.arange(3.0).unbind(0), True),
    "apart": (lambda: [torch.ones(4) for _ in range(3)], False),
    "the same": (lambda: [torch.ones(4)] * 3, False),
    "expanded": (lambda: torch.ones(3, 1).expand(3, 4).unbind(0), False),
    "overlapping": (lambda: torch.arange(6.0).unfold(0, 4, 1).unbind(0), False),
    "backwards": (lambda: torch.arange(12.0).view(3, 4).unbind(0)[::-1], False),
    "not alike": (lambda: [*torch.arange(8.0).view(2, 4), torch.ones(4)], False),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_memory_is_used_only_where_every_element_is_one_leafs_own(name):
    make, in_place = COLUMNS[name]
    xs = list(make())
    want = torch.stack(xs)
    columns = Columns([{"x": x} for x in xs], ["x"], own=True)
    assert columns.in_place is in_place
    torch.testing.assert_close(columns.given["x"], want, rtol=0, atol=0)
    new = columns.put({"x": -want})
    for state, row in zip(new, -want, strict=True):
        torch.testing.assert_close(state["x"], row, rtol=0, atol=0)
    if in_place:
        torch.testing.assert_close(torch.stack(xs), -want, rtol=0, atol=0)
    else:
        torch.testing.assert_close(torch.stack(xs), want, rtol=0, atol=0)


def test_two_entries_in_one_memory_are_not_written_to():
    xs = torch.arange(12.0).view(3, 4).unbind(0)
    columns = Columns([{"a": x, "b": x} for x in xs], ["a", "b"], own=True)
    want = torch.stack(xs)
    new = columns.put({"a": want + 1, "b": want + 2})
    torch.testing.assert_close(torch.stack([s["a"] for s in new]), want + 1, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack([s["b"] for s in new]), want + 2, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(xs), want, rtol=0, atol=0)


class Numbered:
    """Each tensor is told its own summary, which `mix` must see in the order of the leaves."""

    batched = True

    def __init__(self):
        self.seen = None

    init = staticmethod(lambda generator: {})
    init_hidden = staticmethod(lambda th, p: {"last": torch.zeros_like(p)})
    init_tensor = staticmethod(lambda th, p: {"sum": p.new_zeros(1)})

    def summary(self, th, p, g, h, batch=0):
        return g.flatten(batch).sum(-1, keepdim=True)

    def mix(self, th, summaries, tensors, shared):
        self.seen = summaries
        return summaries, {"sum": tensors["sum"] + summaries}, shared

    def update(self, th, p, g, h, control, batch=0):
        told = control.reshape(*control.shape[:batch], *(1,) * (p.ndim - batch))
        return told.expand(p.shape).clone(), {"last": g.clone()}


@pytest.mark.parametrize("how", ["plain", "consuming", "vmap"])
def test_tensors_are_summarised_in_their_order_and_told_their_own(how):
    rule_of = Numbered()
    rule = treewise(rule_of)
    params, grads = draws(0), draws(1)
    hidden = rule.init_hidden({}, params)
    if how == "vmap":
        some = torch.vmap(lambda g: rule.update({}, params, g, hidden))
        delta, new = some(trees.map(lambda g: g.unsqueeze(0), grads))
        delta, leaves = trees.map(lambda x: x.squeeze(0), (delta, new.leaves))
    else:
        update = consuming_update(rule) if how == "consuming" else rule.update
        delta, new = update({}, params, grads, hidden)
        leaves = new.leaves
        sums = torch.stack([grads[k].sum() for k in sorted(SHAPES)])
        torch.testing.assert_close(rule_of.seen.squeeze(1), sums)
    for k, g in grads.items():
        torch.testing.assert_close(delta[k], g.sum().expand(g.shape))
        torch.testing.assert_close(leaves[k]["tensor"]["sum"], g.sum().reshape(1))
        torch.testing.assert_close(leaves[k]["last"], g)
