"""Regularized LoRA: keep new updates away from where old ones were large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from clkit.errors import ConfigurationError, check_choice
from clkit.method.adapters import AdapterPerExperience, LowRank
from clkit.rng import private_rng


class RegLoRA(AdapterPerExperience):
    r"""Merge the adapter after each experience, and keep the next one small where it moved the weights most.

    After experience :math:`t` (before the next one, or at the end of the fit), for each adapted layer: remember the
    positions of the :math:`M` percent largest :math:`|B_t A_t|`, merge :math:`W \leftarrow W + s B_t A_t`, start a new
    adapter and drop the optimizer's momentum of the old one. From then on

    .. math:: \mathcal L = \mathcal L_{task} + \frac{\lambda}{N_\ell} \sum_\ell \frac{1}{|\Omega^\ell|}
        \sum_{(i,j) \in \Omega^\ell} |(B^\ell A^\ell)_{ij}|

    where :math:`\Omega^\ell` is the union of the layer's positions so far and :math:`N_\ell` the number of adapted
    layers. The product goes in without its scaling :math:`s`, in float32, with subgradient 0 at 0. The penalty
    depends on the weights alone, so its gradient is computed in closed form and added once per optimizer step, before
    clipping.

    The module must hold plain LoRA adapters of peft; those in training are penalised. Modules that are trained as a
    whole (``modules_to_save``) are not. Logged: ``reglora/penalty`` (without :math:`\lambda`), ``reglora/density``
    (largest share of a layer's entries that is remembered) and ``reglora/bytes`` (of the remembered positions, as
    they are saved: bits or indices, whichever is smaller).

    Args:
        strength: :math:`\lambda`, at least 0. It depends on the model: tune it so that the penalty is 1 to 10 % of the
            loss in the middle of an experience. Published: 2500, for a language model of 7B weights; with the rates of
            small networks that diverges.
        percent: :math:`M`, in (0, 100]. The larger, the less is forgotten and the sooner nothing is left to learn with:
            half of the entries may be held after five experiences at 10. Published: 2, of a model of 7B weights.
        select: Which entries of an update are remembered: the ``"largest"``, or as controls ``"random"`` ones or the
            ``"smallest"``. ``strength=0`` is the control that only merges.
        duplicates: ``"union"``, or ``"multiset"`` as in the published code: a position chosen in :math:`q` experiences
            weighs :math:`q` times, and :math:`|\Omega|` counts it so.
        product: How :math:`BA` is evaluated: ``"dense"``, ``"sparse"`` (at the remembered positions alone), or
            ``"auto"``, by size, rank and density.
        seed: Seed of the new adapters, and of random positions.

    Raises:
        ConfigurationError: If a value is out of range, or the module has no plain LoRA adapter.

    Reference: Chen et al., *SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction
    Tuning*, arXiv 2505.02486.
    """

    def __init__(
        self,
        strength: float = 100.0,
        *,
        percent: float = 10.0,
        select: Literal["largest", "random", "smallest"] = "largest",
        duplicates: Literal["union", "multiset"] = "union",
        product: Literal["auto", "dense", "sparse"] = "auto",
        seed: int = 0,
    ) -> None:
        if strength < 0:
            raise ConfigurationError(f"strength={strength} is not possible; use 0 or more.")
        if not 0 < percent <= 100:
            raise ConfigurationError(f"percent={percent} is not possible; use a number above 0 and at most 100.")
        check_choice("select", select, ("largest", "random", "smallest"))
        check_choice("duplicates", duplicates, ("union", "multiset"))
        check_choice("product", product, ("auto", "dense", "sparse"))
        super().__init__(seed)
        self.strength, self.percent, self.select = strength, percent, select
        self.duplicates, self.product = duplicates, product
        self.positions: dict[str, Positions] = {}
        self._penalties: dict[str, Penalty] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare()

    def _prepare(self) -> None:
        self._penalties = {}
        self._bytes = float(sum(positions.n_bytes for positions in self.positions.values()))
        for entry in self.layers:
            if entry.name in self.positions:
                b, a = entry.factors
                positions, shape = self.positions[entry.name], (b.shape[0], a.shape[1])
                if positions.shape != shape:
                    raise ConfigurationError(
                        f"RegLoRA remembers positions of a {positions.shape} layer {entry.name}, which is {shape} now; "
                        "keep the network the same over the stream."
                    )
                sparse = prefers_sparse(positions, b.shape[1]) if self.product == "auto" else self.product == "sparse"
                self._penalties[entry.name] = Penalty(positions, sparse, b.device)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._penalties or self.strength == 0:
            return
        weight = self.strength / len(self.layers)
        values = []
        for entry in self.layers:
            if entry.name in self._penalties:
                value, *gradients = self._penalties[entry.name](*entry.factors)
                values.append(value)
                for parameter, gradient in zip(entry.weights, gradients, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(gradient.view_as(parameter), alpha=weight)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(pl_module, torch.stack(values).sum() / len(self.layers))

    def _log(self, module: LightningModule, penalty: Tensor) -> None:
        density = max(positions.density for positions in self.positions.values())
        for name, value in (("penalty", penalty), ("density", density), ("bytes", self._bytes)):
            module.log(f"reglora/{name}", value, batch_size=1)

    def remember(self, index: int) -> None:
        rng = private_rng(self.seed, 32, index)
        for entry in self.layers:
            self._record(entry, rng)
        self._prepare()
        if any(positions.density > 0.5 for positions in self.positions.values()):
            rank_zero_warn(
                "RegLoRA holds more than half of the entries of a layer: little is left to learn with. Use a smaller "
                "percent."
            )

    def _record(self, entry: LowRank, rng: np.random.Generator) -> None:
        b, a = (factor.float() for factor in entry.factors)
        update = (b @ a).abs()
        if not update.isfinite().all():
            rank_zero_warn(f"RegLoRA remembers nothing of {entry.name}: its update is not finite.")
        elif update.any():
            new = Positions.largest(self._rank(update, rng), int(self.percent / 100 * update.numel()))
            old = self.positions.get(entry.name)
            self.positions[entry.name] = new if old is None else old.joined(new, self.duplicates == "multiset")

    def _rank(self, update: Tensor, rng: np.random.Generator) -> Tensor:
        if self.select == "random":
            return torch.from_numpy(rng.random(tuple(update.shape)))
        return update if self.select == "largest" else -update

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "positions": {name: p.packed() for name, p in self.positions.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.positions = {name: Positions.unpacked(packed) for name, packed in state_dict["positions"].items()}


@dataclass(frozen=True)
class Positions:
    """Some entries of a matrix.

    Args:
        shape: Of the matrix.
        flat: Their flat indices, ascending, ``int64`` ``[K]``, on the CPU.
        counts: How often each one counts, ``uint8`` ``[K]``.
    """

    shape: tuple[int, int]
    flat: Tensor
    counts: Tensor

    @classmethod
    def largest(cls, values: Tensor, k: int) -> Positions:
        """Return the ``k`` largest of values ``[m, n]``; of equal ones those with the lowest flat index."""
        flat = values.flatten()
        chosen = flat.new_empty(0, dtype=torch.int64)
        if k > 0:
            least = flat.topk(k).values[-1]
            above = (flat > least).nonzero()[:, 0]
            equal = (flat == least).nonzero()[: k - len(above), 0]
            chosen = torch.cat([above, equal]).sort().values
        rows, columns = values.shape
        return cls((rows, columns), chosen.cpu(), torch.ones(len(chosen), dtype=torch.uint8))

    @property
    def density(self) -> float:
        """Share of the matrix's entries."""
        return len(self.flat) / (self.shape[0] * self.shape[1])

    def joined(self, other: Positions, count: bool) -> Positions:
        """Return the union; ``count`` adds up how often a position counts."""
        flat, inverse = torch.unique(torch.cat([self.flat, other.flat]), return_inverse=True)
        both = torch.cat([self.counts, other.counts]).long()
        summed = torch.zeros(len(flat), dtype=torch.int64).index_add_(0, inverse, both)
        counts = summed.clamp(max=255) if count else torch.ones_like(summed)
        return Positions(self.shape, flat, counts.to(torch.uint8))

    def packed(self) -> dict[str, Any]:
        """Return them for a checkpoint: as one bit an entry or as indices, whichever is smaller."""
        size = self.shape[0] * self.shape[1]
        wide = size > 2**31 - 1
        found: dict[str, Any] = {"shape": list(self.shape)}
        if len(self.flat) * (8 if wide else 4) <= size / 8:
            found["indices"] = self.flat if wide else self.flat.int()
        else:
            mask = np.zeros(size, dtype=bool)
            mask[self.flat.numpy()] = True
            found["bits"] = torch.from_numpy(np.packbits(mask))
        return found if bool((self.counts == 1).all()) else {**found, "counts": self.counts}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Positions:
        """Return what :meth:`packed` saved."""
        rows, columns = packed["shape"]
        if "indices" in packed:
            flat = packed["indices"].long()
        else:
            flat = torch.from_numpy(np.flatnonzero(np.unpackbits(packed["bits"].numpy(), count=rows * columns)))
        return cls((rows, columns), flat, packed.get("counts", torch.ones(len(flat), dtype=torch.uint8)))

    @property
    def n_bytes(self) -> int:
        """Size of :meth:`packed`."""
        return sum(value.nbytes for value in self.packed().values() if isinstance(value, Tensor))


class Penalty:
    r"""The mean of :math:`|BA|` at some positions, with its gradients :math:`S A^\top` and :math:`B^\top S`.

    Here :math:`S_{ij} = \operatorname{sign}((BA)_{ij}) / |\Omega|` at the positions, and 0 elsewhere.
    """

    def __init__(self, positions: Positions, sparse: bool, device: torch.device) -> None:
        self.sparse = sparse
        rows, columns = positions.shape
        weights = positions.counts.float() / max(int(positions.counts.sum()), 1)
        if sparse:
            row = positions.flat // columns
            starts = torch.zeros(rows + 1, dtype=torch.int64)
            starts[1:] = torch.bincount(row, minlength=rows).cumsum(0)
            self._starts, self._columns = starts.to(device), (positions.flat % columns).to(device)
            self._shape, self._weights = positions.shape, weights.to(device)
            self._pattern = self._matrix(torch.zeros_like(self._weights))
        else:
            dense = torch.zeros(rows * columns)
            dense[positions.flat] = weights
            self._weights = dense.view(positions.shape).to(device)

    def __call__(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value and its gradients.

        Args:
            b: ``[m, r]``.
            a: ``[r, n]``.
        """
        b, a = b.float(), a.float()
        if not self.sparse:
            product = b @ a
            signs = product.sign().mul_(self._weights)
            return (signs * product).sum(), signs @ a.T, b.T @ signs
        product = torch.sparse.sampled_addmm(self._pattern, b, a, beta=0.0).values()
        signs = product.sign().mul_(self._weights)
        matrix = self._matrix(signs)
        return (signs * product).sum(), matrix @ a.T, (matrix.t() @ b).T

    def _matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(self._starts, self._columns, values, self._shape)


def prefers_sparse(positions: Positions, rank: int) -> bool:
    """Tell which product is cheaper, by the costs that ``tools/bench_reglora.py`` measures on a CPU."""
    size = positions.shape[0] * positions.shape[1]
    return size > 2**18 and positions.density < (1.3 + 0.057 * rank) / (35 + 0.27 * rank)
