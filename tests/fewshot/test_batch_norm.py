"""What adapted networks normalise by is an argument, and holds."""

import pytest
import torch

from fmeta import fewshot
from fmeta.random import fold_in


def episodes():
    images = torch.rand(4, 8, 8, 8, generator=fold_in(1))
    source = fewshot.from_classes({"train": images}, ways=3, shots=2, queries=3)
    return fewshot.draw(source, [(0, 0)])


def learner(builder, policy):
    if builder is fewshot.protonet:
        return builder(fewshot.conv4(None, side=8, channels=4, blocks=2), 3, batch_norm=policy)
    if builder is fewshot.snail:
        return builder(
            fewshot.conv4(None, side=8, channels=4, blocks=2), 3, 6, filters=4, batch_norm=policy
        )
    return builder(fewshot.conv4(3, side=8, channels=4, blocks=2), batch_norm=policy)


@pytest.mark.parametrize("builder", [fewshot.maml, fewshot.anil, fewshot.protonet, fewshot.snail])
@pytest.mark.parametrize("policy", ["transductive", "support"])
def test_only_transductive_predictions_depend_on_what_else_is_asked(builder, policy):
    found = learner(builder, policy)
    support, query = (fewshot.Examples(e.x[0], e.y[0]) for e in episodes()[:2])
    adapted = found.adapt(found.init(), support)
    together = found.predict(adapted, query.x)
    alone = torch.cat([found.predict(adapted, x[None]) for x in query.x])
    same = torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert same == (policy == "support")


def test_statistics_of_the_support_set_are_those_at_the_adapted_parameters():
    model = fewshot.conv4(3, side=8, channels=4, blocks=2)
    found = fewshot.maml(model, batch_norm="support")
    support = fewshot.Examples(*(t[0] for t in episodes().support))
    adapted = found.adapt(found.init(), support)
    by_own = model.apply(adapted.params, support.x)[0]
    torch.testing.assert_close(found.predict(adapted, support.x), by_own)


def test_a_module_with_running_statistics_normalises_by_the_batch():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = fewshot.maml(net)
    found.estimate(found.init(), episodes())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="transductive, support"):
        fewshot.maml(torch.nn.Linear(2, 2), batch_norm="running")
