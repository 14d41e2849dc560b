"""Forgetting prioritized finetuning: FPF after any replay method, and k-FPF in place of replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from clkit.data.batch import gather_batch, local_share
from clkit.data.columns import size_of, take
from clkit.data.datamodule import stream_data
from clkit.data.datasets import labels_of
from clkit.data.hooks import callbacks_of
from clkit.data.stream import Experience
from clkit.distributed import sum_over_processes
from clkit.errors import ConfigurationError, check_choice, check_whole
from clkit.evaluation.drift import ModuleDrift
from clkit.evaluation.prefix import PrefixTable
from clkit.memory.buffer import ReservoirBuffer
from clkit.method.forward import frozen_statistics, outputs, task_loss, task_loss_and_outputs
from clkit.method.gradient import check_automatic
from clkit.method.module_kinds import Part, only, select
from clkit.method.optimizer import forget_state
from clkit.method.setup_checks import check_memory, check_output, check_whole_head
from clkit.method.strategy import Strategy, check_pairs, memory_before
from clkit.rng import private_rng


class _Finetuning(Strategy):
    """What FPF and k-FPF share: phases that train a few modules on the memory, and touch nothing else."""

    def __init__(
        self,
        select: str | Sequence[str],
        steps: int,
        batch_size: int,
        lr: float | None,
        momentum: float,
        clip: float | None,
        restart: bool,
        seed: int,
    ) -> None:
        check_whole("steps", steps, 0)
        check_whole("batch_size", batch_size, 1)
        for name, value in (("lr", lr), ("momentum", momentum), ("clip", clip)):
            if value is not None and value < 0:
                raise ConfigurationError(f"{name}={value} is not possible; use 0 or more.")
        self.select = select if isinstance(select, str) else list(select)
        self.steps, self.batch_size, self.lr, self.momentum = steps, batch_size, lr, momentum
        self.clip, self.restart, self.seed = clip, restart, seed
        self.phases = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_automatic(pl_module, type(self).__name__)
        if self.select == "drift":
            _find_drift(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._choose(trainer, pl_module)

    def _choose(self, trainer: Trainer, module: LightningModule) -> list[Part]:
        if self.select == "drift" and (names := _find_drift(trainer).sensitive()):
            return select(module, names)
        if self.select in ("drift", "preset"):
            return select(module, preset(module, stream_data(trainer).stream.kind))
        return select(module, self.select)

    def finetune(self, trainer: Trainer, module: LightningModule, memory: Any) -> None:
        """Run one phase on the memory, a batch of all that is remembered."""
        if memory is None or _n_classes(memory) < 2:
            rank_zero_warn(f"{type(self).__name__} skips a phase: the memory holds fewer than 2 classes.")
            return
        rng = private_rng(self.seed, 20, self.phases)
        self.phases += 1
        size = size_of(memory)
        chosen = self._choose(trainer, module)
        base = self._rate(trainer)
        before = [tensor.detach().clone() for part in chosen for tensor in part.tensors.values()]
        with only(module, chosen) as params, _own_gradients(params):
            optimizer = torch.optim.SGD(params, lr=base, momentum=self.momentum)
            replayed = self._prefix(module, memory, size)
            start = self._loss(module, memory, size, replayed)
            for step in range(self.steps):
                rows = torch.from_numpy(rng.choice(size, self.batch_size, replace=size < self.batch_size))
                rows = local_share(trainer, rows)
                batch = take(memory, rows)
                with torch.enable_grad(), replayed(rows):
                    loss = self.phase_loss(module, move_data_to_device(batch, module.device))
                    grads = torch.autograd.grad(loss, params, materialize_grads=True)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = sum_over_processes(trainer, grad) / trainer.world_size
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(params, self.clip)
                optimizer.param_groups[0]["lr"] = base * (1 - step / self.steps)
                optimizer.step()
            self.extra_updates += self.steps
            gained = sum_over_processes(trainer, start - self._loss(module, memory, size, replayed))
        after = [tensor for part in chosen for tensor in part.tensors.values()]
        if not (gained >= 0 and all(torch.stack([tensor.isfinite().all() for tensor in after]))):
            rank_zero_warn(
                f"{type(self).__name__} takes back a phase that raised the loss on the memory, or did not stay finite; "
                "use a smaller lr."
            )
            with torch.no_grad():
                torch._foreach_copy_([tensor.detach() for tensor in after], before)
        if self.restart:
            forget_state(trainer, params)

    @torch.no_grad()
    def _loss(self, module: LightningModule, memory: Any, size: int, replayed: Callable[[Tensor], Any]) -> Tensor:
        """Return the mean loss on up to eight batches of the memory, the same ones each time in a phase."""
        chosen = private_rng(self.seed, 31, self.phases).permutation(size)[: 8 * self.batch_size]
        total = torch.zeros((), device=module.device)
        with isolate_rng(), frozen_statistics(module):
            for rows in torch.split(torch.from_numpy(chosen), self.batch_size):
                batch = take(memory, rows)
                with replayed(rows):
                    total += len(rows) * self.phase_loss(module, move_data_to_device(batch, module.device)).float()
        return total / len(chosen)

    def _rate(self, trainer: Trainer) -> float:
        if self.lr is not None:
            return self.lr
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        # a schedule may have brought it to 0 at an experience's end
        return 0.5 * float(group.get("initial_lr", group["lr"])) if isinstance(optimizer, torch.optim.SGD) else 0.05

    def _prefix(self, module: LightningModule, memory: Any, size: int) -> Callable[[Tensor], Any]:
        """What a phase's forward on some rows runs in: frozen first modules are computed once for all rows."""
        table = None
        if self.batch_size <= size < self.steps * self.batch_size:
            held = move_data_to_device(memory, module.device)
            table = PrefixTable.build(module, held, lambda batch: self.phase_loss(module, batch), self.batch_size)
        return (lambda rows: nullcontext()) if table is None else table.rows

    def phase_loss(self, module: LightningModule, batch: Any) -> Tensor:
        """Return the loss of a phase's step on a batch of memory."""
        return task_loss(module, batch, own_backward=True)

    def state_dict(self) -> dict[str, Any]:
        return {"phases": self.phases, "extra_updates": self.extra_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.phases, self.extra_updates = state_dict["phases"], state_dict["extra_updates"]


class FPF(_Finetuning):
    r"""Finetune the modules that forget most on the memory of another strategy, after it has trained.

    A phase takes ``steps`` steps of SGD with a fresh optimizer, learning rate falling linearly to 0, on batches of the
    memory, over the chosen modules alone; everything else is frozen, BatchNorm's running statistics included. Where the
    first modules are all frozen, their outputs on the memory are computed once in a phase. The memory is that of the
    strategy before it in the trainer's callbacks: ``strategy=[er,fpf]``.

    Which modules: ``"preset"`` takes normalisation layers and the head in class- and task-incremental streams, and
    normalisation, first layer and, without BatchNorm, head in domain-incremental ones (without normalisation layers the
    head, or first layer and head). ``"drift"`` takes those that a ``ModuleDrift`` callback found most sensitive, and
    the preset until it has seen two experiences. Otherwise kinds joined by ``+`` (``norm``, ``first``, ``last_block``,
    ``head``, ``all``), or a list of name patterns. ``last_block`` is all of the last residual or transformer block; in
    a network without such blocks, the last layer with weights before the head. No preset has it.

    A phase that raises the loss on the memory is taken back, with a warning.

    The paper's own step numbers and rates are not public; the defaults are clkit's.

    Args:
        select: The modules, as above.
        steps: Steps in a phase, at least 0.
        batch_size: Samples of a step, drawn uniformly; with replacement from a smaller memory.
        when: ``"end"``, after the last experience, or ``"experience"``, after each.
        lr: First learning rate; when ``None``, half of the main optimizer's (before its schedule) if that is SGD, and
            0.05 otherwise, as an adaptive optimizer's rate says nothing about SGD's.
        momentum: Of the phase's SGD.
        clip: Largest gradient norm; not clipped when ``None``.
        restart: Forget the main optimizer's state (momentum) of the chosen modules after a phase.
        seed: Seed of the draws.

    Raises:
        ConfigurationError: If a value is out of range, nothing chosen is trainable, or no strategy before it has a
            memory.

    Reference: Zhao et al., *Does Continual Learning Equally Forget All Parameters?*, arXiv 2304.04158.
    """

    at_end = "trains"

    def __init__(
        self,
        select: str | Sequence[str] = "preset",
        *,
        steps: int = 100,
        batch_size: int = 32,
        when: Literal["end", "experience"] = "end",
        lr: float | None = None,
        momentum: float = 0.0,
        clip: float | None = None,
        restart: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(select, steps, batch_size, lr, momentum, clip, restart, seed)
        check_choice("when", when, ("end", "experience"))
        self.when = when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._memory(trainer)

    def _memory(self, trainer: Trainer) -> Strategy:
        strategy = memory_before(trainer, self)
        if strategy is not None:
            return strategy
        raise ConfigurationError(
            "FPF finetunes on the memory of another strategy, and none before it has one; put it after a replay "
            "strategy, such as strategy=[er,fpf], or use kfpf."
        )

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if self.when == "experience" or experience.index == len(stream_data(trainer).stream) - 1:
            self.finetune(trainer, module, self._memory(trainer).remembered())


class KFPF(_Finetuning):
    r"""Plain training with a memory that is used only in :math:`k` finetuning phases, at regular intervals.

    After step :math:`s_j = \lfloor jS/k \rfloor`, :math:`j = 1..k`, of the stream's :math:`S` steps, whatever the
    experience, one phase as in FPF finetunes the chosen modules on the memory, a reservoir of every batch so far. The
    last phase follows the last step. With ``distillation`` above 0 (k-FPF-KD) a phase minimises

    .. math:: \mathcal L + \lambda \, \tfrac1{BC} \sum \lVert h_\theta(x) - z \rVert_2^2

    (the paper sums over the :math:`C` classes, ``reduction="sum"``: its :math:`\lambda` is ours divided by :math:`C`),
    where :math:`z` are the logits of the training forward in which :math:`x` came; the module's ``forward(x)`` must
    then return logits, shape ``[B, C]``.

    Args:
        k: Number of phases over the stream, at least 0; more than there are steps means one after each.
        capacity: Samples in memory.
        select: The modules: see :class:`FPF`.
        steps: Steps in a phase, at least 0.
        batch_size: Samples of a step, drawn uniformly; with replacement from a smaller memory.
        distillation: :math:`\lambda`, at least 0.
        reduction: ``"mean"`` or ``"sum"`` over the classes.
        lr: First learning rate of a phase; when ``None`` as for :class:`FPF`.
        momentum: Of the phase's SGD.
        clip: Largest gradient norm; not clipped when ``None``.
        restart: Forget the main optimizer's state (momentum) of the chosen modules after a phase.
        seed: Seed of the memory and the draws.
        device: Where the memory is kept; beside the batches when ``None``.

    Raises:
        ConfigurationError: If a value is out of range, or nothing chosen is trainable.

    Reference: Zhao et al., *Does Continual Learning Equally Forget All Parameters?*, arXiv 2304.04158.
    """

    def __init__(
        self,
        k: int = 9,
        *,
        capacity: int = 200,
        select: str | Sequence[str] = "preset",
        steps: int = 100,
        batch_size: int = 32,
        distillation: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        lr: float | None = None,
        momentum: float = 0.0,
        clip: float | None = None,
        restart: bool = True,
        seed: int = 0,
        device: str | None = None,
    ) -> None:
        super().__init__(select, steps, batch_size, lr, momentum, clip, restart, seed)
        check_whole("k", k, 0)
        if distillation < 0:
            raise ConfigurationError(f"distillation={distillation} is not possible; use 0 or more.")
        check_choice("reduction", reduction, ("mean", "sum"))
        self.k, self.distillation, self.reduction = k, distillation, reduction
        self.buffer = ReservoirBuffer(capacity, seed=seed, device=device)
        self._logits: Tensor | None = None
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_memory(trainer, self.buffer)
        if self.distillation > 0:
            check_pairs(trainer, "KFPF(distillation=...)", "use distillation=0")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.buffer.to(pl_module.device)
        if self.distillation > 0:
            check_output(trainer, pl_module, "KFPF(distillation=...)", "use distillation=0")
            check_whole_head(trainer, pl_module, "KFPF(distillation=...)")
        self._triggers = set(triggers(stream_data(trainer).total_steps, self.k))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._size = size_of(batch)

    def loss_term(self, trainer: Trainer, module: LightningModule, batch: Any, loss: Tensor) -> Tensor | None:
        if self.distillation > 0:
            # other strategies append to the batch
            inputs = stream_data(trainer).stream.inputs_of(batch)
            self._logits = outputs(module, *inputs)[: self._size].detach()
        return None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        sample = batch if self._logits is None else (*batch, self._logits)
        self.buffer.insert(gather_batch(trainer, sample))
        step, last, self._last_step = stream_data(trainer).step, self._last_step, stream_data(trainer).step
        if step != last and step in self._triggers:
            self.finetune(trainer, pl_module, self.buffer.contents())

    def phase_loss(self, module: LightningModule, batch: Any) -> Tensor:
        if self.distillation == 0:
            return task_loss(module, batch, own_backward=True)
        *pair, old = batch
        inputs = stream_data(module.trainer).stream.inputs_of(pair)
        loss, new = task_loss_and_outputs(module, tuple(pair), inputs, own_backward=True)
        distance = mse_loss(new.float(), old.float(), reduction=self.reduction)
        return loss + self.distillation * (distance if self.reduction == "mean" else distance / len(old))

    def remembered(self) -> Any:
        held = self.buffer.contents()
        return held[:-1] if self.distillation > 0 and held is not None else held

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "buffer": self.buffer.state_dict(), "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.buffer.load_state_dict(state_dict["buffer"])
        self._last_step = state_dict["last_step"]


def triggers(total_steps: int, k: int) -> list[int]:
    r"""Return the steps :math:`\lfloor jS/k \rfloor`, :math:`j = 1..k`, after which the phases run, each once."""
    return sorted({j * total_steps // k for j in range(1, k + 1)} - {0})


def preset(module: nn.Module, kind: str) -> str:
    """Return the kinds of modules that forget most in a kind of stream: see :class:`FPF`."""
    chosen = select(module, "all")
    kinds = {part.kind for part in chosen}
    has_statistics = any(part.is_statistics for part in chosen)
    domain = kind == "domain-incremental"
    wanted = [
        *(["norm"] if "norm" in kinds else []),
        *(["first"] if domain else []),
        *(["head"] if not (domain and has_statistics) else []),
    ]
    return "+".join(wanted)


def _n_classes(memory: Any) -> int:
    try:
        return len(torch.unique(labels_of(memory)))
    except ConfigurationError:
        return size_of(memory)


def _find_drift(trainer: Trainer) -> ModuleDrift:
    for callback in callbacks_of(trainer, ModuleDrift):
        return callback
    raise ConfigurationError(
        "select='drift' needs the measurements of a ModuleDrift callback; add one (callbacks=module_drift), or use "
        "select='preset'."
    )


@contextmanager
def _own_gradients(params: list[nn.Parameter]) -> Iterator[None]:
    """Leave the main optimizer's gradients as they are."""
    kept = [param.grad for param in params]
    try:
        yield
    finally:
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad
