"""A disk that is full at any write is one sentence, and the same command goes on when there is room."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from clkit.files import write_atomically

SMALL = ["trainer=cpu", "scenario.n_experiences=2", "data.epochs=1", "evaluation.every=3", "evaluation.subset=50"]
SMALL += ["trainer.enable_progress_bar=false"]


def test_a_file_that_cannot_be_written_is_named_and_its_old_content_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_bytes", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(*((Path, name, full) if name == "write_bytes" else ("os.replace", full)))
            with pytest.raises(OSError, match=r"No space left on device: .*metrics\.json'"):
                write_atomically(path, "new")
        assert path.read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("most", [20_000])
def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path, most: int) -> None:
    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "clkit", "train", *SMALL, f"hydra.run.dir={tmp_path}"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        )

    full = run(most)
    assert full.returncode == 2, full.stderr
    assert full.stderr.startswith("clkit: Cannot write ")
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert run(resource.RLIM_INFINITY).returncode == 0
    assert (tmp_path / "metrics.json").exists()
