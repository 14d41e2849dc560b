"""The head of a classifier, its last linear layer, and the features that it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data.columns import size_of, take
from clkit.data.datamodule import stream_data
from clkit.data.datasets import labels_of
from clkit.data.forward_record import record_layers
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.setup_checks import check_classes, check_logits, few_outputs
from clkit.method.strategy import check_pairs

CHUNK = 500
"""Samples in one forward for their features."""


def last_linear(module: nn.Module) -> nn.Linear | None:
    """Return the last linear layer of a module in its order of definition, ``None`` without one."""
    return next((layer for layer in reversed(list(module.modules())) if isinstance(layer, nn.Linear)), None)


def head_of(module: nn.Module) -> nn.Linear:
    """Return the head: the last linear layer.

    Raises:
        ConfigurationError: If there is none.
    """
    head = last_linear(module)
    if head is None:
        raise ConfigurationError(f"{type(module).__name__} has no linear layer, so no head; use another.")
    return head


def names_of(module: nn.Module, head: nn.Linear) -> dict[str, str]:
    """Return the names of the head's ``weight`` and, where it has one, ``bias`` in ``module.state_dict()``."""
    path = next(name for name, layer in module.named_modules() if layer is head)
    return {own: f"{path}.{own}".lstrip(".") for own, _ in head.named_parameters(recurse=False)}


def check_head(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Make sure that batches are ``(x, y)`` of classes and the module's logits are those of its head.

    Called when the module can be (from ``on_train_start`` on).

    Args:
        trainer: The trainer.
        module: The module, which is left as it is.
        name: What needs the head.

    Raises:
        ConfigurationError: If they are not.
    """
    check_pairs(trainer, name, "use a strategy that needs no head, such as ExperienceReplay")
    check_classes(trainer, name, "use a strategy that needs no head, such as ExperienceReplay")
    check_logits(trainer, module, name, "use a strategy that needs no head", all_classes=False)
    head = head_of(module)
    with record_layers([head]) as calls:
        logits = cast(Tensor, few_outputs(trainer, module))
    own = calls[head].output if head in calls else None
    # a run that diverged may be gone on with
    masked = (logits == torch.finfo(logits.dtype).min) | logits.isnan()
    if not isinstance(own, Tensor) or own.shape != logits.shape or not (masked | (own == logits)).all():
        raise ConfigurationError(
            f"{name} needs logits that are the output of the network's last linear layer, but those of "
            f"{type(module).__name__} are not (an adapter on the head, for instance, or a layer behind it); use a "
            "plain linear head."
        )


def check_rows(head: nn.Linear, classes: Iterable[int], name: str) -> None:
    """Make sure that the head has a row for each of some classes, as one that grows has once they come.

    Raises:
        ConfigurationError: If it has not.
    """
    most = max(classes, default=-1)
    if most >= head.out_features:
        raise ConfigurationError(
            f"{name} sets the head's row of class {most}, but the head has {head.out_features} when that class comes; "
            "build the network with all its outputs, or let it grow as Classifier(growing=True) does."
        )


def features(
    module: LightningModule,
    batch: Any,
    mode: Callable[[nn.Module], AbstractContextManager[None]] = evaluation_mode,
) -> Tensor:
    """Return the head's inputs for a batch, float32 ``[B, d]``: no gradient, no random number used.

    Args:
        module: A module with a trainer.
        batch: ``(x, y)`` or ``(x, y, task)``, as a memory holds it.
        mode: Puts the module into the mode of the forward, and back.
    """
    head, stream = head_of(module), stream_data(module.trainer).stream
    found = []
    with torch.no_grad(), isolate_rng(), mode(module), record_layers([head]) as calls:
        for rows in _chunks(size_of(batch)):
            part = move_data_to_device(take(batch, rows), module.device)
            with module.trainer.precision_plugin.forward_context():
                module(*stream.inputs_of(part))
            found.append(calls[head].args[0].float())
    return torch.cat(found)


def _chunks(size: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))


def new_classes(trainer: Trainer, experience: Experience) -> list[int]:
    """Return the classes that no earlier experience of the stream has, in order."""
    earlier = stream_data(trainer).stream.classes_seen(experience.index - 1) if experience.index else ()
    return sorted(set(experience.classes) - set(earlier))


def labels(module: LightningModule, batch: Any) -> Tensor:
    """Return the classes of a batch on the module's device, ``int64`` ``[B]``."""
    return labels_of(batch).to(module.device)


def class_sums(values: Tensor, y: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Return the sum of each class's rows, ``[C, d]``, and how many there are, ``[C]``.

    Args:
        values: ``[N, d]``.
        y: Classes, ``int64`` ``[N]``.
        n_classes: C.
    """
    one_hot = F.one_hot(y, n_classes).to(values.dtype)
    return one_hot.T @ values, one_hot.sum(dim=0)


def class_means(values: Tensor, y: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    r"""Return each class's mean of normalised features :math:`\phi / \lVert\phi\rVert`, and its number of samples.

    Args:
        values: Features :math:`\phi`, ``[N, d]``; those that are all zero stay so.
        y: Classes, ``int64`` ``[N]``.
        n_classes: C.

    Returns:
        Means ``[C, d]``, 0 for a class without samples, and numbers ``[C]``.
    """
    sums, counts = class_sums(F.normalize(values, dim=1), y, n_classes)
    return sums / counts.clamp(min=1)[:, None], counts
