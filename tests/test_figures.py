"""What figures show, and that it can be read: by numbers, boxes and colours, not by looking."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.text import Text

from clkit.metrics.history import History
from clkit.report.figures import (
    accuracy_matrix_figure,
    comparison_figure,
    curves,
    overlay_figure,
    stability_gap_figure,
    zoom_figure,
)
from clkit.report.figures.canvas import contrast, line_styles, readable, smoothed, style
from clkit.report.html import theme

LONG = ["colours", "sums and differences", "word senses", "tumours described in words", "a", "b", "c", "d"]


def stream(n, steps=40, *, noise=0.0, seed=0):
    """Each of n experiences learned in so many steps; old ones fall to a third five steps after a boundary."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        for i in range(1, steps + 1):
            scores = np.full(n, np.nan)
            scores[:k] = (0.9 - 0.02 * np.arange(k)) * (1 - 0.6 * np.exp(-(((i - 5) / 3) ** 2)))
            scores[k] = 0.95 * (1 - np.exp(-i / 5))
            rows.append((k * steps + i, k, (scores + noise * rng.standard_normal(n)).clip(0, 1)))
    at, experience, scores = zip(*rows, strict=True)
    return History(np.array(at), np.array(experience), np.array(["step"] * len(rows)), np.array(scores))


def texts(figure):
    """Visible texts of a figure and their boxes in pixels."""
    figure.draw_without_rendering()
    found = {}
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().strip()):
        box = text.get_window_extent()
        if text.get_visible() and box.width > 0 and drawn(text):
            found.setdefault((text.get_text(), *np.round(box.extents)), box)
    return found


def drawn(text):
    """Ticks outside the limits, and of axes that are off, are there but not drawn."""
    axes = text.axes
    if axes is None:
        return True
    ticks = [(axis, tick) for axis in (axes.xaxis, axes.yaxis) for tick in axis.majorTicks]
    for axis, tick in ticks:
        if text in (tick.label1, tick.label2):
            low, high = sorted(axis.get_view_interval())
            return axes.axison and low <= tick.get_loc() <= high
    return True


FIGURES = {
    "one run": lambda: stability_gap_figure(stream(5), LONG[:5], title="er on digits"),
    "eight long names": lambda: stability_gap_figure(stream(8, 10), LONG, title="er"),
    "a column wide": lambda: stability_gap_figure(stream(5), LONG[:5], title="er", width=3.4),
    "noisy": lambda: stability_gap_figure(stream(4, 200, noise=0.05), LONG[:4]),
    "seeds": lambda: stability_gap_figure([stream(5, noise=0.02, seed=s) for s in range(3)], LONG[:5]),
    "twenty": lambda: stability_gap_figure(stream(20, 30), [f"permutation {k}" for k in range(20)], title="er"),
    "zoom": lambda: zoom_figure(stream(5), LONG[:5], title="er"),
    "zoom of twenty": lambda: zoom_figure(stream(20), [f"permutation {k}" for k in range(20)], title="er"),
    "overlay": lambda: overlay_figure({"er": [stream(5)], "ewc": [stream(5, noise=0.01)], "naive": [stream(5)]}),
    "comparison": lambda: comparison_figure({"er": [stream(5)], "ewc": [stream(5)], "naive": [stream(5)]}),
    "comparison of twenty": lambda: comparison_figure({"er": [stream(20)], "ewc": [stream(20)]}),
    "matrix": lambda: accuracy_matrix_figure(np.tril(np.full((20, 20), 0.5)), [f"permutation {k}" for k in range(20)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_no_text_of_a_figure_overlaps_another_or_leaves_it(name):
    figure = FIGURES[name]()
    found = texts(figure)
    inside = figure.bbox.padded(3)
    assert len(found) > 5
    assert [text for text, box in found.items() if not (inside.contains(*box.min) and inside.contains(*box.max))] == []
    slanted = {text.get_text() for text in figure.findobj(Text) if text.get_rotation() not in (0, 90)}
    pairs = combinations(((text[0], box.padded(-1)) for text, box in found.items() if text[0] not in slanted), 2)
    assert [(one, other) for (one, a), (other, b) in pairs if a.overlaps(b)] == []


def test_curves_fade_as_their_experience_gets_older():
    figure = stability_gap_figure(stream(4))
    first, *_, last = (each for each in figure.axes[0].collections if isinstance(each, LineCollection))
    alphas = first.get_colors()[:, 3]
    assert len(alphas) == 4
    assert (np.diff(alphas) < 0).all()
    assert alphas.min() >= 0.5
    assert last.get_colors()[:, 3].tolist() == [1]
    assert all(look[1] is None for each in (first, last) for look in each.get_linestyle())


def test_only_noise_is_smoothed_and_a_fall_keeps_its_depth():
    experience = np.repeat([0, 1], 300)
    clean = np.where(np.arange(600) == 304, 20.0, 90.0)
    assert smoothed(clean, experience) is None
    noisy = clean + np.random.default_rng(0).normal(0, 4, 600)
    smooth = smoothed(noisy, experience)
    assert np.std(smooth[400:]) < np.std(noisy[400:]) / 3
    assert smooth[400:].mean() == pytest.approx(90, abs=0.5)
    np.testing.assert_allclose(smooth[300:308], noisy[300:308])


def test_a_noisy_curve_lies_thin_under_its_mean():
    figure = stability_gap_figure(stream(2, 300, noise=0.05))
    collections = [each for each in figure.axes[0].collections if isinstance(each, LineCollection)]
    assert sorted(each.get_linewidth()[0] for each in collections) == [0.5, 0.5, 1.5, 1.5]
    thin, thick = sorted(collections[:2], key=lambda each: each.get_linewidth()[0])
    assert thin.get_zorder() < thick.get_zorder()


def test_above_eight_experiences_is_a_heat_map_of_the_scores():
    history = stream(9, 10)
    assert not stability_gap_figure(stream(8, 10)).axes[0].images
    extremes, cells = stability_gap_figure(history, [f"task {k}" for k in range(9)]).axes[:2]
    (image,) = cells.images
    shown = np.ma.filled(image.get_array(), np.nan)
    # one column a step, from 0 on
    assert shown.shape == (9, 91)
    seen = np.where(np.arange(9) <= history.experience[:, None], 100 * history.scores, np.nan)
    np.testing.assert_allclose(shown[:, 1:], seen.T)
    assert [label.get_text() for label in cells.get_yticklabels()] == [f"task {k}" for k in range(9)]
    named = {line["name"]: line for line in curves(extremes.figure)[0]["curves"]}
    assert set(named) == {"mean", "oldest", "worst"}
    old = np.where(np.arange(9) < history.experience[:, None], 100 * history.scores, np.inf).min(axis=1)
    np.testing.assert_allclose(named["worst"]["y"], old[np.isfinite(old)], atol=0.006)


def test_a_heat_map_of_many_steps_keeps_every_fall():
    history = stream(9, 1000)
    history.scores[4321, 0] = 0.0123
    image = stability_gap_figure(history).axes[1].images[0]
    assert np.nanmin(image.get_array()[0]) == pytest.approx(1.23)
    assert image.get_array().shape[1] <= 600


def test_zoom_has_the_six_deepest_boundaries_and_a_legend():
    history = stream(10)
    depths = np.linspace(0.1, 0.6, 9)
    for k, depth in enumerate(depths, start=1):
        now = history.experience == k
        history.scores[now, :k] = 0.9 - depth * (np.arange(40) == 5)[:, None]
    figure = zoom_figure(history, [f"e{k}" for k in range(10)], title="er")
    assert [axes.get_title("left") for axes in figure.axes] == [f"learning e{k}" for k in range(4, 10)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "accuracy before", "deepest fall, in points", "back within 2 points",
    ]  # fmt: skip
    for axes in figure.axes:
        inside = axes.get_window_extent()
        assert axes.texts
        for text in axes.texts:
            box = text.get_window_extent()
            assert inside.contains(*box.min)
            assert inside.contains(*box.max)


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # the lightest grey that passes on white, by the guidelines' own example
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)
    assert contrast(readable("#E69F00"), "#ffffff") >= 4.5


def test_colours_can_be_told_from_the_page_on_white_and_on_black():
    colors = theme()
    for side in range(2):
        paper, panel = colors["paper"][side], colors["panel"][side]
        for name in ("ink", "soft", "warn", "link"):
            assert contrast(colors[name][side], paper) >= 4.5, (name, side)
        for name in ("ink", "soft"):
            assert contrast(colors[name][side], panel) >= 4.5, (name, side)
        for number in range(8):
            assert contrast(colors[f"t{number}"][side], paper) >= 4.5
            assert contrast(colors[f"c{number}"][side], paper) >= 3
    with style():
        assert len({look["color"] for look in line_styles(8)}) == 8
        assert len({look["color"] for look in line_styles(20)}) == 20
