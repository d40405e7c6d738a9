"""A functionalized module is the module, pure: values, two derivatives, transforms, errors."""

import itertools
import pickle
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from fmeta.functional import functionalize, loss_of

D = torch.float64
# torch.func.jvp scripts its decompositions when first called; torch's own affair.
scripts = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _own_random_state():
    # Modules initialise themselves, and dropout draws, from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Call(nn.Module):
    """A user's module: `function(self, x)` with the given children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("same_scale", self.scale)

    def forward(self, x):
        hidden = self.again(torch.tanh(self.twice(self.embed(x.long().abs() % 7))))
        return self.out(hidden * self.scale) * self.same_scale


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, 6)).transpose(-3, -2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def batch_norm_with_history():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    for _ in range(3):
        net(torch.randn(6, 4, dtype=D) + 1)
    return net.eval()


def layer(**options):
    return nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, **options)


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "conv": lambda: nn.Sequential(nn.Unflatten(-1, (1, 4)), nn.Conv1d(1, 2, 3), nn.GELU()),
    "layer and group norm": lambda: nn.Sequential(
        nn.LayerNorm(4), nn.Linear(4, 4), nn.Unflatten(-1, (4, 1)), nn.GroupNorm(2, 4)
    ),
    "tied": Tied,
    "batch norm, eval": batch_norm_with_history,
    "batch norm, no running": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "spectral norm, eval": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
    "empty": nn.Tanh,
}
SEQUENCE_MODULES = {
    "attention kernel": Attend,
    "attention, train": lambda: Call(
        lambda m, x: m.net(x, x, x)[0], net=nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    "attention, eval": lambda: Call(
        lambda m, x: m.net(x, x, x, need_weights=False)[0],
        net=nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).eval(),
    ),
    "encoder layer, train": layer,
    "encoder layer, eval": lambda: layer(activation="gelu").eval(),
    "encoder, eval": lambda: nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(4)).eval(),
    "decoder, eval": lambda: Call(
        lambda m, x: m.net(x, x.flip(1)),
        net=nn.TransformerDecoderLayer(4, 2, 8, 0.5, batch_first=True).eval(),
    ),
    "encoder, padded, eval": lambda: Call(
        lambda m, x: m.net(x, src_key_padding_mask=torch.arange(3).expand(2, 3) > 1),
        net=nn.TransformerEncoder(layer(), 2).eval(),
    ),
}


def problem(name):
    x = torch.randn(2, 3, 4, dtype=D) if name in SEQUENCE_MODULES else torch.randn(6, 4, dtype=D)
    return (MODULES | SEQUENCE_MODULES)[name]().to(D), x


def agree(got, want, tol=1e-10):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def total(out):
    return (out**2).sum() + out.sin().sum()


def squares(tensors):
    return sum((t**2).sum() for t in tensors)


@scripts
@pytest.mark.parametrize("name", [*MODULES, *SEQUENCE_MODULES])
def test_values_and_two_derivatives_are_the_modules(name):
    net, x = problem(name)
    apply, params, buffers = functionalize(net)
    loss = lambda p: total(apply(p, buffers, x))
    assert list(params) == [n for n, _ in net.named_parameters()]
    assert list(buffers) == [n for n, _ in net.named_buffers()]
    assert not any(t.requires_grad for t in (*params.values(), *buffers.values()))
    agree(apply(params, buffers, x), net(x))
    if not params:
        return

    # torch's kernel switch is what makes the reference differentiable twice.
    own = list(net.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(total(net(x)), own, create_graph=True)
    second = torch.autograd.grad(squares(first), own)
    agree(list(grad(loss)(params).values()), [g.detach() for g in first])
    agree(list(grad(lambda p: squares(grad(loss)(p).values()))(params).values()), second, 1e-9)

    direction = {k: torch.randn_like(p) for k, p in params.items()}
    forward_over_reverse = jvp(grad(loss), (params,), (direction,))[1]
    inner = lambda p: sum((g * direction[k]).sum() for k, g in grad(loss)(p).items())
    agree(forward_over_reverse, grad(inner)(params), 1e-9)


@pytest.mark.parametrize("name", [n for n in (*MODULES, *SEQUENCE_MODULES) if n != "empty"])
def test_vmap_over_parameters_is_a_loop(name):
    net, x = problem(name)
    apply, params, buffers = functionalize(net)
    # Buffers are batched too: running statistics and scales are inputs like any other.
    many = lambda tree: {k: torch.stack([t, 0.9 * t]).to(t.dtype) for k, t in tree.items()}
    one = lambda tree, i: {k: t[i] for k, t in tree.items()}
    ps, bs = many(params), many(buffers)
    out = vmap(lambda p, b: apply(p, b, x))(ps, bs)
    grads = vmap(grad(lambda p, b: total(apply(p, b, x))))(ps, bs)
    for i in range(2):
        p, b = one(ps, i), one(bs, i)
        trained = {k: t.detach().requires_grad_() for k, t in p.items()}  # no inference kernels
        agree(out[i], torch.func.functional_call(net, (trained, b), (x,)))
        agree(one(grads, i), grad(lambda p, b: total(apply(p, b, x)))(p, b))


@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    batch=st.integers(1, 3),
    bias=st.booleans(),
)
def test_any_mlp_equals_its_module(widths, batch, bias):
    pairs = itertools.pairwise(widths)
    net = nn.Sequential(*[nn.Linear(a, b, bias=bias) for a, b in pairs], nn.Tanh()).double()
    x = torch.randn(batch, widths[0], dtype=D)
    apply, params, buffers = functionalize(net)
    total(net(x)).backward()
    agree(apply(params, buffers, x), net(x))
    agree(grad(lambda p: total(apply(p, buffers, x)))(params), [p.grad for p in net.parameters()])


def test_the_module_is_not_changed_and_its_changes_do_not_reach_apply():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).eval()
    x = torch.randn(2, 3)
    apply, params, buffers = functionalize(net)
    before = net(x)
    apply({k: 2 * p for k, p in params.items()}, buffers, x)
    assert torch.equal(net(x), before)
    net.train()
    with torch.no_grad():
        net[0].weight.zero_()
    assert torch.equal(apply(params, buffers, x), before)
    assert all(p.requires_grad for p in net.parameters())


def test_tied_tensors_stand_once_under_their_first_name():
    _, params, buffers = functionalize(Tied())
    assert list(params) == ["embed.weight", "twice.weight", "twice.bias", "out.bias"]
    assert list(buffers) == ["scale"]


def test_the_private_copy_holds_no_tensor_of_a_call():
    net = Tied()
    apply, params, buffers = functionalize(net)
    grad(lambda p: apply(p, buffers, torch.ones(2)).sum())(params)
    skeleton = next(
        cell.cell_contents
        for cell in apply.__closure__
        if isinstance(cell.cell_contents, nn.Module)
    )
    assert all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers()))
    assert skeleton.out.weight is skeleton.embed.weight


def test_no_global_switch_is_left_behind():
    state = lambda: (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.get_rng_state().tolist(),
    )
    net = layer().eval()
    before = state()
    apply, params, buffers = functionalize(net)
    apply(params, buffers, torch.ones(2, 3, 4))
    with pytest.raises(AssertionError, match="embedding dimension"):
        apply(params, buffers, torch.ones(2, 3, 5))
    assert state() == before


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_batch_statistics_ignore_and_keep_the_running_ones(kind, train):
    net = nn.Sequential(nn.Linear(5, 5), kind(4, affine=True, track_running_stats=True)).double()
    x = torch.randn(6, 4, 5, dtype=D)
    net(x)
    net.train(train)
    apply, params, buffers = functionalize(net, batch_norm="batch")
    kept = {k: b.clone() for k, b in buffers.items()}
    assert set(buffers) == {
        f"1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }
    ps = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    out = vmap(lambda p: apply(p, buffers, x))(ps)
    assert all(torch.equal(b, kept[k]) for k, b in buffers.items())
    net.train()
    agree(apply(params, buffers, x), net(x))
    agree(out[1], torch.func.functional_call(net, {k: p[1] for k, p in ps.items()}, (x,)))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_in_train_mode_are_refused_with_both_cures(kind):
    net = nn.Sequential(nn.Linear(2, 4), kind(4, track_running_stats=True))
    with pytest.raises(
        ValueError, match=rf"{kind.__name__} at '1'.*\.eval\(\).*batch_norm='batch'"
    ):
        functionalize(net)
    with pytest.raises(ValueError, match="batch_norm must be None or 'batch', got 'frozen'"):
        functionalize(net, batch_norm="frozen")


def count_in_place(net, x):
    net.count.add_(1)
    return x * net.weight


def count_by_assignment(net, x):
    net.count = net.count + 1
    return x * net.weight


def shrink_weight(net, x):
    with torch.no_grad():
        net.weight.mul_(0.5)
    return x * net.weight


def counter(function):
    net = Call(function)
    net.weight = nn.Parameter(torch.ones(3))
    net.register_buffer("count", torch.zeros(3))
    return net


TRANSFORMS = {
    "plain": lambda f: f,
    "grad": lambda f: grad(lambda p, b, x: f(p, b, x).sum()),
    "vmap": lambda f: lambda p, b, x: vmap(lambda s: f(p, b, s * x))(torch.ones(2)),
    "vmap of all": lambda f: (
        lambda p, b, x: vmap(f)(
            {k: v.expand(2, 3) for k, v in p.items()},
            {k: v.expand(2, 3) for k, v in b.items()},
            x[None].expand(2, 3),
        )
    ),
    "inference": lambda f: torch.inference_mode()(f),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    ("function", "match"),
    [(count_in_place, "'count' in place"), (count_by_assignment, "'count' by assignment")],
)
def test_a_buffer_changed_by_the_forward_is_an_error_and_the_callers_stays(
    function, match, transform
):
    apply, params, buffers = functionalize(counter(function))
    with pytest.raises(ValueError, match=f"{match}.*return the new value"):
        transform(apply)(params, buffers, torch.ones(3))
    assert not buffers["count"].any()


@pytest.mark.parametrize("transform", [TRANSFORMS["plain"], TRANSFORMS["grad"]])
def test_a_parameter_changed_in_place_is_an_error(transform):
    apply, params, buffers = functionalize(counter(shrink_weight))
    with pytest.raises(ValueError, match="'weight' in place"):
        transform(apply)(params, buffers, torch.ones(3))


def test_spectral_norm_in_train_mode_is_an_error():
    apply, params, buffers = functionalize(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"_u' in place.*\.eval\(\)"):
        apply(params, buffers, torch.ones(4))


@pytest.mark.parametrize("kind", ["params", "buffers"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, k: {n: v for n, v in t.items() if n != k}, r"'{}' of shape \(3,\) missing"),
        (lambda t, k: {**t, "zzz": t[k]}, "unexpected 'zzz'"),
        (lambda t, k: {**t, k: t[k][:2]}, r"'{}' has shape \(2,\), want shape \(3,\)"),
        (lambda t, k: {**t, k: None}, r"'{}' has NoneType, want shape \(3,\)"),
        (lambda t, k: list(t.values()), "must be a dict, got list"),
    ],
)
def test_wrong_tensors_are_refused_by_name(kind, change, match):
    apply, params, buffers = functionalize(nn.BatchNorm1d(3).eval())
    given = {"params": params, "buffers": buffers}
    key = {"params": "weight", "buffers": "running_mean"}[kind]
    given[kind] = change(given[kind], key)
    match = rf"{kind} of BatchNorm1d.*{match.format(key)}.*functionalize returned"
    with pytest.raises(ValueError, match=match):
        apply(given["params"], given["buffers"], torch.ones(2, 3))
    # Stacked copies fit once vmap has taken the batch off.
    ps = {k: torch.stack([p, p]) for k, p in params.items()}
    assert vmap(lambda p: apply(p, buffers, torch.ones(2, 3)))(ps).shape == (2, 2, 3)


def hidden_in_a_closure():
    net = nn.Linear(3, 3)
    net.shortcut = lambda x: net.weight @ x
    return net


def holding(value):
    net = nn.Linear(3, 3)
    net.held = value
    return net


REFUSED = {
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3)),
        ValueError,
        "LazyLinear at '0'.*run the module once",
    ),
    "max_norm": (
        lambda: nn.Embedding(4, 2, max_norm=1.0),
        ValueError,
        "at 'the top'.*max_norm=None",
    ),
    "closure": (hidden_in_a_closure, ValueError, "'shortcut' closes over the module.*a method"),
    "lock": (lambda: holding(threading.Lock()), TypeError, "could not copy a Linear.*__deepcopy__"),
    "function": (lambda: F.relu, TypeError, "wants a torch.nn.Module, got function"),
}


@pytest.mark.parametrize(("make", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pure_is_refused_with_a_cure(make, error, match):
    with pytest.raises(error, match=match):
        functionalize(make())


def test_plain_tensor_attributes_are_constants():
    weight = torch.ones(3, requires_grad=True)
    net = Call(lambda m, x: m.held * x)
    net.held = 2 * weight  # not a leaf, which copy.deepcopy alone refuses
    apply, params, buffers = functionalize(net)
    out = apply(params, buffers, torch.ones(3))
    assert torch.equal(out, torch.full((3,), 2.0))
    assert not out.requires_grad


class Add(nn.Module):
    def forward(self, params, *, buffers):
        return params + buffers


def test_keyword_arguments_may_have_any_name():
    apply, params, buffers = functionalize(Add())
    assert apply(params, buffers, params=1, buffers=2) == 3


def test_dropout_is_random_and_vmap_asks_for_a_rule():
    apply, params, buffers = functionalize(nn.Dropout(0.5))
    x = torch.ones(2, 50)
    assert not torch.equal(apply(params, buffers, x), apply(params, buffers, x))
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda row: apply(params, buffers, row))(x)
    out = vmap(lambda row: apply(params, buffers, row), randomness="same")(x)
    assert torch.equal(out[0], out[1])


def test_loss_of_is_criterion_of_apply():
    net = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3, dtype=D), torch.randint(4, (5,))
    _, params, _ = functionalize(net)
    for criterion in (F.cross_entropy, nn.CrossEntropyLoss()):
        loss_fn = loss_of(net, criterion)
        loss = F.cross_entropy(net(x), y)
        agree(loss_fn(params, (x, y)), loss)
        agree(loss_fn(params, [x, y]), loss)
        agree(
            list(grad(loss_fn)(params, (x, y)).values()),
            torch.autograd.grad(loss, net.parameters()),
        )


def test_loss_of_binds_buffers_and_passes_batch_norm_on():
    net = nn.BatchNorm1d(4).double()
    x = torch.randn(5, 4, dtype=D)
    _, params, _ = functionalize(net, batch_norm="batch")
    loss_fn = loss_of(net, F.mse_loss, batch_norm="batch")
    agree(loss_fn(params, (x, x)), F.mse_loss(net(x), x))
    with pytest.raises(ValueError, match="BatchNorm"):
        loss_of(net, F.mse_loss)


def test_loss_of_refuses_what_is_no_pair_and_no_scalar():
    net, x = nn.Linear(3, 4), torch.randn(5, 3)
    _, params, _ = functionalize(net)
    loss_fn = loss_of(net, nn.MSELoss(reduction="none"))
    with pytest.raises(ValueError, match=r"scalar tensor, got shape \(5, 4\).*reduction='mean'"):
        loss_fn(params, (x, torch.ones(5, 4)))
    with pytest.raises(ValueError, match=r"batch = \(x, y\), got a tuple of length 3"):
        loss_fn(params, (x, x, x))
    with pytest.raises(ValueError, match=r"batch = \(x, y\), got a Tensor of length 5"):
        loss_fn(params, x)
    with pytest.raises(TypeError, match="criterion must be callable, got str"):
        loss_of(net, "mse")


@pytest.mark.parametrize("name", ["mlp", "tied", "batch norm, eval"])
def test_make_fx_traces_apply_and_its_gradient(name):
    from functorch import make_fx

    net, x = problem(name)
    apply, params, buffers = functionalize(net)
    f = lambda p, b, x: grad(lambda p: total(apply(p, b, x)))(p)
    agree(make_fx(f)(params, buffers, x)(params, buffers, x), f(params, buffers, x))


@pytest.mark.parametrize("name", ["mlp", "batch norm, eval"])
def test_compile_takes_apply_as_one_graph(name):
    net, x = problem(name)
    apply, params, buffers = functionalize(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(apply, fullgraph=True, backend="eager")
        agree(compiled(params, buffers, x), net(x))


def test_the_buffers_of_a_loss_follow_the_parameters():
    net, _ = problem("batch norm, eval")
    _, params, buffers = functionalize(net)
    assert buffers
    loss_fn = loss_of(net, lambda out, y: out.square().mean() + 0 * y.sum())
    _, x = problem("batch norm, eval")
    moved = {name: p.to("meta") for name, p in params.items()}
    assert loss_fn(moved, (x.to("meta"), x.to("meta"))).is_meta
    assert not loss_fn(params, (x, x)).is_meta


def test_threads_may_share_a_function():
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 3))
    apply, params, buffers = functionalize(net)
    x = torch.ones(200, 64)
    many = [{name: (i + 1) * p for name, p in params.items()} for i in range(4)]
    want = [apply(p, buffers, x) for p in many]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: apply(many[i % 4], buffers, x), range(400)))
    assert all(torch.equal(out, want[i % 4]) for i, out in enumerate(got))


@pytest.mark.parametrize("attends", [False, True])
def test_what_a_function_holds_can_be_pickled(attends):
    """As it must be to go to other processes; each lock is anew, or the one of the process."""
    net = nn.TransformerEncoderLayer(4, 1, 8, batch_first=True) if attends else nn.Linear(4, 3)
    apply, params, buffers = functionalize(net.eval())
    cells = pickle.loads(pickle.dumps([cell.cell_contents for cell in apply.__closure__]))
    held = dict(zip(apply.__code__.co_freevars, cells, strict=True))
    own = apply.__closure__[apply.__code__.co_freevars.index("lock")].cell_contents
    assert (held["lock"] is own) is attends
    closure = tuple(types.CellType(value) for value in cells)
    again = types.FunctionType(apply.__code__, apply.__globals__, closure=closure)
    x = torch.ones(2, 5, 4)
    assert torch.equal(again(params, buffers, x), apply(params, buffers, x))
