"""I-LoRA: a slow learner that interpolates between the solutions of a fast one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clkit.buffer import ReservoirBuffer
from clkit.distributed import gather_batch, local_share
from clkit.errors import ConfigurationError
from clkit.evaluation.mode import evaluation_mode
from clkit.forward import task_loss
from clkit.hidden import Layers, find_layers, hidden_states
from clkit.parameters import assign, swapped, trainable
from clkit.strategy import Strategy, stream_data

IGNORED = -100
FORMS = ("mse", "one_sided")


class InterpolatedLoRA(Strategy):
    r"""Replay, keep the hidden states of a slow learner, and predict with it.

    The fast learner is the module in training, the slow one a moving average of its trainable parameters, usually those
    of LoRA. After optimizer step :math:`k`, counted from 1 over the whole stream:

    .. math:: \theta^l \leftarrow \lambda_k\,\theta^l + (1 - \lambda_k)\,\theta^w, \qquad
        \lambda_k = \min\big(1 - \tfrac{1}{k+1}, \lambda\big)

    From the second experience on, with a batch :math:`B_{\mathcal M}` from a reservoir of all earlier batches:

    .. math:: \mathcal L = \tfrac12\big(\mathcal L(B) + \mathcal L(B_{\mathcal M})\big)
        + \gamma\,\operatorname{mean}\big(h^w(B_{\mathcal M}) - h^l(B_{\mathcal M})\big)^2

    The mean is over all elements of all ``layers``, in float32; padding is left out where the batch is a mapping with
    an ``attention_mask``, ``[B, S]``, and the states are ``[B, S, D]``. ``form="one_sided"`` is what the published code
    computes, :math:`\operatorname{mean}\,\operatorname{relu}(h^l - h^w)^2`. The slow learner is in evaluation mode.
    A replay batch whose labels are all -100 has no loss of its own, and :math:`\mathcal L(B)` then stands alone.

    Training goes on from the fast weights; ``prediction`` says that the method predicts with the slow ones, which are
    in the module when the fit ends. BatchNorm's statistics are those of the fast learner. The parameters are averaged
    one by one: of LoRA, the average of the factors and not of their product.

    The memory holds the users' data, and so does every checkpoint: ``strategy.memory.clear()`` forgets it. All batches
    must have one shape, so pad texts to one length.

    Logs ``ilora/consistency``.

    Args:
        decay: :math:`\lambda` in [0, 1]. The slow learner is about :math:`1 / (1 - \lambda)` steps behind, which should
            be few beside those of an experience; 0.999 from about 2000 steps in all; 1 is the mean of all steps.
        consistency: :math:`\gamma`, at least 0.
        form: ``"mse"`` or ``"one_sided"``.
        layers: ``"all"`` blocks of the network, ``"last"``, or patterns of module names, see
            :func:`~clkit.hidden.find_layers`.
        capacity: Samples in memory, at least 0.
        batch_size: Samples replayed in a step and process; as many as the new batch has when ``None``.
        predict_with: ``"slow"`` or ``"fast"``.
        seed: Seed of the memory's own random numbers.
        device: Where the memory is kept; beside the batches when ``None``.

    Raises:
        ConfigurationError: If a value is out of range, or no blocks are found.

    Reference: Ren et al., *Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning*,
    arXiv 2402.18865.
    """

    def __init__(
        self,
        decay: float = 0.99,
        *,
        consistency: float = 1.0,
        form: Literal["mse", "one_sided"] = "mse",
        layers: Layers = "all",
        capacity: int = 500,
        batch_size: int | None = None,
        predict_with: Literal["slow", "fast"] = "slow",
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay={decay} is not possible; use a number from 0 to 1, such as 0.99.")
        if consistency < 0:
            raise ConfigurationError(f"consistency={consistency} is not possible; use 0 or more.")
        if form not in FORMS:
            raise ConfigurationError(f"form={form!r} is unknown; use one of {', '.join(FORMS)}.")
        if predict_with not in ("slow", "fast"):
            raise ConfigurationError(f"predict_with={predict_with!r} is unknown; use slow or fast.")
        if isinstance(layers, str) and layers not in ("all", "last"):
            raise ConfigurationError(f"layers={layers!r} is unknown; use all, last or a list: layers=[{layers!r}].")
        if batch_size is not None and batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size} is not possible; use at least 1, or null.")
        self.memory = ReservoirBuffer(capacity, seed=seed, device=device)
        self.decay, self.consistency, self.form, self.layers = decay, consistency, form, layers
        self.batch_size = batch_size
        self.views = {"slow": self.slow_weights}
        self.prediction = "slow" if predict_with == "slow" else None
        self.slow: dict[str, Tensor] = {}
        self.n_steps = 0
        self._last_step = 0
        self._names: list[str] = []
        self._replayed: Any = None
        self._slow_states: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self.memory.to(pl_module.device)
        self.slow = {name: tensor.to(pl_module.device) for name, tensor in self.slow.items()}
        self._begin(trainable(pl_module))
        if self.consistency > 0:
            self._names = find_layers(pl_module, self.layers)

    def _begin(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            if name not in self.slow:
                self.slow[name] = parameter.detach().to(torch.float32, copy=True)

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        self._replayed, self._slow_states = None, {}
        if stream_data(trainer).experience.index == 0:
            return batch
        size = self.batch_size or len(tree_leaves(batch)[0])
        drawn = self.memory.sample(size * trainer.world_size)
        if drawn is not None:
            self._replayed = move_data_to_device(local_share(trainer, drawn), module.device)
            # before the forward of the new batch, whose graph needs the weights to stay as they are
            self._slow_states = self._slow_pass(module) if self.consistency > 0 else {}
        return batch

    @torch.no_grad()
    def _slow_pass(self, module: LightningModule) -> dict[str, Tensor]:
        inside = hidden_states(module, self._names, stop=True)
        with evaluation_mode(module), self.slow_weights(module), inside as states:
            task_loss(module, self._replayed)
        return states

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self._replayed is None:
            return None
        with hidden_states(module, self._names) as states:
            replay = task_loss(module, self._replayed)
        labels = _entry(self._replayed, "labels", 1)
        if labels is not None:
            replay = torch.where((labels == IGNORED).all(), loss, replay)
        term = 0.5 * (replay - loss)
        if self.consistency == 0:
            return term
        pairs = [(states[name], slow) for name, slow in self._slow_states.items() if name in states]
        self._slow_states = {}
        if not pairs:
            raise ConfigurationError(
                f"{type(module).__name__}.training_step ran none of {', '.join(self._names)}; name modules that it "
                "runs: layers=['PATTERN', ...]."
            )
        distance = consistency_loss(pairs, self.form, _entry(self._replayed, "attention_mask"))
        module.log("ilora/consistency", distance.detach(), batch_size=1)
        return term + self.consistency * distance

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.update(trainable(pl_module))
        self.memory.insert(gather_batch(trainer, batch))

    def update(self, fast: Mapping[str, Tensor]) -> None:
        """Move the slow learner by one step towards the fast weights, given by name."""
        self.n_steps += 1
        kept = min(1 - 1 / (self.n_steps + 1), self.decay)
        self._begin(fast)
        torch._foreach_lerp_(
            [self.slow[name] for name in fast], [tensor.detach().float() for tensor in fast.values()], 1 - kept
        )

    def slow_weights(self, module: LightningModule) -> AbstractContextManager[None]:
        """Put the slow learner into the module inside the context, and the fast one back after it."""
        return swapped(module, self.slow)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.prediction == "slow":
            assign(pl_module, self.slow)

    def remembered(self) -> Any:
        return self.memory.contents()

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow, "n_steps": self.n_steps, "memory": self.memory.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow, self.n_steps = dict(state_dict["slow"]), state_dict["n_steps"]
        self.memory.load_state_dict(state_dict["memory"])


def consistency_loss(pairs: Iterable[tuple[Tensor, Tensor]], form: str = "mse", mask: Tensor | None = None) -> Tensor:
    r"""Return the mean square by which hidden states differ, a float32 scalar, over all elements of all pairs.

    Args:
        pairs: Fast and slow states of each layer, of equal shape, ``[B, S, D]`` or any other.
        form: ``"mse"``, :math:`(h^w - h^l)^2`, or ``"one_sided"``, :math:`\operatorname{relu}(h^l - h^w)^2`.
        mask: 1 for real tokens, 0 for padding, ``[B, S]``; applied to states ``[B, S, D]``.
    """
    total: Tensor | float = 0.0
    count: Tensor | int = 0
    for fast, slow in pairs:
        gap = slow.float() - fast.float()
        if form == "one_sided":
            gap = gap.relu()
        if mask is not None and gap.dim() == 3 and gap.shape[:2] == mask.shape:
            # masked before the square: a state that is not finite would leave NaN in the gradient
            gap = gap.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
            count = count + gap.shape[-1] * mask.count_nonzero()
        else:
            count = count + gap.numel()
        total = total + gap.square().sum()
    return torch.as_tensor(total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)))


def _entry(batch: Any, key: str, position: int | None = None) -> Tensor | None:
    """Return a tensor of a batch by its key in a mapping, or by its position in a tuple; ``None`` if there is none."""
    if isinstance(batch, Mapping):
        found = batch.get(key)
    else:
        found = batch[position] if position is not None and len(batch) > position else None
    return found if isinstance(found, Tensor) else None
