"""What the headline methods claim, on real data: sweeps over seeds 0 to 4, and their tables.

    python tools/reproduce_methods.py PROTOCOL [--data-root data] [--unpack-debian] [--jobs 2]

- ``fpf``: FPF on top of ER and DER++, and k-FPF in place of replay, on split Fashion-MNIST; with counted operations,
  training time, and how far each kind of module moves. k-FPF's number of phases, rate and momentum were chosen on
  seed 100 with 200 steps in a phase and an experience.
- ``fpf_cnn``: FPF and k-FPF on split digits with a small CNN, also with its last convolution; k-FPF has as many phases
  as make it cost what ER costs.
- ``fpf_resnet``: k-FPF with the last block against ER at as many operations, split Fashion-MNIST, slim ResNet-18, with
  memories of three sizes.
- ``lora``: LoRA on a ViT pretrained on four classes, over the other six: sequential, ER, the presets of EMA balance,
  I-LoRA and RegLoRA; with the share of tensors on which EMA balance falls back.
- ``ilora``: on the same stream I-LoRA with the horizon that fits, against ER and averages of the same horizon.
- ``reglora``: LoRA on all layers of an MLP that knows the digits, permuted digits: RegLoRA at several percents, against
  merging alone, and against random and the smallest entries in place of the largest.
- ``rehearsal``: methods with 100 samples in memory on split digits, a small CNN; CLS-ER beside ER with a fixed average.
- ``penalties``: methods without rehearsal, and A-GEM and GEM with 25 samples an experience, on permuted digits, an MLP;
  strengths are the best of a grid in steps of ten (LwF: 0.3, 1, 3, 10) on seed 100.
- ``ema``, ``ema_permuted``: the presets of EMA balance on rotated Fashion-MNIST and permuted digits, beside a fixed
  average of decay 0.99 and one of the best of 0.99, 0.995, 0.998, 0.999 on seed 100; averages are evaluated as such.
  ``tools/ema_shares.py`` has what is left of an experience's start.

Runs are those of ``clkit train`` in ``--folder``: started again, the command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench_train import unpack_debian
from pretrain import pretrain
from reproduce_stability_gap import groups_of, train
from rich.console import Console

from clkit.metrics.drift_file import Drift
from clkit.metrics.functional import compute_metrics
from clkit.metrics.history import History
from clkit.report import write_report
from clkit.report.estimate import Estimate
from clkit.report.runs import Group, Run
from clkit.report.tables import Table

_K = ["capacity=500", "k=3", "steps=300", "lr=0.05", "momentum=0.9"]
_ER = ["strategy=er", "strategy.er.capacity=500"]
# as many operations as ER
_KFPF = ["strategy=kfpf", "strategy.kfpf.capacity=500", "strategy.kfpf.k=3"]
_EMA = "strategy.ema_balance"


def _memories(sizes: Sequence[int]) -> dict[str, list[str]]:
    """ER and k-FPF of about as many operations, with memories of these sizes."""
    found = {}
    for size in sizes:
        found[f"ER, {size}"] = ["strategy=er", f"strategy.er.capacity={size}"]
        phases = (f"capacity={size}", "k=2", "steps=100", "select=norm+last_block+head")
        found[f"k-FPF-CE, {size}"] = ["strategy=kfpf", *(f"strategy.kfpf.{value}" for value in phases)]
    return found


def _averages(tuned: float) -> dict[str, list[str]]:
    """The presets of EMA balance and fixed averages, one with the best decay of the stream; all evaluated averaged."""
    presets = {
        "fixed average, 0.99": [f"{_EMA}.preset=fixed"],
        f"fixed average, {tuned}": [f"{_EMA}.preset=fixed", f"{_EMA}.decay={tuned}"],
        "EMA balance, reference": [f"{_EMA}.preset=reference"],
        "EMA balance, paper": [f"{_EMA}.preset=paper"],
        "EMA balance, fisher": [f"{_EMA}.preset=fisher"],
        "mean of all steps": [f"{_EMA}.preset=mean"],
    }
    averaged = {name: [*overrides, "+evaluation.view=averaged"] for name, overrides in presets.items()}
    return {"finetuning": ["strategy=naive"], **averaged}


METHODS = {
    "fpf": {
        "finetuning": ["strategy=naive"],
        "ER": ["strategy=er", "strategy.er.capacity=500"],
        "ER + FPF": ["strategy=[er,fpf]", "strategy.er.capacity=500"],
        "DER++": ["strategy=derpp", "strategy.derpp.capacity=500"],
        "DER++ + FPF": ["strategy=[derpp,fpf]", "strategy.derpp.capacity=500"],
        "k-FPF-CE": ["strategy=kfpf", *(f"strategy.kfpf.{value}" for value in _K)],
        "k-FPF-KD": [
            "strategy=kfpf_kd",
            *(f"strategy.kfpf_kd.{v}" for v in [*_K, "distillation=0.1", "reduction=sum"]),
        ],
    },
    "lora": {
        "sequential": ["strategy=naive"],
        "ER": ["strategy=er", "strategy.er.capacity=200"],
        "EMA, fixed": ["strategy=ema_balance", "strategy.ema_balance.preset=fixed", "logger=csv"],
        "EMA balance, reference": ["strategy=ema_balance", "logger=csv"],
        "EMA balance, paper": ["strategy=ema_balance", "strategy.ema_balance.preset=paper", "logger=csv"],
        "RegLoRA": ["strategy=reglora", "strategy.reglora.percent=2"],
        "I-LoRA": ["strategy=ilora", "strategy.ilora.capacity=200", "strategy.ilora.decay=0.99"],
        "ER + EMA balance": ["strategy=[er,ema_balance]", "strategy.er.capacity=200"],
    },
    "ilora": {
        "ER": ["strategy=er", "strategy.er.capacity=200"],
        "ER + average": [
            "strategy=[er,ema_balance]",
            "strategy.er.capacity=200",
            "strategy.ema_balance.preset=fixed",
            "strategy.ema_balance.decay=0.96667",  # 30 steps, a fifth of an experience, as I-LoRA's
            "callbacks=averaged",
        ],
        "I-LoRA": ["strategy=ilora", "strategy.ilora.capacity=200"],
        "I-LoRA, average alone": ["strategy=ilora", "strategy.ilora.capacity=200", "strategy.ilora.gamma=0"],
    },
    "reglora": {
        "sequential": ["strategy=naive"],
        "merging alone": ["strategy.reglora.strength=0"],
        **{f"RegLoRA, {p} percent": [f"strategy.reglora.percent={p}"] for p in (2, 10, 20)},
        "random 10 percent": ["strategy.reglora.percent=10", "strategy.reglora.select=random"],
        "random 20 percent": ["strategy.reglora.percent=20", "strategy.reglora.select=random"],
        "smallest 20 percent": ["strategy.reglora.percent=20", "strategy.reglora.select=smallest"],
    },
    "fpf_cnn": {
        "finetuning": ["strategy=naive"],
        "ER": _ER,
        "ER + FPF": ["strategy=[er,fpf]", *_ER[1:]],
        "k-FPF-CE": _KFPF,
        "k-FPF-CE, last block": [*_KFPF, "strategy.kfpf.select=norm+last_block+head"],
        "k-FPF-KD, last block": [
            "strategy=kfpf_kd",
            *(f"strategy.kfpf_kd.{v}" for v in ("capacity=500", "k=3", "select=norm+last_block+head")),
        ],
    },
    "fpf_resnet": _memories((200, 500, 2000)),
    "rehearsal": {
        "finetuning": ["strategy=naive"],
        "ER": ["strategy=er", "strategy.er.capacity=100"],
        "ER, average": [
            "strategy=[er,ema_balance]",
            "strategy.er.capacity=100",
            f"{_EMA}.preset=fixed",
            f"{_EMA}.decay=0.956",  # 22.5 steps, half an experience, as the stable model of CLS-ER
            "+evaluation.view=averaged",
        ],
        "CLS-ER": ["strategy=cls_er", "strategy.cls_er.capacity=100"],
        "DER": ["strategy=der", "strategy.der.capacity=100"],
        "DER++": ["strategy=derpp", "strategy.derpp.capacity=100"],
        "GDumb": ["strategy=gdumb", "strategy.gdumb.capacity=100"],
    },
    "penalties": {
        "finetuning": ["strategy=naive"],
        "ER": ["strategy=er", "strategy.er.capacity=100"],
        "L2": ["strategy=l2", "strategy.l2.strength=0.1"],
        "EWC": ["strategy=ewc", "strategy.ewc.strength=1000"],
        "SI": ["strategy=si", "strategy.si.strength=100"],
        "MAS": ["strategy=mas", "strategy.mas.strength=100"],
        "LwF": ["strategy=lwf", "strategy.lwf.alpha=3"],
        "feature distillation": ["strategy=feature_distillation", "strategy.feature_distillation.alpha=100"],
        "A-GEM": ["strategy=agem", "strategy.agem.samples_per_experience=25"],
        "GEM": ["strategy=gem", "strategy.gem.samples_per_experience=25"],
    },
    "ema": _averages(0.998),
    "ema_permuted": _averages(0.998),
}
METRICS = ("ACC", "FORG", "min-ACC", "WC-ACC")


@dataclass(frozen=True)
class Protocol:
    """What the runs of a protocol share, and what is shown of them besides the metrics.

    Args:
        experiment: Name in ``conf/experiment``.
        columns: More columns of the table, each from the runs of a method.
        prepare: Makes what the runs need, from the folder of the runs and the data root; returns overrides of all runs.
        controls: Further tables, from the groups by method.
    """

    experiment: str
    columns: Mapping[str, Callable[[Sequence[Run]], str]] = field(default_factory=dict)
    prepare: Callable[[Path, str], list[str]] = lambda root, data_root: []
    controls: Callable[[Mapping[str, Group]], list[Table]] = lambda groups: []

    def result_table(self, title: str, groups: Mapping[str, Group]) -> Table:
        """Metrics in percent, means and 95 % t-intervals over seeds, and the protocol's own columns."""
        rows = [
            (
                name,
                *(str(group.estimate(metric)) for metric in METRICS),
                *(column(group.counted) for column in self.columns.values()),
            )
            for name, group in groups.items()
        ]
        seeds = min(len(group.counted) for group in groups.values())
        return Table(f"{title}: {seeds} seeds, percent", ("method", *METRICS, *self.columns), tuple(rows))


def pretrained(classes: int, steps: int, *what: str) -> Callable[[Path, str], list[str]]:
    """Weights of a network (see ``tools/pretrain.py``) that knows the first classes."""

    def prepare(root: Path, data_root: str) -> list[str]:
        weights = root.absolute() / "pretrained.pt"
        if not weights.is_file():
            pretrain(data_root, weights, list(range(classes)), steps, *what)
        return [f"model.net.weights={weights}"]

    return prepare


def operations(runs: Sequence[Run]) -> str:
    """Mean counted operations of a run, in TFLOP."""
    return f"{np.mean([json.loads((run.directory / 'flops.json').read_text())['total'] for run in runs]) / 1e12:.2f}"


def seconds(runs: Sequence[Run]) -> str:
    """Mean training time of a run."""
    return f"{np.mean([run.seconds for run in runs]):.0f}"


def fallback(runs: Sequence[Run]) -> str:
    """Mean share of tensors whose coefficient fell back, in percent; a dash without a log of it."""
    logs = [log for run in runs for log in run.directory.rglob("metrics.csv")]
    found = []
    for log in logs:
        header, *lines = (line.split(",") for line in log.read_text().splitlines())
        if "ema_balance/fallback" in header:
            column = header.index("ema_balance/fallback")
            values = [float(line[column]) for line in lines if line[column]]
            found.append(100 * float(np.mean(values)))
    return f"{np.mean(found):.0f}" if found else "–"


def drift_table(group: Group) -> Table:
    """Mean change of a weight across experiences, by kind of module, over that of all weights."""
    rows = []
    drifts = [Drift.read(run.directory / "drift.csv") for run in group.counted]
    for kind in ("head", "norm", "first", "other"):
        ratios = []
        for drift in drifts:
            across, sizes = np.nanmean(drift.across, axis=0), np.array(drift.sizes)
            weights = np.array([not name.endswith(".stats") for name in drift.modules])
            chosen = weights & (np.array(drift.kinds) == kind)
            mean = [np.average(across[part], weights=sizes[part]) for part in (chosen, weights)]
            ratios.append(mean[0] / mean[1])
        rows.append((kind, Estimate.of(ratios).text(1.0)))
    return Table("ModuleDrift, finetuning: change across experiences over the mean", ("modules", "times"), tuple(rows))


def group_in(folder: Path) -> Group:
    """The runs of a method, without those views of them that have a folder below."""
    return next(group for group in groups_of(folder) if group.counted[0].directory.parent == folder)


def averaged_table(groups: Mapping[str, Group]) -> list[Table]:
    """Metrics of the average that ER goes on from, where the other table has those of the live weights."""
    name = "ER + average"
    found = [compute_metrics(History.read(run.directory / "averaged" / "history.csv")) for run in groups[name].counted]
    row = (name, *(str(Estimate.of(metrics[metric] for metrics in found)) for metric in METRICS))
    return [Table("The average itself", ("method", *METRICS), (row,))]


PROTOCOLS = {
    "fpf": Protocol(
        "fpf_split",
        {"TFLOP": operations, "seconds": seconds},
        controls=lambda groups: [drift_table(groups["finetuning"])],
    ),
    "lora": Protocol("lora_split", {"fallback": fallback}, prepare=pretrained(4, 1500)),
    "ilora": Protocol("lora_split", prepare=pretrained(4, 1500), controls=averaged_table),
    "reglora": Protocol("reglora_permuted", prepare=pretrained(10, 450, "digits", "mlp")),
    "fpf_cnn": Protocol("fpf_cnn", {"TFLOP": operations, "seconds": seconds}),
    "fpf_resnet": Protocol("fpf_resnet", {"TFLOP": operations, "seconds": seconds}),
    "rehearsal": Protocol("fpf_cnn", {"TFLOP": operations, "seconds": seconds}),
    "penalties": Protocol("ema_permuted", {"seconds": seconds}),
    "ema": Protocol("ema_rotated", {"fallback": fallback}),
    "ema_permuted": Protocol("ema_permuted", {"fallback": fallback}),
}


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=PROTOCOLS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    protocol, methods = PROTOCOLS[args.protocol], METHODS[args.protocol]
    root = args.folder or Path("runs") / args.protocol
    console = Console()
    common = [f"experiment={protocol.experiment}", *protocol.prepare(root, args.data_root)]
    folders = {name: root / name.replace(" ", "_").replace(",", "") for name in methods}
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {
            name: pool.submit(train, folders[name], [*common, *overrides], range(args.seeds), args.data_root)
            for name, overrides in methods.items()
        }
        for name, job in jobs.items():
            job.result()
            console.print(f"{name}: {args.seeds} seeds done", style="dim")
    groups = {name: group_in(folder) for name, folder in folders.items()}
    tables = [protocol.result_table(args.protocol, groups), *protocol.controls(groups)]
    for table in tables:
        console.print(table.rich())
    (root / "tables.md").write_text("\n".join(table.markdown() for table in tables))
    report = write_report([root])
    console.print(f"{report.files[0].parent}/report.html, {root}/tables.md")


if __name__ == "__main__":
    main()
