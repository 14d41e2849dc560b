r"""Scores of a generated answer against its reference: strings in, a number in [0, 1] out.

Each metric has two readings. The *lenient* one is about content: it looks for what the answer states. The *strict* one
of ``exact_match``, ``letter``, ``number`` and ``yes_no`` is about format too: the answer, but for whitespace around it,
is the reference. The difference of their means estimates superficial forgetting, a drift of format that leaves the
knowledge where it was (Chen et al., *SEFE*, arXiv 2505.02486). An empty answer scores 0.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

from clkit.errors import ConfigurationError

_ANSWER = r"(?:\banswer\b[^.\n。]{0,60}?(?:\bis\b|[:=])|\banswer\b|答案[^.\n。]{0,20}?[是为:]|####)\s*"
_ASIDE = r"(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:option|choice|letter)?(?:\s+is\b)?\s*:?"
_OPENING = r"[\s(\[{\"'*_$]*(?:\\(?:boxed|text)\{)*"
_DIGITS = r"[0-9]{1,3}(?:(?P<group>[, '’])[0-9]{3}(?:(?P=group)[0-9]{3})*)(?![0-9])(?:\.[0-9]+)?"
_EXPONENT = r"(?:\^|\*\*) ?\{?(?P<%s>[-+]?[0-9]{1,3})(?![0-9])\}?"
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORTH = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_WORDS = re.compile(rf"\b(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_SMALL[1:10])})\b)?|{'|'.join(_SMALL)})\b", re.I)
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])-[$€£]?|)(?<![A-Za-z0-9_])"
    rf"(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/ ?[0-9]))?"
    rf"(?P<value>{_DIGITS}|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    rf"(?:[eE](?P<power>[-+]?[0-9]{{1,3}})(?!\w)|{_EXPONENT % 'exponent'})?"
    rf"(?: ?(?:[x×*·]|\\times|\\cdot) ?10{_EXPONENT % 'tens'})?"
    r"(?: ?/ ?(?P<divisor>[0-9]+(?:\.[0-9]+)?)(?![0-9/]))?"
)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))


def exact_match(prediction: str, reference: str) -> float:
    """1 if the answer is the reference, but for case, punctuation, articles and whitespace.

    Of the answer, as many lines count as the reference has; a model that was not stopped writes on. "Answer:", "The
    answer is" and the like in the first line do not count.
    """
    n = len(reference.strip().splitlines())
    texts = (prediction, _after_lead(prediction))
    return float(any(_normal("\n".join(text.strip().splitlines()[:n])) == _normal(reference) for text in texts))


def letter(prediction: str, reference: str, choices: int | None = None) -> float:
    """1 if the answer states the reference's option letter; see :func:`find_letter`.

    Args:
        prediction: The answer.
        reference: It states a letter.
        choices: Number of options, the first of which is A; 26 when ``None``.

    Raises:
        ConfigurationError: If the reference states no letter, or ``choices`` is not from 2 to 26.
    """
    return _same("letter", lambda text: find_letter(text, choices), prediction, reference)


def number(prediction: str, reference: str) -> float:
    """1 if the answer states the reference's number, in any notation; see :func:`find_number`.

    Raises:
        ConfigurationError: If the reference states no number.
    """
    return _same("number", find_number, prediction, reference)


def yes_no(prediction: str, reference: str) -> float:
    """1 if the answer states the reference's yes or no.

    Raises:
        ConfigurationError: If the reference states neither.
    """
    return _same("yes_no", lambda text: _stated(r"(yes|no)\b", text.lower()), prediction, reference)


def f1(prediction: str, reference: str) -> float:
    """F1 of the words that both have, normalised as for SQuAD (Rajpurkar et al., arXiv 1606.05250)."""
    words, wanted = _normal(prediction).split(), _normal(reference).split()
    return _f1((Counter(words) & Counter(wanted)).total(), len(words), len(wanted))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004).

    Words are runs of letters and digits of any script, in lower case, without stemming (or, if there are none, of
    anything else). A text without spaces between its words is one word.

    Raises:
        ConfigurationError: If rapidfuzz is not installed.
    """
    words, wanted = (re.findall(r"[^\W_]+", text.lower()) or text.split() for text in (prediction, reference))
    return _f1(_rapidfuzz().distance.LCSseq.similarity(words, wanted), len(words), len(wanted))


def edit_similarity(prediction: str, reference: str) -> float:
    """Share of the characters of both that need no insertion or deletion, :math:`1 - d / (m + n)`; for code.

    Raises:
        ConfigurationError: If rapidfuzz is not installed.
    """
    return float(_rapidfuzz().fuzz.ratio(prediction.strip(), reference.strip())) / 100


def sari(prediction: str, references: str | Sequence[str], source: str) -> float:
    r"""Score of a simplification: what it rightly keeps, adds and deletes of its source.

    Mean over n-grams, n from 1 to 4, and over three scores: the F1 of kept and of added n-grams, and the precision of
    deleted ones; 0/0 is 1. Words and punctuation are tokens, in lower case. As in the usual implementations, recall of
    kept n-grams is the corrected one.

    Args:
        prediction: The simplification.
        references: Good ones.
        source: The text to simplify.

    Reference: Xu et al., *Optimizing Statistical Machine Translation for Text Simplification*, TACL 2016.
    """
    texts = [references] if isinstance(references, str) else references
    targets = [_tokens(text) for text in texts]
    old, new = _tokens(source), _tokens(prediction)
    scores = [_sari_of(*(_n_grams(tokens, n) for tokens in (old, new, *targets))) for n in (1, 2, 3, 4)]
    return sum(scores) / len(scores)


def contains(prediction: str, reference: str) -> float:
    """1 if the reference's words stand in the answer one after another, but for case, punctuation and articles."""
    words = f" {_normal(reference)} "
    return float(words in f" {_normal(prediction)} ")


def box_iou(prediction: str, reference: str) -> float:
    r"""1 if the answer's box and the reference's overlap by more than half: :math:`|A \cap B| / |A \cup B| > 0.5`.

    A box is the first four numbers of a text, ``[x1, y1, x2, y2]``, in any unit that both share; the strict reading
    takes nothing but these in brackets.

    Raises:
        ConfigurationError: If the reference states no box with an area.
    """
    wanted = find_box(reference)
    if wanted is None or not 0 < _area(wanted) < math.inf:
        raise ConfigurationError(f"The reference {reference!r} states no box with an area; use another metric.")
    found = find_box(prediction)
    return float(found is not None and _iou(found, wanted) > 0.5)


METRICS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        "exact_match": exact_match,
        "letter": letter,
        "number": number,
        "yes_no": yes_no,
        "f1": f1,
        "rouge_l": rouge_l,
        "sari": sari,
        "edit_similarity": edit_similarity,
        "contains": contains,
        "box_iou": box_iou,
    }
)
"""The metrics by name, in their lenient reading."""

_FORMAT_MATTERS = ("exact_match", "letter", "number", "yes_no", "contains")
_DECIMAL = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_BOX = rf"\[\s*{_DECIMAL}(?:\s*,\s*{_DECIMAL}){{3}}\s*\]"


def score_answer(
    metric: str,
    prediction: str,
    reference: str,
    *,
    source: str | None = None,
    choices: int | None = None,
    strict: bool = False,
) -> float:
    """Score one answer.

    Args:
        metric: One of :data:`METRICS`.
        prediction: The answer.
        reference: The right one.
        source: The text that was to be simplified, for ``sari``.
        choices: Number of options, for ``letter``; 26 when ``None``.
        strict: Whether the format matters too: of ``contains`` the answer is the reference, of ``box_iou`` a box in
            brackets; the same as without for ``f1``, ``rouge_l``, ``sari`` and ``edit_similarity``.

    Returns:
        The score, in [0, 1]; 0 for an empty answer.

    Raises:
        ConfigurationError: If the metric is unknown, ``sari`` has no source, the reference does not state what the
            metric looks for, or a library is missing.
    """
    if metric not in METRICS:
        raise ConfigurationError(f"metric={metric!r} is unknown; use one of {', '.join(METRICS)}.")
    needs: dict[str, dict[str, Any]] = {"letter": {"choices": choices}, "sari": {"source": source}}
    if metric == "sari" and source is None:
        raise ConfigurationError("sari compares with the text that was to be simplified; give it as source.")
    lenient = METRICS[metric](prediction, reference, **needs.get(metric, {}))
    if not prediction.strip():
        return 0.0
    if strict and metric == "box_iou":
        return lenient * bool(re.fullmatch(_BOX, prediction.strip()))
    return float(prediction.strip() == reference.strip()) if strict and metric in _FORMAT_MATTERS else lenient


def mean_scores(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    sources: Sequence[str] | None = None,
    choices: int | None = None,
) -> dict[str, float]:
    """Average both readings over all answers, empty ones included.

    Returns:
        ``lenient``, ``strict``, and ``format_gap``, their difference; NaN without answers.

    Raises:
        ConfigurationError: If the lengths differ, and as :func:`score_answer`.
    """
    given = [None] * len(references) if sources is None else sources
    if not len(predictions) == len(references) == len(given):
        raise ConfigurationError(
            f"{len(predictions)} predictions, {len(references)} references and {len(given)} sources do not belong "
            "together; give one of each for every sample."
        )
    rows = list(zip(predictions, references, given, strict=True))
    lenient, strict = (
        float(np.mean([score_answer(metric, p, r, source=s, choices=choices, strict=strict) for p, r, s in rows]))
        if rows
        else np.nan
        for strict in (False, True)
    )
    return {"lenient": lenient, "strict": strict, "format_gap": lenient - strict}


def find_letter(text: str, choices: int | None = None) -> str | None:
    """Return the option letter that a text states, in upper case.

    That is the last one after "answer is", "answer:" or the like, else one that the text starts with: ``B``, ``(B)``,
    ``B.``, ``B) text``, ``Option B``. An ``A`` or ``I`` before another word is a word, and two letters ("A or B") are
    none.

    Raises:
        ConfigurationError: If ``choices`` is not from 2 to 26.
    """
    n = 26 if choices is None else choices
    if not isinstance(n, int) or not 2 <= n <= 26:
        raise ConfigurationError(f"choices={choices!r} is not possible; use a whole number from 2 to 26.")
    last = string.ascii_uppercase[n - 1]
    others = string.ascii_uppercase[:n].replace("I", "")
    another = rf"(?:[{others}]\b" + (r"|I\b(?! [a-z])" if n > 8 else "") + ")"
    no_word = rf"(?![A-Za-z0-9_]|['’.+-][A-Za-z0-9]|\+\+| ?(?:,|/|&|and|or) ?\(?{another})"
    one = rf"[A-{last}]{no_word}(?:(?<![AI])|(?! (?!because\b|since\b|as\b|is\b)[A-Za-z]))"
    small = rf"[a-{last.lower()}](?= ?(?:$|[)\]:]|\.$))"
    found = _stated(rf"({one}|{small})", text)
    return found and found.upper()


Box = tuple[float, float, float, float]
"""Corners of a box: left, top, right, bottom."""


def find_box(text: str) -> Box | None:
    """Return the first four numbers of a text, the corners of a box: left, top, right, bottom."""
    found = [float(number) for number in re.findall(_DECIMAL, text)[:4]]
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None


def _iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, the second one with an area."""
    sides = [min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    return common / (_area(one) + _area(other) - common)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def find_number(text: str) -> Fraction | None:
    r"""Return the number that a text states.

    That is the first one after the last "answer is", "answer:", "####" or the like (there, what follows the line's last
    ``=``), else the last one in the text. Signs, decimals, thousands separators (``1,234``, ``1 234``), powers
    (``1e3``, ``10^3``, ``10³``, ``1.5 x 10^3``), fractions (``3/4``, ``¾``, ``\frac{3}{4}``) and mixed numbers
    (``1 3/4``, ``1¾``) are understood; units and percent signs do not count. A text without digits may state one in
    English words, up to ninety-nine.
    """
    text = _in_digits(_plain(_one_line_numbers(text)))
    for stated in reversed(list(re.finditer(_ANSWER, text, re.IGNORECASE))):
        line = text[stated.end() :].partition("\n")[0]
        found = _NUMBER.search(line.rpartition("=")[2])
        if found:
            return _value(found)
    last = [None, *_NUMBER.finditer(text)][-1]
    return last and _value(last)


def _in_digits(text: str) -> str:
    """Write number words in digits, where there are no digits and no number is beyond ninety-nine."""
    if re.search(r"[0-9]|(?i:\b(?:hundred|thousand|million|billion)s?\b)", text):
        return text
    return _WORDS.sub(lambda m: str(sum(_WORTH[word] for word in re.split("[ -]", m[0].lower()))), text)


def _one_line_numbers(text: str) -> str:
    """Write what is raised, small or a LaTeX fraction in one line, which compatibility forms would run together."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\,", " ")
    text = re.sub(rf"(?<=[0-9])[{''.join(_RAISED)}]+", lambda m: "^" + "".join(_RAISED[c] for c in m[0]), text)
    text = re.sub(r"(?<=[0-9])(?=[¼-¾⅐-⅞↉])", " ", text)
    text = re.sub(
        r"([0-9])? ?\\[dt]?frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))",
        lambda m: f"{m[1] + ' ' if m[1] else ''}{m[2] or m[3]}/{m[4] or m[5]}",
        text,
    )
    return unicodedata.normalize("NFKC", text).replace("⁄", "/")


def _value(found: re.Match[str]) -> Fraction:
    # not int or Fraction of the text: Python refuses those beyond 4300 digits
    digits = re.sub(r"[, '’]", "", found["value"])
    value = Fraction(Decimal(digits)) * Fraction(10) ** (int(found["power"] or 0) + int(found["tens"] or 0))
    if found["exponent"] and value and len(digits) < 10:
        value **= int(found["exponent"])
    divisor = Fraction(Decimal(found["divisor"] or 1))
    value = Fraction(Decimal(found["whole"] or 0)) + (value / divisor if divisor else value)
    return value * (-1 if found["sign"] else 1)


def _plain(text: str) -> str:
    """One form for each character, and single blanks or line ends, on which no pattern can run away."""
    text = re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", text))
    return re.sub(r" ?\n\s*", "\n", text).strip()


def _stated(form: str, text: str) -> str | None:
    text = _plain(text)
    form = f"{_OPENING}{form}"
    stated = [None, *re.finditer(f"(?i:{_ANSWER}{_ASIDE}){form}", text, re.MULTILINE)][-1]
    found = stated or re.match(f"(?i:{_ASIDE}){form}", text, re.MULTILINE)
    return found and found[1]


def _same(metric: str, find: Callable[[str], object], prediction: str, reference: str) -> float:
    wanted = find(reference)
    if wanted is None:
        raise ConfigurationError(f"The reference {reference!r} states no answer for {metric}; use another metric.")
    return float(find(prediction) == wanted)


def _after_lead(text: str) -> str:
    """What follows the last "answer is", "answer:" or the like of the first line; the text without one."""
    text = text.strip()
    leads = list(re.finditer(_ANSWER, text.partition("\n")[0], re.IGNORECASE))
    return text[leads[-1].end() :] if leads else text


def _normal(text: str) -> str:
    """The text as SQuAD's evaluation compares it, or, if nothing of it is left, in lower case."""
    bare = re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation))
    return " ".join(bare.split()) or " ".join(text.lower().split())


def _f1(common: int, one: int, other: int) -> float:
    return 2 * common / (one + other) if common else 0.0


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _n_grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _sari_of(old: Counter[tuple[str, ...]], new: Counter[tuple[str, ...]], *targets: Counter[tuple[str, ...]]) -> float:
    target = sum(targets, Counter[tuple[str, ...]]())
    # as often as there are references, so that counts compare with their sum
    many_old, many_new = (Counter({gram: len(targets) * n for gram, n in grams.items()}) for grams in (old, new))

    kept, to_keep = many_old & many_new, many_old & target
    good = kept & target
    keep = _harmonic(_ratio(sum(good[g] / kept[g] for g in good), len(kept)), _ratio(good.total(), to_keep.total()))

    deleted = many_old - many_new
    delete = _ratio(sum(n / deleted[g] for g, n in (deleted - target).items()), len(deleted))

    added, to_add = set(new) - set(old), set(target) - set(old)
    add = _harmonic(_ratio(len(added & to_add), len(added)), _ratio(len(added & to_add), len(to_add)))
    return (keep + delete + add) / 3


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _rapidfuzz() -> Any:
    try:
        import rapidfuzz
        import rapidfuzz.distance
    except ImportError as error:
        raise ConfigurationError(
            "ROUGE-L and edit similarity are rapidfuzz's, which is not installed; run pip install 'clkit[language]'."
        ) from error
    return rapidfuzz
