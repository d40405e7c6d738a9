"""`check_optimizer`: what it accepts, what it reports, and what it refuses."""

import inspect
import subprocess
import sys

import pytest
import torch

import fmeta.testing
from fmeta import trees
from fmeta.optimizer import Optimizer, optimizer_from_step
from fmeta.optimizers import per_parameter_sgd, sgd
from fmeta.testing import LAWS, built_in_trees, check_optimizer

QUICK = ("inputs_unchanged", "kinds_kept", "needs_enforced", "vmap_equals_loop")


def descend(th, p, g, h, loss=None, extras=None):
    """Normalised by the loss, with injected noise and a horizon: any pytree as hidden state."""
    _, t, horizon = h
    noise = 0.0 if extras is None else extras["noise"].mean()

    def one(p, g):
        c = trees.compute_dtype(p)
        factor = (th["lr"] * (1 - t / horizon) * (loss + noise)).to(c)
        return p.to(c) - factor * g.to(c)

    return trees.map(one, p, g), [h[0], t + 1, horizon]


def start(th, p, num_steps=None):
    if num_steps is None:
        raise ValueError("give num_steps")
    device = trees.common_device(p)
    return [(), torch.zeros((), device=device), torch.full((), float(num_steps), device=device)]


RULE = optimizer_from_step(
    lambda g: {"lr": torch.tensor(0.1)},
    start,
    descend,
    needs=frozenset({"loss", "num_steps", "noise"}),
)
NOISE = {"noise": torch.tensor([0.1, 0.2])}


def test_a_hand_written_rule_with_any_hidden_state_and_every_need():
    report = check_optimizer(
        RULE,
        equivariance="coordinate",
        extras=NOISE,
        exclude=["compiles_once"],
        param_trees=built_in_trees(),
    )
    assert set(report.not_run) == {"none_gradients_skip", "compiles_once"}
    assert "is a list, not an fmeta.Hidden" in report.not_run["none_gradients_skip"]
    assert set(report.held) | set(report.not_run) == set(LAWS)


def test_extras_may_depend_on_the_parameters():
    seen = []

    def extras(params):
        seen.append(len(trees.leaves(params)))
        return NOISE

    check_optimizer(RULE, extras=extras, laws=["needs_enforced"], param_trees=built_in_trees())
    assert set(seen) == {3, 13}


def momentum_on_flat_dicts(th, p, g, h, *, loss=None, extras=None):
    m = {k: 0.9 * h["m"][k] + g[k] for k in p}
    return {k: -th["lr"] * m[k] for k in p}, {"m": m, "t": h["t"] + 1}


def test_a_rule_written_for_flat_dicts_passes_and_is_told_what_was_left_out():
    rule = fmeta.Optimizer(
        lambda generator=None: {"lr": torch.tensor(0.1)},
        lambda th, p, *, num_steps=None: {
            "m": {k: torch.zeros_like(v) for k, v in p.items()},
            "t": torch.zeros(()),
        },
        momentum_on_flat_dicts,
    )
    report = check_optimizer(rule, exclude=["compiles_once"])
    assert set(report.held["kinds_kept"]) == {"small"}
    assert "param_trees=fmeta.testing.built_in_trees()" in report.not_run["tree 'nested'"]


def test_a_rule_that_reads_gradients_all_the_same_is_caught():
    false = fmeta.optimizers.sgd(0.1)._replace(reads_grads=False)
    with pytest.raises(AssertionError, match=r"law needs_enforced: .*though reads_grads=False"):
        check_optimizer(false, laws=["needs_enforced"])
    still = fmeta.optimizers.sgd(0.0)._replace(reads_grads=False)
    assert check_optimizer(still, laws=["needs_enforced"]).held


def test_missing_extras_are_asked_for():
    with pytest.raises(AssertionError, match=r"extras=\{'noise': ...\}.*parameter tree 'small'"):
        check_optimizer(RULE, laws=["needs_enforced"])


def test_the_report_accounts_for_every_law():
    report = check_optimizer(sgd(0.1), laws=QUICK, exclude=["kinds_kept"])
    assert report.held == {
        name: ("small", "nested") for name in LAWS if name in QUICK and name != "kinds_kept"
    }
    assert report.not_run["kinds_kept"] == "excluded"
    assert report.not_run["deterministic"] == "not among `laws`"
    assert set(report.held) | set(report.not_run) == set(LAWS)
    assert (
        "no equivariance was stated"
        in check_optimizer(sgd(0.1), laws=["permutation_equivariant"]).not_run[
            "permutation_equivariant"
        ]
    )


def test_own_trees_and_optimizers_built_for_a_tree():
    own = {"mine": {"x": torch.ones(2, 2, dtype=torch.float64)}}
    report = check_optimizer(per_parameter_sgd, param_trees=own, laws=QUICK)
    assert report.held == {name: ("mine",) for name in LAWS if name in QUICK}


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"there is no law 'nonsense'; there are .*kinds_kept"):
        check_optimizer(sgd(0.1), laws=["nonsense"])
    with pytest.raises(ValueError, match="there is no law 'nonsense'"):
        check_optimizer(sgd(0.1), exclude=["nonsense"])
    with pytest.raises(ValueError, match=r"equivariance must be None or one of .*'rows'"):
        check_optimizer(sgd(0.1), equivariance="rows")
    with pytest.raises(ValueError, match="param_trees is empty"):
        check_optimizer(sgd(0.1), param_trees={})
    with pytest.raises(TypeError, match=r"laws take an fmeta.Optimizer.*got a int"):
        check_optimizer(3)
    with pytest.raises(AssertionError, match="equivariance must be one of"):
        LAWS["permutation_equivariant"].check(
            sgd(0.1), {"x": torch.ones(2)}, equivariance="nonsense"
        )


def test_an_error_inside_the_optimizer_keeps_its_cause():
    def update(*args, **kwargs):
        raise KeyError("momentum")

    bad = Optimizer(lambda generator=None: {}, lambda th, p, num_steps=None: {}, update)
    with pytest.raises(AssertionError, match="optimizer raised KeyError: 'momentum'") as caught:
        check_optimizer(bad, laws=["inputs_unchanged"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_laws_are_documented_and_public():
    for name, law in LAWS.items():
        assert getattr(fmeta.testing, name) is law.check
        assert inspect.getdoc(law.check)
    assert set(fmeta.testing.__all__) <= set(dir(fmeta.testing)) | fmeta.testing._STRATEGIES


def test_laws_work_without_hypothesis_and_strategies_name_the_cure():
    code = """
import sys
sys.modules["hypothesis"] = None
import fmeta
from fmeta.testing import check_optimizer
check_optimizer(fmeta.optimizers.sgd(0.1), laws=["inputs_unchanged"])
try:
    from fmeta.testing import param_trees
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "pip install 'fmeta[test]'" in result.stdout
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fmeta.testing.nonsense


def test_the_cause_is_named_before_its_consequences():
    def in_place(th, p, g, h, *, loss=None, extras=None):
        h["m"]["b"].mul_(0.9).add_(1.0)
        return {k: -h["m"]["b"].sum() * g[k] for k in p}, h

    edits = fmeta.Optimizer(
        lambda generator=None: {},
        lambda th, p, *, num_steps=None: {"m": {"b": torch.zeros_like(p["b"])}},
        in_place,
    )
    with pytest.raises(
        AssertionError, match="law inputs_unchanged: update changed its argument hidden"
    ):
        check_optimizer(edits)
    draws = fmeta.Optimizer(
        lambda generator=None: {},
        lambda th, p, *, num_steps=None: {},
        lambda th, p, g, h, **k: ({n: torch.randn_like(x) * g[n] for n, x in p.items()}, h),
    )
    with pytest.raises(AssertionError, match="law deterministic"):
        check_optimizer(draws)
