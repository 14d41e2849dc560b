"""Continual-learning methods, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy import lazy_exports

if TYPE_CHECKING:
    from .agem import AGEM as AGEM
    from .cumulative import Cumulative as Cumulative
    from .er import ExperienceReplay as ExperienceReplay
    from .ewc import EWC as EWC
    from .ilora import InterpolatedLoRA as InterpolatedLoRA
    from .lwf import LwF as LwF
    from .naive import Naive as Naive

_PUBLIC = {
    "AGEM": ".agem",
    "Cumulative": ".cumulative",
    "EWC": ".ewc",
    "EMABalance": ".ema_balance",
    "ExperienceReplay": ".er",
    "InterpolatedLoRA": ".ilora",
    "LwF": ".lwf",
    "Naive": ".naive",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
