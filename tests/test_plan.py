"""`plan_memory` says within 20 % what an unroll holds, counted tensor by tensor."""

import pytest
import torch

import fmeta
from fmeta import trees
from fmeta._live_bytes import LiveBytes
from fmeta._plan import _EACH
from fmeta.random import fold_in

T = 14
CHOICES = [
    {},
    {"recompute": "both"},
    {"mixed_mode": True},
    {"checkpoint": "sqrt"},
    {"checkpoint": "sqrt", "recompute": "both"},
    {"checkpoint": "sqrt", "mixed_mode": "keep_gradients"},
    {"checkpoint": 5},
    {"checkpoint": 5, "mixed_mode": "keep_gradients"},
    {"first_order": True, "checkpoint": "sqrt"},
]
RULES = {
    "linear": fmeta.optimizers.linear(lr=0.01),
    "normalized_mlp": fmeta.optimizers.normalized_mlp(lr=0.01),
}


def problem():
    net = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(), torch.nn.Linear(48, 10))
    for i, p in enumerate(net.parameters()):
        p.data = 0.2 * torch.randn(p.shape, generator=fold_in(1, i))
    apply, params, buffers = fmeta.functionalize(net)
    batches = (
        torch.randn(T, 40, 32, generator=fold_in(2)),
        torch.randint(10, (T, 40), generator=fold_in(3)),
    )
    loss = lambda p, b: torch.nn.functional.cross_entropy(apply(p, buffers, b[0]), b[1])
    return loss, params, batches


def measured(rule, loss, params, batches, options):
    theta = trees.map(lambda x: x.clone().requires_grad_(), rule.init())
    with LiveBytes() as live:
        run = fmeta.unroll(rule, loss, theta, params, batches, **options)
        run.losses.mean().backward()
    return live


@pytest.mark.parametrize("name", RULES)
def test_it_predicts_what_is_held_within_a_fifth(name):
    loss, params, batches = problem()
    rule = RULES[name]
    # Of the larger rule a few, for counting takes long.
    choices = CHOICES if name == "linear" else [CHOICES[1], CHOICES[4]]
    plan = fmeta.plan_memory(rule, loss, rule.init(), params, batches, choices=choices)
    for found in plan.choices:
        live = measured(rule, loss, params, batches, found.options)
        assert abs(found.bytes - live.peak) < 0.2 * live.peak, (found.options, live.peak)
        tensors = found.bookkeeping / _EACH
        assert abs(tensors - live.most) < 0.2 * live.most, (found.options, tensors, live.most)


def test_it_prints_a_table_and_picks_what_fits():
    loss, params, batches = problem()
    rule = RULES["linear"]
    plan = fmeta.plan_memory(rule, loss, rule.init(), params, batches, choices=CHOICES[:4])
    assert "forward passes" in str(plan)
    assert len(str(plan).splitlines()) == 4 + 2
    whole = plan.choices[0].bytes
    assert plan.within(whole)[0].forward_passes <= plan.within(whole)[-1].forward_passes
    assert not plan.within(1)
    assert all(c.bytes <= whole / 2 for c in plan.within(whole / 2))


def test_longer_ones_can_be_planned_from_a_few_batches():
    loss, params, batches = problem()
    rule = RULES["linear"]
    few = tuple(b[:2] for b in batches)
    plan = fmeta.plan_memory(rule, loss, rule.init(), params, few, horizon=T, choices=[{}])
    held = measured(rule, loss, params, batches, {}).peak
    assert abs(plan.choices[0].bytes - held) < 0.2 * held


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": [{"chekpoint": 2}]}, "unknown option 'chekpoint'"),
        ({"choices": []}, "choices is empty"),
        ({"wrt": "losses"}, "wrt must be one of"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options, message):
    loss, params, batches = problem()
    rule = RULES["linear"]
    with pytest.raises(ValueError, match=message):
        fmeta.plan_memory(rule, loss, rule.init(), params, batches, **options)
