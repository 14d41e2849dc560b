"""Which evaluator does the work, by the settings of the user."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import FSDPStrategy

from clkit.distributed import holds_shards
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.device_evaluator import DeviceEvaluator
from clkit.evaluation.evaluator import Evaluator, SnapshotEvaluator
from clkit.evaluation.lazy_evaluator import LazyEvaluator
from clkit.evaluation.prefix import FrozenPrefix
from clkit.evaluation.process_evaluator import ProcessEvaluator
from clkit.evaluation.scores import Scorer
from clkit.evaluation.subsets import Subsets


@dataclass(frozen=True)
class EvaluatorChoice:
    """The settings of :class:`~clkit.StabilityGap` that say where and how evaluations are computed, see there.

    Raises:
        ConfigurationError: If they exclude each other or are out of range.
    """

    prefix_cache: bool
    prefix_cache_limit: int
    snapshots: int
    asynchronous: bool
    device: str | None
    queue: int
    lazy: bool
    seed: int

    def __post_init__(self) -> None:
        check_whole("snapshots", self.snapshots, 1)
        check_whole("queue", self.queue, 1)
        if self.asynchronous + (self.snapshots > 1) + self.lazy > 1:
            raise ConfigurationError("asynchronous, snapshots above 1 and lazy exclude each other; use one of them.")
        if self.device is not None and not self.asynchronous:
            raise ConfigurationError(f"device={self.device!r} is for asynchronous=True; set that too, or leave it out.")
        if self.device is not None:
            _device(self.device)

    @property
    def copies_weights(self) -> bool:
        """Whether evaluations are of copies of the weights."""
        return self.asynchronous or self.lazy or self.snapshots > 1

    def in_process(self, device: torch.device) -> bool:
        """Whether evaluations of a module on a device happen in a process of their own."""
        return self.asynchronous and self.device is None and device.type == "cpu"

    def check(self, trainer: Trainer) -> None:
        """Refuse a trainer whose weights cannot be evaluated so.

        Raises:
            ConfigurationError: If it shards them, or they are copied and the module's head grows.
        """
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ConfigurationError(
                "FSDPStrategy gives the weights out within a training step only; use trainer=fsdp, Lightning's "
                "ModelParallelStrategy, with which they can be evaluated."
            )
        if getattr(trainer.lightning_module, "grows", False) and self.copies_weights:
            raise ConfigurationError(
                "asynchronous, lazy and snapshots copy weights of one shape, but the head grows; leave them out."
            )
        if holds_shards(trainer) and self.copies_weights:
            raise ConfigurationError(
                "asynchronous, lazy and snapshots copy whole weights, but the trainer shards them; leave them out."
            )

    def build(self, trainer: Trainer, module: LightningModule, subsets: Subsets, scorer: Scorer) -> Evaluator:
        """Build the evaluator.

        Raises:
            ConfigurationError: If it cannot work with the module or the strategies.
        """
        if (subsets.views is not None or subsets.shares is not None) and self.copies_weights:
            raise ConfigurationError(
                "A strategy predicts some samples with other weights than others, which asynchronous, lazy and "
                "snapshots cannot follow; leave them out."
            )
        parts = (trainer, module, subsets, scorer)
        if self.in_process(module.device):
            return ProcessEvaluator(
                *parts, use_prefix=self.prefix_cache, limit=self.prefix_cache_limit, queue=self.queue
            )
        if self.asynchronous:
            there = module.device if self.device is None else _device(self.device)
            return DeviceEvaluator(
                *parts, device=there, use_prefix=self.prefix_cache, limit=self.prefix_cache_limit, queue=self.queue
            )
        if self.lazy:
            return LazyEvaluator(*parts, seed=self.seed)
        if self.snapshots > 1:
            return SnapshotEvaluator(*parts, self.snapshots)
        cached = self.prefix_cache and not holds_shards(trainer)
        return Evaluator(*parts, FrozenPrefix(module, self.prefix_cache_limit) if cached else None)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"device={name!r} is not possible here ({reason}); leave it out.") from error
