"""The command line: ``clkit train``, and what looks at its runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clkit import __version__
from clkit.signals import STOP

GROUPS = {
    "strategies": "strategy",
    "scenarios": "scenario",
    "models": "model",
    "adapters": "adapter",
    "optimizers": "optimizer",
    "schedulers": "scheduler",
    "styles": "styles",
    "schedules": "schedule",
    "stopping": "stop_when",
    "callbacks": "callbacks",
    "experiments": "experiment",
    "trainers": "trainer",
    "loggers": "logger",
    "launchers": "hydra/launcher",
}
INTERRUPTED = 130
STOPPED = (INTERRUPTED, *(128 + number for number in STOP))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a bug, 2 for a mistake, or 128 and a signal's number when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # as with python -m: a method in the current folder can be named in a config, but hides no installed package
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
        args = _parser().parse_args(arguments)
        if args.command == "list":
            return _list(args.group, args.config_dir)
        return {"connect": _connect, "eval": _eval, "report": _report, "sweep": _status}[args.command](args)
    except KeyboardInterrupt:
        print("clkit: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clkit", description="Continual learning with PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"clkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "train",
        help="train on a stream: clkit train strategy=er scenario=split_digits seed=0 (-m sweeps, --help tells more)",
    )
    report = commands.add_parser("report", help="tables and figures of one run or many")
    report.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a run's folder, or a folder of runs")
    report.add_argument("--output", type=Path, metavar="DIR", help="where to write the report")
    report.add_argument("--width", type=float, default=7.1, metavar="INCHES", help="of figures; 3.4 fits one column")
    report.add_argument("--style", type=Path, metavar="FILE", help="matplotlib style file on top of clkit's")
    evaluate = commands.add_parser("eval", help="what a trained run scores on all of its held-out data")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    evaluate.add_argument("--at", type=int, metavar="K", help="weights at the end of experience K, from 0, where kept")
    evaluate.add_argument("--split", choices=("test", "val"), help="default: that of the run's own evaluation")
    evaluate.add_argument("--view", metavar="NAME", help="weights to evaluate; default: what the method predicts with")
    evaluate.add_argument("--accelerator", metavar="NAME", help="cpu, gpu, ...; default: the run's own")
    evaluate.add_argument("--data-root", type=Path, metavar="DIR", help="where the data are now, if they have moved")
    evaluate.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write eval.csv; default: the run's folder"
    )
    connect = commands.add_parser("connect", help="loss and accuracy on the straight line between weights of a run")
    connect.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="the folder of a run with checkpoint.keep_ends=true, or two checkpoint files",
    )
    connect.add_argument("--points", type=int, default=11, metavar="N", help="points on each line; default: 11")
    connect.add_argument("--output", type=Path, metavar="DIR", help="where to write; default: the run's folder")
    sweep = commands.add_parser("sweep", help="where the runs of a sweep are")
    actions = sweep.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = actions.add_parser("status", help="what is done, runs, waits or failed, time left, results so far")
    status.add_argument("directory", type=Path, metavar="DIR", help="the sweep's folder; by default Hydra's is runs")
    status.add_argument("--once", action="store_true", help="print it once, as without a terminal")
    status.add_argument("--all", action="store_true", help="show every run, the finished ones too")
    listing = commands.add_parser("list", help="what can be chosen: strategies, scenarios, models, ...")
    listing.add_argument("group", nargs="?", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS) + "; default: all")
    listing.add_argument(
        "--config-dir", "-cd", type=Path, metavar="DIR", help="list this folder of configs too, as clkit train reads it"
    )
    return parser


def _train(overrides: list[str]) -> int:
    with _hydra_raises(), _arguments([sys.argv[0], *overrides]):
        from clkit.run import jobs
        from clkit.run.explain import complain
        from clkit.run.rank import is_rank_zero

        try:
            jobs.main()
            code = jobs.end_sweep()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        except BrokenPipeError:
            raise
        except Exception as error:
            code = jobs.end_sweep() or complain(error)
        if code in STOPPED and is_rank_zero():
            print("clkit: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return code


def _report(args: argparse.Namespace) -> int:
    from rich.console import Console

    from clkit.errors import ConfigurationError
    from clkit.report import write_report
    from clkit.run.explain import complain

    try:
        report = write_report(args.directories, args.output, style=args.style, width=args.width)
    except ConfigurationError as error:
        return complain(error)
    report.show(Console(soft_wrap=True))
    return 0


def _status(args: argparse.Namespace) -> int:
    from rich.console import Console

    from clkit.errors import ConfigurationError
    from clkit.run.explain import complain
    from clkit.run.sweep_status import show_status

    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        show_status(args.directory, console, live=console.is_terminal and not args.once, every=args.all)
    except ConfigurationError as error:
        return complain(error)
    return 0


def _connect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from clkit.metrics.history import History
    from clkit.report.tables import connectivity_table, path_table
    from clkit.run.connect import connect
    from clkit.run.explain import complain
    from clkit.run.jobs import quieten_libraries

    quieten_libraries()
    try:
        lines, files = connect(args.paths, points=args.points, output=args.output)
    except Exception as error:
        return complain(error)
    console = Console(soft_wrap=True)
    console.print(connectivity_table(lines).rich())
    history = args.paths[0] / "history.csv"
    if len(args.paths) == 1 and history.is_file():
        console.print(path_table(lines, History.read(history)).rich())
    console.print(*files, sep="\n", style="dim", highlight=False)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from rich.console import Console

    from clkit.report.tables import Table
    from clkit.run.explain import complain
    from clkit.run.jobs import quieten_libraries
    from clkit.run.trained import evaluate, write

    quieten_libraries()
    names = ("at", "split", "view", "accelerator", "data_root")
    try:
        found = evaluate(args.run, **{name: getattr(args, name) for name in names})
        chosen = [f"{name}={getattr(args, name)}" for name in names[:3] if getattr(args, name) is not None]
        file = write(found, args.output or args.run, f"eval{'-' if chosen else ''}{','.join(chosen)}.csv")
    except Exception as error:
        return complain(error)
    rows = tuple((s.name, str(s.n), f"{100 * s.score:.1f}") for s in found.scores)
    mean = sum(s.score for s in found.scores) / len(found.scores)
    caption = "{of} in percent on all {split} data, {view} weights after experience {at}".format(**found.of)
    console = Console(soft_wrap=True)
    console.print(Table(caption, ("experience", "samples", "score"), (*rows, ("mean", "", f"{100 * mean:.1f}"))).rich())
    console.print(file, style="dim", highlight=False)
    return 0


def _list(group: str | None, config_dir: Path | None) -> int:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clkit.run.plugins import choices

    if config_dir is not None and not config_dir.is_dir():
        print(f"clkit: {config_dir} is no directory; give a folder of configs.", file=sys.stderr)
        return 2
    console = Console()
    for title in [group] if group else GROUPS:
        key = GROUPS[title]
        table = Table(
            "name",
            "what it is",
            "from",
            box=SIMPLE_HEAD,
            title=f"{title}: clkit train {key}=NAME",
            title_justify="left",
        )
        for choice in choices(key, config_dir):
            # not as rich's markup: strategy=[er,fpf] would lose its brackets
            table.add_row(*map(Text, (choice.name, choice.description, choice.origin)))
        console.print(table)
    return 0


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Let errors come out of Hydra, remembering whether the user wants to see full tracebacks."""
    before = dict(os.environ)
    os.environ.setdefault("CLKIT_FULL_ERROR", before.get("HYDRA_FULL_ERROR", "0"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        for name in ("CLKIT_FULL_ERROR", "HYDRA_FULL_ERROR"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before
