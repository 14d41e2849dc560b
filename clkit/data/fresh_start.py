"""A new fit starts fresh: callbacks begin it as they were before their first one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from pytorch_lightning import Callback

from clkit.errors import ConfigurationError
from clkit.notebook import settings_repr


class FreshStart(Callback):
    """A callback whose memory lasts for one fit: a new one finds it as it was before the first.

    What was assigned to an attribute after a fit, such as another strength, stays.
    """

    def __repr__(self) -> str:
        return settings_repr(self)


@dataclass
class _Snapshot:
    before: dict[str, Any] | None
    after: dict[str, Any] | None = None


_snapshots: WeakKeyDictionary[FreshStart, _Snapshot] = WeakKeyDictionary()


def start_fresh(callbacks: Sequence[FreshStart]) -> None:
    """Put the callbacks back into the state from before their last fit, and keep a copy of it for the next.

    Raises:
        ConfigurationError: If one that was used cannot be put back.
    """
    for callback in callbacks:
        if callback in _snapshots:
            _put_back(callback, _snapshots[callback])
    # one copy of all, so that what two of them share stays shared
    memo: dict[int, Any] = {id(callback): callback for callback in callbacks}
    for callback in callbacks:
        try:
            _snapshots[callback] = _Snapshot(copy.deepcopy(vars(callback), memo))
        except (TypeError, RuntimeError):
            _snapshots[callback] = _Snapshot(None)


def go_on(callbacks: Sequence[FreshStart]) -> None:
    """Let those that were never in a fit start, and all others go on with what they remember."""
    start_fresh([callback for callback in callbacks if callback not in _snapshots])


def end_fit(callbacks: Sequence[FreshStart]) -> None:
    """Note which values a fit left, to tell them from what is assigned later."""
    for callback in callbacks:
        if callback in _snapshots:
            _snapshots[callback].after = dict(vars(callback))


def _put_back(callback: FreshStart, snapshot: _Snapshot) -> None:
    if snapshot.before is None:
        name = type(callback).__name__
        raise ConfigurationError(
            f"This {name} has been in a fit before and cannot be copied, so it cannot start fresh; make a new {name}."
        )
    own, before, after = vars(callback), snapshot.before, snapshot.after
    for name in list(own):
        if after is None or own[name] is after.get(name, own):
            if name in before:
                own[name] = before[name]
            else:
                del own[name]
