"""What has no place where a trainer of Hugging Face's learns a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities.seed import isolate_rng

from clkit.data.branch import Branching
from clkit.data.datamodule import StreamDataModule
from clkit.data.hooks import callbacks_of
from clkit.data.images import Images
from clkit.data.loader import read_samples
from clkit.errors import ConfigurationError

_CALLBACKS = ("pytorch_lightning.callbacks.", "lightning.pytorch.callbacks.")
_MISSING = ("_sanity_", "_validation_", "_test_", "_predict_", "backward", "zero_grad")
"""What is in the names of Lightning's hooks that Hugging Face's loop has no place for."""


def check_trainer(hf: Any, data: StreamDataModule) -> None:
    """Refuse settings of a ``transformers.Trainer`` that would be ignored, or change what strategies rely on.

    Raises:
        ConfigurationError: If there is one.
    """
    args, precision = hf.args, hf.accelerator.mixed_precision
    n, size = max(args.world_size, args.n_gpu), args.per_device_train_batch_size
    # transformers 4 has a flag for it
    sampling = getattr(args, "train_sampling_strategy", None) or ("random", "group_by_length")[args.group_by_length]
    whole_loss = hf.compute_loss_func is not None or bool(getattr(hf, "loss_is_scaled_for_ga", None))
    refusals = [
        (
            n > 1,
            f"There are {n} processes or GPUs, and each would remember samples of its own; use one "
            "(CUDA_VISIBLE_DEVICES=0), or Lightning's Trainer(strategy='ddp').",
        ),
        (
            hf.is_deepspeed_enabled or hf.is_fsdp_enabled,
            "DeepSpeed and FSDP take the weights apart, which strategies need whole; leave them out.",
        ),
        (
            precision not in ("no", "bf16"),
            f"In {precision} strategies would see scaled gradients; use bf16=True, or no mixed precision.",
        ),
        (
            args.torch_compile,
            "torch_compile=True compiles layers without what callbacks hook into them; leave it out.",
        ),
        (
            hf.model_init is not None,
            "model_init makes another model when the training starts; give the trainer its model.",
        ),
        (
            args.load_best_model_at_end,
            "load_best_model_at_end=True takes an earlier step's weights just before the strategies end; leave it out.",
        ),
        (
            size != data.batch_size,
            f"per_device_train_batch_size={size}, but StreamDataModule has batch_size={data.batch_size}; give the "
            "same.",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True would change the batches of the stream; leave it out.",
        ),
        (
            sampling != "random" or args.dataloader_drop_last or args.dataloader_num_workers > 0,
            f"{sampling} sampling, dataloader_drop_last={args.dataloader_drop_last} and dataloader_num_workers="
            f"{args.dataloader_num_workers} are for data of the trainer's own; leave them out, and use "
            "group_by_length, drop_last and num_workers of StreamDataModule.",
        ),
        (
            getattr(args, "packing", False) or getattr(args, "padding_free", False),
            "packing and padding_free join texts, but strategies work on samples; leave them out.",
        ),
        (
            args.gradient_accumulation_steps > 1 and whole_loss,
            "The trainer's loss is one of all accumulated batches, but replay weighs each batch's own; use "
            "gradient_accumulation_steps=1, or the model's loss.",
        ),
        (
            data.stop_when is not None,
            "stop_when looks at Lightning's validations, which Hugging Face's loop does not have; leave it out.",
        ),
    ]
    for refused, why in refusals:
        if refused:
            raise ConfigurationError(why)


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that need more of Lightning than its hooks around steps, epochs and the fit.

    Raises:
        ConfigurationError: If there is one.
    """
    hooks = [name for name in dir(Callback) if any(part in name for part in _MISSING)]
    for callback in callbacks:
        own, name = type(callback), type(callback).__name__
        needed = [hook for hook in hooks if getattr(own, hook) is not getattr(Callback, hook)]
        builtin = any(base.__module__.startswith(_CALLBACKS) for base in own.__mro__ if base is not Callback)
        if needed or builtin or getattr(callback, "renews_schedules", False):
            raise ConfigurationError(
                f"{name} needs {', '.join(needed) or 'the loop'} of Lightning's Trainer, but Hugging Face's trains; "
                f"leave {name} out. Checkpoints, schedules and progress bars are settings of TrainingArguments."
            )


def check_stream(trainer: Trainer, data: StreamDataModule) -> None:
    """Refuse a stream that Hugging Face's loop cannot go through; Lightning's trainer has been set up with it.

    Raises:
        ConfigurationError: If it cannot.
    """
    if callbacks_of(trainer, Branching):
        raise ConfigurationError(
            "StreamDataModule(after=...) goes on from a checkpoint of Lightning's Trainer; use that, or leave it out."
        )
    with isolate_rng():
        batch = read_samples(data.stream[0].train, torch.tensor([0]), collate_fn=data.collate_fn)
    if not isinstance(batch, Mapping):
        raise ConfigurationError(
            f"Hugging Face's Trainer gives the parts of a batch to the model by name, but the stream's is a "
            f"{type(batch).__name__}; use a stream of mappings, or Lightning's Trainer."
        )
    if any(isinstance(part, Images) for part in batch.values()):
        raise ConfigurationError(
            "The stream has images beside its texts, which the model of Hugging Face's Trainer takes as pixels; use "
            "VisionLanguage with Lightning's Trainer."
        )
    n = int(trainer.accumulate_grad_batches)
    for epoch in range(data.total_epochs):
        batches = data.epoch_batches(epoch)
        if batches % n:
            raise ConfigurationError(
                f"Hugging Face's loop steps after every {n} batches, wherever an epoch ends, but epoch {epoch} of the "
                f"stream has {batches}; use StreamDataModule(steps=...), or other sizes."
            )
