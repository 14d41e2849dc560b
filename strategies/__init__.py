"""Continual-learning methods, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy import lazy_exports

if TYPE_CHECKING:
    from .agem import AGEM as AGEM
    from .cumulative import Cumulative as Cumulative
    from .ema_balance import EMABalance as EMABalance
    from .er import ExperienceReplay as ExperienceReplay
    from .ewc import EWC as EWC
    from .fpf import FPF as FPF
    from .fpf import KFPF as KFPF
    from .ilora import InterpolatedLoRA as InterpolatedLoRA
    from .lwf import LwF as LwF
    from .naive import Naive as Naive
    from .reglora import RegLoRA as RegLoRA

_PUBLIC = {
    "AGEM": ".agem",
    "Cumulative": ".cumulative",
    "EMABalance": ".ema_balance",
    "EWC": ".ewc",
    "ExperienceReplay": ".er",
    "FPF": ".fpf",
    "KFPF": ".fpf",
    "InterpolatedLoRA": ".ilora",
    "LwF": ".lwf",
    "Naive": ".naive",
    "RegLoRA": ".reglora",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
