"""The head's new rows alone first."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data.batch import concatenate
from clkit.data.columns import size_of, take
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.method.evaluation_mode import moving_statistics
from clkit.method.head import check_head, check_rows, features, head_of, labels, new_classes
from clkit.method.setup_checks import check_rows_in_time
from clkit.method.strategy import Strategy, memory_before, random_samples
from clkit.rng import private_rng


class HeadWarmup(Strategy):
    r"""Train the head's rows of an experience's new classes alone, before its first step.

    Steps of plain SGD on the cross-entropy, with all other weights frozen. With ``over="seen"`` all classes so far
    compete, and the samples are those of the experience and of the memory that a strategy before it has, each source
    half of a batch; with ``over="new"``, as published, the new classes alone, on their data. In the first experience,
    and where there are no new classes, nothing happens.

    With ``batch_norm="frozen"`` the features stay as they are, and are computed once, in evaluation mode. With
    ``"moving"``, the published code's default, BatchNorm layers in training mode normalise each batch by its own
    statistics, and their running ones follow: old classes' scores change during the warm-up, and each step costs a
    forward of its batch. Without such layers both are the same.

    These steps are none of the stream's: schedules and evaluations do not count them. ``extra_updates`` does, also in
    ``metrics.json``.

    Args:
        steps: Steps at an experience's start, at least 0.
        lr: Their learning rate.
        batch_size: Samples of a step, drawn with replacement.
        over: ``"seen"`` or ``"new"``.
        batch_norm: ``"frozen"`` or ``"moving"``.
        samples: Training samples of the experience that are read; all when ``None``.
        seed: Seed of the draws.

    Raises:
        ConfigurationError: If a value is out of range, the logits are not those of a linear layer, or the head has no
            row for a class when it comes.

    Reference: the code of Łapacz et al., *Exploring the Stability Gap in Continual Learning: The Role of the
    Classification Head*, arXiv 2411.04723.
    """

    reads_batch = False

    def __init__(
        self,
        steps: int = 100,
        *,
        lr: float = 0.1,
        batch_size: int = 128,
        over: Literal["seen", "new"] = "seen",
        batch_norm: Literal["frozen", "moving"] = "frozen",
        samples: int | None = 1000,
        seed: int = 0,
    ) -> None:
        check_whole("steps", steps, 0)
        check_whole("batch_size", batch_size, 1)
        if samples is not None:
            check_whole("samples", samples, 1)
        if lr <= 0:
            raise ConfigurationError(f"lr={lr} is not possible; use a number above 0.")
        check_choice("over", over, ("seen", "new"))
        check_choice("batch_norm", batch_norm, ("frozen", "moving"))
        if batch_norm == "moving" and batch_size == 1:
            raise ConfigurationError("batch_norm='moving' needs batches with a variance; use batch_size=2 or more.")
        self.steps, self.lr, self.batch_size, self.over, self.batch_norm = steps, lr, batch_size, over, batch_norm
        self.samples, self.seed = samples, seed

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_head(trainer, pl_module, "HeadWarmup")
        check_rows_in_time(trainer, pl_module, "HeadWarmup")

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        new = new_classes(trainer, experience)
        if self.steps == 0 or experience.index == 0 or not new:
            return
        head, n = head_of(module), self.samples or len(experience.train)  # type: ignore[arg-type]
        check_rows(head, new, "HeadWarmup")
        memory = memory_before(trainer, self) if self.over == "seen" else None
        batches = [random_samples(trainer, experience, n, self.seed), None if memory is None else memory.remembered()]
        sources = [part for part in batches if part is not None]
        if self.batch_norm == "frozen":
            sources = [(features(module, part), labels(module, part)) for part in sources]
        competing = new if self.over == "new" else sorted(stream_data(trainer).stream.classes_seen(experience.index))
        rng = private_rng(self.seed, 60, experience.index)
        share = -(-self.batch_size // len(sources))
        for _ in range(self.steps):
            rows = [torch.from_numpy(rng.integers(size_of(part), size=share)) for part in sources]
            batch = concatenate([take(part, chosen) for part, chosen in zip(sources, rows, strict=True)])
            if self.batch_norm == "moving":
                batch = features(module, batch, moving_statistics), labels(module, batch)
            x, y = batch
            step(head, x, y, new, competing, self.lr)
        self.extra_updates += self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"extra_updates": self.extra_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.extra_updates = state_dict["extra_updates"]


def step(head: nn.Linear, x: Tensor, y: Tensor, new: list[int], competing: list[int], lr: float) -> None:
    """Take one step of SGD on the head's rows of the new classes alone.

    Args:
        head: The head, which is changed.
        x: Features, ``[B, d]``.
        y: Classes, ``int64`` ``[B]``, all of which compete.
        new: Classes whose rows are trained.
        competing: Classes in the softmax.
        lr: Learning rate.
    """
    own = [head.weight] if head.bias is None else [head.weight, head.bias]
    with torch.enable_grad():
        copies = [parameter.detach().float().requires_grad_() for parameter in own]
        logits = F.linear(x, *copies)
        left_out = torch.ones(logits.shape[1], dtype=torch.bool, device=x.device)
        left_out[competing] = False
        loss = F.cross_entropy(logits.masked_fill(left_out, -torch.inf), y)
        gradients = torch.autograd.grad(loss, copies)
    with torch.no_grad():
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter[new] -= (lr * gradient[new]).to(parameter)
