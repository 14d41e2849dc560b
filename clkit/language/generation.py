"""Greedy generation of answers, and their scores at the end of every experience."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from clkit.language.models import check_layout, transformers
from clkit.method.evaluation_mode import untouched
from clkit.method.routing import Around, around_batches, by_route, route_of
from clkit.method.strategy import chosen_view, views_of
from clkit.metrics.functional import general_ability_delta, language_summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BEFORE = -1
"""Stands for no experience learned yet."""
_GENERAL = 1_000_000
"""Index of the first general task, beyond those of any stream."""


class Answer(NamedTuple):
    """What a model wrote.

    Args:
        text: Without special tokens and outer white space.
        is_cut: Whether it was not at its end when the most tokens were written.
    """

    text: str
    is_cut: bool


def generate(
    module: nn.Module,
    prompts: Sequence[Tensor | Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    ends: Sequence[int] = (),
    images: ImageTable | None = None,
    around: Around = lambda places: nullcontext(),
) -> list[str]:
    """Return the greedy answer to each prompt, without special tokens and outer white space.

    Prompts of similar length are padded to one batch (on the left, but for encoder-decoders), with a cache of keys and
    values; each answer ends at the end token or after ``max_new_tokens``.

    Args:
        module: A language model of transformers or peft, or a module that holds one.
        prompts: Token numbers, ``int64`` ``[S]`` each; with images, samples as
            :meth:`~clkit.language.dataset.InstructionDataset.question` returns them.
        tokenizer: The model's.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts at once.
        ends: More tokens that end an answer than the tokenizer's and the model's.
        images: Where the images of prompts are read.
        around: Makes the context in which a batch is answered, from the places of its prompts in ``prompts``.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "around": around}
    return [answer.text for answer in answers_to(module, prompts, tokenizer, ends=ends, images=images, **settings)]


@torch.no_grad()
def answers_to(
    module: nn.Module,
    prompts: Sequence[Tensor | Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    ends: Sequence[int] = (),
    images: ImageTable | None = None,
    around: Around = lambda places: nullcontext(),
) -> list[Answer]:
    """Return what :func:`generate` does, and whether each answer was cut."""
    samples = [{"input_ids": prompt} if isinstance(prompt, Tensor) else prompt for prompt in prompts]
    model = language_model(module)
    device = model.get_input_embeddings().weight.device
    config = _greedy(model, tokenizer, max_new_tokens, ends)
    stops = torch.tensor(config.eos_token_id, device=device)
    is_apart = is_encoder_decoder(model)
    pad, answers = Pad("right" if is_apart else "left", images), [Answer("", False)] * len(samples)
    pad.prepare(module)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad([samples[i] for i in chosen])
        start_at = 1 if is_apart else batch["input_ids"].shape[1]
        batch.pop("position_ids", None)
        inputs = {key: part.to(device) for key, part in batch.items()}
        if "images" in inputs:
            inputs = reader_of(model).inputs(model, inputs)
        with around(chosen):
            written = write_on(model, inputs, config)[:, start_at:]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        cut = ~torch.isin(written, stops).any(dim=1)
        for i, text, is_cut in zip(chosen, texts, cut.tolist(), strict=True):
            answers[i] = Answer(text.strip(), is_cut)
    return answers


def write_on(model: Any, inputs: dict[str, Any], config: Any) -> Tensor:
    """Return the tokens that a model generates by a generation config and nothing else, the inputs' before them.

    Args:
        model: A language model of transformers or peft.
        inputs: Arguments of its ``generate``.
        config: The config. transformers would add what the model's own says and this one does not.
    """
    with _own_settings_aside(model):
        written: Tensor = model.generate(**inputs, generation_config=config)
    return written


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Leave out what a model's generation config adds to any other: beams, penalties, a forced end."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(inner, "generation_config", None)
    if own is None:
        yield
        return
    inner.generation_config = transformers().GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _greedy(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, more: Sequence[int]) -> Any:
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends]) | {tokenizer.eos_token_id, *more}
    # what an encoder-decoder's answer begins with
    begins = ("decoder_start_token_id", "forced_bos_token_id") if is_encoder_decoder(model) else ()
    return transformers().GenerationConfig(
        **{name: getattr(own, name, None) for name in begins},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


@dataclass(frozen=True)
class _Task:
    """Questions of an experience, or of a general task, which has an index beyond all experiences.

    Args:
        experience: The experience.
        data: Its held-out data.
        chosen: The samples that are asked.
    """

    experience: Experience
    data: InstructionDataset
    chosen: list[int]

    @property
    def is_general(self) -> bool:
        return self.experience.index >= _GENERAL

    @property
    def about(self) -> dict[str, Any]:
        """What rows and lines say of it."""
        return {"experience": None if self.is_general else self.experience.index, "task": self.experience.name}


class AnswerScores(Callback):
    """Lets the model answer held-out prompts of every experience seen, after each one, and scores the answers.

    With greedy generation, for streams of :class:`~clkit.language.dataset.InstructionDataset`. Each answer is scored by
    the dataset's metric twice: by its content, and strictly, where its format counts too; see
    :func:`~clkit.language.answers.score_answer`. The stream's ``general`` tasks, which are never trained on, are asked
    each time too; their scores are kept apart. The training goes on as if nothing had happened, bit for bit.

    Writes ``answers.csv`` (experience learned, -1 before the first; experience scored, none for a general task; task,
    metric, score, strict score, with ``blind`` the scores without seeing, share of cut answers, number of answers), the
    questions and answers themselves to ``answers/after_K.jsonl``, and at the end ``answers.json``: the score matrices
    and their summary, see :func:`~clkit.metrics.functional.language_summary`.

    Args:
        subset: Held-out samples of each task; all when ``None`` or more than there are.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts at once.
        before: Also ask before the training, all tasks: what the model knows of them without it
            (``answers/before.jsonl``).
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
        before: bool = False,
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
        self.before, self.split, self.view, self.seed = before, split, view, seed
        self._own_dir = None if dir is None else Path(dir)
        self.dir = Path()
        self.rows: list[dict[str, Any]] = []
        self._tasks: list[_Task] = []
        self._general: list[_Task] = []
        self._lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stream = stream_data(trainer).stream
        self._tasks = [self._task(experience) for experience in stream]
        self._general = [self._task(replace(e, index=_GENERAL + k)) for k, e in enumerate(stream.general)]
        for task in (*self._tasks, *self._general):
            for i in task.chosen:
                # a reference that the metric cannot read is better found before the training than after
                _scored(task.data, i, task.data.records[i].answer)
        if self.blind and all(task.data.images is None for task in self._tasks):
            raise ConfigurationError(
                f"blind={self.blind} asks questions without their images, but the stream is of texts alone; use "
                "blind=0, or a stream with a processor."
            )
        # before anything counts the stream's images
        self._instead = {task.experience.index: self._stand_ins(task) for task in (*self._tasks, *self._general)}
        self._evaluated, self._shown = chosen_view(trainer, self.view)
        self.dir = result_folder(trainer, self._own_dir)
        self.rows = []

    def _task(self, experience: Experience) -> _Task:
        data = getattr(experience, self.split)
        if not isinstance(data, InstructionDataset):
            raise ConfigurationError(
                f"AnswerScores needs prompts and answers, but the {self.split} data of {experience.name} is "
                f"{type(data).__name__}; use a stream such as Instructions, or another split."
            )
        return _Task(experience, data, choose(len(data), self.subset, self.seed, experience.index).tolist())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = language_model(pl_module)
        most, is_apart = positions(model), is_encoder_decoder(model)
        for task in (*self._tasks, *self._general):
            check_layout(model, task.data)
            longest = int(task.data.prompt_lengths[task.chosen].max())
            # a decoder begins with a mark
            needed = max(longest, 1 + self.max_new_tokens) if is_apart else longest + self.max_new_tokens
            if most is not None and needed > most:
                raise ConfigurationError(
                    f"A prompt of {task.experience.name} has {longest} tokens; with an answer of max_new_tokens="
                    f"{self.max_new_tokens} that is more than the {most} positions of {type(model).__name__}; lower "
                    "max_new_tokens (callbacks.answers.max_new_tokens), or the stream's max_length."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._take_folder(trainer)
        for task in self._general:
            # a strategy that cannot say what predicts them had better say so now
            self._routed(trainer, task, task.chosen)
        if self.before and trainer.global_step == 0:
            self.rows = []
            self._ask(trainer, pl_module, BEFORE, self._tasks)

    def _take_folder(self, trainer: Trainer) -> None:
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
        self._ask(trainer, module, experience.index, self._tasks[: experience.index + 1])

    def _ask(self, trainer: Trainer, module: LightningModule, after: int, tasks: Sequence[_Task]) -> None:
        """Ask tasks and the general ones, and note the answers."""
        asked = [*tasks, *self._general]
        with untouched(trainer, module), self._shown(module):
            found = [self._asked(trainer, module, task, task.chosen, task.data.question) for task in asked]
            unseen = {name: [self._unseeing(trainer, module, task, name) for task in asked] for name in self._unseen}
        if not trainer.is_global_zero:
            return
        for k, (task, answers) in enumerate(zip(asked, found, strict=True)):
            row = {"after": after, **task.about, "metric": task.data.metric}
            row |= {reading: _mean(answers, reading) for reading in ("score", "strict")}
            row |= {name: _mean(blind[k], "score") for name, blind in unseen.items()}
            self.rows.append({**row, "cut": _mean(answers, "cut"), "n": len(answers)})
        lines = [
            json.dumps({**task.about, **answer}, ensure_ascii=False)
            for task, answers in zip(asked, found, strict=True)
            for answer in answers
        ]
        name = "before" if after == BEFORE else f"after_{after}"
        write_atomically(self.dir / "answers" / f"{name}.jsonl", "".join(line + "\n" for line in lines))
        self._write_rows()

    @property
    def _unseen(self) -> tuple[str, ...]:
        return ("wrong_image", "grey_image") if self.blind else ()

    def _stand_ins(self, task: _Task) -> dict[str, dict[int, Tensor]]:
        """Numbers of the images that are shown in place of a task's own, by kind and sample."""
        data = task.data
        found: dict[str, dict[int, Tensor]] = {name: {} for name in self._unseen}
        if not self.blind or data.images is None:
            return found
        rows = [i for i in task.chosen if data.records[i].images]
        for name, other in zip(found, (another_image(data, rows), grey_image(data.images)), strict=True):
            for i in rows[: self.blind]:
                numbers = [other(n) for n in data.question(i)["images"].tolist()]
                if None not in numbers:
                    found[name][i] = torch.tensor(numbers)
        return found

    def _unseeing(self, trainer: Trainer, module: LightningModule, task: _Task, name: str) -> list[dict[str, Any]]:
        """Answers to questions of a task whose images are others."""
        data, shown = task.data, self._instead[task.experience.index][name]
        return self._asked(trainer, module, task, list(shown), lambda i: {**data.question(i), "images": shown[i]})

    def _routed(self, trainer: Trainer, task: _Task, rows: list[int]) -> dict[str, Tensor]:
        """Split samples by the view that predicts them."""
        return by_route(route_of(trainer), task.experience, task.data, torch.tensor(rows, dtype=torch.int64))

    def _asked(
        self,
        trainer: Trainer,
        module: LightningModule,
        task: _Task,
        chosen: list[int],
        question: Callable[[int], Sample],
    ) -> list[dict[str, Any]]:
        """Answers to samples of a task, all of them on every process."""
        data = task.data
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        scored, views = [], views_of(trainer)
        for name, rows in self._routed(trainer, task, chosen[own_share(trainer)]).items():
            around = around_batches(trainer, module, task.experience, data, rows)
            with views[name](module):
                questions = [question(i) for i in rows.tolist()]
                found = answers_to(
                    module, questions, data.tokenizer, ends=data.ends, images=data.images, around=around, **settings
                )
            scored += [
                {**_scored(data, i, answer.text), "cut": answer.is_cut}
                for i, answer in zip(rows.tolist(), found, strict=True)
            ]
        parts: list[Any] = [scored]
        if trainer.world_size > 1 and not holds_shards(trainer):
            parts *= trainer.world_size
            torch.distributed.all_gather_object(parts, scored)
        return sorted((answer for part in parts for answer in part), key=lambda answer: int(answer["sample"]))

    def matrix(self, reading: str = "score") -> Tensor:
        """Return :math:`R_{t,i}`, the mean score on experience ``i`` after experience ``t``, ``[T, T]``, else NaN.

        Args:
            reading: ``"score"`` or ``"strict"``; with ``blind`` also ``"wrong_image"`` or ``"grey_image"``.
        """
        n = 1 + max((row["after"] for row in self.rows), default=-1)
        found = torch.full((n, n), torch.nan, dtype=torch.float64)
        for row in self.rows:
            if row["experience"] is not None and row["after"] != BEFORE:
                found[row["after"], row["experience"]] = _defined(row[reading])
        return found

    def zero_shot(self, reading: str = "score") -> Tensor:
        """Return the mean score on each experience before the training, ``[T]``; NaN where nothing was asked."""
        found = torch.full((len(self._tasks),), torch.nan, dtype=torch.float64)
        for row in self.rows:
            if row["after"] == BEFORE and row["experience"] is not None:
                found[row["experience"]] = _defined(row[reading])
        return found

    def general_matrix(self, reading: str = "score") -> Tensor:
        """Return the mean scores on the G general tasks before the training and after each experience, ``[1 + T, G]``.

        NaN where nothing was asked.
        """
        names = {task.experience.name: k for k, task in enumerate(self._general)}
        n = 2 + max((row["after"] for row in self.rows), default=-1)
        found = torch.full((n, len(names)), torch.nan, dtype=torch.float64)
        for row in self.rows:
            if row["experience"] is None and row["task"] in names:
                found[row["after"] + 1, names[row["task"]]] = _defined(row[reading])
        return found

    def _write_rows(self) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in self.rows for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(self.dir / "answers.csv", text.getvalue())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not any(row["after"] != BEFORE for row in self.rows):
            return
        content: dict[str, Any] = {
            **_named(self._tasks),
            "view": self._evaluated,
            "subset": self.subset,
        }
        for reading in self._readings:
            matrix = self.matrix(reading)
            content[reading] = {"matrix": _numbers(matrix), **_defined_ones(language_summary(matrix))}
            if self.before:
                content[reading]["before"] = _numbers(self.zero_shot(reading))
        if self._general:
            content["general"] = _named(self._general)
            for reading in self._readings:
                matrix = self.general_matrix(reading)
                before, matrix = matrix[0], matrix[1:]
                summary = {"mean": float(matrix[-1].mean()), "delta": general_ability_delta(before, matrix[-1])}
                found = {"matrix": _numbers(matrix), **_defined_ones(summary)}
                content["general"][reading] = {**found, "before": _numbers(before)} if self.before else found
        write_atomically(self.dir / "answers.json", json.dumps(content, indent=2, allow_nan=False) + "\n")

    @property
    def _readings(self) -> tuple[str, ...]:
        return ("score", "strict", *self._unseen)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


def _scored(data: InstructionDataset, i: int, text: str) -> dict[str, Any]:
    """What there is to say of an answer to a sample."""
    record = data.records[i]
    choices = record.extra.get("choices")
    about: dict[str, Any] = {
        "source": record.extra.get("source", record.prompt),
        "choices": len(choices) if isinstance(choices, list) else None,
    }
    score, strict = (score_answer(data.metric, text, record.answer, strict=s, **about) for s in (False, True))
    asked: dict[str, Any] = {"prompt": record.prompt}
    if len(record.messages) > 1:
        asked["messages"] = [{"role": role, "content": content} for role, content in record.messages]
    return {"sample": i, **asked, "answer": text, "reference": record.answer, "score": score, "strict": strict}


def _named(tasks: Sequence[_Task]) -> dict[str, list[str]]:
    return {"experiences": [t.experience.name for t in tasks], "metrics": [t.data.metric for t in tasks]}


def _mean(answers: Sequence[Mapping[str, Any]], reading: str) -> float | None:
    return sum(answer[reading] for answer in answers) / len(answers) if answers else None


def _defined(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(values: Tensor) -> list[Any]:
    """Nested lists with ``None`` for NaN."""
    return [_numbers(row) if row.dim() else _number(float(row)) for row in values]


def _defined_ones(summary: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in summary.items()}
