"""``clkit train`` as tests use it: its configuration, and processes that need not import PyTorch again."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from clkit.run import jobs as jobs  # registers the resolvers

QUICK = ["trainer=cpu", "scenario.n_experiences=2", "data.epochs=1", "evaluation.every=3", "evaluation.subset=50"]
SMALL = [*QUICK, "logger=none", "model.net.hidden=[8]"]

ENDED = re.compile(r"Traceback|Fatal Python error|terminate called|what\(\):|exception not rethrown")

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["clkit.run.train", "clkit.run.jobs", "clkit.report", "clkit.testing"])


def composed(*overrides: str) -> DictConfig:
    """The configuration of ``clkit train OVERRIDES``."""
    with initialize_config_module("clkit.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


class Command:
    """A running ``clkit ARGUMENTS``, the leader of its process group, forked from a server.

    Not for what leaves worker processes to be ended with Python: multiprocessing waits for them first.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: str | Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.args = list(arguments)
        self._out, self._err = (tempfile.NamedTemporaryFile("r") for _ in range(2))  # noqa: SIM115
        settings = (self.args, str(cwd or os.getcwd()), dict(os.environ if env is None else env))
        self._process = _CONTEXT.Process(target=_main, args=(*settings, self._out.name, self._err.name))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end and return what it said."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self._out.read(), self._err.read())
        return subprocess.CompletedProcess(self.args, code, self._out.read(), self._err.read())

    def succeed(self, timeout: float = 300) -> None:
        """Wait for its end, which is one without an error."""
        done = self.finish(timeout)
        assert done.returncode == 0, done.stdout + done.stderr


def clkit(*arguments: str, cwd: str | Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``clkit ARGUMENTS`` with more variables in the environment."""
    return Command(arguments, cwd, {**os.environ, **env}).finish()


def two_processes(script: str, *arguments: str | Path, timeout: float = 400) -> None:
    """Run a script of this folder as the two processes of a torchrun; if it fails, say last what ended a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
    env = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        first = next((n for n, line in enumerate(lines) if ENDED.search(line)), 0)
        raise AssertionError("\n".join([*lines, "", "What ended a process:", *lines[first : first + 15]]))


def _main(arguments: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    os.setsid()
    # a job in the background is started with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    from clkit.run import plugins
    from clkit.run.cli import main

    # the server has looked for plug-ins without this PYTHONPATH
    plugins.config_packages.cache_clear()
    plugins.register()
    sys.argv = ["clkit", *arguments]
    try:
        code = main()
    except SystemExit as stop:  # argparse
        code = stop.code
    sys.exit(code)
