"""Weights by experience or by group of instructions, and the averages of LCIA on top."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st

from clkit import ConfigurationError, StabilityGap, Stream, StreamDataModule
from clkit import strategies as s
from clkit.data.stream import Experience
from clkit.evaluation.token_scores import token_accuracy
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores
from clkit.language.records import Record
from clkit.language.similarity import EmbeddingCosine, mean_similarity, tfidf_cosine
from clkit.method.parameters import trainable
from clkit.testing import CHECKS, check_strategy, small_instructions, small_language_module, small_tokenizer

QUIET = {
    **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
    **{"enable_checkpointing": False},
}


def test_similarity_of_the_sheet_by_hand():
    one, other = "answer question single word", "answer question option letter"
    assert tfidf_cosine(one, other) == pytest.approx(0.3360969, abs=1e-7)
    assert 2 / (2 + 2 * (np.log(3 / 2) + 1) ** 2) == pytest.approx(0.3360969, abs=1e-7)
    assert mean_similarity(tfidf_cosine, [one, other], [one, other]) == pytest.approx(0.6680485, abs=1e-7)
    assert tfidf_cosine("the of", "the of") == 1
    assert tfidf_cosine("the of", "of a") == 0


words = ["name", "pick", "answer", "colour", "letter", "the", "word", "of"]
texts = st.lists(st.sampled_from(words), min_size=1, max_size=6)
sets = st.lists(texts.map(" ".join), min_size=1, max_size=3, unique=True)


@given(sets, sets)
def test_similarity_is_symmetric_and_within_0_and_1(one, other):
    value = mean_similarity(tfidf_cosine, one, other)
    assert 0 <= value <= 1
    assert value == pytest.approx(mean_similarity(tfidf_cosine, other, one))
    assert mean_similarity(tfidf_cosine, one[:1], one[:1]) == 1


@given(st.lists(sets, min_size=1, max_size=6), st.floats(0, 1))
@pytest.mark.slow
def test_groups_are_at_most_as_many_as_tasks_and_matching_again_changes_nothing(tasks, threshold):
    groups = s.InstructionGroups(threshold)
    found = []
    for task in tasks:
        best, score = groups.nearest(task)
        found.append(groups.match(task))
        assert found[-1] == (best if best is not None and score >= threshold else len(groups.instructions) - 1)
        assert set(task) <= set(groups.instructions[found[-1]])
    assert len(groups.instructions) == len(set(found)) <= len(tasks)
    alone = s.InstructionGroups(threshold)
    assert alone.match(["pick a letter"]) == alone.match(["pick a letter"]) == 0
    assert alone.instructions == [["pick a letter"]]


def make_stream(*asks, n=16):
    """One task for each instruction: the answer repeats a word of the prompt."""
    tokenizer, experiences = small_tokenizer(), []
    for k, ask in enumerate(asks):
        parts = []
        for size in (n, 8):
            words = [("red", "green", "blue")[i % 3] for i in range(size)]
            records = [Record((("user", f"{ask} : {word}"),), word, {"instruction": ask}) for word in words]
            parts.append(InstructionDataset(records, tokenizer))
        experiences.append(Experience(k, f"task {k}", *parts))
    return Stream(experiences, name="asks", kind="instruction", collate_fn=Pad())


def fit(stream, callbacks, steps=5, seed=0, **options):
    torch.manual_seed(seed)
    module = small_language_module()
    data = StreamDataModule(stream, batch_size=4, steps=steps)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **options})
    trainer.fit(module, datamodule=data)
    return module


class Weights(pl.Callback):
    """A copy of the trainable weights after every experience."""

    def __init__(self):
        self.after = []

    def on_experience_end(self, trainer, module, experience):
        self.after.append({name: p.detach().clone() for name, p in trainable(module).items()})


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_each_task_alone_is_what_per_task_learns_of_it(tmp_path):
    stream, weights = small_instructions(), Weights()
    gap = StabilityGap(every=5, score="token_accuracy", dir=tmp_path, plot=False, batch_size=5)
    strategy, scores = s.PerTask(), AnswerScores(6, max_new_tokens=2, dir=tmp_path)
    module = fit(stream, [strategy, weights, gap, scores])
    for k in range(3):
        alone = fit(
            Stream(
                [Experience(0, "alone", stream[k].train, stream[k].test)],
                name="alone",
                kind="instruction",
                collate_fn=Pad(),
            ),
            [first := Weights()],
            seed=0,
        )
        if k == 0:
            assert same(weights.after[0], first.after[0])
        batch = Pad()([stream[k].test[i] for i in range(12)])
        with torch.no_grad():
            live = {name: p.detach().clone() for name, p in trainable(module).items()}
            for name, value in weights.after[k].items():
                module.get_parameter(name).copy_(value)
            module.eval()
            expected = float(token_accuracy(module, batch).mean())
            for name, value in live.items():
                module.get_parameter(name).copy_(value)
        ends = gap.history.select("end").scores[:, k]
        assert ends[k:].tolist() == pytest.approx([expected] * (3 - k))
        assert len({row["score"] for row in scores.rows if row["experience"] == k}) == 1
        del alone
    assert sorted(strategy.views) == ["task 0", "task 1"]


def test_tasks_of_one_instruction_share_weights_and_others_do_not():
    weights = Weights()
    strategy = s.InstructionGroups()
    fit(make_stream("name the colour", "pick option A", "name the colour"), [strategy, weights])
    assert strategy.instructions == [["name the colour"], ["pick option A"]]
    assert strategy.current == "group 0"
    assert same(strategy.bank["group 1"], weights.after[1])
    assert not same(weights.after[2], weights.after[0])


def test_samples_go_to_the_group_of_their_own_instruction(tmp_path):
    asks = "name the colour", "pick option A", "name the colour"
    stream, weights = make_stream(*asks), Weights()
    mixed = InstructionDataset([r for e in stream[:2] for r in e.test.records], small_tokenizer())
    stream = Stream(
        [Experience(0, "mixed", stream[0].train, mixed), Experience(1, "pick", stream[1].train, stream[1].test)],
        name="mixed",
        kind="instruction",
        collate_fn=Pad(),
    )
    strategy = s.InstructionGroups()
    gap = StabilityGap(every=100, score="token_accuracy", dir=tmp_path, plot=False, batch_size=3)
    module = fit(stream, [strategy, weights, gap])
    assert strategy.route(stream[0], mixed, torch.tensor([0, 9])) == ["group 0", "group 1"]
    total = 0.0
    with torch.no_grad():
        for rows, after in ((range(8), weights.after[0]), (range(8, 16), weights.after[1])):
            for name, value in after.items():
                module.get_parameter(name).copy_(value)
            scored = Pad()([mixed.for_scores()[i] for i in rows])
            total += float(token_accuracy(module.eval(), scored).sum())
    assert gap.history.select("end").scores[-1, 0] == pytest.approx(total / 16)


@pytest.mark.parametrize(("fallback", "expected"), [("newest", "group 1"), ("nearest", "group 0")])
def test_an_unknown_instruction_goes_to_the_newest_or_the_nearest_group(fallback, expected):
    strategy = s.InstructionGroups(0.95, fallback=fallback)
    fit(make_stream("name the colour", "pick option A"), [strategy], steps=1)
    other = make_stream("name red colour")[0]
    assert strategy.route(other, other.test, torch.tensor([0])) == [expected]


def test_the_average_rests_in_the_first_experience_of_a_group():
    asks = "name the colour", "name the colour", "pick option A"
    plain, averaged = Weights(), Weights()
    fit(make_stream(*asks), [s.InstructionGroups(), plain])
    fit(make_stream(*asks), [s.InstructionGroups(), s.EMABalance("fixed"), averaged])
    assert same(plain.after[0], averaged.after[0])
    assert not same(plain.after[1], averaged.after[1])
    # between the weights at the start and those of the plain run, as a slow average is
    moved = [float((averaged.after[1][n] - averaged.after[0][n]).norm()) for n in averaged.after[0]]
    plainly = [float((plain.after[1][n] - plain.after[0][n]).norm()) for n in plain.after[0]]
    assert 0 < sum(moved) < 0.2 * sum(plainly)


def test_what_cannot_be_routed_is_refused(tmp_path):
    stream = make_stream("name the colour", "pick option A")
    for name in ("asynchronous", "lazy"):
        gap = StabilityGap(score="token_accuracy", dir=tmp_path, plot=False, **{name: True})
        with pytest.raises(ConfigurationError, match="predicts some samples with other weights"):
            fit(stream, [s.PerTask(), gap])
    with pytest.raises(ConfigurationError, match="starts each experience with new weights"):
        fit(stream, [s.InstructionGroups(), s.EWC()])
    with pytest.raises(ConfigurationError, match="put InstructionGroups before EMABalance"):
        fit(stream, [s.EMABalance(), s.InstructionGroups()])
    bare = [Record((("user", "name the colour : red"),), "red")]
    data = InstructionDataset(bare, small_tokenizer())
    with pytest.raises(ConfigurationError, match="A record has no 'instruction'"):
        fit(Stream([Experience(0, "bare", data, data)], name="bare", kind="instruction"), [s.InstructionGroups()])


@pytest.mark.parametrize(
    ("part", "expected"),
    [("first_line", "one two"), ("second_line", "three : four"), ("last_line", "say : yes"), ("before_colon", "say ")],
)
def test_the_instruction_is_read_from_the_prompt(part, expected):
    record = Record((("user", "one two\nthree : four\n\nsay : yes\n"),), "red")
    assert s.InstructionGroups(instruction=part)._read(record) == expected
    assert s.InstructionGroups(instruction=lambda record: record.answer)._read(record) == "red"


@pytest.mark.parametrize(
    "settings", [{"threshold": 2.0}, {"start": "new"}, {"fallback": "none"}, {"similarity": "bm25"}]
)
def test_a_bad_value_is_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        s.InstructionGroups(**settings)


def test_embeddings_of_an_encoder_tell_sentences_apart(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    similarity = EmbeddingCosine(str(tmp_path))
    assert similarity("name the colour", "name the colour") == pytest.approx(1)
    assert 0 <= similarity("name the colour", "pick option A") < 1


@pytest.mark.parametrize("check", [check for check in CHECKS if check != "processes"])
@pytest.mark.parametrize("name", ["groups", "per_task", "er", "ilora"])
def test_conformance_on_texts(name, check):
    build = {
        "groups": lambda: [s.InstructionGroups(0.5), s.EMABalance()],
        "per_task": s.PerTask,
        "er": lambda: s.ExperienceReplay(16),
        "ilora": lambda: s.InterpolatedLoRA(16),
    }[name]
    check_strategy(build, module=small_language_module, stream=small_instructions, only=[check])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "er"])
def test_two_processes_on_texts(name):
    build = {"groups": lambda: s.InstructionGroups(0.5), "er": lambda: s.ExperienceReplay(16, alpha=0.5)}[name]
    check_strategy(build, module=small_language_module, stream=small_instructions, only=["processes"])
