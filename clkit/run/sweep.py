"""A sweep: the runs that a command asks for, and where each of them is."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Literal

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from clkit.errors import ConfigurationError
from clkit.files import write_atomically
from clkit.report.runs import ASIDE, PLANS, current_plans
from clkit.run.folder import Attempt, attempts, fruitless, is_finished, is_held, step_of

Status = Literal["done", "running", "failed", "stopped", "waiting"]
_TAIL = 1 << 16


@dataclass(frozen=True)
class Cell:
    """One run of a sweep and where it is.

    Args:
        folder: The run's folder.
        status: ``done``; ``running``; ``failed``; ``stopped``: started, and to go on when the command is started again;
            ``waiting``: never started.
        tried: Its attempts.
        given_up: Whether a sweep no longer tries it.
        experience: Number of the experience that is being learned, from 1; 0 before the first.
        step: Optimizer steps done.
        seconds_left: Estimated; ``None`` if unknown.
        overrides: What the run was planned with; empty if no sweep planned it.
    """

    folder: Path
    status: Status
    tried: tuple[Attempt, ...] = ()
    overrides: tuple[str, ...] = ()
    given_up: bool = False
    experience: int = 0
    step: int = 0
    seconds_left: float | None = None

    @property
    def experiences(self) -> int:
        """Number of experiences; 0 if unknown."""
        return len(self.tried[-1].steps) if self.tried else 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stream; 0 if unknown."""
        return sum(self.tried[-1].steps) if self.tried else 0

    @property
    def error(self) -> str:
        """What ended the last failed attempt."""
        return next((attempt.error for attempt in reversed(self.tried) if attempt.outcome == "failed"), "")

    @classmethod
    def read(cls, folder: Path, limit: int = 3, overrides: Sequence[str] = ()) -> Cell:
        """Look at a run's folder.

        Args:
            folder: The folder; it need not exist.
            limit: Failures at the same place before a sweep gives a run up.
            overrides: What the run was planned with.
        """
        cell = cls(folder, "waiting", tuple(attempts(folder)), tuple(overrides))
        finished, held = is_finished(folder), is_held(folder)
        if not cell.tried:
            return replace(cell, status="done" if finished else "running" if held else "waiting")
        now, last = time.time(), cell.tried[-1]
        experience, step = _position(folder, last, held)
        cell = replace(cell, experience=experience, step=step)
        if finished:
            return replace(cell, status="done")
        if held:
            speed = (step - last.step) / max(now - last.started, 1e-9)
            left = (sum(last.steps) - step) / speed if speed > 0 else None
            return replace(cell, status="running", seconds_left=left)
        given_up = fruitless(cell.tried) >= limit
        failed = last.outcome == "failed" or given_up
        return replace(cell, status="failed" if failed else "stopped", given_up=given_up)


@dataclass(frozen=True)
class Plan:
    """The runs that one command asks for.

    Args:
        folder: The sweep's folder.
        command: The command's overrides.
        runs: For each run the name of its folder below the sweep's, and its overrides.
        limit: Failures at the same place before a run is given up.
        is_current: Whether anybody waits for runs that were not started, see
            :func:`~clkit.report.runs.current_plans`.
    """

    folder: Path
    command: tuple[str, ...]
    runs: Mapping[str, tuple[str, ...]]
    limit: int = 3
    is_current: bool = True

    @classmethod
    def of(cls, config: DictConfig) -> Plan:
        """Return the plan of a composed multirun config; a search that chooses as it goes names no runs."""
        task = tuple(config.hydra.overrides.task)
        grid = str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
        return cls(Path(config.hydra.sweep.dir), task, dict(_expand(config)) if grid else {}, config.attempts)

    def save(self) -> None:
        """Write the plan into the sweep's folder, beside those of other commands."""
        folder = self.folder / PLANS
        plan = {"command": self.command, "runs": self.runs, "attempts": self.limit}
        text = json.dumps({**plan, "host": socket.gethostname(), "pid": os.getpid()}, indent=1)
        name = hashlib.sha256("\n".join(self.command).encode()).hexdigest()[:16]
        write_atomically(folder / f"{name}.json", text + "\n")

    def cells(self) -> list[Cell]:
        """Look at all its runs."""
        return [Cell.read(self.folder / name, self.limit, overrides) for name, overrides in self.runs.items()]


class Planner(Callback):
    """Notes what a sweep is about to do (a Hydra callback)."""

    current: Plan | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the plan down."""
        Planner.current = Plan.of(config)
        Planner.current.save()


def plans(folder: Path) -> list[Plan]:
    """Return the plans of all sweeps whose folder this is."""
    found, current = [], current_plans(folder)
    for path in sorted((folder / PLANS).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            runs = {name: tuple(overrides) for name, overrides in content["runs"].items()}
            found.append(Plan(folder, tuple(content["command"]), runs, content["attempts"], path in current))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            warnings.warn(f"{path} is broken and passed over; the sweep's command writes it again.", stacklevel=2)
    return found


def cells_in(folder: Path) -> list[Cell]:
    """Look at every run in a folder: those that its sweeps planned, and all others that were started.

    Left out are runs that only an earlier command planned and never started, and those of other sweeps' folders below.

    Raises:
        ConfigurationError: If there is none.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder} is no directory; give the folder of a sweep (by default runs).")
    asked = [(plan.is_current, cell) for plan in plans(folder) for cell in plan.cells()]
    planned = {cell.folder: cell for current, cell in asked if current or cell.status != "waiting"}
    others = [path.parent for path in folder.rglob(PLANS) if path.parent != folder]
    found = {path.parent for path in folder.rglob("attempts.jsonl")} - planned.keys()
    started = sorted(
        path
        for path in found
        if ASIDE.isdisjoint(path.relative_to(folder).parts) and not any(path.is_relative_to(other) for other in others)
    )
    cells = [*planned.values(), *map(Cell.read, started)]
    if not cells:
        raise ConfigurationError(f"There is no run in {folder}; give the folder of a sweep (by default runs).")
    return cells


def seconds_left(cells: Sequence[Cell]) -> float | None:
    """Estimate when all will be done, from the speed of what runs and the time that finished runs took."""
    running = [cell for cell in cells if cell.status == "running"]
    open_ended = [cell for cell in cells if cell.status in ("waiting", "stopped")]
    took = [sum((a.ended or a.started) - a.started for a in cell.tried) for cell in cells if cell.status == "done"]
    if not running or (open_ended and not took):
        return None
    left = [cell.seconds_left for cell in running]
    if any(seconds is None for seconds in left):
        return None
    known = [seconds for seconds in left if seconds is not None]
    if not open_ended:
        return max(known)
    return (sum(known) + len(open_ended) * sum(took) / len(took)) / len(running)


def _expand(config: DictConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Expand the sweep as Hydra does: the folder and the overrides of each run."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    settings = config.hydra.job.config.override_dirname
    axes: dict[str, list[tuple[str, str]]] = {}
    for override in parser.parse_overrides([*params, *config.hydra.overrides.task]):
        key = override.get_key_element()
        swept = override.is_sweep_override()
        values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        axes[key] = [(override.key_or_group, f"{key}={value}") for value in values]
    copy = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for chosen in product(*axes.values()):
        lines = sorted(line for key, line in chosen if key not in settings.exclude_keys)
        with open_dict(copy):
            copy.hydra.job.override_dirname = settings.item_sep.join(lines).replace("=", settings.kv_sep)
        yield copy.hydra.sweep.subdir, tuple(line for _, line in chosen)


def _position(folder: Path, last: Attempt, held: bool) -> tuple[int, int]:
    """Return the number of the experience and the step that a run has come to, as far as its files tell.

    A history waits for evaluations, and is behind a checkpoint where they are rare. Until an attempt has written to it,
    it is that of the attempt before, and may be ahead of the checkpoint that this one starts from.
    """
    history = folder / "history.csv"
    written = history.is_file() and (history.stat().st_mtime >= last.started or not held)
    experience, step = _end_of(history) if written else (0, 0)
    saved = max((step_of(path) for path in folder.glob("checkpoints/step=*.ckpt")), default=last.step)
    if saved > step:
        experience, step = 1 + bisect_left([*accumulate(last.steps)][:-1], saved), saved
    return experience, step


def _end_of(history: Path) -> tuple[int, int]:
    """Return the number of the experience and the step of a history's last whole line."""
    with history.open("rb") as file:
        head = file.readline().decode(errors="replace").strip().split(",")
        file.seek(max(history.stat().st_size - _TAIL, file.tell()))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    if not lines:
        return 0, 0
    row = dict(zip(head, lines[-1].split(","), strict=False))
    try:
        return int(row["experience"]) + 1, int(row["step"])
    except (KeyError, ValueError):
        return 0, 0
