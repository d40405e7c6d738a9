"""SNAIL: a network that reads the support set as a sequence and answers at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fmeta.estimators._contract import check_sizes
from fmeta.fewshot._contract import Episode, MetaLearner, check_examples
from fmeta.fewshot._labels import check_labels
from fmeta.fewshot._losses import Loss, loss_named
from fmeta.fewshot._meta_batch import Seen, by_gradient, estimate_by, shown, without_noise
from fmeta.fewshot._model import Model, as_model, beside, check_batch_norm
from fmeta.fewshot._parts import with_parts
from fmeta.fewshot._sequence import Block, attention, chain, temporal, to_outputs
from fmeta.random import fold_in

__all__ = ["Read", "snail"]

Tree = Any

_SURE = 4.0  # log odds of the class of a support example that a query equals, before training
_LABELLED = 4.0  # by how much the first attention prefers rows with labels, before training


class Read(NamedTuple):
    """A network and what it keeps of a support set that it has read.

    Attributes:
        params: of the network that makes the features, and of the one that reads sequences.
        kept: by block: keys and values of the support examples, or what the last of them add to
            the next.
        stats: what features are normalised by; ``()``: by whatever is shown.
    """

    params: Any
    kept: Any
    stats: Any


def snail(
    network: Any,
    num_outputs: int,
    num_support: int,
    *,
    loss: str | Loss = "cross_entropy",
    num_features: int | None = None,
    filters: int = 128,
    attends: Sequence[tuple[int, int]] = ((64, 32), (256, 128), (512, 256)),
    batch_norm: str = "transductive",
    chunk_size: int | None = None,
    record: bool = True,
) -> MetaLearner:
    """A simple neural attentive learner: learning is reading, by attention and convolutions.

    The sequence is the support examples, features beside one-hot labels (or targets), and then a
    query with zeros in the label's place. Causal attention and temporal convolutions alternate, and
    the answer is an affine map of the last position. Nothing looks ahead: ``adapt`` reads the
    support set once, and each query is answered as if it alone came next.

    Before training it is a soft nearest neighbour among the features: the first attention compares
    them and reads labels, the last map answers with what was read, and all else begins at no say in
    it. From random weights a network of this kind first learns for long that labels are to be read.

    The order of the support examples matters. In a fixed order (class 0 first, ...) places would
    tell labels and the labels themselves would not be read: give them mixed, as all sources do.

    Args:
        network: makes the features: an ``nn.Module``, a `Model` without a last layer such as
            ``conv4(ways=None)``, whose features are brought to mean 0 and variance 1 in each
            example; or None: the inputs as they are, flattened.
        num_outputs: ways, or numbers in a target.
        num_support: examples in the support sets of meta-training; the convolutions reach that far
            back. Other numbers of them are read as well.
        loss: as of `gradient_based`.
        num_features: outputs of the network, where it does not tell (a module, or None).
        filters: that each dense block of a temporal convolution adds.
        attends: sizes of keys and values of the attention blocks; between any two of them are
            ``ceil(log2(num_support + 1))`` dense blocks.
        batch_norm, chunk_size, record: as of `gradient_based`.

    Returns:
        A `MetaLearner` with ``meta_params = {"model_params": ..., "sequence": ...}``; its ``adapt``
        takes no steps and gives a `Read`.

    Raises:
        ValueError: numbers below 1; no attention; a network that does not tell its features; steps
            asked for; targets of another size; labels outside of 0 to ``num_outputs`` - 1, where
            they can be seen (on the CPU, outside of transforms).
        TypeError: no network; labels that are no integers.

    Reference:
        Mishra, Rohaninejad, Chen, Abbeel, "A simple neural attentive meta-learner" (1707.03141),
        section 3, the sizes of appendix A.
    """
    check_sizes(
        num_outputs=num_outputs,
        num_support=num_support,
        num_features=num_features,
        filters=filters,
        chunk_size=chunk_size,
    )
    if not attends:
        raise ValueError("attends is empty: labels are read by attention, give (keys, values)")
    for keys, values in attends:
        check_sizes(key_size=keys, value_size=values)
    check_batch_norm(batch_norm)
    model = _flattened(num_features) if network is None else as_model(network, batch_norm)
    known = model.num_features if num_features is None else num_features
    if known is None:
        raise ValueError("snail must know how many features a network makes: num_features=")
    sequence = _reader(known + num_outputs, num_outputs, num_support + 1, filters, attends)
    score = loss_named(loss)
    gain = _SURE if loss == "cross_entropy" else 1.0

    def init(generator: torch.Generator | None = None) -> Tree:
        generator = fold_in(0) if generator is None else generator
        params = model.init(generator)
        random = sequence.init(generator)
        reader = _as_neighbours(random, known, num_outputs, *attends[0], gain)
        return {"model_params": params, "sequence": beside(params, reader)}

    def check_targets(y: Tensor, what: str) -> None:
        if loss == "cross_entropy" or not y.is_floating_point():
            check_labels(y, num_outputs, what)

    def check(episodes: Episode) -> None:
        check_targets(episodes.support.y, "the support sets")
        check_targets(episodes.query.y, "the query sets")

    def features_of(meta_params: Tree, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
        features, seen = model.apply(meta_params["model_params"], x, stats)
        if features.ndim != 2 or features.shape[1] != known:
            raise ValueError(
                f"the network makes features {tuple(features.shape[1:])} of an example, snail was "
                f"made for ({known},): give num_features=, and a network without a last layer"
            )
        if network is not None:
            features = F.layer_norm(features, features.shape[-1:])
        return features, seen

    def adapt(meta_params: Tree, support: Any, *, num_steps: int | None = None) -> Read:
        if num_steps:
            raise ValueError("snail takes no steps: leave out num_steps")
        x, y = check_examples(support, "the support set")
        check_targets(y, "the support set")
        features, stats = features_of(meta_params, x)
        rows = torch.cat([features, _as_numbers(y, num_outputs, features.dtype)], -1)
        _, kept = sequence.over(meta_params["sequence"], rows)
        return Read(meta_params, kept, stats if batch_norm == "support" else ())

    def predict(adapted: Read, query_x: Tensor) -> Tensor:
        features, _ = features_of(adapted.params, query_x, adapted.stats)
        rows = torch.cat([features, features.new_zeros(len(features), num_outputs)], -1)
        return sequence.after(adapted.params["sequence"], adapted.kept, rows)

    def meta_loss(meta_params: Tree, episode: Episode, progress: Any) -> tuple[Tensor, Seen]:
        outputs = predict(adapt(meta_params, episode.support), episode.query.x)
        return score(outputs, episode.query.y), shown(None, outputs, episode.query.y)

    estimate = estimate_by(
        by_gradient(meta_loss), chunk_size=chunk_size, record=record, check=check
    )
    return with_parts(MetaLearner(init, estimate, without_noise(adapt), without_noise(predict)))


def _reader(
    num_inputs: int,
    num_outputs: int,
    length: int,
    filters: int,
    attends: Sequence[tuple[int, int]],
) -> Block:
    """Attention, convolutions, attention, ..., attention, and the affine map at the end."""
    blocks: list[Block] = []

    def width() -> int:
        return blocks[-1].num_outputs if blocks else num_inputs

    for i, (key_size, value_size) in enumerate(attends):
        if i:
            blocks.append(temporal(f"temporal{i - 1}", width(), filters, length))
        blocks.append(attention(f"attention{i}", width(), key_size, value_size))
    blocks.append(to_outputs("outputs", width(), num_outputs))
    return chain(blocks, num_inputs)


def _as_neighbours(
    params: Tree, num_features: int, num_outputs: int, key_size: int, value_size: int, gain: float
) -> Tree:
    """The weights, those of a soft nearest neighbour in the first attention and the last map.

    Keys and queries are of the features alone, but for their first number, which says that a key
    has a label: else a row would read itself before all others. Labels are copied into the first
    numbers of the values, and these, times ``gain``, are the outputs.
    """
    w, b = params["attention0.w"].clone(), params["attention0.b"].clone()
    labels = slice(num_features, num_features + num_outputs)
    copied = torch.eye(num_outputs, value_size)
    w[labels, : 2 * key_size] = 0
    w[:, [0, key_size]] = 0
    w[labels, 0] = b[key_size] = math.sqrt(_LABELLED * math.sqrt(key_size))
    w[:, 2 * key_size :][:, :num_outputs] = 0
    w[labels, 2 * key_size :] = copied
    last = torch.zeros_like(params["outputs.w"])
    read = num_features + num_outputs
    last[read : read + value_size] = gain * copied.T
    return {**params, "attention0.w": w, "attention0.b": b, "outputs.w": last}


def _flattened(num_features: int | None) -> Model:
    def apply(params: Any, x: Tensor, stats: Any = ()) -> tuple[Tensor, Any]:
        return x.flatten(1), ()

    return Model(lambda generator: {}, apply, lambda name: False, num_features=num_features)


def _as_numbers(y: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
    """Labels one-hot, targets as they are: ``(n, num_outputs)``."""
    if y.is_floating_point():
        if y[0].numel() != num_outputs:
            raise ValueError(
                f"targets of the support set have {y[0].numel()} numbers each, snail was made for "
                f"num_outputs={num_outputs}"
            )
        return y.flatten(1).to(dtype) if y.ndim > 1 else y[:, None].to(dtype)
    return (y[:, None] == torch.arange(num_outputs, device=y.device)).to(dtype)
