"""Wrong input gets an error that says what is wrong, where, and what to do."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import fmeta
from fmeta import optimizers, schedules
from fmeta.random import fold_in

PARAMS = {"w": torch.ones(2, 3), "b": torch.ones(3)}
BATCHES = torch.zeros(4)
ADAM = optimizers.adam(0.1)


def loss(p, batch):
    return sum(x.square().sum() for x in p.values()) + 0 * batch.sum()


def unroll(
    optimizer=ADAM, loss_fn=loss, opt_params=None, params=PARAMS, batches=BATCHES, **options
):
    opt_params = {} if opt_params is None else opt_params
    return fmeta.unroll(optimizer, loss_fn, opt_params, params, batches, **options)


def step(optimizer, opt_params=None, params=PARAMS, grads=None, hidden=None, **extra):
    opt_params = optimizer.init() if opt_params is None else opt_params
    hidden = optimizer.init_hidden(optimizer.init(), params) if hidden is None else hidden
    return optimizer.step(opt_params, params, PARAMS if grads is None else grads, hidden, **extra)


def started(name, params=PARAMS, **arguments):
    rule = optimizers.BUILDERS[name](**arguments)
    return rule.init_hidden(rule.init(), params)


# Every case: a call, the kind of error, and the words that a user must find in it.
TREES = {
    "gradient: leaf missing": (
        lambda: step(ADAM, grads={"w": PARAMS["w"]}),
        ValueError,
        "the gradient is not shaped like the parameters: path b is missing",
    ),
    "gradient: leaf too many": (
        lambda: step(ADAM, grads={**PARAMS, "z": PARAMS["b"]}),
        ValueError,
        "path z is not in the parameters",
    ),
    "gradient: other shape": (
        lambda: step(ADAM, grads={**PARAMS, "b": torch.ones(4)}),
        ValueError,
        r"the gradient at path b has shape \(4,\), but the parameter there has shape \(3,\)",
    ),
    "gradient: other kind of tree": (
        lambda: step(ADAM, grads=[PARAMS["b"], PARAMS["w"]]),
        ValueError,
        "path b is missing; path w is missing; path 0 is not in the parameters",
    ),
    "gradient: a tree at a leaf": (
        lambda: step(ADAM, grads={**PARAMS, "b": {"x": PARAMS["b"]}}),
        ValueError,
        "the gradient at path b is a dict, not a tensor",
    ),
    "gradient: a number": (
        lambda: step(ADAM, grads={**PARAMS, "b": 0.0}),
        ValueError,
        "the gradient at path b is a float, not a tensor.*None only where there is no gradient",
    ),
    "nested path": (
        lambda: step(optimizers.sgd(), params=[{"x": PARAMS["b"]}], grads=[{"x": PARAMS["w"]}]),
        ValueError,
        r"the gradient at path 0/x has shape \(2, 3\)",
    ),
    "delta: other structure": (
        lambda: step(ADAM._replace(update=lambda th, p, g, h, **k: ({"w": g["w"]}, h))),
        ValueError,
        "the optimizer's delta is not shaped like the parameters: path b is missing",
    ),
    "delta: other shape, in unroll": (
        lambda: unroll(ADAM._replace(update=lambda th, p, g, h, **k: ({**g, "b": g["w"]}, h))),
        ValueError,
        r"the optimizer's delta at path b has shape \(2, 3\)",
    ),
    "rate: leaf missing": (
        lambda: step(optimizers.sgd({"w": 0.1})),
        ValueError,
        r"lr \(a tree\) is not shaped like the parameters: path b is missing",
    ),
    "rate: a vector": (
        lambda: step(optimizers.sgd(torch.ones(3))),
        ValueError,
        r"lr is a tensor of shape \(3,\): give a number, a scalar tensor, or a tree",
    ),
    "per_parameter_sgd: rates of another tree": (
        lambda: optimizers.per_parameter_sgd(PARAMS, lr={"w": 0.1}),
        ValueError,
        "path b is missing",
    ),
    "per_parameter_sgd: rates of another shape": (
        lambda: optimizers.per_parameter_sgd(PARAMS, lr={"w": torch.ones(5), "b": 0.1}),
        ValueError,
        r"at path w has shape \(5,\), but the parameter there has shape \(2, 3\)",
    ),
}
PARAMETERS = {
    "integers": (
        lambda: step(ADAM, params={"ids": torch.arange(3)}),
        TypeError,
        "parameter at path ids is torch.int64, not a floating tensor.*model_state.*loss_args",
    ),
    "integers in unroll": (
        lambda: unroll(params={"ids": torch.arange(3)}),
        TypeError,
        "parameter at path ids is torch.int64",
    ),
    "flags": (
        lambda: ADAM.init_hidden({}, {"on": torch.tensor(True)}),
        TypeError,
        "parameter at path on is torch.bool",
    ),
    "a number": (
        lambda: ADAM.init_hidden({}, {"w": 1.0}),
        TypeError,
        "parameter at path w is float",
    ),
    "a module": (
        lambda: unroll(params=nn.Identity()),
        TypeError,
        "parameter at path <root> is Identity",
    ),
    "None in unroll": (
        lambda: unroll(params={"w": None, "b": PARAMS["b"]}),
        TypeError,
        "parameter at path w is NoneType",
    ),
    "like of per_parameter_sgd": (
        lambda: optimizers.per_parameter_sgd({"ids": torch.arange(3)}),
        TypeError,
        "parameter at path ids is torch.int64",
    ),
}
META = {k: p.to("meta") for k, p in PARAMS.items()}
DEVICES = {
    "parameters": (
        lambda: ADAM.init_hidden({}, {**PARAMS, "w": META["w"]}),
        ValueError,
        "mix devices: b is on cpu, w on meta: move them to one device",
    ),
    "parameters in unroll": (
        lambda: unroll(params={**PARAMS, "w": META["w"]}),
        ValueError,
        "mix devices: b is on cpu, w on meta",
    ),
    "gradient": (
        lambda: step(ADAM, grads={**PARAMS, "w": META["w"]}),
        ValueError,
        "at path w the parameter is on cpu and the gradient on meta: move them",
    ),
    "hidden state": (
        lambda: step(ADAM, hidden=ADAM.init_hidden({}, META)),
        ValueError,
        "at path b the parameter is on cpu and the hidden state's 'm' on meta",
    ),
    "hidden state of a learned rule": (
        lambda: step(optimizers.lstm(), hidden=started("lstm", META)),
        ValueError,
        "at path b the parameter is on cpu and the hidden state's 'h' on meta",
    ),
}
DEVICES |= {
    f"opt_params of {name}": (
        lambda name=name: step(
            optimizers.BUILDERS[name](),
            fmeta.trees.map(lambda x: x.to("meta"), optimizers.BUILDERS[name]().init()),
        ),
        ValueError,
        "opt_params at path .* are on meta, but the parameters are on cpu: move them there",
    )
    for name in ("linear", "lstm", "normalized_mlp")
}
DEVICES["opt_params of a module"] = (
    lambda: step(fmeta.coordinatewise(module()), {k: p.to("meta") for k, p in WEIGHTS.items()}),
    ValueError,
    "opt_params at path bias are on meta, but the parameters are on cpu",
)
CHAIN = fmeta.chain(fmeta.clip_by_global_norm(1.0), ADAM)
SCHEDULED = fmeta.scheduled(ADAM, lambda t, n: 1.0)
PARTITION = fmeta.partition({"all": ADAM}, lambda path, p: "all")
LEARNED = fmeta.learn(optimizers.adam, {"lr": "log", "betas": "log1m"})
FOREIGN = {
    "sgd's state in adam": (
        lambda: step(ADAM, hidden=started("sgd")),
        ValueError,
        "looked for 'count' and did not find it.*at path b holds nothing.*init_hidden",
    ),
    "momentum's state in adam": (
        lambda: step(ADAM, hidden=started("sgd", momentum=0.9)),
        ValueError,
        "looked for 'count'.*path b holds m, as if of another optimizer",
    ),
    "adam's state in lstm": (
        lambda: step(optimizers.lstm(), hidden=started("adam")),
        ValueError,
        r"hidden state's 'count' at path b has shape \(\), but.*\(3,\): it is the state of other",
    ),
    "adam's state in normalized_mlp": (
        lambda: step(optimizers.normalized_mlp(), hidden=started("adam")),
        ValueError,
        "did not find it.*holds m, v, count",
    ),
    "adam's state in a chain": (
        lambda: step(CHAIN, hidden=started("adam")),
        ValueError,
        "the hidden state of a chain has no entry '0': is it of another optimizer",
    ),
    "adam's state in a partition": (
        lambda: step(PARTITION, hidden=started("adam")),
        ValueError,
        "hidden state of a partition has no entry 'all'",
    ),
    "adam's state in scheduled": (
        lambda: step(SCHEDULED, hidden=started("adam")),
        ValueError,
        "hidden state of `scheduled` has no entry 't', 'inner'",
    ),
    "a chain's state in adam": (
        lambda: step(ADAM, hidden=CHAIN.init_hidden(CHAIN.init(), PARAMS)),
        ValueError,
        "looked for 'count' and did not find it",
    ),
    "a dict as state": (
        lambda: step(ADAM, hidden={}),
        ValueError,
        "the hidden state is a dict, not what this optimizer's init_hidden returns",
    ),
    "the state of other shapes": (
        lambda: step(ADAM, hidden=started("adam", {"w": torch.ones(5), "b": torch.ones(3)})),
        ValueError,
        r"hidden state's 'm' at path w has shape \(5,\), but the parameter there has .*\(2, 3\)",
    ),
    "the lstm's state of other shapes": (
        lambda: step(
            optimizers.lstm(), hidden=started("lstm", {"w": torch.ones(5), "b": torch.ones(3)})
        ),
        ValueError,
        r"hidden state's 'h' at path w has shape \(5, 2, 20\)",
    ),
    "the state of other parameters": (
        lambda: step(ADAM, hidden=started("adam", {"z": torch.ones(5)})),
        ValueError,
        "the hidden state is not shaped like the parameters: path b is missing",
    ),
    "opt_params of lstm without a key": (
        lambda: step(
            optimizers.lstm(),
            {k: v for k, v in optimizers.lstm().init().items() if k != "output.bias"},
        ),
        ValueError,
        r"opt_params do not fit.*it learns .*output.bias \(1,\).*init\(\)",
    ),
    "empty opt_params for linear": (
        lambda: step(optimizers.linear(), {}),
        ValueError,
        r"opt_params do not fit.*it learns weight \(1, 2\), got nothing.*init\(\)",
    ),
    "empty opt_params for normalized_mlp": (
        lambda: step(optimizers.normalized_mlp(), {}),
        ValueError,
        r"opt_params do not fit.*it learns .*w0 \(30, 8\).*got nothing.*init\(\)",
    ),
    "opt_params of learn without a key": (
        lambda: step(LEARNED, {"lr": torch.tensor(0.0)}),
        ValueError,
        r"opt_params of the learned adam lack betas: give the dict that init\(\) returns",
    ),
    "empty opt_params for learn, in unroll": (
        lambda: unroll(LEARNED),
        ValueError,
        "opt_params of the learned adam lack lr, betas",
    ),
    "a dict for a chain": (
        lambda: step(CHAIN, {}),
        ValueError,
        "opt_params of a chain of 2 are a tuple of 2 in order, got a dict",
    ),
    "a tuple too short for a chain": (
        lambda: unroll(CHAIN, opt_params=({},)),
        ValueError,
        "are a tuple of 2 in order, got 1 of them",
    ),
    "a label missing for a partition": (
        lambda: unroll(PARTITION, opt_params={}),
        ValueError,
        "opt_params of a partition has no entry 'all'",
    ),
    "a module's parameter missing": (
        lambda: step(fmeta.coordinatewise(module()), {"weight": torch.ones(1, 2)}),
        ValueError,
        "'bias' .* missing",
    ),
}


WEIGHTS = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}


def module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(2, 1)


needing = lambda *names: ADAM._replace(needs=frozenset(names))
UNROLL = {
    "T = 0": (lambda: unroll(batches=torch.zeros(0)), ValueError, "at least one step, got T = 0"),
    "no batches": (
        lambda: unroll(batches=None),
        ValueError,
        r"batches holds no tensor: for data-free losses give torch.zeros\(T\)",
    ),
    "a scalar batch": (
        lambda: unroll(batches=torch.tensor(1.0)),
        ValueError,
        "path batches is a scalar: it needs a leading dimension T",
    ),
    "leading dimensions": (
        lambda: unroll(batches={"x": torch.zeros(4), "y": torch.zeros(5)}),
        ValueError,
        "path batches/y has 5 steps, but batches/x has 4",
    ),
    "leading dimension of eval_batches": (
        lambda: unroll(eval_batches=torch.zeros(5)),
        ValueError,
        "path eval_batches has 5 steps, but batches has 4",
    ),
    "leading dimension of extras": (
        lambda: unroll(extras={"noise": torch.zeros(5)}),
        ValueError,
        "path extras/noise has 5 steps",
    ),
    "extras that are no dict": (
        lambda: unroll(extras=torch.zeros(4)),
        TypeError,
        "extras must be a dict by the names of what the rule needs, got a Tensor",
    ),
    "a number among the batches": (
        lambda: unroll(batches={"x": BATCHES, "s": 1.0}),
        TypeError,
        "path batches/s is a float, not a tensor",
    ),
    "loss_args that are no tuple": (
        lambda: unroll(loss_args=torch.ones(2)),
        TypeError,
        r"loss_args must be a tuple of arguments, got a Tensor: .*loss_args=\(it,\)",
    ),
    "loss_args that are a dict": (
        lambda: unroll(loss_args={"a": torch.ones(2)}),
        TypeError,
        "loss_args must be a tuple of arguments, got a dict",
    ),
    "consts that are no tuple": (
        lambda: fmeta.scan(lambda c, x, w: (c, ()), BATCHES, BATCHES, consts=BATCHES),
        TypeError,
        r"consts must be a tuple of arguments.*consts=\(it,\)",
    ),
    "a body that returns no pair": (
        lambda: fmeta.scan(lambda c, x: c, BATCHES, BATCHES),
        TypeError,
        r"the body must return \(carry, y\), got a Tensor: return \(carry, \(\)\)",
    ),
    "a builder for an optimizer": (
        lambda: unroll(optimizers.adam),
        TypeError,
        r"must be an fmeta.Optimizer, got function: call the builder: adam\(",
    ),
    "torch's optimizer": (
        lambda: unroll(torch.optim.SGD),
        TypeError,
        r"must be an fmeta.Optimizer, got \w+: .*",
    ),
    "needs an extra": (
        lambda: unroll(needing("noise")),
        ValueError,
        r"needs noise: pass extras=\{'noise': \.\.\.\}.*leading dimension T",
    ),
    "needs the loss": (
        lambda: step(needing("loss")),
        ValueError,
        "needs the loss: call step",
    ),
    "needs the horizon, in a chain": (
        lambda: fmeta.chain(needing("num_steps")).init_hidden(({},), PARAMS),
        ValueError,
        "needs num_steps, the number of steps",
    ),
    "eval_loss_fn alone": (
        lambda: unroll(eval_loss_fn=loss),
        ValueError,
        "eval_loss_fn is given without eval_batches",
    ),
    "no state from a loss with model_state": (
        lambda: unroll(loss_fn=lambda p, b, s: loss(p, b), model_state=torch.ones(())),
        ValueError,
        r"with model_state, loss_fn must return \(loss, model_state\), got a Tensor",
    ),
    **{
        f"first_order = {bad!r}": (
            lambda bad=bad: unroll(first_order=bad),
            ValueError,
            'first_order must be False, True, "gradients" or "inputs", got',
        )
        for bad in ("second", 1, None, [])
    },
    **{
        f"checkpoint = {bad!r}": (
            lambda bad=bad: unroll(checkpoint=bad),
            ValueError,
            'checkpoint must be None, "sqrt" or a positive number of snapshots, got',
        )
        for bad in ("all", 0, True, [])
    },
    "an unknown optimizer": (
        lambda: optimizers.get("admaw"),
        ValueError,
        "unknown optimizer 'admaw': did you mean adamw or .* there are sgd, ",
    ),
    "an optimizer like no other": (
        lambda: optimizers.get("zzz"),
        ValueError,
        "unknown optimizer 'zzz': there are sgd, .*rmsprop, ",
    ),
}
HORIZON = fmeta.optimizer_from_step(
    lambda g: {}, lambda th, p, num_steps: {}, lambda th, p, g, h: (p, h), needs={"num_steps"}
)
LOSSY = fmeta.optimizer_from_step(
    lambda g: {}, lambda th, p: {}, lambda th, p, g, h, loss: (p, h), needs={"loss"}
)
NEEDS = {
    "from_step without its horizon": (
        lambda: HORIZON.init_hidden({}, PARAMS),
        ValueError,
        "needs num_steps",
    ),
    "weight decay of a rule without its horizon": (
        lambda: fmeta.with_weight_decay(HORIZON, 0.1).init_hidden({}, PARAMS),
        ValueError,
        "needs num_steps",
    ),
    "a transform without its horizon": (
        lambda: fmeta.to_transform(HORIZON, {}).init(PARAMS),
        ValueError,
        "needs num_steps",
    ),
    "a transform without its loss": (
        lambda: fmeta.to_transform(LOSSY, {}).update(PARAMS, {}, PARAMS),
        ValueError,
        "needs the loss",
    ),
    "a schedule without the horizon": (
        lambda: step(fmeta.scheduled(ADAM, lambda t, n: 1 - t / n)),
        ValueError,
        r"the schedule failed.*num_steps",
    ),
    "a schedule that says what it needs": (
        lambda: fmeta.scheduled(ADAM, lambda t, n: t / n, needs={"num_steps"}).init_hidden(
            {}, PARAMS
        ),
        ValueError,
        "needs num_steps",
    ),
    "a string": (
        lambda: fmeta.optimizer_from_step(
            lambda g: {}, lambda th, p: {}, lambda th, p, g, h: (p, h), needs="loss"
        ),
        TypeError,
        r"got a string: give \{'loss'\}",
    ),
    "a constant for a schedule": (
        lambda: fmeta.scheduled(ADAM, 0.5),
        TypeError,
        "must be a function of",
    ),
}


class Counting:
    """A rule whose state holds a Python number."""

    def init(self, generator):
        return {}

    def init_hidden(self, th, p):
        return {"count": 0}

    def update(self, th, p, g, h):
        return -g, h


class Failing(Counting):
    def init_hidden(self, th, p):
        return {}

    def update(self, th, p, g, h):
        raise RuntimeError("its own")


@pytest.mark.parametrize("lift", [fmeta.tensorwise, fmeta.coordinatewise])
def test_an_error_of_the_rule_itself_is_passed_on_as_it_is(lift):
    with pytest.raises(RuntimeError, match="its own") as caught:
        step(lift(Failing()))
    assert caught.value.__cause__ is None


NUMBERS = {
    **{
        f"a Python number in the state of a rule under {lift.__name__}": (
            lambda lift=lift: lift(Counting()).init_hidden({}, PARAMS),
            TypeError,
            r"init_hidden gives hidden\['count'\] = 0: .*tensors only",
        )
        for lift in (fmeta.tensorwise, fmeta.coordinatewise)
    },
    **{
        f"num_steps {n}": (
            lambda n=n: unroll(num_steps=n),
            ValueError,
            "num_steps must be a positive integer",
        )
        for n in (0, -3, 2.5, True)
    },
    "a vector of horizons": (
        lambda: unroll(num_steps=torch.tensor([5, 6])),
        ValueError,
        r"num_steps must be a scalar, got a tensor of shape \(2,\).*vmap",
    ),
    "a fractional length": (
        lambda: fmeta.scan(lambda c, x: (c, ()), torch.ones(()), None, length=2.5),
        TypeError,
        "length must be an integer, got 2.5",
    ),
    "a seed for a generator": (
        lambda: optimizers.lstm().init(3),
        TypeError,
        r"torch.Generator or None, got 3.*fold_in",
    ),
    "an integer gradient": (
        lambda: step(ADAM, grads={**PARAMS, "b": torch.ones(3, dtype=torch.int64)}),
        TypeError,
        "the gradient at path b is torch.int64",
    ),
    "a complex gradient": (
        lambda: step(ADAM, grads={**PARAMS, "b": torch.ones(3, dtype=torch.complex64)}),
        TypeError,
        "the gradient at path b is torch.complex64",
    ),
    "a list of parts": (
        lambda: fmeta.partition([ADAM], lambda path, p: "a"),
        TypeError,
        "partition takes a dict of optimizers by label, got a list",
    ),
    "a list for a tuple": (
        lambda: step(ADAM, params=(PARAMS["b"],), grads=[PARAMS["b"]]),
        ValueError,
        "its containers are of other types",
    ),
    "weights into a folder": (
        lambda: fmeta.pretrained.save(".", "linear", optimizers.linear().init()),
        IsADirectoryError,
        "is a folder: give the name of a file in it",
    ),
}
CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "trees": TREES,
        "parameters": PARAMETERS,
        "devices": DEVICES,
        "foreign": FOREIGN,
        "unroll": UNROLL,
        "needs": NEEDS,
        "numbers": NUMBERS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_explained(name):
    call, kind, words = CASES[name]
    with pytest.raises(kind, match=words):
        call()


LOSSES = {
    "a vector": (lambda p, b: p["b"], r"a tensor of shape \(3,\) and dtype torch.float32"),
    "one element": (lambda p, b: p["b"].sum()[None], r"a tensor of shape \(1,\)"),
    "a float": (lambda p, b: 1.0, "a float"),
    "None": (lambda p, b: None, "a NoneType"),
    "integers": (lambda p, b: torch.tensor(1), r"a tensor of shape \(\) and dtype torch.int64"),
    "a pair": (lambda p, b: (p["b"].sum(), 1), "a tuple"),
}
MODES = {"plain": {}, "mixed": {"mixed_mode": True}, "sqrt": {"checkpoint": "sqrt"}}


@pytest.mark.parametrize("outer", ["value", "grad", "vmap", "no_grad", "backward"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_no_scalar_is_explained(name, mode, outer):
    wrong, words = LOSSES[name]
    total = lambda p: unroll(loss_fn=wrong, params=p, **MODES[mode]).losses.sum()
    calls = {
        "value": lambda: total(PARAMS),
        "grad": lambda: grad(total)(PARAMS),
        "vmap": lambda: vmap(total)({k: torch.stack([p, p]) for k, p in PARAMS.items()}),
        "no_grad": lambda: torch.no_grad()(total)(PARAMS),
        "backward": lambda: total({k: p.clone().requires_grad_() for k, p in PARAMS.items()}),
    }
    with pytest.raises(ValueError, match=f"loss_fn must return a floating scalar, got {words}"):
        calls[outer]()


@pytest.mark.parametrize("name", ["a vector", "a float", "None"])
def test_an_evaluation_that_is_no_scalar_is_explained(name):
    wrong, words = LOSSES[name]
    with pytest.raises(
        ValueError, match=f"eval_loss_fn must return a floating scalar, got {words}"
    ):
        unroll(eval_batches=BATCHES, eval_loss_fn=wrong)


HYPERS = {
    "sgd": ("lr", "momentum"),
    "rmsprop": ("lr", "alpha", "eps", "momentum"),
    "adam": ("lr", "eps", "eps_root"),
    "adamw": ("lr", "eps", "weight_decay"),
    "per_parameter_sgd": ("lr",),
    "meta_curvature": ("lr",),
    "linear": ("lr",),
    "normalized_mlp": ("lr", "weight_decay", "vector_lr_mult"),
    "lstm": ("output_scale", "preprocess_factor"),
    "basis_mlp": ("lr",),
}


def build(name, **arguments):
    likes = (PARAMS,) if name in ("per_parameter_sgd", "meta_curvature") else ()
    return optimizers.BUILDERS[name](*likes, **arguments)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "hyper"), [(n, h) for n, hypers in HYPERS.items() for h in hypers]
)
def test_numbers_that_cannot_be_meant_are_refused(name, hyper, bad):
    with pytest.raises(ValueError, match=f"{hyper} must be (not negative|positive) and .*{bad}"):
        build(name, **{hyper: bad})


@pytest.mark.parametrize(
    ("name", "hyper"), [("sgd", "momentum"), ("rmsprop", "momentum"), ("rmsprop", "alpha")]
)
def test_decays_of_1_are_refused(name, hyper):
    with pytest.raises(ValueError, match=f"{hyper} must be not negative and below 1, got 1.0"):
        build(name, **{hyper: 1.0})


@pytest.mark.parametrize("bad", [-1.0, math.nan, 1.0, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_betas_that_cannot_be_meant_are_refused(which, bad):
    betas = (bad, 0.9) if which == 0 else (0.9, bad)
    for name in ("adam", "adamw"):
        with pytest.raises(ValueError, match=rf"betas\[{which}\] must be .* below 1, got {bad}"):
            build(name, betas=betas)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999)])
def test_betas_that_are_no_pair_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be a pair, got"):
        build("adam", betas=betas)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("0.1", "lr must be a number, a scalar tensor or a tree of them, got '0.1'"),
        (None, "lr must be a number, .* got None"),
        (True, "lr must be a number, .* got True"),
        (torch.tensor(1), "lr is a tensor of dtype torch.int64: use a floating dtype"),
        (schedules.cosine(), r"lr must be a number, .* got .*Schedule.*fmeta\.scheduled"),
    ],
)
@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam", "adamw", "per_parameter_sgd"])
def test_what_is_no_number_is_refused(name, bad, words):
    with pytest.raises(TypeError, match=words):
        build(name, lr=bad)


def test_a_bad_number_inside_a_tree_is_refused():
    with pytest.raises(ValueError, match=r"lr must be not negative and finite, got -1\.0"):
        optimizers.adam({"w": 0.1, "b": -1.0})


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="nesterov=True needs a momentum above 0"):
        optimizers.sgd(0.1, nesterov=True)


def test_no_input_is_changed_by_a_refused_step():
    params = {k: torch.randn(p.shape, generator=fold_in(0)) for k, p in PARAMS.items()}
    before = {k: p.clone() for k, p in params.items()}
    with pytest.raises(ValueError, match="path b is missing"):
        step(ADAM, params=params, grads={"w": params["w"]})
    assert all(torch.equal(params[k], before[k]) for k in params)


NETWORKS = ["lstm", "meta_lstm", "mlp", "adafactor_mlp", "normalized_mlp", "basis_mlp"]
NETWORKS += ["rnn_mlp", "nn_adam", "velo", "linear"]


@pytest.mark.parametrize("weights", [{"layers": torch.ones(2)}, {}, None])
@pytest.mark.parametrize("name", [*NETWORKS, "per_parameter_sgd", "meta_curvature"])
def test_weights_of_another_rule_are_told(name, weights):
    build = optimizers.BUILDERS[name]
    rule = build() if name in NETWORKS else build(PARAMS)
    words = "opt_params do not fit this optimizer: it learns .*, got .*: give what its init"
    with pytest.raises(ValueError, match=words):
        fmeta.unroll(rule, loss, weights, PARAMS, BATCHES, num_steps=4 if "velo" in name else None)
