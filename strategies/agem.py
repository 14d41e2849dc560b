"""Averaged gradient episodic memory."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch.optim import Optimizer

from clkit.data.batch import local_share
from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience, Stream
from clkit.errors import check_whole
from clkit.memory.buffer import ReservoirBuffer
from clkit.memory.storage import ImageMemory
from clkit.method.gradient import add_to_gradients, check_automatic, flatten, loss_gradient, with_gradient
from clkit.method.projection import without_conflict
from clkit.method.setup_checks import check_memory, report_memory
from clkit.method.strategy import Strategy, gives_texts, random_samples


class AGEM(Strategy):
    r"""Remove from the gradient what would raise the loss on a batch of memory.

    .. math:: \tilde g = g - \frac{g^\top g_r}{g_r^\top g_r}\, g_r \quad\text{if } g^\top g_r < 0

    :math:`g` is the gradient that the optimizer is about to use (whatever other terms it has), :math:`g_r` that of the
    module's own loss on a batch of memory. The memory gets random samples of each experience at its end.

    Args:
        samples_per_experience: Samples remembered of each experience, at least 1.
        batch_size: Memory samples in the reference gradient, at least 1. When ``None``, 256; as many as a batch has
            (over all processes) where samples are texts, which cost far more.
        seed: Seed of the memory's own random numbers.
        images: What the memory keeps of images beside texts: ``"references"``, so that they are read from the stream;
            ``"encoded"``, their files; or ``"features"`` of a frozen tower. ``memory.json`` has the bytes.

    Raises:
        ConfigurationError: If a number is out of range.

    Reference: Chaudhry et al., *Efficient Lifelong Learning with A-GEM*, arXiv 1812.00420, equation 11.
    """

    def __init__(
        self,
        samples_per_experience: int = 200,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        images: ImageMemory = "references",
    ) -> None:
        check_whole("samples_per_experience", samples_per_experience, 1)
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        self.samples_per_experience, self.batch_size, self.seed = samples_per_experience, batch_size, seed
        self.images: ImageMemory = images
        self.memory: ReservoirBuffer | None = None
        self._size = batch_size or 256

    def leaves_first(self, stream: Stream) -> bool:
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_automatic(pl_module, "AGEM")
        if self.memory is None:
            capacity = self.samples_per_experience * len(stream_data(trainer).stream)
            self.memory = ReservoirBuffer(capacity, seed=self.seed, images=self.images)
        check_memory(trainer, self.memory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.memory is not None
        self.memory.to(pl_module.device)
        if self.batch_size is None and gives_texts(trainer):
            self._size = stream_data(trainer).batch_size * trainer.world_size

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        assert self.memory is not None
        self.memory.insert(random_samples(trainer, experience, self.samples_per_experience, self.seed))
        report_memory(trainer, self.memory)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert self.memory is not None
        batch = self.memory.sample(self._size)
        params = with_gradient(pl_module)
        if batch is None or not params:
            return
        batch = move_data_to_device(local_share(trainer, batch), pl_module.device)
        batch = stream_data(trainer).augmented(batch)
        reference = loss_gradient(trainer, pl_module, params, batch)
        gradient = flatten(p.grad for p in params)
        add_to_gradients(params, without_conflict(gradient, reference))

    def remembered(self) -> Any:
        return None if self.memory is None else self.memory.contents()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.memory is None else self.memory.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.memory is not None
        self.memory.load_state_dict(state_dict)
