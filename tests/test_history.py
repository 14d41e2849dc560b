import math
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clkit import ConfigurationError
from clkit.metrics.history import History, HistoryWriter

NAN = math.nan
HEADER = "step,experience,phase,E0,E1\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.csv"


def write(path, rows):
    writer = HistoryWriter(path, 2)
    for row in rows:
        writer.append(*row)
    writer.sync()
    return writer


ROWS = [
    (0, 0, "init", [0.1, NAN]),
    (2, 0, "step", [1 / 3, NAN]),
    (2, 0, "end", [0.5, NAN]),
    (4, 1, "step", [0.25, 1.0]),
]


def test_format_on_disk(path):
    write(path, ROWS).close()
    expected = "0,0,init,0.1,\n2,0,step,0.3333333333333333,\n2,0,end,0.5,\n4,1,step,0.25,1.0\n"
    assert path.read_text() == HEADER + expected


def test_scores_of_the_first_experiences_suffice(path):
    write(path, [(1, 0, "step", [np.float64(0.5)])]).close()
    assert path.read_text() == HEADER + "1,0,step,0.5,\n"
    with pytest.raises(ValueError, match="at most 2"):
        HistoryWriter(path, 2).append(1, 0, "step", [0.1, 0.2, 0.3])


def test_reading_returns_what_was_written(path):
    write(path, ROWS).close()
    history = History.read(path)
    assert history.steps.tolist() == [0, 2, 2, 4]
    assert history.experience.tolist() == [0, 0, 0, 1]
    assert history.phase.tolist() == ["init", "step", "end", "step"]
    np.testing.assert_array_equal(history.scores, [row[3] for row in ROWS])
    assert (history.steps.dtype, history.scores.dtype) == (np.int64, np.float64)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_scores_round_trip_exactly(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("history") / "history.csv"
    write(path, [(n, 0, "step", [value]) for n, value in enumerate(values)]).close()
    assert History.read(path).scores[:, 0].tolist() == values


def test_selection_counts_and_boundaries(path):
    write(path, ROWS).close()
    history = History.read(path)
    assert len(history.select("init", "step")) == 3
    assert history.select("end").steps.tolist() == [2]
    assert (history.started, history.finished) == (2, 1)
    assert history.boundaries().tolist() == [2]


def test_history_without_full_evaluations_ends_at_its_last_steps(path):
    write(path, [row for row in ROWS if row[2] != "end"]).close()
    history = History.read(path)
    assert history.finished == 2
    assert history.boundaries().tolist() == [2, 4]


def test_pandas_reads_it_in_one_line(path):
    write(path, ROWS).close()
    frame = pd.read_csv(path)
    assert list(frame.columns) == ["step", "experience", "phase", "E0", "E1"]
    assert frame.E1.isna().tolist() == [True, True, True, False]
    assert frame.E0[1] == 1 / 3


@pytest.mark.parametrize("cut", range(1, len("4,1,step,0.25,1.0\n")))
def test_torn_last_line_is_ignored(path, cut):
    write(path, ROWS).close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert History.read(path).steps.tolist() == [0, 2, 2]


def test_header_alone_is_an_empty_history(path):
    HistoryWriter(path, 2).close()
    history = History.read(path)
    assert (len(history), history.n_experiences, history.started, history.finished) == (0, 2, 0, 0)
    assert history.boundaries().tolist() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n1,2\n",
        "step,experience,phase\n",
        HEADER + "1,0,step,0.5,,\n",
        HEADER + "1,2,step,0.5,\n",
        HEADER + "1,0,warmup,0.5,\n",
        HEADER + "1,0,7,0.5,\n",
        HEADER + ",0,step,0.5,\n",
        HEADER + "1,0,step,high,\n",
        HEADER + "1,0,step,0.5,\n1,0\n",
    ],
)
def test_a_file_that_is_no_history_is_refused(path, text):
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"history\.csv is no history"):
        History.read(path)


def test_missing_file_is_refused(path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        History.read(path)


def test_offset_counts_the_bytes_on_disk(path):
    writer = write(path, ROWS)
    assert writer.offset == path.stat().st_size
    writer.append(5, 1, "step", [0.5, 0.5])
    writer.flush()
    assert writer.offset == path.stat().st_size


def test_resume_cuts_what_came_after_the_checkpoint(path):
    writer = write(path, ROWS[:2])
    offset = writer.offset
    for row in ROWS[2:]:
        writer.append(*row)
    writer.close()
    path.write_bytes(path.read_bytes() + b"5,1,st")
    resumed = HistoryWriter.resume(path, 2, offset)
    assert resumed.offset == offset
    for row in ROWS[2:]:
        resumed.append(*row)
    resumed.close()
    other = path.with_name("never_killed.csv")
    write(other, ROWS).close()
    assert path.read_bytes() == other.read_bytes()


def test_resume_refuses_a_history_it_cannot_continue(path):
    with pytest.raises(ConfigurationError, match="0 bytes"):
        HistoryWriter.resume(path, 2, 30)
    writer = write(path, ROWS)
    writer.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="written after"):
        HistoryWriter.resume(path, 2, writer.offset + 1)
    with pytest.raises(ConfigurationError, match="expected 3 experiences"):
        HistoryWriter.resume(path, 3, writer.offset)
    with pytest.raises(ConfigurationError, match="ends at byte"):
        HistoryWriter.resume(path, 2, writer.offset - 1)
    assert path.read_bytes() == before


def test_fresh_writer_replaces_the_file(path):
    write(path, ROWS).close()
    HistoryWriter(path, 3).close()
    assert path.read_text() == "step,experience,phase,E0,E1,E2\n"
    assert [file.name for file in path.parent.iterdir()] == ["history.csv"]


def test_reading_a_long_history_is_fast(path):
    line = ",".join(["0.123"] * 10 + [""] * 10)
    header = ",".join(["step", "experience", "phase", *(f"E{k}" for k in range(20))])
    path.write_text(header + "\n" + "".join(f"{n},9,step,{line}\n" for n in range(100_000)))
    start = time.process_time()
    history = History.read(path)
    assert time.process_time() - start < 5
    assert history.scores.shape == (100_000, 20)
    assert np.isnan(history.scores).sum() == 1_000_000
