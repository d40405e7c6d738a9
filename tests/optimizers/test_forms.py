"""The form of compiled loops: views of what lies in memory as they go over it, else copies."""

from __future__ import annotations

import pytest
import torch

from fmeta import optimizers
from fmeta.optimizers import _forms
from fmeta.optimizers._features import start_factored
from fmeta.optimizers._forms import taken
from fmeta.optimizers._normalized_mlp_fused import form_of, start_in
from fmeta.optimizers._normalized_mlp_net import MOMENTS

SHAPES = [(9, 8), (1, 8), (2, 5, 12), (16, 8, 3, 3), (9, 16, 1, 1), (2, 8, 10, 2, 3)]


def forms_of(shape):
    """Of a rule that normalises over matrices or kernels, and of one that sees all other axes."""
    return [x for x in (form_of(shape, 0), _forms.form_of(shape, 0, 3)) if x is not None]


def filled(state):
    generator = torch.Generator().manual_seed(0)
    return {k: x.copy_(torch.randn(x.shape, generator=generator)) for k, x in state.items()}


def in_given_order(p):
    row, col = start_factored(p, 3)
    return filled({**{k: torch.zeros_like(p) for k in MOMENTS}, "row": row, "col": col})


@pytest.mark.parametrize("shape", [*SHAPES, (12, 3, 7, 7), (9, 2), (3, 20, 4)])
def test_parts_go_there_and_back(shape):
    for form in forms_of(shape):
        for name, part in form.parts(MOMENTS).items():
            x = in_given_order(torch.zeros(shape))[name]
            assert x.shape == part.shape
            seen = part.into(x)
            assert seen.shape == part.sizes
            assert seen.is_contiguous()
            assert torch.equal(part.back(seen), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_in_that_order_is_changed_where_it_lies(shape):
    for form in forms_of(shape):
        parts, state = form.parts(MOMENTS), filled(start_in(form, torch.zeros(shape)))
        given, new = taken(parts, state, torch.zeros(shape), own=True)
        for (name, part), x in zip(parts.items(), given, strict=True):
            assert torch.equal(x, part.into(state[name].clone()))
            assert new[name] is state[name]
            assert x.data_ptr() == state[name].data_ptr()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("start", ["in that order", "in the given one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_new_state_is_what_the_loops_wrote(shape, start, own):
    form, p = form_of(shape, 0), torch.zeros(shape)
    state = filled(start_in(form, p)) if start == "in that order" else in_given_order(p)
    before = {k: x.clone() for k, x in state.items()}
    given, new = taken(form.parts(MOMENTS), state, p, own)
    for x in given:
        x.add_(1)
    for name, x in before.items():
        assert torch.equal(new[name], x + 1)
        assert own or torch.equal(state[name], x)


def test_a_stack_has_the_form_of_its_leaves():
    one, stack = form_of((16, 8, 3, 3), 0), form_of((5, 16, 8, 3, 3), 1)
    assert one.plane.sizes == (1, 16, 9, 8)
    assert stack.plane.sizes == (5, 16, 9, 8)
    assert one.rows_first == stack.rows_first


@pytest.mark.parametrize("shape", [(8,), (9, 7), (16, 3, 5, 5), (12, 3, 7, 7)])
def test_short_loops_and_other_pairs_of_axes_have_none(shape):
    assert form_of(shape, 0) is None


@pytest.mark.parametrize("other", [torch.zeros(96, 128), torch.zeros(120, 96).double()])
def test_a_state_of_another_leaf_is_refused(other):
    p = torch.zeros(128, 96, dtype=other.dtype)
    form = form_of((128, 96), 0)
    theirs = start_in(form_of(tuple(other.shape), 0), other.float())
    with pytest.raises(RuntimeError, match=r"'m0' is .* has to be \(128, 96\)"):
        taken(form.parts(MOMENTS), theirs, p, own=True)


@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["normalized_mlp", "adafactor_mlp"])
def test_steps_name_the_leaf_whose_state_is_anothers(name, compile, leaves):
    rule = getattr(optimizers, name)(compile=compile)
    th = rule.init()
    params = {str(i): torch.ones(100, 96) for i in range(leaves)}
    hidden = rule.init_hidden(th, params)
    for grown in (torch.ones(120, 96), torch.ones(100, 96).double()):
        grown = dict.fromkeys(params, grown)
        with pytest.raises(ValueError, match=r"hidden state at path 0 holds .* \(100, 96\), .*32"):
            rule.step(th, grown, grown, hidden)
