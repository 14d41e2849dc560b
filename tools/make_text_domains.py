"""Write domains of raw text from what packages carry, for continual pretraining.

python tools/make_text_domains.py [ROOT] [--domains glosses law code] [--train 400000] [--test 60000] [--seed 0]

ROOT/DOMAIN/{train,test}.jsonl, a document {"text": ...} a line, up to so many characters:

glosses: words and their definitions, of WordNet (apt-get install wordnet-base)
law: copyright files of Debian's packages, each paragraph once in the whole domain
code: sources of Python's standard library

ROOT/short/train.jsonl: one-line descriptions of Debian's packages, as the low-quality text of a dose response, where
length is the only contrast. ROOT/study.jsonl: sentences of WordNet that are in no domain, to plant and follow.
"""

from __future__ import annotations

import argparse
import json
import re
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

from make_instructions import WORDNET as WORDNET
from make_instructions import debian_packages, shuffled, wordnet_senses

from clkit.errors import ConfigurationError, check_whole
from clkit.files import write_atomically
from clkit.rng import private_rng

COPYRIGHTS = Path("/usr/share/doc")
STUDY = 200  # sentences
_LISTS = re.compile(r"@|^(Files|Format|Source|Upstream)", re.MULTILINE)
PIECE = 6000  # characters
_POS = ("noun", "verb")


def glosses() -> list[str]:
    """One document for each synset: its words and what they mean."""
    synsets = [synset for pos in _POS for synset in wordnet_senses(pos)]
    return [f"{', '.join(words).replace('_', ' ')}: {definition}." for words, definition, _ in synsets]


def law() -> list[str]:
    """One document for each copyright file that says something new, without the paragraphs that others have."""
    paths = sorted(COPYRIGHTS.glob("*/copyright"))
    if not paths:
        raise ConfigurationError(f"{COPYRIGHTS} has no copyright files: leave law out with --domains.")
    seen: set[str] = set()
    found = []
    for path in paths:
        paragraphs = path.read_text(encoding="utf-8", errors="replace").split("\n\n")
        # sentences, not lists of files and people; the same licence differs in line breaks and marks
        keys = {_key(text): text for text in paragraphs if len(text) > 120 and not _LISTS.search(text)}
        fresh = [text for key, text in keys.items() if key not in seen]
        seen |= keys.keys()
        if sum(map(len, fresh)) > 200:
            found.append("\n\n".join(fresh))
    return found


def _key(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def code() -> list[str]:
    """One document for each module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path for folder in (root, *(root / "email", root / "json", root / "asyncio")) for path in folder.glob("*.py")
    )
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [text for text in texts if text.strip()]


def short() -> list[str]:
    """One-line descriptions of packages."""
    return list(dict.fromkeys(f"{name}: {description}" for name, _, description in debian_packages()))


def study() -> list[str]:
    """Example sentences, which no gloss has."""
    examples = [example for pos in _POS for *_, found in wordnet_senses(pos) for example in found]
    return list(dict.fromkeys(example for example in examples if 60 <= len(example) <= 120 and '"' not in example))


DOMAINS: dict[str, Callable[[], list[str]]] = {"glosses": glosses, "law": law, "code": code}


def pieces(document: str) -> list[str]:
    """Cut a long document at line ends."""
    found, part, size = [], [], 0
    for line in document.splitlines(keepends=True):
        part.append(line)
        size += len(line)
        if size >= PIECE:
            found.append("".join(part))
            part, size = [], 0
    return [*found, "".join(part)] if part else found


def split(documents: list[str], sizes: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Fill each split with documents up to so many characters; no document is in two of them."""
    rest = iter(shuffled(documents, private_rng(seed, 15)))
    found: dict[str, list[str]] = {}
    for name, size in sizes.items():
        found[name], left = [], size
        for document in rest:
            for piece in pieces(document):
                if left > 0:
                    found[name].append(piece)
                    left -= len(piece)
            if left <= 0:
                break
        if not found[name]:
            raise ConfigurationError(f"There is no text left for {name}; ask for less.")
    return found


def write(path: Path, texts: Iterable[str]) -> None:
    write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def main() -> None:
    """Read the arguments and write the domains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("data/text"))
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--train", type=int, default=400_000, help="characters")
    parser.add_argument("--test", type=int, default=60_000, help="characters")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        for name in ("train", "test"):
            check_whole(name, getattr(args, name), 1)
        check_whole("seed", args.seed, 0)
        for domain in args.domains:
            # the held-out text first, so that it stays the same however much there is to learn
            parts = split(DOMAINS[domain](), {"test": args.test, "train": args.train}, args.seed)
            for name, texts in parts.items():
                write(args.root / domain / f"{name}.jsonl", texts)
            print(f"{args.root / domain}: {', '.join(f'{sum(map(len, t))} {n}' for n, t in parts.items())} characters")
        write(args.root / "short" / "train.jsonl", split(short(), {"train": args.train}, args.seed)["train"])
        write(args.root / "study.jsonl", shuffled(study(), private_rng(args.seed, 16))[:STUDY])
    except ConfigurationError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
