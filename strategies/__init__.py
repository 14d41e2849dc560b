"""Continual-learning methods, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from .agem import AGEM as AGEM
    from .cls_er import CLSER as CLSER
    from .cumulative import Cumulative as Cumulative
    from .der import DER as DER
    from .disco import DISCO as DISCO
    from .ema_balance import EMABalance as EMABalance
    from .er import ExperienceReplay as ExperienceReplay
    from .ewc import EWC as EWC
    from .feature_distillation import FeatureDistillation as FeatureDistillation
    from .fpf import FPF as FPF
    from .fpf import KFPF as KFPF
    from .freeze_old_rows import FreezeOldRows as FreezeOldRows
    from .gdumb import GDumb as GDumb
    from .gem import GEM as GEM
    from .head_init import HeadInit as HeadInit
    from .head_warmup import HeadWarmup as HeadWarmup
    from .ilora import InterpolatedLoRA as InterpolatedLoRA
    from .instruction_groups import InstructionGroups as InstructionGroups
    from .joint import Joint as Joint
    from .l2 import L2Anchor as L2Anchor
    from .lpr import LPR as LPR
    from .lwf import LwF as LwF
    from .mas import MAS as MAS
    from .moelora import MoELoRA as MoELoRA
    from .naive import Naive as Naive
    from .ngm import NGM as NGM
    from .nmc import NearestMean as NearestMean
    from .olora import OLoRA as OLoRA
    from .per_task import PerTask as PerTask
    from .projected_replay import ProjectedReplay as ProjectedReplay
    from .reglora import RegLoRA as RegLoRA
    from .replay_share import ReplayShare as ReplayShare
    from .si import SynapticIntelligence as SynapticIntelligence
    from .soft_targets import SoftTargets as SoftTargets
    from .weight_average import WeightAverage as WeightAverage

_PUBLIC = {
    "AGEM": ".agem",
    "CLSER": ".cls_er",
    "Cumulative": ".cumulative",
    "DER": ".der",
    "DISCO": ".disco",
    "EMABalance": ".ema_balance",
    "EWC": ".ewc",
    "ExperienceReplay": ".er",
    "FeatureDistillation": ".feature_distillation",
    "FPF": ".fpf",
    "FreezeOldRows": ".freeze_old_rows",
    "GDumb": ".gdumb",
    "GEM": ".gem",
    "HeadInit": ".head_init",
    "HeadWarmup": ".head_warmup",
    "InstructionGroups": ".instruction_groups",
    "InterpolatedLoRA": ".ilora",
    "Joint": ".joint",
    "KFPF": ".fpf",
    "L2Anchor": ".l2",
    "LPR": ".lpr",
    "LwF": ".lwf",
    "MAS": ".mas",
    "MoELoRA": ".moelora",
    "Naive": ".naive",
    "NearestMean": ".nmc",
    "NGM": ".ngm",
    "OLoRA": ".olora",
    "PerTask": ".per_task",
    "ProjectedReplay": ".projected_replay",
    "RegLoRA": ".reglora",
    "ReplayShare": ".replay_share",
    "SoftTargets": ".soft_targets",
    "SynapticIntelligence": ".si",
    "WeightAverage": ".weight_average",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
