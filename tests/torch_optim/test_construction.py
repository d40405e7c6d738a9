"""What is wrong is said when the optimizer is built, with the cure."""

import pytest
import torch

import fmeta
from fmeta import optimizers, pretrained
from fmeta.torch_optim import LearnedOptimizer


def param(*shape, **options):
    return torch.nn.Parameter(torch.ones(*shape, **options))


def custom(hidden):
    return fmeta.Optimizer(
        lambda generator=None: {},
        lambda th, params, *, num_steps=None: hidden(params),
        lambda th, params, grads, hidden, *, loss=None, extras=None: (grads, hidden),
    )


BARE = custom(lambda params: [{"m": 0 * p} for p in params])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LearnedOptimizer([], "adam"), ValueError, "empty parameter list"),
        (lambda: LearnedOptimizer(iter(()), "adam"), ValueError, "empty parameter list"),
        (lambda: LearnedOptimizer([{"params": []}], "adam"), ValueError, "no group has any param"),
        (lambda: LearnedOptimizer(param(2), "adam"), TypeError, "iterable of Tensors"),
        (
            lambda: LearnedOptimizer(torch.nn.Linear(1, 1), "adam"),
            TypeError,
            "module Linear.*named",
        ),
        (lambda: LearnedOptimizer({"w": param(2)}, "adam"), TypeError, r"a dict.*items\(\)"),
        (lambda: LearnedOptimizer({"params": [param(2)]}, "adam"), TypeError, r"\[group\]"),
        (
            lambda: LearnedOptimizer(torch.nn.LazyLinear(2).parameters(), "adam"),
            ValueError,
            "parameter 0.*lazy.*batch once",
        ),
        (lambda: LearnedOptimizer([param(2)], "adam", compile="yes"), TypeError, "a dict.*'yes'"),
        (
            lambda: LearnedOptimizer([param(2)], "adamm"),
            ValueError,
            "did you mean adam.*by its path",
        ),
        (lambda: LearnedOptimizer([param(2)], "gone/w.safetensors"), FileNotFoundError, "gone/w"),
        (lambda: LearnedOptimizer([param(2)], torch.optim.Adam), TypeError, "the name.*'adam'"),
        (
            lambda: LearnedOptimizer([param(2)], torch.optim.SGD([param(2)], 0.1)),
            TypeError,
            "torch.optim.SGD is no pure function.*'sgd'",
        ),
        (lambda: LearnedOptimizer([param(2)], optimizers.adam), TypeError, r"adam\(\.\.\.\)"),
        (
            lambda: LearnedOptimizer(
                [param(2)], fmeta.chain(fmeta.clip_by_value(1.0), fmeta.orthogonalize())
            ),
            ValueError,
            "transform of gradients.*optimizer follow",
        ),
        (
            lambda: LearnedOptimizer([param(2)], fmeta.clip_by_global_norm(1.0)),
            ValueError,
            "transform of gradients.*optimizer follow",
        ),
        (lambda: LearnedOptimizer([param(2)], 3), TypeError, "fmeta.Optimizer, got int"),
        (
            lambda: LearnedOptimizer([param(2)], "lstm", optimizers.linear().init()),
            ValueError,
            "opt_params of lstm.*path weight is not.*its init",
        ),
        (
            lambda: LearnedOptimizer([param(2)], "linear", {"weight": torch.ones(1, 3)}),
            ValueError,
            r"path weight has shape \(1, 3\)",
        ),
        (lambda: LearnedOptimizer([param(2)], "basis_mlp"), ValueError, r"num_steps=\.\.\."),
        (lambda: LearnedOptimizer([param(2)], "adam", num_steps=0), ValueError, "positive integer"),
        (lambda: LearnedOptimizer([param(2)], "adam", num_steps=2.5), ValueError, "got 2.5"),
        (lambda: LearnedOptimizer([param(2)], BARE), TypeError, r"a list.*fmeta.optimizer.Hidden"),
        (
            lambda: LearnedOptimizer([param(2)], "adam", lr=-1.0),
            ValueError,
            "Invalid learning rate: -1.0.*from 0 on",
        ),
        (
            lambda: LearnedOptimizer([param(2)], "adam", lr=float("nan")),
            ValueError,
            "Invalid learning rate: nan",
        ),
        (
            lambda: LearnedOptimizer([param(2)], "adam", lr=torch.ones(2)),
            ValueError,
            "Tensor lr must be 1-element",
        ),
        (
            lambda: LearnedOptimizer([param(2)], "adam", weight_decay=-0.1),
            ValueError,
            "weight_decay",
        ),
        (lambda: LearnedOptimizer([param(2)], "adam", fused=True), ValueError, "compile=True"),
        (
            lambda: LearnedOptimizer([param(2)], "adam", differentiable=True),
            ValueError,
            "fmeta.unroll",
        ),
        (lambda: LearnedOptimizer([param(2)], "adam", nonfinite="no"), ValueError, "'skip'"),
        (
            lambda: LearnedOptimizer([param(2, dtype=torch.complex64)], "adam"),
            TypeError,
            "parameter 0.*complex.*view_as_real",
        ),
        (
            lambda: LearnedOptimizer([("a", param(2)), ("a", param(2))], "adam"),
            ValueError,
            "two parameters have the name a",
        ),
        (lambda: LearnedOptimizer([param(2) * 1], "adam"), ValueError, "non-leaf"),
        (
            lambda: LearnedOptimizer([{"params": [param(2)], "fused": True}], "adam"),
            ValueError,
            "fused",
        ),
        (
            lambda: LearnedOptimizer(
                [{"params": [param(2)]}, {"params": [param(1)], "num_steps": 3}], "adam"
            ),
            ValueError,
            "one for the whole training",
        ),
    ],
    ids=lambda x: None if isinstance(x, type) or callable(x) else x[:24],
)
def test_errors_name_the_cure(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_label_without_optimizer_is_found_before_the_first_step():
    rule = fmeta.partition({"a": optimizers.sgd()}, lambda path, p: "b")
    with pytest.raises(ValueError, match="label_of gave 'b' for path w"):
        LearnedOptimizer([("w", param(2))], rule)


def test_a_group_without_parameters_beside_another_is_none_of_our_business():
    """So many programs make one for what is not decayed, also where everything is."""
    w = param(2)
    opt = LearnedOptimizer([{"params": [w]}, {"params": [], "weight_decay": 0.0}], "sgd")
    w.grad = torch.ones(2)
    opt.step()
    assert (w < 1).all()
    opt.load_state_dict(opt.state_dict())


def test_a_rule_from_a_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    pretrained.save(path, "linear", {"weight": torch.tensor([[-2.0, 0.0]])}, lr=0.25)
    w = param(2)
    for source in (path, str(path)):
        opt = LearnedOptimizer([w], source)
        assert opt.param_groups[0]["rule"] == str(path)
        before = w.detach().clone()
        w.grad = torch.ones(2)
        opt.step()
        th = {"weight": torch.tensor([[-2.0, 0.0]])}
        rule = optimizers.linear(lr=0.25)
        want = rule.step(th, [before], [w.grad], rule.init_hidden(th, [before]))[0][0]
        assert torch.equal(w, want)


def test_weights_are_copied():
    th = optimizers.linear(lr=0.5).init()
    w = param(2)
    opt = LearnedOptimizer([w], optimizers.linear(lr=0.5), th)
    digest = opt.param_groups[0]["weights_hash"]
    th["weight"].zero_()
    w.grad = torch.ones(2)
    opt.step()
    assert (w == 0.5).all()
    assert LearnedOptimizer([w], "linear", th).param_groups[0]["weights_hash"] != digest


def test_the_hash_depends_on_every_bit_and_on_nothing_else():
    def digest(th):
        return LearnedOptimizer([param(2)], "lstm", th).param_groups[0]["weights_hash"]

    th = optimizers.lstm().init()
    plain = digest(None)
    assert digest(th) == plain
    assert digest(dict(reversed(th.items()))) == plain
    assert digest({k: x.t().contiguous().t() for k, x in th.items()}) == plain
    flipped = {k: x.clone() for k, x in th.items()}
    bits = flipped["output.bias"].view(torch.int32)
    bits ^= 1
    assert digest(flipped) != plain
    assert digest({k: x.double() for k, x in th.items()}) != plain
    assert len(plain) == 64


def test_repr_says_what_it_is():
    opt = LearnedOptimizer([("w", param(2)), ("b", param(1))], "linear", lr=0.5)
    text = repr(opt)
    for part in (
        "LearnedOptimizer (",
        "lr: 0.5",
        "Rule linear",
        "weights: 2, hash",
        "parameters: 2",
    ):
        assert part in text


def test_integers_and_frozen_parameters_may_be_among_the_parameters():
    w = param(2)
    codes = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    opt = LearnedOptimizer([w, codes], "normalized_mlp")
    w.grad = torch.ones(2)
    opt.step()
    assert codes not in opt.state
    assert w in opt.state


def test_a_rule_that_looks_at_values_as_it_starts():
    """The structure of its state cannot be found on the meta device."""

    def start(th, params, *, num_steps=None):
        return fmeta.Hidden([{"size": p.new_tensor(p.abs().max().item())} for p in params], {})

    def update(th, params, grads, hidden, *, loss=None, extras=None):
        return [-h["size"] * g for g, h in zip(grads, hidden.leaves, strict=True)], hidden

    w = param(2)
    opt = LearnedOptimizer([w], fmeta.Optimizer(lambda generator=None: {}, start, update))
    w.grad = torch.ones(2)
    opt.step()
    assert w.tolist() == [0, 0]
    assert opt.state[w]["size"].item() == 1


def test_a_rule_that_learns_per_layer_by_its_name():
    w = param(2, 2)
    opt = LearnedOptimizer([("w", w)], "meta_curvature")
    w.grad = torch.ones(2, 2)
    opt.step()
    assert (w != 1).all()


def test_the_numbers_of_a_rule_are_its_builders():
    cure = (
        r"no betas: .*LearnedOptimizer\(params, fmeta\.optimizers\.adam\(betas=\(0\.9, 0\.95\)\)\)"
    )
    with pytest.raises(TypeError, match=cure):
        LearnedOptimizer([param(2)], "adam", betas=(0.9, 0.95))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_damaged_weights_are_named(number):
    rule = optimizers.mlp()
    th = rule.init()
    th["b1"][3] = number
    with pytest.raises(ValueError, match=r"opt_params at path b1 holds 1 numbers .* not finite"):
        LearnedOptimizer([param(2)], rule, th)


def test_weights_of_other_sizes_need_a_rule_of_these():
    with pytest.raises(ValueError, match="built with the sizes that they have"):
        LearnedOptimizer([param(2)], "mlp", optimizers.mlp(hidden_size=8).init())
