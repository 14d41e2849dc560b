"""``share_first=true``: the first experience of runs that differ in what comes later is trained once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from clkit.data.datamodule import stream_data
from clkit.data.hooks import Hooks
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError
from clkit.report.runs import FIRST
from clkit.run.claim import fingerprint, owned_by
from clkit.run.kept import end_of


class NotShared(ConfigurationError):
    """A run has to train its first experience itself; the text says why."""


@dataclass(frozen=True)
class First:
    """A run of a first experience that other runs go on from.

    Its configuration is theirs without the strategies behind the last one that takes part in the first experience
    (:meth:`~clkit.data.hooks.Hooks.leaves_first`); those before stay, as a strategy may look at what comes before it.
    Runs with the same have the same folder.

    Args:
        config: Its configuration.
        folder: Its folder, beside those of the runs.
    """

    config: DictConfig
    folder: Path

    @classmethod
    def of(cls, config: DictConfig, folder: Path, stream: Stream) -> First:
        """Return the one that a run can go on from.

        Args:
            config: The run's configuration.
            folder: The run's folder.
            stream: The run's stream.

        Raises:
            NotShared: If the run has to train its first experience itself.
        """
        if config["from"] is not None:
            raise NotShared("it goes on from another run")
        if len(stream) == 1:
            raise NotShared("there is no other")
        if instantiate(config.trainer, _partial_=True)(logger=False).world_size > 1:
            raise NotShared("several processes train it")
        built = [instantiate(entry) for entry in (config.get("strategy") or {}).values()]
        part = [not (isinstance(one, Hooks) and one.leaves_first(stream)) for one in built]
        last = max((number for number, takes_part in enumerate(part, 1) if takes_part), default=0)
        content = cast(dict[str, Any], OmegaConf.to_container(config))
        end = {"end_of_first": {"_target_": f"{__name__}.{EndOfFirst.__name__}"}}
        own = OmegaConf.create(
            {
                **content,
                "strategy": dict(list((content.get("strategy") or {}).items())[:last]),
                "callbacks": {**(content.get("callbacks") or {}), **end},
                "folder": "???",
                "resume": True,
                "share_first": False,
            }
        )
        return cls(own, folder.parent / FIRST / f"first-{fingerprint(own)[:8]}")

    @property
    def is_trained(self) -> bool:
        """Whether others can go on from it."""
        try:
            end_of(self.folder, 0, whole=True)
        except ConfigurationError:
            return False
        return owned_by(self.folder, self.config)

    @property
    def methods(self) -> str:
        """The names of the strategies in it."""
        return ", ".join(map(str, self.config.strategy)) or "no method"


class EndOfFirst(pl.Callback):
    """Ends a fit with its first experience; all that is planned over the stream is planned over the whole of it."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if stream_data(trainer).is_last_epoch and trainer.is_last_batch:
            trainer.fit_loop.max_epochs = trainer.current_epoch + 1
