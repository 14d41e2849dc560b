"""``metrics.json``: what a run amounts to, as plain data."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from clkit.errors import suggest
from clkit.metrics.functional import Statistics
from clkit.metrics.history import History
from clkit.notebook import html_table

_UNBIASED = {"ACC", "ACC_subset", "FORG", "FORG_max", "BWT", "FWT"}
_PACKAGES = ("clkit", "torch", "pytorch-lightning", "torchmetrics", "numpy")


class Summary(dict[str, Any]):
    """The content of ``metrics.json``; its entries and metrics are attributes too, as ``summary.ACC``.

    Where a name has a hyphen the attribute has an underscore: ``summary.min_ACC`` is
    ``summary["metrics"]["min-ACC"]``. An undefined metric is ``None``.

    Example:
        >>> found = Summary(score="accuracy", metrics={"ACC": 0.9, "min-ACC": 0.4})
        >>> found.ACC, found.min_ACC, found.score
        (0.9, 0.4, 'accuracy')
    """

    def __getattr__(self, name: str) -> Any:
        known = self._attributes()
        if name not in known:
            hint = suggest(name, known) if known else "there are no metrics before the end of the first fit."
            raise AttributeError(f"{name!r} is no metric here; {hint}")
        return known[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._attributes()]

    def _attributes(self) -> dict[str, Any]:
        metrics = {name.replace("-", "_"): value for name, value in self.get("metrics", {}).items()}
        return {**self, **metrics}

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {_shown(value)}" for name, value in self.get("metrics", {}).items())
        return f"{type(self).__name__}({numbers or 'no metrics yet'})"

    def _repr_html_(self) -> str:
        rows = [[name, _shown(value)] for name, value in self.get("metrics", {}).items()]
        return html_table(["metric", "value"], rows)


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def summary(
    history: History,
    *,
    stream: Mapping[str, Any],
    complete: bool,
    schedule: str,
    subset: int | None,
    score: str = "accuracy",
    mask: str = "none",
    view: str = "live",
    windows: Sequence[int] = (10, 100),
    n_undefined: int = 0,
    diverged: int | None = None,
    approximation: Mapping[str, float] | None = None,
    extra_updates: Mapping[str, int] | None = None,
) -> Summary:
    """Build the content of ``metrics.json``: a function of the history, the settings and the installed versions.

    Args:
        history: The run's evaluations.
        stream: ``name``, ``kind`` and ``experiences`` (K names) of the stream; ``steps``, the last step of each
            finished experience, is added.
        complete: Whether the run reached the end of the stream.
        schedule: When evaluations took place, ``every step`` or another.
        subset: Samples of each experience in a per-iteration evaluation; ``None`` for all.
        score: Name of the score.
        mask: Which outputs compete in an evaluation; ``none`` for all.
        view: Which weights were evaluated: the live ones, or those that a strategy offers under another name.
        windows: Window lengths in evaluations.
        n_undefined: Evaluated samples whose score was NaN.
        diverged: The optimizer step from which on the loss was not finite; ``None`` if it stayed so.
        approximation: What is known of the error of approximate evaluations.
        extra_updates: Optimizer steps beside the stream's, by the name of the strategy that took them.

    Returns:
        Data for :func:`json.dump`; ``None`` where a metric is undefined.
    """
    statistics = Statistics.of(history, windows)
    each, metrics = statistics.per_experience(), statistics.metrics()
    content = {
        "format": 1,
        "complete": complete,
        "diverged": diverged,
        "score": score,
        "schedule": schedule,
        "biased": [] if schedule == "every step" else _biased(metrics, bool(approximation)),
        "subset": subset,
        "mask": mask,
        "view": view,
        "stream": {**stream, "steps": history.boundaries()},
        "metrics": metrics | {"n_undefined": n_undefined},
        "per_experience": {name: each[name] for name in ("forgetting", "minimum", "final")},
        "accuracy_matrix": statistics.matrix(),
        "gaps": statistics.gaps,
        "approximation": dict(approximation or {}),
        "extra_updates": dict(extra_updates or {}),
        "versions": versions(),
    }
    return Summary({key: to_json(value) for key, value in content.items()})


def _biased(metrics: Mapping[str, float], approximate: bool) -> list[str]:
    exact = _UNBIASED - {"ACC_subset", "FWT"} if approximate else _UNBIASED
    return [name for name in metrics if name not in exact and not name.startswith("n_")]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, without importing them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def to_json(value: Any) -> Any:
    """Return data for :func:`json.dump`: arrays as lists, undefined numbers as ``None``."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return to_json(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
