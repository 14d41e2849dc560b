"""What a stream declares, compared once with what its samples are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from clkit.data.columns import describe
from clkit.data.datasets import find_labels, is_class, stored
from clkit.data.loader import read_samples
from clkit.data.stream import Experience, Stream, task_in
from clkit.errors import ConfigurationError

Collate = Callable[[list[Any]], Any] | None


def check_samples(stream: Stream, collate_fn: Collate) -> None:
    """Compare the declared classes and tasks with samples: all where they are held as tensors, else a few.

    Raises:
        ConfigurationError: If samples make no batch, a label is none of the experience's declared classes, or a task
            is not the experience's.
    """
    for experience in stream:
        for part in ("train", "val", "test"):
            dataset = getattr(experience, part)
            if dataset is not None:
                _check(stream, experience, part, dataset, collate_fn)


def some_rows(dataset: Dataset[Any]) -> Tensor:
    """Return the first, the middle and the last position of a dataset, ``int64``, each once."""
    n = len(cast(Sequence[Any], dataset))
    return torch.tensor(sorted({0, n // 2, n - 1}))


def read_few(dataset: Dataset[Any], rows: Tensor, collate_fn: Collate, what: str) -> Any:
    """Read samples as one batch.

    Raises:
        ConfigurationError: If they make no batch; ``what`` says of what they are samples.
    """
    try:
        return read_samples(dataset, rows, collate_fn=collate_fn)
    except ConfigurationError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"Samples of {what} make no batch ({str(error).splitlines()[0]}); let the dataset give tensors or numbers "
            "of one shape (resize or pad them), or give the stream a collate_fn."
        ) from error


@torch.no_grad()
def check_lone_sample(module: LightningModule, stream: Stream, index: int, collate_fn: Collate) -> None:
    """Make sure that BatchNorm can take a batch of one sample, as an experience has.

    Raises:
        ConfigurationError: If it cannot.
    """
    if not any(isinstance(norm, _BatchNorm) and norm.training for norm in module.modules()):
        return
    what = f"experience {index}'s train data"
    batch = module._on_before_batch_transfer(read_few(stream[index].train, torch.tensor([0]), collate_fn, what))
    batch = module.trainer.strategy.batch_to_device(batch)
    if not isinstance(batch, (tuple, list)) or type(module).forward is LightningModule.forward:
        return
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with isolate_rng(), module.trainer.precision_plugin.train_step_context():
            module(*stream.inputs_of(batch))
    except Exception as error:
        # what else a forward on one sample says comes up in training, if it does
        if "more than 1 value per channel" in str(error):
            raise ConfigurationError(
                f"Experience {index} has a batch of one sample, of which BatchNorm cannot take a variance; use another "
                "batch_size, or drop_last=True."
            ) from error
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def _check(stream: Stream, experience: Experience, part: str, dataset: Dataset[Any], collate_fn: Collate) -> None:
    where = f"experience {experience.index}'s {part} data"
    batch = read_few(dataset, some_rows(dataset), collate_fn, where)
    whole = stored if collate_fn is None else lambda dataset, position: None
    if stream.kind == "task-incremental":
        given = whole(dataset, 2)
        tasks = [task_in(dataset[0])] if given is None else torch.unique(given).tolist()
        if tasks != [experience.task]:
            raise ConfigurationError(
                f"The task label in {where} is {', '.join(map(str, tasks))}, but the experience's task is "
                f"{experience.task}; let all its samples have that one, or give Experience another task."
            )
    if not experience.classes:
        return
    labels = whole(dataset, 1)
    labels = find_labels(batch) if labels is None else labels
    if labels is None:
        return
    if labels.dim() != 1 or not is_class(labels[:1]):
        raise ConfigurationError(
            f"Labels in {where} are {describe(labels)}, but the experience has classes; let them be one whole number a "
            "sample, or give the stream no classes."
        )
    known = experience.classes if part == "train" or stream.n_classes is None else range(stream.n_classes)
    others = sorted(set(torch.unique(labels).tolist()) - set(known))
    if others:
        raise ConfigurationError(
            f"Labels in {where} include {', '.join(map(str, others[:5]))}, but "
            + (
                f"its classes are {experience.classes}; give it those that samples have after all transforms."
                if part == "train"
                else f"n_classes={stream.n_classes}; number classes from 0 and alike in all sets."
            )
        )
