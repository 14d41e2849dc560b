"""O-LoRA: learn each experience in directions that earlier ones did not use."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from clkit.errors import ConfigurationError, check_choice
from clkit.method.adapters import AdapterPerExperience


class OLoRA(AdapterPerExperience):
    r"""Give each experience a new adapter, whose ``A`` is pushed out of the row spaces of all earlier ones.

    Earlier adapters stay as they were: each is merged into the weights after its experience, :math:`W \leftarrow W +
    s B_t A_t`, and its :math:`A_t` is kept. From the second experience on

    .. math:: \mathcal L = \mathcal L_{task} + \lambda_1 \sum_\ell \sum_{i<t} L_{orth}(A_i^\ell, A_t^\ell)
        + \lambda_2 \sum_\ell (\|A_t^\ell\| + \|B_t^\ell\|), \qquad
        L_{orth}(A_i, A_t) = \sum_{j,k} |(A_i A_t^\top)_{jk}|^2

    The penalty depends on the weights alone, so its gradient is computed in closed form, in float32, and added once per
    optimizer step, before clipping.

    The module must hold plain LoRA adapters of peft; those in training are penalised. Modules that are trained as a
    whole (``modules_to_save``) are not. Logged: ``olora/overlap``, the sum of :math:`L_{orth}`. The state holds every
    :math:`A_i` in float32: 4 bytes, times rank, times inputs, for each layer and experience.

    Args:
        strength: :math:`\lambda_1`, at least 0; published: 0.5, and 5 for the last of 15 tasks, in the absolute form.
        l2: :math:`\lambda_2`, at least 0; published: from 0 to 0.3 between tasks.
        form: ``"square"`` as in the paper; its gradient vanishes with the overlap. ``"absolute"``,
            :math:`|(A_i A_t^\top)_{jk}|`, as in the authors' code: its gradient does not, so that ``A`` goes to and fro
            around orthogonality in steps of the learning rate.
        seed: Seed of the new adapters.

    Raises:
        ConfigurationError: If a value is out of range, or the module has no plain LoRA adapter.

    Reference: Wang et al., *Orthogonal Subspace Learning for Language Model Continual Learning*, arXiv 2310.14152.
    """

    def __init__(
        self,
        strength: float = 0.5,
        *,
        l2: float = 0.0,
        form: Literal["square", "absolute"] = "square",
        seed: int = 0,
    ) -> None:
        if strength < 0 or l2 < 0:
            raise ConfigurationError(f"strength={strength} and l2={l2} are not possible; use 0 or more.")
        check_choice("form", form, ("square", "absolute"))
        super().__init__(seed)
        self.strength, self.l2, self.form = strength, l2, form
        self.subspaces: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.subspaces = {name: rows.to(pl_module.device) for name, rows in self.subspaces.items()}
        for entry in self.layers:
            n = entry.factors[1].shape[1]
            rows = self.subspaces.get(entry.name)
            if rows is not None and rows.shape[1] != n:
                raise ConfigurationError(
                    f"OLoRA remembers {rows.shape[1]} inputs of {entry.name}, which has {n} now; keep the network the "
                    "same over the stream."
                )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.subspaces or self.strength == self.l2 == 0:
            return
        values = []
        for entry in self.layers:
            if entry.name in self.subspaces:
                b, a = entry.weights
                value, gradient = overlap(self.subspaces[entry.name], entry.factors[1].float(), self.form)
                values.append(value)
                _add(a, gradient, self.strength)
                for parameter in (b, a):
                    _add(parameter, normalize(parameter.flatten().float(), dim=0), self.l2)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("olora/overlap", torch.stack(values).sum(), batch_size=1)

    def remember(self, index: int) -> None:
        for entry in self.layers:
            a = entry.factors[1].float()
            # Lightning has taken the module off the GPU when a fit ends
            rows = torch.cat([self.subspaces.get(entry.name, a[:0]).to(a.device), a])
            self.subspaces[entry.name] = rows
            if len(rows) + len(a) > rows.shape[1]:
                rank_zero_warn(
                    f"OLoRA has used {len(rows)} of the {rows.shape[1]} directions of {entry.name}: the rest is too "
                    "small for another adapter. Use a smaller rank."
                )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "subspaces": self.subspaces}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.subspaces = dict(state_dict["subspaces"])


def overlap(rows: Tensor, a: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Return the sum of :math:`L_{orth}`, and its gradient by ``a``.

    Args:
        rows: The earlier ``A``, one below the other, ``[t * r, n]``.
        a: The one in training, ``[r, n]``.
        form: ``"square"`` or ``"absolute"``.
    """
    products = a @ rows.T
    if form == "square":
        return products.square().sum(), 2 * products @ rows
    return products.abs().sum(), products.sign() @ rows


def _add(parameter: Tensor, gradient: Tensor, weight: float) -> None:
    if parameter.grad is not None and weight:
        parameter.grad.add_(gradient.view_as(parameter), alpha=weight)
