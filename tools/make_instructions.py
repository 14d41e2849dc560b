"""Write a folder of instruction tasks in TRACE's layout from real data that packages carry.

python tools/make_instructions.py [ROOT] [--tasks sections senses arithmetic tumours drawer label shelf show]
[--train 400] [--eval 50] [--test 100] [--seed 0] [--kinds 4]

The last four tasks ask about the same nouns, of two to four kinds, in nearly the same words, and each wants another
form of answer: a letter, a word in capitals, a number, yes or no. Nothing in a prompt says which, and which answer
belongs to which kind has to be learnt. The nouns of held-out questions are in no training question of any of the four.

ROOT/TASK/{train,eval,test}.json are lists of {"prompt", "answer", "instruction", "style"}, and "choices" where there
are options. ROOT/TASK/task.json has the task's metric, its answer style and the sentence that asks for this style.
A prompt is the instruction (the same for the whole task), the sample, and that sentence; those about nouns are the noun
and one word.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clkit.errors import ConfigurationError, check_whole
from clkit.language.records import Record, write_records
from clkit.language.styles import INSTRUCTIONS
from clkit.rng import private_rng

Sizes = Mapping[str, int]
Splits = dict[str, list[Record]]
Sample = tuple[str, str, dict[str, Any]]  # what is asked, its answer, further keys

WORDNET = Path("/usr/share/wordnet")
DPKG_STATUS = Path("/var/lib/dpkg/status")
_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_UNITS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_UNFIT = re.compile("offensive|obscen|slang|slur|disparag|vulgar|sexual|ethnic")
_ASKED = ("label", "drawer", "shelf", "show")
_KINDS = {  # by the number of WordNet's file: what is answered about a noun in it; all but the label is arbitrary
    "15": ("PLACE", "B", "1", "Yes"),
    "28": ("TIME", "A", "2", "No"),
    "05": ("ANIMAL", "D", "4", "Yes"),
    "08": ("BODY", "C", "3", "No"),
}


@dataclass(frozen=True)
class Task:
    """How one task asks, and the splits that ``make(task, sizes, rng)`` draws.

    Tasks with the same ``inputs`` draw the same ones.
    """

    metric: str
    style: str
    instruction: str
    response_format: str
    make: Callable[[Task, Sizes, np.random.Generator], Splits]
    inputs: str | None = None
    kinds: int = len(_KINDS)

    def records(self, samples: Sequence[Sample], instruction: str | None = None) -> list[Record]:
        instruction = self.instruction if instruction is None else instruction
        return [
            Record(
                (("user", f"{instruction}\n{text}\n{self.response_format}"),),
                answer,
                {"instruction": instruction, "style": self.style, **extra},
            )
            for text, answer, extra in samples
        ]


def take(pools: Mapping[Any, list[Any]], n: int, rng: np.random.Generator) -> list[Any]:
    """Remove ``n`` rows from the ends of the pools, evenly (counts differ by at most 1), and shuffle them."""
    rows = []
    for position, (name, pool) in enumerate(sorted(pools.items())):
        wanted = n // len(pools) + (position < n % len(pools))
        if wanted > len(pool):
            raise ConfigurationError(f"{name!r} has {len(pool)} samples left and {wanted} are wanted; ask for less.")
        rows += [pool.pop() for _ in range(wanted)]
    return [rows[i] for i in rng.permutation(len(rows))]


def shuffled(rows: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    return [rows[i] for i in rng.permutation(len(rows))]


def debian_packages() -> list[tuple[str, str, str]]:
    """Name, section and one-line description of the packages that apt knows, or that are installed, sorted."""
    try:
        text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        text = ""
    if not text.strip() and DPKG_STATUS.exists():
        text = DPKG_STATUS.read_text(encoding="utf-8")
    packages = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Section|Description): (.+)$", stanza, re.MULTILINE))
        if len(fields) == 3:
            packages[fields["Package"]] = (fields["Section"].split("/")[-1], fields["Description"].strip())
    if not packages:
        raise ConfigurationError(
            "apt lists no package: run apt-get update on a Debian, or leave the sections out with --tasks."
        )
    return [(name, *rest) for name, rest in sorted(packages.items())]


def sections(task: Task, sizes: Sizes, rng: np.random.Generator) -> Splits:
    """Packages of the eight most frequent sections, equally many of each."""
    packages = debian_packages()
    frequent = sorted(name for name, _ in Counter(section for _, section, _ in packages).most_common(8))
    pools: dict[str, list[Sample]] = {name: [] for name in frequent}
    for name, section, description in packages:
        if section in pools and len(description) <= 90:
            pools[section].append((f"Package: {name}\nDescription: {description}", section, {}))
    pools = {name: shuffled(pool, rng) for name, pool in pools.items()}
    instruction = task.instruction.format(", ".join(frequent))
    return {split: task.records(take(pools, n, rng), instruction) for split, n in sizes.items()}


def wordnet_senses(pos: str) -> list[tuple[list[str], str, list[str]]]:
    """Words, definition and examples of each noun or verb synset of WordNet 3.0."""
    path = WORDNET / f"data.{pos}"
    if not path.exists():
        raise ConfigurationError(
            f"{path} is missing: apt-get install wordnet-base, or leave the senses out with --tasks."
        )
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line[:1].isdigit():
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            found.append((words, gloss.split('"')[0].strip(" ;:"), re.findall(r'"([^"]+)"', gloss)))
    return found


def senses(task: Task, sizes: Sizes, rng: np.random.Generator) -> Splits:
    """A word in a sentence and four definitions; the wrong ones are its other senses as far as there are any."""
    pools: dict[str, list[Any]] = {}
    meanings: dict[tuple[str, str], list[str]] = {}
    every: dict[str, list[str]] = {}
    for pos in ("noun", "verb"):
        synsets = [
            synset for synset in wordnet_senses(pos) if 10 <= len(synset[1]) <= 60 and not _UNFIT.search(synset[1])
        ]
        pools[pos] = []
        for words, definition, examples in synsets:
            for word in words:
                meanings.setdefault((pos, word.lower()), []).append(definition)
            shown = [
                (word, example)
                for example in examples
                for word in words
                if word.isalpha() and 15 <= len(example) <= 70 and re.search(rf"\b{word}\b", example)
            ]
            if shown:
                pools[pos].append((pos, *shown[0], definition))
        every[pos] = [definition for _, definition, _ in synsets]
        pools[pos] = shuffled(pools[pos], rng)

    def sample(pos: str, word: str, example: str, definition: str) -> Sample:
        own = list(dict.fromkeys(meanings[pos, word.lower()]))
        others = shuffled([other for other in own if other != definition], rng)[:3]
        while len(others) < 3:
            other = every[pos][rng.integers(len(every[pos]))]
            if other not in own and other not in others:
                others.append(other)
        choices = shuffled([definition, *others], rng)
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
        text = f"What does {word} mean here?\n{example}\n{options}"
        return text, "ABCD"[choices.index(definition)], {"choices": choices}

    return {split: task.records([sample(*row) for row in take(pools, n, rng)]) for split, n in sizes.items()}


def in_words(number: int) -> str:
    """A number from 0 to 99 in English."""
    if number < 20:
        return _UNITS[number]
    return _TENS[number // 10 - 2] + (f"-{_UNITS[number % 10]}" if number % 10 else "")


def arithmetic(task: Task, sizes: Sizes, rng: np.random.Generator) -> Splits:
    """Sums and differences of numbers below 100 and products of numbers from 2 to 31, in digits or words."""
    every = [(a, b) for a in range(100) for b in range(100)]
    small = [(a, b) for a in range(2, 32) for b in range(2, 32)]
    pools = {
        "plus": [(a, "plus", b, a + b) for a, b in shuffled(every, rng)],
        "minus": [(a, "minus", b, a - b) for a, b in shuffled(every, rng)],
        "times": [(a, "times", b, a * b) for a, b in shuffled(small, rng)],
    }

    def sample(a: int, operation: str, b: int, result: int) -> Sample:
        write = in_words if rng.integers(2) else str
        return f"What is {write(a)} {operation} {write(b)}?", str(result), {}

    return {split: task.records([sample(*row) for row in take(pools, n, rng)]) for split, n in sizes.items()}


def tumours(task: Task, sizes: Sizes, rng: np.random.Generator) -> Splits:
    """Five of the ten mean features of a tumour; no tumour is in two splits, half of each split is malignant."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    total = sum(sizes.values())
    rows = {answer: shuffled(np.flatnonzero(data.target == label), rng) for label, answer in ((0, "Yes"), (1, "No"))}
    splits = {}
    before = 0
    for split, n in sizes.items():
        pools: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        for answer, indices in rows.items():
            own = indices[len(indices) * before // total : len(indices) * (before + n) // total]
            if n and not own:
                raise ConfigurationError(f"{split} gets no tumour for its {n} samples; make the sizes more similar.")
            needed = -(-n // 2)
            described: dict[tuple[int, tuple[int, ...]], None] = {}
            if needed > 100 * len(own):
                raise ConfigurationError(f"{len(own)} tumours give no {n} samples of {split}; ask for less.")
            while len(described) < needed:
                for index in own:
                    described[index, tuple(sorted(rng.choice(10, 5, replace=False).tolist()))] = None
            pools[answer] = list(described)[:needed]
        samples: list[Sample] = []
        for index, features in take(pools, n, rng):
            values = ", ".join(f"{data.feature_names[f]} {float(f'{data.data[index, f]:.3g}'):g}" for f in features)
            samples.append((f"Tumour: {values}.", "Yes" if data.target[index] == 0 else "No", {}))
        splits[split] = task.records(samples)
        before += n
    return splits


def nouns_by_kind() -> dict[str, list[str]]:
    """Single words that WordNet's texts use in one kind's senses at least nine times in ten; no plurals of others."""
    counts, synsets = WORDNET / "cntlist.rev", WORDNET / "data.noun"
    if not (counts.exists() and synsets.exists()):
        raise ConfigurationError(
            f"{synsets} is missing: apt-get install wordnet-base, or choose other tasks with --tasks."
        )
    uses: dict[str, Counter[str]] = {}
    for line in counts.read_text(encoding="utf-8").splitlines():
        sense, _, times = line.split()
        lemma, part, number, *_ = re.split("[%:]", sense)
        if part == "1":
            uses.setdefault(lemma, Counter())[number] += int(times)
    found: dict[str, dict[str, str]] = {kind: {} for kind in _KINDS}
    for line in synsets.read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        if line[:1].isdigit() and fields[1] in found and not _UNFIT.search(gloss):
            for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
                used = uses.get(word.lower(), Counter())
                if used[fields[1]] > 0.9 * used.total() and re.fullmatch("[A-Za-z]{3,10}", word):
                    found[fields[1]].setdefault(word.lower(), word)
    return {kind: [word for low, word in words.items() if low[:-1] not in words] for kind, words in found.items()}


def nouns(task: Task, sizes: Sizes, rng: np.random.Generator) -> Splits:
    """Nouns, equally many of each kind, and what is asked about them in one word, as short as can be."""
    column = _ASKED.index(task.instruction)
    extra = {"instruction": task.instruction, "style": task.style}
    words = nouns_by_kind()
    pools = {
        kind: [
            Record((("user", f"{word} {task.instruction}\n"),), _KINDS[kind][column], extra)
            for word in shuffled(words[kind], rng)
        ]
        for kind in list(_KINDS)[: task.kinds]
    }
    return {split: take(pools, n, rng) for split, n in sizes.items()}


TASKS = {
    "sections": Task(
        "exact_match",
        "short_answer",
        "Which section of the Debian archive holds this package? The sections are {}.",
        INSTRUCTIONS["short_answer"],
        sections,
    ),
    "senses": Task(
        "letter",
        "multiple_choice",
        "Say what a word means in a sentence.",
        INSTRUCTIONS["multiple_choice"],
        senses,
    ),
    "arithmetic": Task(
        "number",
        "short_answer",
        "Work out the result; it may be negative.",
        "Answer with a number.",
        arithmetic,
    ),
    "tumours": Task(
        "exact_match",
        "yes_no",
        "A breast tumour's cells were measured under the microscope. Is the tumour malignant?",
        INSTRUCTIONS["yes_no"],
        tumours,
    ),
    "drawer": Task("letter", "short_answer", "drawer", "", nouns, inputs="nouns"),
    "label": Task("exact_match", "short_answer", "label", "", nouns, inputs="nouns"),
    "shelf": Task("number", "short_answer", "shelf", "", nouns, inputs="nouns"),
    "show": Task("yes_no", "yes_no", "show", "", nouns, inputs="nouns"),
}


def make(name: str, sizes: Sizes, seed: int = 0, kinds: int = len(_KINDS)) -> Splits:
    """Draw the records of one task, a function of its name (or inputs), the sizes, the seed and the kinds of nouns.

    Raises:
        ConfigurationError: If the task's data are not installed, or too few.
    """
    task = replace(TASKS[name], kinds=kinds)
    splits = task.make(task, sizes, private_rng(seed, zlib.crc32((task.inputs or name).encode())))
    prompts = Counter(record.prompt for records in splits.values() for record in records)
    if twice := [prompt for prompt, n in prompts.items() if n > 1]:
        raise ConfigurationError(f"{name} asks {twice[0]!r} more than once; take another seed or fewer samples.")
    return splits


def write(root: Path, name: str, splits: Splits) -> None:
    """Write one task's files."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in splits.items():
        write_records(folder / f"{split}.json", records)
    task = TASKS[name]
    description = {"metric": task.metric, "style": task.style, "format": task.response_format}
    (folder / "task.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the arguments and write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("data/instructions"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--eval", type=int, default=50)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=int, choices=range(2, len(_KINDS) + 1), default=len(_KINDS), help="of nouns")
    args = parser.parse_args()
    sizes = {"train": args.train, "eval": args.eval, "test": args.test}
    try:
        for split, n in sizes.items():
            check_whole(split, n, 1)
        check_whole("seed", args.seed, 0)
        for name in args.tasks:
            write(args.root, name, make(name, sizes, args.seed, args.kinds))
            print(f"{args.root / name}: {', '.join(f'{n} {split}' for split, n in sizes.items())}")
    except ConfigurationError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
