"""Continual-learning methods, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy import lazy_exports

if TYPE_CHECKING:
    from .agem import AGEM as AGEM
    from .cumulative import Cumulative as Cumulative
    from .er import ExperienceReplay as ExperienceReplay
    from .ewc import EWC as EWC
    from .feature_distillation import FeatureDistillation as FeatureDistillation
    from .l2 import L2Anchor as L2Anchor
    from .lwf import LwF as LwF
    from .mas import MAS as MAS
    from .naive import Naive as Naive
    from .si import SynapticIntelligence as SynapticIntelligence

_PUBLIC = {
    "AGEM": ".agem",
    "Cumulative": ".cumulative",
    "EWC": ".ewc",
    "EMABalance": ".ema_balance",
    "ExperienceReplay": ".er",
    "FeatureDistillation": ".feature_distillation",
    "L2Anchor": ".l2",
    "LwF": ".lwf",
    "MAS": ".mas",
    "Naive": ".naive",
    "SynapticIntelligence": ".si",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
