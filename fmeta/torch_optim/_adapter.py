"""`LearnedOptimizer`: any fmeta optimizer as a `torch.optim.Optimizer`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fmeta import trees
from fmeta.torch_optim import _checks, _states
from fmeta.torch_optim._advance import Outputs, advance
from fmeta.torch_optim._before import Call, prepare
from fmeta.torch_optim._begun import TORN, Begun, begun, is_torn
from fmeta.torch_optim._evaluation import put_back, swap_in
from fmeta.torch_optim._graphs import kept_out, looked_through
from fmeta.torch_optim._loading import loaded_exactly
from fmeta.torch_optim._options import as_python, warn_of_unknown
from fmeta.torch_optim._rule import find_rule
from fmeta.torch_optim._slots import SKIPPED, Slots, slots_of

__all__ = ["LearnedOptimizer"]

Tree = Any
# Of each group beside its options; the last two say in a saved state whose it is.
_OTHERS = ("params", "param_names", "rule", "weights_hash")


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
        **numbers: refused: the numbers of a rule are arguments of its builder.

    Raises:
        ValueError: unknown rule, weights of another rule or not finite, no ``num_steps`` where
            needed, empty groups, options out of range.
        TypeError: an unknown option, parameters that are no real floating tensors, a torch
            optimizer instead of a rule, or a rule whose hidden state is no `fmeta.Hidden`.

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
        compile: bool | Mapping[str, Any] | None = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **numbers: Any,
    ) -> None:
        _checks.check_no_more(name_or_optimizer, numbers)
        _checks.check_options(nonfinite, fused, differentiable, compile)
        _checks.check_params(params)
        self._rule: Any = None
        self._names: list[str] | None = None
        self._slots: list[Slots] = []
        self._shared_slots: Any = None
        self._nonfinite = nonfinite
        self._compile = False if compile is None else compile
        self._compiled: Any = None
        self._owned = False  # whether no two tensors of the state share memory
        self._fresh: set[int] = set()  # parameters whose state nobody else was given
        self._begun: Begun | None = None  # a step that has not ended
        self._clean_for: list[Any] | None = None  # the update was checked for these gradients
        self._kept: list[tuple[Tensor, Tensor]] | None = None  # parameters, while evaluating
        self._weights: tuple[Any, Tree] | None = None
        num_steps = as_python(num_steps)
        defaults = {
            "lr": as_python(lr),
            "weight_decay": as_python(weight_decay),
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "num_steps": num_steps,
        }
        self._given: dict[str, Any] = {
            "name_or_optimizer": name_or_optimizer,
            "opt_params": opt_params,
            "nonfinite": nonfinite,
            "compile": compile,
        }
        super().__init__(params, defaults)
        self._given = {}
        _checks.check_some(self.param_groups)
        rule = find_rule(name_or_optimizer, opt_params, self._param_tree)
        _checks.check_rule(rule, num_steps)
        self._rule = rule
        for group in self.param_groups:
            group.update(rule=rule.name, weights_hash=rule.digest)
        self._find_slots()

    # Groups and trees

    @kept_out
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; also in the middle of a training."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _checks.check_group(group, self.param_groups)
            warn_of_unknown(group, [*self.defaults, *_OTHERS], self._given)
            if self._rule is not None:
                group.update(rule=self._rule.name, weights_hash=self._rule.digest)
                self._find_slots()
        except Exception:
            self.param_groups.pop()
            if self._rule is not None:
                self._find_slots()
            raise
        names = [n for group in self.param_groups for n in group.get("param_names", ())]
        self._names = names or None

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _tree(self, values: list[Any]) -> Any:
        return values if self._names is None else dict(zip(self._names, values, strict=True))

    def _param_tree(self) -> Any:
        return self._tree([p if p.is_floating_point() else None for p in self._params()])

    def _find_slots(self) -> None:
        names = [n for group in self.param_groups for n in group.get("param_names", ())]
        self._names = names or None
        self._clean_for = None
        self._fresh.clear()
        self._slots, self._shared_slots = slots_of(
            self._rule.optimizer, self._rule.opt_params, self._param_tree(), self._horizon()
        )
        self._stateful = any(s.keys for s in (*self._slots, self._shared_slots))

    def _keys(self) -> Any:
        return range(len(self._slots)) if self._names is None else self._names

    def _horizon(self) -> Any:
        return self.param_groups[0]["num_steps"]

    # The step

    def step(
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

    @looked_through
    def _step(self, closure: Any, loss: Any, extras: Any, traced: bool) -> Any:
        value = None
        if self._kept is not None:
            raise _checks.evaluating("step")
        if closure is not None:
            _checks.check_closure(closure)
            with torch.enable_grad():
                value = closure()
            loss = value if loss is None else loss
        run = advance if self._compile is False else self._compiled_advance()
        with torch.no_grad():
            call = self._before(loss, extras, traced or run is not advance)
            if call is not None:
                with _full_precision(call.device):
                    out = run(self._rule.optimizer, call.inputs)
                self._after(call, out)
        return value

    @kept_out
    def _before(self, loss: Any, extras: Any, traced: bool) -> Call | None:
        if is_torn(self._begun):
            self._begun = TORN
            raise RuntimeError(
                "the last step failed when it had begun to write over parameters or the hidden "
                "state: load a state_dict that was saved before it, or go on with what there is, "
                "opt.load_state_dict(opt.state_dict())"
            )
        call = prepare(self, loss, extras, traced)
        self._begun = begun(self, call)
        return call

    @kept_out
    def _after(self, call: Call, out: Outputs) -> None:
        common: dict[str, Any] = {}
        if not call.inputs.in_place:
            keys, slots, states = self._keys(), self._slots, call.states
            given = call.inputs.hidden.leaves
            for i in call.active:
                new = out.leaves[keys[i]]
                if new is not given[keys[i]]:  # else its memory took what is new
                    states[i].update(slots[i].entries(new))
            common = self._shared_slots.entries(out.shared)
            self._owned = False
            self._fresh.update(call.active)
            self._clean_for = call.layout if out.clean or not call.inputs.careful else None
        if out.skipped is not None:
            common = {**common, SKIPPED: out.skipped}
        _states.spread(self, common)
        self._begun = None

    @kept_out
    def _compiled_advance(self) -> Any:
        if self._compiled is None:
            given: Any = {} if self._compile is True else self._compile
            self._compiled = torch.compile(advance, **given)
        return self._compiled

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
        return _states.skipped_steps(self)

    # Evaluation

    def eval(self) -> None:
        """Puts the rule's parameters for evaluation (an average, say) into the model.

        Most rules have none, and nothing changes. `train` takes them back; until then there is no
        step.
        """
        if self._kept is None:
            self._kept = swap_in(self)

    def train(self) -> None:
        """Ends what `eval` began: the parameters are those of training again, bit for bit."""
        if self._kept is not None:
            put_back(self._kept)
            self._kept = None

    @contextlib.contextmanager
    def eval_params(self) -> Iterator[None]:
        """`eval` and, whatever happens, `train` again: ``with opt.eval_params(): ...``."""
        was = self._kept
        self.eval()
        try:
            yield
        finally:
            if was is None:
                self.train()

    # Saving and loading

    @kept_out
    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim, but that later steps do not change what is in it.

        Those of a compiled or ``capturable`` optimizer do, for they write into the same memory.
        """
        self._fresh.clear()
        found = super().state_dict()
        state = {k: dict(x) if isinstance(x, dict) else x for k, x in found["state"].items()}
        return {**found, "state": state}

    @kept_out
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state that `state_dict` gave, exactly.

        Raises:
            ValueError: for a state of another rule or of other weights.
        """
        if self._kept is not None:
            raise _checks.evaluating("load_state_dict")
        with loaded_exactly(self):
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved by a version with fewer options
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_compiled", "_weights")
        # A scheduler puts a step of its own here, which is bound to this very optimizer.
        bound = ("step", "_opt_called")
        state = {
            k: v
            for k, v in self.__dict__.items()
            if not k.startswith("_optimizer_") and k not in bound
        }
        begun = TORN if is_torn(self._begun) else None
        return {**state, **dict.fromkeys(dropped), "_fresh": set(), "_begun": begun}

    def __repr__(self) -> str:
        rule = self._rule
        learned = sum(x.numel() for x in trees.leaves(rule.opt_params) if isinstance(x, Tensor))
        lines = [
            f"Rule {rule.name}",
            f"    weights: {learned}" + (f", hash {rule.digest[:12]}" if learned else ""),
            f"    parameters: {len(self._slots)}, {sum(map(bool, self.state.values()))} with state",
        ]
        return super().__repr__()[:-1] + "\n".join([*lines, ")"])


@kept_out
def _full_precision(device: torch.device) -> Any:
    """The update is not for autocast; where that is off, nothing."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
