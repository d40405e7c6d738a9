"""Rules written out unit by unit for a compiler: the same numbers as by matrix products."""

import pytest
import torch

from fmeta import optimizers, trees
from fmeta._trace import Traced, for_compiler
from fmeta.random import fold_in

RULES = {
    "adafactor_mlp": lambda: optimizers.adafactor_mlp(step_mult=0.1, exp_mult=0.1),
    "adafactor_mlp, several rms": lambda: optimizers.adafactor_mlp(
        step_mult=0.1, initial_rms_decays=(0.9, 0.99, 0.999)
    ),
    "normalized_mlp": lambda: optimizers.normalized_mlp(lr=0.1, weight_decay=0.01),
    "normalized_mlp, orthogonal": lambda: optimizers.normalized_mlp(lr=0.1, orthogonalize=True),
}
SHAPES = {
    "matrix": (30, 18),
    "small": (4, 5),
    "vector": (7,),
    "kernels": (10, 8, 3, 3),
    "thin": (64, 1, 9),  # rows are of the kernels, too
}


def draw(i, *shape):
    return torch.randn(shape, generator=fold_in(3, i), dtype=torch.float64)


def a_step(rule):
    """A step of two members, its arguments, and a list of what the rule was told."""
    theta = trees.cast(rule.init(), torch.float64)
    seen = []

    def run(theta, params, hidden, grads):
        seen.append(for_compiler())
        return rule.step(theta, params, grads, hidden)

    theta = trees.map(lambda x: x + 0.1 * draw(1, 2, *x.shape), theta)
    params, grads = ({k: draw(i, 2, *s) for k, s in SHAPES.items()} for i in (2, 3))
    hidden = torch.vmap(rule.init_hidden)(theta, params)
    return torch.vmap(run), (theta, params, hidden, grads), seen


@pytest.fixture
def graphs(monkeypatch):
    """What is given to the compiler, which is left out."""
    found = []
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: found.append(module) or module)
    return found


@pytest.mark.parametrize("name", RULES)
def test_the_numbers_are_the_same_without_a_product_of_all_coordinates(name, graphs):
    run, (theta, *state, grads), seen = a_step(RULES[name]())
    recorded = Traced(run, compile=True, written_out=True, carried=(1, 3))
    got = want = state
    for _ in range(3):  # the state is handed on as it lies in memory
        got, want = recorded(theta, *got, grads), run(theta, *want, grads)
        for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        grads = trees.map(lambda g: g - 1, grads)
    assert any(seen)
    (graph,) = graphs
    shapes = [
        n.meta["val"].shape for n in graph.graph.nodes if n.target is torch.ops.aten.bmm.default
    ]
    lengths = {shape[-1] for shape in shapes}
    assert not lengths & {30 * 18, 10 * 8 * 9, 64 * 9}
    assert 4 * 5 in lengths  # small tensors keep theirs
    # Kernels from the smallest axis to the largest, in the same order from step to step.
    assert got[1].leaves["kernels"]["m0"].stride() == (720, 1, 10, 240, 80)


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"written_out": True}], ids=str)
def test_only_for_a_compiler_and_where_it_is_asked_for(options, graphs):
    run, args, seen = a_step(RULES["normalized_mlp"]())
    Traced(run, **options)(*args)
    assert seen
    assert not any(seen)
    assert not for_compiler()
