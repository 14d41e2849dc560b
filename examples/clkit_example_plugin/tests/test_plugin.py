"""What the installed package offers on the command line."""

import json
import subprocess
import sys

import pytest
from clkit_example import DimmedDigits

from clkit import ConfigurationError
from clkit.run.plugins import choices


@pytest.mark.parametrize(
    ("group", "name"), [("strategy", "er_ace"), ("scenario", "dimmed_digits"), ("experiment", "er_ace_digits")]
)
def test_clkit_lists_it(group, name):
    (found,) = [choice for choice in choices(group) if choice.origin == "clkit-example-plugin"]
    assert found.name == name
    assert found.description


def test_clkit_trains_it(tmp_path):
    words = "experiment=er_ace_digits scenario=dimmed_digits data.epochs=1 evaluation.every=20 logger=none"
    run = subprocess.run(
        [sys.executable, "-m", "clkit", "train", *words.split(), f"hydra.run.dir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["complete"]
    assert metrics["stream"]["experiences"] == ["contrast 1", "contrast 0.5", "contrast 0.25"]


def test_experiences_differ_in_contrast_alone():
    first, second = DimmedDigits([1.0, 0.5])
    (x, y), (dim, same) = first.train[3], second.train[3]
    assert (0.5 * x).equal(dim)
    assert y == same


def test_a_contrast_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="above 0"):
        DimmedDigits([1.0, 0.0])
