"""Which strategies work together: trains every pair on two experiences, and writes docs/composition.md.

python tools/composition.py
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from clkit import ConfigurationError, StreamDataModule
from clkit.method.adapters import add_adapter, lora
from clkit.run.jobs import task as task  # registers the resolver of run names
from clkit.run.plugins import choices
from clkit.testing import SmallModule, small_instructions, small_language_module, small_stream

SMALL = {
    "agem": ["samples_per_experience=8", "batch_size=8"],
    "cls_er": ["capacity=16"],
    "der": ["capacity=16"],
    "derpp": ["capacity=16"],
    "er": ["capacity=16"],
    "fpf": ["steps=3", "when=experience"],
    "gdumb": ["capacity=24", "epochs=null"],
    "head_init": ["samples=16"],
    "head_warmup": ["steps=3", "samples=16"],
    "gem": ["samples_per_experience=8"],
    "ilora": ["capacity=16"],
    "kfpf": ["k=3", "capacity=16", "steps=3"],
    "kfpf_kd": ["k=3", "capacity=16", "steps=3"],
    "lpr": ["every=4"],
    "moelora": ["experts=2"],
    "nmc": ["capacity=24"],
    "projected_replay": ["samples_per_experience=8"],
    "replay_share": ["share=0.3"],
    "reglora": ["strength=1.0", "percent=20"],
}
PAGE = Path(__file__).parents[1] / "docs" / "composition.md"
INTRODUCTION = """# Which strategies work together

`strategy=[a,b]` runs both, in this order. Every pair below was trained for two experiences on a small network (with
LoRA where RegLoRA, OLoRA or MoELoRA takes part, a language model with InstructionGroups or DISCO) by
`python tools/composition.py`; a test keeps the table true. In any order, what replaces or finetunes the weights at an
experience's end (EMA balance, FPF) does so before the others remember them.

✓ works in either order. → works with the row's strategy first, ↓ with the column's first. A number: `setup` refuses
both orders, for the reason below. What works together need not help: two memories cost twice, two penalties add up.
"""


def names() -> list[str]:
    """Names of clkit's own strategies."""
    return [choice.name for choice in choices("strategy") if choice.origin == "clkit"]


def strategies(*chosen: str) -> list[Any]:
    """Build strategies from their configs, with small memories."""
    return [instantiate(_config(name)) for name in chosen]


@functools.cache
def _config(name: str) -> DictConfig:
    overrides = [f"strategy.{name}.{value}" for value in SMALL.get(name, [])]
    with initialize_config_module("clkit.conf", version_base="1.3"):
        config = compose("train", overrides=[f"strategy={name}", "folder=unused", *overrides])
    return next(iter(config.strategy.values()))


class Reads(pl.Callback):
    """Finds strategies that remember other weights at an experience's end than it ends with."""

    def __init__(self, strategies: list[Any]) -> None:
        self.read: dict[str, torch.Tensor] = {}
        for strategy in strategies:
            if strategy.at_end == "reads":
                strategy.on_experience_end = functools.partial(self._look, strategy, strategy.on_experience_end)

    def _look(self, strategy: Any, hook: Any, trainer: pl.Trainer, module: Any, experience: Any) -> None:
        self.read[type(strategy).__name__] = _state(module)
        hook(trainer, module, experience)

    def on_experience_end(self, trainer: pl.Trainer, module: Any, experience: Any) -> None:
        for name, state in self.read.items():
            if not torch.equal(state, _state(module)):
                raise RuntimeError(f"{name} remembers weights that another strategy replaces afterwards")


def _state(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in module.state_dict().values()])


def attempt(*chosen: str) -> str:
    """Train strategies together; return an empty text, or why they were refused."""
    torch.manual_seed(0)
    texts = bool({"instruction_groups", "disco"} & set(chosen))
    module: Any = small_language_module() if texts else SmallModule()
    if {"reglora", "olora", "moelora"} & set(chosen) and not texts:
        module.net = add_adapter(module.net, lora(4, target_modules=["1"], modules_to_save=["3"]))
    built = strategies(*chosen)
    data = StreamDataModule(small_instructions(2) if texts else small_stream(2), batch_size=8)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=data.total_epochs,
            callbacks=[*built, Reads(built)],
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, datamodule=data)
        except ConfigurationError as error:
            return str(error)
    if not all(parameter.isfinite().all() for parameter in module.parameters()):
        raise RuntimeError(f"{' and '.join(chosen)} train to weights that are not finite")
    return ""


def anonymous(reason: str, *names: str) -> str:
    """Put "the one" and "the other" in place of two strategies' names, in the order they are named."""
    mentioned = sorted((name for name in names if name in reason), key=reason.index)
    for name, word in zip(mentioned, ("the one", "the other"), strict=False):
        reason = re.sub(rf"\b{name}\b", word, reason)
    return reason[0].upper() + reason[1:]


def page() -> str:
    """Train every pair and return the page."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    listed = names()
    cells: dict[tuple[str, str], str] = {}
    reasons: dict[str, str] = {}
    kinds = {name: type(strategies(name)[0]) for name in listed}
    for a, b in itertools.combinations(listed, 2):
        if kinds[a] is kinds[b]:
            cells[a, b] = "="
            continue
        forward, backward = attempt(a, b), attempt(b, a)
        if forward and backward:
            reason = anonymous(forward, kinds[a].__name__, kinds[b].__name__)
            cells[a, b] = reasons.setdefault(reason, str(1 + len(reasons)))
        else:
            cells[a, b] = "✓" if not forward and not backward else "→" if not forward else "↓"
    lines = [INTRODUCTION, f"| | {' | '.join(listed[1:])} |", f"|---|{':-:|' * (len(listed) - 1)}"]
    for row, a in enumerate(listed[:-1]):
        marks = ["" if column <= row else cells[a, b] for column, b in enumerate(listed) if column > 0]
        lines.append(f"| **{a}** | {' | '.join(marks)} |")
    lines += ["", "= are two settings of the same class: one trainer takes one of them.", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
