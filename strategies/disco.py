"""DISCO: a LoRA for each task, mixed for each sample by how near its prompt is to the tasks'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.utils.data import Dataset

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError
from clkit.language.dataset import InstructionDataset
from clkit.language.records import PLACE
from clkit.language.similarity import TextFeatures, word_features
from clkit.method.adapters import LowRank, lora_layers, renew_adapters
from clkit.method.optimizer import forget_state
from clkit.method.routing import Mixer


class DISCO(Mixer):
    r"""Train a LoRA of its own for each task, and predict a sample with all of them, weighed by its prompt.

    While task :math:`t` trains, its slot :math:`(A_t, B_t)` alone is active: a new one, which is the module's plain
    LoRA adapter. A sample with the text feature :math:`x` is predicted, in all adapted layers, with

    .. math:: \Delta W = s \sum_{i \le t} d_i B_i A_i, \qquad
        d = \operatorname{softmax}_i\big(\cos(x, a_i) / \tau\big)

    where :math:`a_i` is the mean feature of the prompts that task :math:`i` trains on. Features are of the last message
    before the answer, without its images; the answer is not read. The task in training counts from its first step.

    ``StabilityGap``, ``AnswerScores`` and ``clkit eval`` predict so; whatever else calls the module has the last task's
    slot alone, but inside ``mixed``, for a batch in the order of its prompts::

        with disco.mixed(module, disco.weights(prompts)):
            module.net.generate(**batch)

    What is trained beside LoRA (a projector, ``modules_to_save``) is one for all tasks, and carried on from each to the
    next. :class:`EMABalance` averages nothing, since no task trains the slot of another. The state holds the slots of
    earlier tasks: as much as the adapter, for each.

    Args:
        temperature: :math:`\tau`, above 0; published: 0.05.
        features: ``"words"`` (:func:`~clkit.language.similarity.word_features`), which needs no model, or a function of
            a text, such as :class:`~clkit.language.similarity.Embedding`. The published encoder is that of CLIP.
        seed: Seed of the new slots.

    Attributes:
        anchors: :math:`a_i`, ``float64`` ``[D]`` each.
        slots: :math:`A` and :math:`B` of the earlier tasks by layer: ``[T * r, n]``, one below the other, and
            ``[m, T * r]``, side by side.

    Raises:
        ConfigurationError: If a value is not possible, the stream has no prompts, or the module has no plain LoRA
            adapter of linear layers of its language model.

    Reference: Guo et al., *Federated Continual Instruction Tuning*, arXiv 2503.12897; on one machine, without its
    federated part.
    """

    def __init__(
        self, temperature: float = 0.05, *, features: TextFeatures | Literal["words"] = "words", seed: int = 0
    ) -> None:
        if not temperature > 0:
            raise ConfigurationError(f"temperature={temperature} is not possible; use a number above 0.")
        if isinstance(features, str) and features != "words":
            raise ConfigurationError(f"features={features!r} is unknown; use words or a function of a text.")
        self.temperature, self.seed = temperature, seed
        self.features: TextFeatures = word_features if isinstance(features, str) else features
        self.anchors: list[Tensor] = []
        self.slots: dict[str, tuple[Tensor, Tensor]] = {}
        self.layers: list[LowRank] = []
        self._weights: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for experience in stream_data(trainer).stream:
            for dataset in (experience.train, experience.test):
                _prompts(experience, dataset, ())
        if getattr(pl_module, "tower", None) == "adapted":
            raise ConfigurationError(
                "DISCO weighs the slots by the sample, but a vision tower sees images, of which a sample may have none "
                "or several; use tower=frozen (model.tower=frozen)."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.layers = lora_layers(pl_module)
        for entry in self.layers:
            base = entry.layer.get_base_layer()
            if not isinstance(base, nn.Linear) or entry.layer.lora_bias[entry.adapter]:
                raise ConfigurationError(
                    f"DISCO mixes the LoRA of linear layers without a bias of its own, but {entry.name} is "
                    f"{type(base).__name__} with lora_bias={entry.layer.lora_bias[entry.adapter]}; choose other "
                    "target_modules, or lora_bias=False."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.slots = move_data_to_device(self.slots, pl_module.device)

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        if self.anchors:
            self._keep_slot()
            renew_adapters(self.layers, self.seed, 52, len(self.anchors))
            forget_state(trainer, [parameter for entry in self.layers for parameter in entry.weights])
        rows = range(len(experience.train))  # type: ignore[arg-type]
        self.anchors.append(self.mean_feature(_prompts(experience, experience.train, rows)))
        self._weights = {}

    @torch.no_grad()
    def _keep_slot(self) -> None:
        for entry in self.layers:
            b, a = entry.factors
            old_a, old_b = self.slots.get(entry.name, (a[:0], b[:, :0]))
            self.slots[entry.name] = torch.cat([old_a, a]), torch.cat([old_b, b], dim=1)

    def mean_feature(self, texts: Sequence[str]) -> Tensor:
        """Return the mean feature of some texts, ``float64`` ``[D]``."""
        total = sum(n * self.features(text) for text, n in Counter(texts).items())
        return torch.as_tensor(total / len(texts))

    def weights(self, texts: Sequence[str]) -> Tensor:
        """Return :math:`d` of samples with these prompts, ``float32`` ``[N, T]``, over the tasks begun so far."""
        if not self.anchors:
            return torch.ones(len(texts), 1)
        anchors = normalize(torch.stack(self.anchors), dim=1)
        for text in {*texts} - self._weights.keys():
            feature = normalize(torch.as_tensor(self.features(text)), dim=0)
            self._weights[text] = (anchors @ feature / self.temperature).softmax(dim=0).float()
        rows = [self._weights[text] for text in texts]
        return torch.stack(rows) if rows else torch.ones(0, len(self.anchors))

    def shares(self, experience: Experience, dataset: Dataset[Any], rows: Tensor) -> Tensor:
        return self.weights(_prompts(experience, dataset, rows.tolist()))

    @contextmanager
    def mixed(self, module: LightningModule, shares: Tensor) -> Iterator[None]:
        for entry in self.layers:
            there = entry.weights[0].device
            slots = move_data_to_device(self.slots.get(entry.name), there)
            entry.layer.lora_variant[entry.adapter] = cast(Any, Slots(entry.name, slots, shares.to(there)))
        try:
            yield
        finally:
            for entry in self.layers:
                del entry.layer.lora_variant[entry.adapter]

    def state_dict(self) -> dict[str, Any]:
        return {"anchors": self.anchors, "slots": self.slots}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.anchors, self.slots = list(state_dict["anchors"]), dict(state_dict["slots"])
        self._weights = {}


class Slots:
    """What peft's layers call in place of their own update while samples are predicted: a ``LoraVariant``.

    Args:
        name: Path of the layer, for messages.
        earlier: ``A`` and ``B`` of the earlier tasks, see :class:`DISCO`; the layer's own adapter is the last slot.
        shares: Weights of the slots, ``[B, T]``.
    """

    def __init__(self, name: str, earlier: tuple[Tensor, Tensor] | None, shares: Tensor) -> None:
        self.name, self.earlier, self.shares = name, earlier, shares

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **options: Any) -> Tensor:
        """Return the layer's output.

        Args:
            module: peft's layer.
            active_adapter: Name of its adapter.
            x: The layer's input, ``[B, ..., n]``.
            result: What the layer makes of it without an adapter, ``[B, ..., m]``.
            **options: None.

        Raises:
            ConfigurationError: If the layer sees something else than one row a sample.
        """
        if x.dim() < 2 or len(x) != len(self.shares):
            raise ConfigurationError(
                f"DISCO weighs the slots by the sample, but {self.name} sees an input of shape {list(x.shape)} for "
                f"{len(self.shares)} samples; leave it out of target_modules."
            )
        # the layer's own weights and not copies: a cache of frozen layers' outputs looks at what is computed with
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        rank = len(a)
        if self.earlier is not None:
            a, b = torch.cat([self.earlier[0], a]), torch.cat([self.earlier[1], b], dim=1)
        inner = linear(module.lora_dropout[active_adapter](x), a)
        shares = self.shares.repeat_interleave(rank, dim=1).to(inner.dtype)
        weighed = inner * shares.view(len(x), *[1] * (x.dim() - 2), -1)
        update: Tensor = linear(weighed, b) * module.scaling[active_adapter]
        return result + update


def _prompts(experience: Experience, dataset: Any, rows: Sequence[int]) -> list[str]:
    """The texts that samples are told apart by."""
    if not isinstance(dataset, InstructionDataset):
        raise ConfigurationError(
            f"DISCO needs prompts, but experience {experience.index} ({experience.name}) has "
            f"{type(dataset).__name__}; use a stream such as Instructions."
        )
    return [dataset.records[row].prompt.replace(PLACE, " ").strip() for row in rows]
