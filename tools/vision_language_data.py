"""The tasks of texts and images of the home-scale stream; see make_vision_language.py."""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from vision_language_leaks import average_hash, near
from vision_language_sources import Sources, fashion
from vision_language_words import COLUMNS, ROWS, extra_of

from clkit.errors import ConfigurationError
from clkit.language.records import Record, write_records
from clkit.language.styles import INSTRUCTIONS
from clkit.rng import private_rng

SIDE = 128  # pixels of a picture
COLOURS = {
    "red": (214, 39, 40),
    "green": (34, 139, 34),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "purple": (130, 40, 150),
    "black": (25, 25, 25),
}
KINDS = ("circle", "square", "triangle", "star", "cross")
GARMENTS = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COUNTS = ("no", "one", "two", "three", "four", "five", "six")
_THINGS = re.compile(
    r"animal-|food-|drink|transport-(ground|air|water)|clothing|tool|household|musical-instrument|sport|computer|phone"
)
_CAPTIONED = re.compile(r"face-|heart|plant-|place-(building|geographic)|sky & weather|office|book-paper|mail|science")

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Sample:
    """A picture and what is asked about it.

    Args:
        image: The picture.
        question: Without the sentence that asks for the answer's form.
        answer: The right one.
        kind: Which question it is.
        extra: More keys of the record.
        scene: What a drawn picture shows.
    """

    image: Image.Image
    question: str
    answer: str
    kind: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    scene: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Shape:
    """A shape in a drawn picture: middle and side, in pixels."""

    kind: str
    colour: str
    x: int
    y: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    def outline(self) -> list[tuple[float, float]]:
        """Its corners."""
        if self.kind == "cross":
            # an arm is a third of the side wide
            arm = ((-1 / 6, -1 / 2), (1 / 6, -1 / 2), (1 / 6, -1 / 6))
            unit = [turned(point, quarter * math.pi / 2) for quarter in range(4) for point in arm]
        elif self.kind == "square":
            unit = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
        elif self.kind == "triangle":
            unit = [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)]
        elif self.kind == "star":
            unit = [turned((0.0, -0.5 if n % 2 == 0 else -0.2), n * math.pi / 5) for n in range(10)]
        else:
            unit = [turned((0.0, -0.5), n * math.pi / 30) for n in range(60)]
        return [(self.x + self.side * x, self.y + self.side * y) for x, y in unit]

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, as shares of the picture's side."""
        xs, ys = zip(*self.outline(), strict=True)
        return min(xs) / SIDE, min(ys) / SIDE, max(xs) / SIDE, max(ys) / SIDE


def turned(point: tuple[float, float], angle: float) -> tuple[float, float]:
    (x, y), (c, s) = point, (math.cos(angle), math.sin(angle))
    return c * x - s * y, s * x + c * y


def light(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light colour, for backgrounds."""
    r, g, b = rng.integers(215, 256, 3).tolist()
    return r, g, b


def draw(shapes: Sequence[Shape], rng: np.random.Generator) -> Image.Image:
    fine = Image.new("RGB", (2 * SIDE, 2 * SIDE), light(rng))
    pen = ImageDraw.Draw(fine)
    for shape in shapes:
        pen.polygon([(2 * x, 2 * y) for x, y in shape.outline()], fill=COLOURS[shape.colour])
    return fine.resize((SIDE, SIDE), Image.Resampling.BOX)


def arranged(
    looks: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    *,
    sides: tuple[int, int] = (18, 44),
    area: tuple[int, int, int, int] = (0, 0, SIDE, SIDE),
    fits: Callable[[Sequence[Shape]], bool] = lambda shapes: True,
) -> tuple[Shape, ...]:
    """Shapes of these kinds and colours where none touches another and all fit what is asked."""
    left, top, right, bottom = area
    while True:
        shapes: list[Shape] = []
        for kind, colour in looks:
            side = int(rng.integers(*sides))
            x = int(rng.integers(left + side // 2 + 2, right - side // 2 - 2))
            y = int(rng.integers(top + side // 2 + 2, bottom - side // 2 - 2))
            if any(max(abs(x - s.x), abs(y - s.y)) < (side + s.side) / 2 + 3 for s in shapes):
                break
            shapes.append(Shape(kind, colour, x, y, side))
        if len(shapes) == len(looks) and fits(shapes):
            return tuple(shapes)


def one_of(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def look(rng: np.random.Generator) -> tuple[str, str]:
    return one_of(KINDS, rng), one_of(list(COLOURS), rng)


def counted(n: int, shape: tuple[str, str]) -> str:
    kind, colour = shape
    plural = "es" if kind == "cross" else "s"
    return f"{COUNTS[n]} {colour} {kind}{plural if n > 1 else ''}"


def options(truth: str, wrong: Sequence[str], rng: np.random.Generator) -> tuple[str, list[str], str]:
    """The lines of lettered options, the options, and the letter of the right one."""
    choices = [truth, *wrong]
    choices = [choices[i] for i in rng.permutation(len(choices))]
    lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return lines, choices, "ABCD"[choices.index(truth)]


def apart(candidates: Iterable[Image.Image], sizes: Sizes) -> dict[str, list[Image.Image]]:
    """Deal pictures of one class to test, eval and train, so that no two splits have near-duplicates.

    Raises:
        ConfigurationError: If there are too few.
    """
    dealt: dict[str, list[Image.Image]] = {split: [] for split in ("test", "eval", "train")}
    seen: dict[str, list[int]] = {split: [] for split in dealt}
    for candidate in candidates:
        own = average_hash(candidate)
        for split, rows in dealt.items():
            others = (h for name, known in seen.items() if name != split for h in known)
            if len(rows) < sizes[split] and not near(own, others):
                rows.append(candidate)
                seen[split].append(own)
                break
        if all(len(dealt[split]) == sizes[split] for split in dealt):
            return dealt
    raise ConfigurationError(
        f"Only {sum(map(len, dealt.values()))} pictures of {sum(sizes.values())} of a class differ enough between the "
        "splits; ask for less (--share)."
    )


def per_class(sizes: Sizes, n_classes: int, position: int) -> dict[str, int]:
    return {split: n // n_classes + (position < n % n_classes) for split, n in sizes.items()}


def mixed(splits: Mapping[str, list[Any]], rng: np.random.Generator) -> dict[str, list[Any]]:
    return {split: [rows[i] for i in rng.permutation(len(rows))] for split, rows in splits.items()}


def garments(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """Pictures of Fashion-MNIST with four options."""
    images, labels = fashion()
    splits: dict[str, list[tuple[int, Image.Image]]] = {split: [] for split in sizes}
    for label in range(len(GARMENTS)):
        rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
        pictures = (enlarged(255 - images[row].astype(np.float64)) for row in rows)
        for split, own in apart(pictures, per_class(sizes, len(GARMENTS), label)).items():
            splits[split] += [(label, picture) for picture in own]

    def asked(label: int, picture: Image.Image) -> Sample:
        wrong = [GARMENTS[i] for i in rng.permutation(len(GARMENTS)) if i != label][:3]
        lines, choices, letter = options(GARMENTS[label], wrong, rng)
        return Sample(picture, f"Which garment is this?{lines}", letter, "garment", {"choices": choices})

    return {split: [asked(*row) for row in rows] for split, rows in mixed(splits, rng).items()}


def enlarged(grey: np.ndarray[Any, Any]) -> Image.Image:
    """A small grey picture, values up to 255, in the size of the others."""
    small = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def things(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """Emoji: views of Twitter's art to learn from, Google's of the same names to be tested on."""
    known = [(name, functools.partial(sources.art, "twitter", file), file) for name, file in sources.emoji(_THINGS)]
    return of_two_artists(known, "What is this?", "thing", sizes, rng, sources)


def flags(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """Flags: views of Debian's to learn from, Google's emoji of the same countries to be tested on."""
    return of_two_artists(sources.flags(), "Which flag is this?", "flag", sizes, rng, sources)


def of_two_artists(
    known: Sequence[tuple[str, Callable[[], Image.Image], str]],
    question: str,
    kind: str,
    sizes: Sizes,
    rng: np.random.Generator,
    sources: Sources,
) -> dict[str, list[Sample]]:
    """Samples that ask for a name: views of a picture to learn from, Google's emoji to be tested on.

    Args:
        known: Names, what opens the picture, and the file of the emoji.
        question: What is asked.
        kind: Which question it is.
        sizes: Samples of each split.
        rng: Chooses names and views.
        sources: Where the emoji are.
    """
    names = [name for name, _, _ in known]
    found: dict[str, list[Sample]] = {split: [] for split in sizes}
    for i in rng.permutation(len(known)).tolist():
        (name, picture, file), n = known[i], len(found["test"])
        test = on_light(sources.art("google", file), rng, turn=False)
        wanted = {split: -(-(total - len(found[split])) // (sizes["test"] - n)) for split, total in sizes.items()}
        views = different_views(picture(), wanted["train"] + wanted["eval"], test, rng)
        if views is not None:
            parts = {"test": [test], "train": views[: wanted["train"]], "eval": views[wanted["train"] :]}
            for split, pictures in parts.items():
                for view in pictures:
                    wrong = [names[j] for j in rng.permutation(len(names))[:4].tolist() if names[j] != name][:3]
                    found[split].append(Sample(view, question, name, kind, {"distractors": wrong}))
            if n + 1 == sizes["test"]:
                return mixed(found, rng)
    raise ConfigurationError(
        f"There are {len(found['test'])} names of a {kind}, but {sizes['test']} are wanted; use a lower --share."
    )


def different_views(art: Image.Image, n: int, other: Image.Image, rng: np.random.Generator) -> list[Image.Image] | None:
    """Views of a picture that are no near-duplicates of another; ``None`` if they are too much alike."""
    views = [on_light(art, rng, turn=True) for _ in range(4 * n)]
    views = [view for view in views if not near(average_hash(view), [average_hash(other)])]
    return views[:n] if len(views) >= n else None


def on_light(art: Image.Image, rng: np.random.Generator, *, turn: bool) -> Image.Image:
    """A picture with transparency on a light background, where it may be turned, smaller, and moved."""
    side = int(rng.integers(86, 121)) if turn else 112
    art = art.resize((side, side), Image.Resampling.BICUBIC)
    if turn:
        art = art.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIDE, SIDE), light(rng))
    free = SIDE - side
    at = tuple(rng.integers(0, free + 1, 2).tolist()) if turn else (free // 2, free // 2)
    canvas.paste(art, (at[0], at[1]), art)
    return canvas


def numbers(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """Which of scikit-learn's digits it is (a third, as many as differ enough), or how many shapes there are."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    written = {split: n // 3 for split, n in sizes.items()}
    splits: dict[str, list[Sample]] = {split: [] for split in sizes}
    for label in range(10):
        rows = rng.permutation(np.flatnonzero(digits.target == label)).tolist()
        pictures = (enlarged(255 - digits.images[row] * 255 / 16) for row in rows)
        for split, own in apart(pictures, per_class(written, 10, label)).items():
            splits[split] += [Sample(picture, "Which digit is this?", str(label), "digit") for picture in own]
    for split, n in sizes.items():
        for i in range(n - len(splits[split])):
            shape, number = look(rng), 1 + i % 6
            shapes = arranged([shape] * number, rng, sides=(14, 30))
            question = "How many shapes are there?"
            splits[split].append(Sample(draw(shapes, rng), question, str(number), "count", scene=shapes))
    return mixed(splits, rng)


def compare(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """Two shapes: is the left one larger, are their colours the same, is one above the other; as often yes as no."""

    def asked(kind: str, yes: bool) -> Sample:
        one, other = look(rng), look(rng)
        question, fits = "Is the left shape larger than the right one?", larger(yes)
        if kind == "colour":
            question, fits = "Do both shapes have the same colour?", lambda shapes: True
            different = [colour for colour in COLOURS if colour != one[1]]
            other = other[0], one[1] if yes else one_of(different, rng)
        elif kind == "above":
            other = one_of([name for name in KINDS if name != one[0]], rng), other[1]
            question, fits = f"Is the {one[0]} above the {other[0]}?", above(yes)
        shapes = arranged([one, other], rng, fits=fits)
        return Sample(draw(shapes, rng), question, "Yes" if yes else "No", kind, scene=shapes)

    plan = [(kind, yes) for yes in (True, False) for kind in ("larger", "colour", "above")]
    return mixed({split: [asked(*plan[i % 6]) for i in range(n)] for split, n in sizes.items()}, rng)


def larger(yes: bool) -> Callable[[Sequence[Shape]], bool]:
    def fits(shapes: Sequence[Shape]) -> bool:
        left, right = sorted(shapes, key=lambda shape: shape.x)
        big, small = (left, right) if yes else (right, left)
        return right.x - left.x > 24 and big.side > 1.35 * small.side

    return fits


def above(yes: bool) -> Callable[[Sequence[Shape]], bool]:
    return lambda shapes: (shapes[1].y - shapes[0].y) * (1 if yes else -1) > 24


def ground(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """Where one of two to four different shapes is: the corners of its box."""

    def asked() -> Sample:
        looks: dict[tuple[str, str], None] = {}
        wanted = int(rng.integers(2, 5))
        while len(looks) < wanted:
            looks[look(rng)] = None
        shapes = arranged(list(looks), rng, sides=(28, 50))
        boxes = [box_text(shape) for shape in shapes]
        question, extra = f"Where is the {shapes[0].name}?", {"distractors": boxes[1:]}
        return Sample(draw(shapes, rng), question, boxes[0], "box", extra, scene=shapes)

    return {split: [asked() for _ in range(n)] for split, n in sizes.items()}


def box_text(shape: Shape) -> str:
    return "[" + ", ".join(f"{value:.2f}" for value in shape.box()) + "]"


def scenes(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """One sentence about the shapes on both sides, or at top and bottom."""
    halves = {
        ("on the left", "on the right"): ((0, 0, SIDE // 2, SIDE), (SIDE // 2, 0, SIDE, SIDE)),
        ("at the top", "at the bottom"): ((0, 0, SIDE, SIDE // 2), (0, SIDE // 2, SIDE, SIDE)),
    }

    def asked() -> Sample:
        places = one_of(list(halves), rng)
        groups = [(int(rng.integers(1, 4)), look(rng)) for _ in places]
        shapes: tuple[Shape, ...] = ()
        for (n, shape), area in zip(groups, halves[places], strict=True):
            shapes += arranged([shape] * n, rng, sides=(16, 30), area=area)
        changed = [[(int(rng.integers(1, 4)), look(rng)), groups[1]] for _ in range(8)]
        wrong = [sentence(other, places) for other in (groups[::-1], *changed) if other != groups]
        extra = {"distractors": list(dict.fromkeys(wrong))[:3]}
        answer = sentence(groups, places)
        return Sample(draw(shapes, rng), "What is in the picture?", answer, "scene", extra, scene=shapes)

    return {split: [asked() for _ in range(n)] for split, n in sizes.items()}


def sentence(groups: Sequence[tuple[int, tuple[str, str]]], places: Sequence[str]) -> str:
    parts = [f"{counted(*group)} {place}" for group, place in zip(groups, places, strict=True)]
    return f"{' and '.join(parts)}.".capitalize()


def captions(sizes: Sizes, rng: np.random.Generator, sources: Sources) -> dict[str, list[Sample]]:
    """What a projector is aligned on: short captions of pictures and of emoji that no task has."""

    def drawn(form: int) -> tuple[str, tuple[Shape, ...]]:
        one, other = look(rng), look(rng)
        if form == 0:
            shapes = arranged([one], rng, sides=(18, 60))
            size = "small" if shapes[0].side < 36 else "large"
            place = f"{ROWS[3 * shapes[0].y // SIDE]} {COLUMNS[3 * shapes[0].x // SIDE]}"
            return f"a {size} {shapes[0].name}, {place}", shapes
        if form == 1:
            shapes = arranged([one, other], rng)
            a, b = sorted(shapes, key=lambda shape: shape.x)
            if abs(shapes[0].y - shapes[1].y) > abs(shapes[0].x - shapes[1].x):
                a, b = sorted(shapes, key=lambda shape: shape.y)
                return f"a {a.name} over a {b.name}", shapes
            return f"a {a.name} beside a {b.name}", shapes
        n = int(rng.integers(2, 7))
        return counted(n, one), arranged([one] * n, rng, sides=(14, 30))

    emoji = sources.emoji(_CAPTIONED) if sources.twitter is not None else []
    emoji = [emoji[i] for i in rng.permutation(len(emoji))]

    def asked(i: int) -> Sample:
        if i % 4 == 3 and emoji:
            name, file = emoji[i // 4 % len(emoji)]
            return Sample(on_light(sources.art("twitter", file), rng, turn=True), "", name, "emoji")
        caption, shapes = drawn(i % 3)
        return Sample(draw(shapes, rng), "", caption, f"caption {i % 3}", scene=shapes)

    return {split: [asked(i) for i in range(n)] for split, n in sizes.items()}


@dataclass(frozen=True)
class Task:
    """How a task is scored and asks for its answers' form, and what draws its samples."""

    metric: str
    style: str
    format: str
    make: Callable[[Sizes, np.random.Generator, Sources], dict[str, list[Sample]]]
    sizes: Sizes


TASKS = {
    "garments": Task(
        "letter",
        "multiple_choice",
        INSTRUCTIONS["multiple_choice"],
        garments,
        {"train": 2000, "eval": 200, "test": 500},
    ),
    "things": Task(
        "exact_match", "short_answer", INSTRUCTIONS["short_answer"], things, {"train": 800, "eval": 200, "test": 200}
    ),
    "numbers": Task(
        "number", "short_answer", "Answer with a number.", numbers, {"train": 1500, "eval": 150, "test": 400}
    ),
    "compare": Task("yes_no", "yes_no", INSTRUCTIONS["yes_no"], compare, {"train": 2000, "eval": 200, "test": 500}),
    "ground": Task("box_iou", "short_answer", "Answer with a box.", ground, {"train": 2000, "eval": 200, "test": 500}),
    "scenes": Task("rouge_l", "brief", "Answer with a sentence.", scenes, {"train": 2000, "eval": 200, "test": 500}),
    "flags": Task(
        "exact_match", "short_answer", INSTRUCTIONS["short_answer"], flags, {"train": 800, "eval": 200, "test": 200}
    ),
}
STREAM = tuple(name for name in TASKS if name != "flags")
"""Tasks in the order of the stream, without those that are made when asked for: the answers' form changes at each."""

CAPTIONS = Task("exact_match", "short_answer", "Caption:", captions, {"train": 1600, "eval": 1, "test": 200})


def write(folder: Path, name: str, task: Task, share: float, seed: int, sources: Sources) -> None:
    """Draw a task's samples, a function of its name, the share and the seed, and write its folder."""
    sizes = {split: max(1, round(share * n)) for split, n in task.sizes.items()}
    splits = task.make(sizes, private_rng(seed, zlib.crc32(name.encode())), sources)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        records = []
        for i, sample in enumerate(samples):
            file = f"images/{split}_{i:04d}.png"
            sample.image.save(folder / file)
            scene = {} if sample.scene is None else {"scene": [list(vars(shape).values()) for shape in sample.scene]}
            about = {"image": file, "id": f"{split}_{i}", "kind": sample.kind, **sample.extra, **scene}
            if split == "train":
                about |= extra_of(sample, SIDE)
            prompt = "\n".join(filter(None, (sample.question, task.format)))
            records.append(Record((("user", prompt),), sample.answer, about))
        write_records(folder / f"{split}.json", records)
    about = {"metric": task.metric, "style": task.style, "format": task.format}
    (folder / "task.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
