"""Which process of a distributed run this one is, known before its process group exists."""

from __future__ import annotations

import os


def is_rank_zero() -> bool:
    """Tell whether this process does what only one may do: write results, print, hold the run's folder."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank), "0") == "0"
