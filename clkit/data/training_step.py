"""The module's ``training_step`` with what the strategies add to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch.utils._pytree import tree_map

from clkit.data.forward_record import OWN_STEP, Copies, forget_forward, record_forward
from clkit.data.hooks import Hooks, overrides


def extend_step(
    trainer: Trainer,
    module: LightningModule,
    strategies: Sequence[Hooks],
    active: Callable[[], bool],
    augment: Callable[[Any], Any] | None = None,
) -> None:
    """Put the strategies' transforms and loss terms into the module's ``training_step``.

    ``training_step`` gets a batch of its own: whatever it does to it, strategies see what the stream gave.

    Args:
        trainer: The trainer.
        module: The module.
        strategies: The strategies, in their order.
        active: Tells whether they act now.
        augment: Augments the batch before them all.
    """
    transforms = [s.transform_batch for s in strategies if overrides(s, "transform_batch")]
    terms = [s.loss_term for s in strategies if overrides(s, "loss_term")]
    hooks = ("transform_batch", "loss_term", "on_train_batch_start", "on_train_batch_end")
    copied = any(s.reads_batch and any(overrides(s, hook) for hook in hooks) for s in strategies)
    if not terms and not copied and augment is None:
        return
    own_step = module.training_step

    @functools.wraps(own_step)
    def training_step(batch: Any, *args: Any) -> Any:
        if not active():
            return own_step(batch, *args)
        if augment is not None:
            batch = augment(batch)
        for transform in transforms:
            batch = transform(trainer, module, batch)
        copies = Copies()
        given = tree_map(copies.make, batch) if copied else batch
        with record_forward(module, copies):
            output = own_step(given, *args)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            return output
        added = [term(trainer, module, batch, loss) for term in terms]
        forget_forward(module)
        total = sum((term for term in added if term is not None), loss)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    setattr(training_step, OWN_STEP, own_step)
    module.training_step = training_step  # type: ignore[method-assign]


def restore_step(module: LightningModule) -> None:
    """Undo :func:`extend_step`; nothing happens where it was not called."""
    own_step = getattr(module.__dict__.get("training_step"), OWN_STEP, None)
    if own_step is not None:
        del module.__dict__["training_step"]
        if own_step != module.training_step:
            module.training_step = own_step  # type: ignore[method-assign]
