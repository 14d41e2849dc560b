"""The head's new rows alone first."""

from __future__ import annotations

from typing import Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.method.head import check_head, features, head_of, labels, new_classes
from clkit.method.setup_checks import check_whole_head
from clkit.method.strategy import Strategy, memory_before, random_samples
from clkit.rng import private_rng


class HeadWarmup(Strategy):
    r"""Train the head's rows of an experience's new classes alone, before its first step.

    Steps of plain SGD on the cross-entropy, with everything else frozen, BatchNorm's statistics too. Since the features
    then stay as they are, they are computed once, in evaluation mode. With ``over="seen"`` all classes so far compete,
    and the samples are those of the experience and of the memory that a strategy before it has, each source half of a
    batch; with ``over="new"``, as published, the new classes alone, on their data. In the first experience, and where
    there are no new classes, nothing happens.

    These steps are none of the stream's: schedules and evaluations do not count them.

    Args:
        steps: Steps at an experience's start, at least 0.
        lr: Their learning rate.
        batch_size: Samples of a step, drawn with replacement.
        over: ``"seen"`` or ``"new"``.
        samples: Training samples of the experience that are read; all when ``None``.
        seed: Seed of the draws.

    Raises:
        ConfigurationError: If a value is out of range, the logits are not those of a linear layer, or the head
            has fewer of them than the stream has classes.

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
        self.steps, self.lr, self.batch_size, self.over = steps, lr, batch_size, over
        self.samples, self.seed = samples, seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_head(trainer, pl_module, "HeadWarmup")
        check_whole_head(trainer, pl_module, "HeadWarmup")

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        new = new_classes(trainer, experience)
        if self.steps == 0 or experience.index == 0 or not new:
            return
        head, n = head_of(module), self.samples or len(experience.train)  # type: ignore[arg-type]
        memory = memory_before(trainer, self) if self.over == "seen" else None
        batches = [random_samples(trainer, experience, n, self.seed), None if memory is None else memory.remembered()]
        sources = [(features(module, part), labels(module, part)) for part in batches if part is not None]
        competing = new if self.over == "new" else sorted(stream_data(trainer).stream.classes_seen(experience.index))
        rng = private_rng(self.seed, 60, experience.index)
        share = -(-self.batch_size // len(sources))
        for _ in range(self.steps):
            drawn = []
            for values, y in sources:
                rows = torch.from_numpy(rng.integers(len(y), size=share)).to(y.device)
                drawn.append((values[rows], y[rows]))
            x, y = (torch.cat(part) for part in zip(*drawn, strict=True))
            step(head, x, y, new, competing, self.lr)


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
