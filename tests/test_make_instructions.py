from __future__ import annotations

import functools
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
from command_line import composed
from sklearn.datasets import load_breast_cancer

from clkit.errors import ConfigurationError
from clkit.language.records import Record, read_records
from clkit.run.train import build
from clkit.testing import small_language_module, small_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_instructions
import reproduce_language

SIZES = {"train": 160, "eval": 20, "test": 40}
NOUNS = ("drawer", "label", "shelf", "show")
NEEDS = {"sections": shutil.which("apt-cache")}
NEEDS |= dict.fromkeys(["senses", *NOUNS], (make_instructions.WORDNET / "data.noun").exists())
WORDS = {make_instructions.in_words(number): number for number in range(100)}
OPERATIONS = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}


@pytest.fixture(scope="module", params=make_instructions.TASKS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A task's name and the folder that the tool wrote for it."""
    if not NEEDS.get(request.param, True):
        pytest.skip("needs Debian's package lists and wordnet-base")
    root = tmp_path_factory.mktemp("instructions")
    make_instructions.write(root, request.param, make_instructions.make(request.param, SIZES))
    return request.param, root / request.param


def splits_of(folder: Path) -> dict[str, list[Record]]:
    return {split: read_records(folder / f"{split}.json")[0] for split in SIZES}


def test_layout(task: tuple[str, Path]) -> None:
    name, folder = task
    splits = splits_of(folder)
    assert {split: len(records) for split, records in splits.items()} == SIZES
    description = json.loads((folder / "task.json").read_text())
    assert description["metric"] in ("exact_match", "letter", "number", "yes_no")
    every = [record for records in splits.values() for record in records]
    for record in every:
        if name in NOUNS:
            assert re.fullmatch(rf"[A-Za-z]{{3,10}} {name}\n", record.prompt)
        else:
            assert record.prompt.startswith(record.extra["instruction"] + "\n")
            assert record.prompt.endswith("\n" + description["format"])
        assert record.extra["style"] == description["style"]
        assert len(record.prompt) < 450
    assert len({record.extra["instruction"] for record in every}) == 1


def test_no_prompt_is_shared(task: tuple[str, Path]) -> None:
    prompts = [record.prompt for records in splits_of(task[1]).values() for record in records]
    assert len(set(prompts)) == sum(SIZES.values())


def test_seed_decides(task: tuple[str, Path]) -> None:
    name, folder = task
    again, other = make_instructions.make(name, SIZES), make_instructions.make(name, SIZES, seed=1)
    assert splits_of(folder) == again
    assert again["train"] != other["train"]


def test_answers_are_right(task: tuple[str, Path]) -> None:
    name, folder = task
    answers = {"sections": sections, "senses": senses, "arithmetic": arithmetic, "tumours": tumours}
    answers |= dict.fromkeys(NOUNS, nouns)
    for records in splits_of(folder).values():
        answers[name](records)


@functools.cache
def packages() -> dict[str, tuple[str, str]]:
    return {name: (section, description) for name, section, description in make_instructions.debian_packages()}


def sections(records: list[Record]) -> None:
    for record in records:
        package, description = re.search("Package: (.*)\nDescription: (.*)\n", record.prompt).groups()
        assert packages()[package] == (record.answer, description)
        assert record.answer in record.extra["instruction"]
    counts = Counter(record.answer for record in records).values()
    assert len(counts) == 8
    assert max(counts) - min(counts) <= 1


def senses(records: list[Record]) -> None:
    glosses: dict[str, list[str]] = {}
    for pos in ("noun", "verb"):
        for line in (make_instructions.WORDNET / f"data.{pos}").read_text().splitlines():
            for example in line.split('"')[1::2]:
                glosses.setdefault(example, []).append(line)
    for record in records:
        word, example = re.search("What does (.*) mean here\\?\n(.*)\n", record.prompt).groups()
        shown = dict(re.findall(r"^([A-D])\. (.*)$", record.prompt, re.MULTILINE))
        assert list(shown.values()) == record.extra["choices"]
        assert len(set(shown.values())) == 4
        lines = [line for line in glosses[example] if f"| {shown[record.answer]}" in line]
        assert any(f" {word} " in line.split(" | ")[0] for line in lines)
        assert word in example
    counts = Counter(record.answer for record in records)
    if len(records) >= 160:
        assert sum((counts[letter] - 40) ** 2 / 40 for letter in "ABCD") < 16.3  # chi-square, 3 degrees: p = 0.001


def arithmetic(records: list[Record]) -> None:
    for record in records:
        a, operation, b = re.search(r"What is (\S+) (\w+) (\S+)\?", record.prompt).groups()
        numbers = [WORDS[text] if text in WORDS else int(text) for text in (a, b)]
        assert record.answer == str(OPERATIONS[operation](*numbers))
    assert any(record.answer.startswith("-") for record in records)


def tumours(records: list[Record]) -> None:
    data = load_breast_cancer()
    columns = {name: column for column, name in enumerate(data.feature_names)}
    for record in records:
        shown = re.search(r"Tumour: (.*)\.\n", record.prompt)[1].split(", ")
        assert len(shown) == 5
        fits = set(range(len(data.data)))
        for text in shown:
            feature, value = text.rsplit(" ", 1)
            column = data.data[:, columns[feature]]
            fits &= {row for row in fits if abs(column[row] - float(value)) <= 0.0051 * abs(column[row])}
        malignant = {"Yes": "malignant", "No": "benign"}[record.answer]
        assert malignant in {data.target_names[data.target[row]] for row in fits}
    assert Counter(record.answer for record in records)["Yes"] == len(records) / 2


@functools.cache
def first_senses() -> dict[str, str]:
    """WordNet's file of the most frequent sense of each noun."""
    lines = {
        kind: (make_instructions.WORDNET / f"{kind}.noun").read_text().splitlines()[29:] for kind in ("data", "index")
    }
    files = {line[:8]: line[9:11] for line in lines["data"]}
    fields = [line.split() for line in lines["index"]]
    return {word: files[rest[-int(n)]] for word, _, n, *rest in fields}


def nouns(records: list[Record]) -> None:
    forms = {"label": ["ANIMAL", "BODY", "PLACE", "TIME"], "drawer": list("ABCD"), "shelf": list("1234")}
    answers: dict[str, set[str]] = {"05": set(), "08": set(), "15": set(), "28": set()}
    for record in records:
        answers[first_senses()[record.prompt.split()[0].lower()]].add(record.answer)
    assert {len(found) for found in answers.values()} == {1}
    found = [next(iter(answer)) for answer in answers.values()]
    asked = records[0].extra["instruction"]
    assert (found if asked == "label" else sorted(found)) == forms.get(asked, ["No", "No", "Yes", "Yes"])
    counts = Counter(first_senses()[record.prompt.split()[0].lower()] for record in records).values()
    assert max(counts) - min(counts) <= 1


@pytest.mark.skipif(not NEEDS["label"], reason="needs wordnet-base")
def test_four_tasks_ask_of_the_same_nouns_and_none_that_is_held_out_is_trained_on() -> None:
    asked = {
        (split, task): [record.prompt.split()[0].lower() for record in records]
        for task in NOUNS
        for split, records in make_instructions.make(task, SIZES).items()
    }
    for split, size in SIZES.items():
        assert all(asked[split, task] == asked[split, "label"] for task in NOUNS)
        assert len(set(asked[split, "label"])) == size
    trained = {word for (split, _), words in asked.items() if split == "train" for word in words}
    for split in ("eval", "test"):
        assert not trained & {form for word in asked[split, "label"] for form in (word, f"{word}s", word[:-1])}


@pytest.mark.slow
@pytest.mark.skipif(not NEEDS["label"], reason="needs wordnet-base")
@pytest.mark.parametrize(("experiment", "root"), [("formats", "formats_small"), ("formats_gpu", "formats")])
def test_the_protocols_on_formats_run_dry_on_a_tiny_llama(experiment: str, root: str, tmp_path: Path) -> None:
    for task in NOUNS:
        splits = make_instructions.make(task, SIZES, kinds=2 if experiment == "formats" else 4)
        make_instructions.write(tmp_path / root, task, splits)
    small_language_module(adapter=None).net.save_pretrained(tmp_path / "llama")
    small_tokenizer().save_pretrained(tmp_path / "llama")
    own = ["logger=none", "trainer=cpu", "data.steps=6", "model.scheduler.num_warmup_steps=2"]
    paths = [f"model.net={tmp_path}/llama", f"data_root={tmp_path}"]
    config = composed(f"experiment=smollm2_{experiment}", *own, *paths)
    trainer, module, data = build(config, tmp_path / "run")
    rates: list[float] = []
    record = lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])  # noqa: E731
    trainer.callbacks.append(pl.callbacks.LambdaCallback(on_train_batch_start=record))
    trainer.fit(module, datamodule=data)
    lr = config.model.optimizer.lr
    each = [0, lr / 2, *(lr * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]
    assert rates == pytest.approx(4 * each)
    found = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert found["experiences"] == list(NOUNS)
    assert found["metrics"] == ["letter", "exact_match", "number", "yes_no"]


def test_a_form_is_kept_where_old_tasks_are_answered_in_their_own(tmp_path: Path) -> None:
    given = [(0, "B", "A"), (0, "B", "B"), (0, "Yes", "A"), (1, "B", "TIME"), (3, "Yes", "Yes")]
    lines = [json.dumps({"experience": k, "answer": answer, "reference": right}) for k, answer, right in given]
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "after_3.jsonl").write_text("\n".join(lines))
    assert reproduce_language.kept_form(tmp_path) == 2 / 4


def test_english_numbers() -> None:
    assert [make_instructions.in_words(n) for n in (0, 13, 20, 42, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty-two",
        "ninety-nine",
    ]
    assert len(WORDS) == 100


def test_missing_data_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make_instructions, "WORDNET", tmp_path)
    with pytest.raises(ConfigurationError, match="apt-get install wordnet-base"):
        make_instructions.make("senses", SIZES)
    monkeypatch.setattr(make_instructions, "DPKG_STATUS", tmp_path / "status")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="apt-get update"):
        make_instructions.make("sections", SIZES)


def test_installed_packages_serve_without_apt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stanzas = [f"Package: p{i}\nSection: contrib/s{i % 8}\nDescription: thing {i}\n more" for i in range(24)]
    (tmp_path / "status").write_text("\n\n".join(stanzas))
    monkeypatch.setattr(make_instructions, "DPKG_STATUS", tmp_path / "status")
    monkeypatch.setenv("PATH", str(tmp_path))
    splits = make_instructions.make("sections", {"train": 16, "test": 8})
    assert Counter(record.answer for record in splits["test"]) == {f"s{i}": 1 for i in range(8)}
    with pytest.raises(ConfigurationError, match="ask for less"):
        make_instructions.make("sections", {"train": 32})
