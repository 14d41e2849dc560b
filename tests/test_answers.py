from __future__ import annotations

import builtins
import math
import string
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import rouge_score, squad

from clkit import ConfigurationError
from clkit.language.answers import METRICS, find_letter, find_number, mean_scores, sari, score_answer
from clkit.metrics.functional import backward_transfer, language_summary, overall_performance

TEXT = st.text(alphabet="abAB theano.,\n-1 2", max_size=30)
WORDS = st.lists(st.sampled_from(["the", "cat", "Cats", "a", "sat", "on.", "2", "!"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    "text",
    [
        "Answer: B",
        "B",
        "(B)",
        "B.",
        "B) text",
        "The answer is B",
        "Option B",
        " B \n",
        "B\n\nQuestion: A or C?",
        "**B**",
        "The correct answer is (B) a cat",
        "Option A is wrong. The answer is B.",
        "A. cats\nB. dogs\nAnswer: B",
        "B: dogs",
        "答案:B",
        "答案是B。",
        "\uff22",
        "\\boxed{B}",
        "The answer is not A but is B",
        "b",
        "(b)",
        "B is correct",
        "Answer B",
        "The answer among A, C and D is A? No, the answer is B",
        "The correct option is B",
        "Answer:\nB",
        "B\nBecause",
    ],
)
def test_a_stated_letter_is_found(text):
    assert find_letter(text, 4) == "B"
    assert score_answer("letter", text, "B", choices=4) == 1
    assert score_answer("letter", text, "A", choices=4) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "A cat sat",
        "Because",
        "a cat",
        "Answer: A dog",
        "I think so",
        "A-level",
        "A or B",
        "A, B",
        "C++",
        "The answer is A or B",
        "U.S.",
        "Answer: E",
        "Answers vary",
        "D'Artagnan",
        "Barcelona",
        "1",
    ],
)
def test_where_no_letter_is_stated_none_is_found(text):
    assert find_letter(text, 4) is None
    assert all(score_answer("letter", text, letter, choices=4) == 0 for letter in "ABCD")


def test_letters_reach_as_far_as_the_choices():
    assert [find_letter("The answer is A because it is", n) for n in (2, None)] == ["A", "A"]
    assert [find_letter("E", n) for n in (4, 5, None)] == [None, "E", "E"]
    assert find_letter("Z") == "Z"
    for choices in (1, 27, 2.5):
        with pytest.raises(ConfigurationError, match=f"choices={choices}"):
            find_letter("A", choices)


@given(
    st.sampled_from(string.ascii_uppercase), st.sampled_from(["{}", "({})", "{}.", "Answer: {}", "Option {}", "{}) x"])
)
def test_every_letter_in_every_form(letter, form):
    assert find_letter(form.format(letter)) == letter


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("2.0", 2),
        ("-3", -3),
        ("\u22123", -3),
        ("1,234.50", 1234.5),
        ("$1,234", 1234),
        ("-$5", -5),
        ("3-2", 2),
        ("10 - 2 = 8", 8),
        ("The answer is 3 + 4 = 7", 7),
        ("The answer is 5 because 8 - 3 is", 5),
        ("1/2", 0.5),
        ("3/0", 3),
        ("-1/2", -0.5),
        ("1e3", 1000),
        ("5kg", 5),
        ("5%", 5),
        ("x\n#### 42", 42),
        ("1,2,3", 3),
        ("2.", 2),
        (".5", 0.5),
        ("- 5 apples", 5),
        ("x=-4", -4),
        ("(-7)", -7),
        ("\uff11\uff12", 12),
        ("Answer: none, or 4", 4),
        ("She has 3 cats and 2 dogs, so 5", 5),
        ("Answer: 5\nNo. The answer is 6", 6),
        ("½", 0.5),
        ("-½", -0.5),
        ("1½ cups", 1.5),
        ("3 ¾", 3.75),
        (r"\frac{1}{2}", 0.5),
        (r"$-\dfrac{3}{4}$", -0.75),
        (r"\boxed{2\frac{1}{4}}", 2.25),
        (r"\frac12", 0.5),
        ("1 1/2", 1.5),
        ("-1 1/2", -1.5),
        ("1 000", 1000),
        ("12 345 678.5", 12345678.5),
        ("1\u202f000", 1000),
        ("1'000", 1000),
        (r"1{,}000", 1000),
        ("10^3", 1000),
        ("10**3", 1000),
        ("10^{-2}", Fraction(1, 100)),
        ("10³", 1000),
        ("2^10", 1024),
        ("-2^2", -4),
        ("1.5 x 10^3", 1500),
        (r"1.5 \times 10^{3}", 1500),
        ("1.5×10⁻²", Fraction("0.015")),
        ("0^-1", 0),
        ("5 m²", 5),
        ("in 2020 100 came", 100),
        ("5 1000", 1000),
        ("It was 3, 100 of them", 100),
        ("Three.", 3),
        ("There are FIVE red shapes, not six", 6),
        ("The answer is four, not six.", 4),
        ("seventeen", 17),
        ("Forty-two", 42),
        ("ninety nine", 99),
        ("zero", 0),
        ("one of them shows a 7", 7),
    ],
)
def test_the_number_that_is_stated(text, value):
    assert find_number(text) == value


@pytest.mark.parametrize("text", ["", "none", "H2O", "GPT45", "-", ".", "someone", "two hundred", "tenth"])
def test_where_no_number_is_stated_none_is_found(text):
    assert find_number(text) is None


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_notations_of_one_number_are_equal(units, decimals):
    plain = f"{units}." + "0" * decimals if decimals else str(units)
    for text in (plain, f"{units:,}", f"{units:,}.0", f"The answer is {units:,}.", f"= {plain} dollars"):
        assert score_answer("number", text, str(units)) == 1
        assert score_answer("number", text, str(units + 1)) == 0
        assert score_answer("number", text, str(-units)) == (units == 0)


@given(st.integers(0, 999), st.integers(1, 99), st.integers(1, 99), st.booleans())
def test_notations_of_one_fraction_are_equal(whole, top, bottom, negative):
    value = (whole + Fraction(top, bottom)) * (-1 if negative else 1)
    sign = "-" if negative else ""
    whole_text = str(whole) if whole else ""
    for form in (
        f"{whole_text} {top}/{bottom}",
        rf"{whole_text}\frac{{{top}}}{{{bottom}}}",
        f"{whole_text} {top}⁄{bottom}",
    ):
        assert find_number(sign + form.strip()) == value


def test_numbers_are_compared_exactly():
    assert score_answer("number", "0.1", "0.10") == 1
    assert score_answer("number", "9007199254740993", "9007199254740992") == 0
    assert score_answer("number", "9" * 5000, "9" * 5000 + ".0") == 1


REFERENCES = {"letter": "B", "number": "7", "yes_no": "yes", "box_iou": "[0, 0, 1, 1]"}


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "sari"])
@pytest.mark.parametrize(
    "text", ["answer" + " " * 5000, "answer is (" * 500, "1" * 5000 + "x", "1,111" * 1000, "#" * 5000]
)
def test_degenerate_answers_take_no_time(metric, text):
    began = time.perf_counter()
    score_answer(metric, text, REFERENCES.get(metric, "some words"))
    assert time.perf_counter() - began < 2


def test_yes_and_no():
    assert score_answer("yes_no", "Yes, it is.", "yes") == 1
    assert score_answer("yes_no", "The answer is no", "No") == 1
    assert score_answer("yes_no", "Nothing", "no") == 0
    assert score_answer("yes_no", "Yes.", "yes", strict=True) == 0
    with pytest.raises(ConfigurationError, match="'maybe'"):
        score_answer("yes_no", "yes", "maybe")


def test_exact_match_forgives_case_punctuation_articles_and_what_follows():
    assert score_answer("exact_match", " The  cat!\nQuestion: more", "cat") == 1
    assert score_answer("exact_match", "cats", "cat") == 0
    assert score_answer("exact_match", "x\nthe y\nz", "X\ny") == 1
    assert score_answer("exact_match", "The", "A") == 0  # of which nothing is left
    assert score_answer("exact_match", "a", "A") == 1
    for lead in (
        "Answer: {}",
        "answer:\n{}",
        "**Answer:** {}.",
        "The answer is {}\nQuestion: blue",
        "The final answer is: {}",
    ):
        assert score_answer("exact_match", lead.format("red"), "red") == 1
        assert score_answer("exact_match", lead.format("not red"), "red") == 0
        assert score_answer("exact_match", lead.format("red"), "red", strict=True) == 0
    assert score_answer("exact_match", "blue\nQuestion: which colour?\nAnswer: red", "red") == 0
    assert score_answer("exact_match", "Answer: red", "Answer: red", strict=True) == 1


def test_format_matters_to_the_strict_reading_alone():
    drifted = {
        "exact_match": ("Paris.", "Paris"),
        "letter": ("Answer: B", "B"),
        "number": ("2.0", "2"),
        "yes_no": ("Yes", "yes"),
    }
    for metric, (prediction, reference) in drifted.items():
        assert score_answer(metric, prediction, reference) == 1
        assert score_answer(metric, prediction, reference, strict=True) == 0
        assert score_answer(metric, f" {reference}\n", reference, strict=True) == 1
    for metric in ("f1", "rouge_l", "edit_similarity", "sari"):
        scores = [score_answer(metric, "The cat", "a cat sat", source="cats", strict=s) for s in (False, True)]
        assert scores[0] == scores[1]
        assert 0 < scores[0] < 1


@given(st.sampled_from([name for name in METRICS if name != "sari"]), TEXT, TEXT)
def test_scores_are_fractions_and_strict_ones_no_larger(metric, prediction, reference):
    refused = ""
    try:
        lenient, strict = (score_answer(metric, prediction, reference, strict=s) for s in (False, True))
    except ConfigurationError as error:
        refused = str(error)
    if refused:
        assert metric in REFERENCES
        assert "states no" in refused
        return
    assert 0 <= strict <= lenient <= 1
    assert lenient == 0 or prediction.strip()
    assert score_answer(metric, reference, reference) == (1 if reference.strip() else 0)


@given(WORDS, WORDS)
def test_f1_is_squads(prediction, reference):
    prediction, reference = " ".join(prediction), " ".join(reference)
    answer = [{"prediction_text": prediction, "id": "0"}]
    target = [{"answers": {"answer_start": [0], "text": [reference]}, "id": "0"}]
    expected = squad(answer, target)
    # SQuAD takes all texts of which nothing is left for the same
    if all(any(word in text for word in ("cat", "Cats", "sat", "on", "2")) for text in (prediction, reference)):
        assert score_answer("f1", prediction, reference) == pytest.approx(float(expected["f1"]) / 100)
        assert score_answer("exact_match", prediction, reference) == float(expected["exact_match"]) / 100


@given(WORDS, WORDS)
def test_rouge_l_is_the_published_ones(prediction, reference):
    prediction, reference = " ".join(prediction), " ".join(reference)
    expected = rouge_score(prediction, reference, rouge_keys="rougeL")["rougeL_fmeasure"]
    if set(prediction + reference) - set("! "):  # without any word it gives 0
        assert score_answer("rouge_l", prediction, reference) == pytest.approx(float(expected))


def test_rouge_l_counts_words_in_order_and_of_any_script():
    assert score_answer("rouge_l", "the cat was found under the bed", "the cat was under the bed") == pytest.approx(
        12 / 13
    )
    assert score_answer("rouge_l", "schöner Tag", "schön er Tag") == pytest.approx(2 / 5)
    assert score_answer("rouge_l", "b a", "a b") == 0.5


def test_edit_similarity():
    assert score_answer("edit_similarity", "return x", "return x") == 1
    assert score_answer("edit_similarity", "abcd", "abxd") == pytest.approx(0.75)
    assert score_answer("edit_similarity", "", "abxd") == 0


def test_sari_of_the_published_example():
    source, prediction = "About 95 species are currently accepted .", "About 95 you now get in ."
    references = [
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    ]
    assert 100 * sari(prediction, references, source) == pytest.approx(26.953601953601954, rel=1e-12)
    assert sari(references[1], references[1], source) == pytest.approx(1)
    assert score_answer("sari", prediction, references[0], source=source) == pytest.approx(
        sari(prediction, [references[0]], source)
    )


def test_sari_by_hand():
    # unigrams: kept {a} of {a, b}, wanted {a, b}: F1 2/3; deleted {c}, rightly; added {x}, wanted {y}: 0
    # bigrams: kept none, wanted (a b); deleted (a b), (b c): one rightly; added none rightly: 0, 1/2, 0; longer ones:
    # 3-grams deleted (a b c) rightly, added (a x) none, wanted (a b y): keep 1, delete 1, add 0; no 4-grams: 1, 1, 1
    expected = np.mean([(2 / 3 + 1 / 2 + 0) / 3, (0 + 1 / 2 + 0) / 3, (1 + 1 + 0) / 3, 1])
    assert sari("a x", "a b y", "a b c") == pytest.approx(expected)


@given(WORDS, WORDS, WORDS)
def test_sari_is_a_fraction_and_1_for_the_reference(prediction, reference, source):
    prediction, reference, repeating = (" ".join(words) for words in (prediction, reference, source))
    assert 0 <= score_answer("sari", prediction, reference, source=repeating) <= 1
    # to delete one of two equal words is no good deletion, as in the usual implementations
    source = " ".join(dict.fromkeys(word.lower().rstrip(".") for word in source))
    assert score_answer("sari", reference, reference, source=source) == pytest.approx(1)


def test_empty_answers_are_wrong_and_count():
    for metric in METRICS:
        reference = REFERENCES.get(metric, "B 7")
        means = mean_scores(metric, [reference, "", " \n"], [reference] * 3, sources=["source"] * 3)
        assert means == pytest.approx({"lenient": 1 / 3, "strict": 1 / 3, "format_gap": 0})


def test_mean_scores_tell_format_from_content():
    means = mean_scores("letter", ["B", "Answer: C", "(A)", "C"], ["B", "C", "A", "D"], choices=4)
    assert means == {"lenient": 0.75, "strict": 0.25, "format_gap": 0.5}
    assert all(math.isnan(value) for value in mean_scores("f1", [], []).values())
    with pytest.raises(ConfigurationError, match="2 predictions, 1 references"):
        mean_scores("f1", ["a", "b"], ["a"])


def test_mistakes_are_named():
    with pytest.raises(ConfigurationError, match=r"'bleu' is unknown; use one of exact_match, letter"):
        score_answer("bleu", "a", "b")
    with pytest.raises(ConfigurationError, match="give it as source"):
        score_answer("sari", "a", "b")
    for metric in ("letter", "number"):
        with pytest.raises(ConfigurationError, match=f"'Paris' states no answer for {metric}"):
            score_answer(metric, "", "Paris")


@pytest.mark.parametrize("metric", ["rouge_l", "edit_similarity"])
def test_a_missing_library_says_how_to_get_it(metric, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("rapidfuzz"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigurationError, match=r"pip install 'clkit\[language\]'"):
        score_answer(metric, "a", "b")


NAN = np.nan
EXAMPLE = [[80, NAN, NAN], [70, 60, NAN], [65, 54, 90]]


def test_the_summary_of_an_example():
    found = language_summary(EXAMPLE)
    assert found == pytest.approx(
        {
            "op": 69.6667,
            "bwt_trace": -7.0,
            "bwt_trace_t_minus_1": -10.5,
            "mft": 76.6667,
            "mfn": 69.6667,
            "maa": (80 + 65 + 69.6667) / 3,
        },
        abs=1e-4,
    )
    assert overall_performance(EXAMPLE, 2) == 65
    assert backward_transfer(EXAMPLE, 2) == -5
    assert backward_transfer(EXAMPLE, 2, normalizer="t-1") == -10


@given(st.integers(1, 6), st.integers(0, 999))
def test_identities_of_the_summary(n, seed):
    matrix = np.random.default_rng(seed).random((n, n))
    matrix[np.triu_indices(n, 1)] = NAN
    found = language_summary(matrix)
    assert found["op"] == found["mfn"]
    assert found["bwt_trace"] == pytest.approx(found["mfn"] - found["mft"])
    if n == 1:
        assert math.isnan(found.pop("bwt_trace_t_minus_1"))
        assert found == pytest.approx({**dict.fromkeys(found, matrix[0, 0]), "bwt_trace": 0})
    else:
        assert found["bwt_trace_t_minus_1"] == pytest.approx(found["bwt_trace"] * n / (n - 1))


def test_impossible_summaries_are_refused():
    for after in (0, 4):
        with pytest.raises(ConfigurationError, match=f"after={after} is not possible for 3"):
            overall_performance(EXAMPLE, after)
    with pytest.raises(ConfigurationError, match="normalizer='n'"):
        backward_transfer(EXAMPLE, normalizer="n")
