"""Batches of transformers' own collators, and encoder-decoders."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer, models
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from clkit import ConfigurationError, Experience, StabilityGap, Stream, StreamDataModule
from clkit import strategies as s
from clkit.evaluation.token_scores import answer_loss, token_accuracy
from clkit.language.generation import AnswerScores
from clkit.testing import small_instructions, small_language_module

QUIET = {
    **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
    **{"enable_checkpointing": False},
}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({str(n): n for n in range(40)}, unk_token="0")), pad_token="0"
)
METHODS = {
    "er": lambda: s.ExperienceReplay(8),
    "er, alpha": lambda: s.ExperienceReplay(8, alpha=0.5),
    "agem": lambda: s.AGEM(6, batch_size=4),
    "gem": lambda: s.GEM(6),
    "ilora": lambda: s.InterpolatedLoRA(8, gamma=0),
    "ewc": lambda: s.EWC(1.0),
    "cumulative": s.Cumulative,
}


class T5(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        self.model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))
        self.answers = []

    def training_step(self, batch, batch_idx):
        self.answers.append((batch["labels"] != -100).sum(dim=1).tolist())
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def pairs(n=12):
    """Inputs of 1 to 4 tokens, answers of 6."""
    return [
        {"input_ids": [5 + i] * (1 + i % 4), "attention_mask": [1] * (1 + i % 4), "labels": [20 + i] * 6}
        for i in range(n)
    ]


def stream(collate):
    return Stream(
        [Experience(k, f"t{k}", pairs(), pairs(4)) for k in range(2)], name="t5", kind="instruction", collate_fn=collate
    )


def fit(collate, *callbacks):
    data = StreamDataModule(stream(collate), batch_size=4, steps=3)
    module = T5()
    pl.Trainer(max_epochs=data.total_epochs, callbacks=list(callbacks), **QUIET).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_encoding_trains_as_a_dict_does_and_answers_stay_whole(name):
    collate = DataCollatorForSeq2Seq(TOKENIZER)
    one, other = (fit(c, METHODS[name]()) for c in (collate, lambda samples: dict(collate(samples))))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert {n for step in one.answers for n in step} == {6}


def test_scores_of_an_encoder_decoder_are_its_own_loss(tmp_path):
    def answer_tokens(module, batch):
        return (batch["labels"] != -100).sum(dim=1) / 10

    gap = StabilityGap(dir=tmp_path, plot=False, score=answer_tokens)
    module = fit(DataCollatorForSeq2Seq(TOKENIZER), gap).eval()
    for phase in ("step", "end"):
        assert gap.history.select(phase).scores[-1].tolist() == pytest.approx([0.6, 0.6])
    batch = dict(DataCollatorForSeq2Seq(TOKENIZER)(pairs(5)))
    with torch.no_grad():
        output = module.model(**batch)
        assert float(answer_loss(module, batch).mean()) == pytest.approx(float(output.loss), rel=1e-5)
        right = (output.logits.argmax(-1) == batch["labels"]).float().mean(dim=1)
        assert token_accuracy(module, batch).tolist() == pytest.approx(right.tolist())


@pytest.mark.parametrize(
    "strategy", [s.ExperienceReplay(99), s.AGEM(9, batch_size=2), s.GEM(9), s.InterpolatedLoRA(99)]
)
def test_what_is_remembered_is_one_batch_whatever_the_lengths_of_texts(strategy):
    data = StreamDataModule(small_instructions(3, 9), batch_size=3)
    module = small_language_module()
    pl.Trainer(max_epochs=data.total_epochs, callbacks=[strategy], **QUIET).fit(module, datamodule=data)
    found = strategy.remembered()
    texts = {
        tuple(row[mask.bool()].tolist()) for row, mask in zip(found["input_ids"], found["attention_mask"], strict=True)
    }
    assert len(found["labels"]) == 27
    assert texts == {tuple(e.train[i]["input_ids"].tolist()) for e in data.stream for i in range(9)}


@pytest.mark.parametrize(
    ("callback", "words"),
    [(lambda: s.InterpolatedLoRA(8), "use gamma=0"), (AnswerScores, "is an encoder-decoder.*encoder_decoder=True")],
)
def test_what_needs_one_text_refuses_an_encoder_decoder_before_training(callback, words, tmp_path):
    data = StreamDataModule(small_instructions(2), batch_size=4, steps=1)
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback()], default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ConfigurationError, match=words):
        trainer.fit(T5(), datamodule=data)
    assert trainer.global_step == 0
