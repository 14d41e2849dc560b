"""An image classifier for those who bring only a network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from clkit.data.columns import describe
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice
from clkit.method.adapters import add_adapter
from clkit.method.learning_rate import LearningRate
from clkit.method.setup_checks import check_output
from clkit.method.strategy import check_pairs
from clkit.models.growing_head import grow, output_layer
from clkit.models.networks import Network, build_network

if TYPE_CHECKING:
    from peft import PeftConfig

Loss = Literal["ce", "ce_masked", "bce"]
BceClasses = Literal["experience", "seen"]
_SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Classifier(pl.LightningModule):
    r"""A network with a classification loss, accuracy and an optimizer.

    Batches are ``(x, y)`` or ``(x, y, task)``, ``y`` and ``task`` ``int64`` of shape ``[B]``. All classes have their
    output from the start, unless the head grows. The classes of each task, and the classes seen so far, come from the
    stream of the trainer's datamodule and are part of the checkpoint.

    With logits :math:`z` and labels :math:`y`, the loss is the mean over samples of

    - ``"ce"``: cross-entropy, :math:`-\log \mathrm{softmax}(z)_y`;
    - ``"ce_masked"``: the same with the softmax over the current experience's classes only, so that old classes'
      outputs get no gradient;
    - ``"bce"``: :math:`-\sum_c [c = y] \log \sigma(z_c) + [c \ne y] \log(1 - \sigma(z_c))` over the classes of
      ``bce_classes``. A strategy that distils old classes, such as ``LwF(form="bce")``, goes with the current ones.

    The last two take every class before a stream is known. A replayed sample's own class always takes part, beside the
    current ones.

    Logs ``train_loss``, ``val_loss``, ``val_acc`` and ``test_acc``.

    Args:
        net: A module that maps ``x`` to logits ``[B, n_classes]``; or a callable or a name of timm or torchvision, see
            :func:`~clkit.models.networks.build_network`.
        n_classes: Number of outputs; needed unless ``net`` is a module.
        input_shape: Shape of one input; needed unless ``net`` is a module.
        optimizer: Makes the optimizer from the trainable parameters; SGD with learning rate 0.1 by default.
        scheduler: A :class:`~clkit.method.learning_rate.LearningRate`, stepped after every optimizer step; or a
            callable that makes a scheduler from the optimizer, stepped once per epoch.
        mask_unseen: Leave the classes of experiences that have not started out of the softmax.
        adapter: A configuration of peft, such as :func:`~clkit.method.adapters.lora` makes: everything but the adapter
            and its ``modules_to_save`` is frozen. Needs ``pip install clkit[lora]``.
        loss: ``"ce"``, ``"ce_masked"`` or ``"bce"``.
        bce_classes: Classes that ``"bce"`` sums over: those of the current ``"experience"``, or all ``"seen"``.
        growing: Begin with outputs for the classes of the first experience, and add those of each experience when it
            starts: nothing depends on how many will come. ``net`` is built with one output, whatever ``n_classes``;
            its last linear layer grows. In one process, and in a stream without tasks. Strategies that need all
            outputs from the start (penalties on weights without ``only``, ``Joint``, ``GDumb``, weights by the task)
            refuse it.

    Attributes:
        grows: Whether the head grows.

    Raises:
        ConfigurationError: If ``net`` must be built and ``n_classes`` or ``input_shape`` is missing, or a loss is
            unknown.

    Example:
        >>> from clkit.models.networks import MLP
        >>> module = Classifier(MLP((1, 8, 8), 10))
        >>> module(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    seen: Tensor
    current: Tensor
    task_classes: Tensor

    def __init__(
        self,
        net: Network,
        n_classes: int | None = None,
        input_shape: Sequence[int] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = _SGD,
        scheduler: LearningRate | Callable[[torch.optim.Optimizer], Any] | None = None,
        mask_unseen: bool = False,
        adapter: PeftConfig | None = None,
        loss: Loss = "ce",
        bce_classes: BceClasses = "experience",
        growing: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("loss", loss, Loss), ("bce_classes", bce_classes, BceClasses)):
            check_choice(name, value, get_args(known))
        self.grows = growing
        if growing:
            n_classes = 1 if not isinstance(net, nn.Module) else None
        if not isinstance(net, nn.Module):
            if n_classes is None or input_shape is None:
                raise ConfigurationError(
                    f"net={net!r} must be built, but n_classes={n_classes} and input_shape={input_shape}; give both "
                    "(stream.n_classes and stream.input_shape), or pass a finished module."
                )
            net = build_network(net, tuple(input_shape), n_classes)
        self.net = net if adapter is None else add_adapter(net, adapter)
        self.n_classes = None if growing else n_classes
        if growing:
            n_classes = output_layer(self.net).out_features
        self.optimizer, self.scheduler, self.mask_unseen = optimizer, scheduler, mask_unseen
        self.loss, self.bce_classes = loss, bce_classes
        # what the third part of a batch is: a stream tells
        self._takes_task = True
        self.register_buffer("seen", torch.ones(n_classes or 0, dtype=torch.bool))
        self.register_buffer("current", self.seen.clone())
        self.register_buffer("task_classes", torch.ones(0, n_classes or 0, dtype=torch.bool))

    def forward(self, x: Tensor, task: Tensor | None = None) -> Tensor:
        """Return logits ``[B, n_classes]``; those of masked classes are the lowest finite number of their dtype.

        Args:
            x: Inputs, ``[B, *input_shape]``.
            task: Task label of each sample, ``int64``, shape ``[B]``: masks the classes outside its task.

        Raises:
            ConfigurationError: If ``task`` is given and the classifier has not learned from a stream with tasks.
        """
        logits: Tensor = self.net(x)
        if self.mask_unseen and len(self.seen):
            logits = _masked(logits, self.seen)
        if task is not None:
            if not len(self.task_classes):
                raise ConfigurationError(
                    "The batch has task labels, but the classifier knows no task's classes; fit it on a "
                    "task-incremental stream, load a checkpoint of such a fit, or leave task out."
                )
            logits = _masked(logits, self.task_classes[task])
        return logits

    def setup(self, stage: str) -> None:
        """Read the classes of the stream.

        Raises:
            ConfigurationError: If the stream's samples have no classes, or more than the network has outputs.
        """
        data = getattr(self.trainer, "datamodule", None)
        stream = getattr(data, "stream", None)
        if data is None or stream is None:
            return
        if stage == "fit":
            check_pairs(self.trainer, type(self).__name__, "use a LightningModule of your own")
        if stream.n_classes is None:
            raise ConfigurationError(
                f"{type(self).__name__} learns classes, but stream {stream.name!r} has none; use a LightningModule of "
                "your own, with a loss for its targets."
            )
        self._takes_task = stream.kind == "task-incremental"
        if self.grows:
            self._start_growing(stream)
            if stage == "fit":
                self._see(data)
            return
        n_classes = stream.n_classes if self.n_classes is None else self.n_classes
        if stream.n_classes > n_classes:
            raise ConfigurationError(
                f"The stream has {stream.n_classes} classes, but n_classes={n_classes}; build the classifier with "
                "n_classes=stream.n_classes."
            )
        tasks = {experience.task for experience in stream if experience.task is not None}
        table = torch.zeros(max(tasks, default=-1) + 1, n_classes, dtype=torch.bool)
        for experience in stream:
            if experience.task is not None:
                table[experience.task, list(experience.classes)] = True
        self.task_classes = table.to(self.device)
        if len(self.seen) != n_classes:
            self.seen = torch.ones(n_classes, dtype=torch.bool, device=self.device)
            self.current = self.seen.clone()
        if stage == "fit":
            self._see(data)

    def _start_growing(self, stream: Any) -> None:
        if self._takes_task:
            raise ConfigurationError(
                "A growing head is for streams without tasks; in a task-incremental one use growing=False "
                "(model.growing=false)."
            )
        if self.trainer.world_size > 1:
            raise ConfigurationError(
                f"A growing head trains in one process, and there are {self.trainer.world_size}; use devices=1, or "
                "growing=False."
            )
        self._grow(1 + max(stream[0].classes))

    def _grow(self, n: int, trainer: pl.Trainer | None = None) -> None:
        """Have at least so many outputs."""
        layer = output_layer(self.net)
        grow(layer, n, trainer)
        missing = layer.out_features - len(self.seen)
        if missing > 0:
            self.seen, self.current = (F.pad(table, (0, missing)) for table in (self.seen, self.current))

    def on_experience_enter(self, trainer: pl.Trainer, experience: Experience) -> None:
        """Grow for the classes of an experience; called before all hooks of its start."""
        if self.grows and experience.classes:
            self._grow(1 + max(experience.classes), trainer)

    def on_fit_start(self) -> None:
        """Try the network once.

        Raises:
            ConfigurationError: If it has fewer outputs than there are classes, or others than are masked.
        """
        data = getattr(self.trainer, "datamodule", None)
        n_classes = len(self.seen)
        if not hasattr(data, "stream") or not n_classes:
            return
        name = type(self.net).__name__
        logits = check_output(self.trainer, self, name, "use another net", self.net)
        masks = self.mask_unseen or self.loss != "ce" or self._takes_task
        if logits.dim() != 2 or logits.shape[1] < n_classes or (masks and logits.shape[1] > n_classes):
            raise ConfigurationError(
                f"{name} returns {describe(logits)} for {len(logits)} samples, and a classifier of {n_classes} classes "
                f"needs [B, {n_classes}]; build it with {n_classes} outputs."
            )

    def on_train_epoch_start(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "stream") and len(self.seen):
            self._see(data)

    def _see(self, data: Any) -> None:
        for table, classes in (
            (self.seen, data.stream.classes_seen(data.experience.index)),
            (self.current, data.experience.classes),
        ):
            table.zero_()
            table[list(classes)] = True

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(logits, y)
        own = y[:, None] == torch.arange(logits.shape[1], device=y.device)
        classes = self.seen if self.loss == "bce" and self.bce_classes == "seen" else self.current
        allowed = own | classes if len(classes) else torch.ones_like(own)
        if self.loss == "ce_masked":
            return F.cross_entropy(_masked(logits, allowed), y)
        each = F.binary_cross_entropy_with_logits(logits, own.to(logits.dtype), reduction="none")
        return torch.where(allowed, each, 0).sum(dim=1).mean()

    def _parts(self, batch: Any) -> Any:
        """Return ``x``, ``y`` and, where the stream has tasks, ``task``; what else a batch holds is not used."""
        return batch[: 3 if self._takes_task else 2]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, *task = self._parts(batch)
        loss = self._loss(self(x, *task), y)
        self.log("train_loss", loss, batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, *task = self._parts(batch)
        logits = self(x, *task)
        self.log("val_loss", self._loss(logits, y), batch_size=len(y))
        self.log("val_acc", _accuracy(logits, y), batch_size=len(y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y, *task = self._parts(batch)
        self.log("test_acc", _accuracy(self(x, *task), y), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ConfigurationError(
                f"No parameter of {type(self.net).__name__} has requires_grad=True, so there is nothing to train; "
                "unfreeze some of them before the fit."
            )
        try:
            optimizer = self.optimizer(parameters)
            if isinstance(self.scheduler, LearningRate):
                return self.scheduler.configured(self, optimizer)
            return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])
        except ConfigurationError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"The optimizer or its schedule refuses its settings: {error}.") from error

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.grows and prefix + "seen" in state_dict:
            self._grow(len(state_dict[prefix + "seen"]))
        for name in ("seen", "current", "task_classes"):
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name], device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _masked(logits: Tensor, allowed: Tensor) -> Tensor:
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return multiclass_accuracy(logits, y, num_classes=logits.shape[-1], average="micro", validate_args=False)
