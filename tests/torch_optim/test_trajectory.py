"""The adapter's trajectory is that of the functional form, bit for bit."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmeta
from fmeta import optimizers, trees
from fmeta.random import fold_in
from fmeta.testing import gradients, shapes
from fmeta.torch_optim import LearnedOptimizer

OF_A_TREE = {  # builders that take the parameter tree first
    n
    for n, b in optimizers.BUILDERS.items()
    if any(p.default is p.empty for p in inspect.signature(b).parameters.values())
}
KNOWN = {"loss", "num_steps"}
RULES = {
    **{n: b() for n, b in optimizers.BUILDERS.items() if n not in OF_A_TREE and b().needs <= KNOWN},
    "clipped, scheduled, with master weights": fmeta.chain(
        fmeta.clip_by_global_norm(1.0),
        fmeta.master_weights(fmeta.scheduled(optimizers.adam(0.01), lambda t, n: 1 / (1 + t))),
    ),
    "averaged": fmeta.averaged(optimizers.adam(0.01), decay=0.9),
    "lookahead": fmeta.lookahead(optimizers.adam(0.01), every=2),
    "accumulated": fmeta.accumulate(optimizers.adam(0.01), every=2),
    "half-size state": fmeta.hidden_dtype(optimizers.adam(0.01)),
    "two rules": fmeta.partition(
        {"matrix": optimizers.muon(), "other": optimizers.adamw()},
        lambda path, p: "matrix" if p.ndim == 2 else "other",
    ),
    "learned adam": fmeta.learn(optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.01),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tree_of(named, flat):
    return dict(zip("cadbef", flat, strict=False)) if named else list(flat)


def check(rule, flat, named, grads, groups=1, name=None):
    """Steps of the adapter beside those of the functional form; ``grads``: a list for each."""
    th = rule.init()
    p = tree_of(named, [x.clone() for x in flat])
    own = [torch.nn.Parameter(x.clone()) for x in flat]
    pairs = list(zip("cadbef", own, strict=False)) if named else own
    cut = len(own) // 2 if groups == 2 else 0
    split = [{"params": pairs[:cut]}, {"params": pairs[cut:]}] if cut else pairs
    opt = LearnedOptimizer(split, name or rule, None if name else th, num_steps=7)
    hidden = rule.init_hidden(th, p, num_steps=7)
    for t, values in enumerate(grads):
        loss = torch.tensor(1.0 / (1 + t))
        for x, g in zip(own, values, strict=True):
            x.grad = g
        opt.step(loss=loss)
        with torch.no_grad():
            p, hidden = rule.step(th, p, tree_of(named, values), hidden, loss=loss)
        want = p.values() if named else p
        for i, (x, y) in enumerate(zip(own, want, strict=True)):
            assert torch.equal(x, y), f"parameter {i} after step {t + 1}"
    return opt, hidden


@pytest.mark.parametrize("name", RULES)
@given(st.data())
def test_it_is_that_of_the_functional_form(name, data):
    kinds = st.tuples(shapes(max_ndim=3), st.sampled_from(DTYPES))
    chosen = data.draw(st.lists(kinds, min_size=1, max_size=6))
    flat = [
        torch.randn(shape, generator=fold_in(0, i), dtype=torch.float64).to(dtype)
        for i, (shape, dtype) in enumerate(chosen)
    ]
    named = data.draw(st.booleans())
    # A step without any gradient is none to the adapter, but one to the clock of a schedule.
    some = gradients(flat).filter(lambda grads: any(g is not None for g in grads))
    grads = data.draw(st.lists(some, min_size=1, max_size=4))
    check(RULES[name], flat, named, grads, data.draw(st.sampled_from([1, 2])))


@pytest.mark.parametrize("named", [True, False])
def test_a_rate_of_each_parameter_by_name(named):
    flat = [torch.ones(3), torch.ones(2, 2)]
    rule = optimizers.per_parameter_sgd(tree_of(named, flat))
    grads = [[torch.full((3,), float(t)), torch.ones(2, 2)] for t in range(3)]
    check(rule, flat, named, grads, name="per_parameter_sgd")


def test_a_parameter_that_gets_its_first_gradient_late_starts_as_it_is_then():
    w, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    opt = LearnedOptimizer([w, b], "adam")
    w.grad = torch.ones(2)
    opt.step()
    assert b not in opt.state
    alone = torch.nn.Parameter(torch.ones(3))
    other = LearnedOptimizer([alone], "adam")
    for _ in range(3):
        b.grad = alone.grad = torch.ones(3)
        opt.step()
        other.step()
    assert torch.equal(b, alone)
    assert (opt.state[w]["count"].item(), opt.state[b]["count"].item()) == (4, 3)


def test_one_clipping_for_all_groups():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    rule = fmeta.chain(fmeta.clip_by_global_norm(1.0), optimizers.sgd(1.0))
    opt = LearnedOptimizer([{"params": [a]}, {"params": [b]}], rule)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    opt.step()
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([-0.6, -0.8]))


def test_hidden_states_and_parameters_never_share_memory():
    """A rule may return its gradient or its parameter as state; both change in place."""

    def update(th, params, grads, hidden, *, loss=None, extras=None):
        old = hidden.leaves
        delta = [old[i]["last"] for i in range(len(params))]
        leaves = [{"last": -g, "p": p, "g": g} for p, g in zip(params, grads, strict=True)]
        return delta, fmeta.Hidden(leaves, {})

    def start(th, params, *, num_steps=None):
        return fmeta.Hidden([{"last": 0 * p, "p": p, "g": p} for p in params], {})

    rule = fmeta.Optimizer(lambda generator=None: {}, start, update)
    for options in ({}, {"capturable": True}):
        w = torch.nn.Parameter(torch.zeros(2))
        opt = LearnedOptimizer([w], rule, **options)
        w.grad = torch.empty(2)
        seen = []
        for t in range(1, 5):
            before = w.detach().clone()
            w.grad.fill_(float(t))
            opt.step()
            w.grad.fill_(99.0)
            assert torch.equal(opt.state[w]["p"], before)
            assert opt.state[w]["g"].tolist() == [t, t]
            seen.append(w[0].item())
        assert seen == [0, -1, -3, -6]  # each step is the gradient of the step before


def test_state_of_the_whole_model_is_one_tensor_for_all_parameters():
    flat = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = LearnedOptimizer(flat, "basis_mlp", num_steps=9)
    for p in flat[:2]:
        p.grad = torch.ones(2)
    opt.step()
    flat[0].grad, flat[2].grad = None, torch.ones(2)
    opt.step()  # the first one keeps up although it has no gradient, the third one joins
    held = [opt.state[p]["shared/t"] for p in flat]
    assert held[0] is held[1]
    assert held[1] is held[2]
    assert held[0].item() == 2


def test_all_leaves_are_updated_once_where_the_tree_is_a_dict_in_another_order():
    flat = {
        n: torch.nn.Parameter(torch.randn(2, generator=fold_in(i))) for i, n in enumerate("zay")
    }
    opt = LearnedOptimizer(flat.items(), "basis_mlp", num_steps=9)
    assert trees.leaves(opt._param_tree())[0] is flat["a"]
    for p in flat.values():
        p.grad = torch.ones(2)
    opt.step()
    assert [s["count"].item() for s in opt.state.values()] == [1, 1, 1]
