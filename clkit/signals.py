"""Signals that ask a run to stop, answered between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What schedulers send before they take a machine away."""
_TAKEN = (*STOP, signal.SIGINT)


class StopSignals:
    """Notes the first of :data:`STOP`, or Ctrl-C, while it is open, so that training can save before it is answered.

    A second Ctrl-C is answered at once.

    Only the main thread can take signals: elsewhere, and in forked children such as loader workers, nothing changes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._owner = 0

    def open(self, **before: Any) -> None:
        """Take the signals over.

        Args:
            **before: Handlers by signal name that :meth:`answer` shall call instead of those found.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self.received, self._owner = None, os.getpid()
        for number in _TAKEN:
            if number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:
                continue  # of a job in the background
            found = signal.signal(number, self._note)
            self._before[number] = before.get(signal.Signals(number).name, found)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def answer(self) -> None:
        """Do now what was put off: call the handler from before, such as one that requeues the job, then end.

        Raises:
            SystemExit: If that handler did not raise it; the code is 128 and the signal's number.
            KeyboardInterrupt: After Ctrl-C.
        """
        number = self.received or signal.SIGTERM
        handler = self._before.get(number)
        self.close()
        if callable(handler) and self.received is not None:
            handler(number, None)
        raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGINT:
                return  # a terminal sends it to all; the training process ends its children
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received = number
            if number == signal.SIGINT and sys.stderr.isatty():
                print("\nclkit: saves at the end of this step; Ctrl-C again stops at once.", file=sys.stderr)
        elif number == signal.SIGINT:
            self.close()
            raise KeyboardInterrupt
