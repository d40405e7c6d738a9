"""Meta-gradients are the same after they have been recorded, in chunks, and compiled."""

import pytest
import torch

import fmeta
from fmeta import fewshot, trees
from fmeta.fewshot import _meta_batch
from fmeta.random import fold_in

from . import kit


def estimates(monkeypatch, name, episodes, **options):
    """The same estimate twice: by the learner's functions, then replayed."""
    monkeypatch.setattr(_meta_batch, "_BEFORE_RECORDING", 1)
    made = []

    class Spy(_meta_batch.Traced):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(_meta_batch, "Traced", Spy)
    learner = kit.LEARNERS[name](**options)
    meta_params = learner.init()
    found = [learner.estimate(meta_params, episodes, 0.25) for _ in range(2)]
    recorded = [replay for spy in made for replay, _ in spy.recorded.values()]
    assert recorded
    assert None not in recorded
    return learner, meta_params, found


@pytest.mark.parametrize("name", kit.LEARNERS)
def test_replayed_estimates_are_equal_bit_for_bit(monkeypatch, name):
    episodes = kit.points()[1]
    learner, meta_params, (first, second) = estimates(monkeypatch, name, episodes)
    assert all(map(torch.equal, trees.leaves(first.grads), trees.leaves(second.grads)))
    other = kit.points(seed=1)[1]
    fresh = kit.LEARNERS[name]()
    got, want = (x.estimate(meta_params, other, 0.75) for x in (learner, fresh))
    assert torch.equal(got.loss, want.loss)
    assert all(map(torch.equal, trees.leaves(got.grads), trees.leaves(want.grads)))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", ["first_order_maml", "reptile"])
def test_wrong_labels_are_told_by_what_was_recorded_too(monkeypatch, name, chunk_size):
    episodes = kit.points()[1]
    learner, meta_params, _ = estimates(monkeypatch, name, episodes, chunk_size=chunk_size)
    support = episodes.support._replace(y=episodes.support.y + 1)
    with pytest.raises(ValueError, match=r"labels y that are not from 0 to 2.*number the classes"):
        learner.estimate(meta_params, episodes._replace(support=support))


def test_meta_parameters_that_begin_as_one_tensor_part_later(monkeypatch):
    episodes = kit.points()[1]
    learner, meta_params, _ = estimates(monkeypatch, "meta_sgd", episodes)
    rate = torch.full((), 0.1, dtype=torch.float64)
    rates = trees.map(lambda x: rate.expand(x.shape), meta_params["opt_params"])
    learner.estimate({**meta_params, "opt_params": rates}, episodes)
    moved = trees.map(lambda x: x + 0.01 * x.numel(), meta_params["opt_params"])
    got, want = (
        x.estimate({**meta_params, "opt_params": moved}, episodes)
        for x in (learner, kit.LEARNERS["meta_sgd"]())
    )
    assert all(map(torch.equal, trees.leaves(got.grads), trees.leaves(want.grads)))


def test_what_was_recorded_is_not_replayed_under_autocast(monkeypatch):
    """It acts on every operation of a recording, those of the backward pass too."""
    monkeypatch.setattr(_meta_batch, "_BEFORE_RECORDING", 1)
    examples = fewshot.Examples(
        torch.randn(2, 6, 4, generator=fold_in(1)), torch.zeros(2, 6).long()
    )
    episodes = fewshot.Episode(examples, examples)

    def made():
        return fewshot.maml(kit.classifier().float())

    learner, other = made(), made()
    meta_params = learner.init()
    for _ in range(2):
        learner.estimate(meta_params, episodes)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (x.estimate(meta_params, episodes).grads for x in (learner, made()))
        for _ in range(2):
            other.estimate(meta_params, episodes)
    assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
    got, want = (x.estimate(meta_params, episodes).grads for x in (other, made()))
    assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))


def test_a_loss_that_changes_is_followed_without_recording(monkeypatch):
    monkeypatch.setattr(_meta_batch, "_BEFORE_RECORDING", 1)
    episodes, factor = kit.points(2)[1], [1.0]

    def loss(outputs, y):
        return factor[0] * torch.nn.functional.cross_entropy(outputs, y)

    learner = fewshot.maml(kit.classifier(), num_steps=1, lr=0.1, loss=loss, record=False)
    once = fewshot.maml(kit.classifier(), num_steps=1, lr=0.3, loss=loss)
    meta_params = learner.init()
    for _ in range(3):
        learner.estimate(meta_params, episodes)
    factor[0] = 3.0
    got = learner.estimate(meta_params, episodes).loss
    factor[0] = 1.0
    torch.testing.assert_close(got, 3 * once.estimate(once.init(), episodes).loss)
    with pytest.raises(ValueError, match="leave record=False out"):
        fewshot.maml(kit.classifier(), record=False, compile=True)


def test_shapes_that_are_recorded_are_not_without_end(monkeypatch):
    monkeypatch.setattr(_meta_batch, "_RECORDINGS", 2)
    monkeypatch.setattr(_meta_batch, "_BEFORE_RECORDING", 0)
    made = []

    class Spy(_meta_batch.Traced):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            made.append(self)

    monkeypatch.setattr(_meta_batch, "Traced", Spy)
    learner, plain = (
        fewshot.maml(kit.classifier(), num_steps=1, record=record) for record in (True, False)
    )
    meta_params = learner.init()
    for queries in (1, 2, 3, 4):
        episodes = kit.points(2, queries=queries)[1]
        got, want = (x.estimate(meta_params, episodes).grads for x in (learner, plain))
        assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))
    assert sum(len(spy.recorded) for spy in made) == 2


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_are_recorded_and_give_the_same(monkeypatch, chunk_size):
    episodes = kit.points(num=5)[1]
    _, _, found = estimates(monkeypatch, "maml", episodes, chunk_size=chunk_size)
    _, _, whole = estimates(monkeypatch, "maml", episodes)
    for got in found:
        for a, b in zip(trees.leaves(got.grads), trees.leaves(whole[0].grads), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("queries", "together"), [(15, 1), (14, 4)])
def test_convolutions_on_a_cpu_go_one_by_one_or_in_chunks(queries, together):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    params = dict(net.named_parameters())
    x, y = torch.zeros(32, 25, 1, 4, 4), torch.zeros(32, 25)
    query = fewshot.Examples(x[:, :queries], y[:, :queries])
    episodes = fewshot.Episode(fewshot.Examples(x, y), query)
    assert _meta_batch.how_many_together(params, episodes) == together
    assert _meta_batch.how_many_together({"w": torch.zeros(2, 2)}, episodes) == 32


def test_an_episode_alone_gives_what_it_gives_among_others():
    episodes = trees.map(
        lambda x: x.double() if x.is_floating_point() else x, kit.points(2, features=256)[1]
    )
    learner, alone = (
        fewshot.maml(fewshot.conv4(kit.WAYS, side=16, channels=4), num_steps=2, chunk_size=size)
        for size in (2, 1)
    )
    meta_params = trees.map(torch.Tensor.double, learner.init())
    for a, b in zip(
        trees.leaves(learner.estimate(meta_params, episodes)),
        trees.leaves(alone.estimate(meta_params, episodes)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_recorded_convolutions_read_their_own_episode(monkeypatch, size):
    """Episodes are parts of one tensor, at places that a recording must not keep."""
    monkeypatch.setattr(_meta_batch, "_BEFORE_RECORDING", 1)
    monkeypatch.setattr(_meta_batch, "_ALONE", 20)
    episodes = kit.points(6, shots=3, queries=4, features=256)[1]
    learner, plain = (
        fewshot.maml(
            fewshot.conv4(kit.WAYS, side=16, channels=4),
            num_steps=2,
            chunk_size=size,
            record=record,
        )
        for record in (True, False)
    )
    meta_params = trees.map(torch.Tensor.double, plain.init())
    assert _meta_batch.how_many_together(meta_params, episodes) == 1
    want = plain.estimate(meta_params, episodes)
    for _ in range(3):
        got = learner.estimate(meta_params, episodes)
        assert all(map(torch.equal, trees.leaves(got), trees.leaves(want)))


def test_autocast_gives_a_loss_of_one_dtype_alone_and_together():
    episodes = trees.map(
        lambda x: x.float() if x.is_floating_point() else x,
        kit.points(4, shots=3, queries=4, features=256)[1],
    )
    dtypes = set()
    for size in (1, 2):
        learner = fewshot.maml(fewshot.conv4(kit.WAYS, side=16, channels=4), chunk_size=size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dtypes.add(learner.estimate(learner.init(), episodes).loss.dtype)
    assert dtypes == {torch.float32}


class Noisy(torch.nn.Conv2d):
    generator = torch.Generator()

    def forward(self, x):
        x = x.unflatten(1, (1, 16, 16))
        return super().forward(x + torch.randn(x.shape, generator=self.generator)).mean((2, 3))


@pytest.mark.parametrize("size", [1, 2])
def test_noise_of_a_modules_own_generator_is_refused(monkeypatch, size):
    monkeypatch.setattr(_meta_batch, "_ALONE", 20 if size == 1 else 1000)  # of evaluate
    source, episodes = kit.points(4, shots=3, queries=4, features=256)
    learner = fewshot.maml(Noisy(1, kit.WAYS, 3).double(), num_steps=1, chunk_size=size)
    with pytest.raises(ValueError, match="draws random numbers"):
        learner.estimate(learner.init(), episodes)
    with pytest.raises(ValueError, match="draws random numbers"):
        fewshot.evaluate(learner, learner.init(), source, num_episodes=4)


@pytest.mark.slow
def test_compiled_estimates_are_equal_to_rounding():
    episodes = kit.waves()
    plain, compiled = (
        fewshot.maml(kit.regression_net(), num_steps=1, loss="mse", compile=compile)
        for compile in (False, True)
    )
    want = plain.estimate(plain.init(), episodes)
    for _ in range(2):
        got = compiled.estimate(plain.init(), episodes)
        for a, b in zip(trees.leaves(got.grads), trees.leaves(want.grads), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("at", [2, 5])
def test_meta_training_that_is_resumed_records_later_and_is_the_same(monkeypatch, tmp_path, at):
    """Interrupted before the recording, which is after three steps, and after it."""
    monkeypatch.setattr(_meta_batch, "_BEFORE_RECORDING", 3)
    source, meta_params = kit.points()[0], kit.LEARNERS["maml"]().init()

    def train(run, **options):
        stream = fewshot.estimator(kit.LEARNERS["maml"](), source, num_tasks=2)
        outer = fmeta.optimizers.adam(0.01)
        return run(
            estimator=stream, meta_params=meta_params, outer=outer, num_steps=8, **options
        ).meta_params

    def stop(metrics):
        if metrics["step"] == at:
            raise KeyboardInterrupt

    whole = train(fmeta.meta_train.run)
    with pytest.raises(KeyboardInterrupt):
        train(fmeta.meta_train.run, checkpoint_folder=tmp_path, on_step=stop)
    rest = train(fmeta.meta_train.resume, checkpoint_folder=tmp_path)
    assert all(map(torch.equal, trees.leaves(rest), trees.leaves(whole)))
