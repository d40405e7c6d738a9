"""`LearnedOptimizer`: any fmeta optimizer as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.optimizer import Hidden
from fmeta.torch_optim import _checks
from fmeta.torch_optim._advance import GroupOptions, advance, all_finite
from fmeta.torch_optim._loading import loaded_exactly
from fmeta.torch_optim._rule import find_rule
from fmeta.torch_optim._slots import SKIPPED, Slots, slots_of, started

__all__ = ["LearnedOptimizer"]

Tree = Any


class LearnedOptimizer(torch.optim.Optimizer):
    """Any fmeta optimizer, hand-made or learned, as a `torch.optim.Optimizer`.

    A step is one functional update of all parameters of all groups together, and then
    ``p += lr * delta - lr * weight_decay * p`` with the options of each parameter's group. With
    ``lr=1`` and no decay the trajectory is that of `Optimizer.step`. The rule sees the parameters
    as a dict by name where they come with names (``model.named_parameters()``), else as a list;
    those without a gradient are ``None``, and neither they nor their state change.

    Args:
        params: parameters, named parameters, or groups of them (dicts with ``"params"``).
        name_or_optimizer: the name of a rule in `fmeta.optimizers`, a file of weights for
            `fmeta.pretrained.load`, or an `fmeta.Optimizer`.
        opt_params: weights of the rule, copied. Default: those of the file, or ``init()``, which
            are untrained.
        lr: factor of the rule's update (its own learning rate is in the rule). A number, or a
            scalar tensor that a scheduler fills. An option of each group.
        weight_decay: rate of decoupled decay, times ``lr``. An option of each group.
        num_steps: how many steps there will be, for rules that need to know.
        maximize: climb instead of descend. An option of each group.
        nonfinite: what happens when a gradient (or the loss, where the rule reads it) is infinite
            or NaN. ``"allow"``: nothing, as in torch.optim; ``"skip"``: the step changes nothing
            and is counted in `skipped_steps`; ``"raise"``: a FloatingPointError names the
            parameters, which waits for the device.
        compile: True compiles the update with `torch.compile`, once; a dict gives its arguments.
        foreach: for compatibility; all parameters are always updated together.
        fused: refused if True.
        capturable: keep the hidden state in the same memory from step to step, so that a step can
            be captured in a CUDA graph.
        differentiable: refused if True; training that is differentiated is `fmeta.unroll`.

    Raises:
        ValueError: unknown rule, weights of another rule, no ``num_steps`` where needed, empty
            groups, options out of range.
        TypeError: parameters that are no real floating tensors, a torch optimizer instead of a
            rule, or a rule whose hidden state is no `fmeta.Hidden`.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = LearnedOptimizer([w], "adam", lr=100.0)
        >>> w.square().sum().backward()
        >>> opt.step()
        >>> w.detach()
        tensor([0.9000, 0.9000])
    """

    def __init__(
        self,
        params: Any,
        name_or_optimizer: Any,
        opt_params: Tree = None,
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        num_steps: int | None = None,
        maximize: bool = False,
        nonfinite: str = "allow",
        compile: bool | Mapping[str, Any] = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        _checks.check_options(nonfinite, fused, differentiable)
        self._rule: Any = None
        self._names: list[str] | None = None
        self._slots: list[Slots] = []
        self._shared_slots: Any = None
        self._nonfinite = nonfinite
        self._compile = compile
        self._compiled: Any = None
        self._checked = False
        self._weights: tuple[Any, Tree] | None = None
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "num_steps": num_steps,
        }
        super().__init__(params, defaults)
        rule = find_rule(name_or_optimizer, opt_params, self._param_tree)
        _checks.check_horizon(rule, num_steps)
        self._rule = rule
        for options in (self.defaults, *self.param_groups):
            options.update(rule=rule.name, weights_hash=rule.digest)
        self._find_slots()

    # Groups and trees

    @torch.compiler.disable
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; also in the middle of a training."""
        super().add_param_group(param_group)
        try:
            _checks.check_group(self.param_groups[-1], self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        names = [n for group in self.param_groups for n in group.get("param_names", ())]
        self._names = names or None
        if self._rule is not None:
            self._find_slots()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _tree(self, values: list[Any]) -> Any:
        return values if self._names is None else dict(zip(self._names, values, strict=True))

    def _param_tree(self) -> Any:
        return self._tree([p if p.is_floating_point() else None for p in self._params()])

    def _find_slots(self) -> None:
        self._slots, self._shared_slots = slots_of(
            self._rule.optimizer, self._rule.opt_params, self._param_tree(), self._horizon()
        )

    def _horizon(self) -> Any:
        return self.param_groups[0]["num_steps"]

    # The step

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Any = None,
        extras: Mapping[str, Any] | None = None,
    ) -> Any:
        """Updates all parameters that have a gradient.

        Args:
            closure: evaluates the model and its gradients, and returns the loss.
            loss: the loss, for rules that need it where there is no closure.
            extras: further inputs of the rule, by the names in its ``needs``.

        Returns:
            What the closure returned (None without one).

        Raises:
            ValueError: when something that the rule needs was not given, a gradient is sparse, or
                the parameters are on several devices.
            FloatingPointError: with ``nonfinite="raise"``.
        """
        return self._step(closure, loss, extras, torch.compiler.is_compiling())

    @torch.compiler.disable(recursive=False)
    def _step(self, closure: Any, loss: Any, extras: Any, traced: bool) -> Any:
        value = None
        if closure is not None:
            _checks.check_closure(closure)
            with torch.enable_grad():
                value = closure()
            loss = value if loss is None else loss
        with torch.no_grad():
            self._run(loss, extras, traced)
        return value

    def _run(self, loss: Any, extras: Any, traced: bool) -> None:
        optimizer = self._rule.optimizer
        flat: list[Tensor] = []
        grads: list[Tensor | None] = []
        runs: list[tuple[dict[str, Any], list[int]]] = []
        for group in self.param_groups:
            here: list[int] = []
            for p in group["params"]:
                g = p.grad
                if g is not None:
                    if g.layout is not torch.strided:
                        raise _checks.sparse(self._label(len(flat)), g)
                    here.append(len(flat))
                flat.append(p)
                grads.append(g)
            runs.append((group, here))
        active = [i for _, here in runs for i in here]
        if not active:
            return
        device = _checks.one_device(flat, active, self._label)
        loss = _checks.as_loss(loss, device)
        only_start = _checks.check_given(optimizer.needs, loss, extras, self.param_groups)
        states, shared, skipped = self._states(flat, active)
        if only_start:
            return
        if self._nonfinite != "allow" and (self._nonfinite == "raise" or device.type == "cpu"):
            read = loss if "loss" in optimizer.needs else None
            if (
                not traced
                and not self._compile
                and not bool(
                    all_finite([grads[i] for i in active], read)  # type: ignore[misc]
                )
            ):
                if self._nonfinite == "raise":
                    raise _checks.not_finite([(self._label(i), grads[i]) for i in active], read)
                self._store_everywhere({SKIPPED: skipped + 1})
                return
        names = self._names
        keys: Any = range(len(flat)) if names is None else names
        in_place = bool(traced or self._compile or any(g["capturable"] for g in self.param_groups))
        everywhere = len(active) == len(flat)
        params: list[Any] = flat if everywhere else [None] * len(flat)
        leaves: list[Any] = [{}] * len(flat)
        for i in active:
            params[i] = flat[i]
            leaves[i] = self._slots[i].read(states[i])
        run = advance
        if self._compile:
            if self._compiled is None:
                given = {} if self._compile is True else dict(self._compile)
                self._compiled = torch.compile(advance, **given)
            run = self._compiled
        new, shared, skipped = run(
            optimizer,
            self._weights_on(device),
            self._tree(params),
            self._tree(grads),
            Hidden(self._tree(leaves), shared),
            [
                GroupOptions(
                    [keys[i] for i in here],
                    *_numbers(group, bool(traced or self._compile)),
                    group["maximize"],
                )
                for group, here in runs
                if here
            ],
            loss,
            extras,
            skipped if self._nonfinite == "skip" else None,
            in_place,
        )
        if not in_place:
            for i in active:
                states[i].update(self._slots[i].entries(new[keys[i]]))
        common = {} if in_place else self._shared_slots.entries(shared)
        if self._nonfinite == "skip":
            common = {**common, SKIPPED: skipped}
        self._store_everywhere(common)

    def _states(self, flat: list[Tensor], active: list[int]) -> tuple[list[Any], Tree, Any]:
        """The dict of each active parameter, state of the whole model, count of skipped steps."""
        states: list[Any] = [None] * len(flat)
        new = []
        for i in active:
            states[i] = self.state.get(flat[i])
            if not self._slots[i].held_by(states[i]):
                new.append(i)
        slots = self._shared_slots
        holder = next((s for s in self.state.values() if slots.held_by(s)), None)
        if new or (holder is None and slots.keys):
            chosen = new if holder is not None or not slots.keys else active
            some: list[Any] = [None] * len(flat)
            for i in chosen:
                some[i] = flat[i]
            hidden = started(
                self._rule.optimizer,
                self._weights_on(flat[active[0]].device),
                self._tree(some),
                self._horizon(),
            )
            keys: Any = range(len(flat)) if self._names is None else self._names
            for i in new:
                own = self._slots[i].entries(hidden.leaves[keys[i]])
                self.state[flat[i]] = states[i] = {**(states[i] or {}), **own}
            if holder is None:
                holder = slots.entries(hidden.shared)
        for i in active:
            if states[i] is None:
                states[i] = self.state[flat[i]]
        shared = {} if holder is None else slots.read(holder)
        skipped = None
        if self._nonfinite == "skip":
            skipped = self.skipped_steps.to(flat[active[0]].device)
        self._store_everywhere(
            {**slots.entries(shared), **({} if skipped is None else {SKIPPED: skipped})}
        )
        return states, shared, skipped

    def _store_everywhere(self, entries: dict[str, Any]) -> None:
        if entries:
            for state in self.state.values():
                if isinstance(state, dict):
                    state.update(entries)

    def _weights_on(self, device: torch.device) -> Tree:
        if self._weights is None or self._weights[0] != device:
            moved = trees.map(
                lambda x: x.to(device) if isinstance(x, Tensor) else x, self._rule.opt_params
            )
            self._weights = (device, moved)
        return self._weights[1]

    def _label(self, i: int) -> str:
        return f"parameter {i}" if self._names is None else f"parameter {self._names[i]}"

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps had no effect because of gradients that were not finite (int64)."""
        for state in self.state.values():
            if isinstance(state, dict) and SKIPPED in state:
                return state[SKIPPED]
        return torch.zeros((), dtype=torch.int64)

    # Saving and loading

    @torch.compiler.disable
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state that `state_dict` gave, exactly.

        Raises:
            ValueError: for a state of another rule or of other weights.
        """
        with loaded_exactly(self):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_compiled", "_weights")
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}
        return {**state, **dict.fromkeys(dropped)}

    def __repr__(self) -> str:
        rule = self._rule
        learned = sum(x.numel() for x in trees.leaves(rule.opt_params) if isinstance(x, Tensor))
        head = f"rule {rule.name}, {learned} weights {rule.digest[:12]}"
        return super().__repr__().replace(" (", f" ({head}", 1)


def _numbers(group: dict[str, Any], as_tensors: bool) -> tuple[Any, Any]:
    """Learning rate and decay of a group; tensors where Python numbers would be compiled in."""
    lr, decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    if as_tensors:
        lr = torch.as_tensor(lr, dtype=torch.float64) if not isinstance(lr, Tensor) else lr
        if decay != 0:
            decay = torch.as_tensor(decay, dtype=torch.float64)
    return lr, decay
