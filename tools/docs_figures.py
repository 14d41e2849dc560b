"""Run every strategy for a few seconds and draw what it does, for the pages of the documentation.

python tools/docs_figures.py

Runs are kept below .cache/docs/runs, by their configuration; only what is missing is trained.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import shlex
import textwrap
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from pretrain import pretrain

from clkit import StabilityGap, StreamDataModule
from clkit.metrics.history import History
from clkit.report.figures import save, stability_gap_figure
from clkit.run import train
from clkit.run.jobs import quieten_libraries
from clkit.run.plugins import choices
from clkit.strategies import DISCO, InstructionGroups
from clkit.testing import small_instructions, small_language_module

CACHE = Path(__file__).parents[1] / ".cache" / "docs"
FIGURES = CACHE / "figures"
_WEIGHTS = CACHE / "vit_digits.pt"
_LORA = "experiment=lora_digits"
_ROTATED = ["scenario=rotated_digits", "scenario.angles=[0,80,160]", "data.epochs=2", "evaluation.every=2"]
_OVERRIDES = {
    "cumulative": ["evaluation.every=5"],
    "ewc": [*_ROTATED, "strategy.ewc.strength=100"],
    "feature_distillation": _ROTATED,
    "fpf": ["strategy.fpf.when=experience"],
    "ilora": [_LORA],
    "joint": ["evaluation.every=5"],
    "l2": _ROTATED,
    "lwf": _ROTATED,
    "mas": _ROTATED,
    "moelora": [_LORA],
    "olora": [_LORA],
    "reglora": [_LORA],
    "replay_share": ["strategy.replay_share.share=0.25"],
    "si": [*_ROTATED, "strategy.si.strength=1"],
}
BEHIND_A_MEMORY = ("fpf", "freeze_old_rows", "head_init", "head_warmup", "lpr", "nmc", "soft_targets", "weight_average")
"""Strategies that need another's memory, or show more with one."""
_SMALL = (
    "of a Llama of two layers (`small_instructions` and `small_language_module` of [`clkit.testing`][clkit.testing])"
)
TEXTS = {
    "disco": f"Three small instruction tasks, learned by LoRA {_SMALL}. Their prompts differ, so that each sample has "
    "the slot of its own task almost alone.",
    "instruction_groups": f"Three small instruction tasks, learned by all weights {_SMALL}. Their instructions differ, "
    "so each has a group of its own.",
}
"""What the figures of strategies that need prompts show."""
_PATH = re.compile(r' d="[^"]*"')
_QUIET = ["trainer=cpu", "trainer.enable_progress_bar=false", "logger=none", "checkpoint.every_n_steps=null"]


def command(name: str) -> list[str]:
    """Return paragraphs of Markdown that say what the figure of a strategy shows."""
    if name in TEXTS:
        return [TEXTS[name]]
    lines, said = [_wrapped(["clkit", "train", *map(shlex.quote, overrides(name))])], []
    if _LORA in overrides(name):
        said = ["LoRA on a small vision transformer that knows four other digits:"]
        lines.insert(0, f"python tools/pretrain.py --dataset digits --steps 300 --output {_WEIGHTS.name}")
    elif _ROTATED[0] in overrides(name):
        said = ["All digits, turned by 80 degrees more in each experience, in 8x8 pixels:"]
    return [*said, "```console\n" + "\n".join(lines) + "\n```"]


def _wrapped(words: list[str], width: int = 72) -> str:
    lines = textwrap.wrap(" ".join(words), width, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines)


def overrides(name: str) -> list[str]:
    """What the command line says to make a strategy's figure."""
    chosen = f"strategy=[er,{name}]" if name in BEHIND_A_MEMORY else f"strategy={name}"
    return [chosen, *_OVERRIDES.get(name, [])]


def history_of(name: str) -> Path:
    """Train a strategy, if it was not yet, and return its run folder."""
    if name in TEXTS:
        return _texts(name, CACHE / "runs" / name)
    extra = [f"model.net.weights={_WEIGHTS}"] if _LORA in overrides(name) else []
    with initialize_config_module("clkit.conf", version_base="1.3"):
        config = compose("train", overrides=[*overrides(name), *_QUIET, *extra])
    folder = CACHE / "runs" / f"{name}-{train.fingerprint(config)}"
    if not train.is_finished(folder):
        train.fit(*train.build(config, folder), None)
    return folder


def _texts(name: str, folder: Path) -> Path:
    if not train.is_finished(folder):
        torch.manual_seed(0)
        whole, strategy = ({}, DISCO()) if name == "disco" else ({"adapter": None}, InstructionGroups())
        module = small_language_module(**whole, optimizer=functools.partial(torch.optim.AdamW, lr=3e-3))
        data = StreamDataModule(small_instructions(n=96), batch_size=8, epochs=5)
        gap = StabilityGap(score="token_accuracy", dir=folder, plot=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=data.total_epochs,
            callbacks=[strategy, gap],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
    return folder


def _rounded(path: re.Match[str]) -> str:
    """A path in hundredths of a point: half the bytes."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


def draw(name: str) -> str:
    """Draw the figure of a strategy."""
    score = "token accuracy" if name in TEXTS else "accuracy"
    history = History.read(history_of(name) / "history.csv")
    path = FIGURES / f"{name}.svg"
    save(stability_gap_figure(history, score=score), path)
    path.write_text(_PATH.sub(_rounded, path.read_text()))
    return name


def _settle() -> None:
    quieten_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main() -> None:
    """Draw the figure of every strategy of clkit, as many at a time as there are cores."""
    _settle()
    FIGURES.mkdir(parents=True, exist_ok=True)
    if not _WEIGHTS.is_file():
        pretrain("data", _WEIGHTS, [0, 1, 2, 3], 300, "digits")
    names = [choice.name for choice in choices("strategy") if choice.origin == "clkit"]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 8), _settle) as pool:
        for name in pool.imap_unordered(draw, names):
            print(name, flush=True)


if __name__ == "__main__":
    main()
