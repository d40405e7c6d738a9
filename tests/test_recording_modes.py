"""Inner gradients are right in every mode of torch, and what cannot be recomputed is refused."""

import random

import numpy
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import fmeta
from fmeta.optimizers import adam, sgd

ONE = torch.tensor(1.0)
START = {"w": torch.ones(2)}
CHECKPOINTS = (None, "sqrt", 2)


def loss(p, batch):
    return (p["w"] - batch).square().sum()


def trained(w, checkpoint=None):
    return fmeta.unroll(sgd(0.1), loss, {}, {"w": w}, torch.zeros(3), checkpoint=checkpoint)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_inference_mode_trains_as_no_grad_does(checkpoint):
    with torch.no_grad():
        want = trained(START["w"], checkpoint).params["w"]
    with torch.inference_mode():
        made_inside = torch.ones(2)
        torch.testing.assert_close(trained(made_inside, checkpoint).params["w"], want)
        batch = vmap(lambda w: trained(w, checkpoint).params["w"])(torch.ones(3, 2))
    torch.testing.assert_close(batch, want.expand(3, 2))


def test_a_dual_level_carries_its_tangent():
    want = jvp(lambda w: trained(w).losses.sum(), (START["w"],), (torch.ones(2),))[1]
    scale = torch.tensor(1.0, requires_grad=True)
    with forward_ad.dual_level():
        dual = {"w": forward_ad.make_dual(START["w"], torch.ones(2))}
        run = fmeta.unroll(
            sgd(0.1), lambda p, b, a: a * loss(p, b), {}, dual, torch.zeros(3), loss_args=(scale,)
        )
        torch.testing.assert_close(forward_ad.unpack_dual(run.losses.sum()).tangent, want)
        with torch.no_grad():
            run = trained(dual["w"])
        torch.testing.assert_close(forward_ad.unpack_dual(run.losses.sum()).tangent, want)


def test_a_dual_level_around_a_recomputed_loop_is_refused_by_name():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(START["w"], torch.ones(2))
        with pytest.raises(ValueError, match=r"use torch\.func\.jvp"):
            trained(dual, "sqrt")


@pytest.mark.parametrize("checkpoint", ["sqrt", 2])
def test_a_closed_over_tensor_that_is_only_returned_is_refused(checkpoint):
    def last(w):
        return fmeta.scan(lambda c, x: (c + x, w), ONE, torch.ones(4), checkpoint=checkpoint)[1]

    with pytest.raises(ValueError, match=r"returns a closed-over tensor.*consts"):
        grad(lambda w: last(w).sum())(ONE)


def test_a_model_state_that_closes_over_a_tracer_is_refused_in_mixed_mode():
    def meta(context):
        run = fmeta.unroll(
            sgd(0.1),
            lambda p, b, s: (loss(p, b), context),
            {},
            START,
            torch.zeros(3),
            model_state=ONE,
            mixed_mode=True,
        )
        return run.model_state

    with pytest.raises(ValueError, match="returns a closed-over tensor"):
        grad(meta)(ONE)


def test_a_mixed_inner_step_refuses_closures_too():
    rule = adam(0.1)
    state = fmeta.InnerState(START, rule.init_hidden({}, START))

    def after(scale, mixed_mode):
        step = fmeta.inner_step(rule, lambda p, b: scale * loss(p, b), mixed_mode=mixed_mode)
        return step({}, state, ONE)[0].params["w"].sum() + scale

    assert grad(after)(ONE, False).isfinite()
    with pytest.raises(ValueError, match="loss_args"):
        grad(after)(ONE, True)


@pytest.mark.parametrize("draw", [numpy.random.rand, random.random], ids=["numpy", "python"])
def test_noise_of_other_libraries_is_refused(draw):
    def noisy(c, x, w):
        return c * w * float(draw()), ()

    with pytest.raises(ValueError, match="draws random numbers"):
        fmeta.scan(noisy, ONE, torch.ones(4), consts=(ONE,), checkpoint="sqrt")


def test_a_counting_python_number_in_the_carry_is_refused_under_checkpoint():
    def body(carry, x):
        return (carry[0] + x, carry[1] + 1), ()

    assert fmeta.scan(body, (ONE, 0), torch.ones(4))[0][1] == 4
    with pytest.raises(TypeError, match=r"at path 1 is 0 before a step and 1 after.*tensor"):
        fmeta.scan(body, (ONE, 0), torch.ones(4), checkpoint="sqrt")


def test_python_numbers_cannot_be_stacked():
    with pytest.raises(TypeError, match="y at path <root> is 1"):
        fmeta.scan(lambda c, x: (c + x, 1), ONE, torch.ones(4))


def test_reading_the_shape_of_a_tracer_is_no_false_alarm():
    def shaped(w):
        body = lambda c, x, w: (c * w + torch.zeros_like(other), ())
        other = 2 * w
        return fmeta.scan(body, ONE, torch.ones(3), consts=(w,), checkpoint="sqrt")[0]

    assert grad(shaped)(torch.tensor(2.0)) == 12


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo does it itself
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_compiled_unroll_equals_the_eager_one(checkpoint):
    compiled = torch.compile(lambda w: trained(w, checkpoint).losses, backend="eager")
    torch.testing.assert_close(compiled(START["w"]), trained(START["w"]).losses)


@pytest.mark.parametrize("beta", [0.9, 0.9999, 0.0])
def test_bias_correction_keeps_its_digits_in_float32(beta):
    p = {"w": torch.full((3,), 0.7)}
    rule = adam(1e-2, betas=(0.9, beta))
    got = rule.step({}, p, p, rule.init_hidden({}, p))[0]["w"] - p["w"]
    leaf = p["w"].double().requires_grad_()
    leaf.grad = p["w"].double()
    torch.optim.Adam([leaf], 1e-2, betas=(0.9, beta)).step()
    torch.testing.assert_close(got.double(), leaf.detach() - p["w"], rtol=5e-6, atol=0)


def test_a_key_that_a_rule_misses_in_its_own_table_stays_its_own_error():
    table = {"relu": torch.relu}

    class Rule:
        def init(self, generator):
            return {}

        def init_hidden(self, th, p):
            return {"m": torch.zeros_like(p)}

        def update(self, th, p, g, h):
            return table["gelu"](g), h

    rule = fmeta.tensorwise(Rule())
    with pytest.raises(KeyError, match="gelu"):
        rule.step({}, START, START, rule.init_hidden({}, START))
