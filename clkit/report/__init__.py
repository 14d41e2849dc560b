"""Tables and figures of one run or a sweep, from the run folders alone: the model is not needed.

:func:`write_report` does it all; the pieces are in :mod:`~clkit.report.runs`, :mod:`~clkit.report.tables`,
:mod:`~clkit.report.figures` and :mod:`~clkit.report.html`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from clkit.report.report import Report as Report
    from clkit.report.report import write_report as write_report

_PUBLIC = {"Report": "clkit.report.report", "write_report": "clkit.report.report"}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
