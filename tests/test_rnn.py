"""Pure recurrent nets are torch's, and transform like any pure function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from fmeta.functional import functionalize

NETS = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm two layers, both directions": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "lstm projected": lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True),
    "lstm batch first, no bias": lambda: nn.LSTM(3, 4, batch_first=True, bias=False),
    "gru": lambda: nn.GRU(3, 4),
    "gru two layers, both directions": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "gru batch first, no bias": lambda: nn.GRU(3, 4, batch_first=True, bias=False),
    "rnn tanh": lambda: nn.RNN(3, 4, 2, bidirectional=True),
    "rnn relu, no bias": lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False),
    "rnn batch first": lambda: nn.RNN(3, 4, batch_first=True),
}
CELLS = {
    "lstm cell": lambda: nn.LSTMCell(3, 4),
    "lstm cell, no bias": lambda: nn.LSTMCell(3, 4, bias=False),
    "gru cell": lambda: nn.GRUCell(3, 4),
    "gru cell, no bias": lambda: nn.GRUCell(3, 4, bias=False),
    "rnn cell": lambda: nn.RNNCell(3, 4),
    "rnn cell relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
}


# torch.func.jvp scripts its decompositions when first called; torch's own affair.
scripts = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _own_random_state():
    # Modules initialise themselves, and dropout draws, from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(make, dtype=torch.float64):
    return make().to(dtype)


def inputs(net, batched, with_state):
    """Arguments in the form that the net takes: `(x,)` or `(x, state)`."""
    double = {"dtype": torch.float64}
    if isinstance(net, nn.RNNCellBase):
        lead = (2,) if batched else ()
        x, sizes = torch.randn(*lead, 3, **double), [(*lead, 4)] * 2
    else:
        shape = ((2, 5) if net.batch_first else (5, 2)) if batched else (5,)
        x = torch.randn(*shape, 3, **double)
        rows = net.num_layers * (2 if net.bidirectional else 1)
        middle = (2,) if batched else ()
        sizes = [(rows, *middle, net.proj_size or 4), (rows, *middle, 4)]
    state = tuple(torch.randn(size, **double) for size in sizes)
    if not isinstance(net, (nn.LSTM, nn.LSTMCell)):
        state = state[1]
    return (x, state) if with_state else (x,)


def total(out):
    return sum((leaf**2).sum() + leaf.sin().sum() for leaf in tree_leaves(out))


def agree(got, want, tol=1e-12):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def reference(net, args):
    """Loss gradients and the gradient of their squared norm, by torch's own kernels."""
    params = list(net.parameters())
    first = torch.autograd.grad(total(net(*args)), params, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), params)
    return [g.detach() for g in first], second


@pytest.mark.parametrize("with_state", [False, True], ids=["zero state", "given state"])
@pytest.mark.parametrize("batched", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("name", [*NETS, *CELLS])
def test_values_and_two_derivatives_are_torchs(name, batched, with_state):
    net = build((NETS | CELLS)[name])
    args = inputs(net, batched, with_state)
    apply, params, buffers = functionalize(net)
    out = apply(params, buffers, *args)
    want = net(*args)
    assert type(out) is type(want)
    agree(out, want)

    first = grad(lambda p: total(apply(p, buffers, *args)))
    second = grad(lambda p: sum((g**2).sum() for g in first(p).values()))
    want_first, want_second = reference(net, args)
    agree(list(first(params).values()), want_first, 1e-11)
    agree(list(second(params).values()), want_second, 1e-10)


# The module's own forward warns; the pure one does not.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", [*NETS, *CELLS])
def test_float32_agrees_to_a_millionth(name):
    net = build((NETS | CELLS)[name], torch.float32)
    x = inputs(net, True, False)[0].float()
    apply, params, buffers = functionalize(net)
    agree(apply(params, buffers, x), net(x), 1e-6)


@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    steps=st.integers(1, 4),
    batch=st.integers(1, 3),
)
def test_vmap_over_parameters_is_a_loop(kind, layers, bidirectional, batch_first, steps, batch):
    net = build(lambda: kind(2, 3, layers, bidirectional=bidirectional, batch_first=batch_first))
    x = torch.randn(steps, batch, 2, dtype=torch.float64)
    apply, params, buffers = functionalize(net)
    stack = {name: torch.stack([p, -p, 0.5 * p]) for name, p in params.items()}

    loss = lambda p, x: total(apply(p, buffers, x))
    out = vmap(lambda p: apply(p, buffers, x))(stack)
    grads = vmap(grad(loss), (0, None))(stack, x)
    for i in range(3):
        one = {name: p[i] for name, p in stack.items()}
        with torch.no_grad():
            agree([leaf[i] for leaf in tree_leaves(out)], functional_call(net, one, (x,)))
        agree({name: g[i] for name, g in grads.items()}, grad(loss)(one, x), 1e-11)


@scripts
@pytest.mark.parametrize("name", ["lstm projected", "gru", "rnn tanh", "lstm cell", "gru cell"])
def test_forward_mode_is_the_reverse_mode(name):
    net = build((NETS | CELLS)[name])
    (x,) = inputs(net, True, False)
    apply, params, buffers = functionalize(net)
    loss = lambda p: total(apply(p, buffers, x))
    direction = {key: torch.randn_like(p) for key, p in params.items()}
    tangent = jvp(loss, (params,), (direction,))[1]
    agree(tangent, sum((g * direction[k]).sum() for k, g in grad(loss)(params).items()), 1e-11)


def test_dropout_between_layers_draws_as_torch_does():
    net = build(lambda: nn.LSTM(3, 4, 3, dropout=0.5))
    (x,) = inputs(net, True, False)
    apply, params, buffers = functionalize(net)
    torch.manual_seed(7)
    got = apply(params, buffers, x)
    torch.manual_seed(7)
    agree(got, net(x))
    assert not torch.equal(got[0], apply(params, buffers, x)[0])

    apply, params, buffers = functionalize(net.eval())
    agree(apply(params, buffers, x), net(x))


def test_a_subclass_keeps_its_forward_and_gets_a_pure_super():
    class Scaled(nn.LSTM):
        def forward(self, x, hx=None):
            out, state = super().forward(x, hx)
            return 3 * out, state

    net = build(lambda: Scaled(3, 4))
    (x,) = inputs(net, True, False)
    apply, params, buffers = functionalize(net)
    agree(apply(params, buffers, x), net(x))
    stack = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    out = vmap(lambda p: apply(p, buffers, x))(stack)[0]
    agree(out[0], net(x)[0])
    assert type(net) is Scaled


def test_the_module_keeps_its_class_and_the_copy_is_still_one_for_isinstance():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x):
            assert isinstance(self.rnn, nn.LSTM)
            self.rnn.flatten_parameters()
            return self.rnn(x)

    net = build(Asks)
    x = torch.randn(2, 3, dtype=torch.float64)
    apply, params, buffers = functionalize(net)
    agree(apply(params, buffers, x), net(x))
    assert type(net.rnn) is nn.LSTM


def test_a_parametrized_weight_reaches_the_pure_net():
    net = build(lambda: nn.GRU(3, 4))
    nn.utils.parametrizations.weight_norm(net, "weight_hh_l0")
    (x,) = inputs(net, True, False)
    apply, params, buffers = functionalize(net)
    agree(apply(params, buffers, x), net(x))
    gain = "parametrizations.weight_hh_l0.original0"
    assert grad(lambda p: total(apply(p, buffers, x)))(params)[gain].abs().min() > 0


def test_what_cannot_run_says_so():
    net = nn.GRU(3, 4)
    apply, params, buffers = functionalize(net)
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    with pytest.raises(ValueError, match=r"PackedSequence.*pad_sequence and mask"):
        apply(params, buffers, packed)
    with pytest.raises(ValueError, match=r"GRU got an input of shape \(5, 2, 7\).*input_size=3"):
        apply(params, buffers, torch.randn(5, 2, 7))
    with pytest.raises(ValueError, match=r"initial state of shape \(1, 9, 4\), want \(1, 2, 4\)"):
        apply(params, buffers, torch.randn(5, 2, 3), torch.zeros(1, 9, 4))
    with pytest.raises(ValueError, match="length 0"):
        apply(params, buffers, torch.randn(0, 2, 3))
    apply, params, buffers = functionalize(nn.LSTMCell(3, 4))
    with pytest.raises(ValueError, match=r"LSTMCell got a state of shape \(5,\), want \(4,\)"):
        apply(params, buffers, torch.randn(3), (torch.zeros(5), torch.zeros(5)))
