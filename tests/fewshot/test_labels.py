"""Labels that stand for no class are refused where they can be seen, not taken for no example."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fmeta import fewshot, trees
from fmeta.fewshot._labels import check_labels

from . import kit

COMPARING = ["protonet", "snail", "fine_tune", "nearest_neighbour"]


def learner_of(name):
    if name == "nearest_neighbour":
        return fewshot.nearest_neighbour(kit.WAYS)
    return kit.LEARNERS[name]()


def moved(episodes, which, change):
    """The meta-batch with other labels in its support or query sets."""
    part = getattr(episodes, which)
    return episodes._replace(**{which: part._replace(y=change(part.y))})


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: y + 1, ValueError, "go from 1 to 3, but there are 3 ways.*from 0 to 2"),
        (lambda y: y - 1, ValueError, "go from -1 to 1"),
        (lambda y: y.double(), TypeError, "must be integers from 0 to 2, got torch.float64"),
    ],
    ids=["from 1", "from -1", "floats"],
)
def test_labels_of_no_class_are_refused(name, change, error, message):
    learner = learner_of(name)
    meta_params = learner.init()
    _, episodes = kit.points(2)
    x, y = kit.one(episodes, 0).support
    with pytest.raises(error, match=f"the support set {message}"):
        learner.adapt(meta_params, (x, change(y)))
    if name == "nearest_neighbour":
        return
    for which in ("support", "query"):
        with pytest.raises(error, match=f"the {which} sets {message}"):
            learner.estimate(meta_params, moved(episodes, which, change))


def test_a_class_without_example_has_no_prototype():
    learner = learner_of("protonet")
    meta_params = learner.init()
    _, episodes = kit.points(2)
    x, y = kit.one(episodes, 0).support
    few = (x[y != 1], y[y != 1])
    with pytest.raises(ValueError, match="class 1 has no example in the support set"):
        learner.adapt(meta_params, few)
    with pytest.raises(ValueError, match="class 2 has no example in the support sets"):
        learner.estimate(meta_params, moved(episodes, "support", lambda y: y.clamp(max=1)))

    def probabilities(x, y):
        return learner.predict(learner.adapt(meta_params, (x, y)), x).softmax(-1)

    # Under a transform nothing can be seen; then it is infinitely far.
    found = torch.vmap(probabilities)(few[0][None], few[1][None])[0]
    assert (found[:, 1] == 0).all()
    assert found.isfinite().all()


def test_derivatives_are_finite_where_a_class_has_no_example():
    """They are those of a learner of the other classes alone: infinity has none itself."""
    network = kit.classifier(outputs=5)
    learner, fewer = (fewshot.protonet(network, ways) for ways in (kit.WAYS, kit.WAYS - 1))
    meta_params = learner.init()
    episodes = kit.points(2, ways=kit.WAYS - 1)[1]

    def loss_of(learner):
        def one(meta_params, support, query):
            outputs = learner.predict(learner.adapt(meta_params, support), query.x)
            return F.cross_entropy(outputs, query.y)

        mapped = torch.vmap(one, in_dims=(None, 0, 0))
        return lambda meta_params: mapped(meta_params, *episodes[:2]).mean()

    along = trees.map(torch.ones_like, meta_params)
    for derivative in (
        torch.func.grad,
        lambda f: lambda m: torch.func.jvp(f, (m,), (along,)),
        lambda f: torch.func.grad(lambda m: torch.func.jvp(f, (m,), (along,))[1]),
    ):
        got, want = (trees.leaves(derivative(loss_of(x))(meta_params)) for x in (learner, fewer))
        for one, other in zip(got, want, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_targets_of_snail_are_no_labels():
    learner = fewshot.snail(None, 1, 5, num_features=1, loss="mse", filters=2, attends=((2, 2),))
    x = torch.full((5, 1), 7.0)
    assert learner.predict(learner.adapt(learner.init(), (x, x)), x).isfinite().all()


@pytest.mark.parametrize("name", COMPARING)
def test_what_cannot_be_seen_is_not_looked_at(name):
    learner = learner_of(name)
    _, episodes = kit.points(1)
    support, query, _ = kit.one(episodes, 0)
    wrong = support._replace(y=support.y + 1)
    meta_params = learner.init()

    def outputs(support):
        return learner.predict(learner.adapt(meta_params, support), query.x)

    if name != "fine_tune":  # whose loss gathers by them
        torch.vmap(outputs)(trees.map(lambda t: t[None], wrong))
    with FakeTensorMode() as mode:
        fake = trees.map(mode.from_tensor, (meta_params, wrong, query.x))
        adapted = learner.adapt(*fake[:2])
        assert learner.predict(adapted, fake[2]).shape == (len(query.x), kit.WAYS)


def test_labels_on_another_device_are_not_waited_for():
    """There `meta`, which has no values to give, stands for a GPU."""
    y = torch.full((2, 4), 7)
    with pytest.raises(ValueError, match="go from 7 to 7"):
        check_labels(y, 3, "it", every=True)
    check_labels(y.to("meta"), 3, "it", every=True)
    with pytest.raises(TypeError, match="must be integers"):
        check_labels(y.double().to("meta"), 3, "it")


def test_a_source_of_wrong_labels_is_told():
    source, _ = kit.points()

    def sample(generator, split="train"):
        return moved(source.sample(generator, split), "query", lambda y: y + 1)

    wrong = source._replace(sample=sample, name="my own")
    with pytest.raises(ValueError, match="the query sets of my own go from 1 to 3"):
        fewshot.draw(wrong, [(0, 0)])


def test_fewer_outputs_than_ways_are_refused():
    learner = learner_of("protonet")
    source, _ = kit.points(ways=5)
    with pytest.raises(ValueError, match="gives 3 outputs, but episodes of classes have 5 ways"):
        fewshot.evaluate(learner, learner.init(), source, num_episodes=2)


@pytest.mark.parametrize("name", ["maml", "anil", "imaml", "llama", "reptile", "meta_lstm"])
@pytest.mark.parametrize("change", [1, -1])
def test_labels_that_a_network_has_no_output_for_are_told(name, change):
    learner = kit.LEARNERS[name]()
    _, (support, query, classes) = kit.points(2)
    support = support._replace(y=support.y + change)
    message = r"labels y that are not from 0 to 2, .*: number the classes of an episode from 0"
    with pytest.raises(ValueError, match=message):
        learner.estimate(learner.init(), fewshot.Episode(support, query, classes))
    with pytest.raises(ValueError, match=message):
        learner.adapt(learner.init(), (support.x[0], support.y[0]))


def test_labels_of_few_bits_are_told_the_cure():
    learner = fewshot.maml(kit.classifier())
    _, (support, _, _) = kit.points(1)
    with pytest.raises(TypeError, match=r"integer labels, got torch.uint8.*y\.long\(\)"):
        learner.adapt(learner.init(), (support.x[0], support.y[0].to(torch.uint8)))
