"""A learned local rule: weights change by the activity before and after them, not by gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta._leaves import Leaves, start_leaves
from fmeta.optimizer import Hidden, Optimizer, check_needs
from fmeta.optimizers._common import check_number
from fmeta.optimizers._layers import Layer, Place, layers_of
from fmeta.random import own

__all__ = ["hebbian_mlp"]

Tree = Any

_NEEDS = frozenset({"activations"})
_FEATURES = 4  # of a unit: activity, its mean and deviation over the batch, 1
_HIDDEN = 8
_TERMS = 2  # products of a presynaptic and a postsynaptic factor
_POST = 2 * _TERMS + 1  # gains of the signal, free terms, what of the signal is passed down
_TINY = 1e-8  # activity and signals much below its root count as none
_ERROR = 0.3  # a typical size: of one-hot targets minus a softmax at the start
_STEP = 0.3  # bound of a step, relative to weights of size 1 / sqrt(inputs)


def hebbian_mlp(lr: Any = 1.0) -> Optimizer:
    r"""Changes each weight by learned functions of the activity on its two sides.

    A weight from unit i to unit j moves along ``m``, a running mean of the local products

        ``D_ij = mean_b sum_k pre_k(x_bi) (gain_k(z_bj) s_bj + free_k(z_bj))``,

    b over the batch, k over two terms. x is what comes in and z what goes out (before any
    nonlinearity), divided by their root mean squares over the layer; ``pre``, and ``gain``,
    ``free`` and ``pass``, are outputs of two small networks, the same for all units of all layers,
    that see a unit's activity and its mean and deviation over the batch. The signal s says what a
    unit should do: at the last layer it is the error that the layer is told (target minus output),
    below it comes down through feedback weights V, one for each weight:

        ``s_bi = sum_j V_ij pass(z_bj) s_bj``,

    also divided by its root mean square. V starts at zero, never sees the forward weights, and
    learns by the same local products (as in Kolen and Pollack, 1994). The step is

        ``w += lr e^a (err / 0.3)^c / sqrt(inputs) m / sqrt(1 + mean(m^2)) - lr e^d w``,

    err the root mean square of the last layer's error. All of it is learned: networks, step sizes
    (a, d; of weights and biases), c, the memory of m, the decay of V. Gradients are not read, so
    none is computed (``reads_grads`` is False); a leaf whose gradient is None stays.

    Units may be renumbered, and layers be of any width and depth. A parameter in none of the layers
    stays as it is. A layer that is told an error of its own does not hear the one above it; without
    any error the rule is unsupervised. Untrained, the networks' postsynaptic factors are zero, and
    weights do nothing but decay by 1e-4 a step.

    Args:
        lr: factor of all steps: a number or a scalar tensor.

    Returns:
        An `Optimizer` that needs ``"activations"``: a list of layers from inputs to outputs, as
        `fmeta.functional.layer_activity` makes them and `fmeta.tasks.digits` gives them.
        ``opt_params``: for the networks ``pre`` and ``post`` a dict of ``w0`` (4, 8), ``w1``
        (8, outputs), ``skip`` (4, outputs) with 2 and 5 outputs; ``log_lr`` (2,), ``log_decay``
        (2,), ``error_power`` (), ``momentum`` () (its logit), ``log_forget`` (). Hidden at each
        leaf: ``m`` and ``feedback``, both ``(*leaf)``.

    Raises:
        ValueError: ``lr`` negative or not finite; later, no activations, those of a parameter that
            is not there or of another shape, or layers that do not follow one another.

    Example:
        >>> from fmeta.functional import layer_activity
        >>> rule, params = hebbian_mlp(), {"w": torch.zeros(2, 3)}
        >>> layer = layer_activity(torch.ones(8, 3), torch.zeros(8, 2), "w", error=torch.ones(8, 2))
        >>> hidden = rule.init_hidden(rule.init(), params)
        >>> new, _ = rule.step(
        ...     rule.init(), params, params, hidden, extras={"activations": [layer]}
        ... )
        >>> bool((new["w"] == 0).all())  # it is not trained
        True

    Reference:
        In the spirit of Metz et al., "Meta-learning update rules for unsupervised representation
        learning" (1804.00222): weight updates from the activity on both sides, by networks shared
        between neurons. That one has no labels, and normalises and propagates in other ways.
        Feedback that learns: Kolen and Pollack (1994); Akrout et al. (1904.05391).
    """
    check_number("lr", lr)
    if isinstance(lr, Tensor) and lr.ndim:
        raise ValueError(f"lr must be a scalar, got a tensor of shape {tuple(lr.shape)}")

    def init_hidden(opt_params: Tree, model_params: Tree, *, num_steps: Any = None) -> Hidden:
        def zeros(th: Tree, p: Tensor) -> dict[str, Tensor]:
            return {"m": torch.zeros_like(p), "feedback": torch.zeros_like(p)}

        return Hidden(start_leaves(zeros, opt_params, model_params), {})

    def update(
        opt_params: Tree,
        model_params: Tree,
        grads: Tree,
        hidden: Hidden,
        *,
        loss: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> tuple[Tree, Hidden]:
        check_needs(_NEEDS, loss, extras)
        at = Leaves(model_params, grads, hidden)
        delta: list[Any] = [None] * len(at.params)
        states = list(at.states)
        for i in at.active:
            delta[i] = torch.zeros_like(at.params[i], dtype=trees.compute_dtype(at.params[i]))
        layers = layers_of(extras["activations"] if extras else (), at)
        if not at.active or not layers:
            return at.tree(delta), hidden
        error = next((e for layer in reversed(layers) if (e := layer.error) is not None), None)
        signal: Tensor | None = None
        for depth in range(len(layers) - 1, -1, -1):
            layer = layers[depth]
            th = at.weights(opt_params, layer.outputs.dtype)
            post = _Post(th, layer, signal, depth)
            for place in layer.places:
                if place.leaf in at.active and at.params[place.leaf].numel():
                    p = at.params[place.leaf].to(layer.outputs.dtype)
                    change, states[place.leaf] = _changed(
                        th, lr, p, at.states[place.leaf], place, post, error
                    )
                    delta[place.leaf] = change.to(delta[place.leaf].dtype)
            signal = post.passed_down(layer, at.states) if depth else None
        return at.tree(delta), Hidden(at.tree(states), hidden.shared)

    return Optimizer(_init, init_hidden, update, _NEEDS, reads_grads=False)


def _init(generator: torch.Generator | None = None) -> Tree:
    generator = own(generator)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[0])

    def network(outputs: int) -> dict[str, Tensor]:
        shapes = {
            "w0": (_FEATURES, _HIDDEN),
            "w1": (_HIDDEN, outputs),
            "skip": (_FEATURES, outputs),
        }
        return {name: random(*shape) for name, shape in shapes.items()}

    post = network(_POST)
    post["w1"], post["skip"] = torch.zeros(_HIDDEN, _POST), torch.zeros(_FEATURES, _POST)
    post["skip"][-1, -1] = 1.0  # the whole signal is passed down
    return {
        "pre": network(_TERMS),
        "post": post,
        "log_lr": torch.full((2,), math.log(_STEP)),
        "log_decay": torch.full((2,), math.log(1e-4)),
        "error_power": torch.ones(()),
        "momentum": torch.tensor(1.4),
        "log_forget": torch.tensor(math.log(1e-2)),
    }


class _Post:
    """The postsynaptic side of a layer: ``terms`` (batch, units, terms), and what it passes down.

    A layer hears its own error or else the ``signal`` (batch, units) of the one above.
    """

    def __init__(self, th: Tree, layer: Layer, signal: Tensor | None, depth: int) -> None:
        z = layer.outputs
        heard = signal if layer.error is None else layer.error
        told = _network(th["post"], z)
        gains, free, gate = told.split((_TERMS, _TERMS, 1), -1)
        if heard is None:
            self.terms, self.gated = free, None
            return
        if heard.shape != z.shape:
            raise ValueError(
                f"layer {depth} has activations of {z.shape[1]} units (batch {z.shape[0]}), the "
                f"layer above it takes in {heard.shape[1]} (batch {heard.shape[0]}): give the "
                "layers in order from inputs to outputs, or an error to the lower one"
            )
        heard = _unit(heard)
        self.terms = gains * heard.unsqueeze(-1) + free
        self.gated = gate.squeeze(-1) * heard

    def passed_down(self, layer: Layer, states: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
        """The signal for the units before the layer, through the feedback weights."""
        found: Tensor | None = None
        for place in layer.places:
            if self.gated is None or not place.before or set(place.before) & set(place.after):
                continue
            v = states[place.leaf]["feedback"].to(self.gated.dtype)
            part = place.down(v, self.gated)
            found = part if found is None else found + part
        return found


def _changed(
    th: Tree,
    lr: Any,
    p: Tensor,
    state: Mapping[str, Tensor],
    place: Place,
    post: _Post,
    error: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The change of one parameter, and its state."""
    pre = _network(th["pre"], place.inputs)  # (batch, inputs, terms)
    product = place.product(pre, post.terms) / pre.shape[0]
    m = torch.lerp(product, state["m"], torch.sigmoid(th["momentum"]))
    kind = 0 if place.before else 1
    log_size = th["log_lr"].select(0, kind) - 0.5 * math.log(pre.shape[1])
    if error is not None:
        size = torch.log(_rms(error) / _ERROR + 1e-3).clamp(-5, 2)
        log_size = log_size + th["error_power"] * size
    change = lr * log_size.exp() * m * torch.rsqrt(1 + m.square().mean())
    delta = change - lr * th["log_decay"].select(0, kind).exp() * p
    feedback = state["feedback"] * (1 - th["log_forget"].clamp(max=0.0).exp()) + change
    return delta, {"m": m, "feedback": feedback}


def _network(weights: Mapping[str, Tensor], activity: Tensor) -> Tensor:
    """``(batch, units) -> (batch, units, outputs)``, the same for each unit."""
    x = _unit(activity)
    mean = x.mean(0, keepdim=True)
    deviation = torch.sqrt((x - mean).square().mean(0, keepdim=True) + _TINY)
    columns = [x, mean.expand_as(x), deviation.expand_as(x), torch.ones_like(x)]
    seen = torch.stack(columns, -1).flatten(0, 1)
    out = seen @ weights["skip"] + torch.tanh(seen @ weights["w0"]) @ weights["w1"]
    return out.unflatten(0, x.shape)


def _rms(x: Tensor) -> Tensor:
    return torch.sqrt(x.square().mean() + _TINY)


def _unit(x: Tensor) -> Tensor:
    """Divided by the root mean square; zeros stay zeros, with finite derivatives."""
    return x * torch.rsqrt(x.square().mean() + _TINY)
