"""Wrong uses of estimators end in an error that says what, where and the cure."""

import functools

import numpy as np
import pytest
import torch

import fmeta
from fmeta import estimators, optimizers
from fmeta.estimators import log_uniform, meta_losses
from fmeta.tasks import TaskFamily, mixture

START = {"x": torch.zeros(3)}


def sample(generator):
    return {"target": torch.randn(3, generator=generator)}


def loss(data, config, params, batch):
    return (params["x"] - config["target"]).square().sum() + batch.sum()


FAMILY = TaskFamily(
    (),
    sample,
    lambda config, generator: {"x": torch.zeros(3)},
    lambda config, generator, steps, split="train": torch.zeros(steps, 1),
    loss,
)
RULE = fmeta.learn(optimizers.sgd, {"lr": "linear"}, lr=0.1)
META = {"rule": RULE.init(), "start": torch.tensor([1.0, -0.5, 0.7])}


def bind(meta, config):
    return meta["rule"], {"x": meta["start"]}


def bound(self, meta, config):
    return bind(meta, config)


def rule_alone(meta, config):
    return meta["rule"], None


def start_alone(meta, config):
    return RULE.init(), {"x": meta["start"]}


PIECES = {"truncation": 2}
OPTIONS = {
    "full": {},
    "truncated": PIECES,
    "forward": {},
    "online": PIECES,  # `forward` of pieces
    "pes": PIECES,
    "es": PIECES,
    "es_single": PIECES,
    "nres": PIECES,
    "score_function": {"std": 0.1, "bind": rule_alone},
    "implicit": {"proximal": 1.0, "bind": start_alone},
}
ALL = list(OPTIONS)
EVOLUTION = ["pes", "es", "es_single", "nres"]
OF_PIECES = ["truncated", "online", *EVOLUTION]
WHOLE = ["full", "forward"]
LEARNED = ["full", "forward", "implicit"]
SCORED = [name for name in ALL if name != "implicit"]
STAGGERED = [name for name in OF_PIECES if name != "es_single"]
BOUND = r"called as bind\(meta_params, config\)"
STD = r"called as std\(meta_params, config\)"
BY_STEP = "losses, eval_losses, t, horizon"
LOSS = "data, config, model_params, batch, meta_params"


def meta_of(name):
    unseen = {"score_function": "start", "implicit": "rule"}.get(name)
    return {k: v for k, v in META.items() if k != unseen}


def build(name, **options):
    make = getattr(estimators, "forward" if name == "online" else name)
    given = {"num_tasks": 2, "horizon": 4, "bind": bind, **OPTIONS[name], **options}
    return make(RULE, given.pop("family", FAMILY), **given)


def first(estimator, meta=META):
    return estimator.estimate(meta, estimator.init(meta, 0))[0]


# Which estimators, name of the argument, what is given, error, message.
BUILT = [
    (ALL, "num_tasks", None, ValueError, "num_tasks must be an integer, got None"),
    (ALL, "horizon", 6.5, ValueError, r"horizon.*6\.5"),
    (EVOLUTION, "truncation", None, ValueError, "truncation must be an integer, got None"),
    (["truncated"], "truncation", None, ValueError, "truncation must be an integer, got None"),
    (ALL, "bind", "both", TypeError, f"bind must be a function, {BOUND}, got 'both'"),
    (ALL, "bind", lambda m: (m, None), TypeError, rf"bind is {BOUND}.*takes \(m\)"),
    (ALL, "eval_split", 3, TypeError, "eval_split must be the name of a split.*got 3"),
    (STAGGERED, "stagger", "no", TypeError, "stagger must be True or False, got 'no'"),
    (EVOLUTION, "antithetic", 1, TypeError, "antithetic must be True or False, got 1"),
    (EVOLUTION, "trace", None, TypeError, "trace must be True or False, got None"),
    (EVOLUTION, "compile", "yes", TypeError, "compile must be True or False, got 'yes'"),
    (ALL, "ranks", 2, TypeError, r"ranks must be fmeta\.distributed\.Ranks.*joined.*got 2"),
    (SCORED, "meta_loss", "final", TypeError, r"meta_loss must be a function.*got 'final'"),
    (WHOLE, "meta_loss", lambda a, b: a, TypeError, r"meta_loss\(run\), but.*takes \(a, b\)"),
    (OF_PIECES, "meta_loss", lambda a: a, TypeError, rf"meta_loss\({BY_STEP}\), but.*\(a\)"),
    (SCORED, "meta_loss", meta_losses.final, TypeError, r"builder final itself.*=final\(\)"),
    (SCORED, "meta_loss", meta_losses.weighted, TypeError, r"builder.*=weighted\(weights\)"),
    (LEARNED, "inner_loss", "mse", TypeError, "inner_loss must be a function.*got 'mse'"),
    (LEARNED, "inner_loss", lambda p, b: p, TypeError, rf"inner_loss\({LOSS}\), but.*\(p, b\)"),
    (["implicit"], "outer_loss", lambda p: p, TypeError, rf"outer_loss\({LOSS}\), but.*\(p\)"),
    (OF_PIECES, "horizon", lambda g: 4, TypeError, r"horizon\(generator, estimate\), but.*\(g\)"),
    (OF_PIECES, "horizon", log_uniform, TypeError, r"builder log_uniform itself.*\(low, high\)"),
    (EVOLUTION, "perturb", lambda m: m, TypeError, r"perturb\(meta_params, step, particle\), but"),
    (ALL, "family", fmeta.tasks.quadratic, TypeError, "family must be.*got function: call one"),
    (["implicit"], "proximal", True, TypeError, "proximal must be a number, got True"),
    (["implicit"], "num_iterations", 2.5, TypeError, r"num_iterations must be an int.*2\.5"),
    (["implicit"], "damping", "1", TypeError, "damping must be a number, got '1'"),
    (["implicit"], "step_size", None, TypeError, "step_size must be a number, got None"),
    (["score_function"], "discount", "1", TypeError, "discount must be a number, got '1'"),
    (["score_function"], "relative", "x", TypeError, "relative must be True or False, got 'x'"),
    (["score_function"], "std", torch.tensor([1.0, torch.inf]), ValueError, "finite, got inf"),
    (["score_function"], "std", lambda m: 1.0, TypeError, rf"std is {STD}.*takes \(m\)"),
]


def cases(table):
    return [
        pytest.param(name, *row, id=f"{name}-{row[0]}-{i}")
        for i, (names, *row) in enumerate(table)
        for name in names
    ]


@pytest.mark.parametrize(("name", "argument", "value", "error", "message"), cases(BUILT))
def test_as_it_is_built(name, argument, value, error, message):
    with pytest.raises(error, match=message):
        build(name, **{argument: value})


@pytest.mark.parametrize("name", ALL)
def test_sizes_may_be_integers_of_numpy(name):
    plain = {"num_tasks": 2, "horizon": 4}
    plain |= {"num_iterations": 3, "damping": 0.5} if name == "implicit" else {}
    plain |= PIECES if name in OF_PIECES else {}
    plain |= {"std": 0.25} if name in ("es", "es_single", "nres", "pes", "score_function") else {}
    numpy = {k: np.int64(v) if isinstance(v, int) else np.float32(v) for k, v in plain.items()}
    got, want = (first(build(name, **sizes), meta_of(name)) for sizes in (numpy, plain))
    assert torch.equal(got.loss, want.loss)


def test_functions_of_other_forms_are_taken():
    def wrapper(*args):
        return bind(*args)

    wrapper.__wrapped__ = lambda one: one
    want = first(build("full")).loss
    for own in (wrapper, functools.partial(bind), type("Bind", (), {"__call__": bound})()):
        assert first(build("full", bind=own)).loss == want
    assert first(build("full", meta_loss=lambda run, scale=1.0: run.losses.mean())).loss == want


@pytest.mark.parametrize("name", EVOLUTION)
def test_one_particle_alone_has_nothing_to_compare_with(name):
    for options in (
        {"num_tasks": 1},
        {"num_tasks": 4, "num_particles": 1},
        {"num_tasks": 3, "family": mixture((FAMILY, FAMILY))},
    ):
        with pytest.raises(ValueError, match=r"antithetic=False compares.*at least 2, got 1"):
            build(name, antithetic=False, **options)


STARTS = [
    ({"y": torch.zeros(3)}, "path x is missing; path y is not in the"),
    ({"x": torch.zeros(2)}, r"path x has shape \(2,\).*shape \(3,\)"),
    ({"x": 0.0}, "path x is a float, not a tensor"),
]


@pytest.mark.parametrize(("start", "message"), STARTS, ids=["key", "shape", "number"])
@pytest.mark.parametrize("name", ALL)
def test_a_start_that_is_not_the_family_s(name, start, message):
    with pytest.raises(ValueError, match=f"the start that bind returned.*{message}.*family.init"):
        first(build(name, bind=lambda m, c: (RULE.init(), start)))


def test_a_family_without_a_start_takes_any():
    nothing = FAMILY._replace(init=lambda config, generator: {})
    assert first(build("full", family=nothing)).loss == first(build("full")).loss


@pytest.mark.parametrize("name", ALL)
def test_seeds(name):
    estimator, meta = build(name), meta_of(name)
    for seed in (0.5, "0", None, True):
        with pytest.raises(TypeError, match=f"seed must be an integer, got {seed!r}"):
            estimator.init(meta, seed)
    assert estimator.init(meta, torch.tensor(3)).seed == 3


def test_seeds_of_mixtures():
    with pytest.raises(TypeError, match=r"seed must be an integer, got 0\.5"):
        build("pes", family=mixture((FAMILY, FAMILY))).init(META, 0.5)


STATES = [
    ("full", "pes", TypeError, r"EvolutionState, but those.* are FreshTasksState"),
    ("truncated", "pes", TypeError, r"EvolutionState, but those.* are TruncatedState"),
    ("online", "truncated", TypeError, r"TruncatedState, but those.* are OnlineState"),
    ("pes", "full", TypeError, r"FreshTasksState, but those.* are EvolutionState"),
    ("implicit", "truncated", TypeError, r"TruncatedState, but those.* are FreshTasks"),
    ("score_function", "full", TypeError, r"FreshTasksState, but those.*ScoreFunctionState"),
    ("nres", "pes", ValueError, "another evolution strategy: this one does not sum"),
    ("pes", "nres", ValueError, "another evolution strategy: this one sums"),
]


@pytest.mark.parametrize(("name", "other", "error", "message"), STATES)
def test_states_of_another_estimator(name, other, error, message):
    with pytest.raises(error, match=f"{message}.*give what its own init"):
        build(name).estimate(meta_of(name), build(other).init(META, 0))


@pytest.mark.parametrize("name", OF_PIECES)
def test_states_of_other_trainings(name):
    state = build(name, num_tasks=1).init(META, 0)
    with pytest.raises(ValueError, match=r"\(tasks, copies\) \(1, .\).*makes \(2, .\).*own init"):
        build(name).estimate(META, state)


def test_states_of_opposite_pairs():
    state = build("pes").init(META, 0)
    with pytest.raises(ValueError, match=r"\(2, 2\).*makes \(2, 1\)"):
        build("pes", antithetic=False).estimate(META, state)


def test_states_of_mixtures():
    both = build("full", family=mixture((FAMILY, FAMILY)))
    with pytest.raises(TypeError, match=r"no tuple of the states of 2 families.*own init"):
        both.estimate(META, (build("full").init(META, 0),))
    with pytest.raises(TypeError, match="FreshTasksState"):
        build("full").estimate(META, both.init(META, 0))


@pytest.mark.parametrize("other", [{"baseline": "learned"}, {"horizon": 5}, {"baseline": None}])
def test_states_of_another_baseline(other):
    meta = meta_of("score_function")
    state = build("score_function", **other).init(meta, 0)
    with pytest.raises(ValueError, match=r"another baseline or horizon.*own init"):
        build("score_function").estimate(meta, state)


# Deviations of steps

STDS = [
    ({"x": torch.ones(2)}, ValueError, r"std at path x has shape \(2,\).*parameter, \(3,\)"),
    (lambda m, c: {"x": torch.ones(2)}, ValueError, r"std at path x has shape \(2,\)"),
    ({"y": 0.1}, ValueError, "std is not shaped like.*path x is missing"),
    (lambda m, c: {"x": "1"}, TypeError, "std must be a number at path x, got '1'"),
    (lambda m, c: -0.1, ValueError, r"std gives -0\.1.* at path x.*exponential"),
    (lambda m, c: torch.tensor([1.0, 0.0, 1.0]), ValueError, r"std gives 0\.0 at path x"),
    (lambda m, c: torch.tensor(torch.nan), ValueError, "std gives nan at path x"),
    (lambda m, c: torch.tensor([1.0, torch.inf, 2.0]), ValueError, "std gives inf at path x"),
]


@pytest.mark.parametrize(("std", "error", "message"), STDS, ids=range(len(STDS)))
def test_stds_are_looked_at_by_init(std, error, message):
    with pytest.raises(error, match=message):
        build("score_function", std=std).init(meta_of("score_function"), 0)


def test_a_std_that_is_learned_below_0():
    learned = lambda meta, config: meta["std"]
    estimator = build("score_function", std=learned, trace=False)
    meta = {"rule": RULE.init(), "std": torch.tensor(0.1)}
    state = estimator.init(meta, 0)
    assert torch.isfinite(estimator.estimate(meta, state)[0].loss)
    for value in (-0.1, 0.0):
        with pytest.raises(ValueError, match=rf"std gives {value}.* at path x"):
            estimator.estimate({**meta, "std": torch.tensor(value)}, state)


@pytest.mark.parametrize("name", EVOLUTION)
def test_stds_of_meta_parameters_are_looked_at_by_init(name):
    with pytest.raises(ValueError, match=r"std is not shaped like.*path rule/lr is missing"):
        build(name, std={"start": 0.1}).init(META, 0)


# Losses


@pytest.mark.parametrize("name", LEARNED)
def test_inner_losses_are_scalars(name):
    options = {"eval_split": "train"} if name != "implicit" else {}
    vector = lambda data, config, params, batch, meta: params["x"] * meta["start"]
    with pytest.raises(ValueError, match=r"inner_loss must return a floating scalar.*\(3,\)"):
        first(build(name, inner_loss=vector, **options), meta_of(name))


def test_outer_losses_are_scalars():
    vector = lambda data, config, params, batch, meta: params["x"]
    with pytest.raises(ValueError, match=r"outer_loss must return a floating scalar.*\(3,\)"):
        first(build("implicit", outer_loss=vector), meta_of("implicit"))


META_LOSSES = [
    (lambda: meta_losses.weighted("x"), TypeError, "weights must be a function, or one num.*'x'"),
    (lambda: meta_losses.weighted([1.0, "x"]), TypeError, "weights must be a function, or"),
    (lambda: meta_losses.weighted([1.0, torch.nan]), ValueError, "weights must be finite.*nan"),
    (lambda: meta_losses.weighted(lambda t: t), TypeError, r"weights\(t, horizon\), but"),
    (lambda: meta_losses.log_ratio("x"), TypeError, "baseline must be a function, or"),
    (lambda: meta_losses.log_ratio(True), TypeError, "baseline must be a number, got True"),
    (lambda: meta_losses.log_ratio(lambda: 1.0), TypeError, r"baseline\(config\), but"),
    (lambda: meta_losses.log_ratio(floor=0.0), ValueError, r"floor must be positive, got 0\.0"),
    (lambda: meta_losses.sum(of="x"), TypeError, "of must be a function.*got 'x'"),
    (lambda: meta_losses.final(of=meta_losses.log_ratio), TypeError, r"of=log_ratio\(\)"),
    (lambda: meta_losses.training(of=lambda run: run), TypeError, rf"of\({BY_STEP}\), but"),
]


@pytest.mark.parametrize(("make", "error", "message"), META_LOSSES, ids=range(len(META_LOSSES)))
def test_meta_losses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def square(params, meta):
    return (params - meta).square().sum()


IMPLICIT = [
    ([], square, 2.0, ValueError, "inner_loss is an empty list"),
    (square, [], 2.0, ValueError, "outer_loss is an empty list"),
    ("x", square, 2.0, TypeError, "inner_loss must be a function.*got 'x'"),
    (square, lambda p: p, 2.0, TypeError, r"outer_loss\(params, meta_params\), but.*\(p\)"),
    (lambda p, m: p, square, 2.0, ValueError, r"inner_loss must return a floating scalar.*\(1,\)"),
    (square, lambda p, m: p, 2.0, ValueError, r"outer_loss must return a floating scalar.*\(1,\)"),
    (square, square, 2, TypeError, "the leaf of params at path <root> is torch.int64"),
]


@pytest.mark.parametrize(
    ("inner", "outer", "value", "error", "message"), IMPLICIT, ids=range(len(IMPLICIT))
)
def test_implicit_gradients(inner, outer, value, error, message):
    with pytest.raises(error, match=message):
        fmeta.implicit_gradient(inner, outer, torch.tensor([value]), torch.tensor([1.0]))


def test_implicit_gradients_of_no_parameters():
    for meta, error in (({}, ValueError), ({"a": {"b": 1.0}}, TypeError)):
        with pytest.raises(error, match=r"meta_params (holds no tensor|at path a/b is float)"):
            fmeta.implicit_gradient(square, square, torch.ones(1), meta)


@pytest.mark.parametrize("name", ["full", "forward", "truncated"])
def test_weights_of_another_rule_are_told_within_transforms_too(name):
    rule = optimizers.linear() if name == "forward" else optimizers.mlp()
    more = {"truncation": 2} if name == "truncated" else {}
    estimator = getattr(estimators, name)(rule, FAMILY, num_tasks=2, horizon=2, **more)
    th = optimizers.lstm().init() if name != "forward" else optimizers.nn_adam().init()["start"]
    with pytest.raises(
        ValueError, match=r"opt_params do not fit this optimizer: it learns .*, got"
    ):
        estimator.estimate(th, estimator.init(th, 0))
