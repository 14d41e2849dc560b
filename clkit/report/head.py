"""What the page of a report says first: what was run, and the three numbers that matter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from clkit.metrics.functional import Statistics
from clkit.report.runs import PLANS, Group, Run, missing_runs
from clkit.report.significance import LEVEL, against_best

_SHOWN = 3


@dataclass(frozen=True)
class Number:
    """One of the numbers that matter.

    Args:
        label: What it is.
        value: The number.
        unit: Its unit.
        note: What else to know of it.
    """

    label: str
    value: str
    unit: str
    note: str


def facts(groups: Sequence[Group], directories: Sequence[Path]) -> dict[str, str]:
    """Return when, by which command, where, with what and for how long the runs ran, as far as their folders tell."""
    runs = [run for group in groups for run in group.runs]
    attempts = {run.directory: _attempts(run.directory) for run in runs if not run.view}
    starts = [attempt["started"] for tried in attempts.values() for attempt in tried if "started" in attempt]
    hosts = sorted({str(attempt["host"]) for tried in attempts.values() for attempt in tried if "host" in attempt})
    versions = [run.summary.get("versions", {}) for run in runs]
    packages = [f"{name} {_several(v.get(name) for v in versions)}" for name in ("clkit", "torch", "python")]
    ended = sum(run.complete or run.diverged is not None for run in runs)
    planned = len(runs) + sum(len(missing_runs(Path(folder))) for folder in directories)
    found = {
        "Runs": f"{ended} of {planned} finished" if ended < planned else "",
        "Date": _dates(starts),
        "Command": "\n".join(_commands(runs, directories)),
        "Machine": _list(hosts),
        "Versions": ", ".join(name for name in packages if not name.endswith(" ")),
        "Duration": _duration(attempts.values(), runs),
    }
    return {name: value for name, value in found.items() if value}


def numbers(groups: Sequence[Group]) -> list[Number]:
    """Return the best setting's final accuracy, its lead or its lowest accuracies, and its deepest fall."""
    sound = [group for group in groups if not group.diverged and np.isfinite(group.estimate("ACC").mean)]
    if not sound:
        steps = [run.diverged for group in groups for run in group.counted if run.diverged is not None]
        note = f"the loss was not finite from step {min(steps)} on: scores are those of chance" if steps else ""
        return [Number("diverged" if steps else "no result yet", "–", "", note)]
    best = max(sound, key=lambda group: group.estimate("ACC").mean)
    score = best.counted[0].summary["score"].replace("_", " ")
    seeds = f"mean of {len(best.counted)} seeds" if len(best.counted) > 1 else "one seed"
    final = str(best.estimate("ACC"))
    if len(groups) == 1:
        first = Number(f"{score} at the end", final, "%", f"of all that was learned, {seeds} (ACC)")
        second = Number(
            "lowest on the way", str(best.estimate("min-ACC")), "%", "mean over the old experiences (min-ACC)"
        )
    else:
        first = Number(f"best: {best.label}", final, "%", f"{score} at the end, {seeds} (ACC)")
        second = _lead(groups, sound, best)
    return [first, second, _fall(best)]


def _lead(groups: Sequence[Group], sound: Sequence[Group], best: Group) -> Number:
    others = [group for group in sound if group is not best]
    if not others:
        return Number("ahead", "–", "", "nothing to compare with: all others diverged or have no result")
    second = max(others, key=lambda group: group.estimate("ACC").mean)
    lead = best.estimate("ACC").mean - second.estimate("ACC").mean
    p = against_best(groups, "ACC").get(list(groups).index(second))
    sure = "too few common seeds for a test" if p is None else f"p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    sure += "" if p is None or p < LEVEL else ": no significant difference"
    return Number(f"ahead of {second.label}", f"{100 * lead:.1f}", "points", sure)


def _fall(group: Group) -> Number:
    """Where the mean depth over seeds is largest."""
    gaps = [Statistics.of(run.history).gaps for run in group.counted]
    depth = np.stack([gap["depth"] for gap in gaps])
    if not np.isfinite(depth).any():
        return Number("deepest fall", "–", "", "no old experience was evaluated while a later one was learned")
    counts = np.isfinite(depth).sum(axis=0)
    mean = np.nansum(depth, axis=0) / np.where(counts, counts, np.nan)
    learned, old = np.unravel_index(int(np.nanargmax(mean)), mean.shape)
    names = group.counted[0].experiences
    note = f"{names[old]} while {names[learned]} is learned"
    recovery = np.array([gap["recovery"][learned, old] for gap in gaps])
    if np.isfinite(recovery).all():
        note += f", back after {recovery.mean():.0f} steps"
    elif np.isnan(recovery).all():
        note += ", not back within 2 points"
    label = f"deepest fall of {group.label}" if " " not in group.label else "deepest fall"
    return Number(label, f"−{100 * mean[learned, old]:.0f}", "points", note)


def _commands(runs: Sequence[Run], directories: Sequence[Path]) -> list[str]:
    plans = [_json(path) for folder in directories for path in sorted((Path(folder) / PLANS).glob("*.json"))]
    commands = [" ".join(["clkit train -m", *plan["command"]]) for plan in plans if plan.get("command")]
    if not commands and len({run.directory for run in runs}) == 1 and runs[0].overrides:
        commands = [" ".join(["clkit train", *(f"{key}={value}" for key, value in runs[0].overrides.items())])]
    return commands[:_SHOWN] + [f"and {len(commands) - _SHOWN} more"] * (len(commands) > _SHOWN)


def _duration(tried: Iterable[Sequence[dict[str, Any]]], runs: Sequence[Run]) -> str:
    spans = [a["ended"] - a["started"] for attempts in tried for a in attempts if {"ended", "started"} <= a.keys()]
    training = [run.seconds for run in runs if np.isfinite(run.seconds)]
    if not spans and not training:
        return ""
    text = _time(sum(spans) if spans else sum(training))
    return f"{text} in {len(runs)} runs" if len(runs) > 1 else text


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _dates(starts: Sequence[float]) -> str:
    if not starts:
        return ""
    first, last = (datetime.fromtimestamp(second(starts)).astimezone() for second in (min, max))
    begun = f"{first.day} {first:%b %Y, %H:%M}"
    return begun if first.date() == last.date() else f"{begun} to {last.day} {last:%b %Y, %H:%M}"


def _several(values: Iterable[str | None]) -> str:
    found = sorted({value for value in values if value})
    return " / ".join(found)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _attempts(folder: Path) -> list[dict[str, Any]]:
    """The attempts of ``attempts.jsonl``: each begins with ``started``, later lines add to it."""
    try:
        lines = (folder / "attempts.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "started" in entry:
            found.append(entry)
        elif isinstance(entry, dict) and found:
            found[-1].update(entry)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
