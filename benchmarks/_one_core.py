"""To be imported before torch and JAX: one thread and one core for the whole process.

Compilers begin with nothing and work within the process, so that their CPU time is seen.
"""

from __future__ import annotations

import os
import tempfile

__all__ = ["CACHE"]

CACHE = tempfile.TemporaryDirectory(prefix="benchmark")  # of torch's compiler

os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
