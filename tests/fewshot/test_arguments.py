"""Dtypes and devices follow the parameters; what would be computed wrongly is refused."""

import threading

import pytest
import torch
from torch import nn

from fmeta import fewshot, optimizers, trees
from fmeta.random import fold_in

from . import kit


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_a_network_in_float64_is_meta_trained_and_tested_in_float64(name):
    """From `init` on, with nothing cast by hand, on a source in float32."""
    images = torch.rand(3, 8, 12, 4, generator=fold_in(1))
    source = fewshot.from_classes(
        dict(zip(("train", "validation", "test"), images, strict=True)), ways=3, shots=2, queries=3
    )
    learner = kit.LEARNERS[name]()
    meta_params = learner.init()
    stream = fewshot.estimator(learner, source, num_tasks=2)
    found, _ = stream.estimate(meta_params, stream.init(meta_params, 0))
    assert found.loss.dtype == torch.float64
    assert all(g.dtype == torch.float64 for g in trees.leaves(found.grads["model_params"]))
    scores = fewshot.evaluate(learner, meta_params, source, num_episodes=2)
    assert scores.losses.dtype == torch.float64


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_meta_parameters_are_where_the_network_is(name, monkeypatch):
    made = kit.classifier
    monkeypatch.setattr(kit, "classifier", lambda **options: made(**options).to("meta"))
    meta_params = kit.LEARNERS[name]().init()
    assert {x.device.type for x in trees.leaves(meta_params)} == {"meta"}


def on_meta(tree):
    return trees.map(lambda x: x.to("meta"), tree)


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_what_init_gives_is_the_callers_own(name):
    learner = kit.LEARNERS[name]()
    first = learner.init(fold_in(1))
    before = trees.map(torch.clone, first)
    for x in trees.leaves(first):
        x.add_(1.0)
        x.requires_grad_()
    again = learner.init(fold_in(1))
    torch.testing.assert_close(again, before, rtol=0, atol=0)
    assert not any(x.requires_grad for x in trees.leaves(again))


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_shapes_are_known_on_the_meta_device(name):
    learner = kit.LEARNERS[name]()
    source, episodes = kit.points(2)
    meta_params = on_meta(learner.init())
    found = learner.estimate(meta_params, on_meta(episodes))
    assert {x.device.type for x in trees.leaves(found)} == {"meta"}
    shapes = [trees.map(lambda x: x.shape, tree) for tree in (found.grads, meta_params)]
    assert shapes[0] == shapes[1]
    scores = fewshot.evaluate(learner, meta_params, source, num_episodes=2)
    assert (scores.losses.shape, scores.losses.device.type) == ((2,), "meta")


def test_a_mix_of_devices_is_named_by_the_paths():
    learner = kit.LEARNERS["maml"]()
    _, episodes = kit.points(2)
    with pytest.raises(
        ValueError, match=r"episodes/support/x is on meta, meta_params/.*bias on cpu: move them"
    ):
        learner.estimate(learner.init(), on_meta(episodes))


def test_targets_of_another_shape_than_the_outputs_are_refused():
    """Repeated along each other, (5, 1) and (5,) would give another loss without a word."""
    learner = fewshot.maml(kit.regression_net(), loss="mse")
    examples = fewshot.Examples(torch.zeros(2, 5, 1).double(), torch.zeros(2, 5).double())
    with pytest.raises(ValueError, match=r"outputs \(5, 1\) and targets \(5,\) .* y\[:, None\]"):
        learner.estimate(learner.init(), fewshot.Episode(examples, examples))


@pytest.mark.parametrize(
    ("options", "shape", "cure"),
    [
        ({}, (3, 8, 8), "in_channels=3"),
        ({}, (1, 16, 16), "side= and in_channels="),
        ({}, (63,), "side= and in_channels="),
        ({}, (128,), "side= and in_channels="),
        ({"in_channels": 3}, (8, 8), "in_channels=1"),
        ({"in_channels": 3}, (8, 8, 3), "side= and in_channels="),
    ],
)
def test_images_of_another_shape_are_refused(options, shape, cure):
    """Channels, or parts of an image, would else become examples."""
    learner = fewshot.maml(fewshot.conv4(3, side=8, channels=2, blocks=2, **options))
    support = (torch.rand(6, *shape), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=rf"got \(n, .*make it with {cure}"):
        learner.adapt(learner.init(), support)


@pytest.mark.parametrize(
    ("channels", "shape"),
    [(1, (8, 8)), (1, (1, 8, 8)), (3, (3, 8, 8)), (1, (64,)), (3, (192,))],
)
def test_images_of_the_shape_that_it_was_made_for_are_taken(channels, shape):
    model = fewshot.conv4(3, side=8, in_channels=channels, channels=2, blocks=2)
    params, x = model.init(fold_in(0)), torch.rand(6, *shape)
    outputs = model.apply(params, x)[0]
    assert outputs.shape == (6, 3)
    assert torch.equal(outputs, model.apply(params, x.reshape(6, channels, 8, 8))[0])


class Splits(nn.Module):
    """Makes two rows of every example."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(2, 3)

    def forward(self, x):
        return self.last(x.reshape(-1, 2))


def test_outputs_and_labels_of_different_numbers_are_refused():
    learner = fewshot.maml(Splits())
    examples = fewshot.Examples(torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"outputs \(10, 3\) and labels \(5,\) of an episode"):
        learner.estimate(learner.init(), fewshot.Episode(examples, examples))


def test_labels_that_are_numbers_want_another_loss():
    learner = fewshot.maml(kit.regression_net())
    with pytest.raises(TypeError, match=r'integer labels, got torch.float64: give loss="mse"'):
        learner.estimate(learner.init(), kit.waves(2))


def with_dropout(name):
    def net(outputs):
        rates = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, outputs)
        return nn.Sequential(*rates).double()

    return {
        "maml": lambda: (net(3), fewshot.maml),
        "imaml": lambda: (net(3), fewshot.imaml),
        "protonet": lambda: (net(5), lambda n: fewshot.protonet(n, 3)),
        "fine_tune": lambda: (net(5), lambda n: fewshot.fine_tune(n, 3, 8, num_features=5)),
        "snail": lambda: (
            net(5),
            lambda n: fewshot.snail(n, 3, 6, num_features=5, filters=2, attends=((2, 3),)),
        ),
    }[name]()


@pytest.mark.parametrize("name", ["maml", "imaml", "protonet", "fine_tune", "snail"])
def test_dropout_in_train_mode_is_told_the_cure(name):
    net, build = with_dropout(name)
    source, episodes = kit.points(2)
    support, query, _ = kit.one(episodes, 0)
    learner = build(net)
    meta_params = learner.init()
    before = torch.get_rng_state()
    message = r"dropout in train mode.*call \.eval\(\)"
    with pytest.raises(ValueError, match=message):
        learner.estimate(meta_params, episodes)
    with pytest.raises(ValueError, match=message):
        fewshot.evaluate(learner, meta_params, source, num_episodes=2)
    with pytest.raises(ValueError, match=message):
        learner.adapt(meta_params, support)
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(lambda x: learner.adapt(meta_params, (x, support.y))[0], *[(support.x,)] * 2)
    assert torch.equal(torch.get_rng_state(), before)

    calm = build(net.eval())
    adapted = calm.adapt(meta_params, support)
    assert calm.estimate(meta_params, episodes).loss.isfinite()
    calm.predict(adapted, query.x)
    with pytest.raises(ValueError, match=message):
        learner.predict(adapted, query.x)


def test_what_another_thread_draws_is_not_the_networks_noise():
    """Its numbers move the same global generator."""
    learner = fewshot.maml(kit.classifier(), loss=lambda outputs, y: outputs.square().mean())
    _, episodes = kit.points(1)
    drawn = []

    def loss_beside_a_thread(outputs, y):
        if not drawn:
            thread = threading.Thread(target=lambda: drawn.append(torch.rand(())))
            thread.start()
            thread.join()
        return outputs.square().mean()

    beside = fewshot.maml(kit.classifier(), loss=loss_beside_a_thread)
    support = kit.one(episodes, 0).support
    found, want = (x.adapt(x.init(), support).params for x in (beside, learner))
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert drawn


@pytest.mark.parametrize("name", ["maml", "first_order_maml", "anil", "imaml", "llama"])
def test_a_rate_that_another_rule_would_ignore_is_refused(name):
    build = getattr(fewshot, name)
    with pytest.raises(ValueError, match=r"lr is the rate of gradient descent.*give one of them"):
        build(kit.classifier(), lr=5.0, optimizer=optimizers.adam())
    _, episodes = kit.points(2)
    default, given = build(kit.classifier()), build(kit.classifier(), lr=0.1)
    assert torch.equal(*(x.estimate(x.init(), episodes).loss for x in (default, given)))
