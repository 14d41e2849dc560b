"""Generated answers in the report: what was forgotten by content and by form, and what is scored without seeing."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from test_report import make_run

from clkit.metrics.functional import language_summary
from clkit.report import answers, write_report
from clkit.report.figures import answers_figure
from clkit.report.runs import find_runs, group_runs

# three tasks: the form of the first is lost, the content of the second
CONTENT = [[0.8, None, None], [0.8, 0.6, None], [0.7, 0.2, 0.9]]
STRICT = [[0.8, None, None], [0.3, 0.6, None], [0.1, 0.2, 0.9]]
WRONG = [[0.3, None, None], [0.3, 0.1, None], [0.2, 0.1, 0.4]]
GREY = [[0.25, None, None], [0.2, None, None], [0.2, None, 0.3]]


BEFORE, GENERAL = [0.1, 0.2, 0.3], [[0.4, 0.7], [0.3, 0.7], [0.2, 0.6]]


def with_answers(folder, *, blind=True, general=False, overrides=None, config=None):
    make_run(folder, 0.6, overrides=overrides, config=config)
    content = {"experiences": ["letters", "words", "boxes"], "metrics": ["letter", "exact_match", "box_iou"]}
    found = {"score": CONTENT, "strict": STRICT, **({"wrong_image": WRONG, "grey_image": GREY} if blind else {})}
    for name, matrix in found.items():
        numbers = language_summary(np.array(matrix, dtype=float))
        content[name] = {"matrix": matrix, **{k: None if np.isnan(v) else v for k, v in numbers.items()}}
    if general:
        content["score"]["before"] = BEFORE
        content["general"] = {"experiences": ["facts", "sums"], "metrics": ["f1", "number"]}
        content["general"]["score"] = {"matrix": GENERAL, "before": [0.5, 0.7]}
    (folder / "answers.json").write_text(json.dumps(content))
    return folder


WORDS = ("generated answers to each task", "(before training)", "general tasks in percent", "delta")


def group_of(folder):
    return group_runs(find_runs([folder])[0])[0][0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return with_answers(tmp_path_factory.mktemp("answers") / "run")


def test_each_tasks_forgetting_is_told_apart_by_content_and_form(run):
    table = answers.tasks_table(group_of(run))
    assert table.header[2:8] == ("learned", "final", "final, strict", "forgotten", "strictly", "of form")
    assert table.rows == (
        ("letters", "letter", "80.0", "70.0", "10.0", "10.0", "70.0", "60.0", "20.0", "20.0"),
        ("words", "exact_match", "60.0", "20.0", "20.0", "40.0", "40.0", "0.0", "10.0", "–"),
        ("boxes", "box_iou", "90.0", "90.0", "90.0", "–", "–", "–", "40.0", "30.0"),
        ("mean", "", "76.7", "60.0", "40.0", "25.0", "55.0", "30.0", "23.3", "25.0"),
    )


def test_over_time_the_means_of_the_tasks_so_far(run):
    table = answers.time_table(group_of(run))
    assert table.header == ("after", "content", "strict", "form", "wrong image", "grey image")
    assert table.rows == (
        ("letters", "80.0", "80.0", "0.0", "30.0", "25.0"),
        ("words", "70.0", "45.0", "25.0", "20.0", "20.0"),
        ("boxes", "60.0", "40.0", "20.0", "23.3", "25.0"),
    )


def test_the_summary_has_the_blind_baseline_where_a_run_has_it(run, tmp_path):
    table = answers.summary_table([group_of(run)])
    assert table.header[-2:] == ("wrong image", "grey image")
    (row,) = table.rows
    # BWT: of content (-10 - 40) / 2, strictly (-70 - 40) / 2
    assert row[1:] == ("1", "60.0", "−25.0", "−16.7", "76.7", "70.0", "40.0", "−55.0", "23.3", "–")
    plain = group_of(with_answers(tmp_path / "plain", blind=False))
    assert answers.summary_table([plain]).header[-1] == "strict BWT"
    assert answers.tasks_table(plain).header[-1] == "of form"
    without = group_of(make_run(tmp_path / "without", 0.5))
    assert answers.summary_table([without]).rows == answers.tasks_table(without).rows == ()
    both = answers.summary_table([group_of(run), plain], short=True)
    assert both.header[1:] == ("OP", "BWT", "strict OP", "strict BWT", "wrong image", "grey image")
    assert both.rows[1][-2:] == ("–", "–")


def test_the_matrix_has_a_row_from_before_the_training_where_the_run_has_one(run, tmp_path):
    table = answers.matrix_table(group_of(run))
    assert table.header == ("after", "letters", "words", "boxes")
    learned = (("letters", "80.0", "–", "–"), ("words", "80.0", "60.0", "–"), ("boxes", "70.0", "20.0", "90.0"))
    assert table.rows == learned
    whole = group_of(with_answers(tmp_path / "whole", general=True))
    assert answers.matrix_table(whole).rows == (("(before training)", "10.0", "20.0", "30.0"), *learned)


def test_general_tasks_stand_apart(run, tmp_path):
    assert answers.general_table(group_of(run)).rows == ()
    whole = group_of(with_answers(tmp_path / "whole", general=True))
    table = answers.general_table(whole)
    assert table.header == ("after", "facts", "sums", "mean", "delta")
    assert table.rows == (
        ("(before training)", "50.0", "70.0", "60.0", "–"),
        ("letters", "40.0", "70.0", "55.0", "−5.0"),
        ("words", "30.0", "70.0", "50.0", "−10.0"),
        ("boxes", "20.0", "60.0", "40.0", "−20.0"),
    )
    assert answers.tasks_table(whole).rows == answers.tasks_table(group_of(run)).rows
    assert answers.summary_table([whole]).rows[0][1:] == answers.summary_table([group_of(run)]).rows[0][1:]


def test_over_seeds_rows_are_means(tmp_path):
    for seed in (0, 1):
        folder = with_answers(
            tmp_path / str(seed), general=True, overrides=[f"seed={seed}"], config={"seed": seed, "strategy": {}}
        )
        content = json.loads((folder / "answers.json").read_text())
        content["score"]["before"] = [seed / 2, 0.2, None]
        (folder / "answers.json").write_text(json.dumps(content))
    ((group,), _) = group_runs(find_runs([tmp_path])[0])
    assert answers.matrix_table(group).rows[0] == ("(before training)", "25.0", "20.0", "–")


def test_a_terminal_gets_a_wide_matrix_in_parts(tmp_path):
    folder = with_answers(tmp_path / "run", general=True)
    content = json.loads((folder / "answers.json").read_text())
    n = 12
    names = [f"task number {k}" for k in range(n)]
    matrix = [[k / 20 if k <= t else None for k in range(n)] for t in range(n)]
    content = {"experiences": names, "metrics": ["f1"] * n}
    for reading in ("score", "strict"):
        content[reading] = {"matrix": matrix, **dict.fromkeys(("op", "bwt_trace", "bwt_trace_t_minus_1", "mft", "maa"))}
    (folder / "answers.json").write_text(json.dumps(content))
    report, out = write_report([folder]), io.StringIO()
    Console(file=out, width=80).print(report)
    text = out.getvalue()
    lines = text[text.index("generated answers to each task") : text.index("generated answers in percent")].splitlines()
    headers = [line.split("after")[1] for line in lines if line.strip().startswith("after")]
    assert len(headers) > 1
    assert [f"task number {k}" for k in range(n)] == [
        f"task number {word.split()[0]}" for header in headers for word in header.split("task number ")[1:]
    ]
    assert all(len(line) <= 80 for line in lines)
    assert text.count("generated answers to each task") == 1


def test_a_panel_for_each_task_from_when_it_was_learned():
    scores = {
        "content": np.array(CONTENT, dtype=float),
        "strict": np.array(STRICT, dtype=float),
        "grey image": np.array(GREY, dtype=float),
    }
    figure = answers_figure(scores, ["letters", "words", "boxes"])
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["letters", "words", "boxes"]
    first = {line.get_label(): line.get_xydata().tolist() for line in panels[0].get_lines()}
    assert first["strict"] == pytest.approx(np.array([[1, 80], [2, 30], [3, 10]]))
    assert panels[2].get_lines()[0].get_xydata().tolist() == pytest.approx(np.array([[3, 90]]))


def test_the_page_the_terminal_and_markdown_show_them(tmp_path):
    run = with_answers(tmp_path / "run", general=True)
    report = write_report([run])
    page = (run / "report.html").read_text()
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    for text in (page, (run / "report.md").read_text(), out.getvalue()):
        for word in ("of form", "wrong image", "strict BWT", "mean score in percent of the tasks so far", *WORDS):
            assert word in text.replace("\n", " ")
    assert "each task over time" in page
    assert "of form" in (run / "report.tex").read_text()
