import json
import math
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from html.parser import HTMLParser
from io import StringIO

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from rich.console import Console

from clkit import ConfigurationError
from clkit.files import alone_in
from clkit.metrics.drift_file import Drift
from clkit.metrics.history import History, HistoryWriter
from clkit.report import write_report
from clkit.report.estimate import Estimate
from clkit.report.figures import (
    ONE_COLUMN,
    accuracy_matrix_figure,
    curves,
    drift_figure,
    envelope,
    overlay_figure,
    save,
    scatter_figure,
    stability_gap_figure,
    zoom_figure,
)
from clkit.report.runs import find_runs, group_runs
from clkit.report.significance import against_best
from clkit.report.tables import Table, results_table, runs_table

NAN = math.nan
T_TWO_DEGREES = 4.302652729911275  # 97.5% quantile of Student's t, from a table
FILES = {"report.md", "report.tex", "report.csv", "runs.csv", "report.html", "stability_gap.png", "stability_gap.svg"}


def make_run(folder, final, *, lowest=0.25, overrides=None, config=None, complete=True, diverged=None):
    """Two experiences of two steps; E0 ends at ``final`` and has its minimum at ``lowest``."""
    folder.mkdir(parents=True)
    writer = HistoryWriter(folder / "history.csv", 2)
    for row in [
        (0, 0, "init", [0.1]),
        (1, 0, "step", [0.5]),
        (2, 0, "step", [0.9]),
        (2, 0, "end", [0.9]),
        (3, 1, "step", [lowest, 0.5]),
        (4, 1, "step", [final, 0.8]),
        (4, 1, "end", [final, 0.8]),
    ]:
        writer.append(*row)
    writer.close()
    if complete:
        content = {
            "format": 1, "biased": [], "complete": True, "diverged": diverged, "score": "accuracy",
            "schedule": "every step", "subset": 1000,
            "mask": "none",
            "stream": {"name": "toy", "kind": "class-incremental", "experiences": ["cats", "dogs"], "steps": [2, 4]},
            "metrics": {"ACC": (final + 0.8) / 2, "FORG": 0.9 - final, "min-ACC": lowest, "AAA": None, "n_missing": 0},
            "per_experience": {"forgetting": [0.9 - final, None], "minimum": [lowest, None], "final": [final, 0.8]},
            "accuracy_matrix": [[0.9, None], [final, 0.8]],
            "versions": {"torch": "9.8.7"},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(content))
    if overrides is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {item}\n" for item in overrides))
        (folder / ".hydra" / "config.yaml").write_text(json.dumps(config))
        choices = {"hydra": {"runtime": {"choices": {"scenario": "split_toy"}}}}
        (folder / ".hydra" / "hydra.yaml").write_text(json.dumps(choices))
    return folder


def sweep(root):
    """Three seeds of er, one of naive; ACC of er is 0.70, 0.75 and 0.80."""
    for seed, final in enumerate([0.6, 0.7, 0.8]):
        config = {"seed": seed, "strategy": {"er": {"capacity": 200}}, "folder": f"{seed}"}
        make_run(root / f"er_{seed}", final, overrides=["strategy=er", f"seed={seed}"], config=config)
    config = {"seed": 0, "strategy": {"naive": {}}, "folder": "naive"}
    make_run(root / "naive_0", 0.2, lowest=0.0, overrides=["strategy=naive", "seed=0"], config=config)
    return root


def groups_in(folder):
    return group_runs(find_runs([folder])[0])[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a sweep, and its folder; tests read it only."""
    folder = sweep(tmp_path_factory.mktemp("sweep"))
    return write_report([folder]), folder


def test_sweep_mean_and_interval_against_the_hand_calculation(written):
    report, _ = written
    er, naive = report.groups
    assert (er.label, naive.label) == ("er · split_toy", "naive · split_toy")
    estimate = er.estimate("ACC")
    assert (estimate.n, estimate.mean, estimate.std) == pytest.approx((3, 0.75, 0.05))
    assert estimate.half == pytest.approx(T_TWO_DEGREES * 0.05 / math.sqrt(3))
    assert str(estimate) == "75.0 ± 12.4"
    assert str(naive.estimate("ACC")) == "50.0"
    assert str(naive.estimate("AAA")) == "–"
    assert report.notes == ()


def test_sweep_writes_all_files_into_the_given_folder(written):
    report, folder = written
    expected = FILES | {"overlay.png", "overlay.svg"}
    assert {file.name for file in report.files} == expected
    assert {file.name for file in folder.iterdir() if file.is_file()} == expected


def test_single_run_is_reported_in_its_own_folder(tmp_path):
    folder = make_run(tmp_path / "runs" / "one", 0.7)
    report = write_report([tmp_path])
    assert {file.parent for file in report.files} == {folder}
    assert report.groups[0].label == "one"


def test_tables_with_a_relative_gap_say_how_many_boundaries_it_leaves_out(tmp_path):
    root = sweep(tmp_path)
    for seed, count in enumerate((1, 0, 2)):
        file = root / f"er_{seed}" / "metrics.json"
        content = json.loads(file.read_text())
        content["metrics"] |= {"avg-SG": 0.5, "n_without_SG": count}
        file.write_text(json.dumps(content))
    groups = groups_in(root)
    said = "avg-SG leaves out boundaries before which the accuracy was 0: 3 of er · split_toy"
    assert results_table(groups, ["ACC", "avg-SG"]).caption.endswith(f"; {said}")
    assert said in runs_table(groups).caption
    write_report([root])
    assert said in (root / "report.md").read_text()
    # where it is not shown, or leaves nothing out, there is nothing to say
    assert "leaves out" not in results_table(groups, ["ACC"]).caption
    assert "leaves out" not in results_table(groups[1:], ["ACC", "avg-SG"]).caption


def test_files_of_one_folder_are_written_by_one_at_a_time(tmp_path, monkeypatch):
    inside, seen = [], []

    def write(number):
        with alone_in(tmp_path):
            inside.append(number)
            time.sleep(0.05)
            seen.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert seen == [1, 1, 1]

    # a file system without locks is written to all the same
    def refuse(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with alone_in(tmp_path):
        pass


def test_output_folder_can_be_chosen(tmp_path):
    make_run(tmp_path / "one", 0.7)
    report = write_report([tmp_path / "one"], tmp_path / "new" / "place")
    assert {file.parent for file in report.files} == {tmp_path / "new" / "place"}


def test_text_outputs_hold_the_numbers(written):
    _, folder = written
    markdown, latex = (folder / "report.md").read_text(), (folder / "report.tex").read_text()
    assert "| er · split_toy | 3 | 75.0 ± 12.4 |" in markdown
    assert "| cats | 70.0 ± 24.8 | 20.0 ± 24.8 | 25.0 ± 0.0 |" in markdown
    assert r"er $\cdot$ split\_toy & 3 & 75.0 $\pm$ 12.4 &" in latex
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    frame = pd.read_csv(folder / "report.csv", index_col="run")
    assert frame.loc["er · split_toy", "ACC"] == pytest.approx(0.75)
    assert frame.loc["er · split_toy", "ACC_std"] == pytest.approx(0.05)
    assert math.isnan(frame.loc["naive · split_toy", "ACC_ci95"])


class Loads(HTMLParser):
    """Collects what a page loads and which elements are left open."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_runs_csv_is_one_tidy_row_for_each_run(written):
    _, root = written
    frame = pd.read_csv(root / "runs.csv")
    assert frame["seed"].tolist() == [0, 1, 2, 0]
    assert frame["ACC"].tolist() == pytest.approx([0.7, 0.75, 0.8, 0.5])
    assert frame["min-ACC"].tolist() == pytest.approx([0.25, 0.25, 0.25, 0.0])
    assert frame["AAA"].isna().all()
    assert frame["complete"].all()
    assert frame["strategy.er.capacity"].isna().tolist() == [False, False, False, True]
    assert not frame.columns.duplicated().any()
    for folder, final in zip(frame["folder"], frame["ACC"], strict=True):
        assert json.loads((root / folder / "metrics.json").read_text())["metrics"]["ACC"] == final


def test_html_is_self_contained_and_complete(written):
    _, folder = written
    text = (folder / "report.html").read_text()
    page = Loads()
    page.feed(text)
    assert page.open == []
    assert all(target.startswith(("#", "data:")) for target in page.loaded)
    assert not re.search(r"@import|url\((?!#)|fetch\(", text)
    # the overlay, worst case (no WC-ACC: none) and time (no timing: none), and three figures of each setting
    assert text.count("<svg") == 1 + 2 * 3
    for content in ("75.0 ± 12.4", "lowest accuracy in any evaluation", "9.8.7", "strategy.er.capacity"):
        assert content in text
    assert ">folder</th>" not in text


def test_html_escapes_what_comes_from_files(tmp_path):
    make_run(tmp_path / "<b>&", 0.7)
    write_report([tmp_path])
    text = (tmp_path / "<b>&" / "report.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text


def test_terminal_shows_the_table_and_the_files(written):
    console = Console(width=140, record=True, file=StringIO())
    written[0].show(console)
    text = console.export_text()
    assert "75.0 ± 12.4" in text
    assert "report.html" in text


def test_unfinished_run_is_computed_from_its_history_and_marked(tmp_path):
    make_run(tmp_path / "one", 0.6, complete=False)
    report = write_report([tmp_path])
    (run,) = report.groups[0].runs
    assert not run.complete
    assert (run.metric("ACC"), run.metric("min-ACC")) == pytest.approx((0.7, 0.25))
    assert "unfinished" in report.notes[0]
    assert "(unfinished)" in (tmp_path / "one" / "report.md").read_text()


def test_unfinished_run_stays_out_of_the_means(tmp_path):
    sweep(tmp_path)
    (tmp_path / "er_2" / "metrics.json").write_text('{"format": 1, "comp')
    report = write_report([tmp_path])
    assert report.groups[0].estimate("ACC").mean == pytest.approx((0.70 + 0.75) / 2)
    assert any("1 of 3 runs unfinished" in note for note in report.notes)


def test_history_without_rows_is_reported(tmp_path):
    HistoryWriter(tmp_path / "history.csv", 3).close()
    report = write_report([tmp_path])
    assert any("no evaluation yet" in note for note in report.notes)


def test_unreadable_runs_are_named_and_the_others_reported(tmp_path):
    sweep(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "history.csv").write_text("nonsense\n")
    (tmp_path / "never_started" / ".hydra").mkdir(parents=True)
    _, notes = find_runs([tmp_path])
    assert len(notes) == 2
    assert "broken" in notes[0]
    assert "never_started" in notes[1]


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="No run found"):
        write_report([tmp_path])
    with pytest.raises(ConfigurationError, match="no directory"):
        write_report([tmp_path / "missing"])


def test_groups_are_told_apart_by_their_overrides_but_not_by_the_seed(tmp_path):
    for capacity in (50, 200):
        for seed in (0, 1):
            overrides = ["trainer=cpu", f"strategy.er.capacity={capacity}", f"seed={seed}", f"resume={seed == 0}"]
            config = {"seed": seed, "strategy": {"er": {"capacity": capacity}, "ema": {}}}
            make_run(tmp_path / f"{capacity}_{seed}", 0.7, overrides=overrides, config=config)
    groups, notes = group_runs(find_runs([tmp_path])[0])
    prefix = "er + ema · split_toy · strategy.er.capacity="
    assert [group.label for group in groups] == [f"{prefix}200", f"{prefix}50"]
    assert [[run.seed for run in group.runs] for group in groups] == [["0", "1"], ["0", "1"]]
    assert notes == []


def test_repeated_seeds_are_pointed_out(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, 0.7, overrides=["seed=3"], config={"seed": 3, "strategy": {"er": {}}})
    _, notes = group_runs(find_runs([tmp_path])[0])
    assert "several runs with seed 3" in notes[0]


def test_latex_escapes_special_characters():
    latex = Table("50% of a_b", ("x", "y"), (("{a}&#~^\\$", "1"),)).latex()
    assert r"50\% of a\_b" in latex
    assert r"\{a\}\&\#\textasciitilde{}\textasciicircum{}\textbackslash{}\$ & 1 \\" in latex


def test_envelope_keeps_every_extreme():
    values = np.random.default_rng(0).random(100_003)
    values[[3, 50_000, 100_002]] = -1, 2, -2
    kept = envelope(values, bins=100)
    assert len(kept) <= 202
    assert {0, 3, 50_000, 100_002} <= set(kept)
    assert (np.diff(kept) > 0).all()


def lines(figure):
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]


def test_figure_draws_the_curves_and_the_minimum_in_percent(tmp_path):
    history = History.read(make_run(tmp_path / "one", 0.6) / "history.csv")
    figure = stability_gap_figure(history, ["cats", "dogs"])
    np.testing.assert_allclose(lines(figure)[0].get_xdata(), [0, 1, 2, 3, 4])
    np.testing.assert_allclose(lines(figure)[0].get_ydata(), [10, 50, 90, 25, 60])
    assert {"25", "cats", "dogs"} <= {text.get_text() for text in figure.axes[0].texts}


def test_figure_of_seeds_draws_their_mean_and_band(tmp_path):
    histories = [History.read(make_run(tmp_path / str(f), f) / "history.csv") for f in (0.6, 0.7, 0.8)]
    figure = stability_gap_figure(histories)
    np.testing.assert_allclose(lines(figure)[0].get_ydata(), [10, 50, 90, 25, 70])
    (band, *_) = (each for each in figure.axes[0].collections if isinstance(each, PolyCollection))
    band = band.get_paths()[0].vertices
    half = 100 * T_TWO_DEGREES * 0.1 / math.sqrt(3)
    np.testing.assert_allclose(sorted(band[band[:, 0] == 4, 1])[-1], 70 + half)


def test_figure_of_a_long_history_keeps_the_minimum(tmp_path):
    n = 100_000
    scores = np.full((n, 2), 0.9)
    scores[: n // 2, 1] = NAN
    scores[60_001, 0] = 0.05
    steps = np.arange(1, n + 1)
    history = History(steps, (steps > n // 2).astype(np.int64), np.full(n, "step"), scores)
    figure = stability_gap_figure(history)
    curve = lines(figure)[0]
    assert len(curve.get_xdata()) < 2_000
    assert curve.get_ydata().min() == pytest.approx(5)
    save(figure, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 0


def test_svg_is_reproducible(tmp_path):
    matrix = np.array([[0.9, NAN], [0.6, 0.8]])
    for name in ("a.svg", "b.svg"):
        save(accuracy_matrix_figure(matrix), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


DRIFT = """step,experience,point,module,kind,size,within,across
2,0,1,net.conv,first,4,{0},
2,0,1,net.bn.stats,norm,2,9.0,
2,0,1,net.head,head,6,0.5,
4,1,1,net.conv,first,4,0.2,0.25
4,1,1,net.bn.stats,norm,2,9.0,9.0
4,1,1,net.head,head,6,0.4,0.75
"""


@pytest.mark.slow
def test_module_drift_is_drawn_with_its_mean_over_seeds(tmp_path):
    for seed, first in enumerate((0.1, 0.3)):
        folder = make_run(tmp_path / f"s{seed}", 0.5, overrides=[f"seed={seed}"], config={"seed": seed})
        (folder / "drift.csv").write_text(DRIFT.format(first))
    assert "drift.png" in {path.name for path in write_report([tmp_path]).files}
    page = (tmp_path / "report.html").read_text()
    assert "module drift, 2 run(s)" in unescape(page)
    runs = [Drift.read(tmp_path / f"s{seed}" / "drift.csv") for seed in range(2)]
    mean = Drift.mean(runs)
    np.testing.assert_allclose(mean.within, [[0.2, 9.0, 0.5], [0.2, 9.0, 0.4]])
    np.testing.assert_allclose(mean.across, [[NAN] * 3, [0.25, 9.0, 0.75]])
    figure = drift_figure(mean, title="toy")
    heat, bars = figure.axes[:2]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["net.conv  [first]", "net.head  [head]"]
    assert [bar.get_width() for bar in bars.patches] == [0.25, 0.75]


def test_a_drift_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "drift.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="no drift.csv"):
        Drift.read(tmp_path / "drift.csv")


def test_reporting_needs_no_torch():
    code = (
        "import sys, clkit.report, clkit.metrics.functional, clkit.metrics.summary;"
        "sys.exit(bool({'torch', 'pytorch_lightning', 'torchmetrics', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def seeds_of(root, name, finals):
    for seed, final in enumerate(finals):
        config = {"seed": seed, "strategy": {name: {}}, "folder": f"{name}{seed}"}
        make_run(root / f"{name}_{seed}", final, overrides=[f"strategy={name}", f"seed={seed}"], config=config)


def test_marks_of_significance_follow_the_paired_test_with_holms_correction(tmp_path):
    seeds_of(tmp_path, "best", [0.80, 0.82, 0.84, 0.86])
    seeds_of(tmp_path, "close", [0.79, 0.83, 0.83, 0.86])
    seeds_of(tmp_path, "worse", [0.70, 0.73, 0.73, 0.77])
    report = write_report([tmp_path])
    assert [group.label.split(" ")[0] for group in report.groups] == ["best", "close", "worse"]
    # ACC is half the final score: differences of (0.5, -0.5, 0.5, 0) and (5, 4.5, 5.5, 4.5) points, three degrees of
    # freedom; mean / (std / 2) is 0.522233 and 20.3708, two-sided p 0.637618 and 0.000259
    found = against_best(report.groups, "ACC")
    assert found == pytest.approx({1: 0.637618, 2: 2 * 0.000259}, abs=2e-6)
    rows = {row[0].split(" ")[0]: row[2] for row in results_table(report.groups, ["ACC"]).rows}
    assert {name: cell.endswith("*") for name, cell in rows.items()} == {"best": False, "close": False, "worse": True}
    assert "paired t-test" in (tmp_path / "report.md").read_text()


def test_lower_is_better_where_it_is(tmp_path):
    seeds_of(tmp_path, "keeps", [0.80, 0.82, 0.84])
    seeds_of(tmp_path, "loses", [0.30, 0.31, 0.35])
    found = against_best(groups_in(tmp_path), "FORG")
    assert set(found) == {1}
    assert found[1] < 0.05


def test_equal_differences_need_no_test(tmp_path):
    seeds_of(tmp_path, "a", [0.5] * 3)
    seeds_of(tmp_path, "b", [0.5] * 3)
    seeds_of(tmp_path, "c", [0.4] * 3)
    assert against_best(groups_in(tmp_path), "ACC") == {1: 1.0, 2: 0.0}


def test_runs_without_common_seeds_get_no_mark(written):
    assert against_best(written[0].groups, "ACC") == {}


def test_a_schedule_that_biases_is_marked(tmp_path):
    folder = make_run(tmp_path / "one", 0.7)
    content = json.loads((folder / "metrics.json").read_text())
    content |= {"schedule": "every 5 steps", "biased": ["min-ACC"]}
    (folder / "metrics.json").write_text(json.dumps(content))
    table = results_table(groups_in(tmp_path))
    assert [name for name in table.header if name.endswith("†")] == ["min-ACC ↑ †"]
    assert "† evaluated every 5 steps" in table.caption


def gap_history():
    """Three experiences of ten steps; the first falls to 0.2 after the first boundary and is back after six steps."""
    rows = [(n, 0, [0.9, np.nan, np.nan]) for n in range(1, 11)]
    dip = [0.5, 0.2, 0.4, 0.6, 0.8, 0.89, 0.9, 0.9, 0.9, 0.9]
    rows += [(10 + n, 1, [dip[n - 1], 0.1 * n - 0.05, np.nan]) for n in range(1, 11)]
    rows += [(20 + n, 2, [0.9, 0.3, 0.5]) for n in range(1, 11)]
    steps, experience, scores = zip(*rows, strict=True)
    return History(np.array(steps), np.array(experience), np.array(["step"] * 30), np.array(scores))


def test_zoom_panels_mark_depth_and_recovery():
    figure = zoom_figure(gap_history(), ["a", "b", "c"])
    first, second = (axes for axes in figure.axes if axes.get_visible())
    assert [axes.get_title("left") for axes in (first, second)] == ["learning b", "learning c"]
    assert {text.get_text() for text in first.texts} == {"a −70", "6 steps"}
    assert {text.get_text() for text in second.texts} == {"b −65"}
    marks = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in first.get_lines() if line.get_marker() in ("o", "^")
    ]
    assert marks == [(2, pytest.approx(20)), (6, pytest.approx(89))]


def test_overlay_draws_the_mean_over_the_experiences_seen():
    figure = overlay_figure({"one": [gap_history()], "other": [gap_history()]})
    (panel,) = curves(figure)
    assert [curve["name"] for curve in panel["curves"]] == ["one", "other"]
    x, y = panel["curves"][0]["x"], panel["curves"][0]["y"]
    assert y[x.index(5)] == pytest.approx(90)
    assert y[x.index(12)] == pytest.approx(100 * (0.2 + 0.15) / 2, abs=0.01)
    assert y[x.index(30)] == pytest.approx(100 * (0.9 + 0.3 + 0.5) / 3, abs=0.01)


def test_scatter_shows_every_seed_and_the_mean():
    figure = scatter_figure({"er": ([80, 90], [20, 40]), "naive": ([10], [5])})
    dots = [line.get_xydata().tolist() for line in figure.axes[0].get_lines()]
    assert dots[:4] == [[[80, 20], [90, 40]], [[85, 30]], [[10, 5]], [[10, 5]]]


def test_figures_take_a_width_and_a_style_of_ones_own(tmp_path):
    style = tmp_path / "mine.mplstyle"
    style.write_text("axes.facecolor: FF0000\n")
    make_run(tmp_path / "one", 0.7)
    write_report([tmp_path / "one"], tmp_path / "plain")
    write_report([tmp_path / "one"], tmp_path / "red", style=style, width=ONE_COLUMN)
    pixels = {name: matplotlib.image.imread(tmp_path / name / "stability_gap.png") for name in ("plain", "red")}
    assert pixels["red"].shape[1] == pytest.approx(3.4 * 200, abs=2)
    assert pixels["plain"].shape[1] == pytest.approx(7.1 * 200, abs=2)
    red = {name: ((image[..., 0] > 0.99) & (image[..., 1] < 0.01)).mean() for name, image in pixels.items()}
    assert red["plain"] < 0.001
    assert red["red"] > 0.2
    with pytest.raises(ConfigurationError, match="no style file"):
        write_report([tmp_path / "one"], style=tmp_path / "none.mplstyle")


def test_training_time_against_accuracy(tmp_path):
    seeds_of(tmp_path, "fast", [0.5, 0.6])
    seeds_of(tmp_path, "slow", [0.8, 0.9])
    for folder in tmp_path.glob("*_*"):
        seconds = 10.0 if folder.name.startswith("fast") else 70.0
        (folder / "timing.json").write_text(json.dumps({"training_seconds": seconds, "evaluation_seconds": 1.0}))
    report = write_report([tmp_path])
    assert {"time.png", "time.svg"} <= {path.name for path in report.files}
    assert [run.seconds for group in report.groups for run in group.runs] == [70, 70, 10, 10]


def test_a_second_evaluation_of_a_run_is_a_line_of_its_own(tmp_path):
    config = {"seed": 0, "strategy": {"ema_balance": {}}}
    make_run(tmp_path / "run", 0.6, overrides=["strategy=ema_balance"], config=config)
    make_run(tmp_path / "run" / "averaged", 0.7)
    report = write_report([tmp_path / "run"])
    labels = {group.label: group.estimate("ACC").mean for group in report.groups}
    assert labels == pytest.approx({"ema_balance · split_toy": 0.7, "ema_balance · averaged · split_toy": 0.75})
    assert tmp_path / "run" / "overlay.png" in report.files


def test_a_run_that_diverged_is_marked_put_last_and_never_the_best(tmp_path):
    """At chance from the start, nothing is forgotten: its FORG is the best of all."""
    for seed in range(3):
        for name, final, diverged in (("a_lost", 0.9, 3), ("b", 0.7 + seed / 100, None), ("c", 0.3 + seed / 50, None)):
            config = {"seed": seed, "strategy": {name: {}}}
            overrides = [f"strategy={name}", f"seed={seed}"]
            lost = diverged if seed == 1 else None
            make_run(tmp_path / f"{name}{seed}", final, overrides=overrides, config=config, diverged=lost)
    report = write_report([tmp_path])
    assert [group.label[:1] for group in report.groups] == ["b", "c", "a"]
    assert [group.diverged for group in report.groups] == [0, 0, 1]
    markdown = (tmp_path / "report.md").read_text()
    assert "a_lost · split_toy (1 of 3 diverged)" in markdown
    assert any("diverged at step 3" in note for note in report.notes)
    # c is compared with b, the best that did not diverge
    assert set(against_best(report.groups, "FORG")) == {1, 2}
    assert pd.read_csv(tmp_path / "runs.csv").diverged.notna().sum() == 1


@pytest.mark.parametrize(("n", "text"), [(1, "60.0"), (2, "60.0"), (3, "60.0 ± 24.8")])
def test_there_is_no_interval_below_three_seeds(n, text):
    assert str(Estimate.of([0.5, 0.7, 0.6][:n] if n > 1 else [0.6])) == text
