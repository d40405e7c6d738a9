"""Recorded functions give what they give unrecorded, bit for bit, in fewer calls."""

from functools import partial

import pytest
import torch
from torch.func import grad_and_value

from fmeta import trees
from fmeta._strides import in_strides, packed_strides
from fmeta._trace import Traced
from fmeta._trace_gradient import TracedWithGradient
from fmeta.optimizers._features import is_unobserved
from fmeta.random import fold_in


def step(params, batch):
    """A step under `vmap` with a gradient in it, on trees."""

    def loss(p, x):
        return torch.tanh(x @ p["w"]).square().mean()

    grads, value = torch.vmap(grad_and_value(loss))(params, batch["x"])
    return trees.map(lambda p, g: p - 0.1 * g, params, grads), (value, batch["count"] + 1)


def arguments(seed, width=4, dtype=torch.float32):
    w, x = (torch.randn(3, 5, width, generator=fold_in(seed, i), dtype=dtype) for i in (0, 1))
    return {"w": w}, {"x": x.transpose(1, 2), "count": torch.tensor(seed)}


def test_replayed_steps_are_equal_bit_for_bit():
    recorded = Traced(step)
    for seed in range(3):
        got, want = recorded(*arguments(seed)), step(*arguments(seed))
        assert trees.flatten(got)[1] == trees.flatten(want)[1]
        assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))


def test_it_is_recorded_once_for_each_structure_shape_and_dtype():
    calls = []

    def counted(*args):
        calls.append(args)
        return step(*args)

    recorded = Traced(counted)
    for kind in ({}, {"width": 6}, {"dtype": torch.float64}):
        before = len(calls)
        recorded(*arguments(0, **kind))
        after = len(calls)
        assert after > before
        for seed in (1, 2):
            got, want = recorded(*arguments(seed, **kind)), step(*arguments(seed, **kind))
            assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
        assert len(calls) == after


def test_arguments_are_left_alone():
    args = arguments(0)
    before = trees.map(torch.clone, args)
    recorded = Traced(step)
    recorded(*args)
    recorded(*args)
    assert all(map(torch.equal, trees.leaves(args), trees.leaves(before)))


def test_a_tensor_that_is_given_twice_is_two_arguments():
    recorded = Traced(lambda a, b: a - 2 * b)
    x, y = torch.ones(2), torch.full((2,), 5.0)
    recorded(x, x)
    assert torch.equal(recorded(x, y), x - 2 * y)
    assert torch.equal(recorded(y, x), y - 2 * x)


def test_the_first_calls_may_be_left_unrecorded():
    recorded = Traced(step, after=2)
    for seed in range(4):
        got, want = recorded(*arguments(seed)), step(*arguments(seed))
        assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
        assert bool(recorded.recorded) == (seed >= 2)


def test_a_result_is_not_changed_by_the_next_call():
    recorded = Traced(step)
    first = recorded(*arguments(0))
    copies = trees.map(torch.clone, first)
    recorded(*arguments(1))
    assert all(map(torch.equal, trees.leaves(first), trees.leaves(copies)))


def test_nothing_is_differentiated():
    params, batch = arguments(0)
    params = trees.map(lambda x: x.requires_grad_(), params)
    assert not any(x.requires_grad for x in trees.leaves(Traced(step)(params, batch)))


def test_what_cannot_be_recorded_is_called_as_it_is():
    def branch(x):
        return x + 1 if x.sum() > 0 else x - 1

    recorded = Traced(branch)
    for value in (1.0, -1.0):
        x = torch.full((2,), value)
        assert torch.equal(recorded(x), branch(x))


def test_errors_are_those_of_the_function():
    def wrong(x):
        raise ValueError("shape of your data")

    with pytest.raises(ValueError, match="shape of your data"):
        Traced(wrong)(torch.ones(2))


def test_what_changes_from_call_to_call_is_not_frozen():
    calls = [0]

    def counting(x):
        calls[0] += 1
        return x + calls[0]

    recorded = Traced(counting)
    first, second = recorded(torch.zeros(1)), recorded(torch.zeros(1))
    assert second == first + 1


def test_views_that_are_edited_in_place_stay_views_of_their_own():
    def squeezed(x):
        y = x.view(1, 3).detach()
        y.squeeze_(0)
        return y + 1, x.view(1, 3) * 2

    x = torch.arange(3.0).reshape(1, 3)
    got, want = Traced(squeezed)(x), squeezed(x)
    assert all(map(torch.equal, got, want))
    assert [y.shape for y in got] == [y.shape for y in want]


def test_what_cannot_be_recorded_cannot_be_compiled():
    with pytest.raises(ValueError, match="cannot be compiled"):
        Traced(lambda x: x + 1 if x.sum() > 0 else x, compile=True)(torch.ones(1))


@pytest.mark.parametrize("traced", [Traced, partial(TracedWithGradient, differentiated=1)])
def test_errors_of_the_function_are_not_taken_for_what_cannot_be_compiled(traced):
    with pytest.raises(RuntimeError, match="must match"):
        traced(lambda x: x + torch.ones(3), compile=True)(torch.ones(2))


@pytest.mark.slow
def test_compiled_is_equal_to_rounding():
    recorded, compiled = Traced(step), Traced(step, compile=True)
    for i in range(2):
        got, want = compiled(*arguments(i)), recorded(*arguments(i))
        trees.map(torch.testing.assert_close, got, want)


def test_what_reads_an_input_by_its_place_in_memory_is_not_recorded():
    def diagonal(x):
        return x.view(9).as_strided((3,), (4,), x.storage_offset()) * 2

    call, both = Traced(diagonal), torch.arange(18.0).view(2, 3, 3)
    for x in (*both, *both):
        assert torch.equal(call(x), x.diagonal() * 2)
    assert [replay for replay, _ in call.recorded.values()] == [None]


def test_what_is_handed_on_is_compiled_for_as_it_lies_in_memory(monkeypatch):
    seen = []

    def compiled(module, **kwargs):
        def call(*flat):
            seen.append([x.stride() for x in flat])
            return module(*flat)

        return call

    def turning(scale, state, x):
        """Its state is in another order in memory than it began in."""
        return (scale * state.mT.contiguous() + 1).mT, x.sum()

    monkeypatch.setattr(torch, "compile", compiled)
    recorded, calls = Traced(turning, compile=True, carried=(1, 2)), 3
    scale, got, x = torch.tensor(2.0), torch.arange(6.0).view(2, 3), torch.ones(1, 4)
    want = got
    for _ in range(calls):
        # A view of something larger, with gaps, and an expanded one, are copied.
        wide = torch.zeros(2, 4)
        wide[:, :3] = want
        for given in (got, wide[:, :3]):
            found, total = recorded(scale, given, x.expand(5, 4))
            torch.testing.assert_close(found, turning(scale, want, x)[0])
            assert total == 20
        got, want = found, turning(scale, want, x)[0]
    assert seen == [[(), (1, 2), (4, 1)]] * 2 * calls


@pytest.mark.parametrize(
    ("shape", "strides", "want"),
    [
        ((2, 3), (3, 1), (3, 1)),
        ((2, 3), (1, 2), (1, 2)),
        ((2, 3), (8, 2), (3, 1)),  # with gaps
        ((4, 1, 3), (3, 3, 1), (3, 3, 1)),
        ((4, 3), (0, 1), (3, 1)),  # spread out
        ((0, 3), (3, 1), (3, 1)),
        ((), (), ()),
    ],
)
def test_packed_strides_keep_the_order_of_axes(shape, strides, want):
    x = torch.empty(64).as_strided(shape, strides)
    assert packed_strides(x) == want
    y = in_strides(x, packed_strides(x))
    assert y.stride() == want
    assert torch.equal(y, x)
    assert (y is x) == (strides == want)


def test_replays_take_tensors_in_another_order_in_memory():
    def fn(x):
        return x.reshape(-1) * 2, x + 1  # a view of what is recorded with

    traced, x = Traced(fn), torch.randn(4, 5)
    for given in (x, x.mT.contiguous().mT, x):
        for found, want in zip(traced(given), fn(given), strict=True):
            assert torch.equal(found, want)
    assert len(traced.recorded) == 1


def test_views_of_what_is_spread_out_are_not_dropped():
    def fn(x):
        return x.mT * 2 + x

    traced, x = Traced(fn), torch.arange(9.0).reshape(3, 3)
    for given in (torch.zeros(()).expand(3, 3), x):
        assert torch.equal(traced(given), fn(given))


def test_what_is_recorded_is_compared_with_the_same_form():
    def fn(x):
        return x + 1 if is_unobserved(x) else (x + 0.5) + 0.5  # as rules do, equal to rounding

    traced, x = Traced(fn), torch.full((3,), 1 / 3)
    want = (x + 0.5) + 0.5
    assert torch.equal(traced(x), want)
    assert next(iter(traced.recorded.values()))[0] is not None
