"""clkit: continual learning with PyTorch Lightning.

Public names are imported on first use, so that ``import clkit`` and ``clkit --help`` stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy_exports import lazy_exports
from clkit.lightning_name import follow_lightning

if TYPE_CHECKING:
    from clkit.data.datamodule import StreamDataModule as StreamDataModule
    from clkit.data.datasets import InMemoryDataset as InMemoryDataset
    from clkit.data.stop_when import StopWhen as StopWhen
    from clkit.data.stream import Experience as Experience
    from clkit.data.stream import Stream as Stream
    from clkit.errors import ConfigurationError as ConfigurationError
    from clkit.evaluation.drift import ModuleDrift as ModuleDrift
    from clkit.evaluation.flops import Flops as Flops
    from clkit.evaluation.gradients import GradientNorms as GradientNorms
    from clkit.evaluation.kept_data import KeepHeldOut as KeepHeldOut
    from clkit.evaluation.stability_gap import StabilityGap as StabilityGap
    from clkit.method.adapters import SaveAdapters as SaveAdapters
    from clkit.method.optimizer import ResetOptimizer as ResetOptimizer
    from clkit.method.strategy import Strategy as Strategy
    from clkit.method.train_only import TrainOnly as TrainOnly
    from clkit.metrics.history import History as History
    from clkit.models.classifier import Classifier as Classifier
    from clkit.run.checkpoint import StreamCheckpoint as StreamCheckpoint
    from clkit.run.progress import StreamProgress as StreamProgress
    from clkit.run.trained import load as load

follow_lightning()

__version__ = "0.1.0"

_PUBLIC = {
    "Classifier": "clkit.models.classifier",
    "ConfigurationError": "clkit.errors",
    "Experience": "clkit.data.stream",
    "Flops": "clkit.evaluation.flops",
    "GradientNorms": "clkit.evaluation.gradients",
    "History": "clkit.metrics.history",
    "InMemoryDataset": "clkit.data.datasets",
    "KeepHeldOut": "clkit.evaluation.kept_data",
    "ModuleDrift": "clkit.evaluation.drift",
    "ResetOptimizer": "clkit.method.optimizer",
    "SaveAdapters": "clkit.method.adapters",
    "StabilityGap": "clkit.evaluation.stability_gap",
    "StopWhen": "clkit.data.stop_when",
    "Strategy": "clkit.method.strategy",
    "Stream": "clkit.data.stream",
    "StreamCheckpoint": "clkit.run.checkpoint",
    "StreamDataModule": "clkit.data.datamodule",
    "StreamProgress": "clkit.run.progress",
    "TrainOnly": "clkit.method.train_only",
    "load": "clkit.run.trained",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
