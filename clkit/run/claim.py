"""Whose a run's folder is: a run trains in an empty folder or its own, and removes nothing; torch is not imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from clkit import __version__
from clkit.errors import ConfigurationError
from clkit.files import write_atomically
from clkit.report.runs import REPLACED, flatten
from clkit.run.folder import LOCK, LOG, is_finished
from clkit.run.provenance import code_of

NOT_IN_RESULT = ("resume", "attempts", "objective", "folder", "data_root", "share_folder", "share_first")
SCRATCH = ".scratch"
FIGURES = ("stability_gap", "zoom", "overlay", "worst_case", "time", "drift", "connectivity")
# what is moved first tells that a run is finished, or can go on: a kill between leaves one that starts anew
RESULTS = (
    *("metrics.json", "checkpoints", "history*.csv", "tensorboard", "csv", "wandb", "mlruns", "adapters"),
    *("report.md", "report.tex", "report.csv", "runs.csv", "report.html", "timing.json", "gradients.csv"),
    *("drift.csv", "flops.json", "connectivity.csv", "answers", "answers.csv", "answers.json", "eval*.csv"),
    *("mlflow.db", "mlartifacts", "start", "held_out", "features.json", "memory.json"),
    *(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")),
)
RECORDS = ("attempts.jsonl", LOG, ".hydra")
_SHOWN = 5


@dataclass(frozen=True)
class Owner:
    """The run whose folder it is.

    Args:
        config: Its config's :func:`fingerprint`.
        clkit: The version of clkit that claimed the folder.
        kept: Names of what was in the folder before; it is none of the run's.
        data: Fingerprint of the data that it read; empty until known.
        data_root: Where they were.
        code: What it ran, see :func:`~clkit.run.provenance.code_of`.
        parent: The run that it goes on from (``run``), and the ``experience`` and its ``name`` after which; empty if it
            goes on from none.
        own_first: Why it shares its first experience with no other run although that was asked for; empty otherwise.
    """

    config: str
    clkit: str = __version__
    kept: tuple[str, ...] = ()
    data: str = ""
    data_root: str = ""
    code: Mapping[str, str] = field(default_factory=dict)
    parent: Mapping[str, Any] = field(default_factory=dict)
    own_first: str = ""

    def write(self, folder: Path) -> None:
        """Write ``run.json``."""
        write_atomically(folder / "run.json", json.dumps(self.__dict__, indent=1) + "\n")


def owner(folder: Path) -> Owner | None:
    """Return the run whose folder this is, if any.

    Raises:
        ConfigurationError: If its ``run.json`` cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**{**content, "kept": tuple(content.get("kept", ()))})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}), so it is unknown whose results lie beside it; move the folder away, or "
            "choose another one with hydra.run.dir=DIR."
        ) from error


def fingerprint(config: DictConfig) -> str:
    """Return a short hash of everything in a config that the result depends on."""
    return hashlib.sha256(json.dumps(_content(config)).encode()).hexdigest()[:16]


def owned_by(folder: Path, config: DictConfig) -> bool:
    """Tell whether the folder is that of the run with this config."""
    there = owner(folder)
    return there is not None and there.config == fingerprint(config)


def reads_as_before(folder: Path, config: DictConfig) -> bool:
    """Tell whether a run's data are where they were; only reading them tells whether they are the same."""
    there = owner(folder)
    return there is not None and there.data_root in ("", data_root(config))


def data_root(config: DictConfig) -> str:
    """Return where a run's data are."""
    return str(Path(str(config.data_root)).absolute())


def refuse_foreign(folder: Path, config: DictConfig) -> None:
    """Refuse a folder that is not empty and no run's, and results of another config; nothing is written.

    Raises:
        ConfigurationError: If the folder is such a one and neither ``share_folder`` nor ``resume=false`` was chosen.
    """
    # in this order: another process that is about to claim it writes run.json first
    found, there = _names(folder), owner(folder)
    if there is None:
        taken = sorted({path.name for path in _matching(folder, (*RESULTS, *RECORDS)) if path.name in found})
        if found and not config.share_folder:
            raise ConfigurationError(
                f"{folder} holds {_some(found)} and is no run's folder; choose another one with hydra.run.dir=DIR (in "
                "a sweep hydra.sweep.dir=DIR), or train among these files with share_folder=true."
            )
        if taken:
            raise ConfigurationError(
                f"{folder} holds {_some(taken)}, which clkit train did not make and would overwrite; move that away, "
                "or choose another folder with hydra.run.dir=DIR."
            )
    elif config.resume and there.config != fingerprint(config) and _has_results(folder, there):
        raise ConfigurationError(
            f"{folder} holds a run of another config: {_differences(folder, config, there)}. Train anew with "
            f"resume=false, which moves what is there to {REPLACED}/, or choose another folder with hydra.run.dir=DIR "
            "(in a sweep hydra.sweep.dir=DIR)."
        )


def note_data(folder: Path, data: str, root: str) -> None:
    """Note in the folder of a run which data it reads.

    Raises:
        ConfigurationError: If they are others than those that it has read.
    """
    there = owner(folder)
    assert there is not None
    if there.data and there.data != data:
        raise ConfigurationError(
            f"{folder} holds a run on other data (it read data_root={there.data_root}, and {root} holds something "
            f"else now). Train anew with resume=false, which moves what is there to {REPLACED}/, or choose another "
            "folder with hydra.run.dir=DIR."
        )
    if not there.data:
        replace(there, data=data, data_root=root).write(folder)


def note_parent(folder: Path, parent: Mapping[str, Any]) -> None:
    """Note in ``run.json`` what a run goes on from."""
    there = owner(folder)
    assert there is not None
    replace(there, parent=dict(parent)).write(folder)


def note_own_first(folder: Path, reason: str) -> None:
    """Note in ``run.json`` why a run shares its first experience with no other."""
    there = owner(folder)
    assert there is not None
    replace(there, own_first=reason).write(folder)


def claim(folder: Path, config: DictConfig) -> Path | None:
    """Make the folder that of this config's run and write its ``.hydra/``; call it with the folder held.

    Results that can or shall not be gone on with are moved into a folder below ``.replaced``.

    Returns:
        That folder, if there were any.

    Raises:
        ConfigurationError: See :func:`refuse_foreign`.
    """
    refuse_foreign(folder, config)
    there, own = owner(folder), fingerprint(config)
    ours = there is not None and there.config == own
    if config.resume and ours and (is_finished(folder) or any(folder.glob("checkpoints/step=*.ckpt"))):
        aside = None
    else:
        kept = tuple(_names(folder)) if there is None else there.kept
        same = ours and config.resume
        aside = None if there is None else _move_aside(folder, kept, RESULTS if same else (*RESULTS, *RECORDS))
        Owner(own, kept=kept, code=code_of(config)).write(folder)
    if not (folder / ".hydra" / "config.yaml").exists():
        _write_config(folder, config)
    return aside


def _move_aside(folder: Path, kept: tuple[str, ...], patterns: tuple[str, ...]) -> Path | None:
    second = [path.parent for path in sorted(folder.glob("*/history.csv")) if not (path.parent / "run.json").exists()]
    moved = [path for path in (*_matching(folder, patterns), *second) if path.name not in kept]
    if not moved:
        return None
    number = 1 + max((int(path.name) for path in (folder / REPLACED).glob("*") if path.name.isdigit()), default=0)
    aside = folder / REPLACED / str(number)
    aside.mkdir(parents=True)
    for path in dict.fromkeys(moved):
        path.rename(aside / path.name)
    return aside


def _has_results(folder: Path, there: Owner) -> bool:
    return any(
        path.name not in there.kept for path in _matching(folder, ("metrics.json", "checkpoints", "history.csv"))
    )


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _names(folder: Path) -> list[str]:
    """Names of what is in a folder that is no run's, without what a run about to claim it makes."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, "run.json.part"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _content(config: DictConfig) -> dict[str, Any]:
    content: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    content = {key: value for key, value in content.items() if key not in NOT_IN_RESULT}
    # as before there were such settings
    return {key: value for key, value in content.items() if key not in ("from", "fresh") or value}


def _differences(folder: Path, config: DictConfig, there: Owner) -> str:
    made = f"made with clkit {there.clkit}"
    path = folder / ".hydra" / "config.yaml"
    try:
        old, new = dict(flatten(_content(OmegaConf.load(path)))), dict(flatten(_content(config)))  # type: ignore[arg-type]
    except Exception:
        return made
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    shown = [f"{key} ({old.get(key, 'not set')} there, {new.get(key, 'not set')} here)" for key in keys]
    return _some(shown) + f", {made}" if shown else made


def _write_config(folder: Path, config: DictConfig) -> None:
    """Write what Hydra would have written before anything was checked (``hydra.output_subdir`` is null)."""
    parts: dict[str, Any] = {}
    job: Any = HydraConfig.instance().cfg
    # not of another run that this job trains first
    if job is not None and Path(job.hydra.runtime.output_dir).resolve() == folder.resolve():
        parts = {"hydra": job, "overrides": job.hydra.overrides.task}
    # the config last: where it is, all are
    for name, part in {**parts, "config": config}.items():
        write_atomically(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))
