"""What strategies need of batches and of the module, tried once before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from clkit.data.check import read_few
from clkit.data.columns import describe, size_of
from clkit.data.datamodule import stream_data
from clkit.data.datasets import is_class, labels_of
from clkit.errors import ConfigurationError
from clkit.files import run_folder, write_atomically
from clkit.memory.buffer import ReservoirBuffer
from clkit.memory.storage import TextStorage
from clkit.method.evaluation_mode import untouched
from clkit.method.forward import call, to_device
from clkit.method.strategy import gives_pairs


def check_memory(trainer: Trainer, memory: ReservoirBuffer | None = None) -> None:
    """Make sure that a memory can keep samples of all experiences, each by itself when ``None``, and their images.

    Raises:
        ConfigurationError: If it cannot.
    """
    if memory is None:
        for batch in _one_of_each(trainer):
            size_of(batch)
        return
    memory.check(_one_of_each(trainer))
    if memory.images != "references":
        memory.keep = _keeper(trainer)(trainer.lightning_module, memory.images)


def _keeper(trainer: Trainer) -> Any:
    keeper = getattr(stream_data(trainer).collate_fn, "keeper", None)
    if keeper is None:
        raise ConfigurationError(
            "A memory keeps images of texts only, as the records of a scenario such as image_instructions have them; "
            "use images='references' here, with which samples are kept as they are."
        )
    return keeper


def report_memory(trainer: Trainer, memory: ReservoirBuffer) -> None:
    """Say how many bytes a memory of texts with images takes: in loggers, and ``memory.json`` in the trainer's folder.

    ``texts`` and ``images`` are bytes in memory, ``images_elsewhere`` those of the files that it only refers to.
    """
    storage, keeper = memory.storage, getattr(stream_data(trainer).collate_fn, "keeper", None)
    if not isinstance(storage, TextStorage) or not storage.shown or keeper is None:
        return
    folder = run_folder(trainer)
    if not trainer.is_global_zero:
        return
    elsewhere, read = 0, keeper(trainer.lightning_module, "encoded")
    for number in storage.shown if memory.images == "references" else ():
        # a file that is gone is missed when it is replayed
        with suppress(OSError):
            elsewhere += read(number)["encoded"].nbytes
    found = {"texts": storage.n_bytes, "images": storage.image_bytes, "images_elsewhere": elsewhere}
    for logger in trainer.loggers:
        logger.log_metrics({f"memory/{name}": float(value) for name, value in found.items()}, stream_data(trainer).step)
    about = {"kept_of_images": memory.images, "samples": len(memory), "different_images": len(storage.shown), **found}
    if folder is not None:
        write_atomically(folder / "memory.json", json.dumps(about, indent=2) + "\n")


def _one_of_each(trainer: Trainer) -> Iterator[Any]:
    data, first = stream_data(trainer), torch.tensor([0])
    for experience in data.stream:
        batch = read_few(experience.train, first, data.collate_fn, f"experience {experience.index}'s train data")
        yield to_device(trainer, batch)


def check_classes(trainer: Trainer, name: str, instead: str) -> None:
    """Make sure that the labels of ``(x, y)`` batches are the numbers of classes.

    Raises:
        ConfigurationError: If they are not.
    """
    labels = labels_of(next(_one_of_each(trainer)))
    if labels.dim() != 1 or not is_class(labels):
        raise ConfigurationError(
            f"{name} needs the number of one class a sample, but labels are {describe(labels)}; {instead}."
        )


def check_together(trainer: Trainer, name: str) -> None:
    """Make sure that samples of all experiences can be in one batch.

    Raises:
        ConfigurationError: If they cannot.
    """
    data = stream_data(trainer)
    parts = [experience.train for experience in data.stream]
    firsts = torch.tensor([0, *ConcatDataset(parts).cumulative_sizes[:-1]])
    read_few(ConcatDataset(parts), firsts, data.collate_fn, f"different experiences, which {name} mixes,")


def check_output(
    trainer: Trainer, module: LightningModule, name: str, instead: str, net: nn.Module | None = None
) -> Tensor:
    """Make sure that ``forward`` returns a tensor ``[B, ...]``, and return that of a few samples.

    Args:
        trainer: The trainer.
        module: The module, which is left as it is.
        name: What needs it.
        instead: What to do otherwise.
        net: What is called with the inputs without the task, in place of the module.

    Raises:
        ConfigurationError: If it returns something else, or is not called with what the stream gives.
    """
    output = few_outputs(trainer, module, net)
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != 2:
        raise ConfigurationError(
            f"{name} needs one output a sample, but {type(module).__name__}.forward returns {describe(output)} for 2; "
            f"return a tensor [B, ...], or {instead}."
        )
    return output


def few_outputs(trainer: Trainer, module: LightningModule, net: nn.Module | None = None) -> Any:
    """Return what ``forward``, or ``net`` without the task, returns for two samples.

    Raises:
        ConfigurationError: If there is no ``forward``, or it is not called with what the stream gives.
    """
    data = stream_data(trainer)
    dataset, rows = data.stream[0].train, torch.tensor([0, -1])
    rows = rows % len(dataset)  # type: ignore[arg-type]
    batch = to_device(trainer, read_few(dataset, rows, data.collate_fn, "experience 0's train data"))
    with untouched(trainer, module):
        return call(module, *data.stream.inputs_of(batch)) if net is None else net(batch[0])


def check_whole_head(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Refuse a head that has fewer logits than the stream has classes, for what cannot bear one that grows.

    Raises:
        ConfigurationError: If it has.
    """
    n_classes = stream_data(trainer).stream.n_classes
    if n_classes is None or not gives_pairs(trainer) or type(module).forward is LightningModule.forward:
        return
    logits = few_outputs(trainer, module)
    if isinstance(logits, Tensor) and logits.dim() == 2 and 1 < logits.shape[1] < n_classes:
        raise _too_small(logits, n_classes, module, name, "use another strategy")


def check_rows_in_time(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Refuse a head that has fewer logits than the stream has classes, unless the module can let it grow in time.

    That is in ``on_experience_enter``, before all hooks of an experience's start.

    Raises:
        ConfigurationError: If it has fewer, and the module has no such method.
    """
    if not hasattr(module, "on_experience_enter"):
        check_whole_head(trainer, module, name)


def check_logits(trainer: Trainer, module: LightningModule, name: str, instead: str, *, all_classes: bool) -> None:
    """Make sure that ``forward`` returns logits ``[B, C]`` of at least two classes.

    Args:
        trainer: The trainer.
        module: The module, which is left as it is.
        name: What needs them.
        instead: What to do otherwise.
        all_classes: Whether there must be one for each class of the stream from the start.

    Raises:
        ConfigurationError: If it returns something else.
    """
    logits = check_output(trainer, module, name, instead)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ConfigurationError(
            f"{name} needs one logit for each of at least two classes, but {type(module).__name__}.forward returns "
            f"{describe(logits)} for {len(logits)} samples; return [B, C], or {instead}."
        )
    n_classes = stream_data(trainer).stream.n_classes
    if all_classes and n_classes is not None and logits.shape[1] < n_classes:
        raise _too_small(logits, n_classes, module, name, instead)


def _too_small(logits: Tensor, n_classes: int, module: LightningModule, name: str, instead: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} needs a logit for each of the stream's {n_classes} classes from the start, but "
        f"{type(module).__name__}.forward returns {logits.shape[1]}; build the network with all its outputs, or "
        f"{instead}."
    )
