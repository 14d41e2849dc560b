"""Streams, strategies and per-iteration evaluation in Hugging Face's ``Trainer`` and in TRL's ``SFTTrainer``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.loops.progress import _BatchProgress
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import get_last_checkpoint

from clkit.data.datamodule import StreamDataModule
from clkit.data.hooks import callbacks_of
from clkit.data.loader import StreamLoader
from clkit.errors import ConfigurationError
from clkit.language.hf_checks import check_callbacks, check_stream, check_trainer
from clkit.language.models import LanguageModule
from clkit.method.forward import to_device
from clkit.method.strategy import Strategy

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

STATE = "clkit.ckpt"
"""What lies beside Hugging Face's files in a checkpoint."""


class StreamTraining(TrainerCallback):
    """Lets a trainer of Hugging Face's learn a stream, with clkit's strategies and evaluation.

    The loop stays Hugging Face's, with its model, loss, optimizer, schedule, clipping, mixed precision, reporters and
    checkpoints. What it trains on is the datamodule's: samples come in the order of a Lightning run, and one
    ``trainer.train()`` goes through all experiences. A step does what it does in Lightning, in the same order, so that
    the same model ends in the same weights and the same ``history.csv``. The loss of a batch is the mean of its own,
    also where gradients accumulate: ``num_items_in_batch`` knows nothing of replayed samples.

    Each checkpoint gets a file ``clkit.ckpt`` with the strategies' memories and the stream's clock, and
    ``train(resume_from_checkpoint=...)`` goes on at the next batch. An epoch is one of the datamodule, for
    ``save_strategy="epoch"`` and its like too. What strategies log, and the curves of :class:`~clkit.StabilityGap`, go
    where ``report_to`` says.

    Args:
        data: The stream and its plan. ``max_steps`` of the training arguments is its number of optimizer steps unless
            fewer are given; ``num_train_epochs`` counts for nothing.
        callbacks: Strategies and other callbacks of clkit, as for Lightning's trainer.

    Raises:
        ConfigurationError: In ``train``, if something of trainer, stream or callbacks has no place in such a training.

    Example::

        data = StreamDataModule(stream, batch_size=4, steps=200)
        trainer = Trainer(model, TrainingArguments("run", per_device_train_batch_size=4, learning_rate=2e-4))
        StreamTraining(data, [ExperienceReplay(200), StabilityGap(10, score="token_accuracy")]).attach(trainer)
        trainer.train()
    """

    def __init__(self, data: StreamDataModule, callbacks: Sequence[Callback] = ()) -> None:
        self.data, self.callbacks = data, list(callbacks)
        self._hf: Any = None
        self._weights: Mapping[str, Tensor] = {}
        self._last: tuple[Any, Any] = (None, None)

    def attach(self, trainer: Trainer) -> StreamTraining:
        """Let ``trainer.train()`` learn the stream.

        Raises:
            ConfigurationError: If the trainer has a stream already, or this one a trainer.
        """
        callbacks: list[Any] = trainer.callback_handler.callbacks
        if self._hf is not None or any(isinstance(callback, StreamTraining) for callback in callbacks):
            raise ConfigurationError("A trainer has one StreamTraining, and each is for one trainer; make new ones.")
        self._hf, self._own_train = trainer, trainer.train
        # after what decides when to log, and before the reporters, which close at the end
        callbacks.insert(1, self)
        trainer.train = self._train  # type: ignore[method-assign]
        return self

    def _train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        check_trainer(self._hf, self.data)
        check_callbacks(self.callbacks)
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self._hf.args.output_dir)  # type: ignore[no-untyped-call]
        self._build()
        try:
            call._call_setup_hook(self._carrier)
            check_stream(self._carrier, self.data)
            if folder:
                self._restore(Path(folder))
            # the loader itself goes on where it was
            settings = {"max_steps": self._steps(), "ignore_data_skip": True}
            own = {"training_step": self._step, "get_train_dataloader": lambda: self._loader}
            with _set(self._hf.args, settings), _set(self._hf, own):
                output = self._own_train(resume_from_checkpoint, *args, **kwargs)
        except BaseException as error:
            self._run("on_exception", error)
            self.data.on_exception(error)
            raise
        call._call_teardown_hook(self._carrier)
        return output

    def _build(self) -> None:
        """Make what callbacks take for the trainer and the module of a fit; it holds the state, and runs nothing."""
        hf, args = self._hf, self._hf.args
        log = logging.getLogger(pl.__name__)
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            self._carrier = carrier = pl.Trainer(
                accelerator={"cuda": "gpu"}.get(args.device.type, args.device.type),
                devices=[args.device.index or 0] if args.device.type == "cuda" else 1,
                precision="bf16-mixed" if hf.accelerator.mixed_precision == "bf16" else "32-true",
                max_epochs=self.data.total_epochs,
                accumulate_grad_batches=args.gradient_accumulation_steps,
                callbacks=list(self.callbacks),
                # one process, whatever a cluster says
                plugins=LightningEnvironment(),
                default_root_dir=args.output_dir,
                logger=_Reports(hf),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        finally:
            log.setLevel(level)
        self._own_step, self._module = hf.training_step, _Module(hf)
        carrier.state.fn, carrier.training = TrainerFn.FITTING, True
        carrier.strategy.connect(self._module)
        carrier._data_connector.attach_data(self._module, datamodule=self.data)
        self._epochs, self._batches = carrier.fit_loop.epoch_progress, carrier.fit_loop.epoch_loop.batch_progress
        self._optimizer_steps = carrier.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        self._loader = _Batches(self.data, self._batches)

    def _steps(self) -> int:
        given, planned = int(self._hf.args.max_steps), self.data.total_steps
        if given > planned:
            raise ConfigurationError(f"max_steps={given}, but the stream lasts {planned} steps; leave max_steps out.")
        if 0 < given < planned:
            rank_zero_warn(f"max_steps={given} ends before the stream does ({planned} steps).")
        return given if given > 0 else planned

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
        for progress, at in zip((self._epochs, self._batches, self._optimizer_steps), content["at"], strict=True):
            progress.current.ready = progress.current.completed = progress.total.completed = at

    def _run(self, hook: str, *args: Any) -> None:
        call._call_callback_hooks(self._carrier, hook, *args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._module.net.load_state_dict(self._weights, strict=False)
        self._weights = {}
        optimizer = getattr(self._hf.optimizer, "optimizer", self._hf.optimizer)
        self._carrier.optimizers = [optimizer]
        self._carrier.log_every_n_steps = max(int(state.logging_steps), 1)  # type: ignore[attr-defined]
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = [n for n, p in self._module.net.named_parameters() if p.requires_grad and p not in known]
        if missing:
            raise ConfigurationError(
                f"The optimizer does not know {missing[0]}, which a callback added; let the trainer make it, by optim "
                "or optimizer_cls_and_kwargs."
            )
        self._run("on_fit_start")
        self._module.on_fit_start()
        self._run("on_train_start")

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do what Lightning does with a batch, up to the clipping of gradients."""
        batch = to_device(self._carrier, inputs)
        if self._batches.current.ready == 0:
            self._run("on_train_epoch_start")
        self._batches.increment_ready()
        self._batches.is_last_batch = self._batches.current.ready == len(self._loader.epoch)
        index = self._carrier.fit_loop.batch_idx
        self._run("on_train_batch_start", batch, index)
        own = {"compute_loss": lambda model, inputs, **kwargs: self._module.training_step(inputs, index)}
        with _set(self._hf, own):
            loss: Tensor = self._own_step(model, batch)
        if self._hf.accelerator.sync_gradients:
            self._run("on_before_optimizer_step", self._carrier.optimizers[0])
        self._last = {"loss": loss}, batch
        return loss

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._batches.increment_completed()
        self._run("on_train_batch_end", *self._last, self._carrier.fit_loop.batch_idx)
        self._last = None, None

    def on_optimizer_step(self, args: TrainingArguments, *others: Any, **kwargs: Any) -> None:
        # in on_step_end the gradients are gone
        self._optimizer_steps.increment_completed()
        self.on_substep_end()
        if not self.data.has_stepped:
            raise ConfigurationError(
                f"optim={args.optim} does not step after the backward pass, as strategies expect; use another, such "
                "as adamw_torch."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        state.epoch = self._carrier.current_epoch + self._batches.current.completed / len(self._loader.epoch)
        if self._batches.is_last_batch:
            self._run("on_train_epoch_end")
            self._epochs.increment_completed()
            self._batches.reset_on_run()
            # after the last step Hugging Face's own epoch ends
            ends = state.global_step < state.max_steps
            control.should_log |= ends and args.logging_strategy == "epoch"
            control.should_evaluate |= ends and args.eval_strategy == "epoch"
            control.should_save |= ends and args.save_strategy == "epoch"
        if control.should_log and self._module.logged:
            self._carrier.loggers[0].log_metrics(self._module.logged, state.global_step)
            self._module.logged.clear()
        control.should_training_stop |= self._carrier.should_stop
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        content = {
            "callbacks": call._call_callbacks_state_dict(self._carrier),
            "datamodule": self.data.state_dict(),
            "weights": self._unsaved(),
            "at": [self._carrier.current_epoch, self._batches.current.completed, self._carrier.global_step],
            "pytorch-lightning_version": pl.__version__,  # type: ignore[attr-defined]
        }
        call._call_callbacks_on_save_checkpoint(self._carrier, content)
        path = Path(str(args.output_dir), f"checkpoint-{state.global_step}", STATE)
        self._carrier.strategy.checkpoint_io.save_checkpoint(content, path)

    def _unsaved(self) -> dict[str, Tensor]:
        """Return the weights that the files of an adapter lack, or may lack."""
        net = self._module.net
        if not hasattr(net, "peft_config"):
            return {}
        if any(strategy.changes_frozen for strategy in callbacks_of(self._carrier, Strategy)):
            return dict(net.state_dict())
        return {name: parameter.detach() for name, parameter in net.named_parameters() if parameter.requires_grad}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._run("on_train_end")
        self._run("on_fit_end")


class _Module(LanguageModule):
    """The model of a trainer of Hugging Face's, with that trainer's loss."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.model)
        self._hf, self._compute_loss = trainer, trainer.compute_loss
        self.logged: dict[str, float] = {}

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
    """The batches of a stream, one epoch of its plan after another, from where the training is on."""

    def __init__(self, data: StreamDataModule, progress: _BatchProgress) -> None:
        self.data, self.progress = data, progress
        self.epoch: StreamLoader

    def __len__(self) -> int:
        return sum(map(self.data.epoch_batches, range(self.data.total_epochs)))

    def __iter__(self) -> Iterator[Any]:
        while not self.data.is_over:
            self.epoch = self.data.train_dataloader()
            self.epoch.load_state_dict({"next": self.progress.current.completed})
            yield from self.epoch


class _Reports(Logger):
    """What a trainer of Hugging Face's reports to, as a logger of Lightning's."""

    name, version = "hugging_face", ""

    def __init__(self, trainer: Any) -> None:
        self._hf = trainer

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        state = copy.copy(self._hf.state)
        state.global_step = state.global_step if step is None else step
        reporters: Any = tuple(INTEGRATION_TO_CALLBACK.values())
        for callback in self._hf.callback_handler.callbacks:
            if isinstance(callback, reporters):
                callback.on_log(self._hf.args, state, self._hf.control, model=self._hf.model, logs=dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the reporters log the training arguments."""


@contextmanager
def _set(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Give an object other attributes inside the context."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)
