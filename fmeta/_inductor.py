"""How what was recorded, and formulas written out number by number, are compiled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["recorded_options", "written_out_options"]

# Kernels of some microseconds on a CPU: to call them from Python takes as long as they do.
_ON_CPU: dict[str, Any] = {"cpp_wrapper": True}
# As it is, torch stores partial sums of many terms (and a layer of a network has many) and goes
# over them in several loops; and it rounds each product before it is added.
_WRITTEN_OUT: dict[str, Any] = {
    "realize_opcount_threshold": 10**6,
    "realize_cpu_opcount_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
    "realize_cpu_acc_reads_threshold": 10**6,
    "cpp.max_horizontal_fusion_size": 64,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def written_out_options() -> dict[str, Any]:
    """``options`` of `torch.compile`: those that this version of torch knows."""
    return _known(_WRITTEN_OUT)


def recorded_options(inputs: Iterable[Tensor], written_out: bool = False) -> dict[str, Any]:
    """The same for a recorded graph of these inputs, of formulas that are written out or not."""
    on_cpu = all(x.device.type == "cpu" for x in inputs)
    return _known({**(_ON_CPU if on_cpu else {}), **(_WRITTEN_OUT if written_out else {})})


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = torch._inductor.list_options()
    return {name: value for name, value in options.items() if name in known}
