"""Settings of the whole suite: one thread a worker, no files left behind, nothing seeded globally.

Tests draw from generators of their own (`torch.Generator().manual_seed(...)`, `fmeta.random`).
"""

import os

# Read by BLAS, OpenMP and matplotlib when they are first imported, here and in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile(
    "fmeta", deadline=None, derandomize=True, max_examples=15, database=None, print_blob=True
)
settings.load_profile("fmeta")
