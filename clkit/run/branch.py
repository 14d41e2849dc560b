"""``from=RUN@K``: a run that goes on from the end of an experience of another one."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.seed import isolate_rng

from clkit.data.branch import OPTIMIZER, Past
from clkit.data.stream import Stream
from clkit.errors import ConfigurationError, suggest
from clkit.evaluation.kept_data import kept_experience
from clkit.files import put_in_place, unfinished_name
from clkit.run.checkpoint import experience_ends
from clkit.run.inherit import named
from clkit.run.kept import end_of

START = "start"
"""Folder of what a run has taken over from the one that it goes on from."""
HELD_OUT = "held_out"
_WAIT = 60.0
_OF_EXPERIENCES = (HELD_OUT, "adapters", "answers")


@dataclass(frozen=True)
class Start:
    """Where a run starts: in its own folder, so that the other one may go.

    Args:
        folder: The folder :data:`START` of the run.
    """

    folder: Path

    @classmethod
    def of(cls, config: Any) -> Start | None:
        """Return where a run starts, if it goes on from another one; ``config.folder`` is its folder."""
        return None if config.get("from") is None else cls(Path(config.folder) / START)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that it goes on from."""
        return self.folder / "start.ckpt"

    @property
    def past(self) -> Past:
        """What was learned before."""
        return Past.read(self.checkpoint)

    def take_over(self, config: Any) -> None:
        """Link or copy the checkpoint and the history of the run that a config names, unless that was done before.

        Raises:
            ConfigurationError: If there is no such run, or it has not kept what is needed.
        """
        if self.checkpoint.is_file():
            return
        run, at = named(config["from"])
        there = _config_of(run)
        source = end_of(run, at, whole=True)
        learned = len(Past.read(source).experiences)
        for history in [run / "history.csv", *run.glob("*/history.csv")]:
            target = self.folder.parent / history.relative_to(run)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(history, target)
        for name in _OF_EXPERIENCES if config.share_first else (HELD_OUT,):
            if (run / name).is_dir():
                shutil.copytree(run / name, self.folder.parent / name, dirs_exist_ok=True)
        for end in experience_ends(run / "checkpoints") if config.share_first else ():
            _link(end, self.folder.parent / "checkpoints" / end.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        earlier = Start(run / START).segments if (run / START).is_dir() else []
        segments = [*earlier, {"config": OmegaConf.to_container(there), "experiences": learned}]
        (self.folder / "past.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(segments)), encoding="utf-8")
        _link(source, self.checkpoint)

    def wait(self) -> None:
        """Wait until the first process has taken all over."""
        end = time.monotonic() + _WAIT
        while not self.checkpoint.is_file() and time.monotonic() < end:
            time.sleep(0.1)

    @property
    def segments(self) -> list[dict[str, Any]]:
        """The configs of the runs that came before, the first one first, and how many experiences each had learned."""
        path = self.folder / "past.yaml"
        found = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else []
        return cast(list[dict[str, Any]], found)

    def joined(self, stream: Stream) -> Stream:
        """Return a stream that begins with what was learned: the one given, or the learned experiences before it.

        Raises:
            ConfigurationError: If the given one holds some of them, but does not begin with all; if nothing is new; or
                if the data of those learned are not where they were.
        """
        learned = self.past.experiences
        prints, own = [about["fingerprint"] for about in learned], stream.fingerprints()
        names = [about["name"] for about in learned]
        if own[: len(prints)] == prints:
            if len(stream) == len(prints):
                raise ConfigurationError(
                    f"Stream {stream.name!r} has the {len(prints)} experience(s) that were learned before, and no "
                    "other; give more."
                )
            return stream
        again = [e.name for e, one in zip(stream, own, strict=True) if e.name in names or one in prints]
        if again:
            raise ConfigurationError(
                f"Stream {stream.name!r} has {again[0]!r}, which was learned before, but does not begin with all that "
                f"was learned ({', '.join(names)}), or not with the same data. Give new experiences alone, under names "
                "of their own, or all of them from the first."
            )
        return stream.after(self._past_stream(stream, names, prints))

    def _past_stream(self, stream: Stream, names: Sequence[str], prints: Sequence[str]) -> Stream:
        kept = [kept_experience(self.folder.parent / HELD_OUT, k) for k in range(len(prints))]
        if all(e is not None and e.known_as == one for e, one in zip(kept, prints, strict=True)):
            classes = [c for e in kept if e is not None for c in e.classes]
            n_classes = 1 + max(classes) if classes else None
            there = [e for e in kept if e is not None]
            return Stream(there, name=stream.name, kind=stream.kind, n_classes=n_classes)
        past: Stream | None = None
        try:
            with isolate_rng():
                for segment in self.segments:
                    config = OmegaConf.create(segment["config"])
                    own: Stream = instantiate(cast(DictConfig, config).scenario)
                    begins = past is None or own.fingerprints()[: len(past)] == past.fingerprints()
                    past = (own if begins else own.after(cast(Stream, past)))[: segment["experiences"]]
        except Exception as error:
            raise _gone(names, " ".join(str(error).split())) from error
        if past is None or past.fingerprints() != list(prints):
            raise _gone(names, "what is there now is something else")
        return past


def _gone(names: Sequence[str], why: str) -> ConfigurationError:
    return ConfigurationError(
        f"The held-out data of what was learned before ({', '.join(names)}) cannot be read: {why}. Put them back, or "
        "keep them with the run: callbacks=keep_held_out of the run that is gone on from."
    )


def classes_of(config: Any) -> list[str]:
    """Return what of ``fresh`` starts fresh, the names of a config's parts as those of their classes.

    Raises:
        ConfigurationError: If there is no such part.
    """
    parts = {**(config.get("strategy") or {}), **(config.get("callbacks") or {})}
    found = []
    for name in config.get("fresh") or ():
        if name != OPTIMIZER and name not in parts:
            raise ConfigurationError(f"fresh has {name!r}, which is nothing here; {suggest(name, [OPTIMIZER, *parts])}")
        found.append(OPTIMIZER if name == OPTIMIZER else str(parts[name]["_target_"]).rpartition(".")[2])
    return found


def about(config: Any, past: Past) -> dict[str, Any]:
    """Return what ``run.json`` says of the run that another one goes on from."""
    run, _ = named(config["from"])
    last = past.experiences[-1]
    return {"run": str(run), "experience": len(past.experiences) - 1, "name": last["name"]}


def _link(source: Path, target: Path) -> None:
    """Let a file be at another place too, as a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(target)
    unfinished.unlink(missing_ok=True)
    try:
        os.link(source, unfinished)
    except OSError:
        shutil.copyfile(source, unfinished)
    put_in_place(unfinished, target)


def _config_of(run: Path) -> Any:
    file = run / ".hydra" / "config.yaml"
    if not file.is_file():
        raise ConfigurationError(f"from={run}: there is no {file}; give the folder of a run that clkit train made.")
    return OmegaConf.load(file)


def parent_of(record: Mapping[str, Any]) -> str:
    """Say in a few words what a run goes on from, as its ``run.json`` has it."""
    return f"{record['run']} after experience {record['experience']} ({record['name']})"
