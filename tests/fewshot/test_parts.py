"""Meta-parameters of another learner, or parts of one's own, are told by name."""

import collections

import pytest
import torch

from fmeta import fewshot

from . import kit


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_a_missing_part_is_named(name):
    learner = kit.LEARNERS[name]()
    whole = learner.init()
    _, (support, query, classes) = kit.points(2)
    episodes, one = (support, query, classes), (support.x[0], support.y[0])
    for part in whole:
        rest = {k: v for k, v in whole.items() if k != part}
        message = rf"meta_params has no '{part}', only .*: give what init\(\) of this learner"
        with pytest.raises(ValueError, match=message):
            learner.estimate(rest, episodes)
        if part != "head":  # of fine_tune, which fits a new one
            with pytest.raises(ValueError, match=message):
                learner.adapt(rest, one)
    if whole["model_params"]:
        with pytest.raises(ValueError, match="meta_params has no"):
            learner.estimate(whole["model_params"], episodes)
        first, *others = whole["model_params"]
        cut = {**whole, "model_params": {k: whole["model_params"][k] for k in others}}
        with pytest.raises(ValueError, match=rf"meta_params\['model_params'\] has no '{first}'"):
            learner.adapt(cut, one)


def test_what_another_inner_rule_learns_is_no_substitute():
    _, episodes = kit.points(2)
    start = fewshot.maml(kit.classifier()).init()
    with pytest.raises(ValueError, match=r"meta_params\['opt_params'\] has no 'lr', only nothing"):
        fewshot.meta_sgd(kit.classifier()).estimate(start, episodes)
    with pytest.raises(TypeError, match=r"must be a dict, as init\(\) .* got a Tensor"):
        fewshot.maml(kit.classifier()).estimate(torch.zeros(2), episodes)


def test_more_than_that_and_other_kinds_of_dicts_are_fine():
    _, episodes = kit.points(2)
    learner = fewshot.maml(kit.classifier())
    start = learner.init()
    more = {
        "opt_params": {},
        "model_params": collections.OrderedDict(start["model_params"]),
        "of_mine": torch.zeros(2, dtype=torch.float64),
    }
    found = learner.estimate(more, episodes)
    assert torch.equal(found.loss, learner.estimate(start, episodes).loss)
    assert torch.equal(found.grads["of_mine"], torch.zeros(2))
