"""DISCO against its formula written out sample by sample, and what it goes with."""

from __future__ import annotations

import copy
import functools
import json
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from plain import QUIET
from safetensors.torch import load_file

from clkit import ConfigurationError, SaveAdapters, StabilityGap, Stream, StreamDataModule
from clkit import strategies as s
from clkit.data.stream import Experience
from clkit.evaluation.token_scores import answer_probability
from clkit.language.dataset import InstructionDataset, Pad
from clkit.language.generation import AnswerScores, generate
from clkit.language.records import Record
from clkit.language.similarity import Embedding, word_features
from clkit.method.adapters import lora
from clkit.method.parameters import trainable
from clkit.strategies import DISCO
from clkit.testing import (
    CHECKS,
    check_strategy,
    small_image_instructions,
    small_instructions,
    small_language_module,
    small_stream,
    small_tokenizer,
    small_vision_language_module,
)


class Weights(pl.Callback):
    """Copies of the trainable weights at the start and the end of every experience."""

    def __init__(self):
        self.before, self.after = [], []

    def on_experience_start(self, trainer, module, experience):
        self.before.append(copied(module))

    def on_experience_end(self, trainer, module, experience):
        self.after.append(copied(module))


def copied(module):
    return {name: parameter.detach().clone() for name, parameter in trainable(module).items()}


def fit(stream, callbacks, module=None, steps=6, **settings):
    torch.manual_seed(0)
    module = small_language_module() if module is None else module
    data = StreamDataModule(stream, batch_size=4, steps=steps)
    trainer = pl.Trainer(max_epochs=data.total_epochs, callbacks=callbacks, **{**QUIET, **settings})
    trainer.fit(module, datamodule=data)
    return module.eval()


def words(text):
    """The share of ``a`` and of ``b`` among a text's letters."""
    return np.array([text.count("a"), text.count("b")], dtype=np.float64)


def by_hand(entry, x, shares, slots):
    """The formula, sample by sample and slot by slot."""
    base, scaling = entry.layer.get_base_layer(), entry.layer.scaling["default"]
    rows = []
    for sample, d in zip(x, shares, strict=True):
        update = sum(
            float(d[i]) * (slot[f"{entry.name}.lora_B.default.weight"] @ slot[f"{entry.name}.lora_A.default.weight"])
            for i, slot in enumerate(slots)
        )
        rows.append(sample @ (base.weight + scaling * update).T + (0 if base.bias is None else base.bias))
    return torch.stack(rows)


@torch.no_grad()
def test_layers_compute_the_mixture_of_the_slots_of_all_tasks():
    weights, disco = Weights(), DISCO()
    fit(small_instructions(), [disco, weights])
    assert len(disco.layers) == 2 * 7
    shares = torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.7, 0.0, 0.3]])
    for entry in disco.layers:
        x = torch.randn(3, 5, entry.layer.in_features)
        assert all(after[f"{entry.name}.lora_B.default.weight"].any() for after in weights.after)
        with disco.mixed(None, shares):
            found = entry.layer(x)
        torch.testing.assert_close(found, by_hand(entry, x, shares, weights.after), rtol=1e-4, atol=1e-5)
        last = by_hand(entry, x, torch.ones(3, 1), weights.after[2:])
        torch.testing.assert_close(entry.layer(x), last, rtol=1e-4, atol=1e-5)


def test_weights_of_a_worked_example():
    disco = DISCO(0.5, features=words)
    assert disco.weights(["ab", "b"]).tolist() == [[1.0], [1.0]]
    disco.anchors = [torch.tensor([2.0, 0.0]).double(), torch.tensor([3.0, 4.0]).double()]
    # cos(aab, a_1) = 2 / sqrt 5, cos(aab, a_2) = (2 * 3 + 1 * 4) / (5 sqrt 5)
    one, two = math.exp(2 / 5**0.5 / 0.5), math.exp(2 / 5**0.5 / 0.5)
    assert disco.weights(["aab"])[0].tolist() == pytest.approx([one / (one + two), two / (one + two)])
    # cos(b, a_1) = 0, cos(b, a_2) = 0.8; a text without a feature is as near to all
    one, two = 1.0, math.exp(0.8 / 0.5)
    found = disco.weights(["b", "", "bb"])
    assert found[0].tolist() == pytest.approx([one / (one + two), two / (one + two)])
    assert found[1].tolist() == [0.5, 0.5]
    assert found[2].tolist() == pytest.approx(found[0].tolist())
    assert disco.weights([]).shape == (0, 2)
    sharp = DISCO(features=words)
    sharp.anchors = disco.anchors
    assert float(sharp.weights(["b"])[0, 0]) == pytest.approx(1 / (1 + math.exp(0.8 / 0.05)))


def test_anchors_are_the_means_over_the_training_prompts_of_each_task():
    stream, disco = small_instructions(), DISCO()
    # a memory's samples are no part of them
    fit(stream, [s.ExperienceReplay(16), disco])
    for experience, anchor in zip(stream, disco.anchors, strict=True):
        prompts = [record.prompt for record in experience.train.records]
        mean = sum(word_features(text) / len(prompts) for text in prompts)
        np.testing.assert_allclose(anchor.numpy(), mean, atol=1e-12)
    letters = DISCO(features=words)
    assert letters.mean_feature(["a", "ab", "ab", "bbb"]).tolist() == [3 / 4, 5 / 4]


def test_only_the_slot_in_training_is_trained_and_earlier_ones_stay_as_they_were():
    weights, disco = Weights(), DISCO()
    fit(small_instructions(), [disco, s.ExperienceReplay(8), weights])
    for entry in disco.layers:
        a, b = disco.slots[entry.name]
        names = f"{entry.name}.lora_A.default.weight", f"{entry.name}.lora_B.default.weight"
        for t in range(2):
            assert torch.equal(a[4 * t : 4 * t + 4], weights.after[t][names[0]])
            assert torch.equal(b[:, 4 * t : 4 * t + 4], weights.after[t][names[1]])
        for t in range(3):
            assert not weights.before[t][names[1]].any()
            assert not torch.equal(weights.before[t][names[0]], weights.after[t][names[0]])
        starts = [before[names[0]] for before in weights.before]
        assert not torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[1], starts[2])


class Batches(pl.Callback):
    """The batches of every experience."""

    def __init__(self):
        self.of = []

    def on_experience_start(self, trainer, module, experience):
        self.of.append([])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.of[-1].append({key: part.clone() for key, part in batch.items()})


def test_a_task_is_learned_as_by_a_plain_lora_that_starts_where_its_slot_does():
    weights, batches = Weights(), Batches()
    fit(small_instructions(2), [DISCO(), weights, batches])
    module = small_language_module()
    for before, after, own in zip(weights.before, weights.after, batches.of, strict=True):
        torch.manual_seed(0)
        module = small_language_module()
        for name, value in before.items():
            module.get_parameter(name).data.copy_(value)
        optimizer = torch.optim.SGD(trainable(module).values(), lr=0.05, momentum=0.9)
        assert len(own) == 6
        for batch in own:
            optimizer.zero_grad()
            module.net(**batch).loss.backward()
            optimizer.step()
        torch.testing.assert_close(copied(module), after, rtol=1e-4, atol=1e-6)


def merged(module, slots, shares):
    """A copy of a module whose weights hold the mixture of one sample, without an adapter that does anything."""
    found = copy.deepcopy(module)
    for name, layer in found.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
            update = sum(float(d) * (slot[b] @ slot[a]) for d, slot in zip(shares, slots, strict=True))
            layer.get_base_layer().weight.data += layer.scaling["default"] * update
            layer.lora_B["default"].weight.data.zero_()
    return found


def alone(module, weights, disco, data):
    """Modules for each sample of some data, merged with the slots at the end."""
    shares = disco.weights([record.prompt for record in data.records])
    assert shares.std(dim=0).min() > 0.01
    return [merged(module, weights.after, row) for row in shares]


def mixed_stream():
    """Two tasks, of which each is tested on samples of both: a batch mixes them."""
    first, second = small_instructions(2, 16)
    order = [record for pair in zip(first.test.records, second.test.records, strict=True) for record in pair]
    both = InstructionDataset(order, small_tokenizer()).for_scores()
    parts = [Experience(k, e.name, e.train, both) for k, e in enumerate((first, second))]
    return Stream(parts, name="mixed", kind="instruction", collate_fn=Pad())


@pytest.mark.parametrize("prefix_cache", [True, False])
@torch.no_grad()
def test_batches_of_several_tasks_are_scored_as_their_samples_one_by_one(tmp_path, prefix_cache):
    stream, weights, disco = mixed_stream(), Weights(), DISCO(1.0)
    gap = StabilityGap(
        every=1, score="answer_probability", dir=tmp_path, plot=False, batch_size=5, prefix_cache=prefix_cache
    )
    with torch.enable_grad():
        module = fit(stream, [disco, weights, gap])
    data = stream[0].test
    modules = alone(module, weights, disco, data)
    expected = [float(answer_probability(one, Pad()([data[i]]))) for i, one in enumerate(modules)]
    plainly = [float(answer_probability(module, Pad()([data[i]]))) for i in range(len(data))]
    assert abs(np.mean(expected) - np.mean(plainly)) > 1e-4
    # the last step, of the subset in memory, and the end of the experience, of all held-out data
    for kind in ("step", "end"):
        assert gap.history.select(kind).scores[-1].tolist() == pytest.approx([np.mean(expected)] * 2, rel=1e-4)


@torch.no_grad()
def test_answers_are_generated_in_batches_as_one_by_one(tmp_path):
    stream, weights, disco = mixed_stream(), Weights(), DISCO(0.3)
    scores = AnswerScores(None, max_new_tokens=4, batch_size=3, dir=tmp_path)
    torch.manual_seed(0)
    with torch.enable_grad():
        learner = small_language_module(optimizer=functools.partial(torch.optim.Adam, lr=0.01))
        module = fit(stream, [disco, weights, scores], learner, steps=40)
    data = stream[0].test
    lines = map(json.loads, (tmp_path / "answers" / "after_1.jsonl").read_text().splitlines())
    found = [line["answer"] for line in lines if line["experience"] == 0]
    prompts = [data.prompt(i) for i in range(len(data))]
    modules = alone(module, weights, disco, data)
    pairs = zip(modules, prompts, strict=True)
    assert found == [generate(one, [prompt], data.tokenizer, max_new_tokens=4)[0] for one, prompt in pairs]
    # the mixture knows both tasks, the slot of the last one its own alone
    assert found[::2] == [record.answer for record in data.records][::2]
    plainly = generate(module, prompts, data.tokenizer, max_new_tokens=4)
    assert {*plainly} == {"A", "B"}
    # what a user does by hand
    shares = disco.weights([record.prompt for record in data.records])
    settings = {"max_new_tokens": 4, "batch_size": 5, "around": lambda places: disco.mixed(module, shares[places])}
    assert generate(module, prompts, data.tokenizer, **settings) == found


def test_one_task_is_a_plain_lora_bit_for_bit(tmp_path):
    def results(strategies, folder):
        gap = StabilityGap(every=2, score="answer_probability", dir=folder, plot=False)
        scores = AnswerScores(6, max_new_tokens=3, dir=folder)
        fit(small_instructions(1), [*strategies, scores, gap])
        return gap.history.scores, (folder / "answers" / "after_0.jsonl").read_text()

    with_disco, plain = results([DISCO()], tmp_path / "disco"), results([], tmp_path / "plain")
    assert np.array_equal(with_disco[0], plain[0])
    assert with_disco[1] == plain[1]


@torch.no_grad()
def test_a_model_of_texts_and_images_mixes_in_its_language_model_and_shares_the_projector(tmp_path):
    stream, weights, disco = small_image_instructions(2, 8), Weights(), DISCO(1.0)
    gap = StabilityGap(every=3, score="answer_probability", dir=tmp_path, plot=False, batch_size=3)
    scores = AnswerScores(4, max_new_tokens=3, batch_size=3, blind=2, dir=tmp_path)
    torch.manual_seed(0)
    with torch.enable_grad():
        learner = small_vision_language_module(features="memory")
        module = fit(stream, [s.ExperienceReplay(4), disco, weights, gap, scores], learner)
    assert all("language_model" in entry.name for entry in disco.layers)
    projector = [name for name in weights.after[0] if "projector" in name]
    assert projector
    for name in projector:
        assert torch.equal(weights.before[1][name], weights.after[0][name])
        assert not torch.equal(weights.after[1][name], weights.after[0][name])
    collate = stream.collate_fn
    for k, experience in enumerate(stream):
        data = experience.test
        modules = alone(module, weights, disco, data)
        expected = [float(answer_probability(one, collate([data[i]]))) for i, one in enumerate(modules)]
        assert gap.history.select("end").scores[-1, k] == pytest.approx(np.mean(expected), rel=1e-4)
        lines = map(json.loads, (tmp_path / "answers" / "after_1.jsonl").read_text().splitlines())
        for line in lines:
            if line["experience"] == k:
                question = [data.question(line["sample"])]
                one = generate(
                    modules[line["sample"]],
                    question,
                    data.tokenizer,
                    max_new_tokens=3,
                    ends=data.ends,
                    images=data.images,
                )
                assert line["answer"] == one[0]


def test_features_of_an_encoder_take_the_place_of_words(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    embed, disco = Embedding(str(tmp_path)), DISCO(features=Embedding(str(tmp_path)))
    fit(small_instructions(2, 8), [disco], steps=1)
    assert [anchor.shape for anchor in disco.anchors] == [(16,), (16,)]
    text = "name the colour : red"
    anchors = [anchor.numpy() for anchor in disco.anchors]
    near = np.exp([embed(text) @ anchor / np.linalg.norm(anchor) / 0.05 for anchor in anchors])
    assert disco.weights([text])[0].tolist() == pytest.approx((near / near.sum()).tolist(), rel=1e-5)


def test_images_places_are_no_part_of_a_prompt():
    record = Record((("system", "a b"), ("user", "<image>\nb")), "red")
    data = copy.copy(small_instructions(1)[0].test)
    data.records = [record]
    disco = DISCO(features=words)
    disco.anchors = [torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()]
    experience = small_instructions(1)[0]
    found = disco.shares(experience, data, torch.tensor([0]))
    assert torch.equal(found, disco.weights(["b"]))
    assert not torch.equal(found, disco.weights(["<image>\nb"]))


def test_what_it_cannot_work_with_is_refused(tmp_path):
    for settings in ({"temperature": 0.0}, {"features": "tfidf"}):
        with pytest.raises(ConfigurationError, match=next(iter(settings))):
            DISCO(**settings)
    stream = small_instructions(2, 8)
    with pytest.raises(ConfigurationError, match="DISCO needs prompts, .* use a stream such as Instructions"):
        fit(small_stream(), [DISCO()])
    with pytest.raises(ConfigurationError, match="no trainable LoRA layer"):
        fit(stream, [DISCO()], small_language_module(adapter=None))
    embedding = lora(4, target_modules=["embed_tokens", "q_proj"], modules_to_save=None)
    with pytest.raises(ConfigurationError, match="choose other target_modules"):
        fit(stream, [DISCO()], small_language_module(adapter=embedding))
    biased = lora(4, target_modules=["q_proj"], modules_to_save=None, lora_bias=True)
    with pytest.raises(ConfigurationError, match="lora_bias=False"):
        fit(stream, [DISCO()], small_language_module(adapter=biased))
    adapted = small_vision_language_module(tower="adapted")
    with pytest.raises(ConfigurationError, match="tower=frozen"):
        fit(small_image_instructions(2, 8), [DISCO()], adapted)
    for other in (s.RegLoRA(), s.OLoRA(), s.PerTask(), s.InstructionGroups(), s.EWC(), s.WeightAverage()):
        for callbacks in ([DISCO(), other], [other, DISCO()]):
            with pytest.raises(ConfigurationError, match="starts each experience with new weights"):
                fit(stream, callbacks)
    for callbacks in ([DISCO(), s.MoELoRA(2)], [s.MoELoRA(2), DISCO()]):
        with pytest.raises(ConfigurationError, match="no plain LoRA"):
            fit(stream, callbacks)
    for name in ("asynchronous", "lazy"):
        gap = StabilityGap(score="token_accuracy", dir=tmp_path, plot=False, **{name: True})
        with pytest.raises(ConfigurationError, match="predicts some samples with other weights"):
            fit(stream, [DISCO(), gap])


def test_a_layer_that_sees_no_samples_is_refused_by_its_name():
    disco = DISCO()
    fit(small_instructions(1, 8), [disco], steps=1)
    entry = disco.layers[0]
    with (
        disco.mixed(None, torch.ones(2, 1)),
        pytest.raises(ConfigurationError, match=f"{entry.name} sees .* 2 samples"),
    ):
        entry.layer(torch.zeros(6, entry.layer.in_features))


def test_saved_adapters_are_the_slots(tmp_path):
    disco = DISCO()
    fit(small_instructions(2, 8), [disco, SaveAdapters(dir=tmp_path)])
    saved = load_file(tmp_path / "experience_0" / "live" / "adapter_model.safetensors")
    for entry in disco.layers:
        path = entry.name.removeprefix("net.")
        assert torch.equal(saved[f"{path}.lora_A.weight"], disco.slots[entry.name][0])
        assert torch.equal(saved[f"{path}.lora_B.weight"], disco.slots[entry.name][1])


@pytest.mark.parametrize("check", [check for check in CHECKS if check != "processes"])
def test_conformance(check):
    adapter = sum(parameter.nbytes for parameter in trainable(small_language_module()).values())
    check_strategy(
        DISCO,
        module=small_language_module,
        stream=small_instructions,
        only=[check],
        state_limit=2 * adapter + 3 * 4096 * 8,
    )


@pytest.mark.slow
@pytest.mark.parametrize("check", ["resume", "processes"])
def test_conformance_with_replay(check):
    check_strategy(
        lambda: [s.ExperienceReplay(16), DISCO()],
        module=small_language_module,
        stream=small_instructions,
        only=[check],
    )
