"""Several sets of trainable weights for one module, and which of them, or which mixture, predicts a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from clkit.data.hooks import callbacks_of
from clkit.data.stream import Experience
from clkit.method.optimizer import forget_state
from clkit.method.parameters import assign, swapped, trainable
from clkit.method.setup_checks import check_whole_head
from clkit.method.strategy import Strategy, View

LIVE = "live"


class Router(Strategy):
    """Base of the strategies that learn groups of experiences with trainable weights of their own.

    The module trains the weights of one group, ``current``; those of the others wait in ``bank``. A subclass calls
    :meth:`enter` in ``on_experience_start`` and says in :meth:`route` which group predicts a sample. Evaluation then
    swaps weights by the sample. Since only values change places, the optimizer's parameters stay the same.

    Attributes:
        bank: Trainable tensors by name, of each group that is not being trained.
        current: Name of the group in training.
        is_new_group: See :class:`~clkit.Strategy`.
    """

    renews_weights = True
    needs_start = True

    def __init__(self) -> None:
        self.bank: dict[str, dict[str, Tensor]] = {}
        self.initial: dict[str, Tensor] = {}
        self.current: str | None = None
        self.is_new_group = False

    @property
    def views(self) -> dict[str, View]:  # type: ignore[override]
        """The weights of each group that is not being trained."""
        return {name: _view(weights) for name, weights in self.bank.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_whole_head(trainer, pl_module, type(self).__name__)
        if not self.initial:
            self.initial = _copy(pl_module)
        self.bank, self.initial = move_data_to_device((self.bank, self.initial), pl_module.device)

    def enter(self, trainer: Trainer, module: LightningModule, group: str, *, start: str) -> None:
        """Train a group from now on.

        Args:
            trainer: The trainer.
            module: The module.
            group: Its name.
            start: What a group that is new starts from: ``"initial"`` or the ``"last"`` weights.
        """
        known = group == self.current or group in self.bank
        self.is_new_group = not known
        if group == self.current:
            return
        if self.current is not None:
            self.bank[self.current] = _copy(module)
        if known:
            assign(module, self.bank.pop(group))
        elif start == "initial":
            assign(module, self.initial)
        self.current = group
        forget_state(trainer, trainable(module).values())

    def route(self, experience: Experience, dataset: Dataset[Any], rows: Tensor) -> Sequence[str]:
        """Return the group that predicts each of the samples ``rows`` (``int64``) of an experience's dataset.

        A group that does not exist yet stands for the one in training.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {
            "bank": self.bank,
            "initial": self.initial,
            "current": self.current,
            "is_new_group": self.is_new_group,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bank, self.initial = dict(state_dict["bank"]), state_dict["initial"]
        self.current, self.is_new_group = state_dict["current"], state_dict["is_new_group"]


class Mixer(Strategy):
    """Base of the strategies that predict each sample with a mixture of several sets of weights.

    Evaluation and generation ask for the :meth:`shares` of their samples, and compute each batch inside :meth:`mixed`.
    Outside of it the module has the weights in training.
    """

    renews_weights = True
    is_new_group = True

    def shares(self, experience: Experience, dataset: Dataset[Any], rows: Tensor) -> Tensor:
        """Return how much of each set of weights predicts the samples ``rows`` (``int64`` ``[N]``), ``[N, T]``."""
        raise NotImplementedError

    def mixed(self, module: LightningModule, shares: Tensor) -> AbstractContextManager[None]:
        """Let the module compute batches of ``B`` samples inside the context by their ``shares``, ``[B, T]``."""
        raise NotImplementedError


def mixer_of(trainer: Trainer) -> Mixer | None:
    """Return the trainer's strategy that mixes weights by the sample; ``None`` if there is none."""
    return next(iter(callbacks_of(trainer, Mixer)), None)


Around = Callable[[Any], AbstractContextManager[None]]
"""Makes the context in which a batch is computed, of the places (a slice or a list) of its samples among others."""


def around_batches(
    trainer: Trainer, module: LightningModule, experience: Experience, dataset: Dataset[Any], rows: Tensor
) -> Around:
    """Return what mixes weights for batches of the samples ``rows``; it does nothing where no strategy does so."""
    mixer = mixer_of(trainer)
    if mixer is None:
        return lambda places: nullcontext()
    shares = mixer.shares(experience, dataset, rows).to(module.device)
    return lambda places: mixer.mixed(module, shares[places])


Route = Callable[[Experience, Dataset[Any], Tensor], list[str]]


def route_of(trainer: Trainer) -> Route | None:
    """Return which view each of some samples is predicted with; ``None`` if it is the same for all.

    Views are ``live`` and those of :attr:`Router.views`.
    """
    routers = callbacks_of(trainer, Router)
    if not routers:
        return None
    router = routers[0]

    def route(experience: Experience, dataset: Dataset[Any], rows: Tensor) -> list[str]:
        groups = router.route(experience, dataset, rows)
        return [group if group in router.bank else LIVE for group in groups]

    return route


def by_route(route: Route | None, experience: Experience, dataset: Dataset[Any], rows: Tensor) -> dict[str, Tensor]:
    """Split samples by the view that predicts them."""
    if route is None:
        return {LIVE: rows}
    names = route(experience, dataset, rows)
    return {name: rows[torch.tensor([other == name for other in names])] for name in dict.fromkeys(names)}


def _copy(module: LightningModule) -> dict[str, Tensor]:
    """What a group has of its own: the trainable weights, and buffers such as BatchNorm's statistics."""
    state = module.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
    return {name: tensor.detach().clone() for name, tensor in {**trainable(module), **buffers}.items()}


def _view(weights: dict[str, Tensor]) -> View:
    return lambda module: swapped(module, weights)
