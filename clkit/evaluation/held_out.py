"""The held-out data that a stream is evaluated on: a fixed subset of each experience, and all of it at its end."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.batch import is_text
from clkit.data.check import read_few
from clkit.data.columns import take
from clkit.data.datamodule import stream_data
from clkit.data.datasets import in_memory
from clkit.data.loader import StreamLoader
from clkit.data.stream import Experience
from clkit.distributed import own_share
from clkit.evaluation.scores import Scorer
from clkit.evaluation.subsets import Stored, Subsets, choose, n_bytes, sum_dtype
from clkit.method.evaluation_mode import untouched
from clkit.method.forward import to_device
from clkit.method.routing import around_batches, by_route, mixer_of, route_of
from clkit.method.strategy import views_of

Split = Literal["test", "val"]


class HeldOut:
    """The held-out data of every experience, on the module's device as far as there is room for it.

    Args:
        trainer: The trainer.
        module: The module.
        split: ``"test"`` or ``"val"``.
        subset: Samples of each experience in the subset; all when ``None``.
        seed: Seed of their choice.
        batch_size: Samples in one forward.
        limit: Most bytes of the subsets to hold on the device, decoded; no limit when ``None``. What is beyond is kept
            as it is stored, beside the device, and decoded chunk by chunk. Texts are all held.

    Attributes:
        subsets: The subsets.
        full_counts: Number of all held-out samples of each experience, ``[K]``.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        split: Split,
        subset: int | None,
        seed: int,
        batch_size: int,
        limit: int | None = None,
    ) -> None:
        self.trainer, self.module, self.split, self.batch_size = trainer, module, split, batch_size
        stream = stream_data(trainer).stream
        sets = [held_out(experience, split) for experience in stream]
        self._chosen = [choose(_size(part), subset, seed, k) for k, part in enumerate(sets)]
        with untouched(trainer, module):
            batches: list[Any] = []
            for k, (part, rows) in enumerate(zip(sets, self._chosen, strict=True)):
                room = None if limit is None else limit - sum(n_bytes(b) for b in batches if not isinstance(b, Stored))
                batches.append(self._read(part, rows, f"experience {k}'s {split} data", room))
        self.subsets = Subsets(batches, [len(rows) for rows in self._chosen], batch_size, module.device)
        self.full_counts = self.subsets.counts.new_tensor([_size(part) for part in sets])
        self.route()

    def _read(self, dataset: Dataset[object], rows: Tensor, what: str, room: int | None) -> Any:
        """Return samples as a batch on the device or, where it takes more room than there is, as :class:`Stored`."""
        collate_fn, send = stream_data(self.trainer).collate_fn, partial(to_device, self.trainer)
        if room is not None:
            one = send(read_few(dataset, rows[:1], collate_fn, what))
            if len(rows) * n_bytes(one) > room and not is_text(one):
                samples = in_memory(dataset, rows) if collate_fn is None else None
                if samples is not None:
                    return Stored(samples.batch, send, len(rows))
                if self.module.device.type != "cpu":
                    return Stored(partial(take, read_few(dataset, rows, collate_fn, what)), send, len(rows))
        return send(read_few(dataset, rows, collate_fn, what))

    def route(self) -> None:
        """Find out anew which view, or which mixture, predicts which sample."""
        route, mixer = route_of(self.trainer), mixer_of(self.trainer)
        asked = [
            (experience, held_out(experience, self.split), rows)
            for experience, rows in zip(stream_data(self.trainer).stream, self._chosen, strict=True)
        ]
        if route is not None:
            self.subsets.views = [name for some in asked for name in route(*some)]
        if mixer is not None:
            self.subsets.shares = torch.cat([mixer.shares(*some) for some in asked]).to(self.module.device)

    def full_sums(self, scorer: Scorer, seen: range) -> Tensor:
        """Evaluate all held-out data of some experiences: this process's share of :meth:`Subsets.sums`."""
        return full_sums(self.trainer, self.module, self.split, self.batch_size, scorer, seen)


def full_sums(
    trainer: Trainer, module: LightningModule, split: Split, batch_size: int, scorer: Scorer, seen: range
) -> Tensor:
    """Evaluate all held-out data of some experiences, the last of which was learned last.

    Returns:
        Sums of scores, and numbers of those that are NaN, ``[2, K]``: this process's share.
    """
    data = stream_data(trainer)
    total = torch.zeros(2, len(data.stream), dtype=sum_dtype(module.device), device=module.device)
    route, views = route_of(trainer), views_of(trainer)
    with untouched(trainer, module):
        for k in seen:
            dataset = held_out(data.stream[k], split)
            own = torch.arange(_size(dataset))[own_share(trainer)]
            for name, rows in by_route(route, data.stream[k], dataset, own).items():
                around = around_batches(trainer, module, data.stream[k], dataset, rows)
                with views[name](module):
                    for n, batch in enumerate(StreamLoader(dataset, rows, batch_size, collate_fn=data.collate_fn)):
                        with around(slice(n * batch_size, (n + 1) * batch_size)):
                            values = scorer(module, to_device(trainer, batch), seen[-1], k).to(total.dtype)
                        undefined = values.isnan()
                        total[:, k] += torch.stack([values.masked_fill(undefined, 0.0).sum(), undefined.sum()])
    return total


def held_out(experience: Experience, split: Split) -> Dataset[object]:
    """Return one of the held-out datasets of an experience, as it is to be scored (its ``for_scores()``, if any)."""
    dataset: Dataset[object] = getattr(experience, split)
    return dataset.for_scores() if hasattr(dataset, "for_scores") else dataset


def _size(dataset: Dataset[object]) -> int:
    return len(dataset)  # type: ignore[arg-type]
