"""Elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector

from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError
from clkit.evaluation.mode import evaluation_mode
from clkit.forward import task_loss, to_device
from clkit.loader import read_samples
from clkit.parameters import trainable
from clkit.rng import private_rng
from clkit.strategy import Strategy, check_pairs, stream_data
from clkit.stream import Experience

FISHERS = ("empirical", "true", "batch")


class EWC(Strategy):
    r"""Hold each weight near its old value, as strongly as the Fisher information says it matters.

    .. math:: \mathcal L = \mathcal L_{task} + \frac\lambda2 \sum_t \sum_j F^{(t)}_j (\theta_j - \theta^{*(t)}_j)^2

    ``mode="offline"`` keeps the sum over all past experiences; its quadratics are merged into one with the same value
    and gradient everywhere, so memory does not grow. ``mode="online"`` keeps :math:`F \leftarrow \gamma F + F_{new}`
    around the last weights only.

    Fisher information at the end of an experience, in evaluation mode:

    - ``"empirical"``: :math:`E_{(x,y)}[(\partial_j \log p_y)^2]` from per-sample gradients;
    - ``"true"``: :math:`E_x \sum_c p_c (\partial_j \log p_c)^2`, as many backward passes as there are classes;
    - ``"batch"``: the squared gradient of the module's own mean loss, averaged over batches. It works for any loss,
      is cheap, depends on the batch size and is biased low: an approximation that much public code uses.

    The first two are computed without autocast; they need ``(x, y)`` batches and a ``forward`` that returns class
    logits, shape ``[B, C]``.

    Args:
        strength: :math:`\lambda`, at least 0.
        mode: ``"offline"`` or ``"online"``.
        decay: :math:`\gamma` in [0, 1], for ``"online"``.
        fisher: ``"empirical"``, ``"true"`` or ``"batch"``.
        samples: Training samples used for the Fisher information; all when ``None``.
        seed: Seed of the choice of those samples.

    Raises:
        ConfigurationError: If a value is out of range.

    Reference: Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, arXiv 1612.00796,
    equation 3; online form: Schwarz et al., *Progress & Compress*, arXiv 1805.06370.
    """

    carries_weights = True

    def __init__(
        self,
        strength: float = 10.0,
        *,
        mode: Literal["offline", "online"] = "offline",
        decay: float = 1.0,
        fisher: Literal["empirical", "true", "batch"] = "empirical",
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        if strength < 0:
            raise ConfigurationError(f"strength={strength} is not possible; use 0 or more.")
        if mode not in ("offline", "online"):
            raise ConfigurationError(f"mode={mode!r} is unknown; use offline or online.")
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay={decay} is not possible; use a number from 0 to 1.")
        if fisher not in FISHERS:
            raise ConfigurationError(f"fisher={fisher!r} is unknown; use one of {', '.join(FISHERS)}.")
        if samples is not None and samples < 1:
            raise ConfigurationError(f"samples={samples} is not possible; use at least 1, or null for all.")
        self.strength, self.mode, self.decay, self.fisher = strength, mode, decay, fisher
        self.samples, self.seed = samples, seed
        self.penalty: Quadratic | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.fisher != "batch":
            check_pairs(trainer, f"EWC(fisher={self.fisher!r})", "use fisher='batch'")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.penalty is not None:
            self.penalty = Quadratic(*(tensor.to(pl_module.device) for tensor in self.penalty))

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.penalty is None or self.strength == 0:
            return None
        importance, anchor, offset = self.penalty
        weights = parameters_to_vector(trainable(module).values())
        if len(weights) != len(anchor):
            raise ConfigurationError(
                f"EWC remembers {len(anchor)} weights, but {len(weights)} are trainable now; keep requires_grad of all "
                "parameters the same over the stream."
            )
        distance = weights - anchor
        return 0.5 * self.strength * ((importance * distance.square()).sum() + offset)

    @torch.no_grad()
    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        fisher = self._fisher(trainer, module, experience)
        weights = parameters_to_vector(trainable(module).values()).detach().clone()
        new = Quadratic(fisher, weights, fisher.new_zeros(()))
        if self.penalty is None:
            self.penalty = new
        elif self.mode == "online":
            self.penalty = new._replace(importance=self.decay * self.penalty.importance + fisher)
        else:
            self.penalty = self.penalty.plus(new)

    def _fisher(self, trainer: Trainer, module: LightningModule, experience: Experience) -> Tensor:
        n = len(experience.train)  # type: ignore[arg-type]
        rng = private_rng(self.seed, 4, experience.index)
        chosen = torch.from_numpy(rng.permutation(n)[: self.samples])
        params = trainable(module)
        size = stream_data(trainer).batch_size if self.fisher == "batch" else _chunk_size(params)
        chunks = torch.split(chosen, size)[trainer.global_rank :: trainer.world_size]
        total = parameters_to_vector([torch.zeros_like(p) for p in params.values()])
        with evaluation_mode(module):
            for chunk in chunks:
                batch = read_samples(experience.train, chunk, collate_fn=stream_data(trainer).collate_fn)
                batch = to_device(trainer, batch)
                for squares in self._squared_gradients(module, params, batch):
                    total += squares
        n_terms = -(-len(chosen) // size) if self.fisher == "batch" else len(chosen)
        return sum_over_processes(trainer, total) / n_terms

    def _squared_gradients(self, module: LightningModule, params: Mapping[str, Tensor], batch: Any) -> Iterator[Tensor]:
        if self.fisher == "batch":
            with torch.enable_grad():
                grads = torch.autograd.grad(task_loss(module, batch), list(params.values()), materialize_grads=True)
            yield parameters_to_vector(grads).square()
            return
        x, y, *task = batch
        logits = module(x, *task)
        if logits.dim() != 2:
            raise ConfigurationError(
                f"fisher={self.fisher!r} needs class logits of shape [B, C], but {type(module).__name__}'s forward "
                f"returned {tuple(logits.shape)}; use fisher='batch'."
            )
        if self.fisher == "empirical":
            yield _weighted_squares(module, params, (x, *task), y, torch.ones_like(logits[:, 0]))
            return
        for c, weight in enumerate(logits.softmax(dim=1).unbind(dim=1)):
            yield _weighted_squares(module, params, (x, *task), torch.full_like(y, c), weight)

    def state_dict(self) -> dict[str, Any]:
        return {"penalty": None if self.penalty is None else tuple(self.penalty)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        penalty = state_dict["penalty"]
        self.penalty = None if penalty is None else Quadratic(*penalty)


class Quadratic(NamedTuple):
    r"""The function :math:`\sum_j F_j (\theta_j - a_j)^2 + o`; flat tensors ``[P]``, ``[P]`` and a scalar."""

    importance: Tensor
    anchor: Tensor
    offset: Tensor

    def plus(self, other: Quadratic) -> Quadratic:
        """Return the sum of both functions: a quadratic around their weighted centre."""
        total = self.importance + other.importance
        share = torch.where(total > 0, other.importance / total, 0.0)
        apart = other.anchor - self.anchor
        between = (self.importance * share * apart.square()).sum()
        return Quadratic(total, self.anchor + share * apart, self.offset + other.offset + between)


def _weighted_squares(
    module: LightningModule, params: Mapping[str, Tensor], inputs: tuple[Tensor, ...], labels: Tensor, weights: Tensor
) -> Tensor:
    def log_probability(params: dict[str, Tensor], label: Tensor, *sample: Tensor) -> Tensor:
        logits = functional_call(module, params, tuple(part.unsqueeze(0) for part in sample))
        picked: Tensor = torch.log_softmax(logits.float(), dim=1)[0].gather(0, label.unsqueeze(0))[0]
        return picked

    in_dims = (None, 0, *[0] * len(inputs))
    detached = {name: param.detach() for name, param in params.items()}
    grads = vmap(grad(log_probability), in_dims=in_dims, randomness="different")(detached, labels, *inputs)
    return torch.cat([torch.einsum("b...,b->...", g.square(), weights.to(g)).flatten() for g in grads.values()])


def _chunk_size(params: Mapping[str, Tensor]) -> int:
    floats = 2**25
    return min(max(floats // sum(p.numel() for p in params.values()), 1), 256)
