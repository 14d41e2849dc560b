"""Data sets of Hugging Face as tasks: read by index when asked for, or once, to a limit."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest
import pytorch_lightning as pl
import torch
from language import make_module, objects, write_tasks
from plain import QUIET

from clkit import ConfigurationError, StreamDataModule
from clkit import strategies as s
from clkit.language.generation import AnswerScores
from clkit.language.records import records_of
from clkit.language.tables import Rows, TableRecords
from clkit.scenarios import Instructions
from clkit.testing import small_tokenizer

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module", autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def table_of(task, n=24, seed=0):
    return datasets.Dataset.from_list(objects(task, n, seed))


def splits_of(task):
    sizes = {"train": 24, "validation": 6, "test": 9}
    return datasets.DatasetDict({split: table_of(task, n, seed) for seed, (split, n) in enumerate(sizes.items())})


def make_stream(tasks, **options):
    return Instructions(tasks, tokenizer=small_tokenizer(), **options)


def samples(stream):
    sets = [part for e in stream for part in (e.train, e.val, e.test) if part is not None]
    return [(sample["input_ids"].tolist(), sample["labels"].tolist()) for data in sets for sample in data]


def fit(stream, callbacks, **data):
    module = make_module(lr=0.1)
    data = StreamDataModule(stream, batch_size=4, group_by_length=True, **{"epochs": 1, **data})
    pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
    return module


def test_tables_are_read_as_the_same_records_in_files_are(tmp_path):
    root = write_tasks(tmp_path / "tasks")
    names = ["sums", "colours"]
    files = make_stream(names, root=root)
    tables = make_stream({name: splits_of(name) for name in names})
    assert [(e.name, len(e.train), len(e.val), len(e.test)) for e in tables] == [(n, 24, 6, 9) for n in names]
    assert samples(tables) == samples(files)
    assert [list(e.train.records) for e in tables] == [list(e.train.records) for e in files]
    scores = [AnswerScores(4, max_new_tokens=2, before=True, dir=tmp_path / kind) for kind in ("files", "tables")]
    one, other = (
        fit(stream, [s.ExperienceReplay(10), own]) for stream, own in zip((files, tables), scores, strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    lines = [(tmp_path / kind / "answers" / "after_1.jsonl").read_text() for kind in ("files", "tables")]
    assert lines[0] == lines[1]


class Counted:
    """A data set of Hugging Face that counts the rows that are read by index."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def __len__(self):
        return len(self.table)

    def __iter__(self):
        return iter(self.table)

    def __getitem__(self, row):
        self.asked.append(row)
        return self.table[row]


def test_texts_stay_in_the_table_until_a_record_is_asked_for():
    table = Counted(table_of("sums"))
    records = TableRecords(table, Rows("x", limit=20))
    assert (len(records), records.n_objects, table.asked) == (20, 24, [])
    assert not any(isinstance(value, (str, list)) and "plus" in str(value) for value in vars(records).values())
    few = records[5:9].only([0, 3])
    assert [record.answer for record in few] == [objects("sums", 24)[row]["answer"] for row in (5, 8)]
    assert table.asked == [5, 8]
    with pytest.raises(IndexError):
        few[2]


def test_each_of_several_answers_is_a_record_of_its_own():
    def chat(n):
        roles = itertools.cycle(["user", "assistant"])
        return {"talk": [{"role": next(roles), "content": f"{n} {i}"} for i in range(2 * n)]}

    rows = [chat(n) for n in (2, 1, 3)]
    table = datasets.Dataset.from_list(rows)
    records = TableRecords(table, Rows("x", {"messages": "talk"}, "all"))
    expected = [record for row in rows for record in records_of({"messages": row["talk"]}, None, "all")]
    assert [(r.messages, r.answer) for r in records] == [(r.messages, r.answer) for r in expected]
    assert len(TableRecords(table, Rows("x", {"messages": "talk"}, "all", limit=4))) == 4
    again = pickle.loads(pickle.dumps(records))
    assert (again[4], repr(again)) == (records[4], repr(records))


def test_a_stream_of_rows_is_read_once_to_its_limit():
    def endless():
        for i in itertools.count():
            yield {**objects("sums", 1, i)[0], "i": i}

    read = []

    def row(item):
        read.append(item["i"])
        return item

    table = datasets.IterableDataset.from_generator(endless)
    tasks = {"sums": {"train": table.map(row), "test": table_of("sums", 5)}}
    with pytest.raises(ConfigurationError, match=r"'sums', train is an IterableDataset.*scenario.limit.train=N"):
        make_stream(tasks)
    with pytest.raises(ConfigurationError, match="'sums', train is an IterableDataset"):
        make_stream(tasks, limit={"test": 3})
    assert read == []
    stream = make_stream(tasks, limit={"train": 7})
    assert read == list(range(7))
    assert (len(stream[0].train), len(stream[0].test)) == (7, 5)
    assert [r.answer for r in stream[0].train.records] == [objects("sums", 1, i)[0]["answer"] for i in range(7)]
    fit(stream, [], epochs=3)
    assert read == list(range(7))


def test_an_endless_stream_of_bad_rows_ends():
    table = datasets.IterableDataset.from_generator(
        lambda: ({"prompt": "red", "answer": ""} for _ in itertools.count())
    )
    tasks = {"bad": {"train": table, "test": table_of("sums", 5)}}
    with pytest.raises(ConfigurationError, match=r"'bad', train has no usable record \(9 bad rows\)"):
        make_stream(tasks, limit=9, on_error="skip")
    with pytest.raises(ConfigurationError, match="'bad', train, row 0: its answer is empty. Leave bad records out"):
        make_stream(tasks, limit=9)


def test_bad_rows_of_a_table_are_named_or_left_out():
    rows = objects("sums", 6)
    rows[2]["answer"] = " "
    table = datasets.Dataset.from_list(rows)
    tasks = {"sums": {"train": table, "test": table}}
    with pytest.raises(ConfigurationError, match="'sums', train, row 2: its answer is empty"):
        make_stream(tasks)
    with pytest.warns(UserWarning, match="sums/train: 1 bad records are left out"):
        stream = make_stream(tasks, on_error="skip")
    assert (len(stream[0].train), stream[0].train.n_bad) == (5, 1)
    assert [r.answer for r in stream[0].train.records] == [row["answer"] for row in rows if row["answer"].strip()]


def test_samples_that_are_too_long_leave_their_records_too():
    rows = objects("colours", 30)
    stream = make_stream({"x": {"train": datasets.Dataset.from_list(rows), "test": table_of("sums", 5)}}, max_length=12)
    data = stream[0].train
    assert 0 < data.n_dropped < 30
    tokenizer = small_tokenizer()
    for sample, record in zip(data, data.records, strict=True):
        text = tokenizer.decode(sample["input_ids"])
        assert record.prompt in text
    fitting = [row["answer"] for row in rows if len(row["prompt"].split()) + 4 <= 12]
    assert [record.answer for record in data.records] == fitting


def test_other_rows_are_another_stream():
    def fingerprint(seed=0, **options):
        tasks = {"x": {"train": table_of("colours", 24, seed), "test": table_of("sums", 5)}}
        return make_stream(tasks, **options).fingerprint()

    assert fingerprint() == fingerprint()
    # other rows, fewer, and those that are short enough
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(limit=20), fingerprint(max_length=12)}) == 4


def test_a_resume_goes_on_with_the_same_rows_and_refuses_others(tmp_path):
    def run(seed, **options):
        train = table_of("colours", 24, seed).to_iterable_dataset()
        stream = make_stream({"x": {"train": train, "test": table_of("sums", 5)}}, limit=20)
        data = StreamDataModule(stream, batch_size=4, epochs=2, group_by_length=True)
        module = make_module(lr=0.1)
        trainer = pl.Trainer(max_epochs=2, callbacks=[Save()], **QUIET)
        trainer.fit(module, datamodule=data, **options)
        return module

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = run(0)
    resumed = run(0, ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ConfigurationError, match="has learned another experience 0"):
        run(1, ckpt_path=tmp_path / "middle.ckpt", weights_only=True)


def test_folders_of_save_to_disk_and_column_names(tmp_path):
    renamed = splits_of("sums").rename_columns({"prompt": "question", "answer": "label"})
    renamed.save_to_disk(tmp_path / "saved")
    source = {
        "disk": "saved",
        "keys": {"prompt": "question", "answer": "label"},
        "splits": {"train": "train", "test": "test", "eval": "validation"},
        "metric": "number",
    }
    stream = make_stream({"sums": source}, root=tmp_path)
    assert samples(stream) == samples(make_stream({"sums": splits_of("sums")}))
    assert stream[0].test.metric == "number"
    general = make_stream(
        {"sums": source}, general={"held": {**source, "splits": {"test": "validation"}}}, root=tmp_path
    )
    assert len(general.general[0].test) == 6
    wrong = {**source, "splits": {"train": "train", "test": "tset"}}
    with pytest.raises(ConfigurationError, match="has train, validation, test, but not 'tset'"):
        make_stream({"sums": wrong}, root=tmp_path)
    with pytest.raises(ConfigurationError, match="none cannot be loaded"):
        make_stream({"sums": {"disk": "none"}}, root=tmp_path)
    with pytest.raises(ConfigurationError, match=r"columns ask, label .*It has question, label; name them with keys"):
        make_stream({"sums": {**source, "keys": {"prompt": "ask", "answer": "label"}}}, root=tmp_path)
    with pytest.raises(ConfigurationError, match="'train' is one data set"):
        make_stream(splits_of("sums"))


def test_a_hub_data_set_may_be_streamed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in objects("sums", 12)))
    files = {"train": str(path), "test": str(path)}
    source = {"hub": "json", "options": {"data_files": files, "streaming": True, "cache_dir": str(tmp_path / "cache")}}
    stream = make_stream({"sums": {**source, "sizes": {"train": 99999}}}, limit=8)
    assert [len(stream[0].train), len(stream[0].test)] == [8, 8]
    assert [r.answer for r in stream[0].train.records] == [row["answer"] for row in objects("sums", 8)]
