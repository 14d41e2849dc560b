"""The blind baseline: what a model answers that is shown another image, or a grey one."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from vision import FAMILIES, in_memory

from clkit import ConfigurationError, StreamDataModule
from clkit.language import generation
from clkit.language.blind import another_image, grey_image
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores
from clkit.language.images import decoded
from clkit.language.records import Record
from clkit.testing import small_image_instructions, small_instructions, small_vision_language_module

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_stand_ins_are_other_images_that_take_as_many_tokens(family):
    processor, _ = FAMILIES[family]()
    sizes = [(32, 32), (90, 40), (40, 90), (90, 40)]
    records = [
        Record((("user", f"what is in the image ? {n}"),), "yes", images=(in_memory(size, n),))
        for n, size in enumerate(sizes)
    ]
    data = InstructionDataset(records, processor)
    table = data.images
    for make in (another_image(data), grey_image(table)):
        for n, size in enumerate(sizes):
            other = make(n)
            assert other != n
            assert table[other].size == size
            question = {**data.question(n), "images": torch.tensor([other])}
            Pad("left", table)([question])  # loads it, with as many tokens as are in the question
    assert another_image(data)(1) == 3  # of the same size: itself
    assert decoded(table[grey_image(table)(0)]).getcolors() == [(32 * 32, (128, 128, 128))]
    alone = InstructionDataset(records[:1], processor)
    assert another_image(alone)(0) is None


def seeing(module, prompts, tokenizer, *, images, **_):
    """Answers with the colour of the last image, as the references of small_image_instructions do."""
    found = []
    for prompt in prompts:
        shown = prompt["images"].tolist()
        pixels = decoded(images[shown[-1]]).resize((1, 1)).getpixel((0, 0)) if shown else (0, 0, 0)
        names = ("red", "green", "blue")
        found.append(names[pixels.index(max(pixels))] if len({*pixels}) > 1 and max(pixels) > 140 else "no")
    return found


def test_scores_without_seeing_stand_beside_those_of_a_model_that_sees(monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "generate", seeing)
    stream = small_image_instructions(2, 24)
    scores = AnswerScores(None, blind=5, dir=tmp_path)
    data = StreamDataModule(stream, batch_size=8, steps=1)
    trainer = pl.Trainer(max_epochs=2, callbacks=[scores], enable_checkpointing=False, **QUIET)
    trainer.fit(small_vision_language_module(), datamodule=data)
    found = json.loads((tmp_path / "answers.json").read_text())
    assert found["score"]["matrix"] == [[1.0, None], [1.0, 1.0]]
    assert found["grey_image"]["matrix"] == [[0.0, None], [0.0, 0.0]]
    # 18 images lie 9 further on; colours repeat with the samples' number and place in it
    assert found["wrong_image"]["matrix"][1][0] == expected(stream[0].test)
    header, *rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert header == "after,experience,metric,score,strict,wrong_image,grey_image,n"
    assert rows[0] == f"0,0,exact_match,1.0,1.0,{expected(stream[0].test)},0.0,12"


def expected(data):
    order = [image for record in data.records for image in record.images]
    rows = [i for i in range(len(data)) if data.records[i].images][:5]
    right = 0
    for i in rows:
        shown = order[(order.index(data.records[i].images[-1]) + len(order) // 2) % len(order)]
        pixels = decoded(shown).resize((1, 1)).getpixel((0, 0))
        right += ("red", "green", "blue")[pixels.index(max(pixels))] == data.records[i].answer
    return right / 5


def test_training_is_the_same_with_and_without_the_blind_baseline(tmp_path):
    found = []
    for blind in (0, 3):
        torch.manual_seed(0)
        module = small_vision_language_module()
        pl.seed_everything(0, verbose=False)
        data = StreamDataModule(small_image_instructions(2, 12), batch_size=4, steps=2)
        callbacks = [AnswerScores(4, max_new_tokens=2, blind=blind, dir=tmp_path / str(blind))]
        pl.Trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=False, **QUIET).fit(module, datamodule=data)
        found.append([parameter.detach() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain, blind = (json.loads((tmp_path / name / "answers.json").read_text()) for name in "03")
    assert plain["score"] == blind["score"]
    assert "wrong_image" not in plain


def test_texts_alone_have_no_blind_baseline(tmp_path):
    stream = small_instructions()
    trainer = pl.Trainer(max_epochs=1, callbacks=[AnswerScores(blind=3, dir=tmp_path)], **QUIET)
    with pytest.raises(ConfigurationError, match="the stream is of texts alone"):
        trainer.fit(small_vision_language_module(), datamodule=StreamDataModule(stream, batch_size=2, steps=1))
