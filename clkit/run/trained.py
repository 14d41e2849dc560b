"""A trained run again: its module, its stream, and what it scores on all of its held-out data."""

from __future__ import annotations

import csv
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lightning_fabric.utilities.warnings import PossibleUserWarning
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from clkit.data.checkpoint_io import CLOCK
from clkit.data.datamodule import StreamDataModule
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError, check_choice
from clkit.evaluation.held_out import Split, full_sums, held_out
from clkit.evaluation.scores import Scorer
from clkit.evaluation.stability_gap import StabilityGap
from clkit.files import write_atomically
from clkit.method.routing import Mixer, Router
from clkit.method.strategy import Strategy, chosen_view
from clkit.run.kept import end_of, is_whole, stream_state
from clkit.run.train import build_module


class Trained(NamedTuple):
    """What :func:`load` returns.

    Args:
        module: The module, on the CPU and in evaluation mode.
        stream: The stream that it learned.
    """

    module: pl.LightningModule
    stream: Stream


@dataclass(frozen=True)
class Score:
    """The score of a trained module on all held-out data of one experience.

    Args:
        experience: Its index.
        name: Its name.
        n: Samples.
        score: Their mean score; undefined ones count as 0.
        n_undefined: Samples whose score is NaN.
    """

    experience: int
    name: str
    n: int
    score: float
    n_undefined: int


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` returns.

    Args:
        scores: One for each experience learned.
        of: What was evaluated: the score's name, the split, the view and the index of the last experience learned.
    """

    scores: tuple[Score, ...]
    of: dict[str, Any]

    def csv(self) -> str:
        """Return the table: one line for each experience."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["experience", "name", "n", "score", "n_undefined", *self.of])
        for s in self.scores:
            writer.writerow([s.experience, s.name, s.n, repr(s.score), s.n_undefined, *self.of.values()])
        return out.getvalue()


def load(
    run: str | Path, *, at: int | None = None, view: str | None = None, data_root: str | Path | None = None
) -> Trained:
    """Return the module that a run has trained, and its stream: ``module, stream = clkit.load("runs/default")``.

    The module has the weights that the run's method predicts with (an average of them, say), in evaluation mode, on the
    CPU; all random numbers go on as before. A method that predicts some samples with other weights than others
    (``per_task``, ``instruction_groups``) leaves those of the last group; ``view`` names another. One that mixes them
    by the sample (``disco``) leaves those of the last experience; :func:`evaluate` evaluates the mixture.

    Args:
        run: A folder of ``clkit train``.
        at: Index of an experience, for the weights at its end; those of the run's end when ``None``.
        view: Weights that a strategy offers under this name, or ``"live"`` for those in training.
        data_root: Where the data are now, if they have moved.

    Raises:
        ConfigurationError: If it is no run's folder, the run is not finished, its data are not there or others, or the
            weights were not kept; the message says which setting keeps them.
    """
    reader = Reader(view)
    module, data = restore(Path(run), reader, at, data_root)
    if reader.weights is not None:
        module.load_state_dict(reader.weights)
    return Trained(module, data.stream)


def evaluate(
    run: str | Path,
    *,
    at: int | None = None,
    split: Split | None = None,
    view: str | None = None,
    accelerator: str | None = None,
    data_root: str | Path | None = None,
) -> Evaluation:
    """Evaluate a trained run on all held-out data of the experiences that it has learned, as at the end of each.

    Args:
        run: A folder of ``clkit train``.
        at: See :func:`load`.
        split: ``"test"`` or ``"val"``; that of the run's own evaluation when ``None``, and so are score and mask.
        view: What is evaluated, see :class:`~clkit.StabilityGap`.
        accelerator: ``"cpu"``, ``"gpu"``, ...; the run's own when ``None``.
        data_root: Where the data are now, if they have moved.

    Raises:
        ConfigurationError: See :func:`load`; or if the stream has no such split.
    """
    if split is not None:
        check_choice("split", split, get_args(Split))
    reader = _Evaluator(view, split)
    restore(Path(run), reader, at, data_root, accelerator)
    assert reader.found is not None
    return reader.found


def write(evaluation: Evaluation, folder: Path, name: str = "eval.csv") -> Path:
    """Write an evaluation's table into a folder and return the file."""
    write_atomically(folder / name, evaluation.csv())
    return folder / name


class Reader(pl.Callback):
    """Reads what it wants when all is restored, before strategies put their prediction into the module."""

    def __init__(self, view: str | None) -> None:
        self.view = view
        self.weights: dict[str, Tensor] | None = None
        self.config: Any = None
        self.last = 0

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.view is not None:
            _, view = chosen_view(trainer, self.view)
            with view(pl_module):
                self.weights = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()}


class _Evaluator(Reader):
    def __init__(self, view: str | None, split: Split | None) -> None:
        super().__init__(view)
        self.split = split
        self.found: Evaluation | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gap: StabilityGap = instantiate(self.config.evaluation)
        split, seen = self.split or gap.split, range(self.last + 1)
        stream = cast(Any, trainer).datamodule.stream
        sets = [held_out(stream[k], split) for k in seen]
        if any(part is None for part in sets):
            raise ConfigurationError(
                f"split={split!r}, but stream {stream.name!r} has an experience without {split} data; use split=test."
            )
        scorer = Scorer.of(gap.score, gap.mask, stream, pl_module.device)
        name, view = chosen_view(trainer, self.view or gap.view)
        with view(pl_module):
            total, undefined = full_sums(trainer, pl_module, split, gap.batch_size, scorer, seen)
        sizes = [len(cast(Sequence[Any], part)) for part in sets]
        scores = scorer.recorded(total[: len(sizes)], undefined[: len(sizes)], total.new_tensor(sizes)).tolist()
        self.found = Evaluation(
            tuple(Score(k, stream[k].name, n, scores[k], int(undefined[k])) for k, n in enumerate(sizes)),
            {"of": scorer.name, "split": split, "view": name, "at": self.last},
        )


class _WeightsIO(_WrappingCheckpointIO):
    """Leaves out what only training needs; a file of weights alone counts as one without strategies' states."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return {"callbacks": {}, **content, "optimizer_states": [], "lr_schedulers": []}


def restore(
    folder: Path, reader: Reader, at: int | None, data_root: str | Path | None, accelerator: str | None = None
) -> tuple[pl.LightningModule, StreamDataModule]:
    """Restore a run as resuming it would, by a fit that has no step left to do, and let the reader look at it."""
    config = _config_of(folder, data_root)
    path = end_of(folder, at)
    saved = stream_state(path)
    whole = is_whole(path)
    reader.config, reader.last = config, saved[CLOCK]["started"]
    # one process has the batches of all that trained
    config.data.batch_size = saved["global_batch_size"]
    with isolate_rng(), _quietly():
        module, data = build_module(config)
        others = [part for part in (config.get("callbacks") or {}).values() if "dir" not in part]
        callbacks = [instantiate(part) for part in [*(config.get("strategy") or {}).values(), *others]]
        if not whole:
            _refuse_weights_alone(path, callbacks, reader)
        trainer = instantiate(config.trainer, _partial_=True)(
            **{"accelerator": accelerator or config.trainer.accelerator, "devices": 1, "strategy": "auto"},
            num_nodes=1,
            max_epochs=sum(data.epochs[: reader.last + 1]),
            callbacks=[reader, *callbacks],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.strategy.checkpoint_io = _WeightsIO(trainer.strategy.checkpoint_io)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ConfigurationError(
                f"{path} does not fit the network of {folder / '.hydra' / 'config.yaml'} "
                f"({str(error).splitlines()[-1].strip()}); has the code changed since?"
            ) from error
    module.trainer = None
    return module.cpu().eval(), data


def _config_of(folder: Path, data_root: str | Path | None) -> DictConfig:
    file = folder / ".hydra" / "config.yaml"
    if not file.is_file():
        below = sorted(path.parent.name for path in folder.glob("*/.hydra"))
        hint = f"; choose one of its runs, such as {folder / below[0]}" if below else ""
        raise ConfigurationError(f"There is no {file}: give the folder of a run that clkit train made{hint}.")
    config = cast(DictConfig, OmegaConf.merge(OmegaConf.load(file), {"folder": str(folder)}))
    if data_root is not None:
        config.data_root = str(data_root)
    return config


def _refuse_weights_alone(path: Path, callbacks: Sequence[pl.Callback], reader: Reader) -> None:
    """Refuse a file of weights where a strategy's own state is needed to predict."""
    for strategy in callbacks:
        by_sample = isinstance(strategy, (Router, Mixer))
        predicts = isinstance(strategy, Strategy) and (strategy.prediction is not None or by_sample)
        if predicts and reader.view != "live":
            raise ConfigurationError(
                f"{path} holds the weights in training alone, but {type(strategy).__name__} predicts with others; "
                "take the former with view=live (--view live). checkpoint.keep=N keeps the last N whole checkpoints."
            )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what Lightning says of a training off the terminal, and undo what it sets for the whole process."""
    log, deterministic = logging.getLogger("pytorch_lightning"), torch.are_deterministic_algorithms_enabled()
    warn_only, level = torch.is_deterministic_algorithms_warn_only_enabled(), log.level
    seed_log = logging.getLogger("lightning_fabric")
    seed_level = seed_log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*ends before the stream does")
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        log.setLevel(logging.ERROR)
        seed_log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
            seed_log.setLevel(seed_level)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
