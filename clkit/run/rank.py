"""Which process of a distributed run this one is, known before its process group exists."""

from __future__ import annotations

import os


def is_rank_zero() -> bool:
    """Tell whether this process does what only one may do: write results, print, hold the run's folder."""
    rank = os.environ.get("RANK")
    if rank:
        return rank == "0"
    # Lightning's own start on a node: its first process has no rank of any kind, but the node's
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_PROCID") or "0"
    return node == local == "0"
