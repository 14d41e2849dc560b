"""Sweeps that are started as often as one likes, until every run is done."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, Command, wait_for
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clkit.report import write_report
from clkit.report.runs import missing_runs
from clkit.run.cli import main
from clkit.run.folder import Attempt, Busy, attempt, attempts, fruitless, hold, is_held, last_lines
from clkit.run.sweep import Cell, Plan, cells_in, plans, seconds_left
from clkit.run.sweep_status import show_status

LONG = [*SMALL[:2], "data.epochs=30", "evaluation.every=1", *SMALL[4:], "checkpoint.every_n_steps=null"]


def sweep(folder: Path, *overrides: str) -> list[str]:
    return ["train", "-m", *overrides, f"hydra.sweep.dir={folder}", "trainer.enable_progress_bar=false"]


def statuses(folder: Path) -> list[str]:
    return sorted(cell.status for cell in cells_in(folder))


def in_second_experience(run: Path) -> bool:
    """Between the checkpoint at the end of the first experience and the end of the second."""
    steps = attempts(run)[-1].steps if attempts(run) else ()
    return bool(steps) and Cell.read(run).step > steps[0] + 2


@pytest.mark.slow
def test_the_plan_names_the_folders_that_hydra_makes(tmp_path: Path) -> None:
    main(sweep(tmp_path / "runs", *SMALL, "seed=range(2)", "strategy=naive,[er,ewc]", "attempts=2"))
    made = {path.parent.name for path in tmp_path.glob("runs/*/run.json")}
    (plan,) = plans(tmp_path / "runs")
    assert set(plan.runs) == made
    assert len(made) == 4
    assert plan.limit == 2
    assert {cell.status for cell in plan.cells()} == {"done"}
    assert missing_runs(tmp_path / "runs") == []
    assert (tmp_path / "runs" / "report.html").exists()
    assert not list(tmp_path.glob("runs/*/report.html"))


@pytest.mark.slow
def test_finished_runs_are_passed_over_and_new_ones_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sweep(tmp_path, *SMALL, "seed=0,1")) == 0
    first = {path: path.read_bytes() for path in tmp_path.glob("*/history.csv")}
    assert main(sweep(tmp_path, *SMALL, "seed=0,1,2")) == 0
    assert capsys.readouterr().out.count("Finished before, passed over") == 2
    assert all(path.read_bytes() == text for path, text in first.items())
    assert statuses(tmp_path) == ["done"] * 3
    assert all(len(attempts(path.parent)) == 1 for path in tmp_path.glob("*/run.json"))


@pytest.mark.slow
def test_a_failing_run_is_tried_up_to_the_limit_and_listed_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = sweep(tmp_path, *SMALL, "data.batch_size=0,64", "attempts=2")
    for tries in (1, 2, 2):
        assert main(command) == 2
        said = capsys.readouterr().err
        (failed,) = (cell for cell in cells_in(tmp_path) if cell.status == "failed")
        assert len(failed.tried) == tries
        assert failed.given_up == (tries == 2)
        assert "2 runs: 1 done, 1 failed" in said
        assert str(failed.folder / "train.log") in said
        assert "batch_size=0 is not possible" in said.split("these runs failed:")[1]
    assert "failed 2 times at the same place" in said
    assert "attempts=4" in said
    assert main([*command, "attempts=4"]) == 2
    assert len(attempts(failed.folder)) == 3


def test_a_config_that_was_mended_may_use_the_folder_of_the_one_that_never_trained(tmp_path: Path) -> None:
    folder = f"hydra.run.dir={tmp_path}"
    assert main(["train", *SMALL, "data.batch_size=0", folder]) == 2
    assert main(["train", *SMALL, "data.batch_size=64", folder]) == 0
    assert [a.outcome for a in attempts(tmp_path)] == ["finished"]


def tried(step: int, outcome: str | None) -> Attempt:
    return Attempt(0.0, "here", 1, "", step, outcome=outcome)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], 0),
        ([(0, "failed")], 1),
        ([(0, "failed"), (500, "failed")], 1),
        ([(0, "failed"), (500, "failed"), (500, None)], 2),
        ([(500, "interrupted"), (500, "interrupted")], 0),
        ([(500, "failed"), (500, "interrupted"), (500, "failed")], 2),
    ],
)
def test_attempts_that_got_no_further_are_counted(history: list, expected: int) -> None:
    assert fruitless([tried(*item) for item in history]) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([None, "failed", "interrupted", "finished"]))))
def test_the_count_is_that_of_the_last_step_in_a_row(history: list) -> None:
    counted = [step for step, outcome in history if outcome in (None, "failed")]
    expected = len(counted) - max((i + 1 for i, step in enumerate(counted) if step != counted[-1]), default=0)
    assert fruitless([tried(*item) for item in history]) == expected


def test_an_attempt_is_recorded_with_its_error_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    def run(step: int, end: BaseException) -> None:
        with attempt(tmp_path, step) as record:
            record.plan([3, 4])
            raise end

    with pytest.raises(ZeroDivisionError):
        run(7, ZeroDivisionError("by\nzero"))
    with pytest.raises(SystemExit):
        run(8, SystemExit(143))
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"started": 1')
    first, second = attempts(tmp_path)
    assert (first.step, first.steps, first.outcome, first.error) == (7, (3, 4), "failed", "ZeroDivisionError: by zero")
    assert (second.step, second.outcome, second.host) == (8, "interrupted", socket.gethostname())
    assert any("ZeroDivisionError" in line for line in last_lines(tmp_path, 100))


def test_a_folder_is_held_by_one_process_and_free_after_its_death(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from clkit.run.folder import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert is_held(tmp_path)
    with pytest.raises(Busy, match="Another process"), hold(tmp_path):
        pass
    other.kill()
    other.wait()
    assert not is_held(tmp_path)
    with hold(tmp_path):
        assert is_held(tmp_path)
    assert main(["train", *SMALL, f"hydra.run.dir={tmp_path}"]) == 0


def write_run(folder: Path, step: int, now: float) -> None:
    folder.mkdir(parents=True)
    with (folder / "attempts.jsonl").open("w") as file:
        print(json.dumps({"started": now - 60, "host": "elsewhere", "pid": 1, "job": "", "step": 10}), file=file)
        print(json.dumps({"steps": [50, 50]}), file=file)
    (folder / ".lock").touch()
    rows = "".join(f"{s},{s // 51},step,0.5,\n" for s in range(step + 1))
    (folder / "history.csv").write_text("step,experience,phase,E0,E1\n" + rows)


def test_status_shows_where_a_run_is_and_when_it_will_be_done(tmp_path: Path) -> None:
    now = time.time()
    write_run(tmp_path / "a", 70, now)
    (cell,) = cells_in(tmp_path)
    assert (cell.status, cell.experience, cell.experiences, cell.step, cell.steps) == ("running", 2, 2, 70, 100)
    # 60 steps from step 10 took 60 seconds, 30 steps are left
    assert cell.seconds_left == pytest.approx(30, abs=1)
    os.utime(tmp_path / "a" / "history.csv", (now - 3600, now - 3600))
    assert statuses(tmp_path) == ["stopped"]
    out = io.StringIO()
    show_status(tmp_path, Console(file=out, width=120), live=False)
    assert "stopped" in out.getvalue()
    assert "70/100" in out.getvalue()


def test_a_resumed_run_is_where_its_checkpoint_is_until_it_writes_itself(tmp_path: Path) -> None:
    now = time.time()
    write_run(tmp_path / "a", 70, now)
    history = tmp_path / "a" / "history.csv"
    with hold(tmp_path / "a"):
        os.utime(history, (now - 100, now - 100))  # of the attempt before
        cell = Cell.read(tmp_path / "a")
        assert (cell.status, cell.experience, cell.step) == ("running", 1, 10)
        (tmp_path / "a" / "checkpoints").mkdir()
        (tmp_path / "a" / "checkpoints" / "step=000000051.ckpt").touch()
        cell = Cell.read(tmp_path / "a")
        assert (cell.experience, cell.step) == (2, 51)
        os.utime(history, (now, now))
        assert Cell.read(tmp_path / "a").step == 70
        # evaluations are rare: the checkpoint knows more
        (tmp_path / "a" / "checkpoints" / "step=000000090.ckpt").touch()
        assert Cell.read(tmp_path / "a").step == 90


def test_a_finished_run_has_done_all_its_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 100, time.time())
    (tmp_path / "a" / "metrics.json").write_text('{"complete": true}')
    (cell,) = cells_in(tmp_path)
    assert (cell.status, cell.experience, cell.step, cell.steps) == ("done", 2, 100, 100)


def age(folder: Path, command: str, **changes: object) -> None:
    """Let the plan of a command be older than all others, and of a process that is gone."""
    for path in (folder / ".sweeps").glob("*.json"):
        plan = json.loads(path.read_text())
        if plan["command"] == [command]:
            path.write_text(json.dumps({**plan, **changes}))
            os.utime(path, (1, 1))


def test_what_an_earlier_command_never_started_is_no_ghost(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    Plan(tmp_path, ("wrong",), {"x": ("lr=1",), "y": ("lr=2",)}).save()
    Plan(tmp_path, ("right",), {"z": ("lr=3",)}).save()
    assert len(cells_in(tmp_path)) == 3  # both commands run: in this process
    age(tmp_path, "wrong", pid=gone.pid)
    assert [cell.folder.name for cell in cells_in(tmp_path)] == ["z"]
    assert missing_runs(tmp_path) == [tmp_path / "z"]
    write_run(tmp_path / "y", 70, time.time())
    assert {cell.folder.name for cell in cells_in(tmp_path)} == {"y", "z"}
    # the command of a dead process is waited for as long as no other was started in its place
    age(tmp_path, "right", pid=gone.pid)
    os.utime(next(p for p in (tmp_path / ".sweeps").iterdir() if "right" in p.read_text()))
    assert statuses(tmp_path) == ["running", "waiting"]


def test_runs_of_a_sweep_below_and_replaced_ones_are_not_counted(tmp_path: Path) -> None:
    now = time.time()
    Plan(tmp_path, ("here",), {"a": ("seed=0",)}).save()
    Plan(tmp_path / "other", ("there",), {"seed=1": ("seed=1",)}).save()
    for name in ("a", "other/seed=1", "a/.replaced/1", "group/b", "group2/b"):
        write_run(tmp_path / name, 70, now)
    assert [cell.folder for cell in cells_in(tmp_path)] == [tmp_path / name for name in ("a", "group/b", "group2/b")]
    out = io.StringIO()
    show_status(tmp_path, Console(file=out, width=120), live=False)
    assert "group2/b" in out.getvalue()


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (["data.epochs=[1,2]"], [23, 46]),  # 721 and 717 samples in batches of 32
        (["data.epochs=[2,1]", "strategy=cumulative"], [46, 45]),  # then all 1438
        (["data.steps=[7,3]", "trainer.accumulate_grad_batches=2"], [7, 3]),
        (["data.steps=[7,3]", "trainer.max_epochs=1"], [7, 0]),
    ],
)
def test_the_steps_of_a_run_are_those_that_it_takes(tmp_path: Path, settings: list[str], steps: list[int]) -> None:
    small = [*SMALL, "data.epochs=1", "trainer.enable_progress_bar=false", *settings]
    assert main(["train", *small, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    (cell,) = cells_in(tmp_path)
    assert list(cell.tried[-1].steps) == steps
    assert cell.step == cell.steps == sum(steps)


def test_the_time_left_counts_what_waits(tmp_path: Path) -> None:
    tries = Attempt(0.0, "here", 1, "", 0, ended=100.0), Attempt(500.0, "here", 1, "", 50, ended=600.0)
    done = Cell(tmp_path, "done", tries)
    running = [Cell(tmp_path, "running", seconds_left=seconds) for seconds in (30.0, 70.0)]
    waiting = [Cell(tmp_path, "waiting")] * 3
    assert seconds_left([done, *running]) == 70.0
    # 100 seconds of what runs, three runs of 200, on two at once
    assert seconds_left([done, *running, *waiting]) == (100 + 3 * 200) / 2
    assert seconds_left([*running, *waiting]) is None
    assert seconds_left([done, *waiting]) is None


def seed_of(run: Path) -> int:
    return int((run / ".hydra" / "overrides.yaml").read_text().split("seed=")[1].split()[0])


@pytest.mark.slow
def test_reports_and_status_of_a_partial_sweep_say_what_is_missing(tmp_path: Path) -> None:
    assert main(sweep(tmp_path, *SMALL, "seed=0,1,2")) == 0
    one, two, _ = sorted((path.parent for path in tmp_path.glob("*/run.json")), key=seed_of)
    shutil.rmtree(one)
    (two / "metrics.json").unlink()
    assert statuses(tmp_path) == ["done", "stopped", "waiting"]
    report = write_report([tmp_path])
    assert any(f"1 planned runs have no result yet: {one.name}" in note for note in report.notes)
    assert any("unfinished" in note for note in report.notes)
    out = io.StringIO()
    show_status(tmp_path, Console(file=out, width=150), live=False)
    said = out.getvalue()
    assert "seed=0" in said
    assert "seed=2" not in said
    assert "3 runs: 1 done, 1 stopped, 1 waiting" in said
    assert "Results in percent" in said


def test_status_of_a_folder_without_runs_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "status", str(tmp_path)]) == 2
    assert "There is no run" in capsys.readouterr().err
    assert main(["sweep", "status", str(tmp_path / "none")]) == 2


def test_a_launcher_without_its_package_names_the_extra(tmp_path: Path, monkeypatch, capsys) -> None:
    from hydra.core.plugins import Plugins

    known = Plugins.instance().class_name_to_class
    monkeypatch.delitem(known, "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", raising=False)
    assert main(sweep(tmp_path, *SMALL, "seed=0,1", "hydra/launcher=slurm")) == 2
    assert "pip install clkit[slurm]" in capsys.readouterr().err


@pytest.mark.slow
def test_two_sweeps_at_once_in_one_folder_train_each_run_once(tmp_path: Path) -> None:
    both = [Command(sweep(tmp_path, *SMALL, "seed=range(4)")) for _ in range(2)]
    for process in both:
        process.succeed()
    assert statuses(tmp_path) == ["done"] * 4
    assert [len(attempts(path.parent)) for path in tmp_path.glob("*/run.json")] == [1] * 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The histories of a sweep that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(sweep(folder, *LONG, "seed=0,1")) == 0
    return histories(folder)


def histories(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.glob("*/history.csv")}


@pytest.mark.slow
def test_submitit_requeues_a_preempted_run_which_goes_on_from_the_very_step(
    tmp_path: Path, whole: dict[str, str]
) -> None:
    process = Command(sweep(tmp_path / "runs", *LONG, "seed=0,1", "hydra/launcher=local"))
    runs = [tmp_path / "runs" / name for name in wait_for_plan(tmp_path / "runs")]
    wait_for(lambda: in_second_experience(runs[0]))
    os.kill(attempts(runs[0])[-1].pid, signal.SIGUSR2)
    process.succeed()
    first, second = attempts(runs[0])
    assert (first.outcome, second.outcome) == ("interrupted", "finished")
    assert second.step > first.steps[0]
    assert len(attempts(runs[1])) == 1
    assert histories(tmp_path / "runs") == whole


def wait_for_plan(folder: Path) -> list[str]:
    wait_for(lambda: plans(folder))
    return list(plans(folder)[0].runs)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_a_killed_worker_costs_the_steps_since_the_checkpoint_only(
    tmp_path: Path, launcher: str, whole: dict[str, str]
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    arguments = sweep(tmp_path / "runs", *LONG, "seed=0,1", f"hydra/launcher={launcher}")
    command = [sys.executable, "-m", "clkit", *arguments]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **quiet)
    run = tmp_path / "runs" / wait_for_plan(tmp_path / "runs")[0]
    wait_for(lambda: in_second_experience(run))
    os.kill(attempts(run)[-1].pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    if launcher == "joblib":
        assert process.returncode == 2
        assert "The same command does what is missing" in said
        process = subprocess.run(command, timeout=300, **quiet)
        said = process.stdout
    assert process.returncode == 0, said
    first, second = attempts(run)
    assert (first.outcome, second.outcome) == (None, "finished")
    assert second.step == first.steps[0]
    assert histories(tmp_path / "runs") == whole


@pytest.mark.slow
def test_the_script_for_slurm_asks_for_what_the_config_says(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7\n")
    (programs / "srun").write_text("#!/bin/sh\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    needs = ["hydra/launcher=slurm", "hydra.launcher.partition=long", "hydra.launcher.setup=[module load cuda]"]
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    process = Command(sweep(tmp_path / "runs", *SMALL, "seed=0,1,2", *needs), env=env)
    wait_for(lambda: list(tmp_path.glob("runs/.submitit/*/*_submission.sh")))
    process.kill()
    process.finish()
    (script,) = tmp_path.glob("runs/.submitit/*/*_submission.sh")
    lines = script.read_text().splitlines()
    for option in ("requeue", "signal=USR2@120", "array=0-2%3", "time=240", "partition=long", "gpus-per-node=1"):
        assert f"#SBATCH --{option}" in lines
    assert {"#SBATCH --mem=32GB", "#SBATCH --cpus-per-task=4", "#SBATCH --nodes=1", "module load cuda"} <= set(lines)


SLURM = """
ClusterName=clkit
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={port}
SlurmdPort={port_of_node}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def slurm(tmp_path: Path):
    """A Slurm of one machine, as long as the test runs. Starts daemons as root, so only where that is asked for."""
    if os.environ.get("CLKIT_TEST_SLURM") != "1":
        pytest.skip("starts Slurm's daemons on this machine; CLKIT_TEST_SLURM=1 allows it")
    programs = ("slurmctld", "slurmd", "sbatch", "munged")
    assert os.getuid() == 0, "Slurm's daemons need root"
    assert all(map(shutil.which, programs)), "needs the packages that CONTRIBUTING.md names"
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    ports = {"port": free_port(), "port_of_node": free_port()}
    text = SLURM.format(host=host, folder=folder, cpus=os.cpu_count(), **ports)
    (folder / "slurm.conf").write_text(text)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    env = {**os.environ, **environment}
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], capture_output=True)
    daemons = [
        subprocess.Popen([name, "-D"], env=env, stdout=(folder / name).open("w"), stderr=subprocess.STDOUT)
        for name in ("slurmctld", "slurmd")
    ]
    try:
        idle = ["sinfo", "--noheader", "--format=%t"]
        wait_for(lambda: subprocess.run(idle, env=env, capture_output=True, text=True).stdout.strip() == "idle", 60)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=env)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)


@pytest.mark.slow
def test_a_run_that_slurm_warns_is_saved_and_requeued(
    tmp_path: Path, slurm: dict[str, str], request: pytest.FixtureRequest
) -> None:
    needs = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    command = sweep(tmp_path / "runs", *LONG, "seed=0,1", *needs, "hydra.launcher.mem_gb=1")
    env = {**os.environ, **slurm}
    process = Command(command, env=env)
    run = tmp_path / "runs" / wait_for_plan(tmp_path / "runs")[0]
    wait_for(lambda: in_second_experience(run))
    job = attempts(run)[-1].job
    subprocess.run(["scancel", "--signal=USR2", job], env=env, check=True)
    wait_for(lambda: attempts(run)[-1].ended)
    queue = subprocess.run(["squeue", "--noheader", "--job", job], env=env, capture_output=True, text=True).stdout
    assert job in queue
    # Slurm holds a requeued job back for two minutes
    wait_for(lambda: "SE" not in queue_reason(job, env), 60)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env)
    process.succeed(timeout=500)
    first, second = attempts(run)
    assert (first.outcome, second.outcome) == ("interrupted", "finished")
    assert (first.job, second.job) == (job, job)
    assert second.step > first.steps[0]
    assert histories(tmp_path / "runs") == request.getfixturevalue("whole")


def queue_reason(job: str, env: dict[str, str]) -> str:
    state = ["squeue", "--noheader", "--job", job, "--format=%t"]
    return subprocess.run(state, env=env, capture_output=True, text=True).stdout
