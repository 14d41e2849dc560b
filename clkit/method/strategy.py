"""What a continual-learning method is: a Lightning callback with four more hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule, Trainer

from clkit.data.batch import is_text, labels_tokens
from clkit.data.columns import describe
from clkit.data.datamodule import stream_data
from clkit.data.hooks import Hooks, callbacks_of, overrides
from clkit.data.loader import choose_rows, read_samples
from clkit.data.stream import Experience
from clkit.distributed import need_whole_weights
from clkit.errors import ConfigurationError
from clkit.method.forward import to_device

View = Callable[[LightningModule], AbstractContextManager[None]]
"""Puts other weights into a module inside its context, and the live ones back, bit for bit, after it."""


class Strategy(Hooks):
    """Base class of all strategies.

    A strategy overrides the hooks it needs: the four below, and Lightning's own for the rest (gradients in
    ``on_before_optimizer_step``, weights and buffers in ``on_train_batch_end``). Several strategies compose in the
    order of the trainer's callbacks. The order within one step is: :meth:`transform_batch`, the module's own
    ``training_step``, :meth:`loss_term`, backward, ``on_before_optimizer_step``, optimizer, ``on_train_batch_end``.

    Whatever a strategy must remember goes into ``state_dict`` / ``load_state_dict`` as tensors, numbers and strings, so
    that a checkpoint loads with ``weights_only=True``. A new fit starts fresh: what the object remembers is as it was
    before the first one, unless ``StreamDataModule(keep_memory=True)`` says otherwise.

    Attributes:
        at_end: Whether ``on_experience_end`` ``"replaces"`` the weights, ``"trains"`` them on, or ``"reads"`` them at
            most (the default); it runs in this order, whatever that of the callbacks.
        views: Other weights than the live ones that the strategy offers for evaluation, by name; see
            ``StabilityGap(view=...)``.
        prediction: Name of the view that the method predicts with, ``None`` for the live weights. ``StabilityGap``
            evaluates it unless told otherwise; the strategy itself puts it into the module in ``on_fit_end``.
        reads_batch: Whether its hooks look at batches; ``training_step`` then works on a copy of its own.
        carries_weights: Whether it compares or mixes trainable weights with those of an earlier experience.
        renews_weights: Whether it starts new trainable weights at an experience's start. What carries weights cannot be
            combined with it, and what offers ``views`` must come after it.
        changes_frozen: Whether it changes weights that are not trained, as merging an adapter does.
        weighs_loss: Whether its loss term gives the module's own loss another weight; one strategy alone can.
        replaces_data: Whether it replaces what the experiences train on; one strategy alone can.
        reads_past: Whether it trains on the data of earlier experiences as the stream has them.
        is_new_group: Whether the current experience trains weights of which no earlier one has trained any; see
            :class:`~clkit.method.routing.Router`.
        extra_updates: Optimizer steps that it has taken beside the stream's, in the whole run.
        works_sharded: Whether it works where each process holds a part of the weights only (FSDP).
    """

    views: Mapping[str, View] = MappingProxyType({})
    prediction: str | None = None
    carries_weights = False
    renews_weights = False
    changes_frozen = False
    weighs_loss = False
    replaces_data = False
    reads_past = False
    is_new_group = False
    extra_updates: int = 0
    works_sharded = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what the strategy cannot work with; overriding methods call ``super().setup(...)`` first.

        Raises:
            ConfigurationError: If the trainer's data is no :class:`~clkit.StreamDataModule`, the module optimizes
                manually and the strategy adds a loss term, or the trainer shards weights that it needs whole.
        """
        stream_data(trainer)
        if not pl_module.automatic_optimization and self.adds_loss(trainer):
            raise ConfigurationError(
                f"{type(self).__name__} adds a term to the loss, but {type(pl_module).__name__} optimizes manually and "
                "runs its own backward; set automatic_optimization = True or add the term in your training_step."
            )
        gone = [experience.name for experience in stream_data(trainer).stream if experience.known_as]
        if (self.replaces_data or self.reads_past) and gone:
            raise ConfigurationError(
                f"{type(self).__name__} trains on the data of earlier experiences, but those of {', '.join(gone)} are "
                "no longer there; put them back, or use a strategy that remembers samples, such as ExperienceReplay."
            )
        if not self.works_sharded:
            need_whole_weights(trainer, type(self).__name__)
        self._check_others(callbacks_of(trainer, Strategy))

    def adds_loss(self, trainer: Trainer) -> bool:
        """Tell whether it adds a term to the loss, which a module that optimizes manually cannot take."""
        return overrides(self, "loss_term")

    def _check_others(self, strategies: list[Strategy]) -> None:
        own = type(self).__name__
        for position, other in enumerate(strategies):
            if other is self:
                continue
            name = type(other).__name__
            if self.at_end == "trains" and other.prediction:
                raise ConfigurationError(
                    f"{own} finetunes the live weights, but {name} predicts with others ({other.prediction!r}) and the "
                    "phase would be lost; use one of them, or predict with the live weights."
                )
            if self.replaces_data and other.replaces_data:
                raise ConfigurationError(f"{own} and {name} both choose what an experience trains on; use one of them.")
            if self.weighs_loss and other.weighs_loss:
                raise ConfigurationError(
                    f"{own} and {name} both give the module's own loss another weight; use one of them."
                )
            if not self.renews_weights:
                continue
            if other.carries_weights or other.renews_weights:
                raise ConfigurationError(
                    f"{own} starts each experience with new weights, and {name} "
                    f"{'does so too' if other.renews_weights else 'compares weights with those of earlier ones'}; "
                    "use one of them."
                )
            if other.views and position < strategies.index(self):
                raise ConfigurationError(
                    f"{own} starts each experience with new weights, and {name} copies them then; put {own} before "
                    f"{name}."
                )

    def remembered(self) -> Any:
        """Return all past samples that the strategy remembers, as one batch like those of the stream, or ``None``.

        Other strategies may train on them.
        """
        return None


def views_of(trainer: Trainer) -> dict[str, View]:
    """Return the weights that can be evaluated, by name: ``live`` and what the strategies offer."""
    offered = {name: view for strategy in callbacks_of(trainer, Strategy) for name, view in strategy.views.items()}
    return {"live": lambda module: nullcontext(), **offered}


def chosen_view(trainer: Trainer, name: str | None) -> tuple[str, View]:
    """Return the name of a view and the view; for ``None`` what the last strategy with a ``prediction`` predicts with.

    Raises:
        ConfigurationError: If no strategy offers it.
    """
    views = views_of(trainer)
    predicting = [strategy.prediction for strategy in callbacks_of(trainer, Strategy) if strategy.prediction]
    found = name or ["live", *predicting][-1]
    if found not in views:
        raise ConfigurationError(
            f"No strategy offers the view {found!r}; known: {', '.join(views)}. Add the strategy, or leave view out."
        )
    return found, views[found]


def memory_before(trainer: Trainer, strategy: Strategy) -> Strategy | None:
    """Return the last strategy before this one, in the trainer's callbacks, that remembers samples."""
    strategies = callbacks_of(trainer, Strategy)
    for other in reversed(strategies[: strategies.index(strategy)]):
        if type(other).remembered is not Strategy.remembered:
            return other
    return None


def random_samples(trainer: Trainer, experience: Experience, n: int, seed: int) -> Any:
    """Return ``n`` training samples of an experience (all if it has fewer) as one batch on the module's device."""
    dataset = experience.train
    chosen = choose_rows(len(cast(Sequence[Any], dataset)), n, seed, 3, experience.index)
    return to_device(trainer, read_samples(dataset, chosen, collate_fn=stream_data(trainer).collate_fn))


def check_pairs(trainer: Trainer, name: str, instead: str) -> None:
    """Make sure that the stream's batches are ``(x, y)``, ``(x, y, task)`` or more.

    Args:
        trainer: The trainer.
        name: What needs them.
        instead: What to do otherwise.

    Raises:
        ConfigurationError: If they have another form.
    """
    if not gives_pairs(trainer):
        batch = _first(trainer)
        raise ConfigurationError(
            f"{name} needs (x, y) or (x, y, task) batches, but the stream gives {type(batch).__name__} "
            f"{describe(batch)}; {instead}."
        )


def gives_pairs(trainer: Trainer) -> bool:
    """Tell whether the stream's batches are ``(x, y)``, ``(x, y, task)`` or more."""
    batch = _first(trainer)
    return isinstance(batch, (tuple, list)) and len(batch) > 1


def has_classes(trainer: Trainer) -> bool:
    """Tell whether the samples of every experience have classes, as the stream says."""
    return all(experience.classes for experience in stream_data(trainer).stream)


def gives_texts(trainer: Trainer) -> bool:
    """Tell whether the stream's batches are texts, see :func:`~clkit.data.batch.is_text`."""
    return is_text(_first(trainer))


def gives_token_labels(trainer: Trainer) -> bool:
    """Tell whether the stream's batches are texts with a label for each token."""
    return labels_tokens(_first(trainer))


def _first(trainer: Trainer) -> Any:
    data = stream_data(trainer)
    return read_samples(data.stream[0].train, torch.tensor([0]), collate_fn=data.collate_fn)
