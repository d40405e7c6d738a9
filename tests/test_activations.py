"""Activations of a module as a pure function: right, composable, and the module untouched."""

import copy

import pytest
import torch
from functorch import make_fx
from torch import nn
from torch.func import grad, jvp, vmap

import fmeta
from fmeta.functional import activations, layer_activity
from fmeta.random import fold_in


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    for i, p in enumerate(net.parameters()):
        p.data = torch.randn(p.shape, generator=fold_in(i), dtype=torch.float64)
    return net


X = torch.randn(5, 3, generator=fold_in(20), dtype=torch.float64)


def by_hand(p, x):
    a = torch.nn.functional.linear(x, p["0.weight"], p["0.bias"])
    h = torch.tanh(a)
    b = torch.nn.functional.linear(h, p["2.0.weight"], p["2.0.bias"])
    c = torch.nn.functional.linear(b, p["2.1.weight"], p["2.1.bias"])
    return {"0": (x, a), "2.0": (h, b), "2.1": (b, c)}


def close(got, want):
    for a, b in zip(fmeta.trees.leaves(got), fmeta.trees.leaves(want), strict=True):
        torch.testing.assert_close(a, b)


def params_of(net):
    return fmeta.functionalize(net)[1]


def test_inputs_and_outputs_are_those_of_the_layers_in_order():
    net = network()
    seen = activations(net)(params_of(net), {}, X)
    assert list(seen) == ["0", "2.0", "2.1"]
    close(seen, by_hand(params_of(net), X))
    other = {k: 2 * p for k, p in params_of(net).items()}
    close(activations(net)(other, {}, X), by_hand(other, X))  # not the module's own weights


def test_names_and_types_choose():
    net, p = network(), params_of(network())
    assert list(activations(net, ["2", "1"])(p, {}, X)) == ["1", "2"]
    assert list(activations(net, types=(nn.Tanh,))(p, {}, X)) == ["1"]
    whole = activations(net, [""])(p, {}, X)
    close(whole[""], (X, net(X).detach()))


def test_it_composes_with_transforms():
    net = network()
    record, p = activations(net), params_of(net)
    total = lambda f: lambda p, x: sum((a * b.mean()).sum() for a, b in f(p, x).values())
    mine, theirs = total(lambda p, x: record(p, {}, x)), total(by_hand)
    close(grad(mine)(p, X), grad(theirs)(p, X))
    directions = {k: torch.ones_like(v) for k, v in p.items()}
    push = lambda f: jvp(lambda p: grad(f)(p, X), (p,), (directions,))[1]
    close(push(mine), push(theirs))
    many = {k: torch.stack([v, -v, 2 * v]) for k, v in p.items()}
    close(vmap(grad(mine), (0, None))(many, X), vmap(grad(theirs), (0, None))(many, X))
    traced = make_fx(lambda p, x: record(p, {}, x))(p, X)
    close(traced(directions, 2 * X), by_hand(directions, 2 * X))


def test_the_module_is_left_alone_also_after_an_error():
    net = network()
    before = copy.deepcopy(net.state_dict())
    record = activations(net)
    record(params_of(net), {}, X)
    with pytest.raises(RuntimeError):
        record(params_of(net), {}, X[:, :2])
    assert all(not m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    close(record(params_of(net), {}, X), by_hand(params_of(net), X))  # no hook has stayed


def test_buffers_and_later_changes_of_the_module():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    _, p, b = fmeta.functionalize(net)
    record = activations(net)
    with torch.no_grad():
        want = net[0](X.float())
        net[0].weight.zero_()
    close(record(p, b, X.float())["0"][1], want)
    with pytest.raises(ValueError, match=r"'module.1.running_mean' of shape \(4,\) missing"):
        record(p, {}, X.float())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(input=self.layer(x))


ERRORS = {
    "no module": (lambda: activations(torch.sin), TypeError, "wants a torch.nn.Module"),
    "one name": (lambda: activations(network(), "0"), TypeError, r"give \['0'\]"),
    "unknown name": (lambda: activations(network(), ["7"]), ValueError, "no submodule '7'.*'2.1'"),
    "nothing": (lambda: activations(nn.ReLU()), ValueError, "no submodule of the types Linear"),
    "called twice": (
        lambda: activations(Twice(), ["layer"])(params_of(Twice()), {}, X.float()),
        ValueError,
        "'layer' was called",
    ),
    "not called": (
        lambda: activations(Twice(), ["spare"])(params_of(Twice()), {}, X.float()),
        ValueError,
        "the forward did not call 'spare'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_recorded_says_so(case):
    call, kind, words = ERRORS[case]
    with pytest.raises(kind, match=words):
        call()


# --- activity beside parameters ------------------------------------------------------------------


def test_a_layers_activity_broadcasts_to_its_parameters():
    w, b = torch.randn(2, 3, generator=fold_in(1)), torch.randn(2, generator=fold_in(2))
    x = torch.randn(4, 5, 3, generator=fold_in(3))  # all but the last dimension are the batch
    z = x @ w.T + b
    error = torch.cos(z)
    layer = layer_activity(x, z, "w", "b", error=error)
    assert list(layer) == ["w", "b"]
    outer = (layer["w"]["inputs"] * layer["w"]["error"]).sum(0)
    close(outer, torch.einsum("tbo,tbi->oi", error, x))
    close((layer["b"]["inputs"] * layer["b"]["error"]).sum(0), error.sum((0, 1)))
    turned = layer_activity(x, z, "w", out_first=False, error=error)
    assert list(turned) == ["w"]
    close((turned["w"]["inputs"] * turned["w"]["error"]).sum(0), outer.T)
    close((layer["w"]["inputs"] * w).sum(2) + b, layer["b"]["outputs"])
    assert "error" not in layer_activity(x, z, "w")["w"]
