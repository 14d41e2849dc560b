"""Checks that nothing but a picture tells the answers of the home-scale stream; see make_vision_language.py."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NEAR = 4  # bits of the 64 of two pictures' average hashes, below which they are near-duplicates


def average_hash(image: Image.Image) -> int:
    """64 bits, a bit for each of 8 x 8 cells: whether it is lighter than their mean."""
    cells = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
    bits = (cells > cells.mean()).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def near(one: int, others: Iterable[int]) -> bool:
    return any((one ^ other).bit_count() < NEAR for other in others)


def check_leaks(folders: Sequence[Path]) -> None:
    """Look for what would let a model answer without having learnt to see.

    - No picture is in two splits, or two tasks; no drawn scene is.
    - Pictures of Fashion-MNIST, digits and emoji that belong to one answer differ between train or eval and test by
      :data:`NEAR` bits of their average hashes or more.
    - Nothing in a question tells its answer: letters, yes and no, digits, and counts are as frequent as each other, no
      option is right more often than others, and no question has more of one answer than chance gives.
    - Captions ask none of the tasks' questions.

    Raises:
        AssertionError: If there is a leak; the message names it.
    """
    pictures: dict[str, str] = {}
    drawn: dict[str, str] = {}
    asked: dict[str, set[str]] = {}
    for folder in folders:
        known: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for split in ("train", "eval", "test"):
            records = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
            asked.setdefault(folder.name, set()).update(record["prompt"] for record in records)
            where = f"{folder.name}/{split}"
            for record in records:
                path = folder / record["image"]
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                assert pictures.setdefault(digest, where) == where, f"{path} is also in {pictures[digest]}"
                if "scene" in record:
                    scene = json.dumps(sorted(record["scene"]))
                    assert drawn.setdefault(scene, where) == where, f"the scene of {path} is also in {drawn[scene]}"
                elif record["kind"] != "emoji":
                    answer = record["choices"]["ABCD".index(record["answer"])] if "choices" in record else None
                    with Image.open(path) as image:
                        known[answer or record["answer"]].append((split, average_hash(image)))
            check_balance(records, where)
        for answer, rows in known.items():
            test = [own for split, own in rows if split == "test"]
            for split, own in rows:
                assert split == "test" or not near(own, test), f"{folder.name}: {answer} of {split} is nearly in test"
    both = set().union(*(asks for name, asks in asked.items() if name != "captions")) & asked.get("captions", set())
    assert not both, f"captions ask {sorted(both)[0]!r}, as a task does"


CHANCE = {"garment": 4, "digit": 10, "count": 6, "larger": 2, "colour": 2, "above": 2}
"""Equally frequent answers to each kind of question that has few of them."""


def check_balance(records: Sequence[Mapping[str, Any]], where: str) -> None:
    """Look for answers that are more frequent than chance allows."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        if record["kind"] in CHANCE:
            # the options of each garment's question differ
            asked = "" if record["kind"] == "garment" else record["prompt"]
            groups[record["kind"], asked].append(record)
    for (kind, asked), own in groups.items():
        most = max(Counter(record["answer"] for record in own).values())
        assert most <= allowed(len(own), CHANCE[kind]), (
            f"{where}: {most} of {len(own)} answers to {asked or kind!r} are the same"
        )
        if kind == "garment":
            shown = Counter(choice for record in own for choice in record["choices"])
            right = Counter(record["choices"]["ABCD".index(record["answer"])] for record in own)
            for choice, n in shown.items():
                assert right[choice] <= allowed(n, 4), f"{where}: {choice} is right {right[choice]} of {n} times"


def allowed(n: int, classes: int) -> float:
    """Most of ``n`` answers that may be the same of so many: five standard deviations above the mean."""
    return n / classes + 5 * math.sqrt(n * (classes - 1)) / classes + 1
