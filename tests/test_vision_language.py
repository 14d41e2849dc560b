"""Models of texts and images: five families against a plain loop of transformers, and the parts that are trained."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import transformers
from torch import nn
from vision import FAMILIES, some_records

from clkit import ConfigurationError, SaveAdapters, StabilityGap, StreamDataModule
from clkit.data.batch import concatenate
from clkit.data.columns import take
from clkit.data.images import Images
from clkit.evaluation.token_scores import answer_loss, positions
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores, generate
from clkit.language.images import decoded
from clkit.language.models import CausalLM, VisionLanguage
from clkit.language.packing import packed
from clkit.memory.buffer import ReservoirBuffer
from clkit.method.adapters import lora
from clkit.strategies import ExperienceReplay
from clkit.testing import (
    check_strategy,
    small_image_instructions,
    small_language_module,
    small_vision_language_module,
)


@functools.cache
def built(family):
    """Data, table and module of a family; the module is in evaluation mode."""
    processor, config = FAMILIES[family]()
    torch.manual_seed(0)
    data = InstructionDataset(some_records(), processor)
    return data, data.images, VisionLanguage(config).eval()


def batch_of(data, rows, side="right"):
    return Pad(side, data.images)([data[i] for i in rows])


def plain_batch(data, rows):
    """What the processor itself makes of the same texts, and labels by hand."""
    processor = data.images.processor
    prompts, texts, pictures = [], [], []
    for i in rows:
        record = data.records[i]
        pieces = record.prompt.split("<image>")
        content = [{"type": "image"}] * (len(record.images) if len(pieces) == 1 else 0)
        for n, piece in enumerate(pieces):
            content += [{"type": "image"}] * (n > 0) + [{"type": "text", "text": piece}]
        messages = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        texts.append(f"{prompts[-1]} {record.answer}</s>")
        pictures.append([decoded(image) for image in record.images])
    options = {"text_kwargs": {"add_special_tokens": False, "padding": True, "padding_side": "right"}}
    batch = dict(processor(text=texts, images=pictures, return_tensors="pt", **options))
    labels = batch["input_ids"].clone()
    for row, prompt in enumerate(prompts):
        images = [pictures[row]] if pictures[row] else None
        n = len(processor(text=[prompt], images=images, text_kwargs={"add_special_tokens": False})["input_ids"][0])
        labels[row, :n] = -100
    labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_those_of_a_plain_loop(family):
    data, _, module = built(family)
    own, plain = copy.deepcopy(module), copy.deepcopy(module.net)
    loss = own.loss(batch_of(data, [0, 1, 3]))
    expected = plain(**plain_batch(data, [0, 1, 3])).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for mine, other in zip(own.net.parameters(), plain.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_is_its_samples_on_either_side_in_any_order_and_with_texts_alone(family):
    data, _, module = built(family)
    each = [(module(**batch_of(data, [i])).loss, (data[i]["labels"] != -100).sum()) for i in range(4)]
    expected = sum(loss * n for loss, n in each) / sum(n for _, n in each)
    for rows, side in (
        ([0, 1, 2, 3], "right"),
        ([0, 1, 2, 3], "left"),
        ([3, 2, 0, 1], "right"),
        ([2, 1, 3, 0], "left"),
    ):
        batch = batch_of(data, rows, side)
        assert "position_ids" not in batch
        torch.testing.assert_close(module(**batch).loss, expected, rtol=1e-5, atol=1e-5)
    swapped = batch_of(data, [0, 3])
    swapped["images"] = Images(swapped["images"].numbers.flip(0), swapped["images"].pixels)
    if family == "llava":  # elsewhere these two take different numbers of tokens
        assert abs(module(**swapped).loss - module(**batch_of(data, [0, 3])).loss) > 1e-5


@pytest.mark.parametrize("features", [None, "memory"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen2_vl"}))
def test_several_samples_in_a_row_give_the_loss_and_gradients_of_a_padded_batch(family, features):
    data, _, module = built(family)
    padded, joined = copy.deepcopy(module), VisionLanguage(copy.deepcopy(module.net), features=features).eval()
    seen = []
    joined.net.get_output_embeddings().register_forward_pre_hook(lambda head, args: seen.append(len(args[0])))
    for rows, side, joined.packing in (([0, 1, 2, 3], "right", 1000), ([3, 2, 0, 1], "left", 100)):
        losses = []
        for own in (padded, joined):
            own.zero_grad()
            losses.append(own.loss(batch_of(data, rows, side)))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        found = dict(padded.net.named_parameters())
        for name, parameter in joined.net.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, found[name].grad, rtol=1e-4, atol=1e-6)
    assert 1 in seen


@pytest.mark.parametrize("kind", ["Qwen2VL", "PaliGemma", "Gemma3", "Mllama"])
def test_models_that_need_more_than_the_order_of_images_do_not_pack(kind):
    with torch.device("meta"):
        net = transformers.AutoModelForImageTextToText.from_config(getattr(transformers, f"{kind}Config")())
    with (
        pytest.raises(ConfigurationError, match=r"counts their positions, in a way of its own.*packing=null"),
        packed(net, 9),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_in_batches_is_one_by_one(family):
    data, table, module = built(family)
    questions = [data.question(i) for i in range(4)]
    write = functools.partial(generate, module, tokenizer=data.tokenizer, max_new_tokens=4, images=table)
    assert write(questions) == [write([question])[0] for question in questions]
    assert write(questions, batch_size=2) == write(questions)


@torch.no_grad()
def test_positions_of_qwen2_vl_are_three_dimensional():
    # worked example 7.2 of the sheet: 4 texts, an image of 2 x 2 merged patches, texts
    data, _, module = built("qwen2_vl")
    seen = []
    rotary = module.net.model.language_model.rotary_emb
    handle = rotary.register_forward_hook(lambda part, args, kwargs, out: seen.append(kwargs or args), with_kwargs=True)
    sample = data[0]
    image = int((sample["input_ids"] == data.images.token_id).nonzero()[0])
    module(**batch_of(data, [0, 1]))
    handle.remove()
    found = (seen[0]["position_ids"] if isinstance(seen[0], dict) else seen[0][1])[:, 0]
    t, h, w = (found[row, image : image + 6].tolist() for row in range(3))
    assert found.dim() == 2
    assert t == [image] * 4 + [image + 2, image + 3]
    assert h == [image, image, image + 1, image + 1, image + 2, image + 3]
    assert w == [image, image + 1, image, image + 1, image + 2, image + 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_goes_to_the_language_model_alone_and_the_tower_keeps_every_bit(family):
    data, _, _ = built(family)
    _, config = FAMILIES[family]()
    adapter = lora(4, target_modules="all-linear", modules_to_save=None, task_type="CAUSAL_LM")
    module = VisionLanguage(config, adapter=adapter, projector_lr=3e-3, optimizer=torch.optim.AdamW).train()
    own = ("language_model", "text_model")
    paths = [name for name, _ in module.named_parameters() if "lora_" in name]
    assert paths
    assert all(any(part in path for part in own) for path in paths)
    optimizer = module.configure_optimizers()
    rates = {group["lr"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    projector = ("multi_modal_projector", "connector", "merger")
    for name, parameter in module.named_parameters():
        is_projector = any(part in name for part in projector) and "original_module" not in name
        assert parameter.requires_grad == ("lora_" in name or is_projector), name
        assert (id(parameter) in rates[3e-3]) == is_projector
        assert (id(parameter) in rates[1e-3]) == ("lora_" in name)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batch = batch_of(data, [0, 1, 2, 3])
    for _ in range(2):
        module(**batch).loss.backward()
        optimizer.step()
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert {"lora_" in name or any(part in name for part in projector) for name in moved} == {True}
    assert any("lora_" in name for name in moved)
    assert any(part in name for name in moved for part in projector)


def test_names_of_target_modules_that_the_tower_has_too_are_kept_from_it_unless_asked():
    for targets in (["q_proj", "v_proj"], r".*\.(q_proj|v_proj)"):
        adapter = lora(4, target_modules=targets, modules_to_save=None)
        found = {}
        for tower in ("frozen", "adapted"):
            module = small_vision_language_module(adapter=adapter, tower=tower, train_projector=False)
            names = [name for name, _ in module.named_parameters() if "lora_A" in name]
            found[tower] = ["vision_tower" in name for name in names]
        assert found == {"frozen": [False] * 4, "adapted": [True] * 4 + [False] * 4}
    everything = small_vision_language_module(adapter=None, tower="trained")
    assert all(parameter.requires_grad for parameter in everything.parameters())
    with pytest.raises(ConfigurationError, match="tower='adapted' is for a model with an adapter"):
        small_vision_language_module(adapter=None, tower="adapted")
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM has no vision tower"):
        VisionLanguage(small_language_module(adapter=None).net)


def with_batch_norm():
    module = small_vision_language_module(train_projector=True)
    tower = module.net.get_base_model().model.vision_tower
    embeddings = next(part for part in tower.modules() if type(part).__name__ == "CLIPVisionEmbeddings")
    patches = embeddings.patch_embedding
    embeddings.patch_embedding = nn.Sequential(patches, nn.BatchNorm2d(patches.out_channels).requires_grad_(False))
    embeddings.patch_embedding.weight = patches.weight  # CLIP reads its dtype there
    return VisionLanguage(module.net, optimizer=module.optimizer)


def test_a_frozen_tower_stays_in_evaluation_mode_while_the_rest_trains(tmp_path):
    module = with_batch_norm()
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    statistics = [buffer.clone() for buffer in norm.buffers()]
    stream = small_image_instructions(2, 8)
    data = StreamDataModule(stream, batch_size=4)
    modes = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            modes.append((norm.training, pl_module.training, pl_module.net.training))

    fit(module, data, [Watch(), StabilityGap(every=1, subset=4, score="token_accuracy", dir=tmp_path)])
    assert set(modes) == {(False, True, True)}
    assert all(torch.equal(a, b) for a, b in zip(statistics, norm.buffers(), strict=True))
    module.eval()
    module.train()
    assert not norm.training
    assert module.net.training


def fit(module, data, callbacks, **options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {**quiet, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=data)
    return trainer


class Own(pl.LightningModule):
    """Knows nothing of clkit."""

    def __init__(self, net):
        super().__init__()
        self.model = net

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)


def test_a_users_own_module_trains_with_every_callback_as_vision_language_does(tmp_path):
    found = []
    for kind in ("own", "clkit"):
        torch.manual_seed(0)
        module = small_vision_language_module()
        if kind == "own":
            net = module.net
            net._forward_pre_hooks.clear()
            net._forward_pre_hooks_with_kwargs.clear()
            module = Own(net)
        callbacks = [
            ExperienceReplay(capacity=12),
            StabilityGap(every=2, subset=6, score="token_accuracy", dir=tmp_path / kind),
            AnswerScores(subset=4, max_new_tokens=3, dir=tmp_path / kind),
            SaveAdapters(dir=tmp_path / kind / "adapters"),
        ]
        data = StreamDataModule(small_image_instructions(2, 12), batch_size=4, epochs=2, group_by_length=True)
        pl.seed_everything(0, verbose=False)
        fit(module, data, callbacks)
        found.append([p.detach() for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert (tmp_path / "own" / "answers.csv").read_text() == (tmp_path / "clkit" / "answers.csv").read_text()
    peft = pytest.importorskip("peft")
    again = peft.PeftModel.from_pretrained(
        small_vision_language_module(adapter=None).net, str(tmp_path / "own" / "adapters" / "experience_1" / "live")
    )
    assert any("multi_modal_projector.modules_to_save" in name for name, _ in again.named_parameters())


def test_a_model_that_has_run_is_evaluated_in_another_process(tmp_path):
    torch.manual_seed(0)
    module, stream = small_vision_language_module(), small_image_instructions(1, 8)
    module.loss(stream.collate_fn([stream[0].train[0]]))
    for name, asynchronous in (("beside", True), ("within", False)):
        gap = StabilityGap(score="token_accuracy", plot=False, dir=tmp_path / name, asynchronous=asynchronous)
        pl.seed_everything(0, verbose=False)
        fit(copy.deepcopy(module), StreamDataModule(stream, batch_size=4, steps=2), [gap])
    assert (tmp_path / "beside" / "history.csv").read_text() == (tmp_path / "within" / "history.csv").read_text()


@torch.no_grad()
def test_remembered_samples_bring_their_own_images_back():
    stream = small_image_instructions()
    data, collate = stream[0].train, stream.collate_fn
    module = small_vision_language_module().eval()
    collate.prepare(module)
    buffer = ReservoirBuffer(6)
    buffer.insert(collate([data[i] for i in range(6)]))
    new = collate([stream[1].train[i] for i in range(6)])
    mixed = answer_loss(module, concatenate([new, buffer.contents()]))
    apart = torch.cat([answer_loss(module, part) for part in (new, collate([data[i] for i in range(6)]))])
    torch.testing.assert_close(mixed, apart, rtol=1e-5, atol=1e-5)
    rows = torch.tensor([3, 0, 5])
    torch.testing.assert_close(answer_loss(module, take(new, rows)), apart[rows], rtol=1e-5, atol=1e-5)


def test_an_image_that_nobody_can_read_is_refused():
    module = small_vision_language_module().eval()
    stream = small_image_instructions()
    batch = stream.collate_fn([stream[0].train[0]])
    batch["images"] = Images(batch["images"].numbers)
    with pytest.raises(ConfigurationError, match="Image 0 is not in the batch and no stream is known"):
        module(**batch)


@torch.no_grad()
def test_texts_alone_go_through_as_through_the_language_model():
    module = small_vision_language_module(adapter=None).eval()
    inner = module.net
    config = inner.config.get_text_config()
    language = transformers.AutoModelForCausalLM.from_config(config)
    language.model.load_state_dict(inner.model.language_model.state_dict())
    language.lm_head.load_state_dict(inner.lm_head.state_dict())
    stream = small_image_instructions()
    texts = [i for i in range(len(stream[0].train)) if not len(stream[0].train[i]["images"])]
    batch = stream.collate_fn([stream[0].train[i] for i in texts[:3]])
    whole = module(**batch).logits
    del batch["images"]
    assert torch.equal(CausalLM(language).eval()(**batch).logits, whole)
    assert positions(module.net) == 128


def test_gradient_checkpointing_is_the_language_models():
    module = small_vision_language_module(gradient_checkpointing=True)
    on = {name for name, part in module.named_modules() if getattr(part, "gradient_checkpointing", False)}
    assert on
    assert all("language_model" in name for name in on if "layers" in name)
    stream = small_image_instructions()
    module.train()
    loss = module(**stream.collate_fn([stream[0].train[i] for i in range(4)])).loss
    loss.backward()
    torch.manual_seed(0)
    gradients = [p.grad.clone() for p in module.parameters() if p.requires_grad]
    assert all(bool(np.isfinite(gradient.abs().sum())) for gradient in gradients)


def test_the_positions_of_a_longer_sample_than_the_model_has_are_refused():
    stream = small_image_instructions(1, 4)
    module = small_vision_language_module()
    module.net.config.get_text_config().max_position_embeddings = 8
    with pytest.raises(ConfigurationError, match="has positions for 8"):
        fit(module, StreamDataModule(stream, batch_size=2), [])


@pytest.mark.slow
@pytest.mark.parametrize("check", ["resume", "batch", "evaluation", "accumulation", "bf16", "untouched"])
def test_replay_on_texts_and_images_does_what_every_strategy_does(check):
    check_strategy(
        lambda: ExperienceReplay(capacity=10),
        module=small_vision_language_module,
        stream=functools.partial(small_image_instructions, 2, 8),
        batch_size=4,
        only=[check],
    )


@pytest.mark.slow
def test_two_processes_train_as_one_though_one_has_no_image():
    check_strategy(
        lambda: ExperienceReplay(capacity=10),
        module=small_vision_language_module,
        stream=functools.partial(small_image_instructions, 2, 8),
        batch_size=4,
        only=["processes"],
    )
