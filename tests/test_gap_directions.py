"""The tool that compares remedies for the stability gap: features, streams, and claims held against runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from torch.nn import functional as F

from clkit.errors import ConfigurationError
from clkit.metrics.history import History, HistoryWriter
from clkit.report.estimate import Estimate
from clkit.scenarios import SplitFeatures
from clkit.scenarios.sources import Samples

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import lite0
import reproduce_gap_remedies as tool
from gap_directions import CLAIMS, directions, first_dip, verdict

RATES = {0.01: 0.5, 0.03: 0.8, 0.1: 0.6}
"""Final accuracy of the held-out seed."""


def run(folder: Path, depth: float, final: float = 0.8) -> None:
    """A finished run: experience 0 is at 0.9, falls by ``depth``, and ends where experience 1 does."""
    writer = HistoryWriter(folder / "history.csv", 2)
    for step, score in ((1, 0.2), (2, 0.9)):
        writer.append(step, 0, "step", [score])
    writer.append(2, 0, "end", [0.9])
    for step, scores in ((3, [0.9 - depth, 0.5]), (4, [final, final])):
        writer.append(step, 1, "step", scores)
    writer.append(4, 1, "end", [final, final])
    writer.close()
    (folder / "metrics.json").write_text(json.dumps({"complete": True}))
    (folder / "timing.json").write_text(json.dumps({"training_seconds": 2.0}))
    (folder / "flops.json").write_text(json.dumps({"total": 3e12}))


def method(folder: Path, depths: list[float]) -> tool.Method:
    """A method whose runs of seeds 0, 1, ... fall as deep as said, at the rate that is best on the held-out seed."""
    for rate, final in RATES.items():
        run(folder / f"lr={rate},seed={tool.HELD_OUT}", 0.1, final)
    for seed, depth in enumerate(depths):
        run(folder / f"lr=0.03,seed={seed}", depth)
    return tool.Method(folder, [])


def test_directions_are_paired_differences_of_the_runs_of_the_same_seeds(tmp_path: Path) -> None:
    deep, less = [0.5, 0.3, 0.6, 0.4, 0.2], [0.4, 0.22, 0.48, 0.31]
    methods = {"ER": method(tmp_path / "er", deep), "ER + average": method(tmp_path / "average", less)}
    table = directions("split", methods)
    assert [row[1:6] for row in table.rows] == [
        ("2306.16817", "ER + average", "ER", "AAA", "higher"),
        ("2306.16817", "ER + average", "ER", "WC-ACC", "higher"),
    ]
    # WC-ACC is the mean of the last accuracy of experience 1 and the lowest of experience 0
    worst = [[(0.8 + 0.9 - depth) / 2 for depth in depths] for depths in (less, deep[:4])]
    low, high = 100 * np.array(stats.ttest_rel(*worst).confidence_interval(0.95))
    *_, shown, seeds, says = table.rows[1]
    assert (shown, seeds, says) == (f"{(low + high) / 2:.1f} ± {(high - low) / 2:.1f}", "4", "confirmed")
    # as independent samples the intervals overlap
    assert stats.ttest_ind(*worst).pvalue > 0.1
    turned = directions("split", {"ER": methods["ER + average"], "ER + average": methods["ER"]})
    assert {row[-1] for row in turned.rows} == {"refuted"}
    assert "| refuted |" in turned.markdown()


def test_two_seeds_decide_nothing_and_methods_that_are_not_there_have_no_row(tmp_path: Path) -> None:
    methods = {"ER": method(tmp_path / "er", [0.5, 0.3]), "ER + average": method(tmp_path / "average", [0.1, 0.1])}
    assert {row[-1] for row in directions("split", methods).rows} == {"undecided"}
    assert directions("split", {"ER": methods["ER"]}) is None


def test_the_table_says_how_many_boundaries_avg_sg_leaves_out(tmp_path: Path) -> None:
    er = method(tmp_path / "er", [0.5, 0.3, 0.4])
    assert tool.COLUMNS["avg-SG"](er).startswith("44.4 ±")
    text = (er.runs[0] / "history.csv").read_text()
    (er.runs[0] / "history.csv").write_text(text.replace("2,0,step,0.9", "2,0,step,0.0"))
    tool.metrics_of.cache_clear()
    assert tool.COLUMNS["avg-SG"](er) == "38.9 (1 left out)"


@pytest.mark.parametrize(
    ("mean", "half", "expected", "says"),
    [
        (0.03, 0.02, "higher", "confirmed"),
        (0.03, 0.04, "higher", "undecided"),
        (-0.03, 0.02, "higher", "refuted"),
        (-0.03, 0.02, "lower", "confirmed"),
        (0.03, 0.02, "lower", "refuted"),
        (0.0, 0.01, "close", "confirmed"),
        (-0.015, 0.004, "close", "confirmed"),
        (0.0, 0.03, "close", "undecided"),
        (-0.05, 0.02, "close", "refuted"),
        (0.005, 0.01, "no gain", "confirmed"),
        (-0.1, 0.05, "no gain", "confirmed"),
        (0.015, 0.02, "no gain", "undecided"),
        (0.015, 0.004, "no gain", "refuted"),
        (0.03, np.nan, "higher", "undecided"),
        (0.0, np.nan, "no gain", "undecided"),
    ],
)
def test_the_whole_interval_decides(mean: float, half: float, expected, says: str) -> None:
    assert verdict(Estimate(5, mean, 0.01, half), expected, margin=0.02) == says


def test_the_first_dip_of_a_worked_example() -> None:
    nan = np.nan
    scores = np.array(
        [
            [40, 70, 80, 90, 20, 50, 70, 80, 30, 40, 60, 70],
            [nan] * 4 + [30, 60, 80, 90, 50, 20, 60, 80],
            [nan] * 8 + [50, 70, 80, 90],
        ]
    )
    history = History(np.arange(1, 13), np.arange(12) // 4, np.full(12, "step"), scores.T / 100)
    assert first_dip(history, steps=1) == pytest.approx((0.7 + 0.5 + 0.4) / 3)
    assert first_dip(history, steps=2) == pytest.approx((0.7 + 0.5 + 0.7) / 3)
    assert np.isnan(first_dip(History(*(part[:4] for part in vars(history).values()))))


def test_claims_are_of_methods_that_the_streams_have() -> None:
    known = tool.streams(Path("file"))
    named = {name.partition("@")[0] for claim in CLAIMS for pair in claim.pairs for name in pair}
    assert named <= known["split"].keys()
    assert known["features"].keys() == known["split"].keys()
    assert "scenario.file=file" in known["features"]["ER"]
    projected = {"replay 1/k", "replay 1/k + A-GEM", "replay 1/k + GEM"}
    assert all(projected <= known[name].keys() for name in ("split", "rotated", "features"))
    # a thousand samples at the end of three experiences or five
    for name, share in (("split", 200), ("rotated", 333)):
        assert f"strategy.projected_replay.samples_per_experience={share}" in known[name]["replay 1/k + GEM"]
    assert "scenario.angles=[0,80,160]" in known["rotated"]["replay 1/k + GEM"]


def test_features_are_the_means_of_the_last_map_of_timm_s_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(lite0.NAME).eval()
    stored = {f"other_{i}": part for i, part in enumerate(whole.state_dict().values())}
    torch.save(stored, tmp_path / "lite0.pth")
    y = torch.arange(12) % 2
    images = Samples(torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8), y, *torch.arange(12).split([8, 0, 4]))
    path = tmp_path / "folder" / "made.npz"
    lite0.write_features(path, images, str(tmp_path / "lite0.pth"), side=64, n_train=3, n_test=1)
    stream = SplitFeatures(path, 2, normalize=False)
    assert [(len(experience.train), len(experience.test)) for experience in stream] == [(3, 1), (3, 1)]
    maps = []
    whole.blocks[-1].register_forward_hook(lambda module, args, output: maps.append(output))
    # the third image of class 1
    pixels = images.x[5:6].float().expand(-1, 3, -1, -1) / 255
    resized = F.interpolate(pixels, size=(64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        whole((resized - 0.5) / 0.5)
    assert torch.allclose(stream[1].train[2][0], maps[0].mean(dim=(0, 2, 3)), atol=1e-5)
    torch.save(dict(list(stored.items())[:-1]), tmp_path / "less.pth")
    with pytest.raises(ConfigurationError, match=r"less\.pth does not hold the weights of tf_efficientnet_lite0"):
        lite0.weights(str(tmp_path / "less.pth"))
