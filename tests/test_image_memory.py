"""What a memory keeps of images beside texts: references, encoded files, or features of a frozen tower."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from test_vision_language import fit

from clkit import ConfigurationError, StreamDataModule
from clkit.data.batch import concatenate
from clkit.evaluation.token_scores import answer_loss
from clkit.memory.buffer import ClassBalancedBuffer, ReservoirBuffer
from clkit.strategies import AGEM, ExperienceReplay, InterpolatedLoRA
from clkit.testing import (
    check_strategy,
    small_image_instructions,
    small_instructions,
    small_language_module,
    small_vision_language_module,
)

KINDS = ("references", "encoded", "features")


class Gone:
    """An image whose file is not there any more."""

    def __init__(self, source):
        self.name, self.size = source.name, source.size

    def read(self):
        raise FileNotFoundError(self.name)


def hide(table, numbers):
    for number in numbers:
        table._sources[number] = Gone(table._sources[number])


def prepared(kind, capacity=6, device=None):
    stream = small_image_instructions()
    torch.manual_seed(0)
    module = small_vision_language_module(features="memory" if kind == "features" else None).eval()
    stream.collate_fn.prepare(module)
    buffer = ReservoirBuffer(capacity, device=device, images=kind)
    buffer.keep = None if kind == "references" else stream.collate_fn.keeper(module, kind)
    return stream, module, buffer


@pytest.mark.parametrize("device", [None, "disk"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_get_their_own_images_back_though_files_are_gone_and_after_a_checkpoint(kind, device, tmp_path):
    stream, module, buffer = prepared(kind, device=device)
    data, collate = stream[0].train, stream.collate_fn
    old = collate([data[i] for i in range(6)])
    buffer.insert(old)
    new = collate([stream[1].train[i] for i in range(6)])
    expected = torch.cat([answer_loss(module, part) for part in (new, old)])
    torch.save(buffer.state_dict(), tmp_path / "state")
    if kind != "references":
        hide(collate.images, old["images"].used())
    again = ReservoirBuffer(6, device=device, images=kind)
    again.keep = buffer.keep
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for memory in (buffer, again):
        torch.testing.assert_close(answer_loss(module, concatenate([new, memory.contents()])), expected)
        drawn = copy.deepcopy(memory).contents() if device is None else memory.contents()
        assert torch.equal(drawn["input_ids"], old["input_ids"])
    if kind == "encoded":
        # what is looked at is the memory's own, and not what happens to be known of it
        fresh = small_vision_language_module()
        fresh.load_state_dict(module.state_dict())
        collate.prepare(fresh.eval())
        torch.testing.assert_close(answer_loss(fresh, again.contents()), expected[6:])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_kept_once_and_as_long_as_a_sample_shows_it(kind):
    stream, _, buffer = prepared(kind, capacity=4)
    table, collate = stream.collate_fn.images, stream.collate_fn
    samples = [stream[0].train[i] for i in range(24)] * 3
    for start in range(0, len(samples), 5):
        buffer.insert(collate(samples[start : start + 5]))
        held = buffer.contents()["images"]
        shown = sorted(set(held.used()))
        assert buffer.storage.shown == shown
        kept = {n: held.kept[n] for n in shown} if kind != "references" else {}
        assert held.kept.keys() == kept.keys()
        sizes = {n: sum(part.nbytes for part in one.values()) for n, one in kept.items()}
        assert sum(sizes.values()) <= buffer.storage.image_bytes <= sum(sizes.values()) + 400 * len(sizes)
        if kind == "encoded":
            assert all(one["encoded"].numpy().tobytes() == table.content(n) for n, one in kept.items())


def run(folder, kind, build=None, **options):
    torch.manual_seed(0)
    module = small_vision_language_module(features="memory" if kind == "features" else None, **options)
    strategy = build() if build else ExperienceReplay(capacity=8, images=kind)
    stream = small_image_instructions(2, 8)

    class Lose(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.datamodule.experience.index == 1:
                first = stream[0].train
                hide(trainer.datamodule.collate_fn.images, {n for row in first._numbers for n in row})

    pl.seed_everything(0, verbose=False)
    data = StreamDataModule(stream, batch_size=4, epochs=2)
    fit(module, data, [strategy, *([Lose()] if kind != "references" else [])], default_root_dir=folder)
    found = json.loads((folder / "memory.json").read_text())
    return module, strategy, found


def test_all_three_train_alike_and_memory_json_has_the_bytes_of_each(tmp_path):
    runs = {}
    for kind in KINDS:
        runs[kind] = run(tmp_path / kind, kind)
    first, strategy, references = runs["references"]
    for kind in KINDS[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), runs[kind][0].parameters(), strict=True))
    shown = strategy.buffer.storage.shown
    files = sum(len(first._reader.table.content(n)) for n in shown)
    assert references == {
        "kept_of_images": "references",
        "samples": 8,
        "different_images": len(shown),
        "texts": strategy.buffer.storage.n_bytes,
        "images": 0,
        "images_elsewhere": files,
    }
    encoded, features = runs["encoded"][2], runs["features"][2]
    assert 0 <= encoded["images"] - files < 100 * len(shown)
    assert 0 <= features["images"] - len(shown) * 4 * 32 * 4 < 200 * len(shown)
    assert encoded["images_elsewhere"] == features["images_elsewhere"] == 0
    assert encoded["texts"] == features["texts"] == references["texts"]


def test_a_reference_to_a_file_that_is_gone_is_named():
    stream, module, buffer = prepared("references")
    buffer.insert(stream.collate_fn([stream[0].train[0]]))
    hide(stream.collate_fn.images, [0])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        module(**buffer.contents())


@pytest.mark.parametrize("build", [AGEM, InterpolatedLoRA])
def test_other_memories_keep_them_too(tmp_path, build):
    options = {"samples_per_experience": 4} if build is AGEM else {"capacity": 6}
    _, _, found = run(tmp_path, "features", functools.partial(build, images="features", **options))
    assert found["kept_of_images"] == "features"
    assert found["images"] > found["different_images"] * 4 * 32 * 4 > 0


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ConfigurationError, match="images='pixels' is unknown"):
        ExperienceReplay(images="pixels")
    for strategy, module, stream, why in (
        ("features", small_vision_language_module(), small_image_instructions(1, 4), "set that, or use images='enc"),
        ("encoded", small_language_module(), small_instructions(1, 4), "These texts have no images"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            fit(module, StreamDataModule(stream, batch_size=2), [ExperienceReplay(images=strategy)])
    from clkit.testing import SmallModule, small_stream

    with pytest.raises(ConfigurationError, match="images of texts only"):
        fit(SmallModule(), StreamDataModule(small_stream(), batch_size=2), [ExperienceReplay(images="encoded")])
    assert ClassBalancedBuffer(3, images="encoded").images == "encoded"
    assert np.array_equal(ClassBalancedBuffer(3, seed=1).occupied(), [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoded", "features"])
def test_a_run_with_kept_images_resumes_in_the_same_bits(kind):
    check_strategy(
        lambda: ExperienceReplay(capacity=6, images=kind),
        module=functools.partial(small_vision_language_module, features="memory" if kind == "features" else None),
        stream=functools.partial(small_image_instructions, 2, 8),
        batch_size=4,
        only=["resume"],
    )
