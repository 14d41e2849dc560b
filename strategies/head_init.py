"""First rows of the head for new classes, from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.data.batch import gather_batch
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.method.head import (
    check_head,
    check_rows,
    class_means,
    class_sums,
    features,
    head_of,
    labels,
    names_of,
    new_classes,
)
from clkit.method.setup_checks import check_rows_in_time
from clkit.method.strategy import Strategy, memory_before, random_samples

Method = Literal["mean", "least_squares"]


class HeadInit(Strategy):
    r"""Set the rows of the head for an experience's new classes from their data, before its first step.

    With features :math:`\phi` in evaluation mode, of training samples of the new classes (and, for least squares, of
    the memory that a strategy before it has):

    - ``"mean"``: :math:`w_c = \frac1{n_c} \sum_{y=c} \phi / \lVert\phi\rVert`;
    - ``"least_squares"``: :math:`w_c = \frac1C \big(\Sigma + \lambda I\big)^{-1} m_c`, where :math:`m_c` is the mean of
      the class's :math:`\phi`, and :math:`\Sigma` that of :math:`\phi\phi^\top`, each of the C classes there weighing
      the same: ridge regression on one-hot targets.

    Old rows stay as they are, bit for bit; the optimizer's state of the new ones is set to 0. In the first experience,
    and where there are no new classes, nothing happens.

    A task-free stream has no experiences that a method could know of: there a class's row is set from its samples in
    the first batch that holds some, before that step. The rows of the classes of the very first batch stay.

    Args:
        method: ``"mean"`` or ``"least_squares"``.
        match_norm: Scale the new rows to the mean norm of the old ones, and give them their mean bias.
        ridge: :math:`\lambda`, above 0. Published: 0.05.
        samples: Training samples of the experience that are read; all when ``None``. Of no effect in task-free streams.
        seed: Seed of the choice of samples.

    Raises:
        ConfigurationError: If a value is out of range, the logits are not those of a linear layer, or the head has no
            row for a class when it comes.

    Reference: class means: Harun and Kanan, *Overcoming the Stability Gap in Continual Learning*, arXiv 2306.01904;
    least squares: Harun and Kanan, *A Good Start Matters: Enhancing Continual Learning with Data-Driven Weight
    Initialization*, arXiv 2503.06385.
    """

    reads_batch = False

    def __init__(
        self,
        method: Method = "mean",
        *,
        match_norm: bool = True,
        ridge: float = 0.05,
        samples: int | None = 1000,
        seed: int = 0,
    ) -> None:
        check_choice("method", method, get_args(Method))
        if ridge <= 0:
            raise ConfigurationError(f"ridge={ridge} is not possible; use a number above 0, such as 0.05.")
        if samples is not None:
            check_whole("samples", samples, 1)
        self.method, self.match_norm, self.ridge = method, match_norm, ridge
        self.samples, self.seed = samples, seed
        self.known = torch.zeros(0, dtype=torch.bool)
        self._at_sight = self._looks = False

    def leaves_first(self, stream: Stream) -> bool:
        return stream.kind != "task-free"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._at_sight = self.reads_batch = stream_data(trainer).stream.kind == "task-free"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_head(trainer, pl_module, "HeadInit")
        check_rows_in_time(trainer, pl_module, "HeadInit")
        self.known = self.known.to(pl_module.device)
        self._looks = self._at_sight

    @torch.no_grad()
    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        head = head_of(module)
        check_rows(head, experience.classes, "HeadInit")
        new = new_classes(trainer, experience)
        if self._at_sight or experience.index == 0 or not new:
            return
        batch = random_samples(trainer, experience, self.samples or len(experience.train), self.seed)  # type: ignore[arg-type]
        earlier = stream_data(trainer).stream.classes_seen(experience.index - 1)
        self._set(trainer, module, batch, _mask(head, new), _mask(head, earlier))

    @torch.no_grad()
    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        if not self._looks:
            return batch
        head = head_of(module)
        self.known = F.pad(self.known, (0, head.out_features - len(self.known)))
        counts = torch.bincount(labels(module, batch), minlength=head.out_features)
        new = (sum_over_processes(trainer, counts) > 0) & ~self.known
        if new.any():
            if self.known.any():
                self._set(trainer, module, gather_batch(trainer, batch), new, self.known)
                # under autocast the step shall cast the rows anew, and with a gradient
                torch.clear_autocast_cache()
            self.known = self.known | new
        classes = {label for experience in stream_data(trainer).stream for label in experience.classes}
        # once all have come there is no need to look, which waits for the device
        self._looks = len(self.known) <= max(classes) or not bool(self.known[list(classes)].all())
        return batch

    def _set(self, trainer: Trainer, module: LightningModule, batch: Any, new: Tensor, old: Tensor) -> None:
        """Set the rows of new classes of which a batch has samples; both are ``bool`` ``[C]``."""
        head = head_of(module)
        found, y = features(module, batch), labels(module, batch)
        if self.method == "mean":
            rows, _ = class_means(found, y, head.out_features)
        else:
            memory = memory_before(trainer, self)
            remembered = None if memory is None else memory.remembered()
            if remembered is not None:
                found = torch.cat([found, features(module, remembered)])
                y = torch.cat([y, labels(module, remembered)])
            rows = least_squares(found, y, head.out_features, self.ridge)
        there = new & (torch.bincount(y, minlength=head.out_features) > 0)
        values = {"weight": matched(rows, head.weight[old].norm(dim=1).mean()) if self.match_norm else rows}
        if self.match_norm and head.bias is not None:
            values["bias"] = head.bias[old].mean().expand_as(head.bias)
        for own in values.keys() & names_of(module, head).keys():
            parameter = getattr(head, own)
            parameter[there] = values[own][there].to(parameter)
            _forget_rows(trainer, parameter, there)

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.known = state_dict["known"]


def least_squares(values: Tensor, y: Tensor, n_classes: int, ridge: float) -> Tensor:
    r"""Return the rows :math:`\frac1C (\Sigma + \lambda I)^{-1} m_c`, ``[C, d]``, of classes that weigh the same.

    Args:
        values: Features, ``[N, d]``.
        y: Classes, ``int64`` ``[N]``.
        n_classes: Number of rows; those of a class without samples are 0, and it is not among the C.
        ridge: :math:`\lambda`.
    """
    sums, counts = class_sums(values, y, n_classes)
    there = counts > 0
    share = torch.where(there, 1 / (counts.clamp(min=1) * there.sum()), 0.0)
    second = values.T @ (values * share[y, None])
    system = second + ridge * torch.eye(values.shape[1]).to(values)
    # not cholesky, which raises where a run has diverged
    factor, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve((sums * share[:, None]).T, factor).T


def matched(rows: Tensor, norm: Tensor) -> Tensor:
    """Return rows ``[C, d]`` of the norm given; a row of zeros stays."""
    return torch.nn.functional.normalize(rows, dim=1) * norm


def _forget_rows(trainer: Trainer, parameter: Tensor, rows: Tensor) -> None:
    state: dict[str, Any]
    for optimizer in trainer.optimizers:
        state = optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[rows] = 0


def _mask(head: nn.Linear, classes: Iterable[int]) -> Tensor:
    """Return which of the head's rows are those of some classes, ``bool`` ``[C]``."""
    mask = torch.zeros(head.out_features, dtype=torch.bool, device=head.weight.device)
    mask[list(classes)] = True
    return mask
