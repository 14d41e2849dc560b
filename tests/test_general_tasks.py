"""Answers before the training, and to tasks that are never trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from language import make_module, write_tasks
from plain import QUIET

from clkit import ConfigurationError, StabilityGap, Stream, StreamDataModule
from clkit import strategies as s
from clkit.language.answers import score_answer
from clkit.language.generation import AnswerScores, answers_to, generate
from clkit.metrics.functional import general_ability_delta
from clkit.scenarios import Instructions
from clkit.testing import small_tokenizer

METRICS = {"sums": "number", "colours": "exact_match", "options": "letter"}


@pytest.fixture
def root(tmp_path):
    return write_tasks(tmp_path / "tasks")


def make_stream(root, **options):
    return Instructions(["colours", "sums"], tokenizer=small_tokenizer(), root=root, **options)


def fit(stream, callbacks, module=None, ckpt_path=None):
    module = make_module(lr=0.3) if module is None else module
    data = StreamDataModule(stream, batch_size=8, steps=6)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


def scores_of(module, data):
    """Mean score of greedy answers, one by one."""
    module.eval()
    texts = [generate(module, [data.prompt(i)], data.tokenizer, max_new_tokens=3)[0] for i in range(len(data))]
    options = {"choices": 3} if data.metric == "letter" else {}
    scores = [score_answer(data.metric, t, r.answer, **options) for t, r in zip(texts, data.records, strict=True)]
    module.train()
    return sum(scores) / len(scores)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_general_tasks_are_asked_before_and_after_and_change_nothing_else(root, tmp_path):
    stream = make_stream(root, general=["options"], metrics=METRICS)

    def callbacks(name, stream, before):
        gap = StabilityGap(every=3, subset=4, score="token_accuracy", dir=tmp_path / name, plot=False, batch_size=4)
        return [s.ExperienceReplay(10), AnswerScores(None, max_new_tokens=3, before=before, dir=tmp_path / name), gap]

    untrained = make_module(lr=0.3)
    expected = {e.name: scores_of(untrained, e.test) for e in (*stream, *stream.general)}
    torch.manual_seed(3)
    with_it = fit(stream, callbacks("general", stream, True))
    plain = make_stream(root, metrics={"sums": "number"})
    torch.manual_seed(3)
    without = fit(plain, callbacks("plain", plain, False))
    assert all(torch.equal(a, b) for a, b in zip(with_it.parameters(), without.parameters(), strict=True))

    found, other = (json.loads((tmp_path / n / "answers.json").read_text()) for n in ("general", "plain"))
    assert found["score"]["before"] == pytest.approx([expected["colours"], expected["sums"]])
    general = found["general"]
    assert (general["experiences"], general["metrics"]) == (["options"], ["letter"])
    assert general["score"]["before"] == pytest.approx([expected["options"]])
    assert len(general["score"]["matrix"]) == 2
    last = scores_of(with_it, stream.general[0].test)
    assert general["score"]["matrix"][1] == pytest.approx([last])
    assert general["score"]["mean"] == pytest.approx(last)
    assert general["score"]["delta"] == pytest.approx(last - expected["options"])
    # what counts the stream's own tasks does not know them
    del found["score"]["before"], found["strict"]["before"], found["general"]
    assert found == other
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text())["metrics"] for n in ("general", "plain")]
    assert metrics[0] == metrics[1]

    rows = [row.split(",") for row in (tmp_path / "general" / "answers.csv").read_text().splitlines()]
    assert rows[0] == ["after", "experience", "task", "metric", "score", "strict", "cut", "n"]
    assert [row[:3] for row in rows[1:]] == [
        ["-1", "0", "colours"],
        ["-1", "1", "sums"],
        ["-1", "", "options"],
        ["0", "0", "colours"],
        ["0", "", "options"],
        ["1", "0", "colours"],
        ["1", "1", "sums"],
        ["1", "", "options"],
    ]


def test_lines_have_the_question_the_task_and_whether_the_answer_was_cut(root, tmp_path):
    stream = make_stream(root, general={"mine": "options"})
    scores = AnswerScores(5, max_new_tokens=3, before=True, dir=tmp_path)
    module = fit(stream, [scores])
    tests = {e.name: e.test for e in (*stream, *stream.general)}
    assert {line["task"] for line in lines_of(tmp_path / "answers" / "before.jsonl")} == {"colours", "sums", "mine"}
    lines = lines_of(tmp_path / "answers" / "after_1.jsonl")
    assert [line["experience"] for line in lines] == [0] * 5 + [1] * 5 + [None] * 5
    module.eval()
    for line in lines:
        data = tests[line["task"]]
        assert line["prompt"] == data.records[line["sample"]].prompt
        ids = data.prompt(line["sample"])[None]
        written = []
        with torch.no_grad():
            for _ in range(3):
                written.append(int(module.net(input_ids=ids).logits[0, -1].argmax()))
                ids = torch.cat([ids, torch.tensor([[written[-1]]])], dim=1)
        assert line["cut"] is (data.tokenizer.eos_token_id not in written)
    cut = [line["cut"] for line in lines if line["task"] == "sums"]
    row = next(row for row in scores.rows if (row["after"], row["task"]) == (1, "sums"))
    assert row["cut"] == pytest.approx(sum(cut) / 5)


def test_an_end_at_the_last_token_is_no_cut(root):
    stream, module = make_stream(root), make_module().eval()
    tokenizer = small_tokenizer()
    prompts = [stream[0].test.prompt(i) for i in range(4)]

    def cut(n):
        """Let the n-th token written be the end."""
        calls = []

        def end(net, args, output):
            calls.append(1)
            output.logits[..., tokenizer.eos_token_id] = 1e4 if len(calls) == n else -1e4

        handle = module.net.get_base_model().register_forward_hook(end)
        found = answers_to(module, prompts, tokenizer, max_new_tokens=3)
        handle.remove()
        return {answer.is_cut for answer in found}

    assert cut(3) == {False}
    assert cut(4) == {True}


def test_several_messages_before_an_answer_are_all_in_its_line(tmp_path, root):
    messages = [
        {"role": "user", "content": "what is 2 plus 3 ?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "name the colour : red"},
    ]
    for split in ("train", "test"):
        path = root / "chat" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([{"messages": [*messages, {"role": "assistant", "content": "red"}]}] * 3))
    stream = Instructions(["chat"], tokenizer=small_tokenizer(), root=root)
    fit(stream, [AnswerScores(1, max_new_tokens=1, dir=tmp_path)])
    (line,) = lines_of(tmp_path / "answers" / "after_0.jsonl")
    assert (line["prompt"], line["messages"]) == ("name the colour : red", messages)


def test_a_resumed_run_has_the_answers_from_before_the_training(root, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def answers():
        return AnswerScores(4, max_new_tokens=2, before=True, dir=tmp_path)

    stream = make_stream(root, general=["options"])
    fit(stream, [answers(), Save()])
    whole = {name: (tmp_path / name).read_text() for name in ("answers.json", "answers.csv")}
    fit(stream, [answers()], make_module(seed=1, lr=0.3), ckpt_path=tmp_path / "middle.ckpt")
    assert {name: (tmp_path / name).read_text() for name in whole} == whole


def test_tasks_of_their_own_weights_leave_general_ones_to_those_in_training(root, tmp_path):
    stream = make_stream(root, general=["options"])
    scores = AnswerScores(None, max_new_tokens=3, dir=tmp_path)
    module = fit(stream, [s.PerTask(), scores])
    assert float(scores.general_matrix()[-1, 0]) == pytest.approx(scores_of(module, stream.general[0].test))
    assert scores.general_matrix()[0].isnan().all()
    assert scores.zero_shot().isnan().all()


def test_mixtures_of_weights_answer_general_tasks_by_their_prompts(root, tmp_path):
    stream, disco = make_stream(root, general=["options"]), s.DISCO(0.5)
    scores = AnswerScores(None, max_new_tokens=3, batch_size=5, before=True, dir=tmp_path)
    module = fit(stream, [disco, scores]).eval()
    data, found = stream.general[0].test, {}
    for line in lines_of(tmp_path / "answers" / "after_1.jsonl"):
        if line["experience"] is None:
            found[line["sample"]] = line["answer"]
    assert len(found) == len(data)
    for i, record in enumerate(data.records):
        with disco.mixed(module, disco.weights([record.prompt])):
            assert generate(module, [data.prompt(i)], data.tokenizer, max_new_tokens=3) == [found[i]]


def test_general_tasks_that_a_strategy_cannot_place_are_refused_before_training(root, tmp_path):
    for task in ("colours", "sums"):
        for path in (root / task).glob("*.json"):
            path.write_text(json.dumps([{**r, "instruction": task} for r in json.loads(path.read_text())]))
    callbacks = [s.InstructionGroups(), AnswerScores(2, max_new_tokens=1, dir=tmp_path)]
    with pytest.raises(ConfigurationError, match="A record has no 'instruction'"):
        fit(make_stream(root, general=["options"]), callbacks)
    assert not (tmp_path / "answers").exists()


def test_of_general_tasks_the_training_data_is_not_read(root):
    (root / "options" / "train.json").unlink()
    (root / "options" / "task.json").write_text(json.dumps({"metric": "letter", "sizes": {"train": 999, "test": 9}}))
    stream = make_stream(root, general=["options"], limit={"test": 5}, metrics={"sums": "number"})
    (general,) = stream.general
    assert (general.name, len(general.test), general.test.metric) == ("options", 5, "letter")
    assert [e.name for e in Instructions(tokenizer=small_tokenizer(), root=root, general=["options"])] == [
        "colours",
        "sums",
    ]


def test_slices_and_streams_that_go_on_keep_general_tasks(root):
    stream = make_stream(root, general=["options"])
    assert stream[:1].general == stream.general
    later = Instructions({"more": "sums"}, tokenizer=small_tokenizer(), root=root, general=["options"])
    assert later.after(stream[:1]).general == later.general
    bare = make_stream(root)
    assert bare.fingerprint() != stream.fingerprint()
    assert bare.fingerprints() == stream.fingerprints()
    with pytest.raises(ConfigurationError, match="General task 'none' of stream 'x' has no test samples"):
        Stream(stream, name="x", kind="instruction", general=[type(stream[0])(0, "none", [], [])])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"general": ["sums"]}, "general has 'sums', which the stream trains on"),
        ({"general": {"mine": "sums"}}, "general has 'mine', which the stream trains on"),
        ({"general": "options"}, "general='options' is one text; use a list"),
        ({"general": {"mine": {"train": "x.json"}}}, "'mine' has no test split"),
        ({"metrics": {"options": "f1"}}, "metrics names 'options', which is no task"),
    ],
)
def test_general_tasks_that_cannot_work_are_refused(root, options, said):
    with pytest.raises(ConfigurationError, match=said):
        make_stream(root, **options)


def test_the_general_ability_delta_by_hand():
    assert general_ability_delta([0.5, 0.25], [0.25, 0.3]) == pytest.approx((-0.25 + 0.05) / 2)
    assert np.isnan(general_ability_delta([0.5, np.nan], [0.25, 0.3]))
