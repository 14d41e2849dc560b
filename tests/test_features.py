"""A frozen tower that is run once for each image, against the model that runs it each time."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import transformers
from pytorch_lightning.loggers import CSVLogger
from test_vision_language import batch_of, fit
from test_vision_language import built as shared
from vision import FAMILIES, in_memory

from clkit import ConfigurationError, StabilityGap, StreamDataModule
from clkit.data.images import Images
from clkit.files import run_folder
from clkit.language.dataset import InstructionDataset
from clkit.language.generation import AnswerScores, generate
from clkit.language.images import let_read
from clkit.language.models import VisionLanguage
from clkit.strategies import ExperienceReplay
from clkit.testing import check_strategy, small_image_instructions, small_vision_language_module

# what a model keeps is not read ahead from its table, which is therefore not one that other tests share
built = functools.cache(shared.__wrapped__)


def keeping(family, **options):
    """Data, a module that runs its tower each time, and one of the same weights that keeps its features."""
    data, table, module = built(family)
    kept = VisionLanguage(copy.deepcopy(module.net), features="memory", **options).eval()
    each = VisionLanguage(copy.deepcopy(module.net)).eval()
    let_read(each, table)
    let_read(kept, table)
    return data, each, kept


def features_of(module):
    return module._reader.features


def equal_losses(data, each, kept):
    """Both losses of one batch, with gradients: bit for bit, if the tower makes the same bits alone and in a batch."""
    losses, inputs = [], []
    for module in (each, kept):
        projector = module._parts.projector_roots[0]
        hook = module.net.get_submodule(projector).register_forward_pre_hook(
            lambda part, args: inputs.append(args[0].detach().clone())
        )
        losses.append(module.loss(batch_of(data, [0, 1, 2, 3])))
        hook.remove()
    assert len(inputs) >= 2
    torch.testing.assert_close(inputs[0], inputs[-1], rtol=1e-4, atol=1e-6)
    exact = {"rtol": 0, "atol": 0} if torch.equal(inputs[0], inputs[-1]) else {"rtol": 1e-4, "atol": 1e-6}
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, **exact)
    for (name, mine), (_, other) in zip(each.named_parameters(), kept.named_parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, **exact, msg=name)
    return losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_gradients_and_answers_are_those_of_pixels_bit_for_bit(family):
    data, each, kept = keeping(family)
    assert not batch_of(data, [0, 1, 2, 3])["images"].pixels
    equal_losses(data, each, kept)
    assert (features_of(kept).misses, features_of(kept).hits) == (3, 1)
    equal_losses(data, each, kept)
    assert (features_of(kept).misses, features_of(kept).hits) == (3, 5)
    # the projector is no part of what is kept
    before = each.loss(batch_of(data, [0, 1, 2, 3])).detach()
    for module in (each, kept):
        torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.1).step()
        module.zero_grad()
    assert equal_losses(data, each, kept) != before
    assert features_of(kept).misses == 3
    questions = [data.question(i) for i in range(4)]
    write = functools.partial(generate, tokenizer=data.tokenizer, max_new_tokens=4, images=data.images)
    assert write(kept, questions) == write(each, questions)
    assert write(kept, questions[:2]) == write(kept, questions)[:2]
    assert features_of(kept).misses == 3
    # the tower is
    with torch.no_grad():
        for module in (each, kept):
            module._parts.tower_parameters[0].add_(0.1)
    equal_losses(data, each, kept)
    assert features_of(kept).misses == 6


def test_precision_and_layer_and_processor_are_part_of_what_features_are_found_by():
    data, each, kept = keeping("llava")
    for seen, module in ((3, kept), (6, kept)):
        with torch.autocast("cpu", enabled=seen == 6), torch.no_grad():
            assert torch.equal(*(m(**batch_of(data, [0, 1, 3])).logits for m in (each, module)))
        assert features_of(kept).misses == seen
    for module in (each, kept):
        module.net.config.vision_feature_layer = -1
    let_read(kept, copy.copy(data.images))
    let_read(kept, data.images)
    equal_losses(data, each, kept)
    assert features_of(kept).misses == 9
    data.images.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    try:
        let_read(kept, copy.copy(data.images))
        let_read(kept, data.images)
        equal_losses(data, each, kept)
        assert features_of(kept).misses == 12
    finally:
        del data.images.processor.image_processor.image_mean


def trained(folder, *, workers=0, gap=None, answers=False, **options):
    torch.manual_seed(0)
    module = small_vision_language_module(**options)
    settings = {"every": 2, "subset": 4, "score": "token_accuracy", "plot": False, **(gap or {})}
    callbacks = [ExperienceReplay(capacity=8), StabilityGap(dir=folder, **settings)]
    if answers:
        callbacks.append(AnswerScores(subset=4, max_new_tokens=3, dir=folder))
    data = StreamDataModule(small_image_instructions(2, 8), batch_size=4, epochs=2, num_workers=workers)
    pl.seed_everything(0, verbose=False)
    fit(module, data, callbacks, default_root_dir=folder)
    return module


def contents():
    """The different images of the stream."""
    sets = [part for experience in small_image_instructions(2, 8) for part in (experience.train, experience.test)]
    return {image.read() for part in sets for record in part.records for image in record.images}


def report(folder):
    return json.loads((folder / "features.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, trained(folder, answers=True)


def ends_as(plain, module):
    return all(torch.equal(a, b) for a, b in zip(plain[1].parameters(), module.parameters(), strict=True))


def test_a_run_ends_in_the_same_bits_with_features_and_its_report_says_what_they_saved(tmp_path, plain):
    module = trained(tmp_path, features="memory", answers=True)
    assert ends_as(plain, module)
    for name in ("history.csv", "answers.csv"):
        assert (plain[0] / name).read_text() == (tmp_path / name).read_text()
    found, n = report(tmp_path), len(contents())
    assert found["misses"] == n
    # 4 tokens of 32 float32 numbers an image, and a few bytes of what goes with them
    assert 0 <= found["bytes"] - n * 4 * 32 * 4 < n * 20
    assert found["hits"] > 3 * n
    assert found["tower_seconds_avoided"] > found["tower_seconds"] > 0


def test_reports_go_to_the_folder_that_was_chosen_or_to_the_loggers(tmp_path, monkeypatch):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    chosen = pl.Trainer(default_root_dir=tmp_path, logger=CSVLogger(tmp_path / "logs"), **quiet)
    assert run_folder(chosen) == tmp_path
    monkeypatch.chdir(tmp_path)
    none = pl.Trainer(logger=CSVLogger("logs"), **quiet)
    assert run_folder(none) == Path(none.log_dir) != tmp_path
    assert run_folder(pl.Trainer(logger=False, **quiet)) is None


def test_features_on_disk_serve_the_next_run(tmp_path, plain):
    disk = {"features": "disk", "features_dir": tmp_path / "features"}
    for misses in (len(contents()), 0):
        assert ends_as(plain, trained(tmp_path, workers=1, **disk))
        assert report(tmp_path)["misses"] == misses
    files = sorted((tmp_path / "features").glob("*/*"))
    assert len(files) == len(contents())
    assert report(tmp_path)["bytes"] == sum(file.stat().st_size for file in files)
    files[0].write_bytes(b"torn")
    with pytest.warns(UserWarning, match="more are not kept; raise model.features_limit"):
        assert ends_as(plain, trained(tmp_path, features_limit=900, **disk))
    assert report(tmp_path)["misses"] > 1


def test_evaluations_beside_the_training_take_features_too(tmp_path, plain):
    trained(tmp_path, features="memory", gap={"asynchronous": True, "device": "cpu"})
    assert (plain[0] / "history.csv").read_text() == (tmp_path / "history.csv").read_text()


def test_memory_is_bounded_and_what_was_dropped_is_computed_again(tmp_path, plain):
    module = trained(tmp_path, features="memory", features_limit=3_000)
    assert ends_as(plain, module)
    found = report(tmp_path)
    assert 2_000 < found["bytes"] <= 3_000
    assert found["misses"] > len(contents())
    assert found["hits"] > 0
    # some images have the same content
    shown = [module._reader.table.content(n) for n in module._reader.table.known.nonzero()[:, 0].tolist()]
    assert len(set(shown)) <= 5


def test_workers_read_an_image_only_while_its_features_are_not_there(tmp_path):
    stream = small_image_instructions(1, 8)
    data = StreamDataModule(stream, batch_size=4, epochs=3, num_workers=1)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((len(set(batch["images"].used())), len(batch["images"].pixels)))

    fit(small_vision_language_module(features="memory"), data, [Watch()], default_root_dir=tmp_path)
    assert [read for _, read in seen[:2]] == [used for used, _ in seen[:2]]
    assert [read for _, read in seen[2:]] == [0] * 4


def test_an_image_that_joins_the_table_later_is_kept_too():
    data, each, kept = keeping("llava")
    number = data.images.add(in_memory((32, 32), 77))
    for _ in range(2):
        batches = [batch_of(data, [0]) for _ in range(2)]
        for batch in batches:
            batch["images"] = Images(torch.tensor([[number]]))
        with torch.no_grad():
            assert torch.equal(*(m(**batch).logits for m, batch in zip((each, kept), batches, strict=True)))
    assert (features_of(kept).misses, features_of(kept).hits) == (1, 1)


def test_a_tower_that_changes_is_refused():
    with pytest.raises(ConfigurationError, match="changes with tower='trained'; use tower='frozen'"):
        small_vision_language_module(adapter=None, tower="trained", features="memory")
    with pytest.raises(ConfigurationError, match="features='elsewhere' is unknown"):
        small_vision_language_module(features="elsewhere")
    with pytest.raises(ConfigurationError, match="give features_dir"):
        small_vision_language_module(features="disk")
    data, _, kept = keeping("llava")
    kept._parts.tower_parameters[0].requires_grad_(True)
    with pytest.raises(ConfigurationError, match="but parameters of this one are trained"):
        kept(**batch_of(data, [0]))


def test_images_that_are_changed_at_random_are_refused():
    class Shaky(transformers.CLIPImageProcessor):
        def __call__(self, *args, **options):
            out = super().__call__(*args, **options)
            out["pixel_values"] = out["pixel_values"] + torch.rand(1)
            return out

    data, table, _ = built("llava")
    own = table.processor.image_processor
    settings = own.to_dict()
    processor = copy.copy(table.processor)
    processor.image_processor = Shaky(size=settings["size"], crop_size=settings["crop_size"])
    shaky = InstructionDataset(data.records, processor)
    _, _, kept = keeping("llava")
    state = torch.random.get_rng_state()
    with pytest.raises(ConfigurationError, match="changes images at random"):
        let_read(kept, shaky.images)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["resume", "fresh"])
def test_a_run_with_features_resumes_in_the_same_bits(check):
    check_strategy(
        lambda: ExperienceReplay(capacity=10),
        module=functools.partial(small_vision_language_module, features="memory"),
        stream=functools.partial(small_image_instructions, 2, 8),
        batch_size=4,
        only=[check],
    )
