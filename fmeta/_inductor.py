"""How formulas that are written out number by number are compiled."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["written_out_options"]

# As it is, torch stores partial sums of many terms (and a layer of a network has many) and goes
# over them in several loops; and it rounds each product before it is added.
_OPTIONS: dict[str, Any] = {
    "realize_opcount_threshold": 10**6,
    "realize_cpu_opcount_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
    "realize_cpu_acc_reads_threshold": 10**6,
    "cpp.max_horizontal_fusion_size": 64,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def written_out_options() -> dict[str, Any]:
    """``options`` of `torch.compile`: those that this version of torch knows."""
    known = torch._inductor.list_options()
    return {name: value for name, value in _OPTIONS.items() if name in known}
