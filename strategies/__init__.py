"""Continual-learning methods, one a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy import lazy_exports

if TYPE_CHECKING:
    from .agem import AGEM as AGEM
    from .cls_er import CLSER as CLSER
    from .cumulative import Cumulative as Cumulative
    from .der import DER as DER
    from .ema_balance import EMABalance as EMABalance
    from .er import ExperienceReplay as ExperienceReplay
    from .ewc import EWC as EWC
    from .gdumb import GDumb as GDumb
    from .gem import GEM as GEM
    from .joint import Joint as Joint
    from .lwf import LwF as LwF
    from .naive import Naive as Naive

_PUBLIC = {
    "AGEM": ".agem",
    "CLSER": ".cls_er",
    "Cumulative": ".cumulative",
    "DER": ".der",
    "EWC": ".ewc",
    "EMABalance": ".ema_balance",
    "ExperienceReplay": ".er",
    "GDumb": ".gdumb",
    "GEM": ".gem",
    "Joint": ".joint",
    "LwF": ".lwf",
    "Naive": ".naive",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
