"""Streams, strategies and per-iteration evaluation in Hugging Face's ``Trainer`` and in TRL's ``SFTTrainer``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import get_last_checkpoint

from clkit.data.branch import Branching
from clkit.data.datamodule import StreamDataModule
from clkit.data.hooks import callbacks_of
from clkit.data.images import Images
from clkit.data.loader import StreamLoader, read_samples
from clkit.errors import ConfigurationError
from clkit.language.models import LanguageModule
from clkit.method.forward import to_device
from clkit.method.strategy import Strategy

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

STATE = "clkit.ckpt"
"""What lies beside Hugging Face's files in a checkpoint."""

_HOOKS = frozenset(
    f"on_{name}"
    for name in (
        "fit_start fit_end train_start train_end train_epoch_start train_epoch_end train_batch_start train_batch_end "
        "before_optimizer_step exception save_checkpoint load_checkpoint"
    ).split()
)
"""Lightning's hooks that have a place in Hugging Face's loop."""

_LIGHTNING = ("pytorch_lightning.callbacks", "lightning.pytorch.callbacks")


class StreamTraining(TrainerCallback):
    """Lets a trainer of Hugging Face's learn a stream, with clkit's strategies and evaluation.

    The loop stays Hugging Face's, and with it the model, the loss, the optimizer and its schedule, clipping, mixed
    precision, reporters and checkpoints. What it trains on, and when, is the datamodule's: the samples come in the very
    order of a Lightning run, and one ``trainer.train()`` goes through all experiences. A step does what it does in
    Lightning, in the same order, so that the same model ends in the same weights and in the same ``history.csv``. The
    loss of a batch is its own mean, also where gradients accumulate: ``num_items_in_batch`` of a window knows nothing
    of replayed samples.

    Each checkpoint gets a file ``clkit.ckpt`` with the memories and the stream's clock, and
    ``train(resume_from_checkpoint=...)`` goes on at the next batch. ``save_strategy="epoch"`` saves after each epoch of
    the datamodule, as ``eval_strategy`` and ``logging_strategy`` do; ``steps`` of an experience are one epoch. What
    strategies log, and the curves of :class:`~clkit.StabilityGap`, go where ``report_to`` says.

    Args:
        data: The stream and its plan. ``max_steps`` of the training arguments is set to its optimizer steps, unless
            fewer are given; ``num_train_epochs`` counts nothing.
        callbacks: Strategies and other callbacks of clkit, as for Lightning's trainer.

    Raises:
        ConfigurationError: In ``train``, if something of trainer, stream or callbacks has no place in such a loop.

    Example::

        data = StreamDataModule(stream, batch_size=4, steps=200)
        trainer = Trainer(model, TrainingArguments("run", per_device_train_batch_size=4, learning_rate=2e-4))
        StreamTraining(data, [ExperienceReplay(200), StabilityGap(10, score="token_accuracy")]).attach(trainer)
        trainer.train()
    """

    def __init__(self, data: StreamDataModule, callbacks: Sequence[Callback] = ()) -> None:
        self.data, self.callbacks = data, list(callbacks)
        self._hf: Any = None
        self._ends: tuple[Any, Any] = (None, None)
        self._weights: Mapping[str, Tensor] = {}

    def attach(self, trainer: Trainer) -> StreamTraining:
        """Let ``trainer.train()`` learn the stream.

        Raises:
            ConfigurationError: If the trainer has a stream already, or this one has a trainer.
        """
        handler: Any = trainer.callback_handler
        if self._hf is not None or any(isinstance(callback, StreamTraining) for callback in handler.callbacks):
            raise ConfigurationError("A trainer has one StreamTraining, and the other way round; make a new one.")
        self._hf, self._own_train = trainer, trainer.train
        # before the reporters, which end with the training, and after what decides when to log
        handler.callbacks.insert(1, self)
        trainer.train = self._train  # type: ignore[method-assign]
        return self

    def _train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        _check_trainer(self._hf, self.data)
        _check_callbacks(self.callbacks)
        folder = resume_from_checkpoint or None
        folder = get_last_checkpoint(self._hf.args.output_dir) if folder is True else folder
        self._build()
        try:
            call._call_setup_hook(self._carrier)
            self._check_stream()
            if folder is not None:
                self._restore(Path(folder))
            # the loader itself goes on where it was
            settings = _set(self._hf.args, max_steps=self._steps(), ignore_data_skip=True)
            own = _set(self._hf, get_train_dataloader=lambda: _Batches(self), training_step=self._step)
            with settings, own:
                output = self._own_train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            self._run("on_exception", error)
            self.data.on_exception(error)
            raise
        call._call_teardown_hook(self._carrier)
        return output

    def _build(self) -> None:
        """Make what the callbacks take for the trainer and the module of a fit."""
        hf, args = self._hf, self._hf.args
        device = args.device
        self._own_step, self._module = hf.training_step, _Module(hf)
        self._carrier = pl.Trainer(
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision="bf16-mixed" if hf.accelerator.mixed_precision == "bf16" else "32-true",
            max_epochs=self.data.total_epochs,
            accumulate_grad_batches=args.gradient_accumulation_steps,
            callbacks=list(self.callbacks),
            default_root_dir=args.output_dir,
            logger=_Reports(hf),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self._carrier.state.fn, self._carrier.training = TrainerFn.FITTING, True
        self._carrier.strategy.connect(self._module)
        self._carrier._data_connector.attach_data(self._module, datamodule=self.data)
        loop = self._carrier.fit_loop
        self.epochs, self.batches = loop.epoch_progress, loop.epoch_loop.batch_progress
        self._optimizer_steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step

    def _check_stream(self) -> None:
        data, accumulated = self.data, self._carrier.accumulate_grad_batches
        if callbacks_of(self._carrier, Branching):
            raise ConfigurationError("StreamDataModule(after=...) goes on in Lightning's fit alone; leave it out.")
        with isolate_rng():
            batch = read_samples(data.stream[0].train, torch.tensor([0]), collate_fn=data.collate_fn)
        if not isinstance(batch, Mapping):
            raise ConfigurationError(
                f"Hugging Face's Trainer gives a batch to the model by names, but the stream's is a "
                f"{type(batch).__name__}; use a stream of mappings, or Lightning's Trainer."
            )
        if any(isinstance(part, Images) for part in batch.values()):
            raise ConfigurationError(
                "The stream has texts with images, which models take as pixels; use Lightning's Trainer with "
                "clkit.language.models.VisionLanguage, which makes them."
            )
        for epoch in range(data.total_epochs):
            if (batches := data.epoch_batches(epoch)) % accumulated:
                raise ConfigurationError(
                    f"Hugging Face's loop steps on each {accumulated}th batch, wherever an epoch ends, but epoch "
                    f"{epoch} of the stream has {batches}; use StreamDataModule(steps=...), or other sizes."
                )

    def _steps(self) -> int:
        given, planned = self._hf.args.max_steps, self.data.total_steps
        if given > planned:
            raise ConfigurationError(
                f"max_steps={given}, but the stream lasts {planned} optimizer steps; leave max_steps out."
            )
        if 0 < given < planned:
            rank_zero_warn(f"max_steps={given} ends before the stream does ({planned} optimizer steps).")
        return int(given if given > 0 else planned)

    def _restore(self, folder: Path) -> None:
        if not (folder / STATE).is_file():
            raise ConfigurationError(
                f"{folder} has no {STATE}: it was saved without StreamTraining, or its saving was cut short; resume "
                "from another checkpoint, or start anew."
            )
        content: Any = self._carrier.strategy.checkpoint_io.load_checkpoint(folder / STATE, weights_only=True)
        self.data.load_state_dict(content["datamodule"])
        call._call_callbacks_on_load_checkpoint(self._carrier, content)
        call._call_callbacks_load_state_dict(self._carrier, content)
        self._weights = content["weights"]
        for progress, at in zip((self.epochs, self.batches, self._optimizer_steps), content["at"], strict=True):
            progress.current.ready = progress.current.completed = progress.total.completed = at

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._module.net.load_state_dict(self._weights, strict=False)
        self._weights = {}
        optimizer = getattr(self._hf.optimizer, "optimizer", self._hf.optimizer)
        self._carrier.optimizers = [optimizer]
        self._carrier.log_every_n_steps = max(int(state.logging_steps), 1)
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        left = [n for n, p in self._module.net.named_parameters() if p.requires_grad and p not in stepped]
        if left:
            raise ConfigurationError(
                f"The optimizer was made before {left[0]} was there, which a callback trains; let the trainer make it, "
                "from optim or optimizer_cls_and_kwargs."
            )
        self._run("on_fit_start")
        self._module.on_fit_start()
        self._run("on_train_start")

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do what Lightning does with a batch, up to the clipping of gradients."""
        batch = to_device(self._carrier, inputs)
        if self.batches.current.ready == 0:
            self._run("on_train_epoch_start")
        self.batches.increment_ready()
        self.batches.is_last_batch = self.batches.current.ready == len(self.loader)
        index = self._carrier.fit_loop.batch_idx
        self._run("on_train_batch_start", batch, index)

        def compute_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
            with self._carrier.precision_plugin.train_step_context():
                return self._module.training_step(inputs, index)

        with _set(self._hf, compute_loss=compute_loss):
            loss: Tensor = self._own_step(model, batch)
        if self._hf.accelerator.sync_gradients:
            self._run("on_before_optimizer_step", self._carrier.optimizers[0])
        self._ends = {"loss": loss}, batch
        return loss

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_batch()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the gradients are gone in on_step_end
        self._optimizer_steps.increment_completed()
        self._end_batch()
        if not self.data.has_stepped:
            raise ConfigurationError(
                f"optim={args.optim} takes no step of an optimizer after the backward pass, as strategies expect; use "
                "another one, such as adamw_torch."
            )

    def _end_batch(self) -> None:
        self.batches.increment_completed()
        self._run("on_train_batch_end", *self._ends, self._carrier.fit_loop.batch_idx)
        self._ends = None, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        state.epoch = self._carrier.current_epoch + self.batches.current.completed / len(self.loader)
        if self.batches.is_last_batch:
            self._run("on_train_epoch_end")
            self.epochs.increment_completed()
            self.batches.reset_on_run()
            # after the last step the loop's own end of an epoch does so
            more = state.global_step < state.max_steps
            control.should_log |= more and args.logging_strategy == "epoch"
            control.should_evaluate |= more and args.eval_strategy == "epoch"
            control.should_save |= more and args.save_strategy == "epoch"
        if control.should_log and self._module.logged:
            self._carrier.loggers[0].log_metrics(self._module.logged, state.global_step)
            self._module.logged.clear()
        control.should_training_stop |= self._carrier.should_stop
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        content = {
            "callbacks": call._call_callbacks_state_dict(self._carrier),
            "datamodule": self.data.state_dict(),
            "weights": self._unsaved(),
            "at": [self._carrier.current_epoch, self.batches.current.completed, self._carrier.global_step],
            "pytorch-lightning_version": pl.__version__,
        }
        call._call_callbacks_on_save_checkpoint(self._carrier, content)
        path = Path(self._hf._get_output_dir(None), f"checkpoint-{state.global_step}", STATE)
        self._carrier.strategy.checkpoint_io.save_checkpoint(content, path)

    def _unsaved(self) -> dict[str, Tensor]:
        """Return the weights that are not, or not surely, in the files of an adapter."""
        net = self._module.net
        if not hasattr(net, "peft_config"):
            return {}
        if any(strategy.changes_frozen for strategy in callbacks_of(self._carrier, Strategy)):
            return dict(net.state_dict())
        return {name: parameter.detach() for name, parameter in net.named_parameters() if parameter.requires_grad}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._run("on_train_end")
        self._run("on_fit_end")

    def _run(self, hook: str, *args: Any) -> None:
        call._call_callback_hooks(self._carrier, hook, *args)


class _Module(LanguageModule):
    """The model of a trainer of Hugging Face's, with that trainer's loss."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.model)
        self.logged: dict[str, float] = {}
        self._hf, self._compute_loss = trainer, trainer.compute_loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hf": None, "_compute_loss": None}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # some trainers write into what they get
        loss: Tensor = self._compute_loss(self._hf.model_wrapped, dict(batch))
        return loss

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = float(value)

    def configure_optimizers(self) -> Any:
        raise ConfigurationError(
            "A callback asks for a new optimizer, but Hugging Face's Trainer goes on with its own; leave it out, or "
            "use Lightning's Trainer."
        )


class _Batches:
    """The batches of the stream, one epoch of the plan after another, from where the fit is on."""

    def __init__(self, training: StreamTraining) -> None:
        self._training = training

    def __len__(self) -> int:
        data = self._training.data
        return sum(data.epoch_batches(epoch) for epoch in range(data.total_epochs))

    def __iter__(self) -> Iterator[Any]:
        training = self._training
        while not training.data.is_over:
            training.loader = training.data.train_dataloader()
            training.loader.load_state_dict({"next": training.batches.current.ready})
            yield from training.loader


class _Reports(Logger):
    """What a trainer of Hugging Face's reports to, as a logger of Lightning's."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def name(self) -> str:
        return "hugging_face"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        trainer = self._trainer
        state = copy.copy(trainer.state)
        state.global_step = state.global_step if step is None else step
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
                callback.on_log(trainer.args, state, trainer.control, model=trainer.model, logs=dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the reporters log those of the training arguments."""


def _check_trainer(trainer: Any, data: StreamDataModule) -> None:
    """Refuse what has no place beside a stream."""
    args, precision = trainer.args, trainer.accelerator.mixed_precision
    size, given = data.batch_size, args.per_device_train_batch_size
    sampling = getattr(args, "train_sampling_strategy", None) or ("random", "group_by_length")[args.group_by_length]
    joins = trainer.compute_loss_func is not None or getattr(trainer, "loss_is_scaled_for_ga", None)
    refusals = (
        (
            max(args.world_size, args.n_gpu) > 1,
            f"StreamTraining runs in one process on one device, and here are {max(args.world_size, args.n_gpu)}: each "
            "would have memories of its own. Use Lightning's Trainer(strategy='ddp'), or CUDA_VISIBLE_DEVICES=0",
        ),
        (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
            "DeepSpeed and FSDP take the model apart, and strategies need whole weights; leave them out",
        ),
        (
            precision not in ("no", "bf16"),
            f"Mixed precision is {precision}, whose scaled gradients strategies would see; use bf16, or none",
        ),
        (args.torch_compile, "torch_compile=True leaves out what callbacks hook into the layers; leave it out"),
        (trainer.model_init is not None, "model_init makes another model than the one attached to; give the model"),
        (
            args.load_best_model_at_end,
            "load_best_model_at_end=True brings weights back from before the strategies' last work; leave it out",
        ),
        (
            args.auto_find_batch_size or size != given,
            f"per_device_train_batch_size={given} and auto_find_batch_size={args.auto_find_batch_size}, but "
            f"StreamDataModule has batch_size={size}, which decides; give the same, and no search for another",
        ),
        (
            sampling != "random" or args.dataloader_drop_last or args.dataloader_num_workers > 0,
            f"The order of samples ({sampling}), dataloader_drop_last and dataloader_num_workers are the stream's; use "
            "group_by_length, drop_last and num_workers of StreamDataModule",
        ),
        (
            getattr(args, "packing", False) or getattr(args, "padding_free", False),
            "packing and padding_free join texts, but strategies work on samples; leave them out",
        ),
        (
            joins and args.gradient_accumulation_steps > 1,
            "The trainer's loss is one over all accumulated batches, but replay weighs each batch's own; use "
            "gradient_accumulation_steps=1, or the model's loss",
        ),
        (
            data.stop_when is not None,
            "stop_when looks at Lightning's validations, which Hugging Face's loop has not; leave it out",
        ),
    )
    for refused, why in refusals:
        if refused:
            raise ConfigurationError(f"{why}.")


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that need more of Lightning than its hooks around steps and experiences."""
    for callback in callbacks:
        name, own = type(callback).__name__, type(callback).__mro__
        theirs = [base for base in own if base is not Callback and base.__module__.startswith(_LIGHTNING)]
        missing = [hook for hook in dir(Callback) if hook.startswith("on_") and hook not in _HOOKS]
        needed = [hook for hook in missing if getattr(type(callback), hook) is not getattr(Callback, hook)]
        if theirs or needed or getattr(callback, "renews_schedules", False):
            raise ConfigurationError(
                f"{name} needs Lightning's own {'loop' if not needed else ' and '.join(needed)}, in whose place "
                "Hugging Face's runs; leave it out, or use Lightning's Trainer. Checkpoints, schedules and progress "
                "bars are settings of TrainingArguments."
            )


@contextmanager
def _set(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object other attributes inside the context."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)
