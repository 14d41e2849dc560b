"""Runs on disk: finding them, reading them, and grouping those that differ in their seed alone."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]

from clkit.errors import ConfigurationError
from clkit.metrics.history import History
from clkit.metrics.summary import summary
from clkit.report.estimate import Estimate

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SUMMARY = {"complete", "stream", "metrics"}
ABSENT = "–"
REPLACED = ".replaced"
"""Folder of what a run's folder held before it was trained anew."""
FIRST = ".first"
"""Folder of the first experiences that runs beside it share."""
ASIDE = {REPLACED, FIRST}
"""Folders whose runs are not counted with those around them."""
PLANS = ".sweeps"
"""Folder of a sweep's plans, one JSON file a command."""
_NOT_IN_RESULT = {"seed", "resume", "attempts", "objective", "data_root", "folder", "share_folder", "share_first"}


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Args:
        directory: The folder.
        history: Its evaluations.
        summary: Its ``metrics.json``, or the same computed from the history if there is none.
        config: Its ``.hydra/config.yaml``, unresolved; empty without one.
        overrides: Its ``.hydra/overrides.yaml``, name to value; empty without one.
        scenario: Name of its scenario's config; empty if unknown.
        seconds: Training time without evaluation, from its ``timing.json``; NaN if unknown.
        notes: What is missing.
        view: Name of a second evaluation's folder below the run's; empty for the run's own.
        parent: What its ``run.json`` says of the run that it goes on from (``run``, ``experience``, ``name``); empty if
            it goes on from none.
    """

    directory: Path
    history: History
    summary: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, str] = field(default_factory=dict)
    scenario: str = ""
    seconds: float = np.nan
    notes: tuple[str, ...] = ()
    view: str = ""
    parent: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Run:
        """Read one run folder.

        Raises:
            ConfigurationError: If its ``history.csv`` or its configuration cannot be read.
        """
        history = History.read(directory / "history.csv")
        # a second evaluation of a run lies in a folder below it
        second = not (directory / ".hydra").is_dir() and (directory.parent / ".hydra").is_dir()
        hydra = (directory.parent if second else directory) / ".hydra"
        config = _yaml(hydra / "config.yaml", {})
        overrides = dict(_split(item) for item in _yaml(hydra / "overrides.yaml", []))
        runtime = _yaml(hydra / "hydra.yaml", {}).get("hydra", {}).get("runtime", {})
        scenario = overrides.get("scenario") or runtime.get("choices", {}).get("scenario") or _scenario(config)
        metrics = _metrics(directory / "metrics.json")
        notes: tuple[str, ...] = () if metrics and metrics["complete"] else ("unfinished",)
        if metrics is None:
            metrics = summary(
                history,
                stream={
                    "name": scenario,
                    "kind": "unknown",
                    "experiences": [f"E{k}" for k in range(history.n_experiences)],
                },
                complete=False,
                schedule="every step" if _period(history) == 1 else f"every {_period(history)} steps",
                subset=None,
            )
            notes = ("unfinished: no metrics.json of format 1, numbers computed from history.csv",)
        if metrics.get("diverged") is not None:
            notes += (f"diverged at step {metrics['diverged']}: its scores are those of chance",)
        if not len(history):
            notes += ("no evaluation yet",)
        seconds = (_json(directory / "timing.json") or {}).get("training_seconds", np.nan)
        view = directory.name if second else ""
        parent = (_json(directory / "run.json") or {}).get("parent") or {}
        return cls(directory, history, metrics, config, overrides, scenario, seconds, notes, view, parent)

    @property
    def complete(self) -> bool:
        """Whether the run reached the end of its stream."""
        return bool(self.summary["complete"])

    @property
    def diverged(self) -> int | None:
        """The optimizer step from which on its loss was not finite; ``None`` if it stayed so, or nobody looked."""
        return self.summary.get("diverged")

    @property
    def experiences(self) -> list[str]:
        """Names of the K experiences."""
        return list(self.summary["stream"]["experiences"])

    @property
    def seed(self) -> str:
        """The seed, ``–`` if unknown."""
        return str(self.config.get("seed", self.overrides.get("seed", "–")))

    @property
    def label(self) -> str:
        """Strategies and scenario, or the folder's name without a configuration."""
        if not self.config:
            return self.directory.resolve().name
        strategies = " + ".join(self.config.get("strategy") or ["no strategy"])
        return " · ".join(filter(None, (strategies, self.view, self.scenario)))

    @cached_property
    def answers(self) -> Mapping[str, Any]:
        """Its ``answers.json`` (:class:`~clkit.language.generation.AnswerScores`); empty without one."""
        return _json(self.directory / "answers.json") or {}

    def metric(self, name: str) -> float:
        """A metric by name; NaN if undefined."""
        value = self.summary["metrics"].get(name)
        return np.nan if value is None else float(value)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone.

    Args:
        label: What sets the group apart.
        runs: The runs, in the order of their seeds.
    """

    label: str
    runs: tuple[Run, ...]

    @cached_property
    def counted(self) -> tuple[Run, ...]:
        """The runs that means are taken over: those that are complete or diverged, or all if none is."""
        return tuple(run for run in self.runs if run.complete or run.diverged is not None) or self.runs

    @property
    def diverged(self) -> int:
        """Number of the counted runs that diverged."""
        return sum(run.diverged is not None for run in self.counted)

    def estimate(self, name: str) -> Estimate:
        """Mean and interval of a metric."""
        return Estimate.of(run.metric(name) for run in self.counted)


def find_runs(directories: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Read every run at or below the directories; return them and notes on what is missing or unreadable.

    Raises:
        ConfigurationError: If there is no readable run.
    """
    directories = [Path(directory) for directory in directories]
    runs, notes = [], []
    for directory in dict.fromkeys(folder for root in directories for folder in _run_folders(root)):
        try:
            runs.append(Run.read(directory))
            notes += [f"{directory}: {note}" for note in runs[-1].notes]
        except ConfigurationError as error:
            notes.append(str(error))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            notes.append(f"{directory} cannot be read, some file in it is broken: {error!r}")
    if not runs:
        raise ConfigurationError(
            f"No run found in {', '.join(map(str, directories)) or 'no directory'}: a run folder holds a history.csv. "
            + " ".join(notes)
        )
    return runs, notes


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Group runs whose overrides are equal except for the seed; return the groups and notes on doubtful ones.

    The best comes first, by its final accuracy; groups without one, or with diverged runs, come last.
    """
    members: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        apart = frozenset(item for item in run.overrides.items() if item[0] not in _NOT_IN_RESULT)
        members.setdefault((run.label, run.history.n_experiences, apart), []).append(run)
    shared = {
        label: set.intersection(*(set(run.overrides.items()) for run in runs if run.label == label))
        for label in {run.label for run in runs}
    }
    unsaid = _NOT_IN_RESULT | {"strategy", "scenario"}
    groups, notes = [], []
    for same in members.values():
        same.sort(key=lambda run: (len(run.seed), run.seed))
        said = shared[same[0].label]
        extra = [f"{k}={v}" for k, v in same[0].overrides.items() if k not in unsaid and (k, v) not in said]
        group = Group(" · ".join([same[0].label, *extra]), tuple(same))
        groups.append(group)
        repeated = [seed for seed, count in Counter(run.seed for run in same).items() if count > 1]
        if repeated:
            notes.append(
                f"{group.label}: several runs with seed {', '.join(repeated)}; the interval takes them as independent"
            )
        if len(group.counted) < len(same):
            notes.append(
                f"{group.label}: {len(same) - len(group.counted)} of {len(same)} runs unfinished, not in the means"
            )
    return sorted(groups, key=_rank), notes


def shortened(groups: Sequence[Group]) -> tuple[str, list[Group]]:
    """Return what the labels of all groups share, and the groups under what is left of theirs."""
    parts = [group.label.split(" · ") for group in groups]
    shared = [part for part in parts[0] if all(part in other for other in parts)] if len(groups) > 1 else []
    names = [" · ".join(part for part in own if part not in shared) for own in parts]
    if not all(names) or len(set(names)) < len(names):
        return "", list(groups)
    return " · ".join(shared), [Group(name, group.runs) for name, group in zip(names, groups, strict=True)]


def _rank(group: Group) -> tuple[bool, float, str]:
    final = group.estimate("ACC").mean
    return group.diverged > 0, -final if np.isfinite(final) else np.inf, group.label


def config_differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Map each dotted config key whose value differs between groups to its value in each of them (not the seed)."""
    flat = [dict(flatten(group.runs[0].config)) for group in groups]
    keys = sorted({key for config in flat for key in config} - _NOT_IN_RESULT)
    values = {key: [config.get(key, ABSENT) for config in flat] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _run_folders(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise ConfigurationError(f"{root} is no directory; give a run folder or a folder that holds runs.")
    marks = {path.parent for name in ("history.csv", ".hydra") for path in root.rglob(name)}
    yield from sorted(mark for mark in marks if ASIDE.isdisjoint(mark.relative_to(root).parts))


def _metrics(path: Path) -> dict[str, Any] | None:
    content = _json(path)
    return content if content and content.get("format") == 1 and content.keys() >= _SUMMARY else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _yaml(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _LOADER) or default
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if type(content) is not type(default):
        raise ConfigurationError(f"{path} cannot be read: it holds a {type(content).__name__}.")
    return content


def _scenario(config: Mapping[str, Any]) -> str:
    node = config.get("scenario")
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, Mapping) else str(node or "")


def _split(override: str) -> tuple[str, str]:
    name, _, value = override.partition("=")
    return name.lstrip("+~"), value


def _period(history: History) -> int:
    steps = history.select("step").steps
    return int(np.diff(steps, prepend=0).max(initial=1))


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings of a nested config by their dotted names, as text."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def current_plans(folder: Path) -> list[Path]:
    """Return the plans in a folder that somebody waits for: of the newest sweep, and of all whose command still runs.

    Others are those of commands that were changed, or given up: what these never started, nobody expects.
    """
    paths = sorted((folder / PLANS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [path for path in paths if path == paths[-1] or _runs_here(_json(path) or {})]


def _runs_here(plan: Mapping[str, Any]) -> bool:
    """Tell whether the command of a plan runs on this machine."""
    pid = plan.get("pid")
    if plan.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def missing_runs(folder: Path) -> list[Path]:
    """Return the folders of runs that the :func:`current_plans` of a folder name and that have no result."""
    plans = (_json(path) or {} for path in current_plans(folder))
    planned = {folder / name for plan in plans for name in plan.get("runs", ())}
    return sorted(path for path in planned if not (path / "history.csv").exists())
