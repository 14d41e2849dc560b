"""Answer style diversification: a part of a task's samples is rewritten into other answer styles."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from clkit.errors import ConfigurationError, check_whole
from clkit.language.generators import CachedGenerator, Generator, parse_object
from clkit.language.records import Record
from clkit.rng import private_rng

INSTRUCTIONS: Mapping[str, str] = {
    "yes_no": "Answer Yes or No.",
    "multiple_choice": "Answer with the letter of the right option.",
    "short_answer": "Answer with a word or a short phrase.",
    "brief": "Answer and explain in about 20 words.",
    "detailed": "Answer and explain in about 50 words.",
}
STYLES = tuple(INSTRUCTIONS)
_WORDS = {"brief": 20, "detailed": 50}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBERS = [*_UNITS.split(), "eighteen", "nineteen"]
_NUMBERS += [ten if n == 0 else f"{ten}-{_NUMBERS[n]}" for ten in _TENS.split() for n in range(10)]
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)}


@dataclass(frozen=True)
class StyleReport:
    """What became of a task's samples.

    Args:
        chosen: Samples that were to be rewritten; ``counts[native]`` is their rest plus all of ``failed``.
        counts: Samples of each style afterwards, the native one included.
        failed: Chosen samples that kept the native style after all, by the style they were chosen for.
        infeasible: Styles that this task cannot be rewritten into; the others share their samples.
    """

    chosen: int
    counts: Mapping[str, int]
    failed: Mapping[str, int]
    infeasible: tuple[str, ...]


class AnswerStyles:
    r"""ASD of SEFE (Chen et al., ICML 2025, arXiv:2505.02486): no task's answer style may dominate a training.

    Of a task's :math:`n` samples, :math:`c = \operatorname{round}(nX/100)` (halves to even) with the smallest
    hash(seed, task, id) are dealt in turn to the other feasible styles, so that their counts differ by at most 1, and
    rewritten; the others keep their prompts and answers. A sample's id is its ``extra["id"]``, else its position.
    Every record's extra gets its ``"style"``. Test sets are not to be given to it.

    - ``yes_no``: asks whether the right answer, or a distractor, is right, in turn; Yes or No.
    - ``multiple_choice``: the right answer and 3 distractors (fewer where there are no more) in random order, also as
      ``extra["choices"]``; a letter.
    - ``short_answer``: without the options of the native prompt; the text of the right one.
    - ``brief``, ``detailed``: explanations of about 20 and 50 words, the record's own (``extra["explanations"]``, a
      mapping of both styles to texts that contain the answer) or generated.

    Distractors are the other options of a multiple-choice sample, the opposite of yes, no, true or false, those that a
    record brings (``extra["distractors"]``, a list of texts), or the other answers of a task that has at most
    ``max_labels`` different ones; else, as the explanations, they come from the generator. What it returns is checked
    (count; distractors differ from the answer and each other, the explanation contains the answer, all up to case,
    space, articles and number words); a bad reply is asked for again, and then the sample stays as it was and is
    counted. Without a generator, styles that need one are infeasible; a native brief or detailed task can only become
    yes_no or multiple_choice.

    Args:
        percent: :math:`X`, from 0 to 100.
        styles: The styles to rewrite into.
        instructions: Response formats by style, appended to rewritten prompts; those left out are ``INSTRUCTIONS``'.
        generator: Takes prompts and returns as many completions, e.g.
            :class:`~clkit.language.generators.OpenAIGenerator`.
        cache: Folder for the generator's completions, so that no run asks twice.
        batch_size: Prompts in one call of the generator, after which its completions are kept.
        retries: How often a bad reply is asked for again.
        max_labels: Up to so many different answers are each other's distractors.
        seed: At least 0.

    Raises:
        ConfigurationError: If an argument is out of range or unknown.
    """

    def __init__(
        self,
        percent: float = 20.0,
        styles: Sequence[str] = STYLES,
        instructions: Mapping[str, str] | None = None,
        generator: Generator | None = None,
        cache: str | Path | None = None,
        batch_size: int = 16,
        retries: int = 2,
        max_labels: int = 50,
        seed: int = 0,
    ) -> None:
        if not 0 <= percent <= 100:
            raise ConfigurationError(f"percent={percent!r} is not possible; use a number from 0 to 100.")
        if unknown := [style for style in (*styles, *(instructions or {})) if style not in STYLES]:
            raise ConfigurationError(f"The answer style {unknown[0]!r} is unknown; known are {', '.join(STYLES)}.")
        for name, value in (("retries", retries), ("max_labels", max_labels), ("seed", seed)):
            check_whole(name, value, 0)
        self.percent = percent
        self.styles = tuple(dict.fromkeys(styles))
        self.instructions = {**INSTRUCTIONS, **(instructions or {})}
        self.generator = None if generator is None else CachedGenerator(generator, cache, batch_size)
        self.retries = retries
        self.max_labels = max_labels
        self.seed = seed

    def __call__(
        self, records: Sequence[Record], task: str, native: str = "short_answer", response_format: str | None = None
    ) -> tuple[list[Record], StyleReport]:
        """Rewrite a part of a task's training samples.

        Args:
            records: The task's samples. Of a multiple-choice task, ``extra["choices"]`` are the options, which stand in
                the prompt as ``A. ...``, ``A) ...`` or ``(A) ...`` one behind the other, and the answer is a letter or
                an option.
            task: Name of the task; with the seed it decides all choices.
            native: The style that the task's answers have.
            response_format: What asks for it in the prompts, to be cut from rewritten ones; by default
                ``instructions[native]``.

        Returns:
            As many records in the same order, and the counts.

        Raises:
            ConfigurationError: If ``native`` is unknown or some sample's answer is not of that style.
        """
        if native not in STYLES:
            raise ConfigurationError(f"The answer style {native!r} is unknown; known are {', '.join(STYLES)}.")
        cut = self.instructions[native] if response_format is None else response_format
        labels = {normalise(record.answer): record.answer.strip() for record in reversed(records)}
        closed = sorted(labels.values()) if native == "short_answer" and len(labels) <= self.max_labels else []
        samples = [_Sample.read(record, i, native, cut, closed) for i, record in enumerate(records)]
        keys = [self._hash(task, str(record.extra.get("id", i))) for i, record in enumerate(records)]

        targets = [style for style in self.styles if style != native]
        feasible = [style for style in targets if self._feasible(style, native, samples)]
        n_chosen = round(len(records) * Fraction(str(self.percent)) / 100) if feasible else 0
        chosen = sorted(range(len(records)), key=lambda i: (keys[i], i))[:n_chosen]
        style_of = {i: feasible[rank % len(feasible)] for rank, i in enumerate(chosen)}
        texts = self._generate({i: _request(style, samples[i]) for i, style in style_of.items()})

        rewritten = {}
        turn = self._hash(task, "yes_no")
        for i, style in style_of.items():
            sample, rng = samples[i], private_rng(keys[i])
            question = sample.asked if style in _WORDS else sample.question
            if question is None or i not in texts:
                continue
            extra = {**records[i].extra, "style": style}
            extra.pop("choices", None)
            wrong = texts[i] or [sample.wrong[k] for k in rng.permutation(len(sample.wrong))[:3]]
            if style == "yes_no":
                turn += 1
                shown, answer = (sample.truth, "Yes") if turn % 2 else (wrong[0], "No")
                question += f'\nIs "{shown}" the right answer?'
            elif style == "multiple_choice":
                options = [sample.truth, *wrong]
                order = rng.permutation(len(options)).tolist()
                extra["choices"] = [options[k] for k in order]
                answer = _LETTERS[order.index(0)]
                question += "".join(f"\n{_LETTERS[k]}. {option}" for k, option in enumerate(extra["choices"]))
            else:
                answer = texts[i][0] if texts[i] else sample.explanations.get(style, sample.truth)
            role = records[i].messages[-1][0]
            message = (role, f"{question}\n{self.instructions[style]}")
            rewritten[i] = replace(
                records[i], messages=(*records[i].messages[:-1], message), answer=answer, extra=extra
            )

        result = [
            rewritten[i] if i in rewritten else replace(record, extra={**record.extra, "style": native})
            for i, record in enumerate(records)
        ]
        failed = Counter(style for i, style in style_of.items() if i not in rewritten)
        counts = Counter(record.extra["style"] for record in result)
        if self.percent > 0 and targets and not feasible:
            rank_zero_warn(
                f"No sample of {task} gets another answer style: each of {', '.join(targets)} would need a generator."
            )
        infeasible = tuple(style for style in targets if style not in feasible)
        return result, StyleReport(
            n_chosen, {style: counts[style] for style in (native, *targets)}, dict(failed), infeasible
        )

    def _feasible(self, style: str, native: str, samples: Sequence[_Sample]) -> bool:
        if style in ("yes_no", "multiple_choice"):
            return self.generator is not None or all(sample.wrong for sample in samples)
        if native in _WORDS:
            return False
        explained = all(style in sample.explanations for sample in samples)
        return style == "short_answer" or self.generator is not None or explained

    def _generate(self, requests: Mapping[int, _Request | None]) -> dict[int, list[str]]:
        """Texts that pass their checks; an empty list for what needs none, and nothing for what failed."""
        texts: dict[int, list[str]] = {i: [] for i, request in requests.items() if request is None}
        pending = {i: request for i, request in requests.items() if request is not None}
        prompts = {i: request.prompt for i, request in pending.items()}
        for attempt in range(1, self.retries + 2):
            if not pending or self.generator is None:
                break
            completions = self.generator([prompts[i] for i in pending])
            for (i, request), completion in zip(list(pending.items()), completions, strict=True):
                try:
                    texts[i] = request.read(parse_object(completion))
                    del pending[i]
                except ValueError as error:
                    prompts[i] = f"{request.prompt}\nReply {attempt} to this could not be used: {error}."
        return texts

    def _hash(self, task: str, name: str) -> int:
        digest = hashlib.sha256(json.dumps([self.seed, task, name]).encode()).digest()
        return int.from_bytes(digest[:8], "big")


def normalise(text: str) -> str:
    """A text without what does not make two answers different: case, space, articles, the way to write a number."""
    words = [re.sub(r"^[\"'(]+|[\"').,;:!?]+$", "", word) or word for word in text.lower().split()]
    words = [_number(_NUMBER_WORDS.get(word, word)) for word in words]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


@dataclass(frozen=True)
class _Sample:
    """A native record taken apart."""

    asked: str  # without the response format
    question: str | None  # and without the options; None if they could not be found
    truth: str
    wrong: list[str]  # by rule; empty if no rule gives any
    explanations: Mapping[str, str]  # the record's own, by style

    @classmethod
    def read(cls, record: Record, position: int, native: str, response_format: str, labels: Sequence[str]) -> _Sample:
        asked = record.prompt
        if response_format:
            asked = re.sub(r"\s*" + re.escape(response_format), "", asked).strip()
        question: str | None = asked
        truth = record.answer.strip()
        if native == "multiple_choice":
            choices = record.extra.get("choices")
            if not isinstance(choices, list | tuple) or not 1 <= len(choices) <= len(_LETTERS):
                raise ConfigurationError(f"Sample {position} is multiple choice without a list of 'choices'; give it.")
            choices = [str(choice).strip() for choice in choices]
            question = _without_options(asked, choices)
            truth = choices[_chosen(truth, choices, position)]
            labels = list({normalise(choice): choice for choice in choices}.values())
        elif native == "yes_no" and truth.lower() not in _OPPOSITE:
            raise ConfigurationError(
                f"Sample {position} of a yes/no task has the answer {truth!r}; use yes or no, or another native style."
            )
        if native != "multiple_choice" and truth.lower() in _OPPOSITE:
            opposite = _OPPOSITE[truth.lower()]
            labels = [opposite.capitalize() if truth[0].isupper() else opposite]
        elif native != "multiple_choice" and "distractors" in record.extra:
            given = record.extra["distractors"]
            if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
                raise ConfigurationError(f"The distractors of sample {position} are no list of texts; mend the record.")
            labels = [text.strip() for text in given]
        wrong = [label for label in labels if normalise(label) != normalise(truth)]
        return cls(asked, question, truth, wrong, _explanations(record, truth, position))


@dataclass(frozen=True)
class _Request:
    prompt: str
    read: Callable[[Mapping[str, Any]], list[str]]


def _request(style: str, sample: _Sample) -> _Request | None:
    """What the generator has to be asked, if anything."""
    given = f"Question: {sample.asked}\nCorrect answer: {sample.truth}\n"
    if style in sample.explanations:
        return None
    if style in _WORDS:
        task = (
            f"Explain this answer in about {_WORDS[style]} words, with what the question says in support of it. The "
            'explanation repeats the correct answer word for word. Reply in JSON only: {"explanation": "..."}'
        )
        return _Request(given + task, lambda reply: [_explanation(reply, sample.truth)])
    if style == "short_answer" or sample.wrong:
        return None
    n = 1 if style == "yes_no" else 3
    task = (
        f"Write exactly {n} wrong answer{'s' * (n > 1)}: plausible, fitting the question, similar in form to the "
        f"correct answer, but clearly wrong. Reply in JSON only: {json.dumps({'distractors': ['...'] * n})}"
    )
    return _Request(given + task, lambda reply: _distractors(reply, sample.truth, n))


def _explanations(record: Record, truth: str, position: int) -> dict[str, str]:
    given = record.extra.get("explanations", {})
    try:
        return {style: _explanation({"explanation": text}, truth) for style, text in given.items()}
    except (AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"The explanations of sample {position} are no texts by style that contain the answer {truth!r}; mend the "
            "record."
        ) from error


def _distractors(reply: Mapping[str, Any], truth: str, n: int) -> list[str]:
    found = reply.get("distractors")
    if not isinstance(found, list) or len(found) != n or not all(isinstance(text, str | int | float) for text in found):
        raise ValueError(f"it has no list of {n} distractors")
    texts = [" ".join(str(text).split()) for text in found]
    if len({normalise(text) for text in (truth, *texts)}) <= n or not all(texts):
        raise ValueError("its distractors are empty, or the same as each other or as the correct answer")
    return texts


def _explanation(reply: Mapping[str, Any], truth: str) -> str:
    found = reply.get("explanation")
    if not isinstance(found, str) or f" {normalise(truth)} " not in f" {normalise(found)} ":
        raise ValueError("its explanation does not contain the correct answer")
    return " ".join(found.split())


def _without_options(prompt: str, choices: Sequence[str]) -> str | None:
    letters = zip(_LETTERS, choices, strict=False)
    options = (rf"\s*\(?{letter}[.):]\s*{re.escape(choice)}[;,]?" for letter, choice in letters)
    pattern = r"(?:\s*\b(?:Options|Choices)\s*:)?" + "".join(options) + r"(?=\s|$)"
    question, n = re.subn(pattern, "", prompt)
    return question.strip() if n == 1 else None


def _chosen(answer: str, choices: Sequence[str], position: int) -> int:
    """Index of the option that the answer names by its text or letter."""
    letter = re.fullmatch(r"\(?([A-Z])[.):]*", answer)
    if letter is None and answer not in choices:
        letter = re.match(r"\(?([A-Z])[.):]", answer)
    if letter is not None and _LETTERS.index(letter[1]) < len(choices):
        return _LETTERS.index(letter[1])
    if answer not in choices:
        raise ConfigurationError(
            f"Sample {position} has the answer {answer!r}; let it be the letter or the text of one of its "
            f"{len(choices)} choices."
        )
    return choices.index(answer)


def _number(word: str) -> str:
    if re.fullmatch(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?", word):
        return f"{Decimal(word.replace(',', '')).normalize():f}"
    return word
