"""Learners that adapt by an inner optimizer: what starts, what moves, by which rule, how judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmeta import trees
from fmeta._unroll import Run, unroll
from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, Examples, MetaLearner, check_examples
from fmeta.fewshot._losses import Loss, loss_named
from fmeta.fewshot._meta_batch import Piece, Seen, by_gradient, estimate_by, shown, without_noise
from fmeta.fewshot._model import Model, as_model, beside, check_adapts
from fmeta.fewshot._parts import with_parts
from fmeta.optimizer import Optimizer, check_optimizer_type
from fmeta.random import fold_in

__all__ = ["Adapted", "Inner", "gradient_based", "start_of"]

Tree = Any
Weights = Callable[[float, int], Tensor]


class Adapted(NamedTuple):
    """A network that has learned a task.

    Attributes:
        params: all of its parameters.
        stats: what it normalises by; ``()``: by whatever it is shown.
        losses: support losses before each step, ``(steps,)``.
    """

    params: Any
    stats: Any
    losses: Tensor


class Inner:
    """Inner training on a support set, the one that all learners share which take steps.

    Args:
        model: the network.
        optimizer: the inner rule.
        loss: of predictions.
        num_steps: inner steps unless told otherwise.
        adapts: which parameters move, by name.
        batch_norm: what adapted networks normalise by.
        batch_size: examples in a step; None: all.
        options: of `fmeta.unroll`.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        loss: Loss,
        num_steps: int,
        adapts: Callable[[str], bool],
        batch_norm: str,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.num_steps, self.adapts, self.batch_norm = num_steps, adapts, batch_norm
        self.batch_size = batch_size
        self.options = options
        # Then the features are the same in all steps, and worked out once.
        self.only_head = model.embed is not None and all(
            model.is_head(name) for name in model.init(fold_in(0)) if adapts(name)
        )

    def parts(self, params: dict[str, Tensor]) -> tuple[Tree, Tree]:
        """What adapts and what does not."""
        moving = {k: v for k, v in params.items() if self.adapts(k)}
        return moving, {k: v for k, v in params.items() if k not in moving}

    def run(
        self, meta_params: Tree, support: Examples, num_steps: int | None = None, **more: Any
    ) -> tuple[Run, dict[str, Tensor]]:
        """Steps on the support set; gives the `Run` and all parameters after it."""
        steps = self.num_steps if num_steps is None else num_steps
        check_sizes(num_steps=steps)
        params, (x, y) = meta_params["model_params"], support
        moving, fixed = self.parts(params)
        loss = self.support_loss
        if self.only_head:
            assert self.model.embed is not None
            x, loss = self.model.embed(params, x)[0], self.head_loss
        run = unroll(
            self.optimizer,
            loss,
            meta_params["opt_params"],
            moving,
            self.batches(x, y, steps),
            loss_args=(fixed,),
            **{**self.options, **more},
        )
        return run, {k: run.params.get(k, v) for k, v in params.items()}

    def batches(self, x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """What the steps see, with leading dimension of steps: all, or some in turn."""
        if self.batch_size is None:
            return x.expand(steps, *x.shape), y.expand(steps, *y.shape)
        turn = torch.arange(steps * self.batch_size, device=x.device) % len(x)
        places = turn.view(steps, self.batch_size)
        return x[places], y[places]

    def support_loss(self, moving: Tree, batch: Any, fixed: Tree) -> Tensor:
        x, y = batch
        return self.loss(self.model.apply({**fixed, **moving}, x)[0], y)

    def head_loss(self, moving: Tree, batch: Any, fixed: Tree) -> Tensor:
        features, y = batch
        assert self.model.head is not None
        return self.loss(self.model.head({**fixed, **moving}, features), y)

    def adapt(self, meta_params: Tree, support: Any, *, num_steps: int | None = None) -> Adapted:
        """``adapt`` of a `MetaLearner`; no steps (0) leave the parameters as they start."""
        support = check_examples(support, "the support set")
        if num_steps == 0:
            params = meta_params["model_params"]
            losses = params[next(iter(params))].new_zeros(0)
        else:
            run, params = self.run(meta_params, support, num_steps)
            losses = run.losses
        stats: Any = ()
        if self.batch_norm == "support":
            stats = self.model.apply(params, support.x)[1]
        return Adapted(params, stats, losses)

    def predict(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        """``predict`` of a `MetaLearner`."""
        return self.model.apply(adapted.params, query_x, adapted.stats)[0]

    def query_loss(self, adapted: Adapted, query: Examples) -> tuple[Tensor, Tensor]:
        """Loss and outputs on the query set."""
        outputs = self.predict(adapted, query.x)
        return self.loss(outputs, query.y), outputs


def start_of(model: Model, optimizer: Optimizer) -> Callable[..., Tree]:
    """``init`` of learners whose meta-parameters are a model's and an optimizer's."""

    def init(generator: torch.Generator | None = None) -> Tree:
        generator = fold_in(0) if generator is None else generator
        params = model.init(generator)
        # The rule's numbers keep their dtype: rules work in that of what they move.
        rule = beside(params, optimizer.init(generator), dtype=False)
        return {"model_params": params, "opt_params": rule}

    return init


def gradient_based(
    network: Any,
    optimizer: Optimizer,
    *,
    num_steps: int = 5,
    loss: str | Loss = "cross_entropy",
    adapts: Callable[[str], bool] | None = None,
    first_order: bool | str = False,
    checkpoint: str | int | None = None,
    mixed_mode: bool | str = False,
    batch_norm: str = "transductive",
    batch_size: int | None = None,
    step_weights: Weights | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    record: bool = True,
    estimate: Callable[[Inner], Piece] | None = None,
) -> MetaLearner:
    """A learner of initial parameters, and of whatever else the inner optimizer learns.

    ``num_steps`` steps of the optimizer on the support set, then the loss on the query set, and
    its gradient with respect to where the steps began and to the optimizer's own parameters.

    Args:
        network: an ``nn.Module``, or a `Model` such as `conv4`. A module starts from the weights it
            has, and its frozen parameters (``requires_grad=False``) are constants, neither adapted
            nor learned.
        optimizer: the inner rule; its ``opt_params`` are learned too.
        num_steps: inner steps.
        loss: ``"cross_entropy"``, ``"mse"``, or a function ``(outputs, y) -> scalar``.
        adapts: ``adapts(name) -> bool``: which parameters the inner steps change; default all.
        first_order, checkpoint, mixed_mode: as in `fmeta.unroll`.
        batch_norm: what a network that normalises uses on the query set. ``"transductive"``: the
            statistics of all query inputs together, as in MAML's own results, so that a prediction
            depends on what else is asked. ``"support"``: those of the support set at the adapted
            parameters. Inner steps always use those of the support examples they see.
        batch_size: support examples in an inner step, taken in turn; None: all in each.
        step_weights: ``step_weights(progress, num_steps) -> (num_steps,)``: the meta-loss is the
            weighted sum of the query losses after each step; None: the last one alone.
        chunk_size: episodes that are worked on together; None: all, or on a CPU of networks with
            convolutions one, and of episodes of less than 40 examples as many as have about 100
            support examples, whose activations stay in the caches.
        compile: compile the meta-gradient at the first call for each shape of meta-batch: from
            half a minute to minutes of compilation, faster after that, equal to rounding only.
        record: after thirty estimates of a shape replay the operations they consist of, the same to
            the bit. Whatever the network, the rule or the loss read beside their arguments is then
            what it was at the recording: False for a loss that changes during meta-training.
        estimate: ``estimate(inner) -> piece``: another way to the meta-gradient than
            backpropagation. Of the `Inner` training it makes ``piece(meta_params, episode,
            progress) -> (gradient, (value, seen))``, the part of one episode, for ``vmap`` and
            by itself: ``gradient`` is like ``meta_params``, ``value`` the meta-loss, and `shown`
            makes ``seen``.

    Returns:
        A `MetaLearner` with ``meta_params = {"model_params": ..., "opt_params": ...}``.

    Raises:
        ValueError: numbers below 1, unknown names, or no parameter that adapts.
        TypeError: no network, no optimizer.
    """
    check_optimizer_type(optimizer, "optimizer")
    check_sizes(num_steps=num_steps, chunk_size=chunk_size, batch_size=batch_size)
    model = as_model(network, batch_norm)
    names = list(model.init(fold_in(0)))
    adapts = adapts or (lambda name: True)
    check_adapts(adapts, names, network)
    inner = Inner(
        model,
        optimizer,
        loss_named(loss),
        num_steps,
        adapts,
        batch_norm,
        batch_size,
        first_order=first_order,
        checkpoint=checkpoint,
        mixed_mode=mixed_mode,
    )
    options: dict[str, Any] = {"chunk_size": chunk_size, "compile": compile, "record": record}
    if estimate is not None:
        piece = estimate(inner)
    elif step_weights is not None:
        piece = by_gradient(_after_every_step(inner))
        options["at"] = lambda progress: step_weights(progress, num_steps)
    else:
        piece = by_gradient(_after_the_last(inner))
    return with_parts(
        MetaLearner(
            start_of(model, optimizer),
            estimate_by(piece, **options),
            without_noise(inner.adapt),
            without_noise(inner.predict),
        )
    )


def _after_the_last(inner: Inner) -> Callable[..., tuple[Tensor, Seen]]:
    def meta_loss(meta_params: Tree, episode: Episode, progress: Any) -> tuple[Tensor, Seen]:
        adapted = inner.adapt(meta_params, episode.support)
        value, outputs = inner.query_loss(adapted, episode.query)
        return value, shown(adapted.losses, outputs, episode.query.y)

    return meta_loss


def _after_every_step(inner: Inner) -> Callable[..., tuple[Tensor, Seen]]:
    def query_loss(moving: Tree, batch: Any, fixed: Tree) -> Tensor:
        support, query, _ = batch
        params, stats = {**fixed, **moving}, ()
        if inner.batch_norm == "support":
            stats = inner.model.apply(params, support.x)[1]
        return inner.loss(inner.model.apply(params, query.x, stats)[0], query.y)

    def meta_loss(meta_params: Tree, episode: Episode, weights: Tensor) -> tuple[Tensor, Seen]:
        steps = inner.num_steps
        run, params = inner.run(
            meta_params,
            episode.support,
            eval_batches=trees.map(lambda x: x.expand(steps, *x.shape), episode),
            eval_loss_fn=query_loss,
        )
        stats: Any = ()
        if inner.batch_norm == "support":
            stats = inner.model.apply(params, episode.support.x)[1]
        with torch.no_grad():
            outputs = inner.predict(Adapted(params, stats, run.losses), episode.query.x)
        return (weights.to(run.eval_losses) * run.eval_losses).sum(), shown(
            run.losses, outputs, episode.query.y
        )

    return meta_loss
