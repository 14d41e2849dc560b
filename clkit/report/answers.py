"""Scores of generated answers: what was forgotten by content and by form, and what is scored without seeing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clkit.report.estimate import Estimate
from clkit.report.runs import Group, Run
from clkit.report.tables import ANSWERS, Table, marked

Matrix = NDArray[np.float64]

READINGS = {"score": "content", "strict": "strict", "wrong_image": "wrong image", "grey_image": "grey image"}
"""What a score is, by its name in ``answers.json``."""

_SHORT = ("OP", "BWT")
_BEFORE = "(before training)"


def answered(group: Group) -> list[Run]:
    """The counted runs that have answers."""
    return [run for run in group.counted if run.answers]


def matrices(run: Run) -> dict[str, Matrix]:
    """The score matrices of a run, ``[T, T]``, row learned, column asked; NaN where nothing was."""
    return {name: np.array(run.answers[name]["matrix"], np.float64) for name in READINGS if name in run.answers}


def summary_table(groups: Sequence[Group], *, short: bool = False) -> Table:
    """One row for each group: the scores of its answers, mean and interval over seeds.

    Args:
        groups: The groups; those without answers are left out.
        short: As few columns as a terminal has room for.
    """
    found = [(group, answered(group)) for group in groups if answered(group)]
    unseen = [
        name for name in READINGS if name.endswith("image") and any(name in r.answers for _, s in found for r in s)
    ]
    shown = {name: key for name, key in ANSWERS.items() if not short or name in _SHORT}
    rows = []
    for group, runs in found:

        def cell(reading: str, key: str, runs: list[Run] = runs) -> str:
            return str(Estimate.of(_defined(run.answers.get(reading, {}).get(key)) for run in runs))

        cells = [cell("score", key) for key in shown.values()]
        cells += [cell("strict", key) for key in map(ANSWERS.__getitem__, _SHORT)]
        rows.append((marked(group), *([] if short else [str(len(runs))]), *cells, *(cell(n, "op") for n in unseen)))
    caption = (
        "Generated answers in percent: final mean score (OP), its change since each task was learned (BWT), "
        + ("" if short else "mean score right after learning (MFT), mean over the stream (MAA); ")
        + "strict: the format counts too"
        + ("; OP of the questions asked with another image and a grey one" if unseen else "")
    )
    header = ("run", *([] if short else ["seeds"]), *shown, *(f"strict {name}" for name in _SHORT))
    return Table(caption, (*header, *(READINGS[name] for name in unseen)), tuple(rows))


def forgotten(own: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """What a run's scores of each task fell by since it was learned, ``[T]``; NaN of the last task.

    Args:
        own: See :func:`matrices`.

    Returns:
        ``by content``; ``strictly``; and ``in form alone``, by how much more strictly than by content.
    """
    content, strict = (np.diag(own[name]) - own[name][-1] for name in ("score", "strict"))
    content[-1] = strict[-1] = np.nan  # the last task cannot be forgotten yet
    return {"by content": content, "strictly": strict, "in form alone": strict - content}


def tasks_table(group: Group) -> Table:
    """One row for each task: its score when learned and at the end, and what was forgotten, by content and by form.

    What is forgotten strictly is the fall of the score that wants the right form too; what of it is not forgotten by
    content, is of form (superficial forgetting: Chen et al., *SEFE*, arXiv 2505.02486).
    """
    runs = answered(group)
    if not runs:
        return Table("", (), ())
    found = [matrices(run) for run in runs]
    unseen = [name for name in READINGS if name.endswith("image") and name in found[0]]
    columns = []
    for own in found:
        parts = [np.diag(own["score"]), own["score"][-1], own["strict"][-1], *forgotten(own).values()]
        columns.append(np.stack([*parts, *(own[name][-1] for name in unseen)]))
    values = np.stack(columns)
    means = np.array([[_mean(row) for row in run] for run in values])
    about = runs[0].answers
    names = [*zip(about["experiences"], about["metrics"], strict=True), ("mean", "")]
    cells = np.concatenate([values, means[:, :, None]], axis=2)
    rows = tuple(
        (name, metric, *(str(Estimate.of(cells[:, column, k])) for column in range(cells.shape[1])))
        for k, (name, metric) in enumerate(names)
    )
    header = ("task", "metric", "learned", "final", "final, strict", "forgotten", "strictly", "of form")
    caption = (
        f"{group.label}: generated answers in percent, by content; what was forgotten since learned by content and "
        "strictly, whose difference is of form" + ("; final with another image and a grey one" if unseen else "")
    )
    return Table(caption, (*header, *(READINGS[name] for name in unseen)), rows)


def time_table(group: Group) -> Table:
    """One row for each task's end: means over the tasks so far."""
    runs = answered(group)
    if not runs:
        return Table("", (), ())
    found = [matrices(run) for run in runs]
    names = [name for name in READINGS if name in found[0]]
    rows = []
    for t, task in enumerate(runs[0].answers["experiences"][: len(found[0]["score"])]):
        means = {name: [_mean(own[name][t, : t + 1]) for own in found] for name in names}
        form = [content - strict for content, strict in zip(means["score"], means["strict"], strict=True)]
        cells = [means["score"], means["strict"], form, *(means[name] for name in names if name.endswith("image"))]
        rows.append((task, *(str(Estimate.of(values)) for values in cells)))
    header = ("after", "content", "strict", "form", *(READINGS[name] for name in names if name.endswith("image")))
    caption = f"{group.label}: mean score in percent of the tasks so far; form is content without strict"
    return Table(caption, header, tuple(rows))


def matrix_table(group: Group) -> Table:
    """One row for each task's end, one column for each task: the scores of the answers by content.

    A first row has the scores before the training, where the runs have them.
    """
    runs = answered(group)
    if not runs:
        return Table("", (), ())
    rows = _rows(runs, [run.answers for run in runs])
    return Table(
        f"{group.label}: generated answers to each task in percent, by content",
        ("after", *runs[0].answers["experiences"]),
        tuple((name, *(str(Estimate.of(column)) for column in cells.T)) for name, cells in rows),
    )


def general_table(group: Group) -> Table:
    """One row for each task's end: the scores of the tasks that are never trained on, which nothing else counts.

    The last column is their mean less that before the training (TRACE's general ability delta).
    """
    runs = [run for run in answered(group) if "general" in run.answers]
    if not runs:
        return Table("", (), ())
    rows = []
    start: Matrix | None = None
    for name, cells in _rows(runs, [run.answers["general"] for run in runs]):
        start = cells if name == _BEFORE else start
        means = cells.mean(axis=1)
        since = np.full_like(means, np.nan) if start is None or name == _BEFORE else means - start.mean(axis=1)
        rows.append((name, *(str(Estimate.of(column)) for column in (*cells.T, means, since))))
    return Table(
        f"{group.label}: generated answers to general tasks in percent, by content; these are never trained on and "
        "are in no other number; delta is the change of their mean since before the training",
        ("after", *runs[0].answers["general"]["experiences"], "mean", "delta"),
        tuple(rows),
    )


def _rows(runs: Sequence[Run], contents: Sequence[Mapping[str, Any]]) -> list[tuple[str, Matrix]]:
    """The name of each row of some matrices of scores by content, and the row of every run, ``[runs, tasks]``."""
    learned = runs[0].answers["experiences"]
    found = [np.array(content["score"]["matrix"], np.float64) for content in contents]
    rows = [(learned[t], np.stack([own[t] for own in found])) for t in range(min(map(len, found)))]
    before = [content["score"].get("before") for content in contents]
    if all(row is not None for row in before):
        rows.insert(0, (_BEFORE, np.array(before, np.float64)))
    return rows


def mean_matrices(group: Group) -> dict[str, Matrix]:
    """The mean over a group's seeds of each matrix that all of them have."""
    found = [matrices(run) for run in answered(group)]
    common = [name for name in READINGS if found and all(name in own for own in found)]
    return {name: np.mean([own[name] for own in found], axis=0) for name in common}


def _mean(values: Matrix) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else np.nan


def _defined(value: float | None) -> float:
    return np.nan if value is None else value
