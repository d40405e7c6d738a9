"""What the processes of these tests do: each function gets its ranks and gives tensors by name."""

import dataclasses
import time

import torch

import fmeta
from fmeta import distributed, estimators, fewshot, trees
from fmeta.meta_train import resume, run
from fmeta.tasks import TaskFamily, mixture

RULE = fmeta.learn(fmeta.optimizers.adam, {"lr": "log", "betas": "log1m"}, lr=0.05)
META = trees.map(lambda x: x.double(), RULE.init())
DOUBLE = {"dtype": torch.float64}


def quadratics(dim, worst=1.2):
    """``k |w - b|^2 / 2``; tasks whose number k is above ``worst`` have no finite loss."""

    def loss(data, config, params, batch):
        value = config["k"] * (params["w"] - batch).square().sum() / 2
        return torch.where(config["k"] > worst, torch.nan, value)

    return TaskFamily(
        (),
        lambda generator: {"k": 0.5 + torch.rand((), generator=generator, **DOUBLE)},
        lambda config, generator: {"w": torch.randn(dim, generator=generator, **DOUBLE)},
        lambda config, generator, steps, split="train": torch.randn(
            steps, dim, generator=generator, **DOUBLE
        ),
        loss,
    )


QUADRATIC = quadratics(3)
MIXED = mixture([QUADRATIC, quadratics(5, worst=9.0)], weights=(2, 1))
OPTIONS = {"horizon": (4, 6), "truncation": 3}
NOISE = {"horizon": 4, "std": 0.1}


def decayed(data, config, params, batch, meta):
    """A loss that reads all of META, so that its optimum depends on it."""
    penalty = (meta["lr"].exp() + meta["betas"][0].exp() * meta["betas"][1].cos().square()) / 2
    value = config["k"] * (params["w"] - batch).square().sum() / 2
    return value + penalty * params["w"].square().sum()


ESTIMATORS = {
    "full": lambda **o: estimators.full(RULE, QUADRATIC, num_tasks=5, horizon=4, **o),
    "full of a mixture": lambda **o: estimators.full(RULE, MIXED, num_tasks=5, horizon=4, **o),
    "implicit": lambda **o: estimators.implicit(
        fmeta.optimizers.sgd(0.1), QUADRATIC, num_tasks=5, horizon=4, inner_loss=decayed, **o
    ),
    "implicit of a mixture": lambda **o: estimators.implicit(
        fmeta.optimizers.sgd(0.1), MIXED, num_tasks=5, horizon=4, inner_loss=decayed, **o
    ),
    "truncated": lambda **o: estimators.truncated(RULE, QUADRATIC, num_tasks=5, **OPTIONS, **o),
    "truncated, a mixture": lambda **o: estimators.truncated(
        RULE, MIXED, num_tasks=5, **OPTIONS, **o
    ),
    "pes": lambda **o: estimators.pes(RULE, QUADRATIC, num_tasks=5, **OPTIONS, **o),
    "pes, a mixture": lambda **o: estimators.pes(RULE, MIXED, num_tasks=5, **OPTIONS, **o),
    "pes, two tasks a particle": lambda **o: estimators.pes(
        RULE, QUADRATIC, num_tasks=6, num_particles=3, **OPTIONS, **o
    ),
    "es": lambda **o: estimators.es(RULE, QUADRATIC, num_tasks=5, **OPTIONS, **o),
    "nres": lambda **o: estimators.nres(RULE, MIXED, num_tasks=5, **OPTIONS, **o),
    "pes, one copy": lambda **o: estimators.pes(
        RULE, QUADRATIC, num_tasks=5, antithetic=False, **OPTIONS, **o
    ),
    "score function": lambda **o: estimators.score_function(
        RULE, QUADRATIC, num_tasks=5, baseline="moving", recurrent=False, **NOISE, **o
    ),
    "score function, learned baseline": lambda **o: estimators.score_function(
        RULE, QUADRATIC, num_tasks=5, baseline="learned", chunk_size=2, **NOISE, **o
    ),
    "score function of a mixture": lambda **o: estimators.score_function(
        RULE,
        MIXED,
        num_tasks=5,
        num_rollouts=3,
        baseline="fitted_rollouts",
        normalize="step",
        eval_split="test",
        **NOISE,
        **o,
    ),
}


def estimates(name, ranks, count=4):
    """Some estimates one after the other, and the whole state after them, as paths and tensors."""
    estimator = ESTIMATORS[name](ranks=ranks)
    state, found = estimator.init(META, 7), []
    for _ in range(count):
        estimate, state = estimator.estimate(META, state)
        found.append({"loss": estimate.loss, "grads": estimate.grads, "metrics": estimate.metrics})
    return {"estimates": by_path(found), "state": by_path(estimator.gather(state))}


def by_path(tree):
    leaves = [torch.as_tensor(x) for x in trees.leaves(tree)]
    return dict(zip(trees.paths(tree), leaves, strict=True))


def float32_estimates(ranks):
    """Float32 estimates of the kind that the main job makes, the second of each."""
    rule = fmeta.optimizers.basis_mlp()
    options = {"num_tasks": 5, "horizon": 20, "std": 0.03, "trace": False, "ranks": ranks}
    builders = {
        "pes": lambda family: estimators.pes(rule, family, truncation=10, **options),
        "score function": lambda family: estimators.score_function(
            rule, family, baseline="learned", recurrent=False, **options
        ),
    }
    found = {}
    for name, build in builders.items():
        estimator = build(fmeta.tasks.sinusoid())
        state = estimator.init(rule.init(), 3)
        _, state = estimator.estimate(rule.init(), state)
        found[name] = estimator.estimate(rule.init(), state)[0].grads
    return found


def traffic(ranks, width):
    """Bytes that this rank contributes to an estimate for a rule of so many weights."""
    sent = []
    counting = distributed.Ranks(
        ranks.rank, ranks.size, None, ranks.watch, lambda kind, size: sent.append((kind, size))
    )
    rule = fmeta.learn(fmeta.optimizers.sgd, {"lr": "log"}, lr=0.01)
    meta = {"weights": torch.zeros(width), **rule.init()}
    found = {}
    of_each = {"pes": {"truncation": 4}, "full": {}, "score_function": {"std": 0.1}}
    for name, extra in of_each.items():
        build = getattr(estimators, name)
        estimator = build(
            rule,
            QUADRATIC,
            num_tasks=4,
            horizon=4,
            bind=lambda meta, config: ({"lr": meta["lr"]}, None),
            ranks=counting,
            **extra,
        )
        sent.clear()
        estimator.estimate(meta, estimator.init(meta, 0))
        found[name] = [f"{kind} {size}" for kind, size in sent]
    return found


def mean(ranks):
    """`all_reduce_mean` of trees of several dtypes, with tasks 1 and 3, and with a rank of none."""
    x = float(ranks.rank)
    half = {"dtype": torch.bfloat16}
    tree = {"w": torch.full((2, 3), x), "none": None, "half": torch.full((2,), x, **half)}
    tree["double"] = torch.tensor(1 / 3 + x, **DOUBLE)
    weighed = distributed.all_reduce_mean(tree, weight=1 + 2 * ranks.rank)
    bad = {"w": torch.tensor([1.0 if ranks.is_first else torch.nan])}
    left_out = distributed.all_reduce_mean(bad, weight=1 - ranks.rank, ranks=ranks)
    return {"weighed": weighed, "left out": left_out}


def same(ranks):
    """What is said where the ranks do not hold the same."""
    distributed.check_same({"a": torch.ones(2), "b": None, "c": 3}, ranks, "trees")
    try:
        distributed.check_same({"a": torch.tensor(ranks.rank)}, ranks, "trees")
    except ValueError as error:
        return str(error)


def unlike(ranks):
    """What each rank is told where trees are not alike, whose mean could not be waited for."""
    odd, said = not ranks.is_first, {}
    cases = {
        "shape": {"a": torch.ones(2), "w": torch.ones(3 + odd)},
        "key": {"a": torch.ones(2)} | ({} if odd else {"w": torch.ones(3)}),
        "further key": {"a": torch.ones(2)} | ({"w": torch.ones(3)} if odd else {}),
        "dtype": {"w": torch.ones(3, dtype=torch.int64 if odd else torch.float32)},
        "none": {"w": None if odd else torch.ones(3)},
    }
    for name, tree in cases.items():
        try:
            distributed.all_reduce_mean(tree)
        except ValueError as error:
            said[name] = str(error)
    return said


def handed_out(ranks):
    """Rank 0's tree, whatever the others have."""
    if ranks.is_first:
        x = torch.arange(3.0)
        tree = {"x": x, "again": x, "n": 0.1, "none": None, "wide": torch.ones(2, 2, **DOUBLE)}
    else:
        tree = {"x": torch.zeros(()), "again": torch.zeros(1), "n": 0, "none": None}
        tree["wide"] = torch.zeros(0)
    return distributed.broadcast_tree(tree, ranks)


def everything(ranks, folder):
    return {
        "estimates": {name: estimates(name, ranks) for name in ESTIMATORS},
        "summed": {name: estimates(name, not_redrawing(ranks)) for name in SUMMED},
        "float32": float32_estimates(ranks),
        "traffic": {width: traffic(ranks, width) for width in (10, 1000)},
        "mean": mean(ranks),
        "few-shot": few_shot(ranks),
        "without steps": without_steps(ranks),
        "same": same(ranks),
        "unlike": unlike(ranks),
        "handed out": handed_out(ranks),
        "run": meta_trained(ranks, folder / "run"),
    }


def few_shot(ranks):
    """Three meta-batches of five episodes with MAML, second order."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * torch.randn(p.shape, generator=fmeta.random.fold_in(1, i))
    learner = fewshot.maml(net, num_steps=2, lr=0.01, loss="mse")
    estimator = fewshot.estimator(learner, fewshot.sinusoid(5, 5), num_tasks=5, ranks=ranks)
    params = learner.init()
    state, found = estimator.init(params, 0), {}
    for k in range(3):
        estimate, state = estimator.estimate(params, state)
        found |= {f"{k}/{name}": x for name, x in estimate.grads["model_params"].items()}
        found |= {f"{k}/{name}": estimate.metrics[name] for name in ("drawn", "losses")}
        found[f"{k}/loss"] = estimate.loss
    return found


def without_steps(ranks):
    """An estimate of learners that take no inner steps, and so have no losses of them."""
    images = torch.randn(6, 4, 3, generator=fmeta.random.fold_in(2))
    source = fewshot.from_classes({"train": images}, ways=3, shots=2, queries=2)
    net = torch.nn.Linear(3, 4)
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * torch.randn(p.shape, generator=fmeta.random.fold_in(1, i))
    sizes = {"filters": 2, "attends": ((3, 3), (3, 3))}
    learners = {
        "protonet": fewshot.protonet(net, 3),
        "fine_tune": fewshot.fine_tune(net, 3, 6, num_features=4),
        "snail": fewshot.snail(None, 3, 6, num_features=3, **sizes),
    }
    found = {}
    for name, learner in learners.items():
        estimator = fewshot.estimator(learner, source, num_tasks=3, ranks=ranks)
        params = learner.init()
        estimate, _ = estimator.estimate(params, estimator.init(params, 0))
        found[f"{name}/loss"] = estimate.loss
        found |= {f"{name}/{key}": x for key, x in estimate.metrics.items()}
        grads = fmeta.trees.leaves(estimate.grads)
        found |= {f"{name}/grads/{i}": x for i, x in enumerate(grads)}
    return found


def not_redrawing(ranks):
    """The same ranks, which exchange gradients in evolution strategies too."""
    return dataclasses.replace(ranks, redraws=False)


SUMMED = ("pes, a mixture", "pes, two tasks a particle", "pes, one copy", "nres")
SOME = (
    "truncated, a mixture",
    "pes, two tasks a particle",
    "nres",
    "score function",
    "score function, learned baseline",
    "score function of a mixture",
)


def some_estimates(ranks, folder):
    summed = estimates("pes, two tasks a particle", not_redrawing(ranks), 3)
    return {**{name: estimates(name, ranks, 3) for name in SOME}, "summed": summed}


def meta_trained(ranks, folder, *, num_steps=12, on_step=None):
    """A run in a folder, or the rest of it: what it returns, and its log."""
    estimator = ESTIMATORS["pes, a mixture"](ranks=ranks)
    outer = fmeta.chain(fmeta.clip_by_global_norm(1.0), fmeta.optimizers.adam(0.05))
    target = trees.map(lambda x: x + 1, META)
    options = {
        "outer": outer,
        "num_steps": num_steps,
        "averaging": 0.5,
        "validate": lambda meta: sum(
            (x - y).square().sum()
            for x, y in zip(trees.leaves(meta), trees.leaves(target), strict=True)
        ),
        "validate_every": 3,
        "checkpoint_every": 4,
        "log": folder.with_suffix(".jsonl"),
        "on_step": on_step,
    }
    if (folder / "state.safetensors").exists():
        result = resume(folder, estimator, META, **options)
    else:
        result = run(estimator, META, checkpoint_folder=folder, **options)
    history = [{k: v for k, v in m.items() if isinstance(v, int | float)} for m in result.history]
    return {"meta_params": result.meta_params, "history": history, "step": result.step}


def goes_on(ranks, folder):
    """As `meta_trained`, wherever a job before it stands."""
    return meta_trained(ranks, folder / "run")


def half(ranks, folder):
    """A run of which rank 0 is interrupted after the outer step 6."""
    meta_trained(ranks, folder / "run", on_step=_interrupt)


def _interrupt(metrics):
    if metrics["step"] == 6:
        raise KeyboardInterrupt


def slow(ranks, folder):
    """A run slow enough to be killed in its middle."""
    made = ESTIMATORS["pes, a mixture"](ranks=ranks)

    def slowly(meta_params, state):
        time.sleep(0.2)
        return made.estimate(meta_params, state)

    ESTIMATORS["pes, a mixture"] = lambda ranks: made._replace(estimate=slowly)
    return meta_trained(ranks, folder / "run", num_steps=12)


def fails_on_one(ranks, folder):
    """One rank raises where the others wait for it."""
    if ranks.rank == 1:
        raise ValueError("no such task")
    ranks.wait_for_all()
