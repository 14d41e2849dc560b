"""Where evaluations are computed: in the training process, there but several at once, or in a process of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call, vmap

from clkit.distributed import own_share
from clkit.errors import ConfigurationError
from clkit.evaluation.prefix import FrozenPrefix
from clkit.evaluation.scores import Scorer
from clkit.evaluation.subsets import Subsets
from clkit.method.evaluation_mode import untouched
from clkit.method.parameters import trainable
from clkit.method.routing import mixer_of
from clkit.method.strategy import views_of

Result = Callable[[], Tensor]
"""Gives the sums ``[2, K]`` of an evaluation, see :meth:`Subsets.sums`; waits for it if need be."""


class Evaluator:
    """Evaluates in the training process, at once.

    Args:
        trainer: The trainer.
        module: The module in training.
        subsets: What it is evaluated on.
        scorer: The score.
        prefix: Cache of the frozen part's outputs; none when ``None``.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, subsets: Subsets, scorer: Scorer, prefix: FrozenPrefix | None
    ) -> None:
        self.trainer, self.module, self.subsets, self.scorer, self.prefix = trainer, module, subsets, scorer, prefix

    def start(self) -> None:
        """Begin an experience: whatever was known of frozen weights may have changed."""
        if self.prefix is not None:
            self.prefix.reset()

    def submit(self, index: int) -> Result:
        """Evaluate the experiences seen while experience ``index`` is learned, with the weights as they are now."""
        if self.prefix is not None:
            self.prefix.begin()
        return self.now(index, range(index + 1), self.prefix)

    def now(self, index: int, experiences: range, prefix: FrozenPrefix | None = None) -> Result:
        """Evaluate some experiences at once."""
        with untouched(self.trainer, self.module):
            sums = evaluate_chunks(
                self.module, self.subsets, self.scorer, self.chunks(experiences), index, prefix, self._weights
            )
        return lambda: sums

    def _weights(self, chunk: slice) -> AbstractContextManager[None]:
        mixer, shares = mixer_of(self.trainer), self.subsets.shares
        if mixer is not None and shares is not None:
            return mixer.mixed(self.module, shares[chunk])
        name = self.subsets.view(chunk)
        return nullcontext() if name is None else views_of(self.trainer)[name](self.module)

    def chunks(self, experiences: range) -> list[slice]:
        """Return the chunks that this process evaluates."""
        return self.subsets.chunks(experiences)[own_share(self.trainer)]

    def check(self) -> None:
        """Make sure of the results so far."""
        if self.prefix is not None:
            self.prefix.check()

    def close(self) -> None:
        """Free what is held."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next results depend on, beside the weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""

    def report(self) -> dict[str, float]:
        """Return what there is to know of approximate results."""
        return {}


class SnapshotEvaluator(Evaluator):
    """Keeps copies of the trainable weights and evaluates several of them in one vectorised call.

    It pays where a network is so small that calling it costs more than computing it.

    Args:
        trainer: The trainer.
        module: The module in training; its forward must be one that :func:`torch.func.vmap` can vectorise.
        subsets: What it is evaluated on.
        scorer: The score.
        snapshots: Copies in one call.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, subsets: Subsets, scorer: Scorer, snapshots: int
    ) -> None:
        super().__init__(trainer, module, subsets, scorer, None)
        self.snapshots = snapshots
        self._group: _Group | None = None

    def submit(self, index: int) -> Result:
        """Copy the weights; the evaluation waits for the group to be full or a result to be wanted."""
        group = self._group
        if group is None or group.sums is not None or group.index != index:
            self._group = group = _Group(index)
        position = len(group.states)
        group.states.append({name: tensor.detach().clone() for name, tensor in live_tensors(self.module).items()})
        if len(group.states) == self.snapshots:
            self._evaluate(group)

        def result() -> Tensor:
            if group.sums is None:
                self._evaluate(group)
            assert group.sums is not None
            return group.sums[position]

        return result

    def _evaluate(self, group: _Group) -> None:
        stacked = {f"module.{name}": torch.stack([state[name] for state in group.states]) for name in group.states[0]}
        scored = _Scored(self.module, self.scorer)

        def scores(chunk: slice) -> Tensor:
            batch = self.subsets.batch(chunk)
            inputs = (batch, group.index, self.subsets.owner[chunk])
            call = vmap(lambda state: functional_call(scored, state, inputs), randomness="same")
            values: Tensor = call(stacked)
            return values

        with untouched(self.trainer, self.module):
            try:
                sums = self.subsets.sums(self.chunks(range(group.index + 1)), scores)
            except RuntimeError as error:
                raise ConfigurationError(
                    f"snapshots={self.snapshots} needs a forward that torch.func.vmap can vectorise "
                    f"({str(error).splitlines()[0]}); use snapshots=1."
                ) from error
        # a process without a chunk has scored nothing
        group.sums = sums.expand(len(group.states), *sums.shape[-2:])
        group.states.clear()


@dataclass
class _Group:
    index: int
    states: list[dict[str, Tensor]] = field(default_factory=list)
    sums: Tensor | None = None


class _Scored(nn.Module):
    def __init__(self, module: LightningModule, scorer: Scorer) -> None:
        super().__init__()
        self.module, self.scorer = module, scorer

    def forward(self, batch: Any, index: int, owner: Tensor) -> Tensor:
        return self.scorer(self.module, batch, index, owner)


def frozen_versions(module: nn.Module) -> list[int | None]:
    """Return what tells whether a frozen parameter was written to, or another one froze."""
    return [None if parameter.requires_grad else parameter._version for parameter in module.parameters()]


def live_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what changes in training, by name: parameters that require gradients, and all buffers."""
    return {**trainable(module), **dict(module.named_buffers())}


def evaluate_chunks(
    module: LightningModule,
    subsets: Subsets,
    scorer: Scorer,
    chunks: list[slice],
    index: int,
    prefix: FrozenPrefix | None,
    weights: Callable[[slice], AbstractContextManager[None]] = lambda chunk: nullcontext(),
) -> Tensor:
    """Return :meth:`Subsets.sums` over chunks, of the module as it is or, chunk by chunk, with other weights."""

    def scores(chunk: slice) -> Tensor:
        def forward() -> Tensor:
            return scorer(module, subsets.batch(chunk), index, subsets.owner[chunk])

        with weights(chunk):
            return forward() if prefix is None else prefix.run((chunk.start, chunk.stop), forward)

    return subsets.sums(chunks, scores)
