"""Combined optimizers are what their parts do, one after the other or leaf by leaf."""

import pytest
import torch
from torch.func import grad

import fmeta
from fmeta import optimizers, trees
from fmeta.optimizer import Optimizer
from fmeta.random import fold_in

DOUBLE = {"dtype": torch.float64}
PARAMS = {
    "net": {
        "w": torch.randn(2, 3, generator=fold_in(0), **DOUBLE),
        "b": torch.randn(3, generator=fold_in(1), **DOUBLE),
    },
    "emb": torch.randn(4, generator=fold_in(2), **DOUBLE),
}
STEPS = 4


def gradients(t, absent=()):
    flat, spec = trees.flatten(PARAMS)
    return trees.unflatten(
        spec,
        [
            None if path in absent else torch.randn(p.shape, generator=fold_in(3, t, i), **DOUBLE)
            for i, (path, p) in enumerate(zip(trees.paths(PARAMS), flat, strict=True))
        ],
    )


def trajectory(rule, th=None, absent=(), params=PARAMS, **start):
    th = rule.init() if th is None else th
    hidden = rule.init_hidden(th, params, **start)
    for t in range(STEPS):
        params, hidden = rule.step(th, params, gradients(t, absent if t == 1 else ()), hidden)
    return params, hidden


def close(got, want, tol=1e-12):
    trees.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol), got, want)


def scaled(factor):
    """A transform: gradients times a factor, which can be learned."""
    return Optimizer(
        lambda generator=None: {"factor": torch.tensor(factor, **DOUBLE)},
        lambda th, p, *, num_steps=None: fmeta.Hidden(trees.map(lambda x: {}, p), {}),
        lambda th, p, g, h, **extra: (
            trees.map(lambda x: None if x is None else th["factor"] * x, g),
            h,
        ),
    )


# --- chain --------------------------------------------------------------------------------------


def test_chain_of_one_is_that_one():
    got, _ = trajectory(fmeta.chain(optimizers.adam(0.1)))
    close(got, trajectory(optimizers.adam(0.1))[0])


def test_each_delta_is_the_next_ones_gradient():
    rule = fmeta.chain(scaled(3.0), scaled(2.0), optimizers.sgd(0.1, momentum=0.5))
    assert [tuple(th) for th in rule.init()] == [("factor",), ("factor",), ()]
    close(trajectory(rule)[0], trajectory(optimizers.sgd(0.6, momentum=0.5))[0])


def test_a_chain_skips_leaves_without_gradient():
    rule = fmeta.chain(fmeta.clip_by_global_norm(1e9), optimizers.adam(0.1))
    close(trajectory(rule, absent=["emb"])[0], trajectory(optimizers.adam(0.1), absent=["emb"])[0])


def test_a_transform_in_a_chain_is_learned():
    rule = fmeta.chain(scaled(1.0), optimizers.sgd(0.1))
    loss = lambda p, b: p.square().sum() / 2
    meta = lambda f: (
        fmeta.unroll(
            rule, loss, ({"factor": f}, {}), torch.ones((), **DOUBLE), torch.zeros(1)
        ).params
    )
    assert grad(meta)(torch.tensor(1.0, **DOUBLE)).item() == pytest.approx(-0.1)


def test_a_chain_gathers_needs():
    needy = scaled(1.0)._replace(needs=frozenset({"loss"}))
    assert fmeta.chain(needy, optimizers.sgd()).needs == {"loss"}


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match="chain needs at least one optimizer"):
        fmeta.chain()


def averaging(lr):
    """sgd that is evaluated at half its parameters."""
    return optimizers.sgd(lr)._replace(
        eval_params=lambda th, p, h: trees.map(lambda x: None if x is None else x / 2, p)
    )


EVALS = {
    "chain": fmeta.chain(scaled(1.0), averaging(0.1)),
    "masked": fmeta.masked(averaging(0.1), lambda path, p: True),
    "partition": fmeta.partition({"all": averaging(0.1)}, lambda path, p: "all"),
    "scheduled": fmeta.scheduled(averaging(0.1), lambda t, n: 1.0),
    "with_weight_decay": fmeta.with_weight_decay(averaging(0.1), 0.1),
}


@pytest.mark.parametrize("name", EVALS)
def test_eval_params_come_through(name):
    rule = EVALS[name]
    hidden = rule.init_hidden(rule.init(), PARAMS)
    close(rule.eval_params(rule.init(), PARAMS, hidden), trees.map(lambda x: x / 2, PARAMS))


def test_a_state_that_does_not_split_is_refused():
    odd = Optimizer(lambda g=None: {}, lambda th, p, **k: {"n": 0}, lambda th, p, g, h, **k: (g, h))
    for rule in (
        fmeta.chain(odd),
        fmeta.partition({"a": odd}, lambda path, p: "a"),
        fmeta.masked(odd, lambda path, p: True),
        fmeta.scheduled(odd, lambda t, n: 1.0),
    ):
        with pytest.raises(ValueError, match=r"is a dict, which cannot be split.*Hidden\(leaves"):
            rule.init_hidden(rule.init(), PARAMS)


# --- partition and masked -----------------------------------------------------------------------


def by_path(path, tensor):
    return "emb" if path == "emb" else "net"


def test_partition_gives_each_leaf_to_its_optimizer():
    rule = fmeta.partition({"net": optimizers.adam(0.1), "emb": optimizers.sgd(0.2)}, by_path)
    params, hidden = trajectory(rule)
    close(params["net"], trajectory(optimizers.adam(0.1))[0]["net"])
    close(params["emb"], trajectory(optimizers.sgd(0.2))[0]["emb"])
    assert set(hidden.leaves["net"]["w"]) == {"m", "v", "count"}
    assert hidden.leaves["emb"] == {}


def test_partition_by_shape_and_none_gradients():
    rule = fmeta.partition(
        {"matrix": optimizers.adam(0.1), "other": optimizers.sgd(0.2, momentum=0.5)},
        lambda path, p: "matrix" if p.ndim == 2 else "other",
    )
    absent = ["net/w", "emb"]
    params, _ = trajectory(rule, absent=absent)
    close(params["net"]["w"], trajectory(optimizers.adam(0.1), absent=absent)[0]["net"]["w"])
    sgd = trajectory(optimizers.sgd(0.2, momentum=0.5), absent=absent)[0]
    close(params["emb"], sgd["emb"])


def test_partition_learns_each_part_by_its_label():
    learned = lambda builder: fmeta.learn(builder, {"lr": "linear"}, lr=0.1)
    rule = fmeta.partition(
        {"net": learned(optimizers.adam), "emb": learned(optimizers.sgd)}, by_path
    )
    loss = lambda p, b: sum(x.square().sum() for x in trees.leaves(p))
    th = trees.cast(rule.init(), torch.float64)
    meta = lambda th: fmeta.unroll(rule, loss, th, PARAMS, torch.zeros(3)).losses.sum()
    slopes = grad(meta)(th)
    for label in ("net", "emb"):
        moved = lambda e, k=label: meta({**th, k: {"lr": th[k]["lr"] + e}})
        numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
        torch.testing.assert_close(slopes[label]["lr"], numeric, rtol=1e-6, atol=1e-8)


def test_a_label_without_optimizer_is_named_with_its_path():
    rule = fmeta.partition({"net": optimizers.sgd()}, by_path)
    with pytest.raises(ValueError, match="'emb' for path emb, but there are optimizers for 'net'"):
        rule.init_hidden(rule.init(), PARAMS)


@pytest.mark.parametrize(
    "mask",
    [lambda path, p: path != "emb", {"net": {"w": True, "b": True}, "emb": False}],
    ids=["function", "tree"],
)
def test_masked_updates_only_the_chosen(mask):
    rule = fmeta.masked(optimizers.adam(0.1), mask)
    params, hidden = trajectory(rule)
    close(params["net"], trajectory(optimizers.adam(0.1))[0]["net"])
    assert params["emb"] is PARAMS["emb"]
    assert hidden.leaves["emb"] == {}
    assert rule.update(rule.init(), PARAMS, gradients(0), hidden)[0]["emb"] is None


def test_a_mask_of_another_shape_is_named():
    rule = fmeta.masked(optimizers.sgd(), {"net": {"w": True, "b": True}})
    with pytest.raises(ValueError, match="the mask is not shaped like the parameters: path emb"):
        rule.init_hidden({}, PARAMS)


def test_a_tree_of_rates_goes_through_partition():
    rates = trees.map(lambda p: torch.full_like(p, 0.2), PARAMS)
    rule = fmeta.partition({"net": optimizers.adam(rates), "emb": optimizers.sgd(rates)}, by_path)
    params, _ = trajectory(rule)
    close(params["net"], trajectory(optimizers.adam(0.2))[0]["net"])


# --- scheduled, weight decay, clipping ----------------------------------------------------------


def test_scheduled_multiplies_the_delta():
    seen = []

    def schedule(t, num_steps):
        seen.append((t.item(), num_steps.item(), t.dtype))
        return 1 - t / num_steps

    params, hidden = trajectory(fmeta.scheduled(optimizers.sgd(0.1), schedule), num_steps=STEPS)
    want = PARAMS
    for t in range(STEPS):
        want = trees.map(lambda p, g, t=t: p - 0.1 * (1 - t / STEPS) * g, want, gradients(t))
    close(params, want)
    assert seen == [(float(t), float(STEPS), torch.float64) for t in range(STEPS)]
    assert hidden.shared["t"] == STEPS


def test_a_schedule_without_horizon_gets_none():
    rule = fmeta.scheduled(optimizers.sgd(0.1), lambda t, n: 1.0 if n is None else 0.0)
    close(trajectory(rule)[0], trajectory(optimizers.sgd(0.1))[0])


def test_the_schedules_t_is_global_while_counts_are_per_leaf():
    rule = fmeta.scheduled(optimizers.adam(0.1), lambda t, n: 1.0)
    hidden = trajectory(rule, absent=["emb"])[1]
    assert hidden.shared["t"] == STEPS
    assert hidden.leaves["emb"]["count"] == STEPS - 1


def test_weight_decay_is_decoupled_and_not_times_the_rate():
    got, _ = trajectory(fmeta.with_weight_decay(optimizers.adam(0.1), 0.01))
    torch_rate = 0.1  # AdamW decays by lr * weight_decay
    want, _ = trajectory(optimizers.adamw(torch_rate, weight_decay=0.01 / torch_rate))
    close(got, want, 1e-10)


def test_weight_decay_by_a_tree_and_none_gradients():
    rates = {"net": {"w": 0.1, "b": 0.0}, "emb": torch.tensor(0.2, **DOUBLE)}
    rule = fmeta.with_weight_decay(optimizers.sgd(0.1), rates)
    g = gradients(0, ["net/w"])
    new, _ = rule.step({}, PARAMS, g, rule.init_hidden({}, PARAMS))
    assert new["net"]["w"] is PARAMS["net"]["w"]
    close(new["net"]["b"], PARAMS["net"]["b"] - 0.1 * g["net"]["b"])
    close(new["emb"], 0.8 * PARAMS["emb"] - 0.1 * g["emb"])


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
def test_clipping_equals_torchs(limit):
    rule = fmeta.clip_by_global_norm(limit)
    g = gradients(0)
    got, _ = rule.update({}, PARAMS, g, rule.init_hidden({}, PARAMS))
    leaves = [torch.zeros_like(x).requires_grad_() for x in trees.leaves(g)]
    for leaf, x in zip(leaves, trees.leaves(g), strict=True):
        leaf.grad = x.clone()
    torch.nn.utils.clip_grad_norm_(leaves, limit)
    for a, leaf in zip(trees.leaves(got), leaves, strict=True):
        torch.testing.assert_close(a, leaf.grad, rtol=1e-5 if limit < 1e2 else 0, atol=0)


def test_clipped_gradients_have_exactly_the_norm():
    rule = fmeta.clip_by_global_norm(0.5)
    got, _ = rule.update({}, PARAMS, gradients(0, ["emb"]), rule.init_hidden({}, PARAMS))
    assert got["emb"] is None
    norm = sum(x.square().sum() for x in trees.leaves(got) if x is not None).sqrt()
    assert norm.item() == pytest.approx(0.5)


def test_clipping_zero_gradients_has_a_finite_derivative():
    rule = fmeta.chain(fmeta.clip_by_global_norm(1.0), optimizers.sgd(0.1))
    loss = lambda p, b: (0 * p).sum()
    end = lambda p: fmeta.unroll(rule, loss, rule.init(), p, torch.zeros(2)).params.sum()
    assert torch.isfinite(grad(end)(torch.ones(2))).all()


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_limit_that_cannot_be_meant_is_refused(bad):
    with pytest.raises(ValueError, match="max_norm must be positive and finite"):
        fmeta.clip_by_global_norm(bad)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_decay_that_cannot_be_meant_is_refused(bad):
    with pytest.raises(ValueError, match="rate must be not negative and finite"):
        fmeta.with_weight_decay(optimizers.sgd(), bad)


# --- to_transform -------------------------------------------------------------------------------


def test_to_transform_has_the_signature_of_optax():
    rule = fmeta.learn(optimizers.adam, {"lr": "log"}, lr=0.1)
    transform = fmeta.to_transform(rule, rule.init())
    params = PARAMS
    state = transform.init(params)
    for t in range(STEPS):
        updates, state = transform.update(gradients(t), state, params)
        params = trees.map(torch.add, params, updates)
    close(params, trajectory(rule)[0])


def test_to_transform_passes_horizon_loss_and_extras():
    def update(th, p, g, h, *, loss=None, extras=None):
        return (loss, extras["x"]), h

    rule = Optimizer(
        lambda generator=None: {}, lambda th, p, *, num_steps=None: {"n": num_steps}, update
    )
    transform = fmeta.to_transform(rule, {})
    assert transform.init(PARAMS, num_steps=3) == {"n": 3}
    assert transform.update(PARAMS, {}, PARAMS, loss=1, extras={"x": 2})[0] == (1, 2)


# --- together -----------------------------------------------------------------------------------


def test_all_of_them_nested_are_differentiated_under_checkpoint():
    rule = fmeta.chain(
        fmeta.clip_by_global_norm(2.0),
        fmeta.scheduled(
            fmeta.partition(
                {
                    "net": fmeta.with_weight_decay(
                        fmeta.learn(optimizers.adam, {"lr": "linear"}, lr=0.1), 0.01
                    ),
                    "emb": fmeta.masked(optimizers.sgd(0.1), lambda path, p: True),
                },
                by_path,
            ),
            lambda t, n: 1 - 0.5 * t / n,
        ),
    )
    loss = lambda p, b: sum((x - b).square().sum() for x in trees.leaves(p))
    batches = torch.linspace(0, 1, 5, **DOUBLE)

    def meta(th, checkpoint=None):
        return fmeta.unroll(rule, loss, th, PARAMS, batches, checkpoint=checkpoint).losses.sum()

    th = trees.cast(rule.init(), torch.float64)
    slope = grad(meta)(th)
    lr = lambda tree: tree[1]["net"]["lr"]
    moved = lambda e: meta(trees.map(lambda x: x + e, th))
    numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(lr(slope), numeric, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(lr(grad(lambda t: meta(t, "sqrt"))(th)), lr(slope))


# --- number formats, devices and starts of the parts ---------------------------------------------


def test_clipping_is_in_each_parameters_dtype_and_sums_in_the_widest():
    params = {
        "a": torch.ones(2),
        "b": torch.ones(2, **DOUBLE),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    tiny = 1 + 2.0**-40  # lost in float32
    g = {
        "a": torch.zeros(2, **DOUBLE),
        "b": torch.tensor([tiny, 0.0], **DOUBLE),
        "c": torch.zeros(2, dtype=torch.bfloat16),
    }
    rule = fmeta.clip_by_global_norm(1.0)
    got, _ = rule.update({}, params, g, rule.init_hidden({}, params))
    assert [x.dtype for x in got.values()] == [torch.float32, torch.float64, torch.float32]
    assert got["b"][0].item() == pytest.approx(1.0, rel=1e-15)
    got, _ = rule.update({}, params, {**g, "b": g["b"].float()}, rule.init_hidden({}, params))
    assert got["b"].dtype == torch.float64


@pytest.mark.parametrize("wrap", ["plain", "chain", "partition"])
def test_half_size_states_leave_master_copies_alone(wrap):
    p = {"w": torch.ones(1, dtype=torch.bfloat16)}
    masters = fmeta.master_weights(optimizers.adam(1e-3))
    inner = {
        "plain": masters,
        "chain": fmeta.chain(fmeta.clip_by_global_norm(1.0), masters),
        "partition": fmeta.partition({"all": masters}, lambda path, x: "all"),
    }[wrap]
    rule = fmeta.hidden_dtype(inner)
    th, want = rule.init(), p
    hidden, plain = rule.init_hidden(th, p), inner.init_hidden(th, p)
    for _ in range(4):
        p, hidden = rule.step(th, p, {"w": torch.ones(1, dtype=torch.bfloat16)}, hidden)
        want, plain = inner.step(th, want, {"w": torch.ones(1, dtype=torch.bfloat16)}, plain)
    assert p["w"].item() == want["w"].item() < 1
    state = hidden.leaves["w"]["1"] if wrap == "chain" else hidden.leaves["w"]
    assert state["master"].dtype == torch.float32
    assert state["inner"]["m"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["partition", "masked"])
def test_a_part_without_leaves_keeps_its_time_with_the_model(name):
    timed = fmeta.scheduled(optimizers.sgd(0.1), lambda t, num_steps: 1.0)
    rule = {
        "partition": fmeta.partition(
            {"all": optimizers.sgd(0.1), "none": timed}, lambda path, x: "all"
        ),
        "masked": fmeta.masked(timed, lambda path, x: False),
    }[name]
    params = trees.map(lambda x: x.to("meta"), PARAMS)
    hidden = rule.init_hidden(rule.init(), params, num_steps=3)
    found = trees.leaves(hidden.shared)
    assert len(found) == 2
    assert all(x.is_meta for x in found)
    _, hidden = rule.step(rule.init(), params, params, hidden)
    assert all(x.is_meta for x in trees.leaves(hidden.shared))


def test_equal_parts_start_unequal():
    parts = lambda: [optimizers.lstm(hidden_size=3) for _ in range(2)]
    by_label = fmeta.partition(dict(zip("ab", parts(), strict=True)), lambda path, x: "a")
    in_order = fmeta.chain(*parts())
    generator = torch.Generator().manual_seed(0)
    want = [optimizers.lstm(hidden_size=3).init(generator) for _ in range(2)]
    before = torch.get_rng_state()
    close(tuple(by_label.init().values()), tuple(want), 0)
    close(in_order.init(), tuple(want), 0)
    assert not torch.equal(want[0]["output.weight"], want[1]["output.weight"])
    close(in_order.init(fold_in(1)), fmeta.chain(*parts()).init(fold_in(1)), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.int64, "bfloat16", None])
def test_a_state_of_no_floating_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"floating dtype, such as torch\.bfloat16, got"):
        fmeta.hidden_dtype(fmeta.optimizers.adam(), dtype)
