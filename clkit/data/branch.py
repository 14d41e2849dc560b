"""A fit that goes on from the end of an experience of another one, with more experiences or other settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins import CheckpointIO
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO
from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer

from clkit.data.checkpoint_io import CLOCK, verify_checkpoint
from clkit.data.hooks import Hooks, callbacks_of
from clkit.errors import ConfigurationError, suggest

OPTIMIZER = "optimizer"
_RATES = ("lr", "initial_lr")


@dataclass(frozen=True)
class Past:
    """What a checkpoint that was saved at the end of an experience knows of its stream.

    Args:
        path: The checkpoint.
        experiences: Of each experience learned its ``name``, ``fingerprint``, ``classes`` and ``task``, and the
            Lightning ``epochs`` and optimizer ``steps`` (``None`` where epochs count) that were planned for it.
        states: Keys of the callbacks that have a state in it.
    """

    path: Path
    experiences: tuple[Mapping[str, Any], ...]
    states: frozenset[str]

    @classmethod
    def read(cls, path: str | Path) -> Past:
        """Read a checkpoint.

        Raises:
            ConfigurationError: If it cannot be read, was saved in the middle of an experience, or holds weights alone.
        """
        verify_checkpoint(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        (state,) = (state for state in content.values() if isinstance(state, dict) and CLOCK in state)
        clock = state[CLOCK]
        if not clock["started"] == clock["ended"] >= 0:
            raise ConfigurationError(
                f"{path} was saved in the middle of experience {max(clock['started'], 0)}; other settings begin at the "
                "end of an experience. Use a checkpoint of one (StreamCheckpoint(keep_ends='whole') keeps them all)."
            )
        if "callbacks" not in content or "experiences" not in state:
            raise ConfigurationError(
                f"{path} holds weights alone, or is of an earlier version of clkit; nothing can go on from it. Train "
                "with StreamCheckpoint(keep_ends='whole') (checkpoint.keep_ends=whole)."
            )
        learned = clock["started"] + 1
        return cls(Path(path), tuple(state["experiences"][:learned]), frozenset(content["callbacks"]))

    @property
    def plan(self) -> list[tuple[int, int | None]]:
        """Epochs and steps of each experience learned."""
        return [(about["epochs"], about["steps"]) for about in self.experiences]


class Branching(Callback):
    """Takes from a checkpoint what goes on, and leaves to the new fit what it has settings of its own for.

    The module's weights, the states of the callbacks that are there again, the optimizers' momentum and statistics,
    the clocks of schedules and stream and the random states go on. The optimizers' settings are the new ones; a
    learning rate whose setting is the old one goes on where its schedule was.

    A callback that is new there starts fresh. After the first experience one that
    :meth:`~clkit.data.hooks.Hooks.leaves_first` as it is makes up for its end, unless it is named in ``fresh``.

    Args:
        past: The checkpoint; the fit may also go on from another one, which is then restored as it is.
        fresh: What starts fresh although it could go on: ``"optimizer"``, or names of callbacks' classes.

    Attributes:
        is_active: Whether the fit goes on from this checkpoint.

    Raises:
        ConfigurationError: Before the first step, if there is no callback of such a name, or one cannot start later
            than the stream does.
    """

    def __init__(self, past: Past, fresh: Collection[str] = ()) -> None:
        self.past, self.fresh = past, tuple(fresh)
        self.is_active = False
        self._content: dict[str, Any] | None = None
        self._settings: list[list[dict[str, Any]]] = []
        self._latecomers: list[Hooks] = []

    def reading(self, io: CheckpointIO, trainer: Trainer) -> CheckpointIO:
        """Return what reads checkpoints for the trainer."""
        return _Reads(io, self, trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.is_active = False
        self._latecomers = []

    def latecomers(self) -> list[Hooks]:
        """Return the callbacks that begin at the end of the first experience; none the second time."""
        found, self._latecomers = self._latecomers, []
        return found

    def _tell(self, trainer: Trainer) -> None:
        """Say what starts fresh and what is left behind."""
        own = {type(callback).__name__: callback for callback in callbacks_of(trainer)}
        for name in self.fresh:
            if name != OPTIMIZER and name not in own:
                raise ConfigurationError(f"fresh={name!r} is nothing that goes on; {suggest(name, [OPTIMIZER, *own])}")
        begins = [strategy for strategy in callbacks_of(trainer, Hooks) if self._begins(strategy)]
        for strategy in begins:
            if strategy.needs_start:
                raise ConfigurationError(
                    f"{type(strategy).__name__} needs what the network was before its first experience, and "
                    f"{self.past.path} knows it of no {type(strategy).__name__}; train it from the start of the stream."
                )
        late = self._latecomers = [one for one in begins if self._makes_up(trainer, one)]
        with_state = [one for one in begins if type(one).state_dict is not Callback.state_dict]
        fresh = [type(one).__name__ for one in with_state if one not in late]
        keys = {callback.state_key for callback in callbacks_of(trainer)}
        left = sorted(key.partition("{")[0] for key in self.past.states - keys if key.partition("{")[0] not in _SILENT)
        said = [f"{', '.join(fresh)} start(s) fresh"] if fresh else []
        said += [f"the state of {', '.join(left)} is left behind"] if left else []
        if said:
            rank_zero_warn(f"After {len(self.past.experiences)} experience(s) of {self.past.path}: {'; '.join(said)}.")

    def _begins(self, callback: Callback) -> bool:
        return type(callback).__name__ in self.fresh or callback.state_key not in self.past.states

    def _makes_up(self, trainer: Trainer, callback: Hooks) -> bool:
        is_first = len(self.past.experiences) == 1 and type(callback).__name__ not in self.fresh
        return is_first and callback.leaves_first(cast(Any, trainer).datamodule.stream)

    def take(self, content: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        """Return what the trainer shall restore of a checkpoint's content."""
        self._tell(trainer)
        keys = {c.state_key for c in callbacks_of(trainer) if type(c).__name__ not in self.fresh}
        states = {key: state for key, state in content["callbacks"].items() if key in keys}
        self._content, self.is_active = {**content, "callbacks": states}, True
        return self._content

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._content is None:
            return
        # what configure_optimizers has just made, and the checkpoint's state will replace
        self._settings = [[_options(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        wanted = OPTIMIZER not in self.fresh
        if not wanted or not _same_form(trainer.optimizers, self._content["optimizer_states"]):
            if wanted:
                rank_zero_warn(f"The optimizer starts fresh: {self.past.path} has the state of another one.")
            self._content["optimizer_states"] = []
            self._content["lr_schedulers"] = []
        schedules = [config.scheduler.state_dict().keys() for config in trainer.lr_scheduler_configs]
        if schedules != [state.keys() for state in self._content["lr_schedulers"]]:
            self._content["lr_schedulers"] = []
        self._content = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._settings:
            return
        for optimizer, groups in zip(trainer.optimizers, self._settings, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                _adopt(group, settings)
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
        self._settings = []

    def _is(self, path: Any) -> bool:
        return Path(str(path)).resolve() == self.past.path.resolve()


_SILENT = ("RunMark", "StreamCheckpoint", "StreamProgress", "ModelCheckpoint")


class _Reads(_WrappingCheckpointIO):
    def __init__(self, io: CheckpointIO, branching: Branching, trainer: Trainer) -> None:
        super().__init__(io)
        self._branching, self._trainer = branching, trainer

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        content: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return self._branching.take(content, self._trainer) if self._branching._is(path) else content


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _same_form(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether optimizers have the settings and the numbers of parameters that states are of."""

    def form(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        left_out = {*_RATES, "params", "param_names"}
        return [(group.keys() - left_out, len(group["params"])) for group in groups]

    return [form(optimizer.param_groups) for optimizer in optimizers] == [form(s["param_groups"]) for s in states]


def _adopt(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Give a restored group of parameters its new settings; a schedule goes on unless the rate's setting changed."""
    cycled = ("momentum", "betas") if "max_momentum" in group else ()
    group.update({name: value for name, value in settings.items() if name not in (*_RATES, *cycled)})
    base, new = ((g.get("initial_lr"), g.get("initial_lr", g["lr"])) for g in (group, settings))
    if (base[0] is None) != (new[0] is None) or float(base[1]) != float(new[1]):
        for name in _RATES:
            group.pop(name, None)
        group.update({name: settings[name] for name in _RATES if name in settings})
