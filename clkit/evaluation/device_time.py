"""How long a part of a training takes, on a device that works while the program goes on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


class DeviceTime:
    """Adds up the time of blocks: on CUDA that between two events in the current stream, else the clock's.

    Args:
        device: Where the work of the blocks is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._blocks: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    @contextmanager
    def block(self) -> Iterator[None]:
        """Count the time inside; nothing is waited for."""
        start = self._mark()
        yield
        end = self._mark()
        if self._on_cuda:
            self._blocks.append((start, end))
            while self._blocks and self._blocks[0][1].query():
                self._add()
        else:
            self._seconds += end - start

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.monotonic()
        event = cast(Any, torch.cuda).Event(enable_timing=True)
        event.record()
        return event

    def taken(self) -> float:
        """Return the seconds since the last call; waits for the last block to be done."""
        while self._blocks:
            self._add()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add(self) -> None:
        start, end = self._blocks.popleft()
        end.synchronize()
        self._seconds += start.elapsed_time(end) / 1e3
