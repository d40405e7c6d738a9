"""Rules that say that they treat leaves apart: one leaf after another gives the bits of all."""

import inspect

import pytest
import torch
from torch.testing import assert_close

import fmeta
from fmeta import combinators, optimizers, trees
from fmeta._leafwise import is_leafwise
from fmeta.random import fold_in

PARAMS = {
    name: torch.randn(shape, generator=fold_in(1, i), dtype=torch.float64)
    for i, (name, shape) in enumerate({"a": (4, 3), "b": (3,), "c": (5, 2), "d": (2,)}.items())
}
GRADS = [
    {
        name: torch.randn(p.shape, generator=fold_in(2, t, i), dtype=p.dtype)
        for i, (name, p) in enumerate(PARAMS.items())
    }
    for t in range(3)
]


def plain(builder):
    first = next(iter(inspect.signature(builder).parameters.values()), None)
    return builder(PARAMS) if first is not None and first.default is first.empty else builder()


RULES = {name: lambda b=builder: plain(b) for name, builder in optimizers.BUILDERS.items()} | {
    "learn": lambda: fmeta.learn(optimizers.adam, {"lr": "log"}),
    "with_weight_decay": lambda: combinators.with_weight_decay(optimizers.adam(), 0.1),
    "averaged": lambda: combinators.averaged(optimizers.adam(), 0.9),
    "lookahead": lambda: combinators.lookahead(optimizers.adam()),
}
MARKED = [name for name, build in RULES.items() if is_leafwise(build())]


def test_rules_that_look_at_the_whole_tree_are_not_marked():
    assert {"adam", "muon", "lstm", "normalized_mlp", "learn", "with_weight_decay"} <= set(MARKED)
    assert "basis_mlp" not in MARKED
    clip = combinators.clip_by_global_norm(1.0)
    assert not is_leafwise(clip)
    assert not is_leafwise(combinators.chain(clip, optimizers.adam()))


@pytest.mark.parametrize("name", MARKED)
def test_leaf_after_leaf_is_all_at_once(name):
    rule = RULES[name]()
    opt_params = rule.init()
    together = PARAMS, rule.init_hidden(opt_params, PARAMS, num_steps=len(GRADS))
    apart = together
    extra = {"loss": torch.tensor(1.0, dtype=torch.float64)} if "loss" in rule.needs else {}
    for grads in GRADS:
        together = rule.step(opt_params, together[0], grads, together[1], **extra)
        params, hidden = apart
        for leaf in PARAMS:
            alone = {k: g if k == leaf else None for k, g in grads.items()}
            blank = {k: p if k == leaf else torch.zeros_like(p) for k, p in params.items()}
            new, after = rule.step(opt_params, blank, alone, hidden, **extra)
            assert all(
                x is y
                for x, y in zip(
                    trees.leaves(after.shared), trees.leaves(hidden.shared), strict=True
                )
            )
            params = {**params, leaf: new[leaf]}
            hidden = hidden._replace(leaves={**hidden.leaves, leaf: after.leaves[leaf]})
        apart = params, hidden
    # Leaves of one shape may be updated in one batch: to rounding.
    assert_close(apart[0], together[0], rtol=1e-12, atol=1e-12)
    assert_close(apart[1].leaves, together[1].leaves, rtol=1e-12, atol=1e-12)
