"""What holds of every learner: estimates are gradients, episodes do not see each other."""

import weakref

import pytest
import torch

import fmeta
from fmeta import fewshot, trees
from fmeta.random import fold_in

from . import kit


def double(tree):
    return trees.map(lambda x: x.double(), tree)


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_an_estimate_is_the_mean_over_its_episodes(name):
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    _, episodes = kit.points(3)
    whole = learner.estimate(meta_params, episodes, 0.2)
    parts = [
        learner.estimate(meta_params, fmeta.tasks.stack_tasks([kit.one(episodes, i)]), 0.2)
        for i in range(3)
    ]
    mean = trees.map(lambda *xs: sum(xs) / 3, *(p.grads for p in parts))
    torch.testing.assert_close(whole.grads, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.loss, sum(p.loss for p in parts) / 3)
    assert whole.metrics["accuracy"].shape == (3,)


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_chunks_of_episodes_change_nothing(name):
    _, episodes = kit.points(4)
    whole, chunked = (kit.LEARNERS[name](chunk_size=size) for size in (None, 3))
    meta_params = double(whole.init(fold_in(1)))
    found = [x.estimate(meta_params, episodes).grads for x in (whole, chunked)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", kit.BY_GRADIENT)
def test_the_estimate_is_the_derivative_of_its_loss(name):
    """Finite differences along a random direction; first order is not a derivative of it."""
    if name == "first_order_maml":
        pytest.skip("by definition another vector; test_maml compares it")
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    _, episodes = kit.points(2)
    found = learner.estimate(meta_params, episodes, 0.3)
    way = trees.map(
        lambda x: torch.randn(x.shape, generator=fold_in(5), dtype=x.dtype), meta_params
    )
    e = 1e-5

    def at(sign):
        moved = trees.map(lambda x, v: x + sign * e * v, meta_params, way)
        return learner.estimate(moved, episodes, 0.3).loss

    slope = sum((g * v).sum() for g, v in zip(*map(trees.leaves, (found.grads, way)), strict=True))
    torch.testing.assert_close((at(1) - at(-1)) / (2 * e), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["maml", "anil", "meta_sgd", "meta_lstm", "protonet", "snail"])
def test_adapt_and_predict_are_the_pure_functions_that_estimate_differentiates(name):
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    _, episodes = kit.points(3)

    def loss(meta_params):
        def task(support, query):
            outputs = learner.predict(learner.adapt(meta_params, support), query.x)
            return torch.nn.functional.cross_entropy(outputs, query.y)

        return torch.vmap(task)(*episodes[:2]).mean()

    found = learner.estimate(meta_params, episodes)
    torch.testing.assert_close(found.loss, loss(meta_params))
    torch.testing.assert_close(
        found.grads, torch.func.grad(loss)(meta_params), rtol=1e-8, atol=1e-11
    )


@pytest.mark.parametrize("name", ["maml", "imaml", "protonet", "reptile"])
def test_an_estimate_is_a_constant_in_reverse_mode_and_says_so(name):
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    _, episodes = kit.points(2)

    def loss(meta_params):
        return learner.estimate(meta_params, episodes).loss

    with pytest.raises(ValueError, match=r"path .*model_params/0.bias, would be 0.*its `grads`"):
        torch.func.grad(loss)(meta_params)

    def constant(meta_params):
        return loss(trees.map(torch.Tensor.detach, meta_params))

    assert not any(g.any() for g in trees.leaves(torch.func.grad(constant)(meta_params)))
    way = trees.map(torch.ones_like, meta_params)
    up, down = (loss(trees.map(lambda x, s=s: x + s, meta_params)) for s in (1e-6, -1e-6))
    _, slope = torch.func.jvp(loss, (meta_params,), (way,))
    torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_evaluation_records_no_graph(name):
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    meta_params = trees.map(lambda x: x.requires_grad_(), meta_params)
    source, _ = kit.points()
    scores = fewshot.evaluate(learner, meta_params, source, num_episodes=5, batch_size=2)
    assert not scores.losses.requires_grad
    assert scores.accuracies.shape == (5,)
    mean, half = scores.accuracy()
    assert 0 <= mean <= 1
    assert half > 0
    once = fewshot.evaluate(learner, meta_params, source, num_episodes=5, batch_size=5)
    torch.testing.assert_close(scores.losses, once.losses)
    threads = {"num_threads": 3, "batch_size": 2}
    beside = fewshot.evaluate(learner, meta_params, source, num_episodes=5, **threads)
    assert torch.equal(beside.losses, scores.losses)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_threads_of_an_evaluation_are_under_the_callers_autocast(dtype):
    learner = fewshot.protonet(kit.classifier(outputs=5).float(), kit.WAYS)
    source, _ = kit.points()

    def losses(num_threads):
        options = {"num_episodes": 4, "batch_size": 2, "num_threads": num_threads}
        return fewshot.evaluate(learner, learner.init(), source, **options).losses

    with torch.autocast("cpu", dtype):
        alone, beside = losses(1), losses(2)
    assert torch.equal(alone, beside)
    assert not torch.equal(alone, losses(2))  # without


@pytest.mark.parametrize("name", kit.OF_STEPS)
def test_evaluation_keeps_nothing_of_one_step_in_the_next(name):
    """What autograd saves for inner gradients is gone after the step, however many there are."""
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    meta_params = trees.map(lambda x: x.requires_grad_(), meta_params)
    source, _ = kit.points()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def most_at_once(num_steps):
        saved, most = weakref.WeakSet(), [0]

        def pack(tensor):
            made = Saved(tensor)
            saved.add(made)
            most[0] = max(most[0], len(saved))
            return made

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda made: made.tensor):
            fewshot.evaluate(learner, meta_params, source, num_episodes=2, num_steps=num_steps)
        return most[0]

    few = most_at_once(2)
    assert few > 0
    assert most_at_once(9) == few


@pytest.mark.parametrize("name", kit.OF_STEPS)
def test_more_steps_than_in_meta_training_go_on_from_them(name):
    learner = kit.LEARNERS[name]()
    meta_params = double(learner.init(fold_in(1)))
    _, episodes = kit.points(1)
    support = kit.one(episodes, 0).support
    outputs = [
        learner.predict(learner.adapt(meta_params, support, num_steps=n), support.x) for n in (2, 7)
    ]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["maml", "reptile", "protonet"])
def test_meta_training_lowers_the_loss_of_unseen_classes(name):
    options = {} if name == "protonet" else {"lr": 0.1}
    learner = kit.LEARNERS[name](**options)
    source, _ = kit.points()
    start = double(learner.init(fold_in(1)))
    result = fmeta.meta_train.run(
        fewshot.estimator(learner, source, num_tasks=4),
        start,
        outer=fmeta.optimizers.adam(0.02),
        num_steps=30,
    )
    before, after = (
        fewshot.evaluate(learner, p, source, num_episodes=40).loss()[0]
        for p in (start, result.meta_params)
    )
    assert after < 0.9 * before


def with_scales(get):
    """Prototypes in scaled inputs, as somebody else would write it; ``get`` finds the scales."""

    def adapt(meta_params, support, *, num_steps=None):
        x, y = support
        member = (y[:, None] == torch.arange(kit.WAYS)).to(x.dtype)
        scales = get(meta_params)
        return scales, member.T @ (x * scales) / member.sum(0)[:, None]

    def predict(adapted, query_x):
        scales, means = adapted
        return -((query_x * scales)[:, None] - means).square().sum(-1)

    def estimate(meta_params, episodes, progress=1.0, *, share=None):
        def loss(meta_params):
            def of_task(support, query):
                outputs = predict(adapt(meta_params, support), query.x)
                return torch.nn.functional.cross_entropy(outputs, query.y)

            return torch.vmap(of_task)(*episodes[:2]).mean()

        grads, value = torch.func.grad_and_value(loss)(meta_params)
        return fmeta.estimators.Estimate(value.detach(), grads, {})

    return fewshot.MetaLearner(lambda generator=None: None, estimate, adapt, predict)


@pytest.mark.parametrize(
    ("wrap", "get"),
    [
        (lambda x: x, lambda m: m),
        (lambda x: {"scales": x}, lambda m: m["scales"]),
        (lambda x: ([x], x[0]), lambda m: m[0][0]),
        (lambda x: {"model_params": {}, "scales": x}, lambda m: m["scales"]),
    ],
    ids=["a tensor", "other names", "a tuple", "an empty network"],
)
def test_meta_parameters_of_a_learner_of_ones_own_may_be_any_tree(wrap, get):
    source, _ = kit.points()
    learner = with_scales(get)
    meta_params = wrap(torch.full((4,), 0.1))  # float32; the source is float64
    scores = fewshot.evaluate(learner, meta_params, source, num_episodes=3)
    assert scores.losses.dtype == torch.float32
    stream = fewshot.estimator(learner, source, num_tasks=2)
    outer = fmeta.optimizers.sgd(0.1)
    trained = fmeta.meta_train.run(stream, meta_params, outer=outer, num_steps=2).meta_params
    assert (get(trained) != get(meta_params)).all()


def test_nearest_neighbour_is_the_label_of_the_nearest():
    learner = fewshot.nearest_neighbour(2)
    x, y = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1])
    outputs = learner.predict(learner.adapt({}, (x, y)), torch.tensor([[2.0], [4.0]]))
    torch.testing.assert_close(outputs, -torch.tensor([[1.0, 9.0], [9.0, 1.0]]))


def test_prototypes_are_means_of_the_classes():
    learner = fewshot.protonet(torch.nn.Linear(1, 1, bias=False), 2)
    meta_params = {"model_params": {"weight": torch.ones(1, 1)}}
    x, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    outputs = learner.predict(learner.adapt(meta_params, (x, y)), torch.tensor([[2.0]]))
    torch.testing.assert_close(outputs, -torch.tensor([[1.0, 9.0]]))


def test_the_log_determinant_is_that_of_the_large_matrix():
    from fmeta.fewshot._llama import curvature_log_det
    from fmeta.fewshot._model import as_model

    net = kit.classifier(features=2, outputs=3)
    model = as_model(net)
    params = model.init(fold_in(0))
    x = torch.randn(4, 2, generator=fold_in(2), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    adapted = fewshot.Adapted(params, (), torch.zeros(0))
    got = curvature_log_det(model, adapted, fewshot.Examples(x, y), lambda n: True, 0.7, True)

    spec = {k: v.numel() for k, v in params.items()}

    def outputs(flat):
        parts = dict(zip(spec, flat.split(list(spec.values())), strict=True))
        return model.apply({k: parts[k].view_as(v) for k, v in params.items()}, x)[0]

    flat = torch.cat([v.flatten() for v in params.values()])
    rows = torch.func.jacrev(outputs)(flat)
    p = outputs(flat).softmax(-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    large = torch.einsum("nci,ncd,ndj->ij", rows, middle, rows) / 0.7
    want = torch.linalg.slogdet(torch.eye(len(flat), dtype=torch.float64) + large)[1]
    torch.testing.assert_close(got, want)
