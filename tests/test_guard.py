"""A closed-over tensor under `checkpoint` is never a silent zero; harmless ones raise no alarm."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import fmeta
from fmeta import optimizers

DOUBLE = {"dtype": torch.float64}
A = torch.tensor(1.3, **DOUBLE)
PARAMS = {"w": torch.tensor([1.0, -2.0], **DOUBLE)}
BATCHES = torch.linspace(-1, 1, 4, **DOUBLE)
CURE = r"Pass it explicitly: in `scan` through `consts`, in `unroll` through `loss_args`.*learn"


def base(a, p, x):
    return (a * p["w"] - x).square().sum()


class Attribute:
    def __init__(self, a):
        self.a = a

    def __call__(self, p, x):
        return base(self.a, p, x)

    def method(self, p, x):
        return base(self.a, p, x)


class Holder(NamedTuple):
    inner: dict


GLOBAL = {}


def by_global(a):
    GLOBAL["a"] = a
    return lambda p, x: base(GLOBAL["a"], p, x)


def by_default(a):
    def loss(p, x, a=a):
        return base(a, p, x)

    return loss


def by_named_tuple(a):
    held = Holder({"a": [a]})
    return lambda p, x: base(held.inner["a"][0], p, x)


def by_derived(a):
    doubled = 2 * a
    return lambda p, x: base(doubled / 2, p, x)


def by_in_place(a):
    def loss(p, x):
        total = torch.zeros_like(x)
        total += a * p["w"].square().sum()
        return total

    return loss


def by_method_of_tensor(a):
    return lambda p, x: p["w"].mul(a).sub(x).square().sum()


def by_out_of_list(a):
    return lambda p, x: torch.stack([a, x]).prod() * p["w"].square().sum()


def by_index(a):
    pair = torch.stack([a, a])
    return lambda p, x: base(pair[0], p, x)


def by_operator_on_the_right(a):
    return lambda p, x: (p["w"] @ torch.ones_like(p["w"])) ** 2 * a


WAYS = {
    "lambda": lambda a: lambda p, x: base(a, p, x),
    "default argument": by_default,
    "partial": lambda a: functools.partial(base, a),
    "attribute": Attribute,
    "bound method": lambda a: Attribute(a).method,
    "global": by_global,
    "named tuple": by_named_tuple,
    "derived": by_derived,
    "in place": by_in_place,
    "method of a tensor": by_method_of_tensor,
    "list": by_out_of_list,
    "index": by_index,
    "right operand": by_operator_on_the_right,
}


def backward(f):
    a = A.clone().requires_grad_()
    return torch.autograd.grad(f(a), a)


OUTER = {
    "grad": lambda f: grad(f)(A),
    "vjp": lambda f: vjp(f, A),
    "jvp": lambda f: jvp(f, (A,), (A,)),
    "vmap": lambda f: vmap(f)(torch.stack([A, A])),
    "backward": backward,
    "grad of grad": lambda f: grad(grad(f))(A),
    "vmap of grad": lambda f: vmap(grad(f))(torch.stack([A, A])),
    "grad of vmap": lambda f: grad(lambda a: vmap(lambda s: f(a * s))(torch.ones(2)).sum())(A),
    "jvp of grad": lambda f: jvp(grad(f), (A,), (A,)),
}


def total(make, **options):
    def fn(a):
        return fmeta.unroll(
            optimizers.sgd(0.1), make(a), {}, PARAMS, BATCHES, **options
        ).losses.sum()

    return fn


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("way", WAYS)
def test_a_traced_tensor_by_any_way_is_refused_with_the_cure(way, outer):
    with pytest.raises(ValueError, match=CURE):
        OUTER[outer](total(WAYS[way], checkpoint="sqrt"))


@pytest.mark.parametrize("outer", OUTER)
def test_mixed_mode_refuses_it_too(outer):
    with pytest.raises(ValueError, match=CURE):
        OUTER[outer](total(WAYS["lambda"], mixed_mode=True))


RECOMPUTED = [
    {"recompute": "gradient"},
    {"recompute": "both"},
    {"recompute": "rule", "mixed_mode": True},
    {"recompute": "gradient", "checkpoint": "sqrt"},
    {"mixed_mode": True, "checkpoint": "sqrt"},
    {"mixed_mode": "keep_gradients", "checkpoint": 2},
]


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("options", RECOMPUTED, ids=str)
def test_a_loss_that_is_recomputed_may_not_hide_it(options, outer):
    # Under a transform the recomputed part is one operation, whose insides no mode looks at.
    with pytest.raises(ValueError, match=CURE):
        OUTER[outer](total(WAYS["lambda"], **options))


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "rule"},
        {"recompute": "rule", "mixed_mode": True},
        {"recompute": "both", "checkpoint": 2},
    ],
    ids=str,
)
def test_nor_may_a_rule_that_is_recomputed(options, outer):
    def fn(a):
        rule = optimizers.sgd(a)
        loss = lambda p, x: base(1.0, p, x)
        return fmeta.unroll(rule, loss, {}, PARAMS, BATCHES, **options).losses.sum()

    with pytest.raises(ValueError, match=CURE):
        OUTER[outer](fn)


@pytest.mark.parametrize("recompute", ["gradient", "rule", "both"])
def test_nor_in_a_single_step(recompute):
    def fn(a):
        step = fmeta.inner_step(optimizers.sgd(a), WAYS["lambda"](a), recompute=recompute)
        return step({}, fmeta.InnerState(PARAMS, {}), BATCHES[0])[1]["loss"]

    with pytest.raises(ValueError, match=CURE):
        grad(fn)(A)


@pytest.mark.parametrize("options", [{"checkpoint": 2}, {"mixed_mode": True}], ids=str)
def test_the_message_names_operation_and_shape(options):
    make = lambda a: lambda p, x: (p["w"] * torch.stack([a, a])).sum()
    with pytest.raises(ValueError, match=r"`mul` uses a closed-over tensor of shape \(\)"):
        grad(total(lambda a: lambda p, x: (a * p["w"]).sum(), **options))(A)
    with pytest.raises(ValueError, match=r"`stack` uses a closed-over tensor"):
        grad(total(make, **options))(A)


@pytest.mark.parametrize("outer", [o for o in OUTER if o != "vjp"])
@pytest.mark.parametrize("way", [w for w in WAYS if w != "in place"])  # torch refuses it under vmap
def test_without_checkpoint_a_closure_is_right(way, outer):
    # The reference passes it as an argument.
    def explicit(a):
        loss = lambda p, x, a: WAYS[way](a)(p, x)
        return fmeta.unroll(
            optimizers.sgd(0.1), loss, {}, PARAMS, BATCHES, loss_args=(a,)
        ).losses.sum()

    got, want = OUTER[outer](total(WAYS[way])), OUTER[outer](explicit)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("outer", OUTER)
def test_the_cure_works(outer):
    def fn(schedule):
        return lambda a: fmeta.unroll(
            optimizers.sgd(0.1),
            lambda p, x, a: base(a, p, x),
            {},
            PARAMS,
            BATCHES,
            loss_args=(a,),
            checkpoint=schedule,
        ).losses.sum()

    if outer == "vjp":
        got, want = (vjp(fn(s), A)[1](A) for s in ("sqrt", None))
    else:
        got, want = OUTER[outer](fn("sqrt")), OUTER[outer](fn(None))
    torch.testing.assert_close(got, want)


def test_a_closed_over_rate_is_sent_to_learn():
    fn = lambda lr: fmeta.unroll(
        optimizers.sgd(lr),
        lambda p, x: base(1.0, p, x),
        {},
        PARAMS,
        BATCHES,
        checkpoint="sqrt",
    ).losses.sum()
    with pytest.raises(ValueError, match=r"make a hyper-parameter learnable with `fmeta\.learn`"):
        grad(fn)(torch.tensor(0.1, **DOUBLE))


@pytest.mark.parametrize("checkpoint", ["sqrt", 2])
def test_a_module_with_trained_parameters_is_refused(checkpoint):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Linear(2, 2)
    step = lambda c, x: (net(c).tanh(), ())
    with pytest.raises(ValueError, match=CURE):
        fmeta.scan(step, torch.ones(2), torch.zeros(3), checkpoint=checkpoint)


def test_a_module_under_func_grad_is_refused():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Linear(2, 2)

    def fn(params):
        step = lambda c, x: (functional_call(net, params, c).tanh(), ())
        return fmeta.scan(step, torch.ones(2), torch.zeros(3), checkpoint="sqrt")[0].sum()

    with pytest.raises(ValueError, match=CURE):
        grad(fn)({k: p.detach() for k, p in net.named_parameters()})


def scanned(step, start=None, checkpoint="sqrt"):
    """A scan with step(c, x), differentiated with respect to where it starts."""
    start = torch.ones(2) if start is None else start
    return grad(
        lambda c: fmeta.scan(step, c, torch.linspace(0, 1, 4), checkpoint=checkpoint)[0].sum()
    )(start)


def frozen_module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(2, 2).requires_grad_(False)


FACTORS, ORDER = torch.tensor([0.5, 2.0]), torch.tensor([1, 0])
FROZEN, DROPOUT = frozen_module(), nn.Dropout(0.5).eval()
HARMLESS = {
    "plain tensor": lambda c, x: (FACTORS * c + x, ()),
    "frozen module": lambda c, x: (FROZEN(c), ()),
    "integer tensor": lambda c, x: (c[ORDER].sin() + x, ()),
    "numbers": lambda c, x: (c * 0.5 + 1, ()),
    "eval dropout": lambda c, x: (DROPOUT(c).sin(), ()),
    "inner gradient": lambda c, x: (c - grad(lambda q: q.square().sum() * x)(c), ()),
    "inner vmap": lambda c, x: (vmap(lambda q: q.sin() * x)(c), ()),
    "inner jvp": lambda c, x: (jvp(lambda q: q.sin(), (c,), (c,))[1] + x, ()),
    "shape of a traced tensor": lambda c, x: (c.reshape(c.shape).sin(), ()),
}


@pytest.mark.parametrize("checkpoint", ["sqrt", 2])
@pytest.mark.parametrize("way", HARMLESS)
def test_harmless_closures_raise_no_alarm(way, checkpoint):
    step = HARMLESS[way]
    torch.testing.assert_close(scanned(step, checkpoint=checkpoint), scanned(step, checkpoint=None))


def test_the_shape_of_a_closed_over_traced_tensor_may_be_read():
    def fn(a):
        n = torch.stack([a, a])
        step = lambda c, x: (c * n.shape[0] * n.ndim * len(n) / n.numel() / n.size(0), ())
        return fmeta.scan(step, a, torch.zeros(3), checkpoint="sqrt")[0]

    torch.testing.assert_close(grad(fn)(A), torch.tensor(1.0, **DOUBLE))


def test_under_no_grad_a_module_that_requires_grad_is_a_constant():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Linear(2, 2)
    step = lambda c, x: (net(c).tanh(), ())
    with torch.no_grad():
        got = fmeta.scan(step, torch.ones(2), torch.zeros(3), checkpoint="sqrt")[0]
        want = net(net(net(torch.ones(2)).tanh()).tanh()).tanh()
    torch.testing.assert_close(got, want)


def test_a_detached_tensor_is_a_constant():
    def fn(a):
        k = a.detach()
        return fmeta.scan(lambda c, x: (c * k, ()), a, torch.zeros(3), checkpoint="sqrt")[0]

    leaf = A.clone().requires_grad_()
    fn(leaf).backward()
    torch.testing.assert_close(leaf.grad, A**3)


@pytest.mark.parametrize("outer", ["grad", "jvp", "vmap", "backward", "vmap of grad"])
def test_a_traced_tensor_among_the_consts_of_nested_scans_is_fine(outer):
    def fn(schedule):
        def row(c, x, a):
            inner = lambda d, y, a: ((a * d).sin() + y, ())
            return fmeta.scan(
                inner, c, x * torch.ones(3, **DOUBLE), consts=(a,), checkpoint=schedule
            )

        return lambda a: fmeta.scan(row, A, BATCHES, consts=(a,), checkpoint=schedule)[0]

    torch.testing.assert_close(OUTER[outer](fn("sqrt")), OUTER[outer](fn(None)))


@pytest.mark.parametrize("outer", ["grad", "jvp", "vmap", "backward", "vmap of grad"])
def test_an_inner_scan_that_closes_over_a_const_of_the_outer_one_is_refused_or_right(outer):
    # `a` is an argument of the outer body, a closure of the inner one.
    def fn(schedule):
        def row(c, x, a):
            inner = lambda d, y: ((a * d).sin() + y, ())
            return fmeta.scan(inner, c, x * torch.ones(3, **DOUBLE), checkpoint=schedule)

        return lambda a: fmeta.scan(row, A, BATCHES, consts=(a,), checkpoint=schedule)[0]

    with pytest.raises(ValueError, match=CURE):
        OUTER[outer](fn("sqrt"))


@pytest.mark.parametrize(
    "draw",
    [
        lambda c: c + torch.randn(2),
        lambda c: nn.functional.dropout(c, 0.5),
        lambda c: c * torch.randperm(2),
        lambda c: torch.bernoulli(torch.sigmoid(c)) * c,
        lambda c: c + torch.empty(2).normal_(),
    ],
    ids=["randn", "dropout", "randperm", "bernoulli", "normal_"],
)
def test_random_numbers_are_refused_and_the_generator_left_as_it_was(draw):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"draws random numbers.*draw the noise outside"):
        scanned(lambda c, x: (draw(c), ()))
    assert torch.equal(before, torch.get_rng_state())


def test_a_body_without_noise_leaves_the_generator_alone():
    before = torch.get_rng_state()
    scanned(lambda c, x: (c.sin() + x, ()))
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_of_the_bodys_own_is_refused():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="draws random numbers"):
        scanned(lambda c, x: (c + torch.randn(2, generator=generator), ()))


def test_an_error_in_the_body_comes_through_as_it_is():
    def step(c, x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        scanned(step)


def test_a_step_may_take_a_vjp_of_its_own():
    def body(carry, x):
        value, pull = torch.func.vjp(lambda c: (c * x).sin(), carry)
        return pull(torch.ones_like(value))[0], value

    carry = torch.tensor(0.3, dtype=torch.float64)
    xs = torch.tensor([0.5, 1.5, 2.0, 3.0], dtype=torch.float64)
    last = lambda c, **options: fmeta.scan(body, c, xs, **options)[0]
    torch.testing.assert_close(
        torch.func.grad(lambda c: last(c, checkpoint="sqrt"))(carry), torch.func.grad(last)(carry)
    )
