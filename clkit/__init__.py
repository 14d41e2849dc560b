"""clkit: continual learning with PyTorch Lightning.

Public names are imported on first use, so that ``import clkit`` and ``clkit --help`` stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy import lazy_exports

if TYPE_CHECKING:
    from clkit.adapters import SaveAdapters as SaveAdapters
    from clkit.checkpoint import StreamCheckpoint as StreamCheckpoint
    from clkit.classifier import Classifier as Classifier
    from clkit.datamodule import StreamDataModule as StreamDataModule
    from clkit.datasets import InMemoryDataset as InMemoryDataset
    from clkit.errors import ConfigurationError as ConfigurationError
    from clkit.evaluation.drift import ModuleDrift as ModuleDrift
    from clkit.evaluation.flops import Flops as Flops
    from clkit.evaluation.gradients import GradientNorms as GradientNorms
    from clkit.evaluation.stability_gap import StabilityGap as StabilityGap
    from clkit.optimizer import ResetOptimizer as ResetOptimizer
    from clkit.progress import StreamProgress as StreamProgress
    from clkit.strategy import Strategy as Strategy
    from clkit.stream import Experience as Experience
    from clkit.stream import Stream as Stream
    from clkit.train_only import TrainOnly as TrainOnly

__version__ = "0.1.0"

_PUBLIC = {
    "Classifier": "clkit.classifier",
    "ConfigurationError": "clkit.errors",
    "Experience": "clkit.stream",
    "Flops": "clkit.evaluation.flops",
    "GradientNorms": "clkit.evaluation.gradients",
    "InMemoryDataset": "clkit.datasets",
    "ModuleDrift": "clkit.evaluation.drift",
    "ResetOptimizer": "clkit.optimizer",
    "SaveAdapters": "clkit.adapters",
    "StabilityGap": "clkit.evaluation.stability_gap",
    "Strategy": "clkit.strategy",
    "Stream": "clkit.stream",
    "StreamCheckpoint": "clkit.checkpoint",
    "StreamDataModule": "clkit.datamodule",
    "StreamProgress": "clkit.progress",
    "TrainOnly": "clkit.train_only",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
