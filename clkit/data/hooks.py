"""What a callback may do at the boundaries of experiences, and in the module's training step."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, overload

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from clkit.data.fresh_start import FreshStart
from clkit.data.stream import Experience, Stream

T = TypeVar("T")
AT_END = ("replaces", "trains", "reads")


class Hooks(FreshStart):
    """Lightning's callback with four more hooks; those that a class does not override cost nothing.

    Attributes:
        at_end: What :meth:`on_experience_end` does with the weights: it ``"replaces"`` them, ``"trains"`` them on, or
            ``"reads"`` them at most. It runs in this order, so that what is remembered is what the next experience
            starts from; those of one kind run in the order of the trainer's callbacks.
        appends_samples: Whether :meth:`transform_batch` appends samples to every batch but the first.
        reads_batch: Whether the hooks look at batches. Where one does, ``training_step`` works on a copy, so that they
            see what the stream gave.
        needs_start: Whether it remembers what the module was before the first experience, so that it cannot begin
            later.
    """

    at_end: Literal["replaces", "trains", "reads"] = "reads"
    appends_samples = False
    reads_batch = True
    needs_start = False

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        """Called before the first batch of an experience."""

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        """Called after the last optimizer step of an experience, before the full evaluation."""

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        """Return the batch that the module's ``training_step`` shall see; ``on_train_batch_end`` still gets the old.

        Samples are appended: the new ones stay first, where other strategies look for them.
        """
        return batch

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        r"""Return a scalar to add to the loss, or ``None``.

        Args:
            trainer: The running trainer.
            module: The module in training.
            batch: The batch after all :meth:`transform_batch`, as it was before ``training_step``.
            loss: The loss that ``training_step`` returned, a scalar with its graph. It makes weighted sums possible:
                :math:`\\alpha L + (1-\\alpha) L_m` is the term :math:`(1-\\alpha)(L_m - L)`.
        """
        return None

    def leaves_first(self, stream: Stream) -> bool:
        """Tell whether the first experience of a stream is learned, and evaluated, as it is without this callback.

        All that it remembers of it must then be made by :meth:`on_experience_end`, from the weights and the data: where
        a fit goes on from the end of a first experience that others have learned (``share_first=true``,
        ``from=RUN@0``), that hook is called before the next experience, and the callback is where it would have been.
        """
        return False


def overrides(hooks: Hooks, name: str) -> bool:
    """Tell whether a class has a hook of its own."""
    return getattr(type(hooks), name) is not getattr(Hooks, name)


@overload
def callbacks_of(trainer: Trainer) -> list[Callback]: ...
@overload
def callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]: ...
def callbacks_of(trainer: Trainer, kind: type[Any] = Callback) -> list[Any]:
    """Return the trainer's callbacks of a class, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
