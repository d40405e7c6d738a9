"""Forward mode gives the gradients of `full`, whole or carried along, and keeps no graph."""

import weakref

import pytest
import torch
from torch.func import jacrev

from fmeta import estimators, learn, optimizers, trees
from fmeta.estimators._pushed import basis, by_leaf, pushed
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily, digits, mixture, quadratic, sinusoid
from fmeta.testing import check_estimator

DOUBLE = torch.float64
RULE = learn(optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.05)
META = trees.cast(RULE.init(), DOUBLE)


def double(family):
    """The family in float64."""

    def cast(fn):
        return lambda *args, **options: trees.cast(fn(*args, **options), DOUBLE)

    return family._replace(
        data=trees.cast(family.data, DOUBLE),
        sample=cast(family.sample),
        init=cast(family.init),
        batches=cast(family.batches),
    )


QUADRATIC = double(quadratic(4))
FAMILIES = {
    "quadratic": QUADRATIC,
    # torch's mse_loss wants a tangent of its target.
    "sinusoid": double(sinusoid(shots=4, widths=(5,))),
    "mlp": double(digits((5,), batch_size=8)),
    "autoencoder": double(digits((5,), batch_size=8, model="autoencoder")),
    "transformer": double(digits((4,), batch_size=4, model="transformer")),
}
MIXED = mixture([QUADRATIC, double(quadratic(3))], weights=(2, 1))


def first(estimator, meta=META, seed=3):
    return estimator.estimate(meta, estimator.init(meta, seed))[0]


def close(got, want, tol=1e-10):
    """Relative to the largest entry of each leaf."""
    for path, a, b in zip(trees.paths(want), trees.leaves(got), trees.leaves(want), strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(
            a, b, rtol=0, atol=tol * scale, msg=lambda m, p=path: f"{p}: {m}"
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_split": "validation"},
        {"first_order": True},
        {"meta_loss": lambda run: run.losses[-1]},
        {"chunk_size": 1},
    ],
    ids=["default", "validation", "first order", "last loss", "chunks"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_gradient_of_full(name, options):
    both = [
        first(build(RULE, FAMILIES[name], num_tasks=2, horizon=6, **options))
        for build in (estimators.full, estimators.forward)
    ]
    torch.testing.assert_close(both[1].loss, both[0].loss, rtol=1e-12, atol=0)
    close(both[1].grads, both[0].grads)
    for name in ("losses", "drawn", "diverged_at"):
        torch.testing.assert_close(both[1].metrics[name], both[0].metrics[name])


def test_a_mixture():
    both = [
        first(build(RULE, MIXED, num_tasks=3, horizon=4))
        for build in (estimators.full, estimators.forward)
    ]
    close(both[1].grads, both[0].grads)


def test_learned_initial_parameters():
    start = {"x": torch.randn(4, generator=fold_in(1), dtype=DOUBLE)}
    options = {"num_tasks": 2, "horizon": 5, "bind": lambda meta, config: ({}, meta)}
    both = [
        first(build(optimizers.adam(0.1), QUADRATIC, **options), start)
        for build in (estimators.full, estimators.forward)
    ]
    close(both[1].grads, both[0].grads)


@pytest.mark.parametrize("eval_split", [None, "validation"])
def test_pieces_of_a_training_add_up_to_its_gradient(eval_split):
    """Where the truncated gradient, which forgets how the piece's start came about, does not."""
    options = {"num_tasks": 2, "horizon": 12, "eval_split": eval_split}

    def pieces(build, truncation):
        more = {"truncation": truncation, "stagger": False}
        estimator = build(RULE, QUADRATIC, **options, **more)
        state, total = estimator.init(META, 3), trees.map(torch.zeros_like, META)
        for _ in range(12 // truncation):
            found, state = estimator.estimate(META, state)
            total = trees.map(lambda a, b: a + b * truncation / 12, total, found.grads)
        return total

    # Later pieces draw noise of their own, but a noiseless quadratic does not see it.
    exact = pieces(estimators.truncated, 12)
    close(pieces(estimators.forward, 12), exact)
    close(pieces(estimators.forward, 3), exact)
    close(pieces(estimators.forward, 4), exact)
    off = pieces(estimators.truncated, 3)["lr"] - exact["lr"]
    assert off.abs() > 0.1 * exact["lr"].abs()


def test_a_training_that_begins_within_a_piece_has_no_past():
    """Whole trainings within one estimate: the same as reverse mode through all of them."""
    options = {"num_tasks": 2, "horizon": (3, 4), "truncation": 12}
    meta = {"rule": META, "start": {"x": torch.ones(4, dtype=DOUBLE)}}
    bind = lambda meta, config: (meta["rule"], meta["start"])
    both = [
        first(build(RULE, QUADRATIC, bind=bind, stagger=False, **options), meta)
        for build in (estimators.truncated, estimators.forward)
    ]
    close(both[1].grads, both[0].grads)


@pytest.mark.parametrize("truncation", [None, 4])
def test_laws(truncation):
    estimator = estimators.forward(RULE, QUADRATIC, num_tasks=2, horizon=8, truncation=truncation)
    report = check_estimator(estimator, META)
    assert len(report.held) == 6
    mixed = estimators.forward(RULE, MIXED, num_tasks=3, horizon=6, truncation=truncation)
    check_estimator(mixed, META, laws=["state_is_data", "resumes"])


def test_no_graph_is_kept():
    """A tensor of a step is freed when the next one is made: at any horizon equally few live."""
    alive = {}
    for steps in (5, 40):
        seen, most = [], [0]

        def loss(data, config, p, batch, seen=seen, most=most):
            x = p["w"] * batch
            seen.append(weakref.ref(x))
            most[0] = max(most[0], sum(r() is not None for r in seen))
            return x.square().sum()

        family = TaskFamily(
            (),
            lambda g: {},
            lambda c, g: {"w": torch.ones(3)},
            lambda c, g, steps, split="train": torch.rand(steps, generator=g),
            loss,
        )
        rule = learn(optimizers.sgd, {"lr": "log"}, lr=0.1)
        first(estimators.forward(rule, family, num_tasks=2, horizon=steps), rule.init())
        alive[steps] = most[0]
    assert alive[40] == alive[5]


def test_pushed_is_the_jacobian():
    tree = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.5], [3.0]])}
    constant = torch.tensor(3.0)

    def fn(tree, count, c):
        y = (tree["a"].sin()[:, None] * tree["b"].T * c).sum(0)
        return {"y": y, "n": count + 1}, (y.sum(), count)

    values, slopes, aux = pushed(
        fn, (tree, torch.tensor(1)), (basis(tree), torch.zeros(4)), (constant,)
    )
    want = jacrev(lambda tree: fn(tree, torch.tensor(1), constant)[0]["y"])(tree)
    got = by_leaf(slopes["y"], tree)
    close(got, want, 1e-6)
    assert values["n"] == 2
    assert aux[1] == 1
    assert slopes["n"].shape == (4,)


def test_basis_has_a_row_for_each_element():
    tree = {"a": torch.zeros(2), "b": torch.zeros(())}
    found = basis(tree)
    assert found["a"].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert found["b"].tolist() == [0, 0, 1]


def test_too_many_meta_parameters_are_refused_by_number():
    estimator = estimators.forward(RULE, QUADRATIC, num_tasks=1, horizon=2)
    with pytest.raises(ValueError, match=r"1,200 elements.*more than 1,000 are refused.*full"):
        estimator.init(torch.zeros(30, 40), 0)
    small = estimators.forward(RULE, QUADRATIC, num_tasks=1, horizon=2, max_elements=2)
    with pytest.raises(ValueError, match="3 elements"):
        small.init(META, 0)


@pytest.mark.parametrize("horizon", [(3, 4), estimators.log_uniform(3, 4)])
def test_several_horizons_need_a_truncation(horizon):
    with pytest.raises(ValueError, match=r"3.*4.*need truncation=K"):
        estimators.forward(RULE, QUADRATIC, num_tasks=1, horizon=horizon)


@pytest.mark.parametrize("name", ["num_tasks", "horizon", "truncation", "max_elements"])
def test_numbers_below_one_are_refused(name):
    arguments = {"num_tasks": 1, "horizon": 2, "truncation": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        estimators.forward(RULE, QUADRATIC, **arguments)


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.square().sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, c):
        return 2 * c * ctx.saved_tensors[0]

    generate_vmap_rule = True


def test_an_operation_without_forward_derivative_is_named_with_its_cure():
    family = QUADRATIC._replace(loss=lambda data, config, p, b: NoForward.apply(p["x"]))
    estimator = estimators.forward(RULE, family, num_tasks=1, horizon=2)
    with pytest.raises(ValueError, match=r"forward mode needs a derivative.*full"):
        first(estimator)


def test_mse_loss_on_the_familys_data_is_named_with_its_cure():
    data = torch.ones(4, dtype=DOUBLE)
    loss = lambda data, config, p, b: torch.nn.functional.mse_loss(p["x"], data)
    family = QUADRATIC._replace(data=data, loss=loss)
    estimator = estimators.forward(RULE, family, num_tasks=1, horizon=2)
    with pytest.raises(ValueError, match=r"mse_loss is one, write it as"):
        first(estimator)
