"""What loggers get beside the curves: what is known of the stream, the final metrics, and the figures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from clkit.data.stream import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_stream(loggers: Sequence[Logger], stream: Stream) -> None:
    """Log a stream's name and kind, and which experience a curve ``E0``, ``E1``, ... is of, as hyper-parameters."""
    names = {f"E{experience.index}": experience.name for experience in stream}
    for logger in loggers:
        logger.log_hyperparams({"stream": {"name": stream.name, "kind": stream.kind, "experiences": names}})


def log_final(loggers: Sequence[Logger], metrics: Mapping[str, float | None], prefix: str, step: int) -> None:
    """Log the metrics of a run that are defined, with its hyper-parameters where a logger compares runs by both."""
    final = {f"{prefix}/{name}": value for name, value in metrics.items() if value is not None and math.isfinite(value)}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(logger.hparams, final, step)
        else:
            logger.log_metrics(final, step)


def take_figures(loggers: Sequence[Logger]) -> list[Logger]:
    """Return the loggers that can show figures."""
    return [logger for logger in loggers if isinstance(logger, (TensorBoardLogger, WandbLogger, MLFlowLogger))]


def log_figure(loggers: Sequence[Logger], name: str, figure: Figure, step: int) -> None:
    """Show a figure in those of :func:`take_figures`."""
    from PIL import Image

    from clkit.report.figures import save

    drawn = io.BytesIO()
    save(figure, drawn, "png")
    image = Image.open(drawn).convert("RGB")
    for logger in loggers:
        experiment: Any = cast(Any, logger).experiment
        if isinstance(logger, TensorBoardLogger):
            experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image])
        elif isinstance(logger, MLFlowLogger):
            experiment.log_image(logger.run_id, image, f"{name}.png")
