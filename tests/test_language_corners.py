"""Language streams in corners: what once was wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from filelock import FileLock
from language import make_config, make_module, write_tasks
from peft import PromptTuningConfig, get_peft_model
from plain import QUIET
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from clkit import ConfigurationError, StabilityGap, Stream, StreamDataModule
from clkit import strategies as s
from clkit.data.datasets import InMemoryDataset
from clkit.data.order import group_by_length
from clkit.evaluation.token_scores import answer_loss
from clkit.language.answers import find_letter
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores
from clkit.language.models import CausalLM, TextClassifier
from clkit.language.records import Record, read_records
from clkit.scenarios import Instructions
from clkit.testing import small_instructions, small_tokenizer


class Normed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_weights_of_a_task_of_its_own_have_their_own_statistics():
    torch.manual_seed(1)
    parts = [InMemoryDataset(torch.randn(40, 6) + 5 * k, torch.arange(40) % 2 + 2 * k) for k in range(2)]
    seen = {}

    class Watch(pl.Callback):
        def on_experience_end(self, trainer, module, experience):
            seen[experience.index] = {name: value.clone() for name, value in module.state_dict().items()}

    strategy = s.PerTask()
    data = StreamDataModule(Stream.from_datasets(parts, parts, n_classes=4), batch_size=10)
    pl.Trainer(max_epochs=2, callbacks=[strategy, Watch()], **QUIET).fit(Normed(), datamodule=data)
    bank = strategy.bank["task 0"]
    assert "net.1.running_mean" in bank
    for name, value in seen[0].items():
        assert torch.equal(bank[name], value), name
    # the second task began with the statistics of the beginning: 4 batches, not 8
    assert int(seen[1]["net.1.num_batches_tracked"]) == 4


def test_what_drop_last_leaves_out_is_not_always_the_longest():
    lengths, seen = torch.arange(10), torch.zeros(10)
    for epoch in range(60):
        rng = np.random.default_rng(epoch)
        order = torch.from_numpy(rng.permutation(10))
        grouped = group_by_length(rng, order, lengths[order], 4)
        assert sorted(grouped.tolist()) == list(range(10))
        assert all((batch.sort().values.diff() > 0).all() for batch in grouped[:8].view(2, 4))
        seen[grouped[:8]] += 1
    assert seen.min() > 30


def test_prompt_tuning_is_scored_at_the_right_tokens():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(make_config())
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    module = CausalLM(get_peft_model(base, settings)).eval()
    stream = small_instructions()
    batch = Pad()([stream[0].train[i] for i in range(3)])
    losses = [module(**Pad()([stream[0].train[i]])).loss.detach() for i in range(3)]
    with torch.no_grad():
        torch.testing.assert_close(answer_loss(module, batch), torch.stack(losses), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [2, None])
def test_a_decoder_classifies_a_text_as_it_does_alone(pad):
    config = make_config()
    config.num_labels, config.pad_token_id = 3, pad
    torch.manual_seed(0)
    module = TextClassifier(AutoModelForSequenceClassification.from_config(config), 3).eval()
    texts = [{"input_ids": torch.arange(5, 5 + n), "labels": torch.tensor(0)} for n in (3, 8)]
    with torch.no_grad():
        together = module(**Pad()(texts)).logits
        alone = torch.cat([module(**Pad()([text])).logits for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


class Continues:
    """A tokenizer that begins a text with a mark, as those of Llama do."""

    chat_template, eos_token_id, bos_token_id = "there is one", 0, None

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"{m['role'][0]}{m['content']};" for m in messages)
        return text + ("a" if add_generation_prompt else "")

    def __call__(self, texts, **options):
        return {"input_ids": [[1, *map(ord, text)] for text in texts]}


def test_the_answer_goes_on_with_the_text_as_the_template_writes_it():
    data = InstructionDataset([Record((("user", "hi"),), "yes", {})], Continues())
    sample = data[0]
    answer = sample["input_ids"][sample["labels"] != -100]
    assert answer.tolist() == [*map(ord, "yes;"), 0]
    assert sample["input_ids"].tolist()[: len(data.prompt(0))] == [1, *map(ord, "uhi;a")]


@pytest.mark.parametrize(
    ("text", "n", "letter"),
    [("B, I think", 4, "B"), ("A, I think", 4, "A"), ("B, I think", 26, "B"), ("A, B", 4, None), ("H, I", 26, None)],
)
def test_a_pronoun_is_no_second_option(text, n, letter):
    assert find_letter(text, n) == letter


def tasks(folder, **more):
    write_tasks(folder)
    return {"root": folder, "tokenizer": small_tokenizer(), "chat": False, **more}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": {"val": 1}}, "limit has an unknown key 'val'; did you mean eval"),
        ({"limit": -1}, "limit of train=-1"),
        ({"limit": {"train": 1.5}}, "limit of train=1.5"),
        ({"metrics": "unknown"}, "metric='exactmatch' is unknown; use one of exact_match"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(tmp_path, options, said):
    arguments = tasks(tmp_path, **options)
    if options.get("metrics"):
        arguments["metrics"] = {sorted(path.name for path in tmp_path.iterdir() if path.is_dir())[0]: "exactmatch"}
    with pytest.raises(ConfigurationError, match=said):
        Instructions(**arguments)


def test_references_that_a_metric_cannot_read_are_found_before_training(tmp_path):
    arguments = tasks(tmp_path)
    first = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())[0]
    stream = Instructions(**arguments, metrics={first: "letter"})
    callback = AnswerScores(dir=tmp_path)
    trainer = pl.Trainer(callbacks=[callback], **QUIET)
    trainer.datamodule = StreamDataModule(stream, batch_size=2)
    with pytest.raises(ConfigurationError, match="letter"):
        callback.setup(trainer, make_module(), "fit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "must be an object"),
        ('{"metrc": "f1"}', "unknown key 'metrc'; did you mean metric"),
    ],
)
def test_a_bad_description_of_a_task_is_named(tmp_path, text, said):
    arguments = tasks(tmp_path)
    first = sorted(path for path in tmp_path.iterdir() if path.is_dir())[0]
    (first / "task.json").write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        Instructions(**arguments)


def test_half_a_character_and_huge_numbers_are_bad_records(tmp_path):
    path = tmp_path / "train.jsonl"
    good = json.dumps({"prompt": "red", "answer": "blue"})
    path.write_text(
        "\n".join([good, '{"prompt": "red \\ud83d", "answer": "blue"}', '{"x": ' + "9" * 5000 + "}"]) + "\n"
    )
    assert read_records(path, "skip")[1] == 2
    with pytest.raises(ConfigurationError, match="line 2: its prompt has half of a surrogate pair"):
        read_records(path)


def test_models_and_streams_that_do_not_fit_say_so():
    with pytest.raises(ConfigurationError, match="the stream has 4 classes; choose a scenario of instructions"):
        CausalLM(make_config(), n_classes=4)
    with pytest.raises(ConfigurationError, match="the stream has no classes"):
        TextClassifier(make_config())
    short = make_config()
    short.max_position_embeddings = 4
    with pytest.raises(ConfigurationError, match="has positions for 4; use max_length=4"):
        pl.Trainer(max_epochs=1, **QUIET).fit(CausalLM(short), datamodule=StreamDataModule(small_instructions()))


@pytest.mark.parametrize("more", [0, 1])
def test_answers_that_the_model_has_no_positions_for_are_refused_before_training(tmp_path, more):
    stream = small_instructions()
    longest = max(len(data.prompt(i)) for data in (e.test for e in stream) for i in range(len(data)))
    module = make_module()
    room = module.net.config.max_position_embeddings - longest
    scores = AnswerScores(None, max_new_tokens=room + more, dir=tmp_path)
    trainer = pl.Trainer(max_epochs=len(stream), limit_train_batches=1, callbacks=[scores], **QUIET)
    if more:
        with pytest.raises(ConfigurationError, match=rf"has {longest} tokens.*max_new_tokens={room + more}"):
            trainer.fit(module, datamodule=StreamDataModule(stream))
        assert trainer.global_step == 0
    else:
        trainer.fit(module, datamodule=StreamDataModule(stream))
        assert len(scores.rows) == len(stream) * (len(stream) + 1) // 2


def test_answers_of_two_processes_in_one_folder_are_refused(tmp_path):
    def fit():
        stream, scores = small_instructions(), AnswerScores(2, max_new_tokens=1, dir=tmp_path)
        trainer = pl.Trainer(max_epochs=len(stream), limit_train_batches=1, callbacks=[scores], **QUIET)
        trainer.fit(make_module(), datamodule=StreamDataModule(stream))

    fit()
    written = (tmp_path / "answers.json").read_bytes()
    with FileLock(tmp_path / ".answers.lock"), pytest.raises(ConfigurationError, match="in another process"):
        fit()
    assert (tmp_path / "answers.json").read_bytes() == written
    fit()
    assert not list(tmp_path.rglob(".answers.lock"))


def test_other_texts_are_another_stream():
    one, same = small_instructions(), small_instructions()
    assert one.fingerprint() == same.fingerprint()
    other = small_instructions()
    other[0].train._tokens[0] += 1
    assert one.fingerprint() != other.fingerprint()


def test_metrics_count_the_samples_that_were_too_long(tmp_path):
    stream = small_instructions()
    stream[1].train.n_dropped, stream[2].train.n_cut = 3, 2
    gap = StabilityGap(score="token_accuracy", dir=tmp_path, plot=False)
    data = StreamDataModule(stream, batch_size=8, steps=1)
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[gap], **QUIET).fit(make_module(), datamodule=data)
    content = json.loads((tmp_path / "metrics.json").read_text())["stream"]
    assert content["dropped"] == {stream[1].name: 3}
    assert content["cut"] == {stream[2].name: 2}
