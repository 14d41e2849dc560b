"""The dose response: effect sizes and slopes by hand, and read from runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from clkit import ConfigurationError
from clkit.metrics.history import History
from clkit.metrics.summary import summary
from clkit.report.runs import find_runs

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import dose_response


def test_hedges_g_of_the_sheets_example():
    # n = 5 and 5, means .60 and .50, both with a standard deviation of .05
    spread = 0.05 * np.array([-1, -1, 0, 1, 1])
    assert spread.std(ddof=1) == pytest.approx(0.05)
    assert dose_response.hedges_g(0.6 + spread, 0.5 + spread) == pytest.approx(1.806, abs=1e-3)
    assert math.isnan(dose_response.hedges_g([0.5], [0.4, 0.5]))


def test_the_slope_is_that_of_least_squares_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    found = {dose: (2 + 0.8 * dose + rng.normal(0, 0.05, 6)).tolist() for dose in (0.0, 0.5, 1.0)}
    middle, low, high = dose_response.slope(found)
    x = np.repeat([0, 0.5, 1], 6)
    y = np.concatenate(list(found.values()))
    assert middle == pytest.approx(((x - x.mean()) @ (y - y.mean())) / ((x - x.mean()) ** 2).sum())
    assert low < middle < high
    # twice 1.96 standard errors of the slope, with the spread of the outer doses, which alone move it
    spread = math.sqrt(np.mean([np.var(found[dose]) for dose in (0.0, 1.0)]))
    width = 2 * 1.96 * spread / math.sqrt(((x - x.mean()) ** 2).sum())
    assert high - low == pytest.approx(width, rel=0.15)
    assert dose_response.slope({dose: [1 + dose] * 3 for dose in (0.0, 1.0)}) == pytest.approx((1, 1, 1))
    # doses of 0, 0.5 and 1: the middle one does not move the slope
    single = {0.0: [2.0], 0.5: [2.1], 1.0: [3.0]}
    assert dose_response.slope(single) == pytest.approx((1, np.nan, np.nan), nan_ok=True)
    assert "1.000 nats (one run of each dose: no interval)" in dose_response.lines([single], ["dosed"])[-1]


def make_run(folder, dose, after, healed):
    (folder / ".hydra").mkdir(parents=True)
    config = {"scenario": {"mix": {"source": "short", "share": dose}}, "strategy": {"naive": {}}}
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    scores = [math.exp(-after), math.exp(-healed)]
    rows = [f"1,0,step,{scores[0]},", f"1,0,end,{scores[0]},", f"2,1,step,{scores[1]},{scores[1]}"]
    rows.append(f"2,1,end,{scores[1]},{scores[1]}")
    (folder / "history.csv").write_text("\n".join(["step,experience,phase,E0,E1", *rows]) + "\n")
    about = {"name": "text", "kind": "domain-incremental", "experiences": ["dosed", "healed"]}
    settings = {"complete": True, "score": "inverse_perplexity", "schedule": "every step", "subset": None}
    content = summary(History.read(folder / "history.csv"), stream=about, **settings)
    (folder / "metrics.json").write_text(json.dumps(content))


def test_runs_are_read_by_dose_after_it_and_after_healing(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"none{seed}", 0, 2.0 + 0.1 * seed, 1.9 + 0.1 * seed)
        make_run(tmp_path / f"all{seed}", 1, 3.0 + 0.1 * seed, 2.0 + 0.1 * seed)
    ends = dose_response.read(find_runs([tmp_path])[0])
    assert [sorted(found) for found in ends] == [[0, 1], [0, 1]]
    assert ends[0][1.0] == pytest.approx([3.0, 3.1])
    text = dose_response.lines(ends, ["dosed", "healed"])
    assert text[1].split() == ["0.00", "2", "2.050", "–", "1.950", "–"]
    g = (1 - 3 / 7) * 1 / (0.1 / math.sqrt(2))
    assert text[2].split() == ["1.00", "2", "3.050", f"{g:.2f}", "2.050", f"{g / 10:.2f}"]
    assert "after dosed on the dose: 1.000 nats" in text[3]
    (tmp_path / "none0" / ".hydra" / "config.yaml").write_text("strategy: {naive: {}}\n")
    with pytest.raises(ConfigurationError, match="no finished run of experiment=junk_dose"):
        dose_response.read(find_runs([tmp_path])[0])
