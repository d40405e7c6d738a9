"""The local rule: its formula by hand, symmetry over units, laws on a network, errors."""

import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import fmeta
from fmeta import trees
from fmeta.functional import activations, layer_activity
from fmeta.optimizers import hebbian_mlp
from fmeta.random import fold_in
from fmeta.tasks import digits, loss_of_task, sample_task
from fmeta.testing import LAWS

DOUBLE = torch.float64
B = 6


def draw(index, *shape):
    return torch.randn(shape, generator=fold_in(31, index), dtype=DOUBLE)


PARAMS = {"w0": draw(0, 4, 5), "b0": draw(1, 5), "w1": draw(2, 5, 3), "b1": draw(3, 3)}
X, TARGET = draw(4, B, 4), draw(5, B, 3)


def weights(seed=0):
    """Weights unlike the untrained ones, with which nothing happens."""
    flat, spec = trees.flatten(hebbian_mlp().init())
    moved = [x.double() + 0.4 * draw(100 * seed + 10 + i, *x.shape) for i, x in enumerate(flat)]
    return {**trees.unflatten(spec, moved), "log_forget": torch.tensor(-2.0, dtype=DOUBLE)}


def extras(p, x=X, target=TARGET):
    z = x @ p["w0"] + p["b0"]
    h = torch.tanh(z)
    out = h @ p["w1"] + p["b1"]
    return {
        "activations": [
            layer_activity(x, z, "w0", "b0", out_first=False),
            layer_activity(h, out, "w1", "b1", out_first=False, error=target - out),
        ]
    }


def close(got, want, tol=1e-9):
    for a, b in zip(trees.leaves(got), trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def train(th, p, steps=4, see=extras, **options):
    rule = hebbian_mlp(**options)
    hidden = rule.init_hidden(th, p)
    for _ in range(steps):
        p, hidden = rule.step(th, p, trees.map(torch.zeros_like, p), hidden, extras=see(p))
    return p, hidden


# --- the formula ---------------------------------------------------------------------------------


def unit(a):
    return a / math.sqrt(numpy.mean(a**2) + 1e-8)


def network(w, a):
    """One unit and one sample after the other, in plain numpy."""
    a = unit(a)
    out = numpy.zeros((*a.shape, w["w1"].shape[1]))
    for j in range(a.shape[1]):
        column = a[:, j]
        deviation = math.sqrt(numpy.mean((column - column.mean()) ** 2) + 1e-8)
        for b in range(a.shape[0]):
            seen = numpy.array([column[b], column.mean(), deviation, 1.0])
            out[b, j] = seen @ w["skip"] + numpy.tanh(seen @ w["w0"]) @ w["w1"]
    return out


def by_hand(th, p, steps):
    th = trees.map(lambda x: x.numpy(), th)
    p = {k: v.numpy().copy() for k, v in p.items()}
    m = {k: numpy.zeros_like(v) for k, v in p.items()}
    feedback = {k: numpy.zeros_like(v) for k, v in p.items()}
    x, target = X.numpy(), TARGET.numpy()
    for _ in range(steps):
        z = x @ p["w0"] + p["b0"]
        h = numpy.tanh(z)
        out = h @ p["w1"] + p["b1"]
        error = target - out
        size = min(max(math.log(math.sqrt(numpy.mean(error**2) + 1e-8) / 0.3 + 1e-3), -5), 2)
        signal, new, old_feedback = error, {}, feedback["w1"].copy()
        for layer, (before, after) in ((1, (h, out)), (0, (x, z))):
            told = network(th["post"], after)
            s = unit(signal)
            post = told[..., :2] * s[..., None] + told[..., 2:4]
            for name, inputs, kind in (
                (f"w{layer}", before, 0),
                (f"b{layer}", numpy.ones((B, 1)), 1),
            ):
                pre = network(th["pre"], inputs)
                d = numpy.einsum("bik,bjk->ij", pre, post) / B
                d = d.reshape(p[name].shape)
                keep = 1 / (1 + math.exp(-th["momentum"]))
                m[name] = keep * m[name] + (1 - keep) * d
                length = math.exp(th["log_lr"][kind] + th["error_power"] * size)
                change = length / math.sqrt(inputs.shape[1]) * m[name]
                change = change / math.sqrt(1 + numpy.mean(m[name] ** 2))
                new[name] = p[name] + change - math.exp(th["log_decay"][kind]) * p[name]
                feedback[name] = (1 - math.exp(th["log_forget"])) * feedback[name] + change
            if layer:
                signal = (told[..., 4] * s) @ old_feedback.T
        p = new
    return p, m, feedback


def test_the_rule_is_the_formula():
    th = weights()
    p, hidden = train(th, PARAMS, 4)
    want, m, feedback = by_hand(th, PARAMS, 4)
    for k in p:
        numpy.testing.assert_allclose(p[k].numpy(), want[k], rtol=1e-9)
        numpy.testing.assert_allclose(hidden.leaves[k]["m"].numpy(), m[k], rtol=1e-8)
        numpy.testing.assert_allclose(hidden.leaves[k]["feedback"].numpy(), feedback[k], rtol=1e-8)


def test_feedback_forgets_at_most_everything():
    """A forgetting rate above 1 would make it swing ever wider."""
    ends = {}
    for log_forget in (-0.5, 0.0, 2.0):
        th = {**weights(), "log_forget": torch.tensor(log_forget, dtype=DOUBLE)}
        ends[log_forget] = train(th, PARAMS, 4)
    close(ends[2.0], ends[0.0], 0)
    assert (ends[-0.5][0]["w0"] - ends[0.0][0]["w0"]).abs().max() > 1e-6


def test_untrained_it_only_decays():
    p, _ = train(hebbian_mlp().init(), PARAMS, 3)
    close(p, trees.map(lambda x: x * (1 - 1e-4) ** 3, PARAMS), 1e-6)


def test_lr_scales_the_step():
    one, _ = train(weights(), PARAMS, 1)
    two, _ = train(weights(), PARAMS, 1, lr=torch.tensor(0.5, dtype=DOUBLE))
    change = lambda p: trees.map(torch.sub, p, PARAMS)
    close(trees.map(lambda x: 2 * x, change(two)), change(one))


# --- what it reads -------------------------------------------------------------------------------


def test_gradients_are_not_read_but_none_leaves_a_leaf_alone():
    rule, th = hebbian_mlp(), weights()
    assert rule.needs == {"activations"}
    assert not rule.reads_grads
    hidden = rule.init_hidden(th, PARAMS)
    want, _ = rule.step(th, PARAMS, PARAMS, hidden, extras=extras(PARAMS))
    p, hidden = PARAMS, rule.init_hidden(th, PARAMS)
    grads = {**trees.map(torch.zeros_like, PARAMS), "w1": None}
    for _ in range(2):
        p, hidden = rule.step(th, p, grads, hidden, extras=extras(p))
        assert torch.equal(p["w1"], PARAMS["w1"])
        assert not hidden.leaves["w1"]["m"].any()
    first, _ = rule.step(th, PARAMS, grads, rule.init_hidden(th, PARAMS), extras=extras(PARAMS))
    close([first[k] for k in ("w0", "b0", "b1")], [want[k] for k in ("w0", "b0", "b1")])


def test_a_parameter_in_no_layer_stays():
    with_gain = {**PARAMS, "gain": draw(6, 3)}
    p, _ = train(weights(), with_gain, 2)
    assert torch.equal(p["gain"], with_gain["gain"])
    close({k: p[k] for k in PARAMS}, train(weights(), PARAMS, 2)[0])


def test_hidden_layers_hear_of_the_target_through_feedback_alone():
    other = lambda p: extras(p, target=TARGET.flip(0))
    # The first step's feedback weights are zero: below the last layer nothing is known yet.
    same = [train(weights(), PARAMS, 1, see)[0] for see in (extras, other)]
    close(same[0]["w0"], same[1]["w0"])
    assert (same[0]["w1"] - same[1]["w1"]).abs().max() > 1e-4
    late = [train(weights(), PARAMS, 2, see)[0] for see in (extras, other)]
    assert (late[0]["w0"] - late[1]["w0"]).abs().max() > 1e-4


@pytest.mark.parametrize("sizes", [(4, 1, 3), (1, 5, 1), (1, 1, 1)], ids=str)
def test_layers_of_one_unit(sizes):
    first, hidden, last = sizes
    p = {
        "w0": draw(20, first, hidden), "b0": draw(21, hidden),
        "w1": draw(22, hidden, last), "b1": draw(23, last),
    }  # fmt: skip
    x, target = draw(24, B, first), draw(25, B, last)
    late = [
        train(weights(), p, 3, lambda p, t=t: extras(p, x, t))[0] for t in (target, target.flip(0))
    ]
    for k in p:
        assert (late[0][k] - late[1][k]).abs().max() > 1e-6, k
    order = torch.tensor([*range(1, hidden), 0])
    got = train(weights(), renumbered(p, order), 3, lambda p: extras(p, x, target))[0]
    close(got, renumbered(late[0], order))


def test_without_an_error_it_is_unsupervised():
    def unsupervised(p):
        found = extras(p)
        for at in found["activations"][-1].values():
            del at["error"]
        return found

    p, hidden = train(weights(), PARAMS, 2, unsupervised)
    assert (p["w0"] - PARAMS["w0"]).abs().max() > 1e-4
    assert all(x.isfinite().all() for x in trees.leaves(hidden))


def test_an_error_of_its_own_takes_the_place_of_the_one_from_above():
    def told_twice(p, target=TARGET):
        first, last = extras(p, target=target)["activations"]
        error = {k: torch.ones_like(v["outputs"]) for k, v in first.items()}
        return {"activations": [{k: {**v, "error": error[k]} for k, v in first.items()}, last]}

    a, b = (
        train(weights(), PARAMS, 1, lambda p, t=t: told_twice(p, t))[0]
        for t in (TARGET, TARGET.flip(0))
    )
    close(a["w0"], b["w0"])
    assert (a["w0"] - train(weights(), PARAMS, 1)[0]["w0"]).abs().max() > 1e-4


# --- symmetry ------------------------------------------------------------------------------------


def renumbered(p, order):
    return {**p, "w0": p["w0"][:, order], "b0": p["b0"][order], "w1": p["w1"][order]}


def test_renumbered_units_learn_the_same():
    order = torch.randperm(5, generator=fold_in(7))
    got, hidden = train(weights(), renumbered(PARAMS, order), 4)
    want, state = train(weights(), PARAMS, 4)
    close(got, renumbered(want, order))
    feedback = {k: h["feedback"] for k, h in state.leaves.items()}
    close({k: h["feedback"] for k, h in hidden.leaves.items()}, renumbered(feedback, order))


def test_the_order_of_samples_does_not_matter_nor_do_copies_of_them():
    order = torch.randperm(B, generator=fold_in(8))
    shuffled = lambda p: extras(p, X[order], TARGET[order])
    doubled = lambda p: extras(p, torch.cat([X, X]), torch.cat([TARGET, TARGET]))
    want, _ = train(weights(), PARAMS, 3)
    close(train(weights(), PARAMS, 3, shuffled)[0], want)
    close(train(weights(), PARAMS, 3, doubled)[0], want)


def test_either_layout_of_a_weight_and_a_module():
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    record, buffers = activations(net), {}
    names = {"0.weight": "w0", "0.bias": "b0", "2.weight": "w1", "2.bias": "b1"}
    turned = lambda x: x.mT if x.ndim == 2 else x
    p = {k: turned(PARAMS[v]).contiguous() for k, v in names.items()}

    def see(p):
        seen = record(p, buffers, X)
        out = seen["2"][1]
        return {
            "activations": [
                layer_activity(*seen["0"], "0.weight", "0.bias"),
                layer_activity(*seen["2"], "2.weight", "2.bias", error=TARGET - out),
            ]
        }

    got, _ = train(weights(), p, 3, see)
    want, _ = train(weights(), PARAMS, 3)
    close({v: turned(got[k]) for k, v in names.items()}, want)


# --- laws on a network, where the feedback is at work --------------------------------------------

LAWS_HERE = [name for name in LAWS if name not in ("permutation_equivariant", "compiles_once")]


@pytest.mark.parametrize("law", LAWS_HERE)
def test_laws_on_a_network(law):
    def see(p):
        like = p["w0"]
        return extras(p, X.to(like.device, like.dtype), TARGET.to(like.device, like.dtype))

    LAWS[law].check(hebbian_mlp(), PARAMS, opt_params=weights(), extras=see)


# --- it learns -----------------------------------------------------------------------------------


def delta_rule():
    """Weights by hand: error times input, and the whole error handed down."""
    th = trees.map(torch.zeros_like, hebbian_mlp().init())
    th["pre"]["skip"][0, 0] = th["pre"]["skip"][3, 1] = 1.0  # the activity; 1, for biases
    th["post"]["skip"][3, 0] = th["post"]["skip"][3, 4] = 1.0
    return {**th, "log_decay": torch.full((2,), -20.0), "log_forget": torch.tensor(-20.0)}


def test_as_a_delta_rule_with_feedback_it_learns_digits():
    family, rule, th = digits((12,), batch_size=64), hebbian_mlp(), delta_rule()
    task = sample_task(family, 120, 77)
    batch = fmeta.tasks.sample_batches(family, {}, 1, 77, split="test")[0]

    def accuracy(rule):
        with torch.no_grad():
            run = fmeta.unroll(
                rule, loss_of_task(family), th, task.model_params, task.batches,
                loss_args=(task.config,), extras=fmeta.tasks.extras_of_task(family, rule),
            )  # fmt: skip
        return family.metrics(family.data, {}, run.params, batch)["accuracy"]

    alone = accuracy(fmeta.masked(rule, lambda path, p: path in ("w1", "b1")))
    assert accuracy(rule) > 0.8
    assert accuracy(rule) > alone + 0.05  # hidden layers learn too


def test_the_weights_of_the_benchmark_train_a_width_they_never_met():
    path = Path(__file__).parents[2] / "benchmarks" / "activation_rule.safetensors"
    rule, th = fmeta.pretrained.load(path)
    family = digits((40,), batch_size=64)
    task = sample_task(family, 80, 78)
    batch = fmeta.tasks.sample_batches(family, {}, 1, 78, split="test")[0]
    with torch.no_grad():
        run = fmeta.unroll(
            rule, loss_of_task(family), th, task.model_params, task.batches,
            loss_args=(task.config,), extras=fmeta.tasks.extras_of_task(family, rule),
        )  # fmt: skip
    told = lambda p: float(family.metrics(family.data, {}, p, batch)["accuracy"])
    assert told(task.model_params) < 0.3
    assert told(run.params) > 0.85


# --- errors --------------------------------------------------------------------------------------


def changed(**at):
    """The extras with something else at w1."""

    def see(p):
        first, last = extras(p)["activations"]
        return {"activations": [first, {**last, "w1": {**last["w1"], **at}}]}

    return see


def without_inputs(p):
    first, last = extras(p)["activations"]
    return {"activations": [first, {"w1": {"outputs": last["w1"]["outputs"]}}]}


ERRORS = {
    "none": (lambda p: None, r"needs activations: pass extras=\{'activations'"),
    "no list": (lambda p: {"activations": torch.ones(3)}, "must be a list of layers.*a Tensor"),
    "no such parameter": (
        lambda p: {"activations": [layer_activity(X, X, "w9")]},
        "at path 'w9', but no such parameter: there are b0, b1, w0, w1",
    ),
    "no inputs": (without_inputs, "at path 'w1' lack inputs"),
    "another shape": (
        changed(inputs=torch.ones(B, 4, 1, dtype=DOUBLE)),
        r"at path 'w1' have shape \(6, 4, 1\), which does not broadcast to \(batch, 5, 3\)",
    ),
    "other layout": (
        lambda p: {"activations": [layer_activity(X, X @ p["w0"], "w0", out_first=True)]},
        r"at path 'w0' have shape \(6, 1, 4\)",
    ),
    "an axis on no side": (
        changed(inputs=torch.ones(B, 1, 1, dtype=DOUBLE)),
        r"do not make \(batch, 5, 3\) together",
    ),
    "other batches": (
        changed(inputs=torch.ones(B + 1, 5, 1, dtype=DOUBLE)),
        r"do not make \(batch, 5, 3\) together",
    ),
    "an error of another layer": (
        changed(error=torch.ones(B, 1, 5, dtype=DOUBLE)),
        r"the error at path 'w1' is that of 5 units \(batch 6\), the layer has 3",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_activations_that_do_not_fit_are_named(case):
    see, words = ERRORS[case]
    with pytest.raises(ValueError, match=words):
        train(weights(), PARAMS, 1, see)


def test_layers_that_do_not_follow_one_another_are_named():
    def see(p):
        last = extras(p)["activations"][1]
        return {"activations": [layer_activity(X, X @ draw(9, 4, 4), "v"), last]}

    with pytest.raises(ValueError, match=r"layer 0 has activations of 4 units .* takes in 5"):
        train(weights(), {**PARAMS, "v": draw(9, 4, 4)}, 1, see)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_lr_that_cannot_be_meant_is_refused(bad):
    with pytest.raises(ValueError, match=f"lr must be not negative and .*{bad}"):
        hebbian_mlp(lr=bad)
