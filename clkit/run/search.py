"""A search of settings with Optuna that goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from clkit.report.definitions import higher_is_better


class StudyKeeper(Callback):
    """Makes ``hydra/sweeper=optuna`` search for the best ``objective``, and go on with its study (a Hydra callback).

    The direction is that in which the metric is better, and the study is kept in the sweep's folder (``study.db``)
    unless ``hydra.sweeper.storage`` says otherwise. ``n_trials`` is the total: trials that are complete are not run
    again, those that were cut off are, with the same parameters, so that their run folders are found and resumed. A
    seed of the sampler is moved on by the trials there are, or it would draw the first ones again. Several commands
    at once share the trials.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take stock of the study and set how many trials are left."""
        sweeper = config.hydra.sweeper
        if not str(sweeper._target_).endswith(".OptunaSweeper"):
            return
        import optuna

        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open_dict(config):
            sweeper.direction = "maximize" if higher_is_better(config.objective) else "minimize"
            sweeper.storage = sweeper.storage or f"sqlite:///{folder / 'study.db'}"
            sweeper.study_name = sweeper.study_name or "clkit"
        study = optuna.create_study(
            storage=sweeper.storage,
            study_name=sweeper.study_name,
            direction=sweeper.direction,
            load_if_exists=True,
        )
        states = optuna.trial.TrialState
        if self._is_alone(folder):
            for trial in study.get_trials(states=(states.RUNNING,)):
                study.tell(trial.number, state=states.FAIL)
                study.enqueue_trial(trial.params)
        taken = len(study.get_trials(states=(states.COMPLETE, states.RUNNING)))
        with open_dict(config):
            sweeper.n_trials = max(sweeper.n_trials - taken, 0)
            if sweeper.sampler.get("seed") is not None:
                sweeper.sampler.seed += len(study.get_trials())

    def _is_alone(self, folder: Path) -> bool:
        """Tell whether no other command works on the study, and keep others from thinking so."""
        self._lock = FileLock(folder / ".search")
        try:
            self._lock.acquire(timeout=1)
        except Timeout:
            return False
        return True

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Let others at the study."""
        if self._lock is not None:
            self._lock.release()
