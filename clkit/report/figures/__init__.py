"""The figures of a report: a module each, all in one look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clkit.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from clkit.report.figures.accuracy_matrix import accuracy_matrix_figure as accuracy_matrix_figure
    from clkit.report.figures.answers import answers_figure as answers_figure
    from clkit.report.figures.canvas import ONE_COLUMN as ONE_COLUMN
    from clkit.report.figures.canvas import TWO_COLUMNS as TWO_COLUMNS
    from clkit.report.figures.canvas import curves as curves
    from clkit.report.figures.canvas import envelope as envelope
    from clkit.report.figures.canvas import save as save
    from clkit.report.figures.canvas import user_style as user_style
    from clkit.report.figures.connectivity import connectivity_figure as connectivity_figure
    from clkit.report.figures.drift import drift_figure as drift_figure
    from clkit.report.figures.overlay import overlay_figure as overlay_figure
    from clkit.report.figures.perplexity import perplexity_figure as perplexity_figure
    from clkit.report.figures.retention import retention_figure as retention_figure
    from clkit.report.figures.scatter import scatter_figure as scatter_figure
    from clkit.report.figures.stability_gap import comparison_figure as comparison_figure
    from clkit.report.figures.stability_gap import stability_gap_figure as stability_gap_figure
    from clkit.report.figures.zoom import zoom_figure as zoom_figure

_PUBLIC = {
    "ONE_COLUMN": "clkit.report.figures.canvas",
    "TWO_COLUMNS": "clkit.report.figures.canvas",
    "accuracy_matrix_figure": "clkit.report.figures.accuracy_matrix",
    "answers_figure": "clkit.report.figures.answers",
    "comparison_figure": "clkit.report.figures.stability_gap",
    "connectivity_figure": "clkit.report.figures.connectivity",
    "curves": "clkit.report.figures.canvas",
    "drift_figure": "clkit.report.figures.drift",
    "envelope": "clkit.report.figures.canvas",
    "overlay_figure": "clkit.report.figures.overlay",
    "perplexity_figure": "clkit.report.figures.perplexity",
    "retention_figure": "clkit.report.figures.retention",
    "save": "clkit.report.figures.canvas",
    "scatter_figure": "clkit.report.figures.scatter",
    "stability_gap_figure": "clkit.report.figures.stability_gap",
    "user_style": "clkit.report.figures.canvas",
    "zoom_figure": "clkit.report.figures.zoom",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_exports(__name__, _PUBLIC)
