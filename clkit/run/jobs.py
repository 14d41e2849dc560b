"""``clkit train`` under Hydra: one job, or a sweep of many, here or in a launcher's worker processes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from clkit.errors import ConfigurationError, suggest
from clkit.report.definitions import higher_is_better
from clkit.run import plugins
from clkit.run.claim import owned_by, reads_as_before
from clkit.run.explain import complain, explain
from clkit.run.folder import Busy, is_finished
from clkit.run.rank import is_rank_zero
from clkit.run.sweep import Planner

_codes: list[int] = []


def main() -> None:
    """Compose the config from ``sys.argv`` and run it, or sweep over many."""
    hydra.main(version_base="1.3", config_path="pkg://clkit.conf", config_name="train")(task)()


def task(config: DictConfig) -> float | None:
    """Run one job; tell of a mistake at once and let the other jobs of a sweep run.

    Returns:
        What a search asks for: the run's final value of the metric ``objective``.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    # Lightning starts the other processes of a distributed run by this command line
    sys.argv = [sys.argv[0], "train", *_search_path(), *job.overrides.task]
    sweep = job.mode is RunMode.MULTIRUN
    if sweep and config.resume is True and is_finished(folder) and _is_ours(folder, config):
        print(f"Finished before, passed over: {folder}")
        return _objective(config, folder)

    _check_objective(config)
    from clkit.run.train import run

    quieten_libraries()
    try:
        with _process_group_of_its_own() if sweep else nullcontext():
            run(config, folder, in_sweep=sweep)
    except Exception as error:
        if sweep and isinstance(error, Busy):
            print(f"clkit: left to another process: {folder.name}", file=sys.stderr)
            return None
        if sweep:
            print(f"clkit: {folder.name} failed:", file=sys.stderr)
            _codes.append(complain(error))
            raise
        if explain(error) is None:
            raise
        raise SystemExit(complain(error)) from None
    return _objective(config, folder)


def _search_path() -> list[str]:
    """Arguments for a process that shall find the configs that this one does."""
    job = HydraConfig.get()
    folders = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    paths = [item for item in job.overrides.hydra if item.startswith("hydra.searchpath=")]
    return [*(f"--config-dir={folder}" for folder in folders), *paths]


def _searches() -> bool:
    return not str(HydraConfig.get().sweeper._target_).endswith(".BasicSweeper")


def _check_objective(config: DictConfig) -> None:
    """Refuse a name that is no metric before a trial is trained for it."""
    from clkit.report.definitions import names

    if not _searches():
        return
    known = names((config.evaluation or {}).get("windows") or ())
    if config.objective not in known:
        error = ConfigurationError(f"objective={config.objective} is no metric; {suggest(config.objective, known)}")
        _codes.append(complain(error))
        raise error


def _is_ours(folder: Path, config: DictConfig) -> bool:
    try:
        return owned_by(folder, config) and reads_as_before(folder, config)
    except ConfigurationError:
        return False  # said by the run itself


def _objective(config: DictConfig, folder: Path) -> float | None:
    if not _searches() or not is_rank_zero():
        return None
    content = json.loads((folder / "metrics.json").read_text())
    metrics = content["metrics"]
    if content.get("diverged") is not None:
        # chance forgets nothing
        return -math.inf if higher_is_better(config.objective) else math.inf
    value = metrics.get(config.objective)
    if value is None:
        why = "is undefined on this stream" if config.objective in metrics else "is no metric"
        defined = ", ".join(name for name, number in metrics.items() if number is not None)
        raise ConfigurationError(f"objective={config.objective} {why}; use one of {defined}.")
    return float(value)


@contextmanager
def _process_group_of_its_own() -> Iterator[None]:
    """Undo what a distributed run leaves in this process, so that the next job of a sweep can start its own."""
    from torch import distributed

    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def quieten_libraries() -> None:
    """Keep what libraries say about themselves off the terminal, and give warnings one line."""
    from lightning_fabric.utilities.warnings import PossibleUserWarning

    for name in ("pytorch_lightning", "lightning_fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *args, **kwargs: f"clkit: warning: {message}\n"
    warnings.filterwarnings("ignore", message="no QP solver found")
    warnings.simplefilter("ignore", PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")


def end_sweep() -> int:
    """Tell how a sweep came out and write its report.

    Returns:
        1 if a run failed in this process by a bug, 2 if all by mistakes, 0 if none did.
    """
    from rich.console import Console

    from clkit.report import write_report
    from clkit.run.sweep_status import outcome

    code = min(_codes, default=0)
    _codes.clear()
    plan, Planner.current = Planner.current, None
    if plan is not None and plan.runs:
        cells = plan.cells()
        if any(cell.status == "done" for cell in cells):
            done = [cell.folder for cell in cells if (cell.folder / "history.csv").exists()]
            write_report(done, plan.folder).show(Console(soft_wrap=True))
        Console(stderr=True, soft_wrap=True).print(outcome(cells))
    return code


def run_name(overrides: str) -> str:
    """Return the folder name of a run: its overrides as one path component, ``default`` when there are none.

    Brackets and quotes go, other characters than letters, digits and ``.=,+-_`` become ``_``, and long names are cut; a
    hash then keeps different overrides apart.
    """
    if not overrides:
        return "default"
    name = re.sub(r"[^A-Za-z0-9.=,+_-]+", "_", re.sub(r"[\[\]{}'\"]", "", overrides))[:100].strip("._-")
    if name == overrides != "default":
        return name
    return "-".join(filter(None, (name, hashlib.sha256(overrides.encode()).hexdigest()[:8])))


def list_groups() -> str:
    """Return the config groups on Hydra's search path for ``clkit train --help``, without what only configs choose."""
    loader = GlobalHydra.instance().config_loader()
    groups = {group: loader.get_group_options(group) for group in loader.list_groups("")}
    names = {group: [name for name in found if name[0] != "_"] for group, found in groups.items()}
    shown = sorted(group for group in names if group not in ("hydra", "defaults") and names[group])
    return "\n".join(f"{group}: {', '.join(names[group])}" for group in shown)


def file_of(package: str, pattern: str) -> str:
    """Return the path of a package's file by a pattern (``glob``); the package is not imported.

    Raises:
        ConfigurationError: If the package is not installed, or has not one such file.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ConfigurationError(f"The package {package} is not installed; install it, or give the path of a file.")
    files = sorted(Path(found.origin).parent.glob(pattern))
    if len(files) != 1:
        raise ConfigurationError(
            f"The package {package} has {len(files)} files {pattern}; name one ({', '.join(p.name for p in files)})."
        )
    return str(files[0])


# Hydra's answer to a launcher's config of the same name as the plug-in's
warnings.filterwarnings("ignore", message="\n.* is validated against ConfigStore schema")

# at import, so that the worker processes of any launcher have both
plugins.register()
OmegaConf.register_new_resolver("clkit.run_name", run_name, replace=True)
OmegaConf.register_new_resolver("clkit.groups", list_groups, replace=True)
OmegaConf.register_new_resolver("clkit.file_of", file_of, replace=True)
