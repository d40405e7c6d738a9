"""Independent calls at the same time, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["in_threads"]


def in_threads(calls: Sequence[Callable[[], Any]], workers: int) -> list[Any]:
    """The results of the calls, in order.

    torch lets other threads run while an operation is at work, so calls of many operations that
    are not tiny share two cores well; better than two threads share each small operation.

    Args:
        calls: none may wait for another. Whether gradients are recorded is as here.
        workers: how many run at a time; with 1 there is no other thread.
    """
    if workers == 1 or len(calls) < 2:
        return [call() for call in calls]
    recording = torch.is_grad_enabled()

    def run(call: Callable[[], Any]) -> Any:
        with torch.set_grad_enabled(recording):  # a mode of the thread
            return call()

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, calls))
