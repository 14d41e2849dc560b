"""``clkit export``: what a run has learned, as files that other programs load."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_model
from torch import nn

from clkit import __version__
from clkit.data.hooks import callbacks_of
from clkit.errors import ConfigurationError
from clkit.evaluation.held_out import held_out
from clkit.files import unfinished_name
from clkit.language.models import LanguageModule, load_processor, load_tokenizer
from clkit.method.adapters import knows_layers, unsaved
from clkit.method.routing import Router, mixer_of, route_of
from clkit.method.strategy import Strategy, chosen_view, views_of
from clkit.metrics.history import History
from clkit.run.trained import Reader, restore

_SHOWN = 30


def export(
    run: str | Path,
    out: str | Path,
    *,
    at: int | None = None,
    view: str | None = None,
    merge: bool = False,
    data_root: str | Path | None = None,
) -> list[Path]:
    """Write what a run has learned into a new folder, with a card (``README.md``) that says what it is.

    - A model of transformers becomes a folder for ``from_pretrained``: its weights as safetensors, adapters merged,
      with tokenizer or processor and generation config, in names that transformers 4 reads too. Where the weights
      below an adapter are those that the run started with, and peft saves all else, it is a folder of peft instead,
      unless ``merge``.
    - Another network becomes ``model.safetensors``, the state dict of the network alone with adapters merged, and
      ``model.json``, which says how it was built.
    - A method that predicts some samples with other weights than others (``per_task``, ``instruction_groups``) becomes
      one such folder for each group, and ``router.json``, which says which group is whose.

    Args:
        run: A folder of ``clkit train``.
        out: The folder to write; it must not exist, or be empty.
        at: Index of an experience, for the weights at its end; those of the run's end when ``None``.
        view: Weights that a strategy offers under this name, or ``"live"``; what the method predicts with when
            ``None``.
        merge: Merge adapters although a folder of peft would do.
        data_root: Where the data are now, if they have moved.

    Returns:
        The files.

    Raises:
        ConfigurationError: See :func:`clkit.load`; if ``out`` holds files, or the layers are such that only clkit can
            compute (``moelora``, ``disco``).
    """
    run, out = Path(run), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out} is there and not empty; name a new folder to write to.")
    unfinished = unfinished_name(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        restore(run, _Exporter(run, unfinished, view, merge), at, data_root, "cpu")
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return sorted(path for path in out.rglob("*") if path.is_file())


class _Exporter(Reader):
    """Writes each group of weights while it is in the module."""

    def __init__(self, run: Path, out: Path, view: str | None, merge: bool) -> None:
        super().__init__(view)
        self.run, self.out, self.merge = run, out, merge

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.eval()
        mixer = mixer_of(trainer)
        if mixer is not None and self.view is None:
            raise ConfigurationError(
                f"{type(mixer).__name__} predicts each sample with a mixture of its own, which other programs do not "
                "compute; use clkit eval, or take the last experience's weights alone with view=live (--view live)."
            )
        router = next(iter(callbacks_of(trainer, Router)), None)
        views = views_of(trainer)
        if router is None or self.view is not None:
            name, view = chosen_view(trainer, self.view)
            with view(pl_module):
                kind = self._write(trainer, pl_module, self.out)
            self._card(trainer, name, {"": kind})
            return
        groups = {"live": router.current or "live", **{name: name for name in router.bank}}
        kinds = {}
        for name, group in groups.items():
            with views[name](pl_module):
                kinds[_slug(group)] = self._write(trainer, pl_module, self.out / _slug(group))
        self._router(trainer, router, groups)
        self._card(trainer, "of each group", kinds)

    def _router(self, trainer: pl.Trainer, router: Router, groups: Mapping[str, str]) -> None:
        route = route_of(trainer)
        assert route is not None
        whose = {}
        for experience in list(cast(Any, trainer).datamodule.stream)[: self.last + 1]:
            dataset = held_out(experience, "test")
            found = Counter(route(experience, dataset, torch.arange(len(cast(Sequence[Any], dataset)))))
            whose[experience.name] = {_slug(groups[name]): n for name, n in found.items()}
        state = {key: part for key, part in router.state_dict().items() if key not in ("bank", "initial")}
        content = {"router": type(router).__name__, "experiences": whose, "state": state}
        (self.out / "router.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> str:
        """Write the weights in the module; return what kind of folder it is."""
        folder.mkdir(parents=True, exist_ok=True)
        net: Any = module.net if hasattr(module, "net") else module
        adapted = hasattr(net, "merge_and_unload")
        if adapted and not knows_layers(net):
            raise ConfigurationError(
                f"The adapter of {self.run} can neither be merged nor loaded by peft, which does not know what a "
                "strategy made of its layers, such as experts; use clkit.load(RUN) where clkit is installed."
            )
        if isinstance(module, LanguageModule):
            self._reader_of_texts(trainer, folder)
            moved = any(strategy.changes_frozen for strategy in callbacks_of(trainer, Strategy))
            if adapted and not (moved or self.merge or unsaved(net)):
                net.save_pretrained(folder)
                return "peft"
            plain = copy.deepcopy(net).merge_and_unload() if adapted else net
            plain.save_pretrained(folder, safe_serialization=True)
            _rewrite(folder / "config.json", _with_old_names)
            return "transformers"
        plain = cast(nn.Module, copy.deepcopy(net).merge_and_unload() if adapted else net)
        save_model(plain, str(folder / "model.safetensors"))
        stream = cast(Any, trainer).datamodule.stream
        about = {
            "network": OmegaConf.to_container(self.config.model, resolve=True).get("net"),  # type: ignore[union-attr]
            "input_shape": list(stream.input_shape),
            "n_classes": len(cast(Any, module).seen) if getattr(module, "grows", False) else stream.n_classes,
            "classes": {experience.name: list(experience.classes) for experience in stream},
        }
        (folder / "model.json").write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")
        return "state dict"

    def _reader_of_texts(self, trainer: pl.Trainer, folder: Path) -> None:
        stream, name = cast(Any, trainer).datamodule.stream, self.config.model.net
        images = getattr(stream, "images", None)
        if images is not None:
            processor = getattr(images, "processor", None) or load_processor(str(name))
            processor.save_pretrained(folder)
        else:
            tokenizer = getattr(stream[0].test, "tokenizer", None) or load_tokenizer(str(name))
            tokenizer.save_pretrained(folder)
        _rewrite(folder / "tokenizer_config.json", _in_old_words)

    def _card(self, trainer: pl.Trainer, view: str, kinds: Mapping[str, str]) -> None:
        # peft and transformers write cards of their own
        for path in self.out.rglob("README.md"):
            path.unlink()
        lines = _card_lines(self.run, self.config, trainer, self.last, view, kinds)
        (self.out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if path.is_file():
        content = json.dumps(change(json.loads(path.read_text(encoding="utf-8"))), indent=2, ensure_ascii=False)
        path.write_text(content + "\n", encoding="utf-8")


def _with_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Repeat what transformers 5 says of rotary embeddings in the names of 4, which takes its defaults otherwise."""
    found = {key: _with_old_names(part) if key == "text_config" else part for key, part in config.items()}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_type" in rope:
        own = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        found |= own if rope["rope_type"] == "default" else {**own, "rope_scaling": rope}
    return found


def _in_old_words(config: dict[str, Any]) -> dict[str, Any]:
    """Name what transformers 5 writes of a tokenizer as 4 does, which 5 reads too."""
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


_LOADS = {
    "peft": [
        "from peft import PeftModel",
        "from transformers import {auto}, {reader}",
        "",
        "base = ...  # that adapter_config.json names",
        'model = PeftModel.from_pretrained({auto}.from_pretrained(base), "{folder}")',
        '{name} = {reader}.from_pretrained("{folder}")',
    ],
    "transformers": [
        "from transformers import {auto}, {reader}",
        "",
        'model = {auto}.from_pretrained("{folder}")',
        '{name} = {reader}.from_pretrained("{folder}")',
    ],
    "state dict": [
        "from safetensors.torch import load_model",
        "",
        "net = ...  # built as model.json says",
        'load_model(net, "{folder}/model.safetensors")',
    ],
}


def _card_lines(
    run: Path, config: Any, trainer: pl.Trainer, last: int, view: str, kinds: Mapping[str, str]
) -> Iterator[str]:
    stream = cast(Any, trainer).datamodule.stream
    method = ", ".join(config.get("strategy") or {}) or "finetuning"
    yield f"# {stream.name}, {method}"
    yield ""
    yield (
        f"What `clkit {__version__}` has learned by {method} from {last + 1} experience(s) of {stream.name} "
        f"({stream.kind}), one after another: the {view} weights after experience {last} ({stream[last].name})."
    )
    yield from ("", "## Loading it", "", "```python")
    folder, kind = next(iter(kinds.items()))
    reader = "AutoTokenizer" if getattr(stream, "images", None) is None else "AutoProcessor"
    words = {"folder": folder or ".", "auto": getattr(trainer.lightning_module, "auto", ""), "reader": reader}
    words["name"] = reader.removeprefix("Auto").lower()
    yield from (line.format(**words) for line in _LOADS[kind])
    yield "```"
    if folder:
        yield from ("", f"One folder for each group ({', '.join(kinds)}); `router.json` says whose samples are whose.")
    yield from ("", "## Data", "", "| experience | training samples | held out | classes |", "|---|---:|---:|---|")
    for experience in list(stream)[: last + 1]:
        classes = ", ".join(map(str, experience.classes[:_SHOWN]))
        yield f"| {experience.name} | {len(experience.train)} | {len(experience.test)} | {classes} |"
    yield from ("", "## Method", "", "```yaml")
    content = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    shown = {key: content[key] for key in ("seed", "strategy", "model", "data", "from") if content.get(key) is not None}
    yield OmegaConf.to_yaml(OmegaConf.create(shown)).rstrip()
    yield "```"
    yield from _scores(run, config, stream, last)
    yield from ("", "## Limits", "")
    yield "- Scores are of the held-out data of these experiences, and of nothing else."
    yield "- What was learned first may be partly forgotten: compare each score with its highest."
    yield "- Nothing was tested for safety, bias or the leaking of training data, which a memory of samples favours."


def _scores(run: Path, config: Any, stream: Any, last: int) -> Iterator[str]:
    path = run / "history.csv"
    if not path.is_file():
        return
    history = History.read(path).select("end")
    rows = history.scores[history.experience <= last]
    if not len(rows):
        return
    best = [max((value for value in column if value == value), default=float("nan")) for column in rows.T]
    yield from ("", "## Scores", "")
    of = f"{config.evaluation.score} of the complete {config.evaluation.split} data"
    yield f"Mean {of}, at the end and at its highest:"
    yield from ("", "| experience | at the end | highest |", "|---|---:|---:|")
    for k in range(last + 1):
        yield f"| {stream[k].name} | {rows[-1][k]:.3f} | {best[k]:.3f} |"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
