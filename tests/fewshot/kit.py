"""Small networks and episodes for the tests of few-shot learners."""

import torch
from torch import nn

from fmeta import fewshot
from fmeta.random import fold_in

WAYS = 3


def regression_net(width=8):
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
    return seeded(net)


def classifier(features=4, outputs=WAYS):
    return seeded(nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, outputs)).double())


def seeded(net):
    for i, p in enumerate(net.parameters()):
        p.data = 0.5 * torch.randn(p.shape, generator=fold_in(9, i), dtype=p.dtype)
    return net


def points(num=4, ways=WAYS, shots=2, queries=3, seed=0, features=4):
    """Stacked float64 episodes of classes that are blobs."""
    blobs = {
        split: torch.randn(8, 12, features, generator=fold_in(3, i), dtype=torch.float64)
        + 2 * torch.randn(8, 1, features, generator=fold_in(4, i), dtype=torch.float64)
        for i, split in enumerate(("train", "validation", "test"))
    }
    source = fewshot.from_classes(blobs, ways=ways, shots=shots, queries=queries)
    return source, fewshot.draw(source, [(seed, i) for i in range(num)])


def waves(num=4, shots=5, queries=4):
    episodes = fewshot.draw(fewshot.sinusoid(shots, queries), [(0, i) for i in range(num)])
    return fewshot.Episode(*(fewshot.Examples(e.x.double(), e.y.double()) for e in episodes[:2]))


def one(episodes, i):
    pairs = [fewshot.Examples(e.x[i], e.y[i]) for e in episodes[:2]]
    classes = episodes.classes
    return fewshot.Episode(*pairs, classes[i] if isinstance(classes, torch.Tensor) else ())


LEARNERS = {
    "maml": lambda **o: fewshot.maml(classifier(), num_steps=3, **o),
    "first_order_maml": lambda **o: fewshot.first_order_maml(classifier(), num_steps=3, **o),
    "anil": lambda **o: fewshot.anil(classifier(), num_steps=3, **o),
    "meta_sgd": lambda **o: fewshot.meta_sgd(classifier(), num_steps=2, **o),
    "maml_plus_plus": lambda **o: fewshot.maml_plus_plus(classifier(), num_steps=3, **o),
    "meta_lstm": lambda **o: fewshot.meta_lstm(
        classifier(), num_steps=2, hidden_size=3, first_order=False, **o
    ),
    "llama": lambda **o: fewshot.llama(classifier(), num_steps=2, **o),
    "imaml": lambda **o: fewshot.imaml(classifier(), num_steps=3, **o),
    "protonet": lambda **o: fewshot.protonet(classifier(outputs=5), WAYS, **o),
    "snail": lambda **o: fewshot.snail(
        classifier(outputs=5), WAYS, 6, num_features=5, filters=3, attends=((4, 3), (3, 2)), **o
    ),
    "fine_tune": lambda **o: fewshot.fine_tune(
        classifier(outputs=5), WAYS, 8, num_features=5, num_steps=3, **o
    ),
    "reptile": lambda **o: fewshot.reptile(classifier(), num_steps=3, **o),
}
OF_STEPS = [n for n in LEARNERS if n not in ("protonet", "snail")]
BY_GRADIENT = [n for n in LEARNERS if n not in ("reptile", "imaml")]
