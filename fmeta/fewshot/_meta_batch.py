"""From the meta-loss of one episode to the estimate of a meta-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fmeta import trees
from fmeta._autodiff import grad_and_value, inside_transform
from fmeta._guard import drawn
from fmeta._memory import keep_freed_memory
from fmeta._norms import under_vmap
from fmeta._trace import Traced
from fmeta.distributed import Share
from fmeta.estimators import Estimate
from fmeta.estimators._averages import first_bad_step, mean_over_tasks
from fmeta.estimators._contract import check_meta_params
from fmeta.fewshot._contract import Episode, check_examples
from fmeta.fewshot._losses import accuracy_of

__all__ = [
    "Seen",
    "by_gradient",
    "estimate_by",
    "how_many_together",
    "one_by_one",
    "over_episodes",
    "shown",
    "without_noise",
]

Tree = Any
# piece(meta_params, episode, progress) -> (gradient, (value, Seen)): the part of one episode.
# `progress` is a scalar tensor, or what `at` of `estimate_by` makes of it.
Piece = Callable[[Tree, Episode, Any], tuple[Tree, tuple[Tensor, "Seen"]]]

# Recording a meta-gradient takes as long as a hundred of them; the results are the same.
_BEFORE_RECORDING = 30
# Shapes of meta-batches that are recorded. Sets of many sizes would else fill the memory, at some
# megabytes each.
_RECORDINGS = 16
# Of networks that convolve on a CPU: examples of an episode from which it is worked on by itself
# (measured: 30 are as fast either way), and else support examples at once, so that what they make
# fits the caches. Networks with a parameter of four axes count as such.
_ALONE, _IN_CACHE = 40, 100
_NOISE = (
    "the network or the loss draws random numbers (dropout in train mode?), but what a learner "
    "gives must be a function of its arguments: call .eval() of the module first"
)


class Seen(NamedTuple):
    """What an episode's part in a meta-loss tells beside its value.

    Attributes:
        losses: support losses before each inner step, ``(steps,)``.
        accuracy: on the query set; NaN in regression.
    """

    losses: Tensor
    accuracy: Tensor


def shown(losses: Tensor | None, outputs: Tensor, y: Tensor) -> Seen:
    """`Seen`, of a learner's outputs on the query set; without inner steps ``losses`` is None."""
    if losses is None:
        losses = outputs.new_zeros(0)
    return Seen(losses.detach(), accuracy_of(outputs.detach(), y))


def by_gradient(meta_loss: Callable[..., tuple[Tensor, Seen]]) -> Piece:
    """The exact gradient of ``meta_loss(meta_params, episode, progress) -> (value, Seen)``."""

    def piece(meta_params: Tree, episode: Episode, progress: Any) -> Any:
        return grad_and_value(
            lambda params, episode: meta_loss(params, episode, progress), meta_params, episode
        )

    return piece


def estimate_by(
    piece: Piece,
    *,
    chunk_size: int | None = None,
    compile: bool = False,
    record: bool = True,
    at: Callable[[float], Tensor] = torch.tensor,
    check: Callable[[Episode], None] | None = None,
) -> Callable[..., Estimate]:
    """``estimate`` of a `MetaLearner`: the mean of the episodes' parts, made together by `vmap`.

    After some calls with the same shapes the operations are recorded, and replayed from then on.

    Args:
        piece: one episode's part.
        chunk_size: episodes that are worked on together; None: `how_many_together`.
        compile, record: as of `gradient_based`.
        at: makes a tensor for the piece of the part of meta-training that is over.
        check: raises what is wrong with a meta-batch.
    """

    looked_at = False  # for noise

    def together(meta_params: Tree, episodes: Episode, progress: Tensor) -> Any:
        nonlocal looked_at
        if len(episodes.support.y) > 1:
            return over_episodes(piece, (None, 0, None))(meta_params, episodes, progress)
        [found] = one_by_one(
            lambda e: piece(meta_params, e, progress), episodes, closely=not looked_at
        )
        looked_at = True
        return trees.map(lambda x: x.unsqueeze(0), found)

    def all_of_it(meta_params: Tree, episodes: Episode, progress: Tensor) -> Estimate:
        parts, rest = together(meta_params, episodes, progress)
        return _mean(parts, rest)

    if compile and not record:
        raise ValueError("compile=True compiles what was recorded: leave record=False out")
    recorded, recorded_whole = (
        Traced(
            fn,
            compile=compile,
            turned=True,
            after=0 if compile else _BEFORE_RECORDING,
            most=None if compile else _RECORDINGS,
        )
        for fn in (together, all_of_it)
    )

    def estimate(
        meta_params: Tree,
        episodes: Episode,
        progress: float = 1.0,
        *,
        share: Share | None = None,
    ) -> Estimate:
        keep_freed_memory()
        check_meta_params(meta_params)
        episodes = check_episodes(episodes)
        if check is not None:
            check(episodes)
        given = {"meta_params": meta_params, "episodes": episodes}
        trees.common_device(given, "meta-parameters and episodes", "move them to one")
        run: Callable[..., Any] = together
        whole: Callable[..., Estimate] = all_of_it
        if record and _is_plain(meta_params, episodes):
            # Which hold for one layout in memory.
            run, whole = _explained(recorded), _explained(recorded_whole)
            meta_params, episodes = trees.map(Tensor.contiguous, (meta_params, episodes))
        size = chunk_size or how_many_together(meta_params, episodes)
        chunks = _chunks(episodes, size)
        with torch.no_grad():  # nothing outside is being differentiated: plain autograd inside
            now = at(progress)
            if len(chunks) == 1 and (share is None or share.ranks.size == 1):
                return whole(meta_params, episodes, now)
            found = [run(meta_params, chunk, now) for chunk in chunks]
            parts, rest = trees.map(lambda *xs: torch.cat(xs), *found)
            return _mean(parts, rest, share)

    return estimate


def _explained(recorded: Traced) -> Callable[..., Any]:
    """The recorded function, whose errors of labels are those of the function itself."""

    def call(*args: Any) -> Any:
        try:
            return recorded(*args)
        except RuntimeError as error:
            # What is compiled tells of another error than that of the labels.
            if recorded.compile or "out of bounds" in str(error):
                recorded.fn(*args)
            raise

    return call


def _mean(parts: Tree, rest: tuple[Tensor, Seen], share: Share | None = None) -> Estimate:
    values, seen = rest
    bad = torch.full(values.shape, -1, device=values.device)
    if seen.losses.shape[1]:
        bad = first_bad_step(seen.losses.T.unsqueeze(-1))
    metrics = {"losses": seen.losses, "accuracy": seen.accuracy}
    return mean_over_tasks(values, parts, bad, metrics, share=share)


def over_episodes(fn: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """`torch.vmap`, which refuses what is random, with an error that tells the cure."""
    mapped = torch.vmap(fn, in_dims=in_dims)

    def call(*args: Any) -> Any:
        try:
            return mapped(*args)
        except RuntimeError as error:
            if "randomness" not in str(error):
                raise
            raise ValueError(_NOISE) from error

    return call


def without_noise(fn: Callable[..., Any], *, closely: bool = False) -> Callable[..., Any]:
    """``fn``, which refuses to draw random numbers where no `vmap` does so; as `drawn` sees it."""

    @functools.wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or under_vmap()
            or _get_current_dispatch_mode() is not None
        ):
            return fn(*args, **options)
        result, noisy = drawn(lambda: fn(*args, **options), closely=closely)
        if noisy:
            raise ValueError(_NOISE)
        return result

    return call


def _is_plain(*given: Tree) -> bool:
    """Whether these are ordinary tensors outside of all transforms, which can be recorded."""
    if inside_transform() or torch.is_inference_mode_enabled():
        return False
    leaves = trees.leaves(given)
    if any(x.is_meta for x in leaves):  # without values nothing tells a right recording
        return False
    # Autocast acts on operations, the recorded ones too, among which are those of the backward
    # pass: others than it chooses where they are made.
    if any(torch.is_autocast_enabled(kind) for kind in {x.device.type for x in leaves}):
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in leaves)


def how_many_together(meta_params: Tree, episodes: Episode) -> int:
    """Episodes that are worked on together, if nobody says how many.

    All, but of networks that convolve on a CPU: `vmap` makes one grouped convolution of those of
    several tasks, which is slow there, and saves calls where examples are few.
    """
    tasks, examples = episodes.support.y.shape[:2]
    convolves = any(x.ndim == 4 for x in trees.leaves(meta_params))
    if not convolves or episodes.support.x.device.type != "cpu":
        return tasks
    if examples + episodes.query.y.shape[1] >= _ALONE:
        return 1
    return max(1, _IN_CACHE // examples)


def one_by_one(fn: Callable[[Any], Any], episodes: Episode, *, closely: bool = True) -> list[Any]:
    """``fn(episode)`` of each, outside of `vmap`; refuses what is random, as `vmap` does.

    Args:
        fn: of one episode.
        episodes: stacked.
        closely: look at every operation of the first one, for generators of a module's own, too.
    """
    found = []
    for i in range(len(episodes.support.y)):
        episode = trees.map(lambda x, i=i: x[i], episodes)
        found.append(without_noise(fn, closely=closely and not i)(episode))
    return found


def _chunks(episodes: Episode, size: int) -> list[Episode]:
    tasks = len(episodes.support.y)
    if size >= tasks:
        return [episodes]
    return [trees.map(lambda x, i=i: x[i : i + size], episodes) for i in range(0, tasks, size)]


def check_episodes(episodes: Any) -> Episode:
    """A meta-batch, or an error that says what is wrong with it."""
    if not isinstance(episodes, tuple) or len(episodes) not in (2, 3):
        raise TypeError(
            "episodes must be an Episode(support, query) of stacked tasks, got a "
            f"{type(episodes).__name__}"
        )
    support, query = (check_examples(e, f"episodes[{i}]") for i, e in enumerate(episodes[:2]))
    classes = episodes[2] if len(episodes) == 3 else ()
    counts = {len(x) for x in trees.leaves((support, query, classes))}
    if len(counts) > 1:
        raise ValueError(
            f"episodes must be stacked along one leading dimension of tasks, got {sorted(counts)}"
        )
    if support.y.ndim < 2:
        raise ValueError(
            "episodes must have a leading dimension of tasks: one alone is a batch of 1, "
            "fmeta.tasks.stack_tasks([episode])"
        )
    return Episode(support, query, classes)
