"""The optimizer type: step adds the delta once, asks for what it needs, skips None."""

import numpy as np
import pytest
import torch

import fmeta
from fmeta import optimizers, trees
from fmeta.optimizer import Hidden, Optimizer, apply_updates, optimizer_from_step

PARAMS = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}


def descend(th, p, g, h, **extra):
    return fmeta.trees.map(lambda x: None if x is None else -0.5 * x, g), h


def plain(update=descend, needs=()):
    return Optimizer(
        lambda generator=None: {}, lambda th, p, *, num_steps=None: {}, update, frozenset(needs)
    )


def test_step_is_params_plus_delta():
    rule = plain()
    delta, _ = rule.update({}, PARAMS, PARAMS, {})
    new, _ = rule.step({}, PARAMS, PARAMS, {})
    assert all(torch.equal(new[k], PARAMS[k] + delta[k]) for k in PARAMS)


def test_the_sum_is_taken_in_the_compute_dtype_and_cast_once():
    p, d = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.003)
    assert apply_updates(p, d).dtype is torch.bfloat16
    assert apply_updates(p, d) == (p.float() + d).bfloat16()
    # bfloat16 + bfloat16 would have lost this small change of a sum
    big, change = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.00391)
    assert apply_updates(big, change) == (1.00391 * torch.ones(())).bfloat16()


def test_a_none_delta_returns_the_parameter_itself():
    new = apply_updates(PARAMS, {"w": None, "b": torch.tensor(1.0)})
    assert new["w"] is PARAMS["w"]
    assert new["b"] == 4


def test_step_passes_loss_and_extras_on():
    seen = {}

    def update(th, p, g, h, *, loss=None, extras=None):
        seen.update(loss=loss, extras=extras)
        return g, h

    plain(update).step({}, PARAMS, PARAMS, {}, loss=torch.tensor(1.0), extras={"noise": 2})
    assert seen == {"loss": torch.tensor(1.0), "extras": {"noise": 2}}


def test_default_eval_params_are_the_parameters():
    assert plain().eval_params({}, PARAMS, {}) is PARAMS


def test_from_step_equals_the_same_rule_written_as_update():
    step = lambda th, p, g, h: ({k: p[k] - 0.5 * g[k] for k in p}, h)
    rule = optimizer_from_step(lambda generator: {}, lambda th, p: {}, step)
    got = rule.step(rule.init(), PARAMS, PARAMS, rule.init_hidden({}, PARAMS))[0]
    want = plain().step({}, PARAMS, PARAMS, {})[0]
    assert all(torch.equal(got[k], want[k]) for k in PARAMS)


def test_from_step_passes_only_the_keywords_that_step_names():
    step = lambda th, p, g, h, loss: ({k: p[k] - loss * g[k] for k in p}, h)
    rule = optimizer_from_step(lambda generator: {}, lambda th, p: {}, step, needs={"loss"})
    new, _ = rule.step({}, PARAMS, PARAMS, {}, loss=torch.tensor(1.0), extras={"x": 1})
    assert all((x == 0).all() for x in new.values())


def test_from_step_passes_the_horizon_to_an_init_hidden_that_names_it():
    start = lambda th, p, *, num_steps: {"n": num_steps}
    rule = optimizer_from_step(lambda generator: {}, start, lambda th, p, g, h: (p, h))
    assert rule.init_hidden({}, PARAMS, num_steps=7) == {"n": 7}


def test_from_step_passes_everything_to_one_that_takes_any_keyword():
    step = lambda th, p, g, h, **given: (p, given)
    rule = optimizer_from_step(lambda generator: {}, lambda th, p: {}, step)
    hidden = rule.step({}, PARAMS, PARAMS, {}, extras={"a": 1})[1]
    assert hidden == {"loss": None, "extras": {"a": 1}}


def test_from_step_names_the_leaf_that_step_returned_in_another_shape():
    step = lambda th, p, g, h: ({**p, "w": p["w"][:1]}, h)
    rule = optimizer_from_step(lambda generator: {}, lambda th, p: {}, step)
    with pytest.raises(ValueError, match=r"parameters that `step` returned at path w.*\(1,\)"):
        rule.step({}, PARAMS, PARAMS, {})


def test_a_wrong_delta_is_named_by_path_and_shapes():
    rule = plain(lambda th, p, g, h, **extra: ({**g, "w": torch.ones(3)}, h))
    with pytest.raises(ValueError, match=r"the optimizer's delta at path w has shape \(3,\)"):
        rule.step({}, PARAMS, PARAMS, {})


def test_a_hand_written_state_takes_no_none_gradient():
    with pytest.raises(ValueError, match=r"None\) at path b.*Hidden\(leaves, shared\).*zeros"):
        plain().step({}, PARAMS, {**PARAMS, "b": None}, {})


def test_a_state_that_splits_by_leaf_does():
    rule = optimizers.adam(0.1)
    hidden = rule.init_hidden({}, PARAMS)
    new, after = rule.step({}, PARAMS, {**PARAMS, "b": None}, hidden)
    assert new["b"] is PARAMS["b"]
    assert after.leaves["b"] is hidden.leaves["b"]


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"loss"}, r"needs the loss: call step\(\.\.\., loss=loss\)"),
        ({"noise", "activations"}, r"needs activations, noise: pass extras=\{'activations': "),
    ],
)
def test_what_is_needed_and_missing_is_named(needs, words):
    with pytest.raises(ValueError, match=words):
        plain(needs=needs).step({}, PARAMS, PARAMS, {})


def test_hidden_is_leaves_and_shared():
    hidden = optimizers.adam().init_hidden({}, PARAMS)
    assert isinstance(hidden, Hidden)
    assert set(hidden.leaves) == set(PARAMS)
    assert hidden.shared == {}


def test_the_number_of_steps_may_be_one_of_numpy():
    rule, params = fmeta.optimizers.mlp(), {"w": torch.ones(3)}
    got, want = (rule.init_hidden(rule.init(), params, num_steps=n) for n in (np.int64(10), 10))
    assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
