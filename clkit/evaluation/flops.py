"""How much arithmetic a training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clkit.data.datamodule import stream_data
from clkit.data.fresh_start import FreshStart
from clkit.files import result_folder, write_atomically


class Flops(FreshStart):
    """Counts the floating-point operations of a training: matrix products, convolutions and attention.

    All that the strategies do is counted, forward and backward, also at experience ends; evaluation is not. A
    multiplication and an addition are two operations, as in ``torch.utils.flop_counter``, whose formulas these are;
    elementwise operations and the optimizer's are left out. Counting slows a step down: time a training without it.

    Writes ``flops.json``: ``total`` and the list ``experiences``, of this process.

    Args:
        dir: Folder of the file; the trainer's log or root folder when ``None``.
    """

    def __init__(self, *, dir: str | Path | None = None) -> None:
        self._own_dir = None if dir is None else Path(dir)
        self.counts: list[int] = []
        self._mode: _Counting | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._dir = result_folder(trainer, self._own_dir)
        n = len(stream_data(trainer).stream)
        self.counts = self.counts or [0] * n

    @property
    def total(self) -> int:
        """Operations so far."""
        return sum(self.counts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mode = _Counting(trainer, self.counts)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            content = {"total": self.total, "experiences": self.counts}
            write_atomically(self._dir / "flops.json", json.dumps(content) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"counts": list(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = list(state_dict["counts"])


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, trainer: Trainer, counts: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trainer, self._counts = trainer, counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not self._trainer.validating:
            k = stream_data(self._trainer).experience.index
            self._counts[k] += int(formula(*args, **kwargs, out_val=result))
        return result
