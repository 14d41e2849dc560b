"""Dark experience replay."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from clkit.data.batch import gather_batch
from clkit.data.columns import size_of
from clkit.data.datamodule import stream_data
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.memory.buffer import ReservoirBuffer, draw_replay
from clkit.method.forward import logit_distance, outputs, task_loss, task_loss_and_outputs
from clkit.method.setup_checks import check_memory, check_output
from clkit.method.strategy import Strategy, check_pairs


class DER(Strategy):
    r"""Replay samples together with the logits that the network gave when it saw them first; DER++ with ``beta > 0``.

    .. math:: \mathcal L = \mathcal L(B) + \alpha\, MSE\big(h_\theta(x_{\mathcal M}), z_{\mathcal M}\big)
        + \beta\, \mathcal L(B'_{\mathcal M})

    The logits :math:`z` are those of the training step that saw the sample; both go into the reservoir after that step.
    MSE is the mean over samples and classes. :math:`B'_{\mathcal M}` is a second independent draw with
    ``draws="two"``, as in the authors' code, or the same samples in the same forward with ``draws="one"``, as in
    Avalanche. The replayed samples have forwards of their own, which move BatchNorm's running statistics.

    With several processes every one keeps the same memory, filled from the global batch. Batches must be ``(x, y)`` or
    ``(x, y, task)``; ``forward(x)`` or ``forward(x, task)`` must return a tensor ``[B, ...]``, without classes too.
    Logits masked with the lowest finite number are left out of the mean, and so are those that a head that grows, up to
    the classes of the stream, did not have when a sample was stored.

    Args:
        capacity: Samples in memory, at least 0 (0 is plain finetuning).
        alpha: :math:`\alpha`, weight of the logits, at least 0.
        beta: :math:`\beta`, weight of the labels, at least 0; the paper has 0.5 for DER++.
        batch_size: Samples replayed in a draw and process; as many as the new batch has when ``None``.
        draws: ``"two"`` or ``"one"``.
        seed: Seed of the memory's own random numbers.
        device: Where the memory is kept; beside the batches when ``None``.

    Raises:
        ConfigurationError: If a value is out of range, the stream has other batches, or the outputs are no tensor.

    Reference: Buzzega et al., *Dark Experience for General Continual Learning*, arXiv 2004.07211, equations 6 and 8.
    """

    def __init__(
        self,
        capacity: int = 200,
        *,
        alpha: float = 0.3,
        beta: float = 0.0,
        batch_size: int | None = None,
        draws: Literal["two", "one"] = "two",
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise ConfigurationError(f"{name}={value} is not possible; use 0 or more.")
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        check_choice("draws", draws, ("two", "one"))
        self.buffer = ReservoirBuffer(capacity, seed=seed, device=device)
        self.alpha, self.beta, self.batch_size, self.draws = alpha, beta, batch_size, draws
        self._logits: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_pairs(trainer, "DER", "use another strategy, such as ExperienceReplay")
        check_memory(trainer, self.buffer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_output(trainer, pl_module, "DER", "use ExperienceReplay")
        self._widen_memory(stream_data(trainer).stream.n_classes)
        self.buffer.to(pl_module.device)

    def _widen_memory(self, n_classes: int | None) -> None:
        """Give remembered logits the classes of a stream that has grown."""
        state = self.buffer.state_dict()
        if state["samples"] is not None:
            batch, logits = state["samples"]
            self.buffer.load_state_dict({**state, "samples": (batch, _widened(logits, n_classes))})

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        stream = stream_data(trainer).stream
        self._logits = _widened(outputs(module, *stream.inputs_of(batch)).detach(), stream.n_classes)
        if self.draws == "one" and self.alpha > 0 and self.beta > 0:
            return self._both(trainer, module, batch)
        terms = []
        if self.alpha > 0 and (drawn := self._draw(trainer, module, batch)) is not None:
            replayed, old = drawn
            new = _widened(module(*stream.inputs_of(replayed)), stream.n_classes)
            terms.append(self.alpha * logit_distance(new, old))
        if self.beta > 0 and (drawn := self._draw(trainer, module, batch)) is not None:
            terms.append(self.beta * task_loss(module, drawn[0]))
        return torch.stack(terms).sum() if terms else None

    def _both(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
        drawn = self._draw(trainer, module, batch)
        if drawn is None:
            return None
        replayed, old = drawn
        stream = stream_data(trainer).stream
        loss, new = task_loss_and_outputs(module, replayed, stream.inputs_of(replayed))
        return self.alpha * logit_distance(_widened(new, stream.n_classes), old) + self.beta * loss

    def _draw(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        return move_data_to_device(draw_replay(trainer, self.buffer, batch, self.batch_size), module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._logits is None:
            return
        # other strategies append to the batch
        new, self._logits = self._logits[: size_of(batch)], None
        self.buffer.insert(gather_batch(trainer, (batch, new)))

    def remembered(self) -> Any:
        contents = self.buffer.contents()
        return None if contents is None else contents[0]

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state_dict)


def _widened(logits: Tensor, n_classes: int | None) -> Tensor:
    """Add masked logits of classes that the head does not have yet."""
    missing = 0 if logits.dim() != 2 or n_classes is None else max(n_classes - logits.shape[1], 0)
    return pad(logits, (0, missing), value=torch.finfo(logits.dtype).min) if missing else logits
