"""MAML as hierarchical Bayes: a Laplace approximation of what a task's parameters may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._norms import norms_written_out
from fmeta.fewshot._contract import Episode, Examples, MetaLearner
from fmeta.fewshot._gradient_based import Adapted, Inner, gradient_based
from fmeta.fewshot._inner_rule import inner_rule
from fmeta.fewshot._meta_batch import Piece, Seen, by_gradient, shown
from fmeta.fewshot._model import Model
from fmeta.optimizer import Optimizer

__all__ = ["curvature_log_det", "llama"]

Tree = Any


def llama(
    network: Any,
    *,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
    eta: float = 1e-3,
    precision: float = 1.0,
    **options: Any,
) -> MetaLearner:
    r"""MAML with the log determinant of a task's curvature in the meta-loss.

    A few gradient steps from the meta-parameters find the mode :math:`\hat\varphi` of a task's
    posterior, whose prior they are the mean of; the marginal likelihood by Laplace's method then is

    .. math:: -\log p(query | \hat\varphi) + \eta \log \det (\tau I + G),

    up to a constant, with the Gauss-Newton matrix G of the support set's negative log likelihood
    at :math:`\hat\varphi`. The determinant is exact: of the same value for the small matrix of
    (support examples x outputs), so that no block-diagonal approximation is needed.

    Args:
        network, lr, optimizer: as of `maml`.
        eta: weight of the log determinant.
        precision: of the Gaussian prior, :math:`\tau`.
        **options: of `gradient_based`. Its ``loss`` says which likelihood: ``"cross_entropy"`` a
            categorical, ``"mse"`` a Gaussian of variance 1.

    Returns:
        A `MetaLearner`.

    Raises:
        ValueError: ``eta`` below 0, ``precision`` not above 0, another loss.

    Reference:
        Grant et al., "Recasting gradient-based meta-learning as hierarchical Bayes" (1801.08930),
        algorithm 4 and section 4; there the curvature is that of the query set, by K-FAC.
    """
    if not 0 <= eta < math.inf or not 0 < precision < math.inf:
        raise ValueError(f"eta must be at least 0 and precision above 0, got {eta} and {precision}")
    if options.get("loss", "cross_entropy") not in ("cross_entropy", "mse"):
        raise ValueError(
            f"llama knows the likelihoods of cross_entropy and mse, got {options['loss']!r}"
        )
    categorical = options.get("loss", "cross_entropy") == "cross_entropy"

    def estimate(inner: Inner) -> Piece:
        def meta_loss(meta_params: Tree, episode: Episode, progress: Any) -> tuple[Tensor, Seen]:
            adapted = inner.adapt(meta_params, episode.support)
            value, outputs = inner.query_loss(adapted, episode.query)
            curved = curvature_log_det(
                inner.model, adapted, episode.support, inner.adapts, precision, categorical
            )
            return value + eta * curved, shown(adapted.losses, outputs, episode.query.y)

        return by_gradient(meta_loss)

    rule = inner_rule(lr, optimizer)
    return gradient_based(network, rule, estimate=estimate, **options)


def curvature_log_det(
    model: Model,
    adapted: Adapted,
    support: Examples,
    adapts: Callable[[str], bool],
    precision: float,
    categorical: bool,
) -> Tensor:
    """``log det(I + G / precision)`` of the parameters that adapt, a scalar.

    ``G = A A'``, and ``det(I + A A' / t) = det(I + A' A / t)`` (Sylvester), whose side is the
    number of support examples times that of outputs.
    """
    moving = {k: v for k, v in adapted.params.items() if adapts(k)}

    def outputs_of(moving: Tree) -> tuple[Tensor, Tensor]:
        out = model.apply({**adapted.params, **moving}, support.x, adapted.stats)[0]
        return out, out

    with norms_written_out(always=True):  # jacrev goes back below a vmap of its own
        jacobian, out = torch.func.jacrev(outputs_of, has_aux=True)(moving)
    rows = torch.cat([j.flatten(2) for j in trees.leaves(jacobian)], -1)  # (n, outputs, params)
    if categorical:
        p = out.softmax(-1)
        root = p.clamp_min(torch.finfo(p.dtype).tiny).sqrt()
        # diag(p) - p p' = S S' with S = diag(root) - p root'.
        factor = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
        rows = factor.mT @ rows
    rows = rows.flatten(0, 1)
    gram = rows @ rows.T / precision
    return torch.linalg.slogdet(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))[
        1
    ]
