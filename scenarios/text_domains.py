"""Domains of raw text, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clkit.data.stream import Experience, Stream
from clkit.errors import ConfigurationError, check_choice, check_keys, check_whole
from clkit.language.chunks import Mixture, PadPacked, TextChunks, check_share
from clkit.language.dataset import Pad
from clkit.language.models import load_tokenizer
from clkit.language.text_store import SUFFIXES, Documents, TextFiles, TextStore, TextTable, store_of
from clkit.rng import private_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "eval", "test"]
SPLITS: tuple[Split, ...] = ("train", "eval", "test")
_READING = ("column", "separator", "quality")
_HUB = ("hub", "name", "splits", "options")


class TextDomains(Stream):
    """A stream for continual pretraining: each experience is the raw text of one domain, in chunks of equal length.

    Samples are ``{"input_ids": [S], "labels": [S]}``, every token with a label, see
    :class:`~clkit.language.chunks.TextChunks`; batches have ``attention_mask`` too. Texts are encoded once for all
    runs, into a file that is mapped into memory (:func:`~clkit.language.text_store.store_of`). A domain is

    - a folder with ``train`` and, if there are some, ``test`` and ``eval``, each a ``.txt``, ``.jsonl`` or
      ``.parquet`` file, or a folder of such files;
    - a file, or a folder of files with other names, of which ``held_out`` is held out;
    - a mapping with files ``train``, ``test`` and ``eval``: paths, or lists of them;
    - a mapping with ``hub``, a data set of Hugging Face (needs ``datasets``): its ``name``, the ``splits`` that stand
      for train, test and eval; ``options`` are more arguments of ``datasets.load_dataset``.

    A mapping may also have a ``column``, ``separator`` and ``quality`` of its own. A ``.txt`` file is one document, or
    several with a ``separator`` between them.

    Args:
        domains: Domains in order, by name; or names of folders and files in ``root``. All of ``root`` in alphabetical
            order when ``None``.
        tokenizer: A tokenizer of transformers, or the name or path of one (also a ``.gguf`` file).
        root: Where folders and files are.
        cache: Folder of the encoded texts; ``.tokens`` in ``root`` when ``None``.
        length: Tokens of a chunk.
        boundaries: Keep the documents of a chunk apart: no attention from one to another, positions from 0 in each.
        end_token: The token that ends a document; the tokenizer's own end token when ``None``.
        column: Entry of a JSON object, or column of a table, that is the text.
        separator: What stands between two documents of a ``.txt`` file.
        quality: Entry or column with a number that says how good a document is.
        held_out: Share of the documents that are held out for testing, drawn from ``seed``, where a domain has no test
            files.
        limit: Most tokens of each split: one number, or one for each (``train``, ``eval``, ``test``); all when
            ``None``. Several epochs are several passes over what is left.
        choose: Which training documents a limit leaves: ``"random"``, or the ``"best"`` by ``quality``.
        mix: Another text, and the share of each domain's training chunks that it takes the place of, at equal tokens:
            ``{"source": SOURCE, "share": p}`` with a source as a domain is; ``"domains"`` names those that it comes
            into, all when left out.
        seed: Seed of the order of documents, and of all that is drawn.
        name: Name of the stream.

    Attributes:
        stores: The encoded training texts, by domain.

    Raises:
        ConfigurationError: If a file or folder is missing or broken, a domain has fewer tokens than a chunk, or a
            setting is out of range.

    Reference: Ibrahim et al., *Simple and Scalable Strategies to Continually Pre-train Large Language Models*,
    arXiv 2403.08763; a subset and several passes: arXiv 2406.14833.
    """

    def __init__(
        self,
        domains: Mapping[str, Any] | Sequence[str] | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase,
        root: str | Path = ".",
        cache: str | Path | None = None,
        length: int = 1024,
        boundaries: bool = False,
        end_token: str | None = None,
        column: str = "text",
        separator: str | None = None,
        quality: str | None = None,
        held_out: float = 0.1,
        limit: int | Mapping[Split, int | None] | None = None,
        choose: Literal["random", "best"] = "random",
        mix: Mapping[str, Any] | None = None,
        seed: int = 0,
        name: str = "text",
    ) -> None:
        root = Path(root)
        if not 0 < held_out < 1:
            raise ConfigurationError(f"held_out={held_out} is not possible; use a share above 0 and below 1.")
        check_choice("choose", choose, ("random", "best"))
        limits = dict(limit) if isinstance(limit, Mapping) else dict.fromkeys(SPLITS, limit)
        check_keys("limit", limits, SPLITS)
        for split, most in limits.items():
            if most is not None:
                check_whole(f"limit of {split}", most, length)
        sources = _sources(domains, root)
        reading = {"column": column, "separator": separator, "quality": quality}
        loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        own_cache = root / ".tokens" if cache is None else Path(cache)

        def stores(domain: str, source: Any) -> dict[Split, TextStore]:
            found = _documents(domain, source, root, reading)
            return {
                split: store_of(part, loaded, own_cache, end_token=end_token, name=f"{domain}/{split}")
                for split, part in found.items()
            }

        def chunks(store: TextStore, documents: NDArray[np.int64], what: str, most: int | None, *at: int) -> TextChunks:
            settings: dict[str, Any] = {"length": length, "boundaries": boundaries, "limit": most}
            return TextChunks(store, documents, seed=(seed, 9, *at), name=what, **settings)

        mixed = _Mix.of(mix, sources)
        other = None
        if mixed is not None:
            texts = stores("mix", mixed.source)["train"]
            other = chunks(texts, np.arange(len(texts)), "mix", None, len(sources), 0)
        self.stores: dict[str, TextStore] = {}
        experiences = []
        for index, (domain, source) in enumerate(sources.items()):
            found = stores(domain, source)
            self.stores[domain] = found["train"]
            documents = {split: np.arange(len(store)) for split, store in found.items()}
            if "test" not in found:
                found["test"] = found["train"]
                documents["train"], documents["test"] = _held_out(
                    domain, len(found["train"]), held_out, (seed, 10, index)
                )
            if choose == "best":
                documents["train"] = _best(domain, found["train"], documents["train"], limits.get("train"))
            data = {
                split: chunks(store, documents[split], f"{domain}/{split}", limits.get(split), index, place)
                for place, split in enumerate(SPLITS)
                if (store := found.get(split)) is not None
            }
            train: TextChunks | Mixture = data["train"]
            if other is not None and mixed is not None and domain in mixed.domains:
                train = Mixture(data["train"], other, mixed.share, seed=(seed, 11, index))
            experiences.append(Experience(index, domain, train, data["test"], data.get("eval")))
        collate = PadPacked() if boundaries else Pad()
        super().__init__(experiences, name=name, kind="domain-incremental", collate_fn=collate)


class _Mix:
    """What comes into the place of a share of the domains' chunks."""

    def __init__(self, source: Any, share: float, domains: Sequence[str]) -> None:
        self.source, self.share, self.domains = source, share, domains

    @classmethod
    def of(cls, mix: Mapping[str, Any] | None, sources: Mapping[str, Any]) -> _Mix | None:
        if mix is None:
            return None
        check_keys("mix", mix, ("source", "share", "domains"))
        missing = [key for key in ("source", "share") if mix.get(key) is None]
        if missing:
            raise ConfigurationError(f"mix has no {missing[0]}; write {{source: SOURCE, share: 0.05}}.")
        check_share("share of mix", mix["share"])
        domains = list(mix.get("domains") or sources)
        unknown = [domain for domain in domains if domain not in sources]
        if unknown:
            raise ConfigurationError(f"mix names {unknown[0]!r}, which is no domain; they are {', '.join(sources)}.")
        return cls(mix["source"], mix["share"], domains) if mix["share"] else None


def _held_out(domain: str, n: int, share: float, seeds: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of ``n`` documents are for training, and which are held out: at least one each, in order."""
    if n < 2:
        raise ConfigurationError(
            f"{domain} is one document and has no test files, so nothing of it can be held out; give it test files, or "
            "a separator between its documents (scenario.separator)."
        )
    order = private_rng(*seeds).permutation(n)
    held = min(max(round(share * n), 1), n - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def _best(domain: str, store: TextStore, documents: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """The best documents that fill a limit, in the order of the store."""
    found = store.quality[documents]
    if np.isnan(found).any():
        raise ConfigurationError(
            f"choose='best', but documents of {domain} have no quality; say which entry or column holds it "
            "(scenario.quality), or use choose=random."
        )
    ranked = documents[np.argsort(-found, kind="stable")]
    before = np.cumsum(store.lengths[ranked]) - store.lengths[ranked]
    return np.sort(ranked if limit is None else ranked[before < limit])


def _sources(domains: Mapping[str, Any] | Sequence[str] | None, root: Path) -> dict[str, Any]:
    if isinstance(domains, str):
        raise ConfigurationError(f"domains={domains!r} is one text; use a list of names, [{domains}].")
    if domains is None:
        found = sorted(path for path in root.iterdir() if _is_domain(path)) if root.is_dir() else []
        if not found:
            raise ConfigurationError(
                f"There is no text in {root}; give each domain a folder, or {', '.join(SUFFIXES)}."
            )
        domains = [path.name for path in found]
    if isinstance(domains, Mapping):
        return dict(domains)
    names = [Path(name).stem if name.endswith(SUFFIXES) else name for name in domains]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"Two domains have one name: {', '.join(names)}; use NAME: FOLDER.")
    return dict(zip(names, domains, strict=True))


def _is_domain(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_dir() or path.suffix in SUFFIXES)


def _documents(domain: str, source: Any, root: Path, reading: Mapping[str, str | None]) -> dict[Split, Documents]:
    """The documents of each split that a source has."""
    if isinstance(source, Mapping):
        own = {**reading, **{key: source[key] for key in _READING if key in source}}
        if "hub" in source:
            check_keys(f"Domain {domain!r}", source, (*_HUB, *_READING))
            return _from_hub(domain, source, own)
        check_keys(f"Domain {domain!r}", source, (*SPLITS, *_READING))
        if "train" not in source:
            raise ConfigurationError(f"Domain {domain!r} has no train; give it a file, or a list of files.")
        files = {
            split: [path for entry in _listed(source[split]) for path in _files(root / entry)]
            for split in SPLITS
            if source.get(split) is not None
        }
    else:
        own, path = dict(reading), root / str(source)
        if not path.exists():
            there = sorted(other.name for other in root.iterdir() if _is_domain(other)) if root.is_dir() else []
            raise ConfigurationError(f"There is no {path}; {root} has {', '.join(there) or 'no text'}.")
        files = _splits(path)
    return {split: TextFiles(paths, **own) for split, paths in files.items()}


def _splits(path: Path) -> dict[Split, list[Path]]:
    """The files of each split of a folder; those of a folder that names none are all for training."""
    if path.is_file():
        return {"train": [path]}
    named: dict[Split, list[Path]] = {}
    for split in SPLITS:
        there = [path / split, *(path / f"{split}{suffix}" for suffix in SUFFIXES)]
        found = [file for entry in there if entry.exists() for file in _files(entry)]
        if found:
            named[split] = found
    if not named:
        return {"train": _files(path)}
    if "train" not in named:
        raise ConfigurationError(f"{path} has {', '.join(named)} but no train file; add one.")
    return named


def _files(path: Path) -> list[Path]:
    """A file, or the files of text below a folder in order."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not found:
        raise ConfigurationError(f"There is no {', '.join(SUFFIXES)} file in {path}.")
    return found


def _listed(paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _from_hub(domain: str, source: Mapping[str, Any], reading: Mapping[str, str | None]) -> dict[Split, Documents]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            "Data sets of Hugging Face need the package datasets; run pip install 'clkit[language]'."
        ) from error
    names = dict(source.get("splits") or {"train": "train"})
    check_keys(f"Domain {domain!r}, splits", names, SPLITS)
    if "train" not in names:
        raise ConfigurationError(f"Domain {domain!r} has no train split; name it in splits: {{train: NAME}}.")
    found: dict[Split, Documents] = {}
    for split in SPLITS:
        if split not in names:
            continue
        try:
            table = datasets.load_dataset(
                source["hub"], source.get("name"), split=names[split], **dict(source.get("options") or {})
            )
        except Exception as error:
            raise ConfigurationError(
                f"Domain {domain!r}: datasets cannot load split {names[split]!r} of {source['hub']!r} "
                f"({type(error).__name__}: {error}). Check hub, name and splits."
            ) from error
        found[split] = TextTable(table, column=str(reading["column"]), quality=reading["quality"])
    return found
