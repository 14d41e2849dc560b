import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from clkit import ConfigurationError
from clkit.evaluation.history import History, HistoryWriter
from clkit.report import write_report
from clkit.report.figures import accuracy_matrix_figure, envelope, save, stability_gap_figure
from clkit.report.runs import find_runs, group_runs
from clkit.report.tables import Table

NAN = math.nan
T_TWO_DEGREES = 4.302652729911275  # 97.5% quantile of Student's t, from a table
FILES = {"report.md", "report.tex", "report.csv", "report.html", "stability_gap.png", "stability_gap.svg"}


def make_run(folder, final, *, lowest=0.25, overrides=None, config=None, complete=True):
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
            "format": 1, "biased": [], "complete": True, "score": "accuracy", "schedule": "every step", "subset": 1000,
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


def test_sweep_mean_and_interval_against_the_hand_calculation(tmp_path):
    report = write_report([sweep(tmp_path)])
    er, naive = report.groups
    assert (er.label, naive.label) == ("er · split_toy", "naive · split_toy")
    estimate = er.estimate("ACC")
    assert (estimate.n, estimate.mean, estimate.std) == pytest.approx((3, 0.75, 0.05))
    assert estimate.half == pytest.approx(T_TWO_DEGREES * 0.05 / math.sqrt(3))
    assert str(estimate) == "75.0 ± 12.4"
    assert str(naive.estimate("ACC")) == "50.0"
    assert str(naive.estimate("AAA")) == "–"
    assert report.notes == ()


def test_sweep_writes_all_files_into_the_given_folder(tmp_path):
    report = write_report([sweep(tmp_path)])
    assert {file.name for file in report.files} == FILES
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == FILES


def test_single_run_is_reported_in_its_own_folder(tmp_path):
    folder = make_run(tmp_path / "runs" / "one", 0.7)
    report = write_report([tmp_path])
    assert {file.parent for file in report.files} == {folder}
    assert report.groups[0].label == "one"


def test_output_folder_can_be_chosen(tmp_path):
    make_run(tmp_path / "one", 0.7)
    report = write_report([tmp_path / "one"], tmp_path / "new" / "place")
    assert {file.parent for file in report.files} == {tmp_path / "new" / "place"}


def test_text_outputs_hold_the_numbers(tmp_path):
    write_report([sweep(tmp_path)])
    markdown, latex = (tmp_path / "report.md").read_text(), (tmp_path / "report.tex").read_text()
    assert "| er · split_toy | 3 | 75.0 ± 12.4 |" in markdown
    assert "| cats | 70.0 ± 24.8 | 20.0 ± 24.8 | 25.0 ± 0.0 |" in markdown
    assert r"er $\cdot$ split\_toy & 3 & 75.0 $\pm$ 12.4 &" in latex
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    frame = pd.read_csv(tmp_path / "report.csv", index_col="run")
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


def test_html_is_self_contained_and_complete(tmp_path):
    write_report([sweep(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    page = Loads()
    page.feed(text)
    assert page.open == []
    assert all(target.startswith(("#", "data:")) for target in page.loaded)
    assert not re.search(r"@import|url\((?!#)|fetch\(", text)
    assert text.count("<svg") == 4
    for content in ("75.0 ± 12.4", "lowest accuracy in any evaluation", "9.8.7", "strategy.er.capacity"):
        assert content in text
    assert "<td>folder</td>" not in text


def test_html_escapes_what_comes_from_files(tmp_path):
    make_run(tmp_path / "<b>&", 0.7)
    write_report([tmp_path])
    text = (tmp_path / "<b>&" / "report.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text


def test_terminal_shows_the_table_and_the_files(tmp_path):
    console = Console(width=140, record=True, file=StringIO())
    write_report([sweep(tmp_path)]).show(console)
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
    band = figure.axes[0].collections[0].get_paths()[0].vertices
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


def test_reporting_needs_no_torch():
    code = (
        "import sys, clkit.report, clkit.evaluation.functional, clkit.evaluation.summary;"
        "sys.exit(bool({'torch', 'pytorch_lightning', 'torchmetrics', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
