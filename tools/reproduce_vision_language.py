"""Six tasks of texts and images, one after another, each answered in its own form: how methods keep the early ones.

    python tools/make_vision_language.py data --twitter ... --google ...         # see there; --side 224 for gpu
    python tools/reproduce_vision_language.py [home_vlm_small|home_vlm|home_vlm_gpu] [--data-root data]
        [--folder runs/vision_language] [--seeds 3] [--jobs 1] [--only METHOD ...] [more overrides]

Trains every method by the experiment, first all with seed 0, and prints scores of generated answers and the curves'
metrics, then how much was forgotten by content and in form alone. Started again, it goes on with what is missing;
``--tables`` trains nothing. ``--figure FILE`` draws what was forgotten by content and in form, and some curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from reproduce_stability_gap import groups_of, train
from rich.console import Console

from clkit.report.answers import answered, forgotten, matrices, summary_table
from clkit.report.estimate import Estimate
from clkit.report.figures import overlay_figure, save
from clkit.report.figures.canvas import TWO_COLUMNS, line_styles, new_figure, style
from clkit.report.runs import Group
from clkit.report.tables import Table

SAMPLES = {"home_vlm_small": 3 * 24 * 8, "home_vlm": 6 * 80 * 8, "home_vlm_gpu": 10300}
"""Different ones that a training sees, of which a memory keeps a share."""


def average(preset: str, *more: str) -> list[str]:
    return ["strategy=ema_balance", f"strategy.ema_balance.preset={preset}", *more]


def codebook(threshold: float) -> list[str]:
    """At 0.9 each task has weights of its own; at 0.3 most share theirs, and the average works there."""
    groups = "strategy.instruction_groups"
    chosen = [f"{groups}.instruction=last_line", f"{groups}.threshold={threshold}"]
    return ["strategy=[instruction_groups,ema_balance]", *chosen]


def methods(samples: int) -> dict[str, list[str]]:
    """Settings by name, where memories keep a share of so many samples."""

    def memory(strategy: str, percent: int) -> list[str]:
        return [f"strategy={strategy}", f"strategy.{strategy}.capacity={samples * percent // 100}"]

    return {
        "sequential": ["strategy=naive"],
        "joint": ["strategy=joint"],
        "per task": ["strategy=per_task"],
        "ER 1%": memory("er", 1),
        "ER 5%": memory("er", 5),
        "EMA balance": average("reference"),
        "EMA, fixed 0.99": average("fixed", "strategy.ema_balance.decay=0.99"),
        "EMA balance, fisher": average("fisher"),
        "EMA balance + codebook": codebook(0.9),
        "EMA balance + codebook 0.3": codebook(0.3),
        "RegLoRA": ["strategy=reglora"],
        "ASD": ["strategy=naive", "styles=asd"],
        "SEFE (ASD + RegLoRA)": ["strategy=reglora", "styles=asd"],
        "I-LoRA 5%": memory("ilora", 5),
        "MoELoRA": ["strategy=moelora"],
        "O-LoRA": ["strategy=olora"],
        "DISCO": ["strategy=disco"],
    }


CURVES = ("ACC", "min-ACC", "WC-ACC")
CONTENT, FORM = "by content", "in form alone"
DRAWN = ("sequential", "ER 5%", "EMA balance", "ASD", "SEFE (ASD + RegLoRA)", "per task", "joint")


def folder_of(root: Path, name: str) -> Path:
    return root / "".join(letter if letter.isalnum() else "_" for letter in name)


def curves_table(groups: Sequence[Group]) -> Table:
    """Token accuracy of held-out answers along the training, percent."""
    rows = [(group.label, *(str(group.estimate(metric)) for metric in CURVES)) for group in groups]
    return Table("Token accuracy, percent", ("method", *CURVES), tuple(rows))


def lost(group: Group) -> dict[str, list[float]]:
    """What was lost since learned, mean over all but the last task, of each seed."""
    runs = [forgotten(matrices(run)) for run in answered(group)]
    return {name: [float(np.nanmean(own[name])) for own in runs] for name in runs[0]}


def lost_table(groups: Sequence[Group]) -> Table:
    rows = [(group.label, *(str(Estimate.of(values)) for values in lost(group).values())) for group in groups]
    caption = "Points of generated answers lost since learned, all but the last task"
    return Table(caption, ("method", *lost(groups[0])), tuple(rows))


def figure(groups: Sequence[Group]) -> Any:
    """Draw the points of answers lost since learned, and the mean token accuracy along the training."""
    drawn = [group for group in groups if group.label in DRAWN]
    with style():
        found = new_figure(TWO_COLUMNS, max(3.0, 0.8 + 0.2 * len(groups)))
        left, right = found.subplots(1, 2, width_ratios=(2, 3))
        means = {group.label: {name: float(np.mean(v)) for name, v in lost(group).items()} for group in groups}
        at = np.arange(len(means))[::-1]
        content, form = (100 * np.array([mean[name] for mean in means.values()]) for name in (CONTENT, FORM))
        first, second = (look["color"] for look in line_styles(2))
        left.barh(at, content, color=first, label=CONTENT)
        left.barh(at, form, left=content, color=second, label=FORM)
        left.set_yticks(at, list(means))
        left.set_xlabel("points lost since learned")
        left.legend(loc="lower left", bbox_to_anchor=(-0.4, 1.0), ncols=2)
    curves = {group.label: [run.history for run in group.counted] for group in drawn}
    overlay_figure(curves, score="token accuracy", ax=right)
    return found


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=SAMPLES, default="home_vlm")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--folder", type=Path, default=Path("runs/vision_language"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=methods(1), default=list(methods(1)), metavar="METHOD")
    parser.add_argument("--tables", action="store_true", help="of what was trained")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    args = parser.parse_args()
    root, console, known = args.folder / args.experiment, Console(), methods(SAMPLES[args.experiment])
    folders = {name: folder_of(root, name) for name in args.only}
    if not args.tables:
        common = [f"experiment={args.experiment}", *args.overrides]
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = {
                (seed, name): pool.submit(train, folders[name], [*common, *known[name]], [seed], str(args.data_root))
                for seed in range(args.seeds)
                for name in args.only
            }
            for (seed, name), job in jobs.items():
                try:
                    job.result()
                except SystemExit as failure:  # the others go on
                    console.print(f"{name}, seed {seed}: {failure}", markup=False)
                else:
                    console.print(f"{name}, seed {seed}: done", style="dim")
    groups = [
        replace(found[0], label=name)
        for name, folder in folders.items()
        if folder.is_dir() and (found := groups_of(folder)) and answered(found[0])
    ]
    if not groups:
        parser.exit(1, f"error: no run in {root} has come to its end\n")
    tables = [summary_table(groups), lost_table(groups), curves_table(groups)]
    for table in tables:
        console.print(table.rich())
    if args.figure is not None:
        save(figure(groups), args.figure)
    (root / "tables.md").write_text("\n".join(table.markdown() for table in tables))
    console.print(f"{root}/tables.md")


if __name__ == "__main__":
    main()
