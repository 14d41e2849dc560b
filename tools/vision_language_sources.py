"""Where the pictures of the home-scale stream come from: packages of Debian and npm; see make_vision_language.py."""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clkit.errors import ConfigurationError

FASHION = Path("/usr/share/datasets/fashion-mnist")
FLAGS = Path("/usr/share/iso-flags-png-320x240")


def fashion() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images ``[60000, 28, 28]`` and labels of Debian's dataset-fashion-mnist."""
    if not FASHION.is_dir():
        raise ConfigurationError(f"{FASHION} is missing: apt-get install dataset-fashion-mnist, or use other --tasks.")
    pixels = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)


@dataclass(frozen=True)
class Sources:
    """Folders of npm's emoji-datasource-twitter and -google: with ``emoji.json`` and ``img/VENDOR/64``."""

    twitter: Path | None = None
    google: Path | None = None

    def emoji(self, subcategories: re.Pattern[str]) -> list[tuple[str, str]]:
        """Names of one or two words and files of the emoji that both have, in the order of the list."""
        folder = self.folder("twitter")
        found: dict[str, str] = {}
        listed = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        for entry in sorted(listed, key=lambda entry: int(entry["sort_order"])):
            name = entry["name"].lower().removesuffix(" face")
            plain = re.fullmatch(r"[a-z]+(?:-[a-z]+)?(?: [a-z]+)?", name) and len(name) <= 16
            shown = entry["has_img_twitter"] and entry["has_img_google"] and entry["category"] != "Flags"
            if plain and shown and "oncoming" not in name and subcategories.match(entry["subcategory"]):
                found.setdefault(name, entry["image"])
        return list(found.items())

    def flags(self) -> list[tuple[str, Callable[[], Image.Image], str]]:
        """Names of countries that no other shares its flag with, what opens Debian's picture, and the emoji's file."""
        if not FLAGS.is_dir():
            raise ConfigurationError(f"{FLAGS} is missing: apt-get install iso-flags-png-320x240, or leave flags out.")
        listed = json.loads((self.folder("google") / "emoji.json").read_text(encoding="utf-8"))
        found = []
        for entry in sorted(listed, key=lambda entry: int(entry["sort_order"])):
            name = entry["name"].lower().removesuffix(" flag")
            file = FLAGS / f"{entry['short_name'].removeprefix('flag-')}.png"
            if entry["subcategory"] == "country-flag" and re.fullmatch("[a-z ]{1,24}", name) and file.is_file():
                found.append((name, functools.partial(squared, file), entry["image"]))
        looks = np.stack([[cells(picture()), cells(self.art("google", file))] for _, picture, file in found])
        distances = np.array([np.abs(looks - own).mean((2, 3, 4)).min(1) for own in looks])
        return [flag for flag, row in zip(found, distances, strict=True) if (row < 1).sum() == 1]

    def art(self, vendor: str, file: str) -> Image.Image:
        with Image.open(self.folder(vendor) / "img" / vendor / "64" / file) as image:
            return image.convert("RGBA")

    def folder(self, vendor: str) -> Path:
        """Raises ``ConfigurationError`` if it is not known."""
        folder = self.twitter if vendor == "twitter" else self.google
        if folder is None or not (folder / "emoji.json").is_file():
            raise ConfigurationError(
                f"The emoji of {vendor} are missing: npm pack emoji-datasource-{vendor}, unpack it, and give the "
                f"folder with emoji.json as --{vendor}; or leave things out with --tasks."
            )
        return folder


def squared(file: Path) -> Image.Image:
    """A picture in the middle of a transparent square."""
    with Image.open(file) as image:
        return ImageOps.pad(image.convert("RGBA"), (max(image.size),) * 2)


def cells(image: Image.Image) -> np.ndarray[Any, Any]:
    """The mean colours of 16 x 16 cells."""
    return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float64)
