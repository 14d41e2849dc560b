"""Fixed-size memories of past samples: private random numbers, vectorised insertion and sampling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import numpy as np
import torch
from pytorch_lightning import Trainer

from clkit.data.batch import local_share
from clkit.data.columns import describe, size_of
from clkit.data.datamodule import stream_data
from clkit.data.datasets import is_class, labels_of
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.memory.storage import DISK, ImageMemory, KeepImage, Slots, Storage, make_storage
from clkit.rng import private_rng, rng_state, set_rng_state


class ReservoirBuffer:
    r"""Keeps a uniform random sample of everything inserted (Vitter's algorithm R).

    Sample number :math:`n` (from 0) goes to slot :math:`n` while there is room; after that to slot
    :math:`j \sim U\{0..n\}` if :math:`j < M`. After :math:`N` samples each one is kept with probability :math:`M/N`.
    A whole batch is inserted by one indexed copy, with the result that inserting one by one would have.

    Args:
        capacity: :math:`M`, the largest number of samples held, at least 0.
        seed: Seed of the buffer's own random numbers, at least 0.
        device: Where samples are kept; on the device of the first batch when ``None``. Texts (batches with an
            ``attention_mask``) are kept on the CPU, unpadded, or in a temporary file for ``"disk"``.
        images: What is kept of the images of texts: ``"references"``, their numbers, so that they are read from the
            stream; ``"encoded"``, their files too; or ``"features"`` in their place, those of the model's tower.

    Attributes:
        keep: Returns what is to be kept of an image; see :func:`~clkit.method.setup_checks.check_memory`.

    Raises:
        ConfigurationError: If ``capacity`` is negative, or ``images`` unknown.
    """

    def __init__(
        self,
        capacity: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        images: ImageMemory = "references",
    ) -> None:
        check_whole("capacity", capacity, 0)
        check_choice("images", images, get_args(ImageMemory))
        try:
            torch.empty(0, device=None if device == DISK else device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"device={device!r} is not possible here ({reason}); use null, cpu or disk."
            ) from error
        self.capacity, self.device, self.images = capacity, device, images
        self.keep: KeepImage | None = None
        self.rng = private_rng(seed, 2)
        self.n_seen = 0
        self.storage: Storage | None = None

    def __len__(self) -> int:
        return len(self.occupied())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {self.capacity} samples held, {self.n_seen} seen)"

    def occupied(self) -> Slots:
        """Slots that hold a sample, ``int64``, shape ``[len(self)]``."""
        return np.arange(min(self.n_seen, self.capacity))

    def insert(self, batch: Any) -> None:
        """Insert every sample of a batch of tensors ``[B, ...]`` and lists of ``B`` strings.

        Raises:
            ConfigurationError: If the samples' shapes differ from those already held, but for the lengths of texts.
        """
        n_new = size_of(batch)
        if self.storage is None:
            self.storage = make_storage(batch, self.capacity, self.device, self.keep)
        slots = self._choose_slots(batch, n_new)
        self.n_seen += n_new
        kept = np.flatnonzero(slots < self.capacity)
        # of several samples for one slot the last one stays, as if they came one by one
        targets, last = np.unique(slots[kept][::-1], return_index=True)
        if len(targets):
            self.storage.write(targets, batch, kept[::-1][last])

    def check(self, batches: Iterable[Any]) -> None:
        """Make sure that samples like these can be kept together; this memory stays as it is.

        Raises:
            ConfigurationError: If they cannot.
        """
        batches = list(batches)
        trial = type(self)(sum(map(size_of, batches)), device=self.device)
        for batch in batches:
            trial.insert(batch)

    def sample(self, n: int) -> Any:
        """Return ``min(n, len(self))`` different samples drawn uniformly, as a batch; ``None`` when there are none."""
        occupied = self.occupied()
        n = min(n, len(occupied))
        return self._read(self.rng.choice(occupied, n, replace=False)) if n > 0 else None

    def contents(self) -> Any:
        """Return all samples held, as a batch; ``None`` when there are none."""
        return self._read(self.occupied()) if len(self) else None

    def clear(self) -> None:
        """Drop all samples and start over; the random numbers go on."""
        self.storage = None
        self.n_seen = 0

    def to(self, device: torch.device) -> None:
        """Move the samples to ``device``, unless the buffer was made with a device of its own."""
        if self.device is None and self.storage is not None:
            self.storage.to(device)

    def _choose_slots(self, batch: Any, n_new: int) -> Slots:
        """Slot for each new sample, shape ``[B]``; numbers from ``capacity`` on mean that it is not kept."""
        numbers = np.arange(self.n_seen, self.n_seen + n_new)
        return np.where(numbers < self.capacity, numbers, self._draw_up_to(numbers))

    def _draw_up_to(self, numbers: Slots) -> Slots:
        return (self.rng.random(len(numbers)) * (numbers + 1)).astype(np.int64)

    def _read(self, slots: Slots) -> Any:
        assert self.storage is not None
        return self.storage.read(slots)

    def state_dict(self) -> dict[str, Any]:
        samples = None if self.storage is None else self.storage.packed(self.occupied())
        return {"samples": samples, "capacity": self.capacity, "n_seen": self.n_seen, "rng": rng_state(self.rng)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ConfigurationError: If that memory was full at another capacity: what it holds is no sample of this one's.
        """
        there = state.get("capacity", self.capacity)
        if min(state["n_seen"], there) != min(state["n_seen"], self.capacity):
            raise ConfigurationError(
                f"capacity={self.capacity} is not possible for a memory that goes on: it has seen {state['n_seen']} "
                f"samples with capacity={there}. Keep that, or start it fresh (fresh=[NAME] beside from=RUN, "
                "StreamDataModule(fresh=[CLASS]))."
            )
        self.n_seen = state["n_seen"]
        set_rng_state(self.rng, state["rng"])
        self.storage = None
        if state["samples"] is not None:
            self.storage = make_storage(state["samples"], self.capacity, self.device, self.keep)
            self.storage.unpack(self.occupied(), state["samples"])


class ClassBalancedBuffer(ReservoirBuffer):
    r"""Holds an equal share of every class seen so far, each a reservoir of that class.

    The quota is :math:`\lfloor M/C \rfloor`; the remainder goes to the classes that came first. When a new class
    appears the others shrink at random.
    """

    def __init__(self, capacity: int, **options: Any) -> None:
        super().__init__(capacity, **options)
        self.slots: dict[int, Slots] = {}
        self.seen: dict[int, int] = {}

    def clear(self) -> None:
        super().clear()
        self.slots, self.seen = {}, {}

    def occupied(self) -> Slots:
        return np.concatenate([np.empty(0, dtype=np.int64), *self.slots.values()])

    def _choose_slots(self, batch: Any, n_new: int) -> Slots:
        given = labels_of(batch)
        if given.dim() != 1 or not is_class(given[:1]):
            raise ConfigurationError(
                f"A class-balanced buffer needs the number of one class a sample and got labels {describe(given)}; "
                "use a reservoir."
            )
        labels = given.cpu().numpy()
        for label in dict.fromkeys(labels.tolist()):
            self.slots.setdefault(label, np.empty(0, dtype=np.int64))
            self.seen.setdefault(label, 0)
        share, remainder = divmod(self.capacity, len(self.slots))
        quotas = {label: share + (position < remainder) for position, label in enumerate(self.slots)}
        for label, held in self.slots.items():
            if len(held) > quotas[label]:
                self.slots[label] = np.sort(self.rng.choice(held, quotas[label], replace=False))
        chosen = np.empty(n_new, dtype=np.int64)
        for label in self.slots:
            rows = np.flatnonzero(labels == label)
            if len(rows):
                chosen[rows] = self._reservoir(label, quotas[label], len(rows))
        return chosen

    def _reservoir(self, label: int, quota: int, n_new: int) -> Slots:
        n_room = min(quota - len(self.slots[label]), n_new)
        room = np.setdiff1d(np.arange(self.capacity), self.occupied())[:n_room] if n_room else np.arange(0)
        self.slots[label] = held = np.concatenate([self.slots[label], room])
        drawn = self._draw_up_to(np.arange(self.seen[label] + n_room, self.seen[label] + n_new))
        self.seen[label] += n_new
        replaced = np.append(held, self.capacity)[np.minimum(drawn, len(held))]
        return np.concatenate([room, replaced])

    def state_dict(self) -> dict[str, Any]:
        slots = {label: held.tolist() for label, held in self.slots.items()}
        return {**super().state_dict(), "slots": slots, "seen": dict(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slots = {label: np.asarray(held, dtype=np.int64) for label, held in state["slots"].items()}
        self.seen = dict(state["seen"])
        super().load_state_dict(state)


def draw_replay(trainer: Trainer, buffer: ReservoirBuffer, batch: Any, size: int | None) -> Any:
    """Draw samples to replay beside a batch, for this process, augmented anew; ``None`` when there are none.

    Args:
        trainer: The trainer.
        buffer: A memory that is the same on every process.
        batch: The new batch.
        size: Samples per process; as many as the batch has when ``None``.
    """
    drawn = buffer.sample((size or size_of(batch)) * trainer.world_size)
    return None if drawn is None else stream_data(trainer).augmented(local_share(trainer, drawn))
