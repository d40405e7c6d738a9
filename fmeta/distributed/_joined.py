"""Joining the processes that ``torchrun`` started, and leaving them with a word."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from fmeta.distributed._ranks import RankLost, Ranks
from fmeta.distributed._watch import Watch

__all__ = ["joined"]


@contextmanager
def joined(
    *, backend: str | None = None, patience: float = 20.0, redraws: bool = True
) -> Iterator[Ranks]:
    """The processes of this job, joined for a ``with`` block.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``, as
    ``torchrun`` sets them; without them the process is alone. When one rank ends by an error, is
    killed, or gives no sign of life, all others get a `RankLost` that says which and why.

    Args:
        backend: of `torch.distributed`; default gloo on the CPU and, where each process has a
            graphics card, nccl for what lies there.
        patience: seconds without a sign of life after which a rank counts as lost. Signs come from
            a thread of their own, so that a long step is no silence.
        redraws: as in `Ranks`.

    Yields:
        `Ranks`.

    Raises:
        RankLost: in the block, from whatever needs the other processes.
        ValueError: variables of the environment that make no sense.

    Example:
        >>> with joined() as ranks:
        ...     ranks
        Ranks(rank=0, size=1)
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield Ranks.alone()
        return
    rank, local = _number("RANK"), _number("LOCAL_RANK", 0)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"WORLD_SIZE is {size}, but {name} is not set: start with torchrun")
    if backend is None:
        has_card = torch.cuda.is_available() and local < torch.cuda.device_count()
        backend = "cpu:gloo,cuda:nccl" if has_card else "gloo"
        if has_card:
            torch.cuda.set_device(local)
    base, rank, size = next(iter(dist.rendezvous("env://")))
    # torchrun starts all anew after a failure when it is told to, with the same store.
    prefix = f"fmeta/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    # Long, because a rank may rightly wait for a slow one: the watch notices those that ended.
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"{prefix}/group", base),
        rank=rank,
        world_size=size,
        timeout=timedelta(hours=12),
    )
    own = dist.PrefixStore(f"{prefix}/watch", base.clone())
    watch = Watch(own, rank, size, patience=patience)
    ranks = Ranks(rank, size, None, watch, redraws=redraws)
    atexit.register(_leave_at_once, watch)
    try:
        yield ranks
        ranks.wait_for_all()
        dist.destroy_process_group()
    except RankLost:
        raise
    except BaseException as error:
        with suppress(RuntimeError):  # the store may be gone as well
            watch.say(_last_word(error))
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2.5 * watch.interval)  # the store ends with this process: let all read it
        raise
    finally:
        watch.stop()


def _leave_at_once(watch: Watch) -> None:
    """An exchange that will never end would keep the process from ending."""
    if watch.lost is not None or watch.has_spoken:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _last_word(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ValueError(f"{name} must be a number, got {text!r}: start with torchrun")
    return int(text)
