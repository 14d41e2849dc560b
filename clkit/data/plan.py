"""Which part of a stream each Lightning epoch is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

from clkit.errors import ConfigurationError, check_whole


class Plan:
    """How long each experience lasts, in Lightning epochs: passes over its samples, or some optimizer steps each.

    Args:
        n_experiences: Number of experiences K.
        epochs: Lightning epochs of each experience: one number, or one for each.
        steps: Optimizer steps of each instead: one number, or one for each.
        every: Steps of a Lightning epoch where ``steps`` count, fewer in an experience's last; all when ``None``.
        past: Lightning epochs and steps of the first experiences, which were learned by another plan; what is given for
            each is then for these too, or for the others alone.

    Attributes:
        epochs: Lightning epochs of each experience, K numbers.
        steps: Optimizer steps of each, K numbers; ``None`` where an epoch is a pass over the samples.

    Raises:
        ConfigurationError: If a number is out of range, or lists do not have one entry for each experience.
    """

    def __init__(
        self,
        n_experiences: int,
        epochs: int | Sequence[int] = 1,
        steps: int | Sequence[int] | None = None,
        every: int | None = None,
        past: Sequence[tuple[int, int | None]] = (),
    ) -> None:
        self.steps = None if steps is None else _for_each(n_experiences, "steps", steps, len(past))
        self._every = every
        self.epochs = (
            _for_each(n_experiences, "epochs", epochs, len(past))
            if self.steps is None
            else [1 if every is None else -(-number // every) for number in self.steps]
        )
        if any((steps is None) != (learned is None) for _, learned in past):
            own, other = ("epochs", "steps") if steps is None else ("steps", "epochs")
            raise ConfigurationError(
                f"What was learned is counted in {other}, and what comes in {own}; count {other} as before."
            )
        for k, (learned_epochs, learned_steps) in enumerate(past):
            self.epochs[k] = learned_epochs
            if self.steps is not None and learned_steps is not None:
                self.steps[k] = learned_steps
        self._ends = list(accumulate(self.epochs))

    @property
    def total_epochs(self) -> int:
        """Lightning epochs of the whole stream."""
        return self._ends[-1]

    @property
    def each(self) -> list[tuple[int, int | None]]:
        """Lightning epochs of each experience, and its steps where these count."""
        steps: Sequence[int | None] = [None] * len(self.epochs) if self.steps is None else self.steps
        return list(zip(self.epochs, steps, strict=True))

    @property
    def spans(self) -> list[range]:
        """The epochs of each experience."""
        return [range(first, after) for first, after in pairwise([0, *self._ends])]

    def experience(self, epoch: int) -> int:
        """Return the index of the experience that an epoch belongs to; of the last one for all that come later."""
        return min(bisect_right(self._ends, epoch), len(self.epochs) - 1)

    def within(self, epoch: int) -> int:
        """Return how many epochs of its experience come before an epoch."""
        return epoch - self.spans[self.experience(epoch)].start

    def left_after(self, epoch: int) -> int:
        """Return how many epochs of its experience come after an epoch."""
        return max(self._ends[self.experience(epoch)] - 1 - epoch, 0)

    def steps_in(self, epoch: int) -> int | None:
        """Return the optimizer steps of an epoch; ``None`` where it is a pass over the samples."""
        if self.steps is None:
            return None
        whole = self.steps[self.experience(epoch)]
        left = whole if self._every is None else min(self._every, whole - self._every * self.within(epoch))
        return max(left, 0)


def _for_each(n_experiences: int, name: str, value: int | Sequence[int], n_past: int = 0) -> list[int]:
    values = [value] * n_experiences if isinstance(value, int) else list(value)
    if len(values) == n_experiences - n_past > 0:
        values = [1] * n_past + values
    if len(values) != n_experiences:
        raise ConfigurationError(
            f"{name} has {len(values)} entries for {n_experiences} experiences; give one number, or one for each."
        )
    for entry in values:
        check_whole(name, entry, 1)
    return values
