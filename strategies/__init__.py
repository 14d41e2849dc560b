"""Continual-learning methods, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .agem import AGEM as AGEM
    from .cls_er import CLSER as CLSER
    from .cumulative import Cumulative as Cumulative
    from .der import DER as DER
    from .ema_balance import EMABalance as EMABalance
    from .er import ExperienceReplay as ExperienceReplay
    from .ewc import EWC as EWC
    from .feature_distillation import FeatureDistillation as FeatureDistillation
    from .fpf import FPF as FPF
    from .fpf import KFPF as KFPF
    from .gdumb import GDumb as GDumb
    from .gem import GEM as GEM
    from .ilora import InterpolatedLoRA as InterpolatedLoRA
    from .instruction_groups import InstructionGroups as InstructionGroups
    from .joint import Joint as Joint
    from .l2 import L2Anchor as L2Anchor
    from .lwf import LwF as LwF
    from .mas import MAS as MAS
    from .moelora import MoELoRA as MoELoRA
    from .naive import Naive as Naive
    from .olora import OLoRA as OLoRA
    from .per_task import PerTask as PerTask
    from .reglora import RegLoRA as RegLoRA
    from .si import SynapticIntelligence as SynapticIntelligence

_PUBLIC = {
    "AGEM": ".agem",
    "CLSER": ".cls_er",
    "Cumulative": ".cumulative",
    "DER": ".der",
    "EMABalance": ".ema_balance",
    "EWC": ".ewc",
    "ExperienceReplay": ".er",
    "FPF": ".fpf",
    "FeatureDistillation": ".feature_distillation",
    "GDumb": ".gdumb",
    "GEM": ".gem",
    "InstructionGroups": ".instruction_groups",
    "InterpolatedLoRA": ".ilora",
    "Joint": ".joint",
    "KFPF": ".fpf",
    "L2Anchor": ".l2",
    "LwF": ".lwf",
    "MAS": ".mas",
    "MoELoRA": ".moelora",
    "Naive": ".naive",
    "PerTask": ".per_task",
    "OLoRA": ".olora",
    "RegLoRA": ".reglora",
    "SynapticIntelligence": ".si",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
