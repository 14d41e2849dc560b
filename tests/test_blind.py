"""The blind baseline: what a model answers that is shown another image, or a grey one."""

from __future__ import annotations

import json
from io import BytesIO

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from vision import FAMILIES, in_memory

from clkit import ConfigurationError, Experience, Stream, StreamDataModule
from clkit.language import generation
from clkit.language.blind import another_image, grey_image
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores
from clkit.language.images import ImageBytes, ImageTable, decoded
from clkit.language.records import Record
from clkit.testing import (
    small_image_instructions,
    small_instructions,
    small_processor,
    small_vision_language_module,
)

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
    for make in (another_image(data, range(4)), grey_image(table)):
        for n, size in enumerate(sizes):
            other = make(n)
            assert other != n
            assert table[other].size == size
            question = {**data.question(n), "images": torch.tensor([other])}
            Pad("left", table)([question])  # loads it, with as many tokens as are in the question
    assert another_image(data, range(4))(1) == 3  # of the same size: itself
    assert decoded(table[grey_image(table)(0)]).getcolors() == [(32 * 32, (128, 128, 128))]
    alone = InstructionDataset(records[:1], processor)
    assert another_image(alone, [0])(0) is None


COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def coloured(name: str, n: int) -> ImageBytes:
    content = BytesIO()
    Image.new("RGB", (16, 16), tuple(part + n for part in COLOURS[name])).save(content, "PNG")
    return ImageBytes(f"{name} {n}", content.getvalue())


def colours(n: int) -> Stream:
    """What colour is it? Every fourth sample has no image."""
    table, names = ImageTable(small_processor()), list(COLOURS)

    def asked(i: int) -> Record:
        shown = () if i % 4 == 3 else (coloured(names[i % 3], i),)
        return Record((("user", "name the colour"),), names[i % 3] if shown else "no", images=shown)

    data = InstructionDataset([asked(i) for i in range(n)], table.processor, images=table)
    parts = [Experience(k, f"colours {k}", data, data.for_scores()) for k in range(2)]
    return Stream(parts, name="colours", kind="instruction", collate_fn=Pad("right", table))


def colour(image) -> str:
    pixel = decoded(image).getpixel((0, 0))
    return list(COLOURS)[pixel.index(max(pixel))] if len({*pixel}) > 1 else "grey"


def seeing(module, prompts, tokenizer, *, images, **_):
    """Answers with the colour of the image, and no without one."""
    texts = [colour(images[int(prompt["images"][0])]) if len(prompt["images"]) else "no" for prompt in prompts]
    return [generation.Answer(text, False) for text in texts]


def test_scores_without_seeing_stand_beside_those_of_a_model_that_sees(monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "answers_to", seeing)
    stream = colours(12)
    scores = AnswerScores(None, blind=5, dir=tmp_path)
    trainer = pl.Trainer(max_epochs=2, callbacks=[scores], enable_checkpointing=False, **QUIET)
    trainer.fit(small_vision_language_module(), datamodule=StreamDataModule(stream, batch_size=8, steps=1))
    found = json.loads((tmp_path / "answers.json").read_text())
    assert found["score"]["matrix"] == [[1.0, None], [1.0, 1.0]]
    assert found["grey_image"]["matrix"] == [[0.0, None], [0.0, 0.0]]
    # nine samples have images, of the colours 0 1 2 1 2 0 2 0 1; four further on, the first five are 2 0 2 0 1
    assert found["wrong_image"]["matrix"] == [[0.2, None], [0.2, 0.2]]
    header, *rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert header == "after,experience,task,metric,score,strict,wrong_image,grey_image,cut,n"
    assert rows[0] == "0,0,colours 0,exact_match,1.0,1.0,0.2,0.0,0.0,12"


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
