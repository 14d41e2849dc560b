"""How far each module of a network moves, within and across experiences."""

from __future__ import annotations

import csv
import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from clkit.data.datamodule import stream_data
from clkit.data.fresh_start import FreshStart
from clkit.data.stream import Experience
from clkit.distributed import need_whole_weights
from clkit.errors import check_whole
from clkit.files import result_folder, write_atomically
from clkit.method.module_kinds import Part, parts
from clkit.metrics.drift_file import COLUMNS


class ModuleDrift(FreshStart):
    r"""Measures the change of every module's weights, which tells what forgets, with any strategy.

    Within an experience, from one point to the next (an epoch, or an equal share of the steps), and across experiences,
    at the same point of the one before, for the layers of :func:`clkit.method.module_kinds.parts`:

    .. math:: c^\ell_{t,n} = \tfrac1{|\theta^\ell|} \lVert\theta^\ell_{t,n} - \theta^\ell_{t,n-1}\rVert_1, \qquad
        d^\ell_{t,n} = \tfrac1{|\theta^\ell|} \lVert\theta^\ell_{t+1,n} - \theta^\ell_{t,n}\rVert_1

    BatchNorm's running statistics are parts of their own: their unit is another. Put it after the strategies. Writes
    ``drift.csv`` (a row for each point and module; ``clkit report`` draws it) and logs ``drift/MODULE``. Copies of the
    weights at each point of an experience are held in main memory and in the checkpoint.

    Args:
        points: Measurements in each experience; one per epoch when ``None``.
        dir: Folder of the file; the trainer's log or root folder when ``None``.

    Raises:
        ConfigurationError: If ``points`` is below 1.

    Reference: Zhao et al., *Does Continual Learning Equally Forget All Parameters?*, arXiv 2304.04158.
    """

    def __init__(self, points: int | None = None, *, dir: str | Path | None = None) -> None:
        if points is not None:
            check_whole("points", points, 1)
        self.points = points
        self._own_dir = None if dir is None else Path(dir)
        self._rows: list[tuple[int, int, str]] = []
        self._within: list[Tensor] = []
        self._across: list[Tensor] = []
        self._last: dict[str, Tensor] = {}
        self._here: dict[str, dict[str, Tensor]] = {}
        self._before: dict[str, dict[str, Tensor]] = {}
        self._parts: list[Part] = []
        self._start_step = self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream_data(trainer)
        need_whole_weights(trainer, "ModuleDrift")
        self._dir = result_folder(trainer, self._own_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._parts = parts(pl_module)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        self._start_step = stream_data(trainer).step
        if experience.index == 0:
            self._last = self._copy()
        self._before, self._here = self._here, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = stream_data(trainer)
        step = data.step
        if step == self._last_step:
            return
        self._last_step = step
        k = data.experience.index
        total = data.experience_steps[k]
        points = self.points or data.epochs[k]
        due = [j for j in range(1, points + 1) if j * total // points == step - self._start_step]
        if due:
            self._measure(trainer, k, str(Fraction(due[-1], points)))

    def _measure(self, trainer: Trainer, k: int, point: str) -> None:
        now = self._copy()
        within, across = self._change(now, self._last), self._change(now, self._before.get(point))
        self._rows.append((stream_data(trainer).step, k, point))
        self._within.append(within)
        self._across.append(across)
        self._last = self._here[point] = now
        values = {f"drift/{part.name}": float(value) for part, value in zip(self._parts, within, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _copy(self) -> dict[str, Tensor]:
        tensors = {name: tensor for part in self._parts for name, tensor in part.tensors.items()}
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in tensors.items()}

    def _change(self, new: dict[str, Tensor], old: dict[str, Tensor] | None) -> Tensor:
        if old is None:
            return torch.full((len(self._parts),), math.nan, dtype=torch.float64)
        moved = {name: (new[name] - old[name]).abs().double().sum() for name in new}
        sums = [torch.stack([moved[name] for name in part.tensors]).sum() / part.size for part in self._parts]
        return torch.stack(sums)

    def scores(self) -> dict[str, float]:
        r"""Return each layer's sensitivity :math:`s^\ell = \bar d^\ell / \sum_j \bar d^j`.

        From the first two experiences, empty before the second one is over; running statistics are left out.
        """
        rows = [row for row, (_, k, point) in zip(self._across, self._rows, strict=True) if k == 1]
        complete = any(k == 1 and point == "1" for _, k, point in self._rows)
        if not complete:
            return {}
        layers = [(i, part) for i, part in enumerate(self._parts) if not part.is_statistics]
        mean = torch.stack(rows).nanmean(dim=0)
        total = sum(float(mean[i]) for i, _ in layers)
        return {part.name: float(mean[i]) / total if total else math.nan for i, part in layers}

    def sensitive(self, *, budget: float = 0.02, threshold: float | None = None) -> list[str]:
        """Return the most sensitive layers, highest score first; none before two experiences are over.

        Args:
            budget: Largest share of all scalars; the first layer is always taken.
            threshold: Take all with at least this score instead; ``1 / number of layers`` is a natural one.
        """
        scores = self.scores()
        ranked = sorted(scores, key=lambda name: -scores[name])
        if threshold is not None:
            return [name for name in ranked if scores[name] >= threshold]
        sizes = {part.name: part.size for part in self._parts if not part.is_statistics}
        room = budget * sum(sizes.values())
        taken = ranked[:1]
        for name in ranked[1:]:
            if sum(sizes[other] for other in taken) + sizes[name] > room:
                break
            taken.append(name)
        return taken

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row, within, across in zip(self._rows, self._within, self._across, strict=True):
            for part, c, d in zip(self._parts, within.tolist(), across.tolist(), strict=True):
                writer.writerow([*row, part.name, part.kind, part.size, repr(c), "" if math.isnan(d) else repr(d)])
        write_atomically(self._dir / "drift.csv", text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        return {
            "modules": [part.name for part in self._parts],
            "rows": self._rows,
            "within": self._within,
            "across": self._across,
            "copies": {"last": self._last, **{f"here {at}": copy for at, copy in self._here.items()}}
            | {f"before {at}": copy for at, copy in self._before.items()},
            "start_step": self._start_step,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        copies = dict(state_dict["copies"])
        self._last = copies.pop("last")
        self._here = {name.removeprefix("here "): copy for name, copy in copies.items() if name.startswith("here ")}
        self._before = {name.removeprefix("before "): c for name, c in copies.items() if name.startswith("before ")}
        self._rows = [tuple(row) for row in state_dict["rows"]]
        self._within, self._across = list(state_dict["within"]), list(state_dict["across"])
        self._start_step, self._last_step = state_dict["start_step"], state_dict["last_step"]
