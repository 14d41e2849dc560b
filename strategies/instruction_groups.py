"""Tasks with similar instructions share their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.errors import ConfigurationError, check_choice
from clkit.language.dataset import InstructionDataset
from clkit.language.records import Record
from clkit.language.similarity import Similarity, mean_similarity, tfidf_cosine
from clkit.method.routing import Router

PARTS = ("instruction", "first_line", "second_line", "last_line", "before_colon")


class InstructionGroups(Router):
    r"""Reuse trainable weights for tasks whose instructions are alike, and start new ones for others (LCIA's codebook).

    Each group owns a set of trainable weights (an adapter) and a list of instructions :math:`H_k`. A task with the
    instructions :math:`C` is as near to group :math:`k` as the mean similarity of all pairs,

    .. math:: s_k = \frac{1}{|C||H_k|} \sum_{u \in C} \sum_{v \in H_k} s(u, v)

    If :math:`\max_k s_k \ge \tau` the first best group is trained on, and learns the instructions it has not seen; else
    a new group starts from the last weights. A held-out sample is predicted by the group nearest to its own
    instruction, below :math:`\tau` by the newest group, as the published code does, or the nearest one (``fallback``).

    With :class:`EMABalance` after it, the average runs only in experiences that reuse a group.

    Args:
        threshold: :math:`\tau` in [0, 1]; the published code uses 0.9 where a task has one instruction, 0.3 where it
            has many.
        similarity: ``"tfidf"`` (:func:`~clkit.language.similarity.tfidf_cosine`), or a function of two texts, such as
            :class:`~clkit.language.similarity.EmbeddingCosine`.
        instruction: What a record's instruction is: its entry ``"instruction"``; of the last message the
            ``"first_line"``, ``"second_line"`` or ``"last_line"``, or of that what is ``"before_colon"``; or a function
            of the record.
        start: What a new group starts from: the ``"last"`` weights, or the ``"initial"`` ones.
        fallback: ``"newest"`` or ``"nearest"``.

    Attributes:
        instructions: The instructions of each group.

    Raises:
        ConfigurationError: If a value is out of range, the stream has no instructions, or a record lacks its own.

    Reference: Qiao et al., *Large Continual Instruction Assistant*, arXiv 2410.10868.
    """

    def __init__(
        self,
        threshold: float = 0.9,
        *,
        similarity: Similarity | Literal["tfidf"] = "tfidf",
        instruction: str | Callable[[Record], str] = "instruction",
        start: Literal["last", "initial"] = "last",
        fallback: Literal["newest", "nearest"] = "newest",
    ) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ConfigurationError(f"threshold={threshold} is not possible; use a number from 0 to 1.")
        for name, value, known in (
            ("start", start, ("last", "initial")),
            ("fallback", fallback, ("newest", "nearest")),
        ):
            check_choice(name, value, known)
        if isinstance(instruction, str) and instruction not in PARTS:
            raise ConfigurationError(f"instruction={instruction!r} is unknown; use {', '.join(PARTS)} or a function.")
        if isinstance(similarity, str) and similarity != "tfidf":
            raise ConfigurationError(f"similarity={similarity!r} is unknown; use tfidf or a function of two texts.")
        self.threshold, self.start, self.fallback = threshold, start, fallback
        self.similarity: Similarity = tfidf_cosine if isinstance(similarity, str) else similarity
        self.instruction = instruction
        self.instructions: list[list[str]] = []
        self._routed: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for experience in stream_data(trainer).stream:
            for dataset in (experience.train, experience.test):
                self._of(experience, dataset, range(len(dataset)))  # type: ignore[arg-type]

    def on_experience_start(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        size = len(experience.train)  # type: ignore[arg-type]
        group = self.match(sorted(set(self._of(experience, experience.train, range(size)))))
        self._routed = {}
        self.enter(trainer, module, f"group {group}", start=self.start)

    def match(self, instructions: Sequence[str]) -> int:
        """Return the number of the group that a task with these instructions belongs to; a new one if need be."""
        group, score = self.nearest(instructions)
        if group is None or score < self.threshold:
            self.instructions.append([])
            group = len(self.instructions) - 1
        own = self.instructions[group]
        own.extend(text for text in instructions if text not in own)
        return group

    def nearest(self, instructions: Sequence[str]) -> tuple[int | None, float]:
        """Return the first group of the highest similarity, and that; ``None`` when there is no group."""
        scores = [mean_similarity(self.similarity, instructions, own) for own in self.instructions]
        return (scores.index(max(scores)), max(scores)) if scores else (None, 0.0)

    def route(self, experience: Experience, dataset: Dataset[Any], rows: Tensor) -> Sequence[str]:
        return [f"group {self._group_of(text)}" for text in self._of(experience, dataset, rows.tolist())]

    def _group_of(self, instruction: str) -> int:
        if instruction not in self._routed:
            group, score = self.nearest([instruction])
            unknown = group is None or (score < self.threshold and self.fallback == "newest")
            self._routed[instruction] = len(self.instructions) - 1 if group is None or unknown else group
        return self._routed[instruction]

    def _of(self, experience: Experience, dataset: Any, rows: Sequence[int]) -> list[str]:
        if not isinstance(dataset, InstructionDataset):
            raise ConfigurationError(
                f"InstructionGroups needs prompts, but experience {experience.index} ({experience.name}) has "
                f"{type(dataset).__name__}; use a stream such as Instructions."
            )
        return [self._read(dataset.records[row]) for row in rows]

    def _read(self, record: Record) -> str:
        if not isinstance(self.instruction, str):
            return self.instruction(record)
        if self.instruction == "instruction":
            if "instruction" not in record.extra:
                raise ConfigurationError(
                    "A record has no 'instruction'; add it to the files, or name a part of the prompt: instruction="
                    f"{', '.join(PARTS[1:])}."
                )
            return str(record.extra["instruction"])
        lines = [line.strip() for line in record.prompt.splitlines() if line.strip()] or [""]
        if self.instruction == "first_line":
            return lines[0]
        if self.instruction == "second_line":
            return lines[min(1, len(lines) - 1)]
        return lines[-1] if self.instruction == "last_line" else lines[-1].partition(":")[0]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "instructions": self.instructions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.instructions = [list(own) for own in state_dict["instructions"]]
