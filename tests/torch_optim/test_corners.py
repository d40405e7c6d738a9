"""Corners of the adapter: what changes in mid-training, is copied, renamed, fails or is shared."""

import copy

import pytest
import torch
from torch import nn

import fmeta
from fmeta import optimizers
from fmeta.optimizer import Hidden, Optimizer
from fmeta.random import fold_in
from fmeta.torch_optim import LearnedOptimizer, _advance

BIG = ["mlp", "adafactor_mlp", "normalized_mlp"]


def big(rule, count=2):
    params = [nn.Parameter(torch.randn(400, 300, generator=fold_in(3, i))) for i in range(count)]
    return params, LearnedOptimizer(params, rule)


def grads(params, t, without=()):
    for i, p in enumerate(params):
        p.grad = None if i in without else torch.randn(p.shape, generator=fold_in(4, t, i))


@pytest.mark.parametrize("rule", BIG)
def test_a_snapshot_stays_when_some_parameters_pause(rule):
    params, opt = big(rule)
    grads(params, 0)
    opt.step()
    held = opt.state_dict()
    before = copy.deepcopy(held["state"])
    for t, without in ((1, (1,)), (2, ()), (3, ())):
        grads(params, t, without)
        opt.step()
    for i, state in before.items():
        assert all(torch.equal(x, held["state"][i][k]) for k, x in state.items())


@pytest.mark.parametrize("rule", BIG)
def test_memory_is_used_again_from_step_to_step(rule):
    params, opt = big(rule, 1)
    found = []
    for t in range(4):
        grads(params, t)
        opt.step()
        found.append(opt.state[params[0]]["m0"].data_ptr())
    assert len(set(found)) == 1


def test_a_step_that_fails_while_it_writes_cannot_be_repeated():
    calls = [0]
    base = optimizers.normalized_mlp()

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError("no memory left")
        return base.update(*args, **kwargs)

    def update(*args, **kwargs):
        return base.update(*args, **kwargs)

    from fmeta._leafwise import consuming

    consuming(update, failing)
    p = nn.Parameter(torch.ones(20, 20))
    opt = LearnedOptimizer([p], base._replace(update=update))
    p.grad = torch.ones_like(p)
    opt.step()
    opt.step()
    saved = opt.state_dict()  # what follows has memory of its own, so it can be repeated
    opt.step()
    calls[0] = 1
    with pytest.raises(MemoryError):
        opt.step()
    with pytest.raises(RuntimeError, match=r"begun to write over.*hidden state: load"):
        opt.step()
    opt.load_state_dict(saved)
    opt.step()


def interrupted(monkeypatch, opt, moment):
    """A step that ends with Ctrl-C: before anything is written, or when parameters have moved."""
    plain = _advance.move

    def move(*args):
        if moment == "moved":
            plain(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_advance, "move", move)
        with pytest.raises(KeyboardInterrupt):
            opt.step()


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["plain", "in place"])
def test_an_interrupted_step_is_told_where_it_left_half_of_it(options, monkeypatch):
    base = optimizers.adam()
    rule = base._replace(update=lambda *args, **given: base.update(*args, **given))
    p = nn.Parameter(torch.ones(3))
    opt = LearnedOptimizer([p], rule, **options)
    p.grad = torch.ones_like(p)
    opt.step()
    if not options:  # in place the state is written first
        interrupted(monkeypatch, opt, "before")
        opt.step()
        assert opt.state[p]["count"] == 2
    interrupted(monkeypatch, opt, "before" if options else "moved")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"begun to write over parameters.*go on with"):
            opt.step()
    copied = copy.deepcopy((p, opt))
    for q, other in ((p, opt), copied):
        q.grad = torch.ones_like(q)
        with pytest.raises(RuntimeError, match="begun to write"):
            other.step()
        other.load_state_dict(other.state_dict())
        other.step()


def test_a_rule_without_state_has_nothing_to_be_half_written(monkeypatch):
    p = nn.Parameter(torch.ones(3))
    opt = LearnedOptimizer([p], "sgd")
    p.grad = torch.ones_like(p)
    opt.step()
    interrupted(monkeypatch, opt, "before")
    opt.step()


def test_a_learning_rate_that_is_none_changes_nothing():
    params, opt = big("mlp", 1)
    grads(params, 0)
    opt.step()
    before = {k: x.clone() for k, x in opt.state[params[0]].items()}
    opt.param_groups[0]["lr"] = None
    with pytest.raises(TypeError, match=r"group\['lr'\] must be a number"):
        opt.step()
    assert all(torch.equal(x, opt.state[params[0]][k]) for k, x in before.items())
    opt.param_groups[0]["lr"] = 1.0
    opt.step()


def test_a_copy_trains_itself_though_there_is_a_scheduler(kit):
    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), "adam", lr=10.0)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2)
    kit.train(model, opt, 0, 1, scheduler)
    twin, copied = copy.deepcopy((model, opt))
    before = [p.clone() for p in model.parameters()]
    kit.train(twin, copied, 1, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not kit.same(model, twin)
    kit.train(model, opt, 1, 2)
    assert kit.same(model, twin)


TWO = fmeta.partition(
    {"slow": optimizers.sgd(0.001), "fast": optimizers.sgd(0.1)},
    lambda path, p: "slow" if "emb" in path else "fast",
)


def two(names):
    params = {n: nn.Parameter(torch.zeros(2)) for n in names}
    return params, LearnedOptimizer(list(params.items()), TWO)


def moved(params, opt):
    before = {n: p.detach().clone() for n, p in params.items()}
    for p in params.values():
        p.grad = torch.ones_like(p)
    opt.step()
    return {n: round((p.detach() - before[n]).abs().max().item(), 6) for n, p in params.items()}


@pytest.mark.parametrize("saved", [("module.emb", "module.head"), ("head", "emb"), ("emb", "head")])
def test_parameters_keep_their_own_names_when_a_state_is_loaded(saved):
    _, other = two(saved)
    params, opt = two(("emb", "head"))
    moved(params, opt)
    opt.load_state_dict(other.state_dict())
    assert moved(params, opt) == {"emb": 0.001, "head": 0.1}
    assert opt.param_groups[0]["param_names"] == ["emb", "head"]


def test_a_state_goes_to_the_parameter_of_its_name():
    def build(names):
        params = {n: nn.Parameter(torch.zeros(2)) for n in names}
        return params, LearnedOptimizer(list(params.items()), "adam")

    params, opt = build("ab")
    for i, p in enumerate(params.values()):
        p.grad = torch.full_like(p, float(i + 1))
    opt.step()
    swapped, again = build("ba")
    again.load_state_dict(opt.state_dict())
    for n in "ab":
        assert torch.equal(again.state[swapped[n]]["m"], opt.state[params[n]]["m"])


@pytest.mark.parametrize("pair", [("adam", "lamb"), ("adam", "nadamw"), ("adamw", "adam")])
def test_the_state_of_another_rule_is_refused_by_name(pair, kit):
    model = kit.net()
    first, second = (LearnedOptimizer(model.parameters(), rule) for rule in pair)
    with pytest.raises(ValueError, match=f"rule {pair[0]}, but the optimizer is {pair[1]}"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("how", ["capturable", "compile"])
@pytest.mark.parametrize("key", ["hist", "delta"])
def test_a_new_state_may_be_a_view_of_the_old_one(how, key):
    """A rule that steps along the gradient of three steps before."""

    class Late:
        init = staticmethod(lambda generator: {})

        @staticmethod
        def init_hidden(th, p):
            return {"hist": p.new_zeros(3, *p.shape), "last": torch.zeros_like(p)}

        @staticmethod
        def update(th, p, g, h):
            new = {"hist": torch.cat([h["hist"][1:], g[None]]), "last": h["hist"][0]}
            return (-h["hist"][0] if key == "delta" else -h["last"]), new

    def trained(**options):
        w = nn.Parameter(torch.zeros(2))
        opt = LearnedOptimizer([w], fmeta.tensorwise(Late), **options)
        path = []
        for t in range(8):
            w.grad = torch.full_like(w, float(t + 1))
            opt.step()
            path.append(w[0].item())
        return path

    more = {"capturable": True} if how == "capturable" else {"compile": {"backend": "eager"}}
    assert trained(**more) == trained()
    torch.compiler.reset()


def test_a_gradient_that_becomes_a_state_is_copied_whenever_that_happens():
    class Keeps:
        init = staticmethod(lambda generator: {})
        init_hidden = staticmethod(lambda th, p: {"g": torch.zeros_like(p)})
        update = staticmethod(lambda th, p, g, h: (-h["g"], {"g": g.contiguous()}))

    w = nn.Parameter(torch.zeros(3, 2))
    opt = LearnedOptimizer([w], fmeta.tensorwise(Keeps))
    w.grad = torch.ones(2, 3).T
    opt.step()
    w.grad = torch.ones(3, 2)
    opt.step()
    w.grad.zero_()
    assert torch.equal(opt.state[w]["g"], torch.ones(3, 2))


def test_a_loss_that_is_used_again_is_copied():
    rule = Optimizer(
        lambda generator=None: {},
        lambda th, p, *, num_steps=None: Hidden([{} for _ in p], {"loss": torch.zeros(())}),
        lambda th, p, g, h, *, loss=None, extras=None: (
            [-h.shared["loss"] * x for x in g],
            Hidden(h.leaves, {"loss": loss}),
        ),
        frozenset({"loss"}),
    )
    w, loss = nn.Parameter(torch.zeros(())), torch.tensor(1.0)
    opt = LearnedOptimizer([w], rule)
    for value in (1.0, 2.0, 3.0):
        w.grad = torch.ones(())
        opt.step(loss=loss.fill_(value))
    assert w.item() == -(0 + 1 + 2)


def test_a_group_that_the_rule_refuses_leaves_the_optimizer_as_it_was():
    rule = fmeta.partition({"a": optimizers.sgd(0.1)}, lambda path, p: path)
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = LearnedOptimizer([("a", a)], rule)
    with pytest.raises(ValueError, match="path b"):
        opt.add_param_group({"params": [("b", b)]})
    a.grad = torch.ones(2)
    opt.step()
    assert len(opt.param_groups) == 1
    assert a[0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("rule", ["per_parameter_sgd", "meta_curvature"])
def test_rules_made_for_a_model_are_pickled_by_name(rule, kit):
    import pickle

    model = kit.net()
    opt = LearnedOptimizer(model.parameters(), rule)
    again = pickle.loads(pickle.dumps((model, opt)))
    kit.train(model, opt, 0, 2)
    kit.train(*again, 0, 2)
    assert kit.same(model, again[0])


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_a_step_that_asks_for_the_state_advances_nothing(compile):
    w = nn.Parameter(torch.ones(2))
    opt = LearnedOptimizer([w], "adam", lr=0.0, compile=compile)
    w.grad = torch.zeros(2)
    opt.step()
    assert int(opt.state[w]["count"]) == 0


def test_climbing_turns_the_loss_round_too():
    def trained(sign, maximize):
        w = nn.Parameter(torch.tensor([1.0, -2.0]))
        opt = LearnedOptimizer([w], "velo", num_steps=9, maximize=maximize, lr=100.0)
        for _ in range(5):
            opt.zero_grad()
            loss = sign * (w - 0.5).square().sum()
            loss.backward()
            opt.step(loss=loss)
        return w

    assert torch.equal(trained(1.0, False), trained(-1.0, True))
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "maximize": True}]
    opt = LearnedOptimizer(groups, "velo", num_steps=9)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="some groups maximize"):
        opt.step(loss=1.0)


KEEP = {
    "master_weights": fmeta.master_weights(optimizers.sgd(0.1)),
    "lookahead": fmeta.lookahead(optimizers.sgd(0.1)),
    "schedule_free_adamw": optimizers.schedule_free_adamw(0.1),
    "in a chain": fmeta.chain(fmeta.clip_by_value(1.0), fmeta.master_weights(optimizers.sgd(0.1))),
    "in a partition": fmeta.partition(
        {"x": fmeta.lookahead(optimizers.sgd(0.1))}, lambda path, p: "x"
    ),
    "averaged": fmeta.averaged(fmeta.master_weights(optimizers.sgd(0.1))),
}


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.parametrize("options", [{"lr": 0.5}, {"weight_decay": 0.1}], ids=str)
def test_a_rate_that_would_not_reach_a_rule_s_own_parameters_is_refused(name, options):
    w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    opt = LearnedOptimizer([w], KEEP[name], **options)
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match=r"leave (lr at 1|weight_decay at 0)"):
        opt.step()
    for wrap in (
        lambda rule: fmeta.scheduled(rule, lambda t, n: 0.5),
        lambda rule: fmeta.with_weight_decay(rule, 0.1),
    ):
        with pytest.raises(ValueError, match="put it inside"):
            wrap(KEEP[name])
