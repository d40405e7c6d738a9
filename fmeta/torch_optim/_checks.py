"""What can be wrong with the use of an adapter, said early, with the cure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmeta._leafwise import is_applied_as_is, is_transform
from fmeta.optimizer import Optimizer
from fmeta.torch_optim import _sharded
from fmeta.torch_optim._options import as_python
from fmeta.torch_optim._rule import Rule

__all__ = [
    "as_loss",
    "check_closure",
    "check_dtypes",
    "check_given",
    "check_group",
    "check_no_more",
    "check_options",
    "check_params",
    "check_rule",
    "check_some",
    "check_tensors",
    "compiled_and_sharded",
    "evaluating",
    "not_finite",
]


def check_params(params: Any) -> None:
    """Raises a TypeError for what holds parameters but is no iterable of them."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params are given one by one, got the module {type(params).__name__}: give "
            "model.named_parameters(), or model.parameters()"
        )
    if isinstance(params, Mapping):
        if "params" in params:
            raise TypeError("a parameter group stands in a list: LearnedOptimizer([group], ...)")
        raise TypeError(
            "params are given one by one, got a dict: give the items() of a dict of parameters, "
            "or model.named_parameters() (a state_dict holds copies that get no gradient)"
        )


def check_no_more(name_or_optimizer: Any, numbers: Mapping[str, Any]) -> None:
    """Raises a TypeError for options that `LearnedOptimizer` does not have."""
    if not numbers:
        return
    given = ", ".join(f"{name}={value!r}" for name, value in numbers.items())
    rule = name_or_optimizer if isinstance(name_or_optimizer, str) else "adam"
    rule = rule if rule.isidentifier() else "adam"
    raise TypeError(
        f"LearnedOptimizer has no {', '.join(numbers)}: the numbers of a rule are given to its "
        f"builder, as in LearnedOptimizer(params, fmeta.optimizers.{rule}({given}))"
    )


def check_options(nonfinite: str, fused: Any, differentiable: Any, compile: Any = False) -> None:
    """Options of the whole optimizer."""
    if not (compile is None or isinstance(compile, (bool, Mapping))):
        raise TypeError(
            f"compile must be True, False or a dict of arguments of torch.compile, got {compile!r}"
        )
    if nonfinite not in ("allow", "skip", "raise"):
        raise ValueError(f"nonfinite must be 'allow', 'skip' or 'raise', got {nonfinite!r}")
    if fused:
        raise ValueError("there is no fused=True here: for one kernel a step use compile=True")
    if differentiable:
        raise ValueError(
            "differentiable=True is refused, since parameters are changed in place: differentiate "
            "through a training with fmeta.unroll"
        )


def check_rule(rule: Rule, num_steps: Any) -> None:
    """Raises for what is no rule by itself, or without the number of steps that it needs."""
    if is_transform(rule.optimizer):
        raise ValueError(
            "this is a transform of gradients (clip_by_global_norm, clip_by_value, orthogonalize), "
            "along which parameters would climb: let an optimizer follow, "
            "fmeta.chain(transform, fmeta.optimizers.adam())"
        )
    whole = isinstance(num_steps, int) and not isinstance(num_steps, bool)
    if num_steps is not None and (not whole or num_steps < 1):
        raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}")
    if num_steps is None and "num_steps" in rule.optimizer.needs:
        raise ValueError(
            f"the rule {rule.name} needs num_steps, the number of steps of the whole training: "
            "LearnedOptimizer(..., num_steps=...)"
        )


def check_group(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """A parameter group, beside those before it."""
    names = group.get("param_names") or [f"{i} of its group" for i in range(len(group["params"]))]
    group["num_steps"] = as_python(group["num_steps"])
    for key, what in (("lr", "learning rate"), ("weight_decay", "weight_decay value")):
        x = group[key] = as_python(group[key])
        if isinstance(x, Tensor):
            if x.numel() != 1:
                raise ValueError(f"Tensor {key} must be 1-element, got shape {tuple(x.shape)}")
        elif isinstance(x, bool) or not isinstance(x, (int, float)) or not x >= 0:
            raise ValueError(f"Invalid {what}: {x!r}; it must be a number from 0 on")
    for key in ("fused", "differentiable"):
        if group[key]:
            check_options("allow", *(group[k] for k in ("fused", "differentiable")))
    if group["num_steps"] != groups[0]["num_steps"]:
        raise ValueError("num_steps is one for the whole training, not an option of a group")
    for name, p in zip(names, group["params"], strict=True):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"parameter {name} has no shape yet, as its module is lazy: let the model see a "
                "batch once, then build the optimizer"
            )
        if p.requires_grad and not p.is_floating_point():  # frozen, it is not seen by the rule
            raise _not_real(f"parameter {name}", p)
    every = [n for g in groups for n in g.get("param_names", ())]
    if len(set(every)) < len(every):
        twice = next(n for n in every if every.count(n) > 1)
        raise ValueError(f"two parameters have the name {twice}: names must differ")


def _not_real(label: str, p: Tensor) -> Exception:
    cure = ": give the rule real numbers, with torch.view_as_real" if p.is_complex() else ""
    kind = f"complex ({p.dtype})" if p.is_complex() else f"{p.dtype}, not a floating tensor"
    return TypeError(f"{label} is {kind}{cure}")


def check_closure(closure: Any) -> None:
    """Raises a TypeError for what can be no closure, such as the loss itself."""
    if not callable(closure):
        raise TypeError(
            f"step takes a closure, got a {type(closure).__name__}: give the loss by name, "
            "step(loss=loss)"
        )


def as_loss(loss: Any, device: torch.device) -> Tensor | None:
    """The loss as a scalar tensor without history, on the device of the parameters."""
    if loss is None:
        return None
    loss = as_python(loss)
    if not isinstance(loss, Tensor):
        if isinstance(loss, bool) or not isinstance(loss, (int, float)):
            raise TypeError(f"the loss must be a number or a scalar tensor, got {loss!r}")
        return torch.tensor(float(loss), device=device)
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got a tensor of shape {tuple(loss.shape)}")
    # A copy: the caller may use the same tensor for the next loss.
    return loss.detach().reshape(()).to(device, copy=True)


def check_unscaled(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises where options of a group would change deltas that must be applied as they are.

    Tensors on other devices than the CPU are not looked at: that would wait for the device.
    """
    if not is_applied_as_is(optimizer):
        return
    for group in groups:
        for key, plain in (("lr", 1), ("weight_decay", 0)):
            x = group[key]
            if isinstance(x, Tensor):
                x = x.item() if type(x.detach()) is Tensor and x.device.type == "cpu" else plain
            if x != plain:
                raise ValueError(
                    f"group[{key!r}] is {x:g}, but the rule keeps parameters of its own "
                    "beside the model's (master_weights, lookahead, schedule_free_adamw), which "
                    f"it would not reach: leave {key} at {plain}, and put rate, schedule and decay "
                    "inside, as in fmeta.master_weights(fmeta.scheduled(rule, schedule))"
                )


def check_given(
    needs: frozenset[str], loss: Tensor | None, extras: Mapping[str, Any] | None
) -> None:
    """Raises a ValueError that names what a step lacks."""
    if "loss" in needs and loss is None:
        raise ValueError(
            "this rule needs the loss: call opt.step(loss=loss), or opt.step(closure) with a "
            "closure that returns it"
        )
    missing = sorted(needs - {"loss", "num_steps"} - set(extras or ()))
    if missing:
        raise ValueError(
            f"this rule needs {', '.join(missing)}: call opt.step(extras={{{missing[0]!r}: ...}})"
        )


def check_tensors(
    opt: Any, flat: Sequence[Tensor], grads: Sequence[Tensor | None], active: Sequence[int]
) -> torch.device:
    """Raises unless gradients are dense and parameters on one device, which is returned."""
    device = flat[active[0]].device
    for i in active:
        if not flat[i].is_floating_point():
            raise _not_real(opt._label(i), flat[i])  # it was frozen before
        if flat[i].device != device:
            raise ValueError(
                f"{opt._label(active[0])} is on {device}, {opt._label(i)} on {flat[i].device}: a "
                "rule sees all parameters together, so give each device an optimizer of its own"
            )
        layout = grads[i].layout  # type: ignore[union-attr]
        if layout is not torch.strided:
            raise ValueError(
                f"the gradient of {opt._label(i)} is sparse ({layout}): use dense gradients, "
                "nn.Embedding(..., sparse=False)"
            )
    return device


def check_dtypes(
    opt: Any, flat: Sequence[Tensor], states: Sequence[Any], active: Sequence[int]
) -> None:
    """Raises a TypeError where a state is of a time when its parameter had another dtype.

    Between half precision and float32 a parameter may change: the state is float32 in both.
    """
    for i in active:
        wide, found = flat[i].dtype is torch.float64, opt._slots[i]
        kinds = [x.dtype for k in found.keys if isinstance(x := states[i][k], Tensor)]
        if all(
            k is torch.float64 if wide else k is not torch.float64
            for k in kinds
            if k.is_floating_point
        ):
            continue
        opt._find_slots()  # of the parameters as they are now
        for key, kind in zip(opt._slots[i].keys, opt._slots[i].kinds, strict=True):
            x = states[i].get(key)
            if isinstance(x, Tensor) and kind and x.dtype != kind[1]:
                raise TypeError(
                    f"{opt._label(i)} is {flat[i].dtype}, but its state {key!r} is {x.dtype}, of "
                    f"a parameter of another dtype (expected {kind[1]}): convert the model before "
                    "the first step, or the state after it, with "
                    "opt.load_state_dict(opt.state_dict())"
                )


def compiled_and_sharded() -> Exception:
    """The error for a compiled step on DTensors."""
    return ValueError(
        "parameters that are sharded (DTensor) are gathered in a step, which cannot be compiled: "
        "leave out compile=True or torch.compile(opt.step)"
    )


def evaluating(what: str) -> Exception:
    """The error for what must not happen between ``opt.eval()`` and ``opt.train()``."""
    return RuntimeError(
        f"{what} while the model holds the parameters for evaluation: call opt.train() first"
    )


def check_some(groups: Sequence[dict[str, Any]]) -> None:
    """Raises a ValueError when there is nothing to train."""
    if not any(group["params"] for group in groups):
        raise ValueError(
            "no group has any parameters: give model.parameters() (a generator that was used up "
            "before is empty), and see which have requires_grad"
        )


def not_finite(grads: Sequence[tuple[str, Any]], loss: Tensor | None) -> Exception:
    """The error for gradients that are not finite."""
    bad = [label for label, g in grads if not bool(_sharded.full(g).isfinite().all())]
    if loss is not None and not bool(loss.isfinite()):
        bad.append("the loss")
    listed = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    return FloatingPointError(
        f"infinite or NaN: gradient of {listed}; parameters and state are as they were. With "
        "nonfinite='skip' such steps are left out and counted"
    )
