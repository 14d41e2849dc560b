from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit.errors import ConfigurationError
from clkit.language.generators import CachedGenerator, OpenAIGenerator, parse_object
from clkit.language.records import Record
from clkit.language.styles import INSTRUCTIONS, STYLES, AnswerStyles, normalise

COLOURS = ["red", "green", "blue", "white", "black"]


def colours(n: int, **extra: Any) -> list[Record]:
    """A native short-answer task: thing i has colour i modulo 5."""
    return [
        Record((("user", f"What colour has thing {i}?\n{INSTRUCTIONS['short_answer']}"),), COLOURS[i % 5], extra)
        for i in range(n)
    ]


def choices(n: int) -> list[Record]:
    """A native multiple-choice task: which option is the square of i."""
    records = []
    for i in range(n):
        options = [str(i * i + (k - i) % 4) for k in range(4)]
        shown = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        prompt = f"What is {i} times {i}?\n{shown}\n{INSTRUCTIONS['multiple_choice']}"
        records.append(Record((("user", prompt),), "ABCD"[i % 4], {"choices": options}))
    return records


def questions(n: int) -> list[Record]:
    """A native yes/no task."""
    prompts = [f"Is {i} even?\n{INSTRUCTIONS['yes_no']}" for i in range(n)]
    return [Record((("user", prompt),), "No" if i % 2 else "Yes") for i, prompt in enumerate(prompts)]


def names(n: int) -> list[Record]:
    """A native short-answer task where every answer is another one."""
    return [Record((("user", f"Who is number {i}?"),), f"the Name{i}") for i in range(n)]


class Oracle:
    """A generator that does what it is asked, but badly on the calls for which ``bad`` says so."""

    model = "oracle"

    def __init__(self, bad: Callable[[str], str | None] = lambda prompt: None) -> None:
        self.bad = bad
        self.calls: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> list[str]:
        self.calls.append(list(prompts))
        return [self.bad(prompt) or self.good(prompt) for prompt in prompts]

    @staticmethod
    def good(prompt: str) -> str:
        answer = re.search("Correct answer: (.*)\n", prompt)[1]
        if "explanation" in prompt:
            words = int(re.search(r"about (\d+) words", prompt)[1])
            return json.dumps({"explanation": f"It is {answer}, " + "for a reason " * (words // 3)})
        n = int(re.search(r"exactly (\d) wrong", prompt)[1])
        return "```json\n" + json.dumps({"distractors": [f"{answer}x{k}" for k in range(n)]}) + "\n```"


NATIVE = {"colours": "short_answer", "choices": "multiple_choice", "questions": "yes_no", "names": "short_answer"}
MAKE = {"colours": colours, "choices": choices, "questions": questions, "names": names}


def truth_of(task: str, i: int) -> str:
    return {
        "colours": COLOURS[i % 5],
        "choices": str(i * i),
        "questions": "No" if i % 2 else "Yes",
        "names": f"the Name{i}",
    }[task]


def assert_right(task: str, i: int, record: Record) -> None:
    """Read a rewritten sample as a student would, and mark it."""
    truth, style = truth_of(task, i), record.extra["style"]
    *_, last = record.prompt.split("\n")
    assert last == INSTRUCTIONS[style]
    assert sum(record.prompt.count(text) for text in INSTRUCTIONS.values()) == 1
    assert record.prompt.split("\n")[0] == MAKE[task](i + 1)[i].prompt.split("\n")[0]
    shown = dict(re.findall(r"^([A-D])\. (.*)$", record.prompt, re.MULTILINE))
    if style == "yes_no":
        proposed = re.search('Is "(.*)" the right answer', record.prompt)[1]
        assert record.answer == ("Yes" if proposed == truth else "No")
    elif style == "multiple_choice":
        assert shown[record.answer] == truth
        assert record.extra["choices"] == list(shown.values())
        assert len(set(shown.values())) == len(shown) == (2 if task == "questions" else 4)
    elif style == "short_answer":
        assert record.answer == truth
        assert not shown
    else:
        assert truth in record.answer
    assert ("choices" in record.extra) == (style == "multiple_choice")


def asks(record: Record) -> tuple[str, str]:
    return record.prompt, record.answer


@pytest.mark.parametrize("task", NATIVE)
def test_the_sheets_counts(task: str) -> None:
    records = MAKE[task](1000)
    result, report = AnswerStyles(generator=Oracle())(records, task, NATIVE[task])
    assert report.counts == {style: 800 if style == NATIVE[task] else 50 for style in STYLES}
    assert (report.chosen, report.failed, report.infeasible) == (200, {}, ())
    assert Counter(record.extra["style"] for record in result) == report.counts
    for i, (before, after) in enumerate(zip(records, result, strict=True)):
        if after.extra["style"] == NATIVE[task]:
            assert (after.messages, after.answer) == (before.messages, before.answer)
            assert {**before.extra, "style": NATIVE[task]} == after.extra
        else:
            assert_right(task, i, after)


@pytest.mark.parametrize(
    ("task", "feasible"),
    [
        ("colours", ["yes_no", "multiple_choice"]),
        ("choices", ["yes_no", "short_answer"]),
        ("questions", ["multiple_choice", "short_answer"]),
    ],
)
def test_without_a_generator_the_rules_share_it_all(task: str, feasible: list[str]) -> None:
    result, report = AnswerStyles()(MAKE[task](1000), task, NATIVE[task])
    assert {style: n for style, n in report.counts.items() if n} == {NATIVE[task]: 800, **dict.fromkeys(feasible, 100)}
    assert set(report.infeasible) == set(STYLES) - {NATIVE[task], *feasible}
    for i, record in enumerate(result):
        if record.extra["style"] != NATIVE[task]:
            assert_right(task, i, record)


def test_open_answers_without_a_generator_stay(recwarn: pytest.WarningsRecorder) -> None:
    records = names(100)
    result, report = AnswerStyles()(records, "names")
    assert [asks(record) for record in result] == [asks(record) for record in records]
    assert report.counts["short_answer"] == 100
    assert report.chosen == 0
    assert any("would need a generator" in str(warning.message) for warning in recwarn)
    _, report = AnswerStyles(max_labels=100)(records, "names")
    assert report.counts["multiple_choice"] == 10


@given(
    n=st.integers(1, 60),
    percent=st.floats(0, 100),
    seed=st.integers(0, 9),
    styles=st.sets(st.sampled_from(STYLES)),
    task=st.sampled_from(sorted(NATIVE)),
    rotten=st.integers(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_counts(n: int, percent: float, seed: int, styles: set[str], task: str, rotten: int) -> None:
    records, native = MAKE[task](n), NATIVE[task]
    oracle = Oracle(lambda prompt: "sorry" if len(re.findall(r"\d", prompt)) % 5 < rotten else None)
    diversify = AnswerStyles(percent, sorted(styles), generator=oracle, retries=1, seed=seed)
    result, report = diversify(records, task, native)
    targets = styles - {native}
    assert len(result) == n == sum(report.counts.values())
    assert abs(report.chosen - n * percent / 100) <= 0.5 + 1e-9 if targets else report.chosen == 0
    assert report.counts[native] == n - report.chosen + sum(report.failed.values())
    dealt = [report.counts[style] + report.failed.get(style, 0) for style in targets]
    assert not targets or max(dealt) - min(dealt) <= 1
    answers = Counter(record.answer for record in result if record.extra["style"] == "yes_no" != native)
    assert abs(answers["Yes"] - answers["No"]) <= 1
    for i, record in enumerate(result):
        if record.extra["style"] != native:
            assert_right(task, i, record)
    assert diversify(records, task, native) == (result, report)


def test_seed_task_and_sample_decide() -> None:
    def run(order: str, seed: int = 0) -> dict[str, list[Record]]:
        diversify = AnswerStyles(seed=seed)
        return {name: diversify(colours(200), name)[0] for name in order}

    assert run("abc") == run("cba")
    assert run("a")["a"] != run("a", seed=1)["a"]
    assert len({tuple(record.extra["style"] for record in result) for result in run("abc").values()}) == 3
    named = [Record(record.messages, record.answer, {"id": f"sample {i}"}) for i, record in enumerate(colours(200))]
    diversify = AnswerStyles(styles=["multiple_choice"])
    assert diversify(named, "a")[0] == diversify(named[::-1], "a")[0][::-1]


def test_letters_and_halves() -> None:
    result, _ = AnswerStyles(100, ["multiple_choice"])(colours(2000), "colours")
    letters = Counter(record.answer for record in result)
    assert sum((letters[letter] - 500) ** 2 / 500 for letter in "ABCD") < 16.3  # 3 degrees of freedom: p = 0.001
    used = Counter(choice for record in result for choice in record.extra["choices"])
    assert sum((used[colour] - 1600) ** 2 / 1600 for colour in COLOURS) < 18.5  # 4 degrees
    result, _ = AnswerStyles(100, ["yes_no"])(colours(2000), "colours")
    assert Counter(record.answer for record in result) == {"Yes": 1000, "No": 1000}
    proposed = Counter((record.answer, re.search('Is "(.*)" the', record.prompt)[1]) for record in result)
    assert sum((n - 200) ** 2 / 200 for n in proposed.values()) < 29.6  # at most 10 degrees


def test_other_forms_of_options_and_answers() -> None:
    options = ["the sun", "a star (far)"]
    prompts = {
        "Choose one.\nWhat shines?\n(A) the sun (B) a star (far)": "A",
        "Choose one.\nWhat shines? Options: A) the sun; B) a star (far)": "(A)",
        "Choose one.\nWhat shines?\nChoices:\nA. the sun\nB. a star (far)": "A. the sun",
        "Choose one.\nWhat shines?\nA: the sun\nB: a star (far)": "the sun",
    }
    records = [Record((("user", prompt),), answer, {"choices": options}) for prompt, answer in prompts.items()]
    result, _ = AnswerStyles(100, ["short_answer"])(records, "t", "multiple_choice", "Choose one.")
    assert [asks(record) for record in result] == [(f"What shines?\n{INSTRUCTIONS['short_answer']}", "the sun")] * 4


def test_options_that_are_not_found_are_failures() -> None:
    records = [Record((("user", "What shines?"),), "A", {"choices": ["sun", "moon"]})]
    result, report = AnswerStyles(100, ["short_answer"])(records, "t", "multiple_choice")
    assert report.failed == {"short_answer": 1}
    assert report.counts == {"multiple_choice": 1, "short_answer": 0}
    assert asks(result[0]) == asks(records[0])


def test_own_instructions_and_earlier_messages() -> None:
    before = (("system", "Be short."), ("user", "Hello"), ("assistant", "Hello"))
    records = [Record((*before, *record.messages), record.answer, {"source": "x"}) for record in colours(8)]
    result, _ = AnswerStyles(100, ["yes_no"], instructions={"yes_no": "Right?"})(records, "t")
    for record in result:
        assert record.messages[:-1] == before
        assert record.prompt.endswith("the right answer?\nRight?")
        assert record.extra == {"source": "x", "style": "yes_no"}


@pytest.mark.parametrize(("native", "styles"), [("short_answer", 3), ("brief", 3)])
def test_records_bring_their_own_wrong_answers(native: str, styles: int) -> None:
    asks = "Where is it?\nGive the box."
    records = [
        Record((("user", asks),), f"[0.{i}, 0.1]", {"distractors": [f" [0.{i}, 0.5]", f"[0.{i}, 0.7]", "[0, 1]"]})
        for i in range(1, 9)
    ]
    found, report = AnswerStyles(100)(records, "boxes", native, "Give the box.")
    assert len(report.counts) - len(report.infeasible) == styles
    for record, before in zip(found, records, strict=True):
        if record.extra["style"] == "multiple_choice":
            shown = {text.strip() for text in before.extra["distractors"]} | {before.answer}
            assert set(record.extra["choices"]) == shown
            assert record.extra["choices"]["ABCD".index(record.answer)] == before.answer
        elif record.extra["style"] == "yes_no":
            asked = re.search('Is "(.*)" the right answer', record.prompt)[1]
            assert (asked == before.answer) == (record.answer == "Yes")
            assert asked in {before.answer, *(text.strip() for text in before.extra["distractors"])}
    with pytest.raises(ConfigurationError, match="distractors of sample 0 are no list of texts"):
        AnswerStyles(100)([Record((("user", "a"),), "b", {"distractors": "c"})], "boxes")


def test_records_bring_their_own_explanations() -> None:
    records = [
        Record(
            (("user", f"How many are there in {i}?\n{INSTRUCTIONS['short_answer']}"),),
            str(i % 5),
            {
                "explanations": {
                    "brief": f"I count {i % 5}.",
                    "detailed": f"One after another, I count {i % 5} of them.",
                }
            },
        )
        for i in range(8)
    ]
    found, report = AnswerStyles(100)(records, "counts")
    assert report.counts == {"short_answer": 0, "yes_no": 2, "multiple_choice": 2, "brief": 2, "detailed": 2}
    for i, record in enumerate(found):
        if record.extra["style"] in ("brief", "detailed"):
            style = record.extra["style"]
            explained = records[i].extra["explanations"][style]
            assert asks(record) == (f"How many are there in {i}?\n{INSTRUCTIONS[style]}", explained)
    # one sample without them, and the style is not for this task
    bare = [Record(records[0].messages, "0"), *records[1:]]
    assert AnswerStyles(100)(bare, "counts")[1].infeasible == ("brief", "detailed")


@pytest.mark.parametrize("given", [{"brief": "I count some."}, {"brief": 3}, ["I count 3."]])
def test_explanations_that_cannot_be_used_are_named(given: Any) -> None:
    records = [Record((("user", "How many?"),), "3", {"explanations": given})]
    with pytest.raises(ConfigurationError, match="explanations of sample 0 are no texts by style .* '3'"):
        AnswerStyles(100)(records, "counts")


def test_opposites_keep_their_case() -> None:
    answers = ["yes", "No", "True", "false"]
    records = [Record((("user", f"Question {i}"),), answer) for i, answer in enumerate(answers)]
    result, _ = AnswerStyles(100, ["multiple_choice"])(records, "t", "yes_no")
    pairs = [{"yes", "no"}, {"No", "Yes"}, {"True", "False"}, {"false", "true"}]
    assert [set(record.extra["choices"]) for record in result] == pairs


def test_bad_replies_are_asked_again_and_then_counted() -> None:
    def bad(prompt: str) -> str | None:
        number = int(re.search(r"number (\d+)\?", prompt)[1])
        if number % 3 == 0:
            return json.dumps({"distractors": [f"name{number}"], "explanation": "Nobody knows"})
        return '{"distractors": ["a"' if number % 3 == 1 and "Reply 2" not in prompt else None

    oracle = Oracle(bad)
    records = names(60)
    result, report = AnswerStyles(100, ["yes_no", "brief"], generator=oracle)(records, "names")
    assert sum(report.failed.values()) == 20
    assert report.counts["short_answer"] == 20
    for i, record in enumerate(result):
        assert (record.extra["style"] == "short_answer") == (i % 3 == 0)
        assert asks(record) == asks(records[i]) if i % 3 == 0 else True
    assert sum(map(len, oracle.calls)) == 20 * 1 + 20 * 3 + 20 * 3
    yes_no = Counter(record.answer for record in result if record.extra["style"] == "yes_no")
    assert abs(yes_no["Yes"] - yes_no["No"]) <= 1


@pytest.mark.parametrize(
    "distractors",
    [
        ["Two cats", "dog", "cow"],
        ["the 2  cats.", "dog", "cow"],
        ["dog", "A dog", "cow"],
        ["dog", "cow"],
        ["dog", "cow", ""],
        "dog",
        None,
    ],
)
def test_unusable_distractors(distractors: Any) -> None:
    records = [Record((("user", "What is it?"),), "2 cats")]
    diversify = AnswerStyles(100, ["multiple_choice"], generator=lambda p: [json.dumps({"distractors": distractors})])
    assert diversify(records, "t")[1].failed == {"multiple_choice": 1}


def test_a_killed_run_goes_on_and_a_second_one_asks_nothing(tmp_path: Path) -> None:
    whole = AnswerStyles(100, ["brief"], generator=Oracle())(names(50), "names")

    class Killed(Oracle):
        def __call__(self, prompts: list[str]) -> list[str]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(prompts)

    with pytest.raises(KeyboardInterrupt):
        AnswerStyles(100, ["brief"], generator=Killed(), cache=tmp_path, batch_size=8)(names(50), "names")
    with (tmp_path / "completions.jsonl").open("a") as file:
        file.write('{"key": "12')
    oracle = Oracle()
    diversify = AnswerStyles(100, ["brief"], generator=oracle, cache=tmp_path, batch_size=8)
    assert diversify(names(50), "names") == whole
    assert sum(map(len, oracle.calls)) == 50 - 16
    oracle = Oracle()
    assert AnswerStyles(100, ["brief"], generator=oracle, cache=tmp_path)(names(50), "names") == whole
    assert oracle.calls == []
    oracle.model = "another"
    AnswerStyles(100, ["brief"], generator=oracle, cache=tmp_path)(names(50), "names")
    assert sum(map(len, oracle.calls)) == 50


def test_failures_are_cached_too(tmp_path: Path) -> None:
    oracle = Oracle(lambda prompt: "no idea")
    for _ in range(2):
        _, report = AnswerStyles(100, ["brief"], generator=oracle, cache=tmp_path)(names(3), "names")
        assert report.failed == {"brief": 3}
        assert sum(map(len, oracle.calls)) == 9


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure!\n```json\n{"a": ["x", "y",],}\n```\nAnything else {?}', {"a": ["x", "y"]}),
        (
            '{"a": "1"\n "b": [1 2]\n "c": {"d": null} "e": -1.5e3}',
            {"a": "1", "b": [1, 2], "c": {"d": None}, "e": -1500},
        ),
        ('As {asked}: {"a": "x, ] } \\" \\u00e9",, "b": true}', {"a": 'x, ] } " é', "b": True}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
    ],
)
def test_json_is_mended(text: str, found: dict[str, Any]) -> None:
    assert parse_object(text) == found


@pytest.mark.parametrize("text", ["", "no", "[1]", '{"a": ', "{a: b}"])
def test_json_beyond_repair(text: str) -> None:
    with pytest.raises(ValueError, match="no JSON object"):
        parse_object(text)


@given(st.dictionaries(st.text(max_size=9), st.none() | st.integers() | st.lists(st.text(max_size=9) | st.booleans())))
@settings(max_examples=50, deadline=None)
def test_good_json_is_read_as_it_is(item: dict[str, Any]) -> None:
    assert parse_object(json.dumps(item)) == item
    assert parse_object("It is " + json.dumps(item, indent=1, ensure_ascii=False) + " }") == item


def test_normalise() -> None:
    same = [
        ["The  cat.", "a cat", "CAT"],
        ["two dogs", "2 dogs"],
        ["1,000.50", "1000.5"],
        ["A", "a."],
        ["ninety-nine", "99"],
    ]
    for texts in same:
        assert len({normalise(text) for text in texts}) == 1
    different = ["5", "-5", "5.5", "C", "C++", "C#", "+", "100", "1", "cat", "cats", "10"]
    assert len({normalise(text) for text in different}) == len(different)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"percent": 101}, "percent=101"),
        ({"percent": float("nan")}, "percent=nan"),
        ({"styles": ["poem"]}, "'poem' is unknown"),
        ({"instructions": {"poem": "Rhyme."}}, "'poem' is unknown"),
        ({"retries": -1}, "retries=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        AnswerStyles(**arguments)


def test_samples_of_another_style_are_an_error() -> None:
    diversify = AnswerStyles()
    with pytest.raises(ConfigurationError, match="'poem' is unknown"):
        diversify(colours(3), "t", "poem")
    with pytest.raises(ConfigurationError, match="without a list of 'choices'"):
        diversify(colours(3), "t", "multiple_choice")
    with pytest.raises(ConfigurationError, match="Sample 0 has the answer 'red'"):
        diversify(colours(3, choices=["a", "b"]), "t", "multiple_choice")
    with pytest.raises(ConfigurationError, match="yes/no task has the answer 'red'"):
        diversify(colours(3), "t", "yes_no")
    with pytest.raises(ConfigurationError, match="returned 1 completions for 2"):
        CachedGenerator(lambda prompts: ["x"])(["a", "b"])


class Endpoint(BaseHTTPRequestHandler):
    """Answers as the oracle does, after some trouble."""

    trouble: list[int | bytes]
    seen: list[tuple[str, str | None, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers["Authorization"], body))
        problem = self.trouble.pop(0) if self.trouble else None
        content = Oracle.good(body["messages"][0]["content"])
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        if isinstance(problem, bytes):
            reply = problem
        self.send_response(problem if isinstance(problem, int) else 200)
        if problem == 429:
            self.send_header("Retry-After", "0")
        if problem == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[Endpoint]]]:
    handler = type("Handler", (Endpoint,), {"trouble": [], "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, handler = endpoint
    handler.trouble += [503, 429, b"<html>", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
    generator = OpenAIGenerator(url, "tiny", api_key="secret", temperature=0.5, max_tokens=99, wait=0.01)
    diversify = AnswerStyles(100, ["multiple_choice", "detailed"], generator=generator, max_labels=0)
    result, report = diversify(names(12), "names")
    assert report.counts == {"short_answer": 0, "multiple_choice": 6, "detailed": 6}
    for i, record in enumerate(result):
        assert_right("names", i, record)
    assert len(handler.seen) == 12 + 5
    path, key, body = handler.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.5, 99)


@pytest.mark.parametrize("status", [401, 404, 302])
def test_a_refusal_is_an_error_at_once(endpoint: tuple[str, type[Endpoint]], status: int) -> None:
    url, handler = endpoint
    handler.trouble += [status]
    with pytest.raises(ConfigurationError, match=f"status {status}") as caught:
        OpenAIGenerator(url, "tiny", api_key="secret")(["Correct answer: x\nexactly 1 wrong"])
    assert "secret" not in str(caught.value)
    assert [path for path, _, _ in handler.seen] == ["/v1/chat/completions"]


def test_silence_is_an_error_after_retries(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, handler = endpoint
    handler.trouble += [500] * 9
    with pytest.raises(ConfigurationError, match="no answer in 3 attempts"):
        OpenAIGenerator(url, "tiny", retries=2, wait=0)(["Correct answer: x\nexactly 1 wrong"])
    assert len(handler.seen) == 3
    with pytest.raises(ConfigurationError, match="no answer in 1 attempts"):
        OpenAIGenerator("http://127.0.0.1:1", "tiny", retries=0)(["hello"])


@pytest.mark.parametrize("arguments", [{"base_url": "localhost"}, {"timeout": 0}, {"workers": 0}, {"retries": -1}])
def test_endpoint_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        OpenAIGenerator(**{"base_url": "http://localhost", "model": "tiny", **arguments})
