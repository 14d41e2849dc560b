"""Greedy generation of answers, and their scores at the end of every experience."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from filelock import FileLock, Timeout
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from clkit.data.datamodule import stream_data
from clkit.data.stream import Experience
from clkit.distributed import holds_shards, own_share
from clkit.errors import ConfigurationError, check_whole
from clkit.evaluation.subsets import choose
from clkit.evaluation.token_scores import is_encoder_decoder, language_model, positions
from clkit.files import result_folder, set_aside, write_atomically
from clkit.language.answers import score_answer
from clkit.language.blind import another_image, grey_image
from clkit.language.dataset import InstructionDataset, Pad, Sample
from clkit.language.images import ImageTable, reader_of
from clkit.language.models import transformers
from clkit.method.evaluation_mode import untouched
from clkit.method.routing import by_route, route_of
from clkit.method.strategy import chosen_view, views_of
from clkit.metrics.functional import language_summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    module: nn.Module,
    prompts: Sequence[Tensor | Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    ends: Sequence[int] = (),
    images: ImageTable | None = None,
) -> list[str]:
    """Return the greedy answer to each prompt, without special tokens and outer white space.

    Prompts of similar length are padded on the left to one batch, with a cache of keys and values; each answer ends at
    the end token or after ``max_new_tokens``.

    Args:
        module: A language model of transformers or peft, or a module that holds one.
        prompts: Token numbers, ``int64`` ``[S]`` each; with images, samples as
            :meth:`~clkit.language.dataset.InstructionDataset.question` returns them.
        tokenizer: The model's.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts at once.
        ends: More tokens that end an answer than the tokenizer's and the model's.
        images: Where the images of prompts are read.
    """
    samples = [{"input_ids": prompt} if isinstance(prompt, Tensor) else prompt for prompt in prompts]
    model = language_model(module)
    device = model.get_input_embeddings().weight.device
    config = _greedy(model, tokenizer, max_new_tokens, ends)
    pad, answers = Pad("left", images), [""] * len(samples)
    pad.prepare(module)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad([samples[i] for i in chosen])
        width = batch["input_ids"].shape[1]
        batch.pop("position_ids", None)
        inputs = {key: part.to(device) for key, part in batch.items()}
        if "images" in inputs:
            inputs = reader_of(model).inputs(model, inputs)
        written = model.generate(**inputs, generation_config=config)[:, width:]
        for i, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            answers[i] = text.strip()
    return answers


def _greedy(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, more: Sequence[int]) -> Any:
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends]) | {tokenizer.eos_token_id, *more}
    return transformers().GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


class AnswerScores(Callback):
    """Lets the model answer held-out prompts of every experience seen, after each one, and scores the answers.

    With greedy generation, for streams of :class:`~clkit.language.dataset.InstructionDataset`. Each answer is scored by
    the dataset's metric twice: by its content, and strictly, where its format counts too; see
    :func:`~clkit.language.answers.score_answer`. The training goes on as if nothing had happened, bit for bit.

    Writes ``answers.csv`` (experience learned, experience scored, metric, score, strict score, with ``blind`` the
    scores without seeing, number of answers), the answers themselves to ``answers/after_K.jsonl``, and at the end
    ``answers.json``: the score matrices and their summary, see :func:`~clkit.metrics.functional.language_summary`.

    Args:
        subset: Held-out samples of each experience; all when ``None`` or more than there are.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts at once.
        blind: So many of these samples, of those with images, are also asked with another sample's image and with a
            grey one: what the score is without seeing. Both are read by content, as ``wrong_image`` and
            ``grey_image`` beside the scores.
        split: ``"test"`` or ``"val"``.
        view: Weights to answer with: a view that a strategy offers, or ``"live"``. When ``None``, what the last
            strategy with a ``prediction`` predicts with, else the live ones.
        dir: Folder of the files; the trainer's log or root folder when ``None``.
        seed: Seed of the choice of the samples.

    Attributes:
        rows: What ``answers.csv`` holds.

    Raises:
        ConfigurationError: If a number is out of range, the stream has other datasets, or a prompt and its answer have
            more tokens than the model has positions.
    """

    def __init__(
        self,
        subset: int | None = 100,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        blind: int = 0,
        split: str = "test",
        view: str | None = None,
        dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        check_whole("blind", blind, 0)
        for name, value in (("subset", subset), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value is not None:
                check_whole(name, value, 1)
        if split not in ("test", "val"):
            raise ConfigurationError(f"split={split!r} is unknown; use test or val.")
        self.subset, self.max_new_tokens, self.batch_size, self.blind = subset, max_new_tokens, batch_size, blind
        self.split, self.view, self.seed = split, view, seed
        self._own_dir = None if dir is None else Path(dir)
        self.dir = Path()
        self.rows: list[dict[str, Any]] = []
        self._lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for experience in stream_data(trainer).stream:
            if not isinstance(getattr(experience, self.split), InstructionDataset):
                raise ConfigurationError(
                    f"AnswerScores needs prompts and answers, but the {self.split} data of experience "
                    f"{experience.index} ({experience.name}) is {type(getattr(experience, self.split)).__name__}; use "
                    "a stream such as Instructions, or another split."
                )
            data = getattr(experience, self.split)
            for i in choose(len(data), self.subset, self.seed, experience.index).tolist():
                # a reference that the metric cannot read is better found before the training than after
                self._scored(data, i, data.records[i].answer)
        if self.blind and all(self._data(trainer, k).images is None for k in range(len(stream_data(trainer).stream))):
            raise ConfigurationError(
                f"blind={self.blind} asks questions without their images, but the stream is of texts alone; use "
                "blind=0, or a stream with a processor."
            )
        # before anything counts the stream's images
        self._instead = [self._stand_ins(trainer, k) for k in range(len(stream_data(trainer).stream))]
        self._evaluated, self._shown = chosen_view(trainer, self.view)
        self.dir = result_folder(trainer, self._own_dir)
        self.rows = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = language_model(pl_module)
        if is_encoder_decoder(model):
            raise ConfigurationError(
                f"AnswerScores lets a model go on with a prompt, but {type(model).__name__} is an encoder-decoder, "
                "whose answers are apart; use a decoder, or score=token_accuracy alone."
            )
        most = positions(model)
        for k in range(len(stream_data(trainer).stream)):
            data = self._data(trainer, k)
            longest = data.prompt_lengths[choose(len(data), self.subset, self.seed, k)].max()
            if most is not None and longest + self.max_new_tokens > most:
                raise ConfigurationError(
                    f"A prompt of experience {k} has {longest} tokens; with an answer of max_new_tokens="
                    f"{self.max_new_tokens} that is more than the {most} positions of {type(model).__name__}; lower "
                    "max_new_tokens (callbacks.answers.max_new_tokens), or the stream's max_length."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = FileLock(self.dir / ".answers.lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigurationError(
                f"An AnswerScores in another process writes its answers into {self.dir}; give each a dir of its own."
            ) from error
        # answers of an earlier run in the folder
        if trainer.global_step == 0:
            for name in ("answers", "answers.csv", "answers.json"):
                set_aside(self.dir / name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None and self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def on_experience_end(self, trainer: Trainer, module: LightningModule, experience: Experience) -> None:
        tasks = range(experience.index + 1)
        with untouched(trainer, module), self._shown(module):
            found = [self._answers(trainer, module, k) for k in tasks]
            unseen = {name: [self._unseeing(trainer, module, k, name) for k in tasks] for name in self._unseen}
        if not trainer.is_global_zero:
            return
        for k, answers in enumerate(found):
            row = {"after": experience.index, "experience": k, "metric": self._data(trainer, k).metric}
            row |= {reading: _mean(answers, reading) for reading in ("score", "strict")}
            row |= {name: _mean(blind[k], "score") for name, blind in unseen.items()}
            self.rows.append({**row, "n": len(answers)})
        lines = [json.dumps({"experience": k, **answer}) for k, answers in enumerate(found) for answer in answers]
        write_atomically(
            self.dir / "answers" / f"after_{experience.index}.jsonl", "".join(line + "\n" for line in lines)
        )
        self._write_rows()

    @property
    def _unseen(self) -> tuple[str, ...]:
        return ("wrong_image", "grey_image") if self.blind else ()

    def _answers(self, trainer: Trainer, module: LightningModule, k: int) -> list[dict[str, Any]]:
        """Answers to the chosen samples of experience ``k``, all of them on every process."""
        data = self._data(trainer, k)
        return self._asked(trainer, module, k, choose(len(data), self.subset, self.seed, k).tolist(), data.question)

    def _stand_ins(self, trainer: Trainer, k: int) -> dict[str, dict[int, Tensor]]:
        """Numbers of the images that are shown in place of its own, by kind and sample, of experience ``k``."""
        data = self._data(trainer, k)
        found: dict[str, dict[int, Tensor]] = {name: {} for name in self._unseen}
        if not self.blind or data.images is None:
            return found
        chosen = choose(len(data), self.subset, self.seed, k).tolist()
        rows = [i for i in chosen if data.records[i].images]
        for name, other in zip(found, (another_image(data, rows), grey_image(data.images)), strict=True):
            for i in rows[: self.blind]:
                numbers = [other(n) for n in data.question(i)["images"].tolist()]
                if None not in numbers:
                    found[name][i] = torch.tensor(numbers)
        return found

    def _unseeing(self, trainer: Trainer, module: LightningModule, k: int, name: str) -> list[dict[str, Any]]:
        """Answers to questions of experience ``k`` whose images are others."""
        data, shown = self._data(trainer, k), self._instead[k][name]
        return self._asked(trainer, module, k, list(shown), lambda i: {**data.question(i), "images": shown[i]})

    def _asked(
        self,
        trainer: Trainer,
        module: LightningModule,
        k: int,
        chosen: list[int],
        question: Callable[[int], Sample],
    ) -> list[dict[str, Any]]:
        data = self._data(trainer, k)
        own = chosen[own_share(trainer)]
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        scored, views = [], views_of(trainer)
        for name, rows in by_route(
            route_of(trainer), stream_data(trainer).stream[k], data, torch.tensor(own, dtype=torch.int64)
        ).items():
            with views[name](module):
                questions = [question(i) for i in rows.tolist()]
                texts = generate(module, questions, data.tokenizer, ends=data.ends, images=data.images, **settings)
            scored += [self._scored(data, i, text) for i, text in zip(rows.tolist(), texts, strict=True)]
        parts: list[Any] = [scored]
        if trainer.world_size > 1 and not holds_shards(trainer):
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, scored)
        return sorted((answer for part in parts for answer in part), key=lambda answer: int(answer["sample"]))

    def _scored(self, data: InstructionDataset, i: int, text: str) -> dict[str, Any]:
        record = data.records[i]
        choices = record.extra.get("choices")
        about: dict[str, Any] = {
            "source": record.extra.get("source", record.prompt),
            "choices": len(choices) if isinstance(choices, list) else None,
        }
        score, strict = (score_answer(data.metric, text, record.answer, strict=s, **about) for s in (False, True))
        return {"sample": i, "answer": text, "reference": record.answer, "score": score, "strict": strict}

    def _data(self, trainer: Trainer, k: int) -> InstructionDataset:
        return cast(InstructionDataset, getattr(stream_data(trainer).stream[k], self.split))

    def matrix(self, reading: str = "score") -> Tensor:
        """Return :math:`R_{t,i}`, the mean score on experience ``i`` after experience ``t``, ``[T, T]``, else NaN.

        Args:
            reading: ``"score"`` or ``"strict"``; with ``blind`` also ``"wrong_image"`` or ``"grey_image"``.
        """
        n = 1 + max((row["after"] for row in self.rows), default=-1)
        found = torch.full((n, n), torch.nan, dtype=torch.float64)
        for row in self.rows:
            found[row["after"], row["experience"]] = math.nan if row[reading] is None else row[reading]
        return found

    def _write_rows(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(self.dir / "answers.csv", text.getvalue())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.rows:
            return
        stream = stream_data(trainer).stream
        content: dict[str, Any] = {
            "experiences": [experience.name for experience in stream],
            "metrics": [self._data(trainer, k).metric for k in range(len(stream))],
            "view": self._evaluated,
            "subset": self.subset,
        }
        for reading in ("score", "strict", *self._unseen):
            matrix = self.matrix(reading)
            rows = [[_number(value) for value in row] for row in matrix.tolist()]
            numbers = {name: _number(value) for name, value in language_summary(matrix).items()}
            content[reading] = {"matrix": rows, **numbers}
        write_atomically(self.dir / "answers.json", json.dumps(content, indent=2, allow_nan=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


def _mean(answers: Sequence[Mapping[str, Any]], reading: str) -> float | None:
    return sum(answer[reading] for answer in answers) / len(answers) if answers else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
