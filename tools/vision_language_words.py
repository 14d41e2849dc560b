"""Explanations of the answers of the home-scale tasks, in about 20 and about 50 words; see make_vision_language.py.

They are told by rule from what a picture was drawn from, so that answers in other styles need no generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_UNDRAWN = {
    "garment": (
        "one garment in grey on a dark ground, without a person",
        "Its outline was compared with each of the options: with the length of their sleeves and legs, with soles, "
        "heels and handles.",
    ),
    "thing": (
        "one thing, drawn in flat colours on a light ground",
        "Nothing else is in the picture, and what counts is the kind of thing, not the size, the angle or the artist "
        "of the drawing.",
    ),
    "flag": (
        "one flag of a country, drawn on a light ground",
        "Its colours, the order of its stripes and the shapes on them were compared with those of the flags of other "
        "countries.",
    ),
    "digit": (
        "one digit, written by hand in dark strokes on a light ground",
        "Its strokes were followed from the first to the last, and their loops, corners and open ends compared with "
        "those of the ten digits.",
    ),
}


class Drawn(Protocol):
    kind: str
    colour: str
    x: int
    y: int
    side: int


def explanations(
    kind: str, truth: str, question: str, scene: Sequence[Drawn] | None, side: int
) -> Mapping[str, str] | None:
    """Return the ``brief`` and the ``detailed`` explanation of an answer, which both repeat it.

    Args:
        kind: Which question it is; of others than are known here there is none.
        truth: The right answer, of a question with options the text of the right one.
        question: What is asked, in one line.
        scene: The shapes of a drawn picture; the first is the one asked for.
        side: Pixels of the picture on a side.
    """
    so = f"So the right answer is {truth}."
    if kind in _UNDRAWN:
        shown, compared = _UNDRAWN[kind]
        return {
            "brief": f"The picture shows {shown}. {so}",
            "detailed": f"The picture shows {shown}. {compared} The question is: {question} {so}",
        }
    if scene is None or kind not in ("count", "larger", "colour", "above", "box"):
        return None
    names = [f"a {shape.colour} {shape.kind} {place(shape, side)}" for shape in scene]
    if kind == "count":
        brief = f"The picture shows {scene[0].colour} shapes, each a {scene[0].kind}, and nothing else. {so}"
    elif kind == "box":
        brief = f"The picture shows {len(scene)} shapes, among them {names[0]}. {so}"
    else:
        brief = f"The picture shows {' and '.join(names)}. {so}"
    seen = f"The picture shows {', '.join(names)}, and nothing else."
    return {"brief": brief, "detailed": f"{seen} The question is: {question} {so}"}


def place(shape: Drawn, side: int) -> str:
    """Where a shape's middle is, in thirds of the picture."""
    return f"at the {ROWS[3 * shape.y // side]} {COLUMNS[3 * shape.x // side]}"


def extra_of(sample: Any, side: int) -> dict[str, Any]:
    """Return what a sample's record has more for it: ``explanations``, if there are any."""
    choices = sample.extra.get("choices")
    truth = choices["ABCD".index(sample.answer)] if choices else sample.answer
    found = explanations(sample.kind, truth, sample.question.partition("\n")[0], sample.scene, side)
    return {} if found is None else {"explanations": found}
