"""The small form of the checks for a GPU runs on a CPU, so that they are not broken when a GPU is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "gpu_check.py"


@pytest.mark.slow
def test_the_small_form_passes_on_a_cpu_and_says_what_needs_a_gpu(tmp_path):
    written = tmp_path / "checks.json"
    command = [sys.executable, TOOL, "--device", "cpu", "--small", "--output", written]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(written.read_text())["results"]
    assert {name for name, found in results.items() if found["status"] == "SKIP"} == {
        "asynchronous",
        "ddp",
        "packed",
        "syncs",
    }
