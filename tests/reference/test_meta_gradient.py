"""Meta-gradients equal those of an independent JAX program in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fmeta
from fmeta import optimizers

DATA = np.load(Path(__file__).with_name("meta_gradient.npz"))
NAMES = ("w1", "b1", "w2", "b2")
EPS = {"adam": 1e-8, "adam_eps1e-3": 1e-3}


def array(key):
    return torch.from_numpy(np.asarray(DATA[key]))


def tree(prefix):
    return {name: array(f"{prefix}/{name}") for name in NAMES}


def loss(p, batch):
    x, y = batch
    z = torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return F.cross_entropy(z, y.long())


TRAIN = (array("x_train"), array("y_train"))
VALIDATION = (array("x_val"), array("y_val"))


def run_of(name, params, lr, **options):
    constants = {} if name == "sgd" else {"eps": EPS[name]}
    builder = optimizers.sgd if name == "sgd" else optimizers.adam
    rule = fmeta.learn(builder, {"lr": "linear"}, **constants)
    return fmeta.unroll(rule, loss, {"lr": lr}, params, TRAIN, **options)


def rates_of(name):
    return tree("lr_sgd" if name == "sgd" else "lr_adam")


def close(got, want):
    """1e-8 of the largest entry of each array."""
    for name in NAMES:
        scale = want[name].abs().max().item()
        torch.testing.assert_close(
            got[name], want[name], rtol=0, atol=1e-8 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


WAYS = {
    "plain": {},
    "sqrt": {"checkpoint": "sqrt"},
    "3 snapshots": {"checkpoint": 3},
    "mixed": {"mixed_mode": True},
    "mixed, sqrt": {"mixed_mode": True, "checkpoint": "sqrt"},
}


@pytest.mark.parametrize(
    ("order", "way"),
    [("second", w) for w in WAYS] + [("first", w) for w in WAYS if "mixed" not in w],
)
@pytest.mark.parametrize("meta_loss", ["sum", "val"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adam_eps1e-3"])
def test_meta_gradient_equals_the_reference(name, meta_loss, order, way):
    def meta(params, lr):
        run = run_of(name, params, lr, first_order=order == "first", **WAYS[way])
        return run.losses.sum() if meta_loss == "sum" else loss(run.params, VALIDATION)

    params, lr = tree("p0"), rates_of(name)
    by_params, by_lr = torch.func.grad(meta, argnums=(0, 1))(params, lr)
    close(by_params, tree(f"{name}/{meta_loss}/{order}/grad_p0"))
    close(by_lr, tree(f"{name}/{meta_loss}/{order}/grad_lr"))


@pytest.mark.parametrize("name", ["sgd", "adam", "adam_eps1e-3"])
def test_inner_training_equals_the_reference(name):
    run = run_of(name, tree("p0"), rates_of(name))
    torch.testing.assert_close(run.losses, array(f"{name}/inner_losses"), rtol=1e-10, atol=0)
    close(run.params, tree(f"{name}/p_final"))
    validation = loss(run.params, VALIDATION)
    torch.testing.assert_close(validation, array(f"{name}/val_loss"), rtol=1e-10, atol=0)
