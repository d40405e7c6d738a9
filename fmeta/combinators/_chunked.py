"""`chunked`: a rule worked off in recomputed chunks of coordinates."""

from __future__ import annotations

from fmeta._chunks import form_in_chunks
from fmeta.optimizer import Optimizer, check_optimizer_type

__all__ = ["chunked"]


def chunked(optimizer: Optimizer, coordinates: int = 2**18) -> Optimizer:
    """The same optimizer, whose update is differentiated a chunk of coordinates at a time.

    What a learned rule computes for a coordinate (features, layers of its network) is many times
    as large as the parameter. Here only what goes into the update is kept for the derivative; what
    is inside is computed again, chunk by chunk. Values and derivatives of every order are those of
    the rule, to rounding, under `grad`, `vjp`, `jvp`, `vmap`, ``.backward()`` and ``checkpoint`` of
    `fmeta.unroll`. It costs about one more evaluation of the rule; where nothing is recorded, it
    costs nothing.

    Leaves are taken together up to this size. A larger leaf is cut where its rule allows: rules
    that work element by element (`adam`, `linear`, ...), those of `coordinatewise`, `lstm`, and
    `normalized_mlp`, which goes over the chunks twice, for the root mean squares of its features
    and for its network. Other rules of one tensor take a leaf as a whole, and recompute that.

    Args:
        optimizer: a builder of fmeta, `learn` of one, or a rule lifted by `coordinatewise` or
            `tensorwise`. Combinators go around: ``scheduled(chunked(rule), schedule)``.
        coordinates: of a chunk at most, a positive number. Smaller chunks hold less; chunks that
            stay in the cache are also faster.

    Returns:
        An `Optimizer` with the same ``opt_params`` and hidden state.

    Raises:
        ValueError: ``coordinates`` below 1; an optimizer that may look at all leaves at once; in
            an update, a rule that closes over a traced tensor or draws random numbers.

    Example:
        >>> import fmeta
        >>> rule = fmeta.chunked(fmeta.optimizers.normalized_mlp(), coordinates=2**16)

    Reference:
        Chen et al. 1604.06174 (recomputation).
    """
    check_optimizer_type(optimizer, "optimizer")
    if isinstance(coordinates, bool) or not isinstance(coordinates, int) or coordinates < 1:
        raise ValueError(f"coordinates must be a positive integer, got {coordinates!r}")
    form = form_in_chunks(optimizer)
    if form is None:
        raise ValueError(
            "this optimizer cannot be worked off in chunks: it may look at all leaves at once, or "
            "it is a combinator. Put `chunked` inside, around the rule that a combinator wraps "
            "(scheduled(chunked(rule), schedule)); for any other rule take "
            'fmeta.unroll(..., recompute="rule")'
        )
    return optimizer._replace(update=form(coordinates))
