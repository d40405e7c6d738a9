"""Schedules are torch's and optax's curves, stay where they end, and can be learned and batched."""

import functools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fmeta
from fmeta import schedules
from fmeta.schedules import (
    constant,
    cosine,
    join,
    linear,
    piecewise,
    product,
    relative,
    warmup,
    warmup_cosine,
)

DOUBLE = {"dtype": torch.float64}
TIMES = torch.arange(15, **DOUBLE)


def tensor(*values):
    return torch.tensor(values if len(values) > 1 else values[0], **DOUBLE)


def torchs(build, steps, lr=0.3):
    """The factors of a torch scheduler, updates 0 to steps - 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = build(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(scheduler.get_last_lr()[0] / lr)
        optimizer.step()
        scheduler.step()
    return tensor(*factors)


RATES = torch.optim.lr_scheduler
OF_TORCH = {
    "constant": (constant(), lambda o: RATES.LambdaLR(o, lambda t: 1.0), 15),
    "linear": (
        linear(0.25, 0.75, steps=8),
        lambda o: RATES.LinearLR(o, 0.25, 0.75, total_iters=8),
        15,
    ),
    "warmup": (warmup(6, start=0.1), lambda o: RATES.LinearLR(o, 0.1, total_iters=6), 15),
    # up to its end only: afterwards torch's rises again
    "cosine": (cosine(0.1, steps=10), lambda o: RATES.CosineAnnealingLR(o, 10, 0.1 * 0.3), 11),
    "stairs": (
        piecewise([3, 8], [1.0, 0.5, 0.25]),
        lambda o: RATES.MultiStepLR(o, [3, 8], gamma=0.5),
        15,
    ),
    "one after the other": (
        join([warmup(4, 0.2), cosine(steps=6)], [4]),
        lambda o: RATES.SequentialLR(
            o,
            [RATES.LinearLR(o, 0.2, total_iters=4), RATES.CosineAnnealingLR(o, 6)],
            milestones=[4],
        ),
        10,
    ),
    "multiplied": (
        product(warmup(5, 0.2), piecewise([7], [1.0, 0.1])),
        lambda o: RATES.ChainedScheduler(
            [RATES.LinearLR(o, 0.2, total_iters=5), RATES.MultiStepLR(o, [7], gamma=0.1)]
        ),
        15,
    ),
}


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of torch's SequentialLR itself
def test_equal_to_torchs(name):
    schedule, build, steps = OF_TORCH[name]
    want = torchs(build, steps)
    torch.testing.assert_close(schedule(TIMES[:steps]), want, rtol=1e-12, atol=1e-14)


def of_optax(t, init, peak, warmup_steps, decay_steps, end):
    """optax.warmup_cosine_decay_schedule, from its documentation."""
    if t < warmup_steps:
        return init + (peak - init) * t / warmup_steps
    done = min(t - warmup_steps, decay_steps - warmup_steps) / (decay_steps - warmup_steps)
    alpha = end / peak
    return peak * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * done)) + alpha)


@pytest.mark.parametrize("start", [0.0, 0.3])
@pytest.mark.parametrize("end", [0.0, 0.05])
def test_warmup_cosine_is_optaxs(start, end):
    want = tensor(*(of_optax(t, start, 1.0, 3, 11, end) for t in range(15)))
    for got in (
        warmup_cosine(3, end, steps=11, start=start)(TIMES),
        warmup_cosine(3, end, start=start)(TIMES, 11),
        join([warmup(3, start), cosine(end)], [3])(TIMES, tensor(11.0)),
        relative(warmup_cosine(3 / 11, end, start=start))(TIMES, 11),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


ENDS = {
    "linear": (linear(1.0, 0.1), 0.1),
    "cosine": (cosine(0.1), 0.1),
    "warmup_cosine": (warmup_cosine(2, 0.1), 0.1),
    "warmup_cosine, a long warm-up": (warmup_cosine(20, 0.1), 0.1),
    "warmup": (warmup(5), 1.0),
    "piecewise": (piecewise([2, 3], [1.0, 0.5, 0.2]), 0.2),
    "relative": (relative(piecewise([0.5], [1.0, 0.3])), 0.3),
    "join": (join([constant(), linear(0.5, 0.25)], [4]), 0.25),
}


@pytest.mark.parametrize("name", ENDS)
def test_past_the_horizon_the_last_factor_stays(name):
    schedule, last = ENDS[name]
    late = schedule(tensor(21.0, 50.0, 1e6), 10)
    torch.testing.assert_close(late, torch.full_like(late, last), rtol=0, atol=1e-15)


def test_a_piece_sees_its_own_time_and_length():
    seen = []

    def piece(t, num_steps):
        seen.append((float(t), float(num_steps)))
        return t

    schedule = join([piece, piece, piece], [2, 5])
    for t, where in ((1.0, 0), (4.0, 1), (9.0, 2)):
        seen.clear()
        assert float(schedule(tensor(t), tensor(12.0))) == (1.0, 2.0, 4.0)[where]
        # The others are asked about the nearest of their own ends.
        assert seen == [
            (min(t, 2.0), 2.0),
            (min(max(t - 2, 0.0), 3.0), 3.0),
            (max(t - 5, 0.0), 7.0),
        ]


def test_pieces_out_of_use_do_not_spoil_derivatives():
    falls = lambda t, n: (3 - t).sqrt()  # no number after 3, no finite slope at it
    schedule = lambda a, t: join([lambda t, n: a * falls(t, n), lambda t, n: a / (t + a)], [2])(t)
    for t in (0.0, 1.5, 2.0, 7.0):
        assert grad(schedule)(tensor(2.0), tensor(t)).isfinite()
        assert grad(schedule, argnums=1)(tensor(2.0), tensor(t)).isfinite()


LEARNED = {
    "constant": (lambda x: constant(x), 0.7),
    "linear, end": (lambda x: linear(1.0, x), 0.2),
    "linear, steps": (lambda x: linear(steps=x), 9.5),
    "cosine, end": (lambda x: cosine(x), 0.2),
    "cosine, steps": (lambda x: cosine(0.1, steps=x), 9.5),
    "warmup, steps": (lambda x: warmup(x), 6.5),
    "warmup_cosine, warm-up": (lambda x: warmup_cosine(x), 3.3),
    "piecewise, factors": (lambda x: piecewise([2, 5], [1.0, x, x * x]), 0.5),
    "product": (lambda x: product(constant(x), linear(1.0, x)), 0.5),
    "relative": (lambda x: relative(warmup_cosine(x)), 0.33),
}


@pytest.mark.parametrize("name", LEARNED)
def test_arguments_may_be_tensors_with_exact_derivatives(name):
    build, value = LEARNED[name]
    curve = lambda x: (build(x)(TIMES, 12) * (TIMES + 1).sqrt()).sum()
    x = tensor(value)
    torch.testing.assert_close(curve(x), curve(value))
    numeric = (curve(x + 1e-6) - curve(x - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(curve)(x), numeric, rtol=1e-7, atol=1e-7)
    assert grad(grad(curve))(x).isfinite()


@pytest.mark.parametrize("name", LEARNED)
def test_batched_arguments_times_and_horizons(name):
    build, value = LEARNED[name]
    values, times, horizons = value * tensor(1.0, 1.1), tensor(3.0, 8.0), tensor(12.0, 20.0)
    got = vmap(lambda x, t, n: build(x)(t, n))(values, times, horizons)
    want = [build(float(x))(float(t), n) for x, t, n in zip(values, times, horizons, strict=True)]
    torch.testing.assert_close(got, torch.stack(want).to(got.dtype), rtol=1e-6, atol=1e-7)


def test_tensors_of_boundaries_and_factors():
    limits, heights = torch.tensor([2, 5]), torch.tensor([1.0, 0.3, 0.1])
    got = piecewise(limits, heights)(torch.arange(7))
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, 0.3, 0.3, 0.3, 0.1, 0.1]))
    counts = grad(lambda h: piecewise(limits, h)(torch.arange(7)).sum())(heights)
    torch.testing.assert_close(counts, torch.tensor([2.0, 3.0, 2.0]))


def test_boundaries_that_are_traced_or_have_no_values_are_not_looked_at():
    heights = [1.0, 0.5, 0.2]
    falling = tensor(5.0, 2.0)
    for build in (lambda x: piecewise(x, heights), lambda x: join([constant()] * 3, x)):
        assert build(falling.to("meta"))(torch.zeros((), device="meta")).device.type == "meta"
        with FakeTensorMode(allow_non_fake_inputs=True):
            build(torch.ones(2))
        at = functools.partial(lambda build, x: build(x)(tensor(1.0)), build)
        vmap(at)(torch.stack([falling, falling]))
        assert grad(at)(falling).isfinite().all()
        make_fx(at)(falling)


NOTHING = {
    "linear": (lambda x: linear(1.0, 0.25, x), constant(0.25)),
    "cosine": (lambda x: cosine(0.25, x), constant(0.25)),
    "warmup": (lambda x: warmup(x, 0.1), constant()),
    "warmup_cosine": (lambda x: warmup_cosine(x, 0.1, start=0.3), cosine(0.1)),
    "piecewise": (lambda x: piecewise([x, 5], [1.0, 0.5, 0.2]), piecewise([5], [0.5, 0.2])),
    "join": (lambda x: join([lambda t, n: t / n, cosine()], [x]), cosine()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_length_of_zero_is_over_at_once(name):
    build, same = NOTHING[name]
    want = same(TIMES, 12)
    for nothing in (0, 0.0, tensor(0.0), torch.tensor(0)):
        torch.testing.assert_close(build(nothing)(TIMES, 12), want, rtol=0, atol=0)
        slope = grad(lambda t, x=nothing: build(x)(t, 12).sum())(TIMES)
        torch.testing.assert_close(slope, grad(lambda t: same(t, 12).sum())(TIMES))
    curve = lambda x: build(x)(TIMES, 12).sum()
    assert grad(curve)(tensor(0.0)).isfinite()
    assert grad(grad(curve))(tensor(0.0)).isfinite()
    torch.testing.assert_close(
        vmap(build(0))(TIMES, torch.full_like(TIMES, 12)), want, rtol=0, atol=0
    )


def test_a_schedule_on_meta_and_of_integers_has_the_dtype_of_its_time():
    for schedule in (constant(), cosine(), warmup_cosine(2), piecewise([1], [1.0, 0.5])):
        assert schedule(torch.zeros((), device="meta", **DOUBLE), 3).device.type == "meta"
        assert schedule(tensor(1.0), torch.tensor(3)).dtype is torch.float64
        assert schedule(torch.tensor(1), 3).dtype is torch.float32


# --- with `scheduled` ----------------------------------------------------------------------------


def test_the_horizon_is_asked_for_by_init_hidden():
    rule = fmeta.scheduled(fmeta.optimizers.sgd(0.1), cosine())
    assert rule.needs == {"num_steps"}
    with pytest.raises(ValueError, match="needs num_steps"):
        rule.init_hidden({}, {"w": torch.ones(2)})
    assert not fmeta.scheduled(fmeta.optimizers.sgd(0.1), cosine(steps=5)).needs
    assert not warmup(5).needs
    assert join([cosine(), warmup(3)], [4]).needs == frozenset()
    assert product(warmup(3), cosine()).needs == {"num_steps"}


def test_the_length_of_a_schedule_is_learned_through_training():
    def building(lr, steps):
        return fmeta.scheduled(fmeta.optimizers.sgd(lr), warmup_cosine(steps))

    rule = fmeta.learn(building, {"steps": "log"}, lr=0.3, steps=tensor(2.5))
    end = lambda th: (
        fmeta.unroll(
            rule, lambda p, b: p.square().sum() / 2, th, tensor(1.0), torch.zeros(6)
        ).params
    )
    th = rule.init()
    moved = lambda e: end({"steps": th["steps"] + e})
    numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
    torch.testing.assert_close(grad(end)(th)["steps"], numeric, rtol=1e-6, atol=1e-9)
    assert numeric.abs() > 1e-3


def test_horizons_differ_from_task_to_task():
    rule = fmeta.scheduled(fmeta.optimizers.sgd(1.0), linear())
    run = lambda n: (
        fmeta.unroll(rule, lambda p, b: p, {}, tensor(0.0), torch.zeros(4), num_steps=n).params
    )
    horizons = torch.tensor([2, 4, 8])
    want = [-sum(max(0.0, 1 - t / n) for t in range(4)) for n in (2, 4, 8)]
    torch.testing.assert_close(vmap(run)(horizons), tensor(*want))


WRONG = {
    "no horizon": (lambda: cosine()(torch.zeros(())), ValueError, "lasts as long as the training"),
    "a negative factor": (lambda: constant(-1.0), ValueError, "value must be not negative"),
    "a length": (lambda: linear(steps=-1), ValueError, "steps must be not negative"),
    "factors": (lambda: piecewise([1], [1.0]), ValueError, "1 factors for 1 boundaries"),
    "order": (lambda: piecewise([3, 2], [1.0, 0.5, 0.2]), ValueError, "must increase, got 3, 2"),
    "order of a tensor": (
        lambda: piecewise(tensor(2.0, 5.0, 5.0), [1.0, 0.5, 0.2, 0.1]),
        ValueError,
        "boundaries must increase, got 2, 5, 5",
    ),
    "order of numbers and tensors": (
        lambda: piecewise([3, torch.tensor(2)], [1.0, 0.5, 0.2]),
        ValueError,
        "boundaries must increase, got 3, 2",
    ),
    "order of pieces": (
        lambda: join([constant()] * 3, [4, 4]),
        ValueError,
        "boundaries must increase, got 4, 4",
    ),
    "order of a tensor of pieces": (
        lambda: join([constant()] * 3, torch.tensor([4, 1])),
        ValueError,
        "boundaries must increase, got 4, 1",
    ),
    "a negative tensor": (
        lambda: piecewise(tensor(-2.0, 5.0), [1.0, 0.5, 0.2]),
        ValueError,
        "boundaries must be not negative",
    ),
    "a number": (lambda: piecewise(3, [1.0, 0.5]), TypeError, "boundaries must be a sequence"),
    "a matrix": (lambda: piecewise(torch.ones(1, 1), [1, 1]), ValueError, "a tensor of one axis"),
    "pieces": (lambda: join([constant()], [1]), ValueError, "1 boundaries for 1 schedules"),
    "no factors": (lambda: product(), ValueError, "at least one schedule"),
    "no function": (lambda: product(0.5), TypeError, r"fmeta.schedules.constant\(number\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_refused(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_all_schedules_are_public():
    assert fmeta.schedules is schedules
    assert all(hasattr(schedules, name) for name in schedules.__all__)
