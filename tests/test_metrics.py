import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import ConfigurationError
from clkit.metrics.functional import (
    Statistics,
    accuracy_matrix,
    compute_metrics,
    forgetting_global,
    forgetting_step,
    gap,
    windowed_forgetting,
    windowed_plasticity,
)
from clkit.metrics.history import History
from clkit.metrics.online import (
    WCACC,
    AverageAccuracy,
    AverageAnytimeAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    GapArea,
    GapDepth,
    LearningCurveArea,
    MinACC,
    RecoveryTime,
    StabilityGapMetrics,
    WindowedForgetting,
    WindowedPlasticity,
)
from clkit.metrics.summary import summary, to_json

NAN = math.nan
E1 = [40, 70, 80, 90, 20, 50, 70, 80, 30, 40, 60, 70]
E2 = [NAN] * 4 + [30, 60, 80, 90, 50, 20, 60, 80]
E3 = [NAN] * 8 + [50, 70, 80, 90]


def from_rows(rows, n_experiences):
    """History from (step, experience, phase, scores)."""
    steps, experience, phase, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
    return History(
        np.array(steps, dtype=np.int64),
        np.array(experience, dtype=np.int64),
        np.array(phase, dtype="U6"),
        np.array(scores, dtype=np.float64).reshape(len(rows), n_experiences),
    )


def worked_example(every=1, until=12):
    """Three experiences of four steps each."""
    table = np.array([E1, E2, E3]).T / 100
    return from_rows([(n, (n - 1) // 4, "step", table[n - 1]) for n in range(every, until + 1, every)], 3)


EXPECTED = {
    1: {
        "ACC": 80, "FORG": 15, "BWT": -15, "min-ACC": 20, "WC-ACC": 130 / 3, "WF2": 110 / 3, "WF4": 140 / 3,
        "WF10": 140 / 3, "WF100": 140 / 3, "WP2": 30, "WP10": 160 / 3, "WP100": 160 / 3, "AAA": (753 + 1 / 3) / 12,
        "gap_depth": 190 / 3, "gap_area": 395 / 3, "avg-SG": 100 * 7 / 9, "avg-SG_first": 50 * (7 / 9 + 5 / 8),
    },
    2: {
        "ACC": 80, "FORG": 15, "BWT": -15, "min-ACC": 30, "WC-ACC": 50, "WF2": 110 / 3, "WF4": 40, "WF10": 40,
        "WF100": 40, "WP2": 110 / 3, "WP10": 110 / 3, "WP100": 110 / 3, "AAA": 70 + 5 / 9,
    },
    4: {
        "ACC": 80, "FORG": 15, "BWT": -15, "min-ACC": 75, "WC-ACC": 80, "WF2": 20 / 3, "WF4": 10, "WF10": 10,
        "WF100": 10, "WP2": 0, "WP10": 0, "WP100": 0, "AAA": 85,
    },
}  # fmt: skip


@pytest.mark.parametrize("every", EXPECTED)
def test_worked_example(every):
    metrics = compute_metrics(worked_example(every), windows=(2, 4, 10, 100))
    assert {name: 100 * metrics[name] for name in EXPECTED[every]} == pytest.approx(EXPECTED[every])
    assert metrics["n_missing"] == 0


def test_worked_example_while_the_first_experience_is_learned():
    metrics = compute_metrics(worked_example(until=4))
    assert (metrics["WC-ACC"], metrics["AAA"]) == pytest.approx((0.9, 0.7))
    assert all(math.isnan(metrics[name]) for name in ("min-ACC", "FORG", "FORG_max", "BWT"))


def test_worked_example_one_step_after_the_first_boundary():
    metrics = compute_metrics(worked_example(until=5))
    assert (metrics["min-ACC"], metrics["WC-ACC"]) == pytest.approx((0.2, 0.25))


def test_per_experience_and_accuracy_matrix_of_the_worked_example():
    each = Statistics.of(worked_example()).per_experience()
    np.testing.assert_allclose(each["final"], [0.7, 0.8, 0.9])
    np.testing.assert_allclose(each["forgetting"], [0.2, 0.1, NAN])
    np.testing.assert_allclose(each["minimum"], [0.2, 0.2, NAN])
    expected = [[0.9, NAN, NAN], [0.8, 0.9, NAN], [0.7, 0.8, 0.9]]
    np.testing.assert_allclose(accuracy_matrix(worked_example()), expected)


def test_gaps_of_the_worked_example():
    # E1 falls by 70, 40, 20, 10 below 90, then by 50, 40, 20, 10 below 80; E2 by 40, 70, 30, 10 below 90
    gaps = Statistics.of(worked_example()).gaps
    np.testing.assert_allclose(gaps["depth"], [[NAN, NAN, NAN], [0.7, NAN, NAN], [0.5, 0.7, NAN]])
    np.testing.assert_allclose(gaps["area"], [[NAN, NAN, NAN], [1.35, NAN, NAN], [1.15, 1.45, NAN]])
    assert np.isnan(gaps["recovery"]).all()
    metrics = compute_metrics(worked_example())
    assert (metrics["gap_depth"], metrics["gap_area"]) == pytest.approx((1.9 / 3, 3.95 / 3))
    assert metrics["n_unrecovered"] == 3
    assert math.isnan(metrics["recovery_steps"])


def test_recovery_is_the_first_return_after_the_lowest_point():
    steps, scores = [12, 14, 16, 18, 20], [0.5, 0.9, 0.3, 0.885, 0.95]
    assert gap(steps, scores, before=0.9, boundary=10).recovery == 8  # at step 18, not 14
    assert gap(steps, scores, before=0.9, boundary=10, within=0.01).recovery == 10
    assert gap(steps, scores, before=0.3, boundary=10)[:3] == (0, 0, 0)
    assert gap(steps, [NAN, NAN, 0.85, NAN, 0.89], before=0.9, boundary=10).area == pytest.approx(0.15 + 0.12)
    assert math.isnan(gap(steps, scores, before=1.0, boundary=10).recovery)
    assert all(map(math.isnan, gap([12], [NAN], before=0.9, boundary=10)))


def test_relative_depth_is_negative_where_a_score_only_rose_and_undefined_from_zero():
    assert gap([12, 14], [0.6, 0.5], before=0.4, boundary=10).relative == pytest.approx(-0.25)
    assert math.isnan(gap([12, 14], [0.6, 0.5], before=0.0, boundary=10).relative)


def test_boundaries_without_a_relative_depth_are_left_out_and_counted():
    # 0 before the first boundary; before the second the first experience is at 0.2, the second at 0.8
    rows = [(1, 0, "step", [0, NAN, NAN]), (2, 1, "step", [0.2, 0.8, NAN]), (3, 2, "step", [0.1, 0.2, 1])]
    metrics = compute_metrics(from_rows(rows, 3))
    assert (metrics["avg-SG"], metrics["n_without_SG"]) == pytest.approx((0.75, 1))
    assert (metrics["avg-SG_first"], metrics["n_without_SG_first"]) == pytest.approx((0.5, 1))
    assert compute_metrics(worked_example())["n_without_SG"] == 0
    never = compute_metrics(from_rows([(1, 0, "step", [0, NAN]), (2, 1, "step", [0, 0.8])], 2))
    assert math.isnan(never["avg-SG"])
    assert never["n_without_SG"] == 1


def test_relative_depth_is_of_each_seed_not_of_the_mean_curve():
    # two seeds fall to 20 at different steps: their mean curve only to 50
    seeds = [from_rows([(1, 0, "step", [1, NAN]), (2, 1, "step", [a, 1]), (3, 1, "step", [b, 1])], 2)
             for a, b in ((0.2, 0.8), (0.8, 0.2))]  # fmt: skip
    assert [compute_metrics(history)["avg-SG"] for history in seeds] == pytest.approx([0.8, 0.8])


def learned_in_twelve_steps():
    """Two experiences of twelve steps; the second rises from 0.2 by 0.05 a step."""
    curve = [0.2 + 0.05 * n for n in range(1, 13)]
    rows = [(0, 0, "init", [0.1, 0.15])]
    rows += [(n, 0, "step", [0.5, NAN]) for n in range(1, 13)]
    rows += [(12, 0, "before", [NAN, 0.2])]
    rows += [(12 + n, 1, "step", [0.5, curve[n - 1]]) for n in range(1, 13)]
    return from_rows(rows, 2)


def test_forward_transfer_and_learning_curve_area():
    metrics = compute_metrics(learned_in_twelve_steps())
    assert metrics["FWT"] == pytest.approx(0.2 - 0.15)
    second = sum(0.2 + 0.05 * n for n in range(1, 11))
    assert metrics["LCA10"] == pytest.approx((0.5 + second / 10) / 2)
    assert metrics["LCA10_zero"] == pytest.approx(((5 + 0.1) / 11 + (second + 0.2) / 11) / 2)


def test_forward_transfer_and_learning_curve_area_are_undefined_without_their_evaluations():
    metrics = compute_metrics(worked_example())
    assert all(math.isnan(metrics[name]) for name in ("FWT", "LCA10", "LCA10_zero"))


def test_plasticity_is_the_true_rise():
    assert windowed_plasticity([0.5, 0.1, 0.9], window=3) == pytest.approx(0.8)


def test_full_test_sets_give_acc_and_subsets_the_worst_case():
    rows = [
        (0, 0, "init", [0.1, NAN]),
        (1, 0, "step", [0.8, NAN]),
        (1, 0, "end", [0.9, NAN]),
        (2, 1, "step", [0.5, 0.6]),
        (3, 1, "step", [0.6, 0.7]),
        (3, 1, "end", [0.65, 0.75]),
    ]
    metrics = compute_metrics(from_rows(rows, 2))
    assert metrics["ACC"] == pytest.approx((0.65 + 0.75) / 2)
    assert metrics["ACC_subset"] == pytest.approx((0.6 + 0.7) / 2)
    assert metrics["FORG"] == pytest.approx(0.9 - 0.65)
    assert metrics["min-ACC"] == 0.5
    assert metrics["WP10"] == pytest.approx(0.1)  # neither the initial nor the final evaluation counts
    assert metrics["AAA"] == pytest.approx((0.8 + 0.55 + 0.65) / 3)


def test_unfinished_experience_does_not_enter_acc():
    rows = [(1, 0, "step", [0.8, NAN]), (1, 0, "end", [0.9, NAN]), (2, 1, "step", [0.5, 0.6])]
    metrics = compute_metrics(from_rows(rows, 2))
    assert metrics["ACC"] == 0.9
    assert metrics["WC-ACC"] == pytest.approx((0.6 + 0.5) / 2)


def test_forgetting_max_compares_with_the_best_earlier_end():
    rows = [
        (1, 0, "step", [0.5, NAN, NAN]),
        (2, 1, "step", [0.9, 0.8, NAN]),
        (3, 2, "step", [0.4, 0.6, 0.7]),
    ]
    metrics = compute_metrics(from_rows(rows, 3))
    assert metrics["FORG"] == pytest.approx((0.1 + 0.2) / 2)
    assert metrics["FORG_max"] == pytest.approx((0.5 + 0.2) / 2)


def test_old_experience_without_evaluation_is_flagged_and_left_out():
    rows = [
        (1, 0, "step", [0.5, NAN, NAN]),
        (2, 1, "step", [NAN, 0.8, NAN]),
        (3, 2, "step", [NAN, 0.6, 0.7]),
    ]
    metrics = compute_metrics(from_rows(rows, 3))
    assert metrics["n_missing"] == 1
    assert metrics["min-ACC"] == 0.6


def test_experience_with_one_evaluation_counts_with_no_change():
    rows = [(1, 0, "step", [0.9, NAN]), (2, 0, "step", [0.5, NAN]), (3, 1, "step", [0.5, 0.3])]
    metrics = compute_metrics(from_rows(rows, 2), windows=(2,))
    assert (metrics["WF2"], metrics["WP2"]) == pytest.approx((0.2, 0.0))


def test_empty_history_is_undefined_everywhere():
    metrics = compute_metrics(from_rows([], 2))
    assert {metrics.pop(name) for name in list(metrics) if name.startswith("n_")} == {0}
    assert all(math.isnan(value) for value in metrics.values())


def test_window_without_a_pair_is_refused():
    with pytest.raises(ConfigurationError, match="window=1"):
        windowed_forgetting([0.5, 0.4], window=1)
    with pytest.raises(ConfigurationError, match="windows"):
        StabilityGapMetrics(2, windows=(10, 1))


scores = st.integers(0, 20).map(lambda n: n / 20)
series = st.lists(scores | st.just(NAN), max_size=40)
windows = st.integers(2, 45)


def pairs(values, window=10**9):
    """Brute force: all changes within a window, of the evaluations that are there."""
    values = [value for value in values if not math.isnan(value)]
    return [values[j] - values[i] for i, j in combinations(range(len(values)), 2) if j - i < window]


@settings(max_examples=300, deadline=None)
@given(series, windows)
def test_windowed_metrics_equal_the_brute_force(values, window):
    fall, rise = windowed_forgetting(values, window), windowed_plasticity(values, window)
    if all(map(math.isnan, values)):
        assert math.isnan(fall)
        assert math.isnan(rise)
    else:
        changes = [0.0, *pairs(values, window)]
        assert fall == pytest.approx(-min(changes))
        assert rise == pytest.approx(max(changes))


@given(st.lists(scores, min_size=1, max_size=30), windows)
def test_windowed_metrics_under_symmetries(values, window):
    fall, rise = windowed_forgetting(values, window), windowed_plasticity(values, window)
    assert windowed_forgetting(values[::-1], window) == pytest.approx(rise)
    assert windowed_plasticity([1 - value for value in values], window) == pytest.approx(fall)
    assert windowed_forgetting([0.5 * value + 0.2 for value in values], window) == pytest.approx(0.5 * fall)
    assert windowed_forgetting(sorted(values), window) == 0
    assert (windowed_plasticity(sorted(values), window) > 0) == (len(set(values)) > 1)
    assert fall <= windowed_forgetting(values, window + 1)


@st.composite
def histories(draw, holes=False, subsets_only=False, min_experiences=1):
    """Random histories: some experiences, some steps each, perhaps full evaluations and gaps."""
    n = draw(st.integers(min_experiences, 4))
    lengths = draw(st.lists(st.integers(1, 5) | st.just(12), min_size=n, max_size=n))
    full = not subsets_only and draw(st.booleans())
    transfer = draw(st.booleans())
    rows = [(0, 0, "init", [draw(scores) if k == 0 or transfer else NAN for k in range(n)])]
    for k, length in enumerate(lengths):
        if k > 0 and transfer:
            rows.append((rows[-1][0], k - 1, "before", [draw(scores) if i == k else NAN for i in range(n)]))
        for position in range(length):
            cell = scores | st.just(NAN) if holes and position < length - 1 else scores
            rows.append(
                (
                    rows[-1][0] + draw(st.integers(1, 3)),
                    k,
                    "step",
                    [draw(cell) for _ in range(k + 1)] + [NAN] * (n - k - 1),
                )
            )
        if full:
            rows.append((rows[-1][0], k, "end", [draw(scores) for _ in range(k + 1)] + [NAN] * (n - k - 1)))
    return from_rows(rows, n)


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else NAN


@given(histories(holes=True), st.integers(2, 6))
def test_history_metrics_equal_the_brute_force(history, window):
    rows = [
        (e, s)
        for e, p, s in zip(history.experience, history.phase, history.scores.tolist(), strict=True)
        if p == "step"
    ]
    k = rows[-1][0] + 1
    lowest = [min((s[i] for e, s in rows if e > i and not math.isnan(s[i])), default=NAN) for i in range(k - 1)]
    changes = [[0.0, *pairs([s[i] for _, s in rows], window)] for i in range(k)]
    expected = {
        "min-ACC": mean(lowest),
        "WC-ACC": rows[-1][1][k - 1] / k + (1 - 1 / k) * mean(lowest) if k > 1 else rows[-1][1][0],
        "AAA": mean([mean(s[: e + 1]) for e, s in rows]),
        f"WF{window}": mean([-min(c) for c in changes]),
        f"WP{window}": mean([max(c) for c in changes]),
        "n_missing": sum(map(math.isnan, lowest)),
    }
    metrics = compute_metrics(history, (window,))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)


@given(histories())
def test_ranges(history):
    metrics = compute_metrics(history)
    differences, unbounded = {"FORG", "FORG_max", "BWT", "FWT"}, {"gap_area", "recovery_steps"}
    for name, value in metrics.items():
        low = -1 if name in differences else -math.inf if name.startswith("avg-SG") else 0
        high = math.inf if name in unbounded or name.startswith("n_") else 1
        assert math.isnan(value) or low <= value <= high


@given(histories(subsets_only=True))
def test_worst_case_never_exceeds_acc_at_an_experience_end(history):
    metrics = compute_metrics(history)
    assert metrics["WC-ACC"] <= metrics["ACC"] + 1e-12


@given(histories(subsets_only=True, min_experiences=2), st.data())
def test_sparser_evaluation_is_never_more_pessimistic(history, data):
    history = history.select("step")
    last = np.append(history.experience[1:] != history.experience[:-1], True)
    kept = last | np.array(data.draw(st.lists(st.booleans(), min_size=len(history), max_size=len(history))))
    sparse = History(*(column[kept] for column in (history.steps, history.experience, history.phase, history.scores)))
    fine, coarse = compute_metrics(history), compute_metrics(sparse)
    assert fine["min-ACC"] <= coarse["min-ACC"]
    assert fine["WC-ACC"] <= coarse["WC-ACC"] + 1e-12
    assert (fine["ACC"], fine["FORG"]) == (coarse["ACC"], coarse["FORG"])
    assert coarse["WF100"] <= fine["WF100"] + 1e-12


@given(histories(subsets_only=True, min_experiences=2))
def test_unbounded_windowed_forgetting_bounds_forgetting(history):
    k, metrics = history.n_experiences, compute_metrics(history)
    assert metrics["WF100"] >= (k - 1) / k * metrics["FORG"] - 1e-12


@given(histories(subsets_only=True, min_experiences=2))
def test_running_minimum_never_rises_within_an_experience(history):
    for first, second in zip(range(1, len(history)), range(2, len(history) + 1), strict=True):
        before, after = (
            Statistics.of(History(history.steps[:n], history.experience[:n], history.phase[:n], history.scores[:n]))
            for n in (first, second)
        )
        if before.started == after.started:
            old = slice(0, before.started - 1)
            assert (after.minimum[old] <= before.minimum[old]).all()


def feed(metric, history, rows=slice(None)):
    columns = (history.scores, history.experience.tolist(), history.phase.tolist(), history.steps.tolist())
    for values, *where in list(zip(*columns, strict=True))[rows]:
        metric.update(torch.from_numpy(values), *where)
    return metric


def as_floats(values):
    return {name: float(value) for name, value in values.items()}


@settings(max_examples=50)
@given(histories(holes=True), st.integers(2, 6))
def test_streaming_equals_the_function_on_the_history(history, window):
    metric = feed(StabilityGapMetrics(history.n_experiences, windows=(window, 3)), history)
    expected = compute_metrics(history, windows=(window, 3))
    assert as_floats(metric.compute()) == pytest.approx(expected, nan_ok=True, abs=1e-12)


def test_streaming_survives_a_state_dict_round_trip():
    history = worked_example()
    first = feed(StabilityGapMetrics(3, windows=(2, 4)), history, slice(0, 6))
    second = StabilityGapMetrics(3, windows=(2, 4))
    second.load_state_dict(first.state_dict())
    feed(second, history, slice(6, None))
    whole = feed(StabilityGapMetrics(3, windows=(2, 4)), history)
    assert as_floats(second.compute()) == pytest.approx(as_floats(whole.compute()), rel=0, abs=0, nan_ok=True)


def test_streaming_reset_starts_over():
    metric = feed(StabilityGapMetrics(3), worked_example())
    metric.reset()
    assert 100 * float(feed(metric, worked_example(4)).compute()["min-ACC"]) == pytest.approx(75)


def test_forward_returns_the_batch_value_and_accumulates():
    metric = MinACC(2)
    assert math.isnan(metric(torch.tensor([0.9, NAN]), 0))
    assert float(metric(torch.tensor([0.25, 0.5]), 1)) == 0.25
    metric.update(torch.tensor([0.75, 0.5]), 1)
    assert float(metric.compute()) == 0.25


def test_persistence_can_be_switched_off():
    assert StabilityGapMetrics(2).state_dict()
    assert not StabilityGapMetrics(2, persistent=False).state_dict()


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (AverageAccuracy(3), "ACC"),
        (Forgetting(3), "FORG"),
        (BackwardTransfer(3), "BWT"),
        (MinACC(3), "min-ACC"),
        (WCACC(3), "WC-ACC"),
        (AverageAnytimeAccuracy(3), "AAA"),
        (WindowedForgetting(3, window=2), "WF2"),
        (WindowedPlasticity(3, window=2), "WP2"),
        (GapDepth(3), "gap_depth"),
        (GapArea(3), "gap_area"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_single_metrics_on_the_worked_example(metric, name):
    assert 100 * float(feed(metric, worked_example()).compute()) == pytest.approx(EXPECTED[1][name])


@pytest.mark.parametrize(
    ("metric", "name"),
    [(ForwardTransfer(2), "FWT"), (LearningCurveArea(2), "LCA10"), (RecoveryTime(2), "recovery_steps")],
)
def test_single_metrics_of_transfer(metric, name):
    history = learned_in_twelve_steps()
    assert float(feed(metric, history).compute()) == pytest.approx(compute_metrics(history)[name])


@given(st.lists(scores | st.just(NAN), max_size=15), scores, st.sampled_from([0.0, 0.05, 0.11]))
def test_gap_equals_the_brute_force(values, before, within):
    steps = [3 * n + 2 for n in range(len(values))]
    depth, area, recovery, _ = gap(steps, values, before=before, boundary=0, within=within)
    known = [(n, value) for n, value in zip(steps, values, strict=True) if not math.isnan(value)]
    if not known:
        assert math.isnan(depth)
        return
    path = [(0, before), *known]
    falls = [max(0.0, before - value) for _, value in path]
    assert depth == max(falls)
    parts = [(path[j][0] - path[j - 1][0]) * 0.5 * (falls[j] + falls[j - 1]) for j in range(1, len(path))]
    assert area == pytest.approx(sum(parts))
    lowest = min(range(len(known)), key=lambda j: known[j][1])
    back = [n for n, value in known[lowest:] if before - value <= within]
    expected = 0.0 if depth <= within else back[0] if back else NAN
    assert recovery == pytest.approx(expected, nan_ok=True)


def test_reduction_over_processes_keeps_equal_states():
    metric = feed(StabilityGapMetrics(3), worked_example())
    for name, reduce in metric._reductions.items():
        state = getattr(metric, name)
        torch.testing.assert_close(reduce(torch.stack([state, state])), state, rtol=0, atol=0, equal_nan=True)


def test_summary_is_strict_json_of_the_numbers():
    stream = {"name": "toy", "kind": "class-incremental", "experiences": ["a", "b", "c"]}
    content = summary(worked_example(until=4), stream=stream, complete=False, schedule="every step", subset=None)
    assert content["metrics"]["ACC"] == 0.9
    assert content["metrics"]["min-ACC"] is None
    assert content["stream"]["steps"] == [4]
    assert content["per_experience"]["final"] == [0.9, None, None]
    assert content["accuracy_matrix"][0] == [0.9, None, None]
    assert to_json({"a": np.array([1.0, np.nan]), "b": (np.int64(2), math.inf)}) == {"a": [1.0, None], "b": [2, None]}


def test_two_more_ways_to_count_forgetting():
    matrix = [[90, NAN, NAN], [80, 85, NAN], [70, 75, 80]]
    assert forgetting_global(matrix) == pytest.approx(7.5)
    assert forgetting_step(matrix) == pytest.approx(10)
    # the second experience has twice the classes: (10 / 3 + (20 + 2 * 10) / 4) / 2
    assert forgetting_global(matrix, [1, 2, 1]) == pytest.approx((10 / 3 + 10) / 2)
    assert math.isnan(forgetting_global([[90]]))
    assert math.isnan(forgetting_step([[90]]))
    assert forgetting_global(np.full((4, 4), 0.7)) == pytest.approx(0)
