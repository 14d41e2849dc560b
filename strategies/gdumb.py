"""Greedy sampler and dumb learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from clkit.data.datamodule import StreamDataModule, stream_data
from clkit.data.datasets import targets_of
from clkit.data.loader import read_samples
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_whole
from clkit.method.forward import to_device
from clkit.method.parameters import assign
from clkit.method.setup_checks import check_together, check_whole_head
from clkit.method.strategy import Strategy
from clkit.rng import private_rng


class GDumb(Strategy):
    r"""Keep a class-balanced memory, and train the initial network anew on nothing else.

    Samples come one by one, those of an experience in random order. One of class :math:`y` is kept if the memory holds
    fewer than :math:`M / |Y|` of its class, :math:`Y` being the classes seen so far; where the memory is full, a random
    sample of the largest class goes. At the start of each experience :math:`k` the module gets back its initial weights
    and buffers (BatchNorm's too), and a fresh optimizer and learning-rate schedule; the experience's epochs, or steps,
    are then trained on the memory as it is after experience :math:`k`. Nothing else is carried over, so what is
    evaluated before an experience's end shows a network in the middle of its training, not forgetting.

    The epochs are GDumb's own, as the memory is much smaller than the data: the paper trains 256. An epoch of the
    trainer holds as many of them as it takes to reach that number within the experience.

    Args:
        capacity: :math:`M`, at least 1.
        epochs: Times that the memory is gone through in an experience, at least; as often as the data module says when
            ``None``, or when that counts steps.
        seed: Seed of the memory's own random numbers.

    Raises:
        ConfigurationError: If ``capacity`` is out of range, or the stream has no classes.

    Reference: Prabhu et al., *GDumb: A Simple Approach that Questions Our Progress in Continual Learning*, ECCV 2020,
    algorithm 1.
    """

    renews_weights = True
    needs_start = True
    replaces_data = True
    renews_schedules = True

    def __init__(self, capacity: int = 200, *, epochs: int | None = 50, seed: int = 0) -> None:
        check_whole("capacity", capacity, 1)
        if epochs is not None:
            check_whole("epochs", epochs, 1)
        self.capacity, self.epochs, self.seed = capacity, epochs, seed
        self.initial: dict[str, Tensor] | None = None
        self._data: StreamDataModule | None = None
        self._sizes: list[int] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._data = data = stream_data(trainer)
        if any(not experience.classes for experience in data.stream):
            raise ConfigurationError(
                f"GDumb balances classes, but stream {data.stream.name!r} has none; use another strategy, such as "
                "ExperienceReplay."
            )
        check_together(trainer, "GDumb")
        parts = [experience.train for experience in data.stream]
        memories = balanced_memories([targets_of(part) for part in parts], self.capacity, self.seed)
        wanted = self.epochs if self.epochs is not None and data.steps is None else 1
        passes = [-(-wanted // epochs) for epochs in data.epochs]
        self._sizes = [len(memory) for memory in memories]
        data.train_sets = [
            Subset(ConcatDataset(parts[: k + 1]), memory * n)
            for k, (memory, n) in enumerate(zip(memories, passes, strict=True))
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_whole_head(trainer, pl_module, "GDumb")
        if self.initial is None:
            self.initial = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if experience.index > 0:
            assert self.initial is not None
            assign(module, self.initial)
            trainer.strategy.setup_optimizers(trainer)

    def remembered(self) -> Any:
        if self._data is None:
            return None
        k = self._data.experience.index
        rows = torch.arange(self._sizes[k])
        batch = read_samples(self._data.train_sets[k], rows, collate_fn=self._data.collate_fn)
        return batch if self._data.trainer is None else to_device(self._data.trainer, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.initial = state_dict["initial"]


def balanced_memories(labels: Sequence[Tensor], capacity: int, seed: int) -> list[list[int]]:
    """Return what a greedy class-balanced memory holds after each experience.

    Args:
        labels: Labels of each experience, ``int64``, ``[N_k]``.
        capacity: Samples in memory.
        seed: Seed of the order within an experience and of what is dropped.

    Returns:
        For each experience the positions of its samples in all experiences one after another, ascending.
    """
    held: dict[int, list[int]] = {}
    memories: list[list[int]] = []
    first = n_held = 0
    for k, targets in enumerate(labels):
        rng = private_rng(seed, 5, k)
        order = torch.from_numpy(rng.permutation(len(targets)))
        for position, label in zip(order.tolist(), targets[order].tolist(), strict=True):
            of_class = held.setdefault(label, [])
            if len(of_class) * len(held) >= capacity:
                continue
            if n_held == capacity:
                largest = max(held.values(), key=len)
                largest.pop(int(rng.integers(len(largest))))
            else:
                n_held += 1
            of_class.append(first + position)
        memories.append(sorted(position for positions in held.values() for position in positions))
        first += len(targets)
    return memories
