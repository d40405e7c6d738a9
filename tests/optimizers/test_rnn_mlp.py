"""rnn_mlp: validation losses, clipping, tensors that are absent, empty or of many axes, chunks."""

import math

import pytest
import torch

import fmeta
from fmeta import optimizers, trees
from fmeta.optimizers import _rnn_mlp_tensor, rnn_mlp
from fmeta.random import fold_in
from fmeta.testing import LAWS, check_optimizer

DOUBLE = {"dtype": torch.float64}
LOUD = {"step_multiplier": 0.1, "magnitude_rate": 0.1}
SMALL = {"lstm_hidden_size": 6, "hidden_size": 5, "from_mlp_size": 3, "from_lstm_size": 4}


def normal(*shape, key=0):
    return torch.randn(shape, generator=fold_in(23, key, *shape), **DOUBLE)


def start():
    return {"b": normal(3), "s": normal(), "w": normal(4, 3)}


def weights(rule, std=0.1):
    """Weights in float64 of which none is zero."""
    th = trees.cast(rule.init(), torch.float64)
    flat, spec = trees.flatten(th)
    return trees.unflatten(spec, [x + std * normal(*x.shape, key=i) for i, x in enumerate(flat)])


def built(**arguments):
    rule = rnn_mlp(**LOUD, **{**SMALL, **arguments})
    return rule, weights(rule)


def follow(rule, th, params, steps=4, flag=lambda t: None, grads=None):
    """Parameters and state after some steps with gradients of a bowl, noisy losses."""
    hidden = rule.init_hidden(th, params)
    for t in range(steps):
        extras = None if flag(t) is None else {"is_valid": flag(t)}
        slopes = params if grads is None else grads(params)
        loss = 1 + torch.cos(torch.tensor(1.7 * t, **DOUBLE))
        params, hidden = rule.step(th, params, slopes, hidden, loss=loss, extras=extras)
    return params, hidden


def close(got, want, **tolerance):
    torch.testing.assert_close(got, want, **tolerance)


def loud(rule):
    return rule._replace(init=lambda generator=None: weights(rule))


def test_all_laws_with_weights_that_are_not_zero():
    extras = lambda params: {"is_valid": trees.leaves(params)[0].sum() > 1e3}
    report = check_optimizer(
        loud(rnn_mlp(**LOUD, **SMALL)), equivariance="coordinate", extras=extras
    )
    assert set(report.held) == set(LAWS)


def test_laws_in_chunks():
    rule = rnn_mlp(**LOUD, **SMALL, chunk_size=5, hidden_layer=1, decays=(0.3,))
    laws = ["vmap_equals_loop", "permutation_equivariant", "meta_gradients_exact", "runs_on_meta"]
    check_optimizer(loud(rule), equivariance="coordinate", laws=laws)


# -- validation losses ---------------------------------------------------------------------------


def test_a_validation_loss_changes_its_average_and_nothing_else():
    rule, th = built()
    params, hidden = follow(rule, th, start())
    given = {"loss": torch.tensor(3.0, **DOUBLE), "extras": {"is_valid": torch.tensor(True)}}
    delta, after = rule.update(th, params, params, hidden, **given)
    assert all((d == 0).all() for d in delta.values())
    close(after.leaves, hidden.leaves, rtol=0, atol=0)
    changed = {k for k, x in after.shared.items() if not torch.equal(x, hidden.shared[k])}
    assert changed == {"valid_mean", "valid_var", "valid_count"}
    mean = 0.05 * 3.0
    close(after.shared["valid_mean"], torch.tensor(mean, **DOUBLE))
    close(after.shared["valid_var"], torch.tensor(0.05 * (mean - 3.0) ** 2, **DOUBLE))


def test_a_validation_loss_needs_no_gradient():
    rule, th = built()
    params, hidden = follow(rule, th, start())
    given = {"loss": torch.tensor(3.0, **DOUBLE), "extras": {"is_valid": torch.tensor(True)}}
    new, after = rule.step(th, params, dict.fromkeys(params), hidden, **given)
    assert all(new[k] is params[k] for k in params)
    assert int(after.shared["valid_count"]) == 1


def test_later_steps_know_of_the_validation_loss():
    """Of the losses, and of the step: a step of validation counts in the time of the rule."""
    rule, th = built()
    moved = {}
    for value in (0.0, 5.0):
        params, hidden = follow(rule, th, start())
        given = {"loss": torch.tensor(value, **DOUBLE), "extras": {"is_valid": torch.tensor(True)}}
        params, hidden = rule.step(th, params, params, hidden, **given)
        loss = torch.tensor(1.0, **DOUBLE)
        moved[value] = rule.update(th, params, params, hidden, loss=loss)[0]["w"]
    assert (moved[0.0] - moved[5.0]).abs().max() > 1e-4


@pytest.mark.parametrize("flag", [False, torch.tensor(False), torch.tensor(0.0)], ids=repr)
def test_a_false_flag_is_a_step_of_training(flag):
    rule, th = built()
    close(follow(rule, th, start(), flag=lambda t: flag), follow(rule, th, start()))


def test_tasks_of_a_batch_have_flags_of_their_own():
    rule, th = built()
    flags = torch.tensor([[False, True, False, False], [False, False, False, True]])
    params = start()
    run = lambda row: follow(rule, th, params, flag=lambda t: row[t])[0]
    got = torch.vmap(run)(flags)
    for i, row in enumerate(flags):
        close({k: x[i] for k, x in got.items()}, run(row))


def test_a_flag_for_each_tensor_is_refused():
    rule, th = built()
    with pytest.raises(ValueError, match=r"is_valid must be a scalar, got .* shape \(2,\)"):
        follow(rule, th, start(), flag=lambda t: torch.tensor([True, False]))


@pytest.mark.parametrize("copies", [2, 3, 30])
def test_the_number_of_tensors_is_seen_as_its_logarithm(copies):
    """Of equal tensors each steps as one alone whose first bias says that there are more."""
    rule, th = built(decays=(0.3, 0.9))
    many, _ = follow(rule, th, {f"w{i}": start()["w"] for i in range(copies)})
    row = 3 + 4 * 2 + 11  # after features of a coordinate and of time
    more = th["mlp"]["w0"][row] * math.log(copies)
    told = {**th, "mlp": {**th["mlp"], "b0": th["mlp"]["b0"] + more}}
    one, _ = follow(rule, told, {"w": start()["w"]})
    for p in many.values():
        close(p, one["w"])
    assert (follow(rule, th, {"w": start()["w"]})[0]["w"] - one["w"]).abs().max() > 1e-4


def averaged(losses, decay):
    """Mean and deviation as the reference has them, corrected for their start at zero."""
    mean = var = 0.0
    for x in losses:
        mean = decay * mean + (1 - decay) * x
        var = decay * var + (1 - decay) * (mean - x) ** 2
    correction = 1 / (1 - decay ** len(losses) + 1e-8) if losses else 0.0
    return mean * correction, math.sqrt(var * correction + 1e-8)


@pytest.mark.parametrize(
    ("train", "valid", "seen"),
    [
        ([2.0], [], (0.0, -1.1111)),  # the deviation is about an average of a tenth of it
        ([1e-6], [1.0], (0.0, 5.0)),
        ([1e-6], [-1.0], (0.0, -5.0)),
        ([1.0] * 60, [3.0, 1.0], (0.0, 5.0)),
        ([1.0] * 60 + [-1e3], [1.0], (-3.1592, 0.3516)),
        ([1.0, 2.0, 4.0], [2.0, 3.0], (0.6763, 0.0319)),
    ],
    ids=["first", "far above", "far below", "still", "a jump", "some"],
)
def test_what_is_seen_of_losses_stays_within_five(train, valid, seen):
    shared = _rnn_mlp_tensor.start(torch.zeros((), **DOUBLE))
    for x in valid:
        shared = _rnn_mlp_tensor.after_valid_loss(shared, torch.tensor(x, **DOUBLE))
    for x in train:
        loss = torch.tensor(x, **DOUBLE)
        got, shared = _rnn_mlp_tensor.after_loss(shared, loss, torch.ones(3, **DOUBLE))
    mean, deviation = averaged(train, 0.9)
    other, _ = averaged(valid, 0.95)
    want = [max(-5.0, min(5.0, (x - mean) / deviation)) for x in (train[-1], other)]
    close(got, torch.tensor(want, **DOUBLE), rtol=1e-6, atol=1e-6)
    close(got, torch.tensor(seen, **DOUBLE), rtol=0, atol=1e-4)


def test_of_a_far_validation_loss_before_the_first_step_only_the_side_is_seen():
    rule, th = built()

    def first(valid, loss):
        hidden = rule.init_hidden(th, start())
        for x, flag in ((valid, True), (loss, False)):
            given = {"loss": torch.tensor(x, **DOUBLE), "extras": {"is_valid": flag}}
            delta, hidden = rule.update(th, start(), start(), hidden, **given)
        return delta

    close(first(1.0, 1e-6), first(9.0, 1e-6), rtol=0, atol=0)
    assert (first(-1.0, 1e-6)["w"] - first(1.0, 1e-6)["w"]).abs().max() > 1e-4
    assert (first(1.0, 1.0)["w"] - first(9.0, 1.0)["w"]).abs().max() > 1e-4


# -- gradients -----------------------------------------------------------------------------------


def test_the_first_gradients_are_clipped_to_ten():
    rule, th = built()
    of = lambda size: follow(
        rule, th, start(), 1, grads=lambda p: {k: size * x.sign() for k, x in p.items()}
    )
    close(of(1e6), of(10.0))
    assert (of(9.0)[0]["w"] - of(10.0)[0]["w"]).abs().max() > 1e-6


def test_the_limit_follows_the_gradients():
    """After many steps with elements of size 2 it is about ten times that."""
    rule, th = built()
    grads = lambda p: {k: 2 * torch.ones_like(x) for k, x in p.items()}
    shared = follow(rule, th, start(), 300, grads=grads)[1].shared
    close(shared["clip"] / (1 - 0.99**301), torch.tensor(2.0, **DOUBLE), rtol=0.05, atol=0)


def test_tensors_without_a_gradient_are_as_if_there_were_none():
    rule, th = built()
    absent = lambda p: {k: None if k == "s" else x for k, x in p.items()}
    got, hidden = follow(rule, th, start(), grads=absent)
    want, _ = follow(rule, th, {k: x for k, x in start().items() if k != "s"})
    assert torch.equal(got["s"], start()["s"])
    close({k: got[k] for k in want}, want)
    close(hidden.leaves["s"], rule.init_hidden(th, start()).leaves["s"], rtol=0, atol=0)


def test_zero_gradients_and_parameters_have_finite_derivatives():
    rule, th = built()
    zeros = {k: torch.zeros_like(x) for k, x in start().items()}

    def moved(th, params):
        new, _ = follow(rule, th, params, 2, grads=lambda p: {k: 0 * x for k, x in p.items()})
        return torch.stack([x.square().sum() + x.sum() for x in new.values()]).sum()

    slope = lambda *xs: torch.func.grad(moved, argnums=(0, 1))(*xs)
    total = lambda *xs: torch.stack([g.sum() for g in trees.leaves(slope(*xs))]).sum()
    for found in (slope(th, zeros), torch.func.grad(total, argnums=(0, 1))(th, zeros)):
        assert all(bool(g.isfinite().all()) for g in trees.leaves(found))


# -- shapes --------------------------------------------------------------------------------------


def test_an_empty_tensor_is_finite_and_stays():
    rule, th = built()
    params = {**start(), "none": torch.zeros(0, 2, **DOUBLE)}
    new, hidden = follow(rule, th, params)
    assert all(bool(x.isfinite().all()) for x in trees.leaves((new, hidden)))
    assert new["none"].shape == (0, 2)
    alone, hidden = follow(rule, th, {"none": params["none"]})
    assert all(bool(x.isfinite().all()) for x in trees.leaves((alone, hidden)))


def test_axes_after_the_fourth_are_not_seen():
    rule, th = built()
    x = normal(2, 1, 3, 2)
    four, five = (follow(rule, th, {"k": y})[0]["k"] for y in (x, x[..., None]))
    close(five[..., 0], four)
    split = follow(rule, th, {"k": x.reshape(2, 1, 3, 1, 2)})[0]["k"]
    assert (split.reshape(x.shape) - four).abs().max() > 1e-6  # the fourth is


def test_chunks_change_neither_values_nor_derivatives():
    th = built()[1]

    def moved(th, size):
        new, _ = follow(rnn_mlp(**LOUD, **SMALL, chunk_size=size), th, start())
        return torch.stack([x.square().sum() for x in new.values()]).sum()

    want = torch.func.grad(moved)(th, None)
    for size in (1, 5, 12):
        close(moved(th, size), moved(th, None))
        close(torch.func.grad(moved)(th, size), want)


def test_weights_of_other_sizes_than_the_arguments_work():
    rule, th = built()
    close(follow(rnn_mlp(**LOUD), th, start()), follow(rule, th, start()))


def test_every_weight_is_learned():
    """All have a meta-gradient after three steps, those of the first messages too."""
    rule = rnn_mlp(**LOUD, **SMALL)
    th = trees.cast(rule.init(), torch.float64)
    meta = lambda th: torch.stack(
        [x.square().sum() for x in follow(rule, th, start())[0].values()]
    ).sum()
    grads = torch.func.grad(meta)(th)
    for path, g in zip(trees.paths(grads), trees.leaves(grads), strict=True):
        assert g.abs().max() > 0, path


def test_an_outer_loop_makes_it_better():
    rule = rnn_mlp(step_multiplier=0.05, **SMALL)
    outer, th = optimizers.adam(0.02), rule.init()
    state, target = outer.init_hidden({}, th), torch.linspace(-1, 1, 5)
    loss = lambda p, b: (p["w"] - target).square().mean()

    def meta(th):
        return fmeta.unroll(rule, loss, th, {"w": torch.zeros(5)}, torch.zeros(8)).losses[-1]

    first = meta(th)
    for _ in range(25):
        th, state = outer.step({}, th, torch.func.grad(meta)(th), state)
    assert meta(th) < 0.5 * first


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hidden_layer": 0}, ValueError, "hidden_layer must be a positive integer, got 0"),
        ({"lstm_to_ff": 2.0}, ValueError, "lstm_to_ff must be a positive integer, got 2.0"),
        ({"decays": ()}, ValueError, "decays must hold at least one decay"),
        ({"decays": (0.9, 1.0)}, ValueError, r"decays\[1\] must be not negative and below 1"),
        ({"step_multiplier": -1.0}, ValueError, "step_multiplier must be not negative"),
        ({"magnitude_rate": "a"}, TypeError, "magnitude_rate must be a number"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        rnn_mlp(**arguments)


def test_a_missing_loss_and_weights_of_another_rule_are_named():
    rule, params = rnn_mlp(), {"w": torch.ones(2)}
    hidden = rule.init_hidden(rule.init(), params)
    with pytest.raises(ValueError, match="needs the loss"):
        rule.step(rule.init(), params, params, hidden, extras={"is_valid": torch.tensor(True)})
    other = optimizers.nn_adam()
    with pytest.raises(ValueError, match="opt_params do not fit this optimizer"):
        rule.step(other.init(), params, params, hidden, loss=torch.tensor(1.0))
