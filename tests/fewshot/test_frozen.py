"""Frozen parameters of a module are constants: neither adapted nor learned."""

import pytest
import torch
from torch import nn

from fmeta import fewshot, trees
from fmeta.random import fold_in

from . import kit

BUILD = {
    "maml": lambda net, **o: fewshot.maml(net, num_steps=2, **o),
    "anil": lambda net, **o: fewshot.anil(net, num_steps=2, **o),
    "meta_sgd": lambda net, **o: fewshot.meta_sgd(net, num_steps=2, **o),
    "llama": lambda net, **o: fewshot.llama(net, num_steps=2, eta=0.1, **o),
    "imaml": lambda net, **o: fewshot.imaml(net, num_steps=2, **o),
    "reptile": lambda net, **o: fewshot.reptile(net, num_steps=2, **o),
    "protonet": lambda net, **o: fewshot.protonet(net, kit.WAYS, **o),
}


def parts():
    body = kit.seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    rest = kit.seeded(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    return body, rest


@pytest.mark.parametrize("policy", ["transductive", "support"])
@pytest.mark.parametrize("name", BUILD)
def test_they_are_as_if_they_had_been_applied_to_the_inputs_before(name, policy):
    body, rest = parts()
    whole = nn.Sequential(body.requires_grad_(False), rest)
    _, episodes = kit.points(2)
    seen = fewshot.Episode(
        *(e._replace(x=body.double()(e.x)) for e in episodes[:2]), episodes.classes
    )
    frozen, small = (BUILD[name](net, batch_norm=policy) for net in (whole.float(), rest))
    start = frozen.init()["model_params"]
    assert list(start) == [f"1.{key}" for key in small.init()["model_params"]]

    # float64, where the module was float32: what is frozen goes along.
    ours, theirs = (trees.cast(x.init(fold_in(1)), torch.float64) for x in (frozen, small))
    found, want = frozen.estimate(ours, episodes), small.estimate(theirs, seen)
    torch.testing.assert_close(found.loss, want.loss)
    for got, expected in zip(trees.leaves(found.grads), trees.leaves(want.grads), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_they_follow_the_parameters_to_another_device():
    body, rest = parts()
    learner = fewshot.maml(nn.Sequential(body.requires_grad_(False), rest))
    meta_params = trees.map(lambda x: x.to("meta"), learner.init())
    _, episodes = kit.points(2)
    episodes = trees.cast(episodes, torch.float32)
    assert learner.estimate(meta_params, trees.map(lambda x: x.to("meta"), episodes)).loss.is_meta


def test_a_network_that_is_wholly_frozen_is_refused():
    with pytest.raises(TypeError, match=r"all parameters of Linear are frozen.*requires_grad_\(\)"):
        fewshot.maml(nn.Linear(2, 3).requires_grad_(False))


@pytest.mark.parametrize(
    "build",
    [
        fewshot.anil,
        lambda net: fewshot.anil(net, head=lambda name: name.startswith("1")),
        lambda net: fewshot.maml(net, adapts=lambda name: name == "1.weight"),
    ],
    ids=["anil", "head", "maml"],
)
def test_what_adapts_but_is_frozen_is_told(build):
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).requires_grad_(False))
    told = r"none of the parameters 0.weight, 0.bias, but only 1.weight.*frozen.*\.requires_grad_"
    with pytest.raises(ValueError, match=told):
        build(net)
    with pytest.raises(ValueError, match=r"none of the parameters 0.weight, 0.bias$"):
        fewshot.maml(net, adapts=lambda name: name == "2.weight")


def test_a_missing_parameter_is_still_named():
    body, rest = parts()
    learner = fewshot.maml(nn.Sequential(body.requires_grad_(False), rest))
    with pytest.raises(ValueError, match=r"'1.0.weight' of shape \(5,\) missing"):
        learner.predict(fewshot.Adapted({}, (), torch.zeros(0)), torch.zeros(2, 4))
