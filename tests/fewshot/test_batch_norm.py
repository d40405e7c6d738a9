"""What adapted networks normalise by is an argument, and holds."""

import pytest
import torch

from fmeta import fewshot
from fmeta.fewshot._model import as_model
from fmeta.random import fold_in

from . import kit

SOURCE = fewshot.from_classes(
    {"train": torch.rand(4, 8, 8, 8, generator=fold_in(1))}, ways=3, shots=2, queries=3
)


def episodes():
    return fewshot.draw(SOURCE, [(0, 0)])


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


def module(outputs=3):
    """Normalisations of both kinds, one without scale and shift, one used twice."""
    twice = torch.nn.BatchNorm1d(6)
    parts = [
        torch.nn.Unflatten(-2, (1, 8)),
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4, affine=False),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 6),
        twice,
        torch.nn.Tanh(),
        twice,
        torch.nn.Linear(6, outputs),
    ]
    return kit.seeded(torch.nn.Sequential(*parts))


OF_MODULES = {
    "maml": lambda policy: fewshot.maml(module(), batch_norm=policy),
    "anil": lambda policy: fewshot.anil(module(), batch_norm=policy),
    "meta_sgd": lambda policy: fewshot.meta_sgd(module(), batch_norm=policy),
    "maml_plus_plus": lambda policy: fewshot.maml_plus_plus(module(), batch_norm=policy),
    "reptile": lambda policy: fewshot.reptile(module(), batch_norm=policy),
    "imaml": lambda policy: fewshot.imaml(module(), batch_norm=policy),
    "llama": lambda policy: fewshot.llama(module(), batch_norm=policy),
    "protonet": lambda policy: fewshot.protonet(module(), 3, batch_norm=policy),
    "snail": lambda policy: fewshot.snail(
        module(5), 3, 6, num_features=5, filters=4, attends=((4, 3),) * 2, batch_norm=policy
    ),
    "fine_tune": lambda policy: fewshot.fine_tune(
        module(5), 3, 4, num_features=5, num_steps=3, batch_norm=policy
    ),
}


@pytest.mark.parametrize("name", OF_MODULES)
def test_modules_with_batch_norm_follow_the_policy(name):
    """Transductive predictions depend on what else is asked; those by the support set do not."""
    support, query = (fewshot.Examples(e.x[0], e.y[0]) for e in episodes()[:2])
    for policy in ("transductive", "support"):
        found = OF_MODULES[name](policy)
        adapted = found.adapt(found.init(), support)
        together = found.predict(adapted, query.x)
        pairs = torch.cat([found.predict(adapted, x) for x in query.x.split(3)])
        same = torch.allclose(together, pairs, rtol=1e-4, atol=1e-5)
        assert same == (policy == "support")


@pytest.mark.parametrize("name", OF_MODULES)
def test_the_policy_of_modules_holds_in_estimates_too(name):
    """Also under `vmap`: what a query set is judged by is no mean over it."""
    batch = episodes()
    found = OF_MODULES[name]("support")
    meta_params = found.init()
    adapted = found.adapt(meta_params, fewshot.Examples(*(t[0] for t in batch.support)))
    outputs = torch.cat([found.predict(adapted, x) for x in batch.query.x[0].split(3)])
    want = (outputs.argmax(-1) == batch.query.y[0]).float().mean()
    if name != "fine_tune":  # which is trained by classifying all classes
        got = found.estimate(meta_params, batch).metrics["accuracy"][0]
        torch.testing.assert_close(got, want)
    scores = fewshot.evaluate(
        found, meta_params, SOURCE, split="train", num_episodes=3, batch_size=3
    )
    alone = fewshot.evaluate(
        found, meta_params, SOURCE, split="train", num_episodes=3, batch_size=1
    )
    torch.testing.assert_close(scores.losses, alone.losses, rtol=1e-4, atol=1e-5)


def test_explicit_statistics_are_those_of_torch():
    net = module()
    plain, shown = as_model(net), as_model(net, "support")
    x = episodes().support.x[0]
    params = plain.init(fold_in(0))
    outputs, stats = shown.apply(params, x)
    torch.testing.assert_close(outputs, plain.apply(params, x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shown.apply(params, x, stats)[0], outputs)
    assert len(stats) == 3
    assert list(shown.init(fold_in(0))) == list(params)
    assert all(isinstance(m, torch.nn.BatchNorm1d) for m in (net[6], net[8]))
