"""Interpolated LoRA: a fast learner that replays, and a slow one that averages it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clkit.data.batch import gather_batch
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.evaluation.token_scores import is_encoder_decoder
from clkit.memory.buffer import ReservoirBuffer, draw_replay
from clkit.memory.storage import ImageMemory
from clkit.method.evaluation_mode import evaluation_mode
from clkit.method.forward import task_loss
from clkit.method.hidden_states import capture, find_blocks
from clkit.method.parameters import averageable, grown, swapped
from clkit.method.setup_checks import check_memory, report_memory
from clkit.method.statistics import Statistics, horizon
from clkit.method.strategy import Strategy


class InterpolatedLoRA(Strategy):
    r"""Dual memory: train a fast learner with replay, near the hidden states of a slow learner that averages it.

    After every optimizer step :math:`k` of the whole stream, from 1, for the trainable tensors (those of the LoRA
    adapter where the module has one) and, in the same way, floating-point buffers such as BatchNorm's statistics:

    .. math:: \theta^l \leftarrow \lambda_k \theta^l + (1 - \lambda_k) \theta^w, \qquad
        \lambda_k = \min(1 - \tfrac1{k+1}, \lambda)

    From the second experience on, with a batch of memory drawn before the new one goes in,

    .. math:: \mathcal L = \tfrac12 (\mathcal L(B) + \mathcal L(B_{\mathcal M})) + \gamma \mathcal L_{cons}

    where :math:`\mathcal L_{cons}` is the mean over blocks, samples, positions and channels of :math:`(h^w - h^l)^2`
    (``form="mse"``) or, as published code has it, of :math:`\operatorname{relu}(h^l - h^w)^2` (``"one_sided"``), on the
    memory's batch, with the slow learner in evaluation mode. Padding (where a mapping has an ``attention_mask``) is
    left out. In the first experience the loss is :math:`\mathcal L(B)`.

    The slow learner starts as a copy of the fast one and is kept in float32; nothing is reset between experiences. It
    predicts, unless ``predict_with="fast"``, and is put into the module at the end of the fit. The memory holds samples
    of the data: ``strategy.buffer.clear()`` drops them.

    Args:
        capacity: Samples in memory.
        batch_size: Samples replayed in a step and process; as many as the new batch has when ``None``.
        decay: :math:`\lambda` in [0, 1]; when ``None`` such that the slow learner remembers a fifth of an
            experience's steps, and 0.999 at most. Published: 0.99, and 0.999 for streams of more than 2000 steps.
        gamma: :math:`\gamma`, at least 0.
        form: ``"mse"`` or ``"one_sided"``.
        layers: Blocks whose outputs are compared: ``"all"``, ``"last"``, or patterns of module paths.
        ramp: Whether :math:`\lambda_k` rises; :math:`\lambda` all along otherwise.
        predict_with: ``"slow"`` or ``"fast"``.
        statistics: BatchNorm's running statistics where the slow learner predicts: ``"recompute"`` each time, on up to
            16 batches of the experience and of each memory, or ``"average"``, like the weights.
        seed: Seed of the memory's own random numbers.
        device: Where the memory is kept; beside the batches when ``None``.
        images: What the memory keeps of images beside texts: ``"references"``, so that they are read from the stream;
            ``"encoded"``, their files; or ``"features"`` of a frozen tower. ``memory.json`` has the bytes.

    Raises:
        ConfigurationError: If a value is out of range, or no blocks are found.

    Reference: Ren et al., *Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning*,
    arXiv 2402.18865.
    """

    carries_weights = True
    weighs_loss = True

    def __init__(
        self,
        capacity: int = 500,
        *,
        batch_size: int | None = None,
        decay: float | None = None,
        gamma: float = 1.0,
        form: Literal["mse", "one_sided"] = "mse",
        layers: str | Sequence[str] = "all",
        ramp: bool = True,
        predict_with: Literal["slow", "fast"] = "slow",
        statistics: Literal["recompute", "average"] = "recompute",
        seed: int = 0,
        device: str | None = None,
        images: ImageMemory = "references",
    ) -> None:
        if decay is not None and not 0 <= decay <= 1:
            raise ConfigurationError(f"decay={decay} is not possible; use a number from 0 to 1, such as 0.99.")
        if gamma < 0:
            raise ConfigurationError(f"gamma={gamma} is not possible; use 0 or more.")
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        check_choice("form", form, ("mse", "one_sided"))
        check_choice("predict_with", predict_with, ("slow", "fast"))
        self.batch_size, self.decay, self.gamma, self.form, self.ramp = batch_size, decay, gamma, form, ramp
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.prediction = "slow" if predict_with == "slow" else None
        self.statistics = Statistics(statistics)
        self.views = {"slow": lambda module: self.statistics.swapped(module, self.slow)}
        self.buffer = ReservoirBuffer(capacity, seed=seed, device=device, images=images)
        self.slow: dict[str, Tensor] = {}
        self.k = 0
        self._horizon = 0.99
        self._replayed: Any = None
        self._targets: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.gamma > 0 and is_encoder_decoder(pl_module):
            raise ConfigurationError(
                "InterpolatedLoRA compares hidden states where the input's mask is 1, but those of an encoder-decoder "
                "are of the answer too; use gamma=0."
            )
        self._blocks = find_blocks(pl_module, self.layers) if self.gamma > 0 else []
        self.statistics.watch(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.buffer.to(pl_module.device)
        if self.decay is None:
            self._horizon = horizon(trainer, share=0.2)
        if self.slow:
            self.slow = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), self.slow)
        else:
            self.slow = {name: p.detach().float().clone() for name, p in averageable(pl_module).items()}

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        # a head that grows has new rows, which the slow learner has from their first values on
        live = averageable(module)
        self.slow = {n: old if old.shape == live[n].shape else grown(old, live[n]) for n, old in self.slow.items()}

    def transform_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> Any:
        self._replayed, self._targets = None, []
        if stream_data(trainer).experience.index == 0:
            return batch
        drawn = draw_replay(trainer, self.buffer, batch, self.batch_size)
        self._replayed = move_data_to_device(drawn, module.device)
        if drawn is not None and self.gamma > 0:
            # before the batch's own forward: swapping writes into weights that a living graph would still need
            slow = swapped(module, self.slow)
            with torch.no_grad(), evaluation_mode(module), slow, capture(self._blocks, stop=True) as self._targets:
                task_loss(module, self._replayed)
        return batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_memory(trainer, self.buffer)

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self._replayed is None:
            return None
        with capture(self._blocks) as states:
            # a batch of labels that are all to be ignored has no mean
            replayed = task_loss(module, self._replayed).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        term = 0.5 * (replayed - loss)
        if self.gamma > 0:
            if not any(state.requires_grad for state in states):
                raise ConfigurationError(
                    "The hidden states of InterpolatedLoRA have no gradient: checkpointing that re-enters hides it. "
                    "Use gradient checkpointing with use_reentrant=False, or gamma=0."
                )
            mask = self._replayed.get("attention_mask") if isinstance(self._replayed, Mapping) else None
            distance = consistency(states, self._targets, self.form, mask)
            module.log("ilora/consistency", distance.detach(), batch_size=1)
            term = term + self.gamma * distance
        self._replayed, self._targets = None, []
        return term

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if stream_data(trainer).has_stepped:
            self.statistics.watch(pl_module)
            fast = averageable(pl_module)
            self.interpolate({name: fast[name] for name in self.slow})
        self.buffer.insert(gather_batch(trainer, batch))

    def interpolate(self, fast: Mapping[str, Tensor]) -> None:
        """Move the slow weights by one step towards the fast ones of the same names."""
        self.k += 1
        decay = self._horizon if self.decay is None else self.decay
        weight = min(1 - 1 / (self.k + 1), decay) if self.ramp else decay
        live = [fast[name].detach().float() for name in self.slow]
        torch._foreach_lerp_(list(self.slow.values()), live, 1 - weight)

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        report_memory(trainer, self.buffer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.prediction == "slow":
            self.statistics.put(pl_module, self.slow)

    def remembered(self) -> Any:
        return self.buffer.contents()

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow, "k": self.k, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow, self.k = state_dict["slow"], state_dict["k"]
        self.buffer.load_state_dict(state_dict["buffer"])


def consistency(
    fast: Sequence[Tensor], slow: Sequence[Tensor], form: str = "mse", mask: Tensor | None = None
) -> Tensor:
    """Return the mean squared distance of hidden states, in float32.

    Args:
        fast: Hidden states, ``[B, ..., D]`` each.
        slow: As many, of the same shapes.
        form: ``"mse"``, or ``"one_sided"``: only where ``slow`` is above ``fast``.
        mask: 1 where a position counts, ``[B, S]``, for hidden states ``[B, S, D]``.
    """
    total = count = fast[0].new_zeros((), dtype=torch.float32)
    for new, old in zip(fast, slow, strict=True):
        apart = old.float() - new.float()
        apart = apart.relu() if form == "one_sided" else apart
        if mask is not None:
            # before the square: what is not finite in padding would leave NaN in the gradient
            apart = apart.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        total = total + apart.square().sum()
        count = count + (apart.numel() if mask is None else mask.count_nonzero() * apart.shape[-1])
    return total / count.clamp(min=1)
