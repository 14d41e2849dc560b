"""What a notebook asks of objects: figures into given axes, tables, attributes, and texts that say what they are."""

from __future__ import annotations

import copy
import json
import pickle
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from plain import QUIET, make_module, make_stream

from clkit import ConfigurationError, Experience, History, InMemoryDataset, StabilityGap, Stream, StreamDataModule
from clkit.memory.buffer import ClassBalancedBuffer, ReservoirBuffer
from clkit.metrics.online import GapDepth, StabilityGapMetrics
from clkit.metrics.summary import Summary
from clkit.report.figures import accuracy_matrix_figure, overlay_figure, scatter_figure, stability_gap_figure
from clkit.strategies import DER, EWC, ExperienceReplay, LwF


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    data = StreamDataModule(make_stream(3), batch_size=8)
    gap = StabilityGap(dir=tmp_path_factory.mktemp("run"), plot=False)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=[ExperienceReplay(20), gap], **QUIET)
    trainer.fit(make_module(), datamodule=data)
    return gap


def test_the_history_as_a_table_is_its_file(gap):
    table = gap.history.to_pandas()
    pd.testing.assert_frame_equal(table, pd.read_csv(gap.dir / "history.csv"))


def test_metrics_are_attributes_that_tab_completion_finds(gap):
    there = json.loads((gap.dir / "metrics.json").read_text())
    assert there == gap.metrics
    for name, value in there["metrics"].items():
        attribute = name.replace("-", "_")
        assert getattr(gap.metrics, attribute) == value
        assert attribute in dir(gap.metrics)
        assert attribute.isidentifier()
    assert gap.metrics.complete is True
    assert gap.metrics.stream["name"] == "stream"


def test_a_metric_that_is_not_there_is_said_so(gap):
    with pytest.raises(AttributeError, match="did you mean ACC"):
        gap.metrics.ACCC  # noqa: B018
    with pytest.raises(AttributeError, match="no metrics before the end of the first fit"):
        StabilityGap().metrics.ACC  # noqa: B018


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda summary: pickle.loads(pickle.dumps(summary))])
def test_metrics_can_be_copied(gap, copied):
    again = copied(gap.metrics)
    assert again == gap.metrics
    assert type(again) is Summary
    assert again.min_ACC == gap.metrics["metrics"]["min-ACC"]


def test_plot_draws_the_curves_into_given_axes(gap):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert gap.plot(ax=right) is right
    assert not left.lines
    shown = {line.get_gid(): line.get_xydata() for line in right.lines if line.get_gid()}
    assert set(shown) == {f"curve:experience {k}" for k in range(3)}
    rows = gap.history.seen()
    drawn = shown["curve:experience 0"]
    assert np.isin(drawn[:, 0], rows.steps).all()
    assert drawn[-1].tolist() == [15.0, pytest.approx(100 * rows.scores[-1, 0])]


def test_plot_without_axes_makes_a_figure_that_a_notebook_shows(gap):
    before = set(pyplot.get_fignums())
    axes = gap.plot()
    (number,) = set(pyplot.get_fignums()) - before
    assert pyplot.figure(number) is axes.figure
    pyplot.close(axes.figure)


def test_plot_before_a_fit_says_so():
    with pytest.raises(ConfigurationError, match="no history before the first fit"):
        StabilityGap().plot()


@pytest.mark.parametrize("part", [False, True])
def test_figures_of_one_panel_are_drawn_into_given_axes(gap, part):
    history, matrix = gap.history, np.array(gap.metrics.accuracy_matrix, dtype=float)
    draw = [
        lambda ax: stability_gap_figure(history, ax=ax),
        lambda ax: accuracy_matrix_figure(matrix, ax=ax),
        lambda ax: overlay_figure({"er": [history], "a name that is too long for a line": [history]}, ax=ax),
        lambda ax: scatter_figure({"er": ([50.0, 60.0], [40.0, 30.0])}, ax=ax),
    ]
    for function in draw:
        figure = Figure(figsize=(14, 5), layout="constrained")
        _, ax = (figure.subfigures(1, 2)[0] if part else figure).subplots(1, 2)
        drawn = function(ax)
        assert drawn is figure
        assert ax.has_data()
        figure.draw_without_rendering()


class Wellformed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def test_a_stream_and_metrics_are_tables_in_a_notebook(gap):
    sets = [InMemoryDataset(torch.zeros(n, 2), torch.arange(n) % 2 + 2 * k) for k, n in enumerate((4, 6))]
    stream = Stream.from_datasets(sets, sets, val=[None, sets[0]], names=["<b>", "dogs"], n_classes=4)
    page = Wellformed(stream._repr_html_())
    assert not page.open
    assert "<b>" in page.cells
    assert page.cells[-5:] == ["dogs", "6", "4", "6", "2, 3"]
    page = Wellformed(gap.metrics._repr_html_())
    assert not page.open
    at = page.cells.index("ACC")
    assert float(page.cells[at + 1]) == pytest.approx(gap.metrics.ACC, rel=1e-3)


def buffer(kind):
    filled = kind(5)
    filled.insert((torch.zeros(8, 2), torch.arange(8) % 2))
    return filled


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: make_stream(2)[1], "Experience(1, 'experience 1', 40 train, 40 test, classes (2, 3))"),
        (
            lambda: Experience(0, "a", [1, 2], [3], val=[4, 5, 6], classes=tuple(range(20)), task=7),
            "Experience(0, 'a', 2 train, 3 val, 1 test, classes (0, 1, 2, 3, 4, 5, 6, 7, 8, ..., 19), task 7)",
        ),
        (lambda: make_stream(2), "Stream('stream', 2 experiences, class-incremental, 4 classes)"),
        (
            lambda: History(
                np.array([0, 3, 3]), np.array([0, 0, 0]), np.array(["init", "step", "end"]), np.full((3, 2), 0.5)
            ),
            "History(3 evaluations of 2 experiences, 1 finished, 3 steps)",
        ),
        (lambda: Summary(), "Summary(no metrics yet)"),
        (lambda: Summary(metrics={"ACC": 0.91234, "FWT": None}), "Summary(ACC 0.9123, FWT undefined)"),
        (lambda: GapDepth(4), "GapDepth(0 of 4 experiences seen in 0 evaluations)"),
        (
            lambda: StabilityGapMetrics(2, (10,)),
            "StabilityGapMetrics(0 of 2 experiences seen in 0 evaluations, windows=(10,))",
        ),
        (lambda: buffer(ReservoirBuffer), "ReservoirBuffer(5 of 5 samples held, 8 seen)"),
        (lambda: buffer(ClassBalancedBuffer), "ClassBalancedBuffer(5 of 5 samples held, 8 seen)"),
        (
            lambda: StabilityGap(every=10, subset=50, split="val"),
            "StabilityGap(every 10 steps, up to 50 samples of each experience's val data)",
        ),
    ],
)
def test_what_an_object_says_of_itself(made, text):
    assert repr(made()) == text


@pytest.mark.parametrize(
    ("strategy", "part"),
    [
        (ExperienceReplay(capacity=123), "ExperienceReplay(capacity=123, "),
        (EWC(strength=7.5), "strength=7.5"),
        (DER(50, beta=0.25), "beta=0.25"),
        (LwF(2.0), "alpha=2.0"),
    ],
)
def test_a_strategy_says_its_settings(strategy, part):
    assert part in repr(strategy)
    assert "object at" not in repr(strategy)
