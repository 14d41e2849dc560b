"""How far each layer moved."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from clkit.metrics.drift_file import Drift
from clkit.report.figures.canvas import TWO_COLUMNS, new_figure, style, wrapped


def drift_figure(drift: Drift, *, title: str = "", width: float = TWO_COLUMNS) -> Figure:
    """Draw how far each layer moved: a heat map within experiences, and the mean across them as bars.

    Running statistics are left out, as their unit is another.
    """
    rows = [i for i, name in enumerate(drift.modules) if not name.endswith(".stats")]
    within = drift.within[:, rows].T
    across = np.nan_to_num(drift.across[:, rows]).sum(0) / max(int(np.isfinite(drift.across).all(1).sum()), 1)
    names = [f"{drift.modules[i]}  [{drift.kinds[i]}]" if drift.kinds[i] != "other" else drift.modules[i] for i in rows]
    with style():
        figure = new_figure(width, 1.3 + 0.16 * len(rows))
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 1]})
        shown = np.where(within > 0, within, np.nan)
        image = left.imshow(shown, norm="log", aspect="auto")
        figure.colorbar(image, label="mean |change| of a weight", location="bottom", shrink=0.6, pad=0.02)
        left.set_yticks(range(len(names)), names, fontsize=7)
        steps = [step for step, _ in drift.points]
        ticks = range(0, len(steps), max(len(steps) // 6, 1))
        left.set_xticks(ticks, [str(steps[t]) for t in ticks])
        for column, (here, following) in enumerate(pairwise(k for _, k in drift.points)):
            if here != following:
                left.axvline(column + 0.5, color="white", linewidth=1.5)
        left.grid(False)
        left.set(title="within experiences", xlabel="optimizer steps")
        right.barh(range(len(names)), across, color="#0072B2")
        right.set(title="across", xlabel="mean |change|")
        right.tick_params(axis="y", length=0, labelleft=False)
        figure.suptitle(wrapped(title, width))
    return figure
