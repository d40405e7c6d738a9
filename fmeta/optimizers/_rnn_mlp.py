"""A recurrent network for each tensor that tells a network for each coordinate how to step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fmeta import trees
from fmeta._treewise import treewise
from fmeta.optimizer import Hidden, Optimizer
from fmeta.optimizers import _rnn_mlp_net, _rnn_mlp_tensor
from fmeta.optimizers._common import check_number
from fmeta.optimizers._features import stacked_ema
from fmeta.optimizers._initial import truncated_normal
from fmeta.optimizers._tensor_rnn import lstm_step
from fmeta.random import own

__all__ = ["rnn_mlp"]

Tree = Any


def rnn_mlp(
    step_multiplier: float = 0.001,
    magnitude_rate: float = 0.001,
    hidden_size: int = 32,
    hidden_layer: int = 2,
    from_mlp_size: int = 16,
    from_lstm_size: int = 18,
    lstm_to_ff: int = 17,
    lstm_hidden_size: int = 64,
    decays: Sequence[float] = (0.5, 0.9, 0.99, 0.999, 0.9999),
    chunk_size: int | None = None,
) -> Optimizer:
    """A recurrent network for each tensor that tells a network for each coordinate how to step.

    ``p -= step_multiplier * d * exp(magnitude_rate * e)``, d and e from the second network.

    The recurrent one (an LSTM) sees each tensor once a step: sizes of its parameters, gradients and
    moments, its shape (the first four axes), how the loss compares with its average, what the other
    network said of it, and what the LSTM itself said, averaged over all tensors. It tells the other
    one, a small ReLU network that sees each coordinate, what to do there.

    The small network's features are the gradient g, the parameter p, ``log |p|``, momenta m and
    second moments v with each decay, ``m v^-1/2`` and ``v^-1/2``, each divided by its root mean
    square over the tensor; and, the same for all coordinates, 11 sines of the step, logarithms of
    the number of tensors, of the norm and of the size of the tensor, and what the LSTM tells.

    Gradients are first clipped, element by element, to ten times a running average of their root
    mean square over all tensors. Tensors without a gradient are not counted, and not seen.

    Of a validation loss (``extras={"is_valid": flag}`` with a true flag) the rule only remembers
    the average: the parameters stay, whatever the gradients; the LSTM compares it with the training
    losses from then on. The flag is a boolean scalar; without it every step is one of training.

    Args:
        step_multiplier, magnitude_rate: as above.
        hidden_size, hidden_layer: width and number of hidden layers of the small network.
        from_mlp_size, from_lstm_size, lstm_to_ff: how many numbers the small network says of a
            tensor, the LSTM says to itself, the LSTM tells the small network.
        lstm_hidden_size: H below.
        decays: of momenta and second moments, D of them, rounded to float32.
        chunk_size: coordinates of a tensor that are worked on at once; bounds the memory.

    The sizes are those of ``init``; weights of other sizes work too.

    Returns:
        An `Optimizer` that needs ``loss``. With L, M, F for ``from_lstm_size, from_mlp_size,
        lstm_to_ff``, ``opt_params = {"rnn": {"lstm_w": (18 + L + M + H, 4 H), "lstm_b": (4 H),
        "to_rnn_w": (H, L), "to_rnn_b": (L), "to_mlp_w": (H, F), "to_mlp_b": (F), "h0": (H), "c0":
        (H), "from_rnn0": (L), "from_mlp0": (M)}, "mlp": {"w0": (17 + 4 D + F, hidden_size), "b0":
        (hidden_size), ..., the last with 2 + M outputs}}`` (``x @ w + b``). Hidden at each leaf:
        ``m`` and ``v`` ``(*leaf, D)``, ``from_mlp`` ``(M)``, and under ``"tensor"`` the LSTM's
        ``h`` and ``c``. Shared: ``from_rnn`` ``(L)``, ``clip``, and ``mean``, ``var``, ``count`` of
        ``train`` and ``valid`` losses.

    Raises:
        ValueError: a size below 1, a number that is negative or not finite, a decay not in [0, 1).

    Example:
        >>> rule = rnn_mlp(lstm_hidden_size=8)
        >>> params = {"w": torch.ones(2, 2)}
        >>> state = rule.init_hidden(rule.init(), params)
        >>> new, state = rule.step(rule.init(), params, params, state, loss=torch.tensor(4.0))
        >>> new["w"].shape, int(state.shared["train_count"])
        (torch.Size([2, 2]), 1)

    Reference:
        Wichrowska et al. 1703.04813 (the hierarchy); Metz et al. 2009.11243, whose form this is;
        `RNNMLPLOpt` of google/learned_optimization.
    """
    sizes = {
        "hidden_size": hidden_size,
        "hidden_layer": hidden_layer,
        "from_mlp_size": from_mlp_size,
        "from_lstm_size": from_lstm_size,
        "lstm_to_ff": lstm_to_ff,
        "lstm_hidden_size": lstm_hidden_size,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    whole = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and (not whole or chunk_size < 1):
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    check_number("step_multiplier", step_multiplier)
    check_number("magnitude_rate", magnitude_rate)
    decays = tuple(decays)
    if not decays:
        raise ValueError("decays must hold at least one decay, got none")
    for i, decay in enumerate(decays):
        check_number(f"decays[{i}]", decay, below=1)
        if numpy.float32(decay) == 1:
            raise ValueError(f"decays[{i}] = {decay} is 1 in float32, where nothing would move")
    # The reference holds them in float32, where 1 - .9999 is 1.7e-4 off: weights learned with it.
    decays = tuple(float(numpy.float32(decay)) for decay in decays)
    rule = _Rule(sizes, decays, step_multiplier, magnitude_rate, chunk_size)
    trained = treewise(rule)
    return trained._replace(update=functools.partial(_update, trained.update))


class _Rule:
    needs = frozenset({"loss"})

    def __init__(
        self,
        sizes: Mapping[str, int],
        decays: tuple[float, ...],
        step_multiplier: float,
        magnitude_rate: float,
        chunk_size: int | None,
    ) -> None:
        self.sizes, self.decays, self.chunk_size = sizes, decays, chunk_size
        self.step_multiplier, self.magnitude_rate = step_multiplier, magnitude_rate

    def init(self, generator: torch.Generator | None = None) -> Tree:
        generator, size = own(generator), self.sizes
        h, from_rnn, from_mlp = (
            size[k] for k in ("lstm_hidden_size", "from_lstm_size", "from_mlp_size")
        )
        rnn, mlp = {}, {}
        layers = {
            "lstm": (_rnn_mlp_tensor.INPUTS + from_rnn + from_mlp + h, 4 * h),
            "to_rnn": (h, from_rnn),
            "to_mlp": (h, size["lstm_to_ff"]),
        }
        for name, shape in layers.items():
            rnn[f"{name}_w"] = truncated_normal(shape, generator)
            rnn[f"{name}_b"] = torch.zeros(shape[1])
        rnn |= {"h0": torch.zeros(h), "c0": torch.zeros(h)}
        rnn["from_rnn0"] = truncated_normal((from_rnn,), generator)
        rnn["from_mlp0"] = truncated_normal((from_mlp,), generator)
        inputs = _rnn_mlp_net.inputs(len(self.decays)) + size["lstm_to_ff"]
        widths = [inputs, *[size["hidden_size"]] * size["hidden_layer"], 2 + from_mlp]
        for i, shape in enumerate(itertools.pairwise(widths)):
            mlp[f"w{i}"] = truncated_normal(shape, generator)
            mlp[f"b{i}"] = torch.zeros(shape[1])
        return {"rnn": rnn, "mlp": mlp}

    def init_hidden(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        moments = p.new_zeros(*p.shape, len(self.decays))
        from_mlp = th["rnn"]["from_mlp0"].clone()
        return {"m": moments, "v": moments.clone(), "from_mlp": from_mlp}

    def init_tensor(self, th: Tree, p: Tensor) -> dict[str, Tensor]:
        return {"h": th["rnn"]["h0"].clone(), "c": th["rnn"]["c0"].clone()}

    def init_shared(self, th: Tree, params: Tree) -> dict[str, Tensor]:
        found = [p for p in trees.leaves(params) if p is not None] or [torch.zeros(())]
        dtype = trees.compute_dtype(found[0])
        for p in found:
            dtype = torch.promote_types(dtype, trees.compute_dtype(p))
        from_rnn = th["rnn"]["from_rnn0"].to(found[0].device, dtype).clone()
        return {"from_rnn": from_rnn, **_rnn_mlp_tensor.start(from_rnn)}

    def observe(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        limit = _rnn_mlp_tensor.clip_limit(shared).to(g.dtype)
        g = g.clamp(-limit, limit)
        m, v = (stacked_ema(h[k], x, self.decays) for k, x in (("m", g), ("v", g * g)))
        h = {**h, "m": m, "v": v}
        return _rnn_mlp_tensor.summary(p, g, h), h

    def mix(
        self,
        th: Tree,
        summaries: Tensor,
        tensors: dict[str, Tensor],
        shared: dict[str, Tensor],
        loss: Tensor,
        extras: Any = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        rnn, count, dtype = th["rnn"], summaries.shape[0], summaries.dtype
        limit = _rnn_mlp_tensor.clip_limit(shared)
        step = _rnn_mlp_net.step_features(shared["train_count"] + shared["valid_count"], limit)
        x, square = _rnn_mlp_tensor.split(summaries)
        seen, shared = _rnn_mlp_tensor.after_loss(shared, loss, square)
        x = _rnn_mlp_tensor.inputs(x, shared["from_rnn"].to(dtype), seen.to(dtype))
        out, tensors = lstm_step(rnn["lstm_w"], rnn["lstm_b"], x, tensors)
        told = out @ rnn["to_mlp_w"] + rnn["to_mlp_b"]
        from_rnn = (out @ rnn["to_rnn_w"] + rnn["to_rnn_b"]).mean(0)
        shared = {**shared, "from_rnn": from_rnn.to(shared["from_rnn"].dtype)}
        number = _rnn_mlp_net.log_count(count, limit)
        same = torch.cat([limit.reshape(1), step, number]).to(dtype)
        return torch.cat([same.expand(count, -1), told], 1), tensors, shared

    def update(
        self, th: Tree, p: Tensor, g: Tensor, h: dict[str, Tensor], control: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if p.numel() == 0:
            return torch.zeros_like(p), h
        limit = control.select(0, 0)
        told = control.narrow(0, 1, control.shape[0] - 1)
        direction, magnitude, from_mlp = _rnn_mlp_net.outputs(
            th["mlp"], told, p, g.clamp(-limit, limit), h["m"], h["v"], self.chunk_size
        )
        step = self.step_multiplier * direction * torch.exp(self.magnitude_rate * magnitude)
        return -step.reshape(p.shape), {**h, "from_mlp": from_mlp}


def _update(
    train: Any,
    opt_params: Tree,
    model_params: Tree,
    grads: Tree,
    hidden: Hidden,
    *,
    loss: Tensor | None = None,
    extras: Mapping[str, Any] | None = None,
) -> tuple[Tree, Hidden]:
    """A step of training, or where ``extras["is_valid"]`` a look at a validation loss."""
    flag = None if extras is None else extras.get("is_valid")
    if flag is None or loss is None:  # without a loss `train` raises
        return train(opt_params, model_params, grads, hidden, loss=loss, extras=extras)
    seen = _rnn_mlp_tensor.after_valid_loss(hidden.shared, loss)
    if not isinstance(flag, Tensor):
        flag = torch.full((), bool(flag), device=seen["clip"].device)
    if flag.ndim:
        raise ValueError(
            f"is_valid must be a scalar, got a tensor of shape {tuple(flag.shape)}: it says of the "
            "whole step whether its loss is a validation loss"
        )
    valid = flag.to(torch.bool)
    # What is not used must not be NaN either: it would come back into derivatives.
    grads = trees.map(lambda g: None if g is None else torch.where(valid, 0.0, g), grads)
    delta, new = train(opt_params, model_params, grads, hidden, loss=loss, extras=extras)
    delta = trees.map(lambda d: None if d is None else torch.where(valid, 0.0, d), delta)
    leaves, shared = trees.map(
        lambda old, after: torch.where(valid, old, after),
        (hidden.leaves, seen),
        (new.leaves, new.shared),
    )
    return delta, Hidden(leaves, shared)
