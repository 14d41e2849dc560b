"""Which gradient moves the weights: that of the new data, or that of what holds the old knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim import Optimizer

from clkit.data.columns import sent, size_of
from clkit.data.datamodule import stream_data
from clkit.errors import ConfigurationError, check_whole
from clkit.files import result_folder, write_atomically
from clkit.method.forward import frozen_statistics
from clkit.method.gradient import flatten, loss_gradient, with_gradient
from clkit.method.strategy import Strategy

_COLUMNS = ("step", "experience", "total", "plasticity", "stability", "cosine")


class GradientNorms(Strategy):
    r"""Splits the gradient of each step into a plasticity and a stability part and records their norms.

    .. math:: \nabla\mathcal L = w\,\nabla\mathcal L_{plasticity} + (1 - w)\,\nabla\mathcal L_{stability}

    The plasticity gradient is that of the module's own loss on the new batch, computed by one more forward and backward
    pass in training mode (with other dropout masks, if there are any). :math:`w` is the new samples' share of the batch
    that the strategies made of it, so for replay the stability gradient is that of the replayed samples. Where nothing
    is replayed :math:`w = 1`, and it is what strategies added: a penalty's gradient, or what a projection took away.

    Put it after the strategies. Writes ``gradients.csv`` and logs ``gradient/total``, ``gradient/plasticity``,
    ``gradient/stability`` (norms over all trainable parameters, before clipping) and ``gradient/cosine`` (of the angle
    between the latter two).

    Args:
        every: Optimizer steps between two records; the first step of the run is recorded.
        weight: :math:`w`, for strategies that weigh losses in another way (``ExperienceReplay(alpha=...)``: its alpha).
        dir: Folder of the file; the trainer's log or root folder when ``None``.

    Raises:
        ConfigurationError: If a value is out of range, gradients are accumulated, or the module optimizes manually.

    Reference: De Lange et al., *Continual evaluation for lifelong learning*, arXiv 2205.13452, section 5.
    """

    def __init__(self, every: int = 1, *, weight: float | None = None, dir: str | Path | None = None) -> None:
        check_whole("every", every, 1)
        if weight is not None and not 0 < weight <= 1:
            raise ConfigurationError(f"weight={weight} is not possible; use a number above 0 and at most 1, or null.")
        self.every, self.weight = every, weight
        self._own_dir = None if dir is None else Path(dir)
        self._rows: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._dir = result_folder(trainer, self._own_dir)
        if trainer.accumulate_grad_batches > 1 or not pl_module.automatic_optimization:
            raise ConfigurationError(
                "GradientNorms needs one batch for each optimizer step and automatic optimization; set "
                "accumulate_grad_batches=1, or leave it out."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._new = batch
        self._share = 1.0

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        self._share = size_of(self._new) / size_of(batch)
        return batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        data = stream_data(trainer)
        if data.step % self.every:
            return
        params = with_gradient(pl_module)
        if not params:
            return
        with isolate_rng(), frozen_statistics(pl_module):
            plasticity = loss_gradient(trainer, pl_module, params, self._new)
        total = flatten(p.grad for p in params)
        weight = self._share if self.weight is None else self.weight
        stability = (total - weight * plasticity) / (1 - weight) if weight < 1 else total - plasticity
        norms = [vector.norm() for vector in (total, plasticity, stability)]
        cosine = plasticity @ stability / (norms[1] * norms[2])
        where = torch.tensor([data.step + 1, data.experience.index], dtype=torch.float64)
        row = torch.stack([*norms, cosine]).double()
        self._rows.append(torch.cat([sent(where, row.device), row]))
        names = (f"gradient/{name}" for name in _COLUMNS[2:])
        pl_module.log_dict(dict(zip(names, row.unbind(), strict=True)), batch_size=1)

    @property
    def table(self) -> Tensor:
        """All records, float64 ``[R, 6]``: step, experience, the three norms, cosine."""
        return torch.stack(self._rows).cpu() if self._rows else torch.empty(0, len(_COLUMNS), dtype=torch.float64)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        lines = [",".join(_COLUMNS)]
        lines += [f"{int(step)},{int(k)},{','.join(map(repr, rest))}" for step, k, *rest in self.table.tolist()]
        write_atomically(self._dir / "gradients.csv", "\n".join(lines) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.table}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = list(state_dict["rows"])
