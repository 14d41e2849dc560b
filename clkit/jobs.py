"""``clkit train`` under Hydra: one job, or a sweep of many, here or in a launcher's worker processes."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from clkit import plugins
from clkit.errors import ConfigurationError
from clkit.mistakes import complain, explain

_failures: list[tuple[str, int]] = []


def main() -> None:
    """Compose the config from ``sys.argv`` and run it, or sweep over many."""
    hydra.main(version_base="1.3", config_path="pkg://clkit.conf", config_name="train")(task)()


def task(config: DictConfig) -> None:
    """Run one job; tell of a mistake at once and let the other jobs of a sweep run."""
    from clkit.train import run

    quieten_libraries()
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    # Lightning starts the other processes of a distributed run by this command line
    sys.argv = [sys.argv[0], "train", *job.overrides.task]
    sweep = job.mode is RunMode.MULTIRUN
    try:
        with _process_group_of_its_own() if sweep else nullcontext():
            run(config, folder)
    except Exception as error:
        if sweep:
            print(f"clkit: {folder.name} failed:", file=sys.stderr)
            _failures.append((folder.name, complain(error)))
            raise
        if explain(error) is None:
            raise
        raise SystemExit(complain(error)) from None


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


def report_failures() -> int:
    """Name the jobs that failed in this process and return the exit code: 1 if one was a bug, 2 if none was, else 0."""
    failures = _failures.copy()
    _failures.clear()
    if failures:
        print("clkit: these runs failed:", *(name for name, _ in failures), sep="\n  ", file=sys.stderr)
    return min((code for _, code in failures), default=0)


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


# at import, so that the worker processes of any launcher have both
plugins.register()
OmegaConf.register_new_resolver("clkit.run_name", run_name, replace=True)
OmegaConf.register_new_resolver("clkit.file_of", file_of, replace=True)
