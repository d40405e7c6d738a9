"""What the article leaves "to be added", each as a claim: initialisation, hidden states, early
stopping, checkpointing, more control. Its page is docs/article.md."""

import math

import pytest
import torch
from torch import nn

import fmeta
from fmeta.estimators import Estimate, Estimator, full
from fmeta.meta_train import resume, run
from fmeta.random import fold_in
from fmeta.tasks import TaskFamily


def draw(*ints):
    return lambda *shape: torch.randn(shape, generator=fold_in(*ints), dtype=torch.float64)


def problem(steps=6):
    """A small regression in float64: ``(loss_fn, params, batches)``."""
    params = {"w": draw(1)(3, 2), "b": torch.zeros(2, dtype=torch.float64)}
    x = draw(2)(steps, 8, 3)
    batches = (x, (x @ draw(3)(3, 2)).tanh())
    return (lambda p, b: mse(b[0] @ p["w"] + p["b"], b[1])), params, batches


def mse(a, b):  # torch's own has no derivative forward over reverse, which mixed mode takes
    return (a - b).square().mean()


def double(tree):
    return fmeta.trees.cast(tree, torch.float64)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def assert_equal(a, b, **tolerance):
    for x, y in zip(fmeta.trees.leaves(a), fmeta.trees.leaves(b), strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


# Initialisation


def test_init_is_a_function_of_the_generator_alone():
    rule = fmeta.optimizers.lstm(hidden_size=4)
    before = torch.get_rng_state()
    assert_equal(rule.init(fold_in(1)), rule.init(fold_in(1)))
    assert_equal(rule.init(), rule.init())
    assert not torch.equal(
        rule.init(fold_in(1))["output.weight"], rule.init(fold_in(2))["output.weight"]
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_module_starts_from_its_own_values_and_keeps_them():
    net = seeded(lambda: nn.Linear(2, 1, bias=False))
    own = net.weight.detach().clone()
    rule = fmeta.coordinatewise(net)
    theta = rule.init()
    assert torch.equal(theta["weight"], own)
    loss_fn, params, batches = problem()
    grads = torch.func.grad(
        lambda th: fmeta.unroll(rule, loss_fn, th, params, batches).losses.sum()
    )(theta)
    outer = fmeta.optimizers.adam(0.1)
    new, _ = outer.step({}, theta, grads, outer.init_hidden({}, theta))
    assert not torch.equal(new["weight"], own)
    assert torch.equal(net.weight, own)
    assert torch.equal(rule.init()["weight"], own)


def meta_loss(theta, params):
    loss_fn, _, batches = problem()
    return fmeta.unroll(LEARNED_ADAM, loss_fn, theta, params, batches).losses.sum()


LEARNED_ADAM = fmeta.learn(fmeta.optimizers.adam, {"lr": "log"}, lr=0.03)


def test_optimizer_start_or_both_are_one_gradient_with_respect_to_either():
    theta, params = double(LEARNED_ADAM.init()), problem()[1]
    of_theta = torch.func.grad(meta_loss)(theta, params)
    of_start = torch.func.grad(meta_loss, argnums=1)(theta, params)
    of_both = torch.func.grad(lambda both: meta_loss(*both))((theta, params))
    assert_equal(of_both, (of_theta, of_start), rtol=1e-12, atol=1e-12)

    def descend(tree, grads):
        return fmeta.trees.map(lambda x, g: x - 1e-3 * g, tree, grads)

    start = meta_loss(theta, params)
    only_theta = meta_loss(descend(theta, of_theta), params)
    only_start = meta_loss(theta, descend(params, of_start))
    both = meta_loss(descend(theta, of_theta), descend(params, of_start))
    assert both < min(only_theta, only_start)
    assert max(only_theta, only_start) < start


def test_bind_says_which_of_the_three_an_estimator_learns():
    loss_fn, start, batches = problem()
    family = TaskFamily(
        (),
        lambda generator: {},
        lambda config, generator: start,
        lambda config, generator, steps, split="train": batches,
        lambda data, config, params, batch: loss_fn(params, batch),
    )
    theta = double(LEARNED_ADAM.init())
    want = torch.func.grad(lambda both: meta_loss(*both))((theta, start))
    binds = {
        "opt": (None, theta, want[0]),
        "init": (lambda meta, config: (theta, meta), start, want[1]),
        "both": (lambda meta, config: meta, (theta, start), want),
    }
    for bind, meta_params, grads in binds.values():
        estimator = full(
            LEARNED_ADAM,
            family,
            num_tasks=2,
            horizon=6,
            bind=bind,
            meta_loss=lambda run: run.losses.sum(),
        )
        estimate, _ = estimator.estimate(meta_params, estimator.init(meta_params, 0))
        assert_equal(estimate.grads, grads, rtol=1e-10, atol=1e-12)


# Hidden states


class Momentum:
    def init(self, generator):
        return {"lr": torch.tensor(0.1), "decay": torch.tensor(0.9)}

    def init_hidden(self, opt_params, param):
        return {"m": torch.zeros_like(param)}

    def step(self, opt_params, param, grad, hidden):
        m = opt_params["decay"] * hidden["m"] + grad
        return param - opt_params["lr"] * m, {"m": m}


def test_a_rule_carries_a_state_of_its_own_for_each_coordinate():
    rule = fmeta.coordinatewise(Momentum())
    loss_fn, params, batches = problem()
    mine = fmeta.unroll(rule, loss_fn, double(rule.init()), params, batches)
    sgd = fmeta.unroll(fmeta.optimizers.sgd(0.1, momentum=0.9), loss_fn, {}, params, batches)
    assert_equal(mine.params, sgd.params, rtol=1e-6, atol=1e-7)  # 0.1 and 0.9 were float32
    assert mine.hidden.leaves["w"]["m"].shape == params["w"].shape


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_has_a_state_per_coordinate_that_moves_with_it(cell):
    rule = fmeta.coordinatewise(seeded(lambda: cell(2, 4)))
    theta, params = double(rule.init()), {"w": draw(4)(3, 2)}
    grads = {"w": draw(5)(3, 2)}
    order = torch.tensor([2, 0, 1])

    def two_steps(params, grads):
        hidden = rule.init_hidden(theta, params)
        for _ in range(2):
            params, hidden = rule.step(theta, params, grads, hidden)
        return params["w"], fmeta.trees.leaves(hidden)

    new, states = two_steps(params, grads)
    moved, moved_states = two_steps({"w": params["w"][order]}, {"w": grads["w"][order]})
    assert [s.shape for s in states] == [(3, 2, 4)] * (2 if cell is nn.LSTMCell else 1)
    assert_equal(moved, new[order], rtol=1e-12, atol=1e-12)
    for state, other in zip(states, moved_states, strict=True):
        assert_equal(other, state[order], rtol=1e-12, atol=1e-12)
        assert len(torch.unique(state.reshape(6, 4), dim=0)) == 6  # six histories, six states


def test_a_module_with_hidden_gets_a_state_of_that_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(2 + 3, 3)
            self.out = nn.Linear(3, 1)

        def forward(self, features, state):
            state = torch.tanh(self.gate(torch.cat([features, state])))
            return self.out(state), state

    rule = fmeta.coordinatewise(seeded(Net), hidden=3)
    loss_fn, params, batches = problem()
    run_ = fmeta.unroll(rule, loss_fn, double(rule.init()), params, batches)
    assert run_.hidden.leaves["w"]["state"].shape == (3, 2, 3)
    assert run_.hidden.leaves["b"]["state"].shape == (2, 3)


def test_the_state_carries_an_unroll_on():
    rule = fmeta.optimizers.lstm(hidden_size=4, num_layers=1)
    loss_fn, params, batches = problem()
    theta = double(rule.init())
    whole = fmeta.unroll(rule, loss_fn, theta, params, batches)
    first = fmeta.unroll(rule, loss_fn, theta, params, [b[:2] for b in batches])
    rest = fmeta.unroll(
        rule, loss_fn, theta, first.params, [b[2:] for b in batches], hidden=first.hidden
    )
    assert_equal(rest.params, whole.params)
    assert_equal(torch.cat([first.losses, rest.losses]), whole.losses)


# Early stopping


def quadratic(calls=None):
    """Meta-loss (w - target)^2 / 2 with a target of its own for each step; w is the meta-param."""

    def estimate(meta_params, state):
        if calls is not None:
            calls.append(state["step"])
        w = meta_params["w"]
        noise = 0.01 * torch.randn((), generator=fold_in(state["seed"], state["step"]))
        grads = {"w": w + noise}
        return Estimate((w + noise) ** 2 / 2, grads, {}), {**state, "step": state["step"] + 1}

    return Estimator(lambda meta_params, seed: {"seed": seed, "step": 0}, estimate)


W = {"w": torch.tensor(3.0)}
SGD = fmeta.optimizers.sgd(0.05)


def overfit(meta_params):
    """A validation that is best at w = 1, on the way from 3 to 0."""
    return (meta_params["w"] - 1) ** 2


def test_early_stopping_stops_and_returns_the_best():
    seen = []

    def validate(meta_params):
        seen.append((float(overfit(meta_params)), float(meta_params["w"])))
        return seen[-1][0]

    result = run(
        quadratic(), W, outer=SGD, num_steps=200, validate=validate, validate_every=2, patience=3
    )
    best = min(seen)
    where = seen.index(best)
    assert result.stopped_early
    assert result.step == 2 * (len(seen) - 1) < 200
    assert len(seen) - 1 - where == 3  # three validations without a new best
    assert float(result.meta_params["w"]) == best[1]
    assert abs(best[1] - 1) < 0.2
    assert len(result.history) == result.step
    assert [m["validation"] for m in result.history if "validation" in m] == [
        v for v, _ in seen[1:]
    ]


def test_without_patience_it_goes_on_but_still_returns_the_best():
    result = run(quadratic(), W, outer=SGD, num_steps=60, validate=overfit, validate_every=2)
    assert not result.stopped_early
    assert result.step == 60
    assert abs(float(result.meta_params["w"]) - 1) < 0.2
    last = run(quadratic(), W, outer=SGD, num_steps=60)
    assert abs(float(last.meta_params["w"])) < 0.2


def test_a_validation_that_is_nan_is_never_the_best():
    def validate(meta_params):
        return math.nan if meta_params["w"] < 2 else overfit(meta_params)

    result = run(quadratic(), W, outer=SGD, num_steps=40, validate=validate, validate_every=1)
    assert float(result.meta_params["w"]) >= 2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"patience": 2}, "needs validate"),
        ({"patience": 0, "validate": overfit}, "patience must be at least 1"),
        ({"validate_every": 0}, "validate_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        run(quadratic(), W, outer=SGD, **{"num_steps": 3, **options})


# Gradient checkpointing: memory for time


def nodes(tensor):
    """The number of nodes in the graph behind a tensor."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return len(seen)


def test_checkpointing_keeps_less_and_changes_nothing():
    loss_fn, params, batches = problem(steps=36)
    rule = fmeta.optimizers.linear(lr=0.1)
    sizes = {}
    for checkpoint in (None, "sqrt", 5, 1):
        theta = {"weight": double(rule.init())["weight"].requires_grad_()}
        losses = fmeta.unroll(rule, loss_fn, theta, params, batches, checkpoint=checkpoint).losses
        sizes[checkpoint] = nodes(losses)
        (grad,) = torch.autograd.grad(losses.sum(), theta["weight"])
        if checkpoint is None:
            want = (losses, grad)
        assert_equal((losses, grad), want, rtol=1e-10, atol=1e-12)
    assert all(10 * sizes[c] < sizes[None] for c in ("sqrt", 5, 1))


# Saving and resuming


def interrupted(estimator, n):
    calls = []

    def estimate(meta_params, state):
        calls.append(state)
        if len(calls) == n:
            raise KeyboardInterrupt
        return estimator.estimate(meta_params, state)

    return Estimator(estimator.init, estimate)


RULE = fmeta.optimizers.linear(lr=0.05)


def on_digits():
    family = fmeta.tasks.digits((4,), batch_size=8)
    return full(RULE, family, num_tasks=2, horizon=3)


def settings(estimator):
    def validate(meta_params):
        return estimator.estimate(meta_params, estimator.init(meta_params, 99))[0].loss

    outer = fmeta.chain(fmeta.clip_by_global_norm(1.0), fmeta.optimizers.adam(0.05))
    outer = fmeta.scheduled(outer, lambda t, n: 1 - t / n)
    return {"outer": outer, "num_steps": 9, "seed": 5, "validate": validate, "validate_every": 2}


@pytest.mark.parametrize("n", [2, 5, 8])
def test_resumed_equals_uninterrupted_bit_for_bit(n, tmp_path):
    estimator = on_digits()
    arguments = settings(estimator)
    whole = run(estimator, RULE.init(), checkpoint_folder=tmp_path / "whole", **arguments)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(
            interrupted(estimator, n),
            RULE.init(),
            checkpoint_folder=tmp_path / "cut",
            on_step=seen.append,
            **arguments,
        )
    assert len(seen) == n - 1
    result = resume(tmp_path / "cut", estimator, RULE.init(), **arguments)
    assert_equal(result.meta_params, whole.meta_params)
    assert seen + result.history == whole.history
    assert (result.step, result.stopped_early) == (whole.step, whole.stopped_early)
    files = [tmp_path / name / "state.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_interrupted_while_it_reports_a_step(tmp_path):
    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    options = {"outer": SGD, "num_steps": 8, "checkpoint_folder": tmp_path}
    whole = run(quadratic(), W, outer=SGD, num_steps=8)
    with pytest.raises(KeyboardInterrupt):
        run(quadratic(), W, on_step=stop, **options)
    result = resume(tmp_path, quadratic(), W, outer=SGD, num_steps=8)
    assert [m["step"] for m in result.history] == [4, 5, 6, 7]
    assert_equal(result.meta_params, whole.meta_params)


class PowerCut(BaseException):
    """What no handler sees."""


def test_after_a_crash_it_goes_on_from_the_last_save(tmp_path):
    calls = []

    def crash(metrics):
        calls.append(metrics)
        if metrics["step"] == 6:
            raise PowerCut

    options = {"outer": SGD, "num_steps": 9, "checkpoint_every": 4}
    with pytest.raises(PowerCut):
        run(quadratic(), W, checkpoint_folder=tmp_path, on_step=crash, **options)
    result = resume(tmp_path, quadratic(), W, **options)
    assert [m["step"] for m in result.history] == [4, 5, 6, 7, 8]
    assert_equal(result.meta_params, run(quadratic(), W, **options).meta_params)


def test_early_stopping_survives_a_resume(tmp_path):
    options = {"outer": SGD, "num_steps": 200, "validate": overfit, "validate_every": 2}
    options["patience"] = 3
    whole = run(quadratic(), W, **options)
    for n in (1, 7, whole.step):
        folder = tmp_path / str(n)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted(quadratic(), n), W, checkpoint_folder=folder, **options)
        result = resume(folder, quadratic(), W, **options)
        assert (result.step, result.stopped_early) == (whole.step, True)
        assert_equal(result.meta_params, whole.meta_params)


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    with pytest.raises(OSError, match=r"cannot write into the folder .*file/run"):
        run(
            quadratic(calls),
            W,
            outer=SGD,
            num_steps=3,
            checkpoint_folder=tmp_path / "file" / "run",
        )
    assert calls == []


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        resume(tmp_path, quadratic(), W, outer=SGD, num_steps=3)


def saved(folder):
    run(quadratic(), W, outer=SGD, num_steps=3, checkpoint_folder=folder)
    return folder / "state.safetensors"


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_checkpoint_is_refused(kept, tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        resume(tmp_path, quadratic(), W, outer=SGD, num_steps=6)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="does not hold the expected arrays"):  # other optimizer
        resume(tmp_path, quadratic(), W, outer=fmeta.optimizers.adam(), num_steps=6)
    with pytest.raises(ValueError, match=r"array \S*/w has shape \(\).* expected \(2,\)"):
        resume(tmp_path, quadratic(), {"w": torch.zeros(2)}, outer=SGD, num_steps=6)
    other = Estimator(lambda meta, seed: {"position": 0}, quadratic().estimate)
    with pytest.raises(ValueError, match=r"lacks .*position.* of another estimator"):
        resume(tmp_path, other, W, outer=SGD, num_steps=6)
    fmeta.pretrained.save(tmp_path / "state.safetensors", "linear", RULE.init())
    with pytest.raises(ValueError, match=r"no checkpoint of fmeta\.meta_train"):
        resume(tmp_path, quadratic(), W, outer=SGD, num_steps=6)


@pytest.mark.parametrize("what", ["loss", "grads"])
def test_a_meta_loss_that_is_not_finite_names_its_step(what, tmp_path):
    good = quadratic()

    def estimate(meta_params, state):
        found, new = good.estimate(meta_params, state)
        if state["step"] == 4:
            nan = torch.tensor(math.nan)
            found = found._replace(**{what: nan if what == "loss" else {"w": nan}})
        return found, new

    with pytest.raises(FloatingPointError, match=r"outer step 4: .*nan.*clip_by_global_norm"):
        run(
            Estimator(good.init, estimate),
            W,
            outer=SGD,
            num_steps=9,
            max_skipped=1,
            checkpoint_folder=tmp_path,
        )
    result = resume(tmp_path, good, W, outer=SGD, num_steps=9)  # the state before it was saved
    assert [m["step"] for m in result.history] == [4, 5, 6, 7, 8]


# More control over everything


def test_first_order_and_mixed_mode_change_no_value():
    loss_fn, params, batches = problem()
    rule = fmeta.optimizers.linear(lr=0.1)

    def both(**options):
        def total(theta):
            losses = fmeta.unroll(rule, loss_fn, theta, params, batches, **options).losses
            return losses.sum(), losses

        return torch.func.grad(total, has_aux=True)(double(rule.init()))

    exact, losses = both()
    mixed, mixed_losses = both(mixed_mode=True)
    assert_equal(mixed_losses, losses)
    assert_equal(mixed, exact, rtol=1e-9, atol=1e-12)
    for order in ("gradients", "inputs"):
        grads, same = both(first_order=order)
        assert_equal(same, losses)
        assert not torch.allclose(grads["weight"], exact["weight"], rtol=1e-3)


def test_loss_args_are_differentiated():
    _, params, batches = problem()

    def loss_fn(p, batch, decay):
        return mse(batch[0] @ p["w"] + p["b"], batch[1]) + decay * (p["w"] ** 2).sum()

    def total(decay, checkpoint=None):
        return fmeta.unroll(
            fmeta.optimizers.sgd(0.1),
            loss_fn,
            {},
            params,
            batches,
            loss_args=(decay,),
            checkpoint=checkpoint,
        ).losses.sum()

    decay, eps = torch.tensor(0.1, dtype=torch.float64), 1e-6
    grad = torch.func.grad(total)(decay)
    slope = (total(decay + eps) - total(decay - eps)) / (2 * eps)
    assert_equal(grad, slope, rtol=1e-6, atol=1e-8)
    assert_equal(torch.func.grad(total)(decay, "sqrt"), grad, rtol=1e-10, atol=1e-12)


def test_extras_reach_the_rule_a_slice_a_step():
    class Noisy:
        needs = frozenset({"noise"})
        init = staticmethod(lambda generator: {})
        init_hidden = staticmethod(lambda th, p: {})

        @staticmethod
        def update(th, p, g, h, *, loss=None, extras=None):
            return -0.1 * g + extras["noise"], h

    rule = fmeta.tensorwise(Noisy)
    loss_fn, params, batches = problem(steps=3)
    noise = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    zero = fmeta.unroll(rule, loss_fn, {}, params, batches, extras={"noise": 0 * noise})
    one = fmeta.unroll(rule, loss_fn, {}, params, batches, extras={"noise": noise})
    assert torch.equal(zero.losses[:2], one.losses[:2])
    assert not torch.equal(zero.losses[2], one.losses[2])
    with pytest.raises(ValueError, match="needs noise"):
        fmeta.unroll(rule, loss_fn, {}, params, batches)


def test_eval_batches_are_judged_after_each_update():
    loss_fn, params, batches = problem()
    held_out = [b[-1].expand(6, *b[-1].shape) for b in batches]  # one batch, every step
    result = fmeta.unroll(
        fmeta.optimizers.sgd(0.1), loss_fn, {}, params, batches, eval_batches=held_out
    )
    last = loss_fn(result.params, [b[-1] for b in batches])
    assert result.eval_losses.shape == (6,)
    assert_equal(result.eval_losses[-1], last)
    other = fmeta.unroll(
        fmeta.optimizers.sgd(0.1),
        loss_fn,
        {},
        params,
        batches,
        eval_batches=held_out,
        eval_loss_fn=lambda p, b: 2 * loss_fn(p, b),
    )
    assert_equal(other.eval_losses, 2 * result.eval_losses)


def test_a_model_state_is_carried_from_step_to_step():
    loss_fn, params, batches = problem()

    def with_count(p, batch, state):
        mean = 0.9 * state["mean"] + 0.1 * batch[0].mean(0)
        return loss_fn(p, (batch[0] - mean, batch[1])), {"mean": mean}

    start = {"mean": torch.zeros(3, dtype=torch.float64)}
    result = fmeta.unroll(
        fmeta.optimizers.sgd(0.1), with_count, {}, params, batches, model_state=start
    )
    mean = start["mean"]
    for x in batches[0]:
        mean = 0.9 * mean + 0.1 * x.mean(0)
    assert_equal(result.model_state["mean"], mean)


def test_a_schedule_sees_time_and_horizon():
    loss_fn, params, batches = problem()
    sgd = fmeta.optimizers.sgd(0.1)
    seen = []

    def linear_decay(t, num_steps):
        seen.append((float(t), float(num_steps)))
        return 1 - t / num_steps

    decayed = fmeta.scheduled(sgd, linear_decay)
    whole = fmeta.unroll(decayed, loss_fn, {}, params, batches)
    assert seen == [(float(t), 6.0) for t in range(6)]
    by_hand = params
    for t in range(6):
        slow = fmeta.optimizers.sgd(0.1 * (1 - t / 6))
        by_hand = fmeta.unroll(slow, loss_fn, {}, by_hand, [b[t : t + 1] for b in batches]).params
    assert_equal(whole.params, by_hand, rtol=1e-10, atol=1e-12)
    longer = fmeta.unroll(decayed, loss_fn, {}, params, batches, num_steps=60)
    assert not torch.allclose(longer.params["w"], whole.params["w"])


def test_chain_partition_and_masked_choose_what_happens_to_whom():
    loss_fn, params, batches = problem()
    sgd = fmeta.optimizers.sgd(1.0)
    clipped = fmeta.chain(fmeta.clip_by_global_norm(1e-3), sgd)
    one = [b[:1] for b in batches]
    moved = fmeta.unroll(clipped, loss_fn, clipped.init(), params, one).params
    change = torch.cat([(moved[k] - params[k]).flatten() for k in params])
    assert float(change.norm()) == pytest.approx(1e-3)

    frozen = fmeta.masked(sgd, lambda path, tensor: path != "b")
    assert torch.equal(fmeta.unroll(frozen, loss_fn, {}, params, batches).params["b"], params["b"])

    rule = fmeta.optimizers.linear(lr=0.1)
    split = fmeta.partition(
        {"matrix": rule, "vector": fmeta.optimizers.adam(0.01)},
        lambda path, tensor: "matrix" if tensor.ndim == 2 else "vector",
    )
    theta = double(split.init())
    moved = fmeta.unroll(split, loss_fn, theta, params, one).params
    alone = fmeta.unroll(rule, loss_fn, theta["matrix"], params, one).params
    adam = fmeta.unroll(fmeta.optimizers.adam(0.01), loss_fn, {}, params, one).params
    assert_equal((moved["w"], moved["b"]), (alone["w"], adam["b"]), rtol=1e-12, atol=1e-12)


def test_any_optimizer_can_stand_outside_a_hand_written_or_a_learned_one():
    by_hand = fmeta.optimizer_from_step(
        lambda generator: {},
        lambda theta, params: {},
        lambda theta, params, grads, hidden: ({"w": params["w"] - 0.05 * grads["w"]}, hidden),
    )
    learned = fmeta.optimizers.linear(lr=0.05)
    want = run(quadratic(), W, outer=SGD, num_steps=20).meta_params
    for outer in (by_hand, learned):
        got = run(quadratic(), W, outer=outer, num_steps=20).meta_params
        assert_equal(got, want, rtol=1e-5, atol=1e-6)
    steeper = run(
        quadratic(), W, outer=learned, outer_params={"weight": torch.tensor([[-0.5, 0.0]])},
        num_steps=20,
    ).meta_params  # fmt: skip
    assert abs(float(steeper["w"])) < abs(float(want["w"]))


def test_resumed_parameters_are_on_the_device_of_those_given(tmp_path):
    outer = fmeta.optimizers.adam(0.05)
    run(quadratic(), W, outer=outer, num_steps=3, checkpoint_folder=tmp_path)
    elsewhere = fmeta.trees.map(lambda x: x.to("meta"), W)
    result = resume(tmp_path, quadratic(), elsewhere, outer=outer, num_steps=3)
    assert result.step == 3
    assert result.meta_params["w"].is_meta


def test_parameters_of_one_path_are_refused_before_any_work(tmp_path):
    calls = []
    two = {"a/b": torch.zeros(()), "a": {"b": torch.zeros(())}, **W}
    with pytest.raises(ValueError, match=r"two leaves of the tree have the path .*a/b"):
        run(quadratic(calls), two, outer=SGD, num_steps=3, checkpoint_folder=tmp_path)
    assert not calls


def test_outer_steps_record_no_graph():
    start = {"w": torch.tensor(3.0, requires_grad=True)}
    scale = torch.tensor(1.0, requires_grad=True)
    plain = quadratic()

    def estimate(meta_params, state):
        got, state = plain.estimate(meta_params, state)
        return got._replace(grads={"w": scale * got.grads["w"]}), state

    outer = fmeta.optimizers.sgd(0.05, momentum=0.9)
    want = run(plain, W, outer=outer, num_steps=3).meta_params["w"]
    for estimator in (plain, Estimator(plain.init, estimate)):
        got = run(estimator, start, outer=outer, num_steps=3).meta_params["w"]
        assert not got.requires_grad
        assert torch.equal(got, want)
