"""SNAIL against a NumPy program of the whole forward pass; it never looks ahead."""

import math

import numpy as np
import pytest
import torch

import fmeta
from fmeta import fewshot, trees
from fmeta.fewshot import _sequence
from fmeta.random import fold_in

from . import kit

ATTENDS = ((4, 3), (5, 2), (3, 4))
WAYS, SHOTS = 3, 2


def learner(**options):
    return fewshot.snail(
        kit.classifier(outputs=5), WAYS, WAYS * SHOTS, **{**sizes(num_features=5), **options}
    )


def sizes(**options):
    return {"filters": 3, "attends": ATTENDS, **options}


def of_waves(shots):
    return fewshot.snail(None, 1, shots, loss="mse", **sizes(num_features=1))


def meta_params_of(learner):
    """In float64, and with biases that are not zero."""
    return trees.map(
        lambda x: x.double() + 0.1 * torch.randn(x.shape, generator=fold_in(8)).double(),
        learner.init(fold_in(1)),
    )


def normal(seed, *shape):
    return torch.randn(shape, generator=fold_in(seed), dtype=torch.float64)


class Program:
    """The network as the paper's pseudo-code has it, one position after another, in NumPy."""

    def __init__(self, params, length, filters=3, attends=ATTENDS):
        self.p = {k: v.numpy() for k, v in params.items()}
        self.length, self.filters, self.attends = length, filters, attends

    def attention(self, name, x, key_size, value_size):
        w, b = self.p[f"{name}.w"], self.p[f"{name}.b"]
        cuts = [key_size, 2 * key_size]
        (wk, wq, wv), (bk, bq, bv) = np.split(w, cuts, 1), np.split(b, cuts)
        keys, values = x @ wk + bk, x @ wv + bv
        read = np.zeros((len(x), value_size))
        for t in range(len(x)):
            query = x[t] @ wq + bq
            scores = np.exp([query @ keys[s] / math.sqrt(key_size) for s in range(t + 1)])
            for s in range(t + 1):
                read[t] += scores[s] / scores.sum() * values[s]
        return np.concatenate([x, read], 1)

    def dense(self, name, x, dilation):
        w, b = self.p[f"{name}.w"], self.p[f"{name}.b"]
        found = np.zeros((len(x), self.filters))
        for t in range(len(x)):
            z = x[t] @ w[1] + b
            if t >= dilation:
                z = z + x[t - dilation] @ w[0]
            f, g = z[: self.filters], z[self.filters :]
            found[t] = np.tanh(f) / (1 + np.exp(-g))
        return np.concatenate([x, found], 1)

    def __call__(self, x):
        for i, (key_size, value_size) in enumerate(self.attends):
            if i:
                for j in range(math.ceil(math.log2(self.length))):
                    x = self.dense(f"temporal{i - 1}.{j}", x, 2**j)
            x = self.attention(f"attention{i}", x, key_size, value_size)
        return x @ self.p["outputs.w"] + self.p["outputs.b"]

    def answers(self, features, labels, queries):
        support = np.concatenate([features, labels], 1)
        found = []
        for query in queries:
            last = np.concatenate([query, np.zeros(labels.shape[1])])
            found.append(self(np.concatenate([support, last[None]]))[-1])
        return torch.from_numpy(np.array(found))


def test_predictions_are_those_of_the_whole_sequence_in_numpy():
    found = learner()
    meta_params = meta_params_of(found)
    episode = kit.one(kit.points(1, WAYS, SHOTS)[1], 0)
    net = {k: v.numpy() for k, v in meta_params["model_params"].items()}

    def features(x):
        h = np.tanh(x.numpy() @ net["0.weight"].T + net["0.bias"])
        f = h @ net["2.weight"].T + net["2.bias"]
        return (f - f.mean(1, keepdims=True)) / np.sqrt(f.var(1, keepdims=True) + 1e-5)

    program = Program(meta_params["sequence"], WAYS * SHOTS + 1)
    labels = np.eye(WAYS)[episode.support.y.numpy()]
    want = program.answers(features(episode.support.x), labels, features(episode.query.x))
    got = found.predict(found.adapt(meta_params, episode.support), episode.query.x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shots", [1, 4, 5, 9])
def test_targets_stand_where_labels_stand(shots):
    """Regression, with the inputs as features; support sets of other sizes are read too."""
    found = of_waves(5)
    meta_params = meta_params_of(found)
    support, query, _ = kit.one(kit.waves(1, shots=shots), 0)
    program = Program(meta_params["sequence"], 6)
    want = program.answers(support.x.numpy(), support.y.numpy(), query.x.numpy())
    got = found.predict(found.adapt(meta_params, support), query.x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


BLOCKS = {
    "attention": lambda: _sequence.attention("a", 4, 5, 3),
    "dense": lambda: _sequence.dense("d", 4, 3, 2),
    "temporal": lambda: _sequence.temporal("t", 4, 3, 7),
    "outputs": lambda: _sequence.to_outputs("o", 4, 2),
    "all": lambda: _sequence.chain(
        [
            _sequence.attention("a", 4, 5, 3),
            _sequence.temporal("t", 7, 3, 7),
            _sequence.attention("b", 16, 2, 3),
        ],
        4,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_comes_later_changes_nothing_before(name):
    block = BLOCKS[name]()
    params = trees.map(torch.Tensor.double, block.init(fold_in(1)))
    x = normal(2, 8, 4)
    before = block.over(params, x)[0]
    assert before.shape == (8, block.num_outputs)
    for t in range(8):
        changed = torch.cat([x[:t], x[t:] + normal(3, 8 - t, 4)])
        after = block.over(params, changed)[0]
        torch.testing.assert_close(after[:t], before[:t], rtol=1e-12, atol=1e-13)
        assert (after[t] - before[t]).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("name", BLOCKS)
def test_going_on_by_one_is_the_end_of_a_longer_sequence(name, length):
    """What `adapt` keeps is all that the support set gives."""
    block = BLOCKS[name]()
    params = trees.map(torch.Tensor.double, block.init(fold_in(1)))
    x, each = normal(2, length, 4), normal(3, 5, 4)
    kept = block.over(params, x)[1]
    want = torch.stack([block.over(params, torch.cat([x, e[None]]))[0][-1] for e in each])
    torch.testing.assert_close(block.after(params, kept, each), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length", [2, 3, 6, 9])
def test_convolutions_reach_the_first_example(length):
    """Dilations 1, 2, 4, ...: every one of them, odd places too."""
    block = _sequence.temporal("t", 4, 3, length)
    params = trees.map(torch.Tensor.double, block.init(fold_in(1)))
    assert len(params) == 2 * math.ceil(math.log2(length))
    slopes = torch.func.jacrev(lambda x: block.over(params, x)[0][-1])(normal(2, length, 4))
    assert (slopes.abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("make", [learner, lambda: of_waves(5)], ids=["labels", "targets"])
def test_episodes_together_are_episodes_alone(make):
    found = make()
    meta_params = meta_params_of(found)
    episodes = kit.waves(3) if make is not learner else kit.points(3, WAYS, SHOTS)[1]

    def task(support, query):
        return found.predict(found.adapt(meta_params, support), query.x)

    together = torch.vmap(task)(*episodes[:2])
    alone = [task(*kit.one(episodes, i)[:2]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-13)


def test_the_meta_gradient_of_every_parameter_is_that_of_differences():
    found = of_waves(3)
    meta_params = meta_params_of(found)
    episodes = kit.waves(2, shots=3)
    grads = found.estimate(meta_params, episodes).grads["sequence"]
    assert set(grads) == set(meta_params["sequence"])
    e = 1e-6
    for name, grad in grads.items():
        way = normal(4, *grad.shape)

        def at(sign, name=name, way=way):
            moved = {
                k: v + sign * e * way if k == name else v
                for k, v in meta_params["sequence"].items()
            }
            return found.estimate({**meta_params, "sequence": moved}, episodes).loss

        torch.testing.assert_close(
            (at(1) - at(-1)) / (2 * e), (grad * way).sum(), rtol=1e-5, atol=1e-8
        )


def test_sources_mix_the_order_so_that_places_tell_no_labels():
    source, episodes = kit.points(400, ways=3, shots=2)
    for y in (episodes.support.y, episodes.query.y):
        share = torch.stack([(y == c).double().mean(0) for c in range(source.ways)])
        assert ((share - 1 / 3).abs() < 4 * math.sqrt(2 / 9 / 400)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fewshot.snail(None, 3, 6), "num_features="),
        (lambda: fewshot.snail(torch.nn.Linear(4, 5), 3, 6), "num_features="),
        (lambda: learner(attends=()), "attends is empty"),
        (lambda: learner(filters=0), "filters must be at least 1"),
        (lambda: learner(attends=((4, 0),)), "value_size must be at least 1"),
        (lambda: fewshot.snail(None, 3, 0, num_features=1), "num_support must be at least 1"),
        (lambda: learner(batch_norm="running"), "transductive, support"),
        (lambda: learner(loss="hinge"), "unknown loss 'hinge'"),
    ],
)
def test_what_cannot_be_built_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_other_features_than_it_was_made_for_are_refused():
    found = fewshot.snail(fewshot.conv4(3, side=8, channels=4, blocks=2), 3, 3, **sizes())
    support = (torch.zeros(3, 8, 8), torch.arange(3))
    with pytest.raises(ValueError, match=r"\(3,\) of an example, snail was made for \(16,\)"):
        found.adapt(found.init(), support)


def test_steps_and_targets_of_another_size_are_refused():
    found = of_waves(5)
    meta_params = found.init()
    x = torch.zeros(5, 1)
    with pytest.raises(ValueError, match="snail takes no steps"):
        found.adapt(meta_params, (x, x), num_steps=3)
    with pytest.raises(ValueError, match="2 numbers each, snail was made for num_outputs=1"):
        found.adapt(meta_params, (x, torch.zeros(5, 2)))


def test_it_learns_to_tell_classes_that_it_never_saw():
    """From a third, by chance, to over three quarters; one example of a class."""
    classes = {
        split: 2 * normal(i, 100, 1, 4) + 0.5 * normal(i + 2, 100, 8, 4)
        for i, split in enumerate(("train", "test"))
    }
    source = fewshot.from_classes(classes, ways=3, shots=1, queries=3)
    found = fewshot.snail(None, 3, 3, **sizes(num_features=4, filters=8, attends=((16, 8),) * 2))
    result = fmeta.meta_train.run(
        fewshot.estimator(found, source, num_tasks=16),
        trees.map(torch.Tensor.double, found.init()),
        outer=fmeta.optimizers.adam(0.01),
        num_steps=60,
    )
    scores = fewshot.evaluate(found, result.meta_params, source, num_episodes=100)
    assert scores.accuracy()[0] > 0.75


@pytest.mark.parametrize(("loss", "gain"), [("cross_entropy", 4.0), ("mse", 1.0)])
def test_before_training_it_is_a_soft_nearest_neighbour(loss, gain):
    """Equal keys and queries of the features; a row without label counts e^-4 as much."""
    found = fewshot.snail(None, 3, 5, loss=loss, **sizes(num_features=2, attends=((9, 4), (3, 2))))
    meta_params = trees.map(torch.Tensor.double, found.init(fold_in(1)))
    w = meta_params["sequence"]["attention0.w"][:2, 1:9]
    assert w.abs().min() > 1e-3
    x, query = normal(2, 5, 2), normal(3, 4, 2)
    y = torch.tensor([0, 2, 1, 1, 0])
    known, asked = x @ w, query @ w
    near = (asked @ known.T / 3 + 4).exp()
    itself = (asked.square().sum(1) / 3).exp()
    want = gain * (near @ torch.eye(3).double()[y]) / (near.sum(1) + itself)[:, None]
    got = found.predict(found.adapt(meta_params, (x, y)), query)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # the start is float32


def test_values_too_small_for_all_labels_start_with_some():
    found = fewshot.snail(None, 5, 5, **sizes(num_features=2, attends=((4, 3),)))
    adapted = found.adapt(found.init(), (torch.ones(5, 2), torch.arange(5)))
    outputs = found.predict(adapted, torch.ones(1, 2))
    assert (outputs[0, :3] > 0).all()
    assert (outputs[0, 3:] == 0).all()
