"""The strategies give what they promise, and reach the corners they are for."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from fmeta import trees
from fmeta.testing import gradients, param_trees, shapes, step_counts

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
QUIET = settings(
    max_examples=400,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # shrinking what was found would take the longest
    suppress_health_check=list(HealthCheck),
)


@given(st.data())
def test_trees_and_gradients_fit(data):
    params = data.draw(param_trees(DTYPES))
    flat = trees.leaves(params)
    assert flat
    assert all(p.dtype in DTYPES and p.ndim <= 4 and p.numel() <= 40 for p in flat)
    grads = trees.match(params, data.draw(gradients(params)), "the gradient")
    for p, g in zip(flat, grads, strict=True):
        assert g is None or (g.dtype, g.device) == (p.dtype, p.device)
        assert g is None or bool(g.isfinite().all())
    assert 1 <= data.draw(step_counts(4)) <= 4


def nodes(tree):
    if isinstance(tree, torch.Tensor):
        return set()
    children = tree.values() if isinstance(tree, dict) else tree
    kind = "named" if hasattr(tree, "_fields") else type(tree).__name__
    return {kind}.union(*map(nodes, children))


@pytest.mark.parametrize("kind", ["dict", "list", "tuple", "named"])
def test_every_node_occurs(kind):
    assert kind in nodes(find(param_trees(), lambda t: kind in nodes(t), settings=QUIET))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 1, 2), (1, 1, 2, 1)])
def test_every_kind_of_shape_occurs(shape):
    assert find(shapes(), lambda s: s == shape, settings=QUIET) == shape


def test_shapes_without_empty_ones():
    with pytest.raises(Exception, match="No"):
        find(shapes(empty=False), lambda s: 0 in s, settings=QUIET)


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        ("normal", lambda g: 1e-3 < g.abs().max() < 1e2),
        ("zero", lambda g: g.abs().max() == 0),
        ("tiny", lambda g: 0 < g.abs().max() < 1e-28),
        ("huge", lambda g: g.abs().max() > 1e6),
        ("none", lambda g: g is None),
    ],
)
def test_kinds_of_gradients(kind, holds):
    (g,) = find(gradients((torch.ones(3),), [kind]), lambda g: True, settings=QUIET)
    assert holds(g)
    with pytest.raises(ValueError, match=r"unknown kind 'odd'.*normal"):
        gradients((torch.ones(3),), ["odd"])


def test_values_are_reproducible():
    first, second = (
        find(param_trees(), lambda t: len(trees.leaves(t)) > 2, settings=QUIET) for _ in range(2)
    )
    assert all(map(torch.equal, trees.leaves(first), trees.leaves(second)))
