"""The form of compiled loops: views of what lies in memory as they go over it, else copies."""

from __future__ import annotations

import pytest
import torch

from fmeta.optimizers._features import start_factored
from fmeta.optimizers._forms import form_of, taken
from fmeta.optimizers._normalized_mlp_fused import start_in
from fmeta.optimizers._normalized_mlp_net import MOMENTS

SHAPES = [(9, 8), (1, 8), (2, 5, 12), (16, 8, 3, 3), (9, 16, 1, 1), (2, 8, 10, 2, 3)]


def parts_of(form):
    parts = dict.fromkeys(MOMENTS, form.plane)
    return parts | dict(zip(form.names, (form.first, form.second), strict=True))


def filled(state):
    generator = torch.Generator().manual_seed(0)
    return {k: x.copy_(torch.randn(x.shape, generator=generator)) for k, x in state.items()}


def in_given_order(p):
    row, col = start_factored(p, 3)
    return filled({**{k: torch.zeros_like(p) for k in MOMENTS}, "row": row, "col": col})


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_go_there_and_back(shape):
    form = form_of(shape, 0, 3)
    for name, part in parts_of(form).items():
        x = in_given_order(torch.zeros(shape))[name]
        seen = part.into(x)
        assert seen.shape == part.sizes
        assert seen.is_contiguous()
        assert torch.equal(part.back(seen, tuple(x.shape)), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_in_that_order_is_changed_where_it_lies(shape):
    form = form_of(shape, 0, 3)
    parts, state = parts_of(form), filled(start_in(form, torch.zeros(shape)))
    given, new = taken(parts, state, own=True)
    for (name, part), x in zip(parts.items(), given, strict=True):
        assert torch.equal(x, part.into(state[name].clone()))
        assert new[name] is state[name]
        assert x.data_ptr() == state[name].data_ptr()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("start", ["in that order", "in the given one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_new_state_is_what_the_loops_wrote(shape, start, own):
    form = form_of(shape, 0, 3)
    p = torch.zeros(shape)
    state = filled(start_in(form, p)) if start == "in that order" else in_given_order(p)
    before = {k: x.clone() for k, x in state.items()}
    given, new = taken(parts_of(form), state, own)
    for x in given:
        x.add_(1)
    for name, x in before.items():
        assert torch.equal(new[name], x + 1)
        assert own or torch.equal(state[name], x)


def test_a_stack_has_the_form_of_its_leaves():
    one, stack = form_of((16, 8, 3, 3), 0, 3), form_of((5, 16, 8, 3, 3), 1, 3)
    assert one.plane.sizes == (1, 16, 9, 8)
    assert stack.plane.sizes == (5, 16, 9, 8)
    assert one.names == stack.names


@pytest.mark.parametrize("shape", [(8,), (9, 7), (16, 3, 5, 5), (12, 3, 7, 7)])
def test_short_loops_and_other_pairs_of_axes_have_none(shape):
    assert form_of(shape, 0, 3) is None
