"""Plain finetuning."""

from __future__ import annotations

from clkit.data.stream import Stream
from clkit.method.strategy import Strategy


class Naive(Strategy):
    """Train on the current experience only: the lower bound that every method is compared with."""

    works_sharded = True

    def leaves_first(self, stream: Stream) -> bool:
        return True
